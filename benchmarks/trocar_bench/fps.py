"""`bench-fps`: how many frames a second, how late, and where the time goes.

Two modes, so that the cost of the service shows as their difference, and one to compare with:

- `engine`: pictures at the model's input size go straight into the scheduler of this process. No video, no
  coding of masks, no network: the tracker's own speed, on every core unless `--threads` says otherwise.
- `service`: a `trocar serve` of its own, in a process of its own on a loopback port, gets H.264 through the
  Python client, as a video pipeline would send it, and answers with run-length masks at source resolution.
  The tracker leaves one core to decoding, as `trocar serve` does.
- `reference`: sam2's own predictor and our engine in turn, a few frames each, on the same weights and
  pictures, unpaced (see `reference_lane`). Prints how many times faster the engine is, and how far their mask
  logits lie apart, with SAM 2's own memory (`vanilla`) unless told otherwise. On a GPU also sam2's build
  `vos_optimized`.

Two disciplines (see `pacing`):

- Unpaced: delivery EVERY with back-pressure. Answers "how fast": the pipeline is full all the time, so its
  latency only tells how long the pipeline is.
- Paced (`--fps N`): delivery LATEST, a camera on an absolute schedule. Answers "how late": a frame counts
  from when it was due, not from when a sender that was itself held up got round to it. A stall of a second at
  60 frames/s is 60 late or dropped frames, not one. Dropped frames have no latency: read both figures.

Two latencies, never one for the other: `latency` is the client's, from due (paced) or sent (unpaced) to the
result received and parsed, its masks still coded. `service` is the server's own, from its receipt of the
frame to the reply handed to the transport; it knows nothing of what waits in sockets and in the client. On
cores that are busy our own camera wakes up late, which no real one does; "source late" is that part.

What bounds the figures:

- One thread owns the device. Per frame it spends encode_image + attend_memory + decode_masks + readback
  before the reply and write_memory after it, in which some times a second an object is looked at. "device"
  is the sum of their medians; a tick of that thread, and so one stream, cannot be faster than 1000 / device a
  second.
- "between stages" is service latency that no stage accounts for: hops between threads, and waiting for the
  interpreter or a core. "added, server" is that with preprocess and encode_masklets: all of the service's
  latency but decoding, tracking and the wait for either. "added, client" is the same of the time from sent to
  received. Both are taken frame by frame; their targets hold paced at 60 frames/s.
- Client and server share the cores. "cpu" is CPU milliseconds a frame, which other work on the machine
  changes less than any wall-clock figure: n cores carry at most n * 1000 / cpu frames a second.
- "of the arithmetic ceiling" and "of the bandwidth ceiling" compare what the network asks for with what this
  device did in the same command (see `ceilings`). A stage far below both waits for something else.
- "others" is CPU that neither of them used. A measurement worth quoting has next to none.

The footage is 1.6 s of a held-out synthetic operation, to and fro without a cut, since a cut would lose the
objects, and what is lost is cheap; "visible" is the share of masklets that had a mask. Objects are prompted
by one click each on frame 0, before the clock starts. A model without installed weights is measured with
random ones, which cost as much, and under which "visible" means nothing.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trocar.cli import (
    EngineOptions,
    StartScheduler,
    keep_from_collector,
    run_command,
    start_scheduler,
)
from trocar.client import connect
from trocar.client_core import Reconnect
from trocar.tracking import TrackedStream
from trocar_bench.capacity import Capacity, Limits, Probe, find_largest, name_limit
from trocar_bench.ceilings import Ceilings, StageCost, count_costs, keep_best, measure_ceilings
from trocar_bench.engine_lane import EngineLane
from trocar_bench.footage import FOOTAGE_FRAMES, Footage, Render, render_footage
from trocar_bench.fps_plot import draw_plot
from trocar_bench.fps_report import (
    BenchReport,
    RunReport,
    compare_runs,
    describe_bench,
    name_run,
    print_tables,
)
from trocar_bench.fps_request import (
    ENGINE,
    MOST_OBJECTS,
    REFERENCE,
    SERVICE,
    BenchRequest,
    make_parser,
    read_request,
)
from trocar_bench.frame_log import NothingTrackedError
from trocar_bench.mask_comparison import MaskComparison
from trocar_bench.process_meter import ProcessMeter
from trocar_bench.random_weights import write_random_weights
from trocar_bench.reference_lane import (
    BUILDS,
    BuildReference,
    ReferenceLane,
    build_reference,
)
from trocar_bench.serve_process import ServeProcess, ServerRequest, ServerStart, StartServer
from trocar_bench.service_lane import ServiceLane
from trocar_bench.speed_run import AlternatingRun, BlockLane, Lane, RunPlan, SpeedRun, Watch
from trocar_engines.gpu_meter import GpuMeter
from trocar_engines.masklets import UInt8Array
from trocar_engines.memory.bank import MemoryPolicy
from trocar_engines.models import DEFAULT_MODEL, bank_config, cpu_threads, model_entry
from trocar_engines.network.config import NETWORKS
from trocar_engines.preprocess import resize_to_model
from trocar_engines.runtime.eager import EagerRuntime
from trocar_engines.runtime.onnx import OnnxRuntime
from trocar_engines.runtime.openvino import OpenVinoRuntime
from trocar_engines.scheduler import DEFAULT_MEMORY

CPU_RUNTIMES = (OpenVinoRuntime.name, OnnxRuntime.name, EagerRuntime.name)
MeasureCeilings = Callable[[str, int], Ceilings]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a bench measures with; tests bring their own.

    Args:
        start_scheduler: makes the tracker of the modes `engine` and `reference`.
        start_server: makes the server of the mode `service`.
        render: makes the footage.
        build_reference: makes sam2's predictor.
        measure_ceilings: of a device, with so many threads.
    """

    start_scheduler: StartScheduler = start_scheduler
    start_server: StartServer = ServeProcess
    render: Render = render_footage
    build_reference: BuildReference = build_reference
    measure_ceilings: MeasureCeilings = measure_ceilings


