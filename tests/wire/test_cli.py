import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trocar.cli import EngineOptions, main, scheduler_config
from trocar.config import ServerConfig
from trocar.local import LocalServer
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import UInt8Array
from wire.clips import HEIGHT_PX, WIDTH_PX, disc_center, draw_frames, encode_clip, encode_jpeg
from wire.fakes import FakeScheduler, resize_linear
from wire.rtsp import Camera

FRAMES = 24
ON_DISC = "{},{}".format(*disc_center(0))


def write_video(
    path: Path,
    frames: Sequence[UInt8Array],
    *,
    encoder: str = "libx264",
    options: dict[str, str] | None = None,
) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=30)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p" if encoder.startswith("libx") else "yuvj420p"
        stream.options = dict(options or {"preset": "ultrafast", "tune": "zerolatency"})
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", draw_frames(FRAMES))


@pytest.fixture
def scheduler() -> Iterator[FakeScheduler]:
    fake = FakeScheduler()
    yield fake
    fake.close()


def run(*arguments: str) -> int:
    """The command in this process, with the fake tracker behind its own server."""

    def start_scheduler(options: EngineOptions) -> FakeScheduler:
        return FakeScheduler()

    try:
        return main(arguments, start_scheduler=start_scheduler)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1


def read_ids(path: Path) -> UInt8Array:
    with Image.open(path) as image:
        return np.asarray(image).astype(np.uint8)


def assert_disc_followed(folder: Path, frames: int, object_id: int = 1) -> None:
    paths = sorted((folder / "masks").iterdir())
    assert len(paths) == frames
    for index, path in enumerate(paths):
        rows, columns = np.nonzero(read_ids(path) == object_id)
        x, y = disc_center(index)
        assert abs(columns.mean() - x) < 4, index
        assert abs(rows.mean() - y) < 4, index


def test_track_writes_a_mask_for_every_frame_and_ends_with_json(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("track", clip, "--point", ON_DISC, "--out", str(tmp_path / "out")) == 0
    assert_disc_followed(tmp_path / "out", FRAMES)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["frames"], summary["dropped"], summary["lost"]) == (FRAMES, 0, 0)
    assert 0 < summary["latency_p50_ms"] <= summary["latency_p99_ms"]
    assert summary["fps"] > 0
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [frame["objects"][0]["state"] for frame in content["frames"]] == ["visible"] * FRAMES


@pytest.mark.parametrize(
    ("name", "encoder", "options"),
    [
        ("b-frames.mp4", "libx264", {"preset": "veryfast"}),
        (
            "hevc.mp4",
            "libx265",
            {"preset": "ultrafast", "tune": "zerolatency", "x265-params": "log-level=none"},
        ),
        ("motion-jpeg.avi", "mjpeg", {}),
        ("transport.ts", "libx264", {"preset": "ultrafast", "tune": "zerolatency"}),
        ("raw.h264", "libx264", {"preset": "ultrafast", "tune": "zerolatency"}),
        ("open-gop.mkv", "libx264", {"preset": "veryfast", "x264-params": "open-gop=1:keyint=8"}),
    ],
)
def test_any_video_gives_one_mask_per_shown_frame_in_order(
    name: str, encoder: str, options: dict[str, str], tmp_path: Path
) -> None:
    path = write_video(tmp_path / name, draw_frames(FRAMES), encoder=encoder, options=options)
    assert run("track", path, "--point", ON_DISC, "--out", str(tmp_path / "out")) == 0
    assert_disc_followed(tmp_path / "out", FRAMES)


