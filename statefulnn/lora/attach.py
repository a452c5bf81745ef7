"""nn.lora.attach and what is done with adapters afterwards: enable, disable, combine, merge, detach."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

from statefulnn.core.errors import user_stack_level
from statefulnn.core.module import Module
from statefulnn.core.names import Filter
from statefulnn.core.parameter import Parameter
from statefulnn.core.tracebacks import shortened
from statefulnn.lora import _refusals as refusals
from statefulnn.lora.adapters import VARIANTS, Adapter, Adapters, Layout, Spec
from statefulnn.lora.targets import Target, carriers, check_bases, ties, wanted_targets

M = TypeVar("M", bound=Module)
# On the module that was given to `attach`: the names of parameters that were trained before.
_BEFORE = "_trained_before_lora"


@shortened
def attach(
    model: M,
    layers: Filter,
    *,
    rank: int = 8,
    alpha: float = 8,
    dropout: float = 0.0,
    name: str = "default",
    variant: str | Iterable[str] = (),
) -> M:
    """Give layers low-rank adapters; from here on nothing else of the model is trained.

    The new adapter is active, and no other one is. `nn.Linear`, `nn.Embedding`, convolutions without groups
    and layers of your own that compute ``x @ weight.T + bias`` or ``x @ weight + bias`` get it beside them,
    under ``layer.lora.<name>``; their own names stay. All other layers get it in each weight matrix, as a
    parametrization: `nn.MultiheadAttention`, `nn.LSTM`, `nn.GRU`, subclasses with a forward of their own. Its
    name is then ``layer.parametrizations.<weight>.0.<name>``, and ``layer.<weight>`` becomes
    ``layer.parametrizations.<weight>.original``.

    Args:
        model: a Module; it is changed in place.
        layers: which layers, by names, patterns such as ``"*.attn.*|*.mlp.*"``, or a function of the dotted
            name. Those of them that have no weight matrix are left as they are.
        rank: the rank of the change.
        alpha: the change is multiplied by ``alpha / rank``.
        dropout: the probability that an element of the input is dropped on the way through the adapter, in
            training; not for tables, as in peft.
        name: of the adapter.
        variant: "rslora" (``alpha / sqrt(rank)``), "dora", "pissa", or several of them.

    Returns:
        The model.

    Raises:
        UnknownNameError: for a pattern that matches nothing.
        ArgumentError: if no chosen layer has a weight matrix; for dropout where the change is in a weight.
        ShapeError: for a rank above that of a weight.
        TakenNameError: for a name that is taken.
        StructureChangeError: for weights that are computed already.

    Source: Hu et al., LoRA, 2021; peft's ``LoraConfig``, whose formulas and initial values these are.

    Example:
        >>> import statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> model = nn.lora.attach(model, "*", rank=2)
        >>> [name for name, p in model.named_parameters() if p.requires_grad][:2]
        ['0.lora.default.lora_A', '0.lora.default.lora_B']
    """
    where = "nn.lora.attach"
    spec = Spec(rank, alpha, dropout, _variants(where, variant))
    targets = wanted_targets(model, layers, where)
    install(model, dict.fromkeys(targets, spec), name, where)
    return model


def install(
    model: Module, specs: Mapping[Target, Spec], name: str, where: str
) -> dict[Target, Adapter]:
    """Check everything, then attach one adapter to each target, and train these alone."""
    targets = list(specs)
    _check(model, specs, name, where)
    tied = ties(model, targets)
    if tied:
        warnings.warn(refusals.tied(where, tied), UserWarning, stacklevel=user_stack_level())
    made = {t: Adapter(t.layout, _weight(t), spec) for t, spec in specs.items()}
    for target, adapter in made.items():
        adapter.start(_weight(target))
        if "pissa" in adapter.spec.variants:
            box: Any = target.box
            box.value = box.value - adapter.delta(box.value)
    trained = {n: p for n, p in _of_the_base(model).items() if p.requires_grad}
    for p in trained.values():
        p.requires_grad = False
    setattr(model, _BEFORE, tuple(dict.fromkeys((*getattr(model, _BEFORE, ()), *trained))))
    for target, adapter in made.items():
        target.add(name, adapter)
    _activate(carriers(model), (name,))
    return made


def _of_the_base(model: Module) -> dict[str, Parameter]:
    """Return the parameters of no adapter; those of a LayerStack under the names of its layers."""
    return {
        f"{path}.{name}" if path else name: p
        for path, module in model.named_modules()
        if not isinstance(module, Adapter)
        for name, p in module._parameters.items()
        if p is not None
    }


def _weight(target: Target) -> Any:
    box = target.box
    return jnp.asarray(getattr(target.layer, target.name)) if box is None else box.value


def _adapters(target: Target) -> Adapters:
    adapters = target.adapters
    assert adapters is not None
    return adapters


def _variants(where: str, variant: str | Iterable[str]) -> tuple[str, ...]:
    given = [variant] if isinstance(variant, str) else list(variant)
    if not all(v in VARIANTS for v in given):
        wanted = f"some of {', '.join(map(repr, VARIANTS))}, or nothing"
        raise refusals.wrong_option(where, "variant", variant, wanted)
    return tuple(v for v in VARIANTS if v in given)


def _check(model: Module, specs: Mapping[Target, Spec], name: str, where: str) -> None:
    _check_name(name, where)
    for spec in dict.fromkeys(specs.values()):
        _check_spec(spec, where)
    there = carriers(model)
    _check_unmerged(there, where)
    same = [t.label for t in there if name in _adapters(t)]
    if same:
        raise refusals.name_taken(where, name, same)
    pissa = {t for t, s in specs.items() if "pissa" in s.variants}
    check_bases([t for t in specs if t not in pissa], where, writes=False)
    check_bases([t for t in specs if t in pissa], where, writes=True)
    sizes = {t: t.layout.sizes(t.shape) for t in specs}
    large = {t.label: sizes[t] for t, s in specs.items() if s.rank > min(sizes[t])}
    if large:
        raise refusals.rank_too_large(where, max(s.rank for s in specs.values()), large)
    dropped = [t.label for t, s in specs.items() if s.dropout and t.layout.kind == "weight"]
    if dropped:
        dropout = max(s.dropout for s in specs.values())
        raise refusals.dropout_in_a_weight(where, dropout, dropped)
    mixed = [
        t.label
        for t in specs
        if t.adapters is not None and (t in pissa or _with(t.adapters, "pissa"))
    ]
    if mixed:
        raise refusals.pissa_among_others(where, mixed)
    tied = ties(model, [t for t in specs if t in pissa])
    if tied:
        raise refusals.pissa_of_tied(where, tied)


def _check_name(name: object, where: str) -> None:
    taken = Adapters(Layout("weight"))
    if not isinstance(name, str) or not name or "." in name or hasattr(taken, name):
        wanted = "a text without a dot, and no attribute of an nn.ModuleDict"
        raise refusals.wrong_option(where, "name", name, wanted)


def _check_spec(spec: Spec, where: str) -> None:
    if isinstance(spec.rank, bool) or not isinstance(spec.rank, int) or spec.rank < 1:
        raise refusals.wrong_option(where, "rank", spec.rank, "a whole number from 1 on")
    if not _is_number(spec.alpha) or not 0 < spec.alpha < math.inf:
        raise refusals.wrong_option(where, "alpha", spec.alpha, "a number above 0")
    if not _is_number(spec.dropout) or not 0 <= spec.dropout < 1:
        raise refusals.wrong_option(where, "dropout", spec.dropout, "a number from 0 on, below 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _with(adapters: Adapters, variant: str) -> list[str]:
    return [n for n, a in adapters.items() if variant in a.spec.variants]


def found(model: Module, where: str, names: Iterable[str] = ()) -> list[Target]:
    """Return the weights with adapters; raise if there are none, or none of these names."""
    targets = carriers(model)
    if not targets:
        raise refusals.no_adapters(where)
    known = list(dict.fromkeys(n for t in targets for n in _adapters(t)))
    for name in names:
        if name not in known:
            raise refusals.unknown_adapter(where, name, known)
    return targets


def _check_unmerged(targets: list[Target], where: str) -> None:
    labels = [t.label for t in targets if _adapters(t).merged is not None]
    if labels:
        raise refusals.merged(where, labels)


def _activate(targets: list[Target], names: tuple[str, ...]) -> None:
    for target in targets:
        adapters = _adapters(target)
        adapters.active = tuple(n for n in names if n in adapters)
        for name, adapter in adapters.items():
            adapter.requires_grad_(name in names)


@shortened
def enable(model: Module, names: str | Iterable[str]) -> None:
    """Have one adapter take effect and be trained, or several; the others are off and frozen.

    Args:
        model: a Module with adapters.
        names: of the adapters. The changes of several add up.

    Raises:
        UnknownNameError: for a name that is not there.
        StructureChangeError: if there are no adapters, or they are merged.

    Example:
        >>> import statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("a", "b"):
        ...     _ = nn.lora.attach(model, "0", rank=1, name=name)
        >>> nn.lora.enable(model, "a")
        >>> model[0].lora.active
        ('a',)
    """
    where = "nn.lora.enable"
    wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    targets = found(model, where, wanted)
    _check_unmerged(targets, where)
    several = len(wanted) > 1
    together = [
        t for t in targets if several and set(_with(_adapters(t), "dora")).intersection(wanted)
    ]
    if together:
        raise refusals.dora_among_others(where, wanted, [t.label for t in together])
    _activate(targets, wanted)


@shortened
def disable(model: Module) -> None:
    """Have no adapter take effect, and freeze all of them; `enable` turns them on again.

    Args:
        model: a Module with adapters.

    Raises:
        StructureChangeError: if there are no adapters, or they are merged.

    Example:
        >>> import statefulnn as nn
        >>> model = nn.lora.attach(nn.Sequential(nn.Linear(4, 4)), "0", rank=1)
        >>> nn.lora.disable(model)
        >>> model[0].lora.active
        ()
    """
    targets = found(model, "nn.lora.disable")
    _check_unmerged(targets, "nn.lora.disable")
    _activate(targets, ())


@contextlib.contextmanager
def disabled(model: Module) -> Iterator[None]:
    """Have no adapter take effect inside a ``with`` block, also in compiled code.

    What is trained stays so: the block is for outputs of the base, such as a reference in a loss.

    Args:
        model: a Module with adapters.

    Raises:
        StructureChangeError: if there are no adapters, or they are merged.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.lora.attach(nn.Sequential(nn.Linear(4, 4)), "0", rank=1)
        >>> with nn.lora.disabled(model):
        ...     reference = model(jnp.ones((1, 4)))
    """
    targets = found(model, "nn.lora.disabled")
    _check_unmerged(targets, "nn.lora.disabled")
    before = [(a, a.active) for a in map(_adapters, targets)]
    try:
        for adapters, _ in before:
            adapters.active = ()
        yield
    finally:
        for adapters, active in before:
            adapters.active = active


@shortened
def combine(model: Module, weights: Mapping[str, float], *, name: str, how: str = "linear") -> None:
    """Make a new adapter of others, weighted; it is off until `enable`.

    Args:
        model: a Module with adapters.
        weights: adapter -> weight, which may be negative.
        name: of the new one.
        how: "linear" adds up the matrices, each times the root of its weight and scale; the product is the
            weighted sum only if one of the two matrices is the same in all. "cat" puts the matrices side by
            side: the change is the weighted sum, and the rank the sum of the ranks.

    Raises:
        UnknownNameError: for adapters that are not there.
        TakenNameError: for a name that is taken.
        ShapeError: for "linear" of different ranks.
        ArgumentError: for DoRA and PiSSA.

    Source: peft's ``add_weighted_adapter``.

    Example:
        >>> import statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("a", "b"):
        ...     _ = nn.lora.attach(model, "0", rank=1, name=name)
        >>> nn.lora.combine(model, {"a": 0.7, "b": 0.3}, name="c", how="cat")
        >>> model[0].lora["c"].lora_A.shape
        (2, 4)
    """
    where = "nn.lora.combine"
    if how not in ("linear", "cat"):
        raise refusals.wrong_option(where, "how", how, "'linear' or 'cat'")
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(_is_number(w) and math.isfinite(w) for w in weights.values())
    ):
        raise refusals.wrong_option(where, "weights", weights, "a dict of adapter -> number")
    targets = [t for t in found(model, where, weights) if set(_adapters(t)) & set(weights)]
    _check_unmerged(targets, where)
    _check_name(name, where)
    if any(name in _adapters(t) for t in carriers(model)):
        raise refusals.name_taken(where, name, [t.label for t in targets])
    sources = [{n: _adapters(t)[n] for n in weights if n in _adapters(t)} for t in targets]
    for of_one in sources:
        for variant in ("dora", "pissa"):
            if any(variant in a.spec.variants for a in of_one.values()):
                raise refusals.combined_variants(list(of_one), variant)
        ranks = {n: a.spec.rank for n, a in of_one.items()}
        if how == "linear" and len(set(ranks.values())) > 1:
            raise refusals.combined_ranks(ranks)
    for target, of_one in zip(targets, sources, strict=True):
        scaled = [(weights[n] * a.spec.scale, a) for n, a in of_one.items()]
        if how == "cat":
            a = jnp.concatenate([s * v.lora_A.value for s, v in scaled], axis=0)
            b = jnp.concatenate([v.lora_B.value for _, v in scaled], axis=1)
        else:
            roots = [(math.sqrt(abs(s)), math.copysign(1, s), v) for s, v in scaled]
            a = jnp.stack([sign * root * v.lora_A.value for root, sign, v in roots]).sum(0)
            b = jnp.stack([root * v.lora_B.value for root, _, v in roots]).sum(0)
        dropout = max(v.spec.dropout for v in of_one.values())
        rank = a.shape[0]
        new = Adapter(target.layout, _weight(target), Spec(rank, rank, dropout))
        new.lora_A.value, new.lora_B.value = a, b
        new.requires_grad_(False)
        target.add(name, new)


@shortened
def merge(model: Module) -> None:
    """Add the active adapters to the weights: the model computes the same, as fast as without them.

    The adapters stay, frozen, so that `unmerge` can take them out again. After it, `detach` keeps the merged
    weights for good.

    Args:
        model: a Module with adapters.

    Raises:
        StructureChangeError: if the adapters are merged already, none is active, or a weight is tied to one
            elsewhere or stored small.

    Example:
        >>> import statefulnn as nn
        >>> model = nn.lora.attach(nn.Sequential(nn.Linear(4, 4)), "0", rank=1)
        >>> nn.lora.merge(model)
        >>> nn.lora.detach(model)
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """
    where = "nn.lora.merge"
    targets = found(model, where)
    _check_unmerged(targets, where)
    targets = [t for t in targets if _adapters(t).active]
    if not targets:
        raise refusals.nothing_active(where)
    check_bases(targets, where, writes=True)
    tied = ties(model, targets)
    if tied:
        raise refusals.merge_of_tied(tied)
    for target in targets:
        adapters, box = _adapters(target), target.box
        assert box is not None
        for name in adapters.active:
            box.value = adapters[name].merged_into(box.value)
        adapters.merged = adapters.active
        # In state dicts: that of a merged model fits no other, which would add its adapters again.
        adapters.register_buffer("is_merged", jnp.ones((), bool))
        adapters.requires_grad_(False)


@shortened
def unmerge(model: Module) -> None:
    """Take merged adapters out of the weights again, exact to rounding, and train them further.

    Args:
        model: a Module with merged adapters.

    Raises:
        StructureChangeError: if there are no adapters, or they are not merged.

    Example:
        >>> import statefulnn as nn
        >>> model = nn.lora.attach(nn.Sequential(nn.Linear(4, 4)), "0", rank=1)
        >>> nn.lora.merge(model)
        >>> nn.lora.unmerge(model)
    """
    targets = [t for t in found(model, "nn.lora.unmerge") if _adapters(t).merged is not None]
    if not targets:
        raise refusals.not_merged()
    for target in targets:
        adapters, box = _adapters(target), target.box
        assert box is not None and adapters.merged is not None
        for name in reversed(adapters.merged):
            box.value = adapters[name].undone(box.value)
            adapters[name].requires_grad_(True)
        adapters.merged = None
        del adapters.is_merged


@shortened
def detach(model: Module, name: str | None = None) -> None:
    """Take adapters away; with the last one, what was trained before `attach` is trained again.

    Weights keep what was merged into them. Otherwise they are what they were, after PiSSA as well.

    Args:
        model: a Module with adapters.
        name: of one adapter; None for all.

    Raises:
        UnknownNameError: for a name that is not there.
        StructureChangeError: if there are no adapters; for one `name` while adapters are merged.

    Example:
        >>> import statefulnn as nn
        >>> model = nn.lora.attach(nn.Sequential(nn.Linear(4, 4)), "0", rank=1)
        >>> nn.lora.detach(model)
        >>> [p.requires_grad for p in model.parameters()]
        [True, True]
    """
    where = "nn.lora.detach"
    targets = found(model, where, () if name is None else (name,))
    if name is not None:
        _check_unmerged(targets, where)
    covered = [
        t.label
        for t in targets
        if t.layout.kind == "weight" and len(t.layer.parametrizations[t.name]) > 1
    ]
    if covered:
        raise refusals.parametrized_after(where, covered)
    for target in targets:
        adapters = _adapters(target)
        for n in [n for n in adapters if name in (None, n)]:
            if "pissa" in adapters[n].spec.variants and adapters.merged is None:
                box: Any = target.box
                box.value = box.value + adapters[n].taken_out(box.value)
            target.remove(n)
    if carriers(model):
        return
    for module in [m for m in model.modules() if hasattr(m, _BEFORE)]:
        base = _of_the_base(module)
        for n in getattr(module, _BEFORE):
            if n in base:  # otherwise it was taken out of the model meanwhile
                base[n].requires_grad = True
        delattr(module, _BEFORE)
