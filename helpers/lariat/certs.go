package main

import (
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/certs"
)

func (a *app) certs() *cobra.Command {
	c := &cobra.Command{
		Use:   "certs",
		Short: "Make certificates for hosts, where there is no PKI",
		Long: `Makes an authority and certificates that hosts trust each other by: between the members of etcd, and
from a host to a store on another one. Everything is done in a directory; no service is asked. Keys
are never printed, and keys that others can read are refused.

Make the authority on a machine of yours, not on a host: who has ca.key can become any host. It
stays there, with mode 0600. Then copy to each host what is its own: ca.crt, NAME.crt and NAME.key,
never ca.key.`,
		Example: `  lariat certs init pki
  lariat certs host pki h1 --ip 192.0.2.1
  scp -p pki/ca.crt pki/h1.crt pki/h1.key root@192.0.2.1:/etc/lariat/pki/
  lariat certs show pki`,
		Args: cobra.NoArgs,
		RunE: help,
	}
	c.AddCommand(a.certsInit(), a.certsHost(), a.certsShow())
	return c
}

func (a *app) certsInit() *cobra.Command {
	var name string
	c := &cobra.Command{
		Use:     "init DIR",
		Short:   "Make an authority: ca.crt and ca.key",
		Long:    "Makes an authority for ten years, ECDSA P-256. One that is there already is never overwritten.",
		Example: `  lariat certs init pki`,
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			i, err := certs.Init(args[0], name, a.now())
			if err != nil {
				return err
			}
			return a.print(i, func(w *writer) {
				w.line("authority %s made, good until %s. %s/%s stays here: who has it can become any host.", i.Name,
					i.NotAfter.Format(time.DateOnly), strings.TrimRight(args[0], "/"), certs.CAKey)
			})
		},
	}
	c.Flags().StringVar(&name, "name", "lariat", "`NAME` of the authority")
	return c
}

func (a *app) certsHost() *cobra.Command {
	var req certs.Request
	var ips []string
	c := &cobra.Command{
		Use:   "host DIR NAME",
		Short: "Make a host's certificate: NAME.crt and NAME.key",
		Long: `Makes a certificate for two years, with which a host is server and client. Others reach it by the
names and addresses in it: give those of --listen-client and of peers' URLs. The host's name,
localhost and the loopback addresses are always in it.

With --renew it replaces the one that is there, with a new key, and without --ip and --dns keeps its
names and addresses.`,
		Example: `  lariat certs host pki h1 --ip 192.0.2.1 --dns h1.example.org
  lariat certs host pki h1 --renew`,
		Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			var err error
			if req.IPs, err = parsed(ips, netip.ParseAddr); err != nil {
				return err
			}
			req.Name = args[1]
			i, err := certs.Host(args[0], req, a.now())
			if err != nil {
				return err
			}
			return a.print(i, func(w *writer) {
				w.line("certificate of %s made, good until %s, for %s", i.Name, i.NotAfter.Format(time.DateOnly),
					strings.Join(append(i.DNS, i.IPs...), " "))
			})
		},
	}
	c.Flags().StringSliceVar(&ips, "ip", nil, "`ADDRESS` that others reach the host by")
	c.Flags().StringSliceVar(&req.DNS, "dns", nil, "`NAME` that others reach the host by")
	c.Flags().BoolVar(&req.Renew, "renew", false, "replace the certificate and key that are there")
	return c
}

func writeCerts(w *writer, list []certs.Info) {
	var rows [][]cell
	for _, i := range list {
		kind := "host"
		if i.CA {
			kind = "authority"
		}
		rows = append(rows, []cell{txt(i.File), txt(i.Name), txt(kind), txt(yes(i.HasKey)),
			txt(i.NotAfter.Format(time.DateOnly)), txt(strings.Join(append(i.DNS, i.IPs...), ",")), styled(uneasy, i.Problem)})
	}
	w.columns([]string{"FILE", "NAME", "KIND", "KEY", "UNTIL", "FOR", "PROBLEM"}, rows)
}

func (a *app) certsShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show DIR",
		Short: "List certificates, and what is wrong with them",
		Long: "Lists the certificates of a folder. The status is 1 when one has expired, will within 30 days, or does " +
			"not fit its key or authority.",
		Example: `  lariat certs show pki
  lariat certs show pki --output json`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			list, err := certs.ReadDir(args[0], a.now())
			if err != nil {
				return err
			}
			bad := false
			err = a.print(list, func(w *writer) { writeCerts(w, list) })
			for _, i := range list {
				bad = bad || i.Problem != ""
			}
			if err == nil && bad {
				return exitStatus(1)
			}
			return err
		},
	}
}
