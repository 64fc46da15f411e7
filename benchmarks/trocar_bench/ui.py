"""`bench-ui`: what the surgeon sees, measured in a real browser.

Headless Chromium opens the page of a `trocar ui` of this process, with its own tracking server or a given one
of another process, and shows the built-in operation: 1280x720, 30 frames/s, H.264, two objects. Every picture
carries its number as a barcode.

- "frames/s": pictures put onto the canvas with their overlay. Without: counted apart.
- "end to end": from the moment a picture was due at the source to its being on the canvas with its overlay,
  mapped between the clocks of gateway and page by the shortest of several round trips. What a screen adds
  after that is not in it.
- "wrong": pictures whose barcode, read back from the canvas, is not that of the frame whose overlay was
  drawn. "checked" are those whose barcode could be read, "unreadable" those where the overlay covers it.
- "tap to mask": from the pointer's release to the first picture on which the new object is drawn, as the
  page itself shows it. All objects are forgotten before each tap: one on a mask would select what is there.

Browser, gateway and tracking server share the cores, as they do on one machine beside the table.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
from playwright.sync_api import Page, sync_playwright

from trocar.cli import (
    EXIT_EXPECTED_FAILURE,
    EXIT_INTERRUPTED,
    StartScheduler,
    add_engine_options,
    read_engine_options,
    start_scheduler,
)
from trocar.decode import Codec, Packet, PacketDecoder, VideoFormat
from trocar.gateway import SourceEntry
from trocar.local import LocalServer
from trocar.operation import FRAME_RATE_HZ, SCENE_FRAMES, OperationSource, open_operation
from trocar.sources import LARGEST_PICTURE_PX
from trocar.ui import WEB, UiConfig, UiServer
from trocar_bench.barcode import READ_FROM_CANVAS, UNREADABLE, stamp
from trocar_engines.errors import TrocarError
from trocar_engines.export import default_cache
from trocar_engines.preprocess import resize_to_model
from trocar_engines.training.clicks import farthest_point
from trocar_engines.training.scenes import demo_scene

ROUND_FRAMES = 2 * SCENE_FRAMES - 2
"""Of the built-in operation: to the last picture and back to the second."""
Places = dict[int, tuple[tuple[float, float], ...]]
"""By place of a picture in the round: (x, y) on each instrument, as shares of width and height."""
VIEWPORT = {"width": 1280, "height": 800}
TAP_PLACES = 6
"""Frames of the round on which both instruments are in view, and where to tap them."""
SETTLE_S = 3.0
"""Between the prompts and the measurement."""
TAP_TIMEOUT_MS = 20_000
"""On top of two rounds of the footage: so long may a tap wait for its frame and its mask."""
START_TIMEOUT_MS = 120_000
POLL_MS = 25
LIST_DELAY_FRAMES = 3
"""After a tap, until the list of objects must show the new one."""
SOURCE_LABEL = "Stamped operation"

WATCH_SCRIPT = f"""
window.shown = [];
window.firstMasks = [];
window.plan = null;
window.shownSinceTap = 0;
const readBarcode = {READ_FROM_CANVAS};
document.addEventListener("trocar:shown", (event) => {{
  const canvas = event.target;
  const barcode = readBarcode(canvas);
  window.shown.push({{ ...event.detail, barcode, at: performance.now() }});
  if (window.plan === null) window.shownSinceTap += 1;
  if (window.plan === null || !(barcode in window.plan)) return;
  const [x, y] = window.plan[barcode];
  window.plan = null;
  const area = canvas.getBoundingClientRect();
  const place = {{
    pointerId: 1, isPrimary: true, button: 0, bubbles: true,
    clientX: area.left + x * area.width, clientY: area.top + y * area.height,
  }};
  canvas.setPointerCapture = () => {{}};
  canvas.dispatchEvent(new PointerEvent("pointerdown", place));
  canvas.dispatchEvent(new PointerEvent("pointerup", place));
}}, true);
document.addEventListener("trocar:first-mask", (event) => window.firstMasks.push(event.detail.ms), true);
"""
"""Collects what was shown, and taps at a place as soon as a planned picture is on the screen."""

EPILOG = """\
examples:
  bench-ui                        30 s with two objects, then 20 taps
  bench-ui --server 127.0.0.1:50051                 the same with `trocar serve` in a process of its own
  bench-ui --seconds 60 --taps 40 --weights runs/mine/weights.safetensors

