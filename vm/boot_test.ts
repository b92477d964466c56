/**
 * Real boots by situation: disks before, what an operator sees after each boot.
 * The executable is dist/persistence, or what PERSISTENCE names. BOOT=all runs
 * every situation; otherwise those with `everyTime: false` are left out.
 */
import { assert, assertEquals } from "@std/assert";
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import {
  all,
  assertBoot,
  atWork,
  boots,
  dataDisks,
  degraded,
  type Expected,
  keptIn,
  lookAndRun,
  mirrored,
  mirroredSmall,
  persistent,
  single,
  type Sums,
  volatile,
  whole,
} from "./situation.ts";
import { needPrograms } from "../testing/programs.ts";
import type { Access } from "./recorded_disk.ts";
import {
  type Boot,
  type BootOptions,
  bootVm,
  type Bus,
  makeDisk,
  systemImage,
  type VmDisk,
} from "./vm.ts";

needPrograms("dropbearkey");

const here = fileURLToPath(new URL(".", import.meta.url));

/** A disk before the first boot. */
interface DiskBefore extends Omit<VmDisk, "file"> {
  /** Default: 3000, or 64 for a bystander. */
  sizeMiB?: number;
  /** It begins with the magic header. */
  magic?: boolean;
  /** It is the disk with this index, on another path. */
  path?: number;
  /** A script that fills the image file `$1`; `$SYSTEM` is the squashfs. */
  contents?: string;
  /** It must stay byte-identical. */
  bystander?: boolean;
}

/** One boot of a situation. */
interface Step extends
  Expected,
  Pick<
    BootOptions,
    "append" | "before" | "cpu" | "on" | "pullThePlug" | "uuid"
  > {
  /** What is done to the disks before, while the machine is off. */
  whileOff?: (disks: VmDisk[]) => void;
  /** The disks that are there, in this order; default: all. */
  present?: number[];
  /** The disk that is absent until `on` plugs it. */
  late?: number;
  /** The system image; default: the same for all. */
  image?: () => string;
  /** A shell script that runs in the booted system and must succeed. */
  run?: string;
  /** Its `run` prints `dmesg`: in that is all that was said, if it is long. */
  logged?: boolean;
  /** What must be the same before and after: a checksum. */
  unchanged?: (disks: VmDisk[]) => string;
}

interface Situation {
  name: string;
  /** False: only with BOOT=all. */
  everyTime?: boolean;
  disks: DiskBefore[];
  boots: Step[];
  memoryMiB?: number;
}

/** First boot and second boot with one disk on this bus. */
function oneDiskOn(bus: Bus, name: string, more: DiskBefore = {}): Situation {
  return {
    name: `first boot on ${bus}, persistent at once`,
    disks: [{ magic: true, bus, ...more }],
    boots: [
      { after: { ...single, partitions: dataDisks(name), boots: boots(1) } },
      { after: { ...single, partitions: dataDisks(name), boots: boots(2) } },
    ],
  };
}

/** Quick to copy; too small for a swap partition. */
const small: DiskBefore = { magic: true, sizeMiB: 200 };

const emptyExt4: DiskBefore = {
  contents: 'mkfs.ext4 -q -F "$1"',
  bystander: true,
};
/** The header on a partition, which may be another machine's disk. */
const headerInPartition: DiskBefore = {
  contents: `echo , | sfdisk -q --label gpt "$1"
    printf lightwhale-please-format-me |
      dd of="$1" bs=512 seek=2048 conv=notrunc status=none`,
  bystander: true,
};

/** What the firmware calls two machines. */
const thisMachine = "0a5f1be2-6f0c-4d0e-8a77-3b1c53a3e001";
const anotherMachine = "c7d0e3a4-1b52-4a6f-9e1d-58f0c2b7d002";

/** One magic disk that two controllers, or two ports of one, show. */
function onTwoPaths(hardware: DiskBefore): Omit<Situation, "name"> {
  const path: DiskBefore = { bus: "scsi", shared: true, ...hardware };
  return {
    disks: [{ magic: true, ...path }, { path: 0, ...path }],
    boots: [1, 2].map((n) => ({
      after: {
        ...single,
        boots: boots(n),
        // The kernel may hold what it has read of the other path before.
        partitions: /^(sd[ab]: lightwhale-swap lightwhale-data(; )?){1,2}$/,
        marked: /^(sd[ab])?$/,
        warnings: /^/,
      },
      says: /\/dev\/sd(a\d?\b.*\/dev\/sdb|b\d?\b.*\/dev\/sda)/,
      run: n === 1 ? "keep first 8" : "keep second 8",
    })),
  };
}

/** A magic disk with four old partitions, one of which is in use for a while. */
function onceUsed(
  { sizeMiB, held }: { sizeMiB: number; held: string },
): Omit<Situation, "name"> {
  return {
    disks: [{
      contents: `yes ,${sizeMiB}M | head -n 4 | sfdisk -q --label gpt "$1"
        printf lightwhale-please-format-me | dd of="$1" conv=notrunc status=none`,
    }],
    boots: [
      {
        // However slow the machine is: until five seconds after the first try.
        before: `(exec 3</dev/${held}
          until pidof delpart partx sfdisk; do sleep 0.02; done
          sleep 5) >/dev/null 2>&1 &`,
        after: { ...single, boots: boots(1), partitions: dataDisks("vda") },
        says: new RegExp(`/dev/${held}\\b`),
        run: `[ "$(echo /dev/vda?)" = "/dev/vda1 /dev/vda2" ]`,
      },
    ],
  };
}

/** What on-health is told is kept. */
const onHealth = `told() { [ "$(grep -c ^-- /run/told)" -ge "$1" ]; }
  mkdir -p /etc/lightwhale
  printf '%s\\n' '#!/bin/sh' '{ cat; echo --; } >>/run/told' \\
    >/etc/lightwhale/on-health
  chmod +x /etc/lightwhale/on-health`;

/** Pulls the second of two disks. */
const pulled = `${onHealth}
  disks_are() { [ "$(ls /dev/sd? | wc -l)" = "$1" ]; }
  keep both 24; keep_in_place database 1
  echo @pull 1; wait_for 10 disks_are 1
  keep pulled 8; keep_in_place database 1
  is_missing() { grep -q "Device [12] is missing" /run/lightwhale/health; }
  wait_for 60 is_missing; wait_for 60 told 1`;

/** Pulls the second of two disks, then plugs in a magic one. */
const pulledAndReplaced = `${pulled}
  echo @plug 2; wait_for 10 disks_are 2
  keep plugged 4`;

const wellAgain = `all_is_well() { [ ! -s /run/lightwhale/health ]; }
  wait_for 120 all_is_well || persistence.ts --status; all_is_well
  wait_for 60 told 2`;

const resetWhileReplacing =
  `wait_for 60 replacing; btrfs filesystem sync $data; replacing`;

const pullAndPlug: Step["on"] = {
  pull: (vm, [, disk]) => vm.pull(Number(disk)),
  plug: (vm, [, disk]) => vm.plug(Number(disk)),
};
const pullAndPlugSlowly: Step["on"] = {
  ...pullAndPlug,
  async plug(vm, [, disk]) {
    await vm.plug(Number(disk));
    await vm.throttle(Number(disk), 2 ** 20); // before anybody has noticed it
  },
};

