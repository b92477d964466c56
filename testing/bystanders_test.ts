/**
 * Rule one as an invariant: whatever disks a machine has, a boot changes
 * nothing but magic devices and the members of the data filesystem.
 *
 *     SEED=1 ROUNDS=1 deno test -A testing/bystanders_test.ts
 *
 * Each round draws a collection of disks from everything that Debian's tools
 * can make, and knows from how it made them which ranges of which disk may
 * change; the checksum of all other bytes must stay. The program is never
 * asked which disks are its own. Where more than one answer is possible,
 * nothing may change.
 *
 * JOBS rounds run at a time. A failure names its seed and its collection, and
 * the other rounds go on.
 */
import { assert, assertEquals } from "@std/assert";
import {
  type Contents,
  contents,
  misplaced,
  type Patch,
  type Place,
} from "./contents.ts";
import { needPrograms, systemPath } from "./programs.ts";
import { countFrom, diceOf, type Random, seed } from "./random.ts";
import {
  command,
  type Disk,
  header,
  magic,
  MiB,
  type Result,
  runOnDisk,
  type System,
  withSystem,
} from "./system.ts";

const rounds = countFrom("ROUNDS", 40);
const jobs = countFrom("JOBS", Math.min(4, navigator.hardwareConcurrency));
/** The longest that a round may take. */
const LONGEST_S = 60;

const KiB = 1024;
const DATA = "lightwhale-data";
const needAll = () => {
  needPrograms(
    "mkfs.btrfs",
    "mkfs.ext4",
    "mkfs.exfat",
    "mkfs.f2fs",
    "mkfs.jfs",
  );
  needPrograms("mkfs.nilfs2", "mkfs.vfat", "mkfs.xfs", "mkntfs", "mkudffs");
  needPrograms("cryptsetup", "lvm", "make-bcache", "mksquashfs", "xorriso");
};

/** Bytes from `from` up to, but not including, `to`. */
interface Range {
  from: number;
  to: number;
}

type Sector = Disk["sectorBytes"];

/** What a disk is, by the way in which it was made. */
interface Verdict {
  /**
   * - innocent: it has nothing to do with us
   * - doubt: it may be a data disk, so that no other disk may be formatted
   * - unsure: the documents allow more than one reaction
   */
  is: "innocent" | "doubt" | "unsure" | "magic" | "data";
  /** What may change. */
  may: Range[];
  /** `lightwhale-anyway` stands where it has a meaning. */
  anyway?: boolean;
  /** The data filesystem of which it is a member. */
  fsid?: string;
}

/** A disk that was drawn and is still to be made. */
interface Draft {
  words: string[];
  sizeMiB: number;
  /** The sector size of its tools. */
  made: Sector;
  /** The sector size that it shows to the program. */
  attached: Sector;
  /** It shows as two devices. */
  twin?: boolean;
  /** libblkid knows something on it, so that `--enable` has to refuse it. */
  known: boolean;
  /** Its disk was an old data filesystem's, and another thing lies over it. */
  covered?: boolean;
  make: (bench: Bench) => Promise<Verdict>;
}

/** A disk that was made. */
interface Made extends Draft, Verdict {
  image: string;
  sizeBytes: number;
}

const nothing: Range[] = [];
const everything: Range[] = [{ from: 0, to: Number.MAX_SAFE_INTEGER }];
/** With the line behind it, if that is the one that counts. */
const theHeader: Range = {
  from: 0,
  to: `${magic}\nlightwhale-anyway\n`.length,
};

// How disks are made

/** An image file that is being filled. */
class Bench implements Place {
  path = "";
  constructor(
    readonly image: string,
    readonly sizeBytes: number,
    readonly sectorBytes: Sector,
    readonly stock: Stock,
  ) {}

  get all(): Range {
    return { from: 0, to: this.sizeBytes };
  }

  /** Fills a range, as its tool does on a disk or a partition. */
  async fill({ fill }: Contents, { from, to } = this.all): Promise<void> {
    const sizeBytes = to - from;
    if (typeof fill !== "string") {
      const { sectorBytes } = this;
      return this.patch(fill({ path: "", sizeBytes, sectorBytes }), from);
    }
    if (fill !== "") await this.sh(fill, { from, to });
  }

  /** Runs a script; `$DISK` is a device that has this range alone. */
  async sh(script: string, { from, to } = this.all): Promise<string> {
    const loop = await command([
      ...["losetup", "--show", "--find", "--sector-size"],
      ...[String(this.sectorBytes), "--offset", String(from)],
      ...["--sizelimit", String(to - from), this.image],
    ]);
    const path = loop.trim();
    try {
      return await runOnDisk(script, path);
    } finally {
      await command(["losetup", "--detach", path]);
    }
  }

  /**
   * Writes only the sectors that the contents have on an empty device, as
   * programs do that restore an image and skip its zeros.
   */
  async cover(what: Contents, { from, to } = this.all): Promise<void> {
    const sizeBytes = to - from;
    const image = `${this.image}.cover`;
    const other = new Bench(image, sizeBytes, this.sectorBytes, this.stock);
    await Deno.writeFile(image, new Uint8Array());
    await Deno.truncate(image, sizeBytes);
    await other.fill(what);
    const ends = [{ from: 0, to: 2 * MiB }, {
      from: sizeBytes - MiB,
      to: sizeBytes,
    }];
    for (const end of ends) {
      const bytes = other.read(end);
      for (let at = 0; at < bytes.length; at += 512) {
        const sector = bytes.subarray(at, at + 512);
        if (sector.every((byte) => byte === 0)) continue;
        this.patch([{ at: end.from + at, bytes: sector }], from);
      }
    }
    await Deno.remove(image);
  }

