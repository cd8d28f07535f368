package cni

import (
	current "github.com/containernetworking/cni/pkg/types/100"
)

// render converts a result to a version of the spec. The library's converters leave fields of 1.1
// in older results, so render removes those fields first.
func render(res *current.Result, version string) (any, error) {
	c := *res
	if version != "1.1.0" {
		c.Interfaces = nil
		for _, i := range res.Interfaces {
			c.Interfaces = append(c.Interfaces, &current.Interface{Name: i.Name, Mac: i.Mac, Sandbox: i.Sandbox})
		}
		c.Routes = nil
		for _, r := range res.Routes {
			old := r.Copy()
			old.MTU, old.AdvMSS, old.Priority, old.Table, old.Scope = 0, 0, 0, nil, nil
			c.Routes = append(c.Routes, old)
		}
	}
	out, err := c.GetAsVersion(version)
	if err != nil {
		return nil, wrap(ErrIncompatibleVersion, err, "result in version "+version)
	}
	return out, nil
}

// After returns res with the chain's earlier result in front.
func After(prev, res *current.Result) *current.Result {
	if prev == nil {
		return res
	}
	out := *res
	out.Interfaces = append(append([]*current.Interface{}, prev.Interfaces...), res.Interfaces...)
	out.IPs = append([]*current.IPConfig{}, prev.IPs...)
	for _, ip := range res.IPs {
		c := *ip
		if ip.Interface != nil {
			i := *ip.Interface + len(prev.Interfaces)
			c.Interface = &i
		}
		out.IPs = append(out.IPs, &c)
	}
	out.Routes = append(append(out.Routes[:0:0], prev.Routes...), res.Routes...)
	return &out
}
