"""What the transforms say when they refuse something: one function for each refusal, named as what happened.

A function returns the exception, or the text of a warning, and the code that refuses raises it. So the
texts are read side by side, and the code without them. They are given names, shapes and dtypes, never
objects of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax

from statefulnn.core.errors import (
    ArgumentError,
    DtypeError,
    PicklingError,
    RegistrationError,
    ShapeError,
    StateWriteError,
    StructureChangeError,
    TraceLeakError,
    UninitializedParameterError,
    UnknownNameError,
    UnusedModuleError,
    explain,
)
from statefulnn.core.refusals import array_of

Shape: TypeAlias = tuple[int, ...]
Dtype: TypeAlias = object  # whatever prints as its name
Change: TypeAlias = tuple[str, str]  # where something changed, and how

# Why a write or a draw is refused, and what works instead: given to those who watch over both.
PURE = (
    "the call is pure: it returns its output only, so the new value would be lost",
    "functional_call(..., mutable=True) or functionalize(module, mutable=True), which return the new "
    "state; or module.eval() first, if nothing should change; batch normalisation can do without: "
    "nn.func.with_batch_norm(module, 'batch' or 'frozen')",
)
PURE_BUT_FOR_BUFFERS = (
    "a pure call gives back new buffers, but no new parameters: the write would be lost",
    "keep what forward changes in a buffer, or call the module under nn.jit, which writes back",
)
CONDITION = (
    "the condition of a loop gives one boolean, and is asked once more than there are steps",
    "write in the body, and let the condition read what it left",
)
NO_ORDER = (
    "the function is called on many pairs at once, in an order of JAX's own, so what it writes has none",
    "use nn.scan, whose steps follow each other; or put the module into eval mode",
)
NO_RANDOMNESS = (
    "drew random numbers under nn.vmap(randomness='error')",
    "the call forbids it",
    "pass randomness='different' or randomness='same'",
)


def quoted(names: Sequence[object]) -> str:
    """Return names in one line, each in quotation marks."""
    return ", ".join(map(repr, names))


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines[:8])


def _inline(changes: Sequence[Change]) -> str:
    return "; ".join(f"{name}: {change}" for name, change in changes[:5])


# --------------------------------------------------------------------------------------------------
# What a traced function did to its modules


def gradient_left_behind(name: str) -> StateWriteError:
    return StateWriteError(
        explain(
            f"left a gradient in .grad of {name!r} inside of a transformation",
            "gradients are no part of a module: nobody would collect it",
            "return it: loss, grads = nn.value_and_grad(f)(model); opt.step(grads)",
        )
    )


def slots_dropped(kind: str) -> StateWriteError:
    return StateWriteError(
        explain(
            f"built an {kind} in a traced function, stepped it once and dropped it, while the module that it "
            "trains lives on",
            "its slots, such as momentum, begin anew at each call",
            "opt = nn.Optimizer(model, tx) once, outside, and an argument: step(model, opt, x); where one "
            "step is all there is, return opt.state too",
        )
    )


def structure_changed(changes: Sequence[Change]) -> StructureChangeError:
    listed = _indented([f"{name}: {change}" for name, change in changes])
    if len(changes) > 8:
        listed += f"\n    ... and {len(changes) - 8} more"
    instead = (
        "make the change outside; keep arrays that change in buffers "
        "(self.register_buffer(name, array, persistent=False)); collect outputs of "
        "submodules with nn.capture"
    )
    if any(str(change).startswith("class Lazy") for _, change in changes):
        instead = (
            "call the model once before, outside: model(x). A lazy layer becomes the layer that it stands "
            "for in its first call, also where a state dict has brought its weights"
        )
    return StructureChangeError(
        explain(
            f"a module changed inside a traced function:\n{listed}",
            "only arrays come back from a traced function; this change would be lost, or happen "
            "once and never again",
            instead,
        )
    )


def shared_with_argument(kind: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"returned a new {kind} that shares parameters with an argument",
            "outside, the shared parameter would become two",
            "return the arrays (parameter.value), or build the new module outside",
        )
    )


def returned_without_numbers(kind: str, name: str) -> UninitializedParameterError:
    return UninitializedParameterError(
        explain(
            f"returned a new {kind} with {name!r} on the meta device",
            "a transformed function returns arrays, and this is a shape without numbers",
            'build the module outside of it; or with numbers: nn.device("cpu") around its constructor',
        )
    )


# --------------------------------------------------------------------------------------------------
# Compiled code

_KNOWN_LATER = (
    "Why: the value is known when the compiled code runs, and not while it is traced\n  Instead: "
)
# What to write where JAX raises an error about a value that is not known yet.
EARLY: dict[type, str] = {
    jax.errors.TracerBoolConversionError: _KNOWN_LATER
    + "jnp.where(condition, a, b); nn.cond(condition, f, g, x); "
    'nn.jit(f, static_argnames="train") for a flag of Python\'s',
    jax.errors.TracerIntegerConversionError: _KNOWN_LATER
    + "nn.jit(f, static_argnums=1) for an argument that Python counts with; nn.fori_loop",
    jax.errors.TracerArrayConversionError: _KNOWN_LATER + "functions of jnp in place of np",
    jax.errors.NonConcreteBooleanIndexError: _KNOWN_LATER + "jnp.where(x > 0, x, 0)",
    jax.errors.ConcretizationTypeError: _KNOWN_LATER
    + "return the array, and call float(out) or out.item() outside",
}

FORMATTED = (
    _KNOWN_LATER + 'jax.debug.print("loss {l:.3f}", l=loss); or return it, and print it outside'
)


def argument_of_no_array(
    function: str, name: str, value: object, holds_modules: bool
) -> ArgumentError:
    kind = type(value).__name__
    instead, called = array_of(value, name), function if function.isidentifier() else "f"
    if name == "self" or holds_modules:
        instead = (
            f"class {kind}(nn.Module), which registers what it holds; or a function of that: "
            "step(model, opt, x)"
        )
    elif isinstance(value, str):
        instead = f"nn.jit({called}, static_argnames={name.partition('[')[0]!r})"
    elif hasattr(value, "__iter__") and not hasattr(value, "__array__"):
        instead = f"for batch in {name}: {called}(..., batch), with arrays in the batch"
    elif not hasattr(value, "__array__"):
        instead = f"an array, or static_argnames={name.partition('[')[0]!r} of nn.jit"
    return ArgumentError(
        explain(
            f"called {function}, which is compiled, with {name} of type {kind}",
            "compiled code takes modules, arrays and numbers",
            instead,
        )
    )


def no_argument_for_option(option: str, given: object, have: Sequence[str]) -> ValueError:
    return ValueError(
        explain(
            f"compiled a function with {option}={given!r}, and it has no such argument",
            "the option would do nothing, and the argument that is meant would be traced",
            f"one of its arguments: {', '.join(have) or 'it has none'}",
        )
    )


def static_module(kind: str) -> RegistrationError:
    return RegistrationError(
        explain(
            f"passed a {kind} as a static argument",
            "a static argument is compiled in, with the values of its parameters",
            "take it out of static_argnums and static_argnames: modules are traced as arguments",
        )
    )


def static_and_donated(position: int) -> ValueError:
    return ValueError(
        explain(
            f"asked for argument {position} to be static and donated",
            "a static argument is compiled in, and has no memory to give away",
            "name it in static_argnums, or in donate",
        )
    )


def other_arguments(function: str, changes: Sequence[str]) -> ArgumentError:
    return ArgumentError(
        explain(
            f"called {function}, compiled ahead of time, with other arguments:\n{_indented(changes)}",
            "it is compiled for one structure, and one shape and dtype of each array",
            "call nn.jit(f) itself, which compiles when needed; or f.lower(...).compile() for these "
            "arguments",
        )
    )


def many_shapes(function: str, count: int, changed: Sequence[str]) -> str:
    return explain(
        f"compiled {function} {count} times",
        f"each shape and dtype compiles anew, and these changed: {', '.join(changed)}"
        if changed
        else "shapes and dtypes are the same: a setting of JAX, or where arrays lie, changed",
        "pad arrays to a few sizes (drop the last, smaller batch of an epoch)",
    )


def many_values(function: str, count: int, changed: Sequence[object]) -> str:
    return explain(
        f"compiled {function} for {count} values of its static arguments; "
        f"{quoted(changed)} changed last",
        "a static argument is compiled in, and every new value compiles the function again",
        "pass numbers and arrays as ordinary arguments",
    )


def many_structures(function: str, count: int, last: object) -> str:
    return explain(
        f"compiled {function} for {count} structures of its arguments",
        f"every new structure compiles the function again (last: {last})",
        "pass the same containers with the same keys at each call",
    )


def made_anew(function: str, place: str, count: int) -> str:
    return explain(
        f"made nn.jit of {function!r} ({place}) anew {count} times",
        "each is a function of its own, which may close over other values, and compiles again",
        "call nn.jit once, outside of the loop, and pass what changes as arguments",
    )


# --------------------------------------------------------------------------------------------------
# Pure calls


def no_dicts(kind: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"functional_call was given parameters of type {kind}",
            "it finds arrays by name",
            "pass a dict of name -> array, or a tuple of such dicts",
        )
    )


def no_array(function: str, name: str, kind: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{function} was given an object of type {kind} for {name!r}",
            "parameters and buffers are arrays",
            "pass a jax.Array or a numpy array",
        )
    )


def entry_beside_all(function: str, entry: str, stored: str) -> ValueError:
    return ValueError(
        explain(
            f"{function} was given {entry!r} and {stored!r}",
            "the first is an entry of the second, which holds the arrays of all layers",
            "pass what is stored, or the arrays of single layers",
        )
    )


def not_for_all_layers(function: str, stored: str, given: int, count: int) -> UnknownNameError:
    return UnknownNameError(
        explain(
            f"{function} was given {given} of the {count} arrays that are stored as {stored!r}",
            "all of them are arguments of the pure function",
            "pass those of the other layers too, or what is stored, under its own name",
        )
    )


def other_shape(function: str, name: str, given: Shape, own: Shape) -> ShapeError:
    hint = "pass an array of the same shape"
    if given[1:] == own:
        hint = "for parameters stacked along a leading axis, call it under jax.vmap(in_axes=0)"
    return ShapeError(
        explain(
            f"{function} was given {name!r} with shape {given}",
            f"the module has shape {own} there",
            hint,
        )
    )


def other_dtype(function: str, name: str, given: Dtype, own: Dtype) -> DtypeError:
    return DtypeError(
        explain(
            f"{function} was given {name!r} with dtype {given}",
            f"the module has dtype {own} there",
            "cast it: array.astype(...)",
        )
    )


def tied_apart(one: str, other: str) -> ValueError:
    return ValueError(
        explain(
            f"functional_call was given different arrays for {one!r} and {other!r}",
            "they are tied: one parameter under two names",
            "pass one of the names, the same array under both, or tie_weights=False",
        )
    )


def not_all_given(missing: Sequence[str]) -> UnknownNameError:
    return UnknownNameError(
        explain(
            f"functional_call(strict=True) was not given {quoted(missing)}",
            "with strict=True every parameter and buffer must be given",
            "pass them all, or strict=False to use the module's own",
        )
    )


def no_method(module: str, method: str) -> AttributeError:
    return AttributeError(
        explain(
            f"functionalize({module}, method={method!r})",
            f"{module} has no method {method!r}",
            "pass the name of a method",
        )
    )


def not_by_name(module: str, noun: str, kind: str, signature: str, has_them: bool) -> ArgumentError:
    return ArgumentError(
        explain(
            f"the function of {module} was given {noun} of type {kind}",
            f"it finds arrays by name; the arguments are {signature}",
            f"pass what is in it, {kind.lower()}.{noun}"
            if has_them
            else f"pass the dict of {noun} first",
        )
    )


def not_given(module: str, noun: str, missing: Sequence[str]) -> UnknownNameError:
    return UnknownNameError(
        explain(
            f"the function of {module} was not given {quoted(missing)}",
            f"all {noun} are arguments of the pure function",
            f"start from the {noun} that functionalize returned",
        )
    )


def models_differ(number: int, changes: Sequence[Change]) -> ValueError:
    return ValueError(
        explain(
            f"stacked models that differ: number {number} against number 0 ({_inline(changes)})",
            "one function has to serve them all",
            "build them the same way and put them into the same mode",
        )
    )


# --------------------------------------------------------------------------------------------------
# Derivatives


def no_such_argument(function: str, number: int, count: int) -> ArgumentError:
    return ArgumentError(
        explain(
            f"differentiated argument {number} of {function}, called with {count} "
            "positional arguments",
            "there is no such argument",
            "pass it by position, or choose another one with argnums",
        )
    )


def nothing_to_differentiate(function: str, kind: str) -> UnusedModuleError:
    return UnusedModuleError(
        explain(
            f"differentiated {function} with respect to {kind}",
            "it has no trainable parameters and holds no arrays, so the gradient is empty",
            "self.w = nn.Parameter(array) in __init__ makes one; module.requires_grad_(True) unfreezes "
            "those that are there; argnums chooses another argument",
        )
    )


def never_read(function: str, kind: str) -> UnusedModuleError:
    return UnusedModuleError(
        explain(
            f"differentiated {function} with respect to {kind}",
            "it never read a parameter of that argument, so every gradient would be zero; it probably "
            "uses a module from outside",
            "use the argument inside the function: def loss_fn(model, x): return model(x).mean(); "
            'nn.grad(loss_fn, only="head.*") differentiates by a part of it',
        )
    )


def no_scalar(
    function: str, kind: str, shape: Shape | None, is_tuple: bool, has_aux: bool
) -> ArgumentError:
    what = f"an array of shape {shape}" if shape is not None else f"a {kind}"
    hint = "return loss.mean()" if shape is not None else "return loss"
    if is_tuple:
        hint = "nn.value_and_grad(f, has_aux=True) to return (loss, aux); or return the loss alone"
    if has_aux:
        hint = "return loss, aux: the loss comes first, and is a scalar, such as loss.mean()"
    return ArgumentError(
        explain(f"{function} returned {what}", "a gradient is that of a scalar", hint)
    )


def no_real_loss(function: str, dtype: Dtype) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{function} returned a loss of dtype {dtype}",
            "a gradient is that of a real number",
            "compute the loss in a floating dtype",
        )
    )


def no_aux(function: str, kind: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{function} returned {kind} with has_aux=True",
            "the loss and the auxiliary output are needed",
            "return a pair: return loss, aux",
        )
    )


def no_argnums(function: str, given: object) -> ArgumentError:
    inputs = "model, x, y"
    return ArgumentError(
        explain(
            f"called {function} with argnums of type {type(given).__name__}",
            "it returns a function, which is called with the arguments; argnums are their positions",
            f"{function}(loss_fn)({inputs})"
            if not isinstance(given, str)
            else f"{function}(loss_fn, argnums=0)({inputs}), by the position of {given!r}",
        )
    )


def module_as_output(function: str, kind: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{function} returned a {kind} as its differentiated output",
            "a derivative is that of arrays",
            "return arrays; has_aux=True passes anything else through: return out, model",
        )
    )


def not_one_for_each(what: str, kind: str, count: int) -> ArgumentError:
    return ArgumentError(
        explain(
            f"gave {what} of type {kind} for {count} arguments",
            "there is one for each argument that is differentiated",
            "pass a tuple with one entry for each",
        )
    )


def direction_of_other_structure(what: str, error: ValueError) -> ArgumentError:
    return ArgumentError(
        explain(
            f"gave {what} of another structure than the argument ({error})",
            "each array of the argument has its own",
            "pass the argument's structure, with a dict of name -> array for a module",
        )
    )


def direction_of_other_names(what: str, given: object, own: Sequence[str]) -> UnknownNameError:
    return UnknownNameError(
        explain(
            f"gave {what} {given} for a module",
            f"its trainable parameters are {own}",
            "pass a dict with one array for each of them",
        )
    )


def direction_of_other_shape(what: str, given: Shape, own: Shape, name: str | None) -> ShapeError:
    which = "" if name is None else f", {name!r}"
    return ShapeError(
        explain(
            f"gave {what} of shape {given} for an array of shape {own}{which}",
            "it has the shape of what it belongs to",
            "pass an array of the same shape",
        )
    )


# --------------------------------------------------------------------------------------------------
# vmap


def argument_for_axes(kind: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"called nn.vmap with in_axes of type {kind}",
            "it returns a function, which is called with the arguments; in_axes are their axes",
            "nn.vmap(f, in_axes=(None, 0))(model, xs)",
        )
    )


def other_number_of_axes(given: int, count: int) -> ValueError:
    return ValueError(
        explain(
            f"nn.vmap was given in_axes of length {given} for {count} arguments",
            "there must be one entry per positional argument",
            "pass an integer for all of them, or one entry for each",
        )
    )


def two_axes(name: str, one: object, other: object) -> ValueError:
    return ValueError(
        explain(
            f"nn.vmap was given the axes {one} and {other} for {name!r}",
            "two of the arguments share it, so it has one axis",
            "map both arguments over the same axis",
        )
    )


def no_such_axis(name: str, axis: int, shape: Shape) -> ShapeError:
    return ShapeError(
        explain(
            f"nn.vmap was asked to map axis {axis} of {name} of shape {shape}",
            "it has no such axis",
            "pass in_axes=None for a module that all lanes share: "
            "nn.vmap(f, in_axes=(None, 0))(model, xs)",
        )
    )


def other_numbers_of_lanes(sizes: Mapping[int, str]) -> ShapeError:
    listed = ", ".join(f"{n} ({who})" for n, who in sizes.items()) or "none"
    return ShapeError(
        explain(
            f"nn.vmap found these numbers of lanes: {listed}",
            "all mapped axes have one size",
            "choose the axes with in_axes, None for what all lanes share: "
            "nn.vmap(f, in_axes=(None, 0))(model, xs); or pass axis_size",
        )
    )


def lanes_disagree(name: str) -> StateWriteError:
    return StateWriteError(
        explain(
            f"wrote to {name!r} under nn.vmap",
            "all lanes share the module, and each has another value for it",
            "map the module too (in_axes=0, a stack of modules); or call the layer outside nn.vmap, "
            "on the whole batch; or put it into eval mode",
        )
    )


# --------------------------------------------------------------------------------------------------
# Loops and branches


def no_pair_of_a_step(kind: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"a scanned function returned {kind}",
            "a step gives the next carry and an output",
            "return a pair: return carry, y",
        )
    )


def carried_and_cut(name: str) -> ShapeError:
    return ShapeError(
        explain(
            f"a loop was given {name!r} in its carry and in its xs",
            "what is carried is whole, what is in xs is cut into steps: it cannot be both",
            "pass the module in one place, and what steps share in a module of its own",
        )
    )


def other_lengths(lengths: Mapping[int | None, str]) -> ShapeError:
    listed = ", ".join(f"{'no axis' if n is None else n} ({who})" for n, who in lengths.items())
    return ShapeError(
        explain(
            f"a loop was given xs of these lengths: {listed}",
            "each step takes one slice of the first axis of every array, also of every array of a module",
            "stack modules first, nn.vmap(make, axis_size=n)() or jax.tree.map(lambda *v: "
            "jnp.stack(v), *modules); put what all steps share into the carry",
        )
    )


def no_batch_size(given: object) -> ValueError:
    return ValueError(
        explain(
            f"called nn.map with batch_size={given!r}",
            "it is the number of calls that run side by side",
            "an integer from 1; 0 runs all side by side, None one after the other",
        )
    )


def no_branch(name: str, kind: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"passed {kind} as {name}",
            "each branch is called with the operands, and both give the same structure",
            "a function, a Module or a method of one: lambda *operands: ... for one that does little",
        )
    )


def array_changed_by_step(name: str, before: str, after: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"a step of a loop made {name!r} {after}; it was {before}",
            "each step goes on with what the one before has left, and runs the same code",
            "keep shape and dtype: self.count = self.count + 1 for integers, "
            "value.astype(self.mean.dtype)",
        )
    )


def written_the_second_time(name: str) -> StateWriteError:
    return StateWriteError(
        explain(
            f"a step of a loop wrote to {name!r} when it was traced a second time, and not the first time",
            "the step depends on something in Python that it changes, and is not one function",
            "keep what changes in buffers",
        )
    )


def other_carry() -> StructureChangeError:
    return StructureChangeError(
        explain(
            "a step of a loop returned a carry of another structure, or other modules",
            "each step goes on with the carry of the one before",
            "return the same modules, changed in place, and arrays in the same places",
        )
    )


def write_without_order(what: str) -> StateWriteError:
    return StateWriteError(explain(f"{what}, in nn.associative_scan", *NO_ORDER))


def branches_differ(
    names: tuple[str, str], did: str, found: tuple[object, object], part: str
) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"{names[0]} {did} {found[0]} in {part}, and {names[1]} {did} {found[1]}",
            "which one runs is decided when the compiled code runs, so all of them give "
            "arrays of the same shapes and dtypes in the same places",
            "make them agree: value.astype(dtype), jnp.zeros_like(value) for what is missing",
        )
    )


# --------------------------------------------------------------------------------------------------
# capture


def no_such_submodules(names: Sequence[str], module: str, known: Sequence[str]) -> UnknownNameError:
    return UnknownNameError(
        explain(
            f"nn.capture was asked for {names or 'no names'}",
            f"{module} has the submodules {known}",
            "use the names of named_modules()",
        )
    )


def captured_inside(name: str) -> TraceLeakError:
    return TraceLeakError(
        explain(
            f"nn.capture met {name!r} inside an inner transformation (vmap, scan, grad, remat ...)",
            "its output does not exist outside of it",
            "capture inside the inner function and return the outputs from it, or leave the name out: "
            "nn.capture(model, names=[...])",
        )
    )


def module_captured() -> ArgumentError:
    return ArgumentError(
        explain(
            "nn.capture(grads=True) met an output that holds a module",
            "gradients are those of arrays",
            "return the module's arrays, or capture without grads=True",
        )
    )


def other_shapes_the_second_time() -> ShapeError:
    return ShapeError(
        explain(
            "nn.capture(grads=True) called a module again with the same arguments, and its "
            "submodules returned outputs of other shapes",
            "gradients have the shapes of the outputs",
            "let the shapes of outputs depend on nothing but the arguments and the module",
        )
    )


def cotangent_of_other_structure(given: str, own: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"backward was given a cotangent of {given}",
            f"the output of the captured call is of {own}",
            "pass the gradient of a loss with respect to the output: "
            "backward(jax.grad(loss_fn)(out))",
        )
    )


def cotangent_of_other_shape(given: Shape, own: Shape) -> ShapeError:
    return ShapeError(
        explain(
            f"backward was given a cotangent of shape {given}",
            f"the output of the captured call has shape {own}",
            "pass the gradient of a loss with respect to the output; for the gradient of the sum "
            "of all outputs, jnp.ones_like(out)",
        )
    )


def cotangent_of_other_dtype(given: Dtype, own: Dtype) -> DtypeError:
    return DtypeError(
        explain(
            f"backward was given a cotangent of dtype {given}",
            f"the output of the captured call has dtype {own}",
            "cast it: cotangent.astype(out.dtype)",
        )
    )


# --------------------------------------------------------------------------------------------------
# statefulize; `did` says what was called, since every bridge makes such modules


def no_function(did: str, kind: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{did} with {kind} as the function",
            "a module is called, and calls it",
            "pass the function first, then its arrays: nn.statefulize(fn, params)",
        )
    )


def no_array_in_tree(did: str, kind: str, name: str, noun: str, instead: str) -> RegistrationError:
    return RegistrationError(
        explain(
            f"{did} with {kind} under {name!r} in the {noun}",
            "only arrays become parameters and buffers",
            instead,
        )
    )


def name_not_possible(did: str, name: str, why: str) -> RegistrationError:
    return RegistrationError(
        explain(
            f"{did} with an array named {name!r}",
            why,
            "give its key in the tree another name, here and in the function",
        )
    )


def name_not_unique(did: str, name: str, where: str) -> RegistrationError:
    return RegistrationError(
        explain(
            f"{did} with an array named {name!r}, which is {where}",
            "names are the path in the tree, joined by dots, and each belongs to one array",
            "give one of the keys another name, here and in the function",
        )
    )


def no_new_state(module: str, kind: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"the function of {module} returned {kind}",
            "a function with state returns two things, its output and the new state",
            "return out, new_state; or make the module without state: nn.statefulize(fn, params)",
        )
    )


def state_of_other_structure(module: str, difference: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"the function of {module} returned a state of another structure: {difference}",
            "the state belongs to buffers that were registered when the module was made",
            "return a state with the keys of the one it was given",
        )
    )


def changed_static_argument(function: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"{function} changed a static argument",
            "it is compiled in, and a copy: the change would happen once, while tracing, and be lost",
            "return what has changed, or change the argument outside, before the call",
        )
    )


def not_importable(cls: type, root: type) -> PicklingError:
    return PicklingError(
        explain(
            f"pickled the function of {root.__name__}, with the class {cls.__module__}.{cls.__qualname__}",
            "a pickle holds the name of a class, and who reads it imports the class; one that is made in a "
            "function, or has been replaced, is not found by its name",
            f"move class {cls.__name__} to the top of a module; or cloudpickle.dumps(...), which takes the "
            "class along",
        )
    )
