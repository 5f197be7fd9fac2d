"""The house's arrows: which of our files may import which, and that what they import from others is pinned."""

import ast
import re
import sys
from pathlib import Path

import pytest

from src.utils.root import ROOT

# Rooms from the bottom up: a file may import its own room and those below.
LEVELS = [
    ("src/utils/root.py",),
    ("src/utils/", "src/__init__.py"),
    ("src/params.py",),
    ("src/model_configs/", "src/global_cache.py"),
    ("src/rope.py", "src/ffn.py", "src/lm_loss.py"),
    ("src/attention.py",),
    ("src/transformer_block.py",),
    ("src/model.py",),
    ("src/data_processing/", "src/model_utils/"),
    ("src/model_assessment/",),
    ("src/preflight.py", "src/launcher_settings.py"),
    ("pretrain.py",),
]
FILES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("src/**/*.py"), ROOT / "pretrain.py"])
FORBIDDEN = {
    "src/params.py": {"torch", "numpy", "os", "sys"},
    "src/model_assessment/report.py": {"torch"},
    "src/data_processing/training_data_loader.py": {"tiktoken"},
    "src/model_utils/checkpoint_utils.py": {"pickle"},
}
# A file that other rooms call must not know these of ours.
HUB = ("src.data_processing.hub_dataset",)
PREPARATION = (*HUB, *(f"src.data_processing.{name}" for name in ("data_downloader", "document_shuffle")))
MUST_NOT_KNOW = {
    "src/data_processing/": ("src.model", "src.model_utils", "src.model_assessment"),
    "src/data_processing/shards.py": PREPARATION,
    "src/data_processing/training_data_loader.py": (*PREPARATION, "src.data_processing.tokenizer"),
    "src/data_processing/text_sources.py": (
        "src.data_processing.data_downloader",
        "src.data_processing.document_shuffle",
    ),
    "src/model_utils/checkpoint_utils.py": ("src.model",),
    "src/model_assessment/validation.py": ("src.model_utils", "src.utils.logger"),
    "src/model_assessment/report.py": ("src.model", "src.model_utils", "src.data_processing"),
    "src/params.py": ("src",),
    "src/model_utils/": ("src.data_processing", "src.model_assessment"),
}
# But an exported model takes its tokenizer along.
MAY_KNOW = {"src/model_utils/hf_export.py": "src.data_processing.tokenizer"}
OPTIONAL = {"gguf", "wandb"}  # pinned in requirements-dev.txt: a command says how to install it where it is needed


# The entry for Python and notebooks, which imports only when it is called.
FACADE = ("src/__init__.py", "src/model_assessment/sampling.py")


def level(path: str) -> int:
    matches = [i for i, room in enumerate(LEVELS) if any(path == p or path.startswith(p) for p in room)]
    return min(matches)


def imports(path: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def as_file(module: str) -> str | None:
    path = Path(*module.split(".")).with_suffix(".py").as_posix()
    return path if path in FILES else None


@pytest.mark.parametrize("path", FILES)
def test_no_arrow_points_back(path: str):
    for module in imports(path):
        imported = as_file(module)
        if imported and imported != path and (path, imported) != FACADE:
            assert level(imported) <= level(path), f"{path} imports {imported}, which is above it"


@pytest.mark.parametrize("path", FORBIDDEN)
def test_packages_a_file_must_do_without(path: str):
    assert not FORBIDDEN[path] & {module.split(".")[0] for module in imports(path)}


def test_what_is_imported_is_pinned():
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    packages = {module.split(".")[0] for path in FILES for module in imports(path)}
    theirs = packages - sys.stdlib_module_names - {"src", "pydoc_data"}  # of the standard library too
    assert {package.replace("_", "-") for package in theirs - OPTIONAL} <= set(pinned)


@pytest.mark.parametrize("room", MUST_NOT_KNOW)
def test_rooms_a_file_must_not_know(room: str):
    for path in (p for p in FILES if p.startswith(room)):
        allowed = MAY_KNOW.get(path, "nothing")
        for module in (module for module in imports(path) if not f"{module}.".startswith(f"{allowed}.")):
            for forbidden in MUST_NOT_KNOW[room]:
                assert module != forbidden, f"{path} knows {module}"
                assert not module.startswith(f"{forbidden}."), f"{path} knows {module}"


def test_every_file_has_a_room():
    assert len(FILES) > 20
    assert all(level(path) >= 0 for path in FILES if not path.endswith("__init__.py"))
