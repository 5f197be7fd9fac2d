"""Everything but the training loop. Imported before torch, because of what it sets in the environment.

OpenMP threads that wait for each other should soon let go of the core. Spinning for long, the default of the library
PyTorch's Linux builds use, made a training step 18 times slower beside another program on the same two cores (LOG.md).

What torch.compile makes lies with our data, where a user finds it and a second start reuses it. Importing torch may
already fail where that folder cannot be made, so another takes its place then.
"""

import os
import tempfile
from pathlib import Path

from src.utils.root import COMPILE_CACHE

os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _can_be_written(folder: Path) -> bool:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK)


if not _can_be_written(Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILE_CACHE))).absolute()):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/compile_cache_{os.getuid()}"
