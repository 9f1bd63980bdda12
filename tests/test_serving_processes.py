"""Two real processes on this machine: one reads prompts as MLA, the other decodes as TPLA, each on two devices."""

import json
import os
import pathlib
import subprocess
import sys

import flags
import jax
import pytest

import models
from tests.serving_models import NEW, PROMPTS, network
from tests.serving_standin import DEPTH
from tests.test_multi_process import free_port

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 180
LENGTH, WIDTH = 16, 5 + 4  # A padded prompt; a slice: half a latent of 10, and the rotated key.


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each process wrote."""
    folder, port, started = tmp_path_factory.mktemp("serving"), free_port(), []
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags.xla(2),
    }  # fmt: skip
    try:
        for role in range(2):
            output = str(folder / f"{role}.json")
            command = [sys.executable, "-m", "tests.serving_standin", str(role), str(port), output]
            # To files: a process that waits for a full pipe would hold up the other.
            with open(folder / f"{role}.log", "wb") as log:
                started.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n\n".join((folder / f"{role}.log").read_text()[-3000:] for role in range(2))
    return [json.loads((folder / f"{role}.json").read_text()) for role in range(2)]


def test_tokens_are_those_of_one_process(found):
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        alone = models.generate(network("tpla_pd", DEPTH), PROMPTS, max_new_tokens=NEW)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert found[1]["tokens"] == alone and found[1]["free"]
    assert found[0] == {"served": len(PROMPTS)}


def test_a_decoding_device_is_given_its_slice_and_no_more(found):
    assert len(found[1]["parts"]) == DEPTH
    for parts in found[1]["parts"]:
        assert parts == [[device, [1, LENGTH, 1, WIDTH]] for device in found[1]["own"]]


def test_a_hand_over_is_one_permute_of_slices(found):
    """Between the processes, of all layers together, each device to the one in its place; nothing is gathered."""
    (name, (permute,)) = next(iter(found[1]["sent"].items()))
    assert len(found[1]["sent"]) == 1 and name == "collective-permute"
    assert permute["shape"] == [DEPTH, 1, LENGTH, 1, WIDTH] and permute["times"] == 1
    assert permute["bytes"] == 4 * DEPTH * LENGTH * WIDTH
    assert permute["groups"] == [[0, 2], [1, 3]] and permute["axes"] == ["role"]
