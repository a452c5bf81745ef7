"""One scenario, two libraries: `agree` runs it on torch and on statefulnn and compares.

torch 2.13 is the oracle of this folder. A scenario is a function of a `Library`: it builds what it
needs from `lib.nn` and `lib.array` and returns anything made of arrays, modules, names and
containers. Both libraries must return the same, or raise errors of the same builtin class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn


@dataclass(frozen=True)
class Library:
    """What a scenario needs: the classes, and how to make an array of them."""

    name: str
    nn: ModuleType
    array: Callable[..., Any]
    hooks: Any  # where the global hook registrars live

    def zeros(self, *shape: int) -> Any:
        return self.array(np.zeros(shape, np.float32))

    def ones(self, *shape: int) -> Any:
        return self.array(np.ones(shape, np.float32))

    def arange(self, *shape: int) -> Any:
        return self.array(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))

    def numpy(self, x: Any) -> np.ndarray:
        return _numpy(x)


def _numpy(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


TORCH = Library("torch", torch.nn, torch.as_tensor, torch.nn.modules.module)
OURS = Library("statefulnn", nn, jnp.asarray, nn)

_ARRAYS = (torch.Tensor, jax.Array, np.ndarray, nn.Parameter, nn.Buffer)


def _is_module(x: Any) -> bool:
    return isinstance(x, (torch.nn.Module, nn.Module))


def plain(x: Any) -> Any:
    """The same thing in words both libraries share."""
    if isinstance(x, _ARRAYS):
        kind = "parameter" if isinstance(x, (torch.nn.Parameter, nn.Parameter)) else "array"
        values = _numpy(x)
        return (kind, values.shape, np.round(values.astype(np.float64), 5).tolist())
    if _is_module(x):
        return ("module", type(x).__name__)
    if isinstance(x, Mapping):
        return ("mapping", [(plain(k), plain(v)) for k, v in x.items()])
    if isinstance(x, (set, frozenset)):
        return ("set", sorted(map(repr, map(plain, x))))
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, (str, int, float, bool, type(None))):
        return x
    if isinstance(x, type):
        return x.__name__
    return list(map(plain, x))


def outcome(scenario: Callable[[Library], Any], lib: Library) -> tuple[Any, Exception | None]:
    try:
        return plain(scenario(lib)), None
    except Exception as error:
        return None, error


@pytest.fixture
def agree() -> Callable[..., Any]:
    """Run a scenario on both libraries; return what torch said, in `plain` words."""

    def check(scenario: Callable[[Library], Any], *, raises: type | None = None) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
            theirs, their_error = outcome(scenario, TORCH)
        if raises is None and their_error is not None:
            raise AssertionError("the scenario itself fails on torch") from their_error
        if raises is not None:
            assert isinstance(their_error, raises), f"torch does not raise {raises}: {theirs}"
        ours, our_error = outcome(scenario, OURS)
        if their_error is None:
            if our_error is not None:
                raise our_error
            assert ours == theirs
        else:
            assert our_error is not None, f"torch raises {their_error!r}; we return {ours}"
            expected = next(
                c
                for c in type(their_error).__mro__
                if c.__module__ == "builtins"  # torch's own subclasses are theirs alone
            )
            if not isinstance(our_error, expected):
                raise AssertionError(
                    f"torch raises {their_error!r}; we {our_error!r}"
                ) from our_error
        return theirs

    return check


@pytest.fixture(params=[TORCH, OURS], ids=lambda lib: lib.name)
def lib(request: pytest.FixtureRequest) -> Library:
    """Each library in turn, for statements that are written down as a formula."""
    return request.param
