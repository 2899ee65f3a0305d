"""A signal ends a command with its work kept, its exit code and a word on how to go on; the next call says that it resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rsplugins import stopping
from rsplugins.cli.main import main

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

CODES = {signal.SIGTERM: (143, "ended by SIGTERM"), signal.SIGINT: (130, "interrupted")}

RECIPE = """
name = "tiny"
seed = 0
[data]
name = "digits"
[model]
architecture = "digits_cnn"
mean = [0.3]
std = [0.25]
[training]
epochs = 2
batch_size = 64
[optimizer]
name = "sgd"
lr = 0.05
"""


@pytest.fixture(autouse=True)
def heard():
    """Let this process hear Ctrl-C: where a shell started the tests in the background, SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["rsplugins", *words])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code, capsys.readouterr().err


def sends(monkeypatch, target, number, at):
    """Send this process a signal before the ``at``-th call of a method."""
    home, _, name = target.rpartition(".")
    module, _, kind = home.rpartition(".")
    owner = getattr(__import__(module, fromlist=[kind]), kind)
    original, calls = getattr(owner, name), []

    def calling(*arguments, **keywords):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, calling)


@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_certify_with_its_records_kept_and_the_same_command_says_where_it_goes_on(
    tmp_path, monkeypatch, capsys, number
):
    words = ("certify", "--method", "gaussian", "--set", "n=200", "--stop", "6", "--out", str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        sends(patch, "rsplugins.runs.record.Writer.append", number, 4)
        code, said = run(monkeypatch, capsys, *words)
    assert code == CODES[number][0]
    kept = len((tmp_path / "run/records.jsonl").read_text().splitlines())
    assert kept == 3
    assert f"rsplugins: {CODES[number][1]}; gaussian: 3 of 6 inputs are kept in {tmp_path / 'run'}" in said
    assert "the same command goes on there, with input 3" in said
    assert "resuming" not in said
    code, said = run(monkeypatch, capsys, *words)
    assert code == 0
    assert "gaussian: resuming with input 3: 3 of 6 inputs are there" in said
    assert len((tmp_path / "run/records.jsonl").read_text().splitlines()) == 6
    code, said = run(monkeypatch, capsys, *words)
    assert "gaussian: all 6 inputs are there; nothing is left to certify" in said


@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_training_at_the_end_of_a_step_and_the_resumed_run_equals_an_uninterrupted_one(
    tmp_path, monkeypatch, capsys, number
):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    words = ("train", str(tmp_path / "tiny.toml"), "--device", "cpu", "--out")
    assert run(monkeypatch, capsys, *words, str(tmp_path / "whole"))[0] == 0
    with monkeypatch.context() as patch:
        sends(patch, "rsplugins.training.engine.Engine.step", number, 3)
        code, said = run(monkeypatch, capsys, *words, str(tmp_path / "cut"))
    assert code == CODES[number][0]
    assert f"rsplugins: {CODES[number][1]}; tiny: saved in {tmp_path / 'cut'} after step 3 of " in said
    assert "of epoch 1; the same command goes on there" in said
    assert (tmp_path / "cut/checkpoint.pt").exists()
    code, said = run(monkeypatch, capsys, *words, str(tmp_path / "cut"))
    assert code == 0
    assert "tiny: resuming at epoch 1, step 4" in said
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_signal_in_the_last_epochs_measurement_leaves_a_finished_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.toml").write_text(RECIPE.replace("epochs = 2", "epochs = 1"))
    with monkeypatch.context() as patch:
        sends(patch, "rsplugins.training.trainer.Trainer._end_epoch", signal.SIGTERM, 1)
        code, said = run(
            monkeypatch, capsys, "train", str(tmp_path / "tiny.toml"), "--device", "cpu", "--out", str(tmp_path / "out")
        )
    assert code == 143
    assert f"tiny: the model is in {tmp_path / 'out'}" in said
    assert json.loads((tmp_path / "out/training.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_an_attack_and_it_resumes(tmp_path, monkeypatch, capsys, number):
    words = ("attack", "--model", "zoo:digits-cnn.digits-gaussian025-v2", "--data", "digits", "--eps", "0.1", "--images", "6")
    words = (*words, "--steps", "1", "--autoattack", "none", "--batch-size", "2", "--out", str(tmp_path / "a"), "--device", "cpu")
    with monkeypatch.context() as patch:
        sends(patch, "rsplugins.runs.record.Writer.append", number, 3)
        code, said = run(monkeypatch, capsys, *words)
    assert code == CODES[number][0]
    assert f"attack: 2 of 6 inputs are kept in {tmp_path / 'a'}; the same command goes on there" in said
    code, said = run(monkeypatch, capsys, *words)
    assert code == 0
    assert "attack: resuming with input 120: 2 of 6 inputs are there" in said


def test_a_command_that_keeps_nothing_says_nothing_of_it(monkeypatch, capsys):
    monkeypatch.setattr("rsplugins.cli.doctor.diagnose", lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, said = run(monkeypatch, capsys, "doctor")
    assert (code, said.strip()) == (143, "rsplugins: ended by SIGTERM")


def test_a_handler_of_the_users_own_is_left_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(stopping.signal, "signal", signal.signal)
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with stopping.Stop().handling() as stop, stopping.terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (seen, stop.signal) == ([1], None)


def test_a_second_signal_ends_at_once():
    with stopping.Stop().handling() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {cases!r})
from tests.training.cases import recipe, small_net, table
from rsplugins.training import Trainer, hookimpl
class Ending:
    steps = 0
    @hookimpl
    def instance_weights(self, batch):
        self.steps += 1
        if self.steps == 2:
            if os.fork() == 0:  # a process that reads ahead, say: it dies of the signal, and saves nothing
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(7)
            assert os.WTERMSIG(os.wait()[1]) == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
Trainer(recipe(), {out!r}, train=table(), test=table(12), module=small_net(), hooks=[Ending()], device="cpu").fit()
"""


def test_a_users_own_script_dies_of_the_signal_after_it_saved(tmp_path):
    cases = str(Path(__file__).parent.parent / "training")
    script = textwrap.dedent(SCRIPT.format(cases=cases, out=str(tmp_path / "out")))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "test: saved in" in done.stderr
    assert "after step 2 of 5 of epoch 1" in done.stderr
    assert (tmp_path / "out/checkpoint.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_the_program_itself_ends_with_the_code_of_the_signal(tmp_path, number):
    words = ["certify", "--method", "gaussian", "--set", "n=100000", "--stop", "100", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-c", "from rsplugins.cli.main import main; main()", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    records = tmp_path / "run/records.jsonl"
    while not (records.exists() and records.read_text().count("\n") > 0) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == CODES[number][0], said
    assert "of 100 inputs are kept in" in said
