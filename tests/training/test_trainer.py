from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rsplugins.data.table import derived_seed
from rsplugins.errors import ParameterError, RunError, UsageError
from rsplugins.machine.ranks import Ranks
from rsplugins.training import Gairat, GaussianAugmentation, ImageTable, Trainer, TrainingDivergedError, files, hookimpl
from rsplugins.training.trainer import accuracy, choose_device
from tests.training.cases import recipe, small_net, table


def _trainer(out, hooks=(), settings=None, **training):
    return Trainer(
        settings or recipe(**training),
        out,
        train=table(),
        test=table(12, seed=3),
        module=small_net(batch_norm=True),
        hooks=hooks,
        device="cpu",
        quiet=True,
    )


class Interrupting:
    """Stops the run at a step, as a kill would, and counts what it has seen."""

    def __init__(self, at=None):
        self.at, self.steps = at, 0

    @hookimpl
    def instance_weights(self, batch):
        if self.steps == self.at:
            raise KeyboardInterrupt
        self.steps += 1
        return torch.full((len(batch.labels),), 1.0 + self.steps / 100)

    @hookimpl
    def state(self):
        return {"steps": self.steps}

    @hookimpl
    def load_state(self, state):
        self.steps = state["steps"]


class Noisy(torch.nn.Module):
    """Has dropout, whose masks come from torch's default generator."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(small_net(batch_norm=True), torch.nn.Dropout(0.2))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("at", [0, 7, 10, 13])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, at, ema):
    def run(out, stop=None):
        trainer = Trainer(
            recipe(ema=ema),
            out,
            train=table(),
            test=table(12, seed=3),
            module=Noisy(),
            hooks=[GaussianAugmentation(sigma=0.1), Interrupting(stop)],
            device="cpu",
            quiet=True,
            checkpoint_seconds=0.0 if at % 2 else 60.0,
        )
        return trainer.fit()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", at)
    torch.manual_seed(99)
    resumed = run(tmp_path / "cut")
    for a, b in zip(whole.classifier.state_dict().values(), resumed.classifier.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in result.metrics] for result in (whole, resumed)]
    assert strip[0] == strip[1]
    assert [row["epoch"] for row in resumed.metrics] == [0, 1, 2]
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_run_leaves_a_usable_model_and_its_record(tmp_path):
    result = _trainer(tmp_path, [Gairat(eps=0.05, steps=2, burn_in=1)], epochs=6).fit()
    assert result.status == "finished"
    assert result.metrics[-1]["test_accuracy"] == pytest.approx(accuracy(result.classifier, table(12, seed=3)))
    assert result.metrics[-1]["test_accuracy"] > 0.9
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["device"] == "cpu"
    assert record["recipe_sha256"] == recipe(epochs=6).sha256()
    assert (record["seed"], record["epochs"], record["images"]) == (0, 6, {"train": 40, "test": 12})
    assert record["weights"]["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert "kappa" in rows[-1]
    fresh = small_net(seed=9, batch_norm=True)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    fresh.eval()
    images, _ = table(12, seed=3).take(torch.arange(12))
    # The trainer's network lies in another memory layout, where other kernels run: the same function, not the same bits.
    torch.testing.assert_close(fresh((images - 0.3) / 0.25), result.classifier(images), rtol=1e-5, atol=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_time_budget_ends_cleanly_and_the_same_call_goes_on(tmp_path):
    result = _trainer(tmp_path).fit(time_budget=0.0)
    assert result.status == "stopped"
    assert (tmp_path / "model.safetensors").exists()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 1
    again = _trainer(tmp_path).fit()
    assert again.status == "finished"
    whole = _trainer(tmp_path / "whole").fit()
    for a, b in zip(whole.classifier.state_dict().values(), again.classifier.state_dict().values(), strict=True):
        assert torch.equal(a, b)


class Exploding:
    """A loss that is NaN at one step."""

    @hookimpl
    def loss(self, batch, weights):
        self.count = getattr(self, "count", 0) + 1
        return batch.logits.sum() * (float("nan") if self.count == 8 else 0.0)


def test_a_nan_loss_names_the_batch_and_keeps_the_last_good_checkpoint(tmp_path):
    trainer = _trainer(tmp_path, [Exploding()])
    with pytest.raises(TrainingDivergedError, match="epoch 2, step 3") as caught:
        trainer.fit()
    named = [int(word.strip(",")) for word in str(caught.value).split("inputs ")[1].split()[:5]]
    assert named == trainer.order(1)[16:21].tolist()
    assert str(tmp_path / "checkpoint.pt") in str(caught.value)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["engine"]["model"].values())


class InfiniteSlope:
    """At the last step, a loss that is 0 and whose gradient is NaN."""

    @hookimpl
    def loss(self, batch, weights):
        self.count = getattr(self, "count", 0) + 1
        return (batch.logits * 0).sum().sqrt() if self.count == 10 else batch.logits.sum() * 0


def test_weights_that_are_not_finite_are_not_saved_though_the_loss_was(tmp_path):
    with pytest.raises(TrainingDivergedError, match="weight is not finite after epoch 2"):
        _trainer(tmp_path, [InfiniteSlope()], epochs=2).fit()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["engine"]["model"].values())


def test_another_recipe_in_the_same_directory_is_refused_with_the_difference(tmp_path):
    _trainer(tmp_path, epochs=1).fit()
    with pytest.raises(
        UsageError, match="epochs = 1; \\+ epochs = 2"
    ):  # exit code 2, as a run of `certify` with other parameters
        _trainer(tmp_path, epochs=2).fit()


def test_a_damaged_checkpoint_is_said(tmp_path):
    _trainer(tmp_path, epochs=1).fit()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match="cannot be read"):
        _trainer(tmp_path, epochs=1).fit()


def test_averaged_weights_are_what_is_saved(tmp_path):
    trainer = _trainer(tmp_path, epochs=2, ema=0.9)
    average = None
    step = trainer.engine.step

    def watch(*arguments):
        nonlocal average
        step(*arguments)
        own = trainer.engine.classifier.module[0].weight.detach().clone()
        done = trainer.engine.updates
        decay = min(0.9, (1 + done) / (10 + done))
        average = decay * (average if average is not None else start) + (1 - decay) * own

    start = trainer.engine.classifier.module[0].weight.detach().clone()
    trainer.engine.step = watch
    trainer.fit()
    assert torch.allclose(load_file(tmp_path / "model.safetensors")["0.weight"], average, atol=1e-6)


def test_seeds_change_the_run_and_nothing_else_does(tmp_path):
    def weights(out, **training):
        return torch.cat([w.flatten() for w in _trainer(tmp_path / out, **training).fit().classifier.parameters()])

    torch.manual_seed(1)
    one = weights("a", epochs=1)
    torch.manual_seed(2)
    assert torch.equal(one, weights("b", epochs=1))
    assert len({derived_seed(0, 1), derived_seed(1, 0), derived_seed(0, 1, 0), derived_seed(0, 10)}) == 4


class Recording:
    """Draws a number from the step's generator and one from torch's own, at each step."""

    def __init__(self):
        self.drawn = []

    @hookimpl
    def perturb(self, batch):
        self.drawn += [batch.gaussian(batch.images[:1]).flatten()[0].item(), torch.randn(()).item()]


def test_every_step_of_every_epoch_and_rank_has_randomness_of_its_own(tmp_path):
    recording = Recording()
    trainer = _trainer(tmp_path, [recording], epochs=3)
    trainer.fit()
    # Two draws at each of 3 x 5 steps; the generators of one step share a seed, so the streams are compared apart.
    for stream in (recording.drawn[::2], recording.drawn[1::2]):
        assert len(stream) == len(set(stream)) == 15
    assert len({tuple(trainer.order(epoch).tolist()) for epoch in range(3)}) == 3
    assert all(sorted(trainer.order(epoch).tolist()) == list(range(40)) for epoch in range(3))
    seeds = []
    for rank in (0, 1):
        trainer.engine.ranks = Ranks(rank, 2)
        trainer.engine.seed(0, 0)
        seeds.append(trainer.engine.generator.initial_seed())
    assert seeds[0] != seeds[1]


class TwoAlike(Ranks):
    """Two ranks that saw the same: each sum is twice the own."""

    def sum(self, tensor):
        return 2 * tensor


def test_the_ranks_of_a_resumed_epoch_count_its_first_part_once(tmp_path):
    first, second = (_trainer(tmp_path / name) for name in "ab")
    images, labels = first.train.take(torch.arange(8))
    first.engine.step(images, labels, 0, 0)
    first.engine.ranks, second.engine.ranks = TwoAlike(0, 2), TwoAlike(1, 2)
    state = first.engine.state()
    assert float(state["sums"]["images"]) == 16
    for trainer in (first, second):
        trainer.engine.load_state(state)
    together = {name: first.engine.sums[name] + second.engine.sums[name] for name in first.engine.sums}
    assert together == state["sums"]


def test_bfloat16_and_compile_free_layouts_train(tmp_path):
    result = _trainer(tmp_path, precision="bfloat16", channels_last=False, epochs=6).fit()
    assert next(result.classifier.parameters()).dtype == torch.float32
    assert result.metrics[-1]["test_accuracy"] > 0.9


def test_unknown_devices_are_refused():
    with pytest.raises(ParameterError, match="cannot be used"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ParameterError, match="cuda"):
            choose_device("cuda")


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.training.cases import recipe, small_net, table
from rsplugins.training import Trainer
torch.set_num_threads(1)
Trainer(recipe(epochs=int(sys.argv[3])), sys.argv[2], train=table(), test=table(12, seed=3), module=small_net(batch_norm=True),
        hooks=[], device="cpu", checkpoint_seconds=0.0, quiet=True).fit()
"""


