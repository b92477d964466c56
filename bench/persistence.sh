#!/bin/sh
# The boot sequence of persistence.ts as the shell script that it replaces:
# what the benchmark compares it with, so nothing in it is slow on purpose.
# What is asked of many devices is asked by one process, what the shell can do
# itself is done by it, and what can overlap does.
#
#     persistence.sh [--root DIR] [--devices LIST] [--wait SECONDS] [--quiet]
#
# It ends in the same state as persistence.ts wherever nothing is wrong (the
# benchmark proves it). What persistence.ts does about damage, clones, split
# mirrors, stale, new and enlarged disks is left out, which makes it faster.
set -eu

magic=lightwhale-please-format-me
label=lightwhale-data
swap_label=lightwhale-swap
unfinished=lightwhale-unfinished
data_root=/mnt/lightwhale-data/lightwhale-state/docker
overlay_options=noatime,index=off,redirect_dir=off,metacopy=off,xino=off
newline='
'

say() { # LEVEL MESSAGE
	case $1 in
	3) errors="$errors${errors:+, }\"$2\"" ;;
	4) warnings="$warnings${warnings:+, }\"$2\"" ;;
	esac
	if [ "$1" -le "$loudness" ]; then echo "persistence: $2" >&2; fi
	echo "<$1>persistence: $2" 2>/dev/null >/dev/kmsg || true
}

fail() {
	say 3 "$1"
	return 1
}

uptime_ms() {
	read -r now _ </proc/uptime
	now=${now%.*}${now#*.}0
}

# --- Steps 1 and 2: look -----------------------------------------------------

# Whole disks and their partitions, from sysfs: $disks and $nodes.
list_devices() {
	disks='' nodes=''
	# As persistence.ts has them: loop9 before loop10.
	for directory in /sys/block/??? /sys/block/???? /sys/block/????? \
		/sys/block/?????? /sys/block/???????*; do
		disk=${directory##*/}
		if [ "$only" ]; then
			case ",$only," in *",$disk,"*) ;; *) continue ;; esac
		else
			case $disk in
			ram[0-9]* | zram[0-9]* | fd[0-9]* | sr[0-9]* | loop[0-9]*) continue ;;
			esac
		fi
		if [ ! -e "$directory" ]; then continue; fi # no name is so long
		read -r sectors <"$directory/size"
		if [ "$sectors" -eq 0 ]; then continue; fi # no medium
		disks="$disks /dev/$disk" nodes="$nodes /dev/$disk"
		for file in "$directory/$disk"*/partition; do
			if [ -e "$file" ]; then
				file=${file%/partition}
				nodes="$nodes /dev/${file##*/}"
			fi
		done
	done
}

# One process for all devices. Sets $uuid and $members to the data filesystem,
# $swaps to the swap areas, $magics to the partitions with the magic name.
find_data() {
	uuid='' members='' swaps='' magics='' node=''
	if [ ! "$nodes" ]; then return; fi
	# shellcheck disable=SC2086 # $nodes are words
	found=$(blkid --cache-file /dev/null --output export \
		--match-tag LABEL --match-tag TYPE --match-tag UUID \
		--match-tag PARTLABEL $nodes) || true
	is_data='' type='' id=''
	IFS=$newline && set -f
	# shellcheck disable=SC2086 # its lines
	set -- $found DEVNAME=
	unset IFS && set +f
	for line; do
		value=${line#*=}
		case $line in
		DEVNAME=*)
			if [ "$is_data" ] && [ "$type" = btrfs ]; then
				if [ "${uuid:=$id}" = "$id" ]; then
					members="$members $node"
				else
					say 4 "There is more than one data filesystem: $uuid is used, $node not"
				fi
			fi
			node=$value is_data='' type='' id=''
			;;
		LABEL="$label") is_data=yes ;;
		LABEL="$swap_label") swaps="$swaps $node" ;;
		TYPE=*) type=$value ;;
		UUID=*) id=$value ;;
		PARTLABEL="$magic") magics="$magics $node" ;;
		esac
	done
}

