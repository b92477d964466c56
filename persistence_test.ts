/**
 * The boot sequence by situation: disks before, disks after. PERSISTENCE is
 * the command under test, by default the executable.
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
  GiB,
  header,
  isMarked,
  magic,
  mark,
  MiB,
  onDisks,
  type System,
  type SystemOptions,
  tool,
} from "./testing/system.ts";
import type { Program } from "./testing/programs.ts";

/** What a boot leaves behind, as far as an operator can see it. */
interface After {
  mode: Boot["report"]["mode"];
  status: number;
  /** File system of /mnt/lightwhale-data. */
  type: string;
  /** Its profiles of data, metadata and system chunks. */
  profiles?: string;
  /** For each disk, the names of its partitions. */
  partitions: string[][];
  /** For each disk, whether it still begins with the magic header. */
  marked: boolean[];
  /** How many swap areas of the disks are on. */
  swaps: number;
  /** File systems of /etc, /var and /home. */
  overlays: string;
}

const dataDisk = ["lightwhale-swap", "lightwhale-data"];
const disk: DiskSpec = { sizeBytes: 3 * GiB };
const magicDisk: DiskSpec = { ...disk, contents: header };
/** Without swap, which makes no difference to most situations. */
const smallDisk: DiskSpec = { sizeBytes: 600 * MiB };
const smallMagicDisk: DiskSpec = { ...smallDisk, contents: header };

const persistent = {
  mode: "persistent",
  status: 0,
  type: "btrfs",
  overlays: "overlay overlay overlay",
} as const;
const volatile = {
  mode: "volatile",
  status: 0,
  type: "tmpfs",
  profiles: undefined,
  swaps: 0,
  overlays: "overlay overlay overlay",
} as const;

