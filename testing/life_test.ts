/**
 * The disks' life: late, missing, returned, split, replaced, added, grown,
 * copied, damaged. Whatever happens to the disks, the data is compared by its
 * checksum, and a mirror is proven by reading it without each of its disks.
 */
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { systemPath } from "./programs.ts";
import { formatRecord } from "../persistence.ts";
import { becomeReplaceTarget } from "./superblock.ts";
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
  mark,
  MiB,
  mountState,
  onDisks,
  profiles,
  type Report,
  statusOf,
  type System,
  takeAway,
  tool,
} from "./system.ts";

/** Small, because copying takes the time. Too small for a swap partition. */
const magicDisk: DiskSpec = { sizeBytes: 800 * MiB, contents: header };
const emptyDisk: DiskSpec = { sizeBytes: 800 * MiB };

/** Checksums by the names of the files in the state directory. */
type Sums = Record<string, string>;

const state = "mnt/lightwhale-data/lightwhale-state";

// Late

onDisks(
  "a member that comes two seconds late is waited for",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const [first, late] = system.disks;
    await takeAway(system, late);

    const started = Date.now();
    const [boot] = await Promise.all([
      bootOn(system, [first.path, farPlace], "60"),
      bringLate(system, late, 2000),
    ]);
    const seconds = (Date.now() - started) / 1000;
    assert(seconds < 40, `It took ${seconds} s`);
    assertMatch(boot.stderr, /waiting/i);
    assertPersistent(boot, { devices: 2 });
    await assertKept(system, sums);
    await assertMirrored(system, sums);
  },
);

onDisks(
  "a magic disk does not take the place of a member that is only late",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const [first, late] = system.disks;
    const magic = await system.plug(magicDisk);
    await takeAway(system, late);

    const [boot] = await Promise.all([
      bootOn(system, [first.path, farPlace, magic.path], "60"),
      bringLate(system, late, 2000),
    ]);
    assertPersistent(boot, { devices: 2 });
    await idle(system);
    assertEquals(await profiles(system), "raid1 raid1c3 raid1c3");
    await assertMirrored(system, sums);
  },
);

onDisks(
  "a boot with all disks, and one with none, wait for nothing",
  { disks: [emptyDisk] },
  async (system) => {
    const volatile = await bootOn(system, [system.disks[0].path], "60");
    assertEquals(volatile.report.mode, "volatile");
    await mark(system.disks[0]);
    await system.reboot();
    await system.boot();
    await system.reboot();
    const boot = await bootOn(system, [system.disks[0].path], "60");
    assertPersistent(boot, { devices: 1 });
    for (const { stderr } of [volatile, boot]) {
      assert(!/waiting/i.test(stderr), stderr);
    }
  },
);

// Missing, returned

/** Profiles when whole, by the number of disks. */
const mirrors: Record<number, string> = {
  2: "raid1 raid1 raid1",
  3: "raid1 raid1c3 raid1c3",
  4: "raid1 raid1c4 raid1c4",
};

for (const [count, whole] of Object.entries(mirrors)) {
  const disks: [DiskSpec, ...DiskSpec[]] = [magicDisk, magicDisk];
  while (disks.length < Number(count)) disks.push(magicDisk);
  onDisks(
    `one of ${count} disks is missing at two boots, then returns`,
    { disks },
    async (system) => {
      const sums = await persist(system);
      assertEquals(await profiles(system), whole);
      const missing = system.disks[Number(count) - 1];
      for (const boot of ["second", "third"]) {
        await system.reboot({ without: [missing] });
        await bootDegraded(system, disks.length - 1);
        await assertKept(system, sums);
        // Enough for a new chunk, and the same files once more.
        sums[boot] = await write(system, boot, 60);
        sums["no checksums"] = await writeNoCow(system);
        sums.one = await write(system, "one");
        await idle(system);
        const single = (await profiles(system)).includes("single");
        // With one disk there is nothing to mirror them on.
        assertEquals(single, disks.length === 2, await profiles(system));
      }

      await system.reboot();
      const boot = await system.boot();
      assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
      await assertKept(system, sums);
      sums.four = await write(system, "four");
      await idle(system);
      assertEquals(await profiles(system), whole);
      await assertMirrored(system, sums);

      assertPersistent(await system.boot(), { devices: disks.length });
      await idle(system);
      assertEquals(await profiles(system), whole);
      await assertKept(system, sums);
    },
  );
}

onDisks(
  "two of three disks are missing: nothing is formatted",
  { disks: [magicDisk, magicDisk, magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const magic = await system.plug(magicDisk);
    await system.reboot({ without: system.disks.slice(1, 3) });

    const before = await system.checksum(magic);
    const boot = await system.boot(["--wait", "0"]);
    if (boot.report.mode === "persistent") await assertKept(system, sums);
    else {
      assertEquals([boot.status, boot.report.mode], [1, "fallback"]);
      assertEquals(await system.checksum(magic), before);
    }
    await system.reboot({ without: [magic] });
    assertEquals((await system.boot()).report.mode, "persistent");
    await assertKept(system, sums);
  },
);

onDisks(
  "a member without a record that missed writes is mended by a scrub",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const sums = await persist(system);
    await system.reboot({ without: [system.disks[1]] });
    await bootDegraded(system, 1);
    sums.one = await write(system, "one");
    sums.two = await write(system, "two", 60);
    await system.reboot({
      whileOff: async () => {
        for (const disk of system.disks) await eraseMarks(disk);
      },
    });

    const boot = await system.boot();
    assertPersistent(boot, { devices: 2 });
    await assertKept(system, sums);
    await idle(system);
    assertEquals(await profiles(system), mirrors[2]);
    await assertMirrored(system, sums);
  },
);

