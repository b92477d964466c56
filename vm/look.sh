#!/bin/sh
# What an operator sees after a boot, as lines "after NAME VALUE" and, once the
# work in the background is done, "settled NAME VALUE". situation.ts puts this
# before the script of a situation, which can use its functions.
data=/mnt/lightwhale-data
# Not in Docker's own folders, and on the subvolume that a mirror is for.
kept=$data/lightwhale-state/docker/kept
# The checksums that the harness remembers: what a disk remembers itself would
# be as old as its data.
sums=/run/kept.sha256
stage=after

fact() { echo "$stage $*"; }

type_of() { findmnt -n -o FSTYPE --mountpoint "$1" | tail -n 1; }

# "data metadata system", as mkfs.btrfs calls them; "a+b" while both are there.
profiles() {
  for kind in Data Metadata System; do
    btrfs filesystem df $data | sed -n "s/^$kind, \([^:]*\):.*/\1/p" |
      tr '[:upper:]\n' '[:lower:]+' | sed 's/+$/ /'
  done | sed 's/ $//'
}

disks() {
  for disk in /sys/block/*; do
    [ "$(cat "$disk/serial" 2>/dev/null)" != system ] || continue
    [ "$(cat "$disk/dm/suspended" 2>/dev/null)" != 1 ] || continue # mute
    case $disk in *loop*) ;; *) echo "${disk##*/}" ;; esac
  done
}

partitions() {
  for disk in $(disks); do
    sfdisk -J "/dev/$disk" 2>/dev/null | sed -n 's/.*"name": *"\([^"]*\)".*/\1/p' |
      tr '\n' ' ' | sed "s/^/$disk: /; s/ \$/; /"
  done | sed 's/; $//'
}

marked() {
  for disk in $(disks); do
    [ "$(head -c 27 "/dev/$disk")" != lightwhale-please-format-me ] || echo "$disk"
  done | tr '\n' ' ' | sed 's/ $//'
}

# Leave a line where things are to be kept, and count those of all boots.
boots() {
  for folder in /etc /var/lib /home/lightwhale $data/lightwhale-state/docker; do
    echo boot >>"$folder/boots"
    wc -l <"$folder/boots" 2>/dev/null || echo 0
  done | tr '\n' ' ' | sed 's/ $//'
}

# The lower directory's owner and mode must show through the overlays.
looks() {
  stat -c '%a %u %n' /etc /etc/shadow /var /var/tmp /var/spool/mail /home \
    /home/lightwhale | tr '\n' ',' | sed 's/,$//'
}

# Frozen, the filesystem on the disk is what a check expects: nothing is open.
clean() {
  device=$(findmnt -n -o SOURCE $data | sed 's/\[.*//')
  fsfreeze -f $data
  if btrfs check --readonly --force "$device" >/run/btrfs-check 2>&1; then
    result=yes
  else
    result="no: $(tail -n 20 /run/btrfs-check | tr '\n' ' ')"
  fi
  fsfreeze -u $data
  echo "$result"
}

# keep NAME MEBIBYTES: write a file that every later boot must find as it is.
keep() {
  mkdir -p $kept
  head -c $(($2 << 20)) /dev/urandom >/run/contents
  dd if=/run/contents of="$kept/$1" bs=1M conv=notrunc,fsync status=none
  sum=$(sha256sum </run/contents)
  echo "kept ${sum%% *}  $1"
  sed -i "/  $1\$/d" $sums
  echo "${sum%% *}  $1" >>$sums
}

# keep_in_place NAME MEBIBYTES: write over it at the next time, as databases do.
# Without checksums Btrfs cannot tell which half of a mirror is right.
keep_in_place() {
  [ -e "$kept/$1" ] || {
    mkdir -p $kept
    : >"$kept/$1"
    chattr -c "$kept/$1" # compression and +C exclude each other
    chattr +C "$kept/$1"
  }
  keep "$@"
}

# kept_in FOLDER PARITY...: is all that was kept there as it was written? A
# process reads from one half of a mirror, by whether its number is even.
kept_in() {
  folder=$1
  shift
  wrong=$(while read -r sum name; do
    for parity; do
      [ "$(read_by "$parity" "$folder/$name" | sha256sum)" = "$sum  -" ] ||
        echo "not $name, read by parity $parity; "
    done
  done <$sums | tr -d '\n')
  echo "${wrong:-yes}"
}

# Directly from the disk: the memory has what was written.
read_by() {
  # shellcheck disable=SC2016 # the inner shell's
  while
    dash -c '[ $(($$ % 2)) = "$1" ] || exit 9
      exec dd if="$2" bs=1M iflag=direct status=none' dash "$@"
    [ $? -eq 9 ]
  do :; done
}

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
  tries=$(($1 * 10))
  shift
  until "$@"; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || {
      echo "In vain waited for: $*"
      return 1
    }
    sleep 0.1
  done
}

replacing() { btrfs replace status -1 $data | grep -q '% done'; }

# Do all members reach to the end of their disks?
fills_disks() {
  members=$(btrfs filesystem show --raw $data |
    sed -n 's/.* size \([0-9]*\) .* path \(.*\)/\1 \2/p')
  [ -n "$members" ] || return 1
  echo "$members" | while read -r size path; do
    cd -P "/sys/class/block/${path##*/}" || exit
    end=$(($(cat start) * 512 + size))
    [ $(($(cat ../size) * 512 - end)) -lt $((2 << 20)) ] || exit 1
  done
}

# Is what S11persistence has left to the background done? Between two pieces of
# work the status shows none.
background_is_done() {
  ! cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' ' ' | grep -q 'maintai[n]' &&
    persistence.ts --status --json >/run/status &&
    grep -q '"work": \[\]' /run/status
}

# Does each member have all data? Ends the system's use of the disks.
each_alone() {
  members=$(btrfs filesystem show $data | sed -n 's/.* path \(\/.*\)/\1/p')
  /etc/init.d/rcK
  mkdir -p /run/alone
  for member in $members; do
    # With no udev nobody shows the kernel the others again.
    if btrfs device scan --forget &&
      mount -t btrfs -o ro,degraded,subvol=@lightwhale-state "$member" /run/alone; then
      kept_in /run/alone/docker/kept 0
      umount /run/alone
    else
      echo "no: $member cannot be mounted"
    fi
  done 2>&1 | tr '\n' ' ' | sed 's/ $//'
}

# What is to be seen when the work in the background is done.
settle() {
  wait_for 120 background_is_done
  stage=settled
  fact status "$(tr -d '\n' </run/status)"
  fact profiles "$(profiles)"
  fact marked "$(marked)"
  fact clean "$(clean)"
  fact kept "$(kept_in $kept 0 1)"
  fact alone "$(each_alone)"
}

fact report "$(tr -d '\n' </run/lightwhale/persistence.json)"
fact type "$(type_of $data)"
fact overlays "$(type_of /etc) $(type_of /var) $(type_of /home)"
fact swaps "$(tail -n +2 /proc/swaps | wc -l)"
fact partitions "$(partitions)"
fact marked "$(marked)"
fact boots "$(boots)"
fact looks "$(looks)"
if [ "$(type_of $data)" = btrfs ]; then
  fact profiles "$(profiles)"
  fact clean "$(clean)"
  fact kept "$(kept_in $kept 0 1)"
fi
