"""The launcher's variables, checked and completed, as assignments that the shell evaluates.

Presets and sources are those of PRESETS and SOURCES. Imports torch only to count GPUs.
"""

import os
import re
import shlex
import sys
import uuid
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout

from src import available_cores
from src.data_processing.text_sources import SOURCES
from src.model_configs.my_llm_config import PRESETS, config_from_command_line
from src.utils import root
from src.utils.errors import UserError, exit_with

SCRIPT = "run_pre_training_e2e.sh"
MAX_PROCESSES = 1_024  # and machines
MEETING_MARGIN_S = 120  # another machine may notice a failure only after train.timeout_s


def main() -> None:
    os.chdir(os.environ.get("STARTED_IN") or ".")  # the variables may hold relative paths
    overrides = sys.argv[1:]
    sys.argv[0] = SCRIPT
    for name, value in settings(os.environ, overrides).items():
        if isinstance(value, list):  # an array, and "@" for the script's own arguments
            joined = shlex.join(value)
            print(f"set -- {joined}" if name == "@" else f"{name}=({joined})")
        else:
            print(f"{name}={shlex.quote(str(value))}")


def settings(variables: Mapping[str, str], overrides: list[str]) -> dict[str, str | int | list[str]]:
    """Returns every variable of the launcher by name. Raises UserError or ConfigError for one that cannot work."""
    debug = one_of("DEBUG_MODE", (variables.get("DEBUG_MODE") or "False").capitalize(), ("True", "False"))
    preset = one_of("PRESET", "debug" if debug == "True" else variables.get("PRESET") or "lf_llm_269m", PRESETS)
    default = "files" if variables.get("DATA_PATH") else "hub" if variables.get("DATA_DATASET") else ""
    source = one_of("DATA_SOURCE", variables.get("DATA_SOURCE") or default or PRESETS[preset].source, SOURCES)
    nodes = number(variables, "NNODES", 1, 1, "a number of machines", MAX_PROCESSES)
    node = number(variables, "NODE_RANK", 0, 0, "this machine's number", nodes - 1)
    if nodes > 1 and not variables.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR is not set. With NNODES={nodes}, set it to the machine of NODE_RANK=0 on all.")
    processes = number(variables, "NPROC", 0, 1, "a number of processes", MAX_PROCESSES) or _default_processes(preset)
    threads = max(1, available_cores() // processes)
    # OpenMP takes a list, one number for each level of nested loops.
    omp = {"OMP_NUM_THREADS": variables.get("OMP_NUM_THREADS", "").partition(",")[0]}
    arguments = [argument for argument in overrides if argument != "--dry-run"]
    has_data = any(argument.split("=")[0] == "--data.dir" for argument in arguments)
    data = "ready" if has_data else "prepare" if node == 0 else "wait"
    if data == "prepare" and SOURCES[source].needs_paths and not variables.get("DATA_PATH"):
        raise UserError("DATA_PATH is not set. Set it to your text: a file, folder or pattern, or several, one a line.")
    preparation, folder = _preparation(source, variables)
    arguments = arguments if has_data else ["--data.dir", folder, *arguments]
    sys.argv[1:] = arguments = [preset, "--run-name", variables.get("RUN_NAME") or preset, *arguments]
    with redirect_stdout(sys.stderr):  # the shell evaluates stdout
        config = config_from_command_line("")
    return {
        "PRESET": preset,
        "RUN_NAME": config.run_name,
        "RUN_DIR": str(root.RUNS / config.run_name),
        "TEMP_DATA_DIR": str(root.TEMP_DATA),
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
        "DRY_RUN": "yes" if "--dry-run" in overrides else "",
        "preparation": preparation if data == "prepare" else [],
        "@": arguments,
    }


def _default_processes(preset: str) -> int:
    if PRESETS[preset].processes == "one":
        return 1
    import torch  # takes seconds

    return max(1, torch.cuda.device_count())


def _preparation(source: str, variables: Mapping[str, str]) -> tuple[list[str], str]:
    """Returns the arguments of data_downloader and the name or path of the dataset's folder."""
    limit = number(variables, "DATA_MAX_TOKENS", 0, 1, "a number of tokens, such as 10_000_000")
    dataset = variables.get("DATA_DATASET", "") if source == "hub" else ""
    if source == "hub" and not dataset:
        raise UserError("DATA_DATASET is not set. DATA_SOURCE=hub needs the name of a dataset, OWNER/NAME.")
    name = SOURCES[source].dataset_name or dataset.replace("/", "_") or "my_text"
    folder = variables.get("DATA_DIR") or name + (f"-max-{limit}-tokens" if limit else "")
    arguments = ["--source", source, "--out", str(root.dataset_dir(folder))]
    arguments += ["--path", *_paths(variables)] if SOURCES[source].needs_paths else []
    options = {"--dataset": "DATA_DATASET", "--config": "DATA_CONFIG", "--split": "DATA_SPLIT"} if dataset else {}
    options |= {"--text-field": "DATA_TEXT_FIELD", "--max-tokens": "DATA_MAX_TOKENS"}
    for option, variable in options.items():
        arguments += [option, variables[variable]] if variables.get(variable) else []
    return arguments, folder


def _paths(variables: Mapping[str, str]) -> list[str]:
    lines = variables.get("DATA_PATH", "").splitlines()
    return [os.path.abspath(os.path.expanduser(line)) for line in lines if line]


def one_of(variable: str, value: str, names: Collection[str]) -> str:
    if value not in names:
        raise UserError(f"{variable} is {value!r}; it must be one of {', '.join(names)}.")
    return value


def number(
    variables: Mapping[str, str], name: str, default: int, at_least: int, meaning: str, at_most: int = 10**15
) -> int:
    """Returns the number that the variable holds, or `default` where it is empty or unset."""
    text = variables.get(name) or str(default)
    value = int(text) if re.fullmatch("[0-9](_?[0-9]){,18}", text) else -1
    if variables.get(name) and not at_least <= value <= at_most:
        raise UserError(f"{name} is {text[:40]!r}; it must be {meaning}, from {at_least:,} to {at_most:,}.")
    return value


if __name__ == "__main__":
    exit_with(main)
