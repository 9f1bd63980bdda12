"""Pretrained folders against transformers: recorded logits, decoding, half precision, meshes, there and back.

Tolerance: 1e-4 of logits up to 10 in float32; measured differences are below 2e-5. The architectures with experts have
tests of their own, in test_pretrained_moe.py.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import models
import sharding
from configs import base
from kernels.tokens import Tokens
from models import load_pretrained, save_pretrained
from models.generation import prefill
from models.pretrained import PretrainedError, families, filling
from models.pretrained.loading import check, model_config
from models.pretrained.settings import Settings
from tests.pretrained import golden

sys.path.insert(0, str(golden.HERE))
from cases import CASES  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Small networks: compiling them is what takes the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint of a case, written once."""
    return functools.cache(lambda name: golden.folder(golden.load(name), tmp_path_factory.mktemp("hub") / name))


def arrays(loaded):
    """What a network holds, by dotted name."""
    state = nnx.to_flat_state(nnx.state(loaded.model))
    return {".".join(map(str, path)): np.asarray(one[...]) for path, one in state}


def same(mine, other):
    """Bit for bit."""
    return mine.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and value.tobytes() == other[name].tobytes()
        for name, value in mine.items()
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(folder, name):
    wanted = golden.load(name)
    found = load_pretrained(folder(name))(wanted.tokens)
    assert found.dtype == jnp.float32 and found.shape == wanted.logits.shape
    assert np.abs(np.asarray(found) - wanted.logits).max() < 1e-4
    assert wanted.logits.std() > 0.3  # Not so small that anything would do.


@pytest.mark.parametrize("name", ["llama_yarn_mscale", "mistral", "qwen2_yarn", "qwen3", "gemma2_types"])
def test_prefill_and_decode_give_the_full_pass(folder, name):
    """Prefill of 12 tokens, longer than any window, then one at a time."""
    wanted, model = golden.load(name), load_pretrained(folder(name)).model
    definition, state = nnx.split(model)

    @jax.jit
    def run(state, ids):
        model = nnx.merge(definition, state)
        caches = model.init_caches(*ids.shape)
        first, caches = prefill(model, ids[:, :12], jnp.full(len(ids), 12), caches)

        def step(caches, token):
            out = model(token[:, None], Tokens(index=caches.length[:, None]), caches)
            return out.caches, out.logits[:, 0]

        _, after = jax.lax.scan(step, caches, ids[:, 12:].T)
        return jnp.concatenate([first[None], after]).swapaxes(0, 1)

    found = np.asarray(run(state, wanted.tokens))[..., : model.vocab_size]
    assert np.abs(found - wanted.logits[:, 11:]).max() < 1e-4


@pytest.mark.parametrize("name", ["llama_biases", "gemma2_types"])
def test_bfloat16_stays_within_its_tolerance(folder, tmp_path, name):
    """Stored in bfloat16, which is then the default; asked for of a float32 file, it is the same. What is lost is
    little more than what transformers itself loses."""
    wanted = golden.load(name)
    stored = load_pretrained(golden.folder(wanted, tmp_path / "stored", ml_dtypes.bfloat16))
    assert stored.config.param_dtype == stored.config.compute_dtype == "bfloat16"
    assert same(arrays(stored), arrays(load_pretrained(folder(name), dtype=jnp.bfloat16)))
    error = np.asarray(stored(wanted.tokens)) - wanted.logits
    assert 0 < np.sqrt((error**2).mean() / (wanted.logits**2).mean()) < 1.25 * wanted.bfloat16 < 0.06


@pytest.mark.parametrize("devices", [2, 4])
def test_on_a_mesh(folder, devices):
    """Every device gets its own part of every array straight from the file, and the network is the same."""
    wanted = golden.load("qwen3")
    options = base.sharding()
    options.preset = "fsdp_tp"
    layout = sharding.build(options, jax.devices()[:devices])
    found = load_pretrained(folder("qwen3"), mesh=layout)
    placed = nnx.split(found.model)[1]
    for row, array in zip(layout.placements(placed), jax.tree.leaves(placed), strict=True):
        assert array.sharding.is_equivalent_to(row.sharding, array.ndim), row.name
    key = found.model.stacks[0].blocks[0].attention.key.weight[...]
    assert key.addressable_shards[0].data.size == key.size // devices
    assert np.abs(np.asarray(found(wanted.tokens)) - wanted.logits).max() < 1e-4
    assert same(arrays(found), arrays(load_pretrained(folder("qwen3"))))


