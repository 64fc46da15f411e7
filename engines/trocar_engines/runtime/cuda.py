"""The network on a GPU: half precision, one captured graph for every stage and size of batch.

A frame of a small network is hundreds of kernels of some microseconds; launched one by one from Python the
GPU waits. A graph is one launch, but has fixed shapes and addresses: batches are padded to a bucket of rows
and copied into static buffers.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from trocar_engines.errors import RuntimeUnavailableError
from trocar_engines.export import StageFunction, example_inputs, stage_functions
from trocar_engines.memory.pool import RECENT_POINTERS
from trocar_engines.network.precision import halve
from trocar_engines.network.sam2s import (
    HIDDEN_BIAS,
    SAM2S,
    Decoded,
    ImageFeatures,
    MemoryView,
    PromptTensors,
    Recognition,
)
from trocar_engines.runtime.clock import DeviceClock, HostClock, StageClock
from trocar_engines.runtime.comparison import USED, Run, compare_with_graph, describe, measure_us, widen
from trocar_engines.runtime.interface import MOST_LOOKS

BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
"""Rows of a captured batch. Between powers of two, for rows of padding cost as much as others: twelve cameras
would be encoded as sixteen."""
SLOTTED_INPUTS = (1, 2, 3)
"""Of the stages that attend to memory: `MemoryView.spatial`, `slot_time`, `slot_bias`, each [B, K, …]."""
READ_POINTERS = 1 + RECENT_POINTERS
"""Pointers of a full bank: the conditioning frame's and the recent ones."""
WARM_UP_RUNS = 2
"""Plain runs before a capture: libraries choose kernels and take workspace, which a capture must not see."""
COMPILED_STAGES = ("encode_image", "attend_full", "track_masks", "encode_memory")
"""What most frames of an operation run; H200: 10, 16, 29 and 48% faster for one object."""
COMPILED_ROWS = (1, 2, 4, 8, 12)
"""Rows for which stages are compiled; every size costs seconds of each start, even from the cache."""
MOST_COMPILED = 64
"""Sizes times networks that one process may compile; torch gives up after 8."""
Capture = Callable[[Run], Run]
"""Turns a run over static tensors into one that may be repeated; its outputs are overwritten each time."""
CompileStage = Callable[[StageFunction, tuple[Tensor, ...]], StageFunction]
"""Compiles a stage for the shapes of given inputs; raises RuntimeUnavailableError where it cannot."""
log = logging.getLogger(__name__)


class Variant(NamedTuple):
    """One graph: a stage at fixed shapes.

    Args:
        stage: of `export.stage_functions`.
        rows: of the batch.
        slots: memory slots of each row, for stages that attend to memory.
    """

    stage: str
    rows: int
    slots: int = 0

    def __str__(self) -> str:
        return f"{self.stage}-r{self.rows}" + (f"-k{self.slots}" if self.slots else "")


@dataclass(frozen=True, kw_only=True)
class DeviceShapes:
    """What graphs are made for.

    Args:
        pictures: most pictures in a batch; larger batches are split.
        rows: most objects in a batch, likewise.
        full_slots: slots of rows that all read as many; they have variants without bias.
        steady_slots: those among them that rows read most of the time.
        most_slots: slots that any bank can fill.
    """

    pictures: int
    rows: int
    full_slots: tuple[int, ...]
    steady_slots: tuple[int, ...]
    most_slots: int

    def variants(self) -> list[Variant]:
        """Every graph, largest first: later captures fit into the memory of earlier ones."""
        pictures = [Variant("encode_image", rows) for rows in _buckets(self.pictures)]
        attended = [
            variant
            for rows in _buckets(self.rows)
            for variant in (
                Variant("attend_memory", rows, self.most_slots),
                *(Variant("attend_full", rows, slots) for slots in self.full_slots),
            )
        ]
        others = [
            Variant(stage, rows) for stage in ("track_masks", "encode_memory") for rows in _buckets(self.rows)
        ]
        return sorted([*pictures, *attended, *others], key=lambda variant: -variant.rows)

    def is_steady(self, variant: Variant) -> bool:
        """Whether a graph is run often enough to be worth minutes of building."""
        return variant.stage != "attend_full" or variant.slots in self.steady_slots


