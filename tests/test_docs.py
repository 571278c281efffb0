"""The pages as a reader meets them: length, lines, links, pictures, the site, and the skeleton of the page for contributors."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest

from sst_kernels.fisher import STRUCTURES
from sst_kernels.fisher.accumulate import StructureName
from tests import structure_cases, test_structures

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
# Words of prose, tables and code left out: two screens of a page to read, more of a page to look things up in.
PROSE = 450
LONGER = {
    "docs/cli.md": 1300, "docs/derivations.md": 700, "docs/fisher.md": 700, "docs/gevp.md": 1000, "docs/gevp_cuda.md": 850,
    "docs/quality.md": 900, "docs/reliability.md": 2500, "docs/report.md": 800, "docs/scaling.md": 650, "docs/structures.md": 650,
}  # fmt: skip
LONG_SENTENCE, SHARE = 25, 0.2  # words, and the share of a page's sentences that may have more
NUMBERS = 12  # in one paragraph or item, before it is a table


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """The page without code, tables, formulas, comments and directives."""
    text = re.sub(r"^```.*?^```$|^\$\$.*?^\$\$$|<!--.*?-->", "", text_of(page), flags=re.M | re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("|", "    ", "#")))


def paragraphs(page: str) -> list[str]:
    """Paragraphs and items of lists, each as one line."""
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", prose(page)) if p.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_so_many_words(page):
    words = len(prose(page).split())
    allowed = LONGER.get(page, PROSE)
    assert words <= allowed, f"{page} has {words} words of prose, {allowed} are allowed: split it, or make a table"


@pytest.mark.parametrize("page", PAGES)
def test_lines_fit_the_column(page):
    lines = text_of(page).splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))] == []


def plain(text: str) -> str:
    """A line as it is read: links by their words, code and formulas as one."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`|\$[^$]*\$", "X", text)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p not in ("docs/quality.md", "docs/reliability.md", "docs/cli.md")]
)
def test_sentences_are_short_as_a_rule(page):
    sentences = [
        s for p in paragraphs(page) for s in re.split(r"(?<=[.:?])\s+(?=[A-Z*`\[$])", plain(p)) if len(s.split()) > 3
    ]
    long = [s for s in sentences if len(s.split()) > LONG_SENTENCE]
    assert len(long) <= max(1, SHARE * len(sentences)), long


@pytest.mark.parametrize("page", [p for p in PAGES if p != "docs/reliability.md"])
def test_many_numbers_stand_in_a_table(page):
    crowded = [p for p in paragraphs(page) if len(re.findall(r"(?<![\w.])\d[\d.,]*", plain(p))) > NUMBERS]
    assert crowded == []


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_file_names_lead_somewhere(page):
    text, dead = text_of(page), []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, part = link.partition("#")
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists() or (part and part not in anchors(path)):
            dead.append(link)
    for name in re.findall(r"`((?:bench|csrc|docs|examples|python|sst_kernels|studies|tests)/[\w./*-]+)`", text):
        if not list(ROOT.glob(name)):
            dead.append(name)
    assert dead == []


def pictures() -> list[Path]:
    return sorted(p for kind in ("png", "svg", "jpg") for p in (ROOT / "docs").rglob(f"*.{kind}"))


