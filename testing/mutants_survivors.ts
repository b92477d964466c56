/**
 * Mutants that no pure test can catch (see mutants.ts), and why. A mutant is
 * named by its function and the text of its change, so that lines may move.
 *
 * @module
 */

/** A mutant that may survive. */
interface Survivor {
  where: string;
  /** As mutants.ts prints it: "before -> after". */
  change: string;
  why: string;
}

export const survivors: Survivor[] = [];
