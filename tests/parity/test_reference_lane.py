"""`bench-fps --mode reference`: sam2's predictor, driven frame by frame, sees what the engine sees."""

from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest

from trocar_bench.engine_lane import EngineLane
from trocar_bench.footage import Footage
from trocar_bench.mask_comparison import MaskComparison
from trocar_bench.process_meter import ProcessMeter
from trocar_bench.random_weights import write_random_weights
from trocar_bench.reference_lane import STAGE_METHODS, ReferenceLane, build_reference
from trocar_bench.speed_run import AlternatingRun, BlockLane, RunPlan
from trocar_engines.gpu_meter import GpuMeter
from trocar_engines.masklets import UInt8Array
from trocar_engines.scheduler import Scheduler, SchedulerConfig

MODEL = "sam2.1-hiera-tiny-512"
SIZE_PX = 512


def make_pictures(count: int) -> tuple[UInt8Array, ...]:
    """Coloured clouds that drift."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 12 + count, 3), np.uint8)
    clouds = cv2.resize(noise, None, fx=48, fy=48, interpolation=cv2.INTER_CUBIC)
    return tuple(
        np.ascontiguousarray(clouds[:SIZE_PX, 24 * index : 24 * index + SIZE_PX], np.uint8)
        for index in range(count)
    )


@pytest.mark.slow
def test_reference_and_engine_agree_on_the_frames_they_share(tmp_path: Path) -> None:
    weights = tmp_path / "random.safetensors"
    write_random_weights(MODEL, weights)
    predictor = build_reference(MODEL, weights, build="sam2", device="cpu")
    for layer in predictor.memory_attention.layers:
        rotations = (layer.self_attn.freqs_cis, layer.cross_attn_image.freqs_cis)
        assert {len(of_one) for of_one in rotations} == {(SIZE_PX // 16) ** 2}, "made anew on its first frame"
    pictures = make_pictures(4)
    labels = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    labels[100:200, 100:200], labels[300:400, 250:350] = 1, 2
    footage = Footage(pictures=pictures, labels=labels)
    plan = RunPlan(mode="reference", objects=2, streams=1, paced_fps=0, frames=2, warmup=1)
    masks = MaskComparison()
    config = SchedulerConfig(model=MODEL, weights=weights, runtime="eager", memory="vanilla", threads=1)
    with closing(Scheduler(config)) as scheduler:
        stream = scheduler.open_stream(is_live=False, max_objects=2)
        lanes: list[BlockLane] = [
            EngineLane(stream, plan, footage, pictures, window=1, on_masks=masks.record("engine")),
            ReferenceLane(predictor, plan, footage, pictures, on_masks=masks.record("sam2")),
        ]
        (_, _), (reference, _) = AlternatingRun(
            plan, lanes, ProcessMeter(None), GpuMeter(), lambda: None
        ).run()
    difference = masks.compare("engine", "sam2")
    assert difference.disagreements == 0
    assert difference.largest_logit > 1, "logits of nothing would agree with anything"
    prompted, *tracked = difference.per_frame
    assert len(tracked) == 3
    # The same sums in another order, through 24 layers.
    assert prompted is not None
    assert prompted < 1e-3
    # The reference stores its memories as bfloat16, which moves logits of 10 by 5e-3 on the first frame; a
    # wrong frame, click or memory moves them by more than 1.
    for one in tracked:
        assert one is not None
        assert one < 0.1
    assert set(reference.stages_ms) == set(STAGE_METHODS.values())
    assert not set(STAGE_METHODS) & set(vars(predictor)), "the predictor is left as it was"
