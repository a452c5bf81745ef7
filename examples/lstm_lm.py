"""A language model with an LSTM, under the names of torch's own example "word_language_model".

It learns a text character by character, this file if none is given, and writes more of it.

    python examples/lstm_lm.py
    python examples/lstm_lm.py --text novel.txt --steps 2000 --save lm.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F


class RNNModel(nn.Module):
    """Source: ``RNNModel`` of pytorch/examples, word_language_model; here the layers are LSTMs.

    Args:
        ntoken: the size of the vocabulary.
        ninp: the size of the embeddings.
        nhid: the size of the hidden state.
        nlayers: how many LSTMs lie above each other.
        dropout: the probability to drop a number, between the layers.
        tie_weights: whether embedding and decoder share their table.
    """

    def __init__(
        self,
        ntoken: int,
        ninp: int,
        nhid: int,
        nlayers: int,
        dropout: float = 0.5,
        tie_weights: bool = False,
    ):
        super().__init__()
        if tie_weights and nhid != ninp:
            raise ValueError(f"tied weights need nhid == ninp, and these are {nhid} and {ninp}")
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if tie_weights:
            self.decoder.weight = self.encoder.weight

    def forward(self, tokens, hidden=None):
        """Return logits ``(T, B, ntoken)`` for tokens ``(T, B)``, and the state to go on with."""
        emb = self.drop(self.encoder(tokens))  # (T, B, ninp)
        output, hidden = self.rnn(emb, hidden)  # (T, B, nhid), two of (nlayers, B, nhid)
        return self.decoder(self.drop(output)), hidden

    def init_hidden(self, batch_size: int) -> tuple[jax.Array, jax.Array]:
        shape = (self.rnn.num_layers, batch_size, self.rnn.hidden_size)
        zeros = jnp.zeros(shape, self.encoder.weight.dtype)
        return zeros, zeros


@nn.jit
def train_step(model, opt, tokens, hidden):
    """One step on ``(T + 1, B)`` tokens, which go on where the last ones ended."""

    def loss_of(model):
        logits, new = model(tokens[:-1], hidden)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[1:].reshape(-1))
        return loss, new

    (loss, hidden), grads = nn.value_and_grad(loss_of, has_aux=True)(model)
    opt.step(grads)
    return loss, hidden


@nn.jit
def sample(model, token, hidden, temperature):
    """Draw the next token of each row: ``(B,) -> (B,)``."""
    logits, hidden = model(token[None], hidden)  # (1, B, ntoken)
    return jax.random.categorical(nn.next_key(), logits[0] / temperature), hidden


def train(model: RNNModel, data: np.ndarray, steps: int, batch_size: int, bptt: int) -> float:
    """Train on a text in `batch_size` columns, `bptt` tokens at a time; return the last loss."""
    schedule = optax.cosine_onecycle_schedule(steps, 5e-3)
    opt = nn.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)))
    rows = (len(data) - 1) // batch_size
    columns = data[: rows * batch_size].reshape(batch_size, rows).T  # (rows, batch_size)
    chunks = max(1, (rows - 1) // bptt)
    model.train()
    loss = jnp.zeros(())
    progress = tqdm(range(steps), desc="lstm", unit="step")
    for i in progress:
        at = i % chunks * bptt
        if at == 0:
            hidden = model.init_hidden(batch_size)
        loss, hidden = train_step(model, opt, columns[at : at + bptt + 1], hidden)
        if i % 20 == 0:
            progress.set_postfix(loss=f"{float(loss):.3f}")
    model.eval()
    return float(loss)


def main(argv: list[str] | None = None) -> float:
    """Train, print a sample, and return the last loss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", metavar="FILE", default=__file__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--length", type=int, default=300, help="of what it writes")
    parser.add_argument("--save", metavar="FILE", help="write the weights, as safetensors")
    args = parser.parse_args(argv)

    text = Path(args.text).read_text()
    letters = sorted(set(text))
    data = np.array([letters.index(c) for c in text], np.int32)
    nn.manual_seed(0)
    model = RNNModel(len(letters), 128, 128, 2, dropout=0.1, tie_weights=True)
    loss = train(model, data, args.steps, batch_size=16, bptt=32)
    print(f"loss {loss:.3f}")
    token, hidden = jnp.asarray(data[:1]), model.init_hidden(1)
    written = []
    for _ in range(args.length):
        token, hidden = sample(model, token, hidden, args.temperature)
        written.append(letters[int(token[0])])
    print("".join(written))
    if args.save:
        nn.save(model, args.save)
        print(f"weights saved to {args.save}")
    return loss


if __name__ == "__main__":
    main()
