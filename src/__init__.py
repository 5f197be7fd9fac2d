"""Everything but the training loop. Imported before torch, because of what it sets in the environment.

OpenMP threads that wait for each other should soon let go of the core. Spinning for long, the default of the library
PyTorch's Linux builds use, made a training step 18 times slower beside another program on the same two cores (LOG.md).

What torch.compile makes lies with our data, where a user finds it and a second start reuses it. PyTorch makes that
folder when it is imported for training. Where it can't, or the path holds a space, which the compiler's commands don't
take, a folder of the user's own among the temporary files serves.
"""

import os
import tempfile
from pathlib import Path

from src.utils.root import COMPILE_CACHE

os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def available_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serves(folder: Path) -> bool:
    if any(map(str.isspace, str(folder))):
        return False
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return there.is_dir() and os.access(there, os.W_OK)


def _own_temporary_folder() -> str:
    """The same one at the user's next start, unless it is somebody else's: it holds programs."""
    folder = f"{tempfile.gettempdir()}/compile_cache_{os.getuid()}"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.lstat(folder).st_uid == os.getuid() and not os.path.islink(folder):
            return folder
    except OSError:
        pass
    return tempfile.mkdtemp(prefix="compile_cache_")


if not _serves(Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILE_CACHE))).absolute()):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _own_temporary_folder()
