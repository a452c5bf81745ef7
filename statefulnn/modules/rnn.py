"""Recurrent layers over sequences; the cells that take one step are in `rnn_cell`."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from statefulnn import init
from statefulnn.core.box import unwrap
from statefulnn.core.errors import explain
from statefulnn.core.generator import next_key
from statefulnn.core.module import Module
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import DeviceLike
from statefulnn.functional._checks import array, require_rank
from statefulnn.functional.packed import (
    PackedSequence,
    packed_data,
    padded_data,
    permuted,
    places,
)
from statefulnn.functional.recurrent import KINDS, recurrent

# For each sequence, how many steps it has.
Lengths: TypeAlias = ArrayLike | Sequence[int]
# Hidden state and cell state of an LSTM.
StatePair: TypeAlias = tuple[ArrayLike, ArrayLike]
# Sequences come out as they went in.
Steps = TypeVar("Steps", jax.Array, np.ndarray, PackedSequence)

_ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def draw_parameters(module: Any) -> None:
    """Draw the initial values of a recurrent layer or cell, by the rules of its version."""
    present = {name: p for name, p in module._parameters.items() if p is not None}
    kind = module.mode.partition("_")[0].lower()
    init.rules(module).recurrent(kind, module.hidden_size, present)


class RNNBase(Module):
    """Base of `RNN`, `LSTM` and `GRU`: their parameters and how sequences are run through them.

    Args:
        mode: "RNN_TANH", "RNN_RELU", "LSTM" or "GRU".
        input_size: the features of an input.
        hidden_size: the features of a state.
        num_layers: how many layers are stacked, each fed with what the one below gives.
        bias: whether there are biases.
        batch_first: whether the batch is the first axis of input and output (not of states).
        dropout: the probability that an element is dropped between two layers in training.
        bidirectional: whether a second direction runs from the end to the start.
        proj_size: the size to which an LSTM's hidden state is projected; 0 for no projection.
        device: where the parameters are put.
        dtype: their dtype.

    Raises:
        ValueError: for sizes or a dropout out of range.
        TypeError: for sizes that are no integers, or flags that are no bools.

    Source: ``torch.nn.RNNBase``.

    Example:
        >>> import statefulnn as nn
        >>> [name for name, _ in nn.RNNBase("GRU", 3, 4).named_parameters()]
        ['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'bias_hh_l0']
    """

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        _check_options(
            type(self).__name__,
            mode,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            proj_size,
        )
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size

        gates = KINDS[mode].gates * hidden_size
        out = proj_size or hidden_size
        directions = ("", "_reverse") if bidirectional else ("",)
        names = []
        for layer in range(num_layers):
            features = out * len(directions) if layer else input_size
            shapes = {"weight_ih": (gates, features), "weight_hh": (gates, out)}
            if bias:
                shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
            if proj_size:
                shapes["weight_hr"] = (proj_size, hidden_size)
            for direction in directions:
                for role, shape in shapes.items():
                    name = f"{role}_l{layer}{direction}"
                    self.register_parameter(name, init.empty_parameter(shape, dtype, device))
                names.append(tuple(f"{role}_l{layer}{direction}" for role in shapes))
        self._all_weights = tuple(names)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        draw_parameters(self)

    @property
    def all_weights(self) -> list[list[Parameter]]:
        """The parameters, one list for each layer and direction."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Parameter]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def flatten_parameters(self) -> None:
        """Do nothing: there is no memory to arrange."""

    def _layers(self) -> list[dict[str, Any]]:
        layers = []
        for names in self._all_weights:
            layer = dict.fromkeys(_ROLES)
            for name in names:
                layer[name.partition("_l")[0]] = unwrap(getattr(self, name))
            layers.append(layer)
        return layers

    def forward(
        self,
        input: ArrayLike | PackedSequence,
        hx: ArrayLike | StatePair | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[Any, Any]:
        packed = isinstance(input, PackedSequence)
        # Drawn even for a single layer only if there is something to drop.
        drops = self.training and self.dropout > 0 and self.num_layers > 1
        options = {
            "bidirectional": self.bidirectional,
            "dropout": self.dropout,
            "rng": next_key() if drops else None,
        }
        if not packed:
            return recurrent(
                self.mode,
                input,
                hx,
                self._layers(),
                batch_first=self.batch_first,
                lengths=lengths,
                **options,
            )
        if lengths is not None:
            raise TypeError(
                explain(
                    f"nn.{type(self).__name__} was given a PackedSequence and lengths",
                    "a PackedSequence knows its lengths",
                    "leave lengths out; or give the padded array and lengths, which may be traced",
                )
            )
        data, sizes, indices, inverse = input
        data = array(data, "input.data", type(self).__name__)
        require_rank(data, (2,), "input.data", type(self).__name__, "(sum of lengths, features)")
        out, state = recurrent(
            self.mode,
            padded_data(data, sizes),
            permuted(_arrays(hx), indices),
            self._layers(),
            mask=places(sizes).mask,
            **options,
        )
        out = PackedSequence(packed_data(out, sizes), sizes, indices, inverse)
        return out, permuted(state, inverse)

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        for name, default in (
            ("proj_size", 0),
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0),
            ("bidirectional", False),
        ):
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)


