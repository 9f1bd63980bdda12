"""From a command line to a config: what is accepted, and that every mistake is one clear line."""

import json
import pathlib

import ml_collections
import pytest

from configs import attention, fields
from configs.command_line import Option, arguments, load_file, parse
from configs.errors import ConfigError, UserError

LM = "--config=configs/lm.py"


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and len(text.splitlines()) == 1
    return text


def refused(*argv: str, **options: Option) -> str:
    with pytest.raises(ConfigError) as error:
        parse(argv, options)
    return one_line(error)


def test_arguments_and_overrides_reach_the_config():
    argv = [
        "--config=configs/lm.py:attention=mla,size=tiny",
        "--config.model.width=192",
        "--config.model.mlp.width",
        "96",
    ]
    config, _ = parse(argv)
    assert (config.model.width, config.model.mlp.width, config.model.attention.layer) == (192, 96, "mla")
    assert config.is_locked and config.name == "lm-mla-tiny"
    with pytest.raises((AttributeError, KeyError)):
        config.model.widht = 3


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ("--config.data.packing=false", "data.packing", False),
        ("--noconfig.data.packing", "data.packing", False),
        ("--config.log.wandb", "log.wandb", True),
        ("--config.optimizer.weight_decay=0", "optimizer.weight_decay", 0.0),
        ("--config.optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("--config.train.steps=1_000", "train.steps", 1000),
        ("--config.run_dir=", "run_dir", ""),
        ("--config.run_dir=a=b", "run_dir", "a=b"),
        ("--config.data.sources=a,b", "data.sources", ("a", "b")),
        ("--config.data.sources=('a', 'b')", "data.sources", ("a", "b")),
        ("--config.data.sources=12", "data.sources", ("12",)),
        ("--config.data.heldout_sources=x/*.txt", "data.heldout_sources", ("x/*.txt",)),
        ("--config.eval.sample_prompts=def f(a, b)", "eval.sample_prompts", ("def f(a, b)",)),
        ("--config.eval.sample_prompts='def ','class '", "eval.sample_prompts", ("def ", "class ")),
        ("--config.eval.sample_prompts=()", "eval.sample_prompts", ()),
        ("--config.log.profile_steps=3,5", "log.profile_steps", (3, 5)),
        ("--config.model.attention.window=(64, 0)", "model.attention.window", (64, 0)),
        ("--config.sharding.rules=(('embed', None),)", "sharding.rules", (("embed", None),)),
    ],
)
def test_override_takes_the_type_of_its_field(text, field, expected):
    config, _ = parse([LM, text])
    value = fields.flat(config)[field]
    assert value == expected and type(value) is type(expected)


def test_repeated_flag_fills_a_tuple_and_otherwise_the_last_one_counts():
    config, _ = parse([LM, "--config.data.sources=a", "--config.seed=1", "--config.data.sources=b", "--config.seed=2"])
    assert config.data.sources == ("a", "b") and config.seed == 2


def test_a_preset_may_be_named_before_or_after_its_fields():
    for argv in (["=lightning", ".heads=4"], [".heads=4", "=lightning"]):
        config, _ = parse([LM, *(f"--config.model.attention{end}" for end in argv)])
        assert (config.model.attention.layer, config.model.attention.heads) == ("lightning", 4)


def test_per_layer_takes_the_name_of_a_preset():
    config, _ = parse([LM, "--config.model.per_layer=(('1::2', {'attention': 'lightning', 'mlp.width': 64}),)"])
    ((blocks, changed),) = config.model.per_layer
    assert blocks == "1::2" and changed["mlp.width"] == 64
    assert changed["attention"] == attention.get("lightning").to_dict()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([LM, "--config.model.widht=3"], ["config.model.widht", "config.model.width"]),
        ([LM, "--config.width=3"], ["config.width", "config.model.width"]),
        ([LM, "--config.modle.width=3"], ["config.modle.width", "config.model"]),
        ([LM, "--config.model.width.x=3"], ["config.model.width has no fields"]),
        ([LM, "--config.model.=3"], ["config.model."]),
        ([LM, "--config.=3"], ["config."]),
        ([LM, "--config.model.width=wide"], ["config.model.width", "whole number", "'wide'"]),
        ([LM, "--config.model.width=2.5"], ["config.model.width", "whole number", "'2.5'"]),
        ([LM, "--config.model.width=(1, 2)"], ["config.model.width", "whole number"]),
        ([LM, "--config.data.packing=maybe"], ["config.data.packing", "true or false", "'maybe'"]),
        ([LM, "--config.optimizer.learning_rate=fast"], ["config.optimizer.learning_rate", "a number", "'fast'"]),
        ([LM, "--config.optimizer.learning_rate=nan"], ["config.optimizer.learning_rate", "finite"]),
        ([LM, "--config.data.sources=(1, 2)"], ["config.data.sources", "texts", "1"]),
        ([LM, "--config.data.sources=('a'"], ["config.data.sources", "tuple"]),
        ([LM, "--config.model.mlp=swiglu"], ["config.model.mlp", "model.mlp.kind"]),
        ([LM, "--config.model.attention=mlaa"], ["config.model.attention", "mla"]),
        ([LM, "--config.seed"], ["--config.seed needs a value"]),
        ([LM, "--config.model.width", "--config.seed=1"], ["--config.model.width needs a value"]),
        (["--config=configs/ml.py"], ["configs/ml.py", "configs/lm.py"]),
        (["--config=pyproject.toml"], ["pyproject.toml", ".py"]),
        (["--config=configs"], ["'configs'"]),
        (["--config=\0"], ["config file"]),
        (["--config=" + "x" * 5000], ["config file"]),
        (["--config"], ["--config needs a value"]),
        (["--config=configs/lm.py:atention=mla"], ["atention", "attention"]),
        (["--config=configs/lm.py:attention=mlla"], ["mlla", "mla"]),
        (["--config=configs/lm.py:size=smal"], ["smal", "small"]),
        (["--config=configs/lm.py:size"], ["size", "needs a value"]),
        (["--config=configs/lm.py:smoke=perhaps"], ["smoke", "perhaps"]),
        (["--confg=configs/lm.py"], ["--confg", "--config"]),
        ([LM, "--prnt"], ["--prnt", "--print"]),
        ([LM, "--limit=many"], ["--limit", "whole number", "many"]),
        (["configs/lm.py"], ["--config=configs/lm.py"]),
        ([LM, "now"], ["'now'"]),
        (["--config.seed=1"], ["--config.seed", "without a config"]),
    ],
)
def test_every_mistake_is_one_line_that_names_it(argv, parts):
    message = refused(*argv, print=Option(False), limit=Option(8))
    for part in parts:
        assert part in message


