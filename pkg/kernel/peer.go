package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/lariat-net/lariat/pkg/delta"
)

// VethFree implements Kernel.
func (n *Netns) VethFree(ctx context.Context, path, hostName, ifName, network string) error {
	inside, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer inside.Close()
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.portFree(inside, hostName, ifName, network)
}

// PortNetwork implements Kernel.
func (n *Netns) PortNetwork(ctx context.Context, hostName string) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f, _, _, err := n.veth(hostName)
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return "", fmt.Errorf("look for %s: %w", hostName, err)
	}
	alias, _ := delta.ParseEndpointAlias(f.link.Alias)
	return alias.Network, nil
}

// portFree returns an error when a container uses an existing host end.
// A host end is dangling when its peer is in no container or in a namespace that is being removed.
// A host end is also replaceable when its peer is interface ifName of this container.
func (n *Netns) portFree(inside *os.File, hostName, ifName, network string) error {
	if _, err := n.index(hostName); errors.Is(err, unix.ENODEV) {
		return nil
	}
	f, peer, at, err := n.veth(hostName)
	switch {
	case errors.Is(err, unix.ENODEV):
		return nil
	case err != nil:
		return fmt.Errorf("look for %s: %w", hostName, err)
	case at < 0:
		return nil
	}
	name, err := n.nameAt(at, peer, "")
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return nil // the kernel is removing the namespace or the link
	}
	if err != nil {
		return fmt.Errorf("look for the peer of %s: %w", hostName, err)
	}
	target, err := n.nsid(inside)
	if err != nil {
		return fmt.Errorf("identify the network namespace: %w", err)
	}
	if target != at {
		return fmt.Errorf("the port %s leads to %s in another network namespace in use: %w; DEL it first",
			hostName, name, ErrExists)
	}
	if alias, ok := delta.ParseEndpointAlias(f.link.Alias); ok && alias.Network != network {
		return fmt.Errorf("interface %s in the container: %w; it is connected to network %s", name, ErrExists, alias.Network)
	}
	if name == ifName {
		return nil
	}
	switch _, err := n.nameAt(at, 0, ifName); {
	case err == nil:
		return fmt.Errorf("interface %s in the container: %w; the port's end is called %s there", ifName, ErrExists, name)
	case !errors.Is(err, unix.ENODEV):
		return fmt.Errorf("look for %s in the container: %w", ifName, err)
	}
	return nil
}

// veth returns a veth device, the index of its peer, and the id of the peer's network namespace.
// The id is negative when the peer is in this namespace or in a namespace that is being removed.
func (n *Netns) veth(name string) (f foundLink, peer uint32, at int32, err error) {
	at = -1
	err = n.rt.link(0, name, func(body []byte) {
		f = parseLink(body)
		for a := newAttrs(body[min(len(body), unix.SizeofIfInfomsg):]); a.next(); {
			switch a.typ {
			case unix.IFLA_LINK:
				peer = a.u32()
			case unix.IFLA_LINK_NETNSID:
				at = int32(a.u32())
			}
		}
	})
	return f, peer, at, err
}

// nameAt finds a link in another network namespace, by index or by name.
// The kernel answers EINVAL for a namespace that no longer exists.
func (n *Netns) nameAt(nsid int32, index uint32, name string) (found string, err error) {
	err = n.rt.get(unix.RTM_GETLINK, func(m *message) {
		askLink(m, index, name)
		m.u32(unix.IFLA_TARGET_NETNSID, uint32(nsid))
	}, func(_ uint16, body []byte) { found = parseLink(body).name })
	return found, err
}

// nsid returns this namespace's id of another namespace. The id is negative when there is none.
func (n *Netns) nsid(ns *os.File) (id int32, err error) {
	id = -1
	err = n.rt.get(unix.RTM_GETNSID, func(m *message) {
		m.raw(unix.AF_UNSPEC, 0, 0, 0)
		m.u32(unix.NETNSA_FD, uint32(ns.Fd()))
	}, func(_ uint16, body []byte) {
		if len(body) < 4 {
			return
		}
		for a := newAttrs(body[4:]); a.next(); {
			if a.typ == unix.NETNSA_NSID && len(a.value) >= 4 {
				id = int32(binary.NativeEndian.Uint32(a.value))
			}
		}
	})
	return id, err
}
