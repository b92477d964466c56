#!/usr/bin/env -S deno run --allow-all
/**
 * Persistence for Lightwhale, an immutable live system that runs Docker.
 *
 * Called without arguments, early at every boot, this program gives the
 * read-only system its one writable filesystem. It is meant to be read from top
 * to bottom in an hour: first the contract (names and places), then
 * {@linkcode boot}, whose body is the nine documented steps, then the functions
 * of those steps in the order in which they happen. They are of three kinds:
 *
 * - *look*: read devices, sysfs and procfs, change nothing;
 * - *decide*: pure functions from facts to a {@linkcode Plan}, so that
 *   `--dry-run` shows the very plan that a boot would carry out;
 * - *do*: one command or one write each, read back afterwards.
 *
 * What it must never do, in order of weight: destroy data that it was not told
 * to destroy, leave the system without a writable `/etc`, `/var` and `/home`,
 * hang.
 *
 * @module
 */

import { parseArgs } from "@std/cli/parse-args";
import * as fs from "node:fs";
import { basename, dirname, join } from "node:path";
import process from "node:process";

// ---------------------------------------------------------------------------
// The contract: names and places that existing disks and scripts rely on.
// ---------------------------------------------------------------------------

/** Version of this program, printed by `--version`. */
export const VERSION = "1.0.0";

/** Magic header at offset 0 of a whole disk, and magic GPT partition name. */
export const MAGIC = "lightwhale-please-format-me";

/** Label of the data filesystem and GPT name of its partitions. */
export const DATA = "lightwhale-data";

/** Label of a swap area and GPT name of its partition. */
export const SWAP = "lightwhale-swap";

/**
 * Label of a data filesystem while it is being made. {@linkcode DATA} is set
 * last and is the commit record: until then the disk still counts as magic.
 */
export const UNFINISHED = "lightwhale-unfinished";

/** The subvolumes, at the top level of the data filesystem. */
const SUBVOLUMES = {
  data: "@lightwhale-data",
  state: "@lightwhale-state",
  snapshots: "@lightwhale-state-snapshots",
};

/** The directories that get an overlay. */
const OVERLAYS = ["etc", "var", "home"];

/**
 * These break, or show wrong files, when a new system image brings another
 * lower layer (Documentation/filesystems/overlayfs.rst, "Changes to underlying
 * filesystems"); a kernel may have them on by default.
 */
const OVERLAY_FEATURES_OFF = "index=off,redirect_dir=off,metacopy=off,xino=off";

/** Places below the system root; see {@linkcode places}. */
const DATA_MOUNT = "mnt/lightwhale-data";
const STATE = "lightwhale-state"; // in the data filesystem
const SNAPSHOTS = "lightwhale-state-snapshots";
const UPPER = "overlay/upper"; // in the state directory
const WORK = "overlay/work";
const DOCKER_DATA_ROOT = `/${DATA_MOUNT}/${STATE}/docker`;

const KiB = 1024;
const MiB = 1024 * KiB;
const GiB = 1024 * MiB;

/** mkfs.btrfs needs this much for `--data single --metadata dup`. */
const MINIMUM_DATA_BYTES = 109 * MiB;

/** From this size on, a member fits beside others of any size. */
const SURELY_FITS_BYTES = 2 * GiB;

/** A disk smaller than this gets no swap partition. */
const MINIMUM_DISK_FOR_SWAP_BYTES = 2 * GiB;

/**
 * To make a directory, Btrfs was seen to fail with 4 MiB of metadata free: it
 * reserves the worst case, two nodes a level for each item (fs/btrfs/fs.h,
 * btrfs_calc_insert_metadata_size()).
 */
const LARGEST_METADATA_RESERVATION_BYTES = 8 * MiB;

/** How long an answer is waited for before a device or program is given up. */
const TIMEOUT = {
  readMs: 20_000, // a hard disk that spins up needs some 10 s
  commandMs: 60_000,
  mkfsMs: 600_000, // also add, replace: a discard of the device comes first
  mountMs: 300_000, // log replay and block group scan on large hard disks
  nodeMs: 10_000,
  lockMs: 120_000,
};

/** Where things are below the system root `--root`. */
export function places(root: string) {
  const data = join(root, DATA_MOUNT);
  const state = join(data, STATE);
  const run = join(root, "run/lightwhale");
  return {
    root,
    data,
    state,
    snapshots: join(data, SNAPSHOTS),
    upper: join(state, UPPER),
    work: join(state, WORK),
    docker: join(root, DOCKER_DATA_ROOT),
    daemonJson: join(root, "etc/docker/daemon.json"),
    run,
    lower: join(run, "overlay/lower"),
    copyUp: join(run, "overlay/copy-up"),
    topLevel: join(run, "top-level"),
    fstab: join(run, "fstab"),
    report: join(run, "persistence.json"),
    job: join(run, "job.json"),
  };
}

type Places = ReturnType<typeof places>;

// ---------------------------------------------------------------------------
// The facts: what is known about the machine before anything is decided.
// ---------------------------------------------------------------------------

/** What the command line and the kernel command line ask for. */
export interface Settings {
  /** System root to work on. */
  root: string;
  /** Names of the whole disks to look at (`loop0`); undefined: all of them. */
  only?: string[];
  /** How long to wait for missing devices. */
  waitMs: number;
  /** `lightwhale.persistence=off`: boot volatile whatever the disks say. */
  off: boolean;
  /** `lightwhale.swap=off` or `noswap`: neither make nor use swap. */
  noSwap: boolean;
  /** `lightwhale.data=UUID`: the data filesystem to use of several. */
  dataUuid?: string;
}

/** A whole disk, a partition, or a volume (md, device mapper). */
export interface BlockDevice {
  /** Name in `/sys/class/block`. */
  name: string;
  /** Device node. */
  path: string;
  kind: "disk" | "partition" | "volume";
  /** Name of the whole disk that it is part of, or its own. */
  disk: string;
  /** Partition number, 0 for anything else. */
  number: number;
  /** Where it starts on its disk. */
  startBytes: number;
  sizeBytes: number;
  /** Logical sector size of the disk. */
  sectorBytes: number;
  readOnly: boolean;
  /** False for a partition that is in the table but not in the kernel. */
  hasNode: boolean;
  /** Why nothing may be written to it now, or undefined when it is free. */
  inUse?: string;
  /** GPT partition name, from the table or, failing that, from the kernel. */
  partitionName?: string;
  /** Why it could not be read. */
  readError?: string;
  /** It begins with {@linkcode MAGIC}. */
  header: boolean;
  gpt?: Gpt;
  btrfs?: Superblock;
  /** Label of a Btrfs superblock that is left only as a backup copy. */
  backupLabel?: string;
  swapLabel?: string;
  mark?: Mark;
}

/** All that a plan is computed from. */
export interface Facts {
  /** Those of the disks that hold something of ours, or may do so. */
  devices: BlockDevice[];
  /** A driver is bound to a disk that has not appeared yet. */
  diskPending: boolean;
  memoryBytes: number;
  /** What is mounted on the data filesystem's mount point. */
  mounted?: Mount;
  /** Paths of devices found too small by {@linkcode rehearse}. */
  tooSmall: Set<string>;
}

/** A line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)). */
export interface Mount {
  target: string;
  type: string;
  source: string;
  /** `major:minor` of the mounted filesystem. */
  deviceNumber: string;
  /** Per-superblock options. */
  superOptions: string[];
}

// ---------------------------------------------------------------------------
// On-disk formats, as tables of offsets.
// ---------------------------------------------------------------------------

/** A Btrfs superblock (btrfs-progs, kernel-shared/ctree.h). */
export interface Superblock {
  fsid: string;
  label: string;
  generation: number;
  numDevices: number;
  devid: number;
  /** Size of this device as the filesystem knows it. */
  deviceBytes: number;
  /** What is used in all of the filesystem, each byte counted once. */
  usedBytes: number;
  /** Writes since the last commit wait in a log tree. */
  hasLog: boolean;
  /** False when the checksum is wrong: damaged, not absent. */
  intact: boolean;
}

const BTRFS = {
  superblockAt: 64 * KiB,
  backupAt: 64 * MiB,
  bytes: 4 * KiB,
  checksum: 0x00,
  checksummedFrom: 0x20,
  fsid: 0x20,
  magic: 0x40,
  magicText: "_BHRfS_M",
  generation: 0x48,
  logRoot: 0x60,
  usedBytes: 0x78,
  numDevices: 0x88,
  checksumType: 0xc4,
  devid: 0xc9,
  deviceBytes: 0xd1,
  label: 0x12b,
  labelBytes: 256,
};

/**
 * Reads a Btrfs superblock.
 *
 * @param block The {@linkcode BTRFS.bytes} bytes at 64 KiB, or a copy of them.
 * @returns The superblock, or undefined where there is none.
 */
export function parseSuperblock(block: Uint8Array): Superblock | undefined {
  if (block.length < BTRFS.bytes) return undefined;
  if (text(block, BTRFS.magic, 8) !== BTRFS.magicText) return undefined;
  const view = viewOf(block);
  return {
    fsid: uuid(block, BTRFS.fsid),
    label: text(block, BTRFS.label, BTRFS.labelBytes),
    generation: Number(view.getBigUint64(BTRFS.generation, true)),
    numDevices: Number(view.getBigUint64(BTRFS.numDevices, true)),
    devid: Number(view.getBigUint64(BTRFS.devid, true)),
    deviceBytes: Number(view.getBigUint64(BTRFS.deviceBytes, true)),
    usedBytes: Number(view.getBigUint64(BTRFS.usedBytes, true)),
    hasLog: view.getBigUint64(BTRFS.logRoot, true) !== 0n,
    intact: checksumIsRight(block, view),
  };
}

/** Checks a superblock against btrfs_super_block.csum. */
function checksumIsRight(block: Uint8Array, view: DataView): boolean {
  // Checksums other than crc32c are left to the kernel to verify.
  if (view.getUint16(BTRFS.checksumType, true) !== 0) return true;
  const body = block.subarray(BTRFS.checksummedFrom, BTRFS.bytes);
  return crc(body, CRC32C) === view.getUint32(BTRFS.checksum, true);
}

/** Castagnoli's polynomial, which Btrfs uses, and that of GPT. */
const CRC32C = 0x82f63b78;
const CRC32 = 0xedb88320;

/** Made when one is needed: not every call of this program reads a disk. */
const crcTables = new Map<number, Uint32Array>();

/** From the checksum of each bit follows, by exclusive or, that of each byte. */
function makeCrcTable(polynomial: number): Uint32Array {
  const table = new Uint32Array(256);
  let crc = 1;
  for (let bit = 0x80; bit > 0; bit >>= 1) {
    crc = crc & 1 ? (crc >>> 1) ^ polynomial : crc >>> 1;
    for (let byte = 0; byte < 256; byte += 2 * bit) {
      table[byte + bit] = table[byte] ^ crc;
    }
  }
  crcTables.set(polynomial, table);
  return table;
}

/** What there is only in the executable, which Bun runs. */
declare const Bun: {
  hash: { crc32(bytes: Uint8Array): number };
  spawn(command: string[], options: StartOptions & { env: unknown }): {
    exited: Promise<number>;
    signalCode: string | null;
    kill: (signal: string) => void;
    unref: () => void;
  };
} | undefined;

/** CRC-32: Bun's own where there is one (node:zlib's would load for 6 ms). */
function crc32(bytes: Uint8Array): number {
  return typeof Bun === "undefined" ? crc(bytes, CRC32) : Bun.hash.crc32(bytes);
}

/** A checksum, a table lookup for each byte. */
function crc(bytes: Uint8Array, polynomial: number): number {
  const table = crcTables.get(polynomial) ?? makeCrcTable(polynomial);
  let crc = ~0;
  for (let i = 0; i < bytes.length; i++) {
    crc = table[(crc ^ bytes[i]) & 0xff] ^ (crc >>> 8);
  }
  return ~crc >>> 0;
}

/** A GUID partition table (UEFI Specification 2.10, chapter 5). */
export interface Gpt {
  partitions: GptPartition[];
  /** The primary table is damaged; this was read from the backup. */
  primaryDamaged: boolean;
  /** Where the table believes that the disk ends. */
  endBytes: number;
}

/** An entry of the table that is used. */
export interface GptPartition {
  number: number;
  name: string;
  startBytes: number;
  sizeBytes: number;
}

const GPT = {
  signature: "EFI PART",
  headerBytes: 12,
  headerCrc: 16,
  backupLba: 32,
  entriesLba: 72,
  entryCount: 80,
  entryBytes: 84,
  entriesCrc: 88,
  /** Room that 128 entries of 128 bytes take before the backup header. */
  entriesArea: 16 * KiB,
  entry: { type: 0, first: 32, last: 40, name: 56, nameBytes: 72 },
};

/**
 * Reads a GUID partition table.
 *
 * @param header The sector that holds the header.
 * @param readEntries Gives the entries, which start at the given byte of the
 * disk, or undefined where that cannot be read.
 * @param sectorBytes Logical sector size of the disk.
 * @returns The table, or undefined where there is none or it is damaged.
 */
export function parseGpt(
  header: Uint8Array,
  readEntries: (atBytes: number, lengthBytes: number) => Uint8Array | undefined,
  sectorBytes: number,
): Gpt | undefined {
  if (header.length < 512 || text(header, 0, 8) !== GPT.signature) {
    return undefined;
  }
  const view = viewOf(header);
  const headerBytes = view.getUint32(GPT.headerBytes, true);
  if (headerBytes < 92 || headerBytes > header.length) return undefined;
  const checked = header.slice(0, headerBytes);
  checked.fill(0, GPT.headerCrc, GPT.headerCrc + 4);
  if (crc32(checked) !== view.getUint32(GPT.headerCrc, true)) return undefined;

  const size = view.getUint32(GPT.entryBytes, true);
  const count = view.getUint32(GPT.entryCount, true);
  if (size < 128 || size > 4 * KiB || count > 4 * KiB) return undefined;
  const entriesAt = Number(view.getBigUint64(GPT.entriesLba, true));
  const entries = readEntries(entriesAt * sectorBytes, size * count);
  if (entries?.length !== size * count) return undefined;
  if (crc32(entries) !== view.getUint32(GPT.entriesCrc, true)) return undefined;

  const partitions: GptPartition[] = [];
  const table = viewOf(entries);
  const { type, first, last, name, nameBytes } = GPT.entry;
  // Four words and not two of 64 bits: there are 128 entries on each disk.
  const isUsed = (at: number) =>
    table.getUint32(at) !== 0 || table.getUint32(at + 4) !== 0 ||
    table.getUint32(at + 8) !== 0 || table.getUint32(at + 12) !== 0;
  for (let at = 0; at < entries.length; at += size) {
    if (!isUsed(at + type)) continue;
    const from = Number(table.getBigUint64(at + first, true));
    const to = Number(table.getBigUint64(at + last, true));
    const label = entries.subarray(at + name, at + name + nameBytes);
    partitions.push({
      number: at / size + 1,
      name: new TextDecoder("utf-16le").decode(label).replace(/\0.*$/s, ""),
      startBytes: from * sectorBytes,
      sizeBytes: (to - from + 1) * sectorBytes,
    });
  }
  const backupLba = Number(view.getBigUint64(GPT.backupLba, true));
  const endBytes = (backupLba + 1) * sectorBytes;
  return { partitions, primaryDamaged: false, endBytes };
}

/** Reads the label of a swap area (mkswap(8); linux/swap.h). */
export function parseSwapLabel(page: Uint8Array): string | undefined {
  if (page.length < 4 * KiB) return undefined;
  if (text(page, 4 * KiB - 10, 10) !== "SWAPSPACE2") return undefined;
  return text(page, 1052, 16);
}

/**
 * What a member remembers of its last read-write mount. Superblocks alone
 * cannot tell a stale member or a split mirror, so that every member present
 * gets a mark in the first 64 KiB of its data partition, which Btrfs never
 * uses (btrfs(5), "bootloader support").
 */
export interface Mark {
  fsid: string;
  /** Identity of this member; unlike a devid it is never used again. */
  member: string;
  /** Counts the read-write mounts. */
  epoch: number;
  /** Identities of the members that were present. */
  present: string[];
  /** Members that were not, and the generation when each was last there. */
  absent: Record<string, number>;
}

/** Two slots, written in turn, so that a torn write leaves the older one. */
const MARK = {
  slotsAt: [56 * KiB, 60 * KiB],
  bytes: 4 * KiB,
  title: "lightwhale-mark 1",
};

/** Writes a mark as text: a title, the CRC-32 of the rest, and JSON. */
export function formatMark(mark: Mark): Uint8Array {
  const json = JSON.stringify(mark);
  const sum = crcOfText(json).toString(16).padStart(8, "0");
  const block = new Uint8Array(MARK.bytes);
  const bytes = new TextEncoder().encode(`${MARK.title}\n${sum}\n${json}\n`);
  assert(bytes.length <= block.length, "The mark of a member is too long");
  block.set(bytes);
  return block;
}

/** Reads the newer of two slots, given as they stand on the disk. */
export function parseMark(slots: Uint8Array): Mark | undefined {
  return MARK.slotsAt
    .map((_, i) => parseMarkSlot(text(slots, i * MARK.bytes, MARK.bytes)))
    .filter((mark) => mark !== undefined)
    .sort((a, b) => b.epoch - a.epoch)[0];
}

function parseMarkSlot(slot: string): Mark | undefined {
  const [title, sum, json] = slot.split("\n");
  if (title !== MARK.title || !json) return undefined;
  if (crcOfText(json) !== parseInt(sum, 16)) return undefined;
  try {
    const { fsid, member, epoch, present, absent } = JSON.parse(json);
    const valid = typeof fsid === "string" && typeof member === "string" &&
      Number.isSafeInteger(epoch) && Array.isArray(present) &&
      present.every((id: unknown) => typeof id === "string") &&
      typeof absent === "object" && absent !== null &&
      Object.values(absent).every(Number.isSafeInteger);
    return valid ? { fsid, member, epoch, present, absent } : undefined;
  } catch {
    return undefined;
  }
}

const crcOfText = (text: string) => crc32(new TextEncoder().encode(text));

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

const utf8 = new TextDecoder();

/** Text up to the first NUL; what is not UTF-8 becomes U+FFFD. */
function text(bytes: Uint8Array, at: number, length: number): string {
  const field = bytes.subarray(at, at + length);
  const end = field.indexOf(0);
  return utf8.decode(end < 0 ? field : field.subarray(0, end));
}

