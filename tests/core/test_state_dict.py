"""state_dict and load_state_dict; torch is the oracle."""

from __future__ import annotations

import pickle
import time
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import statefulnn as nn
from tests.precision import in_float64


def net(lib):
    m = lib.nn.Module()
    m.fc = lib.nn.Linear(2, 3)
    m.own = lib.nn.Parameter(lib.arange(2))
    m.register_buffer("kept", lib.ones(1))
    m.register_buffer("hidden", lib.ones(1), persistent=False)
    m.norm = lib.nn.BatchNorm1d(3)
    m.nothing = None
    m.add_module("no_child", None)
    m.tied = m.fc
    return m


def filled(lib, m, start=0.0):
    """A state dict for `m` whose values are known to both libraries; the same ones under tied names."""
    out = {}
    state = m.state_dict()
    names = list(state)
    for name, value in state.items():
        array = np.full(tuple(value.shape), start + names.index(name.replace("tied.", "fc.")))
        integer = "int" in str(value.dtype)
        out[name] = lib.array(array.astype(np.int32 if integer else np.float32))
    return out


def test_keys_come_in_torch_s_order_with_ties_under_each_name(agree):
    agree(lambda lib: list(net(lib).state_dict()))


def test_metadata_has_an_entry_with_a_version_for_every_module(agree):
    agree(lambda lib: {k: dict(v) for k, v in net(lib).state_dict()._metadata.items()})


def test_prefix_and_destination(agree):
    def scenario(lib):
        destination = OrderedDict()
        destination._metadata = OrderedDict()
        same = net(lib).state_dict(destination=destination, prefix="net.") is destination
        return same, list(destination), list(destination._metadata)

    agree(scenario)


def test_keep_vars_gives_the_parameters_themselves(agree):
    def scenario(lib):
        m = net(lib)
        kept, plain = m.state_dict(keep_vars=True), m.state_dict()
        return kept["own"] is m.own, isinstance(plain["own"], lib.nn.Parameter)

    agree(scenario)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", ["none", "missing", "extra", "both", "bad_suffix"])
def test_missing_and_unexpected_keys(agree, change, strict):
    def scenario(lib):
        m = net(lib)
        given = filled(lib, m)
        if change in ("missing", "both"):
            del given["norm.weight"]
        if change in ("extra", "both"):
            given["fc.nope"] = lib.ones(1)
        if change == "bad_suffix":
            given["own.bad_suffix"] = given["own"]
        result = m.load_state_dict(given, strict=strict)
        return list(result.missing_keys), list(result.unexpected_keys), dict(m.state_dict())

    agree(scenario, raises=RuntimeError if strict and change != "none" else None)


def test_the_error_lists_every_key_that_does_not_fit():
    m = nn.Linear(2, 3)
    with pytest.raises(RuntimeError) as info:
        m.load_state_dict({"weights": jnp.ones((3, 2)), "bias": jnp.ones(3)})
    message = str(info.value)
    assert "'weights'" in message or '"weights"' in message
    assert "'weight'" in message or '"weight"' in message


def test_a_successful_load_says_so(agree):
    def scenario(lib):
        m = net(lib)
        return repr(m.load_state_dict(filled(lib, m)))

    assert agree(scenario) == "<All keys matched successfully>"


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_shape_raises_even_when_not_strict(agree, strict):
    def scenario(lib):
        m = net(lib)
        m.load_state_dict({**filled(lib, m), "own": lib.ones(3)}, strict=strict)

    agree(scenario, raises=RuntimeError)


def test_the_shapes_are_in_the_message():
    m = nn.Linear(2, 3)
    state = dict(m.state_dict(), weight=jnp.ones((4, 2)))
    with pytest.raises(RuntimeError, match=r"weight.*\(4, 2\)|weight.*\[4, 2\]") as info:
        m.load_state_dict(state)
    assert "3, 2" in str(info.value)


def test_a_failed_strict_load_of_ours_leaves_every_value_as_it_was():
    m = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {k: np.asarray(v) for k, v in m.state_dict().items()}
    state = {k: jnp.asarray(v) + 1 for k, v in before.items()}
    state["1.weight"] = jnp.ones((5, 5))
    with pytest.raises(RuntimeError):
        m.load_state_dict(state)
    for name, value in m.state_dict().items():
        np.testing.assert_array_equal(np.asarray(value), before[name])


@pytest.mark.parametrize("given", [None, 3, "text", [("a", 1)]], ids=repr)
def test_what_is_no_mapping_is_a_type_error(agree, given):
    agree(lambda lib: net(lib).load_state_dict(given), raises=TypeError)


