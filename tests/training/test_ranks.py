"""Two real ranks: what an interruption must not change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RANKED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.training.cases import recipe, small_net, table
from rsplugins.training import AdversarialTraining, Trainer
torch.set_num_threads(1)
def trainer(name):
    return Trainer(recipe(epochs=3, ema=0.9), f"{sys.argv[2]}/{name}", train=table(), test=table(13, seed=3), device="cpu",
                   module=small_net(batch_norm=True), hooks=[AdversarialTraining(eps=0.1, steps=2)], quiet=True)
def to_the_end(name):
    run = trainer(name)
    assert run.ranks.world == 2
    run.fit()
    torch.save(run.engine.classifier.state_dict(), f"{sys.argv[2]}/{name}/rank{run.ranks.rank}.pt")
if sys.argv[3] == "first":
    to_the_end("whole")
    for _ in range(7):  # a step each: two of the second epoch's five are done when these processes end
        assert trainer("cut").fit(time_budget=0.0).status == "stopped"
else:
    to_the_end("cut")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_ranks_that_are_interrupted_end_where_uninterrupted_ones_do(tmp_path):
    """The attack reads batch statistics, which each rank makes of its own share; the checkpoint holds the first rank's."""
    script = tmp_path / "ranked.py"
    script.write_text(RANKED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    for part in ("first", "second"):
        subprocess.run([*launch, str(Path(__file__).parent), str(tmp_path), part], check=True)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, cut[name])] == []
    ranks = [torch.load(tmp_path / f"{name}/rank{rank}.pt", weights_only=True) for name in ("whole", "cut") for rank in (0, 1)]
    assert all(torch.equal(value, other[name]) for other in ranks[1:] for name, value in ranks[0].items())
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "cut")]
    assert [row["epoch"] for row in rows[1]] == [0, 1, 2]
    for one, other in zip(*rows, strict=True):  # sums over ranks and parts of an epoch: equal to rounding
        assert {key: value for key, value in one.items() if key != "seconds"} == pytest.approx(
            {key: value for key, value in other.items() if key != "seconds"}
        )