  patch(patches: Patch[], from = 0): void {
    using file = Deno.openSync(this.image, { write: true });
    for (const { at, bytes } of patches) {
      file.seekSync(from + at, Deno.SeekMode.Start);
      for (let done = 0; done < bytes.length;) {
        done += file.writeSync(bytes.subarray(done));
      }
    }
  }

  read({ from, to }: Range): Uint8Array {
    const bytes = new Uint8Array(to - from);
    using file = Deno.openSync(this.image);
    file.seekSync(from, Deno.SeekMode.Start);
    let done = 0;
    for (let n: number | null = 1; n && done < bytes.length;) {
      n = file.readSync(bytes.subarray(done));
      done += n ?? 0;
    }
    return bytes;
  }

  write(at: number, text: string): void {
    this.patch([{ at, bytes: new TextEncoder().encode(text) }]);
  }

  loseFirstSector(): void {
    this.patch([{ at: 0, bytes: new Uint8Array(this.sectorBytes) }]);
  }

  /** A table, by tools that wipe nothing; the last partition gets the rest. */
  async table(
    label: "gpt" | "dos",
    lines: string[],
    entries = 128,
  ): Promise<void> {
    const length = label === "gpt" ? [`table-length: ${entries}`] : [];
    const script = [`label: ${label}`, ...length, ...lines];
    await this.sh(
      `printf '%s\\n' ${script.map((line) => `'${line}'`).join(" ")} |
         sfdisk -q --no-tell-kernel --wipe never --wipe-partitions never "$DISK"`,
    );
  }
}

/** A primary GPT, read without the program's help (UEFI, chapter 5). */
interface Gpt {
  /** Headers and entries, and the size in the protective MBR. */
  structures: Range[];
  partitions: Map<string, Range>;
}

function gptOf(bench: Bench): Gpt {
  const { sectorBytes } = bench;
  const sectors = (from: number, count: number): Range => ({
    from: from * sectorBytes,
    to: (from + count) * sectorBytes,
  });
  const view = (range: Range) => new DataView(bench.read(range).buffer);
  const lba = (view: DataView, at: number) =>
    Number(view.getBigUint64(at, true));
  const primary = view(sectors(1, 1));
  assertEquals(primary.getBigUint64(0), 0x4546492050415254n, "no GPT");
  const backupLba = lba(primary, 32);
  const backup = view(sectors(backupLba, 1));
  const entryBytes = primary.getUint32(84, true);
  const tableBytes = primary.getUint32(80, true) * entryBytes;
  const length = Math.ceil(tableBytes / sectorBytes);
  const table = sectors(lba(primary, 72), length);
  const mbr = view({ from: 0, to: 512 });
  const size = [0, 1, 2, 3].map((n) => 446 + 16 * n)
    .find((at) => mbr.getUint8(at + 4) === 0xee);
  const structures = [
    sectors(1, 1),
    table,
    sectors(backupLba, 1),
    sectors(lba(backup, 72), length),
    ...(size ? [{ from: size + 12, to: size + 16 }] : []),
  ];
  const partitions = new Map<string, Range>();
  const entries = view(table);
  for (let at = 0; at < tableBytes; at += entryBytes) {
    if (entries.getBigUint64(at) === 0n) continue;
    const name = new Uint8Array(entries.buffer, at + 56, 72);
    const first = lba(entries, at + 32);
    const count = lba(entries, at + 40) - first + 1;
    const text = new TextDecoder("utf-16le").decode(name).replace(/\0.*/, "");
    partitions.set(text, sectors(first, count));
  }
  return { structures, partitions };
}

// What takes a boot to make, once for each job

/** A data filesystem that the program made, or has used. */
interface Old {
  images: string[];
  fsid: string;
}

/** Whose UUID is lower decides some things: old ones are on both sides. */
type Rank = "low" | "middle" | "high";
const prefixes = { low: "00000000", middle: "80000000", high: "ffffffff" };

/** A UUID of a rank, of which there are never two at a time in the machine. */
function fsidOf(rank: Rank): string {
  return prefixes[rank] + crypto.randomUUID().slice(8);
}

const byHand = (fsid: string): Contents => ({
  fill: `mkfs.btrfs -q -K -f -L ${DATA} -U ${fsid} "$DISK" 2>/dev/null`,
  types: ["btrfs"],
});

/** Made by the program, or by hand and then mounted by it. */
type Kind = "single" | "with swap" | "mirror" | "by hand";

/** The smallest disk that gets a swap partition, and a smaller one. */
const sizeOf = (kind: Kind) => kind === "with swap" ? 2100 : OLD_MIB;
const OLD_MIB = 448;

/** Images that one job keeps, as the kernel must not see an fsid twice. */
class Stock {
  #made = new Map<string, Promise<Old>>();
  constructor(readonly folder: string) {}

  get(
    kind: Kind,
    sectorBytes: Sector,
    rank: Rank,
  ): Promise<Old> {
    const key = `${kind} ${sectorBytes} ${rank}`.replaceAll(" ", "-");
    const old = this.#made.get(key) ?? this.#make(key, kind, sectorBytes, rank);
    this.#made.set(key, old);
    return old;
  }