def test_every_picture_is_shown_by_a_page_and_every_one_shown_is_there():
    shown = set()
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)|```\{(?:image|figure)\} (\S+)", text_of(page)):
            shown.add(((ROOT / page).parent / (target[0] or target[1])).resolve())
    assert shown == {p.resolve() for p in pictures()}
    for page in PAGES:
        assert not re.findall(r"!\[\]\(", text_of(page)), f"{page}: a picture without words for who does not see it"


def front():
    spec = importlib.util.spec_from_file_location("front", ROOT / "studies/quality/front.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    data, at, out = path.read_bytes(), 8, {}
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"tEXt":
            key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
            out[key.decode()] = value.decode()
        at += length + 12
    return out


def test_picture_and_table_of_the_readme_are_of_the_committed_rows(tmp_path):
    module = front()
    found = module.rows()
    remedy = "run `python studies/quality/front.py`"
    assert metadata(module.PICTURE)["Rows"] == module.shown(found), remedy
    assert text_of("README.md").split(module.MARK)[1] == module.table(found), remedy
    module.draw(found, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000
    assert len(module.SERIES) <= 5


class Pages(HTMLParser):
    """What a built page loads, links to and names."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[k] for k in ("id", "name") if given.get(k)}
        if tag in ("script", "img", "iframe") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and "stylesheet" in given.get("rel", ""):
            self.loads.append(given["href"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `make docs` builds it; warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", ROOT / "docs", folder / "html"]
    result = subprocess.run([*command, "-d", folder / "doctrees"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "html"


def test_the_site_reads_from_a_folder_without_a_network(site):
    parsed = {path.resolve(): Pages(path) for path in site.rglob("*.html") if "_modules" not in path.parts}
    assert len(parsed) > 25
    for path, page in parsed.items():
        for load in page.loads:
            assert "//" not in load, f"{path.name} loads {load}"
            assert (path.parent / load.split("?")[0]).is_file(), f"{path.name} loads {load}"
        for link in page.links:
            target, _, part = link.partition("#")
            if "://" in target or target.startswith("mailto:") or "_modules/" in target:
                continue
            file = (path.parent / target).resolve() if target else path
            assert file.is_file(), f"{path.name} links to {link}"
            assert not part or file not in parsed or part in parsed[file].names, f"{path.name} links to {link}"
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?https?:|@import[^;]*https?:", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_site_has_every_public_name(site):
    from tests.test_examples import public

    names = set().union(*(Pages(path).names for path in (site / "api").glob("*.html")))
    missing = [
        name for name, value in public().items() if not {name, f"{value.__module__}.{value.__qualname__}"} & names
    ]
    assert missing == []


def test_the_skeleton_of_a_structure_passes_the_contract(monkeypatch):
    """docs/contribute.md promises it: the block as it stands, registered by its steps, under every test of the contract."""
    block = re.search(r"^```python\n(.*?)^```$", text_of("docs/contribute.md"), re.M | re.S)[1]
    setting = {"__name__": "isotropic"}
    exec(compile(block, "docs/contribute.md", "exec"), setting)
    cls = setting["Isotropic"]
    monkeypatch.setitem(STRUCTURES, cls.kind, cls)
    monkeypatch.setitem(structure_cases.CASES, cls.kind, (cls.kind, {}))
    assert set(STRUCTURES) - set(get_args(StructureName)) == {cls.kind}  # step 1 says so
    ran = 0
    for name, test in vars(test_structures).items():
        marks = {m.args[0]: m.args[1] for m in getattr(test, "pytestmark", []) if m.name == "parametrize"}
        if not name.startswith("test_") or "case" not in marks:
            continue
        for layout in marks.get("layout", [None]):
            test(cls.kind, *([layout] if layout else []))
            ran += 1
    assert ran >= 13
    sample = structure_cases.samples(5)
    structure = cls(structure_cases.SHAPE)
    structure.update(structure_cases.batch(sample))
    expected = structure_cases.exact(sample).trace() / structure.size
    assert float(structure.dense()[0, 0]) == pytest.approx(float(expected), rel=1e-6)


def test_the_rival_of_the_page_for_contributors_is_one():
    from sst_merge.io.adapters import Adapter
    from sst_merge.methods import Inputs
    from tests.test_methods import term

    block = re.findall(r"^```python\n(.*?)^```$", text_of("docs/contribute.md"), re.M | re.S)[1]
    setting: dict = {}
    exec(compile(block, "docs/contribute.md", "exec"), setting)
    (method,) = setting["METHODS"]
    safety = Adapter({"a": term(0, 2)})
    merged = method.merge(Inputs(None, safety), 0.5)
    assert float((merged.terms["a"].delta() - 0.25 * safety.terms["a"].delta()).abs().max()) < 1e-12


def test_make_docs_is_what_is_tested():
    assert "sphinx -b html -W --keep-going" in text_of("Makefile")
