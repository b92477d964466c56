/**
 * Disks that change while the system runs: the data move to another disk, a
 * member leaves, a disk joins at once. Files are written meanwhile, all are
 * compared by checksum, and the disk that has left must be blank.
 */
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import {
  type Boot,
  command,
  type Disk,
  type DiskSpec,
  header,
  holdWork,
  idle,
  isMarked,
  MiB,
  mountState,
  onDisks,
  profiles,
  type Result,
  sleep,
  statusOf,
  type System,
} from "./system.ts";

const magicDisk: DiskSpec = { sizeBytes: 800 * MiB, contents: header };
const emptyDisk: DiskSpec = { sizeBytes: 800 * MiB };
const state = "mnt/lightwhale-data/lightwhale-state";

/** Profiles of data, metadata and system, by the number of disks. */
const whole = [
  "",
  "single dup dup",
  "raid1 raid1 raid1",
  "raid1 raid1c3 raid1c3",
  "raid1 raid1c4 raid1c4",
];

/** MOVES=all: also what differs only in a number. */
const isAll = Deno.env.get("MOVES") === "all";

onDisks(
  "--enable --now: a disk joins while the system runs",
  { disks: [magicDisk, emptyDisk] },
  async (system) => {
    await persist(system);
    const [, fresh] = system.disks;
    const done = await asked(system, ["--enable", "--now", fresh.path]);
    assertMatch(done.stdout, /in the background/);
    await idle(system);
    assertEquals(await profiles(system), whole[2]);
    await assertKept(system);
    assertEquals((await statusOf(system)).health, []);
    if (isAll) { // and leaves again
      await asked(system, ["--remove", fresh.path]);
      await system.reboot();
      assertEquals((await system.boot()).status, 0);
      await idle(system);
      await assertBlank(fresh);
      assertEquals(await profiles(system), whole[1]);
      return await assertKept(system);
    }
    await assertReadableOn(system, [[0], [1]]);
  },
);

// Moved

/** OLD has 800 MiB; what is not in CI differs in little. */
const moves: Record<
  string,
  { mebibytes: number; old?: DiskSpec; sectorBytes?: 4096; isInCi?: true }
> = {
  "to a disk that is as large": { mebibytes: 800 },
  "to a larger disk": { mebibytes: 1100, isInCi: true },
  "to a smaller disk": { mebibytes: 700, isInCi: true },
  "to a disk that is one MiB smaller": { mebibytes: 799 },
  "to a disk of 4096-byte sectors": { mebibytes: 800, sectorBytes: 4096 },
  "from a whole disk without a table": {
    mebibytes: 800,
    old: { ...emptyDisk, contents: 'mkfs.btrfs -q -L lightwhale-data "$DISK"' },
  },
};

onDisks(
  "--move: a file cannot be read, so nothing moves, and the old disk stays",
  { disks: [magicDisk, emptyDisk] },
  async (system) => {
    await persist(system);
    const [old, fresh] = system.disks;
    await system.sh(
      `cd ${state}; head -c 300M /dev/urandom > large; sync large`,
    );
    await system.reboot({ whileOff: () => damage(old) });
    await system.boot();
    await asked(system, ["--move", old.path, fresh.path]);
    await idle(system);
    const { health, leaving } = await statusOf(system);
    assertEquals(leaving, null);
    assertMatch(health.join("\n"), /large/);
    assertEquals(await memberDisks(system), [old.path]);
    assert(!await isMarked(fresh));
    await system.reboot();
    const boot = await system.boot();
    assertEquals(boot.report.devices, [`${old.path}p1`], boot.stderr);
    // As it is asked to: without the file, all of it moves.
    await system.sh(`rm ${state}/large`);
    await asked(system, ["--move", old.path, fresh.path]);
    await idle(system);
    assertEquals(await memberDisks(system), [fresh.path]);
    await assertBlank(old);
    await assertKept(system);
  },
);

onDisks(
  "a disk that has left is not said to hold nothing once it is taken again",
  { disks: [magicDisk, emptyDisk] },
  async (system) => {
    await system.boot();
    const [first, second] = system.disks;
    const pulls = async () =>
      (await statusOf(system)).health.join().match(/(\S+) holds none/)?.[1];
    await asked(system, ["--move", first.path, second.path]);
    await idle(system);
    assertEquals(await pulls(), first.path);
    await asked(system, ["--enable", first.path]);
    assertEquals(await pulls(), undefined);
    await asked(system, ["--disable", first.path]);
    assertEquals(await pulls(), first.path);
    await asked(system, ["--enable", "--now", first.path]);
    await idle(system);
    assertEquals((await memberDisks(system)).length, 2);
    assertEquals((await statusOf(system)).health, []);
  },
);

