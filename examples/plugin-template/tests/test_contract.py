"""The contract, from the package's own tests."""

from rsplugins.testing import certifier_contract

test_contract = certifier_contract("uniform-l1", lambda_=0.5)
