"""The documentation matches the project: links, commands, messages, tables and the examples in Python."""

import ast
import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch

import pretrain
from src.data_processing.shards import ensure_verified, read_manifest
from src.data_processing.training_data_loader import TrainingDataLoader, WindowDataset
from src.model import LLM
from src.model_configs.my_llm_config import PRESETS
from src.params import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from src.utils.root import ROOT
from tests.conftest import write_dataset

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", ROOT / "LOG.md", *NOTEBOOKS]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def markdown(page: Path) -> str:
    """A page's text; of a notebook, that of its cells of text."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", markdown(page), re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", markdown(page)))
    return re.findall(r"\]\(([^)]*)\)", prose) + re.findall(r"(?:src|srcset|href)=\"([^\"]*)\"", prose)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them: lower case, without punctuation, blanks become hyphens."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", markdown(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path):
    for link in links(page):
        if link.startswith("http"):  # no network: only whether it can be an address
            address = urlparse(link)
            assert address.scheme == "https"
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), link
            assert not re.search(r"\s", link), link
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(ROOT), f"{page.name} links out of the repository, to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def setting_options() -> set[str]:
    """Of the command line that a Config has. A setting that is true or false has two."""
    options = set()
    for field in dataclasses.fields(Config):
        value = getattr(Config(), field.name)
        is_group = dataclasses.is_dataclass(value)
        for name, default in vars(value).items() if is_group else [(field.name, value)]:
            option, prefix = name.replace("_", "-"), f"--{field.name}." if is_group else "--"
            options |= {f"{prefix}{option}"} | ({f"{prefix}no-{option}"} if isinstance(default, bool) else set())
    return options


def options_of(program: Path) -> set[str]:
    """What a program takes: what it adds to its parser, and a Config's where it asks for one."""
    source = program.read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    added = {
        argument.value
        for call in calls
        if ast.unparse(call.func).endswith(("add", "add_argument"))
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }
    constants = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    own = {"--dry-run"} & constants
    return {"--help", *added, *own} | (setting_options() if "config_from_command_line" in source else set())


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Module or program, and the options behind it, of every `python ...` on the page."""
    pattern = r"python3? (?:-m ([\w.]+)|(pretrain\.py))([^`|\n]*)"
    for module, program, rest in re.findall(pattern, markdown(page).replace("\\\n", " ")):
        yield module or program, re.findall(r"(?<!\S)\[?(--[a-z][\w.-]*)", rest)


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_commands_exist_and_take_their_options(page: Path):
    for command, options in commands(page):
        program = ROOT / (command if command.endswith(".py") else command.replace(".", "/") + ".py")
        if not program.exists():
            top = command.partition(".")[0]
            assert not (ROOT / top).exists(), f"{page.name}: there is no {command}"
            assert importlib.util.find_spec(top), f"{page.name}: there is no {command}"
        elif unknown := set(options) - options_of(program):
            raise AssertionError(f"{page.name}: {command} does not take {unknown}")


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_settings_exist(page: Path):
    groups = "|".join(
        field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(Config(), field.name))
    )
    named = set(re.findall(rf"--(?:{groups})\.[\w-]+", markdown(page)))
    assert named <= setting_options()


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_files_and_tests_that_are_named_exist(page: Path):
    rooms = "src|tests|benchmarks|assets|docs|notebooks|slurm"
    for path, test in re.findall(rf"`((?:{rooms})/[\w./*-]+)(?:::(\w+))?`", markdown(page)):
        found = list(ROOT.glob(path.rstrip("/")))
        assert found, f"{page.name}: there is no {path}"
        assert not test or f"def {test}(" in found[0].read_text(encoding="utf-8"), (
            f"{page.name}: no test {test} in {path}"
        )


def tree() -> set[str]:
    """Patterns of files and folders in the README's tree, as paths; folders end with a slash."""
    section = markdown(ROOT / "docs" / "layout.md")
    (_, drawing), *_ = re.findall(r"^```(\w*)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    file = r"(?:[\w*-]+(?:/[\w*-]+)*\.(?:py|sh|md|txt|html|ipynb|sbatch|svg)|llm\b)"
    found, folders = set(), {0: ""}
    for line in drawing.splitlines():
        depth = len(line) - len(line.lstrip())
        begin = folders[max(level for level in folders if level <= depth)]
        first = re.match(rf"\s*((?:(?:{file}|[\w-]+/)\s+)+|(?:{file}|[\w-]+/)$)", line + " ")
        assert first, f"layout.md: {line!r} names nothing"
        names = first[1].split()
        names += re.findall(rf"; ({file}):", line)  # described on the same line
        for entry in names:
            where = f"{names[0].rpartition('/')[0]}/" if "/" in names[0] and "/" not in entry else ""
            found.add(begin + where + entry)
        if names[0].endswith("/"):
            folders = {level: folder for level, folder in folders.items() if level <= depth} | {
                depth + 1: begin + names[0]
            }
    return found


def test_every_path_in_the_layout_exists():
    assert len(tree()) > 50
    for pattern in tree():
        assert list(ROOT.glob(pattern.rstrip("/"))), f"there is no {pattern}"


def test_every_source_file_stands_in_the_layout():
    files = [path for path in [*ROOT.glob("src/**/*.*"), *ROOT.glob("*.py"), *ROOT.glob("*.sh")] if path.is_file()]
    sources = {name(path) for path in files if path.suffix in (".py", ".sh", ".html") and path.name != "__init__.py"}
    patterns = tree()
    missing = sorted(path for path in sources if not any(fnmatch(path, pattern) for pattern in patterns))
    assert not missing, "give each a place in docs/layout.md"


def messages() -> list[str]:
    """Every text that the programs can print, with NUL for what is filled in; comments and docstrings are none."""
    found = []
    for path in [*ROOT.glob("src/**/*.py"), ROOT / "pretrain.py"]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        said_to_readers = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said_to_readers:
                found.append(node.value)
    for script in [ROOT / "llm", *ROOT.glob("*.sh"), *ROOT.glob("src/**/*.sh")]:
        found += [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    return found


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "troubleshooting.md"], ids=name)
def test_messages_are_those_of_the_source(page: Path):
    """In tables whose first column is `message`; ... in a quotation stands for what is filled in."""
    tables = re.findall(r"^\| message \|.*\n\|[- |]*\n((?:\|.*\n?)+)", markdown(page), re.MULTILINE)
    quoted = [
        text for table in tables for row in table.splitlines() for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    ]
    assert page.name == "README.md" or len(quoted) > 100
    said = messages()
    for text in quoted:
        pattern = re.compile(".*?".join(re.escape(part) for part in text.split("...")), re.DOTALL)
        assert any(pattern.search(message) for message in said), f"{page.name}: nothing says {text!r}"


