/**
 * Payloads on real disks: what a first boot writes, what it refuses and then
 * leaves as it is, and that nothing of one is left afterwards.
 */
import { badPlaces, badTexts } from "./payloads.ts";
import { assert, assertEquals, assertMatch } from "@std/assert";
import {
  command,
  type Disk,
  type DiskSpec,
  header,
  MiB,
  onDisks,
  type System,
} from "./system.ts";

const disk: DiskSpec = { sizeBytes: 600 * MiB };

/** A text that must be found only in the data filesystem. */
const secret = "SECRET4711";
const hash = `$6$${secret}$${"a".repeat(86)}`;
const files = `-- home/op/.ssh/authorized_keys --
ssh-ed25519 AAAA${secret} me@laptop
-- password op --
${hash}
-- etc/hostname --
swarm01-${secret}
-- etc/new/script --
#!/bin/sh
echo ${secret}
-- etc/sudoers.d/op --
op ALL=(ALL) NOPASSWD: ALL
-- var/lib/x/y --
-- end --
`;
const writes = [
  ...["home/op/.ssh/authorized_keys", "password op", "etc/hostname"],
  ...["etc/new/script", "etc/sudoers.d/op", "var/lib/x/y"],
];
const onDisk = (files: string) =>
  `lightwhale-please-format-me\nlightwhale-payload 1\n${files}`;

/** What the image has that a payload meets. */
const root = `
  mkdir -p home/op etc/sudoers.d etc/real
  chown 1000:1001 home/op
  chmod 700 home/op
  chmod 750 etc/sudoers.d
  ln -s real etc/link
  ln -s nowhere home/broken
  ln -s ../run var/run
  mkfifo etc/pipe
  printf 'root:x:1::::::\\nop:old:2:0:9::::\\nother:!:3::::::\\n' >etc/shadow
  chown 0:42 etc/shadow
  chmod 640 etc/shadow`;

/** A script that writes this text to `$DISK`, byte by byte. */
function writing(text: string, node = "$DISK"): string {
  const bytes = new TextEncoder().encode(text);
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  // An argument has no more than 128 KiB.
  const parts = btoa(binary).match(/.{1,65536}/g) ?? [];
  const lines = parts.map((part) => part.replaceAll(/.{76}/g, "$&\n"));
  return `base64 -d <<'EOF' | dd of="${node}" conv=notrunc status=none
${lines.join("\n")}
EOF`;
}

/** The same with so many lines more, in the last file, which are not sent. */
const writingMore = (text: string, lines: number) =>
  `{ printf %s '${text.replace("-- end --\n", "")}'
     yes '# ${secret}' | head -n ${lines}
     echo '-- end --'
   } | dd of="$DISK" conv=notrunc iflag=fullblock status=none`;

/** Is all of it there, as the rules say? */
async function assertApplied(system: System, from = writes): Promise<void> {
  assertEquals(
    await system.sh(
      `cat home/op/.ssh/authorized_keys etc/shadow etc/hostname
       stat -c '%n %a %u:%g' home/op home/op/.ssh home/op/.ssh/authorized_keys \
         etc/shadow etc/hostname etc/new etc/new/script etc/sudoers.d \
         etc/sudoers.d/op var/lib/x/y
       ls -A . etc home var | grep -F payload || true
       cat etc/new/script`,
    ),
    `ssh-ed25519 AAAA${secret} me@laptop
root:x:1::::::
op:${hash}:2:0:9::::
other:!:3::::::
swarm01-${secret}
home/op 700 1000:1001
home/op/.ssh 700 1000:1001
home/op/.ssh/authorized_keys 600 1000:1001
etc/shadow 640 0:42
etc/hostname 644 0:0
etc/new 755 0:0
etc/new/script 755 0:0
etc/sudoers.d 750 0:0
etc/sudoers.d/op 440 0:0
var/lib/x/y 644 0:0
#!/bin/sh
echo ${secret}
`,
  );
  const status = JSON.parse(
    (await system.run(["--status", "--json", "--root", system.root])).stdout,
  );
  assertEquals(status.payload.writes, from);
  assertMatch(status.payload.applied, /^20\d\d-/);
  const shown = await system.run(["--status", "--root", system.root]);
  assertMatch(shown.stdout, /payload: applied 20.*password op/);
  assert(!JSON.stringify([status, shown]).includes(secret));
}

