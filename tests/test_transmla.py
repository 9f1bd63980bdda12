"""GQA made into MLA: what is exact is exact, the rest is what an independent computation gives, mistakes are told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transmla_oracle as oracle
from flax import nnx

import models
from configs import attention, base
from kernels.tokens import sequence
from layers.rope import Rope
from models.conversion import ConversionError, convert_to_mha_latent, convert_to_tpla, convert_to_transmla, rotary_basis
from models.conversion.report import log_probabilities
from models.conversion.rotary_basis import Fold
from models.conversion.streams import Stream
from models.conversion.transmla import Work, plan_of
from training import converting

VOCABULARY, LENGTH = 40, 16
BIASED = dict(qkv_bias=True, out_bias=True, soft_cap=3.0, window=5, value_dim=6, scale=0.7)
WINDOWS = (("1", {"attention.window": 5}),)
LLAMA3 = dict(scaling="llama3", factor=8.0, original_length=64, layout="interleaved")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config(depth: int = 2, **options):
    made = base.get_config().model
    made.width, made.depth, made.max_length, made.mlp.width, made.init_std = 24, depth, LENGTH, 32, 0.25
    made.attention = attention.get("gqa")
    made.attention.rope.update(options.pop("rope", {}))
    made.per_layer = options.pop("per_layer", ())
    made.attention.update(dict(heads=4, kv_heads=2, head_dim=8) | options)
    return made


def network(wanted, dtype: str = "float64"):
    """A network whose biases are not zero."""
    wanted.param_dtype = wanted.compute_dtype = dtype
    model, draw = models.build(wanted, vocab_size=VOCABULARY, rngs=nnx.Rngs(2)), np.random.default_rng(5)
    for stack in model.stacks:
        for block in stack.blocks:
            for linear in (block.attention.query, block.attention.key, block.attention.value, block.attention.out):
                if linear.bias is not None:
                    linear.bias[...] = jnp.asarray(draw.normal(0, 0.5, linear.bias[...].shape), dtype)
    return model


def text(rows: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, LENGTH)).astype(np.int32)


def streamed(model, ids, of_layer=lambda layer: None) -> np.ndarray:
    """Hidden states after all layers, in the network's own type."""
    stream = Stream(model, ids)
    for layer in range(model.depth):
        stream.advance(of_layer(layer))
    return stream.hidden()


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


