"""truncated: the span's first steps, the last layer of what is kept aimed at the span's end."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from spansearch.cost import Cost, announce, parameter_count
from spansearch.evidence import Evidence
from spansearch.layers import is_layer, weight_of
from spansearch.refit import refit
from spansearch.screen import span_map
from spansearch.spans import InPlace, Span
from spansearch.students.base import check_width, register
from spansearch.students.own_layers import fresh, give_bias

WITH_PARAMETERS = ("NativeLayerNorm", "FusedRmsNorm", "Prelu", "PreluKernel")


@register("truncated")
@dataclass(frozen=True)
class Truncated:
    """What lies behind a cut point inside goes. Width scales how many of the cut points stay; the size is the
    number of the last one among those of the network at full resolution.

    Where the activation there and the span's end are alike, the last layer in front of it is solved again, so
    that it lands on the span's END: nothing new is added. Where shapes differ, a ridge map leads there.
    """

    kernel: int = 3
    gradient: bool = False
    sized: bool = True

    def refuses(self, span: Span) -> str | None:
        sizes = _sizes(span)
        if not sizes:
            return "truncated stops at a cut point inside the span, and there is none"
        reasons = [self._why_not(span, size) for size in sizes]
        return reasons[0] if all(reasons) else None

    def size(self, span: Span, width: float) -> int:
        width, sizes = check_width(width), _sizes(span)
        fitting = [k for k, size in enumerate(sizes) if self._why_not(span, size) is None]
        return sizes[min(fitting, key=lambda k: abs(k + 1 - width * (len(sizes) + 1)))]

    def cost(self, span: Span, size: int) -> Cost:
        """Of the steps that stay and the map behind them; parameters of what changed."""
        _, tail = _cut(span, size)
        with torch.device("meta"):
            student = self.build(span, size)
        assert isinstance(student, InPlace)
        behind = announce(lambda: student.inner[tail], tail.start.shape)
        return Cost(span.flops - tail.flops + behind.flops, parameter_count(student))

    def build(self, span: Span, size: int) -> nn.Module:
        head, tail = _cut(span, size)
        assert span.found is not None
        if not alike(head, tail):
            linear = span_map(tail, self.kernel)
            ridge = linear.module(torch.zeros(linear.d_out, linear.d_in), torch.zeros(linear.d_out))
            return InPlace({}, inner={tail: ridge})
        modules = {path: fresh(span.found.leaves[path].module) for path in self._changed(head, tail)}
        layer = _aimed(head)
        if layer is not None:
            give_bias(modules[layer])
        return InPlace(modules, inner={tail: nn.Identity()})

    @torch.no_grad()
    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        head, tail = _cut(span, size)
        assert span.found is not None
        if not alike(head, tail):
            return InPlace({}, inner={tail: evidence.ridge(tail, self.kernel).module()})
        modules: dict[str, nn.Module] = {}
        for own_path, source in self._changed(head, tail).items():
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
                refit(layer, walk.moments(path, aim, tail.stop), own, bias, aim.slope)
        return InPlace(modules, inner={tail: nn.Identity()})

    def _why_not(self, span: Span, size: int) -> str | None:
        try:
            head, tail = _cut(span, size)
            if not alike(head, tail):
                span_map(tail, self.kernel)
        except ValueError as error:
            return str(error)
        return None

    def _changed(self, head: Span, tail: Span) -> dict[str, str]:
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
    paths = [
        path
        for path in head.found.landing_on(head.stop)
        if leaves[path].ops <= head.plan.ops and is_layer(leaves[path].module)
    ]
    return max(paths, key=lambda path: parameter_count(leaves[path].module), default=None)
