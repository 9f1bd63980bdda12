"""The oracle of TPLA itself: what must be equal in exact arithmetic is, and what must differ does."""

import dataclasses

import numpy as np
import pytest
import tpla_oracle as oracle
from tpla_oracle import Weights

T, D, THETA, EPS = 7, 12, 100.0, 1e-6
POSITIONS = np.arange(T) + 3
ONES = {g: np.ones(g) for g in (1, 2, 4)}


def drawn(seed: int = 0, low_rank: bool = False, **changed) -> Weights:
    rng = np.random.default_rng(seed)
    h, n, r, v, d, rank = 4, 6, 4, 5, 16, 9
    first = rank if low_rank else D
    found = Weights(
        *(h, n, r, v, d),
        query=rng.standard_normal((first, h * (n + r))),
        latent=rng.standard_normal((D, d)) * np.linspace(2, 0.3, d),
        rope_key=rng.standard_normal((D, r)),
        gain=1 + 0.4 * rng.standard_normal(d),
        key_up=rng.standard_normal((d, h * n)) / d**0.5,
        value_up=rng.standard_normal((d, h * v)) / d**0.5,
        out=rng.standard_normal((h * v, D)) / (h * v) ** 0.5,
        query_down=rng.standard_normal((D, rank)) if low_rank else None,
        query_gain=1 + 0.4 * rng.standard_normal(rank) if low_rank else None,
    )
    return dataclasses.replace(found, **changed)


X = np.random.default_rng(1).standard_normal((T, D)) * 0.6
SCALE = 10**-0.5


def mla(weights, x=X, positions=POSITIONS):
    return oracle.mla(weights, x, positions, THETA, EPS, SCALE)


def tpla(weights, g=2, alpha=None, mu=None, x=X, positions=POSITIONS, **modes):
    alpha, mu = np.full(g, float(g)) if alpha is None else alpha, ONES[g] if mu is None else mu
    return oracle.tpla(weights, x, positions, THETA, EPS, SCALE, g, alpha, mu, **modes)


def gla(weights, g, alpha, **modes):
    return oracle.gla(weights, X, POSITIONS, THETA, EPS, SCALE, g, alpha, **modes)


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def orthogonal(size: int, seed: int = 2) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def test_rope_turns_pairs_of_half_and_half():
    x = np.random.default_rng(0).standard_normal((3, 6))
    turned = oracle.rope(x, 5, THETA)
    z = (x[:, :3] + 1j * x[:, 3:]) * np.exp(1j * 5 * THETA ** (-np.arange(3) / 3))
    np.testing.assert_allclose(turned, np.concatenate([z.real, z.imag], -1), atol=1e-14)
    assert apart(mla(drawn(), positions=POSITIONS + 50), mla(drawn())) < 1e-12
    assert apart(mla(drawn(), positions=POSITIONS * 2), mla(drawn())) > 1e-3


def test_low_rank_queries():
    weights, eps = drawn(low_rank=True), 0.3
    down = X @ weights.query_down
    token = down / np.sqrt((down**2).mean(-1, keepdims=True) + eps) * weights.query_gain
    wanted = (token @ weights.query).reshape(T, 4, 10)
    content, turned = oracle.queries(weights, X, np.zeros(T), THETA, eps)
    np.testing.assert_allclose(np.concatenate([content, turned], -1), wanted, rtol=1e-12)


@pytest.mark.parametrize("low_rank", [False, True], ids=["plain", "low rank"])
def test_what_equals_mla(low_rank):
    weights = drawn(low_rank=low_rank)
    wanted = mla(weights)
    folded = oracle.fold(weights)
    eigen, _ = oracle.pca(oracle.latents(folded, X, EPS))
    for U in (orthogonal(16), eigen, oracle.hadamard(16, np.sign(np.random.default_rng(3).standard_normal(16)))):
        assert apart(mla(oracle.rotate(folded, U)), wanted) < 1e-12
    assert apart(tpla(weights, 1), wanted) < 1e-12
    assert apart(gla(weights, 1, [1.0]), wanted) < 1e-12
    assert apart(tpla(weights, prefill=T), wanted) == 0
    assert apart(gla(weights, 2, [2.0, 2.0], prefill=T), wanted) == 0
    for g in (2, 4):  # Scores are summed, and neither factor is applied.
        whole = {"norm": "whole", "softmax": "whole", "alpha": np.full(g, 9.0), "mu": np.full(g, 7.0)}
        assert apart(tpla(weights, g, **whole), wanted) < 1e-12


def test_what_does_not_equal_mla():
    weights = drawn()
    wanted = mla(weights)
    for modes in ({}, {"norm": "whole"}, {"softmax": "whole"}, {"norm": "whole", "mu": [2.0, 0.5]}):
        assert apart(tpla(weights, **modes), wanted) > 1e-3, modes
    assert apart(gla(weights, 2, [2.0, 2.0]), wanted) > 1e-1
    with pytest.raises(ValueError, match="fold"):
        oracle.rotate(weights, orthogonal(16))


