"""Lines about progress: where they are printed."""

from __future__ import annotations

import logging

import pytest

from foveate.progress import say


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
