"""TensorRT plans: built from the exported stages, measured, kept with a manifest.

A plan is used only where it is at least as exact as the captured graph of the same shapes, and faster.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trocar_engines.errors import EngineMismatchError, PlanBuildError, RuntimeUnavailableError
from trocar_engines.export import engine_folder, export_stages, stage_functions
from trocar_engines.memory.bank import BankConfig, MemoryPolicy
from trocar_engines.models import bank_config, model_entry
from trocar_engines.network.precision import halve
from trocar_engines.network.sam2s import SAM2S
from trocar_engines.runtime.comparison import (
    USED,
    Comparison,
    Run,
    compare_with_graph,
    describe,
    measure_us,
    widen,
)
from trocar_engines.runtime.cuda import (
    Capture,
    CudaRuntime,
    DeviceShapes,
    GraphCapture,
    Session,
    Variant,
    compile_with_inductor,
    require_gpu,
    session_run,
)
from trocar_engines.runtime.tensorrt import TensorRtLibrary

PLAN_STAGES = ("encode_image", "attend_memory", "attend_full", "track_masks", "encode_memory")
"""`decode_prompt` is missing: its points vary in number, and it runs once a prompt."""
PRECISION = torch.float16
PLANS, MANIFEST = "plans", "manifest.json"
log = logging.getLogger(__name__)


class PlanLibrary(Protocol):
    """What turns graphs into plans; `runtime.tensorrt.TensorRtLibrary`, in tests a fake."""

    version: str

    def build(self, graph: bytes, timing_cache: Path, on_progress: Callable[[str], None]) -> bytes:
        """A plan of an ONNX graph of static shapes."""

    def open(self, plan: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> Session:
        """A session of a plan, given the names of its tensors in order."""


@dataclass(frozen=True, kw_only=True)
class DeviceIdentity:
    """What a plan is bound to.

    Args:
        name: as the driver tells it.
        compute_capability: such as "9.0".
    """

    name: str
    compute_capability: str


@dataclass(frozen=True, kw_only=True)
class PlanReport(Comparison):
    """One plan against what it would replace.

    Args:
        stage: and `rows` and `slots`, see `cuda.Variant`.
        file: of the plan, "" where none was built.
        file_hash: its SHA-256 in hex.
        inputs: names of its tensors in order, and `outputs` likewise.
    """

    stage: str
    rows: int
    slots: int
    file: str = ""
    file_hash: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def variant(self) -> Variant:
        """The graph that it stands for."""
        return Variant(self.stage, self.rows, self.slots)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of plans belongs to.

    Args:
        model: name of the network.
        model_hash: of weights, code and exporter, from `engine_folder`.
        tensorrt_version: that built them.
        device: that they were built on, and `compute_capability`.
        precision: of the layers that are no islands.
        pictures: and `rows`, most of a batch.
        plans: a report of each.
    """

    model: str
    model_hash: str
    tensorrt_version: str
    device: str
    compute_capability: str
    precision: str
    pictures: int
    rows: int
    plans: tuple[PlanReport, ...]


def device_shapes(banks: Sequence[BankConfig], *, pictures: int, rows: int) -> DeviceShapes:
    """What to capture for objects with any of these banks."""
    # Once recent memory is full, long-term memories and corrections come one by one, and may never all come.
    full = {slots for bank in banks for slots in range(1 + bank.recent_slots, bank.most_read + 1)}
    return DeviceShapes(
        pictures=pictures,
        rows=rows,
        full_slots=tuple(sorted(full)),
        steady_slots=tuple(sorted({1 + bank.recent_slots + bank.long_term_slots for bank in banks})),
        most_slots=max(full),
    )


def identify_gpu() -> DeviceIdentity:
    """The GPU that torch uses.

    Raises:
        RuntimeUnavailableError: there is none.
    """
    require_gpu()
    major, minor = torch.cuda.get_device_capability()
    return DeviceIdentity(name=torch.cuda.get_device_name(), compute_capability=f"{major}.{minor}")


def load_gpu_runtime(
    name: str,
    network: SAM2S,
    shapes: DeviceShapes,
    *,
    choice: str,
    is_compiled: bool,
    cache: Path,
    on_progress: Callable[[str], None],
) -> CudaRuntime:
    """The network on this machine's GPU.

    Args:
        name: of the network.
        network: with its weights, on the CPU.
        shapes: what to capture.
        choice: "cuda", "tensorrt", or "auto" for plans where there are any and graphs elsewhere.
        is_compiled: torch may compile stages, see `CudaRuntime`.
        cache: root of all engines.
        on_progress: called with a line of text.

    Raises:
        RuntimeUnavailableError: no GPU, no TensorRT, or too little memory.
        EngineMismatchError: plans were asked for and there are none for this device, version and model.
    """
    device = identify_gpu()
    sessions: dict[Variant, Session] = {}
    if choice != "cuda":
        sessions = choose_sessions(
            name,
            plans_folder(cache, network),
            shapes,
            is_required=choice == "tensorrt",
            open_library=TensorRtLibrary,
            device=device,
            on_progress=on_progress,
        )
    if is_compiled:
        on_progress(f"{name}: compiling for {device.name} (longest once; cached afterwards)")
    runtime = CudaRuntime(
        network,
        shapes,
        dtype=PRECISION,
        sessions=sessions,
        compile_stage=functools.partial(compile_with_inductor, cache=cache) if is_compiled else None,
        on_stage=lambda variant: log.info("%s: capturing %s", name, variant),
    )
    planned, compiled = (
        ", ".join(map(str, variants)) or "none" for variants in (runtime.planned, runtime.compiled)
    )
    log.info(
        "%s runs as %s on %s; plans: %s; compiled: %s", name, runtime.name, device.name, planned, compiled
    )
    return runtime