  async #make(
    key: string,
    kind: Kind,
    sectorBytes: Sector,
    rank: Rank,
  ): Promise<Old> {
    const path = `${this.folder}/${key}`;
    const fsid = fsidOf(rank);
    await Deno.mkdir(path);
    // The program's mkfs takes the UUID that a seed asks for.
    await Deno.writeTextFile(
      `${path}/mkfs.btrfs`,
      `#!/bin/sh\nexec /sbin/mkfs.btrfs -U ${fsid} "$@"\n`,
      { mode: 0o755 },
    );
    const spec = {
      sizeBytes: sizeOf(kind) * MiB,
      sectorBytes,
      contents: kind === "by hand" ? String(byHand(fsid).fill) : header,
    };
    const rest = kind === "mirror" ? [spec] : [];
    return await withSystem({ disks: [spec, ...rest] }, async (system) => {
      const { report, stderr } = await system.boot([], {
        path: `${path}:${systemPath}`,
      });
      assertEquals(report.mode, "persistent", stderr);
      await system.settle();
      await system.reboot();
      const images = system.disks.map((_, n) => `${path}/${n}.img`);
      for (const [n, { image }] of system.disks.entries()) {
        await command(["cp", "--sparse=always", image, images[n]]);
      }
      return { images, fsid: report.uuid! };
    });
  }
}

/** Puts an old image where a disk is being made. */
async function putImage(bench: Bench, image: string): Promise<void> {
  await command(["cp", "--sparse=always", image, bench.image]);
  await Deno.truncate(bench.image, bench.sizeBytes);
}

// What is drawn

const lengths = [4, 8, 16, 56, 64, 127, 128, 128, 248];
const names = Object.keys(contents);
/** What a whole disk or a partition gets: mostly something. */
const onDisk = names.filter((name) => name !== "nothing");
const inPartition = names.filter((name) => !contents[name].onDisks);

/** The dimensions of a disk. */
function dimensions(random: Random) {
  const made: Sector = random.chance(0.25) ? 4096 : 512;
  const other: Sector = made === 512 ? 4096 : 512;
  return {
    sizeMiB: random.pick([320, 401, 448, 640, 700]),
    made,
    attached: random.chance(0.12) ? other : made,
    twin: random.chance(0.08),
  };
}

/** Whether it carries our names, so that silence is not what is expected. */
function claim({ label }: Contents): Verdict["is"] {
  return label === undefined ? "innocent" : "unsure";
}

function drawBystander(random: Random): Draft {
  const draft = random.pick([
    ...[drawPlain, drawPlain, drawPlain, drawPartitioned, drawPartitioned],
    ...[drawMisplaced, drawStacked, drawCovered, drawCovered, drawCovered],
  ])(random);
  if (!random.chance(0.1)) return draft;
  return {
    ...draft,
    words: [...draft.words, "first sector lost"],
    known: false,
    make: async (bench) => {
      const { is, may } = await draft.make(bench);
      bench.loseFirstSector();
      if (draft.covered && await isUncovered(bench)) {
        return { is: "unsure", may: everything };
      }
      // A disk with a member is doubtful as well, and its first sector may be
      // restored.
      const sector = { from: 0, to: draft.made };
      return {
        is: is === "innocent" ? is : "unsure",
        may: may.length > 0 ? [...may, sector] : may,
      };
    },
  };
}

/** Is an old data filesystem all that libblkid sees, now that a sector changed? */
async function isUncovered(bench: Bench): Promise<boolean> {
  const seen = await bench.sh('wipefs --noheadings --output TYPE "$DISK"');
  return !/[a-z]/.test(seen.replaceAll(/btrfs|gpt/g, ""));
}

/** Whether its label makes it data of ours, whatever else asks for it. */
function wins(name: string): boolean {
  // A label is one of a filesystem; others only have the same words.
  return contents[name].label === DATA && !/LUKS|swap/.test(name);
}

/** One thing on a whole disk. */
function drawPlain(random: Random): Draft {
  const name = random.pick(names);
  const what = contents[name];
  const size = dimensions(random);
  return {
    ...size,
    words: [name],
    known: what.types.length > 0 && size.made === size.attached,
    make: async (bench) => {
      await bench.fill(what);
      const same = size.made === size.attached && !size.twin;
      // Nobody can be sure about a medium that came like that.
      const doubt = wins(name) && same && !/ISO/.test(name);
      return { is: doubt ? "doubt" : claim(what), may: nothing };
    },
  };
}

/** Partitions with anything in them, and names that are ours or almost. */
function drawPartitioned(random: Random): Draft {
  const size = dimensions(random);
  const label = random.pick(["gpt", "gpt", "gpt", "dos"] as const);
  const entries = random.pick(lengths);
  const partNames = ["", "EFI", "photos", "lightwhale-dat", "LIGHTWHALE-DATA"];
  const parts = Array.from({ length: 1 + random.below(3) }, () => {
    const name = random.pick([
      ...[...partNames, `${magic}-not`, magic.toUpperCase()],
      ...[DATA, "lightwhale-swap"],
    ]);
    return { name, inside: random.pick([...inPartition, "the header"]) };
  });
  const code = random.chance(0.3);
  const ours = parts.some(({ name, inside }) =>
    (label === "gpt" && (name === DATA || name === "lightwhale-swap")) ||
    contents[inside]?.label !== undefined
  );
  return {
    ...size,
    words: [
      label === "gpt" ? `a GPT of ${entries} entries` : "an MBR",
      ...(code ? ["boot code"] : []),
      ...parts.map(({ name, inside }) => `"${name}": ${inside}`),
    ],
    known: size.made === size.attached,
    make: async (bench) => {
      const lines = parts.map(({ name }, n) => {
        const rest = n === parts.length - 1;
        const start = `start=${1 + n * PART_MIB}MiB`;
        return [
          start,
          ...(rest ? [] : [`size=${PART_MIB}MiB`]),
          ...(label === "gpt" ? [`name="${name}"`] : []),
        ].join(", ");
      });
      if (code) await bench.fill(bootCode);
      await bench.table(label, lines, entries);
      for (const [n, { inside }] of parts.entries()) {
        const from = (1 + n * PART_MIB) * MiB;
        const to = n === parts.length - 1
          ? bench.sizeBytes - MiB
          : from + PART_MIB * MiB;
        if (inside === "the header") bench.write(from, `${magic}\n`);
        else if (fits(inside, (to - from) / MiB)) {
          await bench.fill(contents[inside], { from, to });
        }
      }
      return { is: ours ? "unsure" : "innocent", may: nothing };
    },
  };
}

