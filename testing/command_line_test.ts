/** The command line: enabling disks, asking for the state, and mistakes. */
import { dirname } from "node:path";
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import { HELP } from "../persistence.ts";
import {
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
  projectFolder,
  type Result,
  statusOf,
  type System,
  type SystemOptions,
  tool,
} from "./system.ts";

const disk: DiskSpec = { sizeBytes: 600 * MiB };
const magicDisk: DiskSpec = { ...disk, contents: header };

// Mistakes

const mistakes: Record<string, string[]> = {
  "an unknown option": ["--enabel", "/dev/null"],
  "an unknown short option": ["-x"],
  "an option with one dash": ["-status"],
  "a device without an option": ["/dev/null"],
  "--enable without a device": ["--enable"],
  "--disable without a device": ["--disable"],
  "--enable and --disable at once": ["--enable", "--disable", "/dev/null"],
  "--status and --dry-run at once": ["--status", "--dry-run"],
  "--status with a device": ["--status", "/dev/null"],
  "--dry-run with a device": ["--dry-run", "/dev/null"],
  "--json without --status": ["--json"],
  "--force without --enable": ["--force"],
  "--with without --enable": ["--with", "/dev/null"],
  "--with without a file": ["--enable", "/dev/null", "--with"],
  "--with and an empty file name": ["--enable", "/dev/null", "--with="],
  "--with and --now": ["--enable", "/dev/null", "--now", "--with", "x"],
  "--with and an empty file": ["--enable", "/dev/null", "--with", "/dev/null"],
  "--enable with a device that is not there": ["--enable", "/dev/nonexistent"],
  "--disable with a device that is not there": ["--disable", "/dev/nowhere"],
  "--enable with an empty device": ["--enable", ""],
  "--wait without a number": ["--wait"],
  "--wait with a word": ["--wait", "long"],
  "--wait with a negative number": ["--wait=-1"],
  "--wait with an empty number": ["--wait="],
  "--devices without a list": ["--devices"],
  "--devices with an empty list": ["--devices="],
  "--devices with an empty name": ["--devices", "/dev/null,"],
  "--devices with a device that is not there": ["--devices", "/dev/nowhere"],
  "--devices with an image file": ["--devices", projectFolder + "README.md"],
  "--wait with more than a day": ["--wait", "100000"],
  "--root with a folder that is not there": ["--root", "/nowhere"],
  "--root with a file": ["--root", "/etc/passwd"],
  "--enable= with a device": ["--enable=/dev/null", "/dev/zero"],
  "--status with a value": ["--status=no"],
};

for (const [mistake, args] of Object.entries(mistakes)) {
  onDisks(
    `${mistake}: one sentence, status 2`,
    { disks: [magicDisk] },
    async (system) => {
      // Whatever this falls through to must not reach the machine's disks.
      const has = (option: string) =>
        args.some((arg) => arg.startsWith(option));
      const [, root, , devices] = system.place();
      const place = [
        ...(has("--root") ? [] : ["--root", root]),
        ...(has("--devices") ? [] : ["--devices", devices]),
      ];
      const before = await system.checksum(system.disks[0]);
      const result = await system.run([...place, ...args]);
      assertEquals(result.status, 2, result.stderr + result.stdout);
      assertEquals(result.stdout, "");
      assertMatch(result.stderr, /^persistence: [^\n]+\n$/);
      assertEquals(await system.checksum(system.disks[0]), before);
      assertEquals(await mounts(system), []);
    },
  );
}

onDisks("--help is HELP", { disks: [disk] }, async (system) => {
  const { status, stdout, stderr } = await system.run(["--help"]);
  assertEquals([status, stderr, stdout], [0, "", `${HELP}\n`]);
});

onDisks("--version is one line", { disks: [disk] }, async (system) => {
  const { status, stdout, stderr } = await system.run(["--version"]);
  assertEquals([status, stderr], [0, ""]);
  assertMatch(stdout, /^[^\n]*\d+\.\d+[^\n]*\n$/);
});

onDisks(
  "a name of digits stays that name",
  { disks: [disk] },
  async (system) => {
    const { status, stderr } = await system.run(["--enable", "007"]);
    assertEquals(status, 2, stderr);
    assertStringIncludes(stderr, '"007"');
  },
);

