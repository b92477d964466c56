/**
 * What a device holds, whether it is magic, and whether libblkid is to be asked
 * about it: tables of facts. No disk is touched, no root is needed.
 */
import { assertEquals, assertMatch } from "@std/assert";
import {
  type BlockDevice,
  DATA,
  type Holds,
  isInQuestion,
  isMagic,
  MAGIC,
  type Signature,
  SWAP,
  whatItHolds,
} from "../persistence.ts";
import {
  data,
  device,
  disk,
  diskBytes,
  draw,
  type Drawn,
  draws,
  GiB,
  magic,
  magicPartition,
  MiB,
  onlySwap,
  superblock,
  withHeader,
  without,
} from "./facts.ts";

const ours: Signature = { type: "btrfs", label: DATA };
const gpt: Signature = { type: "gpt" };
const protective: Signature = { type: "PMBR" };
const raid = (atBytes: number): Signature => ({
  type: "linux_raid_member",
  atBytes,
});
const open = { inUse: "part of the mounted Btrfs data" };
const noTable = { partitions: [], sectorBytes: 512, endBytes: diskBytes };

/** The data partition of a disk with these properties. */
const main = (properties: Parameters<typeof data>[1]) =>
  data("sda", properties);

/** A data partition that holds what libblkid says, and no Btrfs. */
const instead = (...signatures: Signature[]) =>
  draws(without(data("sda"), "btrfs"), 2, { signatures });

/** A data disk over whose first sector an MBR was written. */
const belowMbr = (partition: Drawn) => [
  ...disk("sda", {
    table: "mbr",
    hidden: superblock({}),
    signatures: [{ type: "dos" }, gpt],
  }),
  device("sda1", { kind: "partition", disk: "sda", number: 1, ...partition }),
];

