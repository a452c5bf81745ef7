"""Initial values of parameters, under the names of ``torch.nn.init``."""

from statefulnn.init._initializers import calculate_gain as calculate_gain
from statefulnn.init._initializers import constant_ as constant_
from statefulnn.init._initializers import dirac_ as dirac_
from statefulnn.init._initializers import eye_ as eye_
from statefulnn.init._initializers import kaiming_normal_ as kaiming_normal_
from statefulnn.init._initializers import kaiming_uniform_ as kaiming_uniform_
from statefulnn.init._initializers import normal_ as normal_
from statefulnn.init._initializers import ones_ as ones_
from statefulnn.init._initializers import orthogonal_ as orthogonal_
from statefulnn.init._initializers import orthogonal_by_block_ as orthogonal_by_block_
from statefulnn.init._initializers import sparse_ as sparse_
from statefulnn.init._initializers import trunc_normal_ as trunc_normal_
from statefulnn.init._initializers import uniform_ as uniform_
from statefulnn.init._initializers import xavier_normal_ as xavier_normal_
from statefulnn.init._initializers import xavier_uniform_ as xavier_uniform_
from statefulnn.init._initializers import zeros_ as zeros_
from statefulnn.init._schemes import apply_scheme as apply_scheme
from statefulnn.init._versions import describe as describe
from statefulnn.init._versions import get_version as get_version
from statefulnn.init._versions import rules as rules
from statefulnn.init._versions import set_version as set_version
from statefulnn.init._versions import version as version
