/**
 * Systems to test on: real loop devices, a real read-only squashfs root, a
 * mount namespace of their own. Nothing is mocked, nothing is left behind.
 *
 * @example
 * ```ts
 * await withSystem({ disks: [{ sizeBytes: 3 * GiB, contents: header }] },
 *   async (system) => {
 *     const { status, report } = await system.boot();
 *   });
 * ```
 *
 * @module
 */
import type { Status } from "../persistence.ts";
import { needPrograms, type Program, systemPath } from "./programs.ts";

/** Bytes. */
export const MiB = 1024 ** 2;
/** Bytes. */
export const GiB = 1024 ** 3;

/** The magic header, as README.md spells it. */
export const magic = "lightwhale-please-format-me";

/** A disk's contents: the magic header, followed by nothing. */
export const header =
  `printf ${magic} | dd of="$DISK" conv=notrunc status=none`;

/** The folder of persistence.ts. */
export const projectFolder = new URL("..", import.meta.url).pathname;

/** The tool under test, by default the executable. */
export const tool: string[] =
  Deno.env.get("PERSISTENCE")?.split(" ").filter(Boolean) ??
    [`${projectFolder}dist/persistence`];

/** A disk before the test. */
export interface DiskSpec {
  sizeBytes: number;
  /** Logical sector size, 512 by default. */
  sectorBytes?: 512 | 4096;
  /** A shell script that fills it; `$DISK` is the loop device. */
  contents?: string;
}

/** A disk that is attached. */
export interface Disk {
  /** Such as `/dev/loop3`; changes with a reboot. */
  path: string;
  /** The image file behind it. */
  image: string;
  /** That of the file that was attached last. */
  inode?: number | null;
  sectorBytes: 512 | 4096;
}

/** What a command did. */
export interface Result {
  status: number;
  /** The signal that ended it, if one did. */
  signal: string | null;
  stdout: string;
  stderr: string;
}

/** What the boot sequence says about itself in `persistence.json`. */
export interface Report {
  mode: "persistent" | "volatile" | "fallback";
  reason: string;
  exitStatus: number;
  uuid: string | null;
  devices: string[];
  missing: number[];
  degraded: boolean;
  plan: string[];
  warnings: string[];
  errors: string[];
}

/** A run of the boot sequence. */
export interface Boot extends Result {
  report: Report;
}

/** How the tool is called. */
export interface RunOptions {
  /** The command to run in place of the tool. */
  tool?: string[];
  /** Where programs are looked for first. */
  path?: string;
  /** The file that gets the tool's process id before it runs. */
  pidFile?: string;
  /** Run with file descriptor 0 closed. */
  closeStdin?: boolean;
}

/** What becomes different with a reboot. */
export interface RebootOptions {
  root?: string;
  cmdline?: string;
  /** Disks that are not there any more. */
  without?: Disk[];
  /** What happens to the images while no disk is attached. */
  whileOff?: () => Promise<unknown>;
}

/** What a test can do with its system. */
export interface System {
  disks: Disk[];
  /** The root directory, as `--root` gets it. */
  root: string;
  /** Runs the boot sequence on the disks and reads its report. */
  boot(args?: string[], options?: RunOptions): Promise<Boot>;
  /** Runs the tool with these arguments alone. */
  run(args: string[], options?: RunOptions): Promise<Result>;
  /** The arguments that keep the tool to this system's root and disks. */
  place(): string[];
  /** Runs a shell script in the system's root; throws if it fails. */
  sh(script: string): Promise<string>;
  /** Ends the system as a reset does, and starts it anew with cold disks. */
  reboot(options?: RebootOptions): Promise<void>;
  /** Attaches a disk that a reboot left out, at this loop device if named. */
  attach(disk: Disk, path?: string): Promise<void>;
  /** Reboots with the disks as they were when the test began. */
  renew(): Promise<void>;
  /** Waits until no process of the system is left. */
  settle(): Promise<void>;
  /** Attaches one more disk to the running system. */
  plug(spec: DiskSpec): Promise<Disk>;
  /** The whole disk's checksum. */
  checksum(disk: Disk): Promise<string>;
}

/** The parts of a system. */
export interface SystemOptions {
  /** At least one, or the tool would look at the machine's own disks. */
  disks: [DiskSpec, ...DiskSpec[]];
  /** A shell script that runs in the root's tree before it is packed. */
  root?: string;
  /** Takes the place of the kernel's command line. */
  cmdline?: string;
}

