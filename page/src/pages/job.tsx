import { useSignal } from "@preact/signals";
import { useEffect, useMemo, useRef } from "preact/hooks";
import { change, get, isFinal, me, received, send, type Host, type Ledger, type OutcomeMap, type Policy, type Snapshot, type Subnet, type TaskStatus, type Waiting } from "../api";
import { collapse, parseNetwork, toNumber, toText } from "../addresses";
import { watch } from "../events";
import { Coverage, together } from "../map";
import { Confirm, Field, Problem, Spoken, StatusWord, Title, useLoad, useSettled, type Loaded } from "../components";
import { go, query, withQuery } from "../router";
import { countResults, Results } from "../results";
import { count, duration, exact, plural, visible } from "../text";
import { LiveDot } from "./jobs";

const SETTLE = 2_000; // minimum ms between two loads of map and ledger, however often the job reports
const CELLS = 65_536; // maximum cells of one map
const CHUNK = 1_024; // addresses of the largest chunk
const PORTS = 1_000; // of a host at most
const PORTS_NAMED = 5;
const NAMED = 10_000; // listed addresses that were not probed; more are counted
const PAGES = 10; // of the ledger of a running job
const LISTED: (keyof Ledger["counts"])[] = ["refused", "cancelled", "lost", "timed_out"]; // outcomes of addresses that were not probed to the end

const TABS = [
  ["", "Overview"],
  ["results", "Results"],
  ["not-probed", "Not probed"],
  ["request", "Request"],
] as const;