for (const [what, spec] of Object.entries(moves)) {
  const { mebibytes, sectorBytes, old = magicDisk, isInCi } = spec;
  if (!isInCi && !isAll) continue;
  onDisks(
    `--move: the data move ${what}, under load`,
    { disks: [old, { sizeBytes: mebibytes * MiB, sectorBytes }] },
    async (system) => {
      await persist(system);
      const [old, fresh] = system.disks;
      await underLoad(system, async () => {
        const done = await asked(system, ["--move", old.path, fresh.path]);
        assertMatch(done.stdout, /in the background/);
        await idle(system);
      });
      await assertKept(system);
      const late = await system.run([...system.place(), "--move", "--cancel"]);
      assertEquals(late.status, 2, late.stdout);
      assertEquals(await memberDisks(system), [fresh.path]);
      const { health, leaving } = await statusOf(system);
      assertEquals(leaving, null);
      assertMatch(
        health.join("; "),
        new RegExp(`^${old.path} .*can be pulled`),
      );
      await assertBlank(old);
      assertEquals(await profiles(system), whole[1]);
      const size = await system.sh(
        "df --output=size -B 1M mnt/lightwhale-data | tail -n 1",
      );
      assert(Number(size) > mebibytes - 10, size);

      // With both, then with the new one alone.
      for (const without of [[], [old]]) {
        await system.reboot({ without });
        const boot = await system.boot();
        assertPersistent(boot, 1);
        assertEquals(boot.report.warnings, []);
        await assertKept(system);
        assertEquals((await statusOf(system)).health, []);
      }
    },
  );
}

onDisks(
  "--move: each member of a mirror to another disk, one of them a partition",
  {
    disks: [magicDisk, magicDisk, emptyDisk, {
      sizeBytes: 1000 * MiB,
      contents: `printf '%s\\n' 'size=100MiB, name=other' 'name=free' |
          sfdisk -q --no-tell-kernel --label gpt "$DISK"
        yes 'not yours' | head -c 100M |
          dd of="$DISK" bs=1M seek=1 conv=notrunc status=none`,
    }],
  },
  async (system) => {
    await persist(system);
    const [first, second, third, shared] = system.disks;
    await command(["partx", "--update", shared.path]);
    const neighbour = () =>
      command([
        "sh",
        "-euc",
        'head -c 100M "$1" | sha256sum',
        "sh",
        `${shared.path}p1`,
      ]);
    const before = await neighbour();
    await asked(system, ["--move", `${first.path}p1`, third.path]);
    await idle(system);
    await asked(system, ["--move", second.path, `${shared.path}p2`]);
    await idle(system);
    await assertKept(system);
    assertEquals(await memberDisks(system), [third.path, shared.path]);
    for (const disk of [first, second]) await assertBlank(disk);
    assertEquals(await profiles(system), whole[2]);
    // And back from the shared disk.
    await asked(system, ["--move", `${shared.path}p2`, first.path]);
    await idle(system);
    assertEquals(await memberDisks(system), [first.path, third.path].sort());
    assertEquals(await partitions(shared), [
      `${shared.path}p1`,
      `${shared.path}p2`,
    ]);
    assertEquals(await neighbour(), before);
    assertEquals(await holds(`${shared.path}p2`), "");
    await assertKept(system);
    await assertReadableOn(system, [[0], [2]]);
  },
);

// Removed

