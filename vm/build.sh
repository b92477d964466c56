#!/bin/sh
# Build the parts of the virtual machine from Debian packages.
#
#     build.sh base CACHE                            packages, kernel, initramfs
#     build.sh system CACHE EXECUTABLE CHANGES OUT   a system image (squashfs)
#
# CHANGES is a folder that is laid over the system ("" for none). Nothing here
# is cached: vm.ts calls it only when the hash of what goes in has changed.
# The host lends apt, dpkg, mksquashfs, cpio, depmod and busybox; all that runs
# inside comes out of the packages.
set -eu

here=$(cd "$(dirname "$0")" && pwd)

# Debian's names, libraries included: following every dependency would drag in
# perl and systemd. A library that is missing here is caught by check_libraries.
packages="
  busybox-static dash util-linux util-linux-extra mount fdisk btrfs-progs kmod xz-utils
  dmsetup mdadm e2fsprogs
  libc6 libgcc-s1 libblkid1 libmount1 libsmartcols1 libuuid1 libfdisk1 libudev1
  libselinux1 libpcre2-8-0 libcap2 libcap-ng0 liblzo2-2 liblzma5 libzstd1 zlib1g libssl3
  libtinfo6 libncursesw6 libreadline8 libcom-err2 libext2fs2 libss2
  libdevmapper1.02.1
  cryptsetup-bin libcryptsetup12 libpopt0 libargon2-1 libjson-c5
  dropbear-bin libcrypt1 libtomcrypt1 libtommath1 libgmp10
"
programs="
  dash mount umount sfdisk blkid wipefs mkswap swapon swapoff lsblk findmnt partx
  blockdev flock losetup fsfreeze btrfs mkfs.btrfs btrfstune kmod dmsetup mdadm mke2fs
  chattr cryptsetup dropbear dbclient
"
# What the initramfs loads: the drivers in order and the filesystems meanwhile,
# because the benchmarks of btrfs (raid6, xor) take a second.
driver_modules="
  virtio_pci virtio_rng virtio_blk virtio_scsi ahci sd_mod nvme xhci_pci ehci_pci
  usb_storage uas mmc_block sdhci_pci squashfs loop qemu_fw_cfg
"
filesystem_modules="btrfs overlay"
# For situations: modprobe finds them in the system image.
more_modules="
  dm_mod dm_flakey dm_delay dm_crypt xts ecb aes_generic dm_log_writes raid1 zram
  scsi_debug null_blk ext4 vfat nls_cp437 nls_ascii
"