def test_loading_copies_into_the_dtype_of_the_module(agree):
    def scenario(lib):
        m = lib.nn.Linear(1, 1).half()
        m.load_state_dict({"weight": lib.ones(1, 1), "bias": lib.ones(1)})
        return str(m.weight.dtype).removeprefix("torch."), m.weight

    agree(scenario)


def test_loading_keeps_the_identity_of_the_parameter(agree):
    def scenario(lib):
        m = lib.nn.Linear(1, 1)
        before = m.weight
        m.load_state_dict({"weight": lib.ones(1, 1), "bias": lib.ones(1)})
        return m.weight is before

    agree(scenario)


def test_assign_takes_the_given_dtype_and_keeps_requires_grad(agree):
    def scenario(lib):
        m = lib.nn.Linear(1, 1).half()
        m.bias.requires_grad_(False)
        m.load_state_dict({"weight": lib.ones(1, 1), "bias": lib.ones(1)}, assign=True)
        dtypes = [str(p.dtype).removeprefix("torch.") for p in m.parameters()]
        return dtypes, [p.requires_grad for p in m.parameters()], dict(m.state_dict())

    agree(scenario)


def test_assign_still_checks_the_shape(agree):
    def scenario(lib):
        m = lib.nn.Linear(1, 1)
        m.load_state_dict({"weight": lib.ones(2, 1), "bias": lib.ones(1)}, assign=True)

    agree(scenario, raises=RuntimeError)


def test_assign_keeps_a_tie():
    m = nn.Module()
    m.a = nn.Linear(1, 1)
    m.b = nn.Linear(1, 1)
    m.b.weight = m.a.weight
    state = {k: jnp.ones_like(v) for k, v in m.state_dict().items()}
    m.load_state_dict(state, assign=True)
    assert m.a.weight is m.b.weight
    assert len(list(m.parameters())) == 3


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_numpy_and_jax_arrays_are_taken(make):
    m = nn.Linear(1, 2)
    m.load_state_dict({"weight": make([[1.0], [2.0]]), "bias": make([3.0, 4.0])})
    np.testing.assert_array_equal(np.asarray(m.weight), [[1.0], [2.0]])
    assert m.weight.dtype == jnp.float32


@pytest.mark.parametrize("value", [(1.0, 2.0), [1.0, 2.0], "text", 3.0], ids=repr)
def test_values_that_are_no_arrays_are_refused(agree, value):
    def scenario(lib):
        m = lib.nn.Module()
        m.w = lib.nn.Parameter(lib.ones(2))
        m.load_state_dict({"w": value})

    agree(scenario, raises=RuntimeError)


def test_parameters_are_taken_as_values():
    source, target = nn.Linear(1, 2), nn.Linear(1, 2)
    target.load_state_dict(source.state_dict(keep_vars=True))
    np.testing.assert_array_equal(np.asarray(target.weight), np.asarray(source.weight))
    assert target.weight is not source.weight


def test_a_torch_checkpoint_loads_key_for_key():
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    )
    theirs(torch.randn(5, 1, 4, 4))
    ours = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(np.asarray(ours.state_dict()[name]), value.numpy())


@pytest.mark.parametrize("version", [None, 1])
def test_batch_norm_of_an_old_version_loads_with_zero_batches_tracked(agree, version):
    def scenario(lib):
        m = lib.nn.BatchNorm1d(2)
        state = m.state_dict()
        del state["num_batches_tracked"]
        if version is None:
            del state._metadata
        else:
            state._metadata[""]["version"] = version
        m.load_state_dict(state)
        return m.num_batches_tracked

    agree(scenario)


def test_batch_norm_of_the_present_version_must_have_its_counter(agree):
    def scenario(lib):
        m = lib.nn.BatchNorm1d(2)
        state = m.state_dict()
        del state["num_batches_tracked"]
        m.load_state_dict(state)

    agree(scenario, raises=RuntimeError)


def test_a_child_s_load_pre_hook_sees_the_entries_under_its_prefix_only(agree):
    def scenario(lib):
        seen = []

        class Child(lib.nn.Module):
            def __init__(self):
                super().__init__()
                self.w = lib.nn.Parameter(lib.ones(1))

            def _load_from_state_dict(self, state_dict, prefix, *args):
                seen.append((prefix, [k for k in state_dict if k.startswith(prefix)]))
                super()._load_from_state_dict(state_dict, prefix, *args)

        m = lib.nn.Module()
        m.a = Child()
        m.ab = Child()
        m.load_state_dict({"a.w": lib.zeros(1), "ab.w": lib.ones(1)})
        return seen, m.a.w, m.ab.w

    agree(scenario)


