/**
 * The programs that tests and the demo need, and how they get here: what is
 * missing is installed, nothing else is touched.
 *
 * @module
 */

/** Debian's package for each program. */
const packages = {
  "btrfs": "btrfs-progs",
  "busybox": "busybox-static",
  "containerd": "containerd",
  "cpio": "cpio",
  "cryptsetup": "cryptsetup-bin",
  "depmod": "kmod",
  "dmesg": "util-linux",
  "dockerd": "docker.io",
  "dropbearkey": "dropbear-bin",
  "fsfreeze": "util-linux",
  "getfattr": "attr",
  "losetup": "mount",
  "lvm": "lvm2",
  "make-bcache": "bcache-tools",
  "mkfs.btrfs": "btrfs-progs",
  "mkfs.exfat": "exfatprogs",
  "mkfs.ext4": "e2fsprogs",
  "mkfs.f2fs": "f2fs-tools",
  "mkfs.jfs": "jfsutils",
  "mkfs.nilfs2": "nilfs-tools",
  "mkfs.reiserfs": "reiserfsprogs",
  "mkfs.vfat": "dosfstools",
  "mkfs.xfs": "xfsprogs",
  "mkntfs": "ntfs-3g",
  "mksquashfs": "squashfs-tools",
  "msmtp": "msmtp",
  "mkudffs": "udftools",
  "nsenter": "util-linux",
  "partx": "util-linux",
  "pvcreate": "lvm2",
  "qemu-system-x86_64": "qemu-system-x86",
  "setfattr": "attr",
  "sfdisk": "fdisk",
  "shellcheck": "shellcheck",
  "time": "time",
  "wget": "wget",
  "xorriso": "xorriso",
};

/** A program that can be installed where it is missing. */
export type Program = keyof typeof packages;

/** Where the tool, its tests and init look for programs. */
export const systemPath = "/usr/sbin:/usr/bin:/sbin:/bin";

/**
 * Installs the packages of the programs that are missing.
 *
 * @param programs Names from the table above.
 * @throws {Error} If a program is still missing afterwards.
 */
export function needPrograms(...programs: Program[]): void {
  const missing = programs.filter((program) => !isInstalled(program));
  if (missing.length === 0) return;

  const wanted = [...new Set(missing.map((program) => packages[program]))];
  if (Deno.uid() === 0 && isInstalled("apt-get")) {
    console.error(`Installing ${wanted.join(", ")} for ${missing.join(", ")}`);
    aptGet("update", "-qq");
    aptGet("install", "-qq", "-y", "--no-install-recommends", ...wanted);
  }
  const stillMissing = missing.filter((program) => !isInstalled(program));
  if (stillMissing.length > 0) {
    throw new Error(
      `Cannot go on without ${stillMissing.join(", ")}: ` +
        `install the packages ${wanted.join(", ")}`,
    );
  }
}

function isInstalled(program: string): boolean {
  return systemPath.split(":").some((folder) => {
    try {
      return Deno.statSync(`${folder}/${program}`).isFile;
    } catch {
      return false;
    }
  });
}

function aptGet(...args: string[]): void {
  const { success } = new Deno.Command("apt-get", {
    args,
    env: { DEBIAN_FRONTEND: "noninteractive" },
    stdin: "null",
    stdout: "null",
    stderr: "inherit",
  }).outputSync();
  if (!success) console.error(`apt-get ${args.join(" ")} failed`);
}