def _start(out, epochs):
    return subprocess.Popen([sys.executable, "-c", KILLED, str(Path(__file__).parent), str(out), str(epochs)])


@pytest.mark.slow
@pytest.mark.timeout(1200)  # eight processes, and a checkpoint after each of 300 steps
def test_kill_minus_nine_at_many_moments(tmp_path):
    epochs = 60
    assert _start(tmp_path / "whole", epochs).wait() == 0
    for _ in range(6):
        process = _start(tmp_path / "killed", epochs)
        before = (tmp_path / "killed/checkpoint.pt").stat().st_mtime if (tmp_path / "killed/checkpoint.pt").exists() else 0
        while process.poll() is None:
            path = tmp_path / "killed/checkpoint.pt"
            if path.exists() and path.stat().st_mtime > before:
                time.sleep(0.11)
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
    assert _start(tmp_path / "killed", epochs).wait() == 0
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


RANKED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.training.cases import recipe, small_net, table
from rsplugins.training import Trainer
from rsplugins.training.recipe import DataSettings
import dataclasses
torch.set_num_threads(1)
settings = dataclasses.replace(recipe(epochs=2), data=DataSettings(name="digits"))
class Seen(torch.nn.Module):
    # Like batch normalisation, a state of each rank's own that only measuring reads; unlike it, without a part in training.
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
    def forward(self, x):
        if not self.training:
            return x + 5 * self.mean
        self.mean.copy_(x.mean())
        return x
