"""Pages that lie elsewhere in the repository: notebooks as they were executed, and the texts beside the code.

They are copied below docs/ when the site is built, with their links turned to where things are on the site, or in the
repository where the site does not have them.
"""

import pathlib
import posixpath
import re

from sphinx.application import Sphinx

from reference import write_if_new

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "experiments/README.md": "project/experiments.md",
}
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def copied() -> dict[str, str]:
    """Files of the repository that become pages, and where below docs/."""
    notebooks = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    found = TEXTS | {f"notebooks/{name}": f"notebooks/{name}" for name in notebooks}
    return {source: page for source, page in found.items() if (ROOT / source).exists()}


def turned(text: str, source: str, page: str, repository: str) -> str:
    """A text whose relative links lead from its page on the site to what they led to from its place in the repository.

    Args:
      text: Markdown, or a notebook.
      source: Its place in the repository.
      page: Its place below docs/.
      repository: The address of the repository, for what is not on the site.
    """
    places = copied()

    def turn(found):
        target = found[2]
        if re.match(r"[a-z]+:", target):
            return found[0]
        lies = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = places.get(lies) or (lies.removeprefix("docs/") if lies.startswith("docs/") else None)
        if place is None:
            address = f"{repository}/blob/main/{lies}"
        else:
            address = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{found[1]}{address}{found[3]}"

    if source.endswith(".ipynb"):
        return LINK.sub(turn, text)
    return "".join(part if part.startswith("```") else LINK.sub(turn, part) for part in FENCE.split(text))


def copy(app: Sphinx) -> None:
    for source, page in copied().items():
        text = (ROOT / source).read_text(encoding="utf-8")
        write_if_new(pathlib.Path(app.srcdir) / page, turned(text, source, page, app.config.repository))


def turn_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """Of the pages that lie in docs/ themselves."""
    page = pathlib.Path(app.env.doc2path(docname)).resolve().relative_to(ROOT / "docs").as_posix()
    if page.endswith(".md") and page not in copied().values():
        source[0] = turned(source[0], f"docs/{page}", page, app.config.repository)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("repository", "", "env", types=frozenset({str}))
    app.connect("builder-inited", copy)
    app.connect("source-read", turn_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
