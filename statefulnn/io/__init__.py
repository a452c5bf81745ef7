"""Files: state dicts as safetensors, written whole or not at all."""

from statefulnn.io.files import load, save
