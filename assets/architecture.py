"""Draw the model from its configuration and code: assets/architecture.svg.

    python -m assets.architecture [PRESET]

Every number in the picture is read from a model on PyTorch's meta device, which takes no memory. Every parameter is in
the picture: one that no box shows is an error. lf_llm_269m writes architecture.svg, which the README shows. Other
presets write architecture_PRESET.svg in the same folder. NAME_dark.svg is the same for dark pages.

Shapes: B sequences, T positions, D width, H heads, K head dimension, F hidden size of the feed-forward network, V
vocabulary.
"""

from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from assets import dark
from src.model import LLM
from src.model_configs.arguments import Parser
from src.model_configs.my_llm_config import PRESETS
from src.model_utils.debugging import count_parameters
from src.params import ModelConfig
from src.utils.errors import exit_with, print_result
from src.utils.plot_style import BLUE, GREEN, GREY, ORANGE

SHOWN = "lf_llm_269m"
WIDTH, HEIGHT = 1120, 872
TOP, MIDDLE, BOTTOM = 104, 444, 794  # of the panels
INK, LINE, PAPER, PANEL, WEDGE = "#1d2026", "#6b717b", "#ffffff", "#f6f7f9", "#eceff3"
TIMES = "\N{MULTIPLICATION SIGN}"
# Fill and edge of a box: learned matrices, learned gains, no parameters.
LEARNED, NORM, PLAIN = ("#e7effb", BLUE), ("#e6f3ea", GREEN), (PAPER, "#8b919a")
WHOLE = ("embedding", "blocks", "norm")
QK_NORMS = ("attn.q_norm", "attn.k_norm")
BLOCK = ("attn_norm", "attn.qkv_proj", "attn.out_proj", "ffn_norm", "ffn.in_proj", "ffn.out_proj")
Point = tuple[float, float]
Kind = tuple[str, str]


@dataclass
class Drawing:
    """SVG elements in drawing order: later ones cover earlier ones."""

    elements: list[str] = field(default_factory=list)

    def rectangle(self, x: float, y: float, width: float, height: float, kind: Kind, radius: float = 8) -> None:
        fill, edge = kind
        self._add(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
            f'stroke="{edge}" stroke-width="1.5"/>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: Kind, title: str, below: str = "") -> None:
        """Draw a box with one or two centred lines."""
        self.rectangle(x, y, width, height, kind)
        middle = x + width / 2
        if below:
            self.text(middle, y + height / 2 - 4, title, weight=600)
            self.text(middle, y + height / 2 + 16, below, size=14, colour=GREY)
        else:
            self.text(middle, y + height / 2 + 5.5, title, weight=600)

    def operation(self, x: float, y: float, sign: str, colour: str) -> None:
        """Draw a circle with a plus or a times sign, as a path because fonts place the characters differently."""
        self._add(f'<circle cx="{x:g}" cy="{y:g}" r="13" fill="{PAPER}" stroke="{colour}" stroke-width="2.5"/>')
        turn = f' transform="rotate(45 {x:g} {y:g})"' if sign == "times" else ""
        self._add(
            f'<path d="M{x - 7:g} {y:g}H{x + 7:g}M{x:g} {y - 7:g}V{y + 7:g}" stroke="{colour}" stroke-width="2.5" '
            f'fill="none"{turn}/>'
        )

    def line(self, *points: Point, colour: str = LINE, width: float = 1.8, dashed: bool = False) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="6 5"' if dashed else ""
        self._add(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-linejoin="round"{dash}/>'
        )

    def arrow(self, *points: Point, colour: str = LINE, width: float = 1.8, dashed: bool = False) -> None:
        """Draw a line with an arrowhead at its last point."""
        (x0, y0), (x, y) = points[-2:]
        along, across = ((0, (y > y0) - (y < y0)), (1, 0)) if x == x0 else (((x > x0) - (x < x0), 0), (0, 1))
        back: Point = (x - 9 * along[0], y - 9 * along[1])
        self.line(*points[:-1], back, colour=colour, width=width, dashed=dashed)
        one, other = ((back[0] + side * across[0], back[1] + side * across[1]) for side in (-5.5, 5.5))
        self._add(f'<path d="M{x:g} {y:g}L{one[0]:g} {one[1]:g}L{other[0]:g} {other[1]:g}Z" fill="{colour}"/>')

    def wedge(self, *points: Point) -> None:
        """Draw the background that links a box to the panel with its contents."""
        self._add(f'<polygon points="{" ".join(f"{x:g},{y:g}" for x, y in points)}" fill="{WEDGE}"/>')

    def text(
        self,
        x: float,
        y: float,
        content: str,
        size: float = 16,
        weight: int = 400,
        anchor: str = "middle",
        colour: str = INK,
        turned: bool = False,
    ) -> None:
        turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
        self._add(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" text-anchor="{anchor}" '
            f'fill="{colour}"{turn}>{escape(content)}</text>'
        )

    def panel(self, x: float, y: float, width: float, height: float, title: str, parameters: int) -> None:
        self.rectangle(x, y, width, height, (PANEL, "#d5d9df"), radius=12)
        self.text(x + 16, y + 27, title, size=17, weight=700, anchor="start")
        self.text(x + width - 16, y + 27, f"{parameters:,}", size=14, anchor="end", colour=GREY)

    def svg(self, title: str) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="Helvetica, Arial, \'Liberation Sans\', sans-serif">'
        )
        return "\n".join([head, f"<title>{escape(title)}</title>", *self.elements, "</svg>"]) + "\n"

    def _add(self, element: str) -> None:
        self.elements.append(element)


