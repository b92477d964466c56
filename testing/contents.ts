/**
 * What a disk or a partition may hold, as Debian's tools make it, for tests
 * that show what happens to it.
 *
 * @module
 */
import { type Disk, magic, MiB } from "./system.ts";

/** Bytes at a place. */
export interface Patch {
  at: number;
  bytes: Uint8Array;
}

/** A disk, or a partition with a device of its own, that is to be filled. */
export interface Place {
  path: string;
  sizeBytes: number;
  sectorBytes: Disk["sectorBytes"];
}

/** What a disk or a partition may hold. */
export interface Contents {
  /**
   * How it gets there: a shell script in which `$DISK` is the device, or the
   * bytes, where the tool needs a kernel driver that may be missing.
   */
  fill: string | ((place: Place) => Patch[]);
  /** What libblkid calls it (`wipefs`, column TYPE), sorted. */
  types: string[];
  /** The label that libblkid sees, if it is one of ours. */
  label?: "lightwhale-data" | "lightwhale-swap";
  /** Means something on a whole disk only. */
  onDisks?: true;
  /** The smallest device that its tool takes, 48 MiB if it is not said. */
  leastMiB?: number;
}

const KiB = 1024;
const quietly = (line: string) => `${line} >/dev/null 2>&1`;

/** Filesystems: how to make one with a label. */
const filesystems: Record<
  string,
  {
    make: (label: string) => string;
    types: string[];
    labelBytes: number;
    leastMiB?: number;
  }
> = {
  ext2: {
    make: (label) => `mkfs.ext2 -q -F -E nodiscard -L '${label}' "$DISK"`,
    types: ["ext2"],
    labelBytes: 16,
  },
  ext3: {
    make: (label) => `mkfs.ext3 -q -F -E nodiscard -L '${label}' "$DISK"`,
    types: ["ext3"],
    labelBytes: 16,
  },
  ext4: {
    make: (label) => `mkfs.ext4 -q -F -E nodiscard -L '${label}' "$DISK"`,
    types: ["ext4"],
    labelBytes: 16,
  },
  XFS: {
    make: (label) => `mkfs.xfs -q -f -K -L '${label}' "$DISK"`,
    types: ["xfs"],
    labelBytes: 12,
    leastMiB: 300,
  },
  FAT: {
    make: (label) => quietly(`mkfs.vfat -I -n '${label}' "$DISK"`),
    types: ["vfat", "vfat", "vfat"],
    labelBytes: 11,
  },
  exFAT: {
    make: (label) => quietly(`mkfs.exfat -L '${label}' "$DISK"`),
    types: ["dos", "exfat"],
    labelBytes: 11,
  },
  NTFS: {
    make: (label) => `mkntfs -q -F -Q -L '${label}' "$DISK"`,
    types: ["dos", "ntfs"],
    labelBytes: 32,
  },
  F2FS: {
    make: (label) => quietly(`mkfs.f2fs -f -t 0 -l '${label}' "$DISK"`),
    types: ["f2fs"],
    labelBytes: 128,
  },
  UDF: {
    make: (label) =>
      quietly(`mkudffs --media-type=hd --label='${label}' "$DISK"`),
    types: ["dos", "udf"],
    labelBytes: 30,
  },
  JFS: {
    make: (label) => quietly(`mkfs.jfs -q -f -L '${label}' "$DISK"`),
    types: ["jfs"],
    labelBytes: 16,
  },
  NILFS2: {
    make: (label) => quietly(`mkfs.nilfs2 -q -f -K -L '${label}' "$DISK"`),
    types: ["nilfs2", "nilfs2"],
    labelBytes: 80,
    leastMiB: 128,
  },
  Btrfs: {
    make: (label) => quietly(`mkfs.btrfs -q -K -f -L '${label}' "$DISK"`),
    types: ["btrfs"],
    labelBytes: 255,
    leastMiB: 109,
  },
  swap: {
    make: (label) => `mkswap -q -L '${label}' "$DISK"`,
    types: ["swap"],
    labelBytes: 15, // and a NUL
  },
};

/** Labels that only look like ours. */
const almostOurs = [
  ...["lightwhale-dat", "lightwhale-data2", "LIGHTWHALE-DATA", magic],
];

