"""Numbers as they are shown."""

import pytest

from spansearch.cli.terminal import duration, number, share, size


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [
        (0, "0%"),
        (1e-9, "<0.001%"),
        (0.00001, "0.001%"),
        (0.0002, "0.02%"),
        (0.003, "0.3%"),
        (0.0094, "0.9%"),
        (0.0097, "1.0%"),
        (0.01, "1.0%"),
        (0.5432, "54.3%"),
        (1, "100.0%"),
        (1.25, "125.0%"),
    ],
)
def test_a_share_that_is_not_0_never_looks_like_it(ratio: float, shown: str) -> None:
    assert share(ratio) == shown


def test_a_number_has_a_unit() -> None:
    assert [number(n) for n in (12, 1234, 13.7e6, 2e9, 4.4e13)] == ["12", "1.23k", "13.7M", "2G", "44T"]
    assert [size(n) for n in (2048, 3 << 20, 5 << 40)] == ["2 KiB", "3 MiB", "5 TiB"]
    assert [duration(s) for s in (2e-6, 0.5, 90, 600, 86400)] == ["2 us", "500 ms", "90 s", "10 min", "24 h"]
