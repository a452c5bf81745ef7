"""The page of nn.explore and modules in notebooks, in a browser: they show every module, fold and search."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import gpt2
import resnet
import statefulnn as nn
from tests.inspect.models import SHARED_INPUTS, Shared, image, tokens

LISTED = "[...document.querySelectorAll('#tree li')].map(li => modules[li.dataset.id].path)"
# Where an element is on the screen: left, top, right, bottom.
PLACE = """query => {
  const {left, top, right, bottom} = document.querySelector(query).getBoundingClientRect();
  return [left, top, right, bottom];
}"""


def _small_gpt2():
    config = gpt2.GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=3, n_head=4)
    return gpt2.GPT2LMHeadModel(config), (tokens(1, 16),)


def _gpt2():
    with nn.device("meta"):
        return gpt2.GPT2LMHeadModel(gpt2.GPT2Config()), (tokens(1, 1024),)


def _resnet50():
    with nn.device("meta"):
        return resnet.resnet50(), (image(1, 3, 224, 224),)


def _shared():
    return Shared(), SHARED_INPUTS


def _names_that_are_code():
    model = nn.Module()
    model.add_module("<img src=x onerror=alert(1)>", nn.Linear(1, 1))
    model.add_module("</script>", nn.Sequential(nn.ReLU()))
    return model, ()


MODELS = {f.__name__[1:]: f for f in (_small_gpt2, _gpt2, _resnet50, _shared, _names_that_are_code)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The models, and a page of each; written when a test first asks for it."""
    found = {}

    def written(name):
        if name not in found:
            model, inputs = MODELS[name]()
            path = tmp_path_factory.mktemp("pages") / f"{name}.html"
            found[name] = model, nn.explore(model, *inputs, path=path)
        return found[name]

    return written


@pytest.mark.parametrize("name", MODELS)
def test_the_page_opens_without_an_error_and_the_tree_has_every_module(page, written, name):
    model, path = written(name)
    opened = page(path)
    opened.page.click("#unfold-all")
    shown = opened.evaluate(LISTED)
    assert set(shown) >= {name for name, _ in model.named_modules()}
    assert len(shown) == len(set(shown))
    assert opened.errors == []
    assert opened.requests == [path.as_uri()]


@pytest.mark.parametrize("name", MODELS)
def test_every_call_that_is_unfolded_is_drawn_and_no_box_lies_on_another(page, written, name):
    opened = page(written(name)[1])
    opened.evaluate(
        """() => {
          for (const n of Object.keys(calls)) openCalls.add(n);
          for (const c of Object.values(calls)) for (const s of c.stacks) openStacks.add(s[0]);
          drawGraph();
        }"""
    )
    drawn = opened.evaluate("[...drawnBoxes.values()].map(b => [b.id, b.left, b.top, b.w, b.h])")
    calls = opened.evaluate("Object.entries(calls).map(([n, c]) => [n, String(c.parent)])")
    assert {b[0] for b in drawn} == {n for n, _ in calls}
    boxes, parents = {b[0]: b[1:] for b in drawn}, dict(calls)
    for number, (x, y, w, h) in boxes.items():
        if parents[number] in boxes:
            left, top, width, height = boxes[parents[number]]
            assert left <= x and x + w <= left + width
            assert top <= y and y + h <= top + height
        for other, (x2, y2, w2, h2) in boxes.items():
            if number < other and parents[number] == parents[other]:
                assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    assert opened.errors == []


def test_search_finds_modules_and_arrays_and_escape_ends_it(page, written):
    opened = page(written("gpt2")[1])
    opened.page.keyboard.press("/")
    opened.page.keyboard.type("h.11.mlp")
    names = opened.evaluate(
        "[...document.querySelectorAll('#tree li')].map(li => modules[li.dataset.id].path)"
    )
    assert "transformer.h.11.mlp.c_fc" in names
    assert "transformer.h.10" not in names
    assert opened.page.inner_text("#found") == "5 of 152 modules"
    opened.page.keyboard.press("Enter")
    assert opened.evaluate("selected.path") == "transformer.h.11.mlp"
    assert opened.page.inner_text("#detail-part h2").startswith("mlp")
    opened.page.fill("#search", "ln_f.weight")
    assert opened.page.inner_text("#found") == "1 of 152 modules"
    opened.page.press("#search", "Escape")
    assert opened.page.is_hidden("#found")
    assert opened.errors == []


def test_the_tree_folds_and_unfolds_by_mouse_and_by_keyboard(page, written):
    opened = page(written("shared")[1])
    count = "document.querySelectorAll('#tree li').length"
    before = opened.evaluate(count)
    opened.page.click("#tree li:has-text('enc') .twist")
    assert opened.evaluate(count) == before - 2
    opened.page.focus("#tree li")
    for key in ("Home", "ArrowDown", "ArrowRight", "ArrowRight"):
        opened.page.keyboard.press(key)
    assert opened.evaluate(count) == before
    assert opened.evaluate("modules[document.activeElement.dataset.id].path") == "enc.0"
    opened.page.keyboard.press("Enter")
    assert opened.evaluate("selected.path") == "enc.0"
    for key in ("ArrowLeft", "ArrowLeft"):
        opened.page.keyboard.press(key)
    assert opened.evaluate(count) == before - 2
    opened.page.click("#fold-all")
    assert opened.evaluate(count) == 8  # the model, and what it holds itself
    assert opened.errors == []


