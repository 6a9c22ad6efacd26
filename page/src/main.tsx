import { effect, useSignal } from "@preact/signals";
import { render } from "preact";
import { useEffect } from "preact/hooks";
import { keepSession, me, reached, signOut, whoAmI } from "./api";
import { Audit } from "./pages/audit";
import { JobPage } from "./pages/job";
import { Jobs } from "./pages/jobs";
import { NewScan } from "./pages/new";
import { Policies, PolicyForm } from "./pages/policies";
import { SignIn, SignInAgain } from "./pages/sign-in";
import { SubnetForm, SubnetImport, Subnets } from "./pages/subnets";
import { Dialog, loading, moveRow, Problem, streaming, Title, useAction, useLoad } from "./components";
import { go, url } from "./router";
import { info, loadInfo } from "./store";

const PLACES: [path: string, name: string, key: string][] = [
  ["/app/jobs", "Jobs", "j"],
  ["/app/subnets", "Subnets", "s"],
  ["/app/policies", "Policies", "p"],
  ["/app/audit", "Audit", "a"],
];

function Page() {
  const [, , place = "", id = "", rest = ""] = url.value.pathname.split("/");
  switch (place) {
    case "":
    case "jobs":
      return id ? <JobPage key={id} id={id} tab={rest} /> : <Jobs />;
    case "new":
      return <NewScan />;
    case "subnets":
      if (id === "import") return <SubnetImport />;
      return id ? <SubnetForm key={id} id={id === "new" ? undefined : id} /> : <Subnets />;
    case "policies":
      return id ? <PolicyForm key={id} id={id === "new" ? undefined : id} /> : <Policies />;
    case "audit":
      return <Audit />;
    default:
      return (
        <>
          <Title text="Not found" />
          <p>
            There is no such page. <a href="/app/jobs">Jobs</a>
          </p>
        </>
      );
  }
}

const places = () => PLACES.filter(([path]) => path !== "/app/audit" || me.value?.admin);

function App() {
  const dialog = useSignal<"" | "keys" | "palette">("");
  const start = useLoad((signal) => Promise.all([whoAmI(), loadInfo(signal)]), []);
  useEffect(() => {
    if (me.value && info.value?.sign_in_to_page.includes("oidc")) return keepSession();
  }, [me.value?.expires_at, info.value?.sign_in_to_page.length]);
  useKeys((name) => void (dialog.value = name));

  return (
    <>
      <a class="skip" href="#main">
        Skip to content
      </a>
      {!reached.value && (
        <p class="cut" role="alert">
          The connection to Scanfleet is lost. The page reconnects automatically and keeps your input.
        </p>
      )}
      {me.value && <Header />}
      {reached.value && <Problem error={start.error} again={start.reload} />}
      {me.value === null ? (
        <SignIn />
      ) : (
        me.value && (
          <main id="main" tabIndex={-1}>
            <Page />
          </main>
        )
      )}
      <SignInAgain />
      {dialog.value === "keys" && <Keys close={() => void (dialog.value = "")} />}
      {dialog.value === "palette" && <Palette close={() => void (dialog.value = "")} />}
      {me.value && (
        <footer>
          <button type="button" class="quiet" onClick={() => void (dialog.value = "keys")}>
            Keys
          </button>
          <a href="/docs">API</a>
          <span>{info.value && `Scanfleet ${info.value.version}`}</span>
        </footer>
      )}
    </>
  );
}

function Header() {
  const out = useAction(signOut);
  const here = url.value.pathname;
  return (
    <header>
      <a class="brand" href="/app/jobs">
        Scanfleet
      </a>
      <nav aria-label="main">
        {places().map(([path, name]) => (
          <a key={path} href={path} aria-current={here.startsWith(path) ? "page" : undefined}>
            {name}
          </a>
        ))}
      </nav>
      <span class="end">
        <a class="button primary" href="/app/new">
          New scan
        </a>
        <details class="menu">
          <summary>
            user {me.value!.user_id}
            {me.value!.admin && ", administrator"}
          </summary>
          <div>
            <Theme />
            <button type="button" disabled={out.busy} onClick={out.run}>
              Sign out
            </button>
            <Problem error={out.error} />
          </div>
        </details>
      </span>
    </header>
  );
}

function store(name: string, value: string): void {
  try {
    if (value) localStorage.setItem(name, value);
    else localStorage.removeItem(name);
  } catch {
    // No storage: the choice lasts until the page is left.
  }
}

