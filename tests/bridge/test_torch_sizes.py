"""Sizes that code hands on: as numbers, in containers, from other arrays, through several modules."""

from __future__ import annotations

import math

import jax.numpy as jnp
import pytest
import torch
from torch import nn as tnn

import statefulnn as nn
from tests.bridge.beside_torch import beside, same

torch.manual_seed(0)


class Rows(tnn.Module):
    def forward(self, x, rows):
        return x.reshape(rows, -1).cumsum(0)


class Outer(tnn.Module):
    """Hands the size of its argument to a module inside of a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.fc = tnn.Linear(6, 6)

    def forward(self, x, *more):
        return self.inner(self.fc(x), *(more or (x.shape[0],)))


class Middle(tnn.Module):
    def __init__(self):
        super().__init__()
        self.rows = Rows()

    def forward(self, x, n):
        return self.rows(x, 2 * n) + self.rows(x=x, rows=n * 2)


class Grid(tnn.Module):
    """Sizes in a tuple, a dict and a list, floats and truth values made of them, and one of another array."""

    def __init__(self):
        super().__init__()
        self.fc = tnn.Linear(4, 4)
        self.fold = Fold()

    def forward(self, tokens, hw, named, scale=1.0, part=0.0, wide=False):
        height, width = hw
        x = self.fc(tokens).transpose(1, 2).reshape(tokens.shape[0], -1, height, width)
        x = self.fold(x, height * width, named["of"][0])
        return x * scale + part + (1 if wide else 0), width


class Fold(tnn.Module):
    def forward(self, x, count, other):
        return x.reshape(x.shape[0], x.shape[1], count).sum(1) + torch.arange(count) % other


class Picture(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv = tnn.Conv2d(3, 4, 3, padding=1)
        self.grid = Grid()

    def forward(self, x, y):
        x = self.conv(x)
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        named = {"of": [y.shape[1], 3]}
        options = {"scale": height**-0.5, "part": width / 2, "wide": height > 3}
        return self.grid(tokens, (height, width), named, **options)


def test_a_size_is_handed_to_a_submodule():
    ours = beside(Outer(Rows()), torch.randn(4, 6), others=[(torch.randn(3, 6),)])
    same(ours.inner(jnp.ones((5, 6)), 5), Rows()(torch.ones(5, 6), 5))
    with pytest.raises(nn.ShapeError, match="argument rows was traced as the size d0, which is 5"):
        ours.inner(jnp.ones((5, 6)), 3)
    with pytest.raises(nn.ShapeError, match="follows from sizes when it was traced, and is 'a'"):
        ours.inner(jnp.ones((5, 6)), "a")


def test_a_size_goes_through_several_levels():
    beside(Outer(Middle()), torch.randn(4, 6), others=[(torch.randn(2, 6),)])


@pytest.mark.parametrize("dynamic", ["auto", "all"])
def test_sizes_of_images_and_of_another_array_in_containers(dynamic):
    size = (4, 10) if dynamic == "all" else (8, 6)
    others = [(torch.randn(3, 3, *size), torch.randn(3, 7))]
    beside(Picture(), torch.randn(2, 3, 8, 6), torch.randn(2, 5), others=others, dynamic=dynamic)


def test_a_size_of_an_array_that_the_submodule_does_not_see_binds_the_size():
    class Ones(tnn.Module):
        def forward(self, n, x):
            return torch.ones(n, n).tril() * x

    class Net(tnn.Module):
        def __init__(self):
            super().__init__()
            self.ones = Ones()

        def forward(self, x, y):
            return self.ones(y.shape[0] + 1, x.sum()), self.ones(n=x.shape[0], x=x.sum())

    others = [(torch.randn(5, 2), torch.randn(3, 2))]
    ours = beside(Net(), torch.randn(4, 2), torch.randn(7, 2), others=others)
    same(ours.ones(3, jnp.float32(2)), 2 * torch.ones(3, 3).tril())


def test_quotients_of_sizes_made_whole():
    class Half(tnn.Module):
        def forward(self, x):
            n = x.shape[1]
            half, up = math.floor(n / 2), math.ceil(n / 2)
            scale = (n * x.shape[0]) ** 0.5
            return x[:, :half].sum(1), x[:, up:], x / scale, max(n, 3), min(x.shape[0], 8)

    beside(Half(), torch.randn(3, 7), others=[(torch.randn(4, 10),), (torch.randn(2, 4),)])


def test_one_array_whose_size_is_a_multiple_of_anothers():
    class Twice(tnn.Module):
        def forward(self, x, y):
            return x.reshape(2, -1).sum(0) + y

    class Net(tnn.Module):
        def __init__(self):
            super().__init__()
            self.twice = Twice()

        def forward(self, x):
            return self.twice(torch.cat([x, x]), x)

    ours = beside(Net(), torch.randn(3), others=[(torch.randn(5),)])
    with pytest.raises(nn.ShapeError, match="condition"):
        ours.twice(jnp.ones(5), jnp.ones(2))


def test_an_example_of_one_serves_for_one_and_for_several():
    class Net(tnn.Module):
        def __init__(self):
            super().__init__()
            self.fc = tnn.Linear(4, 1)

        def forward(self, x, scale):
            return self.fc(x).squeeze() * scale

    others = [(torch.randn(3, 4), torch.tensor(3.0)), (torch.randn(1, 4), torch.tensor(2.0))]
    beside(Net(), torch.randn(1, 4), torch.tensor(2.0), others=others)


def test_code_that_works_for_one_only_says_so_when_it_is_called():
    class One(tnn.Module):
        def forward(self, x):
            assert x.shape[0] == 1
            return x[0]

    ours = beside(One(), torch.randn(1, 4))
    with pytest.raises(nn.ShapeError, match="axis 0 has to be 1"):
        ours(jnp.ones((2, 4)))


class Translator(tnn.Module):
    """Gives torch's own transformer a mask, which that looks at: is it the causal one?"""

    def __init__(self):
        super().__init__()
        self.net = tnn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, source, target):
        mask = self.net.generate_square_subsequent_mask(target.shape[1])
        return self.net(source, target, tgt_mask=mask)


def test_the_transformer_of_torch_is_one_layer_of_ours():
    pairs = [(torch.randn(n, 5 + n, 8), torch.randn(n, 2 + n, 8)) for n in (2, 3)]
    ours = beside(Translator().eval(), *pairs[0], others=pairs[1:])
    assert isinstance(ours.net, nn.Transformer)


def test_a_transformer_with_a_hook_inside_is_followed():
    theirs = Translator().eval()
    theirs.net.encoder.layers[0].register_forward_hook(lambda m, args, out: out * 2)
    theirs.forward = lambda source, target: theirs.net(source, target)
    beside(theirs, torch.randn(2, 5, 8), torch.randn(2, 4, 8))
