from hypothesis import given
from hypothesis import strategies as st

from cluster.api.stops import StopCutter

SHORT = st.text("ab", max_size=6)


def show(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    cutter = StopCutter(stops)
    shown = "".join(cutter.push(piece) for piece in pieces)
    return shown + ("" if cutter.stopped else cutter.flush()), cutter.stopped


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.text("ab", max_size=24))
def test_text_fed_by_characters_ends_where_the_first_stop_string_is_complete(stops, text):
    shown, stopped = show(stops, list(text))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    assert stopped == bool(ends)
    if ends:
        first = text[: ends[0]]
        assert shown == first[: min(first.find(stop) for stop in stops if stop in first)]
    else:
        assert shown == text


@given(st.text("ab", min_size=1, max_size=4), st.lists(SHORT, max_size=8))
def test_one_stop_string_cuts_the_same_whatever_the_pieces(stop, pieces):
    text = "".join(pieces)
    assert show([stop], pieces) == (text.split(stop)[0], stop in text)


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.lists(SHORT, max_size=8))
def test_no_more_is_held_back_than_may_become_a_stop_string(stops, pieces):
    cutter, fed, shown = StopCutter(stops), "", ""
    for piece in pieces:
        fed += piece
        shown += cutter.push(piece)
        if cutter.stopped:
            return
        held = fed[len(shown) :]
        assert fed.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_without_stop_strings_nothing_is_held_back():
    assert StopCutter(()).push("text") == "text"


def test_after_a_stop_string_nothing_is_shown():
    cutter = StopCutter(("x",))
    assert cutter.push("axb") == "a"
    assert cutter.push("c") == ""
    assert cutter.flush() == ""
