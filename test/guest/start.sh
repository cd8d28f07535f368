#!/bin/sh
# The second half of a guest's start: what a system has mounted, then the command, then its exit status and files.
#
# lariat.control takes the lines "ready" and "exit N"; lariat.output what the command says; lariat.files a tar of $LARIAT_OUT.
# No udev runs here: devtmpfs makes the nodes, and a port's name is in sysfs.
modprobe -a virtio_console configfs

ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
mkdir -p /dev/pts /dev/shm /lariat/out
mount -t devpts devpts /dev/pts
for dir in /dev/shm /run /tmp /var/lib/nfs; do mount -t tmpfs tmpfs $dir; done
chmod 1777 /tmp /dev/shm
mkdir -p /run/lock /run/netns /var/lib/nfs/rpc_pipefs /var/lib/nfs/v4recovery /var/lib/nfs/nfsdcltrack /var/lib/nfs/sm /var/lib/nfs/sm.bak
: >/var/lib/nfs/etab
: >/var/lib/nfs/rmtab
# What ip-netns would do at its first call: mounts made in one namespace's process show in the others.
mount --make-rshared /
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t configfs configfs /sys/kernel/config
mount -t debugfs debugfs /sys/kernel/debug
hostname guest
ip link set lo up
echo 1 >/proc/sys/kernel/sysrq

# shellcheck source=/dev/null
. /lariat/.guest/settings

if [ -n "$WARM" ]; then
	# The first security association loads its ciphers one by one, which takes seconds and would be counted as the tests'.
	# A kernel that is told to lack some of it gets the other ciphers.
	modprobe -a esp4 esp6 xfrm_user xfrm_interface gcm ghash_generic ghash_clmulni_intel seqiv ctr cryptd aesni_intel drbg echainiv
	esp() { ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 1 mode tunnel "$@" && ip xfrm state flush; }
	esp aead 'rfc4106(gcm(aes))' 0x0000000000000000000000000000000000000000 128 ||
		esp enc 'cbc(aes)' 0x00000000000000000000000000000000 auth-trunc 'hmac(sha256)' 0x0000000000000000000000000000000000000000000000000000000000000000 128
fi

# The ports appear a moment after their driver; the runner limits how long a guest may take to be ready.
port() {
	for dir in /sys/class/virtio-ports/*; do
		[ "$(cat "$dir/name" 2>/dev/null)" = "$1" ] && echo "/dev/${dir##*/}" && return
	done
	return 1
}
for name in control output files; do
	until device=$(port lariat.$name); do sleep 0.02; done
	eval "$name=$device"
done

exec 3>"$control"
echo ready >&3
cd /lariat/work || cd /
if [ -n "$INTERACTIVE" ]; then
	setsid -c /lariat/.guest/command </dev/ttyS0 >/dev/ttyS0 2>&1 3>&-
else
	/lariat/.guest/command </dev/null >"$output" 2>&1 3>&-
fi
code=$?
tar -c -C /lariat/out . >"$files"
echo "exit $code" >&3
echo o >/proc/sysrq-trigger
# PID 1 must not end before the power does.
while :; do sleep 60; done
