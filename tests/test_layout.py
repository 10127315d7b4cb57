"""The source tree keeps its promises: directions of imports, two rings, sizes, docstrings, names, light start.

All of it is read from syntax trees, so that a module need not be importable to be judged.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from p2pclaude.hyperdht import KeyPair
from p2pclaude.protocol.pairing import Pairing, format_url

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "p2pclaude"
TOOLS = ("daemon", "send", "tail", "ls", "stop", "approve", "ping", "node")

MAX_FUNCTION_LINES = 60  # unless a comment `# long: ...` at its head gives the reason

# The order of the folders, lowest first: a module imports from lower rows and from its own folder, nothing else. What
# lies right in the package counts as the folder "". `hyperdht` is what the library exports, and its own order follows.
APPLICATION = (("",), ("hyperdht",), ("protocol", "host"), ("sessions",), ("client", "daemon", "node"), ("cli",))
LIBRARY = (("",), ("udx",), ("net",), ("rpc",), ("node", "secure"), ("storage", "relay"), ("peer",), ("dht",))

SHARED_BY_TOOLS = {"common", "filters", "lean", "network", "stdin", "text"}  # no commands, but what commands share
PURE = "p2pclaude.protocol."  # knows neither network nor clock

# A module of the library says in its docstring which ring it is in; these are pure whatever they say.
RING_1 = {
    "constants", "errors", "encoding", "crypto", "rpc.messages", "peer.setup_messages", "secure.noise",
    "secure.secretstream", "node.routing", "node.nat", "storage.records", "udx",
}  # fmt: skip
WORLD = {  # what reaches for the clock, the network, the system or other threads
    "asyncio", "concurrent", "datetime", "ifaddr", "io", "multiprocessing", "os", "pathlib", "secrets", "select",
    "selectors", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time", "uuid",
}  # fmt: skip
HARMLESS = {("socket", name) for name in ("AF_INET", "AF_INET6", "inet_aton", "inet_ntoa", "inet_ntop", "inet_pton")}


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import name`, or `import module` with no name."""

    module: str
    name: str | None
    line: int


@dataclass(frozen=True)
class Module:
    """A parsed source file under its dotted name."""

    name: str
    path: Path
    source: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Tell a package's `__init__.py` from a plain module."""
        return self.path.name == "__init__.py"

    def imports(self) -> Iterator[Import]:
        """Yield every import in the file, those inside functions and for type checking included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, None, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield Import(self._absolute(node), alias.name, node.lineno)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name if self.is_package else self.name.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{node.module}" if node.module else package


def _load(path: Path) -> Module:
    source = path.read_text(encoding="utf-8")
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, path, source, ast.parse(source, filename=str(path)))


@cache
def package_modules() -> dict[str, Module]:
    """Parse the whole package, by dotted name."""
    return {module.name: module for module in map(_load, sorted(PACKAGE.rglob("*.py")))}


@cache
def test_tree() -> tuple[Module, ...]:
    """Parse the tests, without what other tools put below them."""
    paths = (ROOT / "tests").rglob("*.py")
    return tuple(_load(path) for path in sorted(paths) if "node_modules" not in path.parts)


test_tree.__test__ = False  # type: ignore[attr-defined]


def imported_modules(module: Module) -> Iterator[tuple[str, Import]]:
    """Yield the package's modules that `module` imports: `from p2pclaude import cli` names `p2pclaude.cli`."""
    for found in module.imports():
        if found.module.split(".")[0] != "p2pclaude":
            continue
        inner = f"{found.module}.{found.name}"
        yield (inner if inner in package_modules() else found.module), found


def in_hyperdht(name: str) -> bool:
    """Tell whether the dotted name belongs to the library."""
    return name == "p2pclaude.hyperdht" or name.startswith("p2pclaude.hyperdht.")


def in_ring_1(name: str) -> bool:
    """Tell whether the dotted name belongs to the library's pure ring: by its docstring, or by the list above."""
    parts = name.split(".")
    if parts[:2] != ["p2pclaude", "hyperdht"] or len(parts) < 3:
        return False
    return parts[2] in RING_1 or ".".join(parts[2:]) in RING_1 or "(ring 1)" in _summary(package_modules()[name])