def test_slices_sum_and_rope_counts_once_in_each_softmax():
    still = drawn(query=np.zeros((D, 40)))  # Every softmax is uniform: only how slices' values combine is left.
    assert apart(tpla(still, norm="whole"), mla(still)) < 1e-12
    only_rope = drawn(key_up=np.zeros((16, 24)))  # Every softmax is MLA's if rope's scores stand in each, as they are.
    assert apart(tpla(only_rope, 4, norm="whole", mu=[3.0, 0.5, 2.0, 9.0]), mla(only_rope)) < 1e-12


def test_logit_factors_multiply_content_of_their_slice_in_scores_alone():
    weights, mu = drawn(), np.array([1.7, 0.4])
    scaled = dataclasses.replace(weights, key_up=np.repeat(mu, 8)[:, None] * weights.key_up)
    assert apart(tpla(weights, mu=mu), tpla(scaled)) < 1e-12
    assert apart(tpla(weights, mu=mu), tpla(weights)) > 1e-3
    assert apart(gla(weights, 2, [2.0, 2.0], logit_factor=mu), gla(scaled, 2, [2.0, 2.0])) < 1e-12


def test_sliced_normalisation():
    weights, alpha, eps = drawn(), np.array([1.25, 5.0]), 0.3
    raw = X @ weights.latent
    found, _ = oracle.cache(weights, X, POSITIONS, THETA, eps, 2, alpha, prefill=3)
    for j, at in enumerate((slice(0, 8), slice(8, 16))):
        # The local RMSNorm over d/g channels times sqrt(g / alpha), where eps counts g / alpha times.
        local = raw[:, at] / np.sqrt(np.mean(raw[:, at] ** 2, -1, keepdims=True) + eps * 2 / alpha[j])
        np.testing.assert_allclose(found[3:, at], (local * np.sqrt(2 / alpha[j]) * weights.gain[at])[3:], rtol=1e-12)
    whole = raw / np.sqrt(np.mean(raw**2, -1, keepdims=True) + eps) * weights.gain
    np.testing.assert_allclose(found[:3], whole[:3], rtol=1e-12)
    assert apart(found, whole) > 1e-2


def test_tpla_keeps_what_it_cannot_see():
    weights = drawn()
    folded = oracle.fold(weights)
    assert apart(tpla(folded, alpha=[1.5, 3.0]), tpla(weights, alpha=[1.5, 3.0])) < 1e-12
    inside = np.zeros((16, 16))  # A rotation that mixes no two slices.
    inside[:8, :8], inside[8:, 8:] = orthogonal(8), orthogonal(8, seed=5)
    assert apart(tpla(oracle.rotate(folded, inside)), tpla(folded)) < 1e-12
    assert apart(tpla(oracle.rotate(folded, orthogonal(16))), tpla(folded)) > 1e-3
    assert apart(tpla(weights, out="scatter_heads"), tpla(weights)) < 1e-12
    later = np.concatenate([X[:4], 3 - X[4:]])
    for layer in (mla, tpla):
        np.testing.assert_array_equal(layer(weights, x=later)[:4], layer(weights)[:4])


def test_prefill_is_exact_and_leaves_whole_entries_to_later_queries():
    weights = drawn()
    found = tpla(weights, prefill=4)
    np.testing.assert_array_equal(found[:4], mla(weights, x=X[:4], positions=POSITIONS[:4]))
    assert apart(found[4:], tpla(weights)[4:]) > 1e-4  # Entries before are other than a sliced normalisation's,
    assert apart(found[4:], tpla(weights, norm="whole")[4:]) > 1e-4  # and entries since other than the whole one's.
    np.testing.assert_array_equal(
        tpla(weights, norm="whole", prefill=4)[4:], tpla(weights, norm="whole")[4:]
    )  # Queries do not differ.


def test_gla_is_tpla_with_the_other_slices_of_each_head_put_out():
    weights, alpha = drawn(), np.array([1.5, 3.0])
    wanted = np.zeros((T, D))
    for j in range(2):
        at, heads = slice(8 * j, 8 * j + 8), slice(10 * j, 10 * j + 10)
        value_up, out = np.zeros((16, 20)), np.zeros((20, D))
        value_up[at], out[heads] = weights.value_up[at], weights.out[heads]
        wanted += tpla(dataclasses.replace(weights, value_up=value_up, out=out), alpha=alpha)
    assert apart(gla(weights, 2, alpha), wanted) < 1e-12


