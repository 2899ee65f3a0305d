"""Bring a model here: from a folder, an HTTPS address (a zip, or the address that its files lie under), or Hugging Face.

Only the files that a manifest names are taken, and nothing is loaded: hashes are checked first, and no file is unpickled, ever.
"""

from __future__ import annotations

import http.client
import os
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from rsplugins.errors import CheckpointError, UsageError
from rsplugins.models import manifest as manifests
from rsplugins.models import store
from rsplugins.models.files import check_head, sha256
from rsplugins.models.manifest import Manifest

LARGEST, LARGEST_TEXT = 2_000_000_000, 1_000_000
"""Bytes that one file may have, and a manifest."""
_EVIDENCE = (("manifest.json", "records.jsonl"), ("attack.json", "attacked.jsonl"), ("predictions.json",))
_EXTRA = ("README.md", "curve.png")
_HUB = re.compile(r"(?:hf:|https://huggingface\.co/)?([\w.-]+/[\w.-]+?)/?")

Read = Callable[[str], bytes | None]
"""Returns the contents of a file by its relative name, or None when there is no such file."""


def fetch(source: str, *, identifier: str = "", destination: Path | None = None) -> list[Path]:
    """Copy one model, or all models of a folder or a zip, to where ``zoo:`` finds them.

    Args:
        source: a folder; ``https://.../model.zip``; ``https://.../folder`` that files lie under; ``hf:OWNER/NAME``.
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
    with _opened(source) as models:
        chosen = [(name, read) for name, read in models if identifier in ("", name)]
        if not chosen:
            what = f"the model {identifier}" if identifier else "a model: there is no manifest.toml"
            raise UsageError(f"{source} does not hold {what}.", fix="Give a folder, a zip or an address with a manifest.toml.")
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
    return [manifest.recipe.file, *(weights.file for weights in manifest.weights)]


def check(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its hash.

    Raises:
        CheckpointError: one differs.
    """
    expected = {weights.file: weights.sha256 for weights in manifest.weights} | {manifest.recipe.file: manifest.recipe.sha256}
    for result in manifest.results:
        for group in _EVIDENCE:
            if (folder / "records" / result.records / group[-1]).is_file():
                expected[f"records/{result.records}/{group[-1]}"] = result.records_sha256
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
    for group in _EVIDENCE:
        if read(f"{directory}/{group[0]}") is not None:
            for name in group:
                _copy(read, f"{directory}/{name}", folder, source)
            return
    raise CheckpointError(f"{source} has no evidence in {directory}.", cause="an incomplete copy.", fix="Get all of its files.")


@contextmanager
def _opened(source: str) -> Iterator[list[tuple[str, Read]]]:
    """Open a source, and give the models in it by the name of their folder."""
    path = Path(source).expanduser()
    try:
        scheme = urlsplit(source).scheme
    except ValueError as error:  # a bracket that is not closed
        raise UsageError(f"{source!r} is no address: {error}.", fix="Check it.") from None
    if path.is_dir():
        yield list(_in_folder(path))
    elif path.is_file():
        with _zip(path, source) as models:
            yield models
    elif scheme in ("http", "https") and not _HUB.fullmatch(source):
        with _address(source) as models:
            yield models
    elif _HUB.fullmatch(source) and not source.startswith((".", "/")):
        with _hub(source) as models:
            yield models
    else:
        raise UsageError(
            f"There is no source {source!r}.", fix="Give a folder, a zip, an HTTPS address, or hf:OWNER/NAME for Hugging Face."
        )


def _in_folder(path: Path) -> Iterator[tuple[str, Read]]:
    folders = [path] if (path / manifests.FILE).is_file() else sorted(file.parent for file in path.glob(f"*/{manifests.FILE}"))
    for folder in folders:
        # A published model may lie in a folder of any name.
        yield (manifests.read(folder).id, _reader(folder))


def _reader(folder: Path) -> Read:
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


@contextmanager
def _zip(path: Path, source: str) -> Iterator[list[tuple[str, Read]]]:
    with path.open("rb") as file:
        check_head(file.read(256), source)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{source} is not a zip.", fix="Give a zip, a folder, or the address that the files lie under.")
    with zipfile.ZipFile(path) as archive:
        # Files are read by name and written to names of our own, so that no entry can point outside.
        members = {info.filename: info for info in archive.infolist()}
        models: list[tuple[str, Read]] = []
        for member in members:
            place = PurePosixPath(member)
            if place.name == manifests.FILE:
                prefix = "" if str(place.parent) == "." else f"{place.parent}/"
                read = _unzip(archive, members, prefix)
                models.append((_identifier(read(manifests.FILE) or b""), read))
        yield models


def _identifier(manifest: bytes) -> str:
    found = re.search(r'^id = "([^"]+)"', manifest.decode(errors="replace"), re.MULTILINE)
    return found.group(1) if found else ""


def _unzip(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], prefix: str) -> Read:
    def read(name: str) -> bytes | None:
        info = members.get(prefix + name)
        if info is None:
            return None
        largest = LARGEST_TEXT if name == manifests.FILE else LARGEST
        if info.file_size > largest:
            raise CheckpointError(f"{name} would have {info.file_size} bytes; at most {largest} are taken.")
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, RuntimeError, zlib.error, EOFError) as error:  # RuntimeError: it is encrypted
            raise CheckpointError(f"{name} cannot be read from the zip: {error}.", fix="Get the zip again.") from None

    return read


@contextmanager
def _address(source: str) -> Iterator[list[tuple[str, Read]]]:
    parts = urlsplit(source)
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise UsageError(
            f"{source} is not encrypted.", cause="Anybody on the way could change weights and hashes.", fix="Use https."
        )
    if parts.path.endswith(".zip"):
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.zip"
            path.write_bytes(_download(source) or b"")
            with _zip(path, source) as models:
                yield models
        return
    base = source.removesuffix(manifests.FILE).rstrip("/")
    data = _download(f"{base}/{manifests.FILE}")
    if data is None:
        yield []
        return
    check_head(data[:256], f"{base}/{manifests.FILE}")
    yield [(_identifier(data), lambda name: _download(f"{base}/{name}"))]


def _download(address: str) -> bytes | None:
    """Return what lies at an address, or None when the server says that nothing does."""
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            if urlsplit(answer.geturl()).scheme != urlsplit(address).scheme:
                raise CheckpointError(f"{address} leads elsewhere, to {answer.geturl()}.", fix="Use that address, with https.")
            data: bytes = answer.read(LARGEST + 1)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise CheckpointError(f"{address} answers {error.code} {error.reason}.", fix="Check the address, or try later.") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise CheckpointError(f"{address} cannot be reached: {error}.", fix="Check the address and the connection.") from None
    if len(data) > LARGEST:
        raise CheckpointError(f"{address} has more than {LARGEST} bytes, which is more than is taken.")
    return data


@contextmanager
def _hub(source: str) -> Iterator[list[tuple[str, Read]]]:
    import huggingface_hub

    found = _HUB.fullmatch(source)
    assert found is not None  # _opened looked
    wanted = ["manifest.toml", "recipe.toml", "*.safetensors", "records/**", "curve.png"]
    try:
        folder = huggingface_hub.snapshot_download(found.group(1), allow_patterns=wanted)
    except Exception as error:  # the client's errors have no common class besides this
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{source} cannot be fetched from Hugging Face: {reason[0] if reason else type(error).__name__}",
            cause="no such repository, no connection, or a private one.",
            fix="Check the name; for a private repository set HF_TOKEN.",
        ) from error
    yield list(_in_folder(Path(folder)))
