/**
 * Measures persistence.ts against the shell script that it replaces.
 *
 *     npm run bench [-- [--pairs N] [--scenes LIST] [--contenders LIST]
 *                       [--executable PATH]]
 *     npm run bench -- compression       see compression.ts
 *
 * All contenders take turns on the same loop devices and the same root, in a
 * mount namespace of their own, so that what disturbs one disturbs all. First
 * each scene is run once by each, and where they end must be the same place.
 * Prints a table of medians, writes dist/bench.json.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";
import { needPrograms, systemPath } from "../testing/programs.ts";
import {
  command,
  type Disk,
  type DiskSpec,
  GiB,
  header,
  MiB,
  projectFolder,
  type System,
  withSystem,
} from "../testing/system.ts";

/**
 * Who takes part, in the order of the table. `alone` is the executable with the
 * data disk alone: what it takes less, the other disks take.
 */
type Contender = "executable" | "script" | "shell" | "floor" | "alone";

/** A situation that is measured. */
interface Scene {
  /** Number of disks, the first of which is for the data. */
  disks: number;
  /** Disks that the first boot formats, 0 where there is none. */
  magic: number;
  /** What each contender runs. */
  commands: (system: System) => Partial<Record<Contender, string[]>>;
  /** The disks are made anew before each run. */
  anew?: boolean;
  /** Runs before the measurements. */
  prepare?: (system: System) => Promise<unknown>;
  /** The state after a run is no matter. */
  readOnly?: boolean;
}

/** Milliseconds of each run. */
type Times = Partial<Record<Contender, number[]>>;

const options = parseArgs(Deno.args, {
  string: ["pairs", "scenes", "contenders", "executable"],
});
if (options._[0] === "compression") {
  await import("./compression.ts");
  Deno.exit();
}
const pairs = Number(options.pairs ?? 15);
const executable = options.executable ?? `${projectFolder}dist/persistence`;
const bun = `${projectFolder}node_modules/.bin/bun`;
const script = [
  ...[Deno.execPath(), "run", "-A", "--config"],
  ...[`${projectFolder}deno.npm.json`, `${projectFolder}persistence.ts`],
];
const shell = ["/bin/sh", `${projectFolder}bench/persistence.sh`];
const floor = ["/bin/sh", `${projectFolder}bench/floor.sh`];
const emptyExecutable = `${projectFolder}dist/empty`;

/** What S11persistence gives, and what Deno needs. */
const environment = [
  ...["env", "-i", `PATH=${systemPath}`, "DENO_NO_UPDATE_CHECK=1"],
  ...["UV_THREADPOOL_SIZE=128", "BUN_JSC_useJIT=0"],
  `HOME=${Deno.env.get("HOME") ?? "/root"}`,
];

const dataDisk: DiskSpec = { sizeBytes: 4 * GiB };
const bystanderBytes = 128 * MiB;
const manyDisks = 128;

const scenes: Record<string, Scene> = {
  version: {
    disks: 1,
    magic: 0,
    readOnly: true,
    commands: () => ({
      executable: [executable, "--version"],
      script: [...script, "--version"],
      floor: [emptyExecutable],
    }),
  },
  status: {
    disks: 1,
    magic: 1,
    readOnly: true,
    prepare: (system) => run(system, [...shell, ...system.place()]),
    commands: (system) => ({
      executable: [executable, "--status", ...system.place()],
      script: [...script, "--status", ...system.place()],
    }),
  },
  volatile: {
    disks: 1,
    magic: 0,
    commands: (system) => boots(system, ["volatile", system.root]),
  },
  ...Object.fromEntries([1, 2, 8, 32, manyDisks].map((disks) => [
    `existing ${disks}`,
    {
      disks,
      magic: 1,
      commands: (system) => ({
        ...boots(system, ["existing", system.root, system.disks[0].path]),
        ...(disks === manyDisks && { alone: alone(system) }),
      }),
    } satisfies Scene,
  ])),
  "first single": {
    disks: 1,
    magic: 1,
    anew: true,
    commands: (system) =>
      boots(system, ["first", system.root, system.disks[0].path]),
  },
  "first RAID1": {
    disks: 2,
    magic: 2,
    anew: true,
    commands: (system) =>
      boots(system, [
        ...["first", system.root],
        ...system.disks.map(({ path }) => path),
      ]),
  },
};

