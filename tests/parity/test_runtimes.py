"""Every runtime against eager, stage by stage, on a network whose outputs are not vacuous."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from networks import TINY, lively_network
from trocar_engines.export import engine_folder
from trocar_engines.masklets import Picture, Prompt
from trocar_engines.memory.bank import BankConfig
from trocar_engines.network.sam2s import HIDDEN_BIAS, ImageFeatures, MemoryView, PromptTensors
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.runtime.interface import Runtime
from trocar_engines.runtime.onnx import OnnxRuntime
from trocar_engines.runtime.openvino import OpenVinoRuntime
from trocar_engines.tracker import Tracker, TrackerConfig

# The same float32 arithmetic with operators fused and sums reordered.
TOLERANCE = 1e-4
BFLOAT16_ERROR = 0.02
"""Root mean square, relative: eight bits of mantissa through some dozen layers."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def exported(cache: Path) -> OnnxRuntime:
    return OnnxRuntime(lively_network(), cache=cache, threads=2)


def run_stages(runtime: Runtime, rows: int, slots: int, points: int) -> Iterator[tuple[str, Tensor]]:
    """Outputs of every stage on inputs that both runtimes share: each stage gets eager's predecessors."""
    generator = torch.Generator().manual_seed(rows + slots)
    eager = EagerRuntime(lively_network())
    size, mask_size = TINY.input_size_px, TINY.mask_size
    pixels = torch.randint(0, 256, (rows, size, size, 3), dtype=torch.uint8, generator=generator)
    features = eager.encode_image(pixels)
    yield from zip(ImageFeatures._fields, runtime.encode_image(pixels), strict=True)
    logits = torch.randn(rows, mask_size, mask_size, generator=generator) * 4
    presence, prompted = torch.randn(rows, generator=generator), torch.arange(rows) % 2 == 0
    yield from zip(
        ("spatial", "prototypes"), runtime.encode_memory(features, logits, presence, prompted), strict=True
    )
    spatial, prototypes = eager.encode_memory(features, logits, presence, prompted)
    hidden = torch.zeros(rows, slots)
    hidden[0, -1] = HIDDEN_BIAS if slots > 1 else 0
    view = MemoryView(
        spatial=spatial.unsqueeze(1) + torch.randn(rows, slots, *spatial.shape[1:], generator=generator),
        slot_time=torch.arange(slots).expand(rows, -1) % 9,
        slot_bias=hidden,
        pointers=torch.randn(rows, 2, TINY.d_model, generator=generator),
        pointer_age=torch.tensor([[1.0, 15.0]]).expand(rows, -1),
        pointer_bias=torch.zeros(rows, 2),
    )
    attended = runtime.attend_memory(features.embedding, view)
    yield from zip(("conditioned", "class_token"), attended, strict=True)
    conditioned, class_token = eager.attend_memory(features.embedding, view)
    remembered = torch.stack([prototypes, prototypes.flip(-1)], dim=1)
    tracked = runtime.track_masks(conditioned, features, remembered)
    yield from ((f"tracked {name}", value) for name, value in tracked._asdict().items())
    prompted_masks = runtime.decode_prompt(
        eager.without_memory(features.embedding),
        features,
        PromptTensors(
            points=torch.rand(rows, points, 2, generator=generator) * size,
            labels=torch.ones(rows, points, dtype=torch.int64),
            mask=logits.unsqueeze(1),
            has_mask=torch.arange(rows) % 2 == 1,
        ),
        torch.arange(rows) % 3 == 0,
    )
    yield from ((f"prompted {name}", value) for name, value in prompted_masks._asdict().items())
    seen = runtime.recognise(class_token, pixels, logits)
    yield from seen._asdict().items()


