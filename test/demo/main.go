// Command demo shows Lariat at work on one machine: three hosts in network namespaces, the metadata store on
// the first, containers connected by real CNI calls, pings and a TCP transfer between all of them, and a
// picture. Nothing is left behind, and nothing but a kernel with user namespaces is needed.
//
// KEEP=1 leaves it up until Enter is pressed, or until SIGINT where there is no terminal, and prints how to
// go inside.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/test/lab"
)

const (
	hosts             = 3
	containersPerHost = 2
	network           = "overlay"
)

func main() {
	lab.Enter()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := demo(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func demo(ctx context.Context) (err error) {
	begin := time.Now()
	step := func(format string, a ...any) {
		fmt.Printf("\n\033[1m[%5.2f s]\033[0m %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, a...))
	}
	step("three hosts, each a network namespace with an eth0 on one switch")
	c, err := lab.New(lab.Options{Hosts: hosts})
	if err != nil {
		return err
	}
	for _, h := range c.Hosts {
		fmt.Printf("  host %s  eth0 %s\n", h.Name, h.Addr)
	}
	step("on each: lariat-metadata (the store embedded in host a, the others join it by TLS) and lariat-network-manager")
	defer func() { err = errors.Join(err, c.Down()) }()
	if err := c.Up(ctx); err != nil {
		return err
	}
	step("one network for all of them: lariat network create")
	out, err := c.Hosts[0].Lariat(ctx, "network", "create", network, "--subnet", "10.42.0.0/16", "--subnet", "fd42::/48")
	if err != nil {
		return err
	}
	fmt.Print(indent(out))

	step("%d containers, connected by CNI ADD (libcni executes bin/lariat-vxlan, as a runtime would)",
		hosts*containersPerHost)
	all, err := connect(ctx, c)
	if err != nil {
		return err
	}
	step("lariat status")
	if out, err = c.Hosts[0].Lariat(ctx, "status"); err != nil {
		return err
	}
	fmt.Print(indent(out))
	picture, err := draw(ctx, c.Hosts[0])
	if err != nil {
		return err
	}
	step("one TCP transfer of 256 MiB, %s to %s", all[0].label(), all[len(all)-1].label())
	if err := transfer(ctx, all[0], all[len(all)-1]); err != nil {
		return err
	}
	step("ping, every container and every host to every container, IPv4 and IPv6")
	pings, err := pingAll(ctx, c, all)
	if err != nil {
		return err
	}
	if os.Getenv("KEEP") != "" {
		keep(ctx, c, picture)
	}
	step("everything is taken down again: CNI DEL, in any order")
	if err := disconnect(ctx, c, all); err != nil {
		return err
	}
	fmt.Printf("\nThe picture of the network: %s\n", picture)
	fmt.Printf("\nPings that crossed hosts (%d of %d answered):\n%s", len(pings), len(pings), strings.Join(pings, ""))
	return nil
}

// member is a container of the demo.
type member struct {
	*lab.Container
	name string
	call lab.Call
}

func (m member) label() string { return m.Host.Name + "/" + m.name }

func connect(ctx context.Context, c *lab.Cluster) ([]member, error) {
	var all []member
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for i := range containersPerHost {
		for _, h := range c.Hosts {
			name := []string{"web", "db", "cache"}[i%3]
			conf, err := h.Conf(network, nil)
			if err != nil {
				return nil, err
			}
			ct, err := h.NewContainer(name)
			if err != nil {
				return nil, err
			}
			m := member{ct, name, lab.Call{Conf: conf, Args: map[string]string{"K8S_POD_NAMESPACE": "demo",
				"K8S_POD_NAME": name + "-" + h.Name, "IgnoreUnknown": "1"}}}
			start := time.Now()
			if err := ct.Add(ctx, m.call); err != nil {
				return nil, fmt.Errorf("ADD %s: %w", m.label(), err)
			}
			fmt.Fprintf(w, "  ADD %s\t%s\t%s\t%.1f ms\n", m.label(), ct.Addr(false), ct.Addr(true), ms(time.Since(start)))
			all = append(all, m)
		}
	}
	return all, w.Flush()
}

func pingAll(ctx context.Context, c *lab.Cluster, all []member) (crossed []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	local, worst := 0, time.Duration(0)
	one := func(from lab.Netns, label string, host *lab.Host, to member, addr netip.Addr) error {
		first, err := from.Ping(ctx, addr, 56)
		if err != nil {
			return err
		}
		rtt, err := from.Ping(ctx, addr, 56)
		if err != nil {
			return err
		}
		worst = max(worst, first)
		if host == to.Host {
			local++
			return nil
		}
		crossed = append(crossed, fmt.Sprintf("  %-8s -> %-8s %-16s %6.3f ms\n", label, to.label(), addr, ms(rtt)))
		return nil
	}
	for _, to := range all {
		for _, addr := range []netip.Addr{to.Addr(false), to.Addr(true)} {
			for _, from := range all {
				if from.Container == to.Container {
					continue
				}
				if err := one(from.Netns, from.label(), from.Host, to, addr); err != nil {
					return nil, err
				}
			}
			for _, h := range c.Hosts {
				if err := one(h.Netns, "host "+h.Name, h, to, addr); err != nil {
					return nil, err
				}
			}
		}
	}
	fmt.Printf("  %d pings crossed hosts, %d stayed on one; the slowest first one took %.1f ms\n", len(crossed), local,
		ms(worst))
	return crossed, nil
}

func transfer(ctx context.Context, from, to member) error {
	const octets = 256 << 20
	took, err := from.Transfer(ctx, to.Netns, to.Addr(false), octets)
	if err != nil {
		return err
	}
	fmt.Printf("  %.1f Gbit/s, both ends and the tunnel on this machine's processors\n", octets*8/took.Seconds()/1e9)
	return nil
}

// draw writes the picture outside of the lab, where it stays.
func draw(ctx context.Context, h *lab.Host) (string, error) {
	svg, err := h.Lariat(ctx, "graph", "--format", "svg")
	if err != nil {
		return "", err
	}
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("lariat-demo-%d", os.Getuid()))
	if path := os.Getenv("DEMO_OUT"); path != "" {
		dir = path
	} else if wd, err := os.Getwd(); err == nil {
		dir = filepath.Join(wd, "bin")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "demo.svg")
	return path, os.WriteFile(path, []byte(svg), 0o644)
}

func disconnect(ctx context.Context, c *lab.Cluster, all []member) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, m := range all {
		start := time.Now()
		if err := m.Del(ctx, m.call); err != nil {
			return fmt.Errorf("DEL %s: %w", m.label(), err)
		}
		fmt.Fprintf(w, "  DEL %s\t%.1f ms\n", m.label(), ms(time.Since(start)))
	}
	w.Flush()
	for _, h := range c.Hosts {
		left, err := h.Client().Allocations(ctx, network, false)
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return fmt.Errorf("host %s still holds %v", h.Name, left)
		}
	}
	var err error
	if err = c.Hosts[0].Client().Delete(ctx, metadata.KindNetwork, network); err == nil {
		fmt.Println("  no address is held any more, and the network is gone")
	}
	return err
}