/** Enough for most filesystems. */
const PART_MIB = 64;

function fits(name: string, sizeMiB: number): boolean {
  return (contents[name].leastMiB ?? 48) <= sizeMiB;
}

/** Bytes that a BIOS runs, and the flag that it looks for. */
const bootCode: Contents = {
  fill: `head -c 440 /dev/urandom |
    dd of="$DISK" conv=notrunc status=none`,
  types: [],
};

/** The header and other words of ours in wrong places. */
function drawMisplaced(random: Random): Draft {
  const word = random.pick(Object.keys(misplaced));
  const below = random.pick(["nothing", "nothing", "noise", "ext4", "swap"]);
  return {
    ...dimensions(random),
    words: [below, word],
    known: false,
    make: async (bench) => {
      await bench.fill(contents[below]);
      bench.patch(misplaced[word]);
      return { is: "innocent", may: nothing };
    },
  };
}

/** Something foreign over something foreign. */
function drawStacked(random: Random): Draft {
  const below = random.pick(onDisk);
  const above = random.pick([...onDisk, "our table", "a GPT", "an MBR"]);
  const entries = random.pick(lengths);
  const claims = [below, above].some((name) =>
    name === "our table" || contents[name]?.label
  );
  return {
    ...dimensions(random),
    words: [below, `under ${above}`],
    known: false,
    make: async (bench) => {
      await bench.fill(contents[below]);
      if (above === "our table") {
        const lines = ["start=1MiB, size=64MiB, name=lightwhale-swap"];
        await bench.table("gpt", [...lines, `name=${DATA}`], entries);
      } else if (above === "a GPT") {
        await bench.table("gpt", ["name=a"], entries);
      } else if (above === "an MBR") await bench.table("dos", ["type=83"]);
      else await bench.cover(contents[above]);
      return { is: claims ? "unsure" : "innocent", may: nothing };
    },
  };
}

/** How old data disks were made. */
const olds: Record<string, Kind> = {
  "whole, by hand": "by hand",
  "whole, by hand, mounted by the program": "by hand",
  "made by the program": "single",
  "made by the program, with swap": "with swap",
};

/** An old data disk of ours that became something else. */
function drawCovered(random: Random): Draft {
  const rank = random.pick(["low", "high"] as const);
  const old = random.pick(Object.keys(olds));
  const kind = olds[old];
  const size = { ...dimensions(random), sizeMiB: sizeOf(kind) };
  const where = random.pick([
    "disk",
    ...(kind === "by hand" ? [] : ["data partition"]),
    ...(kind === "with swap" ? ["swap partition"] : []),
  ]);
  const tables = ["a GPT with ext4", "an MBR with ext4", "a GPT with XFS"];
  const above = random.pick(
    where === "disk"
      ? [...onDisk, ...tables, ...tables, ...tables]
      : inPartition.filter((name) =>
        name !== "nothing" && (where !== "swap partition" || fits(name, 256))
      ),
  );
  const skipsZeros = random.chance(0.7) || /bcache/.test(above);
  const entries = random.pick(lengths);
  return {
    ...size,
    words: [
      `an old data filesystem (${old}, ${rank} UUID), its ${where} under ` +
      above + (skipsZeros && !tables.includes(above) ? ", zeros skipped" : ""),
    ],
    known: false,
    covered: where === "disk",
    make: async (bench) => {
      const at = await putOld(bench, old, rank);
      const isWhole = kind === "by hand";
      const partitions = isWhole ? new Map() : gptOf(bench).partitions;
      const range = {
        "disk": bench.all,
        "data partition": at,
        "swap partition": partitions.get("lightwhale-swap"),
      }[where];
      const superblock = (): Uint8Array =>
        bench.read({ from: at.from + 64 * KiB, to: at.from + 68 * KiB });
      const wasThere = superblock();
      let types = contents[above]?.types ?? ["gpt"];
      if (tables.includes(above)) {
        const label = above.startsWith("a GPT") ? "gpt" : "dos";
        await bench.table(label, ["start=1MiB"], entries);
        const to = bench.sizeBytes - MiB;
        const inside = contents[above.endsWith("XFS") ? "XFS" : "ext4"];
        await bench.fill(inside, { from: MiB, to });
      } else if (skipsZeros) await bench.cover(contents[above], range);
      else await bench.fill(contents[above], range);
      if (contents[above]?.onDisks && where !== "disk") types = [];

      const survives = isSame(superblock(), wasThere);
      const same = size.made === size.attached && !size.twin;
      if (survives && same && types.length > 0 && (isWhole || range === at)) {
        return { is: "doubt", may: nothing };
      }
      // A swap partition beside the member, and what RAID has behind all
      // partitions, do not make it another one; what overlaps it does.
      const beside = where === "swap partition" ||
        (where === "disk" && behindAll.includes(above));
      const swap = where === "disk" ? partitions.get("lightwhale-swap") : [];
      const may = [at].concat(swap ?? []);
      return { is: "unsure", may: beside && !isWhole ? may : nothing };
    },
  };
}

/** They keep the table and the partitions as they are. */
const behindAll = [
  ...["an Intel RAID member", "a DDF RAID member"],
  ...["an md 0.90 member", "an md 1.0 member"],
];

