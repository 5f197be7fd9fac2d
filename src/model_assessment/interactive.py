"""Prompts one after the other, each continued as it is typed."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from src.model_assessment.generation import SamplingConfig
from src.utils.errors import UserError, harmless, say

HELP = """\
TEXT        is continued by the model, which was trained to go on with texts and not to answer
            (nothing: goes on with what is there)
/NAME VALUE changes a setting: {names}
/stop TEXT  ends a continuation before TEXT (\\n is a new line); /stop alone: nowhere
/settings   shows them all
/quit       ends, as Ctrl-D does; Ctrl-C ends a continuation, or all where there is none"""


def converse(pieces: Callable[[str, SamplingConfig], Iterator[str]], config: SamplingConfig) -> None:
    """Reads lines until there are no more, and prints the continuation of each as `pieces` gives it.

    Every continuation has a seed of its own: config.seed, and one more each time.
    """
    text = ""
    say("a line is continued; /help says what else there is, /quit ends")
    while (line := _next_line()) is not None:
        if line.startswith("/"):
            if line in ("/quit", "/exit"):
                return
            config = _obey(line, config)
            continue
        text = line or text
        print(harmless(text, keep="\n\t"), end="", flush=True)
        try:
            for piece in pieces(text, config):
                print(harmless(piece, keep="\n\t"), end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            pass
        print(flush=True)
        config = replace(config, seed=(config.seed + 1) % 2**63)


def _next_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _obey(line: str, config: SamplingConfig) -> SamplingConfig:
    """The settings after a line that begins with a slash."""
    name, _, value = line[1:].partition(" ")
    name = name.replace("-", "_")
    types = {field.name: type(getattr(config, field.name)) for field in fields(config)}
    if name == "help":
        say(HELP.format(names=", ".join(other for other in types if other != "stop")))
    elif name == "settings":
        say("\n".join(f"{other} {getattr(config, other)!r}" for other in types))
    elif name not in types:
        say(f"there is no /{name}; /help says what there is")
    else:
        try:
            new: Any = types[name](value) if name != "stop" else (value.replace("\\n", "\n"),) if value else ()
            config = replace(config, **{name: new})
            say(f"{name} {getattr(config, name)!r}")
        except UserError as error:
            say(str(error))
        except ValueError:
            say(f"/{name} takes a number, not {value!r}")
    return config
