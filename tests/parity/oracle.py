"""The means of comparison: one case, run on torch and on statefulnn, in every mode.

A case names a layer and gives its arguments and inputs. `compare` builds the layer in both libraries,
loads torch's state dict into ours, and compares outputs, buffers afterwards, and gradients with
respect to parameters and inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import statefulnn as nn
from tests.precision import in_float64
from tests.quick import QUICKLY

TOLERANCE = {"float32": 2e-5, "float64": 1e-10, "bfloat16": 3e-2, "float16": 4e-3}


def array(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Draw a standard normal array."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def integers(high: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Draw integers below `high`."""
    return np.random.default_rng((seed, high, *shape)).integers(0, high, shape)


@dataclass(eq=False)
class Case:
    """A layer, its constructor's arguments, and what it is called with.

    Numpy arrays among `inputs` and `call` become arrays of the library, also inside tuples. Floating
    `inputs` are differentiated. The first case of a layer that is not empty is also compared in
    float64, in low precision, in its second derivatives and under vmap, unless a reason is given why
    that cannot be.
    """

    layer: str
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: tuple = ()
    call: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    tolerance: float = 1.0  # a factor
    modes: bool = False  # whether training and evaluation differ
    no_low: str = ""  # why there is no comparison in bfloat16 and float16
    no_second: str = ""  # why there are no second derivatives
    no_vmap: str = ""  # why it is not compared under vmap

    def __str__(self) -> str:
        shown = [_short(a) for a in self.args] + [
            f"{k}={'array' if isinstance(v, np.ndarray) else _short(v)}"
            for k, v in self.kwargs.items()
        ]
        return f"{self.layer}({', '.join(shown)}){' ' + self.note if self.note else ''}"


@dataclass(eq=False)
class Call:
    """A function of F and its arguments; numpy arrays become arrays of the library.

    Values are compared in eager code, values and gradients of all floating `args` under `jax.jit`.
    """

    name: str
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    tolerance: float = 1.0  # a factor
    no_grad: str = ""  # why gradients are not compared
    many: str = ""  # why it is more than one compiled call in eager code

    def __str__(self) -> str:
        shown = [_short(a) for a in self.args] + [
            f"{k}={_short(v)}" for k, v in self.kwargs.items()
        ]
        return f"{self.name}({', '.join(shown)}){' ' + self.note if self.note else ''}"


def _short(value: Any) -> str:
    """Return a text that is the same in every process: no addresses."""
    if isinstance(value, np.ndarray):
        return "x".join(map(str, value.shape)) or "()"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return str(value)


