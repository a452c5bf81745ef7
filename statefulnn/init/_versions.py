"""Versions of the initial values: which rule fills which parameter of which layer.

A version is a class of rules, one method for each kind of layer. Layers ask for theirs in
`reset_parameters`: ``init.rules(self).linear(self.weight, self.bias)``. The name of the version in force is
noted on every module when it is built, so `reset_parameters` gives the same distribution for good.

A version that was released never changes: what is known better goes into a new one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statefulnn.core.construction import current_version, session, version_in_force
from statefulnn.core.errors import explain
from statefulnn.core.placement import is_meta
from statefulnn.init import _initializers as draw


class Torch:
    """torch 2.13's formulas, exactly."""

    # Whether a stack of layers starts as copies of one drawn layer (torch), or each is drawn anew.
    independent_layers = False

    def __init__(self, nonlinearity: str | None = None) -> None:
        self.nonlinearity = nonlinearity

    def linear(self, weight: Any, bias: Any, nonlinearity: str | None = None) -> None:
        """Linear ``(out, in)``: weight and bias U(±1/√in)."""
        self._uniform_by_fan_in(weight, bias)

    def conv(self, weight: Any, bias: Any, nonlinearity: str | None = None) -> None:
        """ConvNd ``(out, in/groups, *k)``: weight and bias U(±1/√fan_in), fan_in = in/groups · k."""
        self._uniform_by_fan_in(weight, bias)

    def conv_transpose(
        self,
        weight: Any,
        bias: Any,
        groups: int = 1,
        stride: Sequence[int] = (),
        nonlinearity: str | None = None,
    ) -> None:
        """ConvTransposeNd ``(in, out/groups, *k)``: U(±1/√n), where n = out/groups · k is no fan-in."""
        self._uniform_by_fan_in(weight, bias)

    def _uniform_by_fan_in(self, weight: Any, bias: Any) -> None:
        if weight.size:
            # With a = √5 this is U(±1/√fan_in), whose gain is 1/√3: torch's choice, kept for parity.
            draw.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            fan_in = math.prod(weight.shape[1:])
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            draw.uniform_(bias, -bound, bound)

    def bilinear(self, weight: Any, bias: Any) -> None:
        """Bilinear ``(out, in1, in2)``: weight and bias U(±1/√in1)."""
        bound = 1 / math.sqrt(weight.shape[1])
        draw.uniform_(weight, -bound, bound)
        if bias is not None:
            draw.uniform_(bias, -bound, bound)

    def embedding(self, weight: Any, padding_idx: int | None = None) -> None:
        """Embedding, EmbeddingBag ``(V, D)``: N(0, 1); the padding row is 0."""
        draw.normal_(weight)
        if padding_idx is not None and not is_meta(weight.value):
            weight.value = weight.value.at[padding_idx].set(0)

    def attention(
        self, in_proj: Sequence[Any], in_bias: Any, out_proj: Any, bias_k: Any, bias_v: Any
    ) -> None:
        """MultiheadAttention: projections xavier_uniform_ (packed: of (3E, E)); output as Linear, bias 0.

        `out_proj` is the output layer, which has drawn its own values.
        """
        for weight in in_proj:
            draw.xavier_uniform_(weight)
        if in_bias is not None:
            draw.zeros_(in_bias)
            if out_proj.bias is not None:
                draw.zeros_(out_proj.bias)
        for extra in (bias_k, bias_v):
            if extra is not None:
                draw.xavier_normal_(extra)

    def recurrent(self, kind: str, hidden_size: int, parameters: Mapping[str, Any]) -> None:
        """RNN, LSTM, GRU and cells: every tensor U(±1/√hidden), the biases too.

        `kind` is "rnn", "lstm" or "gru"; `parameters` go by name (``weight_ih_l0`` ...).
        """
        bound = 1 / math.sqrt(hidden_size) if hidden_size > 0 else 0.0
        for parameter in parameters.values():
            draw.uniform_(parameter, -bound, bound)

    def transformer(self, model: Any) -> None:
        """Transformer, once its layers are drawn: xavier_uniform_ for all with more than one axis."""
        for parameter in model.parameters():
            if parameter.ndim > 1:
                draw.xavier_uniform_(parameter)


VERSIONS: dict[str, type[Torch]] = {"torch": Torch}


def _parsed(name: str) -> tuple[str, str | None]:
    version, _, nonlinearity = name.partition("+")
    if version not in VERSIONS:
        raise ValueError(
            explain(
                f"asked for initialisation version {name!r}",
                f"the versions are {', '.join(map(repr, VERSIONS))}",
                f"nn.init.version({list(VERSIONS)[-1]!r})",
            )
        )
    return version, nonlinearity or None


def rules(module: Any) -> Torch:
    """Return the rules by which a module draws its initial values.

    Args:
        module: a module; it noted the version in force when it was built.

    Example:
        >>> import statefulnn as nn
        >>> layer = nn.Linear(2, 3)
        >>> nn.init.rules(layer).linear(layer.weight, layer.bias)
    """
    version, nonlinearity = _parsed(module.init_version)
    return VERSIONS[version](nonlinearity)


@contextlib.contextmanager
def version(name: str) -> Iterator[None]:
    """Build modules by the rules of a version, inside a ``with`` block.

    Args:
        name: "torch", or a dated version such as "2026.1".

    Raises:
        ValueError: if there is no such version.

    Example:
        >>> import statefulnn as nn
        >>> with nn.init.version("torch"):
        ...     layer = nn.Linear(2, 3)
        >>> layer.init_version
        'torch'
    """
    _parsed(name)
    token = version_in_force.set(name)
    try:
        yield
    finally:
        version_in_force.reset(token)


def set_version(name: str) -> None:
    """Build modules by the rules of a version from here on, in all threads.

    Args:
        name: "torch", or a dated version such as "2026.1".

    Raises:
        ValueError: if there is no such version.

    Example:
        >>> import statefulnn as nn
        >>> nn.init.set_version("torch")
    """
    _parsed(name)
    session.version = name


def get_version() -> str:
    """Return the name of the version in force.

    Example:
        >>> import statefulnn as nn
        >>> nn.init.get_version()
        'torch'
    """
    return current_version()
