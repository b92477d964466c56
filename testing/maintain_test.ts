/**
 * The care of a system that runs: its health, said once; scrubs when they are
 * due; what a monitoring system is told.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { judgeScrub, parseScrubStatus } from "../persistence.ts";
import {
  command,
  type Disk,
  type DiskSpec,
  header,
  isMarked,
  MiB,
  onDisks,
  projectFolder,
  sleep,
  type System,
} from "./system.ts";

const day = 86_400;
const hour = 3600;
const now = Date.UTC(2026, 10, 1) / 1000;

/** Hourly passes by a clock; those that begin a scrub, which ends at once. */
function scrubsOf(
  clock: (hours: number) => number,
  { hours, bootEvery = Infinity }: { hours: number; bootEvery?: number },
): number[] {
  let memory: ReturnType<typeof judgeScrub> | undefined;
  let startedSeconds: number | undefined;
  const scrubs: number[] = [];
  for (let passed = 0; passed < hours; passed++) {
    memory = judgeScrub(memory, {
      startedSeconds,
      nowSeconds: clock(passed),
      ranSeconds: passed % bootEvery === 0 ? 0 : hour,
    });
    if (!memory.isDue) continue;
    scrubs.push(passed);
    startedSeconds = clock(passed);
  }
  return scrubs;
}

const clocks: {
  name: string;
  clock: (hours: number) => number;
  days: number;
  bootEvery?: number;
  /** How many scrubs there are. */
  scrubs: number;
}[] = [
  {
    name: "sixty days",
    clock: (hours) => now + hours * hour,
    days: 60,
    scrubs: 1,
  },
  {
    name: "a year",
    clock: (hours) => now + hours * hour,
    days: 365,
    scrubs: 10,
  },
  {
    name: "a clock that always begins in 1970, one boot a day",
    clock: (hours) => hours % 24 * hour,
    days: 60,
    bootEvery: 24,
    scrubs: 1,
  },
  {
    name: "a clock that begins in 1970 and is set within the hour",
    clock: (hours) => hours % 24 === 0 ? 60 : now + hours * hour,
    days: 60,
    bootEvery: 24,
    scrubs: 1,
  },
  {
    name: "a clock that begins in 2099 and is set within the hour",
    clock: (hours) => hours % 24 === 0 ? 4e9 : now + hours * hour,
    days: 60,
    bootEvery: 24,
    scrubs: 1,
  },
  {
    name: "a clock that stands still",
    clock: () => now,
    days: 60,
    scrubs: 1,
  },
  {
    name: "a clock that is put back by ten years after a month",
    clock: (hours) => now + hours * hour - (hours > 720 ? 3650 * day : 0),
    days: 60,
    scrubs: 1,
  },
  {
    name: "a clock that is in 2099 for the first week",
    clock: (hours) => now + hours * hour + (hours < 168 ? 2e9 : 0),
    days: 60,
    scrubs: 1,
  },
];

for (const { name, clock, days, bootEvery, scrubs } of clocks) {
  Deno.test(`judgeScrub(): ${name}: ${scrubs} scrub(s)`, () => {
    const found = scrubsOf(clock, { hours: 24 * days, bootEvery });
    assertEquals(found.length, scrubs, `${found}`);
    for (const [i, at] of found.entries()) {
      const since = at - (found[i - 1] ?? 0);
      assert(since >= 34 * 24 && since <= 37 * 24, `${found}`);
    }
  });
}

Deno.test("judgeScrub() counts from a scrub that a person has started", () => {
  const old = judgeScrub(undefined, { nowSeconds: now, ranSeconds: 0 });
  const due = [1, 2].reduce(
    (before) =>
      judgeScrub(before, { nowSeconds: now + 40 * day, ranSeconds: hour }),
    old,
  );
  assert(due.isDue);
  const begun = judgeScrub(due, {
    startedSeconds: now + 40 * day,
    nowSeconds: now + 40 * day,
    ranSeconds: hour,
  });
  assertEquals([begun.isDue, begun.ranSeconds], [false, 0]);
});

Deno.test("parseScrubStatus() reads what btrfs scrub has written", () => {
  const line = (devid: number, more: string) =>
    `0-0:${devid}|data_extents_scrubbed:1|corrected_errors:${devid}|` +
    `uncorrectable_errors:7|t_start:1795884505|t_resumed:0|duration:1|${more}`;
  const text = [
    "scrub status:1",
    line(1, "canceled:0|finished:1"),
    line(2, "canceled:1|finished:1"),
    line(3, "canceled:0|finished:0"),
    "",
  ].join("\n");
  assertEquals(
    parseScrubStatus(text).map((d) => [d.devid, d.repaired, d.isFinished]),
    [[1, 1, true], [2, 2, false], [3, 3, false]],
  );
  assertEquals(parseScrubStatus(text)[0].lost, 7);
  assertEquals(parseScrubStatus(""), []);
  assertEquals(parseScrubStatus("scrub status:1\n\0\0garbage|||\n:::"), []);
});

