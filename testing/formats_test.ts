/**
 * What stands on a disk or in a file of the kernel, byte by byte, and what is
 * read from it. The bytes are made here, after the formats' own documents; no
 * disk is touched, no root is needed.
 */
import { assert, assertEquals, assertMatch, assertThrows } from "@std/assert";
import { crc32 } from "node:zlib";
import {
  ANYWAY,
  DATA,
  formatCopyTitle,
  formatRecord,
  isProtectiveMbr,
  MAGIC,
  mbrTypes,
  type MemberRecord,
  type Mount,
  parseCopy,
  parseKernelCommandLine,
  parseMountinfo,
  parsePartname,
  parsePayload,
  parseRecord,
  parseStart,
  parseSuperblock,
  parseSwapLabel,
  piecesOf,
  readGptAt,
  type Reading,
  type Settings,
} from "../persistence.ts";
import { badTexts, payloadOf } from "./payloads.ts";
import { repairSuperblock } from "./superblock.ts";

const KiB = 1024;
const MiB = 1024 * KiB;

/** Bytes of a text, or of numbers. */
const bytesOf = (text: string) => new TextEncoder().encode(text);

/** The same bytes in the middle of others, as a reader finds them. */
function amidOthers(bytes: Uint8Array): Uint8Array {
  const all = new Uint8Array(bytes.length + 300).fill(0xa5);
  all.set(bytes, 100);
  return all.subarray(100, 100 + bytes.length);
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
}

// Btrfs superblocks (btrfs-progs, kernel-shared/uapi/btrfs_tree.h, struct
// btrfs_super_block)

interface SuperblockFields {
  /** Where it says that it stands. */
  ownPlace: bigint;
  generation: bigint;
  logRoot: bigint;
  flags: bigint;
  usedBytes: bigint;
  numDevices: bigint;
  checksumType: number;
  devid: bigint;
  deviceBytes: bigint;
  label: Uint8Array;
}

const fsidBytes = Uint8Array.from(
  [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef],
);

/** All fields but those that are given differ from their neighbours. */
function superblock(fields: Partial<SuperblockFields> = {}): Uint8Array {
  const block = new Uint8Array(4 * KiB);
  const view = viewOf(block);
  const words: [at: number, value: bigint][] = [
    [0x30, fields.ownPlace ?? 0x10000n], // bytenr
    [0x38, fields.flags ?? 1n],
    [0x48, fields.generation ?? 0x1122334455n],
    [0x50, 0x1d00000n], // root
    [0x58, (1n << 56n) + 0x1500000n], // chunk_root
    [0x60, fields.logRoot ?? 0n],
    [0x68, 7n], // log_root_transid
    [0x70, 0xa000000000n], // total_bytes
    [0x78, fields.usedBytes ?? 0x300000001n],
    [0x80, 6n], // root_dir_objectid
    [0x88, fields.numDevices ?? 3n],
    [0xc9, fields.devid ?? 2n],
    [0xd1, fields.deviceBytes ?? 0x500000002n],
    [0xd9, 0x20000000n], // dev_item.bytes_used
  ];
  for (const [at, value] of words) view.setBigUint64(at, value, true);
  block.set(fsidBytes, 0x20);
  block.set(fsidBytes.toReversed(), 0x28);
  block.set(bytesOf("_BHRfS_M"), 0x40);
  for (const at of [0x90, 0x94, 0x98, 0x9c]) view.setUint32(at, 4096, true);
  block.set(bytesOf("another label"), 0x12b + 256);
  block.set(fields.label ?? bytesOf("a label\0not of it"), 0x12b);
  repairSuperblock(block);
  if (fields.checksumType) view.setUint16(0xc4, fields.checksumType, true);
  return block;
}

const plainSuperblock = {
  fsid: "01234567-89ab-cdef-efcd-ab8967452301",
  label: "a label",
  generation: 0x1122334455,
  numDevices: 3,
  devid: 2,
  deviceBytes: 0x500000002,
  totalBytes: 0xa000000000,
  usedBytes: 0x300000001,
  hasLog: false,
  isSeed: false,
  intact: true,
};

const superblocks: {
  name: string;
  block: Uint8Array;
  /** Where it is read; default: in the first place. */
  at?: number;
  found: Partial<typeof plainSuperblock> | undefined;
}[] = [
  { name: "as mkfs makes it", block: superblock(), found: {} },
  {
    name: "with a log tree",
    block: superblock({ logRoot: 1n << 40n }),
    found: { hasLog: true },
  },
  {
    name: "of a seed",
    block: superblock({ flags: (1n << 32n) | 1n }),
    found: { isSeed: true },
  },
  {
    name: "with a log tree at an odd place",
    block: superblock({ logRoot: 1n }),
    found: { hasLog: true },
  },
  {
    name: "of a first device alone",
    block: superblock({ numDevices: 1n, devid: 1n, generation: 1n }),
    found: { numDevices: 1, devid: 1, generation: 1 },
  },
  {
    name: "of a replace's target",
    block: superblock({ devid: 0n }),
    found: { devid: 0 },
  },
  {
    name: "without a label",
    block: superblock({ label: new Uint8Array(17) }),
    found: { label: "" },
  },
  {
    name: "with a label as long as there is room",
    block: superblock({ label: bytesOf("l".repeat(256)) }),
    found: { label: "l".repeat(256) },
  },
  {
    name: "with a label beyond ASCII",
    block: superblock({ label: bytesOf("日本\0") }),
    found: { label: "日本" },
  },
  {
    name: "with a label that is not UTF-8",
    block: superblock({ label: Uint8Array.of(0x41, 0xff, 0x42, 0) }),
    found: { label: "A\ufffdB" },
  },
  {
    name: "with a label that begins with a byte order mark",
    block: superblock({ label: bytesOf("\ufeffa label\0") }),
    found: { label: "\ufeffa label" },
  },
  {
    name: "that was copied from the place of a backup",
    block: superblock({ ownPlace: 0x4000000n }),
    found: { intact: false },
  },
  {
    name: "in the place of a backup",
    block: superblock({ ownPlace: 0x4000000n }),
    at: 64 * MiB,
    found: {},
  },
  {
    name: "that was copied to the place of a backup",
    block: superblock(),
    at: 64 * MiB,
    found: { intact: false },
  },
  {
    name: "that stands a byte further",
    block: superblock({ ownPlace: 0x10001n }),
    found: { intact: false },
  },
  {
    name: "in a wrong place, whose checksum the kernel verifies",
    block: superblock({ ownPlace: 0n, checksumType: 1 }),
    found: { intact: false },
  },
  {
    name: "at the start of more bytes",
    block: concat(superblock(), bytesOf("more")),
    found: {},
  },
  {
    name: "cut short by a byte",
    block: superblock().subarray(0, 4 * KiB - 1),
    found: undefined,
  },
  {
    name: "whose magic lacks its last letter",
    block: changed(superblock(), 0x47),
    found: undefined,
  },
  {
    name: "whose magic lacks its first letter",
    block: changed(superblock(), 0x40),
    found: undefined,
  },
  { name: "of nothing", block: new Uint8Array(4 * KiB), found: undefined },
  ...[0, 1, 2, 3].map((at) => ({
    name: `with a wrong byte ${at} of its checksum`,
    block: changed(superblock(), at),
    found: { intact: false },
  })),
  {
    name: "with anything behind its checksum of four bytes",
    block: changed(changed(superblock(), 4), 0x1f),
    found: {},
  },
  ...[0x3f, 0xff, 0x400, 4 * KiB - 1].map((at) => ({
    name: `with a wrong byte ${at}`,
    block: changed(superblock(), at),
    found: { intact: false },
  })),
  {
    name: "with a wrong first byte behind its checksum",
    block: changed(superblock(), 0x20),
    found: { fsid: "fe234567-89ab-cdef-efcd-ab8967452301", intact: false },
  },
  ...[1, 2, 3, 0x100].map((checksumType) => ({
    name: `whose checksum (${checksumType}) the kernel verifies`,
    block: changed(superblock({ checksumType }), 0),
    found: {},
  })),
];

