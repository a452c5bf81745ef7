"""Lets early releases of Python 3.11 compare an error that has a note; it needs the standard library alone.

Their doctest looks at the last line of what an error says, where later ones take all of it. An error that
went through a module has a note there: "raised in 'fc1' of Net (Linear)".
"""

from __future__ import annotations

import doctest
import sys
import traceback
import types

if sys.version_info < (3, 11, 7):
    whole = types.SimpleNamespace(**vars(traceback))
    whole.format_exception_only = lambda *error: ["".join(traceback.format_exception_only(*error))]
    setattr(doctest, "traceback", whole)  # noqa: B010 (a type checker knows a module there)