/**
 * Registers a test with a system of its own. Without root there are no loop
 * devices: it is then shown as ignored.
 *
 * @param name The situation.
 * @param options The system, and which programs the test needs besides.
 * @param test The test.
 */
export function onDisks(
  name: string,
  { needs = [], ...options }: SystemOptions & { needs?: Program[] },
  test: (system: System) => Promise<void>,
): void {
  Deno.test({
    name,
    ignore: Deno.uid() !== 0,
    fn() {
      needPrograms("mkfs.btrfs", "mkfs.ext4", ...needs);
      return withSystem(options, test);
    },
  });
}

/**
 * Makes a system, lets a test use it, and takes it apart whatever happens.
 *
 * @param options Its disks and its root.
 * @param use The test.
 * @returns What the test returned.
 */
export async function withSystem<T>(
  options: SystemOptions,
  use: (system: System) => Promise<T>,
): Promise<T> {
  needPrograms("btrfs", "sfdisk", "partx", "losetup", "nsenter", "mksquashfs");
  const folder = await Deno.makeTempDir({ prefix: "persistence-test-" });
  const disks: Disk[] = [];
  const root = `${folder}/root`;
  let namespace: Namespace | undefined;

  async function start(
    rootScript: string,
    cmdline: string | undefined,
    without: Disk[] = [],
  ) {
    await packRoot(folder, rootScript);
    await attachInOrder(disks.filter((disk) => !without.includes(disk)));
    namespace = await openNamespace();
    await inNamespace(
      `mount -t squashfs -o loop,ro "$1/root.squashfs" "$1/root"
       mount -t tmpfs run "$1/root/run"
       mount -t tmpfs tmp "$1/root/tmp"`,
      folder,
    );
    if (cmdline !== undefined) {
      await Deno.writeTextFile(`${folder}/cmdline`, `${cmdline}\n`);
      await inNamespace('mount --bind "$1/cmdline" /proc/cmdline', folder);
    }
  }

  async function stop() {
    const holder = namespace;
    namespace = undefined;
    // Swap belongs to the machine, not to the namespace.
    for (const { path } of disks.filter(({ path }) => path)) {
      for (const swap of await swapsOn(path)) await command(["swapoff", swap]);
    }
    if (holder) await holder.close();
    for (const disk of disks) await detach(disk);
  }

  function inNamespace(script: string, ...args: string[]) {
    if (!namespace) throw new Error("Cannot use a system that is not running");
    return command([
      ...namespace.enter,
      ...["sh", "-euc", script, "sh", ...args],
    ]);
  }

  async function run(args: string[], options: RunOptions = {}) {
    if (!namespace) throw new Error("Cannot use a system that is not running");
    const env = {
      PATH: options.path ?? systemPath,
      // For the Deno of the script; the executable needs none of them.
      HOME: Deno.env.get("HOME") ?? "/root",
      DENO_NO_UPDATE_CHECK: "1",
    };
    return await output([
      ...namespace.enter,
      ...["env", "-i", ...Object.entries(env).map(([k, v]) => `${k}=${v}`)],
      ...[
        "/bin/sh",
        "-c",
        `echo $$ > "$0"; exec "$@" ${options.closeStdin ? "<&-" : ""}`,
      ],
      options.pidFile ?? "/dev/null",
      ...(options.tool ?? tool),
      ...args,
    ]);
  }

  function place() {
    const devices = disks.map(({ path }) => path).filter(Boolean);
    return ["--root", root, "--devices", devices.join()];
  }

  async function plug(spec: DiskSpec) {
    const image = `${folder}/disk${disks.length}.img`;
    const disk: Disk = {
      path: "",
      image,
      sectorBytes: spec.sectorBytes ?? 512,
    };
    disks.push(disk);
    await fill(disk, spec);
    return disk;
  }

  const system: System = {
    disks,
    root,
    run,
    place,
    async boot(args = [], runOptions = {}) {
      const result = await run([...place(), ...args], runOptions);
      const report = await system.sh(
        'cat run/lightwhale/persistence.json 2>/dev/null || echo "{}"',
      );
      return { ...result, report: JSON.parse(report) as Report };
    },
    sh: (script) => inNamespace(`cd "$1"; ${script}`, root),
    async reboot(next = {}) {
      await stop();
      await next.whileOff?.();
      await start(
        next.root ?? options.root ?? "",
        next.cmdline ?? options.cmdline,
        next.without,
      );
    },
    attach,
    async renew() {
      await stop();
      for (const [n, spec] of options.disks.entries()) {
        await fill(disks[n], spec);
        await detach(disks[n]);
      }
      await start(options.root ?? "", options.cmdline);
    },
    async settle() {
      await namespace?.settle();
    },
    plug,
    async checksum({ path, image }) {
      await command(["blockdev", "--flushbufs", path]);
      // Reading zeros would take most of the time. The file's own holes come
      // and go without a change of content; those of a copy do not.
      return await command([
        "sh",
        "-euc",
        `sync "$1"; cp --sparse=always "$1" "$1.copy"
         tar --sparse --mtime=@0 -cf - "$1.copy" 2>/dev/null | sha256sum
         rm "$1.copy"`,
        "sh",
        image,
      ]);
    },
  };

  try {
    await Deno.mkdir(root);
    for (const spec of options.disks) await plug(spec);
    for (const disk of disks) await detach(disk);
    await start(options.root ?? "", options.cmdline);
    return await use(system);
  } finally {
    await stop();
    await Deno.remove(folder, { recursive: true });
  }
}

