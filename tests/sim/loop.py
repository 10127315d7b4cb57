"""Virtual time: an asyncio event loop that jumps its clock to the next timer instead of waiting for it.

`run` drives a test's coroutine on a fresh `SimLoop`; the network of `sim.network` puts its packets on the
loop's heap. Nothing here touches a socket, a thread or a clock (but the processor's, as a guard against tests that
never end, which no busy machine spoils), so a seed replays exactly.
"""

import asyncio
import gc
import heapq
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_GRACE_STEPS = 20  # loop turns that tasks cancelled at the very end may take to finish


class SimulationError(Exception):
    """Something a simulation must not do: wait for ever, leak, swallow an exception, or touch the real world."""


class SimLoop(asyncio.BaseEventLoop):
    """Run callbacks in virtual time, which starts at 0.0 seconds and only moves when nothing is left to do.

    Raises SimulationError out of `run_until_complete` when nothing at all is scheduled (a deadlock), when
    `time_limit` virtual seconds have passed, or after `cpu_limit` of the processor's.
    """

    # Names of BaseEventLoop that its type stubs leave out.
    _scheduled: list[asyncio.TimerHandle]
    _selector: "_Clock"
    _clock_resolution: float

    def __init__(self, *, time_limit: float = 86_400.0, cpu_limit: float = 60.0) -> None:
        super().__init__()
        self.now = 0.0
        self.time_limit = time_limit
        self.swallowed: list[dict[str, Any]] = []
        self._posts: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._post_count = 0
        self._selector = _Clock(self, time.process_time() + cpu_limit)
        self._clock_resolution = 1e-9
        self.set_exception_handler(lambda _loop, context: self.swallowed.append(context))

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now

    def post(self, when: float, callback: Callable[[Any], None], argument: object) -> None:
        """Call `callback(argument)` at `when`: a timer that cannot be cancelled and costs a fraction of `call_at`."""
        self._post_count += 1
        heapq.heappush(self._posts, (when, self._post_count, callback, argument))

    def jump(self, seconds: float) -> None:
        """Move the clock at once, as when the machine wakes from sleep: everything due meanwhile fires late."""
        self.now += seconds

    def next_event_at(self) -> float | None:
        """Return when the next timer or post is due, None when there is none."""
        timer = self._scheduled[0].when() if self._scheduled else None
        post = self._posts[0][0] if self._posts else None
        if timer is None or post is None:
            return post if timer is None else timer
        return min(timer, post)

    def extend_limits(self, *, virtual: float = 3600.0, real: float = 5.0) -> None:
        """Allow that much more time from now on, for cleaning up after a limit was hit."""
        self.time_limit = max(self.time_limit, self.now + virtual)
        self._selector.cpu_end = max(self._selector.cpu_end, time.process_time() + real)

    def pending_timers(self) -> list[asyncio.TimerHandle]:
        """Return the timers that are scheduled and not cancelled."""
        return [handle for handle in self._scheduled if not handle.cancelled()]

    def run_in_executor(self, *_args: object) -> NoReturn:
        """Refuse: a thread would run in real time."""
        raise SimulationError("a thread was asked for (run_in_executor); threads are not simulated")

    async def getaddrinfo(self, *_args: object, **_options: object) -> NoReturn:
        """Refuse: names are resolved by the simulated network."""
        raise SimulationError("getaddrinfo was called; names are resolved by Network.resolve")

    async def create_datagram_endpoint(self, *_args: object, **_options: object) -> NoReturn:
        """Refuse: sockets come from the simulated network."""
        raise SimulationError("a real socket was asked for; use Network.bind")

    create_connection = create_datagram_endpoint
    create_server = create_datagram_endpoint
    subprocess_exec = create_datagram_endpoint
    subprocess_shell = create_datagram_endpoint

    def _write_to_self(self) -> NoReturn:
        raise SimulationError("call_soon_threadsafe was called; threads are not simulated")

    def _process_events(self, events: "Iterable[tuple[Callable[[Any], None], Any]]") -> None:
        for callback, argument in events:
            try:
                callback(argument)
            except Exception as error:
                self.call_exception_handler({"message": f"exception in {callback!r}", "exception": error})


