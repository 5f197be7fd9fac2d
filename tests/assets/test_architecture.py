"""The picture of the model matches its code and configuration."""

from itertools import combinations
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from torch import nn

import assets
from assets import architecture
from src.model import LLM
from src.model_configs.my_llm_config import PRESETS
from src.params import ModelConfig
from src.utils.root import ROOT


def texts(picture: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(picture).findall("{http://www.w3.org/2000/svg}text")


def extent(text: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, right, top and bottom in DejaVu Sans, which is wider than the fonts that the picture names."""
    size, x, y = (float(text.attrib[name]) for name in ("font-size", "x", "y"))
    bold = int(text.attrib["font-weight"]) > 400
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal", size=size)
    width, height, descent = TextToPath().get_text_width_height_descent(text.text or "", font, ismath=False)
    left = {"start": x, "middle": x - width / 2, "end": x - width}[text.attrib["text-anchor"]]
    return left, left + width, y + descent - height, y + descent


def test_the_picture_in_the_repository_is_the_present_one():
    light, dark = ((ROOT / "assets" / f"architecture{end}.svg").read_text() for end in ("", "_dark"))
    assert light == architecture.draw(architecture.SHOWN), "draw it again with: python -m assets.architecture"
    assert dark == assets.dark(light) != light


@pytest.mark.parametrize("preset", PRESETS)
def test_its_numbers_are_those_of_the_formulas(preset: str):
    """A matrix of n x m and its bias have n m + m numbers; 3 D of q, k and v, 2 F of value and gate."""
    config = PRESETS[preset]().model
    D, F, V, bias = config.n_embd, config.n_embd * config.ffn_mult, config.n_vocab, config.bias
    attention, ffn = [D * 3 * D + bias * 3 * D, D * D + bias * D], [D * 2 * F + bias * 2 * F, F * D + bias * D]
    qk_norms = config.qk_norm * 2 * D // config.n_head
    block = sum(attention) + qk_norms + sum(ffn) + 2 * D
    shown = [text.text for text in texts(architecture.draw(preset))]
    for number in (V * D, D, block, *attention, sum(attention) + qk_norms, *ffn, sum(ffn)):
        assert f"{number:,}" in shown
    assert (f"RMSNorm {qk_norms:,}, RoPE" if qk_norms else "RoPE") in shown
    total = V * D + config.n_layer * block + D
    assert f"{total:,} parameters, {total - V * D:,} without the embedding" in shown


@pytest.mark.parametrize("preset", PRESETS)
def test_no_text_lies_on_another_or_leaves_the_picture(preset: str):
    level = [text for text in texts(architecture.draw(preset)) if "transform" not in text.attrib]
    extents = [(text.text, extent(text)) for text in level]
    for _, (left, right, top, bottom) in extents:
        assert 0 < left < right < architecture.WIDTH
        assert 0 < top < bottom < architecture.HEIGHT
    for (one, a), (other, b) in combinations(extents, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2], f"{one!r} lies on {other!r}"


def test_a_parameter_that_no_box_shows_is_an_error(tiny_config: ModelConfig):
    with torch.device("meta"):
        model = LLM(tiny_config)
        architecture.parts(model)
        model.blocks[0].another = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="shows every parameter"):
        architecture.parts(model)
