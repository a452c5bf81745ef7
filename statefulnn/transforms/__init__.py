"""Transforms: pure calls, compilation, gradients and batching of code that uses modules."""
