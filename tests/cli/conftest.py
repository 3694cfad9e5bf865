"""Running the command line within the test's process."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spansearch.cli import main


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Iterator[Run]:
    """``run("front", path, "--json")`` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def command(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["spansearch", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\r" not in out + err  # no control characters for a log
        assert "Traceback" not in out + err
        return Ended(code, out, err)

    yield command
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.getLogger("spansearch").handlers = []
