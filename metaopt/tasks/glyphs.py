r"""Glyphs: characters rendered from the machine's fonts, a class per character; nothing is downloaded.

Every glyph is scaled to the same box, centred, white on black; then each image gets a random
rotation, shear, scale and shift, about what different hands would do. Scaling makes some characters
alike (c and C, o and 0, Latin and Cyrillic а): of such homoglyphs only the first is kept.
Split by character, by font family, or by both::

    known, unseen = split_families({font.family for font in fonts()}, (4, 3), seed=0) train, valid,
    test = split_classes(glyphs(families=known), (90, 30, 50), seed=0) other =
    glyphs(families=unseen) test = other.classes([name for name in test.names if name in
    other.names])  # unseen characters in unseen families
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import PIL
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

from metaopt.tasks.fonts import Font, fonts
from metaopt.tasks.images import LabelledImages

CHARACTERS = (
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθικλμνξπρςστυφχψω"
    "БГДЖЗИЙЛПУЦЧШЩЪЫЬЭЮЯбвгджзийлптфцчшщъыьэюя"
    "ÆÇÐÑÖØÞßåæçéêñòöøüĐđĦħŁłŒœŘřŠšŽž"
    "!?&%@#$€£¥§¶+=<>*/{}()[]~^±×÷∂∆∏∑√∞∫≈≠≤≥◊†‡←↑→↓"
)
"""What :func:`glyphs` renders unless told otherwise; homoglyphs are dropped afterwards."""

_BOX = 0.66
_OVERSAMPLING = 2
_FORMAT = 1
_ALIKE = 0.9
_SHARE = 0.3
_GRID = 14


class Drawing(NamedTuple):
    """A rendered character: oversampled ``[S, S]``, and its ink stretched to a small square, for comparison."""

    image: Tensor
    shape: Tensor


Sheet: TypeAlias = dict[str, Drawing]
"""The drawings of one font."""


@dataclass(frozen=True, eq=False, repr=False)
class Glyphs(LabelledImages):
    """Rendered characters.

    Attributes:
        families: int64 ``[N]``, each image's font family as a number into ``family_names``.
        family_names: the families.
    """

    families: Tensor
    family_names: tuple[str, ...]

    def rows(self, index: Tensor) -> Self:
        """Only these images, in this order."""
        return replace(super().rows(index), families=self.families[index])

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return replace(super().to(device), families=self.families.to(device))

    def of_families(self, names: Iterable[str]) -> Self:
        """Only images from these font families; all classes keep their numbers."""
        unknown = set(names := tuple(names)) - set(self.family_names)
        if unknown:
            raise ValueError(
                f"no such font family: {', '.join(sorted(unknown))}; there are {', '.join(self.family_names)}"
            )
        wanted = torch.tensor([name in names for name in self.family_names], device=self.families.device)
        return self.rows(wanted[self.families].nonzero().squeeze(1))


def glyphs(
    size: int = 28,
    characters: str | None = None,
    families: Sequence[str] | None = None,
    *,
    per_class: int = 500,
    jitter: bool = True,
    seed: int = 0,
    cache: str | Path | None = None,
    files: Sequence[str | Path] | None = None,
) -> Glyphs:
    """``per_class`` images of every character that the fonts have, less homoglyphs.

    Args:
        size: height and width in pixels.
        characters: the classes; default :data:`CHARACTERS`. Of homoglyphs the first is kept.
        families: font families to use; default all. Which characters are homoglyphs is decided with
            all fonts, whatever is asked for here.
        per_class: images of each class, spread evenly over the families.
        jitter: a random affine map for each image. Without it an image is made once, and characters
            with fewer than ``per_class`` distinct ones are left out.
        seed: of the choice of images and of the jitter.
        cache: directory for finished images; default ``$XDG_CACHE_HOME/metaopt`` or
            ``~/.cache/metaopt``.
        files: font files; default those of matplotlib and of the system.

    Raises:
        ValueError: if no font has the characters, or no character is left.
    """
    if size < 8 or per_class < 1:
        raise ValueError(f"size must be at least 8 pixels and per_class positive, got {size} and {per_class}")
    available = fonts(files)
    characters = "".join(dict.fromkeys(CHARACTERS if characters is None else characters))
    names = tuple(sorted({font.family for font in available}))
    chosen = names if families is None else tuple(sorted(set(families)))
    if unknown := set(chosen) - set(names):
        raise ValueError(f"no such font family: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    setting = f"{_FORMAT} {size} {characters} {chosen} {per_class} {jitter} {seed}"
    inventory = " ".join(f"{font.path.name}:{font.path.stat().st_size}" for font in available)
    key = hashlib.sha256(f"{setting} | {inventory} | {PIL.__version__}".encode()).hexdigest()[:16]
    path = _cache_directory(cache) / f"glyphs-{size}-{key}.pt"
    if not path.exists():
        _save(_make(available, characters, chosen, size, per_class, jitter, seed), path)
    return _load(path)


def _make(
    available: list[Font],
    characters: str,
    families: tuple[str, ...],
    size: int,
    per_class: int,
    jitter: bool,
    seed: int,
) -> Glyphs:
    sheets = [
        (font, _sheet(font, characters, size))
        for font in tqdm(available, desc=f"glyphs of {len(available)} fonts", leave=False, delay=1)
    ]
    sheets = [(font, sheet) for font, sheet in sheets if len(sheet) > 1]
    if not sheets:
        raise ValueError(f"none of {len(available)} fonts has the characters {characters!r}")
    kept = _without_homoglyphs([sheet for _, sheet in sheets], characters)
    generator = torch.Generator().manual_seed(seed)
    images = []
    labels = []
    origins = []
    names = []
    for character in tqdm(kept, desc="jitter" if jitter else "choice", leave=False, delay=1):
        distinct, origin = _distinct(sheets, character, families)
        if not len(distinct) or (not jitter and len(distinct) < per_class):
            continue
        index = _spread(origin, per_class, generator)
        moved = _jittered(distinct[index], generator) if jitter else distinct[index]
        images.append(_reduced(moved))
        labels.append(torch.full((per_class,), len(names)))
        origins.append(origin[index])
        names.append(character)
    if not images:
        raise ValueError(
            f"no character has {per_class} distinct images in {len(families)} font families; lower per_class or use "
            "jitter"
        )
    return Glyphs(torch.cat(images), torch.cat(labels), tuple(names), torch.cat(origins), families)


def _sheet(font: Font, characters: str, size: int) -> Sheet:
    """Drawings of the characters that a font has; nothing for a font that draws one box for all."""
    side = _OVERSAMPLING * size
    try:
        face = ImageFont.truetype(str(font.path), 2 * side, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        return {}  # a bitmap font without this size
    sheet = {}
    for character in characters:
        if ord(character) in font.characters and (drawing := _drawn(face, character, side)) is not None:
            sheet[character] = drawing
    return sheet if len({drawing.image.numpy().tobytes() for drawing in sheet.values()}) > len(sheet) // 2 else {}


def _drawn(face: ImageFont.FreeTypeFont, character: str, side: int) -> Drawing | None:
    """One character, scaled to its box and centred; ``None`` where the font draws nothing."""
    left, top, right, bottom = (int(v) for v in face.getbbox(character))
    if right <= left or bottom <= top:
        return None
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=face)
    ink = image.getbbox()
    if ink is None:
        return None
    scale = _BOX * side / max(ink[2] - ink[0], ink[3] - ink[1])
    width, height = (max(1, round(scale * (ink[i + 2] - ink[i]))) for i in (0, 1))
    canvas = Image.new("L", (side, side))
    canvas.paste(
        image.resize((width, height), Image.Resampling.BOX, box=ink), ((side - width) // 2, (side - height) // 2)
    )
    return Drawing(_pixels(canvas), _pixels(image.resize((_GRID, _GRID), Image.Resampling.BOX, box=ink)))


def _pixels(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)


def _without_homoglyphs(sheets: list[Sheet], characters: str) -> str:
    """The characters less those that look like an earlier one: correlation > 0.9 in > 30 % of the fonts."""
    known = [c for c in characters if any(c in sheet for sheet in sheets)]
    number = {character: i for i, character in enumerate(known)}
    alike, both = torch.zeros(2, len(known), len(known))
    for sheet in sheets:
        index = torch.tensor([number[c] for c in sheet])
        small = torch.stack([drawing.shape for drawing in sheet.values()]).float().flatten(1)
        unit = torch.nn.functional.normalize(small - small.mean(1, keepdim=True))
        rows = index.unsqueeze(1)
        columns = index.unsqueeze(0)
        alike[rows, columns] += (unit @ unit.T > _ALIKE).float()
        both[rows, columns] += 1
    twins = alike > _SHARE * both
    kept: list[int] = []
    for i in range(len(known)):
        if not bool(twins[i, kept].any()):
            kept.append(i)
    return "".join(known[i] for i in kept)


def _distinct(sheets: list[tuple[Font, Sheet]], character: str, families: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The different images of a character, ``[n, S, S]``, and their families.

    One that two families share belongs to the first of all.
    """
    seen: dict[bytes, tuple[Tensor, str]] = {}
    for font, sheet in sheets:
        if character in sheet:
            image = sheet[character].image
            seen.setdefault(image.numpy().tobytes(), (image, font.family))
    number = {family: i for i, family in enumerate(families)}
    pairs = [(image, number[family]) for image, family in seen.values() if family in number]
    if not pairs:
        return torch.empty(0, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    return torch.stack([image for image, _ in pairs]), torch.tensor([family for _, family in pairs])


def _spread(origin: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` image numbers in turns over the families.

    No image comes again before each of its family has come.
    """
    queues = []
    for family in origin.unique():
        members = (origin == family).nonzero().squeeze(1)
        queues.append(members[torch.randperm(len(members), generator=generator)])
    if count <= len(origin):  # enough different ones: each once, in turns
        ranked = [(rank, f, int(i)) for f, queue in enumerate(queues) for rank, i in enumerate(queue)]
        return torch.tensor([i for _, _, i in sorted(ranked)[:count]])
    turns = [queues[turn % len(queues)] for turn in range(count)]
    return torch.stack([queue[turn // len(queues) % len(queue)] for turn, queue in enumerate(turns)])


def _jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[n, S, S]`` under random affine maps.

    ±12°, shear ±0.15, scale 0.8 … 1.15 in each direction, shift ±7 %.
    """
    n = len(images)
    draw = 2 * torch.rand(6, n, generator=generator) - 1
    angle = draw[0] * math.radians(12)
    shear = 0.15 * draw[1]
    stretch_x, stretch_y = (1 / (0.975 + 0.175 * draw[i]) for i in (2, 3))
    cos = angle.cos()
    sin = angle.sin()
    first = torch.stack([stretch_x * cos, stretch_x * (shear * cos - sin), 0.14 * draw[4]], 1)
    second = torch.stack([stretch_y * sin, stretch_y * (shear * sin + cos), 0.14 * draw[5]], 1)
    grid = torch.nn.functional.affine_grid(
        torch.stack([first, second], 1), [n, 1, *images.shape[1:]], align_corners=False
    )
    moved = torch.nn.functional.grid_sample(images.unsqueeze(1).float(), grid, align_corners=False)
    return moved.squeeze(1).round().to(torch.uint8)


def _reduced(images: Tensor) -> Tensor:
    """Oversampled ``[n, S, S]`` to ``[n, 1, size, size]``."""
    return torch.nn.functional.avg_pool2d(images.unsqueeze(1).float(), _OVERSAMPLING).round().to(torch.uint8)


def _cache_directory(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaopt"


def _save(data: Glyphs, path: Path) -> None:
    """Write beside the place and move there, so that no reader ever sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {f.name: getattr(data, f.name) for f in fields(data)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as unfinished:
        torch.save(content, Path(unfinished, path.name))
        os.replace(Path(unfinished, path.name), path)


def _load(path: Path) -> Glyphs:
    try:
        return Glyphs(**torch.load(path, weights_only=True))
    except Exception as error:
        kind = type(error).__name__  # without torch's text, whose advice is to run what the file holds
        raise RuntimeError(f"{path} cannot be read ({kind}); delete it, and it will be made again") from None
