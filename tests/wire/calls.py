"""A client written from the contract alone: raw messages, no code of trocar.client."""

import asyncio
from collections.abc import Callable, Sequence

import grpc
from grpc import aio

from trocar.v1 import tracking_pb2 as pb
from trocar.v1 import tracking_pb2_grpc as pb_grpc
from wire.clips import disc_center

TIMEOUT_S = 10.0
RED_POINT = pb.Point(x=disc_center(0)[0], y=disc_center(0)[1], label=pb.POINT_LABEL_ON_OBJECT)


class Call:
    """One Track call."""

    def __init__(self, channel: aio.Channel) -> None:
        self._call = pb_grpc.TrackingServiceStub(channel).Track()  # type: ignore[call-arg]

    async def open(
        self,
        codec: pb.VideoCodec.ValueType = pb.VIDEO_CODEC_H264_ANNEX_B,
        *,
        delivery: pb.Delivery.ValueType = pb.DELIVERY_EVERY,
        settings: pb.OpenStream | None = None,
    ) -> pb.StreamOpened:
        message = pb.OpenStream(video=pb.VideoFormat(codec=codec), delivery=delivery)
        if settings is not None:
            message.MergeFrom(settings)
        await self.write(pb.TrackRequest(open_stream=message))
        response = await self.read()
        assert response.WhichOneof("response") == "stream_opened"
        return response.stream_opened

    async def write(self, request: pb.TrackRequest) -> None:
        await asyncio.wait_for(self._call.write(request), TIMEOUT_S)

    async def frame(self, frame_id: int, payload: bytes, *, pts: int | None = None) -> None:
        await self.write(
            pb.TrackRequest(video_frame=pb.VideoFrame(frame_id=frame_id, payload=payload, pts=pts))
        )

    async def frames(self, payloads: Sequence[bytes], *, first_id: int = 0) -> None:
        for frame_id, payload in enumerate(payloads, first_id):
            await self.frame(frame_id, payload)

    async def prompt(self, prompt: pb.Prompt) -> None:
        await self.write(pb.TrackRequest(prompt=prompt))

    async def prompt_red(self, frame_id: int, *, object_id: int = 1) -> None:
        await self.prompt(pb.Prompt(object_id=object_id, frame_id=frame_id, points=[RED_POINT]))

    async def remove(self, object_id: int) -> None:
        await self.write(pb.TrackRequest(remove_object=pb.RemoveObject(object_id=object_id)))

    async def finish(self) -> None:
        await self._call.done_writing()

    def cancel(self) -> None:
        self._call.cancel()

    async def read(self) -> pb.TrackResponse:
        response = await asyncio.wait_for(self._call.read(), TIMEOUT_S)
        assert isinstance(response, pb.TrackResponse), "the call ended instead of answering"
        return response

    async def read_result(self) -> pb.FrameResult:
        while True:
            response = await self.read()
            if response.WhichOneof("response") == "frame_result":
                return response.frame_result

    async def read_rest(self) -> list[pb.TrackResponse]:
        await self.finish()
        responses = []
        while isinstance(response := await asyncio.wait_for(self._call.read(), TIMEOUT_S), pb.TrackResponse):
            responses.append(response)
        return responses

    async def read_until_failure(self) -> list[pb.TrackResponse]:
        """Everything up to the call's failure."""
        responses = []
        try:
            while isinstance(
                response := await asyncio.wait_for(self._call.read(), TIMEOUT_S), pb.TrackResponse
            ):
                responses.append(response)
        except aio.AioRpcError:
            return responses
        raise AssertionError("the call went well")

    async def read_failure(self) -> tuple[grpc.StatusCode, str]:
        """Read until the call fails."""
        try:
            while isinstance(await asyncio.wait_for(self._call.read(), TIMEOUT_S), pb.TrackResponse):
                pass
        except aio.AioRpcError:
            pass
        return await self._call.code(), await self._call.details() or ""


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def results_of(responses: Sequence[pb.TrackResponse]) -> list[pb.FrameResult]:
    return [one.frame_result for one in responses if one.WhichOneof("response") == "frame_result"]


def accepted_of(responses: Sequence[pb.TrackResponse]) -> list[pb.PromptAccepted]:
    return [one.prompt_accepted for one in responses if one.HasField("prompt_accepted")]


def warnings_of(responses: Sequence[pb.TrackResponse]) -> list[pb.StreamWarning]:
    return [one.stream_warning for one in responses if one.WhichOneof("response") == "stream_warning"]


def rejections_of(responses: Sequence[pb.TrackResponse]) -> list[pb.PromptRejected]:
    return [one.prompt_rejected for one in responses if one.WhichOneof("response") == "prompt_rejected"]


def count_keyframe_requests(responses: Sequence[pb.TrackResponse]) -> int:
    return sum(one.WhichOneof("response") == "keyframe_request" for one in responses)


def accounted_ids(responses: Sequence[pb.TrackResponse]) -> list[int]:
    """Every frame id that the responses answer, in any of the three ways."""
    ids = [lost for warning in warnings_of(responses) for lost in warning.lost_frame_ids]
    for result in results_of(responses):
        ids += [result.frame_id, *result.dropped_frame_ids]
    return sorted(ids)
