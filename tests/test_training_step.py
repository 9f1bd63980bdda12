"""The step against numbers worked out independently: NumPy in float64, closed forms, finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import training_standin as standin

import sharding
from configs import base
from configs.errors import ConfigError
from training import gradient_rules, objectives, optimizers, state, step
from training.objectives import next_token

RATE = 0.1


def options(**changed):
    config = base.get_config().optimizer
    config.update({"name": "sgd", "schedule": "constant", "learning_rate": RATE, "warmup_steps": 0, "momentum": 0.0})
    config.update({"weight_decay": 0.0, "clip_norm": 0.0})
    config.update(changed)
    return config


def objective(**changed):
    config = base.get_config().objective
    config.update(changed)
    return objectives.get(config.name)(config)


def built(structure=None, loss=None, **changed):
    """(state, compiled step) of the stand-in."""
    structure = structure or standin.structure()
    config = options(**changed)
    rate = optimizers.schedule(config, 100)
    optimizer = optimizers.build(config, rate, structure.axes)
    rule = gradient_rules.get(config.gradient_rule)(config)
    layout = sharding.build(base.get_config().sharding)
    create = functools.partial(state.create, structure, optimizer, average=config.ema_decay > 0)
    now = jax.jit(create)(jax.random.key(0))
    return now, jax.jit(step.build(structure, loss or objective(), rule, optimizer, rate, config, layout))


def reference(logits, targets, weight, z_loss, smoothing, vocabulary):
    """The objective token by token in float64."""
    logits = logits.astype(np.float64)
    total = 0.0
    for row in range(logits.shape[0]):
        for place in range(logits.shape[1]):
            one = logits[row, place]
            top = one.max()
            lse = top + np.log(np.exp(one - top).sum())
            log_p = one - lse
            wanted = np.zeros_like(one)
            wanted[:vocabulary] = smoothing / vocabulary
            wanted[targets[row, place]] += 1 - smoothing
            loss = -sum(q * lp for q, lp in zip(wanted, log_p, strict=True) if q) + z_loss * lse**2
            total += weight[row, place] * loss
    return total


@pytest.mark.parametrize("z_loss, smoothing", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.1, 0.1)])
def test_objective_equals_numpy_and_its_gradient_finite_differences(z_loss, smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 7)).astype(np.float32)
    logits[..., 5:] = np.finfo(np.float32).min  # Rows of the table without a token.
    targets, weight = rng.integers(0, 5, (2, 3)), rng.random((2, 3)).astype(np.float32)
    function = lambda x: next_token.summed(x, targets, weight, z_loss, smoothing, 5)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(function))(logits)
    gradient = np.asarray(gradient)
    np.testing.assert_allclose(value, reference(logits, targets, weight, z_loss, smoothing, 5), rtol=2e-6)
    small = 1e-6
    for index in np.ndindex(2, 3, 5):
        up, down = logits.astype(np.float64), logits.astype(np.float64)
        up[index] += small
        down[index] -= small
        slope = [reference(x, targets, weight, z_loss, smoothing, 5) for x in (up, down)]
        np.testing.assert_allclose(gradient[index], (slope[0] - slope[1]) / (2 * small), atol=2e-6)
    assert np.all(gradient[..., 5:] == 0)


def test_loss_is_the_weighted_mean_and_adds_the_models_own_losses():
    structure, batch = standin.structure(auxiliary=0.5), standin.batch()
    params, rest = jax.jit(structure.init)(jax.random.key(1))
    output = jax.jit(lambda: structure.merge(params, rest)(batch["inputs"]))()
    plain = reference(np.asarray(output.logits), batch["targets"], batch["weight"], 0, 0, standin.VOCABULARY)
    plain /= batch["weight"].sum()
    loss, metrics = jax.jit(lambda: objective()(structure.merge(params, rest), batch, None))()
    np.testing.assert_allclose(metrics["cross_entropy"], plain, rtol=1e-6)
    np.testing.assert_allclose(loss, plain + float(output.aux["loss/balance"]), rtol=1e-6)
    assert float(metrics["loss/balance"]) > 0 and "tap/0" not in metrics  # Only scalars are metrics.


def test_a_batch_of_padding_has_no_loss_and_no_gradient():
    structure, batch = standin.structure(), standin.batch()
    batch["weight"][:] = 0
    function = jax.jit(step.differentiated(structure, objective()))
    params, rest = jax.jit(structure.init)(jax.random.key(1))
    (loss, _), gradients = function(params, rest, batch, jax.random.key(0))
    assert loss == 0 and all(np.all(g == 0) for g in gradients.values())


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch(parts):
    structure, batch = standin.structure(), standin.batch(rows=8)
    assert (
        len({float(row.sum()) for row in batch["weight"]}) > 2
    )  # Micro-batches of unlike weight, or this proves little.
    now, whole = built(structure, objective(z_loss=0.1))
    _, in_parts = built(structure, objective(z_loss=0.1), accumulate=parts)
    big, report = whole(now, batch)
    small, also = in_parts(now, batch)
    for name in big.params:
        np.testing.assert_allclose(big.params[name], small.params[name], rtol=1e-5, atol=1e-7)
    for name in report.metrics:
        np.testing.assert_allclose(report.metrics[name], also.metrics[name], rtol=1e-5)
    assert int(big.rest["calls"]) == 1 and int(small.rest["calls"]) == parts


def test_structure_splits_and_merges_exactly():
    structure = standin.structure()
    params, rest = structure.init(jax.random.key(3))
    assert sorted(params) == ["gain", "head", "inner", "table"] and list(rest) == ["calls"]
    assert structure.axes["inner"] == ("layers", "embed", "mlp")
    again, others = structure.split(structure.merge(params, rest))
    assert all(np.array_equal(params[name], again[name]) for name in params) and others.keys() == rest.keys()


def test_average_is_the_recursion_from_the_initial_weights():
    now, one = built(ema_decay=0.75)
    expected = {name: np.asarray(value, np.float64) for name, value in now.params.items()}
    for seed in range(4):
        now, _ = one(now, standin.batch(seed=seed))
        expected = {name: 0.75 * x + 0.25 * np.asarray(now.params[name], np.float64) for name, x in expected.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(now.ema[name], value, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(state.evaluated(now)[name], now.ema[name])
    assert int(now.step) == 4


def test_clipping_scales_the_gradient_to_the_limit():
    now, one = built(clip_norm=0.01)
    moved, report = one(now, standin.batch())
    assert report.metrics["gradient_norm"] > 0.02  # Reported before clipping.
    change = [np.asarray(moved.params[name] - now.params[name], np.float64) for name in now.params]
    np.testing.assert_allclose(np.sqrt(sum((x**2).sum() for x in change)), RATE * 0.01, rtol=1e-4)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_leaves(average):
    def loss(model, batch, rng):
        """Finite itself, with a gradient of NaN for `head` where the first weight is 3."""
        value, metrics = objective()(model, batch, rng)
        slope = jnp.where(batch["weight"][0, 0] == 3, jnp.nan, 0.0)
        poison = jax.custom_jvp(lambda x: jnp.zeros(()))
        poison.defjvp(lambda primals, tangents: (jnp.zeros(()), jnp.sum(tangents[0]) * slope))
        return value + poison(model.head[...]), metrics

    now, one = built(loss=loss, name="adamw", ema_decay=average)
    good = standin.batch()
    bad = {**good, "weight": good["weight"].copy()}
    bad["weight"][0, 0] = 3
    before, report = one(now, good)
    assert not report.halted and not np.any(report.broken)
    after, report = one(before, bad)
    names = step.leaves(now.params)
    assert [name for name, broken in zip(names, report.broken, strict=True) if broken] == ["head"]
    assert np.isfinite(report.metrics["loss"]) and bool(report.halted)
    later, report = one(after, good)  # Already under way when the report is read.
    assert bool(report.halted) and not np.any(report.broken)
    for stopped in (after, later):
        assert bool(stopped.halted)
        same = jax.tree.map(
            lambda a, b: np.array_equal(jax.random.key_data(a) if a.dtype == now.rng.dtype else a,
                                        jax.random.key_data(b) if b.dtype == now.rng.dtype else b),
            dataclasses.replace(stopped, halted=before.halted), before,
        )  # fmt: skip
        assert all(jax.tree.leaves(same))


def test_a_loss_that_is_not_finite_is_called_loss():
    def loss(model, batch, rng):
        value, metrics = objective()(model, batch, rng)
        return value + jax.lax.stop_gradient(jnp.inf), metrics

    now, one = built(loss=loss)
    after, report = one(now, standin.batch())
    assert [n for n, broken in zip(step.leaves(now.params), report.broken, strict=True) if broken] == ["loss"]
    assert int(after.step) == 0


def test_sam_takes_the_gradient_uphill_closed_form():
    # f(w) = w' A w / 2: gradient A w, and at w + r A w / |A w| it is A w + r A A w / |A w|.
    matrix = np.array([[2.0, 0.3], [0.3, 0.5]])
    weights = np.array([1.0, -2.0])

    def value_and_grad(params, batch, rng):
        function = lambda p: 0.5 * p["w"] @ jnp.asarray(matrix, jnp.float32) @ p["w"]  # noqa: E731
        loss, gradients = jax.value_and_grad(function)(params)
        return (loss, "aux"), gradients

    rule = gradient_rules.get("sam")(options(sam_radius=0.25))
    (loss, aux), gradients = rule(value_and_grad, {"w": jnp.asarray(weights, jnp.float32)}, None, None)
    slope = matrix @ weights
    np.testing.assert_allclose(gradients["w"], slope + 0.25 * matrix @ slope / np.linalg.norm(slope), rtol=1e-6)
    np.testing.assert_allclose(loss, 0.5 * weights @ matrix @ weights, rtol=1e-6)
    assert aux == "aux"
    _, still = rule(value_and_grad, {"w": jnp.zeros(2)}, None, None)
    assert np.array_equal(still["w"], np.zeros(2))


def test_sam_goes_through_the_step_and_through_accumulation():
    structure, batch = standin.structure(), standin.batch(rows=8)
    now, plain = built(structure)
    _, sharp = built(structure, gradient_rule="sam", sam_radius=0.5)
    _, in_parts = built(structure, gradient_rule="sam", sam_radius=0.5, accumulate=2)
    by_rule = {name: one(now, batch) for name, one in (("plain", plain), ("sharp", sharp), ("parts", in_parts))}
    assert by_rule["plain"][1].metrics["loss"] == by_rule["sharp"][1].metrics["loss"]  # Loss of where we stand.
    for name in now.params:
        sharp_params = by_rule["sharp"][0].params[name]
        np.testing.assert_allclose(sharp_params, by_rule["parts"][0].params[name], rtol=2e-5, atol=1e-6)
        assert not np.allclose(sharp_params, by_rule["plain"][0].params[name], atol=1e-5)


def test_training_lowers_the_loss():
    now, one = built(name="adamw", learning_rate=0.03, ema_decay=0.5)
    batch, losses = standin.batch(), []
    for _ in range(40):
        now, report = one(now, batch)
        losses.append(float(report.metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "get, name, near",
    [
        (objectives.get, "next_tokn", "next_token"),
        (gradient_rules.get, "sma", "sam"),
        (lambda name: optimizers.build(options(name=name), lambda step: 0.0, {}), "adam", "adamw"),
        (lambda name: optimizers.schedule(options(schedule=name), 10), "cosin", "cosine"),
        (lambda name: optimizers.decayed(name, {}), "matrix", "matrices"),
    ],
)
def test_an_unknown_name_gives_the_nearest(get, name, near):
    with pytest.raises(ConfigError, match=f"{name}.*did you mean.*{near}"):
        get(name)


def test_optimizer_state_follows_optax_over_several_steps():
    """The step feeds optax what optax expects: the same updates as calling it by hand."""
    structure, batch = standin.structure(), standin.batch()
    now, one = built(structure, name="adamw", weight_decay=0.1, clip_norm=1.0)
    config = ml_collections.ConfigDict(options(name="adamw", weight_decay=0.1, clip_norm=1.0))
    optimizer = optimizers.build(config, optimizers.schedule(config, 100), structure.axes)
    params, own = now.params, optimizer.init(now.params)

    @jax.jit
    def by_hand(params, own):
        _, gradients = step.differentiated(structure, objective())(params, now.rest, batch, now.rng)
        updates, own = optimizer.update(gradients, own, params)
        return optax.apply_updates(params, updates), own

    for _ in range(3):
        params, own = by_hand(params, own)
        now, _ = one(now, batch)
    for name in params:
        np.testing.assert_allclose(now.params[name], params[name], rtol=1e-5, atol=1e-7)
