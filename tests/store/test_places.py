"""Students in a bucket of an S3-compatible store: as in a directory, for all machines that reach it."""

import logging
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tasks
import torch
from study_runs import TOTAL, new, table

import spansearch as ss
from spansearch import patience
from spansearch.errors import SaveError, ServerAwayError
from spansearch.store import StudentFiles
from spansearch.store.places import Bucket, MissingError

pytestmark = pytest.mark.usefixtures("quiet")

KEYS = {
    "AWS_ACCESS_KEY_ID": "anyone",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


SERVE = """
import sys
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import main
s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket("students", "us-east-1")
main(["-p", sys.argv[1]])
"""


class Server:
    """An S3-compatible server that can be stopped, and forgets everything then."""

    def __init__(self) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while True:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            assert self.process.poll() is None and time.monotonic() < until
            time.sleep(0.1)

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    made = Server()
    for name, value in {**KEYS, "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{made.port}"}.items():
        monkeypatch.setenv(name, value)
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize(
    "url",
    [
        "s3:",
        "s3://",
        "s3://B",
        "gs://students",
        "https://ann:hunter2@host/x",
        "s3://a:hunter2/x@b",
        "s3://a?b",
    ],
)
def test_another_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ss.TaskError, match=r"s3://bucket/prefix; got") as refused:
        ss.Study(tasks.make(), directory=tmp_path, students=url)
    assert "hunter2" not in str(refused.value)


def test_what_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ss.TaskError, match=r"pip install 'spansearch\[s3\]'"):
        Bucket("s3://students/a")


@pytest.mark.slow
def test_students_come_back_from_a_bucket_and_damage_is_seen(server: Server) -> None:
    import boto3

    files = StudentFiles("s3://students/some/where/")
    state = {"w": torch.arange(3.0)}
    entry = files.save({"a": 1}, state)
    assert files.save({"a": 1}, state) == entry  # again
    assert torch.equal(files.load(entry)["w"], state["w"])
    assert pickle.loads(pickle.dumps(files.place)).read(entry["file"])  # it travels to a worker
    client = boto3.client("s3")
    keys = [one["Key"] for one in client.list_objects_v2(Bucket="students")["Contents"]]
    assert keys == [f"some/where/{entry['file']}"]
    client.put_object(Bucket="students", Key=keys[0], Body=b"other")
    with pytest.raises(ss.StudyError, match=r"s3://students/some/where/.* SHA-256 differs"):
        files.load(entry)
    client.delete_object(Bucket="students", Key=keys[0])
    with pytest.raises(ss.StudyError, match="is not there"):
        files.load(entry)
    with pytest.raises(MissingError):
        files.place.read("x")
    with pytest.raises(SaveError, match="the bucket has to exist") as error:
        StudentFiles("s3://nowhere").save({}, state)
    assert not isinstance(error.value, ServerAwayError) and "hunter2" not in str(error.value)
    server.stop()
    with pytest.raises(ServerAwayError, match="s3://students"):
        StudentFiles("s3://students").save({}, state)


@pytest.mark.slow
def test_a_study_whose_students_are_in_a_bucket(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FULL", 0.1)
    file, url = tasks.study_file(tmp_path / "study.py", "mlp"), "s3://students/run"
    storage = f"sqlite:///{tmp_path}/shared.db"

    def opened(directory: str, **more: Any) -> ss.Study:
        return ss.Study.open(file, directory=tmp_path / directory, storage=storage, **more)

    def stop(number: int, *_: Any) -> None:
        if number == 2:
            server.stop()
            threading.Timer(2.0, server.start).start()  # it has lost all students then

    with caplog.at_level(logging.INFO):
        assert opened("a", students=url).run(6, on_trial=stop) == "done"
    assert "paused: Students cannot be" in caplog.text and "the server answers again" in caplog.text
    # on another machine, as it were: the study knows where its students are, and what is lost is fitted again
    assert opened("b").run(TOTAL, workers=2) == "done"
    assert not (tmp_path / "a" / "students").exists() and not (tmp_path / "b" / "students").exists()
    front = opened("c").front()
    assert len(front) > 1 and all(member.load() is not None for member in front)
    with pytest.raises(
        ss.StudyError, match="keeps its students in s3://students/run, not in s3://students/x"
    ):
        opened("b", students="s3://students/x").run(TOTAL)


def test_a_study_that_was_begun_keeps_its_place(tmp_path: Path) -> None:
    pytest.importorskip("boto3")
    study = new(tmp_path)
    study.run(2)
    assert table(study)
    later = ss.Study(study.task, directory=tmp_path, search=study.search, students="s3://students/x")
    with pytest.raises(ss.StudyError, match=r"keeps its students in .*students, not in s3://students/x"):
        later.run(3)
