"""The text fonts of this machine, and their families.

Matplotlib ships a few (DejaVu, STIX, Computer Modern); every installed font adds. Fonts of one
family (weights, widths, a script's own cut) count as one, so that two sets of families share no
design.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.ft2font import FT2Font

# fonts that map letters to something else than these letters
_NOT_TEXT = re.compile(
    r"symbol|dingbat|emoji|math|music|icon|keyboard|initials|braille|last "
    r"?resort|stix(size|nonuni)|d050000l|cm(sy|ex|mi)\d|wingdings|webdings",
    re.I,
)
_TEX_TEXT = frozenset(
    map(ord, string.ascii_letters + string.digits + "!?&%@#+=*/()[]")
)  # the rest is not where the file says it is
_LAST_CYRILLIC = 0x52F  # Latin, Greek and Cyrillic come before
_CUTS = re.compile(
    r"\b((semi|extra|ultra|demi)? "
    r"?(condensed|expanded|bold|light|black)|narrow|hairline|thin|medium|regular|heavy|display|caption)\b",
    re.I,
)
_ONE_FAMILY = {  # where names hide a common design
    r"cm(r|b|ti)\d+": "Computer Modern",
    r"cmss\d+": "Computer Modern Sans",
    r"cmtt\d+": "Computer Modern Typewriter",
    r"noto serif.*": "Noto Serif",
    r"noto.*|open sans.*|droid sans(?! mono).*": "Noto Sans",
    r"freesans": "Nimbus Sans",
    r"freeserif|nimbus roman|stix.*": "STIX",
    r"freemono": "Nimbus Mono PS",
    r"arimo": "Liberation Sans",
    r"tinos": "Liberation Serif",
    r"cousine": "Liberation Mono",
    r"carlito": "Lato",
    r"gentium.*": "Gentium",
    r"hack|bitstream vera sans mono": "DejaVu Sans Mono",
    r"bitstream vera (?!sans mono).*": "DejaVu Sans",
}


@dataclass(frozen=True)
class Font:
    """A font file, its family, and the code points that it has."""

    path: Path
    family: str
    characters: frozenset[int]


def fonts(files: Sequence[str | Path] | None = None) -> list[Font]:
    """The text fonts among ``files``, default those of matplotlib and of the system.

    Sorted, each file name once.

    Files that FreeType cannot read are passed over, and so are symbol fonts.

    >>> "DejaVu Sans" in {font.family for font in fonts()}
    True
    """
    if files is None:
        # imported here: it builds matplotlib's own list of fonts, which may take seconds the first
        # time
        from matplotlib.font_manager import findSystemFonts

        shipped = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")
        files = [*sorted(findSystemFonts()), *shipped]
    by_name = {Path(file).name: Path(file) for file in files}  # matplotlib's own copy where a file is there twice

    found = []
    for _, path in sorted(by_name.items()):
        font = _read(path)
        if font is not None:
            found.append(font)
    return found


def split_families(families: Sequence[str], counts: Sequence[int], seed: int) -> tuple[tuple[str, ...], ...]:
    """Disjoint random sets of ``counts[0]``, ``counts[1]``, … families.

    >>> split_families(["Arial", "Courier", "Times"], (2, 1), seed=0)
    (('Arial', 'Times'), ('Courier',))
    """
    names = sorted(set(families))
    if any(count < 1 for count in counts) or sum(counts) > len(names):
        raise ValueError(
            f"cannot split {len(names)} families into parts of {tuple(counts)}; install more fonts or ask for fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator).tolist()
    parts = []
    for count in counts:
        chosen = sorted(order[:count])
        parts.append(tuple(names[i] for i in chosen))
        order = order[count:]
    return tuple(parts)


def _read(path: Path) -> Font | None:
    try:
        font = FT2Font(str(path))
    except (RuntimeError, OSError):
        return None
    if _NOT_TEXT.search(font.family_name) or _NOT_TEXT.search(path.stem):
        return None
    family = _family(font.family_name)
    characters = frozenset(font.get_charmap())
    if family.startswith("Computer Modern"):
        characters &= _TEX_TEXT
    elif not characters.issuperset(map(ord, string.ascii_letters)):  # a script's font, with its own punctuation
        characters = frozenset(code for code in characters if code > _LAST_CYRILLIC)
    return Font(path, family, characters)


def _family(name: str) -> str:
    """The name without weights and widths."""
    for pattern, family in _ONE_FAMILY.items():
        if re.fullmatch(pattern, name, re.I):
            return family
    words = _CUTS.sub(" ", name).split()
    return " ".join(words) or name
