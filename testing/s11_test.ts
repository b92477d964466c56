/**
 * The init script in a root of BusyBox alone, as on the target. What it calls is
 * a stand-in here; with the real program it runs in the virtual machine.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { MiB, onDisks, projectFolder, sleep, type System } from "./system.ts";

const disk = { sizeBytes: 4 * MiB };

/** BusyBox, rcS as Buildroot's, and start scripts that tell their order. */
const busyBoxRoot = `
  mkdir -p bin usr/sbin dev proc root var/lib etc/docker
  cp "$(command -v busybox)" bin/busybox
  for name in $(busybox --list); do [ -e bin/$name ] || ln -s busybox bin/$name; done
  chmod 750 home; chown 7:8 home; touch -d '2020-02-02 02:02:02 UTC' home
  cd etc/init.d
  cp '${projectFolder}S11persistence' .
  cat >rcS <<'END'
#!/bin/sh
for script in /etc/init.d/S??*; do
  [ -f "$script" ] || continue
  case $script in
  *.sh) (set start; . "$script") ;;
  *) "$script" start ;;
  esac
done
END
  for name in S05early S20image S30replaced S40removed; do
    printf '#!/bin/sh\\necho "image $1 %s" >>/tmp/started\\n' $name >$name
  done
  printf '#!/bin/sh\\nsleep 1; echo "image $1 S90last" >>/tmp/started\\n' >S90last
  chmod 755 *`;

/** What the real program does where nothing is enabled. */
const setUp = `
data=/mnt/lightwhale-data state=/mnt/lightwhale-data/lightwhale-state
mount -t tmpfs lightwhale-data $data
mkdir $state
[ ! -e /tmp/state ] || cp -a /tmp/state/. $state
for name in etc var home; do
  lower=/run/lightwhale/overlay/lower/$name upper=$state/overlay/upper/$name
  work=$state/overlay/work/$name
  mkdir -p $lower $upper $work
  mount -o bind /$name $lower
  mount -t overlay -o lowerdir=$lower,upperdir=$upper,workdir=$work overlay /$name
done
mkdir -p $state/docker
`;

const state = "/mnt/lightwhale-data/lightwhale-state";

interface Situation {
  /** The stand-in: a shell script. */
  tool?: string;
  /** Shell commands that make something else of it. */
  make?: string;
  /** Variables of S11persistence that differ. */
  set?: Record<string, number>;
  /** What happens in the root before. */
  before?: string;
}

/** Prepares a system that has just started. */
async function prepare(
  system: System,
  { tool = setUp, make = "", set = {}, before = "" }: Situation = {},
): Promise<void> {
  const values = Object.entries({ nap_seconds: 1, ...set })
    .map(([name, value]) => `-e 's/^${name}=.*/${name}=${value}/'`).join(" ");
  await system.sh(`
    mount -t proc proc proc
    mount -t tmpfs dev dev
    mknod dev/null c 1 3; mknod dev/zero c 1 5; touch dev/kmsg
    # The machine's are changed by others all the time.
    cp /proc/partitions tmp/partitions
    mount --bind tmp/partitions proc/partitions
    mount -t tmpfs sbin usr/sbin
    cat >usr/sbin/persistence.ts <<'END'
#!/bin/sh
if [ "$1" = --maintain ]; then
  and_then=$(cat /tmp/maintain) # before it is counted: it may change then
  echo maintain >>/tmp/maintained
  eval "$and_then"
  exit
fi
${tool}
END
    chmod 755 usr/sbin/persistence.ts
    ${make}
    sed ${values} etc/init.d/S11persistence >tmp/S11persistence
    chmod 755 tmp/S11persistence
    mount --bind tmp/S11persistence etc/init.d/S11persistence
    ${before}`);
}

/** Runs a shell script in the root. */
function inRoot(system: System, script: string): Promise<string> {
  const quoted = script.replaceAll("'", `'\\''`);
  return system.sh(`chroot . /bin/sh -uc '${quoted}' 2>&1`);
}

/** Calls the init script. */
function s11(system: System, words: string, before = ""): Promise<string> {
  return inRoot(
    system,
    `${before} /etc/init.d/S11persistence ${words}; echo "status $?"`,
  );
}

function onBusyBox(
  name: string,
  test: (system: System) => Promise<void>,
): void {
  onDisks(`S11persistence ${name}`, {
    disks: [disk],
    needs: ["busybox"],
    root: busyBoxRoot,
  }, test);
}

