"""Sampling against NumPy, and generation through the caches against a loop that reruns the whole model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import models
from models.sampling import Sampling
from tests.models_oracle import VOCABULARY, built, call, filtered, greedy, options, small, some_ids


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (1.8, 0, 1.0, 0.0),
    (1.0, 3, 1.0, 0.0),
    (1.0, 0, 0.7, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.3, 5, 0.6, 0.0),
    (0.8, 5, 1.0, 0.3),
    (1.5, 0, 0.8, 0.4),
    (1.2, 6, 0.9, 0.15),
]


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("size", [1, 13])
def test_filters_leave_the_distribution_of_the_oracle(options, size):
    logits = 2 * np.random.default_rng(size).normal(size=(20, size)).astype(np.float32)
    found = jax.nn.softmax(Sampling(*options).filtered(jnp.asarray(logits)))
    wanted = np.array([filtered(row, *options) for row in logits])
    np.testing.assert_array_equal(np.asarray(found) > 0, wanted > 0)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


# Shares in descending order, the options, and how many tokens are left.
BY_HAND = {
    "top_k": ([0.4, 0.3, 0.2, 0.1], dict(top_k=3), 3),
    "top_k of all": ([0.4, 0.3, 0.2, 0.1], dict(top_k=4), 4),
    "top_k beyond the vocabulary": ([0.4, 0.3, 0.2, 0.1], dict(top_k=9), 4),
    "top_k, ties with the last one": ([0.4, 0.2, 0.2, 0.2], dict(top_k=2), 4),
    "top_p, just enough": ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.69), 2),
    "top_p, a little more": ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.71), 3),
    "top_p, the first alone": ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.39), 1),
    "top_p, never none": ([0.4, 0.3, 0.2, 0.1], dict(top_p=1e-6), 1),
    "top_p, nearly all": ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.91), 4),
    "top_p treats ties alike": ([0.4, 0.2, 0.2, 0.2], dict(top_p=0.5), 4),
    "min_p": ([0.4, 0.3, 0.2, 0.1], dict(min_p=0.51), 2),
    "min_p, a little less": ([0.4, 0.3, 0.2, 0.1], dict(min_p=0.49), 3),
    "min_p of the best": ([0.4, 0.3, 0.2, 0.1], dict(min_p=1.0), 1),
    "min_p, ties with the best": ([0.4, 0.4, 0.1, 0.1], dict(min_p=1.0), 2),
    # 0.4 of the three that are left is 4/9 and enough; of all four it is not.
    "top_p counts what top_k left": ([0.4, 0.3, 0.2, 0.1], dict(top_k=3, top_p=0.43), 1),
    # 0.2 is a share of 2/9 after top_k, and half of the highest before and after.
    "min_p is relative to the best": ([0.4, 0.3, 0.2, 0.1], dict(top_k=3, min_p=0.49), 3),
    # The square of the shares: 0.16, 0.09, 0.04, 0.01 of 0.3; the first two are 0.83 of it (0.7 without).
    "temperature comes first": ([0.4, 0.3, 0.2, 0.1], dict(temperature=0.5, top_p=0.8), 2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_filters_by_hand(name):
    shares, options, left = BY_HAND[name]
    logits = jnp.log(jnp.asarray([shares, shares[::-1]]))
    kept = np.isfinite(Sampling(**{"temperature": 1.0} | options).filtered(logits))
    np.testing.assert_array_equal(kept, [[True] * left + [False] * (4 - left), [False] * (4 - left) + [True] * left])


def test_tokens_that_are_out_stay_out():
    """Rows of a table without a token come as the lowest float, others as -inf: neither is ever let in again."""
    logits = jnp.asarray([[0.0, -jnp.inf, 1.0, jnp.finfo(jnp.float32).min]])
    for temperature, top_k, top_p, min_p in [*FILTERS, (0.1, 3, 0.999, 0.0), (50.0, 4, 0.9999999, 0.0)]:
        shares = jax.nn.softmax(Sampling(temperature, top_k, top_p, min_p).filtered(logits))[0]
        assert shares[1] == shares[3] == 0 and shares[2] > 0


@pytest.mark.parametrize("options", FILTERS)
def test_draws_follow_the_distribution(options):
    count, logits = 4000, 1.5 * np.random.default_rng(5).normal(size=12).astype(np.float32)
    keys = jax.random.split(jax.random.key(11), count)
    tokens = Sampling(*options).draw(jnp.broadcast_to(logits, (count, 12)), keys)
    assert tokens.shape == (count,) and tokens.dtype == jnp.int32
    shares = filtered(logits, *options)
    found = np.bincount(tokens, minlength=12)
    assert found[shares == 0].sum() == 0
    if (likely := shares > 0).sum() > 1:
        assert stats.chisquare(found[likely], count * shares[likely]).pvalue > 1e-3


def test_a_row_draws_by_its_own_key():
    rng, sampling = np.random.default_rng(0), Sampling(1.0, 0, 0.9)
    logits, other = (jnp.asarray(rng.normal(size=(64, 12)), jnp.float32) for _ in range(2))
    keys = jax.random.split(jax.random.key(0), 64)
    tokens = sampling.draw(logits, keys)
    assert sampling.draw(other.at[7].set(logits[7]), keys)[7] == tokens[7]
    np.testing.assert_array_equal(sampling.draw(logits[::-1], keys[::-1])[::-1], tokens)
    assert len(set(np.asarray(sampling.draw(jnp.zeros((64, 12)), keys)).tolist())) > 6


def test_temperature_zero_is_the_first_of_the_likeliest():
    logits = jnp.asarray([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-jnp.inf, -9.0, -8.0, -8.0]])
    keys = jax.random.split(jax.random.key(0), 3)
    for rest in ({}, dict(top_k=3, top_p=0.2, min_p=0.9)):
        tokens = Sampling(0.0, **rest).draw(logits, keys)
        assert tokens.dtype == jnp.int32 and tokens.tolist() == [1, 0, 2]


REFUSED = [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", -0.5), ("top_p", 1.01), ("min_p", -0.1),
           ("min_p", 1.1), ("top_p", float("nan")), ("min_p", float("nan"))]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_invalid_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*{value}"):
        Sampling(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must"):
        models.generate(network("gqa"), [[1]], max_new_tokens=1, **{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_temperature_is_a_finite_number(value):
    """NaN would draw token 0 for ever, and an infinite one gives rows of the table without a token probability."""
    with pytest.raises(ValueError, match="temperature must"):
        Sampling(temperature=value)


@functools.cache
def network(variant: str):
    return built(small(variant, depth=1))


# Shorter than the window of the variant "sliding" (5, and 2 sink tokens), longer than it, and one token alone.
PROMPTS = [some_ids(1, length, seed=length)[0].tolist() for length in (4, 13, 1)]
VARIANTS = ("gqa", "mla", "sliding", "lightning")
NEW = 13
NEVER = 10_000  # Ids that no model says: numbers of rows, and of stop ids, are kept alike, so that programs are few.


@functools.cache
def continued(variant: str) -> list[list[int]]:
    return models.generate(network(variant), PROMPTS, max_new_tokens=NEW)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_is_the_loop_without_caches(variant):
    wanted = greedy(network(variant), PROMPTS, NEW)
    assert len(set(sum(wanted, []))) > 5  # A model that says one word for ever would show little.
    assert continued(variant) == wanted


@pytest.mark.parametrize("variant", ["gqa", "lightning"])
def test_a_batch_gives_what_each_prompt_gives_alone(variant):
    alone = [models.generate(network(variant), [prompt], max_new_tokens=NEW)[0] for prompt in PROMPTS]
    assert continued(variant) == alone


def test_layers_of_several_kinds_generate_together():
    """Two kinds of cache in one network, its layers stacked in a pattern of two."""
    lightning, sliding = options("lightning", lrpe=False), options("sliding")
    model = built(small(depth=4, per_layer=(("::2", {"attention": sliding}), ("1::2", {"attention": lightning}))))
    assert [(stack.period, stack.repeats) for stack in model.stacks] == [(2, 2)]
    assert models.generate(model, PROMPTS, max_new_tokens=NEW) == greedy(model, PROMPTS, NEW)


@pytest.mark.parametrize("length", [16, 17])
def test_prompts_that_just_fit_and_just_miss_a_power_of_two(length):
    prompts = [some_ids(1, length, seed=1)[0].tolist(), [3], [4, 5]]
    assert models.generate(network("gqa"), prompts, max_new_tokens=5) == greedy(network("gqa"), prompts, 5)


def test_numbers_of_new_tokens_that_are_no_power_of_two():
    """Fewer tokens are the beginning of more, on both sides of a size that is compiled for; 32 are all there is."""
    long = models.generate(network("gqa"), PROMPTS, max_new_tokens=19)
    assert [len(row) for row in long] == [19, 19, 19]
    assert [row[:NEW] for row in long] == continued("gqa")
    for count in (1, 16, 17):
        assert models.generate(network("gqa"), PROMPTS, max_new_tokens=count) == [row[:count] for row in long]


@pytest.mark.parametrize("variant", ["gqa", "lightning"])
def test_a_row_ends_before_its_first_stop_id(variant):
    whole = continued(variant)

    def until(stops):
        return [next((row[:i] for i, token in enumerate(row) if token in stops), row) for row in whole]

    # One that stops some rows in the middle, and one more that stops a row at once; the others go on as they would.
    middle = next(token for token in whole[0][2:] if any(token not in row for row in whole) and token != whole[0][0])
    at_once = whole[1][0]
    for stops in ([middle, NEVER, NEVER + 1], [at_once, middle, middle, NEVER]):
        assert models.generate(network(variant), PROMPTS, max_new_tokens=NEW, stop_ids=stops) == until(stops)
    assert 0 < len(until([middle])[0]) < NEW and max(map(len, until([middle]))) == NEW
    assert until([at_once, middle])[1] == []


def test_all_rows_may_stop_early():
    stops = [row[1] for row in continued("gqa")]
    assert len(set(stops)) == 3
    rows = models.generate(network("gqa"), PROMPTS, max_new_tokens=NEW, stop_ids=stops)
    assert all(len(row) <= 1 and row == whole[: len(row)] for row, whole in zip(rows, continued("gqa"), strict=True))


def drawn(prompts, seed=0, new=NEW, stop=NEVER):
    return models.generate(network("gqa"), prompts, max_new_tokens=new, temperature=1.0, seed=seed, stop_ids=[stop])


def test_a_seed_decides_every_token():
    assert drawn(PROMPTS) == drawn(PROMPTS)
    for row, other in zip(drawn(PROMPTS), drawn(PROMPTS, seed=1), strict=True):
        assert row != other


def test_tokens_depend_on_prompt_place_and_seed_only():
    rows = drawn(PROMPTS)
    longer = some_ids(1, 19)[0].tolist()
    assert drawn([longer, PROMPTS[1], [7]])[1] == rows[1]  # Other neighbours, other padding.
    assert drawn(PROMPTS[:1]) == rows[:1]
    assert [row[:6] for row in rows] == drawn(PROMPTS, new=6)
    stop = next(token for token in rows[0] if token not in rows[1])
    assert drawn(PROMPTS, stop=stop)[1] == rows[1]
    same = drawn([PROMPTS[0]] * 3)
    assert same[0] == rows[0] and same[0] != same[1] != same[2] != same[0]


DRAWING = dict(temperature=1.4, top_k=20, top_p=0.8, min_p=0.02)
MANY = 1024


def test_drawn_tokens_follow_the_model():
    """The first new token of many equal prompts has the distribution of the full pass, filtered."""
    prompt = PROMPTS[0]
    first = np.array(models.generate(network("gqa"), [prompt] * MANY, max_new_tokens=1, **DRAWING))[:, 0]
    shares = filtered(call(network("gqa"), np.array([prompt])).logits[0, -1], **DRAWING)
    found = np.bincount(first, minlength=len(shares))
    assert found[shares == 0].sum() == 0 and (shares > 0).sum() > 4
    assert stats.chisquare(found[shares > 0], MANY * shares[shares > 0]).pvalue > 1e-3


def test_rows_and_steps_are_drawn_independently():
    """A model without an opinion draws evenly, never a row without a token, and not what the row or step before drew.

    All tokens are ties, so the filters leave all of them.
    """
    model = built(small(depth=1))
    model.norm.gain[...] = jnp.zeros_like(model.norm.gain[...])
    tokens = np.array(models.generate(model, [PROMPTS[0]] * MANY, max_new_tokens=16, **DRAWING))
    assert tokens.max() < VOCABULARY
    assert stats.chisquare(np.bincount(tokens.ravel(), minlength=VOCABULARY)).pvalue > 1e-3
    for repeats in (tokens[1:] == tokens[:-1], tokens[:, 1:] == tokens[:, :-1]):
        assert abs(repeats.mean() - 1 / VOCABULARY) < 4 * np.sqrt(0.02 * 0.98 / repeats.size)


def test_what_cannot_be_generated_says_so():
    model = network("gqa")
    for prompts, message in (
        ([[1], []], "prompt 1 is empty"),
        ([[1, 2], [3, VOCABULARY]], f"prompt 1 has an id outside the vocabulary of {VOCABULARY}"),  # Rows go up to 64.
        ([[-1]], "prompt 0 has an id outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            models.generate(model, prompts, max_new_tokens=2)
    with pytest.raises(ValueError, match="13 prompt tokens and 20 new ones exceed the model's max_length 32"):
        models.generate(model, PROMPTS, max_new_tokens=20)


def test_nothing_to_generate():
    assert models.generate(network("gqa"), [], max_new_tokens=4) == []
    assert models.generate(network("gqa"), PROMPTS, max_new_tokens=0) == [[], [], []]


def test_fewer_than_no_new_tokens_are_refused():
    with pytest.raises(ValueError, match="max_new_tokens"):
        models.generate(network("gqa"), PROMPTS, max_new_tokens=-1)
