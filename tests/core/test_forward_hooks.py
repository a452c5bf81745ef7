"""Forward and forward-pre hooks; torch is the oracle."""

from __future__ import annotations

import pytest


def double(lib):
    class Double(lib.nn.Module):
        def forward(self, x, *, add=0.0):
            return 2 * x + add

    return Double()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_run_in_registration_order_and_prepended_ones_first(agree, register):
    def scenario(lib):
        order = []
        m = double(lib)
        for i in range(5):
            getattr(m, register)(lambda *args, i=i: order.append(i), prepend=i in (1, 4))
        m(lib.ones(1))
        return order

    assert agree(scenario) == [4, 1, 0, 2, 3]


@pytest.mark.parametrize("result", ["none", "array", "tuple"])
def test_a_pre_hook_may_replace_the_input(agree, result):
    def scenario(lib):
        m = double(lib)
        new = {"none": None, "array": lib.ones(1) * 10, "tuple": (lib.ones(1) * 20,)}[result]
        m.register_forward_pre_hook(lambda module, args: new)
        return m(lib.ones(1))

    agree(scenario)


def test_a_forward_hook_s_result_replaces_the_output(agree):
    def scenario(lib):
        m = double(lib)
        seen = []
        m.register_forward_hook(lambda module, args, out: out * 10)
        m.register_forward_hook(lambda module, args, out: seen.append((args, out)))
        return m(lib.ones(1)), seen

    agree(scenario)


def test_hooks_with_kwargs_see_and_replace_keyword_arguments(agree):
    def scenario(lib):
        seen = []

        def pre(module, args, kwargs):
            seen.append(("pre", args, kwargs))
            return args, {"add": kwargs["add"] * 2}

        def post(module, args, kwargs, out):
            seen.append(("post", args, kwargs))

        m = double(lib)
        m.register_forward_pre_hook(pre, with_kwargs=True)
        m.register_forward_hook(post, with_kwargs=True)
        return m(lib.ones(1), add=lib.ones(1)), seen

    agree(scenario)


def test_a_pre_hook_with_kwargs_that_returns_something_else_is_an_error(agree):
    def scenario(lib):
        m = double(lib)
        m.register_forward_pre_hook(lambda m, a, k: a, with_kwargs=True)
        m(lib.ones(1))

    agree(scenario, raises=RuntimeError)


def test_a_handle_removes_its_hook_and_is_a_context_manager(agree):
    def scenario(lib):
        calls = []
        m = double(lib)
        handle = m.register_forward_hook(lambda *a: calls.append("kept"))
        with m.register_forward_hook(lambda *a: calls.append("inside")):
            m(lib.ones(1))
        m(lib.ones(1))
        handle.remove()
        handle.remove()
        m(lib.ones(1))
        return calls

    agree(scenario)


def test_a_hook_may_remove_itself_while_running(agree):
    def scenario(lib):
        calls = []
        m = double(lib)

        def once(*args):
            calls.append("once")
            handle.remove()

        handle = m.register_forward_hook(once)
        m.register_forward_hook(lambda *a: calls.append("always"))
        m(lib.ones(1))
        m(lib.ones(1))
        return calls

    agree(scenario)


def test_a_hook_registered_by_a_running_hook_runs_in_the_next_call(agree):
    def scenario(lib):
        calls = []
        m = double(lib)

        def adder(*args):
            handle.remove()
            m.register_forward_hook(lambda *a: calls.append("added"))

        handle = m.register_forward_hook(adder)
        m(lib.ones(1))
        calls.clear()
        m(lib.ones(1))
        return calls

    assert agree(scenario) == ["added"]


@pytest.mark.parametrize("where", ["forward", "pre_hook", "hook"])
def test_always_call_hooks_run_once_when_something_raises(agree, where):
    def scenario(lib):
        calls = []

        class Fails(lib.nn.Module):
            def forward(self, x):
                if where == "forward":
                    raise ValueError("from forward")
                return x

        def fail(*args):
            raise ValueError("from " + where)

        m = Fails()
        if where == "pre_hook":
            m.register_forward_pre_hook(fail)
        m.register_forward_hook(lambda *a: calls.append("always"), always_call=True)
        if where == "hook":
            m.register_forward_hook(fail)
        m.register_forward_hook(lambda *a: calls.append("plain"))
        message = "no error"
        try:
            m(lib.ones(1))
        except ValueError as error:
            message = str(error)
        return calls, message

    agree(scenario)


def test_an_always_call_hook_runs_once_when_nothing_raises(agree):
    def scenario(lib):
        calls = []
        m = double(lib)
        m.register_forward_hook(lambda *a: calls.append(1), always_call=True)
        m(lib.ones(1))
        return calls

    agree(scenario)


def test_hooks_of_children_nest_inside_those_of_the_parent(agree):
    def scenario(lib):
        calls = []
        m = lib.nn.Sequential(double(lib), double(lib))
        for name, x in m.named_modules():
            x.register_forward_pre_hook(lambda m, a, n=name: calls.append(("pre", n)))
            x.register_forward_hook(lambda m, a, o, n=name: calls.append(("post", n)))
        m(lib.ones(1))
        return calls

    agree(scenario)


def test_global_hooks_fire_for_every_module_before_local_ones(agree):
    def scenario(lib):
        calls = []
        m = lib.nn.Sequential(double(lib))
        m[0].register_forward_hook(lambda *a: calls.append("local post"))
        m[0].register_forward_pre_hook(lambda *a: calls.append("local pre"))
        pre = lib.hooks.register_module_forward_pre_hook(
            lambda m, a: calls.append(("global pre", type(m).__name__))
        )
        post = lib.hooks.register_module_forward_hook(
            lambda m, a, o: calls.append(("global post", type(m).__name__))
        )
        try:
            m(lib.ones(1))
        finally:
            pre.remove()
            post.remove()
        m(lib.ones(1))
        return calls

    agree(scenario)


def test_a_hook_may_call_the_module_s_forward_again(agree):
    def scenario(lib):
        m = double(lib)
        m.register_forward_hook(lambda module, args, out: module.forward(out))
        return m(lib.ones(1))

    agree(scenario)


def test_forward_called_directly_runs_no_hook(agree):
    def scenario(lib):
        calls = []
        m = double(lib)
        m.register_forward_hook(lambda *a: calls.append(1))
        m.forward(lib.ones(1))
        return calls

    agree(scenario)


def test_a_hook_survives_deepcopy_and_its_handle_removes_it_from_the_original_only(agree):
    import copy

    def scenario(lib):
        calls = []
        m = double(lib)
        handle = m.register_forward_hook(lambda *a: calls.append(1))
        other = copy.deepcopy(m)
        handle.remove()
        m(lib.ones(1))
        original = len(calls)
        other(lib.ones(1))
        return original, len(calls)

    agree(scenario)


def test_a_forward_hook_sees_the_output_of_a_module_called_twice_twice(agree):
    def scenario(lib):
        seen = []
        inner = double(lib)

        class Twice(lib.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(self.inner(x))

        inner.register_forward_hook(lambda m, a, o: seen.append(o))
        out = Twice()(lib.ones(1))
        return out, seen

    agree(scenario)
