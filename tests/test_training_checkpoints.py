"""Checkpoints: exact, found damaged by name, whole or absent whatever happens during the save."""

import errno
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import training_standin as standin

import sharding
from configs import base
from training import checkpoints, manifest, optimizers, state
from training.checkpoints import CheckpointError, Checkpoints

ROOT = pathlib.Path(__file__).parents[1]


def options(**changed):
    config = base.get_config().checkpoint
    config.update({"keep": 3, **changed})
    return config


def made(seed=0, name="adamw", **network):
    """(state, the same as shapes with shardings)."""
    structure = standin.structure(**network)
    config = base.get_config().optimizer
    config.name = name
    optimizer = optimizers.build(config, optimizers.schedule(config, 100), structure.axes)
    now = state.create(structure, optimizer, jax.random.key(seed), average=True)
    layout = sharding.build(base.get_config().sharding)
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        now,
        layout.like(now, structure.abstract_params),
    )
    return now, abstract


def at(now, step):
    """The state as if `step` steps had been done, its arrays unlike those of any other step."""
    moved = jax.tree.map(lambda x: x + step if jnp.issubdtype(x.dtype, jnp.floating) else x, now)
    moved.step = jnp.asarray(step, jnp.int32)
    return moved


def raw(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(raw(x), raw(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def filled(folder, steps=(10, 20), **changed):
    """A folder with checkpoints of these steps; the state they come from, and its shapes."""
    now, abstract = made()
    with Checkpoints(folder, options(**changed)) as store:
        for step in steps:
            store.save(at(now, step), {"next_row": 4 * step}, {"elapsed": 1.5 * step})
    return now, abstract


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Checkpoints 10 and 20, to be copied."""
    folder = tmp_path_factory.mktemp("sound") / "checkpoints"
    return folder, *filled(folder)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_what_is_restored_is_what_was_saved(tmp_path, name):
    now, abstract = made(name=name)
    with Checkpoints(tmp_path / "checkpoints", options()) as store:
        assert store.restore(abstract) is None
        store.save(at(now, 7), {"next_row": 28, "order": {"seed": 3}}, {"elapsed": 2.5, "corpus": "abc"})
    with Checkpoints(tmp_path / "checkpoints", options()) as store:
        found = store.restore(abstract)
    assert same(found.state, at(now, 7))
    assert found.step == 7 and found.position == {"next_row": 28, "order": {"seed": 3}}
    assert found.meta == {"elapsed": 2.5, "corpus": "abc", "step": 7}
    drawn = [jax.random.normal(x, (3,)) for x in (found.state.rng, now.rng)]
    assert np.array_equal(*drawn)


def test_the_save_is_of_the_moment_it_was_asked_for(tmp_path):
    """The next step is given the buffers of the state that is still being written."""
    big = {f"x{i}": jnp.full((256, 1024), float(i)) for i in range(16)}
    now, abstract = made()
    now.params, abstract.params = big, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), big)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.floating) else x, s),
                   donate_argnums=0)  # fmt: skip
    with Checkpoints(tmp_path / "checkpoints", options()) as store:
        store.save(now, {}, {})
        for _ in range(20):
            now = step(now)
        jax.block_until_ready(now.params)
    with Checkpoints(tmp_path / "checkpoints", options()) as store:
        found = store.restore(abstract)
    for i in range(16):
        assert np.all(np.asarray(found.state.params[f"x{i}"]) == i)


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    folder = tmp_path / "checkpoints"
    now, _ = filled(folder, (1, 2, 3, 4), keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]
    before = (folder / "4" / manifest.NAME).read_bytes()
    with Checkpoints(folder, options(keep=2)) as store:
        store.save(at(now, 4), {"next_row": -1}, {})
    assert (folder / "4" / manifest.NAME).read_bytes() == before and checkpoints.steps(folder) == [3, 4]


def items(folder):
    """One file of each item, the largest, and the files that belong to the checkpoint as a whole."""
    chosen = [max((p for p in (folder / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
              for item in ("model", "optimizer", "data", "meta")]  # fmt: skip
    return [*chosen, folder / "_CHECKPOINT_METADATA", folder / manifest.NAME]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip, pathlib.Path.unlink])
@pytest.mark.parametrize("item", range(6), ids=["model", "optimizer", "data", "meta", "metadata", "manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, sound, damage, item):
    folder, now, abstract = sound
    shutil.copytree(folder, tmp_path / "checkpoints")
    victim = items(tmp_path / "checkpoints" / "20")[item]
    damage(victim)
    told = []
    with Checkpoints(tmp_path / "checkpoints", options(), told.append) as store:
        found = store.restore(abstract)
        assert found.step == 10 and same(found.state, at(now, 10)) and found.position == {"next_row": 40}
        if victim.name == manifest.NAME and damage is pathlib.Path.unlink:
            assert told == ["checkpoint 20 was never finished: removed"]  # The mark of an interrupted save.
        else:
            assert len(told) == 2 and "checkpoint 20 is damaged" in told[0] and victim.name in told[0]
            assert told[1] == "resuming from checkpoint 10 instead"
            assert (tmp_path / "damaged" / "20").is_dir()
        store.save(at(now, 20), {}, {})  # The run comes by there again.
    assert checkpoints.steps(tmp_path / "checkpoints") == [10, 20]


def test_every_file_of_a_checkpoint_is_in_its_manifest(sound):
    folder, _, _ = sound
    files = {p.relative_to(folder / "20").as_posix() for p in (folder / "20").rglob("*") if p.is_file()}
    listed = json.loads((folder / "20" / manifest.NAME).read_text())["files"]
    assert files == {*listed, manifest.NAME}


def test_an_added_lie_in_the_manifest_is_seen(tmp_path, sound):
    """A manifest rewritten to agree with a damaged file no longer agrees with itself."""
    folder = tmp_path / "20"
    shutil.copytree(sound[0] / "20", folder)
    victim = items(folder)[0]
    flip(victim)
    content = json.loads((folder / manifest.NAME).read_text())
    name = victim.relative_to(folder).as_posix()
    content["files"][name] = manifest._entry(victim)
    (folder / manifest.NAME).write_text(json.dumps(content))
    assert manifest.problem(folder) == f"{manifest.NAME} itself is damaged"


def test_when_none_is_sound_nothing_starts_over_in_silence(tmp_path, sound):
    folder, _, abstract = sound
    shutil.copytree(folder, tmp_path / "checkpoints")
    for step in ("10", "20"):
        flip(items(tmp_path / "checkpoints" / step)[0])
    with Checkpoints(tmp_path / "checkpoints", options(), lambda line: None) as store:
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints .* is sound .*checkpoint 20"):
            store.restore(abstract)


def test_what_an_interrupted_save_or_deletion_leaves_is_no_checkpoint(tmp_path, sound):
    folder, now, abstract = sound
    shutil.copytree(folder, tmp_path / "checkpoints")
    shutil.copytree(folder / "20", tmp_path / "checkpoints" / "30")
    (tmp_path / "checkpoints" / "30" / manifest.NAME).unlink()
    (tmp_path / "checkpoints" / "40.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    told = []
    with Checkpoints(tmp_path / "checkpoints", options(), told.append) as store:
        assert store.restore(abstract).step == 20
    assert told == [f"checkpoint {step} was never finished: removed" for step in (30, 40)]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20", "notes.txt"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path, sound):
    folder, _, _ = sound
    shutil.copytree(folder, tmp_path / "checkpoints")
    _, wider = made(width=8)
    with Checkpoints(tmp_path / "checkpoints", options()) as store:
        with pytest.raises(
            CheckpointError, match=r"not a checkpoint of this model: .* is \[.*6.*\] there and \[.*8.*\]"
        ):
            store.restore(wider)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_told_and_leaves_earlier_checkpoints_and_nothing_else(tmp_path, monkeypatch, asynchronous):
    folder = tmp_path / "checkpoints"
    now, abstract = filled(folder, (10,))
    store = Checkpoints(folder, options(asynchronous=asynchronous))

    def full(self):
        (folder / "20").mkdir(exist_ok=True)  # Whatever part had room.
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="checkpoint 20 .* No space left on device; checkpoint 10 .* intact"):
        with monkeypatch.context() as patch:
            patch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", full)
            store.save(at(now, 20), {}, {})
            store.wait()
    assert checkpoints.steps(folder) == [10] and not (folder / "20").exists()
    store.save(at(now, 30), {}, {})  # There is room again.
    store.wait()
    assert store.restore(abstract).step == 30


def test_an_error_that_is_not_the_disks_is_not_dressed_up(tmp_path, monkeypatch):
    now, _ = made()
    with pytest.raises(TypeError, match="a defect"):
        with Checkpoints(tmp_path / "checkpoints", options()) as store:
            with monkeypatch.context() as patch:
                patch.setattr(manifest, "write", lambda folder: (_ for _ in ()).throw(TypeError("a defect")))
                store.save(now, {}, {})
                store.wait()


FULL = """
import pathlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_training_checkpoints as tests
folder = pathlib.Path({folder!r}) / "checkpoints"
now, abstract = tests.filled(folder, (1,))
try:
    with tests.Checkpoints(folder, tests.options(keep=10 ** 6)) as store:
        for step in range(2, 1000):
            store.save(tests.at(now, step), {{}}, {{}})
except tests.CheckpointError as error:
    print(error)
    # A single block free again, so that the file system can work.
    newest = tests.checkpoints.steps(folder)[-1]
    print("names", sorted(path.name for path in folder.iterdir() if not (path / "manifest.json").exists()))
    print("problem", tests.manifest.problem(folder / str(newest)))
    print("exact", tests.same(tests.checkpoints.read(folder / str(newest), abstract).state, tests.at(now, newest)))
"""


def test_a_really_full_disk(tmp_path):
    """On a file system of its own with 2 MiB, where the kernel lets an ordinary user make one."""
    small = tmp_path / "small"
    small.mkdir()
    script = FULL.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(small))
    mount = f"mount -t tmpfs -o size=2m tmpfs {small} && exec {sys.executable} -"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], input=script, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no file system of our own here: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    assert "could not be written" in lines[0] and "No space left on device" in lines[0] and "intact" in lines[0]
    assert lines[1:] == ["names []", "problem None", "exact True"], done.stdout + done.stderr
    assert "Traceback" not in done.stderr
