"""Programs of JAX as ONNX: without calls first, so that each primitive can be tried, and named, alone."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version as version_of
from typing import Any

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal

from statefulnn.core.errors import CheckpointError
from statefulnn.core.extras import import_extra
from statefulnn.io._export_programs import first_line, refused

# Calls of a program within the program, and under which name they have it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_CONTROL = ("scan", "while", "cond")


def inlined(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return the program without calls, and without what jax2onnx lacks and others of its operators do."""

    def run(*args: Any) -> list[Any]:
        return _run(program.jaxpr, program.consts, args)

    return jax.make_jaxpr(run)(*program.in_avals)


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variables: Sequence[Any]) -> list[Any]:
        return [v.val if isinstance(v, Literal) else known[v] for v in variables]

    for eqn in jaxpr.eqns:
        where = str(eqn.source_info.name_stack)  # of modules; what is called has the rest of it
        with jax.named_scope(where) if where else contextlib.nullcontext():
            out = _evaluated(eqn.primitive, read(eqn.invars), eqn.params)
        known.update(zip(eqn.outvars, out, strict=True))
    return read(jaxpr.outvars)


def _evaluated(primitive: Any, values: list[Any], params: dict[str, Any]) -> list[Any]:
    name = primitive.name
    if name in _CALLS:
        inner = params[_CALLS[name]]
        closed = isinstance(inner, ClosedJaxpr)
        return _run(inner.jaxpr if closed else inner, inner.consts if closed else (), values)
    if name == "pad" and not any(inside for *_, inside in params["padding_config"]):
        if any(map(jax.export.is_symbolic_dim, values[0].shape)):
            return [_padded(values[0], values[1], params["padding_config"])]
    if name == "dot_general" and not params["dimension_numbers"][0][0]:
        return [_outer(values[0], values[1], params)]
    if name in _CONTROL:
        params = {key: _inlined_within(value) for key, value in params.items()}
    if name == "scan" and params["reverse"]:
        return _reversed_scan(primitive, values, params)
    out = primitive.bind(*values, **params)
    return list(out) if primitive.multiple_results else [out]


def _inlined_within(param: object) -> Any:
    if isinstance(param, tuple):
        return tuple(map(_inlined_within, param))
    return inlined(param) if isinstance(param, ClosedJaxpr) else param


def _padded(x: Any, value: Any, config: Sequence[tuple[int, int, int]]) -> Any:
    """Pad by concatenations: jax2onnx pads arrays of known shapes only."""
    for axis, (low, high, _) in enumerate(config):
        x = lax.slice_in_dim(x, max(-low, 0), x.shape[axis] - max(-high, 0), axis=axis)
        shape = [*x.shape]
        parts = []
        for size in (low, high):
            shape[axis] = max(size, 0)
            parts.append(lax.broadcast(value, tuple(shape)))
        if low > 0 or high > 0:
            x = lax.concatenate([parts[0], x, parts[1]], axis)
    return x


def _outer(a: Any, b: Any, params: dict[str, Any]) -> Any:
    """Multiply each entry with each: jax2onnx takes one letter for several axes of such a product."""
    _, batch = params["dimension_numbers"]
    own = [[i for i in range(x.ndim) if i not in at] for x, at in zip((a, b), batch, strict=True)]
    a = lax.transpose(a, (*batch[0], *own[0]))
    b = lax.transpose(b, (*batch[1], *own[1]))
    a = lax.expand_dims(a, range(a.ndim, a.ndim + len(own[1])))
    b = lax.expand_dims(b, range(len(batch[1]), len(batch[1]) + len(own[0])))
    dtype = params["preferred_element_type"] or a.dtype
    return lax.convert_element_type(a, dtype) * lax.convert_element_type(b, dtype)


def _reversed_scan(primitive: Any, values: list[Any], params: dict[str, Any]) -> list[Any]:
    """Run a scan from the end as one from the start, over what is turned round."""
    fixed, carried = params["num_consts"] + params["num_carry"], params["num_carry"]
    turned = [lax.rev(v, (0,)) for v in values[fixed:]]
    out = primitive.bind(*values[:fixed], *turned, **{**params, "reverse": False})
    return [*out[:carried], *(lax.rev(v, (0,)) for v in out[carried:])]


def converted(
    program: ClosedJaxpr, name: str, inputs: Sequence[str], outputs: Sequence[str]
) -> Any:
    """Return the ``onnx.ModelProto`` of a program, or raise an error that names primitives and modules."""
    onnx, _, _ = onnx_libraries()
    # An array has one name there: an output that is an input, or another output, is a copy of it.
    known = dict(zip(map(id, program.jaxpr.invars), inputs, strict=True))
    copies = {}
    own = []
    for i, variable in enumerate(program.jaxpr.outvars):
        source = known.setdefault(id(variable), outputs[i])
        if source == outputs[i]:
            own.append(i)
        else:
            copies[outputs[i]] = source
    run = jax.extend.core.jaxpr_as_fun(program)
    names = {"input_names": inputs, "output_names": [outputs[i] for i in own]}
    try:
        model = _onnx_of(lambda *given: [run(*given)[i] for i in own], program.in_avals, **names)
    except Exception as error:
        raise _unsupported(program, name, error) from error
    described = {v.name: v for v in [*model.graph.input, *model.graph.output]}
    for copy, source in copies.items():
        model.graph.node.append(onnx.helper.make_node("Identity", [source], [copy]))
        described[copy] = onnx.ValueInfoProto()
        described[copy].CopyFrom(described[source])
        described[copy].name = copy
    ordered = [onnx.ValueInfoProto.FromString(described[n].SerializeToString()) for n in outputs]
    del model.graph.output[:]
    model.graph.output.extend(ordered)
    return model