for (const { name, block, at, found } of superblocks) {
  Deno.test(`parseSuperblock(): a superblock ${name}`, () => {
    const read = parseSuperblock(amidOthers(block), at);
    const expected = found && { ...plainSuperblock, ...found };
    assertEquals(read && pick(read, plainSuperblock), expected);
  });
}

// GUID partition tables (UEFI Specification 2.10, 5.3)

interface Entry {
  type: Uint8Array;
  first: bigint;
  last: bigint;
  /** UTF-16LE. */
  name: Uint8Array;
}

interface TableOptions {
  sectorBytes: number;
  /** How many sectors the disk has. */
  sectors: bigint;
  entryCount: number;
  entryBytes: number;
  /** Where it stands, and where it says so. */
  ownLba: bigint;
  /** Where its copy stands. */
  otherLba: bigint;
  entriesLba: bigint;
  headerBytes: number;
  /** Entries by their number. */
  entries: Record<number, Entry>;
}

const linuxData = Uint8Array.of(
  ...[0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47],
  ...[0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4],
);

function entry(
  name: string | Uint8Array,
  first = 2048n,
  last = 4095n,
  type = linuxData,
): Entry {
  return {
    type,
    first,
    last,
    name: typeof name === "string" ? utf16(name) : name,
  };
}

function utf16(text: string): Uint8Array {
  const bytes = new Uint8Array(2 * text.length);
  const view = viewOf(bytes);
  for (let i = 0; i < text.length; i++) {
    view.setUint16(2 * i, text.charCodeAt(i), true);
  }
  return bytes;
}

/** A type that has only this byte. */
const onlyByte = (at: number) =>
  Uint8Array.from({ length: 16 }, (_, i) => i === at ? 1 : 0);

/** A header, its entries, where both are, and the sector size. */
interface Table {
  header: Uint8Array;
  at: number;
  entries: Uint8Array;
  entriesAt: number;
  sectorBytes: number;
}

function table(
  entriesByNumber: Record<number, Entry>,
  options: Partial<TableOptions> = {},
  spoil: (header: DataView, entries: Uint8Array) => void = () => {},
): Table {
  const { sectorBytes = 512, sectors = 1n << 34n } = options;
  const { entryCount = 128, entryBytes = 128, entriesLba = 2n } = options;
  const { ownLba = 1n, otherLba = sectors - 1n } = options;
  const { headerBytes = 92 } = options;
  const entries = new Uint8Array(entryCount * entryBytes);
  for (const [number, entry] of Object.entries(entriesByNumber)) {
    const at = (Number(number) - 1) * entryBytes;
    const view = viewOf(entries);
    entries.set(entry.type, at);
    entries.set(fsidBytes, at + 16); // of its own
    view.setBigUint64(at + 32, entry.first, true);
    view.setBigUint64(at + 40, entry.last, true);
    view.setBigUint64(at + 48, 4n, true); // attributes
    entries.set(entry.name, at + 56);
    entries.fill(0x5a, at + 128, at + entryBytes); // reserved
  }
  const header = new Uint8Array(sectorBytes);
  const view = viewOf(header);
  header.set(bytesOf("EFI PART"));
  view.setUint32(8, 0x10000, true);
  view.setUint32(12, headerBytes, true);
  view.setBigUint64(24, ownLba, true);
  view.setBigUint64(32, otherLba, true);
  view.setBigUint64(40, 34n, true);
  view.setBigUint64(48, sectors - 34n, true);
  header.set(fsidBytes, 56);
  view.setBigUint64(72, entriesLba, true);
  view.setUint32(80, entryCount, true);
  view.setUint32(84, entryBytes, true);
  view.setUint32(88, crc32(entries), true);
  spoil(view, entries);
  view.setUint32(16, crc32(header.subarray(0, headerBytes)), true);
  return {
    header,
    at: Number(ownLba) * sectorBytes,
    entries,
    entriesAt: Number(entriesLba) * sectorBytes,
    sectorBytes,
  };
}

/** Reads the header, then the entries where it says that they are. */
async function readTable(table: Table, lengths: number[] = []) {
  const { header, at, entries, entriesAt, sectorBytes } = table;
  let isHeader = true;
  return await readGptAt(at, sectorBytes, (place, length) => {
    assertEquals(place, isHeader ? at : entriesAt);
    const bytes = isHeader ? header : entries.slice(0, length);
    isHeader = false;
    lengths.push(length);
    return Promise.resolve(amidOthers(bytes));
  });
}

const partitionsOf = async (table: Table) =>
  (await readTable(table))?.partitions
    .map(({ number, name, startBytes, sizeBytes }) =>
      `${number} ${name} ${startBytes} ${sizeBytes}`
    );

const one = { 1: entry(MAGIC) };
const oneRead = [`1 ${MAGIC} 1048576 1048576`];
const long = "n".repeat(36);

