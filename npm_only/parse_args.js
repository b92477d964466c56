export * from "deno-std/cli/parse_args.js";
