"""LayerStack: equal blocks as one block with a leading axis, run by one loop."""

from statefulnn.core.listing import listing
from statefulnn.layer_stack.layer_stack import LayerStack

__all__ = ["LayerStack"]
__dir__ = listing(globals())
