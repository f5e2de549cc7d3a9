"""The documentation site: it builds without a network, and its pages work in a browser, a phone's too."""

import contextlib
import fcntl
import functools
import html.parser
import http.server
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
import zlib

import pytest

import signopt

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("docs", "experiments", "notebooks", "signopt")
TEXTS = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "pyproject.toml")
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
NOBODY = "http://127.0.0.1:9"  # a proxy that is not there: whatever asks the network fails

needs_sphinx = pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra `docs`")


def copy_of_the_repository(folder):
    """What the site is made of, without what an earlier build left."""
    for part in PARTS:
        made = {"docs": ["_build", "api", "notebooks", "project"]}.get(part, [])
        shutil.copytree(
            ROOT / part,
            folder / part,
            ignore=lambda path, names, made=made, top=ROOT / part: (
                {"__pycache__", *(made if pathlib.Path(path) == top else [])} & set(names)
            ),
        )
    for text in TEXTS:
        shutil.copy(ROOT / text, folder)


def build(source, target):
    """As `make docs` does: warnings are errors."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(target)]
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOBODY)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | proxies | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built pages; built once, by whichever process comes first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    source, target, done = shared / "repository", shared / "site", shared / "site.json"
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            source.mkdir()
            copy_of_the_repository(source)
            built = build(source, target)
            done.write_text(json.dumps([built.returncode, built.stdout + built.stderr]))
    code, said = json.loads(done.read_text())
    assert code == 0, said
    return target


def pages(site):
    """All but the listings of source code, which are many and alike."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [page for page in found if not page.startswith(("_modules/", "_static/")) or page == "_modules/index.html"]


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.fixture
def extension(monkeypatch):
    """Import one of the site's own extensions."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    names = ("drawings", "gallery", "links", "pages", "reference")
    theirs = {name: sys.modules.pop(name) for name in names if name in sys.modules}  # the tests have a `reference`, too
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(theirs)


def documented(site):
    """The names that the site's own inventory lists."""
    data = (site / "objects.inv").read_bytes()
    lines = zlib.decompress(data.split(b"\n", 4)[4]).decode().splitlines()
    return {line.split()[0] for line in lines if line.split()[1].startswith("py:")}


@needs_sphinx
def test_every_public_name_has_an_entry(site):
    """Public is here what the package's first page of source imports as `name as name`."""
    source = pathlib.Path(signopt.__file__).read_text(encoding="utf-8")
    public = {
        f"signopt.{name}"
        for name, alias in re.findall(r"import (\w+) as (\w+)$", source, re.MULTILINE)
        if name == alias
    }
    assert len(public) > 15 and public <= documented(site)
    assert {"signopt.prox.l1", "signopt.workers.per_worker", "signopt.wire.bytes_sent"} <= documented(site)


@needs_sphinx
def test_a_new_name_appears_by_itself(extension, tmp_path, monkeypatch):
    (tmp_path / "fresh.py").write_text(
        "from math import sqrt\nfrom math import exp as exp\nimport json as json\nLIMIT = 3\n\n"
        "def added(): pass\n\ndef _hidden(): pass\n\nclass State: pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    fresh = importlib.import_module("fresh")
    reference = extension("reference")
    assert reference.exported(fresh) == ["exp", "json", "added", "State"]
    assert [entry.path for entry in reference.entries("fresh")] == ["fresh.exp", "fresh.added", "fresh.State"]
    fresh.__all__ = ["added"]
    assert reference.exported(fresh) == ["added"]


@needs_sphinx
def test_a_name_is_found_by_the_file_that_defines_it(extension):
    paths = extension("reference").public_paths()
    assert paths["signopt.vote.majority_vote"] == "signopt.majority_vote"
    assert paths["signopt.prox.entrywise.l1"] == "signopt.prox.l1"


@needs_sphinx
def test_an_argument_is_not_taken_for_a_module(extension):
    lines = ["`prox` where `mask` is True, as `signopt.prox` and `l1` say."]
    extension("reference").leave_arguments_alone(None, "function", "", lambda prox, mask: None, None, lines)
    assert lines == ["``prox`` where ``mask`` is True, as `signopt.prox` and `l1` say."]


@needs_sphinx
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lax.psum(x, 'i')", "jax.lax.psum"),
        ("optax.chain", "optax.chain"),
        ("majority_vote", "majority_vote"),
        ("x + 1", None),
        ("python -m signopt", None),
    ],
)
def test_what_a_text_in_backticks_names(extension, text, name):
    assert extension("links").full_name(text) == name


