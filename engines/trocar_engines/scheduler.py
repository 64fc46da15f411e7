"""One owner of the device: takes pictures and prompts of every stream, runs ticks, hands results back."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from trocar_engines.errors import DeviceFaultError, StreamLimitError, UnknownModelError
from trocar_engines.export import default_cache
from trocar_engines.masklets import FrameMasklets, Picture, Prompt, PromptOutcome
from trocar_engines.memory.bank import BankConfig, MemoryPolicy
from trocar_engines.models import (
    DEFAULT_MODEL,
    ModelCard,
    ModelEntry,
    bank_config,
    cpu_threads,
    load_network,
    model_card,
    model_entries,
    model_entry,
    set_torch_threads,
)
from trocar_engines.network.config import ConvTrunkConfig
from trocar_engines.plans import device_shapes, load_gpu_runtime
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.runtime.interface import Runtime
from trocar_engines.runtime.onnx import OnnxRuntime
from trocar_engines.runtime.openvino import OpenVinoRuntime, has_bfloat16
from trocar_engines.tracked import StreamState
from trocar_engines.tracker import Tracker, TrackerConfig

RUNTIMES = ("auto", "openvino", "onnx", "eager", "cuda", "tensorrt")
QUEUE_CAPACITY = 4
"""Pictures that may wait on a stream on which nothing is dropped; more is the caller's mistake."""
WARM_UP_FRAMES = 3
DEVICE_FAULTS = (torch.AcceleratorError, torch.OutOfMemoryError)
"""What a GPU that faults, vanishes or fills up raises, at whatever call comes next."""
DEVICE_FAILED = "the server's device failed and the server ends: connect again once it is restarted"
DEFAULT_MEMORY = MemoryPolicy.FIFO.value
Result = TypeVar("Result")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What to load and how much to admit.

    Args:
        model: the default model; others are loaded when a stream asks for them.
        runtime: one of `RUNTIMES`. "auto" takes a GPU where there is one, with those TensorRT plans that
            proved faster than captured graphs; else OpenVINO for a convolutional trunk on a CPU with
            bfloat16; else ONNX Runtime.
        memory: default memory policy.
        max_streams: streams at once.
        max_objects: objects of all streams together, per model.
        weights: a weights file for the default model instead of the installed one.
        cache: folder for exported engines.
        threads: for inference; 0 takes every core.
        is_compiled: torch may compile stages on a GPU, see `cuda.CudaRuntime`.
    """

    model: str = DEFAULT_MODEL
    runtime: str = "auto"
    memory: str = DEFAULT_MEMORY
    max_streams: int = 8
    max_objects: int = 64
    weights: Path | None = None
    cache: Path = field(default_factory=default_cache)
    threads: int = 0
    is_compiled: bool = False

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise UnknownModelError(f"runtime {self.runtime!r}: expected one of {', '.join(RUNTIMES)}")


@dataclass(kw_only=True, eq=False)
class _PictureTask:
    """A picture that waits; once the device works on it no newer one takes its place."""

    picture: Picture
    future: "Future[FrameMasklets]"
    offered_ns: int
    is_begun: bool = False


@dataclass(kw_only=True, eq=False)
class _Command(Generic[Result]):
    """A prompt, removal or reset; runs between ticks, in its stream's order."""

    run: Callable[[], Result]
    future: "Future[Result]"
    needs_frame: bool = False


class MemoryRows(NamedTuple):
    """Rows of one model's memory; an object owns one."""

    in_use: int
    total: int


