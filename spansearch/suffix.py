"""Compositions measured by what lies behind their first splice: in front of it they are the teacher."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spansearch.batches import cloned
from spansearch.calibration import ReachedError
from spansearch.compose import Composition
from spansearch.errors import pass_on_stop
from spansearch.evaluate import Evaluator, Measures, Suffix
from spansearch.prefix import Feed, prefix_to, share_sizes, stop_at
from spansearch.spans import CutPoint, Span, Spans, copy_model
from spansearch.spans.taps import Tap

WORTH = 0.1  # of the flops that a pass must save: what it takes to be certain is not free


class Suffixes:
    """Measures compositions on one split, to the bit as the whole models would be measured.

    What the teacher has at a cut point is kept for every batch, from the first time that a composition starts
    there. A pass starts there only where the teacher then returns exactly what it did.

    Args:
        evaluator: of the split.
        teacher: in eval mode; not modified.
        found: its spans, at full resolution.
        memory: bytes for what is kept; what was not used for longest goes first.

    Attributes:
        starts: by name of a cut point, may passes start there? What is found out is added.
    """

    def __init__(self, evaluator: Evaluator, teacher: nn.Module, found: Spans, memory: int) -> None:
        self.evaluator, self.teacher, self.found, self.memory = evaluator, teacher, found, memory
        self.starts: dict[str, bool] = {}
        self._kept: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._sizes: dict[Any, Any] = {}
        # torch's encoder layers compute in another way where hooks are attached to them, as splices do
        self._possible = not any(isinstance(one, nn.TransformerEncoderLayer) for one in teacher.modules())

    def measure(self, composed: Composition) -> Measures:
        """Score, divergence and cost of a composition.

        Raises:
            SpanError: it cannot be put together; and what Evaluator.measure raises.
        """
        return self.evaluator.measure(composed.model(self.teacher), self.behind(composed))

    def behind(self, composed: Composition) -> Suffix | None:
        """What lies behind the cut point that a composition starts at; None where that cannot stand for the
        whole, or saves too little."""
        if composed.tuned:
            return None
        point = self._start(composed)
        prefix = prefix_to(self.found, point) if point is not None and self._possible else None
        if point is None or prefix is None or prefix.flops < WORTH * self.found.flops:
            return None
        if any(self.found.leaves[path].ops & prefix.plan.ops for path in composed.healed):
            return None
        came = self._came(point, prefix)
        if came is None:
            return None
        try:
            return self._suffix(composed, prefix, came)
        except Exception as error:  # e.g. a splice needs what the prefix replaces
            pass_on_stop(error)
            return None

    def _start(self, composed: Composition) -> CutPoint | None:
        """The last cut point of the whole network that lies in front of all splices."""
        starts = [span.anchor if span.nested else span.start for span in composed.students]
        points = [point for point in starts if point is not None]
        return min(points, key=self.found.position) if len(points) == len(starts) > 0 else None

    def _came(self, point: CutPoint, prefix: Span) -> list[Tensor] | None:
        """What the teacher has at a cut point, batch by batch; None where no pass may start there."""
        if not self.starts.get(point.name, True):
            return None
        came = self._kept.get(point.name)
        if came is None:
            try:
                came = self._recorded(point)
            except Exception as error:  # e.g. what the model does at the end of a pass is never done
                pass_on_stop(error)
            if came is None or (prefix.plan.overwrite and not all(x.is_contiguous() for x in came)):
                self.starts[point.name] = False
                return None
            self._kept[point.name] = came
        self._kept.move_to_end(point.name)
        if point.name not in self.starts:
            self.starts[point.name] = self._repeats(prefix, came)
        if not self.starts[point.name]:
            del self._kept[point.name]
            return None
        return came

    @property
    def _taken(self) -> int:
        """Bytes of what is kept."""
        return sum(value.nbytes for values in self._kept.values() for value in values)

    def _recorded(self, point: CutPoint) -> list[Tensor] | None:
        """One pass of the teacher; None where a batch does not come by, or it is too much for the memory.
        What was kept before makes room for it."""
        point = self.found.read_once(point) or point
        model, tap, came = copy_model(self.teacher).eval(), Tap(point), []
        size = 0
        with ExitStack() as stack:
            stack.callback(tap.attach(model).remove)
            stack.callback(stop_at(point, model).remove)
            for batch in self.evaluator.batches:
                with torch.no_grad(), suppress(ReachedError):
                    self.evaluator.task.output(model, cloned(batch))
                if tap.value is None or not tap.alike:
                    return None
                came.append(tap.value)
                size += tap.value.nbytes
                if size > self.memory:
                    return None
                while self._kept and self._taken + size > self.memory:
                    self._kept.popitem(last=False)
                tap.rewind()
        return came

    def _repeats(self, prefix: Span, came: list[Tensor]) -> bool:
        try:
            return self.evaluator.repeats_teacher(self._suffix(Composition({}, {}), prefix, came))
        except Exception as error:  # the task reads a layer in front, say
            pass_on_stop(error)
            return False

    def _suffix(self, composed: Composition, prefix: Span, came: list[Tensor]) -> Suffix:
        feed = Feed(came)
        model = composed.model(self.teacher, {prefix: feed})
        share_sizes(model, self._sizes)
        return Suffix(model, partial(setattr, feed, "number"))
