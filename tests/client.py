"""A client of the public API for tests and benchmarks: it returns the JSON of each response unchanged, and sends any token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2

from local.wait import until
from scanfleet.contracts.messages import JobStatus

FINAL = frozenset(status for status in JobStatus if status.final)


class Client:
    """One user of the gateway at `url`. Every method raises `httpx2.HTTPStatusError` for an error response."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token = url, token
        self.http = httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30)

    def close(self) -> None:
        self.http.close()

    def subnet(self, cidr: str, exclude: Sequence[str] = ()) -> int:
        return self._made("/api/v1/subnet", {"name": cidr, "cidr": cidr, "exclude": list(exclude)})

    def policy(self, **fields: Any) -> int:
        return self._made("/api/v1/policy", {"name": "policy"} | fields)

    def submit(self, subnet_ids: Sequence[int], policy_id: int, key: str | None = None) -> list[dict[str, Any]]:
        """Create one job per subnet and return them."""
        body = {"subnet_ids": list(subnet_ids), "policy_id": policy_id}
        headers = {"Idempotency-Key": key} if key else {}
        jobs: list[dict[str, Any]] = self._json("POST", "/api/v1/task", json=body, headers=headers)["jobs"]
        return jobs

    def scan(self, cidr: str, **policy: Any) -> int:
        """Create a job that scans `cidr` and return its id."""
        (job,) = self.submit([self.subnet(cidr)], self.policy(**policy))
        job_id: int = job["id"]
        return job_id

    def task(self, job_id: int) -> dict[str, Any]:
        task: dict[str, Any] = self._json("GET", f"/api/v1/task/{job_id}")
        return task

    def status(self, job_id: int) -> str:
        status: str = self.task(job_id)["status"]["status"]
        return status

    def unfinished(self) -> int:
        """Return the number of the user's unfinished jobs."""
        query = {"status": "pending,running", "page_size": 1}
        total: int = self._json("GET", "/api/v1/task", params=query)["total"]
        return total

    def finished(self, job_id: int, limit_seconds: float = 120.0) -> dict[str, Any]:
        """Wait until the job has ended and return its task; retry while a service is unavailable."""
        found: dict[str, Any] = {}

        def is_final() -> bool:
            try:
                found.update(self.task(job_id))
            except httpx2.HTTPStatusError as error:
                if error.response.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
                    raise
                return False
            return found["status"]["status"] in FINAL

        until(is_final, limit_seconds, f"job {job_id} to end")
        return found

    def watch(self, job_id: int) -> Iterator[dict[str, Any]]:
        """Yield the task in each state of the event stream until the stream ends."""
        with self.http.stream("GET", f"/api/v1/task/{job_id}/events") as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def cancel(self, job_id: int) -> None:
        self._json("POST", f"/api/v1/task/{job_id}/cancel")

    def results(self, job_id: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._json("GET", f"/api/v1/task/{job_id}/results")
        return found

    def ledger(self, job_id: int) -> dict[str, Any]:
        ledger: dict[str, Any] = self._json("GET", f"/api/v1/task/{job_id}/ledger", params={"page_size": 1000})
        return ledger

    def _made(self, path: str, body: dict[str, Any]) -> int:
        made: int = self._json("POST", path, json=body)["id"]
        return made

    def _json(self, method: str, path: str, **request: Any) -> Any:
        answer = self.http.request(method, path, **request)
        if answer.is_error:
            why = f"{method} {path}: {answer.status_code} {answer.text}"
            raise httpx2.HTTPStatusError(why, request=answer.request, response=answer)
        return answer.json()
