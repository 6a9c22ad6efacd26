// Addresses and networks as numbers.

export interface Network {
  first: bigint;
  length: number;
  bits: 32 | 128;
}

export function toNumber(address: string): bigint {
  if (!address.includes(":")) return address.split(".").reduce((sum, part) => sum * 256n + BigInt(part), 0n);
  const [head = "", tail] = address.split("::");
  const words = (text: string) => (text ? text.split(":") : []);
  const left = words(head);
  const right = words(tail ?? "");
  const all = tail === undefined ? left : [...left, ...Array<string>(8 - left.length - right.length).fill("0"), ...right];
  return all.reduce((sum, word) => sum * 65536n + BigInt(`0x${word}`), 0n);
}

export function toText(value: bigint, bits: 32 | 128): string {
  if (bits === 32) return [24n, 16n, 8n, 0n].map((shift) => (value >> shift) & 255n).join(".");
  const words = Array.from({ length: 8 }, (_, index) => ((value >> BigInt(112 - 16 * index)) & 65535n).toString(16));
  const text = words.join(":");
  const zeros = [...text.matchAll(/\b0(?::0)+\b/g)].sort((a, b) => b[0].length - a[0].length)[0];
  if (!zeros) return text;
  return `${text.slice(0, zeros.index).replace(/:$/, "")}::${text.slice(zeros.index + zeros[0].length).replace(/^:/, "")}`;
}

export const bitsOf = (address: string): 32 | 128 => (address.includes(":") ? 128 : 32);

/** A network from "10.0.0.0/8" or a single address; undefined if the text is neither. */
export function parseNetwork(text: string): Network | undefined {
  const [address = "", length] = text.trim().split("/");
  const bits = bitsOf(address);
  const number = length === undefined ? bits : Number(length);
  const isAddress =
    bits === 32
      ? /^(\d{1,3}\.){3}\d{1,3}$/.test(address) && address.split(".").every((part) => Number(part) < 256)
      : /^[0-9a-f:]+$/i.test(address);
  if (!isAddress || !Number.isInteger(number) || number < 0 || number > bits) return undefined;
  try {
    return { first: toNumber(address), length: number, bits };
  } catch {
    return undefined;
  }
}

const sizeOf = (network: Network): number => 2 ** (network.bits - network.length);

/** The addresses of a network less those of the excluded ones within. */
export function countAddresses(cidr: string, exclude: string[]): number {
  const network = parseNetwork(cidr);
  if (!network) return 0;
  const end = network.first + (1n << BigInt(network.bits - network.length));
  const inside = exclude
    .map(parseNetwork)
    .filter((each) => each !== undefined && each.bits === network.bits && each.first >= network.first && each.first < end);
  return sizeOf(network) - inside.reduce((sum, each) => sum + sizeOf(each!), 0);
}

/** Ascending addresses as the fewest networks. */
export function collapse(addresses: string[]): string[] {
  const found: string[] = [];
  for (let index = 0; index < addresses.length; ) {
    const bits = bitsOf(addresses[index]!);
    let first = toNumber(addresses[index]!);
    let count = 1n;
    while (++index < addresses.length && bitsOf(addresses[index]!) === bits && toNumber(addresses[index]!) === first + count) count++;
    while (count > 0n) {
      let host = 0;
      while (host < bits && !((first >> BigInt(host)) & 1n) && 2n << BigInt(host) <= count) host++;
      found.push(host ? `${toText(first, bits)}/${bits - host}` : toText(first, bits));
      first += 1n << BigInt(host);
      count -= 1n << BigInt(host);
    }
  }
  return found;
}

/** How many ports a policy's text names; undefined if it cannot be read. */
export function countPorts(text: string): number | undefined {
  let count = 0;
  for (const part of text.split(",").map((each) => each.trim().replace(/^[TU]:/i, ""))) {
    const top = /^top:(\d+)$/.exec(part);
    const range = /^(\d+)(?:-(\d+))?$/.exec(part);
    if (top) count += Number(top[1]);
    else if (range) count += Number(range[2] ?? range[1]) - Number(range[1]) + 1;
    else return undefined;
  }
  return count > 0 ? count : undefined;
}