/** Puts an old data filesystem on a disk; gives the range that it has. */
async function putOld(
  bench: Bench,
  old: string,
  rank: Rank,
): Promise<Range> {
  if (old === "whole, by hand") {
    await bench.fill(byHand(fsidOf(rank)));
    return bench.all;
  }
  const kind = olds[old];
  const { images } = await bench.stock.get(kind, bench.sectorBytes, rank);
  await putImage(bench, images[0]);
  if (kind === "by hand") return bench.all;
  return gptOf(bench).partitions.get(DATA)!;
}

function isSame(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}

/** Formats although other disks are in doubt, right after the header. */
const anywayLine = "\nlightwhale-anyway\n";

/** What may follow a header; only the last means something. */
const afterHeader = [
  ...["", "", "\n", "\n\nlightwhale-anyway\n", "\n lightwhale-anyway\n"],
  ...["lightwhale-anyway\n", "\nLIGHTWHALE-ANYWAY\n", anywayLine],
];

/** A disk that begins with the header. */
function drawMagicDisk(random: Random): Draft {
  const text = random.pick(afterHeader);
  const anyway = text === anywayLine;
  const words = ["then the header", ...(text ? [JSON.stringify(text)] : [])];
  const below = random.below(8);
  if (below === 0) return drawStartedOver(random, text);
  if (below === 1) {
    const draft = drawCovered(random);
    return {
      ...draft,
      words: [...draft.words, ...words],
      make: async (bench) => {
        const { is, may } = await draft.make(bench);
        bench.write(0, magic + text);
        if (await isUncovered(bench)) return { is: "unsure", may: everything };
        // It counts for something only where nothing else does.
        if (is === "doubt") return { is, may: [...may, theHeader] };
        return { is: "unsure", may: everything };
      },
    };
  }
  const name = random.pick(names);
  const what = contents[name];
  const size = dimensions(random);
  return {
    ...size,
    words: [name, ...words],
    known: false,
    make: async (bench) => {
      await bench.fill(what);
      bench.write(0, magic + text);
      // NTFS has its own first bytes where the header is now: it is gone.
      if (wins(name) && !/NTFS/.test(name)) {
        return { is: "unsure", may: [theHeader] };
      }
      if (what.label === DATA) return { is: "unsure", may: everything };
      return { is: "magic", may: everything, anyway };
    },
  };
}

/** The documented way: 512 zeros, then the header. */
function drawStartedOver(random: Random, text: string): Draft {
  const size = dimensions(random);
  const rank = random.pick(["low", "high"] as const);
  return {
    ...size,
    sizeMiB: OLD_MIB,
    words: ["a data disk, started over", JSON.stringify(text)],
    known: false,
    make: async (bench) => {
      const { images } = await bench.stock.get("single", size.made, rank);
      await putImage(bench, images[0]);
      bench.loseFirstSector();
      bench.write(0, magic + text);
      const is = /^\n?$/.test(text) ? "magic" : "unsure";
      return { is, may: everything };
    },
  };
}

/** A magic partition beside others. */
function drawMagicPartition(random: Random): Draft {
  const size = { ...dimensions(random), sizeMiB: random.pick([448, 640]) };
  const entries = random.pick(lengths);
  const beside = random.pick(
    inPartition.filter((name) => fits(name, PART_MIB)),
  );
  const inside = random.pick(inPartition.filter((name) => fits(name, 200)));
  const shape = random.pick(["last", "middle", "two", "on an ISO image"]);
  const flag = random.chance(0.5);
  const what = contents[inside];
  return {
    ...size,
    words: [
      `a magic partition (${shape}) in a GPT of ${entries} entries`,
      `it holds ${inside}, beside it ${beside}`,
      ...(flag ? ["boot code, boot flag"] : []),
    ],
    known: false,
    make: async (bench) => {
      const first = { from: MiB, to: (1 + PART_MIB) * MiB };
      if (shape === "on an ISO image") {
        await bench.fill(contents["a hybrid ISO 9660 image"]);
        if (bench.sectorBytes === 4096) return { is: "unsure", may: nothing };
        await bench.sh(
          `sfdisk -q --no-tell-kernel --relocate gpt-bak-std "$DISK"
           echo 'start=64MiB, name=${magic}' |
             sfdisk -q --no-tell-kernel --append --wipe never \\
               --wipe-partitions never "$DISK"`,
        );
      } else {
        const last = {
          "last": [`name=${magic}`],
          "middle": [`size=280MiB, name=${magic}`, "name=more"],
          "two": [`size=150MiB, name=${magic}`, `name=${magic}`],
        }[shape]!;
        const lines = [`start=1MiB, size=${PART_MIB}MiB, name=a`, ...last];
        await bench.table("gpt", lines, entries);
        await bench.fill(contents[beside], first);
      }
      if (flag) {
        await bench.fill(bootCode);
        bench.patch([{ at: 446, bytes: Uint8Array.of(0x80) }]);
      }
      const { partitions, structures } = gptOf(bench);
      const range = partitions.get(magic)!; // of two the larger one, the last
      await bench.fill(what, range);
      const same = size.made === size.attached;
      const plain = same && claim(contents[beside]) === "innocent" &&
        shape !== "on an ISO image";
      if (wins(inside)) return { is: "unsure", may: structures };
      const may = same ? [range, ...structures] : [range];
      const is = plain && what.label === undefined ? "magic" : "unsure";
      return { is, may };
    },
  };
}

