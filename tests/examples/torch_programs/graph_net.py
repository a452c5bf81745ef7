"""A graph network on a graph of four communities, in torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

COMMUNITIES, MEMBERS, WITHIN, BETWEEN, LABELLED = 4, 40, 0.2, 0.01, 2
NODES = COMMUNITIES * MEMBERS


class GraphConv(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x, edges):
        source, target = edges
        norm = 1 / torch.sqrt(1 + torch.bincount(target, minlength=len(x)))[:, None]
        x = norm * self.linear(x)
        received = torch.zeros_like(x).index_add(0, target, x[source])
        return norm * (received + x) + self.bias


class GraphNet(nn.Module):
    def __init__(self, nodes: int, classes: int, hidden: int = 16, dropout: float = 0.5):
        super().__init__()
        self.embedding = nn.Embedding(nodes, hidden)
        self.first = GraphConv(hidden, hidden)
        self.second = GraphConv(hidden, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, edges):
        x = self.dropout(F.relu(self.first(self.embedding.weight, edges)))
        return self.second(x, edges)


def block_model(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(COMMUNITIES), MEMBERS)
    chance = np.where(labels[:, None] == labels, WITHIN, BETWEEN)
    upper = np.triu(rng.random((NODES, NODES)) < chance, 1)
    return np.stack(np.nonzero(upper | upper.T)), labels


def train_step(model: nn.Module, opt: torch.optim.Optimizer, edges, known, labels) -> Tensor:
    opt.zero_grad()
    loss = F.cross_entropy(model(edges)[known], labels[known])
    loss.backward()
    opt.step()
    return loss.detach()


def draw(edges: np.ndarray, labels, known, logits: np.ndarray, file: Path) -> None:
    centred = logits - logits.mean(0)
    places = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(*places[edges].transpose(2, 0, 1), color="0.85", lw=0.4, zorder=0)
    axis.scatter(*places.T, c=labels, cmap="Set1", s=16)
    axis.scatter(*places[known].T, c="none", edgecolors="k", s=60, label="labels given")
    axis.legend()
    axis.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/graph_net.png"))
    args = parser.parse_args(argv)

    edges, labels = block_model(np.random.default_rng(args.seed))
    known = np.arange(NODES).reshape(COMMUNITIES, MEMBERS)[:, :LABELLED].ravel()
    torch.manual_seed(args.seed)
    model = GraphNet(NODES, COMMUNITIES)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=5e-2)
    graph, targets = torch.from_numpy(edges), torch.from_numpy(labels)
    for _ in range(args.steps):
        train_step(model, opt, graph, known, targets)

    model.eval()
    with torch.no_grad():
        logits = model(graph).numpy()
    others = np.setdiff1d(np.arange(NODES), known)
    accuracy = float((logits.argmax(1) == labels)[others].mean())
    print(f"accuracy on {len(others)} nodes, from {len(known)} labels: {accuracy:.1%}")
    draw(edges, labels, known, logits, args.picture)
    print(f"picture: {args.picture}")
    return accuracy


if __name__ == "__main__":
    main()