def _summary(module: Module) -> str:
    return (ast.get_docstring(module.tree) or "").partition("\n\n")[0]


def order_of(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the order of folders that a module stands in: the library's or the application's."""
    return LIBRARY if in_hyperdht(name) else APPLICATION


def folder_of(name: str) -> str:
    """Return the folder of a module, as the orders above name it: `dht` is one of its own, on top of the library."""
    parts = name.split(".")[2 if in_hyperdht(name) else 1 :]
    if not parts:
        return "dht" if in_hyperdht(name) else ""  # the library's face shows what `dht` has
    return parts[0] if len(parts) > 1 or parts[0] == "dht" or package_modules()[name].is_package else ""


def row_of(name: str) -> int | None:
    """Return the row of a module's folder, lowest first; None if the folder stands in no row."""
    folder = folder_of(name)
    return next((index for index, folders in enumerate(order_of(name)) if folder in folders), None)


def exported_by_hyperdht() -> set[str]:
    """Read the library's `__all__`."""
    for node in package_modules()["p2pclaude.hyperdht"].tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return set(ast.literal_eval(node.value))
    raise AssertionError("p2pclaude/hyperdht/__init__.py has no literal __all__")


def complain(problems: list[str]) -> None:
    """Fail with one problem a line."""
    assert not problems, "\n" + "\n".join(problems)


def test_every_folder_has_a_place() -> None:
    """A new folder must be given its row at the top of this file."""
    complain([f"{name}: its folder is in no row above" for name in package_modules() if row_of(name) is None])


def test_imports_point_down() -> None:
    """A module imports from its own folder and from lower ones; never up, never sideways."""
    problems = []
    for module in package_modules().values():
        own = row_of(module.name)
        for target, found in imported_modules(module):
            if in_hyperdht(target) != in_hyperdht(module.name):
                continue  # the library's border has its own tests
            other = row_of(target)
            if own is not None and other is not None and other >= own and folder_of(target) != folder_of(module.name):
                problems.append(f"{module.path}:{found.line}: {module.name} imports {target}")
    complain(problems)


def test_tools_do_not_import_each_other() -> None:
    """A command imports what the commands share, and no other command; what they share imports no command."""
    problems = [
        f"{module.path}:{found.line}: {module.name} imports {target}"
        for module in package_modules().values()
        if folder_of(module.name) == "cli" and not module.is_package
        for target, found in imported_modules(module)
        if target.startswith("p2pclaude.cli.") and target.rpartition(".")[2] not in SHARED_BY_TOOLS
    ]
    complain(problems)


def test_pure_application_modules_stay_pure() -> None:
    """The pairing URL, the sealed lines and all else that both sides speak know neither network nor clock."""
    problems = [
        f"{module.path}:{found.line}: imports {found.module}"
        for module in package_modules().values()
        if module.name.startswith(PURE)
        for found in module.imports()
        if found.module.split(".")[0] in WORLD - {"os", "secrets"} or in_hyperdht(found.module)
    ]
    complain(problems)


def test_application_uses_the_librarys_face_only() -> None:
    """Whatever the application takes from the library stands in its `__all__`."""
    exported = exported_by_hyperdht()
    problems = [
        f"{module.path}:{found.line}: {found.module} {found.name or ''}"
        for module in package_modules().values()
        if not in_hyperdht(module.name)
        for _, found in imported_modules(module)
        if in_hyperdht(found.module) or (found.module == "p2pclaude" and found.name == "hyperdht")
        if found.module != "p2pclaude.hyperdht" or found.name not in exported
    ]
    complain(problems)


def test_library_stands_alone() -> None:
    """The library imports nothing from the rest of the package: it can be published by itself."""
    problems = [
        f"{module.path}:{found.line}: imports {target}"
        for module in package_modules().values()
        if in_hyperdht(module.name)
        for target, found in imported_modules(module)
        if not in_hyperdht(target)
    ]
    complain(problems)


def test_ring_1_is_pure() -> None:
    """Ring 1 imports no I/O, no clock, no system, and nothing of ring 2."""
    problems = []
    for module in package_modules().values():
        if not in_ring_1(module.name):
            continue
        for found in module.imports():
            if found.module.split(".")[0] in WORLD and (found.module, found.name) not in HARMLESS:
                problems.append(f"{module.path}:{found.line}: ring 1 imports {found.module}")
        for target, found in imported_modules(module):
            if not in_ring_1(target):
                problems.append(f"{module.path}:{found.line}: ring 1 imports {target}")
    complain(problems)


def test_modules_are_imported_by_statements_that_these_tests_follow() -> None:
    """Neither by name at run time, but by the library's face, nor as attributes of the whole package."""
    problems = []
    for module in package_modules().values():
        problems += [
            f"{module.path}:{found.line}: {found.module}"
            for found in module.imports()
            if (found.module.split(".")[0] == "importlib" and module.name != "p2pclaude.hyperdht")
            or (found.module.split(".")[0] == "p2pclaude" and found.name is None)
        ]
        problems += [
            f"{module.path}:{node.lineno}: {node.func.id}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if node.func.id == "__import__" or (node.func.id == "open" and in_ring_1(module.name))
        ]
        problems += [
            f"{module.path}: looks for {part.value!r} in sys.modules"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.modules"
            for part in ast.walk(node.slice)
            if isinstance(part, ast.Constant) and str(part.value).startswith("p2pclaude")
        ]
    complain(problems)


def test_ring_1_is_given_its_randomness() -> None:
    """`random.Random` may be named as a type; nothing else of the module is touched."""
    problems = []
    for module in package_modules().values():
        if not in_ring_1(module.name):
            continue
        called = {id(node.func) for node in ast.walk(module.tree) if isinstance(node, ast.Call)}
        for node in ast.walk(module.tree):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random"
            if named and isinstance(node, ast.Attribute) and (node.attr != "Random" or id(node) in called):
                problems.append(f"{module.path}:{node.lineno}: random.{node.attr}")
        problems += [
            f"{module.path}:{found.line}: from random import {found.name}"
            for found in module.imports()
            if found.module == "random" and found.name not in (None, "Random")
        ]
    complain(problems)


def test_every_library_module_names_its_ring() -> None:
    """The ring stands in a module's first sentence, and the list of pure names above is that of the tree."""
    problems = [
        f"{module.path}: says neither (ring 1) nor (ring 2)"
        for module in package_modules().values()
        if in_hyperdht(module.name) and not module.is_package
        if not module.name.startswith("p2pclaude.hyperdht.udx.")
        if ("(ring 1)" in _summary(module)) == ("(ring 2)" in _summary(module))
    ]
    there = package_modules()
    problems += [f"ring 1 lacks {name}" for name in sorted(RING_1) if f"p2pclaude.hyperdht.{name}" not in there]
    complain(problems)


def test_no_circles() -> None:
    """No module comes back to itself, whichever imports are followed: those for types and in functions as well."""
    modules = package_modules()
    graph = {
        name: {target for target, _ in imported_modules(module) if target != name} for name, module in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "a circle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("where", ["p2pclaude", "tests"])
def test_sizes(where: str) -> None:
    """Functions stay within 60 lines unless a reason stands at their head. A module is one subject, however long."""
    problems = []
    for module in package_modules().values() if where == "p2pclaude" else test_tree():
        lines = module.source.splitlines()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                head = lines[max(node.lineno - 2, 0) : node.body[0].lineno]
                if length > MAX_FUNCTION_LINES and not any("# long: " in line for line in head):
                    problems.append(f"{module.path}:{node.lineno}: {node.name} has {length} lines")
    complain(problems)


Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Documented]]:
    for node in body:
        if not isinstance(node, Documented) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef) and any(_is_repeat(mark) for mark in node.decorator_list):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _public_definitions(node.body, f"{prefix}{node.name}.")


