"""A person at the page, by playwright."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from playwright.sync_api import Page, expect

from browser.clips import FRAMES, GREEN_CENTER, HEIGHT_PX, RATE_HZ, WIDTH_PX, red_center
from trocar.gateway import SourceEntry
from trocar.operation import OperationSource
from trocar.ui import UiConfig, UiServer
from trocar_bench.barcode import READ_FROM_CANVAS
from trocar_bench.ui import wait_until

TIMEOUT_MS = 60_000
HOLD_MS = 3_000
"""Pictures wait for their masks however busy the machine is; the rule itself is tested on its own."""
WATCH = f"""
window.shown = [];
window.firstMasks = [];
window.readBarcode = {READ_FROM_CANVAS};
document.addEventListener("trocar:shown", (event) => {{
  window.shown.push({{ ...event.detail, barcode: readBarcode(event.target) }});
}}, true);
document.addEventListener("trocar:first-mask", (event) => window.firstMasks.push(event.detail), true);
"""


def operation_entry(packets: tuple[bytes, ...]) -> SourceEntry:
    return SourceEntry(
        source_id="operation",
        label="Built-in operation",
        kind="operation",
        open=lambda _: OperationSource(packets, WIDTH_PX, HEIGHT_PX, RATE_HZ),
    )


@contextmanager
def serve(ui: UiServer) -> Iterator[str]:
    """Run a page's server in a thread; yields its address."""
    ready = Event()
    thread = Thread(target=ui.run, args=(ready.set,), daemon=True)
    thread.start()
    assert ready.wait(TIMEOUT_MS / 1_000)
    try:
        yield ui.url
    finally:
        ui.stop()
        thread.join()


def make_ui(
    server: str,
    folder: Path,
    entries: tuple[SourceEntry, ...],
    *,
    address: str = "127.0.0.1:0",
    is_self_signed: bool = False,
) -> UiServer:
    config = UiConfig(address=address, cache=folder, hold_ms=HOLD_MS, is_self_signed=is_self_signed)
    return UiServer(config, server, folder, entries)


@dataclass
class Screen:
    """The page and the hands on it."""

    page: Page
    url: str

    def open(self) -> None:
        self.page.add_init_script(WATCH)
        self.page.goto(self.url)
        self.page.wait_for_selector("#sources button")

    def choose(self, label: str) -> None:
        self.page.get_by_role("button", name=label).click()

    def start(self, label: str = "Built-in operation") -> None:
        self.choose(label)
        self.until("shown.filter((one) => one.overlay !== null).length > 2")

    def until(self, condition: str) -> None:
        wait_until(self.page, condition, TIMEOUT_MS)

    def freeze_at_visible_disc(self) -> tuple[int, tuple[int, int]]:
        """Freeze a picture on which the red disc is; returns its number and the disc's place."""
        self.page.evaluate(
            """(last) => new Promise((resolve) => {
                const listen = (event) => {
                    const barcode = shown.at(-1).barcode;
                    if (barcode > last || event.detail.overlay === null) return;
                    document.removeEventListener("trocar:shown", listen, true);
                    document.getElementById("freeze").click();
                    resolve();
                };
                document.addEventListener("trocar:shown", listen, true);
            })""",
            20,
        )
        number = int(self.page.evaluate("shown.at(-1).barcode"))
        return number, red_center(number)

    def place(self, x: float, y: float) -> tuple[float, float]:
        box = self.page.locator("#picture").bounding_box()
        assert box is not None
        return box["x"] + x * box["width"] / WIDTH_PX, box["y"] + y * box["height"] / HEIGHT_PX

    def tap(self, x: float, y: float) -> None:
        self.page.mouse.click(*self.place(x, y))

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.page.mouse.move(*self.place(*start))
        self.page.mouse.down()
        self.page.mouse.move(*self.place(*end), steps=4)
        self.page.mouse.up()

    def tap_green(self) -> None:
        self.tap(*GREEN_CENTER)

    def track_green(self) -> None:
        """Tap the green disc and wait until the picture shows it held."""
        before = self.page.evaluate("firstMasks.length")
        self.tap_green()
        self.until(f"firstMasks.length > {before}")

    def press(self, name: str) -> None:
        self.page.locator(f"#{name}").click()

    def rows(self) -> list[str]:
        return self.page.locator("#list button").all_inner_texts()

    def notice(self) -> str:
        return self.page.locator("#notice").inner_text()

    def wait_for_notice(self, words: str) -> None:
        expect(self.page.locator("#notice")).to_contain_text(words)

    def wait_for_trouble(self, words: str) -> None:
        expect(self.page.locator("#trouble")).to_contain_text(words)

    def shown(self) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = self.page.evaluate("shown")
        return seen

    def pixel(self, x: float, y: float) -> list[int]:
        """The canvas's colour at a source pixel, RGB."""
        color: list[int] = self.page.evaluate(
            """([x, y]) => {
                const canvas = document.getElementById("picture");
                const place = [x * canvas.width, y * canvas.height].map(Math.floor);
                return [...canvas.getContext("2d").getImageData(...place, 1, 1).data].slice(0, 3);
            }""",
            [x / WIDTH_PX, y / HEIGHT_PX],
        )
        return color

    def wait_for_pixel(self, x: float, y: float, is_right: Callable[[list[int]], bool]) -> None:
        deadline_s = time.monotonic() + TIMEOUT_MS / 1_000
        while not is_right(color := self.pixel(x, y)):
            assert time.monotonic() < deadline_s, color
            self.page.wait_for_timeout(50)


def count_wrong(shown: list[dict[str, Any]]) -> int:
    """Pictures under an overlay that is another picture's."""
    return sum(one["overlay"] is not None and one["overlay"] % FRAMES != one["barcode"] for one in shown)
