"""The whole tracker under `vanilla` against sam2's `SAM2VideoPredictor`, frame by frame.

Both see the same preprocessed pictures and prompts on frame 0; hole filling is off and masks may overlap. In
neither does an object know of another, so that one run of several objects stands for a run of each.

`tiny` is the official configuration. `nano` is ours without what the reference does not know (affinity
readout, semantic head, long-term embeddings) and with a memory encoder that reads masks at input size, as SAM
2's does; its reference is the official configuration with nano's sizes around nano's convolutional trunk.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sam2.build_sam import build_sam2_video_predictor
from sam2.modeling.sam.transformer import TwoWayTransformer
from torch import Tensor, nn

from trocar_engines.masklets import BoolArray, Float32Array, Picture, Prompt, UInt8Array
from trocar_engines.models import ModelEntry, bank_config, cpu_threads
from trocar_engines.network.config import NANO, NetworkConfig, network_config
from trocar_engines.network.sam2s import ABSENT_LOGIT, SAM2S, MemoryView
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.runtime.interface import Runtime
from trocar_engines.runtime.onnx import OnnxRuntime
from trocar_engines.tracker import LOGIT_CLAMP, Tracker, TrackerConfig

FRAMES = 24
WIDTH_PX, HEIGHT_PX = 640, 480
# Measured: nano 2e-4, tiny 4e-5. Spatial memory is rounded to bfloat16, which makes 1e-2 of 1e-7 where a
# value crosses a rounding edge; attention averages over many such values.
EAGER_TOLERANCE = 1e-3
ONNX_TOLERANCE = 1e-2

TINY = network_config("sam2.1-hiera-tiny-512")
PLAIN_NANO = dataclasses.replace(
    NANO,
    readout_dim=0,
    classes=(),
    has_long_term_embedding=False,
    memory_stride=16,
    memory_mask_stride=16,
)


def disc(x: float, y: float, radius: float) -> BoolArray:
    rows, columns = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
    return np.asarray((columns - x) ** 2 + (rows - y) ** 2 < radius**2)


FIRST, SECOND = (200.0, 180.0), (430.0, 300.0)
PROMPTS = (
    Prompt(object_id=1, frame_id=0, points=(FIRST,), labels=(1,)),
    Prompt(object_id=2, frame_id=0, points=(SECOND,), labels=(1,)),
    # The same object again: its mask so far becomes part of the prompt.
    Prompt(object_id=2, frame_id=0, points=((300.0, 100.0),), labels=(0,)),
    Prompt(object_id=3, frame_id=0, box=(120.0, 110.0, 280.0, 250.0)),
    Prompt(object_id=4, frame_id=0, box=(360.0, 240.0, 500.0, 360.0), points=(SECOND,), labels=(1,)),
    Prompt(object_id=5, frame_id=0, mask=disc(*FIRST, 75.0)),
    Prompt(object_id=6, frame_id=0, mask=disc(*SECOND, 60.0)),
)


def moving_pictures(size: int) -> UInt8Array:
    """uint8 [FRAMES, size, size, 3]: two discs over a drifting texture."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 24, 24, generator=generator) * 200
    texture = nn.functional.interpolate(coarse, 2 * size, mode="bicubic").clamp(0, 255)[0].permute(1, 2, 0)
    rows, columns = torch.meshgrid(*(torch.arange(size) / size,) * 2, indexing="ij")
    frames = []
    for t in range(FRAMES):
        shift = t * size // 128
        frame = texture[shift : shift + size, shift : shift + size].clone()
        for x, y, speed, color in ((0.31, 0.375, 0.012, (230, 60, 40)), (0.67, 0.625, -0.015, (40, 90, 240))):
            inside = (columns - x - speed * t) ** 2 + (rows - y - speed * t / 2) ** 2 < 0.015
            frame[inside] = torch.tensor(color, dtype=frame.dtype)
        frames.append(frame)
    return torch.stack(frames).to(torch.uint8).numpy()


