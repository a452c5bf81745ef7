"""Pruning: parameters times masks of zeros and ones.

A pruned ``weight`` is computed from the parameter ``weight_orig`` and the buffer ``weight_mask`` each time
it is read. The masks are made by methods, outside compiled code; compiled code sees arrays only.

Source: ``torch.nn.utils.prune``. Which of several equal values is pruned first is left open by torch;
here it is the one with the lowest index.

Limitation: a method that overrides ``apply_mask`` is refused; write a parametrization for that.
"""

from __future__ import annotations

import abc
import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn import init
from statefulnn.core.box import unwrap
from statefulnn.core.errors import explain
from statefulnn.core.listing import listing
from statefulnn.core.module import Module
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.utils._computed import add_computation, remove_computation
from statefulnn.utils._pruned import HISTORY, Pruned, any_pruned, methods, pruned
from statefulnn.utils._tensors import numbers_of, parameter_of
from statefulnn.utils.convert_parameters import parameters_to_vector

__all__ = [
    "BasePruningMethod",
    "CustomFromMask",
    "Identity",
    "L1Unstructured",
    "LnStructured",
    "PruningContainer",
    "RandomStructured",
    "RandomUnstructured",
    "custom_from_mask",
    "global_unstructured",
    "identity",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "random_structured",
    "random_unstructured",
    "remove",
]
__dir__ = listing(globals())


class BasePruningMethod(abc.ABC):
    """Base of all pruning methods: a subclass defines `compute_mask` and ``PRUNING_TYPE``.

    Attributes:
        PRUNING_TYPE: ``"unstructured"``, ``"structured"`` (with an attribute ``dim``) or ``"global"``:
            what a further method is shown of a tensor that was pruned before.

    Source: ``torch.nn.utils.prune.BasePruningMethod``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> class EverySecond(prune.BasePruningMethod):
        ...     PRUNING_TYPE = "unstructured"
        ...
        ...     def compute_mask(self, t, default_mask):
        ...         return default_mask.at[..., ::2].set(0)
        >>> layer = nn.Linear(4, 1)
        >>> _ = EverySecond.apply(layer, "weight")
        >>> layer.weight_mask.tolist()
        [[0.0, 1.0, 0.0, 1.0]]
    """

    PRUNING_TYPE: str
    _tensor_name: str | None = None

    @abc.abstractmethod
    def compute_mask(self, t: jax.Array, default_mask: jax.Array) -> jax.Array:
        """Return a mask of the shape of `t`.

        Args:
            t: how important each element is; mostly the tensor itself.
            default_mask: the mask so far, which the new one respects.
        """

    def apply_mask(self, module: Module) -> jax.Array:
        """Return the tensor times its mask."""
        return Pruned(self._name("apply_mask")).read(module)

    def _name(self, what: str) -> str:
        if self._tensor_name is None:
            raise AssertionError(
                explain(
                    f"{type(self).__name__}.{what}",
                    "the module has to be pruned before: the method does not know its tensor",
                    f"{type(self).__name__}.apply(module, name, ...)",
                )
            )
        return self._tensor_name

    @classmethod
    def apply(
        cls,
        module: Module,
        name: str,
        *args: Any,
        importance_scores: ArrayLike | None = None,
        **kwargs: Any,
    ) -> BasePruningMethod:
        """Prune a parameter of a module, or prune it further.

        Args:
            module: it is changed.
            name: of the parameter.
            args, kwargs: for the method's constructor.
            importance_scores: an array of the parameter's shape to compute the mask from; None for the
                parameter itself.

        Returns:
            The method; a `PruningContainer` if there were others before.

        Raises:
            AssertionError: for importance scores of another shape.
            AttributeError: if there is no such parameter.
        """
        if cls.apply_mask is not BasePruningMethod.apply_mask:
            raise TypeError(
                explain(
                    f"{cls.__name__}.apply, where {cls.__name__} overrides apply_mask",
                    "a pruned tensor is always the original times the mask",
                    "parametrize.register_parametrization(module, name, parametrization)",
                )
            )
        module._check_static_write(name, None)
        method: Any = cls(*args, **kwargs)
        method._tensor_name = name
        before = methods(module).get(name)
        again = pruned(module, name) is not None
        parameter = None if again else parameter_of(module, name, "pruning")
        value = unwrap(getattr(module, name))
        scores = value if importance_scores is None else unwrap(importance_scores)
        _require_same_shape(scores, value, "the parameter")

        if again:
            default_mask = getattr(module, f"{name}_mask")
            mask = _combined(method, scores, default_mask)
        else:
            default_mask = jnp.ones(value.shape, value.dtype)
            if isinstance(method, PruningContainer):
                mask = method.compute_mask(scores, default_mask=default_mask)
            else:
                mask = method.compute_mask(scores, default_mask)
        mask = jnp.asarray(unwrap(mask))

        if parameter is not None:
            module.register_buffer(f"{name}_mask", Buffer(mask))
            del module._parameters[name]
            module.register_parameter(f"{name}_orig", parameter)
            add_computation(module, Pruned(name))
        else:
            setattr(module, f"{name}_mask", mask)
            if not isinstance(before, PruningContainer):
                container = PruningContainer()
                container._tensor_name = name
                if before is not None:
                    container.add_pruning_method(before)
                before = container
            before.add_pruning_method(method)
            method = before
        setattr(module, HISTORY, {**methods(module), name: method})
        return method

    def prune(
        self,
        t: ArrayLike,
        default_mask: ArrayLike | None = None,
        importance_scores: ArrayLike | None = None,
    ) -> jax.Array:
        """Return a tensor times a mask computed for it; no module is involved.

        Args:
            t: an array.
            default_mask: the mask so far; None for ones.
            importance_scores: an array of the same shape to compute the mask from; None for `t`.

        Raises:
            AssertionError: for importance scores of another shape.
        """
        tensor = unwrap(t)
        scores = tensor if importance_scores is None else unwrap(importance_scores)
        _require_same_shape(scores, tensor, "tensor t")
        before: Any = default_mask
        if before is None:
            before = jnp.ones(tensor.shape, tensor.dtype)
        return tensor * self.compute_mask(scores, before).astype(tensor.dtype)

    def remove(self, module: Module) -> None:
        """Make the tensor a parameter again, which keeps its zeros for now."""
        _remove(module, self._name("remove"))


