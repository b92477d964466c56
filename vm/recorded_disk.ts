/**
 * Disks that remember every write and can lose power at an exact one, or be in
 * trouble at an exact access.
 *
 * QEMU reaches such a disk over NBD (protocol: the NetworkBlockDevice
 * project's doc/proto.md), so the harness itself is the disk: it sees each
 * write and each flush in the order in which they arrive, of all disks of the
 * machine, which no counter polled from outside can tell.
 */

/** What one disk of the machine received, in order of arrival. */
export type Received =
  | { kind: "write"; disk: number; offset: number; data: Uint8Array }
  | { kind: "flush"; disk: number };

/** What a machine asks of a disk, before the disk obeys. */
export interface Access {
  kind: "read" | "write" | "flush";
  offset: number;
  length: number;
}

/** What a disk does first, or instead. */
export interface Trouble {
  /** It takes so long; Infinity: it never answers. */
  takesMs?: number;
  /** It does nothing and answers with this error (errno(3)). */
  errno?: number;
}

/** When and how the power goes. */
export interface Cut {
  /**
   * The power goes when this many writes have arrived, all disks together.
   * Default: when the machine is killed.
   */
  afterWrites?: number;
  /**
   * A disk may lose what was not flushed, in any combination, and tear it
   * between any two sectors: this seed picks what survives. Without it all
   * does.
   */
  loseUnflushed?: number | "all";
}

/** The recorded disks of one machine. */
export interface RecordedDisks {
  /** Everything that arrived so far. */
  received: Received[];
  /** Stop serving, and drop what the cut loses. */
  close(): Promise<void>;
}

/**
 * Serve disks to one QEMU.
 *
 * @param disks The image file and the socket of each disk, and what troubles
 * it: asked at each access.
 * @param options When the power goes, and what to do then (kill QEMU).
 * @returns The disks, to be closed when QEMU has ended.
 */
export function serveDisks(
  disks: {
    file: string;
    socket: string;
    trouble?: (access: Access) => Trouble | undefined;
  }[],
  options: { cut?: Cut; onCut: () => void },
): RecordedDisks {
  const { cut, onCut } = options;
  const received: Received[] = [];
  let writes = 0;
  let powered = true;

  function receive(event: Received): void {
    received.push(event);
    if (event.kind !== "write") return;
    writes++;
    if (writes >= (cut?.afterWrites ?? Infinity)) {
      powered = false;
      onCut();
    }
  }

  const servers = disks.map(({ file, socket, trouble }, disk) => {
    const listener = Deno.listen({ transport: "unix", path: socket });
    const image = Deno.openSync(file, { read: true, write: true });
    const unflushed: Unflushed[] = [];

    const device: Device = {
      sizeBytes: image.statSync().size,
      trouble: (access) => trouble?.(access) ?? {},
      read: (offset, length) => readAt(image, offset, length),
      write(offset, data) {
        if (!powered) return false;
        const before = readAt(image, offset, data.length);
        unflushed.push({ offset, before, data });
        writeAt(image, offset, data);
        receive({ kind: "write", disk, offset, data });
        return powered;
      },
      flush() {
        if (!powered) return false;
        unflushed.length = 0;
        receive({ kind: "flush", disk });
        return true;
      },
    };
    const serving = serveNbd(listener, device);

    return async function close() {
      listener.close();
      await serving;
      if (cut?.loseUnflushed !== undefined) {
        loseSome(image, unflushed, cut.loseUnflushed);
      }
      image.close();
    };
  });

  return {
    received,
    async close() {
      for (const close of servers) await close();
    },
  };
}

/** A write that the disk may still lose. */
interface Unflushed {
  offset: number;
  before: Uint8Array;
  data: Uint8Array;
}

/** Undo all that was not flushed, then do again what the seed lets survive. */
function loseSome(
  image: Deno.FsFile,
  unflushed: Unflushed[],
  lose: number | "all",
): void {
  if (unflushed.length === 0) return;
  for (const { offset, before } of unflushed.toReversed()) {
    writeAt(image, offset, before);
  }
  if (lose === "all") return;
  const random = randomFrom(lose);
  for (const write of unflushed) writeInPart(image, write, random);
}

/**
 * Make disks as a power cut would have left them, from what they received in an
 * uncut run.
 *
 * @param files The images as they were before the run, one for each disk.
 * @param received What arrived before the power went.
 * @param loseUnflushed See {@linkcode Cut}.
 */
