// Live states over one stream, which is opened again whenever it is cut.
import { computed, effect, signal } from "@preact/signals";
import { ended, FIRST_WAIT, isFinal, LONGEST_WAIT, me, recovered, STATUSES, whoAmI, type TaskStatus } from "./api";

export const live = signal<"off" | "on" | "lost">("off");

const visible = signal(document.visibilityState === "visible");
document.addEventListener("visibilitychange", () => void (visible.value = document.visibilityState === "visible"));

// A hidden tab has no stream: over HTTP/1.1 a browser has six connections for all tabs.
const open = computed(() => visible.value && !!me.value && !ended.value);

/**
 * Call `receive` with each state that the stream at `path` sends, until the returned function is called. Call `failed` if the
 * stream cannot be opened although the gateway responds, for example because the job was deleted or access was withdrawn.
 */
export function watch(path: string, receive: (task: TaskStatus) => void, failed: () => void, { untilFinal = false } = {}): () => void {
  let source: EventSource | undefined;
  let timer = 0;
  let wait = FIRST_WAIT;
  let cut = false;

  const connect = () => {
    const opened = new EventSource(path);
    source = opened;
    let began = false;
    opened.onopen = () => {
      began = true;
      live.value = "on";
      wait = FIRST_WAIT;
      if (cut) recovered.value++; // load changes that the stream does not repeat
      cut = false;
    };
    for (const status of STATUSES) {
      opened.addEventListener(status, (event) => {
        const task = JSON.parse((event as MessageEvent<string>).data) as TaskStatus;
        receive(task);
        if (untilFinal && isFinal(task.status.status)) stop();
      });
    }
    opened.onerror = () => {
      opened.close();
      if (source !== opened) return;
      live.value = "lost";
      cut = true;
      timer = window.setTimeout(() => again(began), wait * (1 + Math.random() / 2));
      wait = Math.min(wait * 2, LONGEST_WAIT);
    };
  };
  // EventSource does not report why a connection failed. If the session has ended, `open` closes the stream.
  const again = async (began: boolean) => {
    const current = source;
    const answers = await whoAmI().then(
      () => true,
      () => false,
    );
    if (source !== current) return;
    if (answers && !began) failed();
    connect();
  };
  const disconnect = () => {
    window.clearTimeout(timer);
    source?.close();
    source = undefined;
    cut = true;
    live.value = "off";
  };
  const stop = effect(() => {
    if (!open.value) return;
    connect();
    return disconnect;
  });
  return stop;
}
