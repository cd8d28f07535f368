package main

import (
	_ "embed"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/spf13/pflag"

	"github.com/lariat-net/lariat/pkg/hostid"
	"github.com/lariat-net/lariat/pkg/ike"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/service"
)

//go:embed README.md
var manual string

type config struct {
	metadataSocket  string
	stateDir        string
	bootIDFile      string
	every           time.Duration
	grace           time.Duration
	address         string     // --metadata-address
	metadataAddress netip.Addr // of it
	probe           bool

	secretFile string
	certDir    string
	encap      bool
	rekey      time.Duration
	charon     string
	vici       string
	ikeDir     string

	yes bool // of teardown
}

func (c *config) flags(f *pflag.FlagSet) {
	f.Lookup("log-level").Usage += "; PUT /v1/log-level changes it"
	f.StringVar(&c.metadataSocket, "metadata-socket", metadata.DefaultSocket, "unix socket of the metadata service")
	f.StringVar(&c.stateDir, "state-dir", metadata.DefaultStateDir,
		"where the CNI plugins keep their journal (their stateDir)")
	f.StringVar(&c.bootIDFile, "boot-id-file", hostid.BootFile, "file with the id of this boot")
	f.DurationVar(&c.every, "interval", time.Minute, "time between passes when nothing happens")
	f.DurationVar(&c.grace, "grace", time.Minute, "how long an attachment must look dead before it is released")
	f.StringVar(&c.address, "metadata-address", "169.254.169.250",
		"address of the metadata tree, put on the loopback device; empty: none")
	f.BoolVar(&c.probe, "answer-probes", true, "answer the UDP probes of \"lariat doctor\" on the underlay address")
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
}

// prepare refuses what cannot be.
func (c *config) prepare(p *service.Process) error {
	if c.yes && p.Command != "teardown" {
		return errors.New("--yes is of teardown; see lariat-network-manager --help")
	}
	if c.address != "" {
		a, err := netip.ParseAddr(c.address)
		if err != nil {
			return fmt.Errorf("--metadata-address: %w", err)
		}
		c.metadataAddress = a
	}
	if c.rekey < 10*time.Second {
		return fmt.Errorf("--ipsec-rekey %s: want at least 10s", c.rekey)
	}
	if c.every <= 0 || c.grace < 0 {
		return errors.New("--interval must be above zero, --grace not below")
	}
	return nil
}
