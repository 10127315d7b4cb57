"""What pip installs: wheel and sdist hold everything, where `man` and the shells look for it."""

import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import p2pclaude

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("daemon", "send", "tail", "ls", "stop", "approve", "ping", "node")
COMMANDS = tuple(f"p2pclaude-{tool}" for tool in TOOLS)
VERSION = p2pclaude.__version__

DATA_FILES = (
    "share/man/man7/p2pclaude.7",
    "share/zsh/site-functions/_p2pclaude",
    *(f"share/man/man1/{command}.1" for command in COMMANDS),
    *(f"share/bash-completion/completions/{command}" for command in COMMANDS),
    *(f"share/fish/vendor_completions.d/{command}.fish" for command in COMMANDS),
)


def tracked(*under: str) -> set[str]:
    """List the files of the source tree below the given folders as git knows them, or as they lie there."""
    listed = subprocess.run(["git", "ls-files", "--", *under], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    return {
        str(path.relative_to(ROOT))
        for folder in under
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "node_modules"} & set(path.parts)
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the source, so that building leaves nothing in the tree and finds nothing left over."""
    target = tmp_path_factory.mktemp("source")
    top = [path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".git")]
    for name in {*top, *tracked("p2pclaude", "man", "completions", "tests", ".ci")}:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
        copy.chmod((ROOT / name).stat().st_mode & 0o777)
    return target


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build sdist and wheel by the build backend's own hooks; returns their paths."""
    target = tmp_path_factory.mktemp("dist")
    for hook in ("build_sdist", "build_wheel"):
        code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
        command = [sys.executable, "-c", code, str(target)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = target.glob("*.tar.gz")
    (wheel,) = target.glob("*.whl")
    return sdist, wheel


def wheel_names(wheel: Path) -> set[str]:
    """List a wheel's files; those of the data scheme under the path they are installed at."""
    prefix = f"p2pclaude-{VERSION}.data/data/"
    with zipfile.ZipFile(wheel) as archive:
        return {name.removeprefix(prefix) for name in archive.namelist()}


def test_version_stands_in_one_place() -> None:
    """setup.cfg takes the version from the package."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["metadata"]["version"] == "attr: p2pclaude.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert f"[{VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_wheel_holds_the_package(built: tuple[Path, Path]) -> None:
    """Every module is there, the type markers too, and nothing of the tests."""
    names = wheel_names(built[1])
    assert {name for name in tracked("p2pclaude") if "__pycache__" not in name} <= names
    assert "p2pclaude/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "build"))]


def test_wheel_holds_man_pages_and_completions(built: tuple[Path, Path]) -> None:
    """They go where `man`, bash, zsh and fish look below an installation's prefix."""
    names = wheel_names(built[1])
    assert {name for name in names if name.startswith("share/")} == set(DATA_FILES)


def test_wheel_metadata(built: tuple[Path, Path]) -> None:
    """Name, version, licence, requirements and the commands."""
    info = f"p2pclaude-{VERSION}.dist-info"
    with zipfile.ZipFile(built[1]) as archive:
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        names = archive.namelist()
    assert metadata["Name"] == "p2pclaude"
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.11"
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in names)
    required = {re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra" not in line}
    assert required == {"PyNaCl", "cryptography", "docopt-ng", "ifaddr"}
    assert dict(entry_points["console_scripts"]) == {
        command: f"p2pclaude.cli.{tool}:main" for command, tool in zip(COMMANDS, TOOLS, strict=True)
    }


def test_sdist_holds_the_source(built: tuple[Path, Path]) -> None:
    """Whoever has the sdist can build, read and test."""
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = tracked("p2pclaude", "man", "completions", "tests", ".ci")
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md", "setup.cfg", "pyproject.toml", "MANIFEST.in"}
    assert not wanted - names
    assert not [name for name in names if "node_modules" in name or name.endswith(".pyc")]


def test_wheel_installs_and_runs(built: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own each command says its version, and the pages lie below the prefix."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=120)
    prefix = tmp_path / "venv"
    # The dependencies come from the environment that runs the tests, the package from the wheel.
    pip = [sys.executable, "-m", "pip", "--python", str(prefix / "bin/python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(built[1])], check=True, timeout=120, capture_output=True)
    site = next((prefix / "lib").glob("python3*/site-packages"))
    (site / "borrowed.pth").write_text("\n".join(entry for entry in sys.path if entry.endswith("site-packages")))
    for command in COMMANDS:
        run = [str(prefix / "bin" / command), "--version"]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command
        assert VERSION in done.stdout
    assert not [name for name in DATA_FILES if not (prefix / name).is_file()]
