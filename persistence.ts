#!/usr/bin/env -S deno run --allow-all
/**
 * Persistence for Lightwhale, an immutable live system that runs Docker.
 *
 * Called without arguments, early at every boot, this program gives the
 * read-only system its one writable filesystem. All that a boot can do to a
 * disk stands before the line "A boot ends here": first the contract (names and
 * places), then {@linkcode boot}, whose body is the nine documented steps, then
 * the functions of those steps in the order in which they happen. That is three
 * hours of reading, at 150 words a minute; the sections that write to disks,
 * from "Before step 3" to "Step 6", are one of them. Behind that line come the
 * care of the disks in the background, the commands, and the toolbox (`run`,
 * `ask`, `say`, `attempt`, which do what their names say). The functions are of
 * three kinds:
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
import { Buffer } from "node:buffer";
import * as fs from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import process from "node:process";

// ---------------------------------------------------------------------------
// The contract: names and places that existing disks and scripts rely on.
// ---------------------------------------------------------------------------

/** Version of this program, printed by `--version`. */
export const VERSION = "1.1.0";

/** Magic header at offset 0 of a whole disk, and magic GPT partition name. */
export const MAGIC = "lightwhale-please-format-me";

/** The line after the header that has a disk formatted although others are in doubt. */
export const ANYWAY = "lightwhale-anyway";

/**
 * First word of the line that announces a payload; GPT name of a payload's
 * partition.
 */
export const PAYLOAD = "lightwhale-payload";

/** Label of the data filesystem and GPT name of its partitions. */
export const DATA = "lightwhale-data";

/** Label of a swap area and GPT name of its partition. */
export const SWAP = "lightwhale-swap";

/**
 * Label of a data filesystem while it is being made (step 5). {@linkcode DATA}
 * is set last. A power cut before that leaves disks that are still magic, with
 * half a filesystem or one with this label: the next boot formats them again.
 */
export const UNFINISHED = "lightwhale-unfinished";

/** The subvolumes, at the top level of the data filesystem. */
const SUBVOLUMES = {
  data: "@lightwhale-data",
  state: "@lightwhale-state",
  snapshots: "@lightwhale-state-snapshots",
};

/** Subvolumes in the state, where its snapshots stop; modes as Docker's own. */
const NESTED = { docker: 0o710, containerd: 0o711 };

/** The directories that get an overlay. */
const OVERLAYS = ["etc", "var", "home"];

/**
 * A kernel may have these on by default. They break, or show wrong files, when
 * a new system image brings another lower layer
 * (Documentation/filesystems/overlayfs.rst, "Changes to underlying filesystems").
 */
const OVERLAY_FEATURES_OFF = "index=off,redirect_dir=off,metacopy=off,xino=off";

/**
 * Reading must not write. An overlay does not take this over from the
 * filesystem of its upper (fs/overlayfs/super.c), so it is told as well.
 */
const NO_ATIME = "noatime";

/** Paths below the system root; see {@linkcode pathsBelow}. */
const DATA_MOUNT = "mnt/lightwhale-data";
const STATE = "lightwhale-state"; // in the data filesystem
const SNAPSHOTS = "lightwhale-state-snapshots";
const UPPER = "overlay/upper"; // in the state directory
const WORK = "overlay/work";
const APPLIED = "payload.json"; // which one, and when
const DOCKER_DATA_ROOT = `/${DATA_MOUNT}/${STATE}/docker`;
const DOCKER_DEFAULT = "/var/lib/docker"; // its own data root
const CONTAINERD_ROOT = "var/lib/containerd"; // of one that is a service
const DAEMON_JSON = "etc/docker/daemon.json";

const KiB = 1024;
const MiB = 1024 * KiB;
const GiB = 1024 * MiB;

/** mkfs.btrfs needs this much for `--data single --metadata dup`. */
const MINIMUM_DATA_BYTES = 109 * MiB;

/** A member of this size fits beside others of any size. */
const SURELY_FITS_BYTES = 2 * GiB;

/** A smaller disk gets no swap partition. */
const MINIMUM_DISK_FOR_SWAP_BYTES = 2 * GiB;

/**
 * Btrfs was seen to refuse a new directory with 4 MiB of metadata free: it
 * reserves the worst case, two nodes a level for each item (fs/btrfs/fs.h,
 * btrfs_calc_insert_metadata_size()).
 */
const LARGEST_METADATA_RESERVATION_BYTES = 8 * MiB;

/** How long an answer is waited for before a device or program is given up. */
const TIMEOUT = {
  readMs: 20_000, // a hard disk that spins up needs some 10 s
  commandMs: 60_000,
  detachMs: 5_000, // umount(8) may never end
  endMs: 30_000, // of a command that was killed
  mkfsMs: 300_000, // also add, replace: a discard of the device comes first
  mountMs: 300_000, // log replay and block group scan on large hard disks
  nodeMs: 10_000,
  lockMs: 120_000,
  hookMs: 30_000,
};

/** Where things are below the system root `--root`. */
export function pathsBelow(root: string) {
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
    containerd: join(state, "containerd"),
    daemonJson: join(root, DAEMON_JSON),
    imageDaemonJson: join(run, "overlay/lower", DAEMON_JSON),
    run,
    lower: join(run, "overlay/lower"),
    copyUp: join(run, "overlay/copy-up"),
    topLevel: join(run, "top-level"),
    fstab: join(run, "fstab"),
    report: join(run, "persistence.json"),
    job: join(run, "job.json"),
    joining: join(run, "joining"),
    health: join(run, "health"),
    memory: [join(run, "maintenance.json"), join(state, ".maintenance.json")],
    onHealth: join(root, "etc/lightwhale/on-health"),
    left: join(run, "left.json"),
  };
}

type Paths = ReturnType<typeof pathsBelow>;

// ---------------------------------------------------------------------------
// The facts: what is known about the machine before anything is decided.
// ---------------------------------------------------------------------------

/** What the command line and the kernel command line ask for. */
export interface Settings {
  root: string;
  /** Names of the whole disks to look at (`loop0`); undefined: all of them. */
  only?: string[];
  /** How long to wait for missing devices. */
  waitMs: number;
  /** `lightwhale.persistence=off`: boot volatile whatever the disks say. */
  off: boolean;
  /** `lightwhale.persistence=required`: there must be a data disk. */
  required: boolean;
  /** `lightwhale.swap=off` or `noswap`: neither make nor use swap. */
  noSwap: boolean;
  /** `lightwhale.data=UUID`: the data filesystem to use of several. */
  dataUuid?: string;
}

/** A device node: a whole disk, a partition, or a volume (md, device mapper). */
export interface DeviceNode {
  /** Name in `/sys/class/block`. */
  name: string;
  path: string;
  kind: "disk" | "partition" | "volume";
  /** Name of the whole disk that it is part of, or its own. */
  disk: string;
  /** Partition number, 0 for anything else. */
  number: number;
  deviceNumber?: string;
  /** Logical sector size of the disk. */
  sectorBytes: number;
  /** The entry of a partition that is in the table but not in the kernel. */
  entry?: GptPartition;
}

/** What our own reading found on a device, not judged yet. */
export interface Reading {
  error?: string;
  /** It begins with {@linkcode MAGIC}. */
  header: boolean;
  /** A line after the header is {@linkcode ANYWAY}. */
  anyway: boolean;
  /** Its first sector is the header and otherwise zeros. */
  onlyHeader: boolean;
  /** The line after the header says that a payload follows, or was copied. */
  payloadPlace?: "original" | "copy";
  table?: "mbr" | "gpt";
  gpt?: Gpt;
  btrfs?: Superblock;
  record?: MemberRecord;
  /** A record may be written: there are only zeros, or records of ours. */
  recordable: boolean;
  /** Neither its start nor its end holds anything beside our filesystem. */
  plain: boolean;
  /** A Btrfs superblock that is left only as a backup copy. */
  backup?: Superblock;
  /** A superblock of ours in a partition of the GPT that an MBR hides. */
  hidden?: Superblock;
  /** A superblock of a member with a record, whose magic was erased. */
  scratched?: Superblock;
  swapLabel?: string;
}

/** What is neither zeros nor known to libblkid. */
const UNKNOWN = "data of an unknown kind";

/** A signature that libblkid knows (wipefs(8)). */
export interface Signature {
  type: string;
  label?: string;
  atBytes?: number;
}

/** A device that may matter, with all that is known about it. */
export interface BlockDevice extends DeviceNode {
  startBytes: number;
  sizeBytes: number;
  readOnly: boolean;
  /** Why nothing may be written to it now, or undefined when it is free. */
  inUse?: string;
  /** GPT partition name, from the table or, failing that, from the kernel. */
  partitionName?: string;
  /** No two disks of a running system have the same (diskseq). */
  sequence?: string;
  /** What the disk says of itself: world-wide name, serial number. */
  hardware?: string;
  read: Reading;
  /** What libblkid sees; undefined where it was not asked. */
  signatures?: Signature[];
  magic: boolean;
  /** What is to be written to the filesystem that is made of it. */
  payload?: FoundPayload;
  holds: Holds;
}

/** A payload as a plan shows it: what it would write, and no contents. */
export interface FoundPayload {
  /** The node that it is read through, and where it begins there. */
  path: string;
  atBytes: number;
  place: "original" | "copy" | "partition";
  /** Paths of files; `password USER`. */
  writes: string[];
  /** Equal for equal texts; blinded, for plans are printed. */
  sum: number;
  /** Why it cannot be used, with the number of the line. */
  problem?: string;
}

/** What a device holds, as far as this program is concerned. */
export type Holds =
  | { kind: "nothing of ours" }
  | { kind: "unreadable"; why: string }
  | { kind: "swap" }
  /** Part of a Btrfs of any label. */
  | { kind: "member"; btrfs: Superblock; record?: MemberRecord }
  /** It may be a data disk, and cannot be used as one: never touched. */
  | {
    kind: "suspect";
    why: string;
    /** It carries the label of a data filesystem. */
    labelled: boolean;
    fsid?: string;
    /** The command that may repair it. */
    remedy?: string;
  };

type Holding<Kind extends Holds["kind"]> = BlockDevice & {
  holds: Extract<Holds, { kind: Kind }>;
};

export type Member = Holding<"member">;

export interface Facts {
  /** Those of the disks that hold something of ours, or may do so. */
  devices: BlockDevice[];
  /** A driver is bound to a disk that has not appeared yet. */
  diskPending: boolean;
  memoryBytes: number;
  /** Tells this machine from others; undefined where it has no identity. */
  machine?: string;
  /** What is mounted on the data filesystem's mount point. */
  mounted?: Mount & { fsid?: string };
  /** Devices that do not fit: found out by {@linkcode makePlan}. */
  misfits: Misfit[];
}

export type Mount = ReturnType<typeof parseMountinfo>[number];

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
  /** Size of all devices, missing ones included. */
  totalBytes: number;
  /** What is used in all of the filesystem, each byte counted once. */
  usedBytes: number;
  /** Writes since the last commit wait in a log tree. */
  hasLog: boolean;
  /** Only read by the kernel; other devices were added to it (btrfs(5)). */
  isSeed: boolean;
  /** False when the checksum is wrong: damaged, not absent. */
  intact: boolean;
}

const BTRFS = {
  superblockAt: 64 * KiB,
  backupAt: 64 * MiB,
  copiesAt: [64 * KiB, 64 * MiB, 256 * GiB],
  bytes: 4 * KiB,
  checksum: 0x00,
  checksummedFrom: 0x20,
  fsid: 0x20,
  ownPlace: 0x30,
  flags: 0x38,
  seeding: 1n << 32n,
  magic: 0x40,
  magicText: "_BHRfS_M",
  generation: 0x48,
  logRoot: 0x60,
  totalBytes: 0x70,
  usedBytes: 0x78,
  numDevices: 0x88,
  checksumType: 0xc4,
  devid: 0xc9,
  deviceBytes: 0xd1,
  label: 0x12b,
  labelBytes: 256,
};

/** A copy of a superblock, with its magic. */
function withBtrfsMagic(block: Uint8Array): Uint8Array {
  const copy = Buffer.from(block.subarray(0, BTRFS.bytes));
  copy.write(BTRFS.magicText, BTRFS.magic);
  return copy;
}

/**
 * Reads a Btrfs superblock, which is intact only at its own place `at`;
 * undefined where there is none.
 */
export function parseSuperblock(
  block: Uint8Array,
  at: number = BTRFS.superblockAt,
): Superblock | undefined {
  if (block.length < BTRFS.bytes) return undefined;
  if (text(block, BTRFS.magic, 8) !== BTRFS.magicText) return undefined;
  const view = viewOf(block);
  const number = (at: number) => Number(view.getBigUint64(at, true));
  const body = block.subarray(BTRFS.checksummedFrom, BTRFS.bytes);
  // Checksums other than crc32c are left to the kernel to verify.
  const isRight = view.getUint16(BTRFS.checksumType, true) !== 0 ||
    view.getUint32(BTRFS.checksum, true) === crc32c(body);
  return {
    fsid: uuid(block, BTRFS.fsid),
    label: text(block, BTRFS.label, BTRFS.labelBytes),
    generation: number(BTRFS.generation),
    numDevices: number(BTRFS.numDevices),
    devid: number(BTRFS.devid),
    deviceBytes: number(BTRFS.deviceBytes),
    totalBytes: number(BTRFS.totalBytes),
    usedBytes: number(BTRFS.usedBytes),
    hasLog: number(BTRFS.logRoot) !== 0,
    isSeed: (view.getBigUint64(BTRFS.flags, true) & BTRFS.seeding) !== 0n,
    intact: isRight && number(BTRFS.ownPlace) === at,
  };
}

/** The table is made when it is needed: many calls read no superblock. */
let crc32cTable: Uint32Array | undefined;

/** CRC-32C (reflected polynomial, table-driven). */
function crc32c(bytes: Uint8Array): number {
  const table = crc32cTable ??= Uint32Array.from({ length: 256 }, (_, crc) => {
    for (let i = 0; i < 8; i++) crc = (crc >>> 1) ^ (crc & 1 ? 0x82f63b78 : 0);
    return crc;
  });
  let remainder = ~0;
  for (let i = 0; i < bytes.length; i++) {
    remainder = table[(remainder ^ bytes[i]) & 0xff] ^ (remainder >>> 8);
  }
  return ~remainder >>> 0;
}

/** Globals that exist only in the executable (Bun), not under Deno. */
declare const Bun: {
  hash: { crc32(bytes: Uint8Array): number };
  spawn(command: string[], options: StartOptions & { env: unknown }): {
    exited: Promise<number>;
    signalCode: string | null;
    pid: number;
    unref: () => void;
  };
} | undefined;

/** CRC-32: Bun's own where there is one (node:zlib would load for 6 ms). */
function crc32(bytes: Uint8Array): number {
  if (typeof Bun !== "undefined") return Bun.hash.crc32(bytes);
  return process.getBuiltinModule("node:zlib").crc32(bytes);
}

/** A GUID partition table (UEFI Specification 2.10, chapter 5). */
export interface Gpt {
  partitions: GptPartition[];
  /** What is lost: the protective MBR, or the primary table as well. */
  lost?: "first sector" | "primary table";
  /** The sector size that it was made for, which may be another disk's. */
  sectorBytes: number;
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
  ownLba: 24,
  backupLba: 32,
  entriesLba: 72,
  entryCount: 80,
  entryBytes: 84,
  entriesCrc: 88,
  /** Room that 128 entries of 128 bytes take before the backup header. */
  entriesArea: 16 * KiB,
  /** Where 128 entries end that begin at the third sector, of 4 KiB. */
  largestEndBytes: 24 * KiB,
  /** More than any tool makes; entries beyond would take memory for nothing. */
  largestBytes: MiB,
  entry: { type: 0, first: 32, last: 40, name: 56, nameBytes: 72 },
};

/**
 * Reads the GUID partition table whose header is at a byte of a disk; undefined
 * where it is not, or is damaged.
 */
export async function readGptAt(
  at: number,
  sectorBytes: number,
  read: Read,
): Promise<Gpt | undefined> {
  const header = await read(at, sectorBytes);
  if (header.length < 512 || text(header, 0, 8) !== GPT.signature) {
    return undefined;
  }
  const view = viewOf(header);
  const headerBytes = view.getUint32(GPT.headerBytes, true);
  if (headerBytes < 92 || headerBytes > header.length) return undefined;
  const checked = header.slice(0, headerBytes);
  checked.fill(0, GPT.headerCrc, GPT.headerCrc + 4);
  if (crc32(checked) !== view.getUint32(GPT.headerCrc, true)) return undefined;
  const bytesAt = (field: number) =>
    Number(view.getBigUint64(field, true)) * sectorBytes;
  const entryBytes = view.getUint32(GPT.entryBytes, true); // 128 * 2^n
  const entriesBytes = entryBytes * view.getUint32(GPT.entryCount, true);
  if (entryBytes < 128 || entryBytes & (entryBytes - 1)) return undefined;
  if (bytesAt(GPT.ownLba) !== at) return undefined;
  if (entriesBytes > GPT.largestBytes) return undefined;

  const entries = await read(bytesAt(GPT.entriesLba), entriesBytes);
  if (entries.length !== entriesBytes) return undefined;
  if (crc32(entries) !== view.getUint32(GPT.entriesCrc, true)) return undefined;
  const partitions: GptPartition[] = [];
  const table = viewOf(entries);
  const { type, first, last, name, nameBytes } = GPT.entry;
  // Four words and not two of 64 bits: there are 128 entries on each disk.
  const isUsed = (at: number) =>
    table.getUint32(at) !== 0 || table.getUint32(at + 4) !== 0 ||
    table.getUint32(at + 8) !== 0 || table.getUint32(at + 12) !== 0;
  for (let at = 0; at + entryBytes <= entriesBytes; at += entryBytes) {
    if (!isUsed(at + type)) continue;
    const from = Number(table.getBigUint64(at + first, true));
    const to = Number(table.getBigUint64(at + last, true));
    const label = entries.subarray(at + name, at + name + nameBytes);
    partitions.push({
      number: at / entryBytes + 1,
      name: decode(label, "utf16le").replace(/\0.*$/s, ""),
      startBytes: from * sectorBytes,
      sizeBytes: (to - from + 1) * sectorBytes,
    });
  }
  const endBytes = bytesAt(GPT.backupLba) + sectorBytes;
  return { partitions, sectorBytes, endBytes };
}

/** Partition types in the MBR of a disk, if LBA 0 is one. */
export function mbrTypes(start: Uint8Array): number[] {
  if (start[510] !== 0x55 || start[511] !== 0xaa) return [];
  return MBR.entriesAt.map((at) => start[at + MBR.type])
    .filter((type) => type > 0);
}

const MBR = {
  codeBytes: 440,
  entriesAt: [446, 462, 478, 494],
  type: 4,
  first: 8, // the kernel takes no other than 1 for protective
  sectors: 12, // size of the partition
  protective: 0xee,
};

/** Does LBA 0 announce a GPT (UEFI Specification 2.10, 5.2.3)? */
export const isProtectiveMbr = (start: Uint8Array) =>
  mbrTypes(start).length > 0 &&
  MBR.entriesAt.some((at) =>
    start[at + MBR.type] === MBR.protective &&
    viewOf(start).getUint32(at + MBR.first, true) === 1
  );

/**
 * Reads the label of a swap area (mkswap(8); linux/swap.h). Its magic ends the
 * first page, whose size is that of the machine that made it.
 */
export function parseSwapLabel(start: Uint8Array): string | undefined {
  const magic = "SWAPSPACE2";
  const isSwap = [4, 8, 16, 32, 64].some((pageKiB) =>
    text(start, pageKiB * KiB - magic.length, magic.length) === magic
  );
  return isSwap ? text(start, 1052, 16) : undefined;
}

/**
 * What a member remembers of its last read-write mount. Superblocks cannot
 * tell a stale member, a split mirror or a copy. So every member that is present
 * at a mount gets a record in the first 64 KiB of its data partition, which
 * Btrfs never uses (btrfs(5), "bootloader support"). Version 1.0 ignores and
 * drops the fields from `machine` on.
 */
export interface MemberRecord {
  fsid: string;
  /** Identity of this member; unlike a devid it is never used again. */
  member: string;
  /** Counts the read-write mounts. */
  epoch: number;
  /** Identities of the members that were present. */
  present: string[];
  /** Members that were not, and the own generation when each was last there. */
  absent: Record<string, number>;
  /** Hash of the machine that mounted it. */
  machine?: string;
  /** When that was, in seconds since 1970; never less than before. */
  seconds?: number;
  hardware?: string;
  /** A random name for each of the last mounts: what a copy does not share. */
  mounts?: string[];
  /** The last mount that each absent member took part in. */
  lastSeen?: Record<string, string>;
  leaving?: Leaving;
  settled?: Settled;
}

/** A member was told to leave by `--move` or `--remove`. */
export interface Leaving {
  member: string;
  /** `left`: it is no member any more, and was not there to be wiped. */
  how: "move" | "remove" | "left";
  /** Hardware of the disk that it moves to, empty where that has no name. */
  to?: string;
}

/**
 * The profiles are settled for so many devices. Chunks are converted only where
 * they were written before a device was added, or while one was missing.
 */
export interface Settled {
  /** 0 while one is missing. */
  devices: number;
  /** Types of chunks that a person keeps without a mirror on several devices. */
  unmirrored: string[];
}

/** Two slots, written in turn, so that a torn write leaves the older one. */
const RECORD = {
  slotsAt: [56 * KiB, 60 * KiB],
  bytes: 4 * KiB,
  title: "lightwhale-mark 1",
  /** There is room for so many absent members, and so many mounts. */
  remembered: 16,
};

const UNSETTLED: Settled = { devices: 0, unmirrored: [] };

/** Writes a record as text: a title, the CRC-32 of the rest, and JSON. */
export function formatRecord(record: MemberRecord): Uint8Array {
  const json = JSON.stringify(record);
  const sum = crcOfText(json).toString(16).padStart(8, "0");
  return blockOf([RECORD.title, sum, json], RECORD.bytes);
}

/** Reads the newer of two slots, given as they stand on the disk. */
export function parseRecord(slots: Uint8Array): MemberRecord | undefined {
  return RECORD.slotsAt
    .map((_, i) => parseSlot(text(slots, i * RECORD.bytes, RECORD.bytes)))
    .filter((record) => record !== undefined)
    .sort((a, b) => b.epoch - a.epoch)[0];
}

function parseSlot(slot: string): MemberRecord | undefined {
  const [title, sum, json] = slot.split("\n");
  if (title !== RECORD.title) return undefined;
  if (crcOfText(json) !== parseInt(sum, 16)) return undefined;
  return orUndefined(() => {
    const record = JSON.parse(json);
    const { fsid, member, epoch, present, absent } = record;
    const { machine = "", hardware = "", seconds = 0 } = record;
    const { mounts = [], lastSeen = {} } = record;
    const { leaving = { member: "", how: "" } } = record;
    const { devices, unmirrored } = record.settled ?? UNSETTLED;
    const { to = "" } = leaving;
    const texts = [fsid, member, machine, hardware, leaving.member, leaving.how]
      .concat(to, present, mounts, unmirrored, Object.values(lastSeen));
    const valid = [present, mounts, unmirrored].every(Array.isArray) &&
      [absent, lastSeen].every((table) => typeof table === "object") &&
      texts.every((value) => typeof value === "string") &&
      [epoch, seconds, devices, ...Object.values(absent)]
        .every(Number.isSafeInteger);
    return valid ? record : undefined;
  });
}

/**
 * A record is written over zeros or a record of ours, also one whose first
 * sector a power cut tore off.
 */
function isRecordSlot(slot: Uint8Array): boolean {
  const { title } = RECORD;
  if (text(slot, 0, title.length) === title) return true;
  const isTextAndZeros = slot.every((byte) =>
    byte < 0x7f && (byte >= 0x20 || byte === 0 || byte === 0x0a)
  );
  return isZero(slot.subarray(0, 512)) && isTextAndZeros;
}

const crcOfText = (text: string) => crc32(new TextEncoder().encode(text));

/** Files and passwords: a txtar archive (golang.org/x/tools/txtar) with an end. */
export interface Payload {
  entries: PayloadEntry[];
  /** Where it begins (its title, if there is one), its body, and its end. */
  atBytes: number;
  bodyBytes: number;
  endBytes: number;
  /** Lines end as on Windows: those of the files then end as on Linux. */
  crlf: boolean;
}

/** A file of a payload, or the password of a user. */
export interface PayloadEntry {
  /** The line of its marker. */
  line: number;
  /** `etc/hostname`, or `password USER`. */
  name: string;
  user?: string;
  contents: Uint8Array;
}

const PAYLOAD_TEXT = {
  title: `${PAYLOAD} 1`,
  /** Takes the place of the title as soon as the copy is whole. */
  copied: `${PAYLOAD} copied`,
  end: "-- end --",
  largestBytes: 480 * KiB,
  /** More than this is never read: the lines before it fit in a sector. */
  roomBytes: 484 * KiB,
};

/**
 * Reads a payload without copying it (unless its lines end in CRLF). Whatever
 * might be lost in silence is refused. What stands behind the end is not read.
 *
 * @param bytes From its first line on: the magic header, or the title, or, in a
 * file, the first marker.
 * @throws {Error} With the number of the line, and without its contents.
 */
export function parsePayload(bytes: Uint8Array): Payload {
  const { title, end: endMarker, largestBytes } = PAYLOAD_TEXT;
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
  const indexOf = (byte: number, from: number) =>
    buffer.indexOf(byte, from) >>> 0; // none: behind all others
  const nul = indexOf(0, 0);
  const payload: Payload = {
    entries: [],
    atBytes: 0,
    bodyBytes: 0,
    endBytes: 0,
    crlf: false,
  };
  const lines = new Map<string, number>(); // of the markers, by name
  let isTitled = false;
  let last: PayloadEntry | undefined;
  let contentsAt = 0;
  for (let line = 1, at = 0, next = 0; !payload.endBytes; line++, at = next) {
    const newline = indexOf(0x0a, at);
    const end = Math.min(newline, nul, bytes.length);
    next = newline + 1;
    // Most lines cannot be markers: these begin with a dash or a space.
    if (last && end === newline && bytes[at] > 0x2d) continue;
    const typed = buffer.toString("latin1", at, end);
    if (!last) payload.crlf = typed.endsWith("\r");
    const shown = payload.crlf ? typed.replace(/\r$/, "") : typed;
    const isMarker = /^-- .* --$/s.test(shown);
    if (isMarker && last) {
      const contents = bytes.subarray(contentsAt, at);
      last.contents = payload.crlf ? withoutReturns(contents) : contents;
      refuseLine(last.line, last.user && whyNoPassword(last.contents));
    }
    if (shown === endMarker) {
      const isLong = end - payload.atBytes > largestBytes;
      refuseLine(line, isLong && `it is longer than ${largestBytes} bytes`);
      payload.endBytes = at + shown.length;
      continue;
    }
    const why = nul < newline
      ? `a NUL byte before "${endMarker}": it is cut off, or is no text`
      : `"${endMarker}" is missing, or it is longer than ${largestBytes} bytes`;
    refuseLine(line, end !== newline && why);
    const padded =
      "white space around a marker, which begins and ends its line";
    refuseLine(line, isPadded(shown) && padded);
    if (isMarker) {
      const name = decode(bytes.subarray(at + 3, at + shown.length - 3)).trim();
      refuseLine(line, whyNotNamed(name));
      const first = lines.get(name);
      refuseLine(line, first && `the same as in line ${first}`);
      lines.set(name, line);
      const user = /^password (.*)/.exec(name)?.[1];
      last = { line, name, user, contents: bytes.subarray(0, 0) };
      payload.entries.push(last);
      contentsAt = next;
    } else if (!last) {
      const isHeader = shown === ANYWAY ||
        (line === 1 && shown.startsWith(MAGIC));
      const isTitle = shown.startsWith(PAYLOAD);
      const isOther = isTitle && (isTitled || shown !== title);
      refuseLine(line, isOther && `only "${title}" is known here`);
      const isText = !isTitle && !isHeader && !/^(#|\s*$)/.test(shown);
      const comment = `(a comment begins with "#")`;
      refuseLine(line, isText && `text before the first file ${comment}`);
      if (isTitle) payload.atBytes = at;
      isTitled ||= isTitle;
      if (isHeader || isTitled) payload.bodyBytes = next;
    }
  }
  for (const { line, name } of payload.entries) {
    for (let path = dirname(name); path !== "."; path = dirname(path)) {
      const first = lines.get(path);
      const why = `line ${first} has a file in the place of its directory`;
      refuseLine(line, first && why);
    }
  }
  return payload;
}

function refuseLine(line: number, why: string | false | 0 | undefined): void {
  if (why) throw new Error(`line ${line}: ${why}`);
}

/** White space around a marker, which cannot be seen, makes it none. */
const isPadded = (line: string) =>
  line !== line.trim() &&
  /^-- +((etc|var|home)\/.*|password .*|end *) --$/s.test(line.trim());

const PASSWORD_FILES = ["passwd", "shadow", "group", "gshadow"]
  .map((name) => `etc/${name}`);

/** Why a marker's name is refused; only what is surely a path is quoted. */
function whyNotNamed(name: string): string | undefined {
  const [top, ...parts] = name.split("/");
  const isIn = OVERLAYS.includes(top) && parts.length > 0;
  const bytes = (text: string) => Buffer.byteLength(text);
  if (/^password [^\s:/\p{Cc}\ufffd]+$/u.test(name)) return undefined;
  return firstOf(
    /[\p{Cc}\ufffd]/u.test(name) && "its name is not UTF-8, or no text",
    !isIn &&
      `a file is below ${OVERLAYS.join(", ")} ("-- etc/hostname --"), a ` +
        `password is "-- password USER --"`,
    parts.some((part) => ["", ".", ".."].includes(part)) &&
      `"${name}" has an empty part, "." or ".."`,
    PASSWORD_FILES.includes(name) &&
      `"${name}" is never replaced (see "password USER")`,
    // NAME_MAX; PATH_MAX is 4096, with what stands before it.
    (bytes(name) > 2048 || parts.some((part) => bytes(part) > 255)) &&
      "its name is too long",
  );
}

/** crypt(5), `$id$...`: the older two forms look like plain passwords. */
const HASH = /^\$[\w,=-]+\$[!-~]{22,}$/;

function whyNoPassword(contents: Uint8Array): string | undefined {
  const line = decode(contents, "latin1").replace(/\n$/, "");
  const isHash = HASH.test(line) && !/[:;*!\\]/.test(line);
  return line === "*" || isHash
    ? undefined
    : "a password is one line: a hash that begins with $ (openssl passwd -6 " +
      "makes one), or * for none";
}

const withoutReturns = (contents: Uint8Array) =>
  Buffer.from(decode(contents, "latin1").replaceAll("\r\n", "\n"), "latin1");

/**
 * Where a payload waits while its disk is partitioned: neither wipefs(8) nor
 * sfdisk(8) nor any partition touches this place. A title with checksum and
 * length comes first: it is written first and erased last.
 */
const COPY = {
  at: PAYLOAD_TEXT.roomBytes,
  titleBytes: 4 * KiB,
  endBytes: 2 * PAYLOAD_TEXT.roomBytes + 4 * KiB,
  title: "lightwhale-payload-copy 1",
};

export const formatCopyTitle = (text: Uint8Array) =>
  blockOf([COPY.title, crc32(text), text.length], COPY.titleBytes);

/** Reads a copy; undefined where there is none, or not all of it. */
export function parseCopy(copy: Uint8Array): Uint8Array | undefined {
  const [title, sum, length] = text(copy, 0, COPY.titleBytes).split("\n");
  const { titleBytes } = COPY;
  const found = copy.subarray(titleBytes, titleBytes + Number(length));
  const isWhole = title === COPY.title && found.length === Number(length) &&
    crc32(found) === Number(sum);
  return isWhole ? found : undefined;
}

/** Lines of text, and zeros behind them. */
function blockOf(lines: unknown[], length: number): Uint8Array {
  const text = Buffer.from(lines.map((line) => `${line}\n`).join(""));
  assert(text.length <= length, `${text.length} bytes are too long`);
  return Buffer.concat([text], length);
}

const viewOf = ({ buffer, byteOffset, byteLength }: Uint8Array) =>
  new DataView(buffer, byteOffset, byteLength);

/** The first of several answers that applies. */
const firstOf = <T>(...answers: (T | false | "" | undefined)[]) =>
  answers.find((answer): answer is T => Boolean(answer));

/** Is the first byte zero, and each other like the one before it? */
const isZero = (bytes: Uint8Array) =>
  !bytes[0] && Buffer.compare(bytes.subarray(1), bytes.subarray(0, -1)) === 0;

/** A byte order mark is kept; what is no character becomes U+FFFD. */
const decode = (bytes: Uint8Array, encoding: BufferEncoding = "utf8") =>
  Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length)
    .toString(encoding).toWellFormed();

/** Text up to the first NUL. */
function text(bytes: Uint8Array, at: number, length: number): string {
  const field = bytes.subarray(at, at + length);
  const end = field.indexOf(0);
  return decode(end < 0 ? field : field.subarray(0, end));
}

const uuid = (bytes: Uint8Array, at: number) =>
  decode(bytes.subarray(at, at + 16), "hex")
    .replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");

// ---------------------------------------------------------------------------
// The boot sequence.
// ---------------------------------------------------------------------------

/**
 * The nine documented steps. Running them again changes nothing. Returns the
 * exit status: 0 as configured, 1 if something failed and the fallback is in
 * place.
 */
export async function boot(settings: Settings): Promise<number> {
  const startedMs = performance.now();
  const paths = pathsBelow(settings.root);
  let plan: Plan | undefined;
  let mode: Outcome["mode"] = "persistent";
  const meanwhile: Promise<void>[] = [];
  // Where this fails, the other instance sets up the fallback if it has to.
  const lock = await takeLock(join(paths.run, "lock"));
  const wasSetUp = withoutOverlay(paths).length === 0;
  try {
    await removeScratch(paths);
    plan = await makePlan(settings); //                     steps 1 and 2
    sayPlan(plan);
    await attemptEach(plan.repairs, carryOut);
    let { data, swap } = plan;
    if (plan.create) {
      await partition(plan.create); //                      step 3
      await waitForPartitions(plan.create.members); //      step 4
      data = await createDataFilesystem(plan.create, paths); // step 5
      swap = swapOf(plan.create.members);
      meanwhile.push(attemptEach(devicesOf(plan.create.members), clearMagic));
    }
    plan.data = data;
    if (data) {
      meanwhile.push(attempt(() => swapOn(swap))); //       step 9
      await mountDataFilesystem(data, plan.create !== undefined, paths); // 6
      if (plan.create) meanwhile.push(attempt(() => removeScratch(paths)));
    } else mode = await mountVolatile(plan, paths);
    await mountOverlays(paths); //                          step 7
  } catch (error) {
    const isMute = error instanceof TimeoutError; // and so may be the others
    if (!isMute) await Promise.all(meanwhile);
    sayError(error);
    sayHowToMakeRoom(error, paths);
    if (wasSetUp) { // and is in use: nothing is taken away from under it
      lock.release();
      return 1;
    }
    mode = "fallback";
    await fallBack(isMute, paths);
  }
  await attempt(() => configureDocker(mode, paths)); //     step 8
  await attempt(() => bindContainerd(paths));
  await Promise.all(meanwhile);
  if (plan && mode === "persistent") {
    await attempt(() => startMaintenance(plan, settings, paths));
  }
  if (plan?.mode === "mounted" && messages.errors.length === 0) {
    say("info", "Everything is set up already");
  }
  const status = messages.errors.length > 0 ? 1 : 0;
  orUndefined(() => writeReport({ mode, plan, status, startedMs }, paths));
  lock.release();
  return status;
}

/** The outcome of a boot, for the status file. */
interface Outcome {
  mode: "persistent" | "volatile" | "fallback";
  plan?: Plan;
  status: number;
  startedMs: number;
}

/**
 * Looks and decides, and looks again while a disk that is needed is late: at
 * most `waitMs`, and only as long as one is missing. A plan that formats is
 * tried out before any disk is wiped for it: each must be free, no two may be
 * the same, and mkfs.btrfs must find them large enough; others are left out.
 *
 * @param forNextBoot Say what the next boot would do, and write to no disk.
 */
async function makePlan(settings: Settings, forNextBoot = false) {
  const giveUpAt = performance.now() + (forNextBoot ? 0 : settings.waitMs);
  const misfits: Misfit[] = [];
  let saidWaiting = false;
  for (;;) {
    const facts = { ...await look(settings), misfits };
    if (forNextBoot) {
      facts.mounted = undefined;
      for (const device of facts.devices) {
        if (!isStartedOver(device.disk, facts.devices)) continue;
        device.holds = { kind: "nothing of ours" }; // and not open any more
        device.inUse = undefined;
      }
    }
    const plan = decide(facts, settings);
    const late = whatIsLate(plan, facts);
    if (late && performance.now() < giveUpAt) {
      if (!saidWaiting) say("info", `Waiting for ${late}`);
      saidWaiting = true;
      await sleep(200);
      continue;
    }
    if (!plan.create) return plan;
    const devices = devicesOf(plan.create.members);
    const unfit = !forNextBoot &&
      (await findBusy(devices) ?? await findTwin(devices, []));
    const misfit = unfit ||
      await rehearse(plan.create, misfits.length > 0, settings.root);
    if (!misfit) return plan;
    misfits.push(misfit); // and decide without it
  }
}

/** Names what a boot should wait for, or undefined when nothing is late. */
function whatIsLate({ mode, data, waitFor }: Plan, facts: Facts) {
  if (mode === "mounted" || mode === "off") return undefined;
  if (waitFor) return waitFor;
  if (data?.absent) return `${data.absent} missing device(s) of "${DATA}"`;
  const isOwn = data && !isAnothers(data, facts.machine);
  return !isOwn && facts.diskPending
    ? "a USB disk whose driver is still starting it"
    : undefined;
}

// ---------------------------------------------------------------------------
// Steps 1 and 2, look: every block device, what it is and what it holds.
// ---------------------------------------------------------------------------

/**
 * Reads all devices, then completes and judges the disks that may matter.
 * Changes nothing. Our own reading is fast; libblkid is asked only about what
 * may be changed or blamed and, before a first filesystem is made, about all.
 *
 * @param always Name of a disk to complete and ask about, whatever it holds.
 */
export async function look(
  settings: Settings,
  always?: string,
): Promise<Facts> {
  const diskPending = isDiskPending(); // first: it may appear just now
  const mounts = readMounts();
  const found = await readDevices(listDevices(settings));
  found.push(...await readPartitionsWithoutNode(found));

  const isFirst =
    found.some(({ read }) => read.header || namesIn(read).includes(MAGIC)) &&
    !found.some(({ read, disk }) =>
      read.btrfs?.label === DATA && !isStartedOver(disk, found)
    );
  const disks = new Set([always]);
  for (const { read, disk } of found) {
    if (isFirst || mayMatter(read)) disks.add(disk);
  }
  const devices = complete(found.filter(({ disk }) => disks.has(disk)), mounts);
  await askAbout(
    devices.filter((device) =>
      isFirst || device.disk === always || isInQuestion(device, devices)
    ),
  );
  for (const device of devices) device.magic = isMagic(device);
  for (const device of devices) device.holds = whatItHolds(device, devices);
  const paths = pathsBelow(settings.root);
  for (const device of devices.filter(({ magic }) => magic)) {
    device.payload = await findPayload(device, devices, paths);
  }

  const mounted = mountedOn(paths.data, mounts);
  return {
    devices,
    diskPending,
    memoryBytes: readMemoryBytes(),
    machine: readMachine(),
    mounted: mounted && { ...mounted, fsid: fsidOf(mounted) },
    misfits: [],
  };
}

type Found = DeviceNode & { read: Reading };

/** Nothing else leaves a header alone, and a table: it was done on purpose. */
const isStartedOver = (disk: string, found: Found[]) =>
  found.some(({ name, read }) => name === disk && read.onlyHeader && read.gpt);

const namesIn = ({ gpt }: Reading) =>
  gpt?.partitions.map((partition) => partition.name) ?? [];

const hasOurNames = (read: Reading) =>
  namesIn(read).some((name) => [MAGIC, DATA, SWAP].includes(name));

/** Our magic, our names, a Btrfs, a backup superblock, or a read error. */
const mayMatter = (read: Reading) =>
  read.header || read.swapLabel === SWAP || hasOurNames(read) ||
  [read.btrfs, read.backup, read.hidden, read.record, read.error].some(Boolean);

/** Memory, floppy and optical drives; loop devices unless asked for. */
const NEVER_LOOKED_AT = /^(ram|zram|fd|sr|loop)\d/;

/** md arrays and device-mapper volumes (drivers/md/md.c, drivers/md/dm.c). */
const VOLUME = /^(md[_\d]|dm-\d)/;

/**
 * Block devices, whatever their driver calls them. sysfs tells which are whole
 * disks; `/proc/partitions` leaves out card readers without a card and the
 * hidden paths of NVMe multipath (block/genhd.c, show_partition()).
 */
function listDevices({ only }: Settings): DeviceNode[] {
  const disks = new Set(
    only ??
      listDirectory("/sys/block").filter((name) => !NEVER_LOOKED_AT.test(name)),
  );
  const nodes: DeviceNode[] = [];
  let whole: DeviceNode | undefined; // its partitions follow it
  for (const line of (readText("/proc/partitions") ?? "").split("\n")) {
    const [major, minor, , path = ""] = line.trim().split(/\s+/);
    const name = nameOf(path);
    const own = { name, path: nodeOf(name), deviceNumber: `${major}:${minor}` };
    const number = whole && partitionNumber(whole.name, name);
    if (whole && number) {
      nodes.push({ ...whole, ...own, number, kind: "partition" });
    } else if (disks.has(name)) {
      const kind = VOLUME.test(name) ? "volume" : "disk";
      const size = readSysfs(name, "queue/logical_block_size") ?? 512;
      const sectorBytes = Number(size);
      whole = { ...own, kind, disk: name, number: 0, sectorBytes };
      nodes.push(whole);
    }
  }
  return nodes;
}

/** An attribute of a block device (Documentation/ABI/stable/sysfs-block). */
function readSysfs(name: string, attribute: string): string | undefined {
  return readText(`/sys/class/block/${name}/${attribute}`);
}

/** sysfs counts in 512 bytes, whatever the size of a sector. */
const readSysfsBytes = (name: string, attribute: "size" | "start") =>
  512 * Number(readSysfs(name, attribute) ?? 0);

/**
 * sysfs has "!" for a "/" in a name, as in `cciss!c0d0` (drivers/base/core.c).
 */
export const nodeOf = (name: string) => `/dev/${name.replaceAll("!", "/")}`;

/** The name in sysfs of a device node that the kernel named. */
export const nameOf = (path: string) =>
  path.replace(/^\/dev\//, "").replaceAll("/", "!");

/**
 * The name in sysfs of the device at a path, by its number: `/dev/mapper/NAME`
 * may be a node of its own, and no link to `/dev/dm-0`.
 */
function nameAt(path: string): string | undefined {
  const stat = orUndefined(() => fs.statSync(path));
  if (!stat?.isBlockDevice()) return undefined;
  // As in glibc's sys/sysmacros.h, for numbers below 2^32.
  const major = (stat.rdev >>> 8) & 0xfff;
  const minor = (stat.rdev & 0xff) | ((stat.rdev >>> 12) & 0xfff00);
  return orUndefined(() =>
    basename(fs.realpathSync(`/sys/dev/block/${major}:${minor}`))
  );
}

/** An old node may be that of another device by now. */
const isOwnNode = (path: string) => nameAt(path) === nameOf(path);

/**
 * The number follows a "p" where the disk's name ends with a digit
 * (block/partitions/core.c, add_partition()).
 */
const partitionPrefix = (disk: string) => /\d$/.test(disk) ? `${disk}p` : disk;

/** The number in a partition's name, undefined where it is none of the disk. */
export function partitionNumber(disk: string, name: string) {
  const prefix = partitionPrefix(disk);
  const digits = name.startsWith(prefix) ? name.slice(prefix.length) : "";
  return /^[1-9]\d*$/.test(digits) ? Number(digits) : undefined;
}

/** `/dev/sda2`, but `/dev/nvme0n1p2`, `/dev/mmcblk0p2`, `/dev/loop3p2`. */
export function partitionPath(disk: { path: string }, number: number): string {
  return `${partitionPrefix(disk.path)}${number}`;
}

/** All formats that matter begin in so much of a device. */
const START_BYTES = BTRFS.superblockAt + BTRFS.bytes;

/**
 * Each concurrent read costs a thread, so eight devices are read at a time. A
 * device that does not answer holds up no other: eight more readers start every
 * 20 ms. A reader reuses its buffer: allocating one costs as much as a read.
 */
const READERS = { atATime: 8, moreEveryMs: 20 };

async function readDevices(nodes: DeviceNode[]): Promise<Found[]> {
  const found: Found[] = [];
  const readers: Promise<void>[] = [];
  const left = nodes.entries(); // for all readers
  const readSome = async () => {
    let buffer: Uint8Array<ArrayBuffer> | undefined;
    for (const [i, node] of left) {
      const read = await readDevice(
        node,
        buffer ??= new Uint8Array(START_BYTES),
      );
      found[i] = { ...node, read };
      // A read that was given up may end after all, and write there.
      if (read.error) buffer = undefined;
    }
  };
  const begin = () => {
    for (let i = 0; i < READERS.atATime; i++) readers.push(readSome());
  };
  begin();
  const timer = setInterval(begin, READERS.moreEveryMs);
  for (const reader of readers) await reader; // also those that are added
  clearInterval(timer);
  return found;
}

/**
 * Reads partitions that the table has and the kernel does not, through the
 * whole disk. The kernel may have no GPT parser, the table may be made for
 * other sectors, or a power cut may have left only the backup table.
 */
async function readPartitionsWithoutNode(found: Found[]): Promise<Found[]> {
  const known = new Set(found.map(({ path }) => path));
  const nodes = found.flatMap((disk) =>
    (disk.read.gpt?.partitions ?? []).map((entry): DeviceNode => {
      const { number } = entry;
      const path = partitionPath(disk, number);
      const name = nameOf(path);
      const own = { name, path, number, entry, deviceNumber: undefined };
      return { ...disk, ...own, kind: "partition" };
    }).filter(({ path }) => !known.has(path))
  );
  return await Promise.all(
    nodes.map(async (node) => ({ ...node, read: await readDevice(node) })),
  );
}

/** Where a device begins: one without a node is read through its disk. */
const startOf = ({ path, disk, entry }: DeviceNode) => ({
  path: entry ? nodeOf(disk) : path,
  atBytes: entry?.startBytes ?? 0,
});

async function readDevice(
  node: DeviceNode,
  buffer = new Uint8Array(START_BYTES),
): Promise<Reading> {
  const { path } = startOf(node);
  try {
    const volume = node.kind === "volume" && readSysfs(node.name, "dm/name");
    const isMute = volume && readSysfs(node.name, "dm/suspended") === "1";
    // Not even an open would end.
    assert(!isMute, `it is suspended (dmsetup resume "${volume}")`);
    return await withDevice(path, (read) => readFormats(node, buffer, read));
  } catch (error) {
    return { ...parseStart(new Uint8Array()), error: cannotRead(path, error) };
  }
}

function cannotRead(path: string, error: unknown): string {
  const message = messageOf(error);
  return message.startsWith("Cannot ")
    ? message
    : `Cannot read ${path}: ${message}`;
}

/**
 * Reads the places where known formats keep their headers. A backup superblock
 * counts only if what is before the superblock is as Btrfs leaves it: otherwise
 * something newer was written there.
 */
async function readFormats(node: DeviceNode, buffer: Uint8Array, read: Read) {
  const base = node.entry?.startBytes ?? 0;
  const start = await read(base, START_BYTES, buffer);
  const reading = parseStart(start);
  if (node.kind === "disk") {
    // The kernel ignores a GPT beside a real MBR: it is stale, or the MBR is.
    const isOther = mbrTypes(start).length > 0 && !isProtectiveMbr(start);
    const gpt = await readGpt(node, start, reading, read);
    if (!isOther) reading.gpt = gpt;
    for (const { startBytes } of isOther && gpt ? gpt.partitions : []) {
      const at = startBytes + BTRFS.superblockAt;
      const block = parseSuperblock(await read(at, BTRFS.bytes));
      if (block?.intact && block.label === DATA) reading.hidden = block;
    }
    reading.table = isOther ? "mbr" : reading.gpt && "gpt";
    if (hasOurNames(reading)) {
      // Nothing around the table is a filesystem of the whole disk.
      const sector = reading.gpt?.sectorBytes ?? 512;
      const tableEnd = 2 * sector + GPT.entriesArea;
      reading.plain = isZero(await read(START_BYTES, 4 * START_BYTES)) &&
        (reading.onlyHeader || isZero(start.subarray(0, MBR.codeBytes))) &&
        isZero(start.subarray(512, sector)) && isZero(start.subarray(tableEnd));
    }
  }
  const isBlankBeforeBtrfs = reading.recordable &&
    isZero(start.subarray(0, RECORD.slotsAt[0]));
  if (reading.btrfs?.label === DATA) {
    const sizeBytes = node.entry?.sizeBytes ??
      readSysfsBytes(node.name, "size");
    // A bad spot there is no reason not to use the disk.
    const tryRead = (at: number, bytes: number) =>
      read(base + at, bytes).catch(() => undefined);
    const ends = await Promise.all([
      tryRead(sizeBytes - RAID.endBytes, RAID.endBytes),
      ...RAID.sectors.map((n) => tryRead(sizeBytes - n * 512, 512)),
    ]);
    const isVmfs = [await tryRead(MiB, 4), await tryRead(2 * MiB, 4)]
      .some((magic) => VMFS.includes(Buffer.from(magic ?? []).toString("hex")));
    reading.plain = isBlankBeforeBtrfs && !isVmfs &&
      ends.every((end) => end && isZero(end));
  } else if (!reading.btrfs?.intact && !reading.gpt) {
    const sector = start.subarray(BTRFS.superblockAt);
    reading.plain = isBlankBeforeBtrfs && isZero(sector);
    // All is there but the magic: the device was removed, or wiped on purpose
    // (btrfs-progs, kernel-shared/disk-io.c, btrfs_read_dev_super()).
    const isErased = isZero(sector.subarray(BTRFS.magic, BTRFS.magic + 8)) &&
      parseSuperblock(withBtrfsMagic(sector))?.intact;
    if (!isBlankBeforeBtrfs || isErased) return reading;
    const block = await read(base + BTRFS.backupAt, BTRFS.bytes);
    const backup = parseSuperblock(block, BTRFS.backupAt);
    if (backup?.intact) reading.backup = backup;
  }
  return reading;
}

/**
 * RAID metadata lie in the last 128 KiB, or begin so many sectors before the end
 * (util-linux, ddf_raid.c and promise_raid.c).
 */
const RAID = {
  endBytes: 128 * KiB,
  sectors: [257, 399, 591, 675, 735, 911, 951, 974, 991, 3087],
};

/** VMFS leaves the first MiB as it was (util-linux, vmfs.c). */
const VMFS = ["0dd001c0", "5ef1ab2f"];

/** What the first {@linkcode START_BYTES} of a device say. */
export function parseStart(start: Uint8Array): Reading {
  const [first, ...lines] = text(start, 0, 512).split(/\r?\n/);
  const header = first.startsWith(MAGIC);
  // The two lines that may follow the header have no order.
  const [second, third] = header ? lines : [];
  const anyway = second === ANYWAY ||
    (third === ANYWAY && second.startsWith(PAYLOAD));
  const title = second === ANYWAY ? third : second;
  const place = title === PAYLOAD_TEXT.copied ? "copy" : "original";
  const slots = start.subarray(RECORD.slotsAt[0], BTRFS.superblockAt);
  const btrfs = parseSuperblock(start.subarray(BTRFS.superblockAt));
  const record = parseRecord(slots);
  const scratched = record && !btrfs
    ? parseSuperblock(withBtrfsMagic(start.subarray(BTRFS.superblockAt)))
    : undefined;
  const onlyText = `${MAGIC}(\r?\n(${ANYWAY}\r?\n?)?)?`;
  return {
    header,
    anyway,
    payloadPlace: title?.startsWith(PAYLOAD) ? place : undefined,
    onlyHeader: header &&
      new RegExp(`^${onlyText}\0*$`).test(decode(start.subarray(0, 512))),
    btrfs,
    // The record of a member that has left is all that is left on it.
    record: !btrfs || record?.fsid === btrfs.fsid ? record : undefined,
    scratched: scratched?.intact ? scratched : undefined,
    recordable: [0, RECORD.bytes].every((at) =>
      isRecordSlot(slots.subarray(at, at + RECORD.bytes))
    ),
    plain: true,
    swapLabel: parseSwapLabel(start),
  };
}

/**
 * Finds the GPT of a disk, made for its own or for other sectors. The backup
 * counts where LBA 0 announces a GPT, the start was zeroed, or the primary
 * entries are still the same: otherwise something newer may be there.
 */
async function readGpt(
  disk: DeviceNode,
  start: Uint8Array,
  { onlyHeader, payloadPlace }: Reading,
  read: Read,
): Promise<Gpt | undefined> {
  const isAnnounced = isProtectiveMbr(start);
  // A payload may have been written over what was a table.
  const sizes = disk.sectorBytes === 512 ? [512, 4 * KiB] : [4 * KiB, 512];
  const within: Read = async (at, length) =>
    at + length <= start.length
      ? start.subarray(at, at + length)
      : await read(at, length);
  const isLost = (end: number) =>
    payloadPlace !== undefined ||
    isZero(start.subarray(onlyHeader ? 512 : 0, end));
  for (const size of sizes) {
    const gpt = await readGptAt(size, size, within);
    if (gpt) return isAnnounced ? gpt : { ...gpt, lost: "first sector" };
  }
  if (!isAnnounced && !isLost(2 * sizes[0])) return undefined;
  const diskBytes = readSysfsBytes(disk.name, "size");
  for (const size of sizes) {
    const at = diskBytes - size;
    if (at % size !== 0 || at < START_BYTES) continue;
    const gpt = await readGptAt(at, size, read);
    const withPrimaryEntries: Read = (place, length) =>
      place === at ? read(place, length) : within(2 * size, length);
    if (
      gpt && (isAnnounced || isLost(start.length) ||
        await readGptAt(at, size, withPrimaryEntries))
    ) return { ...gpt, lost: "primary table", endBytes: diskBytes };
  }
}

/** Reads `length` bytes at a byte offset, less at the end of the device. */
type Read = (
  at: number,
  length: number,
  buffer?: Uint8Array, // of that length
) => Promise<Uint8Array>;

/** Opens a device, and gives it up where it does not answer in time. */
async function withDevice<T>(path: string, use: (read: Read) => Promise<T>) {
  let open: number | undefined;
  const reading = (async () => {
    const file = open = await promisify<number>((done) =>
      fs.open(path, "r", done)
    );
    try {
      return await use((at, length, buffer = new Uint8Array(length)) =>
        promisify((done) =>
          fs.read(file, buffer, 0, length, at, (error, bytesRead) => {
            done(error, buffer.subarray(0, bytesRead));
          })
        )
      );
    } finally {
      open = undefined; // another file may get this number from now on
      await promisify<void>((done) => fs.close(file, done));
    }
  })();
  try {
    return await withTimeout(reading, TIMEOUT.readMs, `Cannot read ${path}`);
  } catch (error) {
    if (open !== undefined) parkOpenFile(open);
    throw error;
  }
}

/**
 * A promise of a node:fs call (node:fs/promises takes half a millisecond to
 * load).
 */
function promisify<T>(
  call: (done: (error: Error | null, value: T) => void) => void,
): Promise<T> {
  return new Promise((resolve, reject) =>
    call((error, value) => error ? reject(error) : resolve(value))
  );
}

/**
 * Hands the open file of a mute device to a detached `sleep`: whoever closes it
 * last blocks until its I/O completes (block/bdev.c, blkdev_flush_mapping()),
 * and init waits for us.
 */
function parkOpenFile(file: number): void {
  const sleep = findProgram("sleep");
  if (!sleep) return;
  const stdio: Stdio = [file, "ignore", "ignore"];
  orUndefined(() => start([sleep, "86400"], { stdio, detached: true }));
}

/** Completes devices from sysfs: place, size, name, users, identity. */
function complete(found: Found[], mounts: Mount[]): BlockDevice[] {
  const users = readUsers(found, mounts);
  const identities = new Map<string, ReturnType<typeof readIdentity>>();
  return found.map((node) => {
    const { name, disk, number, entry } = node;
    const whole = found.find((other) => other.name === disk)?.read;
    const known = entry ? disk : name; // to the kernel
    const startBytes = entry?.startBytes ??
      (number > 0 ? readSysfsBytes(name, "start") : 0);
    const bytes = readSysfsBytes(known, "size");
    const identity = identities.get(disk) ?? readIdentity(disk);
    identities.set(disk, identity);
    const device: BlockDevice = {
      ...node,
      ...identity,
      startBytes,
      sizeBytes: entry
        ? Math.min(entry.sizeBytes, Math.max(0, bytes - startBytes))
        : bytes,
      readOnly: readSysfs(known, "ro") === "1",
      inUse: users.get(known),
      magic: false,
      holds: { kind: "nothing of ours" },
    };
    // The kernel's name for it may be old; it serves where the disk is mute.
    const partitionName = whole?.error
      ? parsePartname(readSysfs(name, "uevent") ?? "")
      : (entry ?? entryOf(device, whole))?.name;
    return { ...device, partitionName };
  }).sort(byName);
}

/** The entry of a table that is this very partition. */
const entryOf = (
  { number, startBytes, sizeBytes }: BlockDevice,
  whole?: Reading,
) =>
  whole?.gpt?.partitions.find((entry) =>
    entry.number === number && entry.startBytes === startBytes &&
    entry.sizeBytes === sizeBytes
  );

/**
 * The partition's name in the text of a `uevent` file in sysfs. The first such
 * line is the kernel's; the next may be part of a name, which anybody may have
 * chosen (block/partitions/core.c, part_uevent()).
 */
export function parsePartname(uevent: string): string | undefined {
  const key = "PARTNAME=";
  return uevent.split("\n").find((line) => line.startsWith(key))
    ?.slice(key.length);
}

/** `sdb` before `sdaa`, `loop9` before `loop10`. */
function byName(a: DeviceNode, b: DeviceNode): number {
  return a.name.length - b.name.length || (a.name < b.name ? -1 : 1);
}

/** Where drivers say which piece of hardware a disk is; a read may fail. */
const HARDWARE_ATTRIBUTES = [
  "wwid", // NVMe
  "device/wwid", // SCSI, SATA
  "serial", // virtio
  "device/vpd_pg80", // SCSI: binary, the serial number behind four bytes
  "device/cid", // SD, eMMC
  "device/serial",
  "dm/uuid",
];

const IMAGE = "file:";

/** What makes a disk this very one, not only its name. */
function readIdentity(disk: string): { sequence?: string; hardware?: string } {
  const image = readSysfs(disk, "loop/backing_file"); // it is that file
  const stat = image && orUndefined(() => fs.statSync(image));
  const hardware = [
    () => stat && `${IMAGE}${stat.dev}:${stat.ino}`,
    ...HARDWARE_ATTRIBUTES.map((name) => () => readSysfs(disk, name)),
    () => readUsbSerial(disk),
  ]
    .values() // so that only as many are read as it takes
    .map((read) => read()?.replace(/[^\x21-\x7e]+/g, " ").trim().slice(0, 200))
    // Not nothing, not one character over and over, not a placeholder.
    .find((value) => value && !/^(.)\1*$|^0?123456789|^none$/i.test(value));
  return { sequence: readSysfs(disk, "diskseq"), hardware };
}

/** A name alone may be another disk's by now. */
function assertSame({ path, disk, sequence }: BlockDevice): void {
  assert(
    readIdentity(disk).sequence === sequence && isOwnNode(path),
    `Cannot use ${path}: it is not the disk any more that was looked at`,
  );
}

/** USB storage has its serial number in the device that the interface is of. */
function readUsbSerial(disk: string): string | undefined {
  let directory = orUndefined(() => fs.realpathSync(`/sys/block/${disk}`)) ??
    "";
  while (/\/usb\d/.test(directory) && !readText(`${directory}/idVendor`)) {
    directory = dirname(directory);
  }
  const [vendor, product, serial] = ["idVendor", "idProduct", "serial"]
    .map((name) => readText(join(directory, name)));
  // A virtual machine invents one from the port.
  if (!vendor || !serial || /[\da-f]{4}:[\da-f]{2}:/.test(serial)) return;
  return `usb-${vendor}-${product}-${serial}`;
}

/**
 * Hash of the DMI product UUID, which tells machines apart
 * (Documentation/ABI/testing/sysfs-firmware-dmi-tables) unless its maker left a
 * placeholder.
 */
function readMachine(): string | undefined {
  const uuid = readText("/sys/class/dmi/id/product_uuid")?.trim().toLowerCase();
  const digits = new Set(uuid?.replaceAll("-", ""));
  const isPlaceholder = digits.size < 4 ||
    /^(03000200-0400-0500|00020003-0004-0005)-0006-000700080009$/.test(uuid!);
  return uuid && !isPlaceholder ? crcOfText(uuid).toString(16) : undefined;
}

/**
 * Who uses which device, by name in sysfs. Holders are exact for md and device
 * mapper; Btrfs has no holder, and only its first device looks mounted, so its
 * own sysfs directory is asked.
 */
function readUsers(nodes: DeviceNode[], mounts: Mount[]): Map<string, string> {
  const users = new Map<string, string>();
  const mounted = new Map(mounts.map((m) => [m.deviceNumber, m.target]));
  for (const { name, deviceNumber } of nodes) {
    const [holder] = listDirectory(`/sys/class/block/${name}/holders`);
    if (holder) users.set(name, `held by ${nodeOf(holder)}`);
    const target = mounted.get(deviceNumber ?? "");
    if (target) users.set(name, `mounted on "${target}"`);
  }
  for (const fsid of listDirectory("/sys/fs/btrfs")) {
    for (const name of listDirectory(`/sys/fs/btrfs/${fsid}/devices`)) {
      users.set(name, openIn(fsid));
    }
  }
  for (const path of readSwaps()) {
    users.set(nameAt(path) ?? nameOf(path), "swap in use");
  }
  return users;
}

/** Active swap devices (proc_swaps(5)). */
function readSwaps(): string[] {
  return (readText("/proc/swaps") ?? "").split("\n").slice(1)
    .map((line) => unescapeOctal(line.split(/\s/)[0])).filter(Boolean);
}

/** Asks libblkid what devices hold, 16 at a time. */
async function askAbout(devices: BlockDevice[]): Promise<void> {
  const readable = devices.filter(({ read }) => !read.error);
  const ask = async (device: BlockDevice) => {
    try {
      device.signatures = await listSignatures(device);
      if (!isLarger(device)) return;
      if (await isBlankBehind(device).catch(() => false)) return;
      const atBytes = device.read.gpt?.endBytes;
      device.signatures.push({ type: UNKNOWN, atBytes });
    } catch (error) {
      device.read.error = cannotRead(device.path, error);
    }
  };
  while (readable.length > 0) {
    await Promise.all(readable.splice(0, 16).map(ask));
  }
}

/**
 * The disk is larger than before when the backup table is not at its end; free
 * space behind the last partition alone may be there on purpose.
 */
const isLarger = ({ sizeBytes, read: { gpt } }: BlockDevice) =>
  gpt !== undefined && sizeBytes - gpt.endBytes >= MiB;

/** Samples what a larger disk, to which an image was copied, held before. */
async function isBlankBehind({ path, sizeBytes, read }: BlockDevice) {
  const { endBytes = sizeBytes } = read.gpt ?? {};
  const bytes = 4 * KiB;
  return await withDevice(path, async (read) => {
    const step = Math.max(1, (sizeBytes - endBytes) / bytes / 64);
    for (let block = 0; block < 64; block++) {
      const at = endBytes + bytes * Math.floor(block * step);
      if (!isZero(await read(at, bytes))) return false;
    }
    return isZero(await read(sizeBytes - MiB, MiB));
  });
}

/**
 * All signatures on a device: wipefs(8) lists every one, and blkid(8) only one,
 * but it needs no device node.
 */
async function listSignatures(
  { path, disk, entry }: { path: string; disk?: string; entry?: GptPartition },
): Promise<Signature[]> {
  if (entry && disk) return await probe(nodeOf(disk), entry);
  const { stdout } = await run(
    words`wipefs --json --output TYPE,LABEL,OFFSET ${path}`,
    { to: `see what is on ${path}`, capture: true },
  );
  const { signatures } = JSON.parse(stdout || '{"signatures":[]}');
  return signatures.map((found: Record<string, string>) => ({
    type: found.type,
    label: found.label ?? undefined,
    atBytes: Number(found.offset),
  }));
}

/** The signature in a part of a disk or of an image file. */
async function probe(path: string, { startBytes, sizeBytes }: GptPartition) {
  const { status, stdout } = await run(
    words`blkid --probe --output export --offset ${startBytes}
      --size ${sizeBytes} ${path}`,
    {
      to: `see what is on ${path}`,
      accept: [0, 2, 8], // 2: nothing, 8: ambivalent
      capture: true,
    },
  );
  if (status === 8) return [{ type: "more than one signature" }];
  const found = Object.fromEntries(
    stdout.split("\n").map((line) => line.split("=", 2)),
  );
  const type = found.TYPE ?? found.PTTYPE;
  return type ? [{ type, label: found.LABEL }] : [];
}

/**
 * Is a USB storage driver bound to an interface that has no disk yet? It waits
 * some seconds before it looks (kernel-parameters.txt, usb-storage.delay_use).
 */
function isDiskPending(): boolean {
  return ["usb-storage", "uas"].some((driver) => {
    const directory = `/sys/bus/usb/drivers/${driver}`;
    return listDirectory(directory).some((name) =>
      /^\d+-.*:/.test(name) &&
      !fs.globSync(`${directory}/${name}/host*/target*/*:*/block/*`).length
    );
  });
}

/** So that what a plan shows of a payload tells nothing of it. */
const BLIND = crypto.getRandomValues(new Uint32Array(1))[0];

/**
 * Finds the payload of a device; that of a partition is in another partition.
 * One that begins with 4 KiB of zeros was applied, or never written.
 *
 * @param paths The system that it is for; undefined: another one.
 */
async function findPayload(
  device: BlockDevice,
  devices: BlockDevice[],
  paths?: Paths,
): Promise<FoundPayload | undefined> {
  const { payloadPlace } = device.read;
  const isDisk = device.kind === "disk";
  const holders = isDisk ? [device] : holdersOf(device, devices);
  const place = isDisk ? payloadPlace : "partition";
  const [holder = device] = holders;
  if (!place || (holder === device && !payloadPlace)) return undefined;
  const { path, sizeBytes, inUse } = holder;
  const found: FoundPayload = { ...startOf(holder), place, writes: [], sum: 0 };
  try {
    assert(
      holders.length === 1,
      `that of a partition is read from one with the name "${PAYLOAD}", and ` +
        `there are ${holders.length} on its disk`,
    );
    const text = await readPayload(found);
    const isEmpty = isZero(text.subarray(0, 4 * KiB));
    if (place === "partition" && isEmpty) return undefined;
    assert(isDisk || sizeBytes >= 4 * KiB, `${path} is too small`);
    assert(isDisk || !inUse, `${path} is ${inUse}`);
    const { entries, atBytes, endBytes } = parsePayload(text);
    found.writes = entries.map(({ name }) => name);
    found.sum = (crc32(text.subarray(atBytes, endBytes)) ^ BLIND) >>> 0;
    found.problem = paths && whyNotApplied(entries, paths);
  } catch (error) {
    found.problem = messageOf(error);
  }
  return found;
}

const holdersOf = ({ disk }: BlockDevice, devices: BlockDevice[]) =>
  devices.filter((other) =>
    other.disk === disk && other.partitionName === PAYLOAD
  );

async function readPayload(
  { path, atBytes, place }: FoundPayload,
): Promise<Uint8Array> {
  if (place !== "copy") {
    return await readBytes(path, atBytes, PAYLOAD_TEXT.roomBytes);
  }
  const { at, endBytes } = COPY;
  const text = parseCopy(await readBytes(path, at, endBytes - at));
  assert(
    text !== undefined,
    `its copy at ${at / KiB} KiB of ${path} is damaged`,
  );
  return text;
}

/** Why the files of this system do not take a payload. No link is followed. */
function whyNotApplied(
  entries: PayloadEntry[],
  paths: Paths,
): string | undefined {
  // The image's: what a volatile system has is gone at the next boot.
  const directoryOf = (name: string) =>
    isOurOverlay(mountedOn(join(paths.root, name)))
      ? join(paths.lower, name)
      : join(paths.root, name);
  for (const { line, name, user } of entries) {
    const [top, ...others] = user ? SHADOW.split("/") : name.split("/");
    try {
      const { stat, path } = walk(directoryOf(top), others, name);
      if (!user) continue;
      assert(stat?.isFile() === true, `there is no file "${SHADOW}"`);
      const lines = fs.readFileSync(path, "latin1").split("\n");
      assert(findUser(lines, user) >= 0, `there is no user "${user}"`);
    } catch (error) {
      return `line ${line}: ${messageOf(error)}`;
    }
  }
}

const SHADOW = "etc/shadow";

const findUser = (shadow: string[], user: string) =>
  shadow.findIndex((line) => line.startsWith(`${user}:`));

/**
 * Goes to a file from directory to directory, and through no link.
 *
 * @param make Makes a directory that is not there.
 * @returns Where it is, and what stands there.
 * @throws {Error} Where it cannot be a file.
 */
function walk(
  directory: string,
  parts: string[],
  name: string,
  make?: (directory: string) => void,
) {
  let path = directory;
  for (const part of ["", ...parts.slice(0, -1)]) {
    path = join(path, part);
    const stat = whatIsAt(path);
    if (!stat && !make) return { path };
    if (!stat) make?.(path);
    const what = stat?.isSymbolicLink() ? "symbolic link" : "file";
    const isDirectory = !stat || stat.isDirectory();
    assert(isDirectory, `"${name}" leads through a ${what}, "${part}"`);
  }
  path = join(path, parts[parts.length - 1]);
  const stat = whatIsAt(path);
  const isReplaced = !stat || stat.isFile() || stat.isSymbolicLink();
  assert(isReplaced, `"${name}" is there, and is no file`);
  return { path, stat };
}

/** Usable memory (proc_meminfo(5)). */
function readMemoryBytes(): number {
  const meminfo = readText("/proc/meminfo") ?? "";
  return KiB * Number(/^MemTotal:\s+(\d+)/.exec(meminfo)?.[1] ?? 0);
}

/** Mounts of this process (proc_pid_mountinfo(5)), oldest first. */
const readMounts = () => parseMountinfo(readText("/proc/self/mountinfo") ?? "");

export function parseMountinfo(mountinfo: string) {
  return mountinfo.split("\n").flatMap((line) => {
    const fields = line.split(" ");
    const separator = fields.indexOf("-", 6); // after optional fields
    const [type, source, superOptions] = fields.slice(separator + 1);
    if (separator < 0 || !superOptions) return [];
    return [{
      root: unescapeOctal(fields[3]), // what of its filesystem is mounted
      target: unescapeOctal(fields[4]),
      type,
      source: unescapeOctal(source),
      deviceNumber: fields[2], // `major:minor` of the filesystem
      superOptions: superOptions.split(","),
    }];
  });
}

function unescapeOctal(field: string): string {
  return field.replace(
    /\\([0-7]{3})/g,
    (_, code) => String.fromCharCode(parseInt(code, 8)),
  );
}

/**
 * The UUID of a mounted Btrfs. The device that stands for it may have been
 * pulled: then it is the only open filesystem with our label.
 */
function fsidOf({ type, source }: Mount): string | undefined {
  if (type !== "btrfs") return undefined;
  const device = nameAt(source);
  const open = listDirectory("/sys/fs/btrfs").map((fsid) => ({
    fsid,
    devices: listDirectory(`/sys/fs/btrfs/${fsid}/devices`),
    label: readText(`/sys/fs/btrfs/${fsid}/label`),
  }));
  const found = open.find(({ devices }) => device && devices.includes(device));
  const ours = open.filter(({ label }) => label === DATA);
  return found?.fsid ?? (ours.length === 1 ? ours[0].fsid : undefined);
}

// ---------------------------------------------------------------------------
// Decide: facts in, plan out. Nothing below touches a device.
// ---------------------------------------------------------------------------

export interface Plan {
  /**
   * Where the writable layer will be: on the data filesystem, on a tmpfs, as
   * it already is (`mounted`), or on a tmpfs because it was asked for (`off`).
   */
  mode: "persistent" | "volatile" | "mounted" | "off";
  /** Why, in one sentence. */
  reason: string;
  /** What is to be said, in this order. */
  notes: Note[];
  /** Before anything else. */
  repairs: Repair[];
  create?: NewFilesystem;
  data?: DataFilesystem;
  joins: NewMember[];
  /** What is late, where that is not a member of what is mounted. */
  waitFor?: string;
  /** Swap areas on the disks of the members; no others are ours. */
  swap: BlockDevice[];
}

export interface Note {
  level: "warning" | "error";
  text: string;
}

export interface NewFilesystem {
  members: NewMember[];
  dataProfile: string;
  metadataProfile: string;
  payload?: FoundPayload;
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
  members: Member[];
  /** How many members are absent, stale or cannot be used. */
  missing: number;
  /** How many of them may still come. */
  absent: number;
  /** The device that an interrupted `btrfs replace` was writing to. */
  replaceTarget?: Member;
  /** Members that missed writes: they are wiped and rebuilt. */
  stale: Member[];
  /** Devices of this filesystem that the kernel must not see. */
  conflicting: Member[];
  /** A member has missed writes, and no record says which. */
  needsScrub: boolean;
  /** Which member is to leave, or has left and is not wiped yet. */
  leaving?: Leaving;
  /** Its device, where that is not a member any more: never mounted. */
  leaver?: BlockDevice;
  /** What else is on the disk of the leaver. */
  leaverDisk: BlockDevice[];
}

/**
 * Sorts out what is there, then plans one of three cases. The plan also says
 * what is wrong with a device.
 */
export function decide(facts: Facts, settings: Settings): Plan {
  const plan: Plan = {
    mode: "volatile",
    reason: "no disk is enabled",
    notes: [],
    repairs: [],
    joins: [],
    swap: [],
  };
  const { mounted } = facts;
  if (mounted) {
    plan.mode = "mounted";
    plan.reason = `"${mounted.target}" is already there, on ` +
      `${mounted.source} (${mounted.type})`;
  } else if (settings.off) {
    plan.mode = "off";
    plan.reason = "the kernel command line says so (lightwhale.persistence)";
    return plan;
  }
  const found = sortOut(facts, settings, plan);
  if (mounted) plan.data = found.chosen;
  else if (found.chosen) planExisting(found.chosen, plan);
  else planNew(found, plan);
  if (mounted || plan.data) {
    sayDoubts(found, "warning", plan);
    planJoins(found, plan);
  }
  planRepairs(found.usable, plan);
  if (!settings.noSwap) planSwap(found.usable, plan);
  return plan;
}

type Findings = ReturnType<typeof sortOut>;

/**
 * Finds the data filesystem to use, the magic devices without data
 * (`candidates`), and what may be a data disk: suspects, and what is
 * unreadable.
 */
function sortOut(facts: Facts, settings: Settings, plan: Plan) {
  const { devices, mounted, machine } = facts;
  // Devices below an md array or a volume do not count: the array does.
  const usable = devices.filter(({ inUse }) => !inUse?.startsWith("held by"));
  for (const device of usable) {
    if (!device.read.header || device.kind === "disk" || device.magic) continue;
    if (device.partitionName === PAYLOAD) continue;
    const remedy = device.kind === "volume"
      ? "volumes are never formatted"
      : `a partition is enabled with persistence.ts --enable ${device.path}`;
    plan.notes.push(warning(
      `${device.path} begins with the magic header, which counts only at the ` +
        `start of a whole disk: it is not obeyed (${remedy})`,
    ));
  }
  const filesystems = findDataFilesystems(usable, machine);
  const chosen = mounted
    ? filesystems.find(({ fsid, members }) =>
      fsid === mounted.fsid && members.some(isOpen)
    )
    : chooseDataFilesystem(filesystems, facts, settings, plan);
  if (mounted?.type === "tmpfs" && !settings.off) {
    for (const data of filesystems) {
      if (data.members.some(isOpen)) continue; // by a person, elsewhere
      const paths = pathsOf(allDevices(data));
      plan.notes.push(warning(
        `${paths} holds a data filesystem, but the system runs without: to ` +
          `use it, reboot`,
      ));
    }
  }
  if (chosen && !mounted) leaveOut(chosen);
  if (chosen) inheritRecord(chosen, usable);
  if (chosen) findLeaver(chosen, usable);
  if (chosen && !mounted) sayUnused(chosen, usable, plan);
  const ours = filesystems.flatMap(allDevices);
  const isData = (device: BlockDevice) =>
    ours.some((member) => member === device) ||
    (device.holds.kind === "suspect" && device.holds.labelled);
  const candidates: BlockDevice[] = [];
  for (const device of usable.filter(({ magic }) => magic)) {
    const { path, readOnly } = device;
    const data = partsOf(device, usable).filter(isData);
    if (data.length === 0) candidates.push(device);
    // It stays magic until it has taken its place.
    else if (data.some((part) => part === chosen?.replaceTarget)) continue;
    else if (whyTableIsDoubted(device, usable)) continue; // it is said below
    else if (isStartedOver(device.disk, devices)) { // while its data are in use
      plan.notes.push(warning(
        `${path} is formatted at the next boot, and all that ` +
          `${pathsOf(data)} holds is lost (persistence.ts --disable ${path} ` +
          `takes that back)`,
      ));
    } else {
      if (!readOnly) plan.repairs.push({ do: "clear magic", device });
      const end = readOnly
        ? "stays magic, for it is read-only"
        : "is not magic any more";
      plan.notes.push(warning(
        `${path} carries the magic to be formatted, but ${pathsOf(data)} ` +
          `holds data of a "${DATA}": the data wins, and ${path} ${end} ` +
          `(${howToGiveUp(device, usable)})`,
      ));
    }
  }
  const given = candidates.flatMap((device) => partsOf(device, usable));
  const suspects = usable.filter(holding("suspect"))
    .filter((device) => !given.includes(device) && device !== chosen?.leaver);
  const unreadable = usable.filter(holding("unreadable"));
  const doubted = [...suspects, ...unreadable];
  const found = {
    ...{ facts, settings, usable, candidates, suspects, unreadable, doubted },
    chosen,
  };
  if (!chosen) return found;
  const known = suspects.filter(({ holds }) => holds.fsid === chosen.fsid);
  chosen.absent = Math.max(0, chosen.absent - known.length);
  const isOther = !mounted && !settings.dataUuid &&
    chosen.members.length > 0 && isAnothers(chosen, machine);
  if (!isOther || doubted.length === 0) return found;
  plan.notes.push(error(
    `${pathsOf(chosen.members)} holds another machine's data filesystem: it ` +
      `is not used while ${pathsOf(doubted)} may be this machine's (to use ` +
      `it: lightwhale.data=${chosen.fsid} on the kernel command line)`,
  ));
  return { ...found, chosen: undefined };
}

const holding =
  <Kind extends Holds["kind"]>(kind: Kind) =>
  (device: BlockDevice): device is Holding<Kind> => device.holds.kind === kind;

const warning = (text: string): Note => ({ level: "warning", text });
const error = (text: string): Note => ({ level: "error", text });
const isError = ({ level }: Note) => level === "error";

function planExisting(data: DataFilesystem, plan: Plan): void {
  const paths = pathsOf(allDevices(data));
  if (data.members.length === 0) {
    plan.waitFor = `the other disks of ${paths}`;
    plan.reason = "the data filesystem lacks its other disks";
    plan.notes.push(error(
      `${paths} cannot be used alone: it is a part of the data filesystem ` +
        `${data.fsid} that another disk was to be copied to; plug in the ` +
        `other disks`,
    ));
    return;
  }
  if (data.members.every((member) => member.readOnly)) {
    plan.reason = "the data disk is read-only";
    plan.notes.push(error(
      `Cannot write to ${pathsOf(data.members)}, which holds the data ` +
        `filesystem: it is read-only (a locked card?); unlock it`,
    ));
    return;
  }
  plan.mode = "persistent";
  plan.data = data;
  plan.reason = `${pathsOf(data.members)} ` +
    `hold${data.members.length > 1 ? "" : "s"} the data filesystem`;
}

/** There is no data filesystem: one is made of magic devices, or none. */
function planNew(found: Findings, plan: Plan): void {
  const { suspects, unreadable, doubted } = found;
  const { dataUuid, required } = found.settings;
  const isStopped = ({ read }: BlockDevice) =>
    dataUuid || (doubted.length > 0 && !read.anyway);
  const stopped = found.candidates.filter(isStopped);
  const candidates = found.candidates.filter((device) => !isStopped(device));
  if (dataUuid) {
    plan.reason = `the data filesystem ${dataUuid} is not there`;
    const end = stopped.length > 0
      ? `${pathsOf(stopped)} will not be formatted in its place`
      : "plug in its disk, or leave the parameter out";
    plan.notes.push(error(
      `No data filesystem has the UUID ${dataUuid} that the kernel command ` +
        `line asks for (lightwhale.data): ${end}`,
    ));
  } else if (doubted.length > 0) {
    plan.reason = suspects.length > 0
      ? "a data disk may be damaged"
      : "a disk cannot be read";
    if (stopped.length > 0) {
      const paths = pathsOf(stopped);
      plan.notes.push(error(
        `${paths} will not be formatted while ${pathsOf(doubted)} may be a ` +
          `damaged data disk: repair or unplug that, or have ${paths} ` +
          `formatted nevertheless: persistence.ts --enable --force ` +
          paths.replaceAll(", ", " "),
      ));
    } else if (unreadable.length > 0 && candidates.length === 0) {
      plan.notes.push(error(
        `${pathsOf(unreadable)} cannot be read and may be the data disk: ` +
          `check its cable and power, replace it, or unplug it`,
      ));
    }
  }
  sayDoubts(found, candidates.length > 0 ? "warning" : "error", plan);
  const members = planMembers(candidates, found, plan);
  if (members.length === 0) {
    if (candidates.length > 0 && doubted.length === 0) {
      plan.reason = "no enabled disk can be used";
    }
    if (!required) return;
    plan.waitFor ??= "a data disk (lightwhale.persistence=required)";
    if (plan.notes.some(isError)) return; // it says why there is none
    plan.reason = "the data disk is not there";
    plan.notes.push(error(
      `There is no data disk, and none is enabled, but the kernel command ` +
        `line requires one (lightwhale.persistence): plug it in, enable a ` +
        `new one with persistence.ts --enable, or leave the parameter out`,
    ));
    return;
  }
  const { payload, problem } = choosePayload(found.candidates, members);
  if (problem) {
    plan.reason = "a payload cannot be used";
    plan.notes.push(error(
      `Cannot format ${pathsOf(devicesOf(members))}: ${problem}`,
    ));
    return;
  }
  plan.create = { members, payload, ...profilesFor(members.length) };
  plan.mode = "persistent";
  plan.reason = `${pathsOf(devicesOf(members))} ` +
    `carr${members.length > 1 ? "y" : "ies"} the magic to be formatted`;
}

/**
 * The payload of a new filesystem. All magic devices must agree on it, also one
 * that is left out: a machine as specified, or none.
 */
function choosePayload(
  magic: BlockDevice[],
  members: NewMember[],
): { payload?: FoundPayload; problem?: string } {
  const all = magic.filter(({ payload }) => payload);
  const bad = all.find(({ payload }) => payload?.problem);
  const sums = new Set(all.map(({ payload }) => payload?.sum));
  const [used] = devicesOf(members).filter(({ payload }) => payload);
  const targets = (bad ? [bad] : all).map(({ path }) => path).join(" ");
  const remedy = `write it anew (persistence.ts --enable ${targets} --with ` +
    `FILE), or take it away (persistence.ts --disable)`;
  const problem = firstOf(
    bad &&
      `the payload of ${bad.path} cannot be used: ${bad.payload?.problem}; ` +
        remedy,
    sums.size > 1 &&
      `the payloads of ${pathsOf(all)} are not the same; ${remedy}`,
    all.length > 0 && !used &&
      `${pathsOf(all)}, which has a payload for it, cannot be used`,
  );
  return { payload: used?.payload, problem };
}

function sayDoubts(
  { usable, suspects, unreadable }: Findings,
  level: Note["level"],
  plan: Plan,
): void {
  for (const device of suspects) {
    const { why, remedy } = device.holds;
    const text = `${device.path} may be a "${DATA}" disk, but ${why}: it is ` +
      `not touched (${remedy ? `${remedy}; ` : ""}` +
      `${howToGiveUp(device, usable)})`;
    plan.notes.push({ level, text });
  }
  for (const { holds } of unreadable) {
    plan.notes.push(warning(`${holds.why}: it is not used`));
  }
}

/**
 * The node to enable: the whole disk only where nothing else is on it. Neither a
 * volume nor a partition without a name can be.
 */
function howToGiveUp(device: BlockDevice, devices: BlockDevice[]): string {
  const whole = devices.find(({ name }) => name === device.disk);
  const gpt = whole?.read.gpt;
  const isShared = gpt
    ? namesIn(whole.read).some((name) => ![MAGIC, DATA, SWAP].includes(name))
    : device.kind === "partition";
  const { path } = isShared || !whole ? device : whole;
  const isRefused = whole?.kind === "volume" || (whole && isShared && !gpt);
  return `to give up all that is on ${path}, for ever: ` +
    (isRefused ? "wipefs --all " : "persistence.ts --enable --force ") + path;
}

/** A small repair; `--dry-run` prints what it says. */
export interface Repair {
  do: keyof typeof REPAIRS;
  device: BlockDevice;
}

/**
 * Plans what makes members usable: tables, nodes, sizes. The kernel is shown
 * also what is not used; only what is used is written to.
 */
function planRepairs(devices: BlockDevice[], plan: Plan): void {
  const { data, create, joins } = plan;
  const isInUse = plan.mode === "mounted";
  const members: BlockDevice[] = data?.members ?? [];
  const used = [...members, ...devicesOf([...create?.members ?? [], ...joins])];
  const left = data?.leaver ? [data.leaver] : []; // to be wiped, by its node
  const seen = [...used, ...left, ...data ? allDevices(data) : []];
  const repairs: Repair[] = [];
  for (const disk of devices) {
    const { path, readOnly, sectorBytes, read: { gpt } } = disk;
    if (!gpt) continue;
    const isPart = (device: BlockDevice) =>
      device !== disk && device.disk === disk.name;
    // sfdisk takes a table for one of the disk's own sectors.
    const canChange = !readOnly && gpt.sectorBytes === sectorBytes &&
      !isStartedOver(disk.name, devices);
    if (canChange && gpt.lost && used.some(isPart)) {
      repairs.push({ do: "restore table", device: disk });
    }
    if (seen.some((device) => isPart(device) && device.entry)) {
      repairs.push({ do: "show partitions", device: disk });
    }
    const last = members.find((member) =>
      isPart(member) &&
      member.startBytes + member.sizeBytes === endOfPartitions(gpt)
    );
    if (!last || !isLarger(disk) || !canChange || gpt.lost || isInUse) continue;
    const others = othersOn(disk).join(", ");
    if (!others) repairs.push({ do: "grow", device: last });
    else {
      plan.notes.push(warning(
        `${path} is larger than its partition table, but holds ${others} as ` +
          `well: it is not grown (to give that up, for ever: echo ", +" | ` +
          `sfdisk --no-reread -N ${last.number} ${path}, reboot)`,
      ));
    }
  }
  for (const device of isInUse ? [] : members) {
    if (!device.read.btrfs) repairs.push({ do: "restore superblock", device });
  }
  plan.repairs.unshift(...repairs);
}

const endOfPartitions = ({ partitions }: Gpt) =>
  Math.max(0, ...partitions.map((p) => p.startBytes + p.sizeBytes));

/** The kernel has it open as a member of its filesystem. */
function isOpen({ inUse, read }: BlockDevice): boolean {
  return read.btrfs !== undefined && inUse === openIn(read.btrfs.fsid);
}

const openIn = (fsid?: string) => `part of the mounted Btrfs ${fsid}`;

/** The device itself and, of a whole disk, its partitions. */
function partsOf(device: BlockDevice, devices: BlockDevice[]): BlockDevice[] {
  return device.kind === "partition"
    ? [device]
    : devices.filter((other) => other.disk === device.disk);
}

const pathsOf = (devices: { path: string }[]) =>
  devices.map((device) => device.path).join(", ");

const devicesOf = (members: NewMember[]) =>
  members.map((member) => member.device);

// What a device holds

/** Whole disks with the header, and partitions with the magic name. */
export const isMagic = ({ kind, read, partitionName }: BlockDevice) =>
  kind === "disk"
    ? read.header
    : kind === "partition" && partitionName === MAGIC;

/**
 * Is libblkid to be asked: is the device to be formatted, repaired, grown or
 * blamed, or not plainly a member? The kernel knows best what is open.
 */
export function isInQuestion(device: BlockDevice, devices: BlockDevice[]) {
  const { read, partitionName, kind } = device;
  if (read.error || isOpen(device)) return false;
  if (read.record && !read.btrfs) return true;
  const disk = devices.find(({ name }) => name === device.disk);
  if (disk?.read.header || disk?.read.hidden) return true;
  if (partitionName === MAGIC) return true;
  if (kind === "disk" && namesIn(read).includes(MAGIC)) return true;
  const isOurs = read.btrfs?.label === DATA;
  if (isOurs) return !read.plain || !read.btrfs?.intact || !!read.table;
  if (read.backup?.label === DATA || partitionName === DATA) return true;
  if (partitionName === SWAP) return read.swapLabel !== SWAP;
  if (kind !== "disk" || !read.gpt) return false;
  const isUsed = hasOurNames(read);
  const parts = partsOf(device, devices);
  return (isUsed || parts.some((part) => part.read.btrfs?.label === DATA)) &&
    (read.gpt.lost !== undefined || !read.plain || onlySwapIsLeft(device) ||
      isLarger(device));
}

/**
 * What a device holds, by our own reading and by what libblkid sees, where it
 * was asked. Two answers at once are suspect.
 */
export function whatItHolds(
  device: BlockDevice,
  devices: BlockDevice[],
): Holds {
  const { read, partitionName, signatures = [], path } = device;
  const { btrfs, record, swapLabel } = read;
  const member = btrfs && { kind: "member" as const, btrfs, record };
  if (read.error) return { kind: "unreadable", why: read.error };
  if (member && isOpen(device)) return member;
  if (isStartedOver(device.disk, devices)) return { kind: "nothing of ours" };
  const isNamed = partitionName === DATA;
  const isOurs = btrfs?.label === DATA;
  const labelled = isOurs || signatures.some(({ label }) => label === DATA);
  const fsid = (read.backup ?? btrfs ?? read.hidden)?.fsid;
  const suspect = (why: string, remedy?: string) =>
    ({ kind: "suspect", why, labelled, fsid, remedy }) as const;
  const rescue = `"btrfs rescue super-recover ${path}" may repair it`;
  const others = othersOn(device).join(", ");
  const doubt = whyTableIsDoubted(device, devices);
  const lost = (btrfs?.deviceBytes ?? 0) - device.sizeBytes;
  const what = describeSignatures(signatures);
  return firstOf<Holds>(
    doubt && (labelled || isNamed) && suspect(doubt),
    isOurs && others && suspect(`it holds ${others} as well as a Btrfs`),
    isOurs && !btrfs.intact && suspect("its superblock is damaged", rescue),
    isOurs && btrfs.isSeed && suspect(
      "it is a seed (btrfs(5)), which the kernel never writes to",
      `if a disk was added to it: mount both, "btrfs device remove ${path}"; ` +
        `else "btrfstune -S 0 -f ${path}"; reboot`,
    ),
    isOurs && lost > 0 && suspect(
      `it is ${inMiB(lost)} (${lost} bytes) smaller than its filesystem`,
      "give the disk its size again",
    ),
    btrfs?.intact && !read.table && (isOurs || !isNamed) && member,
    swapLabel === SWAP && !labelled && !isNamed && { kind: "swap" },
    labelled && suspect(`it holds ${what}`),
    read.backup?.label === DATA && !others &&
      suspect("only a backup superblock is left", rescue),
    read.hidden && !isMbrUsed(device, devices) && suspect(
      "an MBR hides its GPT, and no partition of the MBR holds anything",
      `if nobody needs the MBR that sfdisk --list ${path} shows: ` +
        `wipefs --all --types dos ${path}, reboot`,
    ),
    isNamed &&
      suspect(`it holds ${what || (read.plain ? "no filesystem" : UNKNOWN)}`),
    onlySwapIsLeft(device) &&
      suspect(`it has a "${SWAP}" partition and no other`),
  ) ?? { kind: "nothing of ours" };
}

/** Does anything but the MBR show that a disk was made into another? */
const isMbrUsed = (disk: BlockDevice, devices: BlockDevice[]) =>
  partsOf(disk, devices).some((part) =>
    part.read.btrfs !== undefined ||
    (part.read.swapLabel !== SWAP && othersOn(part).length > 0)
  );

function onlySwapIsLeft({ read }: BlockDevice): boolean {
  const names = namesIn(read);
  return names.length > 0 && names.every((name) => name === SWAP);
}

/**
 * Why partitions must not be believed: the table is damaged and not alone, or a
 * filesystem of the whole disk overlaps them. Not in doubt are a hybrid ISO
 * image, which is meant to be both; RAID metadata behind all partitions; and a
 * table over a Btrfs, which is newer, for mkfs.btrfs zeroes the first 2 MiB.
 */
function whyTableIsDoubted(device: BlockDevice, devices: BlockDevice[]) {
  const disk = devices.find(({ name }) => name === device.disk);
  if (device.kind !== "partition" || !disk?.read.gpt) return undefined;
  const { lost } = disk.read.gpt;
  const known = device.read.btrfs?.label === DATA
    ? /^(iso9660\b|btrfs "lightwhale-data"$|a partition table)/
    : /^iso9660\b/;
  const endBytes = lost ? Infinity : endOfPartitions(disk.read.gpt);
  const others = othersOn(disk, endBytes)
    .filter((what) => lost || !known.test(what));
  if (others.length === 0) return undefined;
  return `${disk.path}, which it is a part of, holds ${others.join(", ")}` +
    (lost ? `, and its partition table is damaged` : "");
}

/**
 * What libblkid sees beside our filesystem or the GPT of a disk.
 *
 * @param endBytes From here on RAID metadata do not count, nor does what a
 * disk held before.
 */
function othersOn({ read, signatures = [] }: BlockDevice, endBytes = Infinity) {
  const isExpected = ({ type, atBytes = 0 }: Signature) => {
    if (/_raid_member$|^gpt$|^data/.test(type) && atBytes >= endBytes) {
      return true;
    }
    if (read.hidden && /^(dos|gpt)$/.test(type)) return true;
    // An empty MBR is what boot code looks like, where there is nothing else.
    if (type === "dos") return read.table !== "mbr" && !read.btrfs;
    if (type === "gpt" || type === "PMBR") {
      return read.gpt !== undefined && atBytes < read.gpt.endBytes;
    }
    return type === "btrfs" && !read.gpt;
  };
  const others = signatures.filter((signature) => !isExpected(signature));
  const table = read.btrfs && read.table
    ? [`a partition table (${read.table})`]
    : [];
  return [...table, ...others.map(describeSignature)];
}

/** sfdisk(8) moves the backup table to the end of a disk at every change. */
function whyTableStays(disk?: BlockDevice): string | undefined {
  const raid = disk?.signatures?.find(({ type }) =>
    type.endsWith("_raid_member")
  );
  if (!disk || !raid || !isLarger(disk)) return undefined;
  return `a change of the partition table would erase what ${disk.path} holds ` +
    `at its end (${raid.type})`;
}

/** The kernel shows partitions that overlap: what one holds is in the other. */
function overlapOf(device: BlockDevice, disk?: BlockDevice) {
  const { kind, number, startBytes, sizeBytes } = device;
  if (kind !== "partition") return undefined;
  return disk?.read.gpt?.partitions.find((entry) =>
    entry.number !== number && entry.startBytes < startBytes + sizeBytes &&
    startBytes < entry.startBytes + entry.sizeBytes
  );
}

function whyPartitionStays(device: BlockDevice, disk?: BlockDevice) {
  if (device.kind !== "partition") return undefined;
  const other = overlapOf(device, disk);
  return other
    ? `it overlaps partition ${other.number} of ${disk?.path}`
    : whyTableStays(disk);
}

function describeSignature({ type, label }: Signature): string {
  return (label ? `${type} "${label}"` : type).replaceAll(/\p{Cc}/gu, "?");
}

const describeSignatures = (signatures: Signature[]) =>
  [...new Set(signatures.map(describeSignature))].join(", ");

// Which members belong together

/** Groups devices by filesystem and decides which may be mounted together. */
export function findDataFilesystems(
  devices: BlockDevice[],
  machine?: string,
): DataFilesystem[] {
  const members = devices.filter(holding("member"));
  const groups = Object.groupBy(members, ({ holds }) => holds.btrfs.fsid);
  return (Object.values(groups) as Member[][])
    .filter((group) => group.some(({ holds }) => holds.btrfs.label === DATA))
    .map((group) => withScratched(group, devices))
    .map((group) => sortOutMembers(withoutJoining(group, devices), machine));
}

/**
 * A replace ends in two steps: the kernel erases the magic of the source, then
 * commits that the target is a member (fs/btrfs/dev-replace.c,
 * btrfs_dev_replace_finishing()). After a power cut in between, the source
 * still is the member; its record tells.
 */
function withScratched(group: Member[], devices: BlockDevice[]): Member[] {
  const [{ holds: { btrfs: { fsid } } }] = group;
  if (group.some((device) => devidOf(device) > 0)) return group;
  const [source, another] = devices.filter(({ read, signatures = [] }) =>
    read.scratched?.fsid === fsid && read.record?.fsid === fsid &&
    signatures.length === 0
  );
  if (!source || another) return group;
  const { scratched, record } = source.read;
  const holds = { kind: "member" as const, btrfs: scratched!, record };
  return [...group, Object.assign(source, { holds })];
}

/**
 * Ignores a device whose `btrfs device add` was cut by a power loss: it is
 * still magic, and holds nothing but that one transaction's superblock.
 */
function withoutJoining(group: Member[], devices: BlockDevice[]): Member[] {
  const only = findOnlyMember(group);
  if (!only) return group;
  const magic = devices.filter((device) => device.magic)
    .flatMap((device) => partsOf(device, devices));
  return group.filter((device) =>
    device.holds.btrfs.numDevices !== 2 || !magic.includes(device) ||
    generationOf(device) !== generationOf(only) + 1
  );
}

/**
 * A member with num_devices = 1 that is at most one generation behind: the last
 * transaction added or removed the other device, and power was lost between the
 * two superblocks. Linux (6.18) mounts it only alone: others it takes for
 * clones of it (fs/btrfs/volumes.c, find_fsid_by_device()).
 */
function findOnlyMember(devices: Member[]): Member | undefined {
  const highest = Math.max(...devices.map(generationOf));
  return devices.find((device) =>
    device.holds.btrfs.numDevices === 1 && highest - generationOf(device) <= 1
  );
}

const generationOf = ({ holds }: Member) => holds.btrfs.generation;
const devidOf = ({ holds }: Member) => holds.btrfs.devid;
const epochOf = ({ holds }: Pick<Member, "holds">) => holds.record?.epoch ?? 0;
const idOf = (member?: Pick<Member, "holds">) => member?.holds.record?.member;
const lastMountOf = ({ holds }: Member) => holds.record?.mounts?.at(-1);

const newest = (devices: Member[]) =>
  devices.toSorted((a, b) => generationOf(b) - generationOf(a))[0];

/**
 * Was anything written to `writer` while `other` was not there?
 *
 *     epoch   sda2                       sdb2
 *       5     present {a,b}   gen 10     present {a,b}   gen 10   both mounted
 *       6     present {a}     gen 14     (in a drawer)   sdb2 is stale
 *       6'    (in a drawer)              present {b}     gen 12   ... split brain
 *
 * A member that dropped out of a mounted filesystem is told by its generation:
 * all members get the superblock of one commit before the next commit begins
 * (fs/btrfs/disk-io.c, write_all_supers()), so that a power cut leaves them one
 * apart at most. A member that was not there at a mount is told by the records;
 * a mount that failed, or lost its power before a commit, has written nothing.
 */
function wroteWithout(writer: Member, other: Member): boolean {
  const { btrfs, record } = writer.holds;
  const theirs = other.holds.record;
  // Each member that is present gets a record. So one without a record was away,
  // at least from the mounts of a member that counts fewer than there are.
  const ahead = btrfs.generation - generationOf(other);
  const wasAlone = ({ holds }: Member) =>
    (holds.record?.present.length ?? Infinity) < holds.btrfs.numDevices;
  if (!theirs) return wasAlone(writer) && Math.abs(ahead) > 1;
  if (!record) return wasAlone(other) && ahead > 1;
  const lastTogether = theirs.absent[record.member] ?? generationOf(other);
  if (btrfs.generation - lastTogether > 1) return true;
  if (tookPart(other, writer)) return false;
  // A power cut between the records of one mount: nobody has written in it.
  const lastSeen = theirs.lastSeen?.[record.member] ?? lastMountOf(other);
  const isNext = record.present.includes(theirs.member) &&
    lastSeen === record.mounts?.at(-2);
  const together = record.absent[theirs.member] ??
    (isNext ? lastTogether : -1);
  // A mount replays the log and commits: a log that both have is older.
  const logged = btrfs.hasLog && !other.holds.btrfs.hasLog;
  return btrfs.generation > together || logged;
}

/**
 * Did a member take part in the last mount of another? The name of that mount
 * tells, which no copy made before it has; version 1.0 had only identities of
 * members, which a copy shares.
 */
function tookPart({ holds: { record } }: Member, last: Member): boolean {
  const mount = lastMountOf(last);
  if (mount && record?.mounts) return record.mounts.includes(mount);
  return last.holds.record?.present.includes(record?.member ?? "") ?? false;
}

/**
 * Is it proven that a device missed writes of another? It dropped out of a mount
 * that goes on without it, or the records say so.
 */
const isBehind = (device: Member, other: Member) =>
  !isOpen(device) && (wroteWithout(other, device) ||
    (isOpen(other) && tookPart(device, other) && !wroteWithout(device, other)));

/** Is it on the hardware that its record names? Undefined: nobody can tell. */
function isOnItsHardware({ read: { record }, hardware }: BlockDevice) {
  if (!record?.hardware || !hardware) return undefined;
  if (record.hardware === hardware) return true;
  // Nothing tells whether a disk is what was an image file, or the reverse.
  const isImage = (text: string) => text.startsWith(IMAGE);
  return isImage(record.hardware) === isImage(hardware) ? false : undefined;
}

/**
 * Classifies the devices of one filesystem. A member is stale if generations or
 * records prove that another one was written without it ({@linkcode
 * wroteWithout}), and not the reverse as well, which is a split brain. While the
 * filesystem is open its superblocks are read mid-commit: then the kernel's list
 * of open devices decides.
 */
function sortOutMembers(devices: Member[], machine?: string): DataFilesystem {
  const together = (device: Member) =>
    devices.filter((other) =>
      other === device || (epochOf(other) === epochOf(device) &&
        lastMountOf(other) === lastMountOf(device) && tookPart(other, device))
    ).length;
  const isCopy = (device: Member) =>
    isOnItsHardware(device) === false &&
    devices.some((other) =>
      other !== device && devidOf(other) === devidOf(device)
    );
  // The first is used of devices that exclude each other.
  const ranked = [...devices].sort((a, b) =>
    Number(isOpen(b)) - Number(isOpen(a)) ||
    Number(b.holds.btrfs.label === DATA) -
      Number(a.holds.btrfs.label === DATA) ||
    together(b) - together(a) ||
    Number(isCopy(a)) - Number(isCopy(b)) ||
    machineRank(b, machine) - machineRank(a, machine) ||
    epochOf(b) - epochOf(a) || generationOf(b) - generationOf(a) ||
    devidOf(a) - devidOf(b) || byName(a, b)
  );
  const consistent = withoutConflicts(ranked);
  // A replace that has not finished has devid 0 on its target.
  const replaceTarget = consistent.find((device) => devidOf(device) === 0);
  const all = consistent.filter((device) => device !== replaceTarget);
  const open = all.filter(isOpen);
  const only = findOnlyMember(all);
  const members = open.length > 0
    ? open
    : only
    ? [only]
    : all.filter((device) => !all.some((other) => isBehind(device, other)));
  members.sort((a, b) => devidOf(a) - devidOf(b));
  const top = newest(members.length > 0 ? members : devices);
  const missing = Math.max(0, top.holds.btrfs.numDevices - members.length);
  const leaving = leavingOf(members);
  const late = devices.filter((device) =>
    device !== replaceTarget && !members.includes(device)
  );
  const isLeft = leaving?.how === "remove" && missing > 0 &&
    !members.some((member) => idOf(member) === leaving.member);
  // To be wiped and rebuilt: no half of a split brain (`all` has only one), not
  // told to leave, behind a member that is used, and not on other hardware than
  // its record names, nor a copy that was made before the last mount of both.
  const stale = late.filter((device) =>
    missing > 0 && all.includes(device) && idOf(device) !== leaving?.member &&
    members.some((member) => isBehind(device, member)) &&
    device.holds.record !== undefined &&
    isOnItsHardware(device) !== false && !isOlderCopy(device, members)
  );
  return {
    fsid: devices[0].holds.btrfs.fsid,
    members,
    missing,
    absent: missing - stale.length - (replaceTarget ? 1 : 0) - (isLeft ? 1 : 0),
    replaceTarget,
    stale,
    conflicting: late.filter((device) => !stale.includes(device)),
    needsScrub: open.length === 0 &&
      members.some((member) => generationOf(member) < generationOf(top)),
    leaving,
    leaverDisk: [],
  };
}

/**
 * Which member is to leave, as the newest record says. The leaver's own record
 * does not count: the next boot may have only those of the others.
 */
function leavingOf(members: Pick<Member, "holds">[]): Leaving | undefined {
  const [newest, ...others] = members.filter(({ holds }) => holds.record)
    .sort((a, b) => epochOf(b) - epochOf(a));
  const leaving = newest?.holds.record?.leaving;
  if (!leaving || idOf(newest) !== leaving.member) return leaving;
  const alone = leaving.how === "move" ? leaving : undefined;
  return others.length > 0 ? others[0].holds.record?.leaving : alone;
}

function leavingMember({ members, leaving }: DataFilesystem, how?: string) {
  if (how && leaving?.how !== how) return undefined;
  return members.find((member) => leaving && idOf(member) === leaving.member);
}

/**
 * The magic disk that the data of a member move to: the one that was named. Of
 * several disks without a hardware identity nobody can tell which it is.
 */
function moveTarget(data: DataFilesystem, joins: NewMember[]) {
  const isNamed = ({ device: { hardware = "" } }: NewMember) =>
    hardware === (data.leaving?.to ?? hardware);
  const found = leavingMember(data, "move") ? joins.filter(isNamed) : [];
  return found.length === 1 ? found[0] : undefined;
}

/** What a move waits for; undefined where it can go on, or none is to. */
function whyNotMoved(data: DataFilesystem, joins: NewMember[]) {
  const member = leavingMember(data, "move");
  if (!member || data.replaceTarget || moveTarget(data, joins)) {
    return undefined;
  }
  return `${member.path} is to move to a disk that is not there, or that cannot ` +
    `be told from another one: plug it in alone, or take that back (--move ` +
    `--cancel)`;
}

/**
 * The leaver of two members is left out of the mount: Btrfs mirrors nothing on
 * one device, and a conversion with both would spread the only copy over both.
 * So the leaver stays whole until the other has all. With more members, a
 * `btrfs device remove` that a power cut interrupted may be done already.
 */
function leaveOut(data: DataFilesystem): void {
  const leaver = leavingMember(data, "remove");
  if (!leaver) return;
  const { members } = data;
  const { numDevices } = newest(members).holds.btrfs;
  const isLast = members.length === 2 && numDevices === 2 &&
    members.every((member) => member === leaver || !member.readOnly);
  if (!isLast && members.length <= numDevices) return;
  data.members = members.filter((member) => member !== leaver);
  data.missing = Math.max(0, numDevices - data.members.length);
  data.leaver = leaver;
}

/**
 * A replace may end, and the power go, before its target has a record: it
 * inherits that of the member that was to move, whose own record says so, and
 * which is no member any more (fs/btrfs/volumes.c,
 * btrfs_scratch_superblocks()).
 */
function inheritRecord(data: DataFilesystem, devices: BlockDevice[]): void {
  const { members: [member, another], fsid } = data;
  if (!member || another || member.holds.record) return;
  for (const { read: { record, btrfs } } of devices) {
    if (record?.fsid !== fsid || btrfs) continue;
    const { how, member: leaver } = record.leaving ?? {};
    if (how !== "move" || leaver !== record.member) continue;
    const own = { member: `${record.member}-moved`, hardware: undefined };
    member.holds = { ...member.holds, record: { ...record, ...own } };
    data.leaving = record.leaving;
  }
}

/**
 * Finds the disk that has left: its record says so and names this hardware, and
 * nobody used it since. If two disks look so, one is a copy: neither is
 * touched. Nor is one that is a single commit ahead, though a power cut leaves
 * that as well.
 */
function findLeaver(data: DataFilesystem, devices: BlockDevice[]): void {
  const { fsid, members, leaving } = data;
  const isKnown = (mount?: string) =>
    members.some(({ holds }) => mount && holds.record?.mounts?.includes(mount));
  const isWritten = (device: Member) =>
    members.some((member) =>
      generationOf(device) >
        (member.holds.record?.absent[idOf(device)!] ?? generationOf(member))
    );
  const found = devices.filter((device) => {
    const { record } = device.read;
    return record?.fsid === fsid && record.member === leaving?.member &&
      isKnown(record.mounts?.at(-1)) && isOnItsHardware(device) !== false &&
      !isOpen(device) && !members.includes(device as Member) &&
      record.leaving?.member === record.member &&
      othersOn(device).length === 0 &&
      !(holding("member")(device) && isWritten(device));
  });
  data.leaver ??= found.length === 1 ? found[0] : undefined;
  const { leaver } = data;
  if (!leaver) return;
  data.conflicting = data.conflicting.filter((device) => device !== leaver);
  data.leaverDisk = devices
    .filter((device) => device !== leaver && device.disk === leaver.disk);
}

/**
 * Leaves out, by rank, a device with the devid of another (a copy, or one that
 * was replaced), and the other half of a split brain.
 */
function withoutConflicts(ranked: Member[]): Member[] {
  const kept: Member[] = [];
  for (const device of ranked) {
    const excludes = (other: Member) =>
      devidOf(other) === devidOf(device) ||
      (wroteWithout(device, other) && wroteWithout(other, device));
    if (!kept.some(excludes)) kept.push(device);
  }
  return kept;
}

/**
 * Does a member know a later mount of this device than the device itself does?
 */
function isOlderCopy(device: Member, members: Member[]): boolean {
  const { member: id = "", mounts: own } = device.holds.record ?? {};
  return members.some(({ holds }) => {
    const { lastSeen, present, mounts } = holds.record ?? {};
    const seen = lastSeen?.[id] ??
      (present?.includes(id) ? mounts?.at(-1) : undefined);
    return seen !== undefined && !own?.includes(seen);
  });
}

/** 2: this machine's, 0: another machine's, 1: nobody knows. */
function machineRank({ holds: { record } }: Member, machine?: string): number {
  if (!record?.machine) return 1;
  return record.machine === machine ? 2 : 0;
}

/** Two devices that differ in nothing may be one device on two paths. */
const isTwin = (a: Member, b: Member) =>
  [devidOf, generationOf, epochOf, lastMountOf].every((of) => of(a) === of(b));

const isAnothers = ({ members }: DataFilesystem, machine?: string) =>
  members.every((member) => machineRank(member, machine) === 0);

function whyNotUsed(device: Member, { members, missing }: DataFilesystem) {
  const same = members.find((member) => devidOf(member) === devidOf(device));
  return firstOf(
    same && isTwin(device, same) &&
      `is ${same.path} on another path, or holds exactly the same`,
    same && `is a copy of ${same.path}, or was replaced by it`,
    members.every((member) => wroteWithout(device, member)) &&
      `and ${pathsOf(members)} were each written without the other`,
    missing > 0 && members.some(isOpen) &&
      isOnItsHardware(device) !== false && !isOlderCopy(device, members) &&
      "came back after the mount: the next boot takes it in or rebuilds it",
    findOnlyMember(members) && "did not finish joining, or was removed",
    missing === 0 && "was replaced while it was away",
  ) ?? "is an older copy of a member, or on other hardware than that";
}

function allDevices(data: DataFilesystem): Member[] {
  const { members, stale, replaceTarget, conflicting, leaver } = data;
  return [...members, ...stale, replaceTarget, ...conflicting, leaver]
    .filter((device) => device !== undefined).filter(holding("member"));
}

/** Chooses by a rule that gives the same answer at the next boot. */
function chooseDataFilesystem(
  filesystems: DataFilesystem[],
  { machine }: Facts,
  { dataUuid }: Settings,
  plan: Plan,
): DataFilesystem | undefined {
  const most = (data: DataFilesystem, value: (member: Member) => number) =>
    Math.max(0, ...data.members.map(value));
  const owner = (data: DataFilesystem) =>
    most(data, (member) => machineRank(member, machine));
  const secondsOf = ({ holds }: Member) => holds.record?.seconds ?? 0;
  const criteria: ((data: DataFilesystem) => number | boolean)[] = [
    ({ fsid }) => fsid === dataUuid, // asked for
    owner, // no other machine's disk takes over
    ({ members, missing }) => members.length > 0 && missing <= 1, // mountable
    (data) => owner(data) === 2 ? most(data, secondsOf) : 0, // used last
    (data) => most(data, epochOf), // no old disk takes over
    ({ missing }) => missing === 0,
  ];
  const ranked = filesystems.toSorted((a, b) => {
    const by = criteria.find((of) => of(a) !== of(b));
    return by ? Number(by(b)) - Number(by(a)) : a.fsid < b.fsid ? -1 : 1;
  });
  const isThere = !dataUuid || ranked[0]?.fsid === dataUuid;
  if (!isThere) {
    plan.waitFor = `the data filesystem ${dataUuid} (lightwhale.data)`;
  }
  const chosen = isThere ? ranked[0] : undefined;
  const members = pathsOf(chosen?.members ?? []);
  const used = chosen
    ? `${chosen.fsid} on ${members} is used`
    : `${dataUuid} is asked for`;
  for (const other of ranked.filter((data) => data !== chosen)) {
    plan.notes.push(warning(
      `There is more than one data filesystem: ${used}, ${other.fsid} on ` +
        `${pathsOf(allDevices(other))} is not touched (to use it instead: ` +
        `lightwhale.data=${other.fsid} on the kernel command line)`,
    ));
  }
  return chosen;
}

/** Says which devices of a filesystem are not used, or not there. */
function sayUnused(data: DataFilesystem, devices: BlockDevice[], plan: Plan) {
  const members = pathsOf(data.members);
  for (const device of data.conflicting) {
    const { path } = device;
    const are = data.members.length > 1 ? "are" : "is";
    const isSame = data.members.some((member) => isTwin(device, member));
    const orGiveUp = isSame ? "" : `; ${howToGiveUp(device, devices)}`;
    plan.notes.push(warning(
      `${path} ${
        whyNotUsed(device, data)
      }: ${members} ${are} used, ${path} is ` +
        `not touched (to use it instead, unplug ${members}${orGiveUp})`,
    ));
  }
  const isOut = data.leaving?.how === "remove" && !leavingMember(data);
  if (data.missing > (isOut ? 1 : 0)) {
    plan.notes.push(warning(describeMissing(data)));
  }
}

function describeMissing(data: DataFilesystem): string {
  const { members, missing, stale, replaceTarget: target } = data;
  const whole = missing + members.length;
  const cost = whole > 2 ? "with less redundancy" : "without redundancy";
  const cure = firstOf(
    stale.length > 0 && `; ${pathsOf(stale)} missed writes and is rebuilt`,
    target && `; ${target.path} is taking the missing place`,
  ) ?? " (plug in the missing disk, or a new one enabled with " +
      "persistence.ts --enable)";
  return `The data filesystem lacks ${missing} of ${whole} devices: it runs ` +
    `${cost}, degraded${cure}`;
}

/** Swap on the members' disks, also what a boot did not get to make. */
function planSwap(devices: BlockDevice[], plan: Plan): void {
  const disks = plan.data?.members.map(({ disk }) => disk) ?? [];
  plan.swap = devices.filter((device) => {
    const { disk, inUse, readOnly, holds, read } = device;
    const whole = devices.find(({ name }) => name === disk);
    if (!disks.includes(disk) || inUse || readOnly) return false;
    if (overlapOf(device, whole)) return false;
    return holds.kind === "swap" ||
      (plan.mode === "persistent" && device.partitionName === SWAP &&
        holds.kind === "nothing of ours" && read.plain &&
        device.signatures?.length === 0);
  });
  for (const device of plan.swap) {
    if (device.holds.kind === "swap") continue;
    plan.repairs.push({ do: "make swap", device });
  }
}

// Which devices become members

/**
 * The profiles for a number of devices (mkfs.btrfs(8), PROFILES). `raid1`
 * survives the loss of one; more copies of the metadata cost little.
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
  { facts, settings, usable, chosen }: Findings,
  plan: Plan,
): NewMember[] {
  const members: NewMember[] = [];
  for (const device of magic) {
    const { path, disk, sizeBytes, sectorBytes, number } = device;
    const isPartition = device.kind === "partition";
    const member = layOut(device, facts.memoryBytes, settings.noSwap);
    const parts = partsOf(device, facts.devices);
    const user = parts.find((part) => part.inUse);
    const mute = parts.find((part) => part.read.error);
    const doubt = whyTableIsDoubted(device, usable);
    const misfit = facts.misfits.find((m) => m.device.path === path);
    const whole = usable.find(({ name }) => name === disk);
    const madeFor = whole?.read.gpt?.sectorBytes;
    const sibling = magic.find((other) =>
      other !== device && other.disk === disk &&
      (other.kind === "disk" || other.sizeBytes > sizeBytes ||
        (other.sizeBytes === sizeBytes && other.number < number))
    );
    const used = chosen?.members.find((member) =>
      isPartition && member.disk === disk
    );
    const itself = "a disk is no mirror of itself";
    const why = firstOf(
      mute && `${mute.path} cannot be read`,
      doubt && `${doubt}; wipefs(8) takes away what is a leftover`,
      device.readOnly && "it is read-only",
      user && `${user.path} is ${user.inUse}`,
      member.dataBytes < MINIMUM_DATA_BYTES &&
        `it is too small (${inMiB(sizeBytes)}; Btrfs needs ` +
          `${inMiB(MINIMUM_DATA_BYTES)} for data)`,
      misfit?.why,
      isPartition && madeFor !== sectorBytes &&
        `its table was made for sectors of ${madeFor} bytes`,
      whyPartitionStays(device, whole),
      sibling?.kind === "disk" && "its whole disk carries the magic header too",
      sibling && `${sibling.path} on the same disk is used: ${itself}`,
      used && `${used.path} on the same disk is a member: ${itself}`,
    );
    const note = misfit?.isTwin ? warning : error;
    if (!why) members.push(member);
    else plan.notes.push(note(`Cannot format ${path}: ${why}`));
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

/**
 * Adds the magic devices that join the data filesystem. A suspect is no
 * obstacle beside a whole one; where a member is missing, it may be that
 * member.
 */
function planJoins(found: Findings, plan: Plan): void {
  const { data } = plan;
  if (found.candidates.length === 0) return;
  if (!data) {
    const { source, type } = found.facts.mounted ?? {};
    const when = type === "btrfs"
      ? `nothing is done, for ${source}, which is mounted, was not looked at ` +
        `(--devices)`
      : "that happens at the next boot";
    plan.notes.push(warning(
      `${pathsOf(found.candidates)} carries the magic to be formatted: ${when}`,
    ));
    return;
  }
  const mute = found.unreadable.filter(({ inUse }) =>
    plan.mode !== "mounted" || inUse === openIn(data.fsid)
  );
  const doubted = data.missing > 0 ? [...found.suspects, ...mute] : [];
  const isStopped = ({ read }: BlockDevice) =>
    doubted.length > 0 && !read.anyway;
  const stopped = found.candidates.filter(isStopped);
  const candidates = found.candidates.filter((device) => !isStopped(device));
  if (stopped.length > 0) {
    plan.notes.push(warning(
      `${pathsOf(stopped)} does not join the data filesystem while ` +
        `${pathsOf(doubted)} may be the missing disk (to let it join ` +
        `nevertheless: persistence.ts --enable --force ${stopped[0].path})`,
    ));
  }
  const sizes = sizesOf(data);
  const members = planMembers(candidates, found, plan);
  const target = moveTarget(data, members);
  members.sort((a, b) =>
    Number(b === target) - Number(a === target) || b.dataBytes - a.dataBytes
  );
  for (const member of members) {
    const problem = member === target // it was checked when it was named
      ? undefined
      : whyTooSmall(member.dataBytes, sizes) ??
        whyNotMirrored(data, [...sizes, member.dataBytes]);
    const { path, payload } = member.device;
    if (problem) {
      plan.notes.push(warning(
        `${path} does not join the data filesystem: ${problem}`,
      ));
      continue;
    }
    plan.joins.push(member);
    sizes.push(member.dataBytes);
    if (payload) {
      plan.notes.push(warning(
        `${path} joins a data filesystem, which is not new: its payload is ` +
          `erased, and not applied`,
      ));
    }
  }
}

/**
 * Why a device cannot hold a chunk of each kind beside the others: those of
 * metadata and system get a copy on each device, up to the fourth. Without that
 * room Linux (6.18) aborts a conversion, and the filesystem gets read-only.
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
 * the smaller ones, and then have no room for any write, whatever is free on
 * the others (fs/btrfs/volumes.c, btrfs_alloc_chunk()).
 *
 * @param spareBytes What has to be left.
 */
function whyNotMirrored(
  { members }: DataFilesystem,
  sizesBytes: number[],
  spareBytes = largestChunkBytes(sizesBytes),
): string | undefined {
  const { usedBytes } = newest(members).holds.btrfs;
  const isMirrored = !settledOf(members).unmirrored.includes("data");
  const totalBytes = sum(sizesBytes);
  const roomBytes = -spareBytes +
    (isMirrored
      ? Math.min(totalBytes / 2, totalBytes - Math.max(...sizesBytes))
      : totalBytes);
  if (usedBytes <= roomBytes) return undefined;
  return `${inMiB(usedBytes)} are used, and it could ` +
    `${isMirrored ? "mirror" : "hold"} only ` +
    `${inMiB(Math.max(0, roomBytes))}: use a larger disk, or delete ` +
    `something`;
}

const sizesOf = ({ members }: Pick<DataFilesystem, "members">) =>
  members.map(({ holds }) => holds.btrfs.deviceBytes);

/** A tenth of the filesystem, at most 1 GiB (fs/btrfs/volumes.c). */
const largestChunkBytes = (devicesBytes: number[]) =>
  Math.min(GiB, sum(devicesBytes) / 10);

const sum = (numbers: number[]) => numbers.reduce((a, b) => a + b, 0);

/** A volatile plan is a fallback where a data disk is expected. */
const outcomeOf = ({ mode, notes }: Plan) =>
  mode === "volatile" && notes.some(isError) ? "fallback" : mode;

/** The plan as `--dry-run` prints it: a line for each disk that changes. */
export function* describePlan(plan: Plan): Generator<string> {
  const { create, data } = plan;
  yield `${outcomeOf(plan)}: ${plan.reason}`;
  for (const repair of plan.repairs) {
    yield REPAIRS[repair.do].says(repair.device);
  }
  for (const { device, ...member } of create?.members ?? []) {
    const { path, kind, sizeBytes, signatures = [] } = device;
    const { swapBytes, swapPath, dataPath } = member;
    const old = describeSignatures(signatures);
    const size = `(${inMiB(sizeBytes)}${old && `, which holds ${old}`})`;
    const swap = `swap of ${inMiB(swapBytes)} on ${swapPath}, `;
    yield kind === "partition"
      ? `format ${path} ${size}`
      : `partition ${path} ${size}: ${swapPath ? swap : ""}data on ${dataPath}`;
  }
  if (create) {
    const nodes = create.members.map(({ dataPath }) => dataPath).join(", ");
    yield `create "${DATA}" on ${nodes}: data ${create.dataProfile}, ` +
      `metadata ${create.metadataProfile}`;
  }
  if (create?.payload) {
    const { path, writes } = create.payload;
    yield `write the payload of ${path}: ${writes.join(", ")}`;
  }
  if (data && plan.mode === "persistent") {
    yield `mount "${DATA}" (${data.fsid}) from ${pathsOf(data.members)}` +
      (data.missing > 0 ? `, degraded: ${data.missing} missing` : "");
  }
  for (const device of data?.stale ?? []) {
    yield `wipe ${device.path}, which missed writes, and rebuild it`;
  }
  if (data?.leaver) {
    yield data.missing > 0
      ? `leave ${data.leaver.path} out, make ${pathsOf(data.members)} hold ` +
        `all, then wipe ${data.leaver.path}`
      : `wipe ${data.leaver.path}, which has left the data filesystem`;
  }
  const moved = data && leavingMember(data, "move");
  const removed = data && leavingMember(data, "remove");
  const free = data && !data.leaver ? data.missing - data.stale.length : 0;
  const target = data && moveTarget(data, plan.joins);
  for (const [i, member] of plan.joins.entries()) {
    const { path } = member.device;
    yield member === target
      ? `move the data from ${moved!.path} to ${path}`
      : i < free
      ? `let ${path} take the place of a missing device`
      : `let ${path} join the data filesystem`;
  }
  const waits = data && whyNotMoved(data, plan.joins);
  if (waits) yield waits;
  if (removed) yield `remove ${removed.path} from the data filesystem`;
  if (plan.mode === "volatile" || plan.mode === "off") {
    yield `mount a tmpfs on /${DATA_MOUNT}`;
  }
}

// ---------------------------------------------------------------------------
// Before step 3: small repairs, and trying out what is to be formatted.
// ---------------------------------------------------------------------------

const REPAIRS = {
  "restore table": {
    says: ({ path, read }: BlockDevice) =>
      `restore the ${read.gpt?.lost} of ${path} from its partition table`,
    does: restoreTable,
  },
  "show partitions": {
    says: ({ path }: BlockDevice) =>
      `show the partitions of ${path} to the kernel`,
    does: (disk: BlockDevice) => showPartitions(disk, disk.read.gpt),
  },
  "restore superblock": {
    says: ({ path }: BlockDevice) =>
      `restore the superblock of ${path}, for its replace did not end`,
    async does({ path }: BlockDevice) {
      const at = BTRFS.superblockAt;
      const block = await readBytes(path, at, BTRFS.bytes);
      const whole = withBtrfsMagic(block);
      assert(
        parseSuperblock(whole)?.intact === true,
        `Cannot restore the superblock of ${path}: it has changed`,
      );
      await writeBytes(path, at, whole);
    },
  },
  "grow": {
    says: ({ path }: BlockDevice) => `grow ${path} to the end of its disk`,
    does: growPartition,
  },
  "make swap": {
    says: ({ path }: BlockDevice) => `make swap on ${path}`,
    does: ({ path }: BlockDevice) => makeSwap(path),
  },
  "clear magic": {
    says: ({ path }: BlockDevice) => `take the magic away from ${path}`,
    does: clearMagic,
  },
};

async function carryOut(repair: Repair): Promise<void> {
  const { says, does } = REPAIRS[repair.do];
  say("info", `Repair: ${says(repair.device)}`);
  assertSame(repair.device);
  await does(repair.device);
}

/** Restores what is lost; sfdisk falls back to the backup table by itself. */
async function restoreTable(disk: BlockDevice): Promise<void> {
  await restoreProtectiveMbr(disk);
  if (disk.read.gpt?.lost === "first sector") return;
  const dump = await ask(words`sfdisk --dump ${disk.path}`, {
    to: `read the backup partition table of ${disk.path}`,
  });
  const options = words`--wipe never --wipe-partitions never ${disk.path}`;
  await changeTable(disk.path, options, {
    to: `restore the partition table of ${disk.path}`,
    stdin: dump,
  });
}

/** Without a protective MBR neither the kernel nor sfdisk looks for a GPT. */
async function restoreProtectiveMbr(disk: BlockDevice): Promise<void> {
  const mbr = await readBytes(disk.path, 0, 512);
  if (isProtectiveMbr(mbr)) return;
  const sectors = Math.min(disk.sizeBytes / disk.sectorBytes - 1, 0xffffffff);
  mbr.fill(0, 446, 510); // boot code before it stays
  mbr.set([0, 0, 2, 0, MBR.protective, 0xff, 0xff, 0xff, 1], 446);
  viewOf(mbr).setUint32(446 + MBR.sectors, sectors, true);
  mbr.set([0x55, 0xaa], 510);
  await writeBytes(disk.path, 0, mbr);
}

/**
 * Lets sfdisk change the table of a disk that others may share. It writes LBA 0
 * anew at every change, with boot flag and disk signature zeroed: all but the
 * size of the protective partition is put back. sfdisk writes the backup table
 * first, so that a power cut leaves one whole table; the next boot restores the
 * other.
 */
async function changeTable(
  path: string,
  change: string[],
  options: { to: string; stdin?: string },
): Promise<void> {
  const why = whyTableStays((await targetAt(path)).device);
  assert(why === undefined, `Cannot ${options.to}: ${why}`);
  const before = await readBytes(path, 0, 512);
  await run(
    words`sfdisk --quiet --no-reread --no-tell-kernel ${change}`,
    options,
  );
  const after = await readBytes(path, 0, 512);
  const sizeIn = (mbr: Uint8Array) => {
    const at = MBR.entriesAt
      .find((at) => mbr[at + MBR.type] === MBR.protective) ?? 0;
    return mbr.subarray(at + MBR.sectors, at + MBR.sectors + 4);
  };
  if (isProtectiveMbr(before)) sizeIn(before).set(sizeIn(after));
  if (!Buffer.from(before).equals(after)) await writeBytes(path, 0, before);
}

/**
 * Tells the kernel what the table says, also of one that was made for other
 * sectors than the disk has now.
 */
async function showPartitions({ path, sectorBytes }: BlockDevice, gpt?: Gpt) {
  const size = gpt?.sectorBytes ?? sectorBytes;
  // Without a range, partx counts to the number of partitions only.
  const last = gpt?.partitions.at(-1)?.number;
  const range = last ? words`--nr 1:${last}` : [];
  await run(words`partx --update --sector-size ${size} ${range} ${path}`, {
    to: `show the partitions of ${path} to the kernel`,
  });
}

/** Lets a partition follow its enlarged disk; moves the backup table too. */
async function growPartition({ path, disk, number }: BlockDevice) {
  const whole = nodeOf(disk);
  await changeTable(whole, words`-N ${number} ${whole}`, {
    to: `grow ${path}`,
    stdin: ", +\n",
  });
  await run(words`partx --update --nr ${number} ${whole}`, {
    to: `tell the kernel the new size of ${path}`,
  });
}

/**
 * Takes the magic away, after the payload that it announces: a power cut before
 * leaves it, and the next boot takes it away from what holds data.
 */
async function clearMagic(device: BlockDevice): Promise<void> {
  if (device.payload && device.read.gpt?.lost) {
    // The table is lost because the text stands in its place. Were the text
    // gone first, the next boot would take the disk for a damaged one.
    const { gpt } = await readDevice(device);
    assert(
      gpt?.lost === undefined,
      `Cannot take the magic away from ${device.path}: its partition table ` +
        `could not be restored`,
    );
  }
  await erasePayload(device);
  await setMagic(device, DATA);
}

/**
 * Makes a device magic, or not magic any more. Only the lines of the header are
 * written: boot code and the protective MBR around them stay.
 *
 * @param name The name for a partition; {@linkcode MAGIC} makes a disk magic.
 * @param anyway Format it although other disks are in doubt. The name of a
 * partition cannot say that: its first lines do.
 */
async function setMagic(device: BlockDevice, name: string, anyway = false) {
  const { kind, path, disk, number } = device;
  const isPartition = kind === "partition";
  const sector = await readBytes(path, 0, 512);
  const was = parseStart(sector);
  const hasLines = isPartition ? was.anyway : was.header;
  if (hasLines || anyway || (!isPartition && name === MAGIC)) {
    const header = MAGIC + (anyway || was.anyway ? `\n${ANYWAY}\n` : "");
    const end = was.payloadPlace ? titleEnd(sector) : header.length;
    const lines = name === MAGIC ? Buffer.from(header) : new Uint8Array(end);
    await writeBytes(path, 0, lines);
  }
  if (!isPartition) return;
  const whole = nodeOf(disk);
  await changeTable(whole, ["--part-label", whole, `${number}`, name], {
    to: `name ${path} "${name}"`,
  });
}

async function readBytes(path: string, at: number, length: number) {
  return await withDevice(path, (read) => read(at, length));
}

/**
 * Writes a few bytes through to the medium. A child does it: a process that
 * waits for a mute device cannot be ended, and init waits for this one.
 */
async function writeBytes(path: string, at: number, bytes: Uint8Array) {
  // dd would make a file in /dev in the place of a device that has gone.
  assert(fs.existsSync(path), `Cannot write to ${path}: it is gone`);
  const { length } = bytes;
  const block = [4 * KiB, 512]
    .find((size) => at % size === 0 && length % size === 0) ?? length;
  await run(
    words`dd of=${path} bs=${block} count=${length / block} seek=${at / block}
      conv=notrunc,fsync status=none`,
    { to: `write ${bytes.length} bytes at ${at} of ${path}`, stdin: bytes },
  );
}

/**
 * Changes the first MiB of a device, step by step: each is on the medium before
 * the next begins. Only blocks that differ are written.
 */
async function changeStart(
  path: string,
  atBytes: number,
  steps: ((start: Uint8Array) => void)[],
): Promise<void> {
  const start = await readBytes(path, atBytes, MiB);
  const block = 4 * KiB;
  for (const change of steps) {
    const before = Buffer.from(start);
    change(start);
    const differs = (at: number) =>
      at < start.length &&
      before.compare(start, at, at + block, at, at + block) !== 0;
    for (let at = 0; at < start.length; at += block) {
      const from = at;
      while (differs(at)) at += block;
      const changed = start.subarray(from, at);
      if (at > from) await writeBytes(path, atBytes + from, changed);
    }
  }
}

/** Has the next read come from the disk: it may be written on another path. */
async function dropCache(path: string): Promise<void> {
  if (!findProgram("blockdev")) return;
  await run(words`blockdev --flushbufs ${path}`, {
    to: `drop what is cached of ${path}`,
  });
}

/**
 * Makes sure, right before what cannot be undone, that this is still the disk
 * that was looked at, and still magic or a member of the same filesystem. Its
 * name alone may be another disk's by then.
 */
async function confirm(device: BlockDevice): Promise<void> {
  const { path, disk, kind, read, magic } = device;
  const cannot = `Cannot use ${path}: it is not the disk any more that was ` +
    `looked at, or not magic any more (nothing was written to it)`;
  const { sequence, hardware } = readIdentity(disk);
  assert(sequence === device.sequence && hardware === device.hardware, cannot);
  const node = nodeOf(disk);
  await dropCache(node);
  if (!magic) {
    const fsid = (await superblockOf(path))?.fsid;
    return assert(fsid === read.btrfs?.fsid, cannot);
  }
  const whole = { name: disk, path: node, number: 0, entry: undefined };
  const again = await readDevice({ ...device, ...whole, kind: "disk" });
  const isStillMagic = kind === "disk"
    ? again.header
    : entryOf(device, again)?.name === MAGIC;
  assert(isStillMagic, cannot);
}

/** A device that a plan cannot use. */
interface Misfit {
  device: BlockDevice;
  why: string;
  /** It is another device of the plan on another path: nothing has failed. */
  isTwin?: boolean;
}

/** Finds a device that another has open: wipefs(8) opens it exclusively. */
async function findBusy(devices: BlockDevice[]): Promise<Misfit | undefined> {
  const tried = devices.filter(({ entry }) => !entry).map((device) =>
    run(words`wipefs --quiet --no-act --offset 0x7 ${device.path}`, {
      to: `have ${device.path} alone (is it mounted in a container?)`,
    }).then(() => undefined, (error) => ({ device, why: messageOf(error) }))
  );
  return (await Promise.all(tried)).find(Boolean);
}

/**
 * Finds a disk that is there twice, on two paths. Serial numbers do not prove it
 * (they may be missing, or all the same), nor do contents (of a copy). A token
 * does that is written through one node and read through another. It goes into
 * the first MiB of a magic device, where neither a table nor a filesystem is; a
 * power cut leaves it there, which harms nothing. Otherwise it is taken back.
 *
 * @param devices Magic devices.
 * @param members Devices in use.
 * @returns The later of two paths; undefined when all are different disks.
 */
async function findTwin(devices: BlockDevice[], members: BlockDevice[]) {
  const disks = [...new Set([...members, ...devices].map(({ disk }) => disk))];
  if (disks.length < 2) return undefined;
  const bytes = 4 * KiB;
  const rooms = Math.floor((MiB - COPY.endBytes) / bytes) - 1;
  const places = await allOf(devices.map(async (device, i) => {
    const node = nodeOf(device.disk);
    // Behind the copy of a payload, which must survive a power cut.
    const room = Math.floor((device.startBytes + MiB) / bytes) - 1 - i % rooms;
    const token = Buffer.alloc(bytes, `${crypto.randomUUID()}\n`);
    const before = await readBytes(node, bytes * room, bytes);
    return { device, node, at: bytes * room, token, before };
  }));
  const write = (which: "token" | "before") =>
    allOf(places.map((p) => writeBytes(p.node, p.at, p[which])));
  try {
    await write("token");
    await allOf(disks.map((disk) => dropCache(nodeOf(disk))));
    // Two paths may share a room: then the token of either is there.
    for (const { device, at, token } of places) {
      for (const disk of disks.filter((disk) => disk !== device.disk)) {
        const found = await readBytes(nodeOf(disk), at, bytes);
        if (!token.equals(found)) continue;
        const [first, later] = disks
          .filter((other) => other === disk || other === device.disk);
        const why = `it is the same disk as ${nodeOf(first)}, on another path`;
        const twin = devices.find((other) => other.disk === later) ?? device;
        return { device: twin, why, isTwin: true };
      }
    }
  } finally {
    await write("before");
  }
}

/**
 * Tries out on sparse files of the same sizes whether mkfs.btrfs can make this
 * filesystem, unless all members are surely large enough. After others were left
 * out it is always tried: a failure without them was not for their size.
 *
 * @returns The device that is too small, or undefined when all is well.
 * @throws {Error} When mkfs.btrfs fails for another reason, in its own words.
 */
async function rehearse(
  create: NewFilesystem,
  othersLeftOut: boolean,
  root: string,
): Promise<Misfit | undefined> {
  const { members } = create;
  const smallest = members.reduce((a, b) => b.dataBytes < a.dataBytes ? b : a);
  const fits = members.length === 1 || smallest.dataBytes >= SURELY_FITS_BYTES;
  if (fits && !othersLeftOut) return undefined;
  const { run: parent } = pathsBelow(root);
  fs.mkdirSync(parent, { recursive: true });
  const directory = fs.mkdtempSync(join(parent, "rehearsal-"));
  const sizesBytes = members.map(({ dataBytes }) => dataBytes);
  const rehearseWith = async (leastBytes: number) => {
    const files = sizesBytes.map((sizeBytes, index) => {
      const file = join(directory, `${index}`);
      fs.writeFileSync(file, "");
      fs.truncateSync(file, Math.max(sizeBytes, leastBytes));
      return file;
    });
    await run(mkfs(create, files), {
      to: `rehearse mkfs.btrfs for ${pathsOf(devicesOf(members))}`,
    });
  };
  try {
    await rehearseWith(0);
  } catch (error) {
    if (error instanceof TimeoutError) throw error;
    // With large files only another reason can make it fail, and is thrown.
    await rehearseWith(Math.max(...sizesBytes, GiB));
    const { device } = smallest;
    const size = inMiB(device.sizeBytes);
    return { device, why: `it is too small beside the others (${size})` };
  } finally {
    fs.rmSync(directory, { recursive: true });
  }
}

/** Without --force it would refuse a device that held ext4. */
function mkfs(create: NewFilesystem, nodes: string[]): string[] {
  return words`mkfs.btrfs --quiet --force --label ${UNFINISHED}
    --data ${create.dataProfile} --metadata ${create.metadataProfile} ${nodes}`;
}

// ---------------------------------------------------------------------------
// Steps 3 and 4: partition, wait for the device nodes.
// ---------------------------------------------------------------------------

/**
 * Writes the new tables. The header stays at offset 0 through all of it: after a
 * power cut the disk is still magic, and the next boot begins anew.
 */
async function partition(create: NewFilesystem): Promise<void> {
  const devices = devicesOf(create.members);
  needPrograms(devices);
  await allOf(devices.map(confirm));
  await allOf(devices.map(copyPayload));
  await allOf(create.members.map(partitionDisk));
}

/**
 * Copies the payload of a disk to where it waits until the filesystem is
 * complete. One sector, the first, then says that the copy counts: a power cut
 * leaves either the original or a whole copy. The original goes last, and the
 * table comes in its place.
 */
async function copyPayload(device: BlockDevice): Promise<void> {
  const { path, payload } = device;
  if (!payload || payload.place === "partition") return;
  if (payload.place === "original") {
    const text = await loadPayload(payload);
    const { titleBytes, at } = COPY;
    await changeStart(path, 0, [
      (start) => start.set(formatCopyTitle(text), at),
      (start) => {
        start.fill(0, at + titleBytes, COPY.endBytes);
        start.set(text, at + titleBytes);
      },
    ]);
    payload.place = "copy";
    assert(
      Buffer.from(text).equals(await loadPayload(payload)),
      `Cannot read the copy of a payload back from ${path}: the disk may be ` +
        `broken`,
    );
    await changeStart(path, 0, [
      (start) => setFirstLines(start, PAYLOAD_TEXT.copied),
    ]);
  }
  await changeStart(path, 0, [(start) => start.fill(0, 512, COPY.at)]);
}

/** The text of a payload, if it is still the one that was planned with. */
async function loadPayload(found: FoundPayload): Promise<Uint8Array> {
  const text = await readPayload(found);
  const { entries, endBytes } = parsePayload(text);
  const names = entries.map(({ name }) => name);
  assert(
    names.join() === found.writes.join(),
    `Cannot use the payload of ${found.path}: it has changed meanwhile`,
  );
  return text.subarray(0, endBytes);
}

/** Makes the first sector hold the lines of the header, then zeros. */
function setFirstLines(start: Uint8Array, title: string): void {
  const lines = [MAGIC, ...parseStart(start).anyway ? [ANYWAY] : [], title, ""];
  start.fill(0, 0, 512);
  start.set(new TextEncoder().encode(lines.join("\n")));
}

/** Where the first sector's lines end, the last of which is the title. */
function titleEnd(sector: Uint8Array): number {
  const bytes = Buffer.from(sector.subarray(0, MBR.codeBytes));
  const newline = bytes.indexOf("\n", bytes.indexOf(PAYLOAD));
  return newline < 0 ? bytes.length : newline + 1;
}

/**
 * Leaves zeros where a payload and its copy are, but for its title: that goes
 * with the magic, so that a power cut before leaves what no boot formats.
 */
async function erasePayload({ path, payload }: BlockDevice): Promise<void> {
  if (payload?.place === "partition") {
    await changeStart(payload.path, payload.atBytes, [(start) => {
      if (!isPayloadText(start)) return;
      clearText(start, 0);
      start.fill(0, 0, 4 * KiB);
    }]);
  } else if (payload) await changeStart(path, 0, clearing(payload.place));
}

/**
 * The steps that erase a payload from the start of a disk. The title of the copy
 * goes last: after a power cut it tells that there is something to erase.
 */
const clearing = (place: "original" | "copy") => [
  (start: Uint8Array) => {
    if (hasCopy(start)) start.fill(0, COPY.at + COPY.titleBytes, COPY.endBytes);
  },
  (start: Uint8Array) => {
    if (hasCopy(start)) start.fill(0, COPY.at, COPY.at + COPY.titleBytes);
    clearText(start, titleEnd(start));
    // This area was made ours when the payload was copied.
    if (place === "copy") start.fill(0, GPT.largestEndBytes, COPY.at);
  },
];

const isPayloadText = (start: Uint8Array) =>
  [MAGIC, PAYLOAD, "-- "].some((line) => text(start, 0, line.length) === line);

const hasCopy = (start: Uint8Array) =>
  text(start, COPY.at, COPY.title.length) === COPY.title;

/**
 * Zeros the text of a payload, sector by sector. A sector with a NUL is not
 * text: a table was written there. Of an MBR only the boot code is text.
 */
function clearText(start: Uint8Array, from: number): void {
  const room = Buffer.from(start.buffer, start.byteOffset, start.length)
    .subarray(0, PAYLOAD_TEXT.roomBytes);
  const marker = room.indexOf(`\n${PAYLOAD_TEXT.end}`);
  const behind = marker + 1 + PAYLOAD_TEXT.end.length;
  const [newline] = /^(\r?\n)?/
    .exec(room.toString("latin1", behind, behind + 2))!;
  const nul = room.indexOf(0);
  const end = marker >= 0
    ? behind + newline.length
    : nul >= 0
    ? nul
    : room.length;
  for (let at = 0; at < end; at += 512) {
    const isMbr = at === 0 && mbrTypes(room).length > 0;
    const part = room.subarray(
      Math.max(at, from),
      Math.min(end, isMbr ? MBR.codeBytes : at + 512),
    );
    if (at === 0 || !part.includes(0)) part.fill(0);
  }
}

/** Refuses to wipe anything for a filesystem that then could not be made. */
function needPrograms(devices: BlockDevice[]): void {
  const missing = ["wipefs", "sfdisk", "partx", "mkfs.btrfs", "btrfs", "mount"]
    .filter((program) => !findProgram(program));
  assert(
    missing.length === 0,
    `Cannot format ${pathsOf(devices)}: "${missing[0]}" is not installed ` +
      `(nothing was changed)`,
  );
}

async function partitionDisk(member: NewMember): Promise<void> {
  const { device, swapBytes, dataPath } = member;
  if (dataPath === device.path) return; // it is used as it is
  say("info", `Partitioning ${device.path} (${inMiB(device.sizeBytes)})`);
  await deleteOldPartitions(device);
  // An old whole-disk signature (Btrfs at 64 KiB) would outlive a new table.
  if (device.signatures?.length !== 0) {
    await run(words`wipefs --quiet --all ${device.path}`, {
      to: `erase the old signatures on ${device.path}`,
    });
  }
  const swap = `size=${swapBytes / MiB}MiB, type=swap, name=${SWAP}\n`;
  // --wipe never: the header has to survive until the filesystem is complete.
  // --wipe-partitions always: where a new partition starts at an old place, an
  // old filesystem must not come back to life. sfdisk wipes it, with an fsync,
  // before it writes the table.
  await run(
    words`sfdisk --quiet --no-tell-kernel
      --wipe never --wipe-partitions always ${device.path}`,
    {
      to: `write a partition table to ${device.path}`,
      stdin: `label: gpt\nstart=1MiB, ${swapBytes > 0 ? swap : ""}` +
        `type=linux, name=${DATA}\n`,
    },
  );
}

/** The exit status of partx(8) is no proof: the kernel is asked. */
async function deleteOldPartitions({ path, disk }: BlockDevice): Promise<void> {
  const old = () =>
    listDirectory(`/sys/block/${disk}`)
      .filter((name) => partitionNumber(disk, name)).map(nodeOf).join(", ");
  const areGone = async () => {
    if (!old()) return true;
    await run(words`partx --delete ${path}`, {
      to: `delete the old partitions of ${path}`,
      accept: [0, 1],
    });
    return !old();
  };
  if (await areGone()) return;
  say("info", `Waiting for ${old()}, which is in use`);
  assert(
    await becomesTrue(areGone, TIMEOUT.nodeMs, 200),
    `Cannot partition ${path}: ${old()} is in use`,
  );
}

/** Shows new partitions to the kernel and waits for their device nodes. */
async function waitForPartitions(members: NewMember[]): Promise<void> {
  await allOf(members.map(async ({ device, swapPath, dataPath }) => {
    if (dataPath === device.path) return;
    await showPartitions(device);
    await waitForNode(dataPath);
    if (swapPath) await waitForNode(swapPath);
  }));
}

async function waitForNode(path: string): Promise<void> {
  assert(
    await becomesTrue(() => isOwnNode(path), TIMEOUT.nodeMs),
    `Cannot find ${path}: its node did not appear in ` +
      `${TIMEOUT.nodeMs / 1000} s (is /dev a devtmpfs?)`,
  );
}

// ---------------------------------------------------------------------------
// Step 5: make swap, create the data filesystem.
// ---------------------------------------------------------------------------

/**
 * Makes swap and the data filesystem with all that a boot mounts. Its label
 * commits it: a power cut before leaves disks that are still magic, one after
 * leaves a complete data filesystem, even if only one member has the label yet
 * ({@linkcode findDataFilesystems}); the next boot takes the magic away. The top
 * level stays mounted until the rest is, because opening the filesystem once
 * more takes longer.
 */
async function createDataFilesystem(create: NewFilesystem, paths: Paths) {
  const { members, dataProfile, metadataProfile } = create;
  const nodes = members.map((member) => member.dataPath);
  const shown = nodes.join(", ");
  say(
    "info",
    `Creating "${DATA}" on ${shown}: data ${dataProfile}, metadata ` +
      metadataProfile,
  );
  await allOf([
    runDiscarding(
      (options) => mkfs(create, [...options, ...nodes]),
      `create the data filesystem on ${shown}`,
    ),
    ...members.map(makeSwapOf),
  ]);
  const top = paths.topLevel;
  const record = async () => {
    const superblocks = await verifySuperblocks(nodes, UNFINISHED);
    const made = members.map((member, i) => memberOf(member, superblocks[i]));
    const settled = { devices: made.length, unmirrored: [] };
    assertRecorded(
      await recordMembers(made, superblocks[0].fsid, { settled }),
    );
    return made;
  };
  const [made] = await allOf([
    record(),
    mountTopLevel(nodes, [], paths).then(() => createSubvolumes(top, nodes)),
  ]);
  const state = join(top, SUBVOLUMES.state);
  if (create.payload) {
    await makeUppers(OVERLAYS, state, paths, create.payload);
  }
  await allOf([
    makeUppers(OVERLAYS, state, paths),
    // It commits a transaction (fs/btrfs/ioctl.c, btrfs_ioctl_set_fslabel()),
    // and with it the subvolumes: the label never comes without them.
    run(words`btrfs filesystem label ${top} ${DATA}`, {
      to: `label the data filesystem on ${shown}`,
    }),
  ]);
  await verifySuperblocks(nodes, DATA);
  return sortOutMembers(made);
}

/**
 * Writes a payload into an overlay of the whole root: the system will see the
 * same tree. Each file is on the medium before it takes its place, and the
 * directories come last.
 */
async function applyPayload(
  found: FoundPayload,
  merged: string,
  state: string,
) {
  const text = await loadPayload(found);
  const directories = new Set<string>();
  for (const entry of parsePayload(text).entries) {
    applyEntry(entry, merged, directories);
  }
  for (const directory of directories) syncFile(directory);
  text.fill(0); // not to be found in the memory of this process
  const note = { applied: new Date().toISOString(), writes: found.writes };
  const file = join(state, APPLIED);
  fs.writeFileSync(file, JSON.stringify(note) + "\n");
  syncFile(file);
  say("info", `The payload of ${found.path} is written`);
}

/** Writes one file, or one password, into a tree that nobody else changes. */
export function applyEntry(
  { line, name, user, contents }: PayloadEntry,
  merged: string,
  directories: Set<string>,
): void {
  const isSecret = name.split("/").includes(".ssh");
  const make = (directory: string) => {
    const { uid, gid } = fs.lstatSync(dirname(directory));
    fs.mkdirSync(directory);
    const isIn = isSecret && `${directory}/`.includes("/.ssh/");
    fs.chmodSync(directory, isIn ? 0o700 : 0o755);
    fs.lchownSync(directory, uid, gid);
  };
  try {
    const parts = (user ? SHADOW : name).split("/");
    const { path, stat } = walk(merged, parts, name, make);
    const { uid, gid } = stat && user ? stat : fs.lstatSync(dirname(path));
    const isScript = contents[0] === 0x23 && contents[1] === 0x21; // #!
    const mode = user
      ? stat?.mode ?? 0
      : isSecret
      ? 0o600
      : name.startsWith("etc/sudoers.d/")
      ? 0o440
      : isScript
      ? 0o755
      : 0o644;
    const bytes = user ? setPassword(path, user, contents) : contents;
    const temporary = join(merged, "payload.new"); // outside of what is named
    replaceFile(path, bytes, { mode, uid, gid }, temporary);
    for (let at = dirname(path); at !== merged; at = dirname(at)) {
      directories.add(at);
    }
  } catch (error) {
    throw new Error(
      `Cannot write line ${line} of a payload, "${name}": ${messageOf(error)}`,
    );
  }
}

/** `/etc/shadow` with another password for a user (shadow(5)). */
function setPassword(path: string, user: string, contents: Uint8Array) {
  const lines = fs.readFileSync(path, "latin1").split("\n");
  const index = findUser(lines, user);
  assert(index >= 0, `there is no user "${user}"`);
  const fields = lines[index].split(":");
  fields[1] = Buffer.from(contents).toString("latin1").trim();
  lines[index] = fields.join(":");
  return Buffer.from(lines.join("\n"), "latin1");
}

function syncFile(path: string): void {
  const file = fs.openSync(path, "r");
  try {
    fs.fsyncSync(file);
  } finally {
    fs.closeSync(file);
  }
}

function assertRecorded(failed: Member[]): void {
  assert(
    failed.length === 0,
    `Cannot write a record to ${pathsOf(failed)}: the disk may be broken`,
  );
}

/** The data partition of a new member, which has no record yet. */
function memberOf({ device, dataPath }: NewMember, btrfs: Superblock): Member {
  return {
    ...device,
    path: dataPath,
    name: nameOf(dataPath),
    read: { ...device.read, btrfs, recordable: true },
    holds: { kind: "member", btrfs },
  };
}

/** The swap areas of new members. */
function swapOf(members: NewMember[]): BlockDevice[] {
  return members.flatMap(({ device, swapPath }) =>
    swapPath ? [{ ...device, path: swapPath }] : []
  );
}

/** Without swap the data persist all the same; the next boot tries again. */
async function makeSwapOf(member: NewMember): Promise<void> {
  const { swapPath } = member;
  member.swapPath = undefined; // until it is there
  await attempt(async () => {
    if (swapPath) await makeSwap(swapPath);
    member.swapPath = swapPath;
  });
}

async function makeSwap(path: string): Promise<void> {
  await run(words`mkswap --label ${SWAP} ${path}`, {
    to: `make swap on ${path}`,
  });
  assert(
    parseSwapLabel(await readBytes(path, 0, 64 * KiB)) === SWAP,
    `Cannot find swap on ${path} after making it`,
  );
}

/** Creates the subvolumes. */
async function createSubvolumes(top: string, nodes: string[]): Promise<void> {
  const [data, state, snapshots] = Object.values(SUBVOLUMES)
    .map((name) => join(top, name));
  const createState = async () => {
    await createSubvolume(state, nodes);
    // What is made in it from now on inherits that (btrfs-property(8)).
    await run(words`btrfs property set -t inode ${state} compression zstd`, {
      to: `compress ${SUBVOLUMES.state} on ${nodes.join(", ")}`,
    });
    const nested = Object.entries(NESTED).map(async ([name, mode]) => {
      await createSubvolume(join(state, name), nodes);
      fs.chmodSync(join(state, name), mode);
    });
    await allOf(nested);
  };
  await allOf([
    createState(),
    createSubvolume(data, nodes),
    createSubvolume(snapshots, nodes),
  ]);
  for (const name of [STATE, SNAPSHOTS]) fs.mkdirSync(join(data, name));
}

async function createSubvolume(path: string, nodes: string[]): Promise<void> {
  const name = `${basename(path)} on ${nodes.join(", ")}`;
  await run(words`btrfs subvolume create ${path}`, {
    to: `create the subvolume ${name}`,
  });
  assert(
    isSubvolume(path),
    `Cannot find the subvolume ${name} after making it`,
  );
}

/** Reads back what mkfs or the label did: one member on each device. */
async function verifySuperblocks(nodes: string[], label: string) {
  const found = await allOf(nodes.map(superblockOf));
  return found.map((superblock, i) => {
    const isMember = superblock?.intact && superblock.label === label &&
      superblock.fsid === found[0]?.fsid && superblock.devid === i + 1 &&
      superblock.numDevices === nodes.length;
    if (isMember) return superblock;
    throw new Error(
      `Cannot find a Btrfs of ${nodes.length} device(s) labelled "${label}" ` +
        `on ${nodes[i]} after making it: the disk may be broken`,
    );
  });
}

/**
 * Reads the superblock of a device, mounted or not: Btrfs writes it through the
 * page cache on purpose (fs/btrfs/disk-io.c, write_dev_supers()).
 */
async function superblockOf(path: string): Promise<Superblock | undefined> {
  const { superblockAt, bytes } = BTRFS;
  return parseSuperblock(await readBytes(path, superblockAt, bytes));
}

// ---------------------------------------------------------------------------
// Step 6: mount the data filesystem, or a tmpfs.
// ---------------------------------------------------------------------------

/**
 * Mounts data, state and snapshots, and with them the overlays whose layers are
 * there, by one mount(8) for all. What is not mounted afterwards is mounted one
 * by one, by the rules for older disks.
 *
 * @param isNew It was just made: it has its records, and nothing is missing.
 */
async function mountDataFilesystem(
  data: DataFilesystem,
  isNew: boolean,
  paths: Paths,
): Promise<void> {
  if (isNew) fs.mkdirSync(paths.data, { recursive: true });
  else await mountMembers(data, paths);
  const mounts = readMounts();
  const wanted = (["data", "state", "snapshots"] as const)
    .filter((which) => !mountedOn(paths[which], mounts));
  const nodes = data.members.map(({ path }) => path);
  const subvolumes = wanted.map((which) => {
    const options = btrfsOptions(nodes, [`subvol=/${SUBVOLUMES[which]}`]);
    return [nodes[0], paths[which], "btrfs", options];
  });
  await mountFromTable(
    [...subvolumes, ...overlayEntries(withoutOverlay(paths), paths)],
    paths,
    "debug",
    isNew ? [] : wanted.map((which) => paths[which]),
  );
  await mountMembers(data, paths);
  for (const which of ["state", "snapshots"] as const) {
    const isFree = !mountedOn(paths[which]) && !isSubvolume(paths[which]) &&
      listDirectory(paths[which]).length === 0; // nothing covers data
    const left = data.members.map(({ path }) => path);
    if (isFree) await mountSubvolume(which, left, [], paths);
  }
  for (const which of ["state", "snapshots", "docker", "containerd"] as const) {
    try {
      refuseReadOnly(paths[which]);
    } catch (error) {
      if (which === "state") throw error; // the system runs without the others
      say("warning", messageOf(error));
    }
  }
}

/**
 * Asks first: mkdir(2) waits for a write also where the directory is there. A
 * link may lead to a disk that is mounted later.
 */
function makeDirectory(path: string, mode?: number): void {
  if (!whatIsAt(path)) fs.mkdirSync(path, { recursive: true, mode });
}

/** Mounts the members at the data mount point, unless something is there. */
async function mountMembers(data: DataFilesystem, paths: Paths) {
  if (mountedOn(paths.data)) return;
  for (const member of data.members) {
    await waitForNode(member.path)
      .catch((error) => dropMembers([member], messageOf(error), data));
  }
  const { leaver, members } = data;
  await forget(
    [...data.conflicting, ...data.stale, ...leaver ? [leaver] : []],
  );
  fs.mkdirSync(paths.data, { recursive: true });
  const mountWith = async (devices: Member[], degraded: boolean) => {
    const settled = settledOf(devices);
    if (degraded) settled.devices = 0;
    const dead = await recordMembers(devices, data.fsid, { settled });
    if (dead.length > 0) {
      dropMembers(dead, `${pathsOf(dead)} cannot be written to`, data);
      await mountWith(devices.filter((d) => !dead.includes(d)), true);
    } else {
      const options = degraded ? ["degraded"] : [];
      const nodes = devices.map(({ path }) => path);
      await mountSubvolume("data", nodes, options, paths);
    }
  };
  const target = data.replaceTarget ? [data.replaceTarget] : [];
  // An interrupted replace goes on if its target is named. Its source may still
  // be there: the kernel then mounts only degraded, though nothing is missing.
  const attempts = [() => mountWith([...data.members, ...target], true)];
  if (data.missing === 0) {
    attempts.unshift(() => mountWith(data.members, false));
  }
  if (target.length > 0) {
    // No replace has this target any more, or yet: a job releases it later, or
    // begins another replace.
    attempts.push(() =>
      forget(target).then(() => mountWith(data.members, true))
    );
  }
  if (
    data.missing > 0 && leaver && holding("member")(leaver) &&
    !members.some((member) => isBehind(leaver, member))
  ) { // nothing was written without it, so that it has all
    attempts.push(() => {
      data.members = [...members, leaver];
      data.missing = 0;
      data.leaver = undefined;
      return mountWith(data.members, false);
    });
  }
  try {
    await firstThatWorks(attempts);
  } catch (error) {
    if (error instanceof TimeoutError) throw error;
    if (!await isLogBroken(data, paths)) throw error;
    throw new Error(
      `${messageOf(error)} (its log tree is broken, and all else is whole: ` +
        `"btrfs rescue zero-log ${data.members[0].path}" and a reboot; that ` +
        `loses what programs wrote with fsync in the last seconds before the ` +
        `power went)`,
    );
  }
  assert(
    !mountedOn(paths.data)?.superOptions.includes("ro"),
    `Cannot write to the data filesystem on ${pathsOf(data.members)}: the ` +
      `kernel mounted it read-only (see dmesg and "btrfs check")`,
  );
  refuseReadOnly(paths.data);
  await growFilesystem(data.members, paths);
}

/** Would the members mount, if only to be read, but for the log tree? */
async function isLogBroken({ members, missing }: DataFilesystem, paths: Paths) {
  if (!members.some(({ holds }) => holds.btrfs.hasLog)) return false;
  const degraded = missing > 0 ? ["degraded"] : [];
  const options = ["ro", "rescue=nologreplay", ...degraded];
  try {
    await mountTopLevel(members.map(({ path }) => path), options, paths);
    await unmount(paths.topLevel);
    return true;
  } catch (error) {
    say("debug", messageOf(error));
    return false;
  }
}

/** Takes members out of the plan, which goes on without them. */
function dropMembers(devices: Member[], why: string, data: DataFilesystem) {
  say("warning", `${why}: going on without`);
  data.members = data.members.filter((member) => !devices.includes(member));
  data.missing += devices.length;
  assert(data.members.length > 0, "No device of the data filesystem is left");
}

/** Unregisters scanned devices: the kernel assembles whatever it has scanned. */
async function forget(devices: BlockDevice[]): Promise<void> {
  if (devices.length === 0) return;
  await run(words`btrfs device scan --forget`, {
    to: `make the kernel forget ${pathsOf(devices)}`,
  });
}

/**
 * Writes a record to each member that is present, before a read-write mount.
 * Called with all members that will be written to, and no others. Each record
 * goes to the older of two slots: a power cut leaves the other one whole.
 *
 * @param leaving What a person asked for, null to forget that.
 * @returns The members that could not be written to. Then nobody is to remember
 * this mount, which one of them does not know: it is tried anew.
 * @throws {Error} When none could.
 */
async function recordMembers(
  members: Member[],
  fsid: string,
  { settled = settledOf(members), leaving = leavingOf(members) ?? null }: {
    settled?: Settled;
    leaving?: Leaving | null;
  } = {},
) {
  const present = members
    .map(({ holds }) => holds.record?.member ?? crypto.randomUUID());
  const mount = crypto.randomUUID().slice(0, 8);
  const epoch = Math.max(...members.map(epochOf)) + 1;
  const machine = readMachine();
  const seconds = Math.max(
    Math.floor(Date.now() / 1000),
    ...members.map(({ holds }) => 1 + (holds.record?.seconds ?? 0)),
  );
  const common = { epoch, present, settled, machine, seconds };
  const failed: Member[] = [];
  const written = new Map<Member, MemberRecord>();
  await Promise.all(members.map(async (device, i) => {
    const { path, read, hardware, holds } = device;
    if (!read.recordable) {
      say(
        "warning",
        `${path} holds something at 56 KiB, a boot loader perhaps: it gets ` +
          `no record, so a copy of it, or a disk that was away, is not noticed`,
      );
      return;
    }
    const mounts = [...holds.record?.mounts ?? [], mount];
    const record: MemberRecord = {
      fsid,
      member: present[i],
      ...common,
      ...absentSince(device, present),
      leaving: leaving ?? undefined,
      hardware,
      mounts: mounts.slice(-RECORD.remembered),
    };
    const slot = RECORD.slotsAt[epoch % RECORD.slotsAt.length];
    try {
      assertSame(device);
      await writeBytes(path, slot, formatRecord(record));
      written.set(device, record);
    } catch (error) {
      failed.push(device);
      if (failed.length === members.length) throw error;
      say("warning", messageOf(error));
    }
  }));
  if (failed.length > 0) return failed;
  for (const [{ holds }, record] of written) holds.record = record;
  return [];
}

/**
 * What the last record says of the profiles. Records of version 1.0 do not: it
 * converted all, and may have been interrupted. A filesystem of several devices
 * without a record was made by a person, as that person wants it.
 */
function settledOf(members: Pick<Member, "holds">[]): Settled {
  const [last] = members.map(({ holds }) => holds.record)
    .filter((record) => record !== undefined)
    .sort((a, b) => b.epoch - a.epoch);
  if (last) return { ...last.settled ?? UNSETTLED };
  const devices = Math.max(...members.map((m) => m.holds.btrfs.numDevices));
  return { devices, unmirrored: devices > 1 ? CHUNKS : [] };
}

/** Types of chunks; those of metadata are also for system chunks. */
const CHUNKS: ("data" | "metadata")[] = ["data", "metadata"];

/** Members that are absent: the generation and mount when each was last there. */
function absentSince({ holds: { record, btrfs } }: Member, present: string[]) {
  if (!record) return { absent: {}, lastSeen: {} };
  const update = <T>(old: Record<string, T>, now: T): Record<string, T> => {
    const seen = record.present.map((id): [string, T] => [id, now]);
    const gone = [...Object.entries(old), ...seen]
      .filter(([id]) => !present.includes(id));
    return Object.fromEntries(gone.slice(-RECORD.remembered));
  };
  const mount = record.mounts?.at(-1);
  return {
    absent: update(record.absent, btrfs.generation),
    lastSeen: mount ? update(record.lastSeen ?? {}, mount) : {},
  };
}

/** Tries one after the other; throws the first failure if all of them fail. */
async function firstThatWorks(attempts: (() => Promise<unknown>)[]) {
  const failures: unknown[] = [];
  for (const attempt of attempts) {
    try {
      return void await attempt();
    } catch (error) {
      failures.push(error);
      if (error instanceof TimeoutError) throw error;
      if (failures.length < attempts.length) say("warning", messageOf(error));
    }
  }
  throw failures[0];
}

/** Lets the filesystem follow partitions that are larger than it knows. */
async function growFilesystem(members: Member[], paths: Paths): Promise<void> {
  for (const { path, read, holds: { btrfs } } of members) {
    const sizeBytes = readSysfsBytes(nameOf(path), "size");
    if (sizeBytes - btrfs.deviceBytes < MiB) continue;
    if (!read.plain && !readSysfs(nameOf(path), "partition")) {
      say(
        "warning",
        `${path} is larger than its filesystem, but holds something else as ` +
          `well: it is not grown (btrfs filesystem resize would)`,
      );
      continue;
    }
    try {
      await run(
        words`btrfs filesystem resize ${btrfs.devid}:max ${paths.data}`,
        { to: `grow the data filesystem on ${path}` },
      );
    } catch (error) {
      if (error instanceof TimeoutError) throw error;
      sayError(error);
    }
  }
}

/**
 * Mounts a subvolume by its name, or the plain directory that stands in its
 * place (a restored backup). Where there is neither, it makes the subvolume; but
 * the data may be the top level itself, on a disk that keeps its state there.
 */
async function mountSubvolume(
  which: keyof typeof SUBVOLUMES,
  nodes: string[],
  options: string[],
  paths: Paths,
): Promise<void> {
  const target = paths[which];
  const name = SUBVOLUMES[which];
  const subvolume = [`subvol=/${name}`, ...options];
  try {
    fs.mkdirSync(target, { recursive: true });
  } catch (error) {
    const root = mountedOn(paths.data)?.root;
    if (root === undefined || !/^EEXIST/.test(messageOf(error))) throw error;
    throw noDirectory(join(root, basename(target)), nodes);
  }
  try {
    return await mountBtrfs(nodes, subvolume, target);
  } catch (error) {
    if (error instanceof TimeoutError) throw error;
    // Is it the filesystem, or only the subvolume?
    await mountTopLevel(nodes, options, paths).catch((again) => {
      say("debug", messageOf(again));
      throw error;
    });
    const path = join(paths.topLevel, name);
    try {
      const there = whatIsAt(path);
      if (there && !there.isDirectory()) throw noDirectory(`/${name}`, nodes);
      if (there && isSubvolume(path)) throw error;
      if (there) return await bind(path, target);
      const isTop = fs.existsSync(join(paths.topLevel, STATE));
      if (which === "data" && isTop) subvolume[0] = "subvolid=5";
      else await createSubvolume(path, nodes);
    } finally {
      await unmount(paths.topLevel);
    }
  }
  await mountBtrfs(nodes, subvolume, target);
}

const noDirectory = (path: string, nodes: string[]) =>
  new Error(
    `"${path}" in the data filesystem on ${nodes.join(", ")} is neither a ` +
      `subvolume nor a directory: it is left as it is; log in, rename it ` +
      `("mkdir /run/top; mount -o subvolid=5 ${nodes[0]} /run/top; ` +
      `mv /run/top${path} /run/top${path}.old"), reboot`,
  );

/**
 * Refuses directories that take no file: in a read-only subvolume, such as a
 * snapshot, which a read-write mount does not show; or where a snapshot has only
 * the name of a subvolume (inode 2, BTRFS_EMPTY_SUBVOL_DIR_OBJECTID).
 *
 * @throws {Error} That names the subvolume and how to make it writable.
 */
function refuseReadOnly(...directories: string[]): void {
  const problemOf = (path: string) => {
    if (orUndefined(() => fs.statSync(path).ino) === 2) return "ENOENT";
    try {
      fs.accessSync(path, fs.constants.W_OK);
    } catch (error) {
      return /^(EROFS|EPERM)/.exec(messageOf(error))?.[0];
    }
  };
  let path = directories.find(problemOf);
  if (path === undefined) return;
  const problem = problemOf(path);
  const isItself = (path: string) =>
    problem !== "EROFS" || isSubvolume(path) || mountedOn(path);
  while (!isItself(path)) path = dirname(path);
  let top = path;
  while (!mountedOn(top)) top = dirname(top);
  const { root, source: node } = mountedOn(top)!;
  const inside = join(root, path.slice(top.length));
  const [why, cure] = problem === "EPERM"
    ? [`${inside} on ${node} is immutable`, `chattr -i /run/top${inside}"`]
    : problem === "EROFS"
    ? [
      `the subvolume ${inside} on ${node} is read-only, as a snapshot is`,
      `btrfs property set -ts /run/top${inside} ro false", -f if it was received`,
    ]
    : [
      `${inside} on ${node} is not the subvolume, which no snapshot includes`,
      `rmdir /run/top${inside}", then mv the subvolume there`,
    ];
  throw new Error(
    `Cannot write to "${path}": ${why}; make it writable ("mkdir /run/top; ` +
      `mount -o subvolid=5 ${node} /run/top; ${cure}), reboot`,
  );
}

/** The root of every Btrfs subvolume has the inode number 256 (btrfs(5)). */
function isSubvolume(path: string): boolean {
  return orUndefined(() => fs.statSync(path).ino) === 256;
}

async function mountTopLevel(nodes: string[], options: string[], paths: Paths) {
  fs.mkdirSync(paths.topLevel, { recursive: true });
  await mountBtrfs(nodes, ["subvolid=5", ...options], paths.topLevel);
}

/** All members are named, for nobody else may have scanned them. */
const btrfsOptions = ([, ...others]: string[], options: string[]) =>
  [NO_ATIME, ...options, ...others.map((path) => `device=${path}`)].join();

async function mountBtrfs(nodes: string[], options: string[], target: string) {
  const all = btrfsOptions(nodes, options);
  await run(words`mount -t btrfs -o ${all} ${nodes[0]} ${target}`, {
    to: `mount ${nodes.join(", ")} on "${target}"`,
    timeoutMs: TIMEOUT.mountMs,
  });
  const isThere = mountedOn(target) !== undefined;
  assert(isThere, `Cannot find a mount on "${target}" after mounting it`);
}

async function bind(directory: string, target: string): Promise<void> {
  await run(words`mount --bind ${directory} ${target}`, {
    to: `bind "${directory}" to "${target}"`,
  });
}

async function unmount(...targets: string[]): Promise<void> {
  const quoted = targets.map((target) => `"${target}"`).join(", ");
  await run(words`umount ${targets}`, { to: `unmount ${quoted}` });
}

/** The topmost mount on a directory. */
const mountedOn = (target: string, mounts = readMounts()) =>
  mounts.findLast((mount) => mount.target === target);

/** Mounts a tmpfs where there is no data filesystem, unless one is there. */
async function mountVolatile(plan: Plan, paths: Paths) {
  const mounted = mountedOn(paths.data);
  if (plan.mode !== "mounted" || !mounted) {
    const mode = outcomeOf(plan) === "fallback" ? "fallback" : "volatile";
    await mountTmpfs(mode, paths);
    return mode;
  }
  const mode = modeOf(mounted, paths);
  if (mode === "fallback") { // the reasons of the earlier run still hold
    const { errors = ["An earlier run failed"] } = readReport(paths) ?? {};
    for (const reason of errors) say("error", reason);
    if (isHeldBack(paths)) say("warning", HELD_BACK);
  }
  return mode;
}

/** The outcome of an earlier run of this boot. */
function modeOf({ type }: Mount, paths: Paths): Outcome["mode"] {
  if (type !== "tmpfs") return "persistent";
  return isHeldBack(paths) ? "fallback" : readReport(paths)?.mode ?? "volatile";
}

/** Mounts a tmpfs of half the memory: tmpfs(5)'s default, given to be said. */
async function mountTmpfs(mode: "volatile" | "fallback", paths: Paths) {
  fs.mkdirSync(paths.data, { recursive: true });
  const sizeBytes = Math.floor(readMemoryBytes() / 2 / MiB) * MiB;
  const options = `${NO_ATIME},mode=0755,size=${sizeBytes}`;
  await run(words`mount -t tmpfs -o ${options} ${DATA} ${paths.data}`, {
    to: `mount a tmpfs on "${paths.data}"`,
  });
  fs.mkdirSync(paths.state, { recursive: true });
  if (mode === "fallback") holdBackDocker(paths);
  say(
    "info",
    `Volatile: "${paths.data}" is a tmpfs of at most ${inMiB(sizeBytes)}; ` +
      `what is written there is lost at shutdown`,
  );
}

/**
 * Keeps Docker from starting without the data that are expected: what it wrote
 * would be gone at the next good boot. dockerd at once refuses a data root that
 * is a file (daemon/daemon.go, NewDaemon()).
 */
function holdBackDocker(paths: Paths): void {
  const text =
    `Docker is held back: its data are expected on a disk that cannot be used.

${messages.errors.map((reason) => `  - ${reason}\n`).join("")}
Repair this and reboot. Without the disk Docker would have no image, container
or volume, and what it writes would be lost at the next boot. To start it like
that nevertheless, until then:

    rm -f ${DOCKER_DATA_ROOT}
    mkdir -m 710 ${DOCKER_DATA_ROOT}

and then start Docker again.
`;
  fs.writeFileSync(paths.docker, text, { mode: 0o444, flag: "wx" });
  say("warning", HELD_BACK);
}

const isHeldBack = (paths: Paths) =>
  orUndefined(() => fs.lstatSync(paths.docker).isFile()) ?? false;

const HELD_BACK = `Docker is held back until its data are there again; ` +
  `"${DOCKER_DATA_ROOT}" says why, and how to start it without them`;

/** Says so where an overlay failed to create its `work/work` for lack of space. */
function sayHowToMakeRoom(error: unknown, paths: Paths): void {
  const { type, source } = mountedOn(paths.data) ?? {};
  const isNoSpace = /ENOSPC|EDQUOT|No space left on device|quota exceeded/
    .test(messageOf(error));
  if (!isNoSpace || type !== "btrfs") return;
  say(
    "error",
    `The data filesystem on ${source} is full, or a quota group is (btrfs ` +
      `qgroup show -re): log in, mount it elsewhere ("mkdir /run/full; mount ` +
      `${source} /run/full"), delete files or snapshots, reboot`,
  );
}

/**
 * The last resort: whatever failed, the system becomes writable.
 *
 * @param isMute A disk did not answer: a mount that was given up waits for it in
 * the kernel, and may come after all (fs/namespace.c, do_new_mount()). On the
 * data mount point it is out of sight, with the parent bound over itself; above
 * an overlay it is taken away.
 */
async function fallBack(isMute: boolean, paths: Paths): Promise<void> {
  try {
    await attempt(() => detach(paths));
    const parent = dirname(paths.data);
    await attempt(() =>
      isMute
        ? run(words`mount -o bind,private ${parent} ${parent}`, {
          to: `shield "${paths.data}"`,
        })
        : removeScratch(paths)
    );
    await mountTmpfs("fallback", paths);
    await mountOverlays(paths);
    if (isMute) await attempt(() => uncoverLater(paths));
    say("warning", "The system runs volatile until this is repaired");
  } catch (error) {
    sayError(error);
  }
}

/**
 * Takes away what was mounted. It is gone at once, also where umount(8) then
 * waits for a mute disk and is given up.
 */
async function detach(paths: Paths): Promise<void> {
  const mounts = readMounts();
  const targets = OVERLAYS.map((name) => join(paths.root, name))
    .filter((target) => isOurOverlay(mountedOn(target, mounts)))
    .concat(paths.copyUp, paths.topLevel, paths.data)
    .filter((target) => mountedOn(target, mounts));
  if (targets.length === 0) return;
  await run(words`umount --lazy ${targets}`, {
    to: `detach what is mounted on ${targets.join(", ")}`,
    timeoutMs: TIMEOUT.detachMs,
  });
}

/** Unmounts what covers our mounts, as long as a process that was killed lives. */
const UNCOVER = `
top() { # the id of the topmost mount on $1 (proc_pid_mountinfo(5))
  while read -r id _ _ _ target _; do
    [ "$target" != "$1" ] || echo "$id"
  done </proc/self/mountinfo | tail -n 1
}
killed=$1 umount=$2
shift 2
for target; do own="$own $(top "$target"):$target"; done
while :; do
  lives=
  for pid in $killed; do
    if kill -0 "$pid" || kill -0 "-$pid"; then lives=yes; fi
  done 2>/dev/null
  for mount in $own; do
    [ "$(top "\${mount#*:}")" = "\${mount%%:*}" ] ||
      "$umount" --lazy "\${mount#*:}"
  done
  [ "$lives" ] || exit
  sleep 1
done`;

/** An overlay that comes late must not cover the one that is in use. */
function uncoverLater({ root }: Paths): void {
  if (givenUp.size === 0) return;
  const to = "uncover what is mounted now";
  const [umount] = findCommand(["umount"], to);
  const targets = OVERLAYS.map((name) => join(root, name));
  const args = [[...givenUp].join(" "), umount, ...targets];
  start(findCommand(words`sh -c ${UNCOVER} sh ${args}`, to), {
    stdio: ["ignore", "ignore", "ignore"],
    detached: true,
  });
}

// ---------------------------------------------------------------------------
// Step 7: overlays.
// ---------------------------------------------------------------------------

/** Puts an overlay on each key directory. */
async function mountOverlays(paths: Paths): Promise<void> {
  const layers = [paths.upper, paths.work]
    .flatMap((layer) => OVERLAYS.map((name) => join(layer, name)));
  refuseReadOnly(...layers);
  const names = withoutOverlay(paths);
  if (names.length > 0) {
    const isMade = await makeUppers(names, paths.state, paths);
    await allOf([
      isMade && attempt(() => removeScratch(paths)),
      mountFromTable(overlayEntries(names, paths), paths),
    ]);
  }
  for (const name of withoutOverlay(paths)) {
    await mountOverlayAnew(name, paths);
  }
  await moveMounts(paths);
}

/**
 * Shows again what others have mounted below the key directories: a tmpfs on
 * /var/log, a file on /etc/resolv.conf. An overlay hides it, but the recursive
 * bind mount of its lower has a copy, which is moved to the merged tree.
 */
async function moveMounts({ root, lower }: Paths): Promise<void> {
  const found = readMounts().map(({ target }) => target)
    .filter((path) => path.startsWith(`${lower}/`) && dirname(path) !== lower);
  for (const source of new Set(found)) {
    // A mount below another one moves along with it.
    if (found.some((path) => source.startsWith(`${path}/`))) continue;
    const target = join(root, source.slice(lower.length));
    try {
      const isThere = orUndefined(() => fs.realpathSync(target)) === target;
      assert(isThere, `"${target}" was removed or is a link now`);
      await run(words`mount --move ${source} ${target}`, {
        to: "move it to the overlay",
      });
      // The topmost was moved; those that it covered are not wanted.
      const covered = found.filter((path) => path === source).slice(1);
      if (covered.length > 0) await unmount(...covered);
    } catch (error) {
      say(
        "warning",
        `The mount on "${target}" is hidden by the overlay: ` +
          messageOf(error),
      );
    }
  }
}

/** The key directories that have no overlay of ours that can be written to. */
function withoutOverlay({ root }: Paths): string[] {
  const mounts = readMounts();
  return OVERLAYS.filter((name) => {
    const mount = mountedOn(join(root, name), mounts);
    return !isOurOverlay(mount) || mount?.superOptions.includes("ro");
  });
}

/**
 * Is this an overlay of ours? Only the end of its upper's path is compared: in
 * an initramfs, where it may have been mounted, the root had another name.
 */
function isOurOverlay(mount?: Mount): boolean {
  if (mount?.type !== "overlay") return false;
  const upper = join("/", DATA_MOUNT, STATE, UPPER, basename(mount.target));
  return mount.superOptions
    .some((option) => option.startsWith("upperdir=") && option.endsWith(upper));
}

/**
 * fstab(5) entries: for each directory the bind mount that is its lower layer,
 * whose mount point is made, and the overlay.
 */
function overlayEntries(names: string[], paths: Paths): string[][] {
  return names.flatMap((name) => {
    const directory = join(paths.root, name);
    const lower = join(paths.lower, name);
    fs.mkdirSync(lower, { recursive: true });
    const [upper, work] = [join(paths.upper, name), join(paths.work, name)];
    const options = overlayOptions(lower, upper, work);
    // rprivate: what is mounted on the directory must not appear in its lower.
    const bind = [directory, lower, "none", "rbind,rprivate"];
    const overlay = ["overlay", directory, "overlay", options];
    return isSameFile(directory, lower) ? [overlay] : [bind, overlay];
  });
}

const overlayOptions = (lower: string, upper: string, work: string) =>
  `lowerdir=${lower},upperdir=${upper},workdir=${work},` +
  `${OVERLAY_FEATURES_OFF},${NO_ATIME}`;

function isSameFile(path: string, other: string): boolean {
  const [a, b] = [path, other].map((p) => orUndefined(() => fs.statSync(p)));
  return a !== undefined && a.dev === b?.dev && a.ino === b.ino;
}

/**
 * Mounts what is listed, but nothing over a directory that holds data: on Btrfs
 * it has a size. Then touches what this process will look at.
 */
const MOUNT_TABLE = `
mount=$1 fstab=$2 # BusyBox's shell may take its own mount for the other
shift 2
while [ "$1" != -- ]; do # a directory that must be empty, or none; an entry
  [ -z "$1" ] || [ -d "$1" ] || mkdir -p "$1"
  [ -s "$1" ] || printf '%s\\n' "$2"
  shift 2
done >"$fstab"
"$mount" --all --fstab "$fstab"
status=$?
shift
for path; do
  [ ! -w "$path" ] || [ ! -f "$path" ] || read -r _ <"$path"
done
exit $status`;

/**
 * Has one child mount all entries, and touch the filesystem first: where the
 * disk went mute, the child never ends, and init waits for this process. Callers
 * look which mounts exist afterwards.
 *
 * @param unlessUsed Nothing is mounted on these if they hold anything.
 * @returns What went wrong, if anything did.
 */
async function mountFromTable(
  entries: string[][],
  paths: Paths,
  level: Level = "warning",
  unlessUsed: string[] = [],
): Promise<string | undefined> {
  // Nothing is to be escaped: no device, and no --root, has a space in its name.
  const pairs = entries.flatMap((entry) => [
    unlessUsed.includes(entry[1]) ? entry[1] : "",
    `${entry.join(" ")} 0 0`,
  ]);
  const touched = [paths.docker, paths.containerd, paths.daemonJson]
    .concat(PENDING.flatMap((job) => pendingFiles(job, paths)));
  const to = `mount what "${paths.fstab}" lists`;
  try {
    const [mount] = findCommand(["mount"], to);
    const args = [mount, paths.fstab, ...pairs, "--", ...touched];
    await run(words`sh -c ${MOUNT_TABLE} sh ${args}`, { to, isGroup: true });
  } catch (error) {
    if (error instanceof TimeoutError) throw error;
    say(level, messageOf(error));
    return messageOf(error);
  }
}

/**
 * Mounts an overlay again whose mount failed or came out read-only, as it does
 * when a crash left something in `work` that the kernel cannot remove.
 */
async function mountOverlayAnew(name: string, paths: Paths): Promise<void> {
  const target = join(paths.root, name);
  const work = join(paths.work, name);
  say("warning", `Clearing "${work}" and mounting "${target}" again`);
  if (isOurOverlay(mountedOn(target))) await unmount(target);
  // The kernel's own directory alone: a link may lead to an upper.
  const old = whatIsAt(work)?.isDirectory() ? join(work, "work") : work;
  fs.rmSync(old, { recursive: true, force: true });
  fs.mkdirSync(work, { recursive: true });
  const problem = await mountFromTable(overlayEntries([name], paths), paths);
  assert(
    !withoutOverlay(paths).includes(name),
    `Cannot make "${target}" writable: ${problem ?? "it is read-only"}`,
  );
}

/**
 * Removes the scratch mounts that made subvolumes and uppers, also those that a
 * killed run left.
 */
async function removeScratch(paths: Paths): Promise<void> {
  const scratch = [paths.copyUp, paths.topLevel].filter(fs.existsSync);
  if (scratch.length === 0) return; // and no need to ask the kernel
  const targets = readMounts().map(({ target }) => target)
    .filter((target) => scratch.includes(target));
  if (targets.length > 0) await unmount(...targets);
  fs.rmSync(scratchLayers(paths.state), { recursive: true, force: true });
}

/** Upper and work of the overlay that makes uppers. */
const scratchLayers = (state: string) => join(state, WORK, ".copy-up");

/**
 * Makes the uppers and works that are not there yet. The root of an overlay
 * shows the mode, owner, times and extended attributes of its upper: they must
 * be those of the lower. The kernel copies them best. A change to `etc` in an
 * overlay of the whole root, with an upper in `work`, makes `etc` there, and one
 * rename puts it in its place: a power cut leaves a whole upper or none.
 *
 * @param state The state directory, wherever it is mounted.
 * @param payload What to write into them, while the whole root is seen.
 * @returns Whether any was made: then {@linkcode removeScratch} is to follow,
 * also beside the next steps.
 */
async function makeUppers(
  names: string[],
  state: string,
  paths: Paths,
  payload?: FoundPayload,
): Promise<boolean> {
  const uppers = join(state, UPPER);
  const works = names.map((name) => join(state, WORK, name));
  for (const directory of [uppers, ...works]) {
    fs.mkdirSync(directory, { recursive: true });
  }
  const missing = names.filter((name) => !fs.existsSync(join(uppers, name)));
  if (missing.length === 0) return false;
  const scratch = scratchLayers(state);
  const [upper, work] = ["upper", "work"].map((name) => join(scratch, name));
  fs.rmSync(scratch, { recursive: true, force: true });
  const merged = paths.copyUp;
  for (const directory of [upper, work, merged]) {
    fs.mkdirSync(directory, { recursive: true });
  }
  const options = overlayOptions(paths.root, upper, work);
  await run(words`mount -t overlay -o ${options} overlay ${merged}`, {
    to: `make the uppers in "${uppers}"`,
  });
  for (const name of missing) {
    const { mode } = fs.statSync(join(merged, name));
    fs.chmodSync(join(merged, name), mode & 0o7777); // no change, but a copy-up
  }
  if (payload) await applyPayload(payload, merged, state);
  for (const name of missing) {
    fs.renameSync(join(upper, name), join(uppers, name));
  }
  return true;
}

// ---------------------------------------------------------------------------
// Steps 8 and 9: Docker, swap, the status file.
// ---------------------------------------------------------------------------

/**
 * Points Docker at its data root (dockerd(8), daemon.json); every other key is
 * kept as it is written, and so is a data root that the user chose.
 *
 * @throws {Error} When dockerd would not accept `daemon.json`: it is never
 * replaced.
 */
function configureDocker(mode: Outcome["mode"], paths: Paths): void {
  if (mode !== "fallback") { // there it is for a person to make it
    makeDirectory(paths.docker, NESTED.docker);
  }
  const path = paths.daemonJson;
  try {
    const before = readConfig(path);
    const imageRoot = orUndefined(() =>
      setDataRoot(readConfig(paths.imageDaemonJson)!.contents).dataRoot
    );
    const { contents, dataRoot } = setDataRoot(before?.contents, imageRoot);
    if (dataRoot !== DOCKER_DATA_ROOT) {
      say(
        "info",
        `Docker keeps its data in "${dataRoot}", as "${path}" says, and not ` +
          `in "${DOCKER_DATA_ROOT}"`,
      );
    } else if (contents !== before?.contents) {
      fs.mkdirSync(dirname(path), { recursive: true });
      const encode = before?.encode ?? Buffer.from;
      replaceFile(before?.path ?? path, encode(contents));
      if (mode === "fallback") return; // Docker is held back, which is said
      say("info", `Docker keeps its data in "${DOCKER_DATA_ROOT}"`);
    }
  } catch (error) {
    throw new Error(
      `Cannot point Docker at its data: ${messageOf(error)}. "${path}" is ` +
        `left as it is: repair or remove it, call persistence.ts again, and ` +
        `restart Docker`,
    );
  }
}

/**
 * Reads a file as dockerd does: UTF-8, or UTF-16 with a byte order mark (moby,
 * daemon/config/config.go, getConflictFreeConfiguration()).
 *
 * @returns Its contents with the mark, how to encode others in its place, and
 * its path behind symbolic links; undefined where there is none.
 */
function readConfig(path: string) {
  if (!whatIsAt(path)) return undefined;
  const file = fs.statSync(path, { throwIfNoEntry: false });
  assert(file !== undefined, `"${path}" is a symbolic link to nothing`);
  assert(file.isFile(), `"${path}" is not a file`); // a FIFO would block us
  const bytes = fs.readFileSync(path);
  const mark = bytes.toString("latin1", 0, 2);
  const isBigEndian = mark === "\xfe\xff";
  const encoding = isBigEndian || mark === "\xff\xfe" ? "utf16le" : "utf8";
  const swap = (bytes: Buffer) =>
    isBigEndian ? bytes.subarray(0, bytes.length & ~1).swap16() : bytes;
  const encode = (contents: string) => swap(Buffer.from(contents, encoding));
  const contents = swap(Buffer.from(bytes)).toString(encoding);
  assert(
    encode(contents).equals(bytes),
    `"${path}" is neither UTF-8 nor UTF-16 with a byte order mark`,
  );
  return { contents, encode, path: fs.realpathSync(path) };
}

/**
 * Sets `data-root` in the text of `daemon.json`, unless the user chose one, that
 * is, one that is neither the image's nor Docker's default. Only that value
 * changes: writing the object anew would round the numbers of other keys.
 *
 * @returns The text, and the data root that it names.
 * @throws {Error} When dockerd would not accept it.
 */
export function setDataRoot(
  before = "",
  imageRoot = DOCKER_DEFAULT,
): { contents: string; dataRoot: string } {
  const dataRoot = DOCKER_DATA_ROOT;
  const value = `"${dataRoot}"`;
  const [, head, json, tail] =
    /^(\ufeff?\p{White_Space}*)(.*?)(\p{White_Space}*)$/su.exec(before)!;
  let config: unknown;
  try {
    config = JSON.parse(json || "null"); // both are an empty one to dockerd
  } catch (error) {
    throw new Error(`daemon.json is not JSON (${messageOf(error)})`);
  }
  const isObject = typeof config === "object" && !Array.isArray(config);
  assert(isObject, "daemon.json is not a JSON object");
  const members = config ? listMembers(json) : [];
  const roots = members.filter(({ key }) => /^(data-root|graph)$/i.test(key));
  const chosen = roots.map(({ key, start, end }): string | null => {
    const root = JSON.parse(json.slice(start, end));
    assert(key === key.toLowerCase(), `dockerd does not know the key "${key}"`);
    assert(
      root === null || typeof root === "string",
      `"${key}" is not a string`,
    );
    return root;
  }).findLast((root) => root !== null); // Go's encoding/json passes over null
  const isOneOf = (...roots: string[]) =>
    roots.some((root) => resolve(root) === resolve(chosen ?? ""));
  if (chosen && isOneOf(dataRoot)) return { contents: before, dataRoot };
  if (chosen && !isOneOf(imageRoot, DOCKER_DEFAULT)) {
    return { contents: before, dataRoot: chosen };
  }
  let after = `{\n  "data-root": ${value}\n}`;
  const last = roots.at(-1);
  const gap = /^{(\s*)/.exec(json)?.[1] ?? "";
  if (last) {
    after = json.slice(0, last.start) + value + json.slice(last.end);
  } else if (members.length > 0) {
    const others = json.slice(1 + gap.length);
    after = `{${gap}"data-root": ${value},${gap || " "}${others}`;
  }
  return { contents: head + after + (json ? tail : "\n"), dataRoot };
}

/** The members of an object in valid JSON, and where their values are. */
function listMembers(json: string) {
  const members: { key: string; start: number; end: number }[] = [];
  const tokens = /"[^"\\]*(?:\\.[^"\\]*)*"|[^\s"]/g; // a number is many
  let key = "";
  let depth = 0;
  let from = 1;
  let end = 0; // of the token before
  for (const { 0: token, index } of json.matchAll(tokens)) {
    if (depth === 1 && /^[:,}]$/.test(token)) {
      const part = json.slice(from, end).trimStart();
      if (token === ":") key = JSON.parse(part);
      else if (part) members.push({ key, start: end - part.length, end });
      from = index + 1;
    }
    if (/^[{[]$/.test(token)) depth++;
    if (/^[\]}]$/.test(token)) depth--;
    end = index + token.length;
  }
  return members;
}

/**
 * Binds the root of a containerd that is a service of its own, if the image has
 * one, to the data filesystem: containers are overlays, whose upper cannot be in
 * an overlay, as `/var` is.
 */
async function bindContainerd(paths: Paths): Promise<void> {
  const target = join(paths.root, CONTAINERD_ROOT);
  if (!whatIsAt(join(paths.lower, CONTAINERD_ROOT))?.isDirectory()) return;
  makeDirectory(paths.containerd, NESTED.containerd);
  if (isSameFile(target, paths.containerd)) return;
  const isTaken = whatIsAt(target)?.isDirectory() === false ||
    listDirectory(join(paths.upper, CONTAINERD_ROOT)).length > 0;
  if (isTaken) {
    say(
      "warning",
      `"${target}" holds what was written there, so "${paths.containerd}" is ` +
        `not bound to it, and containerd may not run: move that there, reboot`,
    );
    return;
  }
  makeDirectory(target);
  await bind(paths.containerd, target);
}

/**
 * Replaces a file in one step, with the mode and owner of the old one or those
 * that are given. One that is new is not synced: where a crash empties it, it is
 * made anew.
 */
function replaceFile(
  path: string,
  contents: string | Uint8Array,
  given?: Pick<fs.Stats, "mode" | "uid" | "gid">,
  temporary = `${path}.new`,
): void {
  const old = given ?? orUndefined(() => fs.statSync(path));
  const { mode, uid, gid } = old ?? { mode: 0o644, uid: 0, gid: 0 };
  fs.rmSync(temporary, { force: true });
  const file = fs.openSync(temporary, "wx", 0o600);
  try {
    fs.writeFileSync(file, contents);
    fs.fchownSync(file, uid, gid);
    fs.fchmodSync(file, mode & 0o7777);
    if (old) fs.fsyncSync(file);
  } finally {
    fs.closeSync(file);
  }
  fs.renameSync(temporary, path);
}

/** Turns on swap that is swap alone. */
async function swapOn(all: BlockDevice[]): Promise<void> {
  const found = await allOf(all.map(async (area) => {
    if (area.holds.kind !== "swap") return [area]; // it was just made
    const others = (await listSignatures(area))
      .filter(({ type }) => type !== "swap");
    if (others.length === 0) return [area];
    const what = describeSignatures(others);
    say(
      "warning",
      `${area.path} holds ${what} as well as swap: it is not used`,
    );
    return [];
  }));
  const areas = found.flat().slice(0, 16); // MAX_SWAPFILES is 23 or more
  if (areas.length === 0) return;
  await run(words`swapon ${areas.map(({ path }) => path)}`, {
    to: `turn on swap on ${pathsOf(areas)}`,
  });
}

/** Writes `/run/lightwhale/persistence.json`: what this boot did. */
function writeReport({ mode, plan, status, startedMs }: Outcome, paths: Paths) {
  const data = plan?.data;
  const report = {
    version: VERSION,
    mode,
    reason: plan?.reason ?? messages.errors[0],
    exitStatus: status,
    uuid: data?.fsid ?? null,
    devices: data?.members.map((member) => member.path) ?? [],
    missing: data ? stateOf(data)?.missing ?? [] : [],
    degraded: (data?.missing ?? 0) > 0,
    plan: plan ? [...describePlan(plan)] : [],
    ...messages,
    durationMs: Math.round(performance.now() - startedMs),
  };
  replaceFile(paths.report, JSON.stringify(report, null, 2) + "\n");
}

function readReport(paths: Paths) {
  return orUndefined(() => JSON.parse(readText(paths.report) ?? "null"));
}

// ===========================================================================
// A boot ends here. What follows never runs before the system is up: the care
// of disks in the background, the commands, and the toolbox of all.
// ===========================================================================

// ---------------------------------------------------------------------------
// The life of the disks: long work in the background, after the boot.
// ---------------------------------------------------------------------------

/** What sysfs says of a mounted Btrfs (btrfs(5), /sys/fs/btrfs/UUID). */
export type FilesystemState = NonNullable<ReturnType<typeof stateOf>>;

/** A mounted Btrfs, as far as its superblocks tell. */
interface Mounted {
  fsid: string;
  members: Pick<Member, "path" | "holds">[];
}

/**
 * Reads sysfs only for devices that are present: after `btrfs device remove
 * missing` the kernel leaves `devinfo/N` behind, and to read a file in it is a
 * use after free (fs/btrfs/volumes.c, btrfs_rm_device(), as of Linux 6.18).
 */
function stateOf({ fsid, members }: Mounted) {
  const directory = `/sys/fs/btrfs/${fsid}`;
  if (!fs.existsSync(directory)) return undefined;
  const [data, metadata, system] = ["data", "metadata", "system"].map((type) =>
    listDirectory(`${directory}/allocation/${type}`)
      .filter((name) => /^(single|dup|raid)/.test(name))
  );
  const superblocks = members.map(({ holds }) => holds.btrfs);
  const present = superblocks.map(({ devid }) => devid);
  const numDevices = Math.max(0, ...superblocks.map((s) => s.numDevices));
  // By devid; counters that are zero are left out.
  const errors: Record<number, Record<string, number>> = {};
  for (const devid of present) {
    const stats = readText(`${directory}/devinfo/${devid}/error_stats`) ?? "";
    for (const [, name, count] of stats.matchAll(/^(\w+) ([1-9]\d*)$/gm)) {
      (errors[devid] ??= {})[name] = Number(count);
    }
  }
  const missing = listDirectory(`${directory}/devinfo`).map(Number)
    .filter((devid) => devid > 0 && !present.includes(devid))
    .slice(0, Math.max(0, numDevices - present.length));
  return {
    /** What runs and excludes others: `none`, `balance`, `device replace`. */
    operation: readText(`${directory}/exclusive_operation`) ?? "none",
    devids: [...present, ...missing].sort((a, b) => a - b),
    missing,
    /** Those that have chunks. */
    profiles: { data, metadata, system },
    errors,
  };
}

/** A piece of long work: what it is, and what it does. */
export interface Job {
  kind: string;
  /** What it is done to. */
  device?: BlockDevice;
  /** For people. */
  what: string;
  /** Changes which disks belong to the filesystem: nobody else may at a time. */
  change?: () => Promise<void>;
  /** Takes long. */
  work?: () => Promise<void>;
}

/**
 * Pending jobs that cannot be derived from the disks: members disagreed when
 * they were mounted; a device was added in the place of a missing one.
 */
export type Pending = Record<"scrub" | "remove missing", boolean>;

/** What a job is decided from. */
interface Situation {
  data: DataFilesystem;
  joins: NewMember[];
  state: FilesystemState;
  pending: Pending;
  paths: Paths;
}

/** All long work, in the order of urgency: the first that applies is done. */
const JOBS: ((situation: Situation) => Job | undefined)[] = [
  waitForKernel,
  releaseTarget,
  rebuildStale,
  removeMissing,
  freeLeaver,
  moveMember,
  joinMagic,
  unmirror,
  removeMember,
  convertProfiles,
  settleProfiles,
  scrub,
];

/**
 * Decides what to do next for a mounted data filesystem. All of it follows
 * from what is on the disks, so that it goes on by itself after a power cut.
 */
export function decideJob(
  { data, joins }: Plan,
  state: FilesystemState,
  pending: Pending,
  paths: Paths = pathsBelow("/"),
): Job | undefined {
  if (!data) return undefined;
  if (state.operation === "balance paused") return undefined; // by a person
  for (const job of JOBS) {
    const found = job({ data, joins, state, pending, paths });
    if (found) return found;
  }
}

function waitForKernel({ data, state }: Situation): Job | undefined {
  if (state.operation === "none") return undefined;
  return {
    kind: "wait",
    what: `the ${state.operation} goes on`,
    work: () => waitForOperation(data),
  };
}

async function waitForOperation(data: DataFilesystem): Promise<void> {
  const operation = () => stateOf(data)?.operation ?? "none";
  while (!["none", "balance paused"].includes(operation())) await sleep(1000);
}

/** The target of a replace that writes to it no more. */
function releaseTarget(situation: Situation): Job | undefined {
  const { data, state, paths } = situation;
  const device = data.replaceTarget;
  if (!device) return undefined;
  if (state.missing.length > 0) {
    const { path: dataPath, sizeBytes: dataBytes } = device;
    const member = { device, swapBytes: 0, dataPath, dataBytes };
    return replaceMissing(member, situation);
  }
  return {
    kind: "release",
    device,
    what: `${device.path}, left over from a replace, is freed`,
    async change() {
      await cancelReplace(paths);
      await confirm(device);
      await wipe(device);
      allowJoins([device], paths); // as before the power went
    },
  };
}

/**
 * A member that missed writes: the very same disk is wiped and rebuilt. Before
 * it is wiped it gets the magic back, so that the next boot takes it again if
 * power fails in between. A partition gets the magic *name*: a header would
 * claim its whole disk.
 */
function rebuildStale(situation: Situation): Job | undefined {
  const { data, state } = situation;
  const [device] = data.stale;
  if (!device || !state.missing.includes(devidOf(device))) return undefined;
  const hasName = device.partitionName !== undefined;
  const { begin, finish } = replacement(devidOf(device), {
    ...device,
    magic: hasName || device.kind === "disk",
    partitionName: hasName ? MAGIC : undefined,
    read: { ...device.read, btrfs: undefined },
  }, situation);
  return {
    kind: "rebuild",
    device,
    what: `${device.path} is wiped and rebuilt`,
    async change() {
      await confirm(device);
      // An MBR has no names, and a volume is never formatted by a boot.
      if (device.kind === "disk") await setMagic(device, MAGIC);
      else if (hasName) await attempt(() => setMagic(device, MAGIC));
      await wipe(device);
      await begin();
    },
    work: finish,
  };
}

/** A device was added for the missing one, which was larger. */
function removeMissing({ state, pending, paths }: Situation): Job | undefined {
  if (!pending["remove missing"] || !state.missing.length) return undefined;
  const [devid] = state.missing;
  const remove = () => removeDevice({ devid, isMissing: true }, paths);
  return {
    kind: "remove missing",
    what: `the data of the missing device is mirrored anew`,
    async work() {
      await packChunks(paths);
      await firstThatWorks([remove, () => packChunks(paths).then(remove)]);
      setPending("remove missing", false, paths);
    },
  };
}

function joinMagic(situation: Situation): Job | undefined {
  const { data, joins: [member], state } = situation;
  if (!member) return undefined;
  if (state.missing.length > 0) return replaceMissing(member, situation);
  if (leavingMember(data)) return undefined; // one after the other
  const { device } = member;
  return {
    kind: "add",
    device,
    what: `${device.path} joins the data filesystem`,
    async change() {
      await prepareMember(member, data);
      await addDevice(member, situation);
      await clearMagic(device);
    },
  };
}

function replaceMissing(member: NewMember, situation: Situation): Job {
  const { data, state: { missing: [devid] }, paths } = situation;
  const { device: { read }, dataPath: path } = member;
  const wiped = { ...read, btrfs: undefined };
  const device = { ...member.device, path, read: wiped };
  const { begin, finish } = replacement(devid, device, situation);
  const job: Job = {
    kind: "replace",
    device: member.device,
    what: `${member.device.path} takes the place of device ${devid}`,
    async change() {
      await cancelReplace(paths);
      await prepareMember(member, data);
      // To btrfs-progs it is mounted, whether or not the kernel knows it.
      if (data.replaceTarget) await wipe(device);
      try {
        await begin();
      } catch (error) {
        // The words of btrfs-progs (cmds/replace.c) for a smaller target.
        if (!/smaller than source/.test(messageOf(error))) throw error;
        say("info", `${messageOf(error)}; it is added instead`);
        job.work = undefined;
        await addDevice(member, situation);
        setPending("remove missing", true, paths);
        await clearMagic(deviceWithMagic(device));
      }
    },
    work: finish,
  };
  return job;
}

/** `--move`: a magic disk takes the place of a member that is there. */
function moveMember(situation: Situation): Job | undefined {
  const { data, joins, state, paths } = situation;
  const source = leavingMember(data, "move");
  const member = moveTarget(data, joins);
  if (!member || !source || state.missing.length > 0) return undefined;
  const device = { ...member.device, path: member.dataPath };
  const devid = devidOf(source);
  const { beginLater, finish } = replacement(devid, device, situation);
  return {
    kind: "move",
    device: member.device,
    what: `the data of ${source.path} move to ${member.dataPath}`,
    async work() {
      await readAll(source, member, situation);
      await shrinkTo(member.dataBytes, source, paths);
      await beginLater(async () => {
        await cancelReplace(paths);
        await prepareMember(member, data);
      });
      await finish();
    },
  };
}

/**
 * Reads all of a member before its data move. A replace that cannot read a block
 * ends well without it and counts no error (seen with Linux 6.18), and then the
 * old disk would be wiped.
 *
 * @throws {Error} When a block cannot be read; the move is taken back then.
 */
async function readAll(
  { path }: Member,
  { device }: NewMember,
  { data, paths }: Situation,
) {
  const to = `read all of ${path}`;
  // A scrub also reads what was deleted since the last commit.
  await run(words`btrfs filesystem sync ${paths.data}`, { to });
  const { status } = await run(words`btrfs scrub start -B ${path}`, {
    to,
    accept: [SCRUB.done, SCRUB.uncorrectable],
    timeoutMs: Infinity,
  });
  if (status === SCRUB.done) return;
  const lost = await findLostFiles(paths);
  remember(paths, { lost });
  const lock = await takeLock(join(paths.run, "lock"));
  try {
    await tellToLeave(data, null);
    await takeMagic({ device, devices: [] });
  } finally {
    lock.release();
  }
  throw new Error(
    `Nothing moves from ${path}: not all of it can be read. Restore or delete ` +
      `${lost.join(", ") || "what is damaged (see dmesg)"}, then ask again`,
  );
}

/** Makes a member as small as what it moves to; a later boot may undo that. */
async function shrinkTo(bytes: number, member: Member, paths: Paths) {
  const { path, holds: { btrfs: { devid, deviceBytes } } } = member;
  if (bytes >= deviceBytes) return;
  const shrink = () =>
    run(words`btrfs filesystem resize ${devid}:${bytes} ${paths.data}`, {
      to: `shrink the data filesystem on ${path} to ${inMiB(bytes)}`,
      timeoutMs: Infinity,
    });
  await firstThatWorks([shrink, () => packChunks(paths).then(shrink)]);
}

/**
 * `--remove` of one of two: the other one, mounted without it, gets all, which
 * is read back before the one that leaves is given up.
 */
function unmirror({ data, state, paths }: Situation): Job | undefined {
  const { leaving, members: [member, another] } = data;
  if (leaving?.how !== "remove" || leavingMember(data) || another) return;
  if (state.missing.length === 0) return undefined;
  const steps: [to: string, command: string[]][] = [
    [
      `keep all on ${member.path}`,
      words`btrfs balance start --force -dconvert=single,soft
        -mconvert=dup,soft -sconvert=dup,soft ${paths.data}`,
    ],
    [
      `verify what is on ${member.path}`,
      words`btrfs scrub start -B ${member.path}`,
    ],
    [
      `give up the mirror of ${member.path}`,
      words`btrfs device remove missing ${paths.data}`,
    ],
  ];
  return {
    kind: "remove",
    what: `${member.path} gets all that was mirrored`,
    async work() {
      for (const [to, command] of steps) {
        await confirmLeaving(data);
        await run(command, { to, timeoutMs: Infinity });
      }
    },
  };
}

/** `--remove` of one of three or more, which may have been pulled too early. */
function removeMember({ data, state, paths }: Situation): Job | undefined {
  const { leaving, members } = data;
  const member = leavingMember(data);
  const count = member ? members.length - 1 : members.length;
  if (leaving?.how !== "remove" || count < 2) return undefined;
  if (state.missing.length !== (member ? 0 : 1)) return undefined;
  const { metadataProfile } = profilesFor(count);
  const isTooMany = [...state.profiles.metadata, ...state.profiles.system]
    .some((profile) => RANK.indexOf(profile) > RANK.indexOf(metadataProfile));
  const what = member?.path ?? "the disk that was pulled";
  return {
    kind: "remove",
    device: member,
    what: `the data of ${what} go to the other members`,
    async work() {
      if (isTooMany) {
        const filter = `-mconvert=${metadataProfile},soft`;
        await run(words`btrfs balance start --force ${filter} ${paths.data}`, {
          to: `keep the metadata on ${count} devices`,
          timeoutMs: Infinity,
        });
        await confirmLeaving(data);
      }
      const devid = member ? devidOf(member) : state.missing[0];
      await removeDevice({ devid, isMissing: !member }, paths);
    },
  };
}

/** Has the others take over what is on a device; notes how much that is. */
async function removeDevice(
  { devid, isMissing }: { devid: number; isMissing: boolean },
  paths: Paths,
) {
  const bytes = (await readUsages(paths)).get(devid)?.allocatedBytes;
  const note = JSON.stringify({ ...readJob(paths), devid, bytes });
  await attempt(() => replaceFile(paths.job, `${note}\n`));
  const which = isMissing ? "missing" : devid;
  await run(words`btrfs device remove ${which} ${paths.data}`, {
    to: `remove device ${devid} from the data filesystem`,
    timeoutMs: Infinity,
  });
}

/**
 * Is what was asked for still to be done, with the same members? Asked between
 * the steps of what takes hours.
 *
 * @throws {Error} When it was taken back, or a member has gone.
 */
async function confirmLeaving({ fsid, members, leaving }: DataFilesystem) {
  const now = await readMembers(fsid);
  const isAsked = leavingOf(now)?.member === leaving?.member;
  assert(
    isAsked && now.length === members.length,
    `The work on ${pathsOf(members)} ends here: ` +
      (isAsked ? "one of them has gone" : "it was taken back"),
  );
}

/** Wipes what has left, once the filesystem is whole without it. */
function freeLeaver({ data, state, paths }: Situation): Job | undefined {
  const { leaver, leaverDisk, leaving, members, missing, fsid } = data;
  if (!leaving || leavingMember(data)) return undefined;
  if (missing > 0 || state.missing.length > 0) return undefined;
  if (!leaver && leaving.how === "left") return undefined;
  if (!leaver) {
    return {
      kind: "forget",
      what: "the disk that was to leave has left",
      async change() {
        const left: Leaving = { ...leaving, how: "left" };
        await recordMembers(members, fsid, { leaving: left });
      },
    };
  }
  return {
    kind: "free",
    device: leaver,
    what: `${leaver.path}, which has left the data filesystem, is wiped`,
    async change() {
      await confirm(leaver);
      const path = await free(leaver, leaverDisk);
      await recordMembers(members, fsid, { leaving: null });
      const { disk, sequence } = leaver;
      replaceFile(paths.left, JSON.stringify({ path, disk, sequence }) + "\n");
    },
  };
}

/**
 * Wipes a data partition and, of a disk that is ours alone, swap and table. Its
 * record goes last: by that the next boot finds it again.
 *
 * @returns What is blank now.
 */
async function free(device: BlockDevice, others: BlockDevice[]) {
  const { path, sizeBytes, kind } = device;
  const whole = others.find(({ kind }) => kind === "disk");
  const names = whole ? namesIn(whole.read) : [];
  const isOurs = whole?.read.plain &&
    names.filter((name) => name === DATA).length === 1 &&
    names.every((name) => name === DATA || name === SWAP) &&
    others.every(({ kind, holds }) => kind === "disk" || holds.kind === "swap");
  for (const swap of others.filter(({ holds }) => holds.kind === "swap")) {
    if (readSwaps().some((path) => nameAt(path) === swap.name)) {
      await run(words`swapoff ${swap.path}`, { to: `let go of ${swap.path}` });
    }
    if (isOurs) await wipe(swap);
  }
  for (const at of BTRFS.copiesAt) {
    if (at + BTRFS.bytes > sizeBytes) break;
    const copy = parseSuperblock(await readBytes(path, at, BTRFS.bytes), at);
    if (!copy) continue;
    await writeBytes(path, at, new Uint8Array(BTRFS.bytes));
  }
  if (whole?.magic) await setMagic(whole, "");
  if (isOurs) {
    // The backup first: without it, the partition is found until all is gone.
    const { sectorBytes, endBytes } = whole.read.gpt!;
    const sector = new Uint8Array(sectorBytes);
    await writeBytes(whole.path, endBytes - sectorBytes, sector);
    await writeBytes(whole.path, 0, new Uint8Array(MiB));
  } else if (kind === "partition") await setMagic(device, "");
  await wipe(device);
  if (!isOurs) return path;
  await deleteOldPartitions(whole);
  return whole.path;
}

/** Chunks written while a member was missing; a disk that has just joined. */
function convertProfiles({ data, state, paths }: Situation): Job | undefined {
  const filters = balanceFilters(state, settledOf(data.members));
  if (filters.length === 0) return undefined;
  if (whyNotMirrored(data, sizesOf(data), 0)) return undefined;
  const convert = async (filter: string) => {
    await makeRoom(paths);
    await run(words`btrfs balance start ${filter} ${paths.data}`, {
      to: `give every chunk its profile on "${paths.data}"`,
      timeoutMs: Infinity,
    });
  };
  return {
    kind: "balance",
    what: "converts chunks that are not mirrored as they should be " +
      `(${filters.join(" ")})`,
    async work() {
      for (const filter of filters) {
        const again = () => convert(filter); // what was converted made room
        await firstThatWorks([again, again, again]);
      }
    },
  };
}

/** All chunks have their profiles: from now on a person may choose others. */
function settleProfiles({ data, state }: Situation): Job | undefined {
  const { fsid, members } = data;
  const old = settledOf(members);
  if (state.missing.length > 0 || balanceFilters(state, old).length > 0) return;
  const devices = state.devids.length;
  const settled = { devices, unmirrored: unmirroredTypes(state) };
  if (JSON.stringify(settled) === JSON.stringify(old)) return;
  if (!members.some(({ read }) => read.recordable)) return;
  return {
    kind: "settle",
    what: "the disks note that all data are stored as they should be",
    change: async () => void await recordMembers(members, fsid, { settled }),
  };
}

function scrub({ data, state, pending, paths }: Situation): Job | undefined {
  if (!pending.scrub || state.missing.length > 0) return undefined;
  return {
    kind: "scrub",
    what: "all checksums are verified",
    work: () => scrubSlowly(data, paths),
  };
}

/** Statuses of `btrfs scrub` (btrfs-scrub(8)). */
const SCRUB = { done: 0, nothingToResume: 2, uncorrectable: 3 };

/** Verifies all checksums; goes on where a power cut has ended it. */
async function scrubSlowly(data: DataFilesystem, paths: Paths) {
  const { fsid } = data;
  const to = `verify the checksums on "${paths.data}"`;
  const limited = await limitScrub(data);
  const scrubbing = (verb: string) =>
    run(words`btrfs scrub ${verb} -B ${paths.data}`, {
      to,
      accept: Object.values(SCRUB),
      timeoutMs: Infinity,
    });
  // While a member is missing, other work is more urgent.
  const watch = setInterval(async () => {
    const found = await readMembers(fsid);
    if (found.length >= data.members.length) return;
    clearInterval(watch);
    await attempt(() => run(words`btrfs scrub cancel ${paths.data}`, { to }));
  }, 10_000);
  try {
    if (/running/.test(await askHowScrubIs(paths))) return; // a person's?
    const { isUnfinished } = readScrub(data);
    const { status } = await scrubbing(isUnfinished ? "resume" : "start");
    if (status === SCRUB.nothingToResume) await scrubbing("start");
    const lost = await findLostFiles(paths);
    remember(paths, { lost });
    setPending("scrub", false, paths);
    await awaitScrub(paths);
  } finally {
    clearInterval(watch);
    for (const file of limited) orUndefined(() => fs.writeFileSync(file, "0"));
  }
}

async function askHowScrubIs({ data }: Paths): Promise<string> {
  const { stdout } = await run(words`btrfs scrub status ${data}`, {
    to: "see whether a scrub is running",
    capture: true,
  });
  return stdout;
}

/**
 * Limits a scrub to a quarter of what each disk reads in pieces of 512 KiB from
 * random places: between the reads of others the head has to seek for each piece
 * (fs/btrfs/scrub.c, flush_scrub_stripes()), and a quarter of what it reads in
 * order is more than a hard disk has (bench/README.md). The kernel divides a
 * second into a burst and a pause (scrub_throttle_dev_io()). A priority would do
 * nothing without the BFQ scheduler.
 *
 * @returns The files in sysfs that were written; a person's limit is kept.
 */
async function limitScrub({ fsid, members }: DataFilesystem) {
  const limited: string[] = [];
  const [pieceBytes, sampleBytes] = [512 * KiB, 32 * MiB];
  await attemptEach(members, async ({ path, holds: { btrfs } }) => {
    const limit =
      `/sys/fs/btrfs/${fsid}/devinfo/${btrfs.devid}/scrub_speed_max`;
    if (readText(limit) !== "0") return;
    const places = Math.floor(btrfs.deviceBytes / pieceBytes);
    const startedMs = performance.now();
    let readBytes = 0;
    await withDevice(path, async (read) => {
      while (readBytes < sampleBytes && performance.now() - startedMs < 5000) {
        const from = pieceBytes * Math.floor(places * Math.random());
        await read(from, pieceBytes).catch(() => {}); // the scrub will tell
        readBytes += pieceBytes;
      }
    });
    const seconds = (performance.now() - startedMs) / 1000;
    const bytesPerSecond = Math.max(MiB, Math.floor(readBytes / seconds / 4));
    fs.writeFileSync(limit, `${bytesPerSecond}`);
    limited.push(limit);
  });
  return limited;
}

/** What a scrub found on a device; counted are blocks of 4 KiB. */
export interface Scrubbed {
  devid: number;
  /** In seconds since 1970, by the clock of that time. */
  startedSeconds: number;
  isFinished: boolean;
  repaired: number;
  lost: number;
}

/**
 * Reads the file in which `btrfs scrub` remembers its progress: a line for each
 * device, `UUID:DEVID|name:value|…` (btrfs-progs, cmds/scrub.c).
 */
export function parseScrubStatus(text: string): Scrubbed[] {
  return text.split("\n").slice(1).flatMap((line) => {
    const [device, ...fields] = line.split("|");
    const devid = Number(device.split(":")[1]);
    const value = (name: string) =>
      Number(fields.find((f) => f.startsWith(`${name}:`))?.split(":")[1] ?? 0);
    return devid > 0
      ? [{
        devid,
        startedSeconds: value("t_start"),
        isFinished: value("finished") === 1 && value("canceled") === 0,
        repaired: value("corrected_errors"),
        lost: value("uncorrectable_errors"),
      }]
      : [];
  });
}

/** The last scrub of a filesystem, whoever started it. */
function readScrub({ fsid, members }: Mounted) {
  const text = readText(`/var/lib/btrfs/scrub.status.${fsid}`) ?? "";
  const devices = parseScrubStatus(text).filter(({ devid }) =>
    members.some(({ holds }) => holds.btrfs.devid === devid)
  );
  const isUnfinished = devices.some(({ isFinished }) => !isFinished);
  const startedSeconds = devices.length === 0 || isUnfinished
    ? undefined
    : Math.max(...devices.map((device) => device.startedSeconds));
  return { devices, isUnfinished, startedSeconds };
}

/** Names the files that the last scrub could not repair, if Btrfs can. */
async function findLostFiles(paths: Paths): Promise<string[]> {
  const to = "name the files that are damaged";
  const linesOf = (command: string[]) =>
    run(command, { to, capture: true })
      .then(({ stdout }) => stdout.split("\n").filter(Boolean), () => []);
  const log = (await linesOf(words`dmesg`)).join("\n");
  const ours = log.slice(Math.max(0, log.lastIndexOf("scrub: started on")));
  const places = ours.matchAll(/unable to fixup .* at logical (\d+)/g);
  const files = new Set<string>();
  for (const at of new Set([...places].map(([, at]) => at))) {
    if (files.size >= 10) break;
    const found = await linesOf(
      words`btrfs inspect-internal logical-resolve ${at} ${paths.data}`,
    );
    for (const line of found) {
      // It does not find the mounts of other subvolumes (btrfs-progs 6.2).
      const [, inode, subvolume] =
        /^inode (\d+) subvol (.+) could not be accessed/.exec(line) ?? [];
      const named = inode
        ? await linesOf(
          words`btrfs inspect-internal inode-resolve ${inode} ${
            mountOf(subvolume, paths)
          }`,
        )
        : [line];
      for (const file of named) files.add(file);
    }
  }
  return [...files];
}

/** Where a subvolume is, by its path from the top level. */
function mountOf(subvolume: string, paths: Paths): string {
  for (const which of ["state", "snapshots", "data"] as const) {
    const name = SUBVOLUMES[which];
    if (`${subvolume}/`.startsWith(`${name}/`)) {
      return join(paths[which], subvolume.slice(name.length));
    }
  }
  return paths.data;
}

/** Profiles from the weakest to the strongest, each by the devices it needs. */
const MIRRORED = ["raid1", "raid1c3", "raid1c4"];
const RANK = ["single", "dup", ...MIRRORED];

/** Types of chunks that are lost with one device, although there are several. */
function unmirroredTypes({ profiles, devids }: FilesystemState) {
  const isLost = (profile: string) => /^(single|dup|raid0)$/.test(profile);
  return CHUNKS.filter((type) =>
    devids.length > 1 && profiles[type].length > 0 &&
    profiles[type].every(isLost)
  );
}

/**
 * The filters of the balance that gives every chunk its profile (btrfs-balance
 * (8)), none when all have it. Chunks written while a member was missing are
 * `single`; a device added just before a power cut has left all as it was.
 * Where the profile is a person's choice, only what differs from the rest gets
 * the best that is there.
 */
export function balanceFilters(
  state: FilesystemState,
  settled: Settled = UNSETTLED,
): string[] {
  const present = state.devids.length - state.missing.length;
  const { data, metadata, system } = state.profiles;
  const all = [...data, ...metadata, ...system];
  if (present < 2 || all.some((profile) => !RANK.includes(profile))) return [];
  const { dataProfile, metadataProfile } = profilesFor(present);
  const rank = (profile: string) => RANK.indexOf(profile);
  const isSettled = state.devids.length <= settled.devices;
  const filter = (
    type: typeof CHUNKS[number],
    profiles: string[],
    ours: string,
  ) => {
    const isChosen = isSettled || settled.unmirrored.includes(type);
    const possible = profiles.map(rank).filter((each) => each <= present);
    const target = isChosen ? Math.max(0, ...possible) : rank(ours);
    if (target < rank("raid1")) return [];
    // While a member is missing nothing but what has no mirror is touched.
    const least = state.missing.length > 0 ? rank("raid1") : target;
    const old = [...new Set(profiles)].filter((each) => rank(each) < least);
    if (old.length === 0) return [];
    const letter = type[0];
    return [
      `-${letter}profiles=${old.join("|")},convert=${RANK[target]},soft`,
    ];
  };
  return [ // metadata first: it needs little room, and data leave none
    ...filter("metadata", [...metadata, ...system], metadataProfile),
    ...filter("data", data, dataProfile),
  ];
}

/** Jobs that a file keeps over a power cut. */
const PENDING = ["scrub", "remove missing"] as const;

/** That file; 1.0 had another name. */
const pendingFiles = (job: keyof Pending, paths: Paths) =>
  [`.pending-${job.replace(" ", "-")}`, `.wanted: ${job}`]
    .map((name) => join(paths.state, name));

function readPending(paths: Paths): Pending {
  const [scrub, remove] = PENDING.map((job) =>
    pendingFiles(job, paths).some(fs.existsSync)
  );
  return { scrub, "remove missing": remove };
}

function setPending(job: keyof Pending, isPending: boolean, paths: Paths) {
  const [file, ...old] = pendingFiles(job, paths);
  if (isPending) return fs.writeFileSync(file, "");
  for (const name of [file, ...old]) fs.rmSync(name, { force: true });
}

/** What is remembered from one pass to the next, also over reboots. */
interface Memory {
  /** The problems that on-health was told last. */
  told: string[];
  /** Why on-health could not be told, which is tried again. */
  untold?: string;
  /** Files that the last scrub could not repair. */
  lost?: string[];
  scrub?: ScrubMemory;
  /** How long the system had been running at the last pass. */
  uptimeSeconds?: number;
}

/**
 * In /run it also outlives a filesystem that went read-only; the copy on the
 * disk is that of the boots before.
 */
function readMemory({ memory: [inRun, onDisk] }: Paths): Memory {
  const parse = (path: string): Memory | undefined =>
    orUndefined(() => JSON.parse(readText(path) ?? ""));
  const before = parse(inRun) ??
    { ...parse(onDisk), uptimeSeconds: undefined, untold: undefined };
  return { ...before, told: before.told ?? [] };
}

function remember(paths: Paths, news: Partial<Memory>): void {
  const text = JSON.stringify({ ...readMemory(paths), ...news });
  for (const path of paths.memory) {
    if (readText(path) === text) continue;
    orUndefined(() => replaceFile(path, `${text}\n`));
  }
}

/** When the last scrub ended: by a clock that may be wrong, and by running. */
export interface ScrubMemory {
  /** Which scrub it was, 0 for none; see {@linkcode Scrubbed}. */
  startedSeconds: number;
  endedSeconds: number;
  /** How long the system has been running since. */
  ranSeconds: number;
  /** The next one is due, if the next pass finds so as well. */
  isOld: boolean;
  isDue: boolean;
}

const DAY_SECONDS = 24 * 60 * 60;
const SCRUB_EVERY_SECONDS = 35 * DAY_SECONDS;

/** This program was not there before: a clock that says so is wrong. */
const EARLIEST_SECONDS = Date.UTC(2026, 0) / 1000;

/**
 * Decides whether the next scrub is due. The clock of a machine may begin in
 * 1970, or in the future, until the network sets it right: so what it says counts
 * when it says so at two passes, and the time of running counts as well. Where
 * no scrub is known, the time begins with the first pass.
 *
 * @param startedSeconds Which scrub was the last that finished.
 */
export function judgeScrub(
  before: ScrubMemory | undefined,
  { startedSeconds = 0, nowSeconds, ranSeconds }: {
    startedSeconds?: number;
    nowSeconds: number;
    /** Since the pass before. */
    ranSeconds: number;
  },
): ScrubMemory {
  const isNew = startedSeconds !== 0 &&
    before?.startedSeconds !== startedSeconds;
  if (!before || isNew) {
    const endedSeconds = nowSeconds;
    const never = { isOld: false, isDue: false };
    return { startedSeconds, endedSeconds, ranSeconds: 0, ...never };
  }
  const ran = before.ranSeconds + ranSeconds;
  const wasWrong = before.endedSeconds < EARLIEST_SECONDS &&
    nowSeconds >= EARLIEST_SECONDS;
  const endedSeconds = wasWrong ? nowSeconds - ran : before.endedSeconds;
  const isOld = Math.max(nowSeconds - endedSeconds, ran) >= SCRUB_EVERY_SECONDS;
  return {
    ...before,
    endedSeconds,
    ranSeconds: ran,
    isOld,
    isDue: isOld && before.isOld,
  };
}

/** Lets magic disks join a whole filesystem, now or when there is time. */
function allowJoins(devices: BlockDevice[], { joining }: Paths): void {
  const allowed = listJoining(joining).concat(devices.map(joiningId));
  replaceFile(joining, `${allowed.join("\n")}\n`);
}

const listJoining = (path: string) => (readText(path) ?? "").split("\n");
const joiningId = ({ sequence, path }: BlockDevice) => sequence ?? path;

/**
 * A magic disk takes the place of a missing member at once. A whole filesystem
 * takes one that was there at a boot, or that a person lets in or moves to.
 */
function mayJoin(
  member: NewMember,
  { data, joins }: Plan,
  { missing }: FilesystemState,
  { joining }: Paths,
): boolean {
  return missing.length > 0 || member === moveTarget(data!, joins) ||
    listJoining(joining).includes(joiningId(member.device));
}

/** Starts {@linkcode maintain} in the background if there is work for it. */
function startMaintenance(plan: Plan, settings: Settings, paths: Paths) {
  if (!plan.data) return;
  if (plan.data.needsScrub) setPending("scrub", true, paths);
  allowJoins(devicesOf(plan.joins), paths);
  const state = stateOf(plan.data);
  const job = state && decideJob(plan, state, readPending(paths));
  if (!job) return;
  say("info", `In the background: ${job.what}`);
  // This very program, whatever runs it, with the same root and devices.
  const own = (readText("/proc/self/cmdline") ?? "").split("\0");
  const given = process.argv.slice(2);
  const program = own.slice(1, own.lastIndexOf("") - given.length);
  const options = ["--maintain", "--root", settings.root];
  const devices = settings.only?.map(nodeOf).join();
  if (devices) options.push("--devices", devices);
  const stdio: Stdio = ["ignore", "ignore", "ignore"];
  try {
    start([process.execPath, ...program, ...options], {
      stdio,
      detached: true,
    });
  } catch (error) {
    throw new Error(
      `Cannot start the work in the background: ${messageOf(error)}`,
    );
  }
}

/**
 * Looks once, says what is wrong, and does the long work that is due, piece by
 * piece, until nothing is left to do.
 */
export async function maintain(settings: Settings): Promise<number> {
  const paths = pathsBelow(settings.root);
  const tell = () => attempt(() => tellHealth(settings, paths));
  await attempt(() => awaitScrub(paths));
  await tell();
  let only: Lock;
  try {
    only = await takeLock(join(paths.run, "maintenance.lock"), 0);
  } catch (error) {
    if (!(error instanceof BusyError)) throw error;
    say("info", messageOf(error));
    return 0;
  }
  const done = new Set<string>();
  // A member may go, or a disk fill up, while another is copied for hours.
  const telling = setInterval(tell, HEALTH_EVERY_MS);
  try {
    while (await doNextJob(done, settings, paths));
  } finally {
    clearInterval(telling);
    fs.rmSync(paths.job, { force: true });
    only.release();
  }
  if (done.size > 0) await tell();
  return messages.errors.length > 0 ? 1 : 0;
}

const HEALTH_EVERY_MS = 60_000;

/**
 * Writes what is wrong to the health file, and calls on-health where that is not
 * what it was told last: not for another number, nor again after a reboot.
 */
async function tellHealth(settings: Settings, paths: Paths): Promise<void> {
  const lock = await takeLock(join(paths.run, "health.lock"));
  try {
    const { problems } = await readStatus(settings);
    writeHealth(problems, paths);
    const wrong = problems.filter(({ key }) => key !== UNTOLD);
    const keys = wrong.map(({ key }) => key).sort();
    const { told } = readMemory(paths);
    let untold: string | undefined;
    if (`${keys}` !== `${told}` && isExecutable(paths.onHealth)) {
      await run([paths.onHealth], {
        to: "tell a person what is wrong",
        stdin: linesOf(wrong),
        timeoutMs: TIMEOUT.hookMs,
        isGroup: true,
      }).then(
        () => remember(paths, { told: keys }),
        (error) => say("warning", untold = messageOf(error)),
      );
    }
    remember(paths, { untold });
    writeHealth([...wrong, ...judgeUntold(untold)], paths);
  } finally {
    lock.release();
  }
}

const linesOf = (problems: Problem[]) =>
  problems.map(({ text }) => `${text}\n`).join("");

function writeHealth(problems: Problem[], { health }: Paths): void {
  fs.mkdirSync(dirname(health), { recursive: true });
  replaceFile(health, linesOf(problems));
}

function isExecutable(path: string): boolean {
  return orUndefined(() => {
    fs.accessSync(path, fs.constants.X_OK);
    return fs.statSync(path).isFile();
  }) ?? false;
}

/** Counts the time to the next scrub. */
async function awaitScrub(paths: Paths): Promise<void> {
  const open = await openFilesystem(paths);
  if (!open) return;
  const { scrub, uptimeSeconds: before = 0 } = readMemory(paths);
  const uptimeSeconds = Number.parseFloat(readText("/proc/uptime") ?? "0");
  const next = judgeScrub(scrub, {
    startedSeconds: readScrub(open).startedSeconds,
    nowSeconds: Math.floor(Date.now() / 1000),
    ranSeconds: Math.floor(uptimeSeconds - before),
  });
  remember(paths, { scrub: next, uptimeSeconds });
  // One that went on when this program was killed may have ended meanwhile.
  const isDone = scrub?.isDue && next.startedSeconds !== scrub.startedSeconds;
  if (next.isDue || isDone) setPending("scrub", next.isDue, paths);
}

/** Lets the kernel move half-empty chunks together, where it can (6.11). */
function reclaimSpace({ fsid }: DataFilesystem): void {
  const file = `/sys/fs/btrfs/${fsid}/allocation/data/dynamic_reclaim`;
  if (readText(file) === "0") fs.writeFileSync(file, "1");
}

/**
 * Does one job; each only once, so that one that fails is not repeated. What
 * fails before a job is noted as done would fail again at once: it is the end.
 */
async function doNextJob(done: Set<string>, settings: Settings, paths: Paths) {
  const lock = await takeLock(join(paths.run, "lock"));
  let work: Job["work"];
  let mayGoOn = false;
  try {
    const plan = decide(await look(settings), settings);
    // Without a data filesystem no disk is touched: it may be off on purpose.
    if (plan.data) await attemptEach(plan.repairs, carryOut);
    if (done.size > 0) await attempt(() => swapOn(plan.swap)); // of a new member
    const state = plan.data && stateOf(plan.data);
    if (plan.data) orUndefined(() => reclaimSpace(plan.data!));
    if (state) {
      plan.joins = plan.joins.filter((each) =>
        mayJoin(each, plan, state, paths)
      );
    }
    if (state?.missing.length === 0) setPending("remove missing", false, paths);
    const job = state && decideJob(plan, state, readPending(paths), paths);
    if (!job || done.has(job.what)) return false;
    const { kind, what } = job;
    if (kind !== "wait") {
      done.add(what);
      mayGoOn = true;
      say("info", `Now ${what}`);
    }
    const note = { what, since: new Date().toISOString(), pid: process.pid };
    // For --status; a full /run is no reason to leave a mirror broken.
    await attempt(() => replaceFile(paths.job, JSON.stringify(note) + "\n"));
    await job.change?.();
    work = job.work;
    mayGoOn = true;
  } catch (error) {
    sayError(error);
  } finally {
    lock.release();
  }
  // Meanwhile a boot that is run again, or --enable, need not wait.
  if (work) await attempt(work);
  return mayGoOn;
}

/** Partitions a disk that joins and makes its swap; all is checked before. */
async function prepareMember(member: NewMember, data: DataFilesystem) {
  const { device } = member;
  needPrograms([device]);
  await confirm(device);
  if (device.magic) {
    const misfit = await findBusy([device]) ??
      await findTwin([device], data.members);
    assert(!misfit, `Cannot format ${device.path}: ${misfit?.why}`);
  }
  const { payload } = device;
  if (payload && payload.place !== "partition") {
    // The title stays until it has joined: without it this disk alone would be
    // made a data filesystem after a power cut.
    await changeStart(device.path, 0, [
      ...clearing(payload.place),
      (start) => {
        setFirstLines(start, PAYLOAD_TEXT.title);
        start.fill(0, 512, COPY.at);
      },
    ]);
  }
  await partitionDisk(member);
  await waitForPartitions([member]);
  await makeSwapOf(member);
}

/** A device that has just become a member, which has no record yet. */
async function newMember(device: BlockDevice): Promise<Member> {
  const btrfs = await superblockOf(device.path);
  assert(btrfs !== undefined, `Cannot find a Btrfs on ${device.path}`);
  const member = { device, swapBytes: 0, dataPath: device.path, dataBytes: 0 };
  return memberOf(member, btrfs);
}

async function addDevice(member: NewMember, { data, paths }: Situation) {
  const { device, dataPath } = member;
  await runDiscarding(
    (options) =>
      words`btrfs device add -f ${options} ${dataPath} ${paths.data}`,
    `let ${dataPath} join the data filesystem`,
  );
  const added = await newMember({ ...device, path: dataPath });
  const settled = settledOf(data.members);
  await recordMembers([...data.members, added], data.fsid, { settled });
}

/** The disk that has the header, or the partition that has the name. */
function deviceWithMagic(device: BlockDevice): BlockDevice {
  if (device.partitionName === MAGIC) return device;
  return { ...device, path: nodeOf(device.disk), kind: "disk" };
}

/** Takes records and signatures away from a device. */
async function wipe({ path, read }: BlockDevice): Promise<void> {
  for (const slot of read.recordable ? RECORD.slotsAt : []) {
    await writeBytes(path, slot, new Uint8Array(RECORD.bytes));
  }
  await run(words`wipefs --quiet --all ${path}`, { to: `wipe ${path}` });
}

async function cancelReplace(paths: Paths): Promise<void> {
  // Its status 2: there was none to cancel (btrfs-replace(8)).
  await run(words`btrfs replace cancel ${paths.data}`, {
    to: "give up a replace that lost its target",
    accept: [0, 2],
  });
}

/** Lets a device take the place of a missing one: its begin, and the rest. */
function replacement(devid: number, device: BlockDevice, situation: Situation) {
  const { data, paths } = situation;
  const { path } = device;
  const to = `let ${path} take the place of device ${devid}`;
  const begin = async () => {
    await runDiscarding(
      (options) =>
        words`btrfs replace start -f ${options} ${devid} ${path} ${paths.data}`,
      to,
    );
    // The command returns before the kernel has begun, which may also have
    // given up by now: the rest sees that.
    const giveUpAt = performance.now() + TIMEOUT.nodeMs;
    while (performance.now() < giveUpAt) {
      if ((await superblockOf(path))?.fsid === data.fsid) {
        const members = [...data.members, await newMember(device)];
        const settled = settledOf(data.members);
        return void await recordMembers(members, data.fsid, { settled });
      }
      await sleep(50);
    }
  };
  // Hours may have gone by since anybody has looked.
  const beginLater = async (prepare = () => confirm(device)) => {
    const lock = await takeLock(join(paths.run, "lock"));
    try {
      if (leavingMember(data, "move")) await confirmLeaving(data);
      await prepare();
      await begin();
    } finally {
      lock.release();
    }
  };
  // It fails where the kernel finds no room to set a block group read-only;
  // chunks that are packed more tightly leave room.
  const finish = async () => {
    for (let packed = false;; packed = true) {
      await waitForOperation(data);
      const found = await superblockOf(path);
      if (found?.fsid === data.fsid && found.devid === devid) {
        await growFilesystem([await newMember(device)], paths);
        return await clearMagic(deviceWithMagic(device));
      }
      assert(
        !packed,
        `Cannot ${to}: the kernel gave up (see dmesg): replace the disk if ` +
          `it has errors, delete something if there is too little free ` +
          `space, then reboot`,
      );
      await cancelReplace(paths);
      await packChunks(paths); // may take hours, and nothing holds the disk
      await beginLater();
    }
  };
  return { begin, beginLater, finish };
}

/**
 * Makes sure that each device has space for new chunks, if need be by moving
 * some to the device that was added. Where all is allocated, Linux 6.18 was
 * seen to abort a conversion with ENOSPC: the filesystem went read-only.
 */
async function makeRoom(paths: Paths): Promise<void> {
  for (let moved = 0; moved < 8; moved++) {
    const devices = [...await readUsages(paths)];
    const chunkBytes = largestChunkBytes(devices.map(([, d]) => d.sizeBytes));
    const mostBytes = Math.max(
      ...devices.map(([, { freeBytes }]) => freeBytes),
    );
    const [full] = devices.find(([, d]) => d.freeBytes < chunkBytes) ?? [];
    if (!full || mostBytes < 2 * chunkBytes) return;
    const filter = `-ddevid=${full},profiles=single,limit=1`;
    await run(words`btrfs balance start ${filter} ${paths.data}`, {
      to: `make room on device ${full}`,
      accept: [0, 1],
      timeoutMs: Infinity,
    });
  }
}

/** How much of each device is allocated, by devid (btrfs-device(8), usage). */
async function readUsages({ data }: Paths) {
  const usage = await ask(words`btrfs device usage --raw ${data}`, {
    to: `see how much of each device is allocated`,
  });
  const block =
    /ID: (\d+)\s+Device size:\s+(\d+)([^]*?)Unallocated:\s+(-?\d+)/g;
  return new Map(
    [...usage.matchAll(block)].map(([, devid, size, chunks, free]) => [
      Number(devid),
      {
        sizeBytes: Number(size),
        freeBytes: Number(free),
        allocatedBytes: sum(
          [...chunks.matchAll(/,\w+: +(\d+)$/gm)].map(([, n]) => Number(n)),
        ),
      },
    ]),
  );
}

/** Moves what is in half-empty chunks together, if there is room even so. */
async function packChunks(paths: Paths): Promise<void> {
  await run(words`btrfs balance start -dusage=85 ${paths.data}`, {
    to: `make room on "${paths.data}"`,
    accept: [0, 1],
    timeoutMs: Infinity,
  });
}

// ---------------------------------------------------------------------------
// --enable and --disable.
// ---------------------------------------------------------------------------

/** A device that a person names, and all that is on its disk. */
interface Target {
  /** An image file is a disk whose name is empty. */
  device: BlockDevice;
  devices: BlockDevice[];
}

/**
 * Makes devices magic, to be formatted at the next boot: all of them or none.
 *
 * Options: `now` lets them join the data filesystem at once, `file` has a
 * payload.
 */
async function enable(
  paths: string[],
  { force, now, file }: { force: boolean; now: boolean; file?: string },
  settings: Settings,
) {
  paths = [...new Set(paths)];
  const payload = file === undefined ? undefined : readPayloadFile(file);
  const names = paths.map((path) => nameAt(path) ?? "");
  for (const [i, name] of names.entries()) {
    const disk = wholeDisk(name);
    if (disk === name || !names.includes(disk)) continue;
    refuse(
      `Cannot enable ${paths[i]}: its whole disk is to be enabled as well`,
    );
  }
  if (now) await findRunning(settings, "Cannot enable a disk with --now");
  const targets: Target[] = [];
  for (const path of paths) {
    const target = await targetAt(path);
    const refusal = await whyNotTaken(target, force) ??
      await whyNoPlaceFor(payload, target, pathsBelow(settings.root)) ??
      (now ? await whyNotJoined(target, settings) : undefined);
    if (refusal) refuse(`Cannot enable ${path}: ${refusal}`);
    targets.push(target);
  }
  const { data } = decide(await look(settings), settings);
  const isAwaited = !now && data && (stateOf(data)?.missing.length ?? 0) > 0;
  if (isAwaited && names.some(Boolean)) {
    console.log(
      `The data filesystem lacks a device: within the hour what is enabled is ` +
        `formatted and takes its place (until then persistence.ts --disable ` +
        `takes that back${force ? ", but not what --force wipes" : ""})`,
    );
  }
  const done: string[] = [];
  const isAsAsked = (target: Target) =>
    isEnabled(target) && target.device.payload?.sum === payload?.sum;
  try {
    for (const [i, target] of targets.entries()) {
      const path = paths[i];
      if (isAsAsked(target) && !force) {
        console.log(`${path} is enabled already`);
        continue;
      }
      done.push(path);
      const room = payload ? PAYLOAD_TEXT.roomBytes : 512;
      const before = await readBytes(path, 0, room);
      await makeMagic(target, force, payload);
      assert(
        isAsAsked(await targetAt(path)),
        `Cannot read the magic back from ${path}: the disk may be broken`,
      );
      const writes = payload?.entries.map(({ name }) => `\n  ${name}`) ?? [];
      const what = payload
        ? `, with a payload:${writes.join("")}`
        : target.device.payload
        ? "; the payload that it had is erased (--with FILE gives it one)"
        : "";
      const isWiped = partsOf(target.device, target.devices).some(holdsData);
      const loss = isWiped ? `; the data filesystem on it is wiped` : "";
      console.log(`${path} is enabled${loss}${what}`);
      if (now) continue;
      const after = await readBytes(path, 0, room);
      for (const undo of howToUndo(target, before, after)) console.log(undo);
    }
  } catch (error) { // half a mirror would become a single disk
    await attemptEach(done, async (path) => takeMagic(await targetAt(path)));
    throw error;
  }
  if (!names.some(Boolean)) return;
  if (now) return await startNow(settings, names);
  const seen = listDevices(settings).map(({ name }) => name);
  const unseen = paths.filter((_, i) => names[i] && !seen.includes(names[i]));
  for (const path of unseen) {
    console.log(`A boot looks at ${path} only where --devices names it`);
  }
  console.log(`${isAwaited ? "Within the hour, or a" : "A"}t the next boot:`);
  await dryRun(settings);
}

/** Says how to put back what was overwritten, until a boot formats the disk. */
function* howToUndo(
  { device }: Target,
  before: Uint8Array,
  after: Uint8Array,
): Generator<string> {
  const { kind, disk, number, partitionName = "" } = device;
  const quoted = (text: string) => `'${text.replaceAll("'", `'\\''`)}'`;
  const path = quoted(resolve(device.path));
  const isLost = partitionName !== MAGIC && !/\p{Cc}/u.test(partitionName);
  if (kind === "partition" && isLost) {
    yield `  To give it its old name back, before the next boot:\n  sfdisk ` +
      `--part-label ${nodeOf(disk)} ${number} ${quoted(partitionName)}`;
  }
  const isCleared = parseStart(after).payloadPlace !== undefined;
  const length = 1 +
    before.findLastIndex((byte, i) =>
      byte !== after[i] && (byte !== 0 || !isCleared)
    );
  const lost = before.subarray(0, length);
  // A header may have had a payload, which is nobody's business.
  if (isZero(lost) || parseStart(before).header) return;
  if (length > 4 * KiB) {
    return yield `  What stood in its first ${length} bytes is lost`;
  }
  const octal = Array.from(
    lost,
    (byte) => "\\" + byte.toString(8).padStart(3, "0"),
  ).join("");
  const clear = isCleared ? `persistence.ts --disable ${path}; ` : "";
  yield `  To put back what stood in its first ${length} bytes, before the ` +
    `next boot:\n  ${clear}printf '${octal}' | dd of=${path} conv=notrunc`;
}

/** Lists what is on a target; why it must not become magic. */
async function whyNotTaken(target: Target, force: boolean) {
  const held = await listContents(target);
  return await whyNotEnabled(target) ??
    (held && !force && !isEnabled(target)
      ? `it holds ${held}: use --force to give that up, for ever`
      : undefined);
}

/** Why a target would not join what is mounted, if it were magic. */
async function whyNotJoined({ device }: Target, settings: Settings) {
  if (!device.disk) return "an image file joins nothing: attach it as a disk";
  const facts = await look(settings, device.disk);
  const found = facts.devices.find(({ name }) => name === device.name);
  if (!found) return "it is looked at only where --devices names it";
  for (const part of partsOf(found, facts.devices)) {
    part.holds = { kind: "nothing of ours" };
  }
  found.magic = true;
  const plan = decide(facts, settings);
  if (plan.joins.some((member) => member.device === found)) return undefined;
  return plan.notes.find(({ text }) => text.includes(`${found.path} `))?.text ??
    "the data filesystem does not take it";
}

/** The data filesystem that is mounted, or a refusal. */
async function findRunning(settings: Settings, cannot: string) {
  const facts = await look(settings);
  const plan = decide(facts, settings);
  const state = plan.data && stateOf(plan.data);
  if (plan.data && state) return { plan, data: plan.data, state };
  const { source = "", fsid } = facts.mounted ?? {};
  refuse(
    fsid
      ? `${cannot}: --devices does not name ${source}, which holds the data`
      : `${cannot}: no data filesystem is mounted (see --status)`,
  );
}

/** Starts the work that a boot would start, and says what happens. */
async function startNow(settings: Settings, joining: string[] = []) {
  const plan = decide(await look(settings), settings);
  plan.joins = plan.joins.filter(({ device }) => joining.includes(device.name));
  startMaintenance(plan, settings, pathsBelow(settings.root));
  console.log("It goes on in the background: see persistence.ts --status");
}

// ---------------------------------------------------------------------------
// --move and --remove.
// ---------------------------------------------------------------------------

/** Moves the data of a member to another disk, while the system runs. */
async function move(
  [from, to]: string[],
  force: boolean,
  settings: Settings,
): Promise<void> {
  const cannot = `Cannot move ${from} to ${to}`;
  const { plan, data, member } = await findMember(from, cannot, settings);
  const target = await targetAt(to);
  const { device } = target;
  const { name, path } = device;
  const others = data.members.filter((other) => other !== member);
  if (data.members.some((other) => other.name === name)) {
    refuse(`${cannot}: ${to} is a member of the data filesystem already`);
  }
  if (device.disk === member.disk) {
    refuse(`${cannot}: both are on the same disk`);
  }
  const waiting = devicesOf(plan.joins)
    .find((other) => other.name !== name);
  if (waiting) {
    refuse(
      `${cannot}: ${waiting.path} is enabled and joins first (let it: ` +
        `reboot, or take that back with --disable)`,
    );
  }
  const sizeBytes = layOut(device, readMemoryBytes(), settings.noSwap)
    .dataBytes;
  const bytes = readUsage(data);
  const fits = (sizeBytes: number) =>
    whyNotHeld(data, bytes, [...sizesOf({ members: others }), sizeBytes]);
  const problem = sizeBytes < member.holds.btrfs.deviceBytes
    ? fits(sizeBytes)
    : undefined;
  const refusal = await whyNotTaken(target, force) ??
    (problem && `it has ${inMiB(sizeBytes)} for data, and ${problem}: ` +
        `${
          inMiB(Math.min(leastBytes(fits), member.holds.btrfs.deviceBytes))
        } would do`);
  if (refusal) refuse(`${cannot}: ${refusal}`);
  const { hardware = "" } = device;
  const leaving = { member: idOf(member)!, how: "move" as const, to: hardware };
  await tellToLeave(data, leaving);
  try {
    await makeMagic(target, false);
    assert(
      isEnabled(await targetAt(to)),
      `Cannot read the magic back from ${to}: the disk may be broken`,
    );
  } catch (error) {
    await attempt(() => tellToLeave(data, null));
    await attempt(() => takeMagic(target));
    throw error;
  }
  console.log(
    `The data of ${member.path} move to ${path}, while the system runs; then ` +
      `${member.path} is wiped and can be pulled`,
  );
  await startNow(settings, [name]);
}

/** Lets a member leave: at once where two others stay, else at a boot. */
async function remove([path]: string[], settings: Settings): Promise<void> {
  const cannot = `Cannot remove ${path}`;
  const { data, state, member } = await findMember(path, cannot, settings);
  const others = data.members.filter((other) => other !== member);
  if (others.length === 0) {
    refuse(
      `${cannot}: it is the only disk that holds the data (--move OLD NEW ` +
        `moves them to another)`,
    );
  }
  if (balanceFilters(state, settledOf(data.members)).length > 0) {
    refuse(`${cannot}: not all chunks are mirrored yet (see --status)`);
  }
  const all = Object.values(state.profiles).flat();
  const other = all.find((profile) => !MIRRORED.includes(profile));
  if (other) refuse(`${cannot}: some data have the profile "${other}"`);
  const problem = whyNotHeld(
    data,
    readUsage(data),
    sizesOf({ members: others }),
  );
  if (problem) {
    refuse(`${cannot}: ${pathsOf(others)} would hold all: ${problem}`);
  }
  await tellToLeave(data, { member: idOf(member)!, how: "remove" });
  if (others.length > 1) {
    console.log(
      `${member.path} hands its data to the other members, while the system ` +
        `runs; then it is wiped and can be pulled`,
    );
    return await startNow(settings);
  }
  console.log(
    `At the next boot ${member.path} is left out, and ${
      pathsOf(others)
    } gets ` +
      `all. Then ${member.path} is wiped and can be pulled. Until then ` +
      `--remove --cancel takes it back`,
  );
}

/** Takes back what was asked for by --move or --remove. */
async function cancelLeaving(settings: Settings): Promise<void> {
  const cannot = "Cannot take anything back";
  const { plan, data, state } = await findRunning(settings, cannot);
  const { leaving, leaver } = data;
  const target = moveTarget(data, plan.joins)?.device;
  const isThere = leavingMember(data) !== undefined;
  if (!leaving || (!isThere && !leaver && data.missing === 0)) {
    refuse(`${cannot}: no disk was told to leave`);
  }
  const { operation } = state;
  if (!isThere && data.missing === 0) {
    refuse(
      `${cannot}: ${leaver?.path} has left already (--enable lets it join again)`,
    );
  }
  if (!["none", "balance", "resize"].includes(operation)) {
    refuse(`${cannot}: the ${operation} goes on (see --status)`);
  }
  const paths = pathsBelow(settings.root);
  await tellToLeave(data, null);
  if (target) await takeMagic({ device: target, devices: [] });
  await run(words`btrfs balance cancel ${paths.data}`, {
    to: "stop the work that was begun",
    accept: [0, 1, 2], // 2: there is none (btrfs-balance(8))
  });
  await run(words`btrfs scrub cancel ${paths.data}`, {
    to: "stop the work that was begun",
    accept: [0, 1, 2],
  });
  const also = target
    ? `, and ${target.path} is not enabled any more`
    : isThere
    ? ""
    : `: ${leaver?.path ?? "the disk"} missed writes and is rebuilt`;
  console.log(`Nothing leaves the data filesystem${also}`);
  await startNow(settings);
}

/** A member that a person names, of a filesystem that is whole and at rest. */
async function findMember(path: string, cannot: string, settings: Settings) {
  const found = await findRunning(settings, cannot);
  const { data, state } = found;
  const name = nameAt(path) ?? refuse(whyNoDevice(path));
  const onDisk = data.members.filter(({ disk }) => disk === name);
  const member = data.members.find((member) => member.name === name) ??
    (onDisk.length === 1 ? onDisk[0] : undefined) ??
    refuse(
      `${cannot}: ${path} is no member of the data filesystem, which is on ` +
        pathsOf(data.members),
    );
  if (data.missing > 0 || state.missing.length > 0) {
    refuse(`${cannot}: the data filesystem lacks a device (see --status)`);
  }
  const note = readJob(pathsBelow(settings.root));
  const busy = state.operation !== "none" ? state.operation : note?.what;
  if (busy) refuse(`${cannot}: other work goes on first (${busy})`);
  const leaving = leavingMember(data);
  if (leaving) {
    refuse(
      `${cannot}: ${leaving.path} was told to leave, and has not left yet ` +
        `(--remove --cancel takes that back)`,
    );
  }
  if (!idOf(member)) {
    refuse(
      `${cannot}: ${member.path} has no record of ours by which it could be ` +
        `told from others (is something else at its byte 57344?)`,
    );
  }
  return { ...found, member };
}

/** Has all members remember who is to leave. */
async function tellToLeave(
  { members, fsid }: DataFilesystem,
  leaving: Leaving | null,
) {
  // What --remove converts before --remove --cancel gets its profile again.
  const settled = { ...settledOf(members), devices: 0 };
  const failed = await recordMembers(members, fsid, { leaving, settled });
  if (failed.length > 0 && leaving) {
    const told = members.filter((member) => !failed.includes(member));
    await attempt(() => recordMembers(told, fsid, { leaving: null }));
  }
  assertRecorded(failed);
}

/** What is used, each byte counted once. */
function readUsage({ fsid }: Mounted) {
  const [data, metadata, system] = ["data", "metadata", "system"].map((type) =>
    Number(readText(`/sys/fs/btrfs/${fsid}/allocation/${type}/bytes_used`) ?? 0)
  );
  return { data, metadata: metadata + system };
}

/**
 * Why devices of these sizes cannot hold what is used, with a chunk of each kind
 * to spare; undefined if they can.
 */
export function whyNotHeld(
  data: DataFilesystem,
  used: ReturnType<typeof readUsage>,
  sizesBytes: number[],
): string | undefined {
  const spareBytes = 3 * largestChunkBytes(sizesBytes) + 64 * MiB;
  if (sizesBytes.length > 1) {
    const smallest = Math.min(...sizesBytes);
    return smallest < spareBytes
      ? `${inMiB(spareBytes)} are needed for a chunk of each kind`
      : whyNotMirrored(data, sizesBytes, spareBytes);
  }
  const neededBytes = used.data + 2 * used.metadata + spareBytes;
  if (sizesBytes[0] >= neededBytes) return undefined;
  return `${inMiB(used.data + 2 * used.metadata)} are used, with ` +
    `${inMiB(spareBytes)} to spare for new chunks`;
}

/** The smallest size that would do, in whole MiB. */
export function leastBytes(whyNot: (bytes: number) => unknown): number {
  let [low, high] = [0, MiB];
  while (whyNot(high) && high < 2 ** 50) [low, high] = [high, 2 * high];
  while (high - low > MiB) {
    const middle = Math.floor((low + high) / 2 / MiB) * MiB;
    if (whyNot(middle)) low = middle;
    else high = middle;
  }
  return high;
}

/** A payload that a file has, to be written. */
type GivenPayload = Payload & { text: Buffer; sum: number };

function readPayloadFile(path: string): GivenPayload {
  try {
    const stat = fs.statSync(path, { throwIfNoEntry: false });
    assert(stat !== undefined, "there is no such file");
    assert(stat.isFile(), "it is no regular file"); // a device may have no end
    const bytes = fs.readFileSync(path);
    const payload = parsePayload(bytes.subarray(0, PAYLOAD_TEXT.roomBytes));
    const { bodyBytes, endBytes, crlf } = payload;
    const rest = bytes.subarray(endBytes).toString("latin1");
    const lines = bytes.subarray(0, endBytes + rest.search(/\S/))
      .toString("latin1").split("\n").length;
    refuseLine(lines, rest.trim() && `text behind "${PAYLOAD_TEXT.end}"`);
    const newline = crlf ? "\r\n" : "\n";
    const text = Buffer.concat([
      Buffer.from(PAYLOAD_TEXT.title + newline),
      bytes.subarray(bodyBytes, endBytes),
      Buffer.from(newline),
    ]);
    const end = text.length - newline.length;
    const sum = (crc32(text.subarray(0, end)) ^ BLIND) >>> 0;
    return { ...payload, text, sum };
  } catch (error) {
    refuse(`Cannot use the payload "${path}": ${messageOf(error)}`);
  }
}

/** Why a payload, or none, cannot be written for a device, or not applied. */
async function whyNoPlaceFor(
  payload: GivenPayload | undefined,
  { device, devices }: Target,
  paths: Paths,
) {
  const problem = payload && device.disk &&
    whyNotApplied(payload.entries, paths);
  if (problem) return `its payload cannot be used: ${problem}`;
  const holders = holdersOf(device, devices);
  const hasNone = !payload && holders.length === 0;
  if (device.kind !== "partition" || hasNone) return undefined;
  const [holder] = holders;
  if (holders.length !== 1) {
    return `its payload goes into a partition of its disk with the GPT name ` +
      `"${PAYLOAD}", and there are ${holders.length} (sfdisk --part-label)`;
  }
  const { path, inUse, readOnly, sizeBytes } = holder;
  if (inUse || readOnly) return `${path} is ${inUse ?? "read-only"}`;
  if (sizeBytes < Math.max(4 * KiB, payload?.text.length ?? 0)) {
    return `${path} is too small for its payload`;
  }
  const start = startOf(holder);
  const first = await readBytes(start.path, start.atBytes, 4 * KiB);
  if (!isZero(first) && !isPayloadText(first)) {
    return `${path} holds something else than a payload (wipefs --all, or ` +
      `zeros at its start, give that up)`;
  }
}

/** Takes the magic away again. */
async function disable(paths: string[]): Promise<void> {
  for (const path of paths) {
    const target = await targetAt(path);
    const { readOnly, magic, payload } = target.device;
    if (!magic && !payload) {
      console.log(`${path} is not enabled`);
      continue;
    }
    if (readOnly) refuse(`Cannot disable ${path}: it is read-only`);
    await takeMagic(target);
    assert(
      !(await targetAt(path)).device.magic,
      `Cannot take the magic away from ${path}: it is still there`,
    );
    const { kind, disk, number } = target.device;
    const end = kind === "partition"
      ? ` (its name before --enable is not put back: "sfdisk --part-label ` +
        `${nodeOf(disk)} ${number} NAME" gives it one)`
      : ` (zeros stand where the header was: what --enable overwrote there is ` +
        `not put back)`;
    console.log(`${path} is disabled${end}`);
  }
}

async function targetAt(path: string): Promise<Target> {
  const stat = orUndefined(() => fs.statSync(path));
  if (stat?.isFile()) return await imageAt(path, stat.size);
  const name = nameAt(path) ?? refuse(whyNoDevice(path));
  const disk = wholeDisk(name);
  const { devices } = await look({ ...defaultSettings, only: [disk] }, disk);
  const device = devices.find((device) => device.name === name) ?? refuse(
    `Cannot use "${path}": it has no medium, or is no disk or partition`,
  );
  const { error } = device.read;
  assert(!error, `Cannot enable or disable ${path}: ${error}`);
  device.payload = await findPayload(device, devices);
  return { device, devices };
}

/** An image file and its partitions, which the kernel does not know. */
async function imageAt(path: string, sizeBytes: number): Promise<Target> {
  const start = await readBytes(path, 0, START_BYTES);
  const image = {
    path,
    kind: "disk",
    disk: "",
    sizeBytes,
    read: parseStart(start),
    signatures: await listSignatures({ path }),
    magic: parseStart(start).header,
    holds: { kind: "nothing of ours" },
  } as BlockDevice;
  image.payload = await findPayload(image, [image]);
  const read: Read = (at, length) => readBytes(path, at, length);
  const gpt = await readGptAt(512, 512, read) ??
    await readGptAt(4 * KiB, 4 * KiB, read);
  const hasMbr = mbrTypes(start).length > 0 && !isProtectiveMbr(start);
  const inMbr = (at: number, field: number) =>
    512 * viewOf(start).getUint32(at + field, true);
  const entries = gpt?.partitions ??
    (hasMbr ? MBR.entriesAt : []).map((at, i) => ({
      number: i + 1,
      name: "",
      startBytes: inMbr(at, MBR.first),
      sizeBytes: inMbr(at, MBR.sectors),
    })).filter(({ sizeBytes }) => sizeBytes > 0);
  const devices = [image];
  for (const entry of entries) {
    devices.push({
      ...image,
      ...entry,
      entry,
      path: `${path} (partition ${entry.number})`,
      read: parseStart(new Uint8Array()),
      signatures: await probe(path, entry),
    });
  }
  return { device: image, devices };
}

/** Why a path leads to no block device. */
function whyNoDevice(path: string): string {
  const stat = orUndefined(() => fs.statSync(path));
  const why = !stat
    ? "there is no such device (lsblk --paths lists all)"
    : stat.isFile()
    ? "it is a file; attach it and name its loop device (losetup --find " +
      `--show --partscan "${path}")`
    : "it is neither a block device nor an image file (lsblk --paths lists all)";
  return `Cannot use "${path}": ${why}`;
}

/** It is magic, and no data will win over that. */
function isEnabled({ device, devices }: Target): boolean {
  return device.magic && !partsOf(device, devices).some(holdsData);
}

/** Data that would win over the magic at the next boot. */
function holdsData({ holds }: BlockDevice): boolean {
  return (holds.kind === "member" && holds.btrfs.label === DATA) ||
    (holds.kind === "suspect" && holds.labelled);
}

/**
 * Makes a target magic, and wipes data that would win over that. A payload is
 * there before the magic is: a power cut leaves all of it enabled, or nothing.
 */
async function makeMagic(
  target: Target,
  anyway: boolean,
  payload?: GivenPayload,
) {
  const { device, devices } = target;
  const isOnDisk = payload && device.kind === "disk";
  if (device.payload || (isOnDisk && device.magic)) await takeMagic(target);
  if (payload && !isOnDisk) {
    const { path, atBytes } = startOf(holdersOf(device, devices)[0]);
    await changeStart(path, atBytes, [(start) => start.set(payload.text)]);
  }
  if (!isOnDisk) await setMagic(device, MAGIC, anyway);
  const parts = partsOf(device, devices).filter(holdsData);
  const disk = devices.find(({ name }) => name === device.disk);
  if (disk && parts.some(({ entry }) => entry)) {
    if (disk.read.gpt?.lost) await restoreTable(disk);
    await showPartitions(disk, disk.read.gpt);
  }
  for (const part of parts) {
    await wipe(part);
    // libblkid does not see a damaged superblock.
    if (part.read.btrfs?.intact !== false) continue;
    const zeros = new Uint8Array(BTRFS.bytes);
    await writeBytes(part.path, BTRFS.superblockAt, zeros);
  }
  if (!isOnDisk) return;
  const lines = `${MAGIC}\n${anyway ? `${ANYWAY}\n` : ""}`;
  const text = Buffer.concat([Buffer.from(lines), payload.text]);
  await changeStart(device.path, 0, [
    (start) => start.set(text.subarray(512), 512),
    (start) => start.set(text.subarray(0, 512)),
  ]);
}

async function takeMagic({ device }: Target): Promise<void> {
  await erasePayload(device);
  await setMagic(device, device.read.btrfs?.label === DATA ? DATA : "");
}

/** Why a target must not become magic, whatever is forced. */
async function whyNotEnabled({ device, devices }: Target) {
  if (!device.disk) return await whyImageNotEnabled({ device, devices });
  const parts = partsOf(device, devices);
  const whole = devices.find(({ name }) => name === device.disk);
  const all = whole ? [...parts, whole] : parts;
  const user = all.find(({ inUse }) => inUse);
  if (user) return `${user.path} is ${user.inUse}`;
  const doubt = whyTableIsDoubted(device, devices);
  if (doubt) return doubt;
  if (device.readOnly) return "it is read-only";
  if (device.kind === "volume") {
    return "the magic header counts on whole disks only, not on md or " +
      "device-mapper volumes";
  }
  if (await isSystemSource(parts)) return "the running system came from it";
  const other = all.find((other) => other.magic && other !== device);
  if (other) return `${other.path} is enabled (--disable it first)`;
  if (layOut(device, 0, true).dataBytes < MINIMUM_DATA_BYTES) {
    return `it is too small (${inMiB(device.sizeBytes)}; Btrfs needs ` +
      `${inMiB(MINIMUM_DATA_BYTES)} for data)`;
  }
  const gpt = whole?.read.gpt;
  if (device.kind === "partition" && gpt?.sectorBytes !== device.sectorBytes) {
    return gpt
      ? `the partition table of ${whole?.path} was made for other sectors`
      : `the magic partition name needs a GPT, and ${whole?.path} has ` +
        `another partition table`;
  }
  const fixed = whyPartitionStays(device, whole);
  if (fixed) return fixed;
  const busy = await findBusy([device]);
  if (busy) return busy.why;
  for (const part of parts) {
    const path = await findOpenTwin(part);
    if (path) return `it is the same disk as ${path}, or a fresh copy of it`;
  }
}

/** Does the kernel's command line name one of these as the root? */
async function isSystemSource(parts: BlockDevice[]): Promise<boolean> {
  const [, root = ""] = /.*(?:^|[\s"])root="?([^\s"]+)/s
    .exec(readText("/proc/cmdline") ?? "") ?? [];
  const [token] = /(PART)?(UUID|LABEL)=[^/]*/.exec(root) ?? [];
  if (!token) return parts.some(({ name }) => name === nameAt(root));
  const { stdout } = await run(
    words`blkid --cache-file /dev/null --output device --match-token
      ${token.replace(/(?<=^PARTUUID=).*/, (id) => id.toLowerCase())}
      ${parts.map(({ path }) => path)}`,
    { to: `find ${root}`, accept: [0, 2], capture: true }, // 2: none has it
  );
  return stdout !== "";
}

/** An open member with the same superblock: perhaps another path to it. */
async function findOpenTwin({ disk, read: { btrfs } }: BlockDevice) {
  for (const name of listDirectory(`/sys/fs/btrfs/${btrfs?.fsid}/devices`)) {
    const found = await superblockOf(nodeOf(name));
    const isSame = found?.devid === btrfs?.devid &&
      found?.generation === btrfs?.generation;
    if (isSame && wholeDisk(name) !== disk) return nodeOf(name);
  }
}

/** Formats of files that are no raw images, by their first and last sectors. */
const FILE_FORMATS = {
  qcow2: "^QFI\xfb",
  VMDK: "^(KDMV|COWD|# Disk DescriptorFile)",
  VDI: "^.{64}\x7f\x10\xda\xbe",
  VHDX: "^vhdxfile",
  VHD: "^(.{512})?conectix",
  QED: "^QED\0",
  Parallels: "^(WithoutFreeSpace|WithouFreSpacExt)",
  EWF: "^EVF\t\r\n",
  Bochs: "^Bochs Virtual HD Image",
  DMG: "^.{512}koly",
  VMA: "^VMA\0",
  WIM: "^MSWIM\0",
  partclone: "^partclone-image",
  "sparse Android": "^:\xff&\xed",
  gzip: "^\x1f\x8b",
  xz: "^\xfd7zXZ\0",
  zstd: "^[(]\xb5/\xfd",
  bzip2: "^BZh",
  lz4: '^\x04"M\x18',
  lzop: "^\x89LZO\0",
  lzma: "^]\0\0.\0",
  lzip: "^LZIP",
  "7z": "^7z\xbc\xaf",
  rar: "^Rar!",
  zip: "^PK\x03\x04",
  tar: "^.{257}ustar",
};

async function whyImageNotEnabled({ device, devices }: Target) {
  const { path, sizeBytes, magic } = device;
  const { dev, ino } = fs.statSync(path);
  const user = listDirectory("/sys/class/block")
    .find((name) => readIdentity(name).hardware === `${IMAGE}${dev}:${ino}`);
  if (user) return `it is in use by ${nodeOf(user)}`;
  const first = await readBytes(path, 0, 512);
  const last = await readBytes(path, Math.max(0, sizeBytes - 512), 512);
  const sectors = Buffer.concat([first, last]);
  for (const [format, pattern] of Object.entries(FILE_FORMATS)) {
    if (!new RegExp(pattern, "s").test(sectors.toString("latin1"))) continue;
    return `it is a ${format} file, and only a raw image can begin with the ` +
      `header (unpack it, or qemu-img convert -O raw makes one)`;
  }
  if (sizeBytes < MiB) {
    return "it is too small for the image of a disk" +
      (magic || isZero(sectors)
        ? " (truncate -s 20G makes it larger, and may do so again later)"
        : "");
  }
  const labels = devices.flatMap((part) => part.signatures ?? [])
    .map(({ label }) => label);
  if (labels.includes(DATA)) {
    return `the data of a "${DATA}" in it would win over the header (make a ` +
      `new file; or enable its loop device: losetup --find --show --partscan)`;
  }
  try {
    fs.closeSync(fs.openSync(path, "r+"));
  } catch (error) {
    return messageOf(error);
  }
}

/** Prints what is on a target; returns what would be lost, if anything. */
async function listContents({ device, devices }: Target): Promise<string> {
  const { kind, disk } = device;
  const model = ["vendor", "model"]
    .map((name) => readSysfs(disk, `device/${name}`)?.trim()).filter(Boolean);
  const what = disk ? [kind, ...model].join(" ") : "image file";
  const held: string[] = [];
  for (const part of partsOf(device, devices)) {
    const { path, sizeBytes, read } = part;
    const holds = read.error ?? await describeContents(part);
    const named = part === device ? `${path}: ${what},` : `  ${path}:`;
    console.log(`${named} ${inMiB(sizeBytes)}, ${holds ?? "seems empty"}`);
    if (holds) held.push(part === device ? holds : `${path} (${holds})`);
  }
  return held.join(", ");
}

/** What a device holds. An encrypted disk shows by data in its first MiB. */
async function describeContents(device: BlockDevice) {
  const { signatures = [], read, path, entry, holds } = device;
  if (holds.kind === "member" && holds.btrfs.label === DATA) {
    return `the data filesystem "${DATA}" ${holds.btrfs.fsid}`;
  }
  const found = describeSignatures(signatures);
  if (found || entry) return found || undefined;
  const start = await readBytes(path, 0, MiB);
  const lines = read.header ? MAGIC + (read.anyway ? `\n${ANYWAY}\n` : "") : "";
  if (read.payloadPlace) {
    for (const step of clearing(read.payloadPlace)) step(start);
    start.fill(0, 0, titleEnd(start));
  }
  start.fill(0, 0, lines.length);
  if (!isZero(start)) return UNKNOWN;
  return read.payloadPlace ? "a payload" : undefined;
}

// ---------------------------------------------------------------------------
// --status and --dry-run.
// ---------------------------------------------------------------------------

/** What `--status --json` prints; what is wrong are sentences in `health`. */
export type Status = Awaited<ReturnType<typeof readStatus>>;

/** Collects what is mounted where, from what, and how healthy it is. */
async function readStatus(settings: Settings) {
  const { root } = settings;
  const paths = pathsBelow(root);
  const base = mountedOn(paths.data);
  const open = await openFilesystem(paths);
  const state = open && stateOf(open);
  const targets = [paths.data, paths.state, paths.snapshots]
    .concat(OVERLAYS.map((name) => join(root, name)));
  const memory = readMemory(paths);
  const status = {
    mode: base ? modeOf(base, paths) : "none",
    uuid: open?.fsid ?? null,
    label: open ? readText(`/sys/fs/btrfs/${open.fsid}/label`) ?? null : null,
    isReadOnly: base?.superOptions.includes("ro") ?? false,
    profiles: state?.profiles ?? null,
    devices: state?.devids.map((devid) => {
      const member = open?.members
        .find(({ holds }) => holds.btrfs.devid === devid);
      return {
        path: member?.path ?? null,
        devid,
        sizeBytes: member?.holds.btrfs.deviceBytes ?? null,
        missing: state.missing.includes(devid),
        errors: state.errors[devid] ?? {},
      };
    }) ?? [],
    mounts: readMounts().filter(({ target }) => targets.includes(target))
      .map(({ target, source, type }) => ({ target, source, type })),
    space: base ? readSpace(paths.data) : null,
    metadataSpace: open?.members.length ? readMetadataSpace(open) : null,
    swap: readSwaps(),
    work: state ? await readWork(state, paths) : [],
    isDockerHeldBack: base?.type === "tmpfs" && isHeldBack(paths),
    leaving: open?.members.length ? describeLeaving(open) : null,
    left: null as string | null,
    scrub: open ? describeScrub(open, memory) : null,
    next: null as string | null,
    problems: [] as Problem[],
    payload: readApplied(paths),
    health: [] as string[],
    notes: [] as string[],
    lastBoot: readReport(paths) ?? null,
  };
  const settled = open && settledOf(open.members);
  const facts = state && await look(settings);
  const plan = facts && decide(facts, settings);
  if (plan) status.next = describeNext(plan, state, memory, paths);
  status.left = readLeft(paths, facts?.devices);
  status.problems.push(
    ...judgeHealth(status, state, settled, plan),
    ...judgeUntold(memory.untold),
  );
  status.health.push(...status.problems.map(({ text }) => text));
  status.notes.push(...listNotes(status, state, settled));
  return status;
}

/** The data filesystem in use, with the members that can be read. */
async function openFilesystem(paths: Paths): Promise<Mounted | undefined> {
  const base = mountedOn(paths.data);
  const fsid = base && fsidOf(base);
  return fsid ? { fsid, members: await readMembers(fsid) } : undefined;
}

/** The last scrub that finished, for people and for monitoring. */
function describeScrub(open: Mounted, { scrub, lost = [] }: Memory) {
  const { devices, startedSeconds } = readScrub(open);
  if (!startedSeconds) return null;
  // The clock may have been set since: the time of running is the least.
  const isKnown = scrub?.startedSeconds === startedSeconds;
  const endedSeconds = isKnown ? scrub.endedSeconds : startedSeconds;
  const ageSeconds = Math.max(
    Date.now() / 1000 - endedSeconds,
    isKnown ? scrub.ranSeconds : 0,
  );
  return {
    ended: new Date(1000 * endedSeconds).toISOString(),
    days: Math.floor(ageSeconds / DAY_SECONDS),
    devices: devices.map(({ devid, repaired, lost }) => ({
      devid,
      repaired,
      lost,
    })),
    lostFiles: lost,
  };
}

/** What the next pass, or the next boot, is going to do. */
function describeNext(
  plan: Plan,
  state: FilesystemState,
  { scrub }: Memory,
  paths: Paths,
): string {
  const waiting = plan.joins
    .filter((member) => !mayJoin(member, plan, state, paths));
  plan.joins = plan.joins.filter((join) => !waiting.includes(join));
  const job = decideJob(plan, state, readPending(paths), paths);
  if (job) return job.what;
  if (waiting.length > 0) {
    return waiting.map(({ device }) => `${device.path} joins`).join(", ") +
      ` the data filesystem at the next boot`;
  }
  const age = scrub
    ? Math.max(Date.now() / 1000 - scrub.endedSeconds, scrub.ranSeconds)
    : 0;
  const days = Math.max(
    0,
    Math.ceil((SCRUB_EVERY_SECONDS - age) / DAY_SECONDS),
  );
  return `all checksums are verified in ${days} days`;
}

/** When a payload was applied to this filesystem, and what it wrote. */
function readApplied({ state }: Paths) {
  const note = orUndefined(() => JSON.parse(readText(join(state, APPLIED))!));
  const { applied, writes } = note ?? {};
  if (typeof applied !== "string" || !Array.isArray(writes)) return null;
  return { applied, writes: writes.map(String) };
}

function readSpace(directory: string) {
  return orUndefined(() => {
    const { blocks, bavail, bsize } = fs.statfsSync(directory);
    return { sizeBytes: blocks * bsize, freeBytes: bavail * bsize };
  }) ?? null;
}

/**
 * Metadata chunks with what they may still grow by: they may be full while there
 * is room for data. Of what is free in them the kernel keeps a reserve for
 * itself (btrfs-filesystem(8), df, GlobalReserve).
 */
function readMetadataSpace({ fsid, members }: Mounted) {
  const value = (name: string) =>
    Number(readText(`/sys/fs/btrfs/${fsid}/allocation/${name}`) ?? 0);
  const allocatedBytes = sum(
    ["data", "metadata", "system"].map((type) => value(`${type}/disk_total`)),
  );
  const { totalBytes } = members[0].holds.btrfs;
  const chunksBytes = value("metadata/total_bytes");
  const copies = value("metadata/disk_total") / chunksBytes || 1;
  const inChunksBytes = chunksBytes - value("metadata/bytes_used") -
    value("global_rsv_size");
  const unallocatedBytes = totalBytes - allocatedBytes;
  const growthBytes = Math.floor(unallocatedBytes / copies);
  const dataFreeBytes = value("data/total_bytes") - value("data/bytes_used");
  const chunkBytes = largestChunkBytes([totalBytes]);
  return {
    sizeBytes: chunksBytes + growthBytes,
    freeBytes: Math.max(0, inChunksBytes + growthBytes),
    /** There is room in data chunks, and none for metadata to grow. */
    isCrowdedOut: unallocatedBytes < chunkBytes &&
      inChunksBytes < chunksBytes / 4 && dataFreeBytes > 2 * chunkBytes,
  };
}

/** The devices in use: sysfs knows their names, superblocks the devids. */
async function readMembers(fsid: string): Promise<Mounted["members"]> {
  const members: Mounted["members"] = [];
  const names = listDirectory(`/sys/fs/btrfs/${fsid}/devices`);
  for (const path of names.map(nodeOf)) {
    // One that has gone, or is dead, is missing.
    const start = await readBytes(path, 0, START_BYTES).catch((error) =>
      say("debug", messageOf(error))
    );
    const { btrfs, record } = parseStart(start ?? new Uint8Array());
    if (!btrfs || btrfs.devid === 0) continue;
    members.push({ path, holds: { kind: "member", btrfs, record } });
  }
  return members;
}

/** What `--move` or `--remove` has still to do. */
function describeLeaving({ members }: Mounted) {
  const leaving = leavingOf(members);
  if (!leaving) return null;
  const member = members
    .find(({ holds }) => holds.record?.member === leaving.member);
  const isOut = !member && leaving.how === "remove" &&
    members.length < members[0].holds.btrfs.numDevices;
  if (!member && !isOut) return null;
  const when = members.length === 2 ? "at the next boot " : "";
  const text = !member
    ? `${members.map(({ path }) => path).join(", ")} gets all that is on the ` +
      `disk which leaves`
    : leaving.how === "move"
    ? `${member.path} hands its data to a new disk`
    : `${when}${member.path} leaves the data filesystem`;
  const back = `(--${leaving.how} --cancel takes that back)`;
  return { how: leaving.how, isOut, text: `${text} ${back}` };
}

/** What has left and is wiped, as long as it is plugged in and not enabled. */
function readLeft(paths: Paths, devices: BlockDevice[] = []): string | null {
  const left = orUndefined(() => JSON.parse(readText(paths.left) ?? ""));
  const isThere = left && readIdentity(left.disk).sequence === left.sequence;
  const isTaken = devices.filter(({ path }) => path === left?.path)
    .flatMap((device) => partsOf(device, devices))
    .some(({ magic, inUse }) => magic || inUse);
  return isThere && !isTaken ? left.path : null;
}

/** What runs in the background, in the words of btrfs(8). */
async function readWork({ operation }: FilesystemState, paths: Paths) {
  const note = readJob(paths);
  const since = note?.since ?? null;
  const work: { kind: string; progress: string; since: string | null }[] = [];
  const askBtrfs = async (...command: string[]) => {
    const [kind] = command;
    const output = await ask(words`btrfs ${command} ${paths.data}`, {
      to: `ask how far the ${kind} is`,
      accept: [0, 1], // 1: a balance runs
    });
    const progress = output.trim().replaceAll(/\s*\n\s*/g, ", ");
    work.push({ kind, since, progress });
  };
  if (operation === "device replace") await askBtrfs("replace", "status", "-1");
  else if (operation.startsWith("balance")) await askBtrfs("balance", "status");
  else if (operation !== "none") {
    const { what = "running", devid, bytes } = note ?? {};
    const left = bytes &&
      (await readUsages(paths)).get(devid)?.allocatedBytes;
    const far = left === undefined
      ? ""
      : `, ${Math.floor(100 * (1 - left / bytes))} % of ${
        inMiB(bytes)
      } are done`;
    work.push({ kind: operation, progress: what + far, since });
  }
  if (readPending(paths).scrub) await askBtrfs("scrub", "status");
  // Between two of these, or while a disk is wiped and partitioned.
  if (note && work.length === 0) {
    work.push({ kind: "maintenance", progress: note.what, since });
  }
  return work;
}

/** What the process in the background says that it does; none: undefined. */
function readJob(paths: Paths) {
  const note = orUndefined(() => JSON.parse(readText(paths.job) ?? ""));
  return note && fs.existsSync(`/proc/${note.pid}`) ? note : undefined;
}

/** Something that is wrong. */
export interface Problem {
  /** What it is, the same from hour to hour and from boot to boot. */
  key: string;
  /** In a sentence, with a remedy. */
  text: string;
  /** Critical: data are lost, cannot be kept, or would be with one more disk. */
  level: "warning" | "critical";
}

/** Says what is wrong. */
function* judgeHealth(
  status: Status,
  state?: FilesystemState,
  settled?: Settled,
  plan?: Plan,
): Generator<Problem> {
  const { devices, space, metadataSpace, scrub, lastBoot, leaving, left } =
    status;
  for (const error of lastBoot?.errors ?? []) {
    const text = `The last boot said: ${error}`;
    yield { key: text, text, level: "critical" };
  }
  if (status.isReadOnly) {
    const text = `"/${DATA_MOUNT}" is read-only: the kernel found an error ` +
      `(see dmesg); reboot, and if that happens again, replace the disk`;
    yield { key: "read-only", text, level: "critical" };
  }
  if (status.label !== null && status.label !== DATA) {
    const text = `The data filesystem has the label "${status.label}": the ` +
      `next boot will not find it ("btrfs filesystem label /${DATA_MOUNT} ` +
      `${DATA}" cures that)`;
    yield { key: "label", text, level: "critical" };
  }
  if (status.isDockerHeldBack) {
    yield { key: "Docker is held back", text: HELD_BACK, level: "critical" };
  }
  for (const { path, devid, missing, errors } of devices) {
    if (missing && !leaving?.isOut) {
      const back = plan?.data?.conflicting
        .find((device) => devidOf(device) === devid);
      const text = `Device ${devid} is missing: there is no redundancy until ` +
        `it is back, or a new disk is enabled with persistence.ts --enable` +
        (back ? `; ${back.path} ${whyNotUsed(back, plan!.data!)}` : "");
      const key = `${back ? "back" : "missing"} ${devid}`;
      yield { key, text, level: "critical" };
    }
    const counts = Object.entries(errors)
      .map(([kind, count]) => `${count} ${kind.replace("_errs", "")}`);
    const found = scrub?.devices.find((device) => device.devid === devid);
    const what = path ?? `device ${devid}`;
    if (counts.length > 0) {
      const repaired = found?.repaired
        ? `; the scrub of ${scrub?.ended} repaired ${found.repaired} blocks`
        : "";
      const text = `${what} had errors (${counts.join(", ")})${repaired}: ` +
        `replace the disk; if it was the cable, "btrfs device stats --reset ` +
        `/${DATA_MOUNT}" forgets them`;
      yield { key: `errors ${devid}`, text, level: "warning" };
    }
    if (found?.lost) {
      const names = scrub?.lostFiles ?? [];
      const files = names.length > 0
        ? `restore or delete ${names.join(", ")}`
        : `restore what dmesg names`;
      const text = `The scrub of ${scrub?.ended} could not repair ` +
        `${found.lost} blocks of ${what}: ${files}, then "btrfs scrub start ` +
        `/${DATA_MOUNT}" looks again`;
      yield { key: `lost ${devid}`, text, level: "critical" };
    }
  }
  const waits = state?.operation === "none" && plan?.data &&
    whyNotMoved(plan.data, plan.joins);
  if (waits) yield { key: "move", text: waits, level: "warning" };
  if (left) {
    const text = `${left} holds none of the data any more: it can be pulled`;
    yield { key: `left ${left}`, text, level: "warning" };
  }
  // Why a disk that was plugged in does not take the missing place.
  for (const { text } of state?.missing.length ? plan?.notes ?? [] : []) {
    yield { key: text, text, level: "warning" };
  }
  if (scrub && scrub.days >= 2 * SCRUB_EVERY_SECONDS / DAY_SECONDS) {
    const text = `All checksums were verified ${scrub.days} days ago for the ` +
      `last time: leave the system running until that is done`;
    yield { key: "scrub", text, level: "warning" };
  }
  if (
    state && leaving?.how !== "remove" &&
    balanceFilters(state, settled).length > 0
  ) {
    const text = "Not all chunks are mirrored yet";
    yield { key: "not mirrored", text, level: "warning" };
  }
  if (space && space.freeBytes < space.sizeBytes * LEAST_FREE.warning) {
    const text = `"/${DATA_MOUNT}" is nearly full: ` +
      `${inMiB(space.freeBytes)} of ${inMiB(space.sizeBytes)} are free: ` +
      `delete something, or enlarge or add a disk`;
    const isFull = space.freeBytes < space.sizeBytes * LEAST_FREE.critical;
    yield { key: "full", text, level: isFull ? "critical" : "warning" };
  }
  if (metadataSpace && metadataSpace.freeBytes < leastMetadata(metadataSpace)) {
    const text = `The metadata of "/${DATA_MOUNT}" are nearly full: ` +
      `${inMiB(metadataSpace.freeBytes)} are free: delete files or ` +
      `snapshots, or enlarge or add a disk`;
    yield { key: "metadata full", text, level: "critical" };
  } else if (metadataSpace?.isCrowdedOut) {
    const text = `All space of "/${DATA_MOUNT}" is allocated to data, and ` +
      `metadata cannot grow: "btrfs balance start -dlimit=4 ` +
      `/${DATA_MOUNT}" makes room`;
    yield { key: "unallocated", text, level: "warning" };
  }
}

/** The least of a filesystem that should be free. */
const LEAST_FREE = { warning: 0.05, critical: 0.01 };

const leastMetadata = ({ sizeBytes }: { sizeBytes: number }) =>
  Math.max(sizeBytes / 20, LARGEST_METADATA_RESERVATION_BYTES);

/** The problem that on-health is not told. */
const UNTOLD = "on-health";

function judgeUntold(untold?: string): Problem[] {
  if (!untold) return [];
  const text = `${untold}: it is called again within the hour`;
  return [{ key: UNTOLD, text, level: "warning" }];
}

/** Says what a person should know although nothing is wrong. */
function* listNotes(
  { devices, lastBoot }: Status,
  state?: FilesystemState,
  settled?: Settled,
) {
  for (const type of state ? unmirroredTypes(state) : []) {
    const letter = type[0];
    const isToBe = balanceFilters(state!, settled)
      .some((filter) => filter.startsWith(`-${letter}`));
    if (isToBe) continue;
    const profiles = state!.profiles[type];
    const isAll = type === "metadata" || profiles.includes("raid0");
    yield `The ${type} are not mirrored (${profiles.join("+")}), as a person ` +
      `chose: when one of ${devices.length} disks fails, ` +
      `${isAll ? "all files are lost" : "the files on it are lost"} (to ` +
      `mirror them: btrfs balance start -${letter}convert=raid1,soft ` +
      `/${DATA_MOUNT})`;
  }
  const isHealed = lastBoot?.degraded && !devices.some((each) => each.missing);
  const when = isHealed ? ", before the mirror was whole again," : "";
  for (const warning of lastBoot?.warnings ?? []) {
    yield `The last boot${when} warned: ${warning}`;
  }
}

/** The status for people, line by line. */
function* describeStatus(status: Status): Generator<string> {
  const { mode, label, uuid, profiles, space, swap, health } = status;
  yield mode === "persistent"
    ? `Persistent: "${label}" ${uuid}`
    : mode === "fallback"
    ? "Fallback, without the data: what is written is lost at shutdown"
    : mode === "volatile"
    ? "Volatile: what is written is lost at shutdown"
    : "Not set up: persistence.ts has not run in this system";
  for (const { devid, missing, path, sizeBytes } of status.devices) {
    const what = missing ? "missing" : `${path}, ${inMiB(sizeBytes ?? 0)}`;
    yield `  device ${devid}: ${what}`;
  }
  if (profiles) {
    const all = Object.entries(profiles)
      .map(([type, names]) => `${type} ${names.join("+")}`);
    yield `  profiles: ${all.join(", ")}`;
  }
  if (space) {
    yield `  space: ${inMiB(space.freeBytes)} of ` +
      `${inMiB(space.sizeBytes)} free`;
  }
  for (const { target, type, source } of status.mounts) {
    yield `  ${target}: ${type} from ${source}`;
  }
  if (swap.length > 0) yield `  swap: ${swap.join(", ")}`;
  if (status.payload) {
    const { applied, writes } = status.payload;
    yield `  payload: applied ${applied}: ${writes.join(", ")}`;
  }
  for (const { kind, progress, since } of status.work) {
    const when = since ? ` since ${since}` : "";
    yield `In the background${when}: ${kind}: ${progress}`;
  }
  if (status.scrub) {
    const { ended, devices } = status.scrub;
    const total = (what: "repaired" | "lost") =>
      sum(devices.map((device) => device[what]));
    yield `  last scrub: ended ${ended}, repaired ${total("repaired")} ` +
      `blocks, lost ${total("lost")}`;
  } else if (profiles) yield "  last scrub: none has finished yet";
  if (status.next) yield `  next: ${status.next}`;
  if (status.leaving) yield `Asked for: ${status.leaving.text}`;
  for (const problem of health) yield `Attention: ${problem}`;
  for (const note of status.notes) yield `Note: ${note}`;
  if (mode !== "none" && health.length === 0) yield "Healthy";
}

async function showStatus(settings: Settings, json: boolean): Promise<void> {
  for (let clear = "";; clear = "\x1b[H\x1b[2J") { // home, clear the screen
    const status = await readStatus(settings);
    if (json) return console.log(JSON.stringify(status, null, 2));
    console.log(clear + [...describeStatus(status)].join("\n"));
    // On a terminal the progress moves, until the work ends or ^C.
    if (!process.stdout.isTTY || status.work.length === 0) return;
    await sleep(1000);
  }
}

/**
 * One line for a monitoring system (Monitoring Plugins Development Guidelines).
 *
 * @returns The exit status: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
 */
async function check(settings: Settings, isExpected: boolean): Promise<number> {
  const status = await readStatus(settings);
  const { text, exitStatus } = judgeCheck(status, isExpected);
  console.log(text);
  return exitStatus;
}

const CHECK = ["OK", "WARNING", "CRITICAL", "UNKNOWN"];

function checkLine(exitStatus: number, says: string, figures: string[] = []) {
  const text = `PERSISTENCE ${CHECK[exitStatus]}: ${says.replaceAll("|", "/")}`
    .replaceAll(/\p{Cc}+/gu, " ");
  return {
    exitStatus,
    text: [text, figures.join(" ")].join(figures[0] ? " | " : ""),
  };
}

/** @param isExpected Persistence is: volatile is then critical. */
function judgeCheck(status: Status, isExpected: boolean) {
  const { mode, problems, devices, space, metadataSpace, scrub } = status;
  if (mode === "none") {
    return checkLine(3, "persistence.ts has not run in this system");
  }
  const isMissed = mode === "fallback" ||
    (isExpected && mode !== "persistent");
  const isCritical = isMissed ||
    problems.some(({ level }) => level === "critical");
  const exitStatus = isCritical ? 2 : problems.length > 0 ? 1 : 0;
  const says = [
    ...isMissed ? ["Volatile: what is written is lost at shutdown"] : [],
    ...problems.map(({ text }) => text),
  ];
  const fine = mode === "persistent"
    ? `persistent, ${devices.length} device(s), ` +
      `${inMiB(space?.freeBytes ?? 0)} free`
    : "volatile, as nothing is enabled";
  const figures: string[] = [];
  if (space) {
    const { warning, critical } = LEAST_FREE;
    const [least, fewest] = [warning, critical]
      .map((part) => Math.floor(part * space.sizeBytes));
    figures.push(
      `space_free=${space.freeBytes}B;${least}:;${fewest}:;0;${space.sizeBytes}`,
    );
  }
  if (metadataSpace) {
    const least = Math.floor(leastMetadata(metadataSpace));
    figures.push(`metadata_free=${metadataSpace.freeBytes}B;;${least}:;0`);
  }
  if (mode === "persistent") {
    const errors = devices.flatMap(({ errors }) => Object.values(errors));
    figures.push(`device_errors=${sum(errors)};0;;0`);
    const missing = devices.filter(({ missing }) => missing).length;
    figures.push(`devices_missing=${missing};;0;0`);
  }
  if (scrub) {
    const days = 2 * SCRUB_EVERY_SECONDS / DAY_SECONDS;
    figures.push(`days_since_scrub=${scrub.days};${days};;0`);
  }
  return checkLine(exitStatus, says.join("; ") || fine, figures);
}

async function dryRun(settings: Settings, json = false): Promise<void> {
  const plan = await makePlan(settings, true);
  if (json) return console.log(JSON.stringify(plan, null, 2));
  for (const line of describePlan(plan)) console.log(line);
  for (const { level, text } of plan.notes) console.log(`${level}: ${text}`);
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
  /** What it reads; a number is an open file. */
  stdin?: string | Uint8Array | number;
  /** Is what it writes to stdout wanted? */
  capture?: boolean;
  /** When the time is up, what it has started ends as well. */
  isGroup?: boolean;
}

/**
 * Splits a command, as it would be typed, at its spaces. A value stays part of
 * one word, whatever is in it; a list becomes a word for each item.
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
 * Runs a command that does something. The error says whether it is not
 * installed, failed, was killed or did not answer, and quotes its stderr.
 */
async function run(command: string[], options: RunOptions) {
  const { to, stdin, accept = [0], timeoutMs = TIMEOUT.commandMs } = options;
  const detached = options.isGroup;
  const found = findCommand(command, to);
  // Files, not pipes: what reads a pipe takes 4 ms to load.
  const input = stdin === undefined
    ? "ignore"
    : typeof stdin === "number"
    ? stdin
    : openUnlinkedFile(stdin);
  const output = options.capture ? openUnlinkedFile("") : "ignore";
  const errors = orUndefined(() => openUnlinkedFile("")) ?? "inherit";
  // The command left the position of such a file at its end.
  const textOf = (file: Stdio[number]) =>
    typeof file === "number" && readText(`/proc/self/fd/${file}`) || "";
  const what = `Cannot ${to}: "${command[0]}"`;
  let child: ReturnType<typeof start> | undefined;
  try {
    child = start(found, { stdio: [input, output, errors], detached });
    const end = await withTimeout(child.ended, timeoutMs, what);
    if (typeof end === "number" && accept.includes(end)) {
      return { status: end, stdout: textOf(output) };
    }
    throw failure(command, to, end, textOf(errors));
  } catch (error) {
    if (!child) throw new Error(`${what}: ${messageOf(error)}`);
    if (error instanceof TimeoutError) {
      const { pid } = child;
      orUndefined(() => process.kill(detached ? -pid : pid, "SIGKILL"));
      givenUp.add(pid);
      error.ended = child.ended;
    }
    throw error;
  } finally {
    for (const file of [input, output, errors]) {
      if (typeof file === "number" && file !== stdin) fs.closeSync(file);
    }
  }
}

/** Processes that were killed for not ending, and may not have ended yet. */
const givenUp = new Set<number>();

/**
 * Runs a command that discards a whole device first, and once more without the
 * discard where that takes longer than anybody waits (shingled, behind USB,
 * thinly provisioned). A process that waits for a device cannot be killed, and
 * may write when the device answers: while it is there, nothing else begins.
 *
 * @param command Makes the command, given the options that turn discard off.
 */
async function runDiscarding(
  command: (options: string[]) => string[],
  to: string,
): Promise<void> {
  const timeoutMs = TIMEOUT.mkfsMs;
  try {
    await run(command([]), { to, timeoutMs });
  } catch (error) {
    if (!(error instanceof TimeoutError) || !error.ended) throw error;
    const why = messageOf(error);
    await withTimeout(
      error.ended,
      TIMEOUT.endMs,
      `${why}, and it cannot be ended (the disk does not answer: check its ` +
        `cable and power, or replace it)`,
    );
    say("warning", `${why}: once more without a discard of the disk`);
    await run(command(["--nodiscard"]), { to, timeoutMs });
  }
}

/** Asks a command for what it prints; throws as {@linkcode run}. */
async function ask(command: string[], options: RunOptions): Promise<string> {
  const { to, accept = [0], timeoutMs = TIMEOUT.commandMs } = options;
  const found = findCommand(command, to);
  // Loaded here: it takes 20 ms, and hardly a boot asks anything.
  const { $, KillController } = await import("dax");
  const killer = new KillController();
  // dax reports a child that was killed by a signal as a success: the shell
  // between them makes that a status, and passes on that the time is up.
  const script = 'trap "kill -KILL \\$!" TERM; "$@" & wait $!';
  const asking = $`/bin/sh -c ${script} sh ${found}`
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
  /** In a session of its own: it outlives us, and is killed with its children. */
  detached?: boolean;
}

/**
 * Starts a program, which ends with a status or the name of a signal. The
 * executable has Bun's own function for it: node:child_process would be half a
 * MiB more, and 2 ms of each boot.
 */
function start(command: string[], options: StartOptions) {
  if (typeof Bun !== "undefined") {
    const child = Bun.spawn(command, { ...options, env: process.env });
    if (options.detached) child.unref();
    const ended = child.exited.then((status) => child.signalCode ?? status);
    return { ended, pid: child.pid };
  }
  // Not imported, for the executable would then embed it.
  const { spawn } = process.getBuiltinModule("node:child_process");
  const child = spawn(command[0], command.slice(1), options);
  const ended = new Promise<number | string>((resolve) =>
    child.on("exit", (status, signal) => resolve(status ?? signal ?? "?"))
      .on("error", () => {}) // a failed spawn has no pid: reported below
  );
  const { pid } = child;
  if (pid === undefined) throw new Error("It cannot be executed");
  if (options.detached) child.unref();
  return { ended, pid };
}

/** The command with the path of its program. */
function findCommand([name, ...args]: string[], to: string): string[] {
  const program = findProgram(name);
  if (!program) throw new Error(`Cannot ${to}: "${name}" is not installed`);
  say("debug", [name, ...args].join(" "));
  return [program, ...args];
}

/** The error for a command that ended with a status or by a signal. */
function failure(command: string[], to: string, end: unknown, stderr: string) {
  const how = typeof end === "number"
    ? `failed with status ${end}`
    : `was killed by ${end}`;
  const shown = command.join(" ").replace(/^(sh) -\S*c .*/s, "$1");
  const said = stderr.trim().split("\n").slice(-3).join("; ");
  return new Error(`Cannot ${to}: "${shown}" ${how}: ${said}`);
}

let unlinkedFiles = 0;

/** Opens a file that has no name any more, for a command to read or write. */
function openUnlinkedFile(contents: string | Uint8Array): number {
  const path = `/run/lightwhale-${process.pid}.${unlinkedFiles++}`;
  const file = fs.openSync(path, "wx+", 0o600);
  fs.unlinkSync(path);
  const bytes = Buffer.from(contents);
  // At a position, so that the command begins at the start.
  const written = fs.writeSync(file, bytes, 0, bytes.length, 0);
  assert(written === bytes.length, `Cannot write to "${path}": /run is full`);
  return file;
}

/** Where a program is, or undefined where it is not installed. */
function findProgram(name: string): string | undefined {
  if (name.startsWith("/")) return name;
  return (process.env.PATH ?? "").split(":").filter(Boolean)
    .map((directory) => join(directory, name)).find(fs.existsSync);
}

/** No answer in time. Nothing repeats the call: it would block as long again. */
class TimeoutError extends Error {
  /** The end of the command that was killed, which may never come. */
  ended?: Promise<unknown>;
}

/** Gives up on something that does not answer. */
function withTimeout<T>(promise: PromiseLike<T>, ms: number, what: string) {
  return new Promise<T>((resolve, reject) => {
    const timer = ms === Infinity ? undefined : setTimeout(() => {
      reject(new TimeoutError(`${what}: no answer in ${ms / 1000} s`));
    }, ms);
    promise.then(resolve, reject).then(() => clearTimeout(timer));
  });
}

type Lock = { release: () => void };

/** Another instance has the lock. */
class BusyError extends Error {}

/**
 * Keeps others from working at the same time. flock(2) belongs to the open
 * file, which flock(1) shares with us: it ends when we do, however we end.
 *
 * @throws {BusyError} When another has the lock for so long.
 */
async function takeLock(path: string, timeoutMs = TIMEOUT.lockMs) {
  fs.mkdirSync(dirname(path), { recursive: true });
  const stdin = fs.openSync(path, "a");
  const to = `lock "${path}"`;
  try {
    const atOnce = { to, stdin, accept: [0, 1], timeoutMs: 5_000 };
    const { status } = await run(words`flock -n 0`, atOnce);
    if (status === 1) {
      const who = "another persistence.ts is at work; wait for it" +
        describeJob(join(dirname(path), "job.json"));
      if (timeoutMs > 0) {
        say("info", `Waiting ${timeoutMs / 1000} s at most: ${who}`);
      }
      // BusyBox's status is 1 also where flock(2) does not work: it fails at once.
      const waiting = { to, stdin, timeoutMs: Math.max(timeoutMs, 1000) };
      await run(words`flock 0`, waiting).catch((error) => {
        if (!(error instanceof TimeoutError)) throw error;
        throw new BusyError(`Cannot ${to}: ${who}`);
      });
    }
  } catch (error) {
    if (error instanceof BusyError) {
      fs.closeSync(stdin);
      throw error;
    }
    say("warning", `Working without a lock: ${messageOf(error)}`);
  }
  return { release: () => fs.closeSync(stdin) };
}

/** The long work that goes on, in brackets; nothing where none is known. */
function describeJob(path: string): string {
  const note = orUndefined(() => JSON.parse(readText(path) ?? ""));
  return note ? ` (since ${note.since}: ${note.what}; --status shows it)` : "";
}

/** Priorities of syslog(2). */
const PRIORITY = { error: 3, warning: 4, info: 6, debug: 7 };
type Level = keyof typeof PRIORITY;

/** What stderr gets; the kernel log gets all but debug messages. */
const speech = { level: "info" as Level, inKernelLog: false };

/** Warnings and errors that were said, for the status file. */
const messages = { warnings: [] as string[], errors: [] as string[] };

function say(level: Level, message: string): void {
  if (level === "error") messages.errors.push(message);
  if (level === "warning") messages.warnings.push(message);
  const line = message.replaceAll(/\p{Cc}+/gu, " ");
  if (PRIORITY[level] <= PRIORITY[speech.level]) {
    // Not console.error, which colours.
    orUndefined(() => fs.writeSync(2, `persistence: ${line}\n`));
  }
  if (!speech.inKernelLog || level === "debug") return;
  for (const piece of piecesOf(line, KERNEL_LOG.textBytes)) {
    writeToKernelLog(`<${PRIORITY[level]}>persistence: ${piece}\n`);
  }
}

/**
 * The kernel refuses records of more than 1,024 bytes, older kernels of more
 * than 976. It takes ten records in five seconds from each open file and drops
 * the rest in silence, so that the file is opened for each (kernel/printk/
 * printk.c, devkmsg_open(), devkmsg_write()).
 */
const KERNEL_LOG = { textBytes: 900, hasFailed: false };

function writeToKernelLog(record: string): void {
  const { O_WRONLY, O_APPEND } = fs.constants;
  try {
    const file = fs.openSync("/dev/kmsg", O_WRONLY | O_APPEND);
    try {
      fs.writeSync(file, record);
    } finally {
      fs.closeSync(file);
    }
  } catch (error) {
    if (KERNEL_LOG.hasFailed) return;
    KERNEL_LOG.hasFailed = true; // and is said once
    say(
      "warning",
      `The kernel log does not take what is said here: ${messageOf(error)} ` +
        `(is printk.devkmsg=off on the kernel command line?)`,
    );
  }
}

/**
 * Splits a text at characters into pieces of so many bytes at most; where it
 * goes on, three dots end a piece and begin the next.
 */
export function piecesOf(text: string, bytes: number): string[] {
  if (Buffer.byteLength(text) <= bytes) return [text];
  const room = new Uint8Array(bytes - 3);
  const { read } = new TextEncoder().encodeInto(text, room);
  const rest = piecesOf(`...${text.slice(read)}`, bytes);
  return [`${text.slice(0, read)}...`, ...rest];
}

const sayError = (error: unknown) => say("error", messageOf(error));

function sayPlan(plan: Plan): void {
  for (const line of describePlan(plan)) say("info", line);
  for (const { level, text } of plan.notes) say(level, text);
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

/** Runs the step for every item; a failure does not stop the rest. */
async function attemptEach<T>(items: T[], step: (item: T) => Promise<void>) {
  for (const item of items) await attempt(() => step(item));
}

/** Like Promise.all(), but rejects only when no step is running any more. */
async function allOf<T extends unknown[]>(steps: [...T]) {
  await Promise.allSettled(steps);
  return await Promise.all(steps);
}

/** The value of an expression, or undefined where it throws. */
function orUndefined<T>(step: () => T): T | undefined {
  try {
    return step();
  } catch {
    return undefined;
  }
}

/** Text of a small file without the newline at its end, if it can be read. */
function readText(path: string): string | undefined {
  const flag = fs.constants.O_NONBLOCK; // a FIFO would block us
  return orUndefined(() => fs.readFileSync(path, { encoding: "utf8", flag }))
    ?.replace(/\n$/, "");
}

/** A link is not followed. */
const whatIsAt = (path: string) =>
  fs.lstatSync(path, { throwIfNoEntry: false });

function listDirectory(path: string): string[] {
  return orUndefined(() => fs.readdirSync(path)) ?? [];
}

const sleep = (ms: number) =>
  new Promise<void>((resolve) => setTimeout(resolve, ms));

/** Waits until something is so; false where it is not in time. */
async function becomesTrue(isSo: () => unknown, ms: number, everyMs = 20) {
  const giveUpAt = performance.now() + ms;
  while (!await isSo()) {
    if (performance.now() >= giveUpAt) return false;
    await sleep(everyMs);
  }
  return true;
}

function assert(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Error(message);
}

// ---------------------------------------------------------------------------
// The command line.
// ---------------------------------------------------------------------------

/** Bad input: exit status 2. */
export class UsageError extends Error {}

function refuse(message: string): never {
  throw new UsageError(message);
}

export const HELP = `Usage:
  persistence.ts                       set up persistence (done at every boot)
  persistence.ts --enable DEVICE...    make disks, GPT partitions or raw image
                                       files magic: the next boot formats them
  persistence.ts --disable DEVICE...   take the magic away again
  persistence.ts --move OLD NEW        move the data from one disk to another,
                                       while the system runs
  persistence.ts --remove DEVICE       take a disk out of the data filesystem
  persistence.ts --move --cancel       take that back
  persistence.ts --remove --cancel     take that back
  persistence.ts --status [--json]     what is mounted, from what, how healthy
  persistence.ts --check [persistent]  one line for a monitoring system: 0 OK,
                                       1 WARNING, 2 CRITICAL, 3 UNKNOWN;
                                       persistent: volatile is CRITICAL
  persistence.ts --dry-run [--json]    what the next boot would do
  persistence.ts --maintain            look after the disks and do long work
                                       (done every hour, and after a boot)

Options:
  --force           with --enable: also a device that holds data, and although
                    other disks are in doubt; with --move: for NEW
  --now             with --enable: join the data filesystem at once
  --with FILE       with --enable: a payload, to be applied to what is made
  --json            with --status: for scripts, README.md lists the keys; with
                    --dry-run: all of the plan, as this version has it
  --wait SECONDS    how long to wait for missing devices (default: 10)
  --devices LIST    look at these devices only, comma separated; loop devices
                    are looked at only when they are listed
  --root DIR        the system root to work on (default: /)
  --quiet           messages (stderr): only what is wrong; results (stdout) stay
  --verbose         messages: every command as well
  --help            show this help
  --version         show the version

On the kernel command line:
  lightwhale.persistence=off       leave all disks alone and run volatile; so
                                   do no, false, 0 and what is not known
  lightwhale.persistence=required  wait for a data disk; without one, fail
  lightwhale.data=UUID             the data filesystem to wait for and to use
  lightwhale.wait=SECONDS          as --wait
  lightwhale.swap=off or noswap    neither make nor use swap

Exit status: 0 as configured; 1 something failed (at a boot: the fallback is in
place); 2 refused: the command line is wrong, or a device must not be touched.`;

const defaultSettings: Settings = {
  root: "/",
  waitMs: 10_000,
  off: false,
  required: false,
  noSwap: false,
};

const MODES =
  "enable disable move remove status check dry-run maintain help version"
    .split(" ");
export const FLAGS = [
  ...MODES,
  ...["force", "now", "cancel", "json", "quiet", "verbose"],
];
export const OPTIONS_WITH_VALUE = ["wait", "devices", "root", "with"];

/** What a mode is to be told, and how many of it at most. */
const OPERANDS: Record<string, { names: string[]; most: number } | undefined> =
  {
    enable: { names: ["a DEVICE"], most: Infinity },
    disable: { names: ["a DEVICE"], most: Infinity },
    move: { names: ["OLD", "NEW"], most: 2 },
    remove: { names: ["a DEVICE"], most: 1 },
    check: { names: [], most: Infinity },
  };

/** The modes that an option goes with; the others go with all. */
const GOES_WITH: Record<string, string[]> = {
  force: ["enable", "move"],
  now: ["enable"],
  with: ["enable"],
  cancel: ["remove", "move"],
  json: ["status", "dry-run"],
};

/** At most one of each group may be given. */
const CLASHES = [MODES, ["force", "cancel"], ["now", "with"]];

/** Reads the command line. What it gives counts more than the kernel's. */
export function parseCommandLine(args: string[]) {
  const unknown = (arg: string, key?: string) => {
    if (key) refuse(`Unknown option "${arg}": see --help`);
  };
  for (const arg of args.slice(0, args.indexOf("--") >>> 0)) {
    const [, name, value] = /^--(?:no-)?(.*?)(=.*)?$/s.exec(arg) ?? [];
    if (name === "_") unknown(arg, name); // parseArgs' own
    if (value && FLAGS.includes(name)) {
      refuse(`Option "${arg}" takes no value: see --help`);
    }
  }
  const parsed = parseArgs(args, {
    boolean: FLAGS,
    string: [...OPTIONS_WITH_VALUE, "_"], // a file 007 is not 7
    unknown,
  });
  const operands: string[] = parsed._.map(String);
  const isGiven = (option: string) => (parsed[option] ?? false) !== false;
  const mode = MODES.find(isGiven) ?? "boot";
  const { cancel, root, devices, wait } = parsed;
  const needed = cancel ? undefined : OPERANDS[mode];
  const clash = CLASHES.map((group) => group.filter(isGiven))
    .find((given) => given.length > 1);
  const [stray, modes = []] = Object.entries(GOES_WITH)
    .find(([option, modes]) => isGiven(option) && !modes.includes(mode)) ?? [];
  const mistake = clash
    ? `Options --${clash[0]} and --${clash[1]} exclude each other`
    : stray
    ? `Option --${stray} goes with --${modes.join(" or --")} only`
    : needed && operands.length < needed.names.length
    ? `Option --${mode} needs ${needed.names.join(" and ")}: see --help`
    : mode === "check" && `${operands}`.replace("persistent", "")
    ? `Option --check takes "persistent" or nothing: see --help`
    : operands.length > (needed?.most ?? 0)
    ? `Unexpected argument "${operands[needed?.most ?? 0]}" (options begin ` +
      `with "--"): see --help`
    : parsed.with === ""
    ? "Option --with needs a FILE: see --help"
    : undefined;
  if (mistake) refuse(mistake);
  const given: Partial<Settings> = {};
  if (root !== undefined) {
    const isThere = orUndefined(() => fs.statSync(root).isDirectory());
    given.root = isThere
      ? fs.realpathSync(root)
      : refuse(`Cannot use --root "${root}": it is no directory`);
    if (/[\s\\,:]/.test(given.root)) {
      refuse(
        `Cannot use --root "${root}": mount options cannot hold spaces, ` +
          `commas, colons and backslashes`,
      );
    }
  }
  if (devices !== undefined) {
    // `/dev/disk/by-id/...` or `/dev/loop0` to `loop0`; a partition's disk.
    const paths: string[] = devices.split(",").filter(Boolean);
    if (paths.length === 0) refuse("Option --devices needs a LIST: see --help");
    given.only = paths
      .map((path) => wholeDisk(nameAt(path) ?? refuse(whyNoDevice(path))));
  }
  if (wait !== undefined) {
    given.waitMs = parseSeconds(wait) ??
      refuse(`Cannot use --wait "${wait}": it takes ${SECONDS}`);
  }
  return { mode, operands, given, parsed };
}

const ON = ["on", "yes", "true", "1"];
const OFF = ["off", "no", "false", "0"];
const PERSISTENCE = "lightwhale.persistence";

/** Reads the kernel's command line, which is never a reason not to boot. */
export function parseKernelCommandLine(kernel: string) {
  // Split as the kernel does it (lib/cmdline.c, next_arg()): quotes keep spaces
  // together, around a word or around a value. Of one name the last counts.
  const options = new Map<string, string>();
  for (const [word] of kernel.matchAll(/(?:"[^"]*"?|[^\s"])+/g)) {
    const [name, ...value] = word.replaceAll('"', "").toLowerCase().split("=");
    // However its name is misspelt, it was typed to keep the disks untouched.
    const key = name.replace(/^lightwhale.?persist.*/s, PERSISTENCE);
    options.set(key.replaceAll("-", "_"), value.join("=").trim());
  }
  const warnings: string[] = [];
  const persistence = options.get(PERSISTENCE) ?? "on";
  const isKnown = [...ON, ...OFF, "required"].includes(persistence);
  if (!isKnown) {
    warnings.push(
      `Cannot use lightwhale.persistence="${persistence}" on the kernel ` +
        `command line: it is taken for "off" (use ${
          [...OFF, ...ON].join(", ")
        } or required)`,
    );
  }
  const wait = options.get("lightwhale.wait");
  const ms = wait === undefined ? defaultSettings.waitMs : parseSeconds(wait);
  if (ms === undefined) {
    warnings.push(
      `Cannot use lightwhale.wait="${wait}" on the kernel command line: it ` +
        `takes ${SECONDS}; ${defaultSettings.waitMs / 1000} are used`,
    );
  }
  const settings: Settings = {
    ...defaultSettings,
    waitMs: ms ?? defaultSettings.waitMs,
    off: !isKnown || OFF.includes(persistence),
    required: persistence === "required",
    noSwap: options.has("noswap") ||
      OFF.includes(options.get("lightwhale.swap") ?? ""),
    dataUuid: options.get("lightwhale.data")?.replace(/^uuid=/, "") ||
      undefined,
  };
  return { settings, warnings };
}

const SECONDS = "seconds, from 0 to 99999";

/** Seconds, with a fraction or without, in milliseconds. */
function parseSeconds(seconds: string): number | undefined {
  return /^\d{1,5}(\.\d+)?$/.test(seconds) ? 1000 * Number(seconds) : undefined;
}

/** Name of the whole disk that a device is part of, or its own. */
function wholeDisk(name: string): string {
  const path = orUndefined(() => fs.realpathSync(`/sys/class/block/${name}`));
  const isWhole = !path || fs.existsSync(`/sys/block/${name}`);
  return isWhole ? name : basename(dirname(path));
}

/** Runs what the command line asks for. Returns the exit status. */
async function main(args: string[]): Promise<number> {
  try {
    const { mode, operands, given, parsed } = parseCommandLine(args);
    if (mode === "help" || mode === "version") {
      console.log(mode === "help" ? HELP : `persistence.ts ${VERSION}`);
      return 0;
    }
    const kernel = parseKernelCommandLine(readText("/proc/cmdline") ?? "");
    const settings = { ...kernel.settings, ...given };
    if (parsed.quiet) speech.level = "warning";
    if (parsed.verbose) speech.level = "debug";
    // What init gives may lack the places of mkfs.btrfs and sfdisk.
    const { PATH = "" } = process.env;
    process.env.PATH = `${PATH}:/usr/sbin:/usr/bin:/sbin:/bin`;
    process.env.LC_ALL = "C"; // what programs say is read, and quoted
    process.umask(0o022); // init's may be any, and what is made stays
    if (mode === "boot" || mode === "maintain") {
      speech.inKernelLog = true;
    }
    for (const warning of kernel.warnings) say("warning", warning);
    if (process.getuid?.() !== 0) {
      throw new Error(`Cannot look at disks: only root may, log in as root`);
    }
    if (mode === "boot") return await boot(settings);
    if (mode === "maintain") return await maintain(settings);
    if (mode === "check") return await check(settings, operands.length > 0);
    if (mode === "status") await showStatus(settings, parsed.json);
    else if (mode === "dry-run") await dryRun(settings, parsed.json);
    else {
      const lock = await takeLock(join(pathsBelow(settings.root).run, "lock"));
      const { force, now, cancel } = parsed;
      if (mode === "disable") await disable(operands);
      else if (mode === "enable") {
        const options = { force, now, file: parsed.with };
        await enable(operands, options, settings);
      } else if (cancel) await cancelLeaving(settings);
      else if (mode === "move") await move(operands, force, settings);
      else await remove(operands, settings);
      lock.release();
    }
    return 0;
  } catch (error) {
    if (args.includes("--check")) {
      const { text, exitStatus } = checkLine(3, messageOf(error));
      console.log(text);
      return exitStatus;
    }
    sayError(error);
    return error instanceof UsageError ? 2 : 1;
  }
}

if (import.meta.main) {
  // Not exitCode: something that never answered must not keep init waiting.
  process.exit(await main(process.argv.slice(2)));
}
