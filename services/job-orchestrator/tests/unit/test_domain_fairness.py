"""Who is next."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.fairness import Clock, Credit, give, order, room, wake
from job_orchestrator.testing import chunk


def queue(user: int, *estimates: float) -> list[Chunk]:
    return [
        chunk(id=f"{user}-{turn}", user_id=user, turn=turn, estimate=estimate)
        for turn, estimate in enumerate(estimates)
    ]


def active(**times: float) -> dict[int, Clock]:
    return {int(user[1:]): Clock(int(user[1:]), time, active=True) for user, time in times.items()}


def test_the_user_who_is_behind_goes_first() -> None:
    """Slots are due to the lowest clock; its chunks move it on until another is lower."""
    picked = order(active(u1=0.0, u2=5.0), {1: queue(1, 3, 3, 3), 2: queue(2, 3, 3)})
    assert [each.id for each in picked] == ["1-0", "1-1", "2-0", "1-2", "2-1"]


def test_a_users_own_chunks_keep_their_order() -> None:
    """Within a user the turn decides."""
    picked = order(active(u1=0.0), {1: queue(1, 9, 1, 5)})
    assert [each.id for each in picked] == ["1-0", "1-1", "1-2"]


def test_one_with_many_chunks_does_not_starve_one_with_few() -> None:
    """A user with one chunk gets it done second, however many another user has queued."""
    picked = list(islice(order(active(u1=0.0, u2=0.0), {1: queue(1, *[5] * 1_000), 2: queue(2, 5)}), 2))
    assert {each.user_id for each in picked} == {1, 2}


def test_slot_time_is_shared_not_chunks() -> None:
    """Of two users, one with chunks ten times as long, each gets about half of the time."""
    queues = {1: queue(1, *[10.0] * 100), 2: queue(2, *[1.0] * 1_000)}
    time: dict[int, float] = defaultdict(float)
    for each in order(active(u1=0.0, u2=0.0), queues):
        time[each.user_id] += each.estimate
        if sum(time.values()) >= 500:
            break
    assert time[1] == pytest.approx(time[2], abs=10.0)


def test_nobody_saves_up_time_by_waiting() -> None:
    """One who comes back from idle starts where the neediest active user stands, not where it stopped."""
    clocks = {1: Clock(1, 100.0, active=True), 2: Clock(2, 90.0, active=True), 3: Clock(3, 5.0)}
    awake = wake(clocks, [1, 3, 4])
    assert awake == {
        1: Clock(1, 100.0, active=True),
        3: Clock(3, 90.0, active=True),
        4: Clock(4, 90.0, active=True),
    }


def test_nobody_loses_by_waiting_either() -> None:
    """One who had used more than the others is not set back by coming again."""
    assert wake({1: Clock(1, 10.0, active=True), 3: Clock(3, 50.0)}, [3])[3] == Clock(3, 50.0, active=True)
    assert wake({3: Clock(3, 50.0)}, [3])[3] == Clock(3, 50.0, active=True)
    assert wake({}, [3])[3] == Clock(3, 0.0, active=True)


@given(
    real=st.lists(st.floats(0.1, 20), min_size=2, max_size=5),
    guessed=st.floats(0.1, 20),
)
def test_the_clocks_correction_makes_guesses_right(real: list[float], guessed: float) -> None:
    """With the same wrong estimate for all, users whose chunks really take different times still share the time."""
    clocks = {user: Clock(user, 0.0, active=True) for user in range(len(real))}
    used: Counter[int] = Counter()
    for turn in islice(count(), 500):
        queues = {user: [chunk(id=f"{user}-{turn}", user_id=user, estimate=guessed)] for user in clocks}
        user = next(iter(order(clocks, queues))).user_id
        used[user] += 1
        charged_then_corrected = clocks[user].time + guessed + (real[user] - guessed)
        clocks[user] = replace(clocks[user], time=charged_then_corrected)
    times = [used[user] * seconds for user, seconds in enumerate(real)]
    assert max(times) - min(times) <= 2 * max(real) + 0.001


def test_a_worker_gets_a_chunk_for_each_slot() -> None:
    """A worker has room while it holds fewer chunks than slots, however long they are; one that leaves has none."""
    credit = Credit("w-1", 2, raw=False, partition=0)
    (long,) = queue(1, 100.0)
    assert room(credit, long)
    assert room(give(credit, long), long)
    assert not room(give(give(credit, long), long), long)
    assert not room(Credit("w-1", 0, raw=False, partition=0), long)


def test_tiny_chunks_are_given_ahead() -> None:
    """Beyond its slots a worker gets up to two seconds of work."""
    credit = Credit("w-1", 1, raw=False, partition=0)
    tiny = queue(1, *[0.4] * 20)
    given = 0
    while room(credit, tiny[given]):
        credit = give(credit, tiny[given])
        given += 1
    assert given == 1 + 5
