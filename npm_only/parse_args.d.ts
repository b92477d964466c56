/** Types of what is used of @std/cli/parse-args; the npm package has none. */

export interface ParseOptions {
  string?: readonly string[];
  boolean?: readonly string[];
  default?: Record<string, unknown>;
  unknown?: (arg: string, key?: string, value?: unknown) => unknown;
}

export function parseArgs(
  args: string[],
  options?: ParseOptions,
  // JSR's types name each option; of which there are some here only.
  // deno-lint-ignore no-explicit-any
): { _: (string | number)[]; [option: string]: any };
