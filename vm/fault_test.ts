/**
 * Disks that fail: with errors, slowly, not at all, or by going away. Whatever
 * they do, the boot ends writable within a bounded time, and names the device.
 *
 * The faults are real device-mapper targets (dm-error, dm-flakey, dm-delay, a
 * suspended device) below a data filesystem, and those of the disk itself
 * (QEMU's blkdebug, or the harness that serves it) below a magic disk, because a
 * device-mapper volume is never magic. Without the fault the next boot is a
 * good one.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { execFileSync } from "node:child_process";
import { needPrograms } from "../testing/programs.ts";
import type { Access } from "./recorded_disk.ts";
import { all } from "./situation.ts";
import { type BootOptions, bootVm, makeDisk, type VmDisk } from "./vm.ts";

needPrograms("qemu-system-x86_64", "mksquashfs", "cpio", "depmod", "busybox");
needPrograms("mkfs.btrfs");

/** A disk before the boot: magic, or a data filesystem over the whole of it. */
interface FaultyDisk extends Omit<VmDisk, "file"> {
  holds: "nothing" | "magic" | "data" | "half of a mirror";
  /** From the start of S11persistence on. */
  trouble?: Trouble;
}

type Trouble = NonNullable<VmDisk["trouble"]>;

interface Fault {
  name: string;
  /** False: only with BOOT=all. */
  everyTime?: boolean;
  disks: FaultyDisk[];
  /** A shell script that runs before S11persistence; `size` is vda's. */
  before?: string;
  /** What troubles the disks from the start of S11persistence on. */
  on?: BootOptions["on"];
  mode: "persistent" | "volatile" | "fallback";
  status: number;
  /** What the console must say: the device at least. */
  says: RegExp;
  /** Those that must still begin with the header. */
  marked?: number[];
  withinMs?: number;
}

const neverAnswers = () => ({ takesMs: Infinity });
const EIO = 5;
const ENOSPC = 28;

/** All of vda as the volume "faulty", read and written as this table says. */
function mapped(...segments: string[]): string {
  return `printf '%s\\n' ${
    segments.map((segment) => `"${segment}"`).join(" ")
  } | dmsetup create faulty`;
}

/** An error for all but the end, which keeps vda itself from being used. */
const allErrors = mapped(
  "0 $((size - 8)) error",
  "$((size - 8)) 8 linear /dev/vda $((size - 8))",
);

/** The first bytes that a Btrfs keeps are at 64 KiB: sectors 128 to 135. */
const superblock = { from: 128, to: 136 };

const sizeMiB = 2200;
/** Behind 1 MiB and the swap, an eighth of the disk; 64 KiB into the rest. */
const newSuperblock = (1 + sizeMiB / 8) * 2 ** 20 + 512 * superblock.from;

