"""A storage that cannot be used says why and what to do, and never tells a password."""

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from spansearch.errors import SaveError, StudyError
from spansearch.store import (
    NoStudyError,
    Source,
    database,
    database_errors,
    find_study,
    open_storage,
    open_study,
    remember_source,
    source_of,
)
from spansearch.store.database import without_secrets
from spansearch.store.studies import differences

PRINT: dict[str, Any] = {"teacher": "abc", "search": {"seed": 0, "fit": {"steps": 5, "rates": [0.1]}}}


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_it_is_created_described_and_found_again(tmp_path: Path) -> None:
    directory = tmp_path / "odd ?{name}%#"
    study = open_study(None, directory, "one", PRINT)
    assert study.metric_names == ["loss", "flops"]
    assert [d.name for d in study.directions] == ["MINIMIZE", "MINIMIZE"]
    study.add_trial(optuna.trial.create_trial(values=[0.5, 3.0]))
    seen = [p.name for p in directory.iterdir() if not p.name.startswith(".")]
    assert [name for name in seen if not name.endswith(("-wal", "-shm"))] == ["study.db"]
    assert find_study(None, directory, "one").trials[0].values == [0.5, 3.0]
    assert len(open_study(None, directory, "one", PRINT).trials) == 1


def test_a_process_that_died_before_describing_its_study_does_no_harm(tmp_path: Path) -> None:
    optuna.create_study(study_name="one", storage=open_storage(None, tmp_path), directions=["minimize"] * 2)
    study = open_study(None, tmp_path, "one", PRINT)
    assert study.metric_names == ["loss", "flops"] and study.user_attrs["fingerprint"] == PRINT


def test_commits_are_written_ahead(tmp_path: Path) -> None:
    open_study(None, tmp_path, "one", PRINT)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_other_inputs_are_refused_field_by_field(tmp_path: Path) -> None:
    open_study(None, tmp_path, "one", PRINT)
    other = {"teacher": "abd", "search": {"seed": 0, "fit": {"steps": 6, "rates": [0.1]}, "new": 1}}
    with pytest.raises(
        StudyError, match=r"these differ: search\.fit\.steps, search\.new, teacher\."
    ) as error:
        open_study(None, tmp_path, "one", other)
    assert "--dir" in str(error.value) and "SEARCH in the study file, or Study(search=...)" in str(
        error.value
    )
    with pytest.raises(StudyError, match="these differ: teacher") as error:
        open_study(None, tmp_path, "one", {**PRINT, "teacher": "abd"})
    assert "SEARCH" not in str(error.value)
    with pytest.raises(StudyError, match=r"these differ: search\.seed\..*Its seed was 0: .*--seed"):
        open_study(None, tmp_path, "one", {**PRINT, "search": {**PRINT["search"], "seed": 5}})
    assert find_study(None, tmp_path, "one").user_attrs["fingerprint"] == PRINT


@pytest.mark.parametrize(
    ("then", "now", "word"), [(None, 2, "an older"), (1, 2, "an older"), (3, 2, "a newer")]
)
def test_what_another_version_made_is_refused_as_such(
    then: int | None, now: int, word: str, tmp_path: Path
) -> None:
    made = PRINT if then is None else {**PRINT, "format": then}
    open_study(None, tmp_path, "one", made)
    with pytest.raises(StudyError, match=f"was made by {word} version of spansearch") as error:
        open_study(None, tmp_path, "one", {**PRINT, "teacher": "abd", "format": now})
    assert "differ" not in str(error.value)
    assert find_study(None, tmp_path, "one").user_attrs["fingerprint"] == made


def test_differences() -> None:
    assert differences({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}}) == ["b.c"]
    assert differences({"a": 1}, {}) == ["a"]
    assert differences({"a": {"b": 1}}, {"a": 1}) == ["a"]
    assert differences(PRINT, PRINT) == []


def test_a_directory_of_another_study_is_refused_but_a_shared_storage_may_hold_several(
    tmp_path: Path,
) -> None:
    open_study(None, tmp_path, "one", PRINT)
    with pytest.raises(StudyError, match=r"holds another study: one\. .*--dir"):
        open_study(None, tmp_path, "two", PRINT)
    with pytest.raises(NoStudyError, match="holds another study: one"):
        find_study(None, tmp_path, "two")
    url = f"sqlite:///{tmp_path}/shared.db"
    for name in ("one", "two"):
        open_study(url, tmp_path, name, PRINT)
    assert find_study(url, tmp_path, "two").study_name == "two"


