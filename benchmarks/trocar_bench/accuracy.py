"""`bench-accuracy`: J&F on a folder in DAVIS layout.

Every object is prompted once, on the first frame that shows it, and tracked to the end of its clip; what
follows the prompt is compared with the truth. The tracker runs in this process, picture by picture as in
service, without video coding or network between. A pixel belongs to the object with the highest logit there,
as in the paletted masks it is compared with.

`--floor` adds what any tracker has to beat: the first mask carried along by optical flow.
"""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trocar.cli import (
    EXIT_EXPECTED_FAILURE,
    EXIT_INTERRUPTED,
    StartScheduler,
    add_engine_options,
    read_engine_options,
    start_scheduler,
)
from trocar.masklet_codec import find_box, mask_from_logits, masks_from_logits
from trocar.tracking import Scheduler, TrackedStream
from trocar_bench.davis import EvaluationClip, find_clips
from trocar_bench.jf import MaskletScore
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import BoolArray, Float32Array, FrameMasklets, Picture, Prompt, UInt8Array
from trocar_engines.preprocess import resize_to_model
from trocar_engines.training.clicks import next_click

CLICKS = {"click1": 1, "click3": 3}
"""The first at the point farthest from the edge, each further one in the largest region that is wrong."""
PROMPTS = (*CLICKS, "box", "mask")
MOST_OUTSTANDING = 4
"""Pictures that a stream on which nothing is dropped takes at once."""
STREAMS = 2
"""One clip's, and the one before, which the device thread may not have freed yet."""
DAVIS_FRAME_RATE_HZ = 24.0
EPILOG = """\
FOLDER holds JPEGImages/<clip>/NNNNN.jpg and Annotations/<clip>/NNNNN.png (paletted: 0 is background, every
other value an object). Frames without a mask are tracked, not scored.
The last line on stdout is JSON: jf (0 to 100, mean over objects), j, f, clips, prompt, model, memory,
runtime, frames, fps (of reading, tracking and scoring together; bench-fps measures the tracker), ...
"""

Masks = dict[int, BoolArray]
"""bool [H, W] by object_id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectResult:
    """One row of the table.

    Args:
        clip: name.
        object_id: value in the masks.
        score: of the tracker.
        floor: of optical flow, when asked for.
    """

    clip: str
    object_id: int
    score: MaskletScore
    floor: MaskletScore | None


# --- tracking -------------------------------------------------------------------------------------------


def track_clip(
    stream: TrackedStream, clip: EvaluationClip, prompt: str, frame_rate_hz: float
) -> Iterator[Masks]:
    """Masks of every frame in order, of the objects that were prompted before it.

    Args:
        stream: fresh; nothing is dropped on it.
        clip: to read.
        prompt: one of `PROMPTS`.
        frame_rate_hz: the clock of the tracker's memory.

    Raises:
        TrocarError: a file cannot be read, or a prompt was refused.
    """
    waiting: deque[Future[FrameMasklets]] = deque()
    for index in range(len(clip.frames)):
        pixels = resize_to_model(clip.read_rgb(index), stream.input_size_px)
        picture = Picture(
            frame_id=index,
            pixels=pixels,
            width_px=clip.width_px,
            height_px=clip.height_px,
            time_s=index / frame_rate_hz,
        )
        waiting.append(stream.offer(picture))
        for object_id, truth in clip.new_objects(index):
            try:
                _prompt_object(stream, index, object_id, truth, prompt)
            except TrocarError as error:
                raise TrocarError(f"{clip.masks[index]}: object {object_id}: {error}") from error
        if len(waiting) == MOST_OUTSTANDING:
            yield _read_masks(waiting.popleft().result(), clip)
    while waiting:
        yield _read_masks(waiting.popleft().result(), clip)


def _prompt_object(
    stream: TrackedStream, frame_id: int, object_id: int, truth: BoolArray, prompt: str
) -> None:
    if prompt == "mask":
        stream.prompt(Prompt(object_id=object_id, frame_id=frame_id, mask=truth)).result()
        return
    if prompt == "box":
        box = find_box(truth)
        stream.prompt(Prompt(object_id=object_id, frame_id=frame_id, box=box)).result()
        return
    height_px, width_px = truth.shape
    predicted: BoolArray | None = None
    for _ in range(CLICKS[prompt]):
        point, label = next_click(truth, predicted)
        click = Prompt(object_id=object_id, frame_id=frame_id, points=(point,), labels=(label,))
        outcome = stream.prompt(click).result()
        predicted = mask_from_logits(outcome.masklet.mask_logits, width_px, height_px)


def _read_masks(result: FrameMasklets, clip: EvaluationClip) -> Masks:
    assert not result.is_dropped, "nothing is dropped on a stream that is not live"
    logits = [masklet.mask_logits for masklet in result.masklets]
    masks = masks_from_logits(logits, clip.width_px, clip.height_px, resolve_overlaps=True)
    return {masklet.object_id: mask for masklet, mask in zip(result.masklets, masks, strict=True)}


def carry_by_flow(clip: EvaluationClip) -> Iterator[Masks]:
    """The mask of every object on its first frame, carried along by DIS optical flow, frame by frame.

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


