"""One video stream: requests in order, pictures to the tracker, results back in order.

    receive ── inbox ── process (decode, resize, offer) ── replies ── respond (await masklets, encode, send)

Three tasks on the event loop, joined by two bounded queues; everything that computes runs in threads.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar, assert_never

from google.protobuf.message import DecodeError

from trocar import messages
from trocar.config import ServerConfig
from trocar.decode import Decoded, Packet, PacketDecoder
from trocar.errors import (
    ContractError,
    DecoderHungError,
    LimitError,
    ServerNotReadyError,
    UnknownFrameError,
    UnreadError,
)
from trocar.inbox import ArrivedFrame, ArrivedRequest, Inbox, SkippedFrames
from trocar.masklet_codec import masks_from_logits
from trocar.messages import StreamSettings
from trocar.prompts import read_prompt
from trocar.record import StreamRecord
from trocar.replies import (
    PendingFrame,
    PendingPin,
    PendingPrompt,
    PendingRemoval,
    PendingReset,
    Replies,
    Reply,
)
from trocar.security import Rate
from trocar.stream_threads import StreamThreads
from trocar.telemetry import Span, StageClock
from trocar.tracking import Resize, TrackedStream
from trocar.v1 import tracking_pb2 as pb
from trocar_engines.errors import CapacityError, DeviceFaultError, FrameNotKeptError, TrocarError
from trocar_engines.masklets import FrameMasklets, Masklet, Picture

T = TypeVar("T")
Send = Callable[[pb.TrackResponse], Awaitable[None]]

QUEUE_CAPACITY = 4
"""Pictures offered and not yet tracked in EVERY: what the tracker's own queue holds."""
WAITING_REPLIES = 8
"""Two pictures in the tracker, and what a client leaves unread for a moment."""
BEHIND_FRAMES = 4
"""Of a live stream that wait for the decoder: until fewer do, pictures are decoded for the sake of the next
ones only. So a stream that is taken up from its last keyframe on is soon back in the present."""
LONGEST_SILENCE_S = 0.25
"""A live stream that is behind still tracks a frame so often."""
REMEMBERED_FRAMES = 1_024
"""Picture sizes kept for prompts: longer than any tracker keeps frames, and little memory."""
MOST_EARLY_PROMPTS = 16
"""Prompts that wait for a frame which has not come yet."""
MOST_DROPPED_IDS = 1_024
"""Reported in one result, as the contract says; the total goes on counting."""
NOT_THE_REQUEST = (ServerNotReadyError, DeviceFaultError, DecoderHungError)
"""Failures to which no other request would be the answer: they end the stream, and another server goes on."""
SESSION_THREADS = 2
"""That a stream keeps busy: one decodes, one encodes; each is awaited before its next job."""


