"""Hooks of torch's modules that matter to files: they go on with the converted module."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from statefulnn.core.module import Module


@dataclass(frozen=True)
class _WeightNormNames:
    """What torch.nn.utils.parametrizations.weight_norm reads files of older versions with."""

    name: str

    def __call__(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        old = [f"{prefix}{self.name}_{part}" for part in "gv"]
        if all(key in state for key in old):
            for i, key in enumerate(old):
                state[f"{prefix}parametrizations.{self.name}.original{i}"] = state.pop(key)


def take_over(theirs: torch.nn.Module, module: Module, known: Mapping[int, Module]) -> None:
    """Register the hooks of `theirs` for loading and saving on `module`.

    Args:
        theirs: the module of torch.
        module: the one that it became.
        known: by the id of a module of torch, what it became; a method of one becomes a method of that.
    """

    def ours(hook: Any) -> Any:
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, torch.nn.Module) and id(owner) in known:
            return types.MethodType(hook.__func__, known[id(owner)])
        if (
            getattr(hook, "__name__", "") == "_weight_norm_compat_hook"
        ):  # made anew: it has no pickle
            names = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
            return _WeightNormNames(names["name"].cell_contents)
        return hook

    for wrapped in theirs._load_state_dict_pre_hooks.values():
        module._register_load_state_dict_pre_hook(ours(wrapped.hook), wrapped.with_module)
    for hook in theirs._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(ours(hook))
    for hook in theirs._state_dict_pre_hooks.values():
        module.register_state_dict_pre_hook(ours(hook))
    for hook in theirs._state_dict_hooks.values():
        public = getattr(hook, "_from_public_api", False)
        register = (
            module.register_state_dict_post_hook if public else module._register_state_dict_hook
        )
        register(ours(hook))
