"""Who is measured: every implementation of ours that can do a case, and other libraries where they are installed."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention, decode, latent_decode, lightning

from .cases import Op, Shape, mask_of

OURS = {
    "attention": attention.IMPLEMENTATIONS,
    "decode": decode.IMPLEMENTATIONS,
    "latent_decode": latent_decode.IMPLEMENTATIONS,
    "lightning": lightning.IMPLEMENTATIONS,
}
THEIRS = {
    "attention": ("jax.nn xla", "jax.nn cudnn", "tokamax", "torch sdpa", "torch flex"),
    "decode": ("jax.nn xla", "jax.nn cudnn"),
    "latent_decode": (),
    "lightning": ("fla",),
}


@dataclasses.dataclass
class Rival:
    """Something to time. `enqueue` starts one run, `wait` ends when all started runs are done."""

    name: str
    enqueue: Callable[[], Any]
    wait: Callable[[Any], Any]
    result: Callable[[], list[np.ndarray]]  # Output, or output and gradients, in our layout.
    temporary: int | None = None  # Bytes.
    seconds: list[float] = dataclasses.field(default_factory=list)
    error: float | None = None


class Refused(Exception):
    """Why a rival takes no part; the message is for the reader."""


def make(op_name: str, op: Op, shape: Shape, arrays: list[jax.Array], name: str, backward: bool) -> Rival:
    """The rival of this name, compiled. Raises `Refused` where it cannot do the case."""
    try:
        return _made(op_name, op, shape, arrays, name, backward)
    except NotImplementedError as reason:
        raise Refused(str(reason).partition("cannot do this case: ")[2] or str(reason)) from reason
    except Refused:
        raise
    except Exception as reason:  # A rival that does not compile is a row of the table, not the end of it.
        raise Refused(f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:200]}") from reason


def _made(op_name: str, op: Op, shape: Shape, arrays: list[jax.Array], name: str, backward: bool) -> Rival:
    if name in OURS[op_name]:
        return compiled(name, op.run(shape, name), arrays, backward)
    library, _, form = name.partition(" ")
    package = {"jax.nn": "jax", "fla": "fla"}.get(library, library)
    if importlib.util.find_spec(package) is None:
        raise Refused(f"{package} is not installed")
    if library in ("torch", "fla"):
        return _torch(op_name, shape, arrays, name, backward)
    if op_name == "decode":
        return compiled(name, _jax_decode(shape, form), arrays, backward)
    function = _jax_nn(shape, form) if library == "jax.nn" else _tokamax(shape)
    return compiled(name, function, arrays, backward)


def compiled(name: str, function: Callable[..., Any], arrays: list[jax.Array], backward: bool) -> Rival:
    """A function of the arrays, or with `backward` its result and its gradients of the float ones, compiled."""
    if backward:
        floats = [n for n, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

        def run(d_out: jax.Array, *arrays: jax.Array) -> Any:
            def of_floats(*chosen: jax.Array) -> jax.Array:
                given = list(arrays)
                for n, x in zip(floats, chosen, strict=True):
                    given[n] = x
                return function(*given)

            out, pull = jax.vjp(of_floats, *(arrays[n] for n in floats))
            return out, *pull(d_out)

        out = jax.eval_shape(function, *arrays)
        d_out = jax.random.normal(jax.random.key(9), out.shape, jnp.float32).astype(out.dtype)
        arguments = [d_out, *arrays]
    else:
        run, arguments = function, arrays
    program = jax.jit(run).lower(*arguments).compile()
    memory = program.memory_analysis()
    return Rival(
        name,
        lambda: program(*arguments),
        jax.block_until_ready,
        lambda: [np.asarray(x, np.float32) for x in jax.tree.leaves(program(*arguments))],
        getattr(memory, "temp_size_in_bytes", None),
    )


def _jax_nn(shape: Shape, form: str) -> Callable[..., Any]:
    if shape.width != shape.values and form == "cudnn":
        raise Refused("widths of keys and values differ")
    options: dict[str, Any] = {}
    if shape.pattern.startswith("window"):
        options["local_window_size"] = (int(shape.pattern.removeprefix("window")) - 1, 0)
    elif shape.pattern.startswith("blocks"):
        options["mask"] = mask_of(shape).materialise(shape.length)
    causal = shape.pattern == "causal" or shape.pattern.startswith("window")
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=form, **options)


def _jax_decode(shape: Shape, form: str) -> Callable[..., Any]:
    if shape.page or shape.values != shape.width:
        raise Refused("a cache in pages, or values that are part of the keys")
    return lambda q, k, v, lengths: jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, query_seq_lengths=jnp.ones_like(lengths), implementation=form
    )


def _tokamax(shape: Shape) -> Callable[..., Any]:
    import tokamax

    if shape.pattern not in ("causal", "full"):
        raise Refused(f"pattern {shape.pattern}")
    return lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=shape.pattern == "causal")


def _torch(op_name: str, shape: Shape, arrays: list[jax.Array], name: str, backward: bool) -> Rival:
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("torch sees no GPU")
    if op_name == "decode":
        raise Refused("no such function")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[arrays[0].dtype.name]

    def moved(x: jax.Array) -> Any:
        return torch.from_numpy(np.array(x, np.float32)).to(device, dtype)

    q, k, v = (moved(x) for x in arrays[:3])
    if op_name == "attention":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        function = _torch_attention(torch, shape, name, device)
    else:
        function = _fla(shape, device)
    for x in (q, k, v):
        x.requires_grad_(backward)
    function(q, k, v)  # Compiles where it must.
    d_out = jax.random.normal(jax.random.key(9), (shape.batch, shape.length, shape.heads, shape.values), jnp.float32)
    d_out = moved(d_out.astype(arrays[0].dtype))
    d_out = d_out.transpose(1, 2).contiguous() if op_name == "attention" else d_out

    def once() -> Any:
        out = function(q, k, v)
        return (out, *torch.autograd.grad(out, (q, k, v), d_out)) if backward else (out,)

    def ours(x: Any) -> np.ndarray:
        x = x.transpose(1, 2) if op_name == "attention" else x
        return x.detach().float().cpu().numpy()

    return Rival(
        name,
        once,
        (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None),
        lambda: [ours(x) for x in once()],
    )


def _torch_attention(torch: Any, shape: Shape, name: str, device: str) -> Callable[..., Any]:
    grouped = dict(enable_gqa=True) if shape.heads != shape.kv_heads else {}
    if name == "torch flex":
        if device == "cpu":
            raise Refused("FlexAttention has no backward on CPU")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        block_mask = None
        if shape.pattern != "full":
            allowed = torch.from_numpy(np.array(mask_of(shape).materialise(shape.length))[0, 0]).to(device)
            block_mask = create_block_mask(
                lambda b, h, t, s: allowed[t, s], None, None, shape.length, shape.length, device=device
            )
        compiled = torch.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, **grouped)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if shape.pattern in ("causal", "full"):
        return lambda q, k, v: sdpa(q, k, v, is_causal=shape.pattern == "causal", **grouped)
    allowed = torch.from_numpy(np.array(mask_of(shape).materialise(shape.length))[0, 0]).to(device)
    return lambda q, k, v: sdpa(q, k, v, attn_mask=allowed, **grouped)


def _fla(shape: Shape, device: str) -> Callable[..., Any]:
    if device == "cpu":
        raise Refused("flash-linear-attention needs a GPU")
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    rates = torch.from_numpy(-np.array(lightning.decay_rates(shape.heads, 0, 2))).to(device)
    return lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=rates, scale=1.0)[0]


def exact(op_name: str, op: Op, shape: Shape, arrays: list[jax.Array], backward: bool) -> list[np.ndarray]:
    """What all rivals should give: our reference on the same inputs in float32."""
    wide = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]
    name = "xla" if shape.length > 2048 else "reference"
    return compiled(name, op.run(shape, name), wide, backward).result()
