"""NVIDIA's management library without a GPU."""

from types import SimpleNamespace
from typing import Any


class FakeNvml:
    """The binding, as far as it is used."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802 - NVML's name, like those below
        assert index == 0
        return "device"

    def nvmlDeviceGetName(self, device: str) -> bytes:  # noqa: N802
        return b"NVIDIA Fake"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "600.1"

    def nvmlDeviceGetUtilizationRates(self, device: str) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=80)

    def nvmlDeviceGetMemoryInfo(self, device: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=3_000_000_000)

    def nvmlDeviceGetClockInfo(self, device: str, clock: int) -> int:  # noqa: N802
        return 1_980 if clock == self.NVML_CLOCK_SM else 2_600

    def nvmlDeviceGetPowerUsage(self, device: str) -> int:  # noqa: N802
        raise RuntimeError("Not Supported")
