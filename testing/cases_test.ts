/**
 * Situations from the field: who a disk is, and what it holds. Each is a
 * collection of disks before a boot, what happens to them, and what the boot
 * must make of it. Nothing but the disks that a situation says are used may
 * change: all others are compared by their checksums.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import {
  type Boot,
  command,
  type Disk,
  type DiskSpec,
  header,
  isMarked,
  magic,
  MiB,
  onDisks,
  type Report,
  type System,
  type SystemOptions,
} from "./system.ts";

/** Small: too small for a swap partition. */
const magicDisk: DiskSpec = { sizeBytes: 600 * MiB, contents: header };
const blankDisk: DiskSpec = { sizeBytes: 600 * MiB };

/** What the scripts below have in common. */
const tools = `
put() { # stdin, to a place on a device
  dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}
old() { # a data filesystem that a person made
  mkfs.btrfs -q -K -f -L lightwhale-data "$@"
}
mbr() { # as scripts write it, that wipe nothing
  echo "$2" | sfdisk -q --no-tell-kernel --wipe never -X dos "$1"
  partx -u "$1"
}
gpt() { # lines for sfdisk
  disk=$1; shift
  printf '%s\\n' "label: gpt" "$@" |
    sfdisk -q --no-tell-kernel --wipe never --wipe-partitions never "$disk"
  partx -u "$disk"
}
luks() {
  echo secret | cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 \\
    --pbkdf-force-iterations 1000 "$@" -
}
sizeof() { blockdev --getsize64 "$1"; }
le64() {
  n=$1
  for _ in 1 2 3 4 5 6 7 8; do
    printf "\\\\$(printf %o $((n & 255)))"; n=$((n >> 8))
  done
}
md10() { # the superblock of an md array at the end; the kernel here has no md
  at=$((($(sizeof "$1") & ~4095) - 8192))
  printf '\\374\\116\\053\\251\\001\\0\\0\\0' | put "$1" $at
  le64 $((at / 512)) | put "$1" $((at + 144))
}
md090() {
  at=$((($(sizeof "$1") & ~65535) - 65536))
  printf '\\374\\116\\053\\251\\0\\0\\0\\0\\132\\0\\0\\0' | put "$1" $at
}
isw() {
  printf 'Intel Raid ISM Cfg Sig. 1.1.00' | put "$1" $(($(sizeof "$1") - 1024))
}
ddf() {
  at=$(($(sizeof "$1") - 512))
  printf '\\336\\021\\336\\021' | put "$1" $at
  printf 'LSI' | put "$1" $((at + 8))
  printf '01.00.00' | put "$1" $((at + 32))
}
start() { # of a device that was made elsewhere
  dd if="$1" of="$2" bs=1M count=1 conv=notrunc status=none
}
`;

/** Disks, what happens to them, and what a boot must make of it. */
interface Situation {
  disks: SystemOptions["disks"];
  needs?: string[];
  cmdline?: string;
  /** For each boot before: the numbers of the disks that are there. */
  earlier?: number[][];
  /** A shell script that runs then, with the disks as $1, $2 …. */
  then?: string;
  /** What happens to the images meanwhile, with them as $1, $2 …. */
  whileOff?: string;
  /** With which size of its sectors the first disk comes back. */
  sectorBytes?: 512 | 4096;
  /** A shell script that must say the same before the boot and after it. */
  keeps?: string;
  mode?: Report["mode"] | "not persistent";
  status?: number;
  /** Numbers of the disks that are used, from 1 on; all others stay. */
  uses?: number[];
  /** Numbers of others that may change. */
  mayChange?: number[];
  /** Is what the earlier boots wrote gone? */
  anew?: boolean;
  /** What stderr must match; %1 is the path of the first disk. */
  says?: string[];
  /** What it must not match. */
  neverSays?: string[];
  also?: (system: System, boot: Boot) => unknown;
}

function situation(name: string, before: Situation): void {
  const { disks, needs, cmdline } = before;
  onDisks(name, { disks, needs, cmdline }, async (system) => {
    await play(system, before);
  });
}

