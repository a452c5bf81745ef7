"""nn.lora.save and nn.lora.load: adapters in peft's files, adapter_config.json and adapter_model.safetensors.

A name in the file is ``base_model.model.<layer>.lora_A.weight``. Several weights of one layer are nested
there, the last one outermost: ``<layer>.base_layer.lora_A.weight`` is one further in.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from statefulnn.core.errors import ArgumentError
from statefulnn.core.module import Module
from statefulnn.core.tracebacks import shortened
from statefulnn.io._atomic import replacing
from statefulnn.io.files import load as load_file
from statefulnn.io.files import save as save_file
from statefulnn.lora import _refusals as refusals
from statefulnn.lora.adapters import Adapter, Spec
from statefulnn.lora.attach import found, install
from statefulnn.lora.targets import Target, named_layers, parameter_order, wanted_targets
from statefulnn.modules.attention import MultiheadAttention

CONFIG, ARRAYS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_ROOT = "base_model.model."
_ENDINGS = {
    "lora_A": ("lora_A.weight", "lora_embedding_A"),
    "lora_B": ("lora_B.weight", "lora_embedding_B"),
    "lora_magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
}
# Options of peft that change nothing of what an adapter computes, once it is trained.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r",
    "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
# Initial values after which the base is not what it was; of PiSSA's, the exact one can be computed again.
_CHANGE_THE_BASE = re.compile(r"pissa_niter_.*|olora|corda|loftq|lora_ga", re.IGNORECASE)


@shortened
def save(model: Module, folder: str | PathLike[str], name: str | None = None) -> None:
    """Write an adapter as peft's ``save_pretrained`` does.

    Args:
        model: a Module with adapters.
        folder: it is made if it is missing, and gets ``adapter_config.json`` and
            ``adapter_model.safetensors``.
        name: of the adapter; it may be left out if there is one only. It is not in the file.

    Raises:
        CheckpointError: for what peft's format has no place for, such as DoRA in an LSTM.
        ImportError: if safetensors is not installed (extra ``io``).

    Source: peft's ``PeftModel.save_pretrained``.

    Example:
        >>> import os, tempfile, statefulnn as nn
        >>> model = nn.lora.attach(nn.Sequential(nn.Linear(4, 4)), "0", rank=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nn.lora.save(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    where = "nn.lora.save"
    targets = found(model, where, () if name is None else (name,))
    known = list(dict.fromkeys(n for t in targets for n in t.adapters or ()))
    if name is None and len(known) > 1:
        raise refusals.which_adapter(where, known)
    name = known[0] if name is None else name
    adapters = {t: t.adapters[name] for t in targets if t.adapters and name in t.adapters}
    prefixes = _prefixes(adapters, name)
    arrays = {
        f"{_ROOT}{prefixes[t]}{_ending(t, n)}": p.value
        for t, a in adapters.items()
        for n, p in a.named_parameters()
    }
    config = _config_of(model, adapters)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(arrays, Path(folder, ARRAYS[0]))
    with replacing(Path(folder, CONFIG)) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True))


def _ending(target: Target, parameter: str) -> str:
    return _ENDINGS[parameter][target.layout.kind == "embedding" and parameter != "lora_magnitude"]


def _dotted(path: str) -> str:
    return f"{path}." if path else ""


def _prefixes(adapters: Mapping[Target, Adapter], name: str) -> dict[Target, str]:
    """Return for each weight what its names in the file begin with; raise if peft has no place for it."""
    refuse = lambda t, why: refusals.no_place_in_peft(name, [t.label], why)
    attentions = {t.path for t in adapters if t.name == "in_proj_weight"}
    prefixes, by_layer = {}, {}
    for target, adapter in adapters.items():
        path, kind, variants = target.path, target.layout.kind, adapter.spec.variants
        parent, _, last = path.rpartition(".")
        if kind != "weight":
            if "pissa" in variants and kind != "linear":
                raise refuse(target, "PiSSA there is for linear layers")
            prefixes[target] = _dotted(path)
            continue
        if set(variants) & {"dora", "pissa"}:
            raise refuse(target, "DoRA and PiSSA there are for layers that the adapter acts beside")
        if target.name == "in_proj_weight":
            prefixes[target] = _dotted(path)
        elif last == "out_proj" and parent in attentions:
            prefixes[target] = f"{_dotted(parent)}base_layer.out_proj."
        elif last == "out_proj" or isinstance(target.layer, MultiheadAttention):
            raise refuse(
                target, "attention there has one packed projection, together with out_proj"
            )
        elif len(target.shape) > 2:
            raise refuse(target, "single weights there are matrices")
        else:
            by_layer.setdefault(path, []).append(target)
    for path, targets in by_layer.items():
        order = parameter_order(targets[0].layer)
        targets.sort(key=lambda t: order.index(t.name))
        for depth, target in enumerate(reversed(targets)):
            prefixes[target] = _dotted(path) + "base_layer." * depth
    return prefixes


