/**
 * A small virtual machine that boots persistence.ts where it lives: a kernel, a
 * read-only squashfs root, BusyBox init, S11persistence, no udev.
 *
 * ```ts
 * const disk = makeDisk("/tmp/a.img", { sizeMiB: 3000, magic: true });
 * const boot = await bootVm({ disks: [{ file: disk, bus: "nvme" }], check: "mount" });
 * console.log(boot.checkOutput, boot.s11Ms);
 * ```
 *
 * Everything is emulated (TCG), so that it runs on any build machine.
 */
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import {
  type Access,
  type Cut,
  type Received,
  serveDisks,
  type Trouble,
} from "./recorded_disk.ts";

const here = fileURLToPath(new URL(".", import.meta.url));
const cache = `${here}cache`;

/** How a disk is attached. SATA, NVMe, virtio and SD cannot be pulled. */
export type Bus =
  | "virtio"
  | "scsi"
  | "sata"
  | "nvme"
  | "usb"
  | "uas"
  | "sd";

/** One disk of the machine. */
export interface VmDisk {
  /** The image file. */
  file: string;
  /** Default: virtio. */
  bus?: Bus;
  /** Default: 512. */
  sectorBytes?: 512 | 4096;
  /** What the hardware is called; "": nothing; default: `disk` and its index. */
  serial?: string;
  /** World wide name, only on scsi, uas and sata; as JSON keeps it: `6e18`. */
  wwn?: number;
  /** Another disk of the machine has the same file: one disk on two paths. */
  shared?: boolean;
  /** Not there until `vm.plug()`; only on scsi, usb and uas. */
  late?: boolean;
  /** Remember each write; needed on every disk that a cut is to count. */
  recorded?: boolean;
  /** The machine can only read it. */
  readOnly?: boolean;
  /** Each of these accesses fails; with a sector, only those that touch it. */
  fails?: { io: "read" | "write" | "flush"; sector?: number };
  /** Asked at each access, as of a recorded disk: what goes wrong with it. */
  trouble?: (access: Access) => Trouble | undefined;
}

/** What is to be booted. */
export interface BootOptions {
  /** Default: none. */
  disks?: VmDisk[];
  /** A shell script that runs before S11persistence and must succeed. */
  before?: string;
  /** A shell script that runs as root after init. Without it: no power off. */
  check?: string;
  /** The system image; default: the cached one with dist/persistence. */
  image?: string;
  /** Added to the kernel command line. */
  append?: string;
  /** What the firmware calls the machine (DMI's product UUID). */
  uuid?: string;
  /** Default: 512. */
  memoryMiB?: number;
  /** Default: Nehalem, the oldest that is promised. */
  cpu?: string;
  /** Default: 300 s, for machines that have much else to do. */
  timeoutMs?: number;
  /** When and how the power of the recorded disks goes. */
  cut?: Cut;
  /** Kill the machine after the check instead of shutting it down. */
  pullThePlug?: boolean;
  /**
   * What to do when the system says `@NAME …` on the second serial port. It
   * does so at "start S11persistence", "end S11persistence …" and "check"; a
   * check can say more: `echo "@pull 1"`.
   */
  on?: Record<string, (vm: RunningVm, words: string[]) => void | Promise<void>>;
}

/** A machine while it runs. */
export interface RunningVm {
  /** All that the recorded disks have received so far. */
  received: Received[];
  /** Send a command of QEMU's machine protocol and await its result. */
  qmp(command: string, args?: Record<string, unknown>): Promise<unknown>;
  /** Attach the disk with this index, which was declared `late`. */
  plug(disk: number): Promise<void>;
  /** Take the disk with this index away (scsi, usb and uas). */
  pull(disk: number): Promise<void>;
  /** Wait until the console says this; false when it ended without. */
  says(text: RegExp): Promise<boolean>;
  /** Let this disk read and write no more than so much (scsi, usb and uas). */
  throttle(disk: number, bytesPerSecond: number): Promise<void>;
  /** Cut the power now. */
  kill(): void;
}

