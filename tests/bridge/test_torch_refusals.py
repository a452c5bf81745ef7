"""Code whose sizes or branches depend on numbers is refused at conversion, with module and line."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn as tnn

import statefulnn as nn
from statefulnn.bridge.torch import ConversionError, from_torch
from tests.bridge.beside_torch import beside

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
COUNTS = torch.tensor([1, 2, 0, 3])


class Part(tnn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args):
        self.calls += 1
        return self.function(*args)


class Net(tnn.Module):
    def __init__(self, function):
        super().__init__()
        self.part = tnn.ModuleList([Part(function)])

    def forward(self, *args):
        return self.part[0](*args)


def packed(x):
    lengths = torch.tensor([6, 5, 4, 2])
    return tnn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True).data


class Packing(tnn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = tnn.LSTM(1, 2, batch_first=True)

    def forward(self, x, lengths):
        packed = tnn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True)
        return self.lstm(packed)[0].data


def test_packed_sequences_between_modules_are_refused_with_the_line_and_the_way_out(capfd):
    with pytest.raises(ConversionError, match="found a packed sequence in the forward of") as error:
        from_torch(Packing(), X, torch.tensor([6, 5, 4, 2]))
    assert "return self.lstm(packed)[0].data" in str(error.value)
    assert "nn.utils.rnn.pack_padded_sequence" in str(error.value)
    given = tnn.utils.rnn.pack_padded_sequence(
        X[..., None], torch.tensor([6, 5, 4, 2]), batch_first=True
    )
    with pytest.raises(ConversionError, match="an example input of type PackedSequence"):
        from_torch(Packing(), given, None)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def assigned(x):
    y = x.clone()
    y[y > 0] = y[y > 0] * 2
    return y


SIZES = {
    "index": (lambda x: x[x > 0], X),
    "index of columns": (lambda x: x[:, x[0] > 0], X),
    "index of rows, reduced": (lambda x, n: x[n > 1].mean(), X, COUNTS),
    "index, assigned": (assigned, X),
    "unique": (torch.unique, COUNTS),
    "unique_consecutive": (torch.unique_consecutive, COUNTS),
    "nonzero": (torch.nonzero, X),
    "argwhere": (torch.argwhere, X),
    "where": (lambda x: torch.where(x > 0)[0], X),
    "masked_select": (lambda x: x.masked_select(x > 0).sum(), X),
    "repeat_interleave": (lambda x, n: x.repeat_interleave(n, 0), X, COUNTS),
    "bincount": (torch.bincount, COUNTS),
    "pack_padded_sequence": (packed, X),
}
NUMBERS = {
    "item as a size": (lambda x, n: x[: n.max().item()], X, COUNTS),
    "item as a factor": (lambda x, n: x * n[0].item(), X, COUNTS),
    "tolist": (lambda x, n: x.split(n.tolist()), X, COUNTS),
    "int": (lambda x, n: torch.zeros(int(n.sum())), X, COUNTS),
    "branch": (lambda x: x if x.sum() > 0 else -x, X),
    "numpy": (lambda x: x + x.detach().numpy().sum(), X),
    "classes": (torch.nn.functional.one_hot, COUNTS),
}


def refused(function, args, capfd):
    theirs = Net(function)
    theirs.part[0].requires_grad_(False)
    before = [(m, dict(m.__dict__), m.training) for m in theirs.modules()]
    with pytest.raises(ConversionError) as error:
        from_torch(theirs, *args)
    assert before == [(m, dict(m.__dict__), m.training) for m in theirs.modules()]
    assert float(theirs.part[0].calls) == 0
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    text = str(error.value)
    assert (
        "'part.0' (Part)" in text
        and "test_torch_refusals.py" in text
        and len(text.splitlines()) == 3
    )
    return text


@pytest.mark.parametrize("name", SIZES)
def test_results_whose_size_depends_on_numbers(name, capfd):
    function, *args = SIZES[name]
    text = refused(function, args, capfd)
    assert name.split(",")[0].split()[0].split("_")[0] in text
    assert "how large its result is depends on the numbers" in text and "torch.where" in text


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_python_made_of_arrays(name, capfd):
    function, *args = NUMBERS[name]
    assert "Instead: " in refused(function, args, capfd)


def test_an_error_of_the_code_itself_names_module_and_line(capfd):
    text = refused(lambda x: x @ x, (X,), capfd)
    assert "RuntimeError" in text or "shape" in text


def test_assertions_about_numbers_are_left_out():
    class Checked(torch.nn.Module):
        def forward(self, x, n):
            # What `assert` becomes; pytest writes those of this file anew.
            torch._check(n.max().item() <= 4)
            torch._check(n.min().item() * 2 + 1 > 0)
            return x + n.max()

    beside(Checked(), X[0, :4], COUNTS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.vmap(lambda v: v * v.sum())(x), "a transformation of torch.func"),
        (lambda x: torch.func.grad(lambda v: (v**3).sum())(x), "a transformation of torch.func"),
        (lambda x: x * random.random(), "draws from random or numpy.random"),
        (lambda x: x * float(np.random.rand()), "draws from random or numpy.random"),
        (lambda x: x + {x.shape: 1}[x.shape], "a size is a key of a dict"),
        (lambda x: setattr(x * 1, "data", x[:2]) or x, "set to a tensor of another shape"),
    ],
)
def test_what_a_graph_would_silently_get_wrong(function, message):
    random.seed(1)
    before = random.getstate()
    with pytest.raises(ConversionError, match=message):
        from_torch(Net(function), X)
    assert random.getstate() == before


def test_random_numbers_that_change_nothing_do_no_harm():
    beside(Net(lambda x: (np.random.rand(), x * 2)[1]), X)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_modules_that_are_refused_by_their_kind():
    with torch.inference_mode():
        inferring = Net(torch.sin)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ConversionError, match="all modules of torch have a forward hook"):
            from_torch(Net(torch.sin), X)
    finally:
        hook.remove()
    with pytest.raises(ConversionError, match="made under torch.inference_mode"):
        from_torch(inferring, X)
    layers = tnn.Sequential(torch.ao.nn.quantized.Linear(2, 2))
    with pytest.raises(ConversionError, match="'0' .Linear.\n.*quantized"):
        from_torch(layers, X)
    wide = torch.ones(6, dtype=torch.float64)
    with pytest.raises(nn.DtypeError, match=r"a constant \('part.0' .* of float64"):
        from_torch(Net(lambda x: x + wide), X)


def test_constants_are_compared_with_their_kind():
    ours = from_torch(Net(lambda x, factor: x * factor), torch.tensor([1, 2]), 2)
    for other in (2.0, True):
        with pytest.raises(nn.ShapeError, match="was 2 when it was traced"):
            ours(np.array([1, 2]), other)


def test_a_forward_without_arguments():
    beside(Net(lambda: torch.arange(3) * 2.0), kwargs={})
    with pytest.raises(ConversionError, match="kwargs={}"):
        from_torch(Net(torch.sin))


def test_threads_take_turns():
    failed = []

    def convert():
        try:
            from_torch(Net(torch.sin), X)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not isinstance(torch.nn.Module.__dict__.get("training"), property)
