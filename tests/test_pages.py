"""What docs/ shows runs, block after block, and its links lead somewhere."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "loops.md")  # whose sections tests/test_loops.py runs


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_blocks_of_a_page_run_in_order(path):
    blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, path.name, "exec"), namespace)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_what_a_page_points_to_exists(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
    for target in re.findall(r"`((?:experiments|notebooks|tests|docs)/[^`]*)`", text):
        assert (DOCS.parent / target).exists(), target
    for name in re.findall(r"python -m experiments (\w+)", text):
        assert (DOCS.parent / "experiments" / f"{name}.py").exists(), name