def rows(page: Path, first_column: str) -> list[list[str]]:
    """The body of the table whose heading begins so."""
    table = re.search(rf"^\| {first_column} \|.*\n\|[-: |]*\n((?:\|.*\n?)+)", markdown(page), re.MULTILINE)
    assert table
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table[1].splitlines()]


@pytest.mark.parametrize(
    ("column", "preset"), [(-4, "debug"), (-3, "laptop"), (-2, "lf_llm_269m"), (-1, "lf_llm_269m_fast")]
)
def test_tables_of_the_presets_are_the_codes(column: int, preset: str):
    page, config = ROOT / "docs" / "architecture.md", PRESETS[preset]().model
    with torch.device("meta"):
        sizes = {parameter: p.numel() for parameter, p in LLM(config).named_parameters()}
    for _, names, *numbers in rows(page, "part"):
        patterns = re.findall(r"`([^`]+)`", names)
        count = sum(size for parameter, size in sizes.items() if any(fnmatch(parameter, p) for p in patterns))
        assert numbers[column] == f"{count:,}", names
    for field, *numbers in rows(page, "shape"):
        assert float(numbers[column].replace(",", "")) == getattr(config, field.strip("`"))


@pytest.fixture(scope="module")
def temp_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `pydocs` and the run `debug`, small ones, in its temp_data."""
    home = tmp_path_factory.mktemp("home")
    folder = write_dataset(home / "temp_data" / "datasets" / "pydocs", [3_000, 5_000], 500, n_vocab=50_257)
    config = Config(
        run_name="debug",
        model=ModelConfig(n_ctx=16, n_embd=16, n_head=2, n_layer=1),
        data=DataConfig(dir=str(folder)),
        train=TrainConfig(
            total_steps=2, batch_tokens=64, micro_batch_size=4, precision="float32", compile="off", device="cpu"
        ),
        eval=EvalConfig(val_tokens=64, hellaswag_items=0),
        checkpoint=CheckpointConfig(every_steps=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "RUNS", home / "temp_data" / "runs")
        pretrain.train(config)
    return home


def run_examples(page: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's examples in Python leave, one after the other."""
    monkeypatch.chdir(home)
    examples = fenced(ROOT / "docs" / page, "python")
    assert examples
    left: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, page, "exec"), left)
    return left


