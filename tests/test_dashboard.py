"""optuna-dashboard on a study's storage: what it shows through its API, and what notes say."""

import json
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from study_runs import new

import spansearch as ss
from spansearch import dashboard
from spansearch.dashboard import DashboardServer
from spansearch.recipe import described

pytestmark = pytest.mark.usefixtures("quiet")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, whole: ss.Study) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(ss.StudyError, match=r"pip install 'spansearch\[dashboard\]'"):
        whole.annotate()


def get(server: DashboardServer, path: str) -> Any:
    with urllib.request.urlopen(server.url.split("/dashboard")[0] + path, timeout=30) as answer:
        body = answer.read().decode()
    return json.loads(body) if path.startswith("/api") else body


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_shows_measures_recipes_and_notes(tmp_path: Path) -> None:
    optuna_dashboard = pytest.importorskip("optuna_dashboard", reason="pip install '.[dashboard]'")
    study = new(tmp_path, seed=4)
    study.run(8)
    study.annotate()
    front = study.front()
    server = DashboardServer(study.optuna, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert server.url.startswith("http://127.0.0.1:")
        assert "<html" in get(server, "/dashboard").lower()
        (listed,) = get(server, "/api/studies")["study_summaries"]
        assert listed["study_name"] == "tiny_mlp"
        shown = get(server, f"/api/studies/{listed['study_id']}")
    finally:
        server.close()
        thread.join()
    assert shown["objective_names"] == ["loss", "flops"]
    assert shown["note"]["body"].startswith("**spansearch**") and "tiny_mlp" in shown["note"]["body"]
    trials = {trial["number"]: trial for trial in shown["trials"]}
    assert len(trials) == 8
    for member in front:
        trial = trials[member.trial]
        attributes = {one["key"]: one["value"] for one in trial["user_attrs"]}
        assert member.splices[0].family in attributes["recipe"]
        assert trial["values"][1] == member.measures.flops
        body = trial["note"]["body"]
        assert described(member.splices[0]) in body and f"study.member({member.trial}).export" in body
    others = [trial["note"]["body"] for n, trial in trials.items() if n not in {m.trial for m in front}]
    assert not any(others)
    # what somebody wrote stays; what we wrote follows the study
    optuna_dashboard.save_note(study.optuna, "my own words")
    study.annotate()
    assert optuna_dashboard.get_note(study.optuna) == "my own words"


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8080", None, "200 OK"),
        ("localhost:8080", "http://localhost:8080", "200 OK"),
        ("evil.example:8080", None, "403 Forbidden"),
        ("127.0.0.1:8080", "http://evil.example", "403 Forbidden"),
    ],
)
def test_pages_of_other_sites_are_refused(host: str, origin: str | None, status: str) -> None:
    def app(environ: dict, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"all trials"]

    said: list[str] = []
    environ = {"HTTP_HOST": host} | ({"HTTP_ORIGIN": origin} if origin else {})
    body = dashboard._for_us_alone(app)(environ, lambda status, headers: said.append(status))
    assert said == [status] and (body == [b"all trials"]) == (status == "200 OK")
