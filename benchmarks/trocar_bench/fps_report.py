"""What `bench-fps` says of its runs: tables for people, JSON for programs, what makes a figure doubtful."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trocar.telemetry import STAGES
from trocar_bench.capacity import ROWS, Capacity
from trocar_bench.ceilings import Ceilings, StageCost
from trocar_bench.frame_log import Added, Figures, Percentiles, slope_per_object
from trocar_bench.mask_comparison import LogitDifference
from trocar_bench.serve_process import ServerStart
from trocar_bench.speed_run import RunPlan, Usage
from trocar_engines.gpu_meter import GpuMeter
from trocar_engines.models import cpu_threads

DEVICE_STAGES = ("encode_image", "attend_memory", "decode_masks", "readback", "write_memory")
"""What the one thread that owns the device does for each frame."""
OTHERS_PERCENT = 10.0
"""Of a core; other work beyond it shows in every wall-clock figure."""
RUNS_ABREAST = 6
"""Columns of a table: as many as 80 characters hold."""
ADDED_P99_TARGETS_MS = {"server": 3.0, "client": 8.0}
"""What the service may add to decoding and tracking, paced at 60 frames/s."""
START_TARGET_S = 3.0
"""From the start of `trocar serve` to SERVING, with engines at hand."""
DROPS_TOLD = 1_000
"""Ids of dropped frames that a run's JSON lists at most, all streams together."""
DROPS_SHOWN = 10
"""And a remark."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Our engine against sam2's predictor, in turn on the same frames.

    Args:
        ratio: the engine's frames a second over the reference's, of all blocks together.
        cpu_ratio: the reference's CPU time a frame over the engine's, which other work on the machine changes
            less; on a GPU it says little.
        window_ratios: the same of each block.
        difference: of their mask logits.
    """

    ratio: float
    cpu_ratio: float
    window_ratios: tuple[float, ...]
    difference: LogitDifference


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run and what it came to.

    Args:
        plan: what was run.
        model: that tracked.
        runtime: that executed it.
        figures: speed and latency.
        usage: of the machine.
        costs: what each stage of a frame asks, empty for a network that nobody can count.
        comparison: with the reference, where one ran in turn.
    """

    plan: RunPlan
    model: str
    runtime: str
    figures: Figures
    usage: Usage
    costs: Mapping[str, StageCost] = field(default_factory=dict)
    comparison: Comparison | None = None


def compare_runs(engine: RunReport, reference: RunReport, difference: LogitDifference) -> Comparison:
    """Put two runs of the same frames side by side, block by block."""
    windows = zip(engine.figures.window_fps, reference.figures.window_fps, strict=True)
    ours, theirs = (one.usage.cpu.client_percent / one.figures.fps for one in (engine, reference))
    return Comparison(
        ratio=engine.figures.fps / reference.figures.fps,
        cpu_ratio=theirs / ours,
        window_ratios=tuple(mine / its for mine, its in windows),
        difference=difference,
    )


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Everything that one command measured.

    Args:
        runs: in order.
        capacities: what searches for one found.
        ceilings: of the device.
        gpu: it, or why there is none.
        resolution: of the source, width and height in pixels.
        weights: what the model was loaded with, in words.
        start: of the server; None without one.
    """

    runs: Sequence[RunReport]
    capacities: Sequence[Capacity]
    ceilings: Ceilings
    gpu: GpuMeter
    resolution: tuple[int, int]
    weights: str
    start: ServerStart | None = None


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the device's ceilings.

    Args:
        arithmetic: of its rate of matrix products, 0 to 1.
        bandwidth: of its rate of copying, 0 to 1.
    """

    arithmetic: float
    bandwidth: float


def find_shares(costs: Mapping[str, StageCost], runtime: str, seconds: float, ceilings: Ceilings) -> Shares:
    """Share of the ceilings that stages reach which take so long together."""
    return Shares(
        arithmetic=sum(cost.gflop / ceilings.gflops(runtime, stage) for stage, cost in costs.items())
        / seconds,
        bandwidth=sum(cost.mb for cost in costs.values()) / 1e3 / seconds / ceilings.copy_gb_s,
    )


def find_run_shares(report: RunReport, ceilings: Ceilings) -> Shares | None:
    """Share of the ceilings that a whole run reaches; None where the network's work is not known."""
    if not report.costs or not report.figures.fps:
        return None
    return find_shares(report.costs, report.runtime, 1 / report.figures.fps, ceilings)


