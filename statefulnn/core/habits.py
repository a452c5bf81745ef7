"""What people write out of habit who come from torch, Flax or optax, and the code that does it here.

A table for each kind of object: the name, why it is not there, and the code. Names are looked up after Python
has found nothing, so what works pays nothing for it. Tests run all the code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp

from statefulnn.core import refusals


class Answer(NamedTuple):
    """Why a name is not there, and the code that does what it is meant to do."""

    why: str
    instead: str


Answers: TypeAlias = Mapping[str, Answer]


def _answers(why: str, **code: str) -> dict[str, Answer]:
    return {name: Answer(why, instead) for name, instead in code.items()}


TRAIN = "loss, grads = nn.value_and_grad(loss_fn)(model, x, y); opt.step(grads)"
_RATE = (
    "opt = nn.Optimizer(model, optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)), then "
    "opt.hyperparams.learning_rate = jnp.asarray(1e-4)"
)
_GRADIENT = (
    "nothing records what an array was made of: nn.grad and nn.value_and_grad differentiate functions, "
    "and return the gradients"
)
_MODE = "train() and eval() set the mode, before the call"
_LAYERS = "layers have torch's names and arguments, the size of the input among them"
_PARAMETERS = "a module has its parameters from the start, and a pure function takes them as a dict"
_DRAWS = "random numbers come from the generator in force; a scope gives another one"
_SEED = "initial values, and what dropout drops, are drawn from the default generator"

# Names of the package.
PACKAGE: Answers = {
    **_answers(
        _GRADIENT,
        autograd="grads = nn.grad(loss_fn)(model, x, y)",
        backward="grads = nn.grad(loss_fn)(model, x, y)",
        **dict.fromkeys(
            ("no_grad", "enable_grad", "set_grad_enabled", "inference_mode"),
            "model.eval()(x); jax.lax.stop_gradient(model(x)) inside of a loss",
        ),
    ),
    **_answers(
        "optax has the optimizers, and nn.Optimizer applies them to a module",
        optim="import optax; opt = nn.Optimizer(model, optax.adam(1e-3))",
        lr_scheduler="opt = nn.Optimizer(model, optax.adam(optax.cosine_decay_schedule(1e-3, 1000)))",
    ),
    **_answers(
        "arrays are JAX's, and jax knows the devices",
        **dict.fromkeys(("tensor", "Tensor", "as_tensor", "from_numpy"), "jnp.asarray(values)"),
        cuda="model.to(jax.devices()[0])",
    ),
    **_answers(
        "on several devices the arrays say where they lie, and compiled code follows",
        **dict.fromkeys(
            ("DataParallel", "DistributedDataParallel", "distributed"),
            'mesh = jax.make_mesh((jax.device_count(),), ("data",)); '
            "model = nn.parallel.data_parallel(model, mesh); x = nn.parallel.shard_batch(x, mesh)",
        ),
    ),
    **_answers("it is called jit here, as in JAX", compile="nn.jit(model)(x)"),
    **_answers(
        "the bridge converts modules of torch's",
        from_torch="nn.bridge.torch.from_torch(torch_module, x)",
    ),
    **_answers(
        "any loader will do, and torch.utils.data.DataLoader too: jax has the arrays only",
        **dict.fromkeys(("DataLoader", "Dataset"), "x = jnp.asarray(tensor.numpy())"),
    ),
    **_answers(
        "a state dict belongs to a module",
        state_dict="model.state_dict()",
        load_state_dict="model.load_state_dict(state_dict)",
        state="model.state_dict()",
        update="model.load_state_dict(state_dict)",
    ),
    **_answers(
        "layers are built in __init__, after super().__init__(), and forward calls them",
        **dict.fromkeys(("compact", "nowrap"), "self.fc = nn.Linear(in_features, out_features)"),
    ),
    **_answers(
        _LAYERS,
        Dense="nn.Linear(in_features, out_features)",
        DenseGeneral="nn.Linear(in_features, out_features)",
        Conv="nn.Conv2d(in_channels, out_channels, kernel_size)",
        ConvTranspose="nn.ConvTranspose2d(in_channels, out_channels, kernel_size)",
        BatchNorm="nn.BatchNorm2d(num_features)",
        Embed="nn.Embedding(num_embeddings, embedding_dim)",
    ),
    **_answers(
        "a module registers what is assigned to it, of two kinds: trained, and not trained",
        Param="nn.Parameter(array)",
        Variable="nn.Buffer(array)",
        BatchStat="nn.Buffer(array)",
    ),
    **_answers("one generator serves all layers", Rngs="nn.manual_seed(0)"),
    **_answers(
        "a module is split into its ModuleDef and a list of arrays", GraphDef="nn.split(model)"
    ),
    **_answers("initial values are written in place", initializers="nn.init.xavier_uniform_(p)"),
}

# Attributes of modules.
MODULE: Answers = {
    **_answers(
        _GRADIENT,
        backward="grads = nn.grad(loss_fn)(model, x, y)",
        grad="grads = nn.grad(loss_fn)(model, x, y)",
    ),
    **_answers(
        _PARAMETERS,
        **dict.fromkeys(
            ("init", "params", "variables", "bind"),
            "fn, params = nn.functionalize(model); out = fn(params, x)",
        ),
        param="self.w = nn.Parameter(array)",
        variable='self.register_buffer("mean", array)',
        make_rng="nn.next_key()",
    ),
    **_answers(
        "its parameters may differ in it",
        device="next(model.parameters()).device",
        dtype="next(model.parameters()).dtype",
    ),
    **_answers(
        "Python has a function for it",
        **dict.fromkeys(("clone", "copy"), "copy.deepcopy(model)"),
        summary="print(nn.summary(model, x))",
    ),
    **_answers(
        "each parameter says whether it is trained, and a method sets all of a module",
        freeze="model.requires_grad_(False)",
        unfreeze="model.requires_grad_(True)",
    ),
    **_answers(
        "files hold the state dict",
        save='nn.save(model, "model.safetensors")',
        load='model.load_state_dict(nn.load("model.safetensors"))',
    ),
    **_answers(
        "torch has given it up for another one",
        register_backward_hook="model.register_full_backward_hook(lambda module, grad_in, grad_out: None)",
    ),
}

# Attributes of optimizers.
_SETTINGS = "optax's transformation has the settings, and those that are injected are buffers"
OPTIMIZER: Answers = {
    **MODULE,
    **_answers("gradients are results and not kept, so there is nothing to reset", zero_grad=TRAIN),
    **_answers("a step takes the gradients", update=TRAIN, apply_gradients=TRAIN, minimize=TRAIN),
    **_answers("the module that is trained has this name", model="opt.module"),
    **_answers(_SETTINGS, param_groups=_RATE, learning_rate=_RATE, lr=_RATE, defaults=_RATE),
}

# Attributes of boxes.
_OPERATES = "a box has the attributes of its jax.Array, and jnp has the functions"
_MOVES = "a box keeps its place and its dtype, and a module moves all of its own"
_WRITES = "arrays are immutable: a new one is written to the box"
BOX: Answers = {
    **_answers("it has torch's name", trainable="p.requires_grad"),
    **_answers(
        _GRADIENT,
        backward="grads = nn.grad(loss_fn)(model, x, y)",
        **dict.fromkeys(
            ("is_leaf", "retain_grad", "register_hook"),
            "grads = nn.grad(loss_fn)(model, x, y); nn.capture(model, grads=True)",
        ),
    ),
    **_answers(
        _OPERATES,
        numel="p.size",
        nelement="p.size",
        dim="p.ndim",
        t="p.T",
        abs="jnp.abs(p)",
        pow="p**2",
        norm="jnp.linalg.norm(p)",
        mm="p @ p.T",
        matmul="p @ p.T",
        unsqueeze="jnp.expand_dims(p, 0)",
        permute="p.transpose(1, 0)",
        expand="jnp.broadcast_to(p, p.shape)",
        contiguous="p.value",
        numpy="np.asarray(p)",
        cpu="np.asarray(p)",
        clamp="jnp.clip(p, -1, 1)",
        view="p.reshape(-1)",
    ),
    **_answers(
        _MOVES,
        cuda="model.to(jax.devices()[0])",
        to="model.to(jax.devices()[0])",
        float="p.astype(jnp.float32)",
        double="p.astype(jnp.float64)",
        half="p.astype(jnp.float16)",
        bfloat16="p.astype(jnp.bfloat16)",
        long="p.astype(jnp.int32)",
        int="p.astype(jnp.int32)",
        type="p.astype(jnp.float32)",
    ),
    **_answers(
        _WRITES,
        add_="p.value = p + other",
        sub_="p.value = p - other",
        mul_="p.value = p * other",
        div_="p.value = p / other",
        zero_="p.value = jnp.zeros_like(p)",
        fill_="p.value = jnp.full_like(p, 0.5)",
        clamp_="p.value = jnp.clip(p, -1, 1)",
        normal_="nn.init.normal_(p)",
        uniform_="nn.init.uniform_(p)",
        lerp_="p.value = p + 0.1 * (other - p)",
    ),
}

# Keywords of the constructors of layers and optimizers.
CONSTRUCTOR: Answers = {
    **_answers(_SEED, **dict.fromkeys(("rngs", "rng", "key"), "nn.manual_seed(0)")),
    **_answers(
        "initial values are written after the layer is built",
        kernel_init="nn.init.xavier_uniform_(layer.weight)",
        bias_init="nn.init.zeros_(layer.bias)",
    ),
    **_answers(
        _LAYERS,
        features="nn.Linear(in_features, out_features)",
        use_bias="nn.Linear(in_features, out_features, bias=False)",
        rate="nn.Dropout(0.5)",
        param_dtype="nn.Linear(in_features, out_features, dtype=jnp.float32)",
    ),
    **_answers(_MODE, **dict.fromkeys(("deterministic", "use_running_average"), "model.eval()(x)")),
    **_answers(
        "optax's transformation has the settings",
        **dict.fromkeys(
            ("lr", "learning_rate", "params"), "opt = nn.Optimizer(model, optax.adam(1e-3))"
        ),
    ),
    **_answers(
        "parameters with requires_grad=True are trained, and all others are left alone",
        wrt="model.fc.requires_grad_(False); opt = nn.Optimizer(model, optax.adam(1e-3))",
    ),
}

# Keywords of calls.
_SCOPED = "with nn.rng_scope(key): out = model(x)"
CALL: Answers = {
    **_answers(_DRAWS, rngs=_SCOPED, rng=_SCOPED, key=_SCOPED),
    **_answers(
        _MODE,
        **dict.fromkeys(("deterministic", "use_running_average"), "model.eval()(x)"),
        **dict.fromkeys(("train", "training", "is_training"), "model.train(True)(x)"),
    ),
    **_answers(
        "a module writes its own state, and a pure function returns the new one",
        mutable="fn, params, state = nn.functionalize(model, mutable=True)",
    ),
}

# Attributes that are set to a flag, where a method does it.
FLAGS: Answers = {
    **_answers(
        "it is an attribute of parameters, and a module has a method that sets them all",
        requires_grad="model.requires_grad_(False)",
    ),
    **_answers("it is a method", train="model.train(True)", eval="model.eval()"),
}


def misfit(function: Callable, args: tuple, kwargs: Mapping[str, object], table: Answers) -> str:
    """Return the name in a table of an argument that a function does not take; "" if there is none."""
    try:
        signature = inspect.signature(function)
        signature.bind_partial(*args, **kwargs)
    except TypeError:
        names = [k for k in kwargs if k in table and k not in signature.parameters]
        keys = (
            jnp.issubdtype(a.dtype, jax.dtypes.prng_key) for a in args if isinstance(a, jax.Array)
        )
        return names[0] if names else "key" if any(keys) else ""
    return ""


# Keywords of jnp that functions of F do not take.
_AXES = {"axis": "dim=1", "keepdims": "keepdim=True"}
_UNEXPECTED = re.compile(r"(\w+)\(\) got an unexpected keyword argument '(\w+)'")


def refuse_call(module: Any, args: tuple, kwargs: Mapping[str, object], error: TypeError) -> None:
    """Raise, or note on the error, if a call failed by an argument that there is an answer for."""
    found = _UNEXPECTED.match(str(error))
    if found is not None and found[2] in _AXES and found[2] not in kwargs:
        note = (
            "  Why: functions of F have torch's names and arguments\n  Instead: "
            f"F.{found[1]}(x, {_AXES[found[2]]})"
        )
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
    name = misfit(module.forward, args, kwargs, CALL)
    if name:
        raise refusals.argument_of_habit(
            type(module).__name__, "forward", name, CALL[name]
        ) from None


# The annotations of arguments that are not arrays.
_PLAIN = re.compile(r"(int|float|bool|str|None|Size|Sequence\[int\]|( \| ))+")


def refuse_construction(cls: type, args: tuple, kwargs: Mapping[str, object]) -> None:
    """Raise for arguments of a constructor that belong into a call, or are other libraries' names."""
    # Layers are many: a signature is looked at only where a name or an array gives a reason.
    init: Any = cls.__init__
    takes_nothing = init.__qualname__ == "Module.__init__"
    if not cls.__module__.startswith("statefulnn."):
        if kwargs and takes_nothing:  # fields, as in Flax
            field = next((k for k in kwargs if k in inspect.get_annotations(cls)), None)
            if field is not None:
                raise refusals.field_as_argument(cls.__name__, field)
        return
    if not CONSTRUCTOR.keys().isdisjoint(kwargs):
        name = misfit(
            (lambda self: None) if takes_nothing else init, (cls, *args), kwargs, CONSTRUCTOR
        )
        if name:
            raise refusals.argument_of_habit(cls.__name__, "__init__", name, CONSTRUCTOR[name])
    if any(isinstance(a, jax.Array) and a.ndim for a in (*args, *kwargs.values())):
        if takes_nothing:  # such as nn.Sigmoid
            raise array_for_an_option(cls)
        _refuse_arrays(cls, inspect.signature(init), args, kwargs)


