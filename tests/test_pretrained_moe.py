"""DeepSeek-V2, DeepSeek-V3, Kimi-K2 and MiniMax checkpoints against transformers: logits, decoding, meshes, fp8.

Tolerance: 1e-4 of logits up to 5 in float32; measured differences are below 1e-5.
"""

import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import sharding
from configs import base
from kernels.lightning.decay import decay_rates
from kernels.tokens import Tokens, sequence
from layers.attention.mla import MultiHeadLatentAttention
from layers.rope import Rope
from layers.setting import Setting
from models import load_pretrained, save_pretrained
from models.generation import prefill
from models.pretrained import PretrainedError, families, fp8
from models.pretrained.loading import check, model_config
from models.pretrained.settings import Settings
from tests.pretrained import golden

sys.path.insert(0, str(golden.HERE))
from cases_moe import CASES, PADDED, PATCHED  # noqa: E402

TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint of a case by name."""

    @functools.cache
    def written(name):
        return golden.folder(golden.load(name), tmp_path_factory.mktemp("pretrained") / name)

    return written


def arrays(model):
    """What a network holds, by dotted name."""
    return {".".join(map(str, path)): np.asarray(one[...]) for path, one in nnx.to_flat_state(nnx.state(model))}


def same(one, other):
    """Asserts that two networks hold the same numbers, bit for bit."""
    one, other = arrays(one), arrays(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def vocabulary(golden, logits):
    """The logits of real tokens."""
    return np.asarray(logits)[..., : golden.logits.shape[-1]]


@pytest.mark.parametrize("name", [*(name for name in CASES if name not in PADDED), *PATCHED])
def test_logits_are_those_of_transformers(folders, name):
    wanted = golden.load(name)
    found = load_pretrained(folders(name))(wanted.tokens)
    np.testing.assert_allclose(vocabulary(wanted, found), wanted.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["deepseek_v3_biases", "minimax_windows"])
def test_bfloat16_loses_little_more_than_transformers(folders, name):
    wanted = golden.load(name)
    error = vocabulary(wanted, load_pretrained(folders(name), dtype="bfloat16")(wanted.tokens)) - wanted.logits
    assert 0 < np.sqrt((error**2).mean() / (wanted.logits**2).mean()) < 1.5 * wanted.bfloat16 < 0.03


@pytest.mark.parametrize("name", list(PADDED))
def test_padding_before_a_row_changes_nothing_behind_it(folders, name):
    """And a row without it has the logits of transformers."""
    wanted = golden.load(f"{name}_padded")
    with np.load(golden.HERE / "goldens" / f"{name}_padded.npz") as found:
        mask = found["mask"]
    assert mask[0].all() and not mask.all()
    model = load_pretrained(folders(name)).model
    tokens = Tokens(sequence(mask.shape[1]).index, valid=jnp.asarray(mask))
    found = vocabulary(wanted, nnx.jit(lambda model, ids: model(ids, tokens).logits)(model, wanted.tokens))
    np.testing.assert_allclose(found[mask], wanted.logits[mask], atol=TOLERANCE, rtol=0)


@nnx.jit
def decoded(model, ids, lengths):
    """Logits [B, steps + 1, V] of the last prompt token of rows of these lengths and of those that follow it."""
    steps = ids.shape[1] - 17
    first = jnp.where(jnp.arange(17) < lengths[:, None], ids[:, :17], 0)
    logits, caches = prefill(model, first, lengths, model.init_caches(ids.shape[0], ids.shape[1]))
    definition, state = nnx.split(model)

    def step(caches, number):
        fed = jnp.take_along_axis(ids, (lengths + number)[:, None], axis=1)
        out = nnx.merge(definition, state)(fed, caches=caches)
        return out.caches, out.logits[:, 0]

    _, rest = jax.lax.scan(step, caches, jnp.arange(steps))
    return jnp.concatenate([logits[:, None], rest.swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_windows"])
def test_decoding_gives_the_logits_of_the_whole(folders, name):
    wanted, lengths = golden.load(name), np.array([17, 9])
    found = vocabulary(wanted, decoded(load_pretrained(folders(name)).model, wanted.tokens, lengths))
    for row, length in enumerate(lengths):
        whole = wanted.logits[row, length - 1 : length - 1 + found.shape[1]]
        np.testing.assert_allclose(found[row], whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "preset", "devices"),
    [("deepseek_v3", "tp", 2), ("minimax_windows", "fsdp_tp", 4)],
)
def test_a_mesh_gives_the_logits_of_one_device(folders, name, preset, devices):
    config, wanted = base.get_config().sharding, golden.load(name)
    config.preset = preset
    layout = sharding.build(config, jax.devices()[:devices])
    found = load_pretrained(folders(name), mesh=layout)
    np.testing.assert_allclose(vocabulary(wanted, found(wanted.tokens)), wanted.logits, atol=TOLERANCE, rtol=0)
    placed = arrays_of_devices(found.model)
    assert max(placed.values()) < sum(value.nbytes for value in arrays(found.model).values())


def arrays_of_devices(model):
    """Bytes of the network that each device holds."""
    held = {}
    for _, one in nnx.to_flat_state(nnx.state(model)):
        for shard in one[...].addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held


@pytest.mark.parametrize("name", [*CASES, *PATCHED])
def test_tensors_and_config_survive_there_and_back(folders, name):
    found, wanted = check(folders(name)), golden.tensors(golden.load(name))
    for one in found.structure.mapped:
        there = [wanted.pop(tensor) for tensor in one.theirs]
        for tensor, back in zip(there, one.write(*one.read(*there)), strict=True):
            np.testing.assert_array_equal(tensor, back, err_msg=str(one.theirs))
    assert not wanted
    again = model_config(found.family, Settings(found.family.hf_config(found.config)))
    for field, value in found.config.items():
        if field not in ("param_dtype", "compute_dtype"):
            assert again[field] == value, field


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3_biases", "minimax_windows"])
def test_export_and_import_are_bit_exact(folders, tmp_path, name):
    first = load_pretrained(folders(name))
    save_pretrained(first.model, first.config, tmp_path / "out", max_shard_size=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    same(load_pretrained(tmp_path / "out").model, first.model)


def rewritten(folder, path, change, **fields):
    """A copy of a checkpoint after `change` of its tensors, with other fields of config.json."""
    path.mkdir()
    config = json.loads((folder / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(config))
    tensors = golden.tensors(golden.load(folder.name))
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


def test_experts_stored_as_one_tensor(folders, tmp_path):
    def fuse(tensors):
        prefix = "model.layers.1.mlp.experts"
        gate, up, down = (
            np.stack([tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for expert in range(8)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}.down_proj": down}

    source = folders("deepseek_v3")
    same(load_pretrained(rewritten(source, tmp_path / "fused", fuse)).model, load_pretrained(source).model)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((8, 24, 32), "gate_proj.weight is there twice"), ((2**40, 0, 32), "gate_up_proj is no part of the network")],
)
def test_experts_stored_as_one_tensor_beside_others(folders, tmp_path, shape, message):
    def add(tensors):
        tensors["model.layers.1.mlp.experts.gate_up_proj"] = np.zeros(shape, np.float32)

    with pytest.raises(PretrainedError, match=message):
        check(rewritten(folders("deepseek_v3"), tmp_path / "twice", add))


def test_layers_of_multi_token_prediction_are_left_unread(folders, tmp_path):
    def extend(tensors):
        tensors |= {f"model.layers.2.{name}.weight": np.zeros((3, 3), np.float32) for name in ("eh_proj", "enorm")}

    source = folders("deepseek_v3")
    found = load_pretrained(rewritten(source, tmp_path / "more", extend))
    same(found.model, load_pretrained(source).model)
    assert "2 tensors" in found.notes[-1] and "model.layers.2.eh_proj.weight" in found.notes[-1]
    with pytest.raises(PretrainedError, match=r"model\.layers\.2\.(eh_proj|enorm)\.weight is no part of the network"):
        check(rewritten(source, tmp_path / "none", extend, num_nextn_predict_layers=0))


def test_decays_in_a_file_are_not_needed(folders, tmp_path):
    def extend(tensors):
        tensors |= {"model.layers.0.self_attn.slope_rate": np.ones((4, 1, 1), np.float32)}

    source = folders("minimax")
    same(load_pretrained(rewritten(source, tmp_path / "decays", extend)).model, load_pretrained(source).model)


@pytest.mark.parametrize("heads", [6, 64])
@pytest.mark.parametrize("depth", [1, 2, 80])
def test_decays_of_minimax(heads, depth):
    for layer in {0, depth // 2, depth - 1}:
        factor = 1 - layer / (depth - 1 + 1e-5) + 1e-5
        wanted = [math.pow(0.5, 8 / heads * head) * factor for head in range(1, heads + 1)]
        np.testing.assert_allclose(decay_rates(heads, layer, depth, rule="minimax"), wanted, rtol=1e-6)


# Of the released configs; the factors are those of the papers' formula, worked out by hand.
SCALES = {
    "V2 and V2-Lite": ({"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}, 0.114721),
    "V3": ({"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}, 0.135234),
    "Kimi-K2": (
        {"factor": 32, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1, "beta_slow": 1},
        192**-0.5 * 1.81326,
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_softmax_scale_of_the_released_networks(name):
    scaling, wanted = SCALES[name]
    sizes = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
    scaling = {"type": "yarn", "original_max_position_embeddings": 4096, **scaling}
    hf = golden.load("deepseek_v3").config | sizes | {"rope_scaling": scaling, "max_position_embeddings": 163840}
    config = model_config(families.find("deepseek_v3"), Settings(hf))
    options = {name: value for name, value in config.attention.to_dict().items() if name != "layer"}
    options["rope"] = Rope(**options["rope"])
    setting = Setting(width=32, depth=1, max_length=8)
    layer = nnx.eval_shape(lambda: MultiHeadLatentAttention(setting, layer_index=0, rngs=nnx.Rngs(0), **options))
    assert layer.scale == pytest.approx(wanted, rel=1e-5)
    assert options["rope"].amplitude == 1


REFUSED = {
    "experts do not divide": ("deepseek_v3", {"n_group": 3}, "n_group = 3 does not make groups"),
    "too few experts": ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok = 3 is more than the 2"),
    "another router": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
    "renormalised V2": ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
    "another activation": ("minimax", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    "a layer of no kind": ("minimax", {"layer_types": ["full_attention"] * 2 + ["mamba"]}, "layer_types has 'mamba'"),
    "a million experts": ("deepseek_v3", {"n_routed_experts": 2**30}, "are more than 1048576 experts"),
    "a shared expert": ("minimax", {"shared_intermediate_size": 8}, "shared_intermediate_size = 8 is not supported"),
    "fewer key heads": ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads = 2 is not supported"),
    "half of a pair": (
        "deepseek_v3",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0}},
        "mscale and mscale_all_dim must be given both",
    ),
    "a factor": (
        "deepseek_v3",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.1}},
        "rope_scaling.attention_factor is not supported",
    ),
    "another quantisation": (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config.quant_method = 'gptq' is not supported",
    ),
    "a quantised MiniMax": ("minimax", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_represented_is_refused(folders, tmp_path, what):
    name, fields, message = REFUSED[what]
    with pytest.raises(PretrainedError) as caught:
        check(rewritten(folders(name), tmp_path / "bad", lambda tensors: None, **fields))
    assert message in str(caught.value)
    assert "config.json: " in str(caught.value)


def decoded_e4m3(code):
    """The number that a byte means: sign, four bits of exponent about 7, three of fraction; no infinities."""
    sign, exponent, fraction = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2 ** (exponent - 7))


@pytest.mark.parametrize(("shape", "tile"), [((130, 259), (128, 128)), ((128, 256), (128, 128)), ((7, 4), (3, 5))])
def test_fp8_is_each_number_times_the_scale_of_its_tile(shape, tile):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes.reshape(-1)[: min(256, codes.size)] = np.arange(256)[: codes.size]
    scale = np.exp(rng.standard_normal([-(-n // step) for n, step in zip(shape, tile, strict=True)])).astype(np.float32)
    rows, columns = tile
    wanted = [
        [decoded_e4m3(int(codes[i, j])) * float(scale[i // rows, j // columns]) for j in range(shape[1])]
        for i in range(shape[0])
    ]
    found = fp8.dequantised(codes.view(fp8.E4M3), scale, tile)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(wanted, np.float64).astype(np.float32))


TILE = (16, 12)
QUANTISED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(TILE), "activation_scheme": "dynamic"}


def quantise(tensors, kept):
    """Matrices of blocks become e4m3 with scales, as the release has them; `kept` gets what they stand for."""
    for name in list(tensors):
        if tensors[name].ndim == 2 and "layers" in name and not name.endswith("mlp.gate.weight"):
            weight = tensors[name]
            across = [np.arange(n) // step for n, step in zip(weight.shape, TILE, strict=True)]
            scale = np.zeros([place[-1] + 1 for place in across], np.float32)
            np.maximum.at(scale, np.ix_(*across), np.abs(weight) / 448)
            spread = scale[np.ix_(*across)]
            tensors[name] = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
            kept[name] = tensors[name].astype(np.float32) * spread


def test_fp8_checkpoints_are_dequantised_as_they_are_read(folders, tmp_path):
    source, kept = folders("kimi_k2"), {}
    fields = {"quantization_config": QUANTISED, "torch_dtype": "bfloat16", "model_type": "kimi_k2"}
    packed = rewritten(source, tmp_path / "fp8", lambda tensors: quantise(tensors, kept), **fields)
    plain = rewritten(source, tmp_path / "plain", lambda tensors: tensors.update(kept))
    assert len(kept) > 30 and any(shape[0] % 16 and shape[1] % 12 for shape in (one.shape for one in kept.values()))
    same(load_pretrained(packed, dtype="float32").model, load_pretrained(plain).model)
    found = load_pretrained(packed)
    assert found.config.param_dtype == "bfloat16"
    same(found.model, load_pretrained(plain, dtype="bfloat16").model)
    save_pretrained(found.model, found.config, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    same(load_pretrained(tmp_path / "out").model, found.model)


NAME = "model.layers.0.self_attn.o_proj.weight"
DAMAGED = {
    "no scale": (lambda tensors: tensors.pop(NAME + "_scale_inv"), "is in fp8 without its scale"),
    "another scale": (
        lambda tensors: tensors.update({NAME + "_scale_inv": np.ones((1, 1), np.float32)}),
        "needs float32 [2, 4]",
    ),
    "a scale of nothing": (
        lambda tensors: tensors.update({"model.norm.weight_scale_inv": np.ones((1, 1), np.float32)}),
        "model.norm.weight_scale_inv is no part of the network",
    ),
    "a vector": (
        lambda tensors: tensors.update({"model.norm.weight": np.ones(32, ml_dtypes.float8_e4m3fn)}),
        "model.norm.weight is in fp8 without its scale",
    ),
    "no number": (
        lambda tensors: tensors[NAME + "_scale_inv"].fill(np.nan),
        "o_proj.weight_scale_inv holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_scales_are_told(folders, tmp_path, what):
    damage, message = DAMAGED[what]

    def change(tensors):
        quantise(tensors, {})
        damage(tensors)

    packed = rewritten(folders("kimi_k2"), tmp_path / "fp8", change, quantization_config=QUANTISED)
    with pytest.raises(PretrainedError) as caught:
        load_pretrained(packed)
    assert message in str(caught.value)
    assert "model.safetensors" in str(caught.value)
