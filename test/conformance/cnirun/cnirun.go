// Package cnirun calls CNI executables as a runtime does, by environment and stdin, and reads what they leave
// on a host.
//
// The reference library is not used on purpose: it never sends what a careless runtime may send, and it hides
// exit code and stdout.
package cnirun

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/test/lab"
)

// Call is one verb.
type Call struct {
	Wrap []string // a program that starts the executable, such as strace with its arguments
	Exe  string   // path of the executable
	Env  map[string]string
	Conf string // stdin
}

// Outcome is what came back.
type Outcome struct {
	Code           int // of the exit; -1 when a signal ended the process
	Stdout, Stderr string
}

// Run calls the executable in the host's namespace. Its environment is exactly c.Env and a PATH.
func (c Call) Run(ctx context.Context, ns lab.Netns) (o Outcome, err error) {
	var out, errs bytes.Buffer
	err = ns.Do(func() error {
		args := append(slices.Clone(c.Wrap), c.Exe)
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin"}
		for k, v := range c.Env {
			cmd.Env = append(cmd.Env, k+"="+v)
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(c.Conf), &out, &errs
		err := cmd.Run()
		if cmd.ProcessState != nil {
			o.Code = cmd.ProcessState.ExitCode()
		}
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return nil
		}
		return err
	})
	o.Stdout, o.Stderr = out.String(), errs.String()
	return o, err
}

// Document is the only JSON document of stdout; an error when there are none, or two.
func (o Outcome) Document() (map[string]any, error) {
	dec := json.NewDecoder(strings.NewReader(o.Stdout))
	var doc map[string]any
	if err := dec.Decode(&doc); err != nil {
		return nil, fmt.Errorf("stdout %q: %w", o.Stdout, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("stdout holds more than one document: %q", o.Stdout)
	}
	return doc, nil
}

// CNIError is the error object of stdout.
func (o Outcome) CNIError() (*types.Error, error) {
	doc, err := o.Document()
	if err != nil {
		return nil, err
	}
	for key := range doc {
		if !slices.Contains([]string{"cniVersion", "code", "msg", "details"}, key) {
			return nil, fmt.Errorf("an error object has no key %q: %s", key, o.Stdout)
		}
	}
	var e types.Error
	if v, _ := doc["cniVersion"].(string); v == "" {
		return nil, fmt.Errorf("the error object has no cniVersion: %s", o.Stdout)
	}
	if err := json.Unmarshal([]byte(o.Stdout), &e); err != nil {
		return nil, err
	}
	if e.Code == 0 || e.Msg == "" {
		return nil, fmt.Errorf("code or msg is missing: %s", o.Stdout)
	}
	return &e, nil
}

// World is everything on a host that a call may change, as text: devices, routes, what carries Lariat's mark,
// the journal, and what the metadata service holds for the host. Lock files are left out; they stay, by
// design.
func World(ctx context.Context, h *lab.Host) (string, error) {
	var b strings.Builder
	err := h.Do(func() error {
		links, err := kernel.RetryDump(netlink.LinkList)
		if err != nil {
			return err
		}
		names := map[int]string{}
		var lines []string
		for _, l := range links {
			names[l.Attrs().Index] = l.Attrs().Name
			lines = append(lines, fmt.Sprintf("device %s %s %s", l.Attrs().Name, l.Type(), l.Attrs().Alias))
		}
		every, by := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE
		routes, err := kernel.RetryDump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(netlink.FAMILY_ALL,
				every, by)
		})
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Protocol != unix.RTPROT_KERNEL { // those come and go with addresses and by duplicate address detection
				lines = append(lines, fmt.Sprintf("route %v via %v dev %s table %d protocol %d", r.Dst, r.Gw, names[r.LinkIndex],
					r.Table, r.Protocol))
			}
		}
		slices.Sort(lines)
		b.WriteString(strings.Join(lines, "\n") + "\n")
		k, err := kernel.New()
		if err != nil {
			return err
		}
		defer k.Close()
		s, err := k.Observe(ctx, nil)
		if err != nil {
			return err
		}
		b.WriteString(s.String())
		return nil
	})
	if err != nil {
		return "", err
	}
	journal, err := Journal(h.StateDir())
	if err != nil {
		return "", err
	}
	for _, j := range journal {
		b.WriteString("journal " + j + "\n")
	}
	held, err := Held(ctx, h)
	if err != nil {
		return "", err
	}
	b.WriteString(held)
	return b.String(), nil
}

// Journal lists the files of a state directory: records and temporary files, no locks.
func Journal(stateDir string) (out []string, err error) {
	err = filepath.WalkDir(stateDir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !d.IsDir() && !strings.HasPrefix(d.Name(), ".lock") {
			out = append(out, strings.TrimPrefix(path, stateDir+"/"))
		}
		return err
	})
	return out, err
}

// Held lists what the metadata service holds for a host: allocations, endpoints and containers with interfaces.
func Held(ctx context.Context, h *lab.Host) (string, error) {
	snap, err := h.Client().Snapshot(ctx)
	if err != nil {
		return "", err
	}
	var lines []string
	for _, n := range snap.Networks {
		list, err := h.Client().Allocations(ctx, n.Name, false)
		if err != nil {
			return "", err
		}
		for _, a := range list {
			lines = append(lines, fmt.Sprintf("held %s on %s by %s/%s", a.Address, a.Network, a.ContainerID, a.IfName))
		}
	}
	for _, e := range snap.HostRoutes {
		if e.Host == h.Name {
			lines = append(lines, fmt.Sprintf("endpoint %s on %s", e.Address, e.Network))
		}
	}
	for _, c := range snap.Containers {
		for _, i := range c.Interfaces {
			if c.Host == h.Name {
				lines = append(lines, fmt.Sprintf("container %s has %s on %s", c.ID, i.IfName, i.Network))
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n", nil
}
