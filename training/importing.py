"""Hugging Face folders as run folders, and back: to evaluate, convert, serve and train like any other run.

python eval.py import downloads/Llama-3.2-1B --output=runs/llama
python eval.py export runs/llama --output=exported/llama
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

import data
import sharding
from configs import base, fields, validate
from evaluation.harness import chat
from models.conversion.normed import with_latent_norms
from models.pretrained import Pretrained, PretrainedError, load_pretrained, save_pretrained
from training import manifest, run_folder, setup
from training.checkpoints import Checkpoints
from training.loading import load_run
from training.state import State

GENERATION = "generation_config.json"


def import_folder(source: str, output: str, *, dtype: str = "", tokenizer: str = "") -> Pretrained:
    """The network of a Hugging Face folder as a run folder at step 0: config, tokenizer, one checkpoint.

    `dtype` is as in `load_pretrained`, `tokenizer` a tokenizer in place of the folder's own (`byte`, or a path). The
    checkpoint has no optimiser's state: train from it by `config.train.init_from`. Raises PretrainedError, DataError
    for the tokenizer, ConfigError if its vocabulary is larger than the network's, and RunFolderError if `output` holds
    a run.
    """
    target = pathlib.Path(output)
    if (target / "config.json").exists():
        raise run_folder.RunFolderError(f"{target} has a config.json already: give another --output")
    if not tokenizer and pathlib.Path(source).is_dir() and not (pathlib.Path(source) / "tokenizer.json").exists():
        raise PretrainedError(f"{source} has no tokenizer.json, which a run needs: name one with --tokenizer")
    chosen = data.load_tokenizer(tokenizer or source)
    loaded = load_pretrained(source, dtype or None)
    config = _config(loaded, target)
    structure = setup.network(config, chosen)
    params, rest = structure.split(loaded.model)
    state = State(jnp.int32(0), jnp.asarray(False), params, rest, None, {}, jax.random.key(config.seed))
    with run_folder.RunFolder(config) as folder:
        folder.write_tokenizer(chosen)
        template = None if tokenizer else chat.text(source)
        if template is not None:
            manifest.write_atomically(target / "tokenizer" / "chat_template.jinja", template)
        if loaded.generation:
            manifest.write_atomically(target / GENERATION, json.dumps(loaded.generation, indent=2))
        with Checkpoints(folder.checkpoints, config.checkpoint) as checkpoints:
            checkpoints.save(state, None, {"config": fields.plain(config), "elapsed": 0.0})
        folder.write_config()  # Last, so that an import cut short leaves no run.
    return loaded


def export_run(run: str, output: str, *, step: int | None = None, family: str = "", max_shard_size: int) -> list[str]:
    """The network of a run, at `step` or its newest, as a Hugging Face folder; see `save_pretrained`.

    Returns notes for the user. Latents without a norm get one that changes nothing, without which no other program
    would read them (`models.conversion.with_latent_norms`).
    """
    if pathlib.Path(output).exists():
        raise PretrainedError(f"{output} exists already: give another --output, nothing is overwritten")
    loaded = load_run(run, step, layout=sharding.build(base.sharding()))
    said, tokenizer = pathlib.Path(run) / GENERATION, pathlib.Path(run) / "tokenizer"
    config = fields.plain(loaded.config.model)
    model, normed = with_latent_norms(nnx.merge(*nnx.split(loaded.model)), config)
    save_pretrained(
        model, normed, output, tokenizer=tokenizer if tokenizer.exists() else loaded.tokenizer,
        generation=json.loads(said.read_bytes()) if said.exists() else None,
        max_shard_size=max_shard_size, family=family,
    )  # fmt: skip
    return [] if normed == config else ["latents without a norm were given one that leaves what the network computes"]


def _config(loaded: Pretrained, target: pathlib.Path) -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model = loaded.config
    config.name, config.run_dir = target.name, str(target)
    config.data.tokenizer = str(target / "tokenizer")
    config.data.length = min(config.data.length, loaded.config.max_length)
    validate.check(config)
    config.train.steps = 0  # Trained elsewhere.
    return fields.from_plain(fields.plain(config))


def main(argv: Sequence[str], parser: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> int:
    """The command lines `eval.py import` and `eval.py export`, whose name comes first; returns the exit status."""
    command, *rest = argv
    flags = parser(prog=f"eval.py {command}", description=__doc__, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    inwards = command == "import"
    flags.add_argument("source", metavar="FOLDER" if inwards else "RUN")
    flags.add_argument("--output", "-o", required=True, metavar="DIR", help="the new folder")
    if inwards:
        flags.add_argument("--dtype", default="", choices=("float32", "bfloat16"), help="else that of the files")
        flags.add_argument("--tokenizer", default="", help="byte, or a path, in place of the folder's own")
        given = vars(flags.parse_args(rest))
        output = given["output"]
        notes = list(import_folder(given.pop("source"), given.pop("output"), **given).notes)
    else:
        flags.add_argument("--step", type=int, default=None, help="else the newest")
        flags.add_argument("--family", default="", help="the model_type to write; else the first that fits")
        flags.add_argument("--max_shard_size", type=int, default=5 * 10**9, help="bytes in one file")
        given = vars(flags.parse_args(rest))
        output = given["output"]
        notes = export_run(given.pop("source"), given.pop("output"), **given)
    for note in notes:
        print(f"note: {note}")
    print(f"{command}ed: {output}")
    return 0
