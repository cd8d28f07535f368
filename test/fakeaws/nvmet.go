package fakeaws

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Nvmet makes attached volumes NVMe drives of this machine that look like EBS's drives on a Nitro
// instance. The kernel's own target serves sparse files to its own initiator, by TCP on the
// loopback interface. The drives have EBS's model, and the volume's id as serial number.
//
//	file ── loop device ── nvmet namespace ── 127.0.0.1 ── nvme0 ── /dev/nvme0n1
//
// The loop device provides sectors of 512 bytes, which EBS has. The target would serve a file in
// blocks of 4096 bytes. Native multipath is the kernel's default. With it, sysfs has a second,
// hidden entry such as nvme0c0n1 for each drive. Some instances have that, too.
//
// Nvmet needs root and a kernel with nvmet-tcp and nvme-tcp, so it is for guests.
type Nvmet struct {
	dir  string
	port string // directory in configfs
	addr string // of the port, in the initiator's syntax

	mu     sync.Mutex
	drives map[string]*drive // by volume
}

type drive struct {
	controller string // nvme0; "" after Tear
	loop       *os.File
}

const nvmetRoot = "/sys/kernel/config/nvmet"

// NewNvmet starts the target. Volumes are files in dir. The end of t removes everything but dir.
func NewNvmet(t testing.TB, dir string) *Nvmet {
	t.Helper()
	if out, err := exec.Command("modprobe", "-a", "loop", "nvmet", "nvmet-tcp", "nvme-tcp").CombinedOutput(); err != nil {
		t.Fatalf("fakeaws: modprobe: %v: %s", err, out)
	}
	n := &Nvmet{dir: dir, drives: map[string]*drive{}}
	if err := n.listen(); err != nil {
		t.Fatal("fakeaws: ", err)
	}
	t.Cleanup(func() {
		if err := n.close(); err != nil {
			t.Error("fakeaws: ", err)
		}
	})
	return n
}

// listen makes a port of the target.
func (n *Nvmet) listen() error {
	for id := 1; ; id++ {
		n.port = filepath.Join(nvmetRoot, "ports", strconv.Itoa(id))
		err := os.Mkdir(n.port, 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue // the port of another Nvmet
		}
		service := strconv.Itoa(4419 + id)
		n.addr = "traddr=127.0.0.1,trsvcid=" + service
		return errors.Join(err, write(n.port, "addr_trtype", "tcp", "addr_adrfam", "ipv4", "addr_traddr", "127.0.0.1",
			"addr_trsvcid", service))
	}
}

func (n *Nvmet) close() (err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for id := range n.drives {
		err = errors.Join(err, n.detach(id))
	}
	return errors.Join(err, os.Remove(n.port))
}