const magicDisk: DiskSpec = { sizeBytes: 800 * MiB, contents: header };
const largeMagicDisk: DiskSpec = { sizeBytes: 2048 * MiB, contents: header };
const state = "mnt/lightwhale-data/lightwhale-state";

onDisks(
  "half of a mirror is damaged: it is repaired, said once, and forgotten",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    await system.boot();
    await onHealth(system, "exit 0");
    const sum = await write(system, "large", 120);
    const [, second] = system.disks;
    await system.reboot({ whileOff: () => damage(second) });
    await system.boot();
    assertEquals(await pass(system), "");
    await scrub(system);

    const found = await pass(system);
    assertMatch(
      found,
      new RegExp(
        `^${second.path}p1 had errors \\(\\d+ corruption\\); the scrub of ` +
          `\\S+ repaired \\d+ blocks: replace the disk;.*--reset.*\n$`,
      ),
    );
    assertEquals(await told(system), [found]);
    const checked = await check(system);
    assertEquals(checked.status, 1);
    assertMatch(checked.stdout, /device_errors=[1-9]\d*;0;;0 /);
    assertMatch(checked.stdout, / days_since_scrub=0;70;;0\n$/);
    const shown = await system.run([...system.place(), "--status"]);
    assertMatch(shown.stdout, /last scrub: ended 20.*repaired \d+ .*lost 0/);
    assertMatch(shown.stdout, /next: all checksums are verified in 35 days/);

    // Other numbers, another boot, other names of the disks: not said again.
    await pass(system);
    await system.reboot();
    await system.boot();
    assertMatch(await pass(system), /had errors/);
    assertEquals(await told(system), [found]);

    await system.sh("btrfs device stats --reset mnt/lightwhale-data");
    assertEquals(await pass(system), "");
    assertEquals(await told(system), [found, ""]);
    assertEquals((await check(system)).status, 0);
    await system.sh(`[ "$(sha256sum < ${state}/large)" = "${sum.trim()}" ]`);
    await forgetScrubs(system);
  },
);

onDisks(
  "the only disk is damaged: the file that is lost is named until it is gone",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    await onHealth(system, "exit 0");
    await write(system, "large", 200);
    await system.reboot({ whileOff: () => damage(system.disks[0]) });
    await system.boot();
    await scrub(system);
    const found = await pass(system);
    assertMatch(
      found,
      /could not repair \d+ blocks .*restore or delete .*\/large/,
    );
    const checked = await check(system);
    assertEquals(checked.status, 2);
    assertMatch(checked.stdout, /^PERSISTENCE CRITICAL: [^\n|]* \| [^\n|]*\n$/);

    await system.sh(`rm ${state}/large; btrfs device stats --reset ${state}`);
    await system.sh(`btrfs filesystem sync ${state}
      btrfs scrub start -Bq mnt/lightwhale-data`);
    assertEquals(await pass(system), "");
    assertEquals(await told(system), [found, ""]);
    await forgetScrubs(system);
  },
);

onDisks(
  "a scrub that was cut goes on after the reboot, and is not begun anew",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    await write(system, "large", 60);
    const uuid = await fsid(system);
    // A person's own limit is kept.
    const limit = `/sys/fs/btrfs/${uuid}/devinfo/1/scrub_speed_max`;
    await Deno.writeTextFile(limit, String(6 * MiB));
    await system.sh(`: > ${state}/.pending-scrub`);
    const working = system.run([...system.place(), "--maintain"]);
    const progress = async () => {
      const file = await Deno.readTextFile(
        `/var/lib/btrfs/scrub.status.${uuid}`,
      )
        .catch(() => "");
      return Number(/data_bytes_scrubbed:(\d+)/.exec(file)?.[1] ?? 0);
    };
    while (await progress() < 10 * MiB) await sleep(200);
    assertEquals((await Deno.readTextFile(limit)).trim(), String(6 * MiB));
    const shown = await system.run([...system.place(), "--status"]);
    assertMatch(shown.stdout, /In the background since .*: scrub: /);
    // Another pass says what is wrong meanwhile, and does not wait for it.
    await system.sh("rm run/lightwhale/health");
    assertEquals(await pass(system), "");
    await system.reboot();
    await working;

    const begun = Date.now() / 1000;
    await system.boot();
    await system.settle();
    assert(await progress() > 0);
    const file = await Deno.readTextFile(`/var/lib/btrfs/scrub.status.${uuid}`);
    const [, started, resumed] = /t_start:(\d+)\|t_resumed:(\d+)/.exec(file)!
      .map(Number);
    assert(started < begun && resumed >= Math.floor(begun), file);
    assertMatch(file, /canceled:0\|finished:1/);
    await system.sh(`[ ! -e ${state}/.pending-scrub ]`);
    await forgetScrubs(system);
  },
);

