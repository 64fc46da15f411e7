"""What the network side asks of the model side; `trocar_engines.scheduler` provides it, tests a fake."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from trocar_engines.masklets import FrameMasklets, Picture, Prompt, PromptOutcome, UInt8Array

Resize = Callable[[UInt8Array, int], UInt8Array]
"""uint8 [H, W, 3] RGB and a size S to uint8 [S, S, 3]."""


class ModelCard(Protocol):
    """Short description of a model."""

    @property
    def name(self) -> str:
        """Name to open it by."""

    @property
    def input_size_px(self) -> int:
        """Edge of the square that pictures are resized to."""

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights, hexadecimal."""

    @property
    def runtime(self) -> str:
        """What runs the network."""

    @property
    def classes(self) -> Sequence[str]:
        """Instrument classes; empty without a semantic head."""

    @property
    def policies(self) -> Sequence[str]:
        """Memory policies that it supports."""


class MemoryRows(Protocol):
    """Rows of one model's memory; an object owns one."""

    @property
    def in_use(self) -> int:
        """Rows owned by objects."""

    @property
    def total(self) -> int:
        """Rows in all."""


class TrackedStream(Protocol):
    """One video's objects; what is called first takes effect first."""

    @property
    def input_size_px(self) -> int:
        """Edge of the square that pictures are resized to."""

    def offer(self, picture: Picture) -> Future[FrameMasklets]:
        """Track one picture; on a live stream it takes the place of one that waits and has not begun."""

    def prompt(self, prompt: Prompt) -> Future[PromptOutcome]:
        """Apply a prompt; fails with InvalidPromptError, CapacityError or UnknownObjectError."""

    def pin(self, frame_id: int) -> Future[int]:
        """Keep a frame for prompts until another is pinned; fails with FrameNotKeptError."""

    def remove_object(self, object_id: int) -> Future[None]:
        """Forget an object; fails with UnknownObjectError."""

    def reset(self) -> Future[None]:
        """Forget all objects."""

    def close(self) -> None:
        """Free the memory rows at once and cancel what is pending."""


class Scheduler(Protocol):
    """The one owner of the device. Thread safe."""

    @property
    def model_names(self) -> Sequence[str]:
        """Models that can be opened."""

    @property
    def default_model(self) -> str:
        """Model for clients that name none."""

    @property
    def default_memory(self) -> str:
        """Memory policy for clients that name none."""

    @property
    def is_healthy(self) -> bool:
        """Whether the device answers."""

    @property
    def busy_s(self) -> float:
        """How long the device has been at the step that it is at; 0 when it is at none."""

    def memory_rows(self) -> Mapping[str, MemoryRows]:
        """Rows in use, for each loaded model."""

    def probe(self, model: str, timeout_s: float) -> None:
        """Run a blank picture through a loaded model; fails with TimeoutError or StreamLimitError."""

    def open_stream(
        self, *, model: str, memory: str | None, is_live: bool, max_objects: int
    ) -> TrackedStream:
        """Begin a video; fails with StreamLimitError or UnknownModelError."""

    def model_card(self, model: str) -> ModelCard:
        """Describe a model; fails with UnknownModelError."""

    def warm_up(self) -> None:
        """Load and run everything once; takes seconds."""

    def close(self) -> None:
        """Stop the worker and free the device."""
