"""TensorRT plans without TensorRT: a fake library whose plans ONNX Runtime executes at bare addresses."""

import ctypes
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from networks import lively_network
from trocar.cli import main
from trocar_engines.errors import EngineMismatchError, PlanBuildError, RuntimeUnavailableError
from trocar_engines.export import example_inputs
from trocar_engines.memory.bank import BankConfig
from trocar_engines.models import bank_config, model_entry
from trocar_engines.plans import (
    DeviceIdentity,
    Manifest,
    build_plans,
    choose_sessions,
    device_shapes,
    open_plans,
    plans_folder,
    read_manifest,
    read_manifests,
)
from trocar_engines.runtime.comparison import USED, Run
from trocar_engines.runtime.cuda import CudaRuntime, DeviceShapes, Variant, call_plainly
from trocar_engines.runtime.tensorrt import TensorRtLibrary

SHAPES = DeviceShapes(pictures=1, rows=2, full_slots=(3,), steady_slots=(3,), most_slots=5)
STAGES = ("encode_image", "track_masks")
GPU = DeviceIdentity(name="Imaginary 9000", compute_capability="9.0")
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class FakeSession:
    def __init__(self, graph: bytes, inputs: Sequence[str], outputs: Sequence[str], noise: float) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._inputs, self._outputs, self._noise = tuple(inputs), tuple(outputs), noise
        self._addresses: dict[str, int] = {}

    def bind(self, inputs: list[int], outputs: list[int]) -> None:
        names = (*self._inputs, *self._outputs)
        self._addresses = dict(zip(names, (*inputs, *outputs), strict=True))

    def enqueue(self, stream: int) -> None:
        feed = {}
        for node in self._session.get_inputs():
            assert all(isinstance(size, int) for size in node.shape), (
                f"{node.name} {node.shape} is not static"
            )
            value = np.empty(node.shape, NUMPY_TYPES[node.type])
            ctypes.memmove(value.ctypes.data, self._addresses[node.name], value.nbytes)
            feed[node.name] = value
        for name, value in zip(self._outputs, self._session.run(self._outputs, feed), strict=True):
            noisy = np.ascontiguousarray(value * (1 + self._noise)).astype(value.dtype)
            ctypes.memmove(self._addresses[name], noisy.ctypes.data, noisy.nbytes)


