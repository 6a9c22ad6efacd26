"""All messages between services, each defined once."""

from scanfleet.messages.audit import Audited, AuditEntry, OperatorActed
from scanfleet.messages.base import Message
from scanfleet.messages.chunks import (
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
from scanfleet.messages.commands import CancelJob, CommandAccepted, CommandRejected, SubmitJobs
from scanfleet.messages.deletions import DeleteResults, ResultsDeleted
from scanfleet.messages.jobs import (
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
from scanfleet.messages.results import HostDetails, HostScanned, PortFound, ScriptOutput, SystemMatch

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
