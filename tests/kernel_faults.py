"""Faults that kernels are known to have had, one by one, and small checks that must notice each.

A fault changes one line of the package `kernels`; `planted` imports a copy of the package that has it. The list
(kernel_faults.txt) goes by what went wrong elsewhere: an edge of the causal mask, a last partial block left out, a
rescale skipped, a barrier omitted, the wrong block size in a bound, a factor forgotten in a gradient or applied twice,
a mean for a sum over the heads of a group, the wrong base of a logarithm, a slot that is one off, a decay over a whole
chunk where the last is short. Checks compare with NumPy in float64 and import nothing of the package themselves.
"""

import contextlib
import dataclasses
import importlib
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from decode_oracle import LONG, SETTINGS, Setting
from decode_oracle import inputs as decode_inputs
from decode_oracle import oracle as decode_oracle
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

ROOT = pathlib.Path(__file__).parents[1]
HOPPER = hasattr(plgpu, "InterpretGPUParams")  # Whether Mosaic GPU kernels can be interpreted.


@dataclasses.dataclass(frozen=True)
class Fault:
    """`new` wherever `old` is in kernels/`file`; `check` must fail then."""

    check: str
    name: str
    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.check}-{self.name}".replace(" ", "_")


@contextlib.contextmanager
def planted(fault: Fault | None, folder: pathlib.Path) -> Iterator[None]:
    """Within it `kernels` is a copy with the fault; afterwards the package is what it was."""
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    if fault is not None:
        path = folder / "kernels" / fault.file
        text = path.read_text()
        assert fault.old in text, f"{fault.file} has changed: {fault.old!r} is no longer there"
        path.write_text(text.replace(fault.old, fault.new))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "kernels"}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        assert folder in pathlib.Path(load("kernels").__file__).parents
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
            del sys.modules[name]
        sys.modules.update(before)


def load(module: str) -> Any:
    return importlib.import_module(module)


def close(found: Any, right: dict[str, np.ndarray], tolerance: float) -> None:
    assert len(found) == len(right)
    for (name, exact), x in zip(right.items(), found, strict=True):
        x = np.asarray(x, np.float64)
        assert x.shape == exact.shape, name
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(exact), err_msg=name)
        seen = np.isfinite(exact)
        error = np.linalg.norm(x[seen] - exact[seen]) / np.linalg.norm(exact[seen])
        assert error < tolerance, f"{name}: {error:.1e}"