const tables: {
  name: string;
  table: Table;
  /** Number, name, start and size of each; undefined: no table. */
  found: string[] | undefined;
}[] = [
  { name: "without partitions", table: table({}), found: [] },
  { name: "of one partition", table: table(one), found: oneRead },
  {
    name: "with sectors of 4096 bytes",
    table: table({ 1: entry(MAGIC, 256n, 511n) }, { sectorBytes: 4096 }),
    found: oneRead,
  },
  {
    name: "with holes between its partitions, and one in its last entry",
    table: table({
      2: entry("two", 34n, 34n),
      5: entry("five", 35n, 36n),
      128: entry("last", 1n << 33n, (1n << 33n) + 1n),
    }),
    found: [
      "2 two 17408 512",
      "5 five 17920 1024",
      `128 last ${2 ** 42} 1024`,
    ],
  },
  ...Array.from({ length: 16 }, (_, at) => ({
    name: `with a type of which only byte ${at} is not zero`,
    table: table({ 1: entry(MAGIC, 2048n, 4095n, onlyByte(at)) }),
    found: oneRead,
  })),
  {
    name: "with an unused entry that still has a name",
    table: table({ 1: entry("old", 34n, 99n, new Uint8Array(16)) }),
    found: [],
  },
  {
    name: "with a name as long as there is room",
    table: table({ 1: entry(long) }, { entryBytes: 256 }),
    found: [`1 ${long} 1048576 1048576`],
  },
  {
    name: "with something behind the end of a name",
    table: table({ 1: entry(`${MAGIC}\0\nold`) }),
    found: oneRead,
  },
  {
    name: "with a name beyond ASCII",
    table: table({ 1: entry("日本\u{1f433}") }),
    found: ["1 日本\u{1f433} 1048576 1048576"],
  },
  {
    name: "with half of a character",
    table: table({ 1: entry("a\ud800b") }),
    found: ["1 a\ufffdb 1048576 1048576"],
  },
  {
    name: "with a line break in a name",
    table: table({ 1: entry("a\nb") }),
    found: ["1 a\nb 1048576 1048576"],
  },
  {
    name: "without a name",
    table: table({ 1: entry("") }),
    found: ["1  1048576 1048576"],
  },
  ...[4, 56, 128, 240, 248, 480].flatMap((entryCount) => [
    {
      name: `of ${entryCount} entries`,
      table: table(
        { ...one, [entryCount]: entry("x", 34n, 34n) },
        { entryCount },
      ),
      found: [...oneRead, `${entryCount} x 17408 512`],
    },
    {
      name: `of ${entryCount} entries, with sectors of 4096 bytes`,
      table: table(
        { 1: entry(MAGIC, 256n, 511n), [entryCount]: entry("x", 6n, 6n) },
        { entryCount, sectorBytes: 4096 },
      ),
      found: [...oneRead, `${entryCount} x 24576 4096`],
    },
  ]),
  {
    name: "of one entry",
    table: table(one, { entryCount: 1 }),
    found: oneRead,
  },
  { name: "of no entries", table: table({}, { entryCount: 0 }), found: [] },
  {
    name: "of as many entries as anybody can read",
    table: table({ 8192: entry("x", 34n, 34n) }, { entryCount: 8192 }),
    found: ["8192 x 17408 512"],
  },
  {
    name: "of one entry more than anybody can read",
    table: table(one, { entryCount: 8193 }),
    found: undefined,
  },
  {
    name: "of 4096 entries",
    table: table(one, { entryCount: 4096 }),
    found: oneRead,
  },
  {
    name: "of more entries than anybody can read",
    table: table(one, { entryCount: 1 << 16 }),
    found: undefined,
  },
  {
    name: "of entries of 512 bytes",
    table: table({ 1: entry("x", 34n, 34n), ...{ 2: entry(MAGIC) } }, {
      entryBytes: 512,
    }),
    found: ["1 x 17408 512", `2 ${MAGIC} 1048576 1048576`],
  },
  {
    name: "of entries of 4096 bytes",
    table: table(one, { entryBytes: 4096, entryCount: 8 }),
    found: oneRead,
  },
  {
    name: "of entries of 8192 bytes",
    table: table(one, { entryBytes: 8192, entryCount: 8 }),
    found: oneRead,
  },
  {
    name: "of entries of a size that UEFI does not have",
    table: table(one, { entryBytes: 4104, entryCount: 8 }),
    found: undefined,
  },
  {
    name: "of entries that are shorter than UEFI has them",
    table: table({}, {}, (header, entries) => {
      header.setUint32(84, 127, true);
      header.setUint32(88, crc32(entries.subarray(0, 127 * 128)), true);
    }),
    found: undefined,
  },
  {
    name: "with a byte order mark in a name",
    table: table({ 1: entry(`\ufeff${MAGIC}`) }),
    found: [`1 \ufeff${MAGIC} 1048576 1048576`],
  },
  {
    name: "at the end of its disk",
    table: table(one, {
      sectors: 1n << 33n,
      ownLba: (1n << 33n) - 1n,
      otherLba: 1n,
      entriesLba: (1n << 33n) - 33n,
    }),
    found: oneRead,
  },
  {
    name: "that says that it stands elsewhere",
    table: { ...table(one, { ownLba: 2n }), at: 512 },
    found: undefined,
  },
  {
    name: "that was copied to the end of another disk",
    table: { ...table(one, { ownLba: 2047n }), at: 4095 * 512 },
    found: undefined,
  },
  {
    name: "for sectors of 512 bytes, where one for 4096 would stand",
    table: { ...table(one), at: 4096, sectorBytes: 512 },
    found: undefined,
  },
  {
    name: "for sectors of 4096 bytes, where one for 512 would stand",
    table: { ...table(one, { sectorBytes: 4096 }), at: 512 },
    found: undefined,
  },
  {
    name: "for sectors of 512 bytes, taken for one for 4096",
    table: { ...table(one), sectorBytes: 4096 },
    found: undefined,
  },
  {
    name: "with its entries elsewhere",
    table: table(one, { entriesLba: 2000n }),
    found: oneRead,
  },
  {
    name: "with a header of all of its sector",
    table: table(one, { headerBytes: 512 }),
    found: oneRead,
  },
  {
    name: "with a header of all of its sector of 4096 bytes",
    table: table({ 1: entry(MAGIC, 256n, 511n) }, {
      sectorBytes: 4096,
      headerBytes: 4096,
    }),
    found: oneRead,
  },
  {
    name: "with a header that is longer than its sector",
    table: table(one, { headerBytes: 513 }),
    found: undefined,
  },
  {
    name: "with a header that lacks its last byte",
    table: table(one, { headerBytes: 91 }),
    found: undefined,
  },
  {
    name: "whose sector lacks its last byte",
    table: withHeader(table(one), (header) => header.slice(0, 511)),
    found: undefined,
  },
  ...[0, 7].map((at) => ({
    name: `with a wrong byte ${at} of its signature`,
    table: table(one, {}, (header) => header.setUint8(at, 0x78)),
    found: undefined,
  })),
  ...[9, 16, 19, 24, 71, 91].map((at) => ({
    name: `with a wrong byte ${at} of its header`,
    table: withHeader(table(one), (header) => changed(header, at)),
    found: undefined,
  })),
  {
    name: "with something in the field behind its checksum",
    table: table(one, {}, (header) => header.setUint8(20, 1)),
    found: oneRead,
  },
  {
    name: "with something behind its header",
    table: withHeader(table(one), (header) => changed(header, 92)),
    found: oneRead,
  },
  ...[0, 127, 128 * 128 - 1].map((at) => ({
    name: `with a wrong byte ${at} of its entries`,
    table: table(one, {}, (_, entries) => changeIn(entries, at)),
    found: undefined,
  })),
];

for (const { name, table, found } of tables) {
  Deno.test(`readGptAt(): a table ${name}`, async () => {
    assertEquals(await partitionsOf(table), found);
  });
}

Deno.test("readGptAt(): where the table believes that the disk ends", async () => {
  const sectors = 1n << 33n;
  const small = await readTable(table(one, { sectors }));
  assertEquals([small?.endBytes, small?.sectorBytes], [2 ** 42, 512]);
  const large = await readTable(table(one, { sectors, sectorBytes: 4096 }));
  assertEquals([large?.endBytes, large?.sectorBytes], [2 ** 45, 4096]);
});

Deno.test("readGptAt(): how many bytes it asks for", async () => {
  const bytesOf = async (options: Partial<TableOptions>) => {
    const lengths: number[] = [];
    await readTable(table({}, options), lengths);
    return lengths;
  };
  assertEquals(await bytesOf({}), [512, 16 * KiB]);
  assertEquals(await bytesOf({ entryCount: 248 }), [512, 31 * KiB]);
  const few = { entryCount: 4, entryBytes: 256, sectorBytes: 4096 };
  assertEquals(await bytesOf(few), [4096, KiB]);
});

for (
  const [name, length] of [
    ["a byte less", -1],
    ["a byte more", 1],
    ["nothing instead", -16 * KiB],
  ] as const
) {
  Deno.test(`readGptAt(): ${name} of entries than asked for`, async () => {
    const { header, entries } = table(one);
    const bytes = new Uint8Array(entries.length + length);
    bytes.set(entries.subarray(0, bytes.length));
    const found = await readGptAt(
      512,
      512,
      (at) => Promise.resolve(at === 512 ? header : bytes),
    );
    assertEquals(found, undefined);
  });
}

// LBA 0 (UEFI Specification 2.10, 5.2)

/** One with these types in its four entries, in other bytes. */
function mbr(...types: number[]): Uint8Array {
  const start = new Uint8Array(4 * KiB).fill(0xa5, 0, 446).fill(0x5a, 512);
  types.forEach((type, i) => {
    start[446 + 16 * i + 4] = type;
    start[446 + 16 * i + 8] = 1; // it begins at LBA 1
  });
  start.set([0x55, 0xaa], 510);
  return start;
}

const mbrs: {
  name: string;
  start: Uint8Array;
  types: number[];
  announcesGpt?: boolean;
}[] = [
  { name: "zeros", start: new Uint8Array(512), types: [] },
  { name: "nothing at all", start: new Uint8Array(), types: [] },
  { name: "boot code alone", start: mbr(), types: [] },
  {
    name: "four partitions",
    start: mbr(0x83, 0x82, 0x05, 0x01),
    types: [0x83, 0x82, 0x05, 0x01],
  },
  {
    name: "unused entries between",
    start: mbr(0, 0x83, 0, 0x82),
    types: [0x83, 0x82],
  },
  {
    name: "a protective entry",
    start: mbr(0xee),
    types: [0xee],
    announcesGpt: true,
  },
  {
    name: "a protective entry among others",
    start: mbr(0x83, 0xef, 0, 0xee),
    types: [0x83, 0xef, 0xee],
    announcesGpt: true,
  },
  {
    name: "an entry of that type that begins elsewhere",
    start: changed(mbr(0xee), 454),
    types: [0xee],
  },
  { name: "neighbours of 0xee", start: mbr(0xed, 0xef), types: [0xed, 0xef] },
  ...[510, 511].map((at) => ({
    name: `a wrong byte ${at} of the signature`,
    start: changed(mbr(0xee), at),
    types: [],
  })),
];

for (const { name, start, types, announcesGpt = false } of mbrs) {
  Deno.test(`mbrTypes(), isProtectiveMbr(): ${name}`, () => {
    assertEquals(mbrTypes(amidOthers(start)), types);
    assertEquals(isProtectiveMbr(amidOthers(start)), announcesGpt);
  });
}

