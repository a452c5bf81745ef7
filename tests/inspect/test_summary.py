"""nn.summary: shapes, parameters and memory beside torch's models, and what a table looks like."""

from __future__ import annotations

import copy
import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt2
import resnet
import statefulnn as nn
from tests.examples.reference import torchvision, transformers
from tests.inspect.models import SHARED_INPUTS, Shared, image, tokens


def by_path(table):
    return {row.path: row for row in table.rows}


def test_a_resnet_has_torchvision_s_shapes_parameters_and_buffers():
    with nn.device("meta"):
        ours = resnet.resnet50()
    with torch.device("meta"):
        theirs = torchvision.models.resnet50()
        shapes = {}
        for name, module in theirs.named_modules():
            module.register_forward_hook(
                lambda m, args, out, name=name: shapes.update({name: tuple(out.shape)})
            )
        theirs(torch.zeros(2, 3, 64, 96))
    table = nn.summary(ours, image(2, 3, 64, 96))
    assert table.total.parameters == sum(p.numel() for p in theirs.parameters())
    assert table.total.buffers == sum(b.numel() for b in theirs.buffers())
    for row in table.rows:
        # A ReLU is called three times in a block, and torch's hook has the last of them.
        last = row.output if row.calls == 1 else row.output[-1]
        assert last.shape == shapes[row.path]
        module = theirs.get_submodule(row.path)
        assert row.parameters == sum(p.numel() for p in module.parameters())


def test_gpt2_small_has_the_size_that_transformers_says_and_twelve_blocks_in_one_row():
    with nn.device("meta"):
        ours = gpt2.GPT2LMHeadModel(gpt2.GPT2Config())
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    table = nn.summary(ours, tokens(1, 128), width=120)
    assert table.total.parameters == theirs.num_parameters()
    assert table.total.nbytes == 4 * theirs.num_parameters()
    (blocks,) = (row for row in table.rows if row.repeats > 1)
    assert (blocks.path, blocks.name, blocks.repeats) == ("transformer.h.0", "0-11", 12)
    assert blocks.parameters == sum(p.numel() for p in theirs.transformer.h[0].parameters())
    assert by_path(table)["lm_head"].ties == (("weight", "transformer.wte.weight"),)
    assert "0-11: GPT2Block × 12" in str(table)


def test_nothing_of_the_model_changes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    definition, before = nn.split(model)
    before, state = copy.deepcopy(before), nn.get_rng_state()
    nn.summary(model, jnp.ones((2, 3, 8, 8)))
    assert nn.split(model)[0] is definition
    for x, y in zip(before, nn.split(model)[1], strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    np.testing.assert_array_equal(np.asarray(state), np.asarray(nn.get_rng_state()))
    model[1].running_mean = jnp.ones(4)  # would warn if the table had captured it


def test_a_lazy_model_stays_lazy_and_the_table_has_its_shapes():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    table = nn.summary(model, image(2, 3, 8, 8))
    theirs = torch.nn.Sequential(
        torch.nn.LazyConv2d(4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(5)
    )
    theirs(torch.zeros(2, 3, 8, 8))
    assert table.total.parameters == sum(p.numel() for p in theirs.parameters())
    assert table.rows[-1].output.shape == (2, 5)
    assert isinstance(model[3], nn.LazyLinear)
    assert nn.parameter.is_lazy(model[3].weight)


def test_without_inputs_there_are_no_outputs_and_what_has_no_shape_is_said():
    table = nn.summary(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))
    assert table.total.flops is None
    assert table.total.calls is None
    assert table.total.parameters == 4 * 2 + 2
    assert table.total.without_shape == ("0.weight", "0.bias")
    assert "0.weight, 0.bias" in str(table)
    assert "output" not in str(table)


def test_shared_and_tied_parts_count_once_and_say_whose_they_are():
    model = Shared()
    table = nn.summary(model, *SHARED_INPUTS, width=200)
    rows = by_path(table)
    assert table.total.parameters == sum(p.size for p in model.parameters())
    assert rows["alias"].shared == "enc"
    assert rows["enc"].calls == 2
    assert rows["b"].ties == (("weight", "a.weight"),)
    assert rows["unused"].unused
    assert not rows["blocks"].unused
    assert [row for row in table.rows if row.repeats == 3][0].path == "blocks.0"
    assert jax.tree.map(lambda x: x.shape, table.total.output) == {"out": (2, 4), "z": (2, 8)}
    for text in ("alias: Sequential  (is enc)", "(2 calls)", "(not called)", "weight is a.weight"):
        assert text in str(table)


@pytest.mark.parametrize("given", ["arrays", "structs", "keywords"])
def test_inputs_are_arrays_structs_or_keywords(given):
    x, y = jnp.ones((2, 8)), jnp.ones((2, 8))
    if given == "structs":
        x, y = SHARED_INPUTS
    named = {"x": x, "y": y, "scale": 2.0}
    table = nn.summary(Shared(), **named) if given == "keywords" else nn.summary(Shared(), x, y)
    assert table.total.output["out"].shape == (2, 4)


def test_clones_that_transformations_make_are_known_by_their_boxes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

        def forward(self, x):
            for i in (2, 0, 2):
                x = nn.remat(self.blocks[i])(x)
            x = nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, self.blocks[3], x)
            return x

    rows = by_path(nn.summary(Net(), image(3, 4)))
    assert [rows[f"blocks.{i}"].calls for i in range(5)] == [1, 0, 2, 1, 0]


