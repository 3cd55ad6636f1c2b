"""TinyImageNet: 200 classes, 500 training and 50 validation images of 3×64×64 each, from its folder tree."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from metaopt import _torchvision
from metaopt.tasks._files import Part, check_file, fetch, open_image, parts
from metaopt.tasks.images import LabelledImages, as_uint8

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def tiny_imagenet(root: str | Path, part: Part = "train", *, size: int = 64, download: bool = False) -> LabelledImages:
    """The images of TinyImageNet; grey ones are in colour like the others.

    Reads ``wnids.txt`` (the classes, in this order), ``words.txt`` (their names),
    ``train/WNID/images/*.JPEG``, and ``val/val_annotations.txt`` with ``val/images/``. The
    published test images have no labels.

    Args:
        root: where ``tiny-imagenet-200/`` is.
        part: "train", "test" (the validation images) or "all".
        size: height and width; other than 64 they are scaled.
        download: fetch it there if need be (needs torchvision).

    Raises:
        FileNotFoundError: if a file or the images of a class are missing.
        ValueError: if a file is damaged.
    """
    place = Path(root) / "tiny-imagenet-200"
    if download and not (place / "wnids.txt").exists():
        tools = _torchvision.datasets().utils
        fetch(lambda: tools.download_and_extract_archive(_URL, str(root), md5=_MD5), place, _URL)
    remedy = f"unpack {_URL} in {root}, or pass download=True"
    for name in ("wnids.txt", "words.txt"):
        check_file(place / name, remedy)

    wnids = (place / "wnids.txt").read_text().split()
    classes = {wnid: i for i, wnid in enumerate(wnids)}
    lines = (place / "words.txt").read_text().splitlines()
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)

    found = []
    for list_files in parts(part, _training, _validation):
        found += list_files(place, classes, remedy)
    images = torch.empty(len(found), 3, size, size, dtype=torch.uint8)
    for i, (file, _) in enumerate(tqdm(found, desc="TinyImageNet", leave=False, delay=1)):
        image = open_image(file, size)
        images[i] = as_uint8(image)
    labels = torch.tensor([label for _, label in found])
    names = tuple(words.get(wnid, wnid) for wnid in classes)
    return LabelledImages(images, labels, names)


def _training(place: Path, classes: dict[str, int], remedy: str) -> list[tuple[Path, int]]:
    pairs = []
    for wnid, label in classes.items():
        folder = place / "train" / wnid / "images"
        files = sorted(folder.glob("*.JPEG"))
        if not files:
            raise FileNotFoundError(f"{folder} has no *.JPEG; {remedy}")
        pairs += [(file, label) for file in files]
    return pairs


def _validation(place: Path, classes: dict[str, int], remedy: str) -> list[tuple[Path, int]]:
    annotations = place / "val" / "val_annotations.txt"
    check_file(annotations, remedy)
    pairs = []
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in classes:
            raise ValueError(
                f"{annotations} is damaged: line {number} is not FILE, a class of wnids.txt, …: {line!r}; {remedy}"
            )
        file = place / "val" / "images" / fields[0]
        check_file(file, remedy)
        pairs.append((file, classes[fields[1]]))
    return pairs
