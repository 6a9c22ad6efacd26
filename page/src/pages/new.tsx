import { useSignal } from "@preact/signals";
import { useRef } from "preact/hooks";
import { ApiError, change, get, type Estimate, type Job, type Policy } from "../api";
import { parseNetwork } from "../addresses";
import { Field, Kept, Problem, Title, took, useAction, useLoad } from "../components";
import { go, query, withQuery } from "../router";
import { create, draft, dropDraft, info, keepDraft, loadPolicies, loadSubnets, policies, subnets } from "../store";
import { count, duration, plural, visible } from "../text";

const DRAFT = "scan";
const ESTIMATED = 10; // networks, each by a request
const PAUSE = 400; // ms without a change before the estimate is requested

interface Entered {
  cidr: string;
  preset: string;
  ports: string;
}

const NEW = "new";
const PORTS = /^\s*(top:(\d+-)?\d+|([TU]:)?\d+(-\d+)?(\s*,\s*([TU]:)?\d+(-\d+)?)*)\s*$/i; // a complete list of ports

/** Whether a list of ports is complete: 8000-9 may become 8000-9000. */
const complete = (ports: string): boolean => PORTS.test(ports) && [...ports.matchAll(/(\d+)-(\d+)/g)].every(([, from, to]) => Number(from) <= Number(to));

/** A loaded policy that is equal to a new one with these fields. */
function equalPolicy(fields: { preset: string; ports?: string }): Policy | undefined {
  const usual = info.value?.presets[fields.preset];
  const wanted = Object.entries({ ...usual, ...fields });
  const equal = (each: Policy) => wanted.every(([name, value]) => JSON.stringify(each[name as keyof Policy]) === JSON.stringify(value));
  return usual && [...policies.value.values()].find(equal);
}