export function JobPage({ id, tab }: { id: string; tab: string }) {
  const task = useSignal<TaskStatus | undefined>(undefined);
  const cancelling = useSignal(false);
  const first = useLoad((signal) => get<TaskStatus>(`/api/v1/task/${id}`, signal), [id]);
  useEffect(() => {
    const ended = task.peek() && isFinal(task.peek()!.status.status); // the stream is ahead of a late answer
    if (first.data && !ended) task.value = first.data;
  }, [first.data]);
  const gone = first.error?.status === 403 || first.error?.status === 404;
  const unfinished = first.data !== undefined && !gone && !isFinal(first.data.status.status);
  useEffect(() => {
    if (!unfinished) return;
    return watch(`/api/v1/task/${id}/events`, (next) => void (task.value = next), first.reload, { untilFinal: true });
  }, [id, unfinished]);
  const settled = useSettled(task.value, SETTLE);
  const ledger = useLoad((signal) => get<Ledger>(`/api/v1/task/${id}/ledger?after=0&page_size=1`, signal), [id, settled]);
  const outdated = !!first.data && !unfinished && !!ledger.data && !isFinal(ledger.data.status);
  useEffect(() => {
    if (outdated) ledger.reload(); // it was read just before the end
  }, [outdated]);
  const snapshot = useLoad((signal) => get<Snapshot>(`/api/v1/task/${id}/snapshot`, signal), [id]);

  const about = first.data?.job;
  const results: Loaded<string | undefined> = useLoad(
    async (signal) => {
      if (!about || about.user_id !== me.value!.user_id) return undefined; // the audit log has each reader of another user's results
      if (results.data?.endsWith("+")) return results.data; // results are only added
      return countResults(id, signal);
    },
    [id, about?.user_id, settled],
  );
  const named = useLoad(
    async (signal) => {
      if (!about || about.user_id !== me.value!.user_id) return {}; // names are their owner's
      const [subnet, policy] = await Promise.allSettled([get<Subnet>(`/api/v1/subnet/${about.subnet_id}`, signal), get<Policy>(`/api/v1/policy/${about.policy_id}`, signal)]);
      return { subnet: subnet.status === "fulfilled" ? subnet.value.name : "", policy: policy.status === "fulfilled" ? policy.value.name : "" }; // they may be deleted
    },
    [about?.subnet_id, about?.policy_id],
  ).data;

  if (first.error && (gone || !task.value)) {
    return (
      <>
        <Title text={`Job ${id}`} />
        <Problem error={first.error} again={first.reload} />
        <p>
          <a href="/app/jobs">All jobs</a>
        </p>
      </>
    );
  }
  if (!task.value) return <Title text={`Job ${id}`} />;
  const { status, job } = task.value;
  const missing = ledger.data && notProbed(ledger.data);
  const counts = ledger.data?.counts;
  return (
    <>
      <div class="head">
        <Title text={`Job ${id}`}>
          Job {id} <StatusWord status={status.status} progress={status.progress} />
          {status.status === "completed" && ledger.data?.accounted && " ✓"}
        </Title>
        {!isFinal(status.status) && (
          <button type="button" class="danger" data-key="x" onClick={() => void (cancelling.value = true)}>
            Cancel
          </button>
        )}
      </div>
      <p>
        {snapshot.data && (
          <>
            <code>{snapshot.data.cidr}</code> {named?.subnet !== snapshot.data.cidr && visible(named?.subnet ?? "")} · {named?.policy && `${visible(named.policy)} · `}
            {plural(snapshot.data.ports, "port")} · {String(snapshot.data.policy.technique)}
          </>
        )}
        {me.value!.admin && job.user_id !== me.value!.user_id && <> · user {job.user_id}</>}
      </p>
      <Spoken text={`Job ${id} ${status.status}, ${status.progress} %, ${plural(status.machines_found, "machine")} found`} final={isFinal(status.status)} />
      <progress max={100} value={status.progress} aria-label="progress" />
      <p class="line">
        {counts && ledger.data && (
          <span>
            {count(ledger.data.request.probes - counts.waiting - counts.refused - counts.cancelled - counts.lost)} of {plural(ledger.data.request.probes, "probe")} accounted for
            {ledger.data.eta_seconds !== null && !isFinal(status.status) && ` · about ${duration(ledger.data.eta_seconds)} left`}
          </span>
        )}
        <span>{plural(status.machines_found, "machine")} found</span>
        {isFinal(status.status) ? job.end_time && <span>ended {exact(job.end_time)}</span> : <LiveDot />}
        {ledger.data?.accounted && <span class="good">✓ accounted for</span>}
      </p>
      <Problem error={ledger.error} again={ledger.reload} />
      {status.error && <p class="problem">{visible(status.error)}</p>}
      {!!missing && isFinal(status.status) && (
        <p class="problem">
          {count(missing)} of {plural(ledger.data!.request.addresses, "address", "addresses")} {missing === 1 ? "was" : "were"} NOT probed. <a href={`/app/jobs/${id}/not-probed`}>Addresses and reasons</a>
        </p>
      )}
      <nav class="tabs" aria-label="parts of the job">
        {TABS.map(([name, label]) => (
          <a key={name} href={`/app/jobs/${id}${name && `/${name}`}`} aria-current={tab === name ? "page" : undefined}>
            {label}
            {name === "results" && results.data !== undefined && ` ${results.data}`}
            {name === "not-probed" && missing !== undefined && ` ${count(missing)}`}
          </a>
        ))}
      </nav>
      {(tab === "" || tab === "request") && <Problem error={snapshot.error} again={snapshot.reload} />}
      {tab === "" && <Overview id={id} task={task.value} settled={settled} snapshot={snapshot.data} />}
      {tab === "results" && <Results key={id} jobId={id} status={status.status} empty={whyEmpty(task.value, ledger.data)} />}
      {tab === "not-probed" && counts && <NotProbed id={id} settled={settled} final={isFinal(status.status)} any={LISTED.some((name) => counts[name])} />}
      {TABS.every(([name]) => name !== tab) && <p class="empty">A job has no such page.</p>}
      {tab === "request" && snapshot.data && <Request snapshot={snapshot.data} job={task.value} />}
      {cancelling.value && (
        <Confirm
          title={`Cancel job ${id}?`}
          verb="Cancel the job"
          act={() => change("POST", `/api/v1/task/${id}/cancel`)}
          close={() => void (cancelling.value = false)}
        >
          <p>No further packets are sent for this job. The results so far are kept.</p>
        </Confirm>
      )}
    </>
  );
}

/** The number of addresses that were not probed; one whose blocks of ports differ counts by its share. */
function notProbed({ counts, request }: Ledger): number {
  const probes = counts.refused + counts.cancelled + counts.lost;
  return Math.round(probes / request.ports) || Math.min(probes, 1);
}

/** The message of an empty list of results, which distinguishes "nothing found" from "not probed". */
function whyEmpty(task: TaskStatus, ledger: Ledger | undefined): string {
  if (!isFinal(task.status.status)) return "None yet.";
  if (!ledger) return "None. The ledger is not loaded yet.";
  const { counts } = ledger;
  const missing = counts.lost + counts.cancelled + counts.refused + counts.timed_out + counts.waiting;
  if (!counts.answered && !counts.silent && !counts.down) return "Not probed: no address of this job was scanned.";
  const rest = missing ? " What was not probed is not claimed to be empty." : "";
  if (task.status.machines_found) return `${plural(task.status.machines_found, "machine")} answered, none has an open port.${rest}`;
  return `No machine answered.${rest}`;
}

