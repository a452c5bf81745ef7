"""from_torch: a live tree of torch's modules as one of ours."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.modules.lazy import LazyModuleMixin

import statefulnn.modules as ours
from statefulnn.bridge.torch import file_hooks, layers
from statefulnn.bridge.torch.arrays import to_jax
from statefulnn.bridge.torch.errors import ConversionError
from statefulnn.bridge.torch.functionalize import Functionalizer
from statefulnn.bridge.torch.graph import Graph, Traced
from statefulnn.bridge.torch.operators import OPERATORS
from statefulnn.bridge.torch.splitting import Splitter
from statefulnn.bridge.torch.state import held
from statefulnn.bridge.torch.structures import CONSTANTS, leaves, map_leaves, rebuilt
from statefulnn.bridge.torch.tracing import Trace, trace
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.placement import device, elsewhere

_HOOKS = ("backward_pre", "backward")
_ANOTHER_SEED = 1_618_033
# While torch.export runs, torch's classes have other methods.
_TRACING = threading.RLock()


def from_torch(
    module: torch.nn.Module,
    *example_inputs: object,
    kwargs: Mapping[str, object] | None = None,
    modes: Sequence[str] | None = None,
    dynamic: str = "auto",
    operators: Mapping[Any, Callable] | None = None,
    copy: bool = True,
) -> Any:
    """Return a module of torch as a module of ours, with the same names, values and modes.

    Layers of torch.nn become the layers of that name here. A module of any other class is run once under
    ``torch.export`` with the example inputs; its forward becomes a graph of operations and of calls of its
    submodules, which may be replaced, frozen and switched between training and evaluation.

    Args:
        module: it is not changed.
        example_inputs: what `module` is called with: tensors, numbers and texts in tuples, lists and
            dicts. Not needed if all modules are layers of torch.nn. The tensors in an object of another
            class, such as a cache, become buffers of a module with the name of the argument, which is left
            out of calls.
        kwargs: the same, by name.
        modes: ``("train", "eval")`` runs it in both; by default it is run in the mode it is in.
        dynamic: which axes of the inputs may have another size later, unless the size here is 0 or 1 or
            the code relies on it: with "auto" the first of every tensor, and all of those with three axes at
            most; with "all" those of images too, which can take minutes; with "none" no axis.
        operators: functions of arrays for operators of torch that have none here, by
            ``torch.ops.library.name.overload``.
        copy: whether arrays have their own memory. With False they may be the tensors' memory: then
            nobody may write to these any more.

    Returns:
        a module that computes without torch.

    Raises:
        ConversionError: for hooks, tensors and operators that have no counterpart, by their names, and for
            code that ``torch.export`` cannot follow.
        DtypeError: for numbers of 64 bits that JAX would cut.

    Source: ``torch.export``.

    Example:
        >>> import torch
        >>> model = nn.bridge.torch.from_torch(
        ...     torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        ... )
        >>> model
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): ReLU()
        )
        >>> class Residual(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = torch.nn.Linear(3, 3)
        ...
        ...     def forward(self, x):
        ...         return x + self.fc(x)
        >>> block = nn.bridge.torch.from_torch(Residual(), torch.randn(2, 3))
        >>> block(jnp.ones((5, 3))).shape
        (5, 3)
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            explain(
                f"called from_torch with an object of type {type(module).__name__}",
                "it converts a torch.nn.Module",
                "pass the module, and after it the inputs that it is called with",
            )
        )
    _check_options(modes, dynamic)
    refuse(module)
    users = [n for n, m in module.named_modules() if _is_users(m)]
    graphs: dict[str, list[Graph]] = {}
    inlined: dict[str, str] = {}
    if users:
        if not example_inputs and kwargs is None:
            listed = ", ".join(
                f"{n or 'the module itself'} ({type(module.get_submodule(n)).__name__})"
                for n in users[:5]
            )
            raise ConversionError(
                explain(
                    f"converted {type(module).__name__} without example inputs",
                    f"it has modules with a forward of their own: {listed}"
                    + (f" and {len(users) - 5} more" if len(users) > 5 else ""),
                    "from_torch(module, *inputs) with what it is called with; kwargs={} if that is nothing",
                )
            )
    with held(module, example_inputs, kwargs or {}) as (args, named, has_state):
        if users:
            for name, where in _inputs(args, named):
                raise _unknown_input(name, where)
            # State has arrays for this batch.
            examples = [
                (args, named),
                None if has_state or dynamic == "none" else _of_two(args, named),
            ]
            with _TRACING:
                graphs, inlined = _traced(module, examples, modes, dynamic, dict(operators or {}))
        with elsewhere():
            return _Tree(module, graphs, inlined, copy).convert(module, "")