// Swap areas (linux/swap.h, union swap_header)

/** The first page of a swap area, as mkswap makes it. */
function swapPage(label: Uint8Array, pageBytes = 4 * KiB): Uint8Array {
  const page = new Uint8Array(pageBytes);
  viewOf(page).setUint32(1024, 1, true); // version
  viewOf(page).setUint32(1028, 12345, true); // last page
  page.set(fsidBytes, 1036);
  page.set(fsidBytes, 1044);
  page.set(bytesOf("padding"), 1068);
  page.set(label, 1052);
  page.set(bytesOf("SWAPSPACE2"), pageBytes - 10);
  return page;
}

const swapPages: {
  name: string;
  page: Uint8Array;
  label: string | undefined;
}[] = [
  {
    name: "with a label",
    page: swapPage(bytesOf("lightwhale-swap\0")),
    label: "lightwhale-swap",
  },
  {
    name: "with a label as long as there is room",
    page: swapPage(bytesOf("0123456789abcdef")),
    label: "0123456789abcdef",
  },
  {
    name: "without a label",
    page: swapPage(new Uint8Array(16)),
    label: "",
  },
  {
    name: "with something behind the end of its label",
    page: swapPage(bytesOf("swap\0more")),
    label: "swap",
  },
  {
    name: "with a label that begins with a byte order mark",
    page: swapPage(bytesOf("\ufeffswap\0")),
    label: "\ufeffswap",
  },
  ...[4, 8, 16, 32, 64].map((size) => ({
    name: `of ${size} KiB`,
    page: swapPage(bytesOf("lightwhale-swap\0"), size * KiB),
    label: "lightwhale-swap",
  })),
  ...[8, 16, 32, 64].map((size) => ({
    name: `of ${size} KiB, cut short by a byte`,
    page: swapPage(bytesOf("lightwhale-swap\0"), size * KiB)
      .subarray(0, size * KiB - 1),
    label: undefined,
  })),
  ...[2, 12, 128].map((size) => ({
    name: `of ${size} KiB, which no machine has`,
    page: swapPage(bytesOf("lightwhale-swap\0"), size * KiB),
    label: undefined,
  })),
  {
    name: "and what follows it",
    page: concat(swapPage(bytesOf("swap\0")), bytesOf("more")),
    label: "swap",
  },
  {
    name: "cut short by a byte",
    page: swapPage(bytesOf("swap\0")).subarray(0, 4 * KiB - 1),
    label: undefined,
  },
  ...[4086, 4095].map((at) => ({
    name: `with a wrong byte ${at} of its signature`,
    page: changed(swapPage(bytesOf("swap\0")), at),
    label: undefined,
  })),
  { name: "of zeros", page: new Uint8Array(4 * KiB), label: undefined },
];

for (const { name, page, label } of swapPages) {
  Deno.test(`parseSwapLabel(): a page ${name}`, () => {
    assertEquals(parseSwapLabel(amidOthers(page)), label);
  });
}

// What a member remembers

/** One of version 1.0, which knew no more fields. */
const aRecord: MemberRecord = {
  fsid: "01234567-89ab-cdef-efcd-ab8967452301",
  member: "2f1e",
  epoch: 7,
  present: ["2f1e", "77aa"],
  absent: { "0b0b": 41, "0c0c": 0 },
};

/** One with all that may be in it. */
const fullRecord: MemberRecord = {
  ...aRecord,
  machine: "5af2c8",
  seconds: 1_750_000_000,
  hardware: "wwn-0x5000",
  mounts: ["1a2b", "3c4d"],
  lastSeen: { "0b0b": "1a2b" },
};

/** A slot, spelt by hand as version 1.0.0 (687ecd6) wrote it. */
function slot(json: string, title = "lightwhale-mark 1"): Uint8Array {
  const sum = crc32(bytesOf(json)).toString(16).padStart(8, "0");
  return padded(bytesOf(`${title}\n${sum}\n${json}\n`));
}

const padded = (bytes: Uint8Array) => {
  const block = new Uint8Array(4 * KiB);
  block.set(bytes);
  return block;
};

const empty = new Uint8Array(4 * KiB);
const recordJson = (changes: Record<string, unknown> = {}) =>
  JSON.stringify({ ...aRecord, ...changes });
const older = slot(recordJson({ epoch: 3, member: "older" }));
const newer = slot(recordJson({ epoch: 4, member: "newer" }));
const full = padded(bytesOf("x".repeat(4 * KiB)));

const records: { name: string; slots: Uint8Array; member?: string }[] = [
  { name: "none", slots: concat(empty, empty) },
  {
    name: "in the first slot",
    slots: concat(slot(recordJson()), empty),
    member: "2f1e",
  },
  {
    name: "in the second slot",
    slots: concat(empty, slot(recordJson())),
    member: "2f1e",
  },
  {
    name: "in both, the newer second",
    slots: concat(older, newer),
    member: "newer",
  },
  {
    name: "in both, the newer first",
    slots: concat(newer, older),
    member: "newer",
  },
  {
    name: "in the second, and something else fills the first",
    slots: concat(full, newer),
    member: "newer",
  },
  {
    name: "in the first, and something else fills the second",
    slots: concat(newer, full),
    member: "newer",
  },
  {
    name: "only a first slot could be read",
    slots: newer,
    member: "newer",
  },
  {
    name: "the newer is torn in its middle",
    slots: concat(older, torn(newer, older, 60)),
    member: "older",
  },
  {
    name: "the newer is torn at its first sector",
    slots: concat(torn(longRecord(4), longRecord(2), 512), older),
    member: "older",
  },
  { name: "with a wrong sum", slots: changed(newer, 20) },
  { name: "with a wrong byte", slots: changed(newer, 40) },
  {
    name: "of another title",
    slots: slot(recordJson(), "lightwhale-mark 2"),
  },
  {
    name: "of a longer title",
    slots: slot(recordJson(), "lightwhale-mark 11"),
  },
  { name: "whose text ends with its sum", slots: padded(newer.slice(0, 27)) },
  { name: "whose text is empty", slots: slot("") },
  { name: "whose text is no JSON", slots: slot("{") },
  { name: "whose text is null", slots: slot("null") },
  { name: "whose text is a list", slots: slot("[]") },
  ...[
    { fsid: 1 },
    { fsid: undefined },
    { member: null },
    { epoch: "7" },
    { epoch: 1.5 },
    { epoch: 2 ** 53 },
    { epoch: undefined },
    { present: "2f1e" },
    { present: { length: 1 } },
    { present: ["2f1e", 1] },
    { present: [1, "2f1e"] },
    { present: undefined },
    { absent: null },
    { absent: "x" },
    { absent: undefined },
    { absent: { a: 1, b: "2" } },
    { absent: { a: 1.5, b: 2 } },
    { machine: 1 },
    { machine: null },
    { seconds: "1750000000" },
    { seconds: 1.5 },
    { seconds: null },
    { hardware: ["wwn"] },
    { hardware: null },
    { mounts: "1a2b" },
    { mounts: { length: 1 } },
    { mounts: ["1a2b", 1] },
    { mounts: [1, "1a2b"] },
    { mounts: null },
    { lastSeen: "1a2b" },
    { lastSeen: null },
    { lastSeen: { a: "1", b: 2 } },
    { lastSeen: { a: 1, b: "2" } },
  ].map((wrong) => ({
    name: `that has ${JSON.stringify(wrong, (_, value) => value ?? "nothing")}`,
    slots: slot(recordJson(wrong)),
  })),
  {
    name: "of a later version, which knows more",
    slots: slot(recordJson({ epoch: 0, more: { a: [1] } })),
    member: "2f1e",
  },
  {
    name: "without other members",
    slots: slot(recordJson({ present: [], absent: {} })),
    member: "2f1e",
  },
  ...[
    { machine: "" },
    { seconds: 0 },
    { hardware: "" },
    { mounts: [] },
    { lastSeen: {} },
    { mounts: ["1"], lastSeen: { a: "1" } },
  ].map((more) => ({
    name: `that also has ${JSON.stringify(more)}`,
    slots: slot(recordJson(more)),
    member: "2f1e",
  })),
];

