"""A report on this machine's own address, which follows a study while it runs."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from spansearch.errors import SpanSearchError
from spansearch.loopback import HOST, is_for_us
from spansearch.report.page import render

log = logging.getLogger("spansearch")

FRESH = 1.0
"""Seconds for which data that was read serves everyone who asks."""


class ReportServer(ThreadingHTTPServer):
    """Serves ``/``, the page, and ``/data.json``, what it shows, to this machine alone.

    Args:
        read: gives the data; called by one thread at a time, and not more often than once a second.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, read: Callable[[], dict[str, Any]], port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self._read = read
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}
        self._read_at = float("-inf")

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def data(self) -> dict[str, Any]:
        """What is known now."""
        with self._lock:
            if time.monotonic() - self._read_at >= FRESH:
                self._known = self._read()
                self._read_at = time.monotonic()
            return self._known

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error of ours; anything else is."""
        gone = isinstance(sys.exception(), ConnectionError)
        log.log(logging.DEBUG if gone else logging.WARNING, "report: a request was broken off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not self._is_for_us():
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"This report is for this machine only.\n")
        elif path not in ("/", "/data.json"):
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There are / and /data.json.\n")
        else:
            try:
                data = self.server.data()
            except SpanSearchError as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n".encode())
                return
            if path == "/":
                self._answer(HTTPStatus.OK, "text/html", render(data, live=True).encode())
            else:
                self._answer_with(data)

    def _is_for_us(self) -> bool:
        return is_for_us(self.headers.get("Host", ""))

    def _answer_with(self, data: dict[str, Any]) -> None:
        """The data, or that it is what the page has already."""
        steady = {key: value for key, value in data.items() if key != "written"}
        tag = f'"{hashlib.sha256(json.dumps(steady, sort_keys=True).encode()).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            self.send_response(HTTPStatus.NOT_MODIFIED)
            self.send_header("ETag", tag)
            self.end_headers()
        else:
            body = json.dumps(data, allow_nan=False).encode()
            self._answer(HTTPStatus.OK, "application/json", body, {"ETag": tag})

    def _answer(
        self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("report: " + format, *args)
