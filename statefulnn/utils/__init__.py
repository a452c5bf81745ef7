"""Utilities around modules: parameters as one vector, names of checkpoints."""

from statefulnn.modules.utils import (
    consume_prefix_in_state_dict_if_present as consume_prefix_in_state_dict_if_present,
)
from statefulnn.utils.convert_parameters import parameters_to_vector as parameters_to_vector
from statefulnn.utils.convert_parameters import vector_to_parameters as vector_to_parameters
