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

/** The number of addresses of a network in the API's notation. */
export const sizeOf = (cidr: string): number => 2 ** (bitsOf(cidr) - Number(cidr.split("/")[1]));

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
