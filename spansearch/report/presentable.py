"""What a page may show: no password leaves, neither of the storage's URL nor in an error that quotes it."""

from __future__ import annotations

import math
import re
from typing import Any
from urllib.parse import quote

import sqlalchemy

HIDDEN = "***"
IN_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s:/@?#]*):[^\s@]+@")
"""``scheme://user:password@``."""
NAMED = re.compile(r"(?i)(\w*(?:password|passwd|token|secret|credential)\w*=)[^\s&;,]+")
"""An option of a URL that is named as secrets are."""
SHORTEST = 3  # a shorter password would blacken half of all words


def presentable(data: Any, url: str | None = None) -> Any:
    """Plain data as a page may show it: no passwords in its texts, no numbers that JSON does not know.

    Args:
        data: of mappings, sequences, texts, numbers; anything else becomes its text.
        url: of the storage, whose password is taken out of sentences. Keys, and texts of one word, are what
            the page goes by: a password may be one of these words by chance, and stays in its place.
    """
    secrets = tuple(sorted(_secrets(url), key=len, reverse=True))
    return _presentable(data, secrets)


def _presentable(data: Any, secrets: tuple[str, ...]) -> Any:
    if data is None or isinstance(data, bool | int):
        return data
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {_clean(str(key), ()): _presentable(value, secrets) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_presentable(value, secrets) for value in data]
    text = str(data)
    return _clean(text, secrets if re.search(r"\s", text) else ())


def _clean(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return NAMED.sub(rf"\1{HIDDEN}", IN_URL.sub(rf"\1:{HIDDEN}@", text))


def _secrets(url: str | None) -> set[str]:
    if url is None:
        return set()
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return {url}
    options = {str(value) for name, value in parsed.query.items() if NAMED.match(f"{name}=x")}
    values = {str(parsed.password or ""), *options}
    encoded = {quote(value, safe="") for value in values}
    return {value for value in values | encoded if len(value) >= SHORTEST}
