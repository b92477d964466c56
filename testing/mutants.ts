/**
 * Breaks persistence.ts in one place at a time and sees whether the pure tests
 * notice: a test that no mistake makes fail tests nothing.
 *
 *     npm run test:mutants                      all mutants
 *     COUNT=300 SEED=1 npm run test:mutants     some of them, drawn by a seed
 *     ONLY=sortOutMembers npm run test:mutants  those of one function
 *
 * It mutates all that decides, and the on-disk formats. Survivors that no pure
 * test can catch are listed, each with its reason, in mutants_survivors.ts. The
 * exit status is 1 where fewer than 95 % of the others are caught.
 *
 * @module
 */
import ts from "typescript";
import { survivors } from "./mutants_survivors.ts";
import { countFrom, diceOf } from "./random.ts";
import { projectFolder } from "./system.ts";

/** Sections of persistence.ts whose title begins so. */
const sections = ["On-disk formats", "Decide"];

/** Pure functions elsewhere; those that do not exist are passed over. */
const functions = [
  "balanceFilters",
  "byName",
  "convertProfiles",
  "decideJob",
  "isStartedOver",
  "joinMagic",
  "nameOf",
  "nodeOf",
  "parseKernelCommandLine",
  "parseMountinfo",
  "parsePartname",
  "parseSeconds",
  "parseStart",
  "partitionNumber",
  "partitionPath",
  "partitionPrefix",
  "rebuildStale",
  "releaseTarget",
  "removeMissing",
  "replaceMissing",
  "scrub",
  "unescapeOctal",
  "waitForKernel",
];

/** The pure tests: what caught the last mutant comes first. */
let tests = [
  "testing/formats_test.ts",
  "testing/holds_test.ts",
  "testing/decide_test.ts",
  "testing/fuzz_test.ts",
];

/** A fuzz test of so many cases takes less than a second. */
const testEnvironment = { SEED: "1", CASES: "100", NO_COLOR: "1" };
const atATime = 2;
const neededPercent = 95;

/** One change of persistence.ts. */
interface Mutant {
  /** Name of the function, constant or type that it is in. */
  where: string;
  line: number;
  operator: string;
  /** What is changed, "before -> after", on one line. */
  change: string;
  source: string;
}

type Outcome = "caught" | "survived" | "invalid";

const file = "persistence.ts";
const original = Deno.readTextFileSync(`${projectFolder}${file}`);
const tree = ts.createSourceFile(file, original, ts.ScriptTarget.Latest, true);

async function main(): Promise<number> {
  const every = findMutants();
  const only = Deno.env.get("ONLY");
  const possible = only ? every.filter(({ where }) => where === only) : every;
  const seed = countFrom("SEED", 1);
  const mutants = draw(possible, countFrom("COUNT", possible.length), seed);
  console.log(
    `SEED=${seed} COUNT=${mutants.length} of ${every.length} mutants in ` +
      `${new Set(every.map(({ where }) => where)).size} declarations`,
  );
  const outcomes = await tryAll(mutants);

  const survived = mutants.filter((mutant) =>
    outcomes.get(mutant) === "survived"
  );
  const known = survived.filter((mutant) => survivorOf(mutant));
  const unknown = survived.filter((mutant) => !survivorOf(mutant));
  for (const { line, where, operator, change } of unknown) {
    console.log(`survived: ${file}:${line} ${where}: ${operator}\n  ${change}`);
  }
  for (const listed of survivors) {
    const its = (mutants: Mutant[]) =>
      mutants.filter((mutant) => survivorOf(mutant) === listed);
    const why = its(every).length === 0
      ? "does not exist"
      : its(mutants).some((mutant) => outcomes.get(mutant) === "caught")
      ? "is caught"
      : undefined;
    if (!why || (why === "is caught" && !listed.change)) continue;
    const { where, change = "all" } = listed;
    console.log(`listed, but ${why}: ${where}: ${change}`);
  }
  const count = (outcome: Outcome) =>
    [...outcomes.values()].filter((other) => other === outcome).length;
  const caught = count("caught");
  const percent = 100 * caught / Math.max(1, caught + unknown.length);
  console.log(
    `${mutants.length} mutants: ${caught} caught, ${unknown.length} ` +
      `survived, ${known.length} survived as listed, ${count("invalid")} ` +
      `invalid; ${percent.toFixed(1)} % caught`,
  );
  return percent < neededPercent ? 1 : 0;
}