def _arrays(hx: object) -> Any:
    return tuple(map(unwrap, hx)) if isinstance(hx, (tuple, list)) else unwrap(hx)


def _check_options(
    name: str,
    mode: str,
    input_size: Any,
    hidden_size: Any,
    num_layers: Any,
    bias: Any,
    batch_first: Any,
    dropout: Any,
    proj_size: Any,
) -> None:
    made = f"made nn.{name} with "
    if mode not in KINDS:
        raise ValueError(
            explain(f"{made}mode={mode!r}", f"the modes are {', '.join(KINDS)}", 'mode="LSTM"')
        )
    if (
        not isinstance(dropout, numbers.Number)
        or isinstance(dropout, (bool, complex))
        or not 0 <= dropout <= 1  # pyright: ignore[reportOperatorIssue]
    ):
        raise ValueError(
            explain(
                f"{made}dropout={dropout!r}",
                "dropout is the probability that an element is dropped: a number in range [0, 1]",
                "dropout=0.1",
            )
        )
    flags = {"bias": bias, "batch_first": batch_first}
    sizes = {"input_size": input_size, "hidden_size": hidden_size}
    _check_types(made, flags, sizes)
    for which, size in (*sizes.items(), ("num_layers", num_layers)):
        if size <= 0:
            raise ValueError(
                explain(f"{made}{which}={size}", f"{which} must be greater than zero", f"{which}=1")
            )
    _check_projection(made, mode, hidden_size, proj_size)
    if dropout and num_layers == 1:
        warnings.warn(
            explain(
                f"{made}dropout={dropout} and num_layers=1",
                "dropout is applied between layers, after all but the last",
                f"num_layers=2, or nn.Dropout({dropout}) after the layer",
            ),
            UserWarning,
            stacklevel=4,
        )


def _check_types(made: str, flags: dict[str, Any], sizes: dict[str, Any]) -> None:
    for which, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(
                explain(
                    f"{made}{which}={flag!r}",
                    f"{which} should be of type bool, got: {type(flag).__name__}",
                    f"{which}=True, or {which}=False",
                )
            )
    for which, size in sizes.items():
        if not isinstance(size, (int, np.integer)):
            raise TypeError(
                explain(
                    f"{made}{which}={size!r}",
                    f"{which} should be of type int, got: {type(size).__name__}",
                    f"{which}=128",
                )
            )