for (const count of isAll ? [2, 3, 4] : [2, 3]) {
  const disks: [DiskSpec, ...DiskSpec[]] = [magicDisk];
  while (disks.length < count) disks.push(magicDisk);
  onDisks(
    `--remove: one of ${count} leaves, under load`,
    { disks },
    async (system) => {
      await persist(system);
      assertEquals(await profiles(system), whole[count]);
      const [gone] = system.disks;
      const staying = system.disks.slice(1);
      await underLoad(system, async () => {
        const done = await asked(system, ["--remove", gone.path]);
        if (count > 2) return await idle(system);
        assertMatch(done.stdout, /next boot/);
        assertMatch((await statusOf(system)).leaving?.text ?? "", /next boot/);
        const { stdout } = await system.run([...system.place(), "--dry-run"]);
        assertMatch(stdout, new RegExp(`leave ${gone.path}p1 out`));
      });
      if (count === 2) {
        await system.reboot();
        const boot = await system.boot();
        assertEquals(boot.status, 0, boot.stderr);
        await underLoad(system, () => idle(system));
      }
      await assertKept(system);
      assertEquals(
        await memberDisks(system),
        staying.map(({ path }) => path).sort(),
      );
      assertEquals(await profiles(system), whole[count - 1]);
      await assertBlank(gone);
      const { health } = await statusOf(system);
      assertMatch(health.join("; "), /can be pulled$/);
      for (const without of [[], [gone]]) {
        await system.reboot({ without });
        const boot = await system.boot();
        assertPersistent(boot, count - 1);
        assertEquals(boot.report.warnings, []);
        await assertKept(system);
      }
      if (count > 2) {
        await assertReadableOn(
          system,
          staying.map((disk) =>
            staying.filter((other) => other !== disk)
              .map((other) => system.disks.indexOf(other))
          ),
        );
      }
    },
  );
}

onDisks(
  "--remove --cancel takes it back: before the boot, and after it",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    await persist(system);
    const [gone] = system.disks;
    await asked(system, ["--remove", gone.path]);
    await asked(system, ["--remove", "--cancel"]);
    await system.reboot();
    assertPersistent(await system.boot(), 2);

    await asked(system, ["--remove", gone.path]);
    await system.reboot();
    // Its balance does not begin, so that there is something to take back.
    const traps = await Deno.makeTempDir({ prefix: "persistence-programs-" });
    await Deno.writeTextFile(
      `${traps}/btrfs`,
      `#!/bin/sh
test "$1" = balance && test "$2" = start && exit 1
PATH=\${PATH#*:}
exec btrfs "$@"
`,
      { mode: 0o755 },
    );
    try {
      const path = `${traps}:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin`;
      const boot = await system.boot([], { path });
      assertEquals([boot.status, boot.report.degraded], [0, true], boot.stderr);
      await write(system, "meanwhile");
      await idle(system);
      assert(
        (await statusOf(system)).leaving?.text.includes(system.disks[1].path),
      );
      await asked(system, ["--remove", "--cancel"]);
      await idle(system);
      assertEquals(await profiles(system), whole[2]);
      assertEquals((await statusOf(system)).health, []);
      await assertReadableOn(system, [[0], [1]]);
    } finally {
      await Deno.remove(traps, { recursive: true });
    }
  },
);

onDisks(
  "--remove: the one that stays cannot be mounted alone: both are used",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    await persist(system);
    const [gone, stays] = system.disks;
    await asked(system, ["--remove", gone.path]);
    await system.reboot({
      // All but its superblock.
      whileOff: () =>
        command([
          ...["dd", "if=/dev/zero", `of=${stays.image}`, "bs=1M", "seek=5"],
          ...["count=790", "conv=notrunc", "status=none"],
        ]),
    });
    const boot = await system.boot();
    assertEquals(
      [boot.status, boot.report.mode],
      [0, "persistent"],
      boot.stderr,
    );
    assertEquals(boot.report.devices.length, 2, boot.stderr);
    await idle(system);
    // What has no checksums cannot be told from zeros.
    await system.sh(`cd ${state}; grep ' one$' sums | sha256sum -c --quiet`);
  },
);

onDisks(
  "--remove: one of three is pulled before it has left",
  { disks: [magicDisk, magicDisk, magicDisk] },
  async (system) => {
    await persist(system);
    const [gone] = system.disks;
    await holdWork(system);
    await asked(system, ["--remove", gone.path]);
    await system.reboot({ without: [gone] });
    const boot = await system.boot(["--wait", "60"]);
    assertEquals(
      [boot.status, boot.report.mode],
      [0, "persistent"],
      boot.stderr,
    );
    assert(!/waiting/i.test(boot.stderr), boot.stderr);
    await idle(system);
    assertEquals(await profiles(system), whole[2]);
    assertEquals((await statusOf(system)).health, []);
    await system.reboot();
    assertPersistent(await system.boot(), 2);
    await idle(system);
    await assertBlank(gone);
    await assertKept(system);
    await assertReadableOn(system, [[1], [2]]);
  },
);

// Refused

