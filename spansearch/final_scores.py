"""What members of a front reach on the test split, with an interval of the score drop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from spansearch.batches import Batch, batch_size, cloned, examples, hash_of
from spansearch.errors import pass_on_stop
from spansearch.evaluate import Evaluator
from spansearch.front import bootstrap_interval
from spansearch.results import Load, StoredTrial
from spansearch.workbench import Workbench

GROUP = 8  # examples resampled together: enough groups of a few hundred examples, few enough runs
MOST = 250  # about so many groups at most: more make no better interval, and every member keeps its scores
DIGITS = 7  # of a group's score that is kept: storages may hold 64 KB of a study's figures


def group_scores(evaluator: Evaluator, model: nn.Module) -> list[float] | None:
    """A model's score on every group of a few examples; None for a score that only whole splits have."""
    try:
        return [evaluator.task.measure(model, [cloned(group)]) for group in _groups(evaluator.batches)]
    except Exception as error:  # e.g. a correlation: it may say so in any way
        pass_on_stop(error)
        return None


def score_on_test(
    evaluator: Evaluator, model: nn.Module, teacher_scores: list[float] | None, seed: int
) -> dict[str, Any]:
    """A member's figures on the test split, with a bootstrap interval of the score drop.

    Groups of a few examples are resampled together, teacher and model on the same ones. ``ci95`` is None
    where the score of the whole split is not the mean over its examples or, with a mask, its positions (a
    median, an AUC): then groups say nothing about it, and ``groups`` is None as well.

    Args:
        teacher_scores: the teacher's group_scores.

    Returns:
        score, score_drop, ci95, divergence; groups: the model's group_scores; ``mean_over``: of which of the
        ``weights`` of the split (scores_on_test) they are the mean.
    """
    measures = evaluator.measure(model)
    own = group_scores(evaluator, model)
    interval, over = None, []
    if own is not None and teacher_scores is not None:
        drops = [before - after for before, after in zip(teacher_scores, own, strict=True)]
        for number, weights in enumerate(_weights(evaluator)):
            means = (measures.score, own), (evaluator.teacher_score, teacher_scores)
            if all(_is_mean(score, parts, weights) for score, parts in means):
                interval = interval or bootstrap_interval(drops, weights, seed)
                over.append(number)
    return {
        "score": measures.score,
        "score_drop": measures.score_drop,
        "ci95": list(interval) if interval else None,
        "divergence": measures.divergence,
        "groups": [float(f"{score:.{DIGITS}g}") for score in own] if own is not None and over else None,
        "mean_over": over,
    }


def with_neighbours(order: Sequence[str], scored: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The figures of members on test, each with what it is worth beside the next cheaper one.

    ``differs_from_cheaper``: the 95% interval of their difference in score, groups resampled together and
    both models on the same ones, excludes 0. None where that is not known: the cheapest member, a score that
    groups say nothing about.

    Args:
        order: trial numbers of the members, the cheapest first.
        scored: as from scores_on_test.
    """
    found: dict[str, Any] = {}
    for number in order:
        if number in scored:
            kept = {key: value for key, value in scored[number].items() if key not in ("groups", "mean_over")}
            found[number] = {**kept, "differs_from_cheaper": None}
    for cheaper, number in pairwise(order):
        one, other = scored.get(cheaper, {}), scored.get(number, {})
        common = [k for k in one.get("mean_over", ()) if k in other.get("mean_over", ())]
        if common:
            differences = [b - a for a, b in zip(one["groups"], other["groups"], strict=True)]
            low, high = bootstrap_interval(differences, scored["weights"][common[0]], seed)
            found[number]["differs_from_cheaper"] = low > 0 or high < 0
    return found


def scores_on_test(
    bench: Workbench,
    chosen: Sequence[StoredTrial],
    known: dict[str, Any],
    load: Load,
    seed: int,
) -> dict[str, Any]:
    """Figures of the chosen trials on the test split: what is known of it, and what is missing measured.

    The split is read every time: figures on another one are no longer comparable and are taken again.

    Args:
        known: score_on_test by trial number, ``teacher``: its score, ``data``: a hash of the split,
            ``weights``: what its groups may count with.

    Returns:
        ``known`` itself where nothing had to be measured.
    """
    if not chosen:
        return known
    missing = [trial for trial in chosen if str(trial[0]) not in known]
    data = hash_of(bench.test.batches if missing else bench.task.batches("test"))
    if known.get("data", data) != data:
        known, missing = {}, list(chosen)
    if not missing:
        return known
    teacher_scores = group_scores(bench.test, bench.teacher)
    weights = list(_weights(bench.test))
    found = {**known, "teacher": bench.test.teacher_score, "data": data, "weights": weights}
    for number, _, outcome in bench.track(missing, "scoring on test"):
        found[str(number)] = score_on_test(bench.test, load(number, outcome), teacher_scores, seed)
    return found


def _weights(evaluator: Evaluator) -> Iterator[list[float]]:
    """What groups may count with in a score: their examples, or their positions that are not masked out."""
    groups = list(_groups(evaluator.batches))
    yield [float(batch_size(group)) for group in groups]
    masks = [evaluator.task.positions(group) for group in groups]
    counts = [float(mask.sum()) for mask in masks if mask is not None]
    if len(counts) == len(groups) and min(counts) > 0:
        yield counts


def _is_mean(score: float, parts: Sequence[float], weights: Sequence[float]) -> bool:
    mean = sum(value * weight for value, weight in zip(parts, weights, strict=True)) / sum(weights)
    return abs(mean - score) <= 1e-5 * max(1.0, abs(score))


def _groups(batches: Sequence[Batch]) -> Iterator[Batch]:
    size = max(GROUP, -(-sum(map(batch_size, batches)) // MOST))
    for batch in batches:
        for first in range(0, batch_size(batch), size):
            yield examples(batch, slice(first, first + size))