@pytest.mark.parametrize("extra", [{"a": 1}, 5, "text", (1, None)], ids=repr)
def test_extra_state_of_any_type_round_trips(agree, extra):
    def scenario(lib):
        class Net(lib.nn.Module):
            def __init__(self, value):
                super().__init__()
                self.value = value

            def get_extra_state(self):
                return self.value

            def set_extra_state(self, state):
                self.value = state

        source, target = Net(extra), Net(None)
        m = lib.nn.Sequential(target)
        m.load_state_dict(lib.nn.Sequential(source).state_dict())
        return target.value, list(m.state_dict())

    agree(scenario)


@pytest.mark.parametrize("side", ["only_get", "only_set"])
def test_extra_state_on_one_side_only_is_unexpected_or_missing(agree, side):
    def scenario(lib):
        class Getter(lib.nn.Module):
            def get_extra_state(self):
                return 1

        class Setter(lib.nn.Module):
            def set_extra_state(self, state):
                pass

        if side == "only_get":
            result = lib.nn.Module().load_state_dict(Getter().state_dict(), strict=False)
        else:
            result = Setter().load_state_dict(lib.nn.Module().state_dict(), strict=False)
        return list(result.missing_keys), list(result.unexpected_keys)

    agree(scenario)


def test_state_dict_hooks_run_with_module_prefix_and_metadata(agree):
    def scenario(lib):
        seen = []
        m = lib.nn.Sequential(lib.nn.Linear(1, 1))

        def pre(module, prefix, keep_vars):
            seen.append(("pre", type(module).__name__, prefix, keep_vars))

        def post(module, state_dict, prefix, local_metadata):
            seen.append(("post", type(module).__name__, prefix, dict(local_metadata)))
            state_dict[prefix + "added"] = lib.ones(1)

        m[0].register_state_dict_pre_hook(pre)
        handle = m[0].register_state_dict_post_hook(post)
        first = list(m.state_dict())
        handle.remove()
        return first, seen, list(m.state_dict())

    agree(scenario)


def test_a_post_hook_that_returns_something_is_an_error(agree):
    def scenario(lib):
        m = lib.nn.Linear(1, 1)
        m.register_state_dict_post_hook(lambda *args: {})
        m.state_dict()

    agree(scenario, raises=RuntimeError)


def test_a_load_pre_hook_may_rename_keys(agree):
    def scenario(lib):
        seen = []

        def rename(module, state_dict, prefix, metadata, strict, missing, unexpected, errors):
            seen.append((type(module).__name__, prefix, strict))
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel")

        m = lib.nn.Sequential(lib.nn.Linear(1, 1))
        m[0].register_load_state_dict_pre_hook(rename)
        given = {"0.kernel": lib.ones(1, 1), "0.bias": lib.zeros(1)}
        m.load_state_dict(given)
        return seen, m[0].weight, sorted(given)

    agree(scenario)


def test_the_private_load_pre_hook_gets_no_module_unless_asked(agree):
    def scenario(lib):
        seen = []
        m = lib.nn.Linear(1, 1)
        m._register_load_state_dict_pre_hook(lambda *args: seen.append(len(args)))
        m._register_load_state_dict_pre_hook(lambda *args: seen.append(len(args)), True)
        m.load_state_dict(m.state_dict())
        return seen

    agree(scenario)


@pytest.mark.parametrize("clear", [True, False])
def test_a_load_post_hook_may_edit_the_lists_and_so_decide_strictness(agree, clear):
    def scenario(lib):
        seen = []

        def post(module, incompatible):
            seen.append((type(module).__name__, list(incompatible.missing_keys)))
            if clear:
                incompatible.missing_keys.clear()
                incompatible.unexpected_keys.clear()

        m = lib.nn.Linear(1, 1)
        m.register_load_state_dict_post_hook(post)
        result = m.load_state_dict({"nope": lib.ones(1)})
        return seen, list(result.missing_keys)

    agree(scenario, raises=None if clear else RuntimeError)


def test_the_given_state_dict_is_not_changed(agree):
    def scenario(lib):
        m = net(lib)
        given = filled(lib, m)
        given["nope"] = lib.ones(1)
        before = list(given)
        m.load_state_dict(given, strict=False)
        return list(given) == before, lib.numpy(given["own"])

    agree(scenario)


