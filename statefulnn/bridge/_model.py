"""What the bridges share: another library's model as a pure function in one of two modes.

A bridge writes one subclass of `Model`. It says how the library's model is called with arrays and a random
key; `as_module` makes a module of it with `statefulize`, which names and holds the arrays.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.errors import MissingRngError, StateWriteError, explain
from statefulnn.core.module import Module
from statefulnn.transforms.statefulize import Statefulized, dotted, is_taken

# The names under which the libraries' models ask for the mode, and what each is in training.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}


class Mode:
    """How a model is told its mode: by arguments of its call.

    Args:
        option: "auto" looks for the names of `MODES` among the arguments; a function of the mode returns
            keyword arguments; None for a model that is the same in both modes.
        function: what is called, or its signature.
        skip: arguments that are no question, or already answered.
        elsewhere: whether the mode is also said in another way.
    """

    def __init__(
        self, option: Any, function: Any, skip: tuple[str, ...] = (), elsewhere: bool = False
    ) -> None:
        if not (option is None or option == "auto" or callable(option)):
            raise TypeError(
                explain(
                    f"called a bridge with mode={option!r}",
                    "the mode is told by keyword arguments of the model",
                    "mode=lambda training: {'train': training}; or mode=None for a model that is "
                    "the same in training and evaluation",
                )
            )
        self.option = option
        parameters = _parameters(function) if option == "auto" else {}
        # The arguments that ask for the mode, with their positions.
        self.asked = {n: place for n, place in parameters.items() if n in MODES and n not in skip}
        # Whether nobody knows what evaluation mode means for the model.
        self.unknown = option == "auto" and not (elsewhere or self.asked)

    def add(self, training: bool, inputs: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of a call with those of the mode; the caller's own win."""
        if callable(self.option):
            said: Any = self.option(training)
            return {**said, **kwargs}
        free = (n for n, place in self.asked.items() if place is None or place >= len(inputs))
        return {**{n: MODES[n] is training for n in free}, **kwargs}


def _parameters(function: Any) -> dict[str, int | None]:
    """Return the names of the arguments of a function, with positions where they have one."""
    try:
        known = isinstance(function, inspect.Signature)
        signature = function if known else inspect.signature(function)
    except (TypeError, ValueError):
        return {}
    named = [
        p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return {p.name: None if p.kind is p.KEYWORD_ONLY else i for i, p in enumerate(named)}


_models: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


class Model:
    """Another library's model as a pure function; subclasses define ``__call__``.

    ``__call__(training, params, state, *inputs, rng=None, **kwargs) -> (out, new_state)``, where
    `training` is True, False, or None for a model that was given in neither mode as a whole. It holds no
    arrays and is never changed, so all modules with an equal one share it, and with it compiled code.

    Attributes:
        name, library: for messages.
        mode: how the call is told the mode.
        given: the mode that the model was given in.
        mixed: whether parts of it were in the other mode.
        draws: whether calls want a random key.
        made_of: the arguments of `of`.
    """

    name: str = "the model"
    library: str = ""
    mode: Mode
    given: bool = True
    mixed: bool = False
    draws: bool = True
    made_of: tuple

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        """Return the model of some arguments: the same one for equal arguments."""
        key = (
            cls,
            arguments,
            repr(arguments),
        )  # 1, 1.0 and True are equal, and written differently
        try:
            model = _models.get(key)
        except TypeError:  # something in them cannot be compared
            key = model = None
        if model is None:
            model = cls(*arguments)
            model.made_of = arguments
            if key is not None:
                _models[key] = model
        return model

    def __call__(self, training: bool | None, params: Any, state: Any, /, *inputs: Any) -> Any:
        raise NotImplementedError

    def in_mode(self, training: bool | None) -> Callable:
        """Return the pure function of a mode: equal ones share compiled code."""
        fn: Any = functools.partial(self, training)
        fn.__dict__.update(in_mode=self.in_mode, __qualname__=self.name)
        fn.training = self.given if training is None else training
        fn.takes_rng = self.draws
        return fn

    def __deepcopy__(self, memo: dict) -> Model:
        return self

    def __reduce__(self) -> Any:
        return type(self).of, self.made_of

    def is_still(self, training: bool | None) -> bool:
        """Say whether a call may neither draw nor change state.

        It is evaluation mode of a model that has no way to be told: drawing and changing state there
        would mean that it went on training.
        """
        return self.mode.unknown and training is False

    def check_state(self, training: bool | None, old: list[Any], new: Any) -> None:
        """Raise if a call that `is_still` has changed its state, given by its leaves before."""
        after = jax.tree.leaves(new)
        if self.is_still(training) and any(a is not b for a, b in zip(old, after, strict=False)):
            raise self.still_training("changed its state", StateWriteError)

    def still_training(self, did: str, error: type[Exception]) -> Exception:
        return error(
            explain(
                f"{self.name} {did} in evaluation mode",
                f"the bridge has not found how {self.library} tells it the mode, so it may still train",
                "say how: mode=lambda training: {'train': training}; or mode=None, if it is to do the "
                "same in training and evaluation",
            )
        )

    def without_key(self, how: object) -> Exception:
        """Return the error for a model that wanted a random key in a call that had none."""
        return MissingRngError(
            explain(
                f"{self.name} drew random numbers in a call that has no key: {how}",
                "a pure function, or a plain JAX transformation, has no generator that it may advance",
                "pass one, fn(params, x, rng=key), or nn.functional_call(..., rng=key); nn.jit, nn.vmap "
                "and nn.scan carry the generator; or call module.eval() first",
            )
        )


def as_module(
    model: Model, params: Any, state: Any, name_of: Callable[[tuple], str], did: str
) -> Module:
    """Return a model and its arrays as a module."""
    fn = model.in_mode(None if model.mixed else model.given)
    return Statefulized(fn, params, state, path_name=name_of, did=did)


def model_and_arrays(
    module: Any, kind: type[Model], did: str, made_by: str
) -> tuple[Any, Any, Any]:
    """Return the model in a module that a bridge made, with its parameters and state."""
    model = getattr(getattr(module, "_fn", None), "func", None)
    if not isinstance(module, Statefulized) or not isinstance(model, kind):
        raise TypeError(
            explain(
                f"{did} with an object of type {type(module).__name__}",
                f"it gives back what {made_by} took",
                f"pass the module that {made_by} returned",
            )
        )
    params, state = module._arrays()
    return model, params, state


def name_of_path(path: tuple) -> str:
    """Return the dotted name of a path in a library's tree.

    A part that every module uses as an attribute gets an underscore: ``forward`` becomes ``forward_``.
    """
    parts = dotted(path).split(".")
    return ".".join(f"{p}_" if is_taken(p) else p for p in parts)


def names_in_boxes(tree: Any, is_box: Callable[[Any], bool]) -> dict[tuple, str]:
    """Return the name of each array by its path, without the keys that lead into a library's boxes."""
    outer = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]
    boxes = {path for path, leaf in outer if is_box(leaf)}
    found = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
        at = next((n for n in range(len(path)) if path[:n] in boxes), len(path))
        found[path] = name_of_path((*path[:at], *path[at + 1 :]))
    return found


def is_key(value: Any) -> bool:
    """Say whether a value is a random key or a seed, and not a tree of arrays."""
    if isinstance(value, int) and not isinstance(value, bool):
        return True
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        return False
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.ndim == 0:
        return True
    return value.dtype == jnp.uint32 and value.shape == (2,)


# --------------------------------------------------------------------------------------------------
# The way out: dotted names as the nested dicts of the libraries


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays by dotted name as nested dicts."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts of arrays by dotted name: the inverse of `nested`."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
