"""Mutants: each differs from the module and from the others, is the same for the same seed, and changes code only."""

import ast
from pathlib import Path

import pytest

from mutation.mutants import make_mutants

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "p2pclaude").rglob("*.py"))

LAMP = '''"""A lamp."""

from __future__ import annotations

LIMIT = 3


def log(text: str) -> None:
    """Say something."""


def switch(times: int, name: str = "lamp") -> bool:
    """Tell whether it shines."""
    log(f"switched {times + 1} times")
    assert times >= 0
    if times > LIMIT and name:
        raise ValueError("it is broken" + "!")
    return times % 2 == 1
'''


def kinds(source: str) -> set[tuple[str, str]]:
    """Give kind and result of all mutants of a source."""
    return {(mutant.kind, mutant.after) for mutant in make_mutants(source, 1000, 1)}


def test_every_kind_of_fault() -> None:
    assert kinds(LAMP) == {
        ("comparison", "if times >= LIMIT and name:"),
        ("and/or", "if times > LIMIT or name:"),
        ("condition negated", "if not (times > LIMIT and name):"),
        ("operator", "return times // 2 == 1"),
        ("comparison", "return times % 2 != 1"),
        ("off by one", "return times % 3 == 1"),
        ("off by one", "return times % 2 == 2"),
        ("return None", "return None"),
    }


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("x.append(1)", {("call dropped", "None"), ("off by one", "x.append(2)")}),
        ("x += 1", {("assignment dropped", "pass"), ("operator", "x -= 1"), ("off by one", "x += 2")}),
        ("x = not x", {("not dropped", "x = not not x")}),
        ("x = min(x, y)", {("min/max", "x = max(x, y)")}),
        ("x = True", {("truth", "x = False")}),
        ("x = y[1:]", {("off by one", "x = y[2:]")}),
        ("x = y is None", {("comparison", "x = y is not None")}),
        ("x = y << z & w", {("operator", "x = y >> z & w"), ("operator", "x = y << z | w")}),
        ("x: int = y", set()),
        ("return None", set()),
        ("raise ValueError(1 + 2)", set()),
        ("self._log.warning('text', 1 + 2)", set()),
        ("self._log(1 + 2)", set()),
        ("self.log.write(1)", set()),
    ],
)
def test_faults_of_a_statement(body: str, expected: set[tuple[str, str]]) -> None:
    assert kinds(f"def f(x, y, z, w):\n    {body}\n") == expected


def test_rows_of_a_table_that_a_module_has() -> None:
    source = "TABLE = {1: 'a', 2: 'b', **{n: 'b' for n in (3, 4)}}\nLIMIT = 3\n"
    assert kinds(source) == {
        ("row dropped", "TABLE = {2: 'b', **{n: 'b' for n in (3, 4)}}"),
        ("row dropped", "TABLE = {1: 'a', **{n: 'b' for n in (3, 4)}}"),
        ("row dropped", "TABLE = {1: 'a', 2: 'b'}"),
        ("another row's value", "TABLE = {1: 'a', 2: 'a', **{n: 'b' for n in (3, 4)}}"),
    } | {
        ("off by one", f"TABLE = {table}")
        for table in (
            "{2: 'a', 2: 'b', **{n: 'b' for n in (3, 4)}}",
            "{1: 'a', 3: 'b', **{n: 'b' for n in (3, 4)}}",
            "{1: 'a', 2: 'b', **{n: 'b' for n in (4, 4)}}",
            "{1: 'a', 2: 'b', **{n: 'b' for n in (3, 5)}}",
        )
    }


def test_loops_and_branches_inside_each_other() -> None:
    source = "def f(x):\n    for i in x:\n        if i:\n            break\n        continue\n"
    assert {("break", "break"), ("continue", "continue"), ("condition negated", "if not i:")} == kinds(source)


def test_the_cases_of_a_match_are_statements() -> None:
    cases = "        case 1 if y:\n            assert x + 1\n        case _:\n            return x + y\n"
    expected = {("operator", "return x - y"), ("return None", "return None")}
    assert kinds(f"def f(x, y):\n    match x:\n{cases}") == expected


def test_two_texts_of_one_program_are_one_mutant() -> None:
    """The negated condition and the flipped comparison: the compiler makes one of them."""
    made = make_mutants("def f(x):\n    if x is None:\n        g()\n", 100, 1)
    assert len([mutant for mutant in made if mutant.before == "if x is None:"]) == 1


def test_the_same_seed_gives_the_same_mutants_and_another_seed_others() -> None:
    source = (ROOT / "p2pclaude" / "hyperdht" / "encoding.py").read_text()
    assert make_mutants(source, 10, 1) == make_mutants(source, 10, 1)
    assert make_mutants(source, 10, 1) != make_mutants(source, 10, 2)


def test_a_small_number_goes_round_the_functions() -> None:
    source = "".join(f"def f{i}(x):\n    return x + 1 + 2 + 3\n\n\n" for i in range(5))
    lines = sorted(mutant.line for mutant in make_mutants(source, 5, 1))
    assert lines == [2, 6, 10, 14, 18]


@pytest.mark.parametrize("module", MODULES[::6], ids=lambda path: path.stem)
def test_each_mutant_is_another_program_with_the_same_texts(module: Path) -> None:
    source = module.read_text()
    mutants = make_mutants(source, 15, 7)
    assert len({mutant.source for mutant in mutants}) == len(mutants)
    plain = ast.unparse(ast.parse(source))
    for mutant in mutants:
        assert mutant.source != plain and mutant.before != mutant.after
        assert _quiet_parts(mutant.source) == _quiet_parts(source)


def _quiet_parts(source: str) -> list[str]:
    """Give what no mutant may change: docstrings, assertions, annotations, imports."""
    parts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            parts.append(ast.get_docstring(node) or "")
        if isinstance(node, ast.Assert | ast.Import | ast.ImportFrom):
            parts.append(ast.unparse(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts.append(ast.unparse(node.args))
        if isinstance(node, ast.AnnAssign):
            parts.append(ast.unparse(node.annotation))
    return parts


def test_what_is_a_mark_or_an_assertion_stays() -> None:
    assert kinds("def f(self):\n    self.at = 0.0\n") == set()
    assert kinds("def f(x, y):\n    x = zip(x, y, strict=True)\n") == set()
    assert kinds("def f(self):\n    self.at = 1.5\n") == {("off by one", "self.at = 2.5")}
