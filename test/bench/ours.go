package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// networkName of our network in every scenario.
const networkName = "bench"

// lariatHost is a host with our service and manager on it.
type lariatHost struct {
	*namespace
	name     string
	dir      string
	underlay netip.Prefix
	client   metadata.Client
	pids     []int
}

func (h *lariatHost) path(name string) string { return filepath.Join(h.dir, name) }

// startHost starts lariat-metadata and lariat-network-manager in a namespace. Without a join it keeps the
// store and, when certs is given, lets others reach it; with one it uses the store at that endpoint.
func (b *bench) startHost(ns *namespace, dir, name string, underlay netip.Prefix, certDir,
	join string) (*lariatHost, error) {
	h := &lariatHost{namespace: ns, name: name, dir: dir, underlay: underlay}
	h.client.Socket = h.path("metadata.sock")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	id := sha256.Sum256([]byte(name))
	if err := os.WriteFile(h.path("machine-id"), []byte(hex.EncodeToString(id[:16])+"\n"), 0o600); err != nil {
		return nil, err
	}
	args := []string{filepath.Join(b.opt.bin, "lariat-metadata"), "--host-name", name, "--socket", h.client.Socket,
		"--underlay", underlay.String(),
		"--machine-id-file", h.path("machine-id")}
	endpoint := "https://" + netip.AddrPortFrom(underlay.Addr(), 2379).String()
	if join != "" {
		args = append(args, "--etcd-endpoints", join)
	} else {
		args = append(args, "--data-dir", h.path("etcd"))
	}
	if certDir != "" {
		if _, err := certs.Host(certDir, certs.Request{Name: name, IPs: []netip.Addr{underlay.Addr()}},
			time.Now()); err != nil {
			return nil, err
		}
		args = append(args, "--etcd-ca", filepath.Join(certDir, certs.CACert), "--etcd-cert",
			filepath.Join(certDir, name+".crt"),
			"--etcd-key", filepath.Join(certDir, name+".key"))
		if join == "" {
			args = append(args, "--listen-client", endpoint)
		}
	}
	for _, args := range [][]string{args, {filepath.Join(b.opt.bin, "lariat-network-manager"), "--metadata-socket",
		h.client.Socket,
		"--socket", h.path("manager.sock"), "--state-dir", h.path("state")}} {
		p, err := ns.Start(b.ctx, dir, nil, args...)
		if err != nil {
			return nil, err
		}
		b.cleanup(func() {
			if err := p.Stop(); err != nil {
				b.rep.note("stop: %v", err)
			}
		})
		h.pids = append(h.pids, p.Pid())
	}
	return h, nil
}

// define makes the network and waits until the host knows it.
func (b *bench) define(h *lariatHost, n metadata.Network) error {
	ctx, cancel := context.WithTimeout(b.ctx, 30*time.Second)
	defer cancel()
	n.Name, n.Encapsulation, n.VNI = networkName, metadata.EncapVXLAN, metadata.DefaultVNI
	if err := h.client.Put(ctx, metadata.KindNetwork, networkName, n); err != nil {
		return fmt.Errorf("define the network: %w", err)
	}
	return until(ctx, "network on host "+h.name, func() error {
		_, err := h.client.Status(ctx, networkName)
		return err
	})
}

// until asks again until there is no error or the context ends.
func until(ctx context.Context, what string, check func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, errors.Join(err, ctx.Err()))
		}
	}
}

func (h *lariatHost) conf() map[string]any {
	return map[string]any{"cniVersion": "1.1.0", "name": networkName, "type": "lariat-vxlan",
		"socket": h.client.Socket, "managerSocket": h.path("manager.sock"), "stateDir": h.path("state"),
		"ipam": map[string]any{"type": "lariat-ipam"}}
}

