/**
 * Shows persistence on two image files: enables them, boots on them, writes a
 * file, reboots, shows the file. No real disk is touched, nothing is left.
 *
 *     npm run demo
 *
 * @module
 */
import { GiB, type Result, type System, withSystem } from "./system.ts";

if (Deno.uid() !== 0) {
  console.error(
    "Cannot show this without root: loop devices and mounts need it",
  );
  Deno.exit(1);
}
// Ctrl-C ends the command that runs, which is then cleaned up after, as after
// any other failure.
Deno.addSignalListener("SIGINT", () => console.error("Cleaning up"));

await withSystem({
  disks: [{ sizeBytes: 3 * GiB }, { sizeBytes: 3 * GiB }],
}, async (system) => {
  const paths = system.disks.map(({ path }) => path);

  say("Two empty disks: image files of 3 GiB, as loop devices");
  await show(system, `lsblk -n -d -o NAME,SIZE ${paths.join(" ")}`);

  say("A person enables them");
  expect(
    system,
    await system.run([...system.place(), "--enable", ...paths]),
    `persistence.ts --enable ${paths.join(" ")}`,
  );

  say("What the next boot would do");
  expect(
    system,
    await system.run([...system.place(), "--dry-run"]),
    "persistence.ts --dry-run",
  );

  say("The system boots from its read-only root");
  expect(system, await system.boot(), "S11persistence start");
  await show(system, "findmnt -R -n -o TARGET,SOURCE,FSTYPE .");
  expect(
    system,
    await system.run([...system.place(), "--status"]),
    "persistence.ts --status",
  );

  say("Somebody writes to the read-only system");
  await show(system, "echo 'Hello from before the reboot' > home/hello.txt");
  await show(system, "ls -l home");

  say("Reboot");
  await system.reboot();
  await show(system, "ls -l home # before S11persistence");
  expect(system, await system.boot(), "S11persistence start");
  await show(system, "cat home/hello.txt");
});
say("All gone again: the disks, the mounts, the swap");

function say(text: string): void {
  console.log(`\n# ${text}`);
}

/** Shows what the tool said; the demo ends if it failed. */
function expect(
  system: System,
  { status, stdout, stderr }: Result,
  line: string,
): void {
  print(system, line, stdout + stderr);
  if (status !== 0) throw new Error(`${line} failed with status ${status}`);
}

async function show(system: System, line: string): Promise<void> {
  print(system, line, await system.sh(line));
}

/** Prints a command and what it said, with paths as the system sees them. */
function print({ root }: System, line: string, text: string): void {
  console.log(`$ ${line}`);
  const said = text.replaceAll(`${root}/`, "/").replaceAll(root, "/").trimEnd();
  if (said) console.log(said);
}
