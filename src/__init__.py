"""Everything but the training loop. Imported before torch, because of the next line.

OpenMP threads that wait for each other should soon let go of the core. Spinning for long, the default of the library
PyTorch's Linux builds use, made a training step 18 times slower beside another program on the same two cores (LOG.md).
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
