"""Which browser the tests in `tests/browser` use."""

from __future__ import annotations

import importlib.util
import pathlib
import shutil

HOW_TO_INSTALL = (
    "They need a Chromium and the library that drives it: `pip install playwright`, and "
    "`apt-get install chromium` or `playwright install chromium`."
)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_OF_PLAYWRIGHT = (  # where `playwright install` puts it on Linux, macOS and Windows
    ".cache/ms-playwright/chromium-*/chrome-linux*/chrome",
    "Library/Caches/ms-playwright/chromium-*/*/*.app/Contents/MacOS/*",
    "AppData/Local/ms-playwright/chromium-*/*/chrome.exe",
)


def find_browser() -> str | None:
    """Return the path of a Chromium, or None where the tests cannot drive one."""
    if importlib.util.find_spec("playwright") is None:
        return None
    installed = next(filter(None, map(shutil.which, _NAMES)), None)
    downloaded = (
        p for pattern in _OF_PLAYWRIGHT for p in sorted(pathlib.Path.home().glob(pattern))
    )
    return installed or next(map(str, downloaded), None)