/** Nothing of a payload is on a disk, but in the data filesystem. */
async function assertErased({ path }: Disk): Promise<void> {
  assertEquals(
    await command([
      "sh",
      "-euc",
      `head -c 1M "$1" | strings | grep -v EFI || :`,
      "sh",
      path,
    ]),
    await command([
      ...["sh", "-euc"],
      `head -c 24K "$1" | strings | grep -v EFI || :`,
      ...["sh", path],
    ]),
  );
  const start = await command([
    "sh",
    "-euc",
    `head -c 1M "$1" | strings`,
    "sh",
    path,
  ]);
  assert(!/lightwhale-p|-- |SECRET/.test(start), start);
}

function assertNoSecret(...boots: { stderr: string; stdout: string }[]): void {
  assert(!JSON.stringify(boots).includes(secret), "A secret was said");
}

for (const sectorBytes of [512, 4096] as const) {
  for (const lines of [0, 30_000]) {
    onDisks(
      `a payload with ${lines} more lines, on sectors of ${sectorBytes}: ` +
        "applied once, and nothing of it left",
      {
        disks: [{
          ...disk,
          sectorBytes,
          contents: writingMore(onDisk(files), lines),
        }],
        root,
      },
      async (system) => {
        const dry = await system.run(["--dry-run", ...system.place()]);
        assertMatch(
          dry.stdout,
          /payload of \/dev\/loop\d+: home\/op.*password op/,
        );
        const json = ["--dry-run", "--json", ...system.place()];
        const boot = await system.boot();
        assertEquals(boot.report.mode, "persistent", boot.stderr);
        assertEquals(boot.status, 0, boot.stderr);
        assertNoSecret(dry, await system.run(json), boot);
        assert(!JSON.stringify(boot.report).includes(secret));
        await assertApplied(system);
        await assertErased(system.disks[0]);
        await system.sh("echo mine > etc/hostname; rm etc/new/script");
        await system.reboot();
        const again = await system.boot();
        assertEquals(again.report.mode, "persistent", again.stderr);
        assertEquals(again.report.warnings, []);
        assertEquals(await system.sh("cat etc/hostname; ls etc/new"), "mine\n");
        await assertErased(system.disks[0]);
      },
    );
  }
}

onDisks(
  "payloads that are refused: line and reason, and the disk stays",
  { disks: [{ sizeBytes: 120 * MiB }], root },
  async (system) => {
    const [disk] = system.disks;
    for (
      const [what, [text, says]] of Object.entries({
        ...badTexts,
        ...badPlaces,
      })
    ) {
      await system.reboot({
        whileOff: async () => {
          await Deno.writeTextFile(disk.image, text);
          await Deno.truncate(disk.image, 120 * MiB);
        },
      });
      const before = await system.checksum(disk);
      const dry = await system.run(["--dry-run", ...system.place()]);
      const { report, status, stderr } = await system.boot();
      const context = `${what}: ${stderr}`;
      assertMatch(
        stderr,
        new RegExp(`payload of ${disk.path} .*${says}`),
        context,
      );
      assertMatch(dry.stdout, new RegExp(`error: .*${says}`), context);
      assertEquals(report.mode, "fallback", context);
      assertEquals(status, 1, context);
      assertEquals(await system.checksum(disk), before, context);
    }
  },
);

onDisks(
  "two magic disks with the same payload: applied once, on both erased",
  {
    disks: [
      { ...disk, contents: writing(onDisk(files)) },
      { ...disk, contents: writing(onDisk(files)) },
    ],
    root,
  },
  async (system) => {
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "persistent", stderr);
    await assertApplied(system);
    for (const disk of system.disks) await assertErased(disk);
  },
);

