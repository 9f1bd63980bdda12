"""Schedules, masks and one update of each optimiser, against closed forms in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from training import optimizers

STEPS, WARM, PEAK, FINAL = 100, 10, 0.5, 0.1
AXES = {
    "table": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "query": ("embed", "heads"),
    "stacked": ("layers", "embed", "mlp"),
    "gain": (None,),
    "stacked_gain": ("layers", None),
    "per_head": ("heads", "latent", "head_dim"),
}


def options(**changed):
    config = base.get_config().optimizer
    config.update({"learning_rate": PEAK, "final_share": FINAL, "warmup_steps": WARM, "clip_norm": 0.0})
    config.update(changed)
    return config


def expected_rate(kind, step):
    """The rate of step 0, 1, ... as the docstring says it."""
    done = step + 1
    if done <= WARM:
        return PEAK * done / WARM
    share = (done - WARM) / (STEPS - WARM)
    if kind == "cosine":
        return PEAK * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * share)))
    if kind == "linear":
        return PEAK * (1 - (1 - FINAL) * share)
    if kind == "constant":
        return PEAK
    decay = 0.2 * STEPS
    return PEAK if done <= STEPS - decay else PEAK * (1 - (1 - FINAL) * (done - (STEPS - decay)) / decay)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_schedules_are_their_closed_forms(kind):
    rate = optimizers.schedule(options(schedule=kind), STEPS)
    found = jax.jit(jax.vmap(rate))(jnp.arange(STEPS))
    np.testing.assert_allclose(found, [expected_rate(kind, step) for step in range(STEPS)], rtol=2e-6)
    assert found[0] > 0 and np.isclose(found[WARM - 1], PEAK)
    if kind != "constant":
        np.testing.assert_allclose(found[-1], PEAK * FINAL, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_schedules_without_warmup_and_with_nothing_else(kind):
    alone = optimizers.schedule(options(schedule=kind, warmup_steps=0), 10)
    assert 0.8 * PEAK < float(alone(0)) <= PEAK
    only_warmup = optimizers.schedule(options(schedule=kind, warmup_steps=10), 10)
    np.testing.assert_allclose(float(only_warmup(9)), PEAK, rtol=1e-6)
    assert np.isfinite(float(optimizers.schedule(options(schedule=kind, warmup_steps=0), 1)(0)))


def test_decay_mask_takes_matrices_but_no_tables_and_no_stacked_vectors():
    mask = optimizers.decayed("matrices", AXES)
    assert {name for name, taken in mask.items() if taken} == {"head", "query", "stacked", "per_head"}
    assert all(optimizers.decayed("all", AXES).values()) and not any(optimizers.decayed("none", AXES).values())


def arrays(seed):
    rng = np.random.default_rng(seed)
    shapes = {"table": (5, 4), "head": (4, 5), "query": (4, 6), "stacked": (3, 4, 4), "gain": (4,)}
    shapes |= {"stacked_gain": (3, 4), "per_head": (2, 3, 4)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def updated(config, gradients_of_steps, params):
    """Parameters after one optax update per entry, at a constant rate."""
    config.update({"schedule": "constant", "warmup_steps": 0})
    transformation = optimizers.build(config, optimizers.schedule(config, STEPS), AXES)
    now = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    own = transformation.init(now)
    update = jax.jit(transformation.update)
    for gradients in gradients_of_steps:
        gradients = {name: jnp.asarray(value, jnp.float32) for name, value in gradients.items()}
        updates, own = update(gradients, own, now)
        now = {name: now[name] + updates[name] for name in now}
    return now


def check(found, expected):
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


DECAYED = {"head", "query", "stacked", "per_head"}
RATE, DECAY = 0.05, 0.3


def test_adamw_two_steps():
    params, one, two = arrays(0), arrays(1), arrays(2)
    config = options(name="adamw", learning_rate=RATE, weight_decay=DECAY, b1=0.8, b2=0.9, epsilon=1e-8)
    expected = {name: value.copy() for name, value in params.items()}
    mean = {name: 0.0 for name in params}
    square = {name: 0.0 for name in params}
    for count, gradients in enumerate((one, two), 1):
        for name, g in gradients.items():
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.9 * square[name] + 0.1 * g * g
            direction = (mean[name] / (1 - 0.8**count)) / (np.sqrt(square[name] / (1 - 0.9**count)) + 1e-8)
            expected[name] = expected[name] - RATE * (direction + DECAY * (name in DECAYED) * expected[name])
    check(updated(config, [one, two], params), expected)


def test_lion_two_steps():
    params, one, two = arrays(0), arrays(1), arrays(2)
    config = options(name="lion", learning_rate=RATE, weight_decay=DECAY, b1=0.9, b2=0.95)
    expected = {name: value.copy() for name, value in params.items()}
    momentum = {name: 0.0 for name in params}
    for gradients in (one, two):
        for name, g in gradients.items():
            direction = np.sign(0.9 * momentum[name] + 0.1 * g)
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            expected[name] = expected[name] - RATE * (direction + DECAY * (name in DECAYED) * expected[name])
    check(updated(config, [one, two], params), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_sgd_two_steps(momentum):
    params, one, two = arrays(0), arrays(1), arrays(2)
    config = options(name="sgd", learning_rate=RATE, weight_decay=DECAY, momentum=momentum)
    expected = {name: value.copy() for name, value in params.items()}
    trace = {name: 0.0 for name in params}
    for gradients in (one, two):
        for name, g in gradients.items():
            trace[name] = g + momentum * trace[name]
            expected[name] = expected[name] - RATE * (trace[name] + DECAY * (name in DECAYED) * expected[name])
    check(updated(config, [one, two], params), expected)


def newton_schulz(matrix):
    """Five quintic iterations towards the nearest orthogonal matrix, with the coefficients of Jordan 2024."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_first_step_orthogonalises_each_matrix_and_leaves_the_rest_to_adamw():
    params, one = arrays(0), arrays(1)
    config = options(name="muon", learning_rate=RATE, weight_decay=DECAY, momentum=0.9, b1=0.8, b2=0.9)
    found = updated(config, [one], params)
    expected = {}
    for name, g in one.items():
        if name in ("query", "stacked", "per_head"):
            # Nesterov momentum with bias correction; the first step is a multiple of g, which the norm takes out.
            scale = 0.2 * np.sqrt(max(g.shape[-2:]))
            matrices = g.reshape(-1, *g.shape[-2:])
            direction = scale * np.stack([newton_schulz(matrix) for matrix in matrices]).reshape(g.shape)
        else:
            # Adam with Nesterov momentum (Dozat 2016): the bias correction looks one step ahead for the average.
            direction = (0.8 * 0.2 * g / (1 - 0.8**2) + 0.2 * g / (1 - 0.8)) / (np.abs(g) + 1e-8)
        expected[name] = params[name] - RATE * (direction + DECAY * (name in DECAYED) * params[name])
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-3, atol=2e-4, err_msg=name)


def test_clip_comes_before_the_optimiser():
    params, one = arrays(0), arrays(1)
    norm = math.sqrt(sum(float((g**2).sum()) for g in one.values()))
    config = options(name="sgd", learning_rate=RATE, weight_decay=0.0, momentum=0.0, clip_norm=norm / 4)
    check(updated(config, [one], params), {name: params[name] - RATE * one[name] / 4 for name in params})
