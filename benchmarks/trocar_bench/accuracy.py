"""`bench-accuracy`: J&F on a folder in DAVIS layout, or on LongSim.

Every object is prompted once, on the first frame that shows it, and tracked to the end of its clip; what
follows the prompt is compared with the truth. Policies of the memory, kinds of prompt and ablations are rows
of one pass: every frame is read and encoded once for all. The tracker runs in this process, picture by
picture as in service, without video coding or network between. A pixel belongs to the object with the highest
logit there, as in the paletted masks it is compared with.

`--floor` adds what any tracker has to beat: the first mask carried along by optical flow.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trocar.cli import (
    EXIT_EXPECTED_FAILURE,
    EXIT_INTERRUPTED,
    EngineOptions,
    add_engine_options,
    print_progress,
    read_engine_options,
    scheduler_config,
)
from trocar.masklet_codec import masks_from_logits
from trocar.tracking import ModelCard
from trocar_bench.accuracy_plot import draw_plot
from trocar_bench.accuracy_report import (
    average_clips,
    describe_rows,
    print_objects,
    print_rows,
    round_figures,
    take,
)
from trocar_bench.davis import EvaluationClip, find_clips
from trocar_bench.figures import ObjectResult, sum_up
from trocar_bench.longsim import SUBSETS, identify, render_longsim
from trocar_bench.plotting import check_plot
from trocar_bench.rows import PROMPTS, Row, RowTracker, change_bank, track_rows
from trocar_bench.timeline import Timeline
from trocar_engines.errors import TrocarError
from trocar_engines.export import default_cache
from trocar_engines.masklets import BoolArray, Float32Array, FrameMasklets, Masklet, UInt8Array
from trocar_engines.memory.bank import BankConfig, MemoryPolicy
from trocar_engines.models import bank_config, cpu_threads, model_card
from trocar_engines.runtime.interface import MOST_LOOKS
from trocar_engines.scheduler import load_model
from trocar_engines.tracker import Tracker, TrackerConfig

DEFAULT_PROMPT = "click3"
DAVIS_FRAME_RATE_HZ = 24.0
ALL = "all"
EPILOG = """\
FOLDER holds JPEGImages/<clip>/NNNNN.jpg and Annotations/<clip>/NNNNN.png (paletted: 0 is background, every
other value an object). Frames without a mask are tracked, not scored. An objects.json beside them may tell
classes, frame rates and which objects to prompt.

examples:
  bench-accuracy FOLDER --prompt mask
  bench-accuracy FOLDER --prompt all --policies all --plot j.png
  bench-accuracy --longsim dev --policies all --ablate candidate_interval_s=1 --ablate long_term_slots=0

The last line on stdout is JSON. Of the first row: jf (0 to 100, mean over objects; an empty mask of an absent
object counts 100), jf_visible (over frames that show the object: the figure of LongSim), j, f, clips, prompt,
memory, ...; of all: rows. An interval holds 95% of the means when clips are drawn anew. Also model, runtime,
frames, fps (of reading, tracking and scoring all rows; bench-fps measures the tracker), ...
"""


class EvaluatedModel(Protocol):
    """A model whose memory can be set up in several ways."""

    @property
    def card(self) -> ModelCard:
        """What it is."""

    @property
    def default_policy(self) -> str:
        """The memory policy that was asked for, or the service's own."""

    @property
    def most_recent_slots(self) -> int:
        """Recent memories of which the network can tell the age."""

    def bank(self, policy: str) -> BankConfig:
        """Memory settings under a policy; fails with UnknownModelError."""

    def open_tracker(self, bank: BankConfig, rows: int, streams: int) -> RowTracker:
        """A tracker of so many objects of so many streams with memories up to the size of `bank`."""


OpenModel = Callable[[EngineOptions], EvaluatedModel]


class _LoadedModel:
    """See `EvaluatedModel`.

    Raises:
        UnknownModelError, CheckpointError: it cannot be loaded.
    """

    def __init__(self, options: EngineOptions) -> None:
        # Nobody decodes beside it.
        config = scheduler_config(replace(options, threads=options.threads or cpu_threads()))
        # One object: the memory of those that are evaluated is allocated when they are known.
        loaded = load_model(config.model, replace(config, max_objects=1), print_progress)
        self._entry, self._runtime = loaded.entry, loaded.tracker.runtime
        self.card = model_card(config.model, config.weights, self._runtime.name)
        self.default_policy = config.memory
        self.most_recent_slots = loaded.entry.config.num_maskmem - 1

    def bank(self, policy: str) -> BankConfig:
        return bank_config(self._entry, policy)

    def open_tracker(self, bank: BankConfig, rows: int, streams: int) -> Tracker:
        # Prompts are given on the frame that was just tracked: no other needs to be kept. No row waits for
        # another's looks.
        config = TrackerConfig(rows=rows, bank=bank, most_looks=streams * MOST_LOOKS, most_kept_frames=1)
        return Tracker(self._runtime, config)


