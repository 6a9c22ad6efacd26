"""The choice of the next chunk."""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count, islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job_orchestrator.domain import plan
from job_orchestrator.domain.fairness import (
    AHEAD_SECONDS,
    Account,
    Accounts,
    Candidate,
    Credit,
    Held,
    Round,
    fill,
    has_room,
    occupied,
    tags,
    wake,
)
from job_orchestrator_testing import scan_job, scan_policy
from job_orchestrator_testing.builders import THEN
from scanfleet.contracts.messages import FencingToken
from scanfleet.scanning.policy import BATCH_SECONDS


def candidate(id_: str = "1-0", user: int = 1, estimate: float = 5.0, **changed: Any) -> Candidate:
    fields: dict[str, Any] = {"job_id": user, "needs_raw": False, "first_address": id_}
    return Candidate(id_, user, estimate=estimate, **(fields | changed))


def queue(user: int, *estimates: float) -> list[Candidate]:
    return [candidate(f"{user}-{turn}", user, estimate) for turn, estimate in enumerate(estimates)]


def credit(name: str = "w-1", slots: int = 2, **changed: Any) -> Credit:
    fields: dict[str, Any] = {"instance": name, "raw": False, "partition": 0}
    return Credit(name, slots=slots, **(fields | changed))


def held(user: int = 1, worker: str = "w-1", id_: str = "1-0", **changed: Any) -> Held:
    fields: dict[str, Any] = {
        "partition": 0,
        "estimate": 5.0,
        "share": 1.0,
        "dispatched_at": THEN,
    }
    return Held(FencingToken(user, id_, 1, worker), user_id=user, **(fields | changed))


def picks(
    workers: list[Credit],
    times: dict[int, float],
    queues: dict[int, list[Candidate]],
    *,
    occupied_: dict[int, float] | None = None,
    fleet: list[Credit] | None = None,
) -> list[tuple[str, str]]:
    round_ = Round(workers, times, occupied_ or {}, workers if fleet is None else fleet)
    return [(each.chunk_id, worker.worker_id) for each, worker, _ in round_.picks(queues)]


def ids(found: list[tuple[str, str]]) -> list[str]:
    return [chunk_id for chunk_id, _ in found]


class Name(str):
    """The name of an instance, which counts how often one is looked up or added in a set."""

    __slots__ = ()
    counted = 0

    def __hash__(self) -> int:
        Name.counted += 1
        return super().__hash__()


@pytest.mark.parametrize("failures", [0, 20, 500])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.proves("G17", "G20", "A25")
def test_cost_of_a_round_follows_the_failures_of_its_chunks(failures: int, *, raw: bool) -> None:
    """A round over 500 workers looks at each of them once, and for each of 128 chunks at those that failed it and one more."""
    workers = [credit(name, instance=Name(name), raw=raw) for name in map("w{}".format, range(500))]
    names = tuple(worker.instance for worker in workers[:failures])
    chunks = [candidate(f"1-{number}", needs_raw=raw, failed_by=names, no_route=names) for number in range(128)]
    fleet = [*workers, credit("other", raw=raw, slots=0)]
    before = Name.counted
    assert len(picks(workers, {1: 0.0}, {1: chunks}, fleet=fleet)) == (128 if failures < 500 else 0)
    in_sets = 2 * (failures * 128 + 500)
    assert Name.counted - before <= in_sets + (failures + 1) * 128


# Accounts


def test_user_after_idling_starts_at_the_global_time() -> None:
    """Idle time is not saved up: a user who waits again starts at the global virtual time, not at the old one."""
    accounts = Accounts({1: Account(1, 100.0, active=True), 3: Account(3, 5.0)}, virtual=90.0)
    assert wake(accounts, [1, 3, 4]) == {
        1: Account(1, 100.0, active=True),
        3: Account(3, 90.0, active=True),
        4: Account(4, 90.0, active=True),
    }


def test_active_user_is_not_raised() -> None:
    """A waiting user whose virtual time is below the global time is not raised to it."""
    assert wake(Accounts({1: Account(1, 10.0, active=True)}, virtual=50.0), [1])[1] == Account(1, 10.0, active=True)


