"""Variants made equal: checked on real models, counted anew."""

import jax
import pytest
from flax import nnx

import models
from configs import command_line, fields
from configs.errors import ConfigError
from models import budget

VOCABULARY = 259


def config(attention: str):
    return command_line.load(f"configs/quickstart.py:attention={attention}")


def small(attention: str):
    return fields.apply(
        config(attention), {"model.width": 32, "model.depth": 1, "data.length": 64, "model.mlp.width": 512}
    )


def count(settings) -> int:
    model = nnx.eval_shape(lambda: models.build(settings.model, vocab_size=VOCABULARY, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_the_shipped_sweep_has_equal_parameters():
    base = command_line.load(command_line.load_file("configs/sweeps/attention.py", "CONFIG"))
    points = command_line.load_file("configs/sweeps/attention.py", "SWEEP")
    counts = {point["name"]: count(fields.apply(base, point)) for point in points if point["seed"] == 0}
    assert len(counts) >= 5
    assert max(counts.values()) <= 1.01 * min(counts.values()), counts


def test_equal_parameters_by_mlp_width():
    variants = {name: small(name) for name in ("gqa", "mla")}
    overrides = budget.equal(variants, VOCABULARY)
    assert overrides["gqa"] == {}  # The first is the measure.
    target = count(variants["gqa"])
    reached = count(fields.apply(variants["mla"], overrides["mla"]))
    assert reached == pytest.approx(target, rel=0.01)
    assert count(variants["mla"]) != pytest.approx(target, rel=0.01)


def test_equal_caches_by_a_field_of_each_attention():
    variants = {name: small(name) for name in ("gqa", "mla")}
    by = {"gqa": "model.attention.head_dim", "mla": "model.attention.kv_lora_rank"}
    # Cached numbers per token and layer: 2 kv heads x 2 x head_dim for gqa, kv_lora_rank + qk_rope_head_dim for mla.
    target = 4 * (2 * 2 * 32)
    rope = variants["mla"].model.attention.qk_rope_head_dim
    overrides = budget.equal(variants, VOCABULARY, budget="cache_bytes", target=target, field=by, multiple=2)
    assert overrides["mla"] == {"model.attention.kv_lora_rank": 128 - rope}
    assert overrides["gqa"] in ({}, {"model.attention.head_dim": 32})


def test_equal_compute_by_steps():
    variants = {name: small(name) for name in ("gqa", "mla")}
    overrides = budget.equal(variants, VOCABULARY, budget="run_flops", field="train.steps")
    spent = {}
    for name, settings in variants.items():
        settings = fields.apply(settings, overrides[name])
        account = models.account(settings.model, VOCABULARY, length=settings.data.length)
        tokens = settings.train.steps * settings.data.batch_size * settings.data.length
        spent[name] = account.training_flops_per_token * tokens
    assert spent["mla"] == pytest.approx(spent["gqa"], rel=0.01)


def test_what_cannot_be_made_equal_says_so():
    variants = {"gqa": small("gqa"), "mla": small("mla")}
    with pytest.raises(ConfigError, match="variant mla"):
        budget.equal(variants, VOCABULARY, multiple=64)
    with pytest.raises(ConfigError, match="does not change"):
        budget.match(variants["gqa"], VOCABULARY, 1e9, field="train.steps")
    with pytest.raises(ConfigError, match="unknown budget 'flops'"):
        budget.spent(variants["gqa"], VOCABULARY, "flops")
    with pytest.raises(ConfigError, match="no variants"):
        budget.equal({}, VOCABULARY)