def _check_projection(made: str, mode: str, hidden_size: int, proj_size: int) -> None:
    if proj_size and mode != "LSTM":
        raise ValueError(
            explain(
                f"{made}proj_size={proj_size}",
                "proj_size argument is only supported for LSTM, not RNN or GRU",
                f"nn.LSTM, or nn.Linear({hidden_size}, {proj_size}) after the layer",
            )
        )
    if not 0 <= proj_size < hidden_size:
        raise ValueError(
            explain(
                f"{made}proj_size={proj_size} and hidden_size={hidden_size}",
                "proj_size has to be smaller than hidden_size, and 0 or more",
                "proj_size=0 for no projection",
            )
        )


def _mode_of(nonlinearity: str, name: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(
            explain(
                f"made nn.{name} with nonlinearity={nonlinearity!r}",
                "unknown nonlinearity",
                "nonlinearity='tanh', or nonlinearity='relu'",
            )
        )
    return f"RNN_{nonlinearity.upper()}"


class RNN(RNNBase):
    """Run sequences through Elman's network: ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``.

    Args:
        input_size: F, the features of an input.
        hidden_size: H, the features of a state.
        num_layers: how many layers are stacked, each fed with what the one below gives.
        nonlinearity: "tanh" or "relu".
        bias: whether there are biases.
        batch_first: whether the batch is the first axis of input and output (not of states).
        dropout: the probability that an element is dropped between two layers in training.
        bidirectional: whether a second direction runs from the end to the start; D is then 2, else 1.
        device: where the parameters are put.
        dtype: their dtype.
        proj_size: for `LSTM` only; anything but 0 is refused.

    Shape:
        - input: ``(T, N, F)``, ``(N, T, F)`` with `batch_first`, ``(T, F)``, or a PackedSequence.
        - lengths: ``(N,)``, integers from 0 to T, which may be traced: how many steps each sequence of a
          padded batch has. The result is that of packing and padding again: outputs beyond a length are
          zero, and the last state is that of the last step. New lengths compile nothing.
        - hx: ``(D num_layers, N, H)``, ``(D num_layers, H)`` for an input without batch; zeros if left
          out.
        - outputs: the outputs of the last layer, as the input with ``D H`` features; and the last states,
          as `hx`.

    Attributes:
        weight_ih_l0: ``(H, F)``, from U(±1/√H); in layers above ``(H, D H)``; ``_reverse`` is added to
            the name for the second direction.
        weight_hh_l0: ``(H, H)``, likewise.
        bias_ih_l0: ``(H,)``, likewise, unless `bias` is False.
        bias_hh_l0: ``(H,)``, likewise, unless `bias` is False.

    Source: Elman 1990.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> out, last = nn.RNN(3, 4, num_layers=2)(jnp.ones((5, 2, 3)))
        >>> out.shape, last.shape
        ((5, 2, 4), (2, 2, 4))
    """

    if TYPE_CHECKING:  # RNNBase runs it

        def forward(
            self, input: Steps, hx: ArrayLike | None = None, lengths: Lengths | None = None
        ) -> tuple[Steps, jax.Array]: ...

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
        *,
        proj_size: int = 0,
    ) -> None:
        super().__init__(
            _mode_of(nonlinearity, "RNN"),
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.nonlinearity = nonlinearity


class LSTM(RNNBase):
    """Run sequences through a network of long short-term memory.

    ``i, f, o = σ(...)``, ``g = tanh(...)`` of ``W_ih x + b_ih + W_hh h + b_hh``, in the order i, f, g, o;
    ``c' = f c + i g``; ``h' = o tanh(c')``, with a projection ``W_hr h'``.

    Args:
        input_size: F, the features of an input.
        hidden_size: H, the features of a cell state.
        num_layers: how many layers are stacked, each fed with what the one below gives.
        bias: whether there are biases.
        batch_first: whether the batch is the first axis of input and output (not of states).
        dropout: the probability that an element is dropped between two layers in training.
        bidirectional: whether a second direction runs from the end to the start; D is then 2, else 1.
        proj_size: P, the size to which the hidden state is projected; 0 for no projection, then P is H.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(T, N, F)``, ``(N, T, F)`` with `batch_first`, ``(T, F)``, or a PackedSequence.
        - lengths: ``(N,)``, integers from 0 to T, which may be traced: how many steps each sequence of a
          padded batch has. The result is that of packing and padding again: outputs beyond a length are
          zero, and the last state is that of the last step. New lengths compile nothing.
        - hx: the hidden state ``(D num_layers, N, P)`` and the cell state ``(D num_layers, N, H)``, both
          without N for an input without batch; zeros if left out.
        - outputs: the outputs of the last layer, as the input with ``D P`` features; and the last states,
          as `hx`.

    Attributes:
        weight_ih_l0: ``(4 H, F)``, from U(±1/√H); in layers above ``(4 H, D P)``; ``_reverse`` is added
            to the name for the second direction.
        weight_hh_l0: ``(4 H, P)``, likewise.
        bias_ih_l0: ``(4 H,)``, likewise, unless `bias` is False.
        bias_hh_l0: ``(4 H,)``, likewise, unless `bias` is False.
        weight_hr_l0: ``(P, H)``, likewise, if there is a projection.

    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000; projections: Sak et al. 2014.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> out, (h, c) = nn.LSTM(3, 4, bidirectional=True, proj_size=2)(jnp.ones((5, 2, 3)))
        >>> out.shape, h.shape, c.shape
        ((5, 2, 4), (2, 2, 2), (2, 2, 4))
    """

    if TYPE_CHECKING:  # RNNBase runs it

        def forward(
            self, input: Steps, hx: StatePair | None = None, lengths: Lengths | None = None
        ) -> tuple[Steps, tuple[jax.Array, jax.Array]]: ...

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )


