/**
 * Break persistence.ts on purpose and see that the real boots notice: a test
 * that nothing makes fail tests nothing.
 *
 *     npm run test:mutations [-- NAME...]
 */
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const top = dirname(here.replace(/\/$/, ""));

/** A way to be wrong, and the tests that must notice. */
interface Mutation {
  name: string;
  /** What is replaced, by what; each must occur in the source. */
  patches: [string | RegExp, string][];
  /** A file of tests, and a part of the name of one of them. */
  file: string;
  filter: string;
  /** The one power cut that is enough, in the middle of mkfs.btrfs. */
  cut?: string;
}

const mutations: Mutation[] = [
  {
    name: "no fsync",
    patches: [["conv=notrunc,fsync", "conv=notrunc"], [
      /if \(old\) fs\.fsyncSync\(file\);/g,
      "",
    ]],
    file: "power_cut_test.ts",
    filter: "as soon as --enable",
  },
  {
    name: "no resume: a disk that has a partition table is not magic",
    patches: [[
      'device.kind === "disk") return device.read.header;',
      'device.kind === "disk") return device.read.header && !device.read.gpt;',
    ]],
    file: "power_cut_test.ts",
    filter: "during the first boot: one disk",
    cut: "60",
  },
  {
    name: "the header is cleared first",
    patches: [[
      "  await allOf(create.members.map(partitionDisk));",
      "  await attemptEach(devices, clearMagic);\n" +
      "  await allOf(create.members.map(partitionDisk));",
    ]],
    file: "power_cut_test.ts",
    filter: "during the first boot: one disk",
    cut: "60",
  },
  {
    name: "index=on",
    patches: [[/index=off/g, "index=on"]],
    file: "boot_test.ts",
    filter: "a new system image",
  },
  {
    name: "no wait for a missing member",
    patches: [["if (absent > 0) return", "if (absent > 99) return"]],
    file: "boot_test.ts",
    filter: "when it is waited for",
  },
  {
    name: "a member that missed writes is trusted",
    patches: [
      ["if (btrfs.generation - lastTogether > 1) return true;", ""],
      [
        "if (tookPart(other, writer)) return false;",
        "return false;",
      ],
    ],
    file: "boot_test.ts",
    filter: "missing at two boots",
  },
  {
    name: "a member that dropped out is trusted",
    patches: [["if (btrfs.generation - lastTogether > 1) return true;", ""]],
    file: "boot_test.ts",
    filter: "pulled and plugged in again",
  },
  {
    name: "what was written without a mirror stays so",
    patches: [[
      "if (filters.length === 0) return undefined;",
      "return undefined;",
    ]],
    file: "boot_test.ts",
    filter: "missing at two boots",
  },
  {
    name: "a replace that was interrupted is given up",
    patches: [[
      "...data.missing > 0 ? target : []",
      "",
    ]],
    file: "boot_test.ts",
    filter: "a reset interrupts it",
  },
  {
    name: "no wait for a USB disk",
    patches: [["&& facts.diskPending", "&& false"]],
    file: "boot_test.ts",
    filter: "a USB disk whose driver",
  },
  {
    name: "disks that never answer keep others from being read",
    patches: [["setInterval(begin,", "setInterval(() => {},"]],
    file: "fault_test.ts",
    filter: "more disks never answer",
  },
];

const names = Deno.args;
let missed = 0;
for (const mutation of mutations) {
  if (names.length > 0 && !names.includes(mutation.name)) continue;
  const caught = await isCaught(mutation);
  console.log(`${caught ? "caught" : "MISSED"}: ${mutation.name}`);
  if (!caught) missed++;
}
Deno.exit(missed > 0 ? 1 : 0);

/** Does the test that names the mutation's harm fail? */
async function isCaught(mutation: Mutation): Promise<boolean> {
  const executable = await build(mutation);
  const { code, stdout } = await new Deno.Command(Deno.execPath(), {
    args: [
      ...["test", "-A", "--no-check", "--config", `${top}/deno.npm.json`],
      ...["--filter", mutation.filter, `${here}${mutation.file}`],
    ],
    env: {
      PERSISTENCE: executable,
      NO_COLOR: "1",
      ...(mutation.cut ? { CUT: mutation.cut } : {}),
    },
    stderr: "null",
  }).output();
  const text = new TextDecoder().decode(stdout);
  // A machine that cannot even be built must not count as a catch.
  const failed = /^FAILED \| 0 passed \| 1 failed/m.test(text) &&
    !/Cannot build|QEMU failed/.test(text);
  if (code !== 0 && !failed) throw new Error(`The test did not run: ${text}`);
  // What was seen instead, in assertEquals' words.
  const seen = text.split("\n").filter((line) => /^[+-] {2}/.test(line));
  console.log(seen.slice(0, 12).join("\n"));
  return failed;
}

/** Build the tool with the mutation, in a folder that git ignores. */
async function build({ name, patches }: Mutation): Promise<string> {
  const folder = `${here}cache/mutant`;
  Deno.mkdirSync(folder, { recursive: true });
  let source = Deno.readTextFileSync(`${top}/persistence.ts`);
  for (const [before, after] of patches) {
    const patched = source.replace(before, after);
    if (patched === source) {
      throw new Error(`Cannot apply "${name}": nothing matches ${before}`);
    }
    source = patched;
  }
  Deno.writeTextFileSync(`${folder}/persistence.ts`, source);
  Deno.copyFileSync(`${top}/build.ts`, `${folder}/build.ts`);
  const { success } = await new Deno.Command("bun", {
    args: [`${folder}/build.ts`],
    env: { PATH: `${top}/node_modules/.bin:${Deno.env.get("PATH")}` },
    stdout: "null",
  }).output();
  if (!success) throw new Error(`Cannot build "${name}"`);
  return `${folder}/dist/persistence`;
}
