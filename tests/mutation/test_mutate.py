"""`tests/mutate`: what good tests notice, what weak ones let live, and what keeps it from its work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mutation import cli
from mutation.runner import limits

LAMP = '''"""A lamp."""


def shines(times: int) -> bool:
    """Tell whether it shines after so many switches."""
    return times % 2 == 1


def wait(times: int) -> int:
    """Count up."""
    count = 0
    while count < times:
        count += 1
    return count
'''
GOOD = """from house.rooms.lamp import shines, wait


def test_it() -> None:
    assert [shines(times) for times in range(4)] == [False, True, False, True]
    assert shines(0) is False
    assert (wait(0), wait(1), wait(3)) == (0, 1, 3)
"""
WEAK = """from house.rooms.lamp import shines


def test_it() -> None:
    shines(1)
"""
BROKEN = "def test_it() -> None:\n    assert False\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a tree with a package of one module, and the plugin that puts mutants in its place."""
    for folder in ("house/rooms", "tests/rooms"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "house/__init__.py").write_text("")
    (tmp_path / "house/rooms/__init__.py").write_text("")
    (tmp_path / "house/rooms/lamp.py").write_text(LAMP)
    (tmp_path / "house/torn.py").write_text("def lamp(")
    (tmp_path / "tests/mutation").symlink_to(Path(__file__).parent)
    return tmp_path


def mutate(root: Path, *arguments: str, tests: str | None = None, more: str | None = None) -> int:
    """Run the command in a tree with those tests."""
    for name, text in (("test_lamp.py", tests), ("test_others.py", more)):
        if text is not None:
            (root / "tests/rooms" / name).write_text(text)
    return cli.main(["--jobs", "2", *arguments], root)


