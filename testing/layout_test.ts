/** What a boot makes on the data filesystem and mounts, and what it finds there. */
import {
  assert,
  assertEquals,
  assertMatch,
  assertStringIncludes,
} from "@std/assert";
import {
  type Boot,
  type DiskSpec,
  header,
  MiB,
  onDisks,
  type System,
} from "./system.ts";

const state = "mnt/lightwhale-data/lightwhale-state";
const sizeBytes = 600 * MiB;
const magicDisk: DiskSpec = { sizeBytes, contents: header };
const containerdImage = "mkdir -p var/lib/containerd";

/** Mounts the top level of the data filesystem and runs a script in it. */
function inTopLevel(system: System, script: string): Promise<string> {
  const [{ path }] = system.disks;
  return system.sh(
    `mkdir -p tmp/top; node=$(ls -r ${path}p* 2>/dev/null | head -n 1)
     mount -o subvolid=5 \${node:-${path}} tmp/top
     (cd tmp/top; ${script}); umount tmp/top`,
  );
}

onDisks("what a first boot makes: subvolumes, compression, modes, no atime", {
  disks: [magicDisk],
  root: containerdImage,
}, async (system) => {
  const list = `for name in docker containerd; do
      stat -c '%i %a %n' $name; btrfs property get $name compression
    done
    # What is made later, by overlayfs and in a subvolume of a subvolume.
    btrfs property get overlay/upper/etc/new compression
    btrfs property get overlay/upper/var/lib/old compression
    btrfs property get docker/layer/file compression
    btrfs property get . compression`;
  const expected = "256 710 docker\ncompression=zstd\n" +
    "256 711 containerd\n" + "compression=zstd\n".repeat(5);
  for (const round of ["first", "second"]) {
    const boot = await system.boot();
    assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
    await system.sh(
      `echo ${round} > etc/new; echo ${round} >> var/lib/old
       cd ${state}/docker; [ -e layer ] || btrfs -q subvolume create layer
       echo ${round} > layer/file`,
    );
    assertEquals(await system.sh(`cd ${state}; ${list}`), expected);
    assertEquals(
      await system.sh(
        `findmnt --submounts --noheadings --raw --output OPTIONS mnt/lightwhale-data etc var home |
         grep -cv noatime; cd ${state}; cat /proc/self/mountinfo > /dev/null`,
      ).catch(() => "0\n"),
      "0\n",
    );
    for (const file of ["etc/new", `${state}/docker/layer/file`]) {
      await system.sh(
        `touch -a -d 2001-01-01 ${file}; cat ${file} > /dev/null
         test "$(stat -c %X ${file})" = "$(date -d 2001-01-01 +%s)"`,
      );
    }
    await system.reboot();
  }
});

onDisks("a volatile system: noatime, and containerd's root is on the tmpfs", {
  disks: [{ sizeBytes }],
  root: containerdImage,
}, async (system) => {
  await assertContainerd(system, await system.boot(), "volatile");
});

/** Bound to the data filesystem, once, with the mode that containerd gives. */
async function assertContainerd(
  system: System,
  boot: Boot,
  mode: Boot["report"]["mode"],
) {
  assertEquals([boot.report.mode, boot.status], [mode, 0], boot.stderr);
  for (let times = 0; times < 2; times++) {
    assertEquals(
      await system.sh(
        `echo here > var/lib/containerd/kept; cat ${state}/containerd/kept
         stat -c %a var/lib/containerd
         findmnt --noheadings --raw --output OPTIONS var/lib/containerd |
           grep -o noatime; findmnt --list | grep -c ' .*containerd\\b'`,
      ).then((text) => text.split("\n").slice(0, 3).join()),
      "here,711,noatime",
    );
    const mounts = await system.sh("grep -c var/lib/containerd /proc/mounts");
    assertEquals(mounts, "1\n");
    await system.boot();
  }
}

/** A filesystem as older versions made it; `$STATE` is its state. */
const madeBy = (script: string) => ({
  sizeBytes,
  contents: `mkfs.btrfs -q -L lightwhale-data "$DISK" >/dev/null
    folder=$(mktemp -d); mount "$DISK" $folder; cd $folder
    for name in @lightwhale-data @lightwhale-state @lightwhale-state-snapshots
    do btrfs -q subvolume create $name; done
    STATE=@lightwhale-state
    mkdir -p $STATE/overlay/upper/etc $STATE/overlay/work/etc $STATE/docker
    echo kept > $STATE/overlay/upper/etc/kept
    ${script}
    cd /; umount $folder; rmdir $folder`,
});

onDisks("an older disk keeps its layout; containerd gets a directory", {
  disks: [madeBy("")],
  root: containerdImage,
}, async (system) => {
  await assertContainerd(system, await system.boot(), "persistent");
  const list = await inTopLevel(
    system,
    `btrfs subvolume list . | awk '{ print $NF }' | sort
     btrfs property get @lightwhale-state compression`,
  );
  assertEquals(
    list,
    "@lightwhale-data\n@lightwhale-state\n@lightwhale-state-snapshots\n",
  );
});

