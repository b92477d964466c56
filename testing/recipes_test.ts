/** The README's recipes, run as they stand, with loop devices for the disks. */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { header, MiB, onDisks, projectFolder, type System } from "./system.ts";

const readme = Deno.readTextFileSync(`${projectFolder}README.md`);

/** The blocks for a shell below a heading of the README. */
function blocksBelow(heading: string): string[] {
  const [, section] = readme.split(`\n### ${heading}\n`);
  assert(section, `The README has no section "${heading}"`);
  const [text] = section.split(/\n##/);
  return [...text.matchAll(/^```sh\n(.*?)^```$/gms)].map(([, block]) => block);
}

/** Runs a block; `ssh backup` is this machine. */
function recipe(
  { root, sh }: System,
  block: string,
  disks: Record<string, string> = {},
): Promise<string> {
  let script = block
    .replaceAll(/(?<=^|[ '>])\/(?=(mnt|home|etc|run|srv)\b)/gm, `${root}/`);
  for (const [name, path] of Object.entries(disks)) {
    script = script.replaceAll(name, path);
  }
  return sh(`set -eu; ssh() { shift; sh -euc "$*"; }\n${script}`);
}

const dataDisk = { sizeBytes: 600 * MiB, contents: header };

onDisks(
  "recipe: reading the data on another machine",
  { disks: [dataDisk] },
  async (system) => {
    await system.boot();
    await system.sh("echo mine >etc/mine");
    await system.reboot();
    const [block] = blocksBelow("Reading the data on another machine");
    const [{ path }] = system.disks;
    await system.sh(`partx --update ${path}`);
    const output = await recipe(system, block, { "/dev/sdb2": `${path}p1` });
    assertMatch(output, /^mine$/m);
  },
);

onDisks(
  "recipe: a backup over ssh, and the next one",
  { disks: [dataDisk, { sizeBytes: 600 * MiB }], root: "mkdir -p srv/backup" },
  async (system) => {
    await system.boot();
    const backup = system.disks[1].path;
    await system.sh(`mkfs.btrfs -q -f ${backup}; mount ${backup} srv/backup
      echo one >etc/mine`);
    const [first, next] = blocksBelow("A backup over ssh");
    await recipe(system, first);
    await system.sh("echo two >etc/mine");
    await recipe(system, next);
    const mine = "srv/backup/state-?/overlay/upper/etc/mine";
    assertEquals(await system.sh(`cat ${mine}`), "one\ntwo\n");
    const [volumes] = blocksBelow("A backup of Docker's volumes");
    await system.sh(
      "cd mnt/lightwhale-data/lightwhale-state/docker; mkdir -p volumes/v; echo kept >volumes/v/file",
    );
    await recipe(system, volumes);
    assertEquals(
      await system.sh("tar -xzOf srv/backup/volumes.tgz ./v/file"),
      "kept\n",
    );
  },
);

onDisks(
  "recipe: a second disk that is not to be mirrored; coming from ext4",
  { disks: [dataDisk, { sizeBytes: 64 * MiB }] },
  async (system) => {
    await system.boot();
    const { path } = system.disks[1];
    const [archive] = blocksBelow("A second disk that is not to be mirrored");
    // mount(8) reads this machine's table, not the one below the root.
    await recipe(system, archive.replace(/.*start$/m, ""), {
      "/dev/sdc": path,
    });
    assertMatch(await system.sh("cat etc/fstab"), /^LABEL=archive .*nofail/m);
    await system.sh(`mount ${path} home/archive
      mkdir home/archive/home; echo old >home/archive/home/file; umount home/archive`);
    const [copy] = blocksBelow(
      "Coming from ext4, or from a disk made by the older tool",
    );
    await recipe(system, copy, { "/dev/sdd1": path });
    assertEquals(await system.sh("cat home/file"), "old\n");
  },
);
