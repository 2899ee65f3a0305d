"""Bring a model here: from a folder, or from Hugging Face.

Only the files that a manifest names are taken, and nothing is loaded: hashes are checked first, and no file is unpickled, ever.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rsplugins.errors import CheckpointError, UsageError
from rsplugins.models import manifest as manifests
from rsplugins.models import store
from rsplugins.models.files import check_head, sha256
from rsplugins.models.manifest import Manifest

_EVIDENCE = ("manifest.json", "records.jsonl")
_EXTRA = ("README.md", "curve.png")
_HUB = re.compile(r"(?:hf:|https://huggingface\.co/)?([\w.-]+/[\w.-]+?)/?")

Read = Callable[[str], bytes | None]
"""Returns the contents of a file by its relative name, or None when there is no such file."""


def fetch(source: str, *, identifier: str = "", destination: Path | None = None) -> list[Path]:
    """Copy one model, or all models of a folder, to where ``zoo:`` finds them.

    Args:
        source: a folder, or ``hf:OWNER/NAME``.
        identifier: takes this model only.
        destination: a folder of models; by default ``RSPLUGINS_ZOO``, else the user's cache.

    Returns:
        The models' folders.

    Raises:
        UsageError: the source does not exist, or holds no model.
        CheckpointError: a file is not what its manifest says, is missing, or is an HTML page.
    """
    home = destination or Path(os.environ.get("RSPLUGINS_ZOO") or store.cache())
    home.mkdir(parents=True, exist_ok=True)
    chosen = [(name, read) for name, read in _models(source) if identifier in ("", name)]
    if not chosen:
        what = f"the model {identifier}" if identifier else "a model: there is no manifest.toml"
        raise UsageError(f"{source} does not hold {what}.", fix="Give a folder with a manifest.toml, or one of such folders.")
    return [_take(read, home, source) for _, read in chosen]


def _take(read: Read, home: Path, source: str) -> Path:
    """Copy one model beside its place, check it, and move it there."""
    with tempfile.TemporaryDirectory(dir=home, prefix=".fetch-") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        _copy(read, manifests.FILE, folder, source)
        manifest = manifests.read(folder)
        for name in names(manifest):
            _copy(read, name, folder, source)
        for directory in sorted({result.records for result in manifest.results}):
            _copy_evidence(read, f"records/{directory}", folder, source)
        for name in _EXTRA:
            if (data := read(name)) is not None:
                (folder / name).write_bytes(data)
        check(folder, manifest)
        place = home / manifest.id
        if place.exists():
            _check_same(place, folder)
            place.rename(Path(temporary) / "old")
        folder.rename(place)
    return place


def _check_same(place: Path, folder: Path) -> None:
    """Refuse to replace another model: it may be the only copy.

    Raises:
        UsageError: what lies there has another manifest, or files that were not fetched.
    """
    there, here = place / manifests.FILE, folder / manifests.FILE
    known = {file.relative_to(folder) for file in folder.rglob("*")} | {Path(name) for name in _EXTRA}
    others = sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.relative_to(place) not in known)
    if others or not there.is_file() or there.read_bytes() != here.read_bytes():
        what = f"has files of its own ({others[0]})" if others else "is another version of it"
        raise UsageError(
            f"{place} is there already and {what}.",
            cause="fetching would replace it, and it may be the only copy.",
            fix="Move or remove that folder, or fetch to another one with --to.",
        )


def names(manifest: Manifest) -> list[str]:
    """Return the files that a manifest names, the evidence apart."""
    recipe = [] if manifest.recipe is None else [manifest.recipe.file]
    return [*recipe, *(weights.file for weights in manifest.weights)]


def check(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its hash.

    Raises:
        CheckpointError: one differs.
    """
    expected = {weights.file: weights.sha256 for weights in manifest.weights}
    expected |= {} if manifest.recipe is None else {manifest.recipe.file: manifest.recipe.sha256}
    for result in manifest.results:
        expected[f"records/{result.records}/{_EVIDENCE[-1]}"] = result.records_sha256
    for name, wanted in expected.items():
        if (found := sha256(folder / name)) != wanted:
            raise CheckpointError(
                f"{name} of {manifest.id} is not the file of its manifest: sha256 {found[:12]}..., not {wanted[:12]}...",
                cause="a damaged or interrupted download, or files of two versions.",
                fix="Fetch it again; when it stays so, tell whoever put it there.",
            )


def _copy(read: Read, name: str, folder: Path, source: str) -> None:
    data = read(name)
    if data is None:
        raise CheckpointError(f"{source} has no {name}.", cause="an incomplete copy, or another address.", fix="Check it.")
    check_head(data[:256], f"{name} from {source}")
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def _copy_evidence(read: Read, directory: str, folder: Path, source: str) -> None:
    if read(f"{directory}/{_EVIDENCE[0]}") is None:
        raise CheckpointError(
            f"{source} has no evidence in {directory}.", cause="an incomplete copy.", fix="Get all of its files."
        )
    for name in _EVIDENCE:
        _copy(read, f"{directory}/{name}", folder, source)


def _models(source: str) -> list[tuple[str, Read]]:
    """Return the models of a source by their ids.

    Raises:
        UsageError: it is neither a folder nor a name on Hugging Face.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return list(_in_folder(path))
    hub = _HUB.fullmatch(source)
    if hub is None or source.startswith((".", "/")) or path.exists():
        fix = "Unpack or download it first, and give the folder; or hf:OWNER/NAME for Hugging Face."
        raise UsageError(f"{source!r} is no folder of models.", fix=fix)
    return list(_in_folder(_hub(source, hub.group(1))))


def _in_folder(path: Path) -> Iterator[tuple[str, Read]]:
    folders = [path] if (path / manifests.FILE).is_file() else sorted(file.parent for file in path.glob(f"*/{manifests.FILE}"))
    for folder in folders:
        # A published model may lie in a folder of any name.
        yield (manifests.read(folder).id, _reader(folder))


def _reader(folder: Path) -> Read:
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


def _hub(source: str, repository: str) -> Path:
    import huggingface_hub

    wanted = ["manifest.toml", "recipe.toml", "*.safetensors", "records/**", "curve.png"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # the client's errors have no common class besides this
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{source} cannot be fetched from Hugging Face: {reason[0] if reason else type(error).__name__}",
            cause="no such repository, no connection, or a private one.",
            fix="Check the name; for a private repository set HF_TOKEN.",
        ) from error
