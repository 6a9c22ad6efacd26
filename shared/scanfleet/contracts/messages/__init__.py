"""All messages between services, each defined once."""

from scanfleet.contracts.messages.audit import Audited, AuditEntry, OperatorActed
from scanfleet.contracts.messages.base import Message
from scanfleet.contracts.messages.chunks import (
    ChunkClaimed,
    ChunkFailed,
    ChunkIncomplete,
    ChunkMessage,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    ChunkStored,
    ScanChunk,
    StopChunk,
    Technique,
    WorkerReady,
    instance_of,
)
from scanfleet.contracts.messages.commands import CancelJob, CommandAccepted, CommandRejected, SubmitJobs
from scanfleet.contracts.messages.deletions import DeleteResults, ResultsDeleted
from scanfleet.contracts.messages.jobs import (
    Job,
    JobCancelled,
    JobCompleted,
    JobCreated,
    JobEvent,
    JobFailed,
    JobProgressed,
    JobStarted,
    JobStatus,
)
from scanfleet.contracts.messages.results import HostDetails, HostScanned, PortFound, ScriptOutput, SystemMatch

__all__ = [
    "AuditEntry",
    "Audited",
    "CancelJob",
    "ChunkClaimed",
    "ChunkFailed",
    "ChunkIncomplete",
    "ChunkMessage",
    "ChunkProgressed",
    "ChunkReleased",
    "ChunkScanned",
    "ChunkStored",
    "CommandAccepted",
    "CommandRejected",
    "DeleteResults",
    "HostDetails",
    "HostScanned",
    "Job",
    "JobCancelled",
    "JobCompleted",
    "JobCreated",
    "JobEvent",
    "JobFailed",
    "JobProgressed",
    "JobStarted",
    "JobStatus",
    "Message",
    "OperatorActed",
    "PortFound",
    "ResultsDeleted",
    "ScanChunk",
    "ScriptOutput",
    "StopChunk",
    "SubmitJobs",
    "SystemMatch",
    "Technique",
    "WorkerReady",
    "instance_of",
]