/** What is to hold: the issue's targets, as the highest allowed ratio. */
const targets: Record<string, [Contender, number]> = {
  version: ["floor", 1.5],
  volatile: ["shell", 0.9],
  "existing 1": ["shell", 0.75],
  "existing 32": ["shell", 0.45],
  "existing 128": ["shell", 0.25],
  "first single": ["floor", 1.15],
  "first RAID1": ["floor", 1.15],
};

function boots(
  system: System,
  floorArgs: string[],
): Partial<Record<Contender, string[]>> {
  const args = ["--quiet", ...system.place()];
  return {
    executable: [executable, ...args],
    script: [...script, ...args],
    shell: [...shell, ...args],
    floor: [...floor, ...floorArgs],
  };
}

function alone({ root, disks }: System): string[] {
  const [{ path }] = disks;
  return [executable, "--quiet", "--root", root, "--devices", path];
}

/** The root has attributes that an overlay has to show. */
const rootScript = `
  chmod 0751 var
  chown 1:2 home
  setfattr -n user.bench -v kept home
  touch -d "2001-02-03 04:05:06.789 UTC" var home`;

// ---------------------------------------------------------------------------

needPrograms("getfattr", "mkfs.ext4", "partx", "sfdisk", "time");
await command([
  ...[bun, "build", "--compile", "--bytecode", "--format=esm"],
  ...[`${projectFolder}bench/empty.ts`, "--outfile", emptyExecutable],
]);

const wanted: string[] | undefined = options.scenes?.split(",");
const unknown = wanted?.find((name) => !(name in scenes));
if (unknown) throw new Error(`Cannot find a scene "${unknown}"`);
const chosen = Object.entries(scenes)
  .filter(([name]) => wanted?.includes(name) ?? true);
const results: Record<string, Result> = {};
for (const [name, scene] of chosen) {
  console.error(`${name}: ${pairs} runs of each`);
  results[name] = await measureScene(scene);
}
const report = {
  date: new Date().toISOString(),
  pairs,
  kernel: (await command(["uname", "-r"])).trim(),
  cpus: navigator.hardwareConcurrency,
  loadAverage: Deno.loadavg(),
  sizes: await readSizes(),
  scenes: results,
};
await Deno.writeTextFile(
  `${projectFolder}dist/bench.json`,
  JSON.stringify(report, null, 2) + "\n",
);
printTable();

interface Result {
  medianMs: Partial<Record<Contender, number>>;
  minimumMs: Partial<Record<Contender, number>>;
  /** Median of the executable's times by that of each other contender. */
  ratio: Partial<Record<Contender, number>>;
  peakMiB: Partial<Record<Contender, number>>;
  runsMs: Times;
}

async function measureScene(scene: Scene): Promise<Result> {
  return await withBenchSystem(scene, async (system) => {
    const commands = scene.commands(system);
    const contenders = (Object.keys(commands) as Contender[])
      .filter(takesPart);
    if (!scene.readOnly) await proveSameState(system, scene, commands);
    await renew(system, scene);
    await scene.prepare?.(system);
    const runsMs: Times = {};
    // The first round warms the caches up.
    for (let round = 0; round <= pairs; round++) {
      for (const contender of contenders) {
        if (!scene.readOnly) await renew(system, scene);
        const ms = await run(system, commands[contender]!);
        if (round > 0) (runsMs[contender] ??= []).push(ms);
      }
    }
    const peakMiB: Result["peakMiB"] = {};
    for (const contender of contenders) {
      if (!scene.readOnly) await renew(system, scene);
      peakMiB[contender] = await readPeak(system, commands[contender]!);
    }
    await renew(system, scene);
    const each = (value: (times: number[]) => number) =>
      Object.fromEntries(
        contenders.map((name) => [name, value(runsMs[name]!)]),
      );
    const medianMs = each(median);
    const ratio = Object.fromEntries(
      contenders.map((name) => [name, medianMs.executable / medianMs[name]]),
    );
    const minimumMs = each((times) => Math.min(...times));
    return { medianMs, minimumMs, ratio, peakMiB, runsMs };
  });
}

