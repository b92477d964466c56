#!/bin/sh
# The calls of a boot that nobody can avoid, with nothing around them: no look
# at the disks, no decision, no record, no check, no file but the mount points.
#
#     floor.sh volatile ROOT
#     floor.sh existing ROOT DISK        the data filesystem is on DISK
#     floor.sh first ROOT DISK...        disks of 2 GiB and more
set -eu
scene=$1 root=$2
shift 2
data=$root/mnt/lightwhale-data
state=$data/lightwhale-state
lower=$root/run/lightwhale/overlay/lower
off=index=off,redirect_dir=off,metacopy=off,xino=off

others=''
first() {
	for disk; do partition "$disk" & done
	wait
	for disk; do mkswap --label lightwhale-swap "${disk}p1" >/dev/null & done
	case $# in
	1)
		mkfs.btrfs --quiet --force --data single --metadata dup "${1}p2" >&2
		;;
	*)
		mkfs.btrfs --quiet --force --data raid1 --metadata raid1 "${1}p2" \
			"${2}p2" >&2
		others=,device=${2}p2
		;;
	esac
	wait
	mkdir -p "$root/run/top"
	mount -t btrfs -o "noatime,subvolid=5$others" "${1}p2" "$root/run/top"
	top=$root/run/top/@lightwhale
	for name in data state state-snapshots; do
		btrfs subvolume create "$top-$name" >/dev/null
	done
	btrfs property set -t inode "$top-state" compression zstd
	for name in docker containerd; do
		btrfs subvolume create "$top-state/$name" >/dev/null
	done
	btrfs filesystem label "$root/run/top" lightwhale-data
	umount "$root/run/top"
	filesystems "$@" >"$root/run/fstab"
	mount -t btrfs -o "noatime,subvol=/@lightwhale-data$others" "${1}p2" "$data"
	mkdir "$state" "$data/lightwhale-state-snapshots"
	mount --all --fstab "$root/run/fstab"
	for name in etc var home; do
		mkdir -p "$state/overlay/upper/$name" "$state/overlay/work/$name"
	done
	overlays >"$root/run/fstab"
	mount --all --fstab "$root/run/fstab"
	for disk; do set -- "$@" "${disk}p1" && shift; done
	swapon "$@"
}

partition() {
	wipefs --quiet --all "$1"
	printf 'label: gpt\nstart=1MiB, size=%s, type=swap, name=%s\nname=%s\n' \
		512MiB lightwhale-swap lightwhale-data |
		sfdisk --quiet --no-tell-kernel --wipe never \
			--wipe-partitions always "$1"
	partx --update "$1"
}

existing() {
	{
		filesystems "$@"
		overlays
	} >"$root/run/fstab"
	mount --all --fstab "$root/run/fstab"
	swapon "${1}p1"
}

volatile() {
	mount -t tmpfs -o noatime,mode=0755 lightwhale-data "$data"
	for name in etc var home; do
		mkdir -p "$state/overlay/upper/$name" "$state/overlay/work/$name"
	done
	overlays >"$root/run/fstab"
	mount --all --fstab "$root/run/fstab"
}

filesystems() {
	for name in data state state-snapshots; do
		case $name in
		data) target=$data ;;
		*) target=$data/lightwhale-$name ;;
		esac
		echo "${1}p2 $target btrfs noatime,subvol=/@lightwhale-$name$others 0 0"
	done
}

overlays() {
	for name in etc var home; do
		mkdir -p "$lower/$name"
		echo "$root/$name $lower/$name none bind,private 0 0"
		echo "overlay $root/$name overlay noatime,lowerdir=$lower/$name,$off,\
upperdir=$state/overlay/upper/$name,workdir=$state/overlay/work/$name 0 0"
	done
}

"$scene" "$@"
