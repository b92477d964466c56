/**
 * Runs all checks and tests, or the groups that are named, and closes with
 * their sum.
 *
 *     npm test [-- GROUP...]
 *
 * @module
 */
import { needPrograms, systemPath } from "./programs.ts";
import { projectFolder } from "./system.ts";

interface Count {
  passed: number;
  failed: number;
  skipped: number;
}

const deno = Deno.execPath();
const config = ["--config", `${projectFolder}deno.npm.json`];
const executable = [`${projectFolder}dist/persistence`];
const script = [deno, "run", "-A", ...config, `${projectFolder}persistence.ts`];

/** Once is enough for these, with the executable; the longest come first. */
const rough = [
  ...[
    "cuts",
    "life",
    "cases",
    "killed",
    "move",
    "payload",
    "fault",
    "bystanders",
  ],
  ...["maintain", "fuzz", "s11", "layout", "hostile_names", "lock", "mounts"],
  ...["daemon_json", "recipes", "decide", "formats", "holds", "documents"],
].map((name) => `testing/${name}_test.ts`);

/** With the executable and again with Deno: all files but the rough ones. */
const usual = [...Deno.readDirSync(`${projectFolder}testing`)]
  .map(({ name }) => `testing/${name}`)
  .filter((path) => path.endsWith("_test.ts") && !rough.includes(path))
  .sort()
  .concat("persistence_test.ts");

/** In the virtual machine; BOOT=all: every situation, cut and fault. */
const bootTests = [
  "vm/boot_test.ts",
  "vm/power_cut_test.ts",
  "vm/fault_test.ts",
];

type Task = () => Promise<Count>;

const by = (group: string, paths: string[], tool: string[]): Task[] =>
  paths.map((path) => () => denoTest(group, path, tool));

const groups: Record<string, Task[]> = {
  script: by("script", usual, script),
  rough: by("rough", rough, executable),
  executable: by("executable", usual, executable),
  check: [check],
  boot: by("boot", bootTests, executable),
};

const names = Deno.args.length > 0 ? Deno.args : Object.keys(groups);
const unknown = names.filter((name) => !(name in groups));
if (unknown.length > 0) {
  console.error(
    `Unknown group "${unknown[0]}": use ${Object.keys(groups).join(", ")}`,
  );
  Deno.exit(2);
}

// Two files run side by side, one a processor. The virtual machine has both
// processors for itself: its tests watch the clock.
const total: Count = { passed: 0, failed: 0, skipped: 0 };
const failures: string[] = []; // said once more at the end of a long log
const built = await run(["npm", "run", "--silent", "build"]) === 0;
const tasks = Object.keys(groups).filter((name) => names.includes(name))
  .filter((name) => name !== "boot").flatMap((name) => groups[name]);
const alone = names.includes("boot") ? groups.boot : [];
await runAll(built ? tasks : [], 2);
await runAll(built ? alone : [], 1);
if (!built) total.failed++;
const { passed, failed, skipped } = total;
const tail = skipped > 0 ? `, ${skipped} skipped` : "";
// In CI nobody reads what was skipped, so it must be nothing.
const skippedInCi = skipped > 0 && Deno.env.get("CI") !== undefined;
if (skippedInCi) console.error("Skipped tests count as failures in CI");
console.log(
  ["", ...failures, `${passed} passed, ${failed} failed${tail}`].join("\n"),
);
Deno.exit(failed > 0 || passed === 0 || skippedInCi ? 1 : 0);

async function runAll(tasks: Task[], atATime: number): Promise<void> {
  const queue = [...tasks];
  await Promise.all(
    Array(atATime).fill(0).map(async () => {
      for (let task = queue.shift(); task; task = queue.shift()) {
        const { passed, failed, skipped } = await task();
        total.passed += passed;
        total.failed += failed;
        total.skipped += skipped;
      }
    }),
  );
}