def draw(preset: str) -> str:
    """Return the picture of a preset's model as SVG."""
    config = PRESETS[preset]().model
    with torch.device("meta"):
        model = LLM(config)
    total, whole, block = count_parameters(model), *parts(model)
    counts = f"{total:,} parameters, {total - whole['embedding']:,} without the embedding"
    drawing = Drawing()
    drawing.rectangle(0.75, 0.75, WIDTH - 1.5, HEIGHT - 1.5, (PAPER, "#d5d9df"), radius=14)
    drawing.text(36, 48, preset, size=26, weight=700, anchor="start")
    drawing.text(36, 76, counts, anchor="start", colour=GREY)
    # First, so that they lie behind everything: links from a box to the panel with its contents.
    drawing.wedge((288, 322), (352, TOP + 8), (352, BOTTOM - 8), (288, 402))
    drawing.wedge((642, 262), (712, TOP + 8), (712, MIDDLE - 20), (642, 326))
    drawing.wedge((642, 598), (712, MIDDLE + 20), (712, BOTTOM - 8), (642, 662))
    _draw_whole(drawing, config, whole)
    _draw_block(drawing, config, block)
    _draw_attention(drawing, block)
    _draw_ffn(drawing, config, block)
    _draw_legend(drawing, config)
    return drawing.svg(f"The model {preset}: {counts}")


def parts(model: LLM) -> tuple[dict[str, int], dict[str, int]]:
    """Count the parameters of the model's parts and of one block's, by module name."""
    whole = {name: count_parameters(model.get_submodule(name)) for name in WHOLE}
    names = (*BLOCK, *QK_NORMS) if model.config.qk_norm else BLOCK
    block = {name: count_parameters(model.blocks[0].get_submodule(name)) for name in names}
    for sizes, module in ((whole, model), (block, model.blocks[0])):
        assert sum(sizes.values()) == count_parameters(module), "the picture shows every parameter exactly once"
    return whole, block


