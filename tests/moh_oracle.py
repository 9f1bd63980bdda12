"""Weights of heads and the load-balance loss of MoH in float64 NumPy: loops over tokens, written from the formulas."""

import numpy as np


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def gates(
    p, x, q, *, heads, shared_heads, routed_active, router="learned", score="released", two_stage=True, balance=0.01,
    straight_through="all", counted=None,
):  # fmt: skip
    """(weights [B, T, H], chosen [B, T, R], loss) from the layer's input and the queries before positions."""
    del straight_through  # Forward it is the same.
    batch, length = x.shape[:2]
    routed = heads - shared_heads
    weights, chosen = np.zeros((batch, length, heads)), np.zeros((batch, length, routed), bool)
    scores = np.zeros((batch, length, routed))
    for b in range(batch):
        for t in range(length):
            if routed and router == "learned":
                a = softmax(p["routed_router.weight"].T @ x[b, t])
            elif routed:
                norms = np.array([np.sqrt(np.sum(q[b, t, h] ** 2)) for h in range(shared_heads, heads)])
                mean = norms.sum() / routed
                a = softmax(norms / np.sqrt(np.sum((norms - mean) ** 2) / (routed - 1)))
            else:
                a = np.zeros(0)
            best = sorted(range(routed), key=lambda i: (-a[i], i))[:routed_active]  # noqa: B023
            shares = (1.0, 1.0)
            if two_stage and shared_heads and routed and router == "learned":
                shares = softmax(p["group_router.weight"].T @ x[b, t]) * (2 if score == "released" else 1)
            for h in range(shared_heads):
                if router == "query_norm":
                    weights[b, t, h] = 1
                    continue
                s = softmax(p["shared_router.weight"].T @ x[b, t])[h] if shared_heads > 1 else 1.0
                weights[b, t, h] = shares[0] * s * (shared_heads if score == "released" else 1)
            for i in best:
                chosen[b, t, i] = True
                if router == "query_norm":
                    weights[b, t, shared_heads + i] = 1
                elif score == "released":
                    weights[b, t, shared_heads + i] = shares[1] * routed_active * a[i] / sum(a[j] for j in best)
                else:
                    weights[b, t, shared_heads + i] = shares[1] * a[i]
            scores[b, t] = a
    real = np.ones((batch, length), bool) if counted is None else counted
    loss = balance * routed * sum(chosen[real][:, i].mean() * scores[real][:, i].mean() for i in range(routed))
    return weights, chosen, loss
