/**
 * Situations from the field: who a disk is, and what it holds. Each is a
 * collection of disks before a boot, what happens to them, and what the boot
 * must make of it. Nothing but the disks that a situation says are used may
 * change: all others are compared by their checksums.
 */
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { Buffer } from "node:buffer";
import { crc32 } from "node:zlib";
import { type Program, systemPath } from "./programs.ts";
import {
  type Boot,
  bringLate,
  command,
  type Disk,
  type DiskSpec,
  farPlace,
  header,
  idle,
  isMarked,
  magic,
  MiB,
  onDisks,
  type Report,
  type System,
  type SystemOptions,
  takeAway,
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
md11() { printf '\\374\\116\\053\\251\\001\\0\\0\\0' | put "$1" 0; }
md090() {
  at=$((($(sizeof "$1") & ~65535) - 65536))
  printf '\\374\\116\\053\\251\\0\\0\\0\\0\\132\\0\\0\\0' | put "$1" $at
}
isw() {
  printf 'Intel Raid ISM Cfg Sig. 1.1.00' | put "$1" $(($(sizeof "$1") - 1024))
}
ddf() { # so many sectors before the end
  at=$(($(sizeof "$1") - \${2:-1} * 512))
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
  needs?: Program[];
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
  withinMs?: number;
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
  const started = Date.now();
  const boot = await system.boot(["--wait", "0"]);
  const tookMs = Date.now() - started;
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
  assert(tookMs < (expected.withinMs ?? Infinity), `It took ${tookMs} ms`);
  if (boot.report.mode === "persistent" && expected.earlier) {
    const found = await system.sh("cat etc/precious 2>/dev/null || echo none");
    assertEquals(found, expected.anew ? "none\n" : "precious\n", boot.stderr);
  }
  const { says, neverSays } = spellOut(system, expected);
  await expected.also?.(system, boot);
  for (const pattern of says) assertMatch(boot.stderr, pattern);
  for (const pattern of neverSays) {
    assert(!pattern.test(boot.stderr), `It says ${pattern}: ${boot.stderr}`);
  }
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

/** What is to be said, with the paths that the disks have now. */
function spellOut(
  { disks }: System,
  { says = [], neverSays = [] }: Situation,
): { says: RegExp[]; neverSays: RegExp[] } {
  const spell = (pattern: string) =>
    new RegExp(
      pattern.replace(/%(\d)/g, (_, digit) => disks[Number(digit) - 1].path),
      "i",
    );
  return { says: says.map(spell), neverSays: neverSays.map(spell) };
}

const isPartOf = (device: string, { path }: Disk) =>
  path !== "" && (device === path || device.startsWith(`${path}p`));

// A1: a superblock that something newer contradicts.

/** What came over an old filesystem of ours on the whole of $1. */
const newer: Record<string, { script: string; needs?: Program[] }> = {
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
  ...Object.fromEntries([399, 951, 3087].map((sectors) => [
    `a Promise RAID, ${sectors} sectors before the end,`,
    {
      script: `printf 'Promise Technology, Inc.' |
        put "$1" $(($(sizeof "$1") - ${sectors} * 512))`,
    },
  ])),
  "a DDF RAID, 257 sectors before the end,": { script: 'ddf "$1" 257' },
  "VMFS": { script: `printf '\\15\\320\\1\\300' | put "$1" 1048576` },
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

situation("a whole data disk became a member of md 1.1: it is not ours", {
  disks: [magicDisk],
  earlier: [[1]],
  then: 'md11 "$1"',
  mode: "not persistent",
  says: ["%1p1", "linux_raid_member"],
});

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

/** What is put straight over it, and leaves its backup superblock. */
const directly: Record<string, { script: string; needs?: Program[] }> = {
  "wipefs": { script: 'wipefs -qa "$1"' },
  "ext4": { script: 'mkfs.ext4 -q -F -E nodiscard "$1"' },
  "XFS": { script: 'mkfs.xfs -q -f -K "$1"', needs: ["mkfs.xfs"] },
  "FAT": { script: 'mkfs.vfat "$1" >/dev/null' },
  "LUKS2": { script: 'luks "$1"', needs: ["cryptsetup"] },
  "ReiserFS": {
    script: 'mkfs.reiserfs -q -ff "$1" >/dev/null',
    needs: ["mkfs.reiserfs"],
  },
};

for (const [what, { script, needs }] of Object.entries(directly)) {
  situation(`${what} straight over an old data filesystem: it is not ours`, {
    disks: [oldDisk, magicDisk],
    needs,
    then: script,
    mode: "persistent",
    status: 0,
    uses: [2],
    neverSays: ["%1 may be"],
  });
}

// The same old filesystem, and nothing newer: it is damaged.

const damages: Record<string, string> = {
  "4 bytes of its magic are damaged": 'printf okay | put "$1" 65600',
  "its superblock is all zeros":
    'dd if=/dev/zero of="$1" bs=4k seek=16 count=1 conv=notrunc status=none',
  "its superblock is anything":
    'dd if=/dev/urandom of="$1" bs=4k seek=16 count=1 conv=notrunc status=none',
  "its label is damaged": 'printf okay | put "$1" 65835',
};

const places: Record<string, string> = {
  "on a whole disk": "",
  "in a partition without a name": "start=2048",
  "in our partition": "start=2048, name=lightwhale-data",
};

for (const [where, entry] of Object.entries(places)) {
  const part = entry && "p1";
  for (const [damage, script] of Object.entries(damages)) {
    if (entry && !/magic|anything/.test(damage)) continue;
    situation(`a data filesystem ${where}, ${damage}: nothing is formatted`, {
      disks: [{
        ...blankDisk,
        contents: `${tools} ${entry && `gpt "$DISK" '${entry}'`}
          old "$DISK"${part}`,
      }, magicDisk],
      earlier: [[1]],
      then: `${entry && 'partx -u "$1"'}
        set -- "$1"${part}; ${script}`,
      mode: "fallback",
      status: 1,
      says: [
        `%1${part} may be .* only a backup superblock is left`,
        "%2 will not be formatted",
      ],
      also: async (system, { stderr }) => {
        const [, remedy] = /\("(.*)" may repair it/.exec(stderr) ?? [];
        assertEquals(
          await system.sh(
            `stat -c '%F %a' mnt/lightwhale-data/lightwhale-state/docker
             echo y | ${remedy} >&2 || [ $? -eq 2 ]`,
          ),
          "regular file 444\n",
        );
        await system.reboot();
        await bootPersistent(system);
        assertEquals(await system.sh("cat etc/precious"), "precious\n");
      },
    });
  }
}

// A magic partition of a table that cannot be believed.

situation("a magic partition over a Btrfs of others: it is not formatted", {
  disks: [{
    ...blankDisk,
    contents: `${tools} mkfs.btrfs -q -K -L photos "$DISK"
      gpt "$DISK" 'start=2048, size=100M' 'name=${magic}'`,
  }],
  mode: "fallback",
  status: 1,
  says: ['cannot format %1p2: %1, which .* holds .*btrfs "photos"; wipefs'],
  also: async (system) => {
    const [{ path }] = system.disks;
    await system.sh(`partx -u ${path}`);
    const refused = await system.run(["--enable", "--force", `${path}p2`]);
    assertEquals(refused.status, 2);
    assertMatch(refused.stderr, /Cannot enable .*holds .*btrfs "photos"/);
    await system.sh(`wipefs --quiet --types btrfs --all ${path}`);
    await system.reboot();
    await bootPersistent(system);
  },
});

for (const [what, at] of [["header", 512 + 24], ["entries", 1024 + 60]]) {
  situation(`the ${what} of a table with a magic partition are damaged`, {
    disks: [{
      ...blankDisk,
      contents: `${tools} gpt "$DISK" 'name=${magic}'`,
    }],
    then: `printf '\\377' | put "$1" ${at}`,
    mode: "persistent",
    status: 0,
    uses: [1],
    says: ["restor.* partition table"],
  });
}

/** An MBR of its own right over the protective one: lines for sfdisk. */
const oldMbr = (lines: string) =>
  `truncate -s "$(stat -c %s "$1")" "$1.old"
   printf 'label: dos\n${lines}\n' | sfdisk -q "$1.old"
   dd if="$1.old" of="$1" bs=512 count=1 conv=notrunc status=none
   rm "$1.old"`;

situation("an old MBR came back over a data disk: nothing else is formatted", {
  disks: [magicDisk, magicDisk],
  earlier: [[1]],
  whileOff: oldMbr("start=4096, type=83"),
  mode: "fallback",
  status: 1,
  says: ["%1 may be a .* MBR hides its GPT", "%2 will not be formatted"],
  also: async (system, { stderr }) => {
    const [remedy] = /wipefs --all [^,]*(?=, reboot)/.exec(stderr) ?? [];
    await system.reboot({ without: [system.disks[1]] });
    await command(["sh", "-ec", remedy!.replace(/\S+$/, system.disks[0].path)]);
    const { stderr: said } = await bootPersistent(system);
    assertEquals(await system.sh("cat etc/precious"), "precious\n", said);
  },
});

situation("an old MBR came back over half of a mirror: the other is used", {
  disks: [magicDisk, magicDisk],
  earlier: [[1, 2]],
  whileOff: oldMbr("start=4096, type=83"),
  mode: "persistent",
  uses: [2],
  says: ["%1 may be a .* MBR hides its GPT"],
});

situation(
  "a data disk got an MBR and ext4 behind the superblock of ours: it is not ours",
  {
    disks: [magicDisk],
    earlier: [[1]],
    then: `mbr "$1" 'start=300000, type=83'
    mkfs.ext4 -q -E nodiscard -L photos "$1"p1`,
    mode: "volatile",
    status: 0,
  },
);

const instead: Record<string, string> = {
  "a file": 'echo mine > "$there"',
  "a link to nothing": 'ln -s nowhere "$there"',
};
for (const [what, script] of Object.entries(instead)) {
  for (const name of ["lightwhale-state", "lightwhale-state-snapshots"]) {
    const there = `@lightwhale-data/${name}`;
    situation(`${what} stands in the place of ${name}: it is kept and named`, {
      disks: [oldDisk],
      earlier: [[1]],
      then: `d=$(mktemp -d); mount -o subvolid=5 "$1" "$d"
        there="$d/${there}"; rmdir "$there"; ${script}
        umount "$d"; rmdir "$d"`,
      mode: "fallback",
      status: 1,
      uses: [1],
      says: [`"/${there}" .* on %1 is neither .*: .* mv /run/top/${there} `],
      neverSays: ["EEXIST"],
    });
  }
}

const seed = 'btrfstune -S 1 "$1"';

situation(
  "a seed of ours and what was added to it: nothing writes to the seed",
  {
    disks: [oldDisk, blankDisk],
    then: `${seed}; d=$(mktemp -d); mount "$1" "$d"
      btrfs device add -f "$2" "$d" >&2; umount "$d"; rmdir "$d"`,
    mode: "persistent", // as long as the kernel knows the seed
    uses: [2],
    says: ["%1 may be a .* but it is a seed"],
  },
);

situation("a seed of ours and another data disk: the other is used", {
  disks: [oldDisk, magicDisk],
  earlier: [[2]],
  then: seed,
  mode: "persistent",
  status: 0,
  uses: [2],
  says: ["%1 may be a .* but it is a seed"],
});

situation("a seed of ours and an enabled disk: nothing is formatted", {
  disks: [oldDisk, magicDisk],
  then: seed,
  mode: "fallback",
  status: 1,
  says: ["%1 may be a .* but it is a seed"],
});

// A2: a table that is not there is not a damaged one.

const foreign: Record<string, { script: string; needs?: Program[] }> = {
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

/** A magic partition behind another one. */
const magicPartition = (more = "") =>
  `${tools} gpt "$DISK" ${more} size=100M 'name=${magic}'
   head -c 3M /dev/urandom > "$DISK"p1`;

const ends = 'head -c 1M "$1" | sha256sum; tail -c 1M "$1" | sha256sum';

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

for (const what of ["a magic partition", "a partition"]) {
  const contents = magicPartition()
    .replace(magic, what === "a partition" ? "free" : magic);
  situation(`a disk with ${what} grew, and has isw at its end: that is kept`, {
    disks: [{ ...blankDisk, contents }],
    whileOff: 'truncate -s 700M "$1"',
    then: 'partx -u "$1"; isw "$1"',
    keeps: ends,
    mode: "not persistent",
    says: what === "a partition" ? [] : ["%1p2.*isw_raid_member"],
    also: async (system, { stderr }) => {
      const [{ path }] = system.disks;
      for (const args of [["--enable", "--force"], ["--disable"]]) {
        await system.run([...system.place(), ...args, `${path}p2`]);
      }
      const found = await onDevices(system.disks, 'wipefs --no-act "$1"');
      assertMatch(found, /isw_raid_member/, stderr);
    },
  });
}

/** What else may be on a larger disk, to which an image was copied. */
const behind: Record<string, { script: string; says: string }> = {
  "an older partition table": {
    script:
      `truncate -s 700M old; echo start=650M | sfdisk -q -X gpt old; tail -c 16896 old > table
      put "$1" $((700 * 1024 * 1024 - 16896)) < table`,
    says: "%1 is larger.*holds gpt.*not grown.*sfdisk",
  },
  "data of older partitions": {
    script: `head -c 50M /dev/urandom |
      dd of="$1" bs=1M seek=630 conv=notrunc status=none`,
    says: "%1 is larger.*data of an unknown kind.*not grown.*sfdisk",
  },
};

for (const [what, { script, says }] of Object.entries(behind)) {
  situation(`a data disk was copied to a larger one with ${what}: not grown`, {
    disks: [magicDisk],
    earlier: [[1]],
    whileOff: 'truncate -s 700M "$1"',
    then: script,
    keeps: 'tail -c 99M "$1" | sha256sum',
    mode: "persistent",
    status: 0,
    uses: [1],
    says: [says],
  });
}

situation("a filesystem was copied to a larger disk with data: not grown", {
  disks: [oldDisk],
  earlier: [[1]],
  whileOff: 'truncate -s 700M "$1"',
  then: `head -c 9M /dev/urandom |
    dd of="$1" bs=1M seek=691 conv=notrunc status=none`,
  keeps: 'tail -c 99M "$1" | sha256sum',
  mode: "persistent",
  status: 0,
  uses: [1],
  says: ["%1 is larger than its filesystem.*not grown"],
});

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
      if (trouble === "is a copy of the other") {
        // It may be the same disk on another path: nothing is to be given up.
        assertMatch(stderr, /\S+p3 is \S+p3 on another path, or holds exactly/);
        assert(!stderr.includes("--force"), stderr);
      } else assertMatch(stderr, /--enable --force \/dev\/loop\d+p3/);
      assertNoWholeDisk(stderr, system);
      const after = await Promise.all(system.disks.map(startOfDisk));
      assertEquals(after, before, stderr);
    },
  );
}

/** The checksum of a server's own partitions. */
function startOfDisk(disk: Disk): Promise<string> {
  return onDevices([disk], mebibytes(1, 90));
}

const rootUuid = "12345678-9abc-4def-8123-456789abcdef";

/** How the kernel's command line may name the partition with the system. */
const roots = [
  `root=PARTUUID=${rootUuid.toUpperCase()}`,
  `root=PARTUUID=${rootUuid}/PARTNROFF=0`,
  'root="LABEL=LIGHTWHALE"',
  `"root=UUID=${rootUuid}"`,
  "root=PARTLABEL=system",
  "root=/dev/none root=LABEL=LIGHTWHALE",
];

for (const cmdline of roots) {
  const contents = `${tools} gpt "$DISK" uuid=${rootUuid},name=system
    mkfs.ext4 -q -L LIGHTWHALE -U ${rootUuid} "$DISK"p1`;
  onDisks(
    `--enable --force of the disk that the system came from: ${cmdline}`,
    { disks: [{ ...blankDisk, contents }, blankDisk], cmdline },
    async (system) => {
      await onDevices(system.disks.slice(0, 1), 'partx -u "$1"');
      for (const [n, { path }] of system.disks.entries()) {
        const args = [...system.place(), "--enable", "--force", path];
        const { status, stderr } = await system.run(args);
        assertEquals(status, n === 0 ? 2 : 0, stderr);
        if (n === 0) assertMatch(stderr, /the running system came from it/);
      }
    },
  );
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
      const asked = await makeAskedFor(system, "lightwhale.wait=60");
      const started = Date.now();
      const [boot] = await Promise.all([
        asked.boot(),
        bringLate(system, late, 3000),
      ]);
      const { report, stderr } = boot;
      assertEquals([boot.status, report.mode], [0, "persistent"], stderr);
      assertEquals(report.uuid, asked.uuid, stderr);
      assertEquals(await system.sh("cat etc/precious"), "precious\n", stderr);
      const seconds = (Date.now() - started) / 1000;
      assert(seconds < 40, `It took ${seconds} s`);
    },
  );
  onDisks(
    `the disk that was asked for does not come, ${what} is beside it`,
    { disks: [beside, magicDisk] },
    async (system) => {
      const asked = await makeAskedFor(system, "lightwhale.wait=2");
      const before = await system.checksum(system.disks[0]);
      const { status, report, stderr } = await asked.boot();
      assertMatch(stderr, new RegExp(asked.uuid));
      // Another data filesystem may be used, but none is made.
      if (what === "another data disk" && report.mode === "persistent") {
        assertEquals(report.devices, [system.disks[0].path], stderr);
        return;
      }
      assertEquals(await system.checksum(system.disks[0]), before, stderr);
      assertEquals([status, report.mode], [1, "fallback"], stderr);
    },
  );
}

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
  const options = { cmdline: `quiet lightwhale.data=${uuid} ${cmdline}` };
  await takeAway(system, late, options);
  const args = ["--devices", `${beside.path},${farPlace}`];
  return { uuid, boot: () => system.boot(args) };
}

