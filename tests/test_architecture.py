"""ARCHITECTURE.md tells the truth: its paths exist, its drawings are those of the code, its order is the tests'."""

import re
from enum import StrEnum
from pathlib import Path

import pytest
from drawing.lives import LIVES, draw, main, redraw, table_of
from test_layout import APPLICATION, LIBRARY

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PLACES = (ROOT / "p2pclaude", ROOT / "p2pclaude" / "hyperdht", ROOT)


def test_every_path_exists() -> None:
    paths = set(re.findall(r"(?<![\w/.])([a-z_]+(?:/[a-z_]+)*(?:\.py|/))(?![\w/])", TEXT))
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not any((place / path).exists() for place in PLACES)] == []


def test_the_drawings_are_those_of_the_code() -> None:
    assert main(["--check"]) == 0


@pytest.mark.parametrize("order", [APPLICATION, LIBRARY])
def test_the_order_of_the_folders_is_that_of_the_test(order: tuple[tuple[str, ...], ...]) -> None:
    rows = [[folder for folder in row if folder] for row in order]
    said = " < ".join(", ".join(row) for row in rows if row)
    assert said in TEXT


def test_it_is_three_pages_at_most() -> None:
    assert len(TEXT.splitlines()) <= 3 * 66


class Light(StrEnum):
    """The states of a lamp."""

    OFF = "off"
    ON = "on"
    BROKEN = "broken"


class Touch(StrEnum):
    """What happens to a lamp."""

    SWITCHED = "switched"
    DROPPED = "dropped"
    LOOKED_AT = "looked at"


LAMP = {
    (Light.OFF, Touch.SWITCHED): Light.ON,
    (Light.ON, Touch.SWITCHED): Light.OFF,
    (Light.ON, Touch.LOOKED_AT): Light.ON,
    (Light.OFF, Touch.DROPPED): Light.BROKEN,
    (Light.ON, Touch.DROPPED): Light.BROKEN,
}


def test_a_drawing_names_every_way() -> None:
    assert draw(LAMP).splitlines()[2:] == [
        "| **off** | switched: **on**; dropped: **broken** |",
        "| **on** | switched: **off**; dropped: **broken**; no change by looked at |",
        "| **broken** | nothing more |",
    ]


@pytest.mark.parametrize("mark", LIVES)
def test_every_row_of_a_table_is_drawn(mark: str) -> None:
    drawing = draw(table_of(mark))
    for (before, event), after in table_of(mark).items():
        (row,) = [line for line in drawing.splitlines() if line.startswith(f"| **{before}** |")]
        assert event in row and (f"**{after}**" in row or after is before)


def test_what_is_old_is_told_and_drawn_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marks = [f"<!-- life: {mark} -->\nold\n<!-- end: {mark} -->" for mark in LIVES]
    document = tmp_path / "ARCHITECTURE.md"
    document.write_text("\n".join(["before", *marks, "after"]))
    assert main(["--check"], document) == 1
    assert "run tests/draw" in capsys.readouterr().err
    assert "old" in document.read_text()
    assert main([], document) == 0
    assert main(["--check"], document) == 0
    text = document.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after") and redraw(text) == text


def test_a_document_without_a_mark_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "ARCHITECTURE.md"
    assert main([], document) == 1
    assert "No such file" in capsys.readouterr().err
    document.write_text("nothing")
    assert main([], document) == 1
    assert "lacks <!-- life: session -->" in capsys.readouterr().err
