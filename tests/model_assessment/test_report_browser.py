"""The report in a real browser: no complaints, every picture shows, and hostile text stays text."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assets.browser import CHROMIUM, Browser
from src.model_assessment.report import write_comparison, write_report
from src.utils import plot_style
from tests.model_assessment.reported_runs import PLOTS, START, STEPS, append, make_run, metrics, rewrite

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium or Chrome, such as Debian's package chromium")

DESK, PHONE = (1_280, 900), (360, 740)
HOSTILE = (
    "</p></td></style></title></details><script>document.title='owned'</script>"
    "<img src=http://127.0.0.1:9/canary onerror=\"document.title='owned'\"><svg onload=\"document.title='owned'\">"
    "<iframe srcdoc='<script>top.document.title=1</script>'></iframe><style>body{display:none}</style>"
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/canary'>"
    "\"' onmouseover=\"document.title='owned'\" \u202egnp.exe \u2067x &lt;b&gt; ${title} <base href=http://127.0.0.1:9/>"
)

NAME = "<img src=x onerror=\"document.title='owned'\"> ${title} &lt;"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def hostile_run(folder: Path) -> Path:
    """A run that says HOSTILE wherever a run can say something."""
    config = {"run_name": HOSTILE, HOSTILE: HOSTILE, "optim": {"max_lr": HOSTILE}, "list": [HOSTILE]}
    make_run(folder, config=config, command=HOSTILE, dataset={"name": HOSTILE}, machine={"gpu": HOSTILE})
    lines = [line | {"prompt": HOSTILE, "text": HOSTILE} if line["kind"] == "sample" else line for line in metrics()]
    rewrite(folder, lines)
    last = {"step": STEPS, "time": START + 300}
    append(
        folder,
        {"kind": "event", **last, "name": HOSTILE, "detail": HOSTILE},
        {"kind": "checkpoint", **last, "path": HOSTILE},
        {"kind": "hellaswag", **last, "acc_norm": 0.3, "stderr": 0.05, "total": 100, "protocol": HOSTILE},
    )
    status = {"state": HOSTILE, "message": HOSTILE, "exit_code": HOSTILE, "step": STEPS, "total_steps": STEPS}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def running_run(folder: Path, **settings: Any) -> Path:
    """A run at step 250 of 1,000 that has just written its last line, with a skipped step."""
    make_run(folder, derived={"total_steps": 4 * STEPS}, **settings)
    late = time.time() - 10 - max(line["time"] for line in metrics())
    rewrite(folder, [line | {"time": line["time"] + late} for line in metrics()])
    append(folder, {"kind": "event", "step": 200, "time": time.time(), "name": "skipped step", "detail": "a spike"})
    status = {"state": "running", "step": STEPS, "total_steps": 4 * STEPS, "time": time.time()}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    running, hostile = running_run(home / "running"), hostile_run(home / NAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_style, "_DOTS_PER_INCH", 60)
        return {
            "running": write_report(running),
            "hostile": write_report(hostile),
            "compared": write_comparison([hostile, running]),
        }


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [("running", DESK, "light"), ("running", PHONE, "dark"), ("compared", PHONE, "light")],
)
def test_a_page_is_whole_and_fits(
    browser: Browser, pages: dict[str, Path], name: str, size: tuple[int, int], scheme: str
) -> None:
    browser.open(pages[name], size, scheme, whole=True)
    assert browser.complaints() == []
    assert browser.fetched() == []
    assert browser.js("document.documentElement.scrollWidth") == size[0]  # nothing sticks out
    script = "[...document.images].map(i => [i.naturalWidth, ...Object.values(i.getBoundingClientRect().toJSON())])"
    images = browser.js(script)
    assert len(images) == len(PLOTS)
    picture = browser.picture()
    paper = picture[5, 5].mean()
    assert paper > 0.9 if scheme == "light" else paper < 0.15
    for natural_width, x, y, width, height, *_ in images:
        assert natural_width > 350
        plot = picture[round(y) : round(y + height), round(x) : round(x + width)]
        assert plot.shape[1] > 300
        assert abs(np.median(plot) - paper) < 0.1  # it lies on the page's colour,
        assert plot.max() - plot.min() > 0.6  # and stands out from it


def test_values_show_under_the_pointer(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["running"], DESK, whole=True)
    shown = "[...document.querySelectorAll('.plot b')].filter(b => b.offsetParent).map(b => b.innerText)"
    assert browser.js(shown) == []
    box = "const box = document.querySelector('#gradient_norm img').getBoundingClientRect();"
    x, y = browser.js(f"(() => {{{box} return [box.left + box.width / 2, box.top + box.height / 2]}})()")
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    (text,) = browser.js(shown)
    ((step, norm),) = re.findall(r"^step (\d+), [\d,]+ tokens\ngradient norm ([\d.]+)$", text)
    (expected,) = (line["grad_norm"] for line in metrics() if line["kind"] == "train" and line["step"] == int(step))
    assert float(norm) == pytest.approx(expected, rel=1e-3)
    assert 90 < int(step) < 160  # in the middle


def test_hostile_text_does_something_where_it_is_not_made_safe(browser: Browser, tmp_path: Path) -> None:
    """So that the next test could fail."""
    page = tmp_path / "unsafe.html"
    page.write_text(f"<!DOCTYPE html><title>safe</title><p>{HOSTILE.replace('refresh', '')}", encoding="utf-8")
    browser.open(page, DESK)
    assert browser.js("document.title") == "owned"
    assert browser.js("document.body.offsetHeight") == 0
    assert "http://127.0.0.1:9/canary" in browser.fetched()
    assert browser.complaints()


@pytest.mark.parametrize("name", ["hostile", "compared"])
def test_hostile_text_is_text(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], DESK)
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\u2067", "\\u2067")
    assert browser.js("document.title") == (NAME if name == "hostile" else "2 runs compared")
    assert browser.js("document.body.innerText").count(shown) > (10 if name == "hostile" else 4)
    assert browser.js("document.querySelectorAll('script, svg, iframe, base, img:not([src^=\"data:\"])').length") == 0
    assert browser.js("document.location.href") == pages[name].as_uri()
    assert browser.js("document.body.offsetHeight") > 1_000
    assert browser.fetched() == []
    assert browser.complaints() == []
