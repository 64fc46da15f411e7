"""What an operator sees of a server: metrics, probes, health, logs, audit lines and traces."""

import asyncio
import gc
import json
import logging
import stat
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gpus import FakeNvml
from trocar.config import ServerConfig, split_address
from trocar.errors import ConfigError
from trocar.journal import FIELDS, AuditLog, ClientWords, JsonFormatter
from trocar.server import TrackingServer
from trocar.telemetry import Span, trace_with
from trocar.v1 import tracking_pb2 as pb
from trocar_bench.assault import PREFACE, SETTINGS, begin_call, frame
from trocar_engines.gpu_meter import GpuMeter
from wire.calls import Call, results_of, until
from wire.clips import draw_frames, encode_clip, encode_jpeg
from wire.fakes import FakeScheduler, resize_linear

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def fetch(address: str, path: str) -> tuple[int, str]:
    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(get)


async def start(scheduler: FakeScheduler, **settings: object) -> TrackingServer:
    config = ServerConfig(address="127.0.0.1:0", shutdown_grace_s=0, **settings)  # type: ignore[arg-type]
    server = TrackingServer(config, scheduler, resize_linear)
    await server.start()
    return server


async def track_a_little(address: str) -> None:
    packets = encode_clip(draw_frames(5))
    async with aio.insecure_channel(address) as channel:
        call = Call(channel)
        await call.open()
        await call.frame(0, packets[0])
        await call.prompt_red(0)
        await call.prompt(pb.Prompt(object_id=2, frame_id=77, points=[pb.Point(x=1, y=1)]))
        await call.frames(packets[1:], first_id=1)
        assert len(results_of(await call.read_rest())) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="would look for the UUID of the real one")
@pytest.mark.parametrize("has_gpu", [True, False])
async def test_gpu_metrics_are_there_where_a_gpu_tells_them(scheduler: FakeScheduler, has_gpu: bool) -> None:
    def load() -> Any:
        if not has_gpu:
            raise RuntimeError("NVML Shared Library Not Found")
        return FakeNvml()

    config = ServerConfig(address="127.0.0.1:0", metrics_address="127.0.0.1:0", shutdown_grace_s=0)
    server = TrackingServer(config, scheduler, resize_linear, GpuMeter(load))
    await server.start()
    _, text = await fetch(server.metrics_address, "/metrics")
    await server.stop()
    told = {line for line in text.splitlines() if line.startswith("trocar_gpu_")}
    figures = {
        "trocar_gpu_busy_ratio 0.8",
        "trocar_gpu_memory_used_bytes 3e+09",
        "trocar_gpu_clock_hertz 1.98e+09",
    }
    assert told == (figures if has_gpu else set()), "power is not told by this one"


async def test_metrics_count_frames_stages_streams_prompts_and_rows(scheduler: FakeScheduler) -> None:
    server = await start(scheduler, metrics_address="127.0.0.1:0")
    await server.warm_up()
    await track_a_little(server.address)
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open()
        await call.frames(encode_clip(draw_frames(1)))
        await call.prompt_red(0)
        await until(lambda: scheduler.memory_rows()["fake-nano"].in_use == 1)
        _, text = await fetch(server.metrics_address, "/metrics")
        call.cancel()
    await server.stop()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['trocar_frames_total{outcome="tracked"}']) >= 5
    assert float(values['trocar_stage_seconds_count{stage="decode"}']) >= 5
    assert float(values["trocar_service_latency_seconds_count"]) >= 5
    assert float(values['trocar_prompts_total{outcome="unknown_frame"}']) == 1
    assert float(values['trocar_streams_total{outcome="ok"}']) == 1
    assert float(values["trocar_open_streams"]) == 1
    assert float(values['trocar_memory_rows_in_use{model="fake-nano"}']) == 1
    assert float(values["trocar_device_healthy"]) == 1
    assert float(values["process_resident_memory_bytes"]) > 0


async def test_metrics_count_drops_losses_and_refusals(scheduler: FakeScheduler) -> None:
    server = await start(scheduler, metrics_address="127.0.0.1:0", max_streams=1)
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open(pb.VIDEO_CODEC_JPEG, delivery=pb.DELIVERY_LATEST)
        assert (await Call(channel).read_failure())[0].name == "RESOURCE_EXHAUSTED"
        scheduler.gate.clear()
        await call.frames([encode_jpeg(draw_frames(1)[0])] * 20)
        await until(lambda: bool(scheduler.jobs_of(scheduler.streams[0])))
        scheduler.gate.set()
        await call.frame(20, b"no JPEG")
        responses = await call.read_rest()
    _, text = await fetch(server.metrics_address, "/metrics")
    await server.stop()
    dropped = sum(len(result.dropped_frame_ids) for result in results_of(responses))
    assert dropped > 0
    assert f'trocar_frames_total{{outcome="dropped"}} {float(dropped)}' in text
    assert 'trocar_frames_total{outcome="lost"} 1.0' in text
    assert 'trocar_refusals_total{reason="max_streams"} 1.0' in text