function uuid(bytes: Uint8Array, at: number): string {
  return Array.from(bytes.subarray(at, at + 16))
    .map((byte) => byte.toString(16).padStart(2, "0")).join("")
    .replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

// ---------------------------------------------------------------------------
// The boot sequence.
// ---------------------------------------------------------------------------

/**
 * Gives the system its writable filesystem: the nine documented steps.
 * Running it again changes nothing.
 *
 * @returns The exit status: 0 as configured, 1 when something failed and the
 * fallback is in place.
 */
export async function boot(settings: Settings): Promise<number> {
  const started = Date.now();
  const place = places(settings.root);
  let lock: Lock;
  let plan: Plan | undefined;
  let planned: string[] = [];
  let mode: Outcome["mode"] = "persistent";
  const meanwhile: Promise<void>[] = [];
  try {
    lock = await takeLock(join(place.run, "lock"));
  } catch (error) {
    sayError(error); // another one is at it: it has the fallback as well
    return 1;
  }
  const wasSetUp = OVERLAYS.every((name) => isOverlaid(name, place));
  try {
    await removeScratch(place);
    plan = await makePlan(settings, settings.waitMs); //    steps 1 and 2
    planned = describePlan(plan);
    sayPlan(plan);
    await attemptEach(plan.mount?.repair ?? [], repairTable);
    await attemptEach(plan.nodes, makePartitionNodes);
    await attemptEach(plan.mount?.grow ?? [], growPartition);
    await disarm(plan.disarm);
    if (plan.create) {
      await partition(plan.create); //                      step 3
      await waitForPartitions(plan.create.members); //      step 4
      plan.mount = await createDataFilesystem(plan.create, place); // step 5
      plan.swap = swapOf(plan.create);
      meanwhile.push(disarm(plan.create.members.map((m) => m.device)));
    }
    if (plan.mount) {
      const areas = plan.swap;
      meanwhile.push(attempt(() => swapOn(areas)));
      await mountDataFilesystem(plan.mount, place); //      step 6
      if (plan.create) meanwhile.push(attempt(() => removeScratch(place)));
    } else mode = await mountVolatile(plan, place);
    await mountOverlays(place); //                          step 7
  } catch (error) {
    await Promise.all(meanwhile);
    sayError(error);
    if (isNoSpace(error)) sayHowToMakeRoom(place);
    if (wasSetUp) { // and is in use: nothing is taken away from under it
      lock.release();
      return 1;
    }
    mode = "fallback";
    await fallBack(place);
  }
  await attempt(() => configureDocker(place)); //           step 8
  await Promise.all(meanwhile); //                          step 9
  if (plan && mode === "persistent") {
    await attempt(() => startMaintenance(plan, settings, place));
  }
  if (plan?.mode === "mounted" && messages.errors.length === 0) {
    say("info", "Everything is set up already");
  }
  const status = messages.errors.length > 0 ? 1 : 0;
  attemptNow(() =>
    writeReport({ mode, plan, planned, status, started }, place)
  );
  lock.release();
  return status;
}

/** What a boot came to, for the status file. */
interface Outcome {
  mode: "persistent" | "volatile" | "fallback";
  plan?: Plan;
  /** What was planned at first, before a filesystem was created. */
  planned: string[];
  status: number;
  started: number;
}

/**
 * Looks and decides, and looks again while a disk that is needed is late:
 * at most `waitMs`, and only as long as one is missing.
 */
async function makePlan(
  settings: Settings,
  waitMs: number,
  forNextBoot = false,
): Promise<Plan> {
  const giveUpAt = Date.now() + waitMs;
  const tooSmall = new Set<string>();
  let saidWaiting = false;
  for (;;) {
    const facts = { ...await look(settings), tooSmall };
    if (forNextBoot) facts.mounted = undefined;
    const plan = decide(facts, settings);
    const late = whatIsLate(plan, facts);
    if (late && Date.now() < giveUpAt) {
      if (!saidWaiting) say("info", `Waiting for ${late}`);
      saidWaiting = true;
      await sleep(200);
      continue;
    }
    const misfit = plan.create &&
      await rehearse(plan.create, tooSmall.size > 0, settings.root);
    if (!misfit) return plan;
    tooSmall.add(misfit.path); // and decide without it
  }
}

/**
 * Takes away what served only to make subvolumes and uppers, for this run or
 * for one that was killed.
 */
async function removeScratch(place: Places): Promise<void> {
  const scratch = [place.copyUp, place.topLevel].filter(fs.existsSync);
  if (scratch.length === 0) return; // and no need to ask the kernel
  const targets = readMounts().map((mount) => mount.target)
    .filter((target) => scratch.includes(target));
  if (targets.length > 0) await unmount(...targets);
  fs.rmSync(scratchLayers(place.state), { recursive: true, force: true });
}

/** Names what a boot should wait for, or undefined when nothing is late. */
function whatIsLate(plan: Plan, facts: Facts): string | undefined {
  if (plan.mode === "mounted" || plan.mode === "off") return undefined;
  const absent = plan.mount ? countAbsent(plan.mount) : 0;
  if (absent > 0) return `${absent} missing device(s) of "${DATA}"`;
  if (plan.waitFor) return plan.waitFor;
  if ((plan.mode === "volatile" || plan.create) && facts.diskPending) {
    return "a USB disk whose driver is still starting it";
  }
}

// ---------------------------------------------------------------------------
// Steps 1 and 2, look: every block device, what it is and what it holds.
// ---------------------------------------------------------------------------

/**
 * Reads all devices, and looks closer at the disks that hold something of ours.
 * Changes nothing.
 *
 * @param always Name of a disk to look at closely, whatever it holds.
 */
export async function look(
  settings: Settings,
  always?: string,
): Promise<Facts> {
  const diskPending = isDiskPending(); // first: it may appear just now
  const mounts = readMounts();
  const listed = listDevices(settings);
  await readDevices(listed);
  const all = [...listed, ...await lookAtPartitionsWithoutNode(listed)];
  const close = new Set(all.filter(mayBeOurs).map((device) => device.disk));
  if (always) close.add(always);
  const devices = all.filter((device) => close.has(device.disk)).sort(byName);
  lookCloser(devices, mounts);
  const place = places(settings.root);
  return {
    devices,
    diskPending,
    memoryBytes: readMemoryBytes(),
    mounted: mounts.findLast((mount) => mount.target === place.data),
    tooSmall: new Set(),
  };
}

/** May a plan depend on what is on this device? */
function mayBeOurs(device: BlockDevice): boolean {
  const names = device.gpt?.partitions.map((partition) => partition.name) ?? [];
  return device.header || device.btrfs !== undefined ||
    device.backupLabel !== undefined || device.readError !== undefined ||
    [MAGIC, DATA, SWAP].some((name) => names.includes(name));
}

/** Memory, floppy and optical drives; loop devices unless asked for. */
const NEVER_LOOKED_AT = /^(ram|zram|fd|sr|loop)\d/;

/** md arrays and device-mapper volumes (drivers/md/md.c, drivers/md/dm.c). */
const VOLUME = /^(md[_\d]|dm-\d)/;

/**
 * Lists block devices, whatever their driver calls them. sysfs knows which are
 * whole disks; `/proc/partitions` has neither those without a medium, such as
 * card readers, nor the hidden paths of NVMe multipath (block/genhd.c,
 * show_partition()).
 */
function listDevices({ only }: Settings): BlockDevice[] {
  const disks = new Set(
    only ??
      listDirectory("/sys/block").filter((name) => !NEVER_LOOKED_AT.test(name)),
  );
  const devices: BlockDevice[] = [];
  let whole: BlockDevice | undefined; // its partitions follow it
  for (const line of (readText("/proc/partitions") ?? "").split("\n")) {
    const name = nameOf(line.slice(line.lastIndexOf(" ") + 1));
    const number = whole && partitionNumber(whole.name, name);
    if (whole && number) {
      devices.push({
        ...whole,
        name,
        path: nodeOf(name),
        kind: "partition",
        number,
      });
    } else if (disks.has(name)) devices.push(whole = wholeDevice(name));
  }
  return devices;
}

/** A disk or volume; its size is not asked for before it matters. */
function wholeDevice(name: string): BlockDevice {
  const path = nodeOf(name);
  const isVolume = VOLUME.test(name);
  const isSuspended = isVolume && readSysfs(name, "dm/suspended") === "1";
  return {
    name,
    path,
    kind: isVolume ? "volume" : "disk",
    disk: name,
    number: 0,
    startBytes: 0,
    sizeBytes: 0,
    sectorBytes: Number(readSysfs(name, "queue/logical_block_size") ?? 512),
    readOnly: false,
    hasNode: true,
    readError: isSuspended
      ? `Cannot read ${path}: it is suspended (dmsetup resume ` +
        `"${readSysfs(name, "dm/name")}")`
      : undefined,
    header: false,
  };
}

/** An attribute of a block device (Documentation/ABI/stable/sysfs-block). */
function readSysfs(name: string, attribute: string): string | undefined {
  return readText(`/sys/class/block/${name}/${attribute}`);
}

/** sysfs counts in 512 bytes, whatever the size of a sector. */
const readSysfsBytes = (name: string, attribute: "size" | "start") =>
  512 * Number(readSysfs(name, attribute) ?? 0);

/**
 * The node of a device: sysfs has "!" in its name for a "/", as in `cciss!c0d0`
 * (drivers/base/core.c, device_get_devnode()).
 */
export const nodeOf = (name: string) => `/dev/${name.replaceAll("!", "/")}`;

/** The name in sysfs of a device node. */
export const nameOf = (path: string) =>
  path.replace(/^\/dev\//, "").replaceAll("/", "!");

/**
 * What the number of a partition follows: a "p" where the disk's name ends with
 * a digit (block/partitions/core.c, add_partition()).
 */
const partitionPrefix = (disk: string) => /\d$/.test(disk) ? `${disk}p` : disk;

/** The number in a partition's name, undefined where it is none of the disk. */
export function partitionNumber(
  disk: string,
  name: string,
): number | undefined {
  if (!name.startsWith(disk)) return undefined;
  const prefix = partitionPrefix(disk);
  const digits = name.startsWith(prefix) ? name.slice(prefix.length) : "";
  return /^[1-9]\d*$/.test(digits) ? Number(digits) : undefined;
}

/**
 * What sysfs says of devices: who uses them, whether they can be written to,
 * and of partitions where they are, and what the table calls them.
 */
function lookCloser(devices: BlockDevice[], mounts: Mount[]): void {
  const users = readUsers(devices, mounts);
  for (const device of devices) {
    const { name, disk, number, hasNode } = device;
    const whole = devices.find((other) => other.name === disk);
    const known = hasNode ? name : disk; // to the kernel
    device.readOnly = readSysfs(known, "ro") === "1";
    device.inUse = users.get(known);
    if (!hasNode) continue;
    device.sizeBytes = readSysfsBytes(name, "size");
    if (number === 0) continue;
    device.startBytes = readSysfsBytes(name, "start");
    const entry = whole?.gpt?.partitions
      .find((entry) => entry.number === number);
    device.partitionName = entry?.startBytes === device.startBytes
      ? entry.name
      : undefined;
    // The kernel's name for it may be old; it serves where the disk is mute.
    if (whole?.readError) {
      device.partitionName = parsePartname(readSysfs(name, "uevent") ?? "");
    }
  }
}

/**
 * Reads the partition's name from the text of a `uevent` file in sysfs:
 * KEY=value, a line each. The first such line is the kernel's: behind it come
 * the lines that may be in the name, which anybody may have chosen
 * (block/partitions/core.c, part_uevent()).
 */
export function parsePartname(uevent: string): string | undefined {
  const key = "PARTNAME=";
  return uevent.split("\n").find((line) => line.startsWith(key))
    ?.slice(key.length);
}

/** `sdb` before `sdaa`, `loop9` before `loop10`. */
function byName(a: BlockDevice, b: BlockDevice): number {
  return a.name.length - b.name.length || (a.name < b.name ? -1 : 1);
}

/**
 * Who uses which device (by name in sysfs). The strongest test first: holders
 * are exact for md and device mapper; Btrfs registers only its first device as
 * mounted and no holder at all, so that its own sysfs directory is asked.
 */
function readUsers(
  devices: BlockDevice[],
  mounts: Mount[],
): Map<string, string> {
  const users = new Map<string, string>();
  const mounted = new Map(mounts.map((m) => [m.deviceNumber, m.target]));
  for (const { name } of devices) {
    const [holder] = listDirectory(`/sys/class/block/${name}/holders`);
    if (holder) users.set(name, `held by ${nodeOf(holder)}`);
    const target = mounted.get(readSysfs(name, "dev") ?? "");
    if (target) users.set(name, `mounted on "${target}"`);
  }
  for (const fsid of listDirectory("/sys/fs/btrfs")) {
    for (const name of listDirectory(`/sys/fs/btrfs/${fsid}/devices`)) {
      users.set(name, openIn(fsid));
    }
  }
  for (const path of readSwaps()) users.set(nameOf(path), "swap in use");
  return users;
}

/** Active swap devices (proc_swaps(5)). */
function readSwaps(): string[] {
  return (readText("/proc/swaps") ?? "").split("\n").slice(1)
    .map((line) => unescapeOctal(line.split(/\s/)[0])).filter(Boolean);
}

/**
 * How many devices are read at a time: with more the runtime starts a thread
 * for each, and all take longer. While any is waited for, as many more are
 * begun: one that does not answer keeps no other from being read. What is read
 * of most fits into a memory that serves the next device, too: new memory takes
 * as long as a read.
 */
const READERS = { atATime: 8, moreEveryMs: 20, memoryBytes: 48 * KiB };

/** Reads all devices. */
async function readDevices(devices: BlockDevice[]): Promise<void> {
  let next = 0;
  const readers: Promise<void>[] = [];
  const readSome = async () => {
    let memory = new Uint8Array(READERS.memoryBytes);
    while (next < devices.length) {
      const device = devices[next++];
      await readDevice(device, memory);
      // A read that was given up may end after all, and write there.
      if (device.readError) memory = new Uint8Array(READERS.memoryBytes);
    }
  };
  const begin = () => {
    for (let i = 0; i < READERS.atATime && next < devices.length; i++) {
      readers.push(readSome());
    }
  };
  begin();
  const timer = setInterval(begin, READERS.moreEveryMs);
  for (const reader of readers) await reader; // also those that are added
  clearInterval(timer);
}

/**
 * Reads where the formats that matter have their place. A backup counts only
 * where the start is empty, as Btrfs leaves it: anything else may be what was
 * put there since, a filesystem for example.
 *
 * @param memory To read into; nothing of it is needed afterwards.
 */
async function readDevice(
  device: BlockDevice,
  memory: Uint8Array,
): Promise<void> {
  if (device.readError) return; // to open it would be to wait for ever
  try {
    await withDevice(device.path, async (read) => {
      const start = await readStart(device, read, 0);
      if (device.kind === "disk" && !device.gpt) {
        device.gpt = await readBackupGpt(device, start, read);
      }
      if (device.btrfs || device.gpt || !isZero(start)) return;
      const block = await read(BTRFS.backupAt, BTRFS.bytes);
      const backup = parseSuperblock(block);
      device.backupLabel = backup?.intact ? backup.label : undefined;
    }, memory);
  } catch (error) {
    device.readError = cannotRead(device, error);
  }
}

function cannotRead(device: BlockDevice, error: unknown): string {
  const message = messageOf(error);
  const named = message.includes(device.path);
  return named ? message : `Cannot read ${device.path}: ${message}`;
}

/**
 * Reads the start of a device that begins at byte `at` of what is read.
 *
 * @returns Its first bytes.
 */
async function readStart(
  device: BlockDevice,
  read: Read,
  at: number,
): Promise<Uint8Array> {
  const sector = device.sectorBytes;
  const isDisk = device.kind === "disk";
  const marksBytes = MARK.slotsAt.length * MARK.bytes;
  const start = await read(at, isDisk ? 2 * sector + GPT.entriesArea : 4 * KiB);
  const marks = await read(at + MARK.slotsAt[0], marksBytes + BTRFS.bytes);
  device.header = text(start, 0, MAGIC.length) === MAGIC;
  device.swapLabel = parseSwapLabel(start);
  device.btrfs = parseSuperblock(marks.subarray(marksBytes));
  const mark = device.btrfs && parseMark(marks);
  if (mark?.fsid === device.btrfs?.fsid) device.mark = mark;
  if (!isDisk || isMbr(start)) return start;
  device.gpt = parseGpt(
    start.subarray(sector, 2 * sector),
    (from, length) => start.subarray(from, from + length),
    sector,
  );
  return start;
}

/** Partition types in the MBR of a disk, if LBA 0 is one. */
function mbrTypes(start: Uint8Array): number[] {
  if (start[510] !== 0x55 || start[511] !== 0xaa) return [];
  return [450, 466, 482, 498].map((at) => start[at]).filter((type) => type > 0);
}

/** Says LBA 0 that the disk has a GPT? (UEFI, 5.2.3, Protective MBR.) */
const isProtectiveMbr = (start: Uint8Array) => mbrTypes(start).includes(0xee);

/** An MBR of its own right: a GPT beside it is a leftover, to the kernel too. */
const isMbr = (start: Uint8Array) =>
  mbrTypes(start).length > 0 && !isProtectiveMbr(start);

const ZEROS = "\0".repeat(512);

/** By texts, for the runtime compares them at once, and bytes one by one. */
function isZero(bytes: Uint8Array): boolean {
  for (let at = 0; at < bytes.length; at += ZEROS.length) {
    const part = bytes.subarray(at, at + ZEROS.length);
    if (utf8.decode(part) !== ZEROS.slice(0, part.length)) return false;
  }
  return true;
}

/**
 * The backup table at the end of a disk whose primary one is damaged. Without
 * a protective MBR it counts only where the start was zeroed: anything else may
 * be what was put on the disk after the table, a system image for example.
 */
async function readBackupGpt(
  disk: BlockDevice,
  start: Uint8Array,
  read: Read,
): Promise<Gpt | undefined> {
  if (!isProtectiveMbr(start)) {
    if (!isZero(start)) return;
    const end = BTRFS.superblockAt + BTRFS.bytes;
    if (!isZero(await read(start.length, end - start.length))) return;
  }
  const header = start.subarray(disk.sectorBytes);
  const elsewhere = text(header, 0, 8) === GPT.signature &&
    viewOf(header).getBigUint64(GPT.entriesLba, true) !== 2n;
  if (elsewhere) return; // sgdisk --move-main-table: not damaged
  const areaBytes = GPT.entriesArea + disk.sectorBytes;
  const endBytes = readSysfsBytes(disk.name, "size");
  const areaAt = endBytes - areaBytes;
  if (areaAt < 0) return undefined;
  const area = await read(areaAt, areaBytes);
  const gpt = parseGpt(
    area.subarray(GPT.entriesArea),
    (at, length) => area.subarray(at - areaAt, at - areaAt + length),
    disk.sectorBytes,
  );
  return gpt && { ...gpt, primaryDamaged: true, endBytes };
}

/**
 * Partitions that are in the table but not in the kernel, because it has no
 * GPT parser or because a power cut left only the backup table: read through
 * the whole disk.
 */
async function lookAtPartitionsWithoutNode(
  devices: BlockDevice[],
): Promise<BlockDevice[]> {
  const known = new Set(devices.map((device) => device.path));
  const found: BlockDevice[] = [];
  for (const disk of devices) {
    for (const entry of disk.gpt?.partitions ?? []) {
      const path = partitionPath(disk, entry.number);
      if (known.has(path)) continue;
      found.push({
        ...disk,
        name: nameOf(path),
        path,
        kind: "partition",
        number: entry.number,
        startBytes: entry.startBytes,
        sizeBytes: entry.sizeBytes,
        hasNode: false,
        partitionName: entry.name,
        header: false,
        gpt: undefined,
        btrfs: undefined,
        swapLabel: undefined,
        mark: undefined,
      });
    }
  }
  await Promise.all(found.map(async (device) => {
    try {
      await withDevice(nodeOf(device.disk), async (read) => {
        await readStart(device, read, device.startBytes);
      });
    } catch (error) {
      device.readError = cannotRead(device, error);
    }
  }));
  return found;
}

/** `/dev/sda2`, but `/dev/nvme0n1p2`, `/dev/mmcblk0p2`, `/dev/loop3p2`. */
export function partitionPath(disk: { path: string }, number: number): string {
  return `${partitionPrefix(disk.path)}${number}`;
}

/** Reads `length` bytes at a byte offset, less at the end of the device. */
type Read = (at: number, length: number) => Promise<Uint8Array>;

/**
 * Opens a device for reading.
 *
 * @param memory To read into, in place of new memory, as long as it lasts.
 * @throws {Error} When it cannot be read or does not answer in time. (A
 * suspended volume, of which the open itself may never end, is not opened.)
 */
async function withDevice<T>(
  path: string,
  use: (read: Read) => Promise<T>,
  memory: Uint8Array = new Uint8Array(),
): Promise<T> {
  let open: number | undefined;
  const reading = (async () => {
    const file = open = await called<number>((done) =>
      fs.open(path, "r", done)
    );
    try {
      return await use((at, length) => {
        const buffer = length <= memory.length
          ? memory.subarray(0, length)
          : new Uint8Array(length);
        memory = memory.subarray(length);
        return called<Uint8Array>((done) =>
          fs.read(file, buffer, 0, length, at, (error, bytesRead) => {
            done(error, buffer.subarray(0, bytesRead));
          })
        );
      });
    } finally {
      open = undefined; // from now on its number may be another one's
      await called<void>((done) => fs.close(file, done));
    }
  })();
  try {
    return await withTimeout(reading, TIMEOUT.readMs, `Cannot read ${path}`);
  } catch (error) {
    if (open !== undefined) keepOpen(open);
    throw error;
  }
}

/** What a call of node:fs comes to (its own promises take longer to load). */
function called<T>(
  call: (done: (error: Error | null, value: T) => void) => void,
): Promise<T> {
  return new Promise((resolve, reject) =>
    call((error, value) => error ? reject(error) : resolve(value))
  );
}

/**
 * Lets another process hold a device that does not answer. A read of it ends
 * when its process is killed, but the last one to close it waits in the kernel
 * for what was asked of it (block/bdev.c, blkdev_flush_mapping()): our exit,
 * and init with it, for ever.
 */
function keepOpen(file: number): void {
  const sleep = findProgram("sleep");
  if (!sleep) return;
  attemptNow(() =>
    start([sleep, "86400"], {
      stdio: [file, "ignore", "ignore"],
      detached: true,
    })
  );
}

/**
 * Is a USB storage driver bound to an interface that has no disk yet?
 * (It waits `delay_use` seconds before it even looks:
 * Documentation/admin-guide/kernel-parameters.txt, usb-storage.delay_use.)
 */
function isDiskPending(): boolean {
  return ["usb-storage", "uas"].some((driver) => {
    const directory = `/sys/bus/usb/drivers/${driver}`;
    return listDirectory(directory).some((name) =>
      /^\d+-.*:/.test(name) && !hasBlockDevice(`${directory}/${name}`)
    );
  });
}

function hasBlockDevice(usbInterface: string): boolean {
  const below = (directory: string, pattern: RegExp) =>
    listDirectory(directory).filter((name) => pattern.test(name))
      .map((name) => join(directory, name));
  return below(usbInterface, /^host\d/)
    .flatMap((host) => below(host, /^target/))
    .flatMap((target) => below(target, /^\d+:/))
    .some((unit) => listDirectory(join(unit, "block")).length > 0);
}

/** Usable memory (proc_meminfo(5)). */
function readMemoryBytes(): number {
  const meminfo = readText("/proc/meminfo") ?? "";
  return KiB * Number(/^MemTotal:\s+(\d+)/.exec(meminfo)?.[1] ?? 0);
}

/** What was read last, until a command of ours may have changed it. */
let knownMounts: Mount[] | undefined;

/** Mounts of this process (proc_pid_mountinfo(5)), oldest first. */
function readMounts(): Mount[] {
  knownMounts = parseMountinfo(readText("/proc/self/mountinfo") ?? "");
  return knownMounts;
}

/** Reads the text of `/proc/PID/mountinfo`. */
export function parseMountinfo(mountinfo: string): Mount[] {
  return mountinfo.split("\n").flatMap((line) => {
    const fields = line.split(" ");
    const separator = fields.indexOf("-", 6); // after optional fields
    const [type, source, superOptions] = fields.slice(separator + 1);
    if (separator < 0 || !superOptions) return [];
    return [{
      target: unescapeOctal(fields[4]),
      type,
      source: unescapeOctal(source),
      deviceNumber: fields[2],
      superOptions: superOptions.split(","),
    }];
  });
}

function unescapeOctal(field: string): string {
  if (!field.includes("\\")) return field;
  return field.replace(
    /\\([0-7]{3})/g,
    (_, code) => String.fromCharCode(parseInt(code, 8)),
  );
}

// ---------------------------------------------------------------------------
// Decide: facts in, plan out. Nothing below touches a device.
// ---------------------------------------------------------------------------

/** All that a boot would do. */
export interface Plan {
  /**
   * Where the writable layer will be: on the data filesystem, on a tmpfs, as
   * it already is (`mounted`), or on a tmpfs because it was asked for (`off`).
   */
  mode: "persistent" | "volatile" | "mounted" | "off";
  /** Why, in one sentence. */
  reason: string;
  /** Headers and magic names to take away from devices that hold data. */
  disarm: BlockDevice[];
  /** Disks whose partitions have to be shown to the kernel. */
  nodes: BlockDevice[];
  create?: NewFilesystem;
  mount?: DataFilesystem;
  /** Magic devices that are to join the data filesystem. */
  join: NewMember[];
  /** What is late, where that is not a member of what is mounted. */
  waitFor?: string;
  /** Swap areas on the disks of the members; no others are ours. */
  swap: BlockDevice[];
  warnings: string[];
  errors: string[];
}

/** A data filesystem to be made. */
export interface NewFilesystem {
  members: NewMember[];
  dataProfile: string;
  metadataProfile: string;
}

/** A magic disk or partition, and what becomes of it. */
export interface NewMember {
  device: BlockDevice;
  /** Size of its swap partition, 0 for none. */
  swapBytes: number;
  swapPath?: string;
  dataPath: string;
  dataBytes: number;
}

/** A data filesystem that is there. */
export interface DataFilesystem {
  fsid: string;
  members: BlockDevice[];
  /** How many devices are not there or must not be used. */
  missing: number;
  /** The device that an interrupted `btrfs replace` was writing to. */
  replaceTarget?: BlockDevice;
  /** Members that missed writes: they are wiped and rebuilt. */
  stale: BlockDevice[];
  /** Devices of this filesystem that the kernel must not see. */
  excluded: BlockDevice[];
  /** A member has missed writes, and no mark says which. */
  needsScrub: boolean;
  /** Just made: marked, and with all that a boot mounts. */
  isNew?: boolean;
  /** Disks that became larger than their partition table knows. */
  grow: BlockDevice[];
  /** Disks whose primary table is to be restored from the backup. */
  repair: BlockDevice[];
}

/**
 * Decides what a boot does.
 *
 * @param facts What was found.
 * @param settings What was asked for.
 * @returns The plan. Whatever is wrong with a device is said in it.
 */
export function decide(facts: Facts, settings: Settings): Plan {
  const plan: Plan = {
    mode: "volatile",
    reason: "no disk is enabled",
    disarm: [],
    nodes: [],
    join: [],
    swap: [],
    warnings: [],
    errors: [],
  };
  if (facts.mounted) {
    plan.mode = "mounted";
    plan.reason = `"${facts.mounted.target}" is already there, on ` +
      `${facts.mounted.source} (${facts.mounted.type})`;
  } else if (settings.off) {
    plan.mode = "off";
    plan.reason = "the kernel command line says lightwhale.persistence=off";
    return plan;
  }
  const usable = facts.devices.filter((device) => !isHeld(device));
  warnOfMisplacedHeaders(usable, plan);

  const filesystems = findDataFilesystems(usable);
  const isOurs = (device: BlockDevice) =>
    filesystems.some((data) => allDevices(data).includes(device));
  const chosen = facts.mounted
    ? filesystems.find((data) => isMountedAs(data, facts.mounted!))
    : chooseDataFilesystem(filesystems, settings, plan);
  const magic = findMagicDevices(usable);
  const forgotten = magic
    .filter((device) => partsOf(device, usable).some(isOurs));
  const target = chosen?.replaceTarget; // marked until it has taken its place
  for (const device of forgotten) {
    if (target && partsOf(device, usable).includes(target)) continue;
    if (!device.readOnly) plan.disarm.push(device);
    const end = device.readOnly
      ? "the mark stays, for it is read-only"
      : `the mark is taken away (to erase it nevertheless: persistence.ts ` +
        `--enable --force ${device.path})`;
    plan.warnings.push(
      `${device.path} is marked to be formatted, but holds a data ` +
        `filesystem: the data wins and ${end}`,
    );
  }
  const candidates = magic.filter((device) => !forgotten.includes(device));
  const damaged = findDamage(usable, isOurs, magic);
  const damages = damaged.filter(({ readError }) => !readError)
    .map(describeDamage);
  plan.nodes = disksWithoutNodes(
    [...candidates, ...chosen ? allDevices(chosen) : []],
    facts.devices,
  );
  if (chosen && !settings.noSwap) plan.swap = findSwap(chosen, usable);
  const unreadable = usable.filter((device) => device.readError);
  for (const { readError } of unreadable) {
    plan.warnings.push(`${readError}: it is left alone`);
  }
  if (facts.mounted) {
    plan.mount = chosen;
    plan.warnings.push(...damages);
    const mute = unreadable.filter(({ inUse }) =>
      inUse === openIn(chosen?.fsid)
    );
    const doubtful = [...new Set([...damaged, ...mute])];
    planJoining(candidates, doubtful, facts, settings, plan);
    return plan;
  }
  if (chosen && chosen.members.length === 0) {
    plan.waitFor = `the other disks of ${pathsOf(allDevices(chosen))}`;
    plan.reason = "the data filesystem lacks its other disks";
    plan.errors.push(
      `${pathsOf(allDevices(chosen))} cannot be used alone: it is a part of ` +
        `the data filesystem ${chosen.fsid} that another disk was to be ` +
        `copied to; plug in the other disks`,
    );
    return plan;
  }
  if (chosen && chosen.members.every((member) => member.readOnly)) {
    plan.reason = "the data disk is read-only";
    plan.errors.push(
      `Cannot write to ${pathsOf(chosen.members)}, which holds the data ` +
        `filesystem: it is read-only (a locked card?); unlock it`,
    );
    return plan;
  }
  if (chosen) {
    plan.mode = "persistent";
    plan.mount = chosen;
    plan.reason = `${pathsOf(chosen.members)} ` +
      `hold${chosen.members.length > 1 ? "" : "s"} the data filesystem`;
    chosen.grow = findGrownDisks(chosen.members, facts.devices);
    chosen.repair = findDamagedTables(chosen.members, facts.devices);
    plan.warnings.push(...damages);
    planJoining(candidates, damaged, facts, settings, plan);
    return plan;
  }
  const doubtful = [...new Set([...damaged, ...unreadable])];
  if (candidates.length > 0 && doubtful.length > 0) {
    plan.errors.push(
      `${pathsOf(candidates)} will not be formatted while ` +
        `${pathsOf(doubtful)} may be a data disk that has a bad day: repair ` +
        `it, or unplug it to start anew`,
    );
    plan.reason = "a data disk may be damaged";
  } else if (unreadable.length > 0) {
    plan.errors.push(
      `${pathsOf(unreadable)} cannot be read and may be the data disk: check ` +
        `its cable and power, replace it, or unplug it`,
    );
    plan.reason = "a disk cannot be read";
  } else {
    const members = planMembers(candidates, facts, settings, plan);
    if (members.length > 0) {
      plan.create = { members, ...profilesFor(members.length) };
      plan.mode = "persistent";
      plan.reason = `${pathsOf(candidates)} asked to be formatted`;
    }
  }
  if (damages.length > 0) plan.reason = "a data disk may be damaged";
  plan.errors.push(...damages);
  return plan;
}

/**
 * Devices below an md array or a device mapper volume are not looked at for
 * data: the volume is, and the same superblock would be found twice.
 */
function isHeld(device: BlockDevice): boolean {
  return device.inUse?.startsWith("held by") ?? false;
}

/** Is it this one that is mounted, and not another in another place? */
function isMountedAs(data: DataFilesystem, { type, source }: Mount): boolean {
  return type === "btrfs" &&
    data.members.some((member) => isOpen(member) && member.path === source);
}

/** The kernel has it open as a member of its filesystem. */
function isOpen({ inUse, btrfs }: BlockDevice): boolean {
  return inUse === openIn(btrfs?.fsid);
}

const openIn = (fsid?: string) => `part of the mounted Btrfs ${fsid}`;

function warnOfMisplacedHeaders(devices: BlockDevice[], plan: Plan): void {
  for (const device of devices) {
    if (!device.header || device.kind === "disk") continue;
    plan.warnings.push(
      `${device.path} begins with the magic header, which counts only at the ` +
        `start of a whole disk: it is not obeyed (a partition is enabled ` +
        `with persistence.ts --enable ${device.path})`,
    );
  }
}

/** Whole disks with the header, and partitions with the magic name. */
function findMagicDevices(devices: BlockDevice[]): BlockDevice[] {
  return devices.filter((device) =>
    device.kind === "disk" ? device.header : device.partitionName === MAGIC
  );
}

/** The device itself and, of a whole disk, its partitions. */
function partsOf(device: BlockDevice, devices: BlockDevice[]): BlockDevice[] {
  return device.kind === "partition"
    ? [device]
    : devices.filter((other) => other.disk === device.disk);
}

const pathsOf = (devices: BlockDevice[]) =>
  devices.map((device) => device.path).join(", ");

/** Groups devices by filesystem and sorts out who may be mounted together. */
export function findDataFilesystems(devices: BlockDevice[]): DataFilesystem[] {
  const groups = new Map<string, BlockDevice[]>();
  for (const device of devices) {
    if (!device.btrfs?.intact) continue;
    const group = groups.get(device.btrfs.fsid) ?? [];
    groups.set(device.btrfs.fsid, [...group, device]);
  }
  return [...groups.values()]
    .filter((group) => group.some(({ btrfs }) => btrfs?.label === DATA))
    .map((group) => sortOutMembers(withoutJoining(group, devices)));
}

/**
 * Leaves out a device that was about to join when the power went, and is still
 * marked to do so: nothing but the commit of its joining is on it.
 */
function withoutJoining(
  group: BlockDevice[],
  devices: BlockDevice[],
): BlockDevice[] {
  const only = findOnlyMember(group);
  if (!only || group.length === 1) return group;
  const marked = findMagicDevices(devices)
    .flatMap((device) => partsOf(device, devices));
  return group.filter((device) =>
    device.btrfs?.numDevices !== 2 || !marked.includes(device) ||
    generationOf(device) !== generationOf(only) + 1
  );
}

/**
 * The device that says that it is the only one of its filesystem, and has all
 * commits but perhaps the last: that one was to add or to remove the other, and
 * the power went before both had its superblock. As it is, Linux (6.18) mounts
 * it only alone: others it takes for clones of it (fs/btrfs/volumes.c,
 * find_fsid_by_device()).
 */
function findOnlyMember(devices: BlockDevice[]): BlockDevice | undefined {
  const highest = Math.max(...devices.map(generationOf));
  return devices.find((device) =>
    device.btrfs?.numDevices === 1 && highest - generationOf(device) <= 1
  );
}

const generationOf = (device: BlockDevice) => device.btrfs?.generation ?? 0;
const epochOf = (device: BlockDevice) => device.mark?.epoch ?? 0;
const devidOf = (device: BlockDevice) => device.btrfs?.devid ?? 0;

function newest(devices: BlockDevice[]): BlockDevice {
  return devices.reduce((best, device) =>
    generationOf(device) > generationOf(best) ? device : best
  );
}

/**
 * Was anything written to `writer` while `other` was not there?
 *
 * A member that dropped out of a mounted filesystem is told by its generation:
 * all members get the superblock of one commit before the next commit begins
 * (fs/btrfs/disk-io.c, write_all_supers()), so that a power cut leaves them one
 * apart at most. One that was not there at a mount is told by the marks; a
 * mount that failed, or lost its power before a commit, has written nothing.
 */
function wroteWithout(writer: BlockDevice, other: BlockDevice): boolean {
  const { mark, btrfs } = writer;
  if (!mark || !btrfs || !other.mark) return false;
  const lastTogether = other.mark.absent[mark.member] ?? generationOf(other);
  if (btrfs.generation - lastTogether > 1) return true;
  if (mark.present.includes(other.mark.member)) return false;
  const together = mark.absent[other.mark.member] ?? -1;
  // A mount replays a log and commits: one that both have is from before it.
  const logged = btrfs.hasLog && !other.btrfs?.hasLog;
  return btrfs.generation > together || logged;
}

/**
 * Sorts the devices of one filesystem; the marks prove what is stale. Of one
 * that is mounted the kernel knows best: its superblocks are of different
 * commits, as they were read one after the other.
 */
function sortOutMembers(devices: BlockDevice[]): DataFilesystem {
  const excluded: BlockDevice[] = [];
  // Two devices with the same devid: a clone, or a member that came back after
  // it was replaced. Marks tell; failing them the newer; then a fixed order.
  const latest = devices.reduce((a, b) => epochOf(b) > epochOf(a) ? b : a);
  const isCurrent = (device: BlockDevice) =>
    device.mark && latest.mark?.present.includes(device.mark.member) ? 1 : 0;
  const ranked = [...devices].sort((a, b) =>
    Number(isOpen(b)) - Number(isOpen(a)) ||
    isCurrent(b) - isCurrent(a) || epochOf(b) - epochOf(a) ||
    generationOf(b) - generationOf(a) ||
    byName(a, b)
  );
  const byDevid = new Map<number, BlockDevice>();
  for (const device of ranked) {
    if (byDevid.has(devidOf(device))) excluded.push(device);
    else byDevid.set(devidOf(device), device);
  }
  // A replace that has not finished has devid 0 on its target.
  const replaceTarget = byDevid.get(0);
  byDevid.delete(0);

  const all = [...byDevid.values()];
  const isBehind = (device: BlockDevice, other: BlockDevice) =>
    !isOpen(device) && wroteWithout(other, device) &&
    !wroteWithout(device, other);
  const current = all.filter((device) =>
    !all.some((other) => isBehind(device, other))
  );
  const open = all.filter(isOpen);
  const only = findOnlyMember(all);
  const side = open.length > 0 ? open : only ? [only] : pickSide(current);
  excluded.push(...current.filter((device) => !side.includes(device)));
  const stale = all.filter((device) =>
    side.some((other) => isBehind(device, other))
  );
  const members = all
    .filter((device) => !excluded.includes(device) && !stale.includes(device))
    .sort((a, b) => devidOf(a) - devidOf(b));
  const top = newest(members.length > 0 ? members : devices);
  const missing = Math.max(0, (top.btrfs?.numDevices ?? 0) - members.length);
  // No room for it: it was replaced or removed while it was away.
  if (missing === 0) excluded.push(...stale.splice(0));
  return {
    fsid: devices[0].btrfs!.fsid,
    members,
    missing,
    replaceTarget,
    stale,
    excluded,
    needsScrub: open.length === 0 &&
      members.some((member) => generationOf(member) < generationOf(top)),
    grow: [],
    repair: [],
  };
}

/**
 * Of a mirror whose halves were each written alone, the half to use: most
 * members, then the higher epoch, then the lower devid. Without a split, all.
 */
function pickSide(members: BlockDevice[]): BlockDevice[] {
  const isSplit = (a: BlockDevice, b: BlockDevice) =>
    wroteWithout(a, b) && wroteWithout(b, a);
  const friends = (device: BlockDevice) =>
    members.filter((other) => !isSplit(device, other)).length;
  const side: BlockDevice[] = [];
  const ranked = [...members].sort((a, b) =>
    friends(b) - friends(a) || epochOf(b) - epochOf(a) ||
    devidOf(a) - devidOf(b)
  );
  for (const device of ranked) {
    if (!side.some((other) => isSplit(device, other))) side.push(device);
  }
  return side;
}

function allDevices(data: DataFilesystem): BlockDevice[] {
  const target = data.replaceTarget ? [data.replaceTarget] : [];
  return [...data.members, ...data.stale, ...target, ...data.excluded];
}

/**
 * Chooses among several data filesystems by a rule that gives the same answer
 * at the next boot: the one asked for; one that can be mounted, if only
 * degraded; the one mounted most often, so that an old disk that is plugged in
 * when another fails does not take over; a whole one; the lower UUID.
 */
function chooseDataFilesystem(
  filesystems: DataFilesystem[],
  settings: Settings,
  plan: Plan,
): DataFilesystem | undefined {
  const epoch = (data: DataFilesystem) =>
    Math.max(0, ...data.members.map(epochOf));
  const asked = (data: DataFilesystem) =>
    data.fsid === settings.dataUuid ? 1 : 0;
  const usable = ({ members, missing }: DataFilesystem) =>
    members.length > 0 && missing <= 1 ? 1 : 0;
  const [chosen, ...others] = [...filesystems].sort((a, b) =>
    asked(b) - asked(a) || usable(b) - usable(a) || epoch(b) - epoch(a) ||
    Math.sign(a.missing) - Math.sign(b.missing) ||
    (a.fsid < b.fsid ? -1 : 1)
  );
  if (settings.dataUuid && (!chosen || !asked(chosen))) {
    plan.warnings.push(
      `No data filesystem has the UUID ${settings.dataUuid} that the kernel ` +
        `command line asks for (lightwhale.data): another one may be used`,
    );
  }
  for (const other of others) {
    plan.warnings.push(
      `There is more than one data filesystem: ${chosen.fsid} on ` +
        `${pathsOf(chosen.members)} is used, ${other.fsid} on ` +
        `${pathsOf(allDevices(other))} is not touched (to use it instead: ` +
        `lightwhale.data=${other.fsid} on the kernel command line)`,
    );
  }
  if (!chosen) return undefined;
  for (const device of chosen.excluded) {
    plan.warnings.push(describeExcluded(device, chosen));
  }
  if (chosen.missing > 0) {
    plan.warnings.push(
      `The data filesystem lacks ${chosen.missing} of ` +
        `${chosen.missing + chosen.members.length} devices: it runs without ` +
        `redundancy, degraded` +
        (chosen.stale.length > 0
          ? `; ${pathsOf(chosen.stale)} missed writes and is rebuilt`
          : chosen.replaceTarget
          ? `; ${chosen.replaceTarget.path} is taking the missing place`
          : ` (plug in the missing disk, or a new one marked with ` +
            `persistence.ts --enable)`),
    );
  }
  return chosen;
}

/** Says why a device is not used, and how to choose otherwise. */
function describeExcluded(
  device: BlockDevice,
  { members, missing }: DataFilesystem,
): string {
  const { path } = device;
  const used = pathsOf(members);
  const same = members.find((member) => devidOf(member) === devidOf(device));
  if (!same && missing > 0 && members.some(isOpen)) {
    return `${path} came back after the mount: the next boot takes it in or ` +
      `rebuilds it`;
  }
  const why = same
    ? `is a copy of ${same.path}, or was replaced by it`
    : findOnlyMember(members)
    ? `did not finish joining, or was removed`
    : members.every((member) => wroteWithout(device, member))
    ? `and ${used} were each written without the other`
    : `was replaced while it was away`;
  return `${path} ${why}: ${used} is used, ${path} is not touched (to use it ` +
    `instead, unplug ${used}; to give it up and mirror anew: ` +
    `persistence.ts --enable --force ${nodeOf(device.disk)})`;
}

/** How many devices are not even stale: they are not there. */
function countAbsent(data: DataFilesystem): number {
  const present = data.stale.length + (data.replaceTarget ? 1 : 0);
  return Math.max(0, data.missing - present);
}

function findSwap(data: DataFilesystem, devices: BlockDevice[]): BlockDevice[] {
  const disks = new Set(
    data.members.filter((m) => m.kind === "partition").map((m) => m.disk),
  );
  return devices.filter((device) =>
    disks.has(device.disk) && device.swapLabel === SWAP && !device.inUse
  );
}

function disksWithoutNodes(
  devices: BlockDevice[],
  all: BlockDevice[],
): BlockDevice[] {
  return all.filter((disk) =>
    disk.kind === "disk" &&
    devices.some((device) => !device.hasNode && device.disk === disk.name)
  );
}

/**
 * A disk is larger than before when the backup table is not at its end; free
 * space behind the last partition alone may be there on purpose.
 */
function findGrownDisks(
  members: BlockDevice[],
  devices: BlockDevice[],
): BlockDevice[] {
  return members.filter((member) => {
    const disk = devices.find((device) => device.name === member.disk);
    if (member.kind !== "partition" || !disk?.gpt) return false;
    if (disk.readOnly || disk.gpt.primaryDamaged) return false;
    const ends = disk.gpt.partitions.map((p) => p.startBytes + p.sizeBytes);
    const end = member.startBytes + member.sizeBytes;
    return end === Math.max(...ends) &&
      disk.sizeBytes - disk.gpt.endBytes >= MiB;
  });
}

function findDamagedTables(
  members: BlockDevice[],
  devices: BlockDevice[],
): BlockDevice[] {
  return devices.filter((disk) =>
    disk.gpt?.primaryDamaged && !disk.readOnly &&
    members.some((member) => member.disk === disk.name)
  );
}

/** Traces of a data disk that cannot be used: damage is not emptiness. */
function findDamage(
  devices: BlockDevice[],
  isOurs: (device: BlockDevice) => boolean,
  magic: BlockDevice[],
): BlockDevice[] {
  return devices.filter((device) => {
    const parts = partsOf(device, devices);
    const disk = devices.find((other) => other.name === device.disk);
    if (isOurs(device) || magic.includes(device)) return false;
    if (disk && magic.includes(disk)) return false;
    if (device.btrfs && !device.btrfs.intact && device.btrfs.label === DATA) {
      return true;
    }
    if (device.backupLabel === DATA && !device.btrfs) return true;
    if (device.partitionName === DATA) return true;
    // A disk of which only the swap partition is left.
    return device.kind === "disk" && !parts.some(isOurs) &&
      parts.some((part) => part.partitionName === SWAP) &&
      !parts.some((part) => part.partitionName === DATA);
  });
}

function describeDamage(device: BlockDevice): string {
  const why = device.btrfs
    ? `its superblock is damaged`
    : device.backupLabel === DATA
    ? `only a backup superblock is left`
    : device.partitionName === DATA
    ? `it has the partition name but no usable filesystem`
    : `it has a "${SWAP}" partition but no data partition`;
  return `${device.path} seems to have been a "${DATA}" disk, but ${why}: it ` +
    `is not touched (try "btrfs rescue super-recover ${device.path}"; to give ` +
    `it up: persistence.ts --enable --force ${nodeOf(device.disk)})`;
}

/**
 * The profiles for a number of devices (mkfs.btrfs(8), PROFILES). `raid1`
 * survives the loss of one device; more copies of the metadata cost little.
 */
export function profilesFor(
  devices: number,
): { dataProfile: string; metadataProfile: string } {
  if (devices === 1) return { dataProfile: "single", metadataProfile: "dup" };
  const metadataProfile = ["raid1", "raid1c3"][devices - 2] ?? "raid1c4";
  return { dataProfile: "raid1", metadataProfile };
}

/** Lays out each magic device, or leaves it out with its reason. */
function planMembers(
  magic: BlockDevice[],
  facts: Facts,
  settings: Settings,
  plan: Plan,
): NewMember[] {
  const members: NewMember[] = [];
  for (const device of magic) {
    const member = layOut(device, facts.memoryBytes, settings.noSwap);
    const parts = partsOf(device, facts.devices);
    const user = parts.find((part) => part.inUse);
    const mute = parts.find((part) => part.readError);
    const why = mute
      ? `${mute.path} cannot be read`
      : device.readOnly
      ? "it is read-only"
      : user
      ? `${user.path} is ${user.inUse}`
      : member.dataBytes < MINIMUM_DATA_BYTES
      ? `it is too small (${inMiB(device.sizeBytes)}; Btrfs needs ` +
        `${inMiB(MINIMUM_DATA_BYTES)} for data)`
      : facts.tooSmall.has(device.path)
      ? `it is too small beside the others (${inMiB(device.sizeBytes)})`
      : magic.some((other) => other !== device && other.name === device.disk)
      ? `its whole disk is marked too`
      : undefined;
    if (!why) members.push(member);
    else plan.errors.push(`Cannot format ${device.path}: ${why}`);
  }
  return members;
}

/** Partition sizes of a new member; a magic partition is used as it is. */
export function layOut(
  device: BlockDevice,
  memoryBytes: number,
  noSwap: boolean,
): NewMember {
  if (device.kind === "partition") {
    const dataBytes = device.sizeBytes;
    return { device, swapBytes: 0, dataPath: device.path, dataBytes };
  }
  const largest = Math.min(memoryBytes, 4 * GiB, device.sizeBytes / 8);
  const swapBytes = noSwap || device.sizeBytes < MINIMUM_DISK_FOR_SWAP_BYTES
    ? 0
    : Math.floor(largest / MiB) * MiB;
  // 1 MiB before the first partition; the backup table behind the last one,
  // which sfdisk lets end at a whole MiB.
  const endBytes = device.sizeBytes - GPT.entriesArea - device.sectorBytes;
  return {
    device,
    swapBytes,
    swapPath: swapBytes > 0 ? partitionPath(device, 1) : undefined,
    dataPath: partitionPath(device, swapBytes > 0 ? 2 : 1),
    dataBytes: Math.floor(endBytes / MiB) * MiB - swapBytes - MiB,
  };
}

const inMiB = (bytes: number) => `${Math.floor(bytes / MiB)} MiB`;

/** Adds the magic devices that join the data filesystem in use. */
function planJoining(
  candidates: BlockDevice[],
  doubtful: BlockDevice[],
  facts: Facts,
  settings: Settings,
  plan: Plan,
): void {
  if (candidates.length === 0) return;
  if (!plan.mount) {
    plan.warnings.push(
      `${pathsOf(candidates)} is marked to be formatted: that happens at the ` +
        `next boot`,
    );
  } else if (doubtful.length > 0) {
    plan.warnings.push(
      `${pathsOf(candidates)} does not join the data filesystem while ` +
        `${pathsOf(doubtful)} may be a data disk that has a bad day`,
    );
  } else {
    const sizes = sizesOf(plan.mount);
    const largestFirst = planMembers(candidates, facts, settings, plan)
      .sort((a, b) => b.dataBytes - a.dataBytes);
    for (const member of largestFirst) {
      const problem = whyTooSmall(member.dataBytes, sizes) ??
        whyNotMirrored(plan.mount, [...sizes, member.dataBytes]);
      if (!problem) {
        plan.join.push(member);
        sizes.push(member.dataBytes);
        continue;
      }
      plan.warnings.push(
        `${member.device.path} does not join the data filesystem: ${problem}`,
      );
    }
  }
}

/**
 * Why a device has no room for all kinds of chunks beside the others: metadata
 * and system chunks get a copy on each, up to the fourth. Where one does not
 * fit, Linux (6.18) aborts a conversion, and the filesystem gets read-only.
 */
function whyTooSmall(bytes: number, others: number[]): string | undefined {
  const smallest = Math.min(...others);
  const chunks = 3 * largestChunkBytes([bytes, ...others]) + 64 * MiB;
  const neededBytes = Math.min(smallest, Math.max(chunks, smallest / 16));
  if (bytes >= neededBytes) return undefined;
  return `it has ${inMiB(bytes)} for data, and needs ` +
    `${inMiB(neededBytes)}: use a larger disk`;
}

/**
 * Why devices of these sizes cannot mirror what is used. The kernel would fill
 * up the smaller, and then have no room for any write, whatever is free on the
 * others (fs/btrfs/volumes.c, btrfs_alloc_chunk()).
 *
 * @param spareBytes What has to be left.
 */
function whyNotMirrored(
  { members }: DataFilesystem,
  sizesBytes: number[],
  spareBytes = largestChunkBytes(sizesBytes),
): string | undefined {
  const usedBytes = newest(members).btrfs!.usedBytes;
  const totalBytes = sum(sizesBytes);
  const mirroredBytes = -spareBytes +
    Math.min(totalBytes / 2, totalBytes - Math.max(...sizesBytes));
  if (usedBytes <= mirroredBytes) return undefined;
  return `${inMiB(usedBytes)} are used, and it could mirror only ` +
    `${inMiB(Math.max(0, mirroredBytes))}: use a larger disk, or delete ` +
    `something`;
}

const sizesOf = ({ members }: DataFilesystem) =>
  members.map((member) => member.btrfs!.deviceBytes);

/** A tenth of the filesystem, at most 1 GiB (fs/btrfs/volumes.c). */
const largestChunkBytes = (devicesBytes: number[]) =>
  Math.min(GiB, sum(devicesBytes) / 10);

const sum = (numbers: number[]) => numbers.reduce((a, b) => a + b, 0);

/** The plan as `--dry-run` prints it: a line for each disk that changes. */
export function describePlan(plan: Plan): string[] {
  const lines = [`${plan.mode}: ${plan.reason}`];
  for (const device of plan.disarm) {
    lines.push(`take the mark away from ${device.path}`);
  }
  for (const { device, ...member } of plan.create?.members ?? []) {
    if (device.kind === "partition") continue;
    const swap = member.swapBytes > 0
      ? `swap of ${inMiB(member.swapBytes)} on ${member.swapPath}, `
      : "";
    lines.push(
      `partition ${device.path} (${inMiB(device.sizeBytes)}): ${swap}data on ` +
        member.dataPath,
    );
  }
  if (plan.create) {
    const { members, dataProfile, metadataProfile } = plan.create;
    lines.push(
      `create "${DATA}" on ${members.map((m) => m.dataPath).join(", ")}: ` +
        `data ${dataProfile}, metadata ${metadataProfile}`,
    );
  }
  if (plan.mount && plan.mode === "persistent") {
    const { members, missing, fsid } = plan.mount;
    lines.push(
      `mount "${DATA}" (${fsid}) from ${pathsOf(members)}` +
        (missing > 0 ? `, degraded: ${missing} missing` : ""),
    );
  }
  for (const device of plan.mount?.repair ?? []) {
    lines.push(`restore the primary partition table of ${device.path}`);
  }
  for (const device of plan.mount?.grow ?? []) {
    lines.push(`grow ${device.path} to the end of its disk`);
  }
  for (const device of plan.mount?.stale ?? []) {
    lines.push(`wipe ${device.path}, which missed writes, and rebuild it`);
  }
  for (const { device } of plan.join) {
    lines.push(`let ${device.path} join the data filesystem`);
  }
  if (plan.mode === "volatile" || plan.mode === "off") {
    lines.push(`mount a tmpfs on /${DATA_MOUNT}`);
  }
  return lines;
}

// ---------------------------------------------------------------------------
// Steps 3 to 5, do: partition, wait for nodes, create the data filesystem.
// ---------------------------------------------------------------------------

/** Restores the primary partition table: sfdisk falls back to the backup. */
async function repairTable(disk: BlockDevice): Promise<void> {
  say("warning", `Restoring the primary partition table of ${disk.path}`);
  await restoreProtectiveMbr(disk);
  const dump = await ask(words`sfdisk --dump ${disk.path}`, {
    to: `read the backup partition table of ${disk.path}`,
  });
  await run(
    words`sfdisk --quiet --no-reread --no-tell-kernel
      --wipe never --wipe-partitions never ${disk.path}`,
    { to: `restore the partition table of ${disk.path}`, stdin: dump },
  );
}

/** Without a protective MBR sfdisk does not look for the backup table. */
async function restoreProtectiveMbr(disk: BlockDevice): Promise<void> {
  const mbr = await withDevice(disk.path, (read) => read(0, 512));
  if (isProtectiveMbr(mbr)) return;
  const sectors = Math.min(disk.sizeBytes / disk.sectorBytes - 1, 0xffffffff);
  mbr.fill(0, 446, 510); // boot code before it stays
  mbr.set([0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1], 446);
  viewOf(mbr).setUint32(458, sectors, true);
  mbr.set([0x55, 0xaa], 510);
  await writeBytes(disk.path, 0, mbr);
}

/** Tells the kernel what the table says: BLKPG, partition by partition. */
async function makePartitionNodes({ path }: BlockDevice): Promise<void> {
  await run(words`partx --update ${path}`, {
    to: `show the partitions of ${path} to the kernel`,
  });
}

/** Lets a partition follow its enlarged disk; moves the backup table too. */
async function growPartition(
  { path, disk, number }: BlockDevice,
): Promise<void> {
  const whole = nodeOf(disk);
  say("info", `Growing ${path} to the end of its disk`);
  await run(
    words`sfdisk --quiet --no-reread --no-tell-kernel -N ${number} ${whole}`,
    { to: `grow ${path}`, stdin: ", +\n" },
  );
  await run(words`partx --update --nr ${number} ${whole}`, {
    to: `tell the kernel the new size of ${path}`,
  });
}

/** Takes the magic header or partition name away, now or at the next boot. */
async function disarm(devices: BlockDevice[]): Promise<void> {
  await attemptEach(devices, async (device) => {
    say("info", `Taking the mark away from ${device.path}`);
    await setMark(device, DATA);
  });
}

/** Marks a device with {@linkcode MAGIC}; any other name takes that away. */
async function setMark(device: BlockDevice, name: string): Promise<void> {
  if (device.kind === "partition") await namePartition(device, name);
  else await writeHeader(device.path, name === MAGIC);
}

/** Only these 27 bytes: boot code and the protective MBR around them stay. */
async function writeHeader(path: string, marked: boolean): Promise<void> {
  const header = new TextEncoder().encode(MAGIC);
  await writeBytes(path, 0, marked ? header : header.fill(0));
}

/** Sets a GPT partition name; works on a disk in use (sfdisk(8)). */
async function namePartition(
  { path, disk, number }: BlockDevice,
  name: string,
): Promise<void> {
  await run(
    words`sfdisk --quiet --no-tell-kernel
      --part-label ${nodeOf(disk)} ${number} ${name}`,
    { to: `name ${path} "${name}"` },
  );
}

/**
 * Writes a few bytes through to the medium. A child does it, because nothing
 * ends a process that waits for a device which does not answer, and that must
 * not be this one.
 */
async function writeBytes(
  path: string,
  at: number,
  bytes: Uint8Array,
): Promise<void> {
  // dd would make a file in /dev in the place of a device that has gone.
  if (!fs.existsSync(path)) {
    throw new Error(`Cannot write to ${path}: it is gone`);
  }
  await run(
    words`dd of=${path} bs=${bytes.length} count=1 seek=${at / bytes.length}
      conv=notrunc,fsync status=none`,
    { to: `write ${bytes.length} bytes at ${at} of ${path}`, stdin: bytes },
  );
}

/**
 * Checks that mkfs.btrfs can make this filesystem, before any disk is wiped
 * for it: with small or unequal sizes it is found out by doing it on sparse
 * files of the same sizes. So it is when others were left out as too small: if
 * it fails without them too, it was not for their size.
 *
 * @returns The device that is too small, or undefined when all is well.
 * @throws {Error} When it cannot be found out.
 */
async function rehearse(
  create: NewFilesystem,
  othersLeftOut: boolean,
  root: string,
): Promise<BlockDevice | undefined> {
  const smallest = create.members.reduce((a, b) =>
    b.dataBytes < a.dataBytes ? b : a
  );
  const fits = create.members.length === 1 ||
    smallest.dataBytes >= SURELY_FITS_BYTES;
  if (fits && !othersLeftOut) return undefined;
  const { run: parent } = places(root);
  fs.mkdirSync(parent, { recursive: true });
  const directory = fs.mkdtempSync(join(parent, "rehearsal-"));
  try {
    const files = create.members.map(({ dataBytes }, index) => {
      const file = join(directory, `${index}`);
      fs.writeFileSync(file, "");
      fs.truncateSync(file, dataBytes);
      return file;
    });
    const status = await run(mkfs(create, files), {
      to: `rehearse mkfs.btrfs for ${
        pathsOf(create.members.map((m) => m.device))
      }`,
      accept: [0, 1], // 1: it says no
    });
    return status === 0 ? undefined : smallest.device;
  } finally {
    fs.rmSync(directory, { recursive: true });
  }
}

/** --force: old contents are told to go; it would refuse ext4. */
function mkfs(create: NewFilesystem, paths: string[]): string[] {
  return words`mkfs.btrfs --quiet --force --label ${UNFINISHED}
    --data ${create.dataProfile} --metadata ${create.metadataProfile} ${paths}`;
}

/** Writes the new tables; the header stays at offset 0 through all of it. */
async function partition(create: NewFilesystem): Promise<void> {
  const missing = ["wipefs", "sfdisk", "partx", "mkfs.btrfs", "btrfs", "mount"]
    .concat(create.members.some((m) => m.swapPath) ? ["mkswap"] : [])
    .filter((program) => !findProgram(program));
  if (missing.length > 0) {
    throw new Error(
      `Cannot format ${pathsOf(create.members.map((m) => m.device))}: ` +
        `"${missing[0]}" is not installed (nothing was changed)`,
    );
  }
  await allOf(create.members.map(partitionDisk));
}

async function partitionDisk(member: NewMember): Promise<void> {
  const { device, swapBytes } = member;
  if (device.kind === "partition") return;
  say("info", `Partitioning ${device.path} (${inMiB(device.sizeBytes)})`);
  // An old whole-disk signature (Btrfs at 64 KiB) would outlive a new table.
  await run(words`wipefs --quiet --all ${device.path}`, {
    to: `erase the old signatures on ${device.path}`,
  });
  const swap = `start=1MiB, size=${swapBytes / MiB}MiB, type=swap, ` +
    `name=${SWAP}\n`;
  const data = `${swapBytes > 0 ? "" : "start=1MiB, "}type=linux, name=${DATA}`;
  // --wipe never: the header has to survive until the filesystem is complete.
  // --wipe-partitions always: an old filesystem must not come back to life
  // where a new partition happens to start at an old place; sfdisk does that,
  // and an fsync, before it writes the table.
  await run(
    words`sfdisk --quiet --no-tell-kernel
      --wipe never --wipe-partitions always ${device.path}`,
    {
      to: `write a partition table to ${device.path}`,
      stdin: `label: gpt\n${swapBytes > 0 ? swap : ""}${data}\n`,
    },
  );
}

/** Shows new partitions to the kernel and waits for their device nodes. */
async function waitForPartitions(members: NewMember[]): Promise<void> {
  await allOf(members.map(async ({ device, swapPath, dataPath }) => {
    if (device.kind === "partition") return;
    await makePartitionNodes(device);
    await waitForNode(dataPath);
    if (swapPath) await waitForNode(swapPath);
  }));
}

async function waitForNode(path: string): Promise<void> {
  const giveUpAt = Date.now() + TIMEOUT.nodeMs;
  while (!isBlockDevice(path)) {
    if (Date.now() > giveUpAt) {
      throw new Error(
        `Cannot find ${path}: its node did not appear in ` +
          `${TIMEOUT.nodeMs / 1000} s (is /dev a devtmpfs?)`,
      );
    }
    await sleep(20);
  }
}

function isBlockDevice(path: string): boolean {
  return attemptNow(() => fs.statSync(path).isBlockDevice()) ?? false;
}

/**
 * Makes swap and the data filesystem with all that a boot mounts, and commits
 * it by its label. The top level stays mounted until all the rest is: to open
 * the filesystem once more takes longer.
 */
async function createDataFilesystem(
  create: NewFilesystem,
  place: Places,
): Promise<DataFilesystem> {
  const paths = create.members.map((member) => member.dataPath);
  say(
    "info",
    `Creating "${DATA}" on ${paths.join(", ")}: data ${create.dataProfile}, ` +
      `metadata ${create.metadataProfile}`,
  );
  await allOf([
    run(mkfs(create, paths), {
      to: `create the data filesystem on ${paths.join(", ")}`,
      timeoutMs: TIMEOUT.mkfsMs,
    }),
    ...create.members.map(({ swapPath }) => swapPath && makeSwap(swapPath)),
  ]);
  const top = place.topLevel;
  const [members] = await allOf([
    verifySuperblocks(paths, UNFINISHED)
      .then((superblocks) => markNew(create, superblocks)),
    mountTopLevel(paths, [], place),
  ]);
  const subvolumes = Object.values(SUBVOLUMES)
    .map((name) => createSubvolume(join(top, name), paths));
  await allOf(subvolumes);
  for (const name of [STATE, SNAPSHOTS]) {
    fs.mkdirSync(join(top, SUBVOLUMES.data, name));
  }
  await allOf([
    makeUppers(OVERLAYS, join(top, SUBVOLUMES.state), place),
    // It commits a transaction (fs/btrfs/ioctl.c, btrfs_ioctl_set_fslabel()),
    // and with it the subvolumes: the label never comes without them.
    run(words`btrfs filesystem label ${top} ${DATA}`, {
      to: `label the data filesystem on ${paths.join(", ")}`,
    }),
  ]);
  await verifySuperblocks(paths, DATA);
  return { ...sortOutMembers(members), isNew: true };
}

/** The members of a filesystem that was made, marked. */
async function markNew(
  create: NewFilesystem,
  superblocks: Superblock[],
): Promise<BlockDevice[]> {
  const members = create.members
    .map((member, i) => ({ ...dataDevice(member), btrfs: superblocks[i] }));
  const unmarked = await markMembers(members, superblocks[0].fsid);
  assert(
    unmarked.length === 0,
    `Cannot mark ${pathsOf(unmarked)}: the disk may be broken`,
  );
  return members;
}

/** The device that holds the data of a new member. */
function dataDevice({ device, dataPath }: NewMember): BlockDevice {
  return { ...device, path: dataPath, mark: undefined };
}

/** The swap areas of a filesystem that was made. */
function swapOf({ members }: NewFilesystem): BlockDevice[] {
  return members.flatMap(({ device, swapPath }) =>
    swapPath ? [{ ...device, path: swapPath }] : []
  );
}

async function makeSwap(path: string): Promise<void> {
  await run(words`mkswap --label ${SWAP} ${path}`, {
    to: `make swap on ${path}`,
  });
  const page = await withDevice(path, (read) => read(0, 4 * KiB));
  assert(
    parseSwapLabel(page) === SWAP,
    `Cannot find swap on ${path} after making it`,
  );
}

async function createSubvolume(
  path: string,
  devices: string[],
): Promise<void> {
  await run(words`btrfs subvolume create ${path}`, {
    to: `create the subvolume ${basename(path)} on ${devices.join(", ")}`,
  });
  assert(
    isSubvolume(path),
    `Cannot find the subvolume ${basename(path)} on ${devices.join(", ")} ` +
      `after making it`,
  );
}

/** Reads back what mkfs or a label was to achieve, on every member. */
async function verifySuperblocks(
  paths: string[],
  label: string,
): Promise<Superblock[]> {
  return await allOf(paths.map(async (path) => {
    const found = await superblockOf(path);
    if (
      !found?.intact || found.label !== label ||
      found.numDevices !== paths.length
    ) {
      throw new Error(
        `Cannot find a Btrfs of ${paths.length} device(s) labelled ` +
          `"${label}" on ${path} after making it: the disk may be broken`,
      );
    }
    return found;
  }));
}

/** Mounts the top level of a filesystem for the time of a function. */
async function withTopLevel(
  paths: string[],
  options: string[],
  place: Places,
  use: (directory: string) => Promise<void>,
): Promise<void> {
  await mountTopLevel(paths, options, place);
  try {
    await use(place.topLevel);
  } finally {
    await unmount(place.topLevel);
  }
}

async function mountTopLevel(
  paths: string[],
  options: string[],
  place: Places,
): Promise<void> {
  fs.mkdirSync(place.topLevel, { recursive: true });
  await mountBtrfs(paths, ["subvolid=5", ...options], place.topLevel);
}

// ---------------------------------------------------------------------------
// Step 6: mount the data filesystem, or a tmpfs.
// ---------------------------------------------------------------------------

async function mountDataFilesystem(
  data: DataFilesystem,
  place: Places,
): Promise<void> {
  if (data.isNew) await mountNew(data, place);
  if (!mountedOn(place.data)) {
    for (const member of data.members) {
      await waitForNode(member.path).catch((error) => {
        leaveOut([member], messageOf(error), data);
      });
    }
    await mountMembers(data, place);
    await growFilesystem(data.members, place);
  }
  await mountTheUsual(data, place);
  await mountSubvolume("state", data, place);
  await mountSubvolume("snapshots", data, place);
}

/** Mounts what was just made: all of it is there, and nothing to decide. */
async function mountNew(data: DataFilesystem, place: Places): Promise<void> {
  for (const path of [place.data, ...lowersOf(place)]) {
    fs.mkdirSync(path, { recursive: true });
  }
  await mountFromTable(
    [subvolumeEntry("data", data, place), ...usualEntries(data, place)],
    place,
  );
}

/**
 * Mounts all that a disk of ours has, by one process. What is not there, or no
 * more, is left to the functions that follow.
 */
async function mountTheUsual(
  data: DataFilesystem,
  place: Places,
): Promise<void> {
  const both = [place.state, place.snapshots];
  if (!both.every(isFree)) return; // set up, or older
  for (const directory of [...both, ...lowersOf(place)]) {
    fs.mkdirSync(directory, { recursive: true });
  }
  await mountFromTable(usualEntries(data, place), place, "debug");
}

const lowersOf = (place: Places) =>
  OVERLAYS.map((name) => join(place.lower, name));

/** fstab(5) entries of what lies above the data mount. */
function usualEntries(data: DataFilesystem, place: Places): string[][] {
  return [
    subvolumeEntry("state", data, place),
    subvolumeEntry("snapshots", data, place),
    ...OVERLAYS.filter((name) => !isOverlaid(name, place))
      .flatMap((name) => overlayEntries(name, place)),
  ];
}

function subvolumeEntry(
  which: keyof typeof SUBVOLUMES,
  { members }: DataFilesystem,
  place: Places,
): string[] {
  const [first, ...others] = members.map((member) => member.path);
  const devices = others.map((path) => `device=${path}`);
  const options = [`subvol=/${SUBVOLUMES[which]}`, ...devices];
  return [first, place[which], "btrfs", options.join()];
}

/** May something be mounted here? Not over data, nor over a subvolume. */
function isFree(target: string): boolean {
  return !mountedOn(target) && listDirectory(target).length === 0 &&
    !isSubvolume(target);
}

/** Lets the filesystem follow partitions that are larger than it knows. */
async function growFilesystem(
  members: BlockDevice[],
  place: Places,
): Promise<void> {
  for (const member of members) {
    const sizeBytes = readSysfsBytes(nameOf(member.path), "size");
    if (sizeBytes - (member.btrfs?.deviceBytes ?? sizeBytes) < MiB) continue;
    const id = devidOf(member);
    await attempt(() =>
      run(words`btrfs filesystem resize ${id}:max ${place.data}`, {
        to: `grow the data filesystem on ${member.path}`,
      })
    );
  }
}

/**
 * Marks the members that are present, before a read-write mount. Called with
 * all members that will be written to, and no others.
 *
 * @returns The members that could not be written to.
 * @throws {Error} When none could.
 */
async function markMembers(
  members: BlockDevice[],
  fsid: string,
): Promise<BlockDevice[]> {
  const epoch = Math.max(...members.map(epochOf)) + 1;
  const marks = members.map((device) => ({
    device,
    member: device.mark?.member ?? crypto.randomUUID(),
  }));
  const present = marks.map(({ member }) => member);
  const failed: BlockDevice[] = [];
  await Promise.all(marks.map(async ({ device, member }) => {
    const absent = absentSince(device, present);
    const mark = { fsid, member, epoch, present, absent };
    const slot = MARK.slotsAt[epoch % MARK.slotsAt.length];
    try {
      await writeBytes(device.path, slot, formatMark(mark));
      device.mark = mark;
    } catch (error) {
      failed.push(device);
      if (failed.length === members.length) throw error;
      say("warning", messageOf(error));
    }
  }));
  return failed;
}

/** Who is not present, and the generation when this device last saw it. */
function absentSince(
  { mark, btrfs }: BlockDevice,
  present: string[],
): Record<string, number> {
  if (!mark || !btrfs) return {};
  const seen = mark.present.map((id) => [id, btrfs.generation] as const);
  const gone = [...Object.entries(mark.absent), ...seen]
    .filter(([id]) => !present.includes(id));
  return Object.fromEntries(gone.slice(-16)); // a block has room for so many
}

/** Goes on without some members. */
function leaveOut(
  devices: BlockDevice[],
  why: string,
  data: DataFilesystem,
): void {
  say("warning", `${why}: going on without`);
  data.members = data.members.filter((member) => !devices.includes(member));
  data.missing += devices.length;
  assert(data.members.length > 0, "No device of the data filesystem is left");
}

async function mountMembers(
  data: DataFilesystem,
  place: Places,
): Promise<void> {
  const unwanted = [...data.excluded, ...data.stale];
  if (unwanted.length > 0) await forget(unwanted);
  fs.mkdirSync(place.data, { recursive: true });
  const mountWith = async (
    devices: BlockDevice[],
    degraded = data.missing > 0,
  ): Promise<void> => {
    const dead = await markMembers(devices, data.fsid);
    if (dead.length > 0) {
      leaveOut(dead, `${pathsOf(dead)} cannot be written to`, data);
      return await mountWith(devices.filter((d) => !dead.includes(d)), true);
    }
    const paths = devices.map((device) => device.path);
    const options = degraded ? ["degraded"] : [];
    await mountDataSubvolume(paths, options, place);
  };
  const target = data.replaceTarget ? [data.replaceTarget] : [];
  try { // an interrupted replace goes on, if its target is named
    await mountWith(
      data.missing > 0 ? [...data.members, ...target] : data.members,
    );
  } catch (error) {
    if (error instanceof NoAnswer) throw error;
    // The source of an interrupted replace may still be there: the kernel then
    // mounts only degraded, though nothing is missing. Or no replace knows the
    // target any more, or yet: it is freed later, or another replace begins.
    if (data.missing > 0 && target.length === 0) throw error; // it is neither
    say("warning", messageOf(error));
    await mountWith([...data.members, ...target], true).catch(async (again) => {
      if (again instanceof NoAnswer || target.length === 0) throw error;
      await forget(target);
      await mountWith(data.members, true);
    }).catch(() => Promise.reject(error));
  }
  if (mountedOn(place.data)?.superOptions.includes("ro")) {
    throw new Error(
      `Cannot write to the data filesystem on ${pathsOf(data.members)}: the ` +
        `kernel mounted it read-only (see dmesg and "btrfs check")`,
    );
  }
}

/** The kernel would bring in what it has scanned, named or not. */
async function forget(devices: BlockDevice[]): Promise<void> {
  await run(words`btrfs device scan --forget`, {
    to: `make the kernel forget ${pathsOf(devices)}`,
  });
}

/**
 * Mounts `@lightwhale-data`, or the top level of a disk made by hand that
 * keeps its state there; makes the subvolume where there is neither.
 */
async function mountDataSubvolume(
  paths: string[],
  options: string[],
  place: Places,
): Promise<void> {
  const subvolume = [`subvol=/${SUBVOLUMES.data}`, ...options];
  let atTopLevel = false;
  try {
    return await mountBtrfs(paths, subvolume, place.data);
  } catch (error) {
    if (error instanceof NoAnswer) throw error;
    // Is it the filesystem, or only the subvolume that is not there?
    let known = true;
    await withTopLevel(paths, options, place, async (top) => {
      known = fs.existsSync(join(top, SUBVOLUMES.data));
      if (known) return;
      atTopLevel = fs.existsSync(join(top, basename(place.state)));
      if (!atTopLevel) await createSubvolume(join(top, SUBVOLUMES.data), paths);
    }).catch((error) => say("debug", messageOf(error)));
    if (known) throw error;
  }
  if (atTopLevel) subvolume[0] = "subvolid=5";
  await mountBtrfs(paths, subvolume, place.data);
}

/**
 * Mounts the state or the snapshots, unless a plain directory that holds data
 * stands in their place: then that is used as it is.
 */
async function mountSubvolume(
  which: "state" | "snapshots",
  data: DataFilesystem,
  place: Places,
): Promise<void> {
  const target = place[which];
  if (!isFree(target)) return;
  const name = SUBVOLUMES[which];
  const paths = data.members.map((member) => member.path);
  const options = [`subvol=/${name}`];
  fs.mkdirSync(target, { recursive: true });
  try {
    await mountBtrfs(paths, options, target);
  } catch (error) {
    if (error instanceof NoAnswer) throw error;
    await withTopLevel(paths, [], place, async (top) => {
      if (fs.existsSync(join(top, name))) throw error;
      await createSubvolume(join(top, name), paths);
    });
    await mountBtrfs(paths, options, target);
  }
}

/** The root of every Btrfs subvolume has the inode number 256 (btrfs(5)). */
function isSubvolume(path: string): boolean {
  return attemptNow(() => fs.statSync(path).ino) === 256;
}

/** Mounts a Btrfs, naming all members, for nobody else may have scanned it. */
async function mountBtrfs(
  [first, ...others]: string[],
  options: string[],
  target: string,
): Promise<void> {
  const all = [...options, ...others.map((path) => `device=${path}`)];
  await run(words`mount -t btrfs -o ${all.join()} ${first} ${target}`, {
    to: `mount ${[first, ...others].join(", ")} on "${target}"`,
    timeoutMs: TIMEOUT.mountMs,
  });
  if (!mountedOn(target)) {
    throw new Error(`Cannot find a mount on "${target}" after mounting it`);
  }
}

async function unmount(...targets: string[]): Promise<void> {
  const quoted = targets.map((target) => `"${target}"`).join(", ");
  await run(words`umount ${targets}`, { to: `unmount ${quoted}` });
}

/** The topmost mount on a directory. */
function mountedOn(target: string): Mount | undefined {
  return (knownMounts ?? readMounts())
    .findLast((mount) => mount.target === target);
}

/** Without a data filesystem: a tmpfs in its place, or what is there. */
async function mountVolatile(
  plan: Plan,
  place: Places,
): Promise<Outcome["mode"]> {
  if (plan.mode !== "mounted") await mountTmpfs(place);
  return plan.errors.length > 0 ? "fallback" : "volatile";
}

/** At most half of the memory, as tmpfs(5) has it, but given, to say it. */
async function mountTmpfs(place: Places): Promise<void> {
  fs.mkdirSync(place.data, { recursive: true });
  const sizeBytes = Math.floor(readMemoryBytes() / 2 / MiB) * MiB;
  await run(
    words`mount -t tmpfs -o mode=0755,size=${sizeBytes} ${DATA} ${place.data}`,
    { to: `mount a tmpfs on "${place.data}"` },
  );
  fs.mkdirSync(place.state, { recursive: true });
  say(
    "info",
    `Volatile: "${place.data}" is a tmpfs of at most ${inMiB(sizeBytes)}; ` +
      `what is written there is lost at shutdown`,
  );
}

const isNoSpace = (error: unknown) =>
  /ENOSPC|No space left on device/.test(messageOf(error));

/** To mount an overlay takes a new directory: full is too full for that. */
function sayHowToMakeRoom(place: Places): void {
  const { type, source } = mountedOn(place.data) ?? {};
  if (type !== "btrfs") return;
  say(
    "error",
    `The data filesystem on ${source} is full: log in, mount it elsewhere ` +
      `("mount ${source} /mnt"), delete files or snapshots, reboot`,
  );
}

/** The last resort: whatever failed, the system gets writable. */
async function fallBack(place: Places): Promise<void> {
  try {
    const targets = OVERLAYS.map((name) => join(place.root, name))
      .filter((target) => isOurOverlay(target, place))
      .concat(place.snapshots, place.state, place.data);
    for (const target of targets) {
      if (mountedOn(target)) await attempt(() => unmount(target));
    }
    await attempt(() => removeScratch(place));
    if (!mountedOn(place.data)) await mountTmpfs(place);
    await mountOverlays(place);
    say("warning", "The system runs volatile until this is repaired");
  } catch (error) {
    sayError(error);
  }
}

// ---------------------------------------------------------------------------
// Step 7: overlays.
// ---------------------------------------------------------------------------

/** Puts an overlay on each key directory. */
async function mountOverlays(place: Places): Promise<void> {
  const names = OVERLAYS.filter((name) => !isOverlaid(name, place));
  if (names.length === 0) return;
  for (const name of names) {
    fs.mkdirSync(join(place.lower, name), { recursive: true });
  }
  const isMade = await makeUppers(names, place.state, place);
  await allOf([
    isMade && attempt(() => removeScratch(place)),
    mountFromTable(names.flatMap((name) => overlayEntries(name, place)), place),
  ]);
  for (const name of names) {
    if (!isOverlaid(name, place)) await mountOverlayAnew(name, place);
  }
}

function isOurOverlay(target: string, place: Places): boolean {
  const upper = `upperdir=${join(place.upper, basename(target))}`;
  const mount = mountedOn(target);
  return mount?.type === "overlay" && mount.superOptions.includes(upper);
}

/** Is there our overlay, and writable? */
function isOverlaid(name: string, place: Places): boolean {
  // At a boot there is no lower yet, and no need to ask the kernel.
  if (!fs.existsSync(join(place.lower, name))) return false;
  const target = join(place.root, name);
  return isOurOverlay(target, place) &&
    !mountedOn(target)?.superOptions.includes("ro");
}

/** fstab(5) entries: the bind mount that is the lower layer, the overlay. */
function overlayEntries(name: string, place: Places): string[][] {
  const directory = join(place.root, name);
  const lower = join(place.lower, name);
  const options = [
    `lowerdir=${lower}`,
    `upperdir=${join(place.upper, name)}`,
    `workdir=${join(place.work, name)}`,
    OVERLAY_FEATURES_OFF,
  ];
  // private: what is mounted on the directory must not appear in its lower.
  const bind = [directory, lower, "none", "bind,private"];
  const overlay = ["overlay", directory, "overlay", options.join()];
  return isSameFile(directory, lower) ? [overlay] : [bind, overlay];
}

function isSameFile(path: string, other: string): boolean {
  const [a, b] = [path, other].map((p) => attemptNow(() => fs.statSync(p)));
  return a !== undefined && a.dev === b?.dev && a.ino === b.ino;
}

/**
 * Many mounts by one process; which of them exist is seen afterwards.
 *
 * @returns What went wrong, if anything did.
 */
async function mountFromTable(
  entries: string[][],
  place: Places,
  level: Level = "warning",
): Promise<string | undefined> {
  const escape = (field: string) =>
    field.replace(
      /[\s\\#]/g,
      (char) => "\\" + char.charCodeAt(0).toString(8).padStart(3, "0"),
    );
  const lines = entries.map((entry) => `${entry.map(escape).join(" ")} 0 0\n`);
  fs.writeFileSync(place.fstab, lines.join(""));
  try {
    await run(words`mount --all --fstab ${place.fstab}`, {
      to: `mount what "${place.fstab}" lists`,
      timeoutMs: TIMEOUT.mountMs,
    });
  } catch (error) {
    if (error instanceof NoAnswer) throw error;
    say(level, messageOf(error));
    return messageOf(error);
  }
}

/**
 * Mounts an overlay again whose mount failed or came out read-only, as it does
 * when a crash left something in `work` that the kernel cannot remove.
 */
async function mountOverlayAnew(name: string, place: Places): Promise<void> {
  const target = join(place.root, name);
  const work = join(place.work, name);
  say("warning", `Clearing "${work}" and mounting "${target}" again`);
  if (isOurOverlay(target, place)) await unmount(target);
  fs.rmSync(work, { recursive: true, force: true });
  fs.mkdirSync(work, { recursive: true });
  const problem = await mountFromTable(overlayEntries(name, place), place);
  if (!isOverlaid(name, place)) {
    throw new Error(
      `Cannot make "${target}" writable: ${problem ?? "it is read-only"}`,
    );
  }
}

/** Where the overlay that makes uppers has its own. */
const scratchLayers = (state: string) => join(state, WORK, ".copy-up");

/**
 * Makes the uppers and works that are not there yet. The root of an overlay
 * shows the mode, owner, times and extended attributes of its upper, so that
 * these must be the lower's. The kernel copies them best: an overlay of the
 * whole root, with an upper in `work`, makes `etc` there when `etc` is changed
 * in it; from there it is moved to its place.
 *
 * @param state The state directory, wherever it is mounted.
 * @returns Whether any was made: then {@linkcode removeScratch} is to follow,
 * if need be beside the next steps.
 */
async function makeUppers(
  names: string[],
  state: string,
  place: Places,
): Promise<boolean> {
  const uppers = join(state, UPPER);
  fs.mkdirSync(uppers, { recursive: true });
  for (const name of names) {
    fs.mkdirSync(join(state, WORK, name), { recursive: true });
  }
  const missing = names.filter((name) => !fs.existsSync(join(uppers, name)));
  if (missing.length === 0) return false;
  const scratch = scratchLayers(state);
  const [upper, work] = ["upper", "work"].map((name) => join(scratch, name));
  fs.rmSync(scratch, { recursive: true, force: true });
  for (const directory of [upper, work, place.copyUp]) {
    fs.mkdirSync(directory, { recursive: true });
  }
  const options = [
    `lowerdir=${place.root}`,
    `upperdir=${upper}`,
    `workdir=${work}`,
    OVERLAY_FEATURES_OFF,
  ];
  await run(
    words`mount -t overlay -o ${options.join()} overlay ${place.copyUp}`,
    { to: `make the uppers in "${uppers}"` },
  );
  for (const name of missing) {
    const directory = join(place.copyUp, name);
    const { mode } = fs.statSync(directory);
    fs.chmodSync(directory, mode & 0o7777); // no change, but a copy-up
    fs.renameSync(join(upper, name), join(uppers, name));
  }
  return true;
}

// ---------------------------------------------------------------------------
// Steps 8 and 9: Docker, swap, the status file.
// ---------------------------------------------------------------------------

/**
 * Points Docker at its data root (dockerd(8), daemon.json); every other key is
 * kept.
 *
 * @throws {Error} When `daemon.json` is not a JSON object: it is never
 * replaced.
 */
function configureDocker(place: Places): void {
  // As dockerd makes it: others may pass through, but not look.
  fs.mkdirSync(place.docker, { recursive: true, mode: 0o710 });
  const before = fs.existsSync(place.daemonJson)
    ? fs.readFileSync(place.daemonJson, "utf8")
    : undefined;
  const after = setDataRoot(before, place.daemonJson);
  if (after === before) return;
  fs.mkdirSync(dirname(place.daemonJson), { recursive: true });
  const path = before === undefined
    ? place.daemonJson
    : fs.realpathSync(place.daemonJson); // through a symbolic link
  replaceFile(path, after);
  say("info", `Docker keeps its data in "${DOCKER_DATA_ROOT}"`);
}

/** Sets `data-root` in the text of `daemon.json`, if it is not set so. */
export function setDataRoot(before: string | undefined, path: string): string {
  let config: Record<string, unknown> = {};
  if (before?.trim()) {
    try {
      config = JSON.parse(before);
    } catch (error) {
      throw new Error(
        `Cannot point Docker at its data: "${path}" is not JSON ` +
          `(${messageOf(error)}): it is left as it is, repair it by hand`,
      );
    }
    if (typeof config !== "object" || !config || Array.isArray(config)) {
      throw new Error(
        `Cannot point Docker at its data: "${path}" is not a JSON object: it ` +
          `is left as it is, repair it by hand`,
      );
    }
  }
  if (before && config["data-root"] === DOCKER_DATA_ROOT) return before;
  config["data-root"] = DOCKER_DATA_ROOT;
  return JSON.stringify(config, null, 2) + "\n";
}

/** Replaces a file in one step; mode and owner stay. */
function replaceFile(path: string, contents: string): void {
  const old = attemptNow(() => fs.statSync(path));
  const temporary = `${path}.new`;
  fs.rmSync(temporary, { force: true });
  const file = fs.openSync(temporary, "wx", old?.mode ?? 0o644);
  try {
    if (old) fs.fchmodSync(file, old.mode & 0o7777);
    if (old) fs.fchownSync(file, old.uid, old.gid);
    fs.writeSync(file, contents);
    if (old) fs.fsyncSync(file); // a new one that a crash empties is made anew
  } finally {
    fs.closeSync(file);
  }
  fs.renameSync(temporary, path);
}

async function swapOn(all: BlockDevice[]): Promise<void> {
  const areas = all.slice(0, 16); // MAX_SWAPFILES is 23 or more
  if (areas.length === 0) return;
  await sleep(0); // the mark goes first: the mount waits for it
  await run(words`swapon ${areas.map((area) => area.path)}`, {
    to: `turn on swap on ${pathsOf(areas)}`,
  });
}

/** Writes `/run/lightwhale/persistence.json`: what this boot did. */
function writeReport(
  { mode, plan, planned, status, started }: Outcome,
  place: Places,
): void {
  const data = plan?.mount;
  const report = {
    version: VERSION,
    mode,
    reason: plan?.reason ?? messages.errors[0],
    exitStatus: status,
    uuid: data?.fsid ?? null,
    devices: data?.members.map((member) => member.path) ?? [],
    missing: data ? stateOf(data)?.missing ?? [] : [],
    degraded: (data?.missing ?? 0) > 0,
    plan: planned,
    ...messages,
    durationMs: Date.now() - started,
  };
  replaceFile(place.report, JSON.stringify(report, null, 2) + "\n");
}

// ---------------------------------------------------------------------------
// The disks' life: long work in the background, after the boot.
// ---------------------------------------------------------------------------

/** What sysfs says of a mounted Btrfs (btrfs(5), /sys/fs/btrfs/UUID). */
export interface FilesystemState {
  /** The exclusive operation that runs: `none`, `balance`, `device replace`. */
  operation: string;
  devids: number[];
  missing: number[];
  /** Profiles that have chunks. */
  profiles: { data: string[]; metadata: string[]; system: string[] };
  /** Error counters by devid, those that are not zero. */
  errors: Record<number, Record<string, number>>;
}

/**
 * Reads sysfs only for devices that are present: after `btrfs device remove
 * missing` the kernel leaves `devinfo/N` behind, and to read a file in it is a
 * use after free (fs/btrfs/volumes.c, btrfs_rm_device(), as of Linux 6.18).
 */
function readFilesystemState(
  fsid: string,
  members: Superblock[],
): FilesystemState | undefined {
  const directory = `/sys/fs/btrfs/${fsid}`;
  if (!fs.existsSync(directory)) return undefined;
  const profiles = (type: string) =>
    listDirectory(`${directory}/allocation/${type}`)
      .filter((name) => name === "single" || /^(dup|raid)/.test(name));
  const present = members.map((member) => member.devid);
  const numDevices = Math.max(0, ...members.map((m) => m.numDevices));
  const errors: FilesystemState["errors"] = {};
  for (const devid of present) {
    const stats = readText(`${directory}/devinfo/${devid}/error_stats`) ?? "";
    for (const [, name, count] of stats.matchAll(/^(\w+) (\d+)$/gm)) {
      if (count !== "0") (errors[devid] ??= {})[name] = Number(count);
    }
  }
  const missing = listDirectory(`${directory}/devinfo`).map(Number)
    .filter((devid) => devid > 0 && !present.includes(devid))
    .slice(0, Math.max(0, numDevices - present.length));
  return {
    operation: readText(`${directory}/exclusive_operation`) ?? "none",
    devids: [...present, ...missing].sort((a, b) => a - b),
    missing,
    profiles: {
      data: profiles("data"),
      metadata: profiles("metadata"),
      system: profiles("system"),
    },
    errors,
  };
}

/** The state of the filesystem that a plan mounts or has found mounted. */
function stateOf(data: DataFilesystem): FilesystemState | undefined {
  const members = data.members.map((member) => member.btrfs!);
  return readFilesystemState(data.fsid, members);
}

/** A piece of long work. */
export type Job =
  | { kind: "wait"; operation: string }
  | { kind: "rebuild"; device: BlockDevice; devid: number }
  | { kind: "replace"; member: NewMember; devid: number }
  | { kind: "add"; member: NewMember }
  | { kind: "release"; device: BlockDevice }
  | { kind: "remove missing" }
  | { kind: "balance"; filters: string[] }
  | { kind: "scrub" };

/** Work that the disks do not show; files in the state directory say so. */
export interface Wishes {
  /** Members disagreed when they were mounted. */
  scrub: boolean;
  /** A device was added in the place of a missing one. */
  "remove missing": boolean;
}

/**
 * Decides what to do next for a mounted data filesystem. All of it follows
 * from what is on the disks, so that it goes on by itself after a power cut.
 */
export function decideJob(
  plan: Plan,
  state: FilesystemState,
  wishes: Wishes,
): Job | undefined {
  const data = plan.mount;
  if (!data) return undefined;
  if (state.operation === "balance paused") return undefined; // by a person
  if (state.operation !== "none") {
    return { kind: "wait", operation: state.operation };
  }
  if (data.replaceTarget) { // no replace writes to it any more
    const device = data.replaceTarget;
    const [devid] = state.missing;
    if (!devid) return { kind: "release", device };
    const { path: dataPath, sizeBytes: dataBytes } = device;
    const member = { device, swapBytes: 0, dataPath, dataBytes };
    return { kind: "replace", member, devid };
  }
  const [stale] = data.stale;
  if (stale && state.missing.includes(devidOf(stale))) {
    return { kind: "rebuild", device: stale, devid: devidOf(stale) };
  }
  if (wishes["remove missing"] && state.missing.length > 0) {
    return { kind: "remove missing" };
  }
  const [member] = plan.join;
  if (member && state.missing.length > 0) {
    return { kind: "replace", member, devid: state.missing[0] };
  }
  if (member) return { kind: "add", member };
  const filters = balanceFilters(state);
  if (filters.length > 0 && !whyNotMirrored(data, sizesOf(data), 0)) {
    return { kind: "balance", filters };
  }
  if (wishes.scrub) return { kind: "scrub" };
}

/** Profiles from the weakest to the strongest. */
const RANK = ["single", "dup", "raid1", "raid1c3", "raid1c4"];

/**
 * The filters of the balance that gives every chunk its profile (btrfs-balance
 * (8)), none when all have it. Chunks written while a member was missing are
 * `single`; a device added just before a power cut has left all as it was.
 */
export function balanceFilters(state: FilesystemState): string[] {
  const present = state.devids.length - state.missing.length;
  const { data, metadata, system } = state.profiles;
  const all = [...data, ...metadata, ...system];
  if (present < 2 || all.some((profile) => !RANK.includes(profile))) return [];
  const { dataProfile, metadataProfile } = profilesFor(present);
  // While a member is missing nothing but what has no mirror is touched.
  const below = (profile: string, target: string) =>
    RANK.indexOf(profile) <
      RANK.indexOf(state.missing.length > 0 ? "raid1" : target);
  const filter = (type: "d" | "m", present: string[], target: string) => {
    const old = [...new Set(present)].filter((p) => below(p, target));
    if (old.length === 0) return [];
    return [`-${type}profiles=${old.join("|")},convert=${target},soft`];
  };
  return [ // metadata first: it needs little room, and data leave none
    ...filter("m", [...metadata, ...system], metadataProfile),
    ...filter("d", data, dataProfile),
  ];
}

/** The file that keeps a wish over a power cut. */
const wishFile = (wish: keyof Wishes, place: Places) =>
  join(place.state, `.wanted: ${wish}`);

function readWishes(place: Places): Wishes {
  return {
    scrub: fs.existsSync(wishFile("scrub", place)),
    "remove missing": fs.existsSync(wishFile("remove missing", place)),
  };
}

/**
 * Starts {@linkcode maintain} in the background if there is work for it.
 *
 * @throws {Error} When it does not start.
 */
function startMaintenance(
  plan: Plan,
  settings: Settings,
  place: Places,
): void {
  if (!plan.mount) return;
  if (plan.mount.needsScrub) fs.writeFileSync(wishFile("scrub", place), "");
  const state = stateOf(plan.mount);
  const job = state && decideJob(plan, state, readWishes(place));
  if (!job) return;
  say("info", `In the background: ${describeJob(job)}`);
  // This very program, whatever runs it, with the same root and devices.
  const own = (readText("/proc/self/cmdline") ?? "").split("\0");
  const given = process.argv.slice(2);
  const program = own.slice(1, own.lastIndexOf("") - given.length);
  const options = ["--maintain", "--root", settings.root];
  if (settings.only) {
    options.push("--devices", settings.only.map(nodeOf).join());
  }
  try {
    start([process.execPath, ...program, ...options], {
      stdio: ["ignore", "ignore", "ignore"],
      detached: true,
    });
  } catch (error) {
    throw new Error(
      `Cannot start the work in the background: ${messageOf(error)}`,
    );
  }
}

function describeJob(job: Job): string {
  switch (job.kind) {
    case "wait":
      return `the ${job.operation} goes on`;
    case "rebuild":
      return `${job.device.path} is wiped and rebuilt`;
    case "replace":
      return `${job.member.device.path} takes the place of device ${job.devid}`;
    case "add":
      return `${job.member.device.path} joins the data filesystem`;
    case "release":
      return `${job.device.path}, left over from a replace, is freed`;
    case "remove missing":
      return `the data of the missing device is mirrored anew`;
    case "balance":
      return `chunks are given their profile (${job.filters.join(" ")})`;
    case "scrub":
      return `all checksums are verified`;
  }
}

/** Does the long work, piece by piece, until nothing is left to do. */
export async function maintain(settings: Settings): Promise<number> {
  const place = places(settings.root);
  const only = await takeLock(join(place.run, "maintenance.lock"), 0)
    .catch(() => undefined);
  if (!only) return 0; // another one is at it
  try {
    const done = new Set<string>();
    while (await doNextJob(done, settings, place));
  } finally {
    fs.rmSync(place.job, { force: true });
    only.release();
  }
  return messages.errors.length > 0 ? 1 : 0;
}

/** What `--status` gets to know of the job that runs. */
interface JobNote {
  what: string;
  /** When it began (ISO 8601). */
  since: string;
  pid: number;
}

/** Does one job; each only once, so that one that fails is not repeated. */
async function doNextJob(
  done: Set<string>,
  settings: Settings,
  place: Places,
): Promise<boolean> {
  const lock = await takeLock(join(place.run, "lock"));
  let longPart: (() => Promise<void>) | undefined;
  try {
    const plan = decide(await look(settings), settings);
    await disarm(plan.disarm); // what has taken its place
    const state = plan.mount && stateOf(plan.mount);
    const wishes = readWishes(place);
    const job = state && decideJob(plan, state, wishes);
    if (!plan.mount || !job || done.has(describeJob(job))) return false;
    if (job.kind !== "wait") {
      done.add(describeJob(job));
      say("info", `Now ${describeJob(job)}`);
    }
    const note: JobNote = {
      what: describeJob(job),
      since: new Date().toISOString(),
      pid: process.pid,
    };
    replaceFile(place.job, JSON.stringify(note) + "\n");
    longPart = await startJob(job, plan.mount, place);
  } catch (error) {
    sayError(error);
  } finally {
    lock.release();
  }
  // Meanwhile a boot that is run again, or --enable, need not wait.
  if (longPart) await attempt(longPart);
  return true;
}

/**
 * Does the part of a job that changes which disks belong to the filesystem.
 *
 * @returns What remains to be done and takes long.
 */
async function startJob(
  job: Job,
  data: DataFilesystem,
  place: Places,
): Promise<(() => Promise<void>) | undefined> {
  switch (job.kind) {
    case "wait":
      return () => waitForOperation(data);
    case "release":
      await cancelReplace(place);
      await wipe(job.device);
      return;
    case "rebuild": {
      const device = await arm(job.device);
      await wipe(device);
      await startReplace(job.devid, device, data, place);
      return () => finishReplace(job.devid, device, data, place);
    }
    case "replace": {
      await cancelReplace(place);
      const device = await prepareMember(job.member);
      // To btrfs-progs it is mounted, whether or not the kernel knows it.
      if (data.replaceTarget) await wipe(device);
      try {
        await startReplace(job.devid, device, data, place);
      } catch (error) { // btrfs-progs refuse a target that is too small
        if (error instanceof NoAnswer) throw error;
        say("info", `${messageOf(error)}; it is added instead`);
        await addDevice(device, data, place);
        fs.writeFileSync(wishFile("remove missing", place), "");
        await disarm([bearerOfMark(device)]);
        return;
      }
      return () => finishReplace(job.devid, device, data, place);
    }
    case "add":
      await addDevice(await prepareMember(job.member), data, place);
      await disarm([job.member.device]);
      return;
    case "remove missing":
      return async () => {
        const remove = () =>
          run(words`btrfs device remove missing ${place.data}`, {
            to: `mirror the data of the missing device anew`,
            timeoutMs: Infinity,
          });
        await packChunks(place);
        await remove().catch(() => packChunks(place).then(remove));
        fs.rmSync(wishFile("remove missing", place), { force: true });
      };
    case "balance":
      return async () => {
        const convert = (filter: string) =>
          run(words`btrfs balance start ${filter} ${place.data}`, {
            to: `give every chunk its profile on "${place.data}"`,
            timeoutMs: Infinity,
          });
        for (const filter of job.filters) {
          await makeRoom(place);
          // What was converted has made room for more.
          await convert(filter)
            .catch(() => makeRoom(place).then(() => convert(filter)))
            .catch(() => makeRoom(place).then(() => convert(filter)));
        }
      };
    case "scrub":
      return async () => {
        await run(words`btrfs scrub start -B ${place.data}`, {
          to: `verify the checksums on "${place.data}"`,
          timeoutMs: Infinity,
        });
        fs.rmSync(wishFile("scrub", place), { force: true });
      };
  }
}

/** Partitions a disk that joins, makes its swap; gives its data partition. */
async function prepareMember(member: NewMember): Promise<BlockDevice> {
  await partitionDisk(member);
  await waitForPartitions([member]);
  const { swapPath } = member;
  if (swapPath) {
    await makeSwap(swapPath);
    await attempt(() =>
      run(words`swapon ${swapPath}`, { to: `turn on swap on ${swapPath}` })
    );
  }
  return dataDevice(member);
}

async function waitForOperation(data: DataFilesystem): Promise<void> {
  const operation = () => stateOf(data)?.operation ?? "none";
  while (!["none", "balance paused"].includes(operation())) await sleep(1000);
}

/**
 * Marks a device to be formatted, should the power fail now. Of a partition
 * the name and not the header: there may be other partitions on its disk.
 */
async function arm(device: BlockDevice): Promise<BlockDevice> {
  if (device.kind === "partition") {
    await attempt(() => namePartition(device, MAGIC)); // an MBR has no names
    return { ...device, partitionName: MAGIC };
  }
  await setMark(device, MAGIC);
  return device;
}

/** Takes marks and signatures away from a device. */
async function wipe(device: BlockDevice): Promise<void> {
  for (const slot of MARK.slotsAt) {
    await writeBytes(device.path, slot, new Uint8Array(MARK.bytes));
  }
  await run(words`wipefs --quiet --all ${device.path}`, {
    to: `wipe ${device.path}`,
  });
}

async function cancelReplace(place: Places): Promise<void> {
  // Its status 2: there was none to cancel (btrfs-replace(8)).
  await run(words`btrfs replace cancel ${place.data}`, {
    to: "give up a replace that lost its target",
    accept: [0, 2],
  });
}

async function startReplace(
  devid: number,
  device: BlockDevice,
  data: DataFilesystem,
  place: Places,
): Promise<void> {
  await run(
    words`btrfs replace start -f ${devid} ${device.path} ${place.data}`,
    {
      to: `let ${device.path} take the place of device ${devid}`,
      timeoutMs: TIMEOUT.mkfsMs,
    },
  );
  // The command returns before the kernel has begun.
  const giveUpAt = Date.now() + TIMEOUT.nodeMs;
  while (Date.now() < giveUpAt) {
    if ((await superblockOf(device.path))?.fsid === data.fsid) break;
    await sleep(50);
  }
  await markMembers([...data.members, fresh(device)], data.fsid);
}

/**
 * Waits for a replace. It fails where the kernel finds no room to set a block
 * group read-only; chunks that are packed more tightly leave room.
 */
async function finishReplace(
  devid: number,
  device: BlockDevice,
  data: DataFilesystem,
  place: Places,
): Promise<void> {
  const sequence = diskSequence(device);
  for (let packed = false;; packed = true) {
    await waitForOperation(data);
    const found = await superblockOf(device.path);
    if (found?.fsid === data.fsid && found.devid === devid) {
      await growFilesystem([{ ...device, btrfs: found }], place);
      return await disarm([bearerOfMark(device)]);
    }
    const cannot =
      `Cannot let ${device.path} take the place of device ${devid}`;
    if (packed) {
      throw new Error(
        `${cannot}: the kernel gave up (see dmesg): replace the disk if it ` +
          `has errors, delete something if there is too little free space, ` +
          `then reboot`,
      );
    }
    await cancelReplace(place);
    await packChunks(place); // may take hours, and nothing holds the disk
    if (diskSequence(device) !== sequence) {
      throw new Error(`${cannot}: it is not the disk any more that was marked`);
    }
    await startReplace(devid, device, data, place);
  }
}

/** No two disks have the same (Documentation/ABI/stable/sysfs-block). */
const diskSequence = ({ disk }: BlockDevice) =>
  readText(`/sys/block/${disk}/diskseq`);

/**
 * Makes sure that each device has space for new chunks, if need be by moving
 * some to the device that was added. Where all is allocated, Linux 6.18 was
 * seen to abort a conversion with ENOSPC: the filesystem went read-only.
 */
async function makeRoom(place: Places): Promise<void> {
  const block = /ID: (\d+)\s+Device size:\s+(\d+)[^]*?Unallocated:\s+(\d+)/g;
  for (let moved = 0; moved < 8; moved++) {
    const usage = await ask(words`btrfs device usage --raw ${place.data}`, {
      to: `see how much of each device is allocated`,
    });
    const devices = [...usage.matchAll(block)].map(([, devid, size, free]) => ({
      devid,
      sizeBytes: Number(size),
      freeBytes: Number(free),
    }));
    const chunkBytes = largestChunkBytes(devices.map((d) => d.sizeBytes));
    const most = Math.max(...devices.map(({ freeBytes }) => freeBytes));
    const full = devices.find(({ freeBytes }) => freeBytes < chunkBytes);
    if (!full || most < 2 * chunkBytes) return;
    const filter = `-ddevid=${full.devid},profiles=single,limit=1`;
    await run(words`btrfs balance start ${filter} ${place.data}`, {
      to: `make room on device ${full.devid}`,
      accept: [0, 1],
      timeoutMs: Infinity,
    });
  }
}

/** Moves what is in half-empty chunks together, if there is room even so. */
async function packChunks(place: Places): Promise<void> {
  await run(words`btrfs balance start -dusage=85 ${place.data}`, {
    to: `make room on "${place.data}"`,
    accept: [0, 1],
    timeoutMs: Infinity,
  });
}

/** The disk that has the header, or the partition that has the name. */
function bearerOfMark(device: BlockDevice): BlockDevice {
  if (device.partitionName === MAGIC) return device;
  return { ...device, path: nodeOf(device.disk), kind: "disk" };
}

const fresh = (device: BlockDevice) => ({ ...device, mark: undefined });

async function superblockOf(path: string): Promise<Superblock | undefined> {
  return await withDevice(
    path,
    async (read) =>
      parseSuperblock(await read(BTRFS.superblockAt, BTRFS.bytes)),
  );
}

async function addDevice(
  device: BlockDevice,
  data: DataFilesystem,
  place: Places,
): Promise<void> {
  await run(words`btrfs device add -f ${device.path} ${place.data}`, {
    to: `let ${device.path} join the data filesystem`,
    timeoutMs: TIMEOUT.mkfsMs,
  });
  await markMembers([...data.members, fresh(device)], data.fsid);
}

// ---------------------------------------------------------------------------
// --enable and --disable.
// ---------------------------------------------------------------------------

/** Marks devices to be formatted at the next boot: all of them or none. */
async function enable(
  paths: string[],
  force: boolean,
  settings: Settings,
): Promise<void> {
  const isImage = (path: string) =>
    fs.statSync(path, { throwIfNoEntry: false })?.isFile();
  const names = paths.map((path) =>
    nameOf(attemptNow(() => fs.realpathSync(path)) ?? "")
  );
  for (const [i, name] of names.entries()) {
    const disk = wholeDisk(name) ?? name;
    if (disk !== name && names.includes(disk)) {
      throw new UsageError(
        `Cannot enable ${paths[i]}: its whole disk is to be enabled as well`,
      );
    }
  }
  const steps: (() => Promise<void>)[] = [];
  for (const path of paths) {
    steps.push(
      isImage(path)
        ? await checkImage(path, force)
        : await checkDevice(path, force, settings),
    );
  }
  for (const step of steps) await step();
  if (!paths.every(isImage)) await foretell(settings);
}

/** Says what is on a device; gives the step that marks it. */
async function checkDevice(
  path: string,
  force: boolean,
  settings: Settings,
): Promise<() => Promise<void>> {
  const { device, facts } = await lookAtOne(path, settings);
  const holds = await describeContents(device, facts);
  print(`${device.path}: ${describeDevice(device)}, ${holds ?? "seems empty"}`);
  const isEnabled = isMarked(device) && dataOn(device, facts).length === 0;
  const refusal = refuseToEnable(device, facts) ??
    (holds && !force && !isEnabled
      ? `it holds ${holds}: use --force to give that up`
      : undefined);
  if (refusal) throw new UsageError(`Cannot enable ${path}: ${refusal}`);
  if (device.hasNode) {
    await run(words`wipefs --quiet --all --no-act ${device.path}`, {
      to: `have ${path} alone (is it mounted in a container?)`,
    });
  }
  return async () => {
    if (isEnabled) {
      print(`${path} is enabled already`);
    } else {
      await mark(device, facts);
      print(`${path} is enabled`);
    }
  };
}

function isMarked(device: BlockDevice): boolean {
  return device.kind === "partition"
    ? device.partitionName === MAGIC
    : device.header;
}

/** Data that would win over the mark at the next boot. */
function dataOn(device: BlockDevice, facts: Facts): BlockDevice[] {
  return partsOf(device, facts.devices)
    .filter((part) => part.btrfs?.label === DATA);
}

async function mark(device: BlockDevice, facts: Facts): Promise<void> {
  await setMark(device, MAGIC);
  // The data would win over the mark: it is given up here, on purpose.
  const parts = dataOn(device, facts);
  for (const disk of disksWithoutNodes(parts, facts.devices)) {
    await makePartitionNodes(disk);
  }
  for (const part of parts) await wipe(part);
  const again = await lookAgain(device);
  if (!isMarked(again)) {
    throw new Error(
      `Cannot read the mark back from ${device.path}: the disk may be broken`,
    );
  }
}

/** Reads a device anew, its partition name from the table. */
async function lookAgain(device: BlockDevice): Promise<BlockDevice> {
  const settings = { ...defaultSettings, only: [device.disk] };
  const facts = await look(settings, device.disk);
  const found = facts.devices.find((other) => other.path === device.path);
  if (!found) throw new Error(`Cannot find ${device.path} any more`);
  return found;
}

/** Says what is in an image file; gives the step that marks it. */
async function checkImage(
  path: string,
  force: boolean,
): Promise<() => Promise<void>> {
  const real = fs.realpathSync(path);
  const user = fs.readdirSync("/sys/class/block").find((name) =>
    readText(`/sys/class/block/${name}/loop/backing_file`) === real
  );
  if (user) {
    throw new UsageError(`Cannot enable ${path}: it is in use by /dev/${user}`);
  }
  const holds = await describeSignatures(path);
  const size = fs.statSync(path).size;
  print(`${path}: image file, ${inMiB(size)}, ${holds ?? "seems empty"}`);
  if (size < MiB) {
    throw new UsageError(
      `Cannot enable ${path}: it is too small for the image of a disk ` +
        `(truncate -s 20G makes it larger, and may do so again later)`,
    );
  }
  try {
    fs.closeSync(fs.openSync(path, "r+"));
  } catch (error) {
    throw new UsageError(`Cannot enable ${path}: ${messageOf(error)}`);
  }
  if (holds && !force && !await isMarkedImage(path)) {
    throw new UsageError(
      `Cannot enable ${path}: it holds ${holds}: use --force to give that up`,
    );
  }
  return async () => {
    if (await isMarkedImage(path)) return print(`${path} is enabled already`);
    await writeHeader(path, true);
    if (!await isMarkedImage(path)) {
      throw new Error(`Cannot read the mark back from ${path}`);
    }
    print(
      `${path} is enabled: a machine that has it as a disk formats it` +
        (holds ? `, unless it holds a "${DATA}": then that wins` : ""),
    );
  };
}

async function isMarkedImage(path: string): Promise<boolean> {
  const start = await withDevice(path, (read) => read(0, MAGIC.length));
  return text(start, 0, start.length) === MAGIC;
}

/** Takes the marks away again. */
async function disable(paths: string[], settings: Settings): Promise<void> {
  for (const path of paths) {
    if (fs.statSync(path, { throwIfNoEntry: false })?.isFile()) {
      if (!await isMarkedImage(path)) {
        print(`${path} is not enabled`);
        continue;
      }
      await writeHeader(path, false);
      print(`${path} is disabled`);
      continue;
    }
    const { device } = await lookAtOne(path, settings);
    if (device.readError) {
      throw new Error(`Cannot disable ${path}: ${device.readError}`);
    }
    if (!isMarked(device)) {
      print(`${path} is not enabled`);
      continue;
    }
    if (device.readOnly) {
      throw new UsageError(`Cannot disable ${path}: it is read-only`);
    }
    await setMark(device, device.btrfs?.label === DATA ? DATA : "");
    if (isMarked(await lookAgain(device))) {
      throw new Error(
        `Cannot take the mark away from ${path}: it is still there`,
      );
    }
    print(`${path} is disabled`);
  }
}

/** The facts about one device, by any path that leads to it. */
async function lookAtOne(
  path: string,
  settings: Settings,
): Promise<{ device: BlockDevice; facts: Facts }> {
  const stat = fs.statSync(path, { throwIfNoEntry: false });
  if (!stat) {
    throw new UsageError(`Cannot find "${path}": there is no such device`);
  }
  if (!stat.isBlockDevice()) {
    throw new UsageError(
      `Cannot use "${path}": it is neither a block device nor an image file`,
    );
  }
  const real = fs.realpathSync(path);
  const name = nameOf(real);
  const disk = wholeDisk(name) ?? name;
  const facts = await look({ ...settings, only: [disk] }, disk);
  const device = facts.devices.find((device) => device.path === real);
  if (!device) {
    throw new UsageError(
      `Cannot use "${path}": it has no medium, or is no disk or partition`,
    );
  }
  return { device, facts };
}

/** Why a device must not be marked, whatever is forced; undefined if it may. */
function refuseToEnable(device: BlockDevice, facts: Facts): string | undefined {
  const user = partsOf(device, facts.devices).find((part) => part.inUse);
  const whole = facts.devices.find((other) => other.name === device.disk);
  if (user) return `${user.path} is ${user.inUse}`;
  if (whole?.inUse) return `${whole.path} is ${whole.inUse}`;
  if (device.readError) return device.readError;
  if (device.readOnly) return "it is read-only";
  if (device.kind === "volume") {
    return "the magic header counts on whole disks only, not on md or " +
      "device-mapper volumes";
  }
  if (isSystemSource(device, facts)) {
    return "the running system came from it";
  }
  const other = device.kind === "partition"
    ? whole
    : partsOf(device, facts.devices).find((part) => part !== device);
  if (other && other !== device && isMarked(other)) {
    return `${other.path} is enabled (--disable it first)`;
  }
  const dataBytes = layOut(device, facts.memoryBytes, true).dataBytes;
  if (dataBytes < MINIMUM_DATA_BYTES) {
    return `it is too small (${inMiB(device.sizeBytes)}; Btrfs needs ` +
      `${inMiB(MINIMUM_DATA_BYTES)} for data)`;
  }
  if (device.kind === "partition" && !whole?.gpt) {
    return `the magic partition name needs a GPT, and ${whole?.path} has ` +
      `another partition table`;
  }
}

/** Does the kernel command line (`root=`) or an image name this device? */
function isSystemSource(device: BlockDevice, facts: Facts): boolean {
  const root = /(?:^|\s)root=(\S+)/.exec(readText("/proc/cmdline") ?? "")?.[1];
  const path = root && attemptNow(() => fs.realpathSync(root));
  return partsOf(device, facts.devices).some((part) => part.path === path);
}

/** What a device and its partitions hold, in words. */
async function describeContents(
  device: BlockDevice,
  facts: Facts,
): Promise<string | undefined> {
  const [ours] = dataOn(device, facts);
  if (ours) return `the data filesystem "${DATA}" ${ours.btrfs?.fsid}`;
  const found = [await describeSignatures(device.path)];
  for (const part of partsOf(device, facts.devices)) {
    if (part === device || !part.hasNode) continue;
    const holds = await describeSignatures(part.path);
    if (holds) found.push(`${part.path} (${holds})`);
  }
  return found.filter(Boolean).join(", ") || undefined;
}

/**
 * What wipefs(8) lists: every signature, where blkid(8) picks one. An encrypted
 * disk has none: it shows by what is in its first MiB.
 */
async function describeSignatures(path: string): Promise<string | undefined> {
  const listed = await ask(
    words`wipefs --noheadings --output TYPE,LABEL ${path}`,
    { to: `see what is on ${path}` },
  );
  const lines = listed.split("\n").map((line) => line.trim().split(/\s+/, 2));
  const found = lines.filter(([type]) => type)
    .map(([type, label]) => label ? `${type} "${label}"` : type);
  const unique = [...new Set(found)].join(", ").replaceAll(/\p{Cc}/gu, "?");
  if (unique) return unique;
  const start = await withDevice(path, (read) => read(0, MiB));
  if (text(start, 0, MAGIC.length) === MAGIC) start.fill(0, 0, MAGIC.length);
  return isZero(start) ? undefined : "data of an unknown kind";
}

function describeDevice(device: BlockDevice): string {
  const directory = `/sys/class/block/${device.disk}/device`;
  const model = ["vendor", "model"]
    .map((name) => readText(`${directory}/${name}`)).filter(Boolean).join(" ");
  return `${device.kind}${model && ` ${model}`}, ${inMiB(device.sizeBytes)}`;
}

/** Says what the next boot would make of the marks. */
async function foretell(settings: Settings): Promise<void> {
  const plan = await makePlan(settings, 0, true);
  print("At the next boot:");
  for (const line of describePlan(plan)) print(`  ${line}`);
  for (const line of [...plan.warnings, ...plan.errors]) print(`  ${line}`);
}

// ---------------------------------------------------------------------------
// --status and --dry-run.
// ---------------------------------------------------------------------------

/** What `--status --json` prints. */
export interface Status {
  mode: "persistent" | "volatile" | "none";
  uuid: string | null;
  label: string | null;
  profiles: FilesystemState["profiles"] | null;
  devices: {
    path: string | null;
    devid: number;
    sizeBytes: number | null;
    missing: boolean;
    errors: Record<string, number>;
  }[];
  mounts: { target: string; source: string; type: string }[];
  space: Space | null;
  /** For metadata, which may be full while there is room for data. */
  metadataSpace: Space | null;
  swap: string[];
  /** `since`: when it began, or went on after a boot (ISO 8601). */
  work: { kind: string; progress: string; since: string | null }[];
  /** Sentences on what is wrong; empty when all is well. */
  health: string[];
  lastBoot: unknown;
}

/** Room on a filesystem. */
interface Space {
  sizeBytes: number;
  freeBytes: number;
}

/** Collects what is mounted where, from what, and how healthy it is. */
async function readStatus(settings: Settings): Promise<Status> {
  const place = places(settings.root);
  const base = mountedOn(place.data);
  const fsid = base?.type === "btrfs" ? fsidOf(base) : undefined;
  const members = fsid ? await readMembers(fsid) : [];
  const state = fsid
    ? readFilesystemState(fsid, members.map((member) => member.btrfs))
    : undefined;
  const targets = [
    place.data,
    place.state,
    place.snapshots,
    ...OVERLAYS.map((name) => join(place.root, name)),
  ];
  const mounts = readMounts().filter(({ target }) => targets.includes(target));
  const report = readText(place.report);
  const status: Status = {
    mode: !base ? "none" : fsid ? "persistent" : "volatile",
    uuid: fsid ?? null,
    label: fsid ? readText(`/sys/fs/btrfs/${fsid}/label`) ?? null : null,
    profiles: state?.profiles ?? null,
    devices: state?.devids.map((devid) => {
      const member = members.find((member) => member.btrfs.devid === devid);
      return {
        path: member?.path ?? null,
        devid,
        sizeBytes: member?.btrfs.deviceBytes ?? null,
        missing: state.missing.includes(devid),
        errors: state.errors[devid] ?? {},
      };
    }) ?? [],
    mounts: mounts.map(({ target, source, type }) => ({
      target,
      source,
      type,
    })),
    space: base ? readSpace(place.data) : null,
    metadataSpace: fsid && members.length > 0
      ? readMetadataSpace(fsid, members.map((member) => member.btrfs))
      : null,
    swap: readSwaps(),
    work: state ? await readWork(state, place) : [],
    health: [],
    lastBoot: attemptNow(() => JSON.parse(report ?? "null")) ?? null,
  };
  status.health = judgeHealth(status, state);
  return status;
}

function readSpace(directory: string): Space | null {
  const found = attemptNow(() => fs.statfsSync(directory));
  return found
    ? {
      sizeBytes: found.blocks * found.bsize,
      freeBytes: found.bavail * found.bsize,
    }
    : null;
}

/**
 * Metadata chunks, and what they may still grow by. Of what is free in them the
 * kernel keeps a reserve for itself (btrfs-filesystem(8), df, GlobalReserve).
 */
function readMetadataSpace(fsid: string, members: Superblock[]): Space {
  const value = (name: string) =>
    Number(readText(`/sys/fs/btrfs/${fsid}/allocation/${name}`) ?? 0);
  const allocatedBytes = sum(
    ["data", "metadata", "system"].map((type) => value(`${type}/disk_total`)),
  );
  const deviceBytes = sum(members.map((member) => member.deviceBytes));
  const sizeBytes = value("metadata/total_bytes");
  const copies = value("metadata/disk_total") / sizeBytes || 1;
  const freeBytes = sizeBytes - value("metadata/bytes_used") -
    value("global_rsv_size") + (deviceBytes - allocatedBytes) / copies;
  return { sizeBytes, freeBytes: Math.max(0, Math.floor(freeBytes)) };
}

/** The UUID of a mounted Btrfs, from the device that stands for it. */
function fsidOf(mount: Mount): string | undefined {
  const device = attemptNow(() => nameOf(fs.realpathSync(mount.source)));
  return listDirectory("/sys/fs/btrfs").find((fsid) =>
    device && fs.existsSync(`/sys/fs/btrfs/${fsid}/devices/${device}`)
  );
}

/** The devices in use: sysfs knows their names, superblocks the devids. */
async function readMembers(
  fsid: string,
): Promise<{ path: string; btrfs: Superblock }[]> {
  const members: { path: string; btrfs: Superblock }[] = [];
  for (const name of listDirectory(`/sys/fs/btrfs/${fsid}/devices`)) {
    const path = nodeOf(name);
    await attempt(async () => {
      const btrfs = await superblockOf(path);
      if (btrfs && btrfs.devid > 0) members.push({ path, btrfs });
    });
  }
  return members;
}

/** What runs in the background, in the words of btrfs(8). */
async function readWork(
  state: FilesystemState,
  place: Places,
): Promise<Status["work"]> {
  const note: JobNote | undefined = attemptNow(() =>
    JSON.parse(readText(place.job) ?? "")
  );
  const since = note?.since ?? null;
  const askBtrfs = async (kind: string, command: string[]) => {
    const output = await ask(words`btrfs ${command} ${place.data}`, {
      to: `ask how far the ${kind} is`,
      accept: [0, 1], // 1: a balance runs
    });
    return {
      kind,
      since,
      progress: output.trim().replaceAll(/\s*\n\s*/g, ", "),
    };
  };
  const work: Status["work"] = [];
  if (state.operation === "device replace") {
    work.push(await askBtrfs("replace", ["replace", "status", "-1"]));
  } else if (state.operation.startsWith("balance")) {
    work.push(await askBtrfs("balance", ["balance", "status"]));
  } else if (state.operation !== "none") {
    work.push({ kind: state.operation, progress: "running", since });
  }
  if (readWishes(place).scrub) {
    work.push(await askBtrfs("scrub", ["scrub", "status"]));
  }
  // Between two of these, or while a disk is wiped and partitioned.
  if (note && work.length === 0 && fs.existsSync(`/proc/${note.pid}`)) {
    work.push({ kind: "maintenance", progress: note.what, since });
  }
  return work;
}

function isNearlyFull(space: Space | null, atLeastBytes = 0): space is Space {
  if (space === null) return false;
  return space.freeBytes < Math.max(space.sizeBytes / 20, atLeastBytes);
}

/** Says what is wrong, in sentences with a remedy. */
function judgeHealth(
  status: Status,
  state: FilesystemState | undefined,
): string[] {
  const last = status.lastBoot as { errors?: string[] } | null;
  const health = (last?.errors ?? [])
    .map((error) => `The last boot said: ${error}`);
  for (const device of status.devices) {
    const name = device.path ?? `device ${device.devid}`;
    if (device.missing) {
      health.push(
        `Device ${device.devid} is missing: there is no redundancy until it ` +
          `is back, or a new disk is marked with persistence.ts --enable`,
      );
    }
    const errors = Object.entries(device.errors)
      .map(([kind, count]) => `${count} ${kind.replace("_errs", "")}`);
    if (errors.length > 0) {
      health.push(
        `${name} had errors (${errors.join(", ")}): replace the disk; if it ` +
          `was the cable, "btrfs device stats --reset" forgets them`,
      );
    }
  }
  if (state && balanceFilters(state).length > 0) {
    health.push("Not all chunks are mirrored yet");
  }
  const { space, metadataSpace } = status;
  if (isNearlyFull(space)) {
    health.push(
      `"/${DATA_MOUNT}" is nearly full: ${inMiB(space.freeBytes)} of ` +
        `${inMiB(space.sizeBytes)} are free: delete something, or enlarge ` +
        `or add a disk`,
    );
  }
  if (isNearlyFull(metadataSpace, LARGEST_METADATA_RESERVATION_BYTES)) {
    health.push(
      `The metadata of "/${DATA_MOUNT}" are nearly full: ` +
        `${inMiB(metadataSpace.freeBytes)} are free: delete files or ` +
        `snapshots, or enlarge or add a disk`,
    );
  }
  return health;
}

/** The status for people. */
function describeStatus(status: Status): string {
  const lines = [
    status.mode === "persistent"
      ? `Persistent: "${status.label}" ${status.uuid}`
      : status.mode === "volatile"
      ? "Volatile: what is written is lost at shutdown"
      : "Not set up: persistence.ts has not run in this system",
  ];
  for (const device of status.devices) {
    const state = device.missing
      ? "missing"
      : `${device.path}, ${inMiB(device.sizeBytes ?? 0)}`;
    lines.push(`  device ${device.devid}: ${state}`);
  }
  if (status.profiles) {
    const { data, metadata, system } = status.profiles;
    lines.push(
      `  profiles: data ${data.join("+")}, metadata ${metadata.join("+")}, ` +
        `system ${system.join("+")}`,
    );
  }
  if (status.space) {
    const { freeBytes, sizeBytes } = status.space;
    lines.push(`  space: ${inMiB(freeBytes)} of ${inMiB(sizeBytes)} free`);
  }
  for (const mount of status.mounts) {
    lines.push(`  ${mount.target}: ${mount.type} from ${mount.source}`);
  }
  if (status.swap.length > 0) lines.push(`  swap: ${status.swap.join(", ")}`);
  for (const work of status.work) {
    const since = work.since ? ` since ${work.since}` : "";
    lines.push(`In the background${since}: ${work.kind}: ${work.progress}`);
  }
  for (const problem of status.health) lines.push(`Attention: ${problem}`);
  if (status.mode !== "none" && status.health.length === 0) {
    lines.push("Healthy");
  }
  return lines.join("\n");
}

async function showStatus(settings: Settings, json: boolean): Promise<void> {
  let status = await readStatus(settings);
  if (json) return print(JSON.stringify(status, null, 2));
  print(describeStatus(status));
  // On a terminal the progress moves, until the work ends or ^C.
  while (process.stdout.isTTY && status.work.length > 0) {
    await sleep(1000);
    status = await readStatus(settings);
    process.stdout.write("\x1b[H\x1b[2J"); // home, clear the screen
    print(describeStatus(status));
  }
}

async function dryRun(settings: Settings, json: boolean): Promise<void> {
  const plan = await makePlan(settings, 0, true);
  if (json) return print(JSON.stringify(plan, null, 2));
  for (const line of describePlan(plan)) print(line);
  for (const line of plan.warnings) print(`warning: ${line}`);
  for (const line of plan.errors) print(`error: ${line}`);
}

// ---------------------------------------------------------------------------
// Commands, messages, and other small things.
// ---------------------------------------------------------------------------

interface RunOptions {
  /** What the command is to achieve: "Cannot {to}: ...". */
  to: string;
  /** Statuses that are no failure. */
  accept?: number[];
  timeoutMs?: number;
}

/**
 * A command as it would be typed, split at its spaces. What is put in stays
 * part of one word, whatever is in it; a list becomes a word for each.
 */
function words(
  typed: TemplateStringsArray,
  ...values: (string | number | string[])[]
): string[] {
  // No argument holds a NUL: here it stands around the number of a value.
  const line = typed.reduce((left, right, i) => `${left}\0${i - 1}\0${right}`);
  return line.split(/\s+/).flatMap((word) => {
    const list = values[Number(/^\0(\d+)\0$/.exec(word)?.[1])];
    if (Array.isArray(list)) return list;
    return word.replace(/\0(\d+)\0/g, (_, i) => `${values[i]}`);
  });
}

/**
 * Runs a command that does something.
 *
 * @returns Its status, one of those that are accepted.
 * @throws {Error} A sentence that tells apart: not installed, failed, killed,
 * no answer in time; with the end of what it wrote to stderr.
 */
async function run(
  command: string[],
  options: RunOptions & { stdin?: string | Uint8Array },
): Promise<number> {
  const { to, stdin, accept = [0], timeoutMs = TIMEOUT.commandMs } = options;
  const program = findCommand(command, to);
  // Files, not pipes: what reads a pipe takes 4 ms to load.
  const input = stdin === undefined ? "ignore" : openNameless(stdin);
  const errors = attemptNow(() => openNameless("")) ?? "inherit";
  try {
    const what = `Cannot ${to}: "${command[0]}"`;
    const stdio: Stdio = [input, "ignore", errors];
    const all = [program, ...command.slice(1)];
    const end = await endOf(all, what, timeoutMs, stdio);
    if (typeof end === "number" && accept.includes(end)) return end;
    throw failure(command, to, end, readNameless(errors));
  } finally {
    if (/^u?mount$/.test(command[0])) knownMounts = undefined;
    for (const file of [input, errors]) {
      if (typeof file === "number") fs.closeSync(file);
    }
  }
}

/**
 * Asks a command for what it prints.
 *
 * @returns Its output.
 * @throws {Error} As {@linkcode run}.
 */
async function ask(command: string[], options: RunOptions): Promise<string> {
  const { to, accept = [0], timeoutMs = TIMEOUT.commandMs } = options;
  const program = findCommand(command, to);
  // Loaded here: it takes 20 ms, and hardly a boot asks anything.
  const { $, KillController } = await import("dax");
  const killer = new KillController();
  // dax reports a child that was killed by a signal as a success: the shell
  // between them makes that a status, and passes on that the time is up.
  const script = 'trap "kill -KILL \\$!" TERM; "$@" & wait $!';
  const asking = $`/bin/sh -c ${script} sh ${[program, ...command.slice(1)]}`
    .signal(killer.signal).noThrow()
    .stdin("null").stdout("piped").stderr("piped");
  const what = `Cannot ${to}: "${command[0]}"`;
  const { code, stdout, stderr } = await withTimeout(asking, timeoutMs, what)
    .catch((error) => {
      killer.kill("SIGTERM");
      throw error;
    });
  if (accept.includes(code)) return stdout;
  const end = code > 128 && code <= 128 + 64 ? `signal ${code - 128}` : code;
  throw failure(command, to, end, stderr);
}

/** What a child has as stdin, stdout and stderr; a number is an open file. */
type Stdio = (number | "ignore" | "inherit")[];

interface StartOptions {
  stdio: Stdio;
  /** In a session of its own, so that it outlives this process. */
  detached?: boolean;
}

interface Child {
  /** Its status, or the name of the signal that killed it. */
  ended: Promise<number | string>;
  kill: () => void;
}

/**
 * Starts a program: the executable does it by Bun's own function, because
 * node:child_process is half a MiB of it and takes 2 ms of each boot.
 *
 * @throws {Error} When it cannot be executed.
 */
function start(command: string[], options: StartOptions): Child {
  if (typeof Bun !== "undefined") {
    const child = Bun.spawn(command, { ...options, env: process.env });
    if (options.detached) child.unref();
    return {
      ended: child.exited.then((status) => child.signalCode ?? status),
      kill: () => child.kill("SIGKILL"),
    };
  }
  // Not imported, for the executable would then embed it.
  const { spawn } = process.getBuiltinModule("node:child_process");
  const child = spawn(command[0], command.slice(1), options);
  const ended = new Promise<number | string>((resolve) =>
    child.on("exit", (status, signal) => resolve(status ?? signal ?? "?"))
      .on("error", () => {}) // it has no number either
  );
  if (child.pid === undefined) throw new Error("It cannot be executed");
  if (options.detached) child.unref();
  return { ended, kill: () => child.kill("SIGKILL") };
}

/**
 * Runs a program until it ends, or kills it when the time is up.
 *
 * @throws {Error} When it cannot be executed.
 * @throws {NoAnswer} When the time is up.
 */
async function endOf(
  command: string[],
  what: string,
  timeoutMs: number,
  stdio: Stdio,
): Promise<number | string> {
  let child: Child;
  try {
    child = start(command, { stdio });
  } catch (error) {
    throw new Error(`${what}: ${messageOf(error)}`);
  }
  try {
    return await withTimeout(child.ended, timeoutMs, what);
  } catch (error) {
    child.kill();
    throw error;
  }
}

function findCommand([name, ...args]: string[], to: string): string {
  const program = findProgram(name);
  if (!program) throw new Error(`Cannot ${to}: "${name}" is not installed`);
  say("debug", [name, ...args].join(" "));
  return program;
}

/** The error for a command that ended with a status or by a signal. */
function failure(
  command: string[],
  to: string,
  end: number | string | null,
  stderr: string,
): Error {
  const how = typeof end === "number"
    ? `failed with status ${end}`
    : `was killed by ${end}`;
  const said = stderr.trim().split("\n").slice(-3).join("; ");
  return new Error(`Cannot ${to}: "${command.join(" ")}" ${how}: ${said}`);
}

let nameless = 0;

/** Opens a file that has no name any more, for a command to read or write. */
function openNameless(contents: string | Uint8Array): number {
  const path = `/run/lightwhale-${process.pid}.${nameless++}`;
  const file = fs.openSync(path, "wx+", 0o600);
  fs.unlinkSync(path);
  const bytes = typeof contents === "string"
    ? new TextEncoder().encode(contents)
    : contents;
  if (bytes.length === 0) return file;
  // At a position, so that the command begins at the start.
  const written = fs.writeSync(file, bytes, 0, bytes.length, 0);
  assert(written === bytes.length, `Cannot write to "${path}": /run is full`);
  return file;
}

/** What a command wrote to a nameless file. */
function readNameless(file: number | "inherit"): string {
  if (file === "inherit") return "";
  const bytes = new Uint8Array(fs.fstatSync(file).size);
  fs.readSync(file, bytes, 0, bytes.length, 0);
  return text(bytes, 0, bytes.length);
}

/** Where a program is, or undefined where it is not installed. */
function findProgram(name: string): string | undefined {
  for (const directory of (process.env.PATH ?? "").split(":")) {
    if (directory && fs.existsSync(join(directory, name))) {
      return join(directory, name);
    }
  }
}

/** Of what did not answer: to ask again would be to wait as long again. */
class NoAnswer extends Error {}

/**
 * Gives up on something that does not answer.
 *
 * @throws {NoAnswer} When the time is up.
 */
function withTimeout<T>(
  promise: PromiseLike<T>,
  timeoutMs: number,
  what: string,
): Promise<T> {
  return new Promise((resolve, reject) => {
    const timer = timeoutMs === Infinity ? undefined : setTimeout(() => {
      reject(new NoAnswer(`${what}: no answer in ${timeoutMs / 1000} s`));
    }, timeoutMs);
    promise.then(resolve, reject).then(() => clearTimeout(timer));
  });
}

interface Lock {
  release: () => void;
}

/**
 * Keeps others from working at the same time. flock(2) belongs to the open
 * file, which flock(1) shares with us: it ends when we do, however we end.
 *
 * @throws {Error} When another one holds it for longer than `timeoutMs`.
 */
async function takeLock(
  path: string,
  timeoutMs = TIMEOUT.lockMs,
): Promise<Lock> {
  const flock = findProgram("flock");
  if (!flock) {
    say("warning", `Working without a lock: "flock" is not installed`);
    return { release: () => {} };
  }
  fs.mkdirSync(dirname(path), { recursive: true });
  const started = Date.now();
  const file = fs.openSync(path, "a");
  const command = [flock, "--timeout", `${timeoutMs / 1000}`, "0"];
  const stdio: Stdio = [file, "ignore", "ignore"];
  const end = await endOf(command, "flock", timeoutMs + 5000, stdio)
    .catch(messageOf);
  // flock(1): the time is up; BusyBox's, at once: it knows no --timeout.
  if (end === 1 && Date.now() - started >= timeoutMs) {
    fs.closeSync(file);
    throw new Error(
      `Cannot lock "${path}": another persistence.ts is at work; wait for it`,
    );
  }
  if (end !== 0) {
    say("warning", `Working without a lock: "flock" failed (${end})`);
  }
  return { release: () => fs.closeSync(file) };
}

/** Priorities of syslog(2). */
const PRIORITY = { error: 3, warning: 4, info: 6, debug: 7 };
type Level = keyof typeof PRIORITY;

/** How much is said on stderr; the kernel log gets all but debug messages. */
const speech = {
  level: "info" as Level,
  kernelLog: undefined as number | undefined,
};

/** What was said that matters, for the status file. */
const messages = { warnings: [] as string[], errors: [] as string[] };

function say(level: Level, message: string): void {
  if (level === "error") messages.errors.push(message);
  if (level === "warning") messages.warnings.push(message);
  const line = `persistence: ${message.replaceAll(/\p{Cc}+/gu, " ")}`;
  if (PRIORITY[level] <= PRIORITY[speech.level]) {
    attemptNow(() => fs.writeSync(2, line + "\n")); // console.error colours
  }
  const { kernelLog } = speech;
  if (kernelLog === undefined || level === "debug") return;
  attemptNow(() => fs.writeSync(kernelLog, `<${PRIORITY[level]}>${line}\n`));
}

function sayError(error: unknown): void {
  say("error", messageOf(error));
}

function sayPlan(plan: Plan): void {
  for (const line of describePlan(plan)) say("info", line);
  for (const warning of plan.warnings) say("warning", warning);
  for (const error of plan.errors) say("error", error);
}

/** Results go to stdout. */
function print(line: string): void {
  console.log(line);
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Does something that may fail without ending the boot, and says so. */
async function attempt(step: () => unknown): Promise<void> {
  try {
    await step();
  } catch (error) {
    sayError(error);
  }
}

/** Does it with each: none fails for another one's sake. */
async function attemptEach<T>(
  items: T[],
  step: (item: T) => Promise<void>,
): Promise<void> {
  for (const item of items) await attempt(() => step(item));
}

/**
 * Waits until all have ended, so that nothing goes on behind a failure.
 *
 * @returns What each came to.
 * @throws The first failure.
 */
async function allOf<T extends unknown[]>(
  steps: [...T],
): Promise<{ [K in keyof T]: Awaited<T[K]> }> {
  await Promise.allSettled(steps);
  return await Promise.all(steps);
}

/** The value of an expression, or undefined where it throws. */
function attemptNow<T>(step: () => T): T | undefined {
  try {
    return step();
  } catch {
    return undefined;
  }
}

/** Text of a small file without the newline at its end, if it can be read. */
function readText(path: string): string | undefined {
  return attemptNow(() => fs.readFileSync(path, "utf8"))?.replace(/\n$/, "");
}

function listDirectory(path: string): string[] {
  return attemptNow(() => fs.readdirSync(path)) ?? [];
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

function assert(condition: boolean, message: string): void {
  if (!condition) throw new Error(message);
}

// ---------------------------------------------------------------------------
// The command line.
// ---------------------------------------------------------------------------

/** Bad input: exit status 2. */
export class UsageError extends Error {}

const HELP = `Usage:
  persistence.ts                       set up persistence (done at every boot)
  persistence.ts --enable DEVICE...    mark whole disks, GPT partitions or
                                       image files: the next boot formats them
  persistence.ts --disable DEVICE...   take the mark away again
  persistence.ts --status [--json]     what is mounted, from what, how healthy
  persistence.ts --dry-run [--json]    what the next boot would do

Options:
  --force           with --enable: also a device that holds data
  --wait SECONDS    how long to wait for missing devices (default: 10)
  --devices LIST    look at these devices only, comma separated; loop devices
                    are looked at only when they are listed
  --root DIR        the system root to work on (default: /)
  --quiet           say only what is wrong
  --verbose         say every command
  --help            show this help
  --version         show the version

The boot itself starts "persistence.ts --maintain" for long work (replace,
balance, scrub). On the kernel command line: lightwhale.persistence=off,
lightwhale.wait=SECONDS, lightwhale.swap=off, lightwhale.data=UUID.

Exit status: 0 as configured; 1 something failed and the fallback is in place;
2 the command line is wrong.`;

const defaultSettings: Settings = {
  root: "/",
  waitMs: 10_000,
  off: false,
  noSwap: false,
};

const MODES = [
  ...["enable", "disable", "status", "dry-run", "maintain", "help", "version"],
];
const FLAGS = [...MODES, "force", "json", "quiet", "verbose"];

/** Reads the command line. What it gives counts more than the kernel's. */
export function parseCommandLine(args: string[]) {
  const options = args.slice(0, args.indexOf("--") >>> 0);
  const valued = options
    .find((arg) => FLAGS.includes(/^--(?:no-)?(.*?)=/.exec(arg)?.[1] ?? ""));
  if (valued) {
    throw new UsageError(`Option "${valued}" takes no value: see --help`);
  }
  const operandsItself = options.find((arg) => /^--(no-)?_(=|$)/.test(arg));
  if (operandsItself) {
    throw new UsageError(`Unknown option "${operandsItself}": see --help`);
  }
  const parsed = parseArgs(args, {
    boolean: FLAGS,
    string: ["wait", "devices", "root", "_"], // a file 007 is not 7
    unknown: (arg: string, key?: string) => {
      if (key) throw new UsageError(`Unknown option "${arg}": see --help`);
    },
  });
  const operands: string[] = parsed._.map(String);
  const modes = MODES.filter((mode) => parsed[mode]);
  const [mode = "boot"] = modes;
  if (modes.length > 1) {
    throw new UsageError(
      `Options --${modes[0]} and --${modes[1]} exclude each other`,
    );
  }
  const takesDevices = mode === "enable" || mode === "disable";
  if (takesDevices && operands.length === 0) {
    throw new UsageError(`Option --${mode} needs a DEVICE: see --help`);
  }
  if (!takesDevices && operands.length > 0) {
    throw new UsageError(`Unexpected argument "${operands[0]}": see --help`);
  }
  if (parsed.force && mode !== "enable") {
    throw new UsageError("Option --force goes with --enable only");
  }
  if (parsed.json && mode !== "status" && mode !== "dry-run") {
    throw new UsageError("Option --json goes with --status or --dry-run only");
  }
  const given: Partial<Settings> = {};
  if (parsed.root !== undefined) {
    if (!attemptNow(() => fs.statSync(parsed.root).isDirectory())) {
      throw new UsageError(`Cannot use --root "${parsed.root}": no directory`);
    }
    given.root = fs.realpathSync(parsed.root);
    if (/[\s\\,:]/.test(given.root)) {
      throw new UsageError(
        `Cannot use --root "${parsed.root}": mount options cannot hold ` +
          `spaces, commas, colons and backslashes`,
      );
    }
  }
  if (parsed.devices !== undefined) {
    given.only = parsed.devices.split(",").filter(Boolean).map(nameOfDisk);
    if (given.only?.length === 0) {
      throw new UsageError("Option --devices needs a list of devices");
    }
  }
  if (parsed.wait !== undefined) {
    given.waitMs = parseSeconds(parsed.wait);
    if (given.waitMs === undefined) {
      throw new UsageError(
        `Cannot wait "${parsed.wait}" seconds (--wait): no number`,
      );
    }
  }
  return { mode, operands, given, parsed };
}

/** Reads the kernel's command line, which is never a reason not to boot. */
export function parseKernelCommandLine(kernel: string) {
  const words = kernel.split(/\s+/);
  const options = new Map<string, string>(); // of one name the last counts
  for (const word of words) {
    const end = word.indexOf("=");
    if (end > 0) options.set(word.slice(0, end), word.slice(end + 1));
  }
  const settings: Settings = {
    ...defaultSettings,
    off: options.get("lightwhale.persistence") === "off",
    noSwap: words.includes("noswap") ||
      options.get("lightwhale.swap") === "off",
    dataUuid: options.get("lightwhale.data")?.toLowerCase(),
  };
  const warnings: string[] = [];
  const wait = options.get("lightwhale.wait");
  const waitMs = wait === undefined ? settings.waitMs : parseSeconds(wait);
  if (waitMs === undefined) {
    warnings.push(`Cannot wait "${wait}" seconds (lightwhale.wait): no number`);
  } else settings.waitMs = waitMs;
  return { settings, warnings };
}

/** Seconds, with a fraction or without, in milliseconds. */
function parseSeconds(seconds: string): number | undefined {
  return /^\d{1,5}(\.\d+)?$/.test(seconds) ? 1000 * Number(seconds) : undefined;
}

/** `/dev/disk/by-id/...` or `/dev/loop0` to `loop0`; a partition's disk. */
function nameOfDisk(path: string): string {
  const name = attemptNow(() => nameOf(fs.realpathSync(path)));
  const disk = name && wholeDisk(name);
  if (disk) return disk;
  throw new UsageError(`Cannot find "${path}" (--devices): no such device`);
}

/** Name of the whole disk that a device is part of, or its own. */
function wholeDisk(name: string): string | undefined {
  if (fs.existsSync(`/sys/block/${name}`)) return name;
  const partition = attemptNow(() =>
    fs.realpathSync(`/sys/class/block/${name}`)
  );
  return partition && basename(dirname(partition));
}

/** Runs what the command line asks for. Returns the exit status. */
async function main(args: string[]): Promise<number> {
  try {
    const { mode, operands, given, parsed } = parseCommandLine(args);
    if (mode === "help" || mode === "version") {
      print(mode === "help" ? HELP : `persistence.ts ${VERSION}`);
      return 0;
    }
    const kernel = parseKernelCommandLine(readText("/proc/cmdline") ?? "");
    const settings = { ...kernel.settings, ...given };
    if (parsed.quiet) speech.level = "warning";
    if (parsed.verbose) speech.level = "debug";
    // What init gives may lack the places of mkfs.btrfs and sfdisk.
    process.env.PATH = `${
      process.env.PATH ?? ""
    }:/usr/sbin:/usr/bin:/sbin:/bin`;
    process.env.LC_ALL = "C"; // what programs say is read, and quoted
    if (mode === "boot" || mode === "maintain") {
      speech.kernelLog = attemptNow(() => fs.openSync("/dev/kmsg", "r+"));
    }
    for (const warning of kernel.warnings) say("warning", warning);
    if (process.getuid?.() !== 0) {
      throw new Error(`Cannot look at disks: only root may, log in as root`);
    }
    switch (mode) {
      case "status":
        await showStatus(settings, parsed.json);
        return 0;
      case "dry-run":
        await dryRun(settings, parsed.json);
        return 0;
      case "enable":
      case "disable": {
        const lock = await takeLock(join(places(settings.root).run, "lock"));
        if (mode === "disable") await disable(operands, settings);
        else await enable(operands, parsed.force, settings);
        lock.release();
        return 0;
      }
      case "maintain":
        return await maintain(settings);
      default:
        return await boot(settings);
    }
  } catch (error) {
    sayError(error);
    return error instanceof UsageError ? 2 : 1;
  }
}

if (import.meta.main) {
  // Not exitCode: something that never answered must not keep init waiting.
  process.exit(await main(process.argv.slice(2)));
}
