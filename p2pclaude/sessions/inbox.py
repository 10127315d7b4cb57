"""The messages of one session, so that each runs exactly once: accepted -> handed to Claude -> done.

    journal                      here
    MESSAGE                      accepted: it waits
    TURN, synced                 handed: only then it is written to Claude's stdin
    a `result`, or TURN_CUT      done, or cut off; TURN_CUT with `again`: it waits once more

`message_life` has the table of what can happen to a message.

`session` stands above and keeps the journal; nothing here reads or writes but `Recovery`, which reads what a crash
left. Claude gives one result for each message it was handed, in their order, as long as it gets one message when it is
idle and at most one more, with priority "now", during a turn: that one ends the turn, which gets its result first. A
turn that Claude began by itself has a result too, which `wire.Results` tells apart; if it is such a turn that the
urgent message ends, Claude takes that one in before the one that waited for the turn's end, as the replays show.

What Claude knows after a crash, as measured with 2.1.197: a message stands in the transcript, under its uuid, 0.1 s
after Claude took it, and at once on SIGTERM; SIGKILL loses these 0.1 s, in which the Messages API is asked and a tool
may even have begun. When only the daemon dies (stdin ends, stdout breaks) Claude finishes its turn and its transcript.
Resuming runs nothing by itself, and a uuid that the transcript holds is ignored, without any result. So a message
that was handed and has no result is handed again only if neither the transcript knows it nor anything that Claude
printed in its turn shows that work had begun. The same holds for one that was found waiting when the journal was
opened: the journal may be a copy, of a backup or of another daemon, and the message have run from the original.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from p2pclaude.protocol.wire import MESSAGE, OUTPUT, REPLAY, TURN, TURN_CUT, Results, load_json
from p2pclaude.sessions.message_life import BEGUN, OVER, TAKEN, Happening, Stage, after

NOW = "now"
"""The priority of a message that is handed during a turn."""
MAX_ATTEMPTS = 3
"""How often a message is handed to a claude that dies before it begins; then its turn counts as cut off."""

_SAYS_NOTHING = ("system", "control_response")  # printed before work has begun, or beside it; a type may be anything


@dataclass(slots=True)
class Message:
    """One message on its way; `attempts` counts how often it was handed."""

    seq: int
    data: Mapping[str, Any]
    attempts: int = 0
    stage: Stage = Stage.WAITING

    def see(self, what: Happening) -> None:
        """Go where a happening leads."""
        self.stage = after(self.stage, what)

    @property
    def begun(self) -> bool:
        """Tell whether something that Claude printed shows that it works on the message."""
        return self.stage in BEGUN

    @property
    def taken(self) -> bool:
        """Tell whether Claude has said that it took the message in."""
        return self.stage in TAKEN

    @property
    def uuid(self) -> str:
        """Give the uuid by which Claude knows it."""
        return str(self.data.get("uuid"))

    @property
    def is_urgent(self) -> bool:
        """Tell whether it need not wait for the turn's end."""
        return self.data.get("priority") == NOW