const situations: {
  name: string;
  disks: SystemOptions["disks"];
  cmdline?: string;
  after: Partial<After>;
  /** What the console must say. */
  says?: RegExp;
  /** Disks that must stay byte-identical, by their place in `disks`. */
  untouched?: number[];
}[] = [
  {
    name: "nothing is enabled: volatile",
    disks: [disk],
    after: { ...volatile, partitions: [[]] },
    untouched: [0],
  },
  {
    name: "one magic disk: single",
    disks: [magicDisk],
    after: {
      ...persistent,
      profiles: "single dup dup",
      partitions: [dataDisk],
      marked: [false],
      swaps: 1,
    },
  },
  {
    name: "two magic disks: RAID1",
    disks: [magicDisk, magicDisk],
    after: {
      ...persistent,
      profiles: "raid1 raid1 raid1",
      partitions: [dataDisk, dataDisk],
      marked: [false, false],
      swaps: 2,
    },
  },
  {
    name: "three magic disks: RAID1 with three copies of metadata",
    disks: [magicDisk, magicDisk, magicDisk],
    after: {
      ...persistent,
      profiles: "raid1 raid1c3 raid1c3",
      partitions: [dataDisk, dataDisk, dataDisk],
      marked: [false, false, false],
      swaps: 3,
    },
  },
  {
    name: "four magic disks: RAID1 with four copies of metadata",
    disks: [magicDisk, magicDisk, magicDisk, magicDisk],
    after: {
      ...persistent,
      profiles: "raid1 raid1c4 raid1c4",
      partitions: [dataDisk, dataDisk, dataDisk, dataDisk],
      marked: [false, false, false, false],
      swaps: 4,
    },
  },
  {
    name: "a disk under 2 GiB has no swap",
    disks: [smallMagicDisk],
    after: { ...persistent, partitions: [["lightwhale-data"]], swaps: 0 },
  },
  {
    name: "disks with 4096-byte sectors",
    disks: [
      { ...magicDisk, sectorBytes: 4096 },
      { ...magicDisk, sectorBytes: 4096 },
    ],
    after: {
      ...persistent,
      profiles: "raid1 raid1 raid1",
      partitions: [dataDisk, dataDisk],
      swaps: 2,
    },
  },
  {
    name: "disks with different sectors",
    disks: [magicDisk, { ...magicDisk, sectorBytes: 4096 }],
    after: { ...persistent, profiles: "raid1 raid1 raid1", swaps: 2 },
  },
  {
    name: "the header is followed by anything",
    disks: [{
      ...disk,
      contents: `dd if=/dev/urandom of="$DISK" bs=1M count=8 status=none
        ${header}`,
    }],
    after: { ...persistent, partitions: [dataDisk], marked: [false] },
  },
  {
    name: "the header is followed by a line's end, as echo writes it",
    disks: [{ ...disk, contents: `echo ${magic} > "$DISK"` }],
    after: { ...persistent, partitions: [dataDisk], marked: [false] },
  },
  {
    name: "the header is one byte off",
    disks: [
      { ...disk, contents: 'printf lightwhale-please-format-mE > "$DISK"' },
      { ...disk, contents: 'printf Lightwhale-please-format-me > "$DISK"' },
      { ...disk, contents: `printf " ${magic}" > "$DISK"` },
    ],
    after: volatile,
    untouched: [0, 1, 2],
  },
  {
    name: "an old GPT under the header",
    disks: [{
      ...disk,
      contents: `printf 'label: gpt\nsize=1G, name=old\nsize=1G, name=older\n' |
          sfdisk -q --no-reread --no-tell-kernel "$DISK"
        partx -a "$DISK"; mkfs.ext4 -q "$DISK"p2; sync "$DISK"p2
        ${header}`,
    }],
    after: { ...persistent, partitions: [dataDisk], marked: [false], swaps: 1 },
  },
  {
    name: "an old MBR and an old swap area under the header",
    disks: [{
      ...disk,
      contents: `printf 'label: dos\nsize=1G\nsize=1G\n' |
          sfdisk -q --no-reread --no-tell-kernel "$DISK"
        mkswap -q "$DISK" 2>/dev/null || mkswap -f "$DISK" >/dev/null
        ${header}`,
    }],
    after: { ...persistent, partitions: [dataDisk], marked: [false], swaps: 1 },
  },
  {
    name: "a whole-disk Btrfs of another name under the header",
    disks: [{
      ...disk,
      contents: `mkfs.btrfs -q -L mine "$DISK" >/dev/null; ${header}`,
    }],
    after: { ...persistent, partitions: [dataDisk], marked: [false], swaps: 1 },
  },
  {
    name: "a header at the start of a partition means nothing",
    disks: [{
      ...disk,
      contents: `printf 'label: gpt\nname=other\n' |
          sfdisk -q --no-reread --no-tell-kernel "$DISK"
        partx -a "$DISK"; printf ${magic} > "$DISK"p1; sync "$DISK"p1`,
    }],
    after: { ...volatile, partitions: [["other"]] },
    says: /loop\d+p1/,
    untouched: [0],
  },
  {
    name: "a disk too small for Btrfs is left alone",
    disks: [{ sizeBytes: 64 * MiB, contents: header }],
    after: { mode: "fallback", status: 1, type: "tmpfs", marked: [true] },
    says: /too small/,
    untouched: [0],
  },
  {
    name: "a disk too small beside a large one is left out",
    disks: [
      { sizeBytes: 8 * GiB, contents: header },
      { sizeBytes: 8 * GiB, contents: header },
      { sizeBytes: 110 * MiB, contents: header },
    ],
    after: {
      mode: "persistent",
      type: "btrfs",
      profiles: "raid1 raid1 raid1",
      partitions: [dataDisk, dataDisk, []],
      marked: [false, false, true],
      swaps: 2,
    },
    says: /too small/,
    untouched: [2],
  },
  {
    name: "lightwhale.persistence=off: volatile whatever the disks say",
    disks: [magicDisk],
    cmdline: "quiet lightwhale.persistence=off console=ttyS0",
    after: { ...volatile, marked: [true] },
    untouched: [0],
  },
  {
    name: "lightwhale.swap=off: no swap",
    disks: [magicDisk],
    cmdline: "lightwhale.swap=off",
    after: { ...persistent, partitions: [["lightwhale-data"]], swaps: 0 },
  },
  {
    name: "noswap: no swap",
    disks: [magicDisk],
    cmdline: "quiet noswap",
    after: { ...persistent, partitions: [["lightwhale-data"]], swaps: 0 },
  },
  {
    name: "a word that only contains noswap changes nothing",
    disks: [magicDisk],
    cmdline: "xnoswap nolightwhale.persistence=off",
    after: { ...persistent, partitions: [dataDisk], swaps: 1 },
  },
];

for (const { name, disks, cmdline, after, says, untouched } of situations) {
  onDisks(name, { disks, cmdline }, async (system) => {
    const before = await checksums(system, untouched);
    const boot = await system.boot();
    const seen = await look(system, boot);
    const keys = Object.keys(after) as (keyof After)[];
    assertEquals(
      Object.fromEntries(keys.map((key) => [key, seen[key]])),
      after,
      differs(boot, seen, after),
    );
    if (says) assertMatch(boot.stderr, says);
    assertSpeaksAsItself(boot);
    await assertWritable(system);
    assertEquals(await checksums(system, untouched), before);
  });
}

const bystanders: Record<string, { needs?: Program; contents: string }> = {
  "ext4": { contents: 'mkfs.ext4 -q "$DISK"' },
  "vfat": { needs: "mkfs.vfat", contents: 'mkfs.vfat "$DISK" >/dev/null' },
  "xfs": { needs: "mkfs.xfs", contents: 'mkfs.xfs -q "$DISK"' },
  "ntfs": { needs: "mkntfs", contents: 'mkntfs -Q "$DISK" >/dev/null 2>&1' },
  "LVM": { needs: "lvm", contents: 'lvm pvcreate -q "$DISK" >/dev/null 2>&1' },
  "MBR": { contents: partitionedInto("dos", "size=100M, type=83") },
  "GPT": { contents: partitionedInto("gpt", "size=100M, name=root") },
  "swap": { contents: 'mkswap "$DISK" >/dev/null' },
  "swap of another name": { contents: 'mkswap -L swap "$DISK" >/dev/null' },
  "old Btrfs": { contents: 'mkfs.btrfs -q -L old "$DISK" >/dev/null' },
  "Btrfs whose name begins like ours": {
    contents: 'mkfs.btrfs -q -L lightwhale-data2 "$DISK" >/dev/null',
  },
  "nothing": { contents: "" },
  "random bytes": {
    contents: 'dd if=/dev/urandom of="$DISK" bs=1M count=4 status=none',
  },
  // There is no md driver and no ZFS to make these two, so it is their
  // superblocks alone, which is what a reader of signatures sees of them.
  "md": {
    contents: put(
      4096,
      ...["fc4e2ba9", "01000000", "00".repeat(136), "0800000000000000"],
    ),
  },
  "ZFS": {
    contents: [0, 1, 2, 3, 4, 5, 6, 7].map((n) =>
      put(131072 + n * 1024, "0cb1ba0000000000", "8813000000000000")
    ).join("\n"),
  },
};

