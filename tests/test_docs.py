"""What the documentation shows is executed: the README's code blocks in their order, and every notebook."""

import pathlib
import re
import tomllib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_blocks_of_the_readme_run_in_order():
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_a_block_that_breaks_would_be_seen():
    """Negative control of the test above."""
    (block,) = python_blocks("```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        exec(block, {})


def test_what_the_readme_points_to_exists():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`((?:experiments|notebooks|tests)/[^`]*)`", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_on_one_device(path, monkeypatch):
    for variable in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(variable, raising=False)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_opens_in_colab_and_keeps_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    where = pyproject["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    address = f"https://colab.research.google.com/github/{where}/blob/main/notebooks/{path.name}"
    assert f"[Open in Colab]({address})" in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
