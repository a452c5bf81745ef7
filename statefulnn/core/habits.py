"""What people write out of habit who come from torch, Flax or optax, and the code that does it here.

A table for each kind of object: the name, why it is not there, and the code. Names are looked up after Python
has found nothing, so what works pays nothing for it. Tests run all the code.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Set
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
    "opt.lr = 1e-4"
)
_GRADIENT = (
    "nothing records what an array was made of: nn.grad and nn.value_and_grad differentiate functions, "
    "and return the gradients"
)
_MODE = "train() and eval() set the mode, before the call"
# Names of a flag that says the mode: whether True means training.
_MODES = {
    **dict.fromkeys(("train", "training", "is_training"), True),
    **dict.fromkeys(("eval", "deterministic", "use_running_average", "inference"), False),
}


def _mode(name: str, value: object) -> str:
    """Return the code that sets the mode which a flag of another library stands for."""
    return "model.train(True)" if _MODES[name] is bool(value) else "model.eval()"


_LAYERS = "layers have torch's names and arguments, the size of the input among them"
_PARAMETERS = "a module has its parameters from the start, and a pure function takes them as a dict"
_DRAWS = "random numbers come from the generator in force; a scope gives another one"
_SEED = "initial values, and what dropout drops, are drawn from the default generator"

_COMPILES = (
    "what is compiled or differentiated takes modules as they are: arrays are told from all else"
)
_OPTAX = "optax has the optimizers, and nn.Optimizer applies them to a module"

# Names of torch.optim, which people look for in nn and in nn.optim.
OPTIM: Answers = _answers(
    _OPTAX,
    **{
        name: f"import optax; opt = nn.Optimizer(model, optax.{code})"
        for names, code in (
            (("Adam", "adam"), "adam(1e-3)"),
            (("AdamW", "adamw"), "adamw(1e-3)"),
            (("SGD", "sgd"), "sgd(0.1, momentum=0.9)"),
            (("RMSprop",), "rmsprop(1e-2)"),
            (("Adagrad",), "adagrad(1e-2)"),
        )
        for name in names
    },
    lr_scheduler="opt = nn.Optimizer(model, optax.adam(optax.cosine_decay_schedule(1e-3, 1000)))",
)

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
    **OPTIM,
    **_answers(_OPTAX, apply_updates=TRAIN),
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
        _COMPILES,
        filter_jit="nn.jit(model)(x)",
        filter_grad="grads = nn.grad(loss_fn)(model, x, y)",
        filter_value_and_grad="loss, grads = nn.value_and_grad(loss_fn)(model, x, y)",
        filter_vmap="nn.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, x)",
        filter_checkpoint="nn.remat(model)(x)",
        filter_eval_shape="jax.eval_shape(model, x)",
    ),
    **_answers(
        "a module is changed in place, and split into its ModuleDef and a list of arrays",
        tree_at="model.fc.weight.value = jnp.zeros_like(model.fc.weight)",
        **dict.fromkeys(
            ("partition", "combine", "merge_state"),
            "moduledef, leaves = nn.split(model); model = nn.merge(moduledef, leaves)",
        ),
        tree_serialise_leaves='nn.save(model, "model.safetensors")',
        tree_deserialise_leaves='model.load_state_dict(nn.load("model.safetensors"))',
    ),
    **_answers(
        "arrays and their functions are JAX's, and have its names",
        cat="jnp.concatenate([x, x])",
        bmm="jnp.matmul(x, x.T)",
        mm="jnp.matmul(x, x.T)",
        unsqueeze="jnp.expand_dims(x, 0)",
        clamp="jnp.clip(x, -1, 1)",
        gather="jnp.take_along_axis(x, labels[:, None], 1)",
        topk="jax.lax.top_k(x, 2)",
    ),
    **_answers(
        "arrays are JAX's, and its random numbers take a key: the generator in force gives one",
        randn="jax.random.normal(nn.next_key(), (3,))",
        rand="jax.random.uniform(nn.next_key(), (3,))",
        randint="jax.random.randint(nn.next_key(), (3,), 0, 10)",
        randperm="jax.random.permutation(nn.next_key(), 3)",
        bernoulli="jax.random.bernoulli(nn.next_key(), 0.5, (3,))",
        randn_like="jax.random.normal(nn.next_key(), x.shape)",
        rand_like="jax.random.uniform(nn.next_key(), x.shape)",
    ),
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

# Names of F.
FUNCTIONAL: Answers = _answers(
    "functions have torch's names",
    **dict.fromkeys(("mse", "l2_loss", "squared_error"), "F.mse_loss(model(x), y)"),
    **dict.fromkeys(("l1", "mae", "mae_loss"), "F.l1_loss(model(x), y)"),
    **dict.fromkeys(
        (
            "cross_entropy_loss",
            "softmax_cross_entropy",
            "softmax_cross_entropy_with_integer_labels",
        ),
        "F.cross_entropy(logits, labels)",
    ),
    **dict.fromkeys(
        ("bce_with_logits", "bce_with_logits_loss", "sigmoid_binary_cross_entropy"),
        "F.binary_cross_entropy_with_logits(model(x), y)",
    ),
    **dict.fromkeys(("bce", "bce_loss"), "F.binary_cross_entropy(jax.nn.sigmoid(model(x)), y)"),
    nll="F.nll_loss(F.log_softmax(logits, dim=1), labels)",
    swish="F.silu(x)",
    dense="F.linear(x, p)",
)

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


def _injected(optimizer: str, setting: str) -> str:
    """Return the code that injects a setting, and changes it."""
    return (
        f"opt = nn.Optimizer(model, optax.inject_hyperparams(optax.{optimizer})(1e-3, {setting}=0.5)), then "
        f"opt.hyperparams.{setting} = 0.9"
    )


OPTIMIZER: Answers = {
    **MODULE,
    **_answers("gradients are results and not kept, so there is nothing to reset", zero_grad=TRAIN),
    **_answers("a step takes the gradients", update=TRAIN, apply_gradients=TRAIN, minimize=TRAIN),
    **_answers("the module that is trained has this name", model="opt.module"),
    **_answers(
        _SETTINGS,
        **dict.fromkeys(
            ("param_groups", "learning_rate", "lr", "step_size", "eta", "hyperparams", "defaults"),
            _RATE,
        ),
        weight_decay=_injected("adamw", "weight_decay"),
        **dict.fromkeys(("momentum", "nesterov"), _injected("sgd", "momentum")),
        **dict.fromkeys(("b1", "beta1", "betas"), _injected("adam", "b1")),
        **dict.fromkeys(("b2", "beta2"), _injected("adam", "b2")),
        **dict.fromkeys(("eps", "epsilon"), _injected("adam", "eps")),
    ),
}
SETTINGS_OF_OPTIMIZERS = frozenset(n for n, answer in OPTIMIZER.items() if answer.why is _SETTINGS)
_RATES = ("lr", "step_size", "eta", "rate")

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
    **_answers(
        _MODE,
        **dict.fromkeys(("deterministic", "use_running_average", "inference"), "model.eval()(x)"),
    ),
    **_answers(
        "optax's transformation has the settings",
        **dict.fromkeys(
            ("lr", "learning_rate", "params"), "opt = nn.Optimizer(model, optax.adam(1e-3))"
        ),
    ),
    **_answers(
        "parameters with requires_grad=True are trained, and all others are left alone",
        wrt='opt = nn.Optimizer(model, optax.adam(1e-3), only="fc.*")',
    ),
}

# Keywords of calls.
_SCOPED = "with nn.rng_scope(key): out = model(x)"
CALL: Answers = {
    **_answers(_DRAWS, rngs=_SCOPED, rng=_SCOPED, key=_SCOPED),
    **_answers(_MODE, **{name: f"{_mode(name, True)}(x)" for name in _MODES}),
    **_answers(
        "a module writes its own state, and a pure function returns the new one",
        mutable="fn, params, state = nn.functionalize(model, mutable=True)",
    ),
}

# Attributes that are set to a flag, where a method does it; what is said of False is found by `refuse_flag`.
_FREEZES = "it is an attribute of parameters, and a module has a method that sets them all"
FLAGS: Answers = {
    **_answers(_FREEZES, requires_grad="model.requires_grad_(True)"),
    **_answers("it is a method", train="model.train(True)", eval="model.eval()"),
}

# Attributes that layers have in other libraries: on ours they would say nothing.
_OTHER_NAME = "layers have torch's names, and an attribute of another name would do nothing"
SETTINGS: Answers = {
    **_answers(_MODE, **{name: _mode(name, True) for name in _MODES if name not in FLAGS}),
    **_answers(
        _FREEZES,
        trainable="model.requires_grad_(True)",
        **dict.fromkeys(("frozen", "freeze"), "model.requires_grad_(False)"),
    ),
    **_answers(
        _OTHER_NAME,
        **dict.fromkeys(("rate", "dropout_rate", "drop_rate"), "layer.p = 0.1"),
        epsilon="layer.eps = 1e-6",
        decay="layer.momentum = 0.1",
        **dict.fromkeys(("moving_mean", "mean"), "layer.running_mean = array"),
        **dict.fromkeys(("moving_var", "moving_variance", "var"), "layer.running_var = array"),
        **dict.fromkeys(
            ("kernel", "scale", "gamma", "embedding"),
            "layer.weight.value = jnp.zeros_like(layer.weight)",
        ),
    ),
}
_OURS = re.compile(r"layer\.(\w+)(.value)?")
# Those of which False means what True does of the other.
_OPPOSITE = {
    "model.requires_grad_(True)": "model.requires_grad_(False)",
    "model.requires_grad_(False)": "model.requires_grad_(True)",
    "model.train(True)": "model.eval()",
    "model.eval()": "model.train(True)",
}
# All of them, looked up where an attribute is new.
ASSIGNED = FLAGS.keys() | SETTINGS.keys()


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
        answer = CALL[name]
        if name in _MODES:
            answer = Answer(answer.why, f"{_mode(name, kwargs[name])}(x)")
        raise refusals.argument_of_habit(type(module).__name__, "forward", name, answer) from None


_NOTHING = "Module.__init__"  # which a class without a constructor has
# The annotations of arguments that are not arrays.
_PLAIN = re.compile(r"(int|float|bool|str|None|Size|Sequence\[int\]|( \| ))+")


def refuse_construction(cls: type, args: tuple, kwargs: Mapping[str, object]) -> None:
    """Raise for arguments of a constructor that belong into a call, or are other libraries' names."""
    # Layers are many: a signature is looked at only where a name or an array gives a reason.
    init: Any = cls.__init__
    takes_nothing = init.__qualname__ == _NOTHING
    if not cls.__module__.startswith("statefulnn."):
        if kwargs and takes_nothing:  # fields, as in Flax
            field = next((k for k in kwargs if k in inspect.get_annotations(cls)), None)
            if field is not None:
                raise refusals.field_as_argument(cls.__name__, field)
        return
    if kwargs and not _takes_all(cls, kwargs.keys()):
        _refuse_keywords(cls, kwargs)
    if any(isinstance(a, jax.Array) and a.ndim for a in (*args, *kwargs.values())):
        if takes_nothing:  # such as nn.Sigmoid
            raise array_for_an_option(cls)
        _refuse_arrays(cls, inspect.signature(init), args, kwargs)