# --- scores ---------------------------------------------------------------------------------------------


def open_timelines(clip: EvaluationClip, frame_rate_hz: float) -> dict[int, Timeline]:
    """An empty timeline for every prompted object."""
    return {
        object_id: Timeline(object_id, first, frame_rate_hz, clip.objects.get(object_id))
        for object_id, first in clip.prompted_frames.items()
    }


class Told(NamedTuple):
    """What a tracker says of an object on a frame."""

    mask: BoolArray
    class_name: str = ""
    class_probability: float = 0.0
    predicted_iou: float = math.nan
    presence: float = math.nan


def score_frame(
    timelines: dict[int, Timeline], frame: int, labels: UInt8Array, told: dict[int, Told]
) -> None:
    """Compare with the truth; an object of which nothing is said counts as empty.

    Args:
        timelines: by object_id.
        frame: place in the clip.
        labels: uint8 [H, W], the truth.
        told: by object_id.
    """
    nothing = Told(np.zeros(labels.shape, np.bool_))
    for object_id, timeline in timelines.items():
        said = told.get(object_id, nothing)
        timeline.add(frame, said.mask, labels, *said[1:])


def read_told(result: FrameMasklets, clip: EvaluationClip) -> dict[int, Told]:
    """Masks without overlap, and classes, by object_id."""
    masklets: Sequence[Masklet] = result.masklets
    masks = masks_from_logits(
        [masklet.mask_logits for masklet in masklets], clip.width_px, clip.height_px, resolve_overlaps=True
    )
    return {
        masklet.object_id: Told(
            mask,
            masklet.class_name,
            masklet.class_probability,
            masklet.predicted_iou,
            masklet.presence,
        )
        for masklet, mask in zip(masklets, masks, strict=True)
    }


def score_clip(
    tracker: RowTracker,
    rows: Sequence[Row],
    clip: EvaluationClip,
    input_size_px: int,
    frame_rate_hz: float,
    on_frame: Callable[[], None],
) -> list[dict[int, Timeline]]:
    """Timelines of every row by object_id; `on_frame` is called after each frame."""
    by_row = [open_timelines(clip, frame_rate_hz) for _ in rows]
    tracked = track_rows(tracker, rows, clip, input_size_px, frame_rate_hz)
    for frame, results in enumerate(tracked):
        labels = clip.read_truth(frame)
        if labels is not None:
            for timelines, result in zip(by_row, results, strict=True):
                score_frame(timelines, frame, labels, read_told(result, clip))
        on_frame()
    return by_row


def carry_by_flow(clip: EvaluationClip) -> Iterator[dict[int, BoolArray]]:
    """Masks by object_id on every frame: that of its first, carried along by DIS optical flow.

    What enters from beyond the border is background. Masks stay soft, lest slow motion be rounded away.
    """
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    columns, rows = np.meshgrid(np.arange(clip.width_px), np.arange(clip.height_px))
    here: Float32Array = np.dstack([columns, rows]).astype(np.float32)
    carried: dict[int, Float32Array] = {}
    previous: UInt8Array | None = None
    for index in range(len(clip.frames)):
        current = np.asarray(cv2.cvtColor(clip.read_rgb(index), cv2.COLOR_RGB2GRAY), np.uint8)
        if carried and previous is not None:
            # An initial flow, even of zeros, gives other results than none, which the stubs don't allow.
            source = here + flow.calc(current, previous, None)  # type: ignore[call-overload]
            for object_id, mask in carried.items():
                moved = cv2.remap(mask, source[..., 0], source[..., 1], cv2.INTER_LINEAR)
                carried[object_id] = np.asarray(moved, np.float32)
        yield {object_id: mask > 0.5 for object_id, mask in carried.items()}
        carried |= {object_id: mask.astype(np.float32) for object_id, mask in clip.new_objects(index)}
        previous = current