/** The disks of a data filesystem. */
function drawData(random: Random): Draft[] {
  const kind = random.pick(
    [
      ...["single", "with swap", "mirror", "by hand"],
      ...["by hand, mounted before"],
      ...["partition by hand", "partition over an old one"],
    ] as const,
  );
  const sizeMiB = kind === "with swap" ? sizeOf(kind) : OLD_MIB;
  const size = { ...dimensions(random), sizeMiB };
  const forgotten = random.chance(0.3) ? random.pick(afterHeader) : undefined;
  const entries = random.pick(lengths);
  const name = random.pick([DATA, "", "photos"]);
  const change = random.pick([
    ...["", "", "", ""],
    ...(kind === "single" || kind === "with swap" || kind === "mirror"
      ? ["first sector lost", "enlarged", "enlarged, with RAID at its end"]
      : []),
    ...(kind === "single" ? ["shrunk"] : []),
  ]);
  const rank = random.pick(["low", "high"] as const);
  const larger = change.startsWith("enlarged") ? 64 : 0;
  const smaller = change === "shrunk" ? 4 : 0;
  const atEnd = random.pick(["an Intel RAID member", "a DDF RAID member"]);

  return Array.from({ length: kind === "mirror" ? 2 : 1 }, (_, n) => ({
    ...size,
    sizeMiB: size.sizeMiB + larger - smaller,
    words: [
      `a data filesystem (${kind})`,
      ...(kind === "partition by hand" ? [`"${name}", ${entries}`] : []),
      ...(kind === "partition over an old one" ? [`${rank} UUID below`] : []),
      ...(change ? [change] : []),
      ...(forgotten !== undefined
        ? [`the header forgotten, ${JSON.stringify(forgotten)}`]
        : []),
    ],
    known: false,
    make: async (bench: Bench): Promise<Verdict> => {
      const same = size.made === size.attached;
      let fsid = fsidOf("middle");
      let may: Range[];
      if (kind === "by hand") {
        await bench.fill(byHand(fsid));
        may = everything;
      } else if (kind === "by hand, mounted before") {
        const old = await bench.stock.get("by hand", size.made, "middle");
        await putImage(bench, old.images[0]);
        fsid = old.fsid;
        may = everything;
      } else if (kind === "partition by hand") {
        await bench.table("gpt", [
          "start=1MiB, size=64MiB, name=EFI",
          "size=64MiB, name=photos",
          `name="${name}"`,
        ], entries);
        await bench.fill(bootCode);
        const at = { from: MiB, to: 65 * MiB };
        await bench.fill(contents.FAT, at);
        await bench.fill(contents.ext4, { from: at.to, to: 129 * MiB });
        const { structures } = gptOf(bench);
        const range = { from: 129 * MiB, to: bench.sizeBytes - MiB };
        await bench.fill(byHand(fsid), range);
        may = same ? [range, ...structures] : [range];
      } else if (kind === "partition over an old one") {
        await bench.fill(byHand(fsidOf(rank)));
        await bench.table("gpt", ["start=1MiB"], entries);
        const range = { from: MiB, to: bench.sizeBytes - MiB };
        await bench.fill(byHand(fsid), range);
        may = [range];
      } else {
        const old = await bench.stock.get(kind, size.made, "middle");
        await putImage(bench, old.images[n]);
        if (change === "shrunk") return { is: "unsure", may: nothing };
        fsid = old.fsid;
        const { partitions, structures } = gptOf(bench);
        const range = partitions.get(DATA)!;
        const swap = partitions.get("lightwhale-swap");
        const members = [range, ...(swap ? [swap] : [])];
        may = same ? [...members, ...structures] : members;
        if (change === "enlarged" && same) {
          const grown = { from: range.from, to: bench.sizeBytes };
          may = [...members, grown, ...structures];
        }
        if (change === "enlarged, with RAID at its end") {
          await bench.fill(contents[atEnd]);
          may = members;
        }
        if (change === "first sector lost") {
          bench.loseFirstSector();
          if (same) may.push({ from: 0, to: size.made });
        }
      }
      if (forgotten !== undefined) {
        bench.write(0, magic + forgotten);
        may.push(theHeader);
        if (change === "first sector lost") { // started over, then
          return { is: "unsure", may: everything };
        }
      }
      const unsure = !same || change.endsWith("end") || kind.includes("over");
      return { is: unsure ? "unsure" : "data", may, fsid };
    },
  }));
}

/** The disks of a round. */
function drawCollection(random: Random): Draft[] {
  const drafts = Array.from(
    { length: 1 + random.below(4) },
    () => drawBystander(random),
  );
  if (random.chance(0.35)) drafts.push(...drawData(random));
  if (random.chance(0.35)) drafts.push(drawMagicDisk(random));
  if (random.chance(0.2)) drafts.push(drawMagicPartition(random));
  return drafts.map((draft) => ({ draft, at: random.below(1000) }))
    .sort((a, b) => a.at - b.at).map(({ draft }) => draft);
}

// A round

/** Makes a disk in a folder. */
async function make(
  draft: Draft,
  image: string,
  stock: Stock,
): Promise<Made> {
  const sizeBytes = draft.sizeMiB * MiB;
  await Deno.writeFile(image, new Uint8Array());
  await Deno.truncate(image, sizeBytes);
  const bench = new Bench(image, sizeBytes, draft.made, stock);
  const verdict = await draft.make(bench);
  return { ...draft, ...verdict, image, sizeBytes };
}

/** What a boot has to come to, where the documents leave no choice. */
type Outcome =
  | { mode: "persistent"; fsid?: string }
  | { mode: "volatile" }
  | { mode: "fallback" }
  | undefined;

function outcomeOf(disks: Made[]): Outcome {
  if (disks.some(({ is }) => is === "unsure")) return undefined;
  const fsid = disks.find(({ is }) => is === "data")?.fsid;
  if (fsid) return { mode: "persistent", fsid };
  const marked = disks.filter(({ is }) => is === "magic");
  const doubt = disks.some(({ is }) => is === "doubt");
  if (marked.length === 0) return doubt ? undefined : { mode: "volatile" };
  if (!doubt || marked.some(({ anyway }) => anyway)) {
    return { mode: "persistent" };
  }
  return { mode: "fallback" };
}