def test_a_layer_whose_weights_its_parent_reads_is_no_layer_that_nobody_uses():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.read, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x, _ = nn.remat(lambda m, x: m(x, x, x))(self.attention, x)
            return nn.jit(lambda net, x: x @ net.read.weight)(self, x)

    text = str(nn.summary(Net(), jnp.ones((3, 4)), width=100))
    for said in (
        "out_proj: Linear  (used by its parent)",
        "read: Linear  (used by its parent)",
        "unused: Linear  (not called)",
    ):
        assert said in text


def test_a_module_in_a_scan_is_called_once_a_step():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, xs):
            def step(carry, x):
                cell, h = carry
                return (cell, cell(h) + x), None

            (_, h), _ = nn.scan(step, (self.cell, jnp.zeros((2, 4))), xs)
            return h

    row = by_path(nn.summary(Net(), image(7, 2, 4)))["cell"]
    assert row.calls == 7
    assert row.flops == 7 * (2 * 2 * 4 * 4 + 2 * 4)


def test_frozen_parameters_are_shown_apart():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    table = nn.summary(model)
    assert (table.total.parameters, table.total.trainable) == (16 + 10, 10)
    assert "16 frozen" in str(table)
    assert "trained" in str(table).splitlines()[0]


def test_equal_neighbours_share_a_row_only_where_everything_shown_is_equal():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 4, bias=False))
    assert [row.repeats for row in nn.summary(model).rows] == [1, 3, 1]
    model[1].weight.requires_grad = False
    assert [row.repeats for row in nn.summary(model).rows] == [1, 1, 1, 1, 1]


def test_depth_says_how_deep_rows_go():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert [row.depth for row in nn.summary(model, depth=0).rows] == [0]
    assert [row.depth for row in nn.summary(model, depth=1).rows] == [0, 1]
    assert [row.depth for row in nn.summary(model).rows] == [0, 1, 2, 2]


@pytest.mark.parametrize("width", [50, 70, 100, 200])
def test_the_table_is_as_wide_as_it_may_be(width):
    with nn.device("meta"):
        model = gpt2.GPT2LMHeadModel(gpt2.GPT2Config(n_layer=2))
    lines = str(nn.summary(model, tokens(1, 16), width=width)).splitlines()
    table = lines[: lines.index(lines[1], 2) + 1]  # what is below are sentences
    assert max(map(len, table)) <= width
    assert "FLOPs" in table[0]


def test_a_very_deep_model_is_no_problem():
    model = nn.Linear(2, 2)
    for _ in range(1500):
        model = nn.Sequential(model)
    assert nn.summary(model).rows[-1].depth == 1500


def test_it_works_inside_a_trace_and_after_the_arrays_were_given_away():
    model = nn.Linear(3, 4)
    seen = []

    @nn.jit
    def step(model, x):
        seen.append(nn.summary(model, x))
        return model(x)

    step(model, jnp.ones((2, 3)))
    assert seen[0].total.output.shape == (2, 4)
    model.weight.value.delete()
    assert nn.summary(model, image(2, 3)).total.parameters == 16


def test_an_error_of_the_model_is_its_own():
    with pytest.raises(nn.ShapeError, match="the weight expects 3"):
        nn.summary(nn.Linear(3, 4), image(2, 5))
    with pytest.raises(TypeError, match="Module"):
        nn.summary(jnp.ones(3))


def test_a_hook_that_changes_the_output_is_seen():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, out: out[:, :2])
    assert by_path(nn.summary(model, image(5, 3)))["0"].output.shape == (5, 2)


def test_a_hook_that_keeps_outputs_keeps_nothing_of_the_trace():
    kept = []
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, out: kept.append(out))
    assert nn.summary(model, image(5, 3)).total.output.shape == (5, 4)
    assert kept == []


def test_it_leaves_no_mark_in_what_is_compiled_afterwards():
    model = nn.Linear(3, 3)
    compiled = nn.jit(lambda model, x: nn.remat(model)(x))
    nn.summary(model, jnp.ones((2, 3)))
    fn, params = nn.functionalize(model)
    assert "statefulnn:" not in str(jax.make_jaxpr(jax.checkpoint(fn))(params, jnp.ones((2, 3))))
    np.testing.assert_allclose(
        compiled(model, jnp.ones((2, 3))), model(jnp.ones((2, 3))), rtol=1e-6
    )