onDisks(
  "nothing is read from the working directory",
  { disks: [disk] },
  async (system) => {
    const version = `env -i PATH=/usr/bin ${tool.join(" ")} --version 2>&1`;
    const expected = await system.sh(`cd /; ${version}`);
    assertEquals(
      await system.sh(
        `mkdir tmp/here; cd tmp/here
         echo 'require("fs").writeFileSync("obeyed", "")' > preload.js
         echo 'preload = ["./preload.js"]' > bunfig.toml
         echo 'BUN_OPTIONS="--preload ./preload.js"' > .env
         for file in package.json tsconfig.json deno.json; do
           echo '{ broken' > $file
         done
         ${version}; ls`,
      ),
      `${expected}bunfig.toml
deno.json
package.json
preload.js
tsconfig.json
`,
    );
  },
);

// Enabling

onDisks(
  "--enable makes a disk magic, says what it is and what comes next",
  { disks: [disk] },
  async (system) => {
    const [{ path }] = system.disks;
    const result = await system.run(["--enable", path]);
    assertEquals(result.status, 0, result.stderr);
    assertEquals(await marked(system), [true]);
    const said = result.stdout + result.stderr;
    assertStringIncludes(said, path);
    assertMatch(said, /600 MiB/);
    assertMatch(said, /next boot/);

    await system.reboot();
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "persistent", stderr);
  },
);

onDisks(
  "--enable twice is the same as once",
  { disks: [disk] },
  async (system) => {
    const [{ path }] = system.disks;
    await system.run(["--enable", path]);
    const before = await system.checksum(system.disks[0]);
    const result = await system.run(["--enable", path]);
    assertEquals(result.status, 0, result.stderr);
    assertEquals(await system.checksum(system.disks[0]), before);
  },
);

onDisks(
  "--enable makes several disks magic",
  { disks: [disk, { ...disk, sectorBytes: 4096 }] },
  async (system) => {
    const paths = system.disks.map(({ path }) => path);
    const result = await system.run(["--enable", ...paths]);
    assertEquals(result.status, 0, result.stderr);
    assertEquals(await marked(system), [true, true]);
  },
);

onDisks(
  "--enable makes an image file magic",
  { disks: [disk] },
  async (system) => {
    const image = `${system.root}/tmp/a disk's "image".img`;
    await system.sh(`truncate -s 1M '${image.replaceAll("'", "'\\''")}'`);
    const result = await system.run(["--enable", image]);
    assertEquals(result.status, 0, result.stderr);
    const bytes = await system.sh("cat tmp/*.img | tr -d '\\0'");
    assertEquals(bytes, magic);
    assertEquals(await system.sh("stat -c %s tmp/*.img"), `${MiB}\n`);

    const again = await system.run(["--disable", image]);
    assertEquals(again.status, 0, again.stderr);
    assertEquals(await system.sh("cat tmp/*.img | tr -d '\\0'"), "");
  },
);

for (const table of ["gpt", "dos"]) {
  // An MBR does not say for which sectors it was made.
  for (const sectorBytes of table === "gpt" ? [512, 4096] as const : [512]) {
    onDisks(
      `--enable lists the partitions of an image file: ${table}, ` +
        `${sectorBytes}-byte sectors`,
      {
        disks: [{
          ...disk,
          sectorBytes: sectorBytes as 512 | 4096,
          contents: `printf 'label: ${table}\nsize=200M\nsize=100M\n' |
              sfdisk -q --no-reread --no-tell-kernel "$DISK"
            mkfs.ext4 -q -b 4096 -L archive -E offset=$((1 << 20)) "$DISK" 100M`,
        }],
      },
      async (system) => {
        const { image } = system.disks[0];
        const copy = `${dirname(image)}/copy.img`; // nobody uses it
        await command(["cp", "--sparse=always", image, copy]);
        const result = await system.run(["--enable", copy]);
        assertRefused(result, copy, /ext4 "archive".*: use --force/);
        assertStringIncludes(
          result.stdout,
          `  ${copy} (partition 1): 200 MiB, ext4 "archive"\n` +
            `  ${copy} (partition 2): 100 MiB, seems empty\n`,
        );
      },
    );
  }
}

onDisks(
  "--enable refuses a file that is no image, and one that cannot be written",
  { disks: [disk] },
  async (system) => {
    const [{ path }] = system.disks;
    const sum = "cat tmp/* | sha256sum";
    await system.sh(
      `: > tmp/empty; echo 'echo a script' > tmp/small
       head -c 2M /etc/services /bin/* 2>/dev/null | head -c 2M > tmp/large
       mkdir tmp/ro; mount -t tmpfs none tmp/ro; truncate -s 1M tmp/ro/image
       mount -o remount,ro tmp/ro`,
    );
    const before = await system.sh(`${sum} 2>/dev/null`);
    const files: Record<string, RegExp> = {
      "empty": /too small/,
      "small": /too small/,
      "large": /data of an unknown kind: use --force/,
      "ro/image": /read-only file system/i,
    };
    for (const [file, says] of Object.entries(files)) {
      const image = `${system.root}/tmp/${file}`;
      const result = await system.run(["--enable", path, image]);
      assertRefused(result, image, says);
      assertEquals(await marked(system), [false]);
    }
    assertEquals(await system.sh(`${sum} 2>/dev/null`), before);
  },
);

