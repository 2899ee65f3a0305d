from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import rsplugins
from rsplugins.cli import main
from rsplugins.errors import UsageError
from rsplugins.models import manifest
from rsplugins.models.store import DEFAULT_MODEL
from rsplugins.zoo import cards
from rsplugins.zoo.fetch import fetch
from rsplugins.zoo.publish import front_matter, publish, upload

ZOO = Path(__file__).resolve().parents[2] / "zoo"
MODELS = {path.parent.name: manifest.read(path.parent) for path in sorted(ZOO.glob(f"*/{manifest.FILE}"))}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `rsplugins zoo ...`; returns exit code and what was printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["rsplugins", "zoo", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", MODELS)
def test_the_card_of_every_model_is_the_one_its_manifest_gives(name):
    has_curve = (ZOO / name / cards.CURVE).is_file()
    assert (ZOO / name / cards.CARD).read_text() == cards.card(MODELS[name], curve=has_curve)
    assert has_curve == bool(MODELS[name].results)


def test_the_table_of_the_zoo_is_the_one_its_manifests_give():
    figures = {path.stem.removeprefix("curves-"): path.name for path in ZOO.glob("curves-*.png")}
    assert (ZOO / cards.CARD).read_text() == cards.table(list(MODELS.values()), figures)
    text = (ZOO / cards.CARD).read_text()
    assert all(f"[{name}](./{name})" in text for name in MODELS)


def test_the_curves_of_a_data_set_say_how_many_inputs_and_tell_models_apart():
    models = [(ZOO / name, read) for name, read in MODELS.items() if "cifar10-jpeg" in name]
    axes = cards.data_figure(models).axes[0]
    certified = [{result.images for result in read.results if result.metric == "acr"} for _, read in models]
    counts = [str(count) for count in sorted(set().union(*certified))]
    assert len(counts) > 1
    assert axes.get_title(loc="left") == f"cifar10-jpeg, {' or '.join(counts)} inputs each"
    labels = [line.get_label().partition(":")[0] for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert len(labels) == len(set(labels)) == sum(map(bool, certified))
    assert "resnet18.cifar10-jpeg-gaussian025-small-v1" in labels


def test_estimates_and_attacks_never_stand_under_a_certified_heading():
    shared = {"images": 10, "data": "digits", "split": "test", "norm": "linf", "records": "x", "records_sha256": "0" * 64}
    made = [
        manifest.Result(
            metric="accuracy_at_estimated_radius", value=0.9, guarantee="estimate", certifier="etb", radius=0.1, **shared
        ),
        manifest.Result(
            metric="accuracy_under_attack", value=0.8, guarantee="empirical", certifier="PGD-20", radius=0.1, **shared
        ),
        manifest.Result(metric="certified_accuracy", value=0.7, guarantee="deterministic", certifier="ibp", radius=0.1, **shared),
    ]
    text = cards.card(MODELS[DEFAULT_MODEL].model_copy(update={"results": tuple(made)}), curve=False)
    parts = {part.splitlines()[0]: part for part in text.split("## ")}
    certified = [
        heading for heading, part in parts.items() if heading.startswith("Certified") and ("90.00" in part or "80.00" in part)
    ]
    assert not certified
    assert "70.00 %" in parts["Certified, for every input in the ball"]
    assert "90.00 %" in parts["Estimates, not certificates"]
    assert "80.00 %" in parts["Attacked: what survives is not proved"]
    assert cards.headline(made) == ["70.00 % at linf 0.1 by ibp, 10 inputs"]


def test_the_command_on_a_card_is_one_for_what_the_model_is_for():
    shared = {"images": 10, "data": "digits", "split": "test", "norm": "linf", "records": "x", "records_sha256": "0" * 64}
    bound = manifest.Result(
        metric="certified_accuracy", value=0.7, guarantee="deterministic", certifier="ibp", radius=0.3, **shared
    )
    attack = manifest.Result(
        metric="accuracy_under_attack", value=0.8, guarantee="empirical", certifier="PGD-20", radius=0.3, **shared
    )

    def command(*results):
        text = cards.card(MODELS[DEFAULT_MODEL].model_copy(update={"results": results}), curve=False)
        return next(line.strip() for line in text.splitlines() if line.startswith("    rsplugins"))

    model = f"--model zoo:{DEFAULT_MODEL} --data digits"
    assert command(attack) == f"rsplugins attack {model} --eps 0.3 --stride 1 --out attacked"
    assert command(attack, bound) == f"rsplugins certify {model} --method ibp --set eps=0.3"
    assert command(*MODELS[DEFAULT_MODEL].results) == f"rsplugins certify {model} --method gaussian --set sigma=0.25"
    wider = [result.model_copy(update={"sigma": result.sigma and 0.5}) for result in MODELS[DEFAULT_MODEL].results]
    assert command(*wider).endswith("--method gaussian --set sigma=0.5")


def test_numbers_are_printed_rounded_down():
    shared = {"images": 3, "data": "d", "split": "test", "records": "x", "records_sha256": "0" * 64}
    assert cards.shown(manifest.Result(metric="acr", value=0.56949, **shared)) == "0.5694"
    assert cards.shown(manifest.Result(metric="accuracy", value=0.666667, **shared)) == "66.66 %"
    assert cards.shown(manifest.Result(metric="accuracy", value=0.29, **shared)) == "29.00 %"


def test_the_command_writes_cards_and_the_table(model, command):
    for name in (cards.CARD, cards.CURVE):
        (model / name).unlink(missing_ok=True)
    code, printed = command("card", "--zoo", model.parent)
    assert code == 0
    assert len(printed.splitlines()) == 2
    for file in (model / cards.CURVE, model.parent / "curves-digits.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert f"[{DEFAULT_MODEL}]" in (model.parent / cards.CARD).read_text()


def test_publishing_writes_what_hugging_face_reads(tmp_path):
    folder = publish(ZOO / DEFAULT_MODEL, tmp_path / "out")
    card = ModelCard.load(folder / "README.md")
    found = card.data.to_dict()
    assert (found["license"], found["pipeline_tag"]) == ("apache-2.0", "image-classification")
    results = {
        (result.metric_type, result.metric_args.get("radius") if result.metric_args else None): result
        for result in card.data.eval_results
    }
    for result in MODELS[DEFAULT_MODEL].results:
        assert results[result.metric, result.radius].metric_value == result.value
    assert results["acr", None].dataset_name == "digits"
    assert results["acr", None].metric_args["alpha"] == 0.001
    assert "probabilistic" in results["acr", None].metric_name
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_labels"], config["shape"], config["mean"]) == (10, [1, 8, 8], [0.305])
    assert (folder / "model.safetensors").read_bytes() == (ZOO / DEFAULT_MODEL / "model.safetensors").read_bytes()


@pytest.mark.parametrize("manifest", MODELS.values(), ids=list(MODELS))
def test_no_two_published_numbers_of_a_model_have_one_name(manifest):
    lines = dict(line.split(": ", 1) for line in front_matter(manifest).splitlines())
    (model,) = json.loads(lines["model-index"])
    metrics = [metric["name"] for group in model["results"] for metric in group["metrics"]]
    assert len(set(metrics)) == len(metrics) == len(manifest.results)


def test_what_was_published_can_be_fetched_and_loaded(tmp_path, shop):
    publish(ZOO / DEFAULT_MODEL, tmp_path / "out")
    (folder,) = fetch(str(tmp_path / "out"))
    loaded = rsplugins.load(f"zoo:{DEFAULT_MODEL}")
    assert folder.parent == shop
    assert loaded.fingerprint() == MODELS[DEFAULT_MODEL].function_sha256


def test_nothing_is_uploaded_without_a_token(tmp_path, command, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UsageError, match="without a token"):
        upload(tmp_path, "someone/model", None)
    code, _ = command("publish", tmp_path / "out", "--model", DEFAULT_MODEL, "--repo", "someone/model")
    assert code == 2
    assert not (tmp_path / "out").exists()


def test_the_command_uploads_with_a_token(tmp_path, command, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repository, exist_ok):
            return f"https://hub/{repository}"

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    code, printed = command("publish", tmp_path / "out", "--model", DEFAULT_MODEL, "--repo", "someone/model", "--token", "secret")
    assert code == 0
    assert "https://hub/someone/model" in printed
    assert calls[0] == "secret"
    assert calls[1][0] == "someone/model"
    assert {"README.md", "config.json", "manifest.toml", "model.safetensors", "recipe.toml"} <= set(calls[1][1])


def test_a_model_whose_numbers_do_not_follow_is_not_published(model, tmp_path):
    path = model / manifest.FILE
    path.write_text(path.read_text().replace("value = 0.99", "value = 0.98"))
    with pytest.raises(UsageError, match="is not published: accuracy: value is"):
        publish(model, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="is not empty"):
        publish(ZOO / DEFAULT_MODEL, tmp_path / "full")


def test_a_model_without_weights_is_not_published(tmp_path):
    name = next(name for name, read in MODELS.items() if read.no_weights)
    with pytest.raises(UsageError, match="no weights to publish"):
        publish(ZOO / name, tmp_path / "out")


def test_list_and_show(command):
    code, printed = command("list")
    assert code == 0
    assert all(name in printed for name in MODELS)
    code, printed = command("list", "--json")
    assert {entry["id"] for entry in json.loads(printed)} >= set(MODELS)
    code, printed = command("show", DEFAULT_MODEL)
    assert "average certified radius" in printed
    code, printed = command("show", "digits-cnn.digits-gausian025-v2")
    assert code == 2


def test_verify_exits_with_one_and_says_what_differs(model, command):
    code, printed = command("verify", model, "--quick")
    assert (code, printed.split()[0]) == (0, "ok")
    path = model / manifest.FILE
    path.write_text(path.read_text().replace("value = 0.99", "value = 0.98"))
    code, printed = command("verify", model, "--quick")
    assert code == 1
    assert "accuracy: value is 0.981667, recomputed 0.991667" in printed
    code, printed = command("verify", model, "--quick", "--json")
    (report,) = json.loads(printed)
    assert (code, report["ok"]) == (1, False)
