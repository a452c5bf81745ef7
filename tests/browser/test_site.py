"""The documentation site is built without a warning, fits its window, and has no dead links."""

from __future__ import annotations

import html
import importlib
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

import statefulnn as nn
from tests.quick import first

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {"phone": 390, "desktop": 1280}
NOTHING_TO_FIND = 'var __index = {"config": {"lang": ["en"], "separator": " "}, "docs": []}'
FAMILIES = ["", ".functional", ".meta", ".curvature", ".init", ".bridge.torch", ".utils", ".func"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def texts(site: Path) -> dict[Path, str]:
    # A server shows 404.html at any address, so its links start at the root of the server.
    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]
    return {page: page.read_text() for page in pages}


# Pages differ in their text, and little in what surrounds it.
@pytest.mark.parametrize("start", first(1, range(8)))
def test_every_page_fits_its_window_and_loads_nothing_from_elsewhere(page, site, texts, start):
    opened = page(site / "index.html")
    # What the search looks through is megabytes, and read by each page.
    opened.page.route(
        "**/search/search_index.js", lambda route: route.fulfill(body=NOTHING_TO_FIND)
    )
    for path in list(texts)[start::8]:
        opened.page.goto(path.as_uri())
        for width in WIDTHS.values():
            opened.page.set_viewport_size({"width": width, "height": 800})
            wide = opened.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"{path.relative_to(site)} is {wide} pixels too wide for {width}"
        broken = opened.evaluate(
            "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        )
        assert not broken, f"{path.relative_to(site)}: {broken}"
        # The next page cuts requests of this one short; that is no failure where the file is there.
        errors = [e for e in opened.errors if not Path(e.removeprefix("failed: file:")).is_file()]
        assert not errors, f"{path.relative_to(site)}: {errors}"
    assert not [url for url in opened.requests if not url.startswith(("file:", "data:"))]


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_the_search_finds_a_layer(page, site, width):
    opened = page(site / "index.html", width=width)
    if width < 1000:
        opened.page.click("label.md-header__button[for=__search]")
    opened.page.click(".md-search__input")
    opened.page.keyboard.type("BatchNorm2d")
    result = opened.page.locator(".md-search-result__link[href*='statefulnn.BatchNorm2d']").first
    result.click()
    opened.page.wait_for_url("**/reference/modules.html*")
    assert not opened.errors


def test_the_gallery_shows_the_picture_of_each_example_that_draws_one(page, site):
    opened = page(site / "examples" / "index.html")
    shown = opened.evaluate("[...document.querySelectorAll('.cards img')].map(i => i.src)")
    drawn = {p.stem for p in ROOT.glob("examples/*.py") if ".savefig(" in p.read_text()}
    assert {Path(url).stem for url in shown} == drawn


def test_dark_pages_are_dark(page, site):
    light, dark = (
        page(site / "index.html", dark=dark).evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        for dark in (False, True)
    )
    assert sum(dark) < 200 < 700 < sum(light)


def test_links_lead_to_pages_and_headings_of_the_site(site, texts):
    ids = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    missing = set()
    for page, text in texts.items():
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            parts = urllib.parse.urlsplit(html.unescape(link))
            if parts.scheme:
                continue
            target = (page.parent / parts.path).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.exists() or (anchor and anchor not in ids[target]):
                missing.add((str(page.relative_to(site)), link))
    assert not missing


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"nn{family}")
def test_the_reference_has_every_public_name(texts, family):
    package = importlib.import_module(f"statefulnn{family}")
    prefix = {".functional": "F"}.get(family, f"nn{family}")
    headings = {
        heading
        for page, text in texts.items()
        if page.parent.name == "reference"
        for heading in re.findall(r"<h2[^>]*>\s*(?:<code[^>]*>)?\s*([\w.]+)", text)
    }
    names = {n for n in package.__all__ if not isinstance(getattr(package, n), type(nn))}
    assert {f"{prefix}.{name}" for name in names} <= headings