@needs_sphinx
def test_the_inventories_hold_what_is_referred_to():
    """If this fails: python docs/inventories/write.py, and look at what it wrote."""
    command = [sys.executable, "docs/inventories/write.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- links -----------------------------------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """Where a page leads, what it loads, and the places in it."""

    def __init__(self):
        super().__init__()
        self.targets, self.places = [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.targets += [values[key] for key in ("href", "src") if values.get(key)]
        self.places |= {values[key] for key in ("id", "name") if values.get(key)}


@functools.cache
def links_of(path):
    found = Links()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def dead_links(site):
    dead = []
    for path in sorted(site.rglob("*.html")):
        if "_static" in path.relative_to(site).parts:
            continue
        for target in links_of(path).targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            leads = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if leads.is_dir():
                leads = leads / "index.html"
            place = urllib.parse.unquote(parts.fragment)
            if not leads.exists() or (place and leads.suffix == ".html" and place not in links_of(leads).places):
                dead.append(f"{path.relative_to(site)}: {target}")
    return dead


@needs_sphinx
def test_no_link_within_the_site_is_dead(site):
    assert dead_links(site) == []


def test_dead_links_would_be_seen(tmp_path):
    """Negative control of the test above."""
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a href="b.html#gone">2</a><img src="c.svg">')
    (tmp_path / "b.html").write_text('<p id="here"></p><a href="https://example.org/gone">3</a>')
    assert dead_links(tmp_path) == ["a.html: b.html#gone", "a.html: c.svg"]


@needs_sphinx
@pytest.mark.parametrize(
    ("link", "becomes"),
    [
        ("[a](docs/faults.md#nan)", "[a](../faults.md#nan)"),
        ("[a](notebooks/01_vote_in_a_flax_loop.ipynb)", "[a](../notebooks/01_vote_in_a_flax_loop.ipynb)"),
        ("[a](signopt/vote.py)", "[a](https://host/signopt/blob/main/signopt/vote.py)"),
        ("[a](https://arxiv.org/abs/1802.04434)", "[a](https://arxiv.org/abs/1802.04434)"),
        ("```\n[a](docs/faults.md)\n```", "```\n[a](docs/faults.md)\n```"),
    ],
)
def test_links_of_a_copied_page_lead_to_the_site_or_to_the_repository(extension, link, becomes):
    assert extension("pages").turned(link, "CHANGELOG.md", "project/changelog.md", "https://host/signopt") == becomes


@pytest.mark.slow
@needs_sphinx
def test_a_name_that_is_not_there_fails_the_build(tmp_path):
    copy_of_the_repository(tmp_path)
    with (tmp_path / "docs" / "faults.md").open("a") as page:
        page.write("\nSee `signopt.workers.nowhere`.\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0 and "target not found: signopt.workers.nowhere" in built.stderr


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def address(site):
    """The site, served from this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(site), **kwargs)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def chromium(folder):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra `test`")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    try:
        driver.set_script_timeout(60)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def look(browser, address, screen=DESK):
    """Load a page, and wait until its formulas are set."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(address)
    browser.execute_async_script(
        "const done = arguments[0]; const wait = () => document.readyState !== 'complete' ? setTimeout(wait, 20)"
        " : Promise.resolve(window.MathJax?.startup?.promise).then(() => done()); wait()"
    )


def complaints(browser, origin):
    """Errors in the console, formulas that were not understood, and every request to another host."""
    found = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    found += browser.execute_script(
        "return [...document.querySelectorAll('[data-mjx-error], mjx-container [fill=red]')]"
        ".map(x => x.getAttribute('data-mjx-error') ?? 'an unknown command in a formula')"
    )
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(x => x.name)")
    return found + [f"asked for {name}" for name in loaded if not name.startswith((origin, "data:"))]


@needs_sphinx
def test_every_page_loads_without_a_complaint(browser, address, site):
    found = {}
    for page in pages(site):
        look(browser, f"{address}/{page}")
        if said := complaints(browser, address):
            found[page] = said
    assert found == {} and len(pages(site)) > 15


BROKEN = """<!doctype html><link rel="icon" href="data:,"><script src="mathjax/tex-svg-full.js"></script>
<p>\\(\\nonsense{1}\\) \\(\\frac{1}\\)</p><img src="http://example.org/a.png"><script>console.error("an error")</script>"""


@needs_sphinx
def test_complaints_would_be_seen(browser, address, site):
    """Negative control of the test above."""
    page = site / "_static" / "broken.html"
    page.write_text(BROKEN)
    look(browser, f"{address}/_static/broken.html")
    found = " ".join(complaints(browser, address))
    page.unlink()
    for part in (
        *("an error", "an unknown command in a formula", "Missing argument for"),
        *("ERR_NAME_NOT_RESOLVED", "asked for http://example.org/a.png"),
    ):
        assert part in found, part


def search(browser, address, words):
    """The addresses that a search finds, best first."""
    look(browser, f"{address}/search.html?q={urllib.parse.quote(words)}")
    browser.execute_async_script(
        "const done = arguments[0]; const wait = () => /finished|did not match|No results|found/"
        ".test(document.querySelector('#search-results')?.innerText ?? '') ? done() : setTimeout(wait, 50); wait()"
    )
    return browser.execute_script("return [...document.querySelectorAll('#search-results li a')].map(x => x.href)")


@needs_sphinx
def test_the_search_finds_majority_vote(browser, address):
    found = search(browser, address, "majority_vote")
    assert any(link.split("#")[0].endswith("api/signopt.html") for link in found[:3]), found
    assert search(browser, address, "zzzunheardof") == []


PICTURES = """return [...document.querySelectorAll('article img, article .drawing svg')].map(x => {
  const box = x.getBoundingClientRect(), style = getComputedStyle(x);
  return {name: x.src || x.getAttribute('class'), hidden: style.display === 'none', left: box.left, right: box.right,
          width: box.width, height: box.height, empty: x.tagName === 'IMG' && !x.naturalWidth};
})"""


@pytest.fixture(scope="module")
def on_a_phone(browser, address, site):
    """For each page its width there, and its pictures in both themes."""
    found = {}
    for page in pages(site):
        look(browser, f"{address}/{page}", PHONE)
        width = browser.execute_script("return document.documentElement.scrollWidth")
        pictures = {}
        for theme in ("light", "dark"):
            browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
            pictures[theme] = browser.execute_script(PICTURES)
        found[page] = (width, pictures)
    return found


@needs_sphinx
@pytest.mark.parametrize(("theme", "other"), [("light", "dark"), ("dark", "light")])
def test_pictures_are_visible_on_a_phone(on_a_phone, theme, other):
    seen = 0
    for page, (_, pictures) in on_a_phone.items():
        for picture in pictures[theme]:
            if re.search(rf"-{other}\d*\.svg", picture["name"]):  # Sphinx numbers files of one name
                assert picture["hidden"], (page, picture)
                continue
            assert not picture["hidden"] and not picture["empty"], (page, picture)
            assert picture["width"] >= 150 and picture["height"] >= 50, (page, picture)
            assert picture["left"] >= 0 and picture["right"] <= PHONE["width"], (page, picture)
            seen += 1
    assert seen >= 5


@needs_sphinx
def test_no_page_is_wider_than_a_phone(on_a_phone):
    assert {page: width for page, (width, _) in on_a_phone.items() if width > PHONE["width"]} == {}
