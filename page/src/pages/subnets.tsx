import { useSignal } from "@preact/signals";
import { ApiError, change, send, type Subnet } from "../api";
import { countAddresses, parseNetwork } from "../addresses";
import { Confirm, Field, Problem, Title, useAction, useLoad } from "../parts";
import { go } from "../router";
import { draft, dropDraft, keepDraft, loadSubnets, subnets } from "../store";
import { count, parseCsv, plural, visible } from "../text";
import { LastScan } from "./last-scan";

export function Subnets() {
  const list = useLoad(loadSubnets, []);
  const search = useSignal("");
  const deleting = useSignal<Subnet | undefined>(undefined);
  const wanted = search.value.trim().toLowerCase();
  const all = [...subnets.value.values()];
  const found = all.filter((each) => each.name.toLowerCase().includes(wanted) || each.cidr.includes(wanted));
  return (
    <>
      <Title text="Subnets" />
      <div class="bar">
        <input type="search" aria-label="Search subnets" placeholder="name, 10.20." value={search.value} onInput={(event) => void (search.value = event.currentTarget.value)} />
        <a class="button" href="/app/subnets/new">
          New subnet
        </a>
        <a class="button" href="/app/subnets/import">
          Import CSV
        </a>
      </div>
      <Problem error={list.error} again={list.reload} />
      {!all.length && !list.error && <p class="empty">There are no subnets yet: networks that you may scan.</p>}
      {!!all.length && (
        <>
          <table class="cards">
            <caption class="hidden">Subnets</caption>
            <thead>
              <tr>
                <th scope="col">Network</th>
                <th scope="col">Name</th>
                <th scope="col" class="number">
                  Addresses
                </th>
                <th scope="col">Last scan</th>
                <th scope="col">
                  <span class="hidden">Actions</span>
                </th>
              </tr>
            </thead>
            <tbody>
              {found.map((each) => (
                <tr key={each.id}>
                  <td>
                    <a data-row href={`/app/subnets/${each.id}`}>
                      <code>{each.cidr}</code>
                    </a>
                  </td>
                  <td>{visible(each.name)}</td>
                  <td class="number" data-label="Addresses">
                    {count(countAddresses(each.cidr, each.exclude))}
                  </td>
                  <td data-label="Last scan">
                    <LastScan filter={`subnet_id=${each.id}`} />
                  </td>
                  <td class="actions">
                    <a class="button" href={`/app/new?subnet=${each.id}`}>
                      Scan<span class="hidden"> {each.cidr}</span>
                    </a>
                    <button type="button" class="quiet" onClick={() => void (deleting.value = each)}>
                      Delete<span class="hidden"> {each.cidr}</span>
                    </button>
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
          <p class="pager">
            {count(found.length)} of {count(all.length)}
          </p>
        </>
      )}
      {deleting.value && (
        <Confirm
          title={`Delete subnet ${deleting.value.cidr}?`}
          verb="Delete"
          act={async () => {
            await change("DELETE", `/api/v1/subnet/${deleting.value!.id}`);
            list.reload();
          }}
          close={() => void (deleting.value = undefined)}
        >
          <p>“{visible(deleting.value.name)}” is forgotten. Its jobs and their results stay.</p>
        </Confirm>
      )}
    </>
  );
}

interface Entered {
  name: string;
  cidr: string;
  exclude: string;
}

export function SubnetForm({ id }: { id?: string }) {
  const tag = useSignal("");
  const found = useLoad(
    async (signal) => {
      if (!id) return undefined;
      const answer = await send("GET", `/api/v1/subnet/${id}`, { signal });
      tag.value = answer.headers.get("ETag") ?? "";
      return (await answer.json()) as Subnet;
    },
    [id],
  );
  const key = `subnet ${id ?? "new"}`;
  const entered = useSignal<Entered | undefined>(draft<Entered>(key));
  const now = entered.value ?? {
    name: found.data?.name ?? "",
    cidr: found.data?.cidr ?? "",
    exclude: found.data?.exclude.join("\n") ?? "",
  };
  const enter = (changed: Partial<Entered>) => {
    entered.value = { ...now, ...changed };
    keepDraft(key, entered.value);
  };
  const save = useAction(async () => {
    const body = { name: now.name || now.cidr, cidr: now.cidr.trim(), exclude: now.exclude.split(/[\s,]+/).filter(Boolean) };
    if (id) await change("PUT", `/api/v1/subnet/${id}`, body, tag.value ? { "If-Match": tag.value } : {});
    else await change("POST", "/api/v1/subnet", body);
    dropDraft(key);
    await loadSubnets();
    go("/app/subnets");
  });
  const wrong = save.error?.fields ?? {};
  const size = countAddresses(now.cidr, now.exclude.split(/[\s,]+/).filter(Boolean));
  return (
    <>
      <Title text={id ? `Subnet ${id}` : "New subnet"} />
      <Problem error={found.error} again={found.reload} />
      {(!id || found.data || entered.value) && (
        <form
          onSubmit={(event) => {
            event.preventDefault();
            void save.run();
          }}
        >
          <Field label="Network" hint={size ? plural(size, "address", "addresses") : "as a CIDR, or a single address"} error={wrong.cidr}>
            {(attributes) => <input {...attributes} required spellcheck={false} value={now.cidr} onInput={(event) => enter({ cidr: event.currentTarget.value })} />}
          </Field>
          <Field label="Name" hint="the network itself unless given" error={wrong.name}>
            {(attributes) => <input {...attributes} maxLength={200} value={now.name} onInput={(event) => enter({ name: event.currentTarget.value })} />}
          </Field>
          <Field label="Exclude" hint="networks and addresses to leave out, one on a line" error={wrong.exclude}>
            {(attributes) => <textarea {...attributes} rows={4} spellcheck={false} value={now.exclude} onInput={(event) => enter({ exclude: event.currentTarget.value })} />}
          </Field>
          <Problem error={save.error} />
          {save.error?.status === 412 && (
            <p>
              Someone else has changed it meanwhile.{" "}
              <button type="button" onClick={() => (dropDraft(key), (entered.value = undefined), save.clear(), found.reload())}>
                Discard mine and load theirs
              </button>
            </p>
          )}
          <p class="actions">
            <a class="button" href="/app/subnets" onClick={() => dropDraft(key)}>
              Discard
            </a>
            <button class="primary" disabled={save.busy}>
              Save
            </button>
          </p>
        </form>
      )}
    </>
  );
}

interface Line {
  number: number;
  name: string;
  cidr: string;
  exclude: string[];
  result: string;
  good?: boolean;
}

const MADE_ALREADY = "there already";

/** The lines of a CSV file with the columns name, cidr and exclude, in any order; without a header, cidr comes first. */
function readLines(text: string): Line[] {
  const rows = parseCsv(text);
  const header = rows[0]?.map((cell) => cell.toLowerCase()) ?? [];
  const named = header.includes("cidr");
  const at = (row: string[], name: string, place: number) => row[named ? header.indexOf(name) : place] ?? "";
  const there = new Set([...subnets.peek().values()].map((each) => each.cidr));
  return rows.slice(named ? 1 : 0).map((row, index) => {
    const cidr = at(row, "cidr", 0);
    const line = { number: index + (named ? 2 : 1), cidr, name: at(row, "name", 1) || cidr, exclude: at(row, "exclude", 2).split(/[\s;|]+/).filter(Boolean) };
    const good = parseNetwork(cidr) !== undefined && !there.has(cidr);
    const result = good ? "will be made" : there.has(cidr) ? MADE_ALREADY : "not a network";
    there.add(cidr);
    return { ...line, result, good };
  });
}

export function SubnetImport() {
  const text = useSignal(draft<string>("import") ?? "");
  const lines = useSignal<Line[] | undefined>(undefined);
  const enter = (value: string) => {
    text.value = value;
    keepDraft("import", value);
    lines.value = undefined;
  };
  const make = useAction(async () => {
    for (const line of lines.value!.filter((each) => each.good)) {
      const { name, cidr, exclude } = line;
      try {
        await change("POST", "/api/v1/subnet", { name, cidr, exclude });
        line.result = "made";
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 400) throw error; // goes on from this line
        line.result = error.message;
      }
      line.good = false;
      lines.value = [...lines.value!];
    }
    await loadSubnets();
  });
  const count_ = lines.value?.filter((each) => each.good).length ?? 0;
  return (
    <>
      <Title text="Import subnets" />
      <form
        onSubmit={(event) => {
          event.preventDefault();
          lines.value = readLines(text.value);
        }}
      >
        <Field label="CSV" hint="columns name, cidr and exclude (networks separated by spaces); without a header, cidr comes first">
          {(attributes) => <textarea {...attributes} rows={8} required spellcheck={false} value={text.value} onInput={(event) => enter(event.currentTarget.value)} />}
        </Field>
        <Field label="or a file">
          {(attributes) => (
            <input
              {...attributes}
              type="file"
              accept=".csv,text/csv,text/plain"
              onChange={async (event) => enter((await event.currentTarget.files?.[0]?.text()) ?? "")}
            />
          )}
        </Field>
        <p class="actions">
          <button>Check</button>
          {lines.value && (
            <button type="button" class="primary" disabled={!count_ || make.busy} onClick={make.run}>
              Make {plural(count_, "subnet")}
            </button>
          )}
        </p>
      </form>
      <Problem error={make.error} again={make.run} />
      {lines.value && (
        <table class="cards">
          <caption class="hidden">Lines of the file</caption>
          <thead>
            <tr>
              <th scope="col">Line</th>
              <th scope="col">Network</th>
              <th scope="col">Name</th>
              <th scope="col">Result</th>
            </tr>
          </thead>
          <tbody>
            {lines.value.map((each) => (
              <tr key={each.number}>
                <td data-label="Line">{each.number}</td>
                <td>
                  <code>{visible(each.cidr)}</code>
                </td>
                <td>{visible(each.name)}</td>
                <td role="status">{each.result}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </>
  );
}