/** A hard disk: 8 ms until its head is at a place, then 100 MB a second. */
function hardDisk(): VmDisk["trouble"] {
  let head = 0;
  let freeAtMs = 0;
  return ({ kind, offset, length }) => {
    if (kind === "flush") return undefined;
    const nowMs = performance.now();
    const seekMs = offset === head ? 0 : 8;
    head = offset + length;
    freeAtMs = Math.max(freeAtMs, nowMs) + seekMs + length / 100_000;
    return { takesMs: freeAtMs - nowMs };
  };
}

/** A disk that goes wrong when `spoil` is called, and not before. */
function sound(goneWrong: VmDisk["trouble"]) {
  let isSpoilt = false;
  return {
    trouble: (access: Access) => isSpoilt ? goneWrong!(access) : undefined,
    spoil: (value = true) => void (isSpoilt = value),
  };
}

/** Eight mebibytes that cannot be read until they are written. */
function badSpot(): VmDisk["trouble"] {
  const [from, to] = [100 * 2 ** 20, 108 * 2 ** 20];
  const written = new Set<number>();
  return ({ kind, offset, length }) => {
    let errno: number | undefined;
    const end = Math.min(offset + length, to);
    for (let at = Math.max(offset, from); at < end; at += 512) {
      if (kind === "write") written.add(at);
      else if (!written.has(at)) errno = 5;
    }
    return { errno };
  };
}

const losesWrites = sound(({ kind }) => ({
  errno: kind === "write" ? 5 : undefined,
}));
const isBad = sound(badSpot());

/** Where the key to a payload's machine is, in an image of its own. */
const sshChanges = `${here}cache/ssh`;
const password =
  "$6$oldsalt$YJZwh0HKjibO/WIrDSMb4f8oSvE8tcSbcqV8/c6CGqQ2Fgghjnejw8jVS4k.Hs4i4hMij2m.Diig/oXi1AfOR1";

/** A disk with a payload: a key, no password, and a name. */
const sshPayload = `
  mkdir -p ${sshChanges}/root
  [ -s ${sshChanges}/root/key ] ||
    dropbearkey -t ed25519 -f ${sshChanges}/root/key
  { echo lightwhale-please-format-me
    echo lightwhale-payload 1
    echo -- home/lightwhale/.ssh/authorized_keys --
    dropbearkey -y -f ${sshChanges}/root/key | sed -n 's/^ssh.*/& SECRET4711/p'
    echo -- password lightwhale --
    echo '*'
    echo -- etc/hostname --
    echo swarm01
    echo -- etc/long --
    yes '# SECRET4711' | head -n 3000
    echo -- end --
  } | dd of="$1" conv=notrunc iflag=fullblock status=none`;

/** What the owner's ssh says, and that of somebody who knows the password. */
const sshIn = `
  ip link set lo up
  mkdir -p /etc/dropbear
  dropbear -R -E -p 127.0.0.1:22 2>/run/dropbear.log
  login() { user=$1; shift; dbclient -y -y "$@" "$user@127.0.0.1" id -un </dev/null; }
  never() { if "$@"; then exit 1; fi; } # set -e does not see a "!"
  wait_for 60 grep -q ':0016 ' /proc/net/tcp
  export DROPBEAR_PASSWORD=lightwhale
  login guest | grep -qx guest # whom the payload does not name
  never login lightwhale
  login lightwhale -i /root/key | grep -qx lightwhale`;

/** All of vda but its first mebibyte, as LVM would show it. */
const dataVolume = `modprobe dm_mod
  size=$(($(cat /sys/block/vda/size) - 2048))
  echo "0 $size linear /dev/vda 2048" | dmsetup create data
  dmsetup mknodes
  [ -b /dev/mapper/data ]`;

/** The whole of vda as a device-mapper volume that can be made mute. */
const muteVolume = `modprobe dm_mod
  echo "0 $(cat /sys/block/vda/size) linear /dev/vda 0" | dmsetup create mute
  dmsetup mknodes`;

const dataOnWholeDisk: DiskBefore = {
  sizeMiB: 200,
  contents: 'mkfs.btrfs --quiet --label lightwhale-data "$1"',
};

/** The init script alone has made the system writable. */
const byInitScript = {
  ...volatile,
  mode: "fallback",
  status: 1,
  boots: "1 1 1 0", // Docker is held back
};

/** Opens these disks as a start script before S11 would, or makes them first. */
const encrypted = (open: string[], make: string[] = []) =>
  `modprobe -a dm_mod dm_crypt xts; export DM_DISABLE_UDEV=1
  printf secret >/tmp/key; set -- --batch-mode --key-file /tmp/key
  for disk in ${make.join(" ")}; do
    cryptsetup luksFormat "$@" --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/$disk
  done
  for disk in ${open.join(" ")}; do
    cryptsetup open "$@" /dev/$disk open-$disk
  done`;

