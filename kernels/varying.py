"""How values vary over the axes of a `shard_map`."""

from typing import Any

import jax
from jax import Array, lax


def alike(tree: Any, *sources: Array | None) -> Any:
    """The tree, marked as varying over every `shard_map` axis of the sources: loops may not change a carry's kind."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in sources if x is not None))

    def vary(x: Array) -> Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(vary, tree)


def result(shape: tuple[int, ...], dtype: Any, *sources: Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, varying over every `shard_map` axis of the sources."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in sources))
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    kind = next(k for k in (jax.typeof(x).manual_axis_type for x in sources) if k.varying)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kind)(varying=axes))
