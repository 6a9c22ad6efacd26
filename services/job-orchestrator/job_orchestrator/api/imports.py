"""Import subnets from CSV: a file with an invalid line changes nothing, and an import that has ended is safe to repeat."""

from __future__ import annotations

import asyncio
import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from job_orchestrator.api.resource_rules import SUBNETS, scan_target
from job_orchestrator.api.state import MAX_ERROR_CHARS, Recorded, StateDep, TurnDep, check_quota, creating
from job_orchestrator.domain.proposal import Checks
from job_orchestrator.domain.resources import Owned, ScanTarget, Subnet
from scanfleet.clock import utc_now
from scanfleet.contracts import queries, rest
from scanfleet.errors import BadRequestError, ConflictError
from scanfleet.runtime.http.requests import parsed
from scanfleet.security.auth import AuthenticatedRoute, Caller

router = APIRouter(prefix=rest.SUBNETS.path, route_class=AuthenticatedRoute)

_COLUMNS: Final = {"name", "cidr", "exclude"}
_MAX_IDS: Final = 5  # of subnets with one name, in an error
_MAX_PROBLEM_CHARS: Final = 1_000  # maximum length of the listed problems; enough to correct a file in a few attempts

_Wanted = tuple[str, ScanTarget]
"""Name, and network with exclusions, of a line."""


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the file, with either its subnet or its error."""

    number: int
    wanted: _Wanted | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """The effect of an import for one line."""

    line: _Line
    action: Literal["create", "update", "exists", "refused"]
    subnet: Subnet | None = None
    """The existing subnet that the line repeats or updates."""

    error: str = ""

    @property
    def view(self) -> rest.SubnetImportLine:
        id_ = self.subnet.id if self.subnet else None
        return rest.SubnetImportLine(line=self.line.number, action=self.action, id=id_, error=self.error or None)


@router.post("/import", status_code=201)
async def import_subnets(
    *,
    request: Request,
    response: Response,
    caller: Caller,
    state: StateDep,
    record: Recorded,
    _turn: TurnDep,
    query: Annotated[queries.SubnetImport, parsed(queries.SubnetImport)],
) -> rest.SubnetsImported | rest.SubnetImportCheck:
    lines = []
    for number, row in _rows(await request.body()):
        await asyncio.sleep(0)  # lets other requests run between the lines, of which there may be a thousand
        lines.append(_read(number, row, state.checks))
    wanted = [line.wanted for line in lines if line.wanted]
    async with creating(state, caller.user_id):
        equal = await state.store.subnets.equal_to(caller.user_id, set(wanted))
        named = await state.store.subnets.named(caller.user_id, {name for name, _ in wanted}) if query.update else []
        verdicts = list(_verdicts(lines, equal, named))
        problems = [f"line {each.line.number}: {each.error}" for each in verdicts if each.error]
        if problems and not query.dry_run:
            raise BadRequestError(_summary(problems))
        missing = [each.line.wanted for each in verdicts if each.action == "create" and each.line.wanted]
        await check_quota(state, SUBNETS, caller.user_id, len(missing))
        if query.dry_run:
            response.status_code = 200
            return rest.SubnetImportCheck(lines=[each.view for each in verdicts])
        now = utc_now()
        ids = await state.store.subnets.take_ids(len(missing)) if missing else range(0)
        created = [
            Owned(id=id_, user_id=caller.user_id, name=name, content=target, created_at=now, updated_at=now)
            for id_, (name, target) in zip(ids, missing, strict=True)
        ]
        updated = [
            each.subnet.revised(*each.line.wanted, now)
            for each in verdicts
            if each.action == "update" and each.subnet and each.line.wanted
        ]
        await record.each(f"{rest.SUBNETS.path}/{subnet.id}" for subnet in (*created, *updated))
        await state.store.subnets.add(*created)
        if not await state.store.subnets.replace_all(updated):
            raise ConflictError("a subnet was deleted during the import; repeat the import")
    known = {(each.name, each.content): each for each in (*equal, *created, *updated)}
    changes = f", {len(updated)} updated" if updated else ""
    return rest.SubnetsImported(
        message=f"{len(created)} subnet{'' if len(created) == 1 else 's'} created{changes}",
        created=len(created),
        updated=len(updated),
        subnets=[SUBNETS.view(known[each]) for each in wanted],
    )


def _read(number: int, row: dict[str, object], checks: Checks) -> _Line:
    try:
        body = rest.SubnetBody.model_validate(row)
        return _Line(number, (body.name, scan_target(body, checks)))
    except ValidationError as error:
        first = error.errors()[0]
        return _Line(number, error=f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except BadRequestError as error:
        return _Line(number, error=error.message)


def _verdicts(lines: Sequence[_Line], equal: Sequence[Subnet], named: Sequence[Subnet]) -> Iterator[_Verdict]:
    """Yield the effect of an import for each line.

    Args:
        lines: of the file.
        equal: the existing subnets that lines repeat.
        named: the existing subnets that lines update, by their names.
    """
    existing = {(each.name, each.content): each for each in equal}
    by_name: defaultdict[str, list[Subnet]] = defaultdict(list)
    for each in named:
        by_name[each.name].append(each)
    different = Counter(name for name, _ in {line.wanted for line in lines if line.wanted})
    planned: dict[_Wanted, Subnet | None] = {}
    for line in lines:
        if line.wanted is None:
            yield _Verdict(line, "refused", error=line.error)
        elif line.wanted in existing:
            yield _Verdict(line, "exists", existing[line.wanted])
        elif line.wanted in planned:
            yield _Verdict(line, "exists", planned[line.wanted])
        else:
            name = line.wanted[0]
            same = by_name.get(name, [])
            if len(same) > 1:
                ids = ", ".join(str(each.id) for each in same[:_MAX_IDS]) + ", …" * (len(same) > _MAX_IDS)
                yield _Verdict(line, "refused", error=f"name: several subnets have the name {name}: {ids}")
            elif same and different[name] > 1:
                yield _Verdict(
                    line, "refused", error=f"name: several lines have the name {name} of subnet {same[0].id}"
                )
            else:
                planned[line.wanted] = same[0] if same else None
                yield _Verdict(line, "update" if same else "create", planned[line.wanted])


def _summary(problems: list[str]) -> str:
    """Return as many whole problems as fit, at least one, and the number of the others."""
    lengths = accumulate(len(problem) + len("; ") for problem in problems)
    named = max(1, sum(length <= _MAX_PROBLEM_CHARS for length in lengths))
    more = [f"and {len(problems) - named} more"] if named < len(problems) else []
    return "; ".join([*problems[:named], *more])


def _rows(content: bytes) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield each line's number, from 1 as in an editor, with its fields.

    Raises:
        BadRequestError: the content is not CSV with the columns of a subnet, or has too many lines.
    """
    try:
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        columns = [name.strip().lower() for name in next(lines, [])]
        if len(set(columns)) != len(columns) or not {"name", "cidr"} <= set(columns) <= _COLUMNS:
            raise BadRequestError('the first line must be "name,cidr" or "name,cidr,exclude"')
        count = 0
        for values in lines:
            if not values:  # an empty line
                continue
            count += 1
            if count > rest.MAX_IMPORT_LINES:
                raise BadRequestError(f"more than {rest.MAX_IMPORT_LINES} lines; import them in parts")
            if len(values) != len(columns):
                raise BadRequestError(f"line {lines.line_num}: {len(values)} cells, but {len(columns)} columns")
            row: dict[str, object] = dict(zip(columns, (value.strip() for value in values), strict=True))
            row["exclude"] = [each.strip() for each in str(row.get("exclude", "")).split(";") if each.strip()]
            yield lines.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadRequestError(f"the body is not CSV in UTF-8: {error}"[:MAX_ERROR_CHARS]) from error
