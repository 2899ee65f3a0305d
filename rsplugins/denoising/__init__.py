"""Denoised smoothing: a denoiser in front of a classifier that never saw noise (Salman et al., NeurIPS 2020)."""

from __future__ import annotations

from rsplugins.denoising.composition import Denoised
from rsplugins.denoising.door import denoise

__all__ = ["Denoised", "denoise"]
