"""The straight line from pictures to masklets, for many objects of many streams at once.

encode_image ─ attend_memory ─ decode_masks ─ readback ─ (reply) ─ write_memory ─ recognise ─ search
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trocar_engines.errors import CapacityError, InvalidPromptError, UnknownObjectError
from trocar_engines.masklets import (
    MOST_POINTS,
    BoolArray,
    FrameMasklets,
    Masklet,
    ObjectState,
    Picture,
    Prompt,
    PromptMode,
    PromptOutcome,
    UInt8Array,
)
from trocar_engines.masks import main_parts, settle_overlaps
from trocar_engines.memory.bank import BankConfig, FrameFacts, MemoryBank, MemoryPolicy, mask_area
from trocar_engines.memory.pool import MemoryPool, Place, is_uniform, upload
from trocar_engines.network.appearance import LEAST_AREA
from trocar_engines.network.readout import READOUT_SLOTS
from trocar_engines.network.sam2s import Decoded, ImageFeatures, PromptTensors
from trocar_engines.runtime.clock import StageClock
from trocar_engines.runtime.interface import MOST_LOOKS, Runtime
from trocar_engines.search import GLANCE_INTERVAL_S, Trial
from trocar_engines.tracked import (
    ALIKE,
    SOUND_IOU,
    IdentityConfig,
    KeptFrame,
    Past,
    Readback,
    StreamState,
    TrackedObject,
)

LARGEST_BATCH = 32
"""Rows of one batch; more objects take several."""
LOGIT_CLAMP = 32.0
"""Earlier mask logits are clamped to ± this before they prompt the decoder, as in SAM 2."""
ABSENT_DISPLAY_LOGIT = -32.0
WHOLE_SHARE = 0.4
"""Of the area an object had of late. A smaller mask shows too little: of a look-alike not what marks it. With
this, and `tracked.TRIAL_IOU` 0.4 instead of 0.3, J&F 83.2 instead of 79.3 on frames that show the object (two
sets of LongSim dev), 76.3 instead of 71.8 on all."""
TAKEN_SHARE = 0.5
"""A mask of which so much lies on other objects is one of them."""


@dataclass(frozen=True, kw_only=True)
class TrackerConfig(IdentityConfig):
    """How a tracker behaves; what decides on identity is inherited.

    Args:
        rows: objects of all streams together.
        bank: slots and thresholds of an object's memory.
        most_looks: so many of all streams' objects are looked at on one tick, of one stream `MOST_LOOKS`.
        kept_bytes: budget for image features of recent frames, per stream; prompts may name those frames.
        most_kept_frames: and never more than so many: at 60 frames a second, a second and a quarter, so that
            a tap on a picture that is a second old still meets it.
    """

    rows: int = 64
    bank: BankConfig = field(default_factory=BankConfig)
    most_looks: int = MOST_LOOKS
    kept_bytes: int = 64 << 20
    most_kept_frames: int = 75


@dataclass(kw_only=True, eq=False)
class _Row:
    """One object of a stream on one frame: row of a batch. `frames` have come since the one before.

    `pixels` of the picture are known in the present only, `read` and `masklet` once the device is done.
    """

    stream: StreamState
    tracked: TrackedObject
    frame: KeptFrame
    frames: int = 1
    pixels: UInt8Array | None = None
    read: Readback | None = None
    masklet: Masklet | None = None

    @property
    def found_area(self) -> int:
        """Points of the mask, be it doubted."""
        return 0 if self.read is None else self.read.found_area

    @property
    def is_doubted(self) -> bool:
        """Whether something is found that is not believed to be the object."""
        return self.found_area > 0 and self.tracked.is_unproven

    @property
    def facts(self) -> FrameFacts:
        """What decides whether the frame is remembered."""
        assert self.masklet is not None, "facts are known once the row is read back"
        return FrameFacts(
            time_s=self.frame.time_s,
            predicted_iou=self.masklet.predicted_iou,
            # What is followed and only just doubted goes on as it is until more looks tell.
            is_present=self.found_area > 0,
            is_trusted=self.frame.is_trusted
            and self.tracked.search.trial is None
            and not (self.is_doubted and self.tracked.is_lost),
            area=self.found_area,
            summary=self.frame.summary,
        )


class _Batch(NamedTuple):
    """Rows that went through the network together, and what it said of them."""

    rows: list[_Row]
    features: ImageFeatures
    decoded: Decoded
    class_token: Tensor


class _Ahead(NamedTuple):
    """Pictures that were encoded before their tick; kept, for `frames` knows them by their id."""

    pictures: list[Picture]
    frames: dict[int, KeptFrame]
    began_ns: int
    clock: StageClock

    def holds(self, picture: Picture) -> bool:
        """Whether a picture is one of them."""
        return id(picture) in self.frames


@dataclass(kw_only=True, eq=False)
class Step:
    """A tick between reply and memory: the results, and what `remember` still has to write.

    `begun_ns` is when the device was asked to encode each picture, by `time.perf_counter_ns`.
    """

    results: list[FrameMasklets]
    batches: list[_Batch]
    begun_ns: list[int]


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
        self.pool = MemoryPool(self.network, rows=config.rows, slots=config.bank.slots, device=runtime.device)
        self._memory_clock: StageClock | None = None
        self._ahead: _Ahead | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Do once what one object on a blank picture does not: its first time comes between live frames."""
        side, device = self.network.input_size_px, self.runtime.device
        overlapping = torch.ones(2, self.network.mask_size, self.network.mask_size, device=device)
        settle_overlaps(overlapping, torch.ones(2, 2, dtype=torch.bool, device=device))
        if not self.network.classes:
            return
        token = torch.zeros(1, self.network.d_model, device=device)
        pixels = torch.zeros(1, side, side, 3, dtype=torch.uint8)
        mask_logits = torch.zeros(1, self.network.mask_size, self.network.mask_size, device=device)
        self.runtime.recognise(token, pixels, mask_logits)
        if self.network.readout_dim:
            keys = self.runtime.encode_image(pixels).keys
            self.runtime.read_affinity(keys, self.pool.prototypes[:1, :1].expand(-1, READOUT_SLOTS, -1, -1))

    def open_stream(self, bank: BankConfig, most_objects: int) -> StreamState:
        """State for a new stream."""
        return StreamState(bank=bank, most_objects=most_objects)

    def close_stream(self, stream: StreamState) -> None:
        """Free everything the stream holds."""
        self.reset(stream)
        self._ahead = None  # it may be a picture of this stream; another's is encoded again
        stream.kept.clear()
        stream.pinned = None

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
    def step(
        self,
        streams: list[StreamState],
        pictures: list[Picture],
        *,
        coming: Callable[[], list[Picture]] = list,
    ) -> Step:
        """Track every object of each stream on its picture; `remember` completes the tick after the reply.

        Objects that were prompted in the past come one kept frame nearer to the present, as extra rows.

        Args:
            streams: distinct.
            pictures: one per stream; one that several streams share is encoded once.
            coming: pictures of the next tick, as far as they are known. Asked where calls return before the
                device is done, once all of this tick is asked for: so the device encodes them while the host
                reads this tick's masks, answers and prepares the next.
        """
        began_ns = time.perf_counter_ns()
        clock = self.runtime.start_clock()
        frames, ahead = self._encode(streams, pictures)
        clock.lap("encode_image")
        by_stream = [
            _rows(stream, frame, picture.pixels)
            for stream, frame, picture in zip(streams, frames, pictures, strict=True)
        ]
        rows = [*itertools.chain.from_iterable(by_stream), *_rows_behind(streams)]
        batches = self._track(rows, clock, coming)
        # What the frame before took, and what was encoded ahead: on a GPU it is only now certain to be done.
        stage_ns = clock.read() | ({} if self._memory_clock is None else self._memory_clock.read())
        ahead_ns = {} if ahead is None else ahead.clock.read()
        are_ahead = [ahead is not None and ahead.holds(picture) for picture in pictures]
        results = [
            FrameMasklets(
                frame_id=picture.frame_id,
                masklets=tuple(row.masklet for row in stream_rows if row.masklet is not None),
                is_trusted=picture.is_trusted,
                stage_ns=stage_ns | (ahead_ns if is_ahead else {}),
            )
            for picture, stream_rows, is_ahead in zip(pictures, by_stream, are_ahead, strict=True)
        ]
        begun_ns = [ahead.began_ns if ahead is not None and is_ahead else began_ns for is_ahead in are_ahead]
        return Step(results=results, batches=batches, begun_ns=begun_ns)

    @torch.inference_mode()
    def catch_up(self, streams: list[StreamState]) -> None:
        """Bring every object that was prompted in the past one kept frame nearer, without a new picture."""
        self.remember(
            Step(
                results=[],
                batches=self._track(_rows_behind(streams), self.runtime.start_clock(), list),
                begun_ns=[],
            )
        )

    def _track(
        self, rows: list[_Row], clock: StageClock, coming: Callable[[], list[Picture]]
    ) -> list[_Batch]:
        """Find each row's object on its frame, as many rows at a time as fit a batch."""
        batches: list[_Batch] = []
        for start in range(0, len(rows), LARGEST_BATCH):
            together = rows[start : start + LARGEST_BATCH]
            features = _stack([row.frame.features for row in together])
            banks = [row.tracked.bank for row in together]
            for row in together:
                row.tracked.bank.advance(row.frames)
            reads = [bank.reads() for bank in banks]
            view, prototypes = self.pool.gather([bank.row for bank in banks], reads)
            conditioned, class_token = self.runtime.attend_memory(
                features.embedding, view, is_full=is_uniform(reads)
            )
            clock.lap("attend_memory")
            decoded = self.runtime.track_masks(conditioned, features, prototypes)
            clock.lap("decode_masks")
            batches.append(_Batch(together, features, decoded, class_token))
        batches = self._settle(rows, batches)
        clock.lap("decode_masks")
        readbacks = [self.runtime.read_back(batch.decoded) for batch in batches]
        if self.runtime.is_asynchronous:
            self._encode_ahead(coming())
        for batch, read_back in zip(batches, readbacks, strict=True):
            for row, read in zip(batch.rows, _describe(read_back()), strict=True):
                can_look = row.pixels is not None
                row.read = read
                row.masklet = self._masklet(row.tracked, read, row.frame, can_look=can_look)
            clock.lap("readback")
        return batches

    def _settle(self, rows: list[_Row], batches: list[_Batch]) -> list[_Batch]:
        """The batches of all rows, no point of whose masks belongs to two rivals."""
        if len(rows) < 2 or not (are_rivals := _find_rivals(rows)).any():
            return batches
        (on_device,) = upload(self.runtime.device, are_rivals)
        mask_logits = torch.cat([batch.decoded.mask_logits for batch in batches])
        settled = settle_overlaps(mask_logits, on_device).split([len(batch.rows) for batch in batches])
        return [
            batch._replace(decoded=batch.decoded._replace(mask_logits=of_batch))
            for batch, of_batch in zip(batches, settled, strict=True)
        ]

    @torch.inference_mode()
    def remember(self, step: Step) -> None:
        """Write the tick's frames to memory and look at whose turn it is; kept off the reply's path."""
        clock = self.runtime.start_clock()
        if step.results:  # what catching up takes is no tick's
            self._memory_clock = clock
        for batch, features, decoded, class_token in step.batches:
            facts = [row.facts for row in batch]
            due = [row.tracked.bank.is_due(fact) for row, fact in zip(batch, facts, strict=True)]
            slots = [
                row.tracked.bank.choose_slot(fact) if is_due else None
                for row, fact, is_due in zip(batch, facts, due, strict=True)
            ]
            worth = [index for index, slot in enumerate(slots) if slot is not None]
            if worth:
                places = [
                    batch[index].tracked.bank.place(slot, facts[index].time_s)
                    for index, slot in enumerate(slots)
                    if slot is not None
                ]
                if len(worth) < len(batch):
                    (chosen,) = upload(self.runtime.device, np.array(worth))
                    features = ImageFeatures(*(maps.index_select(0, chosen) for maps in features))
                    remembered = Decoded(*(field.index_select(0, chosen) for field in decoded))
                else:
                    remembered = decoded
                is_prompted = torch.zeros(len(worth), dtype=torch.bool, device=self.runtime.device)
                self._write(places, features, remembered, is_prompted)
            for row, fact, slot, is_due in zip(batch, facts, slots, due, strict=True):
                if is_due:
                    row.tracked.bank.consider(fact, None if row.is_doubted else slot)
            if self.network.classes:
                self._recognise(batch, class_token)
        if self.network.classes and self.network.readout_dim:
            self._search([row for batch in step.batches for row in batch.rows])
        clock.lap("write_memory")

    def _write(
        self, places: list[Place], features: ImageFeatures, decoded: Decoded, is_prompted: Tensor
    ) -> None:
        """Remember objects on frames; as many rows of each."""
        spatial, prototypes = self.runtime.encode_memory(
            features, decoded.mask_logits, decoded.presence_logit, is_prompted
        )
        self.pool.store(places, spatial, prototypes, decoded.pointer)

    def _recognise(self, rows: list[_Row], class_token: Tensor) -> None:
        """Look what some of the rows show, those first that wait longest: kind and appearance."""
        due = [
            index
            for index, row in enumerate(rows)
            if row.pixels is not None
            and row.found_area
            and row.frame.is_trusted
            # Either way: a source that begins anew may begin its clock anew.
            and abs(row.frame.time_s - row.tracked.looked_at_s) >= self.config.look_interval_s
        ]
        due = self._take_turns(rows, due, lambda tracked: tracked.looked_at_s)
        if not due:
            return
        shown = [pixels for index in due if (pixels := rows[index].pixels) is not None]
        masks = [main_parts(read.mask_logits) for index in due if (read := rows[index].read) is not None]
        chosen, mask_logits = upload(self.runtime.device, np.array(due), np.stack(masks))
        seen = self.runtime.recognise(
            class_token.index_select(0, chosen),
            _stack_pixels(shown, self.runtime.device),
            mask_logits,
        )
        for index, of_one, descriptor in zip(due, *(values.numpy() for values in seen), strict=True):
            row = rows[index]
            tracked, masklet = row.tracked, row.masklet
            assert masklet is not None, "known once the row is read back"
            tracked.looked_at_s = row.frame.time_s
            # What is small tells little, but what is doubted has no other way back.
            if row.found_area >= LEAST_AREA or tracked.is_unproven:
                tracked.look(descriptor, is_sound=masklet.predicted_iou >= SOUND_IOU)
            if not tracked.is_unproven:
                tracked.weigh_class(of_one)

    def _take_turns(
        self, rows: list[_Row], due: list[int], since: Callable[[TrackedObject], float]
    ) -> list[int]:
        """Indices of those of the rows that are due whose turn it is: who waits `since` longest."""
        looks: Counter[int] = Counter()
        turn: list[int] = []
        # By how long, not since when: streams have clocks of their own.
        waits_s = {index: abs(rows[index].frame.time_s - since(rows[index].tracked)) for index in due}
        for index in sorted(due, key=lambda index: -waits_s[index]):
            stream = id(rows[index].stream)
            if looks[stream] < MOST_LOOKS and looks.total() < self.config.most_looks:
                looks[stream] += 1
                turn.append(index)
        return turn

    def _search(self, rows: list[_Row]) -> None:
        """Glance at another place for objects that are away; end trials that had their time."""
        for row in rows:
            row.tracked.age_trial(row.frame.time_s)
        due = [index for index, row in enumerate(rows) if _is_searched(row, self.config.return_iou)]
        for index in self._take_turns(rows, due, lambda tracked: tracked.search.glanced_at_s):
            self._glance(rows[index], rows)

    def _glance(self, row: _Row, rows: list[_Row]) -> None:
        """Look where an object may be that is away, and begin to follow what is like it.

        What is found is on trial: followed without being shown until the looks at it have told what it is.
        """
        tracked, frame, bank = row.tracked, row.frame, row.tracked.bank
        # From glance to glance another of the pictures that show it best.
        known = bank.lasting_slots
        slot = known[tracked.search.glances % len(known)]
        prototypes = self.pool.prototypes[bank.row, slot].expand(1, READOUT_SLOTS, -1, -1)
        affinity = self.runtime.read_affinity(frame.features.keys, prototypes)[0, 0].numpy()
        assert row.read is not None, "known once the row is read back"
        taken = _taken(row, rows)
        # Nor where its memory finds something else; but that may reach over to the object.
        doubted = row.read.mask_logits > 0 if row.found_area else np.zeros_like(taken)
        point = tracked.search.choose_point(affinity, taken | doubted, frame.time_s)
        if point is None:
            return
        at = (point[0] * frame.width_px, point[1] * frame.height_px)
        decoded = self._decode_points(frame, [at], [1], None)
        read = _describe(self.runtime.read_back(decoded)())[0]
        mask = read.mask_logits > 0
        is_taken = (mask & taken).sum() > TAKEN_SHARE * mask.sum()
        if is_taken or not self._is_like(row, read):
            tracked.search.reject(point, mask, frame.time_s)
            return
        place = bank.begin_trial(read.found_area, frame.time_s)
        is_prompted = torch.zeros(1, dtype=torch.bool, device=self.runtime.device)
        self._write([place], frame.features, decoded, is_prompted)
        tracked.search.trial = Trial(point=point, mask=mask, from_s=frame.time_s)
        tracked.forget_found()

    def _is_like(self, row: _Row, read: Readback) -> bool:
        """Whether what a glance found is surely like the object."""
        assert row.pixels is not None
        least = max(LEAST_AREA, WHOLE_SHARE * row.tracked.bank.area)
        if read.found_area < least or read.predicted_iou < self.config.return_iou:
            return False
        device = self.runtime.device
        (mask_logits,) = upload(device, main_parts(read.mask_logits)[None])
        token = torch.zeros(1, self.network.d_model, device=device)
        seen = self.runtime.recognise(token, _stack_pixels([row.pixels], device), mask_logits)
        return row.tracked.gallery.compare(seen.descriptor[0].numpy()) >= ALIKE

    @torch.inference_mode()
    def prompt(self, stream: StreamState, prompt: Prompt) -> PromptOutcome:
        """Add, refine or replace an object on a kept frame.

        On a frame of the past the object's memory is rolled back to it, and `catch_up` brings the object to
        the present. What was said of the frames in between is not taken back.

        Raises:
            FrameNotKeptError: the frame is no longer kept.
            InvalidPromptError: the prompt says nothing.
            CapacityError: no object more fits.
        """
        frame = stream.find_kept(prompt.frame_id)
        tracked = stream.objects.get(prompt.object_id)
        # A correction on a frame before the object's first one begins it anew there.
        is_new = (
            tracked is None
            or prompt.mode is PromptMode.REPLACE
            or frame.frame_id < tracked.conditioning_frame
        )
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
        self._remember_prompt(tracked, frame, decoded, is_new=is_new)
        masklet = self._masklet(tracked, _describe(self.runtime.read_back(decoded)())[0], frame)
        tracked.behind = stream.way_from(frame)
        tracked.missed = 0
        return PromptOutcome(frame_id=frame.frame_id, masklet=masklet)

    def pin(self, stream: StreamState, frame_id: int) -> int:
        """Keep a frame for prompts until another one is pinned; returns the frame, the nearest kept one.

        Raises:
            FrameNotKeptError: the frame is no longer kept.
        """
        stream.pinned = stream.find_kept(frame_id)
        stream.pinned_as = frame_id
        stream.forget_gone()
        return stream.pinned.frame_id

    def _encode(
        self, streams: list[StreamState], pictures: list[Picture]
    ) -> tuple[list[KeptFrame], _Ahead | None]:
        """Encode the pictures as one batch, each once, and keep their features.

        Returns:
            the frames, and what was encoded ahead, of these or of other pictures.
        """
        ahead, self._ahead = self._ahead, None
        encoded = {} if ahead is None else ahead.frames
        missing = {id(picture): picture for picture in pictures if id(picture) not in encoded}
        encoded = encoded | self._encode_each(list(missing.values()))
        frames = [encoded[id(picture)] for picture in pictures]
        for stream, frame in zip(streams, frames, strict=True):
            stream.kept.append(frame)
            while len(stream.kept) > self._most_kept(frame):
                stream.kept.popleft()
            stream.forget_gone()
        return frames, ahead

    def _encode_ahead(self, pictures: list[Picture]) -> None:
        """Encode what the next tick is going to ask for."""
        if pictures:
            began_ns, clock = time.perf_counter_ns(), self.runtime.start_clock()
            frames = self._encode_each(pictures)
            clock.lap("encode_image")
            self._ahead = _Ahead(pictures, frames, began_ns, clock)

    def _encode_each(self, pictures: list[Picture]) -> dict[int, KeptFrame]:
        """Frames of distinct pictures by their id, encoded as one batch."""
        if not pictures:
            return {}
        pixels = _stack_pixels([picture.pixels for picture in pictures], self.runtime.device)
        features = self.runtime.encode_image(pixels)
        # From a GPU this begins a copy; the masks' readback waits for it too, before anyone reads it.
        summaries = features.embedding.mean(dim=(2, 3)).float().to("cpu", non_blocking=True).numpy()
        return {
            id(picture): KeptFrame(
                frame_id=picture.frame_id,
                width_px=picture.width_px,
                height_px=picture.height_px,
                time_s=picture.time_s,
                is_trusted=picture.is_trusted,
                features=ImageFeatures(*(maps[index : index + 1] for maps in features)),
                summary=summaries[index],
            )
            for index, picture in enumerate(pictures)
        }

    def _most_kept(self, frame: KeptFrame) -> int:
        frame_bytes = sum(maps.nbytes for maps in frame.features)
        return max(1, min(self.config.most_kept_frames, self.config.kept_bytes // frame_bytes))

    def _decode_prompt(
        self, tracked: TrackedObject, prompt: Prompt, frame: KeptFrame, *, is_new: bool
    ) -> Decoded:
        if prompt.mask is not None:
            decoded = self._decode_mask_prompt(prompt.mask, frame)
            tracked.points, tracked.labels, tracked.prompted_frame = [], [], frame.frame_id
            return decoded
        is_same_frame = not is_new and tracked.prompted_frame == frame.frame_id
        collected = 2 if prompt.box is not None else len(tracked.points) * is_same_frame
        if collected + len(prompt.points) > MOST_POINTS:
            raise InvalidPromptError(
                f"object {prompt.object_id}: {collected} points on frame {frame.frame_id} and "
                f"{len(prompt.points)} more: expected at most {MOST_POINTS}; replace the object or prompt on "
                "another frame"
            )
        if not is_same_frame:
            tracked.points, tracked.labels = [], []
        tracked.prompted_frame = frame.frame_id
        points, labels = list(prompt.points), list(prompt.labels)
        if prompt.box is not None:
            # SAM 2 reads a box as two points of their own labels, before all others.
            tracked.points, tracked.labels = [prompt.box[:2], prompt.box[2:]], [2, 3]
        tracked.points += points
        tracked.labels += labels
        if not tracked.points:
            raise InvalidPromptError(f"object {prompt.object_id}: a prompt needs a point, a box or a mask")
        earlier = None if is_new else tracked.past.get(frame.frame_id)
        return self._decode_points(frame, tracked.points, tracked.labels, earlier)

    def _decode_points(
        self, frame: KeptFrame, points: list[tuple[float, float]], labels: list[int], earlier: Past | None
    ) -> Decoded:
        """Masks of points (x, y) in pixels of the source; `earlier` is the mask that they correct."""
        size = self.network.mask_size
        mask_prompt = torch.zeros(1, 1, size, size)
        if earlier is not None:
            mask_prompt[0, 0] = torch.from_numpy(earlier.mask_logits).clamp(-LOGIT_CLAMP, LOGIT_CLAMP)
        scale = self.network.input_size_px / np.array([frame.width_px, frame.height_px])
        return self.runtime.decode_prompt(
            self.runtime.without_memory(frame.features.embedding),
            frame.features,
            PromptTensors(
                points=torch.from_numpy(np.array(points) * scale).float().unsqueeze(0),
                labels=torch.tensor([labels]),
                mask=mask_prompt,
                has_mask=torch.tensor([earlier is not None]),
            ),
            torch.tensor([len(points) <= 1]),
        )

    def _decode_mask_prompt(self, mask: np.ndarray, frame: KeptFrame) -> Decoded:
        """A mask prompt is its own mask; the decoder makes only the pointer, from raw features (as SAM 2)."""
        size = self.network.input_size_px
        full = _reduce(torch.from_numpy(mask.astype(np.float32)).expand(1, 1, -1, -1), size)
        full = (full >= 0.5).float()
        if not full.any():
            raise InvalidPromptError(
                f"the mask vanishes at the model's input size, {size}x{size}: mark a larger area, or a point"
            )
        decoded = self.runtime.decode_prompt(
            frame.features.embedding,
            frame.features,
            PromptTensors(
                points=torch.zeros(1, 1, 2),
                labels=torch.tensor([[-1]]),
                mask=self.runtime.downsample_mask(full),
                has_mask=torch.tensor([True]),
            ),
            torch.tensor([False]),
        )
        return decoded._replace(
            mask_logits=_reduce(full * 20.0 - 10.0, self.network.mask_size)[:, 0],
            predicted_iou=torch.ones(1),
            presence_logit=torch.full((1,), 10.0),
        )

    def _remember_prompt(
        self, tracked: TrackedObject, frame: KeptFrame, decoded: Decoded, *, is_new: bool
    ) -> None:
        bank = tracked.bank
        area = mask_area(decoded.mask_logits[0].cpu().numpy())
        if is_new or frame.frame_id == tracked.conditioning_frame:
            # What was remembered since was seen with the mask that is being corrected.
            tracked.conditioning_frame = frame.frame_id
            slot = bank.condition(frame.summary, area)
        else:
            earlier = tracked.past.get(frame.frame_id)
            bank.roll_back(frame.time_s, None if earlier is None else earlier.bank_frame)
            slot = bank.correct(area, frame.time_s)
        place = bank.place(slot, frame.time_s)
        self._write([place], frame.features, decoded, torch.tensor([True]))
        # Masks that were seen since with a memory that is gone are no start for further corrections.
        tracked.past = {
            known: past for known, past in tracked.past.items() if not is_new and known < frame.frame_id
        }
        if is_new:
            tracked.class_evidence = None
        tracked.believe(frame.time_s)

    def _masklet(
        self, tracked: TrackedObject, read: Readback, frame: KeptFrame, *, can_look: bool = True
    ) -> Masklet:
        """The masklet of an object on a frame; moves the object's state.

        Args:
            can_look: the picture is at hand, so that what is found can be looked at.
        """
        state = tracked.observe(read, frame.time_s, self.config, can_look=can_look)
        is_present = read.presence_logit > 0 and not tracked.is_unproven
        logits = read.mask_logits if is_present else np.full_like(read.mask_logits, ABSENT_DISPLAY_LOGIT)
        # Where something else may be found, neither its mask nor none is a start for a correction.
        if read.found_area == 0 or not tracked.is_unproven:
            tracked.past[frame.frame_id] = Past(logits, tracked.bank.frame)
        name, probability = tracked.name_class(self.network.classes)
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


def _describe(decoded: Decoded) -> list[Readback]:
    """What the reply needs of each row.

    Args:
        decoded: on the host.
    """
    masks = decoded.mask_logits.numpy()
    ious, presence = decoded.predicted_iou.tolist(), decoded.presence_logit.tolist()
    return [
        Readback(
            mask_logits=mask,
            predicted_iou=iou,
            presence_logit=present,
            found_area=mask_area(mask) if present > 0 else 0,
        )
        for mask, iou, present in zip(masks, ious, presence, strict=True)
    ]


def _find_rivals(rows: list[_Row]) -> BoolArray:
    """Which rows yield to which where masks overlap, bool [B, B]; see `masks.settle_overlaps`.

    Objects of one stream on one frame are different things. What is lost or doubted, and found nevertheless,
    may be another object and takes nothing from it. SAM 2's predictor lets masks overlap, and `vanilla`
    follows it.
    """
    streams, frames = (
        np.array([id(of_row) for of_row in each])
        for each in zip(*((row.stream, row.frame) for row in rows), strict=True)
    )
    yields = np.array([row.stream.bank.policy is not MemoryPolicy.VANILLA for row in rows])
    claims = np.array([row.tracked.is_certain for row in rows])
    is_other = ~np.eye(len(rows), dtype=np.bool_)
    is_beside = (streams[:, None] == streams) & (frames[:, None] == frames) & is_other
    are_rivals: BoolArray = is_beside & yields[:, None] & claims
    return are_rivals


def _is_searched(row: _Row, return_iou: float) -> bool:
    """Whether an object is away that is known well enough to be told from others, and nothing is on trial."""
    tracked, time_s = row.tracked, row.frame.time_s
    assert row.masklet is not None, "known once the row is read back"
    is_alike = tracked.likeness is None or tracked.likeness >= ALIKE
    # What its memory found was looked at meanwhile, or is going to be.
    is_about_to_return = row.found_area > 0 and is_alike and row.masklet.predicted_iou >= return_iou
    return (
        row.pixels is not None
        and row.frame.is_trusted
        and row.masklet.state is not ObjectState.VISIBLE
        and tracked.bank.config.policy is not MemoryPolicy.VANILLA
        and tracked.was_away
        and tracked.gallery.is_begun
        and tracked.search.trial is None
        and not is_about_to_return
        and abs(time_s - tracked.search.glanced_at_s) >= GLANCE_INTERVAL_S
    )


def _taken(row: _Row, rows: list[_Row]) -> BoolArray:
    """Where an object that is away cannot be, bool [h, w]: where others of its stream are or may be."""
    masks = [
        each.read.mask_logits > 0
        for each in rows
        if each.read is not None
        and each.found_area
        and each is not row
        and each.stream is row.stream
        and each.frame is row.frame
        and (each.tracked.is_certain or each.tracked.search.trial is not None)
    ]
    assert row.read is not None, "known once the row is read back"
    taken = np.zeros(row.read.mask_logits.shape, np.bool_)
    for mask in masks:
        taken |= mask
    return taken


def _rows(stream: StreamState, frame: KeptFrame, pixels: UInt8Array) -> list[_Row]:
    """A row for every object of the stream that has reached the present."""
    rows = []
    for tracked in stream.objects.values():
        if tracked.behind:
            tracked.missed += 1
            continue
        rows.append(
            _Row(stream=stream, tracked=tracked, frame=frame, frames=1 + tracked.missed, pixels=pixels)
        )
        tracked.missed = 0
    return rows


def _rows_behind(streams: list[StreamState]) -> list[_Row]:
    """A row for every object that has not reached the present, on the next frame of its way."""
    rows = []
    for stream in streams:
        for tracked in stream.objects.values():
            if tracked.behind:
                frame, frames = tracked.behind.popleft()
                rows.append(_Row(stream=stream, tracked=tracked, frame=frame, frames=frames))
    return rows


def _reduce(maps: Tensor, size: int) -> Tensor:
    """Bilinear with antialiasing, as SAM 2 reduces a mask prompt; [1, 1, H, W] to [1, 1, size, size]."""
    return torch.nn.functional.interpolate(
        maps, (size, size), mode="bilinear", align_corners=False, antialias=True
    )


def _stack_pixels(pictures: list[UInt8Array], device: torch.device) -> Tensor:
    """Pictures as one batch on the host, whence a GPU copies them while the host goes on."""
    shape = (len(pictures), *pictures[0].shape)
    stacked = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.stack(pictures, out=stacked.numpy())
    return stacked


def _stack(features: list[ImageFeatures]) -> ImageFeatures:
    """Features of one picture per object, as one batch; no copy for a single object."""
    if len(features) == 1:
        return features[0]
    return ImageFeatures(*(torch.cat(maps) for maps in zip(*features, strict=True)))
