"""Permission requests without a session: what is passed on or refused, what Claude is told, what is remembered."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pclaude.errors import DataError, NoSession, Refused
from p2pclaude.protocol import permissions
from p2pclaude.protocol.permissions import Answer, Book, Cancel, History, Refusal, Request, decode_answer, version_of

# As the real CLI printed it.
ASKED: dict[str, Any] = {
    "type": "control_request",
    "request_id": "f9b6cf29-99bf-4c24-a62b-ad94df92461d",
    "request": {
        "subtype": "can_use_tool",
        "tool_name": "Bash",
        "display_name": "Bash",
        "input": {"command": "touch a1", "description": "run a command"},
        "description": "run a command",
        "permission_suggestions": [{"type": "setMode", "mode": "acceptEdits", "destination": "session"}],
        "blocked_path": "/home/user/a1",
        "tool_use_id": "toolu_00010",
    },
}
QUESTIONS = [
    {"question": "Which colour?", "header": "Colour", "multiSelect": False, "options": [{"label": "red"}]},
    {"question": "Which sizes?", "header": "Sizes", "multiSelect": True, "options": [{"label": "L"}, {"label": "M"}]},
]


def asked(request_id: str = "r", **changes: Any) -> dict[str, Any]:
    """Give a request like Claude's with some fields changed."""
    return {**ASKED, "request_id": request_id, "request": {**ASKED["request"], **changes}}


def take(book: Book, value: dict[str, Any], now_ms: int = 7) -> Any:
    return book.receive(value, len(json.dumps(value)), now_ms)


def pending(book: Book, request_id: str = "r") -> Request:
    """Make a request pending."""
    request = take(book, asked(request_id))
    assert isinstance(request, Request)
    book.add(request)
    return request


def test_what_whoever_decides_is_shown() -> None:
    request = take(Book(asks=True), ASKED)
    assert isinstance(request, Request)
    assert request.describe("s", "/srv") == {
        "sessionId": "s",
        "requestId": "f9b6cf29-99bf-4c24-a62b-ad94df92461d",
        "createdAt": 7,
        "directory": "/srv",
        "toolName": "Bash",
        "input": {"command": "touch a1", "description": "run a command"},
        "description": "run a command",
        "blockedPath": "/home/user/a1",
        "toolUseId": "toolu_00010",
        "suggestions": [{"type": "setMode", "mode": "acceptEdits", "destination": "session"}],
    }


def test_what_claude_is_told() -> None:
    request = pending(Book(asks=True))

    def told(answer: Answer) -> Any:
        reply = answer.reply(request)
        assert reply["type"] == "control_response"
        assert (reply["response"]["subtype"], reply["response"]["request_id"]) == ("success", "r")
        return reply["response"]["response"]

    assert told(Answer("allow")) == {"behavior": "allow", "updatedInput": ASKED["request"]["input"]}
    assert told(Answer("allow", {"command": "ls"}, [{"type": "setMode"}])) == {
        "behavior": "allow",
        "updatedInput": {"command": "ls"},
        "updatedPermissions": [{"type": "setMode"}],
    }
    assert told(Answer("deny")) == {"behavior": "deny", "message": "Denied"}
    assert told(Answer("deny", message="no", interrupt=True)) == {
        "behavior": "deny",
        "message": "no",
        "interrupt": True,
    }


def error_of(refusal: object) -> str:
    """Give the error that Claude is told."""
    assert isinstance(refusal, Refusal)
    assert refusal.reply is not None
    assert refusal.reply["response"]["subtype"] == "error"
    assert refusal.reply["response"]["request_id"] == "r"
    return str(refusal.reply["response"]["error"])


@pytest.mark.parametrize(
    "request_",
    [None, [], "x", {}, {"subtype": None}, {"subtype": "hook_callback", "input": {}}, {"subtype": ["can_use_tool"]}],
)
def test_an_unknown_control_request_gets_an_error(request_: object) -> None:
    value = {"type": "control_request", "request_id": "r", "request": request_}
    assert "unknown control request" in error_of(take(Book(asks=True), value))


@pytest.mark.parametrize(
    "changes",
    [{"tool_name": None}, {"tool_name": ""}, {"tool_name": "x" * 257}, {"input": None}, {"input": ["ls"]}],
)
def test_a_malformed_permission_request_gets_an_error(changes: dict[str, Any]) -> None:
    book = Book(asks=True)
    assert "without a tool and its input" in error_of(take(book, asked(**changes)))
    assert not book.knows("r")