def test_one_study_of_a_shared_storage_is_run_in_one_directory_whatever_its_path(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    open_study(url, tmp_path / "a", "one", PRINT)
    open_study(url, tmp_path / "a", "one", PRINT)
    with pytest.raises(StudyError, match=rf"keeps its students in .*:{tmp_path}/a, and {tmp_path}/b is not"):
        open_study(url, tmp_path / "b", "one", PRINT)
    assert open_study(url, tmp_path / "b", "two", PRINT).study_name == "two"
    (tmp_path / "mounted").symlink_to(tmp_path / "a")
    assert open_study(url, tmp_path / "mounted", "one", PRINT).study_name == "one"


def test_no_study_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoStudyError, match=rf"No study in {tmp_path}/none\. .*spansearch run STUDY --dir"):
        find_study(None, Path("none"), "one")
    assert not (tmp_path / "none").exists()


def test_a_run_beside_the_study_file_is_named_where_another_directory_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "there" / "study.py"
    beside = file.parent / "runs" / "one"
    with pytest.raises(NoStudyError) as error:
        find_study(None, Path("runs/one"), "one", file)
    assert "beside the" not in str(error.value)
    open_study(None, beside, "one", PRINT)
    with pytest.raises(NoStudyError, match=f"one beside the study file: give --dir {beside} "):
        find_study(None, Path("runs/one"), "one", file)
    with pytest.raises(NoStudyError) as error:
        find_study(None, Path("runs/two"), "two", file)
    assert "beside the" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"not a database at all, but long enough to look at" * 40, b"SQLite format 3\0" + b"\xff" * 3000],
)
def test_a_file_that_is_no_database_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=r"study\.db cannot be used: .*(not a database|malformed)"):
        open_study(None, tmp_path, "one", PRINT)
    assert path.read_bytes() == content


def test_a_path_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "study.db").mkdir()
    with pytest.raises(StudyError, match=r"study\.db cannot be used: .*unable to open"):
        open_study(None, tmp_path, "one", PRINT)
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"Cannot create the run's directory .*file"):
        open_study(None, tmp_path / "file", "one", PRINT)
    with pytest.raises(StudyError, match="unable to open"):
        open_storage(f"sqlite:///{tmp_path}/none/study.db", tmp_path)


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
connection.execute("CREATE TABLE held (x)")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_database_locked_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_study(None, tmp_path, "one", PRINT)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "study.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match="is locked by another program"), database_errors(None, tmp_path):
            open_study(None, tmp_path, "one", PRINT).set_user_attr("a", 1)
        holder.communicate("")
    study = open_study(None, tmp_path, "one", PRINT)
    study.set_user_attr("a", 1)
    assert find_study(None, tmp_path, "one").user_attrs["a"] == 1


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(None, tmp_path, "one", PRINT)
    study.set_user_attr("before", 1)

    class Full(database._Connection):  # SQLite's own word for it, from its page limit
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.execute("PRAGMA max_page_count=1").close()  # never below what is there

    with monkeypatch.context() as patch:
        patch.setattr(database, "_Connection", Full)
        full = find_study(None, tmp_path, "one")
        with (
            pytest.raises(StudyError, match=r"The disk under .*study\.db is full\. .*intact"),
            database_errors(None, tmp_path),
        ):
            full.set_user_attr("big", "x" * 500_000)
    again = find_study(None, tmp_path, "one")
    assert again.user_attrs["before"] == 1 and "big" not in again.user_attrs
    again.set_user_attr("big", "x" * 500_000)


def test_a_schema_of_another_version_of_optuna(tmp_path: Path) -> None:
    open_study(None, tmp_path, "one", PRINT)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0'")
        connection.commit()
    with pytest.raises(StudyError, match=r"study\.db cannot be read: .*optuna"):
        find_study(None, tmp_path, "one")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://ann:hunter2@db.example/x", r"pip install 'spansearch\[postgres\]'|does not answer"),
        ("postgresql+asyncpg://ann:hunter2@db.example/spans?password=hunter2", "pip install asyncpg"),
        ("mysql://ann:hunter2@db.example/spans", "pip install mysqlclient"),
        ("nosuch://ann:hunter2@db.example/spans", "There is no driver for nosuch://"),
        ("hunter2", "no database URL"),
        ("postgresql://ann:hunter2@db.example:hunter2/spans", "no database URL"),
        ("postgresql://ann:hun/ter2@db.example/spans", "."),
    ],
)
def test_no_message_tells_the_password(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=message) as error:
        open_storage(url, tmp_path)
    assert "hunter2" not in str(error.value) and "ter2" not in str(error.value)