/** Formatting, linting, types, and whether the build is reproducible. */
async function check(): Promise<Count> {
  needPrograms("shellcheck");
  const checks = [
    [deno, "fmt", "--check", ...config],
    [deno, "lint", ...config],
    [deno, "check", "--quiet", ...config, "."],
    ["shellcheck", ...await shellScripts()],
  ];
  let failed = 0;
  for (const line of checks) {
    if (await run(line) === 0) continue;
    failed++;
    failures.push(`FAILED check: ${line.slice(0, 3).join(" ")}`);
  }
  if (!await isReproducible()) {
    failed++;
    failures.push("FAILED check: the build is not reproducible");
  }
  return { passed: checks.length + 1 - failed, failed, skipped: 0 };
}

/** Built in another folder, the executable is the same, byte for byte. */
async function isReproducible(): Promise<boolean> {
  const folder = `${projectFolder}dist/again`;
  const sources = ["build.ts", "persistence.ts", "package.json", "npm_only"];
  const paths = sources.map((name) => projectFolder + name);
  const modules = [`${projectFolder}node_modules`, `${folder}/`];
  const steps = [
    ["mkdir", "-p", folder],
    ["cp", "--recursive", ...paths, folder],
    ["cp", "--recursive", "--link", ...modules], // some are 100 MiB
    ["npm", "run", "--silent", "--prefix", folder, "build"],
    ["cmp", ...executable, `${folder}/dist/persistence`],
  ];
  let isSame = true;
  for (const step of steps) isSame &&= await run(step) === 0;
  await Deno.remove(folder, { recursive: true });
  return isSame;
}

/** The tests of a file, with this command as the tool. */
async function denoTest(
  group: string,
  path: string,
  tool: string[],
): Promise<Count> {
  const name = `${group} ${path.replace(/^.*\/|_test\.ts$/g, "")}`;
  const startedMs = performance.now();
  const junit = await Deno.makeTempFile({ suffix: ".xml" });
  // Another file prints at the same time: each line says whose it is. Its new
  // mount namespaces would keep what this one has mounted from being unmounted.
  const prefixed = 'set -o pipefail; "$@" 2>&1 | sed -u "s/^/$0| /"';
  const status = await run([
    ...["unshare", "--mount", "bash", "-c", prefixed, name],
    ...[deno, "test", "-A", "--no-check", ...config],
    ...["--sanitize-ops", "--sanitize-resources", `--junit-path=${junit}`],
    path,
  ], { PERSISTENCE: tool.join(" ") });
  const report = await Deno.readTextFile(junit);
  await Deno.remove(junit);
  const sum = (name: string) =>
    [...report.matchAll(new RegExp(`<testsuite .*\\b${name}="(\\d+)"`, "g"))]
      .reduce((sum, [, digits]) => sum + Number(digits), 0);
  const bad = sum("failures") + sum("errors");
  const skipped = sum("disabled");
  const passed = sum("tests") - bad - skipped;
  // A file that does not even load is in no report.
  const failed = status !== 0 ? Math.max(bad, 1) : bad;
  const seconds = Math.round((performance.now() - startedMs) / 1000);
  // JUnit XML: a case that failed holds its message, quoted.
  const bads = report.matchAll(
    /<testcase name="([^"]*)"[^>]*>\s*<(?:failure|error) message="([^"]*)"/g,
  );
  for (const [, test, message] of bads) {
    failures.push(`FAILED ${name}: ${test}\n${message.slice(0, 2000)}`);
  }
  console.log(`# ${name}: ${passed} passed, ${failed} failed, ${seconds} s`);
  return { passed, failed, skipped };
}

async function run(
  [program, ...args]: string[],
  env: Record<string, string> = {},
): Promise<number> {
  const { code } = await new Deno.Command(program, {
    args,
    cwd: projectFolder,
    env,
    stdin: "null",
  }).spawn().status;
  return code;
}

async function shellScripts(): Promise<string[]> {
  const { stdout } = await new Deno.Command("grep", {
    args: [
      ...["-rlI", "--exclude-dir=node_modules", "--exclude-dir=.git"],
      ...["--exclude-dir=dist", "--exclude-dir=cache", "^#!/bin/sh", "."],
    ],
    cwd: projectFolder,
    env: { PATH: systemPath },
  }).output();
  const files = new TextDecoder().decode(stdout).split("\n").filter(Boolean);
  // At its very start: tests have scripts inside.
  return files.filter((path) =>
    Deno.readTextFileSync(`${projectFolder}${path}`).startsWith("#!")
  );
}
