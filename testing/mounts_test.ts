/**
 * Mounts of others below /etc, /var and /home, which an overlay would hide.
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { type DiskSpec, header, MiB, onDisks } from "./system.ts";

const root = "touch etc/resolv.conf; mkdir home/guest";
const disks: Record<string, DiskSpec> = {
  persistent: { sizeBytes: 600 * MiB, contents: header },
  // Too small to be formatted.
  fallback: { sizeBytes: 50 * MiB, contents: header },
};

/** What scripts before S11, or an initramfs, may have mounted. */
const others = `
  mount -t tmpfs covered var/log; echo covered > var/log/covered
  mount -t tmpfs log var/log; mkdir var/log/below; echo early > var/log/early
  mount -t tmpfs below var/log/below; echo below > var/log/below/file
  echo nameserver > run/resolv.conf
  mount --bind run/resolv.conf etc/resolv.conf
  mount -t tmpfs -o size=1M guest home/guest; echo hello > home/guest/file`;
const look = `cat var/log/early var/log/below/file etc/resolv.conf \
  home/guest/file; ls var/log`;
const seen = "early\nbelow\nnameserver\nhello\nbelow\nearly\n";

for (const [mode, disk] of Object.entries(disks)) {
  onDisks(
    `mounts of others below the key directories stay visible: ${mode}`,
    { disks: [disk], root },
    async (system) => {
      for (let boots = 0; boots < 2; boots++) {
        await system.sh(others);
        const { report, stderr } = await system.boot();
        assertEquals(report.mode, mode, stderr);
        assert(!/hidden/.test(stderr), stderr);
        assertEquals(await system.sh(look), seen);
        await system.sh("echo mine > etc/mine; echo mine > var/mine");
        const mounts = await system.sh("cat /proc/self/mountinfo");
        await system.boot();
        assertEquals(await system.sh("cat /proc/self/mountinfo"), mounts);
        // Whoever made a mount can take it away again.
        await system.sh("umount home/guest; [ ! -e home/guest/file ]");
        await system.reboot();
      }
      // Below them is what was there all the time, and nothing of theirs.
      await system.boot();
      assertEquals(await system.sh("cat etc/resolv.conf; ls home/guest"), "");
      assertEquals(await system.sh("cat var/log/messages"), "a log\n");
    },
  );
}

onDisks(
  "a mount of others where the user has nothing any more: it is said",
  { disks: [disks.persistent], root },
  async (system) => {
    await system.boot();
    await system.sh(
      "rmdir home/guest; echo own > run/own; ln -sf /run/own etc/resolv.conf",
    );
    await system.reboot();
    await system.sh(others);
    const { status, report } = await system.boot();
    assertEquals([status, report.mode], [0, "persistent"]);
    const [resolv, guest, ...more] = report.warnings.sort();
    assertMatch(resolv, /^The mount on ".*etc\/resolv.conf" is hidden .* link/);
    assertMatch(guest, /^The mount on ".*home\/guest" is hidden .* removed/);
    assertEquals(more, []);
    assertEquals(await system.sh("cat var/log/early"), "early\n");
    assertEquals(await system.sh("readlink etc/resolv.conf"), "/run/own\n");
  },
);
