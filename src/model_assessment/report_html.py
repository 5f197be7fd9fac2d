"""Pieces of a page: text made safe, tables, pictures. Whatever a run's files hold, none of it becomes markup."""

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from src.model_assessment.report_axes import Plot

MAX_VALUE_CHARACTERS = 400  # of one setting
MAX_DEPTH = 10  # of settings within settings; ours have three

# Control characters, halves of surrogate pairs, and the marks that reverse the direction of writing.
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def safe(text: str) -> str:
    """`text` for any place of the page: it shows, and can neither become markup nor turn its surroundings around."""
    return html.escape(UNSHOWABLE.sub("\ufffd", text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table that scrolls by itself where the page is narrow; its first `numbers` columns don't wrap."""
    columns = "".join(f'<th scope="col">{safe(name)}</th>' for name in head)
    lines = []
    for row in rows:
        cells = (
            f'<td class="number">{safe(cell)}</td>' if index < numbers else f"<td>{safe(cell)}</td>"
            for index, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def curves(plots: list[Plot]) -> str:
    if not plots:
        return ""
    return '<h2>Curves</h2>\n<div class="plots">\n' + "\n".join(map(_figure, plots)) + "\n</div>"


def _figure(plot: Plot) -> str:
    picture = base64.b64encode(plot.png).decode("ascii")
    caption = f"<figcaption>{safe(plot.caption)}</figcaption>" if plot.caption else ""
    return (
        f'<figure id="{plot.name}"><img alt="{safe(plot.alt)}" src="data:image/png;base64,{picture}">{caption}</figure>'
    )


def flat(value: Any, prefix: str = "", depth: int = 0) -> dict[str, str]:
    """Nested entries under dotted names, as the command line has them."""
    if depth > MAX_DEPTH:
        return {prefix: "…"}
    if not isinstance(value, dict):
        return {prefix: words(value)}
    return {
        name: words
        for key, entry in value.items()
        for name, words in flat(entry, f"{prefix}.{key}" if prefix else str(key), depth + 1).items()
    }


def words(value: Any) -> str:
    """Any value JSON can hold, for a table's cell."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:,.10g}"
    elif isinstance(value, list) and not any(isinstance(entry, list | dict) for entry in value):
        text = "\n".join(map(words, value)) or "none"
    else:
        try:
            text = "none" if value is None else json.dumps(value, ensure_ascii=False)
        except RecursionError:
            text = "…"
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"
