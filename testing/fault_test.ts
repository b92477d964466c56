/**
 * Faults: programs that are missing, killed or never end, disks that cannot be
 * written or are full, a kernel log that takes nothing. Each boot ends writable
 * within a bounded time, and says what went wrong, where, and what to do.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { systemPath } from "./programs.ts";
import {
  type Boot,
  command,
  type DiskSpec,
  farPlace,
  header,
  isMarked,
  MiB,
  onDisks,
  projectFolder,
  type RunOptions,
  sleep,
  type System,
  tool,
} from "./system.ts";

const magicDisk: DiskSpec = { sizeBytes: 2100 * MiB, contents: header };

/** What the tool runs on a first boot, and what it says without it. */
const onFirstBoot = [
  ...["wipefs", "sfdisk", "partx", "mkfs.btrfs", "mkswap", "btrfs", "mount"],
  ...["umount", "dd", "swapon", "flock"],
];
const onLaterBoot = ["mount", "dd", "swapon", "flock", "btrfs", "partx"];

/** Without these there is no writable system, whatever is tried. */
const indispensable = ["mount", "umount"];

/** How a program fails. */
const failures: Record<
  string,
  { script: string; says: (name: string) => RegExp }
> = {
  "fails": {
    script: "#!/bin/sh\necho no can do >&2\nexit 7\n",
    says: (name) => new RegExp(`${name}.*failed with status 7: no can do`),
  },
  "is killed": {
    script: "#!/bin/sh\nkill -SEGV $$\n",
    says: (name) => new RegExp(`${name}.*was killed by SIGSEGV`),
  },
  "cannot be run": {
    script: "#!/nonexistent\n",
    says: (name) => new RegExp(`"${name}": .*ENOENT`),
  },
  "does nothing and says that it worked": {
    script: "#!/bin/sh\ncat >/dev/null\nexit 0\n",
    says: () => /Cannot .*/,
  },
};

for (const [how, { script, says }] of Object.entries(failures)) {
  for (const name of onFirstBoot) {
    onDisks(
      `first boot: ${name} ${how}`,
      { disks: [magicDisk] },
      async (system) => {
        const boot = await bootWith(system, { [name]: script });
        await assertWritable(system, boot, name);
        if (boot.report.mode !== "persistent") {
          assertMatch(boot.stderr, says(name), boot.stderr);
          assertEquals(boot.status, 1, boot.stderr);
        }
        await assertRecovers(system);
      },
    );
  }
  for (const name of how === "is killed" ? onLaterBoot : []) {
    onDisks(
      `later boot: ${name} ${how}`,
      { disks: [magicDisk] },
      async (system) => {
        await persist(system);
        const boot = await bootWith(system, { [name]: script });
        await assertWritable(system, boot, name);
        if (boot.report.mode !== "persistent") {
          assertEquals(boot.status, 1, boot.stderr);
        }
        await assertRecovers(system, "precious");
      },
    );
  }
}

for (const name of onFirstBoot) {
  onDisks(
    `first boot: ${name} is not installed`,
    { disks: [magicDisk] },
    async (system) => {
      await hide(system, [name]);
      const boot = await system.boot();
      await assertWritable(system, boot, name);
      assertMatch(boot.stderr, new RegExp(`"${name}" is not installed`));
      if (boot.report.mode === "fallback" && !indispensable.includes(name)) {
        assert(await isMarked(system.disks[0]), "The disk was changed");
      }
      await assertRecovers(system);
    },
  );
}

onDisks(
  "none of the programs is installed but mount",
  { disks: [magicDisk] },
  async (system) => {
    await hide(
      system,
      onFirstBoot.filter((name) => !indispensable.includes(name)),
    );
    const boot = await system.boot();
    await assertWritable(system, boot, "all");
    assertEquals(boot.status, 1, boot.stderr);
    assert(await isMarked(system.disks[0]), "The disk was changed");
    await assertRecovers(system);
  },
);