for (const [kind, { needs, contents }] of Object.entries(bystanders)) {
  onDisks(
    `a disk with ${kind} stays byte-identical beside a magic disk`,
    {
      disks: [{ ...smallDisk, contents }, smallMagicDisk],
      needs: needs ? [needs] : [],
    },
    async (system) => {
      const before = await checksums(system, [0]);
      const boot = await system.boot();
      assertEquals(boot.report.mode, "persistent", boot.stderr);
      await system.reboot();
      assertEquals((await system.boot()).report.mode, "persistent");
      assertEquals(await checksums(system, [0]), before);
    },
  );
}

onDisks(
  "provisioning scripts find the data filesystem with findmnt",
  { disks: [smallMagicDisk] },
  async (system) => {
    await system.boot();
    await system.sh(
      "findmnt -n -o SOURCE $PWD/mnt/lightwhale-data | grep -q '^/dev/'",
    );
  },
);

onDisks(
  "a 1 MiB image with the header, enlarged, becomes the data filesystem",
  { disks: [{ sizeBytes: MiB, contents: header }] },
  async (system) => {
    await Deno.truncate(system.disks[0].image, 20 * GiB);
    await system.reboot();
    const boot = await system.boot();
    const { type, partitions } = await look(system, boot);
    assertEquals({ type, partitions }, {
      type: "btrfs",
      partitions: [dataDisk],
    }, boot.stderr);
    const sizeBytes = await system.sh(
      "df --output=size -B1 mnt/lightwhale-data | tail -n 1",
    );
    assert(Number(sizeBytes) > 15 * GiB, sizeBytes);
  },
);

onDisks(
  "swap takes an eighth of a disk, and its label and its partition's name",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    const [{ path }] = system.disks;
    const bytes = Number(
      await command(["blockdev", "--getsize64", `${path}p1`]),
    );
    assert(bytes <= 3 * GiB / 8 && bytes > 3 * GiB / 8 - 2 * MiB, `${bytes}`);
    assertEquals(
      await command(["blkid", "-p", "-s", "LABEL", "-o", "value", `${path}p1`]),
      "lightwhale-swap\n",
    );
    const table = JSON.parse(await command(["sfdisk", "--json", path]));
    for (const { start } of table.partitiontable.partitions) {
      assertEquals(start % 2048, 0, "a partition is not aligned to 1 MiB");
    }
  },
);

onDisks(
  "whatever the umask is, others may look at what a boot makes",
  { disks: [smallMagicDisk] },
  async (system) => {
    const script = 'umask 077; exec "$@"';
    await system.boot([], { tool: ["sh", "-c", script, "sh", ...tool] });
    const state = "mnt/lightwhale-data/lightwhale-state";
    assertEquals(
      await system.sh(
        `stat -c %a mnt/lightwhale-data ${state} ${state}/overlay/upper \
          ${state}/docker etc etc/docker etc/docker/daemon.json run/lightwhale |
          tr '\\n' ' '`,
      ),
      "755 755 755 710 755 755 644 755 ",
    );
  },
);

onDisks(
  "running it again changes nothing and says so",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const boot = await system.boot();
    await system.sh("echo kept > etc/kept; sync -f mnt/lightwhale-data");
    const before = await everything(system);
    const again = await system.boot();
    assertEquals(again.status, 0, again.stderr);
    assertEquals(await everything(system), before);
    assertEquals(again.report.mode, boot.report.mode);
    assertEquals(again.report.plan.length, 1, again.stderr);
    assertMatch(again.report.plan[0], /already/);
  },
);

onDisks(
  "a reboot keeps files, deletions and modes",
  {
    disks: [magicDisk],
    root: `mkdir var/gone; echo 1 > var/gone/file; echo 1 > etc/gone
      echo 1 > etc/changed; chmod 755 etc/changed; mkdir home/dir`,
  },
  async (system) => {
    await system.boot();
    await system.sh(
      `echo new > home/new; chown 1000:1001 home/new; chmod 4750 home/new
       ln -s new home/link; mkdir -m 2770 home/shared
       echo 2 > etc/changed; chmod 600 etc/changed
       rm etc/gone; rm -r var/gone
       mv home/dir home/moved
       echo data > mnt/lightwhale-data/data`,
    );
    const list = `cat etc/changed home/new mnt/lightwhale-data/data
      stat -c '%n %F %a %u %g' etc/* var/* home/*
      readlink home/link`;
    const before = await system.sh(list);
    await system.reboot();
    const boot = await system.boot();
    assertEquals(boot.report.mode, "persistent", boot.stderr);
    assertEquals(await system.sh(list), before);
    assertEquals(await existing(system, ["etc/gone", "var/gone"]), []);
  },
);

