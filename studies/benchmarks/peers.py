"""How far are the networks that spansearch finds from their teacher, against those of other tools?

    pip install -c constraints.txt -e ".[peers]"
    python studies/benchmarks/peers.py --seeds 0 1 2

On the digits CNN, at 75, 50 and 25% of its flops (a model may cost 1% of the teacher's more, and as little
as it has to): same data, same measures (divergence from the teacher and accuracy on the test split), same
counter of flops, one run. The networks are

- spansearch: of the front of one study of closed forms, no gradient step, the member of least divergence;
- torch-pruning: importances of magnitude, Taylor and batch-norm scales, ranked by layer and over all layers,
  in one step and in five (peer_torch_pruning.py);
- modelopt fastnas: widths in multiples of 8 and of 4 (peer_modelopt.py);
- thin from scratch: the teacher's architecture with fewer features, 4 or 2 blocks a stage, a random start;
- block dropping: residual blocks of equal shape left out, greedily.

In three regimes: without fine-tuning ("plain"); with --steps of distillation for every point of every method
("steps"); and with the same CPU seconds for the three points of every method together, for pruning and
distillation ("compute"). These are what spansearch's study took and --polish times as much, in which its own
networks are distilled. For every method and point alike, distillation is by Adam with batches of 64
calibration examples and a cosine schedule, and what is better on validation is kept, the network before it or
after it. The variant, the learning rate (1e-4 to 1e-2) and whether batch norms keep their statistics are
tuned by a short range test in three rounds (peer_runs.py), which comes on top of the budget; so does finding
the ratio at which Torch-Pruning meets a point. Validation decides everything and test nothing. What several
points share, the front, FastNAS's map, the order in which blocks go, is split evenly over the points.

The last four are the baselines. A seed is that of the split, the teacher, the search, the random start and
the order of the batches. Steps give the same figures again, seconds do not quite. Every figure is written
down once it is measured: the same command goes on where it was. A method that fails is in the page with its
reason.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the teachers' study files

import spansearch as ss
from benchmarks.command import RESULTS, Several, write_results
from benchmarks.peer_methods import BlockDropping, FromScratch, Method, Ours
from benchmarks.peer_runs import REGIMES, Race
from benchmarks.peers_report import markdown, summarise
from benchmarks.records import Record, Records, provenance
from benchmarks.setting import Setting
from benchmarks.teachers import task
from spansearch.cli.terminal import progress_bar

TEACHER = "cnn"

FAMILIES = ("identity", "ridge", "lowrank", "separable", "random_features", "truncated", "thin")
"""Those without a gradient step."""

PEERS = ("torch-pruning", "modelopt", "scratch", "blocks")
PACKAGES = {"torch-pruning": "torch_pruning", "modelopt": "modelopt"}


class NotRun:
    """A peer that cannot be loaded here: every figure of it fails for that reason."""

    untrained = False

    def __init__(self, name: str, reason: Exception) -> None:
        self.name, self.reason = name, reason

    def variants(self) -> Sequence[str]:
        raise self.reason

    def prune(self, variant: str, target: float) -> Any:
        raise self.reason


def require_installed(names: Sequence[str]) -> None:
    """Raises ClickException where a peer's package is missing."""
    missing = [name for name in names if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name])]
    if missing:
        raise click.ClickException(
            f"not installed: {', '.join(missing)}. They are in the extra 'peers': "
            "pip install -c constraints.txt -e '.[peers]'. "
            "Or name others in --peers."
        )


def method(name: str, setting: Setting) -> Method:
    """A peer; its library is imported here and not before."""
    try:
        if name == "torch-pruning":
            from benchmarks.peer_torch_pruning import TorchPruning

            return TorchPruning(setting)
        if name == "modelopt":
            from benchmarks.peer_modelopt import FastNAS

            return FastNAS(setting)
    except Exception as error:  # installed, but not for this torch, or without something it needs
        return NotRun(name, error)
    return FromScratch(setting) if name == "scratch" else BlockDropping(setting)


def run(race: Race, regimes: Sequence[str]) -> list[Record]:
    """Every record of the race; what is not known yet is measured."""
    records = []
    with progress_bar() as bar:
        jobs = race.jobs(regimes)
        shown = bar.add_task(f"{race.setting.teacher}, seed {race.setting.seed}", total=len(jobs))
        for job in jobs:
            record = race.setting.carry_out(job)
            if "failed" in record:
                bar.console.print(f"{record.get('family', record['kind'])}: {record['failed']}")
            records.append(record)
            bar.advance(shown)
    return records


def write(out: Path, records: Sequence[Record], settings: dict[str, Any]) -> None:
    """The answers as JSON, and beside it as a page of Markdown."""
    results = {**provenance(), "settings": settings, "answers": summarise(records)}
    write_results(out, results, markdown(results))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--seeds", cls=Several, multiple=True, type=click.IntRange(0), default=(0, 1, 2))
@click.option("--peers", "names", cls=Several, multiple=True, type=click.Choice(PEERS), default=PEERS)
@click.option("--regimes", cls=Several, multiple=True, type=click.Choice(REGIMES), default=REGIMES)
@click.option("--trials", type=click.IntRange(1), default=60, help="Of spansearch's study.")
@click.option("--steps", type=click.IntRange(1), default=600, help="Of distillation, in that regime.")
@click.option(
    "--polish",
    type=click.FloatRange(0),
    default=2.0,
    help="CPU seconds of our distillation in those of our front; with 2 the front is a third.",
)
@click.option(
    "--grant",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Share of the compute that anyone gets; below 1 only to try the command out.",
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "peers.json")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path("runs/benchmarks"), help="For teachers."
)
@click.option("--threads", type=click.IntRange(1), default=1, help="Of torch.")
def main(
    seeds: tuple[int, ...],
    names: tuple[str, ...],
    regimes: tuple[str, ...],
    trials: int,
    steps: int,
    polish: float,
    grant: float,
    out: Path,
    cache: Path,
    threads: int,
) -> None:
    """Measure spansearch and its peers on the benchmark's CNN."""
    require_installed(names)
    torch.set_num_threads(threads)
    records = Records(out.with_suffix(".jsonl"))
    settings = {"seeds": list(seeds), "trials": trials, "steps": steps, "polish": polish, "grant": grant}
    wanted: list[Record] = []
    for seed in seeds:
        search = ss.Search(families=FAMILIES, seed=seed)
        directory = cache / f"peers_{TEACHER}_seed{seed}"
        setting = Setting(TEACHER, seed, task(TEACHER, seed, cache), records, directory, search)
        race = Race(
            setting, Ours(setting, trials), [method(name, setting) for name in names], steps, polish, grant
        )
        wanted += [*run(race, regimes), setting.about()]
        records.add(wanted[-1])
        write(out, wanted, settings)
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
