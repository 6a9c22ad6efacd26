import { useSignal } from "@preact/signals";
import { change, type Subnet, type Verdict } from "../api";
import { sizeOf } from "../addresses";
import { Confirm, EditForm, Field, Kept, Pager, Problem, Title, useAction, useEdited, useLoad } from "../components";
import { go, pageNumber, query, withQuery } from "../router";
import { draft, dropDraft, keepDraft, loadSubnets, subnets } from "../store";
import { count, plural, visible } from "../text";
import { LastScan } from "./last-scan";

const SIZE = 50;

export function Subnets() {
  const list = useLoad(loadSubnets, []);
  const deleting = useSignal<Subnet | undefined>(undefined);
  const wanted = query("q").trim().toLowerCase();
  const all = [...subnets.value.values()];
  const found = all.filter((each) => each.name.toLowerCase().includes(wanted) || each.cidr.includes(wanted));
  const page = pageNumber();
  return (
    <>
      <Title text="Subnets" />
      <div class="bar">
        <input type="search" aria-label="Search subnets" placeholder="name, 10.20." value={query("q")} onInput={(event) => go(withQuery({ q: event.currentTarget.value, page: undefined }), { replace: true })} />
        <a class="button" href="/app/subnets/new">
          New subnet
        </a>
        <a class="button" href="/app/subnets/import">
          Import CSV
        </a>
      </div>
      <Problem error={list.error} again={list.reload} />
      {!all.length && list.data === 0 && <p class="empty">There are no subnets yet. Add a network to scan.</p>}
      <Kept shown={all.length} total={list.data} />
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
              {found.slice((page - 1) * SIZE, page * SIZE).map((each) => (
                <tr key={each.id}>
                  <td>
                    <a data-row href={`/app/subnets/${each.id}`}>
                      <code>{each.cidr}</code>
                    </a>
                  </td>
                  <td>{visible(each.name)}</td>
                  <td class="number" data-label="Addresses">
                    {count(sizeOf(each.cidr) - each.exclude.reduce((sum, part) => sum + sizeOf(part), 0))}
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
          <Pager page={page} size={SIZE} total={found.length} />
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
          <p>The jobs of “{visible(deleting.value.name)}” and their results are kept.</p>
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

const shown = (found: Subnet | undefined): Entered => ({
  name: found?.name ?? "",
  cidr: found?.cidr ?? "",
  exclude: found?.exclude.join("\n") ?? "",
});

const networks = (text: string) => text.split(/[\s,]+/).filter(Boolean);

const sent = ({ name, cidr, exclude }: Entered) => ({ name: name || cidr, cidr: cidr.trim(), exclude: networks(exclude) });

export function SubnetForm({ id }: { id: string | undefined }) {
  const form = useEdited("subnet", id, shown, sent, "/app/subnets");
  const { value, wrong } = form;
  const enter = (changed: Partial<Entered>) => form.enter({ ...value, ...changed });
  return (
    <>
      <Title text={id ? `Subnet ${id}` : "New subnet"} />
      <EditForm form={form}>
        <Field label="Network" hint="as a CIDR, or a single address" error={wrong.cidr}>
          {(attributes) => <input {...attributes} required spellcheck={false} value={value.cidr} onInput={(event) => enter({ cidr: event.currentTarget.value })} />}
        </Field>
        <Field label="Name" hint="the network itself unless given" error={wrong.name}>
          {(attributes) => <input {...attributes} maxLength={200} value={value.name} onInput={(event) => enter({ name: event.currentTarget.value })} />}
        </Field>
        <Field label="Exclude" hint="networks and addresses to leave out, one on a line" error={wrong.exclude}>
          {(attributes) => <textarea {...attributes} rows={4} spellcheck={false} value={value.exclude} onInput={(event) => enter({ exclude: event.currentTarget.value })} />}
        </Field>
      </EditForm>
    </>
  );
}

const IMPORT = "import";
const VERDICTS = { create: "to create", update: "to update", exists: "there already", refused: "refused" };
const ACTIONS = ["create", "update", "exists", "refused"] as const;

export function SubnetImport() {
  const text = useSignal(draft<string>(IMPORT) ?? "");
  const lines = useSignal<(Verdict & { text: string })[] | undefined>(undefined);
  const message = useSignal("");
  const update = useSignal(false);
  const post = <T,>(query: string) => change<T>("POST", `/api/v1/subnet/import?update=${update.value}${query}`, text.value, { headers: { "Content-Type": "text/csv" } });
  const forget = () => {
    lines.value = undefined;
    message.value = "";
  };
  const enter = (value: string) => {
    text.value = value;
    keepDraft(IMPORT, value);
    forget();
  };
  const check = useAction(async () => {
    const [checked, updating] = [text.value, update.value];
    send.clear();
    const answer = await post<{ lines: Verdict[] }>("&dry_run=true");
    const texts = checked.split(/\r\n|\r|\n/);
    if (text.value !== checked || update.value !== updating) return;
    // A record may have several lines, the last of which the API names; the first line of the file has the columns.
    lines.value = answer.lines.map((each, index) => ({ ...each, text: texts.slice(answer.lines[index - 1]?.line ?? 1, each.line).join("\n").trim() }));
  });
  const send = useAction(async () => {
    check.clear();
    lines.value = undefined;
    const answer = await post<{ message: string }>("");
    message.value = answer.message;
    dropDraft(IMPORT);
  });
  return (
    <>
      <Title text="Import subnets" />
      <form
        onSubmit={(event) => {
          event.preventDefault();
          void send.run();
        }}
      >
        <Field label="CSV" hint="The first line names the columns name, cidr and, optionally, exclude, in which semicolons separate networks.">
          {(attributes) => (
            <textarea {...attributes} rows={8} required spellcheck={false} disabled={send.busy} value={text.value} onInput={(event) => enter(event.currentTarget.value)} />
          )}
        </Field>
        <Field label="or a file">
          {(attributes) => (
            <input
              {...attributes}
              type="file"
              accept=".csv,text/csv,text/plain"
              disabled={send.busy}
              onChange={async (event) => enter((await event.currentTarget.files?.[0]?.text()) ?? "")}
            />
          )}
        </Field>
        <label>
          <input
            type="checkbox"
            checked={update.value}
            disabled={send.busy}
            onChange={(event) => {
              update.value = event.currentTarget.checked;
              forget();
            }}
          />
          Update the subnets of the same names
        </label>
        <p class="actions">
          <button type="button" disabled={check.busy || !text.value.trim()} onClick={check.run}>
            Check
          </button>
          <button class="primary" disabled={send.busy}>
            Import
          </button>
        </p>
      </form>
      <Problem error={check.error ?? send.error} />
      <p role="status">
        {message.value}
        {lines.value && `${plural(lines.value.length, "subnet")} in the file: ${ACTIONS.filter((action) => action !== "update" || update.value).map((action) => `${count(lines.value!.filter((each) => each.action === action).length)} ${VERDICTS[action]}`).join(", ")}`}
      </p>
      {lines.value && (
        <table class="cards">
          <caption class="hidden">Lines of the file</caption>
          <thead>
            <tr>
              <th scope="col">Line</th>
              <th scope="col">Text</th>
              <th scope="col">Import</th>
            </tr>
          </thead>
          <tbody>
            {lines.value.map((each) => (
              <tr key={each.line}>
                <td data-label="Line">{each.line}</td>
                <td>
                  <code class="long">{visible(each.text)}</code>
                </td>
                <td>
                  {each.error ? <strong class="wrong">{visible(each.error)}</strong> : each.id ? <a href={`/app/subnets/${each.id}`}>{VERDICTS[each.action]}</a> : VERDICTS[each.action]}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </>
  );
}
