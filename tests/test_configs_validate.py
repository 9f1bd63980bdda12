"""Which configs can be run, and a fuzz of the whole way from typed text to a checked config."""

import glob
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs import attention, base, fields
from configs.command_line import load, parse
from configs.errors import ConfigError
from configs.per_layer import expand
from configs.validate import check

ROOT = Path(__file__).parent.parent
FIELDS = sorted(fields.flat(base.get_config()))


def refusal(**overrides) -> str:
    """The line that `check` gives for the default config with fields changed (`__` for the dots)."""
    config = fields.apply(base.get_config(), {name.replace("__", "."): value for name, value in overrides.items()})
    with pytest.raises(ConfigError) as error:
        check(config)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_default_and_every_combination_of_arguments_pass():
    check(base.get_config())
    for name in attention.names():
        for size in ("tiny", "small", "base"):
            check(load(f"configs/lm.py:attention={name},size={size}"))
        check(load(f"configs/lm.py:attention={name},smoke"))


def test_every_config_file_of_the_repository_passes():
    files = [name for name in glob.glob("configs/*.py", root_dir=ROOT) if _is_run(ROOT / name)]
    assert "configs/lm.py" in files
    for name in files:
        check(load(name))


def _is_run(path: Path) -> bool:
    return "\ndef get_config(" in (text := path.read_text()) and "python train.py" in text


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (dict(model__attention__kv_heads=3), ["config.model.attention.kv_heads", "divide", "heads = 8"]),
        (dict(model__attention__heads=0), ["config.model.attention.heads", "1 or more"]),
        (dict(model__attention__head_dim=33), ["config.model.attention.head_dim", "even"]),
        (dict(model__attention__sink_tokens=4), ["config.model.attention.sink_tokens", "window"]),
        (dict(model__attention="mla", model__attention__qk_rope_head_dim=15), ["qk_rope_head_dim", "even"]),
        (dict(model__attention="lightning", model__attention__decay="alib"), ["decay", "alibi"]),
        (dict(model__attention__layer="mhaa"), ["config.model.attention.layer", "mha"]),
        (dict(model__attention__rope__scaling="yarm"), ["config.model.attention.rope.scaling", "yarn"]),
        (dict(model__attention__rope__factor=0.5), ["config.model.attention.rope.factor", "1 or more"]),
        (dict(model__attention__kv_heads=(2, 3)), ["config.model.attention.kv_heads", "divide"]),
        (dict(model__per_layer=(("0", {"attention.kv_heads": 5}),)), ["kv_heads", "divide"]),
        (dict(model__per_layer=(("7", {"attention.window": 5}),)), ["per_layer[0]", "no block of 4"]),
        (dict(model__per_layer=(("a:b", {"attention.window": 5}),)), ["per_layer[0]", "no block"]),
        (dict(model__per_layer=(("0", {"width": 5}),)), ["per_layer[0]", "'width'"]),
        (dict(model__per_layer=(("0", {"attention.windw": 5}),)), ["per_layer[0]", "attention.window"]),
        (dict(model__per_layer=(("0", {"attention.window": "x"}),)), ["per_layer[0]", "whole number"]),
        (dict(model__width=0), ["config.model.width", "1 or more", "got 0"]),
        (dict(model__width=2**40), ["config.model.width", "or less"]),
        (dict(model__mlp__kind="swiglue"), ["config.model.mlp.kind", "swiglu"]),
        (dict(model__compute_dtype="bf16"), ["config.model.compute_dtype", "bfloat16"]),
        (dict(model__remat="all"), ["config.model.remat", "full"]),
        (dict(data__length=2048), ["config.data.length", "max_length = 1024"]),
        (dict(data__weights=(1.0, 2.0)), ["config.data.weights", "1 sources"]),
        (dict(data__weights=(0.0,)), ["config.data.weights", "above 0"]),
        (dict(data__tokenizer="bpe"), ["config.data.tokenizer", "bpe:4096"]),
        (dict(data__tokenizer="bpe:12"), ["config.data.tokenizer", "260 or more"]),
        (dict(data__tokenizer="bytes"), ["config.data.tokenizer", "byte"]),
        (dict(data__heldout_share=1.0), ["config.data.heldout_share", "below 1"]),
        (dict(data__sources=()), ["config.data.sources", "at least one"]),
        (dict(optimizer__accumulate=3), ["config.optimizer.accumulate", "batch_size = 16"]),
        (dict(optimizer__name="adam"), ["config.optimizer.name", "adamw"]),
        (dict(optimizer__warmup_steps=501), ["config.optimizer.warmup_steps", "train.steps = 500"]),
        (dict(optimizer__schedule="wsd", optimizer__decay_share=1.0), ["config.optimizer.decay_share"]),
        (dict(optimizer__b2=1.0), ["config.optimizer.b2", "below 1"]),
        (dict(sharding__preset="ftp"), ["config.sharding.preset", "tp"]),
        (dict(sharding__rules=(("embed",),)), ["config.sharding.rules"]),
        (dict(log__profile_steps=(5, 3)), ["config.log.profile_steps"]),
        (dict(checkpoint__keep=0), ["config.checkpoint.keep"]),
        (dict(seed=-1), ["config.seed", "0 or more"]),
        (dict(name="a/b"), ["config.name", "run_dir"]),
        (dict(eval__tasks=("",)), ["config.eval.tasks"]),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_name(overrides, parts):
    message = refusal(**overrides)
    for part in parts:
        assert part in message


