"""Lines about progress: where they are printed."""

from __future__ import annotations

import logging

import pytest

from foveate.progress import Bar, in_words, say


@pytest.mark.parametrize(("level", "said"), [(logging.NOTSET, True), (logging.WARNING, False)])
def test_what_is_said_goes_to_stderr_unless_the_log_is_to_be_quiet(
    level: int, said: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("foveate"), "handlers", [])
    before = logging.getLogger("foveate").level
    logging.getLogger("foveate").setLevel(level)
    try:
        say("soon")
    finally:
        logging.getLogger("foveate").setLevel(before)
    assert capsys.readouterr().err == "soon\n" * said


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_bar_for_all_phases() -> None:
    clock = _Clock()
    bar = Bar("quantizing", show=False, clock=clock)
    assert bar.left is None
    assert bar.share == 0
    for number in bar.track("reading", range(10)):
        clock.now += 2.0
        if number == 0:  # as a user, who knows after the first piece
            bar.expect({"reading": 10.0, "rounding": 30.0})
        if number == 4:  # four of ten are done in eight seconds: its own pace counts, the rest as expected
            assert bar.share == pytest.approx(0.4 * 10 / 40)
            assert bar.left == pytest.approx(20 * 0.6 + 30)
    assert bar.spent == {"reading": 20.0}
    assert bar.left == pytest.approx(30)
    for _ in bar.track("rounding", ["a", "b"], sizes=[9.0, 1.0]):
        clock.now += 10.0
    assert bar.share == pytest.approx(1)
    assert bar.spent["rounding"] == 20.0
    assert bar.expected == 40


def test_work_that_is_interrupted_keeps_its_seconds() -> None:
    clock = _Clock()
    bar = Bar("quantizing", show=False, clock=clock)
    bar.expect({"reading": 4.0})
    items = bar.track("reading", range(4))
    for _ in range(3):
        next(items)
        clock.now += 1.0
    del items
    assert bar.spent == {"reading": 3.0}
    assert bar.share == pytest.approx(0.5)


def test_a_line_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    clock = _Clock()
    with caplog.at_level(logging.INFO, "foveate"):
        bar = Bar("quantizing", clock=clock)
        bar.expect({"reading": 40.0, "rounding": 200.0})
        for _ in bar.track("reading", range(8)):
            clock.now += 5.0
        bar.close()
    assert caplog.messages[0] == "quantizing: reading, 4 min left, 6 % done"
    assert len(caplog.messages) == 2


def test_words() -> None:
    assert [in_words(s) for s in (4.4, 99, 120, 5000, 7200)] == ["4 s", "99 s", "2 min", "83 min", "2.0 h"]
