import { signal, useComputed, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { get, isFinal, me, STATUSES, type Job, type TaskStatus } from "../api";
import { live, watch } from "../events";
import { Pager, Problem, StatusWord, Title, took, useLoad, useSettled, When } from "../components";
import { go, pageNumber, query, url, withQuery } from "../router";
import { loadPolicies, loadSubnets, policies, subnets } from "../store";
import { count, duration, visible } from "../text";

const SIZE = 50;
const AT_ONCE = 4; // requests for the states of jobs: the browser has six connections
const SETTLE = 1_000; // minimum ms between two loads of the list, however many jobs change

interface List {
  jobs: Job[];
  total: number;
}

// States of the jobs in the list. They are changed in place, and shown once for each frame of the screen.
const tasks = new Map<number, TaskStatus>();
const version = signal(0);
let frame = 0;
const show = (task: TaskStatus) => {
  tasks.set(task.job.id, task);
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    version.value++;
  });
};

/** Load the states that neither the stream nor an earlier load has sent. Jobs of other users are not read: each read is an audit entry. */
async function details(jobs: Job[], signal: AbortSignal): Promise<void> {
  const missing = ({ id, status }: Job) => !tasks.has(id) || (isFinal(status) && !isFinal(tasks.get(id)!.job.status));
  const waiting = jobs.filter((job) => job.user_id === me.value!.user_id && missing(job));
  const next = async (): Promise<void> => {
    for (let job = waiting.shift(); job && !signal.aborted; job = waiting.shift()) {
      const task = await get<TaskStatus>(`/api/v1/task/${job.id}`, signal);
      if (missing(job)) show(task);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, next));
}

export function Jobs() {
  const status = query("status");
  const whose = query("user_id");
  const filters = new URLSearchParams();
  for (const name of ["user_id", "subnet_id", "policy_id"]) if (query(name)) filters.set(name, query(name));
  const page = pageNumber();
  const paused = query("paused") !== "";
  const changes = useSignal(0);
  const changed = useSettled(changes.value, SETTLE);
  useLoad((signal) => Promise.all([loadSubnets(signal), loadPolicies(signal)]), []); // names; without them ids are shown
  void version.value; // renders the list again when a state changes

  const asked = new URLSearchParams(filters);
  if (status) asked.set("status", status);
  const list = useLoad<List>(
    (signal) => get<List>(`/api/v1/task?${asked}&page=${page}&page_size=${SIZE}`, signal),
    [asked.toString(), page, changed],
  );
  const totals = useLoad<number[]>(
    (signal) =>
      Promise.all(
        STATUSES.map(async (each) => (await get<List>(`/api/v1/task?${filters}&status=${each}&page_size=1`, signal)).total),
      ),
    [filters.toString(), changed],
  );

  const refused = list.error?.status === 400 || list.error?.status === 403; // only administrators may ask for the jobs of others
  const shown = useRef(new Set<number>());
  useEffect(() => {
    for (const [id, task] of tasks) if (!isFinal(task.status.status)) tasks.delete(id); // as old as the last visit
  }, []);

  useEffect(() => {
    if (paused || refused) return;
    const unfinished = new Map<number, string>(); // what the list may show of jobs that can change
    return watch(whose ? `/api/v1/events?user_id=${encodeURIComponent(whose)}` : "/api/v1/events", (task) => {
      const { id, status } = task.job;
      if (shown.current.has(id)) show(task);
      if (unfinished.get(id) !== status) changes.value++;
      if (isFinal(status)) unfinished.delete(id);
      else unfinished.set(id, status);
    }, list.reload);
  }, [paused, whose, refused]);

  useEffect(() => {
    if (!list.data) return;
    shown.current = new Set(list.data.jobs.map((job) => job.id));
    for (const id of tasks.keys()) if (!shown.current.has(id)) tasks.delete(id);
    const abort = new AbortController();
    details(list.data.jobs, abort.signal).catch(() => undefined);
    return () => abort.abort();
  }, [list.data]);

  const sum = totals.data?.reduce((total, each) => total + each, 0);
  return (
    <>
      <Title text="Jobs" />
      <nav class="counts" aria-label="filter by status">
        <a href={withQuery({ status: undefined, page: undefined })} aria-current={status ? undefined : "true"}>
          all {sum === undefined ? "" : count(sum)}
        </a>
        {STATUSES.map((each, index) => (
          <a key={each} href={withQuery({ status: each, page: undefined })} aria-current={status === each ? "true" : undefined}>
            {each} {totals.data ? count(totals.data[index]!) : ""}
          </a>
        ))}
      </nav>
      <div class="bar">
        <Search />
        {me.value!.admin && <Whose />}
        <span class="live">
          <LiveDot paused={paused} />
          <button type="button" class="quiet" onClick={() => go(withQuery({ paused: paused ? undefined : 1 }), { replace: true })}>
            {paused ? "resume" : "pause"}
          </button>
        </span>
      </div>
      <Problem error={list.error} again={list.reload} />
      {list.data && !list.data.jobs.length && (list.data.total ? <p class="empty">The list has no page {page}.</p> : <Nothing filtered={asked.size > 0} />)}
      {!!list.data?.jobs.length && (
        <>
          <table class="cards">
            <caption class="hidden">Jobs</caption>
            <thead>
              <tr>
                <th scope="col">ID</th>
                {whose && <th scope="col">User</th>}
                <th scope="col">Status</th>
                <th scope="col">Subnet</th>
                <th scope="col">Policy</th>
                <th scope="col">Started</th>
                <th scope="col" class="number">
                  Took
                </th>
                <th scope="col" class="number">
                  Machines
                </th>
              </tr>
            </thead>
            <tbody>
              {list.data.jobs.map((job) => (
                <Row key={job.id} job={job} task={tasks.get(job.id)} owner={!!whose} />
              ))}
            </tbody>
          </table>
        </>
      )}
      {!!list.data?.total && <Pager page={page} size={SIZE} total={list.data.total} />}
    </>
  );
}

