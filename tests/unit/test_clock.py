"""Stage times of a device that works behind the host's back."""

import time

from trocar_engines.runtime.clock import DeviceClock, HostClock


class FakeDevice:
    """Gets round to a mark when the test says so; `now_ms` is its own time."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.waiting: list[FakeEvent] = []

    def make_event(self) -> "FakeEvent":
        return FakeEvent(self)

    def work(self, ms: float) -> None:
        """Take so long for what was asked for before the oldest mark it has not come past."""
        self.now_ms += ms
        self.waiting.pop(0).at_ms = self.now_ms


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.at_ms: float | None = None

    def record(self) -> None:
        self.device.waiting.append(self)

    def query(self) -> bool:
        return self.at_ms is not None

    def elapsed_time(self, end_event: "FakeEvent", /) -> float:
        assert self.at_ms is not None
        assert end_event.at_ms is not None, "CUDA raises when an event is not done"
        return end_event.at_ms - self.at_ms


def test_device_stages_are_what_the_device_took_and_readback_what_the_host_spent_beyond() -> None:
    device = FakeDevice()
    clock = DeviceClock(device.make_event)
    for stage in ("encode_image", "attend_memory", "decode_masks"):
        clock.lap(stage)  # launched, not done
    assert clock.read() == {}
    for ms in (0, 3, 1, 2):
        device.work(ms)
    time.sleep(0.02)  # the host waits for the masks
    clock.lap("readback")
    stages = clock.read()
    assert {name: ns for name, ns in stages.items() if name != "readback"} == {
        "encode_image": 3_000_000,
        "attend_memory": 1_000_000,
        "decode_masks": 2_000_000,
    }
    assert stages["readback"] >= 14_000_000, "20 ms less the 6 that the stages account for"


def test_stages_of_several_batches_add_up() -> None:
    device = FakeDevice()
    clock = DeviceClock(device.make_event)
    device.work(0)
    for _ in range(2):
        clock.lap("decode_masks")
        device.work(2)
        clock.lap("readback")
        device.work(5)  # between two batches, charged to neither
    assert clock.read()["decode_masks"] == 4_000_000


def test_memory_that_is_still_being_written_is_told_a_frame_later() -> None:
    device = FakeDevice()
    clock = DeviceClock(device.make_event)
    clock.lap("write_memory")
    device.work(0)
    assert clock.read() == {}
    device.work(1)
    assert clock.read() == {"write_memory": 1_000_000}


def test_host_stages_follow_each_other_without_a_gap() -> None:
    began_ns = time.perf_counter_ns()
    clock = HostClock()
    for stage in ("attend_memory", "readback", "attend_memory"):
        time.sleep(0.002)
        clock.lap(stage)
    stages = clock.read()
    assert list(stages) == ["attend_memory", "readback"]
    assert 6_000_000 <= sum(stages.values()) <= time.perf_counter_ns() - began_ns
