"""Student files: safetensors, named by what produced them, written whole or not at all, checked when read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from spansearch.errors import DiskFullError, SaveError, StudyError


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is there whole or not at all.

    Raises:
        DiskFullError: the disk is full. SaveError: the directory cannot be written. Nothing that was there
            is lost.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # of machines that share the directory
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (DiskFullError if full else SaveError)(
            f"Cannot write {path}: {error.strerror or error}. What was written before is intact. Free some "
            "space or change the permissions, then run the same command again: it continues."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


OLD = 3600.0
"""Seconds after which nobody writes a temporary file any more."""
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


class StudentFiles:
    """The students of one run, in its directory ``students/``.

    Attributes:
        patiently: calls what writes; may call it again where the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.patiently: Callable[[Callable[[], None]], None] = lambda write: write()

    def save(self, origin: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, str]:
        """Write a student's state; returns what load needs: its file's name and content hash.

        The name is made of both, so that nothing that counts is ever overwritten: a worker that comes too
        late, or a machine that rounds otherwise, writes another file.

        Args:
            origin: everything that determines the student.
            state: the student's state_dict.
        """
        # cloned: the format refuses tensors that share memory, as tied weights do
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        data = safetensors.torch.save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        made_of = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
        name = f"{made_of[:16]}{digest[:16]}.safetensors"
        self.patiently(lambda: write_durably(self.directory / name, data))
        return {"file": name, "sha256": digest}

    def load(self, entry: Mapping[str, str]) -> dict[str, Tensor]:
        """A student's state; StudyError where its file is missing, damaged or not the one written."""
        name, digest = (str(entry.get(key)) for key in ("file", "sha256"))
        if not _NAME.fullmatch(name):  # an entry is data: no path in it leaves the directory
            raise StudyError(
                f"{name!r} is no name of a student file; the storage of this study was changed by hand."
            )
        path = self.directory / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StudyError(
                f"The student file {path} cannot be read: {error.strerror}. Restore it from a copy, or run "
                "the study anew in another directory."
            ) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StudyError(
                f"The student file {path} is not the one this study wrote (its SHA-256 differs): it is "
                "damaged or was replaced. Restore it from a copy, or run the study anew in another directory."
            )
        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise StudyError(f"The student file {path} cannot be parsed: {error}.") from error

    def clean(self) -> None:
        """Remove what writes that were cut off left behind; what is young may be being written."""
        for leftover in self.directory.glob(".*.tmp"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > OLD:
                    leftover.unlink()
