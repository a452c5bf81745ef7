"""Ensembles: n members of one structure, built, called and trained together."""

from statefulnn.ensemble.ensemble import Ensemble as Ensemble
from statefulnn.ensemble.per_member import per_member as per_member
