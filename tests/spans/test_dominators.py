"""Dominators against networkx, and what lies between against its definition."""

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spansearch.spans.dominators import Digraph


@st.composite
def digraphs(draw) -> list[list[int]]:
    """Acyclic, vertex 0 the root and the last one the sink, every vertex on a path between the two."""
    n = draw(st.integers(2, 14))
    edges = draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=3 * n))
    successors = [sorted({b for a, b in edges if a == vertex and a < b}) for vertex in range(n)]
    for vertex in range(1, n):
        if not any(vertex in nexts for nexts in successors):
            successors[draw(st.integers(0, vertex - 1))].append(vertex)
    for vertex in range(n - 1):
        if not successors[vertex]:
            successors[vertex].append(draw(st.integers(vertex + 1, n - 1)))
    order = draw(st.permutations(range(1, n - 1)))  # numbers need not be in topological order
    new = {0: 0, n - 1: n - 1, **dict(zip(range(1, n - 1), order, strict=True))}
    renamed: list[list[int]] = [[] for _ in range(n)]
    for vertex, nexts in enumerate(successors):
        renamed[new[vertex]] = [new[other] for other in nexts]
    return renamed


@settings(max_examples=100, deadline=None)
@given(digraphs())
def test_against_networkx(successors):
    sink = len(successors) - 1
    graph = Digraph(successors, 0, sink)
    reference = networkx.DiGraph([(a, b) for a, nexts in enumerate(successors) for b in nexts])
    immediate = networkx.immediate_dominators(reference, 0)
    backwards = networkx.immediate_dominators(reference.reverse(), sink)
    assert sorted(graph.order) == list(range(sink + 1))
    position = {vertex: i for i, vertex in enumerate(graph.order)}
    for vertex, nexts in enumerate(successors):
        assert all(position[vertex] < position[other] for other in nexts)
        if vertex != 0:
            assert graph.idom[vertex] == immediate[vertex]
            assert next(graph.dominators(vertex)) == immediate[vertex]
        if vertex != sink:
            assert graph.ipdom[vertex] == backwards[vertex]
        after = {vertex}
        other = vertex
        while other != sink:
            other = backwards[other]
            after.add(other)
        assert {v for v in range(sink + 1) if graph.post_dominates(v, vertex)} == after
        assert graph.reachable(vertex) == {vertex} | networkx.descendants(reference, vertex)
        assert graph.reachable(vertex, forward=False) == {vertex} | networkx.ancestors(reference, vertex)
        for start in graph.dominators(vertex):
            inside = networkx.descendants(reference, start) & networkx.ancestors(reference, vertex)
            assert graph.between(start, vertex) == inside


@pytest.mark.parametrize("length", [1, 20_000])
def test_a_long_chain_needs_no_recursion(length):
    graph = Digraph([*([v + 1] for v in range(length)), []], 0, length)
    assert graph.idom[length] == length - 1 and graph.post_dominates(length, 0)
    assert len(list(graph.dominators(length))) == length