The last line on stdout is JSON: frames_per_s, end_to_end_ms (p50, p99), tap_to_mask_ms (p50, p95), wrong,
checked, unreadable, bare, taps, page_kb, viewport, chromium.
"""


@dataclass(frozen=True, kw_only=True)
class Footage:
    """What the browser is shown.

    Args:
        source: endless; every picture carries its place in the round as a barcode.
        round_frames: pictures of one round.
        places: where to tap.
    """

    source: OperationSource
    round_frames: int
    places: Places


PrepareFootage = Callable[[int], Footage]
"""Makes footage that plays at so many frames per second."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_EXPECTED_FAILURE)


def prepare_operation(frame_rate_hz: int) -> Footage:
    """Stamp the built-in operation, which is rendered when the cache lacks it."""
    operation = open_operation(default_cache().parent / "operation", lambda _done, _total: None)
    return Footage(
        source=stamp_operation(operation, frame_rate_hz),
        round_frames=ROUND_FRAMES,
        places=find_places(TAP_PLACES),
    )


def main(
    arguments: Sequence[str] | None = None,
    *,
    start_scheduler: StartScheduler = start_scheduler,
    prepare: PrepareFootage = prepare_operation,
) -> int:
    """Measure.

    Args:
        arguments: None for those of the process.
        start_scheduler: makes the tracker.
        prepare: makes the footage.

    Returns:
        0, or 2 after an expected failure, which one line on stderr tells.
    """
    parser = _Parser(
        prog="bench-ui",
        description="Measure the surgeon's screen in headless Chromium.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="measured (default %(default)s)")
    parser.add_argument("--taps", type=int, default=20, help="measured afterwards (default %(default)s)")
    parser.add_argument(
        "--fps", type=int, default=FRAME_RATE_HZ, help="of the source, 1 to 60 (default %(default)s)"
    )
    parser.add_argument(
        "--hold-ms",
        type=int,
        default=150,
        help="how long a picture waits for its masks (default %(default)s)",
    )
    parser.add_argument("--chromium", metavar="PATH", help="browser (default: the one on the path)")
    parser.add_argument(
        "--server", metavar="ADDR", help="host:port of a running server on this machine; else one is started"
    )
    add_engine_options(parser)
    options = parser.parse_args(arguments)
    if options.server is not None and options.weights is not None:
        parser.error("--weights are those of a server that is started here; leave --server out")
    if not 1 <= options.fps <= 60 or options.seconds <= 0 or options.taps < 0:
        parser.error("--fps takes 1 to 60, --seconds more than 0, --taps 0 or more")
    try:
        print(json.dumps(_measure(options, start_scheduler, prepare)))
    except TrocarError as error:
        print(f"bench-ui: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_EXPECTED_FAILURE
    except KeyboardInterrupt:
        print("bench-ui: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _measure(
    options: argparse.Namespace, start_scheduler: StartScheduler, prepare: PrepareFootage
) -> dict[str, Any]:
    chromium = options.chromium or shutil.which("chromium")
    if chromium is None:
        raise TrocarError("there is no Chromium on the path: install it, or pass --chromium PATH")
    _say("preparing the footage")
    footage = prepare(options.fps)
    entry = SourceEntry(
        source_id="stamped", label=SOURCE_LABEL, kind="operation", open=lambda _: footage.source
    )
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="trocar-bench-")))
        address = options.server
        if address is None:
            scheduler = start_scheduler(read_engine_options(options, max_streams=2))
            resources.callback(scheduler.close)
            address = resources.enter_context(LocalServer(scheduler, resize_to_model)).address
        config = UiConfig(address="127.0.0.1:0", cache=folder, hold_ms=options.hold_ms)
        url = _serve(UiServer(config, address, folder, (entry,)), resources)
        playwright = resources.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        resources.callback(browser.close)
        page = browser.new_page(viewport=VIEWPORT)  # type: ignore[arg-type]
        page.add_init_script(WATCH_SCRIPT)
        page.goto(url)
        figures = _drive(page, options, footage)
        figures["chromium"] = browser.version
    return {
        **figures,
        "page_kb": round(sum(path.stat().st_size for path in WEB.iterdir()) / 1_000, 1),
        "viewport": f"{VIEWPORT['width']}x{VIEWPORT['height']}",
    }


