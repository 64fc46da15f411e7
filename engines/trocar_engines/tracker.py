"""The straight line from pictures to masklets, for many objects of many streams at once.

encode_image ─ attend_memory ─ decode_masks ─ readback ─ (reply) ─ write_memory
"""

import itertools
import time
from collections import deque
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor

from trocar_engines.errors import CapacityError, FrameNotKeptError, InvalidPromptError, UnknownObjectError
from trocar_engines.masklets import (
    Float32Array,
    FrameMasklets,
    Masklet,
    ObjectState,
    Picture,
    Prompt,
    PromptMode,
    PromptOutcome,
)
from trocar_engines.memory.bank import BankConfig, FrameFacts, MemoryBank, mask_area
from trocar_engines.memory.pool import MemoryPool
from trocar_engines.network.sam2s import Decoded, ImageFeatures, PromptTensors
from trocar_engines.runtime.interface import Runtime

LARGEST_BATCH = 32
"""Rows of one batch; more objects take several."""
LOGIT_CLAMP = 32.0
"""Earlier mask logits are clamped to ± this before they prompt the decoder, as in SAM 2."""
ABSENT_DISPLAY_LOGIT = -32.0
CLASS_MEMORY = 0.9
"""Share of the past in an object's running class probabilities."""
LEAST_CLASS_PROBABILITY = 0.5
"""Below it a class is "unknown"."""
UNKNOWN_CLASS = "unknown"


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """How a tracker behaves.

    Args:
        rows: objects of all streams together.
        bank: slots and thresholds of an object's memory.
        lost_after_s: an object absent for longer is LOST rather than OCCLUDED.
        kept_bytes: budget for image features of recent frames, per stream; prompts may name those frames.
        most_kept_frames: and never more than so many.
    """

    rows: int = 64
    bank: BankConfig = field(default_factory=BankConfig)
    lost_after_s: float = 2.0
    kept_bytes: int = 64 << 20
    most_kept_frames: int = 60


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptFrame:
    """A recent frame that a prompt may name.

    Args:
        frame_id: the client's number; `width_px` and `height_px` are the source picture's.
        time_s: its presentation time.
        features: of one picture, B = 1.
        summary: float32 [C] pooled features.
    """

    frame_id: int
    width_px: int
    height_px: int
    time_s: float
    features: ImageFeatures
    summary: Float32Array