def test_hadamard():
    signs = np.sign(np.random.default_rng(4).standard_normal(16))
    U = oracle.hadamard(16, signs)
    np.testing.assert_allclose(U @ U.T, np.eye(16), atol=1e-14)
    np.testing.assert_allclose(oracle.hadamard(2, [1, -1]) * 2**0.5, [[1, 1], [-1, 1]])
    wanted = np.ones((1, 1))
    for _ in range(4):
        wanted = np.block([[wanted, wanted], [wanted, -wanted]])
    np.testing.assert_array_equal(U * 4, signs[:, None] * wanted)
    with pytest.raises(ValueError, match="power of two"):
        oracle.hadamard(12, np.ones(12))


def test_pca_and_energies():
    F = np.random.default_rng(5).standard_normal((200, 16)) @ np.diag(np.linspace(0.2, 3, 16)) + 1
    U, values = oracle.pca(F)
    np.testing.assert_allclose(U.T @ U, np.eye(16), atol=1e-12)
    np.testing.assert_allclose(((F @ U) ** 2).mean(0), values, rtol=1e-12)
    assert (np.diff(values) < 0).all()
    e = oracle.energies(values, 4)
    assert (np.diff(e) < 0).all() and abs(e.sum() - 1) < 1e-14
    np.testing.assert_allclose(oracle.energies(F @ U, 4), e, rtol=1e-12)
    np.testing.assert_allclose(oracle.norm_factors(e) * e, 1)
    centred, variances = oracle.pca(F, center=True)
    np.testing.assert_allclose((F @ centred).var(0), variances, rtol=1e-12)
    assert variances[0] < values[0]
    with pytest.raises(ValueError, match="equal slices"):
        oracle.energies(values, 3)


def test_logit_factors_of_energies():
    e = np.array([0.9, 0.1])
    for kind, wanted in {"one": [1, 1], "energy": [0.9, 0.1], "inv_energy": [1 / 0.9, 8]}.items():
        np.testing.assert_allclose(oracle.logit_factors(kind, e), wanted)
    np.testing.assert_allclose(oracle.logit_factors("inv_energy", e, cap=20.0), [1 / 0.9, 10])


def test_lsq_of_proportional_slices_is_exact():
    weights = drawn()
    for name in ("latent", "gain", "key_up"):  # The second slice is the first, its keys doubled: full = 3 first.
        half = np.split(getattr(weights, name), 2, axis=1 if name == "latent" else 0)[0]
        twice = np.concatenate([half, half * (2 if name == "key_up" else 1)], axis=1 if name == "latent" else 0)
        weights = dataclasses.replace(weights, **{name: twice})
    rows = [X, -2 * X[:4], X[:1]]
    np.testing.assert_allclose(oracle.lsq(weights, rows, EPS, 2, norm="whole"), [3, 1.5], rtol=1e-12)
    arguments = {"weights": weights, "rows": rows, "eps": 0.0, "norm_factor": [2.0, 8.0]}
    np.testing.assert_allclose(oracle.logit_factors("lsq", [0.5, 0.5], **arguments), [3, 3], rtol=1e-12)


def test_lsq_takes_means_away_and_sees_no_later_key():
    # Entries are the tokens themselves: +1 and -1, and the last channel always 1, which adds the same to every key.
    x = np.array([[1.0, 1, 1, 1], [-1, 1, -1, 1], [-1, -1, -1, 1], [1, -1, 1, 1]])
    rng = np.random.default_rng(6)
    key = rng.standard_normal(4)
    weights = Weights(
        *(2, 2, 2, 1, 4),
        query=rng.standard_normal((4, 8)),
        latent=np.eye(4),
        rope_key=np.ones((4, 2)),
        gain=np.ones(4),
        key_up=np.stack([key, 0 * key, 2 * key, rng.standard_normal(4) * 9]),
        value_up=np.ones((4, 2)),
        out=np.ones((2, 4)),
    )
    np.testing.assert_allclose(oracle.lsq(weights, [x], 0.0, 2, norm="whole"), [3, 1.5], rtol=1e-12)
    # Two tokens: the first sees itself alone and says nothing; the second's two logits leave one difference a head.
    weights = drawn(7)
    c, q = oracle.latents(weights, X[:2], EPS), oracle.queries(weights, X[:2], [0, 0], THETA, EPS)[0][1]
    products, squares = np.zeros(2), np.zeros(2)
    for i in range(4):
        parts = ((c[1] - c[0]) * (weights.key_up[:, 6 * i : 6 * i + 6] @ q[i])).reshape(2, 8).sum(1)
        products, squares = products + parts * parts.sum(), squares + parts**2
    np.testing.assert_allclose(oracle.lsq(weights, [X[:2]], EPS, 2, norm="whole"), products / squares, rtol=1e-12)
    np.testing.assert_array_equal(oracle.lsq(weights, [X[:1]], EPS, 2, norm="whole"), [1, 1])