def choose_sessions(
    name: str,
    folder: Path,
    shapes: DeviceShapes,
    *,
    is_required: bool,
    open_library: Callable[[], PlanLibrary],
    device: DeviceIdentity,
    on_progress: Callable[[str], None],
) -> dict[Variant, Session]:
    """Sessions of the plans to run; none where captured graphs do it all.

    Args:
        name: of the network.
        folder: of its plans.
        shapes: what is needed.
        is_required: plans were asked for by name. Else graphs stand in for plans that cannot be used, and
            that is said.
        open_library: loads TensorRT.
        device: that they shall run on.
        on_progress: called with a line of text.

    Raises:
        RuntimeUnavailableError, EngineMismatchError: plans were asked for and cannot be used.
    """
    if not is_required and not (folder / MANIFEST).exists():
        return {}
    try:
        return open_plans(name, folder, shapes, library=open_library(), device=device)
    except (RuntimeUnavailableError, EngineMismatchError) as error:
        if is_required:
            raise
        log.warning("%s; captured graphs run instead", error)
        on_progress(f"{error}; captured graphs run instead")
        return {}


def plans_folder(cache: Path, network: SAM2S) -> Path:
    """Folder of a network's plans."""
    return engine_folder(cache, halve(network, PRECISION)) / PLANS


def build_command(name: str) -> str:
    """The command that builds a model's plans."""
    return f"trocar engines build --runtime tensorrt --model {name}"


