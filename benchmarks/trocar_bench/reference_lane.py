"""sam2's own `SAM2VideoPredictor`, fed frame by frame: what our engine is compared with.

Same weights, same pictures at the model's input size, same clicks. What would make the comparison unfair is
left out on both sides: the predictor's output stays at the resolution of the mask decoder, as the engine's
does (its video is told to be that small), and its hole filling, which needs a CUDA extension and has no
counterpart here, is off. What it does for its own sake stays in: one pass per object after the image
encoder, a dictionary of outputs that grows with the video, memories stored as bfloat16 even on a CPU. That
last one alone moves its logits away from those of an engine that stores float32.

On a GPU it runs under bfloat16 autocast, as its authors run it, and its time is taken once its masks are on
the host; kernels of one stage end during another, so that no stage times are told there.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from sam2.build_sam import build_sam2_video_predictor
from torch import Tensor

from trocar_bench.footage import Footage, spread_clicks
from trocar_bench.frame_log import FrameLog
from trocar_bench.mask_comparison import Masks
from trocar_bench.pacing import BackPressure, Pacing
from trocar_bench.speed_run import RunPlan
from trocar_engines.errors import UnknownModelError
from trocar_engines.masklets import UInt8Array
from trocar_engines.network.config import network_config
from trocar_engines.network.sam2s import IMAGE_MEAN, IMAGE_STD
from trocar_engines.network.weights import load_state

CONFIGS = {"tiny": "t", "small": "s", "base-plus": "b+", "large": "l"}
"""sam2's names for the sizes of its trunk."""
PREFIX = "sam2.1-hiera-"
BUILDS = ("sam2", "vos_optimized")
"""The predictor as it is, and the one that sam2 compiles for speed on a GPU."""
STAGE_METHODS = {
    "forward_image": "encode_image",
    "_prepare_memory_conditioned_features": "attend_memory",
    "_forward_sam_heads": "decode_masks",
    "_encode_new_memory": "write_memory",
}
"""Methods of the predictor, and the stage that each of them is."""
ENDLESS = 1 << 40
"""Frames of a video whose end nobody knows."""


def check_reference_model(model: str) -> None:
    """Refuse a model that sam2 does not have.

    Raises:
        UnknownModelError: it is not an official SAM 2.1 network.
    """
    network_config(model)
    if not model.startswith(PREFIX):
        known = ", ".join(f"{PREFIX}{size}-512" for size in CONFIGS)
        raise UnknownModelError(
            f"mode reference, model {model}: sam2's predictor knows only SAM 2.1's networks: "
            f"pass --model with one of {known}, or of the same without -512"
        )


class BuildReference(Protocol):
    """Makes a predictor."""

    def __call__(self, model: str, weights: Path, *, build: str, device: str) -> Any:
        """See `build_reference`."""


def build_reference(model: str, weights: Path, *, build: str, device: str) -> Any:
    """A predictor with the weights that the engine has.

    Args:
        model: an official network, see `check_reference_model`.
        weights: file in a form that the engine reads.
        build: one of `BUILDS`.
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: the file holds no weights.
    """
    side = network_config(model).input_size_px
    size = model.removeprefix(PREFIX).removesuffix("-512")
    feature_side = side // 16
    with contextlib.redirect_stdout(io.StringIO()):  # it announces compilation; ours is the last line there
        predictor = build_sam2_video_predictor(
            f"configs/sam2.1/sam2.1_hiera_{CONFIGS[size]}.yaml",
            device=device,
            hydra_overrides_extra=[
                f"++model.image_size={side}",
                # Made for 1024, these two keep on the first call what they compute for another size. Under
                # `vos_optimized` that is an output of a CUDA graph, which the next call overwrites.
                f"++model.image_encoder.neck.position_encoding.image_size={side}",
                *(
                    f"++model.memory_attention.layer.{attention}.feat_sizes=[{feature_side},{feature_side}]"
                    for attention in ("self_attention", "cross_attention")
                ),
            ],
            vos_optimized=build == "vos_optimized",
        )
    predictor.load_state_dict(load_state(weights))
    predictor.fill_hole_area = 0
    return predictor.eval().requires_grad_(False)