function takesPart(contender: Contender): boolean {
  return options.contenders?.split(",").includes(contender) ?? true;
}

function median(numbers: number[]): number {
  const sorted = numbers.toSorted((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] +
    sorted[middle]) / 2;
}

// ---------------------------------------------------------------------------
// The system: one data disk, the others with a GPT and an ext4.
// ---------------------------------------------------------------------------

async function withBenchSystem<T>(
  scene: Scene,
  use: (system: System) => Promise<T>,
): Promise<T> {
  const folder = await Deno.makeTempDir({ prefix: "persistence-bench-" });
  try {
    const template = `${folder}/bystander.img`;
    await makeBystander(template);
    const bystander: DiskSpec = {
      sizeBytes: bystanderBytes,
      contents: `dd if="${template}" of="$DISK" bs=64K conv=sparse,notrunc ` +
        `status=none`,
    };
    const disks: [DiskSpec, ...DiskSpec[]] = [
      scene.magic > 0 ? { ...dataDisk, contents: header } : bystander,
      ...Array.from(
        { length: scene.disks - 1 },
        (_, n) => n + 1 < scene.magic ? dataDisk : bystander,
      ),
    ];
    return await withSystem({ disks, root: rootScript }, async (system) => {
      try {
        await showPartitions(system.disks);
        if (scene.magic > 0 && !scene.anew) {
          await run(system, [...shell, ...system.place()]);
        }
        return await use(system);
      } finally {
        await reset(system);
      }
    });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function makeBystander(path: string): Promise<void> {
  await command([
    "sh",
    "-euc",
    `truncate -s ${bystanderBytes} "$1"
     echo 'start=1MiB, type=linux, name=other' |
       sfdisk --quiet --label gpt "$1"
     mkfs.ext4 -q -F -E offset=${MiB} "$1" ${bystanderBytes / 1024 - 2048}k`,
    "sh",
    path,
  ]);
}

/** As a kernel with a GPT parser does. */
async function showPartitions(disks: Disk[]): Promise<void> {
  for (const { path } of disks) {
    await command([
      "sh",
      "-c",
      'partx --add "$1" 2>/dev/null || :',
      "sh",
      path,
    ]);
  }
}

/** Ends the system's mounts and swap: as before the boot, with warm caches. */
async function reset(system: System): Promise<void> {
  const data = system.disks.slice(0, 2); // no scene has more for the data
  const disks = data.map(({ path }) => path).join(" ");
  await system.sh(`
    for disk in ${disks}; do
      grep -oE "^$disk(p[0-9]+)?[[:space:]]" /proc/swaps || :
    done | xargs -r swapoff
    for target in home var etc mnt/lightwhale-data run tmp; do
      if mountpoint -q $target; then umount -R $target; fi
    done
    if [ "$(findmnt -R -n . | wc -l)" -ne 1 ]; then
      echo "Mounts are left below $PWD" >&2
      exit 1
    fi
    mount -t tmpfs run run
    mount -t tmpfs tmp tmp
    for node in ${data.map(({ path }) => `${path}p2`).join(" ")}; do
      btrfs device scan --forget $node >/dev/null 2>&1 || :
    done`);
}

/** Resets, and brings a scene's disks to where they were before the boot. */
async function renew(system: System, scene: Scene): Promise<void> {
  await reset(system);
  if (!scene.anew) return;
  for (const { path } of system.disks.slice(0, scene.magic)) {
    await command(
      [
        "sh",
        "-euc",
        `partx --delete "$DISK"; blkdiscard -f "$DISK"; ${header}`,
      ],
      { DISK: path },
    ).catch(() =>
      command(["sh", "-euc", `blkdiscard -f "$DISK"; ${header}`], {
        DISK: path,
      })
    );
  }
}

// ---------------------------------------------------------------------------
// A run.
// ---------------------------------------------------------------------------

/** Milliseconds that a command takes, seen by a shell as init is one. */
async function run(
  system: System,
  line: string[],
): Promise<number> {
  const timer = `start=$EPOCHREALTIME
    "$@" </dev/null >/dev/null 2>"$0"
    status=$?
    end=$EPOCHREALTIME
    if [ $status -ne 0 ]; then cat "$0" >&2; exit $status; fi
    echo $((\${end/./} - \${start/./}))`;
  const errors = `${system.root}/../errors`;
  const microseconds = await system.sh(
    words([...environment, "bash", "-c", timer, errors, ...line]),
  );
  return Number(microseconds) / 1000;
}

/** Peak memory of a command or of its largest child. */
async function readPeak(system: System, line: string[]): Promise<number> {
  const file = `${system.root}/../peak`;
  const kilobytes = await system.sh(
    words([...environment, "/usr/bin/time", "-f%M", "-o", file, ...line]) +
      ` >/dev/null 2>&1; cat '${file}'`,
  );
  return Number(kilobytes) / 1024;
}

/** A command line for the shell. */
function words(line: string[]): string {
  return line.map((word) => `'${word.replaceAll("'", `'\\''`)}'`).join(" ");
}

// ---------------------------------------------------------------------------
// The proof: all end in the same state.
// ---------------------------------------------------------------------------

async function proveSameState(
  system: System,
  scene: Scene,
  commands: Partial<Record<Contender, string[]>>,
): Promise<void> {
  let first: string | undefined;
  let epoch: number | undefined;
  const all: Contender[] = ["shell", "executable", "script"];
  for (const contender of all.filter(takesPart)) {
    await renew(system, scene);
    await run(system, commands[contender]!);
    const { state, epoch: next } = await readState(system, scene);
    first ??= state;
    if (state !== first) {
      const files = [first, state].map((text, n) => {
        const path = `${projectFolder}dist/state-${["shell", contender][n]}`;
        Deno.writeTextFileSync(path, text);
        return path;
      });
      const { stdout } = await new Deno.Command("diff", { args: files })
        .output();
      throw new Error(
        `The ${contender} does not end in the shell script's state:\n` +
          new TextDecoder().decode(stdout),
      );
    }
    // Each takes the other's records over.
    if (epoch !== undefined && !scene.anew && next !== epoch + 1) {
      throw new Error(`The ${contender} made epoch ${next} of ${epoch}`);
    }
    epoch = next;
  }
}