onDisks(
  "--move, --remove and --enable --now refuse in one sentence, and lose nothing",
  { disks: [magicDisk, emptyDisk, { sizeBytes: 300 * MiB }] },
  async (system) => {
    const [old, fresh, small] = system.disks;
    const startOf = ({ path }: Disk) =>
      command(["sh", "-euc", 'head -c 8M "$1" | sha256sum', "sh", path]);
    const refused = async (args: string[], why: RegExp) => {
      const before = await Promise.all([fresh, small].map(startOf));
      const { status, stderr } = await system.run([...system.place(), ...args]);
      assertEquals([status, stderr.trim().split("\n").length], [2, 1], stderr);
      assertMatch(stderr, why);
      assertEquals(
        await Promise.all([fresh, small].map(startOf)),
        before,
      );
    };
    const off = await system.boot(["--devices", fresh.path]);
    assertEquals(off.report.mode, "volatile");
    const isOff = /no data filesystem is mounted/;
    await refused(["--move", old.path, fresh.path], isOff);
    await refused(["--remove", old.path], isOff);
    await refused(["--enable", "--now", fresh.path], isOff);
    await refused(["--remove", "--cancel"], isOff);
    await system.reboot();
    await persist(system);
    await system.sh(`head -c 250M /dev/urandom > ${state}/much; sync`);
    await refused(["--move", fresh.path, small.path], /no member/);
    await refused(["--move", old.path, old.path], /already|same disk/);
    await refused(["--move", old.path, `${old.path}p1`], /already/);
    await refused(["--move", old.path, small.path], /\d+ MiB would do/);
    await refused(["--move", old.path, "/dev/null"], /neither a block device/);
    await refused(["--move", old.path, "/dev/nothing"], /no such device/);
    await refused(["--remove", old.path], /only disk/);
    await refused(["--remove", fresh.path], /no member/);
    await refused(["--remove", "--cancel"], /no disk was told to leave/);
    await refused(
      ["--enable", "--now", small.path],
      /too small|only mirror|needs/,
    );
    await command(["mkfs.ext4", "-q", fresh.path]);
    await refused(["--move", old.path, fresh.path], /--force/);
    await assertKept(system);
    assertEquals((await statusOf(system)).leaving, null);
    const done = await asked(system, [
      "--move",
      "--force",
      old.path,
      fresh.path,
    ]);
    assertStringIncludes(done.stdout, "ext4");
    const again = await system.run([
      ...[...system.place(), "--remove", old.path],
    ]);
    assertEquals(again.status, 2, again.stderr);
    await idle(system);
    assertEquals(await memberDisks(system), [fresh.path]);
    await assertKept(system);
  },
);

// What is looked at

/** What a disk that was pulled before it had left may be used for elsewhere. */
const uses: Record<string, string> = {
  "swap": 'mkswap -L mine "$1"',
  "LVM": 'wipefs -qa "$1"; pvcreate -qq -y "$1"',
  "NTFS": 'mkntfs -Q -F "$1"',
  "a filesystem of its own":
    `folder=$(mktemp -d); mount -o degraded "$1" $folder
    for file in 1 2 3; do echo new >$folder/$file; sync -f $folder; done
    umount $folder; rmdir $folder`,
  "a filesystem of its own, for one commit":
    `folder=$(mktemp -d); mount -o degraded "$1" $folder
    echo new >$folder/1; umount $folder; rmdir $folder`,
};

for (const [what, script] of Object.entries(uses)) {
  if (!/swap|of its own/.test(what) && !isAll) continue;
  onDisks(
    `--remove: the disk was pulled and is ${what} now: it is not touched`,
    {
      disks: [magicDisk, magicDisk],
      needs: isAll ? ["pvcreate", "mkntfs"] : [],
    },
    async (system) => {
      await persist(system);
      const [gone, stays] = system.disks;
      await asked(system, ["--remove", gone.path]);
      await system.reboot({ without: [gone] });
      assertEquals((await system.boot(["--wait", "0"])).status, 0);
      await idle(system);
      await system.reboot({ without: [stays] });
      await command(["partx", "--update", gone.path]);
      await command(["sh", "-euc", script, "sh", `${gone.path}p1`]);
      await command(["blockdev", "--flushbufs", gone.path]);
      const before = await system.checksum(gone);
      await system.reboot();
      const boot = await system.boot();
      assertEquals(boot.report.mode, "persistent", boot.stderr);
      await idle(system);
      await asked(system, ["--maintain"]);
      assertEquals(await system.checksum(gone), before, boot.stderr);
    },
  );
}

