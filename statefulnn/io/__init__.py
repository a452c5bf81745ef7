"""Files: state dicts as safetensors, and compiled functions; written whole or not at all."""

from statefulnn.io.exporting import export, load_exported
from statefulnn.io.files import load, save