/** All that a boot leaves behind, without what differs each time. */
async function readState(
  system: System,
  scene: Scene,
): Promise<{ state: string; epoch: number | undefined }> {
  const magic = system.disks.slice(0, scene.magic).map(({ path }) => path);
  // What a record has more than the shell script writes, as version 1.0 did.
  const more = "machine|seconds|lastSeen|hardware|mounts|settled";
  const all = await system.sh(`
    echo "# mounts"
    findmnt -R -r -n -o TARGET,SOURCE,FSTYPE,FSROOT,OPTIONS,PROPAGATION . |
      sort
    echo "# the roots of the overlays"
    stat -c '%n %a %u:%g' etc
    stat -c '%n %a %u:%g %y' var home
    getfattr -d -m - -e hex etc var home
    echo "# files"
    find mnt/lightwhale-data run/lightwhale/overlay/lower -maxdepth 5 \\
      -printf '%p %y %m %U:%G %l\\n' | sort
    find mnt/lightwhale-data -type f -exec sha256sum {} + | sort
    cat etc/docker/daemon.json
    for disk in ${magic.join(" ")}; do
      echo "# disk"
      grep -E "^$disk(p[0-9]+)?[[:space:]]" /proc/swaps |
        awk '{ print $1, $2, $3 }'
      head -c 27 $disk | od -c
      sfdisk --dump $disk | grep -v label-id
      for part in "$disk"p*; do
        blkid -p -o export -s LABEL -s TYPE -s PARTLABEL -s SIZE $part
      done
      dd if=$part bs=4K skip=14 count=2 status=none | tr -d '\\0' |
        grep fsid | sort -t : -k 4 -n | tail -n 1 |
        sed -E 's/,"(${more})":("[^"]*"|[0-9]+|\\{[^}]*\\}|\\[[^]]*\\])//g'
    done
    if [ "${magic.length}" -gt 0 ]; then
      btrfs subvolume list -a mnt/lightwhale-data | awk '{ print $NF }' |
        sort
      btrfs filesystem df mnt/lightwhale-data | cut -d : -f 1
    fi`);
  const report = JSON.parse(
    await system.sh("cat run/lightwhale/persistence.json"),
  );
  const { mode, exitStatus, uuid, devices, missing, degraded } = report;
  const status = { mode, exitStatus, uuid, devices, missing, degraded };
  const epochs = [...all.matchAll(/"epoch":(\d+)/g)].map(([, n]) => Number(n));
  return {
    state: normalise(
      `${all}# status file\n${Object.keys(report)}\n` +
        `${JSON.stringify(status)}\n`,
    ),
    epoch: epochs.length > 0 ? Math.max(...epochs) : undefined,
  };
}