def find_stage_shares(report: RunReport, ceilings: Ceilings) -> dict[str, Shares]:
    """The same of each stage at its median time; empty for several streams, whose pictures share a batch."""
    if report.plan.streams > 1:
        return {}
    medians = {stage: times.p50 for stage, times in report.figures.stages_ms.items()}
    return {
        stage: find_shares({stage: cost}, report.runtime, medians[stage] / 1e3, ceilings)
        for stage, cost in report.costs.items()
        if medians.get(stage)
    }


@dataclass(frozen=True, kw_only=True)
class Slope:
    """What a further object costs.

    Args:
        mode: of the runs.
        runtime: of the runs.
        streams: of the runs.
        ms: of frame time (unpaced) or median latency (paced), per object.
    """

    mode: str
    runtime: str
    streams: int
    ms: float


def find_slopes(reports: Sequence[RunReport]) -> list[Slope]:
    """What a further object costs, for each mode and number of streams that ran several.

    Runs that dropped frames don't count: their latency is that of a queue.
    """
    slopes = []
    for mode, runtime, streams in dict.fromkeys(map(_group_of, reports)):
        group = [one for one in reports if _group_of(one) == (mode, runtime, streams)]
        group = [one for one in group if not one.figures.dropped]
        ms = slope_per_object([(one.plan.objects, frame_time_ms(one)) for one in group])
        if ms is not None:
            slopes.append(Slope(mode=mode, runtime=runtime, streams=streams, ms=ms))
    return slopes


def _group_of(report: RunReport) -> tuple[str, str, int]:
    return report.plan.mode, report.runtime, report.plan.streams


def frame_time_ms(report: RunReport) -> float:
    """Time between two results (unpaced), or of a frame's way (paced, where the camera sets the former)."""
    return report.figures.latency_ms.p50 if report.plan.is_live else 1e3 / report.figures.fps


def print_tables(bench: BenchReport) -> None:
    """Print every run in a column of its own, its stages, then what follows from all of them."""
    console = Console(highlight=False)
    for first in range(0, len(bench.runs), RUNS_ABREAST):
        console.print(_make_table(bench, bench.runs[first : first + RUNS_ABREAST]))
    for report in bench.runs:
        console.print(_make_stage_table(report, bench.ceilings))
    for report in bench.runs:
        if report.figures.added_ms is not None:
            console.print(f"{name_run(report.plan)}: {describe_added(report.figures.added_ms)}")
    if bench.start is not None:
        console.print(describe_start(bench.start))
    for slope in find_slopes(bench.runs):
        group = f"{slope.mode}, {slope.runtime}, {_count(slope.streams, 'stream')}"
        console.print(f"each further object ({group}): {slope.ms:.2f} ms")
    for capacity in bench.capacities:
        console.print(describe_capacity(capacity))
    console.print(_describe_ceilings(bench.ceilings))
    gpu = bench.gpu
    console.print(f"GPU: {gpu.absence}" if gpu.absence else f"GPU: {gpu.name}, driver {gpu.driver}")
    console.print(f"weights: {bench.weights}")
    for remark in find_remarks(bench.runs, bench.ceilings):
        console.print(f"[yellow]{remark}")


def describe_capacity(capacity: Capacity) -> str:
    """What a search came to, in words."""
    limits = capacity.limits
    at_least = "at least " if capacity.limited_by == ROWS else ""
    return (
        f"capacity ({capacity.mode}, {_count(capacity.objects, 'object')} each, "
        f"{capacity.paced_fps:g} frames/s): {at_least}{_count(capacity.streams, 'stream')} within p99 "
        f"{limits.p99_ms:g} ms and {limits.drop_share:.1%} drops; limited by {capacity.limited_by}"
    )


def describe_added(added: Added) -> str:
    """What the service adds, beside its targets, in words."""
    told = (
        f"{side} p50 {times.p50:.1f}, p99 {times.p99:.1f} ms (target {ADDED_P99_TARGETS_MS[side]:g} at 60/s)"
        for side, times in (("server", added.server), ("client", added.client))
    )
    return f"added beyond decode and tracker: {', '.join(told)}"


def describe_start(start: ServerStart) -> str:
    """How long the server took, beside its target, in words."""
    how = "with engines exported first" if start.has_exported else "engines cached"
    return (
        f"start of trocar serve to SERVING: {start.seconds:.1f} s, {how} (target {START_TARGET_S:g} cached)"
    )


