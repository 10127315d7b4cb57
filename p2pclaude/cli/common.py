"""What every command shares: arguments, the pairing URL, output, exit status.

A command is its usage text (which docopt parses), a function that turns parsed arguments into options without
touching the network, and a function that does the work. Nothing heavy is imported here, so that a usage error is
answered at once.
"""

from __future__ import annotations

import errno
import gc
import math
import os
import re
import select
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TypeVar

from docopt import DocoptExit, docopt

from p2pclaude import __version__
from p2pclaude.errors import DataError, P2PClaudeError, UsageError

if TYPE_CHECKING:
    from p2pclaude.protocol.pairing import Pairing

Arguments = dict[str, Any]
"""What docopt makes of a command line: option or argument name -> str, bool, list or None."""

Options = TypeVar("Options")

EXIT_SOFTWARE = 70
EXIT_IOERR = 74
MAX_EXIT = 128
"""A status above it stands for the signal that ended the command."""

BOOTSTRAP_VARIABLE = "P2P_CLAUDE_BOOTSTRAP"
_LOOP = "p2pclaude.cli.lean"
MAX_URL_FILE_BYTES = 1 << 16
MAX_SECONDS = 1e9

COMMON_OPTIONS = """\
  -t, --timeout SECONDS    how long to wait for a connection, and for each
                           answer of the daemon [default: 30]
  --bootstrap NODES        HOST:PORT,... of the DHT's nodes to start from; else
                           P2P_CLAUDE_BOOTSTRAP, those the URL names, or the
                           public network's
  -v, --verbose            say on standard error what is going on
  -h, --help               show this text
  --version                show the version

Where a daemon was found is remembered in the directory P2P_CLAUDE_CACHE, by
default in the user's cache directory; nowhere if it is set and empty.
"""
"""The end of every tool's usage text."""

_is_writing = False

_URL_HINT = "give the pairing URL itself, or the path of a file that holds it"

# Those of the last two ranges turn text around, so that a command looks like another one (Unicode UAX #9).
_CONTROL = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
_CONTROL_IN_JSON = re.compile(
    rb"\x7f|\xc2[\x80-\x9f]|\xe2(?:\x80[\xaa-\xae]|\x81[\xa6-\xa9])"  # what JSON holds unescaped, as UTF-8
)
_CONTROL_IN_TEXT = dict.fromkeys(_CONTROL.keys() - {0x09, 0x0A})


class OutputError(P2PClaudeError):
    """Standard output cannot be written (EX_IOERR)."""

    exit_status = EXIT_IOERR


class Interrupted(Exception):
    """A signal came while standard output was being written, which may take for ever; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Console:
    """A command's words on stderr; its data goes to stdout through `write_line`."""

    def __init__(self, name: str, *, verbose: bool = False) -> None:
        self.name = name
        self.verbose = verbose

    def error(self, text: str) -> None:
        """Say what went wrong."""
        self._say(f"error: {text}")

    def hint(self, text: str) -> None:
        """Say what may help."""
        self._say(f"hint: {text}")

    def note(self, text: str) -> None:
        """Say what is going on, with -v only."""
        if self.verbose:
            self._say(text)

    def prompt(self, wanted: bool) -> None:
        """Ask for input if it is wanted and stderr is a terminal."""
        if wanted and sys.stderr is not None and sys.stderr.isatty():
            print("> ", end="", file=sys.stderr, flush=True)

    def end_prompt(self, wanted: bool) -> None:
        """End the line of a prompt that nobody has answered."""
        if wanted and sys.stderr is not None and sys.stderr.isatty():
            self._print("")

    def show(self, text: str) -> None:
        """Print lines as they are, such as the short form of the usage text."""
        self._print(text)

    def report(self, error: P2PClaudeError) -> int:
        """Print an error and its hint; return the exit status that belongs to it."""
        self.error(str(error))
        if error.hint:
            self.hint(error.hint)
        return error.exit_status

    def _say(self, text: str) -> None:
        self._print(f"{self.name}: {printable(text)}")

    def _print(self, text: str) -> None:
        # stderr may be closed or full too; then there is nobody left to tell
        if sys.stderr is None:
            return  # to `print`, None would be stdout
        try:
            print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass


