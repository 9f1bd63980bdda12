"""MLA made into TPLA: exact where it must be, its numbers those of an independent computation, its errors clear."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpla_oracle as oracle
from flax import nnx

import models
from configs import attention, base
from models.conversion import convert_to_tpla, latent, with_latent_norms
from models.conversion.report import log_probabilities
from models.conversion.tpla import MODES

VOCABULARY, LENGTH = 40, 24


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config(**options):
    made = base.get_config().model
    made.width, made.depth, made.max_length, made.mlp.width, made.init_std = 24, 2, LENGTH, 32, 0.25
    made.attention = attention.get("mla")
    small = dict(heads=4, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    made.attention.update(small | options)
    return made


def network(wanted, dtype: str = "float32"):
    """A network of MLA whose gains are not one."""
    wanted.param_dtype = wanted.compute_dtype = dtype
    model = models.build(wanted, vocab_size=VOCABULARY, rngs=nnx.Rngs(2))
    draw = np.random.default_rng(5)
    for stack in model.stacks:
        for block in stack.blocks:
            norm = getattr(block.attention, "latent_norm", None)
            if norm is not None:
                norm.gain[...] = jnp.asarray(draw.uniform(0.5, 1.5, norm.gain[...].shape), dtype)
    return model


def text(rows: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, LENGTH)).astype(np.int32)


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("transform", "options"),
    [("identity", {}), ("hadamard", {"q_lora_rank": 7}), ("pca", {}), ("pca", {"latent_norm": "none"})],
    ids=["identity", "hadamard, q_lora", "pca", "no norm"],
)
def test_what_is_exact(transform, options):
    """Folded and rotated, one slice, and the exact modes: the original's log-probabilities to 1e-6."""
    model, ids = network(config(**options)), text(4)
    original = log_probabilities(model, ids)
    for mode, slices, split in (("mla_tp", 2, 0), ("tpla", 1, 0), ("score_sum", 2, 9), ("sequence", 2, 9)):
        made = convert_to_tpla(
            model, config(**options), mode=mode, slices=slices, transform=transform, calibration_ids=text()
        )
        assert apart(log_probabilities(made.model, ids, split=split), original) < 1e-6, mode


def test_float64_is_exact_to_its_last_digits():
    with jax.enable_x64(True):
        wanted = config()
        model, ids = network(wanted, "float64"), text(4)
        original = log_probabilities(model, ids)
        for transform in ("hadamard", "pca"):
            made = convert_to_tpla(model, wanted, mode="mla_tp", transform=transform, calibration_ids=text())
            assert apart(log_probabilities(made.model, ids), original) < 1e-10


def oracle_weights(block, layer: int) -> oracle.Weights:
    """Layer `layer` of a stack for the oracle."""
    get = lambda linear: np.asarray(linear.weight[...])[layer]  # noqa: E731
    own = block.attention
    return oracle.Weights(
        own.heads, own.nope, own.rotary, own.value, own.rank, query=get(own.query), latent=get(own.latent),
        rope_key=get(own.rope_key), gain=np.asarray(own.latent_norm.gain[...])[layer], key_up=get(own.key_up),
        value_up=get(own.value_up), out=get(own.out),
    )  # fmt: skip


def hidden(model, ids) -> np.ndarray:
    """What the first layer's attention is given: [N, T, D]."""
    block = model.layers()[0]
    return np.asarray(block.attention_norm(model.embedding(jnp.asarray(ids))), np.float64)


