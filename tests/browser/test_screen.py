"""The surgeon's page in a real browser, with a tracker that follows colours."""

import json
import zipfile
from base64 import b64encode
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python import sync_playwright as axe_playwright
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from browser.clips import GREEN_CENTER, RADIUS_PX, write_clip
from browser.screens import Screen, count_wrong, make_ui, operation_entry, serve
from trocar.config import split_address
from trocar.gateway import SourceEntry
from trocar.local import LocalServer
from trocar.masklet_codec import MaskEncoding, encode_mask
from trocar.sources import open_source
from trocar.ui import WEB
from trocar_bench.barcode import LARGEST_NUMBER, READ_FROM_CANVAS, UNREADABLE, stamp
from trocar_engines.masklets import UInt8Array
from wire.fakes import FakeScheduler, resize_linear

GREEN_X, GREEN_Y = GREEN_CENTER


def start_fake(resources: ExitStack) -> FakeScheduler:
    scheduler = FakeScheduler()
    resources.callback(scheduler.close)
    return scheduler


def test_tapped_object_is_held_and_its_overlay_lies_on_its_own_picture(screen: Screen) -> None:
    screen.start()
    screen.track_green()
    screen.page.evaluate("shown.length = 0")
    screen.until("shown.filter((one) => one.objects > 0).length >= 60")
    shown = screen.shown()
    assert count_wrong(shown) == 0
    assert len({one["barcode"] for one in shown}) > 20
    # Green under the first object's blue tint.
    red, green, blue = screen.pixel(GREEN_X, GREEN_Y)
    assert green > blue > red + 20
    assert "grasper" in screen.rows()[0]
    assert "visible, 90%" in screen.rows()[0]
    line = screen.page.locator("#line")
    for words in ("frames/s", "ms behind", "0 dropped", "tap to mask", "fake-nano on fake"):
        expect(line).to_contain_text(words)


def test_object_that_leaves_is_named_lost_and_found_again(screen: Screen) -> None:
    screen.start()
    number, (x, y) = screen.freeze_at_visible_disc()
    screen.tap(x, y)
    # On the frozen picture the mask appears at once, while tracking goes on beside it.
    screen.until("firstMasks.length === 1")
    assert screen.page.evaluate("readBarcode(document.getElementById('picture'))") == number
    expect(screen.page.locator("#inset")).to_be_visible()
    expect(screen.page.locator("#mode")).to_contain_text("FROZEN")
    screen.press("freeze")
    expect(screen.page.locator("#inset")).to_be_hidden()
    state = screen.page.locator("#list .state")
    expect(state).to_contain_text("lost")
    expect(screen.page.locator("#list li")).to_have_class("lost")
    expect(state).to_contain_text("visible")
    assert count_wrong(screen.shown()) == 0


def test_objects_are_corrected_undone_hidden_renamed_and_removed(screen: Screen) -> None:
    screen.start()
    screen.track_green()
    # A click off the object: the fake tracker takes the colour there for the object's own.
    screen.press("negative")
    expect(screen.page.locator("#mode")).to_contain_text("Tap what is not Object 1")
    screen.tap(600, 330)
    screen.until("firstMasks.length === 2")
    screen.until("document.getElementById('mode').hidden === false")
    screen.wait_for_pixel(600, 330, lambda color: max(color) > 60)
    screen.press("undo")
    # The mask before is back.
    screen.wait_for_pixel(600, 330, lambda color: max(color) < 60)
    screen.press("negative")
    screen.press("hide")
    # Nothing is drawn over the green disc.
    screen.wait_for_pixel(GREEN_X, GREEN_Y, lambda color: color[2] < 75)
    expect(screen.page.locator("#list .state")).to_contain_text("not drawn")
    screen.press("hide")
    screen.press("rename")
    screen.page.locator("#name").fill("Left grasper")
    screen.press("name-ok")
    expect(screen.page.locator("#list .name")).to_have_text("Left grasper")
    screen.press("remove")
    expect(screen.page.locator("#list li")).to_have_count(0)
    screen.press("undo")
    expect(screen.page.locator("#list .name")).to_have_text("Left grasper")
    expect(screen.page.locator("#list .state")).to_contain_text("visible")