def exact_attention(x: dict[str, np.ndarray], causal: bool) -> dict[str, np.ndarray]:
    """Attention whose last query sees the last key, and its gradients, by the book; [T, H, D]."""
    (length, heads, width), (keys, kv_heads, _) = x["q"].shape, x["k"].shape
    scale, group = width**-0.5, heads // kv_heads
    seen = np.arange(keys) <= np.arange(length)[:, None] + (keys - length if causal else keys)
    names = zip(("out", "d_q", "d_k", "d_v"), ("d_out", *"qkv"), strict=True)
    right = {name: np.zeros(x[like].shape) for name, like in names}
    lse = np.zeros((length, heads))
    for head in range(heads):
        q, k, v, d_out = x["q"][:, head], x["k"][:, head // group], x["v"][:, head // group], x["d_out"][:, head]
        s = np.where(seen, scale * q @ k.T, -np.inf)
        lse[:, head] = np.log(np.exp(s).sum(1))
        p = np.exp(s - lse[:, head, None])
        right["out"][:, head] = p @ v
        d_s = p * (d_out @ v.T - (d_out * right["out"][:, head]).sum(1, keepdims=True) + x["d_lse"][:, head, None])
        right["d_q"][:, head] = scale * d_s @ k
        right["d_k"][:, head // group] += scale * d_s.T @ q
        right["d_v"][:, head // group] += p.T @ d_out
    return {"out": right.pop("out"), "lse": lse, **right}


def attention(
    name: str,
    blocks: tuple[Any, Any],
    dtype: str = "float32",
    lengths: tuple[int, int] = (21, 27),
    causal: bool = True,
    gradients: bool = True,
) -> None:
    """Forward and all `gradients`; two query heads to each key head, and lengths that no block divides."""
    rng = np.random.default_rng(0)
    (length, keys), widths = lengths, {"q": 24, "k": 24, "v": 16, "d_out": 16}
    counts = {"q": (length, 4), "k": (keys, 2), "v": (keys, 2), "d_out": (length, 4)}
    x = {key: np.asarray(jnp.asarray(rng.standard_normal((*counts[key], widths[key])), dtype)) for key in counts}
    x = {key: a.astype(np.float64) for key, a in x.items()} | {"d_lse": rng.standard_normal((length, 4))}
    x["q"] *= 4  # So that the greatest score so far matters.
    tokens = load("kernels.tokens").sequence
    masks = load("kernels.attention.masks")
    options: dict[str, Any] = dict(
        mask=masks.causal() if causal else masks.everything(),
        q_tokens=tokens(length, start=keys - length),
        k_tokens=tokens(keys),
        implementation=name,
    )
    call = load("kernels.attention").attention
    if name == "xla":
        plan = load("kernels.attention.plan")
        plan.choose_blocks = lambda *case: 2 * (plan.Blocks(8, 8, 2, 2),)
    else:
        sizes = load("kernels.attention.fused").Sizes
        load(f"kernels.attention.{name}").chosen = lambda *case: sizes(*blocks)

    @jax.jit
    def run(q: Any, k: Any, v: Any, d_out: Any, d_lse: Any) -> Any:
        if not gradients:
            return call(q, k, v, **options)
        (out, lse), pull = jax.vjp(lambda q, k, v: call(q, k, v, **options), q, k, v)
        return out, lse, *pull((d_out.astype(out.dtype), d_lse))

    with load("kernels.platform").interpreted():
        given = [jnp.asarray(x[key], dtype)[None] for key in ("q", "k", "v", "d_out")]
        found = [a[0] for a in run(*given, jnp.asarray(x["d_lse"], jnp.float32)[None])]
    right = exact_attention(x, causal)
    right = right if gradients else {name: right[name] for name in ("out", "lse")}
    close(found, right, 1e-5 if dtype == "float32" else 2e-2)


def decode(name: str, setting: Setting, dtype: str = "float32", splits: int = 1) -> None:
    x = decode_inputs(setting, dtype)
    op = load("kernels.decode")
    limits = op.limits
    options: dict[str, Any] = dict(window=setting.window, soft_cap=setting.soft_cap, splits=splits, implementation=name)
    options |= dict(starts=x.get("starts"), sinks=x.get("sinks"))
    options["value_width"] = setting.shape[5] if setting.shared else None
    own = limits.triton_sizes
    patches: dict[str, Any] = dict(tpu_block=lambda *_: 16, XLA_BLOCK=16)
    patches["triton_sizes"] = lambda *case: dataclasses.replace(own(*case), block=16)

    @jax.jit
    def run(x: Any) -> Any:
        if setting.page:
            return op.paged_decode_attention(x["q"], x["k"], x.get("v"), x["table"], x["lengths"], **options)
        return op.decode_attention(x["q"], x["k"], x.get("v"), x["lengths"], **options)

    # Copies happen as late as they may.
    late = pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
    interpreting = mock.patch.object(load("kernels.decode.pallas_tpu"), "interpreting", lambda: late)
    with mock.patch.multiple(limits, **patches), interpreting, load("kernels.platform").interpreted():
        found = run(x)
    out, lse = decode_oracle(setting, x)
    close(found, {"out": out, "lse": lse}, 1e-5 if dtype == "float32" else 2e-2)


def lightning(name: str, **sizes: Any) -> None:
    """Output, final state and gradients; the last chunk is short."""
    rng = np.random.default_rng(0)
    length, heads, width, value = 37, 2, 8, 16
    shapes = dict(q=(length, heads, width), k=(length, heads, width), v=(length, heads, value))
    shapes |= dict(state=(heads, width, value), d_out=(length, heads, value), d_state=(heads, width, value))
    x = {key: rng.standard_normal(shape).astype(np.float32).astype(np.float64) for key, shape in shapes.items()}
    decay = np.array([0.05, 0.4])
    right = {key: np.zeros(shapes[like]) for key, like in zip(("out", "final", "d_q", "d_k", "d_v", "d_initial"),
             ("v", "state", "q", "k", "v", "state"), strict=True)}  # fmt: skip
    for head in range(heads):
        kept, state, states = np.exp(-decay[head]), x["state"][head], [x["state"][head]]
        for t in range(length):
            state = kept * state + np.outer(x["k"][t, head], x["v"][t, head])
            states.append(state)
            right["out"][t, head] = x["q"][t, head] @ state
        right["final"][head], d_state = state, x["d_state"][head]
        for t in reversed(range(length)):
            right["d_q"][t, head] = states[t + 1] @ x["d_out"][t, head]
            d_state = d_state + np.outer(x["q"][t, head], x["d_out"][t, head])
            right["d_k"][t, head] = d_state @ x["v"][t, head]
            right["d_v"][t, head] = x["k"][t, head] @ d_state
            d_state = kept * d_state
        right["d_initial"][head] = d_state
    platform = load("kernels.platform")
    with platform.interpreted():
        module = load(f"kernels.lightning.{name}")
        more = dict(sweeps=module.Sweeps(**sizes)) if sizes else {}

        @jax.jit
        def run(q: Any, k: Any, v: Any, state: Any, d_out: Any, d_state: Any) -> Any:
            def forward(q: Any, k: Any, v: Any, state: Any) -> Any:
                return module.lightning_attention(q, k, v, jnp.asarray(decay, jnp.float32), None, state, 16, **more)

            found, pull = jax.vjp(forward, q, k, v, state)
            return *found, *pull((d_out, d_state))

        found = [a[0] for a in run(*(jnp.asarray(a, jnp.float32)[None] for a in x.values()))]
    close(found, right, 1e-5)


_PAGED = dataclasses.replace(SETTINGS["pages"], page=8)
CHECKS: dict[str, Callable[[], None]] = {
    "attention xla": lambda: attention("xla", ()),
    "attention pallas_tpu": lambda: attention("pallas_tpu", ((8, 16), (8, 16))),
    "full attention pallas_tpu": lambda: attention("pallas_tpu", ((8, 16), (8, 16)), causal=False),
    "attention triton": lambda: attention("triton", ((16, 32), (16, 32)), lengths=(21, 140)),
    "decode xla": lambda: decode("xla", SETTINGS["three queries"], splits=2),
    "decode pallas_tpu": lambda: decode("pallas_tpu", SETTINGS["capped"]),
    "pages pallas_tpu": lambda: decode("pallas_tpu", _PAGED),
    "decode triton": lambda: decode("triton", SETTINGS["capped"], splits=2),
    "lightning xla": lambda: lightning("xla"),
    "lightning pallas_tpu": lambda: lightning("pallas_tpu", chunk=8, group=1, interpret=True),
    "lightning triton": lambda: lightning("triton", chunk=16, block=16),
}
if HOPPER:
    _SIZES: dict[str, Any] = dict(blocks=((64, 64), (64, 64)), dtype="bfloat16", lengths=(64, 128))
    CHECKS["attention mosaic_gpu"] = lambda: attention("mosaic_gpu", **_SIZES)
    CHECKS["attention forward mosaic_gpu"] = lambda: attention("mosaic_gpu", **_SIZES, gradients=False)
    CHECKS["decode mosaic_gpu"] = lambda: decode("mosaic_gpu", LONG["long pages"], dtype="bfloat16")


def faults() -> list[Fault]:
    """Those in kernel_faults.txt: check, name and file, the line as it is and as it then is."""
    entries = pathlib.Path(__file__).with_suffix(".txt").read_text().split("\n\n")
    found = []
    for head, old, new in map(str.splitlines, entries):
        check, name, file = re.fullmatch(r"(.+?): (.+) \((.+)\)", head).groups()
        found.append(Fault(check, name, file, old.removeprefix("- "), new.removeprefix("+ ")))
    return found