EXACT = {
    "biases, soft cap, window, narrow values": BIASED,
    "mha, interleaved, llama3, windows by layer": dict(kv_heads=4, rope=LLAMA3, per_layer=WINDOWS),
    "mqa": dict(kv_heads=1),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact(name):
    """Merged; rotated; and balanced, at full rank of latent and queries, against partial RoPE (which for a single
    key/value head is the original): float64, to 1e-10."""
    with jax.enable_x64(True):
        options = EXACT[name]
        wanted, ids = config(**options), text()
        model = network(wanted)
        original = streamed(model, ids)
        specs = models.layer_specs(wanted)
        plans = {layer: plan_of(layer, spec["attention"], 8, "auto", 1) for layer, spec in enumerate(specs)}
        work = Work(model, plans, ids, lambda *_: None)
        work.mix(keep=False)
        for stage in ("merged", "rotated"):
            assert apart(streamed(model, ids, lambda layer, s=stage: work._stage(s, layer)), original) < 1e-10, stage
        partial = streamed(model, ids, work.partial)
        rank = plans[0].latent
        made = convert_to_transmla(
            model, wanted, qk_mqa_dim=8, freqfold=1, kv_lora_rank=rank, q_lora_rank=32, calibration_ids=ids
        )
        assert apart(streamed(made.model, ids), partial) < 1e-10
        assert (apart(partial, original) < 1e-10) == (name == "mqa")
        assert [spec["attention"]["window"] for spec in models.layer_specs(made.config)] == [
            spec["attention"]["window"] for spec in specs
        ]


def test_float32_and_the_report():
    """The same in float32 by what a user sees; freqfold found by itself; prompt and steps equal one pass."""
    wanted, ids = config(depth=1, **BIASED), text()
    model = network(wanted, "float32")
    options = dict(qk_mqa_dim=4, calibration_ids=ids, report_ids=ids)
    made = convert_to_transmla(model, wanted, kv_lora_rank=24, **options)
    stages = {stage.name: stage for stage in made.report.stages}
    assert list(stages) == ["original", "merged", "rotated", "partial RoPE", "low rank"]
    assert stages["merged"].logit_distance < 1e-5
    assert abs(stages["low rank"].logit_distance / stages["partial RoPE"].logit_distance - 1) < 1e-4
    tried = made.report.found["perplexity_by_freqfold"]
    assert set(tried) in ({"2", "4"},) and made.report.found["freqfold"] == int(min(tried, key=tried.get))
    assert made.config["attention"]["qk_rope_head_dim"] == 4 and made.config["attention"]["latent_norm"] == "none"
    whole, parts = log_probabilities(made.model, ids), log_probabilities(made.model, ids, split=9)
    assert apart(parts, whole) < 1e-5


def layer_of(model, options) -> oracle.Layer:
    """The first layer for the oracle: [out, in], half-split."""
    own = model.layers()[0].attention
    get = lambda linear: np.asarray(linear.weight[...]).T  # noqa: E731
    rope = Rope(**options["rope"])
    return oracle.Layer(
        own.heads, own.kv_heads, own.head_dim, own.value_dim, get(own.query), get(own.key), get(own.value),
        get(own.out), *(np.asarray(each.bias[...]) for each in (own.query, own.key, own.value)),
        rope.frequencies(own.head_dim).astype(np.float32).astype(np.float64), own.scale, own.soft_cap, own.window,
    )  # fmt: skip


CONVERTED = {
    "folded": dict(freqfold=2, kv_lora_rank=10),
    "folded twice, q_lora, norms": dict(freqfold=4, kv_lora_rank=12, q_lora_rank=12, norms=True),
    "by weights": dict(freqfold=2, kv_lora_rank=10, pca="weights"),
    "collapsed less": dict(freqfold=2, kv_lora_rank=12, collapse=1),
}


SOURCE = BIASED | dict(out_bias=False)


@functools.cache
def source():
    """A network of one layer, and what its attention is given."""
    model = network(config(depth=1, **SOURCE))
    return model, np.asarray(model.layers()[0].attention_norm(model.embedding(jnp.asarray(text()))))


def output(model, x: np.ndarray) -> np.ndarray:
    """Of the first layer's attention."""
    definition, state = nnx.split(model.layers()[0].attention)
    run = jax.jit(lambda state, x: nnx.merge(definition, state)(x, sequence(LENGTH)).out)
    return np.asarray(run(state, jnp.asarray(x)))


@functools.cache
def converted(name: str):
    """The first layer's inputs, its output as the conversion makes it, and the layer for the oracle."""
    with jax.enable_x64(True):
        (model, x), wanted, ids = source(), config(depth=1, **SOURCE), text()
        made = convert_to_transmla(model, wanted, **dict(qk_mqa_dim=4, calibration_ids=ids) | CONVERTED[name])
        return x, output(made.model, x), layer_of(model, wanted.to_dict()["attention"])


def expected(name: str, fault: str = "") -> np.ndarray:
    x, _, layer = converted(name)
    options = CONVERTED[name]
    collapse = options.get("collapse", 2)
    latent = oracle.convert(
        layer, x.reshape(-1, x.shape[-1]), options["freqfold"], collapse, options["kv_lora_rank"],
        options.get("q_lora_rank", 0), options.get("norms", False), options.get("pca") == "weights", fault,
    )  # fmt: skip
    scale = (layer.d + layer.d // collapse) ** -0.5
    return np.stack([oracle.mla(layer, latent, row, scale) for row in x])


def test_the_oracle_itself():
    """Its attention is the network's, and its conversion exact where the paper says so."""
    x, _, layer = converted("folded")
    with jax.enable_x64(True):
        own = output(source()[0], x)
    assert apart(own, np.stack([oracle.gqa(layer, row) for row in x])) < 1e-6  # Angles are float32.
    keys = x.reshape(-1, x.shape[-1]) @ layer.k.T
    turn = oracle.rotation(layer, keys, 1, 1)
    np.testing.assert_allclose(turn @ turn.T, np.eye(len(turn)), atol=1e-12)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_layer_is_what_the_formulas_say(name):
    x, out, _ = converted(name)
    assert apart(out, expected(name)) < 1e-6  # Angles are float32.


@pytest.mark.parametrize("fault", oracle.FAULTS)
def test_mistakes_would_be_noticed(fault):
    name = "folded twice, q_lora, norms" if fault == "inverted gain" else "folded"
    assert apart(converted(name)[1], expected(name, fault)) > 1e-3


def test_activations_beat_weights():
    """Of inputs whose directions differ in strength, the latent of activations keeps more than that of the weights."""
    outs = {name: converted(name) for name in ("folded", "by weights")}
    found = {}
    for name, (x, out, layer) in outs.items():
        found[name] = apart(out, np.stack([oracle.gqa(layer, row) for row in x]))
    assert found["folded"] < found["by weights"]


@pytest.mark.parametrize(("freqfold", "collapse", "layout"), [(1, 1, "half"), (2, 1, "interleaved"), (4, 2, "half")])
def test_bases(freqfold, collapse, layout):
    """Orthogonal; a permutation without mixing, under which every pair keeps its frequency; the frequencies of the
    first channels are those of a narrow rope."""
    fold, rope = Fold(3, 16, layout, freqfold, collapse), Rope(theta=100.0)
    keys = np.random.default_rng(0).normal(size=(60, 48)) @ np.random.default_rng(1).normal(size=(48, 48))
    mixing = fold.mixing(rotary_basis.pair_energy(keys, 3, layout))
    basis, plain = fold.basis(mixing), fold.basis()
    np.testing.assert_allclose(basis @ basis.T, np.eye(48), atol=1e-12)
    assert set(plain.ravel()) == {0.0, 1.0}
    of_head = rope.frequencies(16)
    channels = rotary_basis.pairs(16, layout)
    for new, frequency in enumerate(fold.frequencies(of_head)):
        for part in (0, 1):
            (old,) = np.nonzero(plain[:, 2 * new + part])[0]
            assert of_head[list(channels[part]).index(old % 16)] == frequency
    kept = 16 // collapse
    np.testing.assert_allclose(fold.frequencies(of_head)[: kept // 2], rope.frequencies(kept), rtol=1e-12)
    squares = (keys @ basis) ** 2
    assert squares[:, :kept].sum() > ((keys @ plain) ** 2)[:, :kept].sum()


def test_mixing_and_folding_gather_what_heads_share():
    """Heads that are one another's copies, up to rotations of their pairs, need one head's channels: dropping positions
    head by head cannot have that. And with frequencies that are nearly one, folding needs half of them."""
    draw = np.random.default_rng(3)
    one, keys = draw.normal(size=(200, 2, 8)), []
    for _ in range(4):
        signs = draw.choice([-1.0, 1.0], 8) * draw.uniform(0.5, 1.5, 8)  # The same for both channels of a pair.
        keys.append((one * signs).reshape(200, 16))
    keys = np.concatenate(keys, axis=1)
    energy = rotary_basis.pair_energy(keys, 4, "half")
    fold = Fold(4, 16)
    mixed = ((keys @ fold.basis(fold.mixing(energy)))[:, :16] ** 2).sum() / (keys**2).sum()
    order = rotary_basis.strongest_first(np.diagonal(energy), 4, 8, each_head=True)
    assert mixed > 1 - 1e-12 and np.diagonal(energy)[order[:8]].sum() < 0.5 * np.trace(energy)
    paired = np.repeat(one[:, :, ::2], 2, axis=2)  # Adjacent frequencies carry the same.
    keys = np.concatenate([(paired * s).reshape(200, 16) for s in (1.0, -0.7, 0.4, 1.2)], axis=1)
    energy = rotary_basis.pair_energy(keys, 4, "half")
    fold = Fold(4, 16, freqfold=2, collapse=2)
    folded = ((keys @ fold.basis(fold.mixing(energy)))[:, :8] ** 2).sum() / (keys**2).sum()
    assert folded > 1 - 1e-12


def test_on_to_tpla():
    """MLA with biases and without norms is what TPLA can be made of: turned exactly, and cut."""
    with jax.enable_x64(True):
        wanted, ids = config(depth=1, **BIASED), text()
        made = convert_to_transmla(
            network(wanted), wanted, qk_mqa_dim=4, freqfold=2, kv_lora_rank=16, calibration_ids=ids
        )
        turned = convert_to_tpla(made.model, made.config, mode="mla_tp", calibration_ids=ids)
        assert apart(streamed(turned.model, ids), streamed(made.model, ids)) < 1e-10
        cut = convert_to_tpla(made.model, made.config, mode="tpla", calibration_ids=ids)
        assert 1e-4 < apart(streamed(cut.model, ids), streamed(made.model, ids)) < 1


@pytest.mark.parametrize("options", [dict(qkv_bias=True, qk_norm=True), dict(kv_heads=4, value_dim=6)])
def test_the_first_version_is_exact_with_the_same_cache(options):
    with jax.enable_x64(True):
        wanted, ids = config(depth=1, **options), text()
        model = network(wanted)
        original = streamed(model, ids)
        for factor in ("selector", "svd"):
            made = convert_to_mha_latent(model, wanted, factor=factor)
            assert apart(streamed(made.model, ids), original) < 1e-10, factor
    layers = zip(model.layers(), made.model.layers(), strict=True)
    assert all(a.attention.cache_bytes(9, 2) == b.attention.cache_bytes(9, 2) for a, b in layers)


REFUSED = [
    (dict(qk_norm=True), {}, "layer 0 has qk_norm: each key head has a norm"),
    (dict(learned_sinks=True), {}, "layer 0 has learned_sinks"),
    (dict(rope=dict(theta=0.0)), {}, "layer 0 does not rotate whole heads"),
    (dict(rope=dict(share=0.5)), {}, "layer 0 does not rotate whole heads"),
    (dict(rope=dict(scaling="yarn", factor=4.0)), {}, "rope scaling 'yarn', whose frequencies depend on the width"),
    ({}, dict(qk_mqa_dim=64), "qk_mqa_dim 64 does not divide the 8 channels of a head"),
    ({}, dict(freqfold=3), "freqfold 3 does not divide the 4 frequencies"),
    ({}, dict(freqfold=1), "freqfold 1 is no multiple of collapse 2"),
    ({}, dict(freqfold="al"), "freqfold must be a whole number from 1 on, or auto, not 'al'"),
    ({}, dict(kv_lora_rank=29), "kv_lora_rank must be 1 to 28 in layer 0, not 29"),
    ({}, dict(q_lora_rank=33), "q_lora_rank must be 0 to 32 in layer 0, not 33"),
    ({}, dict(pca="weight"), "unknown pca 'weight': did you mean weights"),
    ({}, dict(calibration_ids=None), "needs calibration_ids"),
    ({}, dict(calibration_ids=np.zeros((1, 8), np.int32)), "8 calibration tokens cannot tell 16 channels"),
]


@pytest.mark.parametrize(("options", "asked", "says"), REFUSED, ids=[says[:30] for *_, says in REFUSED])
def test_what_cannot_be_is_told_in_one_line(options, asked, says):
    wanted = config(depth=1, **options)
    asked = dict(qk_mqa_dim=4, kv_lora_rank=16, calibration_ids=text()) | asked
    with pytest.raises(ConversionError, match=says) as caught:
        convert_to_transmla(_shapes(wanted), wanted, **asked)
    assert "\n" not in str(caught.value)


def _shapes(wanted):
    """A network without arrays: what is refused must be refused before any work."""
    return nnx.eval_shape(lambda: models.build(wanted, vocab_size=VOCABULARY, rngs=nnx.Rngs(0)))


def test_networks_without_heads_and_unknown_factors():
    wanted = config(depth=1)
    wanted.attention = attention.get("mla")
    for convert in (convert_to_transmla, convert_to_mha_latent):
        with pytest.raises(ConversionError, match="no layer of softmax attention on heads"):
            convert(_shapes(wanted), wanted)
    with pytest.raises(ConversionError, match="unknown factor 'sdv': did you mean svd"):
        convert_to_mha_latent(_shapes(config()), config(), factor="sdv")
    with pytest.raises(ConversionError, match="layer 0 has sink_tokens"):
        convert_to_mha_latent(_shapes(config(window=4, sink_tokens=1)), config(window=4, sink_tokens=1))


def test_the_command_line_has_the_flags_of_each_conversion(capsys):
    for to, own, foreign in (("transmla", "--kv_lora_rank", "--factor"), ("mha_latent", "--factor", "--rows")):
        with pytest.raises(SystemExit):
            converting.main([f"--to={to}", "--help"])
        said = capsys.readouterr().out
        assert own in said and f"{foreign} " not in said
    with pytest.raises(SystemExit):
        converting.main(["runs/x", "--to=mlaa", "--output=y"])