build_base() {
  cache=$1
  rm -rf "$cache/base" "$cache/packages"
  mkdir -p "$cache/packages" "$cache/base/all"
  cd "$cache/packages"

  kernel=$(kernel_package)
  if [ -z "$kernel" ]; then
    apt-get update >&2
    kernel=$(kernel_package)
  fi
  # shellcheck disable=SC2086 # a list
  apt-get -qq -o APT::Sandbox::User=root download $packages "$kernel" >&2
  for package in *.deb; do dpkg -x "$package" "$cache/base/all"; done

  cd "$cache/base"
  version=$(basename all/lib/modules/*)
  extract_kernel "all/boot/vmlinuz-$version" >vmlinux
  install_programs
  install_modules "$version"
  build_initramfs "$version"
  rm -rf all "$cache/packages"
}

kernel_package() {
  apt-cache depends linux-image-amd64 2>/dev/null |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1
}

# The uncompressed kernel boots through its PVH entry: unpacking xz under
# emulation would take four of the ten seconds that a boot has. The payload's
# place is told by the boot protocol (Documentation/x86/boot.rst).
extract_kernel() {
  sectors=$(od -An -tu1 -j497 -N1 "$1")
  offset=$(od -An -tu4 -j584 -N4 "$1")
  tail -c "+$(((sectors + 1) * 512 + offset + 1))" "$1" >payload.xz
  # Its own size follows the stream, which xz calls garbage.
  LD_LIBRARY_PATH=all/lib/x86_64-linux-gnu all/usr/bin/xz -dc --single-stream \
    payload.xz || [ $? -eq 2 ]
  rm payload.xz
}

install_programs() {
  # Debian 12 packages still split / and /usr; the system joins them.
  mkdir -p root/usr/bin root/usr/sbin root/usr/lib/x86_64-linux-gnu root/usr/lib64
  for name in bin sbin lib lib64; do ln -s "usr/$name" "root/$name"; done
  for name in $programs; do
    for folder in bin sbin usr/bin usr/sbin; do
      if [ -e "all/$folder/$name" ]; then
        cp -a "all/$folder/$name" "root/usr/${folder#usr/}/"
      fi
    done
    [ -e "root/usr/bin/$name" ] || [ -e "root/usr/sbin/$name" ] || {
      echo "build.sh: no package has \"$name\"" >&2
      exit 1
    }
  done
  for name in modprobe insmod lsmod depmod modinfo rmmod; do
    ln -s ../bin/kmod "root/usr/sbin/$name"
  done
  cp -a all/lib/x86_64-linux-gnu/*.so* all/usr/lib/x86_64-linux-gnu/*.so* \
    root/usr/lib/x86_64-linux-gnu/
  cp -a all/lib64/* root/usr/lib64/
  cp -a all/bin/busybox root/usr/bin/
  # BusyBox fills in only what util-linux and the others do not bring.
  root/usr/bin/busybox --list-full | while read -r path; do
    name=$(basename "$path")
    case " $(echo "$programs" | tr '\n' ' ') kmod modprobe " in *" $name "*) continue ;; esac
    case $path in *sbin/*) folder=sbin ;; *) folder=bin ;; esac
    [ -e "root/usr/$folder/$name" ] || ln -s /bin/busybox "root/usr/$folder/$name"
  done
  check_libraries
}

check_libraries() {
  for name in $programs; do
    file=root/usr/sbin/$name
    [ -e "$file" ] || file=root/usr/bin/$name
    if root/usr/lib64/ld-linux-x86-64.so.2 --list \
      --library-path root/usr/lib/x86_64-linux-gnu "$file" 2>&1 |
      grep -v 'statically linked' |
      grep -E 'not found|error|=> /' | grep -v "=> root/"; then
      echo "build.sh: a library of $name is in no package" >&2
      exit 1
    fi
  done
}

install_modules() {
  mkdir -p "root/lib/modules/$1"
  cp all/lib/modules/"$1"/modules.* "root/lib/modules/$1/"
  depmod -b all "$1"
  # shellcheck disable=SC2086 # lists
  list_modules "$1" $driver_modules $filesystem_modules $more_modules \
    >modules.list
  while read -r path; do
    mkdir -p "root/lib/modules/$1/$(dirname "$path")"
    cp "all/lib/modules/$1/$path" "root/lib/modules/$1/$path"
  done <modules.list
  depmod -b root "$1"
}

# The files of modules and of all they need, each after what it needs.
list_modules() {
  version=$1
  shift
  # btrfs asks for crc32c by name at run time, so no dependency tells.
  for name in crc32c_generic crc32c_intel "$@"; do
    modprobe -d all -S "$version" --show-depends --ignore-install "$name" >shown
    sed -n "s|^insmod .*/lib/modules/$version/\([^ ]*\).*|\1|p" shown
  done | awk '!seen[$0]++'
}

build_initramfs() {
  mkdir -p initramfs/bin initramfs/modules initramfs/dev initramfs/proc \
    initramfs/sys initramfs/system
  cp root/usr/bin/busybox initramfs/bin/
  ln -s busybox initramfs/bin/sh
  cp "$here/init" initramfs/init
  # shellcheck disable=SC2086 # lists
  {
    list_modules "$1" $driver_modules >drivers.list
    list_modules "$1" $filesystem_modules >filesystems.list
  }
  for list in drivers filesystems; do
    while read -r path; do
      cp "all/lib/modules/$1/$path" initramfs/modules/
      basename "$path"
    done <$list.list >initramfs/modules/$list
  done
  (cd initramfs && find . | cpio -o -H newc --quiet -R 0:0) >initramfs.cpio
  rm -rf initramfs shown ./*.list
}

build_system() {
  cache=$1 executable=$2 changes=$3 out=$4
  staging=$out.staging
  rm -rf "$staging"
  cp -al "$cache/base/root" "$staging"
  cd "$staging"
  mkdir -p dev proc sys run tmp root mnt/lightwhale-data home/lightwhale \
    var/log var/lib/misc var/spool/mail var/tmp etc/docker etc/init.d etc/profile.d
  cp -RP "$here/system/." .
  cp "$here/../S11persistence" etc/init.d/S11persistence
  cp "$here/../profile.d/persistence.sh" etc/profile.d/persistence.sh
  chmod 755 etc/init.d/* usr/sbin/vm-check
  cp "$executable" usr/sbin/persistence.ts
  chmod 755 usr/sbin/persistence.ts
  if [ -n "$changes" ]; then
    # A name ending in .removed takes away what the system has there.
    (cd "$changes" && find . -name '*.removed') | while read -r path; do
      rm -rf "${path%.removed}"
    done
    cp -RP --remove-destination "$changes/." .
    find . -name '*.removed' -exec rm {} +
  fi
  # Uncompressed: unpacking under emulation costs more than reading does.
  mksquashfs . "$out.new" -noI -noD -noF -noX -quiet -no-progress \
    -noappend -p 'home/lightwhale m 700 1000 1000' -p 'var/spool/mail m 1777 0 8' \
    -p 'var/tmp m 1777 0 0' -p 'tmp m 1777 0 0' -p 'etc/shadow m 640 0 42' >&2
  mv "$out.new" "$out"
  cd /
  rm -rf "$staging"
}

case ${1-} in
base) build_base "$2" ;;
system) build_system "$2" "$3" "$4" "$5" ;;
*)
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
