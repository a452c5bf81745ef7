"""state_dict and load_state_dict; torch is the oracle."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn


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
    """A state dict for `m` whose values are known to both libraries."""
    out = {}
    for i, (name, value) in enumerate(m.state_dict().items()):
        array = np.full(tuple(value.shape), start + i)
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


def test_two_names_of_one_parameter_with_different_values_are_not_silent():
    m = nn.Module()
    m.a = nn.Parameter(jnp.zeros(1))
    m.b = m.a
    state = {"a": jnp.ones(1), "b": 2 * jnp.ones(1)}
    # torch loads both, the last wins. Here either that, or an error of ours; never a broken tie.
    try:
        m.load_state_dict(state)
    except nn.StatefulnnError:
        assert float(m.a[0]) == 0
    else:
        assert float(m.a[0]) == 2
    assert m.a is m.b


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
