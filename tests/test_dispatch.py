"""Choosing an implementation: auto may choose, a name must obey, and nothing falls back in silence."""

import logging

import pytest

from kernels import dispatch, platform
from kernels.dispatch import Implementation, choose

CANDIDATES = {
    "fast": Implementation("fast", lambda: "fast", lambda case: None if case == "easy" else "too hard", ("gpu",)),
    "steady": Implementation("steady", lambda: "steady", lambda case: "never this" if case == "odd" else None),
}


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())


def test_none_takes_the_first_that_fits_platform_and_case() -> None:
    assert choose("op", None, CANDIDATES, "easy", platform="gpu").name == "fast"
    assert choose("op", None, CANDIDATES, "easy", platform="cpu").name == "steady"
    assert choose("op", None, CANDIDATES, "hard", platform="gpu").name == "steady"
    assert choose("op", None, CANDIDATES, "easy").name == "steady"  # The tests run on CPU.


def test_the_choice_and_the_refusals_are_logged_once(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="tessera.kernels"):
        for _ in range(3):
            choose("op", None, CANDIDATES, "hard", platform="gpu")
        choose("op", None, CANDIDATES, "easy", platform="gpu")
    assert [record.getMessage() for record in caplog.records] == [
        "op on gpu: steady (refused fast: too hard)",
        "op on gpu: fast",
    ]


def test_a_named_one_is_obeyed_even_off_its_platform_or_refuses_with_the_reason() -> None:
    assert choose("op", "fast", CANDIDATES, "easy", platform="cpu").name == "fast"
    with pytest.raises(NotImplementedError, match="'fast' cannot do this case: too hard"):
        choose("op", "fast", CANDIDATES, "hard", platform="gpu")


def test_all_reasons_are_given_when_none_can() -> None:
    with pytest.raises(NotImplementedError, match="fast: not for cpu; steady: never this"):
        choose("op", None, CANDIDATES, "odd", platform="cpu")


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown implementation 'stedy' of op: did you mean steady"):
        choose("op", "stedy", CANDIDATES, "easy")
    with pytest.raises(ValueError, match="known: fast, steady"):
        choose("op", "zzz", CANDIDATES, "easy")


KERNELS = {
    "chip": Implementation(
        "chip", lambda: "chip", lambda case: None, ("tpu",), kernel=True, unsuited=lambda case: case, untried=True
    ),
    "anywhere": Implementation("anywhere", lambda: "anywhere", lambda case: None),
}


def test_a_kernel_runs_on_its_platform_or_in_its_interpreter() -> None:
    with pytest.raises(NotImplementedError, match="it runs on tpu, not on cpu; within kernels.platform.interpreted()"):
        choose("op", "chip", KERNELS, None)
    with platform.interpreted():
        assert platform.interpreting() and choose("op", "chip", KERNELS, None).name == "chip"
        assert choose("op", None, KERNELS, None).name == "anywhere"  # Interpreters are too slow to be chosen.
    assert not platform.interpreting()
    with platform.compiling_for("tpu", "TPU v5e"):
        assert (platform.default_platform(), platform.device_kind()) == ("tpu", "TPU v5e")
        assert choose("op", None, KERNELS, None).name == "chip"
    assert platform.default_platform() == "cpu" and platform.device_kind()


def test_what_is_unsuited_is_used_only_by_name(caplog) -> None:
    with platform.compiling_for("tpu"), caplog.at_level(logging.INFO, logger="tessera.kernels"):
        assert choose("op", "chip", KERNELS, "it is rough").name == "chip"
        assert choose("op", None, KERNELS, "it is rough").name == "anywhere"
        assert "refused chip: it is rough" in caplog.text
        assert "never run on a chip" not in caplog.text
        choose("op", None, KERNELS, None)
    assert caplog.messages[-1].startswith("op: the kernel chip has been interpreted and compiled, but never run")


def test_a_module_is_imported_when_its_function_is_first_called() -> None:
    lazy = dispatch.later("colorsys", "rgb_to_hsv")
    assert lazy.__name__ == "rgb_to_hsv" and lazy(1.0, 0.0, 0.0) == (0.0, 1.0, 1.0)
    with pytest.raises(ModuleNotFoundError):
        dispatch.later("kernels.nowhere", "nothing")()
