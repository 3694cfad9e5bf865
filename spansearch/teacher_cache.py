"""A teacher that is trained once: its weights lie in a file that is named by what made them."""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from spansearch.errors import TaskError
from spansearch.store import write_durably

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


def cached_teacher(
    directory: Path | str,
    build: Callable[[], M],
    train: Callable[[], nn.Module],
    made_by: Iterable[Any],
    name: str = "teacher",
) -> M:
    """A trained network from a file in a directory; trained, and written there, where it is not there yet.

    For the ``teacher`` of a Task, which is called anew by every process: those that start together wait for
    one of them to train. The file is written whole or not at all, and checked when it is read; of a damaged
    one the network is trained again.

    Args:
        directory: where the file lies; made if it is not there.
        build: makes the network, with any weights.
        train: makes the trained network; what it returns has the ``state_dict`` that ``build``'s takes.
        made_by: everything the weights follow from. Functions and classes count with their source, tensors
            with their values, all else with its repr. What is changed or added names another file.
        name: what the file's name begins with.

    Returns:
        What ``build`` made, with the trained weights, in eval mode; under ``torch.device("meta")`` without.

    Raises:
        TaskError: the source of something in ``made_by`` cannot be had, or its repr is another one in every
            process; or the weights do not fit what ``build`` makes.
        SaveError: the file cannot be written.

    Example:
        ``teacher=lambda directory: ss.cached_teacher(directory, Net, train, made_by=[Net, train, 0.1])``
    """
    if torch.get_default_device().type == "meta":  # a dry run: no weights are wanted
        return build().eval()
    path = Path(directory) / f"{name}-{fingerprint(made_by)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        weights = _read(path)
        if weights is None:
            began = time.perf_counter()
            # cloned: the format refuses tensors that share memory, as tied weights do
            trained = train().state_dict()
            weights = {key: value.detach().cpu().contiguous().clone() for key, value in trained.items()}
            logger.info("trained %s in %.0f s", path.name, time.perf_counter() - began)
            write_durably(path, save(weights, metadata={"sha256": _checksum(weights)}))
    model = build()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise TaskError(
            f"cached_teacher: the weights in {path} do not fit the network that build() makes: {error}. What "
            "changed since they were trained is not in made_by; name it there."
        ) from error
    return model.eval()


def fingerprint(made_by: Iterable[Any]) -> str:
    """16 hexadecimal digits that stand for ``made_by`` as `cached_teacher` takes it."""
    parts = list(made_by)
    texts = [_text(part) for part in parts if not isinstance(part, Tensor)]
    digest = hashlib.sha256("\n".join(texts).encode())
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(_bytes(part))
    return digest.hexdigest()[:16]


def _text(part: Any) -> str:
    if inspect.isroutine(part) or inspect.isclass(part) or hasattr(part, "__wrapped__"):
        try:
            return inspect.getsource(part)
        except (OSError, TypeError) as error:
            raise TaskError(
                f"cached_teacher: the source of {part!r} in made_by cannot be had: {error}. Without it "
                "nobody sees that the teacher is out of date. Define it in a file, or give a version."
            ) from error
    text = repr(part)
    if re.search(r" at 0x[0-9a-fA-F]+", text):
        raise TaskError(
            f"cached_teacher: {text} in made_by names its place in memory, another one in every process, so "
            "the teacher would be trained every time. Give the values it is made of."
        )
    return text


def _read(path: Path) -> dict[str, Tensor] | None:
    """The weights in a file; None where there are none, or not those that were written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            whole = (file.metadata() or {}).get("sha256") == _checksum(weights)
    except SafetensorError:
        whole = False
    if not whole:
        logger.warning("%s is damaged: training the teacher again", path)
        return None
    return weights


def _checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(_bytes(weights[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
