"""Whole attention layers, forward, decoding and under hooks, against float64 loops over queries and keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import layers_oracle as oracle
import numpy as np
import pytest
from flax import nnx
from layers_oracle import Rotation

import layers.attention
from kernels.tokens import Tokens, packed, sequence
from layers.attention import softmax
from layers.hooks import Hooks, Tap
from layers.rope import Rope

WIDTH, LENGTH, DEPTH, NUMBER = 12, 11, 3, 5  # The layer's number, for hooks, has nothing to do with its index.
CLOSE = 1e-5  # Of float32, relative to the largest number.

ROPES = {
    "none": (Rope(theta=0.0), lambda dim: None),
    "half": (Rope(theta=20.0), lambda dim: Rotation(tuple(oracle.plain_frequencies(dim, 20.0)))),
    "share": (
        Rope(theta=20.0, share=0.5),
        lambda dim: Rotation(tuple(oracle.plain_frequencies(dim // 2, 20.0))),
    ),
    "yarn": (
        Rope(20.0, "interleaved", "yarn", 6.0, 12, 1.5, 0.4, mscale=1.4, mscale_all_dim=0.7),
        lambda dim: oracle.yarn(dim, 20.0, 6.0, 12, 1.5, 0.4, 1.4, 0.7, "interleaved"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer by name, its options, and which rotary positions (lightning has none)."""

    variant: str
    options: dict
    rope: str = "half"
    index: int = 0

    def build(self, implementation: str | None = None) -> tuple[nnx.Module, dict[str, np.ndarray]]:
        """The layer with random parameters, and these."""
        options = dict(self.options) if self.variant == "lightning" else self.options | {"rope": ROPES[self.rope][0]}
        setting = oracle.Blank(WIDTH, depth=DEPTH, implementation=implementation)
        layer = layers.attention.get(self.variant)(setting, layer_index=self.index, rngs=nnx.Rngs(0), **options)
        return layer, oracle.parameters(layer)

    def wanted(self, p, x, document, position, edits=None) -> dict[str, np.ndarray]:
        """What stands at every stage, the output under "out"."""
        if self.variant == "lightning":
            extra = dict(layer=self.index, depth=DEPTH)
        else:
            dim = self.options["head_dim" if self.variant == "mha" else "qk_rope_head_dim"]
            extra = dict(rope=ROPES[self.rope][1](dim))
        return getattr(oracle, self.variant)(p, x, document, position, edits=edits, **self.options, **extra).seen


def mha(rope="half", **options) -> Case:
    return Case("mha", dict(heads=4, kv_heads=2, head_dim=6) | options, rope)


def mla(rope="half", **options) -> Case:
    sizes = dict(heads=3, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=6)
    return Case("mla", sizes | options, rope)


def lightning(index=0, **options) -> Case:
    return Case("lightning", dict(heads=4, head_dim=3) | options, index=index)


CASES = {
    "multi_head": mha("none", kv_heads=4),
    "grouped": mha(),
    "window": mha(window=3),
    "window_sink_tokens": mha(window=3, sink_tokens=2),
    "qk_norm": mha(qk_norm=True),
    "soft_cap": mha(soft_cap=0.7, scale=0.9),
    "learned_sinks": mha(learned_sinks=True),
    "value_dim": mha(value_dim=5),
    "biases": mha(qkv_bias=True, out_bias=True),
    "mha_yarn": mha("yarn"),
    "everything": mha(
        kv_heads=1, window=4, sink_tokens=1, qk_norm=True, soft_cap=1.5, learned_sinks=True, value_dim=5,
        qkv_bias=True, out_bias=True,
    ),
    "partly_rotated": mha("share", head_dim=8),
    "qk_norm_epsilon": mha(qk_norm=True, norm_epsilon=0.5),
    "mla": mla(),
    "mla_biases": mla(q_lora_rank=8, query_down_bias=True, query_bias=True, latent_bias=True, out_bias=True),
    "mla_window_soft_cap": mla(window=3, soft_cap=0.7, scale=0.9, query_bias=True),
    "mla_no_norm": mla(q_lora_rank=8, latent_norm="none"),
    "mla_yarn": mla("yarn", q_lora_rank=8),
    "mla_scale_epsilon": mla("yarn", scale=0.6, norm_epsilon=0.5),
    "lightning": lightning(1),
    "lightning_6_heads": lightning(2, heads=6),
    "lightning_paper": lightning(1, decay="paper", activation="elu1", gate="none"),
    "lightning_paper_without_factor": lightning(1, decay="paper", layer_factor=False, norm_epsilon=0.5),
    "lightning_minimax": lightning(1, activate_values=True, gate="sigmoid", norm_gain=True),
    "lightning_without_decay": lightning(decay="none", activation="none", value_dim=5),
    "lightning_lrpe": lightning(lrpe=True, value_dim=2, layer_factor=False),
}  # fmt: skip


