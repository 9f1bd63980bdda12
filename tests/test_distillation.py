"""Learning from another network: logits and layers matched, the teacher left alone; through the loop after a
conversion, as alignment does it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
import train
from configs import attention, base
from configs.errors import ConfigError
from configs.papers import tpla
from training import converting, objectives, run_folder
from training.loading import load_run
from training.objectives import distillation, layerwise
from training.objectives._teacher import Teacher

ROOT = pathlib.Path(__file__).parents[1]
ROWS, LENGTH, VOCABULARY = 3, 10, 30


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def network(seed: int, variant: str = "mla", vocabulary: int = VOCABULARY, depth: int = 2, width: int = 16):
    config = base.get_config().model
    config.width, config.depth, config.max_length, config.mlp.width, config.init_std = width, depth, 32, 24, 0.3
    config.attention = attention.get(variant)
    small = dict(heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
    config.attention.update(small)
    return models.build(config, vocab_size=vocabulary, rngs=nnx.Rngs(seed))


def batch() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    weight = np.ones((ROWS, LENGTH), np.float32)
    weight[-1, 6:] = 0
    return {
        "inputs": ids[:, :-1], "targets": ids[:, 1:], "segment": (weight > 0).astype(np.int32), "weight": weight,
        "position": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
    }  # fmt: skip


def options(**changes):
    config = base.objective()
    config.update(changes)
    return config


def loss_of(kind, teacher, **changes):
    objective = kind(options(**changes), Teacher(*nnx.split(teacher)))

    def value(model):
        definition, state = nnx.split(model)
        run = jax.jit(lambda state, x, frozen: objective(nnx.merge(definition, state), x, jax.random.key(0), frozen))
        return run(state, batch(), objective.frozen)

    return objective, value


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize(("temperature", "larger", "reduction"), [(1.0, {}, "token"), (2.0, {"width": 24}, "row")])
def test_divergence_from_the_teacher(temperature, larger, reduction):
    """Also from a teacher of another size; the divergence the other way round would be another number."""
    teacher, student, data = network(0, **larger), network(1), batch()
    options = dict(temperature=temperature, cross_entropy=0.5, reduction=reduction)
    _, loss = loss_of(distillation.Distillation, teacher, **options)
    found, metrics = loss(student)
    theirs, ours = (
        np.asarray(model(data["inputs"]).logits, np.float64)[..., :VOCABULARY] for model in (teacher, student)
    )
    p, q = log_softmax(theirs / temperature), log_softmax(ours / temperature)
    divergence = np.sum(data["weight"] * np.sum(np.exp(p) * (p - q), -1)) / data["weight"].sum()
    chosen = np.take_along_axis(log_softmax(ours), data["targets"][..., None], -1)[..., 0]
    nll = -np.sum(data["weight"] * chosen) / data["weight"].sum()
    np.testing.assert_allclose(metrics["divergence"], divergence, rtol=1e-5)
    reverse = np.sum(data["weight"] * np.sum(np.exp(q) * (q - p), -1)) / data["weight"].sum()
    assert abs(reverse - divergence) > 1e-3 * divergence
    times = LENGTH if reduction == "row" else 1
    np.testing.assert_allclose(found, temperature**2 * times * divergence + 0.5 * nll, rtol=1e-5)


@pytest.mark.parametrize("given", ["teacher", "own"])
def test_layers_against_the_teachers(given):
    teacher, student, data = network(0), network(1, "tpla"), batch()
    _, loss = loss_of(layerwise.Layerwise, teacher, layer_inputs=given)
    found, metrics = loss(student)
    context = objectives.next_token.tokens.packed(
        jnp.asarray(data["segment"]), jnp.asarray(data["position"], jnp.float32)
    )
    theirs, ours = (model.embedding(data["inputs"]) for model in (teacher, student))
    squares = []
    for own, taught in zip(student.layers(), teacher.layers(), strict=True):
        ours = own(theirs if given == "teacher" else ours, context, None, None, 0)[0]
        theirs = taught(theirs, context, None, None, 0)[0]
        squares.append(np.mean((np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) ** 2, axis=-1))
    expected = [np.sum(data["weight"] * square) / data["weight"].sum() for square in squares]
    np.testing.assert_allclose([metrics["layer 0"], metrics["layer 1"]], expected, rtol=1e-4)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-4)


@pytest.mark.parametrize("kind", [distillation.Distillation, layerwise.Layerwise])
def test_who_learns_and_who_does_not(kind):
    """The loss of the teacher itself is 0 and flat; another network's falls along its gradient; none reaches the
    teacher's arrays."""
    teacher, student = network(0), network(1)
    objective, loss = loss_of(kind, teacher)
    assert abs(float(loss(teacher)[0])) < 1e-6
    definition, parameters, rest = nnx.split(student, nnx.Param, ...)

    def value(parameters, frozen):
        return objective(nnx.merge(definition, parameters, rest), batch(), jax.random.key(0), frozen)[0]

    gradient, taught = jax.jit(jax.grad(value, argnums=(0, 1), allow_int=True))(parameters, objective.frozen)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(taught) if leaf.dtype == jnp.float32)
    moved = jax.tree.map(lambda x, g: x - 1e-3 * g, parameters, gradient)
    assert float(value(moved, objective.frozen)) < float(value(parameters, objective.frozen))