def read_manifest(folder: Path) -> Manifest:
    """What the plans of a folder belong to.

    Raises:
        EngineMismatchError: there is no manifest, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text())
        plans = tuple(
            PlanReport(**{**plan, "inputs": tuple(plan["inputs"]), "outputs": tuple(plan["outputs"])})
            for plan in data.pop("plans")
        )
        return Manifest(**data, plans=plans)
    except FileNotFoundError:
        raise EngineMismatchError(f"no plans in {folder}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineMismatchError(f"{path}: not a manifest of plans ({error})") from error


def read_manifests(cache: Path) -> list[Manifest]:
    """Every manifest of a cache.

    Raises:
        EngineMismatchError: one cannot be read.
    """
    return [read_manifest(path.parent) for path in sorted(cache.glob(f"*/{PLANS}/{MANIFEST}"))]


def open_plans(
    name: str, folder: Path, shapes: DeviceShapes, *, library: PlanLibrary, device: DeviceIdentity
) -> dict[Variant, Session]:
    """Sessions of the plans that passed, for those variants of `shapes` that have one.

    Raises:
        EngineMismatchError: the plans are of another device or version, damaged or missing, or none of them
            passed; the message names the command that rebuilds them.
    """
    remedy = f"run {build_command(name)}"
    try:
        manifest = read_manifest(folder)
    except EngineMismatchError as error:
        raise EngineMismatchError(f"model {name}: {error}; {remedy}") from error
    built_for = f"{manifest.device} ({manifest.compute_capability})", manifest.tensorrt_version
    here = f"{device.name} ({device.compute_capability})", library.version
    for what, built, found in zip(("device", "TensorRT version"), built_for, here, strict=True):
        if built != found:
            raise EngineMismatchError(
                f"model {name}: its plans were built for {what} {built} and this is {found}; {remedy}"
            )
    wanted = set(shapes.variants())
    sessions: dict[Variant, Session] = {}
    for report in manifest.plans:
        if report.verdict != USED or report.variant not in wanted:
            continue
        path = folder / report.file
        plan = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(plan).hexdigest() != report.file_hash:
            raise EngineMismatchError(f"model {name}: {path} is missing or damaged; {remedy}")
        sessions[report.variant] = library.open(plan, report.inputs, report.outputs)
    if not sessions:
        raise EngineMismatchError(
            f"model {name}: no plan for these sizes is faster than captured graphs and as exact (see trocar "
            f"engines show); take --runtime cuda, or {remedy}"
        )
    return sessions


def build_plans(
    name: str,
    network: SAM2S,
    shapes: DeviceShapes,
    *,
    cache: Path,
    library: PlanLibrary,
    identity: DeviceIdentity,
    on_progress: Callable[[str], None],
    device: torch.device | str = "cuda",
    capture: Capture | None = None,
    measure: Callable[[Run], float] | None = None,
    stages: Sequence[str] = PLAN_STAGES,
) -> Manifest:
    """Build a plan of every stage at every steady size, compare it with eager and with the captured graph.

    The manifest is written last: a build that is interrupted leaves no plans that could be loaded.

    Args:
        name: of the network.
        network: with its weights, on the CPU.
        shapes: what to build for.
        cache: root of all engines.
        library: builds and runs plans.
        identity: of the device.
        on_progress: called with a line of text.
        device: where plans and graphs run.
        capture: makes a run repeatable.
        measure: microseconds of a run.
        stages: what to build; the others stay captured graphs.

    Raises:
        RuntimeUnavailableError: no GPU, or too little memory.
    """
    capture = capture or GraphCapture()
    halved = halve(network, PRECISION)
    engines = engine_folder(cache, halved)
    paths = export_stages(halved, engines, lambda stage: on_progress(f"exporting {stage}"), stages)
    folder = engines / PLANS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    runtime = CudaRuntime(network, shapes, device=device, dtype=PRECISION, capture=capture)
    reference = stage_functions(halve(network, torch.float32, device))
    reports = []
    variants = [
        variant for variant in runtime.variants if variant.stage in stages and shapes.is_steady(variant)
    ]
    for index, variant in enumerate(variants, start=1):
        say = _labelled(on_progress, f"{index}/{len(variants)} {variant}")
        say("building")
        graph, inputs, outputs = freeze_graph(paths[variant.stage], runtime.examples(variant))
        report = PlanReport(**variant._asdict(), inputs=inputs, outputs=outputs, verdict="")
        try:
            plan = library.build(graph, cache / "timings.cache", say)
            session = library.open(plan, inputs, outputs)
        except (PlanBuildError, EngineMismatchError) as error:
            report = replace(report, verdict=f"not built: {error}")
        else:
            path = folder / f"{variant}.plan"
            path.write_bytes(plan)
            report = replace(report, file=path.name, file_hash=hashlib.sha256(plan).hexdigest())
            report = _judge(report, session, runtime, reference, capture, measure or measure_us)
        say(describe(report))
        reports.append(report)
    manifest = Manifest(
        model=name,
        model_hash=engines.name,
        tensorrt_version=library.version,
        device=identity.name,
        compute_capability=identity.compute_capability,
        precision=str(PRECISION).removeprefix("torch."),
        pictures=shapes.pictures,
        rows=shapes.rows,
        plans=tuple(reports),
    )
    partial = folder / "manifest.part"
    partial.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    partial.replace(folder / MANIFEST)
    return manifest


def build_model_plans(
    name: str,
    network: SAM2S,
    *,
    cache: Path,
    pictures: int,
    rows: int,
    on_progress: Callable[[str], None],
) -> Manifest:
    """`build_plans` with TensorRT for this machine's GPU and for any memory policy.

    Raises:
        RuntimeUnavailableError: no TensorRT, no GPU, or too little memory.
    """
    entry = model_entry(name)
    banks = [bank_config(entry, policy.value) for policy in MemoryPolicy]
    library = TensorRtLibrary()
    return build_plans(
        name,
        network,
        device_shapes(banks, pictures=pictures, rows=rows),
        cache=cache,
        library=library,
        identity=identify_gpu(),
        on_progress=on_progress,
    )


def freeze_graph(path: Path, inputs: Sequence[Tensor]) -> tuple[bytes, tuple[str, ...], tuple[str, ...]]:
    """A stage's graph at fixed shapes.

    Args:
        path: of the exported stage, whose rows and slots vary.
        inputs: tensors of the shapes to fix.

    Returns:
        the graph, and the names of its inputs and outputs.
    """
    import onnx  # 0.3 s, which a server that builds no plan can do without

    model = onnx.load(path)
    graph = model.graph
    for value, tensor in zip(graph.input, inputs, strict=True):
        for dimension, size in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
            dimension.Clear()
            dimension.dim_value = size
    # What was inferred with open dimensions; shapes now follow from the inputs.
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    fixed = onnx.shape_inference.infer_shapes(model, data_prop=True)
    names = tuple(tuple(value.name for value in values) for values in (graph.input, graph.output))
    return fixed.SerializeToString(), names[0], names[1]


def _judge(
    report: PlanReport,
    session: Session,
    runtime: CudaRuntime,
    reference: Mapping[str, Callable[..., tuple[Tensor, ...]]],
    capture: Capture,
    measure: Callable[[Run], float],
) -> PlanReport:
    """Compare a plan with eager float32 and with the captured graph, on the same inputs."""
    variant = report.variant
    with torch.inference_mode():
        inputs = runtime.examples(variant)
        expected = reference[variant.stage](*widen(inputs))
        run = capture(session_run(session, inputs, runtime.run_variant(variant, *inputs)))
        comparison = compare_with_graph(run, runtime.captured_run(variant), expected, measure)
    return replace(report, **asdict(comparison))


def _labelled(on_progress: Callable[[str], None], label: str) -> Callable[[str], None]:
    return lambda text: on_progress(f"{label}: {text}")