/** Draws some without looking, in the order of the file. */
function draw(mutants: Mutant[], count: number, seed: number): Mutant[] {
  const random = diceOf(seed);
  const left = [...mutants];
  while (left.length > count) left.splice(random.below(left.length), 1);
  return left;
}

function survivorOf({ where, change }: Mutant) {
  return survivors.find((listed) =>
    listed.where === where && (listed.change ?? change) === change
  );
}

// Making mutants

/** All mutants, in the order of the file, none twice. */
function findMutants(): Mutant[] {
  const mutants = new Map<string, Mutant>();
  const parts = findSections();
  for (const statement of tree.statements) {
    const at = statement.getStart();
    const inSection = parts.some(({ from, to }) => at >= from && at < to);
    for (const [where, node] of declarations(statement)) {
      if (!inSection && !functions.includes(where)) continue;
      visit(node, (node) => {
        for (const mutation of mutationsOf(node)) {
          const mutant = { where, ...apply(mutation) };
          mutants.set(mutant.source, mutants.get(mutant.source) ?? mutant);
        }
      });
    }
  }
  return [...mutants.values()];
}

/** A section: a rule, a line with its title, a rule, and what follows. */
function findSections(): { from: number; to: number }[] {
  const headings = [...original.matchAll(/^\/\/ -+\n\/\/ (.*)\n\/\/ -+$/gm)];
  const found = headings.map(({ 1: title, index }, i) => ({
    title,
    from: index,
    to: headings[i + 1]?.index ?? original.length,
  }));
  for (const title of sections) {
    if (!found.some((section) => section.title.startsWith(title))) {
      throw new Error(`Cannot find the section "${title}" in ${file}`);
    }
  }
  return found.filter(({ title }) =>
    sections.some((start) => title.startsWith(start))
  );
}

/** Functions and constants of a statement of the file, by their names. */
function declarations(statement: ts.Statement): [string, ts.Node][] {
  if (ts.isFunctionDeclaration(statement)) {
    return [[statement.name?.text ?? "", statement]];
  }
  if (!ts.isVariableStatement(statement)) return [];
  return statement.declarationList.declarations
    .map((declaration) => [declaration.name.getText(), declaration]);
}

function visit(node: ts.Node, use: (node: ts.Node) => void): void {
  // What is said, or done, is another matter than what is decided.
  if (ts.isTypeNode(node) || ts.isTemplateSpan(node) || isAsync(node)) return;
  use(node);
  ts.forEachChild(node, (child) => visit(child, use));
}

function isAsync(node: ts.Node): boolean {
  return ts.canHaveModifiers(node) &&
    ts.getModifiers(node)?.some(({ kind }) =>
        kind === ts.SyntaxKind.AsyncKeyword
      ) === true;
}

/** What is put in the place of a node, or of a part of the file. */
interface Mutation {
  operator: string;
  node: ts.Node;
  /** Default: all of the node. */
  range?: [from: number, to: number];
  replacement: string;
  /** Default: the node, before and after, with what is around it. */
  change?: string;
}

function apply(mutation: Mutation) {
  const { operator, node, replacement } = mutation;
  const [from, to] = mutation.range ?? [node.getStart(), node.getEnd()];
  const source = original.slice(0, from) + replacement + original.slice(to);
  // With what is around it, as far as that is short.
  let shown = node;
  while (
    shown.getWidth() < 24 && shown.parent.getWidth() < 100 &&
    !ts.isBlock(shown.parent)
  ) {
    shown = shown.parent;
  }
  const [start, end] = [shown.getStart(), shown.getEnd()];
  const oneLine = (text: string) => text.replace(/\s+/g, " ").trim();
  const before = oneLine(original.slice(start, end));
  const after = oneLine(
    source.slice(start, end + replacement.length - (to - from)),
  );
  return {
    operator,
    source,
    line: tree.getLineAndCharacterOfPosition(from).line + 1,
    change: mutation.change ?? `${before} -> ${after}`,
  };
}

