"""What a benchmark has measured, a line of JSON each, so that one that was cut off goes on where it was."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import spansearch as ss

Record = dict[str, Any]

KEY = ("kind", "teacher", "seed", "span", "family", "size", "init", "budget")
"""The fields that say what was measured; a later line with the same ones takes the earlier one's place."""


class Records:
    """The lines of a file, the latest of every key, in the order in which they were first measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._latest: dict[tuple[Any, ...], Record] = {}
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:  # cut off within a line
                os.truncate(path, len(whole))
            for line in whole.splitlines():
                record = json.loads(line)
                self._latest[key(record)] = record

    def known(self, wanted: Record, made_by: str) -> Record | None:
        """The record of what ``wanted`` names if it was made in the same way, else None."""
        record = self._latest.get(key(wanted))
        return record if record is not None and record["made_by"] == made_by else None

    def add(self, record: Record) -> None:
        """Append a line; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._latest[key(record)] = record

    def all(self) -> list[Record]:
        return list(self._latest.values())


def key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(field) for field in KEY)


def latest(records: Sequence[Record]) -> list[Record]:
    """Of every teacher and seed those made in the same way as the record of the kind ``teacher``."""
    made_by = {(r["teacher"], r["seed"]): r["made_by"] for r in records if r["kind"] == "teacher"}
    return [r for r in records if r["made_by"] == made_by.get((r["teacher"], r["seed"]))]


def versions() -> dict[str, Any]:
    """Of what results depend on."""
    return {
        "spansearch": ss.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def provenance() -> dict[str, Any]:
    """The command, the day and the versions: what a reader needs to run it again."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
