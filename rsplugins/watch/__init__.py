"""Whether a model is one sequence of tensor operations, the same for all pixels: what every certifier that reads a trace needs."""

from __future__ import annotations

from rsplugins.watch.function import check_each_alone, check_function, kept_generators
from rsplugins.watch.graph import check_trace

__all__ = ["check_each_alone", "check_function", "check_trace", "kept_generators"]
