"""What the shipped studies came to: the member at each share of the flops, a page each, one table of all."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.pages import share, table, verdict
from spansearch.cli.terminal import number

SHARES = (0.75, 0.7, 0.5, 0.25, 0.1)
"""Of the teacher's flops."""
BEGIN = "<!-- results: made by `python studies/benchmarks shipped --table` -->"
END = "<!-- end of results -->"


@dataclass(frozen=True)
class Shipped:
    """A study as the table shows it.

    Attributes:
        what: the network and its data.
        unit: of a loss.
        loss: (score drop, the teacher's score) -> the loss in that unit.
        targets: the most that may be lost, by share of the flops.
    """

    what: str
    unit: str
    loss: Callable[[float, float], float]
    targets: Mapping[float, float]


def _points(drop: float, of: float) -> float:
    return 100 * drop


def _decibels(drop: float, of: float) -> float:
    return drop


def _more_bits(drop: float, of: float) -> float:
    return 100 * drop / abs(of)


STUDIES = {
    "digits_cnn": Shipped("residual CNN, digits", "points", _points, {0.5: 0.5, 0.25: 1.0}),
    "digits_mlp": Shipped("nine-layer MLP, digits", "points", _points, {0.25: 0.5, 0.1: 1.5}),
    "photo_denoiser": Shipped("residual CNN, photographs", "dB", _decibels, {0.5: 0.15, 0.25: 0.40}),
    "stdlib_lm": Shipped("causal transformer, bytes", "% more bits", _more_bits, {0.7: 2.0, 0.5: 6.0}),
    "vision_transformer": Shipped("vision transformer, digits", "points", _points, {0.5: 1.0}),
}


def summarise(name: str, made: dict[str, Any]) -> dict[str, Any]:
    """A run without its front: what it took, and the member at each share."""
    found = made["found"]
    return {
        "preset": made["preset"],
        "command": made["command"],
        "date": made["date"],
        "wall_s": made["wall_s"],
        "seconds": found["seconds"]["total"],
        "trials": found["trials"],
        "at": _members(name, found["front"], found["teacher"]),
        "closed_form_at": _members(name, made["closed_form"], found["teacher"]),
    }


def _members(name: str, front: Sequence[dict[str, Any]], teacher: dict[str, Any]) -> dict[str, Any]:
    return {str(size): _at(name, front, teacher, size) for size in SHARES}


def _at(name: str, front: Sequence[dict[str, Any]], teacher: dict[str, Any], size: float) -> Any:
    """The best by validation of the members that cost no more; None where there is none."""
    cheap = [member for member in front if member["flops_ratio"] <= size]
    if not cheap:
        return None
    best = min(cheap, key=lambda member: (max(0.0, member["score_drop"]), member["divergence"]))
    loss, of, test = STUDIES[name].loss, teacher["test_score"], best["test"]
    return {
        "trial": best["trial"],
        "flops_ratio": best["flops_ratio"],
        "lost": loss(test["score_drop"], of),
        "ci95": test["ci95"] and [loss(end, of) for end in test["ci95"]],
        "divergence": test["divergence"],
        "gradient": best["gradient"],
    }