// write sets attributes of a directory in configfs.
func write(dir string, pairs ...string) error {
	for i := 0; i < len(pairs); i += 2 {
		if err := os.WriteFile(filepath.Join(dir, pairs[i]), []byte(pairs[i+1]), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// Image returns the file with a volume's data. A test may create the file before the first
// attachment, and change it while the volume is detached.
func (n *Nvmet) Image(volumeID string) string { return filepath.Join(n.dir, volumeID+".img") }

func (n *Nvmet) grow(volumeID string, bytes int64) error {
	f, err := os.OpenFile(n.Image(volumeID), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Size() >= bytes {
		return err
	}
	return f.Truncate(bytes)
}

// names returns a volume's paths in configfs: the directory of its subsystem, its namespace, and
// the link that offers it.
func (n *Nvmet) names(volumeID string) (subsystem, namespace, link string) {
	subsystem = filepath.Join(nvmetRoot, "subsystems", volumeID)
	return subsystem, filepath.Join(subsystem, "namespaces", "1"), filepath.Join(n.port, "subsystems", volumeID)
}

// Attach connects the volume's drive. The block device appears a moment later. All instances are
// this machine. The device name of EC2 is not visible.
func (n *Nvmet) Attach(volumeID, _, _ string, bytes int64) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.drives[volumeID] != nil {
		return fmt.Errorf("%s is attached", volumeID)
	}
	if err := n.grow(volumeID, bytes); err != nil {
		return err
	}
	d := &drive{}
	n.drives[volumeID] = d
	if err := n.attach(d, volumeID); err != nil {
		return errors.Join(err, n.detach(volumeID))
	}
	return nil
}

func (n *Nvmet) attach(d *drive, volumeID string) (err error) {
	if d.loop, err = loopDevice(n.Image(volumeID)); err != nil {
		return err
	}
	subsystem, namespace, link := n.names(volumeID)
	if err := os.Mkdir(subsystem, 0o755); err != nil {
		return err
	}
	err = write(subsystem, "attr_allow_any_host", "1", "attr_serial", strings.Replace(volumeID, "-", "", 1), "attr_model",
		"Amazon Elastic Block Store")
	if err != nil {
		return err
	}
	if err := os.Mkdir(namespace, 0o755); err != nil {
		return err
	}
	if err := write(namespace, "device_path", d.loop.Name(), "enable", "1"); err != nil {
		return err
	}
	if err := os.Symlink(subsystem, link); err != nil {
		return err
	}
	d.controller, err = n.connect(volumeID)
	return err
}

// connect makes the initiator connect to a subsystem. The controller exists when the write returns.
func (n *Nvmet) connect(volumeID string) (controller string, err error) {
	f, err := os.OpenFile("/dev/nvme-fabrics", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	// An emulated machine may be too slow for the usual five seconds.
	if _, err := f.WriteString("transport=tcp," + n.addr + ",nqn=" + volumeID +
		",nr_io_queues=1,keep_alive_tmo=60"); err != nil {
		return "", fmt.Errorf("connect %s: %w", volumeID, err)
	}
	buf := make([]byte, 256)
	read, err := f.Read(buf)
	if err != nil {
		return "", fmt.Errorf("connect %s: %w", volumeID, err)
	}
	var number int
	if _, err := fmt.Sscanf(string(buf[:read]), "instance=%d", &number); err != nil {
		return "", fmt.Errorf("connect %s: answer %q: %w", volumeID, buf[:read], err)
	}
	return fmt.Sprintf("nvme%d", number), nil
}

// Tear removes the drive while the cloud still shows it as attached. The next Detach finds it
// removed.
func (n *Nvmet) Tear(volumeID string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	d := n.drives[volumeID]
	if d == nil {
		return fmt.Errorf("%s is not attached", volumeID)
	}
	return d.disconnect()
}

// disconnect removes the block device, even if it is in use.
func (d *drive) disconnect() error {
	if d.controller == "" {
		return nil
	}
	err := write("/sys/class/nvme/"+d.controller, "delete_controller", "1")
	d.controller = ""
	return err
}

// Detach removes the drive. The data stays.
func (n *Nvmet) Detach(volumeID string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.detach(volumeID)
}

// detach reverses Attach, even an incomplete one.
func (n *Nvmet) detach(volumeID string) error {
	d := n.drives[volumeID]
	if d == nil {
		return fmt.Errorf("%s is not attached", volumeID)
	}
	delete(n.drives, volumeID)
	errs := []error{d.disconnect()}
	subsystem, namespace, link := n.names(volumeID)
	for _, path := range []string{link, namespace, subsystem} {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if d.loop != nil {
		errs = append(errs, unix.IoctlSetInt(int(d.loop.Fd()), unix.LOOP_CLR_FD, 0), d.loop.Close())
	}
	return errors.Join(errs...)
}

// Resize enlarges the file. If the volume is attached, it also enlarges the drive, and its user
// sees that at once.
func (n *Nvmet) Resize(volumeID string, bytes int64) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.grow(volumeID, bytes); err != nil {
		return err
	}
	d := n.drives[volumeID]
	if d == nil {
		return nil
	}
	if err := unix.IoctlSetInt(int(d.loop.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("%s: %w", d.loop.Name(), err)
	}
	_, namespace, _ := n.names(volumeID)
	return write(namespace, "revalidate_size", "1")
}

// Delete removes the file.
func (n *Nvmet) Delete(volumeID string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.drives[volumeID] != nil {
		return fmt.Errorf("%s is attached", volumeID)
	}
	if err := os.Remove(n.Image(volumeID)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// loopDevice returns a loop device for a file.
func loopDevice(path string) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	backing, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	for {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("free loop device: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", number), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{Fd: uint32(backing.Fd())})
		if err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) { // another process took it
			return nil, fmt.Errorf("%s for %s: %w", loop.Name(), path, err)
		}
	}
}
