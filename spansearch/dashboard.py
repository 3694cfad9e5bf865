"""The study in optuna-dashboard: the same storage, with notes that say what its numbers stand for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from importlib import import_module
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.study import Study as OptunaStudy

from spansearch.errors import StudyError
from spansearch.loopback import HOST, is_for_us
from spansearch.recipe import described
from spansearch.results import Front, Member

log = logging.getLogger("spansearch")


def require_dashboard() -> None:
    """Raise StudyError where the package of the extra is missing."""
    try:
        import_module("optuna_dashboard")  # of the extra
    except ImportError as error:
        raise StudyError(
            f"The dashboard is the package optuna-dashboard, which cannot be imported ({error}). Install the "
            "extra: pip install 'spansearch[dashboard]'. `spansearch report` needs nothing more."
        ) from error


def annotate(study: OptunaStudy, front: Front, command: Callable[[int], str]) -> None:
    """Write notes: of the study what is searched, of each member of its front the recipe and how it is taken
    away. Notes that somebody else wrote stay.

    Args:
        study: its storage.
        front: of it.
        command: exports the model of a trial.

    Raises:
        StudyError: optuna-dashboard is missing.
    """
    require_dashboard()
    for numbered, body in _notes(study, front, command):
        _write(numbered, body)


def _notes(
    study: OptunaStudy, front: Front, command: Callable[[int], str]
) -> Iterable[tuple[OptunaStudy | optuna.Trial, str]]:
    teacher, objectives = front.summary["teacher"], " and ".join(front.summary["objectives"])
    yield (
        study,
        f"{MARK}\n\nSmaller networks of `{front.summary['study']}`, by {objectives}: the loss is the score "
        "drop on validation, where equal with a trace of the divergence. The teacher: "
        f"{teacher.get('flops', 0):,} flops, {teacher.get('params', 0):,} parameters, score "
        f"{teacher.get('score', 0.0):.4g}. Of the trials the user attributes `recipe`, `measures` and "
        "`details` say all that is known; members of the front have notes.",
    )
    by_number = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    for member in front:
        trial = optuna.trial.Trial(study, by_number[member.trial]._trial_id)
        yield trial, _of_member(member, command(member.trial))


MARK = "**spansearch**"
"""What our notes begin with."""


def _of_member(member: Member, command: str) -> str:
    m = member.measures
    figures = f"{m.flops_ratio:.1%} of the flops, {m.params_ratio:.1%} of the parameters, score drop "
    figures += f"{m.score_drop:.4g}, divergence {m.divergence:.3g}"
    if member.test is not None:
        figures += f"; on test a score drop of {member.test['score_drop']:.4g}"
    recipe = "\n".join(f"* {described(one)}" for one in member.splices)
    polished = "\n\nPolished." if member.polished else ""
    return f"{MARK}: on the front. {figures}.\n\n{recipe}{polished}\n\n```\n{command}\n```"


def _write(of: OptunaStudy | optuna.Trial, body: str) -> None:
    import optuna_dashboard

    known = optuna_dashboard.get_note(of)
    if known != body and (not known or known.startswith(MARK)):
        optuna_dashboard.save_note(of, body)


class DashboardServer:
    """optuna-dashboard on this machine's own address.

    Args:
        study: whose storage it shows.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken. StudyError: optuna-dashboard is missing.
    """

    def __init__(self, study: OptunaStudy, port: int) -> None:
        require_dashboard()
        from optuna_dashboard import wsgi

        app = _for_us_alone(wsgi(study._storage))
        self._server = make_server(HOST, port, app, server_class=_Threaded, handler_class=_Quiet)
        self.url = f"http://{HOST}:{self._server.server_port}/dashboard/studies/{study._study_id}"

    def serve_forever(self) -> None:
        """Answer until KeyboardInterrupt, or ``close`` from another thread."""
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()


def _for_us_alone(app: Any) -> Any:
    """Trials can be deleted there: pages of other sites, under whatever name, are refused."""

    def guarded(environ: dict[str, Any], start_response: Any) -> Any:
        host, origin = environ.get("HTTP_HOST", ""), environ.get("HTTP_ORIGIN")
        if not is_for_us(host) or origin not in (None, f"http://{host}"):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"This dashboard is for this machine only.\n"]
        return app(environ, start_response)

    return guarded


class _Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        log.debug("dashboard: " + format, *args)