class Session(Protocol):
    """A stage's plan, ready to run: knows device addresses, no tensors."""

    def bind(self, inputs: list[int], outputs: list[int]) -> None:
        """Fix the device addresses, in the order of the stage's tensors."""

    def enqueue(self, stream: int) -> None:
        """Start the stage on a CUDA stream, given by its handle."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Captured:
    """A run that may be repeated over static inputs; `source` is what it was captured of.

    The source is kept, for a graph reads constants and launches kernels that may belong to it.
    """

    inputs: tuple[Tensor, ...]
    run: Run
    source: Run


class CudaRuntime:
    """See `runtime.interface.Runtime`.

    Rows of padding keep what an earlier call left in them: finite, and read by nobody, for rows of a batch
    do not see each other.

    Args:
        network: with its weights; copied.
        shapes: what to capture.
        device: of the network's copy. A CPU runs everything but the capture.
        dtype: of half precision.
        capture: makes a run repeatable.
        sessions: plans that take the place of captured network code.
        compile_stage: None, or what compiles `COMPILED_STAGES`, where no plan runs them; used only where it
            is as exact and faster than the captured graph.
        measure: microseconds of a run, to compare what was compiled.
        on_stage: called with a variant's name before it is captured.

    Raises:
        RuntimeUnavailableError: no such device, or the network does not fit its memory.
    """

    def __init__(
        self,
        network: SAM2S,
        shapes: DeviceShapes,
        *,
        device: torch.device | str = "cuda",
        dtype: torch.dtype = torch.float16,
        capture: Capture | None = None,
        sessions: Mapping[Variant, Session] | None = None,
        compile_stage: CompileStage | None = None,
        measure: Callable[[Run], float] = measure_us,
        on_stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.shapes, self.device = network.config, shapes, torch.device(device)
        self.is_asynchronous = self.device.type == "cuda"
        if self.device.type == "cuda":
            require_gpu()
        sessions = sessions or {}
        of_frames = shapes.variants()
        self.planned = frozenset(variant for variant in of_frames if variant in sessions)
        looks = [Variant("recognise", rows) for rows in reversed(_buckets(MOST_LOOKS))]
        self.variants = [*of_frames, *(looks if self.config.classes else ())]
        try:
            self.network = halve(network, dtype, self.device, has_float32_norms=False)
            capture = capture or GraphCapture()
            self._captured = self._capture_all(capture, sessions, on_stage)
            self.compiled: frozenset[Variant] = frozenset()
            if compile_stage is not None:
                self.compiled = self._compile_all(compile_stage, network, capture, measure)
        except torch.OutOfMemoryError as error:
            raise RuntimeUnavailableError(
                f"the network does not fit the device's memory with graphs for {shapes.pictures} pictures "
                f"and {shapes.rows} objects ({error}): start with a smaller --max-streams, a smaller model, "
                "or free the device"
            ) from error
        self.name = describe_stages(of_frames, self.planned, self.compiled)

    @torch.inference_mode()
    def _capture_all(
        self, capture: Capture, sessions: Mapping[Variant, Session], on_stage: Callable[[str], None]
    ) -> dict[Variant, _Captured]:
        functions = stage_functions(self.network)
        largest = {
            variant.stage: variant
            for variant in sorted(self.variants, key=lambda each: (each.rows, each.slots))
        }
        buffers = {stage: self.examples(variant) for stage, variant in largest.items()}
        captured = {}
        for variant in self.variants:
            # Smaller ones use the begin of the largest one's buffers.
            shapes = buffer_shapes(buffers[variant.stage], largest[variant.stage], variant)
            inputs = tuple(
                buffer.flatten()[: math.prod(shape)].view(shape)
                for buffer, shape in zip(buffers[variant.stage], shapes, strict=True)
            )
            on_stage(str(variant))
            function = functions[variant.stage]
            if variant in sessions:
                run = session_run(sessions[variant], inputs, function(*inputs))
            else:
                run = _bound(function, inputs)
            captured[variant] = _Captured(inputs=inputs, run=capture(run), source=run)
        return captured

    @torch.inference_mode()
    def _compile_all(
        self,
        compile_stage: CompileStage,
        network: SAM2S,
        capture: Capture,
        measure: Callable[[Run], float],
    ) -> frozenset[Variant]:
        """Put compiled stages in the place of captured ones where they win; returns where they did."""
        functions, references = (
            stage_functions(each) for each in (self.network, halve(network, torch.float32, self.device))
        )
        compiled, failed = set(), set()
        for variant in self.variants:
            is_wanted = variant.stage in COMPILED_STAGES and variant.rows in COMPILED_ROWS
            if not is_wanted or not self.shapes.is_steady(variant):
                continue
            if variant in self.planned or variant.stage in failed:
                continue
            captured = self._captured[variant]
            try:
                source = _bound(compile_stage(functions[variant.stage], captured.inputs), captured.inputs)
                run = capture(source)
                expected = references[variant.stage](*widen(captured.inputs))
                comparison = compare_with_graph(run, captured.run, expected, measure)
            except (RuntimeUnavailableError, torch.OutOfMemoryError) as error:
                log.warning("%s: %s; the captured graph runs instead", variant, error)
                # Its other sizes would fail as this one did, each after as long.
                failed.add(variant.stage)
                continue
            is_used = comparison.verdict == USED
            log.log(
                logging.INFO if is_used else logging.WARNING, "%s compiled: %s", variant, describe(comparison)
            )
            if is_used:
                self._captured[variant] = _Captured(inputs=captured.inputs, run=run, source=source)
                compiled.add(variant)
        return frozenset(compiled)

    def examples(self, variant: Variant) -> tuple[Tensor, ...]:
        """Inputs of a variant on the device, contiguous, for the caller to keep."""
        inputs = example_inputs(
            self.network,
            rows=variant.rows,
            slots=variant.slots or 1,
            pointers=READ_POINTERS,
            points=1,
        )
        return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs[variant.stage])

    @torch.inference_mode()
    def run_variant(self, variant: Variant, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one graph on inputs of at most its rows; the outputs belong to the caller."""
        rows = len(tensors[0])
        captured = self._captured[variant]
        for buffer, tensor in zip(captured.inputs, tensors, strict=True):
            buffer[:rows].copy_(tensor, non_blocking=True)
        return tuple(output[:rows].clone() for output in captured.run())

    def captured_run(self, variant: Variant) -> Run:
        """One graph over its static tensors, without the copies; to be timed."""
        return self._captured[variant].run

    def _call(self, stage: str, *tensors: Tensor, slots: int = 0) -> tuple[Tensor, ...]:
        """Run a stage on any number of rows."""
        rows = len(tensors[0])
        shapes = self.shapes
        wanted = {"encode_image": shapes.pictures, "recognise": MOST_LOOKS}.get(stage, shapes.rows)
        most = _buckets(wanted)[-1]
        if rows > most:
            parts = zip(*(tensor.split(most) for tensor in tensors), strict=True)
            batches = [self._call(stage, *part, slots=slots) for part in parts]
            return tuple(torch.cat(outputs) for outputs in zip(*batches, strict=True))
        return self.run_variant(Variant(stage, _bucket(rows), slots), *tensors)

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """See `Runtime.encode_image`."""
        return ImageFeatures(*self._call("encode_image", pixels))

    def attend_memory(
        self, embedding: Tensor, memory: MemoryView, *, is_full: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `Runtime.attend_memory`."""
        slots, pointers = memory.slot_bias.shape[1], memory.pointer_bias.shape[1]
        if is_full and slots in self.shapes.full_slots and pointers == READ_POINTERS:
            conditioned, class_token = self._call("attend_full", embedding, *memory, slots=slots)
        else:
            most = self.shapes.most_slots
            view = _padded(memory, most - slots, READ_POINTERS - pointers)
            conditioned, class_token = self._call("attend_memory", embedding, *view, slots=most)
        return conditioned, class_token

    def track_masks(self, conditioned: Tensor, features: ImageFeatures, prototypes: Tensor) -> Decoded:
        """See `Runtime.track_masks`."""
        _, stride_4, stride_8, keys = features
        return Decoded(*self._call("track_masks", conditioned, stride_4, stride_8, keys, prototypes))

    @torch.inference_mode()
    def decode_prompt(
        self,
        conditioned: Tensor,
        features: ImageFeatures,
        prompt: PromptTensors,
        is_multimask: Tensor,
    ) -> Decoded:
        """See `Runtime.decode_prompt`; rare and of any number of points, so it is not captured."""
        on_device = PromptTensors(*(tensor.to(self.device) for tensor in prompt))
        return self.network.decode_prompt(
            features._replace(embedding=conditioned), on_device, is_multimask.to(self.device)
        )

    @torch.inference_mode()
    def read_affinity(self, keys: Tensor, prototypes: Tensor) -> Tensor:
        """See `Runtime.read_affinity`; not captured either."""
        return self.network.read_affinity(keys, prototypes)[0].float().cpu()

    def encode_memory(
        self, features: ImageFeatures, mask_logits: Tensor, presence_logit: Tensor, is_prompted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Runtime.encode_memory`."""
        spatial, prototypes = self._call(
            "encode_memory", features.embedding, features.keys, mask_logits, presence_logit, is_prompted
        )
        return spatial, prototypes

    @torch.inference_mode()
    def recognise(self, class_token: Tensor, pixels: Tensor, mask_logits: Tensor) -> Recognition:
        """See `Runtime.recognise`: packed into one tensor on the device, so one copy and one wait."""
        class_logits, descriptor = self._call("recognise", class_token, pixels, mask_logits)
        packed = torch.cat([class_logits.float(), descriptor.float()], dim=1).cpu()
        return Recognition(*packed.split([class_logits.shape[1], descriptor.shape[1]], dim=1))

    @torch.inference_mode()
    def without_memory(self, embedding: Tensor) -> Tensor:
        """See `Runtime.without_memory`."""
        return self.network.without_memory(embedding)

    @torch.inference_mode()
    def downsample_mask(self, mask: Tensor) -> Tensor:
        """See `Runtime.downsample_mask`."""
        return self.network.mask_downsample(mask.to(self.device)).float()  # type: ignore[no-any-return]

    def start_clock(self) -> StageClock:
        """See `Runtime.start_clock`."""
        return DeviceClock() if self.device.type == "cuda" else HostClock()

    @torch.inference_mode()
    def read_back(self, decoded: Decoded) -> Callable[[], Decoded]:
        """See `Runtime.read_back`: packed into one tensor on the device, so one copy and one wait."""
        fields = [field.to(self.device).float().reshape(len(field), -1) for field in decoded]
        packed = torch.cat(fields, dim=1)
        copied = packed.to("cpu", non_blocking=True)
        done = torch.cuda.Event() if packed.is_cuda else None
        if done is not None:
            # Not a wait for all: what is asked of the device from here on is not waited for.
            done.record()

        def wait() -> Decoded:
            host = copied
            if done is not None:
                done.synchronize()
                host = copied.clone()  # pinned memory is wanted back: what the caller keeps is a copy
            columns = host.split([field.shape[1] for field in fields], dim=1)
            return Decoded(
                *(column.reshape(field.shape) for column, field in zip(columns, decoded, strict=True))
            )

        return wait


class GraphCapture:
    """Captures CUDA graphs; all share one memory pool, for each one's outputs are copied before the next."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # Of all warm-ups: what one stream has freed the allocator gives to no other.
        self._side = torch.cuda.Stream()

    def __call__(self, run: Run) -> Run:
        """A run that replays the graph of `run`."""
        side = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another model may be tracking on its own thread meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            # A slice without elements would keep all of the memory that it is a slice of.
            outputs = tuple(output if output.numel() else output.new_empty(output.shape) for output in run())
        graph.replay()  # the first one uploads the graph, which no live frame should wait for

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay


def call_plainly(run: Run) -> Run:
    """The capture of a device without graphs: none."""
    return run


def compile_with_inductor(
    function: StageFunction, inputs: tuple[Tensor, ...], *, cache: Path
) -> StageFunction:
    """See `CompileStage`: by torch.compile, which fuses what lies between products into few kernels.

    Without CUDA graphs of its own, for what it returns is captured. Takes about a minute at first; what was
    compiled is kept on disk, where TORCHINDUCTOR_CACHE_DIR says or else in the cache.

    Args:
        function: of `export.stage_functions`.
        inputs: on the device.
        cache: root of all engines.

    Raises:
        RuntimeUnavailableError: torch could not compile it; most often Triton or a C compiler is missing.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    try:
        # Advice for who trains: that TF32 is off, that a GPU has few multiprocessors.
        with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
            warnings.simplefilter("ignore")
            compiled = torch.compile(
                function, fullgraph=True, dynamic=False, options={"triton.cudagraphs": False}
            )
            compiled(*inputs)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # Dynamo's, Inductor's, Triton's and those of a subprocess share no base.
        reason = str(error).strip().split("\n")[0]
        raise RuntimeUnavailableError(
            f"torch could not compile it ({type(error).__name__}: {reason}): install triton and a C compiler "
            "(gcc), or start with --no-compile"
        ) from error
    return compiled


def session_run(session: Session, inputs: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> Run:
    """A run of a plan on static inputs.

    Args:
        session: not bound yet.
        inputs: static.
        like: outputs of the same shapes and types.
    """
    outputs = tuple(torch.empty_like(output, memory_format=torch.contiguous_format) for output in like)
    session.bind([tensor.data_ptr() for tensor in inputs], [tensor.data_ptr() for tensor in outputs])
    is_cuda = outputs[0].is_cuda

    def run() -> tuple[Tensor, ...]:
        session.enqueue(torch.cuda.current_stream().cuda_stream if is_cuda else 0)
        return outputs

    return run


def require_gpu() -> None:
    """Check that torch sees a GPU.

    Raises:
        RuntimeUnavailableError: it does not.
    """
    if not torch.cuda.is_available():
        build = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", which is built without CUDA")
        raise RuntimeUnavailableError(
            f"this runtime needs an NVIDIA GPU and none is visible to {build}: check nvidia-smi, install a "
            "torch built for CUDA, or take --runtime onnx"
        )


def describe_stages(
    variants: list[Variant], planned: frozenset[Variant], compiled: frozenset[Variant]
) -> str:
    """Name of a runtime: "cuda", with "tensorrt" where plans run and "inductor" where compiled code does."""
    parts = {
        "tensorrt": bool(planned),
        "cuda": len(planned) < len(variants),
        "inductor": bool(compiled),
    }
    return "+".join(name for name, is_running in parts.items() if is_running)


def _bound(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Run:
    return lambda: function(*inputs)


def buffer_shapes(buffers: Sequence[Tensor], largest: Variant, variant: Variant) -> list[tuple[int, ...]]:
    """Shapes of a variant's inputs.

    Args:
        buffers: inputs of the largest variant of the stage.
        largest: that variant.
        variant: of the same stage.
    """
    shapes = [(variant.rows, *buffer.shape[1:]) for buffer in buffers]
    if largest.slots:
        for index in SLOTTED_INPUTS:
            assert buffers[index].shape[1] == largest.slots
            shapes[index] = (variant.rows, variant.slots, *buffers[index].shape[2:])
    return shapes


def _buckets(most: int) -> tuple[int, ...]:
    """Buckets up to the one that holds `most` rows."""
    return BUCKETS[: BUCKETS.index(_bucket(min(most, BUCKETS[-1]))) + 1]


def _bucket(rows: int) -> int:
    return next(bucket for bucket in BUCKETS if rows <= bucket)


def _padded(view: MemoryView, slots: int, pointers: int) -> MemoryView:
    """A view with so many more slots and pointers, all hidden."""
    if not slots and not pointers:
        return view
    return MemoryView(
        spatial=pad(view.spatial, (0, 0, 0, 0, 0, 0, 0, slots)),
        slot_time=pad(view.slot_time, (0, slots)),
        slot_bias=pad(view.slot_bias, (0, slots), value=HIDDEN_BIAS),
        pointers=pad(view.pointers, (0, 0, 0, pointers)),
        pointer_age=pad(view.pointer_age, (0, pointers)),
        pointer_bias=pad(view.pointer_bias, (0, pointers), value=HIDDEN_BIAS),
    )
