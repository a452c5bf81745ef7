"""Recurrent cells: one step of the layers in `rnn`."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from statefulnn import init
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike
from statefulnn.functional.recurrent import recurrent_cell
from statefulnn.modules.rnn import draw_parameters


class RNNCellBase(Module):
    """Base of `RNNCell`, `LSTMCell` and `GRUCell`: their parameters.

    Args:
        input_size: the features of an input.
        hidden_size: the features of a state.
        bias: whether there are biases.
        num_chunks: the number of gates.
        device: where the parameters are put.
        dtype: their dtype.

    Source: ``torch.nn.RNNCellBase``.

    Example:
        >>> import statefulnn as nn
        >>> nn.RNNCellBase(3, 4, True, num_chunks=3).weight_ih.shape
        (12, 3)
    """

    mode = "RNN_TANH"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        num_chunks: int,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        gates = num_chunks * hidden_size
        self.weight_ih = init.empty_parameter((gates, input_size), dtype, device)
        self.weight_hh = init.empty_parameter((gates, hidden_size), dtype, device)
        for name in ("bias_ih", "bias_hh"):
            value = init.empty_parameter(gates, dtype, device) if bias else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        draw_parameters(self)

    def _step(self, mode: str, input: Any, hx: Any) -> Any:
        return recurrent_cell(
            mode, input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        )

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        return text if self.bias is True else f"{text}, bias={self.bias}"


class RNNCell(RNNCellBase):
    """Take one step of Elman's network: ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``.

    Args:
        input_size: F, the features of an input.
        hidden_size: H, the features of a state.
        bias: whether there are biases.
        nonlinearity: "tanh" or "relu".
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, F)`` or ``(F,)``.
        - hx: ``(N, H)`` or ``(H,)``; zeros if left out. Output: the same.

    Attributes:
        weight_ih: ``(H, F)``, from U(±1/√H).
        weight_hh: ``(H, H)``, likewise.
        bias_ih: ``(H,)``, likewise, or None.
        bias_hh: ``(H,)``, likewise, or None.

    Source: Elman 1990.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.RNNCell(3, 4)(jnp.ones((2, 3))).shape
        (2, 4)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: ArrayLike, hx: ArrayLike | None = None) -> jax.Array:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(
                explain(
                    f"called nn.RNNCell with nonlinearity={self.nonlinearity!r}",
                    "unknown nonlinearity",
                    "nonlinearity='tanh', or nonlinearity='relu'",
                )
            )
        return self._step(f"RNN_{self.nonlinearity.upper()}", input, hx)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.nonlinearity == "tanh" else f"{text}, nonlinearity={self.nonlinearity}"


class LSTMCell(RNNCellBase):
    """Take one step of long short-term memory.

    ``i, f, o = σ(...)``, ``g = tanh(...)`` of ``W_ih x + b_ih + W_hh h + b_hh``, in the order i, f, g, o;
    ``c' = f c + i g``; ``h' = o tanh(c')``.

    Args:
        input_size: F, the features of an input.
        hidden_size: H, the features of a state.
        bias: whether there are biases.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, F)`` or ``(F,)``.
        - hx: hidden state and cell state, both ``(N, H)`` or ``(H,)``; zeros if left out. Output: the
          same.

    Attributes:
        weight_ih: ``(4 H, F)``, from U(±1/√H).
        weight_hh: ``(4 H, H)``, likewise.
        bias_ih: ``(4 H,)``, likewise, or None.
        bias_hh: ``(4 H,)``, likewise, or None.

    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> h, c = nn.LSTMCell(3, 4)(jnp.ones((2, 3)))
        >>> h.shape, c.shape
        ((2, 4), (2, 4))
    """

    mode = "LSTM"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)

    def forward(
        self, input: ArrayLike, hx: tuple[ArrayLike, ArrayLike] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        return self._step("LSTM", input, hx)


class GRUCell(RNNCellBase):
    """Take one step of a gated recurrent unit.

    ``r, z = σ(W_ih x + b_ih + W_hh h + b_hh)``, ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``,
    ``h' = (1 - z) n + z h``; the order of the gates is r, z, n.

    Args:
        input_size: F, the features of an input.
        hidden_size: H, the features of a state.
        bias: whether there are biases.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, F)`` or ``(F,)``.
        - hx: ``(N, H)`` or ``(H,)``; zeros if left out. Output: the same.

    Attributes:
        weight_ih: ``(3 H, F)``, from U(±1/√H).
        weight_hh: ``(3 H, H)``, likewise.
        bias_ih: ``(3 H,)``, likewise, or None.
        bias_hh: ``(3 H,)``, likewise, or None.

    Source: Cho et al. 2014, in the variant that applies r after the product (as cuDNN).

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.GRUCell(3, 4)(jnp.ones(3), jnp.zeros(4)).shape
        (4,)
    """

    mode = "GRU"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device, dtype)

    def forward(self, input: ArrayLike, hx: ArrayLike | None = None) -> jax.Array:
        return self._step("GRU", input, hx)
