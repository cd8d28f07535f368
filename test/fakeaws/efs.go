package fakeaws

import (
	"net/http"
	"net/netip"
)

// efs is what EFS keeps.
type efs struct{ address func(subnetID string) netip.Addr }

type efsAction struct{ pattern string }

var efsActions []efsAction

func (c *Cloud) serveEFS(efsAction) http.HandlerFunc { return nil }
