"""What goes into the last nonlinearity in front of a cut point: up to there sums and scales are linear.

A residual block ends in ``relu(x + f(x))``, a transformer layer of the first kind in ``norm(x + f(x))``: the
sum is no module's input or output, so it is read where the operator that follows takes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spansearch.spans.nonlinearities import DISPATCHED
from spansearch.spans.points import CutPoint
from spansearch.spans.structure import flatten

RECENT = 8  # operators remembered: the cut point is read right behind the one that makes it


class Approach:
    """Reads, in a forward pass, what the last nonlinearity in front of a cut point takes.

    Attributes:
        value: that tensor (N, ...); the cut point's own activation where no nonlinearity makes it. None where
            the pass did not come by.
        operator: name of the nonlinearity; empty where there is none.
    """

    def __init__(self, point: CutPoint) -> None:
        self.place = point.places[0]
        self.value: Tensor | None = None
        self.operator = ""
        self._seen = 0

    def rewind(self) -> None:
        """Before the next forward pass."""
        self.value, self.operator, self._seen = None, "", 0

    def _read(self, structure: Any, recent: _Recent) -> None:
        number, self._seen = self._seen, self._seen + 1
        if number != self.place.number:
            return
        leaf = flatten(structure)[0][self.place.leaf]
        self.operator, read = next(
            ((name, given) for made, name, given in recent.operators if made is leaf), ("", leaf)
        )
        self.value = read.detach().clone()

    def _attach(self, model: nn.Module, recent: _Recent) -> Any:
        self.rewind()
        module = model.get_submodule(self.place.path)
        if self.place.side == "out":
            return module.register_forward_hook(lambda _m, _args, output: self._read(output, recent))
        return module.register_forward_pre_hook(
            lambda _m, args, kwargs: self._read((args, kwargs), recent), with_kwargs=True
        )


class _Recent(TorchDispatchMode):
    """Remembers the last nonlinear operators: (what it made, its name, what it took)."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: deque[tuple[Tensor, str, Tensor]] = deque(maxlen=RECENT)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name not in DISPATCHED:
            return func(*args, **(kwargs or {}))
        given = args[0].clone() if name.endswith("_") else args[0]
        out = func(*args, **(kwargs or {}))
        made = out[0] if isinstance(out, tuple) else out
        self.operators.append((made, name.removesuffix("_"), given))
        return out


@contextmanager
def approached(pairs: Sequence[tuple[nn.Module, Approach]]) -> Iterator[None]:
    """Readers attached, each to its model, for the duration of a block."""
    recent = _Recent()
    with ExitStack() as stack:
        for model, approach in pairs:
            stack.callback(approach._attach(model, recent).remove)
        stack.enter_context(recent)
        yield
        recent.operators.clear()
