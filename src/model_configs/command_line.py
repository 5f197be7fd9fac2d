"""A preset, and overrides of any of its fields, from the command line."""

from src.model_configs.my_llm_config import PRESETS
from src.params import Config


def config_from_command_line(description: str, prog: str = "python pretrain.py") -> Config:
    """The Config that sys.argv asks for; ends the program with a message and exit code 2 for one that cannot work.

    `prog`: the command, as it calls itself.
    """
    import tyro  # only commands need it

    presets = {name: ((preset.__doc__ or "").splitlines()[0], preset()) for name, preset in PRESETS.items()}
    return tyro.extras.overridable_config_cli(presets, prog=prog, description=description)