const situations: Situation[] = [
  {
    name: "nothing is enabled: volatile, no disk is touched, 512 MiB, Nehalem",
    disks: [{ bystander: true }, emptyExt4, headerInPartition],
    boots: [
      {
        after: {
          ...volatile,
          marked: "",
          warnings: "/dev/vdc1 begins with the magic header, which counts " +
            "only at the start of a whole disk: it is not obeyed (a " +
            "partition is enabled with persistence.ts --enable /dev/vdc1)",
        },
        run: `grep -q Nehalem /proc/cpuinfo
          [ "$(awk '/MemTotal/ { print $2 }' /proc/meminfo)" -lt 524288 ]
          persistence.ts --status </dev/null`,
      },
    ],
  },
  { ...oneDiskOn("virtio", "vda"), everyTime: false },
  oneDiskOn("scsi", "sda"),
  { ...oneDiskOn("sata", "sda"), everyTime: false },
  oneDiskOn("nvme", "nvme0n1", { sectorBytes: 4096 }),
  oneDiskOn("usb", "sda"),
  { ...oneDiskOn("uas", "sda"), everyTime: false },
  {
    name: "first boot on an SD card, persistent at once",
    everyTime: false,
    // A power of two, as SD cards have; small, because QEMU erases by blocks.
    disks: [{ magic: true, bus: "sd", sizeMiB: 256 }],
    boots: [1, 2].map((n) => ({
      after: {
        ...single,
        swaps: 0,
        partitions: "mmcblk0: lightwhale-data",
        boots: boots(n),
      },
    })),
  },
  {
    name: "three reboots; running it again changes nothing",
    disks: [{ magic: true }, emptyExt4],
    boots: [
      {
        after: { ...single, boots: boots(1), partitions: dataDisks("vda") },
        run: `cat /proc/mounts /proc/swaps >/tmp/before
          persistence.ts
          cat /proc/mounts /proc/swaps | cmp /tmp/before -`,
      },
      { after: { ...single, boots: boots(2) } },
      {
        after: { ...single, boots: boots(3) },
        // As an old init script would call it.
        run: `cat /proc/mounts /proc/swaps >/tmp/before
          env -i /usr/sbin/persistence.ts <&-
          cat /proc/mounts /proc/swaps | cmp /tmp/before -`,
      },
      { after: { ...single, boots: boots(4) } },
    ],
  },
  {
    name: "RAID1 of two, on virtio-blk and NVMe",
    disks: [{ magic: true }, { magic: true, bus: "nvme" }],
    boots: [
      {
        after: {
          ...mirrored,
          boots: boots(1),
          partitions: dataDisks("nvme0n1", "vda"),
        },
      },
      { after: { ...mirrored, boots: boots(2) } },
    ],
  },
  {
    name: "RAID1 of three, on SCSI, SATA and USB",
    disks: [
      { magic: true, bus: "scsi" },
      { magic: true, bus: "sata" },
      { magic: true, bus: "usb" },
    ],
    boots: [1, 2].map((n) => ({
      append: `lightwhale.wait=${"9".repeat(1100)}`,
      after: {
        ...persistent,
        profiles: "raid1 raid1c3 raid1c3",
        swaps: 3,
        boots: boots(n),
        partitions: dataDisks("sda", "sdb", "sdc"),
        warnings: /^Cannot use lightwhale.wait="9{1100}"/,
      },
      run: "dmesg",
      logged: n === 1,
    })),
  },
  {
    name: "RAID1 of four, on virtio-blk, NVMe, SATA and SCSI",
    everyTime: false,
    disks: [
      { magic: true },
      { magic: true, bus: "nvme" },
      { magic: true, bus: "sata" },
      { magic: true, bus: "scsi" },
    ],
    boots: [1, 2].map((n) => ({
      after: {
        ...persistent,
        profiles: "raid1 raid1c4 raid1c4",
        swaps: 4,
        boots: boots(n),
        partitions: dataDisks("nvme0n1", "sda", "sdb", "vda"),
      },
    })),
  },
  {
    name: "--enable typed in a volatile system, then a reboot",
    disks: [{}, { bystander: true }],
    boots: [
      { after: volatile, run: "persistence.ts --enable /dev/vda" },
      { after: { ...single, boots: boots(1), partitions: dataDisks("vda") } },
    ],
  },
  {
    name: "a rented server: the system on partition 1, a magic partition 3",
    disks: [{ contents: rentedServer() }],
    boots: [1, 2].map((n) => ({
      append: "vm.root=/dev/vda1",
      after: {
        ...persistent,
        profiles: "single dup dup",
        swaps: 0,
        boots: boots(n),
        partitions: "vda: system spare lightwhale-data",
      },
      run: `cmp /dev/vda2 /dev/zero 2>&1 | grep -q 'EOF on /dev/vda2'
        findmnt -n -o SOURCE / | grep -qx /dev/vda1`,
    })),
  },
  {
    name: "a new system image whose /etc differs in every way, under old state",
    disks: [{ magic: true }],
    boots: [
      {
        after: { ...single, boots: boots(1) },
        image: () => etcImage("old"),
        run: `cd /etc/app
          echo mine >changed-by-me; rm removed-by-me; echo mine >added-by-me
          mv folder renamed; echo mine >file-later/mine`,
      },
      {
        after: { ...single, boots: boots(2) },
        image: () => etcImage("new"),
        run: `cd /etc/app
          grep -qx mine changed-by-me; grep -qx mine added-by-me
          [ ! -e removed-by-me ]; grep -qx old renamed/file
          grep -qx new changed; [ ! -e removed ]; grep -qx new added
          grep -qx new folder-later/file; grep -qx mine file-later/mine
          [ ! -s /run/errors ]; find /etc -type f -exec cat {} + >/dev/null
          echo again >>changed; rm added; mkdir added; echo x >folder-later/x`,
      },
      {
        after: { ...single, boots: boots(3) },
        image: () => etcImage("old"),
        run: `cd /etc/app; grep -qx again changed; grep -qx new changed
          [ -d added ]; grep -qx old folder/file || [ -d renamed ]
          find /etc -type f -exec cat {} + >/dev/null`,
      },
    ],
  },
  {
    name: "a payload: ssh with its key, not with the old password, from the " +
      "first boot; never applied again; found nowhere else",
    disks: [{ sizeMiB: 2100, contents: sshPayload }],
    boots: [
      {
        image: sshImage,
        after: { ...single, boots: boots(1), partitions: dataDisks("vda") },
        run: `${sshIn}
          [ "$(cat /etc/hostname)" = swarm01 ]
          stat -c '%a %u' /home/lightwhale/.ssh/authorized_keys | grep -qx '600 1000'
          persistence.ts --status | grep -q 'payload: applied .*password lightwhale'
          dmesg >/run/dmesg
          never grep -r SECRET /run/lightwhale /run/dmesg
          echo mine >/etc/hostname; rm /etc/long`,
      },
      {
        image: sshImage,
        after: { ...single, boots: boots(2) },
        whileOff: ([{ file }]) => assertOnlyInData(file, "SECRET4711"),
        run: `${sshIn}
          [ "$(cat /etc/hostname)" = mine ]; [ ! -e /etc/long ]`,
      },
    ],
  },
  {
    name: "lightwhale.persistence=off and noswap",
    disks: [{ magic: true }],
    boots: [
      {
        append: "lightwhale.persistence=off",
        after: { ...volatile, marked: "vda", partitions: "" },
      },
      { after: { ...single, boots: boots(1) } },
      {
        append: "noswap",
        after: { ...single, swaps: 0, boots: boots(2) },
      },
      { append: "lightwhale.persistence=off", after: volatile },
      {
        append: "lightwhale.swap=off",
        after: { ...single, swaps: 0, boots: boots(3) },
      },
    ],
  },
  {
    name: "an init script that protects from nothing: stdin closed, no PATH",
    disks: [{ magic: true }],
    boots: [1, 2].map((n) => ({
      append: "vm.stdin=closed",
      image: bareInitImage,
      after: { ...single, boots: boots(n) },
    })),
  },
  {
    name: "the user's start scripts, care of the disks, and an older processor",
    disks: [{ ...small, bus: "scsi" }, { sizeMiB: 64, bus: "scsi" }],
    boots: [
      {
        present: [0],
        after: { ...single, swaps: 0, boots: boots(1) },
        run: `cd /etc/init.d
          for name in S05user S50user; do
            printf '#!/bin/sh\necho "%s $1" >>/run/user\n' $name >$name
            chmod 755 $name
          done
          echo 'echo "S60user $1" >>/run/user' >S60user.sh`,
      },
      {
        late: 1,
        after: { ...single, swaps: 0, boots: boots(2) },
        run: `wait_for 20 grep -q S60 /run/user
          [ "$(tr '\n' ' ' </run/user)" = "S05user start S50user start S60user start " ]
          wait_for 60 background_is_done
          pid=$(cat /run/lightwhale/caretaker)
          for pid in $pid $(pgrep -P $pid); do grep ^Pss: /proc/$pid/smaps_rollup; done
          [ -z "$(. /etc/profile.d/persistence.sh)" ]
          # A run of --maintain writes it.
          rm /run/lightwhale/health
          echo @plug 1
          wait_for 60 test -e /run/lightwhale/health
          begun=$(cut -d . -f 1 /proc/uptime)
          /etc/init.d/S11persistence stop
          state=$data/lightwhale-state
          umount /home /var /etc $state-snapshots $state $data
          [ $(($(cut -d . -f 1 /proc/uptime) - begun)) -lt 30 ]`,
        on: { plug: (vm, [, disk]) => vm.plug(Number(disk)) },
      },
      {
        present: [0],
        cpu: "core2duo",
        after: { ...byInitScript, errors: /persistence.ts was killed/ },
        says: /persistence: .*persistence.ts was killed/,
        unchanged: ([{ file }]) => checksum(file),
        run: `. /etc/profile.d/persistence.sh 2>&1 | grep 'was killed'
          grep 'Docker is held back' $data/lightwhale-state/docker`,
      },
    ],
  },
  {
    name: "the program hangs while it mounts, and the mount ends later",
    everyTime: false,
    disks: [dataOnWholeDisk],
    boots: [{
      image: () =>
        failingImage("hanging", "mount -t btrfs /dev/mapper/mute $data"),
      before: `${muteVolume}; dmsetup suspend mute`,
      after: { ...byInitScript, errors: /did not end in 5 s/ },
      run: `dmsetup resume mute
        sleep 3 # and the mount ends, as it likes
        echo more >>/etc/file
        [ "$(stat -f -c %T $data)" = tmpfs ]
        grep 'Docker is held back' $data/lightwhale-state/docker`,
    }],
  },
  {
    name: "the program is not there",
    everyTime: false,
    disks: [{ ...small, bystander: true }],
    boots: [{
      image: () => failingImage("missing"),
      after: { ...byInitScript, marked: "vda", errors: /cannot be run/ },
    }],
  },
  {
    name: "a mirror's second disk appears when it is waited for",
    disks: [{ magic: true, bus: "scsi" }, { magic: true, bus: "scsi" }],
    boots: [
      { after: { ...mirrored, boots: boots(1) } },
      {
        after: { ...mirrored, boots: boots(2) },
        late: 1,
        on: {
          "start S11persistence": async (vm) => {
            if (!await vm.says(/Waiting for 1 missing/)) return;
            await new Promise((resolve) => setTimeout(resolve, 4000));
            await vm.plug(1);
          },
        },
      },
    ],
  },
  {
    name: "a mirror's second disk is pulled while the system runs",
    everyTime: false,
    disks: [{ magic: true, bus: "scsi" }, { magic: true, bus: "scsi" }],
    boots: [
      {
        after: { ...mirrored, boots: boots(1) },
        run: `echo @pull 1; sleep 3; [ "$(ls /dev/sd? | wc -l)" = 1 ]
          touch /etc/still-writable; sync`,
        on: { pull: (vm, [, disk]) => vm.pull(Number(disk)) },
      },
      {
        after: {
          ...atWork,
          swaps: 1, // the other disk's is turned on at the next boot
          boots: boots(2),
          warnings: /missed writes and is rebuilt$/,
        },
        run: "ls /etc/still-writable",
        settled: whole,
      },
    ],
  },
  {
    name: "a mirror's second disk is missing at two boots, then returns",
    disks: [small, small],
    boots: [
      {
        after: { ...mirroredSmall, boots: boots(1) },
        run: "keep whole 4; keep_in_place database 1",
      },
      {
        present: [0],
        append: "lightwhale.wait=1",
        after: { ...degraded, boots: boots(2) },
        // More than fits in the mirrored chunks.
        run: `keep degraded 4; keep_in_place database 1
          fallocate -l 48M $data/lightwhale-state/docker/reserved`,
      },
      {
        present: [0],
        append: "lightwhale.wait=1",
        after: {
          ...degraded,
          profiles: "single+raid1 raid1 raid1",
          boots: boots(3),
        },
        run: "keep degraded-again 4; keep_in_place database 1",
      },
      {
        after: {
          ...atWork,
          boots: boots(4),
          warnings: /degraded; \/dev\/vdb1 missed writes and is rebuilt$/,
        },
        run: "keep returned 4",
        settled: whole,
      },
      {
        present: [1],
        append: "lightwhale.wait=1",
        after: { ...degraded, boots: boots(5) },
      },
    ],
  },
  {
    name: "a magic disk takes a missing one's place, and a reset interrupts it",
    disks: [
      { ...small, bus: "scsi" },
      { ...small, bus: "scsi" },
      { ...small, bus: "scsi" },
    ],
    boots: [
      {
        present: [0, 1],
        after: { ...mirroredSmall, boots: boots(1) },
        run: "keep whole 24",
      },
      {
        present: [0, 2],
        append: "lightwhale.wait=1",
        after: { ...atWork, boots: boots(2), warnings: degraded.warnings },
        on: {
          "end S11persistence": (vm) => vm.throttle(1, 2 ** 20),
        },
        run: `keep degraded 1
          ${resetWhileReplacing}`,
        pullThePlug: true,
      },
      {
        present: [0, 2],
        append: "lightwhale.wait=1",
        after: {
          ...atWork,
          boots: boots(3),
          warnings: /degraded; \/dev\/sd[ab]1 is taking the missing place/,
        },
        says: /device replace goes on/,
        run: "keep replaced 4",
        settled: whole,
      },
    ],
  },
  {
    name: "a magic disk joins a single one: it becomes a mirror",
    everyTime: false,
    disks: [small, small],
    boots: [
      {
        present: [0],
        after: { ...single, swaps: 0, boots: boots(1) },
        run: "keep single 8",
      },
      {
        after: { ...atWork, boots: boots(2) },
        run: "keep joining 4",
        settled: whole,
      },
    ],
  },
  {
    name: "the data move from USB to NVMe under load; it boots from that alone",
    disks: [{ ...small, bus: "usb" }, { sizeMiB: 260, bus: "nvme" }],
    boots: [
      {
        after: { ...single, swaps: 0, boots: boots(1) },
        run: `keep before 24
          persistence.ts --move /dev/sda /dev/nvme0n1
          n=0
          until background_is_done; do
            n=$((n + 1))
            keep load$((n % 8)) 1
          done
          [ $n -gt 1 ]
          fills_disks
          [ -z "$(wipefs /dev/sda)" ]`,
        settled: {
          ...whole,
          profiles: "single dup dup",
          health: /^\/dev\/sda holds none .* can be pulled$/,
          alone: "yes",
        },
      },
      ...[[1], [0, 1]].map((present, n) => ({
        present,
        after: { ...single, swaps: 0, boots: boots(n + 2) },
        run: "keep after 4",
      })),
    ],
  },
  {
    name: "mirrors of four, three and two lose and change members",
    everyTime: false,
    disks: [
      ...Array(4).fill({ magic: true, sizeMiB: 1000 }),
      { sizeMiB: 1000 },
    ],
    boots: [
      {
        present: [0, 1, 2, 3],
        after: {
          ...persistent,
          profiles: "raid1 raid1c4 raid1c4",
          swaps: 0,
          boots: boots(1),
        },
        run: "keep four 24; persistence.ts --remove /dev/vda; sleep 2",
        settled: {
          ...whole,
          profiles: "raid1 raid1c3 raid1c3",
          health: /vda holds none/,
          alone: /^/,
        },
      },
      {
        present: [1, 2, 3, 4],
        after: {
          ...persistent,
          profiles: "raid1 raid1c3 raid1c3",
          swaps: 0,
          boots: boots(2),
        },
        run: "keep three 4; persistence.ts --move /dev/vda /dev/vdd; sleep 2",
        settled: {
          ...whole,
          profiles: "raid1 raid1c3 raid1c3",
          health: /vda holds none/,
          alone: /^/,
        },
      },
      {
        present: [2, 3, 4],
        after: {
          ...persistent,
          profiles: "raid1 raid1c3 raid1c3",
          swaps: 0,
          boots: boots(3),
        },
        run: "keep changed 4; persistence.ts --remove /dev/vda; sleep 2",
        settled: { ...whole, health: /vda holds none/ },
      },
      {
        present: [3, 4],
        after: { ...mirroredSmall, boots: boots(4) },
        run: "keep two 4; persistence.ts --remove /dev/vda",
      },
      {
        present: [3, 4],
        after: { ...atWork, boots: boots(5), warnings: "" },
        says: /leave \/dev\/vda1 out/,
        run: "keep one 4",
        settled: {
          ...whole,
          profiles: "single dup dup",
          health: /vda holds none/,
          alone: "yes",
        },
      },
      { present: [4], after: { ...single, swaps: 0, boots: boots(6) } },
    ],
  },
  {
    name: "disks with sectors of 512 and of 4096 bytes are enlarged",
    everyTime: false,
    disks: [small, { ...small, sectorBytes: 4096 }],
    boots: [
      {
        after: { ...mirroredSmall, boots: boots(1) },
        run: "keep before 4; fills_disks",
      },
      {
        whileOff: (disks) => disks.forEach(({ file }) => enlarge(file, 100)),
        after: { ...mirroredSmall, boots: boots(2) },
        run: "keep grown 4; fills_disks",
        settled: whole,
      },
      {
        after: { ...mirroredSmall, boots: boots(3) },
        unchanged: (disks) => disks.map(partitionTable).join(),
        run: "fills_disks",
      },
    ],
  },
  {
    name: "beside a copy of the data disk and another data filesystem",
    everyTime: false,
    disks: [
      small,
      { sizeMiB: 200 },
      {
        sizeMiB: 200,
        contents: 'mkfs.btrfs --quiet --label lightwhale-data "$1"',
        bystander: true,
      },
    ],
    boots: [
      {
        present: [0],
        after: { ...single, swaps: 0, boots: boots(1) },
        run: "keep first 4",
      },
      {
        whileOff: ([{ file }, copy]) => copyDisk(file, copy.file),
        after: {
          ...single,
          swaps: 0,
          boots: boots(2),
          warnings: besideOthers({
            ...{ used: "vda1", copy: "vdb1", other: "vdc" },
            isSame: true,
          }),
        },
        unchanged: ([, copy]) => checksum(copy.file),
        run: "keep second 4",
      },
      {
        present: [2, 1, 0],
        after: {
          ...single,
          swaps: 0,
          boots: boots(3),
          warnings: besideOthers({ used: "vdc1", copy: "vdb1", other: "vda" }),
        },
        unchanged: ([, copy]) => checksum(copy.file),
      },
    ],
  },
  {
    name:
      "a copy of a mirror's second disk is plugged in, then that disk itself",
    everyTime: false, // CI has it on loop devices
    disks: [
      { ...small, serial: "first" },
      { ...small, serial: "second" },
      { sizeMiB: 200, serial: "third" },
    ],
    boots: [
      {
        present: [0, 1],
        after: { ...mirroredSmall, boots: boots(1) },
        run: "keep whole 4; keep_in_place database 1",
      },
      {
        whileOff: ([, { file }, copy]) => copyDisk(file, copy.file),
        present: [0],
        append: "lightwhale.wait=1",
        after: { ...degraded, boots: boots(2) },
        run: "keep degraded 4; keep_in_place database 1",
      },
      {
        present: [0, 2],
        append: "lightwhale.wait=1",
        after: {
          ...mirroredSmall,
          profiles: /^/,
          boots: boots(3),
          warnings: /\/dev\/vdb\d? .*\bcopy\b/,
        },
        unchanged: ([, , copy]) => checksum(copy.file),
        run: `grep -q '"degraded": *true' /run/lightwhale/persistence.json
          keep degraded-again 4; keep_in_place database 1
          sleep 5 # whatever is done in the background has begun`,
      },
      {
        present: [0, 1],
        after: {
          ...atWork,
          boots: boots(4),
          warnings: /\/dev\/vdb1 missed writes and is rebuilt/,
        },
        settled: whole,
      },
    ],
  },
  {
    name: "a mirror's second disk comes back together with an older copy of it",
    everyTime: false,
    disks: [
      { ...small, serial: "first" },
      { ...small, serial: "second" },
      { sizeMiB: 200, serial: "third" },
    ],
    boots: [
      {
        present: [0, 1],
        after: { ...mirroredSmall, boots: boots(1) },
        run: "keep whole 4; keep_in_place database 1",
      },
      {
        whileOff: ([, { file }, copy]) => copyDisk(file, copy.file),
        present: [0],
        append: "lightwhale.wait=1",
        after: { ...degraded, boots: boots(2) },
        run: "keep degraded 4; keep_in_place database 1",
      },
      {
        present: [2, 0, 1],
        after: {
          ...atWork,
          boots: boots(3),
          warnings:
            /^(?=[^]*\/dev\/vda\d? .*\bcopy\b)[^]*\/dev\/vdc1 .*rebuilt/,
        },
        unchanged: ([, , copy]) => checksum(copy.file),
        settled: { ...whole, health: /^/ },
      },
    ],
  },
  {
    name: "another machine's data disk, mounted more often, beside one's own",
    disks: [{ ...small, serial: "own" }, { ...small, serial: "other" }],
    boots: [
      ...[1, 2].map((n): Step => ({
        uuid: anotherMachine,
        present: [1],
        after: { ...single, swaps: 0, boots: boots(n) },
      })),
      {
        uuid: thisMachine,
        present: [0],
        after: { ...single, swaps: 0, boots: boots(1) },
        run: "keep own 4",
      },
      {
        uuid: thisMachine,
        present: [1, 0],
        after: {
          ...single,
          swaps: 0,
          boots: boots(2),
          warnings: /\/dev\/vda1\b.* not touched/,
        },
        unchanged: ([, other]) => checksum(other.file),
        run: `findmnt -n -o SOURCE $data | grep -q '^/dev/vdb1'`,
      },
    ],
  },
  {
    name:
      "data disks of two other machines: the one mounted more often is used",
    everyTime: false,
    disks: [{ ...small, serial: "once" }, { ...small, serial: "twice" }],
    boots: [
      {
        uuid: thisMachine,
        present: [0],
        after: { ...single, swaps: 0, boots: boots(1) },
      },
      ...[1, 2].map((n): Step => ({
        uuid: anotherMachine,
        present: [1],
        after: { ...single, swaps: 0, boots: boots(n) },
        run: `keep twice-${n} 4`,
      })),
      {
        // Neither is its own, and it has no name either.
        after: {
          ...single,
          swaps: 0,
          boots: boots(3),
          warnings: /\/dev\/vda1\b.* not touched/,
        },
        unchanged: ([once]) => checksum(once.file),
      },
    ],
  },
  {
    ...onTwoPaths({ serial: "", wwn: 6e18 }),
    name: "a magic disk on two paths, with one world wide name",
  },
  {
    ...onTwoPaths({ serial: "" }),
    name: "a magic disk on two paths, and nothing but the bytes tells",
    everyTime: false,
  },
  {
    ...onceUsed({ sizeMiB: 700, held: "vda3" }),
    name: "a used magic disk whose old partition is held for five seconds",
  },
  {
    // The new swap partition begins where the old one did, and is larger.
    ...onceUsed({ sizeMiB: 64, held: "vda1" }),
    name: "a used magic disk whose first partition is held for five seconds",
    everyTime: false,
  },
  {
    name: "the data are on a device-mapper volume, and a magic disk joins",
    disks: [
      {
        sizeMiB: 200,
        contents: `truncate -s 199M "$1.data"
          mkfs.btrfs --quiet --label lightwhale-data "$1.data"
          dd if="$1.data" of="$1" bs=1M seek=1 conv=notrunc status=none`,
      },
      small,
    ],
    boots: [
      {
        present: [0],
        before: dataVolume,
        after: { ...single, swaps: 0, boots: boots(1) },
        run: `findmnt -n -o SOURCE $data | grep -q '^/dev/mapper/data'
          persistence.ts --status | tee /tmp/status
          grep -qi persistent /tmp/status
          [ -z "$(grep -i volatile /tmp/status)" ]
          cat /proc/mounts >/tmp/before
          persistence.ts 2>&1 | grep -i 'set up already'
          cmp /proc/mounts /tmp/before
          keep single 8`,
      },
      {
        before: dataVolume,
        after: { ...atWork, boots: boots(2) },
        run: "keep joining 4",
        settled: whole,
      },
    ],
  },
  {
    name: "disks inside LUKS: found, mirrored by hand, grown; closed: expected",
    everyTime: false,
    disks: [{ sizeMiB: 600 }, { sizeMiB: 600 }],
    boots: [
      {
        before: `${encrypted(["vda"], ["vda"])}
          mkfs.btrfs -q --label lightwhale-data /dev/mapper/open-vda`,
        after: { ...single, swaps: 0, partitions: "", boots: boots(1) },
        run: "keep first 8",
      },
      {
        before: encrypted(["vda", "vdb"], ["vdb"]),
        after: { ...single, swaps: 0, boots: boots(2) },
        run: `btrfs device add -f /dev/mapper/open-vdb $data
          btrfs balance start -dconvert=raid1 -mconvert=raid1 $data
          keep second 8`,
      },
      {
        whileOff: (disks) =>
          disks.forEach(({ file }) => Deno.truncateSync(file, 700 * 2 ** 20)),
        before: encrypted(["vda", "vdb"]),
        after: { ...mirroredSmall, boots: boots(3) },
        run: `btrfs filesystem show --raw $data | tee /run/sizes
          [ "$(grep -c "size $((684 << 20)) " /run/sizes)" = 2 ]`,
        settled: whole,
      },
      {
        append: "lightwhale.persistence=required lightwhale.wait=1",
        after: { mode: "fallback", status: 1, type: "tmpfs" },
      },
    ],
  },
  {
    name: "the disk that names a running mirror in /proc/mounts is pulled",
    disks: [{ ...small, bus: "scsi" }, { ...small, bus: "scsi" }],
    boots: [
      {
        after: { ...mirroredSmall, boots: boots(1) },
        run: `named=$(findmnt -n -o SOURCE $data | sed 's|/dev/||; s|[0-9].*||')
          serial=$(tail -c +5 /sys/block/$named/device/vpd_pg80)
          is_gone() { [ ! -e /sys/block/$named ]; }
          echo "@pull \${serial#disk}"; wait_for 10 is_gone
          touch /etc/still-writable; sync
          persistence.ts --status | tee /tmp/status
          grep -qi persistent /tmp/status
          [ -z "$(grep -i -e volatile -e healthy /tmp/status)" ]
          grep -qi -e missing -e lacks /tmp/status`,
        on: { pull: (vm, [, disk]) => vm.pull(Number(disk)) },
        pullThePlug: true,
      },
    ],
  },
  {
    name:
      "a pulled member is noticed, and a magic disk takes its place at once",
    disks: [0, 1, 2].map(() => ({ ...small, bus: "scsi" })),
    boots: [
      {
        late: 2,
        after: { ...mirroredSmall, boots: boots(1) },
        run: `${pulledAndReplaced}
          ${wellAgain}
          persistence.ts --check persistent`,
        on: pullAndPlug,
        settled: whole,
      },
    ],
  },
  {
    name: "a magic disk takes a pulled one's place, and a reset interrupts it",
    everyTime: false,
    disks: [0, 1, 2].map(() => ({ ...small, bus: "scsi" })),
    boots: [
      {
        late: 2,
        after: { ...mirroredSmall, boots: boots(1) },
        run: `${pulledAndReplaced}
          ${resetWhileReplacing}`,
        on: pullAndPlugSlowly,
        pullThePlug: true,
      },
      {
        present: [0, 2],
        append: "lightwhale.wait=1",
        after: {
          ...atWork,
          boots: boots(2),
          warnings: /degraded; \/dev\/sd[ab]1 is taking the missing place/,
        },
        run: "keep replaced 4",
        settled: whole,
      },
    ],
  },
  {
    name: "a pulled member comes back, and is rebuilt at once",
    disks: [0, 1].map(() => ({ ...small, bus: "scsi" })),
    boots: [{
      after: { ...mirroredSmall, boots: boots(1) },
      run: `${pulled}
        echo @plug 1; wait_for 10 disks_are 2
        keep plugged 4; keep_in_place database 1
        ${wellAgain}`,
      on: pullAndPlug,
      settled: whole,
    }],
  },
  {
    name: "a pulled member comes back, and a reset interrupts its rebuild",
    everyTime: false,
    disks: [0, 1].map(() => ({ ...small, bus: "scsi" })),
    boots: [
      {
        after: { ...mirroredSmall, boots: boots(1) },
        run: `${pulled}
          echo @plug 1; wait_for 10 disks_are 2
          ${resetWhileReplacing}`,
        on: pullAndPlugSlowly,
        pullThePlug: true,
      },
      {
        append: "lightwhale.wait=1",
        after: {
          ...atWork,
          boots: boots(2),
          warnings: /degraded; \/dev\/sd[ab]1 is taking the missing place/,
        },
        run: "keep replaced 4",
        settled: whole,
      },
    ],
  },
  {
    name: "a scrub leaves two thirds of a hard disk's random reads",
    everyTime: false,
    disks: [{
      sizeMiB: 2000,
      trouble: hardDisk(),
      contents: `mkdir "$1.root"
        head -c 800M /dev/urandom >"$1.root/large"
        mkfs.btrfs -q --label lightwhale-data --rootdir "$1.root" "$1"
        rm -r "$1.root"`,
    }],
    boots: [{
      after: { ...single, swaps: 0, boots: boots(1) },
      run: `mkdir /run/top; mount -o subvolid=5 /dev/vda /run/top
        reads() {
          echo 3 >/proc/sys/vm/drop_caches
          BUN_BE_BUN=1 persistence.ts -e '
            const fs = require("fs"), file = fs.openSync("/run/top/large");
            const buffer = Buffer.alloc(4096), seconds = 20;
            const end = performance.now() + 1000 * seconds;
            let reads = 0;
            for (; performance.now() < end; reads++) {
              const at = 4096 * Math.floor(200_000 * Math.random());
              fs.readSync(file, buffer, 0, 4096, at);
            }
            console.log(Math.round(reads / seconds))'
        }
        is_at_work() { btrfs scrub status $data | grep -q running; }
        before=$(reads)
        : >$data/lightwhale-state/.pending-scrub
        persistence.ts --maintain & wait_for 60 is_at_work
        during=$(reads); is_at_work
        btrfs scrub status $data
        limit=$(cat /sys/fs/btrfs/*-*/devinfo/1/scrub_speed_max)
        btrfs scrub cancel $data; wait
        after=$(reads)
        echo "@measured $before reads a second, $during during a scrub with" \
          "at most $limit bytes a second, $after after it"
        [ $((3 * during)) -ge $((2 * before)) ]`,
      on: { measured: (_, words) => console.log(words.join(" ")) },
    }],
  },
  {
    name: "half of a mirror has a bad spot: repaired, said once, forgotten",
    everyTime: false,
    disks: [small, { ...small, trouble: isBad.trouble }],
    boots: [{
      after: { ...mirroredSmall, boots: boots(1) },
      run: `${onHealth}
        keep both 70; echo 3 >/proc/sys/vm/drop_caches
        echo @spoil; sleep 1
        : >$data/lightwhale-state/.pending-scrub
        persistence.ts --maintain; persistence.ts --maintain
        tee /dev/stderr </run/lightwhale/health | grep \
          '/dev/vdb1 had errors ([1-9][0-9]* read.*); the scrub of .* repaired'
        [ "$(wc -l </run/lightwhale/health) $(grep -c ^-- /run/told)" = "1 1" ]
        btrfs device stats --reset $data
        persistence.ts --maintain
        [ ! -s /run/lightwhale/health ]
        [ "$(grep -c ^-- /run/told)" = 2 ]`,
      on: { spoil: () => isBad.spoil() },
      settled: whole,
    }],
  },
  {
    name: "the kernel makes the data read-only: said once, until a reboot",
    everyTime: false,
    disks: [{ ...small, trouble: losesWrites.trouble }],
    boots: [
      {
        after: { ...single, swaps: 0, boots: boots(1) },
        run: `${onHealth}
          keep before 8; sync
          echo @spoil; sleep 1
          touch /etc/lost; sync || true
          is_read_only() { grep -q " $data btrfs ro," /proc/mounts; }
          wait_for 60 is_read_only
          persistence.ts --maintain || true; persistence.ts --maintain || true
          cat /run/lightwhale/health
          grep 'is read-only: the kernel found an error' /run/lightwhale/health
          [ "$(grep -c ^-- /run/told)" = 1 ]
          persistence.ts --check | grep '^PERSISTENCE CRITICAL.*read-only'`,
        on: { spoil: () => losesWrites.spoil() },
        pullThePlug: true,
      },
      {
        whileOff: () => losesWrites.spoil(false),
        after: { ...single, swaps: 0, boots: boots(2) },
        run: `persistence.ts --maintain
          [ ! -s /run/lightwhale/health ]`,
      },
    ],
  },
  {
    name: "a disk that nobody can read, beside one that is enabled by force",
    everyTime: false,
    disks: [{ sizeMiB: 64, fails: { io: "read" } }, small],
    boots: [
      {
        after: {
          ...volatile,
          mode: "fallback",
          status: 1,
          marked: "vdb",
          warnings: /^/,
          errors: /^(?=[^]*\/dev\/vda\b)[^]*\/dev\/vdb\b/,
        },
        says: /lightwhale-anyway|--enable --force/, // the way out
        run: `persistence.ts --enable --force /dev/vdb
          head -c 512 /dev/vdb | sed -n 2p | grep -qx lightwhale-anyway`,
      },
      {
        after: {
          ...single,
          swaps: 0,
          boots: boots(1),
          partitions: "vdb: lightwhale-data",
          warnings: /\/dev\/vda\b/,
        },
      },
    ],
  },
  {
    name: "a disk that nobody can read, beside a header and lightwhale-anyway",
    everyTime: false,
    disks: [
      { sizeMiB: 64, fails: { io: "read" } },
      {
        sizeMiB: 200,
        contents:
          `printf '%s\\n' lightwhale-please-format-me lightwhale-anyway |
          dd of="$1" conv=notrunc status=none`,
      },
    ],
    boots: [1, 2].map((n) => ({
      after: {
        ...single,
        swaps: 0,
        boots: boots(n),
        partitions: "vdb: lightwhale-data",
        warnings: /\/dev\/vda\b/,
      },
    })),
  },
  {
    name: "a USB disk whose driver takes long to bring it up",
    disks: [{ magic: true, bus: "usb" }],
    boots: [{
      // Longer than the kernel needs to get to S11persistence, if it is busy.
      append: "usb_storage.delay_use=20 lightwhale.wait=60",
      after: { ...single, boots: boots(1) },
    }],
  },
  {
    name: "the data are on a USB disk that takes long, and a disk is magic",
    disks: [{ ...small, bus: "usb" }, small],
    boots: [
      {
        present: [0],
        append: "usb_storage.delay_use=20 lightwhale.wait=60",
        after: { ...single, swaps: 0, boots: boots(1) },
        run: "keep single 8",
      },
      {
        append: "usb_storage.delay_use=20 lightwhale.wait=60",
        after: { ...atWork, boots: boots(2) },
        settled: whole,
      },
    ],
  },
  {
    name: "32 disks, two of them magic",
    disks: Array.from(
      { length: 32 },
      (_, i): DiskBefore =>
        i === 7 || i === 30
          ? { magic: true, bus: "scsi" }
          : { bystander: true, sizeMiB: 8, bus: "scsi" },
    ),
    boots: [1, 2].map((n) => ({
      after: { ...mirrored, boots: boots(n) },
    })),
  },
  {
    name: "32 magic disks",
    everyTime: false,
    disks: Array.from({ length: 32 }, (): DiskBefore => ({
      magic: true,
      bus: "scsi",
      sizeMiB: 2100,
    })),
    boots: [1, 2].map((n) => ({
      after: {
        ...persistent,
        profiles: "raid1 raid1c4 raid1c4",
        swaps: 16, // the kernel has room for 23 or more (MAX_SWAPFILES)
        boots: boots(n),
      },
      withinMs: 240_000,
    })),
  },
];