@pytest.mark.parametrize("request_id", [None, "", 5, "x" * 257, ["r"], {}])
def test_a_request_without_a_usable_id_cannot_be_answered(request_id: Any) -> None:
    refusal = take(Book(asks=True), asked(request_id))
    assert isinstance(refusal, Refusal)
    assert refusal.reply is None


def test_a_session_that_does_not_ask_refuses() -> None:
    assert "does not ask" in error_of(take(Book(asks=False), asked()))


def test_too_much_is_denied_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permissions, "MAX_PENDING", 2)
    book = Book(asks=True)
    pending(book, "1")
    pending(book, "2")
    for refusal in (take(book, asked()), book.receive(asked(), permissions.MAX_REQUEST_BYTES + 1, 0)):
        assert isinstance(refusal, Refusal)
        assert refusal.reply is not None
        said = refusal.reply["response"]["response"]
        assert said["behavior"] == "deny"
        assert said["message"] == f"p2pclaude: {refusal.reason}"
    assert list(book.pending) == ["1", "2"]
    book.settle("1", "allow")
    assert isinstance(take(book, asked()), Request)


def test_claude_takes_a_request_back() -> None:
    book = Book(asks=True)
    cancel = {"type": "control_cancel_request", "request_id": "r"}
    assert take(book, cancel) is None
    pending(book)
    assert take(book, cancel) == Cancel("r")
    assert take(book, {**cancel, "request_id": ["r"]}) is None
    book.settle("r", "cancelled")
    assert take(book, cancel) is None


def test_a_repeated_id() -> None:
    book = Book(asks=True)
    pending(book)
    assert take(book, asked()) is None
    book.settle("r", "allow")
    assert "used before" in error_of(take(book, asked()))


def test_what_became_of_a_request() -> None:
    book = Book(asks=True)
    pending(book)
    book.settle("r", "deny", "mine")
    book.check_answered("r", "mine")
    for other in ("another", None):
        with pytest.raises(Refused, match=r"^Already answered: deny$"):
            book.check_answered("r", other)
    with pytest.raises(NoSession, match="Request not found"):
        book.check_answered("unknown", "mine")


def test_a_cancelled_request_is_nobodys_success() -> None:
    book = Book(asks=True)
    pending(book)
    book.settle("r", "cancelled")
    with pytest.raises(Refused, match="cancelled"):
        book.check_answered("r", None)


def test_outcomes_are_forgotten_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permissions, "MAX_ANSWERED", 3)
    book = Book(asks=True)
    for number in range(5):
        book.settle(str(number), "allow")
    assert [number for number in range(5) if book.knows(str(number))] == [2, 3, 4]


def test_a_journal_is_taken_up() -> None:
    history = History()
    for value in (
        {"type": "permission-request", "requestId": "1", "data": {}},
        {"type": "permission-request", "requestId": "2", "data": {}},
        {"type": "permission-request", "requestId": 5},
        {"type": "permission-answer", "requestId": "1", "behavior": "allow", "answerId": "a"},
        {"type": "permission-answer", "requestId": "0", "behavior": "deny", "answerId": 7},
        {"type": "permission-answer", "requestId": None},
        {"type": "turn", "requestId": "3"},
        {},
    ):
        history.learn(json.dumps(value).encode())
    assert list(history.unanswered) == ["2"]
    assert history.answered == {"1": ("allow", "a"), "0": ("deny", None)}


