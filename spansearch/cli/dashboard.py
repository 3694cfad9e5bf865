"""spansearch dashboard: the study in optuna-dashboard."""

from __future__ import annotations

from pathlib import Path

import click

from spansearch.cli.options import directory_option, storage_option, study_argument
from spansearch.cli.terminal import output
from spansearch.dashboard import DashboardServer, require_dashboard
from spansearch.study import Study

PORT = 8080


@click.command(epilog="Example: spansearch dashboard runs/digits_cnn")
@study_argument
@directory_option
@storage_option
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free one."
)
def dashboard(study: Path, directory: Path | None, storage: str | None, port: int) -> None:
    """Open the study's storage in optuna-dashboard (spansearch[dashboard]), with notes on its front.

    It answers this machine alone. What is changed or deleted there is changed in the study itself.
    """
    require_dashboard()
    opened = Study.open(study, directory=directory, storage=storage)
    opened.annotate()
    try:
        server = DashboardServer(opened.optuna, port)
    except OSError as error:
        raise click.UsageError(
            f"The port {port} cannot be used ({error.strerror}). Give another one with --port, 0 for any."
        ) from error
    output.print(f"{server.url} shows {opened.task.name}; Ctrl-C ends it.")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        output.print("No longer served.")
