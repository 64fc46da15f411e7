"""What the device could do at most, what the network asks of it, and so which share of it a run reaches.

Two ceilings, measured in the same process as the runs, since a data sheet knows nothing of the clocks, the
cooling and the neighbours of this machine:

- arithmetic: the rate of a large matrix product, in fp32, on a GPU also in fp16, on a CPU that has bf16
  also in that;
- bandwidth: the rate of copying a tensor far larger than any cache, bytes read plus bytes written.

What a stage asks is counted, not measured: `FlopCounterMode` adds up the multiplications and additions of
its matrix products, convolutions and attentions (2 for each pair; elementwise work is left out), on the meta
device, which knows shapes only. Its bytes are the least that must move: the weights it reads, and the inputs
and outputs of every object, each once. Neither depends on the runtime: one that moves more than it must shows
as a low share.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trocar_engines.memory.bank import BankConfig
from trocar_engines.memory.pool import RECENT_POINTERS, MemoryPool
from trocar_engines.network.config import NetworkConfig
from trocar_engines.network.readout import READOUT_SLOTS
from trocar_engines.network.sam2s import SAM2S, ImageFeatures, MemoryView
from trocar_engines.runtime.openvino import PICTURES, OpenVinoRuntime, has_bfloat16

MATRIX_SIZES = {"cpu": (384, 1_536), "cuda": (4_096, 8_192)}
"""Sides of the square matrices, of which the better one counts: a large one keeps many threads busy, a small
one is done before other work on the machine interrupts it."""
COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
"""Beyond any cache."""
COPY_PIECES = {"cpu": 16, "cuda": 1}
"""Copied in turn and timed each, for the same reason."""
MEASURE_S = 0.3
"""Of each: the best of the repetitions that fit, since what is sought is what the device can do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the device did at most.

    Args:
        device: "cpu" or "cuda".
        threads: that the CPU's ceilings were measured with, one a core; a server takes one less.
        fp32_gflops: 10^9 floating point operations a second of a matrix product; on a GPU without TF32.
        fp16_gflops: the same in half precision; None on a CPU.
        bf16_gflops: the same in bfloat16; None on a GPU, and on a CPU without it.
        copy_gb_s: 10^9 bytes a second, read plus written.
    """

    device: str
    threads: int
    fp32_gflops: float
    fp16_gflops: float | None
    bf16_gflops: float | None
    copy_gb_s: float

    def gflops(self, runtime: str, stage: str) -> float:
        """The ceiling of a stage in the precision that a runtime runs it in."""
        if (runtime, stage) == (OpenVinoRuntime.name, PICTURES) and self.bf16_gflops:
            return self.bf16_gflops
        return self.fp16_gflops or self.fp32_gflops


def measure_ceilings(device: str, threads: int) -> Ceilings:
    """Measure both ceilings; takes one to two seconds.

    Args:
        device: "cpu" or "cuda".
        threads: for the CPU.
    """
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Ceilings(
            device=device,
            threads=threads,
            fp32_gflops=_measure_product(device, torch.float32),
            fp16_gflops=_measure_product(device, torch.float16) if device == "cuda" else None,
            bf16_gflops=_measure_product(device, torch.bfloat16)
            if device == "cpu" and has_bfloat16()
            else None,
            copy_gb_s=_measure_copy(device),
        )
    finally:
        torch.set_num_threads(former)


def keep_best(before: Ceilings, after: Ceilings) -> Ceilings:
    """The higher of two measurements: whatever held one of them back was not the device."""

    def higher(*rates: float | None) -> float | None:
        return max((rate for rate in rates if rate is not None), default=None)

    return Ceilings(
        device=before.device,
        threads=before.threads,
        fp32_gflops=max(before.fp32_gflops, after.fp32_gflops),
        fp16_gflops=higher(before.fp16_gflops, after.fp16_gflops),
        bf16_gflops=higher(before.bf16_gflops, after.bf16_gflops),
        copy_gb_s=max(before.copy_gb_s, after.copy_gb_s),
    )


def _measure_product(device: str, dtype: torch.dtype) -> float:
    return max(_measure_product_of(size, device, dtype) for size in MATRIX_SIZES[device])


def _measure_product_of(size: int, device: str, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / 1e9 / _best_s(lambda: torch.mm(left, right, out=product), device)


def _measure_copy(device: str) -> float:
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    pieces = list(zip(*(whole.chunk(COPY_PIECES[device]) for whole in (target, source)), strict=True))
    # Round and round, so that a piece has left the caches when its turn comes again.
    turns = itertools.cycle(pieces)

    def copy_piece() -> None:
        to, origin = next(turns)
        to.copy_(origin)

    piece_bytes: int = pieces[0][0].nbytes
    return 2 * piece_bytes / 1e9 / _best_s(copy_piece, device)


def _best_s(work: Callable[[], object], device: str) -> float:
    """Seconds of the quickest repetition; the first, which warms up, does not count."""
    wait = torch.cuda.synchronize if device == "cuda" else _do_nothing
    work()
    wait()
    best_s, ends_s = float("inf"), time.perf_counter() + MEASURE_S
    while time.perf_counter() < ends_s:
        began_s = time.perf_counter()
        work()
        wait()
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s


def _do_nothing() -> None:
    return None


# --- what the network asks ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """What one stage asks for one picture with all its objects.

    Args:
        gflop: 10^9 multiplications and additions.
        mb: 10^6 bytes that must move at least, in fp32.
    """

    gflop: float
    mb: float


def count_costs(config: NetworkConfig, bank: BankConfig, objects: int) -> dict[str, StageCost]:
    """What each stage of a picture asks once the memory of its objects is full.

    Args:
        config: of the network.
        bank: of its memory; correction slots, which a run has no use for, are left out.
        objects: on the picture.
    """
    network = SAM2S(config).eval().requires_grad_(False).to("meta")
    slots, pointers = 1 + bank.recent_slots + bank.long_term_slots, 1 + RECENT_POINTERS
    pool = MemoryPool(config, rows=objects, slots=slots, device="meta")
    costs: dict[str, StageCost] = {}

    def count(stage: str, run: Callable[..., Any], *inputs: Tensor) -> Any:
        with _counting(costs, stage, inputs) as note:
            outputs = run(*inputs)
            note(outputs)
        return outputs

    with torch.device("meta"), torch.inference_mode():
        pixels = torch.empty(1, config.input_size_px, config.input_size_px, 3, dtype=torch.uint8)
        features = count("encode_image", network.encode_image, pixels)
        features = ImageFeatures(*(maps.expand(objects, -1, -1, -1) for maps in features))
        view = MemoryView(
            spatial=pool.spatial,
            slot_time=torch.zeros(objects, slots, dtype=torch.int64),
            slot_bias=torch.empty(objects, slots),
            pointers=pool.pointers[:, :pointers],
            pointer_age=torch.empty(objects, pointers),
            pointer_bias=torch.empty(objects, pointers),
        )
        conditioned, _ = count(
            "attend_memory",
            lambda embedding, *memory: network.attend_memory(embedding, MemoryView(*memory)),
            features.embedding,
            *view,
        )
        count(
            "write_memory",
            network.encode_memory,
            features.embedding,
            features.keys,
            torch.empty(objects, config.mask_size, config.mask_size),
            torch.empty(objects),
            torch.empty(objects, dtype=torch.bool),
        )
        count(
            "decode_masks",
            network.track_masks,
            conditioned,
            *features[1:],
            pool.prototypes[:, :READOUT_SLOTS],
        )
    return costs


@contextmanager
def _counting(
    costs: dict[str, StageCost], stage: str, inputs: tuple[Tensor, ...]
) -> Iterator[Callable[[Any], None]]:
    """Count what happens inside; the stage hands its outputs to what this yields."""
    outputs: list[Tensor] = []

    def note(result: Any) -> None:
        outputs.extend([result] if isinstance(result, Tensor) else result)

    with FlopCounterMode(display=False) as flops, _WeightWatch() as weights:
        yield note
    moved = sum(tensor.nbytes for tensor in (*inputs, *outputs)) + weights.nbytes
    costs[stage] = StageCost(gflop=flops.get_total_flops() / 1e9, mb=moved / 1e6)


class _WeightWatch(TorchDispatchMode):
    """Adds up the bytes of every parameter that an operation touches, each once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Of the parameters touched."""
        return sum(self._seen.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, nn.Parameter):
                    self._seen[id(one)] = one.nbytes
        return func(*args, **(kwargs or {}))
