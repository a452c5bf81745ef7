"""Batch normalisation where nothing is written back: what its statistics are in pure calls.

=============  ======================================================================================
policy         how
=============  ======================================================================================
batch          ``with_batch_norm(model, "batch")``: those of the batch, always; nothing is kept
frozen         ``with_batch_norm(model, "frozen")``: the running ones, always; nothing is written
per task       ``functionalize(model, mutable=True)``: the state goes in and comes out; in an inner loop
               ``nn.meta.adapt(..., state=state)`` gives every task its own
per step       ``nn.meta.per_step(state, steps)``: a row for each inner step, as in MAML++
=============  ======================================================================================
"""

from __future__ import annotations

import copy
from typing import TypeVar

from statefulnn.core.errors import explain
from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.modules.batchnorm import _NormBase

POLICIES = ("batch", "frozen")

M = TypeVar("M", bound=Module)


def replace_all_batch_norm_modules_(root: M) -> M:
    """Make every batch normalisation in a module use the statistics of the batch only, in place.

    The running statistics are removed. `with_batch_norm` does the same to a copy.

    Args:
        root: the module to change.

    Returns:
        `root`.

    Source: ``torch.func.replace_all_batch_norm_modules_``.

    Example:
        >>> import statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> sorted(nn.func.replace_all_batch_norm_modules_(model).state_dict())
        ['0.bias', '0.weight', '1.bias', '1.weight']
    """
    require_module(root, "replace_all_batch_norm_modules_")
    for module in root.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    return root


def with_batch_norm(module: M, policy: str) -> M:
    """Return a copy of a module whose batch normalisations write nothing.

    Args:
        module: it is not touched; the copy shares no parameter with it.
        policy: "batch": they use the statistics of the batch, in training and in evaluation, and have no
            buffers; "frozen": they use the running statistics also in training.

    Returns:
        the copy, whose other layers stay in their mode.

    Raises:
        ValueError: for another policy, or for "frozen" where a layer keeps no running statistics.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> fn, params = nn.functionalize(nn.func.with_batch_norm(model, "batch"))
        >>> fn(params, jnp.eye(2)).shape
        (2, 3)
    """
    require_module(module, "with_batch_norm")
    if policy not in POLICIES:
        raise ValueError(
            explain(
                f"called with_batch_norm(policy={policy!r})",
                f"the policies of a pure call are {POLICIES}",
                "for statistics of each task or inner step: functionalize(model, mutable=True) and "
                "nn.meta.adapt(..., state=state)",
            )
        )
    changed = copy.deepcopy(module)
    if policy == "batch":
        return replace_all_batch_norm_modules_(changed)
    for name, layer in changed.named_modules():
        if isinstance(layer, _NormBase):
            if not layer.track_running_stats:
                raise ValueError(
                    explain(
                        f"froze the statistics of {name!r}, a {type(layer).__name__}",
                        "it keeps no running statistics (track_running_stats=False)",
                        'use with_batch_norm(model, "batch")',
                    )
                )
            layer.eval()
    return changed
