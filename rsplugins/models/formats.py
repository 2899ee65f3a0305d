"""Files that are no checkpoints but programs or another library's format: what they are, and what works with them."""

from __future__ import annotations

import zipfile
from pathlib import Path

from rsplugins.errors import CheckpointError

_HEADS = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
}


def check_format(path: Path) -> None:
    """Raise a CheckpointError that says what a file is, where it is a program or another library's format."""
    with path.open("rb") as file:
        head = file.read(16)
    script = _script(path) if zipfile.is_zipfile(path) else ""
    if script.startswith("a NumPy"):
        script, head = "", b"\x93NUMPY"
    if script:
        kind, how = script, "torch.jit.load" if script.startswith("a TorchScript") else "torch.export.load"
        call = f"torch.jit.load({str(path)!r})" if how == "torch.jit.load" else f"torch.export.load({str(path)!r}).module()"
        raise CheckpointError(
            f"{path} is {kind}: a whole network with its code, not a checkpoint.",
            cause="loading it runs what is in the file, so this package does not do it by itself.",
            fix=f"Where you trust it: rsplugins.wrap({call}, mean=..., std=..., input_size=(C, H, W)), for certifiers that "
            f"sample; or save its weights, torch.save({call}.state_dict(), PATH), and name the architecture.",
        )
    other = next((kind for start, kind in _HEADS.items() if head.startswith(start)), "")
    if path.suffix.lower() == ".onnx" or (head[:1] == b"\x08" and head[1:2] <= b"\x14" and head[2:3] in (b"\x12", b"\x3a")):
        other = "an ONNX network"
    if other:
        raise CheckpointError(
            f"{path} is {other}, not a torch checkpoint.",
            cause="another library's format.",
            fix="Use the checkpoint that it was made from (.safetensors, .pt, .pth), or build it in torch and wrap() it.",
        )


def _script(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] or name for name in archive.namelist()]
    if any(name.startswith("code/") for name in names):
        return "a TorchScript program"
    exported = ("serialized_exported_program.json", "archive_format", "models/model.json")
    bare = archive.namelist()
    if any(name in exported or name.endswith(exported) for name in [*names, *bare]):
        return "an exported program (.pt2)"
    return "a NumPy archive" if all(name.endswith(".npy") for name in bare) and bare else ""