@pytest.mark.parametrize(("slices", "kinds"), [(2, ("lsq", "one", "energy", "inv_energy")), (4, ("lsq",))])
def test_directions_energies_and_factors_are_those_of_an_independent_computation(slices, kinds):
    """Of the first layer, whose inputs do not depend on the others; the rotation through what it does to W_UK."""
    model, ids = network(config()), text()
    folded = oracle.fold(oracle_weights(model.stacks[0].blocks[0], 0))
    x = hidden(model, ids)
    found = np.concatenate([oracle.latents(folded, row, 1e-6) for row in x])
    rotation, values = oracle.pca(found)
    energies = oracle.energies(values, slices)
    wanted = {"energy": energies, "inv_energy": np.minimum(1 / energies, 8), "one": np.ones(slices)}
    rotated = oracle.rotate(folded, rotation)
    options = dict(rows=list(x[:4]), eps=1e-6, slices=slices)
    wanted["lsq"] = oracle.lsq(rotated, norm="slice", norm_factor=1 / energies, **options)
    for kind in kinds:
        made = convert_to_tpla(model, config(), slices=slices, logit_factor=kind, calibration_ids=ids, logit_rows=4)
        np.testing.assert_allclose(made.report.energies[0], energies, rtol=2e-5)
        np.testing.assert_allclose(made.report.norm_factors[0], oracle.norm_factors(energies), rtol=2e-5)
        np.testing.assert_allclose(made.report.logit_factors[0], wanted[kind], rtol=2e-3 if kind == "lsq" else 2e-5)
    whole = convert_to_tpla(model, config(), slices=slices, mode="tpla_pd", calibration_ids=ids, logit_rows=4)
    np.testing.assert_allclose(whole.report.logit_factors[0], oracle.lsq(rotated, norm="whole", **options), rtol=2e-3)
    mine = oracle_weights(made.model.stacks[0].blocks[0], 0)
    np.testing.assert_allclose(np.abs(mine.latent), np.abs(rotated.latent), atol=2e-4 * np.abs(rotated.latent).max())


@pytest.mark.parametrize("mode", ["tpla", "tpla_norm_only", "tpla_softmax_only", "tpla_pd", "gla"])
def test_a_converted_layer_is_what_the_formulas_say(mode):
    """The first layer's attention, with the factors that the report names."""
    model, ids = network(config()), text(2)
    made = convert_to_tpla(model, config(), mode=mode, transform="pca", calibration_ids=text())
    x, block = hidden(model, ids), made.model.layers()[0]
    out = np.asarray(block.attention(jnp.asarray(x, jnp.float32), models.decoder.sequence(LENGTH)).out)
    rotation, _ = oracle.pca(np.concatenate([
        oracle.latents(oracle.fold(oracle_weights(model.stacks[0].blocks[0], 0)), row, 1e-6)
        for row in hidden(model, text())
    ]))  # fmt: skip
    weights = oracle.rotate(oracle.fold(oracle_weights(model.stacks[0].blocks[0], 0)), rotation)
    alpha, mu = np.asarray(made.report.norm_factors[0]), np.asarray(made.report.logit_factors[0])
    at = np.arange(LENGTH, dtype=np.float64)
    fixed = (at, 10_000.0, 1e-6, model.layers()[0].attention.scale, 2)
    if mode == "gla":
        wanted = [oracle.gla(weights, row, *fixed, alpha, mu) for row in x]
    else:
        kinds = {
            "tpla": {}, "tpla_norm_only": {"softmax": "whole"}, "tpla_softmax_only": {"norm": "whole"},
            "tpla_pd": {"prefill": LENGTH},
        }[mode]  # fmt: skip
        wanted = [oracle.tpla(weights, row, *fixed, alpha, mu, **kinds) for row in x]
    assert apart(out, np.stack(wanted)) < 2e-4  # Directions are found from float32 latents.


def test_stages_and_report():
    model = network(config())
    made = convert_to_tpla(model, config(), mode="tpla", calibration_ids=text(), report_ids=text(4, seed=1))
    names = [stage.name for stage in made.report.stages]
    assert names == ["original", "gain folded", "rotated", "tpla_norm_only", "tpla_softmax_only", "tpla"]
    original, folded, rotated, *_, last = made.report.stages
    assert original.logit_distance == 0 and folded.logit_distance < 1e-5 and rotated.logit_distance < 1e-5
    assert last.logit_distance > 1e-3 and last.divergence > 0
    logs, ids = log_probabilities(made.model, text(4, seed=1)).astype(np.float64), text(4, seed=1)
    chosen = [logs[row, t, ids[row, t + 1]] for row in range(4) for t in range(LENGTH - 1)]
    np.testing.assert_allclose(last.perplexity, np.exp(-np.mean(chosen)), rtol=1e-5)
    assert all(abs(sum(spectrum) - 1) < 1e-9 and len(spectrum) == 16 for spectrum in made.report.spectra)
    assert len(made.report.table().splitlines()) == 7
    json.dumps(models.conversion.report.plain(made.report))


