package overlay

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/lariat-net/lariat/pkg/cni"
	"github.com/lariat-net/lariat/pkg/metadata"
)

// delegate executes another IPAM plugin for an attachment, with our configuration and environment,
// as the spec says. For ADD it returns the plugin's result.
//
// The reference library's invoke package does the same. Since 1.3.1 it links OpenTelemetry and
// net/http. That costs two thirds of a millisecond at the start of every container, even without
// delegation.
func (c *call) delegate(ctx context.Context, verb string, id metadata.AttachmentID) (*current.Result, error) {
	path, err := c.find(c.ipam.Type)
	if err != nil {
		return nil, err
	}
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb)
	if id != c.ID() { // at GC
		cmd.Env = append(cmd.Env, "CNI_CONTAINERID="+id.ContainerID, "CNI_IFNAME="+id.IfName, "CNI_NETNS=")
	}
	if verb == "DEL" { // send KEY=VALUE pairs only: the reference library refuses anything else
		var pairs []string
		for _, k := range slices.Sorted(maps.Keys(c.Args)) {
			pairs = append(pairs, k+"="+c.Args[k])
		}
		cmd.Env = append(cmd.Env, "CNI_ARGS="+strings.Join(pairs, ";"))
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(c.Stdin), &out, &errs
	if err := cmd.Run(); err != nil {
		var e types.Error
		if json.Unmarshal(out.Bytes(), &e) == nil && e.Code != 0 {
			return nil, &cni.Error{Code: e.Code, Msg: "IPAM plugin " + c.ipam.Type + ": " + e.Msg, Details: e.Details}
		}
		return nil, cni.Errorf(cni.ErrConfig, "IPAM plugin %s, %s: %w: %s", path, verb, err,
			strings.TrimSpace(out.String()+errs.String()))
	}
	if verb != "ADD" {
		return nil, nil
	}
	res, err := create.CreateFromBytes(out.Bytes())
	if err == nil {
		var r *current.Result
		if r, err = current.NewResultFromResult(res); err == nil {
			return r, nil
		}
	}
	return nil, cni.Errorf(cni.ErrDecode, "result of the IPAM plugin %s: %w", path, err)
}

// find returns the path of a plugin in CNI_PATH. A type is a name, never a path.
func (c *call) find(name string) (string, error) {
	if strings.ContainsRune(name, filepath.Separator) || name == "." || name == ".." {
		return "", cni.Errorf(cni.ErrConfig, "key \"ipam.type\": %q is not the name of a plugin", name)
	}
	if c.Path == "" {
		return "", cni.Errorf(cni.ErrEnvironment, "the IPAM plugin %s is to be executed, but CNI_PATH is not set", name)
	}
	for _, dir := range filepath.SplitList(c.Path) {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", cni.Errorf(cni.ErrConfig, "the IPAM plugin %s is not in CNI_PATH (%s)", name,
		c.Path).WithDetails("install it there, or use %q", "lariat-ipam")
}

func (c *call) delegateDel(ctx context.Context) error {
	_, err := c.delegate(ctx, "DEL", c.ID())
	return err
}
