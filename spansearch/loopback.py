"""Servers for this machine alone."""

from __future__ import annotations

HOST = "127.0.0.1"


def is_for_us(host: str) -> bool:
    """By the address asked for, the Host of a request: a page of another site whose name points here (DNS
    rebinding) gets nothing."""
    return host.rsplit(":", 1)[0] in (HOST, "localhost")
