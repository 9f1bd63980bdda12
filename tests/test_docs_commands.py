"""What the documents tell a person to type works as they say, and what they name exists."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import flags
import pytest

from configs.rules import Rules

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def commands(document: str) -> list[str]:
    """The indented lines of a document that call python, without those that leave something to fill in."""
    lines = re.findall(r"^    ((?:[A-Z_]+=\S+ )*python .*)$", (ROOT / document).read_text(), re.M)
    return [line for line in lines if "<" not in line]


def call(line: str, folder: Path) -> subprocess.CompletedProcess:
    words = shlex.split(line)
    settings = dict(word.split("=", 1) for word in words[: words.index("python")])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | settings
    environment["XLA_FLAGS"] = flags.xla(1, settings.get("XLA_FLAGS", ""))
    arguments = [sys.executable, *words[words.index("python") + 1 :]]
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_tour_of_the_readme(tmp_path):
    """Every command in turn, in a folder of its own: what one leaves behind the next one finds."""
    for name in ("configs", "docs", "eval.py", "train.py", "tools", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = commands("README.md")
    assert len(lines) >= 6
    for line in lines:
        done = call(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "lm-mla-smoke" in page and "lm-lightning-smoke" in page
    assert (tmp_path / "runs" / "sharded" / "report.html").exists()


def test_the_benchmark_of_kernels(tmp_path):
    (line,) = commands("docs/kernels.md")
    done = call(f"{line} --output={tmp_path / 'kernels.json'}", ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {"xla", "reference"} <= set(row["rivals"]) and "it runs on tpu, not on cpu" in row["refused"]["pallas_tpu"]
    assert all(0 < found["share_of_roofline"] and found["relative_error"] < 1e-5 for found in row["rivals"].values())
    assert (tmp_path / "kernels.png").stat().st_size > 5000
    wrong = call("python benchmarks/kernels.py --ops=attention --shapes=4k", ROOT)
    assert wrong.returncode == 1 and "error: shape '4k' of attention" in wrong.stderr and "t4k" in wrong.stderr


# tests/test_data_docs.py runs its document.
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "docs/data.md"])
def test_python_in_documents_runs(document):
    names: dict[str, object] = {"Rules": Rules}  # Documents show parts of files that have imported this.
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S):
        exec(compile(block, document, "exec"), names)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml))(?::\w+)?`", text)
    of_a_run = ("runs/", "checkpoints/", "tensorboard/", "tokenizer/", "loss/")
    folders = ("", "layers/attention", "kernels/attention")
    missing = [
        name
        for name in named
        if not name.startswith(of_a_run) and not any((ROOT / folder / name).exists() for folder in folders)
    ]
    assert not missing


def test_table_of_variants_is_current():
    done = subprocess.run(
        [sys.executable, "tools/variants.py", "--check"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, "run: python tools/variants.py"


def test_locks_name_versions_and_no_places():
    for name in ("run", "dev", "cuda-plugin", "tpu"):
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        assert lines and all(re.fullmatch(r"[\w.-]+==[\w.+]+( ; .+)?", line) for line in lines)
    run, dev = ((ROOT / "requirements" / f"{name}.txt").read_text().splitlines() for name in ("run", "dev"))
    assert {line.split(" ;")[0] for line in run} <= {line.split(" ;")[0] for line in dev}


def test_make_help_lists_every_target():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    assert all(f"make {target} " in text for target in phony)


def test_environment_says_what_to_install(tmp_path):
    """No usable Python: one clear message with what to do, and status 2."""
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["tools/environment", "run", str(tmp_path / "venv")],
        cwd=ROOT, env=os.environ | {"PYTHON": str(old)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Python" in done.stderr and "3.11" in done.stderr and not done.stdout
