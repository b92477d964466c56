/**
 * What others wrote, mutated: the readers of persistence.ts must neither throw
 * nor hang, and no bytes may lead to a format that README.md does not promise.
 *
 *     SEED=1 CASES=1000 deno test -A testing/fuzz_test.ts
 *
 * Each case has a seed of its own, which a failure names: SEED and CASES=1
 * repeat it.
 */
import { assert, assertEquals } from "@std/assert";
import { Buffer } from "node:buffer";
import { resolve } from "node:path";
import process from "node:process";
import { crc32 } from "node:zlib";
import {
  applyEntry,
  type BlockDevice,
  DATA,
  decide,
  decideJob,
  describePlan,
  type Facts,
  type FilesystemState,
  formatRecord,
  isMagic,
  MAGIC,
  type Member,
  type Mount,
  parseCommandLine,
  parseKernelCommandLine,
  parseMountinfo,
  parsePartname,
  parsePayload,
  parseRecord,
  parseStart,
  parseSuperblock,
  parseSwapLabel,
  type Plan,
  readGptAt,
  setDataRoot,
  SWAP,
  UNFINISHED,
  UsageError,
  whatItHolds,
} from "../persistence.ts";
import { payloadOf } from "./payloads.ts";
import { needPrograms } from "./programs.ts";
import { countFrom, diceOf, type Random, seed } from "./random.ts";
import { repairSuperblock } from "./superblock.ts";
import { command, MiB } from "./system.ts";

const KiB = 1024;
const cases = countFrom("CASES", 30_000);
/** No case may take longer; a slow machine needs less than a hundredth. */
const LONGEST_MS = 2000;

/** Texts that someone may have put where a label, a name or a path stands. */
const hostileTexts = [
  ...["", MAGIC, DATA, SWAP, UNFINISHED, `${MAGIC} `, `${DATA}\n`, `${DATA}x`],
  ...["$(touch x)", "`touch x`", "; touch x;", "' || touch x '", '" & "'],
  ...["a b", "a\nb", "\t", "\\040", "-o", "--help", "../../etc", "%s%n"],
  ...["\u{1f433}", "\ufeff", "\ud800", "a,b:c=d", "x".repeat(300), "\x1b[2J"],
];

/** Runs all cases of a property; the first that fails is named by its seed. */
function fuzz(name: string, property: (random: Random) => unknown): void {
  Deno.test(`fuzz: ${name}`, async () => {
    console.log(`SEED=${seed} CASES=${cases}`);
    for (let i = 0; i < cases; i++) {
      const before = process.cpuUsage();
      try {
        await property(diceOf(seed + i));
        // Not by the clock, which goes on while a busy machine does other work.
        const tookMs = process.cpuUsage(before).user / 1000;
        assert(tookMs < LONGEST_MS, `It took ${tookMs} ms`);
      } catch (error) {
        const { message } = error as Error;
        throw new Error(`SEED=${seed + i} CASES=1: ${message}`, {
          cause: error,
        });
      }
    }
  });
}

// Real bytes to begin with

/** The start of what mkfs, mkswap and sfdisk make: see {@linkcode corpus}. */
interface Corpus {
  /** Superblocks, one for each checksum algorithm. */
  superblocks: Uint8Array[];
  swap: Uint8Array;
  /** The first 34 sectors of 512 bytes. */
  gpt: Uint8Array;
}

const corpus = await makeCorpus();

