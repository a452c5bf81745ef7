"""Names for the sizes of a graph's arguments, and texts of Python for what follows from them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._sympy.functions import FloorDiv, IntTrueDiv
from torch.utils._sympy.printers import PythonPrinter

from statefulnn.bridge.torch.structures import Size
from statefulnn.bridge.torch.tracing import Number


class Unresolved(Exception):
    """A size that does not follow from the arguments of a call."""


class _Printer(PythonPrinter):
    """Prints what `Size` evaluates, without torch."""

    def _print_ToFloat(self, expr: Any) -> str:
        return f"float({self._print(expr.args[0])})"

    def _helper_sqrt(self, expr: Any) -> str:
        return f"math.sqrt({self._print(expr)})"

    # A quotient of sizes made whole is a size also where sizes have names: there is no other way to one.
    def _print_TruncToInt(self, expr: Any) -> str:
        if isinstance(expr.args[0], IntTrueDiv):
            return self._print(FloorDiv(*expr.args[0].args))
        return super()._print_TruncToInt(expr)

    def _print_FloorToInt(self, expr: Any) -> str:
        if isinstance(expr.args[0], IntTrueDiv):
            return self._print(FloorDiv(*expr.args[0].args))
        return super()._print_FloorToInt(expr)

    def _print_CeilToInt(self, expr: Any) -> str:
        if isinstance(expr.args[0], IntTrueDiv):
            size, divisor = expr.args[0].args
            return f"-({self._print(FloorDiv(-size, divisor))})"
        return super()._print_CeilToInt(expr)


class Sizes:
    """Names and texts of one graph.

    Args:
        environment: of torch.export: which sizes it found to be equal after it had noted them.
    """

    def __init__(self, environment: Any = None) -> None:
        self.names: dict[Any, Any] = {}
        self.environment = environment

    def known(self, expression: Any) -> Any:
        return expression if self.environment is None else self.environment.replace(expression)

    def name(self, expression: Any) -> str:
        expression = self.known(expression)
        if expression not in self.names:
            symbol: Any = type(
                next(iter(expression.free_symbols))
            )  # sympy is torch's, and not ours
            self.names[expression] = symbol(f"d{len(self.names)}", integer=True)
        return str(self.names[expression])

    def axis(self, size: Any) -> int | str:
        if isinstance(size, torch.SymInt):
            expression = self.known(size.node.expr)
            return int(expression) if expression.is_number else self.name(expression)
        return int(size)

    def leaf(self, value: Any) -> Any:
        return Size(self.text(value.expression)) if isinstance(value, Number) else value

    def text(self, expression: Any) -> str:
        known = self.known(expression).xreplace(self.names)
        names = set(self.names.values())
        for symbol in known.free_symbols - names:
            known = known.subs(symbol, self.solved(symbol) or symbol)
        if not known.free_symbols <= names:
            raise Unresolved(f"the size {expression}, which does not follow from its arguments")
        return _Printer().doprint(known)

    def solved(self, symbol: Any) -> Any:
        """Return a symbol from a size that is a multiple of it and a number, such as ``2*s0 + 1``."""
        for expression, name in self.names.items():
            if expression.free_symbols == {symbol}:
                polynomial = expression.as_poly(symbol)
                if polynomial is not None and polynomial.degree() == 1:
                    factor, rest = polynomial.all_coeffs()
                    return FloorDiv(name - rest, factor)
        return None

    def relations(self) -> list[str]:
        """Return how sizes with names follow from others, as conditions."""
        found = []
        for expression, name in self.names.items():
            known = expression.xreplace({e: n for e, n in self.names.items() if e.is_Symbol})
            if not expression.is_Symbol and known.free_symbols <= set(self.names.values()):
                found.append(f"{name} == {_Printer().doprint(known)}")
        return found