const cases: {
  name: string;
  devices: BlockDevice[];
  /** Which of them; default: the first of this disk, or its data partition. */
  of?: string;
  holds: Holds["kind"];
  why?: RegExp;
  labelled?: boolean;
  fsid?: string;
  remedy?: RegExp;
}[] = [
  { name: "an empty disk", devices: disk("sda"), holds: "nothing of ours" },
  { name: "a header alone", devices: magic("sda"), holds: "nothing of ours" },
  {
    name: "what cannot be read",
    devices: disk("sda", { error: "Cannot read /dev/sda: EIO" }),
    holds: "unreadable",
    why: /^Cannot read \/dev\/sda: EIO$/,
  },
  {
    name: "what could be read by us but not by libblkid",
    devices: main({ main: { error: "Cannot see what is on it" } }),
    holds: "unreadable",
    why: /^Cannot see what is on it$/,
  },

  // Members
  { name: "a data partition", devices: main({}), holds: "member" },
  {
    name: "the whole disk above a data partition",
    devices: main({}),
    of: "sda",
    holds: "nothing of ours",
  },
  {
    name: "a Btrfs of a whole disk",
    devices: disk("sda", { btrfs: superblock({}) }),
    holds: "member",
  },
  {
    name: "a Btrfs of a volume",
    devices: [device("md0", { kind: "volume", btrfs: superblock({}) })],
    holds: "member",
  },
  {
    name: "a Btrfs that libblkid sees as well",
    devices: main({ main: { signatures: [ours] } }),
    holds: "member",
  },
  {
    name: "a Btrfs of another label on a whole disk",
    devices: disk("sda", { btrfs: superblock({ label: "other" }) }),
    holds: "member",
  },
  {
    name: "a Btrfs of ours in a partition of another name",
    devices: main({ names: [SWAP, "other"] }),
    holds: "member",
  },
  {
    name: "a Btrfs of another label in our partition",
    devices: main({
      label: "other",
      main: { signatures: [{ type: "btrfs" }] },
    }),
    holds: "suspect",
    why: /^it holds btrfs$/,
    labelled: false,
    fsid: "data",
  },
  {
    name: "an empty MBR above a Btrfs of a whole disk",
    devices: disk("sda", {
      btrfs: superblock({}),
      signatures: [ours, { type: "dos" }],
    }),
    holds: "suspect",
    why: /^it holds dos as well as a Btrfs$/,
    labelled: true,
    fsid: "data",
  },
  {
    name: "a member that fills its partition to the last byte",
    devices: draws(main({}), 2, { sizeBytes: diskBytes - GiB - 2 * MiB }),
    holds: "member",
  },
  {
    name: "a hybrid ISO image before a data partition",
    devices: main({
      disk: { signatures: [gpt, protective, { type: "iso9660" }] },
    }),
    holds: "member",
  },
  {
    name: "RAID metadata at the end of a data disk",
    devices: main({
      disk: { signatures: [gpt, raid(Number.MAX_SAFE_INTEGER)] },
    }),
    holds: "member",
  },
  {
    name: "RAID metadata at the start of a data disk",
    devices: main({ disk: { signatures: [gpt, raid(0)] } }),
    holds: "suspect",
    why: /sda, which it is a part of, holds linux_raid_member$/,
    labelled: true,
    fsid: "data",
  },
  {
    name: "a data disk that lost its first sector",
    devices: main({ lost: "first sector", disk: { signatures: [gpt] } }),
    holds: "member",
  },
  {
    name: "what the kernel has open, whatever else is there",
    devices: main({
      intact: false,
      main: { ...open, signatures: [ours, { type: "ext4" }] },
    }),
    holds: "member",
  },
  {
    name: "what the kernel has open, and was started over",
    devices: main({
      disk: { header: true, onlyHeader: true },
      main: open,
    }),
    holds: "member",
  },
  {
    name: "what is open as a part of another filesystem",
    devices: main({
      intact: false,
      main: { inUse: "part of the mounted Btrfs other" },
    }),
    holds: "suspect",
    why: /^its superblock is damaged$/,
    labelled: true,
    fsid: "data",
    remedy: /super-recover \/dev\/sda2" may repair/,
  },

  // Started over
  {
    name: "a data partition of a disk that was started over",
    devices: main({ disk: { header: true, onlyHeader: true } }),
    holds: "nothing of ours",
  },
  {
    name: "a data partition below a header with more behind it",
    devices: main({ disk: { header: true } }),
    holds: "member",
  },
  {
    name: "a whole Btrfs below a header and zeros",
    devices: magic("sda", { onlyHeader: true, btrfs: superblock({}) }),
    holds: "member",
  },
  {
    name: "a disk that was started over and cannot be read",
    devices: main({
      disk: { header: true, onlyHeader: true },
      main: { error: "Cannot read /dev/sda2" },
    }),
    holds: "unreadable",
    why: /sda2/,
  },

  // Damaged, smaller, or contradicted
  {
    name: "a damaged superblock",
    devices: main({ intact: false }),
    holds: "suspect",
    why: /^its superblock is damaged$/,
    labelled: true,
    fsid: "data",
    remedy: /^"btrfs rescue super-recover \/dev\/sda2" may repair it$/,
  },
  {
    name: "a seed of ours",
    devices: main({ main: { btrfs: superblock({ isSeed: true }) } }),
    holds: "suspect",
    why: /^it is a seed/,
    labelled: true,
    fsid: "data",
    remedy: /"btrfs device remove \/dev\/sda2"; else "btrfstune -S 0 -f/,
  },
  {
    name: "a seed of others",
    devices: disk("sda", {
      btrfs: superblock({ label: "other", isSeed: true }),
    }),
    holds: "member",
  },
  {
    name: "a damaged superblock of another label",
    devices: disk("sda", {
      btrfs: superblock({ label: "other", intact: false }),
    }),
    holds: "nothing of ours",
  },
  {
    name: "a damaged superblock that libblkid does not take for one",
    devices: main({ intact: false, main: { signatures: [] } }),
    holds: "suspect",
    why: /superblock is damaged/,
    labelled: true,
    fsid: "data",
    remedy: /super-recover/,
  },
  {
    name: "a damaged superblock that libblkid takes for one",
    devices: main({ intact: false, main: { signatures: [ours] } }),
    holds: "suspect",
    why: /^its superblock is damaged$/,
    labelled: true,
    fsid: "data",
    remedy: /super-recover/,
  },
  {
    name: "a member whose partition became smaller",
    devices: draws(main({}), 2, { sizeBytes: 90 * GiB }),
    holds: "suspect",
    why: /^it is 9214 MiB \(9661579264 bytes\) smaller than its filesystem$/,
    labelled: true,
    fsid: "data",
    remedy: /^give the disk its size again$/,
  },
  {
    name: "a Btrfs and ext4",
    devices: main({ main: { signatures: [ours, { type: "ext4" }] } }),
    holds: "suspect",
    why: /^it holds ext4 as well as a Btrfs$/,
    labelled: true,
    fsid: "data",
  },
  {
    name: "a Btrfs below an MBR",
    devices: disk("sda", { btrfs: superblock({}), table: "mbr" }),
    holds: "suspect",
    why: /^it holds a partition table \(mbr\) as well as a Btrfs$/,
    labelled: true,
    fsid: "data",
  },
  {
    name: "a Btrfs of another label below an MBR",
    devices: disk("sda", {
      btrfs: superblock({ label: "other" }),
      table: "mbr",
    }),
    holds: "nothing of ours",
  },
  {
    name: "a Btrfs below a GPT",
    devices: disk("sda", {
      btrfs: superblock({}),
      gpt: noTable,
      signatures: [gpt, protective, ours],
    }),
    holds: "suspect",
    why: /^it holds a partition table \(gpt\), btrfs "lightwhale-data" as well/,
    labelled: true,
    fsid: "data",
  },
  {
    name: "our partition below a filesystem of the whole disk",
    devices: main({ disk: { signatures: [gpt, { type: "xfs" }] } }),
    holds: "suspect",
    why: /^\/dev\/sda, which it is a part of, holds xfs$/,
    labelled: true,
    fsid: "data",
  },
  {
    name: "swap of ours below a filesystem of the whole disk",
    devices: main({
      swapLabel: SWAP,
      disk: { signatures: [gpt, { type: "xfs" }] },
    }),
    of: "sda1",
    holds: "swap",
  },
  {
    name: "our empty partition below a filesystem of the whole disk",
    devices: without(
      main({ disk: { signatures: [gpt, { type: "xfs" }] } }),
      "btrfs",
    ),
    holds: "suspect",
    why: /which it is a part of, holds xfs$/,
    labelled: false,
  },
  {
    name: "a partition of others below a filesystem of the whole disk",
    devices: main({
      label: "other",
      names: ["other", "other"],
      disk: { signatures: [gpt, { type: "xfs" }] },
    }),
    holds: "member",
  },
  {
    name: "a damaged table, and a hybrid ISO image",
    devices: main({
      lost: "primary table",
      disk: { signatures: [gpt, { type: "iso9660" }] },
    }),
    holds: "suspect",
    why: /^\/dev\/sda, .* holds iso9660, and its partition table is damaged$/,
    labelled: true,
    fsid: "data",
  },
  {
    name: "a damaged table, and RAID metadata",
    devices: main({
      lost: "first sector",
      disk: { signatures: [gpt, raid(Number.MAX_SAFE_INTEGER)] },
    }),
    holds: "suspect",
    why: /holds linux_raid_member, and its partition table is damaged$/,
    labelled: true,
    fsid: "data",
  },
  {
    name: "what only begins like a hybrid ISO image",
    devices: main({ disk: { signatures: [gpt, { type: "iso96600" }] } }),
    holds: "suspect",
    why: /holds iso96600$/,
    labelled: true,
    fsid: "data",
  },

  // Labels and names without a Btrfs
  {
    name: "ext4 with our label in our partition",
    devices: instead({ type: "ext4", label: DATA }),
    holds: "suspect",
    why: /^it holds ext4 "lightwhale-data"$/,
    labelled: true,
  },
  {
    name: "ext4 with our label in another partition",
    devices: draws(
      without(main({ names: ["other", "other"] }), "btrfs"),
      2,
      { signatures: [{ type: "ext4", label: DATA }] },
    ),
    holds: "suspect",
    why: /^it holds ext4 "lightwhale-data"$/,
    labelled: true,
  },
  {
    name: "ext4 with our label on a whole disk",
    devices: disk("sda", { signatures: [{ type: "ext4", label: DATA }] }),
    holds: "suspect",
    why: /^it holds ext4 "lightwhale-data"$/,
    labelled: true,
  },
  {
    name: "ext4 of others in our partition",
    devices: instead({ type: "ext4", label: "photos" }),
    holds: "suspect",
    why: /^it holds ext4 "photos"$/,
    labelled: false,
  },
  {
    name: "two things in our partition, one of them twice",
    devices: instead({ type: "ext4" }, { type: "swap" }, { type: "ext4" }),
    holds: "suspect",
    why: /^it holds ext4, swap$/,
    labelled: false,
  },
  {
    name: "a label with control characters in our partition",
    devices: instead({ type: "ext4", label: "\x1b[2J\n" }),
    holds: "suspect",
    why: /^it holds ext4 "\?\[2J\?"$/,
    labelled: false,
  },
  {
    name: "nothing in our partition",
    devices: instead(),
    holds: "suspect",
    why: /^it holds no filesystem$/,
    labelled: false,
  },
  {
    name: "data that nobody knows in our partition",
    devices: draws(instead(), 2, { plain: false }),
    holds: "suspect",
    why: /^it holds data of an unknown kind$/,
    labelled: false,
  },
  {
    name: "ext4 of others in a partition of others",
    devices: draws(
      without(main({ names: ["other", "other"] }), "btrfs"),
      2,
      { signatures: [{ type: "ext4" }] },
    ),
    holds: "nothing of ours",
  },
  {
    name: "a backup superblock of ours",
    devices: disk("sda", { backup: superblock({}) }),
    holds: "suspect",
    why: /^only a backup superblock is left$/,
    labelled: false,
    fsid: "data",
    remedy: /super-recover \/dev\/sda"/,
  },
  {
    name: "our data below an MBR that came back",
    devices: belowMbr({}),
    holds: "suspect",
    why: /^an MBR hides its GPT/,
    labelled: false,
    fsid: "data",
    remedy: /wipefs --all --types dos \/dev\/sda, reboot$/,
  },
  {
    name: "our data below an MBR whose partition begins where our swap does",
    devices: belowMbr({
      swapLabel: SWAP,
      signatures: [{ type: "swap", label: SWAP }],
    }),
    holds: "suspect",
    why: /^an MBR hides its GPT/,
    labelled: false,
    fsid: "data",
    remedy: /wipefs/,
  },
  {
    name: "our data below an MBR with ext4 in a partition",
    devices: belowMbr({ signatures: [{ type: "ext4" }] }),
    holds: "nothing of ours",
  },
  {
    name: "our data below an MBR with a Btrfs in a partition",
    devices: belowMbr({ btrfs: superblock({ label: "photos" }) }),
    holds: "nothing of ours",
  },
  {
    name: "our data below an MBR and what takes the whole disk",
    devices: draws(belowMbr({}), 0, {
      signatures: [{ type: "dos" }, { type: "linux_raid_member" }],
    }),
    holds: "nothing of ours",
  },
  {
    name: "a backup superblock of ours, and a filesystem of others",
    devices: disk("sda", {
      backup: superblock({}),
      signatures: [{ type: "ext4" }],
    }),
    holds: "nothing of ours",
  },
  {
    name: "a backup superblock of ours behind one that lost its label",
    devices: disk("sda", {
      backup: superblock({}),
      btrfs: superblock({ label: "", fsid: "damaged", intact: false }),
      signatures: [{ type: "btrfs" }],
    }),
    holds: "suspect",
    why: /^only a backup superblock is left$/,
    labelled: false,
    fsid: "data",
    remedy: /super-recover \/dev\/sda"/,
  },
  {
    name: "a backup superblock of ours behind a damaged one, and XFS",
    devices: disk("sda", {
      backup: superblock({}),
      btrfs: superblock({ label: "", intact: false }),
      signatures: [{ type: "btrfs" }, { type: "xfs" }],
    }),
    holds: "nothing of ours",
  },
  {
    name: "a backup superblock of others",
    devices: disk("sda", { backup: superblock({ label: "other" }) }),
    holds: "nothing of ours",
  },
  {
    name: "a backup superblock of ours in our partition",
    devices: draws(instead(), 2, { backup: superblock({}) }),
    holds: "suspect",
    why: /^only a backup superblock is left$/,
    labelled: false,
    fsid: "data",
    remedy: /super-recover \/dev\/sda2"/,
  },
  {
    name: "a backup superblock of others in our partition",
    devices: draws(instead(), 2, { backup: superblock({ label: "other" }) }),
    holds: "suspect",
    why: /^it holds no filesystem$/,
    labelled: false,
    fsid: "data",
  },

  // Swap
  {
    name: "swap of ours",
    devices: main({ swapLabel: SWAP }),
    of: "sda1",
    holds: "swap",
  },
  {
    name: "swap of ours on a whole disk",
    devices: disk("sda", { swapLabel: SWAP }),
    holds: "swap",
  },
  {
    name: "swap of others",
    devices: main({ swapLabel: "other" }),
    of: "sda1",
    holds: "nothing of ours",
  },
  {
    name: "swap of ours in our data partition",
    devices: draws(instead({ type: "swap", label: SWAP }), 2, {
      swapLabel: SWAP,
    }),
    holds: "suspect",
    why: /^it holds swap "lightwhale-swap"$/,
    labelled: false,
  },
  {
    name: "swap of ours over a damaged Btrfs of ours",
    devices: disk("sda", {
      swapLabel: SWAP,
      btrfs: superblock({ intact: false }),
    }),
    holds: "suspect",
    why: /superblock is damaged/,
    labelled: true,
    fsid: "data",
    remedy: /super-recover/,
  },
  {
    name: "swap of ours, and ext4 with our data label",
    devices: disk("sda", {
      swapLabel: SWAP,
      signatures: [{ type: "swap", label: SWAP }, {
        type: "ext4",
        label: DATA,
      }],
    }),
    holds: "suspect",
    why: /^it holds swap "lightwhale-swap", ext4 "lightwhale-data"$/,
    labelled: true,
  },
  {
    name: "an empty swap partition",
    devices: main({ swap: { signatures: [] } }),
    of: "sda1",
    holds: "nothing of ours",
  },
  {
    name: "a disk of which only our swap partition is left",
    devices: onlySwap(),
    of: "sda",
    holds: "suspect",
    why: /^it has a "lightwhale-swap" partition and no other$/,
    labelled: false,
  },
  {
    name: "a disk with our swap partition and another one",
    devices: main({ names: [SWAP, "other"] }),
    of: "sda",
    holds: "nothing of ours",
  },
  {
    name: "a disk without partitions in its table",
    devices: disk("sda", { gpt: noTable }),
    holds: "nothing of ours",
  },
];

