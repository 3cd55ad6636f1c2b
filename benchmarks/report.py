"""Rows of measurements to a file, tables and pictures."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def merged(rows: list[Row], file: Path) -> list[Row]:
    """``rows`` together with those of earlier runs in ``file`` that they do not measure again; written there."""

    def key(row: Row) -> tuple:
        return (*(row[name] for name in ("problem", "T", "engine")), "MiB" in row)

    new = {key(row) for row in rows}
    old = json.loads(file.read_text()) if file.exists() else []
    rows = [row for row in old if key(row) not in new] + rows
    rows.sort(key=lambda row: (row["problem"], row["T"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return rows


def table(rows: list[Row], value: str, digits: int, engines: list[str]) -> str:
    rows = [row for row in rows if value in row]
    columns = list(dict.fromkeys((row["problem"], row["T"]) for row in rows))
    cells = {(row["engine"], row["problem"], row["T"]): f"{row[value]:.{digits}f}" for row in rows}
    lines = [
        "| | " + " | ".join(f"{problem}, T={T}" for problem, T in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for engine in (engine for engine in engines if any(row["engine"] == engine for row in rows)):
        lines.append(f"| {engine} | " + " | ".join(cells.get((engine, *column), "–") for column in columns) + " |")
    return "\n".join(lines)


def picture(rows: list[Row], value: str, label: str, path: Path, engines: list[str]) -> None:
    """One panel per problem, one line per engine, over T."""
    plt = pyplot()
    rows = [row for row in rows if value in row]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plt.subplots(1, len(problems), figsize=(4.2 * len(problems) + 2.5, 4), squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        for number, engine in enumerate(engines):
            points = sorted(
                (row["T"], row[value]) for row in rows if row["engine"] == engine and row["problem"] == problem
            )
            if points:
                style = "-" if engine.startswith("ours") else "--"
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    marker="o",
                    markersize=4,
                    color=plt.get_cmap("tab20")(number % 20),
                    label=engine,
                )
        axis.set(title=problem, xlabel="T", ylabel=label, xscale="log", yscale="log")
    labelled = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), fontsize=7, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 2.4 / (4.2 * len(problems) + 2.5), 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
