"""`bench-past`: what a prompt in the past, a correction and a damaged stream cost, in time and in J&F.

A prompt names a frame that is gone. The object begins there and is led to the present through at most eight
kept frames, as extra rows between the pictures of a live stream, so three things are worth knowing: how long
until it is on the newest frame, how much later the others' frames are for its sake, and how much worse it is
for having seen eight frames instead of all of them (`latency`, `late`). A correction must beat forgetting the
object and starting afresh, or nobody should correct (`correction`). And a stream that loses packets must not
teach the tracker broken pictures (`loss`): trusted frames are compared with the same frames of the whole one.

Everything but `loss` goes through the scheduler of this process, without video coding or network; `loss` goes
through H.264 and gRPC. Prompts are three positive clicks, made from the truth; frames that show nothing of an
object are not scored.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from trocar.cli import (
    EXIT_EXPECTED_FAILURE,
    EXIT_INTERRUPTED,
    add_engine_options,
    print_progress,
    read_engine_options,
    scheduler_config,
)
from trocar.client import connect
from trocar.client_core import Frame, KeyframeWanted, Request, Result, StreamOptions
from trocar.decode import Codec
from trocar.local import LocalServer
from trocar.masklet_codec import mask_from_logits
from trocar_bench.accuracy import DAVIS_FRAME_RATE_HZ
from trocar_bench.davis import find_clips
from trocar_bench.footage import spread_clicks
from trocar_bench.jf import score_mask
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import BoolArray, FrameMasklets, Picture, Prompt, UInt8Array
from trocar_engines.memory.bank import MemoryBank
from trocar_engines.preprocess import resize_to_model
from trocar_engines.scheduler import (
    LoadedModel,
    LoadModel,
    Scheduler,
    SchedulerConfig,
    TrackedStream,
    load_model,
)
from trocar_engines.tracker import Step, Tracker
from trocar_engines.training.scenes import demo_scene

WIDTH_PX, HEIGHT_PX = 640, 360
DEMO_FRAMES = 360
DEMO_RATE_HZ = 30.0
LIVE_RATE_HZ = 60
"""Of the stream on which latency is measured."""
BACK_S = 1.0
"""How old the frame of a late prompt is."""
TAP_S = 0.3
"""How old the frame of a correction is: a person sees, decides and taps."""
STARTS = 4
CORRECTED_STARTS = 14
"""Places in a clip from which objects are prompted; few of them drift."""
CLICKS = 3
LEAST_AREA = 0.002
"""Share of the picture that an object covers at least where it is prompted: a person could tap it."""
DRIFTED_J = 0.5
SETTLED_J = 0.6
"""An object has drifted when its J falls below the one after it was above the other."""
AFTER_CORRECTION_FRAMES = 100
LEAST_AFTER_FRAMES = 10
LOST_SHARE = 0.3
KEYFRAME_S = 1.0
LOSS_SEEDS = 3
SETTLE_FRAMES = 30
"""Of a live stream before a prompt in the past, beside those that the prompt reaches back."""
TIMEOUT_S = 60.0
PERCENT = 100.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """Pictures with their truth.

    Args:
        name: for the table.
        pictures: uint8 [H, W, 3] RGB each; H and W are even.
        labels: uint8 [H, W] object ids, None for a frame without a mask.
        frame_rate_hz: of the pictures.
    """

    name: str
    pictures: tuple[UInt8Array, ...]
    labels: tuple[UInt8Array | None, ...]
    frame_rate_hz: float

    def truth(self, frame: int, object_id: int) -> BoolArray | None:
        """bool [H, W]; None where the frame has no mask."""
        labels = self.labels[frame]
        return None if labels is None else labels == object_id

    def promptable(self, frame: int) -> list[int]:
        """Objects that a person could tap on a frame."""
        labels = self.labels[frame]
        if labels is None:
            return []
        ids, areas = np.unique(labels[labels > 0], return_counts=True)
        return [int(one) for one, area in zip(ids, areas, strict=True) if area >= LEAST_AREA * labels.size]

    def prompt(self, frame: int, object_id: int, *, named: int | None = None) -> Prompt:
        """Three clicks on an object, under another number where `named` says so."""
        truth = self.truth(frame, object_id)
        assert truth is not None, "promptable objects have a mask"
        points = spread_clicks(truth.astype(np.uint8), CLICKS)
        return Prompt(
            object_id=object_id if named is None else named,
            frame_id=frame,
            points=tuple(points),
            labels=(1,) * len(points),
        )

    def picture(self, frame: int, size_px: int, *, frame_id: int | None = None) -> Picture:
        """A frame at the model's input size."""
        number = frame if frame_id is None else frame_id
        height_px, width_px = self.pictures[frame].shape[:2]
        return Picture(
            frame_id=number,
            pixels=resize_to_model(self.pictures[frame], size_px),
            width_px=width_px,
            height_px=height_px,
            time_s=number / self.frame_rate_hz,
        )

    @cached_property
    def packets(self) -> tuple[bytes, ...]:
        """H.264 access units in Annex B form, a keyframe every `KEYFRAME_S`, no B-frames."""
        context = av.CodecContext.create("libx264", "w")
        assert isinstance(context, av.VideoCodecContext)
        context.height, context.width = self.pictures[0].shape[:2]
        context.pix_fmt = "yuv420p"
        context.framerate = Fraction(self.frame_rate_hz).limit_denominator(1000)
        context.time_base = 1 / context.framerate
        context.gop_size = round(KEYFRAME_S * self.frame_rate_hz)
        context.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "20"}
        packets = []
        for index, pixels in enumerate(self.pictures):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts = index
            packets += context.encode(picture)
        return tuple(bytes(packet) for packet in [*packets, *context.encode(None)])