net = torch.nn.Sequential(Seen(), small_net())
data = {"train": table(), "test": table(13, seed=3), "module": net}
trainer = Trainer(settings, sys.argv[2], hooks=[], device="cpu", quiet=True, **data)
batches, measured = trainer.test.batches, []
def counted(parts):
    measured.extend(index for part in parts for index in part.tolist())
    return batches(parts)
object.__setattr__(trainer.test, "batches", counted)
result = trainer.fit()
images, labels = data["test"].take(torch.arange(13))
expected = float((result.classifier(images).argmax(1) == labels).float().mean())
assert trainer.ranks.rank or abs(result.metrics[-1]["test_accuracy"] - expected) < 1e-6, (result.metrics, expected)
assert sorted(measured) == sorted(2 * list(range(trainer.ranks.rank, 13, trainer.ranks.world))), measured
torch.save(trainer.engine.classifier.state_dict(), f"{sys.argv[2]}/rank{trainer.ranks.rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    script = tmp_path / "ranked.py"
    script.write_text(RANKED)
    here = str(Path(__file__).parent)
    (tmp_path / "two").mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(script), here, str(tmp_path / "two")], check=True, timeout=600)
    subprocess.run([sys.executable, str(script), here, str(tmp_path / "one")], check=True, timeout=600)
    ranks = [torch.load(tmp_path / f"two/rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = load_file(tmp_path / "one/model.safetensors")
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name])
        if not name.endswith("mean"):
            assert torch.allclose(value, alone[name.removeprefix("module.")], atol=1e-5)


def test_videos_train_in_their_own_layout(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    )
    frames = table()
    videos = ImageTable(frames.images[:, :, None].repeat(1, 1, 2, 1, 1), frames.labels, 3)
    trainer = Trainer(recipe(epochs=1), tmp_path, train=videos, test=videos, module=network, hooks=[], device="cpu", quiet=True)
    assert trainer.engine.arranged(torch.rand(2, 2, 3, 4, 4)).is_contiguous(memory_format=torch.channels_last_3d)
    assert trainer.fit().record["input"]["shape"] == [1, 2, 4, 4]


def test_a_run_that_dies_between_metrics_and_checkpoint_loses_no_row(tmp_path, monkeypatch):
    write, calls = files.write_metrics, []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(files, "write_metrics", dying)
    with pytest.raises(KeyboardInterrupt):
        _trainer(tmp_path, epochs=3).fit()
    result = _trainer(tmp_path, epochs=3).fit()
    assert [row["epoch"] for row in result.metrics] == [0, 1, 2]
    assert result.record["epochs"] == 3