onDisks(
  "a member that dropped out while the system ran is rebuilt",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const [, dropped] = system.disks;
    const folder = await Deno.makeTempDir({ prefix: "persistence-dropped-" });
    try {
      // What the disk holds from now on is not what it holds at the reboot.
      await system.sh("btrfs filesystem sync mnt/lightwhale-data");
      await copyImage(dropped.image, `${folder}/dropped`);
      for (const name of ["one", "two"]) {
        sums[name] = await write(system, name);
        sums["no checksums"] = await writeNoCow(system);
        await system.sh("btrfs filesystem sync mnt/lightwhale-data");
      }
      await system.reboot({
        whileOff: () => copyImage(`${folder}/dropped`, dropped.image),
      });
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
    const boot = await system.boot();
    assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
    assertMatch(boot.stderr, new RegExp(`${dropped.path}p1 missed writes`));
    await assertKept(system, sums);
    await idle(system);
    assertEquals(await profiles(system), mirrors[2]);
    await assertMirrored(system, sums);
  },
);

onDisks(
  "--enable --force takes a data disk that has lost its table",
  { disks: [magicDisk] },
  async (system) => {
    await persist(system);
    const { image } = system.disks[0];
    await system.reboot({
      whileOff: () =>
        command([
          ...["dd", "if=/dev/zero", `of=${image}`, "bs=1M", "count=1"],
          ...["conv=notrunc", "status=none"],
        ]),
    });
    const [{ path }] = system.disks;
    const args = [...system.place(), "--enable", "--force", path];
    const { status, stdout, stderr } = await system.run(args);
    assertEquals([status, stderr], [0, ""], stdout);
    assertMatch(stdout, /is enabled; the data filesystem on it is wiped\n/);
    const { report } = await system.boot();
    assertEquals([report.mode, report.warnings], ["persistent", []]);
    assertMatch(report.plan.join(), /create "lightwhale-data"/);
  },
);

// Split

for (const [more, chosen] of [[0, 0], [1, 1]]) {
  const rule = more === 0 ? "equally often: the first" : "more often: it";
  onDisks(
    `each half was written alone, ${
      more ? "the second" : "both"
    } ${rule} is used`,
    { disks: [magicDisk, magicDisk] },
    async (system) => {
      const common = await persist(system);
      const sums: Sums[] = [];
      for (const [n, disk] of system.disks.entries()) {
        const other = system.disks[1 - n];
        await system.reboot({ without: [other] });
        await bootDegraded(system, 1);
        sums[n] = { ...common, one: await write(system, "one") };
        for (let again = 0; n === 1 && again < more; again++) {
          await system.reboot({ without: [other] });
          await bootDegraded(system, 1);
        }
        assert(disk.path !== "");
      }
      await system.reboot();

      const other = system.disks[1 - chosen];
      for (const _ of ["first", "second"]) {
        const before = await system.checksum(other);
        const boot = await system.boot(["--wait", "0"]);
        assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
        assert(boot.report.degraded, boot.stderr);
        await assertKept(system, sums[chosen]);
        await idle(system);
        assertEquals(await system.checksum(other), before);
        assertMatch(boot.stderr, /each written|split/);
        const { health } = await statusOf(system);
        assertMatch(health.join(), /^Device \d is missing.* were each written/);
        assertMatch(
          boot.stderr,
          new RegExp(`--enable --force ${other.path}\\b`),
        );
        await system.reboot();
      }

      // The other half can be used as well.
      await system.reboot({ without: [system.disks[chosen]] });
      await bootDegraded(system, 1);
      await assertKept(system, sums[1 - chosen]);
      await system.reboot();

      // Do what the message says: give it up, and let it be mirrored anew.
      const enabled = await system.run([
        ...[...system.place(), "--enable", "--force", other.path],
      ]);
      assertEquals(enabled.status, 0, enabled.stderr);
      await system.reboot();
      const boot = await system.boot(["--wait", "0"]);
      assertEquals(boot.report.mode, "persistent");
      await assertKept(system, sums[chosen]);
      await idle(system);
      assertEquals(await profiles(system), mirrors[2], boot.stderr);
      await assertMirrored(system, sums[chosen]);
    },
  );
}

// Replaced

const replacements: Record<string, number> = {
  "of the same size": 800,
  "that is larger": 1000,
  "that is smaller": 700,
};

for (const [size, mebibytes] of Object.entries(replacements)) {
  onDisks(
    `a magic disk ${size} takes the place of a missing one`,
    { disks: [magicDisk, magicDisk] },
    async (system) => {
      const sums = await persist(system);
      const [, old] = system.disks;
      const fresh = await system.plug({
        sizeBytes: mebibytes * MiB,
        contents: header,
      });
      await system.reboot({ without: [old] });
      const boot = await system.boot(["--wait", "0"]);
      assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
      await assertKept(system, sums);
      sums.meanwhile = await write(system, "meanwhile");
      await idle(system);
      assertEquals(await profiles(system), mirrors[2], boot.stderr);
      assertEquals(await isMarked(fresh), false);
      const { health, notes } = await statusOf(system);
      assertEquals(health, []);
      assertMatch(
        notes.join("\n"),
        /^The last boot, before the mirror was who/,
      );
      await assertMirrored(system, sums, { without: [old] });

      // Back after its place was taken.
      sums.one = await write(system, "one").catch(() => sums.one);
      for (const _ of ["first", "second"]) {
        await system.reboot();
        const before = await system.checksum(old);
        const boot = await system.boot(["--wait", "0"]);
        assertPersistent(boot, { devices: 2 });
        await assertKept(system, sums);
        await idle(system);
        assertEquals(await profiles(system), mirrors[2], boot.stderr);
        assertEquals(await system.checksum(old), before, boot.stderr);
        assertMatch(boot.stderr, new RegExp(`${old.path}p1`));
      }
    },
  );
}

onDisks(
  "--enable where a member is missing says that the disk is taken soon",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    await persist(system);
    const fresh = await system.plug(emptyDisk);
    await system.reboot({ without: [system.disks[1]] });
    await bootDegraded(system, 1);
    await idle(system);
    const args = [...system.place(), "--enable", fresh.path];
    const { stdout } = await system.run(args);
    assertMatch(
      stdout,
      /within the hour .* --disable takes that back[^]* is enabled\nWithin/,
    );
    await system.run([...system.place(), "--disable", fresh.path]);
    await system.run([...system.place(), "--maintain"]);
    const { devices } = await statusOf(system);
    assertEquals(devices.map(({ missing }) => missing), [false, true]);
  },
);

// Added