def render_clip(frames: int) -> Clip:
    """The held-out demo scene: two instruments, of which one leaves and returns."""
    length = max(frames, DEMO_FRAMES)  # a shorter scene would have no room for the absence
    scene = demo_scene(height_px=HEIGHT_PX, width_px=WIDTH_PX, frames=length, frame_rate=DEMO_RATE_HZ)
    rendered = [scene.render(index) for index in range(frames)]
    return Clip(
        name="demo",
        pictures=tuple(picture.numpy() for picture, _ in rendered),
        labels=tuple(labels.numpy() for _, labels in rendered),
        frame_rate_hz=DEMO_RATE_HZ,
    )


def read_clips(folder: Path) -> list[Clip]:
    """Every clip of a folder in DAVIS layout, cut to an even width and height, as H.264 wants them.

    Raises:
        TrocarError: the folder cannot be read.
    """
    clips = []
    for clip in find_clips(folder, [], lambda: None):
        rows, columns = slice(clip.height_px // 2 * 2), slice(clip.width_px // 2 * 2)
        labels = [clip.read_truth(index) for index in range(len(clip.frames))]
        clips.append(
            Clip(
                name=clip.name,
                pictures=tuple(
                    np.ascontiguousarray(clip.read_rgb(index)[rows, columns])
                    for index in range(len(clip.frames))
                ),
                labels=tuple(None if label is None else label[rows, columns] for label in labels),
                frame_rate_hz=clip.frame_rate_hz or DAVIS_FRAME_RATE_HZ,
            )
        )
    return clips


class Watch(Tracker):
    """A tracker that counts memories of untrusted frames: there must be none."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(tracker.runtime, tracker.config)
        self.untrusted_memories = 0
        self._untrusted: WeakKeyDictionary[MemoryBank, set[float]] = WeakKeyDictionary()

    def remember(self, step: Step) -> None:
        """See `Tracker.remember`."""
        super().remember(step)
        for batch in step.batches:
            for row in batch.rows:
                bank = row.tracked.bank
                untrusted = self._untrusted.setdefault(bank, set())
                if not row.frame.is_trusted:
                    untrusted.add(row.frame.time_s)
                rings = (bank.recent, bank.long_term, bank.corrections)
                self.untrusted_memories += sum(
                    written in untrusted for ring in rings for written in ring.times.values()
                )


def jf(predicted: BoolArray, truth: BoolArray) -> float:
    """J&F of one object on one frame, 0 to 100."""
    score = score_mask(predicted, truth)
    return PERCENT * (score.region_similarity + score.contour_accuracy) / 2


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return round(float(np.mean(values)), 2) if values else None


def masks_of(result: FrameMasklets, clip: Clip) -> dict[int, BoolArray]:
    """Masks in source pixels, by object_id."""
    height_px, width_px = clip.pictures[0].shape[:2]
    return {one.object_id: mask_from_logits(one.mask_logits, width_px, height_px) for one in result.masklets}


# --- late: prompted in the past against prompted in time ------------------------------------------------


class Pair(NamedTuple):
    """J&F of the same object twice, mean of its frames."""

    name: str
    here: float
    against: float


def measure_late(scheduler: Scheduler, clip: Clip) -> Iterator[Pair]:
    """Every object from several starts: prompted `BACK_S` late, against prompted in time."""
    back = round(BACK_S * clip.frame_rate_hz)
    for start in _starts(clip, STARTS, back + LEAST_AFTER_FRAMES):
        ids = clip.promptable(start)
        names = ("late", "timely")
        streams = [scheduler.open_stream(is_live=False, max_objects=len(ids)) for _ in names]
        scores: dict[tuple[int, int], list[float]] = {}
        for frame in range(start, len(clip.pictures)):
            picture = clip.picture(frame, streams[0].input_size_px)
            results = [future.result(TIMEOUT_S) for future in [stream.offer(picture) for stream in streams]]
            for lane, (stream, result) in enumerate(zip(streams, results, strict=True)):
                if frame == start + (0, back)[lane == 0]:
                    for object_id in ids:
                        stream.prompt(clip.prompt(start, object_id)).result(TIMEOUT_S)
                masks = masks_of(result, clip)
                for object_id in ids:
                    truth = clip.truth(frame, object_id)
                    if frame > start + back and truth is not None and truth.any():
                        scores.setdefault((lane, object_id), []).append(jf(masks[object_id], truth))
        for stream in streams:
            stream.close()
        for object_id in (one for one in ids if (0, one) in scores):
            late, timely = (float(np.mean(scores[lane, object_id])) for lane in range(len(names)))
            yield Pair(f"{clip.name} {start} object {object_id}", late, timely)


def _starts(clip: Clip, most: int, frames_after: int) -> list[int]:
    """Places spread over the clip on which there is something to tap."""
    last = len(clip.pictures) - 1 - frames_after
    places = dict.fromkeys(round(place) for place in np.linspace(0, max(0, last), most))
    return [place for place in places if place <= last and clip.promptable(place)]


# --- correction: against a fresh object with the same clicks --------------------------------------------


def measure_corrections(scheduler: Scheduler, clip: Clip, starts: int) -> Iterator[Pair]:
    """Every object from several starts until it drifts: corrected, against begun anew with the same clicks.

    Only what had settled on its object can drift; the frame of the correction is `TAP_S` old.
    """
    for start in _starts(clip, starts, LEAST_AFTER_FRAMES):
        for object_id in clip.promptable(start):
            pair = _correct_one(scheduler, clip, start, object_id)
            if pair is not None:
                yield pair


def _correct_one(scheduler: Scheduler, clip: Clip, start: int, object_id: int) -> Pair | None:
    fresh_id = object_id + 256
    tap = round(TAP_S * clip.frame_rate_hz)
    drifted_at: int | None = None
    has_settled = False
    scores: dict[int, list[float]] = {object_id: [], fresh_id: []}
    with closing(scheduler.open_stream(is_live=False, max_objects=2)) as stream:
        for frame in range(start, len(clip.pictures)):
            result = stream.offer(clip.picture(frame, stream.input_size_px)).result(TIMEOUT_S)
            truth, masks = clip.truth(frame, object_id), masks_of(result, clip)
            if frame == start:
                # One click: what is told less drifts sooner.
                whole = clip.prompt(start, object_id)
                prompt = Prompt(
                    object_id=object_id, frame_id=start, points=whole.points[:1], labels=whole.labels[:1]
                )
                stream.prompt(prompt).result(TIMEOUT_S)
            elif drifted_at is None and truth is not None and object_id in clip.promptable(frame):
                overlap = score_mask(masks[object_id], truth).region_similarity
                has_settled = has_settled or overlap > SETTLED_J
                if has_settled and overlap < DRIFTED_J:
                    drifted_at = frame
            elif drifted_at is not None and frame == drifted_at + tap:
                for named in (object_id, fresh_id):
                    stream.prompt(clip.prompt(drifted_at, object_id, named=named)).result(TIMEOUT_S)
            elif drifted_at is not None and drifted_at + tap < frame <= drifted_at + AFTER_CORRECTION_FRAMES:
                for named, seen in scores.items():
                    if truth is not None and truth.any():
                        seen.append(jf(masks[named], truth))
    if len(scores[object_id]) < LEAST_AFTER_FRAMES:
        return None
    corrected, fresh = (float(np.mean(seen)) for seen in scores.values())
    return Pair(f"{clip.name} {start} object {object_id}, drifted at {drifted_at}", corrected, fresh)


# --- loss: packets that never come ----------------------------------------------------------------------


class Damaged(NamedTuple):
    """A clip streamed with packets missing, against the whole one on the same trusted frames."""

    pairs: list[Pair]
    frames: int
    trusted: int
    keyframe_requests: int


def measure_loss(address: str, clip: Clip, seeds: int) -> Damaged:
    """Stream a clip through gRPC, whole and with packets lost at random, never the first."""
    whole, _ = _stream_packets(address, clip, frozenset())
    ids = clip.promptable(0)
    damaged = Damaged([], 0, 0, 0)
    for seed in range(seeds):
        draws = np.random.default_rng(seed).random(len(clip.packets))
        lost = frozenset(int(frame) for frame in np.flatnonzero(draws < LOST_SHARE) if frame)
        results, requests = _stream_packets(address, clip, lost)
        trusted = [frame for frame, result in results.items() if frame and result.is_trusted]
        damaged = damaged._replace(
            frames=damaged.frames + len(results) - 1,
            trusted=damaged.trusted + len(trusted),
            keyframe_requests=damaged.keyframe_requests + requests,
        )
        for object_id in ids:
            scores: tuple[list[float], list[float]] = [], []
            for frame in trusted:
                truth = clip.truth(frame, object_id)
                if truth is not None and truth.any():
                    for seen, source in zip(scores, (results, whole), strict=True):
                        masks = {one.object_id: one.mask for one in source[frame].objects}
                        seen.append(jf(masks[object_id], truth))
            if scores[0]:
                here, against = (float(np.mean(seen)) for seen in scores)
                damaged.pairs.append(Pair(f"{clip.name} seed {seed} object {object_id}", here, against))
    return damaged


def _stream_packets(address: str, clip: Clip, lost: frozenset[int]) -> tuple[dict[int, Result], int]:
    """Results by frame, and how often a keyframe was asked for."""

    def requests() -> Iterator[Request]:
        for frame, payload in enumerate(clip.packets):
            if frame not in lost:
                yield Frame(payload=payload, frame_id=frame, pts=frame)
            if frame == 0:
                yield from (clip.prompt(0, object_id) for object_id in clip.promptable(0))

    options = StreamOptions(
        codec=Codec.H264,
        is_live=False,
        time_base=1 / Fraction(clip.frame_rate_hz).limit_denominator(1000),
    )
    results, keyframe_requests = {}, 0
    with connect(address) as client, client.open_stream(options) as stream:
        for event in stream.track(requests()):
            if isinstance(event, Result):
                results[event.frame_id] = event
            keyframe_requests += isinstance(event, KeyframeWanted)
    return results, keyframe_requests


# --- latency: how soon, and at whose expense ------------------------------------------------------------


class Answered(NamedTuple):
    """A result of the live stream."""

    latency_ms: float
    done_ns: int
    object_ids: frozenset[int]


class Latency(NamedTuple):
    """What prompts in the past took.

    Args:
        to_object_ms: from each prompt to the first result that has its object.
        others_ms: of each result in between.
        undisturbed_ms: of all results before the prompts.
        dropped: frames that gave way to newer ones.
        frames: offered.
    """

    to_object_ms: list[float]
    others_ms: list[float]
    undisturbed_ms: list[float]
    dropped: int
    frames: int


class LiveRun:
    """A paced stream with two objects that is prompted in its past again and again.

    Args:
        stream: live and fresh; closed by the caller.
        clip: played to and fro.
        prompts: how many.
    """

    def __init__(self, stream: TrackedStream, clip: Clip, prompts: int) -> None:
        self._stream, self._clip, self._prompts = stream, clip, prompts
        together = [frame for frame in range(len(clip.pictures)) if len(clip.promptable(frame)) > 1]
        last = next(
            (frame for frame in range(len(clip.pictures)) if frame not in together), len(clip.pictures)
        )
        assert last > 1, "the demo scene begins with both instruments in view"
        self._places = (*range(last), *range(last - 2, 0, -1))
        self._pictures = [clip.picture(frame, stream.input_size_px) for frame in range(last)]
        self._answers: dict[int, Answered] = {}
        self._dropped = 0
        self._answered = threading.Condition()

    def run(self) -> Latency:
        """Play until every prompt is answered."""
        back = round(BACK_S * LIVE_RATE_HZ)
        every = back + SETTLE_FRAMES
        prompted: list[tuple[int, int, int]] = []
        frames = every * (self._prompts + 1)
        began_ns = time.perf_counter_ns()
        for frame in range(frames):
            due_ns = began_ns + frame * 1_000_000_000 // LIVE_RATE_HZ
            time.sleep(max(0, due_ns - time.perf_counter_ns()) / 1e9)
            self._offer(frame)
            if frame == 0:
                for object_id in self._clip.promptable(0):
                    self._stream.prompt(self._prompt_at(0, object_id, named=object_id))
            elif frame % every == 0:
                if prompted:
                    self._stream.remove_object(prompted[-1][0])
                named = 1_000 + frame
                prompted.append((named, frame, time.perf_counter_ns()))
                self._stream.prompt(self._prompt_at(frame - back, self._clip.promptable(0)[0], named=named))
        with self._answered:
            self._answered.wait_for(lambda: len(self._answers) + self._dropped == frames, TIMEOUT_S)
        return self._sum_up(prompted, frames, every)

    def _prompt_at(self, frame: int, object_id: int, *, named: int) -> Prompt:
        place = self._places[frame % len(self._places)]
        prompt = self._clip.prompt(place, object_id, named=named)
        return Prompt(object_id=named, frame_id=frame, points=prompt.points, labels=prompt.labels)

    def _offer(self, frame: int) -> None:
        shown = self._pictures[self._places[frame % len(self._places)]]
        picture = Picture(
            frame_id=frame,
            pixels=shown.pixels,
            width_px=shown.width_px,
            height_px=shown.height_px,
            time_s=frame / LIVE_RATE_HZ,
        )
        offered_ns = time.perf_counter_ns()
        self._stream.offer(picture).add_done_callback(partial(self._note, frame, offered_ns))

    def _note(self, frame: int, offered_ns: int, future: "Future[FrameMasklets]") -> None:
        result, done_ns = future.result(), time.perf_counter_ns()
        with self._answered:
            if result.is_dropped:
                self._dropped += 1
            else:
                ids = frozenset(one.object_id for one in result.masklets)
                self._answers[frame] = Answered((done_ns - offered_ns) / 1e6, done_ns, ids)
            self._answered.notify_all()

    def _sum_up(self, prompted: list[tuple[int, int, int]], frames: int, every: int) -> Latency:
        latency = Latency([], [], [], self._dropped, frames)
        for named, at_frame, at_ns in prompted:
            later = sorted(frame for frame in self._answers if frame > at_frame - every // 2)
            before = [self._answers[frame] for frame in later if self._answers[frame].done_ns < at_ns]
            after = [self._answers[frame] for frame in later if self._answers[frame].done_ns >= at_ns]
            first = next((index for index, one in enumerate(after) if named in one.object_ids), None)
            if first is None:
                raise TrocarError(f"object {named}, prompted at frame {at_frame}, was never seen")
            latency.to_object_ms.append((after[first].done_ns - at_ns) / 1e6)
            latency.others_ms.extend(one.latency_ms for one in after[: first + 1])
            latency.undisturbed_ms.extend(one.latency_ms for one in before)
        return latency


# --- the command ----------------------------------------------------------------------------------------

FIGURES = ("latency", "late", "correction", "loss")


class Row(NamedTuple):
    """A line of the table."""

    figure: str
    value: str
    target: str


def describe_latency(latency: Latency) -> tuple[dict[str, object], list[Row]]:
    """For JSON and for the table."""
    undisturbed_ms, others_ms = float(np.median(latency.undisturbed_ms)), latency.others_ms
    line: dict[str, object] = {
        "to_object_p50_ms": mean([float(np.median(latency.to_object_ms))]),
        "to_object_max_ms": mean([max(latency.to_object_ms)]),
        "tick_p50_ms": mean([undisturbed_ms]),
        "extra_delay_p50_ms": mean([float(np.median(others_ms)) - undisturbed_ms]),
        "extra_delay_max_ms": mean([max(others_ms) - undisturbed_ms]),
        "dropped": latency.dropped,
        "frames": latency.frames,
        "prompts": len(latency.to_object_ms),
    }
    rows = [
        Row("prompt 1 s back to object, max", f"{line['to_object_max_ms']} ms", "150 ms"),
        Row("extra delay of other frames, max", f"{line['extra_delay_max_ms']} ms", "one tick"),
        Row("latency of a frame otherwise, median", f"{line['tick_p50_ms']} ms", ""),
    ]
    return line, rows


def describe_pairs(
    name: str, pairs: Sequence[Pair], against: str, target: str
) -> tuple[dict[str, object], Row]:
    """For JSON and for the table."""
    here, there = mean([pair.here for pair in pairs]), mean([pair.against for pair in pairs])
    gap = None if here is None or there is None else round(here - there, 2)
    line: dict[str, object] = {
        "jf": here,
        f"jf_{against}": there,
        "difference": gap,
        "objects": len(pairs),
        "rows": [[pair.name, round(pair.here, 2), round(pair.against, 2)] for pair in pairs],
    }
    return line, Row(f"J&F {name}, {len(pairs)} objects", f"{here} against {there} {against}", target)


def main(arguments: Sequence[str] | None = None, *, load: LoadModel = load_model) -> int:
    """Measure.

    Args:
        arguments: None for those of the process.
        load: loads the model.

    Returns:
        0, or 2 after an expected failure, which one line on stderr tells.
    """
    options = _make_parser().parse_args(arguments)
    try:
        _run(options, load)
    except TrocarError as error:
        print(f"bench-past: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_EXPECTED_FAILURE
    except KeyboardInterrupt:
        print("bench-past: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench-past",
        description="Measure prompts in the past, corrections and lost packets, on the held-out demo scene "
        "and on folders in DAVIS layout. The last line on stdout is JSON.",
    )
    parser.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="JPEGImages/ and Annotations/"
    )
    parser.add_argument(
        "--figures", type=_figures, default=FIGURES, metavar="A,B", help=f"of {', '.join(FIGURES)}"
    )
    parser.add_argument(
        "--frames", type=int, default=DEMO_FRAMES, help="of the demo scene (default %(default)s)"
    )
    parser.add_argument("--prompts", type=int, default=10, help="for latency (default %(default)s)")
    parser.add_argument(
        "--starts", type=int, default=CORRECTED_STARTS, help="for correction (default %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=LOSS_SEEDS, help="for loss (default %(default)s)")
    add_engine_options(parser)
    return parser


def _figures(text: str) -> tuple[str, ...]:
    chosen = tuple(filter(None, text.split(",")))
    if not chosen or set(chosen) - set(FIGURES):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(FIGURES)}")
    return chosen


def _say(text: str) -> None:
    print(f"bench-past: {text}", file=sys.stderr, flush=True)


def _run(options: argparse.Namespace, load: LoadModel) -> None:
    for name, least in (("frames", 2), ("prompts", 1), ("starts", 1), ("seeds", 1)):
        if getattr(options, name) < least:
            raise TrocarError(f"--{name} {getattr(options, name)}: expected at least {least}")
    config = scheduler_config(read_engine_options(options, max_streams=3))
    watches: list[Watch] = []

    def load_watched(name: str, config: SchedulerConfig, on_progress: Callable[[str], None]) -> LoadedModel:
        loaded = load(name, config, on_progress)
        watches.append(Watch(loaded.tracker))
        return LoadedModel(entry=loaded.entry, tracker=watches[-1])

    scheduler = Scheduler(config, print_progress, load=load_watched)
    line: dict[str, object] = {"model": config.model, "memory": config.memory}
    table = Table("figure", "measured", "target")
    try:
        _say(f"rendering {options.frames} frames")
        clips = [
            render_clip(options.frames),
            *(clip for folder in options.folders for clip in read_clips(folder)),
        ]
        for figure in options.figures:
            _say(f"measuring {figure}")
            for row in _measure(figure, scheduler, watches[0], clips, options, line):
                table.add_row(*row)
    finally:
        scheduler.close()
    Console().print(table)
    print(json.dumps(line))


def _measure(
    figure: str,
    scheduler: Scheduler,
    watch: Watch,
    clips: Sequence[Clip],
    options: argparse.Namespace,
    line: dict[str, object],
) -> list[Row]:
    """Rows of one figure; adds it to the line."""
    match figure:
        case "latency":
            with closing(scheduler.open_stream(is_live=True, max_objects=4)) as stream:
                line[figure], rows = describe_latency(LiveRun(stream, clips[0], options.prompts).run())
            return rows
        case "late":
            late = [pair for clip in clips for pair in measure_late(scheduler, clip)]
            line[figure], row = describe_pairs("prompted 1 s late", late, "timely", "within 2")
            return [row]
        case "correction":
            corrected = [
                pair for clip in clips for pair in measure_corrections(scheduler, clip, options.starts)
            ]
            line[figure], row = describe_pairs(
                "corrected after drifting", corrected, "fresh", "at least equal"
            )
            return [row]
        case _:
            return _measure_loss(scheduler, watch, clips, options.seeds, line)


def _measure_loss(
    scheduler: Scheduler, watch: Watch, clips: Sequence[Clip], seeds: int, line: dict[str, object]
) -> list[Row]:
    with LocalServer(scheduler, resize_to_model) as server:
        damaged = [measure_loss(server.address, clip, seeds) for clip in clips]
    pairs = [pair for one in damaged for pair in one.pairs]
    described, row = describe_pairs("30% of packets lost, trusted frames", pairs, "whole", "within 3")
    described |= {
        "frames": sum(one.frames for one in damaged),
        "trusted_frames": sum(one.trusted for one in damaged),
        "keyframe_requests": sum(one.keyframe_requests for one in damaged),
        "untrusted_memories": watch.untrusted_memories,
    }
    line["loss"] = described
    return [row, Row("memories of untrusted frames", str(watch.untrusted_memories), "0")]


if __name__ == "__main__":
    sys.exit(main())
