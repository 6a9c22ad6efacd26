// Words, numbers and times for display.

/** Text from the network with unprintable characters, and spaces other than U+0020, as the escapes that the API's CSV has. */
export const visible = (text: string): string => text.replace(/(?! )[\p{C}\p{Z}]/gu, escaped);

function escaped(each: string): string {
  if (/[\t\n\r]/.test(each)) return JSON.stringify(each).slice(1, -1);
  const code = each.codePointAt(0)!;
  const [letter, digits] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
  return `\\${letter}${code.toString(16).padStart(digits, "0")}`;
}

const whole = new Intl.NumberFormat("en");
export const count = (value: number): string => (value >= 1e15 ? value.toExponential(1) : whole.format(value));
export const plural = (value: number, one: string, many = `${one}s`): string => `${count(value)} ${value === 1 ? one : many}`;

export function duration(seconds: number): string {
  const s = Math.max(0, Math.round(seconds));
  const two = (value: number) => String(value).padStart(2, "0");
  const [hours, minutes] = [Math.floor(s / 3600), Math.floor(s / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(s % 60)}` : `${minutes}:${two(s % 60)}`;
}

const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
export function ago(time: string): string {
  const seconds = (Date.parse(time) - Date.now()) / 1000;
  for (const [unit, size] of [["day", 86_400], ["hour", 3_600], ["minute", 60]] as const) {
    if (Math.abs(seconds) >= size) return relative.format(Math.round(seconds / size), unit);
  }
  return Math.abs(seconds) < 10 ? "now" : relative.format(Math.round(seconds), "second");
}

export const exact = (time: string): string => time.replace("T", " ").replace(/(\.\d+)?Z$/, " UTC");

// A formula prefix or its full-width form where a cell may begin; spreadsheets drop spaces and quotes before it.
const FORMULA = /(^|[;|])(?=[ "]*[=+\-@\uff1d\uff0b\uff0d\uff20])/g;

/** A line of a CSV file, in which no text from the network is a formula: the rule of the API's own CSV. */
export function csvLine(cells: (string | number)[]): string {
  const safe = cells.map((cell) => (typeof cell === "string" ? visible(cell).replace(FORMULA, "$1'") : String(cell)));
  return safe.map((cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell)).join(",") + "\r\n";
}

export function save(name: string, content: Blob): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  window.setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
