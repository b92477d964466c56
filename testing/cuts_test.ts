/**
 * Every prefix of every write: a machine does something to its disks, which
 * remember each write and each flush. Then, for one flush after the other, the
 * disks are rebuilt as a power cut would have left them, with any of the
 * sectors that were not flushed, and the tool runs on them: it must end
 * persistent, complete and clean, with nothing lost.
 *
 *     SEED=1 CUTS=1000 deno test -A testing/cuts_test.ts
 *
 * A failure names the cut and the seed: SEED=... CUT=17:4 repeats it.
 */
import { assert, assertEquals } from "@std/assert";
import { Buffer } from "node:buffer";
import { rebuildDisks, type Received } from "../vm/recorded_disk.ts";
import { bootVm, type RunningVm } from "../vm/vm.ts";
import { needPrograms } from "./programs.ts";
import { countFrom, diceOf, seed } from "./random.ts";
import {
  type Boot,
  command,
  type Disk,
  type DiskSpec,
  header,
  mark,
  MiB,
  type System,
  withSystem,
} from "./system.ts";

/** How many cuts of each scene; each takes about a second. */
const cuts = countFrom("CUTS", 10);

/** Large enough for a swap partition. */
const disk: DiskSpec = { sizeBytes: 2100 * MiB };
const magicDisk: DiskSpec = { ...disk, contents: header };
/** Too small for one, and quick to copy. */
const smallDisk: DiskSpec = { sizeBytes: 500 * MiB };
const smallMagicDisk: DiskSpec = { ...smallDisk, contents: header };

/** What a machine does while its disks are recorded. */
interface Scene {
  name: string;
  disks: [DiskSpec, ...DiskSpec[]];
  /** What the root has besides, where the cuts are survived. */
  root?: string;
  /** What happens before, here and unrecorded. */
  before?: (system: System) => Promise<void>;
  /** What happens to the disks then, while they are off. */
  whileOff?: (system: System) => Promise<void>;
  /** Places in `disks` of those that the machine has; default: all. */
  used?: number[];
  /** A shell script that runs in the machine after its boot. */
  does?: string;
  /** Disks have no identity: those here could not have the machine's. */
  isAnonymous?: true;
  /** The profiles in the end; undefined where there may be no data filesystem. */
  profiles?: string;
  /** What must hold in the end besides. */
  after?: (cut: AfterCut) => Promise<void> | void;
}

/** A system that has booted after a cut. */
interface AfterCut {
  system: System;
  boot: Boot;
  /** The machine had said this before the cut. */
  said: (word: string) => boolean;
}

const state = "mnt/lightwhale-data/lightwhale-state";

/** Waits until the background work has given every chunk its mirror. */
const waitForWork = `
  mirrored() {
    cd /sys/fs/btrfs/*-*/ || return
    [ -d allocation/data/raid1 ] && [ ! -d allocation/data/single ] &&
      [ -d allocation/metadata/raid1 ] && [ ! -d allocation/metadata/dup ] &&
      [ "$(cat devinfo/*/missing | sort -u)" = 0 ] &&
      [ "$(ls -d devices/* | wc -l)" = 2 ] &&
      [ "$(cat exclusive_operation)" = none ]
  }
  tries=0
  until mirrored; do
    sleep 0.3
    tries=$((tries + 1))
    [ $tries -lt 200 ] || exit 1
  done
  cd /
  sync
`;

/** Waits until this is the only member, and the other disk is blank. */
function waitForOne(name: string): string {
  return `
    tries=0
    until [ "$(ls /sys/fs/btrfs/*-*/devices)" = ${name} ] &&
      [ -z "$(wipefs /dev/vda)" ] && [ -e /run/lightwhale/left.json ]
    do
      sleep 0.3
      tries=$((tries + 1))
      [ $tries -lt 200 ] || exit 1
    done
    sync`;
}

/** Writes files, and says which of them are on the disks for sure. */
const writeFiles = `
  for n in 1 2 3; do
    head -c 200000 /dev/urandom >/home/random$n
    (cd / && sha256sum home/random$n) >/etc/sum$n
    sync
    echo "@synced $n"
  done
`;