def _config_of(model: Module, adapters: Mapping[Target, Adapter]) -> dict[str, Any]:
    specs = {t: a.spec for t, a in adapters.items()}
    common = lambda values: Counter(values).most_common(1)[0][0]
    rank = common(s.rank for s in specs.values())
    alpha = common(s.alpha for s in specs.values())
    first = next(iter(specs.values()))
    beside = [t for t in specs if t.layout.kind != "weight" or t.name == "in_proj_weight"]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(s.dropout for s in specs.values()),
        # From the beginning: peft would take the name for the end of others too.
        "rank_pattern": {_whole(t): s.rank for t, s in specs.items() if s.rank != rank},
        "alpha_pattern": {_whole(t): s.alpha for t, s in specs.items() if s.alpha != alpha},
        "target_modules": _target_modules(model, [t.path for t in beside]),
        "target_parameters": [
            t.label for t in specs if t not in beside and not t.path.endswith("out_proj")
        ]
        or None,
        "fan_in_fan_out": any(t.layout.kind == "linear" and t.layout.transposed for t in specs),
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": "rslora" in first.variants,
        "use_dora": "dora" in first.variants,
        "init_lora_weights": "pissa" if "pissa" in first.variants else True,
    }


def _whole(target: Target) -> str:
    return f"^{re.escape(target.path)}"


def _target_modules(model: Module, paths: list[str]) -> list[str] | str:
    """Return the layers as a list, or as an expression where peft would find more by the ends of names."""
    ends = tuple(f".{path}" for path in paths)
    more = [n for n in named_layers(model) if n not in paths and n.endswith(ends)] if ends else []
    return "|".join(map(re.escape, paths)) if more else paths


