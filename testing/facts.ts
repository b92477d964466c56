/**
 * Facts as look() finds them, drawn by hand: devices, and what is read from
 * them.
 *
 * @module
 */
import {
  type BlockDevice,
  DATA,
  isMagic,
  MAGIC,
  type MemberRecord,
  type Reading,
  type Superblock,
  SWAP,
  whatItHolds,
} from "../persistence.ts";

export const MiB = 1024 ** 2;
export const GiB = 1024 ** 3;
export const diskBytes = 100 * GiB;

/** As look() judges what it has read. */
export function judged(devices: BlockDevice[][]): BlockDevice[] {
  const all = structuredClone(devices.flat());
  for (const device of all) device.magic = isMagic(device);
  for (const device of all) device.holds = whatItHolds(device, all);
  return all;
}

/** A device, and what was read from it, in one. */
export type Drawn = Partial<BlockDevice> & Partial<Reading>;

export function device(name: string, properties: Drawn = {}): BlockDevice {
  return draw({
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
      header: false,
      anyway: false,
      onlyHeader: false,
      recordable: true,
      plain: true,
    },
    magic: false,
    holds: { kind: "nothing of ours" },
  }, properties);
}

/** The same device with other properties. */
export function draw(device: BlockDevice, properties: Drawn = {}): BlockDevice {
  const { header, anyway, onlyHeader, recordable, plain, ...others } =
    properties;
  const { error, btrfs, record, backup, hidden, swapLabel, ...tables } = others;
  const { table, gpt, ...own } = tables;
  const read = {
    ...{ header, anyway, onlyHeader, recordable, plain },
    ...{ error, btrfs, record, backup, hidden, swapLabel, gpt },
    table: table ?? (gpt && "gpt"),
  };
  const given = Object.fromEntries(
    Object.entries(read).filter(([, value]) => value !== undefined),
  );
  return { ...device, ...own, read: { ...device.read, ...given } };
}

/** The same devices, one of them with other properties. */
export function draws(
  devices: BlockDevice[],
  number: number,
  properties: Drawn,
): BlockDevice[] {
  return devices.map((part) =>
    part.number === number ? draw(part, properties) : part
  );
}

/** A disk without partitions. */
export function disk(name: string, properties?: Drawn): BlockDevice[] {
  return [device(name, properties)];
}

export function magic(name: string, properties?: Drawn): BlockDevice[] {
  return disk(name, { header: true, ...properties });
}

export function superblock(
  properties: Partial<Superblock>,
): Superblock {
  return {
    fsid: "data",
    label: DATA,
    generation: 10,
    numDevices: 1,
    devid: 1,
    deviceBytes: diskBytes - GiB,
    totalBytes: diskBytes - GiB,
    usedBytes: 10 * GiB,
    hasLog: false,
    isSeed: false,
    intact: true,
    ...properties,
  };
}

export function record(
  member: string,
  epoch: number,
  present: string[],
  absent: MemberRecord["absent"] = {},
  more: Partial<MemberRecord> = {},
): MemberRecord {
  return { fsid: "data", member, epoch, present, absent, ...more };
}

/** A data disk: the whole, the swap partition, the data partition. */
export function data(name: string, options: {
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
  /** Names of the two partitions. */
  names?: [string, string];
  disk?: Drawn;
  swap?: Drawn;
  main?: Drawn;
  hardware?: string;
  label?: string;
  /** The kernel has it mounted. */
  open?: boolean;
  usedBytes?: number;
} = {}): BlockDevice[] {
  const { of = 1, record, swapLabel, lost, names = [SWAP, DATA] } = options;
  const { open = false, usedBytes = 10 * GiB } = options;
  const { fsid = "data", devid = 1, generation = 10 } = options;
  const { hasLog = false, intact = true, label = DATA } = options;
  const { hardware } = options;
  const sizes = [GiB, diskBytes - GiB - 2 * MiB];
  const partitions = sizes.map((sizeBytes, index) => ({
    number: index + 1,
    name: names[index],
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
    label,
    hasLog,
    intact,
    numDevices: of,
    deviceBytes: main.sizeBytes,
  });
  const inUse = open ? `part of the mounted Btrfs ${fsid}` : undefined;
  return [
    draw(device(name, { gpt, hardware }), options.disk),
    draw(swap, { swapLabel, hardware, ...options.swap }),
    draw(main, {
      inUse,
      btrfs,
      record: record && { ...record, fsid },
      hardware,
      ...options.main,
    }),
  ];
}

/** A disk that has the first superblock of a filesystem of two. */
export function joining(name: string, disk?: Drawn): BlockDevice[] {
  return data(name, { of: 2, devid: 2, generation: 11, disk });
}

export function without(
  devices: BlockDevice[],
  property: "btrfs" | "record" | "gpt",
): BlockDevice[] {
  return devices.map((device) => reading(device, { [property]: undefined }));
}

/** A data disk whose data partition is gone from the table. */
export function onlySwap(name = "sda"): BlockDevice[] {
  const [whole, swap] = data(name);
  const [entry] = whole.read.gpt!.partitions;
  const gpt = { ...whole.read.gpt!, partitions: [entry] };
  return [reading(whole, { gpt }), swap];
}

export function withHeader(devices: BlockDevice[]): BlockDevice[] {
  return devices
    .map((device) => reading(device, { header: device.kind === "disk" }));
}

export function reading(
  device: BlockDevice,
  read: Partial<Reading>,
): BlockDevice {
  return { ...device, read: { ...device.read, ...read } };
}

/** A disk whose second partition is to be formatted. */
export function magicPartition(name: string, disk?: Drawn): BlockDevice[] {
  return without(data(name, { names: ["other", MAGIC], disk }), "btrfs");
}

/** The same disk with one more partition behind that of the data. */
export function partitionBehind(
  [whole, ...parts]: BlockDevice[],
): BlockDevice[] {
  const gpt = whole.read.gpt!;
  const startBytes = diskBytes;
  const next = { number: 3, name: "next", startBytes, sizeBytes: GiB };
  const partitions = [...gpt.partitions, next];
  return [reading(whole, { gpt: { ...gpt, partitions } }), ...parts];
}

/** The same disk, of which the kernel shows no partitions. */
export function withoutNodes(devices: BlockDevice[]): BlockDevice[] {
  const entries = devices[0].read.gpt!.partitions;
  return devices.map((part) => ({
    ...part,
    entry: entries.find(({ number }) => number === part.number),
  }));
}

/** A data filesystem on a whole disk of so many mebibytes. */
export function small(name: string, sizeMiB: number): BlockDevice[] {
  const sizeBytes = sizeMiB * MiB;
  const btrfs = superblock({ deviceBytes: sizeBytes, usedBytes: MiB });
  return disk(name, { sizeBytes, btrfs });
}
