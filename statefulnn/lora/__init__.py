"""Low-rank adapters: fine-tuning with few parameters, in peft's formulas and files."""

from statefulnn.core.listing import listing
from statefulnn.lora.adapters import Adapter, Adapters
from statefulnn.lora.attach import (
    attach,
    combine,
    detach,
    disable,
    disabled,
    enable,
    merge,
    unmerge,
)
from statefulnn.lora.files import load, save

__all__ = [
    "Adapter",
    "Adapters",
    "attach",
    "combine",
    "detach",
    "disable",
    "disabled",
    "enable",
    "load",
    "merge",
    "save",
    "unmerge",
]
__dir__ = listing(globals())
