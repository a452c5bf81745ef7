"""Whose gradient an array is, while that is known: an optimizer of another module can then say so.

Gradients are plain dicts of arrays. What is made of them (clipped, averaged) is known no more.
"""

from __future__ import annotations

import weakref

import jax

from statefulnn.core.box import Box

# id of an array -> the array, and the parameter.
_known: dict[int, tuple[weakref.ref[jax.Array], weakref.ref[Box]]] = {}


def note_gradient(gradient: object, parameter: Box) -> None:
    """Remember, as long as both live, that an array is the gradient of a parameter."""
    if not isinstance(gradient, jax.Array):  # a row of a Jacobian
        return
    key = id(gradient)
    forget = weakref.ref(gradient, lambda _: _known.pop(key, None))
    _known[key] = forget, weakref.ref(parameter)


def parameter_of(gradient: object) -> Box | None:
    """Return the parameter that an array is known to be the gradient of."""
    known = _known.get(id(gradient))
    return known[1]() if known is not None and known[0]() is gradient else None