func keep(ctx context.Context, c *lab.Cluster, picture string) {
	inside := fmt.Sprintf("nsenter --target %d --user --net --mount --preserve-credentials", os.Getpid())
	until, enter := end(os.Stdin)
	fmt.Printf("\nIt stays up until %s. From another terminal, as the same user:\n\n"+
		"  %s          # into the lab; then for example\n"+
		"    nsenter --net=/run/netns/a ip route            # host a\n"+
		"    nsenter --net=/run/netns/a-web ip address      # its container web\n"+
		"    %s/lariat --socket %s status\n"+
		"    %s/lariat --socket %s plan\n\nThe picture: %s\n",
		until, inside, c.Bin, c.Hosts[0].Socket(), c.Bin, c.Hosts[0].Socket(), picture)
	done := make(chan struct{})
	if enter {
		go func() {
			bufio.NewReader(os.Stdin).ReadString('\n')
			close(done)
		}()
	}
	select {
	case <-ctx.Done():
	case <-done:
	}
}

// end says what ends the demo, and whether Enter does: what is no terminal may be at its end from the start.
func end(stdin *os.File) (until string, enter bool) {
	if _, err := unix.IoctlGetTermios(int(stdin.Fd()), unix.TCGETS); err != nil {
		return fmt.Sprintf("it gets SIGINT (control-C, or kill -INT %d)", os.Getpid()), false
	}
	return "you press Enter", true
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func indent(s string) string {
	return "  " + strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n  ") + "\n"
}