for (const { name, slots, member } of records) {
  Deno.test(`parseRecord(): ${name}`, () => {
    assertEquals(parseRecord(amidOthers(slots))?.member, member);
  });
}

const versions = [["1.0.0", aRecord], ["1.1.0", fullRecord]] as const;
for (const [version, record] of versions) {
  Deno.test(`parseRecord() reads all that ${version} wrote`, () => {
    assertEquals(parseRecord(slot(JSON.stringify(record))), record);
  });

  Deno.test(`formatRecord() writes what parseRecord() reads, and ${version} wrote`, () => {
    const block = formatRecord(record);
    assertEquals(block.length, 4 * KiB);
    const written = new TextDecoder().decode(block);
    const [title, sum, json, rest, ...more] = written.split("\n");
    assertEquals(title, "lightwhale-mark 1");
    assertEquals(sum, crc32(bytesOf(json)).toString(16).padStart(8, "0"));
    assertEquals(JSON.parse(json), record);
    assertEquals(rest, "\0".repeat(rest.length));
    assertEquals(more, []);
    assertEquals(parseRecord(block), record);
  });
}

Deno.test("formatRecord() pads its sum with zeros", () => {
  // One in 16 of the sums begins with a zero.
  const sums = Array.from({ length: 200 }, (_, epoch) => {
    const block = formatRecord({ ...aRecord, epoch });
    assertEquals(parseRecord(block)?.epoch, epoch);
    return new TextDecoder().decode(block).split("\n")[1];
  });
  assert(sums.every((sum) => sum.length === 8), sums.join(" "));
  assert(sums.some((sum) => sum.startsWith("0")), sums.join(" "));
});

Deno.test("formatRecord() of a member whose name is not ASCII", () => {
  const record = { ...aRecord, member: "日本", absent: { "\u{1f433}": 1 } };
  assertEquals(pick(parseRecord(formatRecord(record))!, record), record);
});

Deno.test("formatRecord() fills its block to the last byte, and no further", () => {
  const withName = (length: number) =>
    formatRecord({ ...aRecord, member: "m".repeat(length) });
  const used = withName(0).findLastIndex((byte) => byte !== 0) + 1;
  const block = withName(4 * KiB - used);
  assertEquals(block.at(-1), "\n".charCodeAt(0));
  assertEquals(parseRecord(block)?.member.length, 4 * KiB - used);
  assertThrows(() => withName(4 * KiB - used + 1), Error, "too long");
});

/** One that takes more than a sector. */
function longRecord(epoch: number): Uint8Array {
  const present = Array.from({ length: 60 }, (_, i) => `member ${epoch} ${i}`);
  return slot(recordJson({ epoch, present }));
}

/** The first bytes of a write, and what was there before. */
function torn(write: Uint8Array, before: Uint8Array, at: number) {
  return concat(write.subarray(0, at), before.subarray(at));
}

// The start of a device

const recordAt = [56 * KiB, 60 * KiB];

/** What a device begins with: pieces of it by their places. */
function startWith(pieces: [at: number, bytes: Uint8Array | string][]) {
  const start = new Uint8Array(68 * KiB);
  for (const [at, bytes] of pieces) {
    start.set(typeof bytes === "string" ? bytesOf(bytes) : bytes, at);
  }
  return start;
}

const nothingAtStart: Partial<Reading> = {
  header: false,
  anyway: false,
  onlyHeader: false,
  recordable: true,
  plain: true,
  swapLabel: undefined,
};
const onlyMagic = { header: true, onlyHeader: true };
const onlyAnyway = { ...onlyMagic, anyway: true };
const withoutRecord = { recordable: false };
const ownRecord = slot(JSON.stringify(fullRecord));
const foreignRecord = slot(recordJson({ fsid: "another" }));

const starts: {
  name: string;
  pieces: [at: number, bytes: Uint8Array | string][];
  found: Partial<Reading>;
  /** Label of the Btrfs, and member of the record. */
  btrfs?: string;
  member?: string;
}[] = [
  { name: "zeros", pieces: [], found: {} },
  { name: "the header", pieces: [[0, MAGIC]], found: onlyMagic },
  { name: "the header, a line", pieces: [[0, `${MAGIC}\n`]], found: onlyMagic },
  {
    name: "the header, a line of DOS",
    pieces: [[0, `${MAGIC}\r\n`]],
    found: onlyMagic,
  },
  {
    name: "the header and, on the next line, the word for anyway",
    pieces: [[0, `${MAGIC}\n${ANYWAY}\n`]],
    found: onlyAnyway,
  },
  {
    name: "the same without a line's end",
    pieces: [[0, `${MAGIC}\n${ANYWAY}`]],
    found: onlyAnyway,
  },
  {
    name: "the same, lines of DOS",
    pieces: [[0, `${MAGIC}\r\n${ANYWAY}\r\n`]],
    found: onlyAnyway,
  },
  {
    name: "the word for anyway, and more on its line",
    pieces: [[0, `${MAGIC}\n${ANYWAY} not\n`]],
    found: { header: true },
  },
  {
    name: "the word for anyway on the line of the header",
    pieces: [[0, `${MAGIC} ${ANYWAY}\n`]],
    found: { header: true },
  },
  {
    name: "the word for anyway a line too late",
    pieces: [[0, `${MAGIC}\n\n${ANYWAY}\n`]],
    found: { header: true },
  },
  {
    name: "the word for anyway without the header",
    pieces: [[0, `x${MAGIC}\n${ANYWAY}\n`]],
    found: {},
  },
  {
    name: "the header and text behind it",
    pieces: [[0, `${MAGIC}, and more`]],
    found: { header: true },
  },
  {
    name: "the header without its last letter",
    pieces: [[0, MAGIC.slice(0, -1)]],
    found: {},
  },
  { name: "the header a byte too late", pieces: [[1, MAGIC]], found: {} },
  {
    name: "a byte order mark and the header",
    pieces: [[0, `\ufeff${MAGIC}`]],
    found: {},
  },
  ...[27, 100, 511].map((at) => ({
    name: `the header, and something at byte ${at}`,
    pieces: [[0, MAGIC], [at, "x"]] as [number, string][],
    found: { header: true },
  })),
  {
    name: "the header, and something in the next sector",
    pieces: [[0, MAGIC], [512, "EFI PART"]],
    found: onlyMagic,
  },
  {
    name: "a Btrfs",
    pieces: [[64 * KiB, superblock()]],
    found: {},
    btrfs: "a label",
  },
  {
    name: "a Btrfs in another place",
    pieces: [[60 * KiB, superblock()]],
    found: withoutRecord,
  },
  ...recordAt.map((at) => ({
    name: `a Btrfs and its record at ${at / KiB} KiB`,
    pieces: [[64 * KiB, superblock()], [at, ownRecord]] as [
      number,
      Uint8Array,
    ][],
    found: {},
    btrfs: "a label",
    member: aRecord.member,
  })),
  {
    name: "a Btrfs and the record of another",
    pieces: [[64 * KiB, superblock()], [recordAt[0], foreignRecord]],
    found: {},
    btrfs: "a label",
  },
  {
    name: "a record and no Btrfs",
    pieces: [[recordAt[0], ownRecord]],
    found: {},
    member: "2f1e", // which has left
  },
  {
    name: "swap and, behind it, a Btrfs",
    pieces: [
      [0, swapPage(bytesOf("lightwhale-swap\0"))],
      [64 * KiB, superblock({ label: bytesOf(`${DATA}\0`) })],
    ],
    found: { swapLabel: "lightwhale-swap" },
    btrfs: DATA,
  },
  {
    name: "swap of 64 KiB, which ends in the place of a record",
    pieces: [[0, swapPage(bytesOf("lightwhale-swap\0"), 64 * KiB)]],
    found: { swapLabel: "lightwhale-swap" },
  },

  // May a record be written here?
  ...recordAt.flatMap((at) => [
    {
      name: `something foreign at ${at / KiB} KiB`,
      pieces: [[at, "GRUB"]] as [number, string][],
      found: withoutRecord,
    },
    {
      name: `something foreign at the end of the slot at ${at / KiB} KiB`,
      pieces: [[at + 4 * KiB - 1, "\x7f"]] as [number, string][],
      found: withoutRecord,
    },
    {
      name: `a record at ${at / KiB} KiB that lost its first sector`,
      pieces: [[at + 512, longRecord(4).subarray(512)]] as [
        number,
        Uint8Array,
      ][],
      found: {},
    },
    {
      name: `a record at ${at / KiB} KiB that lost all but its first sector`,
      pieces: [[at, longRecord(4).subarray(0, 512)]] as [number, Uint8Array][],
      found: {},
    },
  ]),
  {
    name: "something before the records",
    pieces: [[recordAt[0] - 1, "x"]],
    found: {},
  },
  {
    name: "a slot full of spaces",
    pieces: [[recordAt[0], " ".repeat(4 * KiB)]],
    found: withoutRecord,
  },
  {
    name: "text at the very start of a slot",
    pieces: [[recordAt[0], "x"]],
    found: withoutRecord,
  },
  {
    name: "text in the first sector of a slot",
    pieces: [[recordAt[0] + 511, "x"]],
    found: withoutRecord,
  },
  ...["\n", " ", "~"].map((character) => ({
    name: `${JSON.stringify(character)} behind the first sector of a slot`,
    pieces: [[recordAt[0] + 512, character]] as [number, string][],
    found: {},
  })),
  ...["\x1f", "\x0b", "\x7f", "\u00e9"].map((character) => ({
    name: `${JSON.stringify(character)} behind the first sector of a slot`,
    pieces: [[recordAt[0] + 512, character]] as [number, string][],
    found: withoutRecord,
  })),
];

