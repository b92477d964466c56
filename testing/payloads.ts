/**
 * Payloads that are refused, and why: read by the pure tests, and written to
 * real disks.
 *
 * @module
 */
import { ANYWAY, MAGIC } from "../persistence.ts";

const KiB = 1024;

/** A whole payload with these lines in it, which begin in line 3. */
export const payloadOf = (lines: string, title = "lightwhale-payload 1") =>
  `${MAGIC}\n${title}\n${lines}-- end --\n`;

const file = (path: string, contents = "x\n") => `-- ${path} --\n${contents}`;
const good = file("etc/good");

/** A payload, and what the refusal says. */
export type Refused = [payload: string, says: string];

/** Payloads, by what is wrong with their text alone. */
export const badTexts: Record<string, Refused> = {
  "nothing follows": [
    `${MAGIC}\nlightwhale-payload 1\n`,
    'line 3: .*"-- end --"',
  ],
  "a NUL in a file": [payloadOf(file("etc/x", "a\0b\n")), "line 4: a NUL byte"],
  "a NUL in a path": [payloadOf(file("etc/a\0b")), "line 3: a NUL byte"],
  "cut off in a file": [
    `${MAGIC}\nlightwhale-payload 1\n${good}`,
    'line 5: .*"-- end --"',
  ],
  "cut off in the end marker": [
    `${MAGIC}\nlightwhale-payload 1\n${good}-- end -`,
    'line 5: .*"-- end --"',
  ],
  "text right behind the end marker": [
    `${MAGIC}\nlightwhale-payload 1\n${good}-- end --junk`,
    'line 5: .*"-- end --"',
  ],
  "longer than 480 KiB": [
    payloadOf(file("etc/x", `${"x".repeat(480 * KiB)}\n`)),
    "line 5: .*longer than 491520 bytes",
  ],
  "longer than 480 KiB by a byte": [
    payloadOf(
      file("etc/x", `${"x".repeat(480 * KiB - 21 - 12 - 1 - 9 + 1)}\n`),
    ),
    "line 5: it is longer than 491520 bytes",
  ],
  "a later version": [
    payloadOf(good, "lightwhale-payload 2"),
    'line 2: only "lightwhale-payload 1"',
  ],
  "no version": [payloadOf(good, "lightwhale-payload"), "line 2: only"],
  "white space behind the title": [
    payloadOf(good, "lightwhale-payload 1 "),
    "line 2: only",
  ],
  "two titles": [payloadOf(`lightwhale-payload 1\n${good}`), "line 3: only"],
  "a later version behind the other line": [
    payloadOf(good, `${ANYWAY}\nlightwhale-payload 7`),
    "line 3: only",
  ],
  "text before the first file": [
    payloadOf(`-- etc/x -\n${good}`),
    "line 3: text before the first file",
  ],
  "an indented archive": [
    payloadOf("  -- etc/x --\n  x\n  -- end --\n"),
    "line 3: white space around a marker",
  ],
  "white space behind a marker": [
    payloadOf(`${good}-- etc/x -- \nx\n`),
    "line 5: white space around a marker",
  ],
  "a marker with a carriage return of its own": [
    payloadOf(`${good}-- etc/x --\r\nx\n`),
    "line 5: white space around a marker",
  ],
  "an end with a carriage return of its own": [
    `${MAGIC}\nlightwhale-payload 1\n${good}-- end --\r\n`,
    "line 5: white space around a marker",
  ],
  "elsewhere": [payloadOf(file("usr/bin/x")), "line 3: a file is below etc"],
  "at the top": [payloadOf(file("etc")), "line 3: a file is below etc"],
  "a name like one of ours": [payloadOf(file("etcetera/x")), "line 3: a file"],
  "an absolute path": [
    payloadOf(file("/etc/x")),
    "line 3: a file is below etc",
  ],
  "from above": [payloadOf(file("../etc/x")), "line 3: a file is below etc"],
  "no name": ["", "line 3: a file is below etc"],
  "a directory": [
    payloadOf(file("etc/x/")),
    'line 3: "etc/x/" has an empty part',
  ],
  "an empty part": [payloadOf(file("etc//x")), 'line 3: "etc//x" has an empty'],
  "one dot": [payloadOf(file("etc/./x")), 'line 3: "etc/./x" has an empty'],
  "two dots": [
    payloadOf(file("home/op/../x")),
    'line 3: "home/op/../x" has an',
  ],
  "two dots at the end": [payloadOf(file("var/..")), "line 3: .*has an empty"],
  "a path with a control character": [
    payloadOf(file("etc/\x1b[2J")),
    "line 3: its name is not UTF-8, or no text",
  ],
  "a part that is too long": [
    payloadOf(file(`etc/${"x".repeat(256)}`)),
    "line 3: its name is too long",
  ],
  "a part of too many bytes": [
    payloadOf(file(`etc/${"é".repeat(128)}`)),
    "line 3: its name is too long",
  ],
  "a path that is too long": [
    payloadOf(file(`etc${"/123456789".repeat(210)}`)),
    "line 3: its name is too long",
  ],
  "the same file twice": [
    payloadOf(`${good}${good}`),
    "line 5: the same as in line 3",
  ],
  "the same user twice": [
    payloadOf("-- password a --\n*\n-- password a --\n*\n"),
    "line 5: the same as in line 3",
  ],
  "a file where a directory has to be": [
    payloadOf(`${file("etc/x/y")}${file("etc/x")}`),
    "line 3: line 5 has a file in the place of its directory",
  ],
  ...Object.fromEntries(
    ["passwd", "shadow", "group", "gshadow"].map((name): [string, Refused] => [
      `all of etc/${name}`,
      [
        payloadOf(file(`etc/${name}`)),
        `line 3: "etc/${name}" is never replaced`,
      ],
    ]),
  ),
  "a password that is none": [
    payloadOf("-- password op --\nsecret\n"),
    "line 3: a password is one line",
  ],
  "a plain password as long as a hash of DES": [
    payloadOf("-- password op --\ncorrect.horse\n"),
    "line 3: a password is one line",
  ],
  "a plain password as long as a hash of BSDi": [
    payloadOf("-- password op --\n_battery.staple.1234\n"),
    "line 3: a password is one line",
  ],
  "a password of no lines": [
    payloadOf("-- password op --\n"),
    "line 3: a password is one line",
  ],
  "a password of two lines": [
    payloadOf("-- password op --\n*\n*\n"),
    "line 3: a password is one line",
  ],
  "a password that would be another field": [
    payloadOf(`-- password op --\n$6$salt$${"a".repeat(86)}:0:0\n`),
    "line 3: a password is one line",
  ],
  "a hash that is cut off": [
    payloadOf("-- password op --\n$6$salt$abc\n"),
    "line 3: a password is one line",
  ],
  "a password of nobody": [
    payloadOf("-- password --\n*\n"),
    "line 3: a file is below etc",
  ],
  "a password of two users": [
    payloadOf("-- password a b --\n*\n"),
    "line 3: a file is below etc",
  ],
  "a password of a user with a colon": [
    payloadOf("-- password a:b --\n*\n"),
    "line 3: a file is below etc",
  ],
};
badTexts["no name"][0] = payloadOf("--  --\nx\n");

/** What only the files of a system tell. */
export const badPlaces: Record<string, Refused> = {
  "a user that is not there": [
    payloadOf(`${good}-- password nobody --\n*\n`),
    'line 5: there is no user "nobody"',
  ],
  "through a symbolic link": [
    payloadOf(`${good}${file("etc/link/x")}`),
    'line 5: "etc/link/x" leads through a symbolic link, "link"',
  ],
  "through a link to elsewhere": [
    payloadOf(file("var/run/x")),
    'line 3: "var/run/x" leads through a symbolic link',
  ],
  "through a link that leads nowhere": [
    payloadOf(file("home/broken/x/y")),
    'line 3: "home/broken/x/y" leads through a symbolic link',
  ],
  "through a file": [
    payloadOf(file("etc/hostname/x")),
    'line 3: "etc/hostname/x" leads through a file, "hostname"',
  ],
  "in the place of a directory": [
    payloadOf(file("etc/real")),
    'line 3: "etc/real" is there, and is no file',
  ],
  "in the place of a pipe": [
    payloadOf(file("etc/pipe")),
    'line 3: "etc/pipe" is there, and is no file',
  ],
};