/** Whether a disk begins with the magic header. */
export async function isMarked({ path }: Disk): Promise<boolean> {
  return await command(["head", "-c", String(magic.length), path]) === magic;
}

/** Writes the magic header, as a person without the tool does. */
export async function mark({ path }: Disk): Promise<void> {
  await command(["sh", "-euc", header], { DISK: path });
  await command(["blockdev", "--flushbufs", path]);
}

/**
 * Runs a command and waits for it.
 *
 * @param line The program and its arguments.
 * @param env Variables besides this process' own.
 * @returns What it printed on stdout.
 * @throws {Error} If it fails.
 */
export async function command(
  line: string[],
  env: Record<string, string> = {},
): Promise<string> {
  const { status, stdout, stderr } = await output(line, env);
  if (status !== 0) {
    throw new Error(
      `\`${line.join(" ")}\` failed with status ${status}: ${stdout}${stderr}`,
    );
  }
  return stdout;
}

async function output(
  [program, ...args]: string[],
  env: Record<string, string> = {},
): Promise<Result> {
  const { code, signal, stdout, stderr } = await new Deno.Command(program, {
    args,
    // A private home of programs: the caller's PATH is nobody's business.
    env: { PATH: systemPath, LC_ALL: "C.UTF-8", ...env },
    stdin: "null",
    signal: AbortSignal.timeout(180_000), // a test must not hang
  }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return {
    status: code,
    signal,
    stdout: text(stdout),
    stderr: text(stderr),
  };
}

/** A mount namespace that lives until it is closed. */
interface Namespace {
  /** The words before a command that put it there. */
  enter: string[];
  /** Waits until all that runs in it has ended. */
  settle(): Promise<void>;
  close(): Promise<void>;
}

async function openNamespace(): Promise<Namespace> {
  const holder = new Deno.Command("unshare", {
    args: ["--mount", "--propagation", "private", "sh", "-c", "echo; exec cat"],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  const reader = holder.stdout.getReader();
  const { done } = await reader.read(); // else nsenter might come too early
  await reader.cancel();
  if (done) throw new Error("Cannot make a mount namespace");
  const file = `/proc/${holder.pid}/ns/mnt`;
  const id = await Deno.readLink(file);
  // As long as this is open, no other namespace can get the same id.
  const pin = await Deno.open(file);
  return {
    enter: ["nsenter", `--mount=${file}`, "--"],
    settle: () => waitUntilEmpty(id, { besides: holder.pid }),
    async close() {
      await holder.stdin.close();
      await holder.status;
      await waitUntilEmpty(id, { endWith: "SIGKILL" });
      pin.close(); // and the mounts are gone
    },
  };
}

async function waitUntilEmpty(
  namespace: string,
  { besides, endWith }: { besides?: number; endWith?: Deno.Signal },
): Promise<void> {
  let emptyScans = 0;
  const giveUpAt = performance.now() + 180_000; // long work on a slow machine
  while (performance.now() < giveUpAt) {
    const all = await processesIn(namespace);
    const pids = all.filter((pid) => pid !== besides);
    // One that forks and ends during a scan is not seen, nor is its child.
    emptyScans = pids.length === 0 ? emptyScans + 1 : 0;
    if (emptyScans === 3) return;
    if (endWith) pids.forEach((pid) => signalProcess(pid, endWith));
    await sleep(20);
  }
  throw new Error(`The processes in ${namespace} do not end`);
}

async function processesIn(namespace: string): Promise<number[]> {
  const pids: number[] = [];
  for await (const { name } of Deno.readDir("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    const link = await Deno.readLink(`/proc/${name}/ns/mnt`).catch(() => "");
    if (link === namespace) pids.push(Number(name));
  }
  return pids;
}

function signalProcess(pid: number, signal: Deno.Signal): void {
  try {
    Deno.kill(pid, signal);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error; // it has ended
  }
}

/** Makes the disk's image anew, leaves it attached. */
async function fill(disk: Disk, spec: DiskSpec): Promise<void> {
  await Deno.writeFile(disk.image, new Uint8Array());
  await Deno.truncate(disk.image, spec.sizeBytes);
  await attach(disk);
  if (spec.contents) {
    await runOnDisk(spec.contents, disk.path);
  }
}

/**
 * Runs a script with `$DISK`. What it mounts and unmounts nobody else has: a
 * mount namespace that is made meanwhile would keep the filesystem in use.
 */
export async function runOnDisk(script: string, disk: string): Promise<string> {
  const line = ["unshare", "--mount", "sh", "-euc", script];
  const output = await command(line, { DISK: disk });
  await command(["blockdev", "--flushbufs", disk]);
  return output;
}

async function attach(disk: Disk, path = "--find"): Promise<void> {
  disk.path = (await command([
    ...["losetup", "--show", "--sector-size", String(disk.sectorBytes)],
    ...[path, disk.image],
  ])).trim();
  disk.inode = (await Deno.stat(disk.image)).ino;
  // The kernel keeps the partitions of a loop device when that is detached, and
  // no other one can be added over them.
  if ((await partitionsOf(disk.path)).length > 0) {
    await command(["partx", "--delete", disk.path]);
  }
}

/**
 * Attaches disks so that their names are in their order, as the tool's devids
 * then are: another test may free a lower number at any time.
 */
async function attachInOrder(disks: Disk[]): Promise<void> {
  const tooLow: Disk[] = [];
  let last = -1;
  for (const disk of disks) {
    for (;;) {
      await attach(disk);
      const number = Number(disk.path.slice("/dev/loop".length));
      if (number > last) {
        last = number;
        break;
      }
      tooLow.push({ ...disk });
    }
  }
  for (const disk of tooLow) await detach(disk);
}

/** Takes the disk away, with its partitions and what the kernel knows of it. */
async function detach(disk: Disk): Promise<void> {
  const { path } = disk;
  if (!path) return;
  // A test that has detached it itself has left the number to anybody else. Its
  // path may not be seen from here: it was attached in another mount namespace.
  const isOurs = async () => {
    const columns = ["--noheadings", "--raw", "--output", "BACK-INO"];
    const { stdout } = await output(["losetup", ...columns, path]);
    return stdout.trim() === `${disk.inode}`;
  };
  if (!await isOurs()) {
    disk.path = "";
    return;
  }
  const partitions = await partitionsOf(path);
  for (const node of [path, ...partitions]) {
    // Fails where there is no Btrfs, which is fine.
    await output(["btrfs", "device", "scan", "--forget", node]);
  }
  // The kernel may still be letting go of a file system.
  for (let tries = 0; (await partitionsOf(path)).length > 0; tries++) {
    const { stderr } = await output(["partx", "--delete", path]);
    if (tries === 600) throw new Error(`Cannot free ${path}: ${stderr}`);
    if (tries > 0) await sleep(50);
  }
  // The next user of the loop device would find it as a test left it.
  await command(["blockdev", "--setrw", path]);
  await command(["losetup", "--detach", path]);
  for (let tries = 0; await isOurs(); tries++) {
    if (tries === 600) throw new Error(`Cannot detach ${path}: it is in use`);
    await sleep(50);
  }
  disk.path = "";
}

async function partitionsOf(path: string): Promise<string[]> {
  const name = path.slice("/dev/".length);
  const entries = await Array.fromAsync(Deno.readDir(`/sys/block/${name}`));
  return entries.filter((entry) => entry.name.startsWith(`${name}p`))
    .map((entry) => `/dev/${entry.name}`);
}

async function swapsOn(path: string): Promise<string[]> {
  const swaps = await Deno.readTextFile("/proc/swaps");
  const nodes = [path, ...await partitionsOf(path)];
  return nodes.filter((node) => swaps.includes(`${node} `));
}

/** Makes the squashfs that the system's root is. */
async function packRoot(folder: string, script: string): Promise<void> {
  const tree = `${folder}/tree`;
  await Deno.mkdir(tree);
  await command([
    "sh",
    "-euc",
    `umask 022
     cd "$1"
     mkdir -p etc/init.d var/log home mnt/lightwhale-data run tmp
     chmod 1777 tmp
     echo lightwhale > etc/hostname
     echo "a log" > var/log/messages
     ${script}`,
    "sh",
    tree,
  ]);
  const image = `${folder}/root.squashfs`;
  await Deno.remove(image).catch(() => {}); // there is none the first time
  await command([
    ...["mksquashfs", tree, image, "-quiet", "-no-progress", "-comp", "lzo"],
  ]);
  await Deno.remove(tree, { recursive: true });
}

export async function statusOf(system: System): Promise<Status> {
  const args = [...system.place(), "--status", "--json"];
  const { stdout, stderr } = await system.run(args);
  if (!stdout.startsWith("{")) throw new Error(`No status: ${stderr}`);
  return JSON.parse(stdout);
}

/** Waits for the work in the background, while other processes may go on. */
export async function idle(system: System): Promise<void> {
  const giveUpAt = performance.now() + 300_000;
  while (performance.now() < giveUpAt) {
    const working = await system.sh(
      'pgrep -f -- "--maintain --root $PWD" || test $? = 1',
    );
    if (!working && (await statusOf(system)).work.length === 0) return;
    await sleep(100);
  }
  throw new Error("The work in the background does not end");
}

/** Lets no work begin in the background before the next boot. */
export async function holdWork(system: System): Promise<void> {
  await system.sh(
    `exec 9>>run/lightwhale/maintenance.lock; flock 9
     sleep 1000 >/dev/null 2>&1 &`,
  );
}

/** Mounts the state of the disks that are there, as a person would, to read. */
export async function mountState({ disks, sh }: System): Promise<void> {
  await sh(
    `set --
     for disk in ${disks.map(({ path }) => path).join(" ")}; do
       sfdisk --dump "$disk" >/dev/null 2>&1 && partx --update "$disk"
       for node in "$disk" "$disk"p*; do
         test -b "$node" || continue
         case $(blkid -p -s LABEL -o value "$node") in
           lightwhale-data) set -- "$@" "$node" ;;
         esac
       done
     done
     options=ro,degraded,subvol=/@lightwhale-state
     for node; do options=$options,device=$node; done
     mount -t btrfs -o "$options" "$1" mnt/lightwhale-data`,
  );
}

/** Takes a disk away, whose loop device stays there without it. */
export async function takeAway(
  system: System,
  disk: Disk,
  options: RebootOptions = {},
): Promise<void> {
  await system.reboot({ ...options, without: [disk] });
  await system.attach(disk, farPlace);
  await command(["losetup", "--detach", farPlace]);
  disk.path = "";
}

/** Brings that disk so long after a boot has begun. */
export async function bringLate(
  system: System,
  disk: Disk,
  ms: number,
): Promise<void> {
  await system.sh("until [ -e run/lightwhale/lock ]; do sleep 0.1; done");
  await sleep(ms);
  await system.attach(disk, farPlace);
}

/**
 * A loop device far from where others take theirs from, so that it stays free
 * while nothing is attached to it.
 */
export const farPlace = `/dev/loop${1000 + Deno.pid % 100_000}`;

export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Profiles of data, metadata and system chunks: `raid1 raid1 single+raid1`. */
export async function profiles(system: System): Promise<string> {
  const found = await system.sh("btrfs filesystem df mnt/lightwhale-data");
  return ["Data", "Metadata", "System"].map((type) =>
    [...found.matchAll(new RegExp(`^${type}, ([^:]+):`, "gm"))]
      .map(([, profile]) => profile.toLowerCase()).sort().join("+")
  ).join(" ");
}
