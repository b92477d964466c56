/** A real Docker Engine on the result of a boot. */
import { assertEquals, assertStringIncludes } from "@std/assert";
import { GiB, header, onDisks, type System } from "./system.ts";

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

function docker(system: System, words: string): Promise<string> {
  return system.sh(`docker -H unix:///run/docker.sock ${words}`);
}

async function startDocker(system: System): Promise<void> {
  await system.sh(
    `# The daemon's own /run: not the machine's containerd, if it runs one.
     mount -t tmpfs run /run; mount -t tmpfs mnt /mnt
     mkdir /mnt/lightwhale-data
     mount --rbind mnt/lightwhale-data /mnt/lightwhale-data
     # A container has a mount namespace of its own, so it would outlive the
     # system's; a process namespace ends it as well.
     mkfifo tmp/stop
     unshare --pid --fork --kill-child sh -c 'mount -t proc proc /proc
       dockerd --config-file etc/docker/daemon.json \\
         --iptables=false --ip6tables=false --bridge=none \\
         --host unix:///run/docker.sock --exec-root /run/docker \\
         --pidfile /run/docker.pid &
       read word < tmp/stop; kill $!; wait $!; rm tmp/stop
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