/** Lets it happen, boots, and compares. */
async function play(system: System, expected: Situation): Promise<Boot> {
  const { disks } = system;
  const only = (numbers: number[]) =>
    disks.filter((_, n) => !numbers.includes(n + 1));
  for (const [n, there] of expected.earlier?.entries() ?? []) {
    if (n > 0 || there.length < disks.length) {
      await system.reboot({ without: only(there) });
    }
    await bootPersistent(system);
    await system.sh("test -e etc/precious || echo precious > etc/precious");
  }
  if (expected.earlier || expected.whileOff || expected.sectorBytes) {
    await system.reboot({
      whileOff: async () => {
        disks[0].sectorBytes = expected.sectorBytes ?? disks[0].sectorBytes;
        await onImages(disks, expected.whileOff ?? ":");
      },
    });
  }
  await onDevices(disks, expected.then ?? ":");

  const mayChange = [...expected.uses ?? [], ...expected.mayChange ?? []];
  const bystanders = only(mayChange);
  const before = await Promise.all(bystanders.map(system.checksum));
  const kept = await onDevices(disks, expected.keeps ?? ":");
  const boot = await system.boot(["--wait", "0"]);
  await idle(system);
  assertEquals(
    await onDevices(disks, expected.keeps ?? ":"),
    kept,
    boot.stderr,
  );
  for (const [n, sum] of before.entries()) {
    const { path } = bystanders[n];
    const now = await system.checksum(bystanders[n]);
    assertEquals(now, sum, `${path} changed: ${boot.stderr}`);
  }
  assertUsed(system, boot, expected);
  if (boot.report.mode === "persistent" && expected.earlier) {
    const found = await system.sh("cat etc/precious 2>/dev/null || echo none");
    assertEquals(found, expected.anew ? "none\n" : "precious\n", boot.stderr);
  }
  await expected.also?.(system, boot);
  assertSaid(system, boot, expected);
  return boot;
}

function assertUsed(
  { disks }: System,
  { status, report, stderr }: Boot,
  expected: Situation,
): void {
  const { mode, status: code } = expected;
  if (mode === "not persistent") {
    assert(report.mode !== "persistent", `It is persistent: ${stderr}`);
  } else if (mode) assertEquals(report.mode, mode, stderr);
  if (code !== undefined) assertEquals(status, code, stderr);
  if (expected.uses && report.mode === "persistent") {
    const used = disks.map((_, n) => n + 1).filter((n) =>
      report.devices.some((device) => isPartOf(device, disks[n - 1]))
    );
    assertEquals(used, expected.uses, stderr);
  }
}

function assertSaid(
  { disks }: System,
  { stderr }: Boot,
  { says = [], neverSays = [] }: Situation,
): void {
  const named = (pattern: string) =>
    new RegExp(
      pattern.replace(/%(\d)/g, (_, digit) => disks[Number(digit) - 1].path),
      "i",
    );
  for (const pattern of says) {
    assertMatch(stderr, named(pattern));
  }
  for (const pattern of neverSays) {
    assert(!named(pattern).test(stderr), `It says ${pattern}: ${stderr}`);
  }
}

const isPartOf = (device: string, { path }: Disk) =>
  path !== "" && (device === path || device.startsWith(`${path}p`));

// A1: a superblock that something newer contradicts.

/** What came over an old filesystem of ours on the whole of $1. */
const newer: Record<string, { script: string; needs?: string[] }> = {
  "an MBR and ext4": {
    script: `mbr "$1" 'start=2048, type=83'
      mkfs.ext4 -q -E nodiscard -L photos "$1"p1`,
  },
  "an MBR and XFS": {
    script: `mbr "$1" 'start=2048, type=83'; mkfs.xfs -q -K -L photos "$1"p1`,
    needs: ["mkfs.xfs"],
  },
  "a GPT and LUKS2": {
    script: `gpt "$1" 'name=photos'; luks "$1"p1`,
    needs: ["cryptsetup"],
  },
  "md with its superblock at the end": { script: 'md10 "$1"' },
  "an Intel RAID with its metadata at the end": { script: 'isw "$1"' },
};

const oldDisk: DiskSpec = {
  sizeBytes: 600 * MiB,
  contents: `${tools} old "$DISK"`,
};

for (const [what, { script, needs }] of Object.entries(newer)) {
  situation(`${what} over an old data filesystem: it is not ours`, {
    disks: [oldDisk],
    needs,
    then: script,
    mode: "not persistent",
    says: ["%1"],
  });
  situation(
    `${what} over a data filesystem that was used: nothing else is formatted`,
    {
      disks: [oldDisk, magicDisk],
      needs,
      earlier: [[1]],
      then: script,
      mode: "fallback",
      status: 1,
      says: ["%1", "%2"],
    },
  );
}