def test_good_tests_notice_every_mutant(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that make them wait for ever."""
    assert mutate(root, "--count", "30", "--timeout", "2", "house/rooms/lamp.py", tests=GOOD) == 0
    first, total = capsys.readouterr().out.splitlines()
    assert first == "house/rooms/lamp.py: 12 of 12 noticed"
    assert total.startswith("12 of 12 mutants noticed in 1 modules, seed 1, ")


def test_weak_tests_let_mutants_live(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate(root, "--count", "4", "house.rooms.lamp", tests=WEAK) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "house/rooms/lamp.py: 0 of 4 noticed"
    assert "  house/rooms/lamp.py:6: return None" in lines
    assert "    - return times % 2 == 1" in lines and "    + return None" in lines


def test_what_survives_its_own_tests_meets_those_of_the_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate(root, "--count", "3", "--timeout", "2", "house/rooms", tests=WEAK, more=GOOD) == 0
    assert "3 of 3 noticed" in capsys.readouterr().out


EATING = """

def test_what_eats() -> None:
    kept: list[bytes] = []
    while True:
        kept.append(bytes(1 << 28))
"""
LOOPING = """

def test_what_loops() -> None:
    while True:
        pass
"""


@pytest.mark.parametrize(("text", "allowed"), [(EATING, 60.0), (LOOPING, 0.5)], ids=["memory", "processor"])
def test_a_run_has_limits_of_its_own(root: Path, text: str, allowed: float) -> None:
    """Also where nobody waits for its end any longer: the run ends itself."""
    test = root / "tests/rooms/test_lamp.py"
    test.write_text(GOOD + text)
    environ = limits(allowed) | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    command = [sys.executable, "-m", "pytest", "-p", "mutation.plugin", "-q", "-p", "no:cacheprovider", str(test)]
    ended = subprocess.run(command, cwd=root, env={**os.environ, **environ}, capture_output=True, text=True, timeout=30)
    if text is EATING:
        assert ended.returncode == 1 and "MemoryError" in ended.stdout
    else:
        assert ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


HANGING = """import os, pathlib, time

import house.rooms.lamp


def test_it() -> None:
    if "MUTANT_MODULE" in os.environ:
        pathlib.Path(f"{os.getpid()}.pid").touch()
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_stopped_stops_its_runs(root: Path, number: signal.Signals) -> None:
    (root / "tests/rooms/test_lamp.py").write_text(HANGING)
    code = "import sys; from pathlib import Path; from mutation import cli; sys.exit(cli.run(Path.cwd()))"
    environ = {**os.environ, "PYTHONPATH": str(root / "tests")}
    command = [sys.executable, "-c", code, "--jobs", "2", "--timeout", "60", "house/rooms/lamp.py"]
    with subprocess.Popen(command, cwd=root, env=environ, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 30
        while len(runs := list(root.glob("*.pid"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(10) == 128 + number
    assert len(runs) == 2 and set(root.glob("*.pid")) == set(runs)
    for file in runs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.stem), 0)


def test_a_module_that_is_loaded_before_its_mutant_is_no_hundred_percent(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tests would never meet a mutant, and each would count as noticed."""
    (root / "tests/sitecustomize.py").write_text("import house.rooms.lamp\n")
    assert mutate(root, "--count", "1", "house/rooms/lamp.py", tests=GOOD) == 2
    assert "no mutant can take its place" in capsys.readouterr().err


def test_a_reader_who_leaves_is_no_error(root: Path) -> None:
    code = "import sys; from pathlib import Path; from mutation import cli; sys.exit(cli.run(Path.cwd()))"
    environ = {**os.environ, "PYTHONPATH": str(root / "tests")}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code, "--list", "house/rooms/lamp.py"]
    ended = subprocess.run(command, cwd=root, env=environ, stdout=writer, stderr=subprocess.PIPE, timeout=30)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def test_the_floor_decides(root: Path) -> None:
    assert mutate(root, "--count", "2", "--floor", "0", "house/rooms/lamp.py", tests=WEAK) == 0


def test_mutants_can_be_looked_at(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate(root, "--list", "--count", "3", "house/rooms/lamp.py") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "house/rooms/lamp.py: 3 mutants" and len(lines) == 10


def test_named_tests_are_run_instead(root: Path) -> None:
    elsewhere = root / "elsewhere.py"
    elsewhere.write_text(GOOD.replace("def test_it", "def test_that"))
    arguments = ["house/rooms/lamp.py", "--count", "3", "--timeout", "2", "--tests", str(elsewhere)]
    assert mutate(root, *arguments, tests=WEAK) == 0


@pytest.mark.parametrize(
    ("arguments", "tests", "reason"),
    [
        (["house/rooms/light.py"], GOOD, "house/rooms/light.py: no such module"),
        (["house/rooms/lamp.py"], None, "no tests in tests/rooms; name some with --tests"),
        (["house/rooms/lamp.py"], BROKEN, "tests/rooms: tests fail without any mutant"),
        (["house/rooms/lamp.py", "--tests", "nowhere.py"], GOOD, "nowhere.py: no such file"),
        (["house/rooms/lamp.pyx"], GOOD, "house/rooms/lamp.pyx: no such module"),
        (["house/torn.py"], GOOD, "house/torn.py: not the source of a module"),
        (["tests/rooms/empty"], GOOD, "tests/rooms/empty: no such module"),
        (["house/rooms/__init__.py"], GOOD, "house/rooms/__init__.py: a package's own file cannot be replaced"),
        ([str(Path(__file__))], GOOD, "test_mutate.py: not in "),
    ],
)
def test_what_keeps_it_from_its_work_is_said(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], tests: str | None, reason: str
) -> None:
    assert mutate(root, *arguments, tests=tests) == 2
    said = capsys.readouterr().err
    assert said.startswith("tests/mutate: ") and reason in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["--count", "0"], ["--count", "x"], ["--jobs", "0"], ["--what"], ["--timeout", "0"], ["--timeout", "nan"],
        ["--floor", "nan"], ["--floor", "101"],
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "usage: tests/mutate" in capsys.readouterr().err


def test_the_pure_modules_are_there_and_have_tests() -> None:
    modules = cli.find_modules(cli.PURE, cli.ROOT)
    assert len(modules) > 35
    for module in modules:
        assert cli.tests_of(module, cli.ROOT)