// A8: another sector size.

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
    keeps: mebibytes(1, 70),
    uses: [1],
    says: ["%1"],
    also: ({ disks: [{ path }] }, { status, report, stderr }) => {
      if (report.mode !== "persistent") assertEquals(status, 1, stderr);
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
  { script: string; needs?: Program[]; room?: boolean }
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
    script: `iso=$(mktemp)
      xorriso -as mkisofs -quiet -V ${label} -o "$iso" /etc/apt 2>/dev/null
      dd if="$iso" of="$DISK" bs=64k status=none; rm "$iso"`,
    needs: ["xorriso"],
    room: true,
  },
};

for (const [what, { script, needs, room }] of Object.entries(labelled)) {
  const disk: DiskSpec = {
    ...blankDisk,
    contents: tools + script,
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
    keeps: 'head -c 8M "$1" | tail -c +513 | sha256sum',
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

// A13: one disk is one disk.

const twice: Record<
  string,
  { disks: SystemOptions["disks"]; members: number }
> = {
  "a magic disk": { disks: [magicDisk], members: 1 },
  "a disk with a magic partition": {
    disks: [{ ...blankDisk, contents: magicPartition() }],
    members: 1,
  },
  "one of two magic disks": { disks: [magicDisk, magicDisk], members: 2 },
};

for (const [what, { disks, members }] of Object.entries(twice)) {
  onDisks(
    `${what} shows at two nodes: it is formatted once, and used once`,
    { disks },
    async (system) => {
      await showTwice(system);
      const first = await bootPersistent(system);
      assertEquals(first.report.devices.length, members, first.stderr);
      assertEquals(first.status, 0, first.stderr);
      await system.sh("echo precious > etc/precious");
      for (const _ of ["second", "third"]) {
        await system.reboot();
        const { report, stderr } = await bootPersistent(system);
        assertEquals(report.devices.length, members, stderr);
        assertEquals(report.degraded, false, stderr);
        assertEquals(await system.sh("cat etc/precious"), "precious\n");
        assert(!/\bcopy\b|--force/.test(stderr), stderr);
      }
    },
  );
}

onDisks(
  "half of a mirror shows at two nodes: both halves are used, each once",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    await bootPersistent(system);
    await system.sh("echo precious > etc/precious");
    await showTwice(system);
    const { report, stderr } = await bootPersistent(system);
    assertEquals([report.devices.length, report.degraded], [2, false], stderr);
    assertEquals(await system.sh("cat etc/precious"), "precious\n");
    assert(!/\bcopy\b|--force/.test(stderr), stderr);
  },
);

situation("two magic disks of one size are not one disk", {
  disks: [magicDisk, magicDisk],
  mode: "persistent",
  status: 0,
  uses: [1, 2],
});

/** Reboots, and shows the first disk at a second node from then on. */
async function showTwice(system: System): Promise<void> {
  const { image, sectorBytes } = system.disks[0];
  system.disks.push({ image, sectorBytes, path: "" });
  await system.reboot();
}

// A14: tables of any length.

const tables: Record<string, { entries: number; sectorBytes?: 4096 }> = {
  "of 248 entries": { entries: 248 },
  "of 248 entries, sectors of 4096 bytes": { entries: 248, sectorBytes: 4096 },
  "of 512 entries": { entries: 512 },
  "of 4 entries": { entries: 4 },
};

for (const [what, { entries, sectorBytes }] of Object.entries(tables)) {
  const disk = (name: string): DiskSpec => ({
    ...blankDisk,
    sectorBytes,
    contents: magicPartition(`"table-length: ${entries}"`)
      .replace(magic, name),
  });
  const expected: Situation = {
    disks: [disk(magic)],
    keeps: mebibytes(1, 70),
    mode: "persistent",
    status: 0,
    uses: [1],
    also: async ({ disks: [{ path }] }, { stderr }) => {
      const table = await command(["sfdisk", "--dump", path]);
      assert(table.includes(`name="${label}"`), `${table}${stderr}`);
      const length = /table-length: (\d+)/.exec(table)?.[1] ?? 128;
      assertEquals(Number(length), entries, table);
    },
  };
  situation(`a GPT ${what} with a magic partition`, expected);
  situation(`a GPT ${what} with a data partition, and the disk grew`, {
    ...expected,
    earlier: [[1]],
    whileOff: 'truncate -s 700M "$1"',
    also: async ({ disks: [{ path }] }, { stderr }) => {
      const size = await command(["blockdev", "--getsize64", `${path}p2`]);
      assert(Number(size) > 590 * MiB, `${size}${stderr}`);
    },
  });
  situation(`a GPT ${what} with a data partition, the primary is destroyed`, {
    ...expected,
    earlier: [[1]],
    whileOff: `dd if=/dev/zero of="$1" bs=${sectorBytes ?? 512} seek=1 \
      count=1 conv=notrunc status=none`,
  });
  onDisks(
    `a GPT ${what}: --enable of a partition`,
    { disks: [disk("free")] },
    async (system) => {
      const [{ path }] = system.disks;
      await onDevices(system.disks, 'partx -u "$1"');
      const args = [...system.place(), "--enable", `${path}p2`];
      const { status, stderr } = await system.run(args);
      assertEquals(status, 0, stderr);
      await system.reboot();
      await play(system, expected);
    },
  );
}

situation("a magic partition has a higher number than there are partitions", {
  disks: [{
    ...blankDisk,
    contents:
      `printf '%s\\n' 'label: gpt' '100: size=100M' '101: name=${magic}' |
      sfdisk -q --no-tell-kernel "$DISK"`,
  }],
  mode: "persistent",
  status: 0,
  uses: [1],
});

// A15: what is in LBA 0 beside the table.

/** All of LBA 0 but the size of the first entry. */
const firstSector =
  '{ head -c 458 "$1"; head -c 512 "$1" | tail -c 50; } | sha256sum';

const bootBytes: Record<string, string> = {
  "a boot flag": `printf '\\200' | put "$1" 446;`,
  "boot code and a disk identifier":
    'head -c 440 /dev/urandom > code; put "$1" 0 < code\n' +
    `printf '\\1\\2\\3\\4' | put "$1" 440;`,
  "an active entry of type 00": `printf '\\200' | put "$1" 462;`,
};

for (const [what, script] of Object.entries(bootBytes)) {
  const disk: DiskSpec = { ...blankDisk, contents: magicPartition() };
  const expected: Situation = {
    disks: [disk],
    keeps: firstSector,
    then: script,
    mode: "persistent",
    uses: [1],
  };
  situation(`${what}: a magic partition is formatted, LBA 0 stays`, expected);
  situation(`${what}: the disk grew, LBA 0 stays`, {
    ...expected,
    earlier: [[1]],
    whileOff: 'truncate -s 700M "$1"',
    also: async ({ disks: [{ path }] }, { stderr }) => {
      const size = await command(["blockdev", "--getsize64", `${path}p2`]);
      assert(Number(size) > 590 * MiB, `${size}${stderr}`);
    },
  });
  situation(`${what}: the table is restored from the backup, LBA 0 stays`, {
    ...expected,
    earlier: [[1]],
    then: `${script}
      dd if=/dev/zero of="$1" bs=512 seek=1 count=1 conv=notrunc status=none`,
    status: 0,
  });
  onDisks(
    `${what}: --enable and --disable of a partition, LBA 0 stays`,
    { disks: [{ ...disk, contents: magicPartition().replace(magic, "free") }] },
    async (system) => {
      const { disks } = system;
      await onDevices(disks, `partx -u "$1"; ${script}`);
      const before = await onDevices(disks, firstSector);
      for (const mode of ["--enable", "--disable"]) {
        const args = [...system.place(), mode, `${disks[0].path}p2`];
        const { status, stderr } = await system.run(args);
        assertEquals(status, 0, stderr);
        assertEquals(await onDevices(disks, firstSector), before, mode);
      }
    },
  );
}

// A16: leftovers.

const leftovers: Record<string, string> = {
  "a data partition that is empty": `gpt "$DISK" name=${label}`,
  "a swap partition of ours and nothing else":
    `gpt "$DISK" size=100M,name=lightwhale-swap`,
  "a data partition that is damaged": `gpt "$DISK" name=${label}
    old "$DISK"p1
    dd if=/dev/urandom of="$DISK"p1 bs=64k seek=1 count=1 status=none`,
};

for (const [what, script] of Object.entries(leftovers)) {
  situation(`${what} beside a whole data filesystem: a magic disk joins`, {
    disks: [
      { ...blankDisk, contents: tools + script },
      ...[magicDisk, magicDisk],
    ],
    earlier: [[2]],
    mode: "persistent",
    status: 0,
    uses: [2],
    mayChange: [3],
    also: async (system, { stderr }) =>
      assertEquals(await membersOf(system), [2, 3], stderr),
  });
}

/** What a person does with the second of three disks. */
const byHand: Record<string, string> = {
  "replaced": "replace start -B -f 2",
  "removed": `balance start -f -mconvert=raid1 -sconvert=raid1 \
      mnt/lightwhale-data >/dev/null; btrfs device remove 2`,
};

for (const [what, words] of Object.entries(byHand)) {
  const count = what === "replaced" ? 2 : 3;
  onDisks(
    `a disk was ${what} by hand and stays plugged in: a magic disk joins`,
    { disks: [magicDisk, magicDisk, count === 2 ? blankDisk : magicDisk] },
    async (system) => {
      const [, old, other] = system.disks;
      await bootPersistent(system);
      await system.sh("echo precious > etc/precious");
      const target = count === 2 ? other.path : "";
      await system.sh(`btrfs ${words} ${target} mnt/lightwhale-data`);
      await system.plug(magicDisk);
      await system.reboot();
      const before = await system.checksum(old);
      const { stderr } = await bootPersistent(system);
      assertEquals(await membersOf(system), [1, 3, 4], stderr);
      assertEquals(await system.checksum(old), before, stderr);
      assertEquals(await system.sh("cat etc/precious"), "precious\n");
    },
  );
}

const serverSwaps: Record<string, string> = {
  "a partition with our swap's name": "",
  "swap of ours": 'mkswap -q -L lightwhale-swap "$DISK"p3',
  "swap of ours that is damaged":
    'head -c 1M /dev/urandom | dd of="$DISK"p3 status=none',
};

for (const [what, script] of Object.entries(serverSwaps)) {
  situation(`${what} on the system's disk: a magic disk is formatted`, {
    disks: [{
      ...blankDisk,
      contents: `${tools} gpt "$DISK" size=50M,name=EFI \
          size=200M,name=LIGHTWHALE size=100M,name=lightwhale-swap
        mkfs.ext4 -q -L LIGHTWHALE "$DISK"p2; ${script}`,
    }, magicDisk],
    mode: "persistent",
    status: 0,
    uses: [2],
  });
}

// A17: something else under our partition name.

const others: Record<
  string,
  { script: string; says: string[]; needs?: Program[] }
> = {
  "ext4": { script: "mkfs.ext4 -q -L photos", says: ["ext4", "photos"] },
  "XFS": {
    script: "mkfs.xfs -q -L photos",
    says: ["xfs", "photos"],
    needs: ["mkfs.xfs"],
  },
  "LUKS2": { script: "luks", says: ["crypto_LUKS"], needs: ["cryptsetup"] },
  "swap": { script: "mkswap -q -L mine", says: ["swap", "mine"] },
};

for (const [what, { script, says, needs }] of Object.entries(others)) {
  situation(`${what} on a data partition is named, and not "damage"`, {
    disks: [{
      ...blankDisk,
      contents: `${tools} gpt "$DISK" name=${label}; ${script} "$DISK"p1`,
    }],
    needs,
    mode: "not persistent",
    says: ["%1p1", ...says],
    neverSays: ["super-recover"],
  });
}

// A18: several magic partitions on one disk.

const severalParts: Record<
  string,
  { lines: string; used: number; keeps: string }
> = {
  "two, the second one larger": {
    lines: `size=100M size=600M,name=${magic} name=${magic}`,
    used: 3,
    keeps: mebibytes(1, 170),
  },
  "three, the first one larger": {
    lines: `size=700M,name=${magic} size=150M,name=${magic} name=${magic}`,
    used: 1,
    keeps: `${mebibytes(701, 70)}; ${mebibytes(851, 70)}`,
  },
};

for (const [what, { lines, used, keeps }] of Object.entries(severalParts)) {
  const disk: DiskSpec = {
    ...blankDisk,
    sizeBytes: 1500 * MiB,
    contents: `${tools} gpt "$DISK" ${lines}`,
  };
  const usesOne = async (system: System) => {
    const assertOne = async () => {
      const shown = await system.sh(
        "btrfs filesystem show mnt/lightwhale-data",
      );
      const found = [...shown.matchAll(/path (\S+)/g)].map(([, path]) => path);
      const [{ path }, other] = system.disks;
      const expected = [`${path}p${used}`, ...other ? [`${other.path}p1`] : []];
      assertEquals(found.sort(), expected.sort());
    };
    await assertOne();
    await system.reboot();
    await bootPersistent(system);
    await assertOne();
  };
  const expected: Situation = {
    disks: [disk],
    keeps,
    mode: "persistent",
    uses: [1],
    says: ["%1p2"],
  };
  situation(`magic partitions, ${what}: the largest is used`, {
    ...expected,
    also: usesOne,
  });
  situation(`magic partitions, ${what}, and a magic disk: one of each`, {
    ...expected,
    disks: [disk, magicDisk],
    uses: [1, 2],
    also: usesOne,
  });
  situation(`magic partitions, ${what}, beside a data disk: one joins`, {
    ...expected,
    disks: [disk, magicDisk],
    earlier: [[2]],
    uses: [2],
    mayChange: [1],
    also: usesOne,
  });
}

// A20: formatted although another disk is in doubt.

/** Disks of which nobody knows whether they hold data of ours. */
const doubts: Record<string, { contents?: string; then?: string }> = {
  "cannot be read": {
    then: 'truncate -s 0 "$(losetup -nO BACK-FILE "$1")"',
  },
  "is damaged": { contents: leftovers["a data partition that is damaged"] },
  "is two things at once": {
    contents: `old "$DISK"; mbr "$DISK" 'start=2048'`,
  },
};

/** What follows the header, and whether it means "anyway". */
const afterHeader: Record<string, boolean> = {
  "\\n": false,
  "\\nlightwhale-anyway\\n": true,
  "\\nlightwhale-anyway": true,
  "\\nlightwhale-anyway-not\\n": false,
  "\\n\\nlightwhale-anyway\\n": false,
  "lightwhale-anyway\\n": false,
};

for (const [what, { contents, then }] of Object.entries(doubts)) {
  const doubtful: DiskSpec = {
    ...blankDisk,
    contents: contents && tools + contents,
  };
  for (const [text, anyway] of Object.entries(afterHeader)) {
    // The near misses once.
    if (what !== "is damaged" && !anyway && text !== "\\n") continue;
    situation(
      `a disk ${what}, and "${text}" follows the header of another one: ` +
        (anyway ? "that is formatted" : "nothing is formatted"),
      {
        disks: [doubtful, {
          ...blankDisk,
          contents: `printf '${magic}${text}' |
            dd of="$DISK" conv=notrunc status=none`,
        }],
        then,
        mode: anyway ? "persistent" : "fallback",
        status: anyway ? undefined : 1,
        uses: anyway ? [2] : [],
        says: ["%1", ...text === "\\n" ? ["--enable --force %2"] : []],
      },
    );
  }
  onDisks(
    `a disk ${what}: --enable --force has another one formatted`,
    { disks: [doubtful, blankDisk] },
    async (system) => {
      const [, { path }] = system.disks;
      const args = [...system.place(), "--enable", "--force", path];
      const { status, stderr } = await system.run(args);
      assertEquals(status, 0, stderr);
      const start = await command(["head", "-c", "48", path]);
      assertMatch(start, new RegExp(`^${magic}\nlightwhale-anyway[\n\0]`));
      await system.reboot();
      await play(system, {
        disks: [doubtful, blankDisk],
        then,
        mode: "persistent",
        uses: [2],
      });
    },
  );
}

// A21: a disk that became smaller.

const shrink = 'truncate -s -4M "$1"';

situation("half of a mirror became 4 MiB smaller: the other half is used", {
  disks: [magicDisk, magicDisk],
  earlier: [[1, 2]],
  whileOff: shrink,
  mode: "persistent",
  uses: [2],
  says: ["%1.*small"],
  withinMs: 8000,
  also: (_, { report, stderr }) => assertEquals(report.degraded, true, stderr),
});

situation("a data disk became 4 MiB smaller: nothing is formatted", {
  disks: [magicDisk, magicDisk],
  earlier: [[1]],
  whileOff: shrink,
  mode: "fallback",
  status: 1,
  says: ["%1.*small"],
  withinMs: 8000,
});

situation("a filesystem on a whole disk that became smaller: named", {
  disks: [oldDisk, magicDisk],
  whileOff: shrink,
  mode: "fallback",
  status: 1,
  says: ["%1.*small"],
  withinMs: 8000,
});

situation("a data disk lost its last sector, which no partition has: used", {
  disks: [magicDisk],
  earlier: [[1]],
  whileOff: 'truncate -s -512 "$1"',
  mode: "persistent",
  uses: [1],
  withinMs: 8000,
});

// A22: images of disks that are not raw.

const imageFormats: Record<string, { start: string; says: RegExp }> = {
  "qcow2": { start: "QFI\\373\\0\\0\\0\\3", says: /qcow2?/i },
  "VMDK": { start: "KDMV\\1\\0\\0\\0", says: /vmdk/i },
  "a VMDK's descriptor": {
    start: "# Disk DescriptorFile\\nversion=1\\n",
    says: /vmdk/i,
  },
  "VDI": {
    start: "<<< Oracle VM VirtualBox Disk Image >>>\\n" +
      "\\0".repeat(24) + "\\177\\20\\332\\276",
    says: /vdi|virtualbox/i,
  },
  "VHDX": { start: "vhdxfile", says: /vhdx/i },
  "VHD": { start: "conectix", says: /vhd|vpc/i },
  "gzip": { start: "\\37\\213\\10\\0", says: /gzip/i },
  "xz": { start: "\\3757zXZ\\0", says: /\bxz\b/i },
  "Zstandard": { start: "\\50\\265\\57\\375", says: /zstd|zstandard/i },
  "lz4": { start: '\\4"M\\30', says: /lz4/i },
  "7z": { start: "7z\\274\\257\\47\\34", says: /7z/i },
  "an OVA": { start: `${"x".repeat(257)}ustar`, says: /\btar\b/i },
  "a sparse Android image": { start: ":\\377&\\355", says: /android/i },
  "a backup of Proxmox": { start: "VMA\\0", says: /vma/i },
};

for (const [format, { start, says }] of Object.entries(imageFormats)) {
  onDisks(
    `--enable of an image: ${format} is named, and never written to`,
    { disks: [blankDisk] },
    async (system) => {
      for (const size of ["200K", "3M"]) {
        const image = `${system.root}/tmp/image`;
        await system.sh(
          `head -c ${size} /dev/urandom > tmp/image
           printf '${start}' | dd of=tmp/image conv=notrunc status=none`,
        );
        const before = await system.sh("sha256sum tmp/image");
        for (const force of [[], ["--force"]]) {
          const args = [...system.place(), ...force, "--enable", image];
          const { status, stderr } = await system.run(args);
          assert(status !== 0, `${size} ${force}: ${stderr}`);
          assertEquals(await system.sh("sha256sum tmp/image"), before);
          assertMatch(stderr, says);
          assert(!/truncate/.test(stderr), stderr);
        }
      }
    },
  );
}

onDisks(
  "--enable of an image that is in use by another name",
  { disks: [blankDisk] },
  async (system) => {
    const { run, disks: [{ image }] } = system;
    const other = `${image}.link`;
    await command(["ln", image, other]);
    const { status, stderr } = await run([
      ...system.place(),
      "--enable",
      other,
    ]);
    assertEquals(status, 2, stderr);
    assertMatch(stderr, /in use by \/dev\/loop/);
  },
);

onDisks(
  "--enable of a small file that is no image: no advice to make it larger",
  { disks: [blankDisk] },
  async (system) => {
    for (const [contents, isAdvised] of [["hello", false], ["", true]]) {
      await system.sh(`printf '${contents}' > tmp/file`);
      const args = [...system.place(), "--enable", `${system.root}/tmp/file`];
      const { status, stderr } = await system.run(args);
      assertEquals([status, /truncate/.test(stderr)], [2, isAdvised], stderr);
    }
  },
);

// A23: mkfs.btrfs has its own reasons.

const refusals = [
  "ERROR: unable to create FS with metadata profile raid1c3 (have 3 devices)",
  "ERROR: unknown profile raid1c3",
  "ERROR: not enough free memory",
];

for (const words of refusals) {
  onDisks(
    `the rehearsal of mkfs.btrfs says "${words}": so does the boot`,
    { disks: [magicDisk, magicDisk, magicDisk] },
    async (system) => {
      const before = await Promise.all(system.disks.map(system.checksum));
      const { status, report, stderr } = await bootWith(system, {
        "mkfs.btrfs": `*rehearsal-*) echo "${words}" >&2; exit 1`,
      });
      assertEquals([status, report.mode], [1, "fallback"], stderr);
      assert(stderr.includes(words), stderr);
      assert(!/too small/.test(stderr), stderr);
      const after = await Promise.all(system.disks.map(system.checksum));
      assertEquals(after, before, stderr);
    },
  );
}

// REVIEW 3.2: a boot loader before the filesystem.

const slots: Record<string, { seek: number; count: number }> = {
  "at 56 and 60 KiB": { seek: 14, count: 2 },
  "at 56 KiB": { seek: 14, count: 1 },
  "at 60 KiB": { seek: 15, count: 1 },
  "from LBA 1 to 64 KiB": { seek: 1, count: 15 },
};

for (const [where, { seek, count }] of Object.entries(slots)) {
  for (const part of ["", "p1"]) {
    const node = `"$1"${part}`;
    const read = `partx -u "$1" 2>/dev/null || :
      dd if=${node} bs=4k skip=${seek} count=${count} status=none | sha256sum`;
    situation(
      `a ${
        part ? "data partition" : "whole disk"
      } has a boot loader ${where}: ` +
        "it stays, and the data filesystem is used",
      {
        disks: [part ? magicDisk : oldDisk],
        earlier: part ? [[1]] : undefined,
        then: `partx -u "$1" 2>/dev/null || :
          dd if=/dev/urandom of=${node} bs=4k seek=${seek} count=${count} \
            conv=notrunc status=none`,
        keeps: read,
        mode: "persistent",
        uses: [1],
        also: async (system, { report }) => {
          const { disks } = system;
          const said = [...report.warnings, ...report.errors];
          assert(said.some((text) => text.includes(disks[0].path)), `${said}`);
          await system.reboot(); // records are written in turn
          const before = await onDevices(disks, read);
          const { stderr } = await bootPersistent(system);
          assertEquals(await onDevices(disks, read), before, stderr);
        },
      },
    );
  }
}

// REVIEW 3.3: another disk takes the name between the look and the wipe.

/** What takes the place of a magic disk. */
const changelings: Record<string, string> = {
  "a disk with ext4": 'mkfs.ext4 -q "$DISK"',
  "a data disk": oldDisk.contents!,
  "a blank disk": ":",
};

for (const [what, contents] of Object.entries(changelings)) {
  for (const when of ["rehearsal", "mount"]) {
    if (when === "mount" && contents === ":") continue;
    onDisks(
      `${what} takes the name of a magic disk that is to ` +
        `${when === "mount" ? "join" : "be formatted"}: it is not touched`,
      { disks: [magicDisk, magicDisk] },
      async (system) => {
        const [first, magicOne] = system.disks;
        await system.reboot({ without: [magicOne] });
        if (when === "mount") {
          await bootPersistent(system);
          await system.reboot({ without: [magicOne] });
        }
        await system.attach(magicOne, farPlace); // nobody else takes it
        const other = await system.plug({ ...blankDisk, contents });
        const before = await system.checksum(other);
        await command(["losetup", "--detach", other.path]);
        other.path = "";
        const exchange = `test -e "${system.root}/run/done" || {
          losetup --detach ${magicOne.path}
          losetup ${magicOne.path} ${other.image}
          : > "${system.root}/run/done"; }`;
        const boot = await bootWith(system, {
          "mkfs.btrfs": when === "rehearsal"
            ? `*rehearsal-*) ${exchange}`
            : "x)",
          "mount": when === "mount" ? `*) ${exchange}` : "x)",
        });
        await system.settle();
        assertEquals(await system.sh("ls run/done"), "run/done\n");
        [other.path, magicOne.path] = [magicOne.path, ""];
        const after = await system.checksum(other);
        assertEquals(after, before, boot.stderr);
        if (boot.report.mode === "persistent") {
          assertEquals(boot.report.devices, [`${first.path}p1`]);
        } else assert(await isMarked(first), `It was wiped: ${boot.stderr}`);
      },
    );
  }
}

onDisks(
  "a disk with ext4 takes the name of the data disk: it is not touched",
  { disks: [magicDisk] },
  async (system) => {
    await bootPersistent(system);
    const [data] = system.disks;
    const other = await system.plug({
      ...blankDisk,
      contents: `${tools} gpt "$DISK" name=photos; mkfs.ext4 -q "$DISK"p1`,
    });
    const before = await system.checksum(other);
    await system.reboot({ without: [other] });
    // The kernel is shown the partitions between the look and the mount.
    const boot = await bootWith(system, {
      "partx": `*) losetup --detach ${data.path}
        losetup ${data.path} ${other.image}`,
    });
    other.path = data.path;
    assertEquals(await system.checksum(other), before, boot.stderr);
    assertEquals([boot.status, boot.report.mode], [1, "fallback"]);
    other.path = "";
  },
);

onDisks(
  "a magic partition that another one overlaps is neither formatted nor enabled",
  {
    disks: [{
      ...blankDisk,
      contents: `${tools} gpt "$DISK" 'size=200MiB, name=${magic}' \
        'size=200MiB, name=photos'
        mkfs.ext4 -q "$DISK"p2`,
    }],
  },
  async (system) => {
    const [disk] = system.disks;
    await system.reboot({ whileOff: () => stretchFirst(disk.image, 300) });
    const before = await system.checksum(disk);
    const boot = await system.boot();
    assertStringIncludes(boot.stderr, `overlaps partition 2 of ${disk.path}`);
    assertEquals([boot.status, boot.report.mode], [1, "fallback"]);
    await command(["partx", "-u", disk.path]);
    const enabled = await system.run(["--enable", "--force", `${disk.path}p1`]);
    assertStringIncludes(enabled.stderr, "overlaps partition 2");
    assertEquals(await system.checksum(disk), before);
  },
);

onDisks(
  "an old node has the name of a partition: the disk behind it stays",
  { disks: [magicDisk, { ...blankDisk, contents: 'mkfs.ext4 -q "$DISK"' }] },
  async (system) => {
    // It is formatted, and then it is to be mounted.
    for (const isMade of [false, true]) {
      const [{ path }, other] = system.disks;
      const before = await system.checksum(other);
      await system.sh(`mknod ${path}p1 b $(stat -c '0x%t 0x%T' ${other.path})`);
      try {
        const { stderr } = await system.boot();
        assertStringIncludes(stderr, `Cannot find ${path}p1`);
        assertEquals(await system.checksum(other), before);
      } finally {
        await system.sh(`rm ${path}p1`);
      }
      await system.reboot();
      if (isMade) continue;
      await bootPersistent(system);
      await system.reboot();
    }
  },
);

/** Lets the first partition of an image end elsewhere; sfdisk would refuse. */
async function stretchFirst(image: string, mebibytes: number): Promise<void> {
  const [header, entries] = [512, 1024];
  const table = Buffer.alloc(34 * 512);
  const file = await Deno.open(image, { read: true, write: true });
  await file.read(table);
  table.writeBigUint64LE(BigInt(mebibytes * MiB / 512 - 1), entries + 40);
  table.writeUint32LE(crc32(table.subarray(entries)), header + 88);
  table.writeUint32LE(0, header + 16);
  const sum = crc32(table.subarray(header, header + 92));
  table.writeUint32LE(sum, header + 16);
  await file.seek(0, Deno.SeekMode.Start);
  await file.write(table);
  file.close();
}

onDisks(
  "a magic disk is disabled while the boot thinks: it is not formatted",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const [first, second] = system.disks;
    const clear = `dd if=/dev/zero of=${second.path} bs=27 count=1 \
      conv=notrunc,fsync status=none`;
    const boot = await bootWith(system, {
      "mkfs.btrfs": `*rehearsal-*) ${clear}`,
    });
    const left = await onDevices([second], `tr -d '\\0' < "$1" | wc -c`);
    assertEquals(left.trim(), "0", boot.stderr);
    if (boot.report.mode !== "persistent") assert(await isMarked(first));
  },
);

