"""spansearch report: what a study found as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from spansearch.cli.options import directory_option, storage_option, study_argument
from spansearch.cli.terminal import output, size
from spansearch.report import ReportServer
from spansearch.study import Study

PORT = 8321


@click.command(epilog="Example: spansearch report runs/digits_cnn --out report.html")
@study_argument
@directory_option
@storage_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write it [default: report.html in the run's directory].",
)
@click.option("--serve", is_flag=True, help="Serve it to this machine, up to date while a run goes on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="For --serve; 0: any."
)
def report(
    study: Path, directory: Path | None, storage: str | None, out: Path | None, serve: bool, port: int
) -> None:
    """Write the front, every trial and how the search went as one HTML page that needs no network.

    Loads no model and reads no data: figures on the test split are shown where `run` or `front` have measured
    them. Passwords of the storage are left out.
    """
    if serve and out is not None:
        raise click.UsageError("--serve writes no file: leave out --out.")
    opened = Study.open(study, directory=directory, storage=storage)
    if serve:
        _serve(opened, port)
        return
    path = opened.report(out)
    output.print(f"{path} ({size(path.stat().st_size)})")


def _serve(opened: Study, port: int) -> None:
    opened.report_data()  # what is wrong with the study is better said here than in a browser
    try:
        server = ReportServer(opened.report_data, port)
    except OSError as error:
        raise click.UsageError(
            f"The port {port} cannot be used ({error.strerror}). Give another one with --port, 0 for any."
        ) from error
    with server:
        output.print(f"{server.url} shows {opened.task.name}; Ctrl-C ends it.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            output.print("No longer served.")