def _serve(ui: UiServer, resources: ExitStack) -> str:
    """Run the page's server in a thread; returns its address."""
    ready = threading.Event()
    thread = threading.Thread(target=ui.run, args=(ready.set,), name="bench-ui", daemon=True)
    thread.start()
    resources.callback(thread.join)
    resources.callback(ui.stop)
    ready.wait()
    return ui.url


def _drive(page: Page, options: argparse.Namespace, footage: Footage) -> dict[str, Any]:
    page.get_by_text(SOURCE_LABEL).click()
    wait_until(page, "shown.length > 30", START_TIMEOUT_MS)
    patience_ms = TAP_TIMEOUT_MS + 2_000 * footage.round_frames / options.fps
    _say("prompting two objects")
    for index in (0, 1):
        _tap_at_next(page, footage.places, index, patience_ms)
    page.wait_for_timeout(SETTLE_S * 1_000)
    page.evaluate("window.shown.length = 0")
    _say(f"measuring for {options.seconds:g} s")
    page.wait_for_timeout(options.seconds * 1_000)
    shown: list[dict[str, Any]] = page.evaluate("window.shown")
    page.evaluate("window.firstMasks.length = 0")
    _say(f"{options.taps} taps")
    for number in range(options.taps):
        _forget_objects(page)
        page.wait_for_timeout(200 + 37 * (number % 7))
        page.evaluate("window.shown.length = 0")
        _tap_at_next(page, footage.places, number % 2, patience_ms)
    taps: list[float] = page.evaluate("window.firstMasks")
    return summarise(shown, taps, options.seconds, footage.round_frames)


def _tap_at_next(page: Page, places: Places, index: int, patience_ms: float) -> None:
    """Tap an instrument on the next planned picture where no other object lies there; wait for its mask."""
    before = page.evaluate("window.firstMasks.length")
    plan = {frame: spots[index] for frame, spots in places.items()}
    is_held, deadline_s = False, time.monotonic() + patience_ms / 1_000
    while not is_held:
        objects = page.evaluate("document.querySelectorAll('#list li').length")
        page.evaluate("(plan) => { window.plan = plan; window.shownSinceTap = 0; }", plan)
        left_ms = max(0.0, deadline_s - time.monotonic()) * 1_000
        wait_until(page, f"plan === null && shownSinceTap > {LIST_DELAY_FRAMES}", left_ms)
        is_held = page.evaluate("document.querySelectorAll('#list li').length") > objects
        if not is_held:
            # It selected what lies there.
            page.keyboard.press("Escape")
    wait_until(page, f"firstMasks.length > {before}", patience_ms)


def _forget_objects(page: Page) -> None:
    rows = page.locator("#list button")
    for _ in range(rows.count()):
        page.keyboard.press("Escape")
        rows.first.click()
        page.keyboard.press("Delete")


