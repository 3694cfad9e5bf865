"""The page: one file, nothing of the user's becomes part of it."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import spansearch as ss
from spansearch.report import render

from .conftest import EVIL

pytestmark = pytest.mark.usefixtures("quiet")


class Tags(HTMLParser):
    """What stands in a page as a browser reads it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)


def test_labels_of_users_are_data_only(data: dict[str, Any]) -> None:
    page = Tags(render(data))
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2 and "img" not in names
    stored = next(text for text in page.texts["script"] if text.startswith("{"))
    assert json.loads(stored) == data
    assert any(EVIL in trial.get("reason", "") for trial in data["trials"])
    hostile = Tags(render({**data, "study": EVIL}))
    assert [tag for tag, _ in hostile.tags] == names
    assert "<" not in stored and "&" not in stored


def test_it_needs_no_network(data: dict[str, Any]) -> None:
    page = Tags(render(data))
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "@import" not in (style := page.texts["style"][0]) and "url(" not in style
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'") and "connect-src" not in policy
    assert "connect-src 'self'" in render(data, live=True)


def test_only_its_own_script_runs(data: dict[str, Any]) -> None:
    html = render(data)
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert unsafe not in script[0], unsafe


def test_it_is_written_whole(study: ss.Study, tmp_path: Path) -> None:
    path = study.report(tmp_path / "deep" / "report.html")
    assert path.is_absolute() and "</html>" in path.read_text()
    assert study.report() == study.directory / "report.html"
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ss.StudyError, match="Cannot write"):
        study.report(tmp_path / "file" / "report.html")