@pytest.mark.parametrize("index", [(), (1,), (2, 1)])
def test_arrays_are_filled_alike_in_memory_and_on_devices(monkeypatch, index):
    """Both ways of filling a part, for every rank of place, transposed, with a rest that stays zero."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    shape = (3, 2, 140, 200)
    stored = np.random.default_rng(0).standard_normal((*shape[len(index) : -2], 199, 140)).astype(np.float32)
    value = stored.swapaxes(-1, -2)
    wanted = np.zeros(shape, np.float32)
    wanted[index][..., :199] = value
    for spec in ((), (None, None, "x"), (None, None, None, "x"), (None, "x")):
        place = jax.NamedSharding(mesh, jax.P(*spec))
        for kind in (filling._HostPart, filling._DevicePart):
            with monkeypatch.context() as patch:
                patch.setattr(filling, "_HostPart", kind)
                made = filling.Filling(shape, np.dtype(np.float32), place)
                made.put(index, value)
                found = made.finish()
            assert found.sharding == place
            np.testing.assert_array_equal(np.asarray(found), wanted)


@pytest.mark.parametrize("name", CASES)
def test_import_then_export_gives_the_same_tensors(folder, tmp_path, name):
    """In shards, bit for bit; and the export, read again, describes the same network."""
    loaded = load_pretrained(folder(name))
    kind = loaded.hf["model_type"]
    save_pretrained(loaded.model, loaded.config, tmp_path / "saved", max_shard_size=20_000, family=kind)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 1 and files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    after = {tensor: value for file in files for tensor, value in load_file(file).items()}
    assert same(load_file(folder(name) / "model.safetensors"), after)
    again = check(tmp_path / "saved")
    assert again.hf["model_type"] == kind and again.config.param_dtype == "float32"


@pytest.mark.parametrize("name", ["llama_biases", "gemma2"])
def test_export_then_import_gives_the_same_arrays(folder, tmp_path, name):
    """In one file, in bfloat16."""
    loaded = load_pretrained(folder(name), dtype="bfloat16")
    save_pretrained(loaded.model, loaded.config, tmp_path / "saved", family=loaded.hf["model_type"])
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    again = load_pretrained(tmp_path / "saved")
    assert again.config == loaded.config and same(arrays(again), arrays(loaded))
    with pytest.raises(PretrainedError, match="exists already"):
        save_pretrained(loaded.model, loaded.config, tmp_path / "saved")


@pytest.mark.parametrize("name", CASES)
def test_the_config_that_transformers_writes_means_the_same(name):
    """config.json of the case as it is, and as transformers 5 saves it again."""
    wanted = golden.load(name)
    assert wanted.config == CASES[name]["config"], "record the case again"
    given, saved = (
        model_config(families.find(config["model_type"]), Settings(config)) for config in (wanted.config, wanted.saved)
    )
    assert given == saved


def test_generate_follows_the_folder(folder, monkeypatch):
    """What is handed to `models.generate`: greedy by default, up to the stop ids of generation_config.json."""
    loaded = load_pretrained(folder("llama_linear"))
    given = []
    monkeypatch.setattr(models, "generate", lambda model, ids, **options: given.append((ids, options)) or ids)
    assert loaded.generate([[1, 2]], max_new_tokens=4) == [[1, 2]]
    loaded.generation = {"eos_token_id": [7, 95], "temperature": 0.5}
    loaded.generate([[1, 2]], max_new_tokens=4)
    loaded.generation |= {"do_sample": True, "top_k": 3}
    loaded.generate([[1, 2]], max_new_tokens=4, top_k=5, seed=1)
    wanted = {"max_new_tokens": 4, "stop_ids": []}, {"max_new_tokens": 4, "stop_ids": [7, 95]}
    sampled = {"temperature": 0.5, "top_k": 5, "seed": 1}
    assert given == [([[1, 2]], wanted[0]), ([[1, 2]], wanted[1]), ([[1, 2]], wanted[1] | sampled)]
    with pytest.raises(PretrainedError, match=r"has no tokenizer\.json: give ids"):
        loaded.generate("text", max_new_tokens=1)
    with pytest.raises(ValueError, match="outside the vocabulary of 96"):
        loaded(np.array([[1, 96]]))
