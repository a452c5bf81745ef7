"""Names of checkpoints that were saved through a wrapper."""

from __future__ import annotations

from typing import Any


def consume_prefix_in_state_dict_if_present(state_dict: dict[str, Any], prefix: str) -> None:
    """Strip a prefix from the names of a state dict, in place.

    Args:
        state_dict: a dict of name -> array; its ``_metadata``, if it has one, is renamed too.
        prefix: such as ``"module."``, which torch's DistributedDataParallel puts in front.

    Source: ``torch.nn.modules.utils.consume_prefix_in_state_dict_if_present``.

    Example:
        >>> import statefulnn as nn
        >>> state = {"module.weight": 1}
        >>> nn.utils.consume_prefix_in_state_dict_if_present(state, "module.")
        >>> state
        {'weight': 1}
    """
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[key[len(prefix) :]] = state_dict.pop(key)
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is None:
        return
    for key in list(metadata):
        if key == prefix.rstrip(".") or key == prefix:
            metadata[""] = metadata.pop(key)
        elif key.startswith(prefix):
            metadata[key[len(prefix) :]] = metadata.pop(key)
