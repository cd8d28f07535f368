// Package tree shows the model as the read-only tree that containers know from Rancher:
// /latest/self/container/name. It is pure: it turns a model and a caller into text or JSON. It can
// show only names, addresses, public labels and states, and has no way to write. It answers only
// the containers of the model and the host that serves it.
package tree

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/lariat-net/lariat/pkg/metadata"
)

// Versions that the tree answers to, oldest first; "latest" is the last of them.
var Versions = []string{"2016-07-29"}

// Latest is the name of the newest version.
const Latest = "latest"

// Base is the part of a tree without containers: hosts, networks, and the host that serves the
// tree. Trees of different containers share it.
type Base struct {
	version  string
	hosts    []any
	byName   map[string]any
	networks []any // as containers see them
	ours     []any // as the host itself does
	self     string
	own      map[netip.Addr]bool // the host's addresses
	labels   []string
	leadsTo  func(netip.Addr) string
}

// NewBase returns the base of a snapshot's trees. labels names further container labels to show,
// beside those of metadata.PublicLabels.
func NewBase(s *metadata.Snapshot, labels ...string) *Base {
	b := &Base{version: strconv.FormatInt(s.Revision, 10), hosts: []any{}, byName: map[string]any{}, networks: []any{},
		ours: []any{},
		self: s.Self, own: map[netip.Addr]bool{}, labels: labels, leadsTo: s.LeadsTo()}
	for _, h := range s.Hosts {
		n := host(h)
		b.hosts = append(b.hosts, n)
		b.byName[h.Name] = n
		for _, u := range h.Underlay {
			if h.Name == s.Self {
				b.own[u.Address.Addr()] = true
			}
		}
	}
	for _, x := range s.Blocks {
		if x.Gateway.IsValid() && x.Host == s.Self {
			b.own[x.Gateway] = true
		}
	}
	for _, n := range s.Networks {
		b.networks = append(b.networks, network(n))
		b.ours = append(b.ours, withConfig(n))
	}
	return b
}

// HostOf returns the host whose containers identify a caller. It returns "" when that is the host
// that serves the tree.
func (b *Base) HostOf(caller netip.Addr) string {
	caller = caller.Unmap()
	if h := b.leadsTo(caller); h != b.self && !b.own[caller] {
		return h
	}
	return ""
}

// Tree is one state of the model, ready for requests. Nodes are map[string]any, []any, string,
// float64, bool, or nil.
type Tree struct {
	*Base
	root      map[string]any
	byAddress map[netip.Addr]selfNode // the callers that get answers
}

type selfNode struct {
	container map[string]any // nil: the host itself
	host      string
}

// Tree returns a tree of containers. They are those of all hosts, or those of one host for requests
// that need no others; see Reach. With one host the places of containers in their services are
// null, because other hosts' containers decide them.
func (b *Base) Tree(list []metadata.Container, all bool) *Tree {
	t := &Tree{Base: b, byAddress: make(map[netip.Addr]selfNode, len(list))}
	containers := make([]any, 0, len(list))
	index, holders := map[string]int{}, metadata.Holders(list, b.leadsTo)
	for i, c := range list {
		c.Addresses = slices.DeleteFunc(slices.Clone(c.Holds()), func(a netip.Addr) bool { return holders[a] != i })
		n := container(c, b.labels, index)
		if _, placed := n[serviceIndex]; placed && !all {
			n[serviceIndex] = nil
		}
		containers = append(containers, n)
		for _, a := range c.Addresses {
			t.byAddress[a] = selfNode{container: n, host: c.Host}
		}
	}
	// The host's own addresses belong to no container, even if an object says so.
	for a := range b.own {
		t.byAddress[a] = selfNode{host: b.self}
	}
	t.root = map[string]any{"version": b.version, "hosts": b.hosts, "containers": containers, "networks": b.networks}
	return t
}

// Build returns the tree of a snapshot that includes the containers of all hosts. labels are those
// of NewBase.
func Build(s *metadata.Snapshot, labels ...string) *Tree {
	return NewBase(s, labels...).Tree(s.Containers, true)
}

// Reach is the set of hosts whose containers a tree must have to answer a request.
type Reach int

// The reaches.
const (
	Own  Reach = iota // the caller's host
	Most              // all hosts; the caller's host is enough except for the caller's place in its service
	All               // all hosts
)

// Reach returns the reach that a request needs. The request is that of Get.
func (t *Tree) Reach(path, accept string, caller netip.Addr) Reach {
	self, ok := t.caller(caller)
	segments, err := segmentsOf(path)
	if !ok || err != nil || len(segments) == 0 || !known(segments[0]) {
		return Own
	}
	is := func(i int, name string) bool { return len(segments) > i && strings.EqualFold(segments[i], name) }
	asJSON := wantsJSON(accept)
	switch _, placed := self.container[serviceIndex]; {
	case is(1, "containers"), len(segments) == 1 && asJSON:
		return All
	case !placed || !is(1, "self"):
		return Own
	case is(2, "container") && is(3, serviceIndex):
		return All
	case asJSON && (len(segments) == 2 || len(segments) == 3 && is(2, "container")):
		return Most
	}
	return Own
}