const gpt = `printf 'label: gpt\nsize=200M, name=system\nname=free\n' |
    sfdisk -q --no-reread --no-tell-kernel "$DISK"`;
const addPartitions = (path: string) => command(["partx", "--add", path]);

for (const sectorBytes of [512, 4096] as const) {
  onDisks(
    `--enable names a partition, ${sectorBytes}-byte sectors`,
    { disks: [{ ...disk, sectorBytes, contents: gpt }] },
    async (system) => {
      const [{ path }] = system.disks;
      await addPartitions(path);
      const table = await system.sh(`sfdisk -d ${path}`);
      const result = await system.run(["--enable", `${path}p2`]);
      assertEquals(result.status, 0, result.stderr);
      assertEquals(
        await system.sh(`sfdisk -d ${path}`),
        table.replace('"free"', `"${magic}"`),
      );

      await system.reboot();
      const { report, stderr } = await system.boot();
      assertEquals(report.mode, "persistent", stderr);
    },
  );
}

onDisks(
  "--disable takes the header of a disk away, and only that",
  { disks: [{ ...disk, contents: gpt }] },
  async (system) => {
    const [device] = system.disks;
    const before = await system.checksum(device);
    await mark(device);
    const result = await system.run(["--disable", device.path]);
    assertEquals(result.status, 0, result.stderr);
    assertEquals(await system.checksum(device), before);
    await system.reboot();
    assertEquals((await system.boot()).report.mode, "volatile");
  },
);

onDisks(
  "--disable takes the name of a partition away",
  { disks: [{ ...disk, contents: gpt }] },
  async (system) => {
    const [{ path }] = system.disks;
    await addPartitions(path);
    const geometry = `sfdisk -d ${path} | sed 's/, name=.*//'`;
    const before = await system.sh(geometry);
    assertEquals((await system.run(["--enable", `${path}p2`])).status, 0);
    const result = await system.run(["--disable", `${path}p2`]);
    assertEquals(result.status, 0, result.stderr);
    const table = await system.sh(`sfdisk -d ${path}`);
    assert(!table.includes(magic), table);
    assertEquals(await system.sh(geometry), before);

    await system.reboot();
    assertEquals((await system.boot()).report.mode, "volatile");
  },
);

onDisks(
  "--disable writes nothing where there is no magic",
  { disks: [{ ...disk, contents: 'mkfs.ext4 -q "$DISK"' }] },
  async (system) => {
    const [device] = system.disks;
    const before = await system.checksum(device);
    await system.run(["--disable", device.path]);
    assertEquals(await system.checksum(device), before);
  },
);

// Refusals. `force` says whether --force overrules it.

