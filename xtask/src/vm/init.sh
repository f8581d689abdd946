#!/bin/busybox sh
# The initramfs: mounts the guest's root (read-only disks below, memory above) and goes there.

/bin/busybox --install -s /bin
export PATH=/bin

fail() {
    echo "init: $*"
    poweroff -f
}

disk() {
    for directory in /sys/block/vd*; do
        [ "$(cat "$directory/serial")" = "$1" ] && echo "/dev/${directory##*/}" && return
    done
    fail "no disk $1"
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do
    insmod "/modules/$module.ko" || fail "cannot load $module"
done </modules/order

mount -t ext4 -o ro "$(disk system)" /system || fail "cannot mount the system"
mount -t ext4 -o ro "$(disk modules)" /kernel || fail "cannot mount the modules"
mount -t tmpfs -o mode=755 upper /upper
mkdir /upper/root /upper/work
mount -t overlay -o lowerdir=/kernel:/system,upperdir=/upper/root,workdir=/upper/work root /root ||
    fail "cannot mount the root"
mkdir -p /root/vm /root/dev /root/proc /root/sys
cp /vm/* /root/vm/
mount --move /dev /root/dev
mount --move /sys /root/sys
umount /proc
exec switch_root /root /bin/sh /vm/main
