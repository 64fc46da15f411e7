import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from trocar.client_core import Result, TrackedObject
from trocar.errors import ResultError
from trocar.masklet_codec import encode_mask
from trocar.overlay import COLORS, color_of, describe, draw_overlay
from trocar.writer import Header, ResultWriter, check_png_ids, davis_palette
from trocar_engines.masklets import ObjectState, UInt8Array
from wire.clips import draw_frame

WIDTH_PX, HEIGHT_PX = 161, 121
HEADER = Header(
    source="clip.mp4",
    model="fake",
    memory="fifo",
    time_base=Fraction(1, 30),
    width_px=WIDTH_PX,
    height_px=HEIGHT_PX,
)


def tracked(
    object_id: int, rows: slice, columns: slice, state: ObjectState = ObjectState.VISIBLE
) -> TrackedObject:
    mask = np.zeros((HEIGHT_PX, WIDTH_PX), np.bool_)
    mask[rows, columns] = True
    box = (columns.start, rows.start, columns.stop, rows.stop) if mask.any() else None
    return TrackedObject(
        object_id=object_id,
        state=state,
        predicted_iou=0.875,
        presence=1.0,
        class_name="hook",
        class_probability=0.5,
        frames_since_seen=0,
        box=box,
        encoded_mask=encode_mask(mask),
    )


def result(frame_id: int, *objects: TrackedObject, is_trusted: bool = True) -> Result:
    return Result(
        frame_id=frame_id,
        pts=frame_id,
        capture_time_ns=0,
        objects=objects,
        is_trusted=is_trusted,
        width_px=WIDTH_PX,
        height_px=HEIGHT_PX,
        stage_ns={},
        service_latency_ns=1,
        queue_depth_frames=0,
        dropped_frame_ids=(),
        dropped_frames_total=0,
    )


def picture(index: int) -> UInt8Array:
    return draw_frame(index, WIDTH_PX, HEIGHT_PX)


def write_three(folder: Path) -> None:
    square = tracked(9, slice(10, 20), slice(30, 50))
    with ResultWriter(folder, HEADER) as writer:
        writer.add(result(0, square), frame_id=0, pts=0, rgb=picture(0))
        writer.add(None, frame_id=1, pts=1, rgb=None)
        writer.add(result(2, square, is_trusted=False), frame_id=2, pts=2, rgb=picture(2))
        writer.commit({"frames": 3})


def test_masks_are_paletted_with_the_object_id_as_value(tmp_path: Path) -> None:
    write_three(tmp_path / "out")
    paths = sorted((tmp_path / "out" / "masks").iterdir())
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
    with Image.open(paths[0]) as image:
        assert (image.mode, image.size) == ("P", (WIDTH_PX, HEIGHT_PX))
        assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]  # type: ignore[index]
        values = np.asarray(image)
    assert values[15, 40] == 9
    assert np.count_nonzero(values) == 200
    with Image.open(paths[1]) as unanswered:
        assert not np.asarray(unanswered).any()


