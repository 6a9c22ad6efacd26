import { useSignal } from "@preact/signals";
import { change, get, send, type Policy } from "../api";
import { countPorts } from "../addresses";
import { Confirm, Field, Problem, Title, useAction, useLoad } from "../parts";
import { go } from "../router";
import { draft, dropDraft, info, keepDraft, loadPolicies, policies } from "../store";
import { count, visible } from "../text";
import { LastScan } from "./last-scan";

export function Policies() {
  const list = useLoad(loadPolicies, []);
  const deleting = useSignal<Policy | undefined>(undefined);
  const all = [...policies.value.values()];
  return (
    <>
      <Title text="Policies" />
      <div class="bar">
        <a class="button" href="/app/policies/new">
          New policy
        </a>
      </div>
      <Problem error={list.error} again={list.reload} />
      {!all.length && !list.error && <p class="empty">There are no policies yet: ways to scan.</p>}
      {!!all.length && (
        <table class="cards">
          <caption class="hidden">Policies</caption>
          <thead>
            <tr>
              <th scope="col">Name</th>
              <th scope="col">Preset</th>
              <th scope="col">Ports</th>
              <th scope="col">Last scan</th>
              <th scope="col">
                <span class="hidden">Actions</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {all.map((each) => (
              <tr key={each.id}>
                <td>
                  <a data-row href={`/app/policies/${each.id}`}>
                    {visible(each.name)}
                  </a>
                </td>
                <td data-label="Preset">{each.preset}</td>
                <td data-label="Ports">
                  <code class="long">{each.ports}</code>
                </td>
                <td data-label="Last scan">
                  <LastScan filter={`policy_id=${each.id}`} />
                </td>
                <td class="actions">
                  <a class="button" href={`/app/new?policy=${each.id}`}>
                    Scan<span class="hidden"> with {visible(each.name)}</span>
                  </a>
                  <button type="button" class="quiet" onClick={() => void (deleting.value = each)}>
                    Delete<span class="hidden"> {visible(each.name)}</span>
                  </button>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      {deleting.value && (
        <Confirm
          title={`Delete policy “${visible(deleting.value.name)}”?`}
          verb="Delete"
          act={async () => {
            await change("DELETE", `/api/v1/policy/${deleting.value!.id}`);
            list.reload();
          }}
          close={() => void (deleting.value = undefined)}
        >
          <p>Jobs that were made from it keep it as it was.</p>
        </Confirm>
      )}
    </>
  );
}

interface Schema {
  type?: string;
  enum?: string[];
  anyOf?: Schema[];
  items?: Schema;
  minimum?: number;
  maximum?: number;
  description?: string;
}

/** The fields of a policy as the API's own document describes them. */
export const loadSchema = async (signal: AbortSignal): Promise<Record<string, Schema>> => {
  const document = await get<{ paths: Record<string, Record<string, { requestBody: { content: Record<string, { schema: { properties: Record<string, Schema> } }> } }>> }>("/openapi.json", signal);
  const { properties } = document.paths["/api/v1/policy"]!.post!.requestBody.content["application/json"]!.schema;
  return properties;
};

export type Fields = Record<string, unknown>;

/** What is entered into a policy's form: only what differs from the preset is sent. */
export function PolicyFields({ schema, fields, enter, wrong }: { schema: Record<string, Schema>; fields: Fields; enter: (changed: Fields) => void; wrong: Record<string, string> }) {
  const presets = info.value?.presets ?? {};
  const preset = String(fields.preset ?? "standard");
  const usual: Record<string, unknown> = presets[preset] ?? {};
  const set = (name: string, value: unknown) => enter({ ...fields, [name]: value === "" ? undefined : value });
  return (
    <>
      <Field label="Preset" hint="fills in whatever is left empty below" error={wrong.preset}>
        {(attributes) => (
          <select {...attributes} value={preset} onChange={(event) => set("preset", event.currentTarget.value)}>
            {Object.keys(presets).map((each) => (
              <option key={each}>{each}</option>
            ))}
          </select>
        )}
      </Field>
      {Object.entries(schema)
        .filter(([name]) => name !== "name" && name !== "preset")
        .map(([name, whole]) => {
          const part = whole.anyOf?.find((each) => each.type !== "null") ?? whole;
          const hint = (whole.description ?? part.description)?.replaceAll("`", "");
          const value = fields[name];
          const usually = Array.isArray(usual[name]) ? (usual[name] as string[]).join(", ") || "none" : String(usual[name] ?? "none");
          return (
            <Field key={name} label={name.replaceAll("_", " ")} hint={name === "ports" ? portsHint(String(value ?? usual.ports ?? ""), hint) : hint} error={wrong[name]}>
              {(attributes) => {
                if (part.enum || part.type === "boolean") {
                  return (
                    <select
                      {...attributes}
                      value={value === undefined ? "" : String(value)}
                      onChange={({ currentTarget: { value: chosen } }) => set(name, part.enum || !chosen ? chosen : chosen === "true")}
                    >
                      <option value="">{usually} (preset)</option>
                      {(part.enum ?? ["true", "false"]).map((each) => (
                        <option key={each}>{each}</option>
                      ))}
                    </select>
                  );
                }
                if (part.type === "array") {
                  return (
                    <select
                      {...attributes}
                      multiple
                      size={4}
                      onChange={(event) => set(name, [...event.currentTarget.selectedOptions].map((each) => each.value))}
                    >
                      {(info.value?.scripts ?? []).map((each) => (
                        <option key={each} selected={((value ?? usual[name] ?? []) as string[]).includes(each)}>
                          {each}
                        </option>
                      ))}
                    </select>
                  );
                }
                const number = part.type === "integer";
                return (
                  <input
                    {...attributes}
                    type={(number ? "number" : "text") as "text"}
                    min={part.minimum}
                    max={part.maximum}
                    spellcheck={false}
                    placeholder={usually}
                    value={value === undefined || value === null ? "" : String(value)}
                    onInput={({ currentTarget: { value: typed } }) => set(name, number && typed ? Number(typed) : typed)}
                  />
                );
              }}
            </Field>
          );
        })}
    </>
  );
}

const portsHint = (text: string, hint: string | undefined) => {
  const ports = countPorts(text);
  return `${ports === undefined ? "" : `${count(ports)} ports. `}${hint ?? ""}`;
};

export function PolicyForm({ id }: { id?: string }) {
  const tag = useSignal("");
  const found = useLoad(
    async (signal) => {
      const schema = await loadSchema(signal);
      if (!id) return { schema, policy: undefined };
      const answer = await send("GET", `/api/v1/policy/${id}`, { signal });
      tag.value = answer.headers.get("ETag") ?? "";
      return { schema, policy: (await answer.json()) as Policy };
    },
    [id],
  );
  const key = `policy ${id ?? "new"}`;
  const entered = useSignal<Fields | undefined>(draft<Fields>(key));
  const { id: _id, user_id: _user, created_at: _made, updated_at: _changed, ...stored } = (found.data?.policy ?? {}) as Fields;
  const now: Fields = entered.value ?? stored;
  const enter = (fields: Fields) => {
    entered.value = fields;
    keepDraft(key, fields);
  };
  const save = useAction(async () => {
    if (id) await change("PUT", `/api/v1/policy/${id}`, now, tag.value ? { "If-Match": tag.value } : {});
    else await change("POST", "/api/v1/policy", now);
    dropDraft(key);
    await loadPolicies();
    go("/app/policies");
  });
  const wrong = save.error?.fields ?? {};
  return (
    <>
      <Title text={id ? `Policy ${id}` : "New policy"} />
      <Problem error={found.error} again={found.reload} />
      {found.data && (
        <form
          onSubmit={(event) => {
            event.preventDefault();
            void save.run();
          }}
        >
          <Field label="Name" error={wrong.name}>
            {(attributes) => <input {...attributes} required maxLength={200} value={String(now.name ?? "")} onInput={(event) => enter({ ...now, name: event.currentTarget.value })} />}
          </Field>
          <PolicyFields schema={found.data.schema} fields={now} enter={enter} wrong={wrong} />
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
            <a class="button" href="/app/policies" onClick={() => dropDraft(key)}>
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