class _Cells(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.cells.append(data)


def test_a_notebook_shows_it_as_a_table_with_every_name_escaped():
    model = nn.Module()
    model.add_module("<script>alert(1)</script>", nn.Linear(2, 3))
    text = nn.summary(model)._repr_html_()
    parsed = _Cells()
    parsed.feed(text)
    assert "script" not in parsed.tags
    assert "<script>alert(1)</script>: Linear" in parsed.cells
    assert {"table", "style"} <= parsed.tags


# --------------------------------------------------------------------------------------------------
# What is called, and no part of the model


class Built(nn.Module):
    """Calls layers of one size: one of its own, and those that `call` adds."""

    def __init__(self, call):
        super().__init__()
        self.inp = nn.Linear(3, 3)
        self.call = call

    def forward(self, x):
        return self.call(self, self.inp(x))


def hidden_in_a_list():
    model = Built(lambda m, x: m.layers[0](x))
    model.layers = []
    model.layers.append(nn.Linear(3, 3))
    return model


OUTSIDE = nn.Linear(3, 3)
STRANGERS = {
    "a list": hidden_in_a_list,
    "forward": lambda: Built(lambda m, x: nn.Linear(3, 3)(x)),
    "outside": lambda: Built(lambda m, x: OUTSIDE(x)),
    "remat": lambda: Built(lambda m, x: nn.remat(nn.Linear(3, 3))(x)),
    "vmap": lambda: Built(lambda m, x: nn.vmap(nn.Linear(3, 3))(x)),
    "another size": lambda: Built(lambda m, x: nn.Linear(3, 5)(x)),
}


@pytest.mark.parametrize("where", STRANGERS)
def test_a_layer_that_is_not_registered_has_a_row_of_its_own(where):
    model = STRANGERS[where]()
    table = nn.summary(model, image(4, 3), width=100)
    _, inp, stranger = table.rows
    assert (inp.path, inp.calls, inp.stranger) == ("inp", 1, "")
    assert (stranger.cls, stranger.calls, stranger.stranger) == ("Linear", 1, "not registered")
    width = 5 if where == "another size" else 3
    assert stranger.parameters == (3 + 1) * width
    assert table.total.parameters == sum(p.numel() for p in torch.nn.Linear(3, 3).parameters())
    if where != "vmap":  # the operations of a product of matrices, and of its sum with the bias
        assert (inp.flops, stranger.flops) == (2 * 4 * 3 * 3 + 4 * 3, (2 * 3 + 1) * 4 * width)
    assert "Linear  (not registered)" in str(table)
    assert "neither trained nor saved" in str(table)
    assert "not registered" in table._repr_html_()


def test_what_a_stranger_calls_lies_in_its_row():
    model = Built(lambda m, x: nn.remat(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))(x))
    rows = nn.summary(model, image(4, 3)).rows
    assert [(r.cls, r.depth, r.calls) for r in rows] == [
        ("Built", 0, 1),
        ("Linear", 1, 1),
        ("Sequential", 1, 1),
        ("Linear", 2, 1),
        ("ReLU", 2, 1),
    ]
    assert rows[2].flops == rows[3].flops + rows[4].flops


@pytest.mark.parametrize("lift", [lambda f: f, nn.remat], ids=["plain", "remat"])
def test_a_module_that_a_ref_refers_to_has_its_name(lift):
    model = Built(lambda m, x: lift(m.teacher)(x))
    model.teacher = nn.Ref(nn.Linear(3, 3))
    _, inp, teacher = nn.summary(model, image(4, 3)).rows
    assert (inp.calls, teacher.name, teacher.stranger) == (1, "teacher", "referred to by nn.Ref")
    assert "not registered" not in str(nn.summary(model, image(4, 3)))


def test_a_container_that_forward_makes_of_the_model_s_layers_takes_none_of_their_calls():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            both = nn.Sequential(self.a, self.b)
            return nn.remat(both)(both(x))

    table = nn.summary(Model(), image(4, 3))
    assert [(r.cls, r.calls, r.parameters) for r in table.rows] == [
        ("Model", 1, 24),
        ("Linear", 2, 12),
    ]


def test_arrays_that_the_model_computes_leave_a_call_to_its_layer():
    def call(m, x):
        computed = {"weight": x.T @ x, "bias": x.sum(0)}
        return nn.functional_call(m.inp, computed, (x,)) + nn.vmap(m.inp)(x)

    _, inp = nn.summary(Built(call), image(4, 3)).rows
    assert inp.calls == 3


@pytest.mark.parametrize("width", [60, 80, 100])
def test_where_there_is_little_room_names_are_cut_and_notes_are_not(width):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_name_that_is_longer_than_others = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.a_name_that_is_longer_than_others(x, x, x)

    text = str(nn.summary(Model(), image(2, 5, 8), width=width))
    assert "(used by its parent)" in text
    assert "…" in text or width == 100
