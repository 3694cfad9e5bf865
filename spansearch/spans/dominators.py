"""Dominators of an acyclic graph: which vertices does every path run through?

Source: Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001; on a graph without cycles one
pass in topological order is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Digraph:
    """A directed acyclic graph over vertices 0..n-1 with one root and one sink, all on a path between.

    Args:
        successors: for every vertex the vertices its value flows into.
        root: the vertex everything flows from.
        sink: the vertex everything flows to.
    """

    def __init__(self, successors: Sequence[Sequence[int]], root: int, sink: int) -> None:
        self.successors = successors
        self.predecessors: list[list[int]] = [[] for _ in successors]
        for vertex, nexts in enumerate(successors):
            for other in nexts:
                self.predecessors[other].append(vertex)
        self.root, self.sink = root, sink
        self.order = self._topological()
        self.idom, self._depth = _dominators(self.order, self.predecessors, root)
        self.ipdom, _ = _dominators(self.order[::-1], self.successors, sink)
        self._enter, self._leave = _intervals(self.order[::-1], self.ipdom, sink)

    def _topological(self) -> list[int]:
        waiting = [len(before) for before in self.predecessors]
        order, ready = [], [self.root]
        while ready:
            vertex = ready.pop()
            order.append(vertex)
            for other in self.successors[vertex]:
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)
        return order

    def post_dominates(self, vertex: int, other: int) -> bool:
        """Does every path from ``other`` to the sink run through ``vertex``?"""
        return self._enter[vertex] <= self._enter[other] and self._leave[other] <= self._leave[vertex]

    def dominators(self, vertex: int) -> Iterator[int]:
        """The vertices every path from the root to ``vertex`` runs through: nearest first, without itself."""
        while vertex != self.root:
            vertex = self.idom[vertex]
            yield vertex

    def between(self, start: int, stop: int) -> set[int]:
        """The vertices from which ``stop`` is reached without passing ``start``.

        Where ``start`` dominates ``stop``, these are the vertices strictly between the two.
        """
        inside: set[int] = set()
        waiting = [vertex for vertex in self.predecessors[stop] if vertex != start]
        while waiting:
            vertex = waiting.pop()
            if vertex not in inside:
                inside.add(vertex)
                waiting.extend(other for other in self.predecessors[vertex] if other != start)
        return inside

    def reachable(self, vertex: int, forward: bool = True) -> set[int]:
        """The vertices that ``vertex`` flows into (or, backwards, that flow into it), itself included."""
        edges = self.successors if forward else self.predecessors
        seen, waiting = {vertex}, [vertex]
        while waiting:
            for other in edges[waiting.pop()]:
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen


def _dominators(
    order: Sequence[int], predecessors: Sequence[Sequence[int]], root: int
) -> tuple[list[int], list[int]]:
    immediate = [root] * len(predecessors)
    depth = [0] * len(predecessors)
    for vertex in order:
        if vertex == root:
            continue
        common = -1
        for other in predecessors[vertex]:
            if common < 0:
                common = other
                continue
            while common != other:
                if depth[common] >= depth[other]:
                    common = immediate[common]
                else:
                    other = immediate[other]
        immediate[vertex] = common
        depth[vertex] = depth[common] + 1
    return immediate, depth


def _intervals(order: Sequence[int], parent: Sequence[int], root: int) -> tuple[list[int], list[int]]:
    """Enter and leave times of the tree given by ``parent``: a vertex's interval holds its descendants'."""
    children: list[list[int]] = [[] for _ in parent]
    for vertex in order:
        if vertex != root:
            children[parent[vertex]].append(vertex)
    enter, leave, clock = [0] * len(parent), [0] * len(parent), 0
    stack = [(root, False)]
    while stack:
        vertex, done = stack.pop()
        clock += 1
        if done:
            leave[vertex] = clock
            continue
        enter[vertex] = clock
        stack.append((vertex, True))
        stack.extend((child, False) for child in children[vertex])
    return enter, leave