def test_dragging_draws_a_box_and_a_tap_on_an_object_selects_it(screen: Screen) -> None:
    screen.start()
    reach = RADIUS_PX + 6
    screen.drag((GREEN_X - reach, GREEN_Y - reach), (GREEN_X + reach, GREEN_Y + reach))
    screen.until("firstMasks.length === 1")
    row = screen.page.locator("#list button")
    expect(row).to_have_attribute("aria-pressed", "true")
    screen.page.keyboard.press("Escape")
    expect(row).to_have_attribute("aria-pressed", "false")
    screen.tap_green()
    expect(row).to_have_attribute("aria-pressed", "true")
    assert len(screen.rows()) == 1, "no second object"


def test_everything_works_by_keyboard_alone(screen: Screen) -> None:
    keyboard = screen.page.keyboard
    for _ in range(20):
        keyboard.press("Tab")
        if screen.page.evaluate("document.activeElement.textContent").startswith("Built-in"):
            break
    keyboard.press("Enter")
    screen.until("shown.filter((one) => one.overlay !== null).length > 2")
    assert screen.page.evaluate("document.activeElement.id") == "picture"
    keyboard.press("Enter")
    # From the middle to the green disc: a quarter of the width to the right, a fifth of the height down.
    for _ in range(8):
        keyboard.press("ArrowRight")
    for _ in range(4):
        keyboard.press("ArrowDown")
    keyboard.press("Enter")
    screen.until("firstMasks.length === 1")
    keyboard.press("Escape")
    keyboard.press("1")
    keyboard.press("n")
    expect(screen.page.locator("#mode")).to_contain_text("Tap what is not")
    keyboard.press("c")
    expect(screen.page.locator("#mode")).to_contain_text("Tap what belongs to")
    keyboard.press("Escape")
    keyboard.press("h")
    expect(screen.page.locator("#list .state")).to_contain_text("not drawn")
    keyboard.press("u")
    expect(screen.page.locator("#list .state")).not_to_contain_text("not drawn")
    keyboard.press("r")
    keyboard.type("hook 1")
    keyboard.press("Enter")
    expect(screen.page.locator("#list .name")).to_have_text("hook 1")
    keyboard.press("Space")
    expect(screen.page.locator("#mode")).to_contain_text("FROZEN")
    keyboard.press("Escape")
    expect(screen.page.locator("#mode")).to_be_hidden()
    keyboard.press("Delete")
    expect(screen.page.locator("#list li")).to_have_count(0)


def test_server_that_dies_leaves_a_bare_picture_and_objects_come_back_with_it(
    page: Page, packets: tuple[bytes, ...], tmp_path: Path
) -> None:
    with ExitStack() as resources, ExitStack() as first_server:
        server = first_server.enter_context(LocalServer(start_fake(resources), resize_linear))
        address = server.address
        ui = make_ui(address, tmp_path, (operation_entry(packets),))
        screen = Screen(page, resources.enter_context(serve(ui)))
        screen.open()
        screen.start()
        screen.track_green()
        first_server.close()
        screen.wait_for_notice("No tracking server")
        page.evaluate("shown.length = 0")
        screen.until("shown.length > 5")
        assert all(one["overlay"] is None for one in screen.shown()[1:])
        expect(page.locator("#line")).to_contain_text("No tracking server ·")
        screen.tap(50, 300)
        screen.wait_for_notice("no tracking server now")
        resources.enter_context(LocalServer(start_fake(resources), resize_linear, address))
        expect(page.locator("#list .state")).to_contain_text("visible")
        page.evaluate("shown.length = 0")
        screen.until("shown.filter((one) => one.objects > 0).length > 5")
        assert count_wrong(screen.shown()) == 0
        red, green, blue = screen.pixel(GREEN_X, GREEN_Y)
        assert green > blue > red + 20, "the green disc is held again, untouched by hand"