class TrackedStream:
    """One stream's door to the scheduler; every method may be called from any thread.

    Pictures, prompts and removals take effect in the order of the calls.
    """

    def __init__(
        self,
        scheduler: "Scheduler",
        model: "LoadedModel",
        bank: BankConfig,
        *,
        is_live: bool,
        max_objects: int,
    ) -> None:
        self.input_size_px = model.entry.config.input_size_px
        self.is_live = is_live
        self.model = model
        self.state = model.tracker.open_stream(bank, max_objects)
        self.tasks: deque[_PictureTask | _Command[object]] = deque()
        self.is_closed = False
        self._scheduler = scheduler

    def offer(self, picture: Picture) -> "Future[FrameMasklets]":
        """Hand over a picture.

        On a live stream it replaces one that still waits and has not begun, whose future resolves at once as
        dropped.

        Raises:
            ValueError: more than `QUEUE_CAPACITY` pictures wait on a stream on which nothing is dropped.
        """
        future: Future[FrameMasklets] = Future()
        task = _PictureTask(picture=picture, future=future, offered_ns=time.perf_counter_ns())
        dropped = self._scheduler.enqueue_picture(self, task)
        if dropped is not None:
            frame_id = dropped.picture.frame_id
            _resolve(dropped.future, FrameMasklets(frame_id=frame_id, is_dropped=True))
        return future

    def prompt(self, prompt: Prompt) -> "Future[PromptOutcome]":
        """Add, refine or replace an object; the future raises InvalidPromptError or CapacityError.

        An object prompted on a frame of the past is brought to the present step by step: on a live stream
        between pictures, otherwise before the next picture.
        """
        return self._command(lambda: self.model.tracker.prompt(self.state, prompt), needs_frame=True)

    def pin(self, frame_id: int) -> "Future[int]":
        """Keep a frame for prompts until another is pinned; the future raises FrameNotKeptError."""
        return self._command(lambda: self.model.tracker.pin(self.state, frame_id), needs_frame=True)

    def remove_object(self, object_id: int) -> "Future[None]":
        """Forget an object; the future raises UnknownObjectError."""
        return self._command(lambda: self.model.tracker.remove(self.state, object_id))

    def reset(self) -> "Future[None]":
        """Forget every object."""
        return self._command(lambda: self.model.tracker.reset(self.state))

    def close(self) -> None:
        """Free the stream's rows; futures that still wait are cancelled."""
        self._scheduler.close_stream(self)

    def _command(self, run: Callable[[], Result], *, needs_frame: bool = False) -> "Future[Result]":
        future: Future[Result] = Future()
        command = _Command(run=run, future=future, needs_frame=needs_frame)
        self._scheduler.enqueue_command(self, command)
        return future


@dataclass(kw_only=True, eq=False)
class LoadedModel:
    """A model ready to track."""

    entry: ModelEntry
    tracker: Tracker


LoadModel = Callable[[str, SchedulerConfig, Callable[[str], None]], LoadedModel]
"""See `load_model`."""


