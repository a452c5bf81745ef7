"""The wording of every error class: what was done, why it cannot work, the code that does work."""

from __future__ import annotations

import inspect
import pickle
import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import statefulnn as nn


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(jnp.ones(2))
        self.register_buffer("running_mean", jnp.zeros(2))
        self.window = 3

    def forward(self, x):
        self.running_mean = self.running_mean + x
        return x * self.scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm()

    def forward(self, x):
        return self.norm(x)


X = jnp.ones(2)


class Forgot(nn.Module):
    def __init__(self):
        self.weight = nn.Parameter(jnp.ones(1))


def set_window(m, x):
    m.norm.window = 4
    return m(x)


def keep_tracer(x):
    m = Net()
    jax.jit(lambda x: setattr(m.norm, "seen", x) or x)(x)


def closure_write(x):
    m = Net()
    jax.jit(lambda x: m(x))(x)


def outside_concrete(x):
    m = Norm()

    @jax.jit
    def f(x):
        m.scale.value = 2 * jnp.ones(2)
        return x

    f(x)


def missing_rng():
    from statefulnn.core.generator import next_key

    class Noise(nn.Module):
        def forward(self, x):
            return x + jax.random.normal(next_key(), x.shape)

    nn.functional_call(Noise(), {}, (X,))


def rng_under_vmap():
    from statefulnn.core.generator import next_key

    jax.vmap(lambda x: x + jax.random.normal(next_key()))(X)


def assign(m, name, value):
    setattr(m, name, value)


def load(m, **change):
    m.load_state_dict({**m.state_dict(), **change})