def _require_same_shape(scores: jax.Array, t: jax.Array, noun: str) -> None:
    if scores.shape != t.shape:
        raise AssertionError(
            explain(
                f"pruned an array of shape {t.shape} by importance scores of shape {scores.shape}",
                f"importance_scores should have the same shape as {noun}",
                f"pass importance_scores of shape {t.shape}",
            )
        )


def _combined(method: Any, t: Any, mask: Any) -> Any:
    """Return the mask after one more method, which is shown what is not pruned yet."""
    mask, t = np.array(mask), np.asarray(t)
    if method.PRUNING_TYPE == "unstructured":
        shown: Any = mask == 1
    elif method.PRUNING_TYPE == "structured":
        if not hasattr(method, "dim"):
            raise AttributeError(
                explain(
                    f"pruned by {type(method).__name__}",
                    'Pruning methods of PRUNING_TYPE "structured" need to have the attribute `dim` '
                    "defined",
                    "self.dim = ... in its __init__",
                )
            )
        dim = method.dim + t.ndim if method.dim < 0 else method.dim
        if not 0 <= dim < t.ndim:
            raise _no_such_axis(t, method.dim)
        others = tuple(i for i in range(t.ndim) if i != dim)
        shown = (slice(None),) * dim + (mask.sum(axis=others) != 0,)
    elif method.PRUNING_TYPE == "global":
        shown = ...
    else:
        raise ValueError(
            explain(
                f"pruned by {type(method).__name__}",
                f"Unrecognized PRUNING_TYPE {method.PRUNING_TYPE}",
                'PRUNING_TYPE = "unstructured", "structured" or "global"',
            )
        )
    part = method.compute_mask(jnp.asarray(t[shown]), default_mask=jnp.asarray(mask[shown]))
    mask[shown] = np.asarray(unwrap(part)).astype(mask.dtype)
    return jnp.asarray(mask)