def build_reference(config: NetworkConfig) -> Any:
    """sam2's predictor for `config`, made from its configuration of tiny."""
    overrides = [f"++model.image_size={config.input_size_px}"]
    if config is PLAIN_NANO:
        overrides += [
            "~model.image_encoder.trunk",
            "+model.image_encoder.trunk._target_=trocar_engines.network.trunk.ConvTrunk",
            "+model.image_encoder.trunk.config._target_=trocar_engines.network.config.ConvTrunkConfig",
            f"model.image_encoder.neck.d_model={config.d_model}",
            f"model.image_encoder.neck.position_encoding.num_pos_feats={config.d_model}",
            f"model.image_encoder.neck.backbone_channel_list={list(config.trunk.channels)}",
            f"model.image_encoder.neck.fpn_top_down_levels={list(config.fpn_top_down_levels)}",
            f"model.memory_attention.d_model={config.d_model}",
            f"model.memory_attention.num_layers={config.memory_layers}",
            f"model.memory_attention.layer.d_model={config.d_model}",
            f"model.memory_attention.layer.dim_feedforward={config.memory_mlp}",
            f"model.memory_attention.layer.self_attention.embedding_dim={config.d_model}",
            f"model.memory_attention.layer.cross_attention.embedding_dim={config.d_model}",
            f"model.memory_attention.layer.cross_attention.kv_in_dim={config.d_memory}",
            f"+model.memory_encoder.in_dim={config.d_model}",
            f"model.memory_encoder.out_dim={config.d_memory}",
            f"model.memory_encoder.position_encoding.num_pos_feats={config.d_memory}",
            f"+model.memory_encoder.mask_downsampler.embed_dim={config.d_model}",
            f"model.memory_encoder.fuser.layer.dim={config.d_model}",
            f"model.memory_encoder.fuser.num_layers={config.memory_fuser_layers}",
        ]
    predictor: Any = build_sam2_video_predictor(
        "configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu", hydra_overrides_extra=overrides
    )
    # sam2 fixes the size of this one in code.
    predictor.sam_mask_decoder.transformer = TwoWayTransformer(
        depth=2, embedding_dim=config.d_model, mlp_dim=config.decoder_mlp, num_heads=config.decoder_heads
    )
    predictor.fill_hole_area = 0
    return predictor.eval().requires_grad_(False)


