"""Running a torch model once under torch.export, and noting which module was called with what.

torch.export gives one flat graph of ATen operators. While it runs the model, each module's forward is
wrapped: entering and leaving it are *events*, and a node knows after which event it was made. So the graph
can be taken apart again into the forwards that it came from, with their arguments and outputs.

Terms
  Ref      a leaf of arguments or outputs: the tensor that a node of torch.export's graph stands for
  Number   a leaf: a size that is no fixed number, as an expression of sympy
  Call     one call of a module's forward
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from statefulnn.bridge.torch.attributes import (
    FORWARD_HOOKS,
    KEPT_HOOKS,
    Snapshot,
    has_forward_hooks,
    kept,
    tables_of_a_call,
)
from statefulnn.bridge.torch.errors import ConversionError, KeptTensorError
from statefulnn.bridge.torch.own_gradients import traced_backward
from statefulnn.bridge.torch.structures import (
    CONSTANTS,
    Leaf,
    NotPlain,
    Signature,
    leaves,
    map_leaves,
    rebuilt,
)
from statefulnn.core.errors import explain

# Where torch.export keeps, for its users, what belongs to a node.
CUSTOM, OURS = "custom", "statefulnn"
# Sizes, and what is computed with them.
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Ref(Leaf):
    """The tensor that a node of torch.export's graph stands for."""

    number: int


@dataclass(frozen=True)
class Number(Leaf):
    """A size that is no fixed number."""

    expression: Any


