"""The command line: one module a command; each parses, calls and prints."""

from __future__ import annotations

from rsplugins.cli.main import main

__all__ = ["main"]
