import { get, type Job } from "../api";
import { StatusWord, useLoad, When } from "../components";

/** The latest job of a subnet or policy that has started. */
export function LastScan({ filter }: { filter: string }) {
  const found = useLoad(
    (signal) => get<{ jobs: Job[] }>(`/api/v1/task?${filter}&status=running,completed,failed,cancelled&page_size=1`, signal),
    [filter],
  );
  const job = found.data?.jobs[0];
  if (found.error) return <>unknown</>;
  if (!found.data) return <>…</>;
  return job ? (
    <a href={`/app/jobs/${job.id}`}>
      <StatusWord status={job.status} /> <When time={job.end_time ?? job.start_time} />
    </a>
  ) : (
    <>never</>
  );
}
