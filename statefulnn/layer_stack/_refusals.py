"""What a LayerStack says when it refuses something: one function for each refusal."""

from __future__ import annotations

from collections.abc import Sequence

from statefulnn.core.errors import (
    DtypeError,
    ShapeError,
    StructureChangeError,
    UninitializedParameterError,
    explain,
)


def no_blocks(count: object) -> ValueError:
    return ValueError(
        explain(
            f"made a LayerStack of {count} blocks",
            "it has at least one",
            "nn.LayerStack([Block() for _ in range(12)])",
        )
    )


def no_block(what: str) -> TypeError:
    return TypeError(
        explain(
            f"made a LayerStack of {what}",
            "it takes the blocks, or a function that builds one and their number",
            "nn.LayerStack([Block() for _ in range(12)]) or nn.LayerStack(lambda: Block(), 12)",
        )
    )


def other_structure(number: int, name: str, change: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"made a LayerStack of blocks that differ: {name!r} of block {number - 1} against that of "
            f"block {number}, {change}",
            "one loop runs the same code for all of them, and stores their arrays as one",
            "build all blocks alike. A number that differs becomes a buffer, such as self.rate = "
            "nn.Buffer(jnp.asarray(rate), persistent=False); blocks of several kinds go into an "
            "nn.ModuleList of stacks",
        )
    )


def other_arrays(number: int, name: str, before: tuple, after: tuple) -> Exception:
    error = ShapeError if before[0] != after[0] else DtypeError
    one, other = (f"{dtype}{list(shape)}" for shape, dtype in (before, after))
    return error(
        explain(
            f"made a LayerStack of blocks that differ: {name!r} is {one} in block {number - 1} and "
            f"{other} in block {number}",
            "the arrays of all blocks become one",
            "build all blocks with the same sizes and dtypes",
        )
    )


def other_ties(number: int, name: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"made a LayerStack of blocks of which some share {name!r} and block {number} does not",
            "a loop takes an array whole for all layers, or an entry of it for each",
            "share it among all blocks or among none",
        )
    )


def without_shape(error: Exception) -> UninitializedParameterError:
    return UninitializedParameterError(
        explain(
            f"made a LayerStack of blocks with a parameter that has no shape yet ({error})",
            "the arrays of all blocks become one",
            "use layers that are given their sizes, or nn.materialize(block, x) for each block first",
        )
    )


def generator_in_a_block(name: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"made a LayerStack of blocks with a generator of their own, {name!r}",
            "the layers of a loop draw from one stream",
            "leave it out, and draw from the generator in force; or give all blocks one generator",
        )
    )


def in_another_stack(number: int) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"made a LayerStack of a layer of another one, as block {number}",
            "its arrays are part of those of the other stack",
            "take a copy, copy.deepcopy(layer); or take the other stack apart: other.unstack()",
        )
    )


def no_list(path: str, kind: str) -> TypeError:
    return TypeError(
        explain(
            f"asked for a LayerStack of {path!r}, which is a {kind}",
            "it takes the place of an nn.ModuleList or nn.Sequential of equal blocks",
            'name the list: nn.LayerStack.of(model, "blocks")',
        )
    )


def hooked_list(path: str, kind: str) -> StructureChangeError:
    return StructureChangeError(
        explain(
            f"asked for a LayerStack of {path!r}, a {kind} with hooks",
            "they would go with the list",
            "remove them, and register them on the stack: nn.LayerStack.of(model, path) returns it",
        )
    )


def empty() -> ValueError:
    return ValueError(
        explain(
            "called a LayerStack without layers",
            "unstack() has given them to a ModuleList",
            "model.blocks = model.blocks.unstack(), and call its modules one by one",
        )
    )


def no_layer(index: int, count: int) -> IndexError:
    return IndexError(
        explain(
            f"asked for layer {index} of a LayerStack of {count}",
            f"the layers are numbered from 0 to {count - 1}",
            f"blocks[{count - 1}]",
        )
    )


def wrong_option(option: str, given: object, wanted: Sequence[str]) -> TypeError:
    return TypeError(
        explain(
            f"made a LayerStack with {option}={given!r}",
            f"it is {' or '.join(wanted)}",
            "nn.LayerStack(blocks, remat=True, unroll=2)",
        )
    )


CHANGED_BY_A_LAYER = (
    "A LayerStack runs one loop: each layer has to give what the next one takes, of the same structure, "
    "shapes and dtypes. Cast before the stack to what a layer returns, such as x.astype(jnp.bfloat16) "
    "within nn.amp.autocast(), or cast back in the block."
)