@dataclass(kw_only=True, eq=False)
class TrackedObject:
    """One object of one stream: its memory and what the last frame said of it."""

    object_id: int
    bank: MemoryBank
    prompted_frame: int
    conditioning_frame: int
    points: list[tuple[float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    mask_logits: Float32Array | None = None
    logits_frame: int = -1
    seen_at_s: float = 0.0
    frames_since_seen: int = 0
    class_probabilities: Float32Array | None = None


@dataclass(kw_only=True, eq=False)
class StreamState:
    """What a tracker keeps for one stream.

    Args:
        bank: memory settings of its objects.
        most_objects: limit of the stream.
    """

    bank: BankConfig
    most_objects: int
    objects: dict[int, TrackedObject] = field(default_factory=dict)
    kept: deque[KeptFrame] = field(default_factory=deque)


@dataclass(kw_only=True, eq=False)
class _Row:
    """One object on one picture of a tick: row of a batch."""

    tracked: TrackedObject
    picture: Picture
    frame: KeptFrame
    masklet: Masklet | None = None

    @property
    def facts(self) -> FrameFacts:
        """What decides whether the picture is remembered."""
        assert self.masklet is not None, "facts are known once the row is read back"
        return FrameFacts(
            time_s=self.picture.time_s,
            predicted_iou=self.masklet.predicted_iou,
            is_present=self.masklet.state is ObjectState.VISIBLE,
            is_trusted=self.picture.is_trusted,
            area=mask_area(self.masklet.mask_logits),
            summary=self.frame.summary,
        )


@dataclass(kw_only=True, eq=False)
class Step:
    """A tick between reply and memory: the results, and what `remember` still has to write."""

    results: list[FrameMasklets]
    batches: list[tuple[list[_Row], ImageFeatures, Decoded]]


class Tracker:
    """Follows objects through the pictures of any number of streams.

    Owned by one thread. Device tensors are allocated here, once.

    Args:
        runtime: executes the network.
        config: limits and memory.
    """

    def __init__(self, runtime: Runtime, config: TrackerConfig) -> None:
        self.runtime, self.config = runtime, config
        self.network = runtime.config
        self.pool = MemoryPool(self.network, rows=config.rows, slots=config.bank.slots)
        self.write_memory_ns = 0

    def open_stream(self, bank: BankConfig, most_objects: int) -> StreamState:
        """State for a new stream."""
        return StreamState(bank=bank, most_objects=most_objects)

    def close_stream(self, stream: StreamState) -> None:
        """Free everything the stream holds."""
        self.reset(stream)
        stream.kept.clear()

    def reset(self, stream: StreamState) -> None:
        """Forget every object of the stream."""
        for tracked in stream.objects.values():
            tracked.bank.release()
        stream.objects.clear()

    def remove(self, stream: StreamState, object_id: int) -> None:
        """Forget one object.

        Raises:
            UnknownObjectError: the stream does not track it.
        """
        tracked = stream.objects.pop(object_id, None)
        if tracked is None:
            known = ", ".join(map(str, stream.objects)) or "none"
            raise UnknownObjectError(f"object {object_id} is not tracked; this stream tracks {known}")
        tracked.bank.release()

    @torch.inference_mode()
    def step(self, streams: list[StreamState], pictures: list[Picture]) -> Step:
        """Track every object of each stream on its picture; `remember` completes the tick after the reply.

        Args:
            streams: distinct.
            pictures: one per stream.
        """
        clock = _Clock()
        frames = self._encode(streams, pictures)
        clock.lap("encode_image")
        by_stream = [
            [_Row(tracked=tracked, picture=picture, frame=frame) for tracked in stream.objects.values()]
            for stream, picture, frame in zip(streams, pictures, frames, strict=True)
        ]
        rows = list(itertools.chain.from_iterable(by_stream))
        batches = []
        for start in range(0, len(rows), LARGEST_BATCH):
            batch = rows[start : start + LARGEST_BATCH]
            features = _stack([row.frame.features for row in batch])
            banks = [row.tracked.bank for row in batch]
            for bank in banks:
                bank.advance()
            view, prototypes, prototype_bias = self.pool.gather(
                [bank.row for bank in banks], [bank.reads() for bank in banks]
            )
            conditioned, class_logits = self.runtime.attend_memory(features.embedding, view)
            clock.lap("attend_memory")
            decoded = self.runtime.track_masks(conditioned, features, prototypes, prototype_bias)
            clock.lap("decode_masks")
            for row, read in zip(batch, _read_back(decoded, class_logits), strict=True):
                row.masklet = self._describe(row.tracked, read, row.picture)
            batches.append((batch, features, decoded))
            clock.lap("readback")
        clock.durations["write_memory"] = self.write_memory_ns
        results = [
            FrameMasklets(
                frame_id=picture.frame_id,
                masklets=tuple(row.masklet for row in stream_rows if row.masklet is not None),
                is_trusted=picture.is_trusted,
                stage_ns=dict(clock.durations),
            )
            for picture, stream_rows in zip(pictures, by_stream, strict=True)
        ]
        return Step(results=results, batches=batches)

    @torch.inference_mode()
    def remember(self, step: Step) -> None:
        """Write the tick's frames to memory; kept off the reply's path."""
        began = time.perf_counter_ns()
        for batch, features, decoded in step.batches:
            facts = [row.facts for row in batch]
            slots = [row.tracked.bank.choose_slot(fact) for row, fact in zip(batch, facts, strict=True)]
            worth = [index for index, slot in enumerate(slots) if slot is not None]
            if worth:
                chosen = torch.tensor(worth)
                spatial, prototypes = self.runtime.encode_memory(
                    ImageFeatures(*(maps[chosen] for maps in features))
                    if len(worth) < len(batch)
                    else features,
                    decoded.mask_logits[chosen],
                    decoded.presence_logit[chosen],
                    torch.zeros(len(worth), dtype=torch.bool),
                )
                for position, index in enumerate(worth):
                    bank, slot = batch[index].tracked.bank, slots[index]
                    assert slot is not None
                    self.pool.write(bank.row, slot, spatial[position], prototypes[position])
                    self.pool.pointers[bank.row, bank.pointer_slot()] = decoded.pointer[index]
            for row, fact, slot in zip(batch, facts, slots, strict=True):
                row.tracked.bank.consider(fact, slot)
        self.write_memory_ns = time.perf_counter_ns() - began

    @torch.inference_mode()
    def prompt(self, stream: StreamState, prompt: Prompt) -> PromptOutcome:
        """Add, refine or replace an object on a kept frame.

        Raises:
            FrameNotKeptError: the frame is no longer kept.
            InvalidPromptError: the prompt says nothing.
            CapacityError: no object more fits.
        """
        frame = self._kept_frame(stream, prompt.frame_id)
        tracked = stream.objects.get(prompt.object_id)
        is_new = tracked is None or prompt.mode is PromptMode.REPLACE
        if tracked is None:
            if len(stream.objects) >= stream.most_objects:
                raise CapacityError(
                    f"object {prompt.object_id}: this stream already tracks {stream.most_objects} objects, "
                    "its limit; remove one first"
                )
            bank = MemoryBank(self.pool, stream.bank, self.network)
            tracked = TrackedObject(
                object_id=prompt.object_id,
                bank=bank,
                prompted_frame=frame.frame_id,
                conditioning_frame=frame.frame_id,
            )
        try:
            decoded = self._decode_prompt(tracked, prompt, frame, is_new=is_new)
        except BaseException:
            if prompt.object_id not in stream.objects:
                tracked.bank.release()
            raise
        stream.objects[prompt.object_id] = tracked
        read = _read_back(decoded, torch.zeros(1, 0))[0]
        self._remember_prompt(tracked, frame, decoded, is_new=is_new)
        masklet = self._describe_prompted(tracked, read, frame)
        return PromptOutcome(frame_id=frame.frame_id, masklet=masklet)

    def _encode(self, streams: list[StreamState], pictures: list[Picture]) -> list[KeptFrame]:
        """Encode the pictures as one batch and keep their features."""
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
        features = self.runtime.encode_image(pixels)
        summaries = features.embedding.mean(dim=(2, 3)).numpy()
        frames = []
        for index, (stream, picture) in enumerate(zip(streams, pictures, strict=True)):
            frame = KeptFrame(
                frame_id=picture.frame_id,
                width_px=picture.width_px,
                height_px=picture.height_px,
                time_s=picture.time_s,
                features=ImageFeatures(*(maps[index : index + 1] for maps in features)),
                summary=summaries[index],
            )
            frames.append(frame)
            stream.kept.append(frame)
            while len(stream.kept) > self._most_kept(frame):
                stream.kept.popleft()
        return frames

    def _most_kept(self, frame: KeptFrame) -> int:
        frame_bytes = sum(maps.nbytes for maps in frame.features)
        return max(1, min(self.config.most_kept_frames, self.config.kept_bytes // frame_bytes))

    def _kept_frame(self, stream: StreamState, frame_id: int) -> KeptFrame:
        """The kept frame nearest to `frame_id`: a dropped frame's neighbour stands in for it."""
        if not stream.kept:
            raise FrameNotKeptError(f"frame {frame_id}: no frame has been tracked yet; send one first")
        oldest, latest = stream.kept[0].frame_id, stream.kept[-1].frame_id
        if frame_id < oldest:
            raise FrameNotKeptError(
                f"frame {frame_id} is no longer kept: frames {oldest} to {latest} are; prompt on a newer one"
            )
        return min(stream.kept, key=lambda frame: abs(frame.frame_id - frame_id))

    def _decode_prompt(
        self, tracked: TrackedObject, prompt: Prompt, frame: KeptFrame, *, is_new: bool
    ) -> Decoded:
        if prompt.mask is not None:
            return self._decode_mask_prompt(prompt.mask, frame)
        is_same_frame = not is_new and tracked.prompted_frame == frame.frame_id
        if not is_same_frame:
            tracked.points, tracked.labels = [], []
        tracked.prompted_frame = frame.frame_id
        scale = self.network.input_size_px / np.array([frame.width_px, frame.height_px])
        points, labels = list(prompt.points), list(prompt.labels)
        if prompt.box is not None:
            # SAM 2 reads a box as two points of their own labels, before all others.
            tracked.points, tracked.labels = [prompt.box[:2], prompt.box[2:]], [2, 3]
        tracked.points += points
        tracked.labels += labels
        if not tracked.points:
            raise InvalidPromptError(f"object {prompt.object_id}: a prompt needs a point, a box or a mask")
        has_logits = not is_new and tracked.mask_logits is not None and tracked.logits_frame == frame.frame_id
        size = self.network.mask_size
        mask_prompt = torch.zeros(1, 1, size, size)
        if has_logits:
            assert tracked.mask_logits is not None
            mask_prompt[0, 0] = torch.from_numpy(tracked.mask_logits).clamp(-LOGIT_CLAMP, LOGIT_CLAMP)
        coordinates = torch.from_numpy(np.array(tracked.points) * scale).float().unsqueeze(0)
        return self.runtime.decode_prompt(
            self.runtime.without_memory(frame.features.embedding),
            frame.features,
            PromptTensors(
                points=coordinates,
                labels=torch.tensor([tracked.labels]),
                mask=mask_prompt,
                has_mask=torch.tensor([has_logits]),
            ),
            torch.tensor([len(tracked.points) <= 1]),
        )

    def _decode_mask_prompt(self, mask: np.ndarray, frame: KeptFrame) -> Decoded:
        """A mask prompt is its own mask; the decoder only makes the pointer, as in SAM 2."""
        size = self.network.input_size_px
        resized = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
        full = torch.from_numpy((resized >= 0.5).astype(np.float32)).view(1, 1, size, size)
        decoded = self.runtime.decode_prompt(
            self.runtime.without_memory(frame.features.embedding),
            frame.features,
            PromptTensors(
                points=torch.zeros(1, 1, 2),
                labels=torch.tensor([[-1]]),
                mask=self.runtime.downsample_mask(full),
                has_mask=torch.tensor([True]),
            ),
            torch.tensor([True]),
        )
        pooled = torch.nn.functional.avg_pool2d(full, 4)[:, 0]
        return decoded._replace(
            mask_logits=pooled * 20.0 - 10.0,
            predicted_iou=torch.ones(1),
            presence_logit=torch.full((1,), 10.0),
        )

    def _remember_prompt(
        self, tracked: TrackedObject, frame: KeptFrame, decoded: Decoded, *, is_new: bool
    ) -> None:
        bank = tracked.bank
        area = mask_area(decoded.mask_logits[0].numpy())
        if is_new or frame.frame_id == tracked.conditioning_frame:
            # What was remembered since was seen with the mask that is being corrected.
            tracked.conditioning_frame = frame.frame_id
            slot = bank.condition(frame.summary, area)
        else:
            slot = bank.correct(area)
        spatial, prototypes = self.runtime.encode_memory(
            frame.features, decoded.mask_logits, decoded.presence_logit, torch.tensor([True])
        )
        self.pool.write(bank.row, slot, spatial[0], prototypes[0])
        self.pool.pointers[bank.row, 0 if slot == 0 else bank.pointer_slot()] = decoded.pointer[0]

    def _describe(self, tracked: TrackedObject, read: "_Readback", picture: Picture) -> Masklet:
        """The masklet of a tracked frame; moves the object's state."""
        tracked.logits_frame = picture.frame_id
        if len(read.class_logits):
            likely = _softmax(read.class_logits)
            past = tracked.class_probabilities
            tracked.class_probabilities = (
                likely if past is None else CLASS_MEMORY * past + (1 - CLASS_MEMORY) * likely
            )
        return self._masklet(tracked, read, picture.time_s)

    def _describe_prompted(self, tracked: TrackedObject, read: "_Readback", frame: KeptFrame) -> Masklet:
        tracked.logits_frame = frame.frame_id
        return self._masklet(tracked, read, frame.time_s)

    def _masklet(self, tracked: TrackedObject, read: "_Readback", time_s: float) -> Masklet:
        is_visible = read.presence_logit > 0 and bool((read.mask_logits > 0).any())
        if is_visible:
            tracked.seen_at_s, tracked.frames_since_seen = time_s, 0
            state = ObjectState.VISIBLE
        else:
            tracked.frames_since_seen += 1
            is_lost = time_s - tracked.seen_at_s > self.config.lost_after_s
            state = ObjectState.LOST if is_lost else ObjectState.OCCLUDED
        logits = read.mask_logits if is_visible else np.full_like(read.mask_logits, ABSENT_DISPLAY_LOGIT)
        tracked.mask_logits = logits
        name, probability = self._class_of(tracked)
        return Masklet(
            object_id=tracked.object_id,
            state=state,
            mask_logits=logits,
            predicted_iou=read.predicted_iou,
            presence=float(1 / (1 + np.exp(-np.clip(read.presence_logit, -60, 60)))),
            class_name=name,
            class_probability=probability,
            frames_since_seen=tracked.frames_since_seen,
        )

    def _class_of(self, tracked: TrackedObject) -> tuple[str, float]:
        if tracked.class_probabilities is None:
            return UNKNOWN_CLASS, 0.0
        best = int(tracked.class_probabilities.argmax())
        probability = float(tracked.class_probabilities[best])
        name = self.network.classes[best] if probability >= LEAST_CLASS_PROBABILITY else UNKNOWN_CLASS
        return name, probability


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Readback:
    mask_logits: Float32Array
    predicted_iou: float
    presence_logit: float
    class_logits: Float32Array


def _read_back(decoded: Decoded, class_logits: Tensor) -> list[_Readback]:
    """The step's one wait for the device: everything the reply needs, on the host."""
    masks = decoded.mask_logits.numpy()
    ious, presence = decoded.predicted_iou.tolist(), decoded.presence_logit.tolist()
    classes = class_logits.numpy()
    return [
        _Readback(mask_logits=mask, predicted_iou=iou, presence_logit=present, class_logits=logits)
        for mask, iou, present, logits in zip(masks, ious, presence, classes, strict=True)
    ]


def _stack(features: list[ImageFeatures]) -> ImageFeatures:
    """Features of one picture per object, as one batch; no copy for a single object."""
    if len(features) == 1:
        return features[0]
    return ImageFeatures(*(torch.cat(maps) for maps in zip(*features, strict=True)))


def _softmax(logits: Float32Array) -> Float32Array:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum(), dtype=np.float32)


class _Clock:
    """Host time per stage; a stage that runs in several batches adds up."""

    def __init__(self) -> None:
        self.durations: dict[str, int] = {}
        self._last = time.perf_counter_ns()

    def lap(self, stage: str) -> None:
        """Charge the time since the last lap to `stage`."""
        now = time.perf_counter_ns()
        self.durations[stage] = self.durations.get(stage, 0) + now - self._last
        self._last = now
