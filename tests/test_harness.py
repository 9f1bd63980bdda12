"""lm-evaluation-harness on our models: the adapter against its peer, plans, answers, tasks with hand-computed scores.

`harness/golden.json` holds what HFLM of lm-evaluation-harness 0.4.13 answers on the same weights (`harness/record.py`).
"""

import functools
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import data
import models
from evaluation import EvaluationError
from evaluation.harness import plan

HERE = Path(__file__).parent / "harness"
sys.path.insert(0, str(HERE))
import peer  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Small networks: compiling them is what takes the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A JaxLM of a variant of the peer, and the peer's answers."""
    from evaluation.harness.model import JaxLM

    @functools.cache
    def make(variant):
        folder = peer.write(tmp_path_factory.mktemp("llama"), variant)
        lm = JaxLM(models.load_pretrained(folder).model, data.load_tokenizer(folder), batch_size=4)
        return lm, json.loads((HERE / "golden.json").read_text())[variant]

    return make


@pytest.fixture(params=peer.VARIANTS)
def pair(request, made):
    """Each variant."""
    return made(request.param)


@pytest.fixture
def one(made):
    """The variant without bos, where that makes no difference."""
    return made("plain")


def ask(lm, kind, *arguments):
    """Answers to requests of one kind."""
    return getattr(lm, kind)([types.SimpleNamespace(args=given) for given in arguments])


def test_log_likelihoods_are_those_of_the_peer(pair):
    lm, golden = pair
    lm.compiled.programs.clear()
    found = ask(lm, "loglikelihood", *peer.pairs())
    assert len(lm.compiled.programs) <= 3  # For 22 requests of many lengths.
    values, greedy = zip(*golden["loglikelihood"], strict=True)
    np.testing.assert_allclose([value for value, _ in found], values, atol=1e-3)
    assert [said for _, said in found] == list(greedy) and any(greedy)


def test_rolling_log_likelihoods_are_those_of_the_peer(pair):
    lm, golden = pair
    found = ask(lm, "loglikelihood_rolling", *((text,) for text in peer.TEXTS))
    np.testing.assert_allclose(found, golden["loglikelihood_rolling"], atol=1e-3)


def test_greedy_texts_are_those_of_the_peer(pair):
    lm, golden = pair
    assert ask(lm, "generate_until", *peer.CONTINUED) == golden["generate_until"]


# Plans


def test_groups_hold_every_request_once_cut_as_the_harness_cuts_them():
    generator = np.random.default_rng(0)
    contexts = [generator.integers(0, 9, size).tolist() for size in (1, 5, 20, 40)]
    requests = [(c, generator.integers(0, 9, generator.integers(1, 12)).tolist()) for c in contexts for _ in range(5)]
    requests += [(contexts[2], [1]), (contexts[2], [1])]
    seen = []
    for group in plan.groups(requests, 24):
        for ids, asked in zip(group.continuations, group.asked, strict=True):
            for number in asked:
                context, continuation = requests[number]
                assert [*group.context, *ids][:-1] == (context + continuation)[-25:][:-1] and list(ids) == continuation
                seen.append(number)
    assert sorted(seen) == list(range(len(requests)))
    shared = [group for group in plan.groups(requests, 100) if len(group.continuations) > 1]
    assert shared and all(len(group.context) > 1 for group in shared)  # Behind one token there is nothing to share.
    single = plan.groups([([1, 2, 3], [letter]) for letter in range(4)], 24)
    assert [group.continuations for group in single] == [((0,), (1,), (2,), (3,))]  # One forward answers all.


def test_many_lengths_make_few_shapes_and_every_member_fits(monkeypatch):
    monkeypatch.setattr(plan, "COMPILING", 0)  # As in a run of millions of requests, where padding outweighs compiling.
    generator = np.random.default_rng(0)
    shapes = [(plan.ladder(int(a), 2048), plan.ladder(int(b), 2048)) for a, b in generator.integers(1, 2049, (500, 2))]
    assert len(set(shapes)) >= 100
    found = plan.batches(shapes, (1, 4), batch_size=8, parts=4)
    assert len({batch.shape for batch in found}) <= plan.MOST
    assert len({(batch.shape, batch.rows) for batch in found}) <= plan.MOST
    assert sorted(index for batch in found for index in batch.members) == list(range(500))
    fits = [np.less_equal(shapes[index], batch.shape).all() for batch in found for index in batch.members]
    assert all(fits)
    assert all(batch.rows == 8 and len(batch.members) <= 8 for batch in found)
    auto = plan.batches(shapes, (1, 4), batch_size=0, copies=4)
    assert all(batch.rows == 1 or 4 * sum(batch.shape) * batch.rows <= plan.TOKENS for batch in auto)
    assert [plan.ladder(n, 100) for n in (1, 16, 17, 25, 33, 49, 97)] == [16, 16, 24, 32, 48, 64, 100]


@pytest.mark.parametrize(
    ("request_", "message"),
    [(([], [1]), "empty context"), (([1], []), "empty continuation"), (([1], [1] * 9), "9 tokens, the model takes 8")],
)
def test_requests_that_cannot_be_scored_are_named(request_, message):
    with pytest.raises(EvaluationError, match=message):
        plan.groups([request_], 8)


# The adapter


def test_sharing_a_context_changes_no_score(one, monkeypatch):
    lm, golden = one
    monkeypatch.setattr(plan, "WORTH", -1.0)
    monkeypatch.setattr(plan, "_shares", lambda group: False)
    assert all(len(group.continuations) == 1 for group in plan.groups([([1], [2]), ([1], [3])], 9))
    found = ask(lm, "loglikelihood", *peer.pairs())
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in golden["loglikelihood"]], atol=1e-3)


