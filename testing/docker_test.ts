/** A real Docker Engine on the result of a boot. */
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import {
  type DiskSpec,
  GiB,
  header,
  MiB,
  onDisks,
  type System,
} from "./system.ts";

onDisks(
  "Docker Engine keeps its images and containers over a reboot",
  {
    disks: [{ sizeBytes: 3 * GiB, contents: header }],
    needs: ["dockerd", "busybox"],
    root: `mkdir etc/docker; echo '{"debug": false}' > etc/docker/daemon.json`,
  },
  async (system) => {
    const boot = await system.boot();
    assertEquals(boot.status, 0, boot.stderr);
    await startDocker(system);
    assertStringIncludes(
      await docker(system, "info --format '{{.DockerRootDir}}'"),
      "/mnt/lightwhale-data/lightwhale-state/docker",
    );
    await system.sh(
      `mkdir -p tmp/image/bin; cp /bin/busybox tmp/image/bin/
       ln -s busybox tmp/image/bin/sh`,
    );
    await system.sh(
      `tar -C tmp/image -c . | docker -H unix:///run/docker.sock import - tiny`,
    );
    const inTiny = "--network none tiny /bin/sh -c";
    await docker(
      system,
      `run -d --name kept ${inTiny} 'echo written > /file; busybox sleep 999'`,
    );
    await docker(system, "stop --time 1 kept");
    await stopDocker(system);
    await system.reboot();

    const again = await system.boot();
    assertEquals(again.status, 0, again.stderr);
    await startDocker(system);
    assertStringIncludes(
      await docker(system, "images --format '{{.Repository}}'"),
      "tiny\n",
    );
    assertEquals(
      await docker(system, `run --rm ${inTiny} 'echo it runs'`),
      "it runs\n",
    );
    assertEquals(
      await docker(system, "cp kept:/file - | tar -xO"),
      "written\n",
    );
    await stopDocker(system);
  },
);

/** An archive as `docker save` writes it, of an image that is BusyBox. */
const saveTiny = `
  mkdir -p tmp/image/bin tmp/save; cp /bin/busybox tmp/image/bin/
  ln -s busybox tmp/image/bin/sh
  tar -C tmp/image -cf tmp/save/layer.tar .; cd tmp/save
  id=$(sha256sum < layer.tar | cut -d ' ' -f 1)
  printf '{"architecture": "amd64", "os": "linux", "config": {},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:%s"]}}' $id > config.json
  printf '[{"Config": "config.json", "Layers": ["layer.tar"],
    "RepoTags": ["docker.io/library/tiny:latest"]}]' > manifest.json
  tar -cf ../tiny.tar manifest.json config.json layer.tar`;

for (const mode of ["volatile", "persistent"]) {
  onDisks(
    `containerd as a service, and a Docker Engine that uses it: ${mode}`,
    {
      disks: [{
        sizeBytes: 3 * GiB,
        contents: mode === "persistent" ? header : undefined,
      }],
      needs: ["containerd", "dockerd", "busybox"],
      root: "mkdir -p var/lib/containerd",
    },
    async (system) => {
      const rounds = mode === "persistent" ? ["first", "second"] : ["first"];
      for (const round of rounds) {
        const { status, report, stderr } = await system.boot();
        assertEquals([status, report.mode], [0, mode], stderr);
        await startDocker(system, "", { command: containerd, socket });
        if (round === "first") {
          await system.sh(`(${saveTiny}); ${ctr} image import tmp/tiny.tar
            docker -H unix:///run/docker.sock load < tmp/tiny.tar`);
        }
        const tiny = "docker.io/library/tiny:latest";
        assertEquals(
          await system.sh(
            `# Not on its stdout: /proc is that of the other process namespace.
             mkdir tmp/out; ${ctr} run --rm --null-io --snapshotter overlayfs \\
               --mount "type=bind,src=$PWD/tmp/out,dst=/out,options=bind:rw" \\
               ${tiny} c${round} /bin/sh -c 'echo it runs > /out/said'
             cat tmp/out/said`,
          ),
          "it runs\n",
        );
        assertEquals(
          await docker(
            system,
            "run --rm --network none tiny /bin/sh -c 'echo it runs'",
          ),
          "it runs\n",
        );
        assertStringIncludes(
          await system.sh(
            "ls mnt/lightwhale-data/lightwhale-state/containerd",
          ),
          "io.containerd.snapshotter.v1.overlayfs\n",
        );
        await stopDocker(system);
        await system.reboot();
      }
    },
  );
}

