"""What do the ridge rule and giving up fits cost a search, and what do they save?

    python studies/benchmarks/pruning.py --seeds 0 1 2 3 4

The rule prunes a student that is fitted by gradient before its fit, where a model is known that costs no more
and is better than the span's best linear student can be hoped to be improved (spansearch/search/prune.py).
Replay: all students of a teacher's exhaustive table (search.py) come up in random orders, and again with the
closed forms in front of the others, as a search tries them; the rule learns and audits as in a search. Lost
is what is on the table's front, would have been pruned and was not audited. Live: after every trial of the
search's live runs, which members of the table's front would the rule prune, were they proposed then? Lost are
those of them for which nothing as good and no dearer is known by then. Baseline: every proposal is fitted.

A fit that passes is looked at again after a quarter of its steps, and given up by the same rule, with the
linear student's divergence scaled by how the fit's held-out error compares with the linear student's by then.
Beside it, in replay: the ridge rule alone. Nothing is tuned. A seed is that of an order or of a live run.
Measures nothing that search.py has not measured: with the same --out folder both share their figures.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import common_options, measured, write_results
from benchmarks.fronts import front, volume
from benchmarks.live_runs import OURS
from benchmarks.pages import origin, share, table, verdict
from benchmarks.records import Record, provenance
from benchmarks.search import TRIALS, opened, run_jobs, table_of
from benchmarks.teachers import SMALL
from spansearch.fit import WATCHED
from spansearch.recipe import Splice
from spansearch.search import RidgeRule, audited

TARGET = 0.02
"""At most this share of the front may be lost."""

ORDERS = 20
AUDIT = ss.Search().audit
WAYS = {
    "random": (False, True),
    "closed forms first": (True, True),
    "random, ridge rule alone": (False, False),
    "closed forms first, ridge rule alone": (True, False),
}
"""Do closed forms come first, and may fits be given up?"""


def replayed(
    entries: Sequence[Record],
    seed: int,
    closed_first: bool,
    share_audited: float,
    gives_up: bool = True,
) -> Record:
    """The rule over all students of a table in one order.

    Args:
        gives_up: may fits under way be given up?

    Returns:
        Counts of the front's members and of those lost, of what was pruned and audited, and of audits that
        are on the front; the share of the front's area that is lost with what was pruned; CPU seconds of all
        fits and of those that were saved.
    """
    order = np.random.default_rng(seed).permutation(len(entries))
    ordered = [entries[k] for k in order]
    if closed_first:
        ordered.sort(key=lambda entry: entry["gradient"])
    members = {id(entry) for entry in front(entries)}
    rule, of_curves, known = RidgeRule(), RidgeRule(first=0.0), []
    said = {"members": len(members), "lost": 0, "pruned": 0, "audited": 0, "audited_on_front": 0}
    saved, fitted = 0.0, []
    for entry in ordered:
        linear, flops = entry["linear"], entry["flops"]
        by_then = _by_then(entry) if gives_up else None
        left = None  # of the fit, when it is pruned
        if linear is not None and rule.decide(flops, linear, known) is not None:
            left = 1.0
        elif by_then is not None and of_curves.decide(flops, by_then, known) is not None:
            left = 1 - WATCHED
        if left is not None:
            if not audited(splice_of(entry), seed, share_audited):
                said["pruned"] += 1
                said["lost"] += id(entry) in members
                saved += left * entry["seconds"]
                continue
            said["audited"] += 1
            said["audited_on_front"] += id(entry) in members
        fitted.append(entry)
        known.append((flops, entry["validation"]))
        if linear is not None:
            rule.learn(entry["validation"], linear)
        if by_then is not None:
            of_curves.learn(entry["validation"], by_then)
    return {
        **said,
        "area_lost": 1 - volume(fitted) / volume(entries),
        "rho": rule.rho,
        "fitting": sum(e["seconds"] for e in entries),
        "saved": saved,
    }


def _by_then(entry: Record) -> float | None:
    """The divergence that a fit's error after a quarter tells of: its span's linear student's, were the error
    of that one as low. None where a search would not ask either."""
    early, error = entry.get("early"), entry.get("linear_error")
    return entry["linear"] * early / error if early is not None and error else None


def lived(entries: Sequence[Record], run: Record) -> Record:
    """The rule in a live run.

    Returns:
        ``asked``: members of the front of the table, once after every trial; ``would_prune`` of these, and
        ``lost``; what was pruned and audited; seconds of fitting spent, and saved: those of the students of
        the table that are nearest in size to what was pruned, in the same span and of the same family.
    """
    trace = [one for one in run["trace"] if not one.get("duplicate")]
    members = front(entries)
    rule, of_curves, known = RidgeRule(), RidgeRule(first=0.0), []
    said = {"asked": 0, "would_prune": 0, "lost": 0}
    for one in trace:
        if "validation" in one:
            known.append((one["flops"], one["validation"]))
            if "linear_divergence" in one:
                rule.learn(one["validation"], one["linear_divergence"])
            if "expected" in one:
                of_curves.learn(one["validation"], one["expected"])
        for member in members:
            said["asked"] += 1
            if member["linear"] is None or not known:
                continue
            by_then = _by_then(member)
            decision = rule.decide(member["flops"], member["linear"], known)
            if decision is None and by_then is not None:
                decision = of_curves.decide(member["flops"], by_then, known)
            if decision is not None:
                best = min(d for flops, d in known if flops <= member["flops"])
                said["would_prune"] += 1
                said["lost"] += best > member["validation"]
    pruned = [one for one in trace if one["state"] == "pruned" and "rule" in one]
    tested = [one for one in trace if one.get("audited")]
    ours = {id(one) for one in front([one for one in trace if "validation" in one])}
    return {
        **said,
        "trials": len(trace),
        "pruned": len(pruned),
        "audited": len(tested),
        "audited_on_front": sum(id(one) in ours for one in tested),
        "rho": rule.rho,
        "spent": sum(one["fitting"] for one in trace),
        "saved": sum((1 - one["rule"].get("after", 0.0)) * _expected(entries, one) for one in pruned),
    }


def splice_of(entry: Record) -> Splice:
    return Splice(*entry["span"].split(" -> "), entry["family"], entry["size"], entry["init"])


def _expected(entries: Sequence[Record], one: Record) -> float:
    alike = [e for e in entries if all(e[field] == one[field] for field in ("span", "family", "init"))] or [
        e for e in entries if (e["family"], e["init"]) == (one["family"], one["init"])
    ]
    return min(alike, key=lambda e: abs(e["size"] - one["size"]))["seconds"] if alike else 0.0


def summarise(tables: dict[str, list[Record]], runs: dict[str, list[Record]], orders: int) -> dict[str, Any]:
    """By teacher: replays in random orders, in both ways, and the live runs."""
    answers = {}
    for name, entries in sorted(tables.items()):
        one = {
            way: _total([replayed(entries, seed, first, AUDIT, gives_up) for seed in range(orders)])
            for way, (first, gives_up) in WAYS.items()
        }
        if runs.get(name):
            one["live"] = _total([lived(entries, run) for run in runs[name]])
        answers[name] = one
    return answers


def _total(some: Sequence[Record]) -> dict[str, Any]:
    """Sums over orders or runs, and shares of them."""
    total: dict[str, Any] = {key: sum(one[key] for one in some) for key in some[0]}
    members = total.get("asked", total.get("members"))
    fitting = total["fitting"] if "fitting" in total else total["spent"] + total["saved"]
    return {
        **total,
        "rho": total["rho"] / len(some),
        "of": len(some),
        "lost_share": total["lost"] / members,
        "saved_share": total["saved"] / fitting if fitting else 0.0,
    }


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    rows = [
        [
            name,
            way,
            str(one["of"]),
            share(one["lost_share"]),
            f"<= {share(TARGET)}",
            verdict(one["lost_share"] <= TARGET),
            f"{one['lost']} of {one.get('asked', one.get('members'))}",
            f"{one['area_lost'] / one['of']:.1e}" if "area_lost" in one else "-",
            share(one["saved_share"]),
            f"{one['saved'] / one['of']:.1f} s",
            f"{one['pruned'] / one['of']:.1f}",
            f"{one['audited'] / one['of']:.1f}",
            str(one["audited_on_front"]),
            f"{one['rho']:.2f}",
        ]
        for name, ways in results["answers"].items()
        for way, one in ways.items()
    ]
    heads = [
        "teacher",
        "order",
        "orders or runs",
        "front lost",
        "target",
        "",
        "members",
        "area",
        "fitting saved",
    ]
    heads += ["a run", "pruned", "audited", "audits on the front", "rho at the end"]
    parts = [
        "# The ridge rule and giving up fits: what they lose and what they save",
        origin(results),
        "Share of the members of the exhaustive table's front that the rules lost, over all orders or runs. "
        "`random` and `closed forms first`: the table's students come up one after the other, each member "
        "counts once in every order. Fits that pass the ridge rule are given up after a quarter of their "
        "steps where their error by then is too high, but where something else is said. "
        "`live`: runs of the search; every member counts once after every trial. "
        "`area`: by how much less the front of what was fitted dominates than that of all, in the mean. "
        "`fitting saved`: share of the seconds of fitting. Pruned and audited: in the mean; "
        f"{share(AUDIT)} of what the rule prunes is fitted anyway, as in a search. rho is learnt, never set.",
        table(heads, rows),
    ]
    return "\n\n".join(parts) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@common_options("pruning", teachers=tuple(SMALL), seeds=(0, 1, 2, 3, 4))
@click.option("--trials", type=click.IntRange(1), default=TRIALS, help="Of a live run.")
@click.option("--orders", type=click.IntRange(1), default=ORDERS, help="Of a table's students.")
def main(
    chosen: tuple[str, ...],
    seeds: tuple[int, ...],
    trials: int,
    orders: int,
    out: Path,
    cache: Path,
    threads: int,
) -> None:
    """Count what the ridge rule loses and saves."""
    torch.set_num_threads(threads)
    tables: dict[str, list[Record]] = {}
    runs: dict[str, list[Record]] = {}
    for teacher in chosen:
        setting = opened(teacher, cache, out.with_name("search.json"))
        tables[teacher], rates = table_of(setting)
        jobs = run_jobs(setting, tables[teacher], rates, (OURS,), seeds, trials)
        runs[teacher] = measured(setting, jobs, "live runs")
        results = {
            **provenance(),
            "seeds": list(seeds),
            "orders": orders,
            "trials": trials,
            "answers": summarise(tables, runs, orders),
        }
        write_results(out, results, markdown(results))
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