onDisks(
  "--move goes on after a reboot with the disk that was named, and no other",
  { disks: [magicDisk, { sizeBytes: 700 * MiB }] },
  async (system) => {
    await persist(system);
    const [old, fresh] = system.disks;
    await holdWork(system);
    await asked(system, ["--move", old.path, fresh.path]);
    const larger = await system.plug({ ...magicDisk, sizeBytes: 1000 * MiB });
    const again = ["--move", old.path, larger.path];
    const { status, stderr } = await system.run([...system.place(), ...again]);
    assertEquals(status, 2);
    assertMatch(stderr, /was told to leave, and has not left yet/);
    await system.reboot({ without: [fresh] });
    assertPersistent(await system.boot(), 1);
    await idle(system);
    assertEquals(await memberDisks(system), [old.path]);
    assert(await isMarked(larger));
    const says = /is to move to a disk that is not there/;
    assertMatch((await statusOf(system)).health.join("; "), says);
    assertMatch((await asked(system, ["--dry-run"])).stdout, says);
    // It comes while the system runs; then the other one joins.
    await system.attach(fresh);
    await asked(system, ["--maintain"]);
    assertEquals(
      await memberDisks(system),
      [fresh.path, larger.path].sort(),
    );
    await assertBlank(old);
    assertEquals(await profiles(system), whole[2]);
    await assertKept(system);
  },
);

onDisks(
  "--remove of one of three: --status tells how far it is; a late --cancel",
  { disks: [magicDisk, magicDisk, magicDisk] },
  async (system) => {
    await persist(system);
    const [gone] = system.disks;
    const traps = await Deno.makeTempDir({ prefix: "persistence-programs-" });
    await Deno.writeTextFile(
      `${traps}/btrfs`,
      `#!/bin/sh
PATH=\${PATH#*:}
case "$1 $2" in
"device remove" | "balance start")
  touch "${traps}/begun $2"
  until [ -e "${traps}/go $2" ]; do sleep 0.1; done
esac
exec btrfs "$@"
`,
      { mode: 0o755 },
    );
    const path = `${traps}:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin`;
    const remove = () =>
      system.run([...system.place(), "--remove", gone.path], { path });
    const { uuid } = await statusOf(system);
    const operation = `/sys/fs/btrfs/${uuid}/exclusive_operation`;
    try {
      // The metadata have one copy less already.
      assertEquals((await remove()).status, 0);
      await system.sh(
        `until [ -e "${traps}/begun start" ]; do sleep 0.1; done`,
      );
      await asked(system, ["--remove", "--cancel"]);
      await system.sh(`touch "${traps}/go start"`);
      await idle(system);
      assertEquals((await memberDisks(system)).length, 3);
      const begun = await system.sh(`ls ${traps}`);
      assert(!begun.includes("begun remove"), begun);
      await asked(system, ["--maintain"]);
      assertEquals(await profiles(system), whole[3]);

      assertEquals((await remove()).status, 0);
      await system.sh(`until [ -e "${traps}/begun remove" ]; do sleep 0.1; done
        echo device remove > run/operation
        mount --bind run/operation ${operation}`);
      const { work } = await statusOf(system);
      assertMatch(work[0].progress, /, 0 % of [1-9]\d+ MiB are done$/);
      await system.sh(
        `umount ${operation}; touch "${traps}/go remove"`,
      );
      await idle(system);
      assertEquals(await profiles(system), whole[2]);
      await assertBlank(gone);
      await assertKept(system);
    } finally {
      await Deno.remove(traps, { recursive: true });
    }
  },
);

onDisks(
  "--move to a smaller disk is taken back while the old one shrinks",
  { disks: [magicDisk, { sizeBytes: 700 * MiB }] },
  async (system) => {
    await persist(system);
    const [old, fresh] = system.disks;
    const traps = await Deno.makeTempDir({ prefix: "persistence-programs-" });
    await Deno.writeTextFile(
      `${traps}/btrfs`,
      `#!/bin/sh
if [ "$1 $2" = "filesystem resize" ]; then
  touch ${traps}/shrinks
  until [ -e ${traps}/go ]; do sleep 0.1; done
fi
PATH=\${PATH#*:}
exec btrfs "$@"
`,
      { mode: 0o755 },
    );
    const path = `${traps}:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin`;
    try {
      const args = ["--move", old.path, fresh.path];
      const moving = await system.run([...system.place(), ...args], { path });
      assertEquals(moving.status, 0, moving.stderr);
      await system.sh(`until [ -e ${traps}/shrinks ]; do sleep 0.1; done`);
      await asked(system, ["--move", "--cancel"]);
      await system.sh(`touch ${traps}/go`);
      await idle(system);
      assertEquals(await memberDisks(system), [old.path]);
      await assertBlank(fresh);
      assertEquals(await isMarked(fresh), false);
      await assertKept(system);
    } finally {
      await Deno.remove(traps, { recursive: true });
    }
  },
);