onDisks(
  "a full disk gets a second one: nothing is lost, the system stays writable",
  { disks: [{ sizeBytes: 1500 * MiB, contents: header }] },
  async (system) => {
    await system.boot();
    // Nearly everything is allocated: no room for a mirrored chunk.
    await system.sh("head -c 900M /dev/urandom > etc/much; sync -f etc/much");
    const sum = await system.sh("sha256sum etc/much");
    await system.plug({ sizeBytes: 1500 * MiB, contents: header });
    await system.reboot();
    assertPersistent(await system.boot(), { devices: 1 });
    await idle(system);
    // As much of the data is mirrored as there is room for.
    assertMatch(await profiles(system), / raid1 raid1$/);
    assertEquals(await system.sh("sha256sum etc/much"), sum);
    await system.sh("touch etc/still-writable");
  },
);

onDisks(
  "magic disks join one by one, from a single disk to five",
  { disks: [magicDisk] },
  async (system) => {
    const sums = await persist(system);
    assertEquals(await profiles(system), "single dup dup");
    for (const count of [2, 3, 4, 5]) {
      const disk = await system.plug(magicDisk);
      await system.reboot();
      const boot = await system.boot();
      assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
      await assertKept(system, sums);
      sums[`with ${count}`] = await write(system, `with ${count}`);
      await idle(system);
      assertEquals(
        await profiles(system),
        mirrors[Math.min(count, 4)],
        boot.stderr,
      );
      assertEquals(await isMarked(disk), false);
    }
    await assertMirrored(system, sums);
    assertPersistent(await system.boot(), { devices: 5 });
  },
);

onDisks(
  "a disk that joins gets swap as well",
  { disks: [{ sizeBytes: 2048 * MiB, contents: header }] },
  async (system) => {
    const sums = await persist(system);
    const disk = await system.plug({
      sizeBytes: 2048 * MiB,
      contents: header,
    });
    await system.reboot();
    await system.boot();
    await idle(system);
    assertEquals(await profiles(system), mirrors[2]);
    const swaps = await Deno.readTextFile("/proc/swaps");
    assert(swaps.includes(`${disk.path}p1 `), swaps);
    await assertMirrored(system, sums);
  },
);

onDisks(
  "a disk too small to mirror what is there does not join",
  { disks: [{ sizeBytes: 2000 * MiB, contents: header }] },
  async (system) => {
    const sums = await persist(system);
    sums.much = await write(system, "much", 750);
    const small = await system.plug({
      sizeBytes: 1000 * MiB,
      contents: header,
    });
    await system.reboot();
    const boot = await system.boot();
    assertPersistent(boot, { devices: 1 });
    assertMatch(boot.stderr, /does not join .* are used/);
    await idle(system);
    assertEquals(await profiles(system), "single dup dup");
    assert(await isMarked(small));
    sums.more = await write(system, "more", 300);
    await assertKept(system, sums);
  },
);

onDisks(
  "a disk without room for a chunk of each kind does not join",
  { disks: [{ sizeBytes: 1024 * MiB, contents: header }] },
  async (system) => {
    await system.boot();
    const small = await system.plug({ sizeBytes: 130 * MiB, contents: header });
    for (const _ of ["first", "second"]) {
      await system.reboot();
      const boot = await system.boot();
      assertPersistent(boot, { devices: 1 });
      assertMatch(boot.stderr, /does not join .* use a larger disk/);
      await idle(system);
      assert(await isMarked(small));
      await system.sh("touch etc/still-writable");
    }
  },
);

// Power cuts

/** What runs when the power goes, by the disks that start it. */
const cuts: Record<string, {
  operation: "device replace" | "balance" | "device remove";
  /** How many disks the filesystem is made of. */
  count?: 1 | 2;
  /** Gives the disks that are gone afterwards. */
  prepare: (system: System) => Promise<Disk[]>;
}> = {
  "a replace": {
    operation: "device replace",
    async prepare(system) {
      const { sizeBytes } = bigDisk;
      await system.plug({ sizeBytes: sizeBytes + 100 * MiB, contents: header });
      return [system.disks[1]];
    },
  },
  "the balance after a replace": {
    operation: "balance",
    async prepare(system) {
      await system.reboot({ without: [system.disks[1]] });
      await bootDegraded(system, 1);
      await write(system, "single", 150);
      await system.plug(bigDisk);
      return [system.disks[1]];
    },
  },
  "a rebuild": {
    operation: "device replace",
    async prepare(system) {
      await system.reboot({ without: [system.disks[1]] });
      await bootDegraded(system, 1);
      await write(system, "two");
      return [];
    },
  },
  "the balance after a disk was added": {
    operation: "balance",
    count: 1, // all data moves; with more disks only metadata would
    async prepare(system) {
      await system.plug(bigDisk);
      return [];
    },
  },
  "the removal of a missing disk that a smaller one replaces": {
    operation: "device remove",
    async prepare(system) {
      await system.plug({ sizeBytes: 800 * MiB, contents: header });
      return [system.disks[1]];
    },
  },
};

/** Large enough to be caught at work. */
const bigDisk: DiskSpec = { sizeBytes: 900 * MiB, contents: header };

for (const [name, { operation, count, prepare }] of Object.entries(cuts)) {
  onDisks(
    `the power goes in the middle of ${name}: it goes on by itself`,
    { disks: count === 1 ? [bigDisk] : [bigDisk, bigDisk] },
    async (system) => {
      const freezer = await makeFreezer();
      try {
        await system.reboot({ whileOff: () => freezer.take(system.disks) });
        const sums = await persist(system);
        sums.large = await write(system, "large", 150);
        const fsid = await uuid(system);
        const without = await prepare(system);
        await system.reboot({
          without,
          whileOff: () => freezer.take(system.disks),
        });
        await freezer.copyDuring(operation, fsid, async () => {
          const boot = await system.boot(["--wait", "0"]);
          assertEquals(boot.report.mode, "persistent", boot.stderr);
        });
        await system.reboot({ without, whileOff: () => freezer.give() });

        await assertGoesOn(system, sums, without);
      } finally {
        await freezer.close();
      }
    },
  );
}

