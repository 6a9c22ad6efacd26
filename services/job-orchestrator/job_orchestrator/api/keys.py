"""Requests that create an object of a resource, and the answers that are stored under their Idempotency-Keys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated
from uuid import uuid4

from fastapi import Header
from pydantic import BaseModel

from job_orchestrator.domain.command import KEY_REUSED, Command
from job_orchestrator.domain.ports import CommandRepository
from scanfleet.contracts.messages.commands import MAX_KEY_CHARS
from scanfleet.errors import BadRequestError, Rule

IdempotencyKey = Annotated[str | None, Header(max_length=MAX_KEY_CHARS)]


@dataclass(frozen=True, slots=True)
class Creation:
    """One request; without a key nothing is stored for it."""

    commands: CommandRepository
    user_id: int
    key: str | None
    path: str
    body: BaseModel

    async def answer(self) -> str:
        """Return the answer to the first request with the key; empty if there was none.

        Raises:
            BadRequestError: that request was another one.
        """
        if self.key is None:
            return ""
        found = await self.commands.by_key([(self.user_id, self.key)])
        return "".join(map(self._created, found.values()))

    async def accept(self, answer: str) -> str:
        """Store the answer under the key, and return it, or that of a concurrent request which was stored first.

        Raises:
            BadRequestError: that request was another one.
        """
        if self.key is None:
            return answer
        new = Command(
            id=uuid4().hex,
            user_id=self.user_id,
            state="accepted",
            body=self._hash,
            idempotency_key=self.key,
            created=answer,
        )
        return self._created((await self.commands.insert([new]))[new.id])

    @property
    def _hash(self) -> str:
        # The defaults of unset fields may differ between releases.
        return hashlib.sha256(f"{self.path} {self.body.model_dump_json(exclude_unset=True)}".encode()).hexdigest()

    def _created(self, command: Command) -> str:
        if command.body != self._hash:
            raise BadRequestError(KEY_REUSED, rule=Rule.REQUEST)
        return command.created
