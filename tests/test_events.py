"""The log of a run: a line for each event, whatever happened to the one before."""

from pathlib import Path

from spansearch.events import FILE, Events, read_events


def told(directory: Path) -> list[int]:
    return [event["number"] for _, event in read_events(directory)]


def test_a_torn_line_takes_no_other_with_it(tmp_path: Path) -> None:
    events = Events(tmp_path, "a")
    events.say("trial", number=0)
    whole = (tmp_path / FILE).read_bytes()
    with (tmp_path / FILE).open("ab") as file:
        file.write(whole[: len(whole) // 2])  # the disk was full
    assert told(tmp_path) == [0]
    events.say("trial", number=1)
    Events(tmp_path, "b").say("trial", number=2)
    assert told(tmp_path) == [0, 1, 2]
    assert (tmp_path / FILE).read_bytes().count(b"\n") == 4


def test_where_it_cannot_be_written_nothing_stops(tmp_path: Path) -> None:
    Events(tmp_path / "none", "a").say("trial", number=0)
    Events(None, "a").say("trial", number=0)
    assert told(tmp_path) == [] and list(tmp_path.iterdir()) == []
