"""The contract kit: checks that any plugin can be put through, from its own pytest run or by ``rsplugins plugins check NAME``.

A plugin's test file is three lines::

    from rsplugins.testing import certifier_contract

    test_contract = certifier_contract("my-certifier", sigma=0.5)

Every check of the contract is then a test of its own.
"""

from __future__ import annotations

from rsplugins.testing.certifiers import certifier_checks
from rsplugins.testing.contract import (
    bound_operator_contract,
    certifier_contract,
    dataset_contract,
    denoiser_contract,
    model_source_contract,
    moment_rule_contract,
    training_hook_contract,
)
from rsplugins.testing.datasets import dataset_checks
from rsplugins.testing.denoisers import denoiser_checks
from rsplugins.testing.finding import bound_operator_checks, moment_rule_checks
from rsplugins.testing.hooks import training_hook_checks
from rsplugins.testing.outcome import BrokenContractError, Check, Outcome
from rsplugins.testing.sources import model_source_checks

__all__ = [
    "BrokenContractError",
    "Check",
    "Outcome",
    "bound_operator_checks",
    "bound_operator_contract",
    "certifier_checks",
    "certifier_contract",
    "dataset_checks",
    "dataset_contract",
    "denoiser_checks",
    "denoiser_contract",
    "model_source_checks",
    "model_source_contract",
    "moment_rule_checks",
    "moment_rule_contract",
    "training_hook_checks",
    "training_hook_contract",
]