def test_examples_of_the_data_format(temp_data: Path, monkeypatch: pytest.MonkeyPatch):
    """Which windows are in a step is what the loader says; the dataset made by hand can be trained on."""
    left = run_examples("data_format.md", temp_data, monkeypatch)
    manifest = read_manifest(left["folder"])
    assert len(left["documents"]) == manifest.train[0].documents
    windows = WindowDataset(left["folder"], manifest.train, 128, 50_257, at_least=1)
    loader = TrainingDataLoader(
        windows,
        seed=42,
        batch_size=16,
        micro_batch_size=16,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        first_step=0,
    )
    for step in (0, 1, 9):  # 62 windows: the last is two epochs on
        assert left["windows_of_step"](step, 42, 16, 128) == loader.step_windows(step)
    shard, window = loader.step_windows(0)[0]
    assert np.array_equal(np.load(windows.paths[shard])[window * 128 :][:128], next(loader)[0][0])
    made = read_manifest(left["made"])
    ensure_verified(left["made"], made)
    assert WindowDataset(left["made"], made.train, 128, 50_257, at_least=16).n_windows == 315


def test_examples_of_the_checkpoint_format(temp_data: Path, monkeypatch: pytest.MonkeyPatch):
    left = run_examples("checkpoint_format.md", temp_data, monkeypatch)
    assert left["newest"].name == "step_0000002"
    assert left["logits_BTV"].shape == (1, 3, 50_257)
    weights, model = left["weights"], left["loaded"].model
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert set(weights) == set(parameters)
    assert all(np.array_equal(weights[key], tensor) for key, tensor in parameters.items())
    assert {array.dtype for array in weights.values()} == {np.dtype("float32")}


def test_examples_of_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_examples("architecture.md", tmp_path, monkeypatch)
    assert f"# {capsys.readouterr().out}" in fenced(ROOT / "docs" / "architecture.md", "python")[0]


def test_files_that_are_shown_have_the_fields_of_real_ones(temp_data: Path):
    (shown,) = map(json.loads, fenced(ROOT / "docs" / "data_format.md", "json"))
    real = json.loads((temp_data / "temp_data" / "datasets" / "pydocs" / "manifest.json").read_text())
    assert set(shown) == set(real)
    assert set(shown["counts"]) == set(real["counts"])
    assert set(shown["shards"][0]) == set(real["shards"][0])
    (shown,) = map(json.loads, fenced(ROOT / "docs" / "checkpoint_format.md", "json"))
    run = temp_data / "temp_data" / "runs" / "debug"
    real = json.loads((run / "checkpoints" / "step_0000002" / "state.json").read_text())
    assert set(shown) == set(real)
    assert set(shown["progress"]) == set(real["progress"])
    for group, settings in shown["config"].items():
        assert group in real["config"]
        if isinstance(settings, dict):
            assert set(settings) <= set(real["config"][group])