def check_numbers(
    content: bytes, inputs: dict[str, np.ndarray], wanted: Mapping[str, np.ndarray], name: str
) -> None:
    """Raise if onnxruntime computes something else than the module."""
    called = f"with format='onnx' of {name!r}"
    instead = "another way to compute it, found by exporting parts of the model; format='stablehlo'"
    try:
        found = dict(zip(wanted, _session(content).run(list(wanted), inputs), strict=True))
    except Exception as error:
        raise refused(called, f"onnxruntime fails: {first_line(error)}", instead) from error
    for output, want in wanted.items():
        got = found[output]
        exact = not jnp.issubdtype(want.dtype, jnp.inexact)
        tolerance = 0.0 if exact else max(1e-4, 8 * float(jnp.finfo(want.dtype).eps))
        size = np.abs(want[np.isfinite(want)]).max(initial=0.0)
        if got.shape != want.shape or not np.allclose(
            got, want, rtol=10 * tolerance, atol=tolerance * float(size), equal_nan=not exact
        ):
            why = f"what jax2onnx makes of it computes another {output!r} in onnxruntime"
            raise refused(called, why, instead)


def _session(content: bytes) -> Any:
    _, _, onnxruntime = onnx_libraries()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def onnx_libraries() -> tuple[Any, Any, Any]:
    """Return the modules ``onnx``, ``jax2onnx`` and ``onnxruntime``."""
    needs = {
        "onnx": "writes the file",
        "jax2onnx": "knows the operators of ONNX for primitives of JAX",
        "onnxruntime": "runs what was written",
    }
    did = "called nn.export with format='onnx'"
    with _left_alone():
        onnx, jax2onnx, onnxruntime = (
            import_extra(library, '"statefulnn[onnx]"', did, what)
            for library, what in needs.items()
        )
    return onnx, jax2onnx, onnxruntime


def _onnx_of(f: Callable, specs: Sequence[Any], **settings: Any) -> Any:
    onnx, jax2onnx, _ = onnx_libraries()
    double = bool(jax.config.read("jax_enable_x64"))
    with _silent("onnx_ir"), _left_alone():
        model = jax2onnx.to_onnx(f, list(specs), enable_double_precision=double, **settings)
    onnx.checker.check_model(model)
    _session(model.SerializeToString())
    return model


@contextlib.contextmanager
def _left_alone() -> Iterator[None]:
    """Take functions out of JAX that jax2onnx leaves there, such as a cumsum for its own traces."""
    modules = [m for name, m in list(sys.modules.items()) if name.split(".")[0] == "jax"]
    public = [m for m in modules if m is not None and "._" not in m.__name__]
    before = [(module, dict(vars(module))) for module in public]
    try:
        yield
    finally:
        for module, members in before:
            for name, member in members.items():
                if callable(member) and vars(module).get(name) is not member:
                    setattr(module, name, member)


@contextlib.contextmanager
def _silent(library: str) -> Iterator[None]:
    """Leave out what a library logs of values without a type, which it leaves out of the file as well."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _unsupported(program: ClosedJaxpr, name: str, error: Exception) -> CheckpointError:
    """Try each primitive alone, and say which ones fail, where, and why."""
    places: dict[str, list[str]] = {}
    reasons: list[str] = []
    tried: dict[str, str | None] = {}
    # Where the names of dimensions come from, for equations that only use them.
    sized = [a for a in program.in_avals if any(map(jax.export.is_symbolic_dim, a.shape))]
    for eqn in program.eqns:
        case = f"{eqn.primitive} {[v.aval for v in eqn.invars]} {eqn.params}"
        reason = tried[case] = tried[case] if case in tried else _failure(eqn, sized)
        if reason is not None:
            where = str(eqn.source_info.name_stack) or "its forward"
            places.setdefault(eqn.primitive.name, []).append(where)
            reasons.append(reason)
    listed = ", ".join(f"{p!r} in {', '.join(dict.fromkeys(w))}" for p, w in places.items())
    version = version_of("jax2onnx")
    return refused(
        f"with format='onnx' of {name!r}" + (f", which uses {listed}" if places else ""),
        f"jax2onnx {version} has no ONNX for it: {[*reasons, first_line(error)][0]}",
        "another way to compute it; model.float(), or batch=None, which fixes all sizes, where those are "
        "the reason; format='stablehlo', which has all primitives",
    )


def _failure(eqn: Any, sized: Sequence[Any]) -> str | None:
    """Return what jax2onnx says of one equation that it does not convert."""

    def alone(*given: Any) -> Any:
        values = iter(given)
        inputs = [v.val if isinstance(v, Literal) else next(values) for v in eqn.invars]
        return eqn.primitive.bind(*inputs, **eqn.params)

    try:
        _onnx_of(alone, [*(v.aval for v in eqn.invars if not isinstance(v, Literal)), *sized])
    except Exception as error:
        return first_line(error)
    return None
