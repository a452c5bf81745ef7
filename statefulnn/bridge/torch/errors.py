"""What converting a module of torch raises."""

from __future__ import annotations

from statefulnn.core.errors import StatefulnnError


class ConversionError(StatefulnnError, NotImplementedError):
    """A module of another library that has no counterpart here."""


class KeptTensorError(ConversionError):
    """A forward that keeps a tensor in its module: perhaps in its first call only."""
