"""Folders that are damaged, incomplete, hostile or not supported: one line that names the file and the tensor or field,
before anything is allocated."""

import json
import os
import shutil
import struct
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.errors import UserError
from models import load_pretrained
from models.pretrained import PretrainedError, families, loading, reader
from models.pretrained.settings import Settings
from tests.pretrained import golden

sys.path.insert(0, str(golden.HERE))

CASE = "llama_linear"
WHOLE, INDEX = reader.WHOLE, reader.INDEX
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder in two shards, and one in a single file."""
    place = tmp_path_factory.mktemp("hub")
    one = golden.folder(golden.load(CASE), place / "one")
    two = place / "two"
    two.mkdir()
    shutil.copy(one / "config.json", two)
    tensors = load_file(one / WHOLE)
    index = {}
    for number, names in enumerate((sorted(tensors)[:5], sorted(tensors)[5:])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, two / file)
        index |= dict.fromkeys(names, file)
    (two / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return {"one": one, "two": two}


@pytest.fixture
def nothing_allocated(monkeypatch):
    """Filling an array is a failure."""

    def never(*_):
        raise AssertionError("an array was allocated")

    monkeypatch.setattr(loading, "Filling", never)


def rewrite(path, change):
    """Changes the header of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def tensors(folder, change):
    """Changes the tensors of the single file."""
    found = load_file(folder / WHOLE)
    change(found)
    save_file(found, folder / WHOLE)


def config(**fields):
    """A change of config.json; None takes a field away."""

    def change(folder):
        content = json.loads((folder / "config.json").read_text()) | fields
        content = {name: value for name, value in content.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(content))

    return change


def index(change):
    """A change of the index of shards."""

    def changed(folder):
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return changed


def outside(folder):
    """The file is a link to another folder's."""
    other = folder.parent / f"{folder.name}-secret"
    other.mkdir()
    shutil.move(folder / WHOLE, other / WHOLE)
    os.symlink(other / WHOLE, folder / WHOLE)


