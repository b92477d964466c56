/**
 * What `compression=zstd` does to the state: a copy of a large tree, small
 * synchronous writes, cold reads, in time and space.
 *
 *     npm run bench -- compression [--pairs N] [--source DIR]
 *
 * Both take turns in one run, in two directories of one filesystem as a first
 * boot makes it: one as it is, the other with the property taken away.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";
import { needPrograms } from "../testing/programs.ts";
import {
  command,
  type Disk,
  GiB,
  header,
  MiB,
  type System,
  withSystem,
} from "../testing/system.ts";

const options = parseArgs(Deno.args, { string: ["pairs", "source"] });
const rounds = Number(options.pairs ?? 3);
const source = options.source ?? "/usr/lib/x86_64-linux-gnu";
const writes = 1000; // of 8 KiB
const folder = "mnt/lightwhale-data/lightwhale-state/docker";
const variants = ["zstd", "plain"] as const;

/** What is measured, in the order of the table. */
const rows = [
  "copy of the tree, s",
  "space that it takes, MiB",
  `${writes} writes of 8 KiB with O_DSYNC, s`,
  "space that they take, MiB",
  "the tree read cold, s",
] as const;

type Variant = typeof variants[number];
type Results = Record<typeof rows[number], Record<Variant, number[]>>;

const results = Object.fromEntries(
  rows.map((row) => [row, { zstd: [], plain: [] }]),
) as unknown as Results;

needPrograms("mkfs.btrfs");
const treeBytes = Number(
  (await command(["du", "-sb", source])).split("\t")[0],
);
const sizeBytes = 4 * GiB + 3 * treeBytes;
await withSystem(
  { disks: [{ sizeBytes, contents: header }] },
  async (system) => {
    await start(system);
    for (let round = 0; round < rounds; round++) {
      console.error(`round ${round + 1} of ${rounds}`);
      const order = round % 2 === 0 ? variants : variants.toReversed();
      for (const variant of order) await write(system, variant);
      for (const variant of order) await read(system, variant);
    }
  },
);
const load = Deno.loadavg()[0].toFixed(1);
console.log(
  `${source}, ${Math.round(treeBytes / MiB)} MiB; medians of ${rounds}; ` +
    `load average at the end: ${load} on ${navigator.hardwareConcurrency} cores`,
);
for (const row of rows) {
  const [zstd, plain] = variants.map((variant) =>
    median(results[row][variant])
  );
  console.log(
    `${row.padEnd(40)} zstd ${zstd.toFixed(2).padStart(8)}   plain ` +
      `${plain.toFixed(2).padStart(8)}   ratio ${(zstd / plain).toFixed(2)}`,
  );
}

/** Copies the tree and writes a file, in a directory that is new. */
async function write(system: System, variant: Variant): Promise<void> {
  await system.sh(
    `cd ${folder}; rm -rf ${variant}; mkdir ${variant}
     ${variant === "plain" ? "chattr -c plain" : "lsattr -d zstd | grep -q c"}
     # Contents as databases have them: text and numbers, not noise.
     find '${source}' -type f -exec cat {} + 2>/dev/null |
       head -c ${8 * writes}K > "$OLDPWD/tmp/pages"`,
  );
  const scripts = [
    `cp -a '${source}' ${folder}/${variant}/tree; sync -f ${folder}`,
    `dd if=tmp/pages of=${folder}/${variant}/pages bs=8K oflag=dsync \\
       status=none; sync -f ${folder}`,
  ];
  for (const [i, script] of scripts.entries()) {
    const [seconds, usedMiB] = await measure(system, script);
    results[rows[2 * i]][variant].push(seconds);
    results[rows[2 * i + 1]][variant].push(usedMiB);
  }
}

/** Reads the tree after a reboot, with nothing of the disk in memory. */
async function read(system: System, variant: Variant): Promise<void> {
  await system.reboot({ whileOff: () => dropCache(system.disks[0]) });
  await start(system);
  const [seconds] = await measure(
    system,
    `find ${folder}/${variant}/tree -type f -exec cat {} + > /dev/null`,
  );
  results["the tree read cold, s"][variant].push(seconds);
}

/** How long a script takes, and how much more is used after it. */
async function measure(system: System, script: string) {
  const used = async () =>
    Number(await system.sh(`df --output=used -B1 ${folder} | tail -n 1`));
  const before = await used();
  const startedMs = performance.now();
  await system.sh(script);
  const seconds = (performance.now() - startedMs) / 1000;
  return [seconds, (await used() - before) / MiB];
}

async function start(system: System): Promise<void> {
  const { status, stderr } = await system.boot(["--quiet"]);
  if (status !== 0) throw new Error(`The boot failed: ${stderr}`);
}

/** The pages of the image behind the loop device (dd(1), oflag=nocache). */
async function dropCache({ image }: Disk): Promise<void> {
  await command([
    ...["dd", `of=${image}`, "oflag=nocache", "conv=notrunc,fdatasync"],
    ...["count=0", "status=none"],
  ]);
}

function median(numbers: number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}
