/**
 * What is decided, by situation: facts in, plan out. No disk is touched, no
 * root is needed.
 */
import { assertEquals, assertMatch, assertThrows } from "@std/assert";
import {
  balanceFilters,
  type BlockDevice,
  DATA,
  decide,
  decideJob,
  describePlan,
  type Facts,
  type FilesystemState,
  findDataFilesystems,
  type FoundPayload,
  layOut,
  leastBytes,
  MAGIC,
  type MemberRecord,
  nameOf,
  nodeOf,
  parseCommandLine,
  partitionNumber,
  partitionPath,
  type Pending,
  type Plan,
  profilesFor,
  type Settings,
  SWAP,
  whyNotHeld,
} from "../persistence.ts";
import {
  data,
  device,
  disk,
  diskBytes,
  draw,
  draws,
  GiB,
  joining,
  judged,
  magic,
  magicPartition,
  MiB,
  onlySwap,
  partitionBehind,
  reading,
  record,
  small,
  superblock,
  withHeader,
  without,
  withoutNodes,
} from "./facts.ts";

/** What of a plan is compared: names, and how much is said. */
interface Decision {
  mode: Plan["mode"];
  create: string[];
  members: string[];
  missing: number;
  /** How many may still come; default: all that are missing, but known ones. */
  absent?: number;
  stale: string[];
  excluded: string[];
  target: string[];
  join: string[];
  disarm: string[];
  grow: string[];
  repair: string[];
  swap: string[];
  /** Disks whose partitions are shown to the kernel. */
  shows: string[];
  /** Partitions on which swap is made. */
  makesSwap: string[];
  /** Something is late. */
  waits: boolean;
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
  shows: [],
  makesSwap: [],
  waits: false,
  scrub: false,
  errors: 0,
};

const two = { of: 2 };
const three = { of: 3 };
/** Two members that were there at the last mount. */
const pairWith = (
  more: Partial<MemberRecord>,
  of: Parameters<typeof data>[1] = two,
) =>
  ["a", "b"].map((member, i) =>
    data(`sd${member}`, {
      ...of,
      devid: i + 1,
      record: record(member, 5, ["a", "b"], {}, more),
    })
  );