async def test_probes_follow_warm_up_drain_and_device(scheduler: FakeScheduler) -> None:
    server = await start(scheduler, metrics_address="127.0.0.1:0")
    address = server.metrics_address
    assert (await fetch(address, "/readyz"))[0] == 503
    assert (await fetch(address, "/livez"))[0] == 200
    await server.warm_up()
    assert (await fetch(address, "/readyz"))[0] == 200
    scheduler.busy_s = 1e6
    assert (await fetch(address, "/livez"))[0] == 503
    assert (await fetch(address, "/readyz"))[0] == 503
    assert (await fetch(address, "/elsewhere"))[0] == 404
    await server.stop()


async def test_health_of_each_model_touches_the_device(scheduler: FakeScheduler) -> None:
    server = await start(scheduler, health_interval_s=0.1)
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status() -> int:
            request = health_pb2.HealthCheckRequest(service="trocar.v1.TrackingService/fake-nano")
            return int((await stub.Check(request)).status)

        async def until_status(wanted: int) -> None:
            async with asyncio.timeout(5):
                while await status() != wanted:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

        assert await status() == SERVING
        await until(lambda: scheduler.probes >= 1)
        scheduler.is_answering = False
        await until_status(NOT_SERVING)
        scheduler.is_answering = True
        await until_status(SERVING)
    await server.stop()


async def test_taken_metrics_port_is_a_clear_error(scheduler: FakeScheduler) -> None:
    server = await start(scheduler, metrics_address="127.0.0.1:0")
    with pytest.raises(ConfigError, match="for metrics"):
        await start(scheduler, metrics_address=server.metrics_address)
    await server.stop()


async def test_silent_peer_of_the_metrics_port_holds_up_nobody(scheduler: FakeScheduler) -> None:
    server = await start(scheduler, metrics_address="127.0.0.1:0")
    host, port = server.metrics_address.split(":")
    writers = [(await asyncio.open_connection(host, int(port)))[1] for _ in range(20)]
    assert (await fetch(server.metrics_address, "/livez"))[0] == 200
    for writer in writers:
        writer.close()
    await server.stop()


async def test_audit_has_a_line_for_each_stream_and_prompt_and_no_place_of_it(
    scheduler: FakeScheduler, tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    server = await start(scheduler, audit_log=path)
    await server.warm_up()
    await track_a_little(server.address)
    await server.stop()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["stream_opened", "prompt", "prompt", "stream_closed"]
    assert {line["stream_id"] for line in lines} == {1}
    assert {line["client"] for line in lines} == {"local"}
    prompts = sorted(lines[1:3], key=lambda line: str(line["outcome"]))
    assert [line["outcome"] for line in prompts] == ["accepted", "unknown_frame"]
    assert lines[3]["outcome"] == "ok"
    assert (lines[3]["tracked"], lines[3]["prompts_accepted"], lines[3]["prompts_rejected"]) == (5, 1, 1)
    assert (prompts[0]["kind"], prompts[0]["points"]) == ("points", 1)
    assert not {"x", "y", "box", "mask"} & {key for line in lines for key in line}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_no_log_line_holds_what_a_client_sent(
    scheduler: FakeScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = await start(scheduler)
    await server.warm_up()
    async with aio.insecure_channel(server.address) as channel:
        call = Call(channel)
        await call.open(pb.VIDEO_CODEC_JPEG)
        await call.frame(0, b"JANE DOE 1970-01-01" * 9)
        await call.read_rest()
    await server.stop()
    assert "JANE" not in caplog.text
    assert "4a 41 4e 45" not in caplog.text


async def test_no_log_line_holds_a_path_that_is_no_text(
    scheduler: FakeScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    hide = ClientWords()
    loggers = [logging.getLogger(name) for name in ClientWords.LOGGERS]
    for logger in loggers:
        logger.addFilter(hide)
    try:
        server = await start(scheduler)
        host, port = split_address(server.address)
        _, writer = await asyncio.open_connection(host, port)
        writer.write(PREFACE + frame(SETTINGS) + begin_call(1, path=b"/JANE\xff"))
        await until(lambda: "listening again" in caplog.text)
        writer.close()
        await server.stop()
        gc.collect()
        assert "JANE" not in caplog.text
    finally:
        for logger in loggers:
            logger.removeFilter(hide)


def test_log_line_is_json_with_the_fields_of_its_stream() -> None:
    record = logging.LogRecord("trocar.x", logging.INFO, "", 0, "stream %d: %s", (7, "gone"), None)
    record.__dict__[FIELDS] = {"stream_id": 7}
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["stream_id"], line["level"]) == ("stream 7: gone", 7, "INFO")
    assert line["time"].endswith("Z")


def test_audit_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="audit log"):
        AuditLog(tmp_path / "no" / "folder")


def test_frame_becomes_a_span_with_its_pieces_at_their_time_of_day() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    now_ns = time.perf_counter_ns()
    whole = Span("frame", now_ns - 9_000, now_ns)
    trace_with(provider)({"stream_id": 3}, [whole, Span("decode", now_ns - 8_000, now_ns - 5_000)])
    decode, frame = exporter.get_finished_spans()
    assert (decode.name, frame.name) == ("decode", "frame")
    assert decode.parent is not None
    assert decode.parent.span_id == frame.context.span_id
    assert frame.attributes is not None
    assert frame.attributes["stream_id"] == 3
    assert decode.start_time is not None
    assert decode.end_time is not None
    assert decode.end_time - decode.start_time == 3_000
    assert abs(decode.start_time - time.time_ns()) < 60 * 10**9
