"""The launcher's variables, checked and completed, as assignments that the shell evaluates.

Presets and sources are those of PRESETS and SOURCES. Imports torch only to count GPUs.
"""

import os
import shlex
import sys
import uuid
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from src import available_cores
from src.data_processing.text_sources import SOURCES, Request
from src.model_configs.arguments import whole_number, without_resume
from src.model_configs.my_llm_config import PRESETS, config_from_command_line
from src.utils import root
from src.utils.errors import UserError, exit_with, say
from src.utils.files import read_json

SCRIPT = "run_pre_training_e2e.sh"
VARIABLES = (
    *("DEBUG_MODE", "PRESET", "RUN_NAME", "TEMP_DATA_DIR", "PYTHON", "NPROC", "MAX_RESTARTS"),
    *("DATA_SOURCE", "DATA_PATH", "DATA_DATASET", "DATA_CONFIG", "DATA_SPLIT", "DATA_TEXT_FIELD", "DATA_MAX_TOKENS"),
    *("DATA_DIR", "DATA_WAIT", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
)
MAX_PROCESSES = 1_024  # and machines
MEETING_MARGIN_S = 120  # another machine may notice a failure only after train.timeout_s


def main() -> None:
    os.chdir(os.environ.get("STARTED_IN") or ".")  # the variables may hold relative paths
    overrides = sys.argv[1:]
    sys.argv[0] = SCRIPT
    if overrides[:1] == ["--early"]:
        chosen(os.environ, overrides[1:])
        return
    for name, value in settings(os.environ, overrides).items():
        if isinstance(value, list):  # an array; "@" means the script's arguments
            joined = shlex.join(value)
            print(f"set -- {joined}" if name == "@" else f"{name}=({joined})")
        else:
            print(f"{name}={shlex.quote(str(value))}")


def settings(variables: Mapping[str, str], overrides: list[str]) -> dict[str, str | int | list[str]]:
    """Returns every variable of the launcher by name. Raises UserError or ConfigError for an invalid one."""
    as_typed, typed = variables, overrides
    variables, overrides, preset, source = chosen(variables, overrides)
    nodes = number(variables, "NNODES", 1, 1, "a number of machines", MAX_PROCESSES)
    node = number(variables, "NODE_RANK", 0, 0, "this machine's number", nodes - 1)
    if nodes > 1 and not variables.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR is not set. With NNODES={nodes}, set it to the machine of NODE_RANK=0 on all.")
    processes = number(variables, "NPROC", 0, 1, "a number of processes", MAX_PROCESSES)
    if not processes and PRESETS[preset].processes != "one":
        import torch  # takes seconds

        processes = torch.cuda.device_count()
    processes = max(1, processes)
    threads = max(1, available_cores() // processes)
    # OpenMP accepts a list with one number per level of nested loops.
    omp = {"OMP_NUM_THREADS": variables.get("OMP_NUM_THREADS", "").partition(",")[0]}
    arguments = [argument for argument in overrides if argument != "--dry-run"]
    has_data = _has_data(arguments)
    data = "ready" if has_data else "prepare" if node == 0 else "wait"
    run_name, preparation = preset, list[str]()
    if not has_data:
        request = requested({**variables, "DATA_SOURCE": source})
        folder = dataset_name(request, variables, preset)
        preparation = _preparation(request, folder)
        arguments = ["--data.dir", folder, *arguments]
        run_name = _run_name(preset, request, folder)
    sys.argv[1:] = arguments = [preset, "--run-name", variables.get("RUN_NAME") or run_name, *arguments]
    with redirect_stdout(sys.stderr):  # the shell evaluates stdout
        config = config_from_command_line("", f"./{SCRIPT}")
    return {
        "PRESET": preset,
        "RUN_NAME": config.run_name,
        "RUN_DIR": str(root.RUNS / config.run_name),
        "TEMP_DATA_DIR": str(root.TEMP_DATA),
        "PROMPT": next(iter(config.eval.sample_prompts), "The"),
        "DATA": data,
        "DATA_SOURCE": source,
        "DATA_PATH": "\n".join(_paths(variables)),
        "DATASET": str(root.dataset_dir(config.data.dir)),
        "DATA_WAIT": number(variables, "DATA_WAIT", 21_600, 0, "a number of seconds"),
        "NPROC": processes,
        "NNODES": nodes,
        "NODE_RANK": node,
        "MASTER_PORT": number(variables, "MASTER_PORT", 29_500, 1, "a port", 65_535),
        "MAX_RESTARTS": number(variables, "MAX_RESTARTS", 3, 0, "a number of restarts"),
        "MEETING_SECONDS": int(config.train.timeout_s) + MEETING_MARGIN_S,
        "OMP_NUM_THREADS": number(omp, "OMP_NUM_THREADS", threads, 1, "a number of threads", MAX_PROCESSES),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": number(
            variables, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 120, 0, "a number of seconds", 10**6
        ),
        "LAUNCH_ID": variables.get("LAUNCH_ID") or uuid.uuid4().hex,
        "RESUME": _command(as_typed, typed),
        "DRY_RUN": "yes" if "--dry-run" in overrides else "",
        "preparation": preparation if data == "prepare" else [],
        "@": arguments,
    }


def chosen(variables: Mapping[str, str], overrides: list[str]) -> tuple[Mapping[str, str], list[str], str, str]:
    """Returns the variables, the overrides without plain arguments, the preset and the source of text.

    Raises UserError for typical first mistakes. Uses only the standard library, because it also runs before packages
    are installed, which takes minutes.
    """
    plain = list(takewhile(lambda argument: not argument.startswith("-"), overrides))
    if plain:
        preset, *paths = plain
        if preset not in PRESETS:
            raise UserError(
                f"Cannot find the preset {preset!r}. The first argument is one of {', '.join(PRESETS)}; files and "
                "folders of text come after it, then settings."
            )
        text = {"DATA_SOURCE": "files", "DATA_PATH": "\n".join(paths)} if paths else {}
        variables = {**variables, "PRESET": preset, "DEBUG_MODE": "", **text}
        overrides = overrides[len(plain) :]
        if paths and _has_data(overrides):
            raise UserError(
                f"Cannot use both {paths[0]!r} and --data.dir: texts become a new dataset. Leave out one of them."
            )
    # Empty counts as unset, because a job script may pass on every variable.
    debug = one_of("DEBUG_MODE", (variables.get("DEBUG_MODE") or "False").capitalize(), ("True", "False"))
    preset = one_of("PRESET", "debug" if debug == "True" else variables.get("PRESET") or "lf_llm_269m", PRESETS)
    default = "files" if variables.get("DATA_PATH") else "hub" if variables.get("DATA_DATASET") else ""
    source = one_of("DATA_SOURCE", variables.get("DATA_SOURCE") or default or PRESETS[preset].source, SOURCES)
    if source == "files" and not variables.get("DATA_PATH") and not _has_data(overrides):
        raise UserError(
            f"The text for preset {preset} is missing. Name files or folders before all settings: "
            f"./{SCRIPT} {preset} book.txt. Or use DATA_SOURCE=pydocs, the documentation that comes with Python."
        )
    return variables, overrides, preset, source


def _has_data(arguments: list[str]) -> bool:
    return any(argument.split("=")[0] == "--data.dir" for argument in arguments)


def requested(variables: Mapping[str, str]) -> Request:
    """Returns the dataset that the variables describe."""
    source = one_of("DATA_SOURCE", variables.get("DATA_SOURCE", ""), SOURCES)
    hub: dict[str, Any] = {}
    if source == "hub":
        hub = {name: variables.get(f"DATA_{name.upper()}") or None for name in ("dataset", "config", "split")}
        if not hub["dataset"]:
            raise UserError("DATA_DATASET is not set. DATA_SOURCE=hub needs the name of a dataset, OWNER/NAME.")
    return Request(
        [source],
        _paths(variables) if source == "files" else [],
        variables.get("DATA_TEXT_FIELD") or Request.text_field,
        max_tokens=number(variables, "DATA_MAX_TOKENS", 0, 1, "a number of tokens, such as 10_000_000 or 1e7") or None,
        **hub,
    )


def dataset_name(request: Request, variables: Mapping[str, str], preset: str) -> str:
    """Returns the name or path of the folder of the dataset that `request` describes, prepared or not.

    The name follows from the source. If a dataset of that name holds different text, a number is added.
    """
    name = request.default_name
    if variables.get("DATA_DIR") or SOURCES[request.sources[0]].dataset_name:
        return variables.get("DATA_DIR") or name
    different = ""
    for number in count(1):
        attempt = name if number == 1 else f"{name}-{number}"
        if not (other := _other_text(request, attempt)):
            if different:
                say(f"note: the dataset is {attempt}, because {different}")
            return attempt
        run = _run_name(preset, request, attempt)
        different = different or (
            f"{root.DATASETS / attempt} {other}. To train on that, or resume, add --data.dir {attempt} --run-name {run}"
        )
    raise AssertionError("count() does not end")


def _other_text(request: Request, name: str) -> str:
    """Describes how the text of dataset `name`, prepared or not, differs from the requested text; "" if it does not."""
    from src.data_processing.data_downloader import differences  # not at the top: `chosen` runs without packages
    from src.data_processing.document_shuffle import JOURNAL, WORK
    from src.data_processing.shards import MANIFEST, read_manifest

    folder = root.dataset_dir(name)
    if os.path.exists(folder / MANIFEST):
        changes = differences(request, folder, read_manifest(folder))
        return f"holds different text: {changes}" if changes else ""
    with suppress(OSError, UserError, LookupError, TypeError):
        if read_json(folder / WORK / JOURNAL)["request"] != request.stored():
            return "is being prepared from different text"
    return ""


def _run_name(preset: str, request: Request, folder: str) -> str:
    """Returns the preset's name, followed by the dataset's if the text is the user's."""
    return preset if SOURCES[request.sources[0]].dataset_name else f"{preset}-{Path(folder).name}"


def _preparation(request: Request, folder: str) -> list[str]:
    """Returns the arguments of data_downloader that prepare `request` in `folder`."""
    arguments = ["--source", *request.sources, "--out", str(root.dataset_dir(folder))]
    arguments += ["--path", *request.paths] if request.paths else []
    for name in ("dataset", "config", "split", "text_field", "max_tokens"):
        if (value := getattr(request, name)) != getattr(Request, name):
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def _paths(variables: Mapping[str, str]) -> list[str]:
    """Returns the paths in DATA_PATH, separated by newlines or colons. A line that exists as a path is kept whole."""
    lines = [os.path.expanduser(line) for line in variables.get("DATA_PATH", "").splitlines()]
    parts = [[line] if os.path.exists(line) else line.split(":") for line in lines]
    return [os.path.abspath(os.path.expanduser(part)) for line in parts for part in line if part]


def _command(variables: Mapping[str, str], arguments: list[str]) -> str:
    """Returns the launcher's command as it was typed, for a shell in the same folder."""
    values = [f"{name}={shlex.quote(variables[name])}" for name in VARIABLES if variables.get(name)]
    here = Path(variables.get("STARTED_IN") or ".").resolve() == root.ROOT
    script = f"./{SCRIPT}" if here else shlex.quote(str(root.ROOT / SCRIPT))
    return " ".join([*values, script, shlex.join(without_resume(arguments))]).strip()


def one_of(variable: str, value: str, names: Collection[str]) -> str:
    if value not in names:
        raise UserError(f"{variable} is {value!r}; it must be one of {', '.join(names)}.")
    return value


def number(
    variables: Mapping[str, str], name: str, default: int, at_least: int, meaning: str, at_most: int = 10**15
) -> int:
    """Returns the number in the variable, or `default` if it is empty or unset."""
    text = variables.get(name) or str(default)
    value = whole_number(text)
    if value is None or (variables.get(name) and not at_least <= value <= at_most):
        raise UserError(f"{name} is {text[:40]!r}; it must be {meaning}, from {at_least:,} to {at_most:,}.")
    return value


if __name__ == "__main__":
    exit_with(main)
