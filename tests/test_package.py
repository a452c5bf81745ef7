"""The package as a whole: what it imports, what it ships, that it states what it needs."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import statefulnn as nn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "statefulnn"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PUBLIC = [s for s in SOURCES if "\n__dir__ = listing(" in s.read_text()]  # what users import from

# What each part may import of the package; a part may always import from itself.
ALLOWED = {
    "core": set(),
    "transforms": {"core"},
    "attention": {"core", "functional"},
    "functional": {"core"},
    "init": {"core"},
    "modules": {"core", "functional", "init"},
    "utils": {"core", "functional", "init", "modules", "transforms"},
    "optim": {"core", "transforms", "utils"},
    "parameter": {"core"},
    "io": {"core", "transforms"},
    "bridge": {"core", "functional", "init", "modules", "transforms", "utils"},
    "ensemble": {"core", "transforms"},
    "layer_stack": {"core", "modules", "transforms"},
    "func": {"core", "modules", "transforms"},
    "meta": {"core", "transforms"},
    "curvature": {"core", "functional", "modules", "transforms"},
    "inspect": {"core"},
    "amp": {"core", "functional", "optim", "transforms"},
    "parallel": {"core", "layer_stack", "modules"},
    "averaging": {"core", "functional", "modules", "transforms"},
    "quantization": {"core", "functional", "modules", "utils"},
    "lora": {"core", "functional", "init", "io", "modules", "transforms", "utils"},
}
# Libraries whose models come in and go out, and the file or folder of bridge/ that knows each.
LIBRARIES = set(nn.bridge.__all__)
# Imports upwards that are there for a reason, inside a function.
EXCEPTIONS = {
    ("statefulnn/core/module.py", "statefulnn.transforms.jit.jit"),  # Module.compile
    ("statefulnn/core/module.py", "statefulnn.inspect.html.html_of_module"),  # _repr_html_
    ("statefulnn/core/parameter.py", "statefulnn.inspect.html.html_of_array"),
}


def imports_of(source: Path) -> list[tuple[int, str]]:
    """Return (line, absolute module name) of every import in a file, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def relative(source: Path) -> str:
    return str(source.relative_to(ROOT))


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_imports_point_downwards(source):
    part = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import"
    for line, name in imports_of(source):
        if name.startswith("statefulnn.") and (relative(source), name) not in EXCEPTIONS:
            target = name.split(".")[1]
            assert target in ALLOWED[part] | {part}, f"{relative(source)}:{line} imports {name}"


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_no_private_jax_and_no_torch_is_imported(source):
    for line, name in imports_of(source):
        where = f"{relative(source)}:{line} imports {name}"
        library = name.split(".")[0]
        assert library not in LIBRARIES or relative(source).startswith(
            f"statefulnn/bridge/{library}"
        ), where
        assert not name.startswith(("jax._src", "jax.interpreters", "jaxlib")), where


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_no_private_jax_attribute_is_read(source):
    # `jax.foo._bar` is an attribute chain that starts at the name jax.
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            private_of_jax = isinstance(base, ast.Name) and base.id in ("jax", "jnp", "lax")
            assert not private_of_jax, f"{relative(source)}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_only_the_compat_file_asks_jax_about_traces(source):
    if source == PACKAGE / "core" / "compat.py":
        return
    text = source.read_text()
    for name in ("find_top_trace", "get_opaque_trace_state", "parent_trace"):
        assert name not in text, f"{relative(source)} uses {name}"


def public_module(source: Path) -> ModuleType:
    name = ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return importlib.import_module(name)


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_optional_dependency_and_starts_no_device():
    loaded = run_python(
        "import sys, jax\n"
        "before = set(sys.modules)\n"
        "import statefulnn\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))\n"
        "from jax.extend import backend\n"
        "import jax._src.xla_bridge as bridge\n"
        "print('devices started:', bridge.backends_are_initialized())\n"
    )
    names, devices = loaded.splitlines()
    optional = {"torch", "optax", "flax", "equinox", "sklearn", "matplotlib", "tqdm", "scipy"}
    assert "statefulnn" in names.split()
    assert not optional & set(names.split())
    assert devices == "devices started: False"


