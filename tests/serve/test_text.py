"""Text of answers: however tokens are grouped, the text is the same and ends where a stop string begins."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from foveate.serve.calls.text import StopStrings, TextStream

_LETTERS = st.text(alphabet="abc", max_size=30)


def _first_complete(text: str, stops: list[str]) -> int | None:
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(ends)[1] if ends else None


@given(_LETTERS, st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 30)))
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    held = StopStrings(stops)
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    out = ""
    for begin, end in pairwise(places):
        piece = held.feed(text[begin:end])
        out += piece
        assert text.startswith(out)
    out += "" if held.found else held.end()
    place = _first_complete(text, stops)
    assert held.found == (place is not None)
    assert out == text[:place]


@given(text=st.text(max_size=20), cut=st.integers(0, 3))
def test_pieces_are_whole_characters(tokenizer: Any, text: str, cut: int) -> None:
    ids = tokenizer(text)["input_ids"]
    ids = ids[: len(ids) - cut]
    stream = TextStream(tokenizer, ())
    fed = [stream.feed(token) for token in ids]
    assert "\ufffd" not in "".join(fed) or "\ufffd" in text
    assert "".join(fed) + stream.end() == tokenizer.decode(ids, skip_special_tokens=True)