def _draw_whole(drawing: Drawing, config: ModelConfig, sizes: dict[str, int]) -> None:
    """Draw the left column: token ids to loss."""
    x, width, middle = 62, 226, 175
    for y, end, shape in ((144, 206, "B T"), (402, 474, "B T D"), (524, 574, "B T D"), (638, 716, "B T V")):
        drawing.arrow((middle, y), (middle, end))
        drawing.text(middle + 13, (y + end) / 2 + 2, shape, size=14, anchor="start", colour=GREY)
    drawing.arrow((x, 238), (36, 238), (36, 606), (x, 606), colour=BLUE, dashed=True)
    drawing.text(28, 422, "the same weight", size=14, colour=BLUE, turned=True)
    drawing.box(x, TOP, width, 40, PLAIN, "token ids")
    drawing.box(x, 206, width, 64, LEARNED, f"Embedding, V {TIMES} D", f"{sizes['embedding']:,}")
    drawing.text(middle + 13, 292, "B T D", size=14, anchor="start", colour=GREY)
    for offset in (12, 6, 0):  # the stack of blocks, from back to front
        drawing.rectangle(x + offset, 322 - offset, width - 2 * offset, 80, LEARNED)
    drawing.arrow((middle, 270), (middle, 310))
    drawing.text(middle, 358, f"{config.n_layer} blocks", weight=600)
    each = sizes["blocks"] // config.n_layer
    drawing.text(middle, 381, f"{config.n_layer} {TIMES} {each:,}", size=14, colour=GREY)
    drawing.box(x, 474, width, 50, NORM, "RMSNorm", f"{sizes['norm']:,}")
    drawing.box(x, 574, width, 64, LEARNED, "Head, D → V", "shared weight, no bias")
    drawing.box(x, 716, width, 64, PLAIN, "Cross-entropy", "mean of B T targets, float32")


def _draw_block(drawing: Drawing, config: ModelConfig, sizes: dict[str, int]) -> None:
    """Draw the middle panel: a block, with the residual stream on its left."""
    drawing.panel(352, TOP, 310, BOTTOM - TOP, "One block", sum(sizes.values()))
    x, width, middle, stream = 426, 216, 534, 386
    for top, norm, box, plus in ((156, 188, 262, 422), (476, 516, 598, 718)):
        drawing.arrow((middle, top), (stream, top), (stream, plus), (middle - 13, plus), colour=ORANGE, width=3)
        drawing.arrow((middle, top), (middle, norm))
        drawing.arrow((middle, norm + 46), (middle, box))
    drawing.line((middle, 132), (middle, 157), colour=ORANGE, width=3)
    drawing.line((middle, 422), (middle, 477), colour=ORANGE, width=3)
    drawing.arrow((middle, 718), (middle, 774), colour=ORANGE, width=3)
    for y in (149, 458, 760):
        drawing.text(middle + 13, y, "B T D", size=14, anchor="start", colour=GREY)
    attention, ffn = (sum(n for name, n in sizes.items() if name.startswith(part)) for part in ("attn.", "ffn."))
    drawing.box(x, 188, width, 46, NORM, "RMSNorm", f"{sizes['attn_norm']:,}")
    drawing.box(x, 262, width, 64, LEARNED, "Attention", f"{attention:,}")
    drawing.arrow((middle, 326), (middle, 352))
    drawing.box(x, 352, width, 32, PLAIN, f"Dropout {config.residual_dropout:g}")
    drawing.arrow((middle, 384), (middle, 409))
    drawing.box(x, 516, width, 46, NORM, "RMSNorm", f"{sizes['ffn_norm']:,}")
    drawing.box(x, 598, width, 64, LEARNED, "Feed-forward, SwiGLU", f"{ffn:,}")
    drawing.arrow((middle, 662), (middle, 705))
    for plus in (422, 718):
        drawing.operation(middle, plus, "plus", ORANGE)


def _draw_attention(drawing: Drawing, sizes: dict[str, int]) -> None:
    """Draw the upper right panel."""
    counts = {name: sizes[f"attn.{name}"] for name in ("qkv_proj", "out_proj")}
    norms = sum(sizes.get(name, 0) for name in QK_NORMS)
    drawing.panel(712, TOP, 372, MIDDLE - 12 - TOP, "Attention", sum(counts.values()) + norms)
    x, width, middle = 740, 316, 898
    query, key, value = 794, 898, 1002
    drawing.arrow((middle, 118), (middle, 146))
    drawing.box(x, 146, width, 48, LEARNED, "q, k, v: D → 3 D", f"{counts['qkv_proj']:,}")
    for place, name, end in ((query, "q", 222), (key, "k", 222), (value, "v", 278)):
        drawing.arrow((place, 194), (place, end))
        drawing.text(place + 11, 213, name, size=14, anchor="start", colour=GREY)
    drawing.box(x, 222, 212, 32, PLAIN, f"RMSNorm {norms:,}, RoPE" if norms else "RoPE")
    drawing.text(value + 11, 246, "B H T K", size=14, anchor="start", colour=GREY)
    for place in (query, key):
        drawing.arrow((place, 254), (place, 278))
    drawing.box(x, 278, width, 52, PLAIN, "softmax(q · k / √K) v", "causal: earlier positions and itself")
    drawing.arrow((middle, 330), (middle, 354))
    drawing.box(x, 354, width, 48, LEARNED, "out: D → D", f"{counts['out_proj']:,}")
    drawing.arrow((middle, 402), (middle, 424))


