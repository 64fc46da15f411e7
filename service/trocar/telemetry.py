"""Where a frame's time goes, and what a server counts: stage clock, metrics, traces."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from trocar.errors import ConfigError
from trocar.tracking import Scheduler
from trocar_engines.gpu_meter import GpuMeter

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

STAGES = (
    "decode",
    "preprocess",
    "queue",
    "encode_image",
    "attend_memory",
    "decode_masks",
    "readback",
    "encode_masklets",
    "write_memory",
)
"""Names and order as in `StageTimes` of the contract, the benchmarks' columns and the screen."""
LATENCY_BUCKETS_S = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.2,
    0.5,
    1,
    5,
)
"""Close together up to 105 ms, which surgeons notice, and 200 ms, the usual bound (Kumcu 2016)."""


class Span(NamedTuple):
    """A piece of a frame's way, on the monotonic clock."""

    name: str
    began_ns: int
    ended_ns: int


class StageClock:
    """One frame's durations by stage, on the monotonic clock.

    Handed from thread to thread with the frame; never used by two at once.
    """

    def __init__(self, received_ns: int) -> None:
        self.received_ns = received_ns
        self.stage_ns: dict[str, int] = {}
        self.spans: list[Span] = []

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        began_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            ended_ns = time.perf_counter_ns()
            self.add(stage, ended_ns - began_ns)
            self.spans.append(Span(stage, began_ns, ended_ns))

    def add(self, stage: str, duration_ns: int) -> None:
        """Add a duration to a stage."""
        if stage not in STAGES:
            raise KeyError(stage)
        self.stage_ns[stage] = self.stage_ns.get(stage, 0) + duration_ns

    def elapsed_ns(self) -> int:
        """Measure the time since the frame was received."""
        return time.perf_counter_ns() - self.received_ns


class Metrics:
    """What a server counts, in a registry of its own.

    Args:
        scheduler: whose device and rows are shown.
        count_streams: streams open now.
        is_serving: whether streams are taken.
        gpu: that the models run on; without one, or where it does not tell, its metrics are absent.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        count_streams: Callable[[], int],
        is_serving: Callable[[], bool],
        gpu: GpuMeter | None = None,
    ) -> None:
        self.registry = registry = CollectorRegistry()
        frames = Counter("trocar_frames", "Frames by what became of them", ["outcome"], registry=registry)
        self.tracked = frames.labels("tracked")
        self.untrusted = frames.labels("untrusted")
        self.dropped = frames.labels("dropped")
        self.lost = frames.labels("lost")
        stage = Histogram(
            "trocar_stage_seconds",
            "Stages of a frame",
            ["stage"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._stages = {name: stage.labels(name) for name in STAGES}
        self.latency = Histogram(
            "trocar_service_latency_seconds",
            "From the receipt of a frame to its result handed to the transport",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.streams = Counter("trocar_streams", "Streams by how they ended", ["outcome"], registry=registry)
        self.prompts = Counter("trocar_prompts", "Prompts by outcome", ["outcome"], registry=registry)
        self.refusals = Counter(
            "trocar_refusals", "Refusals by limit or reason", ["reason"], registry=registry
        )
        for name, text, read in (
            ("trocar_open_streams", "Streams open now", count_streams),
            ("trocar_serving", "1 while streams are taken", is_serving),
            ("trocar_device_healthy", "1 until the device fails", lambda: scheduler.is_healthy),
            (
                "trocar_device_step_seconds",
                "How long the device has been at its step",
                lambda: scheduler.busy_s,
            ),
        ):
            Gauge(name, text, registry=registry).set_function(read)
        registry.register(_RowCollector(scheduler))
        if gpu is not None:
            registry.register(_GpuCollector(gpu))
        ProcessCollector(registry=registry)

    def observe_stages(self, stage_ns: dict[str, int]) -> None:
        """Count one frame's stages."""
        for stage, duration_ns in stage_ns.items():
            self._stages[stage].observe(duration_ns / 1e9)


class _RowCollector:
    """Memory rows of each loaded model; one row is one object."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        """Read them now."""
        used = GaugeMetricFamily("trocar_memory_rows_in_use", "Objects tracked now", labels=["model"])
        total = GaugeMetricFamily("trocar_memory_rows", "Objects that fit", labels=["model"])
        for model, rows in self._scheduler.memory_rows().items():
            used.add_metric([model], rows.in_use)
            total.add_metric([model], rows.total)
        return used, total


class _GpuCollector:
    """The GPU that the models run on."""

    def __init__(self, gpu: GpuMeter) -> None:
        self._gpu = gpu

    def collect(self) -> Iterable[Metric]:
        """Look at it now."""
        figures = self._gpu.read()
        if figures is None:
            return
        for name, text, value, unit in (
            ("trocar_gpu_busy_ratio", "Share of the last moment in which it computed", figures.percent, 0.01),
            ("trocar_gpu_memory_used_bytes", "Memory taken, by anybody", figures.memory_mb, 1e6),
            ("trocar_gpu_clock_hertz", "Clock of its multiprocessors", figures.sm_mhz, 1e6),
            ("trocar_gpu_power_watts", "Power drawn", figures.power_w, 1),
        ):
            if value is not None:
                yield GaugeMetricFamily(name, text, value=value * unit)


class TraceFrame(Protocol):
    """Takes one frame's spans."""

    def __call__(self, attributes: dict[str, str | int | bool | float], spans: list[Span]) -> None:
        """The first span is the whole way, the others are its pieces."""


def open_tracer() -> TraceFrame:
    """Send spans where OpenTelemetry's own environment variables say.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("tracing needs OpenTelemetry: pip install 'trocar[tracing]'") from error
    # The endpoint and what else concerns the exporter: OTEL_EXPORTER_OTLP_ENDPOINT and its kin.
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "trocar"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return trace_with(provider)


def trace_with(provider: "TracerProvider") -> TraceFrame:
    """Turn frames into spans of a given provider."""
    from opentelemetry.trace import set_span_in_context

    tracer = provider.get_tracer("trocar")

    def trace_frame(attributes: dict[str, str | int | bool | float], spans: list[Span]) -> None:
        # Spans carry the time of day; durations stay those of the monotonic clock.
        offset_ns = time.time_ns() - time.perf_counter_ns()
        whole = spans[0]
        parent = tracer.start_span(whole.name, start_time=whole.began_ns + offset_ns, attributes=attributes)
        context = set_span_in_context(parent)
        for piece in spans[1:]:
            child = tracer.start_span(piece.name, context=context, start_time=piece.began_ns + offset_ns)
            child.end(piece.ended_ns + offset_ns)
        parent.end(whole.ended_ns + offset_ns)

    return trace_frame
