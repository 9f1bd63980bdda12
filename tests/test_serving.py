"""Serving against `models.generate`: whoever shares the batch, whatever the pages, on one device and on two meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
import sharding
from kernels.tokens import Tokens, sequence
from layers import attention
from layers.attention.tpla import TensorParallelLatentAttention
from layers.cache import Caches
from layers.hooks import Hooks, Tap
from layers.paged import PagedCache
from models import serving
from models.serving import engine as serving_engine
from models.serving import handover, processes
from tests.models_oracle import VOCABULARY, built, options, small
from tests.serving_models import NEW, PROMPTS, as_mla, layout, network

ROWS, PAGE, PAGES = 3, 4, 9  # The four requests, of up to 7 pages, do not fit at once.
DRAWN = serving.Sampling(1.0)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Counted(serving.Engine):
    """Counts how often a request was sent back."""

    sent_back = 0

    def _send_back(self, request):
        self.sent_back += 1
        super()._send_back(request)


def engine(variant: str, **changes) -> Counted:
    return Counted(network(variant), **(dict(rows=ROWS, page_size=PAGE, pages=PAGES) | changes))


@functools.cache
def continued(variant: str, temperature: float = 0.0) -> list[list[int]]:
    return models.generate(network(variant), PROMPTS, max_new_tokens=NEW, temperature=temperature)


def at_rest(served: serving.Engine) -> bool:
    """Nobody waits or runs, and all pages are back, each once."""
    free = sorted(served.pages._free)
    return not served.busy and not served.pages._held and free == list(range(served.pages.count))


# Requests


@pytest.mark.parametrize("variant", ["gqa", "mla", "tpla", "tpla_pd", "lightning", "sliding"])
def test_tokens_are_those_of_generate(variant):
    """Rows come and go, and where there are pages they run out: requests are sent back and lose nothing."""
    served = engine(variant)
    assert served.generate(PROMPTS, max_new_tokens=NEW) == continued(variant)
    assert at_rest(served)
    assert len({token for row in continued(variant) for token in row}) > 5
    assert (served.sent_back > 0) == (variant not in ("lightning", "sliding"))


def test_with_pages_enough_nobody_is_sent_back():
    served = engine("gqa", pages=None)
    assert served.generate(PROMPTS, max_new_tokens=NEW) == continued("gqa")
    assert served.sent_back == 0 and at_rest(served) and served.pages.count == ROWS * 32 // PAGE


def test_a_request_is_alone_in_company():
    """Drawn tokens hang on the seed, the request's number and the prompt; not on rows, pages or neighbours."""
    served = engine("gqa")
    assert served.generate(PROMPTS, max_new_tokens=NEW, sampling=DRAWN) == continued("gqa", 1.0)
    assert served.sent_back > 0
    for number, wanted in enumerate(continued("gqa", 1.0)):
        alone = engine("gqa")
        for _ in range(number):
            alone.submit([1], max_new_tokens=0)
        request = alone.submit(PROMPTS[number], max_new_tokens=NEW, sampling=DRAWN)
        assert [done.tokens for done in alone.run()] == [wanted] and request.state == "done"
    other = engine("gqa", seed=1).generate(PROMPTS, max_new_tokens=NEW, sampling=DRAWN)
    assert all(row != wanted for row, wanted in zip(other, continued("gqa", 1.0), strict=True))