for (const situation of situations) {
  if (!all && situation.everyTime === false) continue;
  Deno.test(`boot: ${situation.name}`, async () => {
    const dir = Deno.makeTempDirSync({ prefix: "persistence-boot-" });
    try {
      await runSituation(situation, dir);
    } finally {
      Deno.removeSync(dir, { recursive: true });
    }
  });
}

async function runSituation(situation: Situation, dir: string): Promise<void> {
  const disks = situation.disks.map((before, i) => makeBefore(before, i, dir));
  const bystanders = disks.filter((_, i) => situation.disks[i].bystander);
  const sums = bystanders.map(({ file }) => checksum(file));
  const kept: Sums = new Map();

  for (const [i, step] of situation.boots.entries()) {
    const { present = [...disks.keys()], unchanged = () => "" } = step;
    step.whileOff?.(disks);
    const before = unchanged(disks);
    const boot = await bootVm({
      ...situation,
      ...step,
      disks: present.map((disk, i) => ({
        ...disks[disk],
        late: step.late === i,
      })),
      image: step.image?.(),
      check: lookAndRun(step, kept),
    });
    assertBoot(boot, step, `boot ${i + 1}`);
    assertEquals(unchanged(disks), before, `boot ${i + 1}`);
    if (step.logged) assertLogged(boot);
    for (const [name, sum] of keptIn(boot)) kept.set(name, sum);
  }
  assertEquals(bystanders.map(({ file }) => checksum(file)), sums);
}

