"""Random numbers: a generator is a box with a counter, and every draw advances it.

Eager code draws from `default_generator`, as torch does. Inside ``nn.jit`` and the other transforms of
this package the generator is part of the state that is passed in and written back, so masks change
from call to call without a retrace. Pure functions take a key (`rng_scope`).

A draw is legal only if every trace between it and the owner of the generator is an autodiff trace:
under a plain ``jax.vmap`` all lanes would get one mask, under a plain ``jax.jit`` or ``lax.scan`` the
same mask would come at every call.

Source of the generator: threefry2x32 in counter mode (Salmon et al. 2011), as ``jax.random``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core import compat, refusals, threefry
from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.ownership import Scope
from statefulnn.core.placement import anywhere
from statefulnn.core.stamps import value_changed

Out = TypeVar("Out")

State: TypeAlias = jax.Array | np.ndarray  # uint32[4]: two words of key, two of counter
Seed: TypeAlias = int | np.integer | np.ndarray | jax.Array  # an integer, or a random key


def _entropy() -> int:
    """Return a seed of the operating system's, 63 bits."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def _state_from_seed(seed: int) -> np.ndarray:
    try:
        seed = int(seed) & 0xFFFFFFFFFFFFFFFF
    except (TypeError, ValueError):
        raise refusals.no_seed(type(seed).__name__) from None
    return np.array([seed >> 32, seed & 0xFFFFFFFF, 0, 0], np.uint32)


class _Turns:
    """The lock under which threads draw; a forked child has one of its own, which nobody holds."""

    def __init__(self) -> None:
        self.lock = threading.RLock()


_turns = _Turns()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turns.__init__)


def _next_words(state: State) -> tuple[tuple[int, int], np.ndarray]:
    """Return the two words of the key of a state, and the next state, by numpy alone."""
    k0, k1, high, low = (int(w) for w in np.asarray(state))
    key = threefry.block(threefry.block((k0, k1), (0, high)), (0, low))
    # The counter has 64 bits, in two words; `advance` does the same in compiled code.
    low = (low + 1) & 0xFFFFFFFF
    high = (high + (low == 0)) & 0xFFFFFFFF
    return key, np.array([k0, k1, high, low], np.uint32)


def as_key(rng: object) -> Any:
    """Return a random key for a key or an integer seed.

    Raises:
        TypeError: for anything else.
    """
    if _is_integer(rng):
        return jax.random.key(rng)
    if not hasattr(rng, "dtype"):
        raise threefry.no_key(repr(rng))
    threefry.require_key(rng)
    return rng


@jax.jit
def advance(state: State) -> tuple[jax.Array, jax.Array]:
    """Return the next key of a generator state, uint32[4], and the state after it."""
    zero = np.uint32(0)
    key = threefry.hashed(threefry.hashed(state[:2], zero, state[2]), zero, state[3])
    low = state[3] + np.uint32(1)
    high = state[2] + (low == 0).astype(jnp.uint32)
    key = jax.random.wrap_key_data(jnp.stack(key), impl="threefry2x32")
    return key, jnp.stack([state[0], state[1], high, low])