# (class, what to do, words of "what was done", words of "what does work")
CASES = {
    "raw jit, buffer": (
        nn.StateWriteError,
        lambda: jax.jit(lambda m: m(X))(Net()),
        ["norm.running_mean"],
        ["nn.jit", "functionalize", "mutable=True", "eval()", "nn.mutable"],
    ),
    "raw jit, eval": (
        nn.StateWriteError,
        lambda: jax.jit(lambda m: m.eval()(X))(Net()),
        ["training"],
        ["nn.jit"],
    ),
    "pure call, buffer": (
        nn.StateWriteError,
        lambda: nn.functional_call(Net(), {}, (X,)),
        ["norm.running_mean"],
        ["mutable=True"],
    ),
    "functionalize, buffer": (
        nn.StateWriteError,
        lambda: (lambda f, p: f(p, X))(*nn.functionalize(Net())),
        ["norm.running_mean"],
        ["mutable=True"],
    ),
    "closure write": (
        nn.TraceLeakError,
        lambda: closure_write(X),
        ["running_mean"],
        ["nn.jit", "argument"],
    ),
    "tracer in attribute": (
        nn.TraceLeakError,
        lambda: keep_tracer(X),
        ["seen"],
        ["argument|buffer|capture|return"],
    ),
    "concrete write while staging": (
        nn.TraceLeakError,
        lambda: outside_concrete(X),
        ["scale"],
        ["argument|nn.jit|outside"],
    ),
    "static under nn.jit": (
        nn.StructureChangeError,
        lambda: nn.jit(set_window)(Net(), X),
        ["norm.window", "3", "4"],
        ["register_buffer|nn.capture|outside|before"],
    ),
    "array over parameter": (
        nn.RegistrationError,
        lambda: assign(Norm(), "scale", jnp.ones(2)),
        ["scale"],
        [r"\.value\s*=", r"nn\.Parameter\("],
    ),
    "list of modules": (
        nn.RegistrationError,
        lambda: assign(Net(), "layers", [Norm()]),
        ["layers"],
        ["nn.ModuleList", "nn.Ref"],
    ),
    "dict of parameters": (
        nn.RegistrationError,
        lambda: assign(Net(), "table", {"a": nn.Parameter(X)}),
        ["table"],
        ["nn.Parameter(List|Dict)", "nn.Ref"],
    ),
    "bare function in Sequential": (
        nn.RegistrationError,
        lambda: nn.Sequential(jnp.tanh),
        ["Sequential"],
        ["nn.Lambda"],
    ),
    "number in ModuleList": (nn.RegistrationError, lambda: nn.ModuleList([3]), ["int"], ["Module"]),
    "closure of a function": (
        nn.RegistrationError,
        lambda: (lambda layer, m: (assign(m, "f", lambda x: layer(x)), nn.split(m)))(Norm(), Net()),
        ["f"],
        ["attribute|nn.Ref|Module"],
    ),
    "forgotten super": (
        nn.UninitializedModuleError,
        Forgot,
        ["weight", "Forgot"],
        [r"super\(\)\.__init__\(\)"],
    ),
    "name of another library": (
        nn.UnknownAttributeError,
        lambda: nn.no_grad,
        ["no_grad", "nn.grad"],
        [r"model\.eval\(\)"],
    ),
    "array in a constructor": (
        nn.ArgumentError,
        lambda: nn.ReLU(X),
        ["nn.ReLU", "inplace"],
        [r"nn\.ReLU\(\)\(input\)"],
    ),
    "lazy": (
        nn.UninitializedParameterError,
        lambda: nn.jit(nn.LazyLinear(3))(jnp.ones((1, 2))),
        ["weight"],
        [r"nn\.materialize"],
    ),
    "meta": (
        nn.UninitializedParameterError,
        lambda: nn.Linear(2, 3, device="meta")(jnp.ones((1, 2))),
        ["weight", "meta"],
        [r"nn\.materialize"],
    ),
    "no key": (nn.MissingRngError, missing_rng, ["random|drew"], ["rng="]),
    "draw under raw vmap": (
        nn.MissingRngError,
        rng_under_vmap,
        ["random|drew"],
        ["nn.vmap|rng|rng_scope"],
    ),
    "unknown name": (
        nn.UnknownNameError,
        lambda: nn.functional_call(Net(), {"norm.scael": X}, (X,)),
        ["norm.scael"],
        ["norm.scale|named_parameters"],
    ),
    "unknown name in capture": (
        nn.UnknownNameError,
        lambda: nn.capture(Net(), names=["nrm"])(X),
        ["nrm"],
        ["norm|named_modules"],
    ),
    "module over a method": (
        nn.TakenNameError,
        lambda: setattr(Net(), "parameters", nn.Linear(1, 1)),
        ["'parameters'"],
        ["another name"],
    ),
    "wrong shape": (
        nn.ShapeError,
        lambda: nn.functional_call(Net(), {"norm.scale": jnp.ones(3)}, (X,)),
        ["norm.scale", r"\(3,\)", r"\(2,\)"],
        [""],
    ),
    "wrong dtype": (
        nn.DtypeError,
        lambda: nn.functional_call(Net(), {"norm.scale": jnp.ones(2, jnp.int32)}, (X,)),
        ["norm.scale", "int32", "float32"],
        ["astype|cast|float32"],
    ),
    "unexpected key": (nn.StateDictError, lambda: load(Net(), nope=X), ["nope"], ["strict=False"]),
    "wrong shape in a checkpoint": (
        nn.StateDictError,
        lambda: load(Net(), **{"norm.scale": jnp.ones(3)}),
        ["norm.scale", r"\(3,\)|\[3\]", r"\(2,\)|\[2\]"],
        [""],
    ),
    "loss that ignores its module": (
        nn.UnusedModuleError,
        lambda: (lambda outer: nn.grad(lambda m: outer.scale.value.sum())(Norm()))(Norm()),
        ["Norm"],
        [r"model\("],
    ),
    "linear solver with too few steps": (
        nn.ConvergenceError,
        lambda: nn.meta.cg(steps=1)(lambda v: jnp.array([1.0, 100.0]) * v, jnp.ones(2)),
        [r"nn.meta.cg\(steps=1", "did not converge", "residual"],
        [r"nn.meta.cg\(steps=10\)", "tol=None"],
    ),
    "inner optimizer without a derivative": (
        nn.NotDifferentiableError,
        lambda: nn.meta.adapt(
            None, {"w": X}, lambda p: p["w"].sum(), (), optimizer=optax.sign_sgd(0.1)
        ),
        ["optimizer", "not differentiable", "zero everywhere"],
        ["first_order=True"],
    ),
    "batches of a loss that weighs its classes": (
        nn.ReductionError,
        lambda: nn.curvature.hessian(
            nn.Linear(3, 2),
            lambda out, y: nn.functional.cross_entropy(out, y, weight=jnp.array([1.0, 9.0])),
            (jnp.eye(3), jnp.array([0, 1, 1])),
            batch_size=1,
        ),
        ["hessian", "the mean of the losses of its examples"],
        ['reduction="sum"', "batch_size=None"],
    ),
    "pickle of a function of a local class": (
        nn.PicklingError,
        lambda: pickle.dumps(nn.functionalize(type("Local", (Norm,), {})())[0]),
        ["Local", "name"],
        ["move class Local to the top of a module", "cloudpickle"],
    ),
    "file of something that is no array": (
        nn.CheckpointError,
        lambda: nn.save({"a": X, "model": Norm}, "never.safetensors"),
        ["'model'", "type"],
        ["arrays, numbers, texts"],
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def raised(case):
    cls, action, *_ = case
    with pytest.raises(cls) as info:
        action()
    return str(info.value)


def test_the_message_has_three_parts_in_order(case):
    message = raised(case)
    assert "\\n" not in message, "shown as a repr"
    what, why, instead = re.split(r"\n\s+Why: |\n\s+Instead: ", message, maxsplit=2)
    assert all(part.strip() for part in (what, why, instead))


def test_the_first_parts_say_what_was_done_and_what_does_not_fit(case):
    what = raised(case).split("Instead:")[0]
    for word in case[2]:
        assert re.search(word, what), (word, what)


def test_the_last_part_says_what_to_write(case):
    instead = raised(case).split("Instead:")[1]
    for word in case[3]:
        assert re.search(word, instead), (word, instead)


def test_no_message_shows_a_memory_address(case):
    assert not re.search(r"0x[0-9a-f]{6,}", raised(case))


BUILTIN = {
    nn.ArgumentError: [TypeError],
    nn.UnknownAttributeError: [AttributeError],
    nn.StateWriteError: [RuntimeError],
    nn.TraceLeakError: [RuntimeError],
    nn.StructureChangeError: [RuntimeError],
    nn.RegistrationError: [TypeError],
    nn.UninitializedModuleError: [AttributeError],
    nn.UninitializedParameterError: [RuntimeError, ValueError],
    nn.MissingRngError: [RuntimeError],
    nn.UnknownNameError: [KeyError],
    nn.TakenNameError: [KeyError],
    nn.ShapeError: [RuntimeError, ValueError],
    nn.DtypeError: [RuntimeError, TypeError],
    nn.StateDictError: [RuntimeError],
    nn.UnusedModuleError: [RuntimeError],
    nn.ConvergenceError: [RuntimeError],
    nn.NotDifferentiableError: [ValueError],
    nn.CheckpointError: [RuntimeError],
    nn.PicklingError: [pickle.PicklingError],
    nn.ReductionError: [ValueError],
}


@pytest.mark.parametrize("cls", BUILTIN, ids=lambda c: c.__name__)
def test_each_class_derives_from_the_builtin_that_fits_and_from_ours(cls):
    assert issubclass(cls, nn.StatefulnnError)
    for builtin in BUILTIN[cls]:
        assert issubclass(cls, builtin)
    assert getattr(nn.errors, cls.__name__) is cls


def test_every_error_class_has_a_case_here():
    defined = {
        c
        for _, c in inspect.getmembers(nn.errors, inspect.isclass)
        if issubclass(c, nn.StatefulnnError) and c is not nn.StatefulnnError
    }
    assert defined == set(BUILTIN)
    assert defined == {c for c, *_ in CASES.values()}


def test_the_stale_capture_warning_has_three_parts():
    m = Norm()
    jax.jit(lambda x: x * m.scale)(X)
    with pytest.warns(nn.StaleCaptureWarning) as record:
        m.scale.value = 2 * X
    what, why, instead = re.split(r"\n\s+Why: |\n\s+Instead: ", str(record[0].message), maxsplit=2)
    assert "scale" in what
    assert "constant" in why
    assert "argument" in instead


def test_the_retrace_warning_names_attribute_count_and_remedy():
    m = Norm()
    f = nn.jit(lambda m, x: x * m.scale * m.window)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for i in range(12):
            m.window = i
            f(m, X)
    (message,) = [str(w.message) for w in record if w.category is nn.RetraceWarning]
    assert "window" in message
    assert re.search(r"\d+", message)
    assert "buffer" in message


def test_the_dotted_name_of_the_failing_module_is_told_for_errors_of_users():
    """An error of ours raised in a deep submodule names the path of that module."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Net(), Net()])

        def forward(self, x):
            return self.blocks[1](x)

    with pytest.raises(nn.StateWriteError, match=r"blocks\.1\.norm\.running_mean"):
        jax.jit(lambda m: m(X))(Deep())
