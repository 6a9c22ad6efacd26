// The coverage map: one cell an address or a chunk, on a canvas, so that 65,536 of them cost one drawing and no nodes.
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import type { OutcomeMap } from "./api";
import { bitsOf, parseNetwork, toNumber, toText } from "./addresses";
import { go, query, withQuery } from "./router";
import { count } from "./text";

/** Every letter of a map in the order of the legend: its name and its colour in the style sheet. */
const OUTCOMES: [letter: string, name: string, meaning: string][] = [
  ["a", "answered", "something answered"],
  ["s", "silent", "up, and no probed port answered"],
  ["d", "down", "nothing answered"],
  ["t", "timed out", "given up before all ports were probed"],
  [">", "in work", "a worker scans it now"],
  [".", "waiting", "not scanned yet"],
  ["x", "excluded", "left out by the subnet"],
  ["r", "refused", "not allowed to be scanned"],
  ["l", "lost", "not probed: every attempt failed"],
  ["c", "cancelled", "not probed: the job was cancelled"],
];
const SPAN: Record<string, string> = Object.fromEntries(OUTCOMES.map(([letter, name]) => [letter, name]));
// Of an address with several port blocks, the first of these letters that occurs is shown.
const WORST = "lrct>.asdx";

const className = (name: string): string => name.replace(" ", "-");

/** One letter for each cell, over all blocks of ports. */
export function together(map: OutcomeMap): string {
  const [only, ...rest] = map.blocks;
  if (!only) return "";
  if (!rest.length) return only.letters;
  const ranks = map.blocks.map((block) => block.letters);
  let letters = "";
  for (let index = 0; index < only.letters.length; index++) {
    let best = WORST.length;
    for (const each of ranks) best = Math.min(best, WORST.indexOf(each[index]!));
    letters += WORST[best] ?? ".";
  }
  return letters;
}

const REST = 250; // ms that the cursor stays on an address before its ports are loaded; browsers limit changes of the URL

const columnsFor = (size: number) => (size <= 256 ? 16 : size <= 1_024 ? 32 : size <= 4_096 ? 64 : 256);