def test_palette_is_that_of_davis() -> None:
    palette = davis_palette()
    assert palette[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert palette[8].tolist() == [64, 0, 0]
    assert palette[255].tolist() == [224, 224, 192]


def test_overlay_is_h264_with_one_picture_per_frame_in_even_size(tmp_path: Path) -> None:
    write_three(tmp_path / "out")
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as video:
        stream = video.streams.video[0]
        pictures = list(video.decode(stream))
        assert stream.codec_context.name == "h264"
    assert len(pictures) == 3
    assert (pictures[0].width, pictures[0].height) == (WIDTH_PX + 1, HEIGHT_PX + 1)
    assert [round(float(one.time or 0) * 30) for one in pictures] == [0, 1, 2]


def test_frame_that_comes_first_without_a_picture_has_the_inputs_size(tmp_path: Path) -> None:
    with ResultWriter(tmp_path / "out", HEADER) as writer:
        writer.add(None, frame_id=0, pts=0, rgb=None)
        writer.commit({})
    with Image.open(tmp_path / "out" / "masks" / "00000.png") as image:
        assert image.size == (WIDTH_PX, HEIGHT_PX)


def test_json_tells_every_frame_and_object(tmp_path: Path) -> None:
    write_three(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    assert content["time_base"] == [1, 30]
    assert content["summary"] == {"frames": 3}
    first, second, third = content["frames"]
    assert first["objects"] == [
        {
            "object_id": 9,
            "state": "visible",
            "score": 0.875,
            "presence": 1.0,
            "box": [30, 10, 50, 20],
            "class": "hook",
            "class_probability": 0.5,
            "frames_since_seen": 0,
        }
    ]
    assert (second["frame_id"], second["is_answered"], second["objects"]) == (1, False, [])
    assert third["is_trusted"] is False


def test_uncommitted_results_leave_nothing_behind(tmp_path: Path) -> None:
    with ResultWriter(tmp_path / "out", HEADER) as writer:
        writer.add(result(0), frame_id=0, pts=0, rgb=picture(0))
    assert list(tmp_path.iterdir()) == []


def test_nothing_looks_complete_before_it_is(tmp_path: Path) -> None:
    with ResultWriter(tmp_path / "out", HEADER) as writer:
        writer.add(result(0), frame_id=0, pts=0, rgb=picture(0))
        assert not (tmp_path / "out").exists()
        writer.commit({})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"masks", "overlay.mp4", "result.json"}


def test_former_results_are_replaced_as_a_whole(tmp_path: Path) -> None:
    write_three(tmp_path / "out")
    with ResultWriter(tmp_path / "out", HEADER) as writer:
        writer.add(result(0), frame_id=0, pts=0, rgb=picture(0))
        writer.commit({})
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ResultError, match=r"thesis\.tex"):
        ResultWriter(tmp_path, HEADER)


def test_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(ResultError):
            ResultWriter(folder, HEADER)


@pytest.mark.parametrize("object_id", [0, 256])
def test_id_that_does_not_fit_a_png_is_refused(object_id: int) -> None:
    with pytest.raises(ResultError, match=f"object {object_id} .* 1 to 255"):
        check_png_ids([1, object_id])


def test_overlay_tints_the_object_and_leaves_the_rest() -> None:
    plain = np.full((HEIGHT_PX, WIDTH_PX, 3), 90, np.uint8)
    drawn = draw_overlay(plain, [tracked(1, slice(60, 100), slice(60, 120))])
    np.testing.assert_array_equal(plain, 90)
    assert np.abs(drawn[80, 90].astype(int) - COLORS[0]).sum() < np.abs(90 - np.array(COLORS[0])).sum()
    np.testing.assert_array_equal(drawn[110:, :50], 90)


def test_label_tells_the_state_of_an_object_that_is_not_visible() -> None:
    lost = tracked(3, slice(0, 0), slice(0, 0), ObjectState.LOST)
    assert describe(lost) == "3 hook lost"
    drawn = draw_overlay(np.zeros((HEIGHT_PX, WIDTH_PX, 3), np.uint8), [lost])
    assert (drawn == np.array(color_of(3))).all(axis=2).any()


def test_colours_stand_out_on_red_tissue() -> None:
    tissue = np.array([170, 50, 45])
    assert all(np.abs(np.array(color) - tissue).max() > 85 for color in COLORS)


def test_coco_names_objects_as_people_do_and_its_runs_give_the_mask_back(tmp_path: Path) -> None:
    seen, gone = tracked(3, slice(10, 20), slice(30, 45)), tracked(4, slice(0, 0), slice(0, 0))
    unnamed = tracked(5, slice(0, 2), slice(0, 1))
    with ResultWriter(tmp_path / "out", HEADER, coco_names={3: "left hook"}) as writer:
        writer.add(None, frame_id=0, pts=0, rgb=np.zeros((HEIGHT_PX, WIDTH_PX, 3), np.uint8))
        writer.add(result(1, seen, gone, unnamed), frame_id=1, pts=1, rgb=None)
        writer.commit({})
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["masks/00000.png", "masks/00001.png"]
    names = {category["id"]: category["name"] for category in coco["categories"]}
    found = [(one["track_id"], names[one["category_id"]], one["image_id"]) for one in coco["annotations"]]
    assert found == [(3, "left hook", 2), (5, "hook", 2)]
    annotation = coco["annotations"][0]
    assert (annotation["bbox"], annotation["area"]) == ([30, 10, 15, 10], 150)
    counts = annotation["segmentation"]["counts"]
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    assert np.array_equal(flat.reshape((HEIGHT_PX, WIDTH_PX), order="F"), seen.mask)