onDisks(
  "on-health: its failure is said and it is called again; a late one is killed",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    // Nearly full, and a byte more or less is nothing new.
    await system.sh(`set -- $(stat -f -c "%a %S" ${state})
      fallocate -l $(($1 * $2 - (20 << 20))) ${state}/docker/large`);
    assertMatch(await pass(system), /nearly full/); // nobody is to be called
    await onHealth(system, "echo Cannot reach the server >&2; exit 7");
    const failed =
      /nearly full.*\n.*on-health.*status 7.*Cannot reach the server.*within the hour\n$/;
    assertMatch(await pass(system), failed);
    assertMatch(await pass(system), failed);
    const calls = await told(system);
    assertEquals(calls.length, 2);
    assert(!calls[1].includes("on-health"), calls[1]);

    await onHealth(system, "sleep 1000 & sleep 1001; exit 0");
    const started = Date.now();
    assertMatch(await pass(system), /no answer in 30 s/);
    assert(Date.now() - started < 120_000);
    await system.settle(); // and what it has started is gone

    await onHealth(system, "exit 0");
    assertMatch(await pass(system), /^.*nearly full.*\n$/);
    await system.sh(`fallocate -l 1M ${state}/docker/more`);
    await pass(system);
    assertEquals((await told(system)).length, 4);
    await system.sh(`rm ${state}/docker/*; btrfs filesystem sync ${state}`);
    assertEquals(await pass(system), "");
    assertEquals((await told(system)).slice(4), [""]);
  },
);

onDisks(
  "on-health: what README.md shows for mail, ntfy and a webhook works as it is",
  { disks: [magicDisk], needs: ["msmtp", "wget", "busybox"] },
  async (system) => {
    const readme = await Deno.readTextFile(`${projectFolder}README.md`);
    const [mail, push, hook] = [...readme.matchAll(/```sh\n(#!.*?)```/gs)]
      .map(([, script]) => script);
    const got: string[] = [];
    await using http = Deno.serve(
      { hostname: "127.0.0.1", port: 0, onListen: () => {} },
      async (request) => {
        const { pathname } = new URL(request.url);
        const title = request.headers.get("title") ?? "";
        got.push(`${pathname} ${title} ${await request.text()}`);
        return new Response("ok");
      },
    );
    using smtp = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const mails = receiveMail(smtp, got);
    const here = (script: string) =>
      script.replace(/https:\/\/[^/]+/, `http://127.0.0.1:${http.addr.port}`)
        .replace(/--host=\S+/, `--host=127.0.0.1 --port=${smtp.addr.port}`);
    await system.boot();
    const lastBootSaid = (...errors: string[]) =>
      system.sh(`cat > run/lightwhale/persistence.json <<'END OF TEST'
${JSON.stringify({ mode: "persistent", errors })}\nEND OF TEST`);
    const name = (await command(["hostname"])).trim();
    // BusyBox' wget is another one than Debian's.
    const busybox = hook.replace("wget", "busybox wget");
    for (const script of [mail, push, hook, busybox]) {
      await system.sh(`mkdir -p etc/lightwhale
        cat > etc/lightwhale/on-health <<'END OF TEST'\n${
        here(script)
      }\nEND OF TEST
        chmod +x etc/lightwhale/on-health`);
      await lastBootSaid('a "b" \\ c');
      const wrong = (await pass(system)).trim();
      assertEquals(wrong, 'The last boot said: a "b" \\ c');
      await lastBootSaid();
      assertEquals(await pass(system), "");
      const [first, second] = got.splice(0);
      const text = script === mail || script === push
        ? wrong
        : JSON.stringify(wrong).slice(1, -1);
      assert(first.includes(text), first);
      assertMatch(second, /All is well again/);
      assert(first.includes(name) && second.includes(name), second);
      const json = first.slice(first.indexOf("{"));
      if (text !== wrong) {
        assertEquals(JSON.parse(json).text.trim(), `${name}: ${wrong}`);
      }
    }
    smtp.close();
    await mails;
  },
);