def _draw_ffn(drawing: Drawing, config: ModelConfig, sizes: dict[str, int]) -> None:
    """Draw the lower right panel."""
    counts = {name: sizes[f"ffn.{name}"] for name in ("in_proj", "out_proj")}
    drawing.panel(712, MIDDLE + 12, 372, BOTTOM - MIDDLE - 12, "Feed-forward", sum(counts.values()))
    x, width, middle, value, gate = 740, 316, 898, 812, 984
    drawing.arrow((middle, 470), (middle, 498))
    drawing.box(x, 498, width, 48, LEARNED, "value, gate: D → 2 F", f"{counts['in_proj']:,}")
    drawing.arrow((value, 546), (value, 611))
    drawing.text(value + 11, 578, "value", size=14, anchor="start", colour=GREY)
    drawing.arrow((gate, 546), (gate, 572))
    drawing.text(gate + 11, 564, "gate", size=14, anchor="start", colour=GREY)
    drawing.box(gate - 72, 572, 144, 30, PLAIN, "SiLU")
    drawing.arrow((gate, 602), (gate, 624), (value + 13, 624))
    drawing.operation(value, 624, "times", LINE)
    drawing.arrow((value, 637), (value, 660))
    drawing.text(value + 11, 653, "B T F", size=14, anchor="start", colour=GREY)
    drawing.box(x, 660, width, 32, PLAIN, f"Dropout {config.ffn_dropout:g}")
    drawing.arrow((middle, 692), (middle, 716))
    drawing.box(x, 716, width, 48, LEARNED, "out: F → D", f"{counts['out_proj']:,}")
    drawing.arrow((middle, 764), (middle, 786))


def _draw_legend(drawing: Drawing, config: ModelConfig) -> None:
    """Draw the legend: colours and letters."""
    x, y = 36.0, 826
    for kind, label, width in (
        (LEARNED, "learned matrix", 150),
        (NORM, "learned gain", 138),
        (PLAIN, "no parameters", 152),
    ):
        drawing.rectangle(x, y - 13, 22, 16, kind, radius=4)
        drawing.text(x + 30, y, label, size=14, anchor="start", colour=GREY)
        x += width
    drawing.line((x, y - 5), (x + 26, y - 5), colour=ORANGE, width=3)
    drawing.text(x + 34, y, "residual stream", size=14, anchor="start", colour=GREY)
    drawing.text(WIDTH - 36, y, "numbers: learned parameters", size=14, anchor="end", colour=GREY)
    letters = {
        "B": "sequences",
        "T": f"positions, up to {config.n_ctx:,}",
        "D": f"width, {config.n_embd:,}",
        "H": f"heads, {config.n_head}",
        "K": f"of a head, {config.head_dim}",
        "F": f"hidden, {config.ffn_hidden:,}",
        "V": f"vocabulary, {config.n_vocab:,}",
    }
    line = "  ·  ".join(f"{letter} {meaning}" for letter, meaning in letters.items())
    drawing.text(36, y + 28, line.replace("  ", "\u00a0 "), size=14, anchor="start", colour=GREY)


def main() -> int:
    parser = Parser(prog="python -m assets.architecture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset", metavar="PRESET", nargs="?", choices=PRESETS, default=SHOWN, help=", ".join(PRESETS))
    preset = parser.parse_args().preset
    path = Path(__file__).with_name("architecture.svg" if preset == SHOWN else f"architecture_{preset}.svg")
    picture = draw(preset)
    path.write_text(picture, encoding="utf-8")
    path.with_stem(f"{path.stem}_dark").write_text(dark(picture), encoding="utf-8")
    print_result({"picture": str(path), "bytes": len(picture.encode())}, f"wrote {path} and the same for dark pages")
    return 0


if __name__ == "__main__":
    exit_with(main)
