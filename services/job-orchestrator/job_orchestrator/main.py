"""Build the orchestrator, which `python -m scanfleet.runtime.server job-orchestrator` runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from collections.abc import Set as AbstractSet
from contextlib import AsyncExitStack, asynccontextmanager
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
from scanfleet.runtime.bus import Consumer, Handler, M, Publisher
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


class Orchestrator:
    """The handlers and loops of a replica, with one store and one bus."""

    def __init__(
        self,
        store: Store,
        publisher: Publisher,
        *,
        leaderless: Callable[[Topic], Collection[int]],
        rules: TargetRules,
        keys: ChainKeys,
        signer: Signer,
        scripts: AbstractSet[str] = ADMITTED_SCRIPTS,
        clock: PlatformTime,
        lease_seconds: float,
        stored_seconds: float,
        raw_worker_seconds: float,
        max_workers: int,
        grants: UserGrants | None = None,
        quotas: Quotas,
        keep: timedelta | None,
        deletes_per_second: int,
    ) -> None:
        faults = Faults()
        self.accounts = AccountCache(store.dispatch, clock, self._alone)
        held = HeldChunks(store.dispatch, clock, self._alone, lambda: leaderless(SCAN_PROGRESS), lease_seconds)
        changer = ChunkChanger(store.chunks, self.accounts, held, lambda: self.progress.partitions, clock)
        self.grants = JobGrants(grants, rules.nat64)
        self.outbox = Outbox(store.jobs, publisher)
        self.reporter = Reporter(
            jobs=store.jobs,
            chunks=store.chunks,
            publisher=publisher,
            outbox=self.outbox,
            faults=faults,
            clock=clock,
        )
        canceller = ChunkCanceller(chunks=store.chunks, changer=changer, publisher=publisher, clock=clock)
        self.reconciler = Reconciler(
            jobs=store.jobs,
            chunks=store.chunks,
            changer=changer,
            dispatch=store.dispatch,
            canceller=canceller,
            outbox=self.outbox,
            reporter=self.reporter,
            faults=faults,
            wake=lambda users: self.dispatcher.wake(made=users),
            clock=clock,
        )
        self.backlog = Backlog(store.jobs, clock)
        self.checks = Checks(rules=rules, scripts=scripts, grants=grants, quotas=quotas)
        self.submits = Submits(
            jobs=store.jobs,
            dispatch=store.dispatch,
            policies=store.policies,
            subnets=store.subnets,
            checks=self.checks,
            clock=clock,
        )
        self.cancels = Cancels(
            commands=store.commands,
            jobs=store.jobs,
            canceller=canceller,
            outbox=self.outbox,
            reconciler=self.reconciler,
            faults=faults,
            clock=clock,
        )
        self.commands = Commands(
            commands=store.commands,
            jobs=store.jobs,
            audit=store.audit,
            publisher=publisher,
            outbox=self.outbox,
            reconciler=self.reconciler,
            submits=self.submits,
            cancels=self.cancels,
            clock=clock,
        )
        self.deletions = Deletions(
            jobs=store.jobs,
            deletions=store.deletions,
            retention=store.retention,
            chunks=store.chunks,
            audit=store.audit,
            keys=keys,
            publisher=publisher,
            outbox=self.outbox,
            clock=clock,
            cancel_chunks=canceller.cancel_page,
            keep=keep,
            per_second=deletes_per_second,
        )
        self.progress = Progress(
            dispatch=store.dispatch,
            changer=changer,
            publisher=publisher,
            reconciler=self.reconciler,
            wake=lambda: self.dispatcher.wake(),  # noqa: PLW0108 # the dispatcher is created below
            lease_seconds=lease_seconds,
            stored_seconds=stored_seconds,
            clock=clock,
        )
        self.fleet = Fleet(
            dispatch=store.dispatch,
            held=held,
            lease_seconds=lease_seconds,
            max_workers=max_workers,
            clock=clock,
            requeue_lost=self.progress.requeue_lost,
            wake=lambda: self.dispatcher.wake(),  # noqa: PLW0108 # the dispatcher is created below
        )
        skips = Skips(store.jobs, clock)
        sender = AttemptSender(
            jobs=store.jobs,
            chunks=store.chunks,
            deletions=store.deletions,
            audit=store.audit,
            changer=changer,
            held=held,
            publisher=publisher,
            signer=signer,
            scripts=scripts,
            lease_seconds=lease_seconds,
            clock=clock,
            give_up=self.reconciler.give_up,
            grants=self.grants,
            skips=skips,
        )
        self.dispatcher = Dispatcher(
            dispatch=store.dispatch,
            accounts=self.accounts,
            held=held,
            fleet=self.fleet,
            skips=skips,
            sender=sender,
            clock=clock,
        )
        self.sweeper = Sweeper(
            jobs=store.jobs,
            chunks=store.chunks,
            dispatch=store.dispatch,
            deletions=store.deletions,
            changer=changer,
            publisher=publisher,
            outbox=self.outbox,
            reporter=self.reporter,
            faults=faults,
            reconciler=self.reconciler,
            partitions=lambda: self.progress.partitions,
            clock=clock,
            signer=signer,
            stored_seconds=stored_seconds,
            raw_worker_seconds=raw_worker_seconds,
            grants=self.grants,
        )
        verdicts = Verdicts(
            changer=changer,
            publisher=publisher,
            reconciler=self.reconciler,
            wake=self.dispatcher.wake,
            clock=clock,
        )
        self.handlers = dict(
            (
                _handled(SCAN_COMMANDS, self.commands),
                _handled(SCAN_DELETIONS, self.deletions),
                _handled(SCAN_WORKERS, self.fleet),
                _handled(SCAN_PROGRESS, self.progress),
                _handled(SCAN_STORED, verdicts),
                *(_handled(topic, Audit(store.audit, service)) for service, topic in SCAN_AUDIT.items()),
                _handled(SCAN_AUDIT_OPERATOR, Audit(store.audit, OPERATOR)),
            )
        )
        sweep = Loop("sweep", _SWEEP_SECONDS, self.sweeper.sweep, vital=False)
        self.request_loops = (self.reconciler.loop, self.outbox.loop, self.deletions.loop, self.accounts.loop)
        """They continue what requests began, so that every replica runs them."""
        self.job_loops = (self.reporter.loop, self.dispatcher.loop, sweep)

    def _alone(self) -> bool:
        """Return whether this replica handles the reports on all chunks."""
        return len(self.progress.partitions) == SCAN_PROGRESS.partitions


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
            grants = settings.user_grants
            signer = Signer(read_private_key(settings.chunk_key_file))
            database = mongo.connect(settings.mongodb_uri, settings.database)
            stack.callback(database.client.close)
            clock = PlatformTime(partial(read_time, database))
            await startup.until_available("mongodb", clock.refresh)
            keys = read_chain_keys(settings.audit_key_file)
            store = MongoStore(
                database,
                keys,
                now=clock.now,
                keep_audit=timedelta(days=settings.audit_days),
                keep_receipts=timedelta(days=settings.keep_receipts_days),
            )
            await startup.until_available("mongodb", store.prepare)
            source = f"{ORCHESTRATOR} {settings.instance}"
            used = [
                first_use("signs the audit log", keys.key_id, source=source),
                first_use("signs chunks", signer.key_id, source=source),
                *(first_use("verifies the gateway's tokens", key_id(key), source=source) for key in gateways),
            ]
            await startup.until_available("mongodb", lambda: store.audit.add(used))
            app.state.probes.depend("mongodb", lambda: mongo.ping(database))
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
                grants=grants,
                quotas=settings.quotas,
                keep=settings.keep_results,
                deletes_per_second=settings.deletes_per_second,
            )
            app.state.orchestrator = State(
                store,
                orchestrator.commands,
                orchestrator.cancels,
                orchestrator.submits,
                orchestrator.deletions,
                orchestrator.checks,
                orchestrator.backlog,
                orchestrator.grants,
                clock.now,
            )
            stack.push_async_callback(orchestrator.accounts.close)
            seal = Loop("audit seal", _SEAL_SECONDS, store.audit.seal, vital=False)
            loops: list[Loop | Consumer] = [
                Loop("time", _TIME_SECONDS, clock.refresh),
                seal,
                *orchestrator.request_loops,
            ]
            if not settings.requests_only:
                # One group per topic: no loop waits for another, and a rebalance of one does not affect the others.
                consumers = (
                    bus.consume(topic, f"{ORCHESTRATOR}-{topic.name}", handler)
                    for topic, handler in orchestrator.handlers.items()
                )
                loops += [*orchestrator.job_loops, *consumers]
            for loop in loops:
                await startup.until_available("kafka", loop.start)
                stack.push_async_callback(loop.stop)
                app.state.probes.watch(loop)
            yield

    return service.create_app(
        name=ORCHESTRATOR, settings=settings, lifespan=lifespan, refusals=refusals, routers=ROUTERS
    )
