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

/** What this does is done again behind it. */
const quicker = "it only saves time";

/** Where a list could be in another order, it is of equal things. */
const equals = "what is equal in this is equal in all that is asked of it";

export const survivors: Survivor[] = [
  ...["65", "63"].flatMap((n) => [
    {
      where: "BTRFS",
      change: `superblockAt: 64 * KiB -> superblockAt: ${n} * KiB`,
      why: onDevice,
    },
    {
      where: "BTRFS",
      change: `backupAt: 64 * MiB -> backupAt: ${n} * MiB`,
      why: onDevice,
    },
  ]),
  ...["17", "15"].map((n) => ({
    where: "GPT",
    change: `entriesArea: 16 * KiB -> entriesArea: ${n} * KiB`,
    why: "sizes are rounded to a mebibyte; of the places, " + onDevice,
  })),
  ...["57 * KiB, 60", "55 * KiB, 60", "56 * KiB, 61", "56 * KiB, 59"].map(
    (places) => ({
      where: "MARK",
      change: `slotsAt: [56 * KiB, 60 * KiB] -> slotsAt: [${places} * KiB]`,
      why: onDevice,
    }),
  ),
  {
    where: "crc",
    change: "crcTables.get(polynomial) ?? makeCrcTable(polynomial) -> " +
      "makeCrcTable(polynomial)",
    why: quicker,
  },
  {
    where: "makeCrcTable",
    change: "byte < 256 -> byte <= 256",
    why: "a table of 256 takes no more",
  },
  {
    where: "makeCrcTable",
    change: "byte < 256 -> byte < 257",
    why: "a table of 256 takes no more",
  },
  {
    where: "parseMarkSlot",
    change: "title !== MARK.title || !json -> title !== MARK.title",
    why: "JSON.parse() refuses it",
  },
  {
    where: "parseMarkSlot",
    change: 'typeof fsid === "string" && typeof member === "string" && ' +
      "Number.isSafeInteger(epoch) && Array.isArray(present) -> " +
      'typeof fsid === "string" && typeof member === "string" && ' +
      "Number.isSafeInteger(epoch)",
    why: "what is no list has no every(): that is caught",
  },
  {
    where: "parseMarkSlot",
    change: 'typeof fsid === "string" && typeof member === "string" && ' +
      "Number.isSafeInteger(epoch) && Array.isArray(present) && " +
      'present.every((id: unknown) => typeof id === "string") && ' +
      'typeof absent === "object" && absent !== null -> ' +
      'typeof fsid === "string" && typeof member === "string" && ' +
      "Number.isSafeInteger(epoch) && Array.isArray(present) && " +
      'present.every((id: unknown) => typeof id === "string") && ' +
      'typeof absent === "object"',
    why: "Object.values() refuses null: that is caught",
  },
  ...["1", "(-1)"].flatMap((other) => [
    {
      where: "generationOf",
      change: "device.btrfs?.generation ?? 0 -> " +
        `device.btrfs?.generation ?? ${other}`,
      why: "only devices with a superblock are asked for",
    },
    {
      where: "devidOf",
      change: `device.btrfs?.devid ?? 0 -> device.btrfs?.devid ?? ${other}`,
      why: "only devices with a superblock are asked for",
    },
  ]),
  {
    where: "epochOf",
    change: "(device: BlockDevice) => device.mark?.epoch ?? 0 -> " +
      "(device: BlockDevice) => device.mark?.epoch ?? (-1)",
    why: "an epoch is at least 1",
  },
  {
    where: "partitionNumber",
    change: "if (!name.startsWith(disk)) return undefined; -> " +
      "if (false) return undefined;",
    why: "what the prefix begins with is asked for again",
  },
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
  {
    where: "unescapeOctal",
    change: 'if (!field.includes("\\\\")) return field; -> ' +
      "if (false) return field;",
    why: quicker,
  },
  {
    where: "parseSwapLabel",
    change: "if (page.length < 4 * KiB) return undefined; -> " +
      "if (page.length < 3 * KiB) return undefined;",
    why: "the signature is missing then",
  },
  ...["<= 0", "< 1"].map((other) => ({
    where: "parseMountinfo",
    change: `separator < 0 || !superOptions -> separator ${other} || ` +
      "!superOptions",
    why: "the separator is looked for behind the sixth field",
  })),
  {
    where: "parseKernelCommandLine",
    change: "if (end > 0) options.set(word.slice(0, end), " +
      "word.slice(end + 1)); -> if (end > (-1)) " +
      "options.set(word.slice(0, end), word.slice(end + 1));",
    why: "no option has an empty name",
  },
  {
    where: "wroteWithout",
    change: "mark.absent[other.mark.member] ?? -1 -> " +
      "mark.absent[other.mark.member] ?? -0",
    why: "a generation is at least 1",
  },
  {
    where: "newest",
    change: "generationOf(device) > generationOf(best) -> " +
      "generationOf(device) >= generationOf(best)",
    why: equals,
  },
  {
    where: "chooseDataFilesystem",
    change: "Math.max(0, ...data.members.map(epochOf)) -> " +
      "Math.max((-1), ...data.members.map(epochOf))",
    why: "one without members comes last before this is asked",
  },
  {
    where: "chooseDataFilesystem",
    change: "a.fsid < b.fsid ? -1 : 1 -> a.fsid <= b.fsid ? -1 : 1",
    why: "no two filesystems have the same UUID",
  },
  {
    where: "disksWithoutNodes",
    change: 'disk.kind === "disk" && devices.some((device) => ' +
      "!device.hasNode && device.disk === disk.name) -> " +
      "devices.some((device) => !device.hasNode && " +
      "device.disk === disk.name)",
    why: "only a whole disk has the name of a disk",
  },
  ...["!only", "!only || group.length === 0"]
    .map((other) => ({
      where: "withoutJoining",
      change: `!only || group.length === 1 -> ${other}`,
      why: "the only member of a filesystem of one is kept anyway",
    })),
  {
    where: "describeExcluded",
    change: "!same && missing > 0 && members.some(isOpen) -> " +
      "!same && missing > 0 && members.every(isOpen)",
    why: "where one is open, only those that are open are members",
  },
  {
    where: "countAbsent",
    why: "the boot waits by it: vm/boot_test.ts, when it is waited for",
  },
];
