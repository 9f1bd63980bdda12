"""Pretrained folders as runs and back, by the command line; what cannot be exported; memory while loading."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import eval as evaluator
import models
from configs import base, fields
from configs.errors import UserError
from data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from models import load_pretrained, save_pretrained
from models.pretrained import PretrainedError, tokens
from tests.pretrained import golden
from training import load_run

sys.path.insert(0, str(golden.HERE))
import weights  # noqa: E402

TEXTS = ("hello world", "naïve café\n\t日本 🙂", "¡ÿ\x00\x7f\xad\xa0", "")


def described(path, tokenizer, **changed):
    """A Llama of one layer for a tokenizer's ids."""
    wanted = golden.load("llama_linear")
    path.mkdir()
    ids = tokens.write(tokenizer, path)
    config = wanted.config | {"vocab_size": 300, "max_position_embeddings": 128, "auto_map": {}} | ids | changed
    (path / "config.json").write_text(json.dumps(config))
    shapes = {
        name: (300, 32) if name.endswith(("embed_tokens.weight", "lm_head.weight")) else shape
        for name, shape in wanted.shapes.items()
    }
    save_file({name: weights.weight(name, shape) for name, shape in shapes.items()}, path / "model.safetensors")
    (path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    (path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    return path


def drawn(config, vocab_size):
    """A network with some numbers in it, without compiling its initialisation."""
    definition, state = models.abstract(config, vocab_size)
    rng = np.random.default_rng(0)
    return nnx.merge(definition, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), state))


