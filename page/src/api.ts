// Calls the public API with the session cookie and raises the API's error messages.
import { effect, signal } from "@preact/signals";
import type { components } from "../types/openapi";

type Schemas = components["schemas"];
export type Job = Schemas["Job"];
export type TaskStatus = Schemas["TaskStatus"];
export type Host = Schemas["Host"];
export type Ledger = Schemas["Ledger"];
export type Waiting = Schemas["Waiting"];
export type Subnet = Schemas["Subnet"];
export type Verdict = Schemas["SubnetImportLine"];
export type Policy = Schemas["Policy"];
export type Estimate = Schemas["Estimate"];
export type AuditEntry = Schemas["AuditEntry"];
export type Status = Job["status"];

export type Info = Schemas["Info"];
export type Me = Schemas["Me"];
export type Snapshot = Schemas["JobSnapshot"];
export type OutcomeMap = Schemas["CoverageMap"];

const FINAL: Record<Status, boolean> = { pending: false, running: false, completed: true, failed: true, cancelled: true };
export const STATUSES = Object.keys(FINAL) as Status[];
export const isFinal = (status: Status) => FINAL[status];

/** An answer that is an error, or none at all (status 0). */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly requestId = "",
  ) {
    super(message);
  }

  /** What is wrong with each field, when the API names fields: "cidr: has host bits set; name: is missing". */
  get fields(): Record<string, string> {
    const found: Record<string, string> = {};
    let field = "";
    for (const part of this.status === 400 ? this.message.split("; ") : []) {
      const match = /^(?:policy\.)?([a-z_]+)(?:\.[\w.]*)?: (.*)$/.exec(part); // a policy may be part of a request
      if (match) found[(field = match[1]!)] = match[2]!;
      else if (field) found[field] += `; ${part}`; // a sentence may have a semicolon
    }
    return found;
  }
}

/** Whether a change may have been made although its answer is this error. */
export const unsure = (error: unknown): boolean => error instanceof ApiError && (error.status === 0 || error.status >= 500);

/** The signed-in user; undefined while unknown, null when signed out. */
export const me = signal<Me | null | undefined>(undefined);
/** Error message of a session that ended while the page was in use, else empty; the page then shows a sign-in dialog. */
export const ended = signal("");
/** Whether the gateway can be reached: false after a failed request, until a probe of the gateway succeeds. */
export const reached = signal(true);
/** Rises when a lost connection is back and when the user signs in again: what failed meanwhile is loaded again. */
export const recovered = signal(0);

interface Options {
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

/** Await a response or its body. Throws ApiError if the connection fails or the body is cut off; rethrows an abort. */
export async function received<T>(work: Promise<T>, signal?: AbortSignal): Promise<T> {
  try {
    return await work;
  } catch (error) {
    if (signal?.aborted) throw error;
    reached.value = false;
    throw new ApiError(0, "Scanfleet cannot be reached.");
  }
}

/** The answer to a request; throws ApiError unless it is a success or a 304. */
export async function send(method: string, path: string, { body, headers = {}, signal }: Options & { body?: unknown } = {}): Promise<Response> {
  const request = fetch(path, {
    method,
    headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
    body: body === undefined ? null : typeof body === "string" ? body : JSON.stringify(body),
    cache: "no-store",
    redirect: "error",
    signal: signal ?? null,
  });
  const answer = await received(request, signal);
  if (answer.ok || answer.status === 304) return answer;
  const text = await answer.text().catch(() => "");
  let message = `the answer was ${answer.status}`;
  try {
    message = (JSON.parse(text) as { error: string }).error;
  } catch {
    // An answer of a proxy: from 502 to 504 it has no gateway to pass the request on to.
    if (answer.status >= 502 && answer.status <= 504) reached.value = false;
  }
  if (answer.status === 401 && me.peek()) ended.value = message;
  throw new ApiError(answer.status, message, answer.headers.get("X-Request-ID") ?? "");
}

export async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  return received<T>((await send("GET", path, { signal })).json(), signal);
}

