"""Versions of the initial values: which rule fills which parameter of which layer.

A version is a class of rules, one method for each kind of layer. Layers ask for theirs in
`reset_parameters`: ``init.rules(self).linear(self.weight, self.bias)``. The name of the version in force is
noted on every module when it is built, so `reset_parameters` gives the same distribution for good.

A version that was released never changes: what is known better goes into a new one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from statefulnn.core.construction import (
    current_version,
    in_force,
    set_session_version,
    version_in_force,
)
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import is_meta
from statefulnn.init import _initializers as draw
from statefulnn.init._schemes import SCHEMES


class Torch:
    """torch 2.13's formulas, exactly."""

    # Whether a stack of layers starts as copies of one drawn layer (torch), or each is drawn anew.
    independent_layers = False

    def __init__(self, nonlinearity: str | None = None) -> None:
        self.nonlinearity = nonlinearity

    def linear(
        self, weight: Parameter, bias: Parameter | None, nonlinearity: str | None = None
    ) -> None:
        """Linear ``(out, in)``: weight and bias U(±1/√in)."""
        self._uniform_by_fan_in(weight, bias)

    def conv(
        self, weight: Parameter, bias: Parameter | None, nonlinearity: str | None = None
    ) -> None:
        """ConvNd ``(out, in/groups, *k)``: weight and bias U(±1/√fan_in), fan_in = in/groups · k."""
        self._uniform_by_fan_in(weight, bias)

    def conv_transpose(
        self,
        weight: Parameter,
        bias: Parameter | None,
        groups: int = 1,
        stride: Sequence[int] = (),
        nonlinearity: str | None = None,
    ) -> None:
        """ConvTransposeNd ``(in, out/groups, *k)``: U(±1/√n), where n = out/groups · k is no fan-in."""
        self._uniform_by_fan_in(weight, bias)

    def _uniform_by_fan_in(self, weight: Parameter, bias: Parameter | None) -> None:
        if weight.size:
            # With a = √5 this is U(±1/√fan_in), whose gain is 1/√3: torch's choice, kept for parity.
            draw.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            fan_in = math.prod(weight.shape[1:])
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            draw.uniform_(bias, -bound, bound)

    def bilinear(self, weight: Parameter, bias: Parameter | None) -> None:
        """Bilinear ``(out, in1, in2)``: weight and bias U(±1/√in1)."""
        bound = 1 / math.sqrt(weight.shape[1])
        draw.uniform_(weight, -bound, bound)
        if bias is not None:
            draw.uniform_(bias, -bound, bound)

    def embedding(self, weight: Parameter, padding_idx: int | None = None) -> None:
        """Embedding, EmbeddingBag ``(V, D)``: N(0, 1); the padding row is 0."""
        draw.normal_(weight)
        self._clear(weight, padding_idx)

    def _clear(self, weight: Parameter, row: int | None) -> None:
        if row is not None and not is_meta(weight.value):
            weight.value = weight.value.at[row].set(0)

    def attention(
        self,
        in_proj: Sequence[Any],
        in_bias: Parameter | None,
        out_proj: Module,
        bias_k: Parameter | None,
        bias_v: Parameter | None,
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

    def transformer(self, model: Module) -> None:
        """Transformer, once its layers are drawn: xavier_uniform_ for all with more than one axis."""
        for parameter in model.parameters():
            # Without numbers a layer remains a copy of the one that it was copied from.
            if parameter.ndim > 1 and not is_meta(parameter.value):
                draw.xavier_uniform_(parameter)

    def feedforward(self, first: Module, second: Module, activation: str | None) -> None:
        """Transformer layers: the two Linear layers keep what they have drawn."""


# What a non-linearity does to a standard normal input; its gain undoes that.
_NONLINEARITIES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "gelu": lambda z: z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "elu": lambda z: np.where(z > 0, z, np.expm1(z)),
    "selu": lambda z: 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * np.expm1(z)),
    "softplus": lambda z: np.logaddexp(z, 0),
    "mish": lambda z: z * np.tanh(np.logaddexp(z, 0)),
}


