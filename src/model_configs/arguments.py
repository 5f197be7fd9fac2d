"""The commonest mistakes in a command line of settings, each in one line, before its parser sees them."""

import argparse
import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from src.params import MAX_TOKENS, Config, kind_text
from src.utils.errors import UserError

_REAL = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]{1,3})?|[-+]?(inf|nan)", re.IGNORECASE)


def checked(arguments: list[str], presets: Collection[str], command: str, also: Collection[str] = ()) -> list[str]:
    """Returns `arguments`, a preset and overrides, with whole numbers such as 1e9 written in digits.

    Raises UserError for a preset or setting that does not exist, and for a value of the wrong kind. `command`: its
    beginning, for messages. `also`: options that the command has taken out already, to be named where one is mistyped.
    """
    if {"-h", "--help"} & set(arguments) or any(argument.startswith("--tyro-") for argument in arguments):
        return arguments
    names = ", ".join(presets)
    if arguments and arguments[0].partition("=")[0] == "--preset":
        name = arguments[0].partition("=")[2] or [*arguments, "NAME"][1]
        raise UserError(f"Cannot use --preset: the preset comes first, alone. Type: {command} {name} ...")
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"The preset is missing. Type: {command} PRESET ..., with one of: {names}.")
    if arguments[0] not in presets:
        raise UserError(f"Cannot find the preset {arguments[0]!r}. Choose one of: {names}.")
    options, result = dict(_options(Config)), arguments[:1]
    rest, takes_more = iter(arguments[1:]), False
    for argument in rest:
        name, given, value = argument.partition("=")
        name = name.replace("_", "-")
        if not name.startswith("--"):
            if not takes_more:
                raise UserError(f"Cannot use {argument!r} here. Plain arguments, such as texts, come before settings.")
            result.append(argument)
            continue
        if name not in options:
            raise UserError(f"Cannot find the setting {name}. {_similar(name, [*options, *also], command)}")
        kind = options[name]
        takes_more = get_origin(kind) is tuple
        if kind is bool or get_origin(kind) is tuple:
            result.append(argument)
            continue
        following = [value] if given else [each for each in [next(rest, None)] if each is not None]
        result += [name, *(_value(name, each, kind) for each in following)]
    return result


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses an unknown option with those that may be meant."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError for an unknown option; else ends with exit code 2."""
        if unknown := re.fullmatch("unrecognized arguments: .*?(--[^ =]+).*", message):
            similar = _similar(unknown[1], self._option_string_actions, self.prog)
            raise UserError(f"Cannot find the option {unknown[1]}. {similar}")
        super().error(message)


def whole_number(text: str) -> int | None:
    """The whole number that `text` gives, as 1000, 1_000 or 1e3; None for anything else and beyond 10^15."""
    if not _REAL.fullmatch(text) or not abs(value := float(text)) <= MAX_TOKENS or not value.is_integer():
        return None
    return int(value)


def whole(text: str) -> int:
    """The same for argparse, and digits of any number. Raises ArgumentTypeError."""
    value = int(text) if re.fullmatch("[-+]?[0-9]{1,400}", text) else whole_number(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number")
    return value


def _options(kind: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """The options of a dataclass of settings, each with its type."""
    for name, each in get_type_hints(kind).items():
        option = prefix + name.replace("_", "-")
        if is_dataclass(each):
            yield from _options(each, f"{option}.")
        else:
            yield option, each
            if each is bool:
                head, _, last = option.rpartition(".")
                yield f"{head}.no-{last}", each


def without_resume(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without --resume and its value, which would start over or go back."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [each for before, each in pairs if before != "--resume" and each.partition("=")[0] != "--resume"]


def _similar(name: str, options: Collection[str], command: str) -> str:
    """Names the settings that may be meant."""
    wanted = name.lstrip("-").rpartition(".")[2]
    last = {option: option.lstrip("-").rpartition(".")[2] for option in options}
    similar = [option for option in options if last[option] == wanted]
    similar = similar or [option for option in options if f"-{wanted}-" in f"-{last[option]}-"]
    if not similar:
        close = dict.fromkeys(difflib.get_close_matches(wanted, last.values(), n=3, cutoff=0.6))  # the closest first
        similar = [option for each in close for option in options if last[option] == each]
    return f"Perhaps you mean {' or '.join(similar[:3])}." if similar else f"List all with: {command} --help."


def _value(name: str, text: str, kind: Any) -> str:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    literals = [str(value) for each in kinds if get_origin(each) is Literal for value in get_args(each)]
    if str in kinds or text in literals or (text == "None" and NoneType in kinds):
        return text
    if _REAL.fullmatch(text):
        if float in kinds:
            return text
        if int in kinds and (text.lstrip("+-").isdecimal() or (number := whole_number(text)) is not None):
            return text if text.lstrip("+-").isdecimal() else str(number)
    raise UserError(f"Cannot use {name} {text!r}: it must be {kind_text(kind)}.")
