"""Several splices in one model, each refitted on what those in front of it produce, healed behind."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.evidence import Evidence
from spansearch.fit import held_out_error
from spansearch.healing import Healed, heal, healable
from spansearch.readout import solve_last_layer
from spansearch.spans import Span, Spans, copy_model, splice
from spansearch.spans.hidden import put
from spansearch.spans.inplace import as_dtype
from spansearch.students import family, restored
from spansearch.students.own_layers import give_bias
from spansearch.walk import Walk


@dataclass(frozen=True, eq=False)
class Part:
    """A splice of a composition.

    Attributes:
        span, name, size, depth: whose student, of which family.
        student: as fitted by itself; families fitted by gradient need one.
        counts: of ``thin``, how many features each layer keeps; empty where its solution decides.
        seed: of what its student draws; global random state is restored.
    """

    span: Span
    name: str
    size: int
    depth: int = 1
    student: nn.Module | None = None
    counts: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Composition:
    """What takes the place of spans, and the layers between them that were healed.

    Attributes:
        students: by span.
        healed: path in the teacher -> the layer that takes its place.
        steps: what became of every layer that healing looked at.
        tuned: parameter of the spliced model -> its value, of those that belong to neither and were trained.
    """

    students: Mapping[Span, nn.Module]
    healed: Mapping[str, nn.Module]
    steps: Sequence[Healed] = ()
    tuned: Mapping[str, Tensor] = field(default_factory=dict)

    def state(self, order: Sequence[Span]) -> dict[str, Tensor]:
        """All tensors: of the student of the k-th span under ``k/``, of healed layers under
        ``healed/<path>/``, of other layers that were trained under ``tuned/<parameter>``."""
        state = {}
        for number, span in enumerate(order):
            tensors = self.students[span].state_dict()
            state.update({f"{number}/{name}": tensor for name, tensor in tensors.items()})
        for path, layer in self.healed.items():
            tensors = layer.state_dict()
            state.update({f"healed/{path}/{name}": tensor for name, tensor in tensors.items()})
        state.update({f"tuned/{name}": tensor for name, tensor in self.tuned.items()})
        return state

    @classmethod
    def restored(cls, parts: Sequence[Part], state: Mapping[str, Tensor], teacher: nn.Module) -> Composition:
        """The same again from its tensors.

        Args:
            parts: in the order of the spans that ``state`` was called with; their students are not read.

        Raises:
            RuntimeError, KeyError: the tensors are not those of such students or layers.
        """
        students = {}
        for number, part in enumerate(parts):
            own = _under(f"{number}/", state)
            student = restored(part.name, part.span, part.size, part.depth, own)
            students[part.span] = as_dtype(student, part.span.stop.dtype).eval()
        healed: dict[str, nn.Module] = {}
        for path in dict.fromkeys(name.split("/")[1] for name in state if name.startswith("healed/")):
            layer, own = copy.deepcopy(teacher.get_submodule(path)), _under(f"healed/{path}/", state)
            if "bias" in own:
                give_bias(layer)
            layer.load_state_dict(own)
            healed[path] = layer
        return cls(students, healed, tuned=_under("tuned/", state))

    def model(self, teacher: nn.Module, more: Mapping[Span, nn.Module] | None = None) -> nn.Module:
        """The spliced and healed copy of the teacher, in eval mode. Students and healed layers are in it as
        they are, other weights are the teacher's own until somebody writes to them.

        Args:
            more: students of other spans.

        Raises:
            KeyError, RuntimeError: it has no parameter of the name or the shape of a trained one.
        """
        made, students = teacher, {**self.students, **(more or {})}
        if self.healed:
            made = copy_model(teacher)
            put(made, self.healed, {})
        if students or not self.healed:
            made = splice(made, students)
        if self.tuned:
            own = dict(made.named_parameters())
            with torch.no_grad():
                for name, value in self.tuned.items():
                    own[name].copy_(value)
        return made.eval()

    def trained(self, model: nn.Module, teacher: nn.Module) -> Composition:
        """This composition after training of the model that it made: students are the model's own already,
        healed layers are taken from it, and what else differs from the teacher is written down.

        Args:
            model: from ``model(teacher)``, trained in place.
        """
        healed = {path: model.get_submodule(path) for path in self.healed}  # the model's are copies
        replaced = [*self.students.values(), *healed.values()]
        known = {id(weight) for module in replaced for weight in module.parameters()}
        before = dict(teacher.named_parameters(remove_duplicate=False))  # ties may go by another name here
        tuned = {
            name: weight.detach().clone()
            for name, weight in model.named_parameters()
            if id(weight) not in known and not (name in before and torch.equal(weight, before[name]))
        }
        return replace(self, healed=healed, tuned=tuned)


@torch.no_grad()
def compose(
    parts: Iterable[Part],
    evidence: Evidence,
    found: Spans,
    healing: bool = True,
    every: bool = False,
) -> Composition:
    """Put splices together, from the input on.

    Each student is solved on what the model with all splices in front of it produces, towards what the
    teacher has at the end of its span; of one fitted by gradient the last layer is. The first one reads what
    the teacher produces.

    Args:
        parts: of disjoint spans.
        evidence: of the teacher.
        found: the teacher's spans, at full resolution.
        healing: correct the untouched layers behind the first splice, in order.
        every: all of them, not only those that end a block.
    """
    parts = sorted(parts, key=lambda part: found.position(part.span.start))
    replaced = frozenset[int]().union(*(part.span.plan.ops for part in parts))
    layers = healable(found, every) if healing else []
    left = [path for path in layers if not found.leaves[path].ops & replaced]
    walk = Walk(evidence.calibration, evidence.opened, found, evidence.ways)
    students: dict[Span, nn.Module] = {}
    steps: list[Healed] = []
    for part in parts:
        here = found.position(part.span.start)
        passed = [path for path in left if max(map(found.place, found.leaves[path].ops)) <= here]
        left = [path for path in left if path not in passed]
        if walk.edited is not None:
            steps += heal(walk, evidence, passed)
        anchor = part.span.anchor if part.span.nested else part.span.start
        if anchor is not None:
            walk.advance(anchor)
        student = _student(part, evidence.behind(walk))
        students[part.span] = student
        walk.replace(part.span, student)
        if not part.span.nested:
            walk.advance(part.span.stop)
    steps += heal(walk, evidence, left)
    assert walk.edited is not None
    healed = {step.path: walk.edited.get_submodule(step.path) for step in steps if step.kept}
    return Composition(students, healed, tuple(steps))


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _student(part: Part, evidence: Evidence) -> nn.Module:
    """The student of a part, behind the splices in front of it."""
    kind: Any = family(part.name, part.depth)
    if part.counts:
        kind = replace(kind, counts=part.counts)
    first = evidence.through is not None and evidence.through.edited is None
    if part.student is not None and (first or kind.gradient):
        student = copy.deepcopy(part.student)
        if not first:
            data = evidence.data(part.span)
            student = student.to(evidence.device, torch.float32)
            solve_last_layer(student, data, held_out_error(student, data))
    else:
        with torch.random.fork_rng([]), torch.device("cpu"):  # the same numbers as in fit_student
            torch.manual_seed(part.seed)
            student = kind.solve(part.span, part.size, evidence)
    return as_dtype(student.to(evidence.device), part.span.stop.dtype).eval()
