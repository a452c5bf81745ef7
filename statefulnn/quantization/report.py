"""What nn.quantize tells: bytes and errors."""

from __future__ import annotations

import dataclasses
import html


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """What became of one layer.

    Attributes:
        name: its dotted name.
        kind: its class.
        shape: of its weight.
        before: bytes of the weight.
        after: bytes of codes and constants.
        error: the norm of what was lost over that of the weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    before: int
    after: int
    error: float


@dataclasses.dataclass(frozen=True, repr=False)
class QuantizationReport:
    """What `quantize` did; printed, it is a table.

    Attributes:
        format: "int8" or "nf4".
        layers: one entry for each layer.
    """

    format: str
    layers: tuple[QuantizedLayer, ...]

    @property
    def before(self) -> int:
        """The bytes of all weights before."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """The bytes of their codes and constants."""
        return sum(layer.after for layer in self.layers)

    @property
    def frozen(self) -> list[str]:
        """The names of the weights, which are no parameters any more: no gradient, no optimizer has them."""
        return [f"{layer.name}.weight".lstrip(".") for layer in self.layers]

    def __str__(self) -> str:
        rows = [("layer", "kind", "weight", "bytes", f"in {self.format}", "error")]
        for x in self.layers:
            shape = " x ".join(map(str, x.shape))
            rows.append(
                (x.name, x.kind, shape, f"{x.before:,}", f"{x.after:,}", f"{100 * x.error:.2g} %")
            )
        ratio = self.after / self.before
        rows.append(("all", "", "", f"{self.before:,}", f"{self.after:,}", f"({ratio:.3f}x)"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if i < 3 else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.append("The weights are frozen: codes in buffers, no parameters.")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the text for notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"
