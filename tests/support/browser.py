"""Debian's Chromium, driven as a person would, with a record of everything that its pages ask for."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, sync_playwright

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    # Whoever asks for another host is told that there is none.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SCREENSHOTS = os.environ.get("DDK_SCREENSHOTS", "")
LARGEST_SCREENSHOT = 200_000  # bytes


def chromium() -> str:
    """Where Chromium is.

    Raises:
        AssertionError: it is not installed.
    """
    found = shutil.which("chromium")
    assert found is not None, "there is no Chromium, which these tests look with: apt-get install chromium"
    return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser with an empty profile, for as long as the `with` lasts."""
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


class Visitor:
    """One tab, 1200 pixels wide.

    Args:
        home: what every address that a page asks for must begin with.
    """

    def __init__(self, browser: Browser, home: str) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1200, "height": 800}, timezone_id="UTC", locale="en-GB")
        self.page.set_default_timeout(30_000)
        self.outside: list[str] = []
        """Addresses asked for that are not at home."""
        self.errors: list[str] = []
        """Of the console, and of scripts."""
        self._home = (home, home.replace("http://", "ws://", 1), "data:", "blob:")
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("websocket", lambda socket: self._note(socket.url))
        self.page.on("console", self._note_message)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, url: str) -> None:
        if not url.startswith(self._home):
            self.outside.append(url)

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def open(self, url: str) -> Page:
        self.page.goto(url)
        self.page.wait_for_load_state("networkidle")
        return self.page

    def text(self, text: str) -> Locator:
        """What shows exactly this text; waited for."""
        found = self.page.get_by_text(text, exact=True).first
        found.wait_for()
        return found

    def rows(self) -> list[list[str]]:
        """The texts in the page's first table, row by row, the headings first."""
        self.page.locator("table").first.wait_for()
        script = "rows => rows.map(row => [...row.querySelectorAll('th, td')].map(cell => cell.innerText.trim()))"
        found: list[list[str]] = self.page.locator("table").first.locator("tr").evaluate_all(script)
        return found

    def widths_of_images(self) -> list[int]:
        """Of each image's pixels as Chromium decoded them; 0 where it could not."""
        self.page.wait_for_function("[...document.images].every(image => image.complete)")
        widths: list[int] = self.page.evaluate("[...document.images].map(image => image.naturalWidth)")
        return widths

    def shoot(self, name: str, height: int = 800, top: int = 0, left: int = 0) -> None:
        """Take a screenshot, small enough for a repository; kept in the folder DDK_SCREENSHOTS if that is set.

        Args:
            height: of the window, in pixels.
            top, left: what lies beyond is left out.
        """
        self.page.set_viewport_size({"width": 1200, "height": height})
        self.page.wait_for_timeout(500)  # what moves has come to rest
        taken = self.page.screenshot(clip={"x": left, "y": top, "width": 1200 - left, "height": height - top})
        with Image.open(io.BytesIO(taken)) as image:
            few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        assert len(few.getcolors()) > 8, f"{name} is all but empty"
        png = io.BytesIO()
        few.save(png, format="PNG", optimize=True)
        assert len(png.getvalue()) < LARGEST_SCREENSHOT, f"{name} is too large for a repository"
        if SCREENSHOTS:
            os.makedirs(SCREENSHOTS, exist_ok=True)
            with open(os.path.join(SCREENSHOTS, f"{name}.png"), "wb") as file:
                file.write(png.getvalue())
