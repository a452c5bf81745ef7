"""Exported models where there is no Python: in a page, and in Node, with runtimes that npm downloads."""

from __future__ import annotations

import json
import math
import shutil
import subprocess

import numpy as np
import pytest

import bert
import digits_cnn
import digits_in_the_browser as example
import statefulnn as nn

# npm is asked for 33 MB for the page and 110 for Node: too much for every run.
pytestmark = pytest.mark.long

PATHS = {  # of the mouse, in pixels of the canvas
    "0": [(128 + 60 * math.sin(t / 3), 128 - 95 * math.cos(t / 3)) for t in range(20)],
    "1": [(95, 70), (135, 30), (135, 220)],
    "2": [(70, 80), (90, 45), (130, 35), (170, 55), (170, 95), (130, 150), (65, 215), (190, 215)],
    "7": [(60, 40), (190, 40), (110, 220)],
}
IN_NODE = """
const ort = require("onnxruntime-node"), fs = require("fs");
const [file, given] = process.argv.slice(2), inputs = {};
for (const [name, [type, shape, numbers]] of Object.entries(JSON.parse(fs.readFileSync(given))))
  inputs[name] = new ort.Tensor(type, numbers, shape);
ort.InferenceSession.create(file).then(session => session.run(inputs)).then(
  ({output}) => console.log(JSON.stringify([output.dims, [...output.data]])));
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The model, and the page that the example writes."""
    folder = tmp_path_factory.mktemp("digits")
    return example.main(["--page", str(folder / "digits.html")]), folder / "digits.html"


def test_a_digit_that_is_drawn_is_read_with_the_numbers_of_the_module(digits, page, tmp_path):
    model, path = digits
    opened = page(path, width=900, height=700)
    opened.page.wait_for_function("document.getElementById('status').textContent.includes('mouse')")
    images = digits_cnn.load_data()[1][:64]
    logits = opened.evaluate("pixels => predict(pixels)", images.ravel().tolist())
    wanted = np.asarray(model(images))
    np.testing.assert_allclose(np.reshape(logits, wanted.shape), wanted, rtol=1e-4, atol=1e-4)
    corner = opened.page.locator("#drawing").bounding_box()
    for digit, points in PATHS.items():
        opened.page.click("#clear")
        opened.page.wait_for_function("document.getElementById('answer').textContent === ''")
        for i, (x, y) in enumerate(points):
            opened.page.mouse.move(corner["x"] + x, corner["y"] + y, steps=4)
            if i == 0:
                opened.page.mouse.down()
        opened.page.mouse.up()
        opened.evaluate("() => shown")
        assert opened.page.inner_text("#answer") == digit
        drawn = np.reshape(opened.evaluate("pixels()"), (1, 1, 8, 8)).astype(np.float32)
        assert int(model(drawn).argmax()) == int(digit)
    opened.screenshot(tmp_path / "drawn.png")
    assert opened.errors == []
    assert all(url.startswith(("file:", "blob:")) for url in opened.requests)


@pytest.fixture(scope="module")
def in_node(tmp_path_factory):
    """Run a file of ONNX in Node on arrays, and return its output."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.fail("This test needs Node.js with npm: apt-get install nodejs npm")
    folder = tmp_path_factory.mktemp("node")
    # Its script of installation fetches CUDA's part; what a CPU needs is in the package.
    install = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run([*install, "onnxruntime-node@1.30.0"], cwd=folder, check=True, timeout=1800)
    (folder / "run.js").write_text(IN_NODE)

    def run(path, **inputs):
        given = {n: [x.dtype.name, x.shape, x.ravel().tolist()] for n, x in inputs.items()}
        (folder / "given.json").write_text(json.dumps(given))
        done = subprocess.run(
            [node, "run.js", str(path), "given.json"],
            cwd=folder, check=True, timeout=600, capture_output=True, text=True,
        )  # fmt: skip
        shape, numbers = json.loads(done.stdout)
        return np.reshape(np.float32(numbers), shape)

    return run


def test_node_computes_what_the_digits_network_computes(digits, in_node, tmp_path):
    model, _ = digits
    images = digits_cnn.load_data()[1][:20]
    nn.export(model, images, tmp_path / "digits.onnx", format="onnx")
    got = in_node(tmp_path / "digits.onnx", images=images)
    np.testing.assert_allclose(got, model(images), rtol=1e-4, atol=1e-4)


def test_node_embeds_sentences_as_minilm_does(in_node, tmp_path):
    folder = bert.minilm_folder()
    model, tokenizer = bert.load_bert(folder), bert.load_tokenizer(folder)
    texts = ["A cat sits on the mat.", "In the evening somebody plays the guitar and sings."]
    encodings = tokenizer.encode_batch(texts)
    ids = np.array([e.ids for e in encodings], np.int32)
    mask = np.array([e.attention_mask for e in encodings], np.int32)
    embed = {"embed": {"function": lambda model, ids, mask: bert.embed(model, ids, mask)}}
    sizes = {"ids": "b, t", "mask": "b, t"}
    path = tmp_path / "minilm.onnx"
    nn.export(model, (ids[:, :8], mask[:, :8]), path, format="onnx", methods=embed, shapes=sizes,
              constraints=["t <= 512"])  # fmt: skip
    got = in_node(path, ids=ids, mask=mask)
    np.testing.assert_allclose(got, bert.embed(model, ids, mask), rtol=1e-4, atol=1e-5)