def test_file_of_this_machine_is_coded_in_the_page_and_tracked(screen: Screen, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=300)
    screen.page.locator("#file").set_input_files(clip)
    screen.until("shown.filter((one) => one.overlay !== null).length > 2")
    screen.track_green()
    screen.page.evaluate("shown.length = 0")
    screen.until("shown.filter((one) => one.objects > 0).length > 20")
    held = [one for one in screen.shown() if one["overlay"] is not None]
    # Skipped pictures have no number: the barcode must follow the frames, at a distance that only grows.
    gaps = np.diff([one["barcode"] - one["overlay"] for one in held])
    assert gaps.min() >= 0
    assert screen.pixel(GREEN_X, GREEN_Y)[2] > 75


def test_browser_without_video_coders_sends_and_gets_jpeg(page: Page, url: str, tmp_path: Path) -> None:
    page.add_init_script("delete window.VideoEncoder; delete window.VideoDecoder; delete window.VideoFrame;")
    screen = Screen(page, url)
    screen.open()
    screen.start()
    screen.track_green()
    assert count_wrong(screen.shown()) == 0
    screen.press("leave")
    page.evaluate("shown.length = firstMasks.length = 0")
    page.locator("#file").set_input_files(write_clip(tmp_path / "clip.mp4", frames=300))
    screen.until("shown.filter((one) => one.overlay !== null).length > 2")
    screen.track_green()


def test_source_of_the_gateway_that_ends_says_so(page: Page, server: LocalServer, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=30)
    entry = SourceEntry(source_id="0", label="clip.mp4", kind="file", open=lambda _: open_source(str(clip)))
    with serve(make_ui(server.address, tmp_path, (entry,))) as url:
        screen = Screen(page, url)
        screen.open()
        screen.start("clip.mp4")
        expect(page.locator("#veil")).to_have_text("clip.mp4 has ended.")


def test_camera_is_tracked(context: BrowserContext, screen: Screen) -> None:
    context.grant_permissions(["camera"])
    screen.start("Camera or capture card")
    screen.tap(10, 10)
    screen.until("firstMasks.length === 1")


def test_camera_without_permission_is_one_sentence(screen: Screen) -> None:
    screen.choose("Camera or capture card")
    screen.wait_for_trouble("allow it in the address bar")
    expect(screen.page.get_by_role("button", name="Built-in operation")).to_be_visible()


