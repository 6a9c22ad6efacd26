// Signing in: as a page of its own, and above any other page when its session has ended.
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { ended, me, signIn, whoAmI } from "../api";
import { Dialog, Field, Problem, Title, useAction } from "../components";
import { query, url, withQuery } from "../router";
import { info } from "../store";

// Messages for the gateway's failure codes.
const FAILURES: Record<string, string> = {
  refused: "The sign-in was not completed, or not in this browser. Try again.",
  unavailable: "The issuer, or a part of Scanfleet, is unavailable. Try again.",
  limit: "Too many sign-ins from this address. Try again in a minute.",
  token: "The issuer has signed you in, but its token is not one that Scanfleet accepts: ask an operator of Scanfleet.",
  large: "The issuer's token is too large for a session: ask an operator of Scanfleet.",
};

const LONGEST_NEXT = 2_000; // characters that the gateway accepts

/** The forms of all ways to sign in; with `above` a page that must stay, the issuer's is in another tab. */
function TokenForm({ above = false }: { above?: boolean }) {
  const token = useSignal("");
  const field = useRef<HTMLInputElement>(null);
  useEffect(() => field.current?.focus(), []); // browsers ignore `autofocus` once another element of the page had the focus
  const action = useAction(() => signIn(token.value.trim()));
  const ways = info.value?.sign_in_to_page ?? ["token"];
  const failed = FAILURES[query("sign_in")];
  const here = withQuery({ sign_in: undefined });
  const next = encodeURIComponent(here.length > LONGEST_NEXT ? url.value.pathname : here);
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        void action.run();
      }}
    >
      {above && <p>Your session has ended: {ended.value}. Your unsaved input is kept.</p>}
      {failed && (
        <p class="problem" role="alert">
          {failed}
        </p>
      )}
      {ways.includes("oidc") && (
        <p>
          <a class="button primary" href={`/session/login?next=${next}`} target={above ? "_blank" : undefined}>
            Sign in with {issuerName(info.value!.issuer)}
          </a>
          {above && " in another tab, then return to this one."}
        </p>
      )}
      {ways.includes("token") && (
        <>
          <Field
            label="Token"
            hint="A bearer token (JWT) of your issuer. It is kept encrypted in a cookie that scripts cannot read, and ends when it does."
          >
            {(attributes) => (
              <input
                {...attributes}
                ref={field}
                type="password"
                name="token"
                autocomplete="off"
                autofocus
                required
                spellcheck={false}
                value={token.value}
                onInput={(event) => void (token.value = event.currentTarget.value)}
              />
            )}
          </Field>
          <Problem error={action.error} />
          <p class="actions">
            <button class="primary" disabled={action.busy}>
              Sign in
            </button>
          </p>
        </>
      )}
      {!ways.length && (
        <p>
          Sign-in is off: an operator must set <code>SCANFLEET_SESSION_KEYS_FILE</code>. The command line and the{" "}
          <a href="/docs">API</a> work without.
        </p>
      )}
    </form>
  );
}

const issuerName = (issuer: string) => (URL.canParse(issuer) ? new URL(issuer).host : issuer);

export function SignIn() {
  return (
    <main class="narrow" id="main">
      <Title text="Sign in">Sign in to Scanfleet</Title>
      <TokenForm />
    </main>
  );
}

/** Asks to sign in again; what is behind it stays as it is. */
export function SignInAgain() {
  // Another tab or window may have signed in meanwhile, as this user or another: the cookie is the same.
  useEffect(() => {
    const look = () => {
      if (document.visibilityState === "visible") whoAmI().catch(() => undefined);
    };
    document.addEventListener("visibilitychange", look);
    addEventListener("focus", look);
    return () => {
      document.removeEventListener("visibilitychange", look);
      removeEventListener("focus", look);
    };
  }, []);
  if (!ended.value || !me.value) return null;
  return (
    <Dialog title="Sign in again" close={() => undefined} fixed>
      <TokenForm above />
    </Dialog>
  );
}