const swappedOperators: Partial<Record<ts.SyntaxKind, string>> = {
  [ts.SyntaxKind.LessThanToken]: "<=",
  [ts.SyntaxKind.LessThanEqualsToken]: "<",
  [ts.SyntaxKind.GreaterThanToken]: ">=",
  [ts.SyntaxKind.GreaterThanEqualsToken]: ">",
  [ts.SyntaxKind.EqualsEqualsEqualsToken]: "!==",
  [ts.SyntaxKind.ExclamationEqualsEqualsToken]: "===",
  [ts.SyntaxKind.MinusToken]: "+",
};

const swappedNames: Record<string, string> = {
  every: "some",
  some: "every",
  max: "min",
  min: "max",
};

/** Methods without which a list is still a list. */
const droppedMethods = ["filter", "sort"];

/** All ways in which this node can be wrong, without those of its children. */
function mutationsOf(node: ts.Node): Mutation[] {
  if (ts.isBinaryExpression(node)) return mutateBinary(node);
  if (ts.isConditionalExpression(node)) return mutateConditional(node);
  if (ts.isIfStatement(node)) return mutateIf(node);
  if (ts.isWhileStatement(node)) return [negated(node.expression)];
  if (ts.isPrefixUnaryExpression(node)) {
    if (node.operator !== ts.SyntaxKind.ExclamationToken) return [];
    const replacement = `(${node.operand.getText()})`;
    return [{ operator: 'drop a "!"', node, replacement }];
  }
  if (ts.isNumericLiteral(node)) return mutateNumber(node);
  if (ts.isCallExpression(node)) return mutateCall(node);
  if (ts.isExpressionStatement(node)) {
    return [{ operator: "drop a statement", node, replacement: ";" }];
  }
  if (
    ts.isFunctionDeclaration(node) || ts.isArrowFunction(node) ||
    ts.isFunctionExpression(node)
  ) return mutateFunction(node);
  return [];
}

function negated(node: ts.Expression, operator = "negate"): Mutation {
  const replacement = `!(${node.getText()})`;
  return { operator, node, replacement };
}

function mutateConditional(node: ts.ConditionalExpression): Mutation[] {
  const { condition, whenTrue, whenFalse } = node;
  const mutations = [negated(condition, "swap the branches")];
  if (!isRank(node)) return mutations;
  const always = [whenTrue, whenFalse].map((branch) => ({
    operator: "always the same",
    node,
    replacement: branch.getText(),
  }));
  return [...mutations, ...always];
}

/** A comparison does not tell one from any other number above zero. */
function isRank({ whenTrue, whenFalse }: ts.ConditionalExpression): boolean {
  return [whenTrue, whenFalse]
    .every((branch) => /^-?[01]$/.test(branch.getText()));
}

function mutateIf({ expression: node }: ts.IfStatement): Mutation[] {
  return [
    negated(node),
    { operator: "never", node, replacement: "false" },
    { operator: "always", node, replacement: "true" },
  ];
}

function mutateBinary(node: ts.BinaryExpression): Mutation[] {
  const { left, right, operatorToken } = node;
  const token = operatorToken.getText();
  if (["&&", "||", "??"].includes(token)) {
    return [left, right].map((kept) => ({
      operator: `drop one side of ${token}`,
      node,
      replacement: kept.getText(),
    }));
  }
  const other = swappedOperators[operatorToken.kind];
  if (!other) return [];
  return [{
    operator: `${token} becomes ${other}`,
    node,
    range: [operatorToken.getStart(), operatorToken.getEnd()],
    replacement: other,
  }];
}