def score_flow(clip: EvaluationClip, frame_rate_hz: float) -> dict[int, Timeline]:
    """Timelines of the masks that flow carries along, by object_id."""
    timelines = open_timelines(clip, frame_rate_hz)
    for frame, masks in enumerate(carry_by_flow(clip)):
        labels = clip.read_truth(frame)
        if labels is not None:
            told = {object_id: Told(mask) for object_id, mask in masks.items()}
            score_frame(timelines, frame, labels, told)
    return timelines


class Evaluation(NamedTuple):
    """Every object's result.

    Args:
        by_row: of every row, the same objects in the same order.
        floor: of optical flow, empty when it was not asked for.
        seconds: it took to track and score all rows.
    """

    by_row: list[list[ObjectResult]]
    floor: list[ObjectResult]
    seconds: float


def score_clips(
    model: EvaluatedModel,
    rows: Sequence[Row],
    clips: Sequence[EvaluationClip],
    options: argparse.Namespace,
    progress: Progress,
) -> Evaluation:
    """Track and score every clip with every row."""
    most_objects = max(len(clip.prompted_frames) for clip in clips)
    largest = max((row.bank for row in rows), key=lambda bank: bank.slots)
    tracker = model.open_tracker(largest, len(rows) * most_objects, len(rows))
    evaluation = Evaluation([[] for _ in rows], [], 0.0)
    task = progress.add_task("", total=sum(len(clip.frames) for clip in clips))
    for clip in clips:
        progress.update(task, description=f"tracking {clip.name}")
        _say(progress, f"tracking {clip.name}, {len(clip.frames)} frames")
        frame_rate_hz = options.frame_rate or clip.frame_rate_hz or DAVIS_FRAME_RATE_HZ
        began_s = time.perf_counter()
        by_row = score_clip(
            tracker, rows, clip, model.card.input_size_px, frame_rate_hz, lambda: progress.advance(task)
        )
        evaluation = evaluation._replace(seconds=evaluation.seconds + time.perf_counter() - began_s)
        floor = score_flow(clip, frame_rate_hz) if options.floor else {}
        for object_id in clip.prompted_frames:
            if not by_row[0][object_id].records:
                progress.console.print(
                    f"{clip.name}: object {object_id} appears on the last mask only and is not scored"
                )
                continue
            for results, timelines in zip(evaluation.by_row, by_row, strict=True):
                results.append(ObjectResult(clip=clip.name, timeline=timelines[object_id]))
            if floor:
                evaluation.floor.append(ObjectResult(clip=clip.name, timeline=floor[object_id]))
    return evaluation


# --- the command ----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, *, open_model: OpenModel = _LoadedModel) -> int:
    """Score a folder.

    Args:
        arguments: None for those of the process.
        open_model: loads what is evaluated.

    Returns:
        0, or 2 after an expected failure, which one line on stderr tells.
    """
    options = _make_parser().parse_args(arguments)
    try:
        _run(options, open_model)
    except TrocarError as error:
        print(f"bench-accuracy: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_EXPECTED_FAILURE
    except KeyboardInterrupt:
        print("bench-accuracy: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _make_parser() -> argparse.ArgumentParser:
    policies = tuple(policy.value for policy in MemoryPolicy)
    parser = argparse.ArgumentParser(
        prog="bench-accuracy",
        description="Measure J&F on a folder in DAVIS layout or on LongSim, every object prompted once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER", help="holds JPEGImages/ and Annotations/"
    )
    parser.add_argument(
        "--prompt",
        type=_names(PROMPTS),
        default=(DEFAULT_PROMPT,),
        metavar="A,B",
        help=f"on each object's first frame: {', '.join(PROMPTS)} or {ALL} (default {DEFAULT_PROMPT})",
    )
    add_engine_options(parser)
    parser.add_argument(
        "--policies",
        type=_names(policies),
        default=(),
        metavar="A,B",
        help=f"memory policies to compare: {', '.join(policies)} or {ALL} (default that of --memory)",
    )
    parser.add_argument(
        "--ablate",
        action="append",
        default=[],
        metavar="FIELD=VALUE,...",
        help="one more row per policy and prompt with these settings of the memory bank, where they change "
        "anything; may be repeated",
    )
    parser.add_argument("--clips", default="", metavar="A,B", help="only these")
    parser.add_argument(
        "--frame-rate",
        type=_positive,
        metavar="HZ",
        help="of the clips, the clock of the tracker's memory "
        f"(default that of objects.json, else {DAVIS_FRAME_RATE_HZ:g}, that of DAVIS)",
    )
    parser.add_argument("--floor", action="store_true", help="also carry the first masks by optical flow")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw J over time, a panel per clip")
    parser.add_argument("--longsim", choices=tuple(SUBSETS), help="score LongSim instead; rendered once")
    parser.add_argument(
        "--longsim-seed", type=int, default=0, metavar="N", help="another set of the same kind (default 0)"
    )
    parser.add_argument(
        "--longsim-out", type=Path, metavar="DIR", help="where its clips lie (default the user's cache)"
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name for name in text.split(",") if name))
        unknown = [name for name in names if name not in (*known, ALL)]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(known)} or {ALL}")
        return tuple(known) if ALL in names else names

    return read


