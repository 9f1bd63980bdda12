"""The notebooks run from top to bottom, show what they promise, and are committed without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
# By notebook: how many pictures it shows, and some of what it prints.
PROMISED = {
    "quickstart": (5, ("(2, 32, 64)", "def ")),  # Two masks, the losses, one head, the caches.
    "pretrained": (1, ("model.safetensors", "low rank", "tpla_softmax_only", "GQA: 384 bytes", "between the logits")),
}


@pytest.mark.parametrize("name", PROMISED)
def test_runs_and_shows_what_it_promises(name, monkeypatch):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", "")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    promised, words = PROMISED[name]
    assert len(pictures) == promised
    text = "".join(output.get("text", "") for output in outputs)
    assert all(word in text for word in words)
    assert not any(output.output_type == "error" for output in outputs)