const faults: Fault[] = [
  {
    name: "a data disk answers every read with an error",
    disks: [{ holds: "data" }],
    before: allErrors,
    mode: "fallback",
    status: 1,
    says: /\/dev\/dm-0 cannot be read.*unplug[^]*Cannot read \/dev\/dm-0: EIO/,
  },
  {
    name: "a data disk answers every read with an error beside a magic disk",
    everyTime: false,
    disks: [{ holds: "data" }, { holds: "magic" }],
    before: allErrors,
    mode: "fallback",
    status: 1,
    says: /\/dev\/vdb will not be formatted while \/dev\/dm-0/,
    marked: [1],
  },
  {
    name: "a data disk cannot read its superblock, beside a magic disk",
    disks: [{ holds: "data" }, { holds: "magic" }],
    before: mapped(
      `0 ${superblock.from} linear /dev/vda 0`,
      `${superblock.from} 8 error`,
      `${superblock.to} $((size - ${superblock.to})) linear /dev/vda ` +
        superblock.to,
    ),
    mode: "fallback",
    status: 1,
    says: /\/dev\/vdb will not be formatted while \/dev\/dm-0/,
    marked: [1],
  },
  {
    name: "a data disk answers every write with an error",
    disks: [{ holds: "data" }],
    before: mapped("0 $size flakey /dev/vda 0 0 3600 1 error_writes"),
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/dm-0/,
  },
  {
    name: "a data disk loses every write in silence",
    everyTime: false,
    disks: [{ holds: "data" }],
    before: mapped("0 $size flakey /dev/vda 0 0 3600 1 drop_writes"),
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/dm-0/,
  },
  {
    name: "a data disk takes half a second for each access",
    everyTime: false,
    disks: [{ holds: "data" }],
    before: mapped("0 $size delay /dev/vda 0 500"),
    mode: "persistent",
    status: 0,
    says: /./,
    withinMs: 120_000,
  },
  {
    name: "a data disk is suspended",
    disks: [{ holds: "data" }],
    before: `${mapped("0 $size linear /dev/vda 0")}
      dmsetup suspend --nolockfs faulty`,
    mode: "fallback",
    status: 1,
    says: /Cannot read \/dev\/dm-0: .*dmsetup resume "faulty"/,
    withinMs: 10_000,
  },
  {
    name: "a data disk is suspended, beside a magic disk",
    everyTime: false,
    disks: [{ holds: "data" }, { holds: "magic" }],
    before: `${mapped("0 $size linear /dev/vda 0")}
      dmsetup suspend --nolockfs faulty`,
    mode: "fallback",
    status: 1,
    says: /\/dev\/vdb will not be formatted while \/dev\/dm-0/,
    marked: [1],
    withinMs: 10_000,
  },
  {
    name: "a data disk never answers",
    disks: [{ holds: "data", trouble: neverAnswers }],
    mode: "fallback",
    status: 1,
    says: /\/dev\/vda cannot be read.*unplug[^]*vda: no answer in 20 s/,
    withinMs: 60_000,
  },
  {
    name: "a data disk never answers, beside a magic disk",
    everyTime: false,
    disks: [{ holds: "data", trouble: neverAnswers }, { holds: "magic" }],
    mode: "fallback",
    status: 1,
    says: /\/dev\/vdb will not be formatted while \/dev\/vda/,
    marked: [1],
  },
  {
    // All of them are given up at the same time, and none waits for another.
    name: "more disks never answer than are read at a time",
    disks: [
      ...Array.from(
        { length: 9 },
        (): FaultyDisk => ({ holds: "nothing", trouble: neverAnswers }),
      ),
      { holds: "data" },
    ],
    mode: "persistent",
    status: 0,
    says: /from \/dev\/vdj[^]*Cannot read \/dev\/vdi: no answer in 20 s/,
    withinMs: 35_000,
  },
  {
    name: "a data disk answers no write",
    everyTime: false,
    disks: [{
      holds: "data",
      trouble: ({ kind }) => kind === "read" ? {} : neverAnswers(),
    }],
    mode: "fallback",
    status: 1,
    says: /Cannot write .*\/dev\/vda: "dd": no answer in 60 s/,
    withinMs: 90_000,
  },
  {
    name: "a data disk answers no read after the first write",
    everyTime: false,
    disks: [{
      holds: "data",
      trouble: afterTheFirstWrite(({ kind }) =>
        kind === "read" ? neverAnswers() : {}
      ),
    }],
    mode: "fallback",
    status: 1,
    says: /Cannot mount \/dev\/vda .*: "mount": no answer in 300 s/,
    withinMs: 330_000,
  },
  {
    name: "both halves of a mirror never answer",
    everyTime: false,
    disks: [
      { holds: "half of a mirror", trouble: neverAnswers },
      { holds: "half of a mirror", trouble: neverAnswers },
    ],
    mode: "fallback",
    status: 1,
    says: /Docker is held back/,
    withinMs: 60_000,
  },
  {
    name: "a data disk goes mute right after its mount",
    everyTime: false,
    ...muteAfter(
      '"-t btrfs "*" /mnt/lightwhale-data"',
      "sync -f $data; echo 3 >/proc/sys/vm/drop_caches",
    ),
    mode: "fallback",
    status: 1,
    says: /no answer in 60 s[^]*Docker is held back/,
    withinMs: 90_000,
  },
  {
    name: "a data disk goes mute when its overlays are mounted",
    everyTime: false,
    ...muteAfter(
      '"--all --fstab "*',
      `grep -q " /etc overlay " /proc/mounts || exit
       sync -f $data; echo 3 >/proc/sys/vm/drop_caches`,
    ),
    mode: "fallback",
    status: 1,
    says: /Docker is held back/,
    withinMs: 90_000,
  },
  {
    // Nothing is left to read: the program itself waits, when it syncs the file;
    // or, a minute before, a child.
    name: "a data disk goes mute before daemon.json is written",
    everyTime: false,
    ...muteAfter(
      '"--all --fstab "*',
      `grep -q " /etc overlay " /proc/mounts || exit
       find $data /etc /var /home -type f -exec cat {} + >/dev/null`,
    ),
    mode: "fallback",
    status: 1,
    says: /waited 30 s for a disk/,
    withinMs: 150_000,
  },
  {
    name: "a data disk has no space left below it",
    everyTime: false,
    disks: [{
      holds: "data",
      bus: "scsi", // virtio knows no errors but EIO
      trouble: ({ kind }) => kind === "write" ? { errno: ENOSPC } : {},
    }],
    mode: "fallback",
    status: 1,
    says: /space allocation error[^]*Cannot write .* of \/dev\/sda/,
  },
  {
    name: "a data disk is pulled before it is mounted",
    disks: [{ holds: "data", bus: "scsi" }],
    ...pullBefore("mount"),
    mode: "fallback",
    status: 1,
    says: /Cannot mount \/dev\/sda/,
  },
  {
    name: "half of a mirror answers every read with an error",
    everyTime: false,
    disks: [{ holds: "half of a mirror" }, { holds: "half of a mirror" }],
    before: allErrors,
    mode: "persistent",
    status: 0,
    says: /Cannot read \/dev\/dm-0/,
  },
  {
    name: "half of a mirror answers every write with an error",
    everyTime: false,
    disks: [{ holds: "half of a mirror" }, { holds: "half of a mirror" }],
    before: mapped("0 $size flakey /dev/vda 0 0 3600 1 error_writes"),
    mode: "persistent",
    status: 0,
    says: /\/dev\/dm-0/,
  },
  {
    name: "half of a mirror is suspended",
    everyTime: false,
    disks: [{ holds: "half of a mirror" }, { holds: "half of a mirror" }],
    before: `${mapped("0 $size linear /dev/vda 0")}
      dmsetup suspend --nolockfs faulty`,
    mode: "persistent",
    status: 0,
    says: /Cannot read \/dev\/dm-0: .*dmsetup resume "faulty"/,
  },
  {
    name: "half of a mirror never answers",
    disks: [
      { holds: "half of a mirror", trouble: neverAnswers },
      { holds: "half of a mirror" },
    ],
    mode: "persistent",
    status: 0,
    says: /Cannot read \/dev\/vda: no answer in 20 s/,
  },
  {
    name: "half of a mirror is pulled before it is mounted",
    everyTime: false,
    disks: [
      { holds: "half of a mirror", bus: "scsi" },
      { holds: "half of a mirror" },
    ],
    ...pullBefore("mount"),
    mode: "persistent",
    status: 0,
    says: /\/dev\/sda cannot be written to: going on without/,
  },
  {
    name: "a magic disk answers every read with an error",
    disks: [{
      holds: "magic",
      trouble: ({ kind }) => kind === "read" ? { errno: EIO } : {},
    }],
    mode: "fallback",
    status: 1,
    says: /\/dev\/vda cannot be read.*unplug[^]*Cannot read \/dev\/vda: EIO/,
    marked: [0],
  },
  {
    name: "a magic disk never answers",
    everyTime: false,
    disks: [{ holds: "magic", trouble: neverAnswers }],
    mode: "fallback",
    status: 1,
    says: /Cannot read \/dev\/vda: no answer in 20 s/,
    marked: [0],
  },
  {
    name: "a magic disk answers no write",
    everyTime: false,
    disks: [{
      holds: "magic",
      trouble: ({ kind }) => kind === "read" ? {} : neverAnswers(),
    }],
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/vda.*: no answer in 60 s/,
    marked: [0],
    withinMs: 90_000,
  },
  {
    name: "a magic disk takes a tenth of a second for each access",
    everyTime: false,
    disks: [{ holds: "magic", trouble: () => ({ takesMs: 100 }) }],
    mode: "persistent",
    status: 0,
    says: /./,
    withinMs: 120_000,
  },
  {
    name: "a magic disk has no space left below it",
    everyTime: false,
    disks: [{
      holds: "magic",
      bus: "scsi",
      trouble: ({ kind, offset }) =>
        kind === "write" && offset > 64 * 2 ** 20 ? { errno: ENOSPC } : {},
    }],
    mode: "fallback",
    status: 1,
    says: /Cannot write a partition table to \/dev\/sda/,
    marked: [0],
  },
  {
    name: "a magic disk cannot read back the superblock that it wrote",
    everyTime: false,
    disks: [{
      holds: "magic",
      trouble: ({ kind, offset, length }) =>
        kind === "read" && offset <= newSuperblock &&
          newSuperblock < offset + length
          ? { errno: EIO }
          : {},
    }],
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/vda2/,
    marked: [0],
  },
  {
    name: "a magic disk answers every write with an error",
    disks: [{ holds: "magic", fails: { io: "write" } }],
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/vda/,
    marked: [0],
  },
  {
    name: "a magic disk cannot write where the superblock will be",
    disks: [{
      holds: "magic",
      fails: { io: "write", sector: newSuperblock / 512 },
    }],
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/vda/,
    marked: [0],
  },
  {
    name: "a magic disk cannot flush",
    everyTime: false,
    disks: [{ holds: "magic", fails: { io: "flush" } }],
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/vda/,
    marked: [0],
  },
  {
    name: "a magic disk is pulled while it is being formatted",
    disks: [{ holds: "magic", bus: "scsi", recorded: true }],
    on: pullWhileWritten(0),
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/sda/,
  },
  ...[
    ...["wipefs", "sfdisk", "partx", "mkfs.btrfs", "mkswap", "mount", "btrfs"],
    "dd",
  ].map((program): Fault => ({
    name: `a magic disk is pulled before ${program}`,
    everyTime: false,
    disks: [{ holds: "magic", bus: "scsi" }],
    ...pullBefore(program),
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/sda/,
  })),
  {
    // So small that mkfs.btrfs is rehearsed on files first.
    name: "one of two magic disks is pulled before the rehearsal of mkfs.btrfs",
    disks: [{ holds: "magic", bus: "scsi" }, { holds: "magic" }],
    ...pullBefore("mkfs.btrfs"),
    mode: "fallback",
    status: 1,
    says: /Cannot .*\/dev\/sda/,
    marked: [0, 1],
  },
];