@pytest.mark.parametrize("content", [b"no video at all" * 100, b""])
def test_file_that_is_no_video_is_one_sentence(screen: Screen, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.mp4").write_bytes(content)
    screen.page.locator("#file").set_input_files(tmp_path / "notes.mp4")
    screen.wait_for_trouble("notes.mp4 is no video that this browser plays")


def test_codec_that_the_browser_lacks_is_one_sentence(screen: Screen, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "old.mp4", encoder="mpeg4")
    screen.page.locator("#file").set_input_files(clip)
    screen.wait_for_trouble("choose an MP4 with H.264")


def test_broken_source_of_the_gateway_is_one_sentence(
    page: Page, server: LocalServer, tmp_path: Path
) -> None:
    entry = SourceEntry(source_id="0", label="gone", kind="file", open=lambda _: open_source("gone.mp4"))
    with serve(make_ui(server.address, tmp_path, (entry,))) as url:
        screen = Screen(page, url)
        screen.open()
        screen.choose("gone")
        screen.wait_for_trouble("gone.mp4 does not exist")


def test_second_tab_is_told_and_may_take_over(context: BrowserContext, screen: Screen) -> None:
    screen.start()
    other = Screen(context.new_page(), screen.url)
    other.page.goto(screen.url)
    other.wait_for_trouble("open in another tab")
    other.page.get_by_role("button", name="Take over").click()
    screen.wait_for_trouble("has taken over")
    expect(other.page.get_by_role("button", name="Built-in operation")).to_be_visible()


def test_gateway_that_restarts_finds_the_page_again(
    page: Page, server: LocalServer, packets: tuple[bytes, ...], tmp_path: Path
) -> None:
    entries = (operation_entry(packets),)
    with serve(make_ui(server.address, tmp_path, entries)) as url:
        screen = Screen(page, url)
        screen.open()
        screen.start()
        address = url.removeprefix("http://")
    screen.wait_for_notice("connection to the gateway is lost")
    expect(page.locator("#veil")).to_contain_text("No live picture")
    with serve(make_ui(server.address, tmp_path, entries, address=address)):
        page.evaluate("shown.length = 0")
        screen.until("shown.filter((one) => one.overlay !== null).length > 2")


def test_recording_is_taken_away_as_masks_coco_and_video(screen: Screen, tmp_path: Path) -> None:
    screen.start()
    screen.track_green()
    screen.page.evaluate("shown.length = 0")
    screen.press("record")
    # The recording begins with a keyframe, at the latest after a second of footage.
    screen.until("shown.filter((one) => one.objects > 0).length > 20")
    with screen.page.expect_download() as download:
        screen.press("record")
    download.value.save_as(tmp_path / "trocar.zip")
    with zipfile.ZipFile(tmp_path / "trocar.zip") as archive:
        archive.extractall(tmp_path)
    masks = sorted((tmp_path / "trocar" / "masks").iterdir())
    assert len(masks) > 5
    with Image.open(masks[-1]) as image:
        assert np.asarray(image)[GREEN_Y, GREEN_X] == 1
    coco = json.loads((tmp_path / "trocar" / "coco.json").read_text())
    assert len(coco["images"]) == len(masks)
    assert coco["annotations"][-1]["track_id"] == 1
    assert (tmp_path / "trocar" / "overlay.mp4").stat().st_size > 1_000
    again = screen.page.request.get(download.value.url)
    assert again.status == 404, "an archive is handed out once"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800), (1920, 1080)])
def test_targets_are_large_and_nothing_overflows(screen: Screen, width: int, height: int) -> None:
    screen.page.set_viewport_size({"width": width, "height": height})
    for button in screen.page.locator("#sources button").all():
        box = button.bounding_box()
        assert box is not None
        assert box["height"] >= 72
    screen.start()
    screen.track_green()
    for selector in ("#tools button", "#list button"):
        for button in screen.page.locator(selector).all():
            box = button.bounding_box()
            assert box is not None
            assert min(box["height"], box["width"]) >= 72
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= height
    picture = screen.page.locator("#picture").bounding_box()
    assert picture is not None
    assert picture["width"] >= 0.6 * width


def test_no_serious_accessibility_finding(screen: Screen) -> None:
    axe: Any = axe_playwright.Axe()

    def track() -> None:
        # The search takes seconds in which nothing is shown: a tap needs a fresh picture.
        screen.page.evaluate("shown.length = 0")
        screen.until("shown.length > 5")
        screen.track_green()

    steps: tuple[Callable[[], None], ...] = (screen.page.bring_to_front, screen.start, track)
    for prepare in steps:
        prepare()
        found = axe.run(screen.page).response["violations"]
        serious = [one["id"] for one in found if one["impact"] in ("serious", "critical")]
        assert not serious, serious


def test_https_with_a_certificate_made_on_request_lets_the_page_code_video(
    browser: Browser, server: LocalServer, packets: tuple[bytes, ...], tmp_path: Path
) -> None:
    ui = make_ui(
        server.address, tmp_path, (operation_entry(packets),), address="0.0.0.0:0", is_self_signed=True
    )
    with serve(ui) as url, browser.new_context(ignore_https_errors=True) as context:
        _, port = split_address(url.removeprefix("https://"))
        screen = Screen(context.new_page(), f"https://127.0.0.1:{port}")
        screen.open()
        assert screen.page.evaluate("isSecureContext && typeof VideoEncoder === 'function'")
        screen.start()


