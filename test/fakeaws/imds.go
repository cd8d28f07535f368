package fakeaws

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// RoleName is the name of every instance's role.
const RoleName = "fakeaws-instance-role"

// metadata returns an instance's metadata service. It has version 2 only: without a token it
// answers nothing.
func (c *Cloud) metadata(in Instance, mac string) http.Handler {
	document, _ := json.Marshal(map[string]any{
		"accountId": Account, "architecture": "x86_64", "availabilityZone": in.Zone, "instanceId": in.ID,
		"instanceType": in.Type,
		"privateIp":    in.PrivateIP, "region": c.o.Region, "version": "2017-09-30",
	})
	partition, domain := c.partition()
	nic := "meta-data/network/interfaces/macs/" + mac + "/"
	credentials := "meta-data/iam/security-credentials/"
	values := map[string]string{
		"meta-data/instance-id":                    in.ID,
		"meta-data/instance-type":                  in.Type,
		"meta-data/placement/availability-zone":    in.Zone,
		"meta-data/placement/availability-zone-id": in.ZoneID,
		"meta-data/placement/region":               c.o.Region,
		"meta-data/local-ipv4":                     in.PrivateIP.String(),
		"meta-data/local-hostname":                 in.PrivateDNSName,
		"meta-data/mac":                            mac,
		"meta-data/network/interfaces/macs/":       mac + "/",
		nic + "subnet-id":                          in.SubnetID,
		nic + "vpc-id":                             in.VPCID,
		nic + "security-group-ids":                 strings.Join(in.SecurityGroups, "\n"),
		"meta-data/services/domain":                domain,
		"meta-data/services/partition":             partition,
		credentials:                                RoleName,
		"dynamic/instance-identity/document":       string(document),
	}
	var mu sync.Mutex
	ends := map[string]time.Time{} // of tokens
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) {
		ttl := r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds")
		seconds, err := strconv.Atoi(ttl)
		if err != nil || seconds < 1 || seconds > 21600 {
			http.Error(w, "Bad Request", http.StatusBadRequest)
			return
		}
		token := newToken()
		mu.Lock()
		ends[token] = time.Now().Add(time.Duration(seconds) * time.Second)
		mu.Unlock()
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", ttl)
		w.Write([]byte(token)) //nolint:errcheck // the client went away
	})
	mux.HandleFunc("GET /latest/{path...}", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		end := ends[r.Header.Get("X-Aws-Ec2-Metadata-Token")]
		mu.Unlock()
		if !time.Now().Before(end) {
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		path := r.PathValue("path")
		value, ok := values[path]
		if path == credentials+RoleName {
			value, ok = roleCredentials(), true
		}
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/plain")
		w.Write([]byte(value)) //nolint:errcheck // the client went away
	})
	return mux
}

func roleCredentials() string {
	now := time.Now().UTC()
	data, _ := json.Marshal(map[string]string{
		"Code": "Success", "Type": "AWS-HMAC", "LastUpdated": now.Format(time.RFC3339),
		"Expiration":  now.Add(6 * time.Hour).Format(time.RFC3339),
		"AccessKeyId": RoleAccessKeyID, "SecretAccessKey": RoleSecretAccessKey, "Token": RoleSessionToken,
	})
	return string(data)
}
