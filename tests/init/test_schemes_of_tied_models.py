"""Schemes over models that share a weight between an embedding and the readout."""

from __future__ import annotations

import numpy as np
import pytest

import statefulnn as nn


class Tied(nn.Module):
    def __init__(self, width: int, order: str) -> None:
        super().__init__()
        layers = {"tok": nn.Embedding(200, width), "lm_head": nn.Linear(width, 200)}
        for name in ("tok", "lm_head") if order == "embedding first" else ("lm_head", "tok"):
            setattr(self, name, layers[name])
        if order == "readout's weight":
            self.tok.weight = self.lm_head.weight
        else:
            self.lm_head.weight = self.tok.weight
        self.hidden = nn.Linear(width, width)


@pytest.mark.parametrize("order", ["embedding first", "readout first", "readout's weight"])
def test_mup_gives_a_readout_tied_to_an_embedding_the_rules_of_the_embedding(order) -> None:
    model = Tied(64, order)
    factors = nn.init.apply_scheme(model, "mup", base=Tied(16, order))
    # 12,800 numbers of N(0, 1): the mean square is 1 within eight of its standard deviations.
    assert abs(float((model.tok.weight.value**2).mean()) - 1) < 8 * np.sqrt(2 / 12_800)
    assert model.lm_head.weight is model.tok.weight
    assert not model.lm_head.bias.value.any()
    tied = next(n for n, p in model.named_parameters() if p is model.tok.weight)
    assert factors[tied] == 1.0
    assert factors["hidden.weight"] == 16 / 64
