"""Weights stored in 8 or 4 bits, and computed from these whenever a layer reads them."""

from statefulnn.core.listing import listing
from statefulnn.quantization.quantizing import NF4, Int8, quantize
from statefulnn.quantization.report import QuantizationReport, QuantizedLayer

__all__ = ["NF4", "Int8", "QuantizationReport", "QuantizedLayer", "quantize"]
__dir__ = listing(globals())
