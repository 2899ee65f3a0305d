import json

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from rsplugins.certifier import Execution
from rsplugins.classifier import wrap
from rsplugins.cli import bench
from rsplugins.errors import UsageError
from rsplugins.sampling import Sampler
from rsplugins.sampling.benchmark import USUAL_BATCH, benchmark


class First(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * 1.0


def app():
    application = typer.Typer()
    application.callback()(lambda: None)
    bench.register(application)
    return application


def test_each_way_runs_all_its_samples_and_ratios_are_of_the_same_times(monkeypatch):
    # Counted outside of the model: one that counts for itself has state, and is refused.
    sizes, forward = [], Sampler._forward
    monkeypatch.setattr(Sampler, "_forward", lambda self, batch: (sizes.append(len(batch)), forward(self, batch))[1])
    report = benchmark(First(), torch.rand(1, 4, 4), 3, Execution(batch_size=64), n=1200, rounds=3)
    rates = {rate.name: rate for rate in report.rates}
    assert list(rates) == ["bare, best", "bare, same batch", "engine", "engine, sound", "usual loop"]
    assert rates["usual loop"].batch == USUAL_BATCH
    assert rates["engine"].batch == rates["bare, same batch"].batch == 64
    # a round: same batch, engine, usual loop; single samples are near-ties
    assert sizes.count(1000) == 3
    assert sizes.count(200) == 3
    assert all(rate.best >= rate.median > 0 for rate in report.rates)
    assert report.ratios["engine / usual loop"] > 0
    assert report.setting["samples"] == 1200


def test_the_command_prints_a_table_or_json(monkeypatch):
    small = wrap(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), input_size=(1, 4, 4), source="small")
    monkeypatch.setattr(bench, "_classifier", lambda *_: small)
    options = ["bench", "--n", "64", "--rounds", "1", "--batch-size", "16", "--device", "cpu"]
    table = CliRunner().invoke(app(), options)
    assert table.exit_code == 0, table.output
    assert [name in table.output for name in ("bare, best", "engine", "usual loop", "cpu", "float32")] == [True] * 5
    report = json.loads(CliRunner().invoke(app(), [*options, "--json"]).output)
    assert report["model"] == "small"
    assert set(report["ratios"]) == {"engine / best bare", "engine / same bare", "engine / usual loop", "sound / engine"}


@pytest.mark.parametrize(
    "options", [["--batch-size", "many"], ["--batch-size", "0"], ["--input-size", "3,32,32"], ["--dtype", "float8"]]
)
def test_wrong_options_are_refused(options):
    result = CliRunner().invoke(app(), ["bench", *options])
    assert isinstance(result.exception, UsageError)
