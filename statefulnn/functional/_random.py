"""How a function draws: from a key it is given, or from the generator in force, in one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from statefulnn.core.box import unwrap
from statefulnn.core.generator import State, advance, drawing_generator
from statefulnn.functional._compiled import compiled


def drawing(kernel: Callable[..., Any], static_argnums: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Return ``call(rng, *args)`` for a kernel that computes ``kernel(key, *args)``.

    Without `rng` the key is made, and the generator advanced, inside the same compiled call.

    Args:
        kernel: a pure function of a random key and other arguments.
        static_argnums: which of them are static; the key is number 0.
    """
    with_key = compiled(kernel, static_argnums=static_argnums)

    @functools.partial(compiled, static_argnums=static_argnums)
    def advancing(state: State, *args: Any) -> tuple[Any, Any]:
        key, state = advance(state)
        return kernel(key, *args), state

    def call(rng: jax.Array | None, *args: Any) -> Any:
        if rng is not None:
            return with_key(unwrap(rng), *args)
        return drawing_generator().drawn(lambda state: advancing(state, *args))

    return call
