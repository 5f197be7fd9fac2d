"""The prose of the project is plain English: phrases that read like a translation are refused, with a better word."""

import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.utils.root import ROOT

BETTER = {
    r"anew": "again, or regenerate",
    r"go(es)? on": "continue, or resume",
    r"going on": "continuing, or resuming",
    r"went on": "continued",
    r"beside": "next to, or in addition to",
    r"in words": "as text, or leave it out",
    r"of (its|their|his|our|your) own": "separate, or leave it out",
    r"(is|are) there": "exists",
    r"asked for": "requested",
    r"as it is": "unchanged",
    r"as they are": "unchanged",
    r"(?<!there )(is|are) no": "is not a",
    r"to be had": "available",
    r"whether .{0,60}, if any": "say the fact",
    r"meanwhile": "say when: during the read, until then",
    r"(is|are|was|were) said": "says so, or the message names it",
    r"without a word": "silently",
    r"signs? of life": "heartbeat, or record",
    r"one an? (line|row|core|step|document|process)": "one per line",
    r"raises \w+ where": "raises X if",
}
# A docstring begins with a verb or the noun it defines.
OPENINGS = re.compile(r"(What|Those that|Whether|Where|How|From .{1,40} to) ")
SOURCES = [*sorted(ROOT.glob("src/**/*.py")), ROOT / "pretrain.py", *sorted(ROOT.glob("src/**/*.sh"))]
SOURCES += [*sorted(ROOT.glob("*.sh")), *sorted(ROOT.glob("src/**/*.html"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("notebooks/*.ipynb"))


def prose(path: Path) -> str:
    """The text that people read: a page, a notebook's cells, a program's strings and comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    if path.suffix == ".py":
        kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return "\n".join(token.string for token in tokens if token.type in kinds)
    return text


def docstrings(path: Path) -> Iterator[str]:
    import ast

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_phrase_reads_like_a_translation(path: Path):
    text = " ".join(prose(path).split())
    matches = [
        f"...{text[max(0, match.start() - 40) : match.end() + 30]}...: better {better}"
        for phrase, better in BETTER.items()
        for match in re.finditer(rf"\b{phrase}\b", text, re.IGNORECASE)
    ]
    assert not matches, "\n".join([f"{path.name}:", *matches])


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.suffix == ".py"], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_a_docstring_begins_with_a_verb_or_a_noun(path: Path):
    wrong = [text.split("\n")[0] for text in docstrings(path) if OPENINGS.match(text)]
    assert not wrong, f"{path.name}: {wrong}"


def test_a_phrase_would_be_noticed(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text('"""What it is."""\nprint(f"the run {1} goes on")  # anew\n')
    assert "goes on" in prose(program)
    assert "anew" in prose(program)
    assert [text for text in docstrings(program) if OPENINGS.match(text)]
