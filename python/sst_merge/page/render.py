"""A page as one HTML file: template, style, script, chart library and data, and nothing from elsewhere."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .model import Page
from .words import number

# Vega draws SVG that screen readers can read, under BSD-3: 0.9 MB a page where Bokeh takes 1.3 (a canvas) and Plotly 4.8.
_SNIPPET = "window.vegaEmbed = vegaEmbed;"


@cache
def library() -> tuple[str, str]:
    """The script that draws charts and "", or "" and why there is none: a page without charts still has its tables."""
    try:
        import vl_convert

        return vl_convert.javascript_bundle(_SNIPPET), ""
    except Exception as error:
        return "", f"{type(error).__name__}: {error}".splitlines()[0]


def html(page: Page) -> str:
    """The file's text. Everything on the page is escaped: prompts and answers come from anywhere."""
    script, missing = library()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    values = asdict(page)
    plotted = [p for p in page.points if p.kl is not None and p.kl.value > 0 and not missing]  # on a logarithmic axis
    text = environment.from_string(_template("page.html")).render(
        page=values,
        data=_json(values),
        style=Markup(_template("page.css")),
        program=Markup(_template("charts.js") + _template("page.js")),
        library=Markup(script.replace("</script", "<\\/script")),
        missing=missing,
        charted={"refused": any(p.refused for p in plotted), "nll": any(p.nll for p in plotted)},
        number=number,
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # halves of surrogate pairs, which JSON may hold


def _template(name: str) -> str:
    return files("sst_merge").joinpath("templates", name).read_text(encoding="utf-8")


def _json(value: Any) -> Markup:
    """JSON that is safe inside a <script> element, None where a number is not finite."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