// serviceIndex is a container's place among those of its service, on all hosts.
const serviceIndex = "service_index"

// Known reports whether Get answers a caller. Callers are the model's containers on any host, and
// the host that serves the tree. That host calls by a loopback address or one that the model knows.
// Other hosts must ask their own service.
func (t *Tree) Known(caller netip.Addr) bool {
	_, ok := t.caller(caller)
	return ok
}

func (t *Tree) caller(a netip.Addr) (selfNode, bool) {
	a = a.Unmap()
	self, ok := t.byAddress[a]
	if !ok && a.IsLoopback() {
		return selfNode{host: t.self}, true
	}
	return self, ok
}

func host(h metadata.Host) map[string]any {
	state := "inactive"
	if h.Live {
		state = "active"
	}
	ip := ""
	if a := h.UnderlayAddr(); a.IsValid() {
		ip = a.String()
	}
	// Do not show the machine id, which is confidential: see machine-id(5). The host_uuid of
	// containers is the name, too.
	return map[string]any{"uuid": h.Name, "name": h.Name, "hostname": h.Name, "agent_ip": ip, "labels": strs(h.Labels),
		"state": state}
}

func container(c metadata.Container, labels []string, index map[string]int) map[string]any {
	name := c.Name
	if name == "" {
		name = c.ID
	}
	uuid := c.UUID
	if uuid == "" {
		uuid = c.ID
	}
	stack, service := c.Labels[metadata.LabelStack], c.Labels[metadata.LabelService]
	if rs, rv, ok := strings.Cut(c.Labels[metadata.LabelRancherMember], "/"); ok {
		stack, service = first(stack, rs), first(service, rv)
	}
	stack = first(stack, c.Labels[metadata.LabelRancherStack])
	n := map[string]any{"name": strings.ToLower(name), "uuid": uuid, "external_id": c.ID, "host_uuid": c.Host,
		"hostname":     c.HostName(),
		"network_uuid": nullable(c.Network), "labels": strs(metadata.PublicLabels(c.Labels, labels)), "links": strs(c.Links),
		"state":        first(c.State, "stopped"),
		"health_state": nullable(c.Health), "start_count": float64(c.StartCount),
		"stack_name":   nullable(strings.ToLower(stack)),
		"service_name": nullable(strings.ToLower(service)), "primary_ip": nil, "primary_mac_address": nil}
	if service != "" {
		index[stack+"/"+service]++
		n[serviceIndex] = strconv.Itoa(index[stack+"/"+service])
	}
	ips, ports := []any{}, []any{}
	for _, a := range c.Addresses {
		ips = append(ips, a.String())
	}
	for _, p := range c.Ports {
		ports = append(ports, p)
	}
	n["ips"], n["ports"] = ips, ports
	if len(ips) > 0 {
		n["primary_ip"] = ips[0]
	}
	if !c.MAC.IsZero() {
		n["primary_mac_address"] = c.MAC.String()
	}
	return n
}

func network(n metadata.Network) map[string]any {
	subnets := []any{}
	for _, p := range n.Subnets {
		subnets = append(subnets, p.String())
	}
	return map[string]any{"name": n.Name, "uuid": n.Name, "is_default": n.IsDefault, "host_ports": n.HostPorts,
		"subnets": subnets}
}

// withConfig returns a network with its configuration for runtimes, which may hold data that
// containers must not know.
func withConfig(n metadata.Network) map[string]any {
	conf := map[string]any{}
	for name, raw := range n.CNIConfig {
		var v any
		if json.Unmarshal(raw, &v) == nil {
			conf[name] = v
		}
	}
	out := network(n)
	out["metadata"] = map[string]any{"cniConfig": conf}
	return out
}

func first(list ...string) string {
	for _, s := range list {
		if s != "" {
			return s
		}
	}
	return ""
}

