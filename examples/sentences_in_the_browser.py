"""One HTML page that finds the nearest sentence as you type: ONNX, and its runtime, without a server.

The network is that of examples/bert.py with the weights of all-MiniLM-L6-v2. The page holds everything: the
model, its vocabulary and a tokenizer, and the runtime, which npm downloads (33 MB; it comes with Node.js).
With weights of 32 bits the page has 116 MB; in 8 bits it has 34, and cosines differ by up to 0.01.

    python examples/sentences_in_the_browser.py [--weights int8] [--page out/sentences/index.html]
    python examples/sentences_in_the_browser.py --runtime node_modules/onnxruntime-web/dist
"""

from __future__ import annotations

import argparse
import json
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import bert
import digits_in_the_browser as digits
import statefulnn as nn

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The nearest sentence</title>
<style>
  :root { color-scheme: light dark }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
  input, textarea { font: inherit; width: 100%; box-sizing: border-box; padding: .4rem .6rem;
                    border: 1px solid #888; border-radius: 6px; background: Field; color: FieldText }
  textarea { min-height: 14rem; resize: vertical }
  label { display: block; margin: 1rem 0 .2rem; font-weight: 600 }
  ol { list-style: none; padding: 0; margin: 1rem 0 }
  li { display: grid; grid-template-columns: 3.2rem 8rem 1fr; gap: .6rem; align-items: center;
       padding: .15rem 0; font-variant-numeric: tabular-nums }
  .bar { height: .8rem; background: #4a7dd0; border-radius: 2px; min-width: 1px }
  li:first-child span:last-child { font-weight: 600 }
</style>
<h1>The nearest sentence</h1>
<p id="status" aria-live="polite">The network is being loaded.</p>
<label for="query">Type a sentence</label>
<input id="query" value="my phone does not start" autocomplete="off" spellcheck="false">
<ol id="found"></ol>
<label for="sentences">Among these, one a line</label>
<textarea id="sentences" spellcheck="false">@@SENTENCES@@</textarea>
<script type="text/plain" id="glue">@@GLUE@@</script>
<script type="text/plain" id="wasm">@@WASM@@</script>
<script type="text/plain" id="model">@@MODEL@@</script>
<script type="text/plain" id="vocabulary">@@VOCABULARY@@</script>
<script>@@SCRIPT@@</script>
<script>
const settings = @@SETTINGS@@;

async function unpacked(id) {  // base64 of gzip
  const holder = document.getElementById(id), text = atob(holder.textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  holder.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// ---------------------------------------------------------------------------------------------------
// The tokenizer: which characters it takes out, and which stand alone, is told by `settings`

const removed = new RegExp(`[${settings.removed}]`, "gu");
const alone = new RegExp(`[${settings.alone}]`, "gu");
const piece = new RegExp(`[${settings.punctuation}]|[^\\s${settings.punctuation}]+`, "gu");
const special = new RegExp(
  Object.keys(settings.special).map(token => token.replace(/[[\]]/g, "\\$&")).join("|"), "g");
const vocabulary = unpacked("vocabulary").then(bytes => {
  const lines = new TextDecoder().decode(bytes).split("\n");
  return new Map(lines.map((token, number) => [token, number]));
});

/** Return the words of a text, in lower case and without accents, and each sign by itself. */
function words(text) {
  const plain = text.replace(removed, "").replace(/\s/g, " ").replace(alone, " $& ");
  const bare = plain.normalize("NFD").replace(removed, "");
  return Array.from(bare, c => c.toLowerCase()).join("").match(piece) || [];
}

/** Return a word in the longest pieces that the vocabulary has, from the left. */
function pieces(word, known) {
  const letters = Array.from(word), found = [];
  if (letters.length > 100) return [known.get("[UNK]")];
  for (let start = 0, end; start < letters.length; start = end) {
    for (end = letters.length; end > start; end--) {
      const number = known.get((start ? "##" : "") + letters.slice(start, end).join(""));
      if (number !== undefined) { found.push(number); break; }
    }
    if (end === start) return [known.get("[UNK]")];
  }
  return found;
}

/** Return the numbers of a text's tokens. */
async function tokens(text) {
  const known = await vocabulary, found = [];
  const read = part => { for (const word of words(part)) found.push(...pieces(word, known)); };
  let last = 0;
  for (const match of text.matchAll(special)) {  // "[SEP]" in a text is that token
    read(text.slice(last, match.index));
    found.push(settings.special[match[0]]);
    last = match.index + match[0].length;
  }
  read(text.slice(last));
  return [known.get("[CLS]"), ...found.slice(0, settings.length - 2), known.get("[SEP]")];
}

// ---------------------------------------------------------------------------------------------------
// The network

async function load() {
  const glue = new Blob([await unpacked("glue")], {type: "text/javascript"});
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = {mjs: URL.createObjectURL(glue)};
  ort.env.wasm.wasmBinary = (await unpacked("wasm")).buffer;
  return ort.InferenceSession.create(await unpacked("model"), {executionProviders: ["wasm"]});
}
const session = load();

/** Return a vector of length 1 for each text. */
async function embed(texts) {
  const rows = await Promise.all(texts.map(tokens));
  const length = Math.max(...rows.map(row => row.length)), shape = [rows.length, length];
  const ids = new Int32Array(rows.length * length), mask = new Int32Array(rows.length * length);
  rows.forEach((row, i) => {
    ids.set(row, i * length);
    mask.fill(1, i * length, i * length + row.length);
  });
  const given = {ids: new ort.Tensor("int32", ids, shape), mask: new ort.Tensor("int32", mask, shape)};
  const {output} = await (await session).run(given), size = output.dims[1];
  return rows.map((_, i) => output.data.slice(i * size, (i + 1) * size));
}

// ---------------------------------------------------------------------------------------------------
// The page

const byId = id => document.getElementById(id);
let vectors = new Map();  // of what is on the page

async function vectorOf(text) {
  if (!vectors.has(text)) vectors.set(text, (await embed([text]))[0]);
  return vectors.get(text);
}

async function showNow() {
  const query = byId("query").value.trim();
  const sentences = [...new Set(byId("sentences").value.split("\n").map(s => s.trim()).filter(s => s))];
  const used = [query, ...sentences], rows = [];
  vectors = new Map([...vectors].filter(([text]) => used.includes(text)));
  for (const sentence of query ? sentences : []) {
    const [one, other] = [await vectorOf(query), await vectorOf(sentence)];
    rows.push({sentence, cosine: one.reduce((sum, x, i) => sum + x * other[i], 0)});
  }
  rows.sort((one, other) => other.cosine - one.cosine);
  byId("found").replaceChildren(...rows.map(({sentence, cosine}) => {
    const row = document.createElement("li");
    row.innerHTML = `<span>${cosine.toFixed(3)}</span><span><div class="bar"></div></span><span></span>`;
    row.querySelector(".bar").style.width = `${100 * Math.max(cosine, 0)}%`;
    row.lastElementChild.textContent = sentence;
    return row;
  }));
}

let shown = Promise.resolve(), waiting = false;
function show() {  // one after the other; what is typed in between is shown at once
  if (waiting) return;
  waiting = true;
  shown = shown.then(() => { waiting = false; return showNow(); });
}
byId("query").oninput = byId("sentences").oninput = show;
session.then(
  () => { byId("status").textContent = "Everything is computed in this page."; show(); },
  error => { byId("status").textContent = `It could not be loaded: ${error}`; });
</script>
</html>
"""


def characters(tokenizer: Any) -> dict[str, str]:
    """Return which characters a tokenizer of BERT treats in which way, as insides of classes of JavaScript.

    Its tables are of a Unicode of its own; a browser has another one.
    """
    clean, cut = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    # Planes 4 to 13 are empty, and what the last two hold is for private use.
    known = [chr(n) for n in (*range(0x33480), *range(0xE0000, 0xE0200)) if n >> 11 != 0xD800 >> 11]
    between = {}
    for start in range(0, len(known), 4096):  # a few long texts, since each call takes its time
        some, mark = known[start : start + 4096], "zq9"
        between |= zip(some, clean(mark.join(f"a{c}b" for c in some)).split(mark), strict=True)
    kinds: dict[str, Callable[[str], bool]] = {
        "removed": lambda c: between[c] == "ab",
        "alone": lambda c: not c.isspace() and between[c][1] == between[c][-2] == " ",
        "punctuation": lambda c: unicodedata.category(c)[0] in "MPS" and len(cut(f"a{c}b")) == 3,
    }
    private = [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]
    found = {name: [ord(c) for c in known if has(c)] for name, has in kinds.items()}
    found["removed"] += private if clean("a\U000f0000b") == "ab" else []
    return {name: ranges(numbers) for name, numbers in found.items()}


def ranges(numbers: list[int]) -> str:
    r"""Return code points, in order, as ``\u{61}-\u{7a}\u{5f}``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "".join(f"\\u{{{a:x}}}" + (f"-\\u{{{b:x}}}" if b > a else "") for a, b in runs)


def settings_of(tokenizer: Any) -> dict[str, Any]:
    """Return what the page's tokenizer has to know of this one."""
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items()}
    return {
        **characters(tokenizer),
        "special": special,
        "length": tokenizer.truncation["max_length"],
    }


def write_page(path: Path, model: bytes, tokenizer: Any, runtime: Path) -> None:
    """Write the page: a model that takes ``ids`` and ``mask``, its tokenizer and the runtime, in one file."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert [number for _, number in tokens] == list(range(len(tokens)))
    page = PAGE.replace("@@SETTINGS@@", json.dumps(settings_of(tokenizer)))
    page = page.replace("@@SENTENCES@@", bert.CORPUS.rstrip())
    vocabulary = "\n".join(token for token, _ in tokens).encode()
    digits.write_page(path, runtime, page, MODEL=model, VOCABULARY=vocabulary)


def exported(model: nn.Module, folder: Path) -> bytes:
    """Return a file of ONNX that gives a vector of length 1 for each text."""
    ids, mask = np.array([[101, 2000, 102, 0]], np.int32), np.array([[1, 1, 1, 0]], np.int32)
    embed = {"embed": {"function": lambda model, ids, mask: bert.embed(model, ids, mask)}}
    longest = model.embeddings.position_embeddings.num_embeddings
    nn.export(
        model, (ids, mask), folder / "minilm.onnx", format="onnx", methods=embed,
        shapes={"ids": "b, t", "mask": "b, t"}, constraints=[f"t <= {longest}"],
    )  # fmt: skip
    return (folder / "minilm.onnx").read_bytes()


def main(argv: list[str] | None = None) -> nn.Module:
    """Write the page, and return the model in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", choices=("float32", "int8"), default="float32")
    parser.add_argument("--model", type=Path, help="the folder of another BERT for sentences")
    parser.add_argument("--page", type=Path, default=Path("out/sentences/index.html"))
    parser.add_argument("--runtime", type=Path, help=f"a folder with {', '.join(digits.FILES)}")
    args = parser.parse_args(argv)

    folder = args.model or bert.minilm_folder()
    model = bert.load_bert(folder)
    if args.weights == "int8":
        nn.quantize(model, lambda name: name != "pooler.dense", "int8")
    with tempfile.TemporaryDirectory() as temporary:
        onnx = exported(model, Path(temporary))
        runtime = args.runtime or digits.download(Path(temporary))
        write_page(args.page, onnx, bert.load_tokenizer(folder), runtime)
    print(f"{args.page}: {args.page.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return model


if __name__ == "__main__":
    main()