class _Clock:
    """Stands where the selector stands: to wait is to jump ahead, and what becomes readable is what was posted."""

    def __init__(self, loop: SimLoop, cpu_end: float) -> None:
        self.loop = loop
        self.cpu_end = cpu_end
        self.turns = 0

    def select(self, timeout: float | None) -> "Iterable[tuple[Callable[[Any], None], Any]]":
        self.turns += 1
        if self.turns % 1000 == 0 and time.process_time() > self.cpu_end:
            raise SimulationError(f"out of processor time at {self.loop.now:.3f} s of virtual time, turn {self.turns}")
        if timeout != 0:
            self._jump_to_next_event()
        return self._due()

    def _jump_to_next_event(self) -> None:
        loop = self.loop
        when = loop.next_event_at()
        if when is None:
            raise SimulationError(f"deadlock at {loop.now:.3f} s: nothing is scheduled\n{describe_tasks(loop)}")
        loop.now = max(loop.now, when)
        if loop.now > loop.time_limit:
            raise SimulationError(f"still running after {loop.time_limit:g} s\n{describe_tasks(loop)}")

    def _due(self) -> "Iterable[tuple[Callable[[Any], None], Any]]":
        # A generator, so that what a post posts for this very instant (a NAT handing a packet on) is still seen.
        loop, posts = self.loop, self.loop._posts
        while posts and posts[0][0] <= loop.now:
            _, _, callback, argument = heapq.heappop(posts)
            yield callback, argument

    def close(self) -> None:
        """Match the selector's interface."""


def describe_tasks(loop: asyncio.AbstractEventLoop) -> str:
    """Return a line a pending task: its name and the chain of awaits it is stuck in."""
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    return "\n".join(f"  {task.get_name()}: {' > '.join(_await_chain(task))}" for task in tasks)


def _await_chain(task: "asyncio.Task[Any]") -> list[str]:
    steps: list[str] = []
    awaited: Any = task.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
        if frame is None:
            steps.append(type(awaited).__name__)
            break
        steps.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return steps


class _ErrorLog(logging.Handler):
    """Takes what the code under test caught and logged as an error: in a test that is a failure."""

    def __init__(self, loop: SimLoop) -> None:
        super().__init__(logging.ERROR)
        self.loop = loop

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.loop.swallowed.append({"message": f"logged: {record.getMessage()}", "exception": error})


def run(
    main: Coroutine[Any, Any, T],
    *,
    seed: object = None,
    time_limit: float = 86_400.0,
    cpu_limit: float = 60.0,
    check_timers: bool = False,
) -> T:
    """Run `main` in virtual time and return its result; fail on what it leaves behind.

    A task still running when `main` returns, an exception nobody saw (in a callback, in a task never awaited, or
    logged as an error) and, with `check_timers`, a timer still scheduled are SimulationErrors. `seed` is only
    printed, and noted on the error, when it fails.
    """
    loop = SimLoop(time_limit=time_limit, cpu_limit=cpu_limit)
    error_log = _ErrorLog(loop)
    logging.getLogger().addHandler(error_log)
    try:
        try:
            return _run(loop, main, check_timers)
        finally:
            _cancel_all(loop)
            loop.close()
            logging.getLogger().removeHandler(error_log)
    except BaseException as error:
        if seed is not None:
            print(f"simulation failed with seed {seed} at {loop.now:.6f} s of virtual time")
            error.add_note(f"simulation seed {seed}, virtual time {loop.now:.6f} s")
        for context in loop.swallowed:
            error.add_note(f"swallowed: {context['message']}: {context.get('exception')!r}")
        raise


def _run(loop: SimLoop, main: Coroutine[Any, Any, T], check_timers: bool) -> T:
    result = loop.run_until_complete(_finish(main))
    if tasks := describe_tasks(loop):
        raise SimulationError(f"tasks still running at the end:\n{tasks}")
    if check_timers and (timers := loop.pending_timers()):
        raise SimulationError(f"timers still scheduled at the end: {timers}")
    gc.collect()  # a task's lost exception is reported when the task is collected
    if loop.swallowed:
        context = loop.swallowed[0]
        raise SimulationError(f"an exception was swallowed: {context['message']}") from context.get("exception")
    return result


async def _finish(main: Coroutine[Any, Any, T]) -> T:
    result = await main
    for _ in range(_GRACE_STEPS):
        await asyncio.sleep(0)
    return result


def _cancel_all(loop: SimLoop) -> None:
    """Cancel what is left, so that no coroutine is destroyed while pending and hides the error that matters."""
    tasks = asyncio.all_tasks(loop)
    loop.extend_limits()
    for task in tasks:
        task.cancel()
    try:
        loop.run_until_complete(asyncio.wait_for(_gather(tasks), 60.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
    except (SimulationError, TimeoutError) as error:
        loop.swallowed.append({"message": "leftover tasks do not end when cancelled", "exception": error})


async def _gather(tasks: "Iterable[asyncio.Task[Any]]") -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