def layout(name: str, length: int = LENGTH) -> tuple[Tokens, np.ndarray, np.ndarray]:
    """Tokens of two rows; the document (0 is padding) and position of each, by hand."""
    document, position = np.ones((2, length), int), np.tile(np.arange(length, dtype=float), (2, 1))
    if name == "plain":
        return sequence(length), document, position
    if name == "padding":  # At the end, and in one row in the middle, too.
        document[0, 4:6] = document[0, 10:] = document[1, 5:] = 0
        return sequence(length, valid=jnp.asarray(document > 0)), document, position
    document = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] + [2] * 6 + [3] * 4])
    if name == "packed":
        return packed(jnp.asarray(document)), document, oracle.places(document).astype(float)
    position = np.round(np.random.default_rng(3).uniform(0, 8, document.shape) * 4) / 4
    return packed(jnp.asarray(document), jnp.asarray(position, jnp.float32)), document, position


def inputs(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, length, WIDTH)).astype(np.float32).astype(np.float64)


def program(layer, hooks=None):
    """The layer behind `jax.jit`: a call alone compiles every small operation by itself."""
    definition, state = nnx.split(layer)

    def call(state, x, tokens, cache):
        return nnx.merge(definition, state)(x, tokens, cache, hooks, NUMBER)

    call = jax.jit(call, compiler_options=oracle.QUICK)
    return lambda x, tokens, cache=None: call(state, x, tokens, cache)


def padded(x: np.ndarray, document: np.ndarray) -> jax.Array:
    """x in float32, with NaN for padding."""
    return jnp.asarray(np.where(document[..., None] > 0, x, np.nan), jnp.float32)


def check(found: jax.Array, wanted: np.ndarray, document: np.ndarray, axis: int = 1) -> None:
    """Equal at all tokens that are no padding; `axis` is that of the tokens."""
    found = np.asarray(found)
    for b in range(len(document)):
        real = np.flatnonzero(document[b])
        assert oracle.relative(np.take(found[b], real, axis - 1), np.take(wanted[b], real, axis - 1)) < CLOSE


MORE = [("grouped", "plain"), ("window_sink_tokens", "plain"), ("lightning_6_heads", "plain")]
MORE += [(name, "padding") for name in ("everything", "mla_yarn", "lightning_6_heads")]
MORE += [(name, "floats") for name in ("mha_yarn", "mla_yarn", "lightning_lrpe")]


@pytest.mark.parametrize(("name", "at"), [(name, "packed") for name in CASES] + MORE)
def test_layer_is_what_loops_over_queries_and_keys_give(name, at):
    layer, p = CASES[name].build()
    x, (tokens, document, position) = inputs(), layout(at)
    found = program(layer)(padded(x, document), tokens)
    check(found.out, CASES[name].wanted(p, x, document, position)["out"], document)
    assert found.cache is None and found.aux == {}


# New tokens of either row: a prompt, single steps, chunks longer than the window, a row that waits.
ARRIVALS = [(5, 3), (1, 1), (5, 2), (1, 0), (1, 1), (2, 5), (1, 1), (1, 1)]


