"""An object that is tracked, the stream it belongs to, and whether what is found is the object.

A look-alike must not inherit an identity: what is followed without a break is believed, what was lost or lies
elsewhere all at once must look like the object first.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from trocar_engines.errors import FrameNotKeptError
from trocar_engines.masklets import BoolArray, Float32Array, ObjectState
from trocar_engines.memory.bank import BankConfig, MemoryBank, MemoryPolicy
from trocar_engines.memory.gallery import Gallery
from trocar_engines.network.sam2s import ImageFeatures
from trocar_engines.search import Search

MOST_CATCH_UP_FRAMES = 8
"""Kept frames through which an object prompted in the past is brought to the present, evenly spaced."""
CLASS_MEMORY = 0.8
"""Share of the past in what is known of an object's class, at each look."""
CLASS_FLOOR = 1e-3
"""Added to probabilities before their logarithm: one look that is sure of a mistake rules nothing out."""
CLASS_SHARPNESS = 2.0
"""Several looks that agree are surer than their mean. With it probabilities are right to 0.01 to 0.05 on 24
short LongSim clips, by prompt; with 1.5 to 0.03 to 0.06."""
LEAST_CLASS_PROBABILITY = 0.5
"""Below it a class is "unknown"."""
NEAR = 0.08
"""A mask that lies farther, in sides of the picture, from where the object showed last has jumped there."""
LIKENESS_MEMORY = 0.5
"""Share of the past in how much what is found is like the object, at each look."""
ALIKE = 0.8
"""Likeness, see `Gallery.compare`, from which on what was lost is taken back, what a glance found is
followed, and a view joins the gallery: what joins it widens what is believed."""
UNLIKE, STILL_ALIKE = 0.5, 0.7
"""Likeness below which what is followed is doubted: of what was never away only where its mask is not sound
either, of what was found again in any case, for then it may be another thing from the first."""
CONTINUOUS = 0.65
"""Cosine to the most alike of an object's last looks. Below it, and with a mask that is not sound, something
else may have taken its place: an object changes little from look to look (LongSim dev: 5% of 963 looks lie
below 0.62), a mask that slips onto a neighbour as its object leaves does so all at once (9 of 13 below 0.66).
When it was chosen it made 67.4 of 61.2 J&F on all frames there, 72.1 of 71.5 on those with the object."""
LAST_LOOKS = 3
"""So many looks back continuity is judged."""
TRIAL_IOU = 0.4
"""Predicted IoU that is asked of what is on trial: from another side masks are better than they are sure."""
ENOUGH_VIEWS = 12
"""Views from which on a change is news: an object of which few are known shows new ones."""
SOUND_IOU = 0.7
"""A mask of such a predicted IoU that is followed without a break is believed whatever it looks like, until
its object was away."""
UNKNOWN_CLASS = "unknown"


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """When an object is lost, and what is asked of what is found then.

    Args:
        lost_after_s: an object absent for longer is LOST rather than OCCLUDED.
        return_iou: a LOST object is taken back only with a mask of at least this predicted IoU, 0 to 1.
        look_interval_s: an object that shows is looked at so often for kind and appearance, after the reply.
    """

    lost_after_s: float = 2.0
    return_iou: float = 0.5
    look_interval_s: float = 0.2

    @property
    def notice_s(self) -> float:
        """Time until a change is noticed: two looks."""
        return 2 * self.look_interval_s


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptFrame:
    """A recent frame that a prompt may name.

    Args:
        frame_id: the client's number; `width_px` and `height_px` are the source picture's.
        time_s: its presentation time.
        is_trusted: False after a gap in the video.
        features: of one picture, B = 1.
        summary: float32 [C] pooled features.
    """

    frame_id: int
    width_px: int
    height_px: int
    time_s: float
    is_trusted: bool
    features: ImageFeatures
    summary: Float32Array


class Past(NamedTuple):
    """What is known of an object on a kept frame: a correction there starts from it.

    Args:
        mask_logits: float32 [h, w].
        bank_frame: the bank's count of frames then.
    """

    mask_logits: Float32Array
    bank_frame: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Readback:
    """What the network says of one row; `found_area` in points of the mask, 0 where the object is absent."""

    mask_logits: Float32Array
    predicted_iou: float
    presence_logit: float
    found_area: int