@shortened
def load(model: Module, folder: str | PathLike[str], name: str = "default") -> None:
    """Attach the adapter of a file that peft's ``save_pretrained`` or `save` wrote.

    It is active afterwards, as after `attach`, and nothing else is trained.

    Args:
        model: the base model, with the names of layers that the adapter was made for.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: of the adapter in the model.

    Raises:
        CheckpointError: if the file is of another model, of other ranks than it says, or of another method
            than LoRA; the model is left as it was.
        TakenNameError: for a name that is taken.

    Source: peft's ``PeftModel.from_pretrained``.

    Example:
        >>> import tempfile, statefulnn as nn
        >>> model, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nn.lora.save(nn.lora.attach(model, "0", rank=1), folder)
        ...     nn.lora.load(other, folder)
        >>> bool((other[0].lora["default"].lora_A == model[0].lora["default"].lora_A).all())
        True
    """
    config = _config(Path(folder, CONFIG))
    arrays = _arrays(Path(folder))
    grouped, problems = _grouped(arrays)
    paths = {p: _path(p) for p in grouped}
    targets = _targets(model, set(paths.values()))
    given: dict[Target, dict[str, Any]] = {}
    for prefix, group in grouped.items():
        target = _target(targets.get(paths[prefix], {}), prefix.count("base_layer."), config)
        if target is None:
            problems.append(f"the model has no layer for {_ROOT}{prefix}*")
        else:
            given[target] = group
            if (
                config.get("fan_in_fan_out")
                and (target.layout.kind, target.name) == ("weight",) * 2
            ):
                problems.append(
                    f"whether {target.path!r} computes x @ weight could not be found out"
                )
    specs = {target: _spec(target, config) for target in given}
    for target, group in given.items():
        problems += _misfits(target, group, specs[target])
    if problems or not given:
        raise refusals.does_not_fit(str(folder), problems or ["the file has no adapter"])
    for target, adapter in install(model, specs, name, "nn.lora.load").items():
        for parameter, value in given[target].items():
            box = getattr(adapter, parameter)
            box.value = np.asarray(value).astype(box.dtype)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise refusals.no_file(str(path.parent), path.name) from None
    except ValueError as error:
        raise refusals.bad_config(str(path), f"it is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise refusals.bad_config(str(path), f"it holds a {type(config).__name__}, and no dict")
    if config.get("peft_type") != "LORA":
        raise refusals.unknown_option(str(path), "peft_type", config.get("peft_type"))
    kinds = {
        "r": int, "lora_alpha": (int, float), "lora_dropout": (int, float), "rank_pattern": dict,
        "alpha_pattern": dict,
    }  # fmt: skip
    defaults = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for option, kind in kinds.items():
        value = config.get(option)
        config[option] = value = defaults[option] if value is None else value
        if not isinstance(value, kind) or isinstance(value, bool):
            raise refusals.bad_config(str(path), f"{option}={value!r}")
    unknown = {k: v for k, v in config.items() if k not in _HARMLESS | _READ and v}
    if config.get("bias", "none") != "none":
        unknown["bias"] = config["bias"]
    if _CHANGE_THE_BASE.fullmatch(str(config.get("init_lora_weights"))):
        unknown["init_lora_weights"] = config["init_lora_weights"]
    for option, value in unknown.items():
        raise refusals.unknown_option(str(path), option, value)
    return config


def _arrays(folder: Path) -> Mapping[str, Any]:
    for file in ARRAYS:
        if (folder / file).exists():
            return load_file(folder / file)
    raise refusals.no_file(str(folder), ARRAYS[0])


def _grouped(arrays: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return prefix -> parameter -> array, and what is no part of an adapter."""
    grouped: dict[str, dict[str, Any]] = {}
    problems = []
    endings = {ending: name for name, those in _ENDINGS.items() for ending in those}
    pattern = re.compile(rf"{re.escape(_ROOT)}((?:.*\.)?)({'|'.join(map(re.escape, endings))})")
    for key, value in arrays.items():
        match = pattern.fullmatch(key)
        if match is None:
            problems.append(f"{key!r} is no part of an adapter")
        else:
            grouped.setdefault(match[1], {})[endings[match[2]]] = value
    return grouped, problems


def _path(prefix: str) -> str:
    return ".".join(p for p in prefix.split(".")[:-1] if p != "base_layer")


def _targets(model: Module, paths: set[str]) -> dict[str, dict[str, Target]]:
    """Return layer -> weight -> target, for layers of these names that can carry an adapter."""
    by_layer: dict[str, dict[str, Target]] = {}
    with contextlib.suppress(ArgumentError):  # none of the layers has a matrix
        for target in wanted_targets(model, lambda name: name in paths, "nn.lora.load"):
            by_layer.setdefault(target.path, {})[target.name] = target
    return by_layer


def _target(targets: Mapping[str, Target], depth: int, config: Mapping[str, Any]) -> Target | None:
    """Return the weight of a layer that is meant, so many layers of peft's further in."""
    asked = tuple(f".{text}" for text in config.get("target_parameters") or ())
    nested = [t for t in targets.values() if f".{t.label}".endswith(asked)] if asked else []
    if nested:
        order = parameter_order(nested[0].layer)
        nested.sort(key=lambda t: order.index(t.name), reverse=True)
        return nested[depth] if depth < len(nested) else None
    return targets.get("in_proj_weight", targets.get("weight"))


def _spec(target: Target, config: Mapping[str, Any]) -> Spec:
    path = target.path if target.layout.kind != "weight" else target.path.removesuffix(".out_proj")

    def of_layer(pattern: str, default: str) -> Any:
        for key, value in config[pattern].items():  # the ends of names, as expressions
            if re.match(rf"(.*\.)?({key})$", path):
                return value
        return config[default]

    flags = {
        "rslora": config.get("use_rslora"),
        "dora": config.get("use_dora"),
        "pissa": config.get("init_lora_weights") == "pissa",
    }
    return Spec(
        of_layer("rank_pattern", "r"),
        of_layer("alpha_pattern", "lora_alpha"),
        # Where the change is in the weight there is none, as in peft.
        0.0 if target.layout.kind == "weight" else float(config["lora_dropout"]),
        tuple(variant for variant, on in flags.items() if on),
    )


def _misfits(target: Target, group: Mapping[str, Any], spec: Spec) -> Iterator[str]:
    expected = target.layout.shapes(target.shape, spec.rank, "dora" in spec.variants)
    for name in expected.keys() - group.keys():
        yield f"{name} of {target.label!r} is missing"
    for name in group.keys() - expected.keys():
        yield f"{name} of {target.label!r} belongs to another variant"
    for name in expected.keys() & group.keys():
        if tuple(group[name].shape) != expected[name]:
            yield (
                f"{name} of {target.label!r} has the shape {tuple(group[name].shape)}, and "
                f"{expected[name]} is what a rank of {spec.rank} and this layer make"
            )
