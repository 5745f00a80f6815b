"""Rich results of one call: shown as a notebook would, whatever tenant code makes of that."""

import sys

from sandboxd.sandboxes.exec_result import CLEAR_TYPE, DISPLAY_TYPE, MAX_RESULTS, Shown


def display(name: object, text: str, *, update: bool = False) -> dict[str, object]:
    return {DISPLAY_TYPE: {"id": name, "update": update}, "text/plain": text}


def test_an_update_takes_the_place_of_the_first_of_its_id():
    shown = Shown()
    for bundle in (display("a", "1"), {"text/plain": "2"}, display("a", "3"), display("a", "4", update=True)):
        shown.add(bundle)
    assert [item["text/plain"] for item in shown.results] == ["4", "2", "3"]


def test_an_update_of_nothing_is_shown_and_can_be_updated():
    shown = Shown()
    shown.add(display("a", "1", update=True))
    shown.add(display("a", "2", update=True))
    shown.add({CLEAR_TYPE: {"wait": False}})
    assert shown.results == []
    shown.add(display("a", "3", update=True))
    assert [item["text/plain"] for item in shown.results] == ["3"]


def test_ids_that_are_none_are_no_ids():
    shown = Shown()
    for name in (None, [], {}, 1, True):
        shown.add(display(name, "x", update=True))
    assert len(shown.results) == 5


def test_the_cost_of_an_update_does_not_grow_with_what_is_shown():
    """The daemon has one thread: 60,000 updates that each looked at all before stopped it for minutes."""
    shown = Shown()
    for number in range(20000):
        shown.add(display(str(number), "x", update=True))
    lines = 0

    def count(_frame: object, event: str, _argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        shown.add(display("another", "x", update=True))
        shown.add(display("19999", "y", update=True))
    finally:
        sys.settrace(before)
    assert lines < 100
    assert shown.results[19999]["text/plain"] == "y"


def test_there_is_an_end_to_results():
    shown = Shown()
    for _ in range(MAX_RESULTS + 10):
        shown.add({})
    assert len(shown.results) == MAX_RESULTS
