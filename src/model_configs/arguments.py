"""Command-line parsers: one for a preset with settings, one for all other commands."""

import argparse
import ast
import difflib
import inspect
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import is_dataclass
from functools import partial
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from src.params import MAX_TOKENS, Config, from_dict, to_dict
from src.utils.errors import UserError

_REAL = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]{1,3})?|[-+]?(inf|nan)", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors of one line that name a remedy, such as a similar option."""

    also: Collection[str] = ()
    """Options that the command removes before parsing."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with the remedy that fits argparse's `message`."""
        if message.startswith("unrecognized arguments: ") and (unknown := re.findall("(?<= )--[^ =]+", message)):
            options = [*self._option_string_actions, *self.also]
            raise UserError(" ".join(f"Cannot find the option {o}. {_similar(o, options, self.prog)}" for o in unknown))
        if choice := re.fullmatch("argument ([^ /]*).*: invalid choice: '?(.*?)'? .choose from (.*).", message):
            names = re.findall("[^', ]+", choice[3])
            close = [name for name in names if choice[2] in name] or difflib.get_close_matches(choice[2], names, n=1)
            hint = f" Perhaps you mean {close[0]}." if close else ""
            raise UserError(f"Cannot use {choice[2]!r} for {choice[1]}.{hint} Choose one of: {', '.join(names)}.")
        if rest := re.fullmatch("unrecognized arguments: (.*)", message):
            raise UserError(
                f"Cannot use {rest[1]!r} here. Plain arguments, such as texts, come before options. An option for "
                "on or off takes no value: --NAME or --no-NAME."
            )
        if given := re.fullmatch("argument ([^ /]*).*: ignored explicit argument (.*)", message):
            off = re.sub(r"^--(.*\.)?", r"\g<0>no-", given[1])
            remedy = f", or turn it off with {off}" if off in self._option_string_actions else ""
            raise UserError(f"Cannot use {given[2]} after {given[1]}, which takes no value. Leave it out{remedy}.")
        if missing := re.fullmatch("argument ([^ /]*).*: expected one argument", message):
            raise UserError(f"Cannot use {missing[1]} without a value. Type {missing[1]} VALUE.")
        message = re.sub("^argument ([^ /:]*)[^:]*", r"cannot use \1", message)
        raise UserError(f"{message[0].upper()}{message[1:]}. {self.prog} --help explains all options.")


def overridden(config: Config, arguments: Sequence[str], prog: str, about: str, also: Collection[str] = ()) -> Config:
    """Returns `config` with the settings that `arguments` override. `also`: see Parser; `about`: its description.

    Raises UserError for a setting that does not exist, and ConfigError listing all values that cannot work.
    """
    parser = Parser(prog=prog, usage=f"{prog} [--SETTING VALUE ...]", description=about, allow_abbrev=False)
    parser.also = also
    _add_options(parser, config)
    # Both - and _ are accepted. argparse takes -1e-3 for an option unless "=" joins it to the previous argument.
    arguments = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), each) for each in arguments]
    for place in range(len(arguments) - 1, 0, -1):
        if arguments[place][:1] == "-" and _REAL.fullmatch(arguments[place]) and arguments[place - 1][:2] == "--":
            arguments[place - 1 : place + 1] = [f"{arguments[place - 1]}={arguments[place]}"]
    settings = to_dict(config)
    for name, value in vars(parser.parse_args(arguments)).items():
        group, _, field = name.rpartition(".")
        (settings[group] if group else settings)[field] = value
    return from_dict(settings)


def whole_number(text: str) -> int | None:
    """The whole number that `text` spells, such as 1000, 1_000 or 1e3; None for anything else."""
    if re.fullmatch("[-+]?[0-9]{1,400}", text):
        return int(text)
    if not _REAL.fullmatch(text) or not abs(value := float(text)) <= MAX_TOKENS or not value.is_integer():
        return None
    return int(value)


def whole(text: str) -> int:
    """Returns the whole number that `text` spells, for argparse. Raises ArgumentTypeError."""
    if (value := whole_number(text)) is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number")
    return value


def between(low: float, high: float) -> Callable[[str], Any]:
    """Returns a type for argparse: numbers from `low` to `high`, only integers if `low` is one."""

    def convert(text: str) -> float:
        value = whole_number(text) if isinstance(low, int) else float(text) if _REAL.fullmatch(text) else None
        if value is None or not low <= value <= high:  # also true for NaN
            kind, form = ("whole number", ",") if isinstance(low, int) else ("number", "g")
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a {kind} from {low:{form}} to {high:{form}}")
        return value

    return convert


def without_resume(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without --resume and its value, which would start over or go back."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [each for before, each in pairs if before != "--resume" and each.partition("=")[0] != "--resume"]


def _add_options(parser: Any, group: Any, prefix: str = "--") -> None:
    """Adds an option for each setting of `group`, with the string under its field as help."""
    lines = ast.parse(inspect.getsource(type(group))).body[0].body  # type: ignore[attr-defined]
    texts = {ast.unparse(a.target): ast.literal_eval(b.value) for a, b in pairwise(lines) if isinstance(b, ast.Expr)}
    for name, kind in get_type_hints(type(group)).items():
        value, option = getattr(group, name), prefix + name.replace("_", "-")
        if is_dataclass(value):
            _add_options(parser.add_argument_group(f"{name} settings", type(value).__doc__), value, f"{option}.")
            continue
        text = f"{' '.join(texts[name].split())} Default: {value!r}."
        how = {"dest": prefix[2:] + name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind is bool:
            parser.add_argument(option, action="store_true", **how)
            how["help"] = f"Turns {option} off."
            parser.add_argument(option.replace(prefix, f"{prefix}no-"), action="store_false", **how)
        elif get_origin(kind) is tuple:
            parser.add_argument(option, nargs="*", metavar="VALUE", **how)
        else:
            values = ",".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
            how["metavar"] = f"{{{values}}}" if values else "VALUE"
            parser.add_argument(option, type=partial(_value, kind=kind), **how)


def _value(text: str, kind: Any) -> Any:
    """Converts `text` to this type. If it cannot, returns `text`, which Config's checks then refuse."""
    kinds = get_args(kind) or (kind,)
    if text == "None" and NoneType in kinds:
        return None
    if int in kinds and (number := whole_number(text)) is not None:
        return number
    return float(text) if float in kinds and _REAL.fullmatch(text) else text


def _similar(name: str, options: Collection[str], command: str) -> str:
    wanted = name.lstrip("-").rpartition(".")[2]
    last = {option: option.lstrip("-").rpartition(".")[2] for option in options}
    similar = [option for option in options if last[option] == wanted]
    similar = similar or [option for option in options if f"-{wanted}-" in f"{option[1:]}-".replace(".", "-")]
    if not similar:
        close = dict.fromkeys(difflib.get_close_matches(wanted, last.values(), n=3, cutoff=0.6))  # the closest first
        similar = [option for each in close for option in options if last[option] == each]
    return f"Perhaps you mean {' or '.join(similar[:3])}." if similar else f"List all with: {command} --help."
