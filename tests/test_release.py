"""What is published: the wheel, its metadata, the notebooks' first cell, and the files that a hosting service reads."""

import email
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest
import yaml

import signopt

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
URLS = PROJECT["urls"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

builders = ("build", "hatchling", "hatch_fancy_pypi_readme")
needs_builders = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, builders)), reason="needs build, hatchling and hatch-fancy-pypi-readme"
)


def run(*command, **kwargs):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of an sdist, and of the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


# ---- the wheel -------------------------------------------------------------------------------------------------------


@needs_builders
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name for name in names if not name.startswith(f"signopt-{signopt.__version__}.dist-info/")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "signopt").rglob("*.py")}
    assert package == sources | {"signopt/py.typed", "signopt/_tools/basis.json"}
    assert f"signopt-{signopt.__version__}.dist-info/licenses/LICENSE" in names


@needs_builders
def test_the_sdist_holds_tests_and_documents(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "tests/test_release.py", "docs/conf.py", "experiments/README.md", "PKG-INFO"} <= names
    assert not [name for name in names if name.startswith((".venv", "docs/_build", "docs/api", "results", "dist"))]


@needs_builders
def test_the_version_has_one_place(wheel):
    assert metadata(wheel)["Version"] == signopt.__version__
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == signopt.__version__  # which a citation has to name itself


@needs_builders
def test_the_metadata_say_what_a_user_asks_first(wheel):
    said = metadata(wheel)
    needed = [name for name in said.get_all("Requires-Dist") if "extra ==" not in name]
    assert {re.split(r"[><=]", name)[0] for name in needed} == {"jax", "jaxtyping", "optax"}
    assert said["Requires-Python"] == ">=3.11" and said["License-Expression"] == "Apache-2.0"
    assert dict(line.split(", ") for line in said.get_all("Project-URL")) == URLS
    assert {"Documentation", "Repository", "Issues", "Changelog"} <= set(URLS)
    assert {"docs", "experiments", "test"} <= set(said.get_all("Provides-Extra"))


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@needs_builders
def test_the_readme_is_the_description_and_its_links_are_whole(wheel):
    said = metadata(wheel)
    assert said["Description-Content-Type"] == "text/markdown"
    description, readme = said.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert python_blocks(description) == python_blocks(readme) != []
    links = re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", description)
    assert links and all(re.match(r"https?://|#", link or source) for link, source in links)
    assert f"{URLS['Repository']}/blob/main/docs/" in description


@needs_builders
def test_the_first_program_of_the_readme_runs_with_the_wheel_alone(wheel, tmp_path):
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    (block, *_) = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    program = f"import sys; sys.path.insert(0, {str(unpacked)!r})\n{block}\nprint(signopt.__file__)"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    said = run(sys.executable, "-c", program, cwd=tmp_path, env=environment | {"JAX_PLATFORMS": "cpu"})
    assert said.split()[-1].startswith(str(unpacked))


# ---- the notebooks' first cell ---------------------------------------------------------------------------------------


def first_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])


def test_notebooks_begin_with_one_and_the_same_cell():
    cells = {first_cell(path) for path in NOTEBOOKS}
    assert len(NOTEBOOKS) >= 3 and len(cells) == 1 and "%pip install" in cells.pop()


def fake_wheel(folder, name, version):
    """A wheel with nothing in it."""
    stem = f"{name}-{version}"
    files = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},sha256={hashlib.sha256(text.encode()).hexdigest()},\n" for file, text in files.items())
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (files | {f"{stem}.dist-info/RECORD": record}).items():
            archive.writestr(file, text)
    return path


