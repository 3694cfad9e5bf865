"""truncated: the span's first steps, the last layer of what is kept aimed at the span's end."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from spansearch.aim import heaviest
from spansearch.cost import Cost, parameter_count
from spansearch.evidence import Evidence
from spansearch.layers import is_layer, weight_of
from spansearch.refit import refit
from spansearch.spans import InPlace, Span
from spansearch.students.base import check_width, register
from spansearch.students.own_layers import fresh, give_bias
from spansearch.walk_moments import moments

WITH_PARAMETERS = ("NativeLayerNorm", "FusedRmsNorm", "Prelu", "PreluKernel")


@register("truncated")
@dataclass(frozen=True)
class Truncated:
    """What lies behind a cut point inside goes, and the last layer in front of it is solved again, so that it
    lands on the span's END: nothing new is added. Width scales how many steps stay; the size is the number of
    the last cut point that stays among those of the network at full resolution.

    It stops where the activation and the span's end are alike, and behind a layer that can be solved again.
    What a linear map behind another cut point would be, `ridge` is in the shorter span from there; what
    nothing at all would be, `identity`.
    """

    gradient: bool = False
    sized: bool = True
    unit: str = "cut point"

    def refuses(self, span: Span) -> str | None:
        if not _sizes(span):
            return "truncated stops at a cut point inside the span, and there is none"
        if not _own(span):
            return (
                "truncated stops behind a layer, at a cut point of the shape of the span's end and behind "
                "the same nonlinearity, and there is none inside"
            )
        return None

    def size(self, span: Span, width: float) -> int:
        width, last = check_width(width), len(_sizes(span)) + 1
        own = _own(span)
        return min(own, key=lambda size: abs(own[size] - width * last))

    def canonical(self, span: Span, size: int) -> tuple[Span, int]:
        """The shortest span in which the student is the same, and its size there: only the layer that is
        aimed and what goes matter, not where the span starts in front of them."""
        head, tail = _cut(span, size)
        found, changed = head.found, _changed(head, tail)
        assert found is not None and span.found is not None
        for start in reversed(span.found.inside(span)):
            halves = span.found.halves(span, start)
            if halves is None or head.stop not in found.inside(halves[1]):
                continue
            number = found.inside(halves[1]).index(head.stop) + 1
            shorter = found.halves(halves[1], head.stop)
            if shorter is not None and _changed(*shorter) == changed:
                return halves[1], number
        return span, size

    def cost(self, span: Span, size: int) -> Cost:
        """Of the steps that stay; parameters of what changed."""
        _, tail = _cut(span, size)
        with torch.device("meta"):
            student = self.build(span, size)
        return Cost(span.flops - tail.flops, parameter_count(student))

    def build(self, span: Span, size: int) -> nn.Module:
        head, tail = _cut(span, size)
        assert span.found is not None
        modules = {path: fresh(span.found.leaves[path].module) for path in _changed(head, tail)}
        layer = _aimed(head)
        if layer is not None:
            give_bias(modules[layer])
        return InPlace(modules, inner={tail: nn.Identity()})

    @torch.no_grad()
    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        head, tail = _cut(span, size)
        assert span.found is not None
        modules: dict[str, nn.Module] = {}
        for own_path, source in _changed(head, tail).items():
            modules[own_path] = copy.deepcopy(evidence.teacher.get_submodule(source)).cpu()
        path = _aimed(head)
        if path is not None:
            layer = modules[path]
            assert is_layer(layer)
            own, bias = weight_of(layer), None if layer.bias is None else layer.bias.detach().clone()
            give_bias(layer)
            aim = evidence.aim(path, head.stop)
            if aim is not None:
                walk = evidence.walk(span.found.whole)
                walk.advance(head.start)
                refit(layer, moments(walk, path, aim, tail.stop), own, bias, aim.slope)
        return InPlace(modules, inner={tail: nn.Identity()})


def _changed(head: Span, tail: Span) -> dict[str, str]:
    """Path of a module that gets other weights -> path of the module they come from."""
    path, found = _aimed(head), head.found
    changed = {} if path is None else {path: path}
    assert found is not None
    if found.operator(head.stop) in WITH_PARAMETERS:  # the norm at the span's end, where they differ
        own, other = head.stop.places[0].path, tail.stop.places[0].path
        if own != other and own in found.leaves and other in found.leaves:
            changed[own] = other
    return changed


def _sizes(span: Span) -> list[int]:
    """The number of each cut point inside, among those of the network at full resolution, from 1."""
    found = span.found
    if found is None:
        return []
    every = found.whole.inside(span)
    return [every.index(point) + 1 for point in found.inside(span)]


def _own(span: Span) -> dict[int, int]:
    """The sizes whose students no other family makes, in rising order, each with its place, from 1, among the
    cut points inside."""
    assert span.found is not None
    own = {}
    for place, size in enumerate(_sizes(span), 1):
        halves = span.found.whole.halves(span, span.found.whole.inside(span)[size - 1])
        if halves is not None and alike(*halves) and _changed(*halves):
            own[size] = place
    return own


def _cut(span: Span, size: int) -> tuple[Span, Span]:
    """What is kept and what goes; ValueError where they are no two legal spans."""
    assert span.found is not None
    whole = span.found.whole
    point = whole.inside(span)[size - 1]
    halves = whole.halves(span, point)
    if halves is None:
        raise ValueError(f"no two legal spans meet at {point.name}")
    return halves


def alike(head: Span, tail: Span) -> bool:
    """Do the activation that is kept and the span's end have one shape, and come out of one nonlinearity?"""
    found = head.found
    assert found is not None
    same = (head.stop.shape, head.stop.dtype) == (tail.stop.shape, tail.stop.dtype)
    return same and found.operator(head.stop) == found.operator(tail.stop)


def _aimed(head: Span) -> str | None:
    """The layer that is aimed: of those that land on what is kept the one with most weights."""
    assert head.found is not None
    leaves = head.found.leaves
    inside = (path for path in head.found.landing_on(head.stop) if leaves[path].ops <= head.plan.ops)
    return heaviest(head.found, (path for path in inside if is_layer(leaves[path].module)))
