"""nn.explore: what the page is given. How it looks and behaves is tested in `tests/browser`."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.inspect.models import SHARED_INPUTS, Shared, image


@pytest.fixture
def data_of(tmp_path):
    """Write a page; return what stands in it, and the page."""

    def data_of(model, *inputs, **kwargs):
        path = nn.explore(model, *inputs, path=tmp_path / "model.html", **kwargs)
        text = path.read_text("utf-8")
        start = text.index('<script id="data" type="application/json">')
        found = text[text.index(">", start) + 1 : text.index("</script>", start)]
        return json.loads(found), text

    return data_of


def flow(data, path=""):
    """Return the edges in the first call of a module, by names."""
    number = next(
        n
        for n, c in data["calls"].items()
        if c["module"] is not None and data["modules"][c["module"]]["path"] == path
    )
    call = data["calls"][number]

    def name(end):
        if isinstance(end, int):
            return data["modules"][data["calls"][str(end)]["module"]]["path"]
        return call["operations"].get(end, end)

    return {(name(a), name(b)) for a, b, _ in call["edges"]}


def test_it_returns_the_path_and_the_page_needs_nothing_beside_itself(tmp_path):
    path = nn.explore(nn.Linear(2, 2), path=str(tmp_path / "a.html"))
    assert path == tmp_path / "a.html"
    text = path.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert "{{" not in text
    assert "http://www.w3.org/2000/svg" in text  # a name, not an address
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "src=" not in text


def test_the_page_has_every_module_and_array(data_of):
    model = Shared()
    data, _ = data_of(model, *SHARED_INPUTS)
    names = {m["path"] for m in data["modules"]}
    assert names >= {name for name, _ in model.named_modules(remove_duplicate=False)} - {
        "alias.0",
        "alias.1",
    }
    arrays = {f"{m['path']}.{a['name']}" for m in data["modules"] for a in m["arrays"]}
    assert {name for name, _ in model.named_parameters()} <= arrays
    by_path = {m["path"]: m for m in data["modules"]}
    assert by_path["alias"]["shared"] == "enc"
    assert by_path["b"]["arrays"][0]["tied"] == "a.weight"
    assert by_path["unused"]["calls"] == []


def test_data_flows_as_forward_says(data_of):
    data, _ = data_of(Shared(), *SHARED_INPUTS)
    assert flow(data) == {
        ("in", "enc"),
        ("enc", "a"),
        ("enc", "b"),
        ("enc", "head"),
        ("enc", "+"),
        ("a", "×"),
        ("b", "×"),
        ("×", "blocks.0"),
        ("blocks.0", "blocks.1"),
        ("blocks.1", "blocks.2"),
        ("blocks.2", "+"),
        ("blocks.2", "out"),
        ("+", "head"),
        ("head", "out"),
    }
    assert flow(data, "enc") == {("in", "enc.0"), ("enc.0", "enc.1"), ("enc.1", "out")}


def test_edges_carry_the_shape_of_what_flows(data_of):
    data, _ = data_of(nn.Sequential(nn.Linear(3, 5), nn.Flatten(0)), image(2, 3))
    root = data["calls"]["0"]
    assert root["edges"] == [["in", 1, "f32[2,3]"], [1, 2, "f32[2,5]"], [2, "out", "f32[10]"]]


def test_random_states_and_weights_are_no_flow(data_of):
    data, _ = data_of(
        nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5), nn.BatchNorm1d(3)), image(4, 3)
    )
    assert flow(data) == {("in", "0"), ("0", "1"), ("1", "2"), ("2", "out")}


def test_what_flows_through_the_body_of_a_loop_and_through_branches_is_drawn(data_of):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cell, self.branch = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = self.first(x)
            (_, x), _ = nn.scan(lambda c, _: ((c[0], c[0](c[1])), None), (self.cell, x), length=4)
            return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, self.branch, x)

    data, _ = data_of(Net(), image(2, 3))
    assert flow(data) >= {("in", "first"), ("first", "cell"), ("cell", "branch"), ("branch", "out")}
    assert {c["times"] for c in data["calls"].values()} == {1, 4}


def test_equal_blocks_one_after_the_other_are_drawn_as_one(data_of):
    class Net(nn.Module):
        def __init__(self, skip):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
            self.skip = skip

        def forward(self, x):
            for block in self.blocks:
                x = block(x) + x if self.skip else block(x)
            return x

    data, _ = data_of(Net(False), image(2, 3))
    assert data["calls"]["0"]["stacks"] == [[1, 2, 3, 4]]
    # With a sum between two of them the drawing would have a circle.
    data, _ = data_of(Net(True), image(2, 3))
    assert data["calls"]["0"]["stacks"] == []


def test_no_name_ends_the_script_that_it_stands_in(data_of):
    model = nn.Module()
    model.add_module("</script><b>", nn.Linear(1, 1))
    data, text = data_of(model)
    assert data["modules"][1]["path"] == "</script><b>"
    assert text.count("</script>") == 2


def test_numbers_are_looked_at_unless_told_otherwise(data_of):
    model = nn.Linear(2, 2)
    model.bias.value = jnp.asarray([jnp.nan, 1.0])
    data, _ = data_of(model)
    assert data["modules"][0]["arrays"][1]["numbers"]["nans"] == 1
    data, _ = data_of(model, values=False)
    assert data["modules"][0]["arrays"][1]["numbers"] is None


def test_a_page_is_strict_json_for_any_numbers(data_of):
    model = nn.Module()
    model.p = nn.Parameter(jnp.full(3, jnp.finfo(jnp.float32).max))
    with jax.enable_x64(True):
        model.q = nn.Buffer(np.asarray([-1e308, 1e308, 1.0]))
        data, text = data_of(model)
    assert "NaN," not in text[text.index('"modules"') :]
    assert len(data["modules"][0]["arrays"]) == 2


def test_meta_lazy_and_plain_models_without_inputs_have_a_page(data_of):
    with nn.device("meta"):
        meta = nn.Linear(2, 2)
    assert "meta" in data_of(meta, image(1, 2))[0]["modules"][0]["arrays"][0]["why"]
    lazy = nn.Sequential(nn.LazyLinear(3))
    assert data_of(lazy)[0]["modules"][1]["unknown"] == ["0.weight", "0.bias"]
    assert data_of(lazy, image(4, 5))[0]["modules"][1]["parameters"] == 18
    assert not data_of(nn.ReLU())[0]["traced"]


def test_nothing_but_a_module_is_explored(tmp_path):
    with pytest.raises(TypeError, match="Module"):
        nn.explore(jnp.ones(3), path=tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_a_layer_that_forward_builds_stands_on_the_page_as_not_registered(data_of):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = nn.Linear(3, 3)

        def forward(self, x):
            return nn.Linear(3, 3)(self.inp(x))

    data, _ = data_of(Model(), image(4, 3))
    model, inp, built = data["modules"]
    assert (inp["path"], len(inp["calls"])) == ("inp", 1)
    assert (built["cls"], built["name"], len(built["calls"])) == ("Linear", "(not registered)", 1)
    assert (model["parameters"], built["parameters"]) == (12, 12)
    assert [a["shape"] for a in built["arrays"]] == ["(3, 3)", "(3,)"]
    assert ("inp", built["path"]) in flow(data)
