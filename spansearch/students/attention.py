"""attention: a linear map of each position, plus blocks that attend and think about what they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.evidence import Evidence
from spansearch.fit import FitData, held_out_error
from spansearch.linear_map_choice import linear_map
from spansearch.moments import Decomposition, Moments
from spansearch.ridge import RidgePath, solve_span
from spansearch.spans import Span
from spansearch.students.attending import Attention, AttentionStudent, FeedForward
from spansearch.students.base import check_width, register
from spansearch.students.heads import first_heads, last_units, narrowed, norms


@register("attention")
@dataclass(frozen=True)
class AttentionFamily:
    """A linear layer, attention and feed-forward units. Width scales the units, and heads along with them.

    Students are causal where the span is, and never read what the masks of the replaced modules mask out.
    Position inputs (rotary tables, position numbers) are not handed on: a student learns a bias for every
    distance up to attending.FARTHEST, and reads what the activation itself says of positions.

    Warm start: the ridge map with all that attends and feeds forward switched off or, where that is better on
    held-out examples, heads and units of the replaced modules with what they write solved by ridge.
    """

    attends: bool = True
    gradient: bool = True
    sized: bool = True
    unit: str = "units"
    depth: int = 1
    deepest: int = 3

    def refuses(self, span: Span) -> str | None:
        start, stop = span.start, span.stop
        if start.layout != "tokens" or stop.layout != "tokens":
            return f"attention is from tokens (N, T, C) to tokens, not from {start.shape} to {stop.shape}"
        if start.shape[0] != stop.shape[0]:
            return f"attention keeps the number of tokens, {start.shape[0]} become {stop.shape[0]}"
        if start.shape[0] == 1:
            return "there is a single token, which has nothing to attend to: attention is an mlp there"
        return None

    def size(self, span: Span, width: float) -> int:
        return max(1, round(check_width(width) * 2 * max(span.start.shape[1], span.stop.shape[1])))

    def build(self, span: Span, size: int) -> AttentionStudent:
        d_in, d_out = span.start.shape[1], span.stop.shape[1]
        head_dim = _head_dim(max(d_in, d_out))
        heads = max(1, round(size / (2 * head_dim)))
        return AttentionStudent(d_in, d_out, heads, head_dim, size, span.causal, self.depth)

    def grow(self, span: Span, size: int, student: nn.Module) -> AttentionStudent:
        """A student of this depth that computes the same as a shallower one."""
        assert isinstance(student, AttentionStudent)
        deeper = self.build(span, size)
        deeper.load_state_dict(student.state_dict(), strict=False)
        for k in range(len(student.attend), self.depth):
            _silence(deeper, k)
        return deeper

    @torch.no_grad()
    def solve(self, span: Span, size: int, evidence: Evidence) -> nn.Module:
        data, ridge = evidence.data(span), evidence.ridge(span, 1)
        student = self.build(span, size)
        student.skip.load_state_dict({"weight": ridge.weight.float(), "bias": ridge.bias.float()})
        for k in range(self.depth):
            _silence(student, k)
        error = held_out_error(student.to(data.device), data)
        taught = self.build(span, size)
        for k in range(1, self.depth):
            _silence(taught, k)
        taught.skip.load_state_dict(student.skip.state_dict())
        if self._learn(taught.to(data.device), span, evidence, data):
            return taught.cpu() if held_out_error(taught, data) < error else student.cpu()
        return student.cpu()

    def _learn(self, student: AttentionStudent, span: Span, evidence: Evidence, data: FitData) -> bool:
        """Heads and units of the replaced modules, what they write by ridge; False without such modules."""
        modules = [evidence.teacher.get_submodule(path) for path in span.modules]
        attend, feed = student.attend[0], student.feed[0]
        assert isinstance(attend, Attention) and isinstance(feed, FeedForward)
        if not _take_heads(attend, modules):
            return False
        d_in, d_out = span.start.shape[1], span.stop.shape[1]
        wide = d_in + attend.out.in_features

        def near(*inputs: Tensor) -> Tensor:
            return torch.cat([inputs[0], attend.read(*inputs)], -1)

        # what heads add is shrunk towards nothing or all of it towards the ridge map
        known = torch.cat([student.skip.weight, torch.zeros_like(attend.out.weight)], 1)
        path = _solved(student, near, lambda inputs, y: y, data, wide, known)
        if path is None:
            return False
        student.skip.weight.copy_(path.weight[:, :d_in])
        student.skip.bias.copy_(path.bias)
        attend.out.weight.copy_(path.weight[:, d_in:])

        def between(inputs: tuple[Any, ...]) -> Tensor:
            return student.skip(inputs[0]) + attend(*inputs)

        _take_units(feed, modules, d_out)
        path = _solved(
            student,
            lambda *inputs: feed.read(between(inputs)),
            lambda inputs, y: y - between(inputs),
            data,
            feed.down.in_features,
        )
        if path is None:
            return False
        feed.down.weight.copy_(path.weight)
        feed.down.bias.copy_(path.bias)
        return True


def _head_dim(channels: int) -> int:
    """Channels of a head: a quarter to an eighth of the span's, a power of two, 64 at most."""
    return next((size for size in (64, 32, 16, 8, 4, 2) if channels >= 4 * size), 1)