def decoded(layer, x, arrivals, hooks=None, padding=np.nan) -> list[np.ndarray]:
    """Outputs of each row's tokens, fed in as they arrive, right-padded to a prompt's length."""
    call, cache, seen, outs = program(layer, hooks), layer.init_cache(2, x.shape[1], "float32"), [0, 0], ([], [])
    for counts in arrivals:
        width = 1 if max(counts) == 1 else 5
        new, index = np.full((2, width, WIDTH), padding), np.zeros((2, width), int)
        for row, count in enumerate(counts):
            new[row, :count] = x[row, seen[row] : seen[row] + count]
            index[row] = seen[row] + np.arange(width)
        valid = np.arange(width) < np.array(counts)[:, None]
        tokens = Tokens(index=jnp.asarray(index, jnp.int32), valid=jnp.asarray(valid))
        out, cache, _ = call(jnp.asarray(new, jnp.float32), tokens, cache)
        for row, count in enumerate(counts):
            outs[row].append(np.asarray(out)[row, :count])
            seen[row] += count
    return [np.concatenate(pieces) for pieces in outs]


@pytest.mark.parametrize("name", ["everything", "mla", "mla_yarn", "lightning_lrpe"])
def test_decoding_is_the_same_function(name):
    """Token by token and in chunks from a cache (latent attention absorbed), against one pass of the oracle."""
    layer, p = CASES[name].build()
    x = inputs(18)
    _, document, position = layout("plain", 18)
    wanted = CASES[name].wanted(p, x, document, position)["out"]
    for row, found in enumerate(decoded(layer, x, ARRIVALS)):
        assert oracle.relative(found, wanted[row, : len(found)]) < CLOSE


@pytest.mark.parametrize("name", ["grouped", "window_sink_tokens", "mla"])
def test_which_op_reads_a_cache(name, monkeypatch):
    """The decode op for a few new tokens, unless somebody watches the map or names a kernel; gradients are the same."""
    layer, _ = CASES[name].build()
    x, calls = inputs(18), []
    op = softmax.decode.decode_attention
    monkeypatch.setattr(
        softmax.decode, "decode_attention", lambda *args, **more: (calls.append(1), op(*args, **more))[1]
    )

    def tokens(first, count):
        return Tokens(index=jnp.arange(first, first + count)[None] + jnp.zeros((2, 1), jnp.int32))

    cache = layer(x[:, :9], tokens(0, 9), layer.init_cache(2, 40, "float32")).cache

    def gradient(new, **more):
        calls.clear()
        take = lambda new: jnp.sum(jnp.sin(layer(new, tokens(9, new.shape[1]), cache, **more).out))  # noqa: E731
        return np.asarray(jax.jit(jax.grad(take))(new)), len(calls)

    one = jnp.asarray(x[:, 9:10])
    found, count = gradient(one)
    assert count == 1
    assert gradient(one, hooks=Hooks({}, {"probabilities": Tap(layers=(0,))}))[1] == 0
    monkeypatch.setattr(softmax, "_FEW", 0)
    other, count = gradient(one)
    assert count == 0 and oracle.relative(found, other) < CLOSE
    monkeypatch.undo()
    named, _ = CASES[name].build("pallas_tpu")
    with pytest.raises(NotImplementedError, match="^attention: implementation 'pallas_tpu'"):
        named(one, tokens(9, 1), cache)


# Hooks.

HOOKED = {"mha": "everything", "mla": "mla_yarn", "lightning": "lightning_lrpe"}
SOFTMAX = ("layer_input", "query_raw", "query", "probabilities", "heads")
TAPS = {"mha": SOFTMAX, "mla": SOFTMAX, "lightning": ("layer_input", "query_raw", "query", "heads")}
EDITS = {"mha": (*SOFTMAX, "scores"), "mla": (*SOFTMAX, "scores"), "lightning": TAPS["lightning"]}
TOKEN_AXIS = {"scores": 2, "probabilities": 2}


def pairs(sites: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(variant, site) for variant in sites for site in sites[variant]]


