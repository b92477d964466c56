/** What README.md and `--help` say, compared with what there is. */
import { assert, assertEquals } from "@std/assert";
import { FLAGS, HELP, OPTIONS_WITH_VALUE } from "../persistence.ts";
import { projectFolder } from "./system.ts";

const read = (path: string) => Deno.readTextFileSync(projectFolder + path);
const readme = read("README.md");
const documents = { "--help": HELP, "README.md": readme };
const options = [...FLAGS, ...OPTIONS_WITH_VALUE].map((name) => `--${name}`);

for (const [name, document] of Object.entries(documents)) {
  Deno.test(`${name} tells every option`, () => {
    const told = document.match(/--[a-z][a-z-]*/g);
    assertEquals(options.filter((option) => !told?.includes(option)), []);
  });

  Deno.test(`${name} tells every kernel parameter`, () => {
    const source = read("persistence.ts");
    const parameters = [...source.matchAll(/"(lightwhale\.\w+|noswap)"/g)]
      .map(([, parameter]) => parameter);
    assert(parameters.length >= 5, `${parameters}`);
    assertEquals(parameters.filter((each) => !document.includes(each)), []);
  });
}

Deno.test("--help tells no option that there is not, in 80 columns", () => {
  const told = HELP.match(/--[a-z][a-z-]*/g) ?? [];
  assertEquals(told.filter((option) => !options.includes(option)), []);
  assertEquals(HELP.split("\n").filter((line) => line.length > 80), []);
});

Deno.test("README.md names files, scripts and tests that there are", () => {
  const named = [...readme.matchAll(/`(\w[\w/.]*)`/g)].map(([, name]) => name);
  const files = named.filter((name) =>
    /^(testing|vm|bench|npm_only|profile\.d)\/|_test\.ts$|\.(md|json)$/
      .test(name) && !/^(daemon|persistence)\.json$/.test(name)
  );
  assert(files.length > 20, `${files}`);
  const isThere = (path: string) => {
    try {
      return Boolean(Deno.statSync(projectFolder + path));
    } catch {
      return false;
    }
  };
  assertEquals(files.filter((path) => !isThere(path)), []);

  const { scripts } = JSON.parse(read("package.json"));
  const run = [...readme.matchAll(/npm run ([\w:]+)/g)].map(([, name]) => name);
  assertEquals(run.filter((name) => !(name in scripts)), []);

  const tests = [...readme.matchAll(/`((?:vm|testing)\/\w+\.ts)`, "(.*?)"/g)];
  assert(tests.length > 0);
  for (const [, path, test] of tests) assert(read(path).includes(test), test);
});

Deno.test("README.md names every program that is called", () => {
  const calls = read("persistence.ts").matchAll(/words`([a-z][\w.]*)/g);
  const programs = new Set([...calls].map(([, name]) => name));
  const isNamed = (name: string) =>
    readme.includes(`\`${name}\``) ||
    ["btrfs", "mkfs.btrfs", "sh"].includes(name);
  assert(programs.size > 10, `${programs}`);
  assertEquals([...programs].filter((name) => !isNamed(name)), []);
});

Deno.test("persistence.ts takes as long to read as its header and README.md say", () => {
  const source = read("persistence.ts");
  const hours = (from: string, to: string) => {
    const words = source.slice(source.indexOf(from), source.indexOf(to));
    return words.split(/\s+/).length / 150 / 60;
  };
  const [all, writes] = [
    hours("/**", "// A boot ends here"),
    hours("// Before step 3", "// Step 7"),
  ];
  assert(all > 2.5 && all <= 3.25, `${all} hours`);
  assert(writes > 0.6 && writes <= 1, `${writes} hours`);
});
