package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/lariat-net/lariat/pkg/certs"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// Options of a cluster.
type Options struct {
	Hosts    int
	MTU      int       // of the underlay; 0: 1500
	IPv6     bool      // underlay
	Dir      string    // for state; "": on the lab's tmpfs, which is fast and goes by itself
	Log      io.Writer // of all processes; nil: kept for errors only
	Metadata []string  // further arguments of lariat-metadata
	Manager  []string  // further arguments of lariat-network-manager
}

// Cluster is hosts on one switch.
type Cluster struct {
	Bin    string
	Dir    string
	Hosts  []*Host
	Switch *Switch
	opts   Options
}

// Host is one machine.
type Host struct {
	Netns
	Index    int
	Addr     netip.Prefix // underlay
	Dir      string
	Metadata *Process
	Manager  *Process
	c        *Cluster
}

// New makes the hosts; their programs are started by Up, or one by one.
func New(opts Options) (*Cluster, error) {
	bin, err := Bin()
	if err != nil {
		return nil, err
	}
	if opts.MTU == 0 {
		opts.MTU = 1500
	}
	c := &Cluster{Bin: bin, Dir: opts.Dir, opts: opts}
	live = append(live, c)
	if c.Dir == "" {
		c.Dir = "/run/lab"
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, err
	}
	if c.Switch, err = NewSwitch("switch", opts.MTU); err != nil {
		return nil, err
	}
	for i := range opts.Hosts {
		if err := c.addHost(i); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *Cluster) addHost(i int) error {
	name := string(rune('a' + i))
	if i >= 26 {
		name = fmt.Sprintf("h%d", i)
	}
	h := &Host{Index: i, c: c, Dir: filepath.Join(c.Dir, name),
		Addr: netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), 24)}
	if c.opts.IPv6 {
		h.Addr = netip.MustParsePrefix(fmt.Sprintf("2001:db8::%x/64", i+1))
	}
	var err error
	if h.Netns, err = NewNetns(name); err != nil {
		return err
	}
	if err := os.MkdirAll(h.Dir, 0o700); err != nil {
		return err
	}
	// One kernel, many hosts: they differ in what tells hosts apart.
	id := sha256.Sum256([]byte(name))
	if err := os.WriteFile(h.path("machine-id"), []byte(hex.EncodeToString(id[:16])+"\n"), 0o600); err != nil {
		return err
	}
	if err := h.Reboot(1); err != nil {
		return err
	}
	c.Hosts = append(c.Hosts, h)
	return c.Switch.Plug(h.Netns, "eth0", c.opts.MTU, h.Addr)
}

func (h *Host) path(name string) string { return filepath.Join(h.Dir, name) }

// Reboot gives the host another boot id; its programs see it when they start again.
func (h *Host) Reboot(n int) error {
	return os.WriteFile(h.path("boot-id"), fmt.Appendf(nil, "%08x-0000-4000-8000-%012x\n", h.Index, n), 0o600)
}

// Socket of the host's metadata service.
func (h *Host) Socket() string { return h.path("metadata.sock") }

// ManagerSocket of the host's network manager.
func (h *Host) ManagerSocket() string { return h.path("manager.sock") }

// StateDir of the host's CNI plugins.
func (h *Host) StateDir() string { return h.path("state") }

// Client asks the host's metadata service.
func (h *Host) Client() metadata.Client { return metadata.Client{Socket: h.Socket()} }

// Up starts every host's metadata service and network manager. The store is embedded in the first; the others
// join it by TLS.
func (c *Cluster) Up(ctx context.Context) error {
	dir := filepath.Join(c.Dir, "certs")
	if _, err := certs.Init(dir, "lab", time.Now()); err != nil {
		return err
	}
	for _, h := range c.Hosts {
		if _, err := certs.Host(dir, certs.Request{Name: h.Name, IPs: []netip.Addr{h.Addr.Addr()}}, time.Now()); err != nil {
			return err
		}
	}
	for _, h := range c.Hosts {
		if err := h.StartMetadata(ctx); err != nil {
			return err
		}
		if err := h.StartManager(ctx); err != nil {
			return err
		}
	}
	return nil
}

