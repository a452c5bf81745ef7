"""What a forward takes and returns: containers of every kind, inside of each other."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn as tnn

import statefulnn as nn
from statefulnn.bridge.torch import ConversionError, Output, from_torch
from tests.bridge.beside_torch import arrays, beside, same

torch.manual_seed(0)
X = torch.randn(3, 4)


@dataclasses.dataclass
class Pair:
    first: Any
    count: int = 3
    rest: Any = None


class Named(tnn.Module):
    """Makes its namedtuple's class anew in each call."""

    def __init__(self):
        super().__init__()
        self.fc = tnn.Linear(4, 4)

    def forward(self, x):
        return namedtuple("Features", ["low", "high"])(self.fc(x), x * 2)


class Twice(tnn.Module):
    def __init__(self):
        super().__init__()
        self.features = Named()

    def forward(self, x, y):
        one, other = self.features(x), self.features(y)
        return one, other.low - one.high


def test_a_namedtuple_made_inside_of_forward_is_one_class():
    ours = beside(Twice(), X, X + 1, others=[(torch.randn(5, 4), torch.randn(5, 4))])
    one, _ = nn.jit(ours)(jnp.ones((2, 4)), jnp.ones((2, 4)))
    assert one._fields == ("low", "high") and type(one).__name__ == "Features"
    again, _ = pickle.loads(pickle.dumps(ours))(jnp.ones((2, 4)), jnp.ones((2, 4)))
    assert (
        type(again)
        is type(one)
        is type(copy.deepcopy(one))
        is type(pickle.loads(pickle.dumps(one)))
    )
    ours.features = nn.Linear(4, 4)
    with pytest.raises(nn.StructureChangeError, match="'features', which returned array") as error:
        ours(jnp.ones((2, 4)), jnp.ones((2, 4)))
    assert "goes on with Features(low='array', high='array')" in str(error.value)


def test_an_ordered_dict_keeps_its_order_and_class():
    class Net(tnn.Module):
        def forward(self, x):
            inner = OrderedDict(z=x, a=[x + 1, OrderedDict(y=x, b=x)])
            return OrderedDict(out=x + 1, aux=inner, more=defaultdict(list, k=x))

    ours = beside(Net(), X)
    for out in (ours(arrays(X)), nn.jit(ours)(arrays(X))):
        assert list(out) == ["out", "aux", "more"] and type(out) is OrderedDict
        assert list(out["aux"]) == ["z", "a"] and list(out["aux"]["a"][1]) == ["y", "b"]
        assert type(out["more"]) is dict


class Record(tnn.Module):
    def forward(self, pair):
        return Pair(pair.first * 2, 4, [pair.rest, torch.max(pair.first, 1)])


def test_dataclasses_and_what_torch_returns_become_outputs_and_namedtuples():
    class Net(tnn.Module):
        def __init__(self):
            super().__init__()
            self.fc = tnn.Linear(4, 4)
            self.record = Record()

        def forward(self, x):
            out = self.record(Pair(self.fc(x), 1, x))
            return {"best": out.rest[1].values, "out": out, "shape": x.shape, "s": torch.sort(x)}

    theirs = Net()
    ours = from_torch(theirs, X)
    for x in (X, torch.randn(6, 4)):
        out, want = nn.jit(ours)(arrays(x)), theirs(x)
        assert isinstance(out["out"], Output) and out["out"].count == 4
        same(out["out"].first, want["out"].first)
        same(out["out"].rest, want["out"].rest)
        same([out["best"], out["s"].values, out["s"].indices], [want["best"], *want["s"]])
        assert tuple(out["shape"]) == tuple(want["shape"])
    same(ours.record(Pair(arrays(X), 1, arrays(X))).first, 2 * X)


def test_a_record_that_is_handed_through_keeps_its_class():
    class Same(tnn.Module):
        def forward(self, pair):
            return pair

    class Net(tnn.Module):
        def __init__(self):
            super().__init__()
            self.same = Same()

        def forward(self, x):
            pair = self.same(Pair(x, 2, x + 1))
            assert isinstance(pair, Pair)
            return pair.first + pair.rest * pair.count

    beside(Net(), X, others=[(torch.randn(2, 4),)])


def test_mappings_of_other_classes_are_outputs():
    class Batch(UserDict):
        pass

    class Net(tnn.Module):
        def forward(self, batch):
            return Batch(total=batch["a"] + batch["b"])

    ours = from_torch(Net(), Batch(a=X, b=X))
    same(ours({"b": arrays(X), "a": arrays(X)}).total, 2 * X)


def test_sizes_truth_values_and_floats_of_sizes_are_returned():
    class Net(tnn.Module):
        def forward(self, x):
            return x, x.shape[0], x.shape[0] / 2, [x.shape[1], {"n": x.numel()}]

    beside(Net(), X, others=[(torch.randn(7, 5),)])


def test_lists_and_tuples_of_a_replaced_module_are_one():
    class Both(tnn.Module):
        def forward(self, x):
            return (x, x + 1)

    class Net(tnn.Module):
        def __init__(self):
            super().__init__()
            self.both = Both()

        def forward(self, x):
            a, b = self.both(x)
            return a * b

    class Listed(nn.Module):
        def forward(self, x):
            return [x, x]

    ours = beside(Net(), X)
    ours.both = Listed()
    np.testing.assert_array_equal(ours(jnp.full((2, 4), 3.0)), np.full((2, 4), 9.0))


def test_outputs_are_differentiated_and_mapped():
    ours = from_torch(Twice(), X, X)
    total = lambda m, x: sum(map(jnp.sum, jax.tree.leaves(m(x, x))))
    assert np.any(nn.grad(total)(ours, arrays(X))["features.fc.weight"])


@pytest.mark.parametrize("odd", [object(), {1, 2}, torch.float32], ids=["object", "set", "dtype"])
def test_other_objects_are_refused_by_their_class(odd):
    class Net(tnn.Module):
        def forward(self, x):
            return {"x": x, "odd": [odd]}

    with pytest.raises(ConversionError, match=rf"object of type {type(odd).__name__} \(output 1\)"):
        from_torch(Net(), X)