def test_held_chunks_count_their_estimate_then_their_elapsed_time() -> None:
    """A chunk that is held adds its estimate, and beyond that its elapsed time, each by its share of a slot."""
    accounts = {1: Account(1, 10.0), 2: Account(2, 20.0), 3: Account(3, 0.0)}
    chunks = [held(1), held(2, share=0.5), held(2, dispatched_at=None), held(9)]
    assert tags(accounts, chunks, THEN + timedelta(seconds=2)) == {1: 15.0, 2: 20 + 2.5 + 5, 3: 0.0}
    assert tags(accounts, chunks, THEN + timedelta(seconds=60)) == {1: 70.0, 2: 20 + 30 + 5, 3: 0.0}


def test_occupied_slots_are_shares_on_all_workers() -> None:
    """Each user occupies the shares of their held chunks, on any worker."""
    assert occupied([held(1), held(1, share=0.25), held(2, "w-2"), held(1, "w-3")]) == {1: 2.25, 2: 1.0}


def test_share_of_the_fleet_counts_full_workers() -> None:
    """A user with more than their share of all slots gets no slot of the worker that has room while another user waits."""
    workers = [credit("w-1", slots=8, held=8), credit("w-2", slots=8, held=3)]
    queues = {1: queue(1, *[5] * 8), 2: queue(2, *[5] * 8)}
    found = picks(workers[1:], {1: 0.0, 2: 100.0}, queues, occupied_={1: 11.0}, fleet=workers)
    assert ids(found) == [f"2-{number}" for number in range(5)]


# Order


def test_user_with_the_lowest_time_is_served_first() -> None:
    """The user with the lowest time gets the next slot, and the user's chunks raise the time until another's is lower."""
    queues = {1: queue(1, 3, 3, 3), 2: queue(2, 3, 3)}
    assert ids(picks([credit(slots=5)], {1: 0.0, 2: 5.0}, queues)) == ["1-0", "1-1", "2-0", "1-2", "2-1"]


def test_users_own_chunks_keep_their_order() -> None:
    """Within a user the queue decides."""
    assert ids(picks([credit(slots=3)], {1: 0.0}, {1: queue(1, 9, 1, 5)})) == ["1-0", "1-1", "1-2"]


def test_user_with_many_chunks_does_not_starve_others() -> None:
    """A user with one chunk is served second, whatever number another user has queued."""
    found = picks([credit(slots=2)], {1: 0.0, 2: 0.0}, {1: queue(1, *[5] * 1_000), 2: queue(2, 5)})
    assert ids(found) == ["1-0", "2-0"]


def test_slot_time_is_shared_not_chunks() -> None:
    """Of two users, one with chunks ten times as long, each gets about half of the time."""
    round_ = Round([credit(slots=10_000)], {1: 0.0, 2: 0.0}, {}, [credit(slots=10_000)])
    time: dict[int, float] = defaultdict(float)
    for each, _, share in round_.picks({1: queue(1, *[10.0] * 100), 2: queue(2, *[1.0] * 1_000)}):
        time[each.user_id] += each.estimate * share
        if sum(time.values()) >= 500:
            break
    assert time[1] == pytest.approx(time[2], abs=10.0)


def test_global_time_rises_to_the_served_user() -> None:
    """It is the highest time at which a chunk was given."""
    round_ = Round([credit(slots=3)], {1: 7.0, 2: 9.0}, {}, [credit(slots=3)])
    assert round_.virtual == 0.0
    list(round_.picks({1: queue(1, 1.0), 2: queue(2, 4.0, 1.0)}))
    assert round_.virtual == 13.0


@given(real=st.lists(st.floats(0.1, 20), min_size=2, max_size=5), guessed=st.floats(0.1, 20))
def test_wrong_estimates_do_not_change_the_shares(real: list[float], guessed: float) -> None:
    """With one wrong estimate for all, users whose chunks really take different times still share the time."""
    times = dict.fromkeys(range(len(real)), 0.0)
    used: Counter[int] = Counter()
    for _ in range(100):
        queues = {user: queue(user, guessed) for user in times}
        ((chunk, _),) = picks([credit(slots=1)], times, queues)[:1]
        user = int(chunk.partition("-")[0])
        used[user] += 1
        times[user] += real[user]
    assert max(times.values()) - min(times.values()) <= max(real) + 0.001