def test_only_layers_of_mla_change():
    wanted = config()
    wanted.per_layer = (("1", {"attention": attention.get("gqa").to_dict() | {"heads": 4, "head_dim": 6}}),)
    made = convert_to_tpla(network(wanted), wanted, calibration_ids=text())
    kinds = [type(block.attention).__name__ for block in made.model.layers()]
    assert kinds == ["TensorParallelLatentAttention", "MultiHeadAttention"]
    assert len(made.report.energies) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"slices": 3}, "3 slices do not divide the latent of 16 channels"),
        ({"transform": "hadamrd"}, "unknown transform 'hadamrd': did you mean hadamard"),
        ({"mode": "tpla-pd"}, "unknown mode 'tpla-pd': did you mean tpla_pd"),
        ({"calibration_ids": None}, "needs calibration_ids"),
        ({"calibration_ids": np.zeros((1, 8), np.int32)}, "8 calibration tokens cannot tell 16 channels"),
        ({"mode": "gla", "slices": 8}, "8 groups do not divide the 4 heads"),
    ],
)
def test_errors(options, says):
    with pytest.raises(latent.ConversionError, match=says):
        convert_to_tpla(network(config()), config(), **{"calibration_ids": text()} | options)


def test_a_hadamard_rotation_wants_a_power_of_two():
    wanted = config(kv_lora_rank=12)
    with pytest.raises(latent.ConversionError, match="power of two, not 12: use transform='pca' or 'identity'"):
        convert_to_tpla(network(wanted), wanted, transform="hadamard", calibration_ids=text())
    matrix = latent.hadamard(16, np.random.default_rng(0))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(16), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix), 0.25)


def test_networks_without_mla():
    wanted = config()
    wanted.attention = attention.get("gqa")
    with pytest.raises(latent.ConversionError, match="no layer of MLA with one latent"):
        convert_to_tpla(network(wanted), wanted, calibration_ids=text())


def test_a_gain_that_was_not_folded_stops_the_rotation():
    own = latent.LatentWeights(np.eye(4), np.array([1.0, 2, 1, 1]), np.ones((4, 1, 1)), np.ones((4, 1, 1)))
    with pytest.raises(latent.ConversionError, match="fold it away first"):
        own.rotated(np.eye(4))
    assert own.folded().rotated(np.eye(4)).key_up[1, 0, 0] == 2


def test_every_mode_is_offered():
    assert set(MODES) == {
        "mla_tp", "gla", "tpla", "tpla_norm_only", "tpla_softmax_only", "tpla_pd", "score_sum", "sequence"
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"q_lora_rank": 8, "query_down_bias": True, "latent_bias": True}])
def test_latents_without_a_norm_get_one_that_changes_nothing(options):
    """A norm far below its epsilon only scales; exact in float64 but for what the epsilon's root is rounded to."""
    for dtype, tolerance in (("float32", 2e-6), ("bfloat16", 3e-2)):
        wanted = config(latent_norm="none", **options)
        model = network(wanted, dtype)
        made, new = with_latent_norms(model, wanted)
        assert new["attention"]["latent_norm"] == "rms" and new["attention"]["kv_lora_rank"] == 16
        norms = [leaf for leaf in jax.tree.leaves(nnx.state(made.stacks[0].blocks[0].attention.latent_norm))]
        assert norms and all(np.all(np.asarray(leaf, np.float64) > 1e5) for leaf in norms)
        assert apart(log_probabilities(made, text(4)), log_probabilities(model, text(4))) < tolerance
    assert with_latent_norms(made, new)[0] is made
