"""A graph network on a graph of four communities: two labels in each tell the other nodes'.

Nodes have no features of their own; whom they know is all there is. Messages are summed over a list of
edges, so the cost is that of the edges. About five seconds on two cores.

    python examples/graph_net.py [--steps 200] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import statefulnn as nn
import statefulnn.functional as F

COMMUNITIES, MEMBERS, WITHIN, BETWEEN, LABELLED = 4, 40, 0.2, 0.01, 2
NODES = COMMUNITIES * MEMBERS


class GraphConv(nn.Module):
    """Each node takes the mean of its neighbours and itself, weighted by their degrees.

    Source: Kipf and Welling, Semi-supervised classification with graph convolutional networks, 2017.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.bias = nn.Parameter(jnp.zeros(out_features))

    def forward(self, x, edges):
        """Return (N, out_features) for nodes (N, in_features) and edges (2, E), both directions."""
        source, target = edges
        norm = 1 / jnp.sqrt(1 + jnp.bincount(target, length=len(x)))[:, None]
        x = norm * self.linear(x)
        received = jnp.zeros_like(x).at[target].add(x[source])
        return norm * (received + x) + self.bias


class GraphNet(nn.Module):
    """An embedding of each node, and two rounds of messages."""

    def __init__(self, nodes: int, classes: int, hidden: int = 16, dropout: float = 0.5):
        super().__init__()
        self.embedding = nn.Embedding(nodes, hidden)
        self.first = GraphConv(hidden, hidden)
        self.second = GraphConv(hidden, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, edges):
        x = self.dropout(F.relu(self.first(self.embedding.weight, edges)))
        return self.second(x, edges)  # (2, E) -> (N, classes)


def block_model(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw edges (2, E), each in both directions, and the nodes' communities (N,)."""
    labels = np.repeat(np.arange(COMMUNITIES), MEMBERS)
    chance = np.where(labels[:, None] == labels, WITHIN, BETWEEN)
    upper = np.triu(rng.random((NODES, NODES)) < chance, 1)
    return np.stack(np.nonzero(upper | upper.T)).astype(np.int32), labels.astype(np.int32)


@nn.jit
def train_step(model: nn.Module, opt: nn.Optimizer, edges, known, labels) -> jax.Array:
    def loss_of(model):
        return F.cross_entropy(model(edges)[known], labels[known])

    loss, grads = nn.value_and_grad(loss_of)(model)
    opt.step(grads)
    return loss


def draw(edges: np.ndarray, labels, known, logits: np.ndarray, file: Path) -> None:
    """Save a picture of the graph, each node where the two main directions of the logits put it."""
    centred = logits - logits.mean(0)
    places = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T  # (N, 2)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(*places[edges].transpose(2, 0, 1), color="0.85", lw=0.4, zorder=0)
    axis.scatter(places[:, 0], places[:, 1], c=labels, cmap="Set1", s=16)
    axis.scatter(
        places[known, 0], places[known, 1], c="none", edgecolors="k", s=60, label="labels given"
    )
    axis.legend()
    axis.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> float:
    """Train, print and return the accuracy on the nodes without labels, save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/graph_net.png"))
    args = parser.parse_args(argv)

    edges, labels = block_model(np.random.default_rng(args.seed))
    known = np.arange(NODES).reshape(COMMUNITIES, MEMBERS)[:, :LABELLED].ravel()
    nn.manual_seed(args.seed)
    model = GraphNet(NODES, COMMUNITIES)
    opt = nn.Optimizer(model, optax.adamw(1e-2, weight_decay=5e-2))
    for _ in range(args.steps):
        train_step(model, opt, edges, known, labels)

    model.eval()
    logits = np.asarray(nn.jit(model)(edges))
    others = np.setdiff1d(np.arange(NODES), known)
    accuracy = float((logits.argmax(1) == labels)[others].mean())
    print(f"accuracy on {len(others)} nodes, from {len(known)} labels: {accuracy:.1%}")
    draw(edges, labels, known, logits, args.picture)
    print(f"picture: {args.picture}")
    return accuracy


if __name__ == "__main__":
    main()