# Workers


def test_worker_gets_a_chunk_for_each_slot() -> None:
    """A worker has room while it holds fewer chunks than slots, however long they are; one without slots has none."""
    assert ids(picks([credit(slots=2)], {1: 0.0}, {1: queue(1, 100, 100, 100)})) == ["1-0", "1-1"]
    assert picks([credit(slots=0)], {1: 0.0}, {1: queue(1, 0.1)}) == []
    assert [has_room(fill(credit(slots=2), [held(estimate=2.0)] * number, THEN)) for number in (0, 1, 2, 3)] == [
        True,
        True,
        True,
        False,
    ]
    assert not has_room(credit(slots=0))


def test_tiny_chunks_are_given_ahead() -> None:
    """Beyond its slots a worker gets up to two seconds of work, and each of them shares its slots."""
    full = credit(slots=1, held=1)
    round_ = Round([full], {1: 0.0}, {}, [full])
    given_ = list(round_.picks({1: queue(1, *[0.4] * 20)}))
    assert len(given_) == AHEAD_SECONDS / 0.4
    assert [share for _, _, share in given_[:2]] == [0.5, pytest.approx(1 / 3)]


def test_chunks_that_share_a_starting_nmap_count_without_its_start() -> None:
    """Each free slot gets chunks of five estimated seconds, with two seconds of work beyond their starts, and then work ahead."""
    host, longer = plan.START_SECONDS + 0.00025, plan.START_SECONDS + 0.4
    joined, ahead = int(2 * BATCH_SECONDS / host), int(AHEAD_SECONDS / host)
    found = Counter(
        worker for _, worker in picks([credit("w-1"), credit("w-2")], {1: 0.0}, {1: queue(1, *[host] * 300)})
    )
    assert (joined, found) == (99, {"w-1": joined + ahead, "w-2": joined + ahead})
    assert len(picks([credit(slots=4, held=3)], {1: 0.0}, {1: queue(1, *[host] * 300)})) == joined // 2 + ahead
    assert len(picks([credit(slots=1)], {1: 0.0}, {1: queue(1, *[longer] * 300)})) == 1 + AHEAD_SECONDS / 0.4


@pytest.mark.parametrize(
    ("addresses", "ports", "joined"),
    [(1, 0, 47), (1, 1, 47), (1, 100, 19), (16, 1000, 0), (64, 1000, 0), (2, 10, 47), (10, 10, 9)],
)
def test_chunks_join_a_starting_nmap_up_to_its_addresses(addresses: int, ports: int, joined: int) -> None:
    """A free slot gets as many chunks as the worker scans with one nmap; more would wait there for a slot of their own."""
    host = plan.START_SECONDS + 0.0025
    networks = [candidate(f"1-{turn}", 1, host, addresses=addresses, port_count=ports) for turn in range(300)]
    ahead = (AHEAD_SECONDS - joined * 0.0025) / host
    assert len(picks([credit(slots=1)], {1: 0.0}, {1: networks})) == 1 + joined + int(ahead)


def test_chunks_unlike_a_starting_one_count_with_the_start_of_nmap() -> None:
    """Those of other users, with another estimate, a failure or the same address need an nmap of their own, and wait for a slot."""
    assert len(picks([credit(slots=1)], {1: 0.0}, {1: queue(1, 0.3, *[0.5] * 300)})) == 1 + AHEAD_SECONDS / 0.5
    assert len(picks([credit(slots=1)], {1: 0.0, 2: 9.0}, {1: queue(1, 0.5), 2: queue(2, *[0.5] * 300)})) == 5
    failed = [candidate(f"1-{turn}", estimate=0.5, failed_by=("w-9",)) for turn in range(1, 300)]
    assert len(picks([credit(slots=1)], {1: 0.0}, {1: [candidate(estimate=0.5), *failed]})) == 5
    same = [candidate(f"{job}-0", job_id=job, estimate=0.5, first_address="127.9.8.1") for job in range(300)]
    assert len(picks([credit(slots=1)], {1: 0.0}, {1: same})) == 5


