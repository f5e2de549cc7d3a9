"""Every loop of docs/ runs before and after its diff, learns on both sides, and the diff is short."""

import pathlib
import re

import numpy as np
import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = ("loops", "nnx", "loop_parts")


def read(page):
    """What its loops share, and its sections by title."""
    preamble, *sections = re.split(r"^## ", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return preamble, {section.partition("\n")[0].replace("`", ""): section for section in sections}


SECTIONS = {title: (page, section) for page in PAGES for title, section in read(page)[1].items()}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def sides(diff):
    """The program before and after."""
    lines = diff.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines)
    return tuple("\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign)) for sign in "-+")


def execute(code, namespace):
    exec(compile(code, "docs", "exec"), namespace)
    return namespace


def shared(page):
    (setup,) = blocks(read(page)[0], "python")
    return execute(setup, {})


@pytest.mark.parametrize("title", SECTIONS)
def test_the_loop_learns_before_and_after(title, devices):
    page, section = SECTIONS[title]
    (diff,) = blocks(section, "diff")
    before, after = sides(diff)
    assert 1 <= sum(line.startswith("+") for line in diff.splitlines()) <= 5
    for code in (before, after):
        namespace = execute(code, shared(page))
        losses = namespace["losses"]
        assert np.isfinite(losses).all()
        stalls = code is before and title == "Parameters in bfloat16"
        assert (np.mean(losses[-5:]) < 0.75 * losses[0]) != stalls
    for check in blocks(section, "python"):
        execute(check, namespace)


def test_both_sides_of_a_diff_are_read():
    """Negative control of the tests above."""
    before, after = sides(" a = 1\n-b = 2\n+b = 3\n\n c = b")
    assert execute(before, {})["c"] == 2
    assert execute(after, {})["c"] == 3
    with pytest.raises(AssertionError):
        execute("assert 1 == 2", {})


def test_the_pages_cover_every_loop_that_they_should():
    wanted = (
        "pmap",
        "shard_map",
        "nnx.jit",
        "nnx.shard_map",
        "NamedSharding",
        "Explicit meshes",
        "frozen layers and LoRA",
        "out_axes=(None, 0)",
        "FSDP",
        "between hosts",
        "accumulation",
        "scan",
        "BatchNorm",
        "Dropout",
        "DynamicScale",
        "bfloat16",
        "Rngs and metrics",
        "Equinox",
        "another number of workers",
    )
    for name in wanted:
        assert any(name in title for title in SECTIONS), name
    assert len(SECTIONS) == sum(len(read(page)[1]) for page in PAGES)