const refusals: {
  name: string;
  disks: SystemOptions["disks"];
  /** A shell script that runs before, with the disks as $1, $2 …. */
  prepare?: string;
  /** What to enable, with %1 for the first disk. */
  enable: string[];
  says: RegExp;
  force: "overrules" | "does not help";
}[] = [
  {
    name: "a mounted disk",
    disks: [disk],
    prepare: 'mkfs.ext4 -q "$1"; mount -r "$1" mnt',
    enable: ["%1"],
    says: /mounted/,
    force: "does not help",
  },
  {
    name: "a disk with a mounted partition",
    disks: [{ ...disk, contents: gpt }],
    prepare: 'partx -a "$1"; mkfs.ext4 -q "$1"p2; mount -r "$1"p2 mnt',
    enable: ["%1"],
    says: /mounted/,
    force: "does not help",
  },
  {
    name: "a mounted partition",
    disks: [{ ...disk, contents: gpt }],
    prepare: 'partx -a "$1"; mkfs.ext4 -q "$1"p2; mount -r "$1"p2 mnt',
    enable: ["%1p2"],
    says: /mounted/,
    force: "does not help",
  },
  {
    name: "a disk that is swap",
    disks: [disk],
    prepare: 'mkswap "$1" >/dev/null; swapon "$1"',
    enable: ["%1"],
    says: /swap/,
    force: "does not help",
  },
  {
    name: "a partition that is swap",
    disks: [{ ...disk, contents: gpt }],
    prepare: 'partx -a "$1"; mkswap "$1"p1 >/dev/null; swapon "$1"p1',
    enable: ["%1p1"],
    says: /swap/,
    force: "does not help",
  },
  {
    name: "the second disk of an open Btrfs",
    disks: [disk, disk],
    prepare: `mkfs.btrfs -q -d raid1 -m raid1 "$1" "$2" >/dev/null
      mount -r -o device="$2" "$1" mnt`,
    enable: ["%2"],
    says: /in use|held|mounted|Btrfs/,
    force: "does not help",
  },
  {
    name: "a read-only disk",
    disks: [disk],
    prepare: 'blockdev --setro "$1"',
    enable: ["%1"],
    says: /read-only/,
    force: "does not help",
  },
  {
    name: "a disk that is too small",
    disks: [{ sizeBytes: 64 * MiB }],
    enable: ["%1"],
    says: /too small/,
    force: "does not help",
  },
  {
    name: "a partition that is too small",
    disks: [{
      ...disk,
      contents: `printf 'label: gpt\nsize=64M\nsize=1M\n' |
        sfdisk -q --no-reread --no-tell-kernel "$DISK"`,
    }],
    prepare: 'partx -a "$1"',
    enable: ["%1p1"],
    says: /too small/,
    force: "does not help",
  },
  {
    name: "a partition of an MBR, which has no name",
    disks: [{
      ...disk,
      contents: `printf 'label: dos\nsize=500M\n' |
        sfdisk -q --no-reread --no-tell-kernel "$DISK"`,
    }],
    prepare: 'partx -a "$1"',
    enable: ["%1p1"],
    says: /GPT/,
    force: "does not help",
  },
  {
    name: "a disk with a file system",
    disks: [{ ...disk, contents: 'mkfs.ext4 -q "$DISK"' }],
    enable: ["%1"],
    says: /ext4.*--force/,
    force: "overrules",
  },
  {
    name: "a disk with a GPT",
    disks: [{ ...disk, contents: gpt }],
    enable: ["%1"],
    says: /\bGPT\b.*--force/i,
    force: "overrules",
  },
  {
    name: "a disk with an MBR",
    disks: [{
      ...disk,
      contents: `printf 'label: dos\nsize=500M\n' |
        sfdisk -q --no-reread --no-tell-kernel "$DISK"`,
    }],
    enable: ["%1"],
    says: /\b(dos|MBR)\b.*--force/,
    force: "overrules",
  },
  {
    name: "a partition with a file system",
    disks: [{ ...disk, contents: gpt }],
    prepare: 'partx -a "$1"; mkfs.ext4 -q "$1"p2',
    enable: ["%1p2"],
    says: /ext4.*--force/,
    force: "overrules",
  },
  {
    name: "a disk with the data filesystem",
    disks: [{
      ...disk,
      contents: 'mkfs.btrfs -q -L lightwhale-data "$DISK" >/dev/null',
    }],
    enable: ["%1"],
    says: /lightwhale-data.*--force/,
    force: "overrules",
  },
  {
    name: "a disk with data of an unknown kind",
    disks: [{ ...disk, contents: 'head -c 1M /dev/urandom > "$DISK"' }],
    enable: ["%1"],
    says: /data of an unknown kind/,
    force: "overrules",
  },
  {
    name: "a disk that is mounted elsewhere",
    disks: [disk],
    prepare: `mkfs.ext4 -q "$1"
      unshare --mount sh -c 'mount -r "$0" mnt; : > tmp/mounted; exec sleep 8' \\
        "$1" >/dev/null 2>&1 &
      until [ -e tmp/mounted ]; do sleep 0.1; done`,
    enable: ["%1"],
    says: /busy|use --force/,
    force: "does not help",
  },
  {
    name: "a disk and its partition at once",
    disks: [{ ...disk, contents: gpt }],
    prepare: 'partx --add "$1"',
    enable: ["%1", "%1p2"],
    says: /its whole disk is to be enabled/,
    force: "does not help",
  },
  {
    name: "a partition of a disk that is enabled",
    disks: [{ ...disk, contents: `${gpt}\n${header}` }],
    prepare: 'partx --add "$1"',
    enable: ["%1p2"],
    says: /loop\d+ is enabled \(--disable it first\)/,
    force: "does not help",
  },
  {
    name: "a good disk together with a mounted one",
    disks: [disk, disk],
    prepare: 'mkfs.ext4 -q "$2"; mount -r "$2" mnt',
    enable: ["%1", "%2"],
    says: /mounted/,
    force: "does not help",
  },
];