class PruningContainer(BasePruningMethod):
    """Several pruning methods of one tensor; the last one computes the next mask.

    Args:
        args: methods of one tensor.

    Raises:
        TypeError: for something that is no pruning method.
        ValueError: for methods of different tensors.

    Source: ``torch.nn.utils.prune.PruningContainer``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> layer = nn.Linear(4, 4)
        >>> _ = prune.L1Unstructured.apply(layer, "weight", amount=4)
        >>> container = prune.L1Unstructured.apply(layer, "weight", amount=0.5)
        >>> len(container), int(layer.weight_mask.sum())
        (2, 6)
    """

    def __init__(self, *args: BasePruningMethod) -> None:
        self._pruning_methods: tuple = ()
        if len(args) == 1 and isinstance(args[0], BasePruningMethod):
            self._tensor_name = args[0]._tensor_name
        for method in args:
            self.add_pruning_method(method)

    def add_pruning_method(self, method: BasePruningMethod) -> None:
        """Add a method of the same tensor."""
        if not isinstance(method, BasePruningMethod) and method is not None:
            raise TypeError(
                explain(
                    f"added a {type(method).__name__} to a PruningContainer",
                    f"{type(method)} is not a BasePruningMethod subclass",
                    "add an instance of a pruning method",
                )
            )
        if method is not None and self._tensor_name != method._tensor_name:
            raise ValueError(
                explain(
                    f"added a method of {method._tensor_name!r} to a PruningContainer",
                    "Can only add pruning methods acting on the parameter named "
                    f"'{self._tensor_name}'",
                    "make a container for each tensor",
                )
            )
        self._pruning_methods += (method,)

    def __len__(self) -> int:
        return len(self._pruning_methods)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._pruning_methods)

    def __getitem__(self, idx: int | slice) -> Any:
        return self._pruning_methods[idx]

    def compute_mask(self, t: jax.Array, default_mask: jax.Array) -> jax.Array:
        """Return the mask after the last method, which is shown what is not pruned yet."""
        return _combined(self._pruning_methods[-1], unwrap(t), default_mask)


class Identity(BasePruningMethod):
    """Prune nothing: the mask is ones.

    Source: ``torch.nn.utils.prune.Identity``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> layer = nn.Linear(2, 1)
        >>> _ = prune.Identity.apply(layer, "weight")
        >>> layer.weight_mask.tolist()
        [[1.0, 1.0]]
    """

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: jax.Array, default_mask: jax.Array) -> jax.Array:
        return default_mask

    @classmethod
    def apply(cls, module: Module, name: str) -> BasePruningMethod:  # pyright: ignore
        return super().apply(module, name)


class _ByAmount(BasePruningMethod):
    """A method that prunes a share (float) or a number (int) of elements or channels."""

    def __init__(self, amount: float) -> None:
        if not isinstance(amount, numbers.Real):
            raise TypeError(
                explain(
                    f"pruned with amount={amount!r}",
                    "Invalid type for amount: must be int or float",
                    "amount=0.5 for one half, amount=3 for three",
                )
            )
        whole = isinstance(amount, numbers.Integral)
        if (whole and amount < 0) or (not whole and not 0.0 <= float(amount) <= 1.0):
            raise ValueError(
                explain(
                    f"pruned with amount={amount}",
                    "it should either be a float in the range [0, 1] or a non-negative integer",
                    "amount=0.5 for one half, amount=3 for three",
                )
            )
        self.amount = amount

    def _number(self, size: int) -> int:
        """Return how many of `size` are to be pruned."""
        if not isinstance(self.amount, numbers.Integral):
            return round(self.amount * size)
        if self.amount > size:
            raise ValueError(
                explain(
                    f"pruned with amount={self.amount}",
                    f"it should be smaller than the number of parameters to prune={size}",
                    "amount=0.5 for one half",
                )
            )
        return int(self.amount)


def _random(shape: Sequence[int]) -> np.ndarray:
    return np.asarray(init.uniform_(Buffer(jnp.zeros(shape))).value)


def _without_lowest(values: np.ndarray, number: int, mask: jax.Array | np.ndarray) -> Any:
    """Return a mask without the positions of the lowest values."""
    lowest = np.argsort(values.reshape(-1), kind="stable")[:number]  # NaN counts as the highest
    flat = np.array(mask).reshape(-1)
    flat[lowest] = 0
    return jnp.asarray(flat.reshape(mask.shape))


