"""Drawings are SVG files whose lines have the colour of the text around them.

As a file a drawing follows the reader's system, light or dark. On the site it is put into the page itself, where it
follows the theme's switch, and its words are found by a search in the page.
"""

import pathlib
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

FOLDER = "_static/drawings/"


class PutIntoPage(SphinxPostTransform):
    """Replace an image of a drawing by the drawing."""

    default_priority = 5
    formats = ("html",)

    def run(self, **kwargs):
        for node in list(self.document.findall(nodes.image)):
            if node["uri"].startswith(FOLDER):
                text = (pathlib.Path(self.env.srcdir) / node["uri"]).read_text(encoding="utf-8")
                text = re.sub(r"<style class=\"file\">.*?</style>\s*", "", text, flags=re.DOTALL)
                drawing = nodes.raw("", f'<div class="drawing">{text}</div>', format="html")
                node.parent.replace_self(drawing) if len(node.parent) == 1 and isinstance(
                    node.parent, nodes.paragraph
                ) else node.replace_self(drawing)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_post_transform(PutIntoPage)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