/** A payload that reaches over the place of a table, to be copied first. */
const payloadDisk: DiskSpec = {
  ...smallDisk,
  contents: `
    { printf '%s\\n' lightwhale-please-format-me 'lightwhale-payload 1' \
        '-- home/lightwhale/.ssh/authorized_keys --' 'ssh-ed25519 SECRET' \
        '-- password lightwhale --' '$1$salt$SECRET6789012345678901' \
        '-- etc/hostname --' swarm01 '-- etc/long --'
      yes SECRET | head -n 9000
      echo '-- end --'
    } | dd of="$DISK" conv=notrunc iflag=fullblock status=none`,
};

/** How the cuts of a first boot with a payload ended. */
const ends = { "made anew, with it": 0, "made before, with it": 0 };

const scenes: Scene[] = [
  {
    name: "first boot with a payload",
    disks: [payloadDisk],
    root: `printf 'root::1::::::\\nlightwhale:old:2::::::\\n' >etc/shadow`,
    profiles: "single dup dup",
    async after({ system, boot: { stderr } }) {
      const isNew = stderr.includes('Creating "');
      ends[isNew ? "made anew, with it" : "made before, with it"]++;
      const [{ path }] = system.disks;
      const found = await system.sh(
        `cat home/lightwhale/.ssh/authorized_keys etc/hostname
         grep -o '^lightwhale:[^:]*' etc/shadow
         grep -c '^SECRET$' etc/long
         stat -c %a home/lightwhale/.ssh/authorized_keys
         blockdev --flushbufs ${path}
         head -c 1M ${path} | grep -a -c -e SECRET -e lightwhale-p || :`,
      );
      assertEquals(
        found,
        "ssh-ed25519 SECRET\nswarm01\n" +
          "lightwhale:$1$salt$SECRET6789012345678901\n9000\n600\n0\n",
      );
    },
  },
  {
    name: "first boot on one disk, then files",
    disks: [magicDisk],
    does: writeFiles,
    profiles: "single dup dup",
  },
  {
    name: "first boot on two disks, then files",
    disks: [magicDisk, magicDisk],
    does: writeFiles,
    profiles: "raid1 raid1 raid1",
  },
  {
    name: "a later boot on two disks, and more files",
    disks: [smallMagicDisk, smallMagicDisk],
    before: persist,
    does: writeFiles,
    profiles: "raid1 raid1 raid1",
  },
  {
    name: "--enable",
    disks: [smallDisk],
    does: "persistence.ts --enable /dev/vda; echo '@enabled '",
    after({ boot, said }) {
      const { mode } = boot.report;
      if (said("enabled")) assertEquals(mode, "persistent");
    },
  },
  {
    name: "--disable",
    disks: [smallMagicDisk],
    // Volatile, or it would be too late.
    before: (system) => unmark(system, [0]),
    does: `persistence.ts --enable /dev/vda; echo '@enabled '
      persistence.ts --disable /dev/vda; echo '@disabled '`,
    after({ boot, said }) {
      const { mode } = boot.report;
      if (said("disabled")) assertEquals(mode, "volatile");
    },
  },
  {
    name: "--enable of a partition beside another that holds data",
    disks: [{
      ...smallDisk,
      contents: `printf '%s\\n' 'size=100MiB, name=other' 'name=free' |
          sfdisk -q --no-tell-kernel --label gpt "$DISK"
        yes 'not yours' | head -c 100M |
          dd of="$DISK" bs=1M seek=1 conv=notrunc status=none`,
    }],
    does: "persistence.ts --enable /dev/vda2; echo '@enabled '",
    async after({ system, boot, said }) {
      const { mode } = boot.report;
      if (said("enabled")) assertEquals(mode, "persistent");
      const [{ path }] = system.disks;
      await command([
        "sh",
        "-euc",
        `yes 'not yours' | head -c 100M |
           cmp - "$1" 2>&1 | grep -q 'EOF on -' && exit 1
         tail -c +1048577 "$1" | head -c 100M | sha256sum >/tmp/cuts.sum
         yes 'not yours' | head -c 100M | sha256sum | cmp - /tmp/cuts.sum
         sfdisk --dump "$1" | grep -q 'name="other"'`,
        "sh",
        path,
      ]);
    },
  },
  {
    name: "a disk joins, single becomes RAID1",
    disks: [smallMagicDisk, smallDisk],
    before: async (system) => {
      await persist(system);
      await markOff(system, 1);
    },
    does: waitForWork,
    profiles: "raid1 raid1 raid1",
  },
  {
    name: "a new disk takes the place of a missing one",
    disks: [smallMagicDisk, smallMagicDisk, smallDisk],
    before: async (system) => {
      await persist(system);
      await markOff(system, 2);
    },
    used: [0, 2],
    does: waitForWork,
    profiles: "raid1 raid1 raid1",
  },
  {
    name: "a member that missed writes is rebuilt",
    disks: [smallMagicDisk, smallMagicDisk],
    before: async (system) => {
      await persist(system);
      await system.reboot({ without: [system.disks[1]] });
      await bootWithout(system);
    },
    does: waitForWork,
    profiles: "raid1 raid1 raid1",
  },
  {
    name: "--move to another disk",
    disks: [smallMagicDisk, smallDisk],
    before: persist,
    does: `persistence.ts --move /dev/vda /dev/vdb; echo '@asked '
      ${waitForOne("vdb1")}`,
    isAnonymous: true,
    profiles: "single dup dup",
    async after({ system, said }) {
      const [old, fresh] = system.disks;
      const found = await dataNodes(system.disks);
      if (said("asked")) assertEquals(found, [`${fresh.path}p1`]);
      else assertEquals(found.length, 1, `${found}`);
      if (said("asked")) assertEquals(await blkid(old.path), "");
    },
  },
  {
    name: "--remove of one of two, at the next boot",
    disks: [smallMagicDisk, smallMagicDisk],
    before: async (system) => {
      await persist(system);
      const args = ["--remove", system.disks[0].path];
      const { status, stderr } = await system.run([...system.place(), ...args]);
      assertEquals(status, 0, stderr);
    },
    does: waitForOne("vdb1"),
    profiles: "single dup dup",
    async after({ system }) {
      const [gone, stays] = system.disks;
      assertEquals(await dataNodes(system.disks), [`${stays.path}p1`]);
      assertEquals(await blkid(gone.path), "");
    },
  },
  {
    name: "a disk has grown",
    disks: [smallMagicDisk],
    before: persist,
    whileOff: ({ disks: [{ image }] }) => Deno.truncate(image, 700 * MiB),
    does: "sync; echo '@grown '",
    profiles: "single dup dup",
    async after({ system, said }) {
      if (!said("grown")) return;
      const size = await system.sh(
        "df --output=size -B 1M mnt/lightwhale-data | tail -n 1",
      );
      assert(Number(size) > 690, `It has only ${size} MiB`);
    },
  },
];

