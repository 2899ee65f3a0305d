from __future__ import annotations

import pytest

from rsplugins.errors import ParameterError, UnknownNameError, UsageError
from rsplugins.parameters import parse_settings
from rsplugins.training import Gairat, Trainer, load_recipe
from rsplugins.training.recipe import to_toml
from rsplugins.training.registry import make_hook

TEXT = """
name = "mnist-at"
[data]
name = "mnist"
crop = 2
[model]
architecture = "mnist_cnn"
mean = [0.1307]
std = [0.3081]
arguments = {width = 8}
[training]
epochs = 10
[schedule]
name = "multistep"
milestones = [5, 8]
[[hooks]]
name = "gairat"
eps = "8/255"
lambda_ = inf
burn_in = 3
"""


def _write(path, text):
    path.write_text(text)
    return path


def test_a_recipe_survives_being_written_and_read(tmp_path):
    recipe = load_recipe(_write(tmp_path / "a.toml", TEXT))
    again = load_recipe(_write(tmp_path / "b.toml", to_toml(recipe)))
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    assert recipe.model.arguments == {"width": 8}
    assert isinstance(make_hook(recipe.hooks[0]), Gairat)


def test_overrides_reach_nested_keys(tmp_path):
    overrides = parse_settings(["training.epochs=9", "data.name=digits", "seed=3", "schedule.milestones=[4]"], "--set")
    recipe = load_recipe(_write(tmp_path / "a.toml", TEXT), overrides)
    assert (recipe.training.epochs, recipe.data.name, recipe.seed, recipe.schedule.milestones) == (9, "digits", 3, (4,))
    with pytest.raises(UsageError, match="key=value"):
        parse_settings(["epochs"], "--set")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("epochs = 10", "epoch = 10", "Did you mean 'epochs'?"),
        ("[training]", "[trainning]", "Did you mean 'training'?"),
        ('name = "multistep"', 'name = "multi-step"', "Did you mean 'multistep'?"),
        ("milestones = [5, 8]", "milestones = [5, 12]", "outside the 10 epochs"),
        ("milestones = [5, 8]", "milestones = [5, 8]\nwarmup = 10", "would only grow"),
        ("milestones = [5, 8]", "", "takes increasing milestones"),
        ("std = [0.3081]", "std = [0.0]", "above 0"),
        ('architecture = "mnist_cnn"', "", "lacks 'architecture'"),
        ('name = "gairat"', "", "has no name"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, old, new, text):
    assert old in TEXT
    with pytest.raises(ParameterError, match=text.replace("[", r"\[")):
        load_recipe(_write(tmp_path / "a.toml", TEXT.replace(old, new)))


def test_a_missing_or_torn_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="not a readable TOML"):
        load_recipe(_write(tmp_path / "a.toml", "name = "))


@pytest.mark.parametrize(
    ("old", "new", "kind", "text"),
    [
        ('name = "gairat"', 'name = "gairt"', UnknownNameError, "Did you mean 'gairat'?"),
        ("burn_in = 3", "burnin = 3", ParameterError, "Did you mean 'burn_in'?"),
        ("burn_in = 3", "burn_in = 10", ParameterError, "would ever be reweighted"),
        ('"8/255"', "8", ParameterError, "8/255"),
    ],
)
def test_wrong_hooks_are_refused_before_data_are_looked_for(tmp_path, old, new, kind, text):
    recipe = load_recipe(_write(tmp_path / "a.toml", TEXT.replace(old, new)))
    with pytest.raises(kind, match=text.replace("?", r"\?")):
        Trainer(recipe, tmp_path / "out", data_root=tmp_path / "nowhere", device="cpu")