onDisks(
  "the power goes when only the target of a replace knows of it: it starts anew",
  { disks: [bigDisk, bigDisk] },
  async (system) => {
    const sums = await persist(system);
    sums.large = await write(system, "large", 150);
    const [kept, lost] = system.disks;
    const target = await system.plug({ sizeBytes: bigDisk.sizeBytes });
    await system.reboot({
      without: [lost],
      whileOff: () => makeReplaceTarget(target, kept),
    });
    await assertGoesOn(system, sums, [lost]);
    assertEquals(await isMarked(target), false);
  },
);

onDisks(
  "the power goes between a disk's joining and the balance",
  { disks: [magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const disk = await system.plug(emptyDisk);
    await system.sh(
      `btrfs -q device add -f ${disk.path} mnt/lightwhale-data
       btrfs filesystem sync mnt/lightwhale-data`,
    );
    await system.reboot();
    assertPersistent(await system.boot(), { devices: 2 });
    await idle(system);
    assertEquals(await profiles(system), mirrors[2]);
    await assertMirrored(system, sums);
  },
);

onDisks(
  "the power goes after a stale member was wiped, before its rebuild",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const [, stale] = system.disks;
    await system.reboot({ without: [stale] });
    await bootDegraded(system, 1);
    sums.one = await write(system, "one");
    await system.reboot();
    const programs = await withoutReplace();
    const path = `${programs}:${systemPath}`;
    const boot = await system.boot([], { path });
    assertEquals(boot.report.mode, "persistent", boot.stderr);
    await system.settle();
    await Deno.remove(programs, { recursive: true });
    await system.reboot();

    await assertGoesOn(system, sums);
  },
);

onDisks(
  "the power goes while a person replaces a disk that is still there",
  { disks: [bigDisk, bigDisk] },
  async (system) => {
    const target = await system.plug({ sizeBytes: bigDisk.sizeBytes });
    const freezer = await makeFreezer();
    try {
      await system.reboot({ whileOff: () => freezer.take(system.disks) });
      const sums = await persist(system);
      sums.large = await write(system, "large", 150);
      await freezer.copyDuring(
        "device replace",
        await uuid(system),
        () =>
          system.sh(`btrfs replace start 2 ${target.path} mnt/lightwhale-data`),
      );
      await system.reboot({ whileOff: () => freezer.give() });

      await assertGoesOn(system, sums);
    } finally {
      await freezer.close();
    }
  },
);

// Grown

for (const sectorBytes of [512, 4096] as const) {
  onDisks(
    `disks with ${sectorBytes}-byte sectors grow, first one, then the other`,
    {
      disks: [
        { sizeBytes: 2048 * MiB, sectorBytes, contents: header },
        { sizeBytes: 2048 * MiB, sectorBytes, contents: header },
      ],
    },
    async (system) => {
      const sums = await persist(system);
      const before = await sizes(system);
      for (const [n, disk] of system.disks.entries()) {
        await system.reboot({
          whileOff: () => Deno.truncate(disk.image, 3072 * MiB),
        });
        const boot = await system.boot();
        assertPersistent(boot, { devices: 2 });
        const now = await sizes(system);
        const grown = (now[n] - before[n]) / MiB;
        // The last partition also takes what was left of the last mebibyte.
        assert(grown >= 1024 && grown <= 1025, `${grown}: ${boot.stderr}`);
        if (n === 0) assertEquals(now[1], before[1]);
        await command(["sfdisk", "--verify", disk.path]);
        const parts = await partitionNames(disk);
        assertEquals(parts, ["lightwhale-swap", "lightwhale-data"]);
      }
      // Nothing grew: nothing is written to any table, nor resized.
      const tables = await Promise.all(system.disks.map(tablesOf));
      await system.reboot();
      const boot = await system.boot();
      assert(!/grow/i.test(boot.stderr), boot.stderr);
      assertEquals(await Promise.all(system.disks.map(tablesOf)), tables);
      await assertMirrored(system, sums);
    },
  );
}

onDisks(
  "free space behind the partition that was left on purpose is left",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    const [disk] = system.disks;
    await system.sh(
      "btrfs -q filesystem resize 1:300M mnt/lightwhale-data",
    );
    await system.reboot();
    await command([
      ...[
        "sh",
        "-euc",
        'echo ", 320M" | sfdisk -q --no-tell-kernel -N 1 "$DISK"',
      ],
    ], { DISK: disk.path });
    const before = await tablesOf(disk);
    const boot = await system.boot();
    assertPersistent(boot, { devices: 1 });
    assertEquals(await tablesOf(disk), before);
  },
);

// Two data filesystems, copies

onDisks(
  "of two data filesystems always the same one is used, or the one asked for",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const uuids: string[] = [];
    const sums: Sums[] = [];
    for (const n of [0, 1]) {
      await system.reboot({ without: [system.disks[1 - n]] });
      sums[n] = await persist(system);
      uuids[n] = await uuid(system);
    }
    await system.reboot();

    const used: string[] = [];
    for (const _ of ["first", "second", "with the disks in other places"]) {
      const first = await bootAndLook();
      used.push(first);
      const [a, b] = system.disks;
      await system.reboot({
        whileOff: () => used.length === 2 ? swapPlaces(a, b) : nothing(),
      });
    }
    assertEquals(new Set(used).size, 1, `${used}`);

    for (const asked of uuids) {
      await system.reboot({ cmdline: `quiet lightwhale.data=${asked}` });
      assertEquals(await bootAndLook(), asked);
    }

    /** Boots, makes sure that one is used and the other untouched. */
    async function bootAndLook() {
      const before = await Promise.all(system.disks.map(system.checksum));
      const boot = await system.boot();
      assertPersistent(boot, { devices: 1 });
      assertEquals(boot.report.uuid, await uuid(system));
      const other = uuids.find((uuid) => uuid !== boot.report.uuid);
      assertMatch(boot.stderr, new RegExp(`lightwhale\\.data=${other}`));
      await assertKept(system, sums[uuids.indexOf(boot.report.uuid ?? "")]);
      const after = await Promise.all(system.disks.map(system.checksum));
      const same = system.disks.filter((_, n) => before[n] === after[n]);
      assertEquals(same.length, 1, boot.stderr);
      assertEquals(same[0].path === boot.report.devices[0].slice(0, -2), false);
      return boot.report.uuid ?? "";
    }
  },
);

