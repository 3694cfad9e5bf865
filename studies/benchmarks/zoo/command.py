"""Is every model examined, and does whatever is declared legal work?

    pip install -c constraints.txt -e ".[zoo]"
    python studies/benchmarks/zoo/command.py

The smallest members of the families of torchvision, timm and Hugging Face transformers, with random weights
and warmed batch norms, called as their users call them. Of each up to --spans spans are drawn, half of them
nested. A span passes where it survives its replay on other inputs (verify), a student with the right shape
can be spliced and reaches the output, takes a training step and goes through a strict state_dict round trip;
one for each model is exported by torch.export as well, if the model itself can be. A seed is that of the draw
and of the students. Nothing is tuned and there is no baseline: every failure is a bug, and is in the page.
"""

import gc
import hashlib
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import spansearch as ss
from benchmarks.command import RESULTS, Several, write_results
from benchmarks.records import Record, Records, provenance
from benchmarks.zoo.models import LIBRARIES, specimen
from benchmarks.zoo.probe import probe
from benchmarks.zoo.report import markdown, summarise
from spansearch.cli.terminal import progress_bar


def examined(library: str, name: str, spans: int, exports: int, seed: int) -> Record:
    """What is found on one model; a model that cannot be built, or whatever goes wrong, is an error."""
    try:
        return probe(specimen(library, name), spans, exports, seed)
    except Exception as error:
        return {"library": library, "name": name, "error": f"{type(error).__name__}: {error}"[:600]}


def code() -> str:
    """A hash of spansearch, the zoo and the libraries: figures of others are measured again."""
    files = [*Path(ss.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    said = [path.read_text() for path in sorted(files)] + [version(one) for one in LIBRARIES if has(one)]
    return hashlib.sha256("".join(said).encode()).hexdigest()[:16]


def has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--library",
    "libraries",
    cls=Several,
    multiple=True,
    type=click.Choice(list(LIBRARIES)),
    default=list(LIBRARIES),
)
@click.option("--spans", type=click.IntRange(1), default=20, help="Of a model.")
@click.option("--exports", type=click.IntRange(0), default=1, help="Of a model.")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "zoo.json")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of torch.")
def main(libraries: tuple[str, ...], spans: int, exports: int, seed: int, out: Path, threads: int) -> None:
    """Examine the zoo."""
    torch.set_num_threads(threads)
    records = Records(out.with_suffix(".jsonl"))
    made_by = f"{code()}-{spans}-{exports}"
    found: list[Record] = []
    chosen = [(library, name) for library in libraries for name in LIBRARIES[library][1]]
    with progress_bar() as bar:
        shown = bar.add_task("models", total=len(chosen))
        for library, name in chosen:
            names: dict[str, Any] = {"kind": "zoo", "teacher": f"{library}/{name}", "seed": seed}
            known = records.known(names, made_by)
            if known is None:
                known = {**names, **examined(library, name, spans, exports, seed), "made_by": made_by}
                records.add(known)
                gc.collect()
            found.append(known)
            bar.advance(shown)
    results = {**provenance(), "seeds": [seed], "spans": spans, "models": found}
    results["versions"] |= {library: version(library) for library in libraries if has(library)}
    results["answers"] = summarise(results["models"])
    write_results(out, results, markdown(results))
    click.echo(out.with_suffix(".md"))


if __name__ == "__main__":
    main()