def test_a_snapshot_does_not_follow_the_live_model():
    m = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    snapshot = m.state_dict()
    before = {k: np.array(v) for k, v in snapshot.items()}
    m[0].weight.value = m[0].weight.value + 1
    m(jnp.ones((4, 1)))
    for name, value in snapshot.items():
        np.testing.assert_array_equal(np.asarray(value), before[name])


def test_a_state_dict_pickles_with_its_metadata():
    state = nn.BatchNorm1d(2).state_dict()
    again = pickle.loads(pickle.dumps(state))
    assert list(again) == list(state)
    assert again._metadata == state._metadata


def test_consume_prefix_strips_the_prefix(agree):
    def scenario(lib):
        if lib.nn is nn:
            strip = nn.modules.utils.consume_prefix_in_state_dict_if_present
        else:
            strip = torch.nn.modules.utils.consume_prefix_in_state_dict_if_present
        state = lib.nn.Sequential(OrderedDict(module=lib.nn.Linear(1, 1))).state_dict()
        strip(state, "module.")
        return list(state), list(state._metadata)

    agree(scenario)


def test_loading_an_integer_buffer_from_a_float_that_is_no_integer_is_not_silent():
    m = nn.BatchNorm1d(1)
    state = m.state_dict()
    state["num_batches_tracked"] = jnp.asarray(2.5)
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        m.load_state_dict(state)


# --------------------------------------------------------------------------------------------------
# Ties: names of one box are one entry