for (const end of ["md10", "md090"]) {
  situation(`a data partition became a member of md (${end}): it is not ours`, {
    disks: [magicDisk],
    earlier: [[1]],
    then: `partx -u "$1"; ${end} "$1"p1`,
    mode: "not persistent",
    says: ["%1p1", "linux_raid_member"],
  });
}

situation(
  "one of two disks is in doubt, the other one whole: a new one joins",
  {
    disks: [oldDisk, magicDisk, magicDisk],
    earlier: [[2]],
    then: newer["an MBR and ext4"].script,
    mode: "persistent",
    status: 0,
    uses: [2],
    mayChange: [3],
    says: ["%1"],
    also: async (system) => {
      assertEquals(await membersOf(system), [2, 3]);
      assertEquals(await isMarked(system.disks[2]), false);
    },
  },
);

const low = "00000000-0000-4000-8000-000000000001";
const high = "ffffffff-ffff-4fff-bfff-fffffffffffe";

for (const [over, table] of [["GPT", "gpt"], ["MBR", "mbr"]]) {
  for (
    const [order, older, good] of [["lower", low, high], ["higher", high, low]]
  ) {
    const line = over === "GPT"
      ? "start=2048, name=lightwhale-data"
      : "start=2048";
    situation(
      `an old data filesystem with the ${order} UUID under a ${over} with the ` +
        `good one: the good one is used`,
      {
        disks: [{
          ...blankDisk,
          contents: `${tools} old -U ${older} "$DISK"
            ${table} "$DISK" '${line}'; old -U ${good} "$DISK"p1
            mkdir /run/good-$$; mount "$DISK"p1 /run/good-$$
            echo good > /run/good-$$/which
            umount /run/good-$$; rmdir /run/good-$$`,
        }],
        then: 'partx -u "$1"',
        mode: "persistent",
        status: 0,
        uses: [1],
        says: ["%1[^p]"],
        also: (system, boot) => {
          assertEquals(boot.report.uuid, good, boot.stderr);
          assertEquals(boot.report.devices, [`${system.disks[0].path}p1`]);
        },
      },
    );
  }
}

// A2: a table that is not there is not a damaged one.

const foreign: Record<string, { script: string; needs?: string[] }> = {
  "an md array": {
    script: `printf '\\374\\116\\053\\251\\001\\0\\0\\0' | put "$1" 4096
      le64 8 | put "$1" 4240`,
  },
  "a physical volume of LVM": {
    // What pvcreate leaves, and where: the label in LBA 1, metadata at 4 KiB.
    script: `dd if=/dev/zero of="$1" bs=4k count=1 conv=notrunc status=none
      printf 'LABELONE\\001' | put "$1" 512
      printf '\\040\\0\\0\\0LVM2 001' | put "$1" 532
      head -c 32 /etc/services | tr -c a-z a | put "$1" 544
      dd if=/dev/zero of="$1" bs=4k seek=1 count=255 conv=notrunc status=none`,
  },
  "a backing device of bcache": {
    script: `truncate -s 64M "$PWD/bcache"
      make-bcache -B "$PWD/bcache" >/dev/null; start "$PWD/bcache" "$1"`,
    needs: ["make-bcache"],
  },
  "LUKS2": {
    script: `truncate -s 64M "$PWD/luks"; luks "$PWD/luks"
      start "$PWD/luks" "$1"`,
    needs: ["cryptsetup"],
  },
};

for (const [what, { script, needs }] of Object.entries(foreign)) {
  situation(`${what} on what was a data disk: no table is restored over it`, {
    disks: [magicDisk],
    needs,
    earlier: [[1]],
    then: script,
    mode: "not persistent",
  });
  situation(`${what} on half of a mirror: the other half is used`, {
    disks: [magicDisk, magicDisk],
    needs,
    earlier: [[1, 2]],
    then: script,
    mode: "persistent",
    uses: [2],
  });
}

// A3: space behind the table that is not empty.