/** The system is writable, on a tmpfs, and Docker waits. */
async function assertLastResort(system: System): Promise<void> {
  const seen = await inRoot(
    system,
    `for name in etc var home; do
       echo word >/$name/file && cat /$name/file
       grep -c " /$name overlay rw" /proc/mounts
     done
     stat -c '%F %a' ${state}/docker
     stat -f -c %T ${state}`,
  );
  assertEquals(seen, `${"word\n1\n".repeat(3)}regular file 444\ntmpfs\n`);
  const gate = await inRoot(system, `cat ${state}/docker`);
  const goOn = [
    ...[`rm -f ${state}/docker`, `mkdir -m 710 ${state}/docker`],
    `mount -o bind ${state}/docker /var/lib/docker`,
  ];
  assertEquals(gate.match(/(?<=^ {4}).*$/gm), goOn);
  const report = JSON.parse(
    await inRoot(system, "cat /run/lightwhale/persistence.json"),
  );
  assertEquals([report.mode, report.exitStatus], ["fallback", 1]);
  const health = await inRoot(system, "cat /run/lightwhale/health");
  assertEquals(health, `${report.reason}\n`);
  assertEquals(
    await inRoot(system, "cat /dev/kmsg"),
    `<3>persistence: ${health}`,
  );
}

/** The processes that a stand-in left: it sleeps this long. */
function sleepers(system: System, seconds: number): Promise<string> {
  return system.sh(`pgrep -fx '(/bin/)?sleep ${seconds}' || true`);
}

