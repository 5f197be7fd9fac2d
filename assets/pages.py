"""Take the screenshots that the README and docs/running.md show, in light and dark.

    python -m assets.pages RUN RUN RUN ...

writes talk.png, comparison.png, index.png and report.png to assets/showcase, each with a NAME_dark.png. The report is
the showcase's, the page to talk to is the first run's, and the comparison is of the others. Needs Chromium or Chrome.
"""

import base64
import io
import tempfile
import threading
from pathlib import Path

from PIL import Image

from assets.browser import Browser
from src.model_assessment.report import write_comparison, write_index
from src.model_assessment.sampling import TextModel
from src.model_assessment.talk import Server
from src.model_configs.arguments import Parser
from src.utils import root
from src.utils.errors import exit_with, print_result

SHOWCASE = Path(__file__).parent / "showcase"
WIDTH, SCALE = 1_130, 1.5
TALK = (
    "$('prompt').value = 'The Roman emperor', $('max_new_tokens').value = 60, $('go').click(), "
    "new Promise(end => setInterval(() => running || end(), 100))"
)


def take(browser: Browser, page: Path | str, name: str, last: str, script: str = "0") -> None:
    """Write a page, down to the first element that `last` selects, to name.png, and as dark to name_dark.png."""
    for suffix, scheme in (("", "light"), ("_dark", "dark")):
        browser.open(page, (WIDTH, 900), scheme)
        browser.js(script)
        bottom = browser.js(f"document.querySelector('{last}').getBoundingClientRect().bottom + scrollY")
        size = {"x": 0, "y": 0, "width": WIDTH, "height": bottom + 10, "scale": SCALE}
        png = browser("Page.captureScreenshot", format="png", clip=size, captureBeyondViewport=True)["data"]
        image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
        image.quantize(256, Image.Quantize.MAXCOVERAGE).save(SHOWCASE / f"{name}{suffix}.png", optimize=True)


def main() -> None:
    parser = Parser(prog="python -m assets.pages", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("talk", metavar="RUN", help="the run whose page to talk to is shown")
    parser.add_argument("compared", metavar="RUN", nargs="+", help="the runs of the comparison")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile, Server(TextModel(args.talk, "cpu"), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Browser(Path(profile))
        browser("Emulation.setScrollbarsHidden", hidden=True)
        take(browser, f"http://127.0.0.1:{server.server_port}/", "talk", "article", TALK)
        compared = [root.run_dir(name) for name in args.compared]
        take(browser, write_comparison(compared), "comparison", "figure")
        take(browser, write_index(), "index", ".index + p")
        take(browser, SHOWCASE / "report.html", "report", "figure")
        browser.close()
        server.shutdown()
    print_result({"folder": str(SHOWCASE)}, f"wrote the pictures to {SHOWCASE}")


if __name__ == "__main__":
    exit_with(main)