def test_short_chunks_do_not_take_a_slot_due_to_a_longer_one() -> None:
    """While the user with the lowest time waits with a chunk that is too long to prefetch, no others are prefetched."""
    full = credit(slots=1, held=1)
    queues = {1: queue(1, *[0.5] * 9), 2: queue(2, 6.0)}
    assert picks([full], {1: 10.0, 2: 0.0}, queues) == []
    assert ids(picks([full], {1: 0.0, 2: 0.9}, queues)) == ["1-0", "1-1"]
    assert len(picks([full], {1: 0.0}, {1: queue(1, *[0.5] * 9)})) == 4


def test_chunks_are_given_ahead_only_while_a_slot_is_expected_to_be_free_soon() -> None:
    """A full worker has room from 2 s before to 2 s after the expected end of a chunk in a slot; waiting chunks do not count."""
    chunks = [held(estimate=60.0), held(estimate=30.0), held(estimate=0.1, dispatched_at=THEN + timedelta(seconds=1))]
    room = {at: has_room(fill(credit(), chunks, THEN + timedelta(seconds=at))) for at in (1, 27, 28, 32, 33, 57, 62)}
    assert room == {1: False, 27: False, 28: True, 32: True, 33: False, 57: False, 62: True}


def test_chunks_are_not_given_ahead_behind_long_ones_of_the_same_round() -> None:
    """A round that fills the slots with long chunks gives no short ones ahead, and one that fills a slot with a short one does."""
    assert ids(picks([credit()], {1: 0.0}, {1: queue(1, 60, 60, 0.1)})) == ["1-0", "1-1"]
    assert ids(picks([credit()], {1: 0.0}, {1: queue(1, 60, 1, 0.1)})) == ["1-0", "1-1", "1-2"]


def test_work_ahead_is_the_shortest_that_is_held() -> None:
    """The prefetched work of a worker is that of its shortest chunks."""
    filled = fill(credit(slots=1), [held(estimate=9.0), held(estimate=0.25), held(estimate=0.5)], THEN)
    assert (filled.held, filled.ahead_seconds) == (3, 0.75)


def test_chunks_go_to_the_least_loaded_worker() -> None:
    """Free slots of several workers are filled evenly."""
    found = picks([credit("w-1", 4), credit("w-2", 2)], {1: 0.0}, {1: queue(1, *[9.0] * 6)})
    assert Counter(worker for _, worker in found) == {"w-1": 4, "w-2": 2}
    assert [worker for _, worker in found[:3]] == ["w-1", "w-2", "w-1"]


def test_chunk_avoids_instances_that_failed_it_while_another_could_take_it() -> None:
    """A live instance that has not failed the chunk is waited for, even a full one; without one any may take it."""
    failed = candidate(failed_by=("w-1",))
    workers = [credit("w-1", 2), credit("w-2", 2)]
    assert picks(workers, {1: 0.0}, {1: [failed]}) == [("1-0", "w-2")]
    assert picks([credit("w-1", 2)], {1: 0.0}, {1: [failed]}, fleet=[credit("w-1"), credit("w-2")]) == []
    assert picks([credit("w-1", 2)], {1: 0.0}, {1: [failed]}) == [("1-0", "w-1")]
    both = candidate(failed_by=("w-1", "w-2"))
    assert len(picks(workers, {1: 0.0}, {1: [both]})) == 1


def test_chunk_returns_to_an_instance_without_a_route_last() -> None:
    """An instance that failed the chunk for another reason precedes one without a route, which is used if none has a route."""
    workers = [credit("w-1", 2), credit("w-2", 2, held=1)]
    failed = candidate(failed_by=("w-1", "w-2"), no_route=("w-1",))
    assert picks(workers, {1: 0.0}, {1: [failed]}) == [("1-0", "w-2")]
    assert picks(workers[:1], {1: 0.0}, {1: [failed]}, fleet=workers) == []
    assert picks(workers[:1], {1: 0.0}, {1: [failed]}) == [("1-0", "w-1")]
    unreached = candidate(failed_by=("w-1", "w-2"), no_route=("w-1", "w-2"))
    assert len(picks(workers, {1: 0.0}, {1: [unreached]})) == 1