def operators() -> list[str]:
    """Return the names of the operators of ATen that graphs may contain.

    Example:
        >>> "add" in nn.bridge.torch.operators()
        True
    """
    return sorted(OPERATORS)


def _check_options(modes: Sequence[str] | None, dynamic: str) -> None:
    if dynamic not in ("auto", "all", "none"):
        raise ValueError(
            explain(
                f"called from_torch with dynamic={dynamic!r}",
                'which axes may have other sizes is "auto", "all" or "none"',
                'dynamic="auto"',
            )
        )
    if modes is not None and (isinstance(modes, str) or not set(modes) <= {"train", "eval"}):
        raise ValueError(
            explain(
                f"called from_torch with modes={modes!r}",
                'the modes are "train" and "eval"',
                'modes=("train", "eval")',
            )
        )


def _is_users(module: torch.nn.Module) -> bool:
    return layers.name_of(module, torch.nn) is None


def _inputs(args: Any, kwargs: Any) -> list[tuple[str, str]]:
    found = []

    def leaf(x: Any, where: str) -> None:
        if not isinstance(x, torch.Tensor) and type(x) not in CONSTANTS:
            found.append((type(x).__name__, where))

    map_leaves((args, kwargs), leaf)
    return found


def _unknown_input(name: str, where: str) -> ConversionError:
    return ConversionError(
        explain(
            f"called from_torch with an example input of type {name} (at {where})",
            "inputs are tensors of torch and constants, in tuples, lists and dicts",
            "pad the sequences, and give their lengths or a mask"
            if name == "PackedSequence"
            else "torch.as_tensor(np.asarray(array)) makes a tensor of an array",
        )
    )


