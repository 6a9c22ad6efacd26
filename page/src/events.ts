// Live states over one stream, which is opened again whenever it is cut.
import { signal } from "@preact/signals";
import { ended, isFinal, me, recovered, STATUSES, whoAmI, type TaskStatus } from "./api";

export const live = signal<"off" | "on" | "lost">("off");

const FIRST_WAIT = 500;
const LONGEST_WAIT = 5_000;

/** Call `receive` with each state that the stream at `path` sends, until the returned function is called. */
export function watch(path: string, receive: (task: TaskStatus) => void, { untilFinal = false } = {}): () => void {
  let source: EventSource | undefined;
  let timer = 0;
  let wait = FIRST_WAIT;
  let cut = false;

  const close = () => {
    window.clearTimeout(timer);
    source?.close();
    source = undefined;
    live.value = "off";
  };
  const open = () => {
    const opened = new EventSource(path);
    source = opened;
    opened.onopen = () => {
      live.value = "on";
      wait = FIRST_WAIT;
      if (cut) recovered.value++; // what is not in the stream has to be asked for again
      cut = false;
    };
    for (const status of STATUSES) {
      opened.addEventListener(status, (event) => {
        const task = JSON.parse((event as MessageEvent<string>).data) as TaskStatus;
        receive(task);
        if (untilFinal && isFinal(task.status.status)) close();
      });
    }
    opened.onerror = () => {
      opened.close();
      if (source !== opened) return;
      live.value = "lost";
      cut = true;
      timer = window.setTimeout(again, wait * (1 + Math.random() / 2));
      wait = Math.min(wait * 2, LONGEST_WAIT);
    };
  };
  // A stream that cannot be opened does not say why: it may be the session.
  const again = async () => {
    const current = source;
    await whoAmI();
    if (source !== current) return;
    if (me.peek() && !ended.peek()) open();
    else timer = window.setTimeout(again, LONGEST_WAIT);
  };
  open();
  return close;
}