for (const count of [1, 2]) {
  onDisks(
    `a copy of one of ${count} disks is told apart from it`,
    { disks: count === 1 ? [magicDisk] : [magicDisk, magicDisk] },
    async (system) => {
      const sums = await persist(system);
      const copy = await system.plug(emptyDisk);
      const [first] = system.disks;
      await system.reboot({
        whileOff: () => copyImage(first.image, copy.image),
      });
      let used: string | undefined;
      for (const round of ["one", "two", "with the copy in front"]) {
        const before = await Promise.all(system.disks.map(system.checksum));
        const boot = await system.boot();
        assertPersistent(boot, { devices: count });
        await assertKept(system, sums);
        sums.one = await write(system, "one");
        await system.sh("btrfs filesystem sync mnt/lightwhale-data");
        const after = await Promise.all(system.disks.map(system.checksum));
        const same = system.disks.filter((_, n) => before[n] === after[n]);
        assertEquals(same.length, 1, `${round}: ${boot.stderr}`);
        assert([first, copy].includes(same[0]), round);
        used ??= same[0].image;
        assertEquals(same[0].image, used, `${round}: the other is used`);
        const what = round === "one" // nothing tells which is the copy
          ? "is \\S+p1 on another path, or holds exactly the same"
          : "is a copy of \\S+p1, or was replaced by it";
        assertMatch(boot.stderr, new RegExp(`${same[0].path}p1 ${what}: `));
        await system.reboot({
          whileOff: () => round === "two" ? swapPlaces(first, copy) : nothing(),
        });
      }
    },
  );
}

// Damaged

const tableDamages: Record<string, { script: string; says: RegExp }> = {
  "the header of the primary table is destroyed": {
    script: 'dd if=/dev/zero of="$DISK" bs=512 seek=1 count=1 conv=notrunc',
    says: /partition table/,
  },
  "the primary table is destroyed": {
    script: 'dd if=/dev/zero of="$DISK" bs=512 seek=1 count=33 conv=notrunc',
    says: /partition table/,
  },
  "the first megabyte is destroyed": {
    script: 'dd if=/dev/zero of="$DISK" bs=1M count=1 conv=notrunc',
    says: /partition table/,
  },
};

for (const [damage, { script, says }] of Object.entries(tableDamages)) {
  onDisks(
    `${damage}: it is restored from the backup`,
    { disks: [magicDisk, magicDisk] },
    async (system) => {
      const sums = await persist(system);
      const [disk] = system.disks;
      const before = await tablesOf(disk);
      await system.reboot({
        whileOff: () => destroy(disk, script),
      });
      const boot = await system.boot();
      assertPersistent(boot, { devices: 2 });
      assertMatch(boot.stderr, says);
      await assertKept(system, sums);
      if (damage !== "the first megabyte is destroyed") {
        assertEquals(await tablesOf(disk), before, boot.stderr);
      }
      await command(["sfdisk", "--verify", disk.path]);
      await idle(system);
      await assertMirrored(system, sums);
    },
  );
}

onDisks(
  "a header that was forgotten, and a primary table that was torn: data win",
  { disks: [magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const [disk] = system.disks;
    await system.reboot({
      whileOff: () =>
        destroy(
          disk,
          `dd if=/dev/zero of="$DISK" bs=512 seek=1 count=1 conv=notrunc
           ${header}`,
        ),
    });
    const boot = await system.boot();
    assertPersistent(boot, { devices: 1 });
    assertMatch(boot.stderr, /the data wins/);
    assertEquals(await isMarked(disk), false);
    await assertKept(system, sums);
  },
);

/** What may be put on a disk: its backup table and its data partition stay. */
const images: Record<string, string> = {
  "with an MBR": `
    printf 'start=1MiB, type=c, bootable\\n' |
      sfdisk --quiet --no-tell-kernel --label dos image
    printf 'boot code in LBA 1' | dd of=image bs=512 seek=1 conv=notrunc`,
  "with an MBR, the primary table behind it": `
    dd if="$DISK" of=image bs=512 skip=1 seek=1 count=33 conv=notrunc
    printf '\\200\\000\\000\\000\\203\\000\\000\\000\\000\\010' |
      dd of=image bs=1 seek=446 conv=notrunc
    printf '\\125\\252' | dd of=image bs=1 seek=510 conv=notrunc`,
  "of FAT": "mkfs.vfat image",
  "of ext4": "mkfs.ext4 -q image",
  "of ISO 9660": `printf '\\001CD001\\001' |
    dd of=image bs=2048 seek=16 conv=notrunc`,
};

for (const [kind, script] of Object.entries(images)) {
  onDisks(
    `an image ${kind} on what once was a data disk: not a byte is changed`,
    { disks: [{ sizeBytes: 2100 * MiB, contents: header }] },
    async (system) => {
      const [disk] = system.disks;
      await persist(system);
      await system.reboot({
        whileOff: () =>
          destroy(
            disk,
            `folder=$(mktemp -d); cd "$folder"; truncate -s 100M image; ${script}
             dd if=image of="$DISK" bs=1M conv=notrunc; rm -r "$folder"`,
          ),
      });
      const before = await system.checksum(disk);
      const boot = await system.boot(["--wait", "0"]);
      // The data may be wanted where their table is whole below the MBR.
      const isHidden = kind.endsWith("the primary table behind it");
      const mode = isHidden ? "fallback" : "volatile";
      assertEquals(boot.report.mode, mode, boot.stderr);
      if (isHidden) assertMatch(boot.stderr, /an MBR hides its GPT/);
      assertEquals(await system.checksum(disk), before, boot.stderr);
    },
  );
}

onDisks(
  "another data disk is magic and write-protected: the first is used",
  { disks: [magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const other = await system.plug({
      sizeBytes: 800 * MiB,
      contents: `mkfs.btrfs -q -L lightwhale-data "$DISK"\n${header}`,
    });
    await system.reboot();
    await command(["blockdev", "--setro", other.path]);
    const before = await system.checksum(other);
    const boot = await system.boot();
    await command(["blockdev", "--setrw", other.path]);
    assertPersistent(boot, { devices: 1 });
    const stays = `${other.path} stays magic, for it is read-only`;
    assertStringIncludes(boot.stderr, stays);
    assertEquals(await system.checksum(other), before);
    await assertKept(system, sums);
  },
);

onDisks(
  "the whole table of the only disk is gone: it is not touched",
  { disks: [magicDisk] },
  async (system) => {
    await persist(system);
    const [disk] = system.disks;
    await system.reboot({
      whileOff: () =>
        destroy(
          disk,
          `dd if=/dev/zero of="$DISK" bs=512 count=34 conv=notrunc
           dd if=/dev/zero of="$DISK" bs=512 count=33 conv=notrunc \
             seek=$(($(stat -c %s "$DISK") / 512 - 33))`,
        ),
    });
    const before = await system.checksum(disk);
    const boot = await system.boot();
    assert(boot.report.mode !== "persistent", boot.stderr);
    assertEquals(await system.checksum(disk), before);
  },
);

onDisks(
  "the superblock of one half is destroyed: the other half is used",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const [, disk] = system.disks;
    await system.plug(magicDisk);
    await system.reboot({
      whileOff: () =>
        destroy(
          disk,
          'dd if=/dev/zero of="$DISK" bs=64K seek=17 count=1 conv=notrunc',
        ),
    });
    const before = await system.checksum(disk);
    const boot = await system.boot(["--wait", "0"]);
    assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
    assert(boot.report.degraded, boot.stderr);
    await assertKept(system, sums);
    const doubt = `${disk.path}p1 may be a "lightwhale-data" disk, but ` +
      "only a backup superblock is left: it is not touched";
    assertStringIncludes(boot.stderr, doubt);
    await idle(system);
    assertEquals(await system.checksum(disk), before);
    await assertKept(system, sums);
  },
);

onDisks(
  "errors of a device are shown by --status, with its name",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const sums = await persist(system);
    sums.large = await write(system, "large", 120);
    delete sums["no checksums"]; // no error can be seen there
    const [, disk] = system.disks;
    await system.reboot({
      whileOff: () =>
        destroy(
          disk,
          `dd if=/dev/urandom of="$DISK" bs=1M seek=100 count=150 conv=notrunc`,
        ),
    });
    assertEquals((await system.boot()).report.mode, "persistent");
    await system.sh("btrfs scrub start -Bq mnt/lightwhale-data || true");
    await assertKept(system, sums);
    const { devices, health } = await statusOf(system);
    const second = devices.find(({ devid }) => devid === 2);
    const count = second?.errors.corruption_errs ?? 0;
    assert(count > 0, JSON.stringify(devices));
    assertMatch(health.join("\n"), new RegExp(`${disk.path}p1 .*corruption`));
    const { stdout } = await system.run([...system.place(), "--status"]);
    assertMatch(stdout, new RegExp(`${disk.path}p1 .*corruption`));
  },
);

