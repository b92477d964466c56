/**
 * Two at once: their commands never interleave, and a lock dies with whoever
 * held it, however that ended.
 */
import { assert, assertEquals } from "@std/assert";
import { systemPath } from "./programs.ts";
import {
  type Boot,
  command,
  GiB,
  header,
  onDisks,
  type Result,
  type System,
} from "./system.ts";

const magicDisk = { sizeBytes: 3 * GiB, contents: header };
const emptyDisk = { sizeBytes: 3 * GiB };
/** The programs that change something; those that look may run at any time. */
const changers = [
  ...["wipefs", "sfdisk", "partx", "mkfs.btrfs", "mkswap", "btrfs", "mount"],
  ...["umount", "dd", "swapon"],
];

onDisks(
  "two boots at once: one works, the other finds it done",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const log = await makeLog(["one", "two"]);
    try {
      const boots = await Promise.all(
        ["one", "two"].map((name) =>
          system.boot([], { path: `${log}/${name}:${systemPath}` })
        ),
      );
      for (const { status, stderr } of boots) assertEquals(status, 0, stderr);
      await assertTurns(log);
      await assertComplete(system);
    } finally {
      await Deno.remove(log, { recursive: true });
    }
  },
);

onDisks(
  "five boots at once: one works, the others find it done",
  { disks: [magicDisk] },
  async (system) => {
    const names = ["one", "two", "three", "four", "five"];
    const log = await makeLog(names);
    try {
      const boots = await Promise.all(
        names.map((name) =>
          system.boot([], { path: `${log}/${name}:${systemPath}` })
        ),
      );
      for (const { status, stderr } of boots) assertEquals(status, 0, stderr);
      await assertTurns(log);
      await assertComplete(system);
    } finally {
      await Deno.remove(log, { recursive: true });
    }
  },
);

for (const mode of ["--enable", "--disable"]) {
  onDisks(
    `a boot and ${mode} at once take turns`,
    { disks: [magicDisk, mode === "--enable" ? emptyDisk : magicDisk] },
    async (system) => {
      const log = await makeLog(["boot", "mark"]);
      try {
        const [boot, marked] = await Promise.all([
          system.boot([], { path: `${log}/boot:${systemPath}` }),
          system.run(
            [...system.place(), mode, system.disks[1].path],
            { path: `${log}/mark:${systemPath}` },
          ),
        ]) as [Boot, Result];
        assertEquals(boot.status, 0, boot.stderr);
        // Refused, when the boot came first and the disk is in use.
        assert([0, 2].includes(marked.status), marked.stderr);
        await assertTurns(log);
        await system.reboot();
        await assertComplete(system);
      } finally {
        await Deno.remove(log, { recursive: true });
      }
    },
  );
}

/**
 * Makes a folder with a folder of programs for each name; what they start and
 * end is written to one log, in order.
 */
async function makeLog(names: string[]): Promise<string> {
  const folder = await Deno.makeTempDir({ prefix: "persistence-lock-" });
  await Deno.writeTextFile(`${folder}/log`, "");
  for (const name of names) {
    await Deno.mkdir(`${folder}/${name}`);
    for (const program of changers) {
      const path = `${folder}/${name}/${program}`;
      await Deno.writeTextFile(
        path,
        `#!/bin/sh
PATH=${systemPath}
exec 9>>"${folder}/log"
echo "${name} ${program} starts" >&9
${program} "$@" 9>&-
status=$?
echo "${name} ${program} ends" >&9
exit $status
`,
      );
      await command(["chmod", "755", path]);
    }
  }
  return folder;
}

/** While one has a command running, none of another's starts. */
async function assertTurns(log: string): Promise<void> {
  const lines = (await Deno.readTextFile(`${log}/log`)).trim().split("\n");
  assert(lines.length > 10, "Too few commands were seen");
  const running = new Map<string, number>();
  const order: string[] = [];
  for (const line of lines) {
    const [name, , what] = line.split(" ");
    running.set(name, (running.get(name) ?? 0) + (what === "starts" ? 1 : -1));
    const at = [...running].filter(([, count]) => count > 0);
    assert(
      at.length <= 1,
      `They interleave at "${line}":\n${lines.join("\n")}`,
    );
    if (order.at(-1) !== name) order.push(name);
  }
  assertEquals(
    new Set(order).size,
    order.length,
    `They interleave:\n${lines.join("\n")}`,
  );
}

/** The next boot finds a complete, clean filesystem. */
async function assertComplete(system: System): Promise<void> {
  const boot = await system.boot();
  assertEquals([boot.status, boot.report.mode], [0, "persistent"], boot.stderr);
  const data = await system.sh(
    `cd mnt/lightwhale-data
     echo x > x
     findmnt -n --mountpoint "$PWD" | wc -l
     [ -d lightwhale-state ] && [ -d lightwhale-state-snapshots ]
     btrfs filesystem label "$PWD"`,
  );
  assertEquals(data, "1\nlightwhale-data\n");
}
