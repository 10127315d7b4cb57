"""The dictionary that forgets, by hand and against a plain model."""

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pclaude.hyperdht.expiring import ExpiringMap

PROPERTY = settings(max_examples=100, derandomize=True, deadline=None)


def test_an_entry_lives_its_lifetime_from_the_last_set() -> None:
    store: ExpiringMap[str, int] = ExpiringMap(10, 60.0)
    store.set("a", 1, now=0.0)
    assert store.get("a", now=59.9) == 1
    assert store.get("a", now=60.0) is None
    store.set("a", 2, now=50.0)
    assert store.get("a", now=109.9) == 2
    assert store.get("a", now=110.0) is None
    assert store.get("b", now=0.0) is None


def test_expired_entries_are_dropped_and_reported() -> None:
    dropped: list[str] = []
    store: ExpiringMap[str, int] = ExpiringMap(10, 60.0, dropped.append)
    for i, name in enumerate("abc"):
        store.set(name, i, now=float(i))
    store.delete("b")
    store.set("a", 9, now=30.0)
    store.expire(now=62.0)
    assert dropped == ["c"]
    store.set("d", 1, now=95.0)
    assert dropped == ["c", "a"]
    assert len(store) == 1


def test_the_entry_longest_not_set_makes_room() -> None:
    dropped: list[str] = []
    store: ExpiringMap[str, int] = ExpiringMap(3, 60.0, dropped.append)
    for name in "abc":
        store.set(name, 0, now=0.0)
    store.set("a", 1, now=1.0)
    store.set("d", 1, now=1.0)
    assert dropped == ["b"]
    assert len(store) == 3


Steps = list[tuple[str, int, float]]
STEPS = st.lists(
    st.tuples(st.sampled_from(["set", "delete", "expire"]), st.integers(0, 9), st.floats(0, 30)), max_size=40
)


@PROPERTY
@given(STEPS)
def test_the_map_against_a_plain_model(steps: Steps) -> None:
    store: ExpiringMap[int, int] = ExpiringMap(5, 40.0)
    model: dict[int, tuple[float, int]] = {}
    now = 0.0
    for i, (what, name, wait) in enumerate(steps):
        now += wait
        if what == "set":
            store.set(name, i, now)
            model.pop(name, None)
            model[name] = (now + 40.0, i)
        elif what == "delete":
            assert store.delete(name) or name not in model or model[name][0] <= now
            model.pop(name, None)
        else:
            store.expire(now)
        model = dict([(n, e) for n, e in model.items() if now < e[0]][-5:])
        assert len(store) <= 5
        for n in range(10):
            assert store.get(n, now) == (model[n][1] if n in model else None)


def test_all_can_be_dropped_silently() -> None:
    dropped: list[str] = []
    store: ExpiringMap[str, int] = ExpiringMap(3, 60.0, dropped.append)
    store.set("a", 1, now=0.0)
    store.clear()
    assert len(store) == 0 and store.get("a", now=0.0) is None and not dropped