SECOND = "model-00002-of-00002.safetensors"
DAMAGED = {
    "cut short": ("one", lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes()[:-1]), (WHOLE, "damaged")),
    "empty": ("one", lambda f: (f / WHOLE).write_bytes(b""), (WHOLE, "damaged")),
    "longer": ("one", lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes() + b"x"), (WHOLE, "damaged")),
    "header too long": ("one", lambda f: (f / WHOLE).write_bytes(b"\xff" * 64), (WHOLE, "damaged")),
    "a folder": ("one", lambda f: ((f / WHOLE).unlink(), (f / WHOLE).mkdir()), (WHOLE, "is missing")),
    "offsets overlap": (
        "one", lambda f: rewrite(f / WHOLE, lambda h: h[QUERY].update(data_offsets=[0, 4096])), (WHOLE, "damaged")),
    "size is not that of the shape": (
        "one", lambda f: rewrite(f / WHOLE, lambda h: h[QUERY].update(shape=[32, 31])), (WHOLE, "damaged")),
    "whole numbers": (
        "one", lambda f: rewrite(f / WHOLE, lambda h: h[QUERY].update(dtype="I32")), (WHOLE, QUERY, "int32")),
    "complex numbers": (
        "one", lambda f: rewrite(f / WHOLE, lambda h: h[QUERY].update(dtype="C64", shape=[32, 16])),
        (WHOLE, QUERY, "C64")),
    "another shape": (
        "one", lambda f: rewrite(f / WHOLE, lambda h: h[QUERY].update(shape=[16, 64])),
        (WHOLE, QUERY, "[16, 64]", "[32, 32]")),
    "tensor missing": ("one", lambda f: tensors(f, lambda t: t.pop(QUERY)), (QUERY, "is missing")),
    "tensor too much": (
        "one", lambda f: tensors(f, lambda t: t.update({"model.more": np.zeros(2)})), (WHOLE, "model.more", "no part")),
    "no tensors": ("one", lambda f: (f / WHOLE).unlink(), (WHOLE, INDEX)),
    "pickled": ("one", lambda f: (f / WHOLE).rename(f / "pytorch_model.bin"), ("pytorch_model.bin", "never opened")),
    "link out": ("one", outside, (WHOLE, "link out of its folder")),
    "shard missing": ("two", lambda f: (f / SECOND).unlink(), (SECOND, "is missing")),
    "index not JSON": ("two", lambda f: (f / INDEX).write_text("{"), (INDEX, "not JSON")),
    "index without a map": ("two", lambda f: (f / INDEX).write_text("{}"), (INDEX, "weight_map")),
    "index names what is not there": (
        "two", index(lambda m: m.update({"model.none": SECOND})), (SECOND, "model.none", "missing")),
    "shard has what the index does not": ("two", index(lambda m: m.pop(max(m))), (SECOND, "does not say")),
    "index in another folder": ("two", index(lambda m: m.update({QUERY: f"../{SECOND}"})), (INDEX, QUERY, "no safet")),
    "index with a pickled file": ("two", index(lambda m: m.update({QUERY: "model.bin"})), (INDEX, QUERY, "model.bin")),
    "tensor twice": (
        "two", lambda f: (shutil.copy(f / SECOND, f / "a.safetensors"),
                          index(lambda m: m.update({min(m): "a.safetensors"}))(f)), ("a.safetensors",)),
    "no config": ("one", lambda f: (f / "config.json").unlink(), ("config.json", "cannot be read")),
    "config not JSON": ("one", lambda f: (f / "config.json").write_text("{'a': 1}"), ("config.json", "not JSON")),
    "config no text": ("one", lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ("config.json", "not JSON")),
    "config nested deep": ("one", lambda f: (f / "config.json").write_text("[" * 10**5), ("config.json", "not JSON")),
    "config a list": ("one", lambda f: (f / "config.json").write_text("[1]"), ("config.json", "object")),
    "config too large": ("one", lambda f: (f / "config.json").write_text(" " * 2**21), ("config.json", "more than")),
    "config twice": (
        "one", lambda f: (f / "config.json").write_text('{"model_type": "a", "model_type": "b"}'),
        ("config.json", "model_type", "twice")),
    "unknown architecture": ("one", config(model_type="gpt9"), ("config.json", "gpt9", "llama", "qwen3")),
    "known, not built yet": ("one", config(model_type="doge"), ("doge", "not built yet")),
    "code of its own": (
        "one", config(model_type="mine", auto_map={"AutoModel": "code.Model"}), ("config.json", "'mine'", "auto_map")),
    "no architecture": ("one", config(model_type=...), ("config.json", "model_type", "missing")),
    "field missing": ("one", config(hidden_size=...), ("config.json", "hidden_size", "missing")),
    "field of another type": ("one", config(hidden_size="32"), ("hidden_size", "whole number", "'32'")),
    "field out of range": ("one", config(num_hidden_layers=0), ("num_hidden_layers", "whole number >= 1")),
    "heads do not divide": ("one", config(num_key_value_heads=3), ("num_key_value_heads", "3", "4")),
    "odd heads": ("one", config(head_dim=7), ("config.json", "head_dim", "even")),
    "activation": ("one", config(hidden_act="gelu"), ("hidden_act", "'gelu'", "silu")),
    "quantised": ("one", config(quantization_config={"quant_method": "gptq"}), ("quantization_config",)),
    "dynamic rope": ("one", config(rope_scaling={"type": "dynamic"}), ("rope_scaling.rope_type", "dynamic")),
    "longrope": ("one", config(rope_scaling={"rope_type": "longrope"}), ("rope_scaling.rope_type", "longrope", "yarn")),
    "rope without factor": ("one", config(rope_scaling={"rope_type": "linear"}), ("rope_scaling.factor",)),
    "rope by kind of layer": (
        "one", config(rope_parameters={"full_attention": {"rope_type": "default"}}), ("full_attention",)),
    "partly rotated": ("one", config(partial_rotary_factor=0.5), ("partial_rotary_factor",)),
    "exact GELU": ("one", config(model_type="gemma2", hidden_activation="gelu"), ("hidden_activation", "gelu")),
    "kind of layer": (
        "one", config(model_type="qwen3", head_dim=8, layer_types=["chunked_attention"]),
        ("layer_types", "chunked_attention")),
    "both ways": ("one", config(model_type="gemma2", use_bidirectional_attention=True), ("use_bidirectional",)),
    "more layers than tensors": ("one", config(num_hidden_layers=2), ("model.layers.1", "is missing")),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_wrong_is_told_in_one_line(sound, tmp_path, nothing_allocated, what):
    which, damage, words = DAMAGED[what]
    folder = tmp_path / "model"
    shutil.copytree(sound[which], folder)
    damage(folder)
    with pytest.raises(PretrainedError) as caught:
        load_pretrained(folder)
    message = str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in message and len(message) < 600
    assert not [word for word in words if word not in message], message


