// What several pages show: the caller's subnets and policies by id.
import { signal } from "@preact/signals";
import { change, get, unsure, type Info, type Policy, type Subnet } from "./api";

export const info = signal<Info | undefined>(undefined);
export const subnets = signal<Map<number, Subnet>>(new Map());
export const policies = signal<Map<number, Policy>>(new Map());

const PAGE = 100;
const MOST = 2_000; // that the page keeps; beyond them an id stands for a name

/** The newest objects by id, at most `MOST`, and how many there are. */
async function all<T extends { id: number }>(path: string, name: string, signal?: AbortSignal): Promise<[Map<number, T>, number]> {
  const found = new Map<number, T>();
  let total = 0;
  for (let page = 1; page * PAGE <= MOST; page++) {
    const answer = await get<Record<string, T[]> & { total: number }>(`${path}?page=${page}&page_size=${PAGE}`, signal);
    for (const each of answer[name]!) found.set(each.id, each);
    total = answer.total;
    if (found.size >= total || !answer[name]!.length) break;
  }
  return [found, total];
}

/** Load the caller's subnets; returns how many there are. */
export async function loadSubnets(signal?: AbortSignal): Promise<number> {
  const [found, total] = await all<Subnet>("/api/v1/subnet", "subnets", signal);
  subnets.value = found;
  return total;
}

/** Load the caller's policies; returns how many there are. */
export async function loadPolicies(signal?: AbortSignal): Promise<number> {
  const [found, total] = await all<Policy>("/api/v1/policy", "policies", signal);
  policies.value = found;
  return total;
}

export async function loadInfo(signal?: AbortSignal): Promise<void> {
  info.value = await get<Info>("/api/v1/info", signal);
}

// What was typed into a form stays while the page is open, whichever page is looked at in between.
const drafts = new Map<string, unknown>();
export const draft = <T>(name: string): T | undefined => drafts.get(name) as T | undefined;
export const keepDraft = (name: string, value: unknown): void => void drafts.set(name, value);
export const dropDraft = (name: string): void => void [name, attemptOf(name)].forEach((each) => drafts.delete(each));

const attemptOf = (form: string) => `${form} attempt`;
const PLURALS = { subnet: "subnets", policy: "policies" };
export type Kind = keyof typeof PLURALS;

export type Named = { name: string } & Record<string, unknown>;

interface Attempt {
  name: string;
  after: number; // id of the newest object before it
}

/** Create an object from a form, once: when the answer to an earlier attempt was lost, what it has created becomes this object. */
export async function create(kind: Kind, body: Named, form: string): Promise<number> {
  const path = `/api/v1/${kind}`;
  const before = draft<Attempt>(attemptOf(form));
  const newest = (await get<Record<string, { id: number; name: string }[]>>(`${path}?page_size=${before ? PAGE : 1}`))[PLURALS[kind]]!;
  const lost = before && newest.find((each) => each.id > before.after && each.name === before.name);
  if (!lost) keepDraft(attemptOf(form), { name: body.name, after: newest[0]?.id ?? 0 });
  try {
    const { id } = lost ? await change<{ id: number }>("PUT", `${path}/${lost.id}`, body) : await change<{ id: number }>("POST", path, body);
    drafts.delete(attemptOf(form));
    return id;
  } catch (error) {
    if (!lost && !unsure(error)) drafts.delete(attemptOf(form)); // it has created nothing
    throw error;
  }
}
