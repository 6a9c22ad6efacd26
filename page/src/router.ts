// All state is in the URL.
import { signal } from "@preact/signals";

const here = () => new URL(location.href);
export const url = signal(here());

export function go(to: string, { replace = false } = {}): void {
  const target = new URL(to, location.href);
  if (target.href === location.href) return;
  const samePage = target.pathname === location.pathname;
  history[replace ? "replaceState" : "pushState"](null, "", target);
  url.value = here();
  if (!samePage) window.scrollTo(0, 0);
}

/** The present URL with these parameters; an empty one is left out. */
export function withQuery(changed: Record<string, string | number | undefined>): string {
  const target = new URL(url.value);
  for (const [name, value] of Object.entries(changed)) {
    if (value === undefined || value === "") target.searchParams.delete(name);
    else target.searchParams.set(name, String(value));
  }
  return target.pathname + target.search;
}

export const query = (name: string): string => url.value.searchParams.get(name) ?? "";

/** The number of the page of a list. */
export const pageNumber = (): number => Math.max(1, Math.floor(Number(query("page"))) || 1);

addEventListener("popstate", () => {
  url.value = here();
});

document.addEventListener("click", (event) => {
  const link = (event.target as Element).closest<HTMLAnchorElement>("a[href]");
  const plain = !event.defaultPrevented && event.button === 0 && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.altKey;
  if (!link || !plain || link.target || link.hasAttribute("download")) return;
  if (link.origin !== location.origin || !link.pathname.startsWith("/app/") || link.hash) return;
  event.preventDefault();
  go(link.href);
});