class Tied(nn.Module):
    """A module with a shared module, a shared parameter and a shared buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)
        self.again = self.fc
        self.head = nn.Module()
        self.head.inner = nn.Sequential(self.fc)
        self.out = nn.Linear(2, 3, bias=False)
        self.out.weight = self.fc.weight
        self.norm = nn.BatchNorm1d(3)
        self.norm2 = self.norm


# The names of each box of `Tied`.
NAMES = {
    "weight": ["fc.weight", "again.weight", "head.inner.0.weight", "out.weight"],
    "bias": ["fc.bias", "again.bias", "head.inner.0.bias"],
    **{
        f"norm {n}": [f"norm.{n}", f"norm2.{n}"]
        for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
}


def numbered(shift: float = 1.0) -> dict[str, np.ndarray]:
    """Return an entry for every name of `Tied`, equal for the names of one box, and not its own."""
    state = Tied().state_dict()
    assert sorted(state) == sorted(n for names in NAMES.values() for n in names)
    values = {}
    for i, names in enumerate(NAMES.values()):
        for name in names:
            values[name] = np.full(state[name].shape, i + shift, state[name].dtype)
    return values


def assert_loaded(model: nn.Module, state: dict[str, Any]) -> None:
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(np.asarray(value), state[name])


@settings(max_examples=60, deadline=None)
@drawn(data=st.data(), assign=st.booleans(), strict=st.booleans())
def test_any_names_of_a_box_are_enough(data: Any, assign: bool, strict: bool) -> None:
    full, some = numbered(), {}
    for names in NAMES.values():
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True)):
            some[name] = full[name]
    order = data.draw(st.permutations(list(some)))
    model = Tied()
    result = model.load_state_dict({n: some[n] for n in order}, strict=strict, assign=assign)
    assert result == ([], [])
    assert_loaded(model, full)
    assert model.out.weight is model.fc.weight


def test_a_box_of_which_no_name_is_there_is_missing_under_all(agree) -> None:
    def scenario(lib):
        m = net(lib)
        state = filled(lib, m)
        del state["fc.weight"], state["tied.weight"]
        return m.load_state_dict(state, strict=False)

    assert "'tied.weight'" in repr(agree(scenario))


def language_model(library: Any) -> Any:
    m = library.Module()
    m.embed = library.Embedding(4, 2)
    m.norm = m.last_norm = library.BatchNorm1d(2)
    m.head = library.Linear(2, 4, bias=False)
    m.head.weight = m.embed.weight
    return m


def test_a_file_in_which_torch_s_writer_left_out_ties_loads_strictly(tmp_path) -> None:
    from safetensors.numpy import load_file
    from safetensors.torch import save_model

    theirs, ours = language_model(torch.nn), language_model(nn)
    with torch.no_grad():
        for i, value in enumerate([*theirs.parameters(), *theirs.buffers()]):
            value.fill_(i)
    save_model(theirs, str(tmp_path / "model.safetensors"))
    state = load_file(tmp_path / "model.safetensors")
    assert len(state) == len(theirs.state_dict()) - 6
    assert not any(ours.load_state_dict(state))
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(np.asarray(ours.state_dict()[name]), value.numpy())


@settings(max_examples=60, deadline=None)
@drawn(data=st.data(), assign=st.booleans(), strict=st.booleans())
def test_different_values_of_one_box_are_an_error_that_names_both(
    data: Any, assign: bool, strict: bool
) -> None:
    state = numbered()
    names = data.draw(st.sampled_from(list(NAMES.values())))
    wrong = data.draw(st.sampled_from(names))
    state[wrong] = state[wrong].copy()
    state[wrong].flat[-1] += 1
    model = Tied()
    before = model.state_dict()
    with pytest.raises(nn.StateDictError, match="different values") as info:
        model.load_state_dict(state, strict=strict, assign=assign)
    # All names are compared with the first.
    others = names[1:] if wrong == names[0] else [wrong]
    for name in others:
        assert f'"{names[0]}" and "{name}" are names of one ' in str(info.value)
    assert str(info.value).count("are names of one") == len(others)
    assert all(value is before[name] for name, value in model.state_dict().items())


def pair_of(value: Any) -> nn.Module:
    m = nn.Module()
    m.a = nn.Parameter(value, requires_grad=False)
    m.b = m.a
    return m


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "complex64"])
def test_nan_in_the_same_places_is_equal(dtype: str) -> None:
    one = jnp.asarray([1.0, float("nan"), 3.0], dtype)
    other = jnp.asarray([1.0, 2.0, float("nan")], dtype)
    m = pair_of(jnp.zeros(3, dtype))
    m.load_state_dict({"a": one, "b": np.array(one)})
    np.testing.assert_array_equal(np.isnan(np.asarray(m.a)), [False, True, False])
    for given in ({"a": one, "b": other}, {"a": other, "b": one}):
        with pytest.raises(nn.StateDictError, match='"a" and "b"'):
            m.load_state_dict(given)


def test_names_of_one_box_are_compared_in_the_dtype_of_the_box() -> None:
    wide = np.array([0.1, 0.2])  # no numbers of float32
    given = {"a": wide, "b": wide.astype(np.float32)}
    m = pair_of(jnp.zeros(2))
    m.load_state_dict(given)
    np.testing.assert_array_equal(np.asarray(m.a), wide.astype(np.float32))
    with in_float64(), pytest.raises(nn.StateDictError, match="different values"):
        m.load_state_dict(given, assign=True)


@pytest.mark.parametrize(
    "value", [np.ones(3), np.ones(2, bool), "text"], ids=["shape", "dtype", "no array"]
)
def test_every_name_of_a_box_is_checked(value: Any) -> None:
    for given in ({"a": jnp.ones(2), "b": value}, {"a": value, "b": jnp.ones(2)}):
        with pytest.raises(nn.StateDictError) as info:
            pair_of(jnp.zeros(2)).load_state_dict(given)
        assert "Missing" not in str(info.value)
        assert "different values" not in str(info.value)


def test_random_keys_under_two_names_are_compared() -> None:
    m = nn.Module()
    m.a = m.b = nn.Buffer(jax.random.key(0))
    assert m._buffers["a"] is m._buffers["b"]
    m.load_state_dict({"a": jax.random.key(1), "b": jax.random.key(1)})
    assert bool(m.a == jax.random.key(1))
    with pytest.raises(nn.StateDictError, match="different values"):
        m.load_state_dict({"a": jax.random.key(1), "b": jax.random.key(2)})


def test_shapes_without_numbers_are_equal_and_differ_from_arrays() -> None:
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    m = pair_of(jnp.zeros(2))
    m.load_state_dict({"a": shape, "b": jax.ShapeDtypeStruct((2,), jnp.float32)}, assign=True)
    assert m.a.value == shape
    with pytest.raises(nn.StateDictError, match="different values"):
        m.load_state_dict({"a": shape, "b": jnp.ones(2)}, assign=True)


def test_traced_values_under_two_names_load() -> None:
    m = pair_of(jnp.zeros(2))
    fn = jax.jit(lambda state: nn.functional_call(Loads(m), {}, (state,)))
    np.testing.assert_array_equal(fn({"a": jnp.ones(2), "b": jnp.ones(2)}), [2.0, 2.0])


class Loads(nn.Module):
    """Loads its argument into a copy of a module, where it is called."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.like = like

    def forward(self, state: Any) -> Any:
        own = pair_of(jnp.zeros(2))
        own.load_state_dict(state)
        return own.a + own.b


