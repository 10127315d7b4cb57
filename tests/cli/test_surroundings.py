"""Where and how the commands may be started: directories, addresses, standard streams, loops of a shell, signals."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys

import pytest
from cli.harness import Shell, command, environment, eventually
from kit.free_ports import free_port


def test_a_data_directory_that_cannot_be(offline: Shell) -> None:
    (offline.work / "file").touch()
    for place in ("file", "file/below", "/proc/none"):
        assert place in offline.fail(77, "daemon", "--private", "--data-dir", place)


def test_a_current_directory_that_is_gone(offline: Shell) -> None:
    options = ["--private", "--host", "127.0.0.1", "--port", str(free_port()), "--data-dir", str(offline.work / "d")]
    options += ["--claude", sys.executable]
    for more, status in (([], 64), (["--check"], 64), (["--print-url"], 0)):
        line = shlex.join(command("daemon", *options, *more))
        line = f"mkdir gone && cd gone && rmdir ../gone && exec {line}"
        env = environment(offline.work / "home")
        process = ["sh", "-c", line]
        result = subprocess.run(process, cwd=offline.work, env=env, capture_output=True, text=True, timeout=60)
        assert result.returncode == status, result
        assert not status or "the current directory is gone" in result.stdout + result.stderr


def test_an_address_of_another_host(offline: Shell) -> None:
    for tool, options in (("daemon", ["--data-dir", "d", "--private"]), ("node", [])):
        err = offline.fail(69, tool, "--host", "192.0.2.1", *options)
        assert "address 192.0.2.1 cannot be used: " in err
        assert "--host needs an address of this host" in err


def test_a_port_that_was_named_and_is_taken(offline: Shell) -> None:
    """Another one would be of no use to whoever forwards this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        options = ["--data-dir", "d", "--bootstrap", "127.0.0.1:9", "--host", "127.0.0.1", "--port", port]
        err = offline.fail(69, "daemon", *options)
        assert f"error: port {port} cannot be used: address already in use" in err
        assert f"error\tnetwork\tport {port} cannot be used" in offline.run("daemon", "--check", *options).out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8, this is not Linux")
def test_a_private_daemon_listens_at_its_host_alone(shell: Shell) -> None:
    [reply] = shell.succeed("ping", "@")
    port = re.search(r"127\.0\.0\.1:(\d+)$", reply)
    assert port
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as elsewhere:
        elsewhere.bind(("127.0.0.2", int(port[1])))  # taken, if the daemon had all addresses


def test_ctrl_c_ends_a_loop_of_the_shell_too(shell: Shell) -> None:
    [session] = shell.succeed("send", "@", "hi")
    follow = shlex.join(command("tail", "-f", shell.url, session))
    loop = subprocess.Popen(
        ["bash", "-c", f"for turn in 1 2; do {follow}; done; echo went on"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment(shell.work / "home"),
        start_new_session=True,
    )
    try:
        assert loop.stdout is not None
        loop.stdout.readline()
        os.killpg(loop.pid, signal.SIGINT)  # as a terminal sends it
        rest, _ = loop.communicate(timeout=60)
        assert b"went on" not in rest
    finally:
        loop.kill()
        loop.communicate()


def test_ctrl_c_before_the_loop_runs_is_quiet(offline: Shell) -> None:
    script = """
from p2pclaude.cli import ls
from p2pclaude.cli.common import run

async def work() -> int:
    return 0

def execute(options: object, console: object) -> int:
    begun = work()
    raise KeyboardInterrupt

run(ls.NAME, ls.USAGE, lambda arguments, console: None, execute)
"""
    env = environment(offline.work / "home", {"PYTHONWARNINGS": ""})
    result = subprocess.run([sys.executable, "-c", script, "url"], env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_no_ctrl_c_gets_lost(offline: Shell) -> None:
    """Python drops an exception in what it calls by itself, as when an import is done or an object goes."""
    script = """
import os, signal
from p2pclaude.cli import ls
from p2pclaude.cli.common import run

class Going:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

def execute(options: object, console: object) -> int:
    Going()
    print("runs on")
    return 0

run(ls.NAME, ls.USAGE, lambda arguments, console: None, execute)
"""
    env = environment(offline.work / "home")
    result = subprocess.run([sys.executable, "-c", script, "url"], env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_a_daemon_without_standard_streams(offline: Shell) -> None:
    line = " ".join(map(shlex.quote, command("daemon", "--private", "--data-dir", "d", "--port", str(free_port()))))
    process = subprocess.Popen(
        ["sh", "-c", f"exec {line} <&- >&- 2>&-"], cwd=offline.work, env=environment(offline.work / "home")
    )
    try:
        url = str(offline.work / "d" / "pairing.url")
        eventually(lambda: offline.run("ping", url, "-t", "10").status == 0)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