class GRU(RNNBase):
    """Run sequences through a network of gated recurrent units.

    ``r, z = σ(W_ih x + b_ih + W_hh h + b_hh)``, ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``,
    ``h' = (1 - z) n + z h``; the order of the gates is r, z, n.

    Args:
        input_size: F, the features of an input.
        hidden_size: H, the features of a state.
        num_layers: how many layers are stacked, each fed with what the one below gives.
        bias: whether there are biases.
        batch_first: whether the batch is the first axis of input and output (not of states).
        dropout: the probability that an element is dropped between two layers in training.
        bidirectional: whether a second direction runs from the end to the start; D is then 2, else 1.
        device: where the parameters are put.
        dtype: their dtype.
        proj_size: for `LSTM` only; anything but 0 is refused.

    Shape:
        - input: ``(T, N, F)``, ``(N, T, F)`` with `batch_first`, ``(T, F)``, or a PackedSequence.
        - lengths: ``(N,)``, integers from 0 to T, which may be traced: how many steps each sequence of a
          padded batch has. The result is that of packing and padding again: outputs beyond a length are
          zero, and the last state is that of the last step. New lengths compile nothing.
        - hx: ``(D num_layers, N, H)``, ``(D num_layers, H)`` for an input without batch; zeros if left
          out.
        - outputs: the outputs of the last layer, as the input with ``D H`` features; and the last states,
          as `hx`.

    Attributes:
        weight_ih_l0: ``(3 H, F)``, from U(±1/√H); in layers above ``(3 H, D H)``; ``_reverse`` is added
            to the name for the second direction.
        weight_hh_l0: ``(3 H, H)``, likewise.
        bias_ih_l0: ``(3 H,)``, likewise, unless `bias` is False.
        bias_hh_l0: ``(3 H,)``, likewise, unless `bias` is False.

    Source: Cho et al. 2014, in the variant that applies r after the product (as cuDNN).

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> out, last = nn.GRU(3, 4, batch_first=True)(jnp.ones((2, 5, 3)))
        >>> out.shape, last.shape
        ((2, 5, 4), (1, 2, 4))
    """

    if TYPE_CHECKING:  # RNNBase runs it

        def forward(
            self, input: Steps, hx: ArrayLike | None = None, lengths: Lengths | None = None
        ) -> tuple[Steps, jax.Array]: ...

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
        *,
        proj_size: int = 0,
    ) -> None:
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