export function rebuildDisks(
  files: string[],
  received: Received[],
  loseUnflushed?: number,
): void {
  const random = randomFrom(loseUnflushed ?? 0);
  for (const [disk, file] of files.entries()) {
    using image = Deno.openSync(file, { read: true, write: true });
    const own = received.filter((event) => event.disk === disk);
    const flushed = own.findLastIndex(({ kind }) => kind === "flush");
    for (const [i, event] of own.entries()) {
      if (event.kind !== "write") continue;
      if (i > flushed && loseUnflushed !== undefined) {
        writeInPart(image, event, random);
      } else writeAt(image, event.offset, event.data);
    }
  }
}

/** All that a disk writes at once; no test cuts one of 4096 bytes. */
const SECTOR_BYTES = 512;

/** Linux gathers what it writes in pages. */
const PAGE_BYTES = 4096;

/** Writes what a cut lets survive: all, nothing, the beginning, some sectors. */
function writeInPart(
  image: Deno.FsFile,
  { offset, data }: { offset: number; data: Uint8Array },
  random: () => number,
): void {
  const luck = random();
  const tornAt = random() * data.length;
  const unitBytes = luck < 0.9 ? SECTOR_BYTES : PAGE_BYTES;
  for (let at = 0; at < data.length;) {
    const toPage = PAGE_BYTES - (offset + at) % PAGE_BYTES;
    const page = data.subarray(at, at + toPage);
    const wholePage = isLiveSuperblock(image, offset + at, page);
    const bytes = wholePage ? PAGE_BYTES : unitBytes;
    const end = at + bytes - (offset + at) % bytes;
    const survives = luck < 0.3
      ? true
      : luck < 0.6
      ? false
      : luck < 0.7
      ? end <= tornAt
      : random() < 0.5;
    if (survives) writeAt(image, offset + at, data.subarray(at, end));
    at = end;
  }
}

/**
 * Is this the superblock of a data filesystem, and does it replace another one?
 * Linux (6.18) mounts no Btrfs whose superblock is torn, though its copies are
 * whole (fs/btrfs/disk-io.c, open_ctree(); `btrfs rescue super-recover` puts
 * one in its place): it takes for granted that a disk writes 4 KiB at once, and
 * no order of our writes would help. A superblock of a filesystem that is still
 * being made may be torn: there our order helps.
 */
function isLiveSuperblock(
  image: Deno.FsFile,
  offset: number,
  page: Uint8Array,
): boolean {
  const isOurs = (block: Uint8Array) =>
    hasText(block, 0x40, "_BHRfS_M") &&
    hasText(block, 0x12b, "lightwhale-data");
  return page.length === PAGE_BYTES && isOurs(page) &&
    isOurs(readAt(image, offset, PAGE_BYTES));
}

function hasText(bytes: Uint8Array, at: number, text: string): boolean {
  return Array.from(text).every((letter, i) =>
    bytes[at + i] === letter.charCodeAt(0)
  );
}

/**
 * A small seeded generator (mulberry32), so that a failure can be repeated.
 *
 * @returns A function whose results are at least 0 and less than 1.
 */
