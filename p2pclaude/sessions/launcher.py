"""What to start for a session, and where it may run: from what is asked for, and what the daemon allows.

`table` stands above; `claude` runs what is decided here. Errors are P2PClaudeErrors whose texts are meant for the
other side.
"""

import asyncio
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from p2pclaude.errors import DataError, Refused, TryAgain
from p2pclaude.sessions.claude import PERMISSION_MODES, Launch, has_conversation
from p2pclaude.sessions.directory import Info

DEFAULT_MAX_SESSIONS = 64
"""Sessions with a process that a daemon runs at once, unless an option says otherwise."""
DEFAULT_PERMISSION_MODE = "acceptEdits"
"""As the TypeScript daemon's."""
REACH_SECONDS = 5.0
"""How long a directory is waited for: it may be on another machine, which is gone."""

_threads = ThreadPoolExecutor(16, "directories")  # their own, as one that hangs is not given back


@dataclass(frozen=True, slots=True)
class Settings:
    """How sessions are started here. `root_dir` and `default_dir` are real paths; `find_claude` raises Unavailable."""

    find_claude: Callable[[], Path]
    default_dir: Path
    root_dir: Path | None = None
    permission_mode: str = DEFAULT_PERMISSION_MODE
    model: str | None = None
    max_sessions: int = DEFAULT_MAX_SESSIONS
    ask_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Spawn:
    """What a new session is asked to be; None stands for the daemon's default."""

    directory: str | None = None
    session_id: str | None = None
    permission_mode: str | None = None
    model: str | None = None
    text: str | None = None
    message_id: str | None = None
    ask: bool = False


class Launcher:
    """Decides what is started for a session."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._looks: dict[Path, asyncio.Future[bool]] = {}

    async def reach(self, directory: str | None) -> None:
        """Wait until a directory answers, whatever it says, so that `spawn` and `resume` need not. Raises TryAgain.

        However often it is asked for, one that hangs takes one thread.
        """
        path = self._settings.default_dir / (directory or "")
        if (look := self._looks.get(path)) is None:
            look = asyncio.get_running_loop().run_in_executor(_threads, os.access, path, os.F_OK)
            self._looks[path] = look
            look.add_done_callback(lambda look: self._seen(path, look))
        done, _ = await asyncio.wait([look], timeout=REACH_SECONDS)
        if not done:
            raise TryAgain(f"Directory does not answer: {path}")

    def _seen(self, path: Path, look: "asyncio.Future[bool]") -> None:
        del self._looks[path]
        if not look.cancelled():
            look.exception()  # marks it as seen: it comes again when the directory is checked

    def spawn(self, spawn: Spawn, session_id: str) -> Launch:
        """Give what to start for a new session. Raises DataError, Refused or Unavailable."""
        mode = spawn.permission_mode or self._settings.permission_mode
        if mode not in PERMISSION_MODES:
            raise DataError(f"permissionMode is none of {', '.join(PERMISSION_MODES)}")
        directory = self._check_directory(spawn.directory)
        return Launch(
            executable=self._settings.find_claude(),
            directory=directory,
            permission_mode=mode,
            claude_id=_claude_id(session_id),
            model=spawn.model or self._settings.model,
            ask=spawn.ask,
        )

    def resume(self, info: Info) -> Launch:
        """Give what to start for a session that had a claude before; raises as `spawn`."""
        if info.permission_mode == "bypassPermissions":
            # Whoever wants a session without any questions again has to say so again.
            info.permission_mode = "default"
        known = has_conversation(info.claude_id, os.environ)
        return Launch(
            executable=self._settings.find_claude(),
            directory=self._check_directory(info.directory),
            permission_mode=info.permission_mode,
            claude_id=info.claude_id,
            model=info.model,
            ask=info.ask,
            resume=info.begun if known is None else known,
        )

    def _check_directory(self, directory: str | None) -> Path:
        """Give the real path of a directory in which a session may run. Raises DataError or Refused."""
        path = self._settings.default_dir / (directory or "")
        real = Path(os.path.realpath(path))
        root = self._settings.root_dir
        # Before anything else is said: who may not go there shall not learn what is there.
        if root is not None and not real.is_relative_to(root):
            raise Refused("Directory is outside the root directory")
        # A link that leads to itself ends the resolving: `loop/../link` would leave a link that nobody has followed.
        if not os.access(real, os.F_OK) or os.path.realpath(real) != str(real):
            raise DataError(f"Directory does not exist: {path}")
        if not real.is_dir():
            raise DataError(f"Not a directory: {path}")
        if not os.access(real, os.R_OK | os.X_OK):
            raise Refused(f"Permission denied: {path}")
        return real


def _claude_id(session_id: str) -> str:
    """Give the UUID for Claude: the session's own id if it is one, else a new one, which session.json keeps."""
    try:
        return str(uuid.UUID(session_id))
    except ValueError:
        return str(uuid.uuid4())
