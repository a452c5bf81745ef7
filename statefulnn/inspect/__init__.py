"""Models to look at: as a table, as a page, in a notebook.

`nn.summary` and `nn.explore` are the names in use; `html` is what notebooks ask for.
"""

from statefulnn.core.listing import listing
from statefulnn.inspect.explore import explore
from statefulnn.inspect.summary import Row, Summary, summary

__all__ = ["Row", "Summary", "explore", "summary"]

__dir__ = listing(globals())
