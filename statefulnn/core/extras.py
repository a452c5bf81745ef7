"""Libraries that only some functions need: they are imported when the function is called."""

from __future__ import annotations

import importlib
from typing import Any

from statefulnn.core.errors import explain


def import_extra(library: str, package: str, did: str, needs: str) -> Any:
    """Import a library of an extra, or raise an error that says how to install it.

    Args:
        library: the name of its module.
        package: what pip installs it by.
        did: what was called, for the message.
        needs: what the library does there, for the message.

    Raises:
        ImportError: if it is not installed.

    Example:
        >>> import_extra("json", "json", "saved a model", "writes the header").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        # Otherwise it is installed, and something that it needs is not.
        if not f"{library}.".startswith(f"{error.name}."):
            raise
        raise ImportError(
            explain(
                did,
                f"{library}, which {needs}, is not installed",
                f"pip install {package}",
            )
        ) from error
