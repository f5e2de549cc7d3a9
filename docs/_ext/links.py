"""Names in backticks become links: in docstrings through the default role, in pages wherever a name has its module.

A name of this package that leads nowhere is a warning, and so an error; any other name that is not in the inventories
stays as it is.
"""

import importlib.util
import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.ext import intersphinx
from sphinx.transforms import SphinxTransform

import reference

SHORT = {"lax": "jax.lax", "jnp": "jax.numpy", "np": "numpy", "nnx": "flax.nnx", "nn": "flax.linen"}
NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", re.DOTALL)
IN_PAGES = re.compile(r"(signopt|optax|jax|lax|jnp|nnx|flax)\.")
MAY_BE_OLD = ("project/changelog",)  # it names what has another name by now


def full_name(text: str) -> str | None:
    """The name that a text in backticks refers to, with its module spelt out: `lax.psum(x, "i")` is `jax.lax.psum`."""
    found = NAME.fullmatch(text.strip())
    if not found:
        return None
    first, dot, rest = found[1].partition(".")
    return f"{SHORT.get(first, first)}{dot}{rest}" if dot else first


def reference_to(text: str, module: str | None, doc: str) -> nodes.Node:
    name = full_name(text)
    literal = nodes.literal(text, text, classes=["xref", "py"])
    if name is None:
        return literal
    return pending_xref(
        "",
        literal,
        refdomain="py",
        reftype="obj",
        reftarget=name,
        refdoc=doc,
        **{"py:module": module, "py:class": None},
    )


def role(name, rawtext, text, lineno, inliner, options=None, content=()):
    """The default role of docstrings."""
    del name, rawtext, lineno, options, content
    env = inliner.document.settings.env
    return [reference_to(text, env.ref_context.get("py:module"), env.docname)], []


class LinkNames(SphinxTransform):
    """In Markdown pages and notebooks."""

    default_priority = 200

    def apply(self, **kwargs):
        if self.env.doc2path(self.env.docname).suffix == ".rst" or self.env.docname in MAY_BE_OLD:
            return
        for node in list(self.document.findall(nodes.literal)):
            if IN_PAGES.match(node.astext()) and not isinstance(
                node.parent, nodes.reference | pending_xref | nodes.title
            ):
                node.replace_self(reference_to(node.astext(), None, self.env.docname))


class KeepBars(SphinxTransform):
    """|v| is a magnitude, and no substitution."""

    default_priority = 210  # before substitutions are looked up

    def apply(self, **kwargs):
        for node in list(self.document.findall(nodes.substitution_reference)):
            if node.get("refname") not in self.document.substitution_defs:
                node.replace_self(nodes.Text(f"|{node.astext()}|"))


def is_a_file(name: str) -> bool:
    """Whether a name is one of our modules that are not public: its contents are documented elsewhere."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def resolve(app: Sphinx, env, node, content):
    """Find what the Python domain did not: names by the file that defines them, and names of other projects."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    public = app.config.public_paths
    module = node.get("py:module")
    for name in (public.get(target), public.get(f"{module}.{target}"), f"{reference.PACKAGE}.{target}"):
        if name:
            domain = env.get_domain("py")
            for kind in ("obj", "mod"):
                found = domain.resolve_xref(env, node["refdoc"], app.builder, kind, name, node, content)
                if found is not None:
                    return found
    full = full_name(target)
    if full and full != target:
        node["reftarget"] = full
        return intersphinx.missing_reference(app, env, node, content)
    return content if target.startswith(f"{reference.PACKAGE}.") and is_a_file(target) else None


def lead_back(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    """From a page of source to the reference: Sphinx takes all of a file to be exported by one and the same module."""
    del template, doctree
    if not pagename.startswith("_modules/") or "body" not in context:
        return
    home = pagename.removeprefix("_modules/").replace("/", ".")

    def turn(found):
        parts = found[2].split(".")
        for number, part in enumerate(parts):
            public = app.config.public_paths.get(f"{home}.{part}")
            if public:
                page = app.builder.get_relative_uri(pagename, f"{reference.FOLDER}/{public.rpartition('.')[0]}")
                return f'{found[1]}"{page}#{".".join([public, *parts[number + 1 :]])}"'
        return found[0]

    context["body"] = re.sub(r'(class="viewcode-back" href=)"[^"#]*#([^"]+)"', turn, context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("public_paths", {}, "env", types=frozenset({dict}))
    app.connect("config-inited", lambda app, config: setattr(config, "public_paths", reference.public_paths()))
    app.add_role("name", role)
    app.add_transform(LinkNames)
    app.add_transform(KeepBars)
    app.connect("missing-reference", resolve)
    app.connect("html-page-context", lead_back)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
