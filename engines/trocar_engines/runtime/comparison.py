"""What takes the place of a captured graph: as exact against float32, and faster.

One judge for TensorRT's plans and for stages that torch compiled.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ERROR = 0.02
"""Relative error against eager float32 that nothing may exceed; half precision alone makes some 1e-3."""
EXACTNESS_MARGIN = 1.5
"""An error over the captured graph's: the same precision, sums in another order."""
TIMED_RUNS = 20
TIMED_BLOCKS = 5
USED = "used"
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run against the captured graph that it would replace.

    Args:
        error: largest relative error of an output against eager float32.
        graph_error: that of the captured graph.
        time_us: median time of a run, and `graph_time_us` of the captured graph.
        verdict: `USED`, or why not.
    """

    error: float | None = None
    graph_error: float | None = None
    time_us: float | None = None
    graph_time_us: float | None = None
    verdict: str


def compare_with_graph(
    run: Run, graph: Run, expected: Sequence[Tensor], measure: Callable[[Run], float]
) -> Comparison:
    """Judge a run by the captured graph of the same inputs.

    Args:
        run: what would take the graph's place; like the graph, it may overwrite outputs of either.
        graph: captured.
        expected: outputs of eager float32.
        measure: microseconds of a run.
    """
    error, graph_error = largest_error(run(), expected), largest_error(graph(), expected)
    time_us, graph_time_us = measure(run), measure(graph)
    if not math.isfinite(error):
        return Comparison(verdict="not used: a value is not finite")
    if error > MOST_ERROR:
        verdict = f"not used: relative error {error:.1e} exceeds {MOST_ERROR:g}"
    elif error > EXACTNESS_MARGIN * graph_error:
        verdict = "not used: less exact than the captured graph"
    elif time_us >= graph_time_us:
        verdict = "not used: slower than the captured graph"
    else:
        verdict = USED
    return Comparison(
        error=error,
        graph_error=graph_error,
        time_us=time_us,
        graph_time_us=graph_time_us,
        verdict=verdict,
    )


def describe(comparison: Comparison) -> str:
    """A verdict and the figures it rests on, as a line of text."""
    if comparison.time_us is None or comparison.graph_time_us is None:
        return comparison.verdict
    return (
        f"{comparison.verdict}; {comparison.time_us:.0f} µs against {comparison.graph_time_us:.0f}, "
        f"error {comparison.error:.1e} against {comparison.graph_error:.1e}"
    )


def widen(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inputs of half precision as eager float32 takes them."""
    return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)


def largest_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest norm of a difference over that of what was expected; infinite where a value is not finite."""
    errors = [0.0]
    for value, truth in zip(values, expected, strict=True):
        if not value.isfinite().all():
            return float("inf")
        if truth.numel():
            difference = (value.float() - truth).norm() / truth.norm().clamp(min=1e-6)
            errors.append(float(difference))
    return max(errors)


def measure_us(run: Run) -> float:
    """Median time of a run over blocks of runs, the device waited for once a block."""
    durations = []
    for _ in range(1 + TIMED_BLOCKS):
        torch.cuda.synchronize()
        began = time.perf_counter_ns()
        for _ in range(TIMED_RUNS):
            run()
        torch.cuda.synchronize()
        durations.append((time.perf_counter_ns() - began) / TIMED_RUNS / 1e3)
    return statistics.median(durations[1:])