def test_a_failing_server_tells_no_password(tmp_path: Path) -> None:
    import sqlalchemy.exc

    url = "postgresql://ann:hun%2Fter2@db.example/spans?sslpassword=moresecret"
    with pytest.raises(StudyError) as error, database_errors(url, tmp_path):
        raise sqlalchemy.exc.OperationalError(
            "SELECT 1", {}, Exception("no entry for ann hun/ter2 moresecret")
        )
    text = str(error.value)
    assert "db.example" in text and "ann" in text
    assert "ter2" not in text and "moresecret" not in text


def test_errors_that_are_not_the_databases_pass(tmp_path: Path) -> None:
    for error in (RuntimeError("is at version 1"), ImportError("numpy"), KeyError("x")):
        with pytest.raises(type(error)) as got, database_errors(None, tmp_path):
            raise error
        assert got.value is error


def test_a_fault_of_the_database_is_told_from_an_interruption_of_its_library(tmp_path: Path) -> None:
    import sqlalchemy.exc

    fault = sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("disk I/O error"))
    state = sqlalchemy.exc.IllegalStateChangeError("close() is in progress")

    def raised(error: Exception, stopped: bool) -> StudyError:
        with pytest.raises(StudyError) as got, database_errors(None, tmp_path):
            try:
                if stopped:
                    raise KeyboardInterrupt
            finally:
                raise error
        return got.value

    assert isinstance(raised(fault, False), SaveError) and isinstance(raised(fault, True), SaveError)
    assert isinstance(raised(state, False), SaveError) and not isinstance(raised(state, True), SaveError)


def test_the_study_file_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("mine.py")
    file.write_text("")
    for source in (Source(file.absolute()), Source(file.absolute(), 3, "postgresql://ann@host/db")):
        remember_source(tmp_path, source)
        assert source_of(tmp_path) == source
    file.unlink()
    with pytest.raises(StudyError, match=r"was run from .*mine\.py, which is not there any more"):
        source_of(tmp_path)
    for content in (b"", b"[]", b'{"other": 1}', b'{"file": 3}', b"\xff"):
        (tmp_path / "study.json").write_bytes(content)
        with pytest.raises(
            StudyError, match=r"not say which study file.* is damaged.*Study\.open\(file, directory="
        ):
            source_of(tmp_path)
    (tmp_path / "study.json").unlink()
    with pytest.raises(StudyError, match=r"is not the directory of a run: neither study\.json nor study\.db"):
        source_of(tmp_path)
    (tmp_path / "study.db").write_bytes(b"")
    with pytest.raises(StudyError, match=r"not say which study file.* is missing"):
        source_of(tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:hunter2@host/db",
        "postgresql://ann@host/db?password=hunter2",
        "mysql://ann:hunter2@host/db?ssl=hunter2",
    ],
)
def test_no_password_is_written_down_and_it_is_asked_for(url: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("")
    remember_source(tmp_path, Source(file, 0, url))
    assert "hunter2" not in (tmp_path / "study.json").read_text()
    kept = source_of(tmp_path).storage
    assert kept is not None and "ann" in kept and "host/db" in kept
    with pytest.raises(StudyError, match=r"are not kept on disk.*--storage") as error:
        open_storage(kept, tmp_path)
    assert "hunter2" not in str(error.value)


def test_a_file_in_a_storage_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_secrets("sqlite:///own.db") == f"sqlite:///{tmp_path}/own.db"
    assert without_secrets(f"sqlite:///{tmp_path}/own.db") == f"sqlite:///{tmp_path}/own.db"
    for url in ("sqlite://", "sqlite:///:memory:", "postgresql://ann@host/db"):
        assert sqlalchemy.make_url(without_secrets(url)) == sqlalchemy.make_url(url)
    odd = tmp_path / "odd {name}%# é.db"
    kept = without_secrets(str(sqlalchemy.URL.create("sqlite", database=odd.name)))
    assert sqlalchemy.make_url(kept).database == str(odd)
