// Parts that several pages are made of.
import { signal, useComputed, useSignal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useId, useLayoutEffect, useRef } from "preact/hooks";
import { ApiError, received, recovered, send, unsure, type Job, type Status } from "./api";
import { go, withQuery } from "./router";
import { create, draft, dropDraft, keepDraft, type Kind, type Named } from "./store";
import { ago, count, exact } from "./text";

export interface Loaded<T> {
  data: T | undefined;
  error: ApiError | undefined;
  reload: () => void;
}

const asError = (error: unknown): ApiError =>
  error instanceof ApiError ? error : new ApiError(0, `The page has a fault: ${String(error)}`);

/** Loads under way, on the whole page, except streams. */
export const loading = signal(0);
/** Streams of results under way; no other load waits for them, since they may take minutes. */
export const streaming = signal(0);

/** Load when `on` changes, after a lost connection, and by `reload`; an older load is aborted. */
export function useLoad<T>(load: (signal: AbortSignal) => Promise<T>, on: unknown[]): Loaded<T> {
  const state = useSignal<{ data?: T; error?: ApiError | undefined }>({});
  const asked = useSignal(0);
  const key = JSON.stringify(on);
  useEffect(() => {
    const abort = new AbortController();
    loading.value++;
    load(abort.signal).then(
      (data) => {
        if (!abort.signal.aborted) state.value = { data };
      },
      (error: unknown) => {
        if (!abort.signal.aborted) state.value = { ...state.peek(), error: asError(error) };
      },
    ).finally(() => loading.value--);
    return () => abort.abort();
  }, [key, asked.value, recovered.value]);
  return { data: state.value.data, error: state.value.error, reload: () => void asked.value++ };
}

/**
 * Rises when `cause` has changed since it was first known, at most once in `ms`. It waits for loads under way, which it would abort: on a slow
 * connection none would ever end.
 */
export function useSettled(cause: unknown, ms: number): number {
  const settled = useSignal(0);
  const last = useRef({ cause, at: 0 });
  const idle = useComputed(() => loading.value === 0).value;
  useEffect(() => {
    if (last.current.cause === undefined) last.current = { cause, at: Date.now() }; // that of the loads under way
    if (!idle || last.current.cause === cause) return;
    const timer = window.setTimeout(() => {
      last.current = { cause, at: Date.now() };
      settled.value++;
    }, Math.max(0, last.current.at + ms - Date.now()));
    return () => window.clearTimeout(timer);
  }, [cause, idle]);
  return settled.value;
}

/** An action that a button starts: whether it is under way, and what went wrong. */
export function useAction(act: () => Promise<void>) {
  const busy = useSignal(false);
  const error = useSignal<ApiError | undefined>(undefined);
  const run = async () => {
    if (busy.value) return;
    busy.value = true;
    error.value = undefined;
    try {
      await act();
    } catch (thrown) {
      error.value = asError(thrown);
    } finally {
      busy.value = false;
    }
  };
  return { busy: busy.value, error: error.value, run, clear: () => void (error.value = undefined) };
}

export function Problem({ error, again }: { error: ApiError | undefined; again?: () => void }) {
  if (!error) return null;
  return (
    <div class="problem" role="alert">
      <p>{error.message}</p>
      {error.requestId && (
        <p class="faint">
          request <code>{error.requestId}</code>
        </p>
      )}
      {again && (
        <button type="button" onClick={again}>
          Try again
        </button>
      )}
    </div>
  );
}

const SPOKEN = 10_000; // minimum ms between two announcements to a screen reader

/** A live region that speaks at most once in `SPOKEN`, and of the end at once. */
export function Spoken({ text, final }: { text: string; final: boolean }) {
  const spoken = useSignal("");
  const last = useRef(0);
  useEffect(() => {
    const speak = () => {
      last.current = Date.now();
      spoken.value = text;
    };
    const timer = window.setTimeout(speak, final ? 0 : Math.max(0, last.current + SPOKEN - Date.now()));
    return () => window.clearTimeout(timer);
  }, [text, final]);
  return (
    <p class="hidden" role="status">
      {spoken.value}
    </p>
  );
}

