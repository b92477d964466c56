/** `daemon.json` as dockerd reads it: what is kept, changed, or only reported. */
import { assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { setDataRoot } from "../persistence.ts";
import { header, MiB, onDisks, type System } from "./system.ts";

const ours = "/mnt/lightwhale-data/lightwhale-state/docker";
const imageRoot = "/opt/docker";
const disks: [{ sizeBytes: number; contents: string }] = [
  { sizeBytes: 600 * MiB, contents: header },
];

// What there was, and what it becomes (`@`: our data root).
const changes: Record<string, string> = {
  "": '{\n  "data-root": "@"\n}\n',
  " \n": ' \n{\n  "data-root": "@"\n}\n',
  "null\n": '{\n  "data-root": "@"\n}\n',
  "{}": '{\n  "data-root": "@"\n}',
  "{ }\n": '{\n  "data-root": "@"\n}\n',
  "\ufeff{}": '\ufeff{\n  "data-root": "@"\n}',
  '{"a":9223372036854775807}': '{"data-root": "@", "a":9223372036854775807}',
  '{\r\n\t"a": 1e400,\r\n\t"a": -0\r\n}\r\n':
    '{\r\n\t"data-root": "@",\r\n\t"a": 1e400,\r\n\t"a": -0\r\n}\r\n',
  '{ "b": 1.0, "a": "\\u0041\\"}," }':
    '{ "data-root": "@", "b": 1.0, "a": "\\u0041\\"}," }',
  '{"data-root" :  "/var/lib/docker" ,"x":{"data-root":"/a"}}':
    '{"data-root" :  "@" ,"x":{"data-root":"/a"}}',
  '{"x": [{"data-root": "/a"}], "data-root": "/var/lib/docker/"}':
    '{"x": [{"data-root": "/a"}], "data-root": "@"}',
  '{"data\\u002droot": "/opt/docker", "data-root": null}':
    '{"data\\u002droot": "/opt/docker", "data-root": "@"}',
  '{"data-root": ""}': '{"data-root": "@"}',
  '{"__proto__": {}, "0": 1, "graph": "/var/lib/docker"}':
    '{"__proto__": {}, "0": 1, "graph": "@"}',
};

for (const [before, change] of Object.entries(changes)) {
  Deno.test(`setDataRoot() changes only what it must in ${JSON.stringify(before)}`, () => {
    const after = change.replace("@", ours);
    const result = { contents: after, dataRoot: ours };
    assertEquals(setDataRoot(before, imageRoot), result);
    assertEquals(setDataRoot(after, imageRoot), result);
  });
}

// What the user chose, the last of which counts; encoding/json ignores null.
const chosen: Record<string, string> = {
  '{"data-root": "/srv/docker"}': "/srv/docker",
  '{"data-root":"/var/lib/docker","data-root":"/a\\u0062","data-root":null}':
    "/ab",
  '{"graph": "/srv/docker"}': "/srv/docker",
  [`{"data-root": "${ours}/"}`]: ours,
};

for (const [contents, dataRoot] of Object.entries(chosen)) {
  Deno.test(`setDataRoot() keeps what the user chose in ${contents}`, () => {
    assertEquals(setDataRoot(contents, imageRoot), { contents, dataRoot });
  });
}

const refused: Record<string, string> = {
  '{"a": 1': "not JSON",
  '{"a": 1}}': "not JSON",
  "\ufeff\ufeff{}": "not JSON",
  '{"a": 01}': "not JSON",
  "[]": "not a JSON object",
  "0": "not a JSON object",
  '{"data-root": 5, "data-root": "/a"}': '"data-root" is not a string',
  '{"Data-Root": "/a"}': 'does not know the key "Data-Root"',
};

for (const [contents, why] of Object.entries(refused)) {
  Deno.test(`setDataRoot() refuses ${contents}`, () => {
    assertThrows(() => setDataRoot(contents), Error, why);
  });
}

const file = "etc/docker/daemon.json";

/** Boots once more, as a person does who has repaired something. */
async function bootAgain(system: System, status = 0) {
  const boot = await system.boot();
  assertEquals([boot.status, boot.report.mode], [status, "persistent"]);
  return boot;
}

const encodings: Record<string, string> = { // and their byte order marks
  "UTF-8": "\\357\\273\\277",
  "UTF-16LE": "\\377\\376",
  "UTF-16BE": "\\376\\377",
};

onDisks(
  "daemon.json keeps its encoding, its digits, its mode, its owner, its link",
  { disks, root: `ln -s /proc/1/root/nothing etc/dangling; mkdir etc/docker` },
  async (system) => {
    await bootAgain(system);
    for (const [name, mark] of Object.entries(encodings)) {
      await system.sh(
        `cd etc/docker; rm daemon.json; ln -s real daemon.json
         { printf '${mark}'
           printf '{ "dns": ["é🐋"], "mtu": 9223372036854775807 }' |
             iconv -f UTF-8 -t ${name}; } > real
         chmod 640 real; chown 3:4 real`,
      );
      const boot = await bootAgain(system);
      assertStringIncludes(boot.stderr, "Docker keeps its data in");
      assertEquals(
        await system.sh(
          `cd etc/docker; readlink daemon.json; stat -c '%a %u:%g' real
           iconv -f ${name} -t UTF-8 real`,
        ),
        `real\n640 3:4\n\ufeff{ "data-root": "${ours}", "dns": ["é🐋"], ` +
          `"mtu": 9223372036854775807 }`,
      );
    }
  },
);

// What stands in the place of daemon.json, and what is said of it.
const unusable: Record<string, [script: string, why: string]> = {
  "a directory": [`mkdir ${file}`, "is not a file"],
  "a link to nothing": [`ln -s nothing ${file}`, "is a symbolic link to noth"],
  "a link to itself": [`ln -s daemon.json ${file}`, "ELOOP"],
  "a FIFO": [`mkfifo ${file}`, "is not a file"],
  "a device": [`mknod ${file} c 1 5`, "is not a file"],
  "half a character": [`printf '\\377\\376{' > ${file}`, "is neither UTF-8"],
  "Latin-1": [`printf '{"a": "\\351"}' > ${file}`, "is neither UTF-8"],
  "broken": [`printf '{"a": ' > ${file}`, "is not JSON ("],
};

onDisks(
  "daemon.json that dockerd would not take is reported and never replaced",
  { disks, root: "mkdir etc/docker" },
  async (system) => {
    await bootAgain(system);
    const list =
      `cd etc/docker; ls -l --time-style=+ daemon.json; readlink daemon.json ||
       if [ -f daemon.json ]; then od -c daemon.json; fi`;
    for (const [name, [script, why]] of Object.entries(unusable)) {
      await system.sh(`rm -rf ${file}; ${script}`);
      const before = await system.sh(list);
      const { report: { errors } } = await bootAgain(system, 1);
      assertEquals(errors.length, 1, name);
      assertStringIncludes(errors[0], "Cannot point Docker at its data", name);
      assertStringIncludes(errors[0], why, name);
      assertStringIncludes(errors[0], `/${file}" is left as it is: repair or`);
      assertEquals(await system.sh(list), before, name);
    }
    await system.sh(
      `rm ${file}; mv etc/docker etc/docker2; ln -s 0 etc/docker`,
    );
    const { report: { errors } } = await bootAgain(system, 1);
    assertStringIncludes(errors[0], "/etc/docker");
    await system.sh(`rm etc/docker; mkdir etc/docker; : > ${file}`);
    await bootAgain(system); // an empty file is an empty configuration
    assertStringIncludes(await system.sh(`cat ${file}`), ours);
  },
);

onDisks(
  "a data-root that the user wrote is kept and said, also over a new image",
  {
    disks,
    root: `mkdir etc/docker; echo '{"data-root": "/opt/image"}' > ${file}`,
  },
  async (system) => {
    await bootAgain(system);
    assertEquals(await system.sh(`cat ${file}`), `{"data-root": "${ours}"}\n`);
    const users = '{"data-root": "/srv/docker"}\n';
    await system.sh(`printf '${users}' > ${file}`);
    await system.reboot({ root: "" });
    for (let times = 0; times < 2; times++) {
      const boot = await bootAgain(system);
      assertEquals(await system.sh(`cat ${file}`), users);
      assertStringIncludes(boot.stderr, 'Docker keeps its data in "/srv/dock');
    }
  },
);
