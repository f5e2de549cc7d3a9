"""What docs/ shows runs, block after block, and its links lead somewhere."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from experiments import __main__ as command
from experiments.common import flags
from experiments.training import train

DOCS = pathlib.Path(__file__).parents[1] / "docs"
LOOPS = ("loops", "nnx", "loop_parts")  # whose sections tests/test_loops.py runs
PAGES = sorted(path for path in DOCS.glob("*.md") if path.stem not in LOOPS)


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
        assert name in command.experiments(), name


# ---- files to copy ---------------------------------------------------------------------------------------------------


def is_a_run(words):
    """Whether a command is one that `train` accepts, as one of many processes."""
    assert words[:4] == ["python", "-m", "experiments", "train"]
    config = flags.parse(train.Config, words[4:], program="train")
    return config.distributed and bool(config.checkpoint) and config.resume


def test_the_slurm_file_is_one_that_bash_and_train_understand():
    path = DOCS / "cluster" / "train.slurm"
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^srun (.*)$", text, re.MULTILINE)
    words = shlex.split(line)
    assert is_a_run(words[words.index("python") :])
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert options["nodes"] == "4" and options["ntasks-per-node"] == "1"


def test_the_kubernetes_file_is_what_jax_asks_for_and_train_understands():
    text = (DOCS / "cluster" / "train.yaml").read_text(encoding="utf-8")
    parts = {part["kind"]: part for part in yaml.safe_load_all(text)}
    job, service = parts["Job"], parts["Service"]
    assert job["spec"]["completionMode"] == "Indexed"  # JOB_COMPLETION_INDEX is the process
    assert job["spec"]["parallelism"] == job["spec"]["completions"]  # the number of processes
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    account = parts["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account == parts["RoleBinding"]["subjects"][0]["name"]
    assert parts["RoleBinding"]["roleRef"]["name"] == parts["Role"]["metadata"]["name"]
    readable = {
        (group, kind) for rule in parts["Role"]["rules"] for group in rule["apiGroups"] for kind in rule["resources"]
    }
    assert readable == {("", "pods"), ("", "services"), ("batch", "jobs")}
    (container,) = pod["containers"]
    assert is_a_run(container["command"] + container["args"])


def test_a_flag_that_train_does_not_have_would_be_seen():
    """Negative control of the two tests above."""
    with pytest.raises(SystemExit):
        is_a_run(["python", "-m", "experiments", "train", "--distributed", "--stepz=3"])