def test_raw_chunk_does_not_wait_for_a_plain_worker_that_could_not_take_it() -> None:
    """Of those that have not failed a raw chunk only raw workers count."""
    failed = candidate(failed_by=("w-1",), needs_raw=True)
    worker = credit("w-1", 2, raw=True)
    assert picks([worker], {1: 0.0}, {1: [failed]}, fleet=[worker, credit("w-2")]) == [("1-0", "w-1")]
    assert picks([worker], {1: 0.0}, {1: [failed]}, fleet=[worker, credit("w-2", raw=True)]) == []


# Shares


def test_user_at_their_share_yields_to_a_user_below_theirs() -> None:
    """While others wait no user gets more than their share plus one, though their time is the lowest."""
    queues = {1: queue(1, *[9.0] * 9), 2: queue(2, *[9.0] * 9)}
    found = ids(picks([credit(slots=4)], {1: 0.0, 2: 1e6}, queues))
    assert Counter(each.partition("-")[0] for each in found) == {"1": 3, "2": 1}
    found = ids(picks([credit(slots=6, held=3)], {1: 0.0, 2: 1e6}, queues, occupied_={1: 4.0}))
    assert Counter(each.partition("-")[0] for each in found) == {"2": 3}


def test_slots_without_other_candidates_go_to_users_with_more_work() -> None:
    """Shares leave no slot idle: what is left when all that wait have theirs is given too."""
    queues = {1: queue(1, *[9.0] * 9), 2: queue(2, 9.0)}
    assert len(picks([credit(slots=8)], {1: 0.0, 2: 0.0}, queues)) == 8


def test_user_alone_has_every_slot() -> None:
    """Without others there is no limit."""
    assert len(picks([credit(slots=8)], {1: 0.0}, {1: queue(1, *[9.0] * 9)})) == 8


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[Credit], dict[int, float], dict[int, float], dict[int, list[Candidate]]]:
    raw = draw(st.booleans())
    workers = [
        credit(f"w-{number}", slots, held=draw(st.integers(0, slots)), raw=raw)
        for number, slots in enumerate(draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)))
    ]
    names = st.sets(st.sampled_from([worker.instance for worker in workers]))
    queues = {
        user: [
            candidate(
                f"{user}-{turn}",
                user,
                draw(st.floats(0.1, 100)),
                needs_raw=raw and draw(st.booleans()),
                failed_by=(failed_by := tuple(draw(names))),
                no_route=tuple(name for name in failed_by if draw(st.booleans())),
            )
            for turn in range(draw(st.integers(0, 6)))
        ]
        for user in range(draw(st.integers(1, 4)))
    }
    times = {user: draw(st.floats(0, 100)) for user in queues}
    busy: float = sum(worker.held for worker in workers)
    occupied_ = {}
    for user in queues:
        occupied_[user] = float(draw(st.integers(0, int(busy))))
        busy -= occupied_[user]
    return workers, times, occupied_, queues


@settings(max_examples=80, deadline=None)
@given(rounds())
def test_round_leaves_no_slot_idle_that_a_chunk_could_use(
    given_: tuple[list[Credit], dict[int, float], dict[int, float], dict[int, list[Candidate]]],
) -> None:
    """After a round no worker has a free slot while a chunk waits that it may take; those that failed it are respected."""
    workers, times, occupied_, queues = given_
    fleet = [worker for worker in workers if worker.slots]
    able = {worker.instance for worker in fleet}
    round_ = Round(workers, times, occupied_, fleet)
    found = list(round_.picks(queues))
    assert len({each.chunk_id for each, _, _ in found}) == len(found)
    given_to = Counter(worker.worker_id for _, worker, _ in found)

    def may_take(worker: Credit, chunk: Candidate) -> bool:
        causes = (chunk.failed_by, chunk.no_route)
        avoided = any(worker.instance in cause and able - set(cause) for cause in causes)
        return worker.slots > 0 and not avoided

    assert all(may_take(worker, chunk) for chunk, worker, _ in found)
    taken = {each.chunk_id for each, _, _ in found}
    waiting = [each for line in queues.values() for each in line if each.chunk_id not in taken]
    for worker in workers:
        if worker.held + given_to[worker.worker_id] < worker.slots:
            assert not any(may_take(worker, chunk) for chunk in waiting)


# A fleet over time

_NOT_AHEAD_SECONDS = (
    AHEAD_SECONDS + plan.START_SECONDS + 0.1
)  # that a chunk is expected to take, so that it waits for a slot


