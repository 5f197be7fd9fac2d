"""What the tests of the hub run as a process, because the client reads HF_* variables when it is imported.

python -m tests.data_processing.hub_client files FOLDER PARALLEL FIRST   or   rows COLUMN SEED FIRST

Prints a JSON object for every file or row group. `files` keeps its listing in FOLDER and goes on with that one; with
PARALLEL 0 it keeps all files.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from src.data_processing import hub_files
from src.data_processing.hub_downloads import Downloads
from src.data_processing.hub_row_groups import remote_row_groups
from src.utils.errors import exit_with

REPOSITORY, FOLDER = "org/data", "sample/10BT"


def main() -> None:
    hub_files.BASE_DELAY_S = 0.01
    hub_files.WORTHWHILE_BYTES = 20_000
    if sys.argv[1] == "files":
        fetch_files(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        listing = hub_files.list_files(REPOSITORY, FOLDER, None)
        for texts in remote_row_groups(listing, sys.argv[2], int(sys.argv[3]), int(sys.argv[4])):
            say(texts=texts.to_pylist())


def fetch_files(folder: Path, parallel: int, first: int) -> None:
    saved = folder / "listing.json"
    if saved.exists():
        listing = hub_files.HubListing.from_dict(json.loads(saved.read_text()))
    else:
        listing = hub_files.list_files(REPOSITORY, FOLDER, None)
        saved.write_text(json.dumps(dataclasses.asdict(listing)))
    with Downloads(listing, folder / "downloads", first, parallel or len(listing.files)) as downloads:
        for number in range(first, len(listing.files)):
            path = downloads.path(number)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            there = [str(p) for p in (folder / "downloads").rglob("*") if p.is_file()]
            say(path=str(path), sha256=sha256, there=there, **dataclasses.asdict(downloads.progress()))
            if parallel:
                downloads.done_with(number)


def say(**content: Any) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    exit_with(main)
