/**
 * Bystanders stay byte-identical: random collections of disks, whose checksums
 * prove that nothing but magic disks and partitions changed.
 *
 *     SEED=1 ROUNDS=1 deno test -A testing/bystanders_test.ts
 *
 * Each round has a seed of its own, which a failure names.
 */
import { assert, assertEquals } from "@std/assert";
import { needPrograms } from "./programs.ts";
import { countFrom, diceOf, type Random, seed } from "./random.ts";
import {
  command,
  type Disk,
  type DiskSpec,
  header,
  magic,
  MiB,
  type System,
  withSystem,
} from "./system.ts";

const rounds = countFrom("ROUNDS", 20);
/** No round may take longer. */
const LONGEST_S = 60;

/** What a bystander may hold: shell scripts, `$DISK` is the disk. */
const contents: Record<string, string> = {
  "nothing": "",
  "noise": 'head -c 3M /dev/urandom | dd of="$DISK" bs=64K status=none',
  "ext4": 'mkfs.ext4 -q "$DISK"',
  "ext4 with our label": 'mkfs.ext4 -q -L lightwhale-data "$DISK"',
  "FAT": 'mkfs.vfat "$DISK" >/dev/null',
  "XFS": 'mkfs.xfs -q -f "$DISK"',
  "NTFS": 'mkntfs -q -F -Q "$DISK"',
  "Btrfs": 'mkfs.btrfs -q "$DISK"',
  "Btrfs with almost our label": 'mkfs.btrfs -q -L lightwhale-dat "$DISK"',
  "Btrfs with more than our label": 'mkfs.btrfs -q -L lightwhale-data2 "$DISK"',
  "Btrfs with our label in capitals":
    'mkfs.btrfs -q -L LIGHTWHALE-DATA "$DISK"',
  "Btrfs with the magic label": `mkfs.btrfs -q -L ${magic} "$DISK"`,
  "swap": 'mkswap -q "$DISK"',
  "swap with our label": 'mkswap -q -L lightwhale-swap "$DISK"',
  "an LVM physical volume":
    'pvcreate -q -ff -y --devices "$DISK" --config devices/scan_lvs=0 "$DISK"' +
    " >/dev/null",
  "an md member": md("1.2", 4096),
  "an md member, superblock at the start": md("1.1", 0),
  "a ZFS label": `for at in 0 256; do
      printf '\\014\\261\\272\\000\\000\\000\\000\\000' |
        dd of="$DISK" bs=1 seek=$((at * 1024 + 131072)) status=none
    done`,
  "LUKS": `printf 'LUKS\\272\\276\\000\\002' | dd of="$DISK" status=none`,
  "a squashfs": `file=$(mktemp)
    mksquashfs /etc/apt "$file" -noappend -quiet -no-progress
    dd if="$file" of="$DISK" status=none; rm "$file"`,
  "an ISO 9660 volume": `printf '\\001CD001\\001' |
    dd of="$DISK" bs=2048 seek=16 conv=sync status=none`,
  "the header one byte late": almost(magic, 1),
  "the header 512 bytes late": almost(magic, 512),
  "the header 4096 bytes late": almost(magic, 4096),
  "the header but for its last byte": almost(magic.slice(0, -1), 0),
  "the header in capitals": almost(magic.toUpperCase(), 0),
  "the header in UTF-16": almost(magic.replaceAll(/./g, "$&\\000"), 0),
  "a comment before the header": almost(`# ${magic}`, 0),
  "a GPT": gpt("name=data", "name=more"),
  "a GPT with almost the magic name": gpt(`name=${magic}-not`, "name=a"),
  "a GPT with the magic name in capitals": gpt(
    `name=${magic.toUpperCase()}`,
    "name=LIGHTWHALE-DATA",
  ),
  "a GPT and the header in a partition": gpt("name=a", "name=b") +
    `; printf ${magic} |
       dd of="$DISK" bs=1M seek=1 conv=notrunc status=none`,
  "an MBR": "printf 'size=9M\\n,\\n' | " +
    'sfdisk -q --no-tell-kernel --label dos "$DISK"',
  "an MBR and the header in a partition": "printf 'start=1M\\n' | " +
    'sfdisk -q --no-tell-kernel --label dos "$DISK"' +
    `; printf ${magic} |
       dd of="$DISK" bs=1M seek=1 conv=notrunc status=none`,
  "a damaged GPT": gpt("name=a", "name=b") +
    `; dd if=/dev/zero of="$DISK" bs=512 seek=1 count=1 conv=notrunc ` +
    "status=none",
};

function almost(text: string, at: number): string {
  return `printf '${text}' |
    dd of="$DISK" bs=1 seek=${at} conv=notrunc status=none`;
}

function gpt(...partitions: string[]): string {
  const table = partitions.map((partition, i) =>
    i < partitions.length - 1 ? `size=20MiB, ${partition}` : partition
  );
  return `printf '%s\\n' ${table.map((line) => `'${line}'`).join(" ")} |
    sfdisk -q --no-tell-kernel --label gpt "$DISK"`;
}

/** The magic and version of an md superblock; the kernel here has no md. */
function md(version: "1.1" | "1.2", at: number): string {
  return `printf '\\374\\116\\053\\251\\001\\000\\000\\000${version}' |
    dd of="$DISK" bs=1 seek=${at} conv=notrunc status=none`;
}

