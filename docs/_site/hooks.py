"""What the site shows beside the pages of docs/: made here, when it is built, out of what the repository holds.

mkdocs calls the functions ``on_...`` in turn. Pages keep links that work on GitHub, from file to file of the
repository; here they become links from page to page, or to the file in the repository.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import posixpath
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

LINK = re.compile(r"(?<=\]\()\s*(?![a-z]+:|#)([^)#\s]+)(?=[)#])")
FENCE = re.compile(r"^( *)```python[^\n]*\n(?=( *>>>)?)", re.M)
BADGE = re.compile(r"\[!\[[^]]*\]\([^)]*\)\]\(([^)]*)\)")
CODE = re.compile(r"<(a|h[1-6]|pre)\b.*?</\1>|<code>((?:nn|F)(?:\.\w+)+)(?:\(\))?</code>", re.S)

# Page of the site -> file of the repository that it shows.
SOURCES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarking.md": "benchmarks/README.md",
    **{f"tutorials/{p.stem}.md": f"notebooks/{p.name}" for p in ROOT.glob("notebooks/*.ipynb")},
    **{f"examples/{p.stem}.md": f"examples/{p.name}" for p in ROOT.glob("examples/*.py")},
    **{p.relative_to(ROOT / "docs").as_posix(): p.relative_to(ROOT).as_posix()
       for p in ROOT.glob("docs/*.md")},
}  # fmt: skip
PAGES = {source: page for page, source in SOURCES.items()}

reference: dict[str, str] = {}  # `nn.Linear` -> its address, reference/modules.html#statefulnn.Linear


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation, and the repository's address."""
    config.extra["social"] = [
        {"icon": "fontawesome/brands/github", "link": REPOSITORY, "name": "the repository"}
    ]
    for entry in config.nav:
        if "Examples" in entry:
            entry["Examples"] += sorted(p for p in SOURCES if p.startswith("examples/"))
        if "Reference" in entry:
            entry["Reference"] += [f"reference/{name}.md" for name in families()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    made: dict[str, str | bytes] = {"glossary.md": glossary(), "examples/index.md": gallery()}
    made.update(reference_pages())
    for page, source in SOURCES.items():
        if source.endswith(".ipynb"):
            made.update(tutorial(page, source))
        elif source.startswith("examples/"):
            made[page] = example(source)
        elif not source.startswith("docs/"):
            made[page] = (ROOT / source).read_text()
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    source = SOURCES.get(here)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        if target in PAGES:
            return posixpath.relpath(PAGES[target], posixpath.dirname(here) or ".")
        if target.startswith("docs/") and (ROOT / target).is_file():
            return posixpath.relpath(target, posixpath.join("docs", posixpath.dirname(here)))
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/main/{target}" if (ROOT / target).exists() else match[1]

    if source:
        markdown = LINK.sub(moved, markdown)
    markdown = BADGE.sub(r"[Open in Colab](\1){ .md-button }", markdown)  # without the picture
    return FENCE.sub(lambda m: f"{m[1]}```{'pycon' if m[2] else 'python'}\n", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link `nn.grad` to the reference, wherever a page writes it."""

    def linked(match: re.Match[str]) -> str:
        address = reference.get(match[2])
        if not address or page.file.src_uri in ("changelog.md",):
            return match[0]
        up = posixpath.relpath(".", posixpath.dirname(page.file.src_uri) or ".")
        return f'<a class="api" href="{up}/{address}">{match[0]}</a>'

    return CODE.sub(linked, html)


# Tutorials: the notebooks, with the outputs they were stored with.


def tutorial(page: str, source: str) -> Iterator[tuple[str, str | bytes]]:
    """Yield the page and the pictures of a notebook."""
    text = []
    for cell in json.loads((ROOT / source).read_text())["cells"]:
        code = "".join(cell["source"])
        text.append(code if cell["cell_type"] == "markdown" else f"```python\n{code}\n```")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                text.append(f"```{{.text .output}}\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output["data"]:
                picture = f"{page.removesuffix('.md')}-{len(text)}.png"
                alternative = "".join(output["data"]["text/plain"]).strip("<>")
                text.append(f"![{alternative}]({posixpath.basename(picture)})")
                yield picture, base64.b64decode("".join(output["data"]["image/png"]))
    yield page, "\n\n".join(text) + "\n"


# Examples: the first lines of each file, its picture and its code.


def described(source: str) -> tuple[str, str]:
    """Return the first sentence of a file's docstring, and the rest."""
    doc = ast.get_docstring(ast.parse((ROOT / source).read_text())) or ""
    title, _, rest = doc.partition("\n\n")
    commands = re.compile(r"^(?: {4})?(?=python examples/)", re.M)
    return title.replace("\n", " "), commands.sub("    ", rest)


def picture_of(source: str) -> str | None:
    picture = f"images/examples/{Path(source).stem}.png"
    return picture if (ROOT / "docs" / picture).exists() else None


def example(source: str) -> str:
    title, rest = described(source)
    parts = [f"---\ntitle: {Path(source).stem}\n---\n\n# {title.rstrip('.')}", rest]
    if picture := picture_of(source):
        parts.append(f"![what {Path(source).name} draws](../{picture})")
    code = (ROOT / source).read_text()
    parts += [f"[{source}]({REPOSITORY}/blob/main/{source})", f"````python\n{code}````"]
    return "\n\n".join(parts) + "\n"


def gallery() -> str:
    cards = ["# Examples", "Each is a program to run and to change.", '<div class="grid cards" markdown>']
    for page, source in sorted(SOURCES.items()):
        if page.startswith("examples/"):
            name, picture = posixpath.basename(page), picture_of(source)
            shown = f"[![]({'../' + picture})]({name})\n\n    " if picture else ""
            cards.append(f"-   {shown}[{Path(source).stem}]({name})\n\n    {described(source)[0]}")
    return "\n\n".join([*cards, "</div>"]) + "\n"


def glossary() -> str:
    """Return the terms of design.md, each under a heading of its own."""
    table = (ROOT / "docs/design.md").read_text().partition("## Terms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", table, re.M)
    terms = [f"## {term}\n\n{meaning[0].upper()}{meaning[1:]}." for term, meaning in sorted(rows, key=str)]
    intro = "These words have one meaning in the code, the errors and the pages. They come from [Design](design.md#terms)."
    return "\n\n".join(["# Glossary", intro, *terms]) + "\n"


# Reference: every name in the `__all__` of a public package, read from the source without running it.


def families() -> dict[str, griffe.Module]:
    """Return the public packages by the name of their page; those that others repeat come first."""
    found: dict[str, griffe.Module] = {}

    def visit(module: griffe.Module, name: str) -> None:
        found[name] = module
        for export in module.exports or ():
            member = module[str(export)]
            member = member.final_target if member.is_alias else member
            if member.is_module:
                visit(member, f"{name}.{export}".removeprefix("statefulnn."))

    visit(package(), "statefulnn")
    first = ("modules", "errors", "functional", "statefulnn")
    return {name: found[name] for name in (*first, *(n for n in found if n not in first))}


_package: list[griffe.Module] = []


def package() -> griffe.Module:
    if not _package:
        loaded = griffe.load("statefulnn", search_paths=[ROOT], resolve_aliases=True)
        assert isinstance(loaded, griffe.Module)
        _package.append(loaded)
    return _package[0]


def reference_pages() -> Iterator[tuple[str, str]]:
    shown: dict[str, str] = {}  # the path where an object is defined -> how users write it
    index = ["# Reference", "| | |\n|---|---|"]
    top = {str(name) for name in package().exports or ()}
    for name, module in families().items():
        prefix = {"statefulnn": "nn", "functional": "F"}.get(name, f"nn.{name}")
        summary = module.docstring.value.partition("\n")[0] if module.docstring else ""
        text = [f"---\ntitle: {prefix}\n---\n\n# {prefix}", summary]
        for export in sorted(map(str, module.exports or ()), key=str.lower):
            member = module[export]
            target = member.final_target if member.is_alias else member
            known_at_top = name in ("modules", "errors") and export in top
            path, spelt = (
                (f"statefulnn.{export}", f"nn.{export}") if known_at_top else (f"{module.path}.{export}", f"{prefix}.{export}")
            )
            if target.is_module:
                continue
            if target.path in shown:
                text.append(f"## {spelt}\n\nThis is `{shown[target.path]}`.")
                continue
            shown[target.path] = spelt
            reference[spelt] = f"reference/{name}.html#{path}"
            text.append(f"::: {path}\n    options:\n      heading: {spelt}\n      toc_label: {export}")
        index.append(f"| [`{prefix}`]({name}.md) | {summary} |")
        yield f"reference/{name}.md", "\n\n".join(text) + "\n"
    yield "reference/index.md", "\n\n".join(index[:1]) + "\n\n" + "\n".join(index[1:]) + "\n"
