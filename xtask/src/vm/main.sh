# The guest's first process, in its root: makes it what a running system is, runs the command, sends results back.
# Ports: 1 and 2 carry the command's output, 3 says how far we are. Disks are found by their serial.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 TERM=dumb

port() {
    for device in /dev/vport*p"$1"; do echo "$device"; done
}

disk() {
    for directory in /sys/block/vd*; do
        [ "$(cat "$directory/serial")" = "$1" ] && echo "/dev/${directory##*/}" && return
    done
}

tell() {
    echo "$*" >"$(port 3)"
}

mkdir -p /proc /tmp /run /root /share /scratch /dev/pts /dev/shm /mnt /var/tmp /var/lib
mount -t proc proc /proc
mount -t devpts -o ptmxmode=666 devpts /dev/pts
for place in /dev/shm /run /tmp; do mount -t tmpfs -o mode=1777 tmpfs "$place"; done
mkdir -p /run/lock
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
ln -sf /proc/self/fd /dev/fd
ln -sf fd/0 /dev/stdin
ln -sf fd/1 /dev/stdout
ln -sf fd/2 /dev/stderr
ln -sf /proc/mounts /etc/mtab
echo guest >/proc/sys/kernel/hostname
ip link set lo up
# What udev would load at boot. Modules that make devices at once (brd, null_blk, nbd) are the command's own business.
for module in loop fuse btrfs ublk_drv; do
    { modprobe "$module" || echo "main: no module $module" >/dev/console; } &
done
wait
mount -t ext4 "$(disk scratch)" /scratch
share=$(disk share)
if [ -n "$share" ]; then
    mkdir -p /vm/share /vm/changes
    mount -t ext4 -o ro "$share" /vm/share
    mount -t tmpfs -o mode=755 changes /vm/changes
    mkdir /vm/changes/files /vm/changes/work
    mount -t overlay -o lowerdir=/vm/share,upperdir=/vm/changes/files,workdir=/vm/changes/work share /share
    cd /share || exit
else
    cd /root || exit
fi

mkfifo /vm/stdout /vm/stderr
cat /vm/stdout >"$(port 1)" &
first=$!
cat /vm/stderr >"$(port 2)" &
second=$!
tell ready
/bin/sh /vm/command </dev/null >/vm/stdout 2>/vm/stderr &
wait $!
code=$?
# What the command left running may hold its output open: it is given a moment.
turns=0
while [ "$turns" -lt 20 ] && { kill -0 "$first" || kill -0 "$second"; } 2>/dev/null; do
    sleep 0.1
    turns=$((turns + 1))
done

[ "$code" -eq 0 ] || dmesg >/dev/console
if [ -n "$share" ]; then
    # What was deleted is a character device there; it stays in the host's folder.
    find /vm/changes/files -type c -delete
    tar -c -C /vm/changes/files . >"$(disk results)" && tell results
fi
sync
tell "exit $code"
busybox poweroff -f