# Keywords of other libraries' layers.
_ALIASES = {
    "epsilon": "eps",
    "dropout_rate": "p",
    "drop_rate": "p",
    "dim": "normalized_shape",
    "input_size": "in_features",
    "strides": "stride",
}
# The names of a constructor's arguments; None for one that takes any.
_known: dict[Callable, Set[str] | None] = {}


def _takes_all(cls: object, keywords: Set[str]) -> bool:
    """Say whether a constructor takes these keywords; its own are looked at once."""
    init = cls.__init__
    if init not in _known:
        code = getattr(inspect.unwrap(init), "__code__", None)
        takes_any = code is None or code.co_flags & inspect.CO_VARKEYWORDS
        _known[init] = None
        if code is not None and (not takes_any or init.__qualname__ == _NOTHING):
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            _known[init] = frozenset(names)
    known = _known[init]
    return known is None or keywords <= known


def _refuse_keywords(cls: Any, kwargs: Mapping[str, object]) -> NoReturn:
    """Raise for keywords that a constructor does not take."""
    known = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]
    known = [] if cls.__init__.__qualname__ == _NOTHING else known
    names = {p.name: p for p in known if p.kind is not p.VAR_POSITIONAL}
    unknown = [k for k in kwargs if k not in names]
    name = next((k for k in unknown if k in CONSTRUCTOR), unknown[0])
    if name in CONSTRUCTOR:
        raise refusals.argument_of_habit(cls.__name__, "__init__", name, CONSTRUCTOR[name])
    near = _ALIASES.get(name, "")
    near = near if near in names else "".join(difflib.get_close_matches(name, names, 1))
    shown = [str(p).partition(":")[0] for p in known if p.default is p.empty]
    value = kwargs[name]
    if near and near not in shown and isinstance(value, (bool, int, float, str, tuple)):
        shown.append(f"{near}={value!r}")
    raise refusals.unknown_keyword(
        cls.__name__, name, list(names), f"nn.{cls.__name__}({', '.join(shown)})"
    )