def test_draws_are_those_of_the_generator(one):
    lm, _ = one
    options = {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.3}
    found = ask(lm, "generate_until", ("Once", options), ("upon", options))
    model = nnx.merge(lm.compiled.graph, lm.compiled.state)
    prompts = [lm.tok_encode("Once"), lm.tok_encode("upon")]
    ids = models.generate(model, prompts, max_new_tokens=9, temperature=1.3, stop_ids=(lm.eot_token_id,))
    assert found == [lm.tok_decode(row) for row in ids] and found[0] != found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 64}, "64 new tokens leave no room"),
        ({"top_kk": 3}, "did you mean top_k"),
        ({"num_beams": 4}, "unknown generation option 'num_beams'"),
        ({"do_sample": True, "top_p": 3.0}, "top_p must be"),
    ],
)
def test_generation_options_that_cannot_be_are_named(one, options, message):
    with pytest.raises(EvaluationError, match=message):
        ask(one[0], "generate_until", ("x", {"until": [], **options}))


def test_kept_answers_are_not_asked_for_again(one, tmp_path):
    from evaluation.harness.answers import Answers

    lm, golden = one
    file = tmp_path / "cache" / "answers.jsonl"
    try:
        lm.answers = Answers(file)
        texts = ask(lm, "generate_until", *peer.CONTINUED)
        assert ask(lm, "loglikelihood_rolling", (peer.TEXTS[1],)) == ask(lm, "loglikelihood_rolling", (peer.TEXTS[1],))
        file.write_bytes(file.read_bytes() + b'{"key": "cut sho')  # As a kill leaves it.
        lm.answers = Answers(file)
        lm.compiled.programs.clear()
        assert ask(lm, "generate_until", *peer.CONTINUED) == texts == golden["generate_until"]
        assert not lm.compiled.programs
        found = ask(lm, "loglikelihood_rolling", *((text,) for text in peer.TEXTS))  # Old and new, in order.
        np.testing.assert_allclose(found, golden["loglikelihood_rolling"], atol=1e-3)
    finally:
        lm.answers = None
    file.write_text("nonsense\n")
    with pytest.raises(EvaluationError, match="damaged in line 1"):
        Answers(file)


def test_partial_results_reach_the_harness_s_own_cache(one):
    lm, _ = one
    kept, hook = [], lm.cache_hook
    try:
        lm.cache_hook = types.SimpleNamespace(add_partial=lambda *given: kept.append(given))
        ask(lm, "loglikelihood", ("a", " b"))
        ask(lm, "loglikelihood_rolling", (peer.TEXTS[1],))
    finally:
        lm.cache_hook = hook
    assert [(kind, tuple(key)) for kind, key, _ in kept] == [
        ("loglikelihood", ("a", " b")),
        ("loglikelihood_rolling", (peer.TEXTS[1],)),
    ]


def test_a_mesh_gives_the_peer_s_answers(tmp_path):
    import sharding
    from configs import base, fields
    from evaluation.harness.model import JaxLM

    folder = peer.write(tmp_path, "bos")
    layout = sharding.build(fields.apply(base.get_config(), {"sharding.preset": "fsdp_tp"}).sharding, jax.devices()[:4])
    assert dict(layout.mesh.shape) == {"data": 2, "model": 2}
    loaded = models.load_pretrained(folder, mesh=layout)
    lm = JaxLM(loaded.model, data.load_tokenizer(folder), layout=layout, batch_size=3)
    golden = json.loads((HERE / "golden.json").read_text())["bos"]
    found = ask(lm, "loglikelihood", *peer.pairs()[:4])
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in golden["loglikelihood"][:4]], atol=1e-3)
    assert ask(lm, "generate_until", *peer.CONTINUED) == golden["generate_until"]


def test_logits_in_chunks_are_those_of_one_piece(one, monkeypatch):
    lm, golden = one
    monkeypatch.setattr(lm.compiled, "chunk", lambda rows: 5)
    found = ask(lm, "loglikelihood_rolling", (peer.TEXTS[1],))
    np.testing.assert_allclose(found, golden["loglikelihood_rolling"][1:2], atol=1e-3)


# Chats


def test_chats_are_rendered_in_a_sandbox_and_their_marks_are_specials(one, tmp_path):
    from evaluation.harness import chat

    lm, _ = one
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert chat.find(tmp_path, lm.tokenizer) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    lm_ = type(lm).__new__(type(lm))
    lm_.__dict__.update(vars(lm))
    lm_.template = chat.find(tmp_path, lm.tokenizer)
    talk = [{"role": "user", "content": "Hi"}]
    text = lm_.apply_chat_template(talk)
    assert text == "<s>user: Hi</s>assistant:"
    ids = lm_.tok_encode(text)
    assert ids.count(0) == ids.count(1) == 1 and ids[0] == 0  # One bos, not two, and the end of the turn.
    assert 1 not in lm.tok_encode(text)  # Elsewhere the text of a special is text.
    begun = [*talk, {"role": "assistant", "content": "Hello"}]
    assert lm_.apply_chat_template(begun, add_generation_prompt=False) == "<s>user: Hi</s>assistant: Hello"
    for wrong in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% if %}", "{{ raise_exception('no') }}"):
        with pytest.raises(EvaluationError, match="chat template"):
            chat.ChatTemplate(wrong, {}).render(talk)
