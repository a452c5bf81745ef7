"""What an optimizer says when it refuses something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import jax

from statefulnn.core import habits
from statefulnn.core.errors import (
    ArgumentError,
    DtypeError,
    ShapeError,
    StructureChangeError,
    UnknownNameError,
    explain,
)
from statefulnn.core.refusals import array_of, named, to_shape

Shape = tuple[int, ...]
ADAPT = "report = opt.adapt(), between two steps: it keeps the slots that still fit, and starts the others"


def described(value: object) -> str:
    """Return what kind of thing a value is."""
    if isinstance(value, jax.Array):
        return "an array"
    if isinstance(value, Iterator):
        return "an iterator"
    name = getattr(value, "__name__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"


def no_module(module: object, swapped: bool) -> ArgumentError:
    model = "nn.ModuleList([a, b])" if isinstance(module, (list, tuple)) else "model"
    return ArgumentError(
        explain(
            f"nn.Optimizer was given {described(module)} as the module",
            "it trains the parameters of an nn.Module, and finds them itself",
            "nn.Optimizer(model, tx), the module first"
            if swapped
            else f"nn.Optimizer({model}, optax.adam(1e-3))",
        )
    )


def no_transformation(tx: object, pattern: str | None) -> ArgumentError:
    of_group = "" if pattern is None else f" of the group {pattern!r}"
    return ArgumentError(
        explain(
            f"nn.Optimizer was given {described(tx)} as the transformation{of_group}",
            "it needs an optax transformation: an object with init and update",
            "call the factory, nn.Optimizer(model, optax.adam(1e-3)); for optax.MultiSteps "
            "pass its .gradient_transformation()",
        )
    )


def no_option(name: str, value: object, why: str, instead: str) -> ArgumentError:
    return ArgumentError(explain(f"nn.Optimizer was given {name}={value!r}", why, instead))


def nothing_to_train(kind: str) -> UnknownNameError:
    return UnknownNameError(
        explain(
            f"made an Optimizer of {kind}",
            "none of its parameters is trainable, so a step would do nothing",
            "unfreeze what is to be trained, module.requires_grad_(True), and build the "
            "optimizer after that",
        )
    )


def in_two_groups(name: str, first: str, second: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"nn.Optimizer was given two groups for {name!r}: {first!r} and {second!r}",
            "each parameter is in one group, whose transformation steps it",
            'patterns that exclude each other, with "*" for the rest: {"*.bias": tx, "*": other}',
        )
    )


def in_no_group(names: Sequence[str], patterns: Sequence[str]) -> UnknownNameError:
    return UnknownNameError(
        explain(
            f"nn.Optimizer was given no group for {named(names)}",
            f"the groups are {named(patterns)}, and each trainable parameter is in one",
            '"*" for the rest: {..., "*": optax.adam(1e-3)}; or only= to train some of them alone',
        )
    )


def adapted_while_tracing() -> StructureChangeError:
    return StructureChangeError(
        explain(
            "called Optimizer.adapt in code that is traced",
            "it makes and drops slots, and what is made there would be lost",
            "opt.adapt() outside, between two steps",
        )
    )


def other_parameters(found: Mapping[str, Sequence[str]]) -> StructureChangeError:
    parts = [f"{what}: {named(names)}" for what, names in found.items() if names]
    return StructureChangeError(
        explain(
            "stepped an Optimizer whose module has other trainable parameters than when it was "
            f"built ({'; '.join(parts) or 'their order changed'})",
            "the slots belong to the parameters of that time",
            ADAPT,
        )
    )


def state_of_other_structure(treedef: object, other: object) -> StructureChangeError:
    return StructureChangeError(
        explain(
            "the transformation returned a state of another structure than it was given",
            f"the slots were made for\n  {treedef}\n  and not for\n  {other}",
            "a transformation must keep the structure of its state, as jax.lax.scan asks too",
        )
    )


def slot_of_other_shape(slot: Sequence[str], shape: Shape, other: Shape) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"a step would turn the slot {'.'.join(slot)!r} of shape {shape} into one of shape {other}",
            "the slots have the shapes that the parameters had when the optimizer was built",
            ADAPT,
        )
    )


def no_gradients(grads: object) -> ArgumentError:
    return ArgumentError(
        explain(
            f"Optimizer.step was given {described(grads)}",
            "gradients are matched to parameters by name",
            f"the dict that nn.grad and nn.value_and_grad return: {habits.TRAIN}",
        )
    )


def other_gradients(
    unknown: Sequence[str], missing: Sequence[str], names: Sequence[str]
) -> UnknownNameError:
    parts = [f"unknown names {named(unknown)}"] if unknown else []
    parts += [f"no gradient for {named(missing)}"] if missing else []
    return UnknownNameError(
        explain(
            f"Optimizer.step was given {' and '.join(parts)}",
            f"it needs one gradient for each trainable parameter: {named(names)}",
            "take the gradient with respect to the module the optimizer was built with: "
            f"{habits.TRAIN.replace('(model,', '(opt.module,')}; to train a part, "
            'nn.Optimizer(model, tx, only="head.*") and nn.grad(loss_fn, only="head.*")',
        )
    )


def gradient_of_no_array(name: str, grad: object, shape: Shape, dtype: object) -> ArgumentError:
    entry = f'grads["{name}"]'
    array = f"jnp.zeros({shape}, jnp.{dtype}), which leaves it as it is"
    array = array if grad is None else array_of(grad, entry)
    return ArgumentError(
        explain(
            f"Optimizer.step was given {described(grad)} as the gradient of {name!r}",
            "a gradient is an array of the parameter's shape",
            f"{entry} = {array}",
        )
    )


def gradient_of_other_shape(name: str, given: Shape, own: Shape) -> ShapeError:
    if given[1:] == own and given[0] != 1:
        advice = f"the mean of the gradients of examples: grads[{name!r}].mean(0)"
    else:
        advice = to_shape(f"grads[{name!r}]", given, own) or f"a gradient of shape {own}"
    return ShapeError(
        explain(
            f"Optimizer.step was given a gradient of shape {given} for {name!r} of shape {own}",
            "a broadcast update would train something else than was meant",
            advice,
        )
    )


def gradient_of_other_dtype(name: str, given: object, own: object) -> DtypeError:
    return DtypeError(
        explain(
            f"Optimizer.step was given a gradient of dtype {given} for {name!r} of dtype {own}",
            "the slots have the parameter's dtype, and mixing would change it silently",
            f"cast it: grads[{name!r}].astype({str(own)!r})",
        )
    )


def set_by_a_schedule(name: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"assigned {name!r} of an optimizer, which a schedule sets",
            "the next step takes the value of the schedule, and this one would be lost",
            "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), a number, where it is set by hand",
        )
    )


def fixed_option(name: str, value: object) -> ArgumentError:
    return ArgumentError(
        explain(
            f"assigned {name!r} of an optimizer",
            "it is chosen when the optimizer is built, which lays out its slots",
            f"nn.Optimizer(model, tx, {name}={value!r}), a new one",
        )
    )


def setting_of_no_number(label: str, value: object) -> ArgumentError:
    return ArgumentError(
        explain(
            f"assigned {described(value)} to {label} of an optimizer",
            "it is computed with: a real number, or an array of them",
            "opt.lr = 1e-3",
        )
    )


def setting_of_other_shape(label: str, shape: Shape, expected: Shape) -> ShapeError:
    return ShapeError(
        explain(
            f"assigned an array of shape {shape} to {label} of an optimizer, which has the shape {expected}",
            "another shape would broadcast against parameters",
            f"a number, or an array of shape {expected}",
        )
    )


def no_rate(pattern: str, patterns: Sequence[str]) -> UnknownNameError:
    return UnknownNameError(
        explain(
            f"set the learning rate of the group {pattern!r}",
            f"it has none that can be set; those that have are {named(patterns) or 'none'}",
            f"{{{pattern!r}: optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), ...}} as its "
            "transformation",
        )
    )


def other_module() -> str:
    return explain(
        "stepped an Optimizer of a {} with gradients of another module",
        "the step changes the module that the optimizer was built for, and the other one learns nothing",
        "build the optimizer for the model that is trained, opt = nn.Optimizer(model, tx); if it "
        "is meant, as with gradients of an adapted copy, filter nn.OtherModuleWarning",
    )
