"""The runs of `bench-fps` as one picture: latency over time, where the time goes, streams against p99."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trocar.telemetry import STAGES
from trocar_bench.capacity import Capacity
from trocar_bench.fps_report import RunReport, name_run
from trocar_engines.errors import TrocarError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_INCHES = (12.0, 14.0)
DOTS_PER_INCH = 110
LINEAR_RANGE = 10
"""Slowest frame over median; beyond it latency is drawn on a logarithmic axis."""
HEADROOM = 1.1
"""Of an axis over what it shows."""


def draw_plot(path: Path, reports: Sequence[RunReport], capacities: Sequence[Capacity]) -> None:
    """Draw every run into one file.

    Args:
        path: checked with `plotting.check_plot`.
        reports: the runs.
        capacities: what searches for one found.

    Raises:
        TrocarError: there is nothing to draw, or the file cannot be written.
    """
    if not reports:
        raise TrocarError(f"--plot {path}: no run tracked anything that could be drawn")
    # Not pyplot: it would look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=PICTURE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    over_time, breakdown, scaling = figure.subplots(3, 1)
    _draw_latency(over_time, reports)
    _draw_stages(breakdown, reports)
    _draw_streams(scaling, reports, capacities)
    try:
        figure.savefig(path)
    except OSError as error:
        raise TrocarError(f"--plot {path}: cannot be written ({error})") from error


def _draw_latency(axes: "Axes", reports: Sequence[RunReport]) -> None:
    for report in reports:
        line = report.figures.timeline
        axes.plot(line.at_s, line.latency_ms, ".", markersize=2, label=_name(report))
    axes.set(title="Latency of each frame", xlabel="due (paced) or sent (unpaced), s", ylabel="ms")
    slowest_ms = max(report.figures.latency_ms.max for report in reports)
    if slowest_ms > LINEAR_RANGE * min(report.figures.latency_ms.p50 for report in reports):
        # The slowest frames are what matters, and they would flatten all others.
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, HEADROOM * slowest_ms)
    axes.legend(fontsize="small", markerscale=4)


def _draw_stages(axes: "Axes", reports: Sequence[RunReport]) -> None:
    names = [_name(report) for report in reports]
    left = [0.0] * len(reports)
    for stage in STAGES:
        widths = [
            report.figures.stages_ms[stage].p50 if stage in report.figures.stages_ms else 0.0
            for report in reports
        ]
        if any(widths):
            axes.barh(range(len(names)), widths, left=left, label=stage)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set(title="Median of each stage", xlabel="ms")
    axes.legend(fontsize="small", ncols=5, loc="upper center", bbox_to_anchor=(0.4, -0.12))


def _draw_streams(axes: "Axes", reports: Sequence[RunReport], capacities: Sequence[Capacity]) -> None:
    from matplotlib.ticker import MaxNLocator

    groups: dict[str, list[tuple[int, float]]] = {}
    for report in reports:
        name = ", ".join((report.plan.mode, report.runtime, f"{report.plan.objects} per stream"))
        groups.setdefault(name, []).append((report.plan.streams, report.figures.latency_ms.p99))
    for name, points in groups.items():
        streams, p99_ms = zip(*sorted(points), strict=True)
        axes.plot(streams, p99_ms, "o-", label=name)
    for limit_ms in {capacity.limits.p99_ms for capacity in capacities}:
        axes.axhline(limit_ms, linestyle="--", color="grey", label=f"limit {limit_ms:g} ms")
    axes.set(title="Streams against p99", xlabel="streams", ylabel="latency p99, ms")
    axes.set_ylim(0, HEADROOM * max(report.figures.latency_ms.p99 for report in reports))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small")


def _name(report: RunReport) -> str:
    return f"{name_run(report.plan)}, {report.runtime}"
