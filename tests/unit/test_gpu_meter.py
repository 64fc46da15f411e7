"""Reading a GPU through NVML, and saying so where there is none."""

from typing import Any

import pytest
import torch

from gpus import FakeNvml
from trocar_engines.gpu_meter import GpuFigures, GpuMeter, sum_up_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="would look for the UUID of the real one")
def test_gpu_tells_what_it_can() -> None:
    meter = GpuMeter(load=FakeNvml)
    assert (meter.absence, meter.name, meter.driver) == ("", "NVIDIA Fake", "600.1")
    assert meter.read() == GpuFigures(
        percent=80, memory_mb=3_000, sm_mhz=1_980, memory_mhz=2_600, power_w=None
    )


def test_absent_binding_is_named_with_its_remedy() -> None:
    def load() -> Any:
        raise ImportError

    meter = GpuMeter(load=load)
    assert "pip install 'nvidia-ml-py>=13'" in meter.absence
    assert meter.read() is None


def test_absent_driver_is_named() -> None:
    def load() -> Any:
        raise RuntimeError("NVML Shared Library Not Found")

    assert "NVML Shared Library Not Found" in GpuMeter(load=load).absence


def test_looks_come_to_means_peaks_and_lowest_clocks() -> None:
    looks = [
        GpuFigures(percent=50, memory_mb=10, sm_mhz=1_900, memory_mhz=2_600, power_w=None),
        GpuFigures(percent=100, memory_mb=30, sm_mhz=1_500, memory_mhz=None, power_w=None),
    ]
    assert sum_up_gpu(looks) == GpuFigures(
        percent=75, memory_mb=30, sm_mhz=1_500, memory_mhz=2_600, power_w=None
    )
    assert sum_up_gpu([]) is None