def main(arguments: Sequence[str] | None = None, parts: Parts | None = None) -> int:
    """Measure.

    Args:
        arguments: None for those of the process.
        parts: to measure with.

    Returns:
        0, or 2 after an expected failure, which one line on stderr tells.
    """
    options = make_parser().parse_args(arguments)

    def run() -> int:
        request = read_request(options)
        with ExitStack() as resources:
            Bench(request, parts or Parts(), resources).run()
        return 0

    return run_command("bench-fps", run)


OpenLane = Callable[[RunPlan], Lane]


@dataclass(frozen=True, kw_only=True)
class RunningModel:
    """What tracks.

    Args:
        name: of the network.
        runtime: that executes it.
        memory: policy.
    """

    name: str
    runtime: str
    memory: str


class Bench:
    """All runs of one command.

    Args:
        request: what is asked.
        parts: to measure with.
        resources: closed when the command ends.
    """

    def __init__(self, request: BenchRequest, parts: Parts, resources: ExitStack) -> None:
        self._request = request
        self._parts = parts
        self._resources = resources
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        is_shown = self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, transient=True, disable=not is_shown)
        self._model = request.engine.model or DEFAULT_MODEL
        self._gpu = GpuMeter()
        self._device = "cpu"
        self._ceilings: Ceilings | None = None
        self._capacities: list[Capacity] = []
        self._start: ServerStart | None = None
        self._costs: dict[tuple[RunningModel, int], dict[str, StageCost]] = {}

    def run(self) -> None:
        """Measure, then print table and JSON.

        Raises:
            TrocarError: a model cannot be loaded, a server does not start, or a stream broke.
        """
        runs = {ENGINE: self._run_engine, SERVICE: self._run_service, REFERENCE: self._run_reference}
        with self._progress:
            self._prepare_weights()
            reports = [report for mode in self._request.modes for report in runs[mode]()]
            ceilings = self._measure_ceilings()
        bench = BenchReport(
            runs=reports,
            capacities=self._capacities,
            ceilings=ceilings,
            gpu=self._gpu,
            resolution=self._request.resolution,
            weights=self._weights_name,
            start=self._start,
        )
        print_tables(bench)
        print(json.dumps(describe_bench(bench)))
        if self._request.plot is not None:
            draw_plot(self._request.plot, reports, self._capacities)

    @cached_property
    def _footage(self) -> Footage:
        """Rendered when a tracker is ready: nobody should wait for it to learn of a mistyped model."""
        width_px, height_px = self._request.resolution
        task = self._progress.add_task(f"rendering {width_px}x{height_px}", total=FOOTAGE_FRAMES)
        footage = self._parts.render(width_px, height_px, on_frame=lambda: self._progress.advance(task))
        # A full collection holds the client up for 0.2 s, which would read as eight frames dropped.
        keep_from_collector()
        return footage

    def _prepare_weights(self) -> None:
        """The file that every tracker of this command loads; made up where there is none."""
        installed = self._request.engine.weights or model_entry(self._model).weights
        if installed is not None:
            self._weights, self._weights_name = installed, str(installed)
            return
        folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="bench-fps-")))
        self._weights, self._weights_name = folder / f"{self._model}.safetensors", "random"
        self._show_line(f"{self._model}: no weights are installed; measuring with random ones")
        write_random_weights(self._model, self._weights)

    def _measure_ceilings(self) -> Ceilings:
        """Once it is known which device, and again at the end: the higher ones are nearer the truth."""
        ceilings = self._parts.measure_ceilings(self._device, cpu_threads())
        return keep_best(self._ceilings, ceilings) if self._ceilings is not None else ceilings

    def _note_running(self, name: str, runtime: str, memory: str) -> RunningModel:
        """What tracks, and so which device is to be measured."""
        if self._ceilings is None:
            self._device = _find_device(runtime)
            self._ceilings = self._measure_ceilings()
        return RunningModel(name=name, runtime=runtime, memory=memory)

    def _engine_options(self, *, memory: str = "") -> EngineOptions:
        engine, limits = self._request.engine, self._request.limits
        # A GPU's graphs are made for as many, and every size more takes seconds to minutes.
        if limits:
            most_streams, most_objects = self._most_streams(min(self._request.objects)), MOST_OBJECTS
        else:
            most_streams = max(self._request.streams)
            most_objects = most_streams * max(self._request.objects)
        return EngineOptions(
            model=engine.model,
            memory=engine.memory or memory,
            runtime=engine.runtime,
            weights=self._weights if self._weights_name == "random" else engine.weights,
            threads=engine.threads,
            is_compiled=engine.is_compiled,
            max_streams=most_streams,
            max_objects=most_objects,
        )

    def _engine_alone(self, *, memory: str = "") -> EngineOptions:
        """For an engine that nobody decodes beside: it takes every core."""
        options = self._engine_options(memory=memory)
        return dataclasses.replace(options, threads=options.threads or cpu_threads())

    @staticmethod
    def _most_streams(objects: int) -> int:
        """That the tracker has memory rows for."""
        return MOST_OBJECTS // objects

    def _run_engine(self) -> Iterator[RunReport]:
        with closing(self._parts.start_scheduler(self._engine_alone())) as scheduler:
            scheduler.warm_up()
            model, memory = scheduler.default_model, scheduler.default_memory
            card = scheduler.model_card(model)
            inputs = [resize_to_model(picture, card.input_size_px) for picture in self._footage.pictures]

            def open_lane(plan: RunPlan) -> Lane:
                stream = scheduler.open_stream(
                    model=model, memory=memory, is_live=plan.is_live, max_objects=plan.objects
                )
                return EngineLane(stream, plan, self._footage, inputs)

            running = self._note_running(card.name, card.runtime, memory)
            yield from self._run_plans(ENGINE, open_lane, running, ProcessMeter(None))

    def _run_service(self) -> Iterator[RunReport]:
        request = ServerRequest(
            engine=self._engine_options(), max_objects=max(self._request.objects), on_line=self._show_line
        )
        with (
            self._parts.start_server(request) as server,
            connect(server.address, reconnect=Reconnect(timeout_s=0)) as client,
        ):
            self._start = server.start
            info = client.server_info()
            card = next(card for card in info.models if card.name == info.default_model)

            def open_lane(plan: RunPlan) -> Lane:
                return ServiceLane(client, plan, self._footage)

            memory = self._request.engine.memory or DEFAULT_MEMORY
            running = self._note_running(card.name, card.runtime, memory)
            yield from self._run_plans(SERVICE, open_lane, running, ProcessMeter(server.pid))

    def _run_plans(
        self, mode: str, open_lane: OpenLane, running: RunningModel, meter: ProcessMeter
    ) -> Iterator[RunReport]:
        request = self._request
        if request.limits is not None:
            for objects in request.objects:
                yield from self._seek_capacity(request.limits, mode, objects, open_lane, running, meter)
            return
        for streams, objects in product(request.streams, request.objects):
            yield self._measure(request.make_plan(mode, objects, streams), open_lane, running, meter)

    def _seek_capacity(
        self,
        limits: Limits,
        mode: str,
        objects: int,
        open_lane: OpenLane,
        running: RunningModel,
        meter: ProcessMeter,
    ) -> list[RunReport]:
        reports: list[RunReport] = []

        def probe(streams: int) -> Probe:
            plan = self._request.make_plan(mode, objects, streams)
            try:
                reports.append(self._measure(plan, open_lane, running, meter))
            except NothingTrackedError:
                return Probe(streams=streams, p99_ms=None, drop_share=1.0, holds=False)
            figures = reports[-1].figures
            p99_ms, drop_share = figures.latency_ms.p99, figures.dropped / (plan.frames * streams)
            holds = p99_ms <= limits.p99_ms and drop_share <= limits.drop_share
            verdict = "holds" if holds else "beyond the limits"
            self._show_line(f"{name_run(plan)}: p99 {p99_ms:.1f} ms, {drop_share:.2%} dropped: {verdict}")
            return Probe(streams=streams, p99_ms=p99_ms, drop_share=drop_share, holds=holds)

        probes = find_largest(self._most_streams(objects), probe)
        self._capacities.append(
            Capacity(
                mode=mode,
                objects=objects,
                paced_fps=self._request.paced_fps,
                limits=limits,
                streams=max((one.streams for one in probes if one.holds), default=0),
                limited_by=name_limit(probes, limits),
                probes=tuple(probes),
            )
        )
        return reports

    def _run_reference(self) -> Iterator[RunReport]:
        options = self._engine_alone(memory=MemoryPolicy.VANILLA.value)
        if options.runtime == "auto" and not torch.cuda.is_available():
            # The predictor computes in float32 there.
            options = dataclasses.replace(options, runtime=OnnxRuntime.name)
        with closing(self._parts.start_scheduler(options)) as scheduler:
            scheduler.warm_up()
            model, memory = scheduler.default_model, scheduler.default_memory
            card = scheduler.model_card(model)
            inputs = [resize_to_model(picture, card.input_size_px) for picture in self._footage.pictures]
            running = self._note_running(card.name, card.runtime, memory)
            # sam2's other build is compiled, which takes a GPU.
            builds = self._request.builds or (BUILDS if self._device == "cuda" else BUILDS[:1])
            predictors = {
                build: self._parts.build_reference(
                    self._model, self._weights, build=build, device=self._device
                )
                for build in builds
            }
            for objects in self._request.objects:
                stream = scheduler.open_stream(model=model, memory=memory, is_live=False, max_objects=objects)
                plan = self._request.make_plan(REFERENCE, objects, 1)
                yield from self._compare(plan, stream, inputs, predictors, running)

    def _compare(
        self,
        plan: RunPlan,
        stream: TrackedStream,
        inputs: Sequence[UInt8Array],
        predictors: Mapping[str, Any],
        running: RunningModel,
    ) -> Iterator[RunReport]:
        """The engine and every build of the reference, in turn."""
        masks = MaskComparison()
        lanes: list[BlockLane] = [
            EngineLane(stream, plan, self._footage, inputs, window=1, on_masks=masks.record(ENGINE)),
            *(
                ReferenceLane(predictor, plan, self._footage, inputs, on_masks=masks.record(build))
                for build, predictor in predictors.items()
            ),
        ]
        name = name_run(plan)
        task = self._progress.add_task(name, total=len(lanes) * (plan.warmup + plan.frames))
        run = AlternatingRun(plan, lanes, ProcessMeter(None), self._gpu, lambda: self._progress.advance(task))
        (ours, our_usage), *theirs = run.run()
        self._progress.remove_task(task)
        costs = self._count_costs(running, plan.objects)
        engine = RunReport(
            plan=dataclasses.replace(plan, mode=ENGINE),
            model=running.name,
            runtime=running.runtime,
            figures=ours,
            usage=our_usage,
            costs=costs,
        )
        references = [
            RunReport(plan=plan, model=running.name, runtime=build, figures=figures, usage=usage, costs=costs)
            for build, (figures, usage) in zip(predictors, theirs, strict=True)
        ]
        comparisons = [
            compare_runs(engine, reference, masks.compare(ENGINE, reference.runtime))
            for reference in references
        ]
        # The engine's own column tells of the predictor as it is.
        yield dataclasses.replace(engine, comparison=comparisons[0])
        for reference, comparison in zip(references, comparisons, strict=True):
            self._show_line(f"{name}, {reference.runtime}: the engine is {comparison.ratio:.2f}x as fast")
            yield dataclasses.replace(reference, comparison=comparison)

    def _measure(
        self, plan: RunPlan, open_lane: OpenLane, running: RunningModel, meter: ProcessMeter
    ) -> RunReport:
        name = name_run(plan)
        task = self._progress.add_task(name, total=1 + plan.warmup + plan.frames)
        watch = Watch(meter, self._gpu, lambda settled: self._progress.update(task, completed=settled))
        try:
            figures, usage = SpeedRun(plan, open_lane, watch).run()
        finally:
            self._progress.remove_task(task)
        self._show_line(f"{name}: {figures.fps:.1f} frames/s")
        return RunReport(
            plan=plan,
            model=running.name,
            runtime=running.runtime,
            figures=figures,
            usage=usage,
            costs=self._count_costs(running, plan.objects),
        )

    def _count_costs(self, running: RunningModel, objects: int) -> dict[str, StageCost]:
        """What a frame asks of the device; nothing for a model that is not ours to count."""
        if running.name not in NETWORKS:
            return {}
        if (running, objects) not in self._costs:
            entry = model_entry(running.name)
            bank = bank_config(entry, running.memory)
            self._costs[running, objects] = count_costs(entry.config, bank, objects)
        return self._costs[running, objects]

    def _show_line(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _find_device(runtime: str) -> str:
    """Where a runtime computes, so that the reference and the ceilings are taken there too."""
    return "cuda" if runtime not in CPU_RUNTIMES and torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
