from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tests.models import wrap_rate

# Not importorskip: without the bridges of rsplugins.compat its import fails although it is installed.
needs_robustbench = pytest.mark.skipif(importlib.util.find_spec("robustbench") is None, reason="robustbench is not installed")


def test_the_sample_is_fixed_and_has_sixty_models_with_heads():
    names = wrap_rate.timm_sample()
    assert (len(set(names)), names) == (60, wrap_rate.timm_sample())
    assert names != wrap_rate.timm_sample(seed=1)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_nfnet"])
def test_small_models_of_several_families_wrap(name):
    outcome = wrap_rate.attempt(f"timm:{name}")
    assert outcome.good, outcome.note


def test_failures_carry_the_layer_and_what_to_do():
    unknown = wrap_rate.attempt("timm:test_vit", depht=3)
    assert not unknown.good
    assert "depht" in unknown.note
    misfit = wrap_rate.attempt("timm:test_vit", img_size=150)  # no multiple of the 16-pixel patches
    assert not misfit.good
    assert "'patch_embed' (PatchEmbed)" in misfit.note
    assert "input_size" in misfit.note


def check(outcomes, share):
    bad = [outcome for outcome in outcomes if not outcome.good]
    assert len(bad) <= (1 - share) * len(outcomes), "\n".join(f"{outcome.reference}: {outcome.note}" for outcome in bad)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_at_least_95_percent_of_sixty_timm_classifiers_wrap():
    check(list(wrap_rate.run_timm(wrap_rate.timm_sample())), 0.95)


@needs_robustbench
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_at_least_90_percent_of_a_sample_of_robustbench_architectures_wrap():
    check(list(wrap_rate.run_robustbench(wrap_rate.robustbench_sample())), 0.90)