for (const { name, disks, prepare, enable, says, force } of refusals) {
  onDisks(
    `--enable refuses ${name}; --force ${force}`,
    { disks },
    async (system) => {
      const paths = system.disks.map(({ path }) => path);
      await system.sh(
        `set -- ${paths.join(" ")}; ${prepare ?? ":"}; sync -f mnt`,
      );
      const devices = enable.map((device) =>
        device.replace(/%(\d)/, (_, digit) => paths[Number(digit) - 1])
      );
      const content = async () =>
        await Promise.all(system.disks.map(
          // The kernel itself writes to swap, though not to its header.
          name.includes("swap") ? checksumOfStart : system.checksum,
        ));
      const before = await content();

      const refused = await system.run(["--enable", ...devices]);
      assertRefused(refused, devices.at(-1)!, says);
      assertEquals(await content(), before);

      const forced = await system.run(["--enable", "--force", ...devices]);
      if (force === "overrules") {
        assertEquals(forced.status, 0, forced.stderr);
        await system.reboot();
        const { report, stderr } = await system.boot();
        assertEquals(report.mode, "persistent", stderr);
      } else {
        assertRefused(forced, devices.at(-1)!, says);
        assertEquals(await content(), before);
      }
    },
  );
}

onDisks(
  "--enable refuses what is no disk",
  { disks: [disk] },
  async (system) => {
    for (const path of ["/dev/null", "/etc", "/dev/console"]) {
      const result = await system.run(["--enable", path]);
      assert(result.status !== 0, `${path} was accepted`);
      assertStringIncludes(result.stderr, path);
    }
  },
);

/** A partition of this name, and the data filesystem on it. */
const dataPartition = (name: string) =>
  `printf 'label: gpt\nname=${name}\n' |
     sfdisk -q --no-reread --no-tell-kernel "$DISK"
   file=$(mktemp); truncate -s 500M "$file"
   mkfs.btrfs -q -L lightwhale-data "$file"
   dd if="$file" of="$DISK" bs=1M seek=1 conv=notrunc,sparse status=none
   rm "$file"`;

const forgotten: Record<string, string> = {
  "a whole disk": `mkfs.btrfs -q -L lightwhale-data "$DISK"\n${header}`,
  "a data disk": `${dataPartition("lightwhale-data")}\n${header}`,
  "a partition": dataPartition(magic),
};

for (const [what, contents] of Object.entries(forgotten)) {
  onDisks(
    `--enable refuses ${what} with data that is magic already`,
    { disks: [{ ...disk, contents }] },
    async (system) => {
      const [device] = system.disks;
      if (what !== "a whole disk") await addPartitions(device.path);
      const path = what === "a partition" ? `${device.path}p1` : device.path;
      const before = await system.checksum(device);
      const result = await system.run(["--enable", path]);
      assertRefused(result, path, /the data filesystem .* use --force/);
      assertEquals(await system.checksum(device), before);
      await system.reboot();
      const { report, stderr } = await system.boot();
      assertEquals(report.mode, "persistent", stderr);
      assertEquals(await marked(system), [false]);
    },
  );
}

for (const place of ["all of it", "a partition"]) {
  onDisks(
    `--enable --force refuses an image file with data that would win: ${place}`,
    {
      disks: [{
        ...disk,
        contents: place === "a partition"
          ? dataPartition("lightwhale-data")
          : 'mkfs.btrfs -q -L lightwhale-data "$DISK"',
      }],
    },
    async (system) => {
      const { image } = system.disks[0];
      const copy = `${dirname(image)}/copy.img`;
      await command(["cp", "--sparse=always", image, copy]);
      const result = await system.run(["--enable", "--force", copy]);
      assertRefused(result, copy, /would win .*losetup/);
      await command(["cmp", image, copy]);
    },
  );
}

onDisks(
  "--disable does not take a disk that it cannot read for one without magic",
  { disks: [magicDisk] },
  async (system) => {
    const [{ path, image }] = system.disks;
    await Deno.truncate(image, 0); // every read fails
    const result = await system.run(["--disable", path]);
    assertRefused(result, path, /Cannot read/);
  },
);

onDisks(
  "without root: one sentence, nothing is looked at",
  { disks: [magicDisk] },
  async (system) => {
    for (const mode of ["--status", "--dry-run", "--disable"]) {
      const args = [mode];
      if (mode === "--disable") args.push(system.disks[0].path);
      const { status, stdout, stderr } = await system.run(args, {
        tool: ["setpriv", "--reuid", "1000", ...tool],
      });
      assertEquals([status, stdout], [1, ""], stderr);
      assertMatch(stderr, /^persistence: Cannot .* root\b.*\n$/);
    }
  },
);

