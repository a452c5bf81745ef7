"""Numbers as people read them."""

from __future__ import annotations


def brief(number: float) -> str:
    """Return a count in three or four digits: ``8.3 G``."""
    return _scaled(number, ("", " k", " M", " G", " T", " P"))


def in_bytes(number: float) -> str:
    """Return a size in three or four digits: ``497.8 MB``."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB", " PB")) if number else "0"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        # What would be rounded up to 1000.0 belongs to the next unit.
        if number < (1000 if unit == units[0] else 999.95):
            return f"{number:.0f}{unit}" if unit == units[0] else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:,.1f}{units[-1]}"