// Docker never starts empty by accident

const gate = "/mnt/lightwhale-data/lightwhale-state/docker";
const dataDisk = `mkfs.btrfs -q -L lightwhale-data "$DISK" >/dev/null`;

/** A data disk is expected, and cannot be used. */
const expected: {
  name: string;
  disk: DiskSpec;
  cmdline?: string;
  /** What the file must say. */
  says: string;
}[] = [
  {
    name: "the superblock is damaged",
    disk: {
      sizeBytes: 300 * MiB,
      contents: `${dataDisk}
        printf xxxx | dd of="$DISK" bs=1 seek=65536 conv=notrunc status=none`,
    },
    says: "super-recover",
  },
  {
    name: "the mount fails",
    disk: {
      sizeBytes: 300 * MiB,
      contents: `${dataDisk} # whose chunk tree is gone
        btrfs inspect-internal dump-super "$DISK" |
          sed -n "s/^chunk_root[[:space:]]\\+//p" | while read -r at; do
            for copy in $at $((at + 8388608)); do
              dd if=/dev/zero of="$DISK" bs=4K seek=$((copy / 4096)) count=4 \
                conv=notrunc status=none
            done
          done`,
    },
    says: "Cannot mount",
  },
  {
    name: "its partition holds no filesystem any more",
    disk: {
      sizeBytes: 300 * MiB,
      contents:
        'echo name=lightwhale-data | sfdisk -q --no-tell-kernel -X gpt "$DISK"',
    },
    says: "holds no filesystem",
  },
  {
    name: "the magic disk is too small",
    disk: { sizeBytes: 50 * MiB, contents: header },
    says: "too small",
  },
  {
    name: "lightwhale.data is not there",
    disk: { sizeBytes: 300 * MiB, contents: dataDisk },
    cmdline: "lightwhale.data=0f2d1c8e-54a4-4e0b-9d55-6f1f3a3c7b11 " +
      "lightwhale.wait=1",
    says: "lightwhale.data",
  },
  {
    name: "lightwhale.persistence=required, and no data disk is there",
    disk: { sizeBytes: 300 * MiB, contents: 'mkfs.ext4 -q -F "$DISK"' },
    cmdline: "lightwhale.persistence=required lightwhale.wait=1",
    says: "lightwhale.persistence",
  },
];

for (const { name, disk, cmdline, says } of expected) {
  onDisks(
    `Docker is held back: ${name}`,
    { disks: [disk], cmdline, needs: ["dockerd", "busybox"] },
    async (system) => {
      const boot = await system.boot();
      assertEquals(
        [boot.status, boot.report.mode],
        [1, "fallback"],
        boot.stderr,
      );
      assertEquals(
        await system.sh(`stat -c '%A %U' .${gate}`),
        "-r--r--r-- root\n",
      );
      const text = await system.sh(`cat .${gate}`);
      assertStringIncludes(text, says);
      assert(boot.report.warnings.some((line) => line.includes(gate)));
      assert(!boot.stderr.includes("Docker keeps its data"), boot.stderr);
      const { stdout } = await system.run([...system.place(), "--status"]);
      assertStringIncludes(stdout, "Fallback");
      assertStringIncludes(stdout, "Docker is held back");
      await assertDockerRefuses(system);
      // Another run changes nothing.
      const again = await system.boot();
      assertEquals([again.status, again.report.mode], [1, "fallback"]);
      assertEquals(await system.sh(`cat .${gate}`), text);

      const commands = text.split("\n").filter((line) =>
        line.startsWith("    ")
      );
      assertEquals(commands.length, 2, text);
      await startDocker(system, commands.join("\n"));
      assertStringIncludes(
        await docker(system, "info --format '{{.DockerRootDir}}'"),
        gate,
      );
      await stopDocker(system);
      const made = `stat -c '%i %A' .${gate}; ls .${gate}`;
      const listed = await system.sh(made);
      assertEquals((await system.boot()).report.mode, "fallback");
      assertEquals(await system.sh(made), listed);
    },
  );
}

