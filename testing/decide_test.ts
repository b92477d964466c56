/**
 * What is decided, by situation: facts in, plan out. No disk is touched, no
 * root is needed.
 */
import { assertEquals, assertMatch } from "@std/assert";
import {
  balanceFilters,
  type BlockDevice,
  DATA,
  decide,
  decideJob,
  type Facts,
  type FilesystemState,
  findDataFilesystems,
  isMagic,
  MAGIC,
  type MemberRecord,
  nameOf,
  nodeOf,
  partitionNumber,
  partitionPath,
  type Pending,
  type Plan,
  type Reading,
  type Settings,
  type Superblock,
  SWAP,
  whatItHolds,
} from "../persistence.ts";

const MiB = 1024 ** 2;
const GiB = 1024 ** 3;
const diskBytes = 100 * GiB;

/** What of a plan is compared: names, and how much is said. */
interface Decision {
  mode: Plan["mode"];
  create: string[];
  members: string[];
  missing: number;
  stale: string[];
  excluded: string[];
  target: string[];
  join: string[];
  disarm: string[];
  grow: string[];
  repair: string[];
  swap: string[];
  scrub: boolean;
  errors: number;
}

const nothing: Decision = {
  mode: "volatile",
  create: [],
  members: [],
  missing: 0,
  stale: [],
  excluded: [],
  target: [],
  join: [],
  disarm: [],
  grow: [],
  repair: [],
  swap: [],
  scrub: false,
  errors: 0,
};

const two = { of: 2 };
const three = { of: 3 };
/** Two members that were there at the last mount. */
const pair = [
  data("sda", { ...two, record: record("a", 5, ["a", "b"]) }),
  data("sdb", { ...two, devid: 2, record: record("b", 5, ["a", "b"]) }),
];
const [first, second] = pair;
/** The same, after the first was mounted without the second. */
const writtenAlone = data("sda", {
  ...two,
  generation: 12,
  record: record("a", 6, ["a"], { b: 10 }),
});
const single: Partial<Decision> = { mode: "persistent", members: ["sda2"] };
const mirrored: Partial<Decision> = {
  mode: "persistent",
  members: ["sda2", "sdb2"],
};
const degraded: Partial<Decision> = {
  mode: "persistent",
  members: ["sda2"],
  missing: 1,
};

const openMember = { ...two, open: true };
const both = ["a", "b"];
const abc = ["a", "b", "c"];
const log = { hasLog: true };
const mounted: Facts["mounted"] = {
  target: "/mnt/lightwhale-data",
  type: "btrfs",
  source: "/dev/sda2",
  fsid: "data",
  deviceNumber: "0:40",
  superOptions: ["rw"],
};

