"""Everything but the training loop. Imported before torch, because it sets the environment.

OpenMP threads that wait for each other must release the core soon. Spinning for long, the default of the library in
PyTorch's Linux builds, made a training step 18 times slower next to another program on the same two cores (LOG.md).

torch.compile's cache is kept with our data, where a user finds it and the next start reuses it. PyTorch creates that
folder when it is imported for training. If it can't, or if the path contains a space, which the compiler's commands
can't handle, a folder in the user's temporary directory is used.
"""

from __future__ import annotations  # so that a Python that is too old gets far enough to say so

import os
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from src.utils.root import COMPILE_CACHE, ROOT

if TYPE_CHECKING:
    from src.model_assessment.sampling import TextModel

for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
        os.fstat(number)
    except OSError:  # closed before the start: the next file opened would take its number, and receive its output
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if getattr(sys, name) is None:
        setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if os.path.expanduser("~") == "~":  # neither HOME nor a known user, as in some containers: matplotlib would not import
    os.environ.setdefault("MPLCONFIGDIR", f"{tempfile.gettempdir()}/matplotlib_{os.getuid()}")


def _name_the_right_python(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends the program with exit code 2, naming the Python to use, if this one is too old or lacks a pinned package."""
    missing = (getattr(error, "name", None) or "").partition(".")[0] if kind is ModuleNotFoundError else ""
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").replace("-", "_") if missing else ""
    is_old = sys.version_info < (3, 10)
    if not is_old and f"\n{missing}==" not in pins:
        return _earlier_hook(kind, error, trace)
    ours = ROOT / ".venv" / "bin" / "python"
    cause = "Python 3.10 to 3.13 is needed" if is_old else f"it lacks the package {missing}"
    remedy = f"Install it with: {sys.executable} -m pip install -r requirements.txt"
    if ours.exists() and os.path.abspath(sys.executable) != str(ours):
        remedy = f"Use {ours} instead"
    elif is_old or not ours.exists():
        remedy = f"Run {ROOT / 'run_pre_training_e2e_debug.sh'} once, which makes {ours}, and use that"
    print(f"error: Cannot use {sys.executable}: {cause}. {remedy}.", file=sys.stderr)
    raise SystemExit(2)


_earlier_hook, sys.excepthook = sys.excepthook, _name_the_right_python


def load(checkpoint: str | Path, device: str = "auto", weights: str = "auto") -> TextModel:
    """Loads a trained model: a run's name, its folder, one of its step_* folders, or an export.

        from src import load
        model = load("mine")
        print(model.generate("The", n=3, temperature=0.8)[0])
        for piece in model.stream("The"): print(piece, end="")
        model.loss("Some text."), model.logits("Some text.")

    `device`: auto, cpu, cuda or mps. `weights`: float32, bf16, or auto: bf16 if the device computes in it. Raises
    UserError.
    """
    from src.model_assessment.sampling import TextModel  # imports torch, which takes seconds

    return TextModel(checkpoint, device, weights)


def available_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_usable(folder: Path) -> bool:
    if any(map(str.isspace, str(folder))):
        return False
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    # The compiler's programs cannot start from a disk mounted with noexec.
    may_run = not os.statvfs(existing).f_flag & os.ST_NOEXEC
    return may_run and existing.is_dir() and os.access(existing, os.W_OK)


def _own_temporary_folder() -> str:
    """A folder for the user's compiled programs, reused at the next start unless another user owns it."""
    folder = f"{tempfile.gettempdir()}/compile_cache_{os.getuid()}"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.lstat(folder).st_uid == os.getuid() and not os.path.islink(folder):
            return folder
    except OSError:
        pass
    return tempfile.mkdtemp(prefix="compile_cache_")


if not _is_usable(Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILE_CACHE))).absolute()):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _own_temporary_folder()
