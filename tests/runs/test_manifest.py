from __future__ import annotations

import pytest

from rsplugins.errors import RunError, UsageError
from rsplugins.provenance import versions
from rsplugins.runs.manifest import MANIFEST, Manifest, Selection, difference, read_manifest, write_manifest

BASE = Manifest(method="votes", parameters={"sigma": 0.25, "n": 100}, selection=Selection.of([0, 20, 40]), model={"sha256": "aa"})


@pytest.mark.parametrize("indices", [[0], [5], [0, 1, 2], [3, 23, 43], [7, 3], [1, 2, 4], [9, 5, 1]])
def test_a_selection_gives_back_its_indices_in_order(indices):
    selection = Selection.of(indices)
    assert selection.indices() == indices
    assert Selection.model_validate_json(selection.model_dump_json()).indices() == indices


@pytest.mark.parametrize("indices", [[], [1, 1], [2, 3, 2]])
def test_an_empty_or_repeated_selection_is_refused(indices):
    with pytest.raises(UsageError):
        Selection.of(indices)


def test_a_manifest_is_written_once_and_read_back(tmp_path):
    assert write_manifest(tmp_path / "run", BASE) == BASE
    again = BASE.model_copy(update={"created": "later", "execution": {"batch_size": 7}})
    assert write_manifest(tmp_path / "run", again) == BASE
    assert read_manifest(tmp_path / "run") == BASE


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"parameters": {"sigma": 0.5, "n": 100}}, "parameters.sigma: 0.25 -> 0.5"),
        ({"parameters": {"n": 100}}, "parameters.sigma: 0.25 -> (not set)"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' -> 'bfloat16'"),
        ({"compile": True}, "compile: False -> True"),
        ({"method": "margin"}, "method: 'votes' -> 'margin'"),
        ({"model": {"sha256": "bb"}}, "model.sha256: 'aa' -> 'bb'"),
        ({"data": {"sha256": "cc"}}, "data.sha256: (not set) -> 'cc'"),
        ({"selection": Selection.of([0, 20])}, "selection.stop: 41 -> 21"),
    ],
)
def test_other_parameters_are_refused_with_the_difference(tmp_path, change, line):
    write_manifest(tmp_path, BASE)
    changed = BASE.model_copy(update=change)
    assert line in difference(BASE, changed)
    with pytest.raises(UsageError) as caught:
        write_manifest(tmp_path, changed)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"execution": {"batch_size": 9}}, {"command": ["x"]}, {"model": {"sha256": "aa", "reference": "else"}}]
)
def test_what_results_do_not_depend_on_is_no_difference(change):
    assert difference(BASE, BASE.model_copy(update=change)) == []


def test_a_missing_or_damaged_manifest_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="not a run directory"):
        read_manifest(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / MANIFEST).write_text("{}")
    with pytest.raises(UsageError, match="it holds the runs inner"):
        read_manifest(tmp_path)
    with pytest.raises(RunError, match="damaged: method"):
        read_manifest(tmp_path / "inner")


def test_records_without_a_manifest_are_not_overwritten(tmp_path):
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(RunError, match=r"no manifest\.json"):
        write_manifest(tmp_path, BASE)


def test_versions_name_python_and_torch_without_importing_it():
    assert {"python", "rsplugins", "torch", "scipy"} <= versions().keys()


def test_another_network_with_the_same_weights_is_another_run_and_older_runs_go_on():
    ours = Manifest(method="gaussian", parameters={}, selection=Selection.of([0]), model={"sha256": "a", "structure": "b"})
    other = ours.model_copy(update={"model": {"sha256": "a", "structure": "c"}})
    older = ours.model_copy(update={"model": {"sha256": "a"}})
    assert difference(ours, other) == ["model.structure: 'b' -> 'c'"]
    assert difference(ours, older) == difference(older, ours) == []
    assert difference(ours, ours.model_copy(update={"model": {"sha256": "x", "structure": "b"}})) == ["model.sha256: 'a' -> 'x'"]