def _describe_ceilings(ceilings: Ceilings) -> str:
    where = _count(ceilings.threads, "thread") if ceilings.device == "cpu" else ceilings.device
    half = "".join(
        f", {name} {rate:.0f} GFLOP/s"
        for name, rate in (("fp16", ceilings.fp16_gflops), ("bf16", ceilings.bf16_gflops))
        if rate
    )
    return (
        f"ceilings ({where}): fp32 {ceilings.fp32_gflops:.1f} GFLOP/s{half}, "
        f"copy {ceilings.copy_gb_s:.1f} GB/s"
    )


def _make_table(bench: BenchReport, reports: Sequence[RunReport]) -> Table:
    table = Table("ms, unless stated")
    for report in reports:
        table.add_column("\n".join((*name_run(report.plan).split(", "), report.runtime)), justify="right")
    for rows in (_speed_rows, _latency_rows, _stage_rows, _process_rows, _device_rows):
        columns = [rows(report, bench) for report in reports]
        labels = dict.fromkeys(label for column in columns for label in column)
        for label in labels:
            table.add_row(label, *(column.get(label, "-") for column in columns))
        table.add_section()
    return table


def _make_stage_table(report: RunReport, ceilings: Ceilings) -> Table:
    # Without lines, so that it fits into 80 characters.
    title = f"\n{name_run(report.plan)}, {report.runtime}: stages"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("ms", no_wrap=True)
    headers = [_name_percentile(one.name) for one in fields(Percentiles)]
    for header in (*headers, "GFLOP", "% peak", "MB", "% copy"):
        table.add_column(header, justify="right")
    shares = find_stage_shares(report, ceilings)
    for stage, times in (report.figures.stages_ms | _added_rows(report)).items():
        cost, share = report.costs.get(stage), shares.get(stage)
        table.add_row(
            stage,
            *(_short(ms) for ms in asdict(times).values()),
            _figure(cost.gflop if cost else None, 2),
            _figure(100 * share.arithmetic if share else None, 1),
            _figure(cost.mb if cost else None, 0),
            _figure(100 * share.bandwidth if share else None, 1),
        )
    return table


def _added_rows(report: RunReport) -> dict[str, Percentiles]:
    added = report.figures.added_ms
    if added is None:
        return {}
    return {"between stages": added.between, "added, server": added.server, "added, client": added.client}