/** The kernel takes no more than ten messages at a time, nor long ones whole. */
function assertLogged({ console, checkOutput }: Boot): void {
  const log = checkOutput.replaceAll(/\.{3}\n.*\] persistence: \.{3}/g, "");
  const said = console.match(/^persistence: .*$/gm) ?? [];
  assert(said.length > 10 && said.some(({ length }) => length > 1024), console);
  for (const line of said) assert(log.includes(`] ${line}\n`), line + log);
}

function makeBefore(before: DiskBefore, i: number, dir: string): VmDisk {
  // The hardware stays what it is, whichever other disks are present.
  const { serial = `disk${i}`, path } = before;
  if (path !== undefined) {
    return { ...before, serial, file: `${dir}/disk${path}.img` };
  }
  const { magic, contents, bystander, ...disk } = before;
  const { sizeMiB = bystander ? 64 : 3000 } = before;
  const file = makeDisk(`${dir}/disk${i}.img`, { sizeMiB, magic });
  if (contents) {
    execFileSync("sh", ["-euc", contents, "sh", file], {
      env: { ...Deno.env.toObject(), SYSTEM: systemImage() },
      stdio: "pipe",
    });
  }
  return { ...disk, serial, file };
}

function checksum(file: string): string {
  return execFileSync("sha256sum", [file]).toString();
}