def test_what_does_not_fit():
    with pytest.raises(ConfigError, match="a vocabulary of 31 tokens, the model one of 30"):
        loss_of(distillation.Distillation, network(0, vocabulary=31))[1](network(1))
    with pytest.raises(ConfigError, match="3 layers of width 16, the model 2 of 16"):
        loss_of(layerwise.Layerwise, network(0, depth=3))[1](network(1))
    with pytest.raises(ConfigError, match="set config.objective.teacher to a run folder"):
        objectives.get("distillation")(options(), None)


def test_conversion_and_alignment_through_the_loop(tmp_path: pathlib.Path, capsys):
    """A run of MLA, converted on the command line's path, evaluated by its folder, aligned by either objective."""

    def smoke(arguments: str, name: str, **fields):
        config = tpla.get_config(arguments)
        config.run_dir, config.data.sources = str(tmp_path / name), (str(ROOT / "configs"),)
        config.model.width, config.model.mlp.width, config.model.max_length = 24, 32, 32
        config.data.length, config.data.batch_size, config.train.steps = 32, 8, 12
        config.eval.tasks, config.eval.sample_prompts, config.log.tensorboard = (), (), False
        config.log.every = 1
        for field, value in fields.items():
            group, _, last = field.rpartition("__")
            config[group][last] = value
        return config

    teacher = train.run(smoke("smoke", "mla"))
    command = [str(teacher.run_dir), f"--output={tmp_path / 'tpla'}", "--mode=tpla", "--transform=hadamard"]
    assert converting.main([*command, "--rows=8", "--report_rows=4"]) == 0
    assert "tpla_softmax_only" in capsys.readouterr().out
    assert "What a conversion cost" in (tmp_path / "tpla" / "conversion.svg").read_text()
    report = json.loads((tmp_path / "tpla" / "conversion.json").read_text())
    assert report["stages"][-1]["name"] == "tpla" and report["options"]["transform"] == "hadamard"
    converted = load_run(tmp_path / "tpla")
    assert converted.config.model.attention.layer == "tpla"
    own = np.asarray(converted.model.stacks[0].blocks[0].attention.logit_factor[...])
    np.testing.assert_allclose(own, np.asarray(report["logit_factors"]), rtol=1e-6)
    with pytest.raises(ConfigError.__base__, match="holds a run already"):
        converting.main(command)

    def losses(align: str, **fields):
        done = train.run(
            smoke(f"attention=tpla,align={align},smoke", align, objective__teacher=str(teacher.run_dir), **fields)
        )
        return [row["loss"] for row in run_folder.lines(done.run_dir / "metrics.jsonl") if "loss" in row]

    # The converted network is next to its teacher from the start; another one has to learn.
    assert max(losses("layerwise", train__init_from=str(tmp_path / "tpla"))) < 1e-3
    strange = losses("logits", train__steps=24)
    assert strange[-1] < 0.8 * strange[0]
