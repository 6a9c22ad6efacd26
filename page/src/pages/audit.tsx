import { useSignal } from "@preact/signals";
import { get, me, type AuditEntry } from "../api";
import { Filter, Pager, Problem, Title, useLoad } from "../components";
import { go, pageNumber, query, withQuery } from "../router";
import { exact, visible } from "../text";

const SIZE = 50;
const TEXTS = ["subject", "action", "rule", "source", "service", "request_id"] as const;
const TIMES = ["since", "until"] as const;

const isTime = (name: string) => name === "since" || name === "until";

/** The time of a `datetime-local` input, taken as UTC; "" if it is none. */
function utc(text: string): string {
  const time = new Date(`${text}Z`);
  return Number.isNaN(time.getTime()) ? "" : time.toISOString();
}

export function Audit() {
  return (
    <>
      <Title text="Audit" />
      {me.value!.admin ? <Entries /> : <p class="empty">The audit log is for administrators.</p>}
    </>
  );
}

function Entries() {
  const page = pageNumber();
  const asked = new URLSearchParams();
  for (const name of [...TEXTS, "decision"]) if (query(name)) asked.set(name, query(name));
  for (const name of TIMES) if (utc(query(name))) asked.set(name, utc(query(name)));
  const entered = useSignal<Record<string, string>>({});
  const list = useLoad(
    (signal) => get<{ entries: AuditEntry[]; total: number }>(`/api/v1/audit?${asked}&page=${page}&page_size=${SIZE}`, signal),
    [asked.toString(), page],
  );
  return (
    <>
      <form
        class="bar"
        onSubmit={(event) => {
          event.preventDefault();
          go(withQuery({ ...entered.value, page: undefined }));
        }}
      >
        {[...TEXTS, ...TIMES].map((name) => (
          <label class="filter" key={name}>
            {name.replace("_", " ")}
            {isTime(name) && " (UTC)"}{" "}
            <input
              size={10}
              type={(isTime(name) ? "datetime-local" : "text") as "text"}
              value={entered.value[name] ?? query(name)}
              onInput={(event) => void (entered.value = { ...entered.value, [name]: event.currentTarget.value })}
            />
          </label>
        ))}
        <Filter name="decision" label="decision" value={query("decision")} options={[["", "any"], ["allowed", "allowed"], ["refused", "refused"]]} />
        <button>Search</button>
        {asked.size > 0 && (
          <a href="/app/audit" onClick={() => void (entered.value = {})}>
            Show all
          </a>
        )}
      </form>
      <Problem error={list.error} again={list.reload} />
      {list.data && !list.data.entries.length && <p class="empty">No entry matches.</p>}
      {!!list.data?.entries.length && (
        <>
          <table class="cards">
            <caption class="hidden">Audit entries, newest first</caption>
            <thead>
              <tr>
                <th scope="col">Time</th>
                <th scope="col">Who</th>
                <th scope="col">Did</th>
                <th scope="col">What</th>
                <th scope="col">Decision</th>
                <th scope="col">From</th>
                <th scope="col">Request</th>
              </tr>
            </thead>
            <tbody>
              {list.data.entries.map((each) => (
                <tr key={each.id}>
                  <td>
                    <time dateTime={each.time}>{exact(each.time)}</time>
                  </td>
                  <td data-label="Who">{each.subject ? <a href={withQuery({ subject: each.subject, page: undefined })}>{visible(each.subject)}</a> : "–"}</td>
                  <td data-label="Did">{visible(each.action)}</td>
                  <td>
                    <code class="long">{visible(each.target)}</code>
                  </td>
                  <td>
                    <span class={`status ${each.decision === "refused" ? "failed" : "completed"}`}>{each.decision}</span> {each.rule}
                    {each.genuine === false && (
                      <span class="status failed" title="The entry was changed or added in the database.">
                        not genuine
                      </span>
                    )}
                    {each.reason && <span class="faint"> {visible(each.reason)}</span>}
                    {(each.count ?? 1) > 1 && ` × ${each.count}`}
                  </td>
                  <td data-label="From">{visible(each.source)}</td>
                  <td data-label="Request">
                    {each.request_id && (
                      <a data-row href={withQuery({ request_id: each.request_id, page: undefined })} title="everything of this request">
                        <code>{each.request_id.slice(0, 8)}</code>
                      </a>
                    )}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
          <Pager page={page} size={SIZE} total={list.data.total} />
        </>
      )}
    </>
  );
}