def markdown(results: dict[str, Any]) -> str:
    """The page of one study."""
    name, found, study = results["study"], results["found"], STUDIES[results["study"]]
    of, teacher = found["teacher"]["test_score"], found["teacher"]
    versions = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    runs = [
        [
            one["preset"],
            f"`{one['command']}`",
            f"{one['wall_s']:.0f} s",
            f"{one['seconds']:.0f} s",
            ", ".join(f"{count} {state}" for state, count in one["trials"].items() if count),
            *(_cell(one["at"][str(size)]) for size in SHARES),
        ]
        for one in results["runs"]
    ]
    targets = [
        [share(size), f"{most:g}", *_judged(results["runs"][-1], size, most)]
        for size, most in study.targets.items()
    ]
    members = [
        [
            str(member["trial"]),
            share(member["flops_ratio"]),
            f"{study.loss(member['score_drop'], abs(teacher['score'])):.3g}",
            _interval(member["test"], study, of),
            f"{member['test']['divergence']:.3g}",
            "yes" if member["gradient"] else "",
            "; ".join(_splice(one) for one in member["splices"]),
        ]
        for member in found["front"]
    ]
    return "\n\n".join(
        [
            f"# {name}: {study.what}",
            f"{results['date']}; seed {results['seed']}; {results['machine']['processor']}, "
            f"{results['machine']['cores']} cores; {versions}.",
            f"The teacher: {number(teacher['flops'])} flops an example, {number(teacher['params'])} "
            f"parameters, score {of:.4f} on test. Losses are in {study.unit}, on the test split; behind a "
            "run the best member by validation at no more than so many flops. A run's wall time is that of "
            "its command, the teacher trained before; its seconds are those of the study over all its runs.",
            table(
                ["preset", "command", "wall", "study", "trials", *(share(size) for size in SHARES)],
                runs,
            ),
            "## Targets",
            table(["share of the flops", "at most", "lost", "", "closed form alone", ""], targets),
            "## The front",
            f"![score drop by share of the flops]({name}.svg)",
            f"Families in its members: {_families(found['front'])}. Of the members that were polished, "
            f"validation confirmed {results['polishes']['kept']} of {results['polishes']['tried']}.",
            table(
                ["trial", "flops", "lost on validation", "lost on test", "divergence", "gradient", "splices"],
                members,
            ),
            "",
        ]
    )


def _families(front: Sequence[dict[str, Any]]) -> str:
    names = Counter(splice["family"] for member in front for splice in member["splices"])
    return ", ".join(f"{name} {count}" for name, count in names.most_common())


def _judged(run: dict[str, Any], size: float, most: float) -> list[str]:
    cells = []
    for kind in ("at", "closed_form_at"):
        member = run[kind][str(size)]
        cells += [_cell(member), verdict(member is not None and member["lost"] <= most)]
    return cells


def _cell(member: dict[str, Any] | None) -> str:
    if member is None:
        return "-"
    interval = "" if member["ci95"] is None else " [{:.2g}, {:.2g}]".format(*member["ci95"])
    return f"{_number(member['lost'])}{interval}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.005 else "0"


def _interval(test: dict[str, Any], study: Shipped, of: float) -> str:
    ends = test["ci95"] and [study.loss(end, of) for end in test["ci95"]]
    return _cell({"lost": study.loss(test["score_drop"], of), "ci95": ends})


def _splice(one: dict[str, Any]) -> str:
    size = f" {one['size']}" if one["size"] else ""
    return f"{one['start']} -> {one['stop']}: {one['family']}{size}"


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """The table of README.md, a row a study."""
    rows = []
    for one in results:
        study, run, teacher = STUDIES[one["study"]], one["runs"][-1], one["found"]["teacher"]
        rows.append(
            [
                f"[{one['study']}](studies/results/{one['study']}.md)",
                f"{study.what}, {number(teacher['flops'])} flops",
                f"{teacher['test_score']:.4g}",
                study.unit,
                *(_cell(run["at"][str(size)]) for size in SHARES if size != 0.75),
                _minutes(one["runs"]),
            ]
        )
    heads = ["study", "network and data", "test score", "lost, in", *(f"{size:.0%}" for size in SHARES[1:])]
    return table([*heads, "minutes"], rows)


def _minutes(runs: Sequence[dict[str, Any]]) -> str:
    """Of each preset: its command's, or those of the study over all its runs where it continued others."""
    return ", ".join(f"{one['preset']} {max(one['wall_s'], one['seconds']) / 60:.1f}" for one in runs)


def with_table(text: str, results: Sequence[dict[str, Any]]) -> str:
    """A page with the table between its markers.

    Raises:
        ValueError: it has not both of them, once and in order.
    """
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended or BEGIN in after or END in after:
        raise ValueError(f"The page must hold {BEGIN!r} and behind it {END!r}, each once.")
    return f"{before}{BEGIN}\n\n{results_table(results)}\n\n{END}{after}"