def test_page_of_another_site_is_turned_away(browser: Browser, url: str) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto("data:text/html,<title>elsewhere</title>")
        outcome = page.evaluate(
            """(address) => new Promise((resolve) => {
                const socket = new WebSocket(address);
                socket.onopen = () => resolve("open");
                socket.onclose = () => resolve("closed");
            })""",
            url.replace("http", "ws") + "/gateway",
        )
        assert outcome == "closed"


def test_page_weighs_little_and_asks_nobody_else(context: BrowserContext, url: str) -> None:
    asked: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    Screen(page, url).open()
    assert all(one.startswith((url, url.replace("http", "ws"))) for one in asked)
    assert sum(path.stat().st_size for path in WEB.iterdir()) <= 300_000


# Modules of the page, by themselves


def test_masks_survive_the_way_into_the_page(screen: Screen) -> None:
    rng = np.random.default_rng(1)
    masks = {
        "block": np.pad(np.ones((5, 7), np.bool_), ((3, 4), (2, 6))),
        "first and last pixel": np.eye(9, dtype=np.bool_),
        "noise": rng.random((13, 17)) < 0.4,
    }
    for name, mask in masks.items():
        for preferred in MaskEncoding:
            encoded = encode_mask(mask, preferred)
            rows, columns = np.nonzero(mask)
            box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            pixels = screen.page.evaluate(
                """async ([data, width, height, encoding, box]) => {
                    const { decodeMask } = await import("/web/masks.js");
                    const patch = decodeMask(new Uint8Array(data), { width, height, encoding }, box);
                    return [...patch.pixels];
                }""",
                [list(encoded.data), encoded.width_px, encoded.height_px, encoded.encoding.value, box],
            )
            expected = mask[box[1] : box[3], box[0] : box[2]].ravel().astype(int).tolist()
            assert pixels == expected, (name, preferred)


def test_outlines_enclose_the_mask_and_its_holes(screen: Screen) -> None:
    corners = screen.page.evaluate(
        """async () => {
            const { traceCorners } = await import("/web/masks.js");
            const pixels = new Uint8Array([1, 1, 1,  1, 0, 1,  1, 1, 1]);
            return traceCorners({ left: 10, top: 20, width: 3, height: 3, pixels });
        }"""
    )

    def area(outline: list[int]) -> float:
        x, y = np.array(outline[::2]), np.array(outline[1::2])
        return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2)

    assert [area(outline) for outline in corners] == [9, -1]
    assert min(corners[0][::2]) == 10
    assert max(corners[0][1::2]) == 23


def test_barcode_is_read_as_what_it_is_or_not_at_all(page: Page) -> None:
    rng = np.random.default_rng(6)
    blank = np.full((180, 320, 3), 90, np.uint8)
    read = f"""([data, width, height]) => {{
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [1.4 * width, 1.4 * height];
        const pixels = new ImageData(width, height);
        const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
        pixels.data.fill(255);
        bytes.forEach((one, i) => (pixels.data[4 * Math.floor(i / 3) + (i % 3)] = one));
        const source = new OffscreenCanvas(width, height);
        source.getContext("2d").putImageData(pixels, 0, 0);
        canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
        return ({READ_FROM_CANVAS})(canvas);
    }}"""

    def read_back(picture: UInt8Array) -> int:
        return int(page.evaluate(read, [b64encode(picture.tobytes()).decode(), 320, 180]))

    numbers = [0, 11, 112, 240, 293, 485, 523, LARGEST_NUMBER]
    assert [read_back(stamp(blank, number)) for number in numbers] == numbers
    assert read_back(blank) == UNREADABLE
    unread = 0
    for _ in range(60):
        number = int(rng.integers(LARGEST_NUMBER + 1))
        covered = stamp(blank, number)
        # Plates of labels, and outlines: over one corner or both.
        for corner in rng.choice([0, 280], rng.integers(1, 3)):
            left, width = corner + int(rng.integers(-10, 36)), int(rng.integers(3, 60))
            top, height = int(rng.integers(0, 6)), int(rng.integers(2, 9))
            covered[top : top + height, max(0, left) : left + width] = rng.choice([0, 30, 220, 255])
        seen = read_back(covered)
        assert seen in (number, UNREADABLE)
        unread += seen == UNREADABLE
    assert 5 < unread < 55