onDisks(
  "--remove that cannot be told to all members is told to none",
  { disks: [magicDisk, magicDisk, magicDisk] },
  async (system) => {
    await persist(system);
    const [gone, , third] = system.disks;
    const node = `${third.path}p1`;
    await command(["blockdev", "--setro", node]);
    const args = [...system.place(), "--remove", gone.path];
    const { status: code } = await system.run(args);
    assertEquals(code, 1);
    await command(["blockdev", "--setrw", node]);
    await asked(system, ["--maintain"]);
    await idle(system);
    assertEquals((await memberDisks(system)).length, 3);
  },
);

async function asked(system: System, args: string[]): Promise<Result> {
  const result = await system.run([...system.place(), ...args]);
  assertEquals(result.status, 0, result.stderr);
  return result;
}

/** Boots for the first time and writes something. */
async function persist(system: System): Promise<void> {
  const boot = await system.boot();
  assertEquals(boot.report.mode, "persistent", boot.stderr);
  await write(system, "one");
  await system.sh(
    `cd ${state}; : > nocow; chattr -c nocow; chattr +C nocow
     head -c 2M /dev/urandom >> nocow; sync nocow; sha256sum nocow >> sums`,
  );
}

async function write(system: System, name: string): Promise<void> {
  await system.sh(
    `cd ${state}; head -c 20M /dev/urandom > "${name}"
     sync "${name}"; sha256sum "${name}" >> sums; sync sums`,
  );
}

/** Writes over what is data, and no metadata: these have two copies. */
async function damage({ image }: Disk): Promise<void> {
  const script = `dd if=/dev/urandom of="$1" bs=1M seek=250 count=4 \\
    conv=notrunc status=none`;
  await command(["sh", "-euc", script, "sh", image]);
}

/** Lets files be written, and their checksums, for as long as that takes. */
async function underLoad(
  system: System,
  use: () => Promise<void>,
): Promise<void> {
  let isOver = false;
  let round = 0;
  const load = (async () => {
    while (!isOver) {
      const name = `load${round++ % 4}`;
      await system.sh(
        `cd ${state}; head -c 3M /dev/urandom > ${name}
         grep -v " ${name}$" sums > sums.new || :
         sha256sum ${name} >> sums.new; mv sums.new sums`,
      );
      await sleep(50);
    }
  })();
  try {
    await use();
  } finally {
    isOver = true;
    await load;
  }
  await system.sh(`sync -f ${state}`);
  assert(round > 0);
}

async function assertKept(system: System): Promise<void> {
  await system.sh(
    `cd ${state}; sync -f .; for file in *; do
       dd if="$file" iflag=nocache count=0 status=none 2>/dev/null || :
     done; sha256sum --quiet -c sums >&2; test -s sums`,
  );
}

/** Reboots, and reads what these disks hold without the others. */
async function assertReadableOn(
  system: System,
  places: number[][],
): Promise<void> {
  for (const some of places) {
    const there = some.map((place) => system.disks[place]);
    await system.reboot({
      without: system.disks.filter((disk) => !there.includes(disk)),
    });
    await mountState(system);
    await system.sh(
      "cd mnt/lightwhale-data; test -s sums; sha256sum --quiet -c sums",
    );
  }
}

/** The disks of the members. */
async function memberDisks(system: System): Promise<string[]> {
  const { devices } = await statusOf(system);
  return devices.map(({ path }) => path?.replace(/p\d+$/, "") ?? "").sort();
}

async function assertBlank({ path }: Disk): Promise<void> {
  assertEquals(await partitions({ path }), []);
  assertEquals(await holds(path), "");
  const swaps = await Deno.readTextFile("/proc/swaps");
  assert(!swaps.includes(`${path}p`), swaps);
}

async function holds(path: string): Promise<string> {
  return await command(["wipefs", "--noheadings", path]);
}

async function partitions({ path }: Pick<Disk, "path">): Promise<string[]> {
  return (await command(["lsblk", "-rno", "PATH", path])).trim().split("\n")
    .slice(1).sort();
}

function assertPersistent({ status, report, stderr }: Boot, devices: number) {
  const { mode, degraded } = report;
  assertEquals(
    { status, mode, degraded, devices: report.devices.length },
    { status: 0, mode: "persistent", degraded: false, devices },
    stderr,
  );
}