const failures: Record<string, Situation & { says: RegExp }> = {
  "lacks an instruction": {
    tool: "kill -ILL $$",
    says: /this processor lacks an instruction/,
  },
  "is killed": { tool: "kill -KILL $$", says: /was killed \(for lack of mem/ },
  "crashes": { tool: "kill -SEGV $$", says: /was killed by signal 11/ },
  "is not there": {
    make: "rm usr/sbin/persistence.ts",
    says: /cannot be run/,
  },
  "is a directory": {
    make: "rm usr/sbin/persistence.ts; mkdir usr/sbin/persistence.ts",
    says: /cannot be run/,
  },
  "is not executable": {
    make: "chmod 644 usr/sbin/persistence.ts",
    says: /cannot be run/,
  },
  "has no interpreter": {
    make: "echo '#!/usr/bin/deno' >usr/sbin/persistence.ts",
    says: /cannot be run/,
  },
  // execvp(3) gives to a shell what the kernel does not know.
  "is empty": {
    make: ": >usr/sbin/persistence.ts",
    says: /ended with status 0 and left the system read-only/,
  },
  "is another machine's": {
    make: "printf '\\177ELF\\2\\1\\1' >usr/sbin/persistence.ts",
    says: /cannot be run|ended with status/,
  },
  "gives up": { tool: "exit 1", says: /ended with status 1 / },
  "hangs, with all that it started": {
    tool: `trap "" TERM HUP; sleep 4321 & sleep 4321`,
    set: { boot_seconds: 2 },
    says: /did not end in 2 s/,
  },
  "is killed when one overlay is there": {
    tool: setUp.replace(
      "  mkdir -p $lower",
      () => "  [ $name = etc ] || kill $$\n  mkdir -p $lower",
    ),
    says: /was killed by signal 15/,
  },
  "is killed before Docker has its place": {
    tool: `${setUp}rmdir $state/docker; kill -KILL $$`,
    says: /was killed/,
  },
};

for (const [name, { says, ...situation }] of Object.entries(failures)) {
  onBusyBox(`start, where the program ${name}: by itself`, async (system) => {
    await prepare(system, situation);
    const startedMs = performance.now();
    const said = await s11(system, "start");
    assertMatch(said, says);
    assertMatch(said, /\nStarting persistence: FAIL\nstatus 1\n$/);
    const ms = performance.now() - startedMs;
    assert(ms < 20_000, `It took ${ms} ms`);
    const look = (folder: string) =>
      inRoot(
        system,
        `cd ${folder}; stat -c '%a %u:%g %Y' etc var home`,
      );
    if (!situation.tool?.includes("mount")) {
      const lower = "/run/lightwhale/overlay/lower";
      assertEquals(await look("/"), await look(lower));
      assertMatch(await look("/"), /\n750 7:8 1580608922\n$/);
    }
    await assertLastResort(system);
    assertEquals(await sleepers(system, 4321), "");
  });
}

onBusyBox("start: a mount that ends later covers nothing", async (system) => {
  await prepare(system, {
    tool: "sleep 4326",
    set: { boot_seconds: 1 },
    // It has found its place before, as mount(2) has that waits for a disk.
    before: `(cd mnt/lightwhale-data
      until [ -e ${system.root}/tmp/disk-answers ]; do sleep 0.1; done
      mount --no-canonicalize -t tmpfs late .) >/dev/null 2>&1 &`,
  });
  await s11(system, "start");
  await system.sh(
    "touch tmp/disk-answers; until grep -q ^late /proc/mounts; do sleep 0.1; done",
  );
  await assertLastResort(system);
  assertEquals(await sleepers(system, 4326), "");
});

onBusyBox("start: what is set up already is left alone", async (system) => {
  for (const end of ["kill -KILL $$", "sleep 4322", "exit 1"]) {
    await prepare(system, {
      tool: `${setUp}cat /proc/mounts >/tmp/mounts; ${end}`,
      set: { boot_seconds: 2 },
    });
    assertMatch(
      await s11(system, "start"),
      /Starting persistence: FAIL\nstatus 1\n$/,
    );
    assertEquals(
      await inRoot(system, "cmp /proc/mounts /tmp/mounts; ls -A /home"),
      "",
    );
    await system.reboot();
  }
});

onBusyBox("start: a disk that answers nothing is given up", async (system) => {
  // Whoever writes to a frozen filesystem waits as for a mute disk.
  const frozen = `${system.root}/tmp/frozen`;
  await prepare(system, {
    tool: "sleep 3; exec touch /tmp/frozen/file >/dev/null 2>&1",
    set: { mute_seconds: 3 },
    before: `mkfs.ext4 -q ${system.disks[0].path}; mkdir ${frozen}
      mount ${system.disks[0].path} ${frozen}; fsfreeze -f ${frozen}`,
  });
  try {
    const startedMs = performance.now();
    assertMatch(await s11(system, "start"), /waited 3 s for a disk/);
    const ms = performance.now() - startedMs;
    assert(6_000 < ms && ms < 20_000, `It took ${ms} ms`);
    await assertLastResort(system);
  } finally {
    await system.sh(`fsfreeze -u ${frozen}`);
  }
});

const dataRoots: Record<string, [daemonJson: string, dataRoot: string]> = {
  "no data root": [`{ "log-driver": "local" }`, "/var/lib/docker"],
  "ours": [`{\n  "data-root": "${state}/docker"\n}`, `${state}/docker`],
  "another": [`{"data-root": "/home/of/docker"}`, "/home/of/docker"],
};

for (const [name, [daemonJson, dataRoot]] of Object.entries(dataRoots)) {
  onBusyBox(`start: Docker is held back with ${name}`, async (system) => {
    await system.reboot({
      root: `(${busyBoxRoot}); mkdir -p var/lib/docker home/of/docker
        echo kept | tee var/lib/docker/file >home/of/docker/file
        echo '${daemonJson}' >etc/docker/daemon.json`,
    });
    await prepare(system, { tool: "exit 3" });
    await s11(system, "start");
    const isOurs = name === "ours";
    assertMatch(
      await inRoot(system, `cat ${dataRoot}${isOurs ? "" : "/held-back"}`),
      /^Docker is held back: .*ended with status 3/,
    );
    assertEquals(
      await inRoot(system, "cat /etc/docker/daemon.json"),
      `${daemonJson}\n`,
    );
    const look = `cd ${dataRoot} && touch new && ls && cd / || :`;
    assertMatch(await inRoot(system, look), /can't (cd|create)|Read-only/);
    const go = `sed -n "s/^    //p" ${state}/docker >/tmp/go`;
    assertEquals(
      await inRoot(system, `${go}; sh -e /tmp/go; ${look}`),
      "new\n",
    );
    if (isOurs) return;
    const uncover = `umount ${dataRoot}; umount ${dataRoot}`;
    assertEquals(await inRoot(system, `${uncover}; ${look}`), "file\nnew\n");
  });
}

for (const [name, [daemonJson, dataRoot]] of Object.entries(dataRoots)) {
  const is = `dockerd with ${name} does not start until it is told to`;
  onDisks(`S11persistence start: ${is}`, {
    disks: [disk],
    needs: ["busybox", "dockerd"],
    root: `(${busyBoxRoot}); echo '${daemonJson}' >etc/docker/daemon.json`,
  }, async (system) => {
    await prepare(system, { tool: "kill -KILL $$" });
    await s11(system, "start");
    const dockerd = `dockerd --config-file etc/docker/daemon.json \\
      --iptables=false --ip6tables=false --bridge=none \\
      --host unix:///run/docker.sock --exec-root /run/docker \\
      --pidfile /run/docker.pid`;
    const log = await system.sh(
      `mount -t tmpfs run /run; mount -t tmpfs mnt /mnt
       mkdir /mnt/lightwhale-data
       mount --rbind mnt/lightwhale-data /mnt/lightwhale-data
       mount --rbind var /var; mount --rbind home /home
       ! timeout 60 ${dockerd} 2>&1`,
    );
    assertMatch(log, /canonical path points to a file|read-only file system/);
    await system.sh(
      `sed -n 's/^    //p' ${state}/docker | sh -e
       unshare --pid --fork --kill-child sh -c 'mount -t proc proc /proc
         exec timeout 60 ${dockerd}' >tmp/docker.log 2>&1 &
       for try in $(seq 600); do
         ! docker -H unix:///run/docker.sock version >/dev/null 2>&1 || break
         sleep 0.1
       done
       docker -H unix:///run/docker.sock info --format '{{.DockerRootDir}}' |
         grep -x ${dataRoot}
       [ -d ${state}/docker/image ]
       kill -KILL $!; wait $! || true`,
    );
  });
}

onBusyBox("start: clean environment, result, status", async (system) => {
  await prepare(system, {
    tool: `${setUp}
      tr "\\0" "\\n" </proc/$$/environ >/tmp/environ
      readlink /proc/$$/fd/0 >/tmp/stdin
      umask >/tmp/umask
      echo "called with: $*"
      echo "persistence: a message" >&2`,
  });
  const before = "umask 077; " +
    "BUN_OPTIONS=--version BUN_BE_BUN=1 DENO_DIR=/tmp PATH=/bin:/somewhere";
  assertEquals(
    await s11(system, "start", before),
    `called with: 
persistence: a message
Starting persistence: OK
status 0
`,
  );
  assertEquals(
    await inRoot(system, "cat /tmp/environ /tmp/stdin /tmp/umask"),
    `PATH=/usr/sbin:/usr/bin:/sbin:/bin
UV_THREADPOOL_SIZE=128
BUN_JSC_useJIT=0
/dev/null
0022
`,
  );
});

onBusyBox("start with stdin closed", async (system) => {
  await prepare(system, {
    tool: `${setUp}readlink /proc/$$/fd/0 >/tmp/stdin`,
  });
  assertMatch(await s11(system, "start <&-"), /OK\nstatus 0\n$/);
  assertEquals(await inRoot(system, "cat /tmp/stdin"), "/dev/null\n");
});

/** What the user has in /etc/init.d. */
const ofTheUser = `
  mkdir -p tmp/state/overlay/upper/etc/init.d
  cd tmp/state/overlay/upper/etc/init.d
  for name in S05early S10added S30replaced S50added S60hangs S99never; do
    printf '#!/bin/sh\\necho "user $1 %s" >>/tmp/started\\n' $name >$name
  done
  echo 'echo "user $1 S20sourced \${known-}" >>/tmp/started' >S20sourced.sh
  echo 'sleep 4323' >>S60hangs
  echo 'echo wrong >>/tmp/started' >S51not-executable
  printf '#!/bin/sh\\necho wrong >>/tmp/started\\n' >added-without-S
  chmod 755 *; chmod 644 S51not-executable
  ln -s nowhere S52dangling; mkdir S53directory
  mknod S40removed c 0 0`;

onBusyBox(
  "start: the user's scripts run once, after rcS' own",
  async (system) => {
    await prepare(system, { before: `(${ofTheUser})` });
    const startedMs = performance.now();
    await inRoot(system, "/bin/sh /etc/init.d/rcS >/tmp/console 2>&1");
    const ms = performance.now() - startedMs;
    assert(ms < 10_000, `rcS was held up: ${ms} ms`);
    await inRoot(
      system,
      "until grep -q S60 /tmp/started; do sleep 0.1; done",
    );
    assertEquals(
      await inRoot(system, "cat /tmp/started"),
      `image start S05early
image start S20image
user start S30replaced
image start S90last
user start S10added
user start S20sourced 
user start S50added
user start S60hangs
`,
    );
    assertMatch(await s11(system, "start"), /status 0\n$/);
    assertMatch(await s11(system, "stop"), /status 0\n$/);
    assertEquals(await inRoot(system, "grep -c user /tmp/started"), "5\n");
  },
);

/** How often the disks were looked after, once that is this often. */
async function maintained(system: System, times: number): Promise<number> {
  const count = "wc -l </tmp/maintained";
  const found = await inRoot(
    system,
    `touch /tmp/maintained
     until [ "$(${count})" -ge ${times} ]; do sleep 0.1; done; ${count}`,
  );
  return Number(found);
}

/** Long enough for one more, were it to come. */
const aWhile = () => sleep(2500);

onBusyBox("start: has the disks looked after", async (system) => {
  const change = (name: string, andThen = "") =>
    system.sh(`echo '${andThen}' >tmp/maintain
      echo '   8        0       1024 ${name}' >>tmp/partitions`);
  await prepare(system);
  await s11(system, "start");
  assertEquals(await maintained(system, 1), 1);
  await change("sda");
  assertEquals(await maintained(system, 2), 2);
  await aWhile();
  assertEquals(await maintained(system, 2), 2);

  // Never two at a time; and one that crashes is not the last.
  await change("sdb", "kill -SEGV $$");
  assertEquals(await maintained(system, 3), 3);
  await change("sdc", "until [ -e /tmp/go-on ]; do sleep 0.1; done");
  assertEquals(await maintained(system, 4), 4);
  await change("sdd");
  await aWhile();
  assertEquals(await maintained(system, 4), 4);
  await system.sh("touch tmp/go-on");
  assertEquals(await maintained(system, 5), 5);

  // Two processes, which need little and have nothing open.
  const pid = (await inRoot(system, "cat /run/lightwhale/caretaker")).trim();
  const pids = `${pid} $(pgrep -P ${pid})`;
  const sizes = await system.sh(
    `for pid in ${pids}; do sed -n 's/^Pss: *//p' /proc/$pid/smaps_rollup; done`,
  );
  const kibibytes = sizes.trim().split("\n").map(parseFloat);
  assertEquals(kibibytes.length, 2);
  console.log(`The loop and its sleep take ${kibibytes.join(" + ")} KiB`);
  assert(kibibytes[0] + kibibytes[1] < 2048, sizes);
  const open = await system.sh(
    `for pid in ${pids}; do
       for file in /proc/$pid/fd/? /proc/$pid/fd/1? /proc/$pid/cwd; do
         readlink $file || true
       done
     done | sed 's|^${system.root}||' | sort -u`,
  );
  assertEquals(open, "\n/dev/null\n");

  // A second start has no second one; stop ends it, and what it has begun.
  await s11(system, "start");
  assertEquals(
    await inRoot(system, "cat /run/lightwhale/caretaker"),
    `${pid}\n`,
  );
  await change("sde", "sleep 4324");
  assertEquals(await maintained(system, 6), 6);
  assertMatch(await s11(system, "stop"), /^status 0\n$/);
  await inRoot(system, "umount /home /var /etc");
  assertEquals(await sleepers(system, 4324), "");
  assertEquals(await system.sh(`cat /proc/${pid}/cmdline || true`), "");
});

onBusyBox("start: looks after the disks each hour, or week", async (system) => {
  await prepare(system, { set: { naps_an_hour: 2, naps_a_week: 4 } });
  await s11(system, "start");
  await maintained(system, 3);
  await inRoot(system, "echo 'sleep 4325' >/tmp/maintain");
  const before = await maintained(system, await maintained(system, 3) + 1);
  await inRoot(system, "rm /tmp/maintain");
  await maintained(system, before + 1); // it does not wait for what hangs
  assertEquals(await sleepers(system, 4325), "");
});

onBusyBox("stop calls nothing, and may be called at once", async (system) => {
  await prepare(system, { tool: "touch /tmp/called" });
  assertEquals(await s11(system, "stop"), "status 0\n");
  assertEquals(await inRoot(system, "ls /tmp"), "S11persistence\npartitions\n");
});

onBusyBox("status asks the tool", async (system) => {
  await prepare(system, { tool: 'echo "called with: $*"; exit 1' });
  assertEquals(
    await s11(system, "status"),
    "called with: --status\nstatus 1\n",
  );
});

onBusyBox("restart is refused", async (system) => {
  await prepare(system);
  assertMatch(await s11(system, "restart"), /^Cannot restart .*\nstatus 1\n$/);
});

onBusyBox("without or with a wrong word tells its words", async (system) => {
  await prepare(system);
  for (const word of ["", "begin"]) {
    assertMatch(await s11(system, word), /^Usage: .*\nstatus 2\n$/);
  }
});

onBusyBox("has company: profile.d tells what is wrong", async (system) => {
  await prepare(system);
  await system.sh(
    `cp '${projectFolder}profile.d/persistence.sh' tmp; mkdir run/lightwhale`,
  );
  const login = "set -e; . /tmp/persistence.sh; echo logged in";
  assertEquals(await inRoot(system, login), "logged in\n");
  await system.sh(": >run/lightwhale/health");
  assertEquals(await inRoot(system, login), "logged in\n");
  await system.sh("printf 'One.\\nTwo.\\n' >run/lightwhale/health");
  assertEquals(
    await inRoot(system, login),
    "persistence: One.\npersistence: Two.\nlogged in\n",
  );
});