@dataclass(kw_only=True, eq=False)
class TrackedObject:
    """One object of one stream: its memory, its looks, and what the last frames said of it.

    Args:
        prompted_frame: of the latest prompt; `points` and `labels` were collected on it, in source pixels.
        conditioning_frame: where the object begins.
        past: by frame id, oldest first.
        behind: kept frames that it still has to pass through to reach the present, each with the number of
            frames since the one before; it has no masklets meanwhile.
        missed: frames that came meanwhile.
        is_doubted: what was found last is not believed to be the object; it is not shown, and forgotten
            unless later looks speak for it.
        is_lost: on the last frame it had not been seen for long.
        was_away: it was out of sight or doubted since a person pointed at it.
        doubted_from_s: what was remembered from then on may be of another thing.
        class_evidence: running mean of the log probabilities of what the object looked like, float32 [K];
            None until then.
        gallery: what the object looked like.
        search: for it elsewhere in the picture, while it is away.
        place: bool [h, w], the mask with which it showed last; None before.
        likeness: of what is found now to the object's gallery, a running mean over the looks at it; None
            before the first.
        last_looks: descriptors of what was seen at the last looks, float32 [D] each.
        has_changed: all at once it looked like another thing, and has not proven itself since.
        looked_at_s: when it was looked at last; `found_at_s`, when anything was found last, and
            `prompted_at_s`, the time of the latest prompted frame.
    """

    object_id: int
    bank: MemoryBank
    prompted_frame: int
    conditioning_frame: int
    points: list[tuple[float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    past: dict[int, Past] = field(default_factory=dict)
    behind: deque[tuple[KeptFrame, int]] = field(default_factory=deque)
    missed: int = 0
    is_doubted: bool = False
    is_lost: bool = False
    was_away: bool = False
    doubted_from_s: float = math.inf
    seen_at_s: float = 0.0
    frames_since_seen: int = 0
    class_evidence: Float32Array | None = None
    gallery: Gallery = field(default_factory=Gallery)
    search: Search = field(default_factory=Search)
    place: BoolArray | None = None
    likeness: float | None = None
    last_looks: deque[Float32Array] = field(default_factory=lambda: deque(maxlen=LAST_LOOKS))
    has_changed: bool = False
    looked_at_s: float = -math.inf
    found_at_s: float = -math.inf
    prompted_at_s: float = -math.inf

    @property
    def is_unproven(self) -> bool:
        """Whether what is found is not shown, for it may be another thing."""
        return self.is_doubted or self.search.trial is not None

    @property
    def is_certain(self) -> bool:
        """Whether what is found is taken for the object without a proof."""
        return not (self.is_unproven or self.is_lost or self.has_changed)

    @property
    def class_probabilities(self) -> Float32Array | None:
        """What kind of object it is, float32 [K]; None until it was looked at."""
        return None if self.class_evidence is None else _softmax(CLASS_SHARPNESS * self.class_evidence)

    def forget_found(self) -> None:
        """What is found next may be another thing."""
        self.likeness, self.looked_at_s = None, -math.inf
        self.last_looks.clear()

    def believe(self, time_s: float) -> None:
        """A person pointed at it: it is not lost, and they know better than what was remembered of its looks.

        Args:
            time_s: of the prompted frame.
        """
        self.gallery, self.search = Gallery(), Search()
        self.prompted_at_s = self.seen_at_s = time_s
        self.is_doubted = self.was_away = self.has_changed = False
        self.place = None
        self.forget_found()

    def look(self, descriptor: Float32Array, *, is_sound: bool) -> None:
        """Weigh how much what is found is like the object, and remember views that surely are its own.

        Until it was away for the first time, what is followed soundly is the object, however it changes.

        Args:
            descriptor: float32 [D], a unit vector, see `appearance.AppearanceHead`.
            is_sound: the mask is as good as `SOUND_IOU`.
        """
        continuity = max((float(last @ descriptor) for last in self.last_looks), default=1.0)
        if continuity < CONTINUOUS and not is_sound and len(self.gallery.views) >= ENOUGH_VIEWS:
            self.last_looks.clear()
            self.likeness, self.has_changed = None, True
        self.last_looks.append(descriptor)
        if not self.gallery.is_begun and not self.is_unproven and not self.has_changed:
            self.gallery.add(descriptor)
            return
        if not self.gallery.views:
            return
        likeness = self.gallery.compare(descriptor)
        past = likeness if self.likeness is None else self.likeness
        self.likeness = LIKENESS_MEMORY * past + (1 - LIKENESS_MEMORY) * likeness
        is_own = likeness >= ALIKE or (is_sound and not self.was_away and not self.has_changed)
        if is_own and not self.is_unproven:
            self.gallery.add(descriptor)

    def weigh_class(self, class_logits: Float32Array) -> None:
        """Add what a look said of its kind, float32 [K]."""
        evidence = np.log(_softmax(class_logits) + CLASS_FLOOR)
        past = evidence if self.class_evidence is None else self.class_evidence
        self.class_evidence = CLASS_MEMORY * past + (1 - CLASS_MEMORY) * evidence

    def name_class(self, classes: tuple[str, ...]) -> tuple[str, float]:
        """The most probable of the classes and its probability; "unknown" when nothing is probable."""
        probabilities = self.class_probabilities
        if probabilities is None:
            return UNKNOWN_CLASS, 0.0
        best = int(probabilities.argmax())
        probability = float(probabilities[best])
        return classes[best] if probability >= LEAST_CLASS_PROBABILITY else UNKNOWN_CLASS, probability

    def age_trial(self, time_s: float) -> None:
        """A frame has passed. What is on trial when its time is over is not the object: it is forgotten.

        Args:
            time_s: of the frame.
        """
        trial = self.search.trial
        if trial is None:
            return
        trial.frames += 1
        if not trial.is_over(time_s):
            return
        self.bank.drop_trial()
        self.search.reject(trial.point, trial.mask, time_s)
        self.search.trial = None
        self.forget_found()

    def observe(
        self, read: Readback, time_s: float, config: IdentityConfig, *, can_look: bool
    ) -> ObjectState:
        """Take in what was found on a frame: whether it is the object, and what that makes of it.

        Doubt begins where what was followed is not recognised, and ends where something is; a flicker does
        not end it.

        Args:
            read: what the network says.
            time_s: of the frame.
            config: what is asked.
            can_look: the picture is at hand, so that what is found can be looked at.
        """
        is_found = read.found_area > 0
        is_lost = time_s - self.seen_at_s > config.lost_after_s
        if is_found:
            self.found_at_s = time_s
        elif abs(time_s - self.found_at_s) > config.notice_s:
            # Longer than a flicker.
            self.was_away = True
            self.forget_found()
        mask = read.mask_logits > 0
        has_jumped = is_found and self.place is not None and _is_apart(mask, self.place)
        if has_jumped and not self.is_unproven:
            self.forget_found()
        must_prove = (is_lost or self.is_unproven or has_jumped or self.has_changed) and can_look
        is_recognised = is_found and self._is_recognised(read, config.return_iou, must_prove=must_prove)
        if is_recognised:
            if self.search.trial is not None:
                self._win_trial()
            self.has_changed = self.is_doubted = False
        elif is_found and not self.is_unproven:
            self.is_doubted = self.was_away = True
            # What a person said stays.
            self.doubted_from_s = max(time_s - config.notice_s, math.nextafter(self.prompted_at_s, math.inf))
        is_news = is_lost and not self.is_lost
        self.is_lost = is_lost
        if is_lost:
            self.was_away = True
        if self.is_doubted and is_news and self.doubted_from_s <= time_s:
            self.bank.roll_back(self.doubted_from_s, self.bank.frame)
        if is_recognised:
            self.seen_at_s, self.frames_since_seen, self.place = time_s, 0, mask
            return ObjectState.VISIBLE
        self.frames_since_seen += 1
        return ObjectState.LOST if is_lost else ObjectState.OCCLUDED

    def _win_trial(self) -> None:
        """What was on trial is the object, and what was doubted is not."""
        if self.is_doubted:
            self.bank.roll_back(self.doubted_from_s, self.bank.frame)
        self.bank.keep_trial()
        self.search.trial = None

    def _is_recognised(self, read: Readback, return_iou: float, *, must_prove: bool) -> bool:
        """Whether what is found is the object: a look-alike must not inherit an identity.

        What is followed without a break is believed unless it is neither sound nor like the object, or was
        found again and is not like it. What is taken for a lost object, or lies elsewhere all at once, must
        prove itself: its mask must look sound, and it must look like the object. Its class says nothing: it
        is wrong more often than the looks are (four sets of LongSim dev without asking it: J&F 71.5 instead
        of 69.8 on frames that show the object, 12 instead of 11 of 16 returns found).

        Args:
            read: what was found.
            return_iou: predicted IoU, 0 to 1, that is asked of what must prove itself.
            must_prove: it is not believed for being followed.
        """
        if self.bank.config.policy is MemoryPolicy.VANILLA:
            return True
        if not must_prove:
            if self.likeness is None:
                return True
            if self.was_away:
                return self.likeness >= STILL_ALIKE
            return read.predicted_iou >= SOUND_IOU or self.likeness >= UNLIKE
        if read.predicted_iou < (TRIAL_IOU if self.search.trial else return_iou):
            return False
        # Looked at after the reply; until then the next frames wait.
        return not self.gallery.views or (self.likeness is not None and self.likeness >= ALIKE)


@dataclass(kw_only=True, eq=False)
class StreamState:
    """What a tracker keeps for one stream.

    Args:
        bank: memory settings of its objects.
        most_objects: limit of the stream.
        kept: recent frames, oldest first.
        pinned: one frame more, kept until another is pinned, and the id under which the client asked for it.
    """

    bank: BankConfig
    most_objects: int
    objects: dict[int, TrackedObject] = field(default_factory=dict)
    kept: deque[KeptFrame] = field(default_factory=deque)
    pinned: KeptFrame | None = None
    pinned_as: int | None = None

    @property
    def is_behind(self) -> bool:
        """Whether an object prompted in the past has not reached the present yet."""
        return any(tracked.behind for tracked in self.objects.values())

    def forget_gone(self) -> None:
        """Let go of what is known of frames that are no longer kept.

        Not only of the frame that left last: an object may come past one that left while it caught up.
        """
        oldest, pinned = self.kept[0].frame_id, None if self.pinned is None else self.pinned.frame_id
        for tracked in self.objects.values():
            gone = [known for known in tracked.past if known < oldest and known != pinned]
            for frame_id in gone:
                del tracked.past[frame_id]

    def find_kept(self, frame_id: int) -> KeptFrame:
        """The kept frame nearest to `frame_id`: a dropped frame's neighbour stands in for it.

        Raises:
            FrameNotKeptError: it is older than all of them, and not pinned.
        """
        if self.pinned is not None and frame_id == self.pinned.frame_id:
            return self.pinned
        if not self.kept:
            raise FrameNotKeptError(f"frame {frame_id}: no frame has been tracked yet; send one first")
        oldest, latest = self.kept[0].frame_id, self.kept[-1].frame_id
        if frame_id < oldest:
            if self.pinned is not None and frame_id == self.pinned_as:
                return self.pinned
            raise FrameNotKeptError(
                f"frame {frame_id} is no longer kept: frames {oldest} to {latest} are; prompt on a newer one"
            )
        return min(self.kept, key=lambda frame: abs(frame.frame_id - frame_id))

    def way_from(self, frame: KeptFrame) -> deque[tuple[KeptFrame, int]]:
        """Evenly spaced kept frames from the one after `frame` to the newest, and the distances between."""
        later = [kept for kept in self.kept if kept.frame_id > frame.frame_id]
        count = min(MOST_CATCH_UP_FRAMES, len(later))
        stops = [round((stop + 1) * len(later) / count) for stop in range(count)]
        return deque(
            (later[stop - 1], stop - before) for before, stop in zip([0, *stops], stops, strict=False)
        )


def _is_apart(mask: BoolArray, place: BoolArray) -> bool:
    """Whether no point of a mask [h, w] lies on another one or `NEAR` it, in either direction."""
    if (mask & place).any():  # mostly
        return False
    side = 2 * round(NEAR * mask.shape[1]) + 1
    around = cv2.dilate(place.astype(np.uint8), np.ones((side, side), np.uint8))
    return not around[mask].any()


def _softmax(logits: Float32Array) -> Float32Array:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum(), dtype=np.float32)
