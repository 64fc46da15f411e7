"""The GPU's runtime on a CPU: everything but the capture itself."""

import copy
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks import TINY, lively_network
from trocar_engines.errors import RuntimeUnavailableError
from trocar_engines.export import StageFunction, example_inputs, stage_functions
from trocar_engines.masklets import Picture, Prompt
from trocar_engines.memory.bank import BankConfig
from trocar_engines.network.attention import RealRoPEAttention
from trocar_engines.network.config import NANO, NETWORKS, HieraConfig, NetworkConfig
from trocar_engines.network.precision import ISLANDS, halve
from trocar_engines.network.sam2s import (
    ChannelNorm,
    Decoded,
    ImageFeatures,
    MemoryView,
    PairPool,
    PromptTensors,
)
from trocar_engines.runtime import cuda
from trocar_engines.runtime.comparison import Run
from trocar_engines.runtime.cuda import (
    COMPILED_STAGES,
    READ_POINTERS,
    Capture,
    CompileStage,
    CudaRuntime,
    DeviceShapes,
    Session,
    Variant,
    call_plainly,
    compile_with_inductor,
)
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.runtime.interface import Runtime
from trocar_engines.tracker import Tracker, TrackerConfig

BANK = BankConfig(recent_slots=2, long_term_slots=2, candidate_iou=0.0, candidate_interval_s=0.0)
SHAPES = DeviceShapes(pictures=2, rows=4, full_slots=(3, 5), steady_slots=(3, 5), most_slots=BANK.most_read)
SMALL_HIERA = dataclasses.replace(
    NETWORKS["sam2.1-hiera-tiny"],
    trunk=HieraConfig(embed_dim=16, num_heads=1, stages=(1, 1, 2, 1), global_att_blocks=(3,)),
    input_size_px=128,
    d_model=64,
    d_memory=16,
    memory_layers=2,
    memory_mlp=128,
)
# The same float32 arithmetic in batches of other sizes.
TOLERANCE = 1e-4
# bfloat16 keeps 8 bits: 0.4% a rounding, some tens of them in a row.
HALF_TOLERANCE = 0.05


def make_runtime(
    *,
    dtype: torch.dtype = torch.float32,
    shapes: DeviceShapes = SHAPES,
    capture: Capture = call_plainly,
) -> CudaRuntime:
    return CudaRuntime(lively_network(), shapes, device="cpu", dtype=dtype, capture=capture)


@pytest.fixture(scope="module")
def runtime() -> CudaRuntime:
    return make_runtime()


def examples(rows: int, slots: int = 2, pointers: int = 3) -> dict[str, tuple[Tensor, ...]]:
    with torch.inference_mode():
        return example_inputs(lively_network(), rows=rows, slots=slots, pointers=pointers, points=2)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 3, 4, 6])
