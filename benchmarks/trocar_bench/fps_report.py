"""What `bench-fps` says of its runs: tables for people, JSON for programs, what makes a figure doubtful."""

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trocar.telemetry import STAGES
from trocar_bench.frame_log import Figures, slope_per_object
from trocar_bench.speed_run import RunPlan, Usage
from trocar_engines.models import cpu_threads

DEVICE_STAGES = ("encode_image", "attend_memory", "decode_masks", "readback", "write_memory")
"""What the one thread that owns the device does for each frame."""
OTHERS_PERCENT = 10.0
"""Of a core; other work beyond it shows in every wall-clock figure."""
RUNS_ABREAST = 6
"""Columns of a table: as many as 80 characters hold."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run and what it came to.

    Args:
        plan: what was run.
        model: that tracked.
        runtime: that executed it.
        figures: speed and latency.
        usage: of the machine.
    """

    plan: RunPlan
    model: str
    runtime: str
    figures: Figures
    usage: Usage


@dataclass(frozen=True, kw_only=True)
class Slope:
    """What a further object costs.

    Args:
        mode: of the runs.
        streams: of the runs.
        ms: of frame time (unpaced) or median latency (paced), per object.
    """

    mode: str
    streams: int
    ms: float


def find_slopes(reports: Sequence[RunReport]) -> list[Slope]:
    """What a further object costs, for each mode and number of streams that ran several.

    Runs that dropped frames don't count: their latency is that of a queue.
    """
    slopes = []
    for mode, streams in dict.fromkeys((report.plan.mode, report.plan.streams) for report in reports):
        group = [one for one in reports if (one.plan.mode, one.plan.streams) == (mode, streams)]
        group = [one for one in group if not one.figures.dropped]
        ms = slope_per_object([(one.plan.objects, frame_time_ms(one)) for one in group])
        if ms is not None:
            slopes.append(Slope(mode=mode, streams=streams, ms=ms))
    return slopes


def frame_time_ms(report: RunReport) -> float:
    """Time between two results (unpaced), or of a frame's way (paced, where the camera sets the former)."""
    return report.figures.latency_ms.p50 if report.plan.is_live else 1e3 / report.figures.fps


def print_tables(reports: Sequence[RunReport], slopes: Sequence[Slope]) -> None:
    """Print every run in a column of its own, then what follows from them together."""
    console = Console(highlight=False)
    for first in range(0, len(reports), RUNS_ABREAST):
        console.print(_make_table(reports[first : first + RUNS_ABREAST]))
    for slope in slopes:
        group = f"{slope.mode}, {_count(slope.streams, 'stream')}"
        console.print(f"each further object ({group}): {slope.ms:.2f} ms")
    for remark in find_remarks(reports):
        console.print(f"[yellow]{remark}")


def _make_table(reports: Sequence[RunReport]) -> Table:
    table = Table("ms, unless stated")
    for report in reports:
        table.add_column("\n".join(name_run(report.plan).split(", ")), justify="right")
    for rows in (_speed_rows, _latency_rows, _stage_rows, _process_rows):
        columns = [rows(report) for report in reports]
        labels = dict.fromkeys(label for column in columns for label in column)
        for label in labels:
            table.add_row(label, *(column.get(label, "-") for column in columns))
        table.add_section()
    return table


def name_run(plan: RunPlan) -> str:
    """What was run, in words."""
    pace = f"{plan.paced_fps:g}/s" if plan.is_live else "unpaced"
    return ", ".join((plan.mode, _count(plan.objects, "object"), _count(plan.streams, "stream"), pace))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _speed_rows(report: RunReport) -> dict[str, str]:
    figures = report.figures
    return {
        "frames/s": f"{figures.fps:.1f}",
        "spread of windows": _percent(figures.fps_spread) + (" !" if figures.is_unsteady else ""),
        "dropped frames": str(figures.dropped),
        "visible masklets": _percent(figures.visible_share),
    }


def _latency_rows(report: RunReport) -> dict[str, str]:
    figures, since = report.figures, "due" if report.plan.is_live else "sent"
    rows = {f"latency {name}, from {since}": f"{ms:.1f}" for name, ms in asdict(figures.latency_ms).items()}
    if report.plan.is_live:
        rows["of which source late p50"] = f"{figures.source_late_ms.p50:.1f}"
        rows["of which source late p99"] = f"{figures.source_late_ms.p99:.1f}"
    if figures.service_latency_ms is not None:
        service = asdict(figures.service_latency_ms).items()
        rows |= {f"service latency {name}": f"{ms:.1f}" for name, ms in service}
    return rows


def _stage_rows(report: RunReport) -> dict[str, str]:
    medians = report.figures.stages_ms
    # All of them, so that the order is the design's where a run lacks some.
    rows = {f"{stage} p50": f"{medians[stage]:.2f}" if stage in medians else "-" for stage in STAGES}
    rows["between stages p50"] = _figure(report.figures.between_ms, 2)
    return rows | {"device, a tick": f"{device_ms(report):.2f}"}