def _traced(
    module: torch.nn.Module,
    examples: Sequence[tuple[tuple, Mapping[str, Any]] | None],
    modes: Sequence[str] | None,
    dynamic: str,
    operators: dict[Any, Callable],
) -> tuple[dict[str, list[Graph]], dict[str, str]]:
    """Return the graphs of the modules by path, and which module the others are a part of.

    The first example has to work; another may not.
    """
    is_ours = lambda call: not (call.path is None or call.hooked or _is_users(call.module))
    graphs: dict[str, list[Graph]] = {}
    inlined: dict[str, str] = {}
    flags = {m: m.training for m in module.modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own parts
        for mode in modes or (None,):
            for example in examples:
                if example is None:
                    continue
                try:
                    if mode is not None:
                        module.train(mode == "train")
                    splitter, made = _of_any_chance(
                        module,
                        lambda example=example: _split(
                            trace(module, *example, dynamic), operators, is_ours
                        ),
                    )
                except ConversionError:
                    if example is not examples[0]:  # it works for one only
                        continue
                    raise
                finally:
                    for m, training in flags.items():
                        m.__dict__["training"] = training
                for path, found in made.items():
                    known = graphs.setdefault(path, [])
                    known += [g for g in found if g not in known]
                inlined.update(splitter.parts())
    return graphs, inlined


def _split(run: Trace, operators: dict[Any, Callable], is_ours: Callable) -> tuple[Splitter, Any]:
    splitter = Splitter(run, Functionalizer(run, operators).run(), is_ours)
    return splitter, splitter.graphs()


def _of_any_chance(module: Any, run: Callable[[], tuple[Splitter, Any]]) -> tuple[Splitter, Any]:
    """Return what a run gives; Python's and numpy's random numbers are as before.

    Raises:
        ConversionError: if it drew from these, and they are in the graphs.
    """
    before = random.getstate(), np.random.get_state()
    try:
        found = run()
        if (random.getstate(), repr(np.random.get_state())) == (before[0], repr(before[1])):
            return found
        random.seed(_ANOTHER_SEED)
        np.random.seed(_ANOTHER_SEED)
        if run()[1] != found[1]:
            raise ConversionError(
                explain(
                    f"converted {type(module).__name__}, which draws from random or numpy.random",
                    "a graph would have the numbers that were drawn when it was traced, in all calls",
                    "draw them with torch: torch.rand(())",
                )
            )
        return found
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _of_two(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Return inputs with a batch of two where all have one of one, which torch.export takes for fixed."""
    sizes = {len(x) for x in leaves((args, dict(kwargs))) if isinstance(x, torch.Tensor) and x.ndim}
    if sizes != {1}:
        return None
    twice = lambda x: torch.cat([x, x]).detach() if isinstance(x, torch.Tensor) and x.ndim else x
    return rebuilt(args, twice), rebuilt(dict(kwargs), twice)


# --------------------------------------------------------------------------------------------------
# What cannot be converted


def refuse(module: torch.nn.Module) -> None:
    """Raise for what has no counterpart, before anything is built.

    Raises:
        ConversionError: with the name of the module or tensor.
    """
    for kind in ("forward_pre", "forward", "backward_pre", "backward"):
        if getattr(torch.nn.modules.module, f"_global_{kind}_hooks"):
            raise ConversionError(
                explain(
                    f"converted {type(module).__name__} while all modules of torch have a {kind} hook",
                    "layers of torch.nn become layers here, whose hooks are those of the layers themselves",
                    "remove it (handle.remove()), and register it on the modules it is for",
                )
            )
    for name, member in module.named_modules(remove_duplicate=False):
        where = f"{name!r} ({type(member).__name__})" if name else type(member).__name__
        if isinstance(member, torch.jit.ScriptModule):
            raise _refused(
                where, "compiled by torch.jit", "convert the module it was scripted from"
            )
        if "quantized" in type(member).__module__.split("."):
            raise _refused(where, "quantized", "convert the module before quantisation")
        if isinstance(member, LazyModuleMixin):
            raise _refused(where, "lazy, and has no shapes yet", "call it once in torch first")
        for kind in _HOOKS:
            if member.__dict__.get(f"_{kind}_hooks"):
                raise ConversionError(
                    explain(
                        f"converted {where}, which has a {kind} hook",
                        "a hook of gradients is code on torch's tensors, which no graph of forward has",
                        "remove it (handle.remove()), and register one on the converted module",
                    )
                )
        for registry in (member._parameters, member._buffers):
            for key, tensor in registry.items():
                if tensor is not None:
                    _check_tensor(f"{name}.{key}" if name else key, tensor)


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise _refused(
            repr(name), "watched by a hook of its gradient", "remove it, and change the gradients"
        )
    if tensor.is_meta:
        raise _refused(
            repr(name), "on the meta device: it has no numbers", "load the weights first"
        )
    if tensor.layout is not torch.strided:
        raise _refused(repr(name), f"of the layout {tensor.layout}", "tensor.to_dense() first")
    if tensor.is_quantized or type(tensor) not in (
        torch.Tensor,
        torch.nn.Parameter,
        torch.nn.Buffer,
    ):
        kind = "quantized" if tensor.is_quantized else f"of the class {type(tensor).__name__}"
        raise _refused(repr(name), kind, "convert the module before quantisation or sharding")


def _refused(where: str, what: str, instead: str) -> ConversionError:
    return ConversionError(
        explain(f"converted {where}", f"it is {what}, which has no counterpart here", instead)
    )


# --------------------------------------------------------------------------------------------------
# The tree


class _Tree:
    """Builds our modules, each once."""

    def __init__(
        self, root: Any, graphs: dict[str, list[Graph]], inlined: dict[str, str], copy: bool
    ) -> None:
        self.graphs, self.inlined, self.copy = graphs, inlined, copy
        self.paths: dict[int, list[str]] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), []).append(name)
        self.modules: dict[int, Module] = {}
        self.boxes: dict[int, Any] = {}

    def convert(self, theirs: torch.nn.Module, path: str) -> Module:
        if id(theirs) in self.modules:
            return self.modules[id(theirs)]
        name = layers.name_of(theirs, torch.nn)
        if name is None or self.graphs.get(path):
            module: Module = self.traced(theirs)
        else:
            with device("meta"):
                module = layers.build(theirs, name, ours, lambda x: to_jax(x, copy=False))
        self.modules[id(theirs)] = module
        self.fill(theirs, module, path)
        if name in ("ParameterList", "ParameterDict"):
            layers.count(theirs, module)
        file_hooks.take_over(theirs, module, self.modules)
        module.training = theirs.training
        return module

    def traced(self, theirs: torch.nn.Module) -> Traced:
        names = self.paths[id(theirs)]
        module = Traced(type(theirs).__name__, f"{names[0]}: {type(theirs).__name__}")
        module.graphs = tuple(g for n in names for g in self.graphs.get(n, ()))
        module.part_of = next((self.inlined[n] for n in names if n in self.inlined), "")
        return module

    def fill(self, theirs: torch.nn.Module, module: Module, path: str) -> None:
        """Put parameters, buffers and children into a module."""
        below = lambda key: f"{path}.{key}" if path else key
        if not isinstance(module, Traced):
            _check_members(theirs, module, path)
        for key, tensor in theirs._parameters.items():
            box = self.box(tensor, below(key), True)
            module.register_parameter(key, box) if box is None else setattr(module, key, box)
        hidden = theirs._non_persistent_buffers_set
        for key, tensor in theirs._buffers.items():
            box = self.box(tensor, below(key), key not in hidden)
            if box is None:
                module.register_buffer(key, None, persistent=key not in hidden)
            else:
                setattr(module, key, box)
        for key, child in theirs._modules.items():
            new = None if child is None else self.convert(child, below(key))
            if new is not None and key in module._modules:
                setattr(module, key, new)
            else:
                module.add_module(key, new)

    def box(self, tensor: Any, name: str, persistent: bool) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in self.boxes:
            array = to_jax(tensor, self.copy, repr(name))
            if isinstance(tensor, torch.nn.Parameter):
                self.boxes[id(tensor)] = Parameter(array, requires_grad=tensor.requires_grad)
            else:
                self.boxes[id(tensor)] = Buffer(array, persistent=persistent)
        return self.boxes[id(tensor)]


def _check_members(theirs: torch.nn.Module, module: Module, path: str) -> None:
    """Raise if something was added to a layer that its class does not have."""
    if type(theirs).__name__ in layers.CONTAINERS:
        return
    for registry in ("_parameters", "_buffers", "_modules"):
        there, here = getattr(theirs, registry), getattr(module, registry)
        extra = {k for k in {**there, **here} if (there.get(k) is None) != (here.get(k) is None)}
        if extra:
            raise ConversionError(
                explain(
                    f"converted {path!r} ({type(theirs).__name__}), in which {sorted(extra)} was added "
                    "or taken away",
                    "a layer of torch.nn is built anew from its class",
                    "make a class of it with a forward of its own",
                )
            )