onDisks(
  "--status on a terminal follows the work until it ends",
  { disks: [magicDisk] },
  async (system) => {
    await persist(system);
    // A job, as the background notes it; process 1 is there for ever.
    const note = (what: string) =>
      system.sh(
        `echo '{"what":"${what}","since":"2001-02-03T04:05:06Z","pid":1}' \
           > run/lightwhale/job.json`,
      );
    await note("the first half");
    const words = [...tool, ...system.place(), "--status"];
    const following = system.sh(
      `timeout 120 script -qefc '${words.join(" ")}' /dev/null > run/shown`,
    );
    const isShown = (what: string) =>
      system.sh(`until grep -q '${what}' run/shown; do sleep 0.1; done`);
    await isShown("the first half");
    await note("the second half");
    await isShown("the second half");
    await system.sh("rm run/lightwhale/job.json");
    await following;
    const shown = await system.sh("cat run/shown");
    const since = "In the background since 2001-02-03T04:05:06Z: maintenance: ";
    const frames = shown.split("\x1b[H\x1b[2J");
    assertMatch(frames[0], new RegExp(`${since}the first half`));
    assert(frames.some((frame) => frame.includes(`${since}the second half`)));
    assertMatch(frames.at(-1) ?? "", /Healthy\r?\n$/);
    assert(!frames.at(-1)?.includes("In the background"), frames.at(-1));
  },
);

// Profiles that a person chose

/** What a person makes of two disks, its profiles, and what is said of them. */
const choices: Record<string, { made: string; kept: string; note?: RegExp }> = {
  "as mkfs.btrfs does by itself": {
    made: "",
    kept: "single raid1 raid1",
    note: /^The data are not mirrored \(single\).* the files on it are lost/,
  },
  "with nothing mirrored": {
    made: "--data single --metadata dup",
    kept: "single dup dup",
    note: /^The data .*\nThe metadata are not mirrored \(dup\).* all files/,
  },
  "striped": {
    made: "--data raid0 --metadata raid1",
    kept: "raid0 raid1 raid1",
    note: /^The data are not mirrored \(raid0\).* all files are lost/,
  },
  "mirrored": { made: "--data raid1", kept: mirrors[2] },
};

for (const [how, { made, kept, note }] of Object.entries(choices)) {
  onDisks(
    `a Btrfs that a person made of two disks, ${how}, stays so`,
    { disks: [{ sizeBytes: 600 * MiB }, { sizeBytes: 600 * MiB }] },
    async (system) => {
      const paths = system.disks.map(({ path }) => path).join(" ");
      await command([
        ...["sh", "-c"],
        `mkfs.btrfs -q -f -L lightwhale-data ${made} ${paths}`,
      ]);
      for (let boots = 0; boots < 2; boots++) {
        assertPersistent(await system.boot(), { devices: 2 });
        await idle(system);
        await write(system, "some");
        assertEquals(await profiles(system), kept);
        const { health, notes } = await statusOf(system);
        assertEquals(health, []);
        assertMatch(notes.join("\n"), note ?? /^$/);
        await system.reboot();
      }
    },
  );
}