/** Takes mail, as far as msmtp needs it (RFC 5321). */
async function receiveMail(smtp: Deno.Listener, got: string[]): Promise<void> {
  for (;;) {
    const connection = await smtp.accept().catch(() => undefined);
    if (!connection) return;
    const say = (line: string) =>
      connection.write(new TextEncoder().encode(`${line}\r\n`));
    await say("220 here");
    let all = "";
    const buffer = new Uint8Array(65536);
    for (;;) {
      const count = await connection.read(buffer);
      if (!count) break;
      const heard = new TextDecoder().decode(buffer.subarray(0, count));
      all += heard;
      const isText = /^DATA\r\n/m.test(all) && !/\r\n\.\r\n/.test(all);
      if (isText) {
        if (/^DATA\r\n$/m.test(heard)) await say("354 go on");
        continue;
      }
      await say(/^QUIT/m.test(heard) ? "221 bye" : "250 well");
      if (/^QUIT/m.test(heard)) break;
    }
    connection.close();
    got.push(all);
  }
}

onDisks(
  "a whole filesystem lets a magic disk join at the next boot, not before",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    await write(system, "one", 20);
    const second = await system.plug(magicDisk);
    assertEquals(await pass(system), "");
    assert(await isMarked(second));
    const shown = await system.run([...system.place(), "--status"]);
    assertMatch(
      shown.stdout,
      new RegExp(`next: ${second.path} joins .* at the next boot`),
    );
    await system.reboot();
    await system.boot();
    await system.settle();
    assertEquals(await isMarked(second), false);
    assertEquals((await check(system, "persistent")).status, 0);
  },
);

onDisks(
  "a mirror that lacks a disk has room for metadata, as both have together",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    await system.boot();
    await system.sh(`fallocate -l 500M ${state}/docker/large; sync ${state}`);
    await system.reboot({ without: [system.disks[1]] });
    await system.boot(["--wait", "0"]);
    assertMatch(await pass(system), /^Device 2 is missing: .*\n$/);
    const { metadataSpace } = await statusOf(system);
    assert(metadataSpace.freeBytes < metadataSpace.sizeBytes);
  },
);

onDisks(
  "a magic disk takes the missing place at once, and its swap is used",
  { disks: [largeMagicDisk, largeMagicDisk] },
  async (system) => {
    const [, second] = system.disks;
    await system.boot();
    await write(system, "one", 20);
    await system.reboot({ without: [second] });
    await system.boot(["--wait", "0"]);
    const third = await system.plug(largeMagicDisk);
    assertEquals(await pass(system), "");
    const swaps = await Deno.readTextFile("/proc/swaps");
    assert(swaps.includes(`${third.path}p1 `), swaps);
    assertEquals((await check(system, "persistent")).status, 0);
  },
);

onDisks(
  "a member without a record comes back after the mount: health says so",
  { disks: [magicDisk, magicDisk] },
  async (system) => {
    const [, second] = system.disks;
    await system.boot();
    await system.reboot({
      without: [second],
      whileOff: () =>
        command([
          ...["dd", "if=/dev/zero", `of=${second.image}`, "bs=4k", "seek=256"],
          ...["count=16", "conv=notrunc", "status=none"],
        ]),
    });
    await system.boot(["--wait", "0"]);
    await system.attach(second);
    await command(["partx", "--add", second.path]);
    assertEquals(
      await pass(system),
      `Device 2 is missing: there is no redundancy until it is back, or a ` +
        `new disk is enabled with persistence.ts --enable; ${second.path}p1 ` +
        `came back after the mount: the next boot takes it in or rebuilds it\n`,
    );
    assertEquals((await check(system)).status, 2);
  },
);

onDisks(
  "data that are gone have left no space unallocated: said, with what helps",
  { disks: [{ ...magicDisk, sizeBytes: 2000 * MiB }] },
  async (system) => {
    await system.boot();
    await system.sh(
      `cd ${state}/docker
       for n in $(seq 1000); do fallocate -l 4M $n || break; done
       sync .`,
    );
    // Empty files take metadata only; long names take more of them.
    for (let n = 1;; n += 5000) {
      const { sizeBytes, freeBytes } = (await statusOf(system)).metadataSpace;
      if (freeBytes < sizeBytes / 5) break;
      await system.sh(
        `cd ${state}/docker; seq -f "%g-$(printf %0200d 0)" ${n} ${n + 4999} |
           xargs touch; sync .`,
      );
    }
    await system.sh(`cd ${state}/docker; rm -f ??[13579] ?[13579]; sync .`);
    const wrong = await pass(system);
    assertMatch(wrong, /^All space .* allocated to data.* makes room\n$/);
    const [, remedy] = /"(btrfs balance .*) \/mnt/.exec(wrong)!;
    await system.sh(`${remedy} mnt/lightwhale-data; sync mnt/lightwhale-data`);
    assertEquals(await pass(system), "");
  },
);