onDisks(
  "two magic disks, one with a payload: it counts for both",
  {
    disks: [
      { ...disk, contents: header },
      { ...disk, contents: writing(onDisk(files)) },
    ],
    root,
  },
  async (system) => {
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "persistent", stderr);
    await assertApplied(system);
    for (const disk of system.disks) await assertErased(disk);
  },
);

onDisks(
  "two magic disks with two payloads: nothing is formatted",
  {
    disks: [
      { ...disk, contents: writing(onDisk(files)) },
      { ...disk, contents: writing(onDisk(files.replace("AAAA", "AAAB"))) },
    ],
    root,
  },
  async (system) => {
    const before = await checksums(system);
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "fallback", stderr);
    assertMatch(stderr, /the payloads of .*loop.*loop.* are not the same/);
    const paths = system.disks.map(({ path }) => path).join(" ");
    assertMatch(stderr, new RegExp(`--enable ${paths} --with FILE`));
    assertEquals(await checksums(system), before);
  },
);

onDisks(
  "a payload on a disk that is left out stops the others",
  {
    disks: [
      { ...disk, contents: header },
      { sizeBytes: 50 * MiB, contents: writing(onDisk(files)) },
    ],
    root,
  },
  async (system) => {
    const before = await checksums(system);
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "fallback", stderr);
    assertMatch(stderr, /which has a payload for it, cannot be used/);
    assertEquals(await checksums(system), before);
  },
);

for (const [what, text] of [["", files], [", one that is bad", "-- x --\n"]]) {
  onDisks(
    `a disk with a payload joins${what}: not applied, and erased`,
    { disks: [{ ...disk, contents: header }, disk], root },
    async (system) => {
      const first = await system.boot();
      assertEquals(first.report.mode, "persistent", first.stderr);
      const [, second] = system.disks;
      await command(["sh", "-euc", writing(onDisk(text), second.path)]);
      await system.reboot();
      const { report, stderr, status } = await system.boot();
      assertEquals([report.mode, status], ["persistent", 0], stderr);
      assertMatch(stderr, /its payload is erased, and not applied/);
      await system.settle();
      assertEquals(await system.sh("cat etc/hostname"), "lightwhale\n");
      const { stdout } = await system.run(["--status", "--root", system.root]);
      assertMatch(stdout, /device 2: .*data raid1/s);
      assert(!stdout.includes("payload: applied"), stdout);
      await assertErased(second);
      assertNoSecret(first, { stderr, stdout });
    },
  );
}

/** A disk of a rented server: others' partition, the data, the payload. */
const shared = `
  printf '%s\\n' 'size=1MiB, name=other' \
    'size=200MiB, name=lightwhale-please-format-me' \
    'size=1MiB, name=lightwhale-payload' |
    sfdisk -q --no-tell-kernel --label gpt "$DISK"
  yes mine | head -c 1M |
    dd of="$DISK" bs=1M seek=1 iflag=fullblock conv=notrunc status=none
`;
const writingAt = (mebibytes: number, text: string) =>
  writing(text).replace("conv=", `bs=1M seek=${mebibytes} conv=`);

for (
  const [what, start] of Object.entries({
    "with the header": "lightwhale-please-format-me\nlightwhale-payload 1\n",
    "with its title only": "lightwhale-payload 1\n",
    "with neither": "",
  })
) {
  onDisks(
    `a magic partition takes its payload from another, ${what}`,
    {
      disks: [{ ...disk, contents: shared + writingAt(202, start + files) }],
      root,
    },
    async (system) => {
      const [{ path }] = system.disks;
      const { report, stderr, status } = await system.boot();
      assertEquals([report.mode, status], ["persistent", 0], stderr);
      assertEquals(report.warnings, []);
      await assertApplied(system);
      assertEquals(
        await command([
          ...["sh", "-euc"],
          `dd if="$1" bs=1M skip=202 count=1 status=none | tr -d '\\0'
           dd if="$1" bs=1M skip=1 count=1 status=none | tr -d 'mine\\n'`,
          ...["sh", path],
        ]),
        "",
      );
    },
  );
}