def _process_rows(report: RunReport) -> dict[str, str]:
    usage = report.usage
    return {
        "client cpu, a frame": _figure(cpu_ms_per_frame(report, usage.cpu.client_percent), 2),
        "server cpu, a frame": _figure(cpu_ms_per_frame(report, usage.cpu.server_percent), 2),
        "others, % of a core": _figure(usage.cpu.others_percent, 0),
        "server rss, MB": _figure(usage.rss_mb, 0),
        "rss growth, MB": _figure(usage.rss_growth_mb, 1),
    }


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def find_remarks(reports: Sequence[RunReport]) -> list[str]:
    """What makes a figure doubtful."""
    remarks = []
    for report in reports:
        name, figures, others = name_run(report.plan), report.figures, report.usage.cpu.others_percent
        if figures.fps_spread is not None and figures.is_unsteady:
            rates = ", ".join(f"{fps:.1f}" for fps in figures.window_fps)
            remarks.append(f"{name}: unsteady, {figures.fps_spread:.0%} between windows ({rates} frames/s)")
        if others is not None and others > OTHERS_PERCENT:
            remarks.append(f"{name}: other work took {others:.0f}% of a core; trust cpu, not wall-clock time")
        if figures.unreported:
            remarks.append(f"{name}: {figures.unreported} frames vanished without a word from the server")
    return remarks


def device_ms(report: RunReport) -> float:
    """What the thread that owns the device spends on a tick, ms."""
    return sum(report.figures.stages_ms.get(stage, 0.0) for stage in DEVICE_STAGES)


def cpu_ms_per_frame(report: RunReport, percent: float | None) -> float | None:
    """CPU time of a process for each result, ms; 100% is one core."""
    return None if percent is None else percent * 10 / report.figures.fps


def describe_run(report: RunReport) -> dict[str, object]:
    """A run as it stands in the JSON."""
    plan, figures, cpu = report.plan, report.figures, report.usage.cpu
    return {
        "mode": plan.mode,
        "model": report.model,
        "runtime": report.runtime,
        "objects": plan.objects,
        "streams": plan.streams,
        "paced_fps": plan.paced_fps,
        "frames": plan.frames,
        "fps": round(figures.fps, 2),
        "window_fps": [round(fps, 2) for fps in figures.window_fps],
        "fps_spread": _round(figures.fps_spread, 4),
        "dropped": figures.dropped,
        "unreported": figures.unreported,
        "latency_from": "due" if plan.is_live else "sent",
        "source_late_ms": _round_all(asdict(figures.source_late_ms)) if plan.is_live else None,
        "latency_ms": _round_all(asdict(figures.latency_ms)),
        "service_latency_ms": (
            _round_all(asdict(figures.service_latency_ms)) if figures.service_latency_ms else None
        ),
        "stages_ms": _round_all(figures.stages_ms),
        "between_stages_ms": _round(figures.between_ms, 3),
        "device_ms": round(device_ms(report), 3),
        "visible_share": _round(figures.visible_share, 4),
        "cpu_percent": {
            "client": _round(cpu.client_percent, 1),
            "server": _round(cpu.server_percent, 1),
            "others": _round(cpu.others_percent, 1),
        },
        "cpu_ms_per_frame": {
            "client": _round(cpu_ms_per_frame(report, cpu.client_percent), 3),
            "server": _round(cpu_ms_per_frame(report, cpu.server_percent), 3),
        },
        "rss_mb": _round(report.usage.rss_mb, 1),
        "rss_growth_mb": _round(report.usage.rss_growth_mb, 2),
    }


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _round_all(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def describe_bench(
    reports: Sequence[RunReport], slopes: Sequence[Slope], resolution: tuple[int, int]
) -> dict[str, object]:
    """Everything as it stands in the JSON."""
    return {
        "commit": find_commit(),
        "versions": find_versions(),
        "hardware": find_hardware(),
        "resolution": "{}x{}".format(*resolution),
        "runs": [describe_run(report) for report in reports],
        "ms_per_object": [asdict(slope) | {"ms": round(slope.ms, 3)} for slope in slopes],
    }


# --- what it ran on -------------------------------------------------------------------------------------


def find_commit() -> str | None:
    """Commit of the code that ran, "-dirty" when it was changed since; None outside a repository."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        # An installed copy can lie in a folder of somebody else's repository.
        git("ls-files", "--error-unmatch", __file__)
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def find_versions() -> dict[str, str]:
    """What the figures depend on."""
    packages = {name: version(name) for name in ("torch", "onnxruntime", "trocar")}
    return {"python": platform.python_version(), **packages}


def find_hardware() -> dict[str, object]:
    """The processor, and the cores that this command may use."""
    return {"cpu": _find_cpu_name(), "cores": cpu_threads()}


def _find_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
