"""Everything but the training loop. Imported before torch, because of what it sets in the environment.

OpenMP threads that wait for each other should soon let go of the core. Spinning for long, the default of the library
PyTorch's Linux builds use, made a training step 18 times slower beside another program on the same two cores (LOG.md).

What torch.compile makes lies with our data, where a user finds it and a second start reuses it.
"""

import os

from src.utils.root import COMPILE_CACHE

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILE_CACHE))