def test_requests_come_and_go():
    """Different prompts, lengths and ways to draw at once; some join late, one is cancelled while it runs and one while
    it waits; nothing is compiled for any of it."""
    served = engine("gqa")
    stop = next(token for token in continued("gqa")[1][2:] if token not in continued("gqa")[0][:4])
    end = continued("gqa")[1].index(stop)
    first = served.submit(PROMPTS[0], max_new_tokens=4)
    drawn = served.submit(PROMPTS[1], max_new_tokens=NEW, sampling=DRAWN)
    running = served.submit(PROMPTS[2], max_new_tokens=NEW)
    served.generate([PROMPTS[3]], max_new_tokens=1)
    programs = [run._cache_size() for run in (serving_engine._step, serving_engine._insert, handover._prefill)]
    assert running.state == "running" and len(running.tokens) > 1
    served.cancel(running)
    late = served.submit(PROMPTS[1], max_new_tokens=NEW, stop_ids=[stop])
    waiting = served.submit(PROMPTS[1], max_new_tokens=NEW)
    served.cancel(waiting)
    ended = list(served.run())
    assert set(ended) <= {first, drawn, late} and at_rest(served)
    assert (first.tokens, drawn.tokens) == (continued("gqa")[0][:4], continued("gqa", 1.0)[1])
    assert late.tokens == continued("gqa")[1][:end]
    assert [request.state for request in (first, drawn, late, running, waiting)] == ["done"] * 3 + ["cancelled"] * 2
    before = list(running.tokens)
    served.cancel(running)
    assert served.step() == [] and running.tokens == before == continued("gqa")[2][: len(before)]
    assert programs == [run._cache_size() for run in (serving_engine._step, serving_engine._insert, handover._prefill)]


def test_the_youngest_is_sent_back():
    served = engine("gqa")
    requests = [served.submit(PROMPTS[1], max_new_tokens=NEW) for _ in range(2)]  # 5 pages each, then 7.
    served.step()
    assert [request.state for request in requests] == ["running", "waiting"]
    served.cancel(requests[0])
    served.step()
    assert requests[1].state == "running"
    older = [served.submit([token], max_new_tokens=NEW) for token in (1, 2)]
    states = set()
    while served.busy:
        served.step()
        states.add(tuple(request.state for request in (requests[1], *older)))
    assert ("running", "running", "waiting") in states and all(state[0] != "waiting" for state in states)
    assert requests[1].tokens == continued("gqa")[1] and at_rest(served)


def test_nothing_to_generate():
    served = engine("gqa")
    assert served.generate([], max_new_tokens=4) == []
    assert served.generate(PROMPTS, max_new_tokens=0) == [[], [], [], []]
    assert served.step() == [] == list(served.run())
    assert served.generate(PROMPTS, max_new_tokens=NEW, stop_ids=[row[0] for row in continued("gqa")]) == [[]] * 4
    assert at_rest(served)


REFUSED = [
    ([], 1, "the prompt is empty"),
    ([3, VOCABULARY], 1, f"outside the vocabulary of {VOCABULARY}"),
    ([-1], 1, "outside the vocabulary"),
    ([1], -1, "max_new_tokens must be at least 0, but is -1"),
    ([1] * 30, 3, "30 prompt tokens and 3 new ones exceed the model's max_length 32"),
    ([1] * 13, 5, "need 5 pages of 4, and there are 4 in all"),
]


@pytest.mark.parametrize(("prompt", "new", "message"), REFUSED)
def test_what_cannot_be_served_says_so(prompt, new, message):
    with pytest.raises(ValueError, match=message):
        engine("gqa", pages=4).submit(prompt, max_new_tokens=new)


def test_what_just_fits_is_served():
    served = engine("gqa", pages=4)
    wanted = engine("gqa").generate([[1] * 13], max_new_tokens=4)
    assert served.generate([[1] * 13], max_new_tokens=4) == wanted and at_rest(served)  # The last needs no place.


def test_engines_that_cannot_be():
    with pytest.raises(NotImplementedError, match="layer 1 cannot be served: SequenceSplit.* keeps a SpreadCache"):
        mixed = small(depth=2, per_layer=(("1", {"attention": options("mla_sequence")}),))
        serving.Engine(built(mixed))
    with pytest.raises(sharding.ShardingError, match="config.sharding.data to 1"):
        serving.Engine(network("gqa"), layout=layout("fsdp", jax.devices()[:2]))
    for changes, message in ((dict(rows=0), "at least one row"), (dict(pages=0), "at least one page")):
        with pytest.raises(ValueError, match=message):
            engine("gqa", **changes)


