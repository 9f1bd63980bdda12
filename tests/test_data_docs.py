"""The examples of docs/data.md run as they stand."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_examples_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)
    assert "hash: " in capsys.readouterr().out
    assert [len(names[name]) for name in ("samples", "keys", "cells")] == [4, 3, 6]
