/**
 * Names that others chose: labels, partition names, paths and daemon.json may
 * hold anything, and none of it ever runs. Each carries commands that would
 * leave a file behind.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import {
  command,
  header,
  isMarked,
  magic,
  MiB,
  onDisks,
  type System,
} from "./system.ts";

const size = 300 * MiB;
/** What would run leaves this file; no name may be longer than a GPT's 36. */
const canary = "/tmp/ran";
const hostileNames: Record<string, string> = {
  "a command substitution": `$(touch ${canary})`,
  "backquotes": `\`touch ${canary}\``,
  "a command after a semicolon": `; touch ${canary};`,
  "a quote and a command": `'; touch ${canary}; '`,
  "a double quote and a command": `"; touch ${canary}; "`,
  "a newline and a command": `x\ntouch ${canary}\n`,
  "a pipe": `|touch ${canary}|`,
  "spaces": "  two  words  ",
  "a leading dash": "--version",
  "an escape sequence": "\x1b[2J\x07",
  "what the kernel escapes": "\\044\\050touch\\040/tmp/ran\\051",
  "the magic name and more": `${magic}\n`,
};

/** Nothing ran, and nobody else's disk changed. */
async function assertHarmless(system: System, sums: string[]): Promise<void> {
  const ran = await Deno.stat(canary).then(() => true, () => false);
  if (ran) await Deno.remove(canary);
  assert(!ran, "It ran");
  const others = system.disks.slice(1);
  assertEquals(await Promise.all(others.map(system.checksum)), sums);
}

for (const [kind, name] of Object.entries(hostileNames)) {
  const quoted = quote(name);
  onDisks(
    `${kind} as labels and partition names is just a name`,
    {
      disks: [
        { sizeBytes: size, contents: header },
        {
          sizeBytes: size,
          contents: `mkfs.btrfs -q -L ${quote(name.replaceAll("\n", " "))} ` +
            `"$DISK"`,
        },
        { sizeBytes: size, contents: `mkfs.ext4 -q -L ${quoted} "$DISK"` },
        { sizeBytes: size, contents: `mkswap -q -L ${quoted} "$DISK"` },
        {
          sizeBytes: size,
          contents: `printf '%s\\n' size=50MiB size=150MiB |
              sfdisk -q --no-tell-kernel --label gpt "$DISK"
            sfdisk -q --no-tell-kernel --part-label -- "$DISK" 1 ${quoted}`,
        },
      ],
    },
    async (system) => {
      const others = system.disks.slice(1);
      const sums = await Promise.all(others.map(system.checksum));
      const boot = await system.boot();
      assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
      for (const { path } of others) {
        // Refused, for it holds something: that is shown first.
        const { status } = await system.run([
          ...system.place(),
          "--enable",
          path,
        ]);
        assertEquals(status, 2, path);
      }
      const partition = `${others[3].path}p1`;
      await command(["partx", "--update", others[3].path]);
      const enabled = await system.run([
        ...system.place(),
        ...["--enable", `${others[3].path}p2`],
      ]);
      assertEquals(enabled.status, 0, enabled.stderr);
      const disabled = await system.run([
        ...system.place(),
        ...["--disable", `${others[3].path}p2`],
      ]);
      assertEquals(disabled.status, 0, disabled.stderr);
      assertEquals(await partitionName(partition), name.trimEnd(), "renamed");
      sums[3] = await system.checksum(others[3]);
      for (const args of [["--status"], ["--dry-run"]]) {
        const { status } = await system.run([...system.place(), ...args]);
        assertEquals(status, 0);
      }
      await assertHarmless(system, sums);
    },
  );
}

onDisks(
  "labels and partition names that are no text at all are left alone",
  {
    disks: [
      { sizeBytes: size, contents: header },
      {
        sizeBytes: size,
        contents: `mkfs.btrfs -q -L "$(printf '\\377\\376\\200')" "$DISK"`,
      },
      {
        sizeBytes: size,
        contents: `mkfs.btrfs -q -L "$(printf 'lightwhale-data\\377')" "$DISK"`,
      },
      {
        sizeBytes: size,
        contents: `mkswap -q -L "$(printf '\\377')" "$DISK"`,
      },
    ],
  },
  async (system) => {
    const others = system.disks.slice(1);
    const sums = await Promise.all(others.map(system.checksum));
    const boot = await system.boot();
    assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
    await assertHarmless(system, sums);
  },
);

const hostileConfig = JSON.stringify({
  "data-root": `$(touch ${canary})`,
  [`\`touch ${canary}\``]: `'; touch ${canary}; '`,
  "log-driver": `"; touch ${canary}`,
});

onDisks(
  "commands in daemon.json are kept as text",
  {
    disks: [{ sizeBytes: size, contents: header }],
    root: `mkdir etc/docker; printf %s ${quote(hostileConfig)} ` +
      `> etc/docker/daemon.json`,
  },
  async (system) => {
    const boot = await system.boot();
    assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
    const config = JSON.parse(await system.sh("cat etc/docker/daemon.json"));
    const expected = JSON.parse(hostileConfig);
    expected["data-root"] = "/mnt/lightwhale-data/lightwhale-state/docker";
    assertEquals(config, expected);
    await assertHarmless(system, []);
  },
);

const hostileRoots: Record<string, string> = {
  "spaces": "two  words",
  "quotes": `it's "quoted"`,
  "a command substitution": "$(touch ran)",
  "a semicolon": "x; touch ran; x",
  "a newline": "x\ntouch ran\n",
  "a backslash": "back\\slash\\040",
  "a leading dash": "--version",
  "a comma": "a,ro,b",
  "a colon": "a:b",
  "a hash": "#a#",
};

for (const [kind, name] of Object.entries(hostileRoots)) {
  onDisks(
    `--root with ${kind} in its path is used or refused, nothing else`,
    { disks: [{ sizeBytes: size, contents: header }] },
    async (system) => {
      await system.sh(
        `mkdir tmp/roots; cd tmp/roots; mkdir -- ${quote(name)}
         mount --bind "$1" "$PWD/"${quote(name)}
         mount --make-rprivate "$PWD/"${quote(name)}
         mount -t tmpfs run "$PWD/"${quote(name)}/run`,
      );
      const root = `${system.root}/tmp/roots/${name}`;
      const place = ["--root", root, ...system.place().slice(2)];
      const { status, stderr } = await system.run(place);
      if (status === 2) {
        assertMatch(stderr, /^persistence: Cannot use --root .*\n$/);
        assert(await isMarked(system.disks[0]), "The disk was changed");
      } else {
        assertEquals(status, 0, stderr);
        await system.sh(
          `cd tmp/roots/${quote(name)}; echo written > etc/x
           findmnt -n -o FSTYPE --mountpoint "$PWD/mnt/lightwhale-data" |
             grep -qx btrfs`,
        );
      }
      await system.sh("[ ! -e tmp/ran ]; [ ! -e tmp/roots/ran ]");
      await assertHarmless(system, []);
    },
  );
}

/** A text as one word of the shell. */
function quote(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** From the table itself, as sfdisk reads it. */
async function partitionName(path: string): Promise<string> {
  const [, disk, number] = /^(.*)p(\d+)$/.exec(path)!;
  const table = await command(["sfdisk", "--json", disk]);
  const { partitiontable } = JSON.parse(table);
  return partitiontable.partitions[Number(number) - 1].name.trimEnd();
}