def test_optimizer_without_optax_says_what_to_install():
    message = run_python(
        "import sys\n"
        "sys.modules['optax'] = None  # as if it were not installed\n"
        "import statefulnn as nn\n"
        "try:\n"
        "    nn.Optimizer(nn.Linear(1, 1), object())\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "pip install optax" in message


def test_every_package_says_what_is_public():
    inside = {PACKAGE / "core", PACKAGE / "transforms", PACKAGE / "bridge" / "torch" / "operators"}
    packages = {s for s in SOURCES if s.name == "__init__.py" and s.parent not in inside}
    assert packages <= set(PUBLIC)


@pytest.mark.parametrize("source", PUBLIC, ids=relative)
def test_dir_shows_the_public_names_and_each_is_documented(source):
    package = public_module(source)
    shown = {n for n in dir(package) if not n.startswith("__")}
    assert shown == {*package.__all__, *(("io", "map") if package is nn else ())}
    assert len(package.__all__) == len(set(package.__all__))
    for name in shown:
        value = getattr(package, name)
        home = value.__name__ if inspect.ismodule(value) else value.__module__
        assert home.startswith("statefulnn"), f"{name} belongs to {home}"
        assert value.__doc__, name


@pytest.mark.parametrize("source", PUBLIC, ids=relative)
def test_what_a_public_package_defines_or_imports_for_users_is_public(source):
    package = public_module(source)
    mine = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith("statefulnn")
        and (source.name in ("__init__.py", "parameter.py") or value.__module__ == package.__name__)
    }
    helpers = {
        "listing",
        "import_extra",
        "explain",
        "name_of",
        "called_by",
        "caller",
        "user_stack_level",
    }
    assert mine - set(dir(package)) <= helpers


@pytest.mark.parametrize("source", PUBLIC, ids=relative)
def test_an_import_of_all_names_binds_them_and_hides_nothing_of_python_s(source):
    package, names = public_module(source), {}
    exec(f"from {package.__name__} import *", names)
    assert names.keys() - {"__builtins__"} == set(package.__all__)
    assert not names.keys() & (set(dir(builtins)) - {"__builtins__"})
    assert package is not nn or not names.keys() & sys.stdlib_module_names


def test_what_is_built_on_top_is_imported_when_it_is_first_used():
    code = (
        "import sys, statefulnn as nn\n"
        "names = {'amp', 'averaging', 'func', 'meta', 'curvature', 'ensemble', 'inspect', 'lora'}\n"
        "names |= {'parallel', 'quantization'}\n"
        "loaded = {n for n in names if f'statefulnn.{n}' in sys.modules}\n"
        "assert not loaded, loaded\n"
        "assert callable(nn.meta.adapt) and callable(nn.func.vjp) and callable(nn.Ensemble)\n"
        "assert callable(nn.quantize) and callable(nn.AveragedModel)\n"
        "assert callable(nn.curvature.empirical_ntk) and not hasattr(nn, 'met')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "package",
    ["amp", "averaging", "func", "meta", "curvature", "lora", "optim", "parallel", "quantization"],
)
def test_every_function_on_top_is_documented_with_an_example(package):
    for name in getattr(nn, package).__all__:
        value = getattr(getattr(nn, package), name)
        if value.__module__.startswith(f"statefulnn.{package}") and inspect.isfunction(value):
            assert "Example:" in value.__doc__, name


def test_runtime_dependencies_are_jax_jaxlib_and_numpy():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=!~ ]", d)[0] for d in project["dependencies"]}
    assert names == {"jax", "jaxlib", "numpy"}
    third_party = {
        name.split(".")[0]
        for source in SOURCES
        for _, name in imports_of(source)
        if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert third_party <= {"jax", "jaxlib", "numpy", "optax", "statefulnn", "tqdm", *LIBRARIES}


def test_version_is_the_one_that_is_cited_and_has_an_entry_in_the_changelog():
    assert f"\nversion: {nn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {nn.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_wheel_holds_the_package_its_type_marker_and_the_licence(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("statefulnn-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {n for n in names if n.startswith("statefulnn/")}
    pages = {relative(s) for s in (PACKAGE / "inspect").glob("*.*") if s.suffix != ".py"}
    assert {"statefulnn/inspect/page.html", "statefulnn/inspect/page.js"} <= pages
    assert shipped == {relative(s) for s in SOURCES} | pages | {"statefulnn/py.typed"}
    assert wheel.stat().st_size < 1_200_000
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.parametrize("before", ["enable", "disable"])
def test_an_import_leaves_the_garbage_collector_as_it_was_and_collects_nothing_old(before):
    printed = run_python(
        f"import gc, jax, jax.numpy; gc.{before}()\n"
        "oldest = gc.get_stats()[2]['collections']\n"
        "import statefulnn\n"
        "print(gc.isenabled(), gc.get_stats()[2]['collections'] - oldest)\n"
    )
    assert printed.split() == [str(before == "enable"), "0"]