def _short(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _name_percentile(name: str) -> str:
    return name.replace("_", ".")


def name_run(plan: RunPlan) -> str:
    """What was run, in words."""
    pace = f"{plan.paced_fps:g}/s" if plan.is_live else "unpaced"
    return ", ".join((plan.mode, _count(plan.objects, "object"), _count(plan.streams, "stream"), pace))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _speed_rows(report: RunReport, _: BenchReport) -> dict[str, str]:
    figures, comparison = report.figures, report.comparison
    rows = {
        "frames/s": f"{figures.fps:.{2 if figures.fps < 10 else 1}f}",
        "spread of windows": _percent(figures.fps_spread) + (" !" if figures.is_unsteady else ""),
        "dropped frames": str(figures.dropped),
        "visible masklets": _percent(figures.visible_share),
    }
    if comparison is not None:
        rows["engine / reference"] = f"{comparison.ratio:.2f}x"
        rows["the same in cpu time"] = f"{comparison.cpu_ratio:.2f}x"
        rows["of its blocks"] = f"{min(comparison.window_ratios):.2f}-{max(comparison.window_ratios):.2f}x"
        rows["logits apart, at most"] = _figure(comparison.difference.largest, 4)
    return rows


def _latency_rows(report: RunReport, _: BenchReport) -> dict[str, str]:
    figures, since = report.figures, "due" if report.plan.is_live else "sent"
    rows = {
        f"latency {_name_percentile(name)}, from {since}": f"{ms:.1f}"
        for name, ms in asdict(figures.latency_ms).items()
    }
    if report.plan.is_live:
        rows["of which source late p50"] = f"{figures.source_late_ms.p50:.1f}"
        rows["of which source late p99"] = f"{figures.source_late_ms.p99:.1f}"
    if figures.service_latency_ms is not None:
        service = asdict(figures.service_latency_ms).items()
        rows |= {f"service latency {_name_percentile(name)}": f"{ms:.1f}" for name, ms in service}
    return rows


def _stage_rows(report: RunReport, _: BenchReport) -> dict[str, str]:
    stages = report.figures.stages_ms
    # All of them, so that the order is the design's where a run lacks some.
    rows = {f"{stage} p50": f"{stages[stage].p50:.2f}" if stage in stages else "-" for stage in STAGES}
    added = report.figures.added_ms
    rows["between stages p50"] = _figure(added.between.p50 if added else None, 2)
    return rows | {"device, a tick": f"{device_ms(report):.2f}"}


def _process_rows(report: RunReport, _: BenchReport) -> dict[str, str]:
    usage = report.usage
    return {
        "client cpu, % of a core": _figure(usage.cpu.client_percent, 0),
        "server cpu, % of a core": _figure(usage.cpu.server_percent, 0),
        "client cpu, a frame": _figure(cpu_ms_per_frame(report.figures, usage.cpu.client_percent), 2),
        "server cpu, a frame": _figure(cpu_ms_per_frame(report.figures, usage.cpu.server_percent), 2),
        "others, % of a core": _figure(usage.cpu.others_percent, 0),
        "server rss, MB": _figure(usage.rss_mb, 0),
        "rss growth, MB": _figure(usage.rss_growth_mb, 1),
    }


def _device_rows(report: RunReport, bench: BenchReport) -> dict[str, str]:
    shares, gpu = find_run_shares(report, bench.ceilings), report.usage.gpu
    rows = {
        "of the arithmetic ceiling": _percent(shares.arithmetic if shares else None),
        "of the bandwidth ceiling": _percent(shares.bandwidth if shares else None),
    }
    if gpu is None:
        return rows
    return rows | {
        "gpu busy": _percent(None if gpu.percent is None else gpu.percent / 100),
        "gpu memory, MB": _figure(gpu.memory_mb, 0),
        "gpu clock, MHz": _figure(gpu.sm_mhz, 0),
        "gpu memory clock, MHz": _figure(gpu.memory_mhz, 0),
        "gpu power, W": _figure(gpu.power_w, 0),
    }


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def find_remarks(reports: Sequence[RunReport], ceilings: Ceilings) -> list[str]:
    """What makes a figure doubtful."""
    remarks = []
    for report in reports:
        name, figures, others = name_run(report.plan), report.figures, report.usage.cpu.others_percent
        if figures.fps_spread is not None and figures.is_unsteady:
            rates = ", ".join(f"{fps:.1f}" for fps in figures.window_fps)
            remarks.append(f"{name}: unsteady, {figures.fps_spread:.0%} between windows ({rates} frames/s)")
        if others is not None and others > OTHERS_PERCENT:
            remarks.append(f"{name}: other work took {others:.0f}% of a core; trust cpu, not wall-clock time")
        shares = (find_run_shares(report, ceilings), *find_stage_shares(report, ceilings).values())
        if any(share and max(share.arithmetic, share.bandwidth) > 1 for share in shares):
            remarks.append(f"{name}: beyond a ceiling, which other work must have held down; measure again")
        if figures.dropped:
            remarks.append(f"{name}: dropped {_list_drops(figures.dropped_ids)}")
        if report.comparison is not None and report.comparison.difference.disagreements:
            count = report.comparison.difference.disagreements
            remarks.append(
                f"{name}: engine and reference disagree {count} times on whether an object is there"
            )
        if figures.unreported:
            remarks.append(f"{name}: {figures.unreported} frames vanished without a word from the server")
    return remarks


def _list_drops(dropped_ids: Sequence[Sequence[int]]) -> str:
    """The first ones, by stream."""
    streams = []
    for stream, frame_ids in enumerate(dropped_ids):
        if frame_ids:
            more = f" and {len(frame_ids) - DROPS_SHOWN} more" if len(frame_ids) > DROPS_SHOWN else ""
            streams.append(f"{', '.join(map(str, frame_ids[:DROPS_SHOWN]))}{more} (stream {stream})")
    return "; ".join(streams)


def _tell_drops(dropped_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of each stream, no more than `DROPS_TOLD` together: an overload drops without end."""
    told, left = [], DROPS_TOLD
    for frame_ids in dropped_ids:
        told.append(list(frame_ids[:left]))
        left -= len(told[-1])
    return told


def device_ms(report: RunReport) -> float:
    """What the thread that owns the device spends on a tick, ms."""
    stages = report.figures.stages_ms
    return sum(stages[stage].p50 for stage in DEVICE_STAGES if stage in stages)


def cpu_ms_per_frame(figures: Figures, percent: float | None) -> float | None:
    """CPU time of a process for each result, ms; 100% is one core."""
    return None if percent is None else percent * 10 / figures.fps


def describe_run(report: RunReport, ceilings: Ceilings) -> dict[str, object]:
    """A run as it stands in the JSON."""
    plan, figures, cpu = report.plan, report.figures, report.usage.cpu
    shares, gpu = find_run_shares(report, ceilings), report.usage.gpu
    stage_shares = find_stage_shares(report, ceilings)
    run: dict[str, object] = {
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
        "is_unsteady": figures.is_unsteady,
        "dropped": figures.dropped,
        "dropped_ids": _tell_drops(figures.dropped_ids),
        "unreported": figures.unreported,
        "latency_from": "due" if plan.is_live else "sent",
        "source_late_ms": _round_all(asdict(figures.source_late_ms)) if plan.is_live else None,
        "latency_ms": _round_all(asdict(figures.latency_ms)),
        "service_latency_ms": (
            _round_all(asdict(figures.service_latency_ms)) if figures.service_latency_ms else None
        ),
        "stages_ms": {stage: _round_all(asdict(times)) for stage, times in figures.stages_ms.items()},
        "added_ms": (
            {side: _round_all(times) for side, times in asdict(figures.added_ms).items()}
            if figures.added_ms
            else None
        ),
        "device_ms": round(device_ms(report), 3),
        "visible_share": _round(figures.visible_share, 4),
        "cpu_percent": {
            "client": _round(cpu.client_percent, 1),
            "server": _round(cpu.server_percent, 1),
            "others": _round(cpu.others_percent, 1),
        },
        "cpu_ms_per_frame": {
            "client": _round(cpu_ms_per_frame(report.figures, cpu.client_percent), 3),
            "server": _round(cpu_ms_per_frame(report.figures, cpu.server_percent), 3),
        },
        "rss_mb": _round(report.usage.rss_mb, 1),
        "rss_growth_mb": _round(report.usage.rss_growth_mb, 2),
        "gpu": {name: _round(value, 1) for name, value in asdict(gpu).items()} if gpu else None,
        "ceiling_share": _round_all(asdict(shares), 4) if shares else None,
        "stage_costs": {
            stage: _round_all(
                asdict(cost) | (asdict(stage_shares[stage]) if stage in stage_shares else {}), 4
            )
            for stage, cost in report.costs.items()
        },
    }
    if report.comparison is not None:
        run |= _describe_comparison(report.comparison)
    return run


def _describe_comparison(comparison: Comparison) -> dict[str, object]:
    difference = comparison.difference
    return {
        "ratio": round(comparison.ratio, 3),
        "cpu_ratio": round(comparison.cpu_ratio, 3),
        "window_ratios": [round(ratio, 3) for ratio in comparison.window_ratios],
        "logit_difference": {
            "max": _round(difference.largest, 6),
            "per_frame": [_round(one, 6) for one in difference.per_frame],
            "presence_disagreements": difference.disagreements,
            "largest_reference_logit": round(difference.largest_logit, 3),
        },
    }


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _round_all(values: dict[str, float], digits: int = 3) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


def describe_bench(bench: BenchReport) -> dict[str, object]:
    """Everything as it stands in the JSON."""
    return {
        "commit": find_commit(),
        "versions": find_versions(),
        "hardware": find_hardware(bench.gpu),
        "ceilings": {
            name: round(value, 2) if isinstance(value, float) else value
            for name, value in asdict(bench.ceilings).items()
        },
        "resolution": "{}x{}".format(*bench.resolution),
        "weights": bench.weights,
        "server_start": asdict(bench.start) if bench.start else None,
        "runs": [describe_run(report, bench.ceilings) for report in bench.runs],
        "ms_per_object": [asdict(slope) | {"ms": round(slope.ms, 3)} for slope in find_slopes(bench.runs)],
        "capacity": [asdict(capacity) for capacity in bench.capacities],
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


def find_versions() -> dict[str, str | None]:
    """What the figures depend on."""
    packages = ("torch", "openvino", "onnxruntime", "sam2", "grpcio", "av", "trocar")
    return {"python": platform.python_version(), **{name: _find_version(name) for name in packages}}


def _find_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_hardware(gpu: GpuMeter) -> dict[str, object]:
    """The processor, the cores that this command may use, the GPU or why there is none."""
    described = {"absent": gpu.absence} if gpu.absence else {"name": gpu.name, "driver": gpu.driver}
    return {"cpu": _find_cpu_name(), "cores": cpu_threads(), "gpu": described}


def _find_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
