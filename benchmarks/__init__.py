import src  # noqa: F401 (before torch: see there)