onDisks(
  "a person converts a mirror back to single: it stays, until a disk is lost",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const back = "balance start -f -dconvert=single -mconvert=raid1";
    await system.boot();
    await system.sh(`btrfs -q ${back} mnt/lightwhale-data`);
    await system.reboot();
    for (let boots = 0; boots < 2; boots++) {
      assertPersistent(await system.boot(), { devices: 2 });
      await idle(system);
      assertEquals(await profiles(system), "single raid1 raid1");
      await assertKept(system, sums);
      await system.reboot();
    }
    // Mirrored by hand again, it is looked after as a mirror again.
    await system.boot();
    await idle(system);
    await system.sh(
      "btrfs -q balance start -dconvert=raid1 mnt/lightwhale-data",
    );
    await system.reboot();
    await system.boot();
    await idle(system);
    const lost = system.disks[1];
    await system.reboot({ without: [lost] });
    await bootDegraded(system, 1);
    sums.alone = await write(system, "alone");
    // Nothing is left of what was mirrored: only a record tells what it was.
    await system.sh(
      "btrfs -q balance start -f -dconvert=single,soft mnt/lightwhale-data",
    );
    assertMatch(await profiles(system), /^single /);
    await system.plug({ sizeBytes: 800 * MiB, contents: header });
    await system.reboot({ without: [lost] });
    await system.boot();
    await idle(system);
    assertEquals(await profiles(system), mirrors[2]);
    await assertKept(system, sums);
  },
);

onDisks(
  "version 1.0 let a disk join, and the power went before the balance",
  { disks: [magicDisk] },
  async (system) => {
    const sums = await persist(system);
    const disk = await system.plug(emptyDisk);
    await system.sh(
      `btrfs -q device add -f ${disk.path} mnt/lightwhale-data
       btrfs filesystem sync mnt/lightwhale-data`,
    );
    const members = [`${system.disks[0].path}p1`, disk.path];
    const common = { fsid: await fsidOf(system), epoch: 7, absent: {} };
    for (const [i, path] of members.entries()) {
      const member = `${i}`;
      const record = formatRecord({ ...common, member, present: ["0", "1"] });
      const file = await Deno.open(path, { write: true });
      for (const at of [56 * 1024, 60 * 1024]) {
        await file.seek(at, Deno.SeekMode.Start);
        await file.write(record);
      }
      await file.sync();
      file.close();
    }
    await system.reboot();
    assertPersistent(await system.boot(), { devices: 2 });
    await idle(system);
    assertEquals(await profiles(system), mirrors[2]);
    await assertMirrored(system, sums);
  },
);

const fsidOf = async (system: System) =>
  (await system.sh("findmnt -no UUID -M mnt/lightwhale-data")).trim();

/** Boots for the first time and writes something. */
async function persist(system: System): Promise<Sums> {
  const boot = await system.boot();
  assertEquals(boot.report.mode, "persistent", boot.stderr);
  return {
    one: await write(system, "one"),
    "no checksums": await writeNoCow(system),
  };
}

/** Writes a file of random bytes. Returns its checksum. */
async function write(
  system: System,
  name: string,
  mebibytes = 20,
): Promise<string> {
  return await system.sh(
    `cd ${state}; head -c ${mebibytes}M /dev/urandom > "${name}"
     sync "${name}"; sha256sum < "${name}"`,
  );
}

/** A file for which Btrfs keeps no checksums, as databases are. */
async function writeNoCow(system: System): Promise<string> {
  const name = "no checksums";
  return await system.sh(
    `cd ${state}; test -e "${name}" || { : > "${name}"; chattr -c "${name}"; chattr +C "${name}"; }
     head -c 2M /dev/urandom | dd of="${name}" conv=notrunc status=none
     sync "${name}"; sha256sum < "${name}"`,
  );
}

async function assertKept(system: System, sums: Sums): Promise<void> {
  for (const [name, sum] of Object.entries(sums)) {
    // A stale half of a mirror shows when it is asked often enough; nocache
    // lets the kernel forget the file, so that it is read from a disk again.
    for (let reader = 0; reader < 2; reader++) {
      const found = await system.sh(
        `cd ${state}; dd if="${name}" iflag=nocache count=0 status=none
         sha256sum < "${name}"`,
      );
      assertEquals(found, sum, name);
    }
  }
}

/** Reboots and reads everything without each of the disks in turn. */
async function assertMirrored(
  system: System,
  sums: Sums,
  { without = [] }: { without?: Disk[] } = {},
): Promise<void> {
  for (const lost of system.disks) {
    if (without.includes(lost)) continue;
    await system.reboot({ without: [lost, ...without] });
    await mountState(system);
    const found = await system.sh(
      `cd mnt/lightwhale-data
       for name in ${Object.keys(sums).map((name) => `"${name}"`).join(" ")}
       do sha256sum < "$name"; done`,
    );
    assertEquals(
      found,
      Object.values(sums).join(""),
      `without ${lost.image.replace(/.*\//, "")}`,
    );
  }
  await system.reboot({ without });
}

/** Runs the boot sequence on these devices. */
async function bootOn(
  system: System,
  devices: string[],
  wait: string,
): Promise<Boot> {
  const result = await system.run([
    ...["--root", system.root, "--devices", devices.join(), "--wait", wait],
  ]);
  const report = await system.sh("cat run/lightwhale/persistence.json");
  return { ...result, report: JSON.parse(report) as Report };
}

/** Boots with a disk missing: persistent, and the warning says so. */
async function bootDegraded(system: System, devices: number): Promise<Boot> {
  const boot = await system.boot(["--wait", "0"]);
  assertEquals([boot.status, boot.report.mode], [0, "persistent"], boot.stderr);
  assertEquals(boot.report.devices.length, devices, boot.stderr);
  assert(boot.report.degraded, boot.stderr);
  assertEquals(boot.report.missing.length, 1, boot.stderr);
  assertMatch(boot.stderr, /lacks|missing/);
  return boot;
}

function assertPersistent(
  { status, report, stderr }: Boot,
  { devices }: { devices: number },
): void {
  const { mode, degraded } = report;
  assertEquals(
    { status, mode, degraded, devices: report.devices.length },
    { status: 0, mode: "persistent", degraded: false, devices },
    stderr,
  );
}

async function uuid(system: System): Promise<string> {
  const shown = await system.sh("btrfs filesystem show mnt/lightwhale-data");
  return /uuid: (\S+)/.exec(shown)?.[1] ?? "";
}