for (const end of ["isw", "ddf", "md090", "md10"]) {
  situation(`a disk grew, and has ${end} at its end: that is kept`, {
    disks: [magicDisk],
    earlier: [[1]],
    whileOff: 'truncate -s 700M "$1"',
    then: `${end} "$1"`,
    mode: "persistent",
    uses: [1],
    says: ["%1", "raid_member"],
    also: async ({ disks: [disk] }) => {
      // Nothing but zeros and the new signature is in the last 90 MiB.
      const found = await onDevices(
        [disk],
        `wipefs --no-act "$1"; tail -c 90M "$1" | tr -d '\\0' | wc -c`,
      );
      assertMatch(found, /raid_member/);
      assert(Number(found.trim().split("\n").pop()) < 64, found);
    },
  });
}

// A4: advice.

/** A server's disk: the machine's own partitions, and one for us. */
const serverDisk: DiskSpec = {
  sizeBytes: 900 * MiB,
  contents: `${tools} gpt "$DISK" 'size=20M, name=EFI' \
      'size=200M, name=LIGHTWHALE' 'name=${magic}'
    mkfs.ext4 -q -L LIGHTWHALE "$DISK"p2; mkfs.vfat "$DISK"p1 >/dev/null`,
};

/** Nothing that is advised erases more than the partition. */
function assertNoWholeDisk(text: string, { disks }: System): void {
  for (const { path } of disks) {
    const advice = new RegExp(`--enable (--force )?${path}(?!p?\\d)`);
    assert(!advice.test(text), text);
  }
}

const troubles: Record<string, (system: System) => Promise<void>> = {
  "was each written alone": async (system) => {
    for (const alone of system.disks) {
      const without = system.disks.filter((disk) => disk !== alone);
      await system.reboot({ without });
      await bootPersistent(system);
      await system.sh("echo alone > etc/alone");
    }
    await system.reboot();
  },
  "is a copy of the other": async (system) => {
    const [one, other] = system.disks;
    await system.reboot({
      whileOff: () => copyImage(one.image, other.image),
    });
  },
  "has a damaged superblock": async (system) => {
    await system.reboot();
    await onDevices(
      system.disks.slice(1),
      'partx -u "$1"; dd if=/dev/urandom of="$1"p3 bs=64k seek=1 count=1 ' +
        "status=none",
    );
  },
};

for (const [trouble, prepare] of Object.entries(troubles)) {
  onDisks(
    `a partition of a server's disk ${trouble}: no advice erases the server`,
    { disks: [serverDisk, serverDisk], needs: ["mkfs.vfat"] },
    async (system) => {
      await bootPersistent(system);
      await prepare(system);
      const before = await Promise.all(system.disks.map(startOfDisk));
      const { report, stderr } = await system.boot(["--wait", "0"]);
      await idle(system);
      assertEquals(report.mode, "persistent", stderr);
      assertMatch(stderr, /--enable --force \/dev\/loop\d+p3/);
      assertNoWholeDisk(stderr, system);
      const after = await Promise.all(system.disks.map(startOfDisk));
      assertEquals(after, before, stderr);
    },
  );
}

/** The checksum of a server's own partitions. */
function startOfDisk(disk: Disk): Promise<string> {
  return onDevices([disk], 'head -c 221M "$1" | tail -c 220M | sha256sum');
}

/** What `--enable` must say of a disk that holds this. */
const listings: Record<string, { contents: string; says: string[] }> = {
  "a server's disk": {
    contents: serverDisk.contents!,
    says: ["p1", "vfat", "p2", "ext4", "LIGHTWHALE", "p3", "lightwhale-data"],
  },
  "a disk with other people's partitions": {
    contents: `${tools} gpt "$DISK" size=100M size=100M
      mkfs.ext4 -q -L photos "$DISK"p1; mkswap -q -L elsewhere "$DISK"p2`,
    says: ["p1", "ext4", "photos", "p2", "swap", "elsewhere"],
  },
};

for (const [what, { contents, says }] of Object.entries(listings)) {
  onDisks(
    `--enable lists what ${what} holds, partition by partition`,
    { disks: [{ ...serverDisk, contents }], needs: ["mkfs.vfat"] },
    async (system) => {
      await system.boot();
      await system.reboot();
      const [{ path }] = system.disks;
      const args = [...system.place(), "--enable", path];
      const { status, stdout, stderr } = await system.run(args);
      const said = stdout + stderr;
      assert(status !== 0, said);
      for (const what of says) {
        const words = what.replace(/^p(?=\d$)/, `${path}p`);
        assert(said.includes(words), `"${words}" is not said: ${said}`);
      }
    },
  );
}

// A5: an identity that was copied is no proof.

