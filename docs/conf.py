"""The documentation site: `make docs` builds it below docs/_build/html, without a network, warnings as errors."""

import importlib.metadata
import pathlib
import shutil
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import signopt

urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]

# ---- project ---------------------------------------------------------------------------------------------------------

project = "signopt"
author = "The signopt authors"
copyright = author
version = release = signopt.__version__
repository = urls["Repository"]

# ---- sources ---------------------------------------------------------------------------------------------------------

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "drawings",
    "gallery",
    "links",
    "pages",
    "reference",
]
exclude_patterns = ["_build", "_ext", "inventories", "gallery/*.py"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
nb_execution_mode = "off"  # notebooks come with their outputs; the tests execute them
suppress_warnings = ["myst.header"]  # a page may begin with a deeper heading
default_role = "name"

# ---- docstrings ------------------------------------------------------------------------------------------------------

napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autosummary_generate = False
autodoc_typehints = "none"  # docstrings say shape, dtype and unit, which types do not
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
add_module_names = True

# ---- links -----------------------------------------------------------------------------------------------------------

intersphinx_mapping = {
    name: (address, f"inventories/{name}.inv")
    for name, address in {
        "flax": "https://flax.readthedocs.io/en/latest/",
        "jax": "https://docs.jax.dev/en/latest/",
        "numpy": "https://numpy.org/doc/stable/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "python": "https://docs.python.org/3/",
    }.items()
}
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!signopt\.).*"),
    (r"py:.*", r"signopt\.(.*\.)?_.*"),
]  # others' names may be unknown

# ---- pages -----------------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "signopt"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_copy_source = False
html_domain_indices = False
html_show_sourcelink = False
html_theme_options = {
    "repository_url": repository,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_content_items": ["copyright.html"],
    "navbar_persistent": [],  # the search is in the sidebar
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# MathJax comes from a package and lies beside the pages, so that formulas need no network.
mathjax_path = "mathjax/tex-svg-full.js"


def copy_mathjax(app, exception):
    """Copy the one file of MathJax that the pages load."""
    if exception is None and app.builder.format == "html":
        files = importlib.metadata.files("sphinx-mathjax-offline")
        (source,) = (file.locate() for file in files if file.name == "tex-svg-full.js")
        target = pathlib.Path(app.outdir) / "_static" / mathjax_path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def setup(app):
    app.connect("build-finished", copy_mathjax)
