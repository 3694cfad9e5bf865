"""What a page may show: no password leaves, neither of the storage's URL nor in an error that quotes it."""

from __future__ import annotations

import math
import re
from typing import Any
from urllib.parse import quote

import sqlalchemy

HIDDEN = "***"
IN_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s:/@?#]*):[^\s/@]+@")
"""``scheme://user:password@``."""
SHORTEST = 3  # a shorter password would blacken half of all words


def presentable(data: Any, url: str | None = None) -> Any:
    """Plain data as a page may show it: no passwords in its texts, no numbers that JSON does not know.

    Args:
        data: of mappings, sequences, texts, numbers; anything else becomes its text.
        url: of the storage, whose password and options are taken out wherever they stand.
    """
    secrets = tuple(sorted(_secrets(url), key=len, reverse=True))
    return _presentable(data, secrets)


def _presentable(data: Any, secrets: tuple[str, ...]) -> Any:
    if data is None or isinstance(data, bool | int):
        return data
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {_clean(str(key), secrets): _presentable(value, secrets) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_presentable(value, secrets) for value in data]
    return _clean(str(data), secrets)


def _clean(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return IN_URL.sub(rf"\1:{HIDDEN}@", text)


def _secrets(url: str | None) -> set[str]:
    if url is None:
        return set()
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return {url}
    values = {str(parsed.password or ""), *(str(value) for value in parsed.query.values())}
    encoded = {quote(value, safe="") for value in values}
    return {value for value in values | encoded if len(value) >= SHORTEST}
