"""Results as a client receives them, without a server."""

from trocar.client_core import Result, TrackedObject
from trocar.masklet_codec import EncodedMask, MaskEncoding
from trocar_engines.masklets import ObjectState

MASK = EncodedMask(width_px=1, height_px=1, encoding=MaskEncoding.RLE, data=b"\x01")


def tracked(object_id: int) -> TrackedObject:
    return TrackedObject(
        object_id=object_id,
        state=ObjectState.LOST,
        predicted_iou=0.0,
        presence=0.0,
        class_name="unknown",
        class_probability=0.0,
        frames_since_seen=1,
        box=None,
        encoded_mask=MASK,
    )


def result(frame_id: int, *object_ids: int) -> Result:
    return Result(
        frame_id=frame_id,
        pts=None,
        capture_time_ns=0,
        objects=tuple(map(tracked, object_ids)),
        is_trusted=True,
        width_px=1,
        height_px=1,
        stage_ns={},
        service_latency_ns=0,
        queue_depth_frames=0,
        dropped_frame_ids=(),
        dropped_frames_total=0,
    )
