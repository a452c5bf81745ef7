"""Operations carry the path of the module that made them, in the program and in its gradient."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

import statefulnn as nn

X = jnp.ones((4, 2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(2, 2)

    def forward(self, x):
        return jnp.tanh(self.attn(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Linear(2, 3), nn.ReLU())

    def forward(self, x):
        for layer in self.encoder.layers:
            x = layer(x)
        return self.head(x)


def names_in(lowered) -> set[str]:
    """Return the names that operations have in the text of a program, without the operations' own."""
    text = lowered.as_text(debug_info=True)
    return {name.rpartition("/")[0] for name in re.findall(r'loc\("([^"]+)"', text)}


CALLS = {
    "nn.jit": lambda m: nn.jit(lambda m, x: m(x)).lower(m, X),
    "nn.jit of the model": lambda m: nn.jit(m).lower(X),
    "jax.jit, argument": lambda m: jax.jit(lambda m, x: m(x)).lower(m, X),
    "jax.jit, closure": lambda m: jax.jit(lambda x: m(x)).lower(X),
    "functionalize": lambda m: jax.jit(nn.functionalize(m)[0]).lower(nn.functionalize(m)[1], X),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_path_of_a_module_is_in_the_names_of_its_operations(call):
    names = names_in(CALLS[call](Net()))
    for path in ("encoder.layers.0/attn", "encoder.layers.1/attn", "head/0", "head/1"):
        assert any(f"/{path}" in name for name in names), (path, sorted(names))
    assert not any("layers.1/encoder" in name or "head/head" in name for name in names)


def test_the_gradient_s_operations_carry_the_path_too():
    lowered = nn.jit(lambda m, x: nn.grad(lambda m: m(x).sum())(m)).lower(Net(), X)
    backward = [n for n in names_in(lowered) if "transpose" in n]
    assert any("encoder.layers.1" in n and "attn" in n for n in backward), sorted(backward)


def test_a_shared_module_is_named_by_its_first_path():
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(model[0])
    names = names_in(nn.jit(model).lower(X))
    assert any("/0" in n for n in names)


def test_names_end_with_the_call_also_if_it_fails():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("no")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.broken, self.fine = Broken(), nn.Linear(2, 2)

        def forward(self, x):
            try:
                self.broken(x)
            except ValueError:
                return self.fine(x)

    names = names_in(nn.jit(Outer()).lower(X))
    assert any("fine" in n for n in names)
    assert not any("broken" in n for n in names)


def test_a_compiled_call_opens_no_scope(monkeypatch):
    model = Net()
    compiled = nn.jit(model)
    compiled(X)
    monkeypatch.setattr(jax, "named_scope", lambda name: pytest.fail("a scope was opened"))
    compiled(X)
