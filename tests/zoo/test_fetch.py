from __future__ import annotations

import shutil
import sys

import huggingface_hub
import pytest

import rsplugins
from rsplugins.errors import CheckpointError, UsageError
from rsplugins.models import manifest, store
from rsplugins.models.store import DEFAULT_MODEL
from rsplugins.zoo.fetch import fetch
from rsplugins.zoo.verify import verify

NAME = "digits-cnn.digits-own-v1"


@pytest.fixture
def source(model):
    """The model under a name that no other place has."""
    for file in (manifest.FILE, "recipe.toml"):
        path = model / file
        path.write_text(path.read_text().replace(DEFAULT_MODEL, NAME))
    rename(model)
    return model.rename(model.with_name(NAME))


def rename(folder):
    read = manifest.read(folder)
    from rsplugins.models.files import sha256

    recipe = read.recipe.model_copy(update={"sha256": sha256(folder / "recipe.toml")})
    (folder / manifest.FILE).write_text(manifest.dumps(read.model_copy(update={"recipe": recipe})))


def check(folder, shop):
    assert folder == shop / NAME
    assert store.find(NAME) == folder
    assert verify(folder, quick=True).problems == []
    assert rsplugins.load(f"zoo:{NAME}").num_classes == 10
    assert not [path for path in shop.iterdir() if path.name.startswith(".")]


def test_from_a_folder(source, shop):
    (folder,) = fetch(str(source))
    check(folder, shop)
    assert (folder / "README.md").is_file()


def test_from_a_folder_of_models_by_id(source, shop):
    shutil.copytree(source, source.with_name("digits-cnn.digits-other-v1"))
    edit = source.with_name("digits-cnn.digits-other-v1") / manifest.FILE
    edit.write_text(edit.read_text().replace(NAME, "digits-cnn.digits-other-v1"))
    (folder,) = fetch(str(source.parent), identifier=NAME)
    check(folder, shop)
    with pytest.raises(UsageError, match="does not hold the model no-such"):
        fetch(str(source.parent), identifier="no-such")


def test_from_hugging_face(source, shop, monkeypatch):
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name in ("hf:someone/model", "https://huggingface.co/someone/model", "someone/model"):
        check(*fetch(name), shop)
    assert {repository for repository, _ in asked} == {"someone/model"}
    assert not [pattern for _, patterns in asked for pattern in patterns if "pt" in pattern or "bin" in pattern]


def test_hugging_face_that_does_not_answer_is_explained(shop, monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="cannot be fetched from Hugging Face: Name or service not known"):
        fetch("hf:someone/model")


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.toml", "recipe.toml", "records/gaussian/records.jsonl"])
def test_an_html_page_in_place_of_a_file_is_named(source, shop, file):
    (source / file).write_text("<!DOCTYPE html><html><title>Virus scan warning</title>")
    with pytest.raises(CheckpointError, match="is an HTML page"):
        fetch(str(source))
    assert list(shop.iterdir()) == []


@pytest.mark.parametrize("file", ["model.safetensors", "recipe.toml", "records/predict/records.jsonl"])
def test_a_file_of_another_hash_is_refused_and_what_was_there_stays(source, shop, file):
    (folder,) = fetch(str(source))
    before = (folder / file).read_bytes()
    (source / file).write_bytes(before[:-1] + b" ")
    with pytest.raises(CheckpointError, match=f"{file} of {NAME} is not the file of its manifest"):
        fetch(str(source))
    assert (folder / file).read_bytes() == before


def test_an_incomplete_copy_is_refused(source, shop):
    address = str(source)
    shutil.move(source / "records" / "gaussian" / "records.jsonl", source / "lost")
    with pytest.raises(CheckpointError, match=r"has no records/gaussian/records\.jsonl"):
        fetch(address)
    shutil.rmtree(source / "records" / "gaussian")
    with pytest.raises(CheckpointError, match="has no evidence in records/gaussian"):
        fetch(address)
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        fetch(address)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("https://example.org/model.zip", "is no folder"),
        ("./no/such/folder", "is no folder"),
        ("nothing", "is no folder"),
        (__file__, "is no folder"),
    ],
)
def test_sources_that_are_none_are_explained(shop, where, text):
    with pytest.raises(UsageError, match=text):
        fetch(where)


def test_a_folder_without_a_manifest(shop, tmp_path):
    with pytest.raises(UsageError, match=r"there is no manifest\.toml"):
        fetch(str(tmp_path))


def test_only_what_the_manifest_names_is_brought(source, shop):
    (source / "evil.pt").write_bytes(b"pickle")
    (folder,) = fetch(str(source))
    assert {path.name for path in folder.iterdir()} == {
        "manifest.toml", "model.safetensors", "recipe.toml", "records", "README.md", "curve.png",
    }  # fmt: skip


def test_what_was_fetched_into_the_cache_is_found_but_never_comes_first(source, tmp_path, monkeypatch):
    monkeypatch.delenv("RSPLUGINS_ZOO", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder,) = fetch(str(source))
    assert folder == tmp_path / "cache" / "rsplugins" / "zoo" / NAME
    assert store.find(NAME) == folder
    shutil.copytree(folder, folder.with_name(DEFAULT_MODEL))
    assert store.find(DEFAULT_MODEL) != folder.with_name(DEFAULT_MODEL)


def test_the_command_says_where_the_model_went(source, shop, monkeypatch, capsys):
    from rsplugins.cli import main

    monkeypatch.setattr(sys, "argv", ["rsplugins", "zoo", "fetch", str(source)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == f"{NAME}: {shop / NAME}"


def test_another_model_of_that_name_is_not_replaced(source, shop):
    (place,) = fetch(str(source), destination=shop)
    fetch(str(source), destination=shop)  # the same again is fine
    (place / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"has files of its own \(notes.txt\)"):
        fetch(str(source), destination=shop)
    (place / "notes.txt").unlink()
    text = (place / manifest.FILE).read_text()
    (place / manifest.FILE).write_text(text.replace("Gaussian", "My own", 1))
    with pytest.raises(UsageError, match="is another version of it"):
        fetch(str(source), destination=shop)
    assert "My own" in (place / manifest.FILE).read_text()
    assert [path.name for path in shop.glob(".fetch-*")] == []