def test_video_of_odd_size_keeps_its_size(tmp_path: Path) -> None:
    frames = [frame[:-1, :-1] for frame in draw_frames(FRAMES)]
    options = {"preset": "veryfast"}
    with av.open(str(tmp_path / "odd.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT_PX - 1, WIDTH_PX - 1, "yuv444p"
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    out = tmp_path / "out"
    assert run("track", str(tmp_path / "odd.mkv"), "--point", ON_DISC, "--out", str(out)) == 0
    assert_disc_followed(out, FRAMES)
    assert read_ids(out / "masks" / "00003.png").shape == (HEIGHT_PX - 1, WIDTH_PX - 1)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_folder_of_images_is_tracked_in_the_order_of_names(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(draw_frames(6)):
        data = encode_jpeg(frame)
        if suffix == ".png":
            data = cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))[1].tobytes()
        (folder / f"{index:05d}{suffix}").write_bytes(data)
    assert run("track", str(folder), "--point", ON_DISC, "--out", str(tmp_path / "out")) == 0
    assert_disc_followed(tmp_path / "out", 6)


def test_prompts_of_several_objects_apply_to_their_own_frames(clip: str, tmp_path: Path) -> None:
    x, y = disc_center(10)
    box = f"{x - 8},{y - 8},{x + 8},{y + 8}"
    out = tmp_path / "out"
    arguments = ("--object", "7", "--point", "5,5", "--object", "200", "--box", box, "--at", "10")
    assert run("track", clip, *arguments, "--out", str(out)) == 0
    frames = json.loads((out / "result.json").read_text())["frames"]
    assert [[one["object_id"] for one in frame["objects"]] for frame in frames[9:11]] == [[7], [7, 200]]
    assert read_ids(out / "masks" / "00009.png").max() == 7
    assert read_ids(out / "masks" / "00010.png")[y, x] == 200


def test_mask_file_prompts_the_object_with_its_number(clip: str, tmp_path: Path) -> None:
    mask = np.full((HEIGHT_PX, WIDTH_PX), 3, np.uint8)
    x, y = disc_center(0)
    cv2.circle(mask, (x, y), 10, 9, -1)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ("--object", "9", "--mask", str(tmp_path / "mask.png"))
    assert run("track", clip, *arguments, "--out", str(tmp_path / "out")) == 0
    assert_disc_followed(tmp_path / "out", FRAMES, object_id=9)


def test_track_uses_a_running_server(clip: str, tmp_path: Path, scheduler: FakeScheduler) -> None:
    with LocalServer(scheduler, resize_linear) as server:
        arguments = ("--server", server.address, "--point", ON_DISC, "--out", str(tmp_path / "out"))
        assert run("track", clip, *arguments) == 0
    assert_disc_followed(tmp_path / "out", FRAMES)


@pytest.mark.parametrize("has_b_frames", [False, True])
def test_camera_is_recorded_until_it_hangs_up(
    tmp_path: Path, has_b_frames: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    packets = encode_clip(draw_frames(40), keyframe_interval=10, has_b_frames=has_b_frames)
    with Camera(packets, rate=60) as camera:
        assert run("track", camera.url, "--point", ON_DISC, "--out", str(tmp_path / "out")) == 0
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 40
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["frames"] == 40
    assert "ended" in captured.err


def test_recording_that_is_interrupted_is_complete_up_to_there(tmp_path: Path) -> None:
    # A shell that starts us in the background has us ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    packets = encode_clip(draw_frames(50) * 20, keyframe_interval=10)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with Camera(packets, rate=60) as camera:
        timer = threading.Timer(2.0, interrupt)
        timer.start()
        assert run("track", camera.url, "--point", ON_DISC, "--out", str(tmp_path / "out")) == 0
        timer.join()
    frames = json.loads((tmp_path / "out" / "result.json").read_text())["frames"]
    assert 10 < len(frames) < 1000
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_damaged_video_is_tracked_to_its_end_and_tells_what_not_to_trust(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packets = encode_clip(draw_frames(FRAMES), keyframe_interval=10)
    packets[4] = packets[4][: len(packets[4]) // 3]
    (tmp_path / "clip.h264").write_bytes(b"".join(packets))
    out = tmp_path / "out"
    assert run("track", str(tmp_path / "clip.h264"), "--point", ON_DISC, "--out", str(out)) == 0
    captured = capsys.readouterr()
    line = json.loads(captured.out.splitlines()[-1])
    assert (line["frames"], line["lost"], line["untrusted"]) == (FRAMES, 0, 6)
    assert "frame 4" in captured.err
    frames = json.loads((out / "result.json").read_text())["frames"]
    assert [one["frame_id"] for one in frames if not one["is_trusted"]] == list(range(4, 10))


# Expected failures: one line on stderr, exit code 2, nothing that looks complete


def assert_fails(
    capsys: pytest.CaptureFixture[str], out: Path, words: Sequence[str], *arguments: str
) -> None:
    assert run("track", *arguments, "--out", str(out)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    for word in words:
        assert word in lines[0]
    assert captured.out == ""
    assert not (out / "result.json").exists()
    assert not [path for path in out.parent.iterdir() if "partial" in path.name]


def test_missing_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_fails(capsys, tmp_path / "out", ["none.mp4 does not exist"], "none.mp4", "--point", "1,1")


def test_input_that_is_no_video_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("text.mp4", b"hello" * 100), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(content)
        path = str(tmp_path / name)
        assert_fails(capsys, tmp_path / "out", [name, "cannot be read as video"], path, "--point", "1,1")


def test_sound_without_pictures_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    assert_fails(capsys, tmp_path / "out", ["no video stream"], str(path), "--point", "1,1")


def test_video_without_frames_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "notes.txt").touch()
    assert_fails(capsys, tmp_path / "out", ["has no frames"], str(tmp_path / "frames"), "--point", "1,1")


def test_broken_image_in_a_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(encode_jpeg(draw_frames(1)[0]))
    (folder / "1.jpg").write_bytes(b"not an image")
    assert_fails(capsys, tmp_path / "out", ["1.jpg", "not a readable image"], str(folder), "--point", ON_DISC)


def test_output_that_cannot_be_written_is_one_line(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert_fails(capsys, tmp_path / "file", ["is a file"], clip, "--point", "1,1")
    assert run("track", clip, "--point", "1,1", "--out", "/proc/out") == 2
    assert "/proc/out cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to track"]),
        (["--object", "3"], ["object 3 has no --point"]),
        (["--object", "300", "--point", "1,1"], ["object 300", "1 to 255"]),
        (["--point", "1"], ["expected X,Y"]),
        (["--point", "1,1,2"], ["X,Y,0 or X,Y,1"]),
        (["--box", "1,2,3"], ["X0,Y0,X1,Y1"]),
        (["--mask", "none.png"], ["none.png", "not a readable image"]),
        (["--point", "1,1", "--mask", "m.png"], ["--mask", "alone"]),
        (["--point", "1,1", "--at", "-4"], ["expected a frame number"]),
        (["--point", "1,1", "--at", "24"], ["--at 24", "24 frames, 0 to 23"]),
        (["--point", "1000,1"], ["object 1", "outside the 160x120 picture"]),
        (["--box", "50,10,20,30"], ["x_max must exceed x_min"]),
        (["--point", "1,1", "--server", "127.0.0.1:1"], ["no server answers at 127.0.0.1:1"]),
        (["--point", "1,1", "--colour"], ["--colour"]),
    ],
)
def test_senseless_options_are_one_line(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert_fails(capsys, tmp_path / "out", words, clip, *arguments)


def test_help_teaches_by_example_and_loads_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "import sys; from trocar.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert "trocar track clip.mp4 --point 640,360 --out results" in done.stdout
    assert run("track", "--help") == 0
    assert "--object 2" in capsys.readouterr().out


def test_every_setting_of_a_server_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    other_names = {"tls": "--tls-certificate", "shutdown_grace_s": "--drain-s"}
    assert run("serve", "--help") == 0
    told = capsys.readouterr().out
    for field in fields(ServerConfig):
        flag = other_names.get(field.name, "--" + field.name.replace("_", "-"))
        assert f"  {flag} " in told, field.name


def test_serve_on_an_address_that_others_reach_needs_insecure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "--address", "0.0.0.0:0") == 2
    assert "--insecure" in capsys.readouterr().err


def test_serve_stops_on_sigterm_with_exit_code_0(tmp_path: Path) -> None:
    program = (
        "import sys; from wire.fakes import FakeScheduler; from trocar.cli import main\n"
        "sys.exit(main(['serve', '--address', '127.0.0.1:0'], start_scheduler=lambda _: FakeScheduler()))"
    )
    tests = Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=tests
    ) as serving:
        assert serving.stderr is not None
        for line in serving.stderr:
            if "serving on 127.0.0.1:" in line:
                serving.terminate()
        assert serving.wait(10) == 0


