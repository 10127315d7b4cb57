"""A short fuzzing of every target, with random mutations and, where atheris is installed, guided by coverage."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import p2pclaude
from fuzz import engine, guided
from fuzz.engine import Result
from fuzz.target import Script, Target
from fuzz.targets import TARGETS

RUN = Path(__file__).with_name("run")
SEED = 1
GUIDED_RUNS = 150
WITHOUT_ATHERIS = "atheris is not installed: NO COVERAGE-GUIDED FUZZING"


def run(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run the command, as somebody would type it."""
    environ = os.environ | {"PYTHON": sys.executable}
    return subprocess.run([RUN, *words], env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_and_random_mutations(name: str) -> None:
    engine.run(TARGETS[name], runs=TARGETS[name].runs, seed=SEED)


def test_every_corpus_directory_has_its_target() -> None:
    assert {path.name for path in engine.CORPUS.iterdir()} <= set(TARGETS)
    assert sum(path.stat().st_size for path in engine.CORPUS.rglob("*")) < 1_000_000


def test_every_decoder_is_fuzzed() -> None:
    """As README.md says."""
    package = Path(p2pclaude.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in package.rglob("*.py") if path.parent.name != "cli"]
    decoders = {name for source in sources for name in re.findall(r"^def (decode_\w+)\(", source, re.M)}
    assert len(decoders) > 20
    harness = "".join(path.read_text(encoding="utf-8") for path in RUN.parent.glob("*.py"))
    assert {name for name in decoders if not re.search(rf"\b{name}\b", harness)} == set()


def test_guided_by_coverage() -> None:
    if guided.load_atheris() is None:
        pytest.skip(WITHOUT_ATHERIS)
    done = run("--runs", str(GUIDED_RUNS), "--seed", str(SEED))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in lines] == list(TARGETS)
    assert all(" atheris " in line and " edges " in line for line in lines)


# The harness itself


def fragile(data: bytes) -> None:
    """Fail on what the corpus almost has."""
    if data[:2] == b"ab" and data[2:3] == b"\xff":
        raise AssertionError("found")


FRAGILE = Target("fragile", fragile, seeds=lambda: [b"abc", b"xyz"])


def test_a_failing_input_is_kept_and_fails_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "BUILD", tmp_path)
    with pytest.raises(AssertionError, match="found") as caught:
        engine.run(FRAGILE, runs=100_000, seed=1)
    (kept,) = (tmp_path / "crashes").iterdir()
    assert str(kept) in caught.value.__notes__[0]
    with pytest.raises(AssertionError, match="found"):
        engine.replay(FRAGILE, kept.read_bytes())


def test_guided_runs_report_a_failing_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    atheris = guided.load_atheris()
    if atheris is None:
        pytest.skip(WITHOUT_ATHERIS)
    monkeypatch.setattr(engine, "BUILD", tmp_path)
    target = Target("fragile", atheris.instrument_func(fragile), seeds=FRAGILE.seeds)
    result = guided.run(atheris, target, runs=200_000, seed=1)
    assert result.crash is not None
    with pytest.raises(AssertionError, match="found"):
        engine.replay(FRAGILE, result.crash.read_bytes())
    assert "found" in capfd.readouterr().err


def test_a_seed_repeats() -> None:
    def inputs(seed: int) -> list[bytes]:
        seen: list[bytes] = []
        result = engine.run(Target("seen", seen.append, seeds=lambda: [b"abc"]), runs=300, seed=seed)
        assert result == Result("seen", "random", 300, result.seconds)
        return seen

    assert inputs(1) == inputs(1) != inputs(2)
    assert inputs(1)[0] == b"abc"


def test_an_input_that_takes_too_long_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(_data: bytes) -> None:
        while True:
            pass

    monkeypatch.setattr(engine, "HANG_SECONDS", 0.05)
    with pytest.raises(engine.Hang):
        engine.replay(Target("spin", spin), b"")


def test_a_script_ends_with_zeros() -> None:
    script = Script(b"\x02abc")
    assert (script.chunk(), script.byte(), script.more) == (b"ab", ord("c"), False)
    assert (script.byte(), script.number(4), script.chunk(), script.rest()) == (0, 0, b"", b"")


def test_the_command_replays_a_file(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"\x03\x01")
    done = run("message", path)
    assert done.returncode == 0, done.stderr
    refused = run("--random", "nothing")
    assert (refused.returncode, refused.stderr) == (64, "tests/fuzz/run: error: no target nothing; --list names them\n")
