"""A headless Chromium for tests of pages: `page(path_or_url, width=, height=, dark=)`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.browsers import HOW_TO_INSTALL, find_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TIME_OUT = 120_000  # milliseconds: a busy machine is slow, and that is no failure


@dataclasses.dataclass
class Opened:
    """A page in the browser: what it complained of, what it fetched, and ways to look at it."""

    page: Page
    errors: list[str] = dataclasses.field(default_factory=list)
    requests: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(TIME_OUT)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on(
            "console",
            lambda said: (
                self.errors.append(said.text) if said.type in ("error", "warning") else None
            ),
        )

    def evaluate(self, javascript: str, argument: Any = None) -> Any:
        """Run JavaScript in the page and return its value."""
        return self.page.evaluate(javascript, argument)

    def screenshot(self, path: str | pathlib.Path, **options: Any) -> None:
        """Write what is to be seen as a PNG."""
        self.page.screenshot(path=path, **options)


# Of one file and not of the session: while it runs, no other test could start an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The browser, one for each file of tests."""
    path = find_browser()
    if path is None:
        pytest.fail(f"There is no browser for the tests in tests/browser. {HOW_TO_INSTALL}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=path,
            chromium_sandbox=False,  # root, as which CI runs, may not have it
            timeout=TIME_OUT,
            env={name: value for name, value in os.environ.items() if name != "DISPLAY"},
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """Open a file or an address: `page(path_or_url, width=1280, height=800, dark=False)`."""
    contexts = []

    def open_page(
        where: str | pathlib.Path, width: int = 1280, height: int = 800, dark: bool = False
    ) -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        opened = Opened(context.new_page())
        url = str(where) if "://" in str(where) else pathlib.Path(where).resolve().as_uri()
        opened.page.goto(url, timeout=TIME_OUT)
        return opened

    yield open_page
    for context in contexts:
        context.close()