@functools.cache
def gain_of(nonlinearity: str) -> float:
    """Return 1 / √E[f(z)²] for a standard normal z: √2 for "relu", 1 for "linear" and "selu".

    Source: He et al. 2015, eq. 10, for any function.
    """
    if nonlinearity not in _NONLINEARITIES:
        raise ValueError(
            explain(
                f"asked for the gain of nonlinearity {nonlinearity!r}",
                f"the known ones are {', '.join(map(repr, _NONLINEARITIES))}",
                'nn.init.version("2026.1+gelu")',
            )
        )
    # Gauss-Hermite would oscillate at the kink of a relu: a fine sum does not.
    z = np.linspace(-12, 12, 48_001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    second = float(np.sum(_NONLINEARITIES[nonlinearity](z) ** 2 * density) * (z[1] - z[0]))
    return 1 / math.sqrt(second)


class V2026_1(Torch):
    """Current practice of 2026: signals keep their size through depth, biases start at zero.

    Weights are uniform, of the variance that the rule asks for: the shape of the distribution matters
    less than its variance, and bounded draws have no outliers. The non-linearity that follows a Linear or
    Conv is "relu" unless the version's name says otherwise ("2026.1+gelu").
    """

    independent_layers = True

    def _gain(self, nonlinearity: str | None) -> float:
        return gain_of(nonlinearity or self.nonlinearity or "relu")

    def _scaled(self, weight: Parameter, fan_in: float, gain: float = 1.0) -> None:
        bound = gain * math.sqrt(3.0 / max(fan_in, 1))
        draw.uniform_(weight, -bound, bound)

    def _zero(self, bias: Parameter | None) -> None:
        if bias is not None:
            draw.zeros_(bias)

    def linear(
        self, weight: Parameter, bias: Parameter | None, nonlinearity: str | None = None
    ) -> None:
        """Linear: variance gain²/in, gain √2 before a relu; bias 0.

        Source: He et al. 2015; zero biases as in flax, haiku and timm; pytorch#18182.
        """
        self._scaled(weight, weight.shape[1], self._gain(nonlinearity))
        self._zero(bias)

    def conv(
        self, weight: Parameter, bias: Parameter | None, nonlinearity: str | None = None
    ) -> None:
        """ConvNd: variance gain²/fan_in, fan_in = in/groups · k; bias 0.

        Source: He et al. 2015.
        """
        self._scaled(weight, math.prod(weight.shape[1:]), self._gain(nonlinearity))
        self._zero(bias)

    def conv_transpose(
        self,
        weight: Parameter,
        bias: Parameter | None,
        groups: int = 1,
        stride: Sequence[int] = (),
        nonlinearity: str | None = None,
    ) -> None:
        """ConvTransposeNd: variance gain²/fan_in, fan_in = in/groups · k/stride; bias 0.

        Source: He et al. 2015, with the inputs that one output really has.
        """
        fan_in = weight.shape[0] / groups * math.prod(weight.shape[2:]) / math.prod(stride)
        self._scaled(weight, fan_in, self._gain(nonlinearity))
        self._zero(bias)

    def bilinear(self, weight: Parameter, bias: Parameter | None) -> None:
        """Bilinear: variance 1/(in1 · in2); bias 0.

        Source: the sum over both inputs has in1 · in2 terms.
        """
        self._scaled(weight, weight.shape[1] * weight.shape[2])
        self._zero(bias)

    def embedding(self, weight: Parameter, padding_idx: int | None = None) -> None:
        """Embedding, EmbeddingBag: N(0, 1/D), rows of length about 1; the padding row is 0.

        Source: flax.nnx.Embed; pytorch#3121, pytorch/translate#220. A tied head then has logits near 1.
        """
        draw.normal_(weight, 0.0, 1 / math.sqrt(max(weight.shape[1], 1)))
        self._clear(weight, padding_idx)

    def attention(
        self,
        in_proj: Sequence[Any],
        in_bias: Parameter | None,
        out_proj: Module,
        bias_k: Parameter | None,
        bias_v: Parameter | None,
    ) -> None:
        """MultiheadAttention: every projection variance 1/in, packed or not; biases 0.

        Source: Vaswani et al. 2017 with Glorot and Bengio 2010 for each (E, E); pytorch#166378.
        """
        for weight in (*in_proj, out_proj.weight):
            self._scaled(weight, weight.shape[1])
        self._zero(in_bias)
        self._zero(out_proj.bias)
        for extra in (bias_k, bias_v):
            if extra is not None:
                draw.normal_(extra, 0.0, 1 / math.sqrt(extra.shape[-1]))

    def recurrent(self, kind: str, hidden_size: int, parameters: Mapping[str, Any]) -> None:
        """RNN, LSTM, GRU and cells: input Glorot and recurrence orthogonal by gate, biases 0, forget 1.

        Source: Glorot and Bengio 2010; Saxe et al. 2013; Jozefowicz et al. 2015; keras LSTMCell. Torch's
        two biases are added: the forget gate's 1 is in the input's.
        """
        gates = {"lstm": 4, "gru": 3}.get(kind, 1)
        for name, parameter in parameters.items():
            if name.startswith("bias"):
                draw.zeros_(parameter)
                if kind == "lstm" and name.startswith("bias_ih") and not is_meta(parameter.value):
                    forget = slice(hidden_size, 2 * hidden_size)
                    parameter.value = parameter.value.at[forget].set(1)
            elif name.startswith("weight_hh"):
                draw.orthogonal_by_block_(parameter, gates)
            elif name.startswith("weight_hr"):
                self._scaled(parameter, parameter.shape[1])
            else:
                rows, columns = parameter.shape[0] // gates, parameter.shape[1]
                bound = math.sqrt(6.0 / max(rows + columns, 1))
                draw.uniform_(parameter, -bound, bound)

    def transformer(self, model: Module) -> None:
        """Transformer: what its layers have drawn, each layer its own."""

    def feedforward(self, first: Module, second: Module, activation: str | None) -> None:
        """Transformer layers: variance gain²/in before the activation, 1/in after it; biases 0.

        Source: He et al. 2015.
        """
        known = activation if activation in _NONLINEARITIES else None
        self.linear(first.weight, first.bias, known)
        self.linear(second.weight, second.bias, "linear")


VERSIONS: dict[str, type[Torch]] = {"torch": Torch, "2026.1": V2026_1}


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
    if nonlinearity:
        if VERSIONS[version] is Torch:
            raise ValueError(
                explain(
                    f"asked for initialisation version {name!r}",
                    "torch's formulas do not depend on the non-linearity",
                    'nn.init.version("torch")',
                )
            )
        gain_of(nonlinearity)
    return version, nonlinearity or None


def rules(module: Module) -> Torch:
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
        name: "torch", or a dated version such as "2026.1"; "2026.1+gelu" names the non-linearity that
            follows the Linear and Conv layers, "relu" if left out.

    Raises:
        ValueError: if there is no such version or non-linearity.

    Example:
        >>> import statefulnn as nn
        >>> with nn.init.version("2026.1+gelu"):
        ...     layer = nn.Linear(2, 3)
        >>> layer.init_version, layer.bias.tolist()
        ('2026.1+gelu', [0.0, 0.0, 0.0])
    """
    _parsed(name)
    with in_force(version_in_force, name):
        yield


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
    set_session_version(name)


def get_version() -> str:
    """Return the name of the version in force.

    Example:
        >>> import statefulnn as nn
        >>> nn.init.get_version()
        'torch'
    """
    return current_version()


_KINDS = (
    "linear",
    "conv",
    "conv_transpose",
    "bilinear",
    "embedding",
    "attention",
    "feedforward",
    "recurrent",
    "transformer",
)


def describe(name: str | None = None) -> None:
    """Print the rules of a version, or of a scheme, with their sources.

    Args:
        name: a version or a scheme; None for the version in force.

    Raises:
        ValueError: if there is neither.

    Example:
        >>> import statefulnn as nn
        >>> nn.init.describe("2026.1")
        2026.1: Current practice of 2026: ...
        Linear    variance gain²/in, gain √2 before a relu; bias 0.
                  Source: He et al. 2015; ...
        ...
        >>> nn.init.describe("resnet")
        resnet: Conv N(0, 2/fan_out), norms 1 and 0, ...
    """
    name = current_version() if name is None else name
    if name in SCHEMES:
        print(f"{name}: {inspect.getdoc(SCHEMES[name])}")
        return
    version, nonlinearity = _parsed(name)
    cls = VERSIONS[version]
    rows = []
    for kind in _KINDS:
        text = inspect.getdoc(getattr(cls, kind)) or ""
        first, _, rest = text.partition("\n")
        layer, _, rule = first.partition(": ")
        lines = [rule]
        if "Source:" in rest:
            lines.append("Source: " + " ".join(rest.partition("Source:")[2].split()))
        rows.append((layer.replace("``", ""), lines))
    independent = "each layer of a Transformer stack draws its own values."
    copies = "copies of one drawn layer."
    rows.append(("Layer stacks", [independent if cls.independent_layers else copies]))
    rows.append(("Normalisation", ["weight 1, bias 0."]))
    if cls is not Torch:
        chosen = nonlinearity or "relu"
        rows.append(("gain", [f"{gain_of(chosen):.4f} for {chosen}."]))
    print(f"{name}: {(inspect.getdoc(cls) or '').partition(chr(10))[0]}")
    width = max(len(layer) for layer, _ in rows)
    for layer, lines in rows:
        print(f"{layer:<{width}}  {lines[0]}")
        for line in lines[1:]:
            print(" " * (width + 2) + line)