def index_of(folder, wheels):
    """A package index as pip reads it, from a folder."""
    for wheel in wheels:
        name = wheel.name.split("-")[0]
        page = folder / name
        page.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, page)
        (page / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    folder.mkdir(exist_ok=True)
    return folder.as_uri()


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A Python that has everything but signopt, as a hosted notebook does: this one's packages, in a new environment."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for path in map(pathlib.Path, sys.path):
        for package in path.iterdir() if path.name == "site-packages" else ():
            ours = "signopt" in package.name or package.suffix == ".pth" or package.name.startswith("__editable__")
            if not ours and not (site / package.name).exists():
                (site / package.name).symlink_to(package)
    return folder / "bin" / "python"


RUN_CELL = """
import pathlib, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell(pathlib.Path(sys.argv[1]).read_text()).raise_error()
import importlib.metadata, importlib.util
print("found:", importlib.util.find_spec("signopt") and importlib.metadata.version("signopt"))
print("jax:", importlib.metadata.version("jax"))
"""


def with_index(index, folder):
    """An environment in which pip knows this index only."""
    unset = ("PYTHONPATH", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX")
    return {k: v for k, v in os.environ.items() if k not in unset} | {
        "IPYTHONDIR": str(folder / ".ipython"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_INDEX_URL": index,
        "PIP_NO_BUILD_ISOLATION": "false",  # pip's way to say: build with what is installed
    }


def run_first_cell(python, folder, index):
    (folder / "cell.py").write_text(first_cell(NOTEBOOKS[0]))
    environment = with_index(index, folder)
    said = run(python, "-c", RUN_CELL, folder / "cell.py", cwd=folder, env=environment)
    run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "signopt", env=environment)
    return said


@needs_builders
def test_the_first_cell_installs_from_the_index_and_keeps_the_jax_that_is_there(colab, wheel, tmp_path):
    newer = fake_wheel(tmp_path, "jax", "99.0")
    index = index_of(tmp_path / "index", [wheel, newer])
    empty = tmp_path / "empty"
    empty.mkdir()
    said = run_first_cell(colab, empty, index)
    assert f"found: {signopt.__version__}" in said
    assert f"jax: {importlib.metadata.version('jax')}" in said
    asked = (colab, "-m", "pip", "install", "--dry-run", "--no-deps", "--upgrade", "jax")
    assert "Would install jax-99.0" in run(*asked, env=with_index(index, empty))  # so it was to be had


@needs_builders
def test_the_first_cell_falls_back_to_the_repository_that_the_notebook_lies_in(colab, tmp_path):
    index = index_of(tmp_path / "index", [])
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "signopt", repository / "signopt", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, repository)
    (repository / "notebooks").mkdir()
    assert f"found: {signopt.__version__}" in run_first_cell(colab, repository / "notebooks", index)


@needs_builders
def test_a_first_cell_that_finds_nothing_would_be_seen(colab, tmp_path):
    """Negative control of the two tests above."""
    (tmp_path / "empty").mkdir()
    done = subprocess.run([colab, "-c", "import signopt"], cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'signopt'" in done.stderr


# ---- files that a hosting service reads ------------------------------------------------------------------------------


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_workflow_runs_the_tests_builds_the_pages_and_publishes_a_tag():
    flow = read(".github/workflows/ci.yml")
    jobs = flow["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert {".ci/run", "make docs", "make dist"} <= commands
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {command.split()[1] for command in commands if command.startswith("make ")} <= set(targets)
    publish = jobs["publish"]
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')" and flow[True]["push"]["tags"] == ["v*"]
    assert set(publish["needs"]) == set(jobs) - {"publish"}
    assert publish["permissions"] == {"id-token": "write"} and flow["permissions"] == {"contents": "read"}
    assert any(step.get("uses", "").startswith("pypa/gh-action-pypi-publish@") for step in publish["steps"])


def test_the_documentation_is_built_elsewhere_as_it_is_here():
    config = read(".readthedocs.yaml")
    assert (ROOT / config["sphinx"]["configuration"]).exists() and config["sphinx"]["fail_on_warning"]
    (install,) = config["python"]["install"]
    assert set(install["extra_requirements"]) <= set(PROJECT["optional-dependencies"])


def test_a_report_of_an_error_has_versions_devices_and_flags():
    form = read(".github/ISSUE_TEMPLATE/bug.yml")
    (field,) = (part for part in form["body"] if part.get("id") == "info")
    assert field["attributes"]["label"] == "`python -m signopt info`" and field["validations"]["required"]


def test_one_address_of_the_repository_everywhere():
    address = URLS["Repository"]
    assert read("CITATION.cff")["repository-code"] == address
    for name in ("Issues", "Changelog"):
        assert URLS[name].startswith(f"{address}/")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    owner = address.removeprefix("https://github.com/")
    for found in re.findall(r"https://(?:github\.com|raw\.githubusercontent\.com)/([^/]+/[^/\"']+)", text):
        assert found == owner
