/**
 * What an operator sees after a real boot, and what is expected of it.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { needPrograms } from "../testing/programs.ts";
import type { Boot } from "./vm.ts";

needPrograms("qemu-system-x86_64", "mksquashfs", "cpio", "depmod", "busybox");
needPrograms("sfdisk", "mkfs.ext4", "mkfs.btrfs");

/** BOOT=all: every situation, every cut. */
export const all = Deno.env.get("BOOT") === "all";

/** What is expected of a boot. */
export interface Expected {
  after: Wanted<After>;
  /** When the work in the background is done; default: nobody waits for it. */
  settled?: Wanted<Settled>;
  /** What the console must say. */
  says?: RegExp;
  /** The longest that S11persistence may take; default: 60 s. */
  withinMs?: number;
}

/** The value of some properties, or what their text must match. */
type Wanted<T> = { [Name in keyof T]?: T[Name] | RegExp };

/** What an operator sees after a boot. */
export interface After {
  mode: string;
  /** Exit status of S11persistence. */
  status: number;
  /** Filesystem of /mnt/lightwhale-data. */
  type: string;
  /** Profiles of data, metadata and system chunks. */
  profiles: string;
  /** Filesystems of /etc, /var and /home. */
  overlays: string;
  /** How many swap areas are on. */
  swaps: number;
  /** The disks with a partition table, and their partitions' names. */
  partitions: string;
  /** The disks that begin with the magic header. */
  marked: string;
  /** Boots that /etc, /var/lib, /home and Docker's data root remember. */
  boots: string;
  /** What `btrfs check` says. */
  clean: string;
  /** Has all that the boots before kept its checksum? */
  kept: string;
  /** Modes and owners of directories under the overlays. */
  looks: string;
  warnings: string;
  errors: string;
}

/** What there is when the work in the background is done. */
export interface Settled
  extends Pick<After, "profiles" | "marked" | "clean" | "kept"> {
  /** What `--status` finds wrong. */
  health: string;
  /** Has each member alone all that was kept? */
  alone: string;
}

const looks = "755 0 /etc,640 0 /etc/shadow,755 0 /var,1777 0 /var/tmp," +
  "1777 0 /var/spool/mail,755 0 /home,700 1000 /home/lightwhale";
const base = {
  status: 0,
  overlays: "overlay overlay overlay",
  looks,
  warnings: "",
  errors: "",
};
/** Nothing is enabled. */
export const volatile = {
  ...base,
  mode: "volatile",
  type: "tmpfs",
  swaps: 0,
  boots: "1 1 1 1",
};
/** Whatever the number of data disks. */
export const persistent = {
  ...base,
  mode: "persistent",
  type: "btrfs",
  marked: "",
  clean: "yes",
  kept: "yes",
};
/** One data disk. */
export const single = { ...persistent, profiles: "single dup dup", swaps: 1 };
/** Two data disks. */
export const mirrored = {
  ...persistent,
  profiles: "raid1 raid1 raid1",
  swaps: 2,
};
/** Two data disks that are too small for swap. */
export const mirroredSmall = { ...mirrored, swaps: 0 };
/** The work in the background has begun, or not yet, or is done. */
export const atWork = {
  ...persistent,
  swaps: 0,
  profiles: /^/,
  marked: /^/,
  clean: /^/,
};
/** One of them is not there. */
export const degraded = {
  ...mirroredSmall,
  warnings:
    /^The data filesystem lacks 1 of 2 devices: .* degraded \(plug in .*\)$/,
};
/** A mirror of two that has lost nothing. */
export const whole: Settled = {
  profiles: "raid1 raid1 raid1",
  marked: "",
  clean: "yes",
  kept: "yes",
  health: "",
  alone: "yes yes",
};

/** The partitions of data disks with these names. */
export function dataDisks(...names: string[]): string {
  return names.map((name) => `${name}: lightwhale-swap lightwhale-data`)
    .join("; ");
}

/** What persists remembers this many boots. */
export function boots(n: number): string {
  return Array(4).fill(n).join(" ");
}

const look = Deno.readTextFileSync(new URL("look.sh", import.meta.url));

/** Checksums by the names of the files that `keep` wrote. */
export type Sums = Map<string, string>;

/**
 * A check that looks at everything, then runs a script that must succeed, then
 * looks again when the work in the background is done.
 *
 * @param kept What the boots before have kept.
 */
export function lookAndRun(
  { run = "", settled }: { run?: string; settled?: unknown } = {},
  kept: Sums = new Map(),
): string {
  const sums = [...kept].map(([name, sum]) => `${sum}  ${name}\n`).join("");
  return [
    `printf %s '${sums}' >/run/kept.sha256`,
    look,
    "set -e",
    run,
    ...settled ? ["settle"] : [],
  ].join("\n");
}

/** What this boot has kept. */
export function keptIn({ checkOutput }: Boot): Sums {
  const lines = checkOutput.matchAll(/^kept (\w+) {2}(.*)$/gm);
  return new Map([...lines].map(([, sum, name]) => [name, sum]));
}

/**
 * Compare what was seen with what is expected.
 *
 * @param name Says which boot it was, when it failed.
 * @throws With the whole console.
 */
export function assertBoot(boot: Boot, step: Expected, name: string): void {
  const all = `${boot.console}\n${boot.checkOutput}\n${boot.s11Ms} ms`;
  try {
    assertSeen(afterBoot(boot), step.after);
    if (step.settled) assertSeen(whenSettled(boot), step.settled);
    assertEquals(boot.checkStatus, 0, "The check failed");
    if (step.says) assertMatch(boot.console, step.says);
    const { withinMs = 60_000 } = step;
    assert(boot.s11Ms! <= withinMs, `S11persistence took ${boot.s11Ms} ms`);
  } catch (error) {
    throw new Error(`${name}: ${(error as Error).message}\n${all}`);
  }
  console.log(`${name}: S11persistence took ${boot.s11Ms} ms`);
}

function assertSeen<T>(seen: Partial<T>, wanted: Wanted<T>): void {
  const names = Object.keys(wanted) as (keyof T)[];
  const shown = names.map((name) => {
    const [value, want] = [seen[name], wanted[name]];
    const matches = want instanceof RegExp && want.test(`${value}`);
    return [name, matches ? want : value];
  });
  assertEquals(Object.fromEntries(shown), wanted);
}

/** What look.sh said at this stage. */
function facts(boot: Boot, stage: string): Record<string, string> {
  const lines = boot.checkOutput.matchAll(/^(\w+) (\w+) (.*)$/gm);
  return Object.fromEntries(
    [...lines].filter(([, of]) => of === stage)
      .map(([, , name, value]) => [name, value]),
  );
}

function afterBoot(boot: Boot): Partial<After> {
  const seen = facts(boot, "after");
  const { mode, warnings = [], errors = [] } = JSON.parse(seen.report || "{}");
  return {
    ...seen,
    mode,
    status: boot.s11Status ?? -1,
    swaps: Number(seen.swaps),
    warnings: warnings.join("\n"),
    errors: errors.join("\n"),
  };
}

function whenSettled(boot: Boot): Partial<Settled> {
  const seen = facts(boot, "settled");
  const { health } = JSON.parse(seen.status || "{}");
  return { ...seen, health: health?.join("\n") };
}