class Scheduler:
    """Loads the models and owns the thread that runs them.

    Args:
        config: what to load and how much to admit.
        on_progress: called with a line of text while engines are exported.
        load: loads a model by name, `load_model` unless told otherwise.

    Raises:
        UnknownModelError, CheckpointError: a model cannot be loaded.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        on_progress: Callable[[str], None] = log.info,
        *,
        load: LoadModel | None = None,
    ) -> None:
        self.config = config
        self.default_model = config.model
        self.default_memory = config.memory
        self.is_healthy = True
        self._on_progress = on_progress
        self._loading = threading.Lock()
        self._load = load or load_model
        self._models = {config.model: self._load(config.model, config, on_progress)}
        self._streams: list[TrackedStream] = []
        self._wake = threading.Condition()
        self._is_closing = False
        self._step_began_ns: int | None = None
        self._thread = threading.Thread(target=self._work, name="trocar-device", daemon=True)
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """How long the device has been at the step that it is at; 0 when it is at none."""
        began_ns = self._step_began_ns
        return 0.0 if began_ns is None else (time.perf_counter_ns() - began_ns) / 1e9

    def memory_rows(self) -> dict[str, MemoryRows]:
        """Rows in use and in all, for each loaded model."""
        pools = {name: model.tracker.pool for name, model in list(self._models.items())}
        return {name: MemoryRows(pool.rows_in_use, pool.rows) for name, pool in pools.items()}

    @property
    def model_names(self) -> tuple[str, ...]:
        """Models that a stream may ask for: those with weights."""
        installed = (entry.name for entry in model_entries() if entry.weights is not None)
        return tuple(dict.fromkeys((self.default_model, *installed)))

    def model_card(self, model: str) -> ModelCard:
        """The card of a model; its runtime is what runs it, or what was asked for until it is loaded.

        Raises:
            UnknownModelError, CheckpointError: there is no such model, or it has no weights.
        """
        loaded = self._models.get(model)
        runtime = self.config.runtime if loaded is None else loaded.tracker.runtime.name
        return model_card(model, self._weights_of(model), runtime)

    def _weights_of(self, model: str) -> Path | None:
        return self.config.weights if model == self.default_model else None

    def open_stream(
        self, *, model: str = "", memory: str | None = None, is_live: bool, max_objects: int
    ) -> TrackedStream:
        """Admit a stream.

        Args:
            model: "" takes the default.
            memory: policy, None the default.
            is_live: drop a picture that still waits when the next one comes.
            max_objects: limit of the stream.

        Raises:
            StreamLimitError: as many streams as admitted are open.
            UnknownModelError, CheckpointError: no such model or policy, or no fitting weights.
        """
        loaded = self._model(model or self.default_model)
        bank = bank_config(loaded.entry, memory or self.default_memory)
        stream = TrackedStream(self, loaded, bank, is_live=is_live, max_objects=max_objects)
        with self._wake:
            # Closed streams still wait here for the worker to free their rows.
            if sum(not open_stream.is_closed for open_stream in self._streams) >= self.config.max_streams:
                raise StreamLimitError(
                    f"all {self.config.max_streams} streams are in use: close one or try another server"
                )
            self._streams.append(stream)
        return stream

    def warm_up(self) -> None:
        """Run the default model on blank pictures, so that the first live frame meets warm engines."""
        stream = self.open_stream(is_live=False, max_objects=1)
        size = stream.input_size_px
        try:
            for frame_id in range(WARM_UP_FRAMES):
                stream.offer(_blank_picture(frame_id, size)).result()
                if frame_id == 0:
                    centre = (size / 2, size / 2)
                    stream.prompt(Prompt(object_id=1, frame_id=0, points=(centre,), labels=(1,))).result()
        finally:
            stream.close()

    def probe(self, model: str, timeout_s: float) -> None:
        """Run a blank picture through a model on the device.

        Raises:
            TimeoutError: no result within `timeout_s`.
            StreamLimitError: no place for it: the device is fully used.
        """
        stream = self.open_stream(model=model, is_live=False, max_objects=1)
        try:
            stream.offer(_blank_picture(0, stream.input_size_px)).result(timeout_s)
        finally:
            stream.close()

    def close(self) -> None:
        """Stop the worker; waiting futures are cancelled."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join()
        for stream in list(self._streams):
            self.close_stream(stream)

    def enqueue_picture(self, stream: TrackedStream, task: _PictureTask) -> _PictureTask | None:
        """Queue a picture; returns the one it replaces."""
        with self._wake:
            waiting = [queued for queued in stream.tasks if isinstance(queued, _PictureTask)]
            if not stream.is_live and len(waiting) >= QUEUE_CAPACITY:
                raise ValueError(f"{len(waiting)} pictures wait already: await their results first")
            dropped = _replaceable(stream, waiting) if stream.is_live else None
            if dropped is not None:
                stream.tasks.remove(dropped)
            self._append(stream, task)
            return dropped

    def enqueue_command(self, stream: TrackedStream, command: "_Command[Result]") -> None:
        """Queue a command."""
        with self._wake:
            self._append(stream, command)  # type: ignore[arg-type]

    def _append(self, stream: TrackedStream, task: "_PictureTask | _Command[object]") -> None:
        if stream.is_closed or self._is_closing:
            task.future.cancel()
            return
        stream.tasks.append(task)
        self._wake.notify()

    def close_stream(self, stream: TrackedStream) -> None:
        """Drop a stream's tasks and free its rows, on the worker's thread while that runs."""
        with self._wake:
            if stream.is_closed:
                return
            stream.is_closed = True
            waiting = list(stream.tasks)
            stream.tasks.clear()
            if self._thread.is_alive():
                self._wake.notify()
            else:
                self._forget(stream)
        for task in waiting:
            task.future.cancel()

    def _forget(self, stream: TrackedStream) -> None:
        stream.model.tracker.close_stream(stream.state)
        if stream in self._streams:
            self._streams.remove(stream)

    def _model(self, name: str) -> LoadedModel:
        with self._loading:
            if name not in self._models:
                self._models[name] = self._load(name, self.config, self._on_progress)
            return self._models[name]

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._is_closing:
                    return
                for stream in [stream for stream in self._streams if stream.is_closed]:
                    self._forget(stream)
                commands, tick = self._take()
            self._step_began_ns = time.perf_counter_ns()
            for command in commands:
                self._run_command(command)
            if tick:
                self._run_tick(tick)
            self._catch_up()
            self._step_began_ns = None

    def _has_work(self) -> bool:
        return self._is_closing or any(
            stream.tasks or stream.is_closed or stream.state.is_behind for stream in self._streams
        )

    def _take(self) -> tuple[list["_Command[object]"], list[tuple[TrackedStream, _PictureTask]]]:
        """Commands that are due, and at most one picture per stream, all of one model; live streams first.

        Where nothing is dropped a picture waits until every object is in the present.
        """
        commands: list[_Command[object]] = []
        tick: list[tuple[TrackedStream, _PictureTask]] = []
        for stream in sorted(self._streams, key=lambda stream: not stream.is_live):
            asked = len(commands)
            while stream.tasks and not isinstance(stream.tasks[0], _PictureTask):
                command = stream.tasks[0]
                if command.needs_frame and not stream.state.kept and _picture_waits(stream):
                    # The first frame was replaced before it was tracked: the prompt meets its successor.
                    stream.tasks.rotate(-1)
                    continue
                commands.append(stream.tasks.popleft())  # type: ignore[arg-type]
            is_same_model = not tick or tick[0][0].model is stream.model
            # A command that runs before this tick may be a prompt in the past.
            is_due = stream.is_live or not (len(commands) > asked or stream.state.is_behind)
            if stream.tasks and is_same_model and is_due:
                task = stream.tasks.popleft()
                assert isinstance(task, _PictureTask)
                tick.append((stream, task))
        return commands, tick

    def _run_command(self, command: "_Command[object]") -> None:
        if not command.future.set_running_or_notify_cancel():
            return
        try:
            if not self.is_healthy:
                raise DeviceFaultError(DEVICE_FAILED)
            command.future.set_result(command.run())
        except Exception as error:  # handed to whoever waits, who knows what is expected
            if isinstance(error, DEVICE_FAULTS):
                self._fail("a prompt failed")
            command.future.set_exception(_explained(error))

    def _catch_up(self) -> None:
        """One step for every object that is behind, beside the one that a picture of its stream brings.

        Its rows are those of the tick without the new ones, and no picture is encoded: it holds up the next
        picture by less than a tick, and halves the way of an object on a stream that has no time to spare.
        """
        behind: dict[Tracker, list[StreamState]] = {}
        with self._wake:
            for stream in self._streams:
                if stream.state.is_behind and not stream.is_closed:
                    behind.setdefault(stream.model.tracker, []).append(stream.state)
        for tracker, states in behind.items():
            try:
                tracker.catch_up(states)
            except Exception:  # as in `_run_tick`
                self._fail("catching up failed")
                for state in states:
                    tracker.reset(state)

    def _run_tick(self, tick: list[tuple[TrackedStream, _PictureTask]]) -> None:
        live = [(stream, task) for stream, task in tick if task.future.set_running_or_notify_cancel()]
        if not live:
            return
        tracker = live[0][0].model.tracker
        try:
            if not self.is_healthy:
                raise DeviceFaultError(DEVICE_FAILED)
            streams = [stream for stream, _ in live]
            step = tracker.step(
                [stream.state for stream in streams],
                [task.picture for _, task in live],
                coming=lambda: self._begin_next(streams),
            )
        except Exception as error:
            # The tracker raises nothing that a picture could provoke: this is a device fault or a defect,
            # and no mask after it can be trusted.
            self._fail("tracking failed")
            for _, task in live:
                task.future.set_exception(_explained(error))
            return
        for (_, task), result, begun_ns in zip(live, step.results, step.begun_ns, strict=True):
            result.stage_ns["queue"] = begun_ns - task.offered_ns
            task.future.set_result(result)
        try:
            tracker.remember(step)
        except Exception:  # memory may be half written
            self._fail("remembering failed")

    def _begin_next(self, streams: list[TrackedStream]) -> list[Picture]:
        """The next picture of each of the streams, which are then begun; none where one has none yet.

        Some of them alone would make two batches of the next tick's one.
        """
        with self._wake:
            following = [stream.tasks[0] if stream.tasks else None for stream in streams]
            tasks = [task for task in following if isinstance(task, _PictureTask)]
            if len(tasks) < len(streams):
                return []
            for task in tasks:
                task.is_begun = True
            return list({id(task.picture): task.picture for task in tasks}.values())

    def _fail(self, what: str) -> None:
        """Stop trusting the device; called while the fault is handled."""
        if self.is_healthy:
            log.exception(what)
        self.is_healthy = False


