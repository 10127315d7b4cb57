"""Makes mutants of a module's source (pure).

A mutant is the module with one small fault: an operator flipped, a number off by one, a call left out. Some change
nothing that can be seen (equivalent mutants), so that no tests notice all of them.
"""

import ast
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

_COMPARE: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_ARITHMETIC: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
_QUIET: Final = {"log", "logger", "_log"}  # what is only said changes nothing

Change = Callable[[], Callable[[], None]]
"""Puts the fault into the tree, and returns what takes it out again."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fault can be put: its function, the statement around it, its line, and the change."""

    function: str
    statement: ast.stmt
    line: int
    kind: str
    change: Change


@dataclass(frozen=True, slots=True)
class Mutant:
    """A module's source with one fault in it: `before` and `after` are the first line of the statement."""

    line: int
    kind: str
    before: str
    after: str
    source: str


def make_mutants(source: str, count: int, seed: int) -> list[Mutant]:
    """Return up to `count` different mutants, drawn evenly over the functions; the same for the same seed.

    Those whose code is the same as the module's, or another mutant's, are left out.
    """
    tree = ast.parse(source)
    rng = random.Random(seed)
    codes = {_instructions(compile(ast.unparse(tree), "module", "exec"))}
    mutants: list[Mutant] = []
    for place in _evenly(list(places(tree)), rng):
        if len(mutants) == count:
            break
        before = ast.unparse(place.statement)
        undo = place.change()
        try:
            after, text = ast.unparse(ast.fix_missing_locations(place.statement)), ast.unparse(tree)
            code = _instructions(compile(text, "module", "exec"))
            if code not in codes:
                codes.add(code)
                first, second = _first_difference(before, after)
                mutants.append(Mutant(place.line, place.kind, first, second, text))
        finally:
            undo()
    return mutants


def _instructions(code: CodeType) -> tuple[object, ...]:
    """Give what code does, without the places in the source: `not x is y` and `x is not y` are one program."""
    # A constant's text and type: 1, 1.0 and True are equal.
    constants = [
        _instructions(each) if isinstance(each, CodeType) else (type(each), repr(each)) for each in code.co_consts
    ]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_name, code.co_code, code.co_exceptiontable, names, *constants


def _first_difference(before: str, after: str) -> tuple[str, str]:
    for first, second in zip(before.splitlines(), after.splitlines(), strict=False):
        if first != second:
            return first.strip(), second.strip()
    return before.splitlines()[0].strip(), after.splitlines()[0].strip()


def _evenly(found: list[Place], rng: random.Random) -> Iterator[Place]:
    """Yield places in a random order that goes round the functions."""
    by_function: dict[str, list[Place]] = defaultdict(list)
    for place in found:
        by_function[place.function].append(place)
    groups = list(by_function.values())
    for group in groups:
        rng.shuffle(group)
    while groups:
        rng.shuffle(groups)
        for group in groups:
            yield group.pop()
        groups = [group for group in groups if group]


def places(tree: ast.Module) -> Iterator[Place]:
    """Yield every place of a module where a fault can be put."""
    for function, statement in _statements(tree.body, ""):
        for kind, line, change in _faults(statement):
            yield Place(function, statement, line, kind, change)


def _statements(body: list[ast.stmt], function: str) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the statements of functions, the innermost ones by themselves, and the tables of the module.

    What else only declares is left out.
    """
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            if statement.name not in ("__repr__", "__str__"):
                yield from _statements(statement.body, f"{function}.{statement.name}")
        elif isinstance(statement, ast.ClassDef):
            yield from _statements(statement.body, f"{function}.{statement.name}")
        elif not function and isinstance(table := getattr(statement, "value", None), ast.Dict):
            yield f"table in line {table.lineno}", statement
        elif function and not _is_quiet(statement):
            yield function, statement
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, name, []), function)
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body, function)
            for case in getattr(statement, "cases", []):
                yield from _statements(case.body, function)


def _is_quiet(statement: ast.stmt) -> bool:
    """Tell whether a statement does nothing that a test should see: docstrings, assertions, logging.

    Nor an error's text: that it is raised is the matter of the condition above it.
    """
    if isinstance(statement, ast.Assert | ast.Raise | ast.Import | ast.ImportFrom | ast.Pass | ast.Global):
        return True
    if isinstance(statement, ast.Expr):
        value = statement.value.value if isinstance(statement.value, ast.Await) else statement.value
        if isinstance(value, ast.Constant):
            return True
        if isinstance(value, ast.Call):
            owner = value.func.value if isinstance(value.func, ast.Attribute) else value.func
            names = {getattr(part, "attr", getattr(part, "id", "")) for part in (owner, value.func)}
            says = bool(value.args) and all(isinstance(argument, ast.JoinedStr) for argument in value.args)
            return bool(names & _QUIET) or says  # an error's text, as in super().__init__
    return False


def _faults(statement: ast.stmt) -> Iterator[tuple[str, int, Change]]:
    if isinstance(table := getattr(statement, "value", None), ast.Dict):
        yield from _faults_of_table(table)
    yield from _faults_of_statement(statement)
    for node in _expressions(statement):
        line = getattr(node, "lineno", statement.lineno)
        for kind, change in _faults_of_expression(node):
            yield kind, line, change


def _expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """Walk a statement's own expressions: neither those of statements in it, nor annotations."""
    todo: list[ast.AST] = [case.guard for case in getattr(statement, "cases", []) if case.guard is not None]
    for name, value in ast.iter_fields(statement):
        if name in ("body", "orelse", "finalbody", "handlers", "cases", "annotation"):
            continue
        todo += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, ast.AST)]
    while todo:
        node = todo.pop(0)
        yield node
        if not isinstance(node, ast.JoinedStr):  # texts are for people
            todo += [child for child in ast.iter_child_nodes(node) if not _is_check(child)]