for (const scene of scenes) {
  Deno.test({
    name: `power cuts: ${scene.name}`,
    ignore: Deno.uid() !== 0,
    fn: () => playScene(scene),
  });
}

async function playScene(scene: Scene): Promise<void> {
  needPrograms("qemu-system-x86_64", "cpio", "depmod", "busybox");
  const { disks, root } = scene;
  await withSystem({ disks, root }, async (system) => {
    const folder = await Deno.makeTempDir({ prefix: "persistence-cuts-" });
    try {
      await scene.before?.(system);
      const sums = await sumsOf(system);
      assert(!scene.before || !scene.profiles || sums, "There are no files");
      await system.reboot({
        whileOff: async () => {
          await scene.whileOff?.(system);
          for (const [i, { image }] of system.disks.entries()) {
            await copy(image, `${folder}/before${i}`);
          }
        },
      });
      const record = await recordScene(scene, system, folder);
      const chosen = chooseCuts(record.received);
      const failures: string[] = [];
      for (const cut of chosen) {
        try {
          await playCut(cut, { scene, system, folder, record, sums });
        } catch (error) {
          failures.push(`${nameOf(cut, record)}: ${(error as Error).message}`);
          console.log(failures.at(-1));
        }
      }
      console.log(`${chosen.length} cuts of ${record.received.length} events`);
      if (scene.disks.includes(payloadDisk)) console.log(ends);
      assert(failures.length === 0, `${failures.length} of the cuts failed`);
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });
}

// The machine

/** What the disks received, and what had been said by then. */
interface Recording {
  received: Received[];
  /** How much had been received when this was said. */
  said: Map<string, number>;
}

async function recordScene(
  scene: Scene,
  system: System,
  folder: string,
): Promise<Recording> {
  const said = new Map<string, number>();
  const note = (vm: RunningVm, words: string[]) => {
    said.set(words.join(" ").slice(1).trim(), vm.received.length);
  };
  const disks = usedDisks(scene, system).map((_, i) => ({
    file: `${folder}/recorded${i}`,
    recorded: true,
    serial: scene.isAnonymous ? "" : undefined,
  }));
  for (const [i, place] of placesOf(scene).entries()) {
    await copy(`${folder}/before${place}`, disks[i].file);
  }
  const boot = await bootVm({
    disks,
    check: `set -e\n${scene.does ?? ""}`,
    on: {
      synced: note,
      enabled: note,
      disabled: note,
      grown: note,
      asked: note,
    },
  });
  assertEquals(boot.checkStatus, 0, `${boot.console}\n${boot.checkOutput}`);
  for (const { file } of disks) await Deno.remove(file);
  return { received: boot.received, said };
}

const placesOf = (scene: Scene) => scene.used ?? scene.disks.map((_, i) => i);

function usedDisks(scene: Scene, system: System): Disk[] {
  return placesOf(scene).map((i) => system.disks[i]);
}

// The cuts

/** An instant at which the power goes. */
interface Cut {
  /** Writes and flushes that had arrived. */
  events: number;
  /** What was not flushed is lost in part, as this seed says. */
  seed?: number;
}

/**
 * Spread over all flushes: right after one, when all is there; and right before
 * one, when any of what it was to flush may be lost. Every other one is at a
 * flush of something of ours, which would be rare among those of Btrfs.
 */
function chooseCuts(received: Received[]): Cut[] {
  const given = Deno.env.get("CUT");
  if (given) {
    const [events, seed] = given.split(":").map(Number);
    return [{ events, seed }];
  }
  console.log(`SEED=${seed} CUTS=${cuts}`);
  const random = diceOf(seed);
  const flushes = received.flatMap(({ kind }, i) =>
    kind === "flush" ? [i] : []
  );
  assert(flushes.length > 0, "The machine flushed nothing");
  const before = (flush: number) => flushes[flushes.indexOf(flush) - 1] ?? -1;
  const ours = flushes.filter((flush) =>
    received.slice(before(flush) + 1, flush).some(isOurs)
  );
  // Where little is written, there is little to choose from.
  const length = Math.min(cuts, 6 * flushes.length);
  return Array.from({ length }, (_, i) => {
    const some = i % 2 > 0 && ours.length > 0 ? ours : flushes;
    const from = Math.floor(i * some.length / length);
    const to = Math.max(
      from + 1,
      Math.floor((i + 1) * some.length / length),
    );
    const flush = some[from + random.below(to - from)];
    // Anywhere since the flush before, not only at its end.
    return random.chance(0.25) ? { events: flush + 1 } : {
      events: flush - random.below(Math.ceil((flush - before(flush)) / 2)),
      seed: random.below(2 ** 31),
    };
  });
}

/** Is a header, a partition table, a label of swap or a record written? */
function isOurs(event: Received): boolean {
  if (event.kind === "flush") return false;
  const bytes = Buffer.from(event.data);
  return bytes.includes("EFI PART") || bytes.includes("SWAPSPACE2") ||
    bytes.includes("lightwhale-") && !bytes.includes("_BHRfS_M");
}

function nameOf({ events, seed }: Cut, { received }: Recording): string {
  const last = received[events - 1];
  const what = last?.kind === "write"
    ? `${last.data.length} bytes at ${last.offset} of disk ${last.disk}`
    : `a flush of disk ${last?.disk}`;
  const cut = seed === undefined ? `${events}` : `${events}:${seed}`;
  return `CUT=${cut} of ${received.length}, after ${what}`;
}

async function playCut(
  cut: Cut,
  { scene, system, folder, record, sums }: {
    scene: Scene;
    system: System;
    folder: string;
    record: Recording;
    sums: string;
  },
): Promise<void> {
  const { received } = record;
  const used = usedDisks(scene, system);
  const without = system.disks.filter((disk) => !used.includes(disk));
  await system.reboot({
    without,
    whileOff: async () => {
      for (const place of placesOf(scene)) {
        await copy(`${folder}/before${place}`, system.disks[place].image);
      }
      rebuildDisks(
        used.map(({ image }) => image),
        received.slice(0, cut.events),
        cut.seed,
      );
    },
  });
  for (const { path } of scene.isAnonymous ? used : []) {
    const file = `/sys/block/${path.slice("/dev/".length)}/loop/backing_file`;
    await system.sh(`mount --bind /dev/null ${file}`);
  }
  const boot = await system.boot();
  const context = `${boot.stderr}\n${JSON.stringify(boot.report, null, 1)}`;
  const { mode } = boot.report;
  assertEquals(boot.status, 0, context);
  assertEquals(
    mode,
    scene.profiles || mode !== "volatile" ? "persistent" : "volatile",
    context,
  );
  await system.sh("echo x > etc/x; echo x > var/x; echo x > home/x");
  const said = (word: string) =>
    (record.said.get(word) ?? Infinity) <= cut.events;
  for (const n of [1, 2, 3]) {
    if (!said(`synced ${n}`)) continue;
    await system.sh(`sha256sum --quiet -c etc/sum${n}`);
  }
  await system.settle();
  assertEquals(await sumsOf(system), sums, "The old files");
  if (scene.profiles) {
    assertEquals(await profilesOf(system), scene.profiles, context);
  }
  await scene.after?.({ system, boot, said });
  if (mode !== "persistent") return;
  await system.reboot({ without });
  await assertClean(used);
}

/** `btrfs check` of the filesystem on these disks. */
async function assertClean(disks: Disk[]): Promise<void> {
  const nodes = await dataNodes(disks);
  await command(["btrfs", "device", "scan", ...nodes]);
  await command(["btrfs", "check", "--readonly", "--quiet", nodes[0]]);
}

/** The partitions that answer to the name. */
async function dataNodes(disks: Disk[]): Promise<string[]> {
  const nodes: string[] = [];
  for (const { path } of disks) {
    // Fails where there is no table, which is fine.
    await command(["sh", "-c", 'partx --update "$1" 2>&1 || :', "sh", path]);
    for (const node of [`${path}p1`, `${path}p2`]) {
      if (await blkid(node, "LABEL") === "lightwhale-data") nodes.push(node);
    }
  }
  return nodes;
}

/** What libblkid sees, or one value of that; empty where it sees nothing. */
async function blkid(path: string, ...tag: string[]): Promise<string> {
  const options = tag.flatMap((name) => ["--match-tag", name]);
  const line = ["--probe", ...options, "--output", "value", path];
  return (await command(["blkid", ...line]).catch(() => "")).trim();
}

// Before the machine

/** The data filesystem with some files on it. */
async function persist(system: System): Promise<void> {
  const { status, stderr } = await system.boot();
  assertEquals(status, 0, stderr);
  await system.sh(
    `mkdir ${state}/docker/volume; cd ${state}/docker/volume
     for n in 1 2 3 4; do head -c 3M /dev/urandom > file$n; done
     touch nocow; chattr -c nocow; chattr +C nocow; head -c 1M /dev/urandom >> nocow`,
  );
  await system.settle();
}

/** The checksums of those files; empty before there are any. */
async function sumsOf(system: System): Promise<string> {
  return await system.sh(
    `cd ${state}/docker/volume 2>/dev/null || exit 0; sha256sum *`,
  );
}

/** Makes a disk magic as a person does it. */
async function markOff(system: System, which: number): Promise<void> {
  await mark(system.disks[which]);
}

async function unmark(system: System, which: number[]): Promise<void> {
  for (const i of which) {
    await command(["dd", ...zeros(system.disks[i].path)]);
  }
}

const zeros = (path: string) => [
  ...["if=/dev/zero", `of=${path}`, "bs=4K", "count=1", "status=none"],
];

/** The first disk alone writes something, the second one misses it. */
async function bootWithout(system: System): Promise<void> {
  const [{ path }] = system.disks;
  const { status, stderr } = await system.run([
    ...["--root", system.root, "--devices", path, "--wait", "0"],
  ]);
  assertEquals(status, 0, stderr);
  await system.sh(`head -c 3M /dev/urandom > ${state}/docker/volume/alone`);
}

async function profilesOf(system: System): Promise<string> {
  return (await system.sh(
    `for type in data metadata system; do
       uuid=$(findmnt -n -o UUID --mountpoint "$PWD/mnt/lightwhale-data")
       cd "/sys/fs/btrfs/$uuid/allocation/$type"
       printf '%s ' $(ls -d single dup raid* 2>/dev/null)
       cd - >/dev/null
     done`,
  )).trim();
}

async function copy(from: string, to: string): Promise<void> {
  await command(["cp", "--sparse=always", "--reflink=auto", from, to]);
}