onDisks(
  "--enable --force on a data disk begins anew at the next boot",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    await system.sh("echo old > home/old");
    await system.reboot();
    const result = await system.run([
      "--enable",
      "--force",
      system.disks[0].path,
    ]);
    assertEquals(result.status, 0, result.stderr);
    await system.reboot();
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "persistent", stderr);
    assertEquals(await system.sh("ls home"), "");
  },
);

// Asking

onDisks(
  "--status of a persistent system",
  { disks: [{ sizeBytes: 3 * GiB, contents: header }, magicDisk] },
  async (system) => {
    const { report } = await system.boot();
    const text = await system.run([...system.place(), "--status"]);
    assertEquals(text.status, 0, text.stderr);
    assertMatch(text.stdout, /^Persistent/);
    for (const device of report.devices) {
      assertStringIncludes(text.stdout, device);
    }

    const status = await statusOf(system);
    assertEquals(
      [status.mode, status.label, status.uuid],
      ["persistent", "lightwhale-data", report.uuid],
    );
    assertEquals(status.profiles, {
      data: ["raid1"],
      metadata: ["raid1"],
      system: ["raid1"],
    });
    assertEquals(
      status.devices.map(({ path }) => path).sort(),
      [...report.devices].sort(),
    );
    assertEquals(status.health, []);
    // The machine may have swap of its own.
    assert(
      status.swap.includes(`${system.disks[0].path}p1`),
      `${status.swap}`,
    );
    assertEquals(status.lastBoot.mode, "persistent");
    const targets = status.mounts.map(({ target }) =>
      target.replace(system.root, "")
    );
    for (const name of ["/etc", "/var", "/home", "/mnt/lightwhale-data"]) {
      assert(targets.includes(name), `${targets} lacks ${name}`);
    }
  },
);

onDisks(
  "--status after a boot that failed says so",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    await system.reboot();
    const [{ path }] = system.disks;
    await system.sh( // the superblock: 64 KiB behind the first MiB
      `dd if=/dev/zero of=${path} bs=4k seek=272 count=1 conv=notrunc`,
    );
    const boot = await system.boot();
    assertEquals([boot.status, boot.report.mode], [1, "fallback"], boot.stderr);
    assertMatch(boot.report.reason, /may be damaged/);
    const { stdout } = await system.run([...system.place(), "--status"]);
    assertMatch(stdout, /^Attention: The last boot said: .*loop\d+p1/m);
    assert(!stdout.includes("Healthy"), stdout);
  },
);

onDisks(
  "--status of a volatile system, and of one before its boot",
  { disks: [disk] },
  async (system) => {
    const before = await system.run([...system.place(), "--status", "--json"]);
    JSON.parse(before.stdout);
    await system.boot();
    const status = await statusOf(system);
    assertEquals([status.mode, status.uuid], ["volatile", null]);
  },
);

const plans: Record<string, { disks: SystemOptions["disks"]; says: RegExp }> = {
  "one magic disk": { disks: [magicDisk], says: /mkfs|format/i },
  "two magic disks": { disks: [magicDisk, magicDisk], says: /raid1/i },
  "nothing": { disks: [disk], says: /volatile|tmpfs/i },
};

for (const [name, { disks, says }] of Object.entries(plans)) {
  onDisks(
    `--dry-run with ${name} prints the plan of the next boot, changes nothing`,
    { disks },
    async (system) => {
      const before = await Promise.all(system.disks.map(system.checksum));
      const dry = await system.run([...system.place(), "--dry-run"]);
      assertEquals(dry.status, 0, dry.stderr);
      assertMatch(dry.stdout, says);
      assertEquals(
        await Promise.all(system.disks.map(system.checksum)),
        before,
      );
      assertEquals(await mounts(system), []);
      assertEquals(
        await system.sh("ls run/lightwhale | grep -v lock || :"),
        "",
      );

      const { stderr } = await system.boot();
      for (const step of dry.stdout.split("\n")) {
        assertStringIncludes(stderr, step);
      }
    },
  );
}

onDisks(
  "--dry-run after the boot has nothing to format",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    const { status, stdout } = await system.run([
      ...system.place(),
      "--dry-run",
    ]);
    assertEquals(status, 0);
    assert(!/mkfs|sfdisk|format/i.test(stdout), stdout);
  },
);

