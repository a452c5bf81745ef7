"""Modules, parameters and buffers in a notebook: what is shown, and that it is safe and small."""

from __future__ import annotations

import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from statefulnn.inspect.statistics import statistics_of
from tests.devices import run_on_devices
from tests.inspect.models import Shared

VOID = {"path"}


class Page(html.parser.HTMLParser):
    """The text and tags of a page; a tag that is not closed is an error."""

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.attributes = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def shown(thing):
    return Page(thing._repr_html_())


def test_a_module_is_a_tree_to_fold_with_shapes_and_dtypes():
    page = shown(nn.Sequential(nn.Linear(3, 4, dtype=jnp.float16), nn.BatchNorm1d(4)))
    assert page.tags.count("details") == 3
    assert "weight (4, 3) float16" in page.text
    assert "running_mean (4,) float32 buffer" in page.text
    assert (
        "24 parameters · 76 B" not in page.text
    )  # 12 + 4 halves, 4 + 4 floats, 8 floats and a counter
    assert "24 parameters · 100 B" in page.text


def test_it_needs_no_script_and_nothing_from_elsewhere():
    source = nn.Linear(2, 2)._repr_html_()
    page = Page(source)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onclick"} & set(page.attributes)
    assert "http" not in source
    assert "url(" not in source


def test_every_name_is_escaped():
    model = type("<i>Net</i>", (nn.Module,), {"extra_repr": lambda self: "<u>x</u>"})()
    model.add_module('"><script>alert(1)</script>', nn.Linear(1, 1))
    model.register_buffer("<b>", jnp.zeros(1))
    page = shown(model)
    assert not {"script", "u"} & set(page.tags)
    assert "<i>Net</i>" in page.text
    assert '"><script>alert(1)</script>' in page.text
    assert "<b> (1,) float32 buffer" in page.text


def test_equal_blocks_are_folded_together_and_ties_and_shared_modules_say_so():
    text = shown(Shared()).text
    assert "0-2 Linear × 3" in text
    assert "weight (8, 8) float32 is a.weight" in text
    assert "alias Sequential  is enc" in text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, jnp.nan, 2.0, jnp.nan], "2 NaN"),
        ([1.0, jnp.inf, 2.0, -jnp.inf], "2 infinite"),
        ([jnp.nan, jnp.nan, jnp.nan, jnp.inf], "3 NaN and 1 infinite"),
    ],
)
def test_numbers_that_are_none_are_loud_also_where_they_are_folded_away(values, said):
    layer = nn.Linear(1, 4)
    layer.bias.value = jnp.asarray(values)
    source = nn.Sequential(nn.Sequential(layer))._repr_html_()
    assert f"<strong>{said}</strong>" in source
    assert source.count("NaN or infinite</strong>") == 3  # the layer, and both around it
    assert "<strong>" not in nn.Linear(2, 2)._repr_html_()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "complex64", "float16"])
def test_statistics_are_numpy_s(dtype):
    values = np.random.default_rng(0).normal(size=(30, 40)) * 3
    array = jnp.asarray(values).astype(dtype)
    wide = np.asarray(array).astype("complex128" if dtype == "complex64" else "float64")
    wide = np.abs(wide) if dtype == "complex64" else wide
    found = statistics_of(array)
    np.testing.assert_allclose(
        [found.mean, found.std, found.low, found.high],
        [wide.mean(), wide.std(), wide.min(), wide.max()],
    )
    assert found.zeros == (wide == 0).sum()
    assert list(found.histogram) == np.histogram(wide, 24)[0].tolist()


def test_of_a_large_array_a_sample_is_looked_at_and_that_is_said():
    box = nn.Buffer(jnp.arange(3_000_000, dtype=jnp.float32))
    found = statistics_of(box.value)
    assert found.step > 1
    assert sum(found.histogram) == -(-3_000_000 // found.step)
    assert f"a sample of one in {found.step}" in shown(box).text


def test_numbers_near_the_ends_of_what_a_dtype_holds_are_no_problem():
    most = float(jnp.finfo(jnp.float32).max)
    found = statistics_of(jnp.asarray([-most, most, 0.0]))
    assert (found.low, found.high, sum(found.histogram)) == (-most, most, 3)
    for near in ([1.0, 1.0 + 2**-23], [0.0, 1e-45], [1e30, 1.0000001e30], [5.0, 5.0, 5.0]):
        assert sum(statistics_of(jnp.asarray(near)).histogram) == len(near)
    with jax.enable_x64(True):
        for far in ([-1.7e308, 1.7e308], [1.0, 1.0 + 2**-52], [0.0, 5e-324]):
            assert sum(statistics_of(jnp.asarray(far)).histogram) == 2


def test_what_has_no_numbers_says_why():
    with nn.device("meta"):
        meta = nn.Linear(2, 2)
    assert "on the meta device" in shown(meta).text
    lazy = nn.LazyLinear(2)
    assert "weight no shape yet, float32" in shown(lazy).text
    assert "without a shape" in shown(lazy).text
    assert "no shape yet" in shown(lazy.weight).text
    gone = nn.Linear(2, 2)
    gone.weight.value.delete()
    assert "deleted" in shown(gone).text
    assert "empty" in shown(nn.Parameter(jnp.zeros((0, 3)))).text


def test_under_a_trace_there_are_shapes_and_no_values_and_nothing_is_captured():
    outer, seen = nn.Linear(2, 3), []

    @nn.jit
    def step(model, x):
        seen.append((shown(model).text, shown(model.weight).text))
        shown(outer)
        return model(x)

    step(nn.Linear(2, 3), jnp.ones((1, 2)))
    assert all("traced: it has no numbers here" in text for text in seen[0])
    outer.weight.value = jnp.ones((3, 2))  # would warn if the trace had captured it


def test_parameters_and_buffers_show_themselves():
    frozen = nn.Parameter(jnp.ones((2, 3)), requires_grad=False)
    assert "Parameter (2, 3) float32 frozen  all 1" in shown(frozen).text
    assert "Buffer (3,) int32 buffer" in shown(nn.Buffer(jnp.arange(3, dtype=jnp.int32))).text
    assert "<svg" in nn.Buffer(jnp.arange(3.0))._repr_html_()


def test_a_model_of_a_thousand_modules_stays_small():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(i % 7 + 1, 3)) for i in range(1000)))
    source = model._repr_html_()
    Page(source)
    assert len(source) < 2_000_000
    wide = nn.Sequential(*(nn.ReLU() if i % 2 else nn.Tanh() for i in range(10_000)))._repr_html_()
    assert len(wide) < 1_000_000
    assert "which is left out here" in Page(wide).text


def test_a_very_deep_model_is_no_problem():
    model = nn.Linear(2, 2)
    for _ in range(1500):
        model = nn.Sequential(model)
    assert shown(model).tags.count("details") == 1501


def test_a_sharded_array_says_how():
    run_on_devices(
        4,
        "import html, jax, jax.numpy as jnp, statefulnn as nn\n"
        "mesh = jax.make_mesh((4,), ('data',))\n"
        "place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))\n"
        "p = nn.Parameter(jax.device_put(jnp.arange(8.0), place))\n"
        "assert f'{html.escape(str(place.spec))} on 4 devices' in p._repr_html_()\n"
        "assert '3.5 ± 2.29' in p._repr_html_()\n",
    )


def test_subclasses_may_show_themselves_otherwise():
    class Mine(nn.Linear):
        def _repr_html_(self):
            return "mine"

    assert Mine(1, 1)._repr_html_() == "mine"
    assert jax.tree.leaves(Mine(1, 1))
