#!/bin/sh
# What an operator sees after a boot, as lines "fact NAME VALUE". boot_test.ts
# puts this before the script of a situation, which can use its functions.
data=/mnt/lightwhale-data

fact() { echo "fact $*"; }

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
fi