const smallDisk: DiskSpec = { sizeBytes: 600 * MiB, contents: header };
const rehearsals: Record<string, { script: string; says: RegExp }> = {
  "fails": {
    script: failures.fails.script,
    says: /Cannot rehearse.*failed with status 7: no can do/,
  },
  "is killed": {
    script: failures["is killed"].script,
    says: /Cannot rehearse.*was killed by SIGSEGV/,
  },
  "finds no room on /run": {
    script: realBut(
      "mkfs.btrfs",
      '*rehearsal-*) echo "ERROR: no space left on device" >&2; exit 1',
    ),
    says: /Cannot rehearse.*failed with status 1: .*no space left on device/,
  },
};
for (const [how, { script, says }] of Object.entries(rehearsals)) {
  onDisks(
    `two disks: the rehearsal of mkfs.btrfs ${how}, neither is made alone`,
    { disks: [smallDisk, smallDisk] },
    async (system) => {
      const boot = await bootWith(system, { "mkfs.btrfs": script });
      await assertWritable(system, boot, "mkfs.btrfs");
      assertEquals([boot.status, boot.report.mode], [1, "fallback"]);
      assertMatch(boot.stderr, says);
      for (const disk of system.disks) {
        assert(await isMarked(disk), `${disk.path} was changed`);
      }
      await assertRecovers(system);
    },
  );
}

onDisks(
  "a disk is to join, but this program has gone: persistent, and said",
  { disks: [smallDisk, smallDisk] },
  async (system) => {
    const [first, second] = system.disks;
    await system.boot(["--devices", first.path]);
    await system.reboot();
    const copy = `${system.root}/run/copy`;
    await system.sh(`cp "${tool[0]}" "${copy}"`);
    const dd = realBut("dd", "never)", `rm -f "${copy}"`);
    const boot = await withPrograms(
      { dd },
      (path) => system.boot([], { path, tool: [copy] }),
    );
    await assertWritable(system, boot, "");
    assertEquals(boot.report.mode, "persistent", boot.stderr);
    assertMatch(boot.stderr, /Cannot start the work in the background: .*copy/);
    assert(!/\bat .*:\d+/.test(boot.stderr), `A stack: ${boot.stderr}`);
    assert(await isMarked(second), "It joined all the same");
  },
);

for (const before of ["a boot", "a reset"]) {
  onDisks(
    `after ${before} another one is at work for too long: nothing is touched`,
    { disks: [magicDisk] },
    async (system) => {
      if (before === "a boot") {
        await system.boot();
        await system.sh("echo mine > home/file");
      }
      const mounts = await system.sh("cat /proc/self/mountinfo");
      await system.sh(
        `mkdir -p run/lightwhale
         flock run/lightwhale/lock sleep 60 >/dev/null 2>&1 &
         while flock -n run/lightwhale/lock true; do sleep 0.1; done`,
      );
      const { status, stderr } = await impatiently(
        {},
        (options) => system.run(system.place(), options),
      );
      assertEquals(status, 1, stderr);
      assertMatch(stderr, /Waiting .*another persistence.ts is at work/);
      assertMatch(stderr, /another persistence.ts is at work; wait for it/);
      const after = await system.sh("cat /proc/self/mountinfo");
      assertEquals(after, mounts, stderr);
    },
  );
}

onDisks(
  "flock does not work: the boot goes on without a lock",
  { disks: [magicDisk] },
  async (system) => {
    const boot = await bootWith(system, { flock: "#!/bin/sh\nexit 1\n" });
    assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
    assertMatch(
      boot.stderr,
      /without a lock: .*"flock 0" failed with status 1/,
    );
    await assertRecovers(system);
  },
);

onDisks(
  "the partitions of half of a mirror cannot be shown: the other half is used",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    await persist(system);
    const [{ path }] = system.disks;
    const partx = realBut("partx", `*${path}) echo no can do >&2; exit 7`);
    const boot = await bootWith(system, { partx });
    assertEquals([boot.status, boot.report.mode], [1, "persistent"]);
    assert(boot.report.degraded, boot.stderr);
    assertMatch(boot.stderr, /did not appear .*: going on without/);
    assertEquals(await system.sh("cat etc/precious"), "precious\n");
  },
);

