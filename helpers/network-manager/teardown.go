package main

import (
	"context"
	"fmt"

	"github.com/lariat-net/lariat/pkg/kernel"
	"github.com/lariat-net/lariat/pkg/printable"
	"github.com/lariat-net/lariat/pkg/reconcile"
	"github.com/lariat-net/lariat/pkg/service"
)

// teardown prints what Lariat owns on this host, and with --yes removes it.
func (c *config) teardown(ctx context.Context, p *service.Process) error {
	if c.yes { // whoever holds the socket would make everything anew
		socket, err := service.Listen(p.Socket)
		if err != nil {
			return err
		}
		defer socket.Close()
	}
	k, err := kernel.New()
	if err != nil {
		return err
	}
	defer k.Close()
	m := &reconcile.Manager{Kernel: k, Log: p.Log, MetadataAddress: c.metadataAddress}
	m.Tunnels = c.tunnels(k, m, p.Log)
	defer m.Tunnels.Daemon.Close()
	lines, err := m.Teardown(ctx, c.yes)
	for _, l := range lines {
		fmt.Fprintln(p.Stdout, printable.Line(l))
	}
	switch {
	case err != nil:
		return err
	case len(lines) == 0:
		fmt.Fprintln(p.Stdout, "Lariat owns nothing in the network of this host")
	case !c.yes:
		fmt.Fprintln(p.Stdout, "nothing was removed; teardown --yes removes it, and cuts these containers off")
	}
	return nil
}
