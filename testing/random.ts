/**
 * Chance that can be repeated: every test that rolls dice prints its seed, and
 * SEED in the environment rolls the same again.
 *
 * @module
 */
import { randomFrom } from "../vm/recorded_disk.ts";

/** Dice. */
export interface Random {
  /** A whole number from 0 to one less than `limit`. */
  below(limit: number): number;
  pick<T>(list: readonly T[]): T;
  /** True with this probability. */
  chance(probability: number): boolean;
}

/** The dice of a seed. */
export function diceOf(seed: number): Random {
  const random = randomFrom(seed);
  const below = (limit: number) => Math.floor(random() * limit);
  return {
    below,
    pick: (list) => list[below(list.length)],
    chance: (probability) => random() < probability,
  };
}

/** The seed to use: SEED, or one of its own each time. */
export const seed = Number(
  Deno.env.get("SEED") ?? crypto.getRandomValues(new Uint32Array(1))[0],
);

/** A whole number from the environment, for longer runs of the same test. */
export function countFrom(name: string, fallback: number): number {
  return Number(Deno.env.get(name) ?? fallback);
}
