"""Several configurations of the tracker as rows of one pass: every frame is read and encoded once for all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

from trocar.masklet_codec import find_box, mask_from_logits
from trocar_bench.davis import EvaluationClip
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import BoolArray, FrameMasklets, Picture, Prompt, PromptOutcome
from trocar_engines.memory.bank import BankConfig
from trocar_engines.preprocess import resize_to_model
from trocar_engines.tracked import StreamState
from trocar_engines.tracker import Step
from trocar_engines.training.clicks import next_click

CLICKS = {"click1": 1, "click3": 3, "click5": 5}
"""The first at the point farthest from the edge, each further one in the largest region that is wrong."""
PROMPTS = (*CLICKS, "box", "mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One configuration.

    Args:
        policy: of the memory.
        ablation: what is changed of it, as the user wrote it; "" for nothing.
        prompt: one of `PROMPTS`.
        bank: of every object.
    """

    policy: str
    ablation: str
    prompt: str
    bank: BankConfig

    @property
    def name(self) -> str:
        """As tables call it."""
        return " ".join(part for part in (self.policy, self.ablation, self.prompt) if part)


class RowTracker(Protocol):
    """What is asked of a `tracker.Tracker`."""

    def open_stream(self, bank: BankConfig, most_objects: int) -> StreamState:
        """See `Tracker.open_stream`."""

    def close_stream(self, stream: StreamState) -> None:
        """See `Tracker.close_stream`."""

    def step(self, streams: list[StreamState], pictures: list[Picture]) -> Step:
        """See `Tracker.step`."""

    def remember(self, step: Step) -> None:
        """See `Tracker.remember`."""

    def prompt(self, stream: StreamState, prompt: Prompt) -> PromptOutcome:
        """See `Tracker.prompt`."""


def change_bank(bank: BankConfig, ablation: str, most_recent_slots: int) -> BankConfig:
    """A bank with some settings changed.

    Args:
        bank: to begin with.
        ablation: "field=value,field=value"; "" changes nothing.
        most_recent_slots: of which the network can tell the age.

    Raises:
        TrocarError: no such field, or no such value.
    """
    known = {field.name: type(getattr(bank, field.name)) for field in fields(bank) if field.name != "policy"}
    changes: dict[str, object] = {}
    for part in filter(None, ablation.split(",")):
        name, _, text = part.partition("=")
        if name not in known:
            raise TrocarError(f"--ablate {part}: expected FIELD=VALUE with a FIELD of {', '.join(known)}")
        try:
            changes[name] = known[name](text)
        except ValueError:
            raise TrocarError(f"--ablate {part}: {text!r} is no {known[name].__name__}") from None
    changed = replace(bank, **changes)  # type: ignore[arg-type]
    if not 1 <= changed.recent_slots <= most_recent_slots:
        raise TrocarError(
            f"--ablate {ablation}: recent_slots {changed.recent_slots}, expected 1 to {most_recent_slots}"
        )
    if min(changed.long_term_slots, changed.correction_slots) < 0 or changed.candidate_run < 1:
        raise TrocarError(f"--ablate {ablation}: slots must not be negative, candidate_run at least 1")
    return changed


def track_rows(
    tracker: RowTracker, rows: Sequence[Row], clip: EvaluationClip, input_size_px: int, frame_rate_hz: float
) -> Iterator[list[FrameMasklets]]:
    """What every row says of each frame in order, of the objects that were prompted before it.

    Args:
        tracker: with memory for every object of every row.
        rows: to track with.
        clip: to read.
        input_size_px: of the model.
        frame_rate_hz: the clock of the tracker's memory.

    Raises:
        TrocarError: a file cannot be read, or a prompt was refused.
    """
    streams = [tracker.open_stream(row.bank, len(clip.prompted_frames)) for row in rows]
    try:
        for index in range(len(clip.frames)):
            picture = Picture(
                frame_id=index,
                pixels=resize_to_model(clip.read_rgb(index), input_size_px),
                width_px=clip.width_px,
                height_px=clip.height_px,
                time_s=index / frame_rate_hz,
            )
            step = tracker.step(streams, [picture] * len(streams))
            tracker.remember(step)
            for object_id, truth in clip.new_objects(index):
                for stream, row in zip(streams, rows, strict=True):
                    try:
                        _prompt_object(tracker, stream, index, object_id, truth, row.prompt)
                    except TrocarError as error:
                        raise TrocarError(f"{clip.masks[index]}: object {object_id}: {error}") from error
            yield step.results
    finally:
        for stream in streams:
            tracker.close_stream(stream)


def _prompt_object(
    tracker: RowTracker, stream: StreamState, frame_id: int, object_id: int, truth: BoolArray, prompt: str
) -> None:
    if prompt == "mask":
        tracker.prompt(stream, Prompt(object_id=object_id, frame_id=frame_id, mask=truth))
        return
    if prompt == "box":
        tracker.prompt(stream, Prompt(object_id=object_id, frame_id=frame_id, box=find_box(truth)))
        return
    height_px, width_px = truth.shape
    predicted: BoolArray | None = None
    for _ in range(CLICKS[prompt]):
        point, label = next_click(truth, predicted)
        click = Prompt(object_id=object_id, frame_id=frame_id, points=(point,), labels=(label,))
        outcome = tracker.prompt(stream, click)
        predicted = mask_from_logits(outcome.masklet.mask_logits, width_px, height_px)