/** What a boot did. */
export interface Boot {
  /** Exit status of the check; null when the machine did not get there. */
  checkStatus: number | null;
  /** What the check wrote. */
  checkOutput: string;
  /** What the kernel and the init scripts wrote. */
  console: string;
  /** How long S11persistence took; null when it did not end. */
  s11Ms: number | null;
  /** Exit status of S11persistence. */
  s11Status: number | null;
  /** All that the recorded disks received. */
  received: Received[];
  /** The machine was killed at the instant of `cut`. */
  wasCut: boolean;
}

/** The machine did not get to its init scripts. */
class NeverStarted extends Error {}

/** Ten times what it takes. */
const START_TIMEOUT_MS = 100_000;

/**
 * Boot the machine, run the check in it, power it off.
 *
 * Under load QEMU was seen to hang before the kernel had said anything. If it
 * does not even get to its init scripts, nothing that is tested has run and no
 * disk was written: it is started once more, and that is said.
 *
 * @throws When the machine neither powers off nor is cut within the timeout.
 */
export async function bootVm(options: BootOptions): Promise<Boot> {
  try {
    return await bootOnce(options);
  } catch (error) {
    if (!(error instanceof NeverStarted)) throw error;
    console.log(`${error.message}: it is started once more`);
    return await bootOnce(options);
  }
}

