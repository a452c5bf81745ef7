"""The code of docs/parallel.md, on the eight devices that it asks for."""

from __future__ import annotations

import pytest

from tests.devices import run_on_devices
from tests.test_docs import ROOT, blocks

pytest.importorskip("orbax.checkpoint")


def test_the_code_of_the_page_runs_block_after_block():
    page = blocks(ROOT / "docs" / "parallel.md")
    run_on_devices(8, "\n".join(code for _, flags, code in page if "at-all" not in flags))