def test_no_folder(tmp_path, nothing_allocated):
    with pytest.raises(PretrainedError, match="is no folder"):
        load_pretrained(tmp_path / "none")
    with pytest.raises(PretrainedError, match="dtype must be float32 or bfloat16, got float16"):
        load_pretrained(golden.folder(golden.load(CASE), tmp_path / "some"), dtype="float16")


def test_both_ways_of_storing_are_the_same_network(sound):
    """In shards, and through the links of a hub's cache, which point two folders up."""
    wanted = golden.load(CASE)
    cache = sound["one"].parent / "cache"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sound["two"].iterdir()):
        shutil.copy(file, cache / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / file.name)
    found = load_pretrained(snapshot)
    assert np.abs(np.asarray(found(wanted.tokens)) - wanted.logits).max() < 1e-4


def test_code_beside_a_known_architecture_is_not_run(sound, tmp_path):
    shutil.copytree(sound["one"], tmp_path / "model")
    config(auto_map={"AutoModelForCausalLM": "modeling.Model"})(tmp_path / "model")
    (tmp_path / "model" / "modeling.py").write_text("raise SystemExit('run')")
    found = load_pretrained(tmp_path / "model")
    assert len(found.notes) == 1 and "auto_map" in found.notes[0] and "not run" in found.notes[0]


def test_fuzzed_weights(sound, tmp_path):
    """Truncations and flipped bytes, most of them in the header: an error of ours, or arrays of the right shape."""
    wanted = loading.check(sound["one"])
    content = (sound["one"] / WHOLE).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    random = np.random.default_rng(0)
    refused = accepted = 0
    for number in range(1000):
        changed = bytearray(content)
        if number % 4 == 0:
            del changed[int(random.integers(header if number % 8 else len(content))) :]
        else:
            span = header if number % 4 < 3 else len(content)
            for place in random.integers(span, size=random.integers(1, 4)):
                changed[place] ^= 1 << int(random.integers(8))
        (tmp_path / WHOLE).write_bytes(changed)
        try:
            source = reader.Folder(tmp_path)
            wanted.structure.check(source.entries, (), tmp_path)
        except PretrainedError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        accepted += 1
        for one in wanted.structure.mapped:
            arrays = one.read(*(source.read(name) for name in one.theirs))
            for where, array in zip(wanted.structure.places(one), arrays, strict=True):
                assert array.shape == wanted.structure.shape(where) and array.dtype == np.float32
                array.sum()  # Every byte is there.
    assert refused > 600 and accepted > 100


def test_fuzzed_configs(sound):
    """Flipped bytes of config.json, for every family: an error of ours, or fields."""
    random = np.random.default_rng(0)
    refused = 0
    for number in range(1000):
        content = json.loads((sound["one"] / "config.json").read_text())
        content |= {"model_type": ("llama", "mistral", "qwen2", "qwen3", "gemma2")[number % 5]}
        text = bytearray(json.dumps(content).encode())
        for place in random.integers(len(text), size=random.integers(1, 4)):
            text[place] ^= 1 << int(random.integers(8))
        path = sound["one"].parent / "fuzzed.json"
        path.write_bytes(text)
        try:
            hf = Settings(reader.read_json(path), str(path))
            family = families.find(hf.text("model_type"), hf.where)
            assert family.config(hf)["depth"] >= 1
        except PretrainedError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 300 < refused < 1000