for (const { name, devices, of, holds, ...more } of cases) {
  Deno.test(`whatItHolds(): ${name}`, () => {
    const found = whatItHolds(pick(devices, of), devices);
    const { why, labelled, fsid, remedy } = more;
    assertEquals(found.kind, holds, JSON.stringify(found));
    if (found.kind === "unreadable") assertMatch(found.why, why!);
    if (found.kind === "member") {
      const { btrfs, record } = pick(devices, of).read;
      assertEquals(found, { kind: "member", btrfs: btrfs!, record });
    }
    if (found.kind !== "suspect") return;
    assertMatch(found.why, why!);
    assertEquals([found.labelled, found.fsid], [labelled!, fsid]);
    if (remedy) assertMatch(found.remedy ?? "", remedy);
    else assertEquals(found.remedy, undefined);
  });
}

/** The one with this name, or else the data partition or the only one. */
function pick(devices: BlockDevice[], name?: string): BlockDevice {
  const found = name
    ? devices.find((device) => device.name === name)
    : devices.find(({ number }) => number === 2) ?? devices[0];
  return found!;
}

const volume = { kind: "volume" } as const;

/** What is magic of these, by name. */
const marks: { name: string; devices: BlockDevice[]; magic: string[] }[] = [
  { name: "an empty disk", devices: disk("sda"), magic: [] },
  {
    name: "a whole disk with the header",
    devices: magic("sda"),
    magic: ["sda"],
  },
  {
    name: "a volume with the header",
    devices: magic("md0", volume),
    magic: [],
  },
  {
    name: "a partition with the header",
    devices: draws(data("sda"), 2, { header: true }),
    magic: [],
  },
  {
    name: "a partition with the name",
    devices: magicPartition("sda"),
    magic: ["sda2"],
  },
  {
    name: "a partition with a longer name",
    devices: draws(data("sda"), 2, { partitionName: `${MAGIC} ` }),
    magic: [],
  },
  {
    name: "a partition with the name on a disk with the header",
    devices: withHeader(magicPartition("sda")),
    magic: ["sda", "sda2"],
  },
  {
    name: "a volume with the name",
    devices: [device("dm-0", { ...volume, partitionName: MAGIC })],
    magic: [],
  },
  {
    name: "a partition with the name of a disk that we have not read",
    devices: magicPartition("sda").slice(1),
    magic: ["sda2"],
  },
  {
    name: "a partition with the name below a filesystem of the whole disk",
    devices: magicPartition("sda", { signatures: [gpt, { type: "ext4" }] }),
    magic: ["sda2"],
  },
  {
    name: "a partition with the name of a disk that another has",
    devices: [
      ...disk("sdb", { gpt: noTable, signatures: [{ type: "ext4" }] }),
      ...magicPartition("sda"),
    ],
    magic: ["sda2"],
  },
  {
    name: "a partition with the name on a stick with an ISO image",
    devices: magicPartition("sda", {
      signatures: [gpt, protective, { type: "iso9660", label: "debian" }],
    }),
    magic: ["sda2"],
  },
];

