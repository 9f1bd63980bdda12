"""How it is measured: interleaved rounds of several runs each, and what the device can do at best."""

import time

import jax
import jax.numpy as jnp

from .rivals import Rival


def interleaved(rivals: list[Rival], rounds: int, least: float) -> None:
    """Appends to each rival's `seconds` the time of one run per round; rivals alternate within a round.

    A round starts as many runs as fill `least` seconds and waits once, so that a device's queue never runs dry and the
    cost of starting a run is hidden behind the run before.
    """
    counts = {}
    for rival in rivals:
        rival.wait(rival.enqueue())
        begun = time.perf_counter()
        rival.wait(rival.enqueue())
        counts[rival.name] = max(1, min(1000, int(least / max(time.perf_counter() - begun, 1e-6))))
    for _ in range(rounds):
        for rival in rivals:
            rival.wait(rival.enqueue())  # Warms what its neighbour has cooled.
            begun = time.perf_counter()
            for _ in range(counts[rival.name]):
                last = rival.enqueue()
            rival.wait(last)
            rival.seconds.append((time.perf_counter() - begun) / counts[rival.name])


def peaks(dtype: str) -> dict[str, float]:
    """What this device does at best, measured now: FLOP/s of a square matrix product, bytes/s of a copy (read and
    written bytes counted)."""
    on_cpu = jax.default_backend() == "cpu"
    size, length = (2048, 2**26) if on_cpu else (8192, 2**30)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32).astype(dtype))
    y = jnp.ones(length // 2, jnp.bfloat16)
    copy = jax.jit(lambda y: y + jnp.bfloat16(1))
    best = [_best(lambda: product(x)), _best(lambda: copy(y))]
    return {"flops_per_second": 2 * size**3 / best[0], "bytes_per_second": 2 * y.nbytes / best[1]}


def _best(run) -> float:  # type: ignore[no-untyped-def]
    jax.block_until_ready(run())
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(4):
            last = run()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - begun) / 4)
    return min(times)
