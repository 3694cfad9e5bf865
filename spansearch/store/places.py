"""Where student files lie: a directory, or a bucket of an S3-compatible store."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from spansearch.errors import DiskFullError, SaveError, ServerAwayError, StudyError, TaskError


class MissingError(StudyError):
    """There is no file of this name."""


class Place(Protocol):
    """Keeps files whole: one that is written is there with all of its bytes, or not at all."""

    def write(self, name: str, data: bytes) -> None:
        """Keep a file in place of an earlier one of its name; SaveError where that cannot be."""

    def read(self, name: str) -> bytes:
        """A file's bytes; MissingError where it is not there."""

    def shown(self, name: str) -> str:
        """A file as messages name it."""

    def clean(self) -> None:
        """Remove what writes that were cut off left behind."""


def place_of(where: Path | str) -> Place:
    """A directory's place, or that of a URL ``s3://bucket/prefix``.

    Raises:
        TaskError: it is another URL, or what it needs is not installed.
    """
    return Directory(where) if isinstance(where, Path) else Bucket(where)


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


class Directory:
    """Files of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, name: str, data: bytes) -> None:
        """As said of a place; DiskFullError where there is no room."""
        write_durably(self.directory / name, data)

    def read(self, name: str) -> bytes:
        """As said of a place."""
        try:
            return (self.directory / name).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise MissingError(
                f"The student file {self.shown(name)} cannot be read: {error.strerror}."
            ) from error
        except OSError as error:  # it may be there: a network's disk, a right that is missing
            raise SaveError(
                f"The student file {self.shown(name)} cannot be read: {error.strerror}. Mend that, then run "
                "the same command again."
            ) from error

    def shown(self, name: str) -> str:
        """Its path."""
        return str(self.directory / name)

    def clean(self) -> None:
        """As said of a place; what is young may be being written."""
        for leftover in self.directory.glob(".*.tmp"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > OLD:
                    leftover.unlink()


_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<prefix>[^?#]*))?")
TOO_MANY, NO_ROOM = 429, 507  # of HTTP


class Bucket:
    """Files in a bucket of an S3-compatible store, through Optuna's artifact store for it.

    Keys and the address of a store that is not Amazon's come from the environment or the configuration files,
    as everywhere with boto3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3.

    Args:
        url: ``s3://bucket/prefix``.

    Raises:
        TaskError: it is another URL, or boto3 is not installed.
    """

    def __init__(self, url: str) -> None:
        found = _URL.fullmatch(url)
        if found is None:
            raise TaskError(
                f"Students can be kept in the run's directory, or in s3://bucket/prefix; got {_shown(url)}. "
                "Keys and the address of a store that is not Amazon's come from the environment: "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3."
            )
        try:
            import_module("boto3")  # of the extra
        except ImportError as error:
            raise TaskError(
                f"{url} needs boto3, which is not installed: pip install 'spansearch[s3]'."
            ) from error
        self.url = url.rstrip("/")
        self._bucket, self._prefix = found["bucket"], (found["prefix"] or "").strip("/")
        self._store: Any = None

    def __reduce__(self) -> tuple[type[Bucket], tuple[str]]:
        return Bucket, (self.url,)  # a connection does not travel

    def write(self, name: str, data: bytes) -> None:
        """As said of a place; ServerAwayError where the store does not answer."""

        def put(store: Any, key: str) -> None:
            # in one piece: the parts of an upload that is cut off would stay, unseen, and be paid for
            store.client.put_object(Bucket=self._bucket, Key=key, Body=data)

        self._call("written to", name, put)

    def read(self, name: str) -> bytes:
        """As said of a place; ServerAwayError where the store does not answer."""

        def whole(store: Any, key: str) -> bytes:
            with store.open_reader(key) as reader:
                return bytes(reader.read())

        return bytes(self._call("read from", name, whole))

    def shown(self, name: str) -> str:
        """Its URL."""
        return f"{self.url}/{name}"

    def clean(self) -> None:
        """Nothing is left behind: an object is there whole or not at all."""

    def _call(self, what: str, name: str, call: Any) -> Any:
        from botocore import exceptions
        from optuna.artifacts import Boto3ArtifactStore
        from optuna.artifacts.exceptions import ArtifactNotFound

        passing = (
            exceptions.ConnectionError,
            exceptions.HTTPClientError,
            exceptions.IncompleteReadError,
            exceptions.FlexibleChecksumError,
            exceptions.CredentialRetrievalError,
        )
        try:
            if self._store is None:
                self._store = Boto3ArtifactStore(self._bucket)
            return call(self._store, f"{self._prefix}/{name}".lstrip("/"))
        except (ArtifactNotFound, exceptions.BotoCoreError, exceptions.ClientError) as error:
            missing = isinstance(error, ArtifactNotFound)
            response = getattr(error.__cause__ if missing else error, "response", {})
            if missing and response.get("Error", {}).get("Code") != "NoSuchBucket":
                raise MissingError(f"The student file {self.shown(name)} is not there.") from error
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            away = status >= 500 or status == TOO_MANY or isinstance(error, passing)
            kind = DiskFullError if status == NO_ROOM else ServerAwayError if away else SaveError
            raise kind(
                f"Students cannot be {what} {self.url}: {error}. What was written is intact. Keys come "
                "from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or the files of the AWS command line, the "
                "address of a store that is not Amazon's from AWS_ENDPOINT_URL_S3; the bucket has to exist."
            ) from error


def _shown(url: str) -> str:
    return "another one, not shown: it may hold a secret" if "@" in url else repr(url)
