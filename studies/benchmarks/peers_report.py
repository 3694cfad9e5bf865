"""What the peers benchmark found: ratios of divergences, and the page of Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.pages import table
from benchmarks.peer_methods import Ours
from benchmarks.records import Record
from benchmarks.student_summary import LEAST, geometric_mean

GOALS = {
    "steps": {75: 0.5, 50: 0.5, 25: 0.5},
    "compute": {75: 0.1, 50: 0.15, 25: 0.4},
    "closed form": {75: 0.1, 50: 0.2, 25: 0.7},
}
"""At most so much of the best peer's test divergence, by flops in percent of the teacher's."""

KEPT = {50: 0.99}
"""At least so much of the teacher's accuracy without fine-tuning."""

TITLES = {
    "plain": "Without fine-tuning",
    "steps": "Equal steps for every point",
    "compute": "Equal compute for the three points of a method together",
}


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """All answers.

    Returns:
        ``points``: every record of a network; ``ratios``: by question and percent of flops, our test
        divergence over the least of any peer's; ``accuracies``: ours minus the largest of any peer's, and
        without fine-tuning ours over the teacher's; ``shares``: of the compute that a peer gets, how much our
        closed form takes; ``failed``.
    """
    measured = [record for record in records if "failed" not in record]
    points = [record for record in measured if record["kind"] == "peer"]
    teachers = {(r["teacher"], r["seed"]): r for r in measured if r["kind"] == "teacher"}
    ours = {_place(r): r for r in points if r["family"] == Ours.name}
    peers: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in points:
        if record["family"] != Ours.name:
            peers[_place(record)].append(record)
    ratios: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    gains: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for place, others in peers.items():
        regime, size = place[-2:]
        alone = ours.get((*place[:-2], "plain", size))
        compared = {regime: ours.get(place), **({"closed form": alone} if regime == "compute" else {})}
        for question, mine in compared.items():
            if mine is not None:
                least = min(record["test"] for record in others)
                ratios[question][size].append(max(mine["test"], LEAST) / max(least, LEAST))
                gains[question][size].append(mine["score"] - max(record["score"] for record in others))
    kept: dict[int, list[float]] = defaultdict(list)
    for place, mine in ours.items():
        teacher = teachers.get(place[:2])
        if place[-2] == "plain" and teacher is not None:
            kept[place[-1]].append(mine["score"] / teacher["score"])
    return {
        "points": points,
        "ratios": {q: {size: spread(some) for size, some in by.items()} for q, by in ratios.items()},
        "gains": {q: {size: min(some) for size, some in by.items()} for q, by in gains.items()},
        "kept": {size: min(some) for size, some in kept.items()},
        "fronts": [record for record in measured if record["kind"] == "front"],
        "failed": [record for record in records if "failed" in record],
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Over seeds."""
    return {"mean": geometric_mean(values), "low": min(values), "high": max(values), "seeds": len(values)}


def _place(record: Record) -> tuple[Any, ...]:
    return record["teacher"], record["seed"], record["init"], record["size"]


def markdown(results: dict[str, Any]) -> str:
    """The page: how it was made, the answers against their goals, a table for each regime."""
    answers = results["answers"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    parts = [
        "# spansearch and its peers",
        f"`{results['command']}`\n\n{results['date']}; {settings}; {versions}.",
        "Every choice is made on validation; the figures below are of the test split.",
        "## Divergence over the best peer's",
        "The best peer is the one of the least test divergence: the hardest to compare with. Geometric mean "
        "over seeds, in brackets the least and the largest. Behind it our accuracy minus the largest of any "
        "peer's, for the seed where that is least. The closed form alone, without a gradient step, is held "
        "against peers with the whole of the compute.",
        _ratios(answers),
        "## Accuracy without fine-tuning",
        "Ours over the teacher's, for the seed where that is least.",
        table(
            ["flops", "share kept", "goal"],
            [
                [f"{size}%", f"{share:.4f}", f">= {KEPT[size]}" if size in KEPT else "-"]
                for size, share in answers["kept"].items()
            ],
        ),
        "## Compute of a front",
        table(
            ["seed", "trials", "CPU seconds of the closed form"],
            [[str(r["seed"]), str(r["trials"]), f"{r['seconds']:.1f}"] for r in answers["fronts"]],
        ),
    ]
    for regime, title in TITLES.items():
        parts += [f"## {title}", _points(r for r in answers["points"] if r["init"] == regime)]
    if answers["failed"]:
        parts += ["## Not run", _failed(answers["failed"])]
    return "\n\n".join(parts) + "\n"


def _ratios(answers: dict[str, Any]) -> str:
    rows = []
    for question, sizes in answers["ratios"].items():
        for size, one in sizes.items():
            around = f" [{one['low']:.3g}, {one['high']:.3g}]" if one["seeds"] > 1 else ""
            goal = GOALS.get(question, {}).get(size)
            rows.append(
                [
                    question,
                    f"{size}%",
                    f"{one['mean']:.3g}{around}",
                    f"<= {goal:g}" if goal else "-",
                    f"{answers['gains'][question][size]:+.4f}",
                    ">= 0" if question in ("compute", "closed form") else "-",
                ]
            )
    return table(["regime", "flops", "ratio", "goal", "accuracy gained", "goal"], rows)


def _points(records: Iterable[Record]) -> str:
    rows = []
    for record in sorted(records, key=lambda r: (-r["size"], r["seed"], r["test"])):
        tuned = (
            f"{record['rate']:g}{', frozen norms' if record['frozen'] else ''}" if "rate" in record else "-"
        )
        rows.append(
            [
                f"{record['size']}%",
                str(record["seed"]),
                record["family"],
                record["variant"],
                tuned,
                f"{record['steps']} ({record['kept']} kept)" if "steps" in record else "-",
                f"{record['seconds']:.1f}",
                f"{100 * record['flops_ratio']:.1f}%",
                f"{record['validation']:.4g}",
                f"{record['test']:.4g}",
                f"{record['score']:.4f}",
            ]
        )
    heads = ["point", "seed", "method", "variant", "rate", "steps", "CPU s", "flops", "validation", "test"]
    return table([*heads, "accuracy"], rows)


def _failed(records: Sequence[Record]) -> str:
    rows = [
        [
            str(record["seed"]),
            str(record.get("family", record["kind"])),
            str(record.get("init", "-")),
            f"{record['size']}%" if "size" in record else "-",
            f"not run: {record['failed'].splitlines()[0][:300]}",
        ]
        for record in records
    ]
    return table(["seed", "method", "regime", "flops", "reason"], rows)
