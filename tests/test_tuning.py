"""Block sizes from files, and the limits of errors."""

import json
import pathlib
import sys
import types

import attention_kernel_standin as standin
import numpy as np
import pytest

from kernels import tuning
from kernels.attention import fused
from kernels.platform import compiling_for
from kernels.tolerance import TOLERANCES, relative_error, tolerance

CASE = {"dtype": "bfloat16", "width": 128, "value_width": 128, "length": 4096, "keys": 4096}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    tuning._records.cache_clear()
    yield tmp_path / "tuned"
    tuning._records.cache_clear()


def found(kind="NVIDIA H200", implementation="triton", **changes):
    with compiling_for("gpu", kind):
        return tuning.lookup("attention", implementation, **{**CASE, **changes})


def test_what_is_recorded_is_found_for_that_device_and_near_lengths(folder):
    assert found() is None
    file = tuning.record("NVIDIA H200", "attention", "triton", CASE, {"settings": {"forward": [128, 64]}, "ms": 1.0})
    assert file == folder / "nvidia_h200.json" and json.loads(file.read_text())["device"] == "NVIDIA H200"
    long = {**CASE, "length": 16384, "keys": 16384}
    tuning.record("NVIDIA H200", "attention", "triton", long, {"settings": {"forward": [128, 128]}})
    assert found() == {"forward": [128, 64]}
    assert found(length=5000, keys=5000) == {"forward": [128, 64]}
    assert found(length=20000, keys=20000) == {"forward": [128, 128]}
    for change in ({"width": 64}, {"dtype": "float32"}, {"length": 256, "keys": 256}, {"implementation": "mosaic_gpu"}):
        assert found(**change) is None
    assert found(kind="NVIDIA A100") is None and found(kind="") is None
    tuning.record("NVIDIA H200", "attention", "triton", CASE, {"settings": {"forward": [64, 64]}})  # In its place.
    assert found() == {"forward": [64, 64]}
    assert len(json.loads(file.read_text())["attention"]["triton"]) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["nvidia_h200.json"]


def test_committed_files_can_be_read():
    for file in tuning.FOLDER.glob("*.json"):
        results = json.loads(file.read_text())
        assert tuning.path(results.pop("device")) == file
        for records in (records for op in results.values() for records in op.values()):
            assert all(set(record) >= {"case", "settings"} for record in records)


def test_errors_are_relative_and_see_what_is_not_finite():
    exact = np.array([3.0, -4.0])
    assert relative_error(exact, exact) == 0 and relative_error(np.zeros(0), np.zeros(0)) == 0
    assert relative_error(exact * 1.01, exact) == pytest.approx(0.01)
    assert relative_error([1e-3], [0.0], floor=0.1) == pytest.approx(1e-2)
    assert relative_error([-np.inf, 1.0], [-np.inf, 1.0]) == 0
    for wrong in ([np.nan, 1.0], [np.inf, 1.0], [0.0, 1.0]):
        assert not relative_error(wrong, [-np.inf, 1.0]) <= 1
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(np.zeros(2), np.zeros((2, 1)))


def test_limits_narrow_with_the_type():
    order = [tolerance(name) for name in ("float64", "float32", "float16", "bfloat16")]
    assert order == sorted(order) and len(TOLERANCES) == 4
    assert tolerance("bfloat16").gradient <= 2e-2


def test_the_search_takes_the_fastest_that_is_right(monkeypatch):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
    import tune_kernels
    from kernel_bench import cases

    def timed(rivals):
        for rival in rivals:
            q, k = map(int, rival.name.strip("()").split(","))
            rival.seconds += [1 / q + 1 / k] * 3

    def forward(call, q, *rest):
        if call.block_q == 64:
            raise ValueError("too large for this chip")
        out, lse = standin.forward(call, q, *rest)
        return (out + 1 if call.block_k == 64 else out), lse

    kernel = types.SimpleNamespace(**{**vars(standin), "forward": forward})
    shape = cases.Shape(1, 64, 2, 1, 8)
    found = tune_kernels.search(kernel, shape, "float32", [(8, 8), (32, 16), (64, 32), (16, 64)], timed)
    assert found.pop("seconds") == {"forward": 1 / 32 + 1 / 16, "backward": 1 / 64 + 1 / 32}
    assert found == {"forward": [32, 16], "backward": [64, 32]}
    with pytest.raises(ValueError, match="no candidate works"):
        kernel.chosen = lambda *shapes: fused.Sizes((64, 8), (64, 8))
        tune_kernels.search(kernel, shape, "float32", [], timed)