// REVIEW 3.4: a disk that is in use where nobody sees it.

const unseen: Record<string, { contents: string; node: string }> = {
  "the disk": { contents: `mkfs.ext4 -q "$DISK"; ${header}`, node: "" },
  "its partition": {
    contents: `${tools} gpt "$DISK" size=300M; mkfs.ext4 -q "$DISK"p1
      ${header}`,
    node: "p1",
  },
  "the magic partition": {
    contents: `${magicPartition()}; mkfs.ext4 -q "$DISK"p2`,
    node: "p2",
  },
};

for (const [what, { contents, node }] of Object.entries(unseen)) {
  onDisks(
    `of the second magic disk ${what} is mounted elsewhere: it is not touched`,
    { disks: [magicDisk, { ...blankDisk, contents }] },
    async (system) => {
      const [first, second] = system.disks;
      if (node) await onDevices([second], 'partx -u "$1"');
      const before = await Promise.all(system.disks.map(system.checksum));
      const release = await mountElsewhere(`${second.path}${node}`);
      try {
        const { report, stderr } = await system.boot();
        await system.settle();
        const after = await Promise.all(system.disks.map(system.checksum));
        assertEquals(after[1], before[1], stderr);
        assertMatch(stderr, new RegExp(second.path));
        if (report.mode === "persistent") {
          assertEquals(report.devices, [`${first.path}p1`], stderr);
        } else assertEquals(after[0], before[0], `It was wiped: ${stderr}`);
      } finally {
        await release();
      }
    },
  );
}