/** The name of a disk in a message. */
function describe(disk: Draft): string {
  const { words, sizeMiB, made, attached, twin } = disk;
  const is = (disk as Partial<Made>).is;
  const sectors = made === attached ? `${made}` : `${made}, now ${attached}`;
  return `${is ? `[${is}] ` : ""}${words.join("; ")} ` +
    `(${sizeMiB} MiB, ${sectors}${twin ? ", on two paths" : ""})`;
}

async function playRound(
  random: Random,
  folder: string,
  stock: Stock,
): Promise<void> {
  const drafts = drawCollection(random);
  const commands = [somethingBetween(random), somethingBetween(random)];
  const failures: string[] = [];
  let list = drafts.map(describe);
  try {
    const disks = await Promise.all(
      drafts.map((draft, n) => make(draft, `${folder}/${n}.img`, stock)),
    );
    list = disks.map(describe);
    const outcome = outcomeOf(disks);
    if (outcome?.mode === "fallback") {
      for (const disk of disks) if (disk.is === "magic") disk.may = nothing;
    }
    const [first, ...others] = disks.map(specOf);
    await withSystem(
      { disks: [first, ...others] },
      (system) =>
        playOn(system, disks, outcome, commands).catch((error) => {
          // Taking the system apart may fail as well, and hide this.
          failures.push(error.message);
        }),
    );
  } catch (error) {
    failures.push((error as Error).message);
  }
  if (failures.length > 0) {
    failures.push(...list.map((line, n) => `  ${n}: ${line}`));
    throw new Error(failures.join("\n"));
  }
}

function specOf({ image, sizeBytes, attached }: Made) {
  const contents = `cp --sparse=always '${image}' ` +
    '"$(cat "/sys/block/${DISK#/dev/}/loop/backing_file")"';
  return { sizeBytes, sectorBytes: attached, contents };
}

async function playOn(
  system: System,
  disks: Made[],
  outcome: Outcome,
  commands: string[],
): Promise<void> {
  for (const [n, { twin, attached }] of disks.entries()) {
    if (!twin) continue;
    const { image } = system.disks[n];
    const other: Disk = { path: "", image, sectorBytes: attached };
    system.disks.push(other);
    await system.attach(other);
  }
  const sums = await sumsOf(disks, disks.map(({ image }) => image));

  if (commands[0] !== "nothing") {
    const rigid = disks.map((disk) => ({ ...disk, may: nothing }));
    const all = await sumsOf(rigid, disks.map(({ image }) => image));
    await runBetween(system, disks, commands[0]);
    await assertUnchanged(system, rigid, all, commands[0]);
  }
  for (const boot of ["first", "second"]) {
    const result = await system.boot(["--wait", "0"]);
    await system.settle();
    const { report, stderr } = result;
    const what = `the ${boot} boot: ${stderr}`;
    assertSane(result, what);
    await system.sh("touch etc/x var/x home/x mnt/lightwhale-data/x");
    await system.reboot();
    await assertUnchanged(system, disks, sums, what);
    if (outcome) {
      assertEquals(report.mode, outcome.mode, what);
      if (outcome.mode === "fallback") assertEquals(result.status, 1, what);
      if (outcome.mode === "persistent" && outcome.fsid) {
        assertEquals(report.uuid, outcome.fsid, what);
      }
    }
    if (boot === "first" && commands[1] !== "nothing") {
      await runBetween(system, disks, commands[1]);
      await assertUnchanged(system, disks, sums, commands[1]);
    }
  }
}

/** Neither a crash nor a status that nobody documented. */
function assertSane({ status, signal, stderr }: Result, what: string): void {
  assertEquals(signal, null, what);
  assert(status === 0 || status === 1, `status ${status} of ${what}`);
  assert(!/^\s+at |TypeError|RangeError|panic/m.test(stderr), what);
}

/** What a person may run before and between the boots. */
function somethingBetween(random: Random): string {
  return random.pick([
    ...["nothing", "--dry-run", "--status", "--enable", "--disable"],
  ]);
}

/** Runs it where it has to be refused, or has nothing to do. */
async function runBetween(
  system: System,
  disks: Made[],
  mode: string,
): Promise<void> {
  const operands: string[] = [];
  if (mode === "--enable" || mode === "--disable") {
    const n = disks.findIndex(({ is, known, words }) =>
      (is === "innocent" || is === "doubt") &&
      (mode === "--disable" || known || words[0].startsWith("an old data"))
    );
    if (n < 0) return;
    operands.push(system.disks[n].path);
  }
  const result = await system.run([...system.place(), mode, ...operands]);
  const { status, signal, stderr } = result;
  assertEquals(signal, null, mode);
  assert(status <= 2, `${mode}: ${status}, ${stderr}`);
  assert(!/^\s+at |TypeError|RangeError|panic/m.test(stderr), stderr);
  if (mode === "--enable") {
    assert(status !== 0, `${mode} ${operands}: was not refused: ${stderr}`);
  }
}

// What has changed

/** Fails with the ranges that changed and must not. */
async function assertUnchanged(
  system: System,
  disks: Made[],
  sums: string[],
  what: string,
): Promise<void> {
  for (const { path } of system.disks) {
    await command(["blockdev", "--flushbufs", path]);
  }
  const images = system.disks.map(({ image }) => image);
  const now = await sumsOf(disks, images);
  const changed: string[] = [];
  for (const [n, disk] of disks.entries()) {
    if (now[n] === sums[n]) continue;
    const where = await differences(disk, images[n]);
    const { path } = system.disks[n];
    changed.push(`disk ${n} (${path}) changed at ${where.join(", ")}`);
  }
  assert(changed.length === 0, `${changed.join("\n")}\nby ${what}`);
}