function Overview({ id, task, settled, snapshot }: { id: string; task: TaskStatus; settled: number; snapshot: Snapshot | undefined }) {
  const block = query("ports");
  const from = query("from");
  const known = useRef<{ path: string; tag: string; map: OutcomeMap } | undefined>(undefined);
  const wide = !!snapshot && (snapshot.addresses > CELLS || (snapshot.cidr.includes(":") && snapshot.addresses > CHUNK));
  const asked = new URLSearchParams();
  if (from) asked.set("from", from);
  else if (wide) asked.set("by", "chunk");
  if (block) asked.set("ports", block);
  const path = `/api/v1/task/${id}/map?${asked}`;
  const map = useLoad(
    async (signal) => {
      if (!snapshot) return undefined; // a large map is asked for by chunk
      const before = known.current?.path === path ? known.current : undefined;
      const answer = await send("GET", path, { signal, ...(before ? { headers: { "If-None-Match": before.tag } } : {}) });
      if (answer.status === 304 && before) return before.map;
      const found = await received<OutcomeMap>(answer.json(), signal);
      known.current = { path, tag: answer.headers.get("ETag") ?? "", map: found };
      return found;
    },
    [path, settled, !snapshot],
  );
  const letters = useMemo(() => (map.data ? together(map.data) : ""), [map.data]);
  const waits = !isFinal(task.status.status);
  return (
    <>
      {waits && <WaitsFor id={id} settled={settled} />}
      <Problem error={map.error} again={map.reload} />
      {map.error && (block || map.error.status === 413) && <Ports key={block} ports={block} />}
      {map.data && (block || map.data.blocks.length > 1) && (
        <nav class="counts" aria-label="ports of the map">
          <a href={withQuery({ ports: undefined })} aria-current={block ? undefined : "true"}>
            all ports
          </a>
          {map.data.blocks.map((each) => (
            <a key={each.ports} href={withQuery({ ports: each.ports })} aria-current={block === each.ports ? "true" : undefined}>
              {each.ports.length > 24 ? `${each.ports.slice(0, 24)}…` : each.ports}
            </a>
          ))}
        </nav>
      )}
      {map.data && letters && <Coverage map={map.data} letters={letters} openPorts={(address, signal) => openPorts(id, address, signal)} />}
      {from && snapshot && map.data && (
        <nav class="pager" aria-label="parts of the map">
          {wide && <a href={withQuery({ from: undefined, at: undefined })}>all chunks</a>}
          {part(snapshot, map.data, -CELLS, "previous addresses")}
          {part(snapshot, map.data, CELLS, "next addresses")}
        </nav>
      )}
    </>
  );
}

/** The open ports of an address, as the end of a sentence. */
async function openPorts(id: string, address: string, signal: AbortSignal): Promise<string> {
  const [host] = await get<Host[]>(`/api/v1/task/${id}/hosts?address=${address}`, signal);
  const found = host?.ports ?? [];
  const open = found.filter((each) => each.status === "open").map((each) => `${each.port}/${each.protocol}`);
  if (!open.length) return ", no port open";
  const named = open.slice(0, PORTS_NAMED).join(", ") + (open.length > PORTS_NAMED ? ", …" : "");
  return `, ${found.length === PORTS ? "at least " : ""}${plural(open.length, "port")} open: ${named}`;
}

/** Asks for some of the job's ports, when the map of all of them is too large. */
function Ports({ ports }: { ports: string }) {
  const text = useSignal(ports);
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        go(withQuery({ ports: text.value.trim() }));
      }}
    >
      <Field label="Ports of the map" hint="some of the job's ports: 22,80,8000-8100">
        {(attributes) => <input {...attributes} spellcheck={false} value={text.value} onInput={(event) => void (text.value = event.currentTarget.value)} />}
      </Field>
      <p class="actions">
        <button>Show</button>
      </p>
    </form>
  );
}

/** A link to the part of a large map that begins `step` addresses from this one; nothing if there is none. */
function part(snapshot: Snapshot, map: OutcomeMap, step: number, words: string) {
  const network = parseNetwork(snapshot.cidr)!;
  const first = toNumber(map.first) + BigInt(step);
  if (first < network.first || first >= network.first + (1n << BigInt(network.bits - network.length))) return null;
  return <a href={withQuery({ from: toText(first, network.bits) })}>{words}</a>;
}