def change(site: str, value, places):
    """An edit, in NumPy and in JAX alike; `places` are the places of queries [.., T] and keys [.., S] in their rows."""
    per_head = np.linspace(-0.5, 2.0, value.shape[1 if site in TOKEN_AXIS else 2])
    if site == "layer_input":
        return value + np.linspace(-1, 1, WIDTH)
    if site == "query_raw":
        return value * per_head[:, None]
    if site == "query":
        return value + np.linspace(0.4, -0.8, value.shape[-1])
    if site == "scores":  # ALiBi, by hand.
        queries, keys = places
        return value - per_head[:, None, None] * (queries[..., None, :, None] - keys[..., None, None, :])
    if site == "probabilities":
        return value * per_head[:, None, None]
    return value * (np.arange(value.shape[2]) != 1)[:, None]  # One head is cut out.


def hook(site: str):
    """`change` as an edit of the product, which must be told its layer and tokens."""

    def edit(value, place):
        assert place.layer == NUMBER
        assert (place.keys is not None) == (site in TOKEN_AXIS)
        keys = place.tokens if place.keys is None else place.keys
        return change(site, value, (place.tokens.index, keys.index))

    return edit


def by_hand(site: str, length: int = LENGTH):
    """`change` as an edit of the oracle."""
    return lambda value: change(site, value, (np.arange(length), np.arange(length)))


@functools.cache
def hooked(variant: str, edit: str, taps: tuple[str, ...], tap: Tap = Tap(), at: str = "packed"):  # noqa: B008 (frozen)
    """What a layer with these hooks returns; the oracle's stages with the edit and without; the documents."""
    case, x, (tokens, document, position) = CASES[HOOKED[variant]], inputs(), layout(at)
    layer, p = case.build("reference")
    hooks = Hooks({edit: hook(edit)} if edit else {}, dict.fromkeys(taps, tap))
    found = program(layer, hooks)(jnp.asarray(x, jnp.float32), tokens)
    plain = case.wanted(p, x, document, position)
    edited = case.wanted(p, x, document, position, {edit: by_hand(edit)}) if edit else plain
    return found, edited, plain, document


@pytest.mark.parametrize(("variant", "site"), pairs(EDITS))
def test_an_edit_does_what_it_does_by_hand(variant, site):
    found, edited, plain, document = hooked(variant, site, tuple({site} & {*TAPS[variant]}))
    check(found.out, edited["out"], document)
    assert oracle.relative(edited["out"], plain["out"]) > 0.05  # The edit is felt.


@pytest.mark.parametrize(("variant", "site"), pairs(TAPS))
def test_a_tap_sees_the_edit_of_its_site(variant, site):
    """What a tap returns is what the layer goes on with."""
    found, edited, _, document = hooked(variant, site, (site,))
    check(found.aux[f"tap/{site}"], edited[site], document, TOKEN_AXIS.get(site, 1))


@pytest.mark.parametrize("variant", HOOKED)
def test_edits_mean_the_same_while_decoding(variant):
    """All sites edited at once, in every step from a cache, against one edited pass of the oracle."""
    case, x = CASES[HOOKED[variant]], inputs()
    layer, p = case.build("reference")
    _, document, position = layout("plain")
    wanted = case.wanted(p, x, document, position, {site: by_hand(site) for site in EDITS[variant]})["out"]
    hooks, arrivals = Hooks({site: hook(site) for site in EDITS[variant]}), [(5, 3), *[(1, 1)] * 6]
    for row, found in enumerate(decoded(layer, x, arrivals, hooks, padding=3.0)):
        assert oracle.relative(found, wanted[row, : len(found)]) < CLOSE


@pytest.mark.parametrize("variant", HOOKED)
def test_taps_return_what_stands_at_each_site(variant):
    found, _, wanted, document = hooked(variant, "", TAPS[variant])
    assert set(found.aux) == {f"tap/{site}" for site in TAPS[variant]}
    for site in TAPS[variant]:
        check(found.aux[f"tap/{site}"], wanted[site], document, TOKEN_AXIS.get(site, 1))


