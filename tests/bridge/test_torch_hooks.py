"""Hooks of torch's modules: of forward, which are traced, of files, which go on, and of gradients."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import jax.numpy as jnp
import pytest
import torch
from torch import nn as tnn
from torch.nn.utils import prune

import statefulnn as nn
from statefulnn.bridge.torch import ConversionError, from_torch
from tests.bridge.beside_torch import arrays, beside, same

torch.manual_seed(0)
X = torch.randn(3, 4)
OTHER = [(torch.randn(5, 4),)]


def layers():
    return tnn.Sequential(tnn.Linear(4, 4), tnn.ReLU(), tnn.BatchNorm1d(4)).eval()


def test_hooks_of_forward_are_a_part_of_it():
    theirs, seen = layers(), []
    theirs[0].register_forward_hook(lambda m, args, out: seen.append(out))
    theirs[1].register_forward_hook(lambda m, args, out: out * 2)
    theirs[2].register_forward_pre_hook(lambda m, args: args[0] + 1)
    named = lambda m, args, kwargs: ((args[0] * 3,), kwargs)
    theirs[0].register_forward_pre_hook(named, with_kwargs=True)
    theirs.register_forward_hook(lambda m, args, kwargs, out: out - 1, with_kwargs=True)
    before = {m: (dict(m.__dict__), list(m._forward_hooks)) for m in theirs.modules()}
    ours = from_torch(theirs, X)
    assert seen == []
    assert before == {m: (dict(m.__dict__), list(m._forward_hooks)) for m in theirs.modules()}
    beside(theirs, X, others=OTHER)
    same(ours.get_submodule("2")(arrays(X)), theirs[2](X))  # also where it is called by itself


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [tnn.utils.weight_norm, tnn.utils.spectral_norm])
def test_norms_of_weights_that_work_by_hooks(norm):
    theirs = tnn.Sequential(norm(tnn.Linear(4, 3)), tnn.Tanh())
    ours = from_torch(theirs, X)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(2):  # spectral_norm has state
        same(ours(arrays(X)), theirs(X))


def test_pruned_weights_are_followed():
    theirs = tnn.Sequential(tnn.Linear(4, 3), tnn.Tanh())
    prune.l1_unstructured(theirs[0], "weight", 0.5)
    ours = beside(theirs, X, others=OTHER)
    assert list(ours.state_dict()) == list(theirs.state_dict())


class Ready(tnn.Module):
    """Registers a hook in its first call, and notes things in containers."""

    def __init__(self):
        super().__init__()
        self.ready = False
        self.fc = tnn.Linear(4, 4)
        self.log, self.by_name = [], {}

    def forward(self, x):
        self.log.append(x)
        self.by_name["x"] = x
        if not self.ready:
            self.ready = True
            self.fc.register_forward_hook(lambda m, args, out: out + 1)
        return self.fc(x)


def test_a_flag_that_is_set_once_is_no_state_and_nothing_is_left_behind():
    theirs = Ready()
    ours = from_torch(theirs, X)
    assert theirs.ready is False and not theirs.log and not theirs.by_name
    assert theirs.fc._forward_hooks == OrderedDict()
    for _ in range(2):
        same(ours(arrays(X)), theirs(X))


class Count(tnn.Module):
    def __init__(self, start):
        super().__init__()
        self.state = start

    def forward(self, x):
        self.state = (not self.state) if isinstance(self.state, bool) else self.state + 1
        return x * float(self.state)


@pytest.mark.parametrize("start", [0, 0.5, False])
def test_an_attribute_that_changes_in_each_call_is_refused(start):
    theirs = Count(start)
    with pytest.raises(ConversionError, match="forward of Count changes self.state"):
        from_torch(theirs, X)
    assert theirs.state == start and "forward" not in theirs.__dict__


class Renamed(tnn.Module):
    def __init__(self):
        super().__init__()
        self.fc = tnn.Linear(4, 4)
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state, prefix, *_):
        for key in [key for key in state if key.startswith(f"{prefix}old.")]:
            state[key.replace(f"{prefix}old.", f"{prefix}fc.")] = state.pop(key)

    def forward(self, x):
        return self.fc(x)


def test_hooks_of_loading_go_on():
    theirs = tnn.ModuleDict({"inner": Renamed()})
    theirs.forward = lambda x: theirs["inner"](x)
    ours = from_torch(theirs, X)
    state = {"inner.old.weight": jnp.ones((4, 4)), "inner.old.bias": jnp.zeros(4)}
    ours.load_state_dict(state)
    same(ours(arrays(X)), X.sum(1, keepdim=True).expand(3, 4))


def test_a_method_of_the_module_becomes_one_of_what_it_became():
    class Counted(tnn.Module):
        def __init__(self):
            super().__init__()
            self.fc = tnn.Linear(4, 4)
            self._register_load_state_dict_pre_hook(self.hook)
            self.register_load_state_dict_post_hook(lambda m, keys: keys.missing_keys.clear())
            self.register_state_dict_post_hook(lambda m, state, *_: state.__delitem__("fc.bias"))

        def hook(self, state, prefix, *_):
            state[f"{prefix}fc.weight"] = self.fc.weight * 0 + 2

        def forward(self, x):
            return self.fc(x)

    ours = from_torch(Counted(), X)
    ours.load_state_dict({})
    assert float(ours.fc.weight[0, 0]) == 2 and list(ours.state_dict()) == ["fc.weight"]


def test_a_parametrized_weight_norm_reads_older_files_also_after_a_pickle():
    theirs = tnn.utils.parametrizations.weight_norm(tnn.Linear(4, 3))
    ours = pickle.loads(pickle.dumps(from_torch(theirs, X)))
    old = {"bias": jnp.zeros(3), "weight_g": jnp.ones((3, 1)), "weight_v": jnp.ones((3, 4))}
    ours.load_state_dict(old)
    same(ours(arrays(X)), X.sum(1, keepdim=True).expand(3, 3) / 2)


@pytest.mark.parametrize("kind", ["backward", "backward_pre"])
def test_hooks_of_gradients_are_refused_by_module_and_kind(kind):
    theirs = layers()
    getattr(theirs[1], f"register_full_{kind}_hook")(lambda *_: None)
    with pytest.raises(ConversionError, match=rf"'1' \(ReLU\), which has a {kind} hook"):
        from_torch(theirs, X)


def test_a_hook_of_a_parameters_gradient_is_refused():
    theirs = layers()
    theirs[0].weight.register_hook(lambda g: 2 * g)
    with pytest.raises(ConversionError, match=r"'0.weight'.*\n.*watched by a hook of its gradient"):
        from_torch(theirs, X)


def test_out_arguments_write_to_what_they_name():
    class Out(tnn.Module):
        def forward(self, x):
            y = torch.zeros_like(x)
            torch.add(x, 1, out=y)
            torch.mul(x[0], 2, out=y[1])
            return y

    beside(Out(), X, others=OTHER)


def test_checkpointed_parts_are_parts():
    class Net(tnn.Module):
        def __init__(self):
            super().__init__()
            self.fc = tnn.Linear(4, 4)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False) + x

    beside(Net(), X, others=OTHER)
    assert isinstance(from_torch(Net(), X).fc, nn.Linear)


class Table(tnn.Module):
    """Makes a table in its first call, where it knows the length, and keeps it."""

    def __init__(self, buffer=True, persistent=False, of=lambda x: torch.arange(x.shape[1]) * 1.0):
        super().__init__()
        self.fc, self.norm, self.of = tnn.Linear(4, 4), tnn.BatchNorm1d(4), of
        self.register_buffer(
            "rows", torch.arange(4).expand(2, 4), persistent=False
        )  # shares memory
        if buffer:
            self.register_buffer("table", torch.zeros(1), persistent=persistent)
        else:
            self.table = None

    def forward(self, x):
        if self.table is None or self.table.shape[0] != x.shape[1]:
            self.table = self.of(x)
        return self.norm(self.fc(x)) + self.table


@pytest.mark.parametrize("buffer", [True, False])
def test_a_table_that_the_first_call_makes_is_a_constant(buffer):
    torch.manual_seed(0)
    theirs = Table(buffer)
    before, random = theirs.norm.running_mean.clone(), torch.random.get_rng_state()
    ours = from_torch(theirs, X)
    assert torch.equal(theirs.norm.running_mean, before)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert (theirs.table.shape == (1,)) if buffer else (theirs.table is None)
    for x in (X, X[:2] * 3):
        same(ours(arrays(x)), theirs(x))
    same(ours.norm.running_mean, theirs.norm.running_mean)


@pytest.mark.parametrize(
    "options", [{"persistent": True}, {"of": lambda x: x.detach().mean(0)}, {"of": lambda x: x[0]}]
)
def test_a_table_that_is_state_is_refused(options):
    theirs = Table(**options)
    before = [t.clone() for t in theirs.state_dict().values()]
    with pytest.raises(ConversionError, match=r"forward of Table changes self\.table"):
        from_torch(theirs, X)
    assert theirs.table.shape == (1,)
    assert all(map(torch.equal, before, theirs.state_dict().values()))


def test_a_table_made_of_a_buffer_that_nobody_writes_is_a_constant():
    torch.manual_seed(0)
    theirs = Table()
    theirs.of = lambda x: theirs.rows[1] * torch.arange(x.shape[1])
    ours = from_torch(theirs, X)
    for x in (X, X[:2] * 3):
        same(ours(arrays(x)), theirs(x))


@pytest.mark.parametrize("persistent", [True, False])
def test_a_table_made_of_a_buffer_that_calls_write_or_files_have_is_refused(persistent):
    theirs = Table()
    theirs.register_buffer("count", torch.zeros(4), persistent=persistent)

    def of(x):
        if not persistent:
            theirs.count += 1
        return theirs.count * 2

    theirs.of = of
    with pytest.raises(ConversionError, match=r"forward of Table changes self\.table"):
        from_torch(theirs, X)
    assert torch.equal(theirs.count, torch.zeros(4))


def test_a_table_made_of_weights_is_refused():
    theirs = Table()
    theirs.of = lambda x: theirs.fc.weight.detach().sum(0)
    with pytest.raises(ConversionError, match=r"forward of Table changes self\.table"):
        from_torch(theirs, X)