def _explained(error: Exception) -> Exception:
    """What a client is told of a device's fault; other errors as they are."""
    if not isinstance(error, DEVICE_FAULTS):
        return error
    fault = DeviceFaultError(DEVICE_FAILED)
    fault.__cause__ = error
    return fault


def _replaceable(stream: TrackedStream, waiting: list[_PictureTask]) -> _PictureTask | None:
    """The waiting picture that a newer one replaces; one that a prompt waits for is spared, once."""
    waiting = [task for task in waiting if not task.is_begun]
    if not waiting:
        return None
    is_prompted = not isinstance(stream.tasks[-1], _PictureTask)
    return waiting[-1] if len(waiting) > 1 or not is_prompted else None


def _picture_waits(stream: TrackedStream) -> bool:
    return any(isinstance(task, _PictureTask) for task in stream.tasks)


def _blank_picture(frame_id: int, size_px: int) -> Picture:
    pixels = np.zeros((size_px, size_px, 3), dtype=np.uint8)
    return Picture(
        frame_id=frame_id, pixels=pixels, width_px=size_px, height_px=size_px, time_s=frame_id / 30
    )


def _resolve(future: "Future[FrameMasklets]", result: FrameMasklets) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def load_model(name: str, config: SchedulerConfig, on_progress: Callable[[str], None]) -> LoadedModel:
    """A model by name with the runtime and the memory that `config` asks for.

    Raises:
        UnknownModelError, CheckpointError: it cannot be loaded.
        RuntimeUnavailableError, EngineMismatchError: this machine does not offer the runtime, or its plans.
    """
    network = load_network(name, config.weights if name == config.model else None)
    entry = model_entry(name)
    # Rows must fit the largest bank of any policy a stream may choose.
    banks = [bank_config(entry, policy.value) for policy in MemoryPolicy]
    largest = max(banks, key=lambda bank: bank.slots)
    threads = config.threads or cpu_threads()
    set_torch_threads(threads)
    choice = config.runtime
    if choice == "auto" and not torch.cuda.is_available():
        # A Hiera trunk is compiled for half a minute, and too slow for a live stream either way.
        is_quick = isinstance(network.config.trunk, ConvTrunkConfig)
        choice = "openvino" if is_quick and has_bfloat16() else "onnx"
    runtime: Runtime
    if choice == "eager":
        runtime = EagerRuntime(network)
    elif choice in ("openvino", "onnx"):
        open_runtime = OpenVinoRuntime if choice == "openvino" else OnnxRuntime
        runtime = open_runtime(
            network,
            cache=config.cache,
            threads=threads,
            on_stage=lambda stage: on_progress(f"{name}: exporting {stage} (once; cached afterwards)"),
        )
    else:
        runtime = load_gpu_runtime(
            name,
            network,
            device_shapes(banks, pictures=config.max_streams, rows=config.max_objects),
            choice=choice,
            is_compiled=config.is_compiled,
            cache=config.cache,
            on_progress=on_progress,
        )
    log.info("%s runs as %s", name, runtime.name)
    tracker = Tracker(runtime, TrackerConfig(rows=config.max_objects, bank=largest))
    tracker.warm_up()
    return LoadedModel(entry=entry, tracker=tracker)
