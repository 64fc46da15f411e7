"""One video stream: requests in order, pictures to the tracker, results back in order.

    receive ── inbox ── process (decode, resize, offer) ── replies ── respond (await masklets, encode, send)

Three tasks on the event loop, joined by two bounded queues; everything that computes runs in threads.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, assert_never

from trocar import messages
from trocar.config import ServerConfig
from trocar.decode import Decoded, Packet, PacketDecoder
from trocar.errors import ContractError, ServerNotReadyError, UnknownFrameError
from trocar.inbox import ArrivedFrame, ArrivedRequest, Inbox, SkippedFrames
from trocar.masklet_codec import masks_from_logits
from trocar.messages import StreamSettings
from trocar.prompts import read_prompt
from trocar.replies import PendingFrame, PendingPrompt, PendingRemoval, PendingReset, Replies, Reply
from trocar.telemetry import StageClock
from trocar.tracking import Resize, TrackedStream
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.errors import CapacityError, FrameNotKeptError, TrocarError
from trocar_engines.masklets import FrameMasklets, Masklet, Picture

T = TypeVar("T")
Send = Callable[[pb.TrackResponse], Awaitable[None]]

QUEUE_CAPACITY = 4
"""Pictures offered and not yet tracked in EVERY: what the tracker's own queue holds."""
WAITING_REPLIES = 8
"""Two pictures in the tracker, and what a client leaves unread for a moment."""
REMEMBERED_FRAMES = 1_024
"""Picture sizes kept for prompts: longer than any tracker keeps frames, and little memory."""
MOST_DROPPED_IDS = 1_024
"""Reported in one result, as the contract says; the total goes on counting."""
SESSION_THREADS = 2
"""One decodes, one encodes: each is awaited before its next job, so never more than one of a kind."""


