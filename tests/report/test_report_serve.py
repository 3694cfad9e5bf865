"""The report served: to this machine alone, and new when something is."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from study_runs import new

import spansearch as ss
from spansearch.report import ReportServer, serve

pytestmark = pytest.mark.usefixtures("quiet")


@contextmanager
def served(read: Any) -> Iterator[ReportServer]:
    with ReportServer(read) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server: ReportServer, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def test_the_page_and_its_data(study: ss.Study) -> None:
    with served(study.report_data) as server:
        assert server.server_address[0] == "127.0.0.1"
        status, headers, page = get(server, "/")
        assert status == 200 and 'data-live="yes"' in page and headers["Cache-Control"] == "no-store"
        status, headers, body = get(server, "/data.json")
        assert status == 200 and json.loads(body)["study"] == study.report_data()["study"]
        assert get(server, "/data.json", **{"If-None-Match": headers["ETag"]})[0] == 304
        assert get(server, "/etc/passwd")[0] == 404


def test_pages_of_other_names_read_nothing(study: ss.Study) -> None:
    with served(study.report_data) as server:
        for host in ("evil.example", f"evil.example:{server.server_port}", ""):
            status, _, body = get(server, "/data.json", Host=host)
            assert status == 403 and study.task.name not in body
        assert get(server, "/data.json", Host=f"localhost:{server.server_port}")[0] == 200


def test_it_follows_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FRESH", 0.0)
    study = new(tmp_path)
    study.run(1)
    looking = new(tmp_path)  # as another process would
    with served(looking.report_data) as server:
        _, headers, body = get(server, "/data.json")
        assert len(json.loads(body)["trials"]) == 1
        study.run(3)
        status, again, body = get(server, "/data.json", **{"If-None-Match": headers["ETag"]})
        assert status == 200 and again["ETag"] != headers["ETag"] and len(json.loads(body)["trials"]) == 3


def test_one_reading_serves_all_who_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FRESH", 60.0)
    count = []
    with served(lambda: count.append(1) or {"study": "x"}) as server:
        threads = [threading.Thread(target=get, args=(server, "/data.json")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(count) == 1


def test_what_is_wrong_is_said() -> None:
    def read() -> dict[str, Any]:
        raise ss.StudyError("The disk is gone.")

    with served(read) as server:
        status, _, body = get(server, "/data.json")
        assert status == 503 and "The disk is gone." in body