const situations: {
  name: string;
  devices: BlockDevice[][];
  settings?: Partial<Settings>;
  facts?: Partial<Facts>;
  decides: Partial<Decision>;
  /** What is said of it. */
  says?: RegExp;
}[] = [
  { name: "no disk at all", devices: [], decides: {} },
  { name: "an empty disk", devices: [disk("sda")], decides: {} },
  {
    name: "magic disks",
    devices: [magic("sda"), magic("sdb")],
    decides: { mode: "persistent", create: ["sda", "sdb"] },
  },
  {
    name: "a magic disk that is read-only",
    devices: [magic("sda", { readOnly: true })],
    decides: { errors: 1 },
    says: /\/dev\/sda: it is read-only/,
  },
  {
    name: "a magic disk that is in use",
    devices: [magic("sda", { inUse: 'mounted on "/srv"' })],
    decides: { errors: 1 },
    says: /mounted on/,
  },
  {
    name: "a magic disk below an md array",
    devices: [magic("sda", { inUse: "held by /dev/md0" })],
    decides: {},
  },
  {
    name: "a header at the start of an md array",
    devices: [[device("md0", { kind: "volume", header: true })]],
    decides: {},
    says: /\/dev\/md0 .*not obeyed/,
  },
  {
    name: "a data filesystem on an md array",
    devices: [[device("md0", { kind: "volume", btrfs: superblock({}) })]],
    decides: { mode: "persistent", members: ["md0"] },
  },
  {
    name: "a data filesystem without partitions, without records",
    devices: [disk("sda", { btrfs: superblock({}) })],
    decides: { mode: "persistent", members: ["sda"] },
  },
  {
    name: "a Btrfs of another name",
    devices: [disk("sda", { btrfs: superblock({ label: "other" }) })],
    decides: {},
  },
  {
    name: "a data filesystem that is not finished",
    devices: [
      disk("sda", {
        header: true,
        btrfs: superblock({ label: "lightwhale-unfinished" }),
      }),
    ],
    decides: { mode: "persistent", create: ["sda"] },
  },
  {
    name: "a data filesystem and a magic disk",
    devices: [data("sda"), magic("sdb")],
    decides: { mode: "persistent", members: ["sda2"], join: ["sdb"] },
  },
  {
    name: "a header on a data disk",
    devices: [withHeader(data("sda"))],
    decides: { mode: "persistent", members: ["sda2"], disarm: ["sda"] },
    says: /the data wins/,
  },
  {
    name: "a header on a member that is stale",
    devices: [
      writtenAlone,
      withHeader(second),
    ],
    decides: { ...degraded, stale: ["sdb2"], disarm: ["sdb"] },
  },
  {
    name: "lightwhale.persistence=off",
    devices: [data("sda"), magic("sdb")],
    settings: { off: true },
    decides: { mode: "off" },
  },

  // Missing, returned
  { name: "both halves", devices: pair, decides: mirrored },
  { name: "the second half is missing", devices: [first], decides: degraded },
  {
    name: "the first half is missing",
    devices: [second],
    decides: { ...degraded, members: ["sdb2"] },
  },
  {
    name: "one of two is missing and a magic disk is there",
    devices: [first, magic("sdc")],
    decides: { ...degraded, join: ["sdc"] },
  },
  {
    name: "the second returns after the first was written",
    devices: [writtenAlone, second],
    decides: { ...degraded, stale: ["sdb2"] },
    says: /sdb2 missed writes/,
  },
  {
    name: "the second returns in the first's place",
    devices: [
      data("sda", { ...two, devid: 2, record: record("b", 5, ["a", "b"]) }),
      data("sdb", {
        ...two,
        generation: 12,
        record: record("a", 6, ["a"], { b: 10 }),
      }),
    ],
    decides: { ...degraded, members: ["sdb2"], stale: ["sda2"] },
  },
  {
    name: "the first was mounted without the second, but not written",
    devices: [
      data("sda", { ...two, record: record("a", 6, ["a"], { b: 10 }) }),
      second,
    ],
    decides: mirrored,
  },
  {
    name: "the first was written without the second, only to its log",
    devices: [
      data("sda", {
        ...two,
        hasLog: true,
        record: record("a", 6, ["a"], { b: 10 }),
      }),
      second,
    ],
    decides: { ...degraded, stale: ["sdb2"] },
  },
  {
    name: "the second dropped out while both were mounted",
    devices: [
      data("sda", {
        ...two,
        generation: 12,
        record: record("a", 5, ["a", "b"]),
      }),
      second,
    ],
    decides: { ...degraded, stale: ["sdb2"] },
    says: /sdb2 missed writes/,
  },
  {
    name: "the second dropped out, and the next mount wrote nothing",
    devices: [
      data("sda", {
        ...two,
        generation: 12,
        record: record("a", 6, ["a"], { b: 12 }),
      }),
      second,
    ],
    decides: { ...degraded, stale: ["sdb2"] },
  },
  {
    name: "the power went between the two superblocks of one commit",
    devices: [
      data("sda", {
        ...two,
        generation: 11,
        record: record("a", 5, ["a", "b"]),
      }),
      second,
    ],
    decides: { ...mirrored, scrub: true },
  },
  {
    name: "both halves without records, one of them behind",
    devices: [
      data("sda", { ...two, generation: 12 }),
      data("sdb", { ...two, devid: 2 }),
    ],
    decides: { ...mirrored, scrub: true },
  },
  {
    name: "one half has a record, the other has none",
    devices: [first, data("sdb", { ...two, devid: 2 })],
    decides: mirrored,
  },
  {
    name: "the record on the second is of another filesystem's time",
    devices: [
      first,
      data("sdb", { ...two, devid: 2, record: record("x", 90, ["x", "y"]) }),
    ],
    // Each says that it was alone: they are not mixed.
    decides: {
      ...degraded,
      members: ["sdb2"],
      excluded: ["sda2"],
    },
  },
  {
    name: "one of three returns after the others were written",
    devices: [
      data("sda", {
        ...three,
        generation: 14,
        record: record("a", 7, ["a", "b"], { c: 10 }),
      }),
      data("sdb", {
        ...three,
        devid: 2,
        generation: 14,
        record: record("b", 7, ["a", "b"], { c: 10 }),
      }),
      data("sdc", {
        ...three,
        devid: 3,
        record: record("c", 5, ["a", "b", "c"]),
      }),
    ],
    decides: { ...mirrored, missing: 1, stale: ["sdc2"] },
  },

  // One of one, and yet another
  {
    name: "the power went while a second disk was added, before its superblock",
    devices: [data("sda"), magic("sdb")],
    decides: { ...single, join: ["sdb"] },
  },
  {
    name: "the power went while a second disk was added, after its superblock",
    devices: [data("sda"), joining("sdb", { header: true })],
    decides: { ...single, join: ["sdb"] },
  },
  {
    name: "a second disk that a person added, after its superblock",
    devices: [data("sda"), joining("sdb")],
    decides: { ...single, excluded: ["sdb2"] },
    says: /sdb2 did not finish joining/,
  },
  {
    name: "the power went while the second disk was removed",
    devices: [
      data("sda", { generation: 11 }),
      data("sdb", { ...two, devid: 2 }),
    ],
    decides: { ...single, excluded: ["sdb2"] },
  },

  // Split
  {
    name: "the first dropped out, then it was mounted without the second",
    // What the second wrote when it was alone, the first has never seen.
    devices: [
      data("sda", {
        ...two,
        generation: 12,
        record: record("a", 6, ["a"], { b: 10 }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 90,
        record: record("b", 5, ["a", "b"]),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /each written without the other/,
  },
  {
    name: "each half was written alone, equally often",
    devices: [
      writtenAlone,
      data("sdb", {
        ...two,
        devid: 2,
        generation: 12,
        record: record("b", 6, ["b"], { a: 10 }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /each written without the other.*--force \/dev\/sdb/,
  },
  {
    name: "each half was written alone, the second more often",
    devices: [
      writtenAlone,
      data("sdb", {
        ...two,
        devid: 2,
        generation: 12,
        record: record("b", 7, ["b"], { a: 10 }),
      }),
    ],
    decides: { ...degraded, members: ["sdb2"], excluded: ["sda2"] },
    says: /--force \/dev\/sda/,
  },
  {
    name: "a third of a mirror was written alone, more often than two thirds",
    devices: [
      data("sda", {
        ...three,
        generation: 40,
        record: record("a", 30, ["a"], { b: 10, c: 10 }),
      }),
      data("sdb", {
        ...three,
        devid: 2,
        generation: 12,
        record: record("b", 6, ["b", "c"], { a: 10 }),
      }),
      data("sdc", {
        ...three,
        devid: 3,
        generation: 12,
        record: record("c", 6, ["b", "c"], { a: 10 }),
      }),
    ],
    decides: {
      mode: "persistent",
      members: ["sdb2", "sdc2"],
      missing: 1,
      excluded: ["sda2"],
    },
  },

  // Replaced
  {
    name: "the old disk returns after another one has its devid",
    devices: [
      data("sda", {
        ...two,
        generation: 20,
        record: record("a", 8, ["a", "c"], { b: 10 }),
      }),
      second,
      data("sdc", {
        ...two,
        devid: 2,
        generation: 20,
        record: record("c", 8, ["a", "c"]),
      }),
    ],
    decides: { ...mirrored, members: ["sda2", "sdc2"], excluded: ["sdb2"] },
    says: /sdb2 .*replaced/,
  },
  {
    name: "the old disk returns after another one was added for it",
    devices: [
      data("sda", {
        ...two,
        generation: 20,
        record: record("a", 8, ["a", "c"], { b: 10 }),
      }),
      second,
      data("sdc", {
        ...two,
        devid: 3,
        generation: 20,
        record: record("c", 8, ["a", "c"], { b: 10 }),
      }),
    ],
    decides: { ...mirrored, members: ["sda2", "sdc2"], excluded: ["sdb2"] },
    says: /sdb2 .*replaced/,
  },
  {
    name: "a replace was cut: its target stays magic",
    devices: [
      first,
      data("sdc", {
        ...two,
        devid: 0,
        record: record("c", 5, ["a", "c"]),
        disk: { header: true },
      }),
    ],
    decides: { ...degraded, target: ["sdc2"] },
  },
  {
    name: "only the target of a replace is there",
    devices: [data("sdc", { ...two, devid: 0 }), magic("sdd")],
    decides: { errors: 1 },
    says: /cannot be used alone/,
  },

  // Two data filesystems, copies
  {
    name: "two data filesystems: the one that was mounted more often",
    devices: [
      data("sda", { fsid: "1", record: record("a", 3, ["a"]) }),
      data("sdb", { fsid: "2", record: record("b", 4, ["b"]) }),
    ],
    decides: { mode: "persistent", members: ["sdb2"] },
    says: /1 on \/dev\/sda2 is not touched.*lightwhale\.data=1/,
  },
  {
    name: "two data filesystems: the one that is asked for",
    devices: [
      data("sda", { fsid: "1", record: record("a", 3, ["a"]) }),
      data("sdb", { fsid: "2", record: record("b", 4, ["b"]) }),
    ],
    settings: { dataUuid: "1" },
    decides: { mode: "persistent", members: ["sda2"] },
  },
  {
    name: "the one that is asked for is not there",
    devices: [data("sda", { fsid: "1" })],
    settings: { dataUuid: "2" },
    decides: { errors: 1 },
    says: /1 on \/dev\/sda2 is not touched[^]*No data filesystem .* UUID 2/,
  },
  {
    name: "a copy, which was not used since",
    devices: [
      data("sda", { record: record("a", 5, ["a"]) }),
      data("sdb", { generation: 12, record: record("a", 6, ["a"]) }),
    ],
    decides: { mode: "persistent", members: ["sdb2"], excluded: ["sda2"] },
    says: /sda2 is a copy of \/dev\/sdb2/,
  },
  {
    name: "a copy that is equal in all",
    devices: [
      data("sdb", { record: record("a", 5, ["a"]) }),
      data("sda", { record: record("a", 5, ["a"]) }),
    ],
    decides: { mode: "persistent", members: ["sda2"], excluded: ["sdb2"] },
  },

  // Grown, damaged
  {
    name: "a disk that grew",
    devices: [data("sda", { disk: { sizeBytes: 2 * diskBytes } })],
    decides: { mode: "persistent", members: ["sda2"], grow: ["sda2"] },
  },
  {
    name: "a disk that grew by less than a mebibyte",
    devices: [data("sda", { disk: { sizeBytes: diskBytes + MiB - 512 } })],
    decides: { mode: "persistent", members: ["sda2"] },
  },
  {
    name: "only the backup of the table is left",
    devices: [data("sda", { lost: "primary table" })],
    decides: { mode: "persistent", members: ["sda2"], repair: ["sda"] },
  },
  {
    name: "a damaged superblock and a magic disk",
    devices: [data("sda", { intact: false }), magic("sdb")],
    decides: { errors: 2 },
    says: /sda2 may be a "lightwhale-data" disk, .* its superblock is damaged/,
  },
  {
    name: "no superblock, only the partition's name, and a magic disk",
    devices: [without(data("sda"), "btrfs"), magic("sdb")],
    decides: { errors: 2 },
    says: /sdb will not be formatted/,
  },
  {
    name: "only a backup superblock and a magic disk",
    devices: [disk("sda", { backup: superblock({}) }), magic("sdb")],
    decides: { errors: 2 },
    says: /only a backup superblock is left/,
  },
  {
    name: "only a swap partition is left, and a magic disk",
    devices: [onlySwap(), magic("sdb")],
    decides: { errors: 2 },
  },
  {
    name: "a disk that cannot be read and a magic disk",
    devices: [disk("sda", { error: "Cannot read /dev/sda" }), magic("sdb")],
    decides: { errors: 1 },
    says: /Cannot read \/dev\/sda/,
  },
  {
    name: "a disk that cannot be read",
    devices: [disk("sda", { error: "Cannot read /dev/sda" }), disk("sdb")],
    decides: { errors: 1 },
    says: /\/dev\/sda cannot be read and may be the data disk/,
  },
  {
    name: "a disk that cannot be read beside the data filesystem",
    devices: [disk("sda", { error: "Cannot read /dev/sda" }), data("sdb")],
    decides: { mode: "persistent", members: ["sdb2"] },
    says: /Cannot read \/dev\/sda/,
  },
  {
    name: "one half has a damaged superblock, and a magic disk is there",
    devices: [first, data("sdb", { ...two, intact: false }), magic("sdc")],
    decides: degraded,
    says: /sdc does not join/,
  },
  {
    name: "a mounted mirror, read while it commits",
    devices: [
      data("sda", {
        ...openMember,
        generation: 1000,
        record: record("a", 5, both),
      }),
      data("sdb", {
        ...openMember,
        devid: 2,
        generation: 1003,
        record: record("b", 5, both),
      }),
    ],
    facts: { mounted },
    decides: { mode: "mounted", members: ["sda2", "sdb2"] },
  },
  {
    name: "a mounted disk that is read while another is added",
    devices: [
      data("sda", { open: true, record: record("a", 5, ["a"]) }),
      data("sdb", { ...openMember, devid: 2, generation: 11 }),
    ],
    facts: { mounted },
    decides: { mode: "mounted", members: ["sda2", "sdb2"] },
  },
  {
    name: "half of a mounted mirror does not answer, and a magic disk is there",
    devices: [
      data("sda", openMember),
      without(data("sdb", { ...openMember, devid: 2 }), "btrfs")
        .map((part) => reading(part, { error: `Cannot read ${part.path}` })),
      magic("sdc"),
    ],
    facts: { mounted },
    decides: { mode: "mounted", members: ["sda2"], missing: 1 },
    says: /is not used\n\S+sdc does not join .* while \S+sdb2 may be/,
  },
  {
    name: "a magic data disk that is read-only",
    devices: [
      data("sda", { record: record("a", 5, ["a"]) }),
      data("sdb", { fsid: "other", disk: { header: true, readOnly: true } }),
    ],
    decides: single,
    says: /sdb carries the magic .* it stays magic/,
  },
  {
    name: "another data filesystem is mounted elsewhere, and lacks a member",
    devices: [
      data("sda", {
        ...openMember,
        fsid: "a",
        record: record("a", 6, ["a"], { b: 9 }),
      }),
      data("sdb", {
        ...two,
        fsid: "a",
        devid: 2,
        record: record("b", 5, both),
      }),
      data("sdc", { open: true, fsid: "c" }),
    ],
    facts: { mounted: { ...mounted, fsid: "c", source: "/dev/sdc2" } },
    decides: { mode: "mounted", members: ["sdc2"] },
  },
  {
    name: "a tmpfs is mounted, and the data filesystem elsewhere",
    devices: [data("sda", { open: true })],
    facts: {
      mounted: { ...mounted, type: "tmpfs", fsid: undefined, source: DATA },
    },
    decides: { mode: "mounted" },
  },
  {
    name: "one of three was there at a boot that failed; all have a log",
    devices: [
      data("sda", {
        ...three,
        ...log,
        record: record("a", 6, ["a"], { b: 10, c: 10 }),
      }),
      data("sdb", { ...three, ...log, devid: 2, record: record("b", 5, abc) }),
      data("sdc", { ...three, ...log, devid: 3, record: record("c", 5, abc) }),
    ],
    decides: { mode: "persistent", members: ["sda2", "sdb2", "sdc2"] },
  },
  {
    name: "a magic disk without room for all kinds of chunks",
    devices: [
      data("sda", { usedBytes: GiB }),
      magic("sdb", { sizeBytes: 4 * GiB }),
    ],
    decides: single,
    says:
      /sdb does not join .* it has 3582 MiB for data, and needs 6\d\d\d MiB/,
  },
  {
    name: "a magic disk that is too small to mirror what is used",
    devices: [data("sda"), magic("sdb", { sizeBytes: 8 * GiB })],
    decides: single,
    says: /sdb does not join .* 10240 MiB are used, .* only [67]\d{3} MiB/,
  },
  {
    name: "two magic disks, of which one is large enough to join first",
    devices: [
      data("sda"),
      magic("sdb", { sizeBytes: 8 * GiB }),
      magic("sdc", { sizeBytes: 20 * GiB }),
    ],
    decides: { ...single, join: ["sdb", "sdc"] },
  },
  {
    name: "swap on the disk of a member, and on another disk",
    devices: [
      data("sda", { swapLabel: SWAP }),
      disk("sdb", { swapLabel: SWAP }),
    ],
    decides: { mode: "persistent", members: ["sda2"], swap: ["sda1"] },
  },
  {
    name: "noswap",
    devices: [data("sda", { swapLabel: SWAP })],
    settings: { noSwap: true },
    decides: { mode: "persistent", members: ["sda2"] },
  },
];

for (const { name, devices, decides, says, ...other } of situations) {
  Deno.test(`decide(): ${name}`, () => {
    const found = plan(devices, other);
    const said = found.notes.map(({ text }) => text).join("\n");
    assertEquals(summary(found), { ...nothing, ...decides }, said);
    if (says) assertMatch(said, says);
  });

  Deno.test(`decide() does not depend on the order: ${name}`, () => {
    const found = plan(devices.toReversed(), other);
    assertEquals(summary(found), { ...nothing, ...decides });
  });
}

Deno.test("findDataFilesystems() keeps filesystems apart", () => {
  const devices = judged([...pair, data("sdc", { fsid: "other" })]);
  assertEquals(
    findDataFilesystems(devices).map(({ fsid, members }) => [
      fsid,
      ...members.map(({ name }) => name),
    ]),
    [["data", "sda2", "sdb2"], ["other", "sdc2"]],
  );
});

const whole: FilesystemState = {
  operation: "none",
  devids: [1, 2],
  missing: [],
  profiles: { data: ["raid1"], metadata: ["raid1"], system: ["raid1"] },
  errors: {},
};
const lacking: FilesystemState = { ...whole, missing: [2] };

const jobs: {
  name: string;
  devices: BlockDevice[][];
  state: FilesystemState;
  pending?: Partial<Pending>;
  /** Its kind, or its kind and what it is done to. */
  job: string | undefined;
}[] = [
  { name: "all is well", devices: pair, state: whole, job: undefined },
  {
    name: "chunks without a mirror, and no room to mirror them",
    devices: [
      data("sda", { ...two, usedBytes: 150 * GiB }),
      data("sdb", { ...two, devid: 2, usedBytes: 150 * GiB }),
    ],
    state: {
      ...whole,
      profiles: { data: ["single"], metadata: ["raid1"], system: ["raid1"] },
    },
    job: undefined,
  },
  {
    name: "a member is missing, nothing can be done",
    devices: [first],
    state: lacking,
    job: undefined,
  },
  {
    name: "something runs",
    devices: [first, magic("sdc")],
    state: { ...lacking, operation: "balance" },
    job: "wait",
  },
  {
    name: "a person has paused the balance",
    devices: [...pair, magic("sdc")],
    state: { ...whole, operation: "balance paused" },
    job: undefined,
  },
  {
    name: "a stale member",
    devices: [writtenAlone, second],
    state: lacking,
    job: "rebuild sdb2",
  },
  {
    name: "a stale member and a magic disk: first what was there",
    devices: [writtenAlone, second, magic("sdc")],
    state: lacking,
    job: "rebuild sdb2",
  },
  {
    name: "a magic disk for a missing member",
    devices: [first, magic("sdc")],
    state: lacking,
    job: "replace sdc",
  },
  {
    name: "two magic disks for one missing member: one takes its place",
    devices: [first, magic("sdc"), magic("sdd")],
    state: lacking,
    job: "replace sdc",
  },
  {
    name: "a magic disk, nothing missing",
    devices: [...pair, magic("sdc")],
    state: whole,
    job: "add sdc",
  },
  {
    name: "a smaller disk was added for the missing one",
    devices: [first],
    state: { ...lacking, devids: [1, 2, 3] },
    pending: { "remove missing": true },
    job: "remove missing",
  },
  {
    name: "the missing one was removed, the pending job was not",
    devices: pair,
    state: whole,
    pending: { "remove missing": true },
    job: undefined,
  },
  {
    name: "chunks without a mirror, and checksums to verify",
    devices: pair,
    state: { ...whole, profiles: { ...whole.profiles, data: ["single"] } },
    pending: { scrub: true },
    job: "balance",
  },
  {
    name: "checksums to verify",
    devices: pair,
    state: whole,
    pending: { scrub: true },
    job: "scrub",
  },
];

for (const { name, devices, state, pending, job } of jobs) {
  Deno.test(`decideJob(): ${name}`, () => {
    const found = decideJob(plan(devices), state, {
      scrub: false,
      "remove missing": false,
      ...pending,
    });
    const object = found?.device ? ` ${found.device.name}` : "";
    assertEquals(found && found.kind + object, job);
  });
}

const balances: {
  name: string;
  devices: number;
  missing?: number[];
  /** Profiles of data, metadata and system chunks. */
  profiles: [string, string, string];
  filters: string[];
}[] = [
  {
    name: "a single disk stays as it is",
    devices: 1,
    profiles: ["single", "dup", "dup"],
    filters: [],
  },
  {
    name: "a mirror stays as it is",
    devices: 2,
    profiles: ["raid1", "raid1", "raid1"],
    filters: [],
  },
  {
    name: "a disk was added to a single one",
    devices: 2,
    profiles: ["single", "dup", "dup"],
    filters: [
      "-mprofiles=dup,convert=raid1,soft",
      "-dprofiles=single,convert=raid1,soft",
    ],
  },
  {
    name: "chunks were written while a disk was missing",
    devices: 2,
    profiles: ["raid1+single", "raid1+single", "raid1+single"],
    filters: [
      "-mprofiles=single,convert=raid1,soft",
      "-dprofiles=single,convert=raid1,soft",
    ],
  },
  {
    name: "only the system chunk is single",
    devices: 2,
    profiles: ["raid1", "raid1", "raid1+single"],
    filters: ["-mprofiles=single,convert=raid1,soft"],
  },
  {
    name: "one of two is missing: there is nothing to mirror on",
    devices: 2,
    missing: [2],
    profiles: ["raid1+single", "raid1+single", "raid1"],
    filters: [],
  },
  {
    name: "one of three is missing: what is single is mirrored on two",
    devices: 3,
    missing: [3],
    profiles: ["raid1+single", "raid1c3+single", "raid1c3"],
    filters: [
      "-mprofiles=single,convert=raid1,soft",
      "-dprofiles=single,convert=raid1,soft",
    ],
  },
  {
    name: "one of three is missing: two copies of the metadata are enough",
    devices: 3,
    missing: [3],
    profiles: ["raid1", "raid1+raid1c3", "raid1c3"],
    filters: [],
  },
  {
    name: "one of four is missing: what has a mirror waits for the fourth",
    devices: 4,
    missing: [4],
    profiles: ["raid1", "raid1+raid1c4", "raid1c4"],
    filters: [],
  },
  {
    name: "the third disk: three copies of the metadata",
    devices: 3,
    profiles: ["raid1", "raid1", "raid1"],
    filters: ["-mprofiles=raid1,convert=raid1c3,soft"],
  },
  {
    name: "the fourth disk: four copies of the metadata",
    devices: 4,
    profiles: ["raid1", "raid1c3", "raid1c3"],
    filters: ["-mprofiles=raid1c3,convert=raid1c4,soft"],
  },
  {
    name: "the fifth disk changes nothing",
    devices: 5,
    profiles: ["raid1", "raid1c4", "raid1c4"],
    filters: [],
  },
  {
    name: "more copies than needed stay",
    devices: 2,
    profiles: ["raid1c3", "raid1c3", "raid1c3"],
    filters: [],
  },
  {
    name: "profiles that a person chose stay",
    devices: 4,
    profiles: ["raid10", "raid10", "raid10"],
    filters: [],
  },
];

for (const { name, devices, missing = [], profiles, filters } of balances) {
  Deno.test(`balanceFilters(): ${name}`, () => {
    const [data, metadata, system] = profiles.map((all) => all.split("+"));
    const devids = Array.from({ length: devices }, (_, index) => index + 1);
    const state = { ...whole, devids, missing };
    assertEquals(
      balanceFilters({ ...state, profiles: { data, metadata, system } }),
      filters,
    );
  });
}

function plan(
  devices: BlockDevice[][],
  { settings, facts }: {
    settings?: Partial<Settings>;
    facts?: Partial<Facts>;
  } = {},
): Plan {
  return decide(
    {
      devices: judged(devices),
      diskPending: false,
      memoryBytes: 2 * GiB,
      misfits: [],
      ...facts,
    },
    { root: "/", waitMs: 0, off: false, noSwap: false, ...settings },
  );
}

/** As look() judges what it has read. */
function judged(devices: BlockDevice[][]): BlockDevice[] {
  const all = structuredClone(devices.flat());
  for (const device of all) device.magic = isMagic(device, all);
  for (const device of all) device.holds = whatItHolds(device, all);
  return all;
}

function summary(plan: Plan): Decision {
  const { mode, data, create, joins, repairs, swap, notes } = plan;
  const names = (devices: (BlockDevice | undefined)[] = []) =>
    devices.flatMap((device) => device ? [device.name] : []).sort();
  const newNames = (members: { device: BlockDevice }[] = []) =>
    names(members.map(({ device }) => device));
  const repaired = (what: string) =>
    newNames(repairs.filter((repair) => repair.do === what));
  return {
    mode,
    create: newNames(create?.members),
    members: names(data?.members),
    missing: data?.missing ?? 0,
    stale: names(data?.stale),
    excluded: newNames(data?.conflicting),
    target: names([data?.replaceTarget]),
    join: newNames(joins),
    disarm: repaired("clear magic"),
    grow: repaired("grow"),
    repair: repaired("restore table"),
    swap: names(swap),
    scrub: data?.needsScrub ?? false,
    errors: notes.filter(({ level }) => level === "error").length,
  };
}

/** A device, and what was read from it, in one. */
type Drawn = Partial<BlockDevice> & Partial<Reading>;

function device(name: string, properties: Drawn = {}): BlockDevice {
  const { header, error, btrfs, record, backup, swapLabel, gpt, ...others } =
    properties;
  return {
    name,
    path: `/dev/${name}`,
    kind: "disk",
    disk: name,
    number: 0,
    startBytes: 0,
    sizeBytes: diskBytes,
    sectorBytes: 512,
    readOnly: false,
    read: {
      header: header ?? false,
      anyway: properties.anyway ?? false,
      onlyHeader: properties.onlyHeader ?? false,
      recordable: true,
      plain: properties.plain ?? true,
      table: properties.table ?? (gpt && "gpt"),
      ...{ error, btrfs, record, backup, swapLabel, gpt },
    },
    magic: false,
    holds: { kind: "nothing of ours" },
    ...others,
  };
}

/** A disk without partitions. */
function disk(name: string, properties?: Drawn): BlockDevice[] {
  return [device(name, properties)];
}

function magic(name: string, properties?: Drawn): BlockDevice[] {
  return disk(name, { header: true, ...properties });
}

function superblock(
  properties: Partial<Superblock>,
): Superblock {
  return {
    fsid: "data",
    label: DATA,
    generation: 10,
    numDevices: 1,
    devid: 1,
    deviceBytes: diskBytes - GiB,
    usedBytes: 10 * GiB,
    hasLog: false,
    intact: true,
    ...properties,
  };
}

function record(
  member: string,
  epoch: number,
  present: string[],
  absent: MemberRecord["absent"] = {},
): MemberRecord {
  return { fsid: "data", member, epoch, present, absent };
}

/** A data disk: the whole, the swap partition, the data partition. */
function data(name: string, options: {
  fsid?: string;
  devid?: number;
  /** How many members the filesystem has. */
  of?: number;
  generation?: number;
  hasLog?: boolean;
  intact?: boolean;
  record?: MemberRecord;
  swapLabel?: string;
  lost?: "first sector" | "primary table";
  disk?: Drawn;
  /** The kernel has it mounted. */
  open?: boolean;
  usedBytes?: number;
} = {}): BlockDevice[] {
  const { of = 1, record, swapLabel, lost } = options;
  const { open = false, usedBytes = 10 * GiB } = options;
  const { fsid = "data", devid = 1, generation = 10 } = options;
  const { hasLog = false, intact = true } = options;
  const sizes = [GiB, diskBytes - GiB - 2 * MiB];
  const partitions = sizes.map((sizeBytes, index) => ({
    number: index + 1,
    name: [SWAP, DATA][index],
    startBytes: [MiB, MiB + GiB][index],
    sizeBytes,
  }));
  const [swap, main] = partitions.map((partition) =>
    device(`${name}${partition.number}`, {
      kind: "partition",
      disk: name,
      number: partition.number,
      startBytes: partition.startBytes,
      sizeBytes: partition.sizeBytes,
      partitionName: partition.name,
    })
  );
  const gpt = { partitions, lost, sectorBytes: 512, endBytes: diskBytes };
  const btrfs = superblock({
    usedBytes,
    fsid,
    devid,
    generation,
    hasLog,
    intact,
    numDevices: of,
    deviceBytes: main.sizeBytes,
  });
  const inUse = open ? `part of the mounted Btrfs ${fsid}` : undefined;
  return [
    device(name, { gpt, ...options.disk }),
    reading(swap, { swapLabel }),
    reading({ ...main, inUse }, {
      btrfs,
      record: record && { ...record, fsid },
    }),
  ];
}

/** A disk that has the first superblock of a filesystem of two. */
function joining(name: string, disk?: Drawn): BlockDevice[] {
  return data(name, { of: 2, devid: 2, generation: 11, disk });
}

function without(
  devices: BlockDevice[],
  property: "btrfs" | "record",
): BlockDevice[] {
  return devices.map((device) => reading(device, { [property]: undefined }));
}

/** A data disk whose data partition is gone from the table. */
function onlySwap(): BlockDevice[] {
  const [whole, swap] = data("sda");
  const [entry] = whole.read.gpt!.partitions;
  const gpt = { ...whole.read.gpt!, partitions: [entry] };
  return [reading(whole, { gpt }), swap];
}

function withHeader(devices: BlockDevice[]): BlockDevice[] {
  return devices
    .map((device) => reading(device, { header: device.kind === "disk" }));
}

function reading(device: BlockDevice, read: Partial<Reading>): BlockDevice {
  return { ...device, read: { ...device.read, ...read } };
}

Deno.test("decide(): a magic partition beside other partitions", () => {
  const [whole, , main] = data("sda");
  const [partition] = without([{ ...main, partitionName: MAGIC }], "btrfs");
  assertEquals(summary(plan([[whole, partition]])), {
    ...nothing,
    mode: "persistent",
    create: ["sda2"],
  });
});

const names: [disk: string, name: string, number: number | undefined][] = [
  ["sda", "sda3", 3],
  ["sda", "sda", undefined],
  ["sda", "sdaa1", undefined],
  ["sda", "sda03", undefined],
  ["sda", "queue", undefined],
  ["nvme0n1", "nvme0n1p12", 12],
  ["nvme0n1", "nvme0n11", undefined],
  ["loop1", "loop10p1", undefined],
  ["mmcblk0", "mmcblk0p2", 2],
  ["mmcblk0", "mmcblk0boot0", undefined],
  ["cciss!c0d0", "cciss!c0d0p1", 1],
];
for (const [disk, name, number] of names) {
  Deno.test(`partitionNumber() of ${name} on ${disk} is ${number}`, () => {
    assertEquals(partitionNumber(disk, name), number);
    if (number === undefined) return;
    const path = partitionPath({ path: nodeOf(disk) }, number);
    assertEquals([path, nameOf(path)], [nodeOf(name), name]);
  });
}