// StartMetadata starts the host's metadata service and waits until it is ready.
func (h *Host) StartMetadata(ctx context.Context, more ...string) (err error) {
	cert := filepath.Join(h.c.Dir, "certs")
	endpoint := fmt.Sprintf("https://%s", netip.AddrPortFrom(h.c.Hosts[0].Addr.Addr(), 2379))
	args := []string{filepath.Join(h.c.Bin, "lariat-metadata"), "--host-name", h.Name, "--socket", h.Socket(),
		"--underlay", h.Addr.String(),
		"--state-dir", h.StateDir(),
		"--machine-id-file", h.path("machine-id"), "--boot-id-file", h.path("boot-id"),
		"--etcd-ca", filepath.Join(cert, certs.CACert), "--etcd-cert", filepath.Join(cert, h.Name+".crt"), "--etcd-key",
		filepath.Join(cert, h.Name+".key"),
		"--listen-tree", "169.254.169.250:80"}
	if h.Index == 0 {
		args = append(args, "--data-dir", h.path("etcd"), "--listen-client", endpoint)
	} else {
		args = append(args, "--etcd-endpoints", endpoint)
	}
	h.Metadata, err = h.Netns.Start(ctx, h.Dir, h.c.opts.Log, slices.Concat(args, h.c.opts.Metadata, more)...)
	return err
}

// StartManager starts the host's network manager and waits until it is ready.
func (h *Host) StartManager(ctx context.Context, more ...string) (err error) {
	h.Manager, err = h.Netns.Start(ctx, h.Dir, h.c.opts.Log,
		append([]string{filepath.Join(h.c.Bin, "lariat-network-manager"), "--metadata-socket", h.Socket(),
			"--socket", h.ManagerSocket(), "--state-dir", h.StateDir(), "--boot-id-file", h.path("boot-id"),
			"--ipsec-secret", h.SecretFile(), "--ike-dir", h.IKEDir()}, append(h.c.opts.Manager, more...)...)...)
	return err
}

// SecretFile is where the host's secret of encrypted networks is, once a test has put one there.
func (h *Host) SecretFile() string { return h.path("ipsec.secret") }

// IKEDir is where the host's IKE daemon has its configuration and socket.
func (h *Host) IKEDir() string { return h.path("ike") }

// Down stops everything, the store last.
func (c *Cluster) Down() error {
	var errs []error
	for _, h := range slices.Backward(c.Hosts) {
		errs = append(errs, h.Manager.Stop(), h.Metadata.Stop())
	}
	return errors.Join(errs...)
}

// Remove is Down, and takes the hosts, the switch and the state away, so that another cluster can be made.
func (c *Cluster) Remove() error {
	errs := []error{c.Down()}
	live = slices.DeleteFunc(live, func(o *Cluster) bool { return o == c })
	for _, h := range c.Hosts {
		errs = append(errs, h.Netns.Remove())
	}
	return errors.Join(append(errs, c.Switch.Remove(), os.RemoveAll(c.Dir))...)
}

// NewNeighbour is a machine on the underlay that is no host of the cluster.
func (c *Cluster) NewNeighbour(name string, addrs ...netip.Prefix) (Netns, error) {
	n, err := NewNetns(name)
	if err != nil {
		return n, err
	}
	return n, c.Switch.Plug(n, "eth0", c.opts.MTU, addrs...)
}

// Lariat runs the lariat command on a host.
func (h *Host) Lariat(ctx context.Context, args ...string) (string, error) {
	return h.Output(ctx, append([]string{"env", "LARIAT_MANAGER_SOCKET=" + h.ManagerSocket(),
		filepath.Join(h.c.Bin, "lariat"), "--socket", h.Socket()}, args...)...)
}

// Container is a network namespace and what CNI made of it.
type Container struct {
	Netns
	ID     string
	Host   *Host
	Result *current.Result
}

// NewContainer makes a namespace and connects it to nothing yet.
func (h *Host) NewContainer(name string) (*Container, error) {
	ns, err := NewNetns(h.Name + "-" + name)
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256([]byte(h.Name + "/" + name))
	return &Container{Netns: ns, ID: hex.EncodeToString(id[:]), Host: h}, nil
}

