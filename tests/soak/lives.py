"""The daemon's many lives for `crash`: a process that has everything loaded already and forks a daemon on demand.

Takes the daemon's arguments as its own. Each line on stdin starts one daemon, whose process id is printed at once. Its
log goes to the file that LIVES_LOG names. LIVES_SETTLE_SECONDS is how soon a claude is believed to run.
"""

import os
import signal
import sys

import p2pclaude.daemon.daemon
import p2pclaude.hyperdht
from p2pclaude.cli import daemon
from p2pclaude.sessions import session

LOADED = (p2pclaude.daemon.daemon, p2pclaude.hyperdht)  # before the fork: a life begins within milliseconds


def live(arguments: list[str]) -> None:
    """Be a daemon until the end."""
    log = os.open(os.environ["LIVES_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for here, there in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(here, there)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os._exit(daemon.main(arguments))


def main() -> None:
    """Fork a daemon for every line."""
    session.SETTLE_SECONDS = float(os.environ.get("LIVES_SETTLE_SECONDS", session.SETTLE_SECONDS))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for _ in sys.stdin:
        pid = os.fork()
        if not pid:
            live(sys.argv[1:])
        print(pid, flush=True)


if __name__ == "__main__":
    main()