def test_a_module_loads_its_own_boxes_and_another_name_of_one_decides() -> None:
    m = pair_of(jnp.zeros(2))
    assert not any(m.load_state_dict(m.state_dict(keep_vars=True)))
    np.testing.assert_array_equal(np.asarray(m.a), [0, 0])
    other = pair_of(jnp.ones(2))
    m.load_state_dict(other.state_dict(keep_vars=True))
    np.testing.assert_array_equal(np.asarray(m.a), [1, 1])


@pytest.mark.parametrize("there", ["first", "second"])
def test_extra_state_of_a_module_with_two_names_is_needed_once(there: str) -> None:
    class Net(nn.Module):
        value = None

        def get_extra_state(self):
            return self.value

        def set_extra_state(self, state):
            self.value = state

    m = nn.Module()
    m.first = m.second = Net()
    assert not any(m.load_state_dict({f"{there}._extra_state": 3}))
    assert m.first.value == 3
    with pytest.raises(nn.StateDictError, match="Missing"):
        m.load_state_dict({})


@pytest.mark.parametrize("there", ["norm", "norm2"])
@pytest.mark.parametrize("counter", [True, False], ids=["with counter", "without"])
def test_a_shared_batch_norm_of_an_old_version_loads_under_one_name(
    there: str, counter: bool
) -> None:
    m = nn.Module()
    m.norm = m.norm2 = nn.BatchNorm1d(3)
    with nn.device("meta"):
        shapes = nn.Module()
        shapes.norm = shapes.norm2 = nn.BatchNorm1d(3)
    given = {f"{there}.{n}": np.full(v.shape, 7, v.dtype) for n, v in m.norm.state_dict().items()}
    if not counter:
        del given[f"{there}.num_batches_tracked"]
    for model, assign in ((m, False), (m, True), (shapes, False), (shapes, True)):
        m.norm.reset_running_stats()
        assert not any(model.load_state_dict(given, assign=assign))
        assert int(model.norm2.num_batches_tracked) == (7 if counter else 0)
        np.testing.assert_array_equal(np.asarray(model.norm.running_mean), [7, 7, 7])


def test_a_pre_hook_may_rename_entries_to_names_of_one_box() -> None:
    def rename(module, state_dict, prefix, *_):
        for key in [k for k in state_dict if k.startswith(prefix + "old_")]:
            state_dict[key.replace("old_", "")] = state_dict.pop(key)

    for given, fits in (
        ({"old_b": jnp.ones(2)}, True),
        ({"old_a": jnp.ones(2), "b": np.ones(2)}, True),
        ({"old_a": jnp.ones(2), "b": jnp.zeros(2)}, False),
    ):
        m = pair_of(jnp.zeros(2))
        m.register_load_state_dict_pre_hook(rename)
        if fits:
            assert not any(m.load_state_dict(given))
            np.testing.assert_array_equal(np.asarray(m.b), [1, 1])
        else:
            with pytest.raises(nn.StateDictError, match='"a" and "b"'):
                m.load_state_dict(given)


def tied_children(first: type[nn.Module]) -> nn.Module:
    m = nn.Module()
    m.a, m.b = first(), nn.Module()
    m.a.w = nn.Parameter(jnp.zeros(2))
    m.b.w = m.a.w
    return m


def test_an_override_that_hands_on_its_own_metadata_is_loaded_by_itself() -> None:
    class Own(nn.Module):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            super()._load_from_state_dict(state_dict, prefix, {}, *rest)

    m = tied_children(Own)
    m.load_state_dict({"a.w": jnp.ones(2), "b.w": jnp.full(2, 2.0)})
    np.testing.assert_array_equal(np.asarray(m.a.w), [2, 2])
    assert m.load_state_dict({"b.w": jnp.ones(2)}, strict=False).missing_keys == ["a.w"]
    own = Own()
    own.c = own.d = nn.Parameter(jnp.zeros(2))
    assert not any(own.load_state_dict({"d": jnp.ones(2)}))


def test_an_override_may_keep_lists_of_its_own() -> None:
    class Own(nn.Module):
        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, *rest):
            mine: list[str] = []
            super()._load_from_state_dict(state, prefix, metadata, strict, mine, *rest)
            missing.extend(mine)

    m = tied_children(Own)
    assert not any(m.load_state_dict({"b.w": jnp.ones(2)}))
    assert m.load_state_dict({}, strict=False).missing_keys == ["a.w", "b.w"]


