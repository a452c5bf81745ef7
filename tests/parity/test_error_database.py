"""Every error input of torch's own test database: ours raises the same class, with reason and remedy.

torch.testing._internal holds, for its modules and functions, inputs that must fail. They are run here on
both libraries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside torch's test code
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db


def to_jax(value: Any) -> Any:
    """Return tensors as arrays, torch's dtypes and functions as ours, inside containers too."""
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return nn.utils.rnn.PackedSequence(*(to_jax(v) for v in value))
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu()
        if array.dtype == torch.bfloat16:
            return jnp.asarray(array.float().numpy(), jnp.bfloat16)
        if array.dtype == torch.float64 and not jax.config.jax_enable_x64:
            array = array.half()  # another dtype than the module's, which is the point
        array = array.numpy()
        return jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))
    if isinstance(value, torch.dtype):
        return jnp.dtype(str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return None
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_jax, value))
    if isinstance(value, dict):
        return {k: to_jax(v) for k, v in value.items()}
    if isinstance(value, torch.nn.LinearCrossEntropyOptions):
        return nn.LinearCrossEntropyOptions(**vars(value))
    if isinstance(value, torch.nn.PairwiseDistance):
        return nn.PairwiseDistance()
    return value


def module_cases() -> Iterator[Any]:
    """Yield (name, whether the constructor fails, constructor arguments, call arguments, class)."""
    for info in module_db:
        if info.module_error_inputs_func is None or not info.name.startswith("nn."):
            continue
        inputs = info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
        for i, case in enumerate(inputs):
            given = case.module_error_input
            in_constructor = case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR
            name = info.name.removeprefix("nn.")
            yield pytest.param(
                name,
                in_constructor,
                given.constructor_input,
                given.forward_input,
                case.error_type,
                id=f"{name}-{i}",
            )


def function_cases() -> Iterator[Any]:
    """Yield (name, sample, class)."""
    seen: dict[str, int] = {}
    for op in op_db:
        if not op.name.startswith("nn.functional.") or op.error_inputs_func is None:
            continue
        name = op.name.removeprefix("nn.functional.")
        # Which test asks, torch looks up in the whole stack, anew for each input and reading every file.
        with mock.patch("inspect.stack", list):
            cases = list(op.error_inputs("cpu"))
        for case in cases:
            seen[name] = number = seen.get(name, -1) + 1
            yield pytest.param(name, case.sample_input, case.error_type, id=f"{name}-{number}")


MODULES, FUNCTIONS = list(module_cases()), list(function_cases())


def _wanted(error_type: Any) -> type[BaseException]:
    classes = error_type if isinstance(error_type, tuple) else (error_type,)
    known = (IndexError, ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError)
    return next((k for k in known if any(issubclass(c, k) for c in classes)), Exception)


def _raises(call: Callable[[], Any], error_type: Any) -> None:
    with pytest.raises(Exception) as raised:
        call()
    wanted = _wanted(error_type)
    assert isinstance(raised.value, wanted), f"{type(raised.value)}: {raised.value}"
    assert "Why: " in str(raised.value), raised.value
    assert "Instead: " in str(raised.value), raised.value


@pytest.mark.filterwarnings("ignore")  # what torch warns of before it raises is not the subject
@pytest.mark.parametrize(
    ("name", "in_constructor", "constructor", "forward", "error_type"), MODULES
)
def test_layer_raises_where_torchs_does(
    name: str, in_constructor: bool, constructor: Any, forward: Any, error_type: Any
) -> None:
    kwargs = {k: v for k, v in to_jax(constructor.kwargs).items() if k not in ("device", "dtype")}
    build = lambda: getattr(nn, name)(*to_jax(constructor.args), **kwargs)
    if in_constructor:
        _raises(build, error_type)
        return
    layer = build()
    before = {k: np.asarray(v) for k, v in layer.state_dict().items()}
    _raises(lambda: layer(*to_jax(forward.args), **to_jax(forward.kwargs)), error_type)
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "sample", "error_type"), FUNCTIONS)
def test_function_raises_where_torchs_does(name: str, sample: Any, error_type: Any) -> None:
    args, kwargs = to_jax((sample.input, *sample.args)), to_jax(sample.kwargs)
    _raises(lambda: getattr(F, name)(*args, **kwargs), error_type)


def test_the_database_is_as_large_as_it_was() -> None:
    assert len(MODULES) >= 90
    assert len(FUNCTIONS) >= 170