class Session:
    """One Track call after its OpenStream.

    Args:
        settings: what the client asked for.
        config: what the server admits.
        stream: the tracker's end; the caller closes it.
        resize: from source pixels to the tracker's input.
        stream_id: names the threads.
    """

    def __init__(
        self,
        *,
        settings: StreamSettings,
        config: ServerConfig,
        stream: TrackedStream,
        resize: Resize,
        stream_id: int,
    ) -> None:
        self._settings = settings
        self._stream = stream
        self._resize = resize
        self._decoder = PacketDecoder(settings.video)
        self._inbox = Inbox(
            codec=settings.video.codec,
            is_live=settings.is_live,
            max_waiting_packets=config.max_waiting_packets,
        )
        self._replies = Replies(WAITING_REPLIES)
        self._offers = asyncio.Semaphore(QUEUE_CAPACITY)
        self._threads = ThreadPoolExecutor(SESSION_THREADS, thread_name_prefix=f"trocar-stream-{stream_id}")
        self._last_frame_id: int | None = None
        self._picture_sizes: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._dropped_frame_ids: list[int] = []
        self._dropped_total = 0

    async def run(self, requests: AsyncIterator[pb.TrackRequest], send: Send) -> None:
        """Serve the stream until the client has closed its side and everything is answered.

        Args:
            requests: all after OpenStream.
            send: hands a response to the transport; waits while the client does not read.

        Raises:
            ContractError: the client broke the contract.
            ServerNotReadyError: the tracker stopped.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(requests))
                tasks.create_task(self._process())
                tasks.create_task(self._respond(send))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    # receive: what may wait at the gate

    async def _receive(self, requests: AsyncIterator[pb.TrackRequest]) -> None:
        async for request in requests:
            received_ns = time.perf_counter_ns()
            kind = request.WhichOneof("request")
            if kind is None:
                raise ContractError("an empty TrackRequest: set one of its fields")
            if kind == "open_stream":
                raise ContractError("a second OpenStream: expected it once, as the first message of a call")
            if kind == "video_frame":
                await self._inbox.put(self._accept_frame(request.video_frame, received_ns))
            else:
                await self._inbox.put(ArrivedRequest(message=request, size_bytes=request.ByteSize()))
        await self._inbox.close()

    def _accept_frame(self, frame: pb.VideoFrame, received_ns: int) -> ArrivedFrame:
        previous, self._last_frame_id = self._last_frame_id, frame.frame_id
        if previous is not None and frame.frame_id <= previous:
            raise ContractError(
                f"frame_id {frame.frame_id} after {previous}: expected more than {previous}; number frames "
                "in the order of sending"
            )
        packet = Packet(
            frame_id=frame.frame_id,
            payload=frame.payload,
            width_px=frame.width_px,
            height_px=frame.height_px,
        )
        return ArrivedFrame(
            packet=packet,
            pts=frame.pts if frame.HasField("pts") else None,
            capture_time_ns=frame.capture_time_ns,
            received_ns=received_ns,
        )

    # process: in the order of sending

    async def _process(self) -> None:
        while (arrival := await self._inbox.get()) is not None:
            match arrival:
                case ArrivedFrame():
                    await self._process_frame(arrival)
                case SkippedFrames():
                    await self._report_skipped(arrival.frame_ids)
                case ArrivedRequest():
                    await self._replies.put(self._apply(arrival.message))
                case _:
                    assert_never(arrival)
        await self._replies.close()

    async def _process_frame(self, arrival: ArrivedFrame) -> None:
        frame_id = arrival.packet.frame_id
        clock = StageClock(arrival.received_ns)
        decoded, picture = await self._run(self._decode, arrival, clock)
        lost = [frame_id] if picture is None else []
        for warning in messages.write_faults(decoded.faults, lost):
            await self._replies.put(warning)
        if decoded.needs_keyframe:
            await self._replies.put(messages.write_keyframe_request(frame_id))
        if picture is not None:
            self._remember_size(picture)
            await self._offer(arrival, clock, picture)

    def _decode(self, arrival: ArrivedFrame, clock: StageClock) -> tuple[Decoded, Picture | None]:
        """Turn a packet into a picture at the tracker's input size. Runs in a thread."""
        clock.add("queue", clock.elapsed_ns())
        with clock.measure("decode"):
            decoded = self._decoder.decode(arrival.packet)
        source = decoded.picture
        if source is None:
            return decoded, None
        with clock.measure("preprocess"):
            pixels = self._resize(source.rgb, self._stream.input_size_px)
        picture = Picture(
            frame_id=arrival.packet.frame_id,
            pixels=pixels,
            width_px=source.width_px,
            height_px=source.height_px,
            time_s=self._time_s(arrival),
            is_trusted=source.is_trusted,
        )
        return decoded, picture

    def _time_s(self, arrival: ArrivedFrame) -> float:
        if arrival.pts is None:
            return arrival.received_ns / 1e9
        return float(arrival.pts * self._settings.time_base)

    async def _offer(self, arrival: ArrivedFrame, clock: StageClock, picture: Picture) -> None:
        if self._settings.is_live:
            self._note_dropped(self._replies.take_dropped())
            if self._replies.is_full:
                # The client does not read: decoding goes on, tracking for nobody does not.
                self._note_dropped([picture.frame_id])
                return
        else:
            await self._offers.acquire()
        pending = PendingFrame(
            arrival=arrival,
            width_px=picture.width_px,
            height_px=picture.height_px,
            clock=clock,
            masklets=self._stream.offer(picture),
        )
        await self._replies.put(pending)

    def _remember_size(self, picture: Picture) -> None:
        self._picture_sizes[picture.frame_id] = (picture.width_px, picture.height_px)
        if len(self._picture_sizes) > REMEMBERED_FRAMES:
            self._picture_sizes.popitem(last=False)

    def _note_dropped(self, frame_ids: list[int]) -> None:
        self._dropped_total += len(frame_ids)
        self._dropped_frame_ids = (self._dropped_frame_ids + frame_ids)[-MOST_DROPPED_IDS:]

    async def _report_skipped(self, frame_ids: list[int]) -> None:
        needs_keyframe = self._decoder.skip(frame_ids[-1])
        if not self._settings.video.codec.is_inter_coded:
            self._note_dropped(frame_ids)
            return
        text = (
            f"decoding fell behind: {len(frame_ids)} frames from {frame_ids[0]} on skipped up to a keyframe"
        )
        await self._replies.put(
            messages.write_warning(pb.WARNING_REASON_PACKETS_SKIPPED, text, lost_frame_ids=frame_ids)
        )
        if needs_keyframe:
            await self._replies.put(messages.write_keyframe_request(frame_ids[-1]))

    def _apply(self, request: pb.TrackRequest) -> Reply:
        match request.WhichOneof("request"):
            case "prompt":
                return self._apply_prompt(request.prompt)
            case "remove_object":
                object_id = request.remove_object.object_id
                return PendingRemoval(object_id=object_id, done=self._stream.remove_object(object_id))
            case "reset_stream":
                return PendingReset(done=self._stream.reset())
            case _:
                text = f"PinFrame {request.pin_frame.frame_id}: not in this release; prompt on recent frames"
                return messages.write_warning(pb.WARNING_REASON_UNSUPPORTED, text)

    def _apply_prompt(self, message: pb.Prompt) -> Reply:
        try:
            width_px, height_px = self._find_picture_size(message.frame_id)
            prompt = read_prompt(message, width_px, height_px)
        except TrocarError as error:
            return messages.write_rejection(message, _rejection_reason(error), str(error))
        outcome = self._stream.prompt(prompt)
        return PendingPrompt(message=message, width_px=width_px, height_px=height_px, outcome=outcome)

    def _find_picture_size(self, frame_id: int) -> tuple[int, int]:
        if frame_id in self._picture_sizes:
            return self._picture_sizes[frame_id]
        if not self._picture_sizes:
            raise UnknownFrameError(f"frame {frame_id}: no picture has come yet; send frames before prompts")
        oldest, newest = next(iter(self._picture_sizes)), next(reversed(self._picture_sizes))
        raise UnknownFrameError(
            f"frame {frame_id} is none of the pictures at hand, {oldest} to {newest}: prompt on a recent "
            "frame, after sending it"
        )

    # respond: in the same order

    async def _respond(self, send: Send) -> None:
        while (reply := await self._replies.get()) is not None:
            match reply:
                case pb.TrackResponse():
                    await send(reply)
                case PendingFrame():
                    await self._answer_frame(reply, send)
                case PendingPrompt():
                    await send(await self._answer_prompt(reply))
                case PendingRemoval():
                    await self._answer_removal(reply, send)
                case PendingReset():
                    await self._settle(reply.done)
                case _:
                    assert_never(reply)

    async def _answer_frame(self, pending: PendingFrame, send: Send) -> None:
        masklets = await self._settle(pending.masklets)
        if not self._settings.is_live:
            self._offers.release()
        if masklets.is_dropped:
            self._note_dropped([pending.frame_id])
            return
        response = await self._run(self._encode_result, pending, masklets)
        result = response.frame_result
        result.dropped_frame_ids.extend(sorted(self._dropped_frame_ids))
        result.dropped_frames_total = self._dropped_total
        self._dropped_frame_ids = []
        result.queue_depth_frames = self._inbox.waiting_frames + self._replies.waiting_frames
        result.service_latency_ns = pending.clock.elapsed_ns()
        await send(response)

    def _encode_result(self, pending: PendingFrame, tracked: FrameMasklets) -> pb.TrackResponse:
        """Write a frame's result, but for what is known only when it is sent. Runs in a thread."""
        clock = pending.clock
        with clock.measure("encode_masklets"):
            encoded = self._encode_masklets(tracked.masklets, pending.width_px, pending.height_px)
        for stage, duration_ns in tracked.stage_ns.items():
            clock.add(stage, duration_ns)
        result = pb.FrameResult(
            frame_id=pending.frame_id,
            pts=pending.arrival.pts,
            capture_time_ns=pending.arrival.capture_time_ns,
            masklets=encoded,
            is_trusted=tracked.is_trusted,
            width_px=pending.width_px,
            height_px=pending.height_px,
            stages=messages.write_stage_times(clock.stage_ns),
        )
        return pb.TrackResponse(frame_result=result)

    def _encode_masklets(
        self, masklets: tuple[Masklet, ...], width_px: int, height_px: int
    ) -> list[pb.Masklet]:
        settings, logits = self._settings, [masklet.mask_logits for masklet in masklets]
        mask_size = (width_px, height_px)
        if settings.is_low_resolution and logits:
            mask_size = (logits[0].shape[1], logits[0].shape[0])
        masks = masks_from_logits(logits, *mask_size, resolve_overlaps=settings.resolve_overlaps)
        return [
            messages.write_masklet(masklet, mask, settings.mask_encoding, width_px, height_px)
            for masklet, mask in zip(masklets, masks, strict=True)
        ]

    async def _answer_prompt(self, pending: PendingPrompt) -> pb.TrackResponse:
        try:
            outcome = await self._settle(pending.outcome)
        except ServerNotReadyError:
            raise
        except TrocarError as error:
            return messages.write_rejection(pending.message, _rejection_reason(error), str(error))
        masklets = await self._run(
            self._encode_masklets, (outcome.masklet,), pending.width_px, pending.height_px
        )
        accepted = pb.PromptAccepted(
            prompt_id=pending.message.prompt_id, frame_id=outcome.frame_id, masklet=masklets[0]
        )
        return pb.TrackResponse(prompt_accepted=accepted)

    async def _answer_removal(self, pending: PendingRemoval, send: Send) -> None:
        try:
            await self._settle(pending.done)
        except ServerNotReadyError:
            raise
        except TrocarError as error:
            await send(messages.write_warning(pb.WARNING_REASON_UNKNOWN_OBJECT, str(error)))

    async def _settle(self, future: Future[T]) -> T:
        """Wait for the tracker.

        Raises:
            ServerNotReadyError: the tracker stopped and cancelled what was pending.
        """
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ServerNotReadyError("the tracker stopped: reconnect") from None

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _rejection_reason(error: TrocarError) -> pb.RejectionReason.ValueType:
    match error:
        case UnknownFrameError() | FrameNotKeptError():
            return pb.REJECTION_REASON_UNKNOWN_FRAME
        case CapacityError():
            return pb.REJECTION_REASON_CAPACITY
        case _:
            return pb.REJECTION_REASON_INVALID_PROMPT
