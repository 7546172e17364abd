"""The table of rooms in docs/architecture.md is that of the code."""

from __future__ import annotations

from rooms import PAGE, PICTURE, TABLE, picture, table


def test_the_table_of_rooms_is_that_of_the_code() -> None:
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == table(), "run `python tests/support/rooms.py`"


def test_the_picture_is_that_of_the_code() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run `python tests/support/rooms.py`"