onDisks(
  "a boot that is run again fails: what is set up stays",
  { disks: [magicDisk] },
  async (system) => {
    await persist(system);
    await system.boot();
    await system.sh("echo mine > home/file");
    await system.sh("umount mnt/lightwhale-data/lightwhale-state-snapshots");
    const mounts = await system.sh("cat /proc/self/mountinfo");
    // In the table of all mounts, and on its own.
    const fails = '"--all "* | *snapshots*) echo no can do >&2; exit 7';
    const mount = realBut("mount", fails);
    const boot = await bootWith(system, { mount });
    assertEquals(boot.status, 1, boot.stderr);
    assertMatch(boot.stderr, /snapshots.* failed with status 7: no can do/);
    assertEquals(await system.sh("cat /proc/self/mountinfo"), mounts);
    assertEquals(await system.sh("cat home/file"), "mine\n");
    await assertRecovers(system, "precious");
  },
);

onDisks(
  "a disk grew, but sfdisk fails: persistent, and said",
  { disks: [magicDisk] },
  async (system) => {
    await persist(system);
    const [disk] = system.disks;
    await system.reboot({
      whileOff: () => Deno.truncate(disk.image, 2500 * MiB),
    });
    const boot = await bootWith(system, { sfdisk: failures.fails.script });
    assertEquals([boot.status, boot.report.mode], [1, "persistent"]);
    assertMatch(boot.stderr, /Cannot grow \S+: .*failed with status 7/);
    await assertRecovers(system, "precious");
  },
);

/** The lock of the maintenance is another's; all others are free. */
const maintained = realBut(
  "flock",
  "never)",
  `case $(readlink /proc/self/fd/0) in
     */maintenance.lock) [ "$1" != -n ] || exit 1; exec sleep 600 ;;
   esac`,
);

/** What btrfs does instead of a replace, and how often it is tried. */
const replaces: Record<
  string,
  { start: string; says: RegExp; tries: string[] }
> = {
  // What began was given up by the kernel, and then there is another disk.
  "ends, and then another disk is in its place": {
    start: "exit 0",
    says: /it is not the disk any more that was looked at/,
    tries: ["-f 2"],
  },
  "does not answer, with and without discard": {
    start: "exec sleep 600",
    says: /no answer in .*: once more without.*\n.*no answer in/,
    tries: ["-f 2", "-f --nodiscard 2"],
  },
};

for (const [how, { start, says, tries }] of Object.entries(replaces)) {
  onDisks(
    `a replace ${how}: the disk is left alone`,
    { disks: [smallDisk, smallDisk] },
    async (system) => {
      await persist(system);
      const [, old] = system.disks;
      const fresh = await system.plug(smallDisk);
      await system.reboot({ without: [old, fresh] });
      await system.attach(fresh, farPlace); // nobody else takes it
      // Nothing in the background: "another one is at it".
      await withPrograms({ flock: maintained }, async (path) => {
        await system.boot([], { path });
        await system.settle();
      });
      const btrfs = realBut(
        "btrfs",
        `"replace start"*) ${start} ;;
         "replace cancel"*) exit 2 ;;
         "balance start -dusage"*)
           partx -d ${fresh.path}; losetup -d ${fresh.path}
           losetup ${fresh.path} ${fresh.image}; partx -a ${fresh.path}; exit`,
        `echo "$@" >> ${system.root}/run/btrfs.log`,
      );
      const { stderr } = await impatiently(
        { btrfs },
        (options) => system.run([...system.place(), "--maintain"], options),
      );
      assertMatch(stderr, says, stderr);
      const asked = await system.sh("cat run/btrfs.log");
      const starts = asked.matchAll(/^replace start (.*?) \/dev\/.*$/gm);
      assertEquals([...starts].map(([, options]) => options), tries, asked);
      assert(!asked.includes("device add"), asked);
    },
  );
}

const hangsUnlessTold = "*rehearsal* | *--nodiscard*) ;; *) exec sleep 600";

onDisks(
  "mkfs.btrfs discards for too long: it is made without",
  { disks: [magicDisk] },
  async (system) => {
    const boot = await impatiently(
      { "mkfs.btrfs": realBut("mkfs.btrfs", hangsUnlessTold) },
      (options) => system.boot([], options),
    );
    assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
    assertMatch(boot.report.warnings.join(), /once more without a discard/);
    await assertRecovers(system);
  },
);