/** All contents by their names. */
export const contents: Record<string, Contents> = {
  "nothing": { fill: "", types: [] },
  "noise": {
    fill: 'head -c 3M /dev/urandom | dd of="$DISK" bs=64K status=none',
    types: [],
  },
  "a text": {
    fill: `yes '# ${magic}' | head -c 1M | dd of="$DISK" bs=64K status=none`,
    types: [],
  },
  ...Object.fromEntries(
    Object.entries(filesystems).map(([name, { make, types, leastMiB }]) => [
      name,
      { fill: make("photos"), types, leastMiB },
    ]),
  ),
  ...labelled(["lightwhale-data"]),
  ...labelled(almostOurs),
  "swap with our swap label": {
    fill: filesystems.swap.make("lightwhale-swap"),
    types: ["swap"],
    label: "lightwhale-swap",
  },
  "swap of pages of 16 KiB": {
    fill: 'mkswap -q --pagesize 16384 "$DISK"',
    types: ["swap"],
  },
  "NTFS with files": {
    fill: `file=$(mktemp); head -c 6M /dev/urandom > "$file"
      ${filesystems.NTFS.make("photos")}
      ntfscp -q "$DISK" "$file" file; rm "$file"`,
    types: ["dos", "ntfs"],
  },
  "ext4 with files": {
    fill: `folder=$(mktemp -d); head -c 6M /dev/urandom > "$folder/file"
      mkfs.ext4 -q -F -E nodiscard -d "$folder" "$DISK"; rm -r "$folder"`,
    types: ["ext4"],
  },
  "a squashfs": {
    fill: `file=$(mktemp)
      mksquashfs /etc/apt "$file" -noappend -quiet -no-progress
      dd if="$file" of="$DISK" conv=notrunc status=none; rm "$file"`,
    types: ["squashfs"],
  },
  "LUKS1": { fill: luks("luks1"), types: ["crypto_LUKS"] },
  "LUKS2": { fill: luks("luks2"), types: ["crypto_LUKS", "crypto_LUKS"] },
  "LUKS2 with our label": {
    fill: luks("luks2 --label lightwhale-data"),
    types: ["crypto_LUKS", "crypto_LUKS"],
    label: "lightwhale-data",
  },
  "an LVM physical volume": {
    fill: quietly(
      `pvcreate -q -ff -y --devices "$DISK" --config devices/scan_lvs=0 "$DISK"`,
    ),
    types: ["LVM2_member"],
  },
  "a bcache backing device": {
    fill: quietly('make-bcache -B "$DISK"'),
    types: ["bcache"],
  },
  "an md 0.90 member": { fill: md090, types: ["linux_raid_member"] },
  "an md 1.0 member": {
    fill: ({ sizeBytes }) => md1(alignDown(sizeBytes, 4 * KiB) - 8 * KiB),
    types: ["linux_raid_member"],
  },
  "an md 1.1 member": { fill: () => md1(0), types: ["linux_raid_member"] },
  "an md 1.2 member": {
    fill: () => md1(4 * KiB),
    types: ["linux_raid_member"],
  },
  "an Intel RAID member": {
    fill: intelRaid,
    types: ["isw_raid_member"],
    onDisks: true,
  },
  "a DDF RAID member": {
    fill: ddf,
    types: ["ddf_raid_member"],
    onDisks: true,
  },
  "a ZFS member": { fill: zfs, types: Array(13).fill("zfs_member") },
  "a hybrid ISO 9660 image": {
    fill: isoWith("MEDIUM"),
    types: ["iso9660"],
    onDisks: true,
  },
  "a hybrid ISO 9660 image with our label": {
    fill: isoWith("lightwhale-data"),
    types: ["iso9660"],
    label: "lightwhale-data",
    onDisks: true,
  },
};

/** Those with this label that can have it. */
function labelled(labels: string[]): Record<string, Contents> {
  return Object.fromEntries(
    labels.flatMap((label) =>
      Object.entries(filesystems)
        // Our own Btrfs is no bystander.
        .filter(([name, { labelBytes }]) =>
          label.length <= labelBytes &&
          !(name === "Btrfs" && label === "lightwhale-data")
        )
        .map(([name, { make, types, leastMiB }]): [string, Contents] => [
          `${name} labelled ${label}`,
          {
            fill: make(label),
            types,
            leastMiB,
            ...(label === "lightwhale-data" ? { label } : {}),
          },
        ])
    ),
  );
}

function luks(type: string): string {
  return `printf x | cryptsetup luksFormat -q --type ${type} \\
    --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file - "$DISK"`;
}

/** As `isohybrid` media are: two file systems, a GPT of 248 entries. */
function isoWith(volume: string): string {
  return `folder=$(mktemp -d); mkdir "$folder/tree"
    head -c 2M /dev/urandom > "$folder/tree/file"
    truncate -s 4M "$folder/efi"; mkfs.vfat "$folder/efi" >/dev/null
    xorriso -as mkisofs -quiet -o "$folder/iso" -V '${volume}' -J -r \\
      -append_partition 2 0xef "$folder/efi" -appended_part_as_gpt \\
      -partition_offset 16 "$folder/tree" >/dev/null 2>&1
    dd if="$folder/iso" of="$DISK" conv=notrunc bs=64K status=none
    rm -r "$folder"`;
}

