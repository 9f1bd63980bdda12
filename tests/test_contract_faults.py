"""The contract suite is itself tested: planted faults in copies of the variants must make it fail."""

import jax
import pytest

import layers.attention
from layers.attention import contract
from tests.contract import checks
from tests.contract.cases import cases
from tests.contract.faults import GENERIC_FAULTS, SOURCE_FAULTS, Faulty


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """As in the contract suite."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def registry():
    """Forgets the copies that a test registers."""
    known = dict(contract._VARIANTS)
    yield
    contract._VARIANTS.clear()
    contract._VARIANTS.update(known)


@pytest.mark.parametrize("fault", SOURCE_FAULTS, ids=lambda f: f"{f.layer}-{f.check}-{f.new[:24]}")
def test_a_changed_source_is_noticed(fault, tmp_path, registry):
    case = fault.case(tmp_path)
    subject = case.layer if fault.check in ("gradients", "implementations") else case.layer()
    with pytest.raises(AssertionError):
        getattr(checks, fault.check)(subject)


def one_case_per_layer():
    found = {}
    for case in cases():
        found.setdefault(case.options()["layer"], case)
    return list(found.values())


@pytest.mark.parametrize("fault", GENERIC_FAULTS)
@pytest.mark.parametrize("case", one_case_per_layer(), ids=lambda case: case.name)
def test_a_fault_in_any_variant_is_noticed(case, fault):
    def make(**options):
        return Faulty(case.layer(**options), fault)

    with pytest.raises(AssertionError):
        getattr(checks, fault)(make if fault == "gradients" else make())


def test_every_registered_layer_is_mutated():
    assert {case.options()["layer"] for case in one_case_per_layer()} == set(layers.attention.names())