function WaitsFor({ id, settled }: { id: string; settled: number }) {
  const waiting = useLoad((signal) => get<Waiting>(`/api/v1/task/${id}/waiting`, signal), [id, settled]);
  if (!waiting.data?.waiting) return null;
  return (
    <div class="note">
      <p>The job waits{waiting.data.next_possible_start && <> until {exact(waiting.data.next_possible_start)} at the earliest</>}:</p>
      <ul>
        {waiting.data.reasons.map((reason) => (
          <li key={reason.kind}>{visible(reason.detail || reason.kind.replace("_", " "))}</li>
        ))}
      </ul>
    </div>
  );
}

/** The addresses that were not probed to the end; `any` is whether there are any among those that the ledger lists. */
function NotProbed({ id, settled, final, any }: { id: string; settled: number; final: boolean; any: boolean }) {
  const found = useLoad(
    async (signal) => {
      const entries = [];
      let after: number | null | undefined = any ? 0 : null;
      // A page may be short although the list continues; those of a running job are read again and again.
      for (let pages = 0; after != null && entries.length < NAMED && (final || pages < PAGES); pages++) {
        const { not_probed: page }: Ledger = await get<Ledger>(`/api/v1/task/${id}/ledger?after=${after}&page_size=1000`, signal);
        entries.push(...page.addresses.filter(({ outcome }) => (LISTED as string[]).includes(outcome)));
        after = page.next;
      }
      return { entries, more: after != null };
    },
    [id, settled, final, any],
  );
  const groups = useMemo(() => {
    const alike = new Map<string, { ports: string; outcome: string; reason: string; addresses: string[] }>();
    for (const each of found.data?.entries ?? []) {
      const key = JSON.stringify([each.ports, each.outcome, each.reason]);
      const group = alike.get(key) ?? { ...each, addresses: [] };
      group.addresses.push(each.address);
      alike.set(key, group);
    }
    return [...alike.values()].flatMap((group) => collapse(group.addresses).map((network) => ({ ...group, network })));
  }, [found.data]);
  return (
    <>
      <Problem error={found.error} again={found.reload} />
      {found.data && !found.data.more && !groups.length && <p class="empty">{final ? "Every address was fully probed." : "None so far."}</p>}
      {found.data?.more && <p>{final ? `The first ${count(found.data.entries.length)} entries; there may be more.` : "The list is complete when the job has ended."}</p>}
      {!!groups.length && (
        <>
          <table class="cards">
            <caption class="hidden">Addresses that were not fully probed</caption>
            <thead>
              <tr>
                <th scope="col">Addresses</th>
                <th scope="col">Outcome</th>
                <th scope="col">Why</th>
                <th scope="col">Ports</th>
              </tr>
            </thead>
            <tbody>
              {groups.map((each) => (
                <tr key={each.network + each.ports + each.outcome}>
                  <td>
                    <code>{each.network}</code>
                  </td>
                  <td>{each.outcome.replace("_", " ")}</td>
                  <td>{each.reason ? visible(each.reason) : each.outcome === "cancelled" && "the job was cancelled"}</td>
                  <td data-label="Ports">
                    <code class="long">{each.ports}</code>
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </>
      )}
    </>
  );
}

function Request({ snapshot, job }: { snapshot: Snapshot; job: TaskStatus }) {
  const { policy, exclude } = snapshot;
  return (
    <>
      <p>The request as submitted; its subnet and policy may have changed since.</p>
      <dl class="facts">
        <dt>Network</dt>
        <dd>
          <code>{snapshot.cidr}</code>
        </dd>
        <dt>Excluded</dt>
        <dd>{exclude.length ? exclude.map((each) => <code key={each}>{each} </code>) : "nothing"}</dd>
        <dt>Probes</dt>
        <dd>
          {count(snapshot.addresses - snapshot.excluded)} addresses × {count(snapshot.ports)} ports, in {plural(snapshot.chunks, "chunk")}
        </dd>
        <dt>Subnet, policy</dt>
        <dd>
          <a href={`/app/subnets/${job.job.subnet_id}`}>subnet {job.job.subnet_id}</a>, <a href={`/app/policies/${job.job.policy_id}`}>policy {job.job.policy_id}</a>
        </dd>
        <dt>Created</dt>
        <dd>{exact(job.job.created_at)}</dd>
      </dl>
      <h2>Policy</h2>
      <dl class="facts">
        {Object.entries(policy).map(([name, value]) => [
          <dt key={name}>
            <code>{name}</code>
          </dt>,
          <dd key={`${name}=`}>
            <code class="long">{Array.isArray(value) ? value.join(", ") || "none" : String(value ?? "none")}</code>
          </dd>,
        ])}
      </dl>
    </>
  );
}
