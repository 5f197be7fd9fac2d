"""One look for every figure the project draws, independent of the user's matplotlib settings.

    with matplotlib.rc_context(STYLE):
        figure = new_figure()
        ...
        png, svg = as_png(figure), as_svg(figure)

Only matplotlib's objects are used, not pyplot, so neither a display nor a notebook's backend is involved.
"""

import io
import os
import sys
from typing import Any

if "matplotlib" not in sys.modules:  # a user's backend or matplotlibrc that cannot be loaded would end the import
    _users = {name: os.environ.get(name) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    import matplotlib

    for _name, _value in _users.items():
        os.environ.pop(_name)
        if _value is not None:
            os.environ[_name] = _value
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#1f5fbf", "#c8500a", "#2a7d4f"
LIGHT_GREY, GREY = "#a3a8b0", "#5b616b"  # resumes, and levels to compare with
# Starts from matplotlib's defaults, because a user's matplotlibrc may require LaTeX or missing fonts. Backends are left
# out: the canvas below fixes them, and setting one would load it.
STYLE: dict[Any, Any] = {
    **{name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith(("backend", "webagg"))},
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "axes.edgecolor": "#8b919a",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12.5,
    "axes.titlepad": 10,
    "legend.edgecolor": "none",
    "legend.fontsize": 10.5,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "text.parse_math": False,  # a name may hold dollar signs
}
_SIZE_INCHES, _DOTS_PER_INCH = (6.4, 3.9), 180  # readable on a phone and in half the width of a desktop


def new_figure() -> Figure:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DOTS_PER_INCH)
    return png.getvalue()


def as_svg(figure: Figure) -> bytes:
    """The figure as an SVG file without a background. Its labels are text, in a font of the reader's."""
    svg = io.BytesIO()
    unnamed = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # The salt makes the same figure the same bytes. DejaVu Sans, which sets the sizes here, comes first.
    fonts = {"svg.fonttype": "none", "svg.hashsalt": "figure", "font.sans-serif": ["DejaVu Sans", "Verdana"]}
    with matplotlib.rc_context(fonts):
        figure.savefig(svg, format="svg", transparent=True, metadata=unnamed)
    return svg.getvalue()
