"""Planted faults: whatever went wrong in kernels elsewhere must not go unnoticed in these."""

import jax
import pytest
from kernel_faults import CHECKS, faults, planted


@pytest.mark.parametrize("check", CHECKS)
def test_the_checks_pass_as_it_is(check, tmp_path):
    with planted(None, tmp_path):
        CHECKS[check]()


@pytest.mark.parametrize("fault", [fault for fault in faults() if fault.check in CHECKS], ids=str)
def test_a_fault_is_noticed(fault, tmp_path):
    # Wrong numbers, or a race that the interpreter saw; a fault that does not even run would say nothing of checks.
    with planted(fault, tmp_path), pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        CHECKS[fault.check]()
