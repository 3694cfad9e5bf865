"""A network's chains of cut points as a tree; what repeats itself is said once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.text import Text
from rich.tree import Tree

from spansearch.cli.terminal import number, share
from spansearch.spans import Chain, CutPoint, Rejected, Spans

NAMED = 3
"""Names of what is alike that are given, before the last one."""


class Step(NamedTuple):
    """A cut point and the flops from it to the next one of its chain, None behind the last."""

    point: CutPoint
    flops: int | None
    start_only: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for cut points that are the same but for numbers in their names."""
        return (_pattern(self.point.name), self.point.shape, self.point.layout, self.flops, self.start_only)


def chains_tree(found: Spans, title: str) -> Tree:
    """The top-level chain, then the nested ones, those that are alike in one branch."""
    tree = Tree(Text(title, "bold"), guide_style="dim")
    chains = [chain for chain in found.chains if len(chain.points) > 1]
    top = [chain for chain in chains if not chain.nested]
    for chain in top:
        _add(tree.add(Text("Top level", "bold")), chain, found.flops)
    alike: dict[object, list[Chain]] = {}
    for chain in chains:
        if chain.nested:
            alike.setdefault(tuple(step.kind for step in _steps(chain)), []).append(chain)
    if alike:
        nested = tree.add(Text("Nested, in regions that other paths go around", "bold"))
        for some in alike.values():
            first = some[0]
            head = f"{first.points[0].name} -> {first.points[-1].name}"
            cost = share(sum(first.flops) / max(1, found.flops))
            others = "" if len(some) == 1 else f", and {_others([one.points[0].name for one in some[1:]])}"
            _add(nested.add(Text(f"{head}  {cost}{others}")), first, found.flops)
    return tree


def refused_tree(rejected: Iterable[Rejected]) -> Tree:
    """What was refused, those that are alike in one line."""
    tree = Tree(Text("Refused", "bold"), guide_style="dim")
    alike: dict[object, list[Rejected]] = {}
    for one in rejected:
        alike.setdefault((_pattern(one.name), _pattern(one.reason)), []).append(one)
    for some in alike.values():
        others = "" if len(some) == 1 else f", and {_others([one.start for one in some[1:]])}"
        tree.add(Text(f"{some[0].name}{others}")).add(Text(some[0].reason, "dim"))
    return tree


def _add(branch: Tree, chain: Chain, flops: int) -> None:
    steps = _steps(chain)
    widest = max(len(step.point.name) for step in steps)
    for some, times in folded([step.kind for step in steps]):
        for k in some:
            branch.add(Text(_line(steps[k], widest, flops)))
        if times > 1:
            last = steps[some.start + len(some) * times - 1]
            branch.add(Text(f"... {times - 1} times more, to {last.point.name}", "dim"))


def _steps(chain: Chain) -> list[Step]:
    last = len(chain.points) - 1
    return [
        Step(point, chain.flops[k] if k < last else None, k > 0 and not point.can_stop)
        for k, point in enumerate(chain.points)
    ]


def _line(step: Step, widest: int, flops: int) -> str:
    point = step.point
    shape = " x ".join(map(str, point.shape))
    layout = (point.layout or "?") + (", start only" if step.start_only else "")
    said = f"{point.name:<{widest}}  {shape}  {layout}"
    if step.flops is None:
        return said
    return f"{said}  {number(step.flops)} flops from here, {share(step.flops / max(1, flops))}"


def folded(kinds: Sequence[object]) -> list[tuple[range, int]]:
    """Runs of items, and how many times each comes in a row: repeats of three and more are folded.

    Of all that begin at an item the one that covers most is taken, of those the shortest.

    Returns:
        (the indices of the first of them, how often it comes); together they cover all items in order.
    """
    made: list[tuple[range, int]] = []
    k = 0
    while k < len(kinds):
        best, times = 1, 1
        for length in range(1, (len(kinds) - k) // 3 + 1):
            count = _repeats(kinds, k, length)
            if count >= 3 and length * count > best * times:
                best, times = length, count
        made.append((range(k, k + best), times))
        k += best * times
    return made


def _repeats(kinds: Sequence[object], start: int, length: int) -> int:
    unit, count = kinds[start : start + length], 1
    while kinds[start + count * length : start + (count + 1) * length] == unit:
        count += 1
    return count


def _pattern(text: str) -> str:
    return re.sub(r"\d+", "#", text)


def _others(names: Sequence[str]) -> str:
    """``27 alike: layers.1, layers.2, layers.3 .. layers.27``."""
    named = [name for name, _ in groupby(names)]
    shown = named if len(named) <= NAMED + 1 else [*named[: NAMED - 1], f"{named[NAMED - 1]} .. {named[-1]}"]
    return f"{len(names)} alike: {', '.join(shown)}"
