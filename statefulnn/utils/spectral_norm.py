"""Spectral norm in its older form, with ``weight_orig``, ``weight_u`` and ``weight_v``.

Source: ``torch.nn.utils.spectral_norm``. A hook iterates before each call in training mode; the weight
is computed from the vectors each time it is read, so it is never behind its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from statefulnn.core.box import unwrap
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.module import Module
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.utils._computed import (
    Computation,
    Loading,
    add_computation,
    computation,
    remove_computation,
)
from statefulnn.utils._norms import (
    as_matrix,
    checked_dim,
    divided_by_sigma,
    output_dim,
    power_iterations,
    random_vectors,
    require_positive,
)
from statefulnn.utils._tensors import numbers_of, parameter_of


@dataclass(frozen=True)
class SpectralNorm(Computation):
    """Computes a parameter divided by its largest singular value; `spectral_norm` applies it.

    Args:
        name: of the parameter.
        n_power_iterations: how many steps each call in training mode makes.
        dim: the axis of the outputs.
        eps: the smallest norm that is divided by.

    Raises:
        ValueError: for less than one iteration.

    Source: ``torch.nn.utils.spectral_norm.SpectralNorm``.

    Example:
        >>> from statefulnn.utils.spectral_norm import SpectralNorm
        >>> SpectralNorm()
        SpectralNorm(name='weight', n_power_iterations=1, dim=0, eps=1e-12)
    """

    # 1: `v` is a buffer, and the weight is none.
    _version = 1

    name: str = "weight"
    n_power_iterations: int = 1
    dim: int = 0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        require_positive(self.n_power_iterations, "spectral_norm")

    def __call__(self, module: Module, inputs: tuple) -> None:
        """Iterate; the hook that runs before each call."""
        if module.training:
            u_name, v_name = f"{self.name}_u", f"{self.name}_v"
            matrix = as_matrix(unwrap(getattr(module, f"{self.name}_orig")), self.dim)
            u, v = power_iterations(
                matrix,
                getattr(module, u_name),
                getattr(module, v_name),
                n=self.n_power_iterations,
                eps=self.eps,
                u_first=False,
            )
            setattr(module, u_name, u)
            setattr(module, v_name, v)

    def read(self, module: Module) -> Any:
        weight = unwrap(getattr(module, f"{self.name}_orig"))
        u, v = getattr(module, f"{self.name}_u"), getattr(module, f"{self.name}_v")
        return divided_by_sigma(weight, u, v, self.dim)

    @staticmethod
    def apply(
        module: Module, name: str, n_power_iterations: int, dim: int, eps: float
    ) -> SpectralNorm:
        """Exchange the parameter for the original and two vectors."""
        if computation(module, name, SpectralNorm) is not None:
            raise RuntimeError(
                explain(
                    f"spectral_norm of {name!r} of {type(module).__name__}, for the second time",
                    f"Cannot register two spectral_norm hooks on the same parameter {name}",
                    "remove_spectral_norm(module, name) first",
                )
            )
        require_positive(n_power_iterations, "spectral_norm")
        weight = parameter_of(module, name, "spectral_norm", missing=KeyError)
        value = numbers_of(weight, f"spectral_norm of {name!r} of {type(module).__name__}")
        try:
            dim = checked_dim(value, dim, "spectral_norm")
        except IndexError as error:
            raise ShapeError(str(error)) from None
        new = SpectralNorm(name, int(n_power_iterations), dim, float(eps))
        u, v = random_vectors(as_matrix(value, dim), eps)
        module._check_static_write(name, None)
        del module._parameters[name]
        module.register_parameter(f"{name}_orig", weight)
        module.register_buffer(f"{name}_u", Buffer(u))
        module.register_buffer(f"{name}_v", Buffer(v))
        add_computation(module, new)
        module.register_forward_pre_hook(new)
        return new

    def remove(self, module: Module) -> None:
        """Make the computed weight a parameter again."""
        weight = self.read(module)
        remove_computation(module, self)
        for suffix in ("orig", "u", "v"):
            delattr(module, f"{self.name}_{suffix}")
        module.register_parameter(self.name, Parameter(weight))
        hooks = module._hooks("_forward_pre_hooks")
        for number in [k for k, entry in hooks.items() if entry[0] == self]:
            del hooks[number]

    def before_saving(self, module: Module, destination: dict, prefix: str) -> None:
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            own = metadata.setdefault(prefix[:-1], {})
            own.setdefault("spectral_norm", {})[f"{self.name}.version"] = self._version

    def before_loading(self, module: Module, given: Loading) -> None:
        version = given.metadata.get("spectral_norm", {}).get(f"{self.name}.version")
        if version is not None and version >= 1:
            return
        entries, key = given.state_dict, given.prefix + self.name
        complete = all(f"{key}_{suffix}" in entries for suffix in ("orig", "u", "v"))
        if version is None and complete and key not in entries:
            return  # of this form; only the metadata is gone
        missing = [k for k in (f"{key}_orig", key, f"{key}_u") if k not in entries]
        if missing:
            if given.strict:
                given.missing.extend(missing)
            return
        # The older form kept the weight itself; v is what leads from u to it.
        original, weight = (jnp.asarray(entries[k]) for k in (f"{key}_orig", key))
        u = jnp.asarray(entries[f"{key}_u"])
        del entries[key]
        sigma = jnp.mean(original / weight)
        matrix = as_matrix(original, self.dim)
        v = jnp.linalg.pinv(matrix) @ u
        entries[f"{key}_v"] = v * (sigma / jnp.dot(u, matrix @ v))


def spectral_norm(
    module: Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> Module:
    """Divide a parameter by its largest singular value, estimated by power iteration: the older form.

    `statefulnn.utils.parametrizations.spectral_norm` is the one to use. Here each call of the module
    in training mode iterates, and writes the buffers ``<name>_u`` and ``<name>_v``.

    Args:
        module: it is changed; its parameter is called ``<name>_orig``.
        name: of the parameter; more than two axes are taken as a matrix.
        n_power_iterations: how many steps each call makes.
        eps: the smallest norm that is divided by.
        dim: the axis of the outputs; None for 1 in transposed convolutions and 0 elsewhere.

    Returns:
        The module.

    Raises:
        RuntimeError: if it was applied to this parameter already.
        ValueError: for less than one iteration, or if the parameter is None or has no shape yet.
        KeyError: if there is no such parameter.
        ShapeError: if it has no such axis.

    Source: Miyato et al. 2018; ``torch.nn.utils.spectral_norm``.

    Example:
        >>> import statefulnn as nn
        >>> layer = nn.utils.spectral_norm(nn.Linear(20, 40))
        >>> list(layer.state_dict())
        ['bias', 'weight_orig', 'weight_u', 'weight_v']
    """
    SpectralNorm.apply(
        module, name, n_power_iterations, output_dim(module) if dim is None else dim, eps
    )
    return module


def remove_spectral_norm(module: Module, name: str = "weight") -> Module:
    """Undo `spectral_norm`: make the weight a parameter again.

    Args:
        module: it is changed.
        name: of the parameter.

    Returns:
        The module.

    Raises:
        ValueError: if `spectral_norm` was not applied to it.

    Source: ``torch.nn.utils.remove_spectral_norm``.

    Example:
        >>> import statefulnn as nn
        >>> layer = nn.utils.spectral_norm(nn.Linear(20, 40))
        >>> list(nn.utils.remove_spectral_norm(layer).state_dict())
        ['bias', 'weight']
    """
    applied = computation(module, name, SpectralNorm)
    if applied is None:
        raise ValueError(
            explain(
                f"remove_spectral_norm(module, {name!r})",
                f"spectral_norm of '{name}' not found in {type(module).__name__}",
                "parametrize.remove_parametrizations(module, name), if it was applied by "
                "parametrizations.spectral_norm",
            )
        )
    applied.remove(module)
    return module
