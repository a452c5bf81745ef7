"""Ensembles: n members of one structure, built, called and trained together."""

from statefulnn.core.listing import listing
from statefulnn.ensemble.ensemble import Ensemble
from statefulnn.ensemble.per_member import per_member

__all__ = ["Ensemble", "per_member"]
__dir__ = listing(globals())