onDisks(
  "what is written in a volatile system is gone after a reboot",
  { disks: [disk] },
  async (system) => {
    await system.boot();
    await system.sh("echo new > etc/new; echo new > mnt/lightwhale-data/new");
    await system.reboot();
    await system.boot();
    assertEquals(
      await existing(system, ["etc/new", "mnt/lightwhale-data/new"]),
      [],
    );
  },
);

onDisks(
  "a new system image under old state",
  {
    disks: [smallMagicDisk],
    root: `echo 1 > etc/changed-there; echo 1 > etc/changed-here
      echo 1 > etc/removed-there; echo 1 > etc/becomes-directory
      mkdir etc/becomes-file; echo 1 > etc/becomes-file/x
      mkdir etc/merged; echo 1 > etc/merged/old`,
  },
  async (system) => {
    await system.boot();
    await system.sh(
      "echo here > etc/changed-here; echo here > etc/merged/here",
    );
    await system.reboot({
      root: `echo 2 > etc/changed-there; echo 2 > etc/changed-here
        mkdir etc/becomes-directory; echo 2 > etc/becomes-directory/x
        echo 2 > etc/becomes-file; echo 2 > etc/added
        mkdir etc/merged; echo 2 > etc/merged/new`,
    });
    const boot = await system.boot();
    assertEquals(boot.status, 0, boot.stderr);
    assertEquals(
      await system.sh("cd etc; grep -r . added b* c* merged | sort"),
      `added:2
becomes-directory/x:2
becomes-file:2
changed-here:here
changed-there:2
merged/here:here
merged/new:2
`,
    );
    assertEquals(await existing(system, ["etc/removed-there"]), []);
    await assertWritable(system);
  },
);

onDisks(
  "the merged directories look like the lower ones",
  {
    disks: [smallMagicDisk],
    needs: ["setfattr"],
    // With its folder there, daemon.json does not touch /etc itself.
    root: `chmod 1777 home; chown 12:34 var; chmod 2750 var; mkdir etc/docker
      setfattr -n user.note -v "a value" etc
      setfattr -n trusted.note -v other var
      touch -d '2001-02-03 04:05:06 UTC' etc var home`,
  },
  async (system) => {
    const list = `stat -c '%n %a %u %g %Y' etc var home
      getfattr --absolute-names -d -m '^(user|trusted|security)[.]' \\
        etc var home | grep -v overlay`;
    const before = await system.sh(list);
    assertStringIncludes(before, "user.note");
    await system.boot();
    assertEquals(await system.sh(list), before);
    await system.reboot();
    await system.boot();
    assertEquals(await system.sh(list), before);
  },
);

onDisks(
  "left-overs in the overlays' work directories do no harm",
  { disks: [smallMagicDisk] },
  async (system) => {
    await system.boot();
    await system.sh("echo kept > etc/kept");
    await system.sh(
      `cd mnt/lightwhale-data/lightwhale-state/overlay/work
       for name in etc var home; do mkdir -p $name/work/a/b/c/d; done`,
    );
    await system.reboot();
    const boot = await system.boot();
    assertEquals(boot.status, 0, boot.stderr);
    await assertWritable(system);
    assertEquals(await system.sh("cat etc/kept"), "kept\n");
  },
);

// Magic partitions

const magicPartition =
  `printf 'label: gpt\nsize=200M, name=system\nname=${magic}\n' |
    sfdisk -q --no-reread --no-tell-kernel "$DISK"
  partx -a "$DISK"; mkfs.ext4 -q "$DISK"p1; sync "$DISK"p1`;

for (const sectorBytes of [512, 4096] as const) {
  onDisks(
    `a magic partition is used as it is, ${sectorBytes}-byte sectors`,
    { disks: [{ ...disk, sectorBytes, contents: magicPartition }] },
    async (system) => {
      const [{ path }] = system.disks;
      const geometry = `sfdisk -d ${path} | sed 's/name=.*//'`;
      const table = await system.sh(geometry);
      const sum = `partx -a ${path} 2>/dev/null || true; sha256sum ${path}p1`;
      const before = await system.sh(sum);

      const boot = await system.boot();
      const { mode, status, profiles, swaps, type } = await look(system, boot);
      assertEquals({ mode, status, profiles, swaps, type }, {
        mode: "persistent",
        status: 0,
        profiles: "single dup dup",
        swaps: 0,
        type: "btrfs",
      }, boot.stderr);
      await system.sh("echo kept > home/kept");

      await system.reboot();
      assertEquals((await system.boot()).status, 0);
      assertEquals(await system.sh("cat home/kept"), "kept\n");
      const now = system.disks[0].path;
      const inNow = (text: string) => text.replaceAll(path, now);
      assertEquals(
        (await system.sh(inNow(sum))).split(" ")[0],
        before.split(" ")[0],
      );
      assertEquals(await system.sh(inNow(geometry)), inNow(table));
    },
  );
}