# Adds the whole disks that begin with the magic header to $magics.
find_magic() {
	if [ ! "$disks" ]; then return; fi
	# shellcheck disable=SC2086 # $disks are words
	found=$(head -v -c ${#magic} $disks 2>/dev/null |
		grep -a -F -x -B 1 "$magic") || return 0
	IFS=$newline && set -f
	# shellcheck disable=SC2086 # its lines
	set -- $found
	unset IFS && set +f
	for line; do
		case $line in
		'==> '*' <==')
			line=${line#==> }
			magics="$magics ${line% <==}"
			;;
		esac
	done
}

is_whole() { [ ! -e "/sys/class/block/${1#/dev/}/partition" ]; }

# --- Steps 3 to 5: create ----------------------------------------------------

partition_path() { # DISK NUMBER
	case $1 in
	*[0-9]) path=$1p$2 ;;
	*) path=$1$2 ;;
	esac
}

# Sets $swap_mib for a disk: memory, at most 4 GiB, at most an eighth of it.
size_swap() {
	read -r sectors <"/sys/class/block/${1#/dev/}/size"
	swap_mib=$((memory_mib < 4096 ? memory_mib : 4096))
	if [ "$swap_mib" -gt $((sectors / 2048 / 8)) ]; then
		swap_mib=$((sectors / 2048 / 8))
	fi
	if [ "$sectors" -lt 4194304 ]; then swap_mib=0; fi # under 2 GiB
}

wait_for_node() {
	tries=0
	until [ -b "$1" ]; do
		tries=$((tries + 1))
		if [ "$tries" -gt 200 ]; then fail "Cannot find $1"; fi
		sleep 0.05
	done
}

# The header stays until the filesystem is complete.
partition_disk() {
	wipefs --quiet --all "$1"
	table="label: gpt$newline"
	if [ "$swap_mib" -gt 0 ]; then
		table="${table}start=1MiB, size=${swap_mib}MiB, type=swap, "
		table="${table}name=$swap_label$newline"
		table="${table}type=linux, name=$label$newline"
	else
		table="${table}start=1MiB, type=linux, name=$label$newline"
	fi
	printf %s "$table" | sfdisk --quiet --no-tell-kernel --wipe never \
		--wipe-partitions always "$1"
	partx --update "$1"
}