class ReferenceLane:
    """See `speed_run.BlockLane`.

    Args:
        predictor: from `build_reference`; this lane alone uses it while it is open.
        plan: of the run.
        footage: what it shows.
        inputs: its pictures at the model's input size, uint8 [S, S, 3].
        on_masks: called with a frame's number and its masks.
    """

    def __init__(
        self,
        predictor: Any,
        plan: RunPlan,
        footage: Footage,
        inputs: Sequence[UInt8Array],
        *,
        on_masks: Callable[[int, Masks], None] = lambda *_: None,
    ) -> None:
        self.log: FrameLog = plan.make_log()
        self.pacing: Pacing = BackPressure(1)
        self._predictor = predictor
        self._plan = plan
        self._footage = footage
        self._on_masks = on_masks
        self._pictures = _Pictures(inputs, footage.places, predictor.device)
        self._clock = _StageClock()
        self._frames: Iterator[tuple[int, list[int], Tensor]] = iter(())

    def begin(self) -> None:
        """See `Lane.begin`."""
        if self._predictor.device.type == "cpu":
            self._clock.attach(self._predictor)
        # Its progress bars write to what stderr was when they were made.
        with contextlib.redirect_stderr(io.StringIO()), self._autocast():
            state = self._open_state()
            clicks = spread_clicks(self._footage.labels, self._plan.objects)
            scale = np.array([self._footage.width_px, self._footage.height_px]) / state["video_width"]
            for object_id, click in enumerate(clicks, 1):
                self._predictor.add_new_points_or_box(
                    state,
                    frame_idx=0,
                    obj_id=object_id,
                    points=np.array([click]) / scale,
                    labels=np.array([1], np.int32),
                )
            self._frames = self._predictor.propagate_in_video(state, start_frame_idx=0)
            self._step(0)

    def send(self, frame_id: int) -> None:
        """See `Lane.send`; returns when the frame is done."""
        with self._autocast():
            self._step(frame_id)
        self.pacing.settle()

    def drain(self) -> None:
        """See `BlockLane.drain`; nothing is ever on its way."""

    def finish(self) -> None:
        """See `Lane.finish`."""

    def close(self) -> None:
        """See `Lane.close`."""
        self.pacing.stop()
        self._frames = iter(())
        self._clock.detach(self._predictor)

    def _open_state(self) -> Any:
        """The predictor's state for a video that is played by us.

        It reads videos from disk only: it is given one picture there, which then makes room for ours.
        """
        size_px = self._predictor.image_size
        with tempfile.TemporaryDirectory() as folder:
            blank = np.zeros((size_px, size_px, 3), np.uint8)
            cv2.imwrite(str(Path(folder) / "0.jpg"), blank)
            state = self._predictor.init_state(folder)
        state["images"], state["num_frames"], state["cached_features"] = self._pictures, ENDLESS, {}
        state["video_width"] = state["video_height"] = size_px // 4
        return state

    def _step(self, frame_id: int) -> None:
        self._clock.stage_ns.clear()
        if self._predictor.device.type == "cuda":
            # What sam2 compiles hands on tensors of its CUDA graphs. Untold, torch 2.11 takes
            # each call for a new frame and ends with "output of CUDAGraphs that has been overwritten".
            torch.compiler.cudagraph_mark_step_begin()
        number, object_ids, logits = next(self._frames)
        assert number == frame_id, "the predictor takes every frame in order"
        masks = logits[:, 0].float().cpu().numpy()
        received_ns = time.perf_counter_ns()
        are_visible = [bool((mask > 0).any()) for mask in masks]
        self.log.note_result(
            frame_id,
            received_ns,
            self._clock.stage_ns,
            masklets=len(object_ids),
            visible_masklets=sum(are_visible),
        )
        self._on_masks(
            frame_id,
            {
                object_id: mask if is_visible else None
                for object_id, mask, is_visible in zip(object_ids, masks, are_visible, strict=True)
            },
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        is_gpu = self._predictor.device.type == "cuda"
        return torch.autocast("cuda", dtype=torch.bfloat16) if is_gpu else contextlib.nullcontext()


class _Pictures:
    """The footage as the predictor's video: normalised when it asks, as the engine does it in its graph."""

    def __init__(self, inputs: Sequence[UInt8Array], places: Sequence[int], device: torch.device) -> None:
        self._inputs = inputs
        self._places = places
        self._device = device
        self._mean, self._std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD)
        )

    def __getitem__(self, frame_id: int) -> Tensor:
        """float32 [3, S, S] on the predictor's device."""
        pixels = self._inputs[self._places[frame_id % len(self._places)]]
        picture = torch.from_numpy(pixels).to(self._device).permute(2, 0, 1).float()
        return (picture - self._mean) / self._std


class _StageClock:
    """Times the predictor's own methods by standing in front of them."""

    def __init__(self) -> None:
        self.stage_ns: dict[str, int] = {}

    def attach(self, predictor: Any) -> None:
        """Begin to time."""
        for method, stage in STAGE_METHODS.items():
            setattr(predictor, method, self._timed(getattr(predictor, method), stage))

    def detach(self, predictor: Any) -> None:
        """Leave the predictor as it was."""
        for method in STAGE_METHODS:
            vars(predictor).pop(method, None)

    def _timed(self, run: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began_ns = time.perf_counter_ns()
            try:
                return run(*arguments, **named)
            finally:
                elapsed_ns = time.perf_counter_ns() - began_ns
                self.stage_ns[stage] = self.stage_ns.get(stage, 0) + elapsed_ns

        return timed