onDisks(
  "a magic partition and a magic disk make a RAID1",
  { disks: [{ ...disk, contents: magicPartition }, magicDisk] },
  async (system) => {
    const boot = await system.boot();
    const { mode, profiles, swaps } = await look(system, boot);
    assertEquals({ mode, profiles, swaps }, {
      mode: "persistent",
      profiles: "raid1 raid1 raid1",
      swaps: 1,
    }, boot.stderr);
  },
);

// Data wins over magic

onDisks(
  "a header on a disk that holds a data filesystem is taken away",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    await system.boot();
    await system.sh("echo kept > home/kept");
    await system.reboot();
    for (const disk of system.disks) await mark(disk);
    await system.reboot();

    const boot = await system.boot();
    const { mode, marked, profiles } = await look(system, boot);
    assertEquals({ mode, marked, profiles }, {
      mode: "persistent",
      marked: [false, false],
      profiles: "raid1 raid1 raid1",
    }, boot.stderr);
    assertEquals(await system.sh("cat home/kept"), "kept\n");
    assertMatch(boot.stderr, /the data wins/);
  },
);

onDisks(
  "a header on a data filesystem without partitions is taken away",
  {
    disks: [{
      ...disk,
      contents: `mkfs.btrfs -q -L lightwhale-data "$DISK" >/dev/null
        mkdir /tmp/$$; mount "$DISK" /tmp/$$; echo kept > /tmp/$$/kept
        umount /tmp/$$; rmdir /tmp/$$; ${header}`,
    }],
  },
  async (system) => {
    const boot = await system.boot();
    const { mode, marked } = await look(system, boot);
    assertEquals({ mode, marked }, { mode: "persistent", marked: [false] });
    assertEquals(await topLevel(system, "cat kept"), "kept\n");
  },
);

for (const node of ["with", "without"]) {
  onDisks(
    `a data filesystem in a partition of any name is found, ${node} its node`,
    {
      disks: [{
        ...disk,
        contents: `echo 'start=1MiB, name=other' | sfdisk -q --label gpt "$DISK"
          partx -a "$DISK"; mkfs.btrfs -q -L lightwhale-data "$DISK"p1 >/dev/null
          mkdir /tmp/$$; mount "$DISK"p1 /tmp/$$; echo kept > /tmp/$$/kept
          umount /tmp/$$; rmdir /tmp/$$`,
      }],
    },
    async (system) => {
      const [{ path }] = system.disks;
      if (node === "with") await command(["partx", "-a", path]);
      const boot = await system.boot();
      const { mode, status } = await look(system, boot);
      assertEquals({ mode, status }, { mode: "persistent", status: 0 });
      assertEquals(await topLevel(system, "cat kept"), "kept\n");
    },
  );
}

onDisks(
  "a magic partition name on a data filesystem is not obeyed",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    await system.sh("echo kept > home/kept");
    await system.reboot();
    const [{ path }] = system.disks;
    await command([
      ...["sfdisk", "-q", "--no-reread", "--no-tell-kernel"],
      ...["--part-label", path, "2", magic],
    ]);
    await system.reboot();
    assertEquals((await system.boot()).status, 0);
    assertEquals(await system.sh("cat home/kept"), "kept\n");
  },
);

// Damage is not emptiness

const damages: Record<string, string> = {
  "its superblock is destroyed":
    "dd if=/dev/zero of=$DATA bs=4096 seek=16 count=1 status=none",
  "its superblock has a wrong checksum":
    "printf xxxx | dd of=$DATA bs=1 seek=65600 conv=notrunc status=none",
  "wipefs was run on it": "wipefs -q -a $DATA",
};

for (const [damage, script] of Object.entries(damages)) {
  onDisks(
    `a data disk is reported and nothing is formatted when ${damage}`,
    { disks: [smallMagicDisk] },
    async (system) => {
      await system.boot();
      await system.reboot();
      await damageData(system.disks[0], script);
      await system.plug(smallMagicDisk);
      await system.reboot();

      const before = await checksums(system, [0, 1]);
      const boot = await system.boot();
      const { mode, status, type } = await look(system, boot);
      assertEquals({ mode, status, type }, {
        mode: "fallback",
        status: 1,
        type: "tmpfs",
      }, boot.stderr);
      assertStringIncludes(boot.stderr, system.disks[0].path);
      await assertWritable(system);
      assertEquals(await checksums(system, [0, 1]), before);
    },
  );
}

/** A data disk that no partition name gives away. */
const withoutPartitions = `mkfs.btrfs -q -L lightwhale-data "$DISK" >/dev/null`;