# --- scores ---------------------------------------------------------------------------------------------


def score_clip(
    clip: EvaluationClip, tracked: Iterator[Masks], on_frame: Callable[[], None]
) -> dict[int, MaskletScore]:
    """Compare the masks of every frame with the truth; an object without a mask counts as empty.

    Args:
        clip: with the truth.
        tracked: masks of every frame, in order.
        on_frame: called after each.
    """
    scores = {object_id: MaskletScore(first) for object_id, first in clip.prompted_frames.items()}
    nothing = np.zeros((clip.height_px, clip.width_px), np.bool_)
    for index, masks in enumerate(tracked):
        truth = clip.read_truth(index)
        for object_id, score in scores.items():
            if truth is not None:
                score.add(index, masks.get(object_id, nothing), truth == object_id)
        on_frame()
    return scores


def score_clips(
    scheduler: Scheduler, clips: Sequence[EvaluationClip], options: argparse.Namespace, progress: Progress
) -> tuple[list[ObjectResult], float]:
    """Every object's result, and the seconds it took to track and score them all."""
    results: list[ObjectResult] = []
    seconds = 0.0
    task = progress.add_task("", total=sum(len(clip.frames) for clip in clips))
    for clip in clips:
        progress.update(task, description=f"tracking {clip.name}")
        began_s = time.perf_counter()
        stream = scheduler.open_stream(
            model=scheduler.default_model,
            memory=scheduler.default_memory,
            is_live=False,
            max_objects=len(clip.prompted_frames),
        )
        with closing(stream):
            tracked = track_clip(stream, clip, options.prompt, options.frame_rate)
            scores = score_clip(clip, tracked, lambda: progress.advance(task))
        seconds += time.perf_counter() - began_s
        floors = score_clip(clip, carry_by_flow(clip), lambda: None) if options.floor else {}
        for object_id, score in scores.items():
            if score.scored_frames:
                floor = floors.get(object_id)
                results.append(ObjectResult(clip=clip.name, object_id=object_id, score=score, floor=floor))
            else:
                progress.console.print(
                    f"{clip.name}: object {object_id} appears on the last mask only and is not scored"
                )
    return results, seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """Means over objects, 0 to 100; `floor_jf` is None when it was not asked for."""

    objects: int
    j: float
    f: float
    jf: float
    floor_jf: float | None


def average(results: Sequence[ObjectResult]) -> Means:
    """Means over the objects of a clip or of all clips."""
    floors = [result.floor.jf for result in results if result.floor is not None]
    return Means(
        objects=len(results),
        j=fmean(result.score.region_similarity for result in results),
        f=fmean(result.score.contour_accuracy for result in results),
        jf=fmean(result.score.jf for result in results),
        floor_jf=fmean(floors) if floors else None,
    )