def _silence(student: AttentionStudent, block: int) -> None:
    attend, feed = student.attend[block], student.feed[block]
    assert isinstance(attend, Attention) and isinstance(feed, FeedForward)
    for weight in (attend.out.weight, feed.down.weight, feed.down.bias):
        nn.init.zeros_(weight)


def _take_heads(attend: Attention, modules: list[nn.Module]) -> bool:
    channels = attend.qkv.in_features
    known = first_heads(modules, channels)
    if known is None:
        return False
    q, k, v = narrowed(known, attend.heads, attend.qkv.out_features // (3 * attend.heads))
    rows = attend.qkv.weight.view(3, attend.heads, -1, channels)
    biases = attend.qkv.bias.view(3, attend.heads, -1)
    for part, taken in enumerate((q, k, v)):
        rows[part, : len(taken)] = taken[..., :-1].to(rows)
        biases[part, : len(taken)] = taken[..., -1].to(rows)
    if found := norms(modules, channels):
        _take_norm(attend.norm, found[0])
    return True


def _take_units(feed: FeedForward, modules: list[nn.Module], channels: int) -> None:
    known = last_units(modules, channels)
    if known is None:
        return
    up, down = known
    weight = up.weight.norm(dim=1) * down.weight.norm(dim=0)
    chosen = weight.argsort(descending=True)[: feed.up.out_features]
    feed.up.weight[: len(chosen)] = up.weight[chosen].to(feed.up.weight)
    if up.bias is not None:
        feed.up.bias[: len(chosen)] = up.bias[chosen].to(feed.up.bias)
    if found := norms(modules, channels):
        _take_norm(feed.norm, found[-1])


def _take_norm(norm: nn.LayerNorm, known: nn.LayerNorm) -> None:
    norm.weight.copy_(known.weight)
    if known.bias is not None:
        norm.bias.copy_(known.bias)


def _solved(
    student: AttentionStudent,
    features: Callable[..., Tensor],
    targets: Callable[[tuple[Any, ...], Tensor], Tensor],
    data: FitData,
    width: int,
    prior: Tensor | None = None,
) -> RidgePath | None:
    """Ridge from features (N, T, width) of a student's inputs to targets (N, T, d), shrunk towards 0 or
    ``prior`` (d, width), whichever is better held out; None without rows."""
    maps, found = {"y": linear_map((width,), "vector", data.y.shape[2:], "vector")}, []
    for batches in (data.fit_batches(student), data.held_out_batches(student)):
        moments = Moments(maps, device=data.device)
        for inputs, y, keep in batches:
            X, Y = features(*inputs).flatten(0, 1), targets(inputs, y).flatten(0, 1)
            moments.add(X, {"y": Y}, None if keep is None else keep.flatten())
        found.append(moments)
    if found[0].count < 2 or not found[1].count:
        return None
    priors = {"zero": None} if prior is None else {"zero": None, "prior": prior.double()}
    return solve_span(Decomposition(*found), "y", priors=priors)