onDisks("nothing hides what a containerd wrote into its overlay", {
  disks: [madeBy(
    `mkdir -p $STATE/overlay/upper/var/lib/containerd
     echo kept > $STATE/overlay/upper/var/lib/containerd/meta.db`,
  )],
  root: `${containerdImage}/io.containerd.image`,
}, async (system) => {
  const boot = await system.boot();
  assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
  assertStringIncludes(boot.report.warnings.join(), "move that there, reboot");
  await system.sh(
    `mv var/lib/containerd/meta.db ${state}/containerd/`,
  );
  await system.reboot();
  await assertContainerd(system, await system.boot(), "persistent");
  assertEquals(await system.sh("cat var/lib/containerd/meta.db"), "kept\n");
});

// Read-only subvolumes, as a rollback by hand leaves them

const readOnly = (path: string) => `btrfs property set -ts ${path} ro true`;
const nested = (path: string) =>
  `mv ${path} old; btrfs -q subvolume create ${path}
   cp -a old/. ${path}; rm -r old`;

/** Subvolumes that a boot needs, and how they become read-only. */
const readOnlySubvolumes: Record<string, string> = {
  "@lightwhale-state": "",
  "@lightwhale-data": "",
  "@lightwhale-state/overlay/upper/etc": nested("$STATE/overlay/upper/etc"),
  "@lightwhale-state/overlay": nested("$STATE/overlay"),
};

for (const [path, script] of Object.entries(readOnlySubvolumes)) {
  onDisks(`${path} is read-only: named, with the command that cures it`, {
    disks: [madeBy(`${script}\n${readOnly(path)}`)],
  }, async (system) => {
    const boot = await system.boot();
    assertEquals([boot.status, boot.report.mode], [1, "fallback"], boot.stderr);
    assertEquals(boot.report.errors.length, 1, boot.stderr);
    const [error] = boot.report.errors;
    assertStringIncludes(error, `the subvolume /${path} on /dev/loop`);
    assertEquals(
      await system.sh("cat etc/kept 2>&1 || :"),
      "cat: etc/kept: No such file or directory\n",
    );
    await system.sh("touch etc/x var/x home/x mnt/lightwhale-data/x");
    const [, cure] = /\("([^"]*)"/.exec(error)!;
    await system.sh(`mkdir -p /run/top && umount /run/top 2>/dev/null || :
      rmdir /run/top; ${cure}; umount /run/top; rmdir /run/top`);
    await system.reboot();
    const again = await system.boot();
    assertEquals([again.status, again.report.mode], [0, "persistent"]);
    assertEquals(await system.sh("cat etc/kept; touch home/x"), "kept\n");
  });
}

onDisks("a FIFO in the place of a file of ours holds nobody up", {
  disks: [madeBy(
    "mkfifo $STATE/.maintenance.json $STATE/payload.json $STATE/.pending-scrub",
  )],
}, async (system) => {
  assertEquals((await system.boot()).status, 0);
  for (const args of [["--status"], ["--check"], ["--maintain"]]) {
    const line = [...system.place(), ...args];
    assertEquals((await system.run(line)).signal, null, `${args}`);
  }
});

onDisks(
  "a snapshot takes the place of the state: it has no images, and that is said",
  {
    disks: [madeBy(
      `rmdir $STATE/docker; btrfs -q subvolume create $STATE/docker
     echo kept > $STATE/docker/image
     mv $STATE old; btrfs -q subvolume snapshot old $STATE`,
    )],
  },
  async (system) => {
    const boot = await system.boot();
    assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
    const [warning] = boot.report.warnings;
    assertMatch(warning, /state\/docker on .* no snapshot includes; .*rmdir/);
    const [, cure] = /\("([^"]*)"/.exec(warning)!;
    await system.sh(`${cure}
    mv /run/top/old/docker /run/top/@lightwhale-state/docker
    umount /run/top; rmdir /run/top`);
    await system.reboot();
    assertEquals((await system.boot()).report.warnings, []);
    assertEquals(
      await system.sh(`cat ${state}/docker/image etc/kept`),
      "kept\nkept\n",
    );
  },
);

for (
  const path of ["@lightwhale-state-snapshots", "@lightwhale-state/docker"]
) {
  onDisks(`${path} is read-only: only said, for the system runs without`, {
    disks: [madeBy(
      `rmdir $STATE/docker; btrfs -q subvolume create $STATE/docker
       ${readOnly(path)}`,
    )],
  }, async (system) => {
    const boot = await system.boot();
    assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
    assertEquals(boot.report.warnings.length, 1, boot.stderr);
    assertStringIncludes(boot.report.warnings[0], `subvolume /${path} on`);
    assertEquals(await system.sh("cat etc/kept; touch home/x"), "kept\n");
  });
}

