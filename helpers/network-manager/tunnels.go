package main

import (
	"log/slog"

	"github.com/lariat-net/lariat/pkg/ike"
	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/reconcile"
)

// tunnels sets up what keeps encrypted networks' tunnels. Nothing is started before there is such a network.
func (c *config) tunnels(k *kernel.Netns, m *reconcile.Manager, log *slog.Logger) *reconcile.Tunnels {
	t := &reconcile.Tunnels{
		View: m.View, Client: m.Client, Kernel: k, Log: log, SecretFile: c.secretFile, CertDir: c.certDir,
		Encap: c.encap, Rekey: c.rekey, Every: c.every,
	}
	socket := c.vici
	if c.charon != "none" {
		t.Charon = &ike.Charon{Dir: c.ikeDir, Log: log}
		if c.charon != "auto" {
			t.Charon.Path = c.charon
		}
		socket = t.Charon.Socket()
	}
	t.Daemon = &ike.Daemon{Socket: socket, Log: log}
	return t
}
