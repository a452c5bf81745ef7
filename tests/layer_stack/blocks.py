"""The blocks that the tests stack, ours and torch's."""

from __future__ import annotations

import torch

import statefulnn as nn


class Block(nn.Module):
    """A residual block with all that a layer may hold: weights, running statistics, random masks."""

    def __init__(self, size=8, p=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.fc = nn.Linear(size, size)
        self.bn = nn.BatchNorm1d(size)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return x + self.drop(self.bn(self.fc(self.norm(x))))


class TorchBlock(torch.nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.norm = torch.nn.LayerNorm(size)
        self.fc = torch.nn.Linear(size, size)
        self.bn = torch.nn.BatchNorm1d(size)
        self.drop = torch.nn.Dropout(0.0)

    def forward(self, x):
        return x + self.drop(self.bn(self.fc(self.norm(x))))


class Listed(nn.Module):
    """A model with its blocks in a list: what a stack is held to."""

    def __init__(self, blocks, size=8):
        super().__init__()
        self.head = nn.Linear(size, 3)
        self.blocks = blocks

    def forward(self, x):
        if isinstance(self.blocks, nn.LayerStack):
            return self.head(self.blocks(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def pair(count=4, p=0.0, seed=0):
    """Return the same model with a list and with a stack."""
    with nn.rng_scope(seed):
        listed = Listed(nn.ModuleList([Block(p=p) for _ in range(count)]))
    with nn.rng_scope(seed):
        head = Listed(nn.LayerStack([Block(p=p) for _ in range(count)]))
    head.load_state_dict(listed.state_dict())
    return listed, head