onDisks(
  "only a backup superblock is left: nothing is formatted",
  {
    disks: [{
      ...smallDisk,
      contents: `${withoutPartitions}
        dd if=/dev/zero of="$DISK" bs=4K count=32 conv=notrunc status=none`,
    }, smallMagicDisk],
  },
  async (system) => {
    const before = await checksums(system, [0, 1]);
    const boot = await system.boot();
    const { mode, status } = await look(system, boot);
    assertEquals(
      { mode, status },
      { mode: "fallback", status: 1 },
      boot.stderr,
    );
    assertStringIncludes(boot.stderr, "only a backup superblock is left");
    assertEquals(await checksums(system, [0, 1]), before);
  },
);

/** They leave a backup superblock as it is. */
const successors: Record<string, string> = {
  ext4: 'mkfs.ext4 -q -F -E nodiscard "$DISK"',
  XFS: 'mkfs.xfs -q -f -K "$DISK"',
  FAT: 'mkfs.vfat "$DISK"',
  swap: 'mkswap -q "$DISK"',
  "an MBR":
    'echo type=83 | sfdisk -q --no-tell-kernel -w always -X dos "$DISK"',
};

for (const [successor, script] of Object.entries(successors)) {
  onDisks(
    `${successor} on what once was a data disk: it is no damaged one`,
    {
      disks: [{
        ...smallDisk,
        contents: `${withoutPartitions}
          ${script} >/dev/null 2>&1
          dd if="$DISK" bs=8 skip=$((64 * 131072 + 8)) count=1 status=none |
            grep -q _BHRfS_M`,
      }, smallMagicDisk],
    },
    async (system) => {
      const before = await checksums(system, [0]);
      const boot = await system.boot();
      const { mode, status } = await look(system, boot);
      assertEquals({ mode, status }, { mode: "persistent", status: 0 });
      assert(!boot.stderr.includes("backup superblock"), boot.stderr);
      assertEquals(await checksums(system, [0]), before);
    },
  );
}

// Disks made by the older tool or by hand

const older: Record<string, string> = {
  "with all subvolumes": `btrfs -q subvolume create @lightwhale-data
    btrfs -q subvolume create @lightwhale-state
    btrfs -q subvolume create @lightwhale-state-snapshots
    STATE=@lightwhale-state`,
  "without the subvolume for snapshots":
    `btrfs -q subvolume create @lightwhale-data
    btrfs -q subvolume create @lightwhale-state
    STATE=@lightwhale-state`,
  "with the state as a directory at the top level":
    "mkdir lightwhale-state; STATE=lightwhale-state",
  "with the state as a directory in the data subvolume":
    `btrfs -q subvolume create @lightwhale-data
    mkdir @lightwhale-data/lightwhale-state
    STATE=@lightwhale-data/lightwhale-state`,
};

for (const [layout, script] of Object.entries(older)) {
  onDisks(
    `a filesystem ${layout} keeps working`,
    {
      disks: [{
        ...smallDisk,
        contents: `mkfs.btrfs -q -L lightwhale-data "$DISK" >/dev/null
          folder=$(mktemp -d); mount "$DISK" $folder; cd $folder
          ${script}
          mkdir -p $STATE/overlay/upper/etc $STATE/overlay/work/etc
          echo kept > $STATE/overlay/upper/etc/kept
          mkdir $STATE/docker; echo kept > $STATE/docker/kept
          cd /; umount $folder; rmdir $folder`,
      }],
    },
    async (system) => {
      for (const round of ["first", "second"]) {
        const boot = await system.boot();
        assertEquals(boot.report.mode, "persistent", boot.stderr);
        assertEquals(
          await system.sh(
            `cat etc/kept mnt/lightwhale-data/lightwhale-state/docker/kept
             echo ${round} > home/round; cat home/round`,
          ),
          `kept\nkept\n${round}\n`,
        );
        await system.reboot();
      }
    },
  );
}

onDisks(
  "nothing is mounted over a directory that holds data",
  {
    disks: [{
      ...smallDisk,
      contents: `mkfs.btrfs -q -L lightwhale-data "$DISK" >/dev/null
        folder=$(mktemp -d); mount "$DISK" $folder; cd $folder
        btrfs -q subvolume create @lightwhale-data
        mkdir -p @lightwhale-data/lightwhale-state-snapshots
        echo kept > @lightwhale-data/lightwhale-state-snapshots/kept
        btrfs -q subvolume create @lightwhale-state-snapshots
        cd /; umount $folder; rmdir $folder`,
    }],
  },
  async (system) => {
    const boot = await system.boot();
    assertEquals(boot.report.mode, "persistent", boot.stderr);
    assertEquals(
      await system.sh(
        "cat mnt/lightwhale-data/lightwhale-state-snapshots/kept",
      ),
      "kept\n",
    );
  },
);

// Docker

const dataRoot = "/mnt/lightwhale-data/lightwhale-state/docker";

const daemons: {
  name: string;
  root: string;
  /** Keys besides `data-root`. */
  keeps: Record<string, unknown>;
}[] = [
  { name: "missing", root: "", keeps: {} },
  { name: "in a folder that exists", root: "mkdir etc/docker", keeps: {} },
  {
    name: "empty",
    root: "mkdir etc/docker; : > etc/docker/daemon.json",
    keeps: {},
  },
  {
    name: "present with keys",
    root: `mkdir etc/docker
      echo '{"log-driver": "local", "dns": ["10.0.0.1"]}' \\
        > etc/docker/daemon.json`,
    keeps: { "log-driver": "local", "dns": ["10.0.0.1"] },
  },
  {
    name: "present with another data root",
    root:
      `mkdir etc/docker; echo '{"data-root": "/var/lib/docker", "debug": true}' \\
        > etc/docker/daemon.json`,
    keeps: { "debug": true },
  },
];