/** The superblock of md 0.90 (Linux, include/uapi/linux/raid/md_p.h). */
function md090({ sizeBytes }: Place): Patch[] {
  const at = alignDown(sizeBytes, 64 * KiB) - 64 * KiB;
  const words = new Uint32Array(KiB);
  words.set([0xa92b4efc, 0, 90, 0, 0, 0x11111111, 1577836800, 1]);
  words.set([at / KiB, 2, 2, 0, 0, 0x22222222, 0x33333333, 0x44444444], 8);
  words[32 + 1] = 1; // clean
  words[32 + 6] = words.reduce((sum, word) => sum + word >>> 0, 0);
  return [{ at, bytes: new Uint8Array(words.buffer) }];
}

/** The superblock of md 1.x, which knows its own place (the same). */
function md1(at: number): Patch[] {
  const bytes = new Uint8Array(256 + 4);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, 0xa92b4efc, true);
  view.setUint32(4, 1, true);
  bytes.set(Uint8Array.from({ length: 16 }, (_, i) => 0xa0 + i), 16);
  bytes.set(new TextEncoder().encode("nas:0"), 32);
  view.setUint32(72, 1, true); // RAID1
  view.setBigUint64(80, 204800n, true);
  view.setUint32(92, 2, true); // of two
  view.setBigUint64(128, at === 0 ? 2048n : 0n, true);
  view.setBigUint64(136, 204800n, true);
  view.setBigUint64(144, BigInt(at / 512), true);
  view.setUint32(220, 2, true); // roles
  view.setUint16(258, 1, true);
  let sum = 0n;
  for (let i = 0; i < bytes.length; i += 4) {
    sum += BigInt(view.getUint32(i, true));
  }
  view.setUint32(216, Number((sum & 0xffffffffn) + (sum >> 32n)), true);
  return [{ at, bytes }];
}

/** The anchor of Intel's RAID (mdadm, super-intel.c). */
function intelRaid({ sizeBytes, sectorBytes }: Place): Patch[] {
  const bytes = new Uint8Array(sectorBytes);
  bytes.set(new TextEncoder().encode("Intel Raid ISM Cfg Sig. 1.1.00"));
  bytes.fill(0x5a, 64, 216);
  return [{ at: sizeBytes - 2 * sectorBytes, bytes }];
}

/** The anchor of SNIA's disk data format (mdadm, super-ddf.c). */
function ddf({ sizeBytes }: Place): Patch[] {
  const bytes = new Uint8Array(512).fill(0xff);
  const view = new DataView(bytes.buffer);
  const text = new TextEncoder();
  view.setUint32(0, 0xde11de11);
  bytes.set(text.encode("LSI     3C7CE35E00000000"), 8);
  bytes.set(text.encode("01.02.00"), 32);
  view.setBigUint64(96, 0n); // where the primary header is
  return [{ at: sizeBytes - 512, bytes }];
}

/** Uberblocks of a pool in the first and the last labels (OpenZFS, vdev.h). */
function zfs({ sizeBytes }: Place): Patch[] {
  const end = alignDown(sizeBytes, 256 * KiB);
  const labels = [0, 256 * KiB, end - 512 * KiB, end - 256 * KiB];
  return labels.flatMap((label) =>
    [0, 1, 2, 3].map((n) => {
      const bytes = new Uint8Array(64);
      const view = new DataView(bytes.buffer);
      view.setBigUint64(0, 0x00bab10cn, true);
      view.setBigUint64(8, 5000n, true);
      view.setBigUint64(16, BigInt(100 + n), true);
      return { at: label + (128 + n) * KiB, bytes };
    })
  );
}

/** Where the program looks for something and there is something else. */
export const misplaced: Record<string, Patch[]> = {
  "the header one byte late": text(1, magic),
  "the header 512 bytes late": text(512, magic),
  "the header 4096 bytes late": text(4096, magic),
  "the header 1 MiB late": text(MiB, magic),
  "the header but for its last byte": text(0, magic.slice(0, -1)),
  "the header in capitals": text(0, magic.toUpperCase()),
  "the header in UTF-16": text(0, magic.replaceAll(/./g, "$&\0")),
  "the header after a byte order mark": text(0, `\ufeff${magic}`),
  "a comment before the header": text(0, `# ${magic}`),
  "an empty line before the header": text(0, `\n${magic}\n`),
  "lightwhale-anyway without a header": text(0, "lightwhale-anyway\n"),
  "lightwhale-anyway before the header": text(
    0,
    `lightwhale-anyway\n${magic}\n`,
  ),
  "lightwhale-anyway where the line after the header is": text(
    magic.length,
    "\nlightwhale-anyway\n",
  ),
  "a payload without a header": text(
    0,
    "lightwhale-payload 1\n-- etc/hostname --\nx\n-- end --\n",
  ),
};

function text(at: number, words: string): Patch[] {
  return [{ at, bytes: new TextEncoder().encode(words) }];
}

function alignDown(value: number, unit: number): number {
  return value - value % unit;
}
