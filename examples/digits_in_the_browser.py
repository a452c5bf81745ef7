"""One HTML page that reads a digit as you draw it: ONNX, and its runtime as WebAssembly, without a server.

The network is that of examples/digits_cnn.py. The page holds everything: the trained model, and the runtime,
which npm downloads (33 MB; it comes with Node.js). About half a minute on two cores; the page has 5 MB.

    python examples/digits_in_the_browser.py [--epochs 15] [--page out/digits/index.html]
    python examples/digits_in_the_browser.py --runtime node_modules/onnxruntime-web/dist
"""

from __future__ import annotations

import argparse
import base64
import gzip
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

import digits_cnn
import statefulnn as nn

RUNTIME = "onnxruntime-web@1.30.0"
SCRIPT, GLUE, WASM = FILES = (
    "ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm",
)  # fmt: skip

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Draw a digit</title>
<style>
  :root { color-scheme: light dark }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }
  main { display: flex; flex-wrap: wrap; gap: 2rem }
  canvas { border: 1px solid #888; border-radius: 6px; background: #fff }
  #drawing { width: 256px; height: 256px; touch-action: none; cursor: crosshair; display: block }
  #seen { width: 64px; height: 64px; image-rendering: pixelated }
  #answer { font-size: 4rem; line-height: 1; min-height: 4rem }
  .row { display: grid; grid-template-columns: 1rem 10rem 4.5rem; gap: .5rem; align-items: center;
         font-variant-numeric: tabular-nums }
  .bar { height: .8rem; background: #4a7dd0; border-radius: 2px; width: 0 }
  button { margin-top: .7rem; padding: .3rem 1rem }
</style>
<h1>Draw a digit</h1>
<p id="status">The network is being loaded.</p>
<main>
  <div>
    <canvas id="drawing" width="256" height="256" aria-label="Draw here"></canvas>
    <button id="clear">Clear</button>
  </div>
  <div>
    <div id="answer" aria-live="polite"></div>
    <div id="rows"></div>
    <p>What the network sees:<br><canvas id="seen" width="8" height="8"></canvas></p>
  </div>
</main>
<script>@@SCRIPT@@</script>
<script>
const drawing = document.getElementById("drawing");
const pen = drawing.getContext("2d", {willReadFrequently: true});
const rows = [...Array(10).keys()].map(digit => {
  const row = document.createElement("div");
  row.className = "row";
  row.innerHTML = `<span>${digit}</span><div><div class="bar"></div></div><span></span>`;
  return document.getElementById("rows").appendChild(row);
});

async function unpacked(text) {  // base64 of gzip
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function load() {
  const glue = new Blob([await unpacked("@@GLUE@@")], {type: "text/javascript"});
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = {mjs: URL.createObjectURL(glue)};
  ort.env.wasm.wasmBinary = (await unpacked("@@WASM@@")).buffer;
  return ort.InferenceSession.create(await unpacked("@@MODEL@@"), {executionProviders: ["wasm"]});
}
const session = load();
session.then(
  () => { document.getElementById("status").textContent = "Draw with the mouse or a finger."; },
  error => { document.getElementById("status").textContent = `It could not be loaded: ${error}`; });

/** Return the logits of images of 8 x 8 numbers from 0 to 1, one after another. */
async function predict(pixels) {
  const images = new ort.Tensor("float32", Float32Array.from(pixels), [pixels.length / 64, 1, 8, 8]);
  return [...(await (await session).run({images})).output.data];
}

/** Return the drawing as the data set has its digits: 32 x 32, cut out; then the ink in each 4 x 4 of it. */
function pixels() {
  const {data} = pen.getImageData(0, 0, 256, 256);
  let [left, top, right, bottom] = [256, 256, -1, -1];
  for (let y = 0; y < 256; y++) for (let x = 0; x < 256; x++) if (data[4 * (256 * y + x) + 3] > 127) {
    [left, right] = [Math.min(left, x), Math.max(right, x)];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
  }
  if (right < 0) return null;
  const scale = Math.min(32 / (bottom - top + 1), 30 / (right - left + 1));
  const small = new OffscreenCanvas(32, 32).getContext("2d");
  const [width, height] = [scale * (right - left + 1), scale * (bottom - top + 1)];
  small.drawImage(drawing, left, top, right - left + 1, bottom - top + 1,
                  (32 - width) / 2, (32 - height) / 2, width, height);
  const ink = small.getImageData(0, 0, 32, 32).data, found = Array(64).fill(0);
  for (let y = 0; y < 32; y++) for (let x = 0; x < 32; x++)
    if (ink[4 * (32 * y + x) + 3] > 127) found[8 * (y >> 2) + (x >> 2)] += 1 / 16;
  return found;
}

let shown = Promise.resolve();
const show = () => { shown = shown.then(showNow); };  // one after the other, so that the last one stays

async function showNow() {
  const given = pixels();
  const logits = given && await predict(given);
  const seen = document.getElementById("seen").getContext("2d");
  for (let i = 0; i < 64; i++) {
    seen.fillStyle = `hsl(0 0% ${100 * (1 - (given ? given[i] : 0))}%)`;
    seen.fillRect(i % 8, i >> 3, 1, 1);
  }
  const most = logits && Math.max(...logits);
  const sum = logits && logits.reduce((s, l) => s + Math.exp(l - most), 0);
  rows.forEach((row, digit) => {
    const share = logits ? Math.exp(logits[digit] - most) / sum : 0;
    row.querySelector(".bar").style.width = `${100 * share}%`;
    row.lastElementChild.textContent = logits ? `${(100 * share).toFixed(1)} %` : "";
  });
  document.getElementById("answer").textContent = logits ? logits.indexOf(most) : "";
}

pen.lineWidth = 28;
pen.lineCap = pen.lineJoin = "round";
let last = null;
function draw(event) {
  const {left, top} = drawing.getBoundingClientRect();
  const here = [event.clientX - left, event.clientY - top];
  pen.beginPath();
  pen.moveTo(...(last || here));
  pen.lineTo(...here);
  pen.stroke();
  last = here;
}
drawing.onpointerdown = event => { drawing.setPointerCapture(event.pointerId); draw(event); show(); };
drawing.onpointermove = event => { if (last) { draw(event); show(); } };
drawing.onpointerup = drawing.onpointercancel = () => { last = null; };
document.getElementById("clear").onclick = () => { pen.clearRect(0, 0, 256, 256); show(); };
</script>
</html>
"""


def download(folder: Path) -> Path:
    """Put the runtime's files into a folder, and return it."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm downloads the runtime: install Node.js, or pass --runtime FOLDER")
    command = [npm, "pack", RUNTIME, "--silent", "--pack-destination", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (packed,) = folder.glob("*.tgz")
    with tarfile.open(packed) as archive:
        for name in FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None, name
            (folder / name).write_bytes(member.read())
    return folder


def write_page(path: Path, runtime: Path, page: str = PAGE, **parts: bytes) -> None:
    """Write a page with the runtime and other parts in it, each where its name stands."""
    parts = {"GLUE": (runtime / GLUE).read_bytes(), "WASM": (runtime / WASM).read_bytes(), **parts}
    script = (runtime / SCRIPT).read_text().replace("</script", "<\\/script")
    pieces = {"SCRIPT": script}
    for name, content in parts.items():
        pieces[name] = base64.b64encode(gzip.compress(content, mtime=0)).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"@@(\w+)@@", lambda name: pieces[name[1]], page))


def main(argv: list[str] | None = None) -> nn.Module:
    """Train, write the page, and return the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--page", type=Path, default=Path("out/digits/index.html"))
    parser.add_argument("--runtime", type=Path, help=f"a folder with {', '.join(FILES)}")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / "digits.npz"
        digits_cnn.main(["--epochs", str(args.epochs), "--save", str(weights)])
        model = digits_cnn.DigitsCNN()
        with np.load(weights) as saved:
            model.load_state_dict(dict(saved))
        model.eval()

        images = np.zeros((1, 1, 8, 8), np.float32)
        nn.export(model, images, folder / "digits.onnx", format="onnx")
        runtime = args.runtime or download(folder)
        write_page(args.page, runtime, MODEL=(folder / "digits.onnx").read_bytes())
    print(f"{args.page}: {args.page.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return model


if __name__ == "__main__":
    main()
