"""Modules with a forward of their own: what a user writes in torch, converted and used as ours."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn as tnn

import statefulnn as nn
from statefulnn.bridge.torch import ConversionError, Output, from_torch
from tests.quick import QUICKLY

torch.manual_seed(0)


def as_array(x):
    return jax.tree.map(lambda t: jnp.asarray(t.detach().numpy()) if torch.is_tensor(t) else t, x)


def agree(ours, theirs, tolerance=1e-5):
    ours, theirs = jax.tree.leaves(ours), torch.utils._pytree.tree_leaves(theirs)
    theirs = [t for t in theirs if t is not None]
    for a, b in zip(ours, theirs, strict=True):
        b = b.detach().numpy() if torch.is_tensor(b) else np.asarray(b)
        assert np.shape(a) == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def follows(module, *inputs, others=(), tolerance=1e-5, **kwargs):
    """Convert a module, compare outputs, buffers and gradients, also for other inputs."""
    ours = from_torch(module, *inputs, kwargs=kwargs)
    assert list(ours.state_dict()) == list(module.state_dict())
    for given in (inputs, *others):
        arrays = as_array(given)
        named = as_array(kwargs)
        expected = module(*copy.deepcopy(given), **copy.deepcopy(kwargs))
        run = nn.jit(lambda m, a, k: m(*a, **k), compiler_options=QUICKLY)
        agree(run(ours, arrays, named), expected, tolerance)
        for (name, a), b in zip(ours.named_buffers(), module.buffers(), strict=True):
            # Means near 0 of numbers near 1 have rounding errors of these numbers.
            np.testing.assert_allclose(a, b.numpy(), tolerance, tolerance / 100, err_msg=name)
        if any(p.requires_grad for p in module.parameters()):
            compare_gradients(module, ours, given, kwargs, tolerance)
    return ours


def compare_gradients(module, ours, given, kwargs, tolerance):
    module.zero_grad()
    state = copy.deepcopy(module.state_dict())
    module(*copy.deepcopy(given), **kwargs).square().sum().backward()
    module.load_state_dict(state)
    fn, params, buffers = nn.functionalize(ours, mutable=True)
    arrays, named = as_array(given), as_array(kwargs)
    loss = lambda p: (fn(p, buffers, *arrays, **named)[0] ** 2).sum()
    grads = jax.jit(jax.grad(loss), compiler_options=QUICKLY)(params)
    for name, p in module.named_parameters():
        if p.requires_grad and p.grad is not None:
            np.testing.assert_allclose(
                grads[name], p.grad.numpy(), rtol=50 * tolerance, atol=50 * tolerance, err_msg=name
            )


class Block(tnn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.fc = tnn.Linear(size, size)
        self.norm = tnn.BatchNorm1d(size)
        self.scale = tnn.Parameter(torch.randn(size))

    def forward(self, x):
        return torch.relu(self.norm(self.fc(x))) * self.scale + x


class Loop(tnn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = tnn.ModuleList([Block() for _ in range(2)])
        self.again = self.blocks[0]
        self.head = tnn.Sequential(tnn.Linear(4, 3), tnn.Tanh())

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        for _ in range(2):
            x = self.again(x)
        return self.head(x)


def test_loops_shared_submodules_and_statistics():
    ours = follows(Loop(), torch.randn(5, 4), others=[(torch.randn(3, 4),), (torch.randn(8, 4),)])
    assert ours.again is ours.blocks[0] and isinstance(ours.head, nn.Sequential)
    assert "(norm): BatchNorm1d(4" in repr(ours) and "(0-1): 2 x Block(" in repr(ours)
    # A part is a module by itself.
    assert ours.blocks[1](jnp.ones((2, 4))).shape == (2, 4)


def test_replacing_freezing_and_switching_take_effect():
    theirs = Loop()
    ours = from_torch(theirs, torch.randn(5, 4))
    ours.eval()
    theirs.eval()
    x = torch.randn(6, 4)
    agree(ours(as_array(x)), theirs(x))
    ours.head = nn.Linear(4, 7)
    assert ours(as_array(x)).shape == (6, 7)
    ours.blocks.requires_grad_(False)
    grads = nn.grad(lambda m, x: (m(x) ** 2).sum())(ours, as_array(x))
    assert set(grads) == {"head.weight", "head.bias"}

    class Zero(nn.Module):
        def forward(self, x):
            return 0 * x

    ours.blocks[0] = Zero()
    ours.again = Zero()
    np.testing.assert_allclose(
        ours(as_array(x)), np.broadcast_to(ours.head.bias, (6, 7)), atol=1e-6
    )


class Views(tnn.Module):
    """In-place operators, on views of views too."""

    def forward(self, x):
        y = x.clone()
        y[:, 0] = 0
        row = y[1]
        row.mul_(2)
        y.t()[2].add_(row.sum())
        a, b = y.view(-1).chunk(2)
        a += 1
        b.clamp_(min=0.5)
        z = y.unsqueeze(0).expand(2, -1, -1) * 1
        z[1, :, ::2] = -1.0
        z.masked_fill_(z > 2, 9.0)
        row.copy_(torch.zeros_like(row))
        return y.sum(1) + z.sum((0, 2)), row


def test_in_place_operators_reach_what_they_are_views_of():
    module = Views()
    x = torch.randn(4, 6)
    ours = from_torch(module, x)
    agree(jax.jit(ours, compiler_options=QUICKLY)(as_array(x)), module(x.clone()))


class Inplace(tnn.Module):
    def __init__(self):
        super().__init__()
        self.fc = tnn.Linear(4, 4)
        self.relu = tnn.ReLU(inplace=True)

    def forward(self, x):
        y = self.fc(x)
        z = self.relu(y)
        self.relu(x := y - 1)
        return z + y + x


def test_a_layer_that_works_in_place_changes_its_input():
    follows(Inplace(), torch.randn(3, 4))


class Counter(tnn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.steps += 1
        old = self.mean
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return (x - old) * self.steps


class Counters(tnn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Counter()
        self.fc = tnn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.inner(self.inner(x))) + self.inner.mean


def test_buffers_that_are_changed_or_assigned_are_state():
    module = Counters()
    ours = from_torch(module, torch.randn(4, 3))
    for _ in range(3):
        x = torch.randn(5, 3)
        agree(ours(as_array(x)), module(x))
        agree([ours.inner.steps, ours.inner.mean], [module.inner.steps, module.inner.mean])
    with pytest.raises(nn.StateWriteError):
        nn.functional_call(ours, {}, jnp.ones((5, 3)))


class Moded(tnn.Module):
    def __init__(self):
        super().__init__()
        self.fc = tnn.Linear(4, 4)
        self.drop = tnn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.fc(x))
        return torch.nn.functional.dropout(x, 0.5, self.training) if self.training else 2 * x


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


class Counting(tnn.Module):
    """Adds up what it sees, in a tensor that an object refers to."""

    def __init__(self, registered):
        super().__init__()
        total = torch.zeros(3)
        if registered:
            self.register_buffer("total", total)
        self.holder = Holder(total)

    def forward(self, x):
        self.holder.tensor.add_(x.sum(0))
        return x + self.holder.tensor


def test_a_buffer_that_an_object_refers_to_is_that_buffer_and_no_other_tensor_is_written():
    theirs, x = Counting(registered=True), torch.ones(2, 3)
    ours = from_torch(theirs, x)
    for _ in range(2):
        agree(ours(jnp.ones((2, 3))), theirs(x))
    agree(ours.total, theirs.total)
    with pytest.raises(ConversionError, match="register_buffer"):
        from_torch(Counting(registered=False), x)


def test_a_forward_that_looks_at_the_mode_runs_in_the_modes_it_was_traced_in():
    theirs = Moded().eval()
    ours = from_torch(theirs, torch.randn(3, 4))
    x = torch.randn(2, 4)
    agree(ours(as_array(x)), theirs(x))
    with pytest.raises(nn.StructureChangeError, match="in training mode") as error:
        ours.train()(as_array(x))
    assert 'modes=("train", "eval")' in str(error.value)
    both = from_torch(theirs, torch.randn(3, 4), modes=("train", "eval"))
    assert not both.training and not theirs.training
    agree(both(as_array(x)), theirs(x))
    out = np.asarray(both.train()(jnp.ones((200, 4))))
    assert 0.6 < (out == 0).mean() < 0.9  # dropped twice by a half
    assert not np.array_equal(out, both(jnp.ones((200, 4))))


class Structured(tnn.Module):
    def forward(self, pair, scale=2.0, *, extra=None, names=()):
        a, b = pair["a"], pair["b"][0]
        out = {"sum": a + b, "more": [a * scale, (b, None, 3)]}
        if extra is not None:
            out["extra"] = extra
        return out


def test_arguments_and_outputs_keep_their_structure():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    ours = from_torch(Structured(), {"a": a, "b": [b]}, kwargs={"scale": 3.0})
    out = ours(as_array({"a": a, "b": [b]}), 3.0)
    want = Structured()({"a": a, "b": [b]}, 3.0)
    agree([out["sum"], out["more"]], [want["sum"], want["more"]])
    assert out["more"][1][1] is None and list(out) == ["sum", "more"]
    with pytest.raises(
        nn.ShapeError, match="argument scale was 3.0 when it was traced, and is 2.0"
    ):
        ours(as_array({"a": a, "b": [b]}))
    with pytest.raises(nn.ShapeError, match="traced with arguments like"):
        ours(as_array({"a": a}))
    with pytest.raises(TypeError, match="Structured.forward"):
        ours()


def test_sizes_are_checked():
    class Halves(tnn.Module):
        def forward(self, x, y):
            if x.shape[1] > 4:
                x = x[:, :4]
            return x.reshape(x.shape[0], 2, -1).sum(1) + y

    ours = from_torch(Halves(), torch.randn(3, 6), torch.randn(3, 2))
    for n, m in ((2, 8), (5, 5), (1, 6)):
        x, y = torch.randn(n, m), torch.randn(n, 2)
        agree(ours(as_array(x), as_array(y)), Halves()(x, y))
    with pytest.raises(nn.ShapeError, match="condition"):
        ours(jnp.ones((3, 4)), jnp.ones((3, 2)))
    with pytest.raises(nn.ShapeError, match=r"argument y .* axis 0 has to be 3"):
        ours(jnp.ones((3, 6)), jnp.ones((4, 2)))
    with pytest.raises(nn.ShapeError, match="integers, not floating"):
        ours(jnp.ones((3, 6), jnp.int32), jnp.ones((3, 2)))
    single = from_torch(Halves(), torch.randn(1, 6), torch.randn(1, 2), dynamic="none")
    with pytest.raises(nn.ShapeError, match="0 or 1 in the example"):
        single(jnp.ones((3, 6)), jnp.ones((3, 2)))


class Mixed(tnn.Module):
    """A little of everything that indexes, sorts and joins."""

    def __init__(self):
        super().__init__()
        self.embed = tnn.Embedding(11, 6)
        self.lstm = tnn.LSTM(6, 5, batch_first=True)
        self.out = tnn.Linear(5, 6, bias=False)

    def forward(self, ids):
        x = self.embed(ids)  # (B, T, 6)
        x, (h, _) = self.lstm(x)
        scores = torch.einsum("btd,bsd->bts", x, x) / x.shape[-1] ** 0.5
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        scores = torch.where(mask, scores, float("-inf"))
        x = scores.softmax(-1) @ x + h[-1][:, None]
        top, where = x.sum(-1).topk(2, dim=1)
        x = x.gather(1, where[..., None].expand(-1, -1, x.shape[-1]))
        ordered, _ = x.sort(-1, descending=True)
        spread = torch.zeros_like(ordered).scatter_add(2, where[..., None] % 5, top[..., None])
        x = torch.cat([ordered.cumsum(-1), spread], 1) * (ids[:, :1] // 2 % 3)[..., None]
        return torch.nn.functional.linear(self.out(x), self.embed.weight)


def test_recurrent_layers_indexing_sorting_and_joining():
    ours = follows(Mixed(), torch.randint(0, 11, (3, 7)), others=[(torch.randint(0, 11, (2, 4)),)])
    assert isinstance(ours.lstm, nn.LSTM)


class OtherNumbers(tnn.Module):
    """Writes through views that show other numbers, other shapes, or memory."""

    def forward(self, x):
        c = torch.complex(x, x * 2)
        c.real.mul_(3)
        torch.view_as_real(c)[..., 1] += 1
        pairs = x * 2
        torch.view_as_complex(pairs.view(-1, 3, 2)).mul_(1j)
        bits = x.clone()
        bits.view(torch.int32).bitwise_and_(0x7FFFFFFF)
        turned = x * 1
        same = turned
        turned.unsqueeze_(0).squeeze_(0).t_()
        same[1:3] = 5
        rest = (x * 2)[1:]
        rest.as_strided((2, 3), (6, 1)).add_(1)
        before = rest.as_strided((3, 2), (2, 1), 4)
        return torch.view_as_real(c), pairs, bits, turned, same * 2, rest, before


class ByMasks(tnn.Module):
    def forward(self, x):
        y = x.clone()
        y[:, torch.tensor([True, False, True, False, False, True])] = 0.5
        y[y[:, 0] > 0] = torch.arange(6.0)
        y[y[:, 1] > 1] = torch.ones(1, 6)
        y[y < -1] = y.new_tensor([3.0])
        return y


def test_writes_through_views_of_other_numbers_and_to_the_places_of_masks():
    x, other = torch.randn(4, 6), torch.randn(5, 6)
    for module, others in ((OtherNumbers(), []), (ByMasks(), [(other,)])):
        ours = from_torch(module, x, dynamic="auto" if others else "none")
        for given in ((x,), *others):
            agree(ours(*as_array(given)), module(*given))


def fill_with_rows(x):
    y = x.clone()
    y[y[:, 0] > 0] = torch.ones(2, 6)
    return y


def view_memory(x):
    return (x.t() * 2).as_strided((2, 3), (6, 1))


@pytest.mark.parametrize(
    ("forward", "message"), [(fill_with_rows, "aten.index_put_"), (view_memory, "as_strided")]
)
def test_rows_for_a_mask_and_views_of_memory_in_another_order_are_refused(forward, message):
    module = type("Module", (tnn.Module,), {"forward": lambda self, x: forward(x)})()
    with pytest.raises(ConversionError, match=message):
        from_torch(module, torch.randn(4, 6))


class Attention(tnn.Module):
    def __init__(self):
        super().__init__()
        self.keys = tnn.Linear(4, 4)

    def forward(self, query, key, value):
        return (query @ self.keys(key).T).softmax(-1) @ value


class SharedAttention(tnn.Module):
    def __init__(self):
        super().__init__()
        self.attend = Attention()

    def forward(self, x, y):
        return self.attend(x, x, x) + self.attend(x, y, y) + self.attend(x, y, x)


def test_one_tensor_in_two_arguments_may_be_two_in_the_next_call():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    ours = follows(SharedAttention(), x, y, others=[(y, x)])
    assert len(ours.attend.graphs) == 1
    theirs = Attention()
    ours = from_torch(theirs, x, x, x)
    agree(ours(*as_array((x, y, x))), theirs(x, y, x))
    ours = from_torch(theirs, x, theirs.keys.weight, theirs.keys.weight)
    z = torch.randn(4, 4)
    agree(ours(*as_array((x, z, z))), theirs(x, z, z))


class Masked(tnn.Module):
    """Calls its layers with other weights than their own, as pruning and hypernetworks do."""

    def __init__(self):
        super().__init__()
        self.fc = tnn.Sequential(tnn.Linear(4, 4), tnn.BatchNorm1d(4))
        self.scale = tnn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        other = {"0.weight": self.fc[0].weight * self.scale, "1.bias": self.scale[0]}
        return torch.func.functional_call(self.fc, other, (x,)) + self.fc(x)


@pytest.mark.parametrize("training", [False, True])
def test_functional_call_uses_the_weights_it_is_given(training):
    follows(Masked().train(training), torch.randn(3, 4), others=[(torch.randn(5, 4),)])


def test_tied_parameters_are_one():
    class Tied(tnn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = tnn.Linear(4, 4), tnn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.sin(self.a(x))) + x @ self.b.weight

    ours = follows(Tied(), torch.randn(3, 4))
    assert ours.a.weight is ours.b.weight
    assert "b.weight" not in nn.grad(lambda m, x: m(x).sum())(ours, jnp.ones((3, 4)))


def test_no_grad_stops_gradients_and_numbers_are_unchanged():
    class Stopped(tnn.Module):
        def __init__(self):
            super().__init__()
            self.fc = tnn.Linear(3, 3)
            self.frozen = tnn.Linear(3, 3)

        def forward(self, x):
            with torch.no_grad():
                y = self.frozen(x)
            return self.fc(x) * y

    ours = follows(Stopped(), torch.randn(2, 3))
    grads = nn.grad(lambda m, x: m(x).sum())(ours, jnp.ones((2, 3)))
    assert not np.any(grads["frozen.weight"]) and np.any(grads["fc.weight"])


def test_parametrizations_are_followed():
    model = tnn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(tnn.Linear(4, 3)), tnn.ReLU()
    )
    ours = follows(model, torch.randn(2, 4))
    assert "0.parametrizations.weight.original0" in ours.state_dict()


def test_an_object_between_modules_joins_them():
    class Box:
        pass

    class Writer(tnn.Module):
        def forward(self, box, x):
            box.value = x * 2
            return x + 1

    class Reader(tnn.Module):
        def __init__(self):
            super().__init__()
            self.fc = tnn.Linear(3, 3)

        def forward(self, box):
            return self.fc(box.value)

    class Both(tnn.Module):
        def __init__(self):
            super().__init__()
            self.writer, self.reader = Writer(), Reader()

        def forward(self, x):
            box = Box()
            return self.writer(box, x) + self.reader(box)

    ours = follows(Both(), torch.randn(2, 3))
    with pytest.raises(nn.StructureChangeError, match="part of that of Both"):
        ours.reader(jnp.ones((2, 3)))
    ours.reader.fc = nn.Linear(3, 1)
    assert ours(jnp.ones((2, 3))).shape == (2, 3)
    ours.reader = nn.Linear(3, 3)
    with pytest.raises(nn.StructureChangeError, match="replaced 'reader'"):
        ours(jnp.ones((2, 3)))


# --------------------------------------------------------------------------------------------------
# What cannot be converted


class Branch(tnn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Item(tnn.Module):
    def forward(self, x):
        return x * x.max().item()


class Keeps(tnn.Module):
    def forward(self, x):
        self.last = x * 2
        return x


class Unsupported(tnn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return torch.linalg.ldl_factor(self.inner(x))[0]


class Inner(tnn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x) + torch.special.bessel_j1(x)


@pytest.mark.parametrize(
    "module, message",
    [
        (Branch(), "torch.export could not follow Branch"),
        (Item(), "item"),
        (Keeps(), "Keeps changes self.last"),
        (Views(), None),
    ],
    ids=lambda m: type(m).__name__ if isinstance(m, tnn.Module) else "",
)
def test_code_without_a_graph_is_refused_with_its_place(module, message):
    if message is None:
        with pytest.raises(ConversionError, match="without example inputs"):
            from_torch(tnn.Sequential(tnn.ReLU(), module))
        return
    with pytest.raises(ConversionError, match=message) as error:
        from_torch(module, torch.randn(3, 3))
    assert "Why: " in str(error.value) and "Instead: " in str(error.value)
    assert "forward" not in module.__dict__ and "last" not in module.__dict__


def test_all_operators_that_are_missing_are_named_with_their_lines():
    with pytest.raises(ConversionError) as error:
        from_torch(Unsupported(), torch.randn(3, 3))
    text = str(error.value)
    for part in (
        "linalg_ldl_factor",
        "special_bessel_j0",
        "special_bessel_j1",
        "'inner' (Inner)",
        "line ",
    ):
        assert part in text


def test_an_operator_of_the_user_s_is_used():
    given = {
        torch.ops.aten.special_bessel_j0.default: jnp.cos,
        torch.ops.aten.special_bessel_j1: jnp.sin,
    }
    ours = from_torch(Inner(), torch.randn(3), operators=given)
    np.testing.assert_allclose(ours(jnp.ones(3)), np.cos(1) + np.sin(1), rtol=1e-6)


def test_inputs_and_outputs_of_other_kinds_are_refused():
    class Odd(tnn.Module):
        def forward(self, x):
            return object()

    with pytest.raises(ConversionError, match="returns an object of type object"):
        from_torch(Odd(), torch.ones(2))
    with pytest.raises(ConversionError, match="example input of type ndarray"):
        from_torch(Block(), np.ones(2))
    with pytest.raises(ValueError, match="modes"):
        from_torch(Block(), torch.ones(2, 4), modes="train")
    with pytest.raises(ValueError, match="dynamic"):
        from_torch(Block(), torch.ones(2, 4), dynamic="some")


# --------------------------------------------------------------------------------------------------
# A module like any other


def test_it_is_copied_pickled_vmapped_and_saved(tmp_path):
    theirs = Loop().eval()
    ours = from_torch(theirs, torch.randn(5, 4))
    x = torch.randn(3, 4)
    want = theirs(x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        agree(twin(as_array(x)), want)
    nn.save(ours, tmp_path / "m")
    other = from_torch(Loop().eval(), torch.randn(5, 4))
    other.load_state_dict(nn.load(tmp_path / "m"))
    agree(other(as_array(x)), want)
    fn, params, state = nn.functionalize(ours, mutable=True)
    lanes = jax.vmap(lambda x: fn(params, state, x)[0])(as_array(torch.stack([x, x])))
    agree(lanes, torch.stack([want, want]))
    low = from_torch(theirs, torch.randn(5, 4)).to(jnp.bfloat16)
    assert low(as_array(x).astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_layer_whose_forward_was_replaced_is_traced():
    layer = tnn.BatchNorm1d(3)
    layer.forward = lambda x: 2 * x
    ours = from_torch(layer, torch.randn(4, 3))
    np.testing.assert_array_equal(ours(jnp.ones((2, 3))), 2 * np.ones((2, 3)))


def test_an_output_reads_by_name_and_is_a_pytree():
    out = jax.jit(lambda x: Output(b=x, a=2 * x))(jnp.ones(2))
    assert list(out) == ["b", "a"] and out.a is out["a"]
    with pytest.raises(AttributeError, match="no 'c'"):
        out.c


def test_it_runs_without_calling_torch(monkeypatch):
    ours = from_torch(Mixed(), torch.randint(0, 11, (3, 7)))
    monkeypatch.setattr(torch.Tensor, "__torch_function__", None)
    for name in ("add", "matmul", "zeros"):
        monkeypatch.delattr(torch, name)
    assert ours(jnp.ones((2, 5), jnp.int32)).shape == (2, 4, 11)


def test_without_torch_the_import_names_the_extra():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import statefulnn as nn\n"
        "try: nn.bridge.torch\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install torch" in done.stdout, done.stderr