def _refuse_arrays(
    cls: Any, signature: inspect.Signature, args: tuple, kwargs: Mapping[str, object]
) -> None:
    """Raise if an array is given for an argument that its annotation says is none."""
    try:
        given = signature.bind_partial(cls, *args, **kwargs).arguments
    except TypeError:  # more than it takes
        raise array_for_an_option(cls) from None
    for name, value in given.items():
        if isinstance(value, jax.Array) and _PLAIN.fullmatch(
            str(signature.parameters[name].annotation)
        ):
            raise array_for_an_option(cls, name)


def array_for_an_option(cls: Any, name: str = "input") -> Exception:
    """Return the error for an array that belongs into the call of a layer."""
    needed, inputs = (
        [
            p.name
            for p in inspect.signature(f).parameters.values()
            if p.name != "self" and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        for f in (cls.__init__, cls.forward)
    )
    return refusals.array_for_an_option(cls.__name__, name, needed, inputs)


def refuse_flag(module: Any, name: str) -> None:
    """Raise for a flag in place of a method, unless the class has an attribute of this name."""
    own = getattr(type(module), name, None)
    if own is None or callable(own):
        raise refusals.flag_over_method(type(module).__name__, name, FLAGS[name])


_SETUP = Answer(
    "nobody calls setup() here: what is assigned in __init__ is registered",
    "def __init__(self): super().__init__(); self.fc = nn.Linear(in_features, out_features)",
)


def refuse_attribute(message: str, module: Any, name: str) -> NoReturn:
    """Raise for an attribute that a module does not have."""
    table = module._habits
    if name not in table and name[:1] != "_" and callable(getattr(type(module), "setup", None)):
        table = {name: _SETUP}
    refuse_name(message, name, table)


def of_package(name: str, functional: Any) -> Answers:
    """Return the answers for a name that the package does not have: functions, arrays and dtypes too."""
    if name in functional.__all__:
        why = "layers are classes, and functions of arrays are in statefulnn.functional"
        return {name: Answer(why, f"import statefulnn.functional as F; F.{name}")}
    if name not in PACKAGE and name[:1] != "_" and hasattr(jnp, name):
        return {name: Answer("arrays, their dtypes and functions are JAX's", f"jnp.{name}")}
    return PACKAGE


def refuse_name(what: str, name: str, table: Answers) -> NoReturn:
    """Raise for an attribute that is not there; the message begins as Python's."""
    message = f"{what} has no attribute {name!r}"
    answer = table.get(name)
    raise AttributeError(message) if answer is None else refusals.name_of_habit(message, answer)