// Conf is a configuration list with one plugin, as an operator would write it, with this host's paths.
func (h *Host) Conf(network string, plugin map[string]any, chained ...map[string]any) ([]byte, error) {
	main := map[string]any{"type": "lariat-vxlan", "socket": h.Socket(), "managerSocket": h.ManagerSocket(),
		"stateDir": h.StateDir(), "ipam": map[string]any{"type": "lariat-ipam"}}
	for k, v := range plugin {
		main[k] = v
	}
	if ipam, ok := main["ipam"].(map[string]any); ok && !strings.HasPrefix(fmt.Sprint(main["type"]), "lariat-") &&
		ipam["type"] == "lariat-ipam" {
		// Under another main plugin these are the IPAM plugin's keys.
		ipam["socket"], ipam["stateDir"] = h.Socket(), h.StateDir()
		delete(main, "socket")
		delete(main, "managerSocket")
		delete(main, "stateDir")
	}
	return json.Marshal(map[string]any{"cniVersion": "1.1.0", "name": network,
		"plugins": append([]map[string]any{main}, chained...)})
}

// CNI is the reference library, set up for a host: its cache is the host's, and plugins are found among ours
// and the peers'.
func (h *Host) CNI() *libcni.CNIConfig {
	path := []string{h.c.Bin}
	if peers := os.Getenv("LARIAT_PEERS"); peers != "" {
		path = append(path, peers)
	} else {
		path = append(path, filepath.Join(h.c.Bin, "peers"))
	}
	log := h.c.opts.Log
	if log == nil {
		log = io.Discard
	}
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: log}, PluginDecoder: version.PluginDecoder{}}
	return libcni.NewCNIConfigWithCacheDir(path, h.path("cni-cache"), exec)
}

func (c *Container) runtime(args map[string]string, capabilities map[string]any) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{ContainerID: c.ID, NetNS: c.Path, IfName: "eth0", CapabilityArgs: capabilities}
	for k, v := range args {
		rt.Args = append(rt.Args, [2]string{k, v})
	}
	return rt
}

// Call is an ADD, CHECK or DEL of a container.
type Call struct {
	Conf         []byte
	Args         map[string]string
	Capabilities map[string]any
	IfName       string
}

// Add connects the container.
func (c *Container) Add(ctx context.Context, call Call) error {
	return c.call(call, func(cni *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		res, err := cni.AddNetworkList(ctx, list, rt)
		if err != nil {
			return err
		}
		c.Result, err = current.NewResultFromResult(res)
		return err
	})
}

// AddPatiently is Add as runtimes do it: when the answer is "try again later", what was begun is deleted and
// begun anew, until the context ends. In an emulated machine on a busy one, a store that does not answer for
// five seconds is no more than slow.
func (c *Container) AddPatiently(ctx context.Context, call Call) error {
	for {
		err := c.Add(ctx, call)
		var e *types.Error
		if !errors.As(err, &e) || e.Code != types.ErrTryAgainLater || ctx.Err() != nil {
			return err
		}
		if derr := c.Del(ctx, call); derr != nil && !errors.As(derr, &e) {
			return errors.Join(err, derr)
		}
	}
}

// Check asks whether the container is connected as its ADD said.
func (c *Container) Check(ctx context.Context, call Call) error {
	return c.call(call, func(cni *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		return cni.CheckNetworkList(ctx, list, rt)
	})
}

// Del disconnects it.
func (c *Container) Del(ctx context.Context, call Call) error {
	return c.call(call, func(cni *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		return cni.DelNetworkList(ctx, list, rt)
	})
}

// Status asks a host's plugins whether they could serve an ADD.
func (h *Host) Status(ctx context.Context, call Call) error {
	list, err := libcni.ConfListFromBytes(call.Conf)
	if err != nil {
		return err
	}
	return h.Do(func() error { return h.CNI().GetStatusNetworkList(ctx, list) })
}

func (c *Container) call(call Call, do func(*libcni.CNIConfig, *libcni.NetworkConfigList,
	*libcni.RuntimeConf) error) error {
	list, err := libcni.ConfListFromBytes(call.Conf)
	if err != nil {
		return err
	}
	rt := c.runtime(call.Args, call.Capabilities)
	if call.IfName != "" {
		rt.IfName = call.IfName
	}
	return c.Host.Do(func() error { return do(c.Host.CNI(), list, rt) })
}

// Addr is the container's first address of a family.
func (c *Container) Addr(v6 bool) netip.Addr {
	for _, ip := range c.Result.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok && a.Unmap().Is6() == v6 {
			return a.Unmap()
		}
	}
	return netip.Addr{}
}
