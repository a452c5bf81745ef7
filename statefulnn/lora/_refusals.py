"""What nn.lora says when it refuses something: one function for each refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from statefulnn.core.errors import (
    ArgumentError,
    CheckpointError,
    DtypeError,
    ShapeError,
    StateDictError,
    StructureChangeError,
    TakenNameError,
    UnknownNameError,
    explain,
)
from statefulnn.core.refusals import listed, named


def _ties(ties: Mapping[str, Sequence[str]]) -> str:
    return listed([f"{label!r} is also {named(names)}" for label, names in ties.items()])


# --------------------------------------------------------------------------------------------------
# Which weights


def no_carrier(where: str, kinds: Mapping[str, str], below: Sequence[str]) -> ArgumentError:
    those = listed([f"{name!r} ({kind})" for name, kind in kinds.items()])
    instead = "name layers with a weight matrix: nn.Linear, nn.Embedding, nn.Conv2d, nn.LSTM"
    if below:
        instead = (
            f"the layers below: {named(below)}, by names or a pattern such as {below[0] + '*'!r}"
        )
    return ArgumentError(
        explain(
            f"{where} was asked for {those or 'no layer'}",
            "none of them has a weight of its own that is a matrix",
            instead,
        )
    )


def not_floating(where: str, label: str, dtype: object) -> DtypeError:
    return DtypeError(
        explain(
            f"{where} on {label!r} of dtype {dtype}",
            "a low-rank change is a floating matrix that is added to the weight",
            "other layers; or the layer in float32 or bfloat16",
        )
    )


def computed(where: str, label: str, writes: bool) -> StructureChangeError:
    why = "it is computed: parametrized, pruned or stored small, and an adapter acts on a parameter"
    instead = (
        "nn.utils.parametrize.remove_parametrizations(layer, name) first; or leave the layer out"
    )
    if writes:
        why = "it is computed, and this has to write it"
    return StructureChangeError(explain(f"{where} on {label!r}", why, instead))


def embedding_with_max_norm(where: str, label: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{where} on {label!r}, a table with max_norm",
            "its forward pass rewrites rows of the table, which is to stay as it is",
            "a table without max_norm; or leave the layer out",
        )
    )


def of_members(where: str, label: str, shape: tuple[int, ...]) -> ShapeError:
    return ShapeError(
        explain(
            f"{where} on {label!r}, whose weight has the shape {shape}",
            "one of its axes is that of an nn.Ensemble, and each member has a matrix of its own",
            "attach adapters to the members, then nn.Ensemble.of(members)",
        )
    )


def taken(where: str, path: str, name: str) -> TakenNameError:
    return TakenNameError(
        explain(
            f"{where} on {path!r}, which has an attribute {name!r}",
            "adapters are kept under that name",
            "rename the attribute; or leave the layer out",
        )
    )


def tied(where: str, ties: Mapping[str, Sequence[str]]) -> str:
    return explain(
        f"{where}, and a weight has several names: {_ties(ties)}",
        "the adapter acts where it is attached and not under the other names, and nn.lora.merge refuses",
        "fine for training; to merge, untie first: layer.weight = nn.Parameter(layer.weight.value)",
    )


def merge_of_tied(ties: Mapping[str, Sequence[str]]) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"nn.lora.merge of weights with several names: {_ties(ties)}",
            "what is added to the weight would act under the other names too",
            "nn.lora.unmerge is not needed: leave the adapters beside; or untie first, "
            "layer.weight = nn.Parameter(layer.weight.value)",
        )
    )


# --------------------------------------------------------------------------------------------------
# Settings


def wrong_option(where: str, option: str, given: object, wanted: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{where} with {option}={given!r}",
            f"it is {wanted}",
            'nn.lora.attach(model, "*.attn.*", rank=8, alpha=16, dropout=0.05, name="default")',
        )
    )


def rank_too_large(where: str, rank: int, sizes: Mapping[str, tuple[int, int]]) -> ShapeError:
    least = min(min(s) for s in sizes.values())
    those = listed([f"{label!r} is {out} x {size}" for label, (out, size) in sizes.items()])
    return ShapeError(
        explain(
            f"{where} with rank={rank}, and {those}",
            "the change would have more numbers than the matrix: a matrix has at most the rank of its "
            "smaller side",
            f"rank={least} or less; or leave out the small ones"
            if least
            else "leave out these layers",
        )
    )


def dropout_in_a_weight(where: str, dropout: float, labels: Sequence[str]) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{where} with dropout={dropout} on {named(labels)}",
            "there the change is part of the weight, and dropout acts on the input of a layer that is a "
            "linear map of it",
            "dropout=0 for these layers, in an attach of their own with another name; then "
            "nn.lora.enable(model, [name, other])",
        )
    )


def name_taken(where: str, name: str, labels: Sequence[str]) -> TakenNameError:
    return TakenNameError(
        explain(
            f"{where} with the name {name!r}, which is taken by {named(labels)}",
            "each adapter has a name of its own",
            f"name={name + '_2'!r}; or nn.lora.detach(model, {name!r}) first",
        )
    )


def pissa_among_others(where: str, labels: Sequence[str]) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"{where} on {named(labels)}, beside another adapter",
            "PiSSA takes a part out of the weight, so other adapters would act on what is left",
            "nn.lora.detach(model) first; or an adapter without variant='pissa'",
        )
    )


def base_into_pissa(weight: str, part: str) -> StateDictError:
    return StateDictError(
        explain(
            f"loaded {weight!r} without {part!r} into a model with a PiSSA adapter",
            "it is the weight of a base, whole; the model's is what PiSSA left of one, so the adapter would "
            "add its part a second time",
            "load the base first, then nn.lora.attach(model, ..., variant='pissa'); here, "
            "nn.lora.detach(model) before both",
        )
    )


def pissa_of_tied(where: str, ties: Mapping[str, Sequence[str]]) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"{where} with variant='pissa', and a weight has several names: {_ties(ties)}",
            "PiSSA takes a part out of the weight, which would be missing under the other names",
            "another variant; or untie first, layer.weight = nn.Parameter(layer.weight.value)",
        )
    )


def dora_among_others(where: str, names: Sequence[str], labels: Sequence[str]) -> ArgumentError:
    return ArgumentError(
        explain(
            f"{where} of {named(names)} together, on {named(labels)}",
            "DoRA sets the length of each row of a weight, which only one adapter can",
            "nn.lora.enable(model, name) for one of them",
        )
    )


# --------------------------------------------------------------------------------------------------
# States


def no_adapters(where: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"called {where} on a model without adapters",
            "there is nothing to act on",
            'nn.lora.attach(model, "*.attn.*"), or nn.lora.load(model, folder), comes first',
        )
    )


def unknown_adapter(where: str, name: object, known: Sequence[str]) -> UnknownNameError:
    return UnknownNameError(
        explain(
            f"{where} was asked for the adapter {name!r}",
            f"the model has {named(known)}",
            f"name={known[0]!r}",
        )
    )


def which_adapter(where: str, known: Sequence[str]) -> ArgumentError:
    return ArgumentError(
        explain(
            f"called {where} without a name",
            f"the model has several adapters: {named(known)}",
            f"name={known[0]!r}",
        )
    )


def merged(where: str, labels: Sequence[str]) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"called {where} while adapters are merged into {named(labels)}",
            "the weights contain them by now",
            "nn.lora.unmerge(model) first; nn.lora.detach(model) keeps the merged weights for good",
        )
    )


def not_merged() -> StructureChangeError:
    return StructureChangeError(
        explain(
            "called nn.lora.unmerge on a model that is not merged",
            "its weights contain no adapter",
            "nn.lora.merge(model) comes first",
        )
    )


def nothing_active(where: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"called {where} while no adapter is active",
            "there is nothing to add to the weights",
            "nn.lora.enable(model, name) first",
        )
    )


def parametrized_after(where: str, labels: Sequence[str]) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"called {where}, and {named(labels)} got another parametrization after the adapter",
            "the adapter would be taken away from under it",
            "nn.utils.parametrize.remove_parametrizations(layer, name) first",
        )
    )


def combined_ranks(ranks: Mapping[str, int]) -> ShapeError:
    return ShapeError(
        explain(
            f'nn.lora.combine(how="linear") of adapters of different ranks: {dict(ranks)}',
            "it adds the matrices of all of them",
            'how="cat", which puts them side by side',
        )
    )


def combined_variants(names: Sequence[str], variant: str) -> ArgumentError:
    return ArgumentError(
        explain(
            f"nn.lora.combine of {named(names)}, of the variant {variant!r}",
            "their change is no sum of products",
            "nn.lora.merge(model) for one of them; combine takes adapters without DoRA and PiSSA",
        )
    )


# --------------------------------------------------------------------------------------------------
# Files


def no_place_in_peft(name: str, labels: Sequence[str], why: str) -> CheckpointError:
    return CheckpointError(
        explain(
            f"nn.lora.save of {name!r}, with {named(labels)}",
            f"peft's format has no place for it: {why}",
            'nn.save(model, path, names="lora_*"), and model.load_state_dict(state, strict=False)',
        )
    )


def no_file(folder: str, file: str) -> CheckpointError:
    return CheckpointError(
        explain(
            f"nn.lora.load({folder!r}), where there is no {file}",
            "an adapter is a folder with adapter_config.json and adapter_model.safetensors",
            "the folder that peft's save_pretrained or nn.lora.save wrote",
        )
    )


def bad_config(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        explain(
            f"nn.lora.load read {path!r}: {what}",
            "it says what the adapter is like, and nothing can stand in for it",
            "the folder that peft's save_pretrained or nn.lora.save wrote",
        )
    )


def unknown_option(path: str, option: str, value: object) -> CheckpointError:
    return CheckpointError(
        explain(
            f"nn.lora.load read {path!r} with {option}={value!r}",
            "it computes something else than LoRA, rsLoRA, DoRA and PiSSA do here",
            "merge it in peft, model.merge_and_unload(), and load the merged weights with nn.load",
        )
    )


def does_not_fit(folder: str, problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        explain(
            f"nn.lora.load({folder!r}): {listed(problems)}",
            "the file is of another model, or of other ranks than its adapter_config.json says; the model "
            "was left as it was",
            "the model that the adapter was made for, with the same names of layers",
        )
    )
