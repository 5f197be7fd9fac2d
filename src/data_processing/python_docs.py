"""Prose that comes with Python: the language reference and the docstrings of its library, NumPy and PyTorch.

Only the language reference is imported (`pydoc_data.topics`, strings only). Docstrings are read from source files
with `ast`.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Third-party packages worth reading if installed: PyTorch always is, NumPy nearly always.
_PACKAGES = ("numpy", "torch")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages", "_vendor", "__pycache__"}
# Private folders of packages, mostly compiler internals, are skipped too. But much of NumPy is in _core.
_KEPT_PRIVATE = {"_core"}
_MIN_DOCSTRING_CHARS = 100


def package_versions() -> dict[str, str]:
    """Return the versions of Python and the packages that `documents` reads on this machine."""
    installed = {name: importlib.metadata.version(name) for name in _PACKAGES if _package_folder(name)}
    return {"python": platform.python_version(), **installed}


def documents() -> Iterator[str]:
    """Yield a text for each topic of the language reference, then for each module with docstrings, in a fixed order.

    A module's text is its docstring and those of its classes and functions, each below its full name.
    Docstrings that are repeated or have less than 100 characters are left out.
    """
    from pydoc_data.topics import topics

    yield from dict.fromkeys(topics[name] for name in sorted(topics))
    seen: set[str] = set()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in _python_files(stdlib, skip_private=False):
        yield from _module_text(path, stdlib, seen)
    for package in _PACKAGES:
        if folder := _package_folder(package):
            for path in _python_files(folder, skip_private=True):
                yield from _module_text(path, folder.parent, seen)


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _python_files(root: Path, skip_private: bool) -> Iterator[Path]:
    """Yield the source files below `root` that are neither tests nor, on request, in private folders."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS
            and not (skip_private and name.startswith("_") and name not in _KEPT_PRIVATE)
        )
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _module_text(path: Path, root: Path, seen: set[str]) -> Iterator[str]:
    """Yield the text of a module, or nothing if it has no new docstrings or cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    sections = []
    for name, docstring in _docstrings(tree, module):
        if len(docstring) >= _MIN_DOCSTRING_CHARS and docstring not in seen:
            seen.add(docstring)
            sections.append(f"{name}\n\n{docstring}")
    if sections:
        yield "\n\n\n".join(sections) + "\n"


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield the full names and cleaned docstrings of `node` and everything inside it, in reading order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, inspect.cleandoc(docstring)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt):  # definitions under an if or a try
            yield from _docstrings(child, name)
