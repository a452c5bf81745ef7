"""Habits of torch, JAX and Flax: each is answered with the code that does it here, and that code runs."""

from __future__ import annotations

import copy
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import statefulnn as nn
import statefulnn.functional as F
from statefulnn.core import habits
from statefulnn.core.extras import import_extra
from statefulnn.core.refusals import to_shape


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(jax.nn.relu(self.fc(x)))


class Fields(nn.Module):
    features: int

    def forward(self, x):
        return x


class SetUp(nn.Module):
    def setup(self):
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x)


class Nothing(nn.Module):
    def forward(self, x):
        x + 1


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = jax.random.key(0)

    def forward(self, x):
        self.key, key = jax.random.split(self.key)
        return x + jax.random.normal(key, x.shape)


def in_a_list():
    model = nn.Module()
    model.layers = []
    model.layers.append(nn.Linear(3, 3))
    return model


def built_inside(model, x, y):
    opt = nn.Optimizer(model, optax.sgd(0.1, momentum=0.9))
    opt.step(nn.grad(loss_fn)(model, x, y))


class Trainer:
    def __init__(self, model, opt):
        self.model, self.opt = model, opt

    def step(self, x, y):
        self.opt.step(nn.grad(loss_fn)(self.model, x, y))


def loss_fn(model, x, y):
    return F.mse_loss(model(x), y)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Return what a user has at hand, under the names that the messages use."""
    monkeypatch.chdir(tmp_path)
    # A machine with a GPU would have one that these are about.
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    model, x, y = Net(), jnp.ones((5, 3)), jnp.zeros((5, 2))
    nn.save(model, "model.safetensors")
    state_dict = model.state_dict()
    torch.save({k: torch.tensor(np.array(v)) for k, v in state_dict.items()}, "file.pt")
    tx = optax.adam(1e-3)
    renormed = nn.BatchNorm1d(3)
    renormed.running_mean = jnp.zeros(4)
    return {
        **globals(),
        **{k: v for k, v in locals().items() if k not in ("monkeypatch", "tmp_path")},
        "opt": nn.Optimizer(model, tx),
        "injected": nn.Optimizer(model, optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)),
        "fn": nn.functionalize(model)[0],
        "params": nn.functionalize(model)[1],
        "grads": nn.grad(loss_fn)(model, x, y),
        "other": Net(),
        "p": model.fc.weight,
        "key": jax.random.key(0),
        "labels": jnp.array([0, 1, 1, 0, 1]),
        "logits": jnp.zeros((5, 2)),
        "tensor": torch.ones(5, 3),
        "images": jnp.ones((2, 8, 8, 3)),
        "conv": nn.Conv2d(3, 4, 3),
        "layers": [nn.ReLU(), nn.Tanh()],
        "layer": nn.Linear(3, 3),
        "torch_module": torch.nn.Linear(3, 2),
        "array": jnp.ones(3),
        "values": [1.0, 2.0],
        "self": nn.Module(),
        "n": 5,
        "in_features": 3,
        "out_features": 2,
        "in_channels": 3,
        "out_channels": 4,
        "kernel_size": 3,
        "num_features": 3,
        "num_embeddings": 5,
        "embedding_dim": 2,
        "normalized_shape": 3,
    }


# (the mistake, the code that its message holds, what the names in that code stand for)
MISTAKES: list[tuple[str, str, str]] = [
    # torch's namespace
    ("nn.no_grad()", "model.eval()(x)", ""),
    ("nn.inference_mode()", "jax.lax.stop_gradient(model(x))", ""),
    ("nn.autograd.grad(y, x)", "grads = nn.grad(loss_fn)(model, x, y)", ""),
    ("nn.optim.Adam(model.parameters())", "opt = nn.Optimizer(model, optax.adam(1e-3))", ""),
    ("nn.cuda.is_available()", "model.to(jax.devices()[0])", ""),
    ("nn.tensor([1.0])", "jnp.asarray(values)", ""),
    ("nn.Tensor", "jnp.asarray(values)", ""),
    ("nn.zeros(3)", "jnp.zeros", ""),
    ("nn.float32", "jnp.float32", ""),
    ("nn.relu(x)", "import statefulnn.functional as F; F.relu", ""),
    ("nn.compile(model)", "nn.jit(model)(x)", ""),
    ("nn.DataParallel(model)", "nn.parallel.data_parallel(model, mesh)",
     'mesh = jax.make_mesh((1,), ("data",))'),
    ("nn.from_torch(torch_module)", "nn.bridge.torch.from_torch(torch_module, x)",
     "x = tensor"),
    ("nn.load_state_dict(state_dict)", "model.load_state_dict(state_dict)", ""),
    ("nn.load(model)", 'model.load_state_dict(nn.load("model.safetensors"))', ""),
    ('nn.save("a.pt", model)', 'nn.save(model, "model.safetensors")', ""),
    ("nn.cat([x, x])", "jnp.concatenate([x, x])", ""),
    ("nn.randn(3)", "jax.random.normal(nn.next_key(), (3,))", ""),
    ("nn.Adam(model.parameters())", "opt = nn.Optimizer(model, optax.adam(1e-3))", ""),
    # Equinox's
    ("nn.filter_jit(model)", "nn.jit(model)(x)", ""),
    ("nn.filter_grad(loss_fn)", "grads = nn.grad(loss_fn)(model, x, y)", ""),
    ("nn.filter_vmap(model)", "nn.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, x)", ""),
    ("nn.partition(model)", "moduledef, leaves = nn.split(model)", ""),
    ("nn.combine(model)", "model = nn.merge(moduledef, leaves)", "moduledef, leaves = nn.split(model)"),
    ("nn.tree_at", "model.fc.weight.value = jnp.zeros_like(model.fc.weight)", ""),
    ("nn.apply_updates(model, grads)", "opt.step(grads)", ""),
    # Flax's
    ("nn.compact", "self.fc = nn.Linear(in_features, out_features)", ""),
    ("nn.Dense(features=3)", "nn.Linear(in_features, out_features)", ""),
    ("nn.Rngs(0)", "nn.manual_seed(0)", ""),
    ("nn.Param(x)", "nn.Parameter(array)", ""),
    ("nn.Linear(3, 4, rngs=key)", "nn.manual_seed(0)", ""),
    ("nn.Linear(3, 4, kernel_init=None)", "nn.init.xavier_uniform_(layer.weight)", ""),
    ("nn.Dropout(rate=0.5)", "nn.Dropout(0.5)", ""),
    ("nn.Dropout(0.5, rngs=key)", "nn.manual_seed(0)", ""),
    ("model.freeze()", "model.requires_grad_(False)", ""),
    ("p.trainable", "p.requires_grad", ""),
    ("Fields(features=3)", "self.features = features", "features = 3"),
    ("model.init(key, x)", "fn, params = nn.functionalize(model); out = fn(params, x)", ""),
    ("model.apply(params, x)", "fn, params = nn.functionalize(model); out = fn(params, x)", ""),
    ("nn.Dropout()(x, key)", "with nn.rng_scope(key): out = model(x)", ""),
    ("nn.Dropout()(x, rngs={'dropout': key})", "with nn.rng_scope(key): out = model(x)", ""),
    ("nn.Dropout()(x, deterministic=True)", "model.eval()(x)", ""),
    ("model(x, train=True)", "model.train(True)(x)", ""),
    ("nn.manual_seed(key)", "with nn.rng_scope(key): out = model(x)", ""),
    ("F.dropout(x, 0.5, key)", "F.dropout(input, p, rng=key)", "input, p = x, 0.5"),
    # optimizers
    ("opt.step()", "opt.step(grads)", ""),
    ("opt.step(loss_fn(model, x, y))", "opt.step(grads)", ""),
    ("opt.zero_grad()", "loss, grads = nn.value_and_grad(loss_fn)(model, x, y); opt.step(grads)", ""),
    ("opt.update(grads)", "opt.step(grads)", ""),
    ("opt.learning_rate = 0.1", "opt.lr = 1e-4",
     "opt = nn.Optimizer(model, optax.inject_hyperparams(optax.adam)(learning_rate=1e-3))"),
    ("opt.param_groups[0]['lr']", "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)", ""),
    ("nn.Optimizer(model.parameters(), lr=0.1)", "nn.Optimizer(model, optax.adam(1e-3))", ""),
    ("nn.Optimizer(model.parameters(), tx)", "nn.Optimizer(model, optax.adam(1e-3))", ""),
    ("nn.Optimizer((model, other), tx)", "nn.Optimizer(nn.ModuleList([a, b]), optax.adam(1e-3))",
     "a, b = model, other"),
    ("nn.Optimizer(model, tx, wrt=nn.Parameter)", "nn.Optimizer(model, optax.adam(1e-3), only=\"fc.*\")", ""),
    ("opt.model", "opt.module", ""),
    ("opt.step({n: g.tolist() for n, g in grads.items()})",
     'grads["fc.weight"] = jnp.asarray(grads["fc.weight"])', ""),
    ("nn.Optimizer(model, optax.adam)", "nn.Optimizer(model, optax.adam(1e-3))", ""),
    ("tx.init(model.parameters())", "tx.init(params)", ""),
    ("nn.Optimizer(tx, model)", "nn.Optimizer(model, tx)", ""),
    ("opt.step(model, grads)", "opt.step(grads)", ""),
    ('opt.step({n: g.T if g.ndim == 2 else g for n, g in grads.items()})', "grads['fc.weight'].T", ""),
    ("opt.weight_decay = 1.0", "opt.hyperparams.weight_decay = 0.9",
     "opt = nn.Optimizer(model, optax.inject_hyperparams(optax.adamw)(1e-3, weight_decay=0.5))"),
    ("opt.step_size = 1.0", "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)", ""),
    ("opt.eta = 1.0", "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)", ""),
    ("opt.hyperparams.learning_rate = 0.1", "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)", ""),
    ("injected.hyperparams.lr = 0.1", "opt.hyperparams.learning_rate = 0.1",
     "opt = injected"),
    ("opt.mu.fc.rate = 0.1", "one of these names", "pip"),
    ("nn.jit(built_inside)(model, x, y)", "opt = nn.Optimizer(model, tx)", ""),
    # parameters
    ("p.backward()", "grads = nn.grad(loss_fn)(model, x, y)", ""),
    ("p.numel()", "p.size", ""),
    ("p.add_(1)", "p.value = p + other", "other = 1"),
    ("p.zero_()", "p.value = jnp.zeros_like(p)", ""),
    ("p.normal_()", "nn.init.normal_(p)", ""),
    ("p.cpu()", "np.asarray(p)", ""),
    ("p.view(2, 6)", "p.reshape(-1)", ""),
    ("p.float()", "p.astype(jnp.float32)", ""),
    ("nn.Parameter(tensor)", "jnp.asarray(value.numpy())", "value = tensor"),
    ("nn.init.normal_(p.value)", "init.normal_(module.weight)",
     "init, module = nn.init, layer"),
    ("model.fc.weight = array", "module.weight.value = array",
     "module, array = model.fc, jnp.ones((4, 3))"),
    # modules
    ("model.backward()", "grads = nn.grad(loss_fn)(model, x, y)", ""),
    ("model.params", "fn, params = nn.functionalize(model)", ""),
    ("model.parameters()[0]", "list(model.parameters())[0]", ""),
    ("len(model.parameters())", "sum(p.size for p in model.parameters())", ""),
    ("nn.Lambda(lambda x: F.softmax(x, axis=-1))(x)", "F.softmax(x, dim=1)", ""),
    ("SetUp()(x)", "self.fc = nn.Linear(in_features, out_features)", ""),
    ("model.requires_grad = False", "model.requires_grad_(False)", ""),
    ("model.train = True", "model.train(True)", ""),
    ("model.train = False", "model.eval()", ""),
    ("model.eval = True", "model.eval()", ""),
    ("model.requires_grad = True", "model.requires_grad_(True)", ""),
    ("nn.Dropout().deterministic = True", "model.eval()", ""),
    ("nn.Dropout().deterministic = False", "model.train(True)", ""),
    ("nn.Dropout().rate = 0.0", "layer.p = 0.1", ""),
    ("nn.BatchNorm1d(3).use_running_average = True", "model.eval()", ""),
    ("nn.BatchNorm1d(3).is_training = False", "model.eval()", ""),
    ("nn.BatchNorm1d(3).epsilon = 1e-3", "layer.eps = 1e-6", ""),
    ("nn.BatchNorm1d(3)(x, use_running_average=False)", "model.train(True)(x)", ""),
    ("layer.trainable = False", "model.requires_grad_(False)", ""),
    ("layer.frozen = True", "model.requires_grad_(False)", ""),
    ("layer.kernel = array", "layer.weight.value = jnp.zeros_like(layer.weight)", ""),
    ('model.parameters()["fc.weight"]', "model.get_parameter('fc.weight')", ""),
    ("list(in_a_list().parameters())", "nn.ModuleList", ""),
    ("dict(in_a_list().named_parameters())", "nn.ModuleList", ""),
    ("list(in_a_list().buffers())", "nn.ModuleList", ""),
    ('layer.load_state_dict({"weight": jnp.ones((3, 5)), "bias": jnp.ones(3)})',
     "model.load_state_dict(state_dict, strict=False)",
     'state_dict = {n: a for n, a in state_dict.items() if n != "fc.weight"}'),
    ('model.fc.load_state_dict({"weight": jnp.ones((3, 4)), "bias": jnp.ones(4)})',
     "state_dict['weight'] = state_dict['weight'].T", 'state_dict = {"weight": jnp.ones((3, 4))}'),
    ("model.load_state_dict(opt.state_dict())", "opt.load_state_dict(state_dict)",
     "state_dict = opt.state_dict()"),
    ("model.load_state_dict(nn.Optimizer(model, optax.sgd(0.1, 0.9)).state_dict())",
     "opt.load_state_dict(state_dict)", "state_dict = opt.state_dict()"),
    ("model.device", "next(model.parameters()).device", ""),
    ("model.cuda()", 'pip install -U "jax[cuda13]"', "pip"),
    ('model.to("cuda:3")', 'device="cpu:0"', ""),
    ("model.to(torch.float32)", "dtype=jnp.float32", ""),
    ("model.to(jnp.int32)", "model.to(jnp.float32)", ""),
    ('model.load_state_dict({f"module.{n}": v for n, v in state_dict.items()})',
     "nn.utils.consume_prefix_in_state_dict_if_present(state_dict, 'module.')", ""),
    ('layer.load_state_dict({"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)})',
     'state_dict["weight"] = state_dict.pop("kernel").T', 'state_dict = {"kernel": jnp.ones((3, 3))}'),
    ('model.load_state_dict("file.pt")', "model.load_state_dict(nn.load('file.pt'))", ""),
    ("model.load_state_dict(model.state_dict)", "model.load_state_dict(other.state_dict())", ""),
    ("model.load_state_dict(torch.load('file.pt'))", "{name: t.numpy() for name, t in state_dict.items()}",
     "state_dict = torch.load('file.pt')"),
    ("nn.Sequential(nn.Linear(2, 2), nn.ReLU)", "nn.ReLU()", ""),
    ("nn.Sequential([nn.ReLU(), nn.Tanh()])", "nn.Sequential(*layers)", ""),
    ("nn.Sequential(nn.Linear(2, 2), F.relu)", "nn.Lambda(relu)", "relu = F.relu"),
    ("nn.ModuleList(layers)(x)", "nn.Sequential(*layers)", ""),
    # layers
    ("nn.Linear(n / 2, 2)", "n // 2", ""),
    ("nn.BatchNorm1d(3, epsilon=0.1)", "nn.BatchNorm1d(num_features, eps=0.1)", ""),
    ("nn.Linear(in_dim=3)", "nn.Linear(in_features, out_features)", ""),
    ("nn.Linear(3, 2, biass=False)", "nn.Linear(in_features, out_features, bias=False)", ""),
    ("nn.ReLU(inplac=True)", "nn.ReLU(inplace=True)", ""),
    ("nn.Sigmoid(inplace=True)", "nn.Sigmoid()", ""),
    ("F.cross_entropy(jnp.zeros((2, 5, 7)), jnp.zeros((2, 5), jnp.int32))",
     "F.cross_entropy(jnp.moveaxis(input, -1, 1), target)",
     "input, target = jnp.zeros((2, 5, 7)), jnp.zeros((2, 5), jnp.int32)"),
    ("F.mse_loss(Nothing()(x), y)", "return out", "pip"),
    ("nn.Sequential(nn.Conv2d(3, 2, 3), nn.Linear(72, 2))(jnp.moveaxis(images, -1, 1))",
     "nn.Sequential(nn.Flatten(), nn.Linear(72, 2))", ""),
    ("nn.Linear(10, 2)(images)", "nn.Sequential(nn.Flatten(), nn.Linear(192, 2))", ""),
    ("renormed(x)", "layer.running_mean = jnp.zeros((3,))", ""),
    ("F.mse", "F.mse_loss(model(x), y)", ""),
    ("F.cross_entropy_loss", "F.cross_entropy(logits, labels)", ""),
    ("nn.Linear(x)", "nn.Linear(in_features, out_features)(input)", "input = x"),
    ("nn.ReLU(x)", "nn.ReLU()(input)", "input = x"),
    ("nn.Sigmoid(x)", "nn.Sigmoid()(input)", "input = x"),
    ("nn.MSELoss(model(x), y)", "nn.MSELoss()(input, target)", "input, target = x, x"),
    ("nn.CrossEntropyLoss(logits)", "nn.CrossEntropyLoss()(input, target)",
     "input, target = logits, labels"),
    ("conv(images)", "jnp.moveaxis(input, -1, 1)", "input = images"),
    ("conv(images[0])", "jnp.moveaxis(input, -1, 0)", "input = images[0]"),
    ("layer(x.astype(jnp.int32))", "input.astype(jnp.float32)", "input = x"),
    ("layer(x.astype(jnp.float16))", "module.to(jnp.float16)", "module = layer"),
    ("layer(tensor)", "jnp.asarray(input.numpy())", "input = tensor"),
    ("F.cross_entropy(logits, labels[:, None])", "target.reshape((5,))", "target = labels[:, None]"),
    ("F.cross_entropy(logits, jnp.eye(2, dtype=jnp.int32)[labels])", "target.argmax(1)",
     "target = jnp.eye(2)[labels]"),
    ("F.cross_entropy(logits, labels.astype(jnp.float32))", "target.astype(jnp.int32)", "target = labels"),
    ("F.cross_entropy(labels, logits)", "F.cross_entropy(logits, targets)", "targets = labels"),
    ("nn.Sequential(nn.GRU(3, 4), nn.Linear(4, 2))(x)", "out, *rest = layer(x)",
     "layer = nn.GRU(3, 4)"),
    ("nn.GRU(3, 4, batch_first=True)(x[None], lengths=x[None, :, 0] > 0)", "lengths.sum(1)",
     "lengths = x > 0"),
    ("layer(np.array([None, 1.0]))", "input.astype(np.float32)", "input = np.ones(2, object)"),
    # transformations
    ("nn.grad(x)", "nn.grad(lambda model: F.mse_loss(model(x), y))(model)", ""),
    ("nn.jit(x)", "nn.jit(lambda model, x: model(x))(model, x)", ""),
    ("nn.grad(lambda m: m(x))(model)", "loss.mean()", "loss = x"),
    ("nn.value_and_grad(lambda m: (m(x).sum(), x))(model)", "nn.value_and_grad(f, has_aux=True)",
     "f = lambda m: m(x).sum()"),
    ("nn.jit(model)(tensor)", "jnp.asarray(x.numpy())", "x = tensor"),
    ("nn.jit(lambda m, batch: m(batch[0]))(model, (tensor, tensor))",
     "jnp.asarray(batch[0].numpy())", "batch = [tensor]"),
    ("nn.jit(lambda m, x, mode: m(x))(model, x, 'train')", "nn.jit(f, static_argnames='mode')",
     "f = lambda m, x, mode: m(x)"),
    ("nn.jit(lambda m, xs: m(x))(model, np.array([None, 1.0]))", "xs.astype(np.float32)",
     "xs = np.ones(2, object)"),
    ("nn.jit(lambda m, x: m(x).sum().item())(model, x)", "float(out)", "out = x.sum()"),
    ("nn.jit(lambda m, x: x if x.sum() > 0 else -x)(model, x)", "jnp.where(condition, a, b)",
     "condition, a, b = True, x, x"),
    ("nn.jit(lambda m, x, train: m(x) if train else x)(model, x, True)",
     'nn.jit(f, static_argnames="train")', "f = lambda m, x, train: m(x)"),
    ("nn.jit(Trainer.step)(Trainer(model, opt), x, y)", "step(model, opt, x)",
     "step = lambda model, opt, x: model(x)"),
    ("nn.jit(lambda m, x: opt.step(nn.grad(lambda m: m(x).sum())(m)))(model, x)",
     "step(model, opt, x)", "step = lambda model, opt, x: model(x)"),
    ("nn.vmap(lambda m, x: m(x))(model, x)", "nn.vmap(f, in_axes=(None, 0))(model, xs)",
     "f, xs = (lambda m, x: m(x)), x"),
    ("nn.grad(loss_fn, model)", "nn.grad(loss_fn)(model, x, y)", ""),
    ("nn.value_and_grad(loss_fn, model)", "nn.value_and_grad(loss_fn)(model, x, y)", ""),
    ('nn.grad(loss_fn, argnums="model")', "nn.grad(loss_fn, argnums=0)(model, x, y)", ""),
    ("nn.func.jacrev(lambda m, x: m(x), model)", "nn.func.jacrev(loss_fn)(model, x, y)", ""),
    ("nn.vmap(lambda m, x: m(x), model)", "nn.vmap(f, in_axes=(None, 0))(model, xs)",
     "f, xs = (lambda m, x: m(x)), x"),
    ("nn.func.hessian(loss_fn, model)", "nn.func.hessian(loss_fn)(model, x, y)", ""),
    ("nn.value_and_grad(lambda m: (m(x), m(x).sum()), has_aux=True)(model)", "loss, aux",
     "loss, aux = x, y"),
    ('nn.jit(lambda m, x: print(f"{m(x).sum():.3f}"))(model, x)',
     'jax.debug.print("loss {l:.3f}", l=loss)', "loss = x.sum()"),
    ("jax.vmap(lambda k: nn.Linear(3, 1))(jax.random.split(key, 2))",
     "nn.vmap(lambda: nn.Linear(3, 1), axis_size=n)()", ""),
    ("nn.capture(model, x)", "out, outputs = nn.capture(model)(x)", ""),
    ("nn.jit(nn.Linear)(3, 1)", "Linear(3, 1)", "Linear = nn.Linear"),
    ("nn.jit(Noisy())(x)", "nn.next_key()", ""),
    ("nn.summary(model, (5, 3))", 'nn.summary(model, jax.ShapeDtypeStruct((5, 3), "float32"))', ""),
    ("nn.summary(model, input_size=(5, 3))",
     'nn.summary(model, jax.ShapeDtypeStruct((5, 3), "float32"))', ""),
    ("nn.explore(model, (5, 3))", 'nn.explore(model, jax.ShapeDtypeStruct((5, 3), "float32"))', ""),
    ("nn.audit(model, (5, 3))", 'nn.audit(model, jax.ShapeDtypeStruct((5, 3), "float32"))', "pip"),
    ("nn.audit(model)", "nn.audit(model, x)", ""),
    # inner loops
    ("nn.meta.over_tasks(loss_fn, params, x[None])", "nn.meta.over_tasks(one_task)(params, x, y)",
     "one_task = lambda p, x, y: F.mse_loss(fn(p, x), y)"),
    ("nn.meta.adapt(params, fn, F.mse_loss, (x, y), lr=0.1)",
     "adapt(fn, params, loss, (x, y), lr=0.01)", "adapt, loss = nn.meta.adapt, F.mse_loss"),
    ("nn.meta.adapt(fn, params, lambda p, x, y: 0.0, (x, y), lr=0.1)",
     "adapt(None, params, loss, (x, y), lr=0.01)",
     "adapt, loss = nn.meta.adapt, lambda p, x, y: F.mse_loss(fn(p, x), y)"),
    ("fn(nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=0.1), x)", "adapted.params",
     "adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=0.1)"),
    ("nn.jit(lambda x: x[x > 0])(x)", "jnp.where(x > 0, x, 0)", ""),
    ("nn.jit(lambda x, n: [x for _ in range(n)])(x, 3)", "nn.jit(f, static_argnums=1)",
     "f = lambda x, n: x"),
]  # fmt: skip
MISTAKES_OF_PYTHON = ("axis=-1",)
MISTAKES_OF_JAX = (
    "item()",
    "print(f",
    "else -x",
    "if train",
    "x[x > 0]",
    "range(n)",
)  # which raises its own classes


def answer(mistake: str, names: dict) -> Exception:
    with pytest.raises(Exception) as info:
        exec(mistake, names)
    return info.value


@pytest.mark.parametrize(
    ("mistake", "remedy", "with_names"), MISTAKES, ids=[mistake for mistake, *_ in MISTAKES]
)
def test_the_message_of_a_mistake_holds_code_that_runs(mistake, remedy, with_names, names):
    error = answer(mistake, names)
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    assert remedy in text.partition("Instead:")[2]
    if not any(part in mistake for part in (*MISTAKES_OF_JAX, *MISTAKES_OF_PYTHON)):
        assert isinstance(error, (nn.StatefulnnError, ValueError, NotImplementedError))
    if with_names != "pip":
        exec(with_names, names)
        exec(remedy, names)


TABLES = (
    habits.PACKAGE,
    habits.OPTIM,
    habits.MODULE,
    habits.OPTIMIZER,
    habits.BOX,
    habits.CONSTRUCTOR,
    habits.CALL,
    habits.FLAGS,
    habits.SETTINGS,
    habits.FUNCTIONAL,
)
ANSWERS = sorted({answer.instead for table in TABLES for answer in table.values()})


@pytest.mark.parametrize("instead", ANSWERS)
def test_the_code_of_every_answer_runs(instead, names):
    if "double" in instead or "float64" in instead:
        names["p"] = names["p"].value  # where 64-bit types are off, jnp warns and gives 32
        instead = "p"
    names["other"] = names["p"] * 0.5 if "p.value" in instead else names["other"]
    if "from_torch" in instead:
        names["x"] = names["tensor"]
    code = instead.replace(", then ", "\n").replace(" inside of a loss", "")
    exec(code, names)


def test_a_name_with_an_answer_is_still_missing_for_those_who_ask(names):
    for owner, table in (
        (nn, habits.PACKAGE),
        (nn.optim, habits.OPTIM),
        (names["model"], habits.MODULE),
        (names["opt"], habits.OPTIMIZER),
        (names["p"], {**habits.BOX, "view": None}),
    ):
        there = {name for name in table if hasattr(owner, name)}
        assert there <= {"view"}, (type(owner), there)
    copy.deepcopy(names["model"])
    assert not hasattr(nn, "__wrapped__")
    with pytest.raises(ImportError):
        exec("from statefulnn import no_grad")


def test_a_name_that_nobody_knows_is_told_as_python_tells_it(names):
    for owner in (nn, names["model"], names["p"]):
        with pytest.raises(AttributeError, match="no attribute 'nonsense'") as info:
            owner.nonsense  # noqa: B018
        assert type(info.value) is AttributeError


def test_attributes_that_a_class_has_of_its_own_may_have_any_name():
    class Own(nn.Module):
        requires_grad = True
        lr = 0.1

        def __init__(self, rngs=None, features=3):
            super().__init__()
            self.requires_grad = False
            self.params = features
            self.dtype = "float32"

        def forward(self, x, key=None, training=False):
            return x

    own = Own(rngs=1, features=2)
    assert own.requires_grad is False
    assert (own.params, own.dtype) == (2, "float32")
    assert own(1.0, key=1, training=True) == 1.0


def test_settings_of_other_libraries_are_the_user_s_where_the_class_or_the_value_says_so():
    class Own(nn.Module):
        def forward(self, x):
            return x

    class Slower(nn.Dropout):
        rate = 0.5

    own, slower, linear = Own(), Slower(), nn.Linear(3, 3)
    own.deterministic = own.frozen = True
    own.epsilon, slower.rate = 1e-3, 0.1
    linear.scale, linear.rate = 0.5, 0.1  # of no array, and of a layer without `p`
    assert (own.epsilon, slower.rate, linear.scale, linear.rate) == (1e-3, 0.1, 0.5, 0.1)


def test_a_reshape_is_advised_only_where_it_mixes_up_no_numbers():
    numbers = np.arange(6.0).reshape(2, 3)
    for array in (numbers.T, numbers[:, None], numbers[None]):
        code = to_shape("given", array.shape, (2, 3))
        np.testing.assert_array_equal(eval(code, {"given": array}), numbers)
    assert to_shape("given", (6,), (2, 3)) is None
    assert to_shape("given", (2, 3, 4), (4, 3, 2)) is None


def test_a_trainer_that_is_a_module_may_compile_its_methods():
    class Steps(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.opt = model, nn.Optimizer(model, optax.sgd(0.5))

        @nn.jit
        def step(self, x, y):
            self.opt.step(nn.grad(loss_fn)(self.model, x, y))

    x, y = jnp.ones((5, 3)), jnp.ones((5, 2))
    compiled, by_hand = Net(), Net()
    by_hand.load_state_dict(compiled.state_dict())
    Steps(compiled).step(x, y)
    grads = nn.grad(loss_fn)(by_hand, x, y)
    for name, p in by_hand.named_parameters():
        np.testing.assert_allclose(compiled.get_parameter(name), p - 0.5 * grads[name], rtol=1e-5)


def test_a_key_error_shows_its_lines_as_lines():
    model = Net()
    with pytest.raises(KeyError) as info:
        setattr(model, "parameters", nn.Linear(3, 1))  # noqa: B010 (type checkers refuse the other)
    assert "\n  Why: " in str(info.value)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(KeyError) as info:
        layer.weight = nn.Parameter(jnp.ones((3, 3)))
    assert "\n  Why: " in str(info.value)


def test_a_type_error_inside_of_forward_stays_what_it_is():
    class Wrong(nn.Module):
        def forward(self, x, key):
            return x + "text"

    with pytest.raises(TypeError, match="unsupported operand|not a valid JAX|add") as info:
        Wrong()(1, jax.random.key(0))
    assert not isinstance(info.value, nn.StatefulnnError)


def test_parameters_are_still_an_iterator(names):
    model = names["model"]
    parameters = model.parameters()
    assert iter(parameters) is parameters
    assert next(parameters) is model.fc.weight
    assert len(list(parameters)) == 3
    assert list(parameters) == []
    assert isinstance(sum(p.size for p in model.parameters()), int)


def test_a_missing_library_is_installed_from_its_own_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match="pip install optax$"):
        nn.Optimizer(nn.Linear(1, 1), object())
    with pytest.raises(ImportError, match="pip install some-library$"):
        import_extra("some_library", "some-library", "did something", "does it")


# --------------------------------------------------------------------------------------------------
# Advice that is computed from shapes: it is right, or there is none

FRAGMENT = re.compile(
    r"(?:nn|jnp|input|target)\b[\w.]*(?:\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|\[[^]]*\])"
)


def advised(error: Exception) -> list[str]:
    return FRAGMENT.findall(str(error).partition("Instead:")[2])


@pytest.mark.parametrize("layer", [nn.CircularPad1d(1), nn.ReflectionPad1d(1), nn.Linear(2, 2)])
def test_a_layer_given_a_list_says_to_make_an_array_of_it(layer):
    with pytest.raises(nn.DtypeError, match=r"jnp\.asarray\(input\)"):
        layer([[1.0, 2.0]])


LAYERS = {
    "Linear": lambda c: nn.Linear(c, 4),
    "Conv1d": lambda c: nn.Conv1d(c, 4, 1),
    "Conv2d": lambda c: nn.Conv2d(c, 4, 1),
    "Conv3d": lambda c: nn.Conv3d(c, 4, 1),
    "grouped": lambda c: nn.Conv2d(2 * c, 4, 1, groups=2),
    "ConvTranspose2d": lambda c: nn.ConvTranspose2d(c, 4, 1),
    "BatchNorm1d": lambda c: nn.BatchNorm1d(c).eval(),
    "BatchNorm2d": lambda c: nn.BatchNorm2d(c).eval(),
    "InstanceNorm2d": lambda c: nn.InstanceNorm2d(c, affine=True).eval(),
    "LayerNorm": lambda c: nn.LayerNorm(c),
    "LSTM": lambda c: nn.LSTM(c, 4),
    "MaxPool2d": lambda c: nn.MaxPool2d(1),
}


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 3),
    shape=st.lists(st.integers(1, 5), max_size=5).map(tuple),
    dtype=st.sampled_from([jnp.float32, jnp.float16, jnp.int32]),
)
def test_advice_about_an_input_fits_it(name, channels, shape, dtype):
    layer, input = LAYERS[name](channels), jnp.zeros(shape, dtype)
    for _ in range(4):  # axes, channels and dtype may all be wrong, one after the other
        try:
            jax.eval_shape(layer, input)
            return
        except (nn.DtypeError, ValueError) as error:
            fragments = advised(error)
        values = [eval(f, {"nn": nn, "jnp": jnp, "input": input}) for f in fragments]
        for value in values:
            if isinstance(value, nn.Module):
                try:
                    jax.eval_shape(value.eval(), input)
                except (nn.ShapeError, nn.DtypeError) as other:  # the size fits, if nothing else
                    assert not re.search("channels|features", str(other))
        arrays = [v for v in values if isinstance(v, jax.Array)]
        if not arrays:
            return
        assert (arrays[0].shape, arrays[0].dtype) != (input.shape, input.dtype)
        input = arrays[0]
    pytest.fail(f"the advice for {shape} leads nowhere")


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "nll_loss": F.nll_loss,
    "mse_loss": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:F.mse_loss was given input")
@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(4,), (4, 2), (4, 1), (4, 2, 3)]),
    target_shape=st.sampled_from([(), (4,), (4, 1), (4, 2), (1, 4), (2,), (4, 2, 3), (4, 3)]),
    dtype=st.sampled_from([jnp.float32, jnp.int32]),
)
def test_advice_about_a_target_fits_it(name, shape, target_shape, dtype):
    input, target = jnp.zeros(shape), jnp.zeros(target_shape, dtype)
    for _ in range(4):
        try:
            jax.eval_shape(LOSSES[name], input, target)
            return
        except (nn.ShapeError, nn.DtypeError) as error:
            fragments = [f for f in advised(error) if "jnp.ndarray" not in f]
        if not fragments:
            return
        new = eval(fragments[0], {"jnp": jnp, "input": input, "target": target})
        if fragments[0].startswith("jnp.moveaxis(input"):
            assert new.shape != input.shape
            input = new
            continue
        assert (new.shape, new.dtype) != (target.shape, target.dtype)
        target = new
    pytest.fail(f"the advice for {target_shape} leads nowhere")


def test_an_integer_mask_of_attention_is_told_to_be_boolean_and_not_to_be_added():
    q = jax.random.normal(jax.random.key(0), (2, 3, 4))
    mask = jnp.tril(jnp.ones((3, 3), jnp.int32))
    with pytest.raises(nn.DtypeError, match=r"attn_mask\.astype\(bool\)"):
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask.astype(bool))
    np.testing.assert_allclose(
        out, F.scaled_dot_product_attention(q, q, q, is_causal=True), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["lambda", "partial"])
def test_a_function_of_the_module_itself_in_an_attribute_is_told_to_be_a_method(kind):
    class Layer(nn.Module):
        def __init__(self, advised):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            if advised:
                self.run = self.call
            elif kind == "lambda":
                self.run = lambda x: self.fc(x)
            else:
                self.run = functools.partial(self.call)

        def call(self, x):
            return self.fc(x)

        def forward(self, x):
            return self.run(x)

    x = jnp.ones((4, 3))
    with pytest.raises(
        nn.RegistrationError, match=r"refers to a (Layer|Linear) in .*\n.*\n.*write a method"
    ):
        nn.jit(Layer(False))(x)
    layer = Layer(True)
    np.testing.assert_allclose(nn.jit(layer)(x), layer.fc(x), rtol=1e-6)


def test_a_module_without_super_init_is_told_so_without_private_names():
    class Layer(nn.Module):
        def __init__(self):
            self.rate = 1.0

        def forward(self, x):
            return x

    with pytest.raises(nn.UninitializedModuleError, match="^a use of Layer before"):
        Layer()(jnp.ones(3))


def test_a_dict_as_a_vector_of_parameters_is_refused_for_its_order():
    model = Net()
    grads = nn.jit(nn.grad(lambda m: m(jnp.ones((1, 3))).sum()))(model)
    with pytest.raises(TypeError, match="order of a dict"):
        nn.utils.parameters_to_vector(grads)
    vector = nn.utils.parameters_to_vector(grads[name] for name, _ in model.named_parameters())
    np.testing.assert_array_equal(vector[:12].reshape(4, 3), grads["fc.weight"])


def test_an_index_of_an_ensemble_is_told_how_a_member_is_had():
    ensemble = nn.Ensemble(lambda: nn.Linear(3, 2), 2)
    for wrong in (lambda: ensemble[0], lambda: list(ensemble)):
        with pytest.raises(TypeError, match=r"ensemble\.member\(i\)"):
            wrong()


def test_a_checkpoint_of_several_parts_is_told_where_its_weights_are(tmp_path):
    model = Net()
    checkpoint = {"epoch": 3, "model": model.state_dict()}
    with pytest.raises(nn.StateDictError, match=r"load_state_dict\(checkpoint\['model'\]\)"):
        model.load_state_dict(checkpoint)
    with pytest.raises(nn.CheckpointError, match=r"one level\n.*nn\.save\(model, path\)"):
        nn.save(checkpoint, tmp_path / "run.safetensors")


def test_an_initialiser_says_how_a_computed_weight_is_written():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with pytest.raises(nn.RegistrationError, match=r"assigning it, module\.weight = new"):
        nn.init.ones_(layer.weight)
    layer.weight = jnp.ones((2, 3))
    np.testing.assert_allclose(layer.weight, 1.0, rtol=1e-6)