@dataclass
class Call:
    """One call of a module's forward.

    Attributes:
        path: of the module; None if it is not in the tree.
        args, kwargs: structures of `Ref`, `Number` and constants.
        bound: the same by the names of the parameters.
        output: the same for what was returned.
        problem: why arguments or outputs are no such structure.
        modes: the ``training`` flags that were looked at, by path.
        stopped: whether it was called under ``torch.no_grad``.
        opaque: whether only the shapes of what it returns were computed.
        hooked: whether hooks were a part of it.
    """

    path: str | None
    module: Any
    parent: Call | None
    signature: Signature | None = None
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    bound: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    problem: str = ""
    modes: dict[str, bool] = field(default_factory=dict)
    stopped: bool = False
    opaque: bool = False
    hooked: bool = False

    def chain(self) -> Iterator[Call]:
        """Yield this call and those around it."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass
class Trace:
    """What one run of a model gave.

    Attributes:
        program: torch.export's.
        root: the outermost call.
        events: ("enter" or "leave", call), ("assign", (buffer, ref)), and ("function", (the refs of arguments
            and outputs, the graph of its backward, its name)), in order.
        tables: by name, the buffers that the first call has filled, and later ones leave as they are.
    """

    program: torch.export.ExportedProgram
    root: Call
    events: list[tuple[str, Any]]
    paths: dict[int, list[str]]  # id of a tensor of the model -> its names
    tables: dict[str, torch.Tensor] = field(default_factory=dict)


class _Recorder:
    """Notes the calls of a model's modules while torch.export runs it."""

    def __init__(self, model: torch.nn.Module) -> None:
        # By their attributes: torch.export runs modules through proxies that share these.
        self.paths = {id(m.__dict__): n for n, m in model.named_modules()}
        # Where forward is the code of torch and nothing else, also in all modules inside.
        self.torchs = {
            id(m.__dict__)
            for m in model.modules()
            if all(_is_torchs(inner) for inner in m.modules())
        }
        self.events: list[tuple[str, Any]] = []
        self.call: Call | None = None
        self.failed: Call | None = None  # the innermost one that raised
        self.last_node: Any = None
        self.refs = 0
        self.changed: dict[Any, dict[str, Any]] = {}
        self.own: dict[int, list[int]] = {}  # by module, its parameters

    def event(self, kind: str, call: Any, graph: torch.fx.Graph) -> None:
        """Note an event, and at the nodes made since the last one that they were made after that."""
        number = len(self.events) - 1
        newest = None
        for node in reversed(graph.nodes):
            newest = newest or node
            if node is self.last_node:
                break
            _notes(node).setdefault("event", number)
        self.last_node = newest
        self.events.append((kind, call))

    def ref(self, value: Any, where: str) -> Any:
        """Return the leaf for a value that a module was given or returned."""
        if type(value) in CONSTANTS:
            return value
        if isinstance(value, SYMBOLIC):
            return number_of(value)
        if isinstance(value, torch.Tensor):
            mode = get_proxy_mode()
            proxy = get_proxy_slot(value, mode.tracer, None) if mode is not None else None
            if proxy is not None:
                notes = _notes(proxy.proxy.node)
                if "ref" not in notes:
                    self.refs += 1
                    notes["ref"] = self.refs
                return Ref(notes["ref"])
            raise NotPlain(f"{where or 'it'} is a tensor that is no result of the traced code")
        if isinstance(value, (torch.dtype, torch.device)):
            return str(value)
        if isinstance(value, torch.nn.utils.rnn.PackedSequence):
            raise self.packed()
        raise NotPlain(f"{where or 'it'} is an object of type {type(value).__name__}")

    def packed(self) -> ConversionError:
        call = self.call
        inside = f" in the forward of {call.path!r} ({type(call.module).__name__})" if call else ""
        return ConversionError(
            explain(
                f"found a packed sequence{inside}{_line_of(traceback.extract_stack())}",
                "how many rows each step of it has depends on the lengths, which compiled code does not know",
                "give the layer padded sequences, and use a mask of the steps that count; or convert the "
                "layers, and write this forward by hand: nn.utils.rnn.pack_padded_sequence is there",
            )
        )

    def wrapped(self, module: torch.nn.Module, forward: Callable) -> Callable:
        """Return a module's forward, followed."""
        path = self.paths[id(module.__dict__)]
        hooked = has_forward_hooks(module)
        is_torchs = id(module.__dict__) in self.torchs
        forward = _with_hooks(module, forward)

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():  # in a branch of torch.cond, and the like
                return forward(*args, **kwargs)
            mode = get_proxy_mode()
            if mode is None:
                return forward(*args, **kwargs)
            if not is_torchs:
                args, kwargs = _each_its_own(args, kwargs)
            record = Call(
                path, module, self.call, stopped=not torch.is_grad_enabled(), hooked=hooked
            )
            try:
                record.signature = Signature.of(forward)
                record.args = map_leaves(args, self.ref)
                record.kwargs = map_leaves(kwargs, self.ref)
                record.bound = record.signature.bind(record.args, record.kwargs)
            except (NotPlain, ValueError) as error:
                record.problem = f"was called with arguments of which {error}"
            if self.call is None:
                self.own = {id(m.__dict__): _parameters(m) for m in module.modules()}
            if self.own.get(id(module.__dict__)) != _parameters(module):
                record.problem = "was called with other parameters than its own"
            self.event("enter", record, mode.tracer.graph)
            self.call = record
            try:
                out = None
                if is_torchs and not record.problem:
                    out = _shapes_alone(module, *args, **kwargs)
                record.opaque = out is not None
                out = out if record.opaque else forward(*args, **kwargs)
                # What is handed through gets another name, so that it is known who returned it.
                given = {id(x) for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
                renamed = lambda x: torch.ops.aten.alias(x) if id(x) in given else x
                try:
                    record.output = map_leaves(out, self.ref)
                    if given & {id(x) for x in leaves(out)}:
                        out = rebuilt(out, renamed)
                        record.output = map_leaves(out, self.ref)
                except NotPlain as error:
                    record.problem = f"returned an output of which {error}"
            except Exception:
                self.failed = self.failed or record
                raise
            finally:
                self.event("leave", record, mode.tracer.graph)
                self.call = record.parent
            return out

        return call

    def assigned(self, module: Any, name: str, buffer: Any) -> None:
        """Note that the code put another tensor under a buffer's name."""
        path = self.paths.get(id(module.__dict__))
        mode = get_proxy_mode()
        if self.call is None or path is None or mode is None or name not in module._buffers:
            return
        full = f"{path}.{name}" if path else name
        old = module._buffers[name]
        if old is None or buffer is None or (old.shape, old.dtype) != (buffer.shape, buffer.dtype):
            raise KeptTensorError(
                explain(
                    f"found that forward puts a tensor of another shape or dtype into the buffer {full!r}",
                    "the shapes of what a compiled function keeps are fixed",
                    "register the buffer with its final shape and dtype",
                )
            )
        ref = self.ref(buffer, full)
        self.event("assign", (full, ref.number), mode.tracer.graph)

    def applied(self, plain: Callable, function: Any, args: tuple[Any, ...]) -> Any:
        """Apply a torch.autograd.Function, and note its backward beside what its forward gave."""
        mode = get_proxy_mode()
        known = [x for x in args if isinstance(x, torch.Tensor)]
        out = plain(*args)
        if mode is None or self.call is None or torch.compiler.is_dynamo_compiling():
            return out
        if not torch.is_grad_enabled() or function.__module__.startswith("torch."):  # checkpoint's
            return out
        several = isinstance(out, tuple)
        outputs = out if several else (out,)
        given = {id(x) for x in known}
        outputs = tuple(torch.ops.aten.alias(x) if id(x) in given else x for x in outputs)
        tensors = [x for x in outputs if isinstance(x, torch.Tensor)]
        if any(x.is_floating_point() for x in known) and any(
            x.is_floating_point() for x in tensors
        ):
            try:
                refs = [[self.ref(x, "") for x in side] for side in (known, tensors)]
            except NotPlain:  # inside of a transformation of torch.func
                return out
            line = lambda: _line_of(traceback.extract_stack())
            graph = traced_backward(function, args, outputs, line)
            self.event("function", (*refs, graph, function.__name__), mode.tracer.graph)
        return outputs if several else outputs[0]

    def look(self, module: Any, mode: bool) -> None:
        """Note that the code looked at whether a module is in training mode."""
        path = self.paths.get(id(module.__dict__))
        if self.call is not None and path is not None:
            self.call.modes[path] = mode


def _parameters(module: Any) -> list[int]:
    return [id(p) for p in module._parameters.values()]


def _each_its_own(args: Any, kwargs: Any) -> Any:
    """Return arguments of which no two are one tensor: another call may give two."""
    given = [id(x) for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if len(set(given)) == len(given):
        return args, kwargs
    seen: set[int] = set()

    def own(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or id(x) not in seen:
            seen.add(id(x))
            return x
        return torch.ops.aten.alias(x)

    return rebuilt(args, own), rebuilt(kwargs, own)


def _notes(node: Any) -> dict[str, int]:
    return node.meta.setdefault(CUSTOM, {}).setdefault(OURS, {})


def number_of(value: Any) -> Any:
    """Return a size, or what was computed with sizes, as a number of Python or a `Number`."""
    expression = value.node.expr
    if expression.free_symbols:
        return Number(expression)
    return value.node.pytype(expression)


def _is_torchs(module: Any) -> bool:
    is_a_layer = type(module).__module__.startswith("torch.nn.modules.")
    return is_a_layer and "forward" not in module.__dict__ and not has_forward_hooks(module)


def _shapes_alone(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Return tensors of the shapes that a layer returns, for layers that torch.export is bad with.

    It is slow with recurrent layers, and takes the length of a sequence for a constant. Those of
    nn.Transformer look at the numbers in a mask, to find out whether it is a causal one.
    """
    kind = type(module)
    if kind in (torch.nn.Transformer, torch.nn.TransformerEncoder, torch.nn.TransformerDecoder):
        like = ("src", "tgt")[kind is not torch.nn.TransformerEncoder]
        given = args[1:2] if kind is torch.nn.Transformer else args[:1]
        out = given[0] if given else kwargs.get(like)
        return torch.empty_like(out) if isinstance(out, torch.Tensor) else None
    return _shapes_of_one_input(kind, module, *args, **kwargs)


def _shapes_of_one_input(
    kind: type, module: Any, input: Any = None, *rest: Any, **kwargs: Any
) -> Any:
    if not isinstance(input, torch.Tensor):
        return None
    if kind in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d):
        return torch.empty_like(input)
    if kind not in (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU):
        return None
    directions = 2 if module.bidirectional else 1
    size = module.proj_size or module.hidden_size
    batch = () if input.ndim == 2 else (input.shape[0 if module.batch_first else 1],)
    layers = (directions * module.num_layers, *batch)
    out, h = (
        input.new_empty((*input.shape[:-1], directions * size)),
        input.new_empty((*layers, size)),
    )
    if kind is torch.nn.LSTM:
        return out, (h, input.new_empty((*layers, module.hidden_size)))
    return out, h


class _Flat(torch.nn.Module):
    """A model called with a flat list of tensors, that returns a flat list of tensors."""

    def __init__(
        self,
        model: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        recorder: _Recorder,
        snapshot: Snapshot,
    ) -> None:
        super().__init__()
        self.model = model
        self.given = (args, dict(kwargs))
        self.snapshot, self.recorder = snapshot, recorder

    def forward(self, *tensors: Any) -> Any:
        rest = iter(tensors)
        fill = lambda x: next(rest) if isinstance(x, torch.Tensor) else x
        args, kwargs = (rebuilt(part, fill) for part in self.given)
        out = self.model(*args, **kwargs)
        # Here, since torch.export puts attributes back before it returns.
        self.recorder.changed = self.snapshot.changed()
        kept = []
        for i, leaf in enumerate(leaves(out)):
            if isinstance(leaf, (torch.Tensor, *SYMBOLIC)):
                kept.append(leaf)
            elif type(leaf) not in CONSTANTS:
                raise ConversionError(
                    explain(
                        f"converted {type(self.model).__name__}, which returns an object of type "
                        f"{type(leaf).__name__} (output {i})",
                        "outputs are arrays and constants in tuples, lists and dicts",
                        "switch it off (for models of transformers use_cache=False), or give it as an input "
                        "(a cache of fixed size), or wrap the model in a module that returns arrays",
                    )
                )
        return tuple(kept)


def _with_hooks(module: torch.nn.Module, forward: Callable) -> Callable:
    """Return a forward that calls a module's hooks as torch does: they are a part of it."""
    if not has_forward_hooks(module):
        return forward
    named_before, named_after = (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
    )
    before = [(hook, key in named_before) for key, hook in module._forward_pre_hooks.items()]
    after = [(hook, key in named_after) for key, hook in module._forward_hooks.items()]

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        for hook, named in before:
            new = hook(module, args, kwargs) if named else hook(module, args)
            if new is not None and named:
                args, kwargs = new
            elif new is not None:
                args = new if isinstance(new, tuple) else (new,)
        out = forward(*args, **kwargs)
        for hook, named in after:
            new = hook(module, args, kwargs, out) if named else hook(module, args, out)
            out = out if new is None else new
        return out

    return call


@contextlib.contextmanager
def _noted(recorder: _Recorder) -> Iterator[None]:
    """Let torch.export see what it does not: inference_mode, ``.data``, and the backward of a Function."""

    def enter(self: Any) -> None:  # torch.export does not note it, as it does with no_grad
        self.noted = self.mode and get_proxy_mode() is not None
        if not self.noted:
            return ways[0](self)
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def leave(self: Any, *error: Any) -> None:
        if not getattr(self, "noted", False):
            return ways[1](self, *error)
        torch.set_grad_enabled(self.before)

    def data(self: torch.Tensor) -> torch.Tensor:  # torch.export cannot follow it
        return plain_data.__get__(self) if get_proxy_mode() is None else self.detach()

    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        if get_proxy_mode() is None:
            plain_data.__set__(self, value)
        elif (self.shape, self.dtype) == (value.shape, value.dtype):
            self.detach().copy_(value)
        else:
            raise KeptTensorError(
                explain(
                    "found .data set to a tensor of another shape or dtype"
                    + _line_of(traceback.extract_stack()),
                    "the shapes of what a compiled function keeps are fixed",
                    "make a new tensor, or register the buffer with its final shape and dtype",
                )
            )

    function = torch.autograd.Function
    plain_apply = function.__dict__["apply"]
    applied = lambda cls, *given: recorder.applied(plain_apply.__get__(None, cls), cls, given)
    inference = torch.autograd.grad_mode.inference_mode
    ways = inference.__enter__, inference.__exit__
    plain_data: Any = torch.Tensor.data  # of the class that torch.Tensor is derived from
    try:
        inference.__enter__, inference.__exit__ = enter, leave  # type: ignore
        function.apply = classmethod(applied)  # type: ignore
        torch.Tensor.data = property(data, set_data)  # type: ignore
        yield
    finally:
        inference.__enter__, inference.__exit__ = ways  # type: ignore
        function.apply = plain_apply  # type: ignore
        del torch.Tensor.data


@contextlib.contextmanager
def _followed(model: torch.nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Note calls of the model's modules, and looks at their ``training``, inside."""

    def look(module: Any) -> bool:
        mode = module.__dict__["training"]
        if not torch.compiler.is_dynamo_compiling():
            recorder.look(module, mode)
        return mode

    def put(module: Any, mode: bool) -> None:
        module.__dict__["training"] = mode

    def apply(self: Any, fn: Callable, recurse: bool = True) -> Any:
        same = all(fn(p).dtype == p.dtype for p in self.parameters(recurse))
        return self if same else plain(self, fn, recurse)

    plain = torch.nn.Module._apply
    annotated = torch.nn.Module.__dict__.get("training", None)
    watch = torch.nn.modules.module.register_module_buffer_registration_hook(recorder.assigned)
    try:
        for module in model.modules():
            module.__dict__["forward"] = recorder.wrapped(module, module.forward)
            if has_forward_hooks(module):
                module.__dict__[KEPT_HOOKS] = module._forward_pre_hooks
                for name in FORWARD_HOOKS:
                    module.__dict__[name] = OrderedDict()
        torch.nn.Module.training = property(look, put)  # pyright: ignore[reportAttributeAccessIssue]
        torch.nn.Module._apply = (
            apply  # ``self.to(dtype)`` in a forward, where nothing is to be done
        )
        yield
    finally:
        torch.nn.Module._apply = plain
        watch.remove()
        if annotated is None:
            del torch.nn.Module.training
        else:
            torch.nn.Module.training = annotated


def _axes(tensor: torch.Tensor, dynamic: str) -> dict[int, Any]:
    """Return which axes of an input may have other sizes."""
    # Sizes of images go through divisions in each layer, and these formulas make torch.export very slow.
    count = {"none": 0, "all": tensor.ndim}.get(dynamic, tensor.ndim if tensor.ndim <= 3 else 1)
    return dict.fromkeys(range(count), torch.export.Dim.AUTO)


def _exported(
    model: torch.nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    dynamic: str,
    snapshot: Snapshot,
) -> tuple[torch.export.ExportedProgram, _Recorder]:
    """Run a model, which is as in the snapshot, under torch.export.

    Raises:
        ConversionError: if torch.export cannot follow the code.
    """
    given = [x for x in leaves((args, dict(kwargs))) if isinstance(x, torch.Tensor)]
    known = {id(x) for x in (*model.parameters(), *model.buffers())}
    # A tensor that is given twice would be one input.
    tensors = tuple(
        x.detach().clone()
        if id(x) in known or x.is_inference() or any(x is y for y in given[:i])
        else x
        for i, x in enumerate(given)
    )
    axes = (tuple(_axes(x, dynamic) for x in tensors),) if tensors else None
    recorder = _Recorder(model)
    flat = _Flat(model, args, kwargs, recorder, snapshot)
    flat.__dict__["training"] = model.training
    try:
        with _followed(model, recorder), _noted(recorder), torch.enable_grad(), _quiet():
            program = torch.export.export(flat, tensors, dynamic_shapes=axes, strict=False)
        return program, recorder
    except ConversionError:
        raise
    except Exception as error:
        if any(p.is_inference() for p in (*model.parameters(), *model.buffers())):
            raise ConversionError(
                explain(
                    f"converted {type(model).__name__}, which was made under torch.inference_mode",
                    "torch.export cannot follow tensors of that kind",
                    "make it, and load its weights, outside",
                )
            ) from error
        raise _not_followed(model, recorder.failed, error) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing the graph that failed: the error comes first."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _not_followed(model: Any, call: Call | None, error: BaseException) -> ConversionError:
    """Return the error for code that torch.export cannot follow: its own goes over many lines."""
    said = str(error).strip().split("\n\n")[0].split("\n")[0]
    inside = f" in the forward of {call.path!r} ({type(call.module).__name__})" if call else ""
    line = _line_of(traceback.extract_tb(error.__traceback__))
    if "unhashable type: non-nested SymInt" in said:
        return ConversionError(
            explain(
                f"torch.export could not follow {type(model).__name__}{inside}{line}",
                "a size is a key of a dict or set there, and a size that may vary cannot be one",
                'from_torch(..., dynamic="none"), or make what is kept for each size anew in each call',
            )
        )
    if "data-dependent" in str(error).lower() or "DataDependent" in type(error).__name__:
        why = f"it looks at the numbers in an array, which a graph does not know: {said}"
    else:
        why = f"{type(error).__name__}: {said}".strip()
    return ConversionError(
        explain(
            f"torch.export could not follow {type(model).__name__}{inside}{line}",
            why,
            "a graph has no branches on the values of arrays, no .item() and no .numpy(): use torch.where, "
            "keep sizes out of them, or convert the submodules and write this forward by hand",
        )
    )


def _line_of(frames: traceback.StackSummary) -> str:
    """Return the line of the user's code that an error came through last."""
    theirs = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    own = [f for f in frames if not f.filename.startswith((*theirs, "<"))]
    if not own:
        return ""
    place = own[-1]
    return f', File "{place.filename}", line {place.lineno}, in {place.name}, {place.line}'


def trace(
    model: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], dynamic: str = "auto"
) -> Trace:
    """Run a model under torch.export, in the mode it is in.

    Raises:
        ConversionError: if torch.export cannot follow the code.
    """
    snapshot = Snapshot(model)
    tables: dict[str, torch.Tensor] = {}
    try:
        try:
            program, recorder = _exported(model, args, kwargs, dynamic, snapshot)
        except KeptTensorError:  # a table made in the first call, perhaps: a second one shows it
            snapshot.restore()
            tables = tables_of_a_call(model, args, kwargs, snapshot)
            program, recorder = _exported(model, args, kwargs, dynamic, Snapshot(model))
        if recorder.changed:  # what is set once is set now: a second run shows whether it stays
            snapshot.restore()
            for module, values in recorder.changed.items():
                module.__dict__.update(values)
            program, recorder = _exported(model, args, kwargs, dynamic, Snapshot(model))
            for module, values in recorder.changed.items():
                raise kept(module, next(iter(values)))
    finally:
        snapshot.restore()
    names: dict[int, list[str]] = {}
    for members in (model.named_parameters, model.named_buffers):
        for name, tensor in members(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    root = recorder.events[0][1]
    return Trace(program, root, recorder.events, names, tables)
