// Signing in: as a page of its own, and above any other page when its session has ended.
import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { ended, me, signIn, whoAmI } from "../api";
import { Dialog, Field, Problem, Title, useAction } from "../parts";
import { query, withQuery } from "../router";
import { info } from "../store";

// What the gateway says of a sign-in at the issuer that has failed.
const FAILURES: Record<string, string> = {
  refused: "The sign-in was not completed, or not in this browser. Try again.",
  unavailable: "The issuer, or a part of Scanfleet, is unavailable. Try again.",
  token: "The issuer has signed you in, but its token is not one that Scanfleet accepts: ask whoever runs Scanfleet.",
  large: "The issuer's token is too large for a session: ask whoever runs Scanfleet.",
};

function TokenForm({ reason }: { reason?: string }) {
  const token = useSignal("");
  const action = useAction(() => signIn(token.value.trim()));
  const ways = info.value?.sign_in_to_page ?? ["token"];
  const failed = FAILURES[query("sign_in")];
  const next = encodeURIComponent(withQuery({ sign_in: undefined }));
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        void action.run();
      }}
    >
      {reason && <p>{reason}</p>}
      {failed && (
        <p class="problem" role="alert">
          {failed}
        </p>
      )}
      {ways.includes("oidc") && (
        <p>
          <a class="button primary" href={`/session/login?next=${next}`}>
            Sign in with {issuerName(info.value!.issuer)}
          </a>
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
          Nobody can sign in here: whoever runs Scanfleet must set <code>SCANFLEET_SESSION_KEYS_FILE</code>. The command line and the{" "}
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
  // Another tab may have signed in meanwhile: the cookie is the same.
  useEffect(() => {
    const look = () => void (document.visibilityState === "visible" && whoAmI());
    document.addEventListener("visibilitychange", look);
    return () => document.removeEventListener("visibilitychange", look);
  }, []);
  if (!ended.value || !me.value) return null;
  return (
    <Dialog title="Sign in again" close={() => undefined} fixed>
      <TokenForm reason={`Your session has ended: ${ended.value}. What you have entered is still here.`} />
    </Dialog>
  );
}