onDisks(
  "--quiet says nothing where all is well, --verbose shows each command",
  { disks: [magicDisk] },
  async (system) => {
    const quiet = await system.boot(["--quiet"]);
    assertEquals([quiet.status, quiet.stderr, quiet.stdout], [0, "", ""]);
    await system.reboot();
    const { stderr } = await system.boot(["--verbose"]);
    assertMatch(stderr, /^persistence: .*mount /m);
  },
);

function assertRefused(result: Result, device: string, says: RegExp): void {
  assert(result.status === 1 || result.status === 2, result.stderr);
  assertStringIncludes(result.stderr, device);
  assertMatch(result.stderr, says);
}

function marked({ disks }: System): Promise<boolean[]> {
  return Promise.all(disks.map(isMarked));
}

/** The checksum of a disk's header or table, and of a whole-disk swap's. */
async function checksumOfStart({ path }: Disk): Promise<string> {
  return await command(["sh", "-euc", 'head -c 4096 "$0" | sha256sum', path]);
}

/** What is mounted below the root besides what was there before the boot. */
async function mounts(system: System): Promise<string[]> {
  const list = await system.sh('findmnt -R -n -o TARGET --raw "$PWD"');
  return list.split("\n").filter(Boolean)
    .map((target) => target.slice(system.root.length))
    .filter((target) => !["", "/run", "/tmp"].includes(target));
}

for (const name of ["a disk", "an image file whose name is odd"]) {
  onDisks(
    `--enable --force says how to put back what it overwrote: ${name}`,
    {
      disks: [{ sizeBytes: 200 * MiB, contents: 'mkfs.vfat -I "$DISK"' }],
      needs: ["mkfs.vfat"],
    },
    async (system) => {
      const [disk] = system.disks;
      const folder = await Deno.makeTempDir({ dir: dirname(disk.image) });
      const image = `${folder}/it's "$(odd)" %d.img`;
      const path = name === "a disk" ? disk.path : image;
      await command(["cp", disk.path, image]);
      const sum = () => command(["sh", "-c", 'sha256sum < "$0"', path]);
      const before = await sum();
      const args = [...system.place(), "--enable", "--force", path];
      const { status, stdout, stderr } = await system.run(args);
      assertEquals(status, 0, stderr);
      assertMatch(stdout, /To put back what stood in its first \d+ bytes/);
      assert(await sum() !== before);
      const [undo] = /^ *printf .*$/m.exec(stdout) ?? [""];
      await system.sh(undo);
      assertEquals(await sum(), before);
    },
  );
}

onDisks(
  "--enable --force --with says how to put back what it overwrote, if little",
  {
    disks: [{ sizeBytes: 200 * MiB, contents: 'mkfs.vfat -I "$DISK"' }],
    needs: ["mkfs.vfat"],
  },
  async (system) => {
    const [disk] = system.disks;
    const before = await system.checksum(disk);
    const enable = async (lines: number) => {
      const file = `${system.root}/tmp/payload`;
      await system.sh(
        `{ echo '-- etc/motd --'; yes hello | head -n ${lines}
           echo '-- end --'; } > ${file}`,
      );
      const args = ["--enable", "--force", "--with", file, disk.path];
      const { status, stdout, stderr } = await system.run(
        [...system.place(), ...args],
      );
      assertEquals(status, 0, stderr);
      return stdout;
    };
    const [undo] = /^ *persistence.ts --disable .*$/m.exec(await enable(20)) ??
      [""];
    const call = [...tool, ...system.place()].join(" ");
    await system.sh(undo.replace("persistence.ts", call));
    assertEquals(await system.checksum(disk), before);
    assertMatch(
      await enable(2000),
      /What stood in its first \d+ bytes is lost/,
    );
  },
);

for (const name of ["free", 'it\'s "$(odd)" \\ name', ""]) {
  onDisks(
    `--enable says how to give a partition its old name back: ${name}`,
    { disks: [{ ...disk, contents: gpt }] },
    async (system) => {
      const [{ path }] = system.disks;
      await addPartitions(path);
      await command(["sfdisk", "--no-reread", "--part-label", path, "2", name]);
      const before = await system.sh(`sfdisk -d ${path}`);
      const { status, stdout, stderr } = await system.run(
        [...system.place(), "--enable", `${path}p2`],
      );
      assertEquals(status, 0, stderr);
      assert(await system.sh(`sfdisk -d ${path}`) !== before);
      const [undo] = /^ *sfdisk --part-label .*$/m.exec(stdout) ?? [""];
      await system.sh(undo);
      assertEquals(await system.sh(`sfdisk -d ${path}`), before);

      await system.run(["--enable", `${path}p2`]);
      const args = ["--enable", "--force", `${path}p2`];
      const again = await system.run([...system.place(), ...args]);
      assert(!again.stdout.includes("old name"), again.stdout);
      const disabled = await system.run(["--disable", `${path}p2`]);
      assertStringIncludes(
        disabled.stdout,
        `"sfdisk --part-label ${path} 2 NAME" gives it one`,
      );
    },
  );
}