// ours is lariat-vxlan with lariat-ipam in-process, beside a live service and manager.
func (b *bench) ours(c *contender, dir string, s setup) error {
	if !b.oursHere {
		return errAbsent
	}
	h, err := b.startHost(c.host, dir, c.host.Name, netip.MustParsePrefix("192.0.2.1/24"), "", "")
	if err != nil {
		return err
	}
	network := metadata.Network{Subnets: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/12")}, HostNAT: s.masq}
	if s.dual {
		network.Subnets = append(network.Subnets, netip.MustParsePrefix("fd42::/64"))
	}
	if err := b.define(h, network); err != nil {
		return err
	}
	if err := b.allocate(h, s.existing); err != nil {
		return err
	}
	c.daemons = h.pids
	c.attacher = &plugin{c: c, path: filepath.Join(b.opt.bin, "lariat-vxlan"), cniPath: b.opt.bin, conf: h.conf(),
		prefix:  c.host.Name + "x",
		results: make([]json.RawMessage, s.n)}
	return nil
}

// roundTrips measures what an ADD and a DEL wait for the metadata service, durable write included, without any plugin.
func (b *bench) roundTrips(n int) error {
	if !b.oursHere {
		return nil
	}
	attach := &series{Section: "start", Scenario: "parts", Who: "metadata round trip", Op: "attach", Unit: "ms"}
	release := &series{Section: "start", Scenario: "parts", Who: "metadata round trip", Op: "release", Unit: "ms"}
	err := b.scope(func() error {
		host, err := b.underlay()
		if err != nil {
			return err
		}
		h, err := b.startHost(host, filepath.Join(b.work, host.Name), host.Name, netip.MustParsePrefix("172.16.0.1/12"), "",
			"")
		if err != nil {
			return err
		}
		if err := b.define(h, metadata.Network{Subnets: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}); err != nil {
			return err
		}
		for i := range n + 1 {
			id := metadata.AttachmentID{ContainerID: fmt.Sprintf("trip%06d", i), IfName: "eth0"}
			start := time.Now()
			if _, err := h.client.Attach(b.ctx, networkName, metadata.AttachRequest{ContainerID: id.ContainerID,
				IfName: id.IfName}); err != nil {
				return err
			}
			middle := time.Now()
			if err := h.client.Release(b.ctx, networkName, id, 0); err != nil {
				return err
			}
			if i > 0 { // the first claims the block
				attach.addTime(middle.Sub(start))
				release.addTime(time.Since(middle))
			}
		}
		return nil
	})
	b.rep.add(attach, release)
	return err
}

// allocate takes n addresses as so many containers' ADDs would.
func (b *bench) allocate(h *lariatHost, n int) error {
	if n == 0 {
		return nil
	}
	start := time.Now()
	const workers = 64
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := w; i < n && errs[w] == nil; i += workers {
				_, errs[w] = h.client.Attach(b.ctx, networkName, metadata.AttachRequest{ContainerID: fmt.Sprintf("existing%06d", i),
					IfName: "eth0"})
			}
		}()
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%d existing reservations: %w", n, err)
	}
	took := time.Since(start)
	b.rep.note("%d addresses were allocated by %d callers at once in %.2f s, %.0f a second", n, workers, took.Seconds(),
		float64(n)/took.Seconds())
	return nil
}

// oursPath builds two hosts and a container on each by our executables.
func (b *bench) oursPath() (*path, error) {
	if !b.oursHere {
		return nil, errAbsent
	}
	hosts, containers, err := b.pair("o")
	if err != nil {
		return nil, err
	}
	certDir := filepath.Join(b.work, "certs")
	if _, err := certs.Init(certDir, "bench", time.Now()); err != nil {
		return nil, err
	}
	p := &path{name: oursName, a: containers[0], b: containers[1]}
	join := ""
	for i, ns := range hosts {
		dir := filepath.Join(b.work, ns.Name)
		b.cleanup(func() { os.RemoveAll(dir) })
		h, err := b.startHost(ns, dir, ns.Name, netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/24", i+1)), certDir, join)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			join = "https://192.0.2.1:2379"
			if err := b.define(h, metadata.Network{Subnets: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
				HostNAT: true}); err != nil {
				return nil, err
			}
		}
		conf, err := json.Marshal(h.conf())
		if err != nil {
			return nil, err
		}
		var out []byte
		err = ns.Do(func() (err error) {
			out, _, err = execPlugin(filepath.Join(b.opt.bin, "lariat-vxlan"), conf, "CNI_COMMAND=ADD", "CNI_CONTAINERID="+
				containers[i].Name,
				"CNI_NETNS="+containers[i].Path, "CNI_IFNAME=eth0", "CNI_PATH="+b.opt.bin)
			return err
		})
		if err != nil {
			return nil, err
		}
		var result struct {
			IPs []struct {
				Address netip.Prefix `json:"address"`
			} `json:"ips"`
		}
		if err := json.Unmarshal(out, &result); err != nil || len(result.IPs) == 0 {
			return nil, fmt.Errorf("result of ADD %s: %w", out, err)
		}
		p.addr = result.IPs[0].Address.Addr().String()
	}
	// The first host learns of the second's block by its watch; the path is there when a connection comes through.
	ctx, cancel := context.WithTimeout(b.ctx, 20*time.Second)
	defer cancel()
	return p, until(ctx, "path between the hosts", func() error {
		return p.a.Do(func() error { return reach(p.addr) })
	})
}