def _is_repeat(decorator: ast.expr) -> bool:
    """Tell a decorator under which the docstring stands elsewhere: overloads, and a property's setter."""
    if isinstance(decorator, ast.Attribute):
        return decorator.attr in ("setter", "deleter", "overload")
    return isinstance(decorator, ast.Name) and decorator.id == "overload"


def test_every_public_name_has_a_docstring() -> None:
    """Modules, classes, functions and methods whose names do not begin with an underscore."""
    problems = []
    for module in package_modules().values():
        if not ast.get_docstring(module.tree):
            problems.append(f"{module.path}: no module docstring")
        for name, node in _public_definitions(module.tree.body):
            if not ast.get_docstring(node):
                problems.append(f"{module.path}:{node.lineno}: {name} has no docstring")
    complain(problems)


def test_no_module_is_named_after_the_standard_librarys() -> None:
    """A module of such a name is confusing at best and shadows the other at worst."""
    names = [*package_modules().values(), *test_tree()]
    complain([str(module.path) for module in names if module.path.stem in sys.stdlib_module_names])


def test_no_leftovers() -> None:
    """No marks of unfinished work, and no test that is silently out of order."""
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "xf" + "ail")
    problems = [
        f"{module.path}:{number}: {mark}"
        for module in (*package_modules().values(), *test_tree())
        for number, line in enumerate(module.source.splitlines(), 1)
        for mark in marks
        if mark in line
    ]
    complain(problems)