def _run(options: argparse.Namespace, open_model: OpenModel) -> None:
    if (options.folder is None) == (options.longsim is None):
        raise TrocarError(f"expected either FOLDER or --longsim {'|'.join(SUBSETS)}")
    if options.longsim_seed < 0:
        raise TrocarError(f"--longsim-seed {options.longsim_seed}: must not be negative")
    if options.plot is not None:
        check_plot(options.plot, (".png",))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        if options.longsim is None:
            clips = _read_clips(options.folder, options, progress)
            model, rows = _open_rows(options, open_model)
        else:
            # What cannot be tracked is said before minutes of rendering.
            model, rows = _open_rows(options, open_model)
            clips = _read_clips(_render(options, progress), options, progress)
        evaluation = score_clips(model, rows, clips, options, progress)
    classes = model.card.classes
    print_objects(rows, evaluation.by_row, evaluation.floor)
    print_rows(rows, evaluation.by_row, classes)
    if options.plot is not None:
        draw_plot(options.plot, rows, evaluation.by_row)
    frames = sum(len(clip.frames) for clip in clips)
    lines = describe_rows(rows, evaluation.by_row, classes)
    first = lines[0]
    line: dict[str, object] = {
        **{name: first[name] for name in ("jf", "jf_visible", "j", "f", "objects", "clips", "prompt")},
        "model": model.card.name,
        "weights_hash": model.card.weights_hash,
        "memory": rows[0].policy,
        "runtime": model.card.runtime,
        "frames": frames,
        "fps": round_figures(frames / evaluation.seconds),
        "rows": lines,
    }
    if evaluation.floor:
        line["floor_jf"] = round_figures(sum_up(take(evaluation.floor), ()).jf)
        line["floor_clips"] = average_clips(take(evaluation.floor))
    if options.longsim is not None:
        line["longsim"] = identify(SUBSETS[options.longsim], options.longsim_seed)
    print(json.dumps(line))


def _read_clips(folder: Path, options: argparse.Namespace, progress: Progress) -> list[EvaluationClip]:
    chosen = list(dict.fromkeys(name for name in options.clips.split(",") if name))
    reading = progress.add_task("reading masks", total=None)
    clips = find_clips(folder, chosen, lambda: progress.advance(reading))
    progress.remove_task(reading)
    return clips


def _say(progress: Progress, text: str) -> None:
    """Progress where no bar is drawn: in a log."""
    if not progress.console.is_terminal:
        print(f"bench-accuracy: {text}", file=sys.stderr, flush=True)


def _render(options: argparse.Namespace, progress: Progress) -> Path:
    subset, seed = SUBSETS[options.longsim], options.longsim_seed
    name = f"{subset.name}-{seed}-{identify(subset, seed)['renderer']}"
    folder: Path = options.longsim_out or default_cache().parent / "longsim" / name
    _say(progress, f"rendering LongSim {subset.name} into {folder}, unless it is there")
    task = progress.add_task("rendering LongSim", total=subset.clips * subset.frames)
    render_longsim(
        folder,
        subset,
        seed,
        workers=cpu_threads(),
        on_frames=lambda frames: progress.advance(task, frames),
    )
    progress.remove_task(task)
    return folder


def _open_rows(options: argparse.Namespace, open_model: OpenModel) -> tuple[EvaluatedModel, list[Row]]:
    """The model and what to do with it: by policy, ablation and prompt; the first row is a plain one."""
    model = open_model(read_engine_options(options))
    rows = []
    for policy in options.policies or (model.default_policy,):
        plain = model.bank(policy)
        for ablation in dict.fromkeys(("", *options.ablate)):
            bank = change_bank(plain, ablation, model.most_recent_slots)
            if ablation and bank == plain:
                continue  # vanilla has no long-term memory to take away
            rows += [
                Row(policy=policy, ablation=ablation, prompt=prompt, bank=bank) for prompt in options.prompt
            ]
    return model, rows


if __name__ == "__main__":
    sys.exit(main())