for (const { name, devices, magic } of marks) {
  Deno.test(`isMagic(): ${name}`, () => {
    const found = devices.filter(isMagic);
    assertEquals(found.map((device) => device.name), magic);
  });
}

const questions: {
  name: string;
  devices: BlockDevice[];
  /** About which libblkid is asked. */
  asks: string[];
}[] = [
  { name: "an empty disk", devices: disk("sda"), asks: [] },
  { name: "a plain data disk", devices: data("sda"), asks: ["sda1"] },
  {
    name: "a plain data disk with swap",
    devices: data("sda", { swapLabel: SWAP }),
    asks: [],
  },
  {
    name: "a data disk with swap of another label",
    devices: data("sda", { swapLabel: "other" }),
    asks: ["sda1"],
  },
  {
    name: "a data disk with a header",
    devices: withHeader(data("sda", { swapLabel: SWAP })),
    asks: ["sda", "sda1", "sda2"],
  },
  { name: "a disk with a header", devices: magic("sda"), asks: ["sda"] },
  {
    name: "a data disk beside one with a header",
    devices: [...data("sda", { swapLabel: SWAP }), ...magic("sdb")],
    asks: ["sdb"],
  },
  {
    name: "a disk with a header that cannot be read now",
    devices: magic("sda", { error: "Cannot read /dev/sda" }),
    asks: [],
  },
  {
    name: "a data partition that cannot be read",
    devices: data("sda", { swapLabel: SWAP, main: { error: "EIO" } }),
    asks: [],
  },
  {
    name: "an open member on a disk with a header",
    devices: withHeader(data("sda", { swapLabel: SWAP, open: true })),
    asks: ["sda", "sda1"],
  },
  {
    name: "a magic partition",
    devices: magicPartition("sda"),
    asks: ["sda", "sda2"],
  },
  {
    name: "a damaged superblock",
    devices: data("sda", { swapLabel: SWAP, intact: false }),
    asks: ["sda2"],
  },
  {
    name: "a member with something beside the filesystem",
    devices: data("sda", { swapLabel: SWAP, main: { plain: false } }),
    asks: ["sda2"],
  },
  {
    name: "a Btrfs of others with something beside it",
    devices: disk("sda", {
      btrfs: superblock({ label: "other" }),
      plain: false,
    }),
    asks: [],
  },
  {
    name: "a Btrfs of ours on a whole disk",
    devices: disk("sda", { btrfs: superblock({}) }),
    asks: [],
  },
  {
    name: "a Btrfs of ours below an MBR",
    devices: disk("sda", { btrfs: superblock({}), table: "mbr" }),
    asks: ["sda"],
  },
  {
    name: "a Btrfs of others in our partition",
    devices: data("sda", { swapLabel: SWAP, label: "other" }),
    asks: ["sda2"],
  },
  {
    name: "nothing in our partition",
    devices: without(data("sda", { swapLabel: SWAP }), "btrfs"),
    asks: ["sda2"],
  },
  {
    name: "a backup superblock of ours",
    devices: disk("sda", { backup: superblock({}) }),
    asks: ["sda"],
  },
  {
    name: "a backup superblock of ours behind one that lost its label",
    devices: disk("sda", {
      backup: superblock({}),
      btrfs: superblock({ label: "", intact: false }),
    }),
    asks: ["sda"],
  },
  {
    name: "a backup superblock of others",
    devices: disk("sda", { backup: superblock({ label: "other" }) }),
    asks: [],
  },
  {
    name: "a data disk that lost its first sector",
    devices: data("sda", { swapLabel: SWAP, lost: "first sector" }),
    asks: ["sda"],
  },
  {
    name: "a data disk that has something behind its table",
    devices: data("sda", { swapLabel: SWAP, disk: { plain: false } }),
    asks: ["sda"],
  },
  {
    name: "a data disk that grew by a mebibyte",
    devices: data("sda", {
      swapLabel: SWAP,
      disk: { sizeBytes: diskBytes + MiB },
    }),
    asks: ["sda"],
  },
  {
    name: "a data disk that grew by less",
    devices: data("sda", {
      swapLabel: SWAP,
      disk: { sizeBytes: diskBytes + MiB - 512 },
    }),
    asks: [],
  },
  {
    name: "a disk of others that lost its first sector",
    devices: data("sda", {
      label: "other",
      names: ["other", "other"],
      lost: "first sector",
    }),
    asks: [],
  },
  {
    name: "our filesystem on a disk with names of others that grew",
    devices: data("sda", {
      names: ["other", "other"],
      disk: { sizeBytes: 2 * diskBytes },
    }),
    asks: ["sda"],
  },
  {
    name: "a name of ours on a disk of others that grew",
    devices: data("sda", {
      label: "other",
      names: [SWAP, "other"],
      swapLabel: SWAP,
      disk: { sizeBytes: 2 * diskBytes },
    }),
    asks: ["sda"],
  },
  {
    name: "a disk of which only our swap partition is left",
    devices: onlySwap().map((part) => draw(part, { swapLabel: SWAP })),
    asks: ["sda"],
  },
  {
    name: "a volume of ours that is plain",
    devices: [device("md0", { ...volume, btrfs: superblock({}) })],
    asks: [],
  },
  {
    name: "a volume with a table of ours",
    devices: data("md0", { swapLabel: SWAP, lost: "first sector" })
      .map((part) => part.number ? part : { ...part, ...volume }),
    asks: [],
  },
  {
    name: "an MBR over our data, and its partitions",
    devices: belowMbr({}),
    asks: ["sda", "sda1"],
  },
];

for (const { name, devices, asks } of questions) {
  Deno.test(`isInQuestion(): ${name}`, () => {
    const found = devices.filter((device) => isInQuestion(device, devices));
    assertEquals(found.map((device) => device.name), asks);
  });
}