class RandomUnstructured(_ByAmount):
    """Prune elements at random.

    Args:
        amount: which share (float) or how many (int).

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative, or more than there is.

    Source: ``torch.nn.utils.prune.RandomUnstructured``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> layer = nn.Linear(4, 4)
        >>> _ = prune.RandomUnstructured.apply(layer, "weight", amount=0.25)
        >>> int(layer.weight_mask.sum())
        12
    """

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: jax.Array, default_mask: jax.Array) -> jax.Array:
        number = self._number(t.size)
        return _without_lowest(_random(t.shape), number, default_mask) if number else default_mask

    @classmethod
    def apply(cls, module: Module, name: str, amount: float) -> BasePruningMethod:  # pyright: ignore
        return super().apply(module, name, amount=amount)


class L1Unstructured(_ByAmount):
    """Prune the elements nearest to zero.

    Args:
        amount: which share (float) or how many (int).

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative, or more than there is.

    Source: ``torch.nn.utils.prune.L1Unstructured``.

    Example:
        >>> import jax.numpy as jnp
        >>> from statefulnn.utils import prune
        >>> prune.L1Unstructured(amount=2).prune(jnp.array([3.0, -1.0, 2.0, 0.5])).tolist()
        [3.0, -0.0, 2.0, 0.0]
    """

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: jax.Array, default_mask: jax.Array) -> jax.Array:
        number = self._number(t.size)
        if not number:
            return default_mask
        return _without_lowest(np.abs(_wide(t)), number, default_mask)

    @classmethod
    def apply(  # pyright: ignore
        cls, module: Module, name: str, amount: float, importance_scores: ArrayLike | None = None
    ) -> BasePruningMethod:
        return super().apply(module, name, amount=amount, importance_scores=importance_scores)


def _wide(t: ArrayLike) -> np.ndarray:
    t = np.asarray(numbers_of(t, "pruned a parameter by its values"))
    return t.astype(np.float32) if t.dtype.itemsize == 2 else t


def _no_such_axis(t: jax.Array, dim: int) -> IndexError:
    return IndexError(
        explain(
            f"pruned channels along dim={dim}",
            f"Invalid index {dim} for tensor of size {tuple(t.shape)}",
            f"a dim from {-t.ndim} to {t.ndim - 1}",
        )
    )


class _Structured(_ByAmount):
    """A method that prunes channels along an axis."""

    PRUNING_TYPE = "structured"

    def __init__(self, amount: float, dim: int) -> None:
        super().__init__(amount)
        self.dim = dim

    def _number_of_channels(self, t: jax.Array) -> int:
        if t.ndim <= 1:
            raise ValueError(
                explain(
                    f"pruned channels of an array of shape {tuple(t.shape)}",
                    "Structured pruning can only be applied to multidimensional tensors. Found tensor "
                    f"with {t.ndim} dims",
                    "an unstructured method, such as prune.l1_unstructured",
                )
            )
        if not -t.ndim <= self.dim < t.ndim:
            raise _no_such_axis(t, self.dim)
        return self._number(t.shape[self.dim])

    def _without_channels(
        self, values: np.ndarray, number: int, t: jax.Array, mask: jax.Array
    ) -> Any:
        """Return a mask without the channels of the lowest values."""
        channels = _without_lowest(values, number, np.ones(values.shape))
        shape = [1] * t.ndim
        shape[self.dim] = -1
        return mask.astype(t.dtype) * channels.reshape(shape).astype(t.dtype)


class RandomStructured(_Structured):
    """Prune channels at random.

    Args:
        amount: which share (float) or how many (int).
        dim: the axis of the channels.

    Raises:
        TypeError: if the amount is no number.
        ValueError: if it is negative, or more than there is; for a tensor with less than two axes.
        IndexError: for a dim that the tensor does not have.

    Source: ``torch.nn.utils.prune.RandomStructured``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> layer = nn.Linear(4, 3)
        >>> _ = prune.RandomStructured.apply(layer, "weight", amount=1, dim=0)
        >>> sorted(layer.weight_mask.sum(1).tolist())
        [0.0, 4.0, 4.0]
    """

    def __init__(self, amount: float, dim: int = -1) -> None:
        super().__init__(amount, dim)

    def compute_mask(self, t: jax.Array, default_mask: jax.Array) -> jax.Array:
        number = self._number_of_channels(t)
        if not number:
            return default_mask
        return self._without_channels(_random((t.shape[self.dim],)), number, t, default_mask)

    @classmethod
    def apply(cls, module: Module, name: str, amount: float, dim: int = -1) -> BasePruningMethod:  # pyright: ignore
        return super().apply(module, name, amount=amount, dim=dim)


