"""Contracts as pytest tests: one function, parametrised by check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rsplugins.host import Entry
from rsplugins.testing.certifiers import certifier_checks
from rsplugins.testing.datasets import dataset_checks
from rsplugins.testing.denoisers import denoiser_checks
from rsplugins.testing.finding import bound_operator_checks, moment_rule_checks
from rsplugins.testing.hooks import training_hook_checks
from rsplugins.testing.outcome import Check
from rsplugins.testing.sources import model_source_checks
from rsplugins.testing.subject import About


def certifier_contract(
    certifier: str | Entry, *, about: About | None = None, thorough: bool = False, **parameters: Any
) -> Callable[[Check], None]:
    """Return a pytest test of everything that a certifier owes; assign it to a name that starts with ``test_``.

    Arguments are those of :func:`rsplugins.testing.certifier_checks`.

    Example:
        >>> test_contract = certifier_contract("gaussian", sigma=0.5)
    """
    return as_test(certifier_checks(certifier, about=about, thorough=thorough, **parameters))


def training_hook_contract(name: str, **settings: Any) -> Callable[[Check], None]:
    """Return a pytest test of everything that a training hook owes; see :func:`rsplugins.testing.training_hook_checks`."""
    return as_test(training_hook_checks(name, **settings))


def model_source_contract(scheme: str, reference: str, **options: Any) -> Callable[[Check], None]:
    """Return a pytest test of everything that a model source owes; see :func:`rsplugins.testing.model_source_checks`."""
    return as_test(model_source_checks(scheme, reference, **options))


def denoiser_contract(scheme: str, reference: str, **arguments: Any) -> Callable[[Check], None]:
    """Return a pytest test of everything that a denoiser owes; see :func:`rsplugins.testing.denoiser_checks`."""
    return as_test(denoiser_checks(scheme, reference, **arguments))


def dataset_contract(name: str, **arguments: Any) -> Callable[[Check], None]:
    """Return a pytest test of everything that a data set owes; see :func:`rsplugins.testing.dataset_checks`."""
    return as_test(dataset_checks(name, **arguments))


def bound_operator_contract(operator: str | Entry, *, reference: str = "", thorough: bool = False) -> Callable[[Check], None]:
    """Return a pytest test of everything that a bound operator owes; see :func:`rsplugins.testing.bound_operator_checks`."""
    return as_test(bound_operator_checks(operator, reference=reference, thorough=thorough))


def moment_rule_contract(rule: str | Entry, *, reference: str = "", thorough: bool = False) -> Callable[[Check], None]:
    """Return a pytest test of everything that a moment rule owes; see :func:`rsplugins.testing.moment_rule_checks`."""
    return as_test(moment_rule_checks(rule, reference=reference, thorough=thorough))


def as_test(checks: Sequence[Check]) -> Callable[[Check], None]:
    """Return a pytest test that runs checks, each as a test of its own; what was seen is printed (``pytest -rA`` shows it)."""
    import pytest

    @pytest.mark.parametrize("check", checks, ids=[check.name for check in checks])
    def test(check: Check) -> None:
        outcome = check.outcome()
        print(f"{outcome.name}: {outcome.status}: {outcome.detail}")  # noqa: T201
        if outcome.status == "skipped":
            pytest.skip(outcome.detail)
        if outcome.status == "failed":
            pytest.fail(f"{outcome.name}: {outcome.detail}", pytrace=False)

    return test
