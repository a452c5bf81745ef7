"""The empirical neural tangent kernel, by three methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.module import Module
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._blocks import length, map_blocks
from statefulnn.curvature._contractions import contract
from statefulnn.curvature._layers import layer_factors, structured_layers
from statefulnn.curvature._models import (
    Model,
    at_least_one,
    check_batch_size,
    check_choice,
    checked_output,
    inputs_of,
    number_of_examples,
    one_output,
    pure,
    wide,
)
from statefulnn.transforms.types import PyTree

_FUNCTION = "empirical_ntk"
METHODS = ("auto", "jacobian", "products", "layers")
OUTPUTS = ("full", "diagonal", "trace")


@shortened
def empirical_ntk(
    model: Model,
    x1: object,
    x2: object = None,
    *,
    outputs: str = "full",
    method: str = "auto",
    batch_size: int | None = None,
) -> jax.Array:
    """Return the empirical neural tangent kernel, ``Θ(x1, x2) = J(x1) J(x2)ᵀ``.

    J is the Jacobian of the outputs of one example with respect to all parameters. The methods give
    the same kernel. With N examples each side, C outputs, P parameters, F operations of a forward of
    one example, in multiplications and numbers in memory:

    =============  ========================================  =====================================
    method         time                                      memory
    =============  ========================================  =====================================
    ``jacobian``   ``N C F + N² C² P``                       ``N C P``: both Jacobians
    ``products``   ``N² C F``                                ``C P``, and activations of N C examples
    ``layers``     ``N C F``, and per layer the cheaper of   inputs and cotangents of the layers;
                   ``N² C² P_l`` and                         ``N C P_l`` for one layer, or
                   ``N² T² (in + C² out)``                   ``N² C² T²``
    =============  ========================================  =====================================

    ``jacobian`` contracts Jacobians of single examples. ``products`` multiplies the kernel with unit
    vectors, a vector-Jacobian product for x2 and a Jacobian-vector product for x1. ``layers`` needs a
    Module: in a Linear or convolution with T positions (T = 1 for vectors) the gradient of the
    weight is a sum of T outer products of a cotangent and an input, and so the kernel is a product of
    two small ones; the Jacobian of such a weight is formed only where that is cheaper, and by a matrix
    product. Other parameters, and weights that are tied, computed or also used elsewhere, are handled
    as by ``jacobian``.

    ``auto`` takes ``layers`` for a Module and ``jacobian`` for a function. Measured on a CPU
    (``benchmarks/ntk.py``, time over that of ``jacobian``): ``layers`` 0.7 for the CNN of torch's tutorial
    and 0.01 to 0.02 for dense networks; ``products`` 10 for the CNN, and 0.4, 0.1 and 0.07 for dense
    networks of 1, 10 and 100 outputs. It is for functions with F below about 2 C P, and where Jacobians
    do not fit into memory; a pair of `functionalize` is such a function, ``(module, params)`` is not.

    Under no transformation each call compiles anew; `nn.jit` or `jax.jit` around it compile once.

    Args:
        model: a Module, ``(fn, params)`` as `functionalize` returns it, or ``(module, params)``, where
            `params` may be some of the parameters: the kernel is that of those.
        x1: inputs ``(N1, ...)``, or a tuple of arrays for a model of several inputs.
        x2: inputs ``(N2, ...)``; None means `x1`.
        outputs: "full" for all pairs of outputs, "diagonal" for pairs of the same output, "trace" for
            the sum of the diagonal.
        method: "auto", "jacobian", "products" or "layers".
        batch_size: examples of each side that are worked on at once; None for all.

    Returns:
        ``(N1, N2, C, C)``, ``(N1, N2, C)`` or ``(N1, N2)``. A model without an axis of outputs has no
        C; one with several has them all. Models in half precision give float32.

    Raises:
        ShapeError: if the data have no examples, or the model's output is no array of them.
        DtypeError: if parameters or outputs are no real floating arrays.
        ValueError: for an unknown method or kind of outputs, or a bad batch size.
        TypeError: for ``method="layers"`` without a Module.
        StateWriteError: if the model writes state, as BatchNorm does in training mode.
        MissingRngError: if the model draws random numbers: use ``module.eval()``, or fix the key,
            ``(functools.partial(fn, rng=key), params)``.

    The model sees each example in a batch of its own; a layer that mixes the examples of a batch is
    therefore not mixing here.

    Source: Jacot, Gabriel, Hongler 2018, https://arxiv.org/abs/1806.07572. The methods: Novak,
    Sohl-Dickstein, Schoenholz 2022, "Fast Finite Width Neural Tangent Kernel",
    https://arxiv.org/abs/2206.08720.

    Example:
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> kernel = nn.curvature.empirical_ntk(nn.Linear(2, 1), x)  # x · x' + 1
        >>> kernel[..., 0, 0].tolist()
        [[6.0, 12.0], [12.0, 26.0]]
        >>> fn, params = nn.functionalize(nn.Linear(2, 3))
        >>> compiled = jax.jit(lambda p, x: nn.curvature.empirical_ntk((fn, p), x, outputs="trace"))
        >>> compiled(params, x).tolist()
        [[18.0, 36.0], [36.0, 78.0]]
    """
    check_choice(method, METHODS, "method", _FUNCTION)
    check_choice(outputs, OUTPUTS, "outputs", _FUNCTION)
    check_batch_size(batch_size, _FUNCTION)
    module, params = _module_of(model)
    if method == "layers" and module is None:
        raise TypeError(
            explain(
                'empirical_ntk(method="layers") was given a function',
                "it looks at the layers of a module, which a function does not show",
                "pass a Module or (module, params), or choose another method",
            )
        )
    fn, params = pure(model, _FUNCTION)
    first = jax.tree.map(jnp.asarray, inputs_of(x1))
    second = first if x2 is None else jax.tree.map(jnp.asarray, inputs_of(x2))
    for side in (first, second):
        at_least_one(number_of_examples(side, _FUNCTION), _FUNCTION)
    _check_alike(first, second)
    single = one_output(fn, _FUNCTION)
    shape = _output_shape(fn, params, first)

    if method == "auto":
        method = "jacobian" if module is None else "layers"
    layers = None
    if method == "layers" and module is not None:
        layers = structured_layers(module, params, jax.tree.map(lambda a: a[0], first))
    block_size = batch_size or max(length(first), length(second))
    pairs = (min(block_size, length(first)), min(block_size, length(second)))

    @jax.jit
    def compute(params: PyTree, first: tuple, other: tuple | None) -> Any:
        if method == "products":
            side = first if other is None else other
            products = lambda block: _by_products(single, params, block, side, outputs)
            return map_blocks(products, first, batch_size)

        def factors(block: tuple) -> Any:
            if layers is None:
                return _jacobians(single, params, block)
            return layer_factors(layers, params, block, pairs, outputs, _FUNCTION)

        return _by_factors(factors, outputs, first, other, batch_size)

    kernel = compute(params, first, None if x2 is None else second)
    tail = {"full": (*shape, *shape), "diagonal": shape, "trace": ()}[outputs]
    return kernel.reshape(length(first), length(second), *tail)


def _module_of(model: Model) -> tuple[Module | None, Any]:
    if isinstance(model, Module):
        return model, None
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], Module):
        return model
    return None, None


def _check_alike(first: tuple, second: tuple) -> None:
    shapes = [[a.shape[1:] for a in jax.tree.leaves(side)] for side in (first, second)]
    if shapes[0] != shapes[1]:
        raise ShapeError(
            explain(
                f"empirical_ntk was given examples of shapes {shapes[0]} and {shapes[1]}",
                "the kernel is of pairs of examples of one kind",
                "pass x1 (N1, ...) and x2 (N2, ...) that agree beyond the first axis",
            )
        )


def _output_shape(fn: Callable, params: PyTree, inputs: tuple) -> tuple[int, ...]:
    def batch_of_one(params: PyTree, inputs: tuple) -> Any:
        return fn(params, *jax.tree.map(lambda a: a[:1], inputs))

    return checked_output(jax.eval_shape(batch_of_one, params, inputs), _FUNCTION).shape[1:]


def _by_factors(
    factors: Callable, outputs: str, first: tuple, second: tuple | None, size: int | None
) -> Any:
    """Return the kernel (N1, N2, ...) from factors of the examples of each side."""
    other = first if second is None else second
    if size is None or size >= max(length(first), length(other)):
        a = factors(first)
        return contract(a, a if second is None else factors(second), outputs)

    def rows(block: tuple) -> Any:
        a = factors(block)

        def columns(block: tuple) -> Any:
            return jnp.swapaxes(contract(a, factors(block), outputs), 0, 1)

        return jnp.swapaxes(map_blocks(columns, other, size), 0, 1)

    return map_blocks(rows, first, size)


def _jacobians(single: Callable, params: PyTree, inputs: tuple) -> list[tuple[Any]]:
    """Return the Jacobian of every parameter, each (N, C, size)."""
    jacobians = jax.vmap(jax.jacrev(single), in_axes=(None, 0))(params, inputs)
    return [(j.reshape(*j.shape[:2], -1),) for j in jax.tree.leaves(jacobians)]


def _by_products(
    single: Callable, params: PyTree, first: tuple, second: tuple, outputs: str
) -> Any:
    """Return the kernel from products with unit vectors, one example of the second side at a time."""
    values, push = jax.linearize(
        lambda p: jax.vmap(single, in_axes=(None, 0))(p, first), params
    )  # (N1, C)
    units = jnp.eye(values.shape[1], dtype=values.dtype)

    def column(inputs: tuple) -> Any:
        pull = jax.vjp(lambda p: single(p, inputs), params)[1]
        products = jax.vmap(lambda unit: push(pull(unit)[0]))(units)  # (C of x2, N1, C of x1)
        products = products.astype(wide(products.dtype))
        if outputs == "full":
            return products.transpose(1, 2, 0)
        diagonal = jnp.diagonal(products, axis1=0, axis2=2)  # (N1, C)
        return diagonal if outputs == "diagonal" else diagonal.sum(-1)

    return jnp.swapaxes(jax.lax.map(column, second), 0, 1)