/** What a magic disk may hold besides. */
const oldContents = [
  ...["nothing", "noise", "ext4", "XFS", "NTFS", "Btrfs", "swap", "a GPT"],
  ...["an MBR", "a ZFS label", "an LVM physical volume"],
];

/** A disk of a round. */
interface RandomDisk extends DiskSpec {
  name: string;
  kind: "bystander" | "magic" | "magic partition";
}

function someDisk(random: Random): RandomDisk {
  // Few that are magic, or all the time goes into making filesystems.
  const kind = random.pick(
    [
      ...["bystander", "bystander", "bystander", "bystander"],
      ...["magic", "magic partition"],
    ] as const,
  );
  const sectorBytes = random.chance(0.3) ? 4096 : 512;
  const sizeBytes = random.pick([320, 401, 640, 2100]) * MiB +
    4096 * random.below(256);
  if (kind === "magic partition") {
    const name = `a magic partition after one that holds noise`;
    const script = gpt("name=noise", `name=${magic}`) +
      `; head -c 1M /dev/urandom |
         dd of="$DISK" bs=1M seek=1 conv=notrunc status=none`;
    return { name, kind, sizeBytes, sectorBytes, contents: script };
  }
  const names = Object.keys(contents).filter((name) =>
    // Their tools want sectors of 512 bytes.
    sectorBytes === 512 || !/NTFS|FAT|LVM|damaged/.test(name)
  );
  const name = random.pick(kind === "magic" ? oldContents : names);
  const script = names.includes(name) ? contents[name] : "";
  return {
    name: `${name}, ${sizeBytes / MiB} MiB, ${sectorBytes}`,
    kind,
    sizeBytes,
    sectorBytes,
    contents: kind === "magic" ? `${script}\n${header}` : script,
  };
}

for (let round = 0; round < rounds; round++) {
  const ofRound = seed + round;
  Deno.test({
    name: `bystanders stay byte-identical: SEED=${ofRound} ROUNDS=1`,
    ignore: Deno.uid() !== 0,
    async fn() {
      needPrograms("mkfs.xfs", "mkfs.vfat", "mkntfs", "lvm", "mksquashfs");
      const random = diceOf(ofRound);
      const first = someDisk(random);
      const others = Array.from(
        { length: 1 + random.below(5) },
        () => someDisk(random),
      );
      const specs: [RandomDisk, ...RandomDisk[]] = [first, ...others];
      const started = Date.now();
      try {
        await withSystem(
          { disks: specs },
          (system) => playRound(system, specs, random),
        );
      } catch (error) {
        const list = specs.map(({ kind, name }) => `  ${kind}: ${name}`);
        const { message } = error as Error;
        throw new Error(`${message}\nThe disks were\n${list.join("\n")}`);
      }
      assert(Date.now() - started < LONGEST_S * 1000, "It took too long");
    },
  });
}

/** A boot or two with other things between them. */
async function playRound(
  system: System,
  specs: RandomDisk[],
  random: Random,
): Promise<void> {
  const before = await checksums(system, specs);
  const steps = Array.from({ length: 1 + random.below(2) }, () =>
    random.pick([
      ["--dry-run"],
      ["--status"],
      ["--enable"],
      ["--disable"],
    ]));
  for (const [mode] of steps) {
    // Refused or not needed: none of them may change anything here.
    const takesDevices = mode === "--enable" || mode === "--disable";
    const disk = specs.findIndex(({ kind, name }) =>
      kind === "bystander" && (mode === "--disable" || !/^nothing/.test(name))
    );
    if (takesDevices && disk < 0) continue;
    if (mode === "--enable" && !await isKnown(system.disks[disk])) continue;
    const operands = takesDevices ? [system.disks[disk].path] : [];
    const result = await system.run([...system.place(), mode, ...operands]);
    const expected = mode === "--enable" ? 2 : 0;
    assertEquals(result.status, expected, `${mode}: ${result.stderr}`);
    assertEquals(await checksums(system, specs), before, mode);
  }
  for (let boots = 1 + random.below(2); boots > 0; boots--) {
    const { report, stderr } = await system.boot();
    await system.settle();
    assertEquals(await checksums(system, specs), before, stderr);
    await system.sh("touch etc/x var/x home/x mnt/lightwhale-data/x");
    const isMagic = specs.some(({ kind }) => kind !== "bystander");
    if (!isMagic) assertEquals(report.mode, "volatile", stderr);
    await system.reboot();
  }
  assertEquals(await checksums(system, specs), before, "after the reboots");
}

/** Does blkid know what is on it? Then `--enable` has to refuse it. */
async function isKnown(disk: Disk): Promise<boolean> {
  return await command(["blkid", "--probe", disk.path]).then(
    () => true,
    () => false,
  );
}

/** Of all that must not change: disks, and what is beside magic partitions. */
async function checksums(
  system: System,
  specs: RandomDisk[],
): Promise<string[]> {
  const sums: string[] = [];
  for (const [i, disk] of system.disks.entries()) {
    const { kind } = specs[i];
    if (kind === "bystander") sums.push(await system.checksum(disk));
    if (kind === "magic partition") {
      const neighbour = ["head", "-c", "21M", disk.image];
      const script = `"$@" | tail -c 20M | sha256sum`;
      await command(["blockdev", "--flushbufs", disk.path]);
      sums.push(await command(["sh", "-euc", script, "sh", ...neighbour]));
    }
  }
  return sums;
}
