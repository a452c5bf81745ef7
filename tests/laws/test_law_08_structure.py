"""Law 8: structure and statics do not change inside a trace."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Net(nn.Module):
    def __init__(self, change=lambda m, x: None):
        super().__init__()
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(jnp.asarray([2.0, 3.0]))
        self.inner.register_buffer("count", jnp.zeros(()))
        self.inner.flag = 1
        self.inner.log = [1]
        self.inner.table = {"a": 1}
        self.change = change

    def forward(self, x):
        y = x * self.inner.w
        self.change(self, x)
        return y


X = jnp.ones(2)


def set_static(m, x):
    m.inner.flag = 2


def new_static(m, x):
    m.inner.last_shape = x.shape


def delete_static(m, x):
    del m.inner.flag


def append_log(m, x):
    m.inner.log.append(2)


def set_item(m, x):
    m.inner.table["a"] = 2


def to_eval(m, x):
    m.eval()


def new_parameter(m, x):
    m.inner.extra = nn.Parameter(jnp.zeros(1))


def new_buffer(m, x):
    m.inner.register_buffer("extra", jnp.zeros(1))


def new_module(m, x):
    m.inner.extra = nn.Module()


def drop_module(m, x):
    m.inner.w = None


def new_hook(m, x):
    m.inner.register_forward_hook(lambda *a: None)


def freeze(m, x):
    m.requires_grad_(False)


def replace_box(m, x):
    m.inner.w = nn.Parameter(jnp.zeros((3, 3)))


def same_shape_box(m, x):
    m.inner.w = nn.Parameter(jnp.zeros(2))


def reshape_value(m, x):
    m.inner.count = jnp.zeros((5,))


def tie(m, x):
    m.inner.second = m.inner.w


CHANGES = {
    set_static: "flag",
    new_static: "last_shape",
    delete_static: "flag",
    append_log: "log",
    set_item: "table",
    to_eval: "training",
    new_parameter: "extra",
    new_buffer: "extra",
    new_module: "extra",
    drop_module: "w",
    new_hook: "hook",
    freeze: "w",
    replace_box: "w",
    same_shape_box: "w",
    tie: "second",
}

HOW = {
    "nn.jit": lambda m: nn.jit(lambda m, x: m(x))(m, X),
    "nn.jit of the module": lambda m: nn.jit(m)(X),
    "nn.grad": lambda m: nn.grad(lambda m, x: m(x).sum())(m, X),
    "nn.remat": lambda m: nn.remat(lambda m, x: m(x))(m, X),
    "nn.vmap": lambda m: nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, jnp.ones((3, 2))),
    "nn.scan": lambda m: nn.scan(lambda m, x: (m, m(x)), m, jnp.ones((3, 2))),
    "functional_call": lambda m: nn.functional_call(m, {}, (X,)),
    "functional_call, mutable": lambda m: nn.functional_call(m, {}, (X,), mutable=True),
    "functionalize": lambda m: (lambda f, p: f(p, X))(*nn.functionalize(m)),
}


def fingerprint(m):
    inner = m.inner
    return (
        m.training,
        dict(vars(inner)["_parameters"]),
        list(inner._buffers),
        list(inner._modules),
        inner.__dict__.get("flag"),
        list(inner.log),
        dict(inner.table),
        inner.w.requires_grad,
        sorted(k for k in vars(inner) if not k.startswith("_")),
    )


@pytest.mark.parametrize(
    "change", [c for c in CHANGES if c is not same_shape_box], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("how", HOW)
def test_a_change_inside_a_traced_call_raises_names_it_and_is_undone(how, change):
    m = Net(change)
    before = fingerprint(m)
    with pytest.raises(nn.StatefulnnError) as info:
        HOW[how](m)
    assert CHANGES[change] in str(info.value)
    assert fingerprint(m) == before
    np.testing.assert_array_equal(np.asarray(m.inner.w), [2.0, 3.0])


@pytest.mark.parametrize("how", HOW)
def test_a_parameter_replaced_by_one_of_the_same_shape_is_written_back_or_refused(how):
    m = Net(same_shape_box)
    try:
        HOW[how](m)
    except nn.StatefulnnError as error:
        assert "w" in str(error)
        np.testing.assert_array_equal(np.asarray(m.inner.w), [2.0, 3.0])
    else:
        np.testing.assert_array_equal(np.asarray(m.inner.w), [0.0, 0.0])


@pytest.mark.parametrize(
    "change", [set_static, new_static, to_eval, append_log], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("how", ["nn.jit", "nn.grad"])
def test_the_class_of_the_error_is_structure_change(how, change):
    with pytest.raises(nn.StructureChangeError):
        HOW[how](Net(change))


def test_the_error_lists_every_difference_and_a_remedy():
    def several(m, x):
        m.inner.flag = 7
        m.inner.note = "hello"

    with pytest.raises(nn.StructureChangeError) as info:
        HOW["nn.jit"](Net(several))
    message = str(info.value)
    assert "inner.flag" in message
    assert "inner.note" in message
    assert "register_buffer" in message or "nn.capture" in message


@pytest.mark.parametrize("how", ["nn.jit", "nn.grad", "nn.remat", "functional_call, mutable"])
def test_a_flag_that_is_put_back_is_no_change(how):
    def there_and_back(m, x):
        m.eval()
        m.inner.flag = 5
        m.train()
        m.inner.flag = 1

    HOW[how](Net(there_and_back))


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_the_same_change_is_legal_in_eager_code(change):
    Net(change)(X)


@pytest.mark.parametrize("how", ["nn.jit", "nn.grad", "nn.remat"])
def test_a_traced_array_in_a_plain_attribute_raises_at_the_line(how):
    def keep(m, x):
        m.inner.last_attention = jax.nn.softmax(x * m.inner.w)
        raise AssertionError("went on after the write")

    m = Net(keep)
    with pytest.raises(nn.StatefulnnError, match="last_attention"):
        HOW[how](m)
    assert not hasattr(m.inner, "last_attention")


def test_a_traced_array_appended_to_a_plain_list_raises_and_the_list_is_as_before():
    m = Net(lambda m, x: m.inner.log.append(x * m.inner.w))
    with pytest.raises(nn.StatefulnnError, match="log"):
        HOW["nn.jit"](m)
    assert m.inner.log == [1]


def test_the_module_works_after_a_failed_call():
    m = Net(set_static)
    with pytest.raises(nn.StructureChangeError):
        HOW["nn.jit"](m)
    m.change = lambda m, x: None
    np.testing.assert_array_equal(np.asarray(HOW["nn.jit"](m)), [2.0, 3.0])


def test_a_non_persistent_buffer_is_the_remedy_for_what_a_forward_keeps():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", jnp.zeros(2), persistent=False)

        def forward(self, x):
            self.last = x * 3
            return x

    m = Keeps()
    nn.jit(m)(X)
    np.testing.assert_array_equal(np.asarray(m.last), [3.0, 3.0])
    assert list(m.state_dict()) == []


class Cached(nn.Module):
    _python_cache = ("cache",)

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray(2.0))
        self.cache = {}

    def forward(self, x):
        if "cache" in self.__dict__:  # a clone has none
            self.cache.setdefault(x.shape, len(self.cache))
        return x * self.w


def test_a_declared_cache_may_change_and_is_left_out_of_the_module_def():
    m = Cached()
    m.cache["mine"] = 1
    assert nn.split(m)[0] == nn.split(Cached())[0]
    f = nn.jit(lambda m, x: m(x))
    f(m, X)
    m.cache["more"] = 2
    f(m, X)
    assert f.trace_count == 1
    assert m.cache["mine"] == 1


def test_a_declared_cache_is_never_copied_to_clones():
    m = Cached()
    m.cache["mine"] = 1
    seen = []

    @nn.jit
    def f(m, x):
        seen.append(dict(m.cache) if hasattr(m, "cache") else None)
        return x

    f(m, X)
    assert seen == [None]


def test_a_buffer_may_change_its_value_but_its_shape_is_said_out_loud():
    m = Net(reshape_value)
    try:
        HOW["nn.jit"](m)
    except nn.StatefulnnError as error:
        assert "count" in str(error)
        assert m.inner.count.shape == ()
    else:
        assert m.inner.count.shape == (5,)
