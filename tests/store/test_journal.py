"""The journal: whatever was cut off of it, it opens, and nothing else is lost."""

import logging
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from spansearch.errors import StudyError
from spansearch.store import find_study, open_storage, open_study

optuna.logging.set_verbosity(optuna.logging.WARNING)


def url(path: Path) -> str:
    return f"journal:///{path}"


def filled(path: Path, trials: int = 3) -> optuna.Study:
    study = open_study(url(path), path.parent, "one", {"teacher": "abc"})
    for number in range(trials):
        study.add_trial(create_trial(values=[number, 1.0], user_attrs={"text": "µ" * 20}))
    return study


def test_cut_at_every_byte_of_its_last_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "whole.journal"
    filled(path)
    data = path.read_bytes()
    last = data[:-1].rindex(b"\n") + 1
    cut = tmp_path / "cut.journal"
    for end in range(last, len(data) + 1):
        cut.write_bytes(data[:end])
        caplog.clear()
        study = open_study(url(cut), tmp_path, "one", {"teacher": "abc"})
        lost = end < len(data)
        assert len(study.trials) == 3 - lost
        assert (len(caplog.messages) == 1) == (last < end < len(data))
        study.add_trial(create_trial(values=[9.0, 1.0]))  # and goes on
        again = find_study(url(cut), tmp_path, "one").trials
        assert [t.values[0] for t in again] == ([0, 1, 9] if lost else [0, 1, 2, 9])
        assert [t.number for t in again] == list(range(len(again)))


def test_a_line_torn_by_another_process_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    study = filled(path)
    with path.open("ab") as other:
        other.write(b'{"op_code":4,"worker')  # killed here
    study.add_trial(create_trial(values=[9.0, 1.0]))
    assert [t.values[0] for t in study.trials] == [0, 1, 2, 9]
    assert [t.values[0] for t in find_study(url(path), tmp_path, "one").trials] == [0, 1, 2, 9]


@pytest.mark.parametrize(
    "content", [b"not a journal\n{}\n", b"[1, 2]\n", b"\xff\xfe\x00\n", b'{"op_code": 99}\n']
)
def test_what_is_no_journal_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    path.write_bytes(content)
    with pytest.raises(
        StudyError, match=r"a\.journal cannot be read: .*Restore it, or give another --storage"
    ):
        open_storage(url(path), tmp_path)
    assert path.read_bytes() == content


def test_it_is_not_created_by_who_only_looks(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"There is no journal:.*none\.journal"):
        find_study(url(tmp_path / "none.journal"), tmp_path, "one")
    with pytest.raises(StudyError, match="names no file"):
        open_storage("journal://", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    from spansearch.errors import DiskFullError

    study = filled(tmp_path / "a.journal")
    before = (tmp_path / "a.journal").read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError, match=r"Cannot write .*a\.journal: No space left"):
            study.add_trial(create_trial(values=[9.0, 1.0]))
    assert (tmp_path / "a.journal").read_bytes() == before
    study.add_trial(create_trial(values=[9.0, 1.0]))
    assert [t.state for t in find_study(url(tmp_path / "a.journal"), tmp_path, "one").trials] == [
        TrialState.COMPLETE
    ] * 4


def test_messages_of_a_repair_name_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.journal"
    filled(path)
    path.write_bytes(path.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        open_storage(url(path), tmp_path)
    assert str(path) in caplog.text