onDisks(
  "btrfs device add discards for too long: the disk joins without",
  { disks: [smallDisk, smallDisk] },
  async (system) => {
    const [first] = system.disks;
    await system.boot(["--devices", first.path]);
    await system.reboot();
    await withPrograms({ flock: maintained }, async (path) => {
      await system.boot([], { path });
      await system.settle();
    });
    const { status, stderr } = await impatiently(
      {
        btrfs: realBut(
          "btrfs",
          `"device add"*--nodiscard*) ;; "device add"*) exec sleep 600`,
        ),
      },
      (options) => system.run([...system.place(), "--maintain"], options),
    );
    assertEquals(status, 0, stderr);
    assertMatch(stderr, /let \S+ join .*: once more without a discard/);
    assertMatch(await statusOf(system), /data raid1, metadata raid1/);
  },
);

onDisks(
  "mkfs.btrfs hangs and cannot be killed: no other one begins",
  { disks: [magicDisk], needs: ["fsfreeze"] },
  async (system) => {
    // Who writes to a frozen file system waits and cannot be interrupted.
    await system.sh(
      `mkdir run/frozen; truncate -s 20M run/frozen.img
       mkfs.ext4 -q run/frozen.img; mount -o loop run/frozen.img run/frozen
       fsfreeze --freeze run/frozen`,
    );
    const log = `${system.root}/run/mkfs.log`;
    try {
      const boot = await impatiently(
        {
          "mkfs.btrfs":
            `#!/bin/sh\necho "$@" >>${log}\nexec touch ${system.root}/run/frozen/x\n`,
        },
        (options) => system.boot([], options),
      );
      await assertWritable(system, boot, "");
      assertEquals([boot.status, boot.report.mode], [1, "fallback"]);
      assertMatch(boot.stderr, /cannot be ended \(the disk does not answer/);
      const tries = (await system.sh("cat run/mkfs.log")).trim().split("\n");
      assertEquals(tries.length, 1, tries.join("\n"));
    } finally {
      await system.sh("fsfreeze --unfreeze run/frozen");
    }
    await assertRecovers(system);
  },
);

onDisks(
  "what goes on cannot be noted in /run: the maintenance waits for it, and ends",
  { disks: [smallDisk] },
  async (system) => {
    const { report } = await system.boot();
    const looks = realBut(
      "flock",
      "never)",
      `echo >> ${system.root}/run/looks`,
    );
    await system.sh(
      `echo balance > run/operation
       mount --bind run/operation /sys/fs/btrfs/${report.uuid}/exclusive_operation
       mkdir -p run/lightwhale/job.json.new`,
    );
    const [{ stderr }] = await Promise.all([
      withPrograms(
        { flock: looks },
        (path) => system.run([...system.place(), "--maintain"], { path }),
      ),
      sleep(3000).then(() => system.sh("echo none > run/operation")),
    ]);
    const count = Number(await system.sh("wc -l < run/looks"));
    assert(count < 10, `${count} looks:\n${stderr.slice(0, 2000)}`);
  },
);

onDisks(
  "maintenance that another one does is not done, and that is said",
  { disks: [smallDisk] },
  async (system) => {
    await system.boot();
    const busy = await system.sh(
      `echo '{"what":"x joins","since":"noon","pid":1}' > run/lightwhale/job.json
       flock run/lightwhale/maintenance.lock sleep 30 >/dev/null 2>&1 &
       while flock -n run/lightwhale/maintenance.lock true; do sleep 0.1; done`,
    );
    assertEquals(busy, "");
    const { status, stderr } = await system.run(
      [...system.place(), "--maintain"],
    );
    assertEquals(status, 0, stderr);
    assertMatch(stderr, /another persistence.ts is at work; .*noon: x joins/);
  },
);

// Time-outs last minutes: they are tested thirty times as fast, with the
// script, in which their table is all that is changed.
for (const name of onFirstBoot) {
  onDisks(
    `first boot: ${name} never ends`,
    { disks: [magicDisk] },
    async (system) => {
      const boot = await bootImpatiently(system, name);
      await assertWritable(system, boot, name);
      if (boot.report.mode !== "persistent") {
        assertEquals(boot.status, 1, boot.stderr);
      }
      await assertRecovers(system);
    },
  );
}

/**
 * A frozen filesystem holds up each write for ever, in the kernel, as a disk
 * does that went mute; and it can be thawed.
 */
for (const [when, cases] of Object.entries(muteAfter())) {
  onDisks(
    `the disk goes mute ${when}: fallback, and nothing covers it later`,
    { disks: [magicDisk] },
    async (system) => {
      await persist(system);
      const mount = realBut("mount", cases(system.root));
      const boot = await impatiently(
        { mount },
        (options) => system.boot([], options),
      );
      await assertWritable(system, boot, "");
      assertEquals([boot.status, boot.report.mode], [1, "fallback"]);
      assertMatch(boot.stderr, /no answer in 2 s/, boot.stderr);
      assertEquals(boot.stderr.match(/no answer in/g)?.length, 1, boot.stderr);
      await system.sh(`for name in etc var home; do echo now > $name/now; done
        test -f mnt/lightwhale-data/lightwhale-state/docker
        fsfreeze --unfreeze run/kept; sleep 3`);
      await system.settle();
      assertEquals(
        await system.sh(`cat etc/now var/now home/now
          stat -f -c %T mnt/lightwhale-data
          test -f mnt/lightwhale-data/lightwhale-state/docker
          echo x > etc/x; umount run/kept`),
        "now\nnow\nnow\ntmpfs\n",
      );
      await assertRecovers(system, "precious");
    },
  );
}

/** After which mount(8), as cases of a shell. */
function muteAfter(): Record<string, (root: string) => string> {
  const freeze = (root: string) =>
    `mkdir -p ${root}/run/kept
     mount --bind ${root}/mnt/lightwhale-data ${root}/run/kept
     fsfreeze --freeze ${root}/run/kept`;
  return {
    "right after its mount": (root) =>
      `"-t btrfs "*" ${root}/mnt/lightwhale-data") mount "$@" || exit
       ${freeze(root)}; exit`,
  };
}

onDisks(
  "a disk that cannot be written is left alone",
  { disks: [magicDisk] },
  async (system) => {
    await command(["blockdev", "--setro", system.disks[0].path]);
    const boot = await system.boot();
    await assertWritable(system, boot, "");
    assertEquals(boot.status, 1, boot.stderr);
    assertMatch(boot.stderr, /Cannot format \/dev\/loop\d+: it is read-only/);
    await assertRecovers(system);
  },
);

onDisks(
  "a data disk that cannot be written: volatile, and said",
  { disks: [magicDisk] },
  async (system) => {
    await persist(system);
    await command(["blockdev", "--setro", system.disks[0].path]);
    const boot = await system.boot();
    await assertWritable(system, boot, "");
    assertEquals([boot.status, boot.report.mode], [1, "fallback"], boot.stderr);
    assertMatch(boot.stderr, /\/dev\/loop\d+.*read-only/);
    await assertRecovers(system, "precious");
  },
);

onDisks(
  "a data filesystem without room for data still boots persistent",
  { disks: [{ ...magicDisk, sizeBytes: 300 * MiB }] },
  async (system) => {
    await persist(system);
    await system.boot();
    assertMatch(await statusOf(system), /^Healthy$/m);
    await fillWithData(system);
    await system.reboot();
    const boot = await system.boot();
    assertEquals(boot.report.mode, "persistent", boot.stderr);
    assertEquals(await system.sh("cat etc/precious"), "precious\n");
    const status = await statusOf(system);
    assertMatch(status, /^Attention: "\/mnt.*" is nearly full/m);
    assert(!/metadata .*nearly full/.test(status), status);
    // Room again by removing something, as a person would.
    await system.sh("rm mnt/lightwhale-data/zeros; sync; echo x > etc/x");
    await assertRecovers(system, "precious");
  },
);

onDisks(
  "a data filesystem without room for a directory: writable, and how to go on",
  { disks: [{ ...magicDisk, sizeBytes: 300 * MiB }] },
  async (system) => {
    await persist(system);
    await system.boot();
    await fillWithData(system);
    await system.sh(
      `cd mnt/lightwhale-data
       # Empty files take metadata only; long names take more of them.
       name=$(printf %0200d 0)
       seq -f "%g-$name" 60000 | # 255: xargs stops
         xargs -n 50 sh -c 'touch "$@" 2>/dev/null || exit 255' sh || true`,
    );
    const status = await statusOf(system);
    assertMatch(status, /^Attention: The metadata .* nearly full/m);
    await system.reboot();
    const boot = await system.boot();
    await assertWritable(system, boot, "");
    assertEquals([boot.status, boot.report.mode], [1, "fallback"]);
    const [, source] = /on (\S+) is full, .* delete files/.exec(boot.stderr) ??
      [];
    assert(source, boot.stderr);
    await system.sh(
      `mount ${source} tmp; rm tmp/@lightwhale-data/zeros
       find tmp/@lightwhale-data -name "*-0*" -delete; umount tmp`,
    );
    await assertRecovers(system, "precious");
  },
);

const kernelLogs: Record<string, string> = {
  "refuses": "/proc/version",
  "is full": "/dev/full",
};
for (const [how, instead] of Object.entries(kernelLogs)) {
  onDisks(
    `the kernel log ${how}: the boot goes on`,
    { disks: [magicDisk] },
    async (system) => {
      await system.sh(`mount --bind ${instead} /dev/kmsg`);
      const boot = await system.boot();
      assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
      assertMatch(boot.stderr, /^persistence: /);
      const [warning, ...others] = boot.report.warnings;
      assertMatch(warning, /^The kernel log does not take .*devkmsg=off/);
      assertEquals(others, []);
    },
  );
}

onDisks(
  "all that a boot says is in the kernel log, long messages in pieces",
  {
    disks: [magicDisk, {
      sizeBytes: 64 * MiB,
      contents: `yes ,1M | head -n 40 | sfdisk -q --label gpt "$DISK"
        for number in $(seq 40); do
          printf lightwhale-please-format-me |
            dd of="$DISK" bs=1M seek="$number" conv=notrunc status=none
        done`,
    }],
    needs: ["dmesg"],
  },
  async (system) => {
    const token = crypto.randomUUID();
    const said = Array.from({ length: 70 }, (_, i) => `${token}-${i}`).join();
    const mkswap = `#!/bin/sh\necho '${said}' >&2\nexit 1\n`;
    const { report, stderr } = await bootWith(system, { mkswap });
    assertEquals(report.warnings.length, 40, stderr);
    const log = await system.sh("dmesg");
    for (const warning of report.warnings) {
      assert(log.includes(`persistence: ${warning}\n`), warning);
    }
    const [error] = report.errors;
    assert(error.length > 2500, error);
    // The kernel's log is all the machine's: others may have written between.
    const pieces = log.split("\n").filter((line) => line.includes(token))
      .map((line) => line.slice(line.indexOf("persistence: ") + 13));
    assertEquals(pieces.join("\n").replaceAll("...\n...", ""), error);
  },
);

onDisks(
  "--enable: wipefs is killed, so that nobody knows what the disk holds",
  { disks: [{ ...magicDisk, contents: 'mkfs.ext4 -q -F "$DISK"' }] },
  async (system) => {
    const [disk] = system.disks;
    const before = await system.checksum(disk);
    const wipefs = failures["is killed"].script;
    const { status, stderr } = await withPrograms(
      { wipefs },
      (path) =>
        system.run([...system.place(), "--enable", disk.path], { path }),
    );
    assertEquals(status, 1, stderr);
    assertMatch(stderr, /"wipefs .* was killed by SIGSEGV/);
    assertEquals(await system.checksum(disk), before);
  },
);

async function statusOf(system: System): Promise<string> {
  return (await system.run([...system.place(), "--status"])).stdout;
}

/** Until there is no room for data; metadata have their own. */
async function fillWithData(system: System): Promise<void> {
  await system.sh(
    "cat /dev/zero > mnt/lightwhale-data/zeros 2>/dev/null || sync",
  );
}

/** A boot in which these programs are something else. */
async function bootWith(
  system: System,
  programs: Record<string, string>,
): Promise<Boot> {
  return await withPrograms(programs, (path) => system.boot([], { path }));
}

/**
 * The real program, but for some arguments: cases of a shell.
 *
 * @param first What is done before, whatever the arguments.
 */
function realBut(name: string, cases: string, first = ""): string {
  return `#!/bin/sh
PATH=\${PATH#*:}
${first}
case $* in ${cases} ;; esac
exec ${name} "$@"
`;
}

/** Gives a PATH in which these programs are something else. */
async function withPrograms<T>(
  programs: Record<string, string>,
  use: (path: string) => Promise<T>,
): Promise<T> {
  const folder = await Deno.makeTempDir({ prefix: "persistence-faults-" });
  try {
    for (const [name, script] of Object.entries(programs)) {
      await Deno.writeTextFile(`${folder}/${name}`, script, { mode: 0o755 });
    }
    return await use(`${folder}:${systemPath}`);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** Takes programs away for this system, wherever they are installed. */
async function hide(system: System, names: string[]): Promise<void> {
  await system.sh(
    `over=$(mktemp -d "$1/tmp/over-XXXXXX")
     mount -t tmpfs none "$over"
     mkdir "$over/upper" "$over/work"
     folders=/usr
     [ -L /bin ] || folders="/usr /bin /sbin"
     for folder in $folders; do
       mkdir "$over/upper$folder" "$over/work$folder"
       mount -t overlay none "$folder" -o "lowerdir=$folder,\
upperdir=$over/upper$folder,workdir=$over/work$folder"
     done
     for name in ${names.join(" ")}; do
       rm -f /usr/sbin/$name /usr/bin/$name /sbin/$name /bin/$name
     done`,
  );
}

/** A boot with a program that never ends, and impatience. */
async function bootImpatiently(system: System, hangs: string): Promise<Boot> {
  const sleep = "#!/bin/sh\nexec /bin/sleep 600\n";
  return await impatiently(
    { [hangs]: sleep },
    (options) => system.boot([], options),
  );
}

/** Uses the script with its time-outs divided by thirty, and these programs. */
async function impatiently<T>(
  programs: Record<string, string>,
  use: (options: RunOptions) => Promise<T>,
): Promise<T> {
  const script = `${projectFolder}dist/impatient.ts`;
  const source = await Deno.readTextFile(`${projectFolder}persistence.ts`);
  const [before, table, after] = source.split(
    /(const TIMEOUT = \{.*?\n\};)/s,
  );
  let times = 0;
  const shorter = table.replace(/(Ms: )([\d_]+)/g, (_, name, ms) => {
    times++;
    return `${name}${Number(ms.replaceAll("_", "")) / 30}`;
  });
  assert(times >= 5, `Only ${times} time-outs were found`);
  await Deno.writeTextFile(script, before + shorter + after);
  const started = Date.now();
  try {
    return await withPrograms(
      programs,
      (path) => use({ path, tool: impatient(script) }),
    );
  } finally {
    await Deno.remove(script);
    const seconds = (Date.now() - started) / 1000;
    assert(seconds < 90, `It took ${seconds} s`);
  }
}

const impatient = (script: string) => [
  ...[Deno.execPath(), "run", "-A", "--no-check"],
  ...["--config", `${projectFolder}deno.npm.json`, script],
];

/** /etc, /var, /home and the data mount take a file; the report is there. */
async function assertWritable(
  system: System,
  boot: Boot,
  fault: string,
): Promise<void> {
  if (indispensable.includes(fault) && boot.status === 1) return;
  await system.sh(
    `for name in etc var home mnt/lightwhale-data; do echo x > $name/x; done`,
  ).catch((error) => {
    throw new Error(`It is not writable: ${error.message}\n${boot.stderr}`);
  });
  assert(boot.report.mode, `There is no report: ${boot.stderr}`);
}

/** The next boot, without the fault, is a good one. */
async function assertRecovers(system: System, text?: string): Promise<void> {
  await system.settle();
  for (const { path } of system.disks) {
    await command(["blockdev", "--setrw", path]);
  }
  await system.reboot();
  const boot = await system.boot();
  assertEquals([boot.status, boot.report.mode], [0, "persistent"], boot.stderr);
  assert(boot.report.degraded === false, boot.stderr);
  if (text) assertEquals(await system.sh("cat etc/precious"), `${text}\n`);
}

/** A data filesystem with a file, then a reboot. */
async function persist(system: System): Promise<void> {
  const boot = await system.boot();
  assertEquals(boot.status, 0, boot.stderr);
  await system.sh("echo precious > etc/precious");
  await system.reboot();
}