def test_pages_are_never_lost_nor_held_twice():
    pages, rng = serving.Pages(7, 4), np.random.default_rng(0)
    for _ in range(300):
        owner, tokens = int(rng.integers(4)), int(rng.integers(1, 20))
        before = {one: pages.held(one) for one in range(4)}
        if rng.random() < 0.3:
            pages.release(owner)
            assert pages.held(owner) == []
        elif pages.hold(owner, tokens):
            assert len(pages.held(owner)) == max(len(before[owner]), -(-tokens // 4))
            assert pages.held(owner)[: len(before[owner])] == before[owner]
        else:
            assert pages.held(owner) == before[owner] and pages.free < -(-tokens // 4) - len(before[owner])
        everyone = [page for one in range(4) for page in pages.held(one)]
        assert sorted([*everyone, *pages._free]) == list(range(7)) and pages.free == 7 - len(everyone)


# Pages in a layer


LAYERS = {
    "mha": dict(heads=4, kv_heads=2, head_dim=6, learned_sinks=True),
    "tpla": dict(heads=4, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, softmax="whole"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_pages_give_what_a_full_pass_gives(name):
    """Rows grow in chunks of different sizes: few tokens go to the decode op, many, and hooks, to gathered pages. Pages
    lie anywhere, and what was never written is NaN."""
    options_ = dict(width=16, init_std=0.3, max_length=40) | LAYERS[name]
    definition = nnx.graphdef(nnx.eval_shape(lambda: attention.build(name, rngs=nnx.Rngs(0), **options_)))
    state = jax.jit(lambda: nnx.state(attention.build(name, rngs=nnx.Rngs(0), **options_)))()
    cache = PagedCache.create(nnx.merge(definition, state), 2, 40, pages=24, page=4, dtype="float32")
    table = np.random.default_rng(0).permutation(24)[:20].reshape(2, 10).astype(np.int32)
    table[0, 6:], table[1, 9:] = 99, -5  # Row 0 needs 16 places and row 1 27.
    nan = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), cache.entries)
    cache = PagedCache(nan, table, cache.length, axes=cache.axes)
    x = np.random.default_rng(1).normal(size=(2, 30, 16)).astype(np.float32)
    whole = np.asarray(jax.jit(lambda s, x: nnx.merge(definition, s)(x, sequence(30)).out)(state, x))
    start, tap = np.array([0, 0]), Hooks(taps={"probabilities": Tap()})
    for new, hooks in (((5, 3), None), ((1, 3), None), ((1, 1), tap), ((9, 20), None)):
        index = start[:, None] + np.arange(max(new))
        told = Tokens(index=index.astype(np.int32), valid=np.arange(max(new)) < np.array(new)[:, None])
        chunk = np.stack([x[row, first : first + max(new)] for row, first in enumerate(start)])
        call = jax.jit(lambda s, x, t, c, h=hooks: nnx.merge(definition, s)(x, t, c, hooks=h))
        out, cache, aux = call(state, chunk, told, cache)
        for row, (first, count) in enumerate(zip(start, new, strict=True)):
            np.testing.assert_allclose(out[row, :count], whole[row, first : first + count], rtol=0, atol=2e-5)
        for weights in aux.values():
            assert weights.shape == (2, 4, 1, 40) and np.isfinite(weights).all()
        start = start + np.array(new)
    np.testing.assert_array_equal(cache.length, start)
    unused = [page for page in range(24) if page not in (*table[0, :4], *table[1, :7])]
    assert all(np.isnan(np.asarray(pool)[unused]).all() for pool in cache.entries.values())


def test_what_has_no_pages_says_so():
    for variant, changes, message in (
        ("mha", dict(window=8), "MultiHeadAttention has no pages: tokens leave its window of 8"),
        ("lightning", {}, "LightningAttention has no pages: it keeps a state"),
        ("mla_sequence", {}, "SequenceSplitLatentAttention has no pages: it keeps a SpreadCache"),
    ):
        layer = nnx.eval_shape(lambda v=variant, c=changes: attention.build(v, width=16, rngs=nnx.Rngs(0), **c))
        with pytest.raises(NotImplementedError, match=message):
            PagedCache.create(layer, 2, 40, pages=4, page=4, dtype="float32")


# Two meshes


def halves(count: int) -> list[sharding.Layout]:
    """Two meshes of so many devices each, one to read prompts and one to decode."""
    return [layout("tpla", jax.devices()[i * count : (i + 1) * count]) for i in range(2)]


@functools.cache
def on_meshes(count: int) -> serving.Engine:
    prefill, decode = halves(count)
    return engine("tpla_pd", layout=decode, prefill=serving.Prefill(as_mla("tpla_pd"), prefill))


@pytest.mark.parametrize("count", [2, 4])
def test_prompts_by_mla_on_one_mesh_and_tpla_on_another(count):
    """Latents over 2 devices, then heads over 2 as well: the tokens of one device, each device with its slice."""
    served = on_meshes(count)
    assert served.generate(PROMPTS, max_new_tokens=NEW) == continued("tpla_pd") and at_rest(served)
    (pool,) = served._caches
    parts = pool.entries["latent"].addressable_shards
    assert [part.device for part in parts] == jax.devices()[count : 2 * count]
    assert {part.data.shape for part in parts} == {(PAGES, PAGE, 1, 9)}


def test_a_step_on_a_mesh_sums_once_per_layer_and_gathers_nothing(monkeypatch):
    served, depth = on_meshes(4), 1

    def sent() -> list[tuple]:
        step = lambda *arguments: serving_engine._step.__wrapped__(*arguments)  # noqa: E731 (traced anew)
        run = jax.jit(step, static_argnums=0, donate_argnums=2)
        row = np.zeros(ROWS, np.int32)
        with served.layout.activate():
            arguments = (served._definition, served._state, served._caches, served._table, row, row, row > 0)
            program = run.lower(*arguments).compile()
        (pool,) = jax.tree.leaves(served._caches)  # Is written in its place.
        assert program.memory_analysis().alias_size_in_bytes == pool.addressable_shards[0].data.nbytes
        found = sharding.collectives(program, served.layout.mesh)
        return [(one.name, one.axes, int(np.prod(one.shape))) for own in found.values() for one in own]

    whole = sent()
    monkeypatch.setattr(TensorParallelLatentAttention, "_mix", lambda self, q, *_: jnp.zeros((*q.shape[:2], 24)))
    assert whole == [("all-reduce", ("latent", "head"), ROWS * 24)] * (len(sent()) + depth)


def test_key_value_heads_on_a_mesh():
    prefill, decode = (layout("tp", jax.devices()[first : first + 4]) for first in (0, 4))
    served = engine("gqa", layout=decode, prefill=serving.Prefill(network("gqa"), prefill))
    assert served.generate(PROMPTS, max_new_tokens=NEW) == continued("gqa") and at_rest(served)
    (pool,) = served._caches  # Two key/value heads, each twice, here and there.
    assert {part.data.shape for part in pool.entries["k"].addressable_shards} == {(PAGES, PAGE, 1, 6)}


@functools.cache
def rows_of_a_prompt() -> tuple[sharding.Layout, sharding.Layout, tuple]:
    prefill, decode = halves(4)
    return prefill, decode, serving.Prefill(as_mla("tpla_pd", 2), prefill)(PROMPTS[1]).layers


def test_a_hand_over_gives_each_device_its_slice():
    _, decode, layers = rows_of_a_prompt()
    handed = serving.hand_over(layers, serving.kept(network("tpla_pd", 2), decode))
    assert len(handed) == 2
    for left, got in zip(layers, handed, strict=True):
        whole, parts = np.asarray(left["latent"]), got["latent"].addressable_shards
        assert whole.shape == (1, 32, 1, 14) and [part.device for part in parts] == jax.devices()[4:8]
        for number, part in enumerate(parts):  # Two devices, which share heads, to a slice.
            slice_ = whole[..., [*range(5 * (number // 2), 5 * (number // 2) + 5), *range(10, 14)]]
            np.testing.assert_array_equal(part.data, slice_)
        assert sum(part.data.nbytes for part in parts) == 4 * 4 * 32 * 9


def test_a_hand_over_by_permute_is_the_same():
    prefill, decode, layers = rows_of_a_prompt()
    target, link = serving.kept(network("tpla_pd", 2), decode), processes.Link(prefill.mesh, decode.mesh)
    crossed = processes.cross(link, handover.fitted(layers, target, prefill.mesh), target, 32)
    for one, other in zip(jax.tree.leaves(crossed), jax.tree.leaves(serving.hand_over(layers, target)), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)
    _, kinds = processes.stacks(target, 32)
    ((name, (permute,)),) = sharding.collectives(link.lowered(kinds).compile(), link.mesh).items()
    assert (name, permute.axes, permute.shape) == ("collective-permute", ("role",), (2, 1, 32, 1, 9))
    for wrong in (halves(2)[1].mesh, prefill.mesh):
        with pytest.raises(ValueError, match="a link joins meshes"):
            processes.Link(prefill.mesh, wrong)


def test_prefill_and_decode_by_hand():
    """MLA's cache cut with NumPy, and TPLA's cached steps without an engine."""
    whole, model, prompt = as_mla("tpla_pd"), network("tpla_pd"), PROMPTS[3]
    run = jax.jit(lambda state, ids, caches, d: nnx.merge(d, state)(ids, None, caches), static_argnums=3)
    definition, state = nnx.split(whole)
    out = run(state, np.array([prompt]), whole.init_caches(1, 32), definition)
    rows = np.asarray(out.caches.layers[0].entries["latent"])
    slices = np.concatenate([rows[..., [0, 1, 2, 3, 4, 10, 11, 12, 13]], rows[..., 5:]], axis=2)
    cache = model.init_caches(1, 32).layers[0]
    _, cache = cache.append({"latent": jnp.asarray(slices[:, : len(prompt)])}, sequence(len(prompt)))
    caches, logits, tokens = Caches((cache,), jnp.array([len(prompt)])), out.logits, []
    definition, state = nnx.split(model)
    for _ in range(NEW):
        tokens.append(int(jnp.argmax(logits[0, -1])))
        out = run(state, np.array([tokens[-1:]]), caches, definition)
        logits, caches = out.logits, out.caches
    assert tokens == continued("tpla_pd")[3]


def test_rows_are_cut_into_slices():
    rows = np.arange(2 * 14, dtype=np.float32).reshape(1, 2, 1, 14)
    found = np.asarray(serving.slice_rows(jnp.asarray(rows), 5, 4))
    assert found.shape == (1, 2, 5, 6)
    for j in range(5):
        np.testing.assert_array_equal(found[:, :, j], rows[:, :, 0, [2 * j, 2 * j + 1, 10, 11, 12, 13]])
    np.testing.assert_array_equal(serving.slice_rows(jnp.asarray(rows), 1, 4), rows)
    with pytest.raises(ValueError, match="3 slices do not divide"):
        serving.slice_rows(jnp.asarray(rows), 3, 4)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("gqa", "mla", "layer 0: the prefill leaves .*'k'.* and the decoder keeps .*'latent'"),
        ("mla", "gla", "layer 0: .* need the same attention, or mla and tpla"),
        ("lightning", "sliding", "layer 0: the prefill leaves StateCache"),
    ],
)
def test_a_prefill_must_fit_its_decoder(source, target, message):
    left = tuple(
        {name: jnp.zeros((1, 16, *x.shape[2:])) for name, x in one.entries.items()}
        if one.paged
        else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one.cache)
        for one in serving.kept(network(source))
    )
    with pytest.raises(ValueError, match=message):
        serving.hand_over(left, serving.kept(network(target)))
    with pytest.raises(ValueError, match="1 layers was handed to a decoder of 2"):
        serving.hand_over(left, serving.kept(network(target)) * 2)
