"""Draw the table of open models: python -m assets.open_models writes assets/open_models.png.

All facts come from assets/data/open_models.csv, which names a source for each row. Tokens per parameter and the warmup
share are computed from them.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from src.utils.errors import exit_with, print_result
from src.utils.plot_style import BLUE, GREY, STYLE, as_png
from src.utils.root import ROOT

TABLE = ROOT / "assets" / "data" / "open_models.csv"
PICTURE = ROOT / "assets" / "open_models.png"
OURS = "LF_LLM-269M"


@dataclass(frozen=True)
class OpenModel:
    """A published model and its training recipe; None if the source does not say."""

    model: str
    parameters: float
    """As the authors count them: some without the embedding, and for MolmoE the active ones."""
    layers: int
    width: int
    heads: str
    """A range if layers differ."""
    context: int
    vocabulary: int
    batch_tokens: float | None
    tokens: float
    max_lr: float | None
    warmup_tokens: float | None
    source: str

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters

    @property
    def warmup_ratio(self) -> float | None:
        return None if self.warmup_tokens is None else self.warmup_tokens / self.tokens


def read_models(path: Path = TABLE) -> list[OpenModel]:
    """Return the rows of the table in file order."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        OpenModel(
            model=row["model"],
            parameters=float(row["parameters"]),
            layers=int(row["layers"]),
            width=int(row["width"]),
            heads=row["heads"],
            context=int(row["context"]),
            vocabulary=int(row["vocabulary"]),
            batch_tokens=_number(row["batch_tokens"]),
            tokens=float(row["tokens"]),
            max_lr=_number(row["max_lr"]),
            warmup_tokens=_number(row["warmup_tokens"]),
            source=row["source"],
        )
        for row in rows
    ]


def _number(text: str) -> float | None:
    return float(text) if text else None


def short(number: float | None) -> str:
    """Format a count with three digits, such as 524k or 1.47T; None as a dash."""
    if number is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


COLUMNS = {
    "model": lambda m: m.model,
    "parameters": lambda m: short(m.parameters),
    "layers": lambda m: str(m.layers),
    "width": lambda m: f"{m.width:,}",
    "heads": lambda m: m.heads,
    "batch,\ntokens": lambda m: short(m.batch_tokens),
    "tokens": lambda m: short(m.tokens),
    "tokens per\nparameter": lambda m: f"{m.tokens_per_parameter:,.0f}",
    "maximum\nlearning rate": lambda m: "-" if m.max_lr is None else f"{m.max_lr:.2g}",
    "warmup,\n% of tokens": lambda m: "-" if m.warmup_ratio is None else f"{100 * m.warmup_ratio:.3g}",
}
WIDTHS = (0.145, 0.1, 0.075, 0.08, 0.1, 0.09, 0.09, 0.1, 0.115, 0.105)


def draw(models: list[OpenModel]) -> Figure:
    """Draw the table, with the row of this project's reference highlighted."""
    figure = Figure(figsize=(11.5, 5.6))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.09, 0.96, 0.82))
    axes.axis("off")
    axes.set_title("Published language models up to 1.5B parameters and their training recipes", pad=14)
    cells = [[cell(model) for cell in COLUMNS.values()] for model in models]
    table = axes.table(
        cells, colLabels=list(COLUMNS), colWidths=list(WIDTHS), cellLoc="right", colLoc="right", bbox=Bbox.unit()
    )
    table.auto_set_font_size(False)
    table.set_fontsize(11)
    for (row, column), cell in table.get_celld().items():
        cell.visible_edges = "B"
        cell.set_edgecolor("#d5d9de")
        cell.set_height(cell.get_height() * (1.7 if row == 0 else 1))
        if column == 0:
            cell.get_text().set_horizontalalignment("left")
        if row == 0:
            cell.get_text().set(color=GREY, fontsize=10)
        elif models[row - 1].model == OURS:
            cell.set_facecolor("#e8effa")
            cell.get_text().set(color=BLUE, fontweight="bold")
    note = (
        "Source of each row: assets/data/open_models.csv. Dash: not in the source. MolmoE: active parameters. "
        "GPT-3 reaches its lowest rate after 260B tokens."
    )
    figure.text(0.025, 0.03, note, fontsize=9.5, color=GREY)
    return figure


def main() -> None:
    with matplotlib.rc_context(STYLE):
        PICTURE.write_bytes(as_png(draw(read_models())))
    print_result({"picture": str(PICTURE)}, f"wrote {PICTURE}")


if __name__ == "__main__":
    exit_with(main)
