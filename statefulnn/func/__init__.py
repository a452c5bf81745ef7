"""torch.func's names, on pure functions and on modules."""

from statefulnn.core.listing import listing
from statefulnn.func.batch_norm import replace_all_batch_norm_modules_, with_batch_norm
from statefulnn.func.batching import vmap
from statefulnn.func.gradients import grad_and_value, per_sample_grad
from statefulnn.func.jacobians import hessian, jacfwd, jacrev, jvp, linearize, vjp
from statefulnn.func.products import fisher_vp, ggn_vp, hvp
from statefulnn.transforms.functional_call import functional_call, functionalize, stack_module_state
from statefulnn.transforms.grad import grad

__all__ = [
    "fisher_vp",
    "functional_call",
    "functionalize",
    "ggn_vp",
    "grad",
    "grad_and_value",
    "hessian",
    "hvp",
    "jacfwd",
    "jacrev",
    "jvp",
    "linearize",
    "per_sample_grad",
    "replace_all_batch_norm_modules_",
    "stack_module_state",
    "vjp",
    "vmap",
    "with_batch_norm",
]
__dir__ = listing(globals())
