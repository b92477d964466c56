/** The init script, run by BusyBox as on the target. */
import { assertEquals, assertMatch } from "@std/assert";
import { MiB, onDisks, projectFolder, type System } from "./system.ts";

const disk = { sizeBytes: 4 * MiB };

/** Stands in /usr/sbin and tells how it was called. */
const probe = `#!/bin/sh
tr '\\0' '\\n' < /proc/$$/environ > ROOT/tmp/environ
readlink /proc/$$/fd/0 > ROOT/tmp/stdin
echo "called with: $*"
echo "persistence: a message" >&2
exit "$(cat ROOT/tmp/status)"
`;

async function s11(
  system: System,
  words: string,
  { status = 0 } = {},
): Promise<string> {
  await system.sh(
    `mkdir -p tmp/sbin; echo ${status} > tmp/status
     cat > tmp/sbin/persistence.ts <<'EOF'
${probe.replaceAll("ROOT", system.root)}
EOF
     chmod 755 tmp/sbin/persistence.ts
     [ -e /usr/sbin/persistence.ts ] ||
       mount -t overlay -o lowerdir=$PWD/tmp/sbin:/usr/sbin sbin /usr/sbin
     mount --bind mnt /mnt`,
  );
  return await system.sh(
    `status=0
     BUN_OPTIONS=--version BUN_BE_BUN=1 DENO_DIR=/tmp PATH=/bin:/somewhere \\
       busybox ash '${projectFolder}S11persistence' ${words} 2>&1 || status=$?
     echo "status $status"`,
  );
}

function onInit(name: string, test: (system: System) => Promise<void>): void {
  onDisks(`S11persistence ${name}`, {
    disks: [disk],
    needs: ["busybox"],
  }, test);
}

onInit("start: clean environment, result, status", async (system) => {
  assertEquals(
    await s11(system, "start"),
    `called with: 
persistence: a message
Starting persistence: OK
status 0
`,
  );
  assertEquals(
    await system.sh("cat tmp/environ tmp/stdin"),
    `PATH=/usr/sbin:/usr/bin:/sbin:/bin
UV_THREADPOOL_SIZE=128
BUN_JSC_useJIT=0
/dev/null
`,
  );
});

onInit("start: a failure is passed on", async (system) => {
  assertMatch(
    await s11(system, "start", { status: 1 }),
    /\nStarting persistence: FAIL\nstatus 1\n$/,
  );
});

onInit("start with stdin closed", async (system) => {
  assertMatch(await s11(system, "start <&-"), /OK\nstatus 0\n$/);
  assertEquals(await system.sh("cat tmp/stdin"), "/dev/null\n");
});

onInit("stop calls nothing", async (system) => {
  assertEquals(await s11(system, "stop"), "status 0\n");
});

onInit("status asks the tool", async (system) => {
  assertEquals(
    await s11(system, "status", { status: 1 }),
    "called with: --status\npersistence: a message\nstatus 1\n",
  );
});

onInit("restart is refused", async (system) => {
  assertMatch(await s11(system, "restart"), /^Cannot restart .*\nstatus 1\n$/);
});

onInit("without or with a wrong word tells its words", async (system) => {
  for (const word of ["", "begin"]) {
    assertMatch(await s11(system, word), /^Usage: .*\nstatus 2\n$/);
  }
});