class Generator(Box):
    """A stream of random keys with a state that a transform can carry.

    Args:
        seed: an integer, or a JAX random key; None takes a seed from the operating system.

    Source: ``torch.Generator``.

    Example:
        >>> import jax, statefulnn as nn
        >>> generator = nn.Generator(0)
        >>> first, second = generator.next_key(), generator.next_key()
        >>> bool(jax.random.key_data(first)[0] == jax.random.key_data(second)[0])
        False
    """

    __slots__ = ("_seed",)

    def __init__(self, seed: Seed | None = None) -> None:
        super().__init__(None)
        self._seed: int | None = None
        seed = _entropy() if seed is None else seed
        if _is_integer(seed):
            self.manual_seed(seed)
        elif hasattr(seed, "dtype"):
            # Whoever has a key at hand made the generator for here: it belongs to the trace in force.
            self._scope = None if current_trace() is EAGER else Scope()
            self._value = jnp.concatenate([threefry.key_words(seed), jnp.zeros(2, jnp.uint32)])
        else:
            raise threefry.no_key(repr(seed))

    def _set_static_part(self, like: object) -> None:
        # The seed says nothing of where a stream is; a clone has the state, and what was drawn goes on.
        self._seed = None

    def _read_in_trace(self) -> None:
        pass  # a state that nobody draws from is harmless as a constant, and draws are checked

    @property
    def state(self) -> Any:
        """The state as an array, uint32[4]: two words of key, two of counter."""
        return self._value

    def manual_seed(self, seed: int) -> Generator:
        """Start the stream that belongs to an integer, and return the generator."""
        if current_trace() is not EAGER or self._scope is not None or self.baked_in is not None:
            self.write(_state_from_seed(seed))
        else:
            self._value = _state_from_seed(seed)  # numpy: importing must not start a device
            value_changed()
        self._seed = int(seed)
        return self

    def seed(self) -> int:
        """Start a stream from a seed of the operating system, and return that seed."""
        return self.manual_seed(_entropy()).initial_seed()

    def initial_seed(self) -> int:
        """Return the seed the stream was started with, where it is known: not inside of a compiled function.

        Raises:
            MissingRngError: for a generator that is an argument of a traced function.
        """
        self._become_constant()
        if not self.is_concrete():
            raise refusals.seed_of_an_argument()
        if self._seed is None:
            words = np.asarray(self.state[:2])
            return (int(words[0]) << 32) | int(words[1])
        return self._seed

    def get_state(self) -> jax.Array:
        """Return the state, uint32[4]."""
        self._become_constant()
        return jnp.asarray(self.state)

    def _become_constant(self) -> None:
        # Whoever asks for the state uses it: a later change is said, as with a parameter (law 6).
        if current_trace() is not EAGER:
            super()._read_in_trace()

    def set_state(self, state: State) -> Generator:
        """Continue from a state that `get_state` gave, and return the generator.

        Raises:
            DtypeError: for anything but four words, uint32.
        """
        have = (getattr(state, "dtype", None), getattr(state, "shape", None))
        if have != (np.dtype(np.uint32), (4,)):
            what = f"{have[0]}{list(have[1] or ())}" if have[0] else type(state).__name__
            raise refusals.no_generator_state(what)
        self.write(state)
        self._seed = None
        return self

    def next_key(self) -> jax.Array:
        """Return a fresh random key and advance the stream.

        Raises:
            MissingRngError: where the advance would be lost or every lane would get the same key.
        """
        return self.drawn(advance)

    def drawn(self, kernel: Callable[[State], tuple[Out, State]]) -> Out:
        """Draw with the state, put in the one after it, and return what was drawn.

        Threads take turns, so that no two of them draw with the same state.

        Args:
            kernel: takes a state, returns what it drew and the next state.
        """
        with _turns.lock:
            # Eager code draws for arrays anywhere: the state is where nobody has put it.
            out, state = kernel(anywhere(self.drawable_state()))
            if self.baked_in is not None:
                self.baked_in.warn_of_value(self)
            self._value = state
            value_changed()
        return out

    def next_words(self) -> tuple[int, int]:
        """Return the two words of a fresh key and advance the stream, without a compiled call.

        It is the key that `next_key` would give. Only where `is_concrete`.
        """
        return self.drawn(_next_words)

    def is_concrete(self) -> bool:
        """Say whether the state is known here, and not a traced value."""
        return not isinstance(self._value, compat.Tracer)

    def drawable_state(self) -> State:
        """Return the state if a draw is legal here; `drawn` draws with it."""
        # Eager draws from the user's generators are always legal, and come often.
        if current_trace() is not EAGER or self._scope is not None:
            _check_draw(self)
        return self.state

    def __deepcopy__(self, memo: dict) -> Generator:
        return _generator_with(self.lend(), self._seed)

    def __reduce__(self) -> Any:
        return _generator_with, (self.state, self._seed)

    def __repr__(self) -> str:
        return f"Generator(state={self._value})"


def _is_integer(seed: Any) -> TypeGuard[int]:
    if isinstance(seed, int):
        return not isinstance(seed, bool)
    dtype = getattr(seed, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.integer) and np.ndim(seed) == 0


def _generator_with(state: State, seed: int | None) -> Generator:
    generator = Generator(0)
    generator._value, generator._seed = state, seed
    return generator