def test_a_config_of_another_shape_names_what_is_missing():
    config = base.get_config()
    del config.optimizer.b1
    with pytest.raises(ConfigError, match="config.optimizer.b1 is missing"):
        check(config)
    with pytest.raises(ConfigError, match="config.name is missing"):
        check(ml_collections.ConfigDict())


def test_blocks_see_their_exceptions():
    config = fields.apply(
        base.get_config(),
        {
            "model.depth": 5,
            "model.attention.window": (8, 16, 0),
            "model.per_layer": (("1::2", {"attention": "lightning"}), ("-1", {"mlp.width": 32})),
        },
    )
    seen = expand(config.model)
    kinds = [(block.attention.layer, block.attention.get("window"), block.mlp.width) for block in seen]
    assert ("mha", 8, 704) in kinds and ("mha", 0, 704) in kinds and ("mha", 0, 32) in kinds
    assert ("lightning", None, 704) in kinds and ("mha", 16, 704) not in kinds
    assert {block.attention.lrpe for block in seen if block.attention.layer == "lightning"} == {False}


TEXTS = st.one_of(
    st.sampled_from(
        ["", "0", "1", "-1", "3", "2.5", "1e309", "nan", "inf", "true", "None", "()", "(1,)", "[", "mla", "a,b"]
    ),
    st.sampled_from(["((1,),)", "(('0',{}),)", "(('0',{'attention':'mla'}),)", "((':',{'mlp.width':'x'}),)", "({},)"]),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)
OVERRIDES = st.lists(st.tuples(st.sampled_from(FIELDS), TEXTS), min_size=1, max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
).map(lambda value: tuple(value) if isinstance(value, list) else value)


def outcome(action) -> str | None:
    """None if the action passes, the line of its ConfigError if not; any other exception is the test's failure."""
    try:
        action()
    except ConfigError as error:
        assert str(error) and len(str(error).splitlines()) == 1 and str(error).isprintable()
        return str(error)
    return None


@settings(max_examples=300, deadline=None)
@given(OVERRIDES)
@example([("model.attention", "mla"), ("model.attention.heads", "(1, 2)")])
def test_fuzzed_overrides_pass_or_name_a_field(overrides):
    argv = ["--config=configs/lm.py:smoke", *(f"--config.{name}={text}" for name, text in overrides)]
    message = outcome(lambda: parse(argv))
    if message is not None:
        names = [name.rpartition(".")[2] for name, _ in overrides]
        related = {"depth": "per_layer", "schedule": "decay_share", "batch_size": "accumulate", "steps": "warmup_steps"}
        related |= {"heads": "kv_heads", "decay_share": "warmup", "max_length": "length", "sources": "weights"}
        related |= {"beta_slow": "beta_fast", "low_freq_factor": "high_freq_factor", "window": "sink_tokens"}
        related |= {"theta": "head_dim", "heldout_sources": "heldout_share"}
        assert message.startswith(("config", "unknown", "--config"))
        assert any(name in message or related.get(name, name) in message for name in names), message


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FIELDS), VALUES)
def test_fuzzed_values_pass_or_name_a_field(name, value):
    def action():
        check(fields.apply(base.get_config(), {name: value}))

    message = outcome(action)
    assert message is None or "config." in message


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FIELDS), st.data())
def test_fuzzed_names_get_a_near_one(name, data):
    """One letter dropped, doubled or swapped: the field that was meant is offered."""
    leaf = name.rpartition(".")[2]
    place = data.draw(st.integers(0, len(leaf) - 2))
    kind = data.draw(st.sampled_from(["drop", "double", "swap"]))
    typed = {
        "drop": leaf[:place] + leaf[place + 1 :],
        "double": leaf[:place] + leaf[place] + leaf[place:],
        "swap": leaf[:place] + leaf[place + 1] + leaf[place] + leaf[place + 2 :],
    }[kind]
    path = name.removesuffix(leaf) + typed
    if path in fields.flat(base.get_config()):
        return
    message = outcome(lambda: fields.apply(base.get_config(), {path: 1}))
    assert message is not None and f"unknown field config.{path}" in message
    if len(leaf) >= 4:
        assert f"config.{name}" in message


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=4))
def test_fuzzed_command_lines_are_refused_in_one_line(argv):
    try:
        outcome(lambda: parse(argv))
    except SystemExit as stop:  # Only --help leaves.
        assert stop.code == 0


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_fuzzed_config_arguments_are_refused_in_one_line(text):
    outcome(lambda: parse([f"--config=configs/lm.py:{text}"]))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(attention.names()),
    st.integers(1, 8).map(lambda n: 2 * n),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from(["none", "linear", "ntk", "yarn", "llama3"]),
)
def test_fuzzed_sound_configs_pass(name, half, heads, depth, scaling):
    config = load(f"configs/lm.py:attention={name},smoke")
    overrides = {"model.depth": depth, "model.width": half * heads, "model.attention.heads": 2 * heads}
    if "kv_heads" in config.model.attention:
        overrides |= {"model.attention.kv_heads": heads, "model.attention.head_dim": half}
    if "shared_heads" in config.model.attention:
        overrides |= {"model.attention.shared_heads": 1, "model.attention.routed_active": 1}
    if "rope" in config.model.attention:
        overrides["model.attention.rope.scaling"] = scaling
    check(fields.apply(config, overrides))


@pytest.mark.parametrize("argument", ["--config.model.attention.kv_heads=3", "--config.model.widht=3", "--nonsense"])
def test_train_leaves_with_status_2_and_one_line(argument):
    done = subprocess.run(
        [sys.executable, "train.py", "--config=configs/lm.py:smoke", argument], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and argument.partition("=")[0].rpartition(".")[2] in done.stderr