class LnStructured(_Structured):
    """Prune the channels with the smallest norms.

    Args:
        amount: which share (float) or how many (int).
        n: of the norm: a number, infinite ones too, ``"fro"`` or ``"nuc"``.
        dim: the axis of the channels.

    Raises:
        TypeError: if the amount is no number.
        ValueError: if it is negative, or more than there is; for a tensor with less than two axes.
        IndexError: for a dim that the tensor does not have.

    Source: ``torch.nn.utils.prune.LnStructured``.

    Example:
        >>> import jax.numpy as jnp
        >>> from statefulnn.utils import prune
        >>> t = jnp.array([[1.0, 5.0], [2.0, 1.0], [3.0, 3.0]])
        >>> prune.LnStructured(amount=1, n=2, dim=0).prune(t).tolist()
        [[1.0, 5.0], [0.0, 0.0], [3.0, 3.0]]
    """

    def __init__(self, amount: float, n: float | str, dim: int = -1) -> None:
        super().__init__(amount, dim)
        self.n = n

    def compute_mask(self, t: jax.Array, default_mask: jax.Array) -> jax.Array:
        number = self._number_of_channels(t)
        channels = np.moveaxis(_wide(t), self.dim, 0)
        if self.n == "nuc":
            norms = np.linalg.norm(channels, "nuc", axis=(1, 2))
        else:
            flat = channels.reshape(len(channels), -1)
            order: Any = 2 if self.n == "fro" else self.n
            norms = np.linalg.norm(flat, order, axis=1)
        if not number:
            return default_mask
        return self._without_channels(norms, number, t, default_mask)

    @classmethod
    def apply(  # pyright: ignore
        cls,
        module: Module,
        name: str,
        amount: float,
        n: float | str,
        dim: int,
        importance_scores: ArrayLike | None = None,
    ) -> BasePruningMethod:
        return super().apply(
            module, name, amount=amount, n=n, dim=dim, importance_scores=importance_scores
        )


class CustomFromMask(BasePruningMethod):
    """Prune by a given mask.

    Args:
        mask: an array of zeros and ones, of the tensor's shape.

    Raises:
        AssertionError: in `compute_mask`, for a mask of another shape.

    Source: ``torch.nn.utils.prune.CustomFromMask``.

    Example:
        >>> import jax.numpy as jnp
        >>> from statefulnn.utils import prune
        >>> prune.CustomFromMask(jnp.array([1, 0])).prune(jnp.array([3.0, 4.0])).tolist()
        [3.0, 0.0]
    """

    PRUNING_TYPE = "global"

    def __init__(self, mask: ArrayLike) -> None:
        self.mask = mask

    def compute_mask(self, t: jax.Array, default_mask: jax.Array) -> jax.Array:
        mask = jnp.asarray(unwrap(self.mask))
        if default_mask.shape != mask.shape:
            raise AssertionError(
                explain(
                    f"pruned an array of shape {default_mask.shape} by a mask of shape {mask.shape}",
                    f"default_mask shape {default_mask.shape} must match the mask's",
                    f"pass a mask of shape {default_mask.shape}",
                )
            )
        return default_mask * mask.astype(default_mask.dtype)

    @classmethod
    def apply(cls, module: Module, name: str, mask: ArrayLike) -> BasePruningMethod:  # pyright: ignore
        return super().apply(module, name, mask=mask)


def identity(module: Module, name: str) -> Module:
    """Give a parameter a mask of ones.

    Args:
        module: it is changed.
        name: of the parameter.

    Returns:
        The module.

    Source: ``torch.nn.utils.prune.identity``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> list(prune.identity(nn.Linear(2, 3), "bias").state_dict())
        ['weight', 'bias_orig', 'bias_mask']
    """
    Identity.apply(module, name)
    return module


