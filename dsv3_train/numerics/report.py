"""The comparison's files: report.json, report.html, report.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3_train.numerics.compare import Curves
from dsv3_train.profiling.report import as_json
from dsv3_train.whole import write


def write_comparison(out: Path, figures: dict[str, Any], curves: Curves) -> list[Path]:
    """Write all three; which they are.

    Raises:
        UserError: one cannot be written.
    """
    from dsv3_train.numerics import table
    from dsv3_train.numerics.page import page
    from dsv3_train.numerics.page import table as html_table
    from dsv3_train.numerics.picture import picture, svg
    from dsv3_train.profiling.picture import save

    paths = [out / f"report.{kind}" for kind in ("json", "html", "png")]
    write(paths[0], as_json(figures) + "\n")
    drawn = picture(curves)
    names = ", ".join(run["label"] for run in figures["runs"] or figures["seeds"])
    title = f"{names} against {figures['baseline']['label']}"
    body = html_table("Losses", table.COLUMNS, table.TEXTS, table.rows(figures))
    write(paths[1], page(title, table.verdicts(figures), svg(drawn), [body], table.lines(figures)))
    save(drawn, paths[2])
    return paths
