/**
 * SIGKILL before any command that the tool runs: what was left behind must
 * always become a complete system by itself.
 */
import { assert, assertEquals } from "@std/assert";
import { systemPath } from "./programs.ts";
import {
  command,
  GiB,
  header,
  holdWork,
  MiB,
  onDisks,
  type System,
  type SystemOptions,
} from "./system.ts";

const magicDisk = { sizeBytes: 3 * GiB, contents: header };

/** Quick to copy; too small for swap. */
const small = { sizeBytes: 500 * MiB, contents: header };

/** A text that must be in its place in the end, and nowhere else. */
const payloadDisk = {
  ...magicDisk,
  contents: `printf '%s\\n' lightwhale-please-format-me \
    'lightwhale-payload 1' '-- etc/payload --' SECRET '-- end --' |
    dd of="$DISK" conv=notrunc status=none`,
};

/** What comes before the next run. A payload takes ten commands more. */
const setUps: Record<string, Record<string, SystemOptions["disks"]>> = {
  "at once": {
    "a single disk with a payload": [payloadDisk],
    "two disks": [magicDisk, magicDisk],
  },
  "after a reboot": {
    "a single disk": [magicDisk],
    "two disks": [magicDisk, magicDisk],
  },
};

/** What was asked for, and where the data are in the end. */
const askedFor: Record<string, {
  disks: SystemOptions["disks"];
  args: number[];
  members: number[];
}> = {
  "--move": {
    disks: [small, { sizeBytes: small.sizeBytes }],
    args: [0, 1],
    members: [1],
  },
  "--remove": { disks: [small, small], args: [0], members: [1] },
};

/** KILLS=all: before each command; else before some of them. */
const kills = Deno.env.get("KILLS") === "all" ? Infinity : 4;

for (const [option, { disks, args, members }] of Object.entries(askedFor)) {
  onDisks(
    `killed before commands of a boot and of the work after ${option}`,
    { disks },
    async (system) => {
      const traps = await makeTraps();
      const images = await Deno.makeTempDir({ prefix: "persistence-images-" });
      try {
        await system.boot();
        await system.sh(`cd mnt/lightwhale-data
          head -c 9M /dev/urandom > file; sha256sum file > sum; sync -f .`);
        await holdWork(system);
        const asked = await system.run([
          ...[...system.place(), option],
          ...args.map((place) => system.disks[place].path),
        ]);
        assertEquals(asked.status, 0, asked.stderr);
        await system.reboot({
          whileOff: () =>
            eachImage(system, (image, n) => copy(image, `${images}/${n}`)),
        });
        await bootTrapped(system, traps, 1e6);
        const commands = Number(await Deno.readTextFile(`${traps}/count`));
        assert(commands > 20, `Only ${commands} commands were seen`);
        await assertLeft(system, members, "not killed");
        const step = Math.max(1, commands / kills);
        const first = Math.ceil(Math.random() * step);
        for (let turn = first; turn <= commands; turn += step) {
          await system.reboot({
            whileOff: () =>
              eachImage(system, (image, n) => copy(`${images}/${n}`, image)),
          });
          await bootTrapped(system, traps, Math.floor(turn));
          const lines = await Deno.readTextFile(`${traps}/log`);
          await system.reboot();
          const boot = await system.boot();
          assertEquals(boot.status, 0, `${boot.stderr}\nafter\n${lines}`);
          await system.settle();
          await assertLeft(
            system,
            members,
            `${boot.stderr}\nkilled before the last of\n${lines}`,
          );
        }
      } finally {
        await Deno.remove(traps, { recursive: true });
        await Deno.remove(images, { recursive: true });
      }
    },
  );
}

const recoveries: Record<string, (system: System) => Promise<void>> = {
  "at once": async () => {},
  "after a reboot": (system) => system.reboot(),
};

for (const [when, recover] of Object.entries(recoveries)) {
  for (const [setUp, disks] of Object.entries(setUps[when])) {
    onDisks(
      `killed before any command on ${setUp}, run again ${when}: persistent`,
      { disks },
      async (system) => {
        const traps = await makeTraps();
        try {
          let commands = 0;
          const isPayload = disks[0] === payloadDisk;
          for (;; commands++) {
            const killed = await bootTrapped(system, traps, commands + 1);
            if (!killed) break;
            await recover(system);
            const lines = await Deno.readTextFile(`${traps}/log`);
            await assertComplete(system, `killed before the last of\n${lines}`);
            if (isPayload) await assertApplied(system, lines);
            await system.renew();
          }
          await assertComplete(system, "not killed");
          // Fewer would mean that the traps were not sprung.
          assert(commands >= 5, `Only ${commands} commands were seen`);
        } finally {
          await Deno.remove(traps, { recursive: true });
        }
      },
    );
  }
}

/**
 * Makes a folder that, first on PATH, stands before every program there is.
 * Each counts itself; the one whose turn it is kills the tool instead.
 */
