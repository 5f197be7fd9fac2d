"""Says whether this interpreter has the packages that a requirements file pins. Standard library only.

python check_environment.py requirements.txt: exits 0 if it has them, else 1 and prints what is missing.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing(requirements: Path) -> list[str]:
    """The pins `name==version` of the file, and of those it includes with -r, that are not installed.

    A pin may be for some Pythons only: `; python_version < "3.11"`, or >=.
    """
    lacking = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            lacking += missing(requirements.parent / line[3:].strip())
        elif line and _is_for_this_python(line) and not _installed(line.split(";")[0]):
            lacking.append(line.split(";")[0])
    return lacking


def _is_for_this_python(pin: str) -> bool:
    marker = re.search(r'; *python_version *(<|>=) *"3\.(\d+)"', pin)
    return marker is None or (marker[1] == "<") == (sys.version_info < (3, int(marker[2])))


def _installed(pin: str) -> bool:
    name, wanted = pin.split("==")
    try:
        found = version(name)
    except PackageNotFoundError:
        return False
    return found.split("+")[0] == wanted  # a build tag such as +cpu or +cu130 is not another version


if __name__ == "__main__":
    lacking = missing(Path(sys.argv[1]))
    print(" ".join(lacking))
    sys.exit(bool(lacking))
