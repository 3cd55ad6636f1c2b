"""A table of words and numbers: plain text, HTML for a notebook, and ``rich`` for a terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Rows under a title.

    Attributes:
        title: one line above the table.
        columns: the heads.
        rows: one sequence of cells per line.
        bad: numbers of the rows that are to be marked.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Sequence[Any], ...]
    bad: frozenset[int] = frozenset()

    def text(self) -> str:
        """Aligned columns: words to the left, numbers to the right."""
        lines = [list(self.columns), *[[shown(cell) for cell in row] for row in self.rows]]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        lines.insert(1, ["─" * width for width in widths])
        right = self._right()
        out = [self.title]
        for line in lines:
            cells = zip(line, widths, right, strict=True)
            out.append("  ".join(c.rjust(w) if to_right else c.ljust(w) for c, w, to_right in cells).rstrip())
        return "\n".join(out)

    def html(self) -> str:
        """An HTML table; marked rows are bold."""
        right = self._right()
        heads = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = []
        for number, row in enumerate(self.rows):
            style = " style='font-weight: bold'" if number in self.bad else ""
            cells = []
            for cell, to_right in zip(row, right, strict=True):
                align = "right" if to_right else "left"
                cells.append(f"<td style='text-align: {align}'>{html.escape(shown(cell))}</td>")
            body.append(f"<tr{style}>{''.join(cells)}</tr>")
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    def rich(self) -> RichTable:
        """A table to print with ``rich``; marked rows are red."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title), title_justify="left", box=box.SIMPLE, pad_edge=False)
        for column, to_right in zip(self.columns, self._right(), strict=True):
            table.add_column(Text(column), justify="right" if to_right else "left")
        for number, row in enumerate(self.rows):
            style = "bold red" if number in self.bad else None
            table.add_row(*[Text(shown(cell)) for cell in row], style=style)
        return table

    def _right(self) -> list[bool]:
        """For each column whether it holds numbers, which stand to the right."""
        if not self.rows:
            return [False] * len(self.columns)
        return [not any(isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]


def shown(cell: Any) -> str:
    """A cell as text: floats with four digits, an undefined number as a dash."""
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.4g}"
    return "–" if cell is None else str(cell)