class FakeLibrary:
    """Plans are graphs in disguise; `noise` spoils their results, `refuses` names what cannot be built."""

    version = "10.9.0"

    def __init__(self, *, noise: float = 0.0, refuses: str = "nothing") -> None:
        self.noise, self.refuses = noise, refuses
        self.timings_found: list[bool] = []

    def build(self, graph: bytes, timing_cache: Path, on_progress: Callable[[str], None]) -> bytes:
        self.timings_found.append(timing_cache.exists())
        if self.refuses in {node.op_type for node in onnx.load_from_string(graph).graph.node}:
            raise PlanBuildError(f"no kernel for {self.refuses}")
        timing_cache.write_bytes(b"timings")
        on_progress("choosing kernels, 3 steps")
        return b"plan" + graph

    def open(self, plan: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> FakeSession:
        return FakeSession(plan.removeprefix(b"plan"), inputs, outputs, self.noise)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def build(
    cache: Path,
    library: FakeLibrary,
    *,
    plan_us: float = 50.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    durations = itertools.cycle((plan_us, 100.0))

    def measure(run: Run) -> float:
        run()
        return next(durations)

    return build_plans(
        "tiny",
        lively_network(),
        SHAPES,
        cache=cache,
        library=library,
        identity=GPU,
        on_progress=on_progress,
        device="cpu",
        capture=call_plainly,
        measure=measure,
        stages=STAGES,
    )


@pytest.fixture(scope="module")
def exported(cache: Path) -> Path:
    build(cache, FakeLibrary())
    return plans_folder(cache, lively_network())


@pytest.fixture
def folder(cache: Path, exported: Path) -> Path:
    """Plans that passed, built anew for each test; the export is cached."""
    build(cache, FakeLibrary())
    return exported


def test_manifest_says_what_was_built_and_how_it_compares(cache: Path, exported: Path) -> None:
    lines: list[str] = []
    library = FakeLibrary()
    manifest = build(cache, library, on_progress=lines.append)
    assert read_manifest(exported) == manifest
    assert read_manifests(cache) == [manifest]
    assert (manifest.device, manifest.compute_capability) == (GPU.name, GPU.compute_capability)
    assert (manifest.tensorrt_version, manifest.precision) == ("10.9.0", "float16")
    assert manifest.model_hash == exported.parent.name
    assert [report.variant for report in manifest.plans] == [
        Variant("track_masks", 2),
        Variant("encode_image", 1),
        Variant("track_masks", 1),
    ]
    for report in manifest.plans:
        assert report.verdict == USED
        assert report.error is not None
        assert report.graph_error is not None
        assert 0 < report.error < 0.02
        assert report.error < 1.5 * report.graph_error
        assert (report.time_us, report.graph_time_us) == (50.0, 100.0)
    assert library.timings_found == [True] * 3, "kernel timings of an earlier build are read"
    assert any("2/3 encode_image-r1: choosing kernels" in line for line in lines)


def test_slower_plans_are_reported_and_not_used(cache: Path, exported: Path) -> None:
    manifest = build(cache, FakeLibrary(), plan_us=120.0)
    assert {report.verdict for report in manifest.plans} == {"not used: slower than the captured graph"}
    with pytest.raises(EngineMismatchError, match="--runtime cuda, or run trocar engines build"):
        open_plans("tiny", exported, SHAPES, library=FakeLibrary(), device=GPU)


@pytest.mark.parametrize(
    ("noise", "reason"),
    [(0.005, "less exact"), (0.1, "exceeds 0.02"), (float("inf"), "not finite")],
)
def test_less_exact_plans_are_reported_and_not_used(
    cache: Path, exported: Path, noise: float, reason: str
) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        manifest = build(cache, FakeLibrary(noise=noise))
    assert all(reason in report.verdict for report in manifest.plans)


def test_stage_that_cannot_be_built_stays_a_graph(cache: Path, exported: Path) -> None:
    manifest = build(cache, FakeLibrary(refuses="Exp"))  # of the readout
    verdicts = {report.variant: report.verdict for report in manifest.plans}
    assert verdicts[Variant("track_masks", 1)] == "not built: no kernel for Exp"
    sessions = open_plans("tiny", exported, SHAPES, library=FakeLibrary(), device=GPU)
    assert list(sessions) == [Variant("encode_image", 1)]


def test_runtime_with_plans_says_so_and_runs_them(folder: Path) -> None:
    sessions = open_plans("tiny", folder, SHAPES, library=FakeLibrary(), device=GPU)
    network = lively_network()
    graphs = CudaRuntime(network, SHAPES, device="cpu", capture=call_plainly)
    plans = CudaRuntime(network, SHAPES, device="cpu", capture=call_plainly, sessions=sessions)
    assert (graphs.name, plans.name) == ("cuda", "tensorrt+cuda")
    assert plans.planned == set(sessions)
    with torch.inference_mode():
        pixels = example_inputs(network, rows=1, slots=1, pointers=1, points=1)["encode_image"][0]
    for value, expected in zip(plans.encode_image(pixels), graphs.encode_image(pixels), strict=True):
        assert value.dtype is expected.dtype
        torch.testing.assert_close(value, expected, atol=0.02, rtol=0.02)
    noisy = open_plans("tiny", folder, SHAPES, library=FakeLibrary(noise=1.0), device=GPU)
    doubled = CudaRuntime(network, SHAPES, device="cpu", capture=call_plainly, sessions=noisy)
    ratio = doubled.encode_image(pixels).embedding.norm() / graphs.encode_image(pixels).embedding.norm()
    assert ratio == pytest.approx(2, abs=0.05), "the plan ran, not the network's code"


def test_islands_of_the_exported_graph_are_float32(exported: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(exported.parent / "track_masks.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types |= {value.name: value.data_type for value in model.graph.initializer}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    found: dict[str, set[int]] = {}
    for node in model.graph.node:
        found.setdefault(node.op_type, set()).update(types[name] for name in node.output if name in types)
    assert found["Exp"] == {full}
    assert found["Log"] == {full}
    assert found["LayerNormalization"] == {full}
    assert half in found["MatMul"] | found.get("Gemm", set())
    assert found["ConvTranspose"] == {half}
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {full}


@pytest.mark.parametrize(
    ("device", "version", "message"),
    [
        (dataclasses.replace(GPU, name="Other"), "10.9.0", "device Imaginary 9000 .9.0. and this is Other"),
        (dataclasses.replace(GPU, compute_capability="8.0"), "10.9.0", "this is Imaginary 9000 .8.0."),
        (GPU, "10.10.1", "TensorRT version 10.9.0 and this is 10.10.1"),
    ],
)
def test_plans_of_another_device_or_version_are_refused_with_the_command(
    folder: Path, device: DeviceIdentity, version: str, message: str
) -> None:
    library = FakeLibrary()
    library.version = version
    with pytest.raises(EngineMismatchError, match=message) as caught:
        open_plans("tiny", folder, SHAPES, library=library, device=device)
    assert str(caught.value).endswith("run trocar engines build --runtime tensorrt --model tiny")


def test_damaged_plans_and_manifests_are_refused_with_the_command(folder: Path) -> None:
    plan = folder / "track_masks-r1.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(EngineMismatchError, match=r"track_masks-r1.plan is missing or damaged; run trocar"):
        open_plans("tiny", folder, SHAPES, library=FakeLibrary(), device=GPU)
    manifest = folder / "manifest.json"
    for text in ("", "[]", json.dumps({"plans": [{"stage": "x"}]}), '{"plans": [], "model": "tiny"}'):
        manifest.write_text(text)
        with pytest.raises(EngineMismatchError, match="not a manifest of plans"):
            open_plans("tiny", folder, SHAPES, library=FakeLibrary(), device=GPU)


def test_other_weights_have_no_plans(cache: Path, folder: Path) -> None:
    other = plans_folder(cache, lively_network(seed=1))
    with pytest.raises(EngineMismatchError, match="no plans in"):
        open_plans("tiny", other, SHAPES, library=FakeLibrary(), device=GPU)


def test_auto_takes_plans_that_passed_and_says_when_it_cannot(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def choose(folder: Path, device: DeviceIdentity, *, is_required: bool) -> int:
        sessions = choose_sessions(
            "tiny",
            folder,
            SHAPES,
            is_required=is_required,
            open_library=FakeLibrary,
            device=device,
            on_progress=said.append,
        )
        return len(sessions)

    assert choose(folder, GPU, is_required=False) == 3
    assert choose(tmp_path, GPU, is_required=False) == 0
    assert said == []
    other = dataclasses.replace(GPU, name="Other")
    assert choose(folder, other, is_required=False) == 0
    assert "captured graphs run instead" in said[0]
    for place, device in ((tmp_path, GPU), (folder, other)):
        with pytest.raises(EngineMismatchError):
            choose(place, device, is_required=True)


def test_interrupted_build_leaves_nothing_to_load(cache: Path, folder: Path) -> None:
    class Interrupted(FakeLibrary):
        def build(self, graph: bytes, timing_cache: Path, on_progress: Callable[[str], None]) -> bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(cache, Interrupted())
    assert read_manifests(cache) == []


def test_shapes_follow_from_the_banks_of_every_policy() -> None:
    base = model_entry("sam2.1-hiera-base-plus-512")
    banks = [bank_config(base, policy) for policy in ("vanilla", "fifo", "spread")]
    shapes = device_shapes(banks, pictures=8, rows=64)
    assert shapes.full_slots == (7, 8, 9, 10, 11, 12, 13, 14)
    assert shapes.steady_slots == (7, 11)
    assert shapes.most_slots == 1 + 6 + 4 + BankConfig().correction_slots + 1
    assert max(variant.rows for variant in shapes.variants()) == 32


def test_missing_tensorrt_is_refused_with_a_remedy() -> None:
    try:
        import tensorrt  # type: ignore[import-not-found]  # noqa: F401
    except Exception:
        with pytest.raises(RuntimeUnavailableError, match=r"pip install .*gpu.*--runtime cuda or onnx"):
            TensorRtLibrary()
    else:
        pytest.skip("TensorRT is installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_engines_command_shows_manifests_and_refuses_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "elsewhere"))
    assert main(["engines", "show"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    shown = folder.parent / "elsewhere" / "trocar" / "engines" / "0" / "plans"
    shown.mkdir(parents=True)
    (shown / "manifest.json").write_text((folder / "manifest.json").read_text())
    assert main(["engines", "show"]) == 0
    (manifest,) = json.loads(capsys.readouterr().out)
    assert manifest["tensorrt_version"] == "10.9.0"
    assert {plan["verdict"] for plan in manifest["plans"]} == {USED}
    for arguments in (
        ["engines", "build", "--runtime", "tensorrt"],
        ["engines", "build", "--runtime", "tensorrt", "--max-objects", "0"],
        ["serve", "--runtime", "cuda"],
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_sessions_import_no_torch() -> None:
    code = "import sys, trocar_engines.runtime.tensorrt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