for (const { name, root, keeps } of daemons) {
  onDisks(
    `daemon.json ${name}: it points at the data root`,
    { disks: [smallMagicDisk], root },
    async (system) => {
      const boot = await system.boot();
      assertEquals(boot.status, 0, boot.stderr);
      const text = await system.sh("cat etc/docker/daemon.json");
      const { "data-root": found, ...others } = JSON.parse(text);
      assertEquals(found, dataRoot);
      assertEquals(others, keeps);
      await system.sh("test -d mnt/lightwhale-data/lightwhale-state/docker");

      const list = "stat -c '%i %Y %Z' etc/docker/daemon.json";
      const before = await system.sh(list);
      await system.boot();
      assertEquals(await system.sh(list), before, "it was written again");
    },
  );
}

for (const broken of ['{"debug": true', "[]", '"text"']) {
  onDisks(
    `daemon.json broken (${broken}): reported, never replaced`,
    {
      disks: [smallMagicDisk],
      root:
        `mkdir etc/docker; printf '%s' '${broken}' > etc/docker/daemon.json`,
    },
    async (system) => {
      const boot = await system.boot();
      assertEquals(boot.report.mode, "persistent");
      assertEquals(await system.sh("cat etc/docker/daemon.json"), broken);
      assertStringIncludes(boot.stderr, "daemon.json");
      await assertWritable(system);
    },
  );
}

// Whatever fails

const failures: Record<string, string> = {
  "fails": "echo 'it broke' >&2; exit 3",
  // dax reports success for such a child.
  "is killed by a signal": "kill -SEGV $$",
  "says that it worked but did nothing": "exit 0",
};

for (const program of ["sfdisk", "mkfs.btrfs"]) {
  for (const [failure, script] of Object.entries(failures)) {
    onDisks(
      `${program} ${failure}: writable, status 1, and the next boot finishes`,
      { disks: [magicDisk] },
      async (system) => {
        const boot = await bootWith(system, program, script);
        assertEquals(boot.status, 1, boot.stderr);
        assertStringIncludes(boot.stderr, system.disks[0].path);
        await assertWritable(system);
        await assertFinishes(system);
      },
    );
  }
}

for (const [failure, script] of Object.entries(failures)) {
  onDisks(
    `mkswap ${failure}: persistent, status 1, and the next boot makes swap`,
    { disks: [magicDisk] },
    async (system) => {
      const boot = await bootWith(system, "mkswap", script);
      const { mode, status, marked, swaps } = await look(system, boot);
      assertEquals({ mode, status, marked, swaps }, {
        mode: "persistent",
        status: 1,
        marked: [false],
        swaps: 0,
      }, boot.stderr);
      const [{ path }] = system.disks;
      assertMatch(boot.stderr, new RegExp(`Cannot .* swap on ${path}p1\\b`));
      await assertWritable(system);
      await system.sh("echo kept > etc/kept");

      const { stderr } = await assertFinishes(system);
      assertMatch(stderr, /Repair: make swap on \S+p1\n/);
      assertEquals(await system.sh("cat etc/kept"), "kept\n");
      await system.reboot();
      const again = await system.boot();
      assert(!again.stderr.includes("make swap"), again.stderr);
    },
  );
}

