"""A report as one self-contained page, light or dark as the reader has it: a picture and tables, nothing loaded."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 24px; max-width: 1100px; color: light-dark(#1f2328, #e6edf3); background: light-dark(#fff, #0d1117);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 24px 0 6px; }
p { margin: 4px 0; } p, th { color: light-dark(#57606a, #9198a1); }
p.verdict { color: inherit; font-weight: 600; }
svg { display: block; width: 100%; height: auto; margin: 12px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 3px 14px 3px 0; text-align: right; border-bottom: 1px solid light-dark(#eaeef2, #30363d); }
th { font-weight: 500; white-space: nowrap; }
td.text, th.text { text-align: left; overflow-wrap: anywhere; }
"""


def page(title: str, verdicts: Iterable[str], picture: str, tables: Iterable[str], lines: Iterable[str]) -> str:
    """HTML of plain texts, an `<svg>` element and `table`s."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
{"".join(f'<p class="verdict">{escape(text)}</p>' for text in verdicts)}
{picture}
{"".join(tables)}
{"".join(f"<p>{escape(text)}</p>" for text in lines)}
</body>
</html>
"""


def table(title: str, columns: tuple[str, ...], texts: int, body: Iterable[tuple[Any, ...]]) -> str:
    """HTML; the first `texts` columns are words, the others numbers."""
    kinds = [' class="text"' if number < texts else "" for number in range(len(columns))]

    def cells(tag: str, row: tuple[Any, ...]) -> str:
        return "".join(f"<{tag}{kind}>{escape(str(value))}</{tag}>" for kind, value in zip(kinds, row, strict=True))

    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in body)
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{cells("th", columns)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