def _is_check(node: ast.AST) -> bool:
    """Tell whether a node is the `strict=True` of a zip: an assertion."""
    return isinstance(node, ast.keyword) and node.arg == "strict"


def _faults_of_table(table: ast.Dict) -> Iterator[tuple[str, int, Change]]:
    """Leave a row out, or give it what the one before leads to; a row may stand for many (`**{...}`)."""
    for index, (key, value) in enumerate(zip(table.keys, table.values, strict=True)):
        others = [*table.keys[:index], *table.keys[index + 1 :]], [*table.values[:index], *table.values[index + 1 :]]
        yield "row dropped", value.lineno, _set(table, "keys", others[0], "values", others[1])
        if key is not None and table.keys[index - 1] is not None:
            yield "another row's value", value.lineno, _set_item(table.values, index, table.values[index - 1])


def _faults_of_statement(statement: ast.stmt) -> Iterator[tuple[str, int, Change]]:
    line = statement.lineno
    if isinstance(statement, ast.If | ast.While):
        if not (isinstance(statement.test, ast.Constant)):
            yield "condition negated", line, _set(statement, "test", ast.UnaryOp(ast.Not(), statement.test))
    elif isinstance(statement, ast.Expr):
        value = statement.value.value if isinstance(statement.value, ast.Await) else statement.value
        if isinstance(value, ast.Call):
            yield "call dropped", line, _set(statement, "value", ast.Constant(None))
    elif isinstance(statement, ast.AugAssign):
        # Not `x += 0`: for what is no number that is an error, which any test notices.
        yield "assignment dropped", line, _become(statement, ast.Pass)
        if swap := _ARITHMETIC.get(type(statement.op)):
            yield "operator", line, _set(statement, "op", swap())
    elif isinstance(statement, ast.Return) and statement.value is not None:
        # Who asks for the truth takes None for False.
        if not (isinstance(statement.value, ast.Constant) and statement.value.value in (None, True, False)):
            yield "return None", line, _set(statement, "value", ast.Constant(None))
    elif isinstance(statement, ast.Break | ast.Continue):
        other = "continue" if isinstance(statement, ast.Break) else "break"
        yield other, line, _become(statement, ast.Continue if other == "continue" else ast.Break)


def _faults_of_expression(node: ast.AST) -> Iterator[tuple[str, Change]]:
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            yield "comparison", _set_item(node.ops, index, _COMPARE[type(operator)]())
    elif isinstance(node, ast.BinOp) and (swap := _ARITHMETIC.get(type(node.op))):
        if not any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right)):
            yield "operator", _set(node, "op", swap())
    elif isinstance(node, ast.BoolOp):
        yield "and/or", _set(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", _set(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
    elif isinstance(node, ast.Constant) and not isinstance(node.value, str):
        if isinstance(node.value, bool):
            yield "truth", _set(node, "value", not node.value)
        elif isinstance(node.value, int) or (isinstance(node.value, float) and node.value):  # 0.0 is "not yet"
            yield "off by one", _set(node, "value", node.value + 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
        yield "min/max", _set(node.func, "id", "max" if node.func.id == "min" else "min")


def _set(node: ast.AST, *changes: Any) -> Change:
    """Give the change that sets attributes: name, value, name, value ..."""
    pairs = list(zip(changes[::2], changes[1::2], strict=True))

    def change() -> Callable[[], None]:
        before = [(name, getattr(node, name)) for name, _ in pairs]
        for name, value in pairs:
            setattr(node, name, value)

        def undo() -> None:
            for name, value in before:
                setattr(node, name, value)

        return undo

    return change


def _set_item(items: list[Any], index: int, value: object) -> Change:
    def change() -> Callable[[], None]:
        before, items[index] = items[index], value

        def undo() -> None:
            items[index] = before

        return undo

    return change


def _become(statement: ast.stmt, kind: type[ast.stmt]) -> Change:
    """Give the change that makes a statement one of a kind that has no parts."""

    def change() -> Callable[[], None]:
        before = type(statement)
        statement.__class__ = kind

        def undo() -> None:
            statement.__class__ = before

        return undo

    return change
