"""The report shows propagated against sampled radii where both are there."""

from __future__ import annotations

from dataclasses import replace

from rsplugins.runs.plots import estimate_figure
from rsplugins.runs.report import to_html


def with_sigma(run, sigma):
    parameters = {**run.manifest.parameters, "sigma": sigma}
    return replace(run, manifest=run.manifest.model_copy(update={"parameters": parameters}))


def test_points_are_the_inputs_that_both_predict_alike(make_run):
    certified, estimate = make_run("a", indices=range(5, 25)), make_run("b", "guess", indices=range(10, 30))
    (points,) = estimate_figure(estimate, certified).axes[0].collections
    known = {row.index: row for row in certified.rows}
    expected = [
        (known[row.index].radius, row.radius)
        for row in estimate.rows
        if row.index in known and row.prediction is not None and row.prediction == known[row.index].prediction
    ]
    assert 5 < len(expected) < 15
    assert [tuple(point) for point in points.get_offsets()] == expected


def test_the_report_draws_only_what_can_be_compared(make_run):
    certified, guess = make_run("a", indices=range(10)), make_run("b", "guess", indices=range(10))
    assert "guess against votes" not in to_html([certified, guess])
    assert "guess against votes" in to_html([certified, with_sigma(guess, 0.25)])
    assert "guess against votes" not in to_html([certified, with_sigma(guess, 0.5)])
    assert "against" not in to_html([with_sigma(guess, 0.25)])


def test_nothing_in_common_is_an_empty_plot(make_run):
    certified, estimate = make_run("a", indices=range(5)), make_run("b", "guess", indices=range(20, 25))
    assert not estimate_figure(estimate, certified).axes[0].collections
