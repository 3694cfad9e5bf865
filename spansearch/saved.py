"""A smaller network as two files that go with its teacher: recipe.json and students.safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors
import safetensors.torch
from torch import Tensor, nn

from spansearch.bare import bare
from spansearch.batches import hash_of
from spansearch.compose import Composition, Part
from spansearch.errors import StudyError
from spansearch.recipe import Recipe, from_json, to_json
from spansearch.spans import Reach, find_spans
from spansearch.store import write_durably

RECIPE, STUDENTS = "recipe.json", "students.safetensors"
FORMAT = 1

M = TypeVar("M", bound=nn.Module)


def identity_of(teacher: nn.Module) -> str:
    """A hash of a model's class name and state_dict."""
    return hash_of([type(teacher).__qualname__, teacher.state_dict()])


def save(
    directory: Path | str,
    recipe: Recipe,
    state: Mapping[str, Tensor],
    teacher: Mapping[str, Any],
    reach: Reach,
    measures: Mapping[str, Any],
) -> None:
    """Write a smaller network; a directory that holds one already gets the new one.

    Args:
        directory: is made where it is not there.
        recipe: its splices, sorted.
        state: of its Composition, in their order.
        teacher: ``class``, ``sha256`` of class and weights; for ``load`` to compare.
        reach: how far students were allowed to read among tokens.
        measures: what is known of it, for people.

    Raises:
        SaveError: the files cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    data = safetensors.torch.save(tensors)
    said = {
        "format": FORMAT,
        "teacher": dict(teacher),
        "reach": int(reach),
        "splices": to_json(recipe),
        "students": {"file": STUDENTS, "sha256": hashlib.sha256(data).hexdigest()},
        "measures": dict(measures),
    }
    write_durably(Path(directory) / STUDENTS, data)
    write_durably(Path(directory) / RECIPE, (json.dumps(said, indent=1) + "\n").encode())


def load(directory: Path | str, teacher: M, *args: Any, **kwargs: Any) -> M:
    """The smaller network that ``Member.save`` wrote, put together with its teacher.

    Args:
        directory: with recipe.json and students.safetensors.
        teacher: the network it was made from, with the same weights; not modified. What stays of it shares
            its memory with the result until somebody writes to it.
        args, kwargs: an example, as the teacher is called with it: two or more examples along dimension 0,
            with padding and its mask if the task has any. Where students go is found on it, as by find_spans.

    Returns:
        An object of the teacher's class in eval mode, on its device, with the same outputs, to the bit, as
        the network that was saved.

    Raises:
        StudyError: files are missing or damaged, or the teacher is another one.
        SpanError, FamilyError: the teacher has no such span on this example; a family is not registered.
    """
    teacher = cast(M, bare(teacher))
    said, state = _read(Path(directory))
    known, own = said["teacher"], identity_of(teacher)
    if known["sha256"] != own:
        raise StudyError(
            f"{directory} was made from a {known['class']} with other weights than this "
            f"{type(teacher).__qualname__} has: students reproduce what that one computed. Load the teacher "
            "as it was then, in the same dtype."
        )
    found = find_spans(teacher, *args, **kwargs).readable(Reach(said["reach"]))
    recipe = from_json(said["splices"])
    spans = [found[one.start, one.stop] for one in recipe]
    parts = [Part(span, one.family, one.size, one.depth) for span, one in zip(spans, recipe, strict=True)]
    try:
        model = Composition.restored(parts, state, teacher).model(teacher)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise StudyError(
            f"What {directory} holds does not fit {'; '.join(map(str, recipe))}: {error}"
        ) from error
    device = next((p.device for p in teacher.parameters()), None)
    return cast(M, model if device is None else model.to(device))


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        said = json.loads((directory / RECIPE).read_text())
        data = (directory / STUDENTS).read_bytes()
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{directory} holds no smaller network that can be read: {error}. Member.save(directory) writes "
            f"{RECIPE} and {STUDENTS}; both are needed."
        ) from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise StudyError(
            f"{directory / RECIPE} is not of format {FORMAT}, which this version of spansearch reads. Load "
            "it with the version that wrote it, or save it again."
        )
    if hashlib.sha256(data).hexdigest() != said["students"]["sha256"]:
        raise StudyError(
            f"{directory / STUDENTS} is not what was written with {RECIPE} (its SHA-256 differs): it is "
            "damaged or was replaced. Copy both files again."
        )
    try:
        return said, safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise StudyError(f"{directory / STUDENTS} cannot be parsed: {error}.") from error