# Two threads: one row they share; of three rows each takes one, and the third they share.
@pytest.mark.parametrize(("rows", "slots", "points"), [(1, 1, 1), (1, 7, 2), (3, 4, 5), (4, 3, 1)])
def test_onnx_agrees_with_eager_at_every_size(
    exported: OnnxRuntime, rows: int, slots: int, points: int
) -> None:
    expected = dict(run_stages(EagerRuntime(lively_network()), rows, slots, points))
    for name, value in run_stages(exported, rows, slots, points):
        torch.testing.assert_close(value, expected[name], atol=TOLERANCE, rtol=TOLERANCE, msg=name)
    for name in ("tracked mask_logits", "prompted mask_logits", "conditioned"):
        assert expected[name].std() > 1e-3, f"{name} is constant: this comparison proves nothing"


@pytest.mark.parametrize("rows", [1, 3])
def test_openvino_encodes_pictures_as_exactly_as_bfloat16_can(
    cache: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    # Without it OpenVINO takes another precision, and all else is as it would be.
    monkeypatch.setattr("trocar_engines.runtime.openvino._has_bfloat16", lambda library: True)
    runtime = OpenVinoRuntime(lively_network(), cache=cache, threads=2)
    expected = dict(run_stages(EagerRuntime(lively_network()), rows, 4, 1))
    for name, value in run_stages(runtime, rows, 4, 1):
        if name in ImageFeatures._fields:
            error = (value - expected[name]).norm() / expected[name].norm()
            assert error < BFLOAT16_ERROR, name
            assert value.dtype == torch.float32
        else:
            torch.testing.assert_close(value, expected[name], atol=TOLERANCE, rtol=TOLERANCE, msg=name)
    pixels = torch.randint(0, 256, (2, *2 * (TINY.input_size_px,), 3), dtype=torch.uint8)
    first, kept = runtime.encode_image(pixels[:1]), runtime.encode_image(pixels[:1]).embedding.clone()
    runtime.encode_image(pixels[1:])
    torch.testing.assert_close(first.embedding, kept, msg="the next picture was written over it")


def test_openvino_tells_nobody_that_it_was_imported() -> None:
    # In a process of its own: a module is imported once. What would send is openvino_telemetry.
    asked = (
        "import sys\n"
        "from trocar_engines.runtime.openvino import has_bfloat16\n"
        "has_bfloat16()\n"
        "print(*(name for name, module in sys.modules.items() if module))"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "openvino" in loaded
    assert not [name for name in loaded if name.startswith("openvino_telemetry")]


def test_engines_are_exported_once(cache: Path, exported: OnnxRuntime) -> None:
    stages: list[str] = []
    OnnxRuntime(lively_network(), cache=cache, threads=1, on_stage=stages.append)
    assert stages == []
    assert engine_folder(cache, lively_network(seed=1)) != engine_folder(cache, lively_network())
    assert [path.name for path in cache.iterdir()] == [engine_folder(cache, lively_network()).name]


def test_tracker_gives_the_same_masks_on_every_runtime(exported: OnnxRuntime) -> None:
    bank = BankConfig(recent_slots=2, long_term_slots=2, candidate_iou=0.0, candidate_interval_s=0.0)
    masks = []
    for runtime in (EagerRuntime(lively_network()), exported):
        tracker = Tracker(runtime, TrackerConfig(rows=2, bank=bank))
        stream = tracker.open_stream(bank, 2)
        rng = np.random.default_rng(0)
        size = TINY.input_size_px
        for frame in range(12):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            picture = Picture(frame_id=frame, pixels=pixels, width_px=size, height_px=size, time_s=frame / 30)
            step = tracker.step([stream], [picture])
            tracker.remember(step)
            if frame in (0, 3):
                point = (10.0 + 12 * frame, 30.0)
                prompt = Prompt(object_id=frame + 1, frame_id=frame, points=(point,), labels=(1,))
                masks.append(tracker.prompt(stream, prompt).masklet.mask_logits)
            masks += [masklet.mask_logits for masklet in step.results[0].masklets]
    half = len(masks) // 2
    assert np.std(masks[0]) > 1e-3
    np.testing.assert_allclose(np.stack(masks[half:]), np.stack(masks[:half]), atol=TOLERANCE)
