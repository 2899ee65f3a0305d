from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import beta, norm

from rsplugins.certification import prepare
from rsplugins.certifier import Execution
from rsplugins.data import load
from rsplugins.errors import CheckpointError
from rsplugins.host import get_host
from rsplugins.models import manifest
from rsplugins.models.store import DEFAULT_MODEL
from rsplugins.models.zoo import load_folder
from rsplugins.runs.execute import execute
from rsplugins.runs.imports import claimed_parameters, import_log
from rsplugins.zoo import evidence
from rsplugins.zoo.add import add_evidence, update
from rsplugins.zoo.sample import compare
from rsplugins.zoo.verify import verify

ZOO = Path(__file__).resolve().parents[2] / "zoo"
MODELS = sorted(path.parent for path in ZOO.glob(f"*/{manifest.FILE}"))


def edit(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


@pytest.mark.parametrize("folder", MODELS, ids=[folder.name for folder in MODELS])
def test_every_model_of_the_zoo_is_what_it_says(folder):
    report = verify(folder, quick=True)
    assert report.problems == []
    weighs = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert weighs < 40_000_000
    read = manifest.read(folder)
    assert report.numbers == len(read.results)
    assert bool(read.results) != bool(read.no_weights)


def test_the_whole_zoo_is_small_and_names_no_place_of_a_machine():
    files = [path for path in ZOO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000_000
    places = {f"/{folder.name}/" for folder in Path("/").iterdir() if folder.is_dir()}
    for path in files:
        if path.suffix in (".toml", ".json", ".md"):
            # A path that begins at the root of a machine; "/data/" inside an address is none.
            named = {found for found in re.findall(r"(?<![\w./])/[\w.-]+/", path.read_text()) if found in places}
            assert not named, path


def test_the_default_is_run_again():
    report = verify(ZOO / DEFAULT_MODEL)
    assert report.problems == []
    assert report.rerun == ["predict on 64 inputs", "gaussian on 3 inputs"]


def test_the_certified_numbers_follow_from_the_votes_by_the_textbook():
    """Against Clopper-Pearson written out here; shares no code with the package."""
    folder = ZOO / DEFAULT_MODEL / "records" / "gaussian"
    run = json.loads((folder / "manifest.json").read_text())["parameters"]
    radii = []
    for line in (folder / "records.jsonl").read_text().splitlines():
        row = json.loads(line)
        chosen = max(row["evidence"]["selection"], key=lambda name, votes=row["evidence"]["selection"]: (votes[name], -int(name)))
        count = row["evidence"]["estimation"].get(chosen, 0)
        low = beta.ppf(run["alpha"], count, run["n"] - count + 1) if count else 0.0
        radii.append(run["sigma"] * norm.ppf(low) if low > 0.5 and int(chosen) == row["label"] else -1.0)
    results = {(result.metric, result.radius): result for result in manifest.read(ZOO / DEFAULT_MODEL).results}
    assert results["acr", None].value == pytest.approx(sum(max(radius, 0) for radius in radii) / 360, abs=2e-6)
    for at in (0.25, 0.5, 0.75):
        assert results["certified_accuracy", at].value == pytest.approx(sum(radius >= at for radius in radii) / 360, abs=2e-6)
    assert (results["acr", None].n, results["acr", None].alpha) == (10_000, 0.001)


DAMAGE = {
    "a better number": (
        "manifest.toml",
        'metric = "acr"\nvalue = 0.',
        'metric = "acr"\nvalue = 9.',
        "acr by gaussian: value is 9.",
    ),
    "another alpha": ("manifest.toml", "alpha = 0.001", "alpha = 0.0001", "alpha is 0.0001, recomputed 0.001"),
    "an invented number": ("manifest.toml", "radius = 0.75", "radius = 0.76", "at 0.76 by gaussian: no such number follows"),
    "a larger sigma": ("records/gaussian/manifest.json", '"sigma": 0.25', '"sigma": 0.5', "sigma is 0.25, recomputed 0.5"),
    "votes added": ("records/gaussian/records.jsonl", '"0":9999,"9":1', '"0":10000', "records_sha256 is"),
    "a record lost": (
        "records/gaussian/records.jsonl",
        '{"index":0,',
        '{"index":1000,',
        "1 inputs of the selection have no record, 1 others have one",
    ),
    "a prediction": (
        "records/predict/records.jsonl",
        '"evidence":{"prediction":0}',
        '"evidence":{"prediction":1}',
        "accuracy: value is 0.991667",
    ),
    "other weights": (
        "records/predict/manifest.json",
        '"sha256": "',
        '"sha256": "0',
        "is about other weights (0",
    ),
    "another seed": ("manifest.toml", "seed = 0", "seed = 1", "training.seed is 1, the recipe says 0"),
    "more epochs": ("manifest.toml", "\nepochs = 300", "\nepochs = 30", "training.epochs is 30, the recipe says 300"),
    "another data set": (
        "manifest.toml",
        '\ndata = "digits"',
        '\ndata = "mnist"',
        "recipe.data is 'mnist', the recipe says 'digits'",
    ),
    "other terms": ("manifest.toml", 'data = "CC BY 4.0', 'data = "MIT', "what is known of digits: 'CC BY 4.0"),
    "another normalisation": ("manifest.toml", "std = [0.376]", "std = [0.4]", "input.std is"),
    "not JSON": ("records/predict/manifest.json", "{", "", "manifest.json cannot be read"),
    "another recipe": ("recipe.toml", "epochs = 300", "epochs = 30", "recipe.toml has sha256"),
    "a recipe's name": ("recipe.toml", 'name = "digits-cnn.digits', 'name = "cnn.digits', "is not the recipe of"),
    "no licence": ("manifest.toml", 'weights = "Apache-2.0"', 'weights = "unknown"', "licences.weights is 'unknown'"),
    "another dtype": ("manifest.toml", 'dtype = "float16"', 'dtype = "bfloat16"', "holds float16, not bfloat16"),
    "the schema": ("manifest.toml", "schema_version = 1", "schema_version = 2", "not a valid manifest: schema_version"),
}


@pytest.mark.parametrize(("file", "old", "new", "text"), DAMAGE.values(), ids=DAMAGE)
def test_what_was_changed_is_found_and_named(model, file, old, new, text):
    edit(model / file, old, new)
    problems = verify(model, quick=True).problems
    assert any(text in problem for problem in problems), problems


def test_weights_of_another_length_or_content_are_found(model):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (problem,) = verify(model, quick=True).problems
    assert "model.safetensors has sha256" in problem
    path.write_bytes(whole[:-100])
    assert any("its length is not what the header says" in problem for problem in verify(model, quick=True).problems)
    path.write_bytes(b"<!DOCTYPE html><title>Sign in</title>")
    assert any("is an HTML page" in problem for problem in verify(model, quick=True).problems)
    path.unlink()
    assert verify(model, quick=True).problems == ["model.safetensors is missing"]


def test_evidence_without_a_number_and_a_folder_of_another_name_are_found(model):
    text = (model / manifest.FILE).read_text()
    (model / manifest.FILE).write_text(text[: text.rindex("[[results]]")])
    moved = model.rename(model.with_name("another.name-v1"))
    problems = verify(moved, quick=True).problems
    assert any("follows from the records and is not in the manifest" in problem for problem in problems)
    assert any("the folder is named another.name-v1" in problem for problem in problems)


def test_running_again_finds_evidence_that_another_function_made(model):
    """Votes of the right form, hash and sum that the model does not give: only the model can tell."""
    records = model / "records" / "gaussian" / "records.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    for row in rows:
        row["evidence"] = {"selection": {str(row["label"]): 100}, "estimation": {str(row["label"]): 6000, "11": 4000}}
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = manifest.read(model)
    kept = [result for result in read.results if result.records != "gaussian"] + evidence.measure(model, "gaussian")
    (model / manifest.FILE).write_text(manifest.dumps(read.model_copy(update={"results": tuple(kept)})))
    assert verify(model, quick=True).problems == []
    problems = verify(model).problems
    assert any("records/gaussian: input 0: estimation: class 0 had 6000 of 10000 votes" in problem for problem in problems)


def test_data_that_are_not_there_are_said(model, tmp_path):
    edit(model / "records/predict/manifest.json", '"reference": "digits"', '"reference": "mnist"')
    edit(model / "manifest.toml", 'data = "digits"\nsplit', 'data = "mnist"\nsplit')
    read = manifest.read(model)
    kept = evidence.measure(model, "predict") + evidence.measure(model, "gaussian")
    (model / manifest.FILE).write_text(manifest.dumps(read.model_copy(update={"results": tuple(kept)})))
    report = verify(model, data_root=tmp_path)
    assert report.problems == []
    assert report.rerun == ["gaussian on 3 inputs"]
    assert any("records/predict was not run again: mnist (test) was not found" in note for note in report.notes)


@pytest.mark.parametrize(
    ("there", "here", "differs"),
    [
        ({"estimation": {"3": 10_000}}, {"estimation": {"3": 999, "4": 1}}, False),
        ({"estimation": {"3": 10_000}}, {"estimation": {"3": 950, "4": 50}}, True),
        ({"estimation": {"3": 5_000, "4": 5_000}}, {"estimation": {"3": 460, "4": 540}}, False),
        ({"margins": [0.5, 1.0], "eps": None}, {"margins": [0.50001, 1.0], "eps": None}, False),
        ({"margins": [0.5, 1.0]}, {"margins": [0.6, 1.0]}, True),
        ({"margins": [0.5]}, {"margins": [0.5, 1.0]}, True),
        ({"margins": [0.5]}, {}, True),
    ],
)
def test_evidence_agrees_up_to_chance_and_rounding(there, here, differs):
    assert bool(list(compare(there, here))) == differs


def test_verifying_quickly_imports_no_torch():
    code = (
        "import sys\nfrom pathlib import Path\nfrom rsplugins.zoo.verify import verify\n"
        f"report = verify(Path({str(ZOO / DEFAULT_MODEL)!r}), quick=True)\n"
        "assert report.numbers > 3 and not report.problems\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", ["repeated", "dropped", "an attack left out"])
def test_chosen_inputs_of_an_attack_are_no_evidence(tmp_path, change):
    """What survived, repeated to the planned number or alone, would give an accuracy of 1."""
    folder = shutil.copytree(ZOO / "mnist-cnn.mnist-at-v1", tmp_path / "mnist-cnn.mnist-at-v1")
    path = folder / "records" / "attack" / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    survived = [row for row in rows if row["evidence"]["survived"]["autoattack"]]
    if change == "repeated":
        rows = (survived * 2)[: len(rows)]
    elif change == "dropped":
        rows = survived
    else:
        del rows[1]["evidence"]["survived"]["autoattack"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "not all attacked in the same way" if change == "an attack left out" else "inputs of the selection have no record"
    with pytest.raises(CheckpointError, match=said):
        update(folder)
    assert any(said in problem for problem in verify(folder, quick=True).problems)


def test_chosen_inputs_of_a_run_are_no_evidence(model):
    place = model / "records" / "gaussian"
    lines = (place / "records.jsonl").read_text().splitlines(keepends=True)
    (place / "records.jsonl").write_text("".join(lines[:100]))
    with pytest.raises(CheckpointError, match="260 inputs of the selection have no record"):
        update(model)
    (place / "records.jsonl").write_text("".join(lines))
    update(model)


def test_an_imported_log_is_no_evidence(model, tmp_path):
    (tmp_path / "log.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t0\t0\t0.5\t1\t0:00:01\n")
    claimed = claimed_parameters(guarantee="probabilistic", norm="l2", alpha=0.001, sigma=0.25, n=10_000)
    import_log(tmp_path / "log.tsv", tmp_path / "log", method="gaussian", claimed=claimed)
    place = model / "records" / "gaussian"
    for name in ("manifest.json", "records.jsonl"):
        shutil.copyfile(tmp_path / "log" / name, place / name)
    with pytest.raises(CheckpointError, match="imported from another program"):
        evidence.measure(model, "gaussian")


def test_scores_and_adaptive_numbers_of_samples_are_run_again(model, tmp_path):
    for method in ("gaussian-soft", "covariance-guided"):
        entry, classifier, data = get_host().find("certifier", method), load_folder(model), load("digits")
        certifier = prepare(entry, classifier, {"sigma": 0.25, "n": 1500}, Execution())
        execute(entry, certifier, data, range(4), tmp_path / method)
        add_evidence(model, tmp_path / method, method)
    report = verify(model)
    assert report.problems == []
    assert {"gaussian-soft on 3 inputs", "covariance-guided on 3 inputs"} <= set(report.rerun)


@pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto-LiRPA is not installed")
def test_bounds_are_run_again_though_their_dtype_is_named_as_the_calls(model, tmp_path):
    entry, classifier, data = get_host().find("certifier", "ibp"), load_folder(model), load("digits")
    certifier = prepare(entry, classifier, {"eps": 0.001}, Execution())
    execute(entry, certifier, data, range(4), tmp_path / "ibp")
    add_evidence(model, tmp_path / "ibp", "ibp")
    report = verify(model)
    assert report.problems == []
    assert "ibp on 3 inputs" in report.rerun


def test_other_scores_are_seen():
    there = {"estimation": {"n": 1000, "sums": {"3": 900.0, "5": 100.0}, "squares": {}}}
    assert not list(compare(there, {"estimation": {"n": 500, "sums": {"3": 440.0, "5": 60.0}}}))
    other = list(compare(there, {"estimation": {"n": 500, "sums": {"3": 100.0, "5": 400.0}}}))
    assert sorted(other) == [
        "estimation: class 3 had a mean score of 0.9000, now 0.2000",
        "estimation: class 5 had a mean score of 0.1000, now 0.8000",
    ]