function stored(name: string): string {
  try {
    return localStorage.getItem(name) ?? "";
  } catch {
    return "";
  }
}

function Theme() {
  const theme = useSignal(document.documentElement.dataset.theme ?? "");
  return (
    <label class="filter">
      Theme{" "}
      <select
        value={theme.value}
        onChange={(event) => {
          theme.value = event.currentTarget.value;
          store("theme", theme.value);
          if (theme.value) document.documentElement.dataset.theme = theme.value;
          else delete document.documentElement.dataset.theme;
          dispatchEvent(new Event("themechange"));
        }}
      >
        <option value="">as the system</option>
        <option value="light">light</option>
        <option value="dark">dark</option>
      </select>
    </label>
  );
}

const KEYS = [
  ...PLACES.map(([, name, key]): [string, string] => [`g ${key}`, name]),
  ["n", "New scan"],
  ["/", "search"],
  ["j k", "next row, previous row"],
  ["Enter", "open the row"],
  ["x", "cancel the job"],
  ["Ctrl K", "go to …"],
  ["?", "these keys"],
] as [string, string][];

const keysOff = () => stored("keys") === "off";

function useKeys(show: (name: "keys" | "palette") => void) {
  useEffect(() => {
    let before = "";
    const pressed = (event: KeyboardEvent) => {
      if (!me.peek() || document.querySelector("dialog[open]")) return;
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
        event.preventDefault();
        return show("palette");
      }
      const typing = (event.target as Element).closest("input, select, textarea, [contenteditable]");
      if (typing || event.ctrlKey || event.metaKey || event.altKey || keysOff()) return;
      const { key } = event;
      const place = before === "g" ? places().find(([, , each]) => each === key) : undefined;
      before = key;
      if (place) return go(place[0]);
      if (key === "n") go("/app/new");
      else if (key === "?") show("keys");
      else if (key === "j" || key === "k") moveRow(key === "j" ? 1 : -1);
      else if (key === "x") document.querySelector<HTMLElement>("[data-key=x]")?.click();
      else if (key === "/") {
        event.preventDefault();
        document.querySelector<HTMLElement>("input[type=search]")?.focus();
      }
    };
    document.addEventListener("keydown", pressed);
    return () => document.removeEventListener("keydown", pressed);
  }, []);
}

function Keys({ close }: { close: () => void }) {
  const on = useSignal(!keysOff());
  return (
    <Dialog title="Keys" close={close}>
      <dl class="facts">
        {KEYS.map(([key, what]) => [
          <dt key={key}>
            <kbd>{key}</kbd>
          </dt>,
          <dd key={what}>{what}</dd>,
        ])}
      </dl>
      <label>
        <input
          type="checkbox"
          checked={on.value}
          onChange={(event) => {
            on.value = event.currentTarget.checked;
            store("keys", on.value ? "" : "off");
          }}
        />{" "}
        single keys work
      </label>
      <p class="actions">
        <button type="button" onClick={close}>
          Close
        </button>
      </p>
    </Dialog>
  );
}

function Palette({ close }: { close: () => void }) {
  const text = useSignal("");
  const wanted = text.value.trim().toLowerCase();
  const all: [string, string][] = [...places().map(([path, name]): [string, string] => [path, name]), ["/app/new", "New scan"], ["/app/subnets/new", "New subnet"], ["/app/policies/new", "New policy"]];
  const found = /^\d+$/.test(wanted) ? [[`/app/jobs/${wanted}`, `Job ${wanted}`] as [string, string]] : all.filter(([, name]) => name.toLowerCase().includes(wanted));
  const open = (path: string | undefined) => {
    if (!path) return;
    close();
    go(path);
  };
  return (
    <Dialog title="Go to" close={close}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          open(found[0]?.[0]);
        }}
      >
        <input aria-label="Page, or the id of a job" autofocus value={text.value} onInput={(event) => void (text.value = event.currentTarget.value)} />
      </form>
      <ul class="plain">
        {found.map(([path, name]) => (
          <li key={path}>
            <a href={path} onClick={close}>
              {name}
            </a>
          </li>
        ))}
      </ul>
    </Dialog>
  );
}

effect(() => void document.body.toggleAttribute("data-busy", loading.value + streaming.value > 0)); // read by tests
render(<App />, document.getElementById("app")!);