func nullable(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func strs(m map[string]string) map[string]any {
	out := map[string]any{}
	for k, v := range m {
		out[k] = v
	}
	return out
}

// An Answer is the response to a request.
type Answer struct {
	Status      int
	ContentType string
	Body        []byte
}

// Get answers a request: the URL's path as sent (escaped), the Accept header, and the caller's
// address. Only the address identifies the caller, not the caller's own claims.
func (t *Tree) Get(path, accept string, caller netip.Addr) Answer {
	asJSON := wantsJSON(accept)
	self, ok := t.caller(caller)
	if !ok {
		return Problem(403, "Forbidden: "+caller.Unmap().String()+
			" is not the address of a container that the metadata service knows", asJSON)
	}
	segments, err := segmentsOf(path)
	if err != nil {
		return Problem(400, err.Error(), asJSON)
	}
	if len(segments) == 0 {
		root := map[string]any{Latest: map[string]any{}}
		for _, v := range Versions {
			root[v] = map[string]any{}
		}
		return render(root, asJSON)
	}
	if !known(segments[0]) {
		return Problem(404, "Invalid version", asJSON)
	}
	root := maps.Clone(t.root)
	node := map[string]any{}
	if self.container != nil {
		node["container"] = self.container
	} else {
		root["networks"] = t.ours
	}
	if h, ok := t.byName[self.host]; ok {
		node["host"] = h
	}
	if len(node) > 0 {
		root["self"] = node
	}
	found, ok := descend(root, segments[1:])
	if !ok {
		lower := make([]string, len(segments)-1)
		for i, s := range segments[1:] {
			lower[i] = strings.ToLower(s)
		}
		if found, ok = descend(root, lower); !ok {
			return Problem(404, "Not found", asJSON)
		}
	}
	return render(found, asJSON)
}

func known(version string) bool { return version == Latest || slices.Contains(Versions, version) }

// segmentsOf splits a path into its segments.
func segmentsOf(path string) ([]string, error) {
	segments := strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
	for i, s := range segments {
		u, err := url.QueryUnescape(s)
		if err != nil {
			return nil, fmt.Errorf("Bad path: %s", s) //nolint:staticcheck // it is what the caller is told
		}
		segments[i] = u
	}
	return segments, nil
}

func descend(node any, segments []string) (any, bool) {
	for _, s := range segments {
		switch n := node.(type) {
		case map[string]any:
			v, ok := n[s]
			if !ok {
				return nil, false
			}
			node = v
		case []any:
			if i, err := strconv.Atoi(s); err == nil {
				if i < 0 || i >= len(n) {
					return nil, false
				}
				node = n[i]
				continue
			}
			i := member(n, "name", s)
			if i < 0 {
				i = member(n, "uuid", s)
			}
			if i < 0 {
				return nil, false
			}
			node = n[i]
		default:
			return nil, false
		}
	}
	return node, true
}

func member(list []any, key, value string) int {
	return slices.IndexFunc(list, func(v any) bool {
		m, ok := v.(map[string]any)
		return ok && m[key] == value
	})
}

// wantsJSON uses the first known type of the Accept header.
func wantsJSON(accept string) bool {
	for _, a := range strings.Split(accept, ",") {
		a, _, _ = strings.Cut(a, ";")
		switch strings.TrimSpace(a) {
		case "application/json":
			return true
		case "text/plain", "*/*", "text/*":
			return false
		}
	}
	return false
}

// Problem is an error answer.
func Problem(status int, message string, asJSON bool) Answer {
	if !asJSON {
		return Answer{status, "text/plain; charset=utf-8", []byte(message + "\n")}
	}
	data, _ := json.Marshal(map[string]any{"message": message, "type": "error", "code": status})
	return Answer{status, "application/json", append(data, '\n')}
}

func render(node any, asJSON bool) Answer {
	if asJSON {
		data, err := json.Marshal(node)
		if err != nil {
			return Problem(500, err.Error(), true)
		}
		return Answer{200, "application/json", data}
	}
	return Answer{200, "text/plain; charset=utf-8", []byte(text(node))}
}

// text returns a scalar without a newline, or the list of a container's members, one per line.
func text(node any) string {
	var b strings.Builder
	switch n := node.(type) {
	case nil:
	case string:
		return n
	case bool:
		return strconv.FormatBool(n)
	case float64:
		return strconv.FormatFloat(n, 'f', -1, 64)
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(n)) {
			b.WriteString(url.QueryEscape(k))
			if isContainer(n[k]) {
				b.WriteByte('/')
			}
			b.WriteByte('\n')
		}
	case []any:
		for i, v := range n {
			m, ok := v.(map[string]any)
			switch {
			case ok && m["name"] != nil && m["name"] != "":
				fmt.Fprintf(&b, "%d=%s\n", i, url.QueryEscape(fmt.Sprint(m["name"])))
			case ok && m["uuid"] != nil && m["uuid"] != "":
				fmt.Fprintf(&b, "%d=%s\n", i, url.QueryEscape(fmt.Sprint(m["uuid"])))
			case isContainer(v):
				fmt.Fprintf(&b, "%d/\n", i)
			default:
				fmt.Fprintf(&b, "%d\n", i)
			}
		}
	}
	return b.String()
}

func isContainer(v any) bool {
	switch v.(type) {
	case map[string]any, []any:
		return true
	}
	return false
}