/** The heading of a page, which names the document and takes the focus when the page is entered. */
export function Title({ children, text }: { children?: ComponentChildren; text: string }) {
  const heading = useRef<HTMLHeadingElement>(null);
  useEffect(() => {
    document.title = `${text} · Scanfleet`;
  }, [text]);
  useEffect(() => {
    const active = document.activeElement;
    if (!active || active === document.body || !active.isConnected || active.closest("header")) heading.current?.focus({ preventScroll: true });
  }, []);
  return (
    <h1 ref={heading} tabIndex={-1}>
      {children ?? text}
    </h1>
  );
}

export function StatusWord({ status, progress }: { status: Status; progress?: number | undefined }) {
  return (
    <span class={`status ${status}`}>
      {status}
      {status === "running" && progress !== undefined && ` ${progress} %`}
    </span>
  );
}

export function When({ time }: { time: string | null }) {
  return time ? (
    <time dateTime={time} title={exact(time)}>
      {ago(time)}
    </time>
  ) : (
    <>–</>
  );
}

export const took = (job: Job): number | undefined =>
  job.start_time ? ((job.end_time ? Date.parse(job.end_time) : Date.now()) - Date.parse(job.start_time)) / 1000 : undefined;

/** How much of a list is seen, and the way to the rest. */
export function Pager({ page, size, total }: { page: number; size: number; total: number }) {
  const last = Math.max(1, Math.ceil(total / size));
  const before = Math.min(page - 1, last);
  const shown = Math.min(size, Math.max(0, total - (page - 1) * size));
  return (
    <nav class="pager" aria-label="pages of the list">
      <span>
        {count(shown)} of {count(total)}
      </span>
      {page > 1 && <a href={withQuery({ page: before === 1 ? undefined : before })}>previous</a>}
      {page < last && <a href={withQuery({ page: page + 1 })}>next</a>}
    </nav>
  );
}

/** A modal dialog; closing it any way calls `close`. */
export function Dialog({ title, close, children, fixed = false }: { title: string; close: () => void; children: ComponentChildren; fixed?: boolean }) {
  const element = useRef<HTMLDialogElement>(null);
  const id = useId();
  useLayoutEffect(() => {
    const before = document.activeElement as HTMLElement | null;
    element.current!.showModal();
    return () => before?.focus();
  }, []);
  return (
    <dialog
      ref={element}
      aria-labelledby={id}
      onCancel={(event) => {
        event.preventDefault();
        if (!fixed) close();
      }}
      onClose={() => (fixed ? element.current!.showModal() : close())} // a second Escape cannot be prevented
    >
      <h2 id={id}>{title}</h2>
      {children}
    </dialog>
  );
}

export function Confirm({ title, verb, act, close, children }: { title: string; verb: string; act: () => Promise<void>; close: () => void; children: ComponentChildren }) {
  const action = useAction(async () => {
    await act();
    close();
  });
  return (
    <Dialog title={title} close={close}>
      {children}
      <Problem error={action.error} />
      <p class="actions">
        <button type="button" onClick={close}>
          Keep it
        </button>
        <button type="button" class="danger" disabled={action.busy} onClick={action.run}>
          {verb}
        </button>
      </p>
    </Dialog>
  );
}

interface FieldProps {
  label: string;
  hint?: ComponentChildren;
  error?: string | undefined;
  children: (attributes: { id: string; "aria-describedby": string; "aria-invalid": "true" | undefined }) => ComponentChildren;
}

/** A labelled input with its hint, and what the API found wrong with it. */
export function Field({ label, hint, error, children }: FieldProps) {
  const id = useId();
  return (
    <div class="field">
      <label for={id}>{label}</label>
      {children({ id, "aria-describedby": `${id}-hint`, "aria-invalid": error ? "true" : undefined })}
      <p class="hint" id={`${id}-hint`}>
        {error ? <strong class="wrong">{error}</strong> : hint}
      </p>
    </div>
  );
}

interface Draft<T> {
  value: T;
  tag: string;
  lost?: unknown; // body of a PUT whose answer was lost
}

/**
 * What a form changes: an object of a kind, or a new one without `id`. A draft keeps the tag of the version that it was
 * made from, so that it cannot overwrite a later one.
 *
 * @param shown the form's content for an object of the API, or for a new one
 * @param sent the body for the form's content
 * @param list the page to go to at the end
 */
