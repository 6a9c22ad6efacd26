import { useSignal } from "@preact/signals";
import { change, get, type Policy } from "../api";
import { Confirm, EditForm, Field, Kept, Pager, Problem, Title, useEdited, useLoad } from "../components";
import { pageNumber } from "../router";
import { info, loadPolicies, policies } from "../store";
import { visible } from "../text";
import { LastScan } from "./last-scan";

const SIZE = 50;

export function Policies() {
  const list = useLoad(loadPolicies, []);
  const deleting = useSignal<Policy | undefined>(undefined);
  const all = [...policies.value.values()];
  const page = pageNumber();
  return (
    <>
      <Title text="Policies" />
      <div class="bar">
        <a class="button" href="/app/policies/new">
          New policy
        </a>
      </div>
      <Problem error={list.error} again={list.reload} />
      {!all.length && list.data === 0 && <p class="empty">There are no policies yet. A policy defines how to scan.</p>}
      <Kept shown={all.length} total={list.data} />
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
            {all.slice((page - 1) * SIZE, page * SIZE).map((each) => (
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
      {!!all.length && <Pager page={page} size={SIZE} total={all.length} />}
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
          <p>Existing jobs keep their copy of the policy.</p>
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
const loadSchema = async (signal: AbortSignal): Promise<Record<string, Schema>> => {
  const document = await get<{ paths: Record<string, Record<string, { requestBody: { content: Record<string, { schema: { properties: Record<string, Schema> } }> } }>> }>("/openapi.json", signal);
  const { properties } = document.paths["/api/v1/policy"]!.post!.requestBody.content["application/json"]!.schema;
  return properties;
};

type Fields = Record<string, unknown>;

/** What is entered into a policy's form: only what differs from the preset is sent. */
function PolicyFields({ schema, fields, enter, wrong }: { schema: Record<string, Schema>; fields: Fields; enter: (changed: Fields) => void; wrong: Record<string, string> }) {
  const presets = info.value?.presets ?? {};
  const preset = String(fields.preset ?? "standard");
  const usual: Record<string, unknown> = presets[preset] ?? {};
  const set = (name: string, value: unknown) => enter({ ...fields, [name]: value === "" ? undefined : value });
  return (
    <>
      <Field label="Preset" hint="provides the values of empty fields" error={wrong.preset}>
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
            <Field key={name} label={name.replaceAll("_", " ")} hint={hint} error={wrong[name]}>
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

/** What is entered for a policy: the values that its preset has not. */
function entered(found: Policy | undefined): Fields {
  const { id: _id, user_id: _user, created_at: _made, updated_at: _changed, ...fields } = (found ?? {}) as Fields;
  const usual: Fields = info.value?.presets[String(fields.preset)] ?? {};
  return Object.fromEntries(Object.entries(fields).filter(([name, value]) => name === "preset" || JSON.stringify(value) !== JSON.stringify(usual[name])));
}

export function PolicyForm({ id }: { id: string | undefined }) {
  const schema = useLoad(loadSchema, []);
  const form = useEdited("policy", id, entered, (fields) => ({ ...fields, name: String(fields.name ?? "") }), "/app/policies");
  const { value, enter, wrong } = form;
  return (
    <>
      <Title text={id ? `Policy ${id}` : "New policy"} />
      <Problem error={schema.error} again={schema.reload} />
      {schema.data && (
        <EditForm form={form}>
          <Field label="Name" error={wrong.name}>
            {(attributes) => <input {...attributes} required maxLength={200} value={String(value.name ?? "")} onInput={(event) => enter({ ...value, name: event.currentTarget.value })} />}
          </Field>
          <PolicyFields schema={schema.data} fields={value} enter={enter} wrong={wrong} />
        </EditForm>
      )}
    </>
  );
}
