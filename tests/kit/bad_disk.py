"""A disk under all journals that is full, or fails, while a test wants it so."""

import errno
import os

import pytest

from p2pclaude.sessions import journal as journal_module
from p2pclaude.sessions import session as session_module
from p2pclaude.sessions.journalfile import DiskFull, JournalFile

RETRY_SECONDS = 0.01


class BadDisk:
    """It takes everything until it is told to be full (nothing can be written), or what error a sync has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        self.sync_error: int | None = None
        write, sync = JournalFile._write, os.fdatasync

        def write_if_room(file: JournalFile, data: bytes, start: int) -> None:
            if self.is_full:
                raise DiskFull(os.strerror(errno.ENOSPC))
            write(file, data, start)

        def sync_if_sound(descriptor: int) -> None:
            if self.sync_error is not None:
                raise OSError(self.sync_error, os.strerror(self.sync_error))
            sync(descriptor)

        monkeypatch.setattr(JournalFile, "_write", write_if_room)
        monkeypatch.setattr(os, "fdatasync", sync_if_sound)
        for module in (journal_module, session_module):
            monkeypatch.setattr(module, "RETRY_SECONDS", RETRY_SECONDS)

    def mend(self) -> None:
        """Let it be as good as new."""
        self.is_full, self.sync_error = False, None