/** Two systems that grew from copies of one disk, and what is left of both. */
const remains: Record<string, { there: number[]; uses?: number[] }> = {
  "all of one and half of the other": { there: [2, 3, 4], uses: [2, 4] },
  "the first of one and the second of the other": { there: [2, 3] },
  "the second of one and the first of the other": { there: [1, 4] },
};

for (const [what, { there, uses }] of Object.entries(remains)) {
  onDisks(
    `mirrors that grew from copies of one disk, ${what}: none is wiped`,
    { disks: [magicDisk, blankDisk, magicDisk, magicDisk] },
    async (system) => {
      const [a1, b1, a2, b2] = system.disks;
      await system.reboot({ without: [b1, a2, b2] });
      await bootPersistent(system);
      await system.reboot({
        without: [b1, b2],
        whileOff: () => copyImage(a1.image, b1.image),
      });
      await bootPersistent(system);
      await system.sh("echo a > etc/who");
      await system.reboot({ without: [b1, b2] });
      await bootPersistent(system);
      await system.reboot({ without: [a1, a2] });
      await bootPersistent(system);
      for (let commit = 0; commit < 5; commit++) {
        await system.sh("echo b > etc/who; sync -f etc/who");
      }
      const { disks } = system;
      const absent = disks.filter((_, n) => !there.includes(n + 1));
      await system.reboot({ without: absent });

      const present = disks.filter((disk) => !absent.includes(disk));
      const before = await Promise.all(present.map(system.checksum));
      const { report, stderr } = await system.boot(["--wait", "0"]);
      await idle(system);
      assertEquals(report.mode, "persistent", stderr);
      const used = await membersOf(system);
      for (const [n, disk] of present.entries()) {
        if (used.includes(disks.indexOf(disk) + 1)) continue;
        assertEquals(await system.checksum(disk), before[n], stderr);
        assertMatch(stderr, new RegExp(`${disk.path}.*not touched`));
      }
      const who = await system.sh("cat etc/who");
      const owners = used.map((n) => n % 2 === 0 ? "b\n" : "a\n");
      assertEquals(owners, owners.map(() => who), stderr);
      assertEquals(used, uses ?? used.slice(0, 1), stderr);
    },
  );
}

for (
  const [count, besides] of [[2, ""], [3, ""], [2, " and a magic disk"]] as [
    2 | 3,
    string,
  ][]
) {
  const members = Array.from({ length: count }, () => magicDisk);
  onDisks(
    `an older copy of the dead one of ${count} members${besides} is plugged ` +
      "in: the copy is not touched",
    { disks: [blankDisk, ...members] },
    async (system) => {
      const [copy] = system.disks;
      const dead = system.disks[count];
      await system.reboot({ without: [copy] });
      await bootPersistent(system);
      await system.reboot({
        without: [copy],
        whileOff: () => copyImage(dead.image, copy.image),
      });
      await bootPersistent(system);
      await system.sh("echo 2 > etc/boots; sync -f etc/boots");
      await system.reboot({ without: [copy, dead] });
      await bootPersistent(system);
      await system.sh("echo 3 > etc/boots; sync -f etc/boots");
      if (besides) await system.plug(magicDisk);
      await system.reboot({ without: [dead] });

      const before = await system.checksum(copy);
      const boot = await bootPersistent(system);
      assertEquals(await system.checksum(copy), before, boot.stderr);
      assertMatch(boot.stderr, new RegExp(`${copy.path}p1.*copy`));
      assertEquals(await system.sh("cat etc/boots"), "3\n");
      const used = system.disks.map((_, n) => n + 1).slice(1)
        .filter((n) => n !== count + 1);
      assertEquals(await membersOf(system), used);
    },
  );
}

// A6: the rescue parameter.

const spellings: Record<string, "volatile" | "persistent"> = {
  "lightwhale.persistence=OFF": "volatile",
  '"lightwhale.persistence=off"': "volatile",
  'lightwhale.persistence="off"': "volatile",
  "LightWhale.Persistence=No": "volatile",
  "lightwhale.persistence=false": "volatile",
  'lightwhale.persistence="0"': "volatile",
  "lightwhale.persistence=banana": "volatile",
  "lightwhale.persistence=": "volatile",
  "lightwhale.persistence=on": "persistent",
  "lightwhale.persistence=TRUE": "persistent",
  'lightwhale.persistence="Yes"': "persistent",
};

