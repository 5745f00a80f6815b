"""Times and sizes as a person reads them."""

from e80_cli.amounts import hours, moment, size, span


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_450_000, 999_960, 2e9, 3e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.4 MB",
        "1.0 MB",
        "2.0 GB",
        "3.0 TB",
    ]


def test_times() -> None:
    assert [hours(s) for s in (0, 12.54, 60, 309, 3599.9, 11_100)] == [
        "0.0s",
        "12.5s",
        "1m00s",
        "5m09s",
        "1h00m",
        "3h05m",
    ]
    assert [span(s) for s in (-1, 59, 60, 7200, 200_000)] == ["0s", "59s", "1m", "2h", "2d"]
    assert moment(None) == "-"
    assert len(moment(0)) == 19
