"""Random nets of modules and glue: what is found agrees with the definition and can be replaced."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spansearch.spans import Span, Verifier, find_spans, overlap, splice

DIM = 4


@dataclass(frozen=True)
class Step:
    """One line of a program: what it computes and which earlier lines it reads (-1 is the input)."""

    kind: str
    reads: tuple[int, ...]


class Mix(nn.Module):
    """Reads two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * DIM, DIM)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(torch.cat([a, b], 1))


class Branch(nn.Module):
    """Glue around modules inside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 6), nn.Linear(6, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


MODULES = {
    "linear": lambda: nn.Linear(DIM, DIM),
    "norm": lambda: nn.LayerNorm(DIM),
    "tanh": nn.Tanh,
    "twice": lambda: nn.Sequential(nn.Linear(DIM, 5), nn.Sigmoid(), nn.Dropout(), nn.Linear(5, DIM)),
    "branch": Branch,
    "mix": Mix,
}
GLUE = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * torch.sigmoid(b),
    "relu": lambda a: F.leaky_relu(a),
    "view": lambda a: a.view(-1, 2, 2).transpose(1, 2).flatten(1) * 2,
    "center": lambda a: a - a.mean(1, keepdim=True),
    "inplace": lambda a: a.clone().mul_(2).add_(a),
}
RESIDUAL = ["linear", "twice", "branch", "add", "add", "relu"]  # what a loop of x = x + f(x) is made of
ARITY = {**dict.fromkeys([*MODULES, *GLUE], 1), "mix": 2, "add": 2, "mul": 2}


class Program(nn.Module):
    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleDict(
            {f"m{i}": MODULES[s.kind]() for i, s in enumerate(steps) if s.kind in MODULES}
        )

    def run(self, values: dict[int, Tensor], wanted: set[int]) -> dict[int, Tensor]:
        """Compute the wanted lines from those given."""
        for i, step in enumerate(self.steps):
            if i in wanted and i not in values:
                compute = self.parts[f"m{i}"] if step.kind in MODULES else GLUE[step.kind]
                values[i] = compute(*(values[read] for read in step.reads))
        return values

    def forward(self, x: Tensor) -> Tensor:
        return self.run({-1: x}, set(range(len(self.steps))))[len(self.steps) - 1]


@st.composite
def programs(draw) -> tuple[Step, ...]:
    steps: list[Step] = []
    residual = draw(st.booleans())
    for i in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(RESIDUAL if residual else [*MODULES, *GLUE]))
        near = st.integers(max(-1, i - 4), i - 1)
        reads = (i - 1, draw(near)) if ARITY[kind] == 2 else (draw(st.one_of(st.just(i - 1), near)),)
        steps.append(Step(kind, reads))
    return tuple(steps)


@dataclass
class Node:
    """A vertex of the net as its author sees it: its names, and whether a student's output can take its
    place: a module call makes it, or one reads it before glue does, or the net returns it."""

    reads: tuple[str, ...]
    names: tuple[str, ...] = ()
    writable: bool = False
    call: bool = False  # the node is all a leaf module does


def drawn(program: Program) -> dict[str, Node]:
    """The program as a graph, modules of several parts opened up."""
    nodes: dict[str, Node] = {"-1": Node((), ("input",))}
    for i, step in enumerate(program.steps):
        reads, path = tuple(str(read) for read in step.reads), f"parts.m{i}"
        if step.kind not in MODULES:
            nodes[str(i)] = Node(reads)
            continue
        if step.kind == "twice":
            nodes[f"{i}.0"] = Node(reads, (f"{path}.0",), True, True)
            nodes[f"{i}.1"] = Node((f"{i}.0",), (f"{path}.1",), True, True)
            nodes[str(i)] = Node(
                (f"{i}.1",), (f"{path}.3",), True, True
            )  # a Sequential's last entry names it
        elif step.kind == "branch":
            nodes[f"{i}.up"] = Node(reads, (f"{path}.up",), True, True)
            nodes[f"{i}.act"] = Node((f"{i}.up",), (f"{path}.down:input",), True)
            nodes[f"{i}.down"] = Node((f"{i}.act",), (f"{path}.down",), True, True)
            nodes[str(i)] = Node((*reads, f"{i}.down"), (path,), True)
        elif step.kind == "mix":
            nodes[f"{i}.cat"] = Node(reads, (f"{path}.fc:input",), True)
            nodes[str(i)] = Node((f"{i}.cat",), (path,), True, True)
        else:
            nodes[str(i)] = Node(reads, (path,), True, True)
    last = str(len(program.steps) - 1)
    used, waiting = set(), [last]
    while waiting:
        key = waiting.pop()
        if key not in used:
            used.add(key)
            waiting.extend(nodes[key].reads)
    for i, step in enumerate(program.steps):  # also calls whose result is not used read what others use
        live = [k for k, read in enumerate(step.reads) if str(read) in used and step.kind in MODULES]
        reader = f"parts.m{i}.0" if step.kind == "twice" else f"parts.m{i}"  # not a Sequential
        for k in live:
            node = nodes[str(step.reads[k])]
            if not node.names:
                earlier = [s for n, s in enumerate(program.steps[:i]) if str(n) in used or s.kind in MODULES]
                node.writable = not any(step.reads[k] in s.reads for s in earlier)
            node.names = node.names or (f"{reader}:input" + (f"[{k}]" if k > live[0] else ""),)
    if not nodes[last].names:
        nodes[last].names, nodes[last].writable = ("output",), True
    return {key: node for key, node in nodes.items() if key in used}


def backwards(nodes: dict[str, Node], key: str, without: str) -> set[str]:
    """What flows into a node on ways that do not run through another."""
    seen: set[str] = set()
    waiting = [read for read in nodes[key].reads if read != without]
    while waiting:
        key = waiting.pop()
        if key not in seen:
            seen.add(key)
            waiting.extend(read for read in nodes[key].reads if read != without)
    return seen


def legal_by_definition(program: Program) -> dict[tuple[str, str], tuple[str, str]]:
    """Ends of every pair with one way in, nothing used outside and a module call inside -> their nodes."""
    nodes = drawn(program)
    last = str(len(program.steps) - 1)
    used_by: dict[str, set[str]] = {key: set() for key in nodes}
    for key, node in nodes.items():
        for read in node.reads:
            used_by[read].add(key)
    used_by[last].add("output")
    found = {}
    for start, first in nodes.items():
        for stop, end in nodes.items():
            if start == stop or not first.names or not end.writable:
                continue
            inside = backwards(nodes, stop, start)
            from_start = start in backwards(nodes, stop, "none")
            single_entry = from_start and "-1" not in inside
            closed = all(used_by[key] <= inside | {stop} for key in inside)
            if single_entry and closed and any(nodes[key].call for key in inside | {stop}):
                found[first.names[0], end.names[0]] = (start, stop)
    return found


class OwnPart(nn.Module):
    """The span's own computation as a student: whole lines of the program between two of them."""

    def __init__(self, program: Program, start: str, stop: str) -> None:
        super().__init__()
        self.program, self.start, self.stop = copy.deepcopy(program), int(start), int(stop)

    def forward(self, x: Tensor) -> Tensor:
        needed, waiting = set(), [self.stop]
        while waiting:
            i = waiting.pop()
            if i != self.start and i not in needed:
                needed.add(i)
                waiting.extend(self.program.steps[i].reads)
        return self.program.run({self.start: x}, needed)[self.stop]