/** Sizes of the members in bytes, by devid. */
async function sizes(system: System): Promise<number[]> {
  const shown = await system.sh(
    "btrfs filesystem show --raw mnt/lightwhale-data",
  );
  return [...shown.matchAll(/devid +\d+ size (\d+)/g)]
    .map(([, size]) => Number(size));
}

/** Images in a place where the clock can be stopped for all of them. */
interface Freezer {
  /**
   * Moves the disks' images there, while the system is off, and before they
   * are members: to the tool another file is other hardware.
   */
  take(disks: Disk[]): Promise<void>;
  /**
   * Starts something long and, in the middle of it, copies the images, as a
   * power cut would leave them.
   */
  copyDuring(
    operation: string,
    fsid: string,
    start: () => Promise<unknown>,
  ): Promise<void>;
  /** Puts the copies into the disks' images, while the system is off. */
  give(): Promise<void>;
  close(): Promise<void>;
}

/**
 * A filesystem for the images. While it is frozen, no write to the disks gets
 * on: what was written before is what a power cut leaves. (Freezing the Btrfs
 * itself would wait for the end of a balance.)
 */
async function makeFreezer(): Promise<Freezer> {
  const folder = await Deno.makeTempDir({ prefix: "persistence-freezer-" });
  const inside = `${folder}/inside`;
  const taken: Disk[] = [];
  await command([
    ...["sh", "-euc"],
    `mkdir "$1/inside"
     truncate -s 8G "$1/filesystem"
     mkfs.ext4 -q -O ^has_journal "$1/filesystem"
     mount -o loop,noatime "$1/filesystem" "$1/inside"`,
    ...["sh", folder],
  ]);
  return {
    async take(disks) {
      for (const disk of disks.filter((disk) => !taken.includes(disk))) {
        const image = `${inside}/${taken.length}`;
        await copyImage(disk.image, image);
        disk.image = image;
        taken.push(disk);
      }
    },
    async copyDuring(operation, fsid, start) {
      const file = `/sys/fs/btrfs/${fsid}/exclusive_operation`;
      const freezing = command([
        ...["timeout", "60", "sh", "-euc"],
        // No process is started between what it sees and what it does.
        `until test "\${operation-}" = "$1"; do
           test ! -e "$2" || read -r operation < "$2" || :
         done
         exec fsfreeze --freeze "$3"`,
        ...["sh", operation, file, inside],
      ]);
      await Promise.all([
        start(),
        freezing.then(async () => {
          try {
            for (const [n] of taken.entries()) {
              await copyImage(`${inside}/${n}`, `${folder}/${n}`);
            }
            assertEquals(await Deno.readTextFile(file), `${operation}\n`);
          } finally {
            await command(["fsfreeze", "--unfreeze", inside]);
          }
        }),
      ]);
    },
    async give() {
      for (const [n, { image }] of taken.entries()) {
        await copyImage(`${folder}/${n}`, image);
      }
    },
    async close() {
      // The disks may still be attached; the system's end lets go of them.
      await command(["umount", "--lazy", inside]);
      await Deno.remove(folder, { recursive: true });
    },
  };
}

/** Boots: what a power cut interrupted ends by itself, in a mirror of two. */
async function assertGoesOn(
  system: System,
  sums: Sums,
  without: Disk[] = [],
): Promise<void> {
  const boot = await system.boot(["--wait", "0"]);
  assertEquals([boot.status, boot.report.mode], [0, "persistent"], boot.stderr);
  await assertKept(system, sums);
  await idle(system);
  assertEquals(await profiles(system), mirrors[2], boot.stderr);
  assertEquals((await statusOf(system)).health, []);
  await assertMirrored(system, sums, { without });
}

/** What a disk holds when a replace has written its superblock, but no other's. */
async function makeReplaceTarget(target: Disk, member: Disk): Promise<void> {
  await copyImage(member.image, target.image);
  const data = MiB; // where the partition begins
  const file = await Deno.open(target.image, { read: true, write: true });
  const block = new Uint8Array(4096);
  await file.seek(data + 64 * 1024, Deno.SeekMode.Start);
  await file.read(block);
  becomeReplaceTarget(block);
  const slots = new Uint8Array(8192); // right before it: it has none
  await file.seek(data + 56 * 1024, Deno.SeekMode.Start);
  await file.write(slots);
  await file.write(block);
  file.close();
  await destroy(target, header); // it is magic until it has taken its place
}

async function copyImage(from: string, to: string): Promise<void> {
  await command(["cp", "--sparse=always", from, to]);
}

/** Exchanges what is behind two devices, as another cable does. */
function swapPlaces(one: Disk, other: Disk): Promise<void> {
  [one.image, other.image] = [other.image, one.image];
  return nothing();
}

function nothing(): Promise<void> {
  return Promise.resolve();
}

async function destroy({ image }: Disk, script: string): Promise<void> {
  await command(["sh", "-euc", script], { DISK: image });
}

/** Without swap the data partition begins at 1 MiB. */
async function eraseMarks(disk: Disk): Promise<void> {
  await destroy(
    disk,
    'dd if=/dev/zero of="$DISK" bs=8K seek=135 count=1 conv=notrunc',
  );
}

/** A folder of programs with which no `btrfs replace` can be started. */
async function withoutReplace(): Promise<string> {
  const folder = await Deno.makeTempDir({ prefix: "persistence-programs-" });
  await Deno.writeTextFile(
    `${folder}/btrfs`,
    `#!/bin/sh
test "$1" = replace && exit 1
PATH=${systemPath}
exec btrfs "$@"
`,
    { mode: 0o755 },
  );
  return folder;
}

async function partitionNames({ path }: Disk): Promise<string[]> {
  const dump = await command(["sfdisk", "--dump", path]);
  return [...dump.matchAll(/name="([^"]*)"/g)].map(([, name]) => name);
}

/** Checksums of the partition tables at both ends of a disk. */
async function tablesOf({ path }: Disk): Promise<string> {
  await command(["blockdev", "--flushbufs", path]);
  const size = Number(await command(["blockdev", "--getsize64", path]));
  return await command(
    [
      ...["sh", "-euc"],
      'head -c 65536 "$DISK" | sha256sum; tail -c 65536 "$DISK" | sha256sum',
    ],
    { DISK: path, SIZE: String(size) },
  );
}