/** The sectors before the first partition and behind the last. */
function partitionTable({ file, sectorBytes = 512 }: VmDisk): string {
  const bytes = Deno.readFileSync(file);
  const behind = 16384 + sectorBytes;
  return createHash("sha256").update(bytes.subarray(0, 2 ** 20))
    .update(bytes.subarray(-behind)).digest("hex");
}

function enlarge(file: string, mebibytes: number): void {
  Deno.truncateSync(file, Deno.statSync(file).size + mebibytes * 2 ** 20);
}

function copyDisk(from: string, to: string): void {
  execFileSync("cp", ["--sparse=always", from, to]);
}

/** What the console says of the data filesystems that are not used. */
function besideOthers(
  { used, copy, other, isSame = false }: {
    used: string;
    copy: string;
    other: string;
    /** Nothing was written to either since the copy was made. */
    isSame?: boolean;
  },
): RegExp {
  const is = isSame
    ? `is /dev/${used} on another path, or holds exactly the same:`
    : `is a copy of /dev/${used},`;
  return new RegExp(
    `on /dev/${used} is used, \\S+ on /dev/${other} is not touched.*\n` +
      `/dev/${copy} ${is}.*/dev/${copy} is not touched`,
  );
}

function rentedServer(): string {
  return `printf '%s\n' 'size=512MiB, name=system' 'size=32MiB, name=spare' \
      'name=lightwhale-please-format-me' | sfdisk -q --label gpt "$1"
    dd if="$SYSTEM" of="$1" bs=1M seek=1 conv=notrunc \
      status=none`;
}