def test_boxes_of_the_drawing_unfold_and_select(page, written):
    opened = page(written("gpt2")[1])
    before = opened.evaluate("drawnBoxes.size")
    opened.page.focus("g.box[data-call='s5']")
    opened.page.keyboard.press("Space")
    assert opened.evaluate("drawnBoxes.size") == before + 11
    assert opened.evaluate("document.activeElement.dataset.call") == "5"
    opened.page.keyboard.press("ArrowRight")
    assert opened.evaluate("drawnBoxes.has('7')")  # the attention of the first block
    opened.page.keyboard.press("Enter")
    assert opened.evaluate("selected.path") == "transformer.h.0"
    opened.page.keyboard.press("ArrowLeft")
    assert not opened.evaluate("drawnBoxes.has('7')")
    opened.page.focus("g.box[data-call='150']")  # which brings it into view
    opened.page.click("g.box[data-call='150']")
    assert opened.page.inner_text("#detail-part h2").startswith("lm_head")
    opened.page.click(
        "#detail-part button:has-text('transformer.wte.weight')"
    )  # whose weight it is
    assert opened.evaluate("selected.path") == "transformer.wte"
    assert opened.errors == []


def test_a_module_is_found_in_the_drawing_when_it_is_chosen_in_the_tree(page, written):
    opened = page(written("gpt2")[1])
    opened.page.click("#unfold-all")
    opened.page.click("#tree li[title^='transformer.h.7.attn.c_proj']")
    assert opened.evaluate("document.querySelector('g.box.selected title').textContent").startswith(
        "transformer.h.7.attn.c_proj"
    )
    area = opened.evaluate(PLACE, "#graph")
    box = opened.evaluate(PLACE, "g.box.selected")
    assert area[0] < box[2] and box[0] < area[2]
    assert area[1] < box[3] and box[1] < area[3]


def test_bars_show_what_is_asked_for(page, written):
    opened = page(written("resnet50")[1])
    amount = "document.querySelector('#tree li .amount').textContent"
    assert opened.evaluate(amount) == "8.3 G"
    opened.page.select_option("#metric", "parameters")
    assert opened.evaluate(amount) == "25.6 M"
    opened.page.select_option("#metric", "bytes")
    assert opened.evaluate(amount) == "102.4 MB"


def test_arrays_have_histograms_and_nan_is_an_alarm(page, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias.value = model[1].bias.value.at[0].set(jnp.nan)
    opened = page(nn.explore(model, image(1, 8), path=tmp_path / "nan.html"))
    assert "1 module holds NaN or infinite numbers: 1" in opened.page.inner_text("#alarm")
    opened.page.click("#alarm button")
    assert opened.page.locator("#detail-part .histogram").count() == 2
    assert "1 NaN and 0 infinite of 8" in opened.page.inner_text("#detail-part")
    assert opened.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 900, 1440])
def test_it_fits_phones_and_desktops_in_light_and_dark(page, written, width, dark):
    opened = page(written("resnet50")[1], width=width, height=800, dark=dark)
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    places = [opened.evaluate(PLACE, f"#{part}-part") for part in ("tree", "graph", "detail")]
    shown = sum(right > left for left, _, right, _ in places)
    assert shown == (1 if width == 390 else 3)
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v > 128)"
    assert opened.evaluate(light) != dark
    opened.page.click("#theme")
    assert opened.evaluate(light) == dark
    assert opened.errors == []


def test_on_a_phone_the_parts_take_turns(page, written):
    opened = page(written("shared")[1], width=390, height=800)
    assert opened.page.is_visible("#graph")
    opened.page.click("#tabs button:has-text('Modules')")
    assert opened.page.is_hidden("#graph")
    opened.page.click("#tree li:has-text('head')")
    assert opened.page.is_visible("#detail-part")
    assert opened.page.inner_text("#detail-part h2").startswith("head")
    assert opened.errors == []


def test_every_control_has_a_name_and_can_be_reached_by_the_keyboard(page, written):
    opened = page(written("shared")[1])
    nameless = opened.evaluate(
        """[...document.querySelectorAll('button, input, select, [role=button], [role=treeitem]')]
           .filter(e => !(e.getAttribute('aria-label') ?? e.textContent).trim()).map(e => e.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    for _ in range(60):
        opened.page.keyboard.press("Tab")
        reached.add(
            opened.evaluate(
                "document.activeElement.id || document.activeElement.getAttribute('role') || ''"
            )
        )
    assert {"search", "theme", "metric", "fit", "treeitem", "button"} <= reached


def test_a_notebook_s_tree_folds_without_a_script(page, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)))
    (tmp_path / "a.html").write_text(f"<!doctype html><meta charset=utf-8>{model._repr_html_()}")
    opened = page(tmp_path / "a.html", width=700)
    assert opened.page.is_hidden("text=weight (2, 2)")
    opened.page.click("summary:has-text('in_features=2, out_features=2')")
    assert opened.page.locator("details[open]").count() == 2
    assert opened.errors == []