class Inbox:
    """The messages that are not done, and the ids of all that were ever accepted."""

    def __init__(self) -> None:
        self.handed: deque[Message] = deque()
        """What Claude has, in the order in which it answers."""
        self.restored: list[Message] = []
        """What was found waiting in the journal, and may have run from another copy of it."""
        self._waiting: deque[Message] = deque()
        self._results = Results()
        self._seqs: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def seq_of(self, message_id: str) -> int | None:
        """Give the seq under which a message was accepted before."""
        return self._seqs.get(message_id)

    def is_done(self, seq: int) -> bool:
        """Tell whether an accepted message needs nothing more."""
        return not any(message.seq == seq for message in (*self._waiting, *self.handed))

    def accept(self, message_id: str, message: Message) -> None:
        """Take a message that stands in the journal."""
        self._seqs[message_id] = message.seq
        self._waiting.append(message)

    def next(self) -> Message | None:
        """Give the message to hand to Claude now: any if it is idle, an urgent one during a turn that has none yet."""
        if len(self.handed) > 1 or not self._waiting:
            return None
        urgent = next((message for message in self._waiting if message.is_urgent), None)
        return urgent if self.handed else urgent or self._waiting[0]

    def hand(self, message: Message) -> None:
        """Move a message to what Claude has."""
        self._waiting.remove(message)
        message.see(Happening.HANDED_OVER)
        message.attempts += 1
        self.handed.append(message)

    def turn_of(self, message: Message) -> dict[str, object]:
        """Give the fields of the TURN of a message that was handed, as they are when it is written."""
        first = self.handed[0] if self.handed else message
        fields: dict[str, object] = {"message": message.seq, "uuid": message.uuid}
        return fields if first is message else fields | {"steers": first.seq}

    def observe(self, value: Mapping[str, Any]) -> Message | None:
        """Take an object that Claude printed; give the message that it answers, if it is a `result`."""
        is_answer = self._results.is_answer(value)
        if not self.handed:
            return None
        if is_answer:
            answered = self.handed.popleft()
            answered.see(Happening.ANSWERED)
            return answered
        if Results.is_replay(value):
            self._take(value.get("uuid"))
        elif value.get("type") not in _SAYS_NOTHING:
            # Of a turn of Claude's own it says too much, which is safe.
            self.handed[0].see(Happening.OUTPUT)
        return None

    def _take(self, uuid: object) -> None:
        """Note which message Claude has taken in: it is answered before any that it has not."""
        for message in [one for one in self.handed if one.uuid == uuid]:
            message.see(Happening.REPLAYED)
            if not self.handed[0].taken:
                self.handed.remove(message)
                self.handed.appendleft(message)

    def drop(self, message: Message, *, again: bool) -> None:
        """End a message that gets no result; with `again` it waits once more, before all others."""
        (self.handed if message in self.handed else self._waiting).remove(message)
        message.see(Happening.HANDED_BACK if again else Happening.CUT)
        if message in self.restored:
            self.restored.remove(message)
        if again:
            self._waiting.appendleft(message)

    def check(self) -> None:
        """Assert that every message is in one place only, and that its stage says which."""
        everybody = [*self._waiting, *self.handed]
        assert len({message.seq for message in everybody}) == len(everybody)
        assert all(message.stage is Stage.WAITING for message in self._waiting)
        assert not any(message.stage is Stage.WAITING or message.stage in OVER for message in self.handed)
        assert all(message.attempts > 0 for message in self.handed)


class Recovery:
    """Makes an inbox from a journal: `learn` takes every envelope that is no output, in order; then `finish`.

    What it is given are JSON objects: `journalfile` gives a note instead of anything else.
    """

    def __init__(self) -> None:
        self._seqs: dict[str, int] = {}
        self._waiting: dict[int, None] = {}
        self._turns: list[tuple[int, int]] = []  # (seq of the TURN, of its message), the last one's chain
        self._attempts: dict[int, int] = {}  # of messages that may be handed again

    def learn(self, seq: int, line: bytes) -> None:
        """Take one envelope."""
        value = load_json(line)
        kind, message = value.get("type"), value.get("message")
        if kind == MESSAGE and isinstance(value.get("data"), dict):
            self._seqs[str(value.get("messageId"))] = seq
            self._waiting[seq] = None
        elif not isinstance(message, int):
            pass
        elif kind == TURN and message in self._waiting:
            del self._waiting[message]
            self._attempts[message] = self._attempts.get(message, 0) + 1
            # Claude was idle unless the turn was steered: all earlier ones had their results.
            self._turns = [*(self._turns if value.get("steers") is not None else []), (seq, message)]
        elif kind == TURN_CUT and (message in self._waiting or any(turn[1] == message for turn in self._turns)):
            self._turns = [turn for turn in self._turns if turn[1] != message]
            self._waiting.pop(message, None)  # it has no TURN if that found no room
            if value.get("again") is True:
                self._waiting = {message: None} | self._waiting

    def finish(self, read: Callable[[int], bytes], last_seq: int) -> Inbox:
        """Give the inbox. `read` gives an envelope by its seq; what came after the last TURN is read, one at a time."""
        inbox = Inbox()
        inbox._seqs = self._seqs
        inbox._waiting = deque(filter(None, (self._message(read, seq) for seq in self._waiting)))
        inbox.restored = list(inbox._waiting)
        turns = deque(self._turns)
        for seq in range(turns[0][0] if turns else last_seq + 1, last_seq + 1):
            while turns and turns[0][0] <= seq:
                turn = turns.popleft()
                if (message := self._message(read, turn[1])) is not None:
                    message.see(Happening.HANDED_OVER)
                    inbox.handed.append(message)
            value = load_json(read(seq)) if inbox.handed else {}
            if value.get("type") in (OUTPUT, REPLAY) and isinstance(value.get("data"), dict):
                inbox.observe(value["data"])
        return inbox

    def _message(self, read: Callable[[int], bytes], seq: int) -> Message | None:
        try:
            value = load_json(read(seq))
        except IndexError:
            return None
        is_message = value.get("type") == MESSAGE and value.get("seq") == seq and isinstance(value.get("data"), dict)
        return Message(seq, value["data"], attempts=self._attempts.get(seq, 0)) if is_message else None