/** A system image with a key, and two users with a well-known password. */
function sshImage(): string {
  const files = {
    "etc/passwd": "root::0:0:root:/root:/bin/sh\n" +
      "lightwhale:x:1000:1000:Lightwhale:/home/lightwhale:/bin/sh\n" +
      "guest:x:1001:1001:Guest:/tmp:/bin/sh\n",
    "etc/shadow": `root::::::::\nlightwhale:${password}:::::::\n` +
      `guest:${password}:::::::\n`,
  };
  Deno.mkdirSync(`${sshChanges}/etc`, { recursive: true });
  for (const [file, text] of Object.entries(files)) {
    Deno.writeTextFileSync(`${sshChanges}/${file}`, text);
  }
  return systemImage({ name: "ssh", changes: sshChanges });
}

/** A text is in the data partition, and nowhere else on a disk. */
function assertOnlyInData(file: string, text: string): void {
  const script = `
    set -- "$1" "$2" $(sfdisk --dump "$1" |
      sed -n 's/.*start= *\\([0-9]*\\), size= *\\([0-9]*\\),.*lightwhale-data.*/\\1 \\2/p')
    count() { grep -a -c -e "$1" || :; }
    head -c $(($3 * 512)) "$1" | count "$2"
    tail -c "+$((($3 + $4) * 512 + 1))" "$1" | count "$2"
    tail -c "+$(($3 * 512 + 1))" "$1" | grep -a -q -e "$2"`;
  const counts = execFileSync("sh", ["-euc", script, "sh", file, text], {
    encoding: "utf8",
  });
  assertEquals(counts, "0\n0\n");
}