def enliven(predictor: Any) -> None:
    """Random weights with which every part of memory moves the masks.

    As initialised, mask logits stay within 0.2 of zero, no object is ever present, temporal embeddings (std
    0.02) and layer scales (1e-6) change nothing, and pointers hardly reach the attention. Presence is `show`.
    """
    decoder = predictor.sam_mask_decoder
    with torch.no_grad():
        for embedding in ("maskmem_tpos_enc", "no_mem_embed", "no_obj_ptr", "no_obj_embed_spatial"):
            getattr(predictor, embedding).normal_()
        for layer in predictor.memory_encoder.fuser.layers:
            layer.gamma.fill_(1.0)
        for layer in predictor.memory_attention.layers:
            attention = layer.cross_attn_image
            for projection in (attention.k_proj, attention.v_proj, attention.out_proj):
                projection.weight.mul_(2.0)
        predictor.obj_ptr_proj.layers[-1].weight.mul_(10.0)
        predictor.obj_ptr_tpos_proj.weight.mul_(10.0)
        decoder.iou_prediction_head.layers[-1].weight.mul_(10.0)
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(50.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network, and what the reference makes of its pictures and prompts."""

    predictor: Any
    network: SAM2S
    pictures: UInt8Array
    prompts: tuple[Prompt, ...]
    expected: Float32Array

    @property
    def object_ids(self) -> list[int]:
        return sorted({prompt.object_id for prompt in self.prompts})

    def show(self, *, is_present: bool) -> None:
        """What the presence heads of both say from now on; they are one module."""
        self.predictor.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0 if is_present else -5.0)


def make_case(config: NetworkConfig, prompts: tuple[Prompt, ...]) -> Case:
    torch.manual_seed(0)
    predictor, network = build_reference(config), SAM2S(config)
    enliven(predictor)
    network.load_state_dict(predictor.state_dict())
    network.sam_mask_decoder.pred_obj_score_head = predictor.sam_mask_decoder.pred_obj_score_head
    case = Case(
        predictor=predictor,
        network=network.eval().requires_grad_(False),
        pictures=moving_pictures(config.input_size_px),
        prompts=prompts,
        expected=np.empty(0, dtype=np.float32),
    )
    return dataclasses.replace(case, expected=reference_masks(case))


@pytest.fixture(scope="module")
def nano() -> Case:
    return make_case(PLAIN_NANO, PROMPTS)


@pytest.fixture(scope="module")
def tiny() -> Case:
    """One object per kind of prompt: this network takes minutes where nano takes seconds."""
    return make_case(TINY, tuple(prompt for prompt in PROMPTS if prompt.object_id in (2, 4, 5)))


def reference_masks(case: Case, absent: frozenset[int] = frozenset()) -> Float32Array:
    """Mask logits of the reference, float32 [objects, FRAMES, S/4, S/4]; nothing shows on `absent` frames."""
    predictor, network = case.predictor, case.network
    pixels = torch.from_numpy(case.pictures).permute(0, 3, 1, 2).float()
    images = (pixels - network.image_mean) / network.image_std
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sam2.sam2_video_predictor.load_video_frames", lambda **_: (images, HEIGHT_PX, WIDTH_PX)
        )
        state = predictor.init_state("nowhere")
    case.show(is_present=True)
    for prompt in case.prompts:
        if prompt.mask is not None:
            predictor.add_new_mask(state, 0, prompt.object_id, torch.from_numpy(prompt.mask))
            continue
        predictor.add_new_points_or_box(
            state,
            0,
            prompt.object_id,
            points=torch.tensor(prompt.points) if prompt.points else None,
            labels=torch.tensor(prompt.labels, dtype=torch.int32) if prompt.points else None,
            box=None if prompt.box is None else torch.tensor(prompt.box),
            clear_old_points=prompt.box is not None,
        )
    for t, _, _ in predictor.propagate_in_video(state):
        case.show(is_present=t + 1 not in absent)
    by_object = [
        {**outputs["cond_frame_outputs"], **outputs["non_cond_frame_outputs"]}
        for outputs in state["output_dict_per_obj"].values()
    ]
    return np.array([[frames[t]["pred_masks"][0, 0].numpy() for t in range(FRAMES)] for frames in by_object])


def tracker_logits(runtime: Runtime, case: Case, absent: frozenset[int] = frozenset()) -> Float32Array:
    """Mask logits of our tracker, of the same shape."""
    entry = ModelEntry(name="parity", config=runtime.config, weights=None, card={})
    bank = bank_config(entry, "vanilla")
    tracker = Tracker(runtime, TrackerConfig(rows=len(case.object_ids), bank=bank))
    stream = tracker.open_stream(bank, len(case.object_ids))
    frames = []
    for t, pixels in enumerate(case.pictures):
        case.show(is_present=t not in absent)
        picture = Picture(frame_id=t, pixels=pixels, width_px=WIDTH_PX, height_px=HEIGHT_PX, time_s=t / 30)
        step = tracker.step([stream], [picture])
        tracker.remember(step)
        masklets = {masklet.object_id: masklet for masklet in step.results[0].masklets}
        if t == 0:
            masklets = {each.object_id: tracker.prompt(stream, each).masklet for each in case.prompts}
        frames.append([masklets[object_id].mask_logits for object_id in case.object_ids])
    return np.array(frames).swapaxes(0, 1)


def largest_error(logits: Float32Array, expected: Float32Array) -> float:
    """Over all objects, frames and pixels; where the reference says "absent", -1024, we say -32."""
    return float(np.abs(logits - np.maximum(expected, -LOGIT_CLAMP)).max())


def assert_agrees(logits: Float32Array, case: Case, tolerance: float) -> None:
    for object_id, mine, expected in zip(case.object_ids, logits, case.expected, strict=True):
        shown = expected[1:][expected[1:].max(axis=(1, 2)) > ABSENT_LOGIT]
        assert shown.std(axis=(1, 2)).min() > 0.1, f"object {object_id}: a constant mask proves nothing"
        assert shown.std(axis=0).mean() > 0.01, f"object {object_id}: nothing moves"
        assert largest_error(mine, expected) <= tolerance, f"object {object_id}"
    assert np.abs(case.expected[1:, 1:] - case.expected[:-1, 1:]).max() > 0.1, (
        "every object has the same mask"
    )


@pytest.mark.parametrize("model", ["nano", pytest.param("tiny", marks=pytest.mark.slow)])
def test_eager_tracker_agrees_with_sam2(model: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(model)
    assert_agrees(tracker_logits(EagerRuntime(case.network), case), case, EAGER_TOLERANCE)


@pytest.mark.parametrize("model", ["nano", pytest.param("tiny", marks=pytest.mark.slow)])
def test_onnx_tracker_agrees_with_sam2(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(model)
    runtime = OnnxRuntime(case.network, cache=tmp_path, threads=cpu_threads())
    assert_agrees(tracker_logits(runtime, case), case, ONNX_TOLERANCE)


def test_objects_that_come_and_go_agree_with_sam2(nano: Case) -> None:
    absent = frozenset({5, 6, 7, 14})
    expected = reference_masks(nano, absent)
    assert (expected[:, sorted(absent)] == ABSENT_LOGIT).all()
    assert np.abs(expected - nano.expected)[:, 20:].max() > ONNX_TOLERANCE, "an absence leaves no memory"
    logits = tracker_logits(EagerRuntime(nano.network), nano, absent)
    assert_agrees(logits, dataclasses.replace(nano, expected=expected), EAGER_TOLERANCE)


class OffByOne(EagerRuntime):
    """Reads memory as if one kind of index were shifted by one frame."""

    def __init__(self, network: SAM2S, shifted: str) -> None:
        super().__init__(network)
        self.shifted = shifted

    def attend_memory(
        self, embedding: Tensor, memory: MemoryView, *, is_full: bool = False
    ) -> tuple[Tensor, Tensor]:
        conditioning = self.config.num_maskmem - 1
        late = {
            "slot_time": (memory.slot_time + 1).clamp(max=conditioning),
            "pointer_age": memory.pointer_age + 1,
        }
        return super().attend_memory(
            embedding, memory._replace(**{self.shifted: late[self.shifted]}), is_full=is_full
        )


@pytest.mark.parametrize("shifted", ["slot_time", "pointer_age"])
def test_a_temporal_index_off_by_one_is_noticed(nano: Case, shifted: str) -> None:
    logits = tracker_logits(OffByOne(nano.network, shifted), nano)
    for mine, expected in zip(logits, nano.expected, strict=True):
        assert largest_error(mine, expected) > ONNX_TOLERANCE