class Session:
    """One Track call after its OpenStream.

    Args:
        settings: what the client asked for.
        config: what the server admits.
        stream: the tracker's end; the caller closes it.
        resize: from source pixels to the tracker's input.
        record: counts what happens.
        threads: those of all streams, `SESSION_THREADS` for each; the caller closes them.
    """

    def __init__(
        self,
        *,
        settings: StreamSettings,
        config: ServerConfig,
        stream: TrackedStream,
        resize: Resize,
        record: StreamRecord,
        threads: StreamThreads,
    ) -> None:
        self._settings = settings
        self._config = config
        self._record = record
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
        self._prompt_rate = Rate(config.max_prompts_per_s, settings.max_objects)
        self._request_rate = Rate(config.max_requests_per_s, burst=0)
        self._threads = threads
        self._receiver: asyncio.Task[None] | None = None
        self._was_cut_off = False
        self._at_the_gate: ArrivedFrame | ArrivedRequest | None = None
        self._wanted_s = 0.0
        self._last_frame_id: int | None = None
        self._processed_frame_id = -1
        self._early_prompts: list[pb.Prompt] = []
        self._picture_sizes: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._pinned_frame_id: int | None = None
        self._dropped_frame_ids: list[int] = []
        self._dropped_total = 0

    async def run(self, requests: AsyncIterator[pb.TrackRequest], send: Send) -> None:
        """Serve the stream until the client has closed its side and everything is answered.

        Args:
            requests: all after OpenStream.
            send: hands a response to the transport; waits while the client does not read.

        Raises:
            ContractError: the client broke the contract.
            LimitError: the client fell silent, or does not read.
            DecoderHungError: decoding a packet, reading a prompt or coding masks does not end.
            ServerNotReadyError: the tracker stopped, or the server shut down before the client had finished.
        """
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                self._receiver = tasks.create_task(self._receive(requests))
                tasks.create_task(self._process())
                tasks.create_task(self._respond(send))
        except BaseExceptionGroup as failures:
            failure = failures.exceptions[0]
            # A group and its frames refer to each other, and in a task of ours that failed the frames refer
            # to us: the session and its decoder would stay until the garbage collector comes by.
            failures.__traceback__ = None
        finally:
            self._receiver = None
        if failure is not None:
            raise failure
        if self._was_cut_off:
            raise ServerNotReadyError("the server shut down; all that was received is answered: reconnect")

    async def warn_of_shutdown(self, grace_s: float) -> None:
        """Tell the client that the server goes; the stream still takes requests."""
        text = f"the server shuts down in {grace_s:g} s: close your side and go on with another server"
        await self._replies.put(messages.write_warning(pb.WARNING_REASON_SHUTTING_DOWN, text))

    def cut_off(self) -> None:
        """Take no more requests; answer those that were received, then end the stream."""
        if self._receiver is not None and not self._receiver.done():
            self._was_cut_off = True
            self._receiver.cancel()

    # receive: what may wait at the gate

    async def _receive(self, requests: AsyncIterator[pb.TrackRequest]) -> None:
        try:
            await self._take_requests(requests)
        except asyncio.CancelledError:
            if not self._was_cut_off:
                raise
            if self._at_the_gate is not None:
                # It was read from the transport, so it is owed an answer like those that had found room.
                await self._inbox.put(self._at_the_gate)
        await self._inbox.close()

    async def _take_requests(self, requests: AsyncIterator[pb.TrackRequest]) -> None:
        while (request := await self._next_request(requests)) is not None:
            received_ns = time.perf_counter_ns()
            kind = request.WhichOneof("request")
            if kind is None:
                raise ContractError("an empty TrackRequest: set one of its fields")
            if kind == "open_stream":
                raise ContractError("a second OpenStream: expected it once, as the first message of a call")
            if kind == "video_frame":
                self._at_the_gate = self._accept_frame(request.video_frame, received_ns)
            else:
                self._at_the_gate = ArrivedRequest(message=request, size_bytes=request.ByteSize())
            await self._inbox.put(self._at_the_gate)
            self._at_the_gate = None
            if self._settings.is_live or kind != "video_frame":
                # Nothing else slows a live stream down; in EVERY frames wait for the tracker as it is.
                await asyncio.sleep(self._request_rate.borrow_s())

    async def _next_request(self, requests: AsyncIterator[pb.TrackRequest]) -> pb.TrackRequest | None:
        """Wait for a request, None for the end; time that the server itself needs is not silence."""
        idle_s = self._config.max_idle_s
        try:
            async with asyncio.timeout(idle_s):
                return await next_request(requests)
        except TimeoutError:
            text = f"no request in {idle_s:g} s: close streams that are not in use"
            raise LimitError("max_idle_s", text) from None

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
                    await self._apply_early_prompts(arrival.packet.frame_id)
                case SkippedFrames():
                    await self._report_skipped(arrival.frame_ids)
                    await self._apply_early_prompts(arrival.frame_ids[-1])
                case ArrivedRequest():
                    reply = await self._apply(arrival.message)
                    if reply is not None:
                        await self._replies.put(reply)
                case _:
                    assert_never(arrival)
        for prompt in self._early_prompts:
            text = f"frame {prompt.frame_id} never came: the stream ended before it"
            await self._replies.put(self._reject(prompt, pb.REJECTION_REASON_UNKNOWN_FRAME, text))
        await self._replies.close()

    async def _process_frame(self, arrival: ArrivedFrame) -> None:
        frame_id = arrival.packet.frame_id
        if self._settings.is_live:
            self._note_dropped(self._replies.take_dropped())
        else:
            await self._offers.acquire()
        decoded, pending = await self._compute(
            f"decoding frame {frame_id} of {arrival.size_bytes} bytes",
            self._decode_and_offer,
            arrival,
            self._is_wanted(frame_id),
        )
        picture = decoded.picture
        lost = [frame_id] if picture is None else []
        self._record.count_lost(len(lost))
        for warning in messages.write_faults(decoded.faults, lost):
            await self._replies.put(warning)
        if decoded.needs_keyframe:
            await self._replies.put(messages.write_keyframe_request(frame_id))
        if picture is not None:
            self._remember_size(frame_id, picture.width_px, picture.height_px)
        if pending is not None:
            await self._replies.put(pending)
        elif not self._settings.is_live:
            self._offers.release()
        elif picture is not None:
            self._note_dropped([frame_id])

    def _is_wanted(self, frame_id: int) -> bool:
        """Whether a frame is worth more than its decoding, which the frames after it need."""
        is_behind = self._settings.is_live and self._inbox.waiting_frames >= BEHIND_FRAMES
        # Where decoding alone is too slow a stream stays behind for ever, and must still say something.
        is_due = time.monotonic() - self._wanted_s > LONGEST_SILENCE_S
        is_wanted = not is_behind or is_due or any(one.frame_id == frame_id for one in self._early_prompts)
        if is_wanted:
            self._wanted_s = time.monotonic()
        return is_wanted

    def _decode_and_offer(
        self, arrival: ArrivedFrame, is_wanted: bool
    ) -> tuple[Decoded, PendingFrame | None]:
        """Turn a packet into a picture at the tracker's input size and hand it over. Runs in a thread.

        Offered from here, not from the event loop, which would have to be woken first.

        Returns:
            what the decoder says, and the frame on its way; None without a picture, for one that is not
            wanted, or without a reader.
        """
        clock = StageClock(arrival.received_ns)
        clock.add("queue", clock.elapsed_ns())
        with clock.measure("decode"):
            decoded = self._decoder.decode(arrival.packet)
            source = decoded.picture
            # When the client does not read, decoding goes on; tracking for nobody does not.
            has_no_reader = self._settings.is_live and self._replies.is_full
            if source is None or not is_wanted or has_no_reader:
                return decoded, None
            rgb = source.rgb
        with clock.measure("preprocess"):
            pixels = self._resize(rgb, self._stream.input_size_px)
        picture = Picture(
            frame_id=arrival.packet.frame_id,
            pixels=pixels,
            width_px=source.width_px,
            height_px=source.height_px,
            time_s=self._time_s(arrival),
            is_trusted=source.is_trusted,
        )
        pending = PendingFrame(
            arrival=arrival,
            width_px=picture.width_px,
            height_px=picture.height_px,
            clock=clock,
            masklets=self._stream.offer(picture),
            offered_ns=time.perf_counter_ns(),
        )
        return decoded, pending

    def _time_s(self, arrival: ArrivedFrame) -> float:
        if arrival.pts is None:
            return arrival.received_ns / 1e9
        return float(arrival.pts * self._settings.time_base)

    def _remember_size(self, frame_id: int, width_px: int, height_px: int) -> None:
        self._picture_sizes[frame_id] = (width_px, height_px)
        if len(self._picture_sizes) > REMEMBERED_FRAMES:
            oldest, size = self._picture_sizes.popitem(last=False)
            if oldest == self._pinned_frame_id:
                self._picture_sizes[oldest] = size

    def _note_dropped(self, frame_ids: list[int]) -> None:
        self._dropped_total += len(frame_ids)
        self._record.count_dropped(len(frame_ids))
        self._dropped_frame_ids = (self._dropped_frame_ids + frame_ids)[-MOST_DROPPED_IDS:]

    async def _report_skipped(self, frame_ids: list[int]) -> None:
        needs_keyframe = self._decoder.skip(frame_ids[-1])
        if not self._settings.video.codec.is_inter_coded:
            self._note_dropped(frame_ids)
            return
        self._record.count_lost(len(frame_ids))
        text = (
            f"decoding fell behind: {len(frame_ids)} frames from {frame_ids[0]} on skipped up to a keyframe"
        )
        await self._replies.put(
            messages.write_warning(pb.WARNING_REASON_PACKETS_SKIPPED, text, lost_frame_ids=frame_ids)
        )
        if needs_keyframe:
            await self._replies.put(messages.write_keyframe_request(frame_ids[-1]))

    async def _apply(self, request: pb.TrackRequest) -> Reply | None:
        """Hand a request to the tracker; None for a prompt that waits for its frame."""
        match request.WhichOneof("request"):
            case "prompt":
                return await self._apply_prompt(request.prompt)
            case "remove_object":
                object_id = request.remove_object.object_id
                return PendingRemoval(object_id=object_id, done=self._stream.remove_object(object_id))
            case "reset_stream":
                return PendingReset(done=self._stream.reset())
            case _:
                self._pinned_frame_id = request.pin_frame.frame_id
                return PendingPin(done=self._stream.pin(request.pin_frame.frame_id))

    async def _apply_early_prompts(self, processed_frame_id: int) -> None:
        """Apply the prompts that have waited for a frame which is now processed."""
        self._processed_frame_id = processed_frame_id
        if not self._early_prompts or not self._picture_sizes:
            return
        due = [prompt for prompt in self._early_prompts if prompt.frame_id <= processed_frame_id]
        self._early_prompts = [prompt for prompt in self._early_prompts if prompt not in due]
        for prompt in due:
            await self._replies.put(await self._apply_to_picture(prompt))

    async def _apply_prompt(self, message: pb.Prompt) -> Reply | None:
        if not self._prompt_rate.take():
            text = f"limit max_prompts_per_s: more than {self._config.max_prompts_per_s:g} prompts a second"
            return self._reject(message, pb.REJECTION_REASON_RATE, text)
        if message.frame_id <= self._processed_frame_id and self._picture_sizes:
            return await self._apply_to_picture(message)
        if len(self._early_prompts) == MOST_EARLY_PROMPTS:
            text = (
                f"frame {message.frame_id} has not come yet and {MOST_EARLY_PROMPTS} prompts wait for frames "
                "already: send the frame first"
            )
            return self._reject(message, pb.REJECTION_REASON_UNKNOWN_FRAME, text)
        self._early_prompts.append(message)
        return None

    async def _apply_to_picture(self, message: pb.Prompt) -> Reply:
        try:
            width_px, height_px = self._find_picture_size(message.frame_id)
            # In a thread: a mask of many pixels takes long enough for other streams to feel it.
            prompt = await self._compute("reading a prompt", read_prompt, message, width_px, height_px)
        except NOT_THE_REQUEST:
            raise
        except TrocarError as error:
            return self._reject(message, _rejection_reason(error), str(error))
        outcome = self._stream.prompt(prompt)
        return PendingPrompt(message=message, width_px=width_px, height_px=height_px, outcome=outcome)

    def _find_picture_size(self, frame_id: int) -> tuple[int, int]:
        """Size of the frame's picture; a neighbour's for one that was lost."""
        if frame_id in self._picture_sizes:
            return self._picture_sizes[frame_id]
        oldest, newest = min(self._picture_sizes), max(self._picture_sizes)
        if frame_id < oldest:
            raise UnknownFrameError(
                f"frame {frame_id} is none of the pictures at hand, {oldest} to {newest}: prompt on a recent "
                "frame, or pin one"
            )
        return self._picture_sizes[min(self._picture_sizes, key=lambda known: abs(known - frame_id))]

    # respond: in the same order

    async def _respond(self, transport_send: Send) -> None:
        async def send(response: pb.TrackResponse) -> None:
            await send_in_time(transport_send, response, self._config.max_unread_s)

        while (reply := await self._replies.get()) is not None:
            match reply:
                case pb.TrackResponse():
                    await send(reply)
                case PendingFrame():
                    await self._answer_frame(reply, send)
                case PendingPrompt():
                    await send(await self._answer_prompt(reply))
                case PendingPin():
                    await self._answer_pin(reply, send)
                case PendingRemoval():
                    await self._answer_removal(reply, send)
                case PendingReset():
                    outcome = await self._settle(reply.done)
                    if isinstance(outcome, TrocarError):
                        raise outcome
                case _:
                    assert_never(reply)

    async def _answer_frame(self, pending: PendingFrame, send: Send) -> None:
        masklets = await self._settle(pending.masklets)
        if isinstance(masklets, TrocarError):
            raise masklets
        pending.clock.spans.append(Span("track", pending.offered_ns, time.perf_counter_ns()))
        if not self._settings.is_live:
            self._offers.release()
        if masklets.is_dropped:
            self._note_dropped([pending.frame_id])
            return
        response = await self._compute("coding masks", self._encode_result, pending, masklets)
        result = response.frame_result
        result.dropped_frame_ids.extend(sorted(self._dropped_frame_ids))
        result.dropped_frames_total = self._dropped_total
        self._dropped_frame_ids = []
        result.queue_depth_frames = self._inbox.waiting_frames + self._replies.waiting_frames
        result.service_latency_ns = pending.clock.elapsed_ns()
        await send(response)
        self._record.count_frame(pending.frame_id, pending.clock, masklets)

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
        outcome = await self._settle(pending.outcome)
        if isinstance(outcome, TrocarError):
            return self._reject(pending.message, _rejection_reason(outcome), str(outcome))
        masklets = await self._compute(
            "coding a mask", self._encode_masklets, (outcome.masklet,), pending.width_px, pending.height_px
        )
        accepted = pb.PromptAccepted(
            prompt_id=pending.message.prompt_id, frame_id=outcome.frame_id, masklet=masklets[0]
        )
        response = pb.TrackResponse(prompt_accepted=accepted)
        self._record.count_prompt(pending.message, response)
        return response

    def _reject(
        self, message: pb.Prompt, reason: pb.RejectionReason.ValueType, text: str
    ) -> pb.TrackResponse:
        response = messages.write_rejection(message, reason, text)
        self._record.count_prompt(message, response)
        return response

    async def _answer_pin(self, pending: PendingPin, send: Send) -> None:
        outcome = await self._settle(pending.done)
        if isinstance(outcome, TrocarError):
            await send(messages.write_warning(pb.WARNING_REASON_UNKNOWN_FRAME, str(outcome)))

    async def _answer_removal(self, pending: PendingRemoval, send: Send) -> None:
        outcome = await self._settle(pending.done)
        if isinstance(outcome, TrocarError):
            await send(messages.write_warning(pb.WARNING_REASON_UNKNOWN_OBJECT, str(outcome)))

    async def _compute(self, what: str, work: Callable[..., T], *arguments: object) -> T:
        try:
            return await self._threads.run(work, *arguments, is_live=self._settings.is_live)
        except TimeoutError:
            limit_s = self._config.max_decode_s
            raise DecoderHungError(f"limit max_decode_s: {what} takes more than {limit_s:g} s") from None

    async def _settle(self, future: Future[T]) -> T | TrocarError:
        """Wait for the tracker.

        Returns:
            Its answer, or why it refuses the request. A refusal that is raised would hold the frames, and
            these the future that holds the refusal, until the garbage collector comes by.

        Raises:
            ServerNotReadyError: the tracker stopped and cancelled what was pending.
            DeviceFaultError: the device failed.
        """
        settled = asyncio.wrap_future(future)
        try:
            await asyncio.wait((settled,))
        finally:
            settled.cancel()
        if settled.cancelled():
            raise ServerNotReadyError("the tracker stopped: reconnect")
        error = settled.exception()
        if error is None:
            return settled.result()
        if isinstance(error, TrocarError) and not isinstance(error, NOT_THE_REQUEST):
            return error
        raise error


async def next_request(requests: AsyncIterator[pb.TrackRequest]) -> pb.TrackRequest | None:
    """Wait for a call's next message; None when the client has closed its side.

    Raises:
        ContractError: what came is no message.
    """
    try:
        return await anext(requests, None)
    except DecodeError:
        raise ContractError("bytes that are no TrackRequest: send messages of trocar.v1") from None


async def send_in_time(send: Send, response: pb.TrackResponse, unread_s: float) -> None:
    """Hand a response to the transport.

    Raises:
        UnreadError: the client has not let it through for so long.
    """
    try:
        async with asyncio.timeout(unread_s):
            await send(response)
    except TimeoutError:
        text = f"results are left unread for {unread_s:g} s: read them, or close the stream"
        raise UnreadError("max_unread_s", text) from None


def _rejection_reason(error: TrocarError) -> pb.RejectionReason.ValueType:
    match error:
        case UnknownFrameError() | FrameNotKeptError():
            return pb.REJECTION_REASON_UNKNOWN_FRAME
        case CapacityError():
            return pb.REJECTION_REASON_CAPACITY
        case _:
            return pb.REJECTION_REASON_INVALID_PROMPT
