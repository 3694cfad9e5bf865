"""A report's data as one HTML page that needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

SCRIPTS = ("dom.js", "scales.js", "marks.js", "scatter.js", "recipe.js", "charts.js", "tables.js", "main.js")
"""In the order in which they are put together."""
TEMPLATE, STYLE = "report.html", "report.css"


def render(data: dict[str, Any], live: bool = False) -> str:
    """The page.

    Args:
        data: as report_data gives it. Whatever texts hold, names of layers or reasons of failures, they are
            shown and never become part of the page's own code: data stands in the page as JSON, in which
            ``<`` is escaped, and the page's scripts write texts only as texts. Scripts that are not the
            page's own do not run (Content-Security-Policy).
        live: it asks for new data every few seconds, from where it was loaded.
    """
    script = _script()
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            data=data,
            live=live,
            style=Markup(_asset(STYLE)),  # ours, as it stands in this package
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


@cache
def _environment() -> Environment:
    made = Environment(
        loader=DictLoader({TEMPLATE: _asset(TEMPLATE)}), autoescape=True, undefined=StrictUndefined
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return made


@cache
def _script() -> str:
    parts = "\n".join(_asset(name) for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}\n}})();\n'


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
