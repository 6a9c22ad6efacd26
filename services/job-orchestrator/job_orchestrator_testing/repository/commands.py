"""Decisions on commands in memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from job_orchestrator.domain.command import Command
from job_orchestrator_testing.repository.data import MemoryRepository


class MemoryCommands(MemoryRepository):
    """A `CommandRepository`."""

    async def insert(self, commands: Sequence[Command]) -> dict[str, Command]:
        stored: dict[str, Command] = {}
        for command in commands:
            same_key = self._with_key((command.user_id, command.idempotency_key or ""))
            stored[command.id] = self._data.commands.get(command.id) or same_key or command
            if stored[command.id] is command:
                self._data.commands[command.id] = command
        return stored

    async def get(self, ids: Collection[str]) -> dict[str, Command]:
        return {id_: self._data.commands[id_] for id_ in ids if id_ in self._data.commands}

    async def expired(self, ids: Collection[str]) -> set[str]:
        return {id_ for id_, command in (await self.get(ids)).items() if command.state == "expired"}

    async def by_key(self, keys: Collection[tuple[int, str]]) -> dict[tuple[int, str], Command]:
        return {key: replace(command, jobs=()) for key in keys if (command := self._with_key(key)) is not None}

    async def reject(self, commands: Sequence[Command]) -> None:
        accepted = {each.id: each for each in commands if self._data.commands[each.id].state == "accepted"}
        self._data.commands |= {
            id_: replace(
                self._data.commands[id_], state=each.state, status=each.status, error=each.error, rule=each.rule
            )
            for id_, each in accepted.items()
        }

    def _with_key(self, key: tuple[int, str]) -> Command | None:
        every = self._data.commands.values()
        return next((each for each in every if (each.user_id, each.idempotency_key) == key), None)
