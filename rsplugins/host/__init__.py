"""The plugin host: finds the installed plugins, checks them one by one, and hands out what they bring. Imports no torch."""

from __future__ import annotations

from rsplugins.host.descriptors import (
    API_VERSION,
    BoundOperatorDescriptor,
    CertifierDescriptor,
    DatasetDescriptor,
    DenoiserDescriptor,
    Descriptor,
    ModelSourceDescriptor,
    MomentRuleDescriptor,
    TrainingHookDescriptor,
)
from rsplugins.host.entries import Entry, Status, guard
from rsplugins.host.hookspecs import hookimpl
from rsplugins.host.manager import Host, get_host

__all__ = [
    "API_VERSION",
    "BoundOperatorDescriptor",
    "CertifierDescriptor",
    "DatasetDescriptor",
    "DenoiserDescriptor",
    "Descriptor",
    "Entry",
    "Host",
    "ModelSourceDescriptor",
    "MomentRuleDescriptor",
    "Status",
    "TrainingHookDescriptor",
    "get_host",
    "guard",
    "hookimpl",
]
