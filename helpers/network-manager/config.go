package main

import (
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"github.com/spf13/pflag"

	"github.com/lariat-net/lariat/pkg/ike"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/overlay"
)

//go:embed README.md
var manual string

type config struct {
	metadataSocket  string
	socket          string
	stateDir        string
	bootIDFile      string
	every           time.Duration
	grace           time.Duration
	metadataAddress netip.Addr
	listen          string
	probe           bool
	logLevel        *slog.LevelVar

	secretFile string
	certDir    string
	encap      bool
	rekey      time.Duration
	charon     string
	vici       string
	ikeDir     string

	teardown bool // the sub-command
	yes      bool // of it
}

var errHelp = errors.New("help")

func parse(args []string, stdout io.Writer) (config, error) {
	c := config{logLevel: new(slog.LevelVar)}
	var address, level string
	f := pflag.NewFlagSet("lariat-network-manager", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.metadataSocket, "metadata-socket", metadata.DefaultSocket, "unix socket of the metadata service")
	f.StringVar(&c.socket, "socket", overlay.DefaultManagerSocket,
		"unix socket for health, metrics, state, and the plugins' DEL")
	f.StringVar(&c.stateDir, "state-dir", metadata.DefaultStateDir,
		"where the CNI plugins keep their journal (their stateDir)")
	f.StringVar(&c.bootIDFile, "boot-id-file", "/proc/sys/kernel/random/boot_id", "file with the id of this boot")
	f.DurationVar(&c.every, "interval", time.Minute, "time between passes when nothing happens")
	f.DurationVar(&c.grace, "grace", time.Minute, "how long an attachment must look dead before it is released")
	f.StringVar(&address, "metadata-address", "169.254.169.250",
		"address of the metadata tree, put on the loopback device; empty: none")
	f.StringVar(&c.listen, "listen-metrics", "", "TCP address for /metrics, /healthz and /readyz, such as "+
		"127.0.0.1:9476; empty: the unix socket alone")
	f.BoolVar(&c.probe, "answer-probes", true, "answer the UDP probes of \"lariat doctor\" on the underlay address")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error; PUT /v1/log-level changes it")
	f.StringVar(&c.secretFile, "ipsec-secret", ipsec.DefaultSecretFile,
		"file with the secret that the hosts of encrypted networks share")
	f.StringVar(&c.certDir, "ipsec-certs", "", "folder with ca.crt, and this host's NAME.crt and NAME.key: "+
		"certificates take the place of the secret")
	f.BoolVar(&c.encap, "ipsec-encap", false, "send ESP in UDP always, not only where a NAT is found")
	f.DurationVar(&c.rekey, "ipsec-rekey", ipsec.DefaultRekey, "life of the keys of encrypted networks")
	f.StringVar(&c.charon, "charon", "auto", "strongSwan's IKE daemon, which is started when a network is encrypted: "+
		"auto finds it, or a path; none: use the one at --vici-socket")
	f.StringVar(&c.vici, "vici-socket", "/var/run/charon.vici", "with --charon none, where that one listens")
	f.StringVar(&c.ikeDir, "ike-dir", ike.DefaultDir, "where the daemon that is started has its configuration and socket")
	f.BoolVar(&c.yes, "yes", false, "of teardown: remove what it lists")
	help := f.BoolP("help", "h", false, "print the manual")
	if err := f.Parse(args); err != nil {
		return c, fmt.Errorf("%w; see lariat-network-manager --help", err)
	}
	if *help {
		fmt.Fprintf(stdout, "%s\nFlags:\n%s", manual, f.FlagUsages())
		return c, errHelp
	}
	c.teardown = f.NArg() == 1 && f.Arg(0) == "teardown"
	switch {
	case f.NArg() > 0 && !c.teardown:
		return c, fmt.Errorf("unexpected argument %q; see lariat-network-manager --help", f.Arg(0))
	case c.yes && !c.teardown:
		return c, errors.New("--yes is of teardown; see lariat-network-manager --help")
	}
	if address != "" {
		a, err := netip.ParseAddr(address)
		if err != nil {
			return c, fmt.Errorf("--metadata-address: %w", err)
		}
		c.metadataAddress = a
	}
	if err := c.logLevel.UnmarshalText([]byte(level)); err != nil {
		return c, fmt.Errorf("--log-level: %w", err)
	}
	if c.rekey < 10*time.Second {
		return c, fmt.Errorf("--ipsec-rekey %s: want at least 10s", c.rekey)
	}
	if c.every <= 0 || c.grace < 0 {
		return c, errors.New("--interval must be above zero, --grace not below")
	}
	return c, nil
}