/** A system image with another /etc/app. */
function etcImage(version: "old" | "new"): string {
  const dir = `${here}cache/etc-${version}`;
  const app = `${dir}/etc/app`;
  const files: Record<"old" | "new", string[]> = {
    old: [
      ...["changed-by-me", "removed-by-me", "changed", "removed"],
      ...["folder/file", "folder-later", "file-later/file"],
    ],
    new: [
      ...["changed-by-me", "removed-by-me", "changed", "added"],
      ...["other/1", "other/2", "folder-later/file", "file-later"],
    ],
  };
  for (const file of files[version]) {
    Deno.mkdirSync(dirname(`${app}/${file}`), { recursive: true });
    Deno.writeTextFileSync(`${app}/${file}`, `${version}\n`);
  }
  return systemImage({ name: `etc-${version}`, changes: dir });
}

/** A system image whose S11persistence calls the tool and nothing else. */
function bareInitImage(): string {
  const dir = `${here}cache/bare-init`;
  const script = `${dir}/etc/init.d/S11persistence`;
  Deno.mkdirSync(`${dir}/etc/init.d`, { recursive: true });
  Deno.writeTextFileSync(
    script,
    "#!/bin/sh\nunset PATH\nexec /usr/sbin/persistence.ts\n",
    { mode: 0o755 },
  );
  return systemImage({ name: "bare-init", changes: dir });
}

/**
 * A system image whose program is a script, or is not there; it has 5 seconds.
 */
function failingImage(name: string, script?: string): string {
  const dir = `${here}cache/${name}`;
  const program = `${dir}/usr/sbin/persistence.ts`;
  const s11 = `${dir}/etc/init.d/S11persistence`;
  for (const path of [program, s11]) {
    Deno.mkdirSync(dirname(path), { recursive: true });
  }
  if (script === undefined) Deno.writeTextFileSync(`${program}.removed`, "");
  else {
    const start = "#!/bin/sh\ndata=/mnt/lightwhale-data\n[ $# = 0 ] || exit\n";
    Deno.writeTextFileSync(program, start + script, { mode: 0o755 });
  }
  const original = Deno.readTextFileSync(`${here}../S11persistence`);
  const shortened = original.replace(/^boot_seconds=.*/m, "boot_seconds=5");
  Deno.writeTextFileSync(s11, shortened, { mode: 0o755 });
  return systemImage({ name, changes: dir });
}
