"""What the core says when it refuses something: one function for each refusal, named as what happened.

A function returns the exception, or the text of a warning, and the code that refuses raises it there. So
the texts are read side by side, and the code without them. They are given names, shapes and dtypes,
never objects of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.errors import (
    ArgumentError,
    DtypeError,
    MissingRngError,
    RegistrationError,
    ShapeError,
    StateDictError,
    StateWriteError,
    StructureChangeError,
    TakenNameError,
    TraceLeakError,
    UninitializedModuleError,
    UninitializedParameterError,
    UnknownAttributeError,
    UnknownNameError,
    explain,
    name_of,
)

Subject: TypeAlias = str | Callable[[], str]  # a name, or a function that gives it
Shape: TypeAlias = tuple[int, ...]
Dtype: TypeAlias = object  # whatever prints as its name
Reason: TypeAlias = tuple[str, str]  # why something cannot work, and what does

SHOWN = 8  # names in a message


E = TypeVar("E", bound=Exception)


def _refusal(error: type[E], what: str, why: str, instead: str) -> E:
    return error(explain(what, why, instead))


def listed(texts: Sequence[str], shown: int = SHOWN) -> str:
    """Return the first few texts in one line, and how many more there are."""
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more


def named(names: Iterable[str]) -> str:
    """Return the first few names in one line, in quotes, and how many more there are."""
    return listed([repr(n) for n in names])


# --------------------------------------------------------------------------------------------------
# Habits of other libraries


def name_of_habit(message: str, answer: Reason) -> UnknownAttributeError:
    return _refusal(UnknownAttributeError, message, *answer)


def argument_of_habit(cls: str, method: str, name: str, answer: Reason) -> ArgumentError:
    what = f"{cls}.{method}() got an unexpected argument {name!r}"
    return _refusal(ArgumentError, what, *answer)


def field_as_argument(cls: str, name: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"{cls}.__init__() got an unexpected keyword argument {name!r}",
        f"{name!r} is annotated in the class, which makes it no argument",
        f"def __init__(self, {name}): super().__init__(); self.{name} = {name}",
    )


def array_for_an_option(
    cls: str, name: str, needed: Sequence[str], inputs: Sequence[str]
) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"made nn.{cls} with an array as {name!r}",
        "a layer is built of its settings first, and called with arrays then",
        f"nn.{cls}({', '.join(needed)})({', '.join(inputs)})",
    )


def flag_over_method(cls: str, name: str, answer: Reason) -> RegistrationError:
    return _refusal(RegistrationError, f"assigned {name!r} of {cls}", *answer)


def no_callable(function: str, kind: str, example: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"{function} takes a function or a Module, got {kind}",
        "it returns another function, which calls the one that it was given",
        example,
    )


def to_shape(name: str, given: Shape, own: Shape) -> str | None:
    """Return the code that gives an array another shape and mixes up no numbers; None if there is none."""
    if [n for n in given if n != 1] == [n for n in own if n != 1]:
        return f"{name}.reshape({own})"
    return f"{name}.T" if len(given) == 2 and given == own[::-1] else None


def array_of(value: object, name: str) -> str:
    """Return the code that makes an array of a value, or says what becomes of it."""
    if value is None:
        return "forward gives None where it ends without a return statement: return out"
    library = type(value).__module__.partition(".")[0]
    if library == "torch" and hasattr(value, "numpy"):
        cut = ".detach()" if getattr(value, "requires_grad", False) else ""
        return f"jnp.asarray({name}{cut}.numpy())"
    if isinstance(value, np.ndarray):  # of objects or texts
        return f"jnp.asarray({name}.astype(np.float32)), if it holds numbers"
    return f"jnp.asarray({name})"


def size_for_an_input(function: str, size: Sequence[int]) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"{function} was given the size {tuple(size)} and no array",
        "the model is called, and takes arrays; one without numbers has a shape and a dtype",
        f'{function}(model, jax.ShapeDtypeStruct({tuple(size)}, "float32"))',
    )


def no_inputs(function: str, names: Sequence[str]) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"{function} was given a model without inputs: {listed(names)}",
        "it calls the model",
        f"{function}(model, x)",
    )


def no_usage(message: str, code: str) -> ArgumentError:
    return _refusal(ArgumentError, message, "it takes other arguments, or in another order", code)


def unknown_keyword(cls: str, name: str, known: Sequence[str], call: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"{cls}.__init__() got an unexpected keyword argument {name!r}",
        f"its arguments are {', '.join(known)}" if known else "it takes none",
        call,
    )


def no_slot(name: str, known: Sequence[str], code: str) -> UnknownAttributeError:
    return _refusal(
        UnknownAttributeError,
        f"assigned {name!r} of an optimizer",
        f"no step would look at it; there {'is' if len(known) == 1 else 'are'} {listed(known)}",
        code,
    )


def no_floating_dtype(call: str, given: str, why: str) -> DtypeError:
    return _refusal(DtypeError, call.format(given), why, call.format("jnp.bfloat16"))


def no_dtype(given: object) -> ArgumentError:
    name = str(given).rpartition(".")[2]  # that of torch.float32, for instance
    known = name if hasattr(getattr(jnp, name, None), "dtype") else "float32"
    is_device = hasattr(given, "type") and hasattr(given, "index")
    return _refusal(
        ArgumentError,
        f"was given {given!r} as a dtype",
        "dtypes are those of numpy and JAX, and places are devices of JAX or their names",
        f'device="{given}"' if is_device else f"dtype=jnp.{known}",
    )


def cast_to_integers(dtype: Dtype) -> ArgumentError:
    return _refusal(
        ArgumentError,
        "nn.Module.to only accepts floating point or complex dtypes, but got desired "
        f"dtype={dtype}",
        "parameters of integers cannot be trained",
        f"model.to(jnp.float32); or model.type(jnp.{dtype}) once its parameters are frozen",
    )


def no_forward(cls: str) -> NotImplementedError:
    return _refusal(
        NotImplementedError,
        f'Module [{cls}] is missing the required "forward" function',
        "a call of a module is a call of its forward",
        "def forward(self, x): ...; nn.Sequential(*layers) calls layers one after the other",
    )


def no_size(shape: Sequence[object]) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"made a parameter of shape {tuple(shape)}",
        "the sizes of a layer are whole numbers, and n / 2 is none",
        "n // 2, or int(n)",
    )


def negative_size(shape: Sequence[int]) -> ShapeError:
    return _refusal(
        ShapeError,
        f"made a parameter of shape {tuple(shape)}",
        "sizes are counted from 0",
        f"max(0, {min(shape)}), or what the size should have been",
    )


def parameter_by_number(number: object) -> ArgumentError:
    by_name = isinstance(number, str)
    return _refusal(
        ArgumentError,
        f"asked for {'' if by_name else 'number '}{number!r} of model.parameters()",
        "it yields the parameters, and is no list of them",
        f"model.get_parameter({number!r})"
        if by_name
        else f"list(model.parameters())[{number!r}]; model.get_parameter(name)",
    )


def number_of_parameters() -> ArgumentError:
    return _refusal(
        ArgumentError,
        "asked for the length of model.parameters()",
        "it yields the parameters, and is no list of them",
        "sum(p.size for p in model.parameters()), the numbers in them; len(list(model.parameters()))",
    )


def list_of_parameters() -> ArgumentError:
    return _refusal(
        ArgumentError,
        "passed model.parameters() to a function of trees, such as tx.init of optax",
        "it yields the parameters one by one, and without their names",
        "opt = nn.Optimizer(model, tx), which keeps the state of tx; or fn, params = "
        "nn.functionalize(model), then tx.init(params)",
    )


# --------------------------------------------------------------------------------------------------
# Arrays and boxes


def sequence_for_an_array(kind: str, subject: Subject) -> RegistrationError:
    return _refusal(
        RegistrationError,
        f"wrote a {kind} to {name_of(subject)}",
        "only arrays can be held",
        "convert it first: jnp.asarray(value)",
    )


def no_array(value: object, subject: Subject) -> RegistrationError:
    return _refusal(
        RegistrationError,
        f"wrote an object of type {type(value).__name__} to {name_of(subject)}",
        "only arrays can be held",
        f"pass a jax.Array or a numpy array: {array_of(value, 'value')}",
    )


def deleted_array(subject: Subject) -> RuntimeError:
    return _refusal(
        RuntimeError,
        f"used an array that has been deleted as the value of {name_of(subject)}",
        "its memory was given away, by a call with donate= or donate_argnums=",
        "keep what outlives donation: module.state_dict(), copy.deepcopy(module), or a copy, "
        "jnp.array(parameter.value)",
    )


def attribute_of_a_box(name: str) -> UnknownAttributeError:
    """Build the error for setting what only a Parameter has on an array."""
    return _refusal(
        UnknownAttributeError,
        f"set .{name} of an array",
        "it is no Parameter: buffers and computed weights read as plain arrays, and the write would be lost",
        "module.running_mean = new writes a buffer; layer.parametrizations.weight.original is the "
        "Parameter of a computed weight",
    )


def out_of_range(label: str, index: object, shape: Shape) -> IndexError:
    """Build the error for an index of a parameter that has no such row."""
    return _refusal(
        IndexError,
        f"indexed {label} of shape {shape} with {index!r}",
        "the index is out of range, where JAX drops what is written and reads the last row instead",
        "an index within the shape; to drop it on purpose, p.value = p.value.at[i].set(new)",
    )


def other_shape(label: str, new: Shape, old: Shape) -> ShapeError:
    return _refusal(
        ShapeError,
        f"wrote an array of shape {new} to {label} of shape {old}",
        "training keeps the shape of a parameter; another one is mostly a broadcast "
        "that was not meant",
        "write an array of the same shape, or p.data = array to replace it on purpose",
    )


def other_dtype(label: str, new: Dtype, old: Dtype) -> DtypeError:
    return _refusal(
        DtypeError,
        f"wrote an array of dtype {new} to {label} of dtype {old}",
        "the parameter's dtype would drift silently",
        "cast it, p.value = array.astype(p.dtype), or p.data = array to replace it on purpose",
    )


def dtype_without_gradients(dtype: Dtype) -> DtypeError:
    return _refusal(
        DtypeError,
        f"made a trainable Parameter of dtype {dtype}",
        "gradients exist for floating and complex dtypes only",
        "nn.Parameter(array, requires_grad=False), or nn.Buffer(array)",
    )


def integers_would_wrap(what: str, dtype: Dtype, lowest: int, highest: int) -> DtypeError:
    return _refusal(
        DtypeError,
        what,
        f"JAX's 64-bit types are off, and {dtype} has {lowest} to {highest}: they would wrap",
        'call jax.config.update("jax_enable_x64", True) before the model is built',
    )


def dtype_of_64_bits(dtype: Dtype) -> DtypeError:
    return _refusal(
        DtypeError,
        f"asked for {dtype}",
        "64-bit types are off in JAX, which would silently give 32 bits",
        'jax.config.update("jax_enable_x64", True) at the start of the program',
    )


# --------------------------------------------------------------------------------------------------
# Parameters without a shape, or without numbers; devices


def used_without_shape(label: str) -> UninitializedParameterError:
    return _refusal(
        UninitializedParameterError,
        f"used {label}, which has no shape yet",
        "a lazy module learns its sizes from its first input",
        "call the model once on an example, outside nn.jit; or nn.materialize(model, *inputs), "
        "which computes nothing",
    )


def read_without_shape(name: str, label: str) -> UninitializedParameterError:
    return _refusal(
        UninitializedParameterError,
        f"read {name!r} of {label}",
        "Can't access the shape or the values of an uninitialized parameter or buffer",
        "call the model once on an example, or nn.materialize(model, *inputs)",
    )


def no_numbers(label: str) -> UninitializedParameterError:
    return _refusal(
        UninitializedParameterError,
        f"computed with {label}, which is on the meta device",
        "it has a shape and a dtype and no numbers",
        "nn.materialize(module) draws initial values, load_state_dict(...) loads them; "
        "jax.eval_shape(...) computes shapes alone",
    )


def moved_from_meta() -> NotImplementedError:
    return _refusal(
        NotImplementedError,
        "moved a parameter or buffer that is on the meta device",
        "Cannot copy out of meta tensor; no data!",
        "module.to_empty(device=...), or nn.materialize(module, device=...) which draws "
        "initial values",
    )


def no_device(given: object) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"was given {given!r} as a device",
        "arrays are put on a jax.Device or a jax.sharding.Sharding",
        'device=jax.devices()[0], device="cpu", or device="meta" for shapes alone',
    )


def absent_device(given: str, have: Sequence[str], error: Exception) -> ValueError:
    platform = given.partition(":")[0]
    instead = f'device="{have[0]}"'
    if platform in ("gpu", "cuda") and not any(d.startswith(("gpu", "cuda")) for d in have):
        instead = f'pip install -U "jax[cuda13]" on a machine with a GPU of NVIDIA; {instead} here'
    return _refusal(
        ValueError,
        f"was given {given!r} as a device",
        f"JAX does not have it (it has {', '.join(have)}): {error}",
        instead,
    )


# --------------------------------------------------------------------------------------------------
# Writes that would be lost, or would leak (laws 4, 5 and 8)

LOST_IN_RAW_TRANSFORM: Reason = (
    "this module was rebuilt by a plain JAX transformation (jax.jit, jax.grad, jax.vmap, "
    "jax.tree.map ...), which never looks at it again, so the write would be lost",
    "use nn.jit, nn.value_and_grad or nn.vmap, which write back; or a pure call, "
    "functionalize(module, mutable=True); or return the updated module: "
    "module = nn.mutable(module) first, write, and return it. "
    "Call train() and eval() outside the transformation",
)

LOST_AFTER_THE_CALL: Reason = (
    "a backward hook runs after the traced call has given its state back, so the write would be lost",
    "return what the hook computes: nn.capture(..., grads=True) gives gradients as results; or write to a "
    "module outside of compiled code",
)


def write_would_be_lost(subject: Subject, lost: Reason | None) -> StateWriteError:
    why, instead = lost or LOST_IN_RAW_TRANSFORM
    return _refusal(StateWriteError, f"wrote to {name_of(subject)}", why, instead)


def change_in_place_would_be_lost(label: str, lost: Reason | None) -> StateWriteError:
    why, instead = lost or LOST_IN_RAW_TRANSFORM
    return _refusal(StateWriteError, f"changed {label!r} in place", why, instead)


def owner_has_ended(subject: Subject) -> TraceLeakError:
    return _refusal(
        TraceLeakError,
        f"wrote to {name_of(subject)}",
        "it belongs to a traced call that has ended, or to one that is not around this line",
        "return values from the traced function instead of keeping its modules",
    )


def write_while_tracing(subject: Subject) -> TraceLeakError:
    return _refusal(
        TraceLeakError,
        f"wrote to {name_of(subject)} inside a function that JAX traces "
        "(jax.jit, lax.scan, lax.cond, jax.checkpoint, checkify ...)",
        "what is written to belongs to no argument of that function: the write would happen once, "
        "while tracing, and leave a dead tracer or a stale value behind",
        "pass every module that changes as an argument to nn.jit (nn.scan, nn.cond, nn.checkify ...), "
        "the optimizer too: step(model, opt, x); or return the new value and write it outside",
    )


def value_would_outlive_its_trace(subject: Subject) -> TraceLeakError:
    return _refusal(
        TraceLeakError,
        f"wrote a traced value to {name_of(subject)}",
        "the module lives outside the transformation that made the value, so the value "
        "would outlive its trace",
        "pass the module as an argument to nn.value_and_grad, nn.vmap or nn.jit, which write back, "
        "and an optimizer too: step(model, opt, x); or return the value (has_aux=True) and write it "
        "outside",
    )


def traced_attribute(label: str, name: str, is_setting: bool = False) -> TraceLeakError:
    return _refusal(
        TraceLeakError,
        f"assigned a traced value to the attribute {label!r}",
        "a plain attribute is static: the value would outlive the function being traced",
        f"build layers outside of compiled code, or with plain numbers: {label.partition('.')[0]}(3, 1)"
        if is_setting
        else (
            "nn.next_key(), which gives a new key at each call; or "
            if "key" in name.split("_")
            else ""
        )
        + f"register it in __init__: self.register_buffer({name!r}, array, "
        "persistent=False); or collect outputs of submodules with nn.capture",
    )


def persistence_of_a_clone(label: str) -> StructureChangeError:
    return _refusal(
        StructureChangeError,
        f"set persistent of {label} inside of a transformation",
        "what a module has in its state dict is part of its structure, and would be lost",
        "set it outside",
    )


# --------------------------------------------------------------------------------------------------
# Changes of what compiled code took in as a constant (law 6): warnings

_AS_AN_ARGUMENT = "pass the module to the compiled function as an argument"


def stale_value(label: str, where: str) -> str:
    return explain(
        f"wrote to {label}",
        f"compiled code took its old value as a constant at {where}, and will go on using it",
        _AS_AN_ARGUMENT,
    )


def stale_structure(subject: Subject, where: str) -> str:
    return explain(
        f"changed {name_of(subject)}",
        f"compiled code took the module in as it was at {where}, and will go on using that",
        _AS_AN_ARGUMENT,
    )


# --------------------------------------------------------------------------------------------------
# Registration (law 7)


def before_super_init(cls: str, what: str) -> UninitializedModuleError:
    return _refusal(
        UninitializedModuleError,
        f"{what} of {cls} before Module.__init__() call",
        "nothing can be registered before the base class has made the registries",
        f"call super().__init__() first in {cls}.__init__",
    )


def captured_member(where: str, kind: str) -> RegistrationError:
    """Build the error for a module or parameter that a function in an attribute refers to."""
    return _refusal(
        RegistrationError,
        f"kept a function that refers to a {kind} in {where}",
        "a copy of the model, such as compiled code works on, would call the original's, and what is not "
        "registered is missing in parameters() and state_dict()",
        "write a method, def call(self, x), which finds self.layer in the model it is called on; "
        "nn.Ref(layer) for a layer that belongs to another module",
    )


def ref_to_something_else(kind: str) -> RegistrationError:
    return _refusal(
        RegistrationError,
        f"made nn.Ref of an object of type {kind}",
        "only modules and parameters are referred to",
        "assign other objects as they are; put several modules into nn.ModuleList first",
    )


def reserved_attribute(name: str, cls: str) -> RegistrationError:
    return _refusal(
        RegistrationError,
        f"assigned the attribute {name!r} of a {cls}",
        "nn.Module keeps something of its own under that name",
        f"another name, such as {name + '_'!r}",
    )


def foreign_layer(where: str, does: str, kind: str, library: str) -> str:
    instead = {
        "torch": "nn.bridge.torch.from_torch(module, x)",
        "flax": "nn.bridge.flax.from_nnx(module)",
        "equinox": "nn.bridge.equinox.from_equinox(module)",
    }
    return explain(
        f"assigned {where}, which {does} a {kind} of {library}",
        "it is a plain value here: its numbers are neither trained, nor saved, nor moved",
        f"self.layer = {instead[library]}, which makes a module of it; or a layer of this package",
    )


def array_over_parameter(kind: str, label: str, name: str) -> RegistrationError:
    return _refusal(
        RegistrationError,
        f"cannot assign a {kind} as parameter {label!r} (nn.Parameter or None expected)",
        "the parameter would become a plain array and never be trained again",
        f"module.{name}.value = array to change its value, or "
        f"module.{name} = nn.Parameter(array) to replace it",
    )


def assigned_over_module(kind: str, name: str, cls: str, instead: str) -> RegistrationError:
    return _refusal(
        RegistrationError,
        f"cannot assign a {kind} as child module {name!r} of {cls} "
        "(torch.nn.Module or None expected)",
        "the module registered there would be lost",
        f"{instead}, or delete it first: del module.{name}",
    )


def buffer_without_array(kind: str, label: str) -> RegistrationError:
    return _refusal(
        RegistrationError,
        f"cannot assign a {kind} as buffer {label!r} (an array, Buffer or None expected)",
        "a buffer holds an array",
        "assign jnp.asarray(value)",
    )


def name_in_the_class(name: str, noun: str, cls: str) -> TakenNameError:
    return _refusal(
        TakenNameError,
        f"attribute {name!r} already exists: assigned a {noun} to it",
        f"{cls}.{name} is an attribute of the class, which Python finds first",
        f"another name, or leave {name!r} out of the class; an annotation alone may stay",
    )


def registered_something_else(
    kind: str, noun: str, name: str, required: str, instead: str
) -> RegistrationError:
    return _refusal(
        RegistrationError,
        f"cannot assign '{kind}' object to {noun} '{name}'",
        f"{required} required",
        f"register_{noun}({name!r}, {instead})",
    )


def no_child(what: str, name: object) -> RegistrationError:
    return _refusal(
        RegistrationError,
        what,
        f"only modules can be children, and {name!r} would not be found in it",
        "pass an instance of nn.Module; a plain function becomes one with nn.Lambda(fn)",
    )


def no_module_in(where: str, value: object) -> RegistrationError:
    kind = type(value).__name__
    what, instead = f"{kind} is not a Module subclass: put into {where}", "an nn.Module"
    if isinstance(value, type):
        what = f"put the class {value.__name__} into {where}, and not a module of it"
        ours = value.__module__.startswith("statefulnn.")
        instead = f"{'nn.' if ours else ''}{value.__name__}()"
    elif isinstance(value, (list, tuple)) and where == "Sequential":
        instead = f"nn.Sequential(*layers) of a {kind}"
    elif callable(value):
        instead = f"nn.Lambda({getattr(value, '__name__', 'fn')})"
    return _refusal(
        RegistrationError, what, "only modules can be called, counted and saved there", instead
    )


def not_in_a_box(kind: str, name: object) -> RegistrationError:
    return _refusal(
        RegistrationError,
        f"put an object of type {kind} under {name!r} into a module's registry",
        "parameters and buffers are held in boxes there",
        f"setattr(module, {name!r}, value), or wrap it: nn.Parameter(value), nn.Buffer(value)",
    )


# --------------------------------------------------------------------------------------------------
# Split, merge and names (law 10)


def no_module(kind: str, function: str, hint: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"called {function} with an object of type {kind}",
        "it works on modules",
        f"pass {hint}",
    )


def other_number_of_leaves(moduledef: str, given: int, expected: int) -> ShapeError:
    return _refusal(
        ShapeError,
        f"merged {moduledef} with {given} leaves",
        f"it has {expected} leaves",
        "pass the list that nn.split gave, changed in place or mapped one to one",
    )


def pickled_moduledef() -> TypeError:
    return TypeError("a ModuleDef refers to live classes and functions: pickle the module instead")


def unknown_names(
    function: str, unknown: Sequence[str], moduledef: str, known: Sequence[str]
) -> UnknownNameError:
    some = ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")
    return _refusal(
        UnknownNameError,
        f"{function} was given unknown names: {listed(unknown)}",
        f"{moduledef} has {some or 'no parameters or buffers'}",
        "use the names of named_parameters() and named_buffers()",
    )


def filter_of_no_text(what: str, where: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"{where} was given {what}",
        "names are texts, and a filter chooses among them",
        'pass a name, a pattern such as "head.*", a list of both, or a function of the name',
    )


def nothing_chosen(
    unknown: Sequence[str], names: Sequence[str], near: Sequence[str], where: str
) -> UnknownNameError:
    of_them, all_names, guesses = (named(some) for some in (unknown, names, near))
    return _refusal(
        UnknownNameError,
        f"{where} was asked for {of_them}, of which there is none",
        f"the names are {all_names}" if names else "there are no names",
        f"did you mean {guesses}?" if near else 'one of these names, or a pattern such as "head.*"',
    )


def filter_chooses_nothing(names: Sequence[str], where: str) -> UnknownNameError:
    return _refusal(
        UnknownNameError,
        f"{where} was given a filter that chooses nothing",
        f"the names are {named(names)}" if names else "there are no names",
        "a function that is true of some name, such as lambda name: 'head' in name; or a pattern",
    )


def part_of_no_module(kind: str, where: str) -> UnknownNameError:
    return _refusal(
        UnknownNameError,
        f"{where} was given only= a {kind} that is not in the module",
        "parts are found by identity, and another object is: a copy, such as the one that nn.jit passes; "
        "a layer that was replaced since; one of a stack, which holds one array for all its layers",
        'by name, only="head.*"; or only=model.head, of the very model that is passed',
    )


def nothing_trainable_chosen(names: Sequence[str], where: str) -> UnknownNameError:
    frozen = listed([repr(n) for n in names])
    return _refusal(
        UnknownNameError,
        f"{where} was given only= a filter that chooses {f'{frozen}, all frozen' if names else 'nothing'}",
        "parameters with requires_grad=True are trained, and none of them is left",
        "model.head.requires_grad_(True) before"
        if names
        else "a function that is true of some name, only=lambda name: 'head' in name; or a pattern",
    )


def only_without_modules(where: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"{where} was given only=, and differentiates by no module",
        "it chooses among the parameters of modules, and what is differentiated are arrays or parameters",
        'pass the model where argnums says: nn.grad(loss_fn, only="head.*")(model, x)',
    )


# --------------------------------------------------------------------------------------------------
# State dicts


def no_state_dict(cls: str, given: object) -> ArgumentError:
    instead = "model.load_state_dict(other.state_dict())"
    if isinstance(given, str) or hasattr(given, "__fspath__"):
        instead = f"model.load_state_dict(nn.load({str(given)!r}))"
    return _refusal(
        ArgumentError,
        f"Expected state_dict to be dict-like, got {type(given)}.",
        f"{cls} finds arrays by name",
        instead,
    )


def key_of_no_text(cls: str, key: object, kind: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"load_state_dict of {cls} was given the key {key!r} of type {kind}",
        "entries are found by the dotted names of parameters and buffers",
        "use names such as 'fc.weight'; module.state_dict() shows them",
    )


def entry_of_no_array(key: str, kind: type) -> str:
    return f'While copying the parameter named "{key}", expected a jax or numpy array but received {kind}'


def entry_of_other_shape(key: str, given: Shape, have: Shape) -> str:
    return (
        f"size mismatch for {key}: copying a param with shape {given} from "
        f"checkpoint, the shape in current model is {have}."
    )


def entry_of_other_dtype(key: str, given: Dtype, have: Dtype) -> str:
    return (
        f"dtype mismatch for {key}: copying an array of dtype {given} from checkpoint, the "
        f"dtype in current model is {have}."
    )


def entries_of_one_box_differ(first: str, key: str, noun: str) -> str:
    return (
        f'"{first}" and "{key}" are names of one {noun} and have different values in the '
        "checkpoint: remove the wrong one, or load into a model where they are not tied"
    )


OF_AN_OPTIMIZER = "slots of an optimizer"  # in place of a prefix


def state_dict_does_not_fit(
    cls: str,
    problems: Sequence[str],
    has_tensors: bool = False,
    prefix: str = "",
    has_kernels: bool = False,
    misshapen: Sequence[tuple[str, Shape, Shape]] = (),
    nested: str = "",
) -> StateDictError:
    instead = "rename the entries, or pass strict=False to skip names that do not match"
    if misshapen:
        key, given, own = misshapen[0]
        entry = f"state_dict[{key!r}]"
        code = to_shape(entry, given, own)
        instead = f"{entry} = {code}" + (
            "" if len(misshapen) == 1 else ", and the like for the others"
        )
        if code is None:
            instead = (
                f"a model of the checkpoint's sizes; or without these entries: state_dict.pop({key!r}), "
                "then model.load_state_dict(state_dict, strict=False)"
            )
    elif nested:
        instead = f"model.load_state_dict(checkpoint[{nested!r}]), which has these names"
    elif prefix == OF_AN_OPTIMIZER:
        instead = "opt.load_state_dict(state_dict): these are the slots of an optimizer"
    elif prefix:
        instead = (
            f"nn.utils.consume_prefix_in_state_dict_if_present(state_dict, {prefix!r}) before, which "
            "cuts off what stands in front of the names"
        )
    elif has_kernels:
        instead = (
            "nn.bridge.flax.from_nnx(module) or from_linen(...) for models of Flax; by hand, "
            'state_dict["weight"] = state_dict.pop("kernel").T for nn.Linear'
        )
    if has_tensors:
        instead = (
            "{name: t.numpy() for name, t in state_dict.items()}; nn.load(path) reads torch's files"
        )
    return _refusal(
        StateDictError,
        "\n\t".join([f"Error(s) in loading state_dict for {cls}:", *problems]),
        "names, shapes and kinds of dtype have to match, integers have to fit, and names of "
        "one parameter have one value; the module was left as it was",
        instead,
    )


# --------------------------------------------------------------------------------------------------
# Random numbers (law 11)

NO_KEY = (
    "drew random numbers in a pure call that was given no key",
    "a pure function gives the same result for the same arguments, so it has no generator of its own",
    "pass one: functional_call(..., rng=key), fn(params, x, rng=key); or call module.eval() first if "
    "nothing should be random",
)


def no_seed(kind: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"seeded a generator with an object of type {kind}",
        "a seed is an integer, and a key belongs to a stream of its own",
        "nn.manual_seed(0); with nn.rng_scope(key): out = model(x)",
    )


def no_generator(what: str, why: str, instead: str) -> MissingRngError:
    return _refusal(MissingRngError, what, why, instead)


def draw_in_a_plain_transformation(why: str, is_vmap: bool = False) -> MissingRngError:
    stacks = "nn.vmap(lambda: nn.Linear(3, 1), axis_size=n)() builds n layers; " if is_vmap else ""
    return no_generator(
        "drew random numbers inside a plain JAX transformation",
        why,
        f"{stacks}nn.jit, nn.vmap, nn.scan and nn.remat carry the generator as state; or pass a key: "
        "functional_call(..., rng=key), fn(params, x, rng=key), with nn.rng_scope(key)",
    )


def no_generator_state(given: str) -> DtypeError:
    return _refusal(
        DtypeError,
        f"called Generator.set_state with {given}",
        "a state is four words, uint32[4]; others would be cut off, or be another stream",
        "pass what get_state() gave; np.asarray(words, np.uint32) of words that were stored",
    )


def seed_of_an_argument() -> MissingRngError:
    return _refusal(
        MissingRngError,
        "asked for the seed of a generator inside of a compiled function",
        "the generator is an argument there, and its seed would be compiled in",
        "ask outside, and pass the number as an argument; get_state() gives the traced state",
    )


# --------------------------------------------------------------------------------------------------
# Hooks, and gradients of whole modules


def apply_of_arrays(cls: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"called apply of a {cls} with something else than one function",
        "it calls a function on every module; a pure function takes the parameters",
        "fn, params = nn.functionalize(model); out = fn(params, x)",
    )


def hook_without_call(kind: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"registered an object of type {kind} as a hook",
        "a hook is called",
        "pass a function",
    )


def second_error_in_a_hook(error: Exception) -> str:
    return (
        f"a forward hook with always_call=True raised {error!r}; the error that made "
        "forward fail is raised instead"
    )


def hooks_see_no_output(cls: str) -> str:
    return (
        f"{cls} has backward hooks, but its output is neither an array "
        "nor a tuple with an array in it: they do not fire. Return an array or a tuple "
        "of arrays."
    )


def outputs_differ(cls: str) -> ShapeError:
    return _refusal(
        ShapeError,
        f"{cls} with backward hooks returned outputs of other shapes or types "
        "when it was called again with the same arguments",
        "the hooks are tied to the shape of the output",
        "let the shapes of outputs depend on nothing but the arguments and the module",
    )


def forward_mode(cls: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"differentiated {cls} in forward mode (jax.jvp, jax.jacfwd)",
        "it has backward hooks, and forward mode has no cotangents to show them",
        "remove the hooks (handle.remove()), or use reverse mode (jax.grad, jax.vjp)",
    )


def gradient_of_nothing(cls: str) -> RuntimeError:
    return _refusal(
        RuntimeError,
        f"a backward hook of {cls} returned a gradient where no input is differentiated",
        "there is no gradient that it could replace",
        "return None; or replace the gradient of the output, in a hook of "
        "register_full_backward_pre_hook",
    )


def gradient_of_no_array(hook: str, kind: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"a {hook} replaced a gradient by an object of type {kind}",
        "a gradient is an array",
        "return a tuple of arrays, or None to keep the gradients as they are",
    )


def gradient_of_other_shape(hook: str, new: Shape, old: Shape) -> ShapeError:
    return _refusal(
        ShapeError,
        f"a {hook} replaced a gradient of shape {old} by one of shape {new}",
        "a gradient has the shape of the array it belongs to",
        "return gradients of the same shapes, or None to keep them as they are",
    )


def gradient_of_other_dtype(hook: str, new: Dtype, old: Dtype) -> DtypeError:
    return _refusal(
        DtypeError,
        f"a {hook} replaced a gradient of dtype {old} by one of dtype {new}",
        "a gradient has the dtype of the array it belongs to",
        "cast it: gradient.astype(old.dtype)",
    )


def gradient_by_copies(names: Sequence[str]) -> str:
    return explain(
        "took a gradient by copies of parameters that the function never reads; it reads the module that "
        f"they belong to: {listed(names, 5)}",
        "jax.grad gives the function copies of its arguments, and a module from a closure has constants, "
        "so the gradient is zero",
        "nn.grad(lambda model: loss(model(x)))(model); or fn, params = nn.functionalize(model) and "
        "jax.grad(lambda params: loss(fn(params, x)))(params)",
    )


def gradient_with_zeros(cls: str, names: Sequence[str]) -> str:
    return explain(
        f"took the gradient of a whole {cls} by a plain JAX transformation (jax.grad, jax.vjp ...), "
        f"with frozen parameters or buffers: {listed(list(map(repr, names)), 5)}",
        "the result holds zeros for them; an optimizer that works on the whole module, such as "
        "optax.adamw, would still move them, by weight decay for instance",
        "grads = nn.grad(loss)(model) and nn.Optimizer(model, tx).step(grads), which leave out what "
        "is not trained; or jax.grad and optax over the params of "
        "fn, params, state = nn.functionalize(model, mutable=True)",
    )


# --------------------------------------------------------------------------------------------------
# Several devices


def spec_of_other_rank(name: str, shape: Shape, spec: object) -> ShapeError:
    return _refusal(
        ShapeError,
        f"laid out {name!r} of shape {shape} by {spec}",
        "a PartitionSpec has at most one entry for each axis of the array",
        f"a spec of at most {len(shape)} entries, such as P(); a pattern that matches fewer names",
    )


def spec_of_unknown_axis(
    name: str, spec: object, axis: object, mesh: dict[Any, int]
) -> UnknownNameError:
    return _refusal(
        UnknownNameError,
        f"laid out {name!r} by {spec}, on a mesh without an axis {axis!r}",
        f"the mesh has {mesh}",
        "an axis of the mesh; or a mesh that has it: "
        f'nn.parallel.init_device_mesh("{jax.default_backend()}", shape, mesh_dim_names=(..., {axis!r}))',
    )


def spec_does_not_divide(
    name: str, shape: Shape, axis: int, spec: object, parts: int
) -> ShapeError:
    return _refusal(
        ShapeError,
        f"laid out {name!r} of shape {shape} by {spec}",
        f"axis {axis} has {shape[axis]} entries, which do not divide into {parts} equal parts",
        "another axis of the array, or None there; or sizes that divide",
    )


def no_spec(given: object, where: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"{where} says {given!r}",
        "a plan has a PartitionSpec or a Sharding for each pattern",
        'jax.P("data"), or jax.P() for a copy on every device',
    )


def no_mesh(given: object, where: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"{where} was given a mesh of type {type(given).__name__}",
        "devices are named by a jax.sharding.Mesh",
        'mesh = jax.make_mesh((jax.device_count(),), ("data",))',
    )


def mesh_without_axis(where: str, axis: str, mesh: dict[Any, int]) -> UnknownNameError:
    return _refusal(
        UnknownNameError,
        f"{where} was to split arrays over the axis {axis!r}",
        f"the mesh has {mesh}",
        f"axis={next(iter(mesh), axis)!r}; or a mesh with an axis of that name",
    )


def names_without_spec(names: Sequence[str]) -> UnknownNameError:
    return _refusal(
        UnknownNameError,
        f"laid out a model by a plan without a pattern for {listed(list(map(repr, names)))}",
        "a plan says for each parameter and buffer where it goes",
        'the pattern "*", which stands for all names that no other one matches: "*": jax.P()',
    )


def name_with_two_specs(name: str, patterns: Sequence[str]) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"laid out {name!r} by a plan where {' and '.join(map(repr, patterns))} say different things",
        "one pattern decides where an array goes",
        'narrower patterns; "*" gives way to every other one',
    )


def too_few_devices(shape: Sequence[int], have: int, platform: str) -> ValueError:
    wanted = int(np.prod(shape))
    more = (
        f"os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count={wanted}' before JAX is "
        f"first used makes {wanted} virtual ones of the processor, to try it out; or "
    )
    return _refusal(
        ValueError,
        f"made a mesh of {tuple(shape)}, {wanted} devices, of {have} devices of {platform!r}",
        "each place of a mesh is a device of its own",
        f"{more if platform == 'cpu' else ''}a smaller mesh",
    )


def wrong_mesh_shape(shape: object, names: object) -> ValueError:
    return _refusal(
        ValueError,
        f"made a mesh of shape {shape!r} with the axes {names!r}",
        "each axis has a number of devices, at least 1, and a name of its own",
        'nn.parallel.init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "model"))',
    )


def no_style(given: object, name: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"nn.parallel.parallelize_module was given {given!r} for {name!r}",
        "each layer is split in a style: an object, not its class or its name",
        '{"*.up": nn.parallel.ColwiseParallel(), "*.down": nn.parallel.RowwiseParallel()}',
    )


def style_of_other_module(style: str, name: str, kind: str, knows: Sequence[str]) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"gave {style} to {name!r}, which is a {kind}",
        f"{style} knows how to split {listed(knows)}",
        "model.to(nn.parallel.Plan(mesh, {pattern: jax.P(...)})) for other layers; a pattern that "
        "matches fewer modules",
    )


def part_of_several_processes(
    mesh: dict[Any, int], axes: tuple[str, ...], processes: Sequence[int]
) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"nn.parallel.shard_batch was given parts of a batch, split over {', '.join(axes)} of {mesh}",
        f"the processes {list(processes)} hold the same part, and may have read different ones",
        "the whole batch in each process, without parts=True; or a mesh whose first axis is split over all "
        "processes",
    )


def sharding_option(option: str) -> ArgumentError:
    return _refusal(
        ArgumentError,
        f"nn.jit was given {option}",
        "arrays say where they lie, and what a call writes to a module goes where the old value lay",
        "model.to(nn.parallel.Plan(mesh, {...})) and nn.parallel.shard_batch(x, mesh) before the call; "
        "jax.lax.with_sharding_constraint(out, sharding) inside for a result",
    )


def several_meshes(places: Sequence[tuple[str, str]]) -> ValueError:
    where = "; ".join(f"{name!r} on {place}" for name, place in places)
    return _refusal(
        ValueError,
        f"called compiled code with arrays on different devices or meshes: {where}",
        "one computation runs on one set of devices, with one mesh if its axes are explicit",
        "put all of them on one mesh: nn.parallel.data_parallel(model, mesh) and "
        "nn.parallel.shard_batch(x, mesh); or model.to(device) and jax.device_put(x, device)",
    )


def part_beside_the_whole(part: str, whole: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"used {part}, which stands for an entry of {whole}, beside it in one call or one model",
            "both stand for parts of one array, and what is written to one, or differentiated by it, would "
            "be lost for the other",
            "pass the model alone and take the layer inside, model.blocks[3]; a parameter that another "
            "module has as well has to be shared by all layers",
        )
    )