for (const { name, pieces, found, btrfs, member } of starts) {
  Deno.test(`parseStart(): ${name}`, () => {
    const read = parseStart(amidOthers(startWith(pieces)));
    assertEquals(pick(read, nothingAtStart), { ...nothingAtStart, ...found });
    assertEquals([read.btrfs?.label, read.record?.member], [btrfs, member]);
  });
}

Deno.test("parseStart() of a device that ends at once", () => {
  const read = parseStart(new Uint8Array());
  assertEquals(pick(read, nothingAtStart), nothingAtStart);
});

// Files of the kernel

/** A mount of the data filesystem, as it is mostly seen. */
const aMount: Mount = {
  root: "/",
  target: "/mnt/lightwhale-data",
  type: "btrfs",
  source: "/dev/sda2",
  deviceNumber: "0:40",
  superOptions: ["rw", "space_cache=v2", "subvolid=5"],
};

const mountinfos: { name: string; text: string; mounts: Partial<Mount>[] }[] = [
  { name: "nothing", text: "", mounts: [] },
  {
    name: "without optional fields",
    text: "36 35 0:40 / /mnt/lightwhale-data rw,noatime - btrfs /dev/sda2 " +
      "rw,space_cache=v2,subvolid=5\n",
    mounts: [{}],
  },
  {
    name: "with one optional field",
    text: "36 35 0:40 / /mnt/lightwhale-data rw shared:1 - btrfs /dev/sda2 " +
      "rw,space_cache=v2,subvolid=5\n",
    mounts: [{}],
  },
  {
    name: "with two optional fields, and without a line's end",
    text: "36 35 0:40 / /mnt/lightwhale-data rw shared:1 master:2 - btrfs " +
      "/dev/sda2 rw,space_cache=v2,subvolid=5",
    mounts: [{}],
  },
  {
    name: "several lines, oldest first",
    text: "1 1 8:1 / / ro - squashfs /dev/sda1 ro\n" +
      "36 35 0:40 / /mnt/lightwhale-data rw - btrfs /dev/sda2 " +
      "rw,space_cache=v2,subvolid=5\n" +
      "37 35 0:41 /x /srv rw - tmpfs lightwhale-data rw,size=5k\n",
    mounts: [
      {
        target: "/",
        type: "squashfs",
        source: "/dev/sda1",
        deviceNumber: "8:1",
        superOptions: ["ro"],
      },
      {},
      {
        root: "/x",
        target: "/srv",
        type: "tmpfs",
        source: "lightwhale-data",
        deviceNumber: "0:41",
        superOptions: ["rw", "size=5k"],
      },
    ],
  },
  {
    name: "spaces, tabs, line breaks and backslashes in names",
    text: String
      .raw`36 35 0:40 / /a\040b\011c\012d\134e rw - btrfs /dev/x\0401 rw` +
      "\n",
    mounts: [{
      target: "/a b\tc\nd\\e",
      source: "/dev/x 1",
      superOptions: ["rw"],
    }],
  },
  {
    name: "an escaped backslash before digits",
    text: String.raw`36 35 0:40 / /a\134040 rw - btrfs /dev/sda2 rw` + "\n",
    mounts: [{ target: "/a\\040", superOptions: ["rw"] }],
  },
  {
    name: "a mount point with a dash, and an option that is one",
    text: "36 35 0:40 /- /- rw,- - btrfs - rw,-\n",
    mounts: [{
      root: "/-",
      target: "/-",
      source: "-",
      superOptions: ["rw", "-"],
    }],
  },
  {
    name: "without a source",
    text: "36 35 0:40 / /mnt/lightwhale-data rw - tmpfs  rw\n",
    mounts: [{ type: "tmpfs", source: "", superOptions: ["rw"] }],
  },
  {
    name: "a name beyond ASCII",
    text: "36 35 0:40 / /日本 rw - btrfs /dev/sda2 rw\n",
    mounts: [{ target: "/日本", superOptions: ["rw"] }],
  },
  {
    name: "a line that is cut short",
    text: "36 35 0:40 / /mnt/lightwhale-data rw - btrfs /dev/sda2",
    mounts: [],
  },
  {
    name: "a line without its separator",
    text: "36 35 0:40 / /mnt/lightwhale-data rw btrfs /dev/sda2 rw\n",
    mounts: [],
  },
];

for (const { name, text, mounts } of mountinfos) {
  Deno.test(`parseMountinfo(): ${name}`, () => {
    assertEquals(
      parseMountinfo(text).map((mount) => pick(mount, aMount)),
      mounts.map((mount) => ({ ...aMount, ...mount })),
    );
  });
}

const uevent = "MAJOR=8\nMINOR=3\nDEVNAME=sda3\nDEVTYPE=partition\nPARTN=3\n";
const partnames: { name: string; text: string; found?: string }[] = [
  { name: "none", text: uevent },
  { name: "nothing at all", text: "" },
  { name: "a name", text: `${uevent}PARTNAME=${MAGIC}\n`, found: MAGIC },
  { name: "without a line's end", text: `${uevent}PARTNAME=a`, found: "a" },
  { name: "an empty name", text: `${uevent}PARTNAME=\n`, found: "" },
  { name: "a name with spaces", text: "PARTNAME= a b \n", found: " a b " },
  { name: "a name with a sign", text: "PARTNAME=a=b\n", found: "a=b" },
  {
    name: "a name with a line in it that looks like another name",
    text: `${uevent}PARTNAME=a\nPARTNAME=${MAGIC}\n`,
    found: "a",
  },
  { name: "a key that only ends so", text: `X_PARTNAME=a\n` },
  { name: "a value that looks so", text: `DEVNAME=PARTNAME=a\n` },
];

for (const { name, text, found } of partnames) {
  Deno.test(`parsePartname(): ${name}`, () => {
    assertEquals(parsePartname(text), found);
  });
}

const plainSettings: Partial<Settings> = {
  waitMs: 10_000,
  off: false,
  required: false,
  noSwap: false,
  dataUuid: undefined,
};