PRESENTER_RUN = """async (steps) => {
    const { Presenter } = await import("/web/presenter.js");
    const shown = [];
    const presenter = new Presenter((frame, result) => shown.push([frame.id, result ? result.id : null]));
    presenter.isTracking = true;
    for (const [kind, id, now] of steps) {
        if (kind === "frame") {
            const picture = { close() {} };
            const times = { arrivedMs: now, capturedMs: now };
            presenter.offer({ id, picture, width: 4, height: 3, ...times, isSent: true });
        }
        if (kind === "result") presenter.settle({ id }, now);
        presenter.tick(now);
    }
    return { shown, isBehind: presenter.isBehind };
}"""


def test_label_stands_where_an_instrument_comes_in_and_over_what_touches_no_edge(screen: Screen) -> None:
    places = screen.page.evaluate(
        """async () => {
            const { findLabelPlace } = await import("/web/masks.js");
            const pixels = new Uint8Array([0, 0, 0, 1,  0, 1, 1, 1,  1, 1, 0, 0]);
            const patch = { left: 10, top: 20, width: 4, height: 3, pixels };
            return [[100, 100], [100, 23], [14, 100]].map(([width, height]) => {
                const { x, y, isEntry } = findLabelPlace(patch, { width, height });
                return [x, y, isEntry];
            });
        }"""
    )
    assert places == [[13.5, 20, False], [11, 23, True], [14, 21, True]]


def test_picture_waits_for_its_result_for_150_ms_and_no_longer(screen: Screen) -> None:
    in_time = [["frame", 0, 0], ["frame", 1, 33], ["result", 0, 60], ["result", 1, 100]]
    assert screen.page.evaluate(PRESENTER_RUN, in_time)["shown"] == [[0, 0], [1, 1]]
    late = [["frame", 0, 0], ["none", 0, 149], ["none", 0, 151], ["result", 0, 152], ["none", 0, 160]]
    assert screen.page.evaluate(PRESENTER_RUN, late)["shown"] == [[0, None]]


def test_dropped_picture_is_passed_over_and_nothing_is_shown_backwards(screen: Screen) -> None:
    steps = [["frame", 0, 0], ["frame", 1, 33], ["frame", 2, 66], ["result", 1, 90], ["result", 0, 95]]
    assert screen.page.evaluate(PRESENTER_RUN, steps)["shown"] == [[1, 1]]


def test_pictures_do_not_wait_while_results_keep_coming_late(screen: Screen) -> None:
    steps = []
    for number in range(12):
        steps += [["frame", number, 100 * number], ["result", number - 3, 100 * number + 10]]
    ran = screen.page.evaluate(PRESENTER_RUN, steps)
    assert ran["isBehind"]
    assert all(result is None for _, result in ran["shown"])
    assert ran["shown"][-1] == [11, None], "the newest picture is on the screen"
    for number in range(12, 24):
        steps += [["frame", number, 100 * number], ["result", number, 100 * number + 60]]
    ran = screen.page.evaluate(PRESENTER_RUN, steps)
    assert not ran["isBehind"]
    assert ran["shown"][-1] == [23, 23], "results that come in time are drawn again"
