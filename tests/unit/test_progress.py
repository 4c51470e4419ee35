from __future__ import annotations

import pytest

from everest_ds import progress
from everest_ds.progress import Progress, format_duration, with_progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (90061, "1d01h"), (-5, "0s")],
)
def test_duration_is_readable(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_progress(range(100), 100)) == list(range(100))
    assert capsys.readouterr().out == ""


def test_long_work_prints_now_and_then_and_at_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = Progress(8, "scored")
    for done in (2, 4, 6, 8):
        shown.show(done)
    assert capsys.readouterr().out.splitlines() == [
        "scored 4/8 videos  0.3 videos/s  ETA 12s",
        "scored 8/8 videos  0.6 videos/s  ETA 0s",
    ]