def refuse_slot(container: str, name: str, known: Iterable[str], value: object) -> NoReturn:
    """Raise for a name that is nothing among the settings or slots of an optimizer."""
    names = list(known)
    near = ["learning_rate"] if name in _RATES and "learning_rate" in names else []
    near = near or difflib.get_close_matches(name, names, 1) or names
    code = f"one of these names of opt.{container}"
    if container.endswith("hyperparams") and isinstance(value, (int, float)):
        code = f"opt.{container}.{near[0]} = {value!r}"
    raise refusals.no_slot(f"{container}.{name}", names, code)


# How functions are called that take their arguments in another order elsewhere.
USAGES = {
    "Optimizer.step": "opt.step(grads)",
    "Checkpointer.save": "checkpointer.save(step, model=model, opt=opt)",
    "over_tasks": "nn.meta.over_tasks(one_task)(params, x, y)",
    "capture": "out, outputs = nn.capture(model)(x)",
}


def refuse_usage(function: str, message: str) -> None:
    """Raise if a function was called with arguments that it does not take, and there is code that does it."""
    if function in USAGES and ("argument" in message):
        raise refusals.no_usage(message, USAGES[function])


def refuse_sizes(
    function: str, module: Any, inputs: tuple, kwargs: Mapping[str, object], needed: bool = False
) -> None:
    """Raise for sizes in place of the inputs of a model, and for none where it is going to be called."""
    sizes = [*inputs, *(v for k, v in kwargs.items() if k == "input_size")]
    if sizes and all(_is_size(size) for size in sizes):
        raise refusals.size_for_an_input(function, sizes[0])
    if needed and not inputs and not kwargs:
        parameters = inspect.signature(module.forward).parameters.values()
        names = [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
        if names:
            raise refusals.no_inputs(function, names)


def _is_size(x: object) -> bool:
    return isinstance(x, (tuple, list)) and bool(x) and all(type(n) is int for n in x)


def _refuse_arrays(
    cls: object, signature: inspect.Signature, args: tuple, kwargs: Mapping[str, object]
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


def refuse_flag(module: Any, name: str, value: object) -> None:
    """Raise for a flag in place of a method, and for what a layer has under another name.

    Nothing is said where the class has an attribute of this name, nor of settings of the user's classes.
    """
    cls = type(module)
    own = getattr(cls, name, None)
    if own is not None and not callable(own):
        return
    if name in FLAGS and isinstance(value, bool):
        answer = FLAGS[name]
    elif name in SETTINGS and cls.__module__.startswith("statefulnn.modules."):
        answer = SETTINGS[name]
        ours = _OURS.match(answer.instead)
        if ours and not (hasattr(module, ours[1]) and (not ours[2] or hasattr(value, "ndim"))):
            return  # a mark of the user's own
    else:
        return
    code = answer.instead if value is not False else _OPPOSITE.get(answer.instead, answer.instead)
    raise refusals.flag_over_method(cls.__name__, name, Answer(answer.why, code))


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
