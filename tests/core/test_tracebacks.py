"""Errors show the user's lines. The oracle is the script below: which of its lines run is known."""

import os
import pdb
import subprocess
import sys
import textwrap
import threading
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from statefulnn.core.tracebacks import shorten, shortened

PACKAGE = str(Path(nn.__file__).parent) + os.sep
X = jnp.ones((1, 2))


class Net(nn.Module):
    """Its last layer takes 4 features, and is given 3."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(4, 1)))

    def forward(self, x):
        return self.body(x)


def loss(net, x):
    return net(x).sum()


def step(net, x):
    return nn.value_and_grad(loss)(net, x)


def pure_loss(params):
    return FN(params, X).sum()


def task(params, x):
    return nn.meta.adapt(FN, params, optax.l2_loss, (x, x), lr=0.1, steps=2)


FN, PARAMS = nn.functionalize(Net())
# Each call, and the functions of the user's that its traceback shows, without the test's own.
CALLS = {
    "eager": (lambda: Net()(X), ["forward"]),
    "jit": (lambda: nn.jit(step)(Net(), X), ["step", "loss", "forward"]),
    "jit of a module": (lambda: nn.jit(Net())(X), ["forward"]),
    "lower": (lambda: nn.jit(step).lower(Net(), X), ["step", "loss", "forward"]),
    "grad": (lambda: nn.grad(loss)(Net(), X), ["loss", "forward"]),
    "value_and_grad": (lambda: nn.value_and_grad(loss)(Net(), X), ["loss", "forward"]),
    "vmap": (lambda: nn.vmap(loss, (None, 0))(Net(), X[None]), ["loss", "forward"]),
    "scan": (lambda: nn.scan(loss, Net(), X[None]), ["loss", "forward"]),
    "map": (lambda: nn.map(Net(), X[None]), ["forward"]),
    "cond": (lambda: nn.cond(True, loss, step, Net(), X), ["loss", "forward"]),
    "remat": (lambda: nn.remat(loss)(Net(), X), ["loss", "forward"]),
    "checkify": (lambda: nn.checkify(loss)(Net(), X), ["loss", "forward"]),
    "capture": (lambda: nn.capture(Net())(X), ["forward"]),
    "functional_call": (lambda: nn.functional_call(Net(), {}, X), ["forward"]),
    "jax.jit": (lambda: jax.jit(pure_loss)(PARAMS), ["pure_loss", "forward"]),
    "jax.grad": (lambda: jax.grad(pure_loss)(PARAMS), ["pure_loss", "forward"]),
    "adapt": (lambda: task(PARAMS, X), ["task", "forward"]),
    "over_tasks": (lambda: nn.meta.over_tasks(task)(PARAMS, X[None]), ["task", "forward"]),
    "curvature": (lambda: nn.curvature.hessian(Net(), optax.l2_loss, (X, X)), ["forward"]),
    "ntk": (lambda: nn.curvature.empirical_ntk(Net(), X), ["forward"]),
    "grad_and_value": (lambda: nn.func.grad_and_value(loss)(Net(), X), ["loss", "forward"]),
    "per_sample_grad": (
        lambda: nn.func.per_sample_grad(loss)(Net(), X[None]),
        ["loss", "forward"],
    ),
    "vmap in chunks": (
        lambda: nn.func.vmap(loss, (None, 0), chunk_size=1)(Net(), X[None]),
        ["loss", "forward"],
    ),
    "jacrev": (lambda: nn.func.jacrev(loss)(Net(), X), ["loss", "forward"]),
    "hessian": (lambda: nn.func.hessian(loss)(Net(), X), ["loss", "forward"]),
    "vjp": (lambda: nn.func.vjp(loss, Net(), X), ["loss", "forward"]),
    "hvp": (lambda: nn.func.hvp(loss, (Net(), X), PARAMS), ["loss", "forward"]),
    "ensemble": (lambda: nn.Ensemble(Net, 2).mean(X), ["forward"]),
    "optimizer": (lambda: nn.Optimizer(Net(), 0.1), []),
    "load": (lambda: nn.load(__file__), []),
    "load_state_dict": (lambda: Net().load_state_dict({}), []),
    "step": (lambda: nn.Optimizer(Net(), optax.sgd(0.1)).step({}), []),
}


def raised(call):
    with pytest.raises(Exception) as info:  # noqa: PT011 (each has its own)
        call()
    return info.value


def frames(error):
    return traceback.extract_tb(error.__traceback__)


def of_package(error):
    return [f for f in frames(error) if f.filename.startswith(PACKAGE)]


@pytest.mark.parametrize("name", CALLS)
def test_an_error_shows_the_lines_of_the_user_and_none_of_the_package(name):
    call, wanted = CALLS[name]
    error = raised(call)
    assert isinstance(error, nn.StatefulnnError)
    shown = frames(error)
    assert [f.name for f in shown] == ["raised", "<lambda>", *wanted]
    assert {f.filename for f in shown} == {__file__}
    assert len("".join(traceback.format_exception(error)).splitlines()) <= 30


SCRIPT = textwrap.dedent("""
    import sys, traceback
    import jax.numpy as jnp, statefulnn as nn
    m = nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 1))
    @nn.jit
    def step(m, x):
        return nn.value_and_grad(lambda m: m(x).sum())(m)
    step(m, jnp.ones((1, 2)))