export async function change<T>(method: string, path: string, body?: unknown, options: Options = {}): Promise<T> {
  const answer = await send(method, path, { ...options, body });
  return (answer.status === 204 ? undefined : await received(answer.json(), options.signal)) as T;
}

/** Take over the user of the session; for another one the page is loaded again, so that nothing of the former user's stays. */
function enter(found: Me): void {
  const before = me.peek();
  if (before && before.user_id !== found.user_id) return location.reload();
  me.value = found;
  if (!ended.peek()) return;
  ended.value = "";
  recovered.value++;
}

let ahead = 0; // ms by which the gateway's clock is ahead of the browser's

async function readMe(): Promise<Me> {
  const answer = await send("GET", "/api/v1/me");
  ahead = Date.parse(answer.headers.get("Date") ?? "") - Date.now() || 0; // a proxy may drop the header
  return received<Me>(answer.json());
}

/** Ask for the signed-in user; throws ApiError if the answer is neither the user nor that there is none. */
export async function whoAmI(): Promise<void> {
  try {
    enter(await readMe());
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 401)) throw error;
    if (!me.peek()) me.value = null;
  }
}

/** Begin a session with a pasted token. */
export async function signIn(token: string): Promise<void> {
  if (!/^[\x21-\x7e]+$/.test(token)) {
    throw new ApiError(400, "The token has a space, a line break or another character that no token has: copy it again.");
  }
  await change("POST", "/api/v1/session", undefined, { headers: { Authorization: `Bearer ${token}` } });
  const found = await readMe().catch((error: unknown) => {
    if (error instanceof ApiError && error.status === 401) {
      throw new ApiError(401, "The browser did not keep the session: open the page by https, or on 127.0.0.1.", error.requestId);
    }
    throw error;
  });
  enter(found);
}

const EARLY = 60_000; // ms before the end of a token in which it is replaced
const APART = 30_000; // minimum ms between two replacements, however short the tokens of an issuer are
let refreshed = -Infinity;

/** Replace the session's token before it ends, in one tab at a time: a refresh token may be good only once. */
export function keepSession(): () => void {
  const left = Date.parse(me.peek()!.expires_at) - Date.now() - ahead;
  const refresh = async () => {
    refreshed = performance.now();
    const before = me.peek()?.expires_at;
    try {
      await navigator.locks.request("session", async () => {
        await whoAmI(); // another tab may have done it
        if (!ended.peek() && me.peek()?.expires_at === before) await change("POST", "/api/v1/session/refresh");
      });
      await whoAmI();
    } catch (error) {
      if (error instanceof ApiError && error.status !== 400 && error.status !== 401) timer = window.setTimeout(refresh, EARLY / 6);
    }
  };
  let timer = window.setTimeout(refresh, Math.min(Math.max(refreshed + APART - performance.now(), left - EARLY, left / 2), 2 ** 31 - 1));
  return () => window.clearTimeout(timer);
}

export async function signOut(): Promise<void> {
  const { logout_url } = await change<{ logout_url: string | null }>("DELETE", "/api/v1/session");
  location.assign(logout_url ?? "/app/");
}

export const FIRST_WAIT = 500; // ms
export const LONGEST_WAIT = 5_000;

// Retry with backoff while the gateway is unreachable. The backoff resets only after 10 s without a failure, because responses
// may be cut off again right after reconnecting.
let lost = false;
let wait = FIRST_WAIT;
effect(() => {
  let timer = 0;
  if (reached.value) {
    if (lost) recovered.value = recovered.peek() + 1;
    lost = false;
    timer = window.setTimeout(() => void (wait = FIRST_WAIT), 2 * LONGEST_WAIT);
    return () => window.clearTimeout(timer);
  }
  lost = true;
  const again = async () => {
    const error = await send("GET", "/api/v1/info").then(() => undefined, (thrown: ApiError) => thrown); // needs no session
    if (!error || (error.status > 0 && error.status < 500)) reached.value = true;
    else next();
  };
  const next = () => {
    timer = window.setTimeout(again, wait);
    wait = Math.min(wait * 2, LONGEST_WAIT);
  };
  next();
  return () => window.clearTimeout(timer);
});
