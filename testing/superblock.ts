/**
 * Btrfs superblocks that are changed by a test.
 *
 * @module
 */
import { createHash } from "node:crypto";

const KiB = 1024;
const CRC32C = Uint32Array.from({ length: 16 }, (_, nibble) => {
  for (let bit = 0; bit < 4; bit++) {
    nibble = (nibble >>> 1) ^ (nibble & 1 ? 0x82f63b78 : 0);
  }
  return nibble;
});

/** CRC-32C of four bits at a time (RFC 3720, appendix B.4). */
function crc32c(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    crc = (crc >>> 4) ^ CRC32C[crc & 15];
    crc = (crc >>> 4) ^ CRC32C[crc & 15];
  }
  return ~crc >>> 0;
}

/** Makes the checksum right again: SHA-256 or, for all others, CRC-32C. */
export function repairSuperblock(block: Uint8Array): void {
  const view = new DataView(block.buffer, block.byteOffset, block.length);
  const body = block.subarray(0x20, 4 * KiB);
  if (view.getUint16(0xc4, true) === 2) {
    block.set(createHash("sha256").update(body).digest(), 0);
  } else {
    view.setUint16(0xc4, 0, true); // crc32c, whose field is not in the body
    view.setUint32(0, crc32c(body), true);
  }
}

/** Turns the superblock of a member into the one that a replace's target has. */
export function becomeReplaceTarget(block: Uint8Array): void {
  block.fill(0, 0xc9, 0xd1); // devid
  crypto.getRandomValues(block.subarray(0x10b, 0x11b)); // the device's own UUID
  repairSuperblock(block);
}