async function makeCorpus(): Promise<Corpus> {
  needPrograms("mkfs.btrfs", "sfdisk");
  const folder = await Deno.makeTempDir({ prefix: "persistence-fuzz-" });
  const image = `${folder}/image`;
  const make = async (script: string, at: number, length: number) => {
    await Deno.writeFile(image, new Uint8Array());
    await Deno.truncate(image, 128 * MiB);
    await command(["sh", "-euc", script, "sh", image]);
    using file = await Deno.open(image);
    await file.seek(at, Deno.SeekMode.Start);
    const bytes = new Uint8Array(length);
    assertEquals(await file.read(bytes), length);
    return bytes;
  };
  const checksums = ["crc32c", "sha256", "xxhash", "blake2"];
  try {
    const superblocks = [];
    for (const checksum of checksums) {
      const script = `mkfs.btrfs -q --csum ${checksum} -L ${DATA} "$1"`;
      superblocks.push(await make(script, 64 * KiB, 4 * KiB));
    }
    return {
      superblocks,
      swap: await make(`mkswap -q -L ${SWAP} "$1"`, 0, 4 * KiB),
      gpt: await make(
        `printf '%s\\n' 'size=8MiB, name=${SWAP}' 'size=8MiB, name=other' \
           'name=${MAGIC}' | sfdisk -q --label gpt "$1"`,
        0,
        34 * 512,
      ),
    };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

Deno.test("the bytes to begin with are read as what they are", async () => {
  for (const superblock of corpus.superblocks) {
    const { label, intact } = parseSuperblock(superblock)!;
    assertEquals({ label, intact }, { label: DATA, intact: true });
  }
  assertEquals(parseSwapLabel(corpus.swap), SWAP);
  const names = (await gptOf(corpus.gpt, 512))?.partitions
    .map(({ name }) => name);
  assertEquals(names, [SWAP, "other", MAGIC]);
});

// Mutation

const interestingNumbers = [
  ...[0n, 1n, 2n, 4n, 127n, 128n, 255n, 256n, 0x7fffn, 0xffffn],
  ...[0x7fff_ffffn, 0x8000_0000n, 0xffff_ffffn, 1n << 53n],
  ...[(1n << 63n) - 1n, 1n << 63n, (1n << 64n) - 1n],
];

/** Changes bytes in place. */
function mutate(bytes: Uint8Array, random: Random): void {
  if (bytes.length < 8) return;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let times = 1 + random.below(4); times > 0; times--) {
    const at = random.below(bytes.length - 7);
    switch (random.below(6)) {
      case 0:
        bytes[at] ^= 1 << random.below(8);
        break;
      case 1:
        bytes[at] = random.below(256);
        break;
      case 2:
        view.setBigUint64(at, random.pick(interestingNumbers), true);
        break;
      case 3:
        view.setUint32(
          at,
          Number(random.pick(interestingNumbers) & 0xffffffffn),
          true,
        );
        break;
      case 4:
        bytes.copyWithin(at, random.below(bytes.length), bytes.length);
        break;
      case 5:
        put(bytes, at, random.pick(hostileTexts));
    }
  }
}

/** Writes text, NUL-terminated, as far as there is room. */
function put(bytes: Uint8Array, at: number, text: string): void {
  const encoded = new TextEncoder().encode(`${text}\0`);
  bytes.set(encoded.subarray(0, bytes.length - at), at);
}

/** The same bytes, or fewer. */
function cutShort(bytes: Uint8Array, random: Random): Uint8Array {
  if (!random.chance(0.1)) return bytes;
  return bytes.subarray(0, random.below(bytes.length + 1));
}

function repairGpt(table: Uint8Array, sectorBytes: number): void {
  const view = new DataView(table.buffer, table.byteOffset, table.length);
  const header = sectorBytes;
  const count = view.getUint32(header + 80, true);
  const size = view.getUint32(header + 84, true);
  const entries = table.subarray(2 * header, 2 * header + count * size);
  view.setUint32(header + 88, crc32(entries), true);
  const length = view.getUint32(header + 12, true);
  if (length > sectorBytes) return;
  view.setUint32(header + 16, 0, true);
  view.setUint32(
    header + 16,
    crc32(table.subarray(header, header + length)),
    true,
  );
}

/** The same table as sfdisk writes it for sectors of this size. */
function gptFor(sectorBytes: number): Uint8Array {
  const table = new Uint8Array(2 * sectorBytes + 16 * KiB);
  table.set(corpus.gpt.subarray(512, 1024), sectorBytes);
  table.set(corpus.gpt.subarray(1024), 2 * sectorBytes);
  return table;
}

function gptOf(start: Uint8Array, sectorBytes: number) {
  return readGptAt(
    sectorBytes,
    sectorBytes,
    (at, length) => Promise.resolve(start.subarray(at, at + length)),
  );
}

// The readers

fuzz("parseSuperblock() gives a superblock or none", (random) => {
  const block = random.pick(corpus.superblocks).slice();
  mutate(block, random);
  if (random.chance(0.3)) put(block, 0x12b, random.pick(hostileTexts));
  if (random.chance(0.5)) repairSuperblock(block);
  const found = parseSuperblock(cutShort(block, random));
  if (!found) return;
  assertEquals(typeof found.intact, "boolean");
  assert(/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(found.fsid));
  assert(!found.label.includes("\0") && found.label.length <= 256);
  const numbers = Object.values(found).filter((v) => typeof v === "number");
  assert(numbers.length >= 6);
  for (const number of numbers) {
    assert(number >= 0 && Number.isFinite(number), `A number is ${number}`);
  }
});

fuzz(
  "readGptAt() gives a table or none, and asks for little",
  async (random) => {
    const sectorBytes = random.pick([512, 4096]);
    const table = gptFor(sectorBytes);
    mutate(table.subarray(sectorBytes, sectorBytes + 128), random);
    if (random.chance(0.5)) mutate(table.subarray(2 * sectorBytes), random);
    if (random.chance(0.7)) repairGpt(table, sectorBytes);
    const found = await readGptAt(sectorBytes, sectorBytes, (at, length) => {
      assert(Number.isFinite(at) && at >= 0, `entries at ${at}`);
      assert(length >= 0 && length <= MiB, `${length} bytes of entries`);
      return Promise.resolve(cutShort(table.subarray(at, at + length), random));
    });
    for (const partition of found?.partitions ?? []) {
      assert(!partition.name.includes("\0") && partition.name.length <= 36);
      assert(Number.isInteger(partition.number) && partition.number >= 1);
      assert(Number.isFinite(partition.startBytes + partition.sizeBytes));
    }
  },
);

fuzz("parseSwapLabel() gives a label or none", (random) => {
  const page = corpus.swap.slice();
  mutate(page, random);
  if (random.chance(0.5)) put(page, 1052, random.pick(hostileTexts));
  if (random.chance(0.5)) page.set(corpus.swap.subarray(4086), 4086);
  const label = parseSwapLabel(cutShort(page, random));
  assert(label === undefined || label.length <= 16);
});

fuzz("parseRecord() gives a record or none, never half of one", (random) => {
  const start = new Uint8Array(64 * KiB);
  const records = [56, 60].map((at) => {
    const record = {
      fsid: random.pick(fsids),
      member: random.pick(hostileTexts),
      epoch: random.below(100),
      present: [random.pick(hostileTexts), "a"],
      absent: { b: random.below(100) },
    };
    start.set(formatRecord(record), at * KiB);
    return record;
  });
  const newest = records[1].epoch > records[0].epoch ? records[1] : records[0];
  const wellFormed = JSON.parse(JSON.stringify(newest).toWellFormed());
  assertEquals(parseRecord(start.subarray(56 * KiB)), wellFormed);
  // A torn write: what is found must be one of the two, or nothing.
  const at = random.pick([56, 60]) * KiB;
  mutate(start.subarray(at, at + 300), random);
  const found = parseRecord(cutShort(start.subarray(56 * KiB), random));
  if (!found) return;
  const written = records.map((record) =>
    JSON.stringify(record).toWellFormed()
  );
  assert(written.includes(JSON.stringify(found)), JSON.stringify(found));
});

const textOf = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

/** A field as the kernel writes it (fs/proc_namespace.c, mangle()). */
const escapeField = (text: string) =>
  text.replace(
    /[ \t\n\\#]/g,
    (letter) => `\\${letter.charCodeAt(0).toString(8).padStart(3, "0")}`,
  );

/** A mount whose names anybody may have chosen, and its line. */
function someMount(random: Random): { mount: Mount; line: string } {
  const some = () => Array.from({ length: random.below(3) }, someOption);
  const someOption = () => random.pick(["rw", "a=b", "-", "x:1", "subvol=/"]);
  const someName = () =>
    Array.from(
      { length: 1 + random.below(3) },
      () => random.pick([...hostileTexts, "\\", "\\134", "#", "-", "/", " - "]),
    )
      .join("");
  const mount: Mount = {
    root: `/${someName()}`,
    target: `/${someName()}`,
    type: random.pick(["btrfs", "tmpfs", "fuse.x"]),
    source: someName(),
    deviceNumber: `${random.below(300)}:${random.below(300)}`,
    superOptions: ["rw", ...some()],
  };
  const fields = [
    ...["36", "35", mount.deviceNumber, escapeField(mount.root)],
    ...[escapeField(mount.target), "rw,noatime"],
    ...random.pick([[], ["shared:1"], ["shared:2", "master:1"]]),
    ...["-", mount.type, escapeField(mount.source)],
    mount.superOptions.join(","),
  ];
  return { mount, line: fields.join(" ") };
}

fuzz("parseMountinfo() reads what the kernel wrote", (random) => {
  const mounts = Array.from({ length: 4 }, () => someMount(random));
  const lines = mounts.map(({ line }) => line);
  const all = mounts.map(({ mount }) => mount);
  assertEquals(parseMountinfo(`${lines.join("\n")}\n`), all);
  // A line that is none hides no other.
  const bytes = new TextEncoder().encode(lines[1]);
  mutate(bytes, random);
  const text = [lines[0], textOf(bytes), lines[2], lines[3]].join("\n");
  const found = parseMountinfo(text);
  assertEquals(found[0], all[0]);
  assertEquals(found.slice(-2), all.slice(2));
});

fuzz("parsePartname() takes the kernel's word, not a partition's", (random) => {
  const kernel = "MAJOR=8\nMINOR=3\nDEVNAME=sda3\nDEVTYPE=partition\nPARTN=3";
  const name = random.pick(hostileTexts) + random.pick([
    ...["", "\nDEVNAME=sdb", "\nPARTN=1", "\n__proto__=x", "\n=", "\n\n"],
    ...["\nPARTNAME=x", "\rPARTNAME=x", "\u2028x"],
  ]);
  const text = `${kernel}\nPARTNAME=${name}`;
  const [first] = name.split("\n");
  assertEquals(parsePartname(text), first);
  assertEquals(parsePartname(kernel), undefined);
  // Whatever follows the first line of the name changes nothing.
  const rest = new TextEncoder().encode(`${uevents}${text}\n`);
  mutate(rest, random);
  const more = `${kernel}\nPARTNAME=${first}\n${textOf(rest)}`;
  assertEquals(parsePartname(more), first);
});

/** Names of other partitions. */
const uevents = [MAGIC, DATA, SWAP].map((name) => `PARTNAME=${name}\n`).join(
  "",
);

/** Words of command lines, right and wrong. */
const words = [
  ...["--enable", "--disable", "--status", "--dry-run", "--json", "--force"],
  ...["--wait", "--wait=3", "--wait=-1", "--wait=1e9", "--wait=0x10", "3"],
  ...["--devices", "--devices=/dev/null", "--devices=", "--root", "--root=/"],
  ...["--quiet", "--verbose", "--maintain", "--", "-", "-x", "--no-quiet"],
  ...["--__proto__=x", "--constructor", "--enable=false", "--wait.a=1"],
  ...["lightwhale.wait=5", "lightwhale.wait=", "lightwhale.wait=x", "noswap"],
  ...["lightwhale.persistence=off", "lightwhale.data=", "lightwhale.swap=off"],
  ...["lightwhale.data=$(touch x)", "quiet", "root=/dev/sda1", "/dev/sda"],
];

fuzz(
  "parseCommandLine() gives settings that make sense, or why not",
  (random) => {
    const pick = () => random.pick(random.chance(0.3) ? hostileTexts : words);
    const line = (most: number) =>
      Array.from({ length: random.below(most) }, pick);
    const kernel = line(6).join(" ");
    // What the boot loader says is never a reason not to boot.
    const fromKernel = parseKernelCommandLine(kernel);
    try {
      const { mode, operands, given } = parseCommandLine(line(5));
      const settings = { ...fromKernel.settings, ...given };
      const { waitMs, root, only, off, noSwap } = settings;
      assert(
        waitMs >= 0 && waitMs < 1e8 && Number.isFinite(waitMs),
        `${waitMs}`,
      );
      assert(root.startsWith("/"), root);
      assert(only === undefined || only.length > 0);
      assert(typeof off === "boolean" && typeof noSwap === "boolean");
      assertEquals(operands.length > 0, ["enable", "disable"].includes(mode));
      const last = kernel.split(" ").at(-1);
      assert(off || last !== "lightwhale.persistence=off", kernel);
    } catch (error) {
      if (!(error instanceof UsageError)) throw error;
      assert(error.message.length > 10, error.message);
    }
  },
);

/** Values as somebody may have typed them, which JSON.stringify() would not. */
const typedValues = [
  ...["9223372036854775807", "1e400", "-0", "1.0", "0.1E-7", "1e-999"],
  ...['"\\u0041"', '"\\ud800"', '"\\/\\\\"', '"}, {\\""', '"é🐋"', "{}", "[]"],
];

/** The source text of each value that is not an object, with its key. */
function sourcesOf(json: string): string[] {
  const sources: string[] = [];
  // TypeScript does not know of the third argument yet.
  const note = (
    key: string,
    value: unknown,
    { source }: { source?: string },
  ) => {
    sources.push(`${key}: ${source ?? Object.keys(value as object)}`);
    return value;
  };
  JSON.parse(json, note as (key: string, value: unknown) => unknown);
  return sources;
}

fuzz("setDataRoot() changes nothing else, or says why not", (random) => {
  const space = () =>
    random.pick(["", "", " ", "\n  ", "\r\n\t", "\u00a0"].slice(0, 5));
  const value = (depth: number): string => {
    const list = (item: () => string) =>
      Array.from({ length: random.below(4) }, () => space() + item() + space())
        .join(",");
    const key = () =>
      random.chance(0.3)
        ? random.pick(['"data-root"', '"data\\u002droot"', '"graph"'])
        : JSON.stringify(random.pick([...hostileTexts, "__proto__", "0"]));
    switch (random.below(depth > 0 ? 9 : 6)) {
      case 0:
        return JSON.stringify(random.pick(hostileTexts));
      case 1:
        return random.pick(["true", "null", '"/var/lib/docker"', '"/image"']);
      case 2:
        return `[${depth > 0 ? list(() => value(depth - 1)) : ""}]`;
      case 3:
      case 4:
      case 5:
        return random.pick(typedValues);
      default:
        return `{${
          list(() => `${key()}${space()}:${space()}${value(depth - 1)}`)
        }${space()}}`;
    }
  };
  let before = random.pick(["", "\ufeff", "\n"]) + value(4) + space();
  if (random.chance(0.3)) {
    const bytes = new TextEncoder().encode(before);
    mutate(bytes, random);
    before = new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
  }
  let result: ReturnType<typeof setDataRoot>;
  try {
    result = setDataRoot(before, "/image");
  } catch (error) {
    const { message } = error as Error;
    assert(/^(daemon.json is not|"|dockerd does)/.test(message), message);
    return;
  }
  const { contents, dataRoot } = result;
  assertEquals(setDataRoot(contents, "/image"), { contents, dataRoot });
  const json = contents.replace(/^\ufeff/, "").trim();
  const ours = "/mnt/lightwhale-data/lightwhale-state/docker";
  const { "data-root": root, graph } = JSON.parse(json);
  if (contents === before) {
    if (root && graph === undefined) {
      assertEquals(resolve(root), resolve(dataRoot));
    }
    return;
  }
  assertEquals(dataRoot, ours);
  assert([root, graph].includes(ours), contents);
  // What was put in, and what stood in its place.
  let start = 0;
  while (contents[start] === before[start]) start++;
  let end = 0;
  while (
    contents.at(-1 - end) === before.at(-1 - end) &&
    end < Math.min(contents.length, before.length) - start
  ) end++;
  const removed = before.slice(start, before.length - end);
  assert(removed.length < 50, `"${removed}" of ${before}`);
  const isRoot = (source: string) => /^(data-root|graph|): /.test(source);
  const rest = (sources: string[]) => sources.filter((text) => !isRoot(text));
  const old = before.replace(/^\ufeff/, "").trim() || "{}";
  assertEquals(rest(sourcesOf(json)), rest(sourcesOf(old)), before);
});

// Machines

const fsids = [1, 2, 3].map((n) =>
  `${n}`.repeat(8) + "-0000-0000-0000-000000000000"
);
const members = ["a", "b", "c", "d", "e"];

/** The first 68 KiB of a device that may hold anything. */
function someStart(random: Random, isDisk: boolean): Uint8Array {
  const start = new Uint8Array(68 * KiB);
  if (random.chance(0.3)) start.set(corpus.swap);
  if (random.chance(0.5)) {
    const block = random.pick(corpus.superblocks).slice();
    const view = new DataView(block.buffer);
    const fsid = random.pick(fsids).replaceAll("-", "");
    block.set(Buffer.from(fsid, "hex"), 0x20);
    const label = random.chance(0.7) ? DATA : random.pick(hostileTexts);
    block.fill(0, 0x12b, 0x12b + 256);
    put(block.subarray(0, 0x12b + 256), 0x12b, label);
    view.setBigUint64(0x48, BigInt(1 + random.below(5)), true);
    view.setBigUint64(0x88, BigInt(1 + random.below(4)), true);
    view.setBigUint64(0xc9, BigInt(random.below(5)), true);
    if (random.chance(0.2)) mutate(block, random);
    if (random.chance(0.9)) repairSuperblock(block);
    start.set(block, 64 * KiB);
  }
  for (const at of [56, 60]) {
    if (!random.chance(0.5)) continue;
    const [fsid, member] = [random.pick(fsids), random.pick(members)];
    const present = members.filter((id) => id === member || random.chance(0.5));
    const absent = Object.fromEntries(
      members.filter((id) => !present.includes(id))
        .map((id) => [id, random.below(6)]),
    );
    const epoch = random.below(9);
    const record = { fsid, member, epoch, present, absent };
    start.set(formatRecord(record), at * KiB);
  }
  if (isDisk && random.chance(0.5)) {
    const table = corpus.gpt.slice();
    for (let i = 0; i < 3; i++) {
      const name = random.chance(0.7)
        ? random.pick([DATA, SWAP, MAGIC, "other"])
        : random.pick(hostileTexts);
      const at = 1024 + 128 * i + 56;
      table.fill(0, at, at + 72);
      table.set(Buffer.from(name.slice(0, 36), "utf16le"), at);
    }
    if (random.chance(0.1)) mutate(table.subarray(512), random);
    repairGpt(table, 512);
    start.set(table.subarray(512), 512);
    const protectiveMbr = table.subarray(446, 512);
    if (random.chance(0.8)) start.set(protectiveMbr, 446);
  }
  if (random.chance(0.5)) {
    put(start, 0, random.chance(0.8) ? MAGIC : MAGIC.slice(0, -1));
  }
  if (random.chance(0.2)) mutate(start.subarray(0, 600), random);
  return start;
}

/** The facts that look() would find, and the bytes that they came from. */
interface Machine {
  facts: Facts;
  bytes: Map<BlockDevice, Uint8Array>;
}

async function someMachine(random: Random): Promise<Machine> {
  const devices: BlockDevice[] = [];
  const bytes = new Map<BlockDevice, Uint8Array>();
  const add = async (device: BlockDevice) => {
    const start = someStart(random, device.kind === "disk");
    bytes.set(device, start);
    devices.push(device);
    device.read = parseStart(start);
    if (random.chance(0.05)) {
      device.read.error = `Cannot read ${device.path}: EIO`;
      return;
    }
    if (device.kind === "disk") {
      device.read.gpt = await gptOf(start, 512);
      device.read.table = device.read.gpt && "gpt";
    }
    if (random.chance(0.05)) {
      const label = random.pick(hostileTexts);
      const backup = parseSuperblock(corpus.superblocks[0])!;
      device.read.backup = { ...backup, label };
    }
    if (random.chance(0.2)) {
      const label = random.pick([...hostileTexts, undefined]);
      device.signatures = [{ type: random.pick(["ext4", "btrfs"]), label }];
    }
  };
  const sizes = [0, MiB, 100 * MiB, 111 * MiB, 600 * MiB, 2 ** 31, 2 ** 40];
  for (let i = 1 + random.below(5); i > 0; i--) {
    const name = `${random.pick(["sd", "vd"])}${"abcdef"[i]}`;
    const disk: BlockDevice = {
      name,
      path: `/dev/${name}`,
      kind: random.chance(0.9) ? "disk" : "volume",
      disk: name,
      number: 0,
      startBytes: 0,
      sizeBytes: random.pick(sizes),
      sectorBytes: 512,
      readOnly: random.chance(0.05),
      read: parseStart(new Uint8Array()),
      magic: false,
      holds: { kind: "nothing of ours" },
    };
    if (random.chance(0.1)) {
      disk.inUse = random.pick(["swap in use", "held by /dev/md0"]);
    }
    await add(disk);
    for (const entry of disk.read.gpt?.partitions.slice(0, 8) ?? []) {
      await add({
        ...disk,
        name: `${name}${entry.number}`,
        path: `/dev/${name}${entry.number}`,
        kind: "partition",
        number: entry.number,
        startBytes: entry.startBytes,
        sizeBytes: entry.sizeBytes,
        entry: random.chance(0.2) ? entry : undefined,
        partitionName: entry.name,
        inUse: random.chance(0.05) ? "held by /dev/dm-0" : undefined,
        signatures: undefined,
      });
    }
  }
  for (const device of devices) device.magic = isMagic(device);
  for (const device of devices) device.holds = whatItHolds(device, devices);
  const mounted: Facts["mounted"] = {
    root: "/",
    target: "/mnt/lightwhale-data",
    type: random.pick(["btrfs", "tmpfs"]),
    source: "/dev/sdb1",
    fsid: random.pick(fsids),
    deviceNumber: "0:30",
    superOptions: ["rw"],
  };
  const facts: Facts = {
    devices,
    diskPending: random.chance(0.1),
    memoryBytes: random.pick([512 * MiB, 2 ** 34]),
    mounted: random.chance(0.1) ? mounted : undefined,
    misfits: devices.filter(() => random.chance(0.05))
      .map((device) => ({ device, why: "it is too small" })),
  };
  return { facts, bytes };
}

function beginsWithHeader(start: Uint8Array): boolean {
  return Buffer.from(start.subarray(0, 27)).toString("latin1") === MAGIC;
}

/** Is there an undamaged superblock with our label, by the bytes alone? */
function isDataMember(start: Uint8Array): boolean {
  const block = start.slice(64 * KiB);
  const bytes = Buffer.from(block);
  if (bytes.toString("latin1", 0x40, 0x48) !== "_BHRfS_M") return false;
  if (bytes.toString("latin1", 0x12b, 0x12b + 16) !== `${DATA}\0`) return false;
  const kind = bytes.readUInt16LE(0xc4);
  if (kind !== 0 && kind !== 2) return true;
  const before = block.slice(0, 32);
  repairSuperblock(block);
  return Buffer.compare(
    block.subarray(0, kind ? 32 : 4),
    before.subarray(0, kind ? 32 : 4),
  ) === 0;
}

fuzz("decide() formats only what is magic", async (random) => {
  const machine = await someMachine(random);
  const { facts } = machine;
  const settings = {
    root: "/",
    waitMs: 0,
    off: random.chance(0.05),
    required: random.chance(0.1),
    noSwap: random.chance(0.2),
    dataUuid: random.chance(0.1) ? random.pick(fsids) : undefined,
  };
  const plan = decide(facts, settings);
  for (const line of describePlan(plan)) assertEquals(typeof line, "string");
  JSON.stringify(plan);
  assertFormats(plan, machine);
  assertMount(plan, machine);

  const state: FilesystemState = {
    operation: random.pick(["none", "balance", "balance paused"]),
    devids: [1, 2, 3],
    missing: [1, 2, 3].filter(() => random.chance(0.3)),
    profiles: {
      data: ["single", "raid1"].filter(() => random.chance(0.5)),
      metadata: [random.pick(["dup", "raid1", "raid5"])],
      system: [random.pick(["dup", "raid1c3", "single"])],
    },
    errors: {},
  };
  const pending = { scrub: random.chance(0.3), "remove missing": false };
  const job = decideJob(plan, state, pending);
  // A job wipes these; nothing else may ever be among them.
  if (job?.kind === "add" || job?.kind === "replace") {
    assert(
      plan.joins.some(({ device }) => device === job.device) ||
        job.device === plan.data?.replaceTarget,
      "it joins unasked",
    );
  }
  if (job?.kind === "rebuild") {
    const stale: unknown[] = plan.data?.stale ?? [];
    assert(stale.includes(job.device), "it is wiped unasked");
  }
});

/**
 * The power went after this one got the superblock of the commit that adds it
 * to the other, and before the other, up to then the only one, got it as well.
 */
function wasJoining(device: BlockDevice, other: BlockDevice): boolean {
  const [second, first] = [device.read.btrfs, other.read.btrfs];
  return second !== undefined && first !== undefined && first.intact &&
    first.fsid === second.fsid && first.numDevices === 1 &&
    second.numDevices === 2 && second.generation === first.generation + 1;
}

/** Every device that would be formatted is magic, free, and holds no data. */
function assertFormats(plan: Plan, { facts, bytes }: Machine): void {
  const formatted = [...plan.create?.members ?? [], ...plan.joins];
  const isMember = (device: BlockDevice) =>
    !device.read.error && isDataMember(bytes.get(device)!) &&
    !isStartedOver(facts.devices.find(({ name }) => name === device.disk)!);
  const isStartedOver = (disk: BlockDevice) =>
    beginsWithHeader(bytes.get(disk)!) && disk.read.gpt !== undefined &&
    bytes.get(disk)!.subarray(27, 512).every((byte) => byte === 0);
  for (const { device, swapBytes, dataBytes } of formatted) {
    const why = `${device.path} would be formatted, though`;
    assert(!facts.mounted || !plan.create, "it formats a running system");
    if (device.kind === "disk") {
      assert(beginsWithHeader(bytes.get(device)!), `${why} it has no header`);
    } else {
      assertEquals(device.kind, "partition", `${why} it is no disk`);
      assertEquals(device.partitionName, MAGIC, `${why} it has no magic name`);
    }
    const parts = device.kind === "partition"
      ? [device]
      : facts.devices.filter(({ disk }) => disk === device.disk);
    for (const part of parts) {
      const joins = facts.devices.some((other) => wasJoining(part, other));
      assert(!isMember(part) || joins, `${why} ${part.path} holds data`);
      assert(!part.inUse, `${why} ${part.path} is ${part.inUse}`);
    }
    assert(!device.readOnly, `${why} it is read-only`);
    assert(!device.read.error, `${why} it cannot be read`);
    assert(Number.isInteger(swapBytes) && swapBytes >= 0, `swap ${swapBytes}`);
    assert(dataBytes >= 109 * MiB, `${why} it is too small`);
    assert(swapBytes + dataBytes <= device.sizeBytes, `${why} it is too small`);
  }
  const all = formatted.map(({ device }) => device);
  assertEquals(new Set(all).size, all.length, "one is formatted twice");
  if (!plan.create) return;
  assertEquals(plan.joins, [], "it creates and joins");
  assert(!plan.data, "it creates beside a data filesystem");
  // Damage is not emptiness, unless the disk was given up by its header.
  const givenUp = facts.devices
    .filter((device) => !device.read.error)
    .filter((device) => beginsWithHeader(bytes.get(device)!));
  for (const device of facts.devices) {
    if (device.inUse?.startsWith("held by")) continue;
    const why = `others are formatted, though ${device.path}`;
    assert(!isMember(device), `${why} holds data`);
    if (givenUp.some(({ name }) => name === device.disk)) continue;
    assert(!device.read.error, `${why} cannot be read`);
    const wasData = device.kind === "partition" &&
      device.partitionName === DATA;
    assert(!wasData, `${why} was a data partition`);
  }
}

/** May `device` have all that `writer` has, by what their records tell? */
function hasSeenAll(device: Member, writer: Member): boolean {
  const [own, other] = [device.holds.record, writer.holds.record];
  if (!own || !other) return true;
  const wasThere = other.present.includes(own.member);
  const seen = own.absent[other.member] ?? device.holds.btrfs.generation;
  const commits = writer.holds.btrfs.generation - seen;
  return commits <= 1 && (wasThere || !wroteSince(writer, own.member));
}

/** Did a device write after the mount in which this member was last there? */
function wroteSince({ holds }: Member, member: string): boolean {
  const { btrfs: { generation, hasLog }, record } = holds;
  return generation > (record!.absent[member] ?? -1) || hasLog;
}

/** What is mounted together belongs together; what is wiped is proven stale. */
function assertMount(plan: Plan, { bytes }: Machine): void {
  const disarmed = plan.repairs.filter((repair) => repair.do === "clear magic");
  for (const { device } of disarmed) {
    const marked = device.kind === "disk"
      ? beginsWithHeader(bytes.get(device)!)
      : device.partitionName === MAGIC;
    assert(marked && device.kind !== "volume", `${device.path} is not magic`);
  }
  const { data } = plan;
  if (!data) return;
  const { members, stale, conflicting, fsid } = data;
  for (const member of [...members, ...stale]) {
    assertEquals(member.holds.btrfs.fsid, fsid);
    assertEquals(member.holds.btrfs.intact, true);
    const excluded = conflicting;
    assert(!excluded.includes(member), `${member.path} is in and out`);
  }
  for (const device of stale) {
    assert(!members.includes(device), `${device.path} is stale and used`);
    assert(
      members.some((member) =>
        !hasSeenAll(device, member) && hasSeenAll(member, device)
      ),
      `${device.path} would be wiped without proof`,
    );
  }
  const devids = members.map(({ holds }) => holds.btrfs.devid);
  assertEquals(new Set(devids).size, devids.length, "a devid twice");
  assert(plan.mode !== "persistent" || members.length > 0, "mounts nothing");
  for (const area of plan.swap) {
    assertEquals(area.read.swapLabel, SWAP);
    assert(members.some(({ disk }) => disk === area.disk), "another's swap");
  }
}

// Payloads

const payloadNames = [
  ...["etc/a", "etc/a/b", "home/op/.ssh/x", "var/x", "etc/sudoers.d/x"],
  ...["password op", "password root", "password nobody", "password ../x"],
  ...["etc/link/x", "etc/link", "var/run/x", "home/broken/x", "home/deep/l/x"],
  ...["etc/../../x", "../x", "/etc/x", "etc/./x", "etc//x", "usr/x", "etc"],
  ...["etc/passwd", "etc/shadow", "etc/shadow/x", "etc/dir", "end", ""],
  ...["etc/.", "etc/..", "etc/...", "etc/a b", "etc/\u202e", "etc/-rf"],
];
const payloadLines = [
  ...[
    "*",
    "x",
    "#!/bin/sh",
    "$1$salt$1234567890123456789012",
    "",
    "--",
    "-- --",
  ],
  ...["-- end --", "-- end -- ", " -- etc/x --", "lightwhale-payload 1"],
];

/** A tree like a system's, from which links lead out of it. */
async function makeTree(): Promise<string> {
  const folder = await Deno.makeTempDir({
    dir: "/dev/shm",
    prefix: "payload-",
  });
  await command([
    ...["sh", "-euc"],
    `cd "$1"; mkdir -p outside tree/etc/dir tree/home/deep tree/var outside/run
     echo kept >outside/kept
     ln -s ../../outside tree/etc/link; ln -s ../../outside/run tree/var/run
     ln -s "$1/outside/nothing" tree/home/broken
     ln -s "$1/outside" tree/home/deep/l
     printf 'root::1::::::\\nop:x:2::::::\\n' >tree/etc/shadow`,
    ...["sh", folder],
  ]);
  return folder;
}

Deno.test({
  name: "fuzz: a payload writes into three directories, and through no link",
  ignore: Deno.uid() !== 0,
  fn: async () => {
    console.log(`SEED=${seed} CASES=${cases}`);
    let folder = await makeTree();
    let applied = 0;
    const outside = () =>
      [
        ...[...Deno.readDirSync(folder)].map(({ name }) => name).sort(),
        ...[...Deno.readDirSync(`${folder}/tree`)].map(({ name }) => name)
          .sort(),
        ...[...Deno.readDirSync(`${folder}/outside`)].map(({ name }) => name),
        ...Deno.readDirSync(`${folder}/outside/run`),
        Deno.readTextFileSync(`${folder}/outside/kept`),
      ].filter((name) => name !== "payload.new").join();
    const expected = outside();
    try {
      for (let i = 0; i < cases; i++) {
        if (i % 5000 === 4999) {
          await Deno.remove(folder, { recursive: true });
          folder = await makeTree();
        }
        try {
          if (applyMutated(diceOf(seed + i), `${folder}/tree`)) applied++;
          if (i % 10 === 0 || cases < 100) assertEquals(outside(), expected);
        } catch (error) {
          throw new Error(
            `SEED=${seed + i} CASES=1: ${(error as Error).message}`,
            { cause: error },
          );
        }
      }
      assertEquals(outside(), expected, `SEED=${seed} CASES=${cases}`);
      console.log(`${applied} of ${cases} were readable`);
      assert(cases < 1000 || applied > cases / 100, "Hardly one was readable");
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  },
});

function applyMutated(random: Random, tree: string): boolean {
  let lines = "";
  for (let files = random.below(4); files >= 0; files--) {
    lines += `-- ${random.pick(payloadNames)} --\n`;
    for (let count = random.below(3); count > 0; count--) {
      lines += `${random.pick(payloadLines)}\n`;
    }
  }
  const text = payloadOf(lines);
  const bytes = new TextEncoder().encode(
    random.chance(0.1) ? text.replaceAll("\n", "\r\n") : text,
  );
  if (random.chance(0.5)) mutate(bytes, random);
  let entries;
  try {
    ({ entries } = parsePayload(cutShort(bytes, random)));
  } catch (error) {
    const { message } = error as Error;
    assert(/^line [1-9]\d*: ./.test(message), message);
    return false;
  }
  const directories = new Set<string>();
  for (const entry of entries) {
    const isAllowed = /^(etc|var|home)\/[^\0]+$|^password [^/:]+$/
      .test(entry.name) && !/(^|\/)\.{0,2}(\/|$)/.test(entry.name);
    assert(isAllowed, entry.name);
    try {
      applyEntry(entry, tree, directories);
    } catch (error) { // it does not fit into the tree
      const { message } = error as Error;
      assert(message.startsWith("Cannot write line "), message);
    }
  }
  return true;
}
