r"""Glyphs: characters rendered from the machine's fonts, a class per character; nothing is downloaded.

Every glyph is scaled to the same box, centred, white on black; then each image gets a random
rotation, shear, scale and shift, about what different hands would do. Scaling makes some characters
alike (c and C, o and 0, Latin and Cyrillic а): of such homoglyphs only the first is kept.
Split by character, by font family, or by both::

    families = {font.family for font in fonts()}
    known, unseen = split_families(families, (4, 3), seed=0)
    train, valid, test = split_classes(glyphs(families=known), (90, 30, 50), seed=0)

    other = glyphs(families=unseen)
    common = [name for name in test.names if name in other.names]
    test = other.classes(common)  # unseen characters in unseen families
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
        kept = super().rows(index)
        return replace(kept, families=self.families[index])

    def to(self, device: torch.device | str) -> Self:
        """The same images and labels on another device."""
        moved = super().to(device)
        return replace(moved, families=self.families.to(device))

    def of_families(self, names: Iterable[str]) -> Self:
        """Only images from these font families; all classes keep their numbers."""
        chosen = set(names)
        _check_families(chosen, self.family_names)
        wanted = torch.tensor([name in chosen for name in self.family_names], device=self.families.device)
        index = wanted[self.families].nonzero().squeeze(1)
        return self.rows(index)


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
    if characters is None:
        characters = CHARACTERS
    characters = "".join(dict.fromkeys(characters))  # each once
    available = fonts(files)
    names = tuple(sorted({font.family for font in available}))
    chosen = names if families is None else tuple(sorted(set(families)))
    _check_families(chosen, names)

    key = _key(f"{_FORMAT} {size} {characters} {chosen} {per_class} {jitter} {seed}", available)
    path = _cache_directory(cache) / f"glyphs-{size}-{key}.pt"
    if not path.exists():
        made = _make(available, characters, chosen, size, per_class, jitter, seed)
        _save(made, path)
    return _load(path)


def _key(setting: str, available: list[Font]) -> str:
    """A hash of all that the images depend on: the setting, the fonts and the version of Pillow."""
    inventory = " ".join(f"{font.path.name}:{font.path.stat().st_size}" for font in available)
    content = f"{setting} | {inventory} | {PIL.__version__}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _check_families(chosen: Iterable[str], names: tuple[str, ...]) -> None:
    unknown = set(chosen) - set(names)
    if unknown:
        raise ValueError(f"no such font family: {', '.join(sorted(unknown))}; there are {', '.join(names)}")


def _make(
    available: list[Font],
    characters: str,
    families: tuple[str, ...],
    size: int,
    per_class: int,
    jitter: bool,
    seed: int,
) -> Glyphs:
    sheets = []
    for font in tqdm(available, desc=f"glyphs of {len(available)} fonts", leave=False, delay=1):
        sheet = _sheet(font, characters, size)
        if len(sheet) > 1:
            sheets.append((font, sheet))
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
        drawn = distinct[index]
        if jitter:
            drawn = _jittered(drawn, generator)
        images.append(_reduced(drawn))
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
        if ord(character) not in font.characters:
            continue
        drawing = _drawn(face, character, side)
        if drawing is not None:
            sheet[character] = drawing

    different = {drawing.image.numpy().tobytes() for drawing in sheet.values()}
    if len(different) <= len(sheet) // 2:
        return {}
    return sheet


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

    left, top, right, bottom = ink
    scale = _BOX * side / max(right - left, bottom - top)
    width = max(1, round(scale * (right - left)))
    height = max(1, round(scale * (bottom - top)))
    scaled = image.resize((width, height), Image.Resampling.BOX, box=ink)

    canvas = Image.new("L", (side, side))
    corner = ((side - width) // 2, (side - height) // 2)
    canvas.paste(scaled, corner)
    shape = image.resize((_GRID, _GRID), Image.Resampling.BOX, box=ink)
    return Drawing(_pixels(canvas), _pixels(shape))


def _pixels(image: Image.Image) -> Tensor:
    content = bytearray(image.tobytes())
    pixels = torch.frombuffer(content, dtype=torch.uint8)
    return pixels.view(image.height, image.width)


def _without_homoglyphs(sheets: list[Sheet], characters: str) -> str:
    """The characters less those that look like an earlier one: correlation > 0.9 in > 30 % of the fonts."""
    drawn = {c for sheet in sheets for c in sheet}
    known = [c for c in characters if c in drawn]
    number = {character: i for i, character in enumerate(known)}
    alike = torch.zeros(len(known), len(known))
    both = torch.zeros(len(known), len(known))

    for sheet in sheets:
        shapes = torch.stack([drawing.shape for drawing in sheet.values()])
        small = shapes.float().flatten(1)
        centred = small - small.mean(1, keepdim=True)
        unit = torch.nn.functional.normalize(centred)
        correlation = unit @ unit.T

        index = torch.tensor([number[c] for c in sheet])
        rows = index.unsqueeze(1)
        columns = index.unsqueeze(0)
        alike[rows, columns] += (correlation > _ALIKE).float()
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
            content = image.numpy().tobytes()
            seen.setdefault(content, (image, font.family))

    number = {family: i for i, family in enumerate(families)}
    images = []
    origin = []
    for image, family in seen.values():
        if family in number:
            images.append(image)
            origin.append(number[family])
    if not images:
        return torch.empty(0, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    return torch.stack(images), torch.tensor(origin)


def _spread(origin: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` image numbers in turns over the families.

    No image comes again before each of its family has come.
    """
    queues = []
    for family in origin.unique():
        members = (origin == family).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        queues.append(members[order])

    if count <= len(origin):  # enough different ones: each once, in turns
        ranked = []
        for f, queue in enumerate(queues):
            for rank, i in enumerate(queue.tolist()):
                ranked.append((rank, f, i))
        first = sorted(ranked)[:count]
        return torch.tensor([i for _, _, i in first])

    drawn = []
    for turn in range(count):
        queue = queues[turn % len(queues)]
        rank = turn // len(queues)
        drawn.append(queue[rank % len(queue)])
    return torch.stack(drawn)


