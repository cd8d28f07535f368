# Starts systemd of a root directory as process 1 of namespaces of its own. Arguments: root directory, host name, path of the network namespace.
# It has control groups of its own in each of the machine's hierarchies, be they of version 1, 2 or both.
set -e
root=$1 name=$2 net=$3 controllers=
for line in $(cat /proc/self/cgroup); do # number:controllers:path
	c=${line#*:} c=${c%%:*} top=/sys/fs/cgroup
	case $c in
	'') [ -e $top/cgroup.procs ] || top=$top/unified ;;
	*) top=$top/${c#name=} ;;
	esac
	[ -d "$top" ] || continue
	for group in $top/lariat-debian $top/lariat-debian/$name; do
		mkdir -p $group
		[ "$c" != cpuset ] || for f in cpus mems; do cat $top/cpuset.$f > $group/cpuset.$f; done
	done
	echo $$ > $group/cgroup.procs
	controllers="$controllers ${c:-unified}"
done
export controllers

exec nsenter --net="$net" unshare --mount --uts --ipc --pid --cgroup --fork --kill-child sh -e -c '
hostname "$1"
cd "$0"
mount -t proc proc proc
mount -t sysfs sysfs sys
if [ -e /sys/fs/cgroup/cgroup.procs ]; then
	mount -t cgroup2 cgroup sys/fs/cgroup
else
	mount -t tmpfs -o mode=755 cgroup sys/fs/cgroup
	for c in $controllers; do
		mkdir sys/fs/cgroup/${c#name=}
		case $c in
		unified) mount -t cgroup2 cgroup sys/fs/cgroup/unified ;;
		name=*) mount -t cgroup -o none,$c cgroup sys/fs/cgroup/${c#name=} ;;
		*) mount -t cgroup -o $c cgroup sys/fs/cgroup/$c ;;
		esac
	done
fi
mount -t tmpfs -o mode=755 dev dev
for n in null zero full random urandom tty; do
	: > dev/$n
	mount --bind /dev/$n dev/$n
done
mkdir dev/pts dev/shm dev/mqueue
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
pivot_root . mnt
umount -l mnt
# Version 1 of control groups is refused by newer ones otherwise.
exec env -i container=lariat PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin /usr/lib/systemd/systemd SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1
' "$root" "$name"
