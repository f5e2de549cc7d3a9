"""Ask about your own loss and machine: `python -m signopt TOOL`.

* `info`: versions, devices and flags, for a bug report.
* `headroom --loss package.module:function`: how long your step takes, and what a vote makes of it.
* `geometry --loss package.module:function`: whether signs suit your loss.
* `advise --loss package.module:function`: what to send over your network, how often and when, and the lines to paste.

The function returns `(params, loss, batches)`: `loss(params, batch)` is a scalar, and every leaf of `batches` has a leading
axis of mini-batches.
"""

import argparse
from collections.abc import Sequence
import json
import sys

import jax

from signopt._tools import advise
from signopt._tools import geometry
from signopt._tools import headroom
from signopt._tools import info
from signopt._tools.problem import UsageError

TOOLS = {"info": info, "headroom": headroom, "geometry": geometry, "advise": advise}


def main(words: Sequence[str]) -> None:
    """Run the tool that the first word names, and print what it finds."""
    parser = argparse.ArgumentParser(
        "python -m signopt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tools = parser.add_subparsers(dest="tool", metavar="TOOL")
    for name, tool in TOOLS.items():
        about = str(tool.__doc__).partition("\n")[0]
        added = tools.add_parser(
            name,
            help=about,
            description=tool.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        tool.arguments(added)
        added.add_argument("--json", action="store_true", help="print what was measured as JSON lines")
    options = parser.parse_args(words)
    if options.tool is None:
        parser.print_help()
        return
    tool = TOOLS[options.tool]
    try:
        found = list(tool.measure(options))
    except UsageError as error:
        sys.exit(f"error: {error}")
    if jax.process_index() > 0:  # the first of many processes speaks for all
        return
    print("\n".join(map(json.dumps, found)) if options.json else tool.report(found))


if __name__ == "__main__":
    main(sys.argv[1:])