// Something else in the place of a subvolume

const plain = (name: string) =>
  `mv ${name} subvolume; cp -a subvolume ${name}
   btrfs -q subvolume delete subvolume >/dev/null`;

const plainDirectories: Record<string, string> = {
  "the state": plain("@lightwhale-state"),
  "the data": plain("@lightwhale-data"),
  "the snapshots": plain("@lightwhale-state-snapshots"),
  "everything": ["", "-state", "-state-snapshots"].map((name) =>
    plain(`@lightwhale${name || "-data"}`)
  ).join("\n"),
};

for (const [what, script] of Object.entries(plainDirectories)) {
  onDisks(`${what} in a plain directory, as a backup restores it, is used`, {
    disks: [madeBy(script)],
  }, async (system) => {
    for (const round of [1, 2]) {
      const boot = await system.boot();
      assertEquals([boot.status, boot.report.mode], [0, "persistent"]);
      assertEquals(boot.report.warnings, []);
      const data = "mnt/lightwhale-data";
      const [file, snapshots] = [`${data}/f`, `${state}-snapshots/f`];
      assertEquals(
        await system.sh(
          `cat etc/kept; for f in home/f ${file} ${snapshots}; do
             echo ${round} >> $f; done; cat home/f ${file} ${snapshots}
           findmnt --noheadings --output OPTIONS ${state} | grep -c noatime`,
        ),
        "kept\n" + (round === 1 ? "1\n" : "1\n2\n").repeat(3) + "1\n",
      );
      const again = await system.boot();
      assertEquals([again.status, again.report.mode], [0, "persistent"]);
      await system.reboot();
    }
    const found = await inTopLevel(system, "ls; cat @lightwhale-state-snap*/f");
    assertEquals(
      found,
      "@lightwhale-data\n@lightwhale-state\n@lightwhale-state-snapshots\n1\n2\n",
    );
  });
}

const others: Record<string, string> = {
  "a file": "mv $name aside; echo kept > $name",
  "a link to nothing": "mv $name aside; ln -s nothing $name",
  "a link to a directory": "mv $name aside; mkdir d; ln -s d $name",
};

for (const [what, script] of Object.entries(others)) {
  onDisks(`${what} in the place of a subvolume is named and not replaced`, {
    disks: [madeBy(`name=@lightwhale-state; ${script}`)],
  }, async (system) => {
    for (const name of ["@lightwhale-state", "@lightwhale-data"]) {
      const list = "ls -lA --time-style=+ | sed '/^d/d'";
      const before = await inTopLevel(system, list);
      const boot = await system.boot();
      assertEquals([boot.status, boot.report.mode], [1, "fallback"]);
      assertStringIncludes(
        boot.report.errors.join("\n"),
        `"/${name}" in the data filesystem on /dev/loop`,
      );
      assert(!/wrong fs type/.test(boot.stderr), boot.stderr);
      await system.reboot();
      assertEquals(await inTopLevel(system, list), before);
      await inTopLevel(
        system,
        `rm -r @lightwhale-state; mv aside @lightwhale-state
         rm -rf d; name=@lightwhale-data; ${script}`,
      ).catch(() => {}); // the second time
    }
  });
}

onDisks("docker is a link to a disk that is mounted later: it stays", {
  disks: [magicDisk],
}, async (system) => {
  await system.boot();
  const link = "../../../home/archive/docker";
  await system.sh(`cd ${state}; rmdir docker; ln -s ${link} docker`);
  await system.reboot();
  const { status, report, stderr } = await system.boot();
  assertEquals([status, report.mode], [0, "persistent"], stderr);
  const found = await system.sh(`readlink ${state}/docker; ls home`);
  assertEquals(found, `${link}\n`);
});

for (
  const [what, script] of Object.entries({
    "work is a link to upper": "mv work old; ln -s upper work",
    "upper is a link to work":
      "rm -r work/*; mv upper/* work; rmdir upper; ln -s work upper",
    "the work of /etc is a link to its upper":
      "rm -r work/etc; ln -s ../upper/etc work/etc",
    "there is a file in the work of /etc, where the kernel makes a directory":
      "rmdir work/etc/work; echo > work/etc/work",
  })
) {
  onDisks(`${what}: nothing of the user's is deleted`, {
    disks: [magicDisk],
  }, async (system) => {
    await system.boot();
    await system.sh(`echo own > etc/own; cd ${state}/overlay; ${script}`);
    await system.reboot();
    await system.boot();
    await system.sh("touch etc/new var/new home/new");
    const upper = "@lightwhale-state/overlay/upper";
    const found = await inTopLevel(system, `cat ${upper}/etc/own`);
    assertEquals(found, "own\n");
  });
}