function Row({ job, task, owner }: { job: Job; task: TaskStatus | undefined; owner: boolean }) {
  // The stream may be ahead of the list, or the list of the stream.
  const now = task && (isFinal(task.job.status) || !isFinal(job.status)) ? task.job : job;
  const seconds = took(now);
  const subnet = subnets.value.get(job.subnet_id);
  return (
    <>
      <tr>
        <td>
          <a data-row href={`/app/jobs/${job.id}`}>
            {job.id}
          </a>
        </td>
        {owner && <td data-label="User">{job.user_id}</td>}
        <td>
          <StatusWord status={now.status} progress={task?.status.progress} />
          {now.status === "completed" && <span title="every address and port is accounted for"> ✓</span>}
        </td>
        <td data-label="Subnet">
          {subnet ? (
            <>
              <code>{subnet.cidr}</code> {visible(subnet.name === subnet.cidr ? "" : subnet.name)}
            </>
          ) : (
            `subnet ${job.subnet_id}`
          )}
        </td>
        <td data-label="Policy">{visible(policies.value.get(job.policy_id)?.name ?? `policy ${job.policy_id}`)}</td>
        <td data-label="Started">
          <When time={now.start_time} />
        </td>
        <td data-label="Took" class="number">
          {seconds === undefined ? "–" : duration(seconds)}
        </td>
        <td data-label="Machines" class="number">
          {task ? count(task.status.machines_found) : ""}
        </td>
      </tr>
      {task?.status.error && (
        <tr class="reason">
          <td />
          <td colSpan={owner ? 7 : 6}>{visible(task.status.error)}</td>
        </tr>
      )}
    </>
  );
}

export function LiveDot({ paused = false }: { paused?: boolean }) {
  const word = paused ? "paused" : live.value === "on" ? "live" : live.value === "lost" ? "connection lost, trying again" : "";
  return (
    <span class={`dot ${paused ? "paused" : live.value}`} role="status">
      {word}
    </span>
  );
}

function Nothing({ filtered }: { filtered: boolean }) {
  return filtered ? (
    <p class="empty">
      No job matches. <a href="/app/jobs">Show all</a>
    </p>
  ) : (
    <p class="empty">
      There are no jobs yet. <a href="/app/new">Scan a subnet</a>
    </p>
  );
}

/** Finds a job by its id, or filters by a subnet or policy. */
function Search() {
  const text = useSignal("");
  const missing = useSignal("");
  const names = useComputed(() => [
    ...[...subnets.value.values()].flatMap((each) => [each.cidr, each.name]),
    ...[...policies.value.values()].map((each) => each.name),
  ]);
  const find = () => {
    const wanted = text.value.trim().toLowerCase();
    if (!wanted) return go(withQuery({ subnet_id: undefined, policy_id: undefined, page: undefined }));
    if (/^\d+$/.test(wanted)) return go(`/app/jobs/${wanted}`);
    const matches = (...words: string[]) => words.some((word) => word.toLowerCase().includes(wanted));
    const exactly = (...words: string[]) => words.some((word) => word.toLowerCase() === wanted);
    const all = [...subnets.value.values()];
    const subnet = all.find((each) => exactly(each.cidr, each.name)) ?? all.find((each) => matches(each.cidr, each.name));
    const policy = [...policies.value.values()].find((each) => matches(each.name));
    missing.value = subnet || policy ? "" : `no subnet, policy or job is called “${text.value}”`;
    if (subnet) go(withQuery({ subnet_id: subnet.id, policy_id: undefined, page: undefined }));
    else if (policy) go(withQuery({ policy_id: policy.id, subnet_id: undefined, page: undefined }));
  };
  return (
    <form
      role="search"
      onSubmit={(event) => {
        event.preventDefault();
        find();
      }}
    >
      <input
        type="search"
        aria-label="Search by subnet, policy or job id"
        placeholder="subnet, policy, id"
        list="names"
        value={text.value}
        onInput={(event) => void (text.value = event.currentTarget.value)}
      />
      <datalist id="names">
        {[...new Set(names.value)].slice(0, 500).map((each) => (
          <option key={each} value={each} />
        ))}
      </datalist>
      <span role="status" class="wrong">
        {missing.value}
      </span>
      {(query("subnet_id") || query("policy_id")) && (
        <a href={withQuery({ subnet_id: undefined, policy_id: undefined, page: undefined })}>
          {query("subnet_id")
            ? (subnets.value.get(Number(query("subnet_id")))?.cidr ?? `subnet ${query("subnet_id")}`)
            : visible(policies.value.get(Number(query("policy_id")))?.name ?? `policy ${query("policy_id")}`)}{" "}
          ✕<span class="hidden"> remove this filter</span>
        </a>
      )}
    </form>
  );
}

/** For administrators: whose jobs. */
function Whose() {
  const value = useSignal(url.value.searchParams.get("user_id") ?? "");
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        go(withQuery({ user_id: value.value.trim(), page: undefined }));
      }}
    >
      <label class="filter">
        user{" "}
        <input
          size={6}
          pattern="[0-9]+|all"
          title="A user id, or all"
          placeholder="mine"
          list="whose"
          value={value.value}
          onInput={(event) => void (value.value = event.currentTarget.value)}
          onChange={(event) => event.currentTarget.form?.requestSubmit()}
        />
      </label>
      <datalist id="whose">
        <option value="all" />
      </datalist>
    </form>
  );
}
