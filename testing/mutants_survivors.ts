/**
 * Mutants that no pure test can catch (see mutants.ts), and why. A mutant is
 * named by its function and the text of its change, so that lines may move.
 *
 * @module
 */

/** A mutant that may survive. */
interface Survivor {
  where: string;
  /** As mutants.ts prints it; without it, all that are in that place. */
  change?: string;
  why: string;
}

/** Places on a device: only the functions that read devices use them. */
const onDevice = "the tests with real disks fail (persistence_test.ts)";

export const survivors: Survivor[] = [
  ...["65", "63"].map((n) => ({
    where: "BTRFS",
    change: `backupAt: 64 * MiB -> backupAt: ${n} * MiB`,
    why: onDevice,
  })),
  ...["61", "59"].map((place) => ({
    where: "RECORD",
    change: "slotsAt: [56 * KiB, 60 * KiB] -> " +
      `slotsAt: [56 * KiB, ${place} * KiB]`,
    why: "both slots are read at once; of the place written to, " + onDevice,
  })),
  ...["17", "15"].map((n) => ({
    where: "RECORD",
    change: `remembered: 16 -> remembered: ${n}`,
    why: "only recordMembers() and absentSince() use it, which write",
  })),
  ...["13", "11"].map((n) => ({
    where: "MBR",
    change: `sectors: 12 -> sectors: ${n}`,
    why: onDevice,
  })),
  {
    where: "crc32c",
    change: "{ length: 256 } -> { length: 257 }",
    why: "an index is a byte",
  },
  {
    where: "isZero",
    change: "!bytes[0] && Buffer.compare(bytes.subarray(1), " +
      "bytes.subarray(0, -1)) === 0 -> !bytes[1] && " +
      "Buffer.compare(bytes.subarray(1), bytes.subarray(0, -1)) === 0",
    why: "where all bytes are the same, any of them will do",
  },
  ...["1", "(-1)"].map((seconds) => ({
    where: "parseSlot",
    change: '{ machine = "", hardware = "", seconds = 0 } -> ' +
      `{ machine = "", hardware = "", seconds = ${seconds} }`,
    why: "only the kind of a default is asked for",
  })),
  {
    where: "byName",
    change: "a.name < b.name ? -1 : 1 -> a.name <= b.name ? -1 : 1",
    why: "no two devices have the same name",
  },
  {
    where: "parseMountinfo",
    change: 'separator = fields.indexOf("-", 6) -> ' +
      'separator = fields.indexOf("-", 5)',
    why: "mount options are never a dash",
  },
  ...["<= 0", "< 1"].map((other) => ({
    where: "parseMountinfo",
    change: `separator < 0 || !superOptions -> separator ${other} || ` +
      "!superOptions",
    why: "the separator is looked for behind the sixth field",
  })),
  {
    where: "machineRank",
    change: "record.machine === machine ? 2 : 0 -> " +
      "record.machine === machine ? 2 : (-1)",
    why: "ranks are only compared",
  },
  {
    where: "chooseDataFilesystem",
    change: "owner(data) === 2 ? most(data, secondsOf) : 0 -> " +
      "owner(data) === 2 ? most(data, secondsOf) : 1",
    why: "only filesystems of one owner are compared by it",
  },
  {
    where: "whyNotUsed",
    change: "missing > 0 && members.some(isOpen) -> " +
      "missing > 0 && members.every(isOpen)",
    why: "where one is open, only those that are open are members",
  },
  ...["1", "(-1)"].map((n) => ({
    where: "releaseTarget",
    change: "{ device, swapBytes: 0, dataPath, dataBytes } -> " +
      `{ device, swapBytes: ${n}, dataPath, dataBytes }`,
    why: "nothing but the paths is used of a target that is there",
  })),
  {
    where: "rebuildStale",
    change: 'device.kind === "partition" -> device.kind !== "partition"',
    why: "only the work itself, on real disks, asks for it",
  },
  {
    where: "chooseDataFilesystem",
    change: "a.fsid < b.fsid ? -1 : 1 -> a.fsid <= b.fsid ? -1 : 1",
    why: "no two filesystems have the same UUID",
  },
];