for (const [spelling, mode] of Object.entries(spellings)) {
  situation(`the kernel command line says ${spelling}: ${mode}`, {
    disks: [magicDisk],
    cmdline: `quiet ${spelling} splash`,
    mode,
    uses: mode === "persistent" ? [1] : [],
    says: spelling.includes("banana") ? ["banana"] : [],
  });
}

situation("the kernel command line says No: a data disk is not touched", {
  disks: [oldDisk],
  cmdline: "lightwhale.persistence=No",
  mode: "volatile",
});

// A7: a filesystem that was asked for is waited for.

/** What is beside the disk that was asked for, and comes late. */
const besides: Record<string, DiskSpec> = {
  "nothing": blankDisk,
  "a magic disk": magicDisk,
  "another data disk": oldDisk,
};

for (const [what, beside] of Object.entries(besides)) {
  onDisks(
    `the disk that was asked for comes 3 s late, ${what} is beside it`,
    { disks: [beside, magicDisk] },
    async (system) => {
      const [, late] = system.disks;
      const asked = await makeAskedFor(system, "lightwhale.wait=20");
      const started = Date.now();
      const [boot] = await Promise.all([
        asked.boot(),
        sleep(3000).then(() => system.attach(late, latePlace)),
      ]);
      const { report, stderr } = boot;
      assertEquals([boot.status, report.mode], [0, "persistent"], stderr);
      assertEquals(report.uuid, asked.uuid, stderr);
      assertEquals(await system.sh("cat etc/precious"), "precious\n", stderr);
      const seconds = (Date.now() - started) / 1000;
      assert(seconds < 12, `It took ${seconds} s`);
    },
  );
  onDisks(
    `the disk that was asked for does not come, ${what} is beside it`,
    { disks: [beside, magicDisk] },
    async (system) => {
      const asked = await makeAskedFor(system, "lightwhale.wait=2");
      const before = await system.checksum(system.disks[0]);
      const { status, report, stderr } = await asked.boot();
      assertEquals(await system.checksum(system.disks[0]), before, stderr);
      assertEquals([status, report.mode], [1, "fallback"], stderr);
      assertMatch(stderr, new RegExp(asked.uuid));
    },
  );
}

/** Far from where others take their loop devices from. */
const latePlace = "/dev/loop231";

/** Makes the second disk the data disk, asks for it, and takes it away. */
async function makeAskedFor(
  system: System,
  cmdline: string,
): Promise<{ uuid: string; boot: () => Promise<Boot> }> {
  const [beside, late] = system.disks;
  await system.reboot({ without: [beside] });
  const { report: { uuid } } = await bootPersistent(system);
  assert(uuid);
  await system.sh("echo precious > etc/precious");
  await system.reboot({
    without: [late],
    cmdline: `quiet lightwhale.data=${uuid} ${cmdline}`,
  });
  await system.attach(late, latePlace);
  await command(["losetup", "--detach", latePlace]);
  late.path = "";
  const args = ["--devices", `${beside.path},${latePlace}`];
  return { uuid, boot: () => system.boot(args) };
}

// A8: another sector size.

const ends = 'head -c 1M "$1" | sha256sum; tail -c 1M "$1" | sha256sum';

for (const [made, seen] of [[512, 4096], [4096, 512]] as (512 | 4096)[][]) {
  const sizes = `made with ${made}-byte sectors comes back with ${seen}`;
  const disk: DiskSpec = { ...magicDisk, sectorBytes: made };
  situation(`a data disk ${sizes}: it is used as it is`, {
    disks: [{ ...disk, sizeBytes: 2100 * MiB }],
    earlier: [[1]],
    sectorBytes: seen,
    keeps: ends,
    mode: "persistent",
    uses: [1],
  });
  situation(`half of a mirror ${sizes}: both are used`, {
    disks: [disk, magicDisk],
    earlier: [[1, 2]],
    sectorBytes: seen,
    keeps: ends,
    mode: "persistent",
    uses: [1, 2],
  });
  situation(`a data disk ${sizes} beside a magic disk: that joins`, {
    disks: [disk, magicDisk],
    earlier: [[1]],
    sectorBytes: seen,
    keeps: ends,
    mode: "persistent",
    uses: [1],
    mayChange: [2],
    also: async (system) => assertEquals(await membersOf(system), [1, 2]),
  });
  situation(`a data disk ${sizes} and has grown: the table stays`, {
    disks: [disk],
    earlier: [[1]],
    whileOff: 'truncate -s 700M "$1"',
    sectorBytes: seen,
    keeps: `${ends}; tail -c 90M "$1" | tr -d '\\0' | wc -c`,
    mode: "persistent",
    uses: [1],
  });
  situation(`a disk with a magic partition ${sizes}: it is used, or named`, {
    disks: [{
      ...disk,
      contents: `${tools} gpt "$DISK" size=100M 'name=${magic}'
        head -c 3M /dev/urandom > "$DISK"p1`,
    }],
    sectorBytes: seen,
    keeps: 'head -c 101M "$1" | tail -c 100M | sha256sum',
    uses: [1],
    says: ["%1"],
    also: ({ disks: [{ path }] }, { status, report }) => {
      if (report.mode !== "persistent") assertEquals(status, 1);
      else assertEquals(report.devices, [`${path}p2`]);
    },
  });
}