def _check_draw(generator: Generator) -> None:
    """Raise unless every trace from here out to the owner of the generator is an autodiff trace.

    Such a trace runs the function itself, once for each call, and the new state comes back through the
    owner. Any other would repeat the numbers, in each lane or at each call.
    """
    scope = generator._scope
    owner = EAGER if scope is None else scope.trace
    between = compat.between(current_trace(), owner)
    # Where the owner is not around at all, some trace out there still tells why the draw is wrong.
    around = compat.chain(current_trace()) if between is None else between
    hindrance = next((t for t in around if compat.kind(t) not in ("autodiff", "unknown")), owner)
    if between is not None and hindrance is owner and (scope is None or scope.writable):
        return
    why = {
        "batch": "every lane would get the same numbers",
        "staged": "the numbers would be drawn once, while tracing, and come back at every call",
    }.get(compat.kind(hindrance), "nobody would keep the advanced generator")
    raise refusals.draw_in_a_plain_transformation(why, compat.kind(hindrance) == "batch")


# --------------------------------------------------------------------------------------------------
# The generator in force

default_generator = Generator(_entropy())


class Forbidden:
    """Stands where a generator would: a draw raises with these three parts of a message."""

    def __init__(self, what: str, why: str, instead: str) -> None:
        self.parts = (what, why, instead)


NO_KEY = Forbidden(*refusals.NO_KEY)


# One for each thread: a pure call forbids drawing in its own thread only.
class _Streams(threading.local):
    current: Generator | Forbidden = default_generator


streams = _Streams()


def current_generator() -> Generator | None:
    """Return the generator that layers draw from here, None where drawing is forbidden."""
    current = streams.current
    return current if isinstance(current, Generator) else None


@contextlib.contextmanager
def use_generator(generator: Generator | Forbidden | None) -> Iterator[None]:
    """Make layers draw from a generator; None forbids drawing, as in a pure call without a key."""
    before = streams.current
    streams.current = NO_KEY if generator is None else generator
    try:
        yield
    finally:
        streams.current = before


def rng_scope(key: Seed) -> contextlib.AbstractContextManager[object]:
    """Make everything inside draw from a stream that starts at a key.

    Args:
        key: a JAX random key, or an integer seed.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> drop = nn.Dropout(0.5)
        >>> def two_calls(key):
        ...     with nn.rng_scope(key):
        ...         return drop(jnp.ones(100)), drop(jnp.ones(100))
        >>> a, b = two_calls(jax.random.key(0))
        >>> bool((a == b).all()), bool((a == two_calls(jax.random.key(0))[0]).all())
        (False, True)
    """
    return use_generator(Generator(key))


def drawing_generator(generator: Generator | None = None) -> Generator:
    """Return the generator to draw from, or raise if there is none."""
    current = streams.current if generator is None else generator
    if isinstance(current, Forbidden):
        raise refusals.no_generator(*current.parts)
    return current


def next_key(generator: Generator | None = None) -> jax.Array:
    """Return a fresh random key from the generator in force: what a layer of your own draws with.

    Args:
        generator: draw from this one instead.

    Raises:
        MissingRngError: where no generator can be advanced.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> class Noise(nn.Module):
        ...     def forward(self, x):
        ...         return x + jax.random.normal(nn.next_key(), x.shape)
        >>> nn.functional_call(Noise(), {}, jnp.zeros(3), rng=jax.random.key(0)).shape
        (3,)
    """
    return drawing_generator(generator).next_key()


def _default() -> Generator:
    """Return what stands for the default generator: inside of `nn.jit` the one that is written back."""
    current = current_generator()
    if current is not None and current._scope is not None and current_trace() is not EAGER:
        return current
    return default_generator


def manual_seed(seed: int) -> Generator:
    """Seed the default generator, and return it; inside of `nn.jit` that is the generator in force.

    Example:
        >>> import statefulnn as nn
        >>> a = (nn.manual_seed(0), nn.Linear(2, 2).weight)[1]
        >>> b = (nn.manual_seed(0), nn.Linear(2, 2).weight)[1]
        >>> bool((a == b).all())
        True
    """
    return _default().manual_seed(seed)


def initial_seed() -> int:
    """Return the seed of the default generator; it is not known inside of a compiled function."""
    return _default().initial_seed()


def get_rng_state() -> jax.Array:
    """Return the state of the default generator, uint32[4]; inside of `nn.jit` of the one in force."""
    return _default().get_state()


def set_rng_state(state: State) -> None:
    """Continue the default generator from a state that `get_rng_state` gave; see there."""
    _default().set_state(state)
