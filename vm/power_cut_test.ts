/**
 * Power cuts during the first boot, each followed by a boot that must finish
 * the work: persistent, clean, nothing magic left.
 *
 * The instants are counts of what the disks have received, so that every stage
 * is hit and a failure can be repeated: CUT=17 (or CUT=17:4, with the seed of
 * what the disks lost) repeats that one. The first boot is recorded once; most
 * cuts are then made from the record, which is what a cut leaves (it saves a
 * boot each), some by killing the machine at that write.
 */
import { assert } from "@std/assert";
import { randomFrom, rebuildDisks, type Received } from "./recorded_disk.ts";
import {
  all,
  assertBoot,
  boots,
  dataDisks,
  lookAndRun,
  mirrored,
  single,
} from "./situation.ts";
import { bootVm, makeDisk } from "./vm.ts";

const layouts = [
  {
    name: "one disk",
    disks: 1,
    after: { ...single, partitions: dataDisks("vda") },
  },
  {
    name: "RAID1",
    disks: 2,
    after: { ...mirrored, partitions: dataDisks("vda", "vdb") },
  },
];
type Layout = (typeof layouts)[number];

/** How many cuts of each layout are made from the record, how many for real. */
const count = all ? { recorded: 60, real: 12 } : { recorded: 5, real: 1 };

/** An instant of the first boot. */
interface Instant {
  /** Writes and flushes that had arrived. */
  events: number;
  /** How many of them were writes. */
  writes: number;
  /** Unflushed writes are lost as this seed says; without it none is. */
  seed?: number;
}

for (const layout of layouts) {
  Deno.test(`power cuts during the first boot: ${layout.name}`, async () => {
    const dir = Deno.makeTempDirSync({ prefix: "persistence-cut-" });
    const failures: string[] = [];
    async function check(files: string[], name: string) {
      try {
        await assertFinished(layout, files, name);
      } catch (error) {
        failures.push((error as Error).message);
        console.log(failures.at(-1));
      }
    }
    try {
      const received = await recordFirstBoot(layout, dir);
      for (const instant of chooseInstants(received, count.recorded, 1)) {
        const files = magicDisks(layout, dir);
        rebuildDisks(files, received.slice(0, instant.events), instant.seed);
        await check(files, describe(instant, received));
      }
      const real = Deno.env.has("CUT") ? 0 : count.real;
      for (const instant of chooseInstants(received, real, 2)) {
        const files = magicDisks(layout, dir);
        await killAt(instant, files);
        await check(files, `killed at ${describe(instant, received)}`);
      }
      assert(failures.length === 0, `${failures.length} cuts failed`);
    } finally {
      Deno.removeSync(dir, { recursive: true });
    }
  });
}

Deno.test("power cut as soon as --enable has said that it is done", async () => {
  const dir = Deno.makeTempDirSync({ prefix: "persistence-cut-" });
  try {
    const file = makeDisk(`${dir}/disk.img`, { sizeMiB: 3000 });
    await bootVm({
      disks: [{ file, recorded: true }],
      check: "persistence.ts --enable /dev/vda && echo @enabled && sleep 60",
      on: { enabled: (vm) => vm.kill() },
      cut: { loseUnflushed: "all" },
    });
    await assertFinished(layouts[0], [file], "the boot after the cut");
  } finally {
    Deno.removeSync(dir, { recursive: true });
  }
});

function magicDisks({ disks }: Layout, dir: string): string[] {
  return Array.from(
    { length: disks },
    (_, i) => makeDisk(`${dir}/disk${i}.img`, { sizeMiB: 3000, magic: true }),
  );
}

/** Everything that the disks receive until S11persistence has ended. */
async function recordFirstBoot(layout: Layout, dir: string) {
  const { received } = await bootVm({
    disks: magicDisks(layout, dir).map((file) => ({ file, recorded: true })),
    check: "",
    on: { "end S11persistence": (vm) => vm.kill() },
  });
  assert(received.length > 0, "The first boot wrote nothing");
  return received;
}

/** Kill the machine at this instant of a first boot of its own. */
async function killAt({ writes, seed }: Instant, files: string[]) {
  const boot = await bootVm({
    disks: files.map((file) => ({ file, recorded: true })),
    check: "",
    cut: { afterWrites: writes, loseUnflushed: seed },
    on: { "end S11persistence": (vm) => vm.kill() },
  });
  assert(boot.wasCut, `The machine made fewer than ${writes} writes`);
}

async function assertFinished(layout: Layout, files: string[], name: string) {
  const boot = await bootVm({
    disks: files.map((file) => ({ file })),
    check: lookAndRun(),
  });
  // Cut between label and header: that the header goes is said as a warning.
  const { warnings: _, ...after } = layout.after;
  assertBoot(boot, { after: { ...after, boots: boots(1) } }, name);
}

/**
 * Spread over the boot: half of the instants right before a flush, when what
 * was written since the one before may be lost in any combination; half
 * anywhere, with nothing lost.
 */
function chooseInstants(
  received: Received[],
  count: number,
  seed: number,
): Instant[] {
  const writesBefore = (events: number) =>
    received.slice(0, events).filter(({ kind }) => kind === "write").length;
  const { CUT } = Deno.env.toObject();
  if (CUT && count > 0) {
    const [events, seed] = CUT.split(":").map(Number);
    return [{ events, writes: writesBefore(events), seed }];
  }
  const random = randomFrom(seed);
  const flushes = received.flatMap(({ kind }, i) =>
    kind === "flush" ? [i] : []
  );
  return Array.from({ length: count }, (_, i) => {
    const part = (i + random()) / count;
    const lossy = i % 2 === 0;
    const events = lossy
      ? flushes[Math.floor(part * flushes.length)]
      : Math.ceil(part * received.length);
    return {
      events,
      writes: Math.max(1, writesBefore(events)),
      ...(lossy ? { seed: i } : {}),
    };
  });
}

function describe({ events, seed }: Instant, received: Received[]): string {
  const last = received[events - 1];
  const what = last?.kind === "write"
    ? `a write of ${last.data.length} bytes at ${last.offset} of disk ${last.disk}`
    : `a flush of disk ${last?.disk}`;
  const cut = seed === undefined ? `${events}` : `${events}:${seed}`;
  return `cut ${cut} of ${received.length}, after ${what}`;
}
