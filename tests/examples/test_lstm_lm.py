"""The LSTM language model: its state goes on, as the reference's does, and it learns."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import lstm_lm
import statefulnn as nn
from tests.examples.reference import SMALL, TorchRNNModel, assert_close, from_torch, to_torch

pytestmark = pytest.mark.compiled_with_care


def test_state_is_the_references_and_goes_on():
    ours, theirs = SMALL["lstm"].pair()
    tokens = np.random.default_rng(0).integers(0, 50, (8, 3)).astype(np.int32)
    logits, hidden = nn.jit(ours)(tokens)
    with torch.no_grad():
        expected, (h, c) = theirs(to_torch(tokens))
    assert_close(logits, from_torch(expected))
    assert_close(hidden[0], from_torch(h))
    assert_close(hidden[1], from_torch(c))
    first, middle = nn.jit(ours)(tokens[:5], ours.init_hidden(3))
    second, _ = nn.jit(ours)(tokens[5:], middle)
    assert_close(jnp.concatenate([first, second]), from_torch(expected))


def test_ties_need_equal_sizes():
    with pytest.raises(ValueError, match="nhid == ninp.*24 and 16"):
        lstm_lm.RNNModel(50, 16, 24, 1, tie_weights=True)


def test_training_steps_are_torchs():
    ours, theirs = SMALL["lstm-tied"].pair()
    theirs.train().drop.p = theirs.rnn.dropout = 0.0
    ours.train().drop.p = ours.rnn.dropout = 0.0
    opt = nn.Optimizer(ours, optax.sgd(0.5))
    their_opt = torch.optim.SGD(theirs.parameters(), 0.5)
    tokens = np.random.default_rng(0).integers(0, 50, (21, 3)).astype(np.int32)
    hidden, their_hidden = ours.init_hidden(3), None
    for start in (0, 10):
        chunk = tokens[start : start + 11]
        loss, hidden = lstm_lm.train_step(ours, opt, chunk, hidden)
        their_opt.zero_grad()
        logits, their_hidden = theirs(to_torch(chunk[:-1]), their_hidden)
        their_hidden = tuple(h.detach() for h in their_hidden)
        expected = torch.nn.functional.cross_entropy(
            logits.reshape(-1, 50), to_torch(chunk[1:]).reshape(-1)
        )
        expected.backward()
        their_opt.step()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, p in theirs.named_parameters():
        assert_close(ours.get_parameter(name).value, from_torch(p))


def test_program_learns_and_saves_what_torch_reads(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("what goes round comes round, and round it goes. " * 60)
    steps = ["--steps", "80", "--length", "20"]
    loss = lstm_lm.main(["--text", str(text), "--save", "lm.safetensors", *steps])
    assert loss < 1.0
    assert "weights saved to lm.safetensors" in capsys.readouterr().out
    state = nn.load("lm.safetensors")
    theirs = TorchRNNModel(len(set(text.read_text())), 128, 128, 2, tie_weights=True)
    theirs.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state.items()}, strict=True)