def test_message_stays_one_line_whatever_was_typed():
    assert "\n" not in refused(LM, "--config.model.a\nb=1")
    assert "\n" not in refused("--config=a\nb.py")


def test_options_beside_the_config():
    options = dict(print=Option(False), sweep=Option(""), process_id=Option(-1), share=Option(0.5))
    config, given = parse([], options)
    assert config is None and vars(given) == {"print": False, "sweep": "", "process_id": -1, "share": 0.5}
    config, given = parse(["--print", "--process_id", "-3", LM, "--share=1", "--sweep", "x.py"], options)
    assert config.name == "lm-gqa-small"
    assert vars(given) == {"print": True, "sweep": "x.py", "process_id": -3, "share": 1.0}
    assert parse(["--print", "--noprint"], options)[1].print is False


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], {"sweep": Option("", "a file of configs/sweeps/")})
    assert stop.value.code == 0
    assert "--sweep" in (text := capsys.readouterr().out) and "configs/sweeps/" in text


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("def get_config(:\n", ":1:"),
        ("import no_such_module\n", "no_such_module"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return {}\n", "dict"),
        ("def get_config():\n    pass\n", "NoneType"),
        ("def get_config():\n    return 1 / 0\n", ":2: ZeroDivisionError"),
        (
            "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()\n",
            "config.name is missing",
        ),
    ],
)
def test_a_broken_config_file_is_one_line_with_its_place(tmp_path, source, part):
    path = tmp_path / "broken.py"
    path.write_text(source)
    assert part in refused(f"--config={path}")


def test_apply_changes_a_copy_and_checks_like_the_command_line():
    config, _ = parse([LM])
    changed = fields.apply(config, {"model.width": 512, "optimizer.learning_rate": 1, "model.attention": "mla"})
    assert (changed.model.width, changed.optimizer.learning_rate) == (512, 1.0)
    assert changed.model.attention.layer == "mla" and config.model.width == 256 and changed.is_locked
    for overrides, part in [
        ({"model.widht": 1}, "config.model.width"),
        ({"model.width": "wide"}, "whole number"),
        ({"model.width": True}, "whole number"),
        ({"model.width": 2.0}, "2.0 (float)"),
        ({"model.width": None}, "None (NoneType)"),
        ({"optimizer.learning_rate": 10**400}, "finite"),
        ({"model.attention": 3}, "preset"),
    ]:
        with pytest.raises(ConfigError) as error:
            fields.apply(config, overrides)
        assert part in one_line(error)


def test_plain_survives_json_exactly():
    config, _ = parse([LM, "--config.model.per_layer=(('0', {'attention': 'mla'}), ('1', {'mlp.width': 32}))"])
    config = fields.apply(config, {"sharding.rules": (("embed", None), ("mlp", "model")), "log.profile_steps": (1, 2)})
    back = fields.from_plain(json.loads(json.dumps(fields.plain(config))))
    assert fields.flat(back) == fields.flat(config)
    assert {name: type(value) for name, value in fields.flat(back).items()} == {
        name: type(value) for name, value in fields.flat(config).items()
    }
    assert isinstance(back.model, ml_collections.ConfigDict) and back.is_locked


def test_arguments_are_typed():
    given = arguments("a=2,b,c=x:[1,2]", a=1, b=False, c="", d=0.5)
    assert vars(given) == {"a": 2, "b": True, "c": "x:[1,2]", "d": 0.5}


def test_load_file_reads_an_attribute(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text("SWEEP = [1]\n")
    assert load_file(str(path), "SWEEP") == [1]
    with pytest.raises(UserError, match="does not define BASE"):
        load_file(str(path), "BASE")


def test_every_preset_has_a_file_that_states_its_source():
    for name in attention.names():
        options = attention.get(name)
        assert options.layer in attention.names()
        assert (pathlib.Path("configs/attention") / f"{name}.py").read_text().startswith('"""')