const kernelLines: {
  line: string;
  settings: Partial<Settings>;
  warnings?: number;
}[] = [
  { line: "", settings: {} },
  { line: "quiet root=/dev/sda1 rw\n", settings: {} },
  { line: "lightwhale.persistence=off\n", settings: { off: true } },
  { line: "a lightwhale.persistence=off\tb", settings: { off: true } },
  { line: "lightwhale.persistence=on", settings: {} },
  {
    line: "lightwhale.persistence=on lightwhale.persistence=off",
    settings: { off: true },
  },
  {
    line: "lightwhale.persistence=off lightwhale.persistence=on",
    settings: {},
  },
  ...["off", "no", "false", "0", "OFF", "Off", "No", "FALSE"].flatMap(
    (value) => [
      { line: `lightwhale.persistence=${value}`, settings: { off: true } },
      { line: `lightwhale.persistence="${value}"`, settings: { off: true } },
      { line: `"lightwhale.persistence=${value}"`, settings: { off: true } },
      { line: `lightwhale.swap=${value}`, settings: { noSwap: true } },
    ],
  ),
  ...["required", "Required", '"REQUIRED"'].map((value) => ({
    line: `lightwhale.persistence=${value}`,
    settings: { required: true },
  })),
  {
    line: "lightwhale.persistence=required lightwhale.persistence=off",
    settings: { off: true },
  },
  ...["on", "yes", "true", "1", "ON"].flatMap(
    (value) => [
      { line: `lightwhale.persistence=${value}`, settings: {} },
      { line: `lightwhale.persistence="${value}" quiet`, settings: {} },
      { line: `lightwhale.swap=${value}`, settings: {} },
    ],
  ),
  ...["", "offf", "of", "2", "none", "disabled", "on,off"].map((value) => ({
    line: `lightwhale.persistence=${value}`,
    settings: { off: true },
    warnings: 1,
  })),
  {
    line: "lightwhale.persistence",
    settings: { off: true },
    warnings: 1,
  },
  {
    line: 'LightWhale.Persistence="off"',
    settings: { off: true },
  },
  ...[".persistance", "-persistence", "_persistence", ".persist"].map(
    (name) => ({ line: `lightwhale${name}=off`, settings: { off: true } }),
  ),
  {
    line: "lightwhale.persistence:off",
    settings: { off: true },
    warnings: 1,
  },
  {
    line: 'a="b lightwhale.persistence=off" lightwhale.wait=3',
    settings: { waitMs: 3000 },
  },
  {
    line: '"a=b lightwhale.persistence=off" lightwhale.wait=3',
    settings: { waitMs: 3000 },
  },
  {
    line: 'lightwhale.wait="4" lightwhale.persistence="off',
    settings: { waitMs: 4000, off: true },
  },
  {
    line: 'lightwhale.persistence=" off "',
    settings: { off: true },
  },
  { line: 'lightwhale.data="ABC-def"', settings: { dataUuid: "abc-def" } },
  { line: "lightwhale.data=UUID=ABC", settings: { dataUuid: "abc" } },
  { line: "lightwhale.data=", settings: {} },
  { line: 'lightwhale.data=""', settings: {} },
  { line: "xlightwhale.persistence=off", settings: {} },
  { line: "noswap", settings: { noSwap: true } },
  { line: "noswapx xnoswap", settings: {} },
  { line: "lightwhale.swap=off", settings: { noSwap: true } },
  { line: "lightwhale.swap=on", settings: {} },
  { line: "noswap lightwhale.swap=on", settings: { noSwap: true } },
  { line: "lightwhale.wait=0", settings: { waitMs: 0 } },
  { line: "lightwhale.wait=2.5", settings: { waitMs: 2500 } },
  { line: "lightwhale.wait=99999", settings: { waitMs: 99_999_000 } },
  { line: "lightwhale.wait=100000", settings: {}, warnings: 1 },
  { line: "lightwhale.wait=", settings: {}, warnings: 1 },
  { line: "lightwhale.wait=x", settings: {}, warnings: 1 },
  { line: "lightwhale.wait=-1", settings: {}, warnings: 1 },
  { line: "lightwhale.wait=1e3", settings: {}, warnings: 1 },
  { line: "lightwhale.wait=5x", settings: {}, warnings: 1 },
  { line: "lightwhale.wait=1.", settings: {}, warnings: 1 },
  {
    line: "lightwhale.wait=x lightwhale.wait=3",
    settings: { waitMs: 3000 },
  },
  { line: "lightwhale.data=ABC-def", settings: { dataUuid: "abc-def" } },
  { line: "lightwhale.data=a=b", settings: { dataUuid: "a=b" } },
  { line: "=lightwhale.data lightwhale.swap", settings: {} },
  { line: "lightwhale.waitx", settings: {} },
];

for (const { line, settings, warnings = 0 } of kernelLines) {
  Deno.test(`parseKernelCommandLine(): ${JSON.stringify(line)}`, () => {
    const found = parseKernelCommandLine(line);
    assertEquals(
      { ...pick(found.settings, plainSettings) },
      { ...plainSettings, ...settings },
    );
    assertEquals(found.warnings.length, warnings);
  });
}

// Helpers

/** The properties of an object that a model has, and no others. */
function pick<T extends object>(object: T, model: Partial<T>): T {
  return Object.fromEntries(
    Object.keys(model).map((key) => [key, object[key as keyof T]]),
  ) as T;
}