def to_torch(value: Any, dtype: str = "float32") -> Any:
    """Return numpy arrays as tensors, floating ones of the dtype."""
    if isinstance(value, (tuple, list)):
        return type(value)(to_torch(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: to_torch(v, dtype) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        tensor = torch.as_tensor(value.copy())
        return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
    return value


def to_jax(value: Any, dtype: str = "float32") -> Any:
    """Return numpy arrays as JAX arrays, floating ones of the dtype."""
    if isinstance(value, (tuple, list)):
        return type(value)(to_jax(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: to_jax(v, dtype) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        if np.issubdtype(value.dtype, np.floating):
            return jnp.asarray(value, dtype)
        return jnp.asarray(value, jax.dtypes.canonicalize_dtype(value.dtype))
    return value


def to_numpy(value: Any) -> np.ndarray:
    """Return a tensor or array as numpy, low precision as float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().clone()  # torch goes on writing into its own
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    value = jnp.asarray(value)
    return np.asarray(value.astype(jnp.float32) if value.dtype.itemsize == 2 else value)


def flat(out: Any) -> list[Any]:
    """Return an output's arrays."""
    if isinstance(out, (tuple, list)):
        return [x for part in out for x in flat(part)]
    return [] if out is None else [out]


def is_float(x: Any) -> bool:
    """Say whether an array or tensor is floating."""
    if isinstance(x, torch.Tensor):
        return x.is_floating_point()
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)


def close(ours: Any, theirs: Any, what: str, tolerance: float) -> None:
    """Assert equal shapes and nearly equal values, relative to the largest of them."""
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    assert ours.shape == theirs.shape, what
    finite = np.abs(theirs[np.isfinite(theirs)]) if theirs.dtype.kind == "f" else np.abs(theirs)
    scale = max(1.0, float(finite.max(initial=0)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale, err_msg=what)


def pair(case: Case, dtype: str = "float32") -> tuple[torch.nn.Module, nn.Module]:
    """Build the layer in both libraries, ours with torch's values."""
    torch.manual_seed(0)
    kwargs = {k: to_torch(v, dtype) for k, v in case.kwargs.items()}
    theirs = getattr(torch.nn, case.layer)(*case.args, **kwargs).to(getattr(torch, dtype))
    kwargs = {k: to_jax(v, dtype) for k, v in case.kwargs.items()}
    ours = getattr(nn, case.layer)(*case.args, **kwargs)
    if dtype != "float32" or any(p.dtype != jnp.float32 for p in ours.parameters()):
        ours.to(jnp.dtype(dtype))
    load(ours, theirs)
    return theirs, ours


def load(ours: nn.Module, theirs: torch.nn.Module) -> None:
    """Load a torch module's state dict, as numpy arrays, key for key."""
    state = {k: to_numpy(v) for k, v in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        assert value.shape == state[name].shape, name
    state = {
        k: v.astype(ours.state_dict()[k].dtype) if v.dtype.kind == "f" else v
        for k, v in state.items()
    }
    ours.load_state_dict(state)


def compare(
    case: Case, training: bool, jitted: bool, dtype: str = "float32", gradients: bool = True
) -> None:
    """Compare one call and its gradients in both libraries."""
    tolerance = TOLERANCE[dtype] * case.tolerance
    theirs, ours = pair(case, dtype)
    theirs.train(training)
    ours.train(training)

    tensors = [to_torch(x, dtype) for x in case.inputs]
    for t in tensors:
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_(True)
    # Clones, because inplace=True may not write to a leaf.
    given = [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]
    expected = theirs(*given, **{k: to_torch(v, dtype) for k, v in case.call.items()})
    # A fixed cotangent for each output, so that no part of the derivative can cancel.
    cotangents = [
        array(*out.shape, seed=100 + i).astype("float64") for i, out in enumerate(flat(expected))
    ]
    loss = sum(
        (out * torch.as_tensor(c).to(out.dtype)).sum()
        for out, c in zip(flat(expected), cotangents, strict=True)
        if is_float(out)
    )
    differentiable = gradients and isinstance(loss, torch.Tensor) and loss.requires_grad
    if differentiable:
        loss.backward()

    call = {k: to_jax(v, dtype) for k, v in case.call.items()}
    arrays = [to_jax(x, dtype) for x in case.inputs]

    def loss_of(model: nn.Module, *inputs: Any) -> tuple[Any, Any]:
        out = model(*inputs, **call)
        terms = [
            (o * jnp.asarray(c, o.dtype)).sum()
            for o, c in zip(flat(out), cotangents, strict=True)
            if is_float(o)
        ]
        return sum(terms[1:], terms[0]), out

    chosen = [i for i, x in enumerate(arrays) if isinstance(x, jax.Array) and is_float(x)]
    has_parameters = any(p.requires_grad for p in ours.parameters())
    numbers = ((0,) if has_parameters else ()) + tuple(i + 1 for i in chosen)
    if differentiable:
        assert numbers, "nothing to differentiate"
        step = nn.value_and_grad(loss_of, argnums=numbers, has_aux=True)
        step = nn.jit(step, compiler_options=QUICKLY) if jitted else step
        (_, out), grads = step(ours, *arrays)
    else:
        forward = lambda model, *inputs: model(*inputs, **call)
        forward = nn.jit(forward, compiler_options=QUICKLY) if jitted else forward
        out, grads = forward(ours, *arrays), ()

    assert len(flat(out)) == len(flat(expected))
    for i, (a, b) in enumerate(zip(flat(out), flat(expected), strict=True)):
        if is_float(b):
            assert str(a.dtype) == str(b.dtype).removeprefix("torch."), f"dtype of output {i}"
        close(a, b, f"output {i}", tolerance)
    compare_buffers(ours, theirs, tolerance)
    if not differentiable:
        return
    by_number = dict(zip(numbers, grads, strict=True))
    for name, parameter in theirs.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(by_number[0][name], wanted, f"gradient of {name}", 4 * tolerance)
    for i in chosen:
        wanted = tensors[i].grad
        wanted = torch.zeros_like(tensors[i]) if wanted is None else wanted
        close(by_number[i + 1], wanted, f"gradient of input {i}", 4 * tolerance)


def compare_buffers(ours: nn.Module, theirs: torch.nn.Module, tolerance: float) -> None:
    """Compare all buffers by name."""
    wanted = dict(theirs.named_buffers())
    got = dict(ours.named_buffers())
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        close(got[name], value, f"buffer {name}", tolerance)


@contextlib.contextmanager
def sixty_four_bits() -> Iterator[None]:
    """Enable 64-bit types inside."""
    with in_float64():
        yield


def same_class(ours: Exception, theirs: Exception) -> None:
    """Assert that our error is of the builtin class of torch's, and says why and what to do instead."""
    classes = (AssertionError, IndexError, ValueError, TypeError, RuntimeError)
    wanted = next((c for c in classes if isinstance(theirs, c)), Exception)
    assert isinstance(ours, wanted), f"{type(ours).__name__} for {type(theirs).__name__}: {theirs}"
    assert "Why: " in str(ours), ours
    assert "Instead: " in str(ours), ours