const noDisk = { sizeBytes: 300 * MiB, contents: 'mkfs.ext4 -q -F "$DISK"' };

for (
  const [name, disk, cmdline] of [
    ["nothing is enabled", noDisk, ""],
    ["=on is not =required", noDisk, "lightwhale.persistence=on"],
    [
      "=off, whatever the disks say",
      { ...noDisk, contents: dataDisk },
      "lightwhale.persistence=off",
    ],
  ] as [string, DiskSpec, string][]
) {
  onDisks(
    `Docker starts in a volatile system: ${name}`,
    { disks: [disk], cmdline, needs: ["dockerd", "busybox"] },
    async (system) => {
      for (let round = 0; round < 2; round++) {
        const boot = await system.boot();
        assertEquals([boot.status, boot.report.mode], [0, "volatile"]);
      }
      await startDocker(system);
      await stopDocker(system);
    },
  );
}

/** At once, and naming the file that says why. */
async function assertDockerRefuses(system: System): Promise<void> {
  const output = await system.sh(
    `unshare --mount --propagation private sh -c '${asInit}
       timeout 20 ${dockerd} 2>&1 || echo "status $?"'`,
  );
  assertStringIncludes(output, `status 1\n`);
  assertStringIncludes(output, gate);
}

function docker(system: System, words: string): Promise<string> {
  return system.sh(`docker -H unix:///run/docker.sock ${words}`);
}

/** The system's paths, for a process that has a mount namespace of its own. */
const asInit = `
  # Its own /run: not the containerd of this machine, if it runs one.
  mount -t tmpfs run /run; mount -t tmpfs mnt /mnt
  mkdir /mnt/lightwhale-data
  mount --rbind mnt/lightwhale-data /mnt/lightwhale-data
`;

const dockerd = `dockerd --config-file etc/docker/daemon.json \\
  --iptables=false --ip6tables=false --bridge=none \\
  --host unix:///run/docker.sock --exec-root /run/docker \\
  --pidfile /run/docker.pid`;

/** A containerd that is a service of its own, and its client. */
const socket = "/run/containerd/own.sock";
const containerd = `containerd --config /dev/null --address ${socket} \\
  --root "$PWD/var/lib/containerd" --state /run/containerd/own`;
const ctr = `ctr --address ${socket}`;

/**
 * @param first Commands to run as a person who is logged in.
 * @param service A command that runs beside the daemon, and its socket.
 */
async function startDocker(
  system: System,
  first = "",
  service?: { command: string; socket: string },
): Promise<void> {
  const { command, socket } = service ?? { command: ":", socket: "." };
  await system.sh(
    `${asInit}
     ${first}
     # A container has a mount namespace of its own, so it would outlive the
     # system's; a process namespace ends it as well.
     mkfifo tmp/stop
     unshare --pid --fork --kill-child sh -c 'mount -t proc proc /proc
       ${command} & service=$!
       until [ -e ${socket} ]; do sleep 0.1; done
       ${dockerd} ${service ? `--containerd ${socket}` : ""} &
       read word < tmp/stop; kill $!; wait $!
       kill $service; wait $service; rm tmp/stop
     ' > tmp/docker.log 2>&1 &
     for try in $(seq 300); do
       if docker -H unix:///run/docker.sock version >/dev/null 2>&1; then
         exit 0
       fi
       sleep 0.1
     done
     cat tmp/docker.log; exit 1`,
  );
}

/** Ends the daemon with a SIGTERM, as an orderly shutdown does. */
async function stopDocker(system: System): Promise<void> {
  await system.sh(
    "echo stop > tmp/stop; while [ -e tmp/stop ]; do sleep 0.1; done",
  );
}