def random_unstructured(module: Module, name: str, amount: float) -> Module:
    """Prune elements of a parameter at random.

    Args:
        module: it is changed.
        name: of the parameter.
        amount: which share (float) or how many (int) of those that are not pruned yet.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: as `RandomUnstructured`.

    Source: ``torch.nn.utils.prune.random_unstructured``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> layer = prune.random_unstructured(nn.Linear(2, 3), "weight", amount=1)
        >>> int((layer.weight_mask == 0).sum())
        1
    """
    RandomUnstructured.apply(module, name, amount)
    return module


def l1_unstructured(
    module: Module, name: str, amount: float, importance_scores: ArrayLike | None = None
) -> Module:
    """Prune the elements of a parameter that are nearest to zero.

    Args:
        module: it is changed.
        name: of the parameter.
        amount: which share (float) or how many (int) of those that are not pruned yet.
        importance_scores: an array of the parameter's shape to judge by; None for the parameter.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: as `L1Unstructured`.

    Source: ``torch.nn.utils.prune.l1_unstructured``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> list(prune.l1_unstructured(nn.Linear(2, 3), "weight", amount=0.2).state_dict())
        ['bias', 'weight_orig', 'weight_mask']
    """
    L1Unstructured.apply(module, name, amount=amount, importance_scores=importance_scores)
    return module


def random_structured(module: Module, name: str, amount: float, dim: int) -> Module:
    """Prune channels of a parameter at random.

    Args:
        module: it is changed.
        name: of the parameter.
        amount: which share (float) or how many (int) of those that are not pruned yet.
        dim: the axis of the channels.

    Returns:
        The module.

    Raises:
        TypeError, ValueError, IndexError: as `RandomStructured`.

    Source: ``torch.nn.utils.prune.random_structured``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> layer = prune.random_structured(nn.Linear(5, 3), "weight", amount=3, dim=1)
        >>> int((layer.weight_mask.sum(0) == 0).sum())
        3
    """
    RandomStructured.apply(module, name, amount, dim)
    return module


def ln_structured(
    module: Module,
    name: str,
    amount: float,
    n: float | str,
    dim: int,
    importance_scores: ArrayLike | None = None,
) -> Module:
    """Prune the channels of a parameter that have the smallest norms.

    Args:
        module: it is changed.
        name: of the parameter.
        amount: which share (float) or how many (int) of those that are not pruned yet.
        n: of the norm: a number, infinite ones too, ``"fro"`` or ``"nuc"``.
        dim: the axis of the channels.
        importance_scores: an array of the parameter's shape to judge by; None for the parameter.

    Returns:
        The module.

    Raises:
        TypeError, ValueError, IndexError: as `LnStructured`.

    Source: ``torch.nn.utils.prune.ln_structured``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> layer = nn.Conv2d(5, 3, 2)
        >>> layer = prune.ln_structured(layer, "weight", amount=0.4, n=float("-inf"), dim=1)
        >>> int(layer.weight_mask[0, :, 0, 0].sum())
        3
    """
    LnStructured.apply(module, name, amount, n, dim, importance_scores=importance_scores)
    return module