async function makeTraps(): Promise<string> {
  const folder = await Deno.makeTempDir({ prefix: "persistence-traps-" });
  await Deno.writeTextFile(
    `${folder}/.trap`,
    `#!/bin/sh
# Beyond here the real programs count: theirs are not the tool's commands.
PATH=${systemPath}
exec 9>"${folder}/lock"
flock 9
count=$(($(cat "${folder}/count") + 1))
echo "$count" >"${folder}/count"
echo "$count: \${0##*/} $*" >>"${folder}/log"
turn=$(cat "${folder}/turn")
if [ "$count" -eq "$turn" ]; then
  # The work in the background is another process than the boot, and there may
  # be a shell between it and this.
  for pid in "$(cat "${folder}/pid")" "$PPID" \\
    "$(awk '/^PPid/ { print $2 }' "/proc/$PPID/status")"; do
    case $(tr '\\0' ' ' <"/proc/$pid/cmdline") in
    *" --root "*) kill -KILL "$pid" ;;
    esac
  done
fi
if [ "$count" -ge "$turn" ]; then exit 1; fi
exec 9>&-
exec "\${0##*/}" "$@"
`,
  );
  await command(["chmod", "755", `${folder}/.trap`]);
  for (const path of systemPath.split(":")) {
    for await (const { name } of Deno.readDir(path)) {
      await Deno.symlink(".trap", `${folder}/${name}`).catch((error) => {
        // The same program may stand in several places.
        if (!(error instanceof Deno.errors.AlreadyExists)) throw error;
      });
    }
  }
  return folder;
}

/** Boots, killed before the command whose turn it is; false if none was. */
async function bootTrapped(
  system: System,
  traps: string,
  turn: number,
): Promise<boolean> {
  await Deno.writeTextFile(`${traps}/turn`, String(turn));
  await Deno.writeTextFile(`${traps}/count`, "0");
  await Deno.writeTextFile(`${traps}/log`, "");
  const { signal, status, stderr } = await system.boot([], {
    path: `${traps}:${systemPath}`,
    pidFile: `${traps}/pid`,
  });
  if (signal === "SIGKILL") {
    await system.settle();
    return true;
  }
  assertEquals(status, 0, stderr);
  await system.settle();
  const seen = Number(await Deno.readTextFile(`${traps}/count`));
  return seen >= turn;
}

/** The payload is where it belongs, and nothing of it before the partitions. */
async function assertApplied(system: System, how: string): Promise<void> {
  const [{ path }] = system.disks;
  const found = await system.boot();
  assertEquals(found.status, 0, found.stderr);
  assertEquals(
    await system.sh(
      `cat etc/payload
       head -c 1M ${path} | grep -a -c -e SECRET -e lightwhale-p || :`,
    ),
    "SECRET\n0\n",
    how,
  );
}

/** Boots undisturbed, uses the result, and boots once more. */
async function assertComplete(system: System, how: string): Promise<void> {
  const devices = system.disks.length;
  for (const round of ["first", "second"]) {
    const boot = await system.boot();
    assertEquals(
      [boot.status, boot.report.mode, boot.report.degraded],
      [0, "persistent", false],
      `${round} boot, ${how}\n${boot.stderr}`,
    );
    assertEquals(
      await system.sh(
        `cd mnt/lightwhale-data
         findmnt -n -o SOURCE "$PWD" | grep -c '^/dev/'
         btrfs filesystem show "$PWD" | grep -c ' path /dev/'
         btrfs filesystem label "$PWD"
         btrfs filesystem df "$PWD" | grep -c '^Metadata, ${
          devices > 1 ? "RAID1" : "DUP"
        }:'`,
      ),
      `1\n${devices}\nlightwhale-data\n1\n`,
      how,
    );
    const swaps = await Deno.readTextFile("/proc/swaps");
    for (const { path } of system.disks) {
      assert(swaps.includes(`${path}p1 `), `no swap on ${path}, ${how}`);
    }
    assertEquals(
      await system.sh("cat etc/round 2>/dev/null || true"),
      {
        first: "",
        second: "first\n",
      }[round],
    );
    await system.sh(`echo ${round} > etc/round`);
    await system.reboot();
  }
  for (const disk of system.disks) {
    await command(["partx", "--add", disk.path]);
  }
  await command([
    ...["btrfs", "check", "--readonly", "--quiet", "--force"],
    `${system.disks[0].path}p2`,
  ]);
}

/** The data are on these disks alone, and all of them; the others are blank. */
async function assertLeft(
  system: System,
  members: number[],
  how: string,
): Promise<void> {
  await system.sh("cd mnt/lightwhale-data; sha256sum --quiet -c sum");
  const shown = await system.sh("btrfs filesystem show mnt/lightwhale-data");
  const found = [...shown.matchAll(/ path (.*?)p\d+$/gm)].map(([, path]) =>
    path
  );
  assertEquals(found, members.map((place) => system.disks[place].path), how);
  for (const [place, { path }] of system.disks.entries()) {
    if (members.includes(place)) continue;
    assertEquals(await command(["wipefs", "--noheadings", path]), "", how);
  }
}

async function eachImage(
  { disks }: System,
  use: (image: string, n: number) => Promise<void>,
): Promise<void> {
  for (const [n, { image }] of disks.entries()) await use(image, n);
}

async function copy(from: string, to: string): Promise<void> {
  await command(["cp", "--sparse=always", from, to]);
}
