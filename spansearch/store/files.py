"""Student files: safetensors, named by what produced them, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from spansearch.errors import StudyError
from spansearch.store.places import MissingError, place_of

_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


class StudentFiles:
    """The students of one run.

    Args:
        where: the directory they lie in, or ``s3://bucket/prefix``.

    Attributes:
        patiently: calls what reads or writes; may call it again where there is no room, or a server is away.
    """

    def __init__(self, where: Path | str) -> None:
        self.place = place_of(where)
        self.patiently: Callable[[Callable[[], Any]], Any] = lambda call: call()

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
        self.patiently(lambda: self.place.write(name, data))
        return {"file": name, "sha256": digest}

    def load(self, entry: Mapping[str, str]) -> dict[str, Tensor]:
        """A student's state; StudyError where its file is missing, damaged or not the one written."""
        name, digest = (str(entry.get(key)) for key in ("file", "sha256"))
        if not _NAME.fullmatch(name):  # an entry is data: no path in it leaves the directory
            raise StudyError(
                f"{name!r} is no name of a student file; the storage of this study was changed by hand."
            )
        restore = "Restore it from a copy, or run the study anew in another directory."
        try:
            data = self.patiently(lambda: self.place.read(name))
        except MissingError as error:
            raise StudyError(f"{error} {restore}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StudyError(
                f"The student file {self.place.shown(name)} is not the one this study wrote (its SHA-256 "
                f"differs): it is damaged or was replaced. {restore}"
            )
        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise StudyError(
                f"The student file {self.place.shown(name)} cannot be parsed: {error}."
            ) from error

    def clean(self) -> None:
        """Remove what writes that were cut off left behind; what is young may be being written."""
        self.place.clean()
