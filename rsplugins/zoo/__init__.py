"""The model zoo: manifests, and where the models they describe are."""

from __future__ import annotations

DEFAULT_MODEL = "digits-cnn.digits-gaussian025-v2"
"""What is certified when nobody names a model: it travels inside the wheel."""

__all__ = ["DEFAULT_MODEL"]
