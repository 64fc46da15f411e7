"""One stream as seen from outside: its counts, its audit lines, its traces."""

import time

from trocar.journal import AuditLog, Fields
from trocar.messages import StreamSettings
from trocar.telemetry import Metrics, Span, StageClock, TraceFrame
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.masklets import FrameMasklets


class StreamRecord:
    """Counts what a stream does. Belongs to one event loop.

    Args:
        stream_id: the server's number of the stream.
        client: name of the client.
        peer: its address.
        metrics: of the server.
        audit: of the server.
        trace_frame: takes one frame in `trace_every`; None traces none.
        trace_every: 1 or more.
    """

    def __init__(
        self,
        *,
        stream_id: int,
        client: str,
        peer: str,
        metrics: Metrics,
        audit: AuditLog,
        trace_frame: TraceFrame | None = None,
        trace_every: int = 1,
    ) -> None:
        self.stream_id = stream_id
        self.client = client
        self._peer = peer
        self._metrics = metrics
        self._audit = audit
        self._trace_frame = trace_frame
        self._trace_every = trace_every
        self._began_s = time.monotonic()
        self._tracked = self._untrusted = self._dropped = self._lost = 0
        self._accepted = self._rejected = 0

    def open(self, settings: StreamSettings) -> None:
        """Note what was asked for and granted."""
        self._write(
            "stream_opened",
            {
                "peer": self._peer,
                "model": settings.model,
                "memory": settings.memory,
                "codec": settings.video.codec.value,
                "is_live": settings.is_live,
                "max_objects": settings.max_objects,
            },
        )

    def count_frame(self, frame_id: int, clock: StageClock, tracked: FrameMasklets) -> None:
        """Note a frame whose result was handed to the transport."""
        self._tracked += 1
        self._metrics.tracked.inc()
        if not tracked.is_trusted:
            self._untrusted += 1
            self._metrics.untrusted.inc()
        latency_ns = clock.elapsed_ns()
        self._metrics.latency.observe(latency_ns / 1e9)
        self._metrics.observe_stages(clock.stage_ns)
        if self._trace_frame is not None and frame_id % self._trace_every == 0:
            attributes: dict[str, str | int | bool | float] = {
                "stream_id": self.stream_id,
                "frame_id": frame_id,
                "objects": len(tracked.masklets),
                "is_trusted": tracked.is_trusted,
            }
            attributes |= {f"{stage}_ns": duration for stage, duration in tracked.stage_ns.items()}
            whole = Span("frame", clock.received_ns, clock.received_ns + latency_ns)
            self._trace_frame(attributes, [whole, *clock.spans])

    def count_dropped(self, frames: int) -> None:
        """Note frames that made room for newer ones."""
        self._dropped += frames
        self._metrics.dropped.inc(frames)

    def count_lost(self, frames: int) -> None:
        """Note frames that gave no picture."""
        self._lost += frames
        self._metrics.lost.inc(frames)

    def count_prompt(self, prompt: pb.Prompt, response: pb.TrackResponse) -> None:
        """Note a prompt and its answer."""
        outcome = "accepted"
        if response.WhichOneof("response") == "prompt_rejected":
            reason = response.prompt_rejected.reason
            outcome = pb.RejectionReason.Name(reason).removeprefix("REJECTION_REASON_").lower()
            self._rejected += 1
        else:
            self._accepted += 1
        self._metrics.prompts.labels(outcome).inc()
        kind = "mask" if prompt.HasField("mask") else "box" if prompt.HasField("box") else "points"
        self._write(
            "prompt",
            {
                "object_id": prompt.object_id,
                "frame_id": prompt.frame_id,
                "kind": kind,
                "points": len(prompt.points),
                "mode": pb.PromptMode.Name(prompt.mode).removeprefix("PROMPT_MODE_").lower()
                if prompt.mode in pb.PromptMode.values()
                else prompt.mode,
                "outcome": outcome,
            },
        )

    def close(self, outcome: str) -> None:
        """Note how the stream ended: "ok", "cancelled" or the name of a status code."""
        self._metrics.streams.labels(outcome).inc()
        self._write(
            "stream_closed",
            {
                "outcome": outcome,
                "seconds": round(time.monotonic() - self._began_s, 3),
                "tracked": self._tracked,
                "untrusted": self._untrusted,
                "dropped": self._dropped,
                "lost": self._lost,
                "prompts_accepted": self._accepted,
                "prompts_rejected": self._rejected,
            },
        )

    def _write(self, event: str, fields: Fields) -> None:
        self._audit.write(event, {"stream_id": self.stream_id, "client": self.client, **fields})
