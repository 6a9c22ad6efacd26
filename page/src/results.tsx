// A job's results: streamed into memory line by line, shown through a window of a few rows.
import { useComputed, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { ApiError, isFinal, received, recovered, send, type Status } from "./api";
import { bitsOf, toNumber } from "./addresses";
import { Problem, Spoken, streaming, useAction } from "./components";
import { go, query, withQuery } from "./router";
import { count, csvLine, save, visible } from "./text";

export interface Result {
  id: number;
  ip_address: string;
  port: number;
  protocol: string;
  status: string;
  service: string;
  version: string;
  os_info: string;
  banner: string;
}

interface Row extends Result {
  order: string;
  words: string;
}

const COLUMNS = [
  ["ip_address", "Address"],
  ["port", "Port"],
  ["status", "State"],
  ["service", "Service"],
  ["version", "Version"],
  ["os_info", "System"],
  ["banner", "Banner"],
] as const;
type Column = (typeof COLUMNS)[number][0];
const FIELDS = "id,ip_address,port,protocol,status,service,version,os_info,banner";
const USUAL: Column[] = ["ip_address", "port", "status", "service", "version"];
const MOST = 250_000; // rows in the page: beyond them a browser tab takes a gigabyte
const COUNTED = 1_000; // results at most, for the number beside the tab
const ROW = 32; // px
const CARD = 56; // px of a row of two lines on a narrow screen
const OVERSCAN = 10;
const HAND_ON = 1_000; // maximum delay in ms before received rows are shown
const FOLLOW = 2_000; // polling interval of new results in ms

const portText = (row: Result) => `${row.port}/${row.protocol}`;

function toRow(result: Result): Row {
  const { ip_address, service, version, os_info, banner } = result;
  return {
    ...result,
    order: (bitsOf(ip_address) === 32 ? "4" : "6") + toNumber(ip_address).toString(16).padStart(32, "0"),
    words: `${ip_address} :${portText(result)} ${service} ${version} ${os_info} ${banner}`.toLowerCase(),
  };
}

/** Read results with a higher id than `after`, by id, and hand them on as they arrive; returns whether there were too many. */
async function stream(jobId: string, after: number, rows: (found: Row[]) => number, signal: AbortSignal): Promise<boolean> {
  // Only with `after` are results sorted by id, so that a load can continue after a broken connection.
  const path = `/api/v1/task/${jobId}/results?fields=${FIELDS}&after=${after}`;
  const answer = await send("GET", path, { headers: { Accept: "application/x-ndjson" }, signal });
  const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let found: Row[] = [];
  let handed = 0;
  let handedAt = -Infinity;
  for (;;) {
    const { done, value } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop()!;
    for (const line of lines) if (line) found.push(toRow(JSON.parse(line) as Result));
    // All rows are sorted again with each portion, so portions double in size or come once a second.
    const due = done || found.length >= handed || performance.now() - handedAt >= HAND_ON;
    if (due && found.length) {
      handed = rows(found);
      handedAt = performance.now();
      found = [];
      if (handed >= MOST) {
        await reader.cancel();
        return true;
      }
    }
    if (done) return false;
  }
}

/** Count a job's results up to `COUNTED`, as text: only the ids of so many are sent. */
export async function countResults(jobId: string, signal: AbortSignal): Promise<string> {
  const path = `/api/v1/task/${jobId}/results?after=0&limit=${COUNTED}&fields=id`;
  const answer = await send("GET", path, { headers: { Accept: "application/x-ndjson" }, signal });
  const found = (await received(answer.text(), signal)).split("\n").length - 1;
  return found < COUNTED ? count(found) : `${count(COUNTED)}+`;
}

const compare = (column: Column) => (a: Row, b: Row) => {
  const text = column === "ip_address" ? "order" : column;
  const [x, y] = [a[text], b[text]];
  return x < y ? -1 : x > y ? 1 : a.order < b.order ? -1 : a.order > b.order ? 1 : a.port - b.port;
};

const matcher = (text: string) => {
  const terms = text.toLowerCase().split(/\s+/).filter(Boolean);
  return (row: Row) =>
    terms.every((term) =>
      /^:\d+$/.test(term) ? row.words.includes(` ${term}/`) : /^\d+\.[\d.]*$/.test(term) ? row.ip_address.startsWith(term) : row.words.includes(term),
    );
};

export function Results({ jobId, status, empty }: { jobId: string; status: Status; empty: string }) {
  const rows = useSignal<Row[]>([]);
  const loading = useSignal(true);
  const cut = useSignal(false);
  const error = useSignal<ApiError | undefined>(undefined);
  const search = useComputed(() => query("q"));
  const again = useSignal(0);
  const known = query("columns").split(",").filter((each): each is Column => COLUMNS.some(([name]) => name === each));
  const columns = known.length ? known : USUAL;
  const [sort, direction] = (query("sort") || "ip_address").split(":") as [Column, string?];

  // Runs as long as the job does: each load asks only for what is newer than the last result.
  useEffect(() => {
    const abort = new AbortController();
    let timer = 0;
    const add = (found: Row[]) => {
      rows.value = rows.peek().length ? rows.peek().concat(found) : found;
      return rows.value.length;
    };
    const load = async () => {
      if (cut.peek()) return; // a further load would add as many rows again
      streaming.value++;
      try {
        const last = rows.peek().reduce((newest, row) => Math.max(newest, row.id), 0);
        cut.value = await stream(jobId, last, add, abort.signal);
        error.value = undefined;
        if (!isFinal(status) && !cut.value) timer = window.setTimeout(load, FOLLOW);
      } catch (thrown) {
        if (abort.signal.aborted) return;
        error.value = thrown instanceof ApiError ? thrown : new ApiError(0, "The results were cut off.");
        const { status: code } = error.value;
        if (code === 0 || code === 429 || code >= 500) timer = window.setTimeout(load, FOLLOW);
      } finally {
        streaming.value--;
        if (!abort.signal.aborted) loading.value = false;
      }
    };
    void load();
    return () => {
      window.clearTimeout(timer);
      abort.abort();
    };
  }, [jobId, isFinal(status), again.value, recovered.value]);

  const order = useSignal({ sort, direction });
  order.value = order.value.sort === sort && order.value.direction === direction ? order.value : { sort, direction };
  const shown = useComputed(() => {
    const found = search.value.trim() ? rows.value.filter(matcher(search.value)) : rows.value.slice();
    found.sort(compare(order.value.sort));
    return order.value.direction === "down" ? found.reverse() : found;
  });

  const everything = useAction(async () => {
    const answer = await send("GET", `/api/v1/task/${jobId}/results`, { headers: { Accept: "text/csv" } });
    save(`scanfleet-job-${jobId}.csv`, await received(answer.blob()));
  });
  const saveShown = () => {
    const names = COLUMNS.filter(([name]) => columns.includes(name));
    const lines = shown.value.map((row) => csvLine(names.map(([name]) => (name === "port" ? portText(row) : row[name]))));
    save(`scanfleet-job-${jobId}-shown.csv`, new Blob([csvLine(names.map(([name]) => name)), ...lines], { type: "text/csv" }));
  };

  if (!rows.value.length) {
    return (
      <>
        <Problem error={error.value} again={() => void again.value++} />
        <p class="empty">{loading.value ? "Loading results…" : error.value ? "" : empty}</p>
      </>
    );
  }
  return (
    <>
      <div class="bar">
        <input
          type="search"
          aria-label="Search results"
          placeholder="ssh   :443   10.20.3."
          value={search.value}
          onInput={(event) => go(withQuery({ q: event.currentTarget.value }), { replace: true })}
        />
        <details class="menu">
          <summary>Columns</summary>
          <div>
            {COLUMNS.map(([name, label]) => (
              <label key={name}>
                <input
                  type="checkbox"
                  checked={columns.includes(name)}
                  disabled={columns.length === 1 && columns.includes(name)}
                  onChange={(event) => {
                    const chosen = event.currentTarget.checked ? [...columns, name] : columns.filter((each) => each !== name);
                    go(withQuery({ columns: chosen.join() === USUAL.join() ? undefined : chosen.join() }), { replace: true });
                  }}
                />{" "}
                {label}
              </label>
            ))}
          </div>
        </details>
        <button type="button" onClick={saveShown}>
          Save shown as CSV
        </button>
        <button type="button" disabled={everything.busy} onClick={everything.run}>
          Save all as CSV
        </button>
      </div>
      <Problem error={error.value} again={() => void again.value++} />
      <Problem error={everything.error} />
      <Spoken text={`Results: ${count(shown.value.length)} of ${count(rows.value.length)}`} final={isFinal(status) && !loading.value} />
      <p class="faint">
        {count(shown.value.length)} of {count(rows.value.length)} results
        {loading.value && ", loading…"}
        {cut.value && `: the page stops at ${count(MOST)}; save all to have the rest`}
      </p>
      <Window rows={shown.value} columns={columns} sort={sort} down={direction === "down"} />
    </>
  );
}

function Window({ rows, columns, sort, down }: { rows: Row[]; columns: Column[]; sort: Column; down: boolean }) {
  const box = useRef<HTMLDivElement>(null);
  const top = useSignal(0);
  const height = useSignal(600);
  const narrow = useSignal(matchMedia("(max-width: 600px)").matches);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => {
      height.value = entry!.contentRect.height;
      narrow.value = matchMedia("(max-width: 600px)").matches;
    });
    observer.observe(box.current!);
    return () => observer.disconnect();
  }, []);
  const row = narrow.value ? CARD : ROW;
  const first = Math.max(0, Math.min(Math.floor(top.value / row) - OVERSCAN, rows.length - 1));
  const last = Math.min(rows.length, Math.ceil((top.value + height.value) / row) + OVERSCAN);
  const names = COLUMNS.filter(([name]) => columns.includes(name));
  return (
    <div
      class="window"
      ref={box}
      tabIndex={0}
      role="region"
      aria-label="Results"
      style={{ height: `min(70vh, ${rows.length * row + 40}px)` }}
      onScroll={(event) => void (top.value = event.currentTarget.scrollTop)}
    >
      <table aria-rowcount={rows.length + 1} class="results cards">
        <thead>
          <tr aria-rowindex={1}>
            {names.map(([name, label]) => (
              <th key={name} scope="col" class={name} aria-sort={sort === name ? (down ? "descending" : "ascending") : undefined}>
                <button type="button" onClick={() => go(withQuery({ sort: sort === name && !down ? `${name}:down` : name }), { replace: true })}>
                  {label}
                  <span aria-hidden="true">{sort === name ? (down ? " ▾" : " ▴") : ""}</span>
                </button>
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          <tr class="space" aria-hidden="true" style={{ height: `${first * row}px` }} />
          {rows.slice(first, last).map((each, index) => (
            <tr key={each.id} aria-rowindex={first + index + 2} style={{ height: `${row}px` }}>
              {names.map(([name]) => (
                <td key={name} class={name} title={name === "banner" || name === "version" ? visible(each[name]) : undefined}>
                  {name === "port" ? portText(each) : visible(String(each[name]))}
                </td>
              ))}
            </tr>
          ))}
          <tr class="space" aria-hidden="true" style={{ height: `${(rows.length - last) * row}px` }} />
        </tbody>
      </table>
    </div>
  );
}