onDisks(
  "a magic partition that begins with a payload itself is not formatted",
  {
    disks: [{
      ...disk,
      contents: shared.replace("lightwhale-payload", "x") +
        writingAt(2, onDisk(files)),
    }],
    root,
  },
  async (system) => {
    const before = await checksums(system);
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "fallback", stderr);
    assertMatch(stderr, /"lightwhale-payload", and there are 0 on its disk/);
    assertEquals(await checksums(system), before);
  },
);

for (const more of [0, 30_000]) {
  onDisks(
    `a payload with ${more} more lines over a data disk: the data win, and ` +
      "nothing of it is left",
    { disks: [{ ...disk, contents: header }], root },
    async (system) => {
      await system.boot();
      await system.sh("echo precious > etc/precious");
      const [disk] = system.disks;
      await system.reboot({
        whileOff: () =>
          command(["sh", "-euc", writingMore(onDisk(files), more)], {
            DISK: disk.image,
          }),
      });
      const { report, stderr } = await system.boot();
      assertEquals(report.mode, "persistent", stderr);
      assertMatch(stderr, /the data wins/);
      assertEquals(
        await system.sh("cat etc/precious etc/hostname"),
        "precious\nlightwhale\n",
      );
      await assertErased(disk);
      await system.reboot();
      const again = await system.boot();
      assertEquals(again.report.mode, "persistent", again.stderr);
      assertEquals(again.report.warnings, []);
    },
  );
}

// --enable, --disable

onDisks(
  "--enable --with writes a payload, anew, and --disable leaves nothing of it",
  { disks: [disk], root },
  async (system) => {
    const [disk] = system.disks;
    const { path } = disk;
    const blank = await system.checksum(disk);
    const enable = (...args: string[]) =>
      system.run(["--enable", path, ...system.place(), ...args]);
    const file = `${system.root}/tmp/payload`;
    await system.sh(`cat >tmp/payload <<'X'\n${files}X`);
    await system.sh(
      `sed '/^-- end/d' tmp/payload >tmp/other
       yes '# other' | head -n 9000 >>tmp/other; echo '-- end --' >>tmp/other
       echo x >tmp/bad`,
    );
    for (
      const [bad, says] of [
        ["tmp/bad", /Cannot use the payload ".*bad": line 1: /],
        [
          "tmp/nothing",
          /Cannot use the payload ".*nothing": there is no such file/,
        ],
        ["tmp", /Cannot use the payload ".*tmp": it is no regular file/],
      ] as const
    ) {
      const refused = await enable("--with", `${system.root}/${bad}`);
      assertEquals(refused.status, 2, refused.stderr);
      assertMatch(refused.stderr, says);
    }
    assertEquals(await system.checksum(disk), blank);

    const long = await enable("--with", `${system.root}/tmp/other`);
    assertEquals(long.status, 0, long.stderr);
    assertEquals(await countOf(disk, "# other"), 9000);
    const done = await enable("--with", file);
    assertEquals(done.status, 0, done.stderr);
    for (const name of writes) assert(done.stdout.includes(`\n  ${name}\n`));
    assertMatch(done.stdout, /write the payload of .*password op/);
    assertEquals(await countOf(disk, "# other"), 0);
    assertEquals(await countOf(disk, secret), 4);
    const twice = await enable("--with", file);
    assertMatch(twice.stdout, /is enabled already/);
    assertEquals(await countOf(disk, secret), 4);
    const forced = await enable("--force", "--with", file);
    assertEquals(forced.status, 0, forced.stderr);
    assertEquals(await countOf(disk, "lightwhale-anyway"), 1);
    assertNoSecret(long, done, twice, forced);

    const disabled = await system.run(["--disable", path]);
    assertEquals(disabled.status, 0, disabled.stderr);
    assertEquals(await system.checksum(disk), blank);
    await enable("--with", file);
    const plain = await enable();
    assertEquals(plain.status, 0, plain.stderr);
    assertMatch(plain.stdout, /the payload that it had is erased/);
    assertEquals(await countOf(disk, secret), 0);
    assertEquals(await countOf(disk, "lightwhale-p"), 1);

    await enable("--with", file);
    await system.reboot();
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "persistent", stderr);
    await assertApplied(system);
    await assertErased(disk);
  },
);