def test_answers_are_read() -> None:
    assert decode_answer({"behavior": "allow", "requestId": "r"}) == Answer("allow")
    whole = {"behavior": "allow", "updatedInput": {"a": 1}, "updatedPermissions": [{}]}
    answer = decode_answer(whole, answer_id="x")
    assert answer.fields() == {**whole, "answerId": "x"}
    denial = {"behavior": "deny", "message": "no", "interrupt": True}
    assert decode_answer(denial).fields() == denial


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "behavior must be allow or deny"),
        ({"behavior": "cancelled"}, "behavior must be"),
        ({"behavior": ["allow"]}, "behavior must be"),
        ({"behavior": "allow", "updatedInput": "ls"}, "updatedInput must be an object"),
        ({"behavior": "allow", "answers": ["red"]}, "answers must be an object"),
        ({"behavior": "allow", "updatedPermissions": {}}, "updatedPermissions must be a list"),
        ({"behavior": "allow", "updatedPermissions": ["x"]}, "updatedPermissions must be a list"),
        ({"behavior": "deny", "message": 5}, "message must be text"),
        ({"behavior": "deny", "interrupt": 1}, "interrupt must be true or false"),
        ({"behavior": "deny", "updatedInput": {}}, "must be allow with updatedInput"),
        ({"behavior": "allow", "interrupt": True}, "must be deny with interrupt"),
        ({"behavior": "allow", "updatedInput": {}, "answers": {}}, "must be left out with answers"),
    ],
)
def test_what_is_wrong_with_an_answer(value: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        decode_answer(value)


def question(answers: dict[str, Any]) -> Answer:
    request = take(Book(asks=True), asked(tool_name="AskUserQuestion", input={"questions": QUESTIONS}))
    assert isinstance(request, Request)
    return decode_answer({"behavior": "allow", "answers": answers}).complete(request)


def test_a_question_is_answered() -> None:
    answer = question({"Which colour?": "red", "Which sizes?": ["L", "M"]})
    assert answer.updated_input == {
        "questions": QUESTIONS,
        "answers": {"Which colour?": "red", "Which sizes?": "L, M"},
    }
    assert "answers" not in answer.fields()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({}, "must be an answer"),
        ({"Which?": "red"}, "not to 'Which\\?'"),
        ({"Which colour?": 5}, "must be text"),
        ({"Which colour?": ["red", None]}, "must be text"),
    ],
)
def test_what_is_no_answer_to_the_question(answers: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        question(answers)


@pytest.mark.parametrize("given_", [{}, {"questions": None}, {"questions": ["x", {"question": 5}]}])
def test_a_malformed_question_has_no_answer(given_: dict[str, Any]) -> None:
    request = take(Book(asks=True), asked(tool_name="AskUserQuestion", input=given_))
    with pytest.raises(DataError, match="question"):
        Answer("allow", answers={"Which?": "red"}).complete(request)


def test_only_questions_have_answers() -> None:
    request = take(Book(asks=True), asked())
    with pytest.raises(DataError, match="Bash must be answered with behavior"):
        Answer("allow", answers={"a": "b"}).complete(request)


def test_the_version_names_the_set() -> None:
    assert version_of([("a", "1"), ("b", "2")]) == version_of([("b", "2"), ("a", "1")])
    sets: list[list[tuple[str, str]]] = [[], [("a", "1")], [("a", "2")], [("a1", "")], [("a", "1"), ("b", "2")]]
    assert len({version_of(one) for one in sets}) == len(sets)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
some_request = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["control_request", "control_cancel_request", "control_response", "x"]) | json_values,
        "request_id": st.sampled_from(["r", "q"]) | json_values,
        "request": st.fixed_dictionaries(
            {},
            optional={
                "subtype": st.just("can_use_tool") | json_values,
                "tool_name": st.just("Bash") | json_values,
                "input": st.just({"a": 1}) | json_values,
                "permission_suggestions": json_values,
                "decision_reason": json_values,
            },
        )
        | json_values,
    },
)


@given(st.lists(some_request, max_size=6))
def test_anything_is_passed_on_refused_or_ignored(values: list[dict[str, Any]]) -> None:
    book = Book(asks=True)
    for value in values:
        outcome = take(book, value)
        if isinstance(outcome, Request):
            book.add(outcome)
            json.dumps(outcome.describe("s", "/"))
        elif isinstance(outcome, Cancel):
            book.settle(outcome.request_id, "cancelled")


@given(
    st.dictionaries(
        st.sampled_from(["behavior", "updatedInput", "updatedPermissions", "message", "interrupt", "answers"]),
        st.sampled_from(["allow", "deny"]) | json_values,
    )
)
def test_any_answer_is_one_or_a_data_error(value: dict[str, Any]) -> None:
    request = take(Book(asks=True), asked(tool_name="AskUserQuestion", input={"questions": QUESTIONS}))
    try:
        json.dumps(decode_answer(value).complete(request).reply(request))
    except DataError:
        pass


def test_a_request_of_the_largest_size_is_passed_on() -> None:
    book = Book(asks=True)
    assert isinstance(book.receive(asked("a"), permissions.MAX_REQUEST_BYTES, 7), Request)
    assert isinstance(book.receive(asked("b"), permissions.MAX_REQUEST_BYTES + 1, 7), Refusal)


def test_requests_are_equal_whichever_came_first() -> None:
    first, second = (Request("r", "Bash", {}, {}, 1) for _ in range(2))
    assert first == second and first.number < second.number


def test_what_ends_a_turn() -> None:
    said = {"type": "control_request", "request_id": "x", "request": {"subtype": "interrupt"}}
    assert permissions.interrupt_request("x") == said


def test_the_name_of_a_set_has_sixteen_digits_and_no_order() -> None:
    name = version_of([("s", "a"), ("t", "b")])
    assert len(name) == 16 and name == version_of([("t", "b"), ("s", "a")]) != version_of([("s", "a")])