""")


@pytest.mark.parametrize(
    ("variables", "short"),
    [
        ({}, True),
        ({"STATEFULNN_TRACEBACK": "full"}, False),
        ({"JAX_TRACEBACK_FILTERING": "off"}, False),
    ],
    ids=lambda v: next(iter(v), "nothing set") if isinstance(v, dict) else "",
)
def test_a_script_prints_a_short_traceback_unless_an_environment_variable_wants_all(
    tmp_path, variables, short
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(PACKAGE).parent), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = run.stderr.splitlines()
    files = [line.strip() for line in lines if line.strip().startswith("File ")]
    own = [line for line in files if str(script) in line]
    assert [line.rpartition(" in ")[2] for line in own] == ["<module>", "step", "<lambda>"]
    assert run.returncode == 1
    assert (files == own) is short
    assert (len(lines) <= 20) is short


def test_the_variable_is_read_at_each_error(monkeypatch):
    monkeypatch.setenv("STATEFULNN_TRACEBACK", "full")
    assert len(of_package(raised(lambda: Net()(X)))) > 5
    monkeypatch.setenv("STATEFULNN_TRACEBACK", "short")
    assert not of_package(raised(lambda: Net()(X)))


def test_another_value_of_the_variable_is_told_and_hides_nothing(monkeypatch):
    monkeypatch.setenv("STATEFULNN_TRACEBACK", "Long")
    error = raised(lambda: Net()(X))
    assert of_package(error)
    assert [n for n in error.__notes__ if "STATEFULNN_TRACEBACK" in n and "'full'" in n]


# --------------------------------------------------------------------------------------------------
# Mistakes in the package, and notes


def test_of_an_unexplained_error_in_the_package_the_last_frame_is_shown_and_the_way_to_see_all():
    # As if a function of the package failed without meaning to.
    broken, namespace = nn.Linear(2, 2), {}
    code = compile("def fails(x):\n    return 1 // x\n", PACKAGE + "core/anything.py", "exec")
    exec(code, namespace)
    broken.register_forward_pre_hook(lambda module, inputs: namespace["fails"](0))
    error = raised(lambda: broken(X))
    assert [f.name for f in of_package(error)] == ["fails"]
    assert frames(error)[-1].name == "fails"
    assert len([n for n in error.__notes__ if "STATEFULNN_TRACEBACK=full" in n]) == 1


def test_a_raise_of_the_users_is_left_without_advice():
    def failing(net, x):
        raise ValueError("mine")

    error = raised(lambda: nn.jit(nn.grad(failing))(nn.Linear(2, 2), X))
    assert getattr(error, "__notes__", []) == []
    assert frames(error)[-1].name == "failing"


def test_an_explained_error_has_no_note_of_jax():
    error = raised(lambda: nn.jit(step)(Net(), X))
    assert error.__notes__ == ["raised in 'body.1.0' of Net (Linear)"]


# --------------------------------------------------------------------------------------------------
# Other tools


def test_format_exc_and_logging_and_pdb_see_the_same_frames(caplog):
    try:
        nn.jit(step)(Net(), X)
    except nn.ShapeError as error:
        text = traceback.format_exc()
        names = [f.name for f in frames(error)]
        __import__("logging").getLogger("tests").exception("failed")
        stack, _ = pdb.Pdb().get_stack(None, error.__traceback__)
        # In the innermost frame, that of forward, a debugger finds the user's variables.
        innermost = stack[-1][0].f_locals
    assert PACKAGE not in text
    assert text.strip() in caplog.text
    assert [frame.f_code.co_name for frame, _ in stack] == names
    assert innermost["self"].body[1][0].in_features == 4


def test_an_error_that_is_caught_and_raised_again_keeps_the_users_frames():
    def keep():
        try:
            Net()(X)
        except nn.ShapeError as error:
            return error
        return None

    kept = keep()

    def again():
        assert kept is not None
        raise kept

    error = raised(lambda: nn.jit(lambda x: again())(X))
    assert error is kept
    assert [f.name for f in frames(error)] == [
        *("raised", "<lambda>", "<lambda>", "again", "keep", "forward")
    ]


def test_what_an_error_comes_from_is_shortened_too():
    def chained(net, x):
        try:
            net(x)
        except nn.ShapeError as error:
            raise KeyError("mine") from error

    error = raised(lambda: nn.jit(chained)(Net(), X))
    assert isinstance(error.__cause__, nn.ShapeError)
    assert [f.name for f in frames(error.__cause__)] == ["chained", "forward"]


def test_an_explanation_stands_for_what_the_package_met_by_itself():
    net = nn.Linear(2, 2)
    net.weight.value.delete()
    error = raised(lambda: nn.jit(lambda net, x: net(x))(net, X))
    assert "'weight'" in str(error)
    assert "During handling" not in "".join(traceback.format_exception(error))


def test_members_of_a_group_are_shortened():
    def several(net, x):
        found = []
        for _ in range(2):
            try:
                net(x)
            except nn.ShapeError as error:
                found.append(error)
        raise ExceptionGroup("several", found)

    error = raised(lambda: nn.jit(several)(Net(), X))
    assert isinstance(error, ExceptionGroup)
    assert not of_package(error)
    assert [[f.name for f in frames(e)] for e in error.exceptions] == [["several", "forward"]] * 2


def test_an_error_in_a_generator_and_in_a_thread_shows_the_users_lines():
    def outputs(net):
        yield net(X)

    error = raised(lambda: nn.jit(lambda net: list(outputs(net)))(Net()))
    assert [f.name for f in frames(error)][-2:] == ["outputs", "forward"]

    met = []

    def work():
        try:
            Net()(X)
        except nn.ShapeError as error:
            met.append([f.name for f in frames(error)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert met == [["work", "forward"]]


def test_an_interrupt_keeps_all_frames():
    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as info:
        nn.jit(interrupted)(X)
    assert of_package(info.value)


def test_endless_recursion_ends_in_one_error_of_the_users_lines():
    class Endless(nn.Module):
        def forward(self, x):
            return nn.Module.__call__(self, x)

    error = raised(lambda: Endless()(X))
    assert type(error) is RecursionError
    assert error.__context__ is None
    assert len(of_package(error)) <= 1
    assert {f.name for f in frames(error)[2:-2]} == {"forward"}


def test_an_exception_that_takes_no_attributes_and_no_notes_passes():
    class Stubborn(Exception):
        def __setattr__(self, name, value):
            raise AttributeError(name)

    class Failing(nn.Module):
        def forward(self, x):
            raise Stubborn

    error = raised(lambda: Failing()(X))
    assert type(error) is Stubborn
    assert [f.name for f in frames(error)] == ["raised", "<lambda>", "forward"]


def test_a_boundary_returns_what_its_function_returns_and_looks_like_it():
    @shortened
    def double(x: int) -> int:
        """Twice as much."""
        return 2 * x

    assert (double(3), double.__name__, double.__doc__) == (6, "double", "Twice as much.")
    error = ValueError()
    shorten(error)
    assert error.__traceback__ is None


# --------------------------------------------------------------------------------------------------
# What JAX says


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return x if self.layer.weight[0, 0] > 0 else -x


def branch(net, batch, *, scale=1.0):
    return net(batch["x"]).sum() if batch["x"].sum() > 0 else scale


def branch_on_keyword(net, batch, *, scale):
    return net(batch["x"]).sum() if scale > 0 else scale


def branch_in_step(carry, x):
    return carry, (x if carry[1].sum() > 0 else -x)


def to_numpy(net, batch):
    return np.asarray(net.weight + 0)


def index(net, batch):
    return [1, 2, 3][batch["i"]]


def mask(net, batch):
    return batch["x"][batch["x"] > 0]


def branch_in_condition(net):
    return True if net.weight.sum() > 0 else False  # noqa: SIM210


def branch_in_pair(a, b):
    return a if a.sum() > 0 else b


def rule(net, x):
    return net(x) if x.sum() > 0 else x


nn_rule = nn.custom_vjp(rule)
nn_rule.defvjp(lambda net, x: (rule(net, x), None), lambda _, g: (None, g))
BATCH = {"i": jnp.asarray(1), "x": X}
MESSAGES = {
    "bool": (lambda m: nn.jit(branch)(m, BATCH), branch, "batch['x']"),
    "keyword": (
        lambda m: nn.jit(branch_on_keyword)(m, BATCH, scale=X[0, 0]),
        branch_on_keyword,
        "scale",
    ),
    "donated": (lambda m: nn.jit(branch, donate=1)(m, dict(BATCH)), branch, "batch['x']"),
    "kept": (lambda m: nn.jit(branch, donate=0)(m, BATCH), branch, "batch['x']"),
    "static": (
        lambda m: nn.jit(branch, static_argnames="scale")(m, BATCH, scale=2),
        branch,
        "batch['x']",
    ),
    "numpy": (lambda m: nn.jit(to_numpy)(m, BATCH), to_numpy, "net.weight"),
    "index": (lambda m: nn.jit(index)(m, BATCH), index, "batch['i']"),
    "mask": (lambda m: nn.jit(mask)(m, BATCH), mask, None),
    "module": (lambda m: nn.jit(Branching())(X), Branching.forward, "self.layer.weight"),
    "remat": (lambda m: nn.remat(Branching())(X), Branching.forward, "self.layer.weight"),
    "cond": (lambda m: nn.cond(True, branch, branch, m, BATCH), branch, "batch['x']"),
    "scan": (
        lambda m: nn.scan(branch_in_step, (m, X), X),
        branch_in_step,
        "carry[1]",
    ),
    "map": (
        lambda m: nn.map(Branching(), X[None]),
        Branching.forward,
        "carry[0].layer.weight",
    ),
    "while": (
        lambda m: nn.while_loop(branch_in_condition, lambda m: m, m),
        branch_in_condition,
        None,
    ),
    "associative scan": (
        lambda m: nn.associative_scan(branch_in_pair, X),
        branch_in_pair,
        "a",
    ),
    "custom_vjp": (lambda m: nn.jit(nn_rule)(m, X), rule, None),  # JAX knows no arguments
    "pure": (
        lambda m: jax.jit(nn.functionalize(Branching())[0])(nn.functionalize(Branching())[1], X),
        Branching.forward,
        "params['layer.weight']",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_jax_names_the_function_its_line_and_the_argument_of_the_user(name):
    call, function, argument = MESSAGES[name]
    error = raised(lambda: call(nn.Linear(2, 2)))
    code = function.__code__
    text = str(error)
    assert isinstance(error, (jax.errors.JAXTypeError, jax.errors.JAXIndexError))
    if argument is not None:
        assert f"{function.__name__} at {code.co_filename}:{code.co_firstlineno} for" in text
        assert f"the argument {argument}." in text
    assert PACKAGE not in text
    assert not {"leaves[", "dynamic[", "gone[", "kept["} & set(text.split())
    assert len("".join(traceback.format_exception(error)).splitlines()) <= 30


def test_a_value_of_the_function_around_has_the_name_that_it_has_there():
    def inner(net, y):
        return net(y)

    def around(net, x, y):
        return nn.jit(lambda net, z: inner(net, z) if y.sum() > 0 else z)(net, x)

    error = raised(lambda: nn.jit(around)(nn.Linear(2, 2), X, X))
    line = around.__code__.co_firstlineno
    assert f"around at {__file__}:{line} for jit" in str(error) or "operations on these" in str(
        error
    )
    assert "z" not in str(error).partition("the argument ")[2].partition(".")[0]


def test_a_leaked_value_is_told_with_the_function_and_the_line_that_made_it():
    kept = []

    def leaking(net, x):
        kept.append(x * 2)
        return net(x)

    nn.jit(leaking)(nn.Linear(2, 2), X)
    error = raised(lambda: kept[0] + 1)
    line = leaking.__code__.co_firstlineno
    assert isinstance(error, jax.errors.UnexpectedTracerError)
    assert f"leaking at {__file__}:{line} traced for jit" in str(error)
    assert f"created on line {__file__}:{line + 1}" in str(error)
    assert PACKAGE not in str(error)