HEAVY = {"asyncio", "cryptography", "nacl", "cffi", "ifaddr", "ssl", "p2pclaude.hyperdht"}
PROBE = """
import contextlib, importlib, io, json, sys
tool, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = "p2pclaude-" + tool
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    importlib.import_module("p2pclaude.cli." + tool).main()
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("tool", TOOLS)
def test_help_is_light(tool: str, option: str) -> None:
    """Help and version come at once: neither event loop nor cryptography is loaded for them."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, tool, option], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert f"p2pclaude.cli.{tool}" in loaded
    assert not loaded & HEAVY


IDLE = {  # what a tool that asks one question has no use for
    "argparse", "cryptography", "ctypes", "ifaddr", "ipaddress", "pathlib", "shutil", "ssl", "tempfile", "urllib",
    "uuid", "p2pclaude.sessions", "p2pclaude.daemon", "p2pclaude.host", "p2pclaude.protocol.record",
    *(f"p2pclaude.hyperdht.{module}" for module in (
        "node.budget", "peer.announcer", "peer.punch_rounds", "peer.pending_client", "peer.puncher", "peer.server",
        "peer.turns", "relay.mux", "relay.mux_frames", "relay.relay_client", "relay.relay_server",
        "storage", "storage.persistent", "storage.put_get", "storage.records",
    )),
}  # fmt: skip
LEAVING = """
import os
def leave(status):
    raise SystemExit(status)
os._exit = leave
"""


@pytest.mark.parametrize(("tool", "option"), [("daemon", "--print-url"), ("node", "--print-key")])
def test_what_runs_for_long_loads_no_tls(tool: str, option: str, tmp_path: Path) -> None:
    """OpenSSL would be megabytes of its memory, and nothing here speaks TLS."""
    path = f"--data-dir={tmp_path}" if tool == "daemon" else f"--key-file={tmp_path}/key"
    command = [sys.executable, "-c", f"{LEAVING}{PROBE}", tool, path, option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout, done
    loaded = set(json.loads(done.stdout))
    assert {"asyncio", "p2pclaude.hyperdht"} <= loaded and not {"ssl", "_ssl"} & loaded


@pytest.mark.parametrize("tool", ["ls", "ping", "tail"])
def test_a_tool_loads_what_it_uses(tool: str, tmp_path: Path) -> None:
    """One question to a daemon that is not there, all the way into the network and out again."""
    url = format_url(Pairing(KeyPair.from_seed(bytes(32)).public_key, bytes(32), {"bootstrap": ["127.0.0.1:9"]}))
    arguments = [tool, "--timeout", "0.2", url, *(["session"] if tool == "tail" else [])]
    env = {"PATH": os.environ["PATH"], "P2P_CLAUDE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{LEAVING}{PROBE}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=30, env=env,
    )  # fmt: skip
    assert done.stdout, done
    loaded = set(json.loads(done.stdout))
    assert "p2pclaude.hyperdht.peer.dial" in loaded
    assert not loaded & IDLE, loaded & IDLE
