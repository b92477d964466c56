# shellcheck shell=sh
# At each login: what is wrong with the disks, if anything is.
[ ! -s /run/lightwhale/health ] || sed 's/^/persistence: /' /run/lightwhale/health >&2