onDisks(
  "--enable says that a boot does not look at a loop device by itself",
  { disks: [disk] },
  async (system) => {
    const [{ path }] = system.disks;
    const says = `A boot looks at ${path} only where --devices names it`;
    const there = await system.run([...system.place(), "--enable", path]);
    assert(!there.stdout.includes(says), there.stdout);
    const [, root] = system.place();
    const other = await system.run(["--root", root, "--enable", path]);
    assertStringIncludes(other.stdout, says);
  },
);

onDisks(
  "--move, --remove, --enable --now: who has the data, if --devices does not",
  { disks: [magicDisk, disk, disk] },
  async (system) => {
    const [, other, third] = system.disks.map(({ path }) => path);
    const [, root] = system.place();
    const args = ["--root", root, "--devices", `${other},${third}`];
    const calls = [
      ["--move", other, third],
      ["--remove", other],
      ["--enable", "--now", other],
    ];
    await system.boot();
    for (const call of calls) {
      const result = await system.run([...args, ...call]);
      assertEquals(result.status, 2);
      assertMatch(
        result.stderr,
        /--devices does not name \/dev\/loop\d+(p\d)?, which holds the data/,
      );
    }
  },
);

onDisks(
  "--quiet keeps results",
  { disks: [disk] },
  async (system) => {
    const [{ path }] = system.disks;
    const calls = [["--dry-run"], ["--enable", path], ["--status"], ["--help"]];
    for (const call of calls) {
      const args = [...system.place(), ...call, "--quiet"];
      const { status, stdout, stderr } = await system.run(args);
      assertEquals([status, stderr], [0, ""]);
      assert(stdout !== "", call.join(" "));
    }
  },
);

/** The keys of a value, as paths: `[]` stands for the entries of a list. */
function keysOf(value: unknown, path = ""): string[] {
  if (Array.isArray(value)) {
    return [`${path}[]`, ...value.flatMap((each) => keysOf(each, `${path}[]`))];
  }
  const entries = Object.entries(value ?? {});
  if (typeof value !== "object" || entries.length === 0) return [path];
  return entries.flatMap(([key, each]) =>
    keysOf(each, path ? `${path}.${key}` : key)
  );
}

onDisks(
  "README.md lists the keys of persistence.json and --status --json",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    await system.boot();
    await system.settle();
    await system.reboot({ without: [system.disks[1]] });
    const { report } = await system.boot();
    await system.settle();
    await system.sh(
      `echo '{"what":"x","since":"2001-02-03T04:05:06Z","pid":1}' \
         > run/lightwhale/job.json`,
    );
    const { stdout } = await system.run(
      [...system.place(), "--status", "--json"],
    );
    const { lastBoot: _, ...status } = JSON.parse(stdout);
    const readme = await Deno.readTextFile(`${projectFolder}README.md`);
    const seen: Record<string, unknown> = {
      "persistence.json": report,
      "--status --json": { ...status, lastBoot: null },
    };
    for (const [what, value] of Object.entries(seen)) {
      const [, rows] = readme.split(`| key of \`${what}\` |`);
      const table = rows.slice(0, rows.indexOf("\n\n")).split("\n").slice(2);
      const listed = table.flatMap((row) =>
        [...row.split("|")[1].matchAll(/`(.*?)`/g)].map(([, key]) => key)
      );
      const keys = [...new Set(keysOf(value))];
      // A list of objects is listed by their keys, and may be empty; what does
      // not apply is null.
      const isSeen = (key: string) =>
        keys.some((other) =>
          other === key || key.startsWith(`${other}.`) ||
          (key.endsWith("*") && other.startsWith(key.slice(0, -1)))
        );
      const isListed = (key: string) =>
        listed.some((other) =>
          other === key || other.startsWith(`${key}.`) ||
          other.startsWith(`${key}[]`) ||
          (other.endsWith("*") && key.startsWith(other.slice(0, -1)))
        );
      assertEquals(listed.filter((key) => !isSeen(key)), [], what);
      assertEquals(keys.filter((key) => !isListed(key)), [], what);
    }
  },
);