onDisks(
  "where the kernel can reclaim half-empty chunks, it is told to",
  { disks: [magicDisk] },
  async (system) => {
    await system.boot();
    const file = `/sys/fs/btrfs/${await fsid(system)}/allocation/data/` +
      `dynamic_reclaim`; // from Linux 6.11 on
    const read = () => Deno.readTextFile(file).catch(() => undefined);
    const canReclaim = await read() !== undefined;
    assertEquals(await pass(system), "");
    assertEquals(await read(), canReclaim ? "1\n" : undefined);
  },
);

onDisks(
  "--check tells a volatile system from one that should not be",
  { disks: [{ sizeBytes: 200 * MiB }] },
  async (system) => {
    const { status, stdout } = await check(system);
    assertEquals(status, 3, stdout);
    await system.boot();
    const fine = await check(system);
    assertEquals(fine.status, 0);
    assertMatch(
      fine.stdout,
      /^PERSISTENCE OK: volatile[^\n|]* \| space_free=\d+B;\d+:;\d+:;0;\d+\n$/,
    );
    const missed = await check(system, "persistent");
    assertEquals(missed.status, 2);
    assertMatch(missed.stdout, /^PERSISTENCE CRITICAL: Volatile: .*\n$/);
    for (const wrong of [["persistant"], ["persistent", "x"], ["--force"]]) {
      const { status, stdout } = await check(system, ...wrong);
      assertEquals(status, 3);
      assertMatch(stdout, /^PERSISTENCE UNKNOWN: .*\n$/);
    }
  },
);

/** Calls what a person wants to be called; what it got is kept. */
async function onHealth(system: System, then: string): Promise<void> {
  await system.sh(`mkdir -p etc/lightwhale
    cat > etc/lightwhale/on-health <<'END'
#!/bin/sh
{ cat; echo --; } >> "\${0%/*}/told"
${then}
END
    chmod +x etc/lightwhale/on-health`);
}

/** What on-health was told, call by call. */
async function told(system: System): Promise<string[]> {
  const all = await system.sh("cat etc/lightwhale/told 2>/dev/null || :");
  return all.split(/(?<=^|\n)--\n/).slice(0, -1);
}

/** One pass; returns what is wrong. */
async function pass(system: System): Promise<string> {
  const { status, stderr } = await system.run([
    ...system.place(),
    "--maintain",
  ]);
  assertEquals(status, 0, stderr);
  return await system.sh("cat run/lightwhale/health");
}

/** Makes the next pass verify all checksums. */
async function scrub(system: System): Promise<void> {
  await system.sh(`: > ${state}/.pending-scrub`);
  await pass(system);
  await system.sh(`[ ! -e ${state}/.pending-scrub ]`);
}

async function statusOf(system: System) {
  const { stdout } = await system.run([
    ...system.place(),
    ...["--status", "--json"],
  ]);
  return JSON.parse(stdout);
}

const check = (system: System, ...args: string[]) =>
  system.run([...system.place(), "--check", ...args]);

async function write(system: System, name: string, mebibytes: number) {
  return await system.sh(
    `head -c ${mebibytes}M /dev/urandom > ${state}/${name}
     sync ${state}/${name}; sha256sum < ${state}/${name}`,
  );
}

/** Writes over what is data, and no metadata: these have two copies. */
async function damage({ image }: Disk): Promise<void> {
  await command(
    [
      ...["sh", "-euc"],
      `dd if=/dev/urandom of="$1" bs=1M seek=200 count=20 conv=notrunc \
         status=none`,
      ...["sh", image],
    ],
  );
}

async function fsid(system: System): Promise<string> {
  const shown = await system.sh("btrfs filesystem show mnt/lightwhale-data");
  return /uuid: (\S+)/.exec(shown)?.[1] ?? "";
}

/** Progress of scrubs lies outside of the system's own root. */
async function forgetScrubs(system: System): Promise<void> {
  await Deno.remove(`/var/lib/btrfs/scrub.status.${await fsid(system)}`);
}
