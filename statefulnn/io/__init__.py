"""Files: state dicts, steps of a training run, compiled functions; a crash never leaves half of one."""

from statefulnn.core.listing import listing
from statefulnn.io.checkpointer import Checkpointer, Restored
from statefulnn.io.exporting import export, load_exported
from statefulnn.io.files import load, save
from statefulnn.io.placeholder import Placeholder

__all__ = ["Checkpointer", "Placeholder", "Restored", "export", "load", "load_exported", "save"]
__dir__ = listing(globals())
