/**
 * What an operator sees after a real boot, and what is expected of it.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { needPrograms } from "../testing/programs.ts";
import type { Boot } from "./vm.ts";

needPrograms(
  ...["qemu-system-x86_64", "mksquashfs", "cpio", "depmod", "busybox"],
  ...["sfdisk", "mkfs.ext4"],
);

/** BOOT=all: every situation, every cut. */
export const all = Deno.env.get("BOOT") === "all";

/** What is expected of a boot. */
export interface Expected {
  after: Partial<After>;
  /** What the console must say. */
  says?: RegExp;
  /** The longest that S11persistence may take; default: 60 s. */
  withinMs?: number;
}

/** What an operator sees after a boot. */
export interface After {
  mode: string;
  /** Exit status of S11persistence. */
  status: number;
  /** Filesystem of /mnt/lightwhale-data. */
  type: string;
  /** Of data, metadata and system. */
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
  /** Modes and owners of directories under the overlays. */
  looks: string;
  warnings: string;
  errors: string;
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
};
/** One data disk. */
export const single = { ...persistent, profiles: "single dup dup", swaps: 1 };
/** Two data disks. */
export const mirrored = {
  ...persistent,
  profiles: "raid1 raid1 raid1",
  swaps: 2,
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

/** A check that looks at everything, then runs a script that must succeed. */
export function lookAndRun(script = ""): string {
  return `${look}\nset -e\n${script}`;
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
    const seen = facts(boot);
    const expected = Object.keys(step.after) as (keyof After)[];
    const actual = Object.fromEntries(expected.map((key) => [key, seen[key]]));
    assertEquals(actual, step.after);
    assertEquals(boot.checkStatus, 0, "The check failed");
    if (step.says) assertMatch(boot.console, step.says);
    const { withinMs = 60_000 } = step;
    assert(boot.s11Ms! <= withinMs, `S11persistence took ${boot.s11Ms} ms`);
  } catch (error) {
    throw new Error(`${name}: ${(error as Error).message}\n${all}`);
  }
  console.log(`${name}: S11persistence took ${boot.s11Ms} ms`);
}

/** What look.sh said. */
function facts({ checkOutput, s11Status }: Boot): Partial<After> {
  const seen: Record<string, string> = Object.fromEntries(
    [...checkOutput.matchAll(/^fact (\w+) (.*)$/gm)].map((
      [, name, value],
    ) => [name, value]),
  );
  const { mode, warnings = [], errors = [] } = JSON.parse(seen.report || "{}");
  return {
    ...seen,
    mode,
    status: s11Status ?? -1,
    swaps: Number(seen.swaps),
    warnings: warnings.join("\n"),
    errors: errors.join("\n"),
  };
}