/** Mounts a device in a mount namespace of its own, until it is released. */
async function mountElsewhere(path: string): Promise<() => Promise<void>> {
  const holder = new Deno.Command("unshare", {
    args: [
      ...["--mount", "--propagation", "private", "sh", "-euc"],
      'mount -o ro,noload "$1" /mnt; echo; exec cat',
      ...["sh", path],
    ],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  const reader = holder.stdout.getReader();
  const { done } = await reader.read();
  assert(!done, `Cannot mount ${path}`);
  return async () => {
    await reader.cancel();
    await holder.stdin.close();
    await holder.status;
  };
}

// REVIEW 3.11 and 3.12: swap is not worth more than the data.

const swapDisk: DiskSpec = { ...magicDisk, sizeBytes: 2100 * MiB };

situation("a swap partition became a volume of LVM: it is not swap", {
  disks: [swapDisk],
  earlier: [[1]],
  then: `partx -u "$1"
    printf 'LABELONE\\001\\0\\0\\0\\0\\0\\0\\0' | put "$1"p1 512
    printf '\\0\\0\\0\\0\\040\\0\\0\\0LVM2 001' | put "$1"p1 528`,
  keeps: 'head -c 64K "$1"p1 | sha256sum; ! grep "$1"p1 /proc/swaps',
  uses: [1],
  says: ["%1p1", "LVM2_member"],
});

/** What mkswap does instead. */
const mkswaps: Record<string, string> = {
  "makes pages of 8 KiB": '*) exec mkswap --pagesize 8192 "$@"',
  "makes pages of 16 KiB": '*) exec mkswap --pagesize 16384 "$@"',
  "makes pages of 64 KiB": '*) exec mkswap --pagesize 65536 "$@"',
  "fails": "*) echo no can do >&2; exit 7",
  "is killed": "*) kill -SEGV $$",
};

for (const [what, cases] of Object.entries(mkswaps)) {
  onDisks(
    `mkswap ${what}: the disk is formatted, and used from then on`,
    { disks: [swapDisk] },
    async (system) => {
      const { report, stderr } = await bootWith(system, { mkswap: cases });
      assertEquals(report.mode, "persistent", stderr);
      if (what.startsWith("makes")) assert(!/Cannot find swap/.test(stderr));
      else assertMatch(stderr, /mkswap/);
      await system.sh("echo precious > etc/precious");
      await system.reboot();
      await bootPersistent(system);
      assertEquals(await system.sh("cat etc/precious"), "precious\n");
    },
  );
}

// REVIEW 3.15: what mkfs.btrfs made is one filesystem.

const parted: Record<string, string> = {
  "two filesystems": 'mkfs.btrfs $words "$spare" "$second"',
  "the same member twice":
    'dd if="$first" of="$second" bs=1M count=200 status=none',
};

for (const [what, script] of Object.entries(parted)) {
  onDisks(
    `mkfs.btrfs makes ${what}: the disks stay magic`,
    { disks: [magicDisk, magicDisk] },
    async (system) => {
      const boot = await bootWith(system, {
        "mkfs.btrfs": `*rehearsal-*) ;;
          *) for path; do first=\${second-}; second=$path; done
             words="--quiet --force --label lightwhale-unfinished"
             words="$words --data raid1 --metadata raid1"
             spare=$(mktemp); truncate -s 599M "$spare"
             mkfs.btrfs $words "$first" "$spare"
             ${script}; rm "$spare"; exit`,
      });
      assertEquals([boot.status, boot.report.mode], [1, "fallback"]);
      for (const disk of system.disks) assert(await isMarked(disk));
      await system.reboot();
      const { report } = await bootPersistent(system);
      assertEquals([report.devices.length, report.degraded], [2, false]);
    },
  );
}

// Helpers

/** A script: the checksum of some of the first disk. */
function mebibytes(from: number, count: number): string {
  return `dd if="$1" bs=1M skip=${from} count=${count} status=none | sha256sum`;
}

/** Boots; all is well. */
async function bootPersistent(system: System): Promise<Boot> {
  const boot = await system.boot(["--wait", "0"]);
  assertEquals(boot.report.mode, "persistent", boot.stderr);
  await idle(system);
  return boot;
}

/** A boot in which these programs do something else in some cases. */
async function bootWith(
  system: System,
  programs: Record<string, string>,
): Promise<Boot> {
  const folder = await Deno.makeTempDir({ prefix: "persistence-cases-" });
  try {
    for (const [name, cases] of Object.entries(programs)) {
      const script = `#!/bin/sh\nPATH=${systemPath}\n` +
        `case $* in ${cases} ;; esac\nexec ${name} "$@"\n`;
      await Deno.writeTextFile(`${folder}/${name}`, script, { mode: 0o755 });
    }
    const path = `${folder}:${systemPath}`;
    return await system.boot(["--wait", "0"], { path });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
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

/** Numbers of the disks that the mounted data filesystem is on. */
async function membersOf({ disks, sh }: System): Promise<number[]> {
  const shown = await sh("btrfs filesystem show mnt/lightwhale-data");
  const devices = [...shown.matchAll(/path (\S+)/g)].map(([, path]) => path);
  return disks.map((_, n) => n + 1)
    .filter((n) => devices.some((device) => isPartOf(device, disks[n - 1])));
}

onDisks(
  "a person gives the data filesystem another label: that is said",
  { disks: [magicDisk] },
  async (system) => {
    await bootPersistent(system);
    const says = async (label: string) => {
      await system.sh(`btrfs filesystem label mnt/lightwhale-data "${label}"`);
      return (await system.run([...system.place(), "--status"])).stdout;
    };
    assertMatch(await says("photos"), /label "photos".*filesystem label/);
    assertMatch(await says(""), /label "".*filesystem label/);
    assertMatch(await says(label), /Healthy/);
  },
);

/** What keeps a data filesystem from being written to, made in its top level. */
const unwritable: Record<string, { script: string; says: string }> = {
  "the upper of /etc is immutable": {
    script: "chattr +i @lightwhale-state/overlay/upper/etc",
    says: "is immutable.*chattr -i /run/top/@lightwhale-state/overlay",
  },
  "the state is immutable": {
    script: "chattr +i @lightwhale-state",
    says: 'is immutable.*chattr -i /run/top/@lightwhale-state"',
  },
  "the state has reached the limit of its quota group": {
    script: "btrfs quota enable .; btrfs qgroup limit 16K @lightwhale-state",
    says: "quota group.*btrfs qgroup show",
  },
};

for (const [what, { script, says }] of Object.entries(unwritable)) {
  situation(`${what}: the fallback, with the cause`, {
    disks: [{
      ...blankDisk,
      contents: `${tools} old "$DISK"; folder=$(mktemp -d)
        mount "$DISK" $folder; ( cd $folder
        btrfs -q subvolume create @lightwhale-state
        ${
        script.startsWith("btrfs")
          ? ":"
          : "mkdir -p @lightwhale-state/overlay/upper/etc"
      }; ${script} )
        umount $folder; rmdir $folder`,
    }],
    mode: "fallback",
    status: 1,
    mayChange: [1],
    says: [says],
    also: (system) => system.sh("touch etc/new"),
  });
}

// Damage that is easily taken for emptiness.

situation(
  "a lost superblock behind a record of ours: no other disk is formatted",
  {
    disks: [
      { ...blankDisk, contents: `mkfs.btrfs -q -L ${label} "$DISK"` },
      magicDisk,
    ],
    earlier: [[1]],
    whileOff:
      'dd if=/dev/zero of="$1" bs=64k seek=1 count=1 conv=notrunc status=none',
    mode: "fallback",
    status: 1,
    says: ["%1.*super-recover"],
  },
);

situation("the first two sectors are lost: the table comes back", {
  disks: [magicDisk, magicDisk],
  earlier: [[1]],
  whileOff: 'dd if=/dev/zero of="$1" bs=1k count=1 conv=notrunc status=none',
  mode: "persistent",
  status: 0,
  uses: [1],
  mayChange: [2],
});

onDisks(
  "the magic of a disk is taken away only where it is: boot code stays",
  {
    disks: [{
      ...blankDisk,
      contents: `${tools} gpt "$DISK" name=${magic}
        head -c 440 /dev/urandom | dd of="$DISK" conv=notrunc status=none`,
    }],
  },
  async (system) => {
    const [{ path }] = system.disks;
    const bootCode = () =>
      command(["sh", "-c", `head -c 440 ${path} | sha256sum`]);
    const before = await bootCode();
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "persistent", stderr);
    const disabled = await system.run([...system.place(), "--disable", path]);
    assertEquals(disabled.status, 0, disabled.stderr);
    assertEquals(await bootCode(), before, stderr);
  },
);

onDisks(
  "a disk is started over while its data are in use: at the next boot, as said",
  { disks: [swapDisk] },
  async (system) => {
    await bootPersistent(system);
    const [{ path }] = system.disks;
    const zeros = 'dd if=/dev/zero of="$1" count=1 conv=notrunc status=none';
    await onDevices(system.disks, `${zeros}; printf ${magic} | put "$1" 0`);
    const run = (...args: string[]) => system.run([...system.place(), ...args]);
    const { stdout } = await run("--dry-run");
    assertMatch(stdout, new RegExp(`partition ${path} `));
    for (const args of [["--maintain"], []]) {
      assertEquals((await run(...args)).status, 0);
      assert(await isMarked(system.disks[0]));
    }
    await system.sh("echo precious > etc/precious");
    await system.reboot();
    await bootPersistent(system);
    assertEquals(await system.sh("cat etc/precious || echo none"), "none\n");
  },
);

/** A filesystem as a power cut leaves it, with a log tree. */
const withLog = `old "$DISK"
  folder=$(mktemp -d); mount "$DISK" $folder
  rootOf() { # the logical address of a tree
    btrfs inspect-internal dump-super "\${2-$DISK}" |
      while read -r key value; do [ "$key" != "$1" ] || echo $value; done
  }
  echo before > $folder/file
  for try in 1 2 3 4 5 6 7 8; do # a commit of its own has no log
    sync -f $folder
    echo "logged $try" | dd of=$folder/file conv=fsync,notrunc status=none
    # What it writes goes past the cache of the device.
    dd if="$DISK" of="$folder.copy" bs=1M iflag=direct conv=sparse status=none
    [ $(rootOf log_root "$folder.copy") = 0 ] || break
  done
  umount $folder
  dd if="$folder.copy" of="$DISK" bs=1M conv=fsync status=none
  rm "$folder.copy"; rmdir $folder
  blockdev --flushbufs "$DISK"
  test $(rootOf log_root) -gt 0
  damage() { # both copies: no extent tells where those of the log tree are
    btrfs-map-logical -l $(rootOf root) "$DISK" | while read -r line; do
      byte=\${line#*physical }
      byte=$((\${byte%% *} + $(rootOf $1) - $(rootOf root)))
      dd if=/dev/urandom of="$DISK" bs=4K seek=$((byte / 4096)) count=1 \\
        conv=notrunc status=none
    done
  }
`;

situation("the log tree is broken: the cause, and what its remedy costs", {
  disks: [{
    ...blankDisk,
    contents: `${tools} ${withLog} damage log_root`,
  }],
  mode: "fallback",
  status: 1,
  mayChange: [1],
  says: [
    "Cannot mount %1.*log tree is broken.*rescue zero-log %1.*last seconds",
  ],
  async also(system) {
    assertMatch(
      await system.sh("cat mnt/lightwhale-data/lightwhale-state/docker"),
      /rescue zero-log/,
    );
    await system.sh(`btrfs rescue zero-log ${system.disks[0].path}`);
    await system.reboot();
    const boot = await system.boot();
    assertEquals(boot.report.mode, "persistent", boot.stderr);
  },
});

situation("more than the log tree is broken: no word of the log", {
  disks: [{
    ...blankDisk,
    contents: `${tools} ${withLog} damage root`,
  }],
  mode: "fallback",
  status: 1,
  mayChange: [1],
  says: ["Cannot mount %1"],
  neverSays: ["zero-log"],
});

situation("a log tree that is whole is replayed", {
  disks: [{ ...blankDisk, contents: `${tools} ${withLog}` }],
  mode: "persistent",
  status: 0,
  uses: [1],
  neverSays: ["zero-log"],
});
