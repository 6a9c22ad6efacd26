// Data shared by several pages: the caller's subnets and policies by id.
import { signal } from "@preact/signals";
import { ApiError, change, get, send, type Info, type Policy, type Subnet } from "./api";

export const info = signal<Info | undefined>(undefined);
export const subnets = signal<Map<number, Subnet>>(new Map());
export const policies = signal<Map<number, Policy>>(new Map());

const PAGE = 100;
const MOST = 2_000; // cached objects; others are shown by id

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

// Unsaved form input is kept while the page is open, even if the user visits other pages.
const drafts = new Map<string, unknown>();
export const draft = <T>(name: string): T | undefined => drafts.get(name) as T | undefined;
export const keepDraft = (name: string, value: unknown): void => void drafts.set(name, value);
export const dropDraft = (name: string): void => void drafts.delete(name);

const PLURALS = { subnet: "subnets", policy: "policies" };
export type Kind = keyof typeof PLURALS;

export type Named = { name: string } & Record<string, unknown>;

const NEVER = '"-"'; // an ETag that no object has: a PUT with it succeeds only if the object equals the body already, and changes nothing

/** The id of an object that equals the body, among the newest. */
async function equalTo(path: string, kind: Kind, body: Named): Promise<number | undefined> {
  const newest = (await get<Record<string, { id: number; name: string }[]>>(`${path}?page_size=${PAGE}`))[PLURALS[kind]]!;
  for (const { id } of newest.filter((each) => each.name === body.name)) {
    try {
      await send("PUT", `${path}/${id}`, { body, headers: { "If-Match": NEVER } });
      return id;
    } catch (error) {
      if (!(error instanceof ApiError && (error.status === 412 || error.status === 404))) throw error; // it differs or was deleted
    }
  }
  return undefined;
}

/**
 * Create an object; returns its id. With `reuse`, an equal object is used instead, for example one whose creation was not
 * answered. No existing object is changed.
 */
export async function create(kind: Kind, body: Named, { reuse }: { reuse: boolean }): Promise<number> {
  const path = `/api/v1/${kind}`;
  const found = reuse ? await equalTo(path, kind, body) : undefined;
  return found ?? (await change<{ id: number }>("POST", path, body)).id;
}
