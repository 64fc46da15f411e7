"""What a GPU does, as NVIDIA's management library (NVML) tells; else why there is none."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

MW_PER_W = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuFigures:
    """One look at a GPU, or what many come to; None where the GPU does not tell.

    Args:
        percent: share of the last moment, up to a second, in which a kernel ran; of many looks the mean.
        memory_mb: taken, by anybody; of many the most.
        sm_mhz: clock of the multiprocessors; of many the lowest, for a clock that fell tells of heat or of a
            limit on power.
        memory_mhz: clock of the memory; likewise.
        power_w: drawn; of many the mean.
    """

    percent: float | None
    memory_mb: float | None
    sm_mhz: float | None
    memory_mhz: float | None
    power_w: float | None


def sum_up_gpu(readings: Sequence[GpuFigures]) -> GpuFigures | None:
    """Put the looks of a run together; None without one."""
    if not readings:
        return None
    return GpuFigures(
        percent=_fold(fmean, (one.percent for one in readings)),
        memory_mb=_fold(max, (one.memory_mb for one in readings)),
        sm_mhz=_fold(min, (one.sm_mhz for one in readings)),
        memory_mhz=_fold(min, (one.memory_mhz for one in readings)),
        power_w=_fold(fmean, (one.power_w for one in readings)),
    )


def _fold(fold: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return fold(told) if told else None


def load_nvml() -> Any:
    """NVML's Python binding, initialised.

    Raises:
        ImportError: it is not installed.
        Exception: NVML's own, where there is no driver.
    """
    import pynvml

    pynvml.nvmlInit()
    return pynvml


class GpuMeter:
    """Reads the GPU that the engine runs on: torch's current one, else the first.

    Args:
        load: gives the initialised binding.
    """

    def __init__(self, load: Callable[[], Any] = load_nvml) -> None:
        self.absence = ""
        """Why nothing can be read; empty where it can."""
        self.name = self.driver = ""
        try:
            self._nvml = load()
            self._device = self._find_device()
            self.name = _as_text(self._nvml.nvmlDeviceGetName(self._device))
            self.driver = _as_text(self._nvml.nvmlSystemGetDriverVersion())
        except ImportError:
            self.absence = "nvidia-ml-py is not installed: pip install 'nvidia-ml-py>=13'"
        except Exception as error:  # the binding's exceptions have no base that could be named without it
            self.absence = f"none through NVML: {error}"

    def read(self) -> GpuFigures | None:
        """Look once; None where there is nothing to look at."""
        if self.absence:
            return None
        nvml, device = self._nvml, self._device
        return GpuFigures(
            percent=_ask(lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu),
            memory_mb=_ask(lambda: nvml.nvmlDeviceGetMemoryInfo(device).used / 1e6),
            sm_mhz=_ask(lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
            memory_mhz=_ask(lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM)),
            power_w=_ask(lambda: nvml.nvmlDeviceGetPowerUsage(device) / MW_PER_W),
        )

    def _find_device(self) -> Any:
        import torch

        # NVML counts every GPU of the machine, torch those it is shown: only the UUID means the same.
        if torch.cuda.is_available():
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return self._nvml.nvmlDeviceGetHandleByIndex(0)


def _ask(question: Callable[[], float]) -> float | None:
    """One figure; None where this GPU, or a slice of it, does not tell."""
    try:
        return float(question())
    except Exception:  # as in the constructor
        return None


def _as_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