def _jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[n, S, S]`` under random affine maps.

    ±12°, shear ±0.15, scale 0.8 … 1.15 in each direction, shift ±7 %.
    """
    n = len(images)
    draw = 2 * torch.rand(6, n, generator=generator) - 1
    angle = draw[0] * math.radians(12)
    shear = 0.15 * draw[1]
    stretch_x = 1 / (0.975 + 0.175 * draw[2])
    stretch_y = 1 / (0.975 + 0.175 * draw[3])
    shift_x = 0.14 * draw[4]
    shift_y = 0.14 * draw[5]

    cos = angle.cos()
    sin = angle.sin()
    first = torch.stack([stretch_x * cos, stretch_x * (shear * cos - sin), shift_x], 1)
    second = torch.stack([stretch_y * sin, stretch_y * (shear * sin + cos), shift_y], 1)
    maps = torch.stack([first, second], 1)

    grid = torch.nn.functional.affine_grid(maps, [n, 1, *images.shape[1:]], align_corners=False)
    pixels = images.unsqueeze(1).float()
    moved = torch.nn.functional.grid_sample(pixels, grid, align_corners=False)
    return moved.squeeze(1).round().to(torch.uint8)


def _reduced(images: Tensor) -> Tensor:
    """Oversampled ``[n, S, S]`` to ``[n, 1, size, size]``."""
    pixels = images.unsqueeze(1).float()
    means = torch.nn.functional.avg_pool2d(pixels, _OVERSAMPLING)
    return means.round().to(torch.uint8)


def _cache_directory(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "metaopt"


def _save(data: Glyphs, path: Path) -> None:
    """Write beside the place and move there, so that no reader ever sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {f.name: getattr(data, f.name) for f in fields(data)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as unfinished:
        written = Path(unfinished, path.name)
        torch.save(content, written)
        os.replace(written, path)


def _load(path: Path) -> Glyphs:
    try:
        return Glyphs(**torch.load(path, weights_only=True))
    except Exception as error:
        kind = type(error).__name__  # without torch's text, whose advice is to run what the file holds
        raise RuntimeError(f"{path} cannot be read ({kind}); delete it, and it will be made again") from None
