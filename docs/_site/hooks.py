"""What the site shows beside the pages of docs/, made from the repository when the site is built.

mkdocs calls the functions ``on_...`` in turn. Pages keep links that work on GitHub, from file to file of the
repository; here they become links from page to page, or to the file in the repository.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

# A link to a file; what stands in a block of code is none.
LINK = re.compile(r"^( *```).*?^\1|(?<=\]\()\s*(?![a-z]+:|#)([^)#\s]+)(?=[)#])", re.M | re.S)
FENCE = re.compile(r"^( *)```python[^\n]*\n(?=( *>>>)?)", re.M)
BADGE = re.compile(r"\[!\[[^]]*\]\([^)]*\)\]\((https://colab[^)]*)\)")
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

# `nn.Linear` -> its address, reference/modules.html#statefulnn.Linear
reference: dict[str, str] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation, and the repository's address."""
    config.extra["social"] = [
        {"icon": "fontawesome/brands/github", "link": REPOSITORY, "name": "the repository"}
    ]
    for entry in config.nav or ():
        if "Examples" in entry:
            entry["Examples"] += sorted(p for p in SOURCES if p.startswith("examples/"))
        if "Reference" in entry:
            first = ["statefulnn", "modules", "functional"]
            rest = [name for name in families() if name not in first]
            entry["Reference"] += [f"reference/{name}.md" for name in first + rest]
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
    source = SOURCES.get(here, "")

    def moved(match: re.Match[str]) -> str:
        if not match[2]:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if target in PAGES:
            return posixpath.relpath(PAGES[target], posixpath.dirname(here) or ".")
        if target.startswith("docs/") and (ROOT / target).is_file():
            return posixpath.relpath(target, posixpath.join("docs", posixpath.dirname(here)))
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/main/{target}" if (ROOT / target).exists() else match[2]

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
                shown = re.sub(r"^.*\r", "", "".join(output["text"]), flags=re.M)
                text.append(f"```{{.text .output}}\n{shown.rstrip()}\n```")
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
    title, *paragraphs = doc.split("\n\n")
    code = re.compile(r"(    |python examples/)")
    shown = [f"```text\n{textwrap.dedent(p)}\n```" if code.match(p) else p for p in paragraphs]
    return title.replace("\n", " "), "\n\n".join(shown)


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
    cards = ["# Examples\n\nEach is a program to run and to change."]
    cards.append('<div class="grid cards" markdown>')
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
    rows.sort(key=lambda row: row[0].lower())
    terms = [f"## {term}\n\n{meaning[0].upper()}{meaning[1:]}." for term, meaning in rows]
    intro = "The code, the errors and the pages use these words of [Design](design.md#terms)."
    return "\n\n".join(["# Glossary", intro, *terms]) + "\n"


# Reference: every name in the `__all__` of a public package, read from the source without running it.


def families() -> dict[str, griffe.Module]:
    """Return what has an `__all__` by the name of its page; those whose names others repeat come first."""
    found: dict[str, griffe.Module] = {}

    def visit(module: griffe.Module) -> None:
        if "listing" in module.imports:  # what makes `dir` show `__all__`: a package that users see
            path = module.path.removeprefix("statefulnn.").removeprefix("core.")
            found[path] = module
        for member in module.modules.values():
            if not member.is_alias:
                visit(member)

    visit(package())
    first = ("modules", "errors", "statefulnn", "functional")
    return {name: found[name] for name in (*first, *sorted(found.keys() - set(first)))}


def names(module: griffe.Module) -> Iterator[tuple[str, griffe.Object, str]]:
    """Yield the public names of a package, what each stands for, and the path that leads there.

    A submodule may have the name of the function that the package takes from it.
    """
    public = {str(name) for name in module.exports or ()} | set(
        re.findall(r"import (\w+) as \1$", module.source, re.M)
    )
    for name in sorted(public, key=str.lower):
        member = module[name]
        path = f"{module.path}.{name}"
        member = member.final_target if member.is_alias else member
        if member.is_module and name in member.parent.imports:
            path = member.parent.imports[name]
            member = package()[path.removeprefix("statefulnn.")]
        if not member.is_module:
            yield name, member, path


_package: list[griffe.Module] = []


def package() -> griffe.Module:
    if not _package:
        loaded = griffe.load("statefulnn", search_paths=[ROOT], resolve_aliases=True)
        assert isinstance(loaded, griffe.Module)
        _package.append(loaded)
    return _package[0]


def reference_pages() -> Iterator[tuple[str, str]]:
    """Yield a page for each public package; what several of them have is shown on the first."""
    shown: dict[str, str] = {}  # the path where an object is defined -> how users write it
    index = "# Reference\n\nEach public name has an entry, made of its docstring.\n\n"
    index += "| package | what it holds |\n|---|---|\n"
    top = {name: path for name, _, path in names(package())}
    for page, module in families().items():
        prefix = {"statefulnn": "nn", "functional": "F"}.get(page, f"nn.{page}")
        summary = module.docstring.value.partition("\n")[0] if module.docstring else ""
        text = [f"---\ntitle: {prefix}\n---\n\n# {prefix}", summary]
        reference[prefix] = f"reference/{page}.html"
        for name, member, path in names(module):
            spelt = f"{prefix}.{name}"
            if page in ("modules", "errors") and name in top:
                path, spelt = top[name], f"nn.{name}"
            if member.path in shown:
                if shown[member.path] != spelt:
                    text.append(f"## {spelt}\n\nThis is `{shown[member.path]}`.")
                continue
            shown[member.path] = spelt
            reference[spelt] = f"reference/{page}.html#{path}"
            options = f"options: {{heading: {spelt}, toc_label: {name}}}"
            text.append(f"::: {path}\n    {options}")
        index += f"| [`{prefix}`]({page}.md) | {summary} |\n"
        yield f"reference/{page}.md", "\n\n".join(text) + "\n"
    yield "reference/index.md", index
