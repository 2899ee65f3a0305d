"""Make the data set `photographs` of a folder of ImageNet images, one sub-folder a class: every second image of it to train on.

    python zoo/photographs.py FOLDER DATA_ROOT       # DATA_ROOT/photographs/{train,test}/WNID/IMAGE, links

In the order of the paths, images with an even position train a denoiser and the others measure it. Every class has a folder in
both splits, so that labels are those of the classifier.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(source: Path, root: Path) -> None:
    """Write the links."""
    classes = sorted(entry for entry in source.iterdir() if entry.is_dir())
    images = sorted(path for entry in classes for path in entry.iterdir() if path.is_file())
    if not images:
        raise SystemExit(f"There are no images in sub-folders of {source}.")
    for position, path in enumerate(images):
        for split in ("train", "test"):
            folder = root / "photographs" / split / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            link = folder / path.name
            if (position % 2 == 0) == (split == "train") and not link.exists():
                link.symlink_to(path.resolve())
    sys.stdout.write(f"{len(images)} images in {root / 'photographs'}\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