/** Checksums of all that must not change. */
async function sumsOf(disks: Made[], images: string[]): Promise<string[]> {
  return await Promise.all(disks.map(async ({ may, sizeBytes }, n) => {
    if (may === everything) return "";
    // Reading zeros would take most of the time, so holes are left out. Which
    // there are follows from the contents only in a second copy.
    const script = `image=$1; shift; sync "$image"
      cp --sparse=always "$image" "$image.copy"
      while [ $# -gt 0 ]; do
        fallocate --punch-hole --offset "$1" --length "$2" "$image.copy"
        shift 2
      done
      cp --sparse=always "$image.copy" "$image.sum"
      cd "$(dirname "$image")"
      tar --sparse --mtime=@0 --transform='s/.*/x/' -cf - \\
        "$(basename "$image").sum" | sha256sum
      rm "$image.copy" "$image.sum"`;
    const holes = may.map(({ from, to }) => ({
      from,
      to: Math.min(to, sizeBytes),
    })).filter(({ from, to }) => from < to)
      .flatMap(({ from, to }) => [String(from), String(to - from)]);
    return await command(["sh", "-euc", script, "sh", images[n], ...holes]);
  }));
}

/** The places that changed and must not, in sectors of 512 bytes. */
async function differences(
  { image, may }: Made,
  now: string,
): Promise<string[]> {
  const list = await command([
    ...["sh", "-c", 'cmp -l "$1" "$2" | head -n 3000000', "sh", image, now],
  ]);
  const places: Range[] = [];
  for (const line of list.split("\n")) {
    const at = parseInt(line) - 1;
    if (Number.isNaN(at)) continue;
    if (may.some(({ from, to }) => at >= from && at < to)) continue;
    const last = places.at(-1);
    if (last && at < last.to + 512) last.to = at + 1;
    else places.push({ from: at, to: at + 1 });
    if (places.length > 8) break;
  }
  return places.map(({ from, to }) =>
    `0x${from.toString(16)}-0x${(to - 1).toString(16)}`
  );
}

/** Temporary files in memory, where there is enough: they are flushed a lot. */
async function useMemory(): Promise<void> {
  const script = "df --output=avail -B 1M /dev/shm 2>/dev/null | tail -n 1";
  const freeMiB = Number(await command(["sh", "-c", script]));
  if (freeMiB > 6000) Deno.env.set("TMPDIR", "/dev/shm");
}

// The tests

Deno.test({
  name: `bystanders stay byte-identical: SEED=${seed} ROUNDS=${rounds}`,
  ignore: Deno.uid() !== 0,
  async fn() {
    needAll();
    await useMemory();
    const started = Date.now();
    const failed: number[] = [];
    let next = 0;
    const job = async () => {
      const stockFolder = await Deno.makeTempDir({
        prefix: "persistence-test-",
      });
      const stock = new Stock(stockFolder);
      while (next < rounds) {
        const ofRound = seed + next++;
        const folder = await Deno.makeTempDir({ prefix: "persistence-test-" });
        const start = Date.now();
        try {
          await playRound(diceOf(ofRound), folder, stock);
          const seconds = (Date.now() - start) / 1000;
          assert(seconds < LONGEST_S, `It took ${seconds} s`);
        } catch (error) {
          failed.push(ofRound);
          console.error(
            `SEED=${ofRound} ROUNDS=1: ${(error as Error).message}\n`,
          );
        }
        await Deno.remove(folder, { recursive: true });
      }
      await Deno.remove(stockFolder, { recursive: true });
    };
    await Promise.all(Array.from({ length: jobs }, job));
    const seconds = ((Date.now() - started) / 1000 / rounds).toFixed(2);
    console.error(`${rounds} rounds of ${seconds} s, ${jobs} at a time`);
    assert(
      failed.length === 0,
      `${failed.length} of ${rounds} failed: ${failed.join(" ")}`,
    );
  },
});

Deno.test({
  name: "libblkid calls what the disks hold by its name",
  ignore: Deno.uid() !== 0,
  async fn() {
    needAll();
    await useMemory();
    const folder = await Deno.makeTempDir({ prefix: "persistence-test-" });
    try {
      await compareNames(folder);
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  },
});

async function compareNames(folder: string): Promise<void> {
  const image = `${folder}/image`;
  for (const sectorBytes of [512, 4096] as const) {
    for (const [name, what] of Object.entries(contents)) {
      await Deno.writeFile(image, new Uint8Array());
      await Deno.truncate(image, 448 * MiB);
      const stock = new Stock(folder);
      const bench = new Bench(image, 448 * MiB, sectorBytes, stock);
      await bench.fill(what);
      await bench.sh(`wipefs --noheadings --output TYPE,LABEL "$DISK" \\
          > ${folder}/types`);
      const text = await Deno.readTextFile(`${folder}/types`);
      const seen = text.split("\n").filter(Boolean)
        .map((line) => line.trim().split(/\s+/));
      const types = seen.map(([type]) => type).sort()
        // A hybrid image has a table, too, with sectors of 512 bytes.
        .filter((type) => !/gpt|PMBR/.test(type));
      assertEquals(types, what.types, `${name}, ${sectorBytes}`);
      const label = seen.map(([, label]) => label)
        .find((label) => label === DATA || label === "lightwhale-swap");
      assertEquals(label, what.label, `${name}, ${sectorBytes}`);
    }
  }
}