const pair = pairWith({ settled: { devices: 2, unmirrored: [] } });
const [first, second] = pair;
/** The same, after the first was mounted without the second. */
const writtenAlone = data("sda", {
  ...two,
  generation: 12,
  record: record("a", 6, ["a"], { b: 10 }, {
    settled: { devices: 2, unmirrored: [] },
  }),
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
  root: "/@lightwhale-data",
  target: "/mnt/lightwhale-data",
  type: "btrfs",
  source: "/dev/sda2",
  fsid: "data",
  deviceNumber: "0:40",
  superOptions: ["rw"],
};

/** The record of a member of one, by the machine that mounted it last. */
function ofMachine(
  member: string,
  epoch: number,
  machine: string,
  seconds?: number,
) {
  return record(member, epoch, [member], {}, { machine, seconds });
}

/** The member that a mount goes on with. */
function stillOpen() {
  const last = record("a", 6, both, {}, { mounts: ["m"] });
  return data("sda", { ...openMember, record: last });
}

/** A half of a mirror that was mounted twice without the other one. */
function wentOnAlone() {
  const since = { mounts: ["m", "n", "o"], lastSeen: { b: "n" } };
  return data("sda", {
    ...two,
    generation: 12,
    record: record("a", 7, ["a"], { b: 10 }, since),
  });
}

const situations: {
  name: string;
  devices: BlockDevice[][];
  settings?: Partial<Settings>;
  facts?: Partial<Facts>;
  decides: Partial<Decision>;
  /** What is said of it; "" where nothing is to be said. */
  says?: RegExp | "";
  /** The reason that is given. */
  because?: RegExp;
}[] = [
  {
    name: "no disk at all",
    devices: [],
    decides: {},
    says: "",
    because: /no disk is enabled/,
  },
  { name: "an empty disk", devices: [disk("sda")], decides: {}, says: "" },
  {
    name: "magic disks",
    devices: [magic("sda"), magic("sdb")],
    decides: { mode: "persistent", create: ["sda", "sdb"] },
    says: "",
    because: /\/dev\/sda, \/dev\/sdb carry the magic to be formatted/,
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
    says: /\/dev\/md0 .*not obeyed \(volumes are never formatted\)$/,
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
    name: "a copy of a data filesystem that a person gave another name since",
    devices: [
      disk("sda", { btrfs: superblock({ label: "old", generation: 12 }) }),
      disk("sdb", { btrfs: superblock({}) }),
    ],
    decides: { mode: "persistent", members: ["sdb"], excluded: ["sda"] },
    says: /^\/dev\/sda is a copy of \/dev\/sdb, .* \/dev\/sda is not touched/,
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
    says: /but \/dev\/sda2 holds data of .*: the data wins/,
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
    says: "",
    because: /kernel command line says so \(lightwhale\.persistence\)/,
  },
  {
    name: "lightwhale.persistence=required, and no disk at all",
    devices: [],
    settings: { required: true },
    decides: { waits: true, errors: 1 },
    says: /^There is no data disk.*lightwhale\.persistence.*--enable/,
    because: /the data disk is not there/,
  },
  {
    name: "lightwhale.persistence=required, and a disk that is not ours",
    devices: [disk("sda", { signatures: [{ type: "ext4" }] })],
    settings: { required: true },
    decides: { waits: true, errors: 1 },
  },
  {
    name: "lightwhale.persistence=required, and a magic disk",
    devices: [magic("sda")],
    settings: { required: true },
    decides: { mode: "persistent", create: ["sda"] },
  },
  {
    name: "lightwhale.persistence=required, and a disk that cannot be read",
    devices: [disk("sda", { error: "Cannot read /dev/sda" })],
    settings: { required: true },
    decides: { waits: true, errors: 1 },
    says: /sda cannot be read and may be the data disk/,
  },
  {
    name: "lightwhale.persistence=required, and half of a mirror",
    devices: [first],
    settings: { required: true },
    decides: degraded,
  },

  // Missing, returned
  {
    name: "both halves",
    devices: pair,
    decides: mirrored,
    says: "",
    because: /\/dev\/sda2, \/dev\/sdb2 hold the data filesystem/,
  },
  {
    name: "the second half is missing",
    devices: [first],
    decides: degraded,
    says: /^The data filesystem lacks 1 of 2 devices: .*plug in the missing/,
    because: /sda2 holds the data filesystem/,
  },
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
    says: /^The data filesystem lacks 1 of 2 devices.*sdb2 missed writes/,
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

  // Another machine's disk, and an older copy
  {
    name: "one half was recorded alone, the other has no record and is behind",
    devices: [
      data("sda", { ...two, generation: 20, record: record("a", 2, ["a"]) }),
      data("sdb", { ...two, devid: 2 }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
  },
  {
    name:
      "one half was recorded alone, the other was written and has no record",
    devices: [
      data("sda", { ...two, generation: 12, record: record("a", 2, ["a"]) }),
      data("sdb", { ...two, devid: 2, generation: 20 }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /each written without the other/,
  },
  {
    name: "another machine's disk, and one that cannot be read",
    devices: [
      data("sda", { record: record("a", 9, ["a"], {}, { machine: "other" }) }),
      disk("sdb", { error: "Cannot read /dev/sdb" }),
    ],
    facts: { machine: "own" },
    decides: { errors: 2 },
    says: /sda2 holds another machine's .* while \/dev\/sdb may be this/,
  },
  {
    name: "another machine's disk alone",
    devices: [
      data("sda", { record: record("a", 9, ["a"], {}, { machine: "other" }) }),
    ],
    facts: { machine: "own" },
    decides: single,
  },
  {
    name: "an older copy of a member, and the other half never ran alone",
    devices: [
      data("sda", {
        ...two,
        generation: 20,
        record: record("a", 6, both, {}, { mounts: ["m", "n"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both, {}, { mounts: ["m"] }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /sdb2 is an older copy/,
  },

  // Split
  {
    name: "each half was written alone, and the later one has other hardware",
    devices: [
      data("sda", {
        ...two,
        generation: 18,
        record: record("a", 8, ["a"], { b: 10 }, { hardware: "naa.old" }),
        disk: { hardware: "naa.new" },
        main: { hardware: "naa.new" },
      }),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 12,
        record: record("b", 6, ["b"], { a: 10 }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
  },
  {
    name: "the power went between two records, then the second was used alone",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 6, both, {}, { mounts: ["m", "n"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 12,
        record: record("b", 6, ["b"], { a: 10 }, {
          mounts: ["m", "o"],
          lastSeen: { a: "m" },
        }),
      }),
    ],
    decides: { ...degraded, members: ["sdb2"], stale: ["sda2"] },
  },
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
    decides: { errors: 1, waits: true },
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
    decides: { errors: 1, waits: true },
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
    decides: { ...degraded, absent: 0 },
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
    says: /sdb carries the magic .*sdb stays magic/,
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
    says: "",
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
  // What no situation above told apart
  {
    name: "a disk that is in use, and not enabled",
    devices: [disk("sda", { inUse: 'mounted on "/srv"' })],
    decides: {},
    says: "",
  },
  {
    name: "one half of a mirror is read-only",
    devices: [first.map((part) => ({ ...part, readOnly: true })), second],
    decides: mirrored,
    says: "",
  },
  {
    name: "both halves of a mirror are read-only",
    devices: pair.map((parts) =>
      parts.map((part) => ({ ...part, readOnly: true }))
    ),
    decides: { errors: 1 },
    says: /Cannot write to \/dev\/sda2, \/dev\/sdb2/,
    because: /read-only/,
  },
  {
    name: "a returned disk of three that the single one does not know",
    devices: [data("sda"), data("sdb", { ...three, devid: 2, generation: 11 })],
    decides: { ...single, excluded: ["sdb2"] },
  },
  {
    name: "a magic disk of three that the single one does not know",
    devices: [
      data("sda"),
      data("sdb", {
        ...three,
        devid: 2,
        generation: 11,
        disk: { header: true },
      }),
    ],
    decides: { ...single, excluded: ["sdb2"], disarm: ["sdb"] },
  },
  {
    name: "a magic disk that was removed long ago",
    devices: [
      data("sda", { generation: 30 }),
      data("sdb", { ...two, devid: 2, disk: { header: true } }),
    ],
    decides: { ...single, excluded: ["sdb2"], disarm: ["sdb"] },
    says: /sdb carries the magic .* the data wins/,
  },
  {
    name: "a magic disk of one commit with the single one",
    devices: [
      data("sda"),
      data("sdb", { ...two, devid: 2, disk: { header: true } }),
    ],
    decides: { ...single, excluded: ["sdb2"], disarm: ["sdb"] },
  },
  {
    name: "the single one dropped out after the second was added",
    devices: [
      data("sda", { record: record("a", 5, ["a"]) }),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 14,
        record: record("b", 6, ["b"], { a: 10 }),
      }),
    ],
    // Its record does not know the second: what it wrote may be its own.
    decides: { ...degraded, members: ["sdb2"], excluded: ["sda2"] },
    says: /each written without the other/,
  },
  {
    name: "one says that it is alone, the other is two commits ahead",
    devices: [
      data("sda"),
      data("sdb", { ...two, devid: 2, generation: 12 }),
    ],
    decides: { ...mirrored, scrub: true },
  },
  {
    name: "two data filesystems, one of them never mounted",
    devices: [
      data("sda", { fsid: "1" }),
      data("sdb", { fsid: "2", record: record("b", 1, ["b"]) }),
    ],
    decides: { mode: "persistent", members: ["sdb2"] },
  },
  {
    name: "two data filesystems, equal in all",
    devices: [data("sda", { fsid: "2" }), data("sdb", { fsid: "1" })],
    decides: { mode: "persistent", members: ["sdb2"] },
    says: /1 on \/dev\/sdb2 is used, 2 on \/dev\/sda2 is not touched/,
  },
  {
    name: "two data filesystems: a whole one before a degraded one",
    devices: [
      data("sda", { ...two, fsid: "1" }),
      data("sdb", { fsid: "2" }),
    ],
    decides: { mode: "persistent", members: ["sdb2"] },
  },
  {
    name: "two data filesystems: the degraded one was mounted more often",
    devices: [
      data("sda", {
        ...two,
        fsid: "2",
        record: record("a", 9, ["a"], { b: 3 }),
      }),
      data("sdb", { fsid: "1", record: record("c", 3, ["c"]) }),
    ],
    decides: degraded,
  },
  {
    name: "two data filesystems: one that lacks two was mounted more often",
    devices: [
      data("sda", {
        ...three,
        fsid: "1",
        record: record("a", 9, ["a"], { b: 3, c: 3 }),
      }),
      data("sdb", { fsid: "2", record: record("d", 3, ["d"]) }),
    ],
    decides: { mode: "persistent", members: ["sdb2"] },
  },
  {
    name: "two data filesystems, of one only the target of a replace",
    devices: [
      data("sda", { fsid: "1", devid: 0 }),
      data("sdb", { ...two, fsid: "2" }),
    ],
    decides: { ...degraded, members: ["sdb2"] },
  },
  {
    name: "two data filesystems, the one that is asked for lacks its disks",
    devices: [
      data("sda", { ...three, fsid: "1" }),
      data("sdb", { fsid: "2", record: record("b", 9, ["b"]) }),
    ],
    settings: { dataUuid: "1" },
    decides: { ...degraded, missing: 2 },
    says: /lacks 2 of 3 devices/,
  },
  {
    name: "one is asked for, and there is none",
    devices: [disk("sda")],
    settings: { dataUuid: "1" },
    decides: { errors: 1, waits: true },
    says: /No data filesystem has the UUID 1 .*plug in its disk/,
    because: /the data filesystem 1 is not there/,
  },
  {
    name: "the one that is asked for is there",
    devices: [data("sda", { fsid: "1" })],
    settings: { dataUuid: "1" },
    decides: single,
    says: "",
  },
  {
    name: "a copy that was mounted more often, and wrote less",
    devices: [
      data("sda", { generation: 12, record: record("a", 5, ["a"]) }),
      data("sdb", { generation: 10, record: record("a", 6, ["a"]) }),
    ],
    decides: { mode: "persistent", members: ["sdb2"], excluded: ["sda2"] },
  },
  {
    name: "a copy without records that wrote more",
    devices: [data("sda"), data("sdb", { generation: 12 })],
    decides: { mode: "persistent", members: ["sdb2"], excluded: ["sda2"] },
  },
  {
    name: "a copy has been mounted more often than what is mounted now",
    devices: [
      data("sda", { open: true, record: record("a", 5, ["a"]) }),
      data("sdb", { generation: 12, record: record("a", 9, ["a"]) }),
    ],
    facts: { mounted },
    decides: { mode: "mounted", members: ["sda2"], excluded: ["sdb2"] },
    because: /is already there, on \/dev\/sda2 \(btrfs\)/,
  },
  {
    name: "two old disks return after others took their places",
    devices: [
      data("sda", {
        ...two,
        generation: 30,
        record: record("a", 9, ["a", "e"], { b: 10, c: 10 }),
      }),
      data("sdb", { ...three, devid: 2, record: record("b", 5, abc) }),
      data("sdc", { ...three, devid: 3, record: record("c", 5, abc) }),
      data("sde", {
        ...two,
        devid: 5,
        generation: 30,
        record: record("e", 9, ["a", "e"], { b: 10, c: 10 }),
      }),
    ],
    decides: {
      ...mirrored,
      members: ["sda2", "sde2"],
      excluded: ["sdb2", "sdc2"],
    },
  },
  {
    name: "a member came back after the mount",
    devices: [
      data("sda", {
        ...openMember,
        generation: 12,
        record: record("a", 6, ["a"], { b: 10 }),
      }),
      data("sdb", { ...two, devid: 2 }),
    ],
    facts: { mounted },
    decides: {
      ...degraded,
      mode: "mounted",
      excluded: ["sdb2"],
    },
  },
  ...["wwn-b", "wwn-c"].map((hardware) => ({
    name: `a member dropped out of the mount, and ${hardware} has what it had`,
    devices: [
      stillOpen(),
      data("sdc", {
        ...two,
        devid: 2,
        hardware,
        record: record("b", 6, both, {}, { mounts: ["m"], hardware: "wwn-b" }),
      }),
    ],
    facts: { mounted },
    decides: {
      ...degraded,
      mode: "mounted" as const,
      [hardware === "wwn-b" ? "stale" : "excluded"]: ["sdc2"],
    },
  })),
  {
    name: "a member dropped out of the mount, and was written elsewhere",
    devices: [
      stillOpen(),
      data("sdc", {
        ...two,
        devid: 2,
        generation: 14,
        record: record("b", 7, ["b"], { a: 10 }, { mounts: ["m", "n"] }),
      }),
    ],
    facts: { mounted },
    decides: { ...degraded, mode: "mounted", excluded: ["sdc2"] },
  },
  {
    name: "an area of swap that is in use already",
    devices: [
      data("sda", { swapLabel: SWAP }).map((part) =>
        part.number === 1 ? { ...part, inUse: "swap in use" } : part
      ),
    ],
    decides: single,
  },
  {
    name: "swap of another label on a member's disk",
    devices: [data("sda", { swapLabel: "other" })],
    decides: single,
  },
  {
    name: "swap beside a data filesystem without partitions",
    devices: [[
      device("sda", { btrfs: superblock({}), swapLabel: SWAP }),
    ]],
    decides: { ...single, members: ["sda"] },
  },
  {
    name: "a data disk whose partitions the kernel does not show",
    devices: [
      first,
      withoutNodes(second),
    ],
    decides: { ...mirrored, shows: ["sdb"] },
  },
  {
    name: "a partition of another disk that the kernel does not show",
    devices: [
      first,
      second,
      withoutNodes(
        without(data("sdc", { names: ["other", "other"] }), "btrfs"),
      ),
    ],
    decides: mirrored,
    says: "",
  },
  {
    name: "a magic partition that the kernel does not show",
    devices: [
      withoutNodes(magicPartition("sda")),
    ],
    decides: { mode: "persistent", create: ["sda2"], shows: ["sda"] },
  },
  // It begins before the other one, ends behind it, lies in it, is the same.
  ...[
    { startBytes: MiB, sizeBytes: 2 * GiB },
    { startBytes: 50 * GiB, sizeBytes: 49 * GiB },
    { startBytes: 2 * GiB, sizeBytes: GiB },
    { startBytes: MiB + GiB, sizeBytes: diskBytes - GiB - 2 * MiB },
  ].map((other) => ({
    name: `a magic partition that another overlaps from ${other.startBytes}`,
    devices: [
      magicPartition("sda").map((part) => {
        const { gpt } = part.read;
        if (!gpt) return part;
        const entry = { number: 3, name: "mine", ...other };
        const partitions = [gpt.partitions[1], entry];
        return reading(part, { gpt: { ...gpt, partitions } });
      }),
    ],
    decides: { errors: 1 },
    says: /Cannot format \/dev\/sda2: it overlaps partition 3 of \/dev\/sda$/,
  })),
  {
    name: "a magic partition and the header on its whole disk",
    devices: [
      withHeader(magicPartition("sda")),
    ],
    decides: { mode: "persistent", create: ["sda"], errors: 1 },
    says:
      /Cannot format \/dev\/sda2: its whole disk carries the magic header too/,
  },
  {
    name: "magic partitions of two disks, of which one is magic as a whole",
    devices: [magicPartition("sda"), magic("sdb")],
    decides: { mode: "persistent", create: ["sda2", "sdb"] },
    says: "",
  },
  {
    name: "a magic disk of which a partition is in use",
    devices: [
      without(data("sda", { disk: { header: true } }), "btrfs").map((part) =>
        part.number === 1 ? { ...part, inUse: "swap in use" } : part
      ),
    ],
    decides: { errors: 1 },
    says: /Cannot format \/dev\/sda: \/dev\/sda1 is swap in use/,
  },
  {
    name: "a magic disk of which a partition cannot be read",
    devices: [
      without(data("sda", { disk: { header: true } }), "btrfs").map((part) =>
        part.number === 1 ? reading(part, { error: "Cannot read it" }) : part
      ),
      magic("sdb"),
    ],
    decides: { errors: 1 },
    says: /sda, \/dev\/sdb will not be formatted while \/dev\/sda1/,
  },
  {
    name: "a magic disk that is just large enough, without swap",
    devices: [magic("sda", { sizeBytes: 110 * MiB + 33 * 512 })],
    decides: { mode: "persistent", create: ["sda"] },
  },
  {
    name: "a magic disk that is just too small",
    devices: [magic("sda", { sizeBytes: 110 * MiB + 32 * 512 })],
    decides: { errors: 1 },
    says: /Cannot format \/dev\/sda: it is too small \(110 MiB/,
  },
  {
    name: "a magic disk that was found too small beside the others",
    devices: [magic("sda"), magic("sdb")],
    facts: {
      misfits: [{
        device: magic("sdb")[0],
        why: "it is too small beside the others",
      }],
    },
    decides: { mode: "persistent", create: ["sda"], errors: 1 },
    says: /Cannot format \/dev\/sdb: it is too small beside the others/,
  },
  {
    name: "one half grew",
    devices: [
      first,
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both),
        disk: { sizeBytes: 2 * diskBytes },
      }),
    ],
    decides: { ...mirrored, grow: ["sdb2"] },
  },
  {
    name: "a disk that grew by a mebibyte",
    devices: [data("sda", { disk: { sizeBytes: diskBytes + MiB } })],
    decides: { ...single, grow: ["sda2"] },
  },
  {
    name: "a disk that grew, and another partition follows",
    devices: [
      partitionBehind(data("sda", { disk: { sizeBytes: 2 * diskBytes } })),
    ],
    decides: single,
  },
  {
    name: "a disk that grew and is read-only, beside one that is not",
    devices: [
      first,
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both),
        disk: { sizeBytes: 2 * diskBytes, readOnly: true },
      }),
    ],
    decides: mirrored,
  },
  {
    name: "a disk that grew and has only the backup of its table",
    devices: [
      data("sda", {
        lost: "primary table",
        disk: { sizeBytes: 2 * diskBytes },
      }),
    ],
    decides: { ...single, repair: ["sda"] },
  },
  {
    name: "a data filesystem without partitions on a disk that grew",
    devices: [
      disk("sda", { btrfs: superblock({}), sizeBytes: 2 * diskBytes }),
    ],
    decides: { ...single, members: ["sda"] },
    says: "",
  },
  {
    name: "a data filesystem without partitions below a table",
    devices: [
      disk("sda", {
        btrfs: superblock({}),
        gpt: { partitions: [], sectorBytes: 512, endBytes: diskBytes },
      }),
    ],
    decides: { errors: 1 },
    says: /sda may be .* it holds a partition table \(gpt\) as well as a Btrfs/,
  },
  {
    name: "only the backup of the table is left on a read-only half",
    devices: [
      first,
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both),
        lost: "primary table",
        disk: { readOnly: true },
      }),
    ],
    decides: mirrored,
  },
  {
    name: "only the backup of the table is left on another disk",
    devices: [
      data("sda"),
      without(
        data("sdb", { lost: "primary table", names: ["other", "other"] }),
        "btrfs",
      ),
    ],
    decides: single,
  },
  {
    name: "a damaged Btrfs of another label and a magic disk",
    devices: [
      disk("sda", { btrfs: superblock({ label: "other", intact: false }) }),
      magic("sdb"),
    ],
    decides: { mode: "persistent", create: ["sdb"] },
    says: "",
  },
  {
    name: "a whole Btrfs of another label and a magic disk",
    devices: [
      disk("sda", { btrfs: superblock({ label: "other" }) }),
      magic("sdb"),
    ],
    decides: { mode: "persistent", create: ["sdb"] },
    says: "",
  },
  {
    name: "a backup superblock of another label and a magic disk",
    devices: [
      disk("sda", { backup: superblock({ label: "other" }) }),
      magic("sdb"),
    ],
    decides: { mode: "persistent", create: ["sdb"] },
    says: "",
  },
  {
    name: "a backup superblock under another Btrfs, and a magic disk",
    devices: [
      disk("sda", {
        backup: superblock({}),
        btrfs: superblock({ label: "other" }),
      }),
      magic("sdb"),
    ],
    decides: { mode: "persistent", create: ["sdb"] },
  },
  {
    name: "no superblock, only the partition's name",
    devices: [without(data("sda"), "btrfs")],
    decides: { errors: 1 },
    says:
      /sda2 may be a "lightwhale-data" disk, but it holds no filesystem: it/,
    because: /a data disk may be damaged/,
  },
  {
    name: "only a swap partition is left",
    devices: [onlySwap()],
    decides: { errors: 1 },
    says: /sda may be .* it has a "lightwhale-swap" partition and no other/,
  },
  {
    name: "a swap partition on one disk, a data partition on another",
    devices: [onlySwap(), data("sdb")],
    decides: { ...single, members: ["sdb2"] },
    says: /sda may be a "lightwhale-data" disk/,
  },
  {
    name: "a damaged superblock on a disk with a forgotten header",
    devices: [data("sda", { intact: false, disk: { header: true } })],
    decides: { disarm: ["sda"], errors: 1 },
    says: /sda2 holds data .* the data wins[^]*sda2 .*superblock is damaged/,
  },
  {
    name: "a damaged superblock on a partition with a forgotten name",
    devices: [
      data("sda", { intact: false, names: [SWAP, MAGIC] }),
      magic("sdb"),
    ],
    decides: { disarm: ["sda2"], errors: 2 },
    says: /sda2 holds data .* the data wins/,
  },
  {
    name: "a header at the start of a partition",
    devices: [
      disk("sda"),
      [device("sda1", {
        kind: "partition",
        disk: "sda",
        number: 1,
        header: true,
      })],
    ],
    decides: {},
    says: /\/dev\/sda1 .*not obeyed \(a partition .* --enable \/dev\/sda1\)$/,
  },
  {
    name: "a tmpfs is mounted, and the data disk is back",
    devices: [data("sda")],
    facts: { mounted: { ...mounted, type: "tmpfs", source: DATA } },
    decides: { mode: "mounted" },
    says: /^\/dev\/sda2 holds a data filesystem, but .*: to use it, reboot$/,
  },
  {
    name: "lightwhale.persistence=off, a tmpfs is mounted",
    devices: [data("sda")],
    settings: { off: true },
    facts: { mounted: { ...mounted, type: "tmpfs", source: DATA } },
    decides: { mode: "mounted" },
    says: "",
  },
  {
    name: "a tmpfs is mounted and a disk is enabled",
    devices: [magic("sda")],
    facts: { mounted: { ...mounted, type: "tmpfs", source: DATA } },
    decides: { mode: "mounted" },
    says:
      /sda carries the magic to be formatted: that happens at the next boot/,
  },
  {
    name: "a data filesystem is mounted, and only an enabled disk is looked at",
    devices: [magic("sdb")],
    facts: { mounted },
    decides: { mode: "mounted" },
    says: /sdb carries the magic .* which is mounted, was not looked at/,
  },
  {
    name: "a disk is enabled while the data filesystem is mounted",
    devices: [data("sda", { open: true }), magic("sdb")],
    facts: { mounted },
    decides: { mode: "mounted", members: ["sda2"], join: ["sdb"] },
    says: "",
  },
  {
    name: "another disk cannot be read, and one is enabled while mounted",
    devices: [
      data("sda", { open: true }),
      disk("sdb", { error: "Cannot read /dev/sdb" }),
      magic("sdc"),
    ],
    facts: { mounted },
    decides: { mode: "mounted", members: ["sda2"], join: ["sdc"] },
  },
  {
    name: "a disk is damaged while the data filesystem is mounted",
    devices: [data("sda", { open: true }), without(data("sdb"), "btrfs")],
    facts: { mounted },
    decides: { mode: "mounted", members: ["sda2"] },
    says: /sdb2 may be a "lightwhale-data" disk/,
  },
  {
    name: "swap while the data filesystem is mounted",
    devices: [data("sda", { open: true, swapLabel: SWAP })],
    facts: { mounted },
    decides: { mode: "mounted", members: ["sda2"], swap: ["sda1"] },
  },
  {
    name: "a disk that cannot be read beside a damaged one",
    devices: [
      disk("sda", { error: "Cannot read /dev/sda" }),
      without(data("sdb"), "btrfs"),
    ],
    decides: { errors: 2 },
    because: /a data disk may be damaged/,
  },
  {
    name: "a disk that cannot be read: why volatile",
    devices: [disk("sda", { error: "Cannot read /dev/sda" })],
    decides: { errors: 1 },
    because: /a disk cannot be read/,
  },
  {
    name: "only the target of a replace: why volatile",
    devices: [data("sdc", { ...two, devid: 0 })],
    decides: { errors: 1, waits: true },
    because: /lacks its other disks/,
  },

  // What fits beside what: a chunk is a tenth, at most 1 GiB
  {
    name: "a small disk that lacks a mebibyte for its chunks",
    // 2 MiB are not for data; 3 * (600 + d) / 10 + 64 <= d from 349 MiB on.
    devices: [small("sda", 600), magic("sdb", { sizeBytes: 350 * MiB })],
    decides: { ...single, members: ["sda"] },
    says: /it has 348 MiB for data, and needs 348 MiB/,
  },
  {
    name: "a small disk that just has room for its chunks",
    devices: [small("sda", 600), magic("sdb", { sizeBytes: 351 * MiB })],
    decides: { ...single, members: ["sda"], join: ["sdb"] },
  },
  {
    name: "a copy that is equal in all, on the 27th disk",
    devices: [data("sdaa"), data("sdb")],
    decides: { ...single, members: ["sdb2"], excluded: ["sdaa2"] },
  },
  {
    name: "a replace was cut, and another member is magic",
    devices: [
      withHeader(first),
      data("sdc", { ...two, devid: 0, disk: { header: true } }),
    ],
    decides: { ...degraded, target: ["sdc2"], disarm: ["sda"] },
  },
  {
    name: "a disk that cannot be read and a magic disk: why volatile",
    devices: [disk("sda", { error: "Cannot read /dev/sda" }), magic("sdb")],
    decides: { errors: 1 },
    because: /a disk cannot be read/,
  },
  {
    name: "what was mounted has gone, and another disk has its name",
    devices: [data("sda")],
    facts: { mounted },
    decides: { mode: "mounted" },
  },
  {
    name: "each half wrote a few commits without the other",
    devices: [
      writtenAlone,
      data("sdb", {
        ...two,
        devid: 2,
        generation: 13,
        record: record("b", 5, ["a", "b"]),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /each written without the other/,
  },
  {
    name: "the old disk was mounted alone after another one had its devid",
    devices: [
      data("sda", {
        ...two,
        generation: 20,
        record: record("a", 8, ["a", "c"], { b: 10 }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 12,
        record: record("b", 7, ["b"], { a: 10 }),
      }),
      data("sdc", {
        ...two,
        devid: 2,
        generation: 20,
        record: record("c", 6, ["a", "c"]),
      }),
    ],
    decides: { ...mirrored, members: ["sda2", "sdc2"], excluded: ["sdb2"] },
  },
  {
    name: "a damaged superblock on a whole disk and a magic disk",
    devices: [
      disk("sda", { btrfs: superblock({ intact: false }) }),
      magic("sdb"),
    ],
    decides: { errors: 2 },
    says: /sda may be .* its superblock is damaged/,
  },
  {
    name: "a data disk whose data partition has another name",
    devices: [
      data("sda", { names: [SWAP, "other"] }),
    ],
    decides: single,
    says: "",
  },
  {
    name: "half of a mounted mirror of whole disks does not answer",
    devices: [
      [device("sda", {
        btrfs: superblock({ numDevices: 2 }),
        inUse: "part of the mounted Btrfs data",
      })],
      [device("sdb", {
        inUse: "part of the mounted Btrfs data",
        error: "Cannot read /dev/sdb",
      })],
      magic("sdc"),
    ],
    facts: { mounted: { ...mounted, source: "/dev/sda" } },
    decides: { mode: "mounted", members: ["sda"], missing: 1 },
    says: /sdc does not join .* while \S+sdb may be/,
  },
  {
    name: "something else is mounted, by the name of a disk",
    devices: [data("sda", { open: true })],
    facts: { mounted: { ...mounted, type: "tmpfs", fsid: undefined } },
    decides: { mode: "mounted" },
  },
  {
    name: "mounted in another place, and a member came back",
    devices: [
      data("sda", {
        ...openMember,
        generation: 12,
        record: record("a", 6, ["a"], { b: 10 }),
      }),
      data("sdb", { ...two, devid: 2 }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /sdb2 came back after the mount: the next boot/,
  },
  {
    name: "mounted in another place, and an old disk came back",
    devices: [
      data("sda", { ...openMember, record: record("a", 6, ["a", "c"]) }),
      data("sdb", { ...two, devid: 2, generation: 5 }),
      data("sdc", {
        ...openMember,
        devid: 3,
        record: record("c", 6, ["a", "c"]),
      }),
    ],
    decides: {
      ...mirrored,
      members: ["sda2", "sdc2"],
      excluded: ["sdb2"],
    },
    says: /sdb2 was replaced while it was away/,
  },
  // Asked for, and not there
  {
    name: "another than the one that is asked for, and a magic disk",
    devices: [data("sda", { fsid: "1" }), magic("sdb")],
    settings: { dataUuid: "2" },
    decides: { errors: 1, waits: true },
    says: /UUID 2 .*: \/dev\/sdb will not be formatted in its place/,
  },
  {
    name: "one is asked for, and there is a disk to be formatted anyway",
    devices: [magic("sda", { anyway: true })],
    settings: { dataUuid: "2" },
    decides: { errors: 1, waits: true },
    says: /\/dev\/sda will not be formatted in its place/,
  },
  {
    name: "one is asked for, and a disk that may be it is damaged",
    devices: [data("sda", { fsid: "2", intact: false })],
    settings: { dataUuid: "2" },
    decides: { errors: 2, waits: true },
    says: /UUID 2[^]*sda2 may be .*superblock is damaged/,
    because: /the data filesystem 2 is not there/,
  },
  {
    name: "one is asked for, only the target of a replace is there",
    devices: [data("sda", { ...two, fsid: "2", devid: 0 })],
    settings: { dataUuid: "2" },
    decides: { errors: 1, waits: true },
    says: /cannot be used alone/,
  },
  {
    name: "the one that is asked for was never mounted here",
    devices: [
      data("sda", { fsid: "1", record: ofMachine("a", 3, "theirs") }),
      data("sdb", { fsid: "2", record: ofMachine("b", 9, "ours") }),
    ],
    settings: { dataUuid: "1" },
    facts: { machine: "ours" },
    decides: single,
    says: /1 on \/dev\/sda2 is used, 2 on \/dev\/sdb2 is not touched/,
  },

  // Whose disk it is
  {
    name: "another machine's disk, which was mounted more often",
    devices: [
      data("sda", { fsid: "2", record: ofMachine("a", 3, "ours") }),
      data("sdb", { fsid: "1", record: ofMachine("b", 9, "theirs") }),
    ],
    facts: { machine: "ours" },
    decides: single,
    says: /2 on \/dev\/sda2 is used, 1 on \/dev\/sdb2 is not touched/,
  },
  {
    name: "another machine's disk, and one that nobody knows",
    devices: [
      data("sda", { fsid: "2" }),
      data("sdb", { fsid: "1", record: ofMachine("b", 9, "theirs") }),
    ],
    facts: { machine: "ours" },
    decides: single,
  },
  {
    name: "this machine's disk, and one that nobody knows",
    devices: [
      data("sda", { fsid: "2", record: ofMachine("a", 3, "ours") }),
      data("sdb", { fsid: "1", record: record("b", 9, ["b"]) }),
    ],
    facts: { machine: "ours" },
    decides: single,
  },
  {
    name: "this machine has no identity, and another machine's disk has",
    devices: [
      data("sda", { fsid: "2", record: ofMachine("a", 9, "theirs") }),
      data("sdb", { fsid: "1", record: record("b", 3, ["b"]) }),
    ],
    decides: { ...single, members: ["sdb2"] },
  },
  {
    name: "no machine has an identity: the one mounted more often",
    devices: [
      data("sda", { fsid: "2", record: record("a", 9, ["a"]) }),
      data("sdb", { fsid: "1", record: record("b", 3, ["b"]) }),
    ],
    decides: single,
  },
  {
    name: "another machine's disk alone is used",
    devices: [data("sda", { record: ofMachine("a", 3, "theirs") })],
    facts: { machine: "ours" },
    decides: single,
    says: "",
  },
  {
    name: "this machine's disk lacks two others, another machine's is whole",
    devices: [
      data("sda", { ...three, fsid: "2", record: ofMachine("a", 3, "ours") }),
      data("sdb", { fsid: "1", record: ofMachine("b", 9, "theirs") }),
    ],
    facts: { machine: "ours" },
    decides: { ...degraded, missing: 2 },
  },
  {
    name: "one half says ours, the other half says nothing",
    devices: [
      data("sda", { ...two, fsid: "2" }),
      data("sdb", {
        ...two,
        fsid: "2",
        devid: 2,
        record: ofMachine("b", 3, "ours"),
      }),
      data("sdc", { fsid: "1", record: ofMachine("c", 9, "theirs") }),
    ],
    facts: { machine: "ours" },
    decides: mirrored,
  },
  {
    name: "two of this machine: the one that was mounted last",
    devices: [
      data("sda", { fsid: "2", record: ofMachine("a", 3, "ours", 2000) }),
      data("sdb", { fsid: "1", record: ofMachine("b", 9, "ours", 1000) }),
    ],
    facts: { machine: "ours" },
    decides: single,
  },
  {
    name: "two of this machine: the one that knows when comes first",
    devices: [
      data("sda", { fsid: "2", record: ofMachine("a", 3, "ours", 1) }),
      data("sdb", { fsid: "1", record: ofMachine("b", 9, "ours") }),
    ],
    facts: { machine: "ours" },
    decides: single,
  },
  {
    name: "two of this machine, mounted in the same second",
    devices: [
      data("sda", { fsid: "2", record: ofMachine("a", 9, "ours", 7) }),
      data("sdb", { fsid: "1", record: ofMachine("b", 3, "ours", 7) }),
    ],
    facts: { machine: "ours" },
    decides: single,
  },
  {
    name: "two of another machine: its clock does not count",
    devices: [
      data("sda", { fsid: "2", record: ofMachine("a", 9, "theirs", 1000) }),
      data("sdb", { fsid: "1", record: ofMachine("b", 3, "theirs", 2000) }),
    ],
    facts: { machine: "ours" },
    decides: single,
  },
  {
    name: "two of this machine: one that can be mounted before the later one",
    devices: [
      data("sda", { fsid: "2", record: ofMachine("a", 3, "ours", 1000) }),
      data("sdb", {
        ...three,
        fsid: "1",
        record: ofMachine("b", 9, "ours", 2000),
      }),
    ],
    facts: { machine: "ours" },
    decides: single,
  },
  {
    name: "a copy that another machine used more often",
    devices: [
      data("sda", { record: ofMachine("a", 5, "ours") }),
      data("sdb", { generation: 40, record: ofMachine("a", 30, "theirs") }),
    ],
    facts: { machine: "ours" },
    decides: { ...single, excluded: ["sdb2"] },
    says: /sdb2 is a copy of \/dev\/sda2/,
  },

  // Lineage: who went on with whom
  {
    name: "a copy of a mirror's half went on with another half (A5)",
    devices: [
      data("sda", {
        ...two,
        generation: 30,
        record: record("t", 3, ["t", "b"], {}, { mounts: ["m", "p", "q"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 30,
        record: record("b", 3, ["t", "b"], {}, { mounts: ["p", "q"] }),
      }),
      data("sdc", {
        ...two,
        devid: 2,
        generation: 20,
        record: record("c", 3, ["t", "c"], {}, { mounts: ["x", "y"] }),
      }),
    ],
    decides: { ...mirrored, excluded: ["sdc2"] },
    says: /sdc2 is a copy of \/dev\/sdb2, or was replaced by it/,
  },
  {
    name: "the same, after the other half was mounted more often",
    devices: [
      data("sda", {
        ...two,
        generation: 30,
        record: record("t", 3, ["t", "b"], {}, { mounts: ["m", "p", "q"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 30,
        record: record("b", 3, ["t", "b"], {}, { mounts: ["p", "q"] }),
      }),
      data("sdc", {
        ...two,
        devid: 2,
        generation: 90,
        record: record("c", 9, ["t", "c"], {}, { mounts: ["x", "y"] }),
      }),
    ],
    decides: { ...mirrored, excluded: ["sdc2"] },
  },
  {
    name: "the same, without the half that went on with the copy",
    devices: [
      data("sda", {
        ...two,
        generation: 30,
        record: record("t", 3, ["t", "b"], {}, { mounts: ["m", "p", "q"] }),
      }),
      data("sdc", {
        ...two,
        devid: 2,
        generation: 20,
        record: record("c", 3, ["t", "c"], {}, { mounts: ["x", "y"] }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdc2"] },
    says: /sdc2 and \/dev\/sda2 were each written without the other/,
  },
  {
    name: "the same, of one generation",
    devices: [
      data("sda", {
        ...two,
        generation: 20,
        record: record("t", 3, ["t", "b"], {}, { mounts: ["m", "p", "q"] }),
      }),
      data("sdc", {
        ...two,
        devid: 2,
        generation: 20,
        record: record("c", 3, ["t", "c"], {}, { mounts: ["x", "y"] }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdc2"] },
  },
  {
    name: "both took part in the last mount of each",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 5, both, {}, { mounts: ["m", "n"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both, {}, { mounts: ["n"] }),
      }),
    ],
    decides: mirrored,
    says: "",
  },
  {
    name: "the power went between the records of one mount",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 6, both, {}, { mounts: ["m", "n"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both, {}, { mounts: ["m"] }),
      }),
    ],
    decides: mirrored,
    says: "",
  },
  {
    name: "the same, then the one without a record was mounted alone",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 6, both, {}, { mounts: ["m", "n"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 14,
        record: record("b", 6, ["b"], { a: 10 }, {
          mounts: ["m", "o"],
          lastSeen: { a: "m" },
        }),
      }),
    ],
    decides: { ...degraded, members: ["sdb2"], stale: ["sda2"] },
  },
  {
    name: "copies of both halves went on apart, and wrote as much",
    devices: [
      data("sda", {
        ...two,
        generation: 12,
        record: record("a", 6, both, {}, { mounts: ["m", "n"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 12,
        record: record("b", 6, both, {}, { mounts: ["m", "o"] }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /each written without the other/,
  },
  {
    name: "the power went between the records of a mount of three",
    devices: [
      data("sda", {
        ...three,
        record: record("a", 6, abc, {}, { mounts: ["m", "n"] }),
      }),
      data("sdb", {
        ...three,
        devid: 2,
        record: record("b", 5, abc, {}, { mounts: ["m"] }),
      }),
      data("sdc", {
        ...three,
        devid: 3,
        record: record("c", 5, abc, {}, { mounts: ["m"] }),
      }),
    ],
    decides: { ...mirrored, members: ["sda2", "sdb2", "sdc2"] },
  },
  {
    name: "a member that missed a mount in which something was written",
    devices: [
      data("sda", {
        ...two,
        generation: 11,
        record: record("a", 6, both, {}, { mounts: ["m", "n"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both, {}, { mounts: ["m"] }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
  },
  {
    name: "a member that missed a mount in which only the log was written",
    devices: [
      data("sda", {
        ...two,
        hasLog: true,
        record: record("a", 6, both, {}, { mounts: ["m", "n"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both, {}, { mounts: ["m"] }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
  },
  {
    name: "a member that missed two mounts, though its name was there",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 7, both, {}, { mounts: ["m", "n", "o"] }),
      }),
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both, {}, { mounts: ["m"] }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
  },
  {
    name: "version 1.0 mounted both, and dropped what it does not know",
    devices: [
      data("sda", { ...two, record: record("a", 6, both) }),
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both, {}, { mounts: ["m"] }),
      }),
    ],
    decides: mirrored,
  },
  {
    name: "one half has a record of version 1.0 yet",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 6, both, {}, { mounts: ["m"] }),
      }),
      data("sdb", { ...two, devid: 2, record: record("b", 5, both) }),
    ],
    decides: mirrored,
  },

  // The very same hardware, or a copy
  {
    name: "a stale member on the hardware of its record",
    devices: [
      writtenAlone,
      data("sdb", {
        ...two,
        devid: 2,
        hardware: "wwn-b",
        record: record("b", 5, both, {}, { hardware: "wwn-b" }),
      }),
    ],
    decides: { ...degraded, stale: ["sdb2"] },
    says: /sdb2 missed writes and is rebuilt/,
  },
  {
    name: "a copy of a stale member on other hardware",
    devices: [
      writtenAlone,
      data("sdb", {
        ...two,
        devid: 2,
        hardware: "wwn-x",
        record: record("b", 5, both, {}, { hardware: "wwn-b" }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /sdb2 is an older copy of a member, or on other hardware/,
  },
  ...[
    ["is not known now", undefined, "wwn-b"],
    ["was not known then", "wwn-b", undefined],
    ["was an image file", "wwn-b", "file:7:1"],
    ["is an image file now", "file:7:1", "wwn-b"],
  ].map(([what, hardware, before]) => ({
    name: `a stale member whose hardware ${what}`,
    devices: [
      writtenAlone,
      data("sdb", {
        ...two,
        devid: 2,
        hardware,
        record: record("b", 5, both, {}, { hardware: before }),
      }),
    ],
    decides: { ...degraded, stale: ["sdb2"] },
  })),
  {
    name: "a copy of a stale member in another image file",
    devices: [
      writtenAlone,
      data("sdb", {
        ...two,
        devid: 2,
        hardware: "file:7:2",
        record: record("b", 5, both, {}, { hardware: "file:7:1" }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
  },
  {
    name: "a mirror moved to other hardware, all of it",
    devices: pair.map((parts, i) =>
      parts.map((part) =>
        part.read.record
          ? draw(part, {
            hardware: `new-${i}`,
            record: { ...part.read.record, hardware: `old-${i}` },
          })
          : part
      )
    ),
    decides: mirrored,
    says: "",
  },
  {
    name: "a member and its copy on other hardware, equal in all else",
    devices: [
      data("sda", {
        hardware: "wwn-x",
        record: record("a", 5, ["a"], {}, { hardware: "wwn-a" }),
      }),
      data("sdb", {
        hardware: "wwn-a",
        record: record("a", 5, ["a"], {}, { hardware: "wwn-a" }),
      }),
    ],
    decides: { ...single, members: ["sdb2"], excluded: ["sda2"] },
    says: /sda2 is \/dev\/sdb2 on another path, or holds exactly the same/,
  },
  {
    name: "a copy on other hardware that went on",
    devices: [
      data("sda", {
        generation: 40,
        hardware: "wwn-x",
        record: record("a", 9, ["a"], {}, { hardware: "wwn-a" }),
      }),
      data("sdb", {
        hardware: "wwn-a",
        record: record("a", 5, ["a"], {}, { hardware: "wwn-a" }),
      }),
    ],
    decides: { ...single, members: ["sdb2"], excluded: ["sda2"] },
    says: /sda2 is a copy of \/dev\/sdb2, or was replaced by it/,
  },
  {
    name: "each half was written alone, the one on other hardware more often",
    devices: [
      writtenAlone,
      data("sdb", {
        ...two,
        devid: 2,
        generation: 12,
        hardware: "wwn-x",
        record: record("b", 7, ["b"], { a: 10 }, { hardware: "wwn-b" }),
      }),
    ],
    decides: { ...degraded, members: ["sdb2"], excluded: ["sda2"] },
    says: /each written without the other/,
  },
  {
    name: "two thirds moved to other hardware, before a third that did not",
    devices: [
      data("sda", {
        ...three,
        generation: 40,
        hardware: "wwn-a",
        record: record("a", 9, ["a"], { b: 10, c: 10 }, { hardware: "wwn-a" }),
      }),
      ...["b", "c"].map((member, i) =>
        data(`sd${member}`, {
          ...three,
          devid: 2 + i,
          generation: 12,
          hardware: `wwn-${member}`,
          record: record(member, 6, ["b", "c"], { a: 10 }, {
            hardware: `old-${member}`,
          }),
        })
      ),
    ],
    decides: {
      ...mirrored,
      members: ["sdb2", "sdc2"],
      missing: 1,
      excluded: ["sda2"],
    },
  },
  {
    name: "what came back is older than what was there last",
    devices: [
      wentOnAlone(),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 8,
        record: record("b", 5, both, {}, { mounts: ["m"] }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /sdb2 is an older copy of a member/,
  },
  {
    name:
      "an older copy in the slot that a virtual machine's serial number names",
    devices: [
      wentOnAlone(),
      data("sdb", {
        ...two,
        devid: 2,
        generation: 8,
        hardware: "drive-scsi1",
        record: record("b", 5, both, {}, {
          mounts: ["m"],
          hardware: "drive-scsi1",
        }),
      }),
    ],
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /sdb2 is an older copy of a member/,
  },
  {
    name: "what came back is what was there last",
    devices: [
      wentOnAlone(),
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 6, both, {}, { mounts: ["m", "n"] }),
      }),
    ],
    decides: { ...degraded, stale: ["sdb2"] },
  },
  {
    name: "one of two members knows that what came back is older",
    devices: [
      data("sda", {
        ...three,
        generation: 12,
        record: record("a", 7, ["a", "b"], { c: 10 }, {
          mounts: ["m", "n", "o"],
          lastSeen: { c: "n" },
        }),
      }),
      data("sdb", {
        ...three,
        devid: 2,
        generation: 12,
        record: record("b", 7, ["a", "b"], { c: 10 }, {
          mounts: ["m", "n", "o"],
        }),
      }),
      data("sdc", {
        ...three,
        devid: 3,
        generation: 8,
        record: record("c", 5, abc, {}, { mounts: ["m"] }),
      }),
    ],
    decides: { ...mirrored, missing: 1, excluded: ["sdc2"] },
  },
  {
    name: "one disk on two paths",
    devices: [
      data("sda", { record: record("a", 5, ["a"], {}, { mounts: ["m"] }) }),
      data("sdb", { record: record("a", 5, ["a"], {}, { mounts: ["m"] }) }),
    ],
    decides: { ...single, excluded: ["sdb2"] },
    says:
      /^\/dev\/sdb2 is \/dev\/sda2 on another path, or holds exactly the same: \/dev\/sda2 is used, \/dev\/sdb2 is not touched \(to use it instead, unplug \/dev\/sda2\)$/,
  },
  {
    name: "a copy of one generation and epoch that another mount made",
    devices: [
      data("sda", { record: record("a", 5, ["a"], {}, { mounts: ["m"] }) }),
      data("sdb", { record: record("a", 5, ["a"], {}, { mounts: ["n"] }) }),
    ],
    decides: { ...single, excluded: ["sdb2"] },
    says: /sdb2 is a copy of \/dev\/sda2, .*--force \/dev\/sdb\)$/,
  },
  {
    name: "two thirds of one mount before a third of one epoch",
    devices: [
      data("sda", {
        ...three,
        generation: 12,
        record: record("a", 6, abc, {}, { mounts: ["m", "x"] }),
      }),
      data("sdb", {
        ...three,
        devid: 2,
        generation: 12,
        record: record("b", 6, abc, {}, { mounts: ["m", "y"] }),
      }),
      data("sdc", {
        ...three,
        devid: 3,
        generation: 12,
        record: record("c", 6, abc, {}, { mounts: ["m", "y"] }),
      }),
    ],
    decides: {
      ...mirrored,
      members: ["sdb2", "sdc2"],
      missing: 1,
      excluded: ["sda2"],
    },
  },

  // Data wins over magic, started over, although others are in doubt
  {
    name: "ext4 with our label on a disk with a forgotten header",
    devices: [
      draws(without(data("sda", { disk: { header: true } }), "btrfs"), 2, {
        signatures: [{ type: "ext4", label: DATA }],
      }),
    ],
    decides: { disarm: ["sda"], errors: 1 },
    says: /data wins[^]*sda2 may be .* it holds ext4 "lightwhale-data": it is/,
  },
  {
    name: "a whole disk of ext4 with our label, and a magic disk",
    devices: [
      disk("sda", { signatures: [{ type: "ext4", label: DATA }] }),
      magic("sdb"),
    ],
    decides: { errors: 2 },
    says: /sdb will not be formatted while \/dev\/sda may be a damaged data/,
  },
  {
    name: "a disk that was started over",
    devices: [
      data("sda", {
        lost: "first sector",
        disk: { header: true, onlyHeader: true },
      }),
    ],
    decides: { mode: "persistent", create: ["sda"] },
    says: "",
  },
  {
    name: "a damaged disk that was started over, and another magic one",
    devices: [
      data("sda", {
        intact: false,
        lost: "primary table",
        disk: { header: true, onlyHeader: true },
      }),
      magic("sdb"),
    ],
    decides: { mode: "persistent", create: ["sda", "sdb"] },
    says: "",
  },
  {
    name: "a header and zeros, but no table behind it",
    devices: [
      disk("sda", {
        header: true,
        onlyHeader: true,
        btrfs: superblock({}),
      }),
    ],
    decides: { ...single, members: ["sda"], disarm: ["sda"] },
    says: /the data wins/,
  },
  {
    name: "half of a mounted mirror gets the header and zeros",
    devices: [
      data("sda", openMember),
      data("sdb", {
        ...openMember,
        devid: 2,
        lost: "first sector",
        disk: { header: true, onlyHeader: true },
      }),
    ],
    facts: { mounted },
    decides: { ...mirrored, mode: "mounted" },
    says: /^\/dev\/sdb is formatted at the next boot, .* \/dev\/sdb2 .* lost/,
  },
  {
    name: "a damaged disk, and one that is to be formatted anyway",
    devices: [data("sda", { intact: false }), magic("sdb", { anyway: true })],
    decides: { mode: "persistent", create: ["sdb"] },
    says: /^\/dev\/sda2 may be .* its superblock is damaged: it is not touched/,
  },
  {
    name: "a disk that cannot be read, and one to be formatted anyway",
    devices: [
      disk("sda", { error: "Cannot read /dev/sda" }),
      magic("sdb", { anyway: true }),
    ],
    decides: { mode: "persistent", create: ["sdb"] },
    says: /^Cannot read \/dev\/sda: it is not used$/,
  },
  {
    name: "a damaged disk, one to be formatted anyway, and another magic one",
    devices: [
      data("sda", { intact: false }),
      magic("sdb", { anyway: true }),
      magic("sdc"),
    ],
    decides: { mode: "persistent", create: ["sdb"], errors: 1 },
    says: /^\/dev\/sdc will not be .* nevertheless: .*--force \/dev\/sdc\n/,
  },
  {
    name: "half of a mirror is damaged, and one is to be formatted anyway",
    devices: [
      first,
      data("sdb", { ...two, devid: 2, intact: false }),
      magic("sdc", { anyway: true }),
      magic("sdd"),
    ],
    decides: { ...degraded, absent: 0, join: ["sdc"] },
    says: /\/dev\/sdd does not join .*while \/dev\/sdb2 .*--force \/dev\/sdd\)/,
  },
  {
    name: "half of a mirror cannot be read, and a magic disk is there",
    devices: [
      first,
      disk("sdb", { error: "Cannot read /dev/sdb" }),
      magic("sdc"),
    ],
    decides: degraded,
    says: /\/dev\/sdc does not join .* while \/dev\/sdb may be the missing/,
  },

  // Beside a whole data filesystem a leftover is a note
  {
    name: "a leftover beside a whole filesystem, and a magic disk",
    devices: [data("sda"), without(data("sdb"), "btrfs"), magic("sdc")],
    decides: { ...single, join: ["sdc"] },
    says:
      /^\/dev\/sdb2 may be .* it holds no filesystem: it is not touched .*$/,
  },
  {
    name: "our swap on the system's disk beside a whole filesystem",
    devices: [data("sda"), onlySwap("sdb"), magic("sdc")],
    decides: { ...single, join: ["sdc"] },
    says: /^\/dev\/sdb may be .* a "lightwhale-swap" partition and no other/,
  },
  {
    name: "a disk that cannot be read beside a whole filesystem",
    devices: [
      data("sda"),
      disk("sdb", { error: "Cannot read /dev/sdb" }),
      magic("sdc"),
    ],
    decides: { ...single, join: ["sdc"] },
    says: /^Cannot read \/dev\/sdb: it is not used$/,
  },
  {
    name: "a damaged part of another filesystem: all are waited for",
    devices: [
      first,
      data("sdc", { ...two, fsid: "other", devid: 2, intact: false }),
    ],
    decides: degraded,
  },

  // One magic partition a disk
  {
    name: "two magic partitions on one disk: the larger",
    devices: [
      draws(magicPartition("sda"), 1, { partitionName: MAGIC }),
    ],
    decides: { mode: "persistent", create: ["sda2"], errors: 1 },
    says:
      /^Cannot format \/dev\/sda1: \/dev\/sda2 on the same disk is used: a disk is no mirror of itself$/,
  },
  {
    name: "two magic partitions of one size: the first",
    devices: [
      draws(
        draws(magicPartition("sda"), 2, { sizeBytes: 10 * GiB }),
        1,
        { partitionName: MAGIC, startBytes: diskBytes, sizeBytes: 10 * GiB },
      ),
    ],
    decides: { mode: "persistent", create: ["sda1"], errors: 1 },
    says: /^Cannot format \/dev\/sda2: \/dev\/sda1 on the same disk is used/,
  },
  {
    name: "magic partitions of two disks",
    devices: [magicPartition("sda"), magicPartition("sdb")],
    decides: { mode: "persistent", create: ["sda2", "sdb2"] },
    says: "",
  },
  {
    name: "a magic partition on a member's disk",
    devices: [
      [
        ...data("sda"),
        device("sda3", {
          kind: "partition",
          disk: "sda",
          number: 3,
          startBytes: diskBytes,
          sizeBytes: 60 * GiB,
          partitionName: MAGIC,
        }),
      ],
    ],
    decides: { ...single, errors: 1 },
    says:
      /^Cannot format \/dev\/sda3: \/dev\/sda2 on the same disk is a member: a disk is no mirror of itself$/,
  },
  {
    name: "a magic partition on another disk joins",
    devices: [data("sda"), magicPartition("sdb")],
    decides: { ...single, join: ["sdb2"] },
    says: "",
  },
  {
    name: "a magic disk is no mirror of the disk of a member",
    devices: [data("sda"), magic("sdb")],
    decides: { ...single, join: ["sdb"] },
    says: "",
  },

  // Members that became smaller, tables for other sectors
  {
    name: "a member that became smaller",
    devices: [
      first,
      draws(second, 2, { sizeBytes: diskBytes - GiB - 6 * MiB }),
    ],
    decides: { ...degraded, absent: 0 },
    says:
      /sdb2 may be .*, but it is 4 MiB \(4194304 bytes\) smaller than its filesystem: it is not touched \(give the disk its size again;/,
  },
  {
    name: "a member that became a byte smaller, and a magic disk",
    devices: [
      first,
      draws(second, 2, { sizeBytes: diskBytes - GiB - 2 * MiB - 1 }),
      magic("sdc"),
    ],
    decides: { ...degraded, absent: 0 },
    says: /sdc does not join .* while \/dev\/sdb2 may be the missing disk/,
  },
  {
    name: "the only member became smaller, and a magic disk",
    devices: [
      draws(data("sda"), 2, { sizeBytes: diskBytes - GiB - 6 * MiB }),
      magic("sdb"),
    ],
    decides: { errors: 2 },
    says: /sdb will not be formatted while \/dev\/sda2/,
  },
  {
    name: "a member that is larger than its filesystem",
    devices: [draws(data("sda"), 2, { sizeBytes: diskBytes })],
    decides: single,
    says: "",
  },
  {
    name: "a data disk that has sectors of another size now",
    devices: [
      withoutNodes(draws(data("sda"), 0, { sectorBytes: 4096 })),
    ],
    decides: { ...single, shows: ["sda"] },
    says: "",
  },
  {
    name: "the same, and it is larger, and lost its first sector",
    devices: [
      withoutNodes(
        draws(data("sda", { lost: "first sector" }), 0, {
          sectorBytes: 4096,
          sizeBytes: 2 * diskBytes,
        }),
      ),
    ],
    decides: { ...single, shows: ["sda"] },
  },
  {
    name: "the same, and it is larger",
    devices: [
      withoutNodes(
        draws(data("sda"), 0, { sectorBytes: 4096, sizeBytes: 2 * diskBytes }),
      ),
    ],
    decides: { ...single, shows: ["sda"] },
  },
  {
    name: "a magic partition in a table for sectors of another size",
    devices: [
      withoutNodes(
        magicPartition("sda").map((part) => draw(part, { sectorBytes: 4096 })),
      ),
    ],
    decides: { errors: 1 },
    says: /sda2: its table was made for sectors of 512 bytes/,
  },
  {
    name: "a disk that lost its first sector",
    devices: [withoutNodes(data("sda", { lost: "first sector" }))],
    decides: { ...single, repair: ["sda"], shows: ["sda"] },
    says: "",
  },
  {
    name: "one half lost its first sector, and is read-only",
    devices: [
      first,
      draws(
        data("sdb", {
          ...two,
          devid: 2,
          lost: "first sector",
          record: record("b", 5, both),
        }),
        0,
        { readOnly: true },
      ),
    ],
    decides: mirrored,
  },
  {
    name: "a disk that grew lost its first sector",
    devices: [
      data("sda", {
        lost: "first sector",
        disk: { sizeBytes: 2 * diskBytes },
      }),
    ],
    decides: { ...single, repair: ["sda"] },
  },
  {
    name: "a magic partition of a disk that lost its first sector",
    devices: [
      magicPartition("sda").map((part) =>
        part.read.gpt
          ? draw(part, { gpt: { ...part.read.gpt, lost: "first sector" } })
          : part
      ),
    ],
    decides: { mode: "persistent", create: ["sda2"], repair: ["sda"] },
  },
  {
    name: "a disk that grew while it is mounted",
    devices: [
      data("sda", { open: true, disk: { sizeBytes: 2 * diskBytes } }),
    ],
    facts: { mounted },
    decides: { ...single, mode: "mounted" },
  },

  // Tables and superblocks that something else contradicts
  {
    name: "RAID metadata at the end of a data disk that grew",
    devices: [
      data("sda", {
        disk: {
          sizeBytes: 2 * diskBytes,
          signatures: [{ type: "gpt" }, {
            type: "isw_raid_member",
            atBytes: Number.MAX_SAFE_INTEGER,
          }],
        },
      }),
    ],
    decides: single,
    says: /sda is larger than its partition table, but holds isw_raid_member/,
  },
  {
    name: "RAID metadata on a data disk that lost its first sector",
    devices: [
      data("sda", {
        lost: "first sector",
        disk: { signatures: [{ type: "gpt" }, { type: "linux_raid_member" }] },
      }),
    ],
    decides: { errors: 1 },
    says:
      /sda2 may be .* \/dev\/sda, which it is a part of, holds linux_raid_member, and its partition table is damaged/,
  },
  {
    name: "a filesystem of the whole disk over a data disk",
    devices: [
      data("sda", {
        disk: { signatures: [{ type: "gpt" }, { type: "xfs", label: "new" }] },
      }),
      magic("sdb"),
    ],
    decides: { errors: 2 },
    says:
      /sda2 may be .*, but \/dev\/sda, which it is a part of, holds xfs "new":/,
  },
  {
    name: "a filesystem of the whole disk over a magic partition",
    devices: [
      magicPartition("sda", { signatures: [{ type: "gpt" }, { type: "xfs" }] }),
    ],
    decides: { errors: 1 },
    says:
      /^Cannot format \/dev\/sda2: \/dev\/sda, which .* holds xfs; wipefs\(8\) takes/,
    because: /no enabled disk can be used/,
  },
  {
    name: "a filesystem over a magic partition, and a magic disk",
    devices: [
      magicPartition("sda", { signatures: [{ type: "gpt" }, { type: "xfs" }] }),
      magic("sdb"),
    ],
    decides: { mode: "persistent", create: ["sdb"], errors: 1 },
    says: /^Cannot format \/dev\/sda2: \/dev\/sda, which .* holds xfs/,
  },
  {
    name: "a filesystem over a magic partition, beside a data disk",
    devices: [
      data("sda"),
      magicPartition("sdb", { signatures: [{ type: "gpt" }, { type: "xfs" }] }),
    ],
    decides: { ...single, errors: 1 },
    says: /^Cannot format \/dev\/sdb2: \/dev\/sdb, which .* holds xfs/,
  },
  {
    name: "a filesystem over a magic partition with data of ours",
    devices: [
      draws(data("sda", { disk: { signatures: [{ type: "xfs" }] } }), 2, {
        partitionName: MAGIC,
      }),
    ],
    decides: { errors: 1 },
    says: /^\/dev\/sda2 may be .*, but \/dev\/sda, which .* holds xfs: [^\n]*$/,
  },
  {
    name: "a magic partition behind a hybrid ISO image",
    devices: [
      magicPartition("sda", {
        signatures: [{ type: "gpt" }, { type: "PMBR" }, { type: "iso9660" }],
      }),
    ],
    decides: { mode: "persistent", create: ["sda2"] },
    says: "",
  },
  {
    name: "an old Btrfs of ours under a filesystem that is newer (A1)",
    devices: [
      disk("sda", {
        btrfs: superblock({}),
        table: "mbr",
        signatures: [{ type: "btrfs", label: DATA }, { type: "dos" }],
      }),
      magic("sdb"),
    ],
    decides: { errors: 2 },
    says: /sda may be .* it holds a partition table \(mbr\), dos as well as a/,
  },
  {
    name: "ext4 in our partition beside a whole filesystem",
    devices: [
      data("sda"),
      draws(without(data("sdb"), "btrfs"), 2, {
        signatures: [{ type: "ext4", label: "photos" }],
      }),
    ],
    decides: single,
    says:
      /^\/dev\/sdb2 may be .*, but it holds ext4 "photos": it is not touched/,
  },
  {
    name: "LVM behind our superblock",
    devices: [
      draws(data("sda"), 2, {
        signatures: [{ type: "btrfs", label: DATA }, { type: "LVM2_member" }],
      }),
    ],
    decides: { errors: 1 },
    says: /sda2 may be .*, but it holds LVM2_member as well as a Btrfs/,
  },

  // Swap
  {
    name: "an empty swap partition on a member's disk",
    devices: [data("sda", { swap: { signatures: [] } })],
    decides: { ...single, swap: ["sda1"], makesSwap: ["sda1"] },
    says: "",
  },
  {
    name: "an empty swap partition, and swap is not wanted",
    devices: [data("sda", { swap: { signatures: [] } })],
    settings: { noSwap: true },
    decides: single,
  },
  ...[{ signatures: [] }, { swapLabel: SWAP }].map((swap) => ({
    name: `a partition overlaps one for swap, ${Object.keys(swap)}`,
    devices: [
      data("sda", { swap }).map((part) => {
        const { gpt } = part.read;
        const other = { number: 3, name: "mine", startBytes: 8 * MiB };
        const entry = { ...other, sizeBytes: 2 * MiB };
        if (!gpt) return part;
        const partitions = [...gpt.partitions, entry];
        return reading(part, { gpt: { ...gpt, partitions } });
      }),
    ],
    decides: single,
  })),
  {
    name: "an empty swap partition while the filesystem is mounted",
    devices: [data("sda", { open: true, swap: { signatures: [] } })],
    facts: { mounted },
    decides: { ...single, mode: "mounted" },
  },
  {
    name: "an empty swap partition that the kernel does not show",
    devices: [withoutNodes(data("sda", { swap: { signatures: [] } }))],
    decides: { ...single, shows: ["sda"], swap: ["sda1"], makesSwap: ["sda1"] },
  },
  {
    name: "a swap partition that nobody asked about",
    devices: [data("sda")],
    decides: single,
  },
  {
    name: "a swap partition that holds something else",
    devices: [data("sda", { swap: { signatures: [{ type: "ext4" }] } })],
    decides: single,
  },
  {
    name: "an empty partition of another name",
    devices: [
      data("sda", { names: ["other", DATA], swap: { signatures: [] } }),
    ],
    decides: single,
  },
  {
    name: "an empty swap partition on another disk",
    devices: [
      data("sda"),
      data("sdb", {
        fsid: "other",
        label: "other",
        names: [SWAP, "other"],
        swap: { signatures: [] },
      }),
    ],
    decides: single,
  },
  {
    name: "swap on the read-only half of a mirror",
    devices: [
      first,
      data("sdb", {
        ...two,
        devid: 2,
        record: record("b", 5, both),
        swapLabel: SWAP,
        swap: { readOnly: true },
      }),
    ],
    decides: mirrored,
  },
  {
    name: "swap is not wanted while the filesystem is mounted",
    devices: [data("sda", { open: true, swapLabel: SWAP })],
    settings: { noSwap: true },
    facts: { mounted },
    decides: { ...single, mode: "mounted" },
  },
  {
    name: "lightwhale.persistence=off, and it is mounted already",
    devices: [data("sda", { open: true })],
    settings: { off: true },
    facts: { mounted },
    decides: { ...single, mode: "mounted" },
  },
  {
    name: "another disk cannot be read while a mounted mirror lacks a member",
    devices: [
      data("sda", openMember),
      disk("sdb", { error: "Cannot read /dev/sdb" }),
      magic("sdc"),
    ],
    facts: { mounted },
    decides: { ...degraded, mode: "mounted", join: ["sdc"] },
  },
  {
    name: "a leftover beside a mounted mirror that lacks a member",
    devices: [
      data("sda", openMember),
      without(data("sdb"), "btrfs"),
      magic("sdc"),
    ],
    facts: { mounted },
    decides: { ...degraded, mode: "mounted" },
    says: /sdc does not join .* while \/dev\/sdb2 may be the missing disk/,
  },
  {
    name: "one of three returns after it was removed while it was away",
    devices: [
      ...["a", "b"].map((member, i) =>
        data(`sd${member}`, {
          ...two,
          devid: 1 + i,
          generation: 14,
          record: record(member, 7, both, { c: 10 }),
        })
      ),
      data("sdc", { ...three, devid: 3, record: record("c", 5, abc) }),
    ],
    decides: { ...mirrored, excluded: ["sdc2"] },
    says: /^\/dev\/sdc2 was replaced while it was away: .* is not touched/,
  },
  {
    name: "more members than the filesystem has",
    devices: [
      data("sda", { ...two, generation: 12 }),
      data("sdb", { ...three, devid: 2, generation: 11 }),
      data("sdc", { ...three, devid: 3, generation: 11 }),
    ],
    decides: {
      ...mirrored,
      members: ["sda2", "sdb2", "sdc2"],
      scrub: true,
    },
  },
  {
    name: "more members than it has, and the target of a replace",
    devices: [
      data("sda", two),
      data("sdb", { ...two, devid: 2 }),
      data("sdc", { ...two, devid: 0 }),
    ],
    decides: { ...mirrored, target: ["sdc2"], absent: 0 },
  },
  {
    name: "a copy of one generation that was mounted less often",
    devices: [
      data("sda", { record: record("a", 5, ["a"]) }),
      data("sdb", { record: record("a", 4, ["a"]) }),
    ],
    decides: { ...single, excluded: ["sdb2"] },
    says: /sdb2 is a copy of \/dev\/sda2, or was replaced by it/,
  },
  {
    name: "two data filesystems of other machines, one whole, equally often",
    devices: [
      data("sda", { ...two, fsid: "1", record: ofMachine("a", 3, "theirs") }),
      data("sdb", { fsid: "2", record: ofMachine("b", 3, "theirs") }),
    ],
    facts: { machine: "ours" },
    decides: { ...single, members: ["sdb2"] },
  },
  {
    name: "two data filesystems, equal in all but their UUIDs",
    devices: [data("sda", { fsid: "b" }), data("sdb", { fsid: "a" })],
    decides: { ...single, members: ["sdb2"] },
    says: /a on \/dev\/sdb2 is used, b on \/dev\/sda2 is not touched/,
  },
  // What a person is told to run (A4)
  {
    name: "a damaged data partition on a disk that others share",
    devices: [without(data("sda", { names: ["EFI", DATA] }), "btrfs")],
    decides: { errors: 1 },
    says: /to give up all that is on \/dev\/sda2, .*--force \/dev\/sda2\)$/,
  },
  {
    name: "a damaged data partition on a disk of ours",
    devices: [without(data("sda"), "btrfs")],
    decides: { errors: 1 },
    says: /to give up all that is on \/dev\/sda, .*--force \/dev\/sda\)$/,
  },
  {
    name: "a copy on a disk with an MBR, which others share",
    devices: [
      data("sda", { generation: 12 }),
      data("sdb").map((part) =>
        part.kind === "disk"
          ? draw(reading(part, { gpt: undefined }), { table: "mbr" })
          : part
      ),
    ],
    decides: { ...single, excluded: ["sdb2"] },
    says:
      /to give up all that is on \/dev\/sdb2, .*: wipefs --all \/dev\/sdb2\)$/,
  },
  {
    name: "a copy on a volume",
    devices: [
      data("sda", { generation: 12 }),
      disk("dm-0", { kind: "volume", btrfs: superblock({}) }),
    ],
    decides: { ...single, excluded: ["dm-0"] },
    says:
      /to give up all that is on \/dev\/dm-0, .*: wipefs --all \/dev\/dm-0\)$/,
  },
  {
    name: "a damaged data partition beside one that is magic",
    devices: [without(data("sda", { names: [MAGIC, DATA] }), "btrfs")],
    decides: { errors: 2 },
    says: /--force \/dev\/sda1\n.*--force \/dev\/sda\)$/,
  },
  {
    name: "a damaged data partition of a disk that is not looked at",
    devices: [without(data("sda"), "btrfs").slice(2)],
    decides: { errors: 1 },
    says: /--force \/dev\/sda2\)$/,
  },
  {
    name: "each half of a mirror on shared disks was written alone",
    devices: ["sda", "sdb"].map((name, i) =>
      data(name, {
        ...two,
        devid: i + 1,
        generation: 12,
        names: ["EFI", DATA],
        record: record(name, 6, [name], { [["sdb", "sda"][i]]: 10 }),
      })
    ),
    decides: { ...degraded, excluded: ["sdb2"] },
    says: /unplug \/dev\/sda2; to give up .*--force \/dev\/sdb2\)/,
  },
  {
    name: "a magic partition that begins with the header as well",
    devices: [draws(magicPartition("sda"), 2, { header: true })],
    decides: { mode: "persistent", create: ["sda2"] },
    says: "",
  },
  {
    name: "a magic partition behind a bystander that grew",
    devices: [
      draws(magicPartition("sda"), 0, { sizeBytes: 2 * diskBytes }),
    ],
    decides: { mode: "persistent", create: ["sda2"] },
    says: "",
  },
  {
    name: "what is below an md array, and a magic disk",
    devices: [
      data("sda", { main: { inUse: "held by /dev/md0" }, intact: false }),
      magic("sdb"),
    ],
    decides: { mode: "persistent", create: ["sdb"] },
    says: "",
  },
  {
    name: "an unreadable disk below an md array, and a magic disk",
    devices: [
      disk("sda", { inUse: "held by /dev/md0", error: "Cannot read it" }),
      magic("sdb"),
    ],
    decides: { mode: "persistent", create: ["sdb"] },
    says: "",
  },
  {
    name: "a mirror of three that lacks one runs with less redundancy",
    devices: [
      data("sda", { ...three, record: record("a", 5, abc) }),
      data("sdb", { ...three, devid: 2, record: record("b", 5, abc) }),
    ],
    decides: { ...mirrored, missing: 1 },
    says: /lacks 1 of 3 devices: it runs with less redundancy, degraded/,
  },
  {
    name: "a data disk that grew, on a disk of which another part is ours",
    devices: [
      [
        ...data("sda", { disk: { sizeBytes: 2 * diskBytes } }),
        device("sda3", {
          kind: "partition",
          disk: "sda",
          number: 3,
          startBytes: 90 * GiB,
          btrfs: superblock({ label: "other", fsid: "other" }),
        }),
      ],
    ],
    decides: { ...single, grow: ["sda2"] },
  },
  {
    name: "noswap",
    devices: [data("sda", { swapLabel: SWAP })],
    settings: { noSwap: true },
    decides: { mode: "persistent", members: ["sda2"] },
  },
];

for (const situation of situations) {
  const { name, devices, decides, says, because, ...other } = situation;
  Deno.test(`decide(): ${name}`, () => {
    const found = plan(devices, other);
    const said = found.notes.map(({ text }) => text).join("\n");
    assertEquals(summary(found), expected(decides), said);
    if (says === "") assertEquals(said, says);
    else if (says) assertMatch(said, says);
    if (because) assertMatch(found.reason, because);
  });

  Deno.test(`decide() does not depend on the order: ${name}`, () => {
    for (const order of ordersOf(devices)) {
      const found = plan(order, other);
      assertEquals(summary(found), expected(decides));
    }
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
/** As mkfs.btrfs makes it of two devices by itself. */
const unmirrored: FilesystemState = {
  ...whole,
  profiles: { ...whole.profiles, data: ["single"] },
};

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
    devices: pairWith({}, { ...two, usedBytes: 150 * GiB }),
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
    job: "replace sdc for 2",
  },
  {
    name: "two magic disks for one missing member: one takes its place",
    devices: [first, magic("sdc"), magic("sdd")],
    state: lacking,
    job: "replace sdc for 2",
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
    devices: pairWith({ settled: { devices: 1, unmirrored: [] } }),
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
  {
    name: "nothing is mounted",
    devices: [disk("sda")],
    state: whole,
    pending: { scrub: true },
    job: undefined,
  },
  {
    name: "a replace that was cut, and its member is missing",
    devices: [first, data("sdc", { ...two, devid: 0 })],
    state: lacking,
    job: "replace sdc2 for 2",
  },
  {
    name: "a replace that was cut, and its member came back",
    devices: [...pair, data("sdc", { ...two, devid: 0 })],
    state: whole,
    job: "release sdc2",
  },
  {
    name: "a stale member that the filesystem does not miss",
    devices: [writtenAlone, second],
    state: whole,
    job: undefined,
  },
  {
    name: "another member than the stale one is missing",
    devices: [writtenAlone, second],
    state: { ...whole, devids: [1, 2, 3], missing: [3] },
    job: undefined,
  },
  {
    name: "two are missing, and a magic disk is there",
    devices: [first, magic("sdd")],
    state: { ...whole, devids: [1, 2, 3], missing: [3, 2] },
    job: "replace sdd for 3",
  },
  {
    name: "a smaller disk was added for the missing one, another is magic",
    devices: [first, magic("sdc")],
    state: { ...lacking, devids: [1, 2, 3] },
    pending: { "remove missing": true },
    job: "remove missing",
  },
  {
    name: "chunks without a mirror, and just room to mirror them",
    devices: pairWith({}, {
      ...two,
      usedBytes: diskBytes - GiB - 2 * MiB,
    }),
    state: { ...whole, profiles: { ...whole.profiles, data: ["single"] } },
    job: "balance",
  },
  {
    name: "chunks without a mirror, and a byte too many to mirror them",
    devices: pairWith({}, {
      ...two,
      usedBytes: diskBytes - GiB - 2 * MiB + 1,
    }),
    state: { ...whole, profiles: { ...whole.profiles, data: ["single"] } },
    job: undefined,
  },
  {
    name: "a person converted a mirror back to single: it is recorded",
    devices: pair,
    state: unmirrored,
    job: "settle",
  },
  {
    name: "a person's single stays, and is recorded once",
    devices: pairWith({ settled: { devices: 2, unmirrored: ["data"] } }),
    state: unmirrored,
    job: undefined,
  },
  {
    name: "a person's single stays when another disk has joined",
    devices: pairWith({ settled: { devices: 2, unmirrored: ["data"] } }),
    state: { ...unmirrored, devids: [1, 2, 3] },
    job: "balance -m",
  },
  {
    name: "version 1.0 let a disk join, and the power went before the balance",
    devices: pairWith({}),
    state: unmirrored,
    job: "balance -d",
  },
  {
    name: "a mirror of version 1.0: it is recorded",
    devices: pairWith({}),
    state: whole,
    job: "settle",
  },
  {
    name: "a disk joined, and the power went before it got a record",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 5, ["a"], {}, {
          settled: { devices: 1, unmirrored: [] },
        }),
      }),
      data("sdb", { ...two, devid: 2 }),
    ],
    state: {
      ...whole,
      profiles: { data: ["single"], metadata: ["dup"], system: ["dup"] },
    },
    job: "balance -m -d",
  },
  {
    name: "made by a person and never mounted: it stays, and is recorded",
    devices: [data("sda", two), data("sdb", { ...two, devid: 2 })],
    state: unmirrored,
    job: "settle",
  },
  {
    name: "written while a member was missing, which was replaced",
    devices: pairWith({ settled: { devices: 0, unmirrored: [] } }),
    state: unmirrored,
    job: "balance -d",
  },
  {
    name: "a person's single, of which a member was missing, is whole again",
    devices: pairWith({ settled: { devices: 0, unmirrored: ["data"] } }),
    state: unmirrored,
    job: "settle",
  },
  {
    name: "a mirror of which one half was removed: another disk may join again",
    devices: [
      data("sda", {
        record: record("a", 9, ["a"], {}, {
          settled: { devices: 2, unmirrored: [] },
        }),
      }),
    ],
    state: {
      ...whole,
      devids: [1],
      profiles: { data: ["single"], metadata: ["dup"], system: ["dup"] },
    },
    job: "settle",
  },
  {
    name: "no member has room for a record",
    devices: [
      data("sda", { ...two, main: { recordable: false } }),
      data("sdb", { ...two, devid: 2, main: { recordable: false } }),
    ],
    state: whole,
    job: undefined,
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
    const [, devid] = /place of device (\d+)$/.exec(found?.what ?? "") ?? [];
    const place = devid ? ` for ${devid}` : "";
    const filters = found?.what.match(/-[md](?=profiles)/g) ?? [];
    const types = job?.includes("-") ? filters.map((f) => ` ${f}`) : [];
    assertEquals(found && found.kind + object + place + types.join(""), job);
  });
}

// A member that is to leave

const told = (how: "move" | "remove", more: Partial<MemberRecord> = {}) => ({
  mounts: ["m"],
  leaving: { member: "b", how },
  ...more,
});

/** Two members; the second was told to leave. */
const leaving = (how: "move" | "remove", open = false, to?: string) =>
  ["a", "b"].map((member, i) =>
    data(`sd${member}`, {
      ...two,
      devid: i + 1,
      open,
      record: record(
        member,
        5,
        ["a", "b"],
        {},
        told(how, { leaving: { member: "b", how, to } }),
      ),
    })
  );

/** A larger disk than others. */
const larger = { sizeBytes: 900 * GiB };

/** The one that stays, mounted, alone or beside another that has come. */
const stays = data("sda", {
  open: true,
  generation: 20,
  record: record(
    "a",
    6,
    ["a"],
    { b: 10 },
    told("remove", { mounts: ["m", "n"] }),
  ),
});
const [, gone] = leaving("remove");

const withRecord = (more: Partial<MemberRecord>) =>
  draws(gone, 2, {
    record: record("b", 5, ["a", "b"], {}, told("remove", more)),
  });

/** The same on a disk with another name. */
const renamed = (devices: BlockDevice[], from: string, to: string) =>
  devices.map((device) => ({
    ...device,
    name: device.name.replace(from, to),
    path: device.path.replace(from, to),
    disk: to,
  }));

/** `job`: its kind, and what it is done to. */
const leavers: {
  name: string;
  devices: BlockDevice[][];
  facts?: Partial<Facts>;
  missing?: number[];
  members: string[];
  leaver?: string;
  absent?: number;
  job?: string;
}[] = [
  {
    name: "one of two is to leave, and both are mounted",
    devices: leaving("remove", true),
    facts: { mounted },
    members: ["sda2", "sdb2"],
    job: "settle",
  },
  {
    name: "one of two is to leave, both are mounted: what the next boot does",
    devices: leaving("remove", true),
    missing: [2],
    members: ["sda2"],
    leaver: "sdb2",
    job: "remove",
  },
  {
    name: "one of two is to leave at a boot",
    devices: leaving("remove"),
    missing: [2],
    members: ["sda2"],
    leaver: "sdb2",
    job: "remove",
  },
  {
    name: "one of two is to leave, and a magic disk is there",
    devices: [...leaving("remove"), magic("sdc")],
    missing: [2],
    members: ["sda2"],
    leaver: "sdb2",
    job: "replace sdc",
  },
  {
    name: "one of two is to leave, and is unplugged",
    devices: leaving("remove").slice(0, 1),
    missing: [2],
    members: ["sda2"],
    job: "remove",
  },
  {
    name: "the other of two has gone: the one that is to leave is used",
    devices: leaving("remove").slice(1),
    missing: [1],
    members: ["sdb2"],
    absent: 1,
  },
  {
    name: "only the one that is to leave was told so",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 5, ["a", "b"], {}, { mounts: ["m"] }),
      }),
      withRecord({ mounts: ["m", "n"] }),
    ],
    members: ["sda2", "sdb2"],
    job: "settle",
  },
  {
    name: "one of two is to move, and nothing is there to move to",
    devices: leaving("move"),
    members: ["sda2", "sdb2"],
    job: "settle",
  },
  {
    name: "one of two is to move to a magic disk",
    devices: [...leaving("move", true), magic("sdc")],
    members: ["sda2", "sdb2"],
    job: "move sdc",
  },
  {
    name: "one of two is to move to a disk beside a larger one",
    devices: [
      ...leaving("move", true, "serial 1"),
      magic("sdc", { ...larger, hardware: "serial 2" }),
      magic("sdd", { hardware: "serial 1" }),
    ],
    members: ["sda2", "sdb2"],
    job: "move sdd",
  },
  {
    name: "one of two is to move to a disk without a name, beside a larger one",
    devices: [
      ...leaving("move", true, ""),
      magic("sdc", { ...larger, hardware: "serial 2" }),
      magic("sdd"),
    ],
    members: ["sda2", "sdb2"],
    job: "move sdd",
  },
  {
    name: "one of two is to move, and only another magic disk is there",
    devices: [
      ...leaving("move", true, "serial 1"),
      magic("sdc", { ...larger, hardware: "serial 2" }),
    ],
    members: ["sda2", "sdb2"],
    job: "settle",
  },
  {
    name: "one of two is to move, and nothing tells to which of two disks",
    devices: [...leaving("move", true, ""), magic("sdc"), magic("sdd", larger)],
    members: ["sda2", "sdb2"],
    job: "settle",
  },
  {
    name: "a single disk is to move to a magic disk",
    devices: [
      data("sdb", { record: record("b", 5, ["b"], {}, told("move")) }),
      magic("sdc"),
    ],
    members: ["sdb2"],
    job: "move sdc",
  },
  {
    name: "one has left",
    devices: [stays, gone],
    members: ["sda2"],
    leaver: "sdb2",
    job: "free sdb2",
  },
  {
    name: "one has left, and only its record shows it",
    devices: [stays, without(gone, "btrfs")],
    members: ["sda2"],
    leaver: "sdb2",
    job: "free sdb2",
  },
  {
    name: "one has left, and was used elsewhere since",
    devices: [stays, withRecord({ mounts: ["m", "elsewhere"] })],
    members: ["sda2"],
    job: "forget",
  },
  {
    name: "one has left, and was written once elsewhere since",
    devices: [
      stays,
      data("sdb", {
        ...two,
        devid: 2,
        generation: 11,
        record: record("b", 5, ["a", "b"], {}, told("remove")),
      }),
    ],
    members: ["sda2"],
    job: "forget",
  },
  {
    name: "one is out, and misses what was written since",
    devices: [
      data("sda", {
        ...two,
        generation: 20,
        record: record("a", 6, ["a"], { b: 10 }, {
          ...told("remove", { mounts: ["m", "n"] }),
          lastSeen: { b: "m" },
        }),
      }),
      gone,
    ],
    missing: [2],
    members: ["sda2"],
    leaver: "sdb2",
    job: "remove",
  },
  {
    name: "one has left, and a copy of it is there as well",
    devices: [stays, gone, renamed(gone, "sdb", "sdc")],
    members: ["sda2"],
    job: "forget",
  },
  {
    name: "one has left, and a copy of it on other hardware is there",
    devices: [
      stays,
      withRecord({ hardware: "serial 1" })
        .map((device) => ({ ...device, hardware: "serial 2" })),
    ],
    members: ["sda2"],
    job: "forget",
  },
  {
    name: "one has left, and is not there",
    devices: [stays],
    members: ["sda2"],
    job: "forget",
  },
  {
    name: "one has left, and another of the two is missing later",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 9, ["a"], {}, {
          mounts: ["m"],
          leaving: { member: "b", how: "left" },
        }),
      }),
    ],
    missing: [2],
    members: ["sda2"],
    absent: 1,
  },
  {
    name: "one has left, was not there, and comes back",
    devices: [
      data("sda", {
        open: true,
        generation: 20,
        record: record("a", 6, ["a"], {}, {
          mounts: ["m", "n"],
          leaving: { member: "b", how: "left" },
        }),
      }),
      gone,
    ],
    members: ["sda2"],
    leaver: "sdb2",
    job: "free sdb2",
  },
  {
    name: "one has left, and its record is another filesystem's",
    devices: [
      stays,
      draws(without(gone, "btrfs"), 2, {
        record: { ...record("b", 5, ["b"], {}, told("remove")), fsid: "other" },
      }),
    ],
    members: ["sda2"],
    job: "forget",
  },
  {
    name: "one has moved: the other has its devid",
    devices: [
      data("sdb", {
        open: true,
        generation: 12,
        record: record(
          "c",
          6,
          ["b", "c"],
          {},
          told("move", { mounts: ["m", "n"] }),
        ),
      }),
      data("sda", {
        generation: 11,
        record: record(
          "b",
          6,
          ["b", "c"],
          {},
          told("move", { mounts: ["m", "n"] }),
        ),
      }),
    ],
    members: ["sdb2"],
    leaver: "sda2",
    job: "free sda2",
  },
  {
    name: "one of three leaves, the power went when two knew of it",
    devices: [
      data("sda", {
        ...two,
        generation: 11,
        record: record("a", 5, abc, {}, told("remove")),
      }),
      data("sdb", {
        ...three,
        devid: 2,
        record: record("b", 5, abc, {}, told("remove")),
      }),
      data("sdc", {
        ...two,
        devid: 3,
        generation: 11,
        record: record("c", 5, abc, {}, told("remove")),
      }),
    ],
    members: ["sda2", "sdc2"],
    leaver: "sdb2",
    job: "free sdb2",
  },
  {
    name: "one of three is to leave",
    devices: [
      data("sda", {
        ...three,
        record: record("a", 5, abc, {}, told("remove")),
      }),
      data("sdb", {
        ...three,
        devid: 2,
        record: record("b", 5, abc, {}, told("remove")),
      }),
      data("sdc", {
        ...three,
        devid: 3,
        record: record("c", 5, abc, {}, told("remove")),
      }),
    ],
    members: ["sda2", "sdb2", "sdc2"],
    job: "remove sdb2",
  },
];

for (const leaver of leavers) {
  const { name, devices, facts, missing = [], members, ...expected } = leaver;
  Deno.test(`decide() who leaves: ${name}`, () => {
    const decided = plan(devices, { facts });
    const { data } = decided;
    const job = decideJob(
      decided,
      {
        ...whole,
        missing,
        devids: [1, 2, 3].slice(0, members.length + missing.length),
      },
      { scrub: false, "remove missing": false },
    );
    assertEquals({
      members: data?.members.map((member) => member.name),
      leaver: data?.leaver?.name,
      absent: data?.absent,
      job: job && [job.kind, job.device?.name].filter(Boolean).join(" "),
    }, { leaver: undefined, absent: 0, job: undefined, members, ...expected });
    // What is to be wiped is not said to be left alone, nor to be plugged in.
    const denied = decided.notes.map(({ text }) => text)
      .filter((text) => leaver.leaver && /not touched|plug/.test(text));
    assertEquals(denied, []);
  });
}

const used = { data: 10 * GiB, metadata: GiB };
const held: [name: string, sizes: number[], why: RegExp | undefined][] = [
  ["one with room", [20 * GiB], undefined],
  [
    "one with too little room",
    [15 * GiB],
    /^12288 MiB are used, with 3136 MiB/,
  ],
  ["two with room", [20 * GiB, 20 * GiB], undefined],
  [
    "two, one of which is too small",
    [20 * GiB, 10 * GiB],
    /10240 MiB are used/,
  ],
  [
    "two, one of which has no room for chunks",
    [20 * GiB, GiB],
    /chunk of each/,
  ],
];
for (const [name, sizes, why] of held) {
  Deno.test(`whyNotHeld(): ${name}`, () => {
    const found = whyNotHeld(plan(pair).data!, used, sizes);
    if (why) assertMatch(found ?? "", why);
    else assertEquals(found, undefined);
  });
}

Deno.test("leastBytes() is the smallest size that would do", () => {
  const fits = (bytes: number) => whyNotHeld(plan(pair).data!, used, [bytes]);
  const least = leastBytes(fits);
  assertEquals(fits(least), undefined);
  assertMatch(fits(least - MiB) ?? "", /are used/);
});

const balances: {
  name: string;
  devices: number;
  missing?: number[];
  /** Profiles of data, metadata and system chunks. */
  profiles: [string, string, string];
  filters: string[];
  /** By default nothing is settled. */
  settled?: MemberRecord["settled"];
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
    name: "one profile that a person chose: all stay",
    devices: 2,
    profiles: ["single", "raid1", "raid10"],
    filters: [],
  },
  {
    name:
      "one of three is missing: what has two copies on one disk is mirrored",
    devices: 3,
    missing: [3],
    profiles: ["raid1", "dup", "raid1"],
    filters: ["-mprofiles=dup,convert=raid1,soft"],
  },
  {
    name: "profiles that a person chose stay",
    devices: 4,
    profiles: ["raid10", "raid10", "raid10"],
    filters: [],
  },
  {
    name: "settled: a person's single and dup stay",
    devices: 2,
    settled: { devices: 2, unmirrored: [] },
    profiles: ["single", "dup", "dup"],
    filters: [],
  },
  {
    name: "settled: a mirror gets what has none beside it",
    devices: 2,
    settled: { devices: 2, unmirrored: [] },
    profiles: ["single+raid1", "raid1", "single"],
    filters: [
      "-mprofiles=single,convert=raid1,soft",
      "-dprofiles=single,convert=raid1,soft",
    ],
  },
  {
    name: "settled: fewer copies than ours stay, what has fewer gets them",
    devices: 3,
    settled: { devices: 3, unmirrored: [] },
    profiles: ["raid1c3+raid1", "raid1", "raid1"],
    filters: ["-dprofiles=raid1,convert=raid1c3,soft"],
  },
  {
    name: "a person's single stays beside metadata that are to be mirrored",
    devices: 2,
    settled: { devices: 0, unmirrored: ["data"] },
    profiles: ["single", "dup", "dup"],
    filters: ["-mprofiles=dup,convert=raid1,soft"],
  },
  {
    name: "a person's mirror was half converted while it is kept single",
    devices: 2,
    settled: { devices: 2, unmirrored: ["data"] },
    profiles: ["single+raid1", "raid1", "raid1"],
    filters: ["-dprofiles=single,convert=raid1,soft"],
  },
  {
    name:
      "settled, one of three is missing: no more copies than there are disks",
    devices: 3,
    missing: [3],
    settled: { devices: 3, unmirrored: [] },
    profiles: ["raid1", "raid1c3+raid1+single", "raid1c3"],
    filters: ["-mprofiles=single,convert=raid1,soft"],
  },
];

for (const { name, devices, missing = [], filters, ...given } of balances) {
  Deno.test(`balanceFilters(): ${name}`, () => {
    const { profiles, settled } = given;
    const [data, metadata, system] = profiles.map((all) => all.split("+"));
    const devids = Array.from({ length: devices }, (_, index) => index + 1);
    const state = { ...whole, devids, missing };
    assertEquals(
      balanceFilters(
        { ...state, profiles: { data, metadata, system } },
        settled,
      ),
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
    {
      root: "/",
      waitMs: 0,
      off: false,
      required: false,
      noSwap: false,
      ...settings,
    },
  );
}

/** All orders of up to five; of more, this and the opposite. */
function ordersOf<T>(list: T[]): T[][] {
  if (list.length > 5) return [list, list.toReversed()];
  if (list.length < 2) return [list];
  return list.flatMap((first, i) =>
    ordersOf(list.toSpliced(i, 1)).map((others) => [first, ...others])
  );
}

function expected(decides: Partial<Decision>): Decision {
  const all = { ...nothing, ...decides };
  const absent = all.missing - all.stale.length - all.target.length;
  return { absent, ...all };
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
    absent: data?.absent ?? 0,
    stale: names(data?.stale),
    excluded: names(data?.conflicting),
    target: names([data?.replaceTarget]),
    join: newNames(joins),
    disarm: repaired("clear magic"),
    grow: repaired("grow"),
    repair: repaired("restore table"),
    swap: names(swap),
    shows: repaired("show partitions"),
    makesSwap: repaired("make swap"),
    waits: plan.waitFor !== undefined,
    scrub: data?.needsScrub ?? false,
    errors: notes.filter(({ level }) => level === "error").length,
  };
}

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

const profiles: [devices: number, data: string, metadata: string][] = [
  [1, "single", "dup"],
  [2, "raid1", "raid1"],
  [3, "raid1", "raid1c3"],
  [4, "raid1", "raid1c4"],
  [5, "raid1", "raid1c4"],
];
for (const [devices, dataProfile, metadataProfile] of profiles) {
  Deno.test(`profilesFor(${devices})`, () => {
    assertEquals(profilesFor(devices), { dataProfile, metadataProfile });
  });
}

const layouts: {
  name: string;
  of: Partial<BlockDevice>;
  memoryBytes?: number;
  noSwap?: boolean;
  swapMiB: number;
  dataMiB: number;
  paths: (string | undefined)[];
}[] = [
  {
    name: "swap as large as the memory",
    of: {},
    swapMiB: 2048,
    dataMiB: 100 * 1024 - 2048 - 2,
    paths: ["/dev/sda1", "/dev/sda2"],
  },
  {
    name: "swap of at most 4 GiB",
    of: {},
    memoryBytes: 64 * GiB,
    swapMiB: 4096,
    dataMiB: 100 * 1024 - 4096 - 2,
    paths: ["/dev/sda1", "/dev/sda2"],
  },
  {
    name: "swap of at most an eighth of the disk, whole mebibytes",
    of: { sizeBytes: 2 * GiB + 4 * MiB },
    swapMiB: 256,
    dataMiB: 2048 + 4 - 256 - 2,
    paths: ["/dev/sda1", "/dev/sda2"],
  },
  {
    name: "swap on the smallest disk that gets it",
    of: { sizeBytes: 2 * GiB },
    swapMiB: 256,
    dataMiB: 2048 - 256 - 2,
    paths: ["/dev/sda1", "/dev/sda2"],
  },
  {
    name: "no swap on a disk that is smaller by a sector",
    of: { sizeBytes: 2 * GiB - 512 },
    swapMiB: 0,
    dataMiB: 2048 - 2,
    paths: [undefined, "/dev/sda1"],
  },
  {
    name: "no swap where none is wanted",
    of: { sizeBytes: 2 * GiB },
    noSwap: true,
    swapMiB: 0,
    dataMiB: 2048 - 2,
    paths: [undefined, "/dev/sda1"],
  },
  {
    name: "the backup table just fits behind a whole mebibyte",
    of: { sizeBytes: 500 * MiB + 33 * 512 },
    swapMiB: 0,
    dataMiB: 499,
    paths: [undefined, "/dev/sda1"],
  },
  {
    name: "the backup table lacks a sector behind a whole mebibyte",
    of: { sizeBytes: 500 * MiB + 32 * 512 },
    swapMiB: 0,
    dataMiB: 498,
    paths: [undefined, "/dev/sda1"],
  },
  {
    name: "a magic partition is used as it is",
    of: { kind: "partition", path: "/dev/sda7", sizeBytes: 10 * GiB + 512 },
    swapMiB: 0,
    dataMiB: 10 * 1024 + 512 / MiB,
    paths: [undefined, "/dev/sda7"],
  },
];
for (const { name, of, swapMiB, dataMiB, paths, ...other } of layouts) {
  const { memoryBytes = 2 * GiB, noSwap = false } = other;
  Deno.test(`layOut(): ${name}`, () => {
    const member = layOut(device("sda", of), memoryBytes, noSwap);
    assertEquals(
      [member.swapBytes, member.dataBytes, member.swapPath, member.dataPath],
      [swapMiB * MiB, dataMiB * MiB, ...paths],
    );
  });
}

const descriptions: {
  name: string;
  devices: BlockDevice[][];
  lines: RegExp[];
}[] = [
  {
    name: "nothing to do",
    devices: [],
    lines: [/^volatile: no disk/, /^mount a tmpfs on \/mnt\/lightwhale-data$/],
  },
  {
    name: "a magic disk and a magic partition",
    devices: [magic("sda"), magicPartition("sdb")],
    lines: [
      /^persistent: /,
      /^partition \/dev\/sda \(102400 MiB\): swap of 2048 MiB on \/dev\/sda1, data on \/dev\/sda2$/,
      /^format \/dev\/sdb2 \(101374 MiB\)$/,
      /^create "lightwhale-data" on \/dev\/sda2, \/dev\/sdb2: data raid1, metadata raid1$/,
    ],
  },
  {
    name: "a magic disk without room for swap",
    devices: [magic("sda", { sizeBytes: GiB })],
    lines: [
      /^persistent: /,
      /^partition \/dev\/sda \(1024 MiB\): data on \/dev\/sda1$/,
      /^create .* on \/dev\/sda1: data single, metadata dup$/,
    ],
  },
  {
    name: "both halves",
    devices: pair,
    lines: [
      /^persistent: /,
      /^mount "lightwhale-data" \(data\) from \/dev\/sda2, \/dev\/sdb2$/,
    ],
  },
  {
    name: "a stale member, a magic disk, a disk that grew, a header",
    devices: [
      data("sda", {
        ...two,
        generation: 12,
        record: record("a", 6, ["a"], { b: 10 }),
        disk: { sizeBytes: 2 * diskBytes, header: true },
      }),
      second,
      magic("sdc"),
    ],
    lines: [
      /^persistent: /,
      /^grow \/dev\/sda2 to the end of its disk$/,
      /^take the magic away from \/dev\/sda$/,
      /^mount .* from \/dev\/sda2, degraded: 1 missing$/,
      /^wipe \/dev\/sdb2, which missed writes, and rebuild it$/,
      /^let \/dev\/sdc join the data filesystem$/,
    ],
  },
  {
    name: "a missing member, two magic disks",
    devices: [
      data("sda", {
        ...two,
        record: record("a", 6, ["a"], { b: 10 }),
      }),
      magic("sdb", { sizeBytes: 2 * diskBytes }),
      magic("sdc"),
    ],
    lines: [
      /^persistent: /,
      /^mount .* from \/dev\/sda2, degraded: 1 missing$/,
      /^let \/dev\/sdb take the place of a missing device$/,
      /^let \/dev\/sdc join the data filesystem$/,
    ],
  },
  {
    name: "a move to one of two magic disks",
    devices: [
      ...leaving("move", false, "serial 1"),
      magic("sdc", { hardware: "serial 1" }),
      magic("sdd", larger),
    ],
    lines: [
      /^persistent: /,
      /^mount .* from \/dev\/sda2, \/dev\/sdb2$/,
      /^move the data from \/dev\/sdb2 to \/dev\/sdc$/,
      /^let \/dev\/sdd join the data filesystem$/,
    ],
  },
  {
    name: "the removal of one of two, and a magic disk",
    devices: [...leaving("remove"), magic("sdc")],
    lines: [
      /^persistent: /,
      /^mount .* from \/dev\/sda2, degraded: 1 missing$/,
      /^leave \/dev\/sdb2 out, make \/dev\/sda2 hold all, then wipe \/dev\/sdb2$/,
      /^let \/dev\/sdc join the data filesystem$/,
    ],
  },
  {
    name: "the removal of one of three",
    devices: ["a", "b", "c"].map((name, i) =>
      data(`sd${name}`, {
        devid: i + 1,
        of: 3,
        record: record(name, 5, ["a", "b", "c"], {}, told("remove")),
      })
    ),
    lines: [
      /^persistent: /,
      /^mount .* from \/dev\/sda2, \/dev\/sdb2, \/dev\/sdc2$/,
      /^remove \/dev\/sdb2 from the data filesystem$/,
    ],
  },
  {
    name: "one of two magic disks is too small",
    devices: [magic("sda"), magic("sdb", { sizeBytes: 64 * MiB })],
    lines: [/^persistent: /, /^partition \/dev\/sda /, /^create /],
  },
  {
    name: "a data disk that cannot be used",
    devices: [data("sda", { intact: false })],
    lines: [
      /^fallback: a data disk may be damaged$/,
      /^mount a tmpfs on \/mnt\/lightwhale-data$/,
    ],
  },
  {
    name: "a magic disk and a magic partition that hold something",
    devices: [
      magic("sda", {
        signatures: [{ type: "ext4", label: "old" }, { type: "dos" }],
      }),
      draws(magicPartition("sdb"), 2, { signatures: [{ type: "xfs" }] }),
    ],
    lines: [
      /^persistent: /,
      /^partition \/dev\/sda \(102400 MiB, which holds ext4 "old", dos\): swap/,
      /^format \/dev\/sdb2 \(101374 MiB, which holds xfs\)$/,
      /^create /,
    ],
  },
  {
    name: "a lost first sector, hidden partitions, and no swap",
    devices: [
      data("sda", { lost: "first sector", swap: { signatures: [] } })
        .map((part, i, [whole]) =>
          i === 2 ? { ...part, entry: whole.read.gpt!.partitions[1] } : part
        ),
    ],
    lines: [
      /^persistent: /,
      /^restore the first sector of \/dev\/sda from its partition table$/,
      /^show the partitions of \/dev\/sda to the kernel$/,
      /^make swap on \/dev\/sda1$/,
      /^mount /,
    ],
  },
  {
    name: "a damaged table",
    devices: [data("sda", { lost: "primary table" })],
    lines: [
      /^persistent: /,
      /^restore the primary table of \/dev\/sda from its partition table$/,
      /^mount /,
    ],
  },
];
for (const { name, devices, lines } of descriptions) {
  Deno.test(`describePlan(): ${name}`, () => {
    const found = [...describePlan(plan(devices))];
    assertEquals(found.length, lines.length, found.join("\n"));
    for (const [i, line] of lines.entries()) assertMatch(found[i], line);
  });
}

Deno.test("describePlan(): what is off, and what is mounted already", () => {
  const off = [...describePlan(plan(pair, { settings: { off: true } }))];
  assertEquals(off.length, 2);
  assertMatch(off[1], /^mount a tmpfs on/);
  const again = [
    ...describePlan(
      plan([data("sda", { open: true })], { facts: { mounted } }),
    ),
  ];
  assertEquals(again.length, 1);
  assertMatch(again[0], /^mounted: /);
});

const mistakes: [line: string, why: RegExp][] = [
  ["--move", /needs OLD and NEW/],
  ["--move /dev/sda", /needs OLD and NEW/],
  ["--move /dev/sda /dev/sdb /dev/sdc", /Unexpected argument "\/dev\/sdc"/],
  ["--remove", /needs a DEVICE/],
  ["--remove /dev/sda /dev/sdb", /Unexpected argument "\/dev\/sdb"/],
  ["--remove --cancel /dev/sda", /Unexpected argument "\/dev\/sda"/],
  ["--remove --force /dev/sda", /--force goes with/],
  ["--move --cancel --force", /--force and --cancel exclude/],
  ["--enable --cancel /dev/sda", /--cancel goes with/],
  ["--cancel", /--cancel goes with/],
  ["--now", /--now goes with/],
  ["--move --now /dev/sda /dev/sdb", /--now goes with/],
  ["--move --remove /dev/sda", /exclude each other/],
];
for (const [line, why] of mistakes) {
  Deno.test(`parseCommandLine(): ${line}`, () => {
    const error = assertThrows(() => parseCommandLine(line.split(" ")), Error);
    assertMatch(error.message, why);
  });
}

for (const line of ["--move --cancel", "--remove --cancel", "--move a b"]) {
  Deno.test(`parseCommandLine(): ${line}`, () => {
    parseCommandLine(line.split(" "));
  });
}

// Payloads

const payload = (sum: number, problem?: string): FoundPayload => ({
  path: "/dev/sda",
  atBytes: 0,
  place: "original",
  writes: ["etc/hostname", "password op"],
  sum,
  problem,
});

/** Disks, what is made of them, and what is said. */
const payloads: Record<
  string,
  {
    devices: BlockDevice[][];
    create?: string[];
    sum?: number;
    join?: string[];
    says?: RegExp;
    level?: string;
  }
> = {
  "one disk": {
    devices: [magic("sda", { payload: payload(1) })],
    create: ["sda"],
    sum: 1,
  },
  "the second of two": {
    devices: [magic("sda"), magic("sdb", { payload: payload(2) })],
    create: ["sda", "sdb"],
    sum: 2,
  },
  "the same on both": {
    devices: [
      magic("sda", { payload: payload(3) }),
      magic("sdb", { payload: payload(3) }),
    ],
    create: ["sda", "sdb"],
    sum: 3,
  },
  "two that differ": {
    devices: [
      magic("sda", { payload: payload(1) }),
      magic("sdb", { payload: payload(2) }),
    ],
    says: /^Cannot format .*: the payloads of \/dev\/sda, \/dev\/sdb are not/,
    level: "error",
  },
  "one that is bad beside one that is none": {
    devices: [magic("sda"), magic("sdb", { payload: payload(0, "line 7: x") })],
    says: /the payload of \/dev\/sdb cannot be used: line 7: x; write it anew/,
    level: "error",
  },
  "one on a disk that is too small": {
    devices: [
      magic("sda"),
      magic("sdb", { sizeBytes: 50 * MiB, payload: payload(1) }),
    ],
    says: /\/dev\/sdb, which has a payload for it, cannot be used/,
    level: "error",
  },
  "one on a disk that waits for another to be repaired": {
    devices: [
      magic("sda", { anyway: true }),
      magic("sdb", { payload: payload(1) }),
      data("sdc", { intact: false }),
    ],
    says: /\/dev\/sdb, which has a payload for it, cannot be used/,
    level: "error",
  },
  "one on a disk that joins": {
    devices: [data("sda"), magic("sdb", { payload: payload(1) })],
    join: ["sdb"],
    says: /^\/dev\/sdb joins .* its payload is erased, and not applied$/,
    level: "warning",
  },
  "a bad one on a disk that joins": {
    devices: [data("sda"), magic("sdb", { payload: payload(1, "line 3: x") })],
    join: ["sdb"],
    says: /^\/dev\/sdb joins .* its payload is erased, and not applied$/,
    level: "warning",
  },
};

for (const [what, expected] of Object.entries(payloads)) {
  Deno.test(`decide(): a payload: ${what}`, () => {
    const { create, joins, notes } = plan(expected.devices);
    const names = create?.members.map(({ device }) => device.name) ?? [];
    assertEquals(names, expected.create ?? []);
    assertEquals(create?.payload?.sum, expected.sum);
    assertEquals(joins.map(({ device }) => device.name), expected.join ?? []);
    const { says, level } = expected;
    if (says) {
      const levels = notes.filter(({ text }) => says.test(text))
        .map((note) => note.level);
      assertEquals(levels, [level]);
    } else assertEquals(notes, []);
  });
}

Deno.test("describePlan(): a payload, by what it writes", () => {
  const lines = [
    ...describePlan(plan([magic("sda", { payload: payload(1) })])),
  ];
  assertMatch(
    lines.at(-1)!,
    /^write the payload of \/dev\/sda: etc\/hostname, password op$/,
  );
});
