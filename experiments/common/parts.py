"""Parts: an experiment that is a folder of smaller ones, which show one thing together.

Each part is an experiment, with a `Config`, `run`, `table` and `plot`. `--parts` chooses among them, and a flag goes to
every chosen part that has it.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import pathlib
import types
from typing import Any

import rich.console

from experiments.common import flags
from experiments.common import report
from experiments.common.records import Record


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of the chosen parts.

    Attributes:
      parts: By name, in the order in which they run.
      output: Folder for records and plots.
    """

    parts: dict[str, Any]
    output: str

    @property
    def workers(self) -> int:
        """As many devices as the part with the most workers asks for."""
        return max(config.workers for config in self.parts.values())

    @property
    def seeds(self) -> int:
        """The seeds of the part with the most of them."""
        return max(config.seeds for config in self.parts.values())


@dataclasses.dataclass(frozen=True)
class Together:
    """Parts with the interface of one experiment.

    Attributes:
      parts: The modules by name.
      default: Those that run if nobody chooses.
      about: What `--help` prints.
    """

    parts: Mapping[str, types.ModuleType]
    default: Sequence[str]
    about: str

    def parse(self, arguments: Sequence[str], *, program: str, output: str) -> Config:
        """Read `--parts`, `--output`, and the flags of the chosen parts.

        Args:
          arguments: The words of the command line.
          program: What `--help` calls the command.
          output: The default of `--output`.

        Raises:
          SystemExit: After a message on stderr, if a flag belongs to no chosen part, or a value is not accepted.
        """
        choose = dataclasses.make_dataclass(
            "Choice",
            [
                ("parts", tuple[str, ...], flags.flag(tuple(self.default), "which parts", choices=tuple(self.parts))),
                ("output", str, flags.flag(output, "folder for records and plots")),
            ],
            frozen=True,
        )
        asks = bool({"-h", "--help"} & set(arguments))
        chosen, rest = flags.parse_known(choose, [a for a in arguments if a not in ("-h", "--help")], program=program)
        if asks:
            helps = [flags.parser(choose, program=program, about=self.about).format_help()]
            helps += [
                flags.parser(self.parts[name].Config, program=f"part {name}").format_help() for name in self.parts
            ]
            print("\n".join(helps))
            raise SystemExit(0)
        found, unknown = {}, []
        for name in chosen.parts:
            config, left = flags.parse_known(self.parts[name].Config, rest, program=f"{program}: part {name}")
            found[name] = dataclasses.replace(config, output=chosen.output)
            unknown.append(left)
        nobodys = [word for word in rest if all(word in left for left in unknown)]
        if nobodys:
            flags.parser(choose, program=program).error(f"unrecognized arguments: {' '.join(nobodys)}")
        return Config(found, chosen.output)

    def run(self, config: Config) -> Iterator[Record]:
        """Run the parts one after the other; each record says which it belongs to."""
        for name, own in config.parts.items():
            for record in self.parts[name].run(own):
                yield {"part": name} | record

    def table(self, records: list[Record]) -> rich.console.Group:
        """The parts' tables."""
        return rich.console.Group(*(self.parts[name].table(of(records, name)) for name in _names(records)))

    def summary(self, records: list[Record]) -> list[report.Rows]:
        """The parts' tables for the page, those with the same header as one."""
        found = ((self.parts[name], of(records, name)) for name in _names(records))
        return report.merged(table for module, own in found for table in report.summaries(module, own))

    def kept(self, records: list[Record]) -> list[Record]:
        """The records that the parts' tables need."""
        own = [getattr(self.parts[n], "kept", lambda records: records)(of(records, n))[1:] for n in _names(records)]
        return [records[0], *(record for found in own for record in found)]

    def plot(self, records: list[Record], folder: str) -> list[pathlib.Path]:
        """Draw the parts' figures.

        Returns:
          The figures' files.
        """
        return [path for name in _names(records) for path in self.parts[name].plot(of(records, name), folder)]


def of(records: list[Record], part: str) -> list[Record]:
    """The records of one part, below a header with its own configuration."""
    header = records[0] | {"config": records[0]["config"]["parts"][part]}
    return [header, *(record for record in records[1:] if record["part"] == part)]


def _names(records):
    return list(records[0]["config"]["parts"])
