"""Command-line flags that are the fields of a frozen dataclass."""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import typing
from typing import Any, TypeVar

C = TypeVar("C")


def flag(default: Any, about: str, *, choices: Sequence[str] = (), at_least: float | None = None) -> Any:
    """A field of a `Config`: its default, what `--help` says about it, and what it accepts.

    Args:
      default: Its type is the flag's; for a field annotated with `float | None`, None means "not given".
      about: One line.
      choices: The accepted words; of a tuple, of each entry.
      at_least: The smallest accepted number.
    """
    return dataclasses.field(default=default, metadata={"about": about, "choices": choices, "at_least": at_least})


def parse(config: type[C], arguments: Sequence[str], *, program: str, about: str | None = None) -> C:
    """Read flags into a dataclass.

    A field `batch_size` is the flag `--batch_size`, or `--batch-size`. A tuple is written with commas, a bool as
    `--name` or `--no-name`. Whatever is not a field is an error, and so is a prefix of one.

    Args:
      config: A dataclass whose fields are made by `flag`.
      arguments: The words of the command line.
      program: What `--help` calls the command.
      about: What `--help` prints below it.

    Returns:
      A `config`.

    Raises:
      SystemExit: After a message on stderr, if a flag is unknown or its value is not accepted.

    Examples:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     steps: int = flag(600, "training steps", at_least=1)
      ...     wire: tuple[str, ...] = flag(("one_bit",), "how votes travel", choices=("one_bit", "two_bit"))
      >>> parse(Config, ["--wire", "one_bit,two_bit"], program="train")
      Config(steps=600, wire=('one_bit', 'two_bit'))
    """
    return config(**vars(parser(config, program=program, about=about).parse_args(arguments)))


def parse_known(config: type[C], arguments: Sequence[str], *, program: str) -> tuple[C, list[str]]:
    """The same, and the words that belong to none of its flags."""
    found, rest = parser(config, program=program).parse_known_args(arguments)
    return config(**vars(found)), rest


def parser(config: type, *, program: str, about: str | None = None) -> argparse.ArgumentParser:
    """What reads the flags of a dataclass."""
    made = argparse.ArgumentParser(
        program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        names = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
        text = f"{field.metadata['about']} (default: {_written(field.default)})".replace("%", "%%")
        if types[field.name] is bool:
            made.add_argument(
                *names, dest=field.name, default=field.default, action=argparse.BooleanOptionalAction, help=text
            )
        else:
            read = _reader(types[field.name], field.metadata["choices"], field.metadata["at_least"])
            made.add_argument(*names, dest=field.name, default=field.default, type=read, help=text, metavar="VALUE")
    return made


def _reader(annotation: Any, choices: Sequence[str], at_least: float | None) -> Callable[[str], Any]:
    """From the text of a value to the value, or an error that argparse prints behind the flag's name."""
    if typing.get_origin(annotation) is tuple:
        one = _reader(typing.get_args(annotation)[0], choices, at_least)
        return lambda text: tuple(one(part.strip()) for part in text.split(","))
    kind = next(t for t in (*typing.get_args(annotation), annotation) if t is not type(None))

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"has to be of type {kind.__name__}, got {text!r}.") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"has to be one of {', '.join(choices)}, got {text!r}.")
        if at_least is not None and not value >= at_least:
            raise argparse.ArgumentTypeError(f"has to be at least {at_least}, got {text}.")
        return value

    return read


def _written(value: Any) -> str:
    """A default as one would write it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
