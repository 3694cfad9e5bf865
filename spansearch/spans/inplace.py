"""Students made of a span's own layers: they stand in the model where those stood, not in a slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from spansearch.errors import SpanError
from spansearch.spans.points import CutPoint
from spansearch.spans.span import Span


class InPlace(nn.Module):
    """A student that keeps the code of its span and changes the layers that this code calls.

    Spliced, what stays has the names of the user's own model; residual connections, masks, positions and
    caches work as they did. By itself it computes nothing.

    Args:
        replaced: path in the model -> the module that takes its place.
        attributes: path in the model -> attribute -> its new value.
        inner: spans inside, each with its own student; of a shortened span what was left out.
    """

    def __init__(
        self,
        replaced: Mapping[str, nn.Module],
        attributes: Mapping[str, Mapping[str, int]] | None = None,
        inner: Mapping[Span, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.paths = tuple(replaced)
        self.attributes = {path: dict(values) for path, values in (attributes or {}).items()}
        self.spans = tuple(inner or {})
        for path, module in replaced.items():
            self.add_module(_name(path), module)
        for number, student in enumerate((inner or {}).values()):
            self.add_module(f"student {number}", student)

    @property
    def replaced(self) -> dict[str, nn.Module]:
        """Path in the model -> the module that takes its place."""
        return {path: self.get_submodule(_name(path)) for path in self.paths}

    @property
    def inner(self) -> dict[Span, nn.Module]:
        """The spans inside, each with its student."""
        return {span: self.get_submodule(f"student {number}") for number, span in enumerate(self.spans)}

    def cast(self, dtype: torch.dtype) -> InPlace:
        """Students inside get a dtype; layers of the model's own keep theirs."""
        for student in self.inner.values():
            student.to(dtype)
        return self

    def stop_of(self, span: Span) -> CutPoint:
        """The stop of the span it is spliced into, at places that are still there to be read."""
        gone = frozenset().union(*(inner.plan.vanished for inner in self.spans))
        places = [p for inner in self.spans if inner.stop == span.stop for p in inner.plan.emit]
        return replace(span.stop, places=(*places, *span.stop.places)).without(gone)

    def forward(self, x: Tensor) -> Tensor:
        raise SpanError(
            "This student is made of layers of the model's own and computes only inside it: put it there "
            "with spansearch.splice(model, {span: student})."
        )


def _name(path: str) -> str:
    """Of the child for a path: no attribute is called so."""
    return "at " + path.replace(".", "/")


def as_dtype(student: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A student that returns activations of a dtype, in place."""
    return student.cast(dtype) if isinstance(student, InPlace) else student.to(dtype)
