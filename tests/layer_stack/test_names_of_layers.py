"""Pure calls of stacks with arrays by the names of layers, as a list has them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.layer_stack.blocks import close, inputs, listed, stacked

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def x():
    return inputs()


@pytest.fixture(scope="module")
def models():
    """A list and a stack of the same values, of which one layer is frozen."""
    found = listed(p=0.2), stacked(p=0.2)
    for model in found:
        model.blocks[1].requires_grad_(False)
    return found


def changed(model):
    return {n: 1.5 * v if v.dtype == jnp.float32 else v for n, v in model.state_dict().items()}


def test_functional_call_takes_all_layers_or_some_and_returns_buffers_by_the_same_names(models, x):
    state = changed(models[0])
    some = {n: state[n] for n in ("blocks.1.fc.weight", "blocks.3.fc.weight", "head.bias")}
    for given in (state, some):
        of_list, of_stack = (nn.functional_call(m, given, x, mutable=True, rng=KEY) for m in models)
        np.testing.assert_allclose(of_list[0], of_stack[0], rtol=1e-5, atol=1e-5)
    of_list, of_stack = (
        nn.functional_call(m, state, x, mutable=True, strict=True, rng=KEY)[1] for m in models
    )
    close(sorted(of_list.items()), sorted(of_stack.items()))


def test_pure_functions_and_gradients_of_single_examples_take_the_arrays_of_a_list(models, x):
    (of_list, params, state), (of_stack, *_) = (nn.functionalize(m, mutable=True) for m in models)
    found = [jax.jit(fn)(params, state, x, rng=KEY) for fn in (of_list, of_stack)]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    close(sorted(found[0][1].items()), sorted(found[1][1].items()))

    def gradients(model):
        fn = nn.functionalize(model.eval())[0]
        return jax.vmap(jax.grad(lambda p, x: fn(p, x[None]).sum()), (None, 0))(params, x)

    close(*[gradients(m).items() for m in models], tolerance=1e-4)


def test_stacks_in_stacks_take_names_of_layers_of_layers():
    with nn.rng_scope(jax.random.key(0)):
        lists = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)])
    model = nn.LayerStack(lambda: nn.LayerStack(lambda: nn.Linear(4, 4), 2), 3)
    params, x = dict(lists.named_parameters()), jnp.arange(8.0).reshape(2, 4)
    for given in (params, params | {"2.1.weight": jnp.eye(4)}):
        expected = nn.functional_call(lists, given, x)
        np.testing.assert_allclose(nn.functional_call(model, given, x), expected, rtol=1e-5)


def test_what_does_not_fit_is_named(models, x):
    entry = {"blocks.3.fc.weight": jnp.ones((6, 6))}
    stored = {"blocks.2-3.fc.weight": jnp.ones((2, 6, 6))}

    def refused(error, text, given, **options):
        with pytest.raises(error, match=text):
            nn.functional_call(models[1], given, x, **options)

    refused(ValueError, r"'blocks\.3\.fc\.weight' and 'blocks\.2-3\.fc\.weight'", entry | stored)
    refused(
        nn.UnknownNameError, r"1 of the 2 arrays.*'blocks\.2-3\.fc\.weight'", entry, strict=True
    )
    refused(nn.UnknownNameError, r"'blocks\.4\.fc\.weight'", {"blocks.4.fc.weight": jnp.ones(1)})
    refused(nn.ShapeError, r"'blocks\.3\.fc\.weight'", {"blocks.3.fc.weight": jnp.ones(1)})
    refused(nn.ArgumentError, r"'blocks\.3\.fc\.weight'", {"blocks.3.fc.weight": None})


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(5, 6)

    def forward(self, x):
        return self.down(self.up(x))


def test_an_error_inside_of_a_layer_names_its_path_or_that_of_all_layers_of_the_loop(x):
    model = nn.Sequential(nn.LayerStack(Wrong, 3))

    def path():
        with pytest.raises(nn.ShapeError) as raised:
            model(x)
        return raised.value.__notes__

    assert path() == ["raised in '0.*.down' of Sequential (Linear)"]
    model[0][2].requires_grad_(False)
    assert path() == ["raised in '0.0-1.down' of Sequential (Linear)"]
    model[0][0].up.register_forward_hook(lambda module, args, output: None)
    assert path() == ["raised in '0.0.down' of Sequential (Linear)"]
    nested = nn.LayerStack(lambda: nn.LayerStack(Wrong, 2, remat=True), 2)
    with pytest.raises(nn.ShapeError) as raised:
        nn.jit(nested)(x)
    assert raised.value.__notes__ == ["raised in '*.*.down' of LayerStack (Linear)"]


class Pair(nn.Module):
    def forward(self, x):
        return [x, x]


def test_a_layer_that_returns_another_structure_is_told_what_a_loop_needs(x):
    with pytest.raises(nn.StructureChangeError) as raised:
        nn.LayerStack(Pair, 2)(x)
    assert "same structure" in raised.value.__notes__[0]
