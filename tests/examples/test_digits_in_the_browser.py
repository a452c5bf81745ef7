"""The page that reads digits holds all it needs; tests/browser/test_without_python.py draws in it."""

from __future__ import annotations

import base64
import gzip
import re
from pathlib import Path

import numpy as np
import onnxruntime

import digits_cnn
import digits_in_the_browser as example


def test_the_page_holds_the_trained_model_and_the_runtime_and_loads_nothing(capsys):
    runtime = Path("runtime")
    runtime.mkdir()
    for name in example.FILES:
        (runtime / name).write_text(f"// {name} </script>")
    model = example.main(["--epochs", "1", "--page", "digits.html", "--runtime", "runtime"])
    assert "digits.html" in capsys.readouterr().out
    page = Path("digits.html").read_text()
    assert "@@" not in page and not re.search(r"(src|href)=|https?://|\bfetch\(", page)
    assert page.count("</script>") == 2
    glue, wasm, onnx = re.findall(r'unpacked\("(.*?)"\)', page)
    for packed, name in ((glue, example.GLUE), (wasm, example.WASM)):
        assert gzip.decompress(base64.b64decode(packed)) == (runtime / name).read_bytes()
    session = onnxruntime.InferenceSession(gzip.decompress(base64.b64decode(onnx)))
    images = digits_cnn.load_data()[1][:50]
    (logits,) = session.run(["output"], {"images": images})
    np.testing.assert_allclose(logits, model(images), rtol=1e-4, atol=1e-4)