@pytest.mark.parametrize("variant", HOOKED)
def test_taps_of_some_layers_heads_and_rows(variant):
    tap = Tap(layers=(1, NUMBER), heads=(2, 0), rows=(6, 1, 4))
    found, _, wanted, _ = hooked(variant, "", TAPS[variant], tap, "plain")
    for site in TAPS[variant]:
        part = np.take(wanted[site], tap.rows, TOKEN_AXIS.get(site, 1))
        if site != "layer_input":
            part = np.take(part, tap.heads, 1 if site in TOKEN_AXIS else 2)
        assert oracle.relative(found.aux[f"tap/{site}"], part) < CLOSE


@pytest.mark.parametrize("tap", [Tap(heads=(2,)), Tap(rows=(6, 3))], ids=["heads", "rows"])
@pytest.mark.parametrize("variant", ["mha", "mla"])
def test_an_edit_of_scores_sees_the_whole_map_whatever_is_tapped(variant, tap):
    """Scores are [B, H, T, S] at their site, also while some heads or rows of the probabilities are asked for."""
    found, wanted, _, _ = hooked(variant, "scores", ("probabilities",), tap, "plain")
    part = wanted["probabilities"]
    part = part if tap.heads is None else part[:, list(tap.heads)]
    part = part if tap.rows is None else part[:, :, list(tap.rows)]
    assert oracle.relative(found.aux["tap/probabilities"], part) < CLOSE


@pytest.mark.parametrize("variant", ["mha", "mla"])
def test_an_edit_of_probabilities_keeps_padding_out(variant):
    """Padding of any content (NaN) stays without effect, as it does without a hook."""
    case = CASES[HOOKED[variant]]
    (layer, p), x, (tokens, document, position) = case.build(), inputs(), layout("padding")
    found = program(layer, Hooks({"probabilities": lambda value, place: value}))(padded(x, document), tokens)
    check(found.out, case.wanted(p, x, document, position)["out"], document)


@pytest.mark.parametrize("variant", HOOKED)
def test_without_hooks_no_bit_changes(variant):
    """No hooks, empty hooks and taps of another layer make one and the same program, which returns nothing extra."""
    layer, _ = CASES[HOOKED[variant]].build()
    x, (tokens, _, _) = jnp.asarray(inputs(), jnp.float32), layout("packed")
    definition, state = nnx.split(layer)

    def text(hooks):
        call = jax.jit(lambda state, x: nnx.merge(definition, state)(x, tokens, None, hooks, NUMBER))
        return call.lower(state, x).as_text()

    elsewhere = {"heads": Tap(layers=(NUMBER + 1,)), "query": Tap(layers=())}
    assert text(None) == text(Hooks()) == text(Hooks(taps=elsewhere))
    assert text(None) != text(Hooks(taps={"heads": Tap()}))


def test_hooks_name_what_is_not_offered():
    with pytest.raises(ValueError, match="unknown hook site 'score': sites are layer_input"):
        Hooks(edits={"score": lambda value, place: value})
    with pytest.raises(ValueError, match="unknown hook site 'logits'"):
        Hooks(taps={"logits": Tap()})
    x, tokens = jnp.ones((1, 2, WIDTH)), sequence(2)
    with pytest.raises(NotImplementedError, match="a tap on scores is not offered"):
        CASES["grouped"].build()[0](x, tokens, hooks=Hooks(taps={"scores": Tap()}))
    layer, _ = CASES["lightning"].build()
    for site in ("scores", "probabilities"):
        for hooks in (Hooks({site: hook(site)}), Hooks(taps={site: Tap()})):
            with pytest.raises(NotImplementedError, match="lightning attention forms no scores"):
                layer(x, tokens, hooks=hooks)


def test_layers_name_options_that_do_not_fit():
    for variant, options, message in (
        ("mha", dict(heads=4, kv_heads=3), "kv_heads 3 must divide heads 4"),
        ("lightning", dict(activation="relu"), "'relu' is not one of silu, elu1, none"),
        ("lightning", dict(decay="alibbi"), "unknown decay rule 'alibbi'"),
        ("mlha", {}, "unknown attention layer 'mlha'.*lightning, mha, mha_latent, mla"),
    ):
        with pytest.raises(ValueError, match=message):
            layers.attention.get(variant)(oracle.Blank(WIDTH), layer_index=0, rngs=nnx.Rngs(0), **options)