function mutateNumber(node: ts.NumericLiteral): Mutation[] {
  const signed = ts.isPrefixUnaryExpression(node.parent) ? node.parent : node;
  const { parent } = signed;
  const isBranch = ts.isConditionalExpression(parent) &&
    signed !== parent.condition;
  if (isBranch && isRank(parent)) return [];
  const value = Number(node.text);
  if (!Number.isSafeInteger(value)) return [];
  const others = [value + 1, value - 1];
  return others.map((other) => ({
    operator: "off by one",
    node,
    replacement: other < 0 ? `(${other})` : `${other}`,
  }));
}

function mutateCall(node: ts.CallExpression): Mutation[] {
  const called = node.expression;
  if (!ts.isPropertyAccessExpression(called)) return [];
  const { name, expression: list } = called;
  const mutations: Mutation[] = [];
  const other = swappedNames[name.text];
  if (other) {
    mutations.push({
      operator: `${name.text} becomes ${other}`,
      node,
      range: [name.getStart(), name.getEnd()],
      replacement: other,
    });
  }
  if (droppedMethods.includes(name.text)) {
    mutations.push({
      operator: `drop a .${name.text}()`,
      node,
      replacement: list.getText(),
    });
  }
  return mutations;
}

/** A function that does nothing, or gives one answer always. */
function mutateFunction(
  node: ts.FunctionDeclaration | ts.ArrowFunction | ts.FunctionExpression,
): Mutation[] {
  const { body, type } = node;
  if (!body) return [];
  if (!ts.isBlock(body)) {
    if (!isCondition(body)) return [];
    return ["true", "false"].map((replacement) => ({
      operator: `always ${replacement}`,
      node: body,
      replacement,
    }));
  }
  const at = body.getStart() + 1;
  return constantResults(type).map((result) => ({
    operator: "return early",
    node,
    range: [at, at],
    replacement: ` return ${result};`,
    change: `return ${result}`.trim(),
  }));
}

/** What a function of this type could give without looking. */
function constantResults(type: ts.TypeNode | undefined): string[] {
  switch (type?.kind) {
    case ts.SyntaxKind.VoidKeyword:
      return [""];
    case ts.SyntaxKind.BooleanKeyword:
      return ["true", "false"];
    case ts.SyntaxKind.ArrayType:
      return ["[]"];
    case ts.SyntaxKind.NumberKeyword:
      return ["0"];
    case ts.SyntaxKind.StringKeyword:
      return ['""'];
    case ts.SyntaxKind.UnionType:
      return /\bundefined$/.test(type?.getText() ?? "") ? ["undefined"] : [];
    default:
      return [];
  }
}

/** Is this surely true or false, and not a list or a text? */
function isCondition(node: ts.Expression): boolean {
  if (ts.isParenthesizedExpression(node)) return isCondition(node.expression);
  if (ts.isPrefixUnaryExpression(node)) {
    return node.operator === ts.SyntaxKind.ExclamationToken;
  }
  if (ts.isBinaryExpression(node)) {
    const token = node.operatorToken.getText();
    if (token === "&&" || token === "||") {
      return isCondition(node.left) || isCondition(node.right);
    }
    return /^([<>]=?|[=!]==)$/.test(token);
  }
  if (!ts.isCallExpression(node)) return false;
  const called = node.expression;
  const name = ts.isPropertyAccessExpression(called) ? called.name : called;
  return /^(some|every|includes|has|startsWith|test|is[A-Z]\w*)$/
    .test(name.getText());
}

// Trying them

