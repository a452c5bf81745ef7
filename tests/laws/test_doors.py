"""Every way into a module and out of it passes a door: found by introspection, tried under each trace."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from statefulnn.core.registry import HookDict, Registry

X = jnp.ones((4, 2))
REFUSED = (nn.StateWriteError, nn.StructureChangeError, nn.TraceLeakError)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_forward_hook(lambda *_: None)
    return model


def shape_of(model):
    """What must be as it was: members, hooks, gradients, flags, values."""
    return {
        name: (
            {r: list(m.__dict__[r].items()) for r in ("_parameters", "_buffers", "_modules")},
            dict(m._forward_hooks) if "_forward_hooks" in m.__dict__ else {},
            [(p.grad, p.requires_grad, np.asarray(p).tolist()) for p in m._parameters.values()],
        )
        for name, m in model.named_modules()
    }


# What a registry has beside reading, and how it is called on the children of a Sequential.
REGISTRY = {
    "__setitem__": lambda r: r.__setitem__("2", nn.ReLU()),
    "__delitem__": lambda r: r.__delitem__("1"),
    "__ior__": lambda r: r.__ior__({"2": nn.ReLU()}),
    "pop": lambda r: r.pop("1"),
    "popitem": lambda r: r.popitem(),
    "clear": lambda r: r.clear(),
    "update": lambda r: r.update({"2": nn.ReLU()}),
    "setdefault": lambda r: r.setdefault("2", nn.ReLU()),
}
HOOKS = {"put_first": lambda h: h.put_first(999, (len, False, False))}


def test_every_operation_that_changes_a_dict_is_in_the_table():
    reading = {"__contains__", "__getitem__", "copy", "fromkeys", "get", "items", "keys", "values"}
    plain = {n for n in vars(dict) if callable(getattr(dict, n)) and n not in vars(object)}
    dunders = {"__iter__", "__len__", "__or__", "__ror__", "__reversed__", "__class_getitem__"}
    assert plain - reading - dunders == set(REGISTRY)
    own = {n for n in {**vars(Registry), **vars(HookDict)} if not n.startswith("_")} - {"stamp"}
    assert own <= set(REGISTRY) | set(HOOKS)
    for name in REGISTRY:  # none of them is the one that dict has
        assert getattr(Registry, name) is not getattr(dict, name), name


BOX = {
    "grad": lambda p: setattr(p, "grad", jnp.ones(2)),
    "requires_grad": lambda p: setattr(p, "requires_grad", not p.requires_grad),
    "requires_grad_": lambda p: p.requires_grad_(not p.requires_grad),
    "value": lambda p: setattr(p, "value", p.value + 1),
    "data": lambda p: setattr(p, "data", p.value + 1),
    "copy_": lambda p: p.copy_(p.value + 1),
    "write": lambda p: p.write(p.value + 1),
    "__setitem__": lambda p: p.__setitem__(0, 3.0),
    "__iadd__": lambda p: p.__iadd__(1.0),
}
WRITES = {
    **{f"registry {n}": lambda m, f=f: f(m._modules) for n, f in REGISTRY.items()},
    "hooks clear": lambda m: m._forward_hooks.clear(),
    "hooks popitem": lambda m: m._forward_hooks.popitem(),
    "hooks put_first": lambda m: HOOKS["put_first"](m._forward_hooks),
    **{f"parameter {n}": lambda m, f=f: f(m[0].bias) for n, f in BOX.items()},
    "buffer persistent": lambda m: setattr(m[1]._buffers["running_mean"], "persistent", False),
    "register_parameter": lambda m: m.register_parameter("p", nn.Parameter(jnp.ones(2))),
    "register_buffer": lambda m: m.register_buffer("b", jnp.ones(2)),
    "add_module": lambda m: m.add_module("c", nn.ReLU()),
    "attribute": lambda m: setattr(m, "flag", 3),
    "deletion": lambda m: delattr(m[0], "bias"),
    "train": lambda m: m.eval(),
    "requires_grad_ of all": lambda m: m.requires_grad_(False),
    "zero_": lambda m: nn.init.zeros_(m[0].weight),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 0 for k, v in m.state_dict().items()}),
    "register_forward_hook": lambda m: m.register_forward_hook(lambda *_: None),
}  # fmt: skip


def by_closure(transform):
    def run(model, write):
        transform(lambda x: (write(model), x.sum())[1])(X)

    return run


TRACES = {
    "jit, closure": by_closure(jax.jit),
    "jit, argument": lambda m, write: jax.jit(lambda m, x: (write(m), x)[1])(m, X),
    "vmap, argument": lambda m, write: jax.vmap(lambda m, x: (write(m), x)[1], (None, 0))(m, X),
    "scan, closure": by_closure(
        lambda f: lambda x: jax.lax.scan(lambda c, r: (f(r), None), 0.0, x)
    ),
    "checkpoint, closure": by_closure(jax.checkpoint),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_nobody_would_keep_is_refused_and_leaves_the_module_as_it_was(write, trace):
    model = network()
    before = shape_of(model)
    with pytest.raises(REFUSED) as info:
        TRACES[trace](model, WRITES[write])
    assert "Why: " in str(info.value) and "Instead: " in str(info.value)
    assert shape_of(model) == before


def test_a_handle_that_removes_its_hook_under_a_trace_raises_and_the_hook_stays():
    model = nn.Linear(2, 2)
    handle = model.register_forward_hook(lambda *_: None)
    for run in (lambda: jax.jit(lambda m, x: (handle.remove(), m(x))[1])(model, X),
                lambda: jax.jit(lambda x: (handle.remove(), model(x))[1])(X)):  # fmt: skip
        with pytest.raises(REFUSED, match="hooks of a module"):
            run()
        assert len(model._forward_hooks) == 1
    handle.remove()
    assert not model._forward_hooks


def test_a_gradient_that_stays_in_its_slot_inside_of_a_transformation_is_an_error():
    model = nn.Linear(2, 2)
    model.weight.grad = jnp.ones((2, 2))
    assert model.weight.grad.shape == (2, 2)

    def noting(m, x):
        for p in m.parameters():
            p.grad = jnp.full(p.shape, 3.0)
        return nn.utils.clip_grad_norm_(m.parameters(), 1.0)

    def step(m, x):
        norm = noting(m, x)
        m.zero_grad()
        return norm

    np.testing.assert_allclose(nn.jit(step)(model, X), 3 * 6**0.5, rtol=1e-6)
    with pytest.raises(nn.StateWriteError, match="nn.value_and_grad"):
        nn.jit(noting)(model, X)
    assert model.weight.grad.shape == (2, 2)  # of the clones, nothing came here


def test_persistent_is_set_outside_of_transformations():
    model = nn.BatchNorm1d(2)

    @nn.jit
    def hide(m):
        m._buffers["running_mean"].persistent = False

    with pytest.raises(nn.StructureChangeError, match="set it outside"):
        hide(model)
    assert "running_mean" in model.state_dict()


def test_persistent_tells_the_module():
    model = nn.BatchNorm1d(2)
    model._buffers["running_mean"].persistent = False
    assert "running_mean" not in model.state_dict() and "running_var" in model.state_dict()
    model._buffers["running_mean"].persistent = True
    assert "running_mean" in model.state_dict()


# --------------------------------------------------------------------------------------------------
# Ways out

READS = {
    "value": lambda m: [p.value for p in m.parameters()],
    "data": lambda m: [p.data for p in m.parameters()],
    "jnp": lambda m: [jnp.asarray(p) for p in m.parameters()],
    "jax.tree.leaves": lambda m: jax.tree.leaves(dict(m.named_parameters())),
    "jax.tree.map": lambda m: jax.tree.leaves(jax.tree.map(lambda a: a * 1, list(m.parameters()))),
    "jax.tree.leaves of the module": jax.tree.leaves,
    "copy.deepcopy": lambda m: [p.value for p in copy.deepcopy(m).parameters()],
    "copy.deepcopy of a parameter": lambda m: [copy.deepcopy(p).value for p in m.parameters()],
    "reduce": lambda m: [p.__reduce__()[1][0] for p in m.parameters()],
    "split": lambda m: nn.split(m)[1],
    "merge": lambda m: list(nn.merge(*nn.split(m)).parameters()),
    "state_dict": lambda m: list(m.state_dict().values()),
    "stack_module_state": lambda m: [v[0] for v in nn.stack_module_state([m])[0].values()],
    "functionalize": lambda m: list(nn.functionalize(m)[1].values()),
}


@pytest.mark.parametrize("read", READS)
def test_a_gradient_flows_through_every_way_out(read):
    model = nn.Linear(3, 2)
    grads = nn.grad(lambda m: sum((jnp.asarray(a) ** 2).sum() for a in READS[read](m)))(model)
    np.testing.assert_allclose(grads["weight"], 2 * np.asarray(model.weight), rtol=1e-6)
    np.testing.assert_allclose(grads["bias"], 2 * np.asarray(model.bias), rtol=1e-6)


@pytest.mark.parametrize("read", READS)
def test_what_compiled_code_took_in_by_any_way_out_is_warned_of_when_it_changes(read):
    teacher = nn.Linear(2, 2)
    run = jax.jit(lambda x: x.sum() + sum(jnp.asarray(a).sum() for a in READS[read](teacher)))
    run(X)
    with pytest.warns(nn.StaleCaptureWarning):
        teacher.weight.value = teacher.weight.value * 0


def test_pickling_outside_of_traces_takes_nothing_in():
    model = nn.Linear(2, 2)
    other = pickle.loads(pickle.dumps(model))
    model.weight.value = model.weight.value * 0
    assert np.asarray(other.weight).any()


# --------------------------------------------------------------------------------------------------
# Names


def test_a_member_cannot_be_hidden_by_an_attribute_of_the_class():
    class Attention(nn.Module):
        bias = None

        @property
        def scale(self):
            return 1.0

    for name in ("bias", "scale", "forward", "train"):
        for value in (nn.Parameter(jnp.ones(2)), nn.Buffer(jnp.ones(2)), nn.ReLU()):
            module = Attention()
            with pytest.raises(KeyError, match="already exists"):
                setattr(module, name, value)
            assert not module.state_dict() and not list(module.children())


def test_a_property_may_read_the_module_that_is_registered_under_its_name():
    class Meta(type(nn.Module)):
        pass

    class Model(nn.Module, metaclass=Meta):
        encoder = property(lambda self: self._modules["encoder"])

        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(2, 3)
            self.mro = nn.Linear(3, 1)  # a name of the metaclass is no name of the class

    model = Model()
    assert model.encoder.out_features == 3 and model.mro.out_features == 1


@pytest.mark.parametrize("name", ["", "a.b", "."])
def test_names_are_checked_whatever_is_bound_and_however(name):
    for value in (nn.Parameter(jnp.ones(2)), nn.Buffer(jnp.ones(2)), nn.ReLU()):
        module = nn.Module()
        with pytest.raises(KeyError, match="name can"):
            setattr(module, name, value)
        assert not module.state_dict() and not list(module.children())


def test_a_buffer_takes_no_name_that_is_taken():
    module = nn.Module()
    module.child, module.plain = nn.Linear(2, 2), 3
    with pytest.raises(TypeError, match="child module 'child'"):
        module.child = nn.Buffer(jnp.ones(2))
    with pytest.raises(KeyError, match="'plain' already exists"):
        module.plain = nn.Buffer(jnp.ones(2))
    assert isinstance(module.child, nn.Linear) and module.plain == 3


@pytest.mark.parametrize("name", ["_nn_stamp", "_nn_home", "_nn_plan", "_nn_shell"])
def test_names_of_the_engine_are_refused(name):
    with pytest.raises(nn.RegistrationError, match=name):
        setattr(nn.Module(), name, [1, 2])


def test_names_that_models_like_are_free():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self._cell, self._home = nn.LSTMCell(2, 3), nn.Parameter(jnp.ones(3))
            self._plan, self._shell = [1.0, 2.0], None

        def forward(self, x):
            h, _ = self._cell(x)
            return h * self._home * len(self._plan) if self._shell is None else x

    model = Model()
    assert jnp.allclose(nn.jit(model)(X), model(X))
    assert {"_cell.weight_ih", "_home"} <= set(dict(model.named_parameters()))


# --------------------------------------------------------------------------------------------------
# Containers


@pytest.mark.parametrize(
    "content, write",
    [
        ({"size": 7}, lambda c, x: c.update(last=x)),
        ([1, 2], lambda c, x: c.append(x)),
    ],
    ids=["dict", "list"],
)
def test_a_container_that_is_given_a_traced_value_keeps_what_else_it_has(content, write):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = copy.deepcopy(content)

        def forward(self, x):
            write(self.kept, x * 2)
            return x

    model = Model()
    with pytest.raises(nn.TraceLeakError, match="'kept'"):
        jax.vmap(lambda x: model(x))(X)
    assert model.kept == content


# --------------------------------------------------------------------------------------------------
# Threads, numpy, the meta device


def test_threads_draw_different_numbers():
    nn.manual_seed(0)
    keys: list = []

    def draw():
        for _ in range(100):
            keys.append(
                tuple(np.asarray(jax.random.key_data(nn.default_generator.next_key())).tolist())
            )
            keys.append(tuple(np.asarray(nn.functional.dropout(jnp.ones(64), 0.5)).tolist()))

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(keys)) == 1600


def test_numpy_on_the_left_leaves_the_operation_to_the_parameter():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.ones(2))

        def forward(self):
            scaled = (
                np.sqrt(np.float64(2.0)) * self.w + np.float32(3) - np.ones(2, np.float32) / self.w
            )
            return scaled.sum() + (np.ones((3, 2), np.float32) @ self.w).sum()

    grads = nn.grad(lambda m: m())(Scaled())
    np.testing.assert_allclose(grads["w"], [2**0.5 + 1 + 3] * 2, rtol=1e-6)
    assert isinstance(np.float32(2) * nn.Parameter(jnp.ones(2)), jax.Array)
    assert isinstance(np.ones(2, np.float32) + nn.Buffer(jnp.ones(2)), jax.Array)
    assert isinstance(np.exp(nn.Parameter(jnp.ones(2))), np.ndarray)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.BatchNorm1d(2, device="meta"),
        lambda: nn.BatchNorm2d(2, device="meta"),
        lambda: nn.InstanceNorm1d(2, track_running_stats=True, device="meta"),
        lambda: nn.SyncBatchNorm(2, device="meta"),
        lambda: nn.LazyBatchNorm1d(device="meta"),
    ],
    ids=["BatchNorm1d", "BatchNorm2d", "InstanceNorm1d", "SyncBatchNorm", "LazyBatchNorm1d"],
)
def test_norms_can_be_built_without_numbers(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's note that lazy layers may change
        module = build()
    assert module.num_batches_tracked.shape == ()
    assert isinstance(module.num_batches_tracked, jax.ShapeDtypeStruct)