export function NewScan() {
  const lists = useLoad((signal) => Promise.all([loadSubnets(signal), loadPolicies(signal)]), []);
  const entered = useSignal<Entered>(draft<Entered>(DRAFT) ?? { cidr: "", preset: "standard", ports: "" });
  const enter = (changed: Partial<Entered>) => {
    entered.value = { ...entered.value, ...changed };
    keepDraft(DRAFT, entered.value);
  };
  const chosen = query("subnet").split(",").filter(Boolean).map(Number).filter((id) => subnets.value.has(id));
  const policyId = query("policy") || NEW;
  const policy: Policy | undefined = policies.value.get(Number(policyId));
  const choose = (id: number, on: boolean) =>
    go(withQuery({ subnet: (on ? [...chosen, id] : chosen.filter((each) => each !== id)).join() }), { replace: true });

  const { cidr, preset, ports } = entered.value;
  const preset_: Record<string, unknown> = info.value?.presets[preset] ?? {};
  const portText = policy ? policy.ports : ports.trim() || String(preset_.ports ?? "");
  const values = { preset, ...(ports.trim() ? { ports: ports.trim() } : {}) };
  const own = chosen.map((id) => subnets.value.get(id)!);
  const networks = [...own.map((each) => ({ subnet_id: each.id })), ...(parseNetwork(cidr) ? [{ cidr: cidr.trim() }] : [])];
  const names = [...own.map((each) => each.cidr), cidr.trim()];
  // Incomplete input is not sent: the API would record a refused request.
  const wanted = complete(portText)
    ? networks.slice(0, ESTIMATED).map((each) => ({ ...each, ...(policy ? { policy_id: policy.id } : { policy: values }) }))
    : [];
  const asked = JSON.stringify(wanted);
  const estimate = useLoad(
    async (signal): Promise<{ asked: string; found?: Estimate[]; error?: ApiError }> => {
      if (wanted.length) await new Promise((resolve) => setTimeout(resolve, PAUSE));
      signal.throwIfAborted();
      try {
        return { asked, found: await Promise.all(wanted.map((body) => change<Estimate>("POST", "/api/v1/task/estimate", body, { signal }))) };
      } catch (error) {
        if (error instanceof ApiError) return { asked, error };
        throw error;
      }
    },
    [asked],
  );
  const estimated = estimate.data?.asked === asked ? estimate.data : undefined; // not that of what was entered before

  const before = useLoad(
    async (signal) => {
      const pairs = policy ? own.map((each) => `subnet_id=${each.id}&policy_id=${policy.id}`) : [];
      const jobs = await Promise.all(
        pairs.slice(0, 20).map(async (pair) => (await get<{ jobs: Job[] }>(`/api/v1/task?${pair}&status=completed&page_size=1`, signal)).jobs[0]),
      );
      return pairs.length && jobs.every(Boolean) ? jobs.reduce((sum, job) => sum + (took(job!) ?? 0), 0) : undefined;
    },
    [policy?.id, chosen],
  );

  // One key per opened form, so that its jobs are created only once. A new key is used only after the user confirms that other
  // values shall create further jobs.
  const key = useRef(crypto.randomUUID());
  const further = useRef<Record<string, string>>({});
  const start = useAction(async () => {
    const ids = [...chosen];
    if (cidr.trim()) {
      const network = cidr.trim();
      const there = [...subnets.value.values()].find((each) => each.cidr === network && !each.exclude.length);
      ids.push(there?.id ?? (await create("subnet", { name: network, cidr: network }, { reuse: true })));
    }
    let id = policy?.id;
    if (!id) {
      const name = ports.trim() ? `${preset}: ${ports.trim()}`.slice(0, 200) : preset;
      id = equalPolicy(values)?.id ?? (await create("policy", { name, ...values }, { reuse: true }));
    }
    const body = { subnet_ids: [...new Set(ids)], policy_id: id };
    const of = JSON.stringify(body);
    const headers = { "Idempotency-Key": further.current[of] ?? key.current };
    const { jobs } = await change<{ jobs: Job[] }>("POST", "/api/v1/task", body, { headers }).catch((error: unknown) => {
      if (!(error instanceof ApiError && error.message.startsWith("Idempotency-Key "))) throw error;
      further.current[of] = crypto.randomUUID();
      throw new ApiError(error.status, "The form was sent before with other values, and has created jobs: see the list of jobs. Start again to create these as well.", error.requestId);
    });
    dropDraft(DRAFT);
    go(jobs.length === 1 ? `/app/jobs/${jobs[0]!.id}` : "/app/jobs");
  });

  const term = query("q").trim().toLowerCase();
  const all = [...subnets.value.values()];
  const found = all.filter((each) => chosen.includes(each.id) || each.name.toLowerCase().includes(term) || each.cidr.includes(term));
  const wrong: Record<string, string | undefined> = { ...estimated?.error?.fields, ...start.error?.fields };
  const nothing = !chosen.length && !cidr.trim();
  return (
    <>
      <Title text="New scan" />
      <Problem error={lists.error} again={lists.reload} />
      <form
        class="scan"
        onSubmit={(event) => {
          event.preventDefault();
          void start.run();
        }}
      >
        <fieldset>
          <legend>What</legend>
          {all.length > 8 && (
            <input type="search" aria-label="Search subnets" placeholder="name, 10.20." value={query("q")} onInput={(event) => go(withQuery({ q: event.currentTarget.value }), { replace: true })} />
          )}
          <Kept shown={all.length} total={lists.data?.[0]} />
          {!!all.length && (
            <div class="choices">
              {found.slice(0, 200).map((each) => (
                <label key={each.id}>
                  <input type="checkbox" checked={chosen.includes(each.id)} onChange={(event) => choose(each.id, event.currentTarget.checked)} />
                  <code>{each.cidr}</code> {each.name === each.cidr ? "" : visible(each.name)}
                </label>
              ))}
              {found.length > 200 && <p>{count(found.length - 200)} more: search for them</p>}
            </div>
          )}
          <Field label="Another network" hint="as a CIDR, or a single address; becomes a subnet of yours" error={wrong.cidr}>
            {(attributes) => <input {...attributes} spellcheck={false} placeholder="192.0.2.0/24" value={cidr} onInput={(event) => enter({ cidr: event.currentTarget.value })} />}
          </Field>
        </fieldset>
        <fieldset>
          <legend>How</legend>
          <Field label="Policy">
            {(attributes) => (
              <select {...attributes} value={policy ? policyId : NEW} onChange={(event) => go(withQuery({ policy: event.currentTarget.value === NEW ? undefined : event.currentTarget.value }), { replace: true })}>
                <option value={NEW}>from a preset</option>
                {[...policies.value.values()].map((each) => (
                  <option key={each.id} value={each.id}>
                    {visible(each.name)}
                  </option>
                ))}
              </select>
            )}
          </Field>
          {!policy && (
            <>
              <Field label="Preset" hint={presetHint(preset_)} error={wrong.preset}>
                {(attributes) => (
                  <select {...attributes} value={preset} onChange={(event) => enter({ preset: event.currentTarget.value })}>
                    {Object.keys(info.value?.presets ?? { [preset]: 1 }).map((each) => (
                      <option key={each}>{each}</option>
                    ))}
                  </select>
                )}
              </Field>
              <Field label="Ports" hint="22,80,8000-8100, or top:100 for the most common; the preset's unless given" error={wrong.ports}>
                {(attributes) => <input {...attributes} spellcheck={false} placeholder={String(preset_.ports ?? "")} value={ports} onInput={(event) => enter({ ports: event.currentTarget.value })} />}
              </Field>
              <p>
                <a href="/app/policies/new">A policy with every setting</a>
              </p>
            </>
          )}
        </fieldset>
        <div class="note" role="status">
          {nothing ? (
            "Choose at least one network."
          ) : (
            <>
              {plural(chosen.length + (cidr.trim() ? 1 : 0), "job")}
              {estimated?.found?.length ? <Total found={estimated.found} of={networks.length} /> : wanted.length && !estimated ? ": estimating …" : null}
              {before.data !== undefined && <>. The last time this took {duration(before.data)}.</>}
              {estimated?.found?.flatMap((each, index) =>
                each.refusals.map((refusal) => (
                  <p key={`${index} ${refusal.error}`} class="wrong">
                    {names[index]} would be refused: {visible(refusal.error)}
                  </p>
                )),
              )}
            </>
          )}
        </div>
        <Problem error={estimated?.error} again={estimate.reload} />
        <Problem error={start.error} />
        <p class="actions">
          <button class="primary" disabled={start.busy || nothing}>
            Start
          </button>
        </p>
      </form>
    </>
  );
}

/** What scans of networks are together; all have the same ports. */
function Total({ found, of }: { found: Estimate[]; of: number }) {
  const sum = (part: (each: Estimate) => number) => found.reduce((all, each) => all + part(each), 0);
  const addresses = sum((each) => each.addresses - each.excluded);
  const excluded = sum((each) => each.excluded);
  const ports = found[0]!.tcp_ports + found[0]!.udp_ports;
  return (
    <>
      {found.length < of && `, of which the first ${found.length} are estimated`}: {plural(addresses, "address", "addresses")} × {plural(ports, "port")} ={" "}
      {plural(sum((each) => each.probes), "probe")}
      {!!excluded && `; ${plural(excluded, "address is", "addresses are")} excluded`}. About {duration(Math.max(1, sum((each) => each.estimate_seconds)))} of one worker slot
      {found.some((each) => each.needs_raw_packets) && ", with raw packets"}
    </>
  );
}

const presetHint = (preset: Record<string, unknown>) =>
  preset.ports
    ? `ports ${String(preset.ports)}, ${preset.service_detection ? "with" : "without"} service detection, timing ${String(preset.timing)}${preset.discovery === "none" ? ", every address taken as up" : ""}`
    : "";