def global_unstructured(
    parameters: Iterable[tuple[Module, str]],
    pruning_method: type[BasePruningMethod],
    importance_scores: dict | None = None,
    **kwargs: Any,
) -> None:
    """Prune several parameters as if they were one.

    Args:
        parameters: pairs of a module and the name of its parameter; the modules are changed.
        pruning_method: a class of methods with ``PRUNING_TYPE = "unstructured"``.
        importance_scores: a dict of such pairs -> arrays to judge by; None for the parameters.
        kwargs: for the method's constructor, such as ``amount``.

    Raises:
        TypeError: for a method that is not unstructured, and arguments of another type.

    Source: ``torch.nn.utils.prune.global_unstructured``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> net = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 1))
        >>> prune.global_unstructured(
        ...     [(net[0], "weight"), (net[1], "weight")], prune.L1Unstructured, amount=10
        ... )
        >>> sum(int((mask == 0).sum()) for mask in net.buffers())
        10
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(
            explain(
                f"global_unstructured was given parameters of type {type(parameters).__name__}",
                "global_unstructured(): parameters is not an Iterable",
                'pass pairs: [(layer, "weight"), ...]',
            )
        )
    if importance_scores is not None and not isinstance(importance_scores, dict):
        raise TypeError(
            explain(
                "global_unstructured was given importance_scores of type "
                f"{type(importance_scores).__name__}",
                "global_unstructured(): importance_scores must be of type dict",
                'pass {(layer, "weight"): array, ...}',
            )
        )
    pairs = list(parameters)
    method = pruning_method(**kwargs)
    if method.PRUNING_TYPE != "unstructured":
        raise TypeError(
            explain(
                f"global_unstructured by {pruning_method.__name__}",
                'Only "unstructured" PRUNING_TYPE supported for the `pruning_method`. Found type '
                f"{method.PRUNING_TYPE}",
                "prune.L1Unstructured or prune.RandomUnstructured",
            )
        )
    values = [
        numbers_of(getattr(module, name), f"pruned {name!r} of {type(module).__name__}")
        for module, name in pairs
    ]
    scores = importance_scores or {}
    together = parameters_to_vector(
        scores.get(pair, value) for pair, value in zip(pairs, values, strict=True)
    )
    masks = [
        getattr(module, f"{name}_mask") if pruned(module, name) else jnp.ones(v.shape, v.dtype)
        for (module, name), v in zip(pairs, values, strict=True)
    ]
    mask = _combined(method, together, parameters_to_vector(masks))
    start = 0
    for (module, name), value in zip(pairs, values, strict=True):
        part = mask[start : start + value.size].reshape(value.shape)
        custom_from_mask(module, name, mask=part)
        start += value.size


def custom_from_mask(module: Module, name: str, mask: ArrayLike) -> Module:
    """Prune a parameter by a given mask.

    Args:
        module: it is changed.
        name: of the parameter.
        mask: an array of zeros and ones, of the parameter's shape.

    Returns:
        The module.

    Raises:
        AssertionError: for a mask of another shape.

    Source: ``torch.nn.utils.prune.custom_from_mask``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> layer = prune.custom_from_mask(nn.Linear(5, 3), "bias", mask=jnp.array([0, 1, 0]))
        >>> layer.bias_mask.tolist()
        [0.0, 1.0, 0.0]
    """
    CustomFromMask.apply(module, name, mask)
    return module


def remove(module: Module, name: str) -> Module:
    """Make a pruned tensor a parameter again, which has its zeros but may change them.

    Args:
        module: it is changed.
        name: of the parameter.

    Returns:
        The module.

    Raises:
        ValueError: if it is not pruned.

    Source: ``torch.nn.utils.prune.remove``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> layer = prune.random_unstructured(nn.Linear(5, 7), "weight", amount=0.2)
        >>> list(prune.remove(layer, "weight").state_dict())
        ['bias', 'weight']
    """
    _remove(module, name)
    return module


def _remove(module: Module, name: str) -> None:
    applied = pruned(module, name)
    if applied is None:
        raise ValueError(
            explain(
                f"prune.remove(module, {name!r})",
                f"Parameter '{name}' of module {type(module).__name__} has to be pruned before pruning "
                "can be removed",
                "ask prune.is_pruned(module) first",
            )
        )
    weight = applied.read(module)
    original: Parameter = module._parameters[f"{name}_orig"]
    module._check_static_write(name, None)
    original.data = weight
    left = {k: v for k, v in methods(module).items() if k != name}
    if HISTORY in module.__dict__:
        delattr(module, HISTORY)
    remove_computation(module, applied)
    if left:
        setattr(module, HISTORY, left)
    del module._parameters[f"{name}_orig"]
    delattr(module, f"{name}_mask")
    module.register_parameter(name, original)


def is_pruned(module: Module) -> bool:
    """Say whether a parameter of a module, or of one below, is pruned.

    Args:
        module: a module.

    Source: ``torch.nn.utils.prune.is_pruned``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import prune
        >>> prune.is_pruned(prune.identity(nn.Linear(5, 7), "weight"))
        True
    """
    return any(any_pruned(m) for m in module.modules())