@dataclass
class Fleet:
    """Slots that serve the chunks of users, as the dispatcher does: rounds at each end, charges of what was measured.

    Attributes:
        now: seconds.
        log: user, start and end of each chunk.
        waits: for each user, the longest time for which they waited and held no chunk.
        most: for each user, the most chunks they held when a further one was given while others waited.
    """

    slots: int
    now: float = 0.0
    queues: dict[int, deque[tuple[float, float]]] = field(default_factory=lambda: defaultdict(deque))
    accounts: Accounts = field(default_factory=lambda: Accounts({}))
    running: list[tuple[float, int, Held]] = field(default_factory=list)
    log: list[tuple[int, float, float]] = field(default_factory=list)
    waits: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    most: Counter[int] = field(default_factory=Counter)
    _since: dict[int, float] = field(default_factory=dict)
    _ids: Any = field(default_factory=count)

    def submit(self, user: int, *chunks: tuple[float, float]) -> None:
        """Queue chunks: what each is expected to take, and takes."""
        self.queues[user].extend(chunks)
        if not any(each.user_id == user for _, _, each in self.running):
            self._since.setdefault(user, self.now)

    def run(self, until: float) -> None:
        """Serve until a time; the clock moves to it."""
        self._dispatch()
        while self.running and self.running[0][0] <= until:
            self.now, _, done = heapq.heappop(self.running)
            self._charge(done)
            self._dispatch()
        self.now = until

    def _charge(self, done: Held) -> None:
        took = self.now - (done.dispatched_at - THEN).total_seconds() if done.dispatched_at else 0.0
        if self.queues[done.user_id]:
            self._since[done.user_id] = self.now
        users = dict(self.accounts.users)
        users[done.user_id] = replace(users[done.user_id], time=users[done.user_id].time + took)
        busy = {user for user, line in self.queues.items() if line} | {each.user_id for _, _, each in self.running}
        users = {user: replace(account, active=user in busy) for user, account in users.items()}
        self.accounts = replace(self.accounts, users=users)

    def _dispatch(self) -> None:
        waiting = [user for user, line in self.queues.items() if line]
        if not waiting:
            return
        holds = [each for _, _, each in self.running]
        awake = wake(self.accounts, waiting)
        moment = THEN + timedelta(seconds=self.now)
        worker = fill(credit(slots=self.slots), holds, moment)
        round_ = Round([worker], tags(awake, holds, moment), occupied(holds), [worker])
        candidates = {
            user: queue(user, *(max(_NOT_AHEAD_SECONDS, each) for each, _ in islice(self.queues[user], self.slots)))
            for user in waiting
        }
        for chosen, _, share in round_.picks(candidates):
            user = chosen.user_id
            estimate, seconds = self.queues[user].popleft()
            number = next(self._ids)
            taken = held(user, id_=str(number), estimate=estimate, share=share, dispatched_at=moment)
            heapq.heappush(self.running, (self.now + seconds, number, taken))
            self.log.append((user, self.now, self.now + seconds))
            self.waits[user] = max(self.waits[user], self.now - self._since.pop(user, self.now))
            if {each for each in waiting if self.queues[each]} - {user}:
                self.most[user] = max(self.most[user], sum(each.user_id == user for _, _, each in self.running))
        self.accounts = Accounts({**self.accounts.users, **awake}, max(self.accounts.virtual, round_.virtual))


@settings(max_examples=30, deadline=None)
@given(
    slots=st.integers(1, 6),
    arrivals=st.lists(
        st.tuples(st.floats(0, 60), st.integers(1, 4), st.integers(1, 30), st.floats(2, 20), st.floats(0.1, 20)),
        min_size=1,
        max_size=12,
    ),
)
def test_fair_queueing_with_any_arrivals_bounds_each_wait(
    slots: int, arrivals: list[tuple[float, int, int, float, float]]
) -> None:
    """With idle periods, new users and chunks far beyond their estimates, no user waits longer than fair queueing allows."""
    fleet = Fleet(slots)
    for pause, user, number, estimate, seconds in arrivals:
        fleet.run(fleet.now + pause)
        fleet.submit(user, *[(estimate, seconds)] * number)
    fleet.run(fleet.now + 1e6)
    users = len({user for _, user, _, _, _ in arrivals})
    longest = max(max(estimate, seconds) for _, _, _, estimate, seconds in arrivals)
    assert not any(fleet.queues.values())
    # While two users wait, what they are served differs by at most the longest chunk of each (theorem 1 of Goyal, Vin, Cheng), so
    # each other user is served two longest chunks at most. Several slots share that, and one chunk may still be running.
    turns = 2 * (users - 1) if slots == 1 else users
    assert max(fleet.waits.values()) <= turns * longest + 0.001


