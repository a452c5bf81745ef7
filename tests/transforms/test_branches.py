"""nn.cond and nn.switch, against an ``if`` in Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.quick import diagonal

X = jnp.asarray([[0.3, -0.2], [0.1, 0.8], [-0.5, 0.4]])


class Block(nn.Module):
    def __init__(self, size=0.5):
        super().__init__()
        self.w = nn.Parameter(jnp.full((2, 2), size))
        self.register_buffer("n", jnp.zeros((), jnp.int32))
        self.register_buffer("m", jnp.zeros((), jnp.int32))

    def forward(self, x):
        self.n = self.n + 1
        return jnp.tanh(x @ self.w.value)

    def other(self, x):
        self.m = self.m + 10
        return x * self.w.value.sum()

    def only_reads(self, x):
        return x + self.w.value[0]


PATHS = [Block.forward, Block.other, Block.only_reads]


def by_cond(i, m, x):
    """A switch made of two conds, one in the other."""
    rest = lambda m, x: nn.cond(i == 1, PATHS[1], PATHS[2], m, x)
    return nn.cond(i == 0, PATHS[0], rest, m, x)


def by_switch(i, m, x):
    return nn.switch(i, PATHS, m, x)


CHOICES = {"cond in cond": by_cond, "switch": by_switch}
both = pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
wrapped = pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])


def state_of(m):
    return {name: np.asarray(v).tolist() for name, v in m.state_dict().items()}


@both
@wrapped
def test_the_branch_that_runs_writes_and_the_others_do_not(choose, wrap):
    f = (lambda f: f if wrap is None else wrap(f))(choose)
    m, n = Block(), Block()
    for i in (0, 1, 2, 1, 0, 0):
        np.testing.assert_allclose(f(jnp.asarray(i), m, X), PATHS[i](n, X), rtol=1e-6)
        assert state_of(m) == state_of(n)
    if wrap is not None:
        assert f.trace_count == 1


@wrapped
def test_a_predicate_that_is_known_chooses_as_well(wrap):
    m = Block()
    for pred in (True, False, np.bool_(True)):
        f = lambda m, p=pred: nn.cond(p, Block.forward, Block.other, m, X)
        (f if wrap is None else wrap(f))(m)
    assert (int(m.n), int(m.m)) == (2, 10)


def test_without_compiled_code_a_branch_writes_the_same():
    m = Block()
    with jax.disable_jit():
        by_switch(jnp.asarray(1), m, X)
        by_cond(jnp.asarray(0), m, X)
    assert (int(m.n), int(m.m)) == (1, 10)


def test_an_index_outside_chooses_the_nearest_branch():
    m = Block()
    for i in (-3, 17):
        by_switch(i, m, X)
    assert (int(m.n), int(m.m)) == (1, 0)
    nn.switch(5, [Block.forward], m, X)
    assert int(m.n) == 2
    with pytest.raises(ValueError, match="[Ee]mpty|at least one"):
        nn.switch(0, [], m, X)


@wrapped
def test_modules_and_methods_are_branches(wrap):
    a, b = Block(0.5), Block(0.1)
    f = lambda a, b, i: nn.switch(i, [a, b, b.other], X)
    f = f if wrap is None else wrap(f)
    for i, expected in enumerate([jnp.tanh(X @ a.w.value), jnp.tanh(X @ b.w.value), X * 0.4]):
        np.testing.assert_allclose(f(a, b, i), expected, rtol=1e-5)
    assert [int(v) for v in (a.n, a.m, b.n, b.m)] == [1, 0, 1, 10]


@pytest.mark.parametrize("choice, how", diagonal(2, list(CHOICES), ["eager", "nn.jit"]))
def test_the_gradient_is_that_of_the_branch_that_runs(choice, how):
    f = nn.grad(lambda m, i: (CHOICES[choice](i, m, X) ** 2).sum())
    f = f if how == "eager" else nn.jit(f)
    plain = [
        lambda w: (jnp.tanh(X @ w) ** 2).sum(),
        lambda w: ((X * w.sum()) ** 2).sum(),
        lambda w: ((X + w[0]) ** 2).sum(),
    ]
    m = Block()
    for i in range(3):
        got = f(m, jnp.asarray(i))["w"]
        np.testing.assert_allclose(got, jax.grad(plain[i])(m.w.value), rtol=1e-4, atol=1e-6)
    assert (int(m.n), int(m.m)) == (1, 10)


@both
def test_lanes_of_nn_vmap_choose_on_their_own(choose):
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *(Block() for _ in range(4)))
    out = nn.vmap(choose, in_axes=(0, 0, None))(jnp.asarray([1, 0, 2, 0]), stacked, X)
    np.testing.assert_array_equal(stacked.n, [0, 1, 0, 1])
    np.testing.assert_array_equal(stacked.m, [10, 0, 0, 0])
    m = Block()
    np.testing.assert_allclose(out, np.stack([PATHS[i](m, X) for i in (1, 0, 2, 0)]), rtol=1e-6)


@both
def test_lanes_that_share_the_module_must_choose_alike(choose):
    m = Block()
    with pytest.raises(nn.StateWriteError, match=r"'\[\d\]\.n'"):
        nn.vmap(choose, in_axes=(0, None, None))(jnp.asarray([1, 0]), m, X)
    nn.vmap(choose, in_axes=(None, None, 0))(jnp.asarray(0), m, jnp.stack([X, X]))
    assert (int(m.n), int(m.m)) == (1, 0)


@both
def test_steps_of_a_loop_choose_by_their_index(choose):
    m = Block()
    f = nn.jit(lambda m: nn.fori_loop(0, 7, lambda i, c: (c[0], choose(i % 3, *c)), (m, X)))
    again, out = f(m)
    n, x = Block(), X
    for i in range(7):
        x = PATHS[i % 3](n, x)
    assert again is m and state_of(m) == state_of(n)
    np.testing.assert_allclose(out, x, rtol=1e-4)


def test_a_loop_runs_inside_a_branch():
    steps = lambda m, x: nn.scan(lambda c, _: ((c[0], c[0](c[1])), None), (m, x), length=3)[0][1]
    m = Block()
    f = nn.jit(lambda p, m: nn.cond(p, nn.remat(steps), Block.other, m, X))
    out = f(True, m)
    f(False, m)
    n, x = Block(), X
    for _ in range(3):
        x = n(x)
    np.testing.assert_allclose(out, x, rtol=1e-5)
    assert (int(m.n), int(m.m), f.trace_count) == (3, 10, 1)


def test_a_training_step_in_a_branch():
    def train(m, x):
        loss, grads = nn.value_and_grad(lambda m: (m(x) ** 2).mean())(m)
        m.w.value = m.w - 0.1 * grads["w"]
        return loss

    skip = lambda m, x: jnp.zeros(())
    f = nn.jit(lambda p, m: nn.cond(p, train, skip, m, X))
    m, n = Block(), Block()
    assert float(f(False, m)) == 0.0
    np.testing.assert_array_equal(m.w, n.w)
    np.testing.assert_allclose(f(True, m), train(n, X), rtol=1e-6)
    np.testing.assert_allclose(m.w, n.w, rtol=1e-6)
    assert int(m.n) == 1


@wrapped
def test_tied_and_shared_boxes_are_written_once(wrap):
    class Holder(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.same = block, block
            self.w = block.w

    shared = Block()
    a, b = Holder(shared), Holder(shared)

    def double(a, b):
        a.w.value = a.w * 2
        return b.block.w.value.sum() + b.same(X).sum() * 0

    f = lambda p, a, b: nn.cond(p, double, lambda a, b: a.w.value.sum(), a, b)
    f = f if wrap is None else wrap(f)
    assert float(f(True, a, b)) == 4.0
    assert float(f(False, a, b)) == 4.0
    np.testing.assert_array_equal(shared.w, np.ones((2, 2)))
    assert a.w is b.block.w and int(shared.n) == 1


@wrapped
def test_batch_norm_updates_only_in_its_branch(wrap):
    norm, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    f = lambda p, m, x: nn.cond(p, m, lambda x: x, x)
    f = f if wrap is None else wrap(f)
    np.testing.assert_array_equal(f(False, norm, X), X)
    np.testing.assert_array_equal(norm.running_mean, np.zeros(2))
    np.testing.assert_allclose(f(True, norm, X), other(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.running_var, other.running_var, rtol=1e-5)
    assert int(norm.num_batches_tracked) == 1


@wrapped
def test_a_generator_goes_on_only_if_its_branch_runs(wrap):
    drop = nn.Dropout(0.5)
    f = lambda p, m, x: nn.cond(p, m, lambda x: x, x)
    f = f if wrap is None else wrap(f)
    before = np.asarray(nn.get_rng_state())
    f(False, drop, jnp.ones(64))
    np.testing.assert_array_equal(nn.get_rng_state(), before)
    masks = [np.asarray(f(True, drop, jnp.ones(64))) for _ in range(2)]
    nn.manual_seed(0)
    for mask in masks:
        np.testing.assert_array_equal(mask, drop(jnp.ones(64)))


@wrapped
def test_modules_that_are_returned_are_the_caller_s_own(wrap):
    a, b = Block(), Block()

    def first(a, b):
        a(X)
        return {"a": a, "w": b.w, "x": (X, None)}

    def second(a, b):
        b(X)
        return {"a": a, "w": b.w, "x": (X * 2, None)}

    f = lambda p, a, b: nn.cond(p, first, second, a, b)
    for p in (True, False):
        out = (f if wrap is None else wrap(f))(p, a, b)
        assert out["a"] is a and out["w"] is b.w
        np.testing.assert_allclose(out["x"][0], X if p else 2 * X)
    assert (int(a.n), int(b.n)) == (1, 1)


def test_a_module_built_in_the_branches_comes_back_with_the_values_of_one():
    def make(value):
        def branch():
            m = nn.Linear(1, 1)
            m.weight.value = jnp.full((1, 1), value)
            return m

        return branch

    for p in (True, False):
        made = nn.cond(p, make(1.0), make(2.0))
        assert float(made.weight[0, 0]) == (1.0 if p else 2.0)


@both
def test_the_state_may_be_donated(choose):
    m = Block()
    f = nn.jit(choose, donate=1)
    for i in (0, 1, 2, 0):
        f(jnp.asarray(i), m, X)
    assert (int(m.n), int(m.m), f.trace_count) == (2, 10, 1)


# --------------------------------------------------------------------------------------------------
# What is refused


@both
def test_under_a_raw_jax_jit_a_module_is_read_and_a_write_raises(choose):
    m = Block()
    with pytest.raises(nn.StateWriteError, match="'n' |'m' "):
        jax.jit(choose)(jnp.asarray(2), m, X)
    read = jax.jit(lambda p, m: nn.cond(p, Block.only_reads, lambda m, x: x, m, X))
    np.testing.assert_allclose(read(True, m), m.only_reads(X))

    @jax.jit
    def returned(i, m):
        m = nn.mutable(m)
        return choose(i, m, X), m

    _, m = returned(jnp.asarray(1), m)
    assert (int(m.n), int(m.m)) == (0, 10)


@both
def test_a_pure_call_returns_the_state_of_the_branch(choose):
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, i, x):
            return choose(i, self.block, x)

    m = Chooses()
    fn, params, state = nn.functionalize(m, mutable=True)
    _, new = jax.jit(fn)(params, state, jnp.asarray(1), X)
    assert (int(new["block.n"]), int(new["block.m"]), int(m.block.m)) == (0, 10, 0)


def test_a_structure_changed_in_one_branch_raises_by_name():
    m = Block()

    def notes(m):
        m.note = 1
        return X

    for branches in ((notes, lambda m: X), (lambda m: X, notes)):
        with pytest.raises(nn.StructureChangeError, match="note"):
            nn.cond(True, *branches, m)
    with pytest.raises(nn.StructureChangeError, match="training"):
        nn.switch(0, [lambda m: X, lambda m: m.eval().w * X[0, 0]], m)
    assert m.training and not hasattr(m, "note")


def test_a_write_to_a_module_from_outside_raises():
    m = Block()
    with pytest.raises(nn.TraceLeakError, match="'n' "):
        nn.cond(True, lambda x: m(x), lambda x: x, X)
    assert int(m.n) == 0


def test_a_box_that_the_branches_leave_in_other_types_is_refused_by_name():
    m = Block()

    def as_float(m):
        m.n = m.n.astype(jnp.float32)

    def longer(m):
        m.n = jnp.zeros(3, jnp.int32)

    keeps = lambda m: None
    with pytest.raises(
        nn.StructureChangeError,
        match=r"true_fun left float32\[\] in '\[0\]\.n', and false_fun left int32\[\]",
    ):
        nn.cond(True, as_float, keeps, m)
    with pytest.raises(
        nn.StructureChangeError,
        match=r"branches\[0\] left int32\[\] in '\[0\]\.n', and branches\[2\] left int32\[3\]",
    ):
        nn.switch(0, [keeps, keeps, longer], m)
    assert m.n.shape == () and m.n.dtype == jnp.int32
    nn.cond(True, longer, longer, m)
    assert m.n.shape == (3,)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            lambda m: {"a": X, "b": X},
            lambda m: {"a": X, "b": X[0]},
            r"true_fun returned float32\[3, 2\] in the output\['b'\], and false_fun returned "
            r"float32\[2\]",
        ),
        (
            lambda m: (X, m.inner.n),
            lambda m: (X, X[0, 0]),
            r"true_fun returned int32\[\] in the output\[1\], and false_fun returned float32\[\]",
        ),
        (
            lambda m: {"a": X},
            lambda m: {"a": X, "b": X},
            r"returned nothing in the output\['b'\], and false_fun returned float32\[3, 2\]",
        ),
        (lambda m: X, lambda m: None, r"float32\[3, 2\] in the output, and .*returned nothing"),
        (lambda m: [X], lambda m: (X,), r"returned PyTreeDef\(\[\*\]\) in the output, taken as"),
        (
            lambda m: [X, m],
            lambda m: [X, m.inner],
            r"returned the Sequential '\[0\]' in the output\[1\], and false_fun returned the Block "
            r"'\[0\]\.0'",
        ),
        (lambda m: m.inner.w, lambda m: m[1].weight, r"box '\[0\]\.0\.w'.*box '\[0\]\.1\.weight'"),
        (
            lambda m: nn.Linear(1, 2),
            lambda m: nn.Linear(1, 3),
            r"float32\[2, 1\].* in the output, and .*float32\[3, 1\]",
        ),
    ],
    ids="shape dtype missing nothing container module box new".split(),
)
def test_outputs_that_differ_are_refused_by_the_part_that_does(first, second, message):
    m = nn.Sequential(Block(), nn.Linear(2, 2))
    m.inner = m[0]
    with pytest.raises(nn.StructureChangeError, match=message):
        nn.cond(True, first, second, m)


@pytest.mark.parametrize(
    "call", [lambda x: nn.cond(True, lambda x: x, None, x), lambda x: nn.switch(0, [None], x)]
)
def test_a_branch_that_is_no_function_is_refused(call):
    with pytest.raises(TypeError, match="false_fun|branches"):
        call(jnp.ones(2))