export function randomFrom(seed: number): () => number {
  return function () {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), seed | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

interface Device {
  sizeBytes: number;
  trouble(access: Access): Trouble;
  read(offset: number, length: number): Uint8Array;
  /** False when the power is gone: nothing is answered any more. */
  write(offset: number, data: Uint8Array): boolean;
  flush(): boolean;
}

const NBD_OPT_EXPORT_NAME = 1;
const NBD_OPT_ABORT = 2;
const NBD_OPT_INFO = 6;
const NBD_OPT_GO = 7;
const NBD_REP_ACK = 1;
const NBD_REP_INFO = 3;
const NBD_REP_ERR_UNSUP = 0x80000001;
const NBD_CMD_READ = 0;
const NBD_CMD_WRITE = 1;
const NBD_CMD_DISC = 2;
const NBD_CMD_FLUSH = 3;
const KINDS: Record<number, Access["kind"]> = {
  [NBD_CMD_READ]: "read",
  [NBD_CMD_WRITE]: "write",
  [NBD_CMD_FLUSH]: "flush",
};
const NBD_CMD_FLAG_FUA = 1;
const NBD_EINVAL = 22;
/** HAS_FLAGS, SEND_FLUSH and SEND_FUA. */
const TRANSMISSION_FLAGS = 1 | 4 | 8;

async function serveNbd(listener: Deno.Listener, device: Device) {
  for await (const connection of listener) {
    try {
      await serveConnection(connection, device);
    } catch (error) {
      // A killed QEMU takes its end of the connection with it.
      const gone = error instanceof Deno.errors.UnexpectedEof ||
        error instanceof Deno.errors.BrokenPipe ||
        error instanceof Deno.errors.ConnectionReset;
      if (!gone) throw error;
    } finally {
      connection.close();
    }
  }
}

async function serveConnection(connection: Deno.Conn, device: Device) {
  const read = reader(connection);
  const ascii = (text: string) => new TextEncoder().encode(text);

  // FIXED_NEWSTYLE and NO_ZEROES
  await writeAll(connection, ascii("NBDMAGICIHAVEOPT"), u16(3));
  await read(4);
  negotiate: while (true) {
    const header = view(await read(16));
    const option = header.getUint32(8);
    await read(header.getUint32(12));
    const reply = (type: number, data: Uint8Array = new Uint8Array()) =>
      writeAll(
        connection,
        u64(0x3e889045565a9n),
        u32(option),
        u32(type),
        u32(data.length),
        data,
      );
    const size = u64(BigInt(device.sizeBytes));
    switch (option) {
      case NBD_OPT_EXPORT_NAME:
        await writeAll(connection, size, u16(TRANSMISSION_FLAGS));
        break negotiate;
      case NBD_OPT_INFO:
      case NBD_OPT_GO:
        // NBD_INFO_EXPORT is type 0
        await reply(
          NBD_REP_INFO,
          concat(u16(0), size, u16(TRANSMISSION_FLAGS)),
        );
        await reply(NBD_REP_ACK);
        if (option === NBD_OPT_GO) break negotiate;
        break;
      case NBD_OPT_ABORT:
        return;
      default:
        await reply(NBD_REP_ERR_UNSUP);
    }
  }

  while (true) {
    const header = view(await read(28));
    const flags = header.getUint16(4);
    const command = header.getUint16(6);
    const cookie = header.getBigUint64(8);
    const offset = Number(header.getBigUint64(16));
    const length = header.getUint32(24);
    const reply = (error: number, data: Uint8Array = new Uint8Array()) =>
      writeAll(connection, u32(0x67446698), u32(error), u64(cookie), data);
    const isWrite = command === NBD_CMD_WRITE;
    const written = isWrite ? (await read(length)).slice() : new Uint8Array();
    if (command in KINDS) {
      const access = { kind: KINDS[command], offset, length };
      const { takesMs = 0, errno } = device.trouble(access);
      if (takesMs === Infinity) continue;
      if (takesMs > 0) await new Promise((done) => setTimeout(done, takesMs));
      if (errno) {
        await reply(errno);
        continue;
      }
    }
    switch (command) {
      case NBD_CMD_READ:
        await reply(0, device.read(offset, length));
        break;
      case NBD_CMD_WRITE:
        if (!device.write(offset, written)) return;
        if (flags & NBD_CMD_FLAG_FUA && !device.flush()) return;
        await reply(0);
        break;
      case NBD_CMD_FLUSH:
        if (!device.flush()) return;
        await reply(0);
        break;
      case NBD_CMD_DISC:
        return;
      default:
        await reply(NBD_EINVAL);
    }
  }
}

/** Reads exactly as many bytes as asked for. */
function reader(connection: Deno.Conn) {
  return async function (length: number): Promise<Uint8Array> {
    const data = new Uint8Array(length);
    for (let done = 0; done < length;) {
      const n = await connection.read(data.subarray(done));
      if (n === null) throw new Deno.errors.UnexpectedEof("NBD client is gone");
      done += n;
    }
    return data;
  };
}

async function writeAll(connection: Deno.Conn, ...parts: Uint8Array[]) {
  const data = concat(...parts);
  for (let done = 0; done < data.length;) {
    done += await connection.write(data.subarray(done));
  }
}

function readAt(file: Deno.FsFile, offset: number, length: number) {
  const data = new Uint8Array(length);
  file.seekSync(offset, Deno.SeekMode.Start);
  for (let done = 0; done < length;) {
    const n = file.readSync(data.subarray(done));
    if (n === null) break;
    done += n;
  }
  return data;
}

function writeAt(file: Deno.FsFile, offset: number, data: Uint8Array) {
  file.seekSync(offset, Deno.SeekMode.Start);
  for (let done = 0; done < data.length;) {
    done += file.writeSync(data.subarray(done));
  }
}

function concat(...parts: Uint8Array[]): Uint8Array {
  const all = new Uint8Array(parts.reduce((sum, p) => sum + p.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

const view = (data: Uint8Array) => new DataView(data.buffer, data.byteOffset);

function u16(value: number): Uint8Array {
  const data = new Uint8Array(2);
  view(data).setUint16(0, value);
  return data;
}

function u32(value: number): Uint8Array {
  const data = new Uint8Array(4);
  view(data).setUint32(0, value);
  return data;
}

function u64(value: bigint): Uint8Array {
  const data = new Uint8Array(8);
  view(data).setBigUint64(0, value);
  return data;
}