@pytest.mark.parametrize("slots", [1, 4])
def test_slowest_scan_delays_another_user_by_one_host_timeout(slots: int) -> None:
    """Beside a /28 at timing 0, of which each address times out, one-port jobs of another user get the next free slot."""
    slow = scan_job(1, cidr="127.9.8.0/28", policy=scan_policy(ports="80", timing=0))
    small = scan_job(2, cidr="127.9.9.1/32", policy=scan_policy(ports="80"))
    addresses = list(plan.chunks(slow, 0, slow.plan.chunk_count))
    (one,) = plan.chunks(small, 0, small.plan.chunk_count)
    timeout = float(slow.policy.host_timeout)
    fleet = Fleet(slots)
    fleet.submit(1, *[(each.estimate, timeout) for each in addresses])
    while fleet.queues[1]:
        fleet.run(fleet.now + 1.0)
        fleet.submit(2, (one.estimate, 0.2))
        fleet.run(fleet.now + timeout)
        assert not fleet.queues[2]
    assert len(addresses) == 16
    assert fleet.waits[2] <= timeout


@settings(max_examples=30, deadline=None)
@given(slots=st.integers(1, 8), users=st.integers(2, 4), seed=st.integers())
def test_user_holds_at_most_one_slot_above_their_share_while_others_wait(slots: int, users: int, seed: int) -> None:
    """While all users wait, none ever holds more than slots / users + 1."""
    chance = random.Random(seed)  # noqa: S311 # durations, not secrets
    fleet = Fleet(slots)
    for user in range(users):
        fleet.submit(user, *[(chance.uniform(2, 20), chance.uniform(0.1, 60)) for _ in range(200)])
    fleet.run(100.0)
    assert all(fleet.queues.values())
    assert max(fleet.most.values()) <= slots / users + 1


@pytest.mark.parametrize("slots", [1, 4])
def test_history_does_not_starve_a_user(slots: int) -> None:
    """A user with 100,000 slot seconds of past use and a newcomer with as much to do alternate."""
    fleet = Fleet(slots)
    fleet.accounts = Accounts({1: Account(1, 100_000.0, active=True)}, virtual=100_000.0)
    fleet.submit(1, *[(10.0, 10.0)] * 100)
    fleet.run(100.0)
    fleet.submit(2, *[(10.0, 10.0)] * 50)
    began = fleet.now
    fleet.run(began + 10.0 * 2 * 20 / slots)
    served = [user for user, start, _ in fleet.log if start >= began]
    assert abs(served.count(1) - served.count(2)) <= slots + 1


def test_idle_user_does_not_save_up_time() -> None:
    """After an hour without work a user shares with one who worked all along; it does not take every slot."""
    fleet = Fleet(1)
    fleet.submit(1, *[(10.0, 10.0)] * 500)
    fleet.submit(2, (10.0, 10.0))
    fleet.run(3_600.0)
    fleet.submit(2, *[(10.0, 10.0)] * 100)
    fleet.run(4_000.0)
    served = [user for user, start, _ in fleet.log if start >= 3_600.0]
    assert abs(served.count(1) - served.count(2)) <= 2


def test_user_with_underestimated_chunks_gets_only_their_share() -> None:
    """Chunks that take thirty times their estimate delay their own user's turns, not those of others."""
    fleet = Fleet(4)
    fleet.submit(1, *[(3.0, 60.0)] * 200)
    fleet.submit(2, *[(6.0, 6.0)] * 2_000)
    fleet.run(1_800.0)
    assert all(fleet.queues.values())
    time: dict[int, float] = defaultdict(float)
    for user, start, end in fleet.log:
        time[user] += min(end, 1_800.0) - start
    assert time[1] == pytest.approx(time[2], rel=0.15)