async function bootOnce(options: BootOptions): Promise<Boot> {
  const { disks = [], on = {}, cut, timeoutMs = 300_000 } = options;
  const image = options.image ?? systemImage();
  const dir = Deno.makeTempDirSync({ prefix: "persistence-vm-" });
  const boot: Boot = {
    checkStatus: null,
    checkOutput: "",
    console: "",
    s11Ms: null,
    s11Status: null,
    received: [],
    wasCut: false,
  };
  let timedOut = false;
  let beforeStatus = "0";
  let started = false;
  let ended = false;
  let qemu: Deno.ChildProcess | undefined;
  const kill = () => {
    try {
      qemu?.kill("SIGKILL");
    } catch {
      // It has ended by itself meanwhile.
    }
  };

  const sockets = disks.map((_, i) => `${dir}/disk${i}`);
  const recorded = serveDisks(
    disks.flatMap(({ file, recorded, trouble }, i) =>
      recorded || trouble ? [{ file, socket: sockets[i], trouble }] : []
    ),
    {
      cut,
      onCut() {
        boot.wasCut = true;
        kill();
      },
    },
  );

  try {
    const scripts = (["before", "check"] as const).flatMap((name) => {
      const { [name]: script } = options;
      if (script === undefined) return [];
      Deno.writeTextFileSync(`${dir}/${name}`, script);
      return ["-fw_cfg", `name=opt/vm/${name},file=${dir}/${name}`];
    });
    qemu = new Deno.Command("qemu-system-x86_64", {
      args: [
        ...machineArguments({ ...options, image, sockets }),
        ...["-no-reboot", "-serial", `file:${dir}/console`],
        ...["-serial", "stdio", "-qmp", `unix:${dir}/qmp,server=on,wait=off`],
        ...scripts,
      ],
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const timer = setTimeout(() => {
      timedOut = true;
      kill();
    }, timeoutMs);
    const startTimer = setTimeout(() => started || kill(), START_TIMEOUT_MS);
    const errors = new Response(qemu.stderr).text();
    const qmp = openQmp(`${dir}/qmp`);
    const vm: RunningVm = {
      received: recorded.received,
      qmp: qmp.execute,
      async plug(i) {
        await qmp.execute("device_add", deviceProperties(disks[i], i));
      },
      async pull(i) {
        await qmp.execute("device_del", { id: `disk${i}` });
      },
      async says(text) {
        const isSaid = () => text.test(readConsole(`${dir}/console`));
        while (!ended && !isSaid()) {
          await new Promise((resolve) => setTimeout(resolve, 100));
        }
        return isSaid();
      },
      async throttle(i, bps) {
        const others = {
          bps_rd: 0,
          bps_wr: 0,
          iops: 0,
          iops_rd: 0,
          iops_wr: 0,
        };
        const limits = { id: `disk${i}`, bps, ...others };
        await qmp.execute("block_set_io_throttle", limits);
      },
      kill,
    };

    const handling: (void | Promise<void>)[] = [];
    await readLines(qemu.stdout, (line) => {
      const words = line.split(" ");
      started ||= line.startsWith("@start ");
      if (line.startsWith("@end S11persistence ")) {
        [boot.s11Status, boot.s11Ms] = words.slice(2).map(Number);
      }
      if (line.startsWith("@end S05before ")) beforeStatus = words[2];
      if (line.startsWith("@status ")) {
        boot.checkStatus = Number(words[1]);
        if (options.pullThePlug) kill();
      } else if (line.startsWith("@")) {
        const name = Object.keys(on).find((name) =>
          `${line} `.startsWith(`@${name} `)
        );
        if (name) handling.push(on[name](vm, words));
      } else {
        boot.checkOutput += `${line}\n`;
      }
    });
    ended = true;
    await Promise.all(handling);
    await qemu.status;
    clearTimeout(timer);
    clearTimeout(startTimer);
    await qmp.close();
    boot.console = readConsole(`${dir}/console`);
    const problem = (await errors).trim();
    if (!started && !problem && !boot.wasCut) {
      throw new NeverStarted(
        `The machine did not get to its init scripts in ` +
          `${START_TIMEOUT_MS} ms: ${boot.console}`,
      );
    }
    if (timedOut) {
      throw new Error(
        `The machine did not end within ${timeoutMs} ms:\n${boot.console}\n${boot.checkOutput}`,
      );
    }
    if (problem && !boot.wasCut && boot.checkStatus === null) {
      throw new Error(`QEMU failed: ${problem}`);
    }
    if (beforeStatus !== "0") {
      throw new Error(`The script "before" failed:\n${boot.console}`);
    }
  } finally {
    kill();
    await recorded.close();
    Deno.removeSync(dir, { recursive: true });
  }
  boot.received = recorded.received;
  return boot;
}

/**
 * QEMU's arguments for a machine, without its serial ports.
 *
 * @param options The machine; `sockets` are those of its recorded disks.
 */
export function machineArguments(
  options: BootOptions & { image: string; sockets?: string[] },
): string[] {
  const { disks = [], uuid, memoryMiB = 512, cpu = "Nehalem" } = options;
  const { append = "" } = options;
  const has = (...buses: Bus[]) =>
    disks.some(({ bus = "virtio" }) => buses.includes(bus));
  // A magic-named disk with the system on it needs no other system disk.
  const ownRoot = append.includes("vm.root=");
  return [
    ...["-accel", "tcg,thread=multi", "-smp", "2", "-cpu", cpu],
    // qboot starts the kernel by its PVH entry, in no time.
    ...["-M", "q35", "-bios", "qboot.rom", "-m", `${memoryMiB}`],
    ...["-no-user-config", "-nodefaults", "-display", "none"],
    ...(uuid ? ["-uuid", uuid] : []),
    ...["-kernel", `${cache}/base/vmlinux`],
    ...["-initrd", `${cache}/base/initramfs.cpio`],
    "-append",
    `console=ttyS0 quiet panic=-1 mitigations=off ${append}`.trim(),
    // Without entropy libuuid waits a second for each UUID that it makes.
    ...["-device", "virtio-rng-pci"],
    ...(has("scsi") ? ["-device", "virtio-scsi-pci,id=scsi"] : []),
    ...(has("usb", "uas") ? ["-device", "qemu-xhci,id=usb"] : []),
    ...disks.flatMap((disk, i) => [
      "-blockdev",
      JSON.stringify(blockdev(disk, i, options.sockets)),
      ...(disk.bus === "uas"
        ? ["-device", `usb-uas,id=uas${i},bus=usb.0`]
        : []),
      ...(disk.bus === "sd" ? ["-device", `sdhci-pci,id=sd${i}`] : []),
      ...(disk.late
        ? []
        : ["-device", JSON.stringify(deviceProperties(disk, i))]),
    ]),
    // The last slot, so that the disks are vda, vdb, … whatever else is there.
    ...(ownRoot ? [] : [
      "-blockdev",
      `driver=file,node-name=system,read-only=on,filename=${options.image}`,
      "-device",
      "virtio-blk-pci,addr=1e,drive=system,serial=system",
    ]),
  ];
}

function blockdev(disk: VmDisk, i: number, sockets: string[] = []) {
  const common = { "node-name": `node${i}`, "read-only": !!disk.readOnly };
  if (disk.recorded || disk.trouble) {
    return {
      ...common,
      driver: "nbd",
      server: { type: "unix", path: sockets[i] },
    };
  }
  // no-flush: the host does not lose power; the guest's flushes need not wait.
  const cache = { "no-flush": true };
  const image = {
    driver: "raw",
    file: {
      driver: "file",
      filename: disk.file,
      "read-only": !!disk.readOnly,
    },
    cache,
  };
  if (!disk.fails) return { ...common, ...image };
  const { io, ...where } = disk.fails;
  const error = { event: "none", iotype: io, errno: 5, ...where };
  return { ...common, driver: "blkdebug", image, "inject-error": [error] };
}

function deviceProperties(disk: VmDisk, i: number): Record<string, unknown> {
  const sectors = disk.sectorBytes
    ? {
      logical_block_size: disk.sectorBytes,
      physical_block_size: disk.sectorBytes,
    }
    : {};
  // A full disk is the machine's trouble, not a reason for QEMU to stop it.
  const errors = disk.trouble ? { werror: "report", rerror: "report" } : {};
  const serial = disk.serial ?? `disk${i}`;
  const device = {
    id: `disk${i}`,
    drive: `node${i}`,
    ...(serial ? { serial } : {}),
    ...(disk.wwn ? { wwn: disk.wwn } : {}),
    ...(disk.shared ? { "share-rw": true } : {}),
    ...sectors,
    ...errors,
  };
  switch (disk.bus ?? "virtio") {
    case "virtio":
      return { driver: "virtio-blk-pci", ...device };
    case "scsi":
      return { driver: "scsi-hd", bus: "scsi.0", ...device };
    case "sata":
      return { driver: "ide-hd", bus: `ide.${i}`, ...device };
    case "nvme":
      return { driver: "nvme", ...device };
    case "usb":
      return { driver: "usb-storage", bus: "usb.0", ...device };
    case "uas":
      return { driver: "scsi-hd", bus: `uas${i}.0`, ...device };
    case "sd":
      return { driver: "sd-card", id: device.id, drive: device.drive };
  }
}

/**
 * The system image, built only when something that goes into it has changed.
 *
 * @param options `name` is the cache's name for it, `executable` the tool
 * (default: what PERSISTENCE in the environment names, or dist/persistence),
 * `changes` a folder that is laid over the system; a file `NAME.removed` in it
 * takes NAME away.
 * @returns The path of the squashfs.
 */
export function systemImage(
  options: { name?: string; executable?: string; changes?: string } = {},
): string {
  const { name = "system", changes = "" } = options;
  const executable = options.executable ?? Deno.env.get("PERSISTENCE") ??
    `${here}../dist/persistence`;

  Deno.mkdirSync(cache, { recursive: true });
  using lock = Deno.openSync(`${cache}/lock`, { create: true, write: true });
  lock.lockSync(true);

  const recipe = [`${here}build.sh`, `${here}init`];
  const base = hashOf(recipe);
  if (readIfThere(`${cache}/base.hash`) !== base) {
    build("base", cache);
    Deno.writeTextFileSync(`${cache}/base.hash`, base);
  }
  const scripts = [`${here}../S11persistence`, `${here}../profile.d`];
  const parts = [`${here}system`, ...scripts, executable];
  const hash = hashOf([...recipe, ...parts, ...(changes ? [changes] : [])]);
  // The hash in the name: another run may be about to boot its own image.
  const image = `${cache}/${name}-${hash.slice(0, 16)}.squashfs`;
  if (!existsSync(image)) build("system", cache, executable, changes, image);
  const now = new Date();
  Deno.utimeSync(image, now, now);
  removeOldImages();
  return image;
}

function build(...args: string[]): void {
  try {
    execFileSync("sh", [`${here}build.sh`, ...args], { stdio: "pipe" });
  } catch (error) {
    const { stderr } = error as { stderr?: Uint8Array };
    const text = new TextDecoder().decode(stderr ?? new Uint8Array());
    throw new Error(`Cannot build ${args[0]}: ${text || error}`);
  }
}

/** Keep the images that were used last; each holds the 110 MB executable. */
function removeOldImages(): void {
  const images = [...Deno.readDirSync(cache)]
    .filter(({ name }) => name.endsWith(".squashfs"))
    .map(({ name }) => `${cache}/${name}`)
    .map((path) => ({ path, usedAt: Deno.statSync(path).mtime! }))
    .sort((a, b) => b.usedAt.getTime() - a.usedAt.getTime());
  for (const { path } of images.slice(12)) Deno.removeSync(path);
}

function hashOf(paths: string[]): string {
  const hash = createHash("sha256");
  function add(path: string, name: string): void {
    const info = Deno.lstatSync(path);
    hash.update(`${name}\0${info.mode}\0${info.size}\0`);
    if (info.isDirectory) {
      const names = [...Deno.readDirSync(path)].map(({ name }) => name).sort();
      for (const child of names) add(`${path}/${child}`, `${name}/${child}`);
    } else if (info.isSymlink) {
      hash.update(Deno.readLinkSync(path));
    } else {
      hash.update(Deno.readFileSync(path));
    }
  }
  for (const path of paths) add(path, path.replace(/.*\//, ""));
  return hash.digest("hex");
}

function readIfThere(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}

/** The magic header. */
export const MAGIC_HEADER = "lightwhale-please-format-me";

/**
 * Make an empty (sparse) image file.
 *
 * @param options Its size, and whether it begins with the magic header.
 * @returns The path.
 */
export function makeDisk(
  path: string,
  options: { sizeMiB: number; magic?: boolean },
): string {
  Deno.writeTextFileSync(path, options.magic ? MAGIC_HEADER : "");
  Deno.truncateSync(path, options.sizeMiB * 2 ** 20);
  return path;
}

function readConsole(path: string): string {
  return (readIfThere(path) ?? "").replaceAll("\r", "");
}

async function readLines(
  stream: ReadableStream<Uint8Array>,
  onLine: (line: string) => void,
): Promise<void> {
  let rest = "";
  const text = stream.pipeThrough(new TextDecoderStream() as never);
  for await (const chunk of text as unknown as AsyncIterable<string>) {
    const lines = (rest + chunk).replaceAll("\r", "").split("\n");
    rest = lines.pop()!;
    for (const line of lines) onLine(line);
  }
  if (rest) onLine(rest);
}

/** QEMU's machine protocol: one JSON object a line, in turn. */
function openQmp(path: string) {
  let connection: Deno.UnixConn | undefined;
  let reading: Promise<void> | undefined;
  const waiting: {
    resolve: (value: unknown) => void;
    reject: (error: Error) => void;
  }[] = [];

  function send(command: string, args: Record<string, unknown>) {
    const answer = new Promise((resolve, reject) =>
      waiting.push({ resolve, reject })
    );
    const line = JSON.stringify({ execute: command, arguments: args });
    connection!.write(new TextEncoder().encode(`${line}\n`));
    return answer;
  }

  async function execute(command: string, args: Record<string, unknown> = {}) {
    if (!connection) {
      connection = await Deno.connect({ transport: "unix", path });
      reading = readLines(connection.readable, (line) => {
        const message = JSON.parse(line);
        if (message.return !== undefined) {
          waiting.shift()!.resolve(message.return);
        } else if (message.error) {
          waiting.shift()!.reject(
            new Error(`Cannot ${command}: ${message.error.desc}`),
          );
        }
      });
      await send("qmp_capabilities", {});
    }
    return await send(command, args);
  }

  return {
    execute,
    /** Await the end that QEMU's exit brings. */
    async close() {
      await reading?.catch(() => {});
    },
  };
}