function concat(...parts: Uint8Array[]): Uint8Array {
  const all = new Uint8Array(parts.reduce((sum, p) => sum + p.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

/** The same bytes, but for one. */
function changed(bytes: Uint8Array, at: number): Uint8Array {
  const copy = bytes.slice();
  changeIn(copy, at);
  return copy;
}

function changeIn(bytes: Uint8Array, at: number): void {
  bytes[at] ^= 0xff;
}

function withHeader(
  table: Table,
  change: (header: Uint8Array) => Uint8Array,
): Table {
  return { ...table, header: change(table.header) };
}

// Records of the kernel log (kernel/printk/printk.c, devkmsg_write())

const texts: Record<string, { text: string; pieces: number }> = {
  "nothing": { text: "", pieces: 1 },
  "what just fits": { text: "x".repeat(900), pieces: 1 },
  "a byte too many": { text: "x".repeat(901), pieces: 2 },
  "3,000 bytes": { text: "Cannot ".repeat(429).slice(0, 3000), pieces: 4 },
  "characters of two bytes, at odd places": {
    text: "x" + "ä".repeat(899),
    pieces: 3,
  },
  "characters of three bytes": { text: "…".repeat(301), pieces: 2 },
  "characters of four bytes": { text: "😀".repeat(500), pieces: 3 },
  "half of a character": { text: "\ud83d".repeat(400), pieces: 2 },
};

for (const [name, { text, pieces }] of Object.entries(texts)) {
  Deno.test(`piecesOf() splits at characters: ${name}`, () => {
    const found = piecesOf(text, 900);
    assertEquals(found.length, pieces);
    for (const piece of found) assert(bytesOf(piece).length <= 900, piece);
    const joined = found.map((piece, i) => {
      if (i > 0) assertEquals(piece.slice(0, 3), "...");
      if (i < found.length - 1) assertEquals(piece.slice(-3), "...");
      return piece.slice(i > 0 ? 3 : 0, i < found.length - 1 ? -3 : undefined);
    });
    assertEquals(joined.join(""), text);
  });
}

// Payloads

/** What a payload would write: name and contents. */
const read = (text: string) =>
  parsePayload(bytesOf(text)).entries.map(({ name, contents }) => [
    name,
    new TextDecoder().decode(contents),
  ]);

const hash = `$6$salt$${"a".repeat(86)}`;

const readable: Record<string, [text: string, entries: string[][]]> = {
  "files, a password, and what stands behind them": [
    payloadOf(
      `-- etc/a --\n1\n\n2\n-- password op --\n${hash}\n-- var/b --\n`,
    ) + "\0\0-- etc/c --\n",
    [["etc/a", "1\n\n2\n"], ["password op", `${hash}\n`], ["var/b", ""]],
  ],
  "no newline behind the end": [
    payloadOf("-- etc/a --\n1\n").slice(0, -1),
    [["etc/a", "1\n"]],
  ],
  "zeros right behind the end": [
    payloadOf("-- etc/a --\n1\n").slice(0, -1) + "\0\0junk",
    [["etc/a", "1\n"]],
  ],
  "nothing to write": [payloadOf(""), []],
  "blank lines and comments before the first file": [
    payloadOf("\n# -- etc/b --\n  \n-- etc/a --\n1\n"),
    [["etc/a", "1\n"]],
  ],
  "lines that end in CRLF": [
    payloadOf("-- etc/a --\n1\n\r2\n").replaceAll("\n", "\r\n"),
    [["etc/a", "1\n\r2\n"]],
  ],
  "a password that ends in CRLF": [
    payloadOf("-- password a --\n*\n").replaceAll("\n", "\r\n"),
    [["password a", "*\n"]],
  ],
  "carriage returns in a file": [
    payloadOf("-- etc/a --\n1\r\n"),
    [["etc/a", "1\r\n"]],
  ],
  "lines that are no markers": [
    payloadOf("-- etc/a --\n--x--\n-- x\nx --\n-- --\n -- a quote --\n"),
    [["etc/a", "--x--\n-- x\nx --\n-- --\n -- a quote --\n"]],
  ],
  "more spaces in a marker, and in a path": [
    payloadOf("--   etc/a b  --\n1\n"),
    [["etc/a b", "1\n"]],
  ],
  "the other line before the title": [
    payloadOf("-- etc/a --\n1\n", `${ANYWAY}\nlightwhale-payload 1`),
    [["etc/a", "1\n"]],
  ],
  "the other line behind the title": [
    payloadOf(`${ANYWAY}\n-- etc/a --\n1\n`),
    [["etc/a", "1\n"]],
  ],
  "a file's text, without header and title": [
    "-- etc/a --\n1\n-- end --",
    [["etc/a", "1\n"]],
  ],
  "names as long as may be, and of other languages": [
    payloadOf(`-- etc/${"x".repeat(255)} --\n-- home/\u{1f433}/\ufeffé --\n`),
    [[`etc/${"x".repeat(255)}`, ""], ["home/\u{1f433}/\ufeffé", ""]],
  ],
  "a file beside a directory of a similar name": [
    payloadOf("-- etc/a/b --\n-- etc/a.b --\n-- etc/ab/c --\n"),
    [["etc/a/b", ""], ["etc/a.b", ""], ["etc/ab/c", ""]],
  ],
};

for (const [what, [text, entries]] of Object.entries(readable)) {
  Deno.test(`parsePayload() reads ${what}`, () => {
    assertEquals(read(text), entries);
  });
}

for (const [what, [text, says]] of Object.entries(badTexts)) {
  Deno.test(`parsePayload() refuses ${what}`, () => {
    const { message } = assertThrows(() => read(text), Error);
    assertMatch(message, new RegExp(`^${says}`));
  });
}

for (
  const password of [
    ...["*", hash, `$5$rounds=5000$salt$${"b".repeat(43)}`],
    ...[`$y$j9T$salt./$${"c".repeat(43)}`, `$1$salt$${"d".repeat(22)}`],
    `$2b$05$${"e".repeat(53)}`,
    `$7$CU..../....${"g".repeat(60)}`,
  ]
) {
  Deno.test(`parsePayload() takes the password ${password}`, () => {
    assertEquals(read(payloadOf(`-- password a --\n${password}\n`)), [
      ["password a", `${password}\n`],
    ]);
  });
}

Deno.test("parsePayload() reads 480 KiB, copies nothing, names no contents", () => {
  const lines = "x\n".repeat(245_729); // 480 KiB with what is around it
  const bytes = bytesOf(payloadOf(`-- etc/a --\n${lines}`));
  const { entries, endBytes, atBytes } = parsePayload(bytes);
  assertEquals(entries[0].contents.buffer, bytes.buffer);
  assert(endBytes - atBytes > 480 * KiB - 100);
  for (const [text] of Object.values(badTexts)) {
    const hidden = text.replaceAll("x\n", "SECRET\n");
    const { message } = assertThrows(() => read(hidden), Error);
    assert(!message.includes("SECRET"), message);
  }
});

Deno.test("parsePayload() judges long lines of spaces at once", () => {
  const spaces = " ".repeat(200_000);
  const lines = [` -- etc/${spaces}x`, ` -- password ${spaces}-`, `${spaces}x`]
    .concat(` --${spaces}`, ` -- end${spaces}x`, `-- etc/${spaces}-`);
  for (const line of lines) {
    const startedMs = performance.now();
    read(payloadOf(`-- etc/a --\n${line}\n`));
    assert(performance.now() - startedMs < 2000, line.slice(0, 20));
  }
});

Deno.test("parsePayload() ends behind the end marker, whatever follows it", () => {
  for (const end of ["", "\n", "\r\n", "\0"]) {
    const lines = payloadOf("-- etc/a --\n").slice(0, -1);
    const text = end === "\r\n" ? lines.replaceAll("\n", end) : lines;
    assertEquals(parsePayload(bytesOf(text + end)).endBytes, text.length);
  }
});

Deno.test("parsePayload() refuses a name that is not UTF-8", () => {
  const bytes = bytesOf(payloadOf("-- etc/x? --\n"));
  bytes[bytes.indexOf(0x3f)] = 0xff;
  const { message } = assertThrows(() => parsePayload(bytes), Error);
  assertMatch(message, /^line 3: its name is not UTF-8/);
});

Deno.test("parseCopy() reads what formatCopyTitle() begins, and nothing less", () => {
  const text = bytesOf(payloadOf("-- etc/a --\n1\n"));
  const copy = new Uint8Array(8 * KiB);
  copy.set(formatCopyTitle(text));
  copy.set(text, 4 * KiB);
  assertEquals(parseCopy(copy), text);
  for (const at of [0, 26, 4 * KiB, 4 * KiB + text.length - 1]) {
    const torn = copy.slice();
    torn[at] ^= 1;
    assertEquals(parseCopy(torn), undefined, `${at}`);
  }
  assertEquals(parseCopy(copy.subarray(0, 4 * KiB + 10)), undefined);
  assertEquals(parseCopy(new Uint8Array(8 * KiB)), undefined);
  assertEquals(parseCopy(new Uint8Array()), undefined);
});

/** The lines behind the header: a payload, its place, and the other line. */
const magicLines: Record<
  string,
  Pick<Reading, "anyway" | "payloadPlace" | "onlyHeader">
> = {
  "": { anyway: false, payloadPlace: undefined, onlyHeader: true },
  "lightwhale-payload 1\n": {
    anyway: false,
    payloadPlace: "original",
    onlyHeader: false,
  },
  "lightwhale-payload 1\r\n": {
    anyway: false,
    payloadPlace: "original",
    onlyHeader: false,
  },
  "lightwhale-payload 2\n": {
    anyway: false,
    payloadPlace: "original",
    onlyHeader: false,
  },
  "lightwhale-payload copied\n": {
    anyway: false,
    payloadPlace: "copy",
    onlyHeader: false,
  },
  "lightwhale-anyway\nlightwhale-payload 1\n": {
    anyway: true,
    payloadPlace: "original",
    onlyHeader: false,
  },
  "lightwhale-payload 1\nlightwhale-anyway\n": {
    anyway: true,
    payloadPlace: "original",
    onlyHeader: false,
  },
  "lightwhale-anyway\nlightwhale-payload copied\n": {
    anyway: true,
    payloadPlace: "copy",
    onlyHeader: false,
  },
  "x\nlightwhale-payload 1\n": {
    anyway: false,
    payloadPlace: undefined,
    onlyHeader: false,
  },
  "x\nlightwhale-anyway\n": {
    anyway: false,
    payloadPlace: undefined,
    onlyHeader: false,
  },
};

for (
  const [lines, { anyway, payloadPlace, onlyHeader }] of Object.entries(
    magicLines,
  )
) {
  Deno.test(`parseStart(): the header, then ${JSON.stringify(lines)}`, () => {
    const read = parseStart(startWith([[0, `${MAGIC}\n${lines}`]]));
    assertEquals(
      [read.header, read.anyway, read.payloadPlace, read.onlyHeader],
      [true, anyway, payloadPlace, onlyHeader],
    );
  });
}

Deno.test("parseStart(): a payload without a header is none", () => {
  const read = parseStart(startWith([[0, "x\nlightwhale-payload 1\n"]]));
  assertEquals([read.header, read.payloadPlace], [false, undefined]);
});
