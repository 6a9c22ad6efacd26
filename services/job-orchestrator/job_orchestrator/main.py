"""Build the orchestrator, which `python -m scanfleet.runtime.server job-orchestrator` runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from fastapi import FastAPI

from job_orchestrator.api import ROUTERS
from job_orchestrator.api.state import State
from job_orchestrator.domain.audit import first_use
from job_orchestrator.domain.chain import ChainKeys, read_chain_keys
from job_orchestrator.domain.ports import Store
from job_orchestrator.domain.proposal import Checks
from job_orchestrator.domain.quotas import Quotas
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.domain.user_grants import JobGrants
from job_orchestrator.handlers.audit import Audit
from job_orchestrator.handlers.chunks.account_cache import AccountCache
from job_orchestrator.handlers.chunks.canceller import ChunkCanceller
from job_orchestrator.handlers.chunks.changer import ChunkChanger
from job_orchestrator.handlers.chunks.held import HeldChunks
from job_orchestrator.handlers.commands.backlog import Backlog
from job_orchestrator.handlers.commands.cancels import Cancels
from job_orchestrator.handlers.commands.commands import Commands
from job_orchestrator.handlers.commands.submits import Submits
from job_orchestrator.handlers.dispatch.attempt_sender import AttemptSender
from job_orchestrator.handlers.dispatch.dispatcher import Dispatcher
from job_orchestrator.handlers.dispatch.fleet import Fleet
from job_orchestrator.handlers.dispatch.skips import Skips
from job_orchestrator.handlers.jobs.deletions import Deletions
from job_orchestrator.handlers.jobs.faults import Faults
from job_orchestrator.handlers.jobs.outbox import Outbox
from job_orchestrator.handlers.jobs.reconciler import Reconciler
from job_orchestrator.handlers.jobs.reporter import Reporter
from job_orchestrator.handlers.jobs.sweeper import Sweeper
from job_orchestrator.handlers.reports.progress import Progress
from job_orchestrator.handlers.reports.verdicts import Verdicts
from job_orchestrator.repository import MongoStore, read_time
from job_orchestrator.settings import Settings
from scanfleet.contracts.messages import AuditEntry
from scanfleet.contracts.messages.topics import (
    OPERATOR,
    SCAN_AUDIT,
    SCAN_AUDIT_OPERATOR,
    SCAN_COMMANDS,
    SCAN_DELETIONS,
    SCAN_PROGRESS,
    SCAN_STORED,
    SCAN_WORKERS,
    Topic,
)
from scanfleet.contracts.user_grants import UserGrants
from scanfleet.kafka import KafkaBus
from scanfleet.runtime import logging, mongo, service, tracing
from scanfleet.runtime.bus import Bus, Consumer, Handler, M, Publisher
from scanfleet.runtime.loop import Loop
from scanfleet.runtime.startup import Startup
from scanfleet.scanning.policy import ADMITTED_SCRIPTS
from scanfleet.scanning.targets import TargetRules
from scanfleet.security.audit import Refusals
from scanfleet.security.auth import InternalVerifier, read_private_key, read_public_keys
from scanfleet.security.chunk_grants import Signer, key_id
from scanfleet.services import ORCHESTRATOR

_SWEEP_SECONDS = 1.0
_SEAL_SECONDS = 5.0  # interval within which a removed entry would not be detected
_TIME_SECONDS = 1.0  # interval of reading the database's time; clock drift within it is negligible


@dataclass(eq=False)
class Orchestrator:
    """The handlers and loops of a replica, with one store and one bus.

    Attributes:
        handlers: by topic.
        request_loops: continue what requests began, so that every replica runs them.
        job_loops: carry jobs on, on replicas that consume topics.
    """

    store: Store
    publisher: Publisher
    _: KW_ONLY
    leaderless: Callable[[Topic], Collection[int]]
    rules: TargetRules
    keys: ChainKeys
    signer: Signer
    scripts: AbstractSet[str] = ADMITTED_SCRIPTS
    clock: PlatformTime
    lease_seconds: float
    stored_seconds: float
    raw_worker_seconds: float
    max_workers: int
    user_grants: UserGrants | None = None
    quotas: Quotas
    keep: timedelta | None
    deletes_per_second: int

    def __post_init__(self) -> None:
        self.grants = JobGrants(self.user_grants, self.rules.nat64)
        self._faults = Faults()
        self._build_chunks()
        self._build_jobs()
        self._build_commands()
        self._build_reports()
        self._build_dispatch()
        self.handlers = dict(
            (
                _handled(SCAN_COMMANDS, self.commands),
                _handled(SCAN_DELETIONS, self.deletions),
                _handled(SCAN_WORKERS, self.fleet),
                _handled(SCAN_PROGRESS, self.progress),
                _handled(SCAN_STORED, self.verdicts),
                *(_handled(topic, Audit(self.store.audit, service)) for service, topic in SCAN_AUDIT.items()),
                _handled(SCAN_AUDIT_OPERATOR, Audit(self.store.audit, OPERATOR)),
            )
        )
        sweep = Loop("sweep", _SWEEP_SECONDS, self.sweeper.sweep, vital=False)
        self.request_loops = (self.reconciler.loop, self.outbox.loop, self.deletions.loop, self.accounts.loop)
        self.job_loops = (self.reporter.loop, self.dispatcher.loop, sweep)

    @property
    def state(self) -> State:
        """The parts that the API uses."""
        return State(
            self.store,
            self.commands,
            self.cancels,
            self.submits,
            self.deletions,
            self.checks,
            self.backlog,
            self.grants,
            self.clock.now,
        )

    def consumers(self, bus: Bus) -> list[Consumer]:
        """Create one consumer group per topic: no loop waits for another, and a rebalance of one does not affect the others."""
        return [bus.consume(topic, f"{ORCHESTRATOR}-{topic.name}", handler) for topic, handler in self.handlers.items()]

    def _build_chunks(self) -> None:
        self.accounts = AccountCache(self.store.dispatch, self.clock, self._alone)
        self._held = HeldChunks(
            self.store.dispatch, self.clock, self._alone, lambda: self.leaderless(SCAN_PROGRESS), self.lease_seconds
        )
        self._changer = ChunkChanger(
            self.store.chunks, self.accounts, self._held, lambda: self.progress.partitions, self.clock
        )
        self._canceller = ChunkCanceller(
            chunks=self.store.chunks, changer=self._changer, publisher=self.publisher, clock=self.clock
        )

    def _build_jobs(self) -> None:
        self.outbox = Outbox(self.store.jobs, self.publisher)
        self.reporter = Reporter(
            jobs=self.store.jobs,
            chunks=self.store.chunks,
            publisher=self.publisher,
            outbox=self.outbox,
            faults=self._faults,
            clock=self.clock,
        )
        self.reconciler = Reconciler(
            jobs=self.store.jobs,
            chunks=self.store.chunks,
            changer=self._changer,
            dispatch=self.store.dispatch,
            canceller=self._canceller,
            outbox=self.outbox,
            reporter=self.reporter,
            faults=self._faults,
            wake=self._wake,
            clock=self.clock,
        )
        self.deletions = Deletions(
            jobs=self.store.jobs,
            deletions=self.store.deletions,
            retention=self.store.retention,
            chunks=self.store.chunks,
            audit=self.store.audit,
            keys=self.keys,
            publisher=self.publisher,
            outbox=self.outbox,
            clock=self.clock,
            cancel_chunks=self._canceller.cancel_page,
            keep=self.keep,
            per_second=self.deletes_per_second,
        )
        self.sweeper = Sweeper(
            jobs=self.store.jobs,
            chunks=self.store.chunks,
            dispatch=self.store.dispatch,
            held=self._held,
            deletions=self.store.deletions,
            changer=self._changer,
            publisher=self.publisher,
            outbox=self.outbox,
            reporter=self.reporter,
            faults=self._faults,
            reconciler=self.reconciler,
            partitions=lambda: self.progress.partitions,
            assignments=lambda: self.progress.assignments,
            clock=self.clock,
            signer=self.signer,
            stored_seconds=self.stored_seconds,
            raw_worker_seconds=self.raw_worker_seconds,
            grants=self.grants,
        )

    def _build_commands(self) -> None:
        self.backlog = Backlog(self.store.jobs, self.clock)
        self.checks = Checks(rules=self.rules, scripts=self.scripts, grants=self.user_grants, quotas=self.quotas)
        self.submits = Submits(
            jobs=self.store.jobs,
            dispatch=self.store.dispatch,
            policies=self.store.policies,
            subnets=self.store.subnets,
            checks=self.checks,
            clock=self.clock,
        )
        self.cancels = Cancels(
            commands=self.store.commands,
            jobs=self.store.jobs,
            canceller=self._canceller,
            outbox=self.outbox,
            reconciler=self.reconciler,
            faults=self._faults,
            clock=self.clock,
        )
        self.commands = Commands(
            commands=self.store.commands,
            jobs=self.store.jobs,
            audit=self.store.audit,
            publisher=self.publisher,
            outbox=self.outbox,
            reconciler=self.reconciler,
            submits=self.submits,
            cancels=self.cancels,
            clock=self.clock,
        )

    def _build_reports(self) -> None:
        self.progress = Progress(
            dispatch=self.store.dispatch,
            changer=self._changer,
            publisher=self.publisher,
            reconciler=self.reconciler,
            wake=self._wake,
            lease_seconds=self.lease_seconds,
            stored_seconds=self.stored_seconds,
            clock=self.clock,
        )
        self.verdicts = Verdicts(
            changer=self._changer,
            publisher=self.publisher,
            reconciler=self.reconciler,
            wake=self._wake,
            clock=self.clock,
        )

    def _build_dispatch(self) -> None:
        self.fleet = Fleet(
            dispatch=self.store.dispatch,
            held=self._held,
            lease_seconds=self.lease_seconds,
            max_workers=self.max_workers,
            clock=self.clock,
            requeue_lost=self.progress.requeue_lost,
            wake=self._wake_if_full,
        )
        skips = Skips(self.store.jobs, self.clock)
        sender = AttemptSender(
            jobs=self.store.jobs,
            chunks=self.store.chunks,
            deletions=self.store.deletions,
            audit=self.store.audit,
            changer=self._changer,
            held=self._held,
            publisher=self.publisher,
            signer=self.signer,
            scripts=self.scripts,
            lease_seconds=self.lease_seconds,
            clock=self.clock,
            give_up=self.reconciler.give_up,
            grants=self.grants,
            skips=skips,
        )
        self.dispatcher = Dispatcher(
            dispatch=self.store.dispatch,
            accounts=self.accounts,
            held=self._held,
            fleet=self.fleet,
            skips=skips,
            sender=sender,
            clock=self.clock,
        )

    def _alone(self) -> bool:
        """Return whether this replica handles the reports on all chunks."""
        return len(self.progress.partitions) == SCAN_PROGRESS.partitions

    def _wake(self, users: Collection[int] = ()) -> None:
        """Run a round of dispatch; these users have new chunks."""
        self.dispatcher.wake(made=users)

    def _wake_if_full(self) -> None:
        self.dispatcher.wake_if_full()


def _handled(topic: Topic[M], handler: Handler[M]) -> tuple[Topic, Handler[Any]]:
    """Return the pair; the type checker ensures that the handler accepts every message of the topic."""
    return topic, handler


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or Settings()
    logging.configure(ORCHESTRATOR, settings)
    tracing.configure(ORCHESTRATOR, settings)
    refusals = Refusals(ORCHESTRATOR)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        startup: Startup = app.state.startup
        async with AsyncExitStack() as stack:
            gateways = read_public_keys(settings.internal_public_keys_file)
            app.state.verifier = InternalVerifier(gateways, ORCHESTRATOR)
            keys = read_chain_keys(settings.audit_key_file)
            signer = Signer(read_private_key(settings.chunk_key_file))
            grants = settings.user_grants
            database = mongo.connect(settings.mongodb_uri, settings.database)
            stack.callback(database.client.close)
            app.state.probes.depend("mongodb", lambda: mongo.ping(database))
            clock = PlatformTime(partial(read_time, database))
            await startup.until_available("mongodb", clock.refresh)
            store = MongoStore(
                database,
                keys,
                now=clock.now,
                keep_audit=timedelta(days=settings.audit_days),
                keep_receipts=timedelta(days=settings.keep_receipts_days),
            )
            await startup.until_available("mongodb", store.prepare)
            used = _first_uses(keys, signer, [key_id(key) for key in gateways], f"{ORCHESTRATOR} {settings.instance}")
            await startup.until_available("mongodb", lambda: store.audit.add(used))
            bus = KafkaBus(settings, source=ORCHESTRATOR, instance=settings.instance)
            await startup.until_available("kafka", bus.start)
            stack.push_async_callback(bus.stop)
            app.state.probes.watch(bus)
            app.state.probes.watch(await stack.enter_async_context(refusals.publishing_to(bus)))
            orchestrator = Orchestrator(
                store,
                bus,
                leaderless=bus.leaderless,
                rules=settings.target_rules,
                keys=keys,
                signer=signer,
                scripts=settings.allowed_scripts,
                clock=clock,
                lease_seconds=settings.lease_seconds,
                stored_seconds=settings.stored_seconds,
                raw_worker_seconds=settings.raw_worker_seconds,
                max_workers=settings.max_workers,
                user_grants=grants,
                quotas=settings.quotas,
                keep=settings.keep_results,
                deletes_per_second=settings.deletes_per_second,
            )
            app.state.orchestrator = orchestrator.state
            stack.push_async_callback(orchestrator.accounts.close)
            loops: list[Loop | Consumer] = [
                Loop("time", _TIME_SECONDS, clock.refresh),
                Loop("audit seal", _SEAL_SECONDS, store.audit.seal, vital=False),
                *orchestrator.request_loops,
            ]
            if not settings.requests_only:
                loops += [*orchestrator.job_loops, *orchestrator.consumers(bus)]
            for loop in loops:
                await startup.until_available("kafka", loop.start)
                stack.push_async_callback(loop.stop)
                app.state.probes.watch(loop)
            yield

    return service.create_app(
        name=ORCHESTRATOR, settings=settings, lifespan=lifespan, refusals=refusals, routers=ROUTERS
    )


def _first_uses(keys: ChainKeys, signer: Signer, gateways: Sequence[str], source: str) -> list[AuditEntry]:
    """Return the audit entries that record the keys in use."""
    return [
        first_use("signs the audit log", keys.key_id, source=source),
        first_use("signs chunks", signer.key_id, source=source),
        *(first_use("verifies the gateway's tokens", key, source=source) for key in gateways),
    ]