/** Take this disk away when it has received twenty writes and flushes. */
function pullWhileWritten(disk: number): BootOptions["on"] {
  return {
    "start S11persistence": async (vm) => {
      for (let tries = 0; vm.received.length < 20 && tries < 6000; tries++) {
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
      await vm.pull(disk);
    },
  };
}

/** In trouble once it has been written to. */
function afterTheFirstWrite(trouble: Trouble): Trouble {
  let written = false;
  return (access) => {
    written ||= access.kind === "write";
    return written ? trouble(access) : undefined;
  };
}

/** Mute once mount(8) was called like this, and a script ran. */
function muteAfter(
  call: string,
  script: string,
): Pick<Fault, "disks" | "before" | "on"> {
  let isMute = false;
  return {
    disks: [{
      holds: "data",
      trouble: () => isMute ? neverAnswers() : {},
    }],
    before: `mkdir /tmp/real /tmp/upper /tmp/work
      cp -P "$(command -v mount)" /tmp/real/
      cat >/tmp/upper/mount <<"end"
#!/bin/sh
data=/mnt/lightwhale-data
case $* in
${call})
  /tmp/real/mount "$@" || exit
  ${script}
  echo @mute >/dev/ttyS1
  exec sleep 1
  ;;
esac
exec /tmp/real/mount "$@"
end
      chmod 755 /tmp/upper/mount
      mount -t overlay overlay /usr/sbin \\
        -o lowerdir=/usr/sbin,upperdir=/tmp/upper,workdir=/tmp/work`,
    on: {
      mute: () => {
        isMute = true;
      },
    },
  };
}

/** Take the disk sda away when this program is about to run. */
function pullBefore(program: string): Pick<Fault, "before" | "on"> {
  let pulled = false;
  return {
    // In /usr/sbin, which comes first in PATH: an applet is only a link.
    before: `path=$(command -v ${program})
      mkdir /tmp/real /tmp/upper /tmp/work
      cp -P "$path" /tmp/real/
      cat >/tmp/upper/${program} <<"end"
#!/bin/sh
[ ! -e /sys/block/sda ] || echo @pull >/dev/ttyS1
while [ -e /sys/block/sda ]; do sleep 0.05; done
exec /tmp/real/${program} "$@"
end
      chmod 755 /tmp/upper/${program}
      mount -t overlay overlay /usr/sbin \\
        -o lowerdir=/usr/sbin,upperdir=/tmp/upper,workdir=/tmp/work`,
    on: {
      pull: async (vm) => {
        if (pulled) return; // several at once may run the program
        pulled = true;
        await vm.pull(0);
      },
    },
  };
}

for (const fault of faults) {
  if (!all && fault.everyTime === false) continue;
  Deno.test(`fault: ${fault.name}`, async () => {
    const folder = Deno.makeTempDirSync({ prefix: "persistence-fault-" });
    try {
      await bootWithFault(fault, folder);
    } finally {
      Deno.removeSync(folder, { recursive: true });
    }
  });
}

async function bootWithFault(fault: Fault, folder: string): Promise<void> {
  let started = false;
  const disks = fault.disks.map(({ holds, trouble, ...disk }, i) => ({
    ...disk,
    trouble: trouble && ((access: Access) => started ? trouble(access) : {}),
    file: makeDisk(`${folder}/disk${i}.img`, {
      sizeMiB,
      magic: holds === "magic",
    }),
  }));
  const isData = ({ holds }: FaultyDisk) =>
    holds === "data" || holds === "half of a mirror";
  const data = disks.filter((_, i) => isData(fault.disks[i]))
    .map(({ file }) => file);
  if (data.length > 0) makeDataFilesystem(data);
  const before = `modprobe -a dm_flakey dm_delay
    size=$(cat /sys/block/vda/size)\n${fault.before ?? ""}`;
  const boot = await bootVm({
    disks,
    on: {
      ...fault.on,
      "start S11persistence": async (vm, words) => {
        started = true;
        await fault.on?.["start S11persistence"]?.(vm, words);
      },
    },
    before,
    check: checkGate + check,
    timeoutMs: 400_000,
    pullThePlug: true, // a stuck disk would keep it from shutting down
  });
  const seen = `${boot.console}\n${boot.checkOutput}`;
  assert(!boot.checkOutput.includes("is not writable"), seen);
  const report = JSON.parse(boot.checkOutput);
  assertEquals([report.mode, boot.s11Status], [fault.mode, fault.status], seen);
  assertMatch(boot.console, fault.says);
  for (const i of fault.marked ?? []) {
    const start = execFileSync("head", ["-c", "27", disks[i].file]);
    assertEquals(`${start}`, "lightwhale-please-format-me", seen);
  }
  const { withinMs = 60_000 } = fault;
  assert(boot.s11Ms! <= withinMs, `S11persistence took ${boot.s11Ms} ms`);
  console.log(`S11persistence took ${boot.s11Ms} ms`);
  await bootWithoutFault(disks.map(({ file, bus }) => ({ file, bus })), {
    holdsData: data.length > 0,
  });
}

/** The disks as the fault has left them, all well again. */
async function bootWithoutFault(
  disks: VmDisk[],
  { holdsData }: { holdsData: boolean },
): Promise<void> {
  const boot = await bootVm({ disks, check, pullThePlug: true });
  const seen = `Without the fault:\n${boot.console}\n${boot.checkOutput}`;
  assert(!boot.checkOutput.includes("is not writable"), seen);
  const report = JSON.parse(boot.checkOutput);
  assertEquals([report.mode, boot.s11Status], ["persistent", 0], seen);
  assertEquals(report.uuid === dataUuid, holdsData, seen);
}

const check = `for name in /etc /var /home /mnt/lightwhale-data; do
    echo x >$name/x && grep -q x $name/x || echo "$name is not writable"
  done
  cat /run/lightwhale/persistence.json`;

/** In the fallback Docker's data root is a file that says why. */
const checkGate = `
  ! grep -q '"mode": "fallback"' /run/lightwhale/persistence.json ||
    grep -q "^Docker is held back" /mnt/lightwhale-data/lightwhale-state/docker ||
    echo "it is not writable: Docker is not held back"
`;

const dataUuid = "0f2d1c8e-54a4-4e0b-9d55-6f1f3a3c7b11";

/** A data filesystem made by hand, on whole disks. */
function makeDataFilesystem(files: string[]): void {
  const profile = files.length > 1
    ? ["--data", "raid1", "--metadata", "raid1"]
    : [];
  const label = ["--label", "lightwhale-data", "--uuid", dataUuid];
  execFileSync("mkfs.btrfs", ["--quiet", ...label, ...profile, ...files]);
}