def test_server_keeps_its_modules_from_the_garbage_collector() -> None:
    program = (
        "import gc; from wire.fakes import FakeScheduler; from trocar.server import TrackingServer\n"
        "from trocar.cli import main\n"
        "async def look(server):\n"
        "    print(len(gc.get_objects()))\n"
        "    await server.stop()\n"
        "    return True\n"
        "TrackingServer.run_until_stopped = look\n"
        "main(['serve', '--address', '127.0.0.1:0'], start_scheduler=lambda _: FakeScheduler())"
    )
    tests = Path(__file__).resolve().parents[1]
    served = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tests, check=True
    )
    assert int(served.stdout) < 10_000


def test_unknown_model_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "show", "sam9") == 2
    assert "sam2s-nano" in capsys.readouterr().err
    assert run("models", "list") == 0
    assert "(default)" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_one_line_that_lists_the_keys(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "other.safetensors"
    save_file({"stranger": torch.zeros(1)}, weights)
    arguments = ["track", clip, "--point", ON_DISC, "--out", str(tmp_path / "out"), "--weights", str(weights)]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    for word in ("other.safetensors", "missing", "unexpected", "stranger"):
        assert word in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("cores", "asked", "threads"), [(1, 0, 1), (2, 0, 1), (8, 0, 7), (2, 2, 2)])
def test_model_leaves_a_core_to_decoding(
    cores: int, asked: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trocar_engines.models.cpu_threads", lambda: cores)
    assert scheduler_config(EngineOptions(threads=asked)).threads == threads


@pytest.mark.parametrize(
    ("flags", "is_compiled"),
    [([], EngineOptions.is_compiled), (["--compile"], True), (["--no-compile"], False)],
)
def test_compiling_is_asked_for_or_declined(
    flags: list[str], is_compiled: bool, clip: str, tmp_path: Path
) -> None:
    asked: list[EngineOptions] = []

    def start(options: EngineOptions) -> FakeScheduler:
        asked.append(options)
        raise TrocarError("asked for")

    arguments = ["track", clip, "--point", ON_DISC, "--out", str(tmp_path / "out")]
    assert main([*arguments, *flags], start_scheduler=start) == 2
    assert [scheduler_config(options).is_compiled for options in asked] == [is_compiled]


def test_threads_below_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--threads", "-1"]) == 2
    assert "--threads -1: expected at least 1" in capsys.readouterr().err