/** Numbers UUIDs in the order of their appearance; drops counters. */
function normalise(text: string): string {
  const seen: string[] = [];
  const sortKeys = (json: string) =>
    JSON.stringify(Object.fromEntries(Object.entries(JSON.parse(json)).sort()));
  return text
    .replaceAll(/^\{"fsid".*\}$/gm, sortKeys) // a record
    .replaceAll(/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/gi, (uuid) => {
      const known = seen.indexOf(uuid.toLowerCase());
      if (known < 0) seen.push(uuid.toLowerCase());
      return `UUID${known < 0 ? seen.length - 1 : known}`;
    })
    .replaceAll(/"epoch":\d+/g, '"epoch":N')
    .replaceAll(/\bsubvolid=\d+/g, "subvolid=N");
}

// ---------------------------------------------------------------------------
// Results.
// ---------------------------------------------------------------------------

async function readSizes() {
  const bytes = async (path: string) => (await Deno.stat(path)).size;
  return {
    executableBytes: await bytes(executable),
    runtimeBytes: await bytes(bun),
    emptyExecutableBytes: await bytes(emptyExecutable),
  };
}

function printTable(): void {
  const contenders: Contender[] = ["executable", "script", "shell", "floor"];
  const rows = [[
    "medians in ms",
    ...contenders,
    "/ shell",
    "/ floor",
    "target",
    "peak MiB",
  ]];
  for (const [name, { medianMs, ratio, peakMiB }] of Object.entries(results)) {
    const number = (value: number | undefined, digits: number) =>
      value?.toFixed(digits) ?? "-";
    const [rival, limit] = targets[name] ?? [];
    const met = rival && ratio[rival]! <= limit! ? "met" : "MISSED";
    rows.push([
      name,
      ...contenders.map((contender) => number(medianMs[contender], 1)),
      number(ratio.shell, 2),
      number(ratio.floor, 2),
      rival ? `${limit} × ${rival}: ${met}` : "-",
      number(peakMiB.executable, 0),
    ]);
  }
  const widths = rows[0].map((_, column) =>
    Math.max(...rows.map((row) => row[column].length))
  );
  for (const row of rows) {
    console.log(
      row.map((cell, column) =>
        column === 0 ? cell.padEnd(widths[0]) : cell.padStart(widths[column])
      ).join("  "),
    );
  }
  const { executable: all, alone } = results[`existing ${manyDisks}`]?.runsMs ??
    {};
  if (all && alone) { // pair by pair, for the machine's speed drifts
    const each = median(all.map((ms, i) => ms - alone[i])) / (manyDisks - 1);
    console.log(`Each further disk: ${each.toFixed(2)} ms`);
  }
  const { executableBytes, runtimeBytes } = report.sizes;
  const more = (executableBytes - runtimeBytes) / MiB;
  console.log(
    `The executable: the runtime + ${more.toFixed(2)} MiB (target: 4)`,
  );
}