def run(
    name: str,
    usage: str,
    parse: Callable[[Arguments, Console], Options],
    execute: Callable[[Options, Console], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command and return its exit status, or leave with it at once when there was an event loop.

    `parse` checks the arguments (UsageError, DataError); `execute` does the work. Errors are printed here, a closed
    pipe on stdout ends quietly with 0. A process that a signal ended dies of it, which a shell sees as 128 and its
    number; with `argv` given that status is returned.
    """
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # KeyboardInterrupt gets lost where Python calls something by itself, as at the end of an import.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # while modules load, which makes much and no garbage; `lean.settle` turns it on
    try:
        status = _run(Console(name), usage, parse, execute, sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:
        if argv is None:  # at once: what was under way, such as a loop half made, complains when it is thrown away
            _die(signal.SIGINT)
        status = 128 + signal.SIGINT
    finally:
        gc.enable()
    if argv is None and status > MAX_EXIT:
        _die(status - 128)
    if argv is None and _LOOP in sys.modules and not sys.warnoptions:  # whoever wants warnings gets the last ones
        _leave(status)
    return status


def _die(number: int) -> None:
    """End the process by the signal that has interrupted it: a shell leaves its loop on Ctrl-C only if it sees that."""
    _flush_all()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _leave(status: int) -> NoReturn:
    """End the process without taking the interpreter apart, which takes as long as a round trip or two."""
    _flush_all()
    os._exit(status)


def _flush_all() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # closed from the start, or its reader is gone; what there was to say about that is said


def _run(
    console: Console,
    usage: str,
    parse: Callable[[Arguments, Console], Options],
    execute: Callable[[Options, Console], int],
    argv: list[str],
) -> int:
    try:
        try:
            arguments = parse_arguments(usage, argv)
            if isinstance(arguments, int):
                return _flushed(arguments)
            console.verbose = bool(arguments.get("--verbose"))
            return _flushed(execute(parse(arguments, console), console))
        except UsageError as error:
            console.show(short_usage(usage))
            return console.report(error)
        except OutputError as error:
            _forget_stdout()
            return console.report(error)
        except P2PClaudeError as error:
            return _flushed(console.report(error))
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except OSError as error:
        _forget_stdout()
        console.error(f"input or output failed: {(error.strerror or str(error)).lower()}")
        return EXIT_IOERR
    except Exception as error:
        # The text may hold anything, a key too; the way there holds only our own code.
        console.error(f"this is a defect in the tool ({type(error).__name__})")
        if console.verbose:
            console.show("".join(traceback.format_tb(error.__traceback__)).rstrip())
        return EXIT_SOFTWARE


def _flushed(status: int) -> int:
    if sys.stdout is not None:
        with _writing():
            sys.stdout.flush()
    return status


@contextmanager
def _writing() -> Iterator[None]:
    """Tell a failure of stdout from all others; a closed pipe is none of them."""
    global _is_writing
    _is_writing = True
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write: {(error.strerror or str(error)).lower()}") from error
    finally:
        _is_writing = False


def is_writing() -> bool:
    """Tell whether stdout is being written at the moment: its reader may take its time, and nothing else goes on."""
    return _is_writing


def _forget_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush of it cannot fail aloud."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    except (AttributeError, OSError, ValueError):
        pass  # it was closed from the start, or is no real file


def parse_arguments(usage: str, argv: list[str]) -> Arguments | int:
    """Parse a command line by its usage text; an int is the exit status after -h or --version.

    Raises UsageError. Its text repeats no argument's value, which may be a pairing URL.
    """
    # docopt would count the `--` itself as an argument; words after it are marked with a NUL, which none can hold
    end = argv.index("--") if "--" in argv else len(argv)
    words = [*argv[:end], *("\0" + word for word in argv[end + 1 :])]
    try:
        parsed = docopt(usage, words, version=f"p2pclaude {__version__}")
    except DocoptExit:
        error = _usage_error(usage, words)
        is_text = error.startswith("unknown option") and "TEXT" in short_usage(usage)
        raise UsageError(error, hint=_DASH_HINT if is_text else None) from None
    except SystemExit:
        return 0
    return {name: _unmark(value) for name, value in parsed.items()}


_DASH_HINT = "text that begins with - goes after --, or to standard input"


def _unmark(value: object) -> object:
    if isinstance(value, list):
        return [_unmark(item) for item in value]
    return value.removeprefix("\0") if isinstance(value, str) else value


def _usage_error(usage: str, argv: list[str]) -> str:
    """Say in words what is wrong with a command line: parse it again with any number of arguments."""
    options_only = f"Usage: {usage.split()[0]} [options] [ARG...]\n\n{usage[usage.index('Options:') :]}"
    try:
        arguments = docopt(options_only, argv, default_help=False)["ARG"]
    except DocoptExit as error:
        return _option_error(usage, error)
    pattern = re.sub(r"\[.*?\]", "", short_usage(usage).splitlines()[1])
    needed = len(re.findall(r"\b[A-Z]+\b", pattern))
    if len(arguments) < needed:
        return "an argument is missing"
    # docopt takes a negative number for an argument; `tail -5` means it otherwise
    number = next((word for word in arguments if re.fullmatch(r"-\d+", word)), None)
    return f"unknown option {number}" if number else "too many arguments"


def _option_error(usage: str, error: DocoptExit) -> str:
    message = str(error.code).partition("\n")[0]
    if match := re.match(r"(-\S+) requires argument", message):
        return f"{match[1]} needs an argument"
    if match := re.match(r"(-\S+) must not have an argument", message):
        return f"{match[1]} takes no argument"
    # docopt gives the options it could not place as text only: Option('-s', '--long', ...)
    unplaced = re.findall(r"Option\((?:None|'([^']*)'), (?:None|'([^']*)')", message)
    names = [long or short for short, long in unplaced]
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", usage))
    unknown = next((name for name in names if name not in known), None)
    return f"unknown option {unknown.rstrip()}" if unknown else f"{names[0] if names else 'an option'} is given twice"


def short_usage(usage: str) -> str:
    """Return the usage lines alone."""
    return usage[usage.index("Usage:") : usage.index("\n\n", usage.index("Usage:"))]


class Target(NamedTuple):
    """The daemon that a command talks to: pairing, bootstrap nodes (None: the public network), timeout in seconds."""

    pairing: Pairing
    bootstrap: tuple[str, ...] | None
    timeout: float


def parse_target(arguments: Arguments, console: Console) -> Target:
    """Read URL, -t and --bootstrap. Raises UsageError or DataError; no text repeats any part of the URL."""
    timeout = parse_seconds(arguments, "--timeout")
    chosen = parse_bootstrap(arguments["--bootstrap"], os.environ)
    pairing = read_pairing(arguments["URL"], console)
    return Target(pairing, chosen or pairing.bootstrap or None, timeout)


def read_pairing(argument: str, console: Console) -> Pairing:
    """Read a pairing URL, given itself or as the path of a file that holds it. Raises DataError."""
    from p2pclaude.protocol.pairing import parse_url

    if "://" in argument:
        return parse_url(argument)
    try:
        with open(argument, "rb") as file:  # noqa: PTH123 (pathlib takes a tool's start some time)
            text = file.read(MAX_URL_FILE_BYTES).decode()
            mode = os.fstat(file.fileno()).st_mode
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not text"
        raise DataError(f"cannot read the pairing URL: {reason.lower()}", hint=_URL_HINT) from None
    if stat.S_ISREG(mode) and mode & 0o077:
        console.hint("other users can read the file with the pairing URL, chmod 600 would stop that")
    return parse_url(text)


def parse_bootstrap(option: str | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Read HOST:PORT,... from the option, else from the environment; empty if neither names any. Raises UsageError."""
    from p2pclaude.protocol.pairing import is_host_port

    text, source = option, "--bootstrap"
    if text is None:
        text, source = environ.get(BOOTSTRAP_VARIABLE, ""), BOOTSTRAP_VARIABLE
    nodes = tuple(node for part in text.split(",") if (node := part.strip()))
    if not all(is_host_port(node) for node in nodes) or (option is not None and not nodes):
        raise UsageError(f"the nodes in {source} are not HOST:PORT with commas between")
    return nodes


def parse_seconds(arguments: Arguments, option: str) -> float:
    """Read a positive number of seconds. Raises UsageError."""
    try:
        seconds = float(arguments[option])
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_SECONDS:
        raise UsageError(f"{option} needs a number of seconds above 0")
    return seconds


def parse_count(arguments: Arguments, option: str, *, least: int = 0) -> int | None:
    """Read a whole number, None if the option is not given. Raises UsageError."""
    text = arguments[option]
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 15 and int(text) >= least):
        raise UsageError(f"{option} needs a whole number, {least} or more")
    return int(text)


def check_address(arguments: Arguments, option: str) -> None:
    """Raise UsageError if an option is given and names no IPv4 address."""
    from ipaddress import IPv4Address

    try:
        if arguments[option] is not None:
            IPv4Address(arguments[option])
    except ValueError:
        raise UsageError(f"{option} needs an IPv4 address") from None


def printable(text: str) -> str:
    """Remove control characters, which a terminal would obey."""
    return text.translate(_CONTROL)


def printable_text(text: str) -> str:
    """Remove control characters other than newline and tab."""
    return text.translate(_CONTROL_IN_TEXT)


def write_line(line: str | bytes) -> None:
    """Write one line of data to stdout, as UTF-8 whatever the locale, and flush it."""
    write_lines([line if isinstance(line, bytes) else line.encode("utf-8", "replace")])


def write_lines(lines: Sequence[bytes]) -> None:
    """Write lines of data that are there at once to stdout, and flush it.

    On a terminal they are free of characters that it would obey: text has none, and in JSON they are escaped.
    """
    if not lines:
        return
    with _writing():
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        data = b"\n".join((*lines, b""))
        if is_terminal():
            data = _CONTROL_IN_JSON.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), data)
        # Past the buffer: what a signal cuts off here shall not be waited for again when the tool ends.
        _write_all(getattr(sys.stdout.buffer, "raw", sys.stdout.buffer), data)
        sys.stdout.buffer.flush()


def _write_all(stream: BinaryIO, data: bytes) -> None:
    """Write to the end: the stream is raw, and a full disk, a full pipe or a signal has it write a part."""
    rest = memoryview(data)
    while rest:
        written = stream.write(rest)
        if written is None:  # a program that shares it, such as ssh, has made it non-blocking, and it is full
            wait_for(stream.fileno(), select.POLLOUT)
        else:
            rest = rest[written:]


def wait_for(descriptor: int, event: int) -> None:
    """Wait until a descriptor that does not block can be read (select.POLLIN) or written (POLLOUT), or is closed."""
    waiting = select.poll()
    waiting.register(descriptor, event)
    waiting.poll()


def is_terminal() -> bool:
    """Tell whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()
