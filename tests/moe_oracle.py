"""Mixtures of experts in float64 NumPy: one token at a time, written from the papers' equations.

Options are those of `configs/base.py:experts`, parameters arrays by dotted name as `layers_oracle.parameters` gives
them; `correction` is [N]. Softmax routing: Mixtral (arXiv 2401.04088, section 2.1) and DeepSeek-V2 (2405.04434,
2.1.2, with the device-limited choice by groups); sigmoid: DeepSeek-V3 (2412.19437, equations 12 to 20).
"""

import numpy as np
from layers_oracle import mlp


def scores(logits: np.ndarray, router: str) -> np.ndarray:
    """Of one token, [N]."""
    if router == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def choose(logits: np.ndarray, options: dict, correction: np.ndarray) -> dict[int, float]:
    """The chosen experts of one token and their weights."""
    own = scores(logits, options["router"])
    worth = own + correction
    size = len(worth) // options["groups"]
    best = 2 if options["group_score"] == "top2" else 1
    group_worth = [sum(sorted(worth[g * size : (g + 1) * size])[-best:]) for g in range(options["groups"])]
    groups = sorted(range(options["groups"]), key=lambda g: (-group_worth[g], g))[: options["groups_chosen"]]
    allowed = [n for n in range(len(worth)) if n // size in groups]
    chosen = sorted(allowed, key=lambda n: (-worth[n], n))[: options["chosen"]]
    total = sum(own[n] for n in chosen) if options["renormalise"] else 1
    return {n: options["scale"] * own[n] / total for n in chosen}


def mixture(p: dict, x: np.ndarray, options: dict, kind: str, correction: np.ndarray | float = 0.0) -> np.ndarray:
    """The layer's output for x [B, T, D]."""
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        token = x[place]
        for n, weight in choose(token @ p["router.weight"], options, correction).items():
            out[place] += weight * mlp(_expert(p, n), token, kind, False)
        if options["shared"]:
            out[place] += mlp({key[7:]: value for key, value in p.items() if key[:7] == "shared."}, token, kind, False)
    return out


def _expert(p: dict, n: int) -> dict:
    return {f"{name}.weight": p[name][n] for name in ("gate", "up", "down") if name in p}


def balance(
    p: dict, x: np.ndarray, valid: np.ndarray, options: dict, correction: np.ndarray | float = 0.0
) -> tuple[float, float]:
    """The load-balance loss and the router's z-loss, before their weights."""
    count, squares, by_row = options["count"], [], []
    for row, counted in zip(x, valid, strict=True):
        loads, means, squares_here = [], [], []
        for token in row[counted]:
            logits = token @ p["router.weight"]
            chosen, own = choose(logits, options, correction), scores(logits, options["router"])
            loads.append([(n in chosen) / options["chosen"] for n in range(count)])
            means.append(own / own.sum())
            squares_here.append((np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()) ** 2)
        squares += squares_here
        if loads:
            by_row.append((np.array(loads), np.array(means)))
    if options["balance_form"] == "switch":
        by_row = [tuple(np.concatenate(each) for each in zip(*by_row, strict=True))]
    values = [count * np.sum(load.mean(0) * mean.mean(0)) for load, mean in by_row]
    return float(np.mean(values)), float(np.mean(squares))
