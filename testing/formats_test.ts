/**
 * What stands on a disk or in a file of the kernel, byte by byte, and what is
 * read from it. The bytes are made here, after the formats' own documents; no
 * disk is touched, no root is needed.
 */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { crc32 } from "node:zlib";
import {
  formatMark,
  MAGIC,
  type Mark,
  type Mount,
  parseGpt,
  parseKernelCommandLine,
  parseMark,
  parseMountinfo,
  parsePartname,
  parseSuperblock,
  parseSwapLabel,
  type Settings,
} from "../persistence.ts";
import { repairSuperblock } from "./superblock.ts";

const KiB = 1024;

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
  generation: bigint;
  logRoot: bigint;
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
    [0x30, 0x10000n], // bytenr
    [0x38, 1n], // flags
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
  usedBytes: 0x300000001,
  hasLog: false,
  intact: true,
};

const superblocks: {
  name: string;
  block: Uint8Array;
  found: Partial<typeof plainSuperblock> | undefined;
}[] = [
  { name: "as mkfs makes it", block: superblock(), found: {} },
  {
    name: "with a log tree",
    block: superblock({ logRoot: 1n << 40n }),
    found: { hasLog: true },
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

for (const { name, block, found } of superblocks) {
  Deno.test(`parseSuperblock(): a superblock ${name}`, () => {
    const read = parseSuperblock(amidOthers(block));
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

/** A header, its entries, and the sector size. */
interface Table {
  header: Uint8Array;
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
  view.setBigUint64(24, 1n, true); // its own place
  view.setBigUint64(32, sectors - 1n, true);
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
    entries,
    entriesAt: Number(entriesLba) * sectorBytes,
    sectorBytes,
  };
}

function readTable({ header, entries, entriesAt, sectorBytes }: Table) {
  return parseGpt(
    amidOthers(header),
    (at, length) => {
      assertEquals(at, entriesAt);
      return amidOthers(entries.slice(0, length));
    },
    sectorBytes,
  );
}

const partitionsOf = (table: Table) =>
  readTable(table)?.partitions
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
  {
    name: "of 4 entries",
    table: table(one, { entryCount: 4 }),
    found: oneRead,
  },
  {
    name: "of 248 entries",
    table: table({ ...one, 248: entry("x", 34n, 34n) }, { entryCount: 248 }),
    found: [...oneRead, "248 x 17408 512"],
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
    found: undefined,
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
  Deno.test(`parseGpt(): a table ${name}`, () => {
    assertEquals(partitionsOf(table), found);
  });
}

Deno.test("parseGpt(): where the table believes that the disk ends", () => {
  const sectors = 1n << 33n;
  const small = readTable(table(one, { sectors }));
  assertEquals(small?.endBytes, 2 ** 42);
  const large = readTable(table(one, { sectors, sectorBytes: 4096 }));
  assertEquals(large?.endBytes, 2 ** 45);
});

for (
  const [name, length] of [["a byte less", -1], ["a byte more", 1]] as const
) {
  Deno.test(`parseGpt(): ${name} of entries than asked for`, () => {
    const { header, entries } = table(one);
    const bytes = new Uint8Array(entries.length + length);
    bytes.set(entries.subarray(0, bytes.length));
    assertEquals(parseGpt(header, () => bytes, 512), undefined);
  });
}

Deno.test("parseGpt(): entries that cannot be read", () => {
  assertEquals(parseGpt(table(one).header, () => undefined, 512), undefined);
});

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

const aMark: Mark = {
  fsid: "01234567-89ab-cdef-efcd-ab8967452301",
  member: "2f1e",
  epoch: 7,
  present: ["2f1e", "77aa"],
  absent: { "0b0b": 41, "0c0c": 0 },
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
const markJson = (changes: Record<string, unknown> = {}) =>
  JSON.stringify({ ...aMark, ...changes });
const older = slot(markJson({ epoch: 3, member: "older" }));
const newer = slot(markJson({ epoch: 4, member: "newer" }));
const full = padded(bytesOf("x".repeat(4 * KiB)));

const marks: { name: string; slots: Uint8Array; member?: string }[] = [
  { name: "none", slots: concat(empty, empty) },
  {
    name: "in the first slot",
    slots: concat(slot(markJson()), empty),
    member: "2f1e",
  },
  {
    name: "in the second slot",
    slots: concat(empty, slot(markJson())),
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
    slots: concat(torn(longMark(4), longMark(2), 512), older),
    member: "older",
  },
  { name: "with a wrong sum", slots: changed(newer, 20) },
  { name: "with a wrong byte", slots: changed(newer, 40) },
  {
    name: "of another title",
    slots: slot(markJson(), "lightwhale-mark 2"),
  },
  {
    name: "of a longer title",
    slots: slot(markJson(), "lightwhale-mark 11"),
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
  ].map((wrong) => ({
    name: `that has ${JSON.stringify(wrong, (_, value) => value ?? "nothing")}`,
    slots: slot(markJson(wrong)),
  })),
  {
    name: "of a later version, which knows more",
    slots: slot(markJson({ epoch: 0, more: { a: [1] } })),
    member: "2f1e",
  },
  {
    name: "without other members",
    slots: slot(markJson({ present: [], absent: {} })),
    member: "2f1e",
  },
];

for (const { name, slots, member } of marks) {
  Deno.test(`parseMark(): ${name}`, () => {
    assertEquals(parseMark(amidOthers(slots))?.member, member);
  });
}

Deno.test("parseMark() reads all that a mark says", () => {
  assertEquals(
    pick(parseMark(slot(markJson()))!, aMark),
    aMark,
  );
});

Deno.test("formatMark() writes what parseMark() reads, and version 1.0.0 read", () => {
  const block = formatMark(aMark);
  assertEquals(block.length, 4 * KiB);
  const written = new TextDecoder().decode(block);
  const [title, sum, json, rest, ...more] = written.split("\n");
  assertEquals(title, "lightwhale-mark 1");
  assertEquals(sum, crc32(bytesOf(json)).toString(16).padStart(8, "0"));
  assertEquals(pick(JSON.parse(json), aMark), aMark);
  assertEquals(rest, "\0".repeat(rest.length));
  assertEquals(more, []);
  assertEquals(pick(parseMark(block)!, aMark), aMark);
});

Deno.test("formatMark() pads its sum with zeros", () => {
  // One in 16 of the sums begins with a zero.
  const sums = Array.from({ length: 200 }, (_, epoch) => {
    const block = formatMark({ ...aMark, epoch });
    assertEquals(parseMark(block)?.epoch, epoch);
    return new TextDecoder().decode(block).split("\n")[1];
  });
  assert(sums.every((sum) => sum.length === 8), sums.join(" "));
  assert(sums.some((sum) => sum.startsWith("0")), sums.join(" "));
});

Deno.test("formatMark() of a member whose name is not ASCII", () => {
  const mark = { ...aMark, member: "日本", absent: { "\u{1f433}": 1 } };
  assertEquals(pick(parseMark(formatMark(mark))!, mark), mark);
});

Deno.test("formatMark() fills its block to the last byte, and no further", () => {
  const withName = (length: number) =>
    formatMark({ ...aMark, member: "m".repeat(length) });
  const used = withName(0).findLastIndex((byte) => byte !== 0) + 1;
  const block = withName(4 * KiB - used);
  assertEquals(block.at(-1), "\n".charCodeAt(0));
  assertEquals(parseMark(block)?.member.length, 4 * KiB - used);
  assertThrows(() => withName(4 * KiB - used + 1), Error, "too long");
});

/** One that takes more than a sector. */
function longMark(epoch: number): Uint8Array {
  const present = Array.from({ length: 60 }, (_, i) => `member ${epoch} ${i}`);
  return slot(markJson({ epoch, present }));
}

/** The first bytes of a write, and what was there before. */
function torn(write: Uint8Array, before: Uint8Array, at: number) {
  return concat(write.subarray(0, at), before.subarray(at));
}

// Files of the kernel

/** A mount of the data filesystem, as it is mostly seen. */
const aMount: Mount = {
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
    mounts: [{ target: "/-", source: "-", superOptions: ["rw", "-"] }],
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

/** Of an object the properties that a model has, and no others. */
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
