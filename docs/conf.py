"""The documentation as a site: `make docs`. Pages are Markdown; warnings are errors; nothing is loaded from a network."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import latex2mathml.converter

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

project = "sst-kernels"
copyright = "the sst-kernels authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "sst-kernels"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
default_role = "code"
smartquotes = False  # primes are primes

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
nb_execution_mode = "off"  # the notebook keeps the outputs of `make notebook`; tests/test_notebook.py runs its cells

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_preprocess_types = False

SECTIONS = ("Args", "Attributes", "Raises", "Example", "Examples", "Returns")
HEADING = re.compile(rf"^({'|'.join(SECTIONS)}):$")


def as_rst(lines: list[str]) -> list[str]:
    """A docstring of this house as reStructuredText: `names` are code, everything else is plain words with formulas in them.

    Text between backticks becomes a literal; what reStructuredText would read as markup elsewhere is escaped. A paragraph's
    continuation may be indented; an indented paragraph of its own is a formula. `name: …` at the start of a paragraph is a field.
    """
    out: list[str] = []
    section, fence = "", False
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if indent == 0:
            section = ""
        if heading := HEADING.match(line):
            section = heading[1]
            out += ["", line]
            continue
        if text.startswith(">>>"):
            fence = True
        if fence:
            fence = bool(text)
            out.append(line)
            continue
        if section in ("Args", "Attributes"):  # a field of several names has to be one word
            line = re.sub(r"^(\s+)(\w+(?:, \w+)+)(?=: )", lambda m: m[1] + m[2].replace(", ", "/"), line)
        before = out[-1] if out else ""
        if text and section not in ("Args", "Attributes", "Raises"):
            if indent and before.strip() and not before.startswith((" ", "|")):
                line = text  # a continuation
            elif indent and not before.strip():
                out += ["::", ""]  # a formula
                section = "formula"
            elif indent == 0 and re.match(r"^\w+(?:, \w+)*: ", line) and before.strip():
                out.append("")  # a field of its own
        out.append(line if section == "formula" else escaped(line))
    return out


def escaped(line: str) -> str:
    """Literals for what stands between backticks, set apart from the letters around them; no markup in the rest."""
    parts = re.split(r"`+([^`]+)`+", line)
    out = [re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part) for part in parts]
    for i in range(1, len(parts), 2):
        before = "\\ " if parts[i - 1] and not re.search(r"[\s(\[{\"'/–—-]$", parts[i - 1]) else ""
        after = "\\ " if re.match(r"[\w(\[]", parts[i + 1]) else ""
        out[i] = f"{before}``{parts[i]}``{after}"
    return "".join(out)


def read_page(app, docname, source) -> None:
    """Markdown files outside of docs/ are no pages of the site: links to them lead to copies."""
    source[0] = re.sub(r"\[([^\]]+)\]\(((?:\.\./)+[a-z]\S+\.md)\)", keep_or_copy(app.env.doc2path(docname)), source[0])


def keep_or_copy(page):
    def replaced(match):
        outside = not (Path(page).parent / match[2]).resolve().is_relative_to(ROOT / "docs")
        return f"{{download}}`{match[1]} <{match[2]}>`" if outside else match[0]

    return replaced


def read_docstring(app, what, name, obj, options, lines) -> None:
    lines[:] = as_rst(lines)
    if what in ("property", "attribute"):  # what stands before a colon is no type
        lines[:1] = [line.replace(": ", " – ") for line in lines[:1]]


def inline_math(translator, node) -> None:
    translator.body.append(latex2mathml.converter.convert(node.astext()))
    raise_skip()


def block_math(translator, node) -> None:
    translator.body.append(f'<div class="math">{latex2mathml.converter.convert(node.astext(), display="block")}</div>')
    raise_skip()


def raise_skip() -> None:
    from docutils.nodes import SkipNode

    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", read_docstring, priority=1)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
