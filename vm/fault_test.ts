/**
 * Disks that fail: with errors, slowly, not at all, or by going away. Whatever
 * they do, the boot ends writable within a bounded time, and names the device.
 *
 * The faults are real device-mapper targets (dm-error, dm-flakey, dm-delay, a
 * suspended device) below a data filesystem, and errors of the disk itself
 * (QEMU's blkdebug) below a magic disk, which device-mapper volumes never are.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { execFileSync } from "node:child_process";
import { fileURLToPath } from "node:url";
import { needPrograms } from "../testing/programs.ts";
import { all } from "./situation.ts";
import {
  type BootOptions,
  bootVm,
  makeDisk,
  systemImage,
  type VmDisk,
} from "./vm.ts";

needPrograms(
  ...["qemu-system-x86_64", "mksquashfs", "cpio", "depmod", "busybox"],
  "mkfs.btrfs",
);

const here = fileURLToPath(new URL(".", import.meta.url));

/** A disk before the boot: magic, or a data filesystem over the whole of it. */
interface FaultyDisk extends Omit<VmDisk, "file"> {
  holds: "magic" | "data" | "half of a mirror";
}

interface Fault {
  name: string;
  /** False: only with BOOT=all. */
  everyTime?: boolean;
  disks: FaultyDisk[];
  /** A shell script that runs before S11persistence; `size` is vda's. */
  before?: string;
  /** In the way of the disks from the start of S11persistence. */
  on?: BootOptions["on"];
  mode: "persistent" | "volatile" | "fallback";
  status: number;
  /** What the console must say: the device at least. */
  says: RegExp;
  /** Those that must still begin with the header. */
  marked?: number[];
  withinMs?: number;
}

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

const faults: Fault[] = [
  {
    name: "a data disk answers every read with an error",
    disks: [{ holds: "data" }],
    before: allErrors,
    mode: "volatile",
    status: 0,
    says: /Cannot read \/dev\/dm-0/,
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
    name: "a data disk never answers",
    disks: [{ holds: "data" }],
    before: `${mapped("0 $size linear /dev/vda 0")}
      dmsetup suspend --nolockfs faulty`,
    mode: "volatile",
    status: 0,
    says: /Cannot read \/dev\/dm-0.*: no answer in 20 s/,
  },
  {
    name: "a data disk never answers, beside a magic disk",
    everyTime: false,
    disks: [{ holds: "data" }, { holds: "magic" }],
    before: `${mapped("0 $size linear /dev/vda 0")}
      dmsetup suspend --nolockfs faulty`,
    mode: "fallback",
    status: 1,
    says: /\/dev\/vdb will not be formatted while \/dev\/dm-0/,
    marked: [1],
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
    disks: [{ holds: "half of a mirror" }, { holds: "half of a mirror" }],
    before: mapped("0 $size flakey /dev/vda 0 0 3600 1 error_writes"),
    mode: "persistent",
    status: 0,
    says: /\/dev\/dm-0/,
  },
  {
    name: "half of a mirror never answers",
    disks: [{ holds: "half of a mirror" }, { holds: "half of a mirror" }],
    before: `${mapped("0 $size linear /dev/vda 0")}
      dmsetup suspend --nolockfs faulty`,
    mode: "persistent",
    status: 0,
    says: /Cannot read \/dev\/dm-0/,
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
      // Behind 1 MiB and the swap, an eighth of the disk.
      fails: { io: "write", sector: 2048 * (1 + 2200 / 8) + superblock.from },
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
  const disks = fault.disks.map(({ holds, ...disk }, i) => ({
    ...disk,
    file: makeDisk(`${folder}/disk${i}.img`, {
      sizeMiB: 2200,
      magic: holds === "magic",
    }),
  }));
  const data = disks.filter((_, i) => fault.disks[i].holds !== "magic")
    .map(({ file }) => file);
  if (data.length > 0) makeDataFilesystem(data);
  const before = `size=$(cat /sys/block/vda/size)\n${fault.before ?? ""}`;
  const boot = await bootVm({
    disks,
    on: fault.on,
    image: faultImage(),
    append: `vm.before=${btoa(before)}`,
    check: `for name in /etc /var /home /mnt/lightwhale-data; do
        echo x >$name/x && grep -q x $name/x || echo "$name is not writable"
      done
      cat /run/lightwhale/persistence.json`,
    timeoutMs: 180_000,
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
}

/** As someone would make it by hand, on whole disks. */
function makeDataFilesystem(files: string[]): void {
  const profile = files.length > 1
    ? ["--data", "raid1", "--metadata", "raid1"]
    : [];
  const label = ["--label", "lightwhale-data"];
  execFileSync("mkfs.btrfs", ["--quiet", ...label, ...profile, ...files]);
}

/** A system that runs what the kernel command line says before S11. */
function faultImage(): string {
  const changes = `${here}cache/fault`;
  const script = `${changes}/etc/init.d/S05before`;
  Deno.mkdirSync(`${changes}/etc/init.d`, { recursive: true });
  Deno.writeTextFileSync(
    script,
    `#!/bin/sh
modprobe dm_mod; modprobe dm_flakey; modprobe dm_delay
sed -n 's/.*vm.before=\\([^ ]*\\).*/\\1/p' /proc/cmdline | base64 -d >/tmp/before
PATH=/usr/sbin:/usr/bin dash -eux /tmp/before || echo "S05before failed"
`,
    { mode: 0o755 },
  );
  return systemImage({ name: "fault", changes });
}