def average_clips(results: Iterable[ObjectResult]) -> dict[str, Means]:
    """Means over the objects of each clip, by its name."""
    return {clip: average(list(rows)) for clip, rows in groupby(results, key=lambda result: result.clip)}


# --- the command ----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, *, start_scheduler: StartScheduler = start_scheduler) -> int:
    """Score a folder.

    Args:
        arguments: None for those of the process.
        start_scheduler: makes the tracker.

    Returns:
        0, or 2 after an expected failure, which one line on stderr tells.
    """
    options = _make_parser().parse_args(arguments)
    try:
        _run(options, start_scheduler)
    except TrocarError as error:
        print(f"bench-accuracy: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_EXPECTED_FAILURE
    except KeyboardInterrupt:
        print("bench-accuracy: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench-accuracy",
        description="Measure J&F on a folder in DAVIS layout, every object prompted once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds JPEGImages/ and Annotations/")
    parser.add_argument("--prompt", choices=PROMPTS, required=True, help="on each object's first frame")
    add_engine_options(parser)
    parser.add_argument("--clips", default="", metavar="A,B", help="only these")
    parser.add_argument(
        "--frame-rate",
        type=_positive,
        default=DAVIS_FRAME_RATE_HZ,
        metavar="HZ",
        help="of the clips, the clock of the tracker's memory (default %(default)s, that of DAVIS)",
    )
    parser.add_argument("--floor", action="store_true", help="also carry the first masks by optical flow")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def _run(options: argparse.Namespace, start_scheduler: StartScheduler) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        chosen = list(dict.fromkeys(name for name in options.clips.split(",") if name))
        reading = progress.add_task("reading masks", total=None)
        clips = find_clips(options.folder, chosen, lambda: progress.advance(reading))
        progress.remove_task(reading)
        engine_options = read_engine_options(options, max_streams=STREAMS)
        with closing(start_scheduler(engine_options)) as scheduler:
            scheduler.warm_up()
            results, seconds = score_clips(scheduler, clips, options, progress)
            card, memory = scheduler.model_card(scheduler.default_model), scheduler.default_memory
    total, by_clip = average(results), average_clips(results)
    _print_table(results, by_clip, total)
    frames = sum(len(clip.frames) for clip in clips)
    line: dict[str, object] = {
        "jf": round(total.jf, 2),
        "j": round(total.j, 2),
        "f": round(total.f, 2),
        "objects": total.objects,
        "clips": {name: round(means.jf, 2) for name, means in by_clip.items()},
        "prompt": options.prompt,
        "model": card.name,
        "weights_hash": card.weights_hash,
        "memory": memory,
        "runtime": card.runtime,
        "frames": frames,
        "fps": round(frames / seconds, 2),
    }
    if total.floor_jf is not None:
        line["floor_jf"] = round(total.floor_jf, 2)
        line["floor_clips"] = {
            name: round(means.floor_jf, 2) for name, means in by_clip.items() if means.floor_jf is not None
        }
    print(json.dumps(line))


def _print_table(results: Sequence[ObjectResult], by_clip: dict[str, Means], total: Means) -> None:
    table = Table("clip", "object")
    for header in ("frames", "J", "F", "J&F", *(["floor"] if total.floor_jf is not None else [])):
        table.add_column(header, justify="right")

    def add(clip: str, name: str, frames: int | None, means: Means) -> None:
        figures = (means.j, means.f, means.jf, means.floor_jf)
        cells = [f"{figure:.1f}" for figure in figures if figure is not None]
        table.add_row(clip, name, str(frames or ""), *cells, style="bold" if frames is None else None)

    for clip, means in by_clip.items():
        for result in (result for result in results if result.clip == clip):
            add(clip, str(result.object_id), result.score.scored_frames, average([result]))
        add(clip, "mean", None, means)
        table.add_section()
    add("all", "mean", None, total)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
