// What several pages show: the caller's subnets and policies by id.
import { signal } from "@preact/signals";
import { get, type Info, type Policy, type Subnet } from "./api";

export const info = signal<Info | undefined>(undefined);
export const subnets = signal<Map<number, Subnet>>(new Map());
export const policies = signal<Map<number, Policy>>(new Map());

const PAGE = 100;
const MOST = 2_000; // that the page keeps; beyond them an id stands for a name

async function all<T extends { id: number }>(path: string, name: string): Promise<Map<number, T>> {
  const found = new Map<number, T>();
  for (let page = 1; page * PAGE <= MOST; page++) {
    const answer = await get<Record<string, T[]> & { total: number }>(`${path}?page=${page}&page_size=${PAGE}`);
    for (const each of answer[name]!) found.set(each.id, each);
    if (found.size >= answer.total || !answer[name]!.length) break;
  }
  return found;
}

export async function loadSubnets(): Promise<void> {
  subnets.value = await all<Subnet>("/api/v1/subnet", "subnets");
}

export async function loadPolicies(): Promise<void> {
  policies.value = await all<Policy>("/api/v1/policy", "policies");
}

export async function loadInfo(): Promise<void> {
  info.value = await get<Info>("/api/v1/info");
}

// What was typed into a form stays while the page is open, whichever page is looked at in between.
const drafts = new Map<string, unknown>();
export const draft = <T>(name: string): T | undefined => drafts.get(name) as T | undefined;
export const keepDraft = (name: string, value: unknown): void => void drafts.set(name, value);
export const dropDraft = (name: string): void => void drafts.delete(name);
