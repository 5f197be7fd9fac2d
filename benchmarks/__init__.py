"""Benchmarks: each prints its figures as text on a terminal, otherwise as one JSON object."""

from typing import Any

import src  # noqa: F401 (before torch: see there)
from src.utils.errors import print_result


def print_figures(figures: dict[str, Any]) -> None:
    print_result(figures, "\n".join(lines(figures)))


def lines(figures: dict[str, Any], indent: str = "") -> list[str]:
    """Return one line for each figure, those of a group indented under its name."""
    said = []
    for name, value in figures.items():
        for each in value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]:
            nested = lines(each, indent + "  ") if isinstance(each, dict) else []
            said += [f"{indent}{name.replace('_', ' ')}: {'' if nested else _text(each)}".rstrip(), *nested]
    return said


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:,.6g}" if isinstance(value, float) else str(value)
