import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from browser.clips import encode_round
from browser.screens import TIMEOUT_MS, Screen, make_ui, operation_entry, serve
from trocar.local import LocalServer
from wire.fakes import FakeScheduler, resize_linear

# A slow machine is no fault of the page.
expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for a module: as long as it runs, playwright's event loop keeps this thread from running others."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # A camera without a camera: a rolling test picture.
        arguments = ["--no-sandbox", "--use-fake-device-for-media-stream"]
        with playwright.chromium.launch(executable_path=chromium, args=arguments) as browser:
            yield browser


@pytest.fixture(scope="session")
def packets() -> tuple[bytes, ...]:
    return encode_round()


@pytest.fixture
def scheduler() -> Iterator[FakeScheduler]:
    fake = FakeScheduler()
    yield fake
    fake.close()


@pytest.fixture
def server(scheduler: FakeScheduler) -> Iterator[LocalServer]:
    with LocalServer(scheduler, resize_linear) as server:
        yield server


@pytest.fixture
def url(server: LocalServer, packets: tuple[bytes, ...], tmp_path: Path) -> Iterator[str]:
    with serve(make_ui(server.address, tmp_path, (operation_entry(packets),))) as url:
        yield url


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(viewport={"width": 900, "height": 600}) as context:
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    yield page
    assert not failures, failures


@pytest.fixture
def screen(page: Page, url: str) -> Screen:
    screen = Screen(page, url)
    screen.open()
    return screen
