"""The real command line, in processes of its own."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from rsplugins.runs.manifest import Selection, read_manifest
from rsplugins.runs.merge import finish
from rsplugins.runs.record import read_file, to_lines
from rsplugins.runs.seals import manifest_text, run_seal, seal_record

TINY = ("certify", "--model", "tiny:x", "--data", "tiny")
PROGRAM = [sys.executable, "-c", "from rsplugins.cli import main; main()"]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from rsplugins.cli import main; main()"


def results(directory):
    return [record.result() for record in read_file(directory / "records.jsonl").records]


def test_one_method_several_methods_and_what_they_print(command, tmp_path):
    one = command(*TINY, "--method", "votes", "--set", "sigma=0.5", "--stride", "2", "--out", "one", "--json")
    assert one.returncode == 0, one.stderr
    answer = json.loads(one.stdout)
    assert answer["methods"][0]["summary"]["sigma"] == 0.5
    assert answer["methods"][0]["summary"]["inputs"] == 20
    assert (tmp_path / "one" / "manifest.json").exists()
    assert re.search(r"votes: 20/20 inputs, [\d.,]+ inputs/s", one.stderr)

    several = command(*TINY, "--set", "sigma=0.5", "--set", "guess.factor=3", "--out", "all")
    assert several.returncode == 1, "input 13 fails under margin and guess"
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"votes", "margin", "guess", "report.html"}
    certified, estimates = re.split(r"Estimates, l2 norm +not certificates", several.stdout)
    assert "votes" in certified
    assert "margin" in certified
    assert "guess" in estimates
    assert "guess" not in certified
    assert "needy: skipped" in several.stderr
    assert "no-such-distribution" in several.stderr
    assert "report:  all/report.html" in several.stderr

    again = command(*TINY, "--method", "votes", "--set", "sigma=0.75", "--stride", "2", "--out", "one")
    assert again.returncode == 2
    assert "parameters.sigma: 0.5 -> 0.75" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_method_that_breaks_is_named_and_the_others_go_on(tiny_cli, tmp_path):
    code, out, error = tiny_cli(*TINY, "--method", "breaks", "--method", "votes", "--out", "out", "--json")
    assert code == 1
    states = {method["method"]: method["status"] for method in json.loads(out)["methods"]}
    assert states == {"breaks": "failed", "votes": "done"}
    assert "breaks: FAILED: The certifier 'breaks' (tiny 1.2) failed while certifying" in error
    assert len(results(tmp_path / "out" / "votes")) == 40


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "vote"], "Did you mean 'votes'?"),
        (["--method", "needy"], "no-such-distribution"),
        (["--method", "votes", "--set", "sgima=1"], "Did you mean 'sigma'?"),
        (["--set", "sgima=1"], "None of the certifiers has a parameter 'sgima'. Did you mean 'sigma'?"),
        (["--set", "vote.sigma=1"], "Did you mean 'votes'?"),
        (["--method", "votes", "--set", "sigma=-1"], "sigma is -1; allowed: above 0"),
        (["--method", "votes", "--set", "sigma"], "is not key=value"),
        (["--method", "votes", "--shard", "4/4"], "from 0 to n-1"),
        (["--method", "votes", "--device", "gpu"], "'gpu' cannot be used"),
        (["--method", "votes", "--start", "99"], "start is 99"),
        (["--method", "votes", "--batch-size", "none"], "batch_size is 'none'"),
        (["--method", "votes", "--model-option", "scle=2"], "scle"),
    ],
)
def test_wrong_use_is_exit_code_2_with_the_next_step(tiny_cli, arguments, said):
    code, _, error = tiny_cli(*TINY, *arguments, "--out", "unused")
    assert (code, said in error) == (2, True), error


@pytest.fixture
def tiny_cli(tiny, tmp_path, monkeypatch, capsys):
    """Run the command line in this process, which spares the imports; returns exit code, standard output, standard error."""
    from rsplugins.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rsplugins", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    return run


def test_reading_a_run_needs_no_torch(make_run, environment, tmp_path):
    make_run("a")
    make_run("b", n=4000)

    def read(*arguments):
        line = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
        return subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)

    verified = read("verify", "a", "b")
    assert (verified.returncode, verified.stdout.count("ok: 40 claims of votes recomputed")) == (0, 2), verified.stderr
    rescored = read("rescore", "a", "--dataset-alpha", "0.05", "--out", "c")
    assert rescored.returncode == 0, rescored.stderr
    assert "alpha=0.05 over all inputs" in rescored.stdout
    assert read("verify", "c").returncode == 0
    report = read("report", "a", "c", "--format", "latex", "--html", "pages/report.html")
    assert report.returncode == 0, report.stderr
    assert r"\toprule" in report.stdout
    assert (tmp_path / "pages" / "report.html").stat().st_size < 1_000_000
    compared = read("compare", "a", "b")
    assert "| inputs in both | 40 |" in compared.stdout
    assert read("--help").returncode == 0

    tsv = tmp_path / "a" / "results.tsv"
    tsv.write_text(re.sub(r"(?m)^4\t.*$", "4\t0\t0\t8.000000\t1\t0:00:01.000000", tsv.read_text()))
    wrong = read("verify", "a")
    assert wrong.returncode == 1
    assert "input 4: " in wrong.stdout
    imported = read("import-tsv", "b/results.tsv", "--sigma", "0.25", "--alpha", "0.001", "--n", "4000", "--out", "d")
    assert imported.returncode == 0, imported.stderr
    assert read("verify", "d").returncode == 1
    assert read("rescore", "d", "--alpha", "0.01").returncode == 2
    assert read("rescore", "a").returncode == 2


def test_rescoring_10000_inputs_scores_each(make_run, environment, tmp_path):
    """How long it takes is printed by ``benchmarks/commands.py``."""
    directory = make_run("big", indices=[0, 1, 2]).directory
    manifest = read_manifest(directory).model_copy(update={"selection": Selection.of(range(10_000))})
    (directory / "manifest.json").write_text(manifest_text(manifest))
    one = read_file(directory / "records.jsonl").records[1]
    many = (replace(one, index=index, evidence={"class": index % 3, "count": 600 + index % 400}) for index in range(10_000))
    (directory / "records.jsonl").write_text("".join(to_lines(seal_record(record, run_seal(directory)) for record in many)))
    finish(directory, pages=False)
    done = subprocess.run(
        [*PROGRAM, "rescore", str(directory), "--alpha", ".01"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "10000" in done.stdout


def kill_and_resume(environment, tmp_path, kills, inputs, delay):
    line = [*PROGRAM, "certify", "--model", "tiny:x", "--data", f"tiny:{inputs}", "--method", "votes", "--set", f"delay={delay}"]
    directory = tmp_path / "run"
    generator = random.Random(7)
    torn = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [*line, "--out", str(directory)], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        records = directory / "records.jsonl"
        before = records.stat().st_size if records.exists() else 0
        until = time.monotonic() + 300
        while time.monotonic() < until and not (records.exists() and records.stat().st_size > before) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 4 * delay))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if generator.random() < 0.5:  # what a kill during a write leaves behind, which is too rare to wait for
            with records.open("ab") as file:
                file.write(b'{"index":12,"la')
            torn += 1
    last = subprocess.run([*line, "--out", str(directory)], env=environment, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    whole = subprocess.run([*line, "--out", str(tmp_path / "whole")], env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert results(directory) == results(tmp_path / "whole")
    assert len(results(directory)) == inputs
    return torn


def test_killed_and_resumed_a_run_ends_with_the_same_records(environment, tmp_path):
    assert kill_and_resume(environment, tmp_path, kills=3, inputs=25, delay=0.03) >= 1


@pytest.mark.slow
def test_killed_at_20_random_moments_a_run_ends_with_the_same_records(environment, tmp_path):
    assert kill_and_resume(environment, tmp_path, kills=20, inputs=200, delay=0.05) >= 5


def test_a_repaired_line_is_said_on_standard_error(tiny_cli, tmp_path):
    line = (*TINY, "--method", "votes", "--out", "a", "--stop", "5")
    assert tiny_cli(*line)[0] == 0
    records = tmp_path / "a" / "records.jsonl"
    whole = results(tmp_path / "a")
    records.write_bytes(records.read_bytes()[:-9])
    code, _, error = tiny_cli(*line)
    assert (code, error.count("cut a torn last line")) == (0, 1)
    assert results(tmp_path / "a") == whole


@pytest.mark.slow
def test_two_ranks_of_torchrun_equal_one_process(command, environment, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("from rsplugins.cli import main\nmain()\n")
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(program),
        *TINY,
        "--out",
        "two",
    ]
    for extra, code in ((["--method", "votes", "--json"], 0), (["--method", "votes", "--method", "breaks"], 1)):
        out = ["--out", f"two{code}"]
        done = subprocess.run([*line, *extra, *out], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert (done.returncode != 0) == bool(code), done.stderr
        if not code:
            assert json.loads(done.stdout)["methods"][0]["summary"]["inputs"] == 40, "only rank 0 prints"
    assert command(*TINY, "--method", "votes", "--out", "one").returncode == 0
    assert results(tmp_path / "two0") == results(tmp_path / "two1" / "votes") == results(tmp_path / "one")
    assert [path.name for path in (tmp_path / "two0").glob("records*")] == ["records.jsonl"]


def test_shards_on_the_command_line(tiny_cli, tmp_path):
    line = (*TINY, "--method", "votes", "--out", "a")
    code, _, error = tiny_cli(*line, "--shard", "0/2")
    assert code == 0
    assert "20 inputs are left to other shards" in error
    assert tiny_cli("merge", "a", "--out", "early")[0] == 1
    assert tiny_cli(*line, "--shard", "1/2")[0] == 0
    assert len(results(tmp_path / "a")) == 40
    assert tiny_cli("merge", "a", "early", "--out", "merged")[0] == 0
    assert results(tmp_path / "merged") == results(tmp_path / "a")


def test_stop_at_goes_to_the_methods_that_have_it(tiny_cli, tmp_path):
    assert tiny_cli(*TINY, "--stop-at", "0.25", "--stop-at", "0.5", "--stop", "3", "--out", "a")[0] == 0
    parameters = {path.parent.name: json.loads(path.read_text())["parameters"] for path in tmp_path.glob("a/*/manifest.json")}
    assert parameters["votes"]["stop_at"] == [0.25, 0.5]
    assert parameters["margin"] == {}


def test_the_same_request_finds_its_run_again(tiny_cli, tmp_path):
    line = (*TINY, "--method", "votes", "--stop", "3")
    assert tiny_cli(*line)[0] == tiny_cli(*line)[0] == tiny_cli(*line, "--batch-size", "7")[0] == 0
    assert tiny_cli(*line, "--seed", "1")[0] == 0
    assert len(list(tmp_path.glob("runs/tiny-x-tiny-*"))) == 2