def is_due_too_early(program: Program, start: str, stop: str) -> bool:
    """The limit that find_spans names: the only modules that read a start made by glue run when the stop is
    made, or where glue makes that, with or after the one that reads it first."""
    if start == "-1" or not start.isdigit() or program.steps[int(start)].kind in MODULES:
        return False

    def first_reader(line: int) -> int:
        readers = [i for i, s in enumerate(program.steps) if s.kind in MODULES and line in s.reads]
        return readers[0] if readers else len(program.steps)

    if stop.isdigit() and program.steps[int(stop)].kind in GLUE:
        return first_reader(int(start)) >= first_reader(int(stop))
    return first_reader(int(start)) > int(stop.split(".")[0])


@settings(max_examples=40, deadline=None)
@given(programs(), st.integers(0, 2**31))
@example((Step("add", (-1, -1)), Step("add", (0, 0)), Step("mix", (1, 0)), Step("mix", (2, -1))), 0)
def test_random_nets(steps, seed):
    torch.manual_seed(seed)
    program = Program(steps).eval()
    nodes = drawn(program)
    if "-1" not in nodes:
        return
    x = torch.randn(5, DIM)
    found = find_spans(program, x)
    expected = legal_by_definition(program)
    names = {(span.start.name, span.stop.name): span for span in found}
    early = {ends for ends, keys in expected.items() if is_due_too_early(program, *keys)}
    assert set(names) <= set(expected)
    assert set(expected) - set(names) <= early
    verifier = Verifier(program, [x])
    other = torch.randn(3, DIM)
    several: dict[Span, OwnPart] = {}
    for ends, span in list(names.items())[:: 1 + len(names) // 6]:
        verifier.check(span)
        start, stop = expected[ends]
        if "." not in start + stop:
            small = splice(program, {span: OwnPart(program, start, stop)})
            assert torch.equal(small(x), program(x)) and torch.equal(small(other), program(other)), ends
            if not any(overlap(span, taken) for taken in several):
                several[span] = OwnPart(program, start, stop)
    if not several:
        return
    small = splice(program, several)
    for training in (False, True):
        small.train(training), program.train(training)
        program.zero_grad()
        (mine, its) = (net(other.requires_grad_()) for net in (small, program))
        if "twice" not in {step.kind for step in steps} or not training:  # dropout
            torch.testing.assert_close(mine, its)
            gradients = [torch.autograd.grad(out.square().sum(), other)[0] for out in (mine, its)]
            torch.testing.assert_close(*gradients)