def told(*arguments):
    """The one line of a mistake on the command line."""
    with pytest.raises(UserError) as caught:
        evaluator.main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_becomes_a_run_and_a_folder_again(tmp_path):
    bpe = train_bpe(["to be or not to be, that is the question"] * 3, 280)
    folder = described(tmp_path / "hub", bpe)
    run, back = tmp_path / "run", tmp_path / "back"
    assert "is a Hugging Face folder, no run: first python eval.py import" in told("--run", folder)
    assert evaluator.main(["import", str(folder), "--output", str(run)]) == 0
    loaded = load_run(run)
    direct = load_pretrained(folder)
    assert loaded.tokenizer.encode("to be") == direct.tokenizer.encode("to be").ids == bpe.encode("to be")
    assert loaded.tokenizer.eos_id == bpe.eos_id
    for mine, other in zip(*(jax.tree.leaves(nnx.state(one.model)) for one in (loaded, direct)), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert loaded.step == 0 and loaded.config.data.length == 128 and loaded.config.train.steps == 0
    assert "exists already" in told("export", run, "--output", folder)
    assert "has a config.json already" in told("import", folder, "--output", run)
    assert evaluator.main(["export", str(run), "--output", str(back), "--family=llama"]) == 0
    before, after = (load_file(place / "model.safetensors") for place in (folder, back))
    assert before.keys() == after.keys() and all(before[name].tobytes() == after[name].tobytes() for name in before)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_text() == (back / name).read_text()
    said = json.loads((back / "generation_config.json").read_text())
    assert said == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": True, "temperature": 0.7}
    assert load_pretrained(back).generation == said


def test_imports_that_cannot_be_runs(tmp_path):
    folder = described(tmp_path / "hub", ByteTokenizer(), vocab_size=200)
    assert "embed_tokens.weight is [300, 32]" in told("import", folder, "--output", tmp_path / "run")
    assert "is no folder" in told("import", tmp_path / "none", "--output", tmp_path / "run", "--tokenizer=byte")
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in told("import", folder, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "is a Hugging Face folder, no run" in told("export", folder, "--output", tmp_path / "out")


def test_bytes_as_a_tokenizer_of_the_library(tmp_path):
    """The same ids for any text, and back; its files are those of a folder that data.load_tokenizer reads."""
    made, plain = tokens.bytes_as_bpe(), ByteTokenizer()
    made.encode_special_tokens = True
    for text in TEXTS:
        assert made.encode(text, add_special_tokens=False).ids == plain.encode(text)
        assert made.decode(plain.encode(text)) == text
    assert tokens.write(plain, tmp_path) == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    again = load_tokenizer(tmp_path)
    assert (again.vocab_size, again.bos_id, again.eos_id, again.pad_id) == (259, 256, 257, 258)
    assert [again.encode(text) for text in TEXTS] == [plain.encode(text) for text in TEXTS]
    other = tmp_path / "other"
    other.mkdir()
    assert tokens.write(tmp_path, other) == tokens.write(plain, other)
    with pytest.raises(PretrainedError, match=r"has no tokenizer\.json"):
        tokens.write(str(tmp_path / "none"), other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model.attention.sink_tokens": 2, "model.attention.window": 8}, "it cannot say attention.sink_tokens = 2"),
        ({"model.attention.value_dim": 8}, "attention.value_dim = 8 of layer 0, only 32"),
        ({"model.attention": "lightning"}, "its attention is lightning"),
        ({"model.mlp.kind": "relu2"}, "its mlp is relu2"),
        ({"model.norm.kind": "layer"}, "norm.kind = 'layer'"),
        ({"model.attention.rope.layout": "interleaved"}, "attention.rope.layout = 'interleaved'"),
        ({"model.attention.heads": (4, 8)}, "attention.heads = 8 of layer 1, only 4"),
        ({"model.logit_cap": 5.0}, "llama: it cannot say logit_cap = 5.0, only 0.0"),
    ],
)  # fmt: skip
def test_what_no_architecture_can_hold_is_refused(tmp_path, changes, reason):
    """With a reason for each architecture, and nothing written."""
    config = fields.apply(base.get_config(), {"model.width": 32, "model.depth": 2, **changes}).model
    model = nnx.eval_shape(lambda: models.build(config, vocab_size=64, rngs=nnx.Rngs(0)))
    with pytest.raises(PretrainedError) as caught:
        save_pretrained(model, config, tmp_path / "out")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"model.attention.window": 8}, "mistral"),
        ({"model.attention.window": (0, 8), "model.attention.qkv_bias": True}, "qwen2"),
        ({"model.attention.qk_norm": True}, "qwen3"),
    ],
)
def test_networks_of_this_framework_are_written_as_what_they_are(tmp_path, changes, family):
    """A network trained here, of whatever config, in the plainest architecture that computes it."""
    sizes = {"model.width": 32, "model.depth": 2, "model.mlp.width": 40, "model.attention.heads": 4}
    config = fields.apply(base.get_config(), {**sizes, **changes}).model
    model = drawn(config, 61)
    save_pretrained(model, config, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    assert again.hf["model_type"] == family and again.hf["vocab_size"] == 61
    for mine, other in zip(*(jax.tree.leaves(nnx.state(one)) for one in (model, again.model)), strict=True):
        if mine.shape == (64, 32):  # Rows that stand for no token are not kept.
            mine, other = mine[:61], other[:61]
        np.testing.assert_array_equal(mine, other)


def test_an_export_cut_short_leaves_nothing(tmp_path, monkeypatch):
    config = fields.apply(base.get_config(), {"model.width": 32, "model.depth": 1}).model
    model = drawn(config, 64)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.pretrained.saving, "save_file", full)
    with pytest.raises(PretrainedError, match="cannot be written: No space left on device"):
        save_pretrained(model, config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_host_holds_its_parameters_and_one_file(tmp_path):
    """A network of 80 MB in four files, in a process of its own: the peak grows by no more than its parameters and
    1.3 times the largest file; a second copy of the network would not fit."""
    sys.path.insert(0, str(golden.HERE.parent.parent / "benchmarks"))
    import pretrained_loading as benchmark

    benchmark.WIDTH, benchmark.HIDDEN, benchmark.VOCABULARY = 1024, 2816, 2048
    folder = benchmark.folder(tmp_path / "model", 4, 4, "bfloat16")
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert sum(sizes) > 75e6
    grown = benchmark.peak(folder)
    assert 0.9 * sum(sizes) < grown < sum(sizes) + 1.3 * max(sizes) < 1.5 * sum(sizes)