onDisks(
  "--enable --with of a partition writes to the one that is for it",
  {
    disks: [{
      ...disk,
      contents: `printf '%s\\n' 'size=200MiB, name=a' 'size=1MiB, name=b' |
        sfdisk -q --no-tell-kernel --label gpt "$DISK"`,
    }],
    root,
  },
  async (system) => {
    const [disk] = system.disks;
    await command(["partx", "--update", disk.path]);
    await system.sh(`cat >tmp/payload <<'X'\n${files}X`);
    const partition = `${disk.path}p1`;
    const enable = () =>
      system.run([
        ...["--enable", partition, ...system.place()],
        ...["--with", `${system.root}/tmp/payload`],
      ]);
    const refused = await enable();
    assertEquals(refused.status, 2, refused.stderr);
    assertMatch(refused.stderr, /"lightwhale-payload", and there are 0/);
    await command([
      ...["sfdisk", "-q", "--no-reread", "--no-tell-kernel", "--part-label"],
      ...[disk.path, "2", "lightwhale-payload"],
    ]);
    const done = await enable();
    assertEquals(done.status, 0, done.stderr + done.stdout);
    assertEquals(await countOf(disk, secret), 4);
    assertEquals((await system.run(["--disable", partition])).status, 0);
    assertEquals(await countOf(disk, secret), 0);
    await enable();
    const plain = await system.run(["--enable", partition, ...system.place()]);
    assertEquals(plain.status, 0, plain.stderr);
    assertEquals(await countOf(disk, secret), 0);
    assertEquals((await enable()).status, 0);
    await system.reboot();
    const { report, stderr } = await system.boot();
    assertEquals(report.mode, "persistent", stderr);
    await assertApplied(system);
    const left = `dd if="$1" bs=1M skip=201 status=none | grep -a -c "$2" || :`;
    assertEquals(
      await command(["sh", "-euc", left, "sh", disk.path, secret]),
      "0\n",
    );
  },
);

onDisks(
  "--enable --with of an image file",
  { disks: [disk], root },
  async (system) => {
    await system.sh(
      `truncate -s 1M tmp/image; cat >tmp/payload <<'X'\n${files}X`,
    );
    const image = `${system.root}/tmp/image`;
    const payload = `${system.root}/tmp/payload`;
    const done = await system.run(["--enable", image, "--with", payload]);
    assertEquals(done.status, 0, done.stderr);
    assertEquals(await system.sh("tr -d '\\0' <tmp/image"), onDisk(files));
    const off = await system.run(["--disable", image]);
    assertEquals(off.status, 0, off.stderr);
    assertEquals(await system.sh("tr -d '\\0' <tmp/image"), "");
  },
);

onDisks(
  "--enable --with refuses what does not fit this system",
  { disks: [disk], root },
  async (system) => {
    const [disk] = system.disks;
    const before = await system.checksum(disk);
    for (const [what, [text, says]] of Object.entries(badPlaces)) {
      await system.sh(`cat >tmp/payload <<'X'\n${text}X`);
      const refused = await system.run([
        ...["--enable", disk.path, ...system.place()],
        ...["--with", `${system.root}/tmp/payload`],
      ]);
      assertEquals(refused.status, 2, what);
      assertMatch(refused.stderr, new RegExp(says), what);
    }
    assertEquals(await system.checksum(disk), before);
  },
);

async function checksums(system: System): Promise<string[]> {
  const sums: string[] = [];
  for (const disk of system.disks) sums.push(await system.checksum(disk));
  return sums;
}

/** How many lines of a disk have this. */
async function countOf({ path }: Disk, what: string): Promise<number> {
  await command(["blockdev", "--flushbufs", path]);
  const count = `head -c 300M "$1" | grep -a -c -e "$2" || :`;
  return Number(await command(["sh", "-euc", count, "sh", path, what]));
}
