package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Monitor speaks QMP with the QEMU that runs this guest: tests in a guest with Options.Slots plug and unplug
// volumes by it.
type Monitor struct {
	f    *os.File
	in   *json.Decoder
	gone map[string]bool // devices whose end was told
	disk map[int]bool    // disks that QEMU knows
}

// answer is any line of QMP.
type answer struct {
	Return json.RawMessage
	Error  *struct{ Class, Desc string }
	Event  string
	Data   struct{ Device string }
}

// patience is how long QEMU may take to answer.
const patience = 30 * time.Second

// OpenMonitor connects with QEMU, from the inside.
func OpenMonitor() (*Monitor, error) {
	ports, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(ports, func(name string) bool {
		data, err := os.ReadFile(name)
		return err == nil && strings.TrimSpace(string(data)) == "qmp"
	})
	if i < 0 {
		return nil, errors.New("no port to QEMU's monitor: this is no guest with Options.Slots")
	}
	f, err := os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(ports[i]))), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	m := &Monitor{f: f, in: json.NewDecoder(f), gone: map[string]bool{}, disk: map[int]bool{}}
	if _, err := m.Execute("qmp_capabilities", nil); err != nil {
		f.Close()
		return nil, err
	}
	return m, nil
}

// Close lets go of the port.
func (m *Monitor) Close() error { return m.f.Close() }

// Execute runs a command of QMP and returns what it answers.
func (m *Monitor) Execute(command string, arguments any) (json.RawMessage, error) {
	msg := map[string]any{"execute": command}
	if arguments != nil {
		msg["arguments"] = arguments
	}
	line, err := json.Marshal(msg)
	if err != nil {
		return nil, err
	}
	if _, err := m.f.Write(append(line, '\n')); err != nil {
		return nil, fmt.Errorf("ask QEMU to %s: %w", command, err)
	}
	for {
		a, err := m.read()
		switch {
		case err != nil:
			return nil, fmt.Errorf("ask QEMU to %s: %w", command, err)
		case a.Error != nil:
			return nil, fmt.Errorf("QEMU does not %s: %s", command, a.Error.Desc)
		case a.Return != nil:
			return a.Return, nil
		}
	}
}

// read takes the next line, and notes it if it tells of a device's end.
func (m *Monitor) read() (a answer, err error) {
	if err := m.f.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return a, err
	}
	if err = m.in.Decode(&a); err == nil && a.Event == "DEVICE_DELETED" {
		m.gone[a.Data.Device] = true
	}
	return a, err
}

// Plug puts disk n of Options.Disks, counted from 1, into slot n as an NVMe drive with a serial number, as
// EBS shows a volume. The kernel notices a moment later.
func (m *Monitor) Plug(n int, serial string) error {
	node := fmt.Sprint("disk", n)
	if !m.disk[n] {
		if _, err := m.Execute("blockdev-add", map[string]any{"driver": "raw", "node-name": node,
			"file": map[string]any{"driver": "file", "filename": node}}); err != nil {
			return err
		}
		m.disk[n] = true
	}
	id := fmt.Sprint("nvme", n)
	delete(m.gone, id)
	_, err := m.Execute("device_add", map[string]any{"driver": "nvme", "id": id, "serial": serial, "drive": node,
		"bus": fmt.Sprint("rp", n)})
	return err
}

// Unplug asks the kernel to let go of the drive in slot n and takes it out. The disk keeps its data for the next Plug.
func (m *Monitor) Unplug(n int) error {
	id := fmt.Sprint("nvme", n)
	if _, err := m.Execute("device_del", map[string]any{"id": id}); err != nil {
		return err
	}
	for !m.gone[id] {
		if _, err := m.read(); err != nil {
			return fmt.Errorf("wait until the drive in slot %d is gone: %w", n, err)
		}
	}
	return nil
}
