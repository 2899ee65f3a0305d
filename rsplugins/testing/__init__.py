"""The contract kit: checks that any plugin can be put through, from its own pytest run or by ``rsplugins plugins check NAME``.

A plugin's test file is three lines::

    from rsplugins.testing import certifier_contract

    test_contract = certifier_contract("my-certifier", sigma=0.5)

Every check of the contract is then a test of its own.
"""

from __future__ import annotations

from rsplugins.testing.certifiers import certifier_checks
from rsplugins.testing.contract import certifier_contract
from rsplugins.testing.outcome import BrokenContractError, Check, Outcome

__all__ = [
    "BrokenContractError",
    "Check",
    "Outcome",
    "certifier_checks",
    "certifier_contract",
]
