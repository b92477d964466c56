/**
 * Boot the virtual machine to play with: log in on the console, enable disks,
 * reboot, pull one. Its disks stay between runs (vm/cache/play).
 *
 *     npm run vm -- [--disks N] [--size MIB] [--bus BUS] [--append WORDS] [--new]
 */
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs } from "@std/cli/parse-args";
import {
  type Bus,
  machineArguments,
  makeDisk,
  systemImage,
  type VmDisk,
} from "./vm.ts";

const options = parseArgs(Deno.args, {
  string: ["disks", "size", "bus", "append"],
  boolean: ["new"],
  default: { disks: "2", size: "4096", bus: "scsi", append: "" },
});
const dir = fileURLToPath(new URL("cache/play", import.meta.url));
if (options.new && existsSync(dir)) Deno.removeSync(dir, { recursive: true });
Deno.mkdirSync(dir, { recursive: true });

const disks = Array.from({ length: Number(options.disks) }, (_, i): VmDisk => {
  const file = `${dir}/disk${i}.img`;
  if (!existsSync(file)) makeDisk(file, { sizeMiB: Number(options.size) });
  return { file, bus: options.bus as Bus };
});

console.log(`
The disks are empty at first:  persistence.ts --enable /dev/sda /dev/sdb; reboot
Pull the second one:           Ctrl-A C, then: device_del disk1 (and Ctrl-A C)
Cut the power:                 Ctrl-A X, or: poweroff
Start with one disk only:      npm run vm -- --disks 1
Start anew:                    npm run vm -- --new
`);
const { code } = await new Deno.Command("qemu-system-x86_64", {
  args: [
    ...machineArguments({
      disks,
      image: systemImage(),
      append: options.append,
    }),
    // The console for the person; nobody listens to the second port.
    ...["-serial", "mon:stdio", "-serial", "null"],
  ],
}).spawn().status;
Deno.exit(code);