// A9, A10: the first sector is lost, or was cleared on purpose.

const zeros =
  'dd if=/dev/zero of="$1" bs=512 count=1 conv=notrunc status=none;';

const firstSectors: Record<string, string> = {
  "zeros": zeros,
  "random bytes": `${zeros} head -c 510 /dev/urandom |
    dd of="$1" conv=notrunc status=none`,
};

for (const [what, script] of Object.entries(firstSectors)) {
  for (const sectorBytes of [512, 4096] as const) {
    const disk: DiskSpec = { ...magicDisk, sectorBytes };
    const name = `the first sector is ${what}, sectors of ${sectorBytes} bytes`;
    const lost: Omit<Situation, "disks"> = {
      whileOff: script,
      keeps: 'head -c 440 "$1" | sha256sum', // boot code
      mode: "persistent",
      status: 0,
      also: assertGoodFromNowOn,
    };
    situation(`${name}: the data disk is used, and repaired`, {
      ...lost,
      disks: [disk],
      earlier: [[1]],
      uses: [1],
    });
    situation(`${name}: half of a mirror is used, and repaired`, {
      ...lost,
      disks: [disk, magicDisk],
      earlier: [[1, 2]],
      uses: [1, 2],
    });
  }
}

/** The next boot has nothing to repair. */
async function assertGoodFromNowOn(system: System, boot: Boot): Promise<void> {
  assertEquals(boot.report.degraded, false, boot.stderr);
  const [disk] = system.disks;
  await command(["sfdisk", "--verify", disk.path]);
  assertMatch(await onDevices([disk], 'wipefs --no-act "$1"'), /PMBR/);
  await system.reboot();
  const { report, stderr } = await bootPersistent(system);
  assertEquals([report.degraded, report.warnings], [false, []], stderr);
  assertEquals(await system.sh("cat etc/precious"), "precious\n", stderr);
}

const startsOver: Record<string, string> = {
  "512 zeros": zeros,
  "a mebibyte of zeros": zeros.replace("count=1", "count=2048"),
};

for (const [what, script] of Object.entries(startsOver)) {
  for (const sectorBytes of [512, 4096] as const) {
    situation(
      `${what}, then the header, sectors of ${sectorBytes} bytes: it is ` +
        "formatted anew",
      {
        disks: [{ ...magicDisk, sectorBytes }],
        earlier: [[1]],
        whileOff: `${script} DISK="$1"; ${header}`,
        mode: "persistent",
        status: 0,
        uses: [1],
        anew: true,
      },
    );
  }
  situation(`${what}, then the header on half of a mirror: it joins anew`, {
    disks: [magicDisk, magicDisk],
    earlier: [[1, 2]],
    whileOff: `${script} DISK="$1"; ${header}`,
    mode: "persistent",
    status: 0,
    uses: [2],
    mayChange: [1],
    also: async (system, { stderr }) => {
      assertEquals(await membersOf(system), [1, 2], stderr);
      assertEquals(await isMarked(system.disks[0]), false, stderr);
    },
  });
}

// A11: data are data, whatever the filesystem.

const label = "lightwhale-data";

/** Filesystems with our label, and whether the header fits before them. */
const labelled: Record<
  string,
  { script: string; needs?: string[]; room?: boolean }
