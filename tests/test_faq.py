"""The headings of docs/faq.md are messages that the code below them raises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faq.md"
ENTRIES = re.findall(r"^### `([^\n]+)`\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.M | re.S)
NAMES = [re.sub(r"\W+", "-", heading).strip("-") for heading, _ in ENTRIES]


@pytest.mark.parametrize("heading, entry", ENTRIES, ids=NAMES)
def test_an_entry_shows_its_message_and_then_code_that_works(heading, entry):
    # tests/test_docs.py runs the code; what stands there as the message is what was raised.
    message = heading.removeprefix("'").removeprefix("RetraceWarning: ")
    shown, _, remedy = entry.partition(message)
    assert ">>> " in shown and remedy, f"{heading} is not shown"
    assert ">>> " in remedy, f"{heading} has no code that works"
