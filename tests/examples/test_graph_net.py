"""The graph network finds communities from two labels in each, by the formula of its paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graph_net as example


def test_it_finds_the_communities(capsys):
    accuracy = example.main(["--steps", "100", "--picture", "pictures/graph.png"])
    assert accuracy > 0.9  # by chance: 0.25
    assert Path("pictures/graph.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{accuracy:.1%}" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_that_does_not_hang_on_the_seed(seed):
    assert example.main(["--seed", str(seed)]) > 0.9


def test_a_layer_is_the_product_with_the_normalised_adjacency():
    rng = np.random.default_rng(0)
    edges, _ = example.block_model(rng)
    layer = example.GraphConv(3, 2)
    x = rng.normal(size=(example.NODES, 3)).astype(np.float32)
    adjacency = np.eye(example.NODES)
    adjacency[edges[1], edges[0]] = 1
    scale = np.diag(adjacency.sum(1) ** -0.5)
    expected = scale @ adjacency @ scale @ x @ np.asarray(layer.linear.weight).T
    np.testing.assert_allclose(layer(x, edges), expected, rtol=1e-4, atol=1e-5)


def test_edges_go_both_ways_and_mostly_within_a_community():
    edges, labels = example.block_model(np.random.default_rng(0))
    pairs = set(map(tuple, edges.T.tolist()))
    assert pairs == {(b, a) for a, b in pairs} and all(a != b for a, b in pairs)
    within = (labels[edges[0]] == labels[edges[1]]).mean()
    chance = example.WITHIN * (example.MEMBERS - 1)
    other = example.BETWEEN * (example.NODES - example.MEMBERS)
    assert within == pytest.approx(chance / (chance + other), abs=0.05)
