// Builds the page into the gateway's package: `npm run build`, or with another folder as the argument.
import { createHash } from "node:crypto";
import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { build } from "esbuild";

const folder = process.argv[2] ?? "../services/api-gateway/api_gateway/page";
await rm(folder, { recursive: true, force: true });
await mkdir(join(folder, "assets"), { recursive: true });

const { metafile } = await build({
  entryPoints: ["src/main.tsx", "src/style.css"],
  outdir: join(folder, "assets"),
  entryNames: "[name]-[hash]",
  bundle: true,
  minify: true,
  format: "esm",
  target: ["chrome123", "firefox120", "safari17.5"], // the first with light-dark()
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "none",
  metafile: true,
});

const names = Object.keys(metafile.outputs).map((path) => basename(path));
for (const name of ["theme.js", "icon.svg"]) {
  const content = await readFile(join("src", name));
  const [stem, suffix] = name.split(".");
  const hashed = `${stem}-${createHash("sha256").update(content).digest("hex").slice(0, 8)}.${suffix}`;
  await writeFile(join(folder, "assets", hashed), content);
  names.push(hashed);
}

// The licences of the bundled packages require their inclusion.
const packages = new Set(Object.keys(metafile.inputs).flatMap((path) => path.match(/node_modules\/(?:@[^/]+\/)?[^/]+/) ?? []));
const licences = await Promise.all(
  [...packages].sort().map(async (path) => `${path.slice("node_modules/".length)}\n\n${await readFile(join(path, "LICENSE"), "utf-8")}`),
);
await writeFile(join(folder, "licences.txt"), licences.join("\n\n"));

// index.html names each file by its plain name; the built one has the hashed name.
let html = await readFile("src/index.html", "utf-8");
for (const name of names) {
  const [, stem, suffix] = name.match(/^(\w+)-\w+\.(\w+)$/);
  html = html.replace(`assets/${stem}.${suffix}`, `assets/${name}`);
}
await writeFile(join(folder, "index.html"), html);