/** The map of the job's addresses or chunks; `openPorts` describes the open ports of an address that answered. */
export function Coverage({ map, letters, openPorts }: { map: OutcomeMap; letters: string; openPorts: (address: string, signal: AbortSignal) => Promise<string> }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const box = useRef<HTMLDivElement>(null);
  const legend = useRef<HTMLUListElement>(null);
  const cursor = useSignal(-1); // copied to the URL after REST ms
  const found = useSignal({ address: "", text: "" });
  const only = query("only");
  const width = useSignal(0);
  const theme = useSignal(0);

  const columns = columnsFor(letters.length);
  const rows = Math.ceil(letters.length / columns);
  const bits = bitsOf(map.first);
  const first = toNumber(map.first);
  const step = map.step;
  const address = (index: number) => toText(first + BigInt(index) * BigInt(step), bits);
  const cells = step > 1 ? "chunks" : "addresses";
  const ratio = window.devicePixelRatio || 1;
  const largest = columns <= 16 ? 20 : columns <= 64 ? 8 : 3;
  const cell = Math.max(1, Math.min(largest, Math.floor((width.value || 320) / columns)));

  const totals: Record<string, number> = {};
  for (const letter of letters) totals[letter] = (totals[letter] ?? 0) + 1;

  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => void (width.value = Math.floor(entry!.contentRect.width)));
    observer.observe(box.current!);
    const changed = () => void theme.value++;
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", changed);
    addEventListener("themechange", changed);
    return () => {
      observer.disconnect();
      scheme.removeEventListener("change", changed);
      removeEventListener("themechange", changed);
    };
  }, []);

  useEffect(() => {
    const element = canvas.current!;
    const size = Math.round(cell * ratio);
    element.width = columns * size;
    element.height = rows * size;
    const context = element.getContext("2d")!;
    context.clearRect(0, 0, element.width, element.height);
    const gap = size >= 6 ? Math.max(1, Math.round(ratio)) : 0;
    const swatches = legend.current!.querySelectorAll<HTMLElement>(".swatch");
    OUTCOMES.forEach(([letter, name], which) => {
      if (!totals[letter] || (only && only !== name)) return;
      context.fillStyle = getComputedStyle(swatches[which]!).backgroundColor;
      for (let index = letters.indexOf(letter); index >= 0; index = letters.indexOf(letter, index + 1)) {
        context.fillRect((index % columns) * size, Math.floor(index / columns) * size, size - gap, size - gap);
      }
    });
    if (cursor.value >= 0) {
      const x = (cursor.value % columns) * size;
      const y = Math.floor(cursor.value / columns) * size;
      context.strokeStyle = getComputedStyle(element).color;
      context.lineWidth = Math.max(2, ratio * 2);
      context.strokeRect(x - 1, y - 1, size - gap + 2, size - gap + 2);
    }
  }, [letters, only, cursor.value, cell, columns, rows, theme.value]);

  const pointed = cursor.value >= 0 && cursor.value < letters.length ? address(cursor.value) : "";
  const at = parseNetwork(query("at"))?.first;
  useEffect(() => {
    const index = at === undefined || at < first ? -1 : Number((at - first) / BigInt(step));
    cursor.value = index < letters.length ? index : -1;
  }, [at, first, step]);
  useEffect(() => {
    if (!pointed) return;
    const timer = window.setTimeout(() => go(withQuery({ at: pointed }), { replace: true }), REST);
    return () => window.clearTimeout(timer);
  }, [pointed]);
  const answered = !!pointed && step === 1 && letters[cursor.value] === "a";
  useEffect(() => {
    if (!answered) return;
    const abort = new AbortController();
    const show = (text: string) => void (found.value = { address: pointed, text });
    const timer = window.setTimeout(() => openPorts(pointed, abort.signal).then(show, () => undefined), REST); // the outcome alone is shown then
    return () => {
      window.clearTimeout(timer);
      abort.abort();
    };
  }, [pointed, answered, map]);

  const open = () => {
    if (step > 1 && cursor.value >= 0) go(withQuery({ from: address(cursor.value), at: undefined }));
  };
  const move = (event: KeyboardEvent) => {
    if (event.key === "Enter") open();
    const steps: Record<string, number> = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    cursor.value = Math.max(0, Math.min(letters.length - 1, cursor.value < 0 ? 0 : cursor.value + step));
  };
  const point = (event: PointerEvent) => {
    const { left, top } = canvas.current!.getBoundingClientRect();
    const column = Math.floor((event.clientX - left) / cell);
    const index = Math.floor((event.clientY - top) / cell) * columns + column;
    if (column >= 0 && column < columns && index >= 0 && index < letters.length) cursor.value = index;
  };

  return (
    <div class="coverage">
      <div ref={box} style={{ maxWidth: `${Math.max(columns * largest, 360)}px` }}>
        <canvas
          ref={canvas}
          style={{ width: `${columns * cell}px`, height: `${rows * cell}px` }}
          tabIndex={0}
          role="application"
          aria-roledescription={`map of ${cells}`}
          aria-label={`Coverage of ${count(letters.length)} ${cells} from ${map.first}; arrow keys move from cell to cell${step > 1 ? ", Enter shows the addresses of one" : ""}`}
          onKeyDown={move}
          onPointerMove={point}
          onPointerDown={point}
          onClick={open}
        />
        <p class="cursor" role="status">
          {pointed
            ? `${pointed}${step > 1 ? `/${bits - Math.log2(step)}` : ""} — ${SPAN[letters[cursor.value]!] ?? "waiting"}${answered && found.value.address === pointed ? found.value.text : ""}`
            : `${count(letters.length)} ${cells} from ${map.first}; point at one, or use the arrow keys`}
        </p>
        {step > 1 && <p>Each cell is a chunk of {count(step)} addresses, and has the worst of their outcomes. Select one to see its addresses.</p>}
      </div>
      <ul class="legend" ref={legend}>
        {OUTCOMES.map(([letter, name, meaning]) => (
          <li key={letter}>
            <button
              type="button"
              title={meaning}
              aria-pressed={only === name}
              disabled={!totals[letter]}
              onClick={() => go(withQuery({ only: only === name ? undefined : name }), { replace: true })}
            >
              <span class={`swatch ${className(name)}`} />
              <span class="name">{name}</span>
              <span class="number">{count(totals[letter] ?? 0)}</span>
              <span class="number share">{totals[letter] ? `${percent(totals[letter]!, letters.length)} %` : ""}</span>
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}

const percent = (part: number, of: number) => (part && part * 100 < of ? "<1" : String(Math.floor((100 * part) / of)));