def wait_until(page: Page, condition: str, timeout_ms: float) -> None:
    """Wait for a JavaScript condition; the page's security policy forbids playwright's own way.

    Raises:
        TrocarError: it did not come true.
    """
    came_true = page.evaluate(
        f"""async () => {{
            const deadline = performance.now() + {timeout_ms};
            while (!({condition})) {{
                if (performance.now() > deadline) return false;
                await new Promise((resolve) => setTimeout(resolve, {POLL_MS}));
            }}
            return true;
        }}"""
    )
    if not came_true:
        raise TrocarError(f"not within {timeout_ms / 1_000:g} s: {condition}")


def summarise(
    shown: Sequence[dict[str, Any]], taps: Sequence[float], seconds: float, round_frames: int
) -> dict[str, Any]:
    """Figures of what was shown.

    Args:
        shown: of each picture: `frame` and `overlay` (number or None), `barcode`, `latencyMs`.
        taps: tap to first mask, ms.
        seconds: measured.
        round_frames: of the footage.

    Raises:
        TrocarError: nothing was shown with an overlay.
    """
    overlaid = [one for one in shown if one["overlay"] is not None and one["objects"]]
    if not overlaid:
        raise TrocarError("no picture was shown with an overlay: the machine is too busy to measure")
    read = [one for one in overlaid if one["barcode"] != UNREADABLE]
    wrong = sum(one["barcode"] != one["overlay"] % round_frames for one in read)
    p50, p99 = np.percentile([one["latencyMs"] for one in overlaid], [50, 99])
    figures: dict[str, Any] = {
        "frames_per_s": round(len(overlaid) / seconds, 2),
        "bare": len(shown) - len(overlaid),
        "end_to_end_ms": {"p50": round(float(p50), 1), "p99": round(float(p99), 1)},
        "checked": len(read),
        "unreadable": len(overlaid) - len(read),
        "wrong": wrong,
        "taps": len(taps),
    }
    if taps:
        p50, p95 = np.percentile(taps, [50, 95])
        figures["tap_to_mask_ms"] = {"p50": round(float(p50), 1), "p95": round(float(p95), 1)}
    return figures


def stamp_operation(operation: OperationSource, frame_rate_hz: int) -> OperationSource:
    """The same footage, each picture with its place in the round as a barcode."""
    decoder = PacketDecoder(VideoFormat(codec=Codec.H264, max_pixels=LARGEST_PICTURE_PX))
    context = av.CodecContext.create("libx264", "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt = operation.width_px, operation.height_px, "yuv420p"
    context.framerate = Fraction(FRAME_RATE_HZ)
    context.time_base = 1 / context.framerate
    context.gop_size = FRAME_RATE_HZ
    context.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "22"}
    packets = []
    for index, source_frame in zip(range(ROUND_FRAMES), operation.read(), strict=False):
        picture = decoder.decode(Packet(frame_id=index, payload=source_frame.frame.payload)).picture
        assert picture is not None, "we coded it ourselves"
        frame = av.VideoFrame.from_ndarray(stamp(picture.rgb, index), format="rgb24")
        frame.pts = index
        packets += context.encode(frame)
    packets += context.encode(None)
    return OperationSource(
        tuple(bytes(packet) for packet in packets), operation.width_px, operation.height_px, frame_rate_hz
    )


def find_places(count: int) -> Places:
    """Where to tap each of the two instruments on so many pictures, and on the way back."""
    scene = demo_scene(frames=SCENE_FRAMES, frame_rate=float(FRAME_RATE_HZ))
    places: Places = {}
    for index in np.linspace(5, 50, count).round().astype(int).tolist():
        labels = scene.render(index)[1].numpy()
        spots = [farthest_point(labels == label) for label in (1, 2)]
        height, width = labels.shape
        shares = tuple((spot[0] / width, spot[1] / height) for spot in spots if spot is not None)
        assert len(shares) == 2, "both instruments are in view before the second one leaves"
        # On the way back the same picture comes again, later in the round.
        places[index] = places[ROUND_FRAMES - index] = shares
    return places


def _say(text: str) -> None:
    print(f"bench-ui: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