create() {
	read -r _ memory_kib _ </proc/meminfo
	memory_mib=$((memory_kib / 1024))
	new='' jobs=''
	for disk in $magics; do
		if ! is_whole "$disk"; then
			new="$new $disk"
			continue
		fi
		size_swap "$disk"
		say 6 "Partitioning $disk"
		partition_disk "$disk" &
		jobs="$jobs $!"
		number=1
		if [ "$swap_mib" -gt 0 ]; then
			partition_path "$disk" 1
			swaps="$swaps $path"
			number=2
		fi
		partition_path "$disk" $number
		new="$new $path"
	done
	for job in $jobs; do wait "$job"; done
	for node in $new $swaps; do wait_for_node "$node"; done

	# shellcheck disable=SC2086 # $new are words
	set -- $new
	case $# in
	1) profiles='--data single --metadata dup' ;;
	2) profiles='--data raid1 --metadata raid1' ;;
	3) profiles='--data raid1 --metadata raid1c3' ;;
	*) profiles='--data raid1 --metadata raid1c4' ;;
	esac
	say 6 "Creating \\\"$label\\\" on $*"
	jobs=''
	for node in $swaps; do
		mkswap --label $swap_label "$node" >/dev/null &
		jobs="$jobs $!"
	done
	# shellcheck disable=SC2086 # $profiles are words
	mkfs.btrfs --quiet --force --label $unfinished $profiles "$@" >&2
	for job in $jobs; do wait "$job"; done

	mkdir -p "$run/top-level"
	mount -t btrfs -o "noatime,subvolid=5$(other_members "$@")" "$1" \
		"$run/top-level"
	top=$run/top-level/@lightwhale
	for name in data state state-snapshots; do
		btrfs subvolume create "$top-$name" >/dev/null
	done
	btrfs property set -t inode "$top-state" compression zstd
	for name in docker containerd; do
		btrfs subvolume create "$top-state/$name" >/dev/null
	done
	chmod 0710 "$top-state/docker"
	chmod 0711 "$top-state/containerd"
	btrfs filesystem sync "$run/top-level"
	btrfs filesystem label "$run/top-level" $label # the commit
	umount "$run/top-level"
	for disk in $magics; do
		if is_whole "$disk"; then
			dd if=/dev/zero of="$disk" bs=${#magic} count=1 conv=notrunc,fsync \
				status=none
		else
			sfdisk --quiet --part-label "/dev/$(parent "$disk")" \
				"$(cat "/sys/class/block/${disk#/dev/}/partition")" $label
		fi
	done
	members=$new
	uuid=$(blkid --probe --match-tag UUID --output value "$1")
}

parent() {
	directory=$(readlink -f "/sys/class/block/${1#/dev/}")
	directory=${directory%/*}
	echo "${directory##*/}"
}

other_members() {
	shift
	for node; do printf ',device=%s' "$node"; done
}

# --- Step 6: mount the data filesystem, or a tmpfs ---------------------------

# CRC-32, as in zlib: $sum.
crc32() {
	sum=4294967295
	for byte in $(printf %s "$1" | od -A n -v -t u1); do
		sum=$((sum ^ byte))
		for _ in 1 2 3 4 5 6 7 8; do
			sum=$((sum >> 1 ^ (0xedb88320 & -(sum & 1))))
		done
	done
	sum=$((sum ^ 4294967295))
}

# Reads the newer of the two records of a member: $record_epoch, $record_member,
# $record_present. (A shell leaves out the NULs around them.)
read_record() {
	record_epoch=0 record_member='' record_present=''
	slots=$(dd if="$1" bs=4096 skip=14 count=2 status=none) 2>/dev/null
	IFS=$newline && set -f
	# shellcheck disable=SC2086 # its lines
	set -- $slots
	unset IFS && set +f
	for line; do
		case $line in
		'{"fsid":"'"$uuid"'","member":"'*) ;;
		*) continue ;;
		esac
		epoch=${line#*'"epoch":'}
		epoch=${epoch%%,*}
		if [ "$epoch" -le "$record_epoch" ]; then continue; fi
		crc32 "$line"
		case $slots in
		*"lightwhale-mark 1$newline$(printf %08x $sum)$newline$line"*) ;;
		*) continue ;;
		esac
		record_epoch=$epoch
		record_member=${line#*'"member":"'}
		record_member=${record_member%%\"*}
		record_present=${line#*'"present":['}
		record_present=${record_present%%]*}
	done
}

# Reads all records: $last is the highest epoch, $known the number of members
# that it remembers, $ids and $count are those that are present.
read_records() {
	last=0 known=0 ids='' count=0
	for node in $members; do
		read_record "$node"
		if [ ! "$record_member" ]; then
			read -r record_member </proc/sys/kernel/random/uuid
		fi
		if [ "$record_epoch" -gt "$last" ]; then
			last=$record_epoch known=0
			IFS=,
			for _ in $record_present; do known=$((known + 1)); done
			unset IFS
		fi
		ids="$ids $record_member" count=$((count + 1))
	done
}

# What the last record remembers but is not there may be late.
wait_for_members() {
	uptime_ms
	until=$((now + 1000 * wait))
	read_records
	while [ "$count" -lt "$known" ] && [ "$now" -lt "$until" ]; do
		sleep 0.2
		list_devices
		find_data
		read_records
		uptime_ms
	done
	if [ "$count" -lt "$known" ]; then
		say 4 "The data filesystem lacks $((known - count)) of $known devices"
		degraded=,degraded
	fi
}

# Writes the records of the members that are present, before a read-write mount.
record_members() {
	present='' jobs='' epoch=$((last + 1))
	for id in $ids; do present="$present${present:+,}\"$id\""; done
	# shellcheck disable=SC2086 # $ids are words
	set -- $ids
	# Without this, the tool has profiles to look at in the background.
	settled="\"settled\":{\"devices\":$#,\"unmirrored\":[]}"
	for node in $members; do
		json="{\"fsid\":\"$uuid\",\"member\":\"$1\",\"epoch\":$epoch,"
		json="$json\"present\":[$present],\"absent\":{},$settled}"
		crc32 "$json"
		printf 'lightwhale-mark 1\n%08x\n%s\n' "$sum" "$json" |
			dd of="$node" bs=4096 count=1 seek=$((14 + epoch % 2)) \
				conv=notrunc,sync,fsync status=none &
		jobs="$jobs $!"
		shift
	done
	for job in $jobs; do wait "$job"; done
}

mount_subvolume() { # SUBVOLUME TARGET
	# shellcheck disable=SC2086 # $members are words
	set -- "$1" "$2" $members
	options=noatime,subvol=/$1$degraded target=$2
	shift 2
	mount -t btrfs -o "$options$(other_members "$@")" "$1" "$target"
}

mount_data() {
	if [ ! -d "$data" ]; then mkdir -p "$data"; fi
	record_members
	mount_subvolume @lightwhale-data "$data"
	if [ ! -d "$state" ] || [ ! -d "$snapshots" ]; then
		mkdir -p "$state" "$snapshots"
	fi
	for which in state snapshots; do
		case $which in
		state) target=$state subvolume=@lightwhale-state ;;
		snapshots) target=$snapshots subvolume=@lightwhale-state-snapshots ;;
		esac
		set -- "$target"/* # never over a directory that holds data
		if [ ! -e "$1" ]; then mount_subvolume "$subvolume" "$target"; fi
	done
}

mount_volatile() {
	read -r _ memory_kib _ </proc/meminfo
	mkdir -p "$data"
	half_mib=$((memory_kib / 2048))
	mount -t tmpfs -o "noatime,mode=0755,size=${half_mib}m" $label "$data"
	mkdir -p "$state"
	say 6 "Volatile: what is written below $data is lost at shutdown"
}

# --- Step 7: overlays --------------------------------------------------------

mount_overlays() {
	mkdir -p "$lower/etc" "$lower/var" "$lower/home" \
		"$work/etc" "$work/var" "$work/home" "$upper"
	# The root of an overlay shows the attributes of its upper.
	missing=''
	for name in etc var home; do
		if [ ! -d "$upper/$name" ]; then missing="$missing $name"; fi
	done
	if [ "$missing" ]; then
		# shellcheck disable=SC2086 # $missing are words
		tar -C "$root" -c -f - --format=posix --xattrs --xattrs-include='*' \
			--no-recursion $missing |
			tar -C "$upper" -x -p -f - --xattrs --xattrs-include='*' \
				--same-owner
	fi
	for name in etc var home; do
		echo "$root/$name $lower/$name none bind,private 0 0"
		echo "overlay $root/$name overlay lowerdir=$lower/$name,\
upperdir=$upper/$name,workdir=$work/$name,$overlay_options 0 0"
	done >"$run/fstab"
	mount --all --fstab "$run/fstab"
	for name in etc var home; do
		[ -w "$root/$name" ] || fail "Cannot make $root/$name writable"
	done
}

# --- Steps 8 and 9: Docker, swap, the status file ----------------------------

configure_docker() {
	if [ ! -d "$state/docker" ]; then mkdir -m 0710 "$state/docker"; fi
	json=$root/etc/docker/daemon.json
	if [ ! -s "$json" ]; then
		mkdir -p "$root/etc/docker"
		printf '{\n  "data-root": "%s"\n}\n' "$data_root" >"$json.new"
		mv "$json.new" "$json"
		say 6 "Docker keeps its data in \\\"$data_root\\\""
		return
	fi
	text=''
	while IFS= read -r line; do text="$text$line$newline"; done <"$json"
	case $text in
	*"\"data-root\": \"$data_root\""*) return ;;
	*'"data-root"'*)
		edit="s|\"data-root\"[^,}]*|\"data-root\": \"$data_root\"|"
		;;
	'{'*'}'*) edit="0,/{/s|{|{\n  \"data-root\": \"$data_root\",|" ;;
	*)
		say 3 "Cannot point Docker at its data: $json is not a JSON object"
		return
		;;
	esac
	cp -p "$json" "$json.new"
	sed -e "$edit" "$json" >"$json.new"
	sync "$json.new"
	mv "$json.new" "$json"
	say 6 "Docker keeps its data in \\\"$data_root\\\""
}

swap_on() {
	mine=''
	for node in $swaps; do
		disk=${node%[0-9]}
		for member in $members; do
			if [ "${member%[0-9]}" = "$disk" ]; then mine="$mine $node"; fi
		done
	done
	# shellcheck disable=SC2086 # $mine are words
	if [ "$mine" ]; then swapon $mine || say 3 "Cannot turn on swap on$mine"; fi
}

write_report() { # STATUS
	devices='' id=null lacks=false
	for node in $members; do devices="$devices${devices:+, }\"$node\""; done
	if [ "$uuid" ]; then id=\"$uuid\"; fi
	if [ "$degraded" ]; then lacks=true; fi
	uptime_ms
	printf '{\n  %s,\n  %s,\n  %s,\n  %s,\n  %s,\n  %s,\n  %s,\n  %s,\n  %s,
  %s,\n  %s,\n  %s\n}\n' \
		'"version": "1.0.0"' "\"mode\": \"$mode\"" "\"reason\": \"$reason\"" \
		"\"exitStatus\": $1" "\"uuid\": $id" "\"devices\": [$devices]" \
		'"missing": []' "\"degraded\": $lacks" "\"plan\": [\"$mode: $reason\"]" \
		"\"warnings\": [$warnings]" "\"errors\": [$errors]" \
		"\"durationMs\": $((now - started))" >"$run/persistence.json"
}

# --- The nine steps ----------------------------------------------------------

boot() {
	if [ -e "$state" ]; then
		mode=mounted reason="$data is already there"
		return
	fi
	list_devices
	find_data
	if [ ! "$members" ]; then
		find_magic
		if [ "$magics" ]; then
			say 6 "persistent:$magics carries the magic header"
			create
			read_records
		fi
	else
		wait_for_members
	fi
	if [ "$members" ]; then
		mode=persistent reason="${members# } hold the data filesystem"
		say 6 "$mode: $reason"
		mount_data
	else
		mode=volatile reason='no disk is enabled'
		say 6 "$mode: $reason"
		mount_volatile
	fi
	mount_overlays
	configure_docker
	swap_on
}

root='' only='' wait=10 loudness=6
while [ $# -gt 0 ]; do
	case $1 in
	--root) root=${2%/} && shift ;;
	--devices)
		shift
		IFS=,
		for device in $1; do only="$only${only:+,}${device#/dev/}"; done
		unset IFS
		;;
	--wait) wait=$2 && shift ;;
	--quiet) loudness=4 ;;
	*)
		echo "persistence: Unknown option \"$1\"" >&2
		exit 2
		;;
	esac
	shift
done
PATH=$PATH:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
export PATH LC_ALL

data=$root/mnt/lightwhale-data
state=$data/lightwhale-state
snapshots=$data/lightwhale-state-snapshots
upper=$state/overlay/upper
work=$state/overlay/work
run=$root/run/lightwhale
lower=$run/overlay/lower
mode=fallback reason='' uuid='' members='' swaps='' degraded=''
warnings='' errors=''
uptime_ms
started=$now

mkdir -p "$run"
exec 9>"$run/lock"
flock --timeout 120 9

status=0
trap 'status=$?
	if [ $status -ne 0 ]; then
		say 3 "The boot failed: the system runs volatile"
		umount -R "$data" || true
		mode=fallback members="" uuid=""
		mount_volatile && mount_overlays
		status=1
	fi
	write_report $status
	exit $status' EXIT
boot