> = {
  "ext4": { script: `mkfs.ext4 -q -L ${label} "$DISK"`, room: true },
  "swap and ext4 in a GPT": {
    script: `gpt "$DISK" size=100M size=400M; mkswap -q "$DISK"p1
      mkfs.ext4 -q -L ${label} "$DISK"p2`,
    room: true,
  },
  "f2fs": {
    script: `mkfs.f2fs -q -l ${label} "$DISK" >/dev/null`,
    needs: ["mkfs.f2fs"],
    room: true,
  },
  "NTFS": {
    script: `mkntfs -q -F -Q -L ${label} "$DISK"`,
    needs: ["mkntfs"],
  },
  "LUKS2": {
    script: `luks --label ${label} "$DISK"`,
    needs: ["cryptsetup"],
  },
  "swap": { script: `mkswap -q -L ${label} "$DISK"`, room: true },
  "swap in a GPT": {
    script: `gpt "$DISK" size=100M; mkswap -q -L ${label} "$DISK"p1`,
    room: true,
  },
  "ISO 9660": {
    script: `xorriso -as mkisofs -quiet -V ${label} -o iso /etc/apt 2>/dev/null
      dd if=iso of="$DISK" bs=64k status=none; rm iso`,
    needs: ["xorriso"],
    room: true,
  },
};

for (const [what, { script, needs, room }] of Object.entries(labelled)) {
  const disk: DiskSpec = {
    ...blankDisk,
    contents: `cd "$(mktemp -d)"; ${tools} ${script}`,
  };
  situation(`${what} labelled ${label}: no other disk is formatted`, {
    disks: [disk, magicDisk],
    needs,
    mode: "fallback",
    status: 1,
    says: ["%1", "%2"],
  });
  if (!room) continue;
  situation(`${what} labelled ${label} behind a header: it is not formatted`, {
    disks: [{ ...disk, contents: `${disk.contents}\n${header}` }],
    needs,
    mayChange: [1],
    keeps: 'tail -c +513 "$1" | sha256sum',
    mode: "not persistent",
    says: ["%1"],
    also: async ({ disks: [disk] }, { stderr }) =>
      assertEquals(await isMarked(disk), false, stderr),
  });
}

situation("ext4 with our label beside the data filesystem is a bystander", {
  disks: [{ ...blankDisk, contents: labelled.ext4.script }, magicDisk],
  earlier: [[2]],
  mode: "persistent",
  status: 0,
  uses: [2],
});

// Helpers

/** Boots; all is well. */
async function bootPersistent(system: System): Promise<Boot> {
  const boot = await system.boot(["--wait", "0"]);
  assertEquals(boot.report.mode, "persistent", boot.stderr);
  await idle(system);
  return boot;
}

/** Runs a shell script with the devices as $1, $2 …, in a folder of its own. */
async function onDevices(disks: Disk[], script: string): Promise<string> {
  const paths = disks.map(({ path }) => path || "/nowhere");
  return await command([
    ...["sh", "-euc"],
    `folder=$(mktemp -d); cd "$folder"; trap 'rm -r "$folder"' EXIT
     ${tools} ${script}
     for device; do
       test ! -b "$device" || for node in "$device"p* "$device"; do
         test ! -b "$node" || blockdev --flushbufs "$node"
       done
     done`,
    ...["sh", ...paths],
  ]);
}

/** The same, with the images. */
async function onImages(disks: Disk[], script: string): Promise<void> {
  await command([
    ...["sh", "-euc", tools + script, "sh"],
    ...disks.map(({ image }) => image),
  ]);
}

async function copyImage(from: string, to: string): Promise<void> {
  await command(["cp", "--sparse=always", from, to]);
}

/** Waits for the work in the background. */
async function idle(system: System): Promise<void> {
  for (let tries = 0; tries < 600; tries++) {
    await system.settle();
    const args = [...system.place(), "--status", "--json"];
    const { stdout, stderr } = await system.run(args);
    assert(stdout.startsWith("{"), stderr);
    if (JSON.parse(stdout).work.length === 0) return;
    await sleep(100);
  }
  throw new Error("The work in the background does not end");
}

/** Numbers of the disks that the mounted data filesystem is on. */
async function membersOf({ disks, sh }: System): Promise<number[]> {
  const shown = await sh("btrfs filesystem show mnt/lightwhale-data");
  const devices = [...shown.matchAll(/path (\S+)/g)].map(([, path]) => path);
  return disks.map((_, n) => n + 1)
    .filter((n) => devices.some((device) => isPartOf(device, disks[n - 1])));
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