/** A boot in which this program is that script. */
async function bootWith(
  system: System,
  program: string,
  script: string,
): Promise<Boot> {
  const folder = await Deno.makeTempDir({ prefix: "persistence-path-" });
  try {
    const file = `${folder}/${program}`;
    await Deno.writeTextFile(file, `#!/bin/sh\n${script}\n`);
    await Deno.chmod(file, 0o755);
    return await system.boot([], {
      path: `${folder}:/usr/sbin:/usr/bin:/sbin:/bin`,
    });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** The next boot makes what is not there yet. */
async function assertFinishes(system: System): Promise<Boot> {
  await system.reboot();
  const boot = await system.boot();
  const { mode, status, marked, swaps } = await look(system, boot);
  assertEquals({ mode, status, marked, swaps }, {
    mode: "persistent",
    status: 0,
    marked: [false],
    swaps: 1,
  }, boot.stderr);
  return boot;
}

onDisks(
  "a magic disk that is read-only: writable, status 1",
  { disks: [magicDisk] },
  async (system) => {
    const [{ path }] = system.disks;
    await command(["blockdev", "--setro", path]);
    const before = await checksums(system, [0]);
    const boot = await system.boot();
    assertEquals(boot.status, 1, boot.stderr);
    assertStringIncludes(boot.stderr, path);
    await assertWritable(system);
    assertEquals(await checksums(system, [0]), before);
  },
);

onDisks(
  "stdin closed",
  { disks: [magicDisk] },
  async (system) => {
    const boot = await system.boot([], { closeStdin: true });
    const { mode, status, swaps } = await look(system, boot);
    assertEquals({ mode, status, swaps }, {
      mode: "persistent",
      status: 0,
      swaps: 1,
    }, boot.stderr);
  },
);

async function look(system: System, { report, status }: Boot): Promise<After> {
  const data = `${system.root}/mnt/lightwhale-data`;
  const type = (path: string) =>
    system.sh(`findmnt -n -o FSTYPE --mountpoint "${path}" | tail -n 1`)
      .then((text) => text.trim());
  const dataType = await type(data);
  return {
    mode: report.mode,
    status,
    type: dataType,
    profiles: dataType === "btrfs" ? await profilesOf(system, data) : undefined,
    partitions: await Promise.all(system.disks.map(partitionNames)),
    marked: await Promise.all(system.disks.map(isMarked)),
    swaps: await countSwaps(system),
    overlays: (await Promise.all(
      ["etc", "var", "home"].map((name) => type(`${system.root}/${name}`)),
    )).join(" "),
  };
}

async function profilesOf(system: System, mount: string): Promise<string> {
  const text = await system.sh(`btrfs filesystem df "${mount}"`);
  return ["Data", "Metadata", "System"].map((kind) =>
    [...text.matchAll(new RegExp(`^${kind}, (\\w+):`, "gm"))]
      .map(([, profile]) => profile.toLowerCase()).join("+")
  ).join(" ");
}

async function partitionNames({ path }: Disk): Promise<string[]> {
  const text = await command(["sh", "-c", 'sfdisk --json "$0" || true', path]);
  if (!text) return []; // no table at all
  const { partitions = [] } = JSON.parse(text).partitiontable;
  return partitions.map(({ name = "" }) => name);
}

async function countSwaps(system: System): Promise<number> {
  return (await swapsOn(system)).length;
}

/** Lines of /proc/swaps; other systems on this machine have swap as well. */
async function swapsOn({ disks }: System): Promise<string[]> {
  const swaps = await Deno.readTextFile("/proc/swaps");
  return swaps.split("\n").filter((line) =>
    disks.some(({ path }) => line.startsWith(`${path}p`))
  );
}

/** Every mount below the root, its swap and every byte of what persists. */
async function everything(system: System): Promise<string> {
  const swaps = (await swapsOn(system)).join("\n");
  return swaps + await system.sh(
    `findmnt -R -n -o TARGET,SOURCE,FSTYPE,OPTIONS,ID "$PWD"
     cd mnt/lightwhale-data; find . -printf '%p %m %U %G %s %T@ %C@\\n' | sort
     find . -type f -exec sha256sum {} +`,
  );
}

function checksums(system: System, disks: number[] = []): Promise<string[]> {
  return Promise.all(disks.map((n) => system.checksum(system.disks[n])));
}

async function assertWritable(system: System): Promise<void> {
  await system.sh(
    `for folder in etc var home mnt/lightwhale-data; do
       echo text > $folder/.test; grep -q text $folder/.test
       rm $folder/.test
     done`,
  );
}

function assertSpeaksAsItself({ stderr, stdout }: Boot): void {
  assertEquals(stdout, "");
  for (const line of stderr.split("\n").filter(Boolean)) {
    assertMatch(line, /^persistence: /);
  }
}

async function existing(system: System, paths: string[]): Promise<string[]> {
  const list = await system.sh(
    `for path in ${paths.join(" ")}; do
       if [ -e $path ]; then echo $path; fi
     done`,
  );
  return list.split("\n").filter(Boolean);
}

/** Runs a script at the top level of the data filesystem. */
function topLevel(system: System, script: string): Promise<string> {
  return system.sh(
    `device=$(findmnt -n -o SOURCE --nofsroot $PWD/mnt/lightwhale-data)
     mkdir $PWD/tmp/top; mount -o subvolid=5 $device $PWD/tmp/top
     (cd tmp/top; ${script}); umount $PWD/tmp/top`,
  );
}

/** Runs a script on the data partition, as `$DATA`, of a small data disk. */
async function damageData({ path }: Disk, script: string): Promise<void> {
  await command(["partx", "--add", path]);
  await command(["sh", "-euc", script], { DATA: `${path}p1` });
  await command(["blockdev", "--flushbufs", `${path}p1`]);
  await command(["partx", "--delete", path]);
}

function partitionedInto(label: string, partition: string): string {
  return `printf 'label: ${label}\n${partition}\n${partition}\n' |
    sfdisk -q --no-reread --no-tell-kernel "$DISK"`;
}

/** A shell script that writes bytes, given in hexadecimal. */
function put(offset: number, ...hex: string[]): string {
  const octal = (byte: string) =>
    "\\" + parseInt(byte, 16).toString(8).padStart(3, "0");
  const text = hex.join("").replace(/../g, octal);
  return `printf '${text}' | dd of="$DISK" bs=1 seek=${offset} status=none`;
}

function differs(boot: Boot, seen: After, expected: Partial<After>): string {
  return `Expected ${JSON.stringify(expected)}\n     but saw ${
    JSON.stringify(seen)
  }\n${boot.stderr}`;
}