def test_padding_and_splitting_change_no_output(runtime: CudaRuntime, rows: int) -> None:
    inputs, eager = examples(rows), EagerRuntime(lively_network())
    pixels = inputs["encode_image"][0]
    features = eager.encode_image(pixels)
    for value, expected in zip(runtime.encode_image(pixels), features, strict=True):
        torch.testing.assert_close(value, expected, atol=TOLERANCE, rtol=TOLERANCE)
    embedding, *view = inputs["attend_memory"]
    attended = eager.attend_memory(embedding, MemoryView(*view))
    for value, expected in zip(runtime.attend_memory(embedding, MemoryView(*view)), attended, strict=True):
        torch.testing.assert_close(value, expected, atol=TOLERANCE, rtol=TOLERANCE)
    remembered = inputs["track_masks"][-1]
    tracked = eager.track_masks(attended[0], features, remembered)
    masks = runtime.track_masks(attended[0], features, remembered)
    for value, expected in zip(masks, tracked, strict=True):
        torch.testing.assert_close(value, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert tracked.mask_logits.std() > 1e-3
    token, *_, logits = inputs["recognise"]
    seen = eager.recognise(token, pixels, logits)
    for value, expected in zip(runtime.recognise(token, pixels, logits), seen, strict=True):
        torch.testing.assert_close(value, expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert expected.std() > 1e-3


def test_full_banks_take_the_graph_without_bias(runtime: CudaRuntime) -> None:
    embedding, *parts = examples(2, slots=5, pointers=READ_POINTERS)["attend_memory"]
    view = MemoryView(*parts)
    plain = runtime.attend_memory(embedding, view)
    without_bias = runtime.attend_memory(embedding, view, is_full=True)
    torch.testing.assert_close(without_bias[0], plain[0], atol=TOLERANCE, rtol=TOLERANCE)
    # A bias that would hide everything but one slot is not read: what ran was the other graph.
    hiding = view._replace(
        slot_bias=torch.full_like(view.slot_bias, -1e4).index_fill(1, torch.tensor([0]), 0)
    )
    unread = runtime.attend_memory(embedding, hiding, is_full=True)
    torch.testing.assert_close(unread[0], plain[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_outputs_outlive_the_next_call(runtime: CudaRuntime) -> None:
    first, second = examples(2)["encode_image"][0].split(1)
    kept = runtime.encode_image(first)
    before = [maps.clone() for maps in kept]
    runtime.encode_image(second)
    assert all(maps.equal(copy) for maps, copy in zip(kept, before, strict=True))


def test_every_variant_is_captured_once_and_before_the_first_frame() -> None:
    runs: list[int] = []

    def count(run: Run) -> Run:
        index = len(runs)
        runs.append(0)

        def counted() -> tuple[Tensor, ...]:
            runs[index] += 1
            return run()

        return counted

    runtime = make_runtime(capture=count)
    assert len(runs) == len(set(runtime.variants)) == 2 + 3 * (1 + 2) + 2 * 3 + 2
    assert runtime.variants[0].rows == 4
    assert sum(runs) == 0
    runtime.encode_image(examples(1)["encode_image"][0])
    assert sum(runs) == 1
    assert runs[runtime.variants.index(Variant("encode_image", 1))] == 1


def test_twelve_pictures_are_not_padded_to_sixteen() -> None:
    shapes = DeviceShapes(pictures=12, rows=1, full_slots=(), steady_slots=(), most_slots=3)
    rows = [variant.rows for variant in shapes.variants() if variant.stage == "encode_image"]
    assert rows == [12, 8, 6, 4, 2, 1]


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_tracker_gives_eagers_masks_through_graphs(
    runtime: CudaRuntime, is_asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "is_asynchronous", is_asynchronous)
    expected, masks = track(EagerRuntime(lively_network())), track(runtime)
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(masks, expected, atol=TOLERANCE)


def track(runtime: Runtime) -> np.ndarray:
    """Masks of two objects over 24 frames: banks that are empty, padded, uneven and full.

    Each next picture is announced, so that a GPU encodes it ahead.
    """
    tracker = Tracker(runtime, TrackerConfig(rows=2, bank=BANK))
    stream = tracker.open_stream(BANK, 2)
    rng = np.random.default_rng(0)
    size, masks = TINY.input_size_px, []
    pictures = [
        Picture(
            frame_id=frame,
            pixels=rng.integers(0, 255, (size, size, 3), dtype=np.uint8),
            width_px=size,
            height_px=size,
            time_s=frame / 30,
        )
        for frame in range(24)
    ]
    for frame, picture in enumerate(pictures):
        coming = pictures[frame + 1 : frame + 2]
        step = tracker.step([stream], [picture], coming=functools.partial(list, coming))
        tracker.remember(step)
        if frame in (0, 3):
            point = (10.0 + 12 * frame, 30.0)
            prompt = Prompt(object_id=frame + 1, frame_id=frame, points=(point,), labels=(1,))
            masks.append(tracker.prompt(stream, prompt).masklet.mask_logits)
        if frame == 6:
            painted = np.zeros((size, size), dtype=np.bool_)
            painted[10:40, 20:50] = True
            prompt = Prompt(object_id=1, frame_id=frame, mask=painted)
            masks.append(tracker.prompt(stream, prompt).masklet.mask_logits)
        masks += [masklet.mask_logits for masklet in step.results[0].masklets]
    return np.stack(masks)


@pytest.mark.parametrize("config", [TINY, SMALL_HIERA], ids=["conv", "hiera"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_float32_norms", [True, False])
def test_half_precision_stays_near_float32_at_every_stage(
    dtype: torch.dtype, config: NetworkConfig, has_float32_norms: bool
) -> None:
    network = lively_network(config)
    with torch.inference_mode():
        inputs = example_inputs(network, rows=2, slots=5, pointers=READ_POINTERS, points=2)
        plain = stage_functions(network)
        halved = stage_functions(halve(network, dtype, has_float32_norms=has_float32_norms))
        for stage, tensors in inputs.items():
            outputs = zip(plain[stage](*tensors), halved[stage](*tensors), strict=True)
            errors = [relative(value, expected) for expected, value in outputs if expected.numel()]
            assert max(errors) < HALF_TOLERANCE, stage
            assert (max(errors) > 0) == (stage != "recognise"), "the heads stay float32"


def test_islands_stay_float32() -> None:
    network = halve(lively_network(), torch.bfloat16)
    half: set[str] = set()
    full: set[str] = set()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            (half if layer.weight.dtype is torch.bfloat16 else full).add(name)
    assert full == {name for name in half | full if name.startswith(ISLANDS)}
    assert len(half) > len(full)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    kept = ("norm", "cos", "sin", "position", "tpos_enc", "vectors", "place")
    assert all(value.dtype is torch.float32 for name, value in tensors.items() if name.endswith(kept))
    inputs = examples(1)
    with torch.inference_mode():
        decoded = Decoded(*stage_functions(network)["track_masks"](*inputs["track_masks"]))
    assert {decoded.mask_logits.dtype, decoded.predicted_iou.dtype, decoded.presence_logit.dtype} == {
        torch.float32
    }


@pytest.mark.parametrize("config", [TINY, SMALL_HIERA], ids=["conv", "hiera"])
def test_what_is_settled_for_inference_changes_no_output(config: NetworkConfig) -> None:
    network = lively_network(config)
    with torch.inference_mode():
        inputs = example_inputs(network, rows=2, slots=5, pointers=READ_POINTERS, points=2)
        plain, settled = stage_functions(network), stage_functions(halve(network, torch.float32))
        for stage, tensors in inputs.items():
            for value, expected in zip(settled[stage](*tensors), plain[stage](*tensors), strict=True):
                torch.testing.assert_close(value, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_half_norms_leave_no_float32_between_blocks() -> None:
    network = halve(lively_network(SMALL_HIERA), torch.float16, has_float32_norms=False)
    passed: set[torch.dtype] = set()
    for block in (*network.image_encoder.trunk.blocks, *network.memory_attention.layers):
        for norm in (module for name, module in block.named_modules() if "norm" in name):
            norm.register_forward_hook(lambda _norm, inputs, _normed: passed.add(inputs[0].dtype))
    with torch.inference_mode():
        inputs = example_inputs(network, rows=1, slots=3, pointers=READ_POINTERS, points=1)
        stage_functions(network)["attend_full"](*inputs["attend_full"])
    assert passed == {torch.float16}


def test_pooling_by_pairs_changes_no_output() -> None:
    network = copy.deepcopy(lively_network(SMALL_HIERA))
    pixels = torch.randint(0, 256, (2, 128, 128, 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network.encode_image(pixels)
        network.image_encoder.trunk.pool_by_pairs()
        assert any(isinstance(module, PairPool) for module in network.modules())
        for value, maps in zip(network.encode_image(pixels), expected, strict=True):
            torch.testing.assert_close(value, maps, atol=0, rtol=0)


@pytest.mark.parametrize("channels", [4, 16])
def test_norm_over_few_channels_equals_the_one_operator(channels: int) -> None:
    norm = ChannelNorm(channels)
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    maps = 3 + torch.randn(2, channels, 8, 8, generator=generator)
    torch.testing.assert_close(norm.norm_few(maps), norm(maps), atol=1e-5, rtol=1e-5)


def test_half_leaves_the_network_it_was_given_alone() -> None:
    network = lively_network()
    halve(network, torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_readback_is_one_tensor_and_equals_what_was_packed(runtime: CudaRuntime) -> None:
    inputs = examples(3)
    conditioned, stride_4, stride_8, keys, points, labels, mask, *flags = inputs["decode_prompt"]
    decoded = runtime.decode_prompt(
        conditioned,
        ImageFeatures(conditioned, stride_4, stride_8, keys),
        PromptTensors(points, labels, mask, flags[0]),
        flags[1],
    )
    for value, expected in zip(runtime.read_back(decoded)(), decoded, strict=True):
        assert value.equal(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused_with_a_remedy() -> None:
    with pytest.raises(RuntimeUnavailableError, match="--runtime onnx"):
        CudaRuntime(lively_network(), SHAPES)


def test_network_too_large_for_the_device_is_refused_with_a_remedy() -> None:
    def fail(run: Run) -> Run:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    with pytest.raises(RuntimeUnavailableError, match=r"does not fit.*smaller --max-streams"):
        make_runtime(capture=fail)


class FakeCompiler:
    """Compiles a stage into itself, with a change to its outputs.

    `runs` counts the runs of what was compiled by the number of its inputs, which tells stages apart, and by
    rows.
    """

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda maps: maps) -> None:
        self.change = change
        self.runs: dict[tuple[int, int], int] = {}

    def __call__(self, function: StageFunction, inputs: tuple[Tensor, ...]) -> StageFunction:
        compiled_for = len(inputs), len(inputs[0])
        self.runs[compiled_for] = 0

        def compiled(*tensors: Tensor) -> tuple[Tensor, ...]:
            self.runs[compiled_for] += 1
            return tuple(map(self.change, function(*tensors)))

        return compiled


def compile_only(monkeypatch: pytest.MonkeyPatch, stages: tuple[str, ...], *, rows: tuple[int, ...]) -> None:
    monkeypatch.setattr(cuda, "COMPILED_STAGES", stages)
    monkeypatch.setattr(cuda, "COMPILED_ROWS", rows)


def make_compiled(
    compile_stage: CompileStage, *, compiled_us: float = 50.0, shapes: DeviceShapes = SHAPES
) -> CudaRuntime:
    durations = itertools.cycle((compiled_us, 100.0))
    return CudaRuntime(
        lively_network(),
        shapes,
        device="cpu",
        dtype=torch.bfloat16,
        capture=call_plainly,
        compile_stage=compile_stage,
        measure=lambda _: next(durations),
    )


def test_compiled_stages_that_win_run_in_the_place_of_captured_ones(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_only(monkeypatch, ("encode_image", "attend_full"), rows=(1, 4))
    compiler = FakeCompiler()
    with caplog.at_level(logging.INFO):
        runtime = make_compiled(compiler, shapes=dataclasses.replace(SHAPES, pictures=6, steady_slots=(5,)))
    assert runtime.name == "cuda+inductor"
    assert sorted(map(str, runtime.compiled)) == [
        "attend_full-r1-k5",
        "attend_full-r4-k5",
        "encode_image-r1",
        "encode_image-r4",
    ]
    assert "encode_image-r1 compiled: used; 50 µs against 100, error" in caplog.text
    before = dict(compiler.runs)
    inputs = examples(6)["encode_image"][0]
    for value, expected in zip(
        runtime.encode_image(inputs[:3]), make_runtime().encode_image(inputs[:3]), strict=True
    ):
        assert relative(value, expected) < HALF_TOLERANCE
    assert compiler.runs == {**before, (1, 4): before[1, 4] + 1}, "three pictures run in the graph of four"
    runtime.encode_image(inputs)
    assert compiler.runs == {**before, (1, 4): before[1, 4] + 1}, "nothing was compiled for six"


@pytest.mark.parametrize(
    ("change", "compiled_us", "reason"),
    [
        (lambda maps: maps * 1.1, 50.0, "relative error"),
        (lambda maps: maps * 1.015, 50.0, "less exact than the captured graph"),
        (lambda maps: maps / 0, 50.0, "not finite"),
        (lambda maps: maps, 120.0, "slower than the captured graph; 120 µs against 100"),
    ],
    ids=["wrong", "less-exact", "not-finite", "slower"],
)
def test_compiled_stage_that_is_less_exact_or_slower_is_logged_and_not_used(
    change: Callable[[Tensor], Tensor],
    compiled_us: float,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_only(monkeypatch, ("encode_image",), rows=(1, 2))
    compiler = FakeCompiler(change)
    runtime = make_compiled(compiler, compiled_us=compiled_us)
    assert (runtime.name, runtime.compiled) == ("cuda", frozenset())
    (first, _) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert reason in first.getMessage()
    before = dict(compiler.runs)
    runtime.encode_image(examples(1)["encode_image"][0])
    assert compiler.runs == before


def test_stage_that_cannot_be_compiled_is_logged_and_stays_a_captured_graph(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def compile_unreadable(function: StageFunction, inputs: tuple[Tensor, ...]) -> StageFunction:
        def breaks_the_graph(*tensors: Tensor) -> tuple[Tensor, ...]:
            torch._dynamo.graph_break()
            return function(*tensors)

        return compile_with_inductor(breaks_the_graph, inputs, cache=tmp_path)

    runtime = make_compiled(compile_unreadable)
    assert (runtime.name, runtime.compiled) == ("cuda", frozenset())
    messages = [record.getMessage() for record in caplog.records if record.name == cuda.__name__]
    assert {message.split("-")[0] for message in messages} == set(COMPILED_STAGES)
    assert len(messages) == len(COMPILED_STAGES), "once of each stage, whatever its sizes"
    for message in messages:
        assert "torch could not compile it (Unsupported: " in message
        assert "install triton and a C compiler" in message
        assert message.endswith("--no-compile; the captured graph runs instead")
    runtime.encode_image(examples(1)["encode_image"][0])


def test_a_compiled_stage_for_which_memory_is_short_leaves_the_captured_graph(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_only(monkeypatch, ("encode_image",), rows=(1, 2))

    def exhaust(maps: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    runtime = make_compiled(FakeCompiler(exhaust))
    assert (runtime.name, runtime.compiled) == ("cuda", frozenset())
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "out of memory; the captured graph runs instead" in warning.getMessage()


def test_plans_come_before_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_only(monkeypatch, ("encode_image",), rows=(1,))
    shapes = DeviceShapes(pictures=1, rows=1, full_slots=(), steady_slots=(), most_slots=3)

    class IdlePlan:
        def bind(self, inputs: list[int], outputs: list[int]) -> None:
            pass

        def enqueue(self, stream: int) -> None:
            pass

    compiler = FakeCompiler()

    def make(sessions: Mapping[Variant, Session]) -> CudaRuntime:
        return CudaRuntime(
            lively_network(),
            shapes,
            device="cpu",
            capture=call_plainly,
            sessions=sessions,
            compile_stage=compiler,
            measure=lambda _: 0.0,
        )

    make({Variant("encode_image", 1): IdlePlan()})
    assert compiler.runs == {}
    make({Variant("track_masks", 1): IdlePlan()})
    assert list(compiler.runs) == [(1, 1)]


@pytest.mark.parametrize("stage", COMPILED_STAGES)
@pytest.mark.parametrize("config", [TINY, SMALL_HIERA], ids=["conv", "hiera"])
def test_stage_is_one_graph_to_the_compiler(config: NetworkConfig, stage: str) -> None:
    network = halve(lively_network(config), torch.bfloat16, has_float32_norms=False)
    # As on a GPU, whose captured graphs turn pairs as complex numbers.
    for module in network.modules():
        if isinstance(module, RealRoPEAttention):
            module.use_complex(torch.complex64)
    function = stage_functions(network)[stage]
    with torch.inference_mode():
        inputs = example_inputs(network, rows=2, slots=3, pointers=READ_POINTERS, points=1)[stage]
        compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
        for value, expected in zip(compiled(*inputs), function(*inputs), strict=True):
            torch.testing.assert_close(value, expected, atol=0, rtol=0)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_inductor_compiles_nanos_stages_as_exact_as_the_captured_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_only(monkeypatch, COMPILED_STAGES, rows=(1,))
    network = lively_network(NANO)
    durations = itertools.cycle((50.0, 100.0))
    runtime = CudaRuntime(
        network,
        DeviceShapes(pictures=1, rows=1, full_slots=(3,), steady_slots=(3,), most_slots=3),
        compile_stage=functools.partial(compile_with_inductor, cache=tmp_path),
        # Whether it is faster is bench-fps' to say, on a GPU that does nothing else.
        measure=lambda _: next(durations),
    )
    assert {variant.stage for variant in runtime.compiled} == set(COMPILED_STAGES)
    with torch.inference_mode():
        (pixels,) = example_inputs(network, rows=1, slots=1, pointers=1, points=1)["encode_image"]
        for value, expected in zip(runtime.encode_image(pixels), network.encode_image(pixels), strict=True):
            assert relative(value.cpu(), expected) < HALF_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_captured_graphs_give_eagers_masks() -> None:
    expected = track(EagerRuntime(lively_network()))
    # Else convolutions round to TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        on_gpu = track(CudaRuntime(lively_network(), SHAPES, dtype=torch.float32))
    np.testing.assert_allclose(on_gpu, expected, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_captured_half_precision_stays_near_float32_at_every_stage(rows: int) -> None:
    network = lively_network(SMALL_HIERA)
    runtime = CudaRuntime(network, SHAPES)
    with torch.inference_mode():
        inputs = example_inputs(network, rows=rows, slots=5, pointers=READ_POINTERS, points=2)
        plain = stage_functions(network)
        for stage in ("encode_image", "attend_memory", "attend_full", "track_masks", "encode_memory"):
            outputs = zip(
                plain[stage](*inputs[stage]), run_captured(runtime, stage, inputs[stage]), strict=True
            )
            errors = [relative(value.cpu(), expected) for expected, value in outputs if expected.numel()]
            assert max(errors) < HALF_TOLERANCE, stage


def run_captured(runtime: CudaRuntime, stage: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if stage == "encode_image":
        return runtime.encode_image(*tensors)
    if stage in ("attend_memory", "attend_full"):
        embedding, *view = (tensor.cuda() for tensor in tensors)
        return runtime.attend_memory(embedding, MemoryView(*view), is_full=stage == "attend_full")
    if stage == "track_masks":
        conditioned, stride_4, stride_8, keys, prototypes = tensors
        features = ImageFeatures(conditioned, stride_4, stride_8, keys)
        return runtime.track_masks(conditioned, features, prototypes)
    embedding, keys, *rest = tensors
    return runtime.encode_memory(ImageFeatures(embedding, keys, keys, keys), *rest)