def test_a_post_hook_of_the_root_sees_no_missing_name_of_a_box_that_is_there() -> None:
    seen: list[list[str]] = []
    m = tied_children(nn.Module)
    m.register_load_state_dict_post_hook(lambda _, keys: seen.append(list(keys.missing_keys)))
    m.load_state_dict({"b.w": jnp.ones(2)})
    assert seen == [[]]


def test_a_failed_load_puts_tied_boxes_back() -> None:
    model, state = Tied(), numbered()
    before = {n: np.asarray(v) for n, v in model.state_dict().items()}
    del state["fc.weight"]
    state["norm2.running_mean"] = np.zeros(3, np.float32)
    with pytest.raises(nn.StateDictError, match=r"norm\.running_mean.*norm2\.running_mean"):
        model.load_state_dict(state, strict=False)
    assert_loaded(model, before)


def test_loading_takes_time_in_proportion_to_the_number_of_entries() -> None:
    def seconds(count: int) -> float:
        class Leaf(nn.Module):
            def __init__(self, w):
                super().__init__()
                self.w = w

        w = nn.Parameter(jnp.zeros(1))
        model = nn.ModuleList([Leaf(w) for _ in range(count)])
        one = jnp.ones(1)
        given = {f"{i}.w": one for i in range(count // 2, count)}
        start = time.perf_counter()
        model.load_state_dict(given)
        return time.perf_counter() - start

    seconds(100)
    # Twelve times the entries take twelve times the time, and 144 times if each child looks at all.
    assert min(seconds(6000) for _ in range(3)) < 36 * min(seconds(500) for _ in range(5)) + 0.05


# --------------------------------------------------------------------------------------------------
# Integers that would be cut off

INTEGERS = "int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()


def integer_buffer(dtype: str, shape: tuple[int, ...] = (3,)) -> nn.Module:
    m = nn.Module()
    m.inner = nn.Module()
    m.inner.register_buffer("n", jnp.zeros(shape, dtype))
    return m


def as_jax_would_keep(dtype: str) -> str:
    """Return the dtype that jax.numpy makes of another one here."""
    with np.errstate(all="ignore"):
        return jnp.asarray(np.zeros(1, dtype)).dtype.name


@st.composite
def integers_and_dtypes(draw: Any) -> tuple[np.ndarray, str]:
    source, target = (draw(st.sampled_from(INTEGERS)) for _ in range(2))
    limits = [int(x) for d in INTEGERS for x in (np.iinfo(d).min, np.iinfo(d).max)]
    near = [v for limit in limits for v in (limit - 1, limit, limit + 1)] + [0, 1, -1]
    own = np.iinfo(source)
    fitting = [v for v in near if own.min <= v <= own.max]
    return np.array(
        draw(st.lists(st.sampled_from(fitting), min_size=3, max_size=3)), source
    ), target


@settings(max_examples=300, deadline=None)
@drawn(integers_and_dtypes(), st.booleans(), st.booleans(), st.booleans())
def test_integers_load_as_they_are_or_not_at_all(
    given: tuple[np.ndarray, str], x64: bool, assign: bool, device: bool
) -> None:
    values, target = given
    with in_float64(x64):
        if not x64 and "64" in target:
            target = as_jax_would_keep(target)
        m = integer_buffer(target)
        # An array on the device has its dtype already.
        value = jnp.asarray(values) if device else values
        exact = [int(v) for v in np.asarray(value)]
        kept = np.iinfo(as_jax_would_keep(value.dtype.name) if assign else target)
        if all(kept.min <= v <= kept.max for v in exact):
            m.load_state_dict({"inner.n": value}, assign=assign)
            assert [int(v) for v in np.asarray(m.inner.n)] == exact
            assert m.inner.n.dtype == kept.dtype
        else:
            with pytest.raises(nn.StateDictError, match=r'"inner\.n" ') as info:
                m.load_state_dict({"inner.n": value}, assign=assign)
            for number in (min(exact), max(exact), kept.min, kept.max):
                assert str(number) in str(info.value)
            assert [int(v) for v in np.asarray(m.inner.n)] == [0, 0, 0]


BIG = 2**31


def test_a_counter_beyond_32_bits_is_refused_and_the_message_says_what_keeps_it() -> None:
    given = {"num_batches_tracked": np.array(BIG)}
    m = nn.BatchNorm1d(2)
    for assign in (False, True):
        with pytest.raises(nn.StateDictError) as info:
            m.load_state_dict(given, strict=False, assign=assign)
        assert (
            f'"num_batches_tracked" is {BIG}, and int32 has {-BIG} to {BIG - 1}: call '
            'jax.config.update("jax_enable_x64", True) before the model is built\n'
        ) in str(info.value)
    with in_float64():
        wide = nn.BatchNorm1d(2)
        wide.load_state_dict(given, strict=False)
        assert int(wide.num_batches_tracked) == BIG


def test_the_counter_of_torch_loads_as_it_is_or_not_at_all() -> None:
    theirs = torch.nn.BatchNorm1d(2)
    for count, fits in ((BIG - 1, True), (BIG, False), (BIG + 5, False), (2**40, False)):
        theirs.num_batches_tracked.fill_(count)
        state = {n: v.numpy() for n, v in theirs.state_dict().items()}
        ours = nn.BatchNorm1d(2)
        if fits:
            ours.load_state_dict(state)
            assert int(ours.num_batches_tracked) == count
        else:
            with pytest.raises(nn.StateDictError, match=str(count)):
                ours.load_state_dict(state)


@pytest.mark.parametrize(
    ("target", "value", "x64", "remedies"),
    [
        ("int8", np.array([1, 300], np.int64), False, ["assign=True takes the dtype"]),
        ("uint8", np.array([-1], np.int8), False, ["assign=True takes the dtype"]),
        ("int32", np.array([BIG]), True, ["assign=True takes the dtype"]),
        ("int32", np.array([BIG]), False, ["jax_enable_x64"]),
        ("int8", np.array([BIG]), False, ["jax_enable_x64", "load with assign=True"]),
        ("uint32", np.array([2**40]), False, ["jax_enable_x64", "load with assign=True"]),
    ],
)
def test_the_remedy_against_a_cut_works(
    target: str, value: np.ndarray, x64: bool, remedies: list[str]
) -> None:
    with in_float64(x64):
        m = integer_buffer(target, value.shape)
        with pytest.raises(nn.StateDictError) as info:
            m.load_state_dict({"inner.n": value})
    for remedy in ("assign=True", "jax_enable_x64"):
        assert (remedy in str(info.value)) == any(remedy in r for r in remedies)
    with in_float64(x64 or "jax_enable_x64" in remedies):
        built_as = "int64" if remedies == ["jax_enable_x64"] else target
        m = integer_buffer(built_as, value.shape)
        m.load_state_dict({"inner.n": value}, assign="assign=True" in str(info.value))
        np.testing.assert_array_equal(np.asarray(m.inner.n), value)


@pytest.mark.parametrize("assign", [True, False])
def test_no_integers_at_all_fit_every_dtype(assign: bool) -> None:
    m = integer_buffer("int8", (0, 3))
    m.load_state_dict({"inner.n": np.zeros((0, 3), np.int64)}, assign=assign)
    assert m.inner.n.shape == (0, 3)


def test_shapes_and_traced_integers_have_no_values_to_look_at() -> None:
    with in_float64():
        m = integer_buffer("int32")
        m.load_state_dict({"inner.n": jax.ShapeDtypeStruct((3,), jnp.int64)}, assign=True)

        @jax.jit
        def load(n):
            m = integer_buffer("int8")
            m.load_state_dict({"inner.n": n})
            return m.inner.n

        np.testing.assert_array_equal(load(jnp.arange(3)), [0, 1, 2])


class Unread(np.ndarray):
    """An array that nobody may ask for its extremes."""

    def min(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("looked at the values")

    max = min


def test_values_are_looked_at_only_where_the_dtype_is_narrower() -> None:
    for dtype in ("uint8", "int16", "int32"):
        m = integer_buffer("int32")
        m.load_state_dict({"inner.n": np.arange(3, dtype=dtype).view(Unread)})
        np.testing.assert_array_equal(np.asarray(m.inner.n), [0, 1, 2])
    m = nn.Linear(1, 1, bias=False).bfloat16()
    m.load_state_dict({"weight": np.ones((1, 1), np.float32).view(Unread)})
    with pytest.raises(AssertionError, match="looked at"):
        np.arange(3).view(Unread).min()


def test_two_names_of_one_box_are_checked_for_their_range_as_well() -> None:
    m = nn.Module()
    m.a = m.b = nn.Buffer(jnp.zeros(1, jnp.int32))
    with pytest.raises(nn.StateDictError, match='"b" is 2147483649, and int32'):
        m.load_state_dict({"a": np.array([-BIG + 1]), "b": np.array([BIG + 1])})
