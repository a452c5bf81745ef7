"""How outputs and losses change with the parameters: kernels, curvature, the gradients of examples."""

from statefulnn.core.listing import listing
from statefulnn.curvature.accounting import noise_multiplier_for, privacy_spent
from statefulnn.curvature.influence import influence
from statefulnn.curvature.kfac import kfac
from statefulnn.curvature.laplace import Laplace
from statefulnn.curvature.linearized import linearize_model, taylor_model
from statefulnn.curvature.matrices import (
    empirical_fisher,
    fisher,
    ggn,
    hessian,
    jacobian,
    tangent_kernel,
)
from statefulnn.curvature.noise_scale import (
    NoiseScale,
    gradient_noise_scale,
    noise_scale_from_batches,
    noise_scale_of,
)
from statefulnn.curvature.ntk import empirical_ntk
from statefulnn.curvature.operators import LinearOperator
from statefulnn.curvature.privacy import Clipped, clip_per_example, dp_gradients, ghost_clip
from statefulnn.curvature.spectra import (
    Eigenpairs,
    Estimate,
    SpectralDensity,
    eigenpairs,
    logdet,
    spectral_density,
)
from statefulnn.curvature.traces import diagonal, trace

__all__ = [
    "Clipped",
    "Eigenpairs",
    "Estimate",
    "Laplace",
    "LinearOperator",
    "NoiseScale",
    "SpectralDensity",
    "clip_per_example",
    "diagonal",
    "dp_gradients",
    "eigenpairs",
    "empirical_fisher",
    "empirical_ntk",
    "fisher",
    "ggn",
    "ghost_clip",
    "gradient_noise_scale",
    "hessian",
    "influence",
    "jacobian",
    "kfac",
    "linearize_model",
    "logdet",
    "noise_multiplier_for",
    "noise_scale_from_batches",
    "noise_scale_of",
    "privacy_spent",
    "spectral_density",
    "tangent_kernel",
    "taylor_model",
    "trace",
]
__dir__ = listing(globals())