export function useEdited<T, Found>(kind: Kind, id: string | undefined, shown: (found: Found | undefined) => T, sent: (value: T) => Named, list: string) {
  const key = `/api/v1/${kind}/${id ?? "new"}`;
  const entered = useSignal(draft<Draft<T>>(key));
  const found = useLoad(
    async (signal): Promise<Draft<T>> => {
      if (!id) return { value: shown(undefined), tag: "" };
      const answer = await send("GET", key, { signal });
      return { value: shown(await received<Found>(answer.json(), signal)), tag: answer.headers.get("ETag") ?? "" };
    },
    [key],
  );
  const now = entered.value ?? found.data;
  const value = now?.value ?? shown(undefined);
  const keep = (changed: Draft<T>) => {
    entered.value = changed;
    keepDraft(key, changed);
  };
  const enter = (changed: T) => keep({ ...now!, value: changed });
  const discard = () => {
    dropDraft(key);
    entered.value = undefined;
  };
  /** Save a draft. If the response to an earlier PUT was lost, repeat that PUT first to get its ETag. */
  const put = async ({ tag, lost }: Draft<T>): Promise<void> => {
    const body = sent(value);
    for (const each of lost && JSON.stringify(lost) !== JSON.stringify(body) ? [lost, body] : [body]) {
      try {
        tag = (await send("PUT", key, { body: each, headers: tag ? { "If-Match": tag } : {} })).headers.get("ETag") ?? "";
      } catch (error) {
        const latest = entered.peek()?.value ?? value; // typed during the request
        keep(unsure(error) ? { value: latest, tag, lost: each } : { value: latest, tag });
        throw error;
      }
    }
  };
  const unanswered = useRef<unknown>(undefined); // body of a creation whose response was lost
  const make = async (body: Named): Promise<void> => {
    try {
      await create(kind, body, { reuse: JSON.stringify(body) === JSON.stringify(unanswered.current) });
    } catch (error) {
      if (unsure(error)) unanswered.current = body;
      throw error;
    }
  };
  const save = useAction(async () => {
    if (id) await put(now!);
    else await make(sent(value));
    dropDraft(key);
    go(list);
  });
  const theirs = () => {
    discard();
    save.clear();
    found.reload();
  };
  return { id, value, enter, discard, save, theirs, list, ready: now !== undefined, error: found.error, reload: found.reload, wrong: save.error?.fields ?? {} };
}

/** The form of `useEdited` around its fields. */
export function EditForm({ form, children }: { form: Omit<ReturnType<typeof useEdited>, "value" | "enter">; children: ComponentChildren }) {
  const { save } = form;
  return (
    <>
      <Problem error={form.error} again={form.reload} />
      {form.ready && (
        <form
          onSubmit={(event) => {
            event.preventDefault();
            void save.run();
          }}
        >
          {children}
          <Problem error={save.error} />
          {save.error?.status === 412 && (
            <p>
              Someone else has changed it meanwhile.{" "}
              <button type="button" onClick={form.theirs}>
                Discard mine and load theirs
              </button>
            </p>
          )}
          <p class="actions">
            <a class="button" href={form.list} onClick={form.discard}>
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

/** Notice that a list is longer than the page keeps. */
export function Kept({ shown, total }: { shown: number; total: number | undefined }) {
  return total !== undefined && total > shown ? (
    <p class="faint">
      The page keeps the first {count(shown)} of {count(total)}.
    </p>
  ) : null;
}

/** A list's rows can be walked with j and k; Enter opens the row's first link. */
export function moveRow(step: 1 | -1): void {
  const links = [...document.querySelectorAll<HTMLElement>("tbody a[data-row]")];
  const index = links.indexOf(document.activeElement as HTMLElement);
  links[Math.min(links.length - 1, Math.max(0, index + step))]?.focus();
}

export function Filter({ name, label, options, value }: { name: string; label: string; options: [string, string][]; value: string }) {
  return (
    <label class="filter">
      {label}{" "}
      <select value={value} onChange={(event) => go(withQuery({ [name]: event.currentTarget.value, page: undefined }))}>
        {options.map(([each, text]) => (
          <option key={each} value={each}>
            {text}
          </option>
        ))}
      </select>
    </label>
  );
}
