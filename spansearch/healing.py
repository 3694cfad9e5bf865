"""Healing: untouched layers behind a splice, solved again in closed form towards the teacher.

What a splice gets wrong, the layers behind it pass on. Each of them that ends a block is corrected, one after
the other, so that the spliced model comes to where the teacher is at the next cut point. As its own skip
connections bring the drift of earlier blocks along, every layer also repairs what it inherits. Which layers
these are follows from the graph and from measured slopes (aim.py), never from the type of a block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spansearch.aim import heaviest
from spansearch.correction import corrected
from spansearch.evidence import Evidence
from spansearch.layers import is_layer
from spansearch.spans import CutPoint, Spans
from spansearch.walk import Walk
from spansearch.walk_moments import missing_moments


@dataclass(frozen=True)
class Healed:
    """What became of a layer behind a splice.

    Attributes:
        path: of the layer.
        before, after: squared error on the held-out examples of what arrives at the next cut point, relative
            to that of the fit part's mean; equal where the layer stayed as it was.
    """

    path: str
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Was it changed?"""
        return self.after < self.before

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def healable(found: Spans, every: bool = False) -> list[str]:
    """Paths of the layers that healing solves again, in the order of the forward pass.

    Args:
        found: the teacher's spans, at full resolution.
        every: all linear layers, not only the heaviest of those that arrive at each cut point.
    """
    layers = [path for path, leaf in found.leaves.items() if leaf.mixes and is_layer(leaf.module)]
    if every:
        return layers
    arriving: dict[str, list[str]] = {}
    for path in layers:
        if path in found.landings:
            arriving.setdefault(found.landings[path].name, []).append(path)
    chosen = {heaviest(found, paths) for paths in arriving.values()}
    return [path for path in layers if path in chosen]


def behind(found: Spans, layers: Iterable[str], point: CutPoint) -> list[str]:
    """Those of some layers that run behind a cut point."""
    here = found.position(point)
    return [path for path in layers if min(map(found.place, found.leaves[path].ops)) > here]


@torch.no_grad()
def heal(walk: Walk, evidence: Evidence, paths: Iterable[str]) -> list[Healed]:
    """Correct layers of the walk's edited model, one after the other, on what it produces by then.

    Args:
        walk: not behind the first of the layers; goes on past them.
        evidence: of the teacher.
        paths: in the order of the forward pass.

    A layer whose output does not arrive linearly at a cut point is solved towards what it returns in the
    teacher.
    """
    found, done = walk.found, []
    for path in paths:
        before = found.before(found.leaves[path].ops)
        if before is not None:
            walk.advance(before)
        assert walk.edited is not None
        aim = evidence.aim(path, found.landings.get(path))
        layer = copy.deepcopy(walk.edited.get_submodule(path))
        assert is_layer(layer)
        errors = corrected(layer, missing_moments(walk, path, aim), None if aim is None else aim.slope)
        done.append(Healed(path, *errors))
        if done[-1].kept:
            walk.edit({path: layer}, {})
    return done
