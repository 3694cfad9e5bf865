"""The page of Markdown about studies whose processes were killed."""

from typing import Any

from benchmarks.pages import table

TITLES = {"again": "One process at a time", "crowd": "Several at once", "paused": "Paused"}
FLAWS = ("lost", "stuck", "duplicates", "damaged")


def markdown(results: dict[str, Any]) -> str:
    """How it was made, and a table for each part."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        "# Studies whose processes are killed",
        f"`{results['command']}`\n\n{results['date']}; seed {results['seed']}; {versions}.",
        "`lost`: trials that were finished once and later were not, or came to something else; `stuck`: "
        "trials that nobody finished; `twice`: numbers used twice, or missing; `damaged`: students that do "
        "not open or do not match their hash; `differ`: trials that are not those of a run that was left "
        "alone, students' hashes included (of one process at a time). Targets: 0 each, and as many trials as "
        "were asked for.",
    ]
    for part, title in (
        ("again", "One process at a time"),
        ("crowd", "Several at once"),
        ("paused", "Paused"),
    ):
        runs = [run for run in results["runs"] if run["part"] == part]
        if runs:
            parts += [f"## {title}", table(_heads(), [_row(run) for run in runs])]
    kills = [run["kills"] for run in results["runs"] if run["part"] == "again"]
    if kills:
        moments = sorted({moment for one in kills for moment in one})
        said = ", ".join(f"{moment} {sum(one.get(moment, 0) for one in kills)}" for moment in moments)
        parts.append(f"Processes that died, by moment: {said}.")
    parts += _together([run for run in results["runs"] if run["part"] == "together"])
    parts += _long([run for run in results["runs"] if run["part"] == "long"])
    errors = [error for run in results["runs"] for error in run["errors"]]
    parts += ["## Errors", *(f"```\n{error}\n```" for error in errors)] if errors else []
    parts += [f"Left out: {name}: {why}" for name, why in results["left_out"].items()]
    return "\n\n".join(parts) + "\n"


def _heads() -> list[str]:
    return [
        "storage",
        "processes",
        "kills",
        "trials",
        "lost",
        "stuck",
        "twice",
        "damaged",
        "differ",
        "seconds",
    ]


def _row(run: dict[str, Any]) -> list[str]:
    differs = "-" if run["differs"] is None else str(len(run["differs"]))
    return [
        run["storage"],
        str(run.get("workers", 1 if run["part"] == "again" else 2)),
        str(sum(run["kills"].values())),
        f"{run['finished']} of {run['total']}",
        *(str(len(run[flaw])) for flaw in FLAWS),
        differs,
        f"{run['seconds']:.0f}",
    ]


def _together(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    rates = {run["workers"]: run["finished"] / run["seconds"] for run in runs}
    rows = []
    for run in runs:
        count = run["workers"]
        said = f"{rates[count] / rates[1]:.2f}" if 1 in rates else "-"
        target = ">= 1.7" if count == 2 else "-"
        locked = sum("is locked" in error for error in run["errors"])
        rows.append(
            [
                str(count),
                f"{run['finished']} of {run['total']}",
                f"{rates[count]:.2f}",
                said,
                target,
                str(locked),
            ]
        )
    text = (
        "Processes that start at once on one SQLite file, one thread each; seconds are from the first trial "
        "of any of them to the last."
    )
    heads = ["processes", "trials", "a second", "over one process", "target", "locked out (0)"]
    return ["## Together", text, table(heads, rows)]


def _long(runs: list[dict[str, Any]]) -> list[str]:
    rows = [
        [str(run["total"]), f"{run['resume']:.2f} s", "<= 5 s", f"{1000 * run['ask']:.0f} ms", "<= 100 ms"]
        for run in runs
    ]
    heads = ["trials", "to the first new trial", "target", "an ask (median)", "target"]
    return ["## A long study", table(heads, rows)] if rows else []
