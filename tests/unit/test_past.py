"""The command that measures prompts in the past, on a network too small to be any good."""

import dataclasses
import json

import numpy as np
import pytest

from networks import TINY, lively_network
from trocar_bench.past import Clip, Watch, main
from trocar_engines.masklets import Prompt
from trocar_engines.memory.bank import BankConfig, MemoryBank
from trocar_engines.models import model_entry
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.scheduler import LoadedModel
from trocar_engines.tracker import Tracker, TrackerConfig


def tiny_tracker() -> Tracker:
    return Tracker(EagerRuntime(lively_network()), TrackerConfig(rows=8, bank=BankConfig()))


def load_tiny(*_: object) -> LoadedModel:
    entry = dataclasses.replace(model_entry("sam2s-nano"), config=TINY)
    return LoadedModel(entry=entry, tracker=tiny_tracker())


def test_every_figure_is_measured_and_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--frames", "46", "--prompts", "1", "--seeds", "1", "--starts", "1"]
    assert main(arguments, load=load_tiny) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line) >= {"latency", "late", "correction", "loss", "model"}
    assert line["latency"]["to_object_max_ms"] > 0
    assert line["latency"]["prompts"] == 1
    assert line["late"]["objects"] == len(line["late"]["rows"]) > 0
    assert 0 < line["loss"]["trusted_frames"] < line["loss"]["frames"] < 46
    assert line["loss"]["keyframe_requests"] > 0
    assert line["loss"]["untrusted_memories"] == 0


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["no-such-folder"]])
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--frames", "2", "--figures", "late", *arguments], load=load_tiny) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("bench-past: ")


def test_the_watch_counts_a_memory_of_an_untrusted_frame() -> None:
    class Careless(MemoryBank):
        """Remembers whatever comes."""

        def choose_slot(self, facts):  # type: ignore[no-untyped-def]
            return super().choose_slot(dataclasses.replace(facts, is_trusted=True))

    pixels = np.zeros((TINY.input_size_px,) * 2 + (3,), np.uint8)
    clip = Clip(name="blank", pictures=(pixels,) * 3, labels=(None,) * 3, frame_rate_hz=30.0)
    for kind, memories in ((MemoryBank, 0), (Careless, 1)):
        watch = Watch(tiny_tracker())
        stream = watch.open_stream(BankConfig(), 1)
        watch.step([stream], [clip.picture(0, TINY.input_size_px)])
        watch.prompt(stream, Prompt(object_id=1, frame_id=0, points=((5, 5),), labels=(1,)))
        stream.objects[1].bank.__class__ = kind
        untrusted = dataclasses.replace(clip.picture(1, TINY.input_size_px), is_trusted=False)
        watch.remember(watch.step([stream], [untrusted]))
        assert watch.untrusted_memories == memories