/** Runs the tests on each mutant, some at a time. */
async function tryAll(mutants: Mutant[]): Promise<Map<Mutant, Outcome>> {
  const outcomes = new Map<Mutant, Outcome>();
  const folder = await Deno.makeTempDir({ prefix: "persistence-mutants-" });
  try {
    const folders = Array.from(
      { length: atATime },
      (_, i) => `${folder}/${i}/`,
    );
    for (const path of folders) await makeProject(path);
    const started = performance.now();
    const { code, output } = await runTests(folders[0], 60_000);
    if (code !== 0) throw new Error(`The tests fail as it is: ${output}`);
    const timeoutMs = 10_000 + 10 * (performance.now() - started);

    let next = 0;
    await Promise.all(folders.map(async (path) => {
      while (next < mutants.length) {
        const mutant = mutants[next++];
        const outcome = await tryOne(mutant, path, timeoutMs);
        outcomes.set(mutant, outcome);
        if (outcome === "survived" && !survivorOf(mutant)) {
          console.log(`${mutant.line}: ${mutant.change}`);
        }
        if (outcomes.size % 100 === 0) {
          console.log(`${outcomes.size} of ${mutants.length} tried`);
        }
      }
    }));
    const survived = mutants.filter((mutant) =>
      outcomes.get(mutant) === "survived"
    );
    for (const mutant of await findRefused(survived, folders[0])) {
      outcomes.set(mutant, "invalid");
    }
    return outcomes;
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** A folder that looks like this project to the tests. */
async function makeProject(folder: string): Promise<void> {
  await Deno.mkdir(folder, { recursive: true });
  const here = projectFolder.replace(/\/$/, "");
  for (const name of ["deno.npm.json", "package.json", file]) {
    await Deno.copyFile(`${here}/${name}`, `${folder}${name}`);
  }
  for (const name of ["testing", "vm"]) {
    await Deno.mkdir(`${folder}${name}`);
    for await (const entry of Deno.readDir(`${here}/${name}`)) {
      const path = `${name}/${entry.name}`;
      if (!entry.isFile || !path.endsWith(".ts")) continue;
      await Deno.copyFile(`${here}/${path}`, `${folder}${path}`);
    }
  }
  for (const name of ["node_modules", "npm_only"]) {
    await Deno.symlink(`${here}/${name}`, `${folder}${name}`);
  }
}

async function tryOne(
  mutant: Mutant,
  folder: string,
  timeoutMs: number,
): Promise<Outcome> {
  await Deno.writeTextFile(`${folder}${file}`, mutant.source);
  const { code, output } = await runTests(folder, timeoutMs);
  if (/could not be parsed|SyntaxError: (?!.*JSON)/.test(output)) {
    return "invalid";
  }
  if (code === 0) return "survived";
  const [, failed = tests[0]] = /=> \.\/(\S+_test\.ts):/.exec(output) ?? [];
  tests = [failed, ...tests.filter((path) => path !== failed)];
  return "caught";
}

/**
 * Those that the compiler refuses: they never come as far as a test. Only
 * survivors are asked for, for this takes longer than the tests.
 */
async function findRefused(
  mutants: Mutant[],
  folder: string,
): Promise<Mutant[]> {
  const files = new Map(
    mutants.map((mutant, i) => [`survivor_${i}.ts`, mutant]),
  );
  const refused = new Set<Mutant>();
  const names = [...files.keys()];
  while (names.length > 0) {
    const some = names.splice(0, 25); // more would need much memory
    for (const name of some) {
      await Deno.writeTextFile(`${folder}${name}`, files.get(name)!.source);
    }
    const { code, output } = await run(folder, ["check"], some, 600_000);
    const found = [...output.matchAll(/\/(survivor_\d+\.ts):\d+:\d+/g)];
    if (code !== 0 && found.length === 0) throw new Error(output);
    for (const [, name] of found) refused.add(files.get(name)!);
  }
  return [...refused];
}

const runTests = (folder: string, timeoutMs: number) =>
  run(folder, ["test", "-A", "--no-check", "--fail-fast"], tests, timeoutMs);

/** Runs Deno. One that does not end has not passed. */
async function run(
  folder: string,
  command: string[],
  files: string[],
  timeoutMs: number,
): Promise<{ code: number; output: string }> {
  const child = new Deno.Command(Deno.execPath(), {
    args: [...command, "--config", "deno.npm.json", ...files],
    cwd: folder,
    env: testEnvironment,
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const timer = setTimeout(() => child.kill("SIGKILL"), timeoutMs);
  const { code, stdout, stderr } = await child.output();
  clearTimeout(timer);
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, output: text(stdout) + text(stderr) };
}

if (import.meta.main) Deno.exit(await main());
