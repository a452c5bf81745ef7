"""Files: state dicts, steps of a training run, compiled functions; written whole or not at all."""

from statefulnn.io.checkpointer import Checkpointer, Restored
from statefulnn.io.exporting import export, load_exported
from statefulnn.io.files import load, save
from statefulnn.io.placeholder import Placeholder
