package overlay

import (
	"context"
	"errors"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/lariat-net/lariat/pkg/cni"
)

// delegate executes another IPAM plugin with our configuration and environment, as the spec says. Its result comes back for ADD.
func (c *call) delegate(ctx context.Context, verb string) (*current.Result, error) {
	if c.Path == "" {
		return nil, cni.Errorf(cni.ErrEnvironment, "the IPAM plugin %s is to be executed, but CNI_PATH is not set", c.ipam.Type)
	}
	var res types.Result
	var err error
	switch verb {
	case "ADD":
		res, err = invoke.DelegateAdd(ctx, c.ipam.Type, c.Stdin, nil)
	case "CHECK":
		err = invoke.DelegateCheck(ctx, c.ipam.Type, c.Stdin, nil)
	case "DEL":
		err = invoke.DelegateDel(ctx, c.ipam.Type, c.Stdin, nil)
	case "STATUS":
		err = invoke.DelegateStatus(ctx, c.ipam.Type, c.Stdin, nil)
	case "GC":
		err = invoke.DelegateGC(ctx, c.ipam.Type, c.Stdin, nil)
	}
	if err != nil {
		var e *types.Error
		if errors.As(err, &e) {
			return nil, &cni.Error{Code: e.Code, Msg: "IPAM plugin " + c.ipam.Type + ": " + e.Msg, Details: e.Details}
		}
		return nil, cni.Errorf(cni.ErrConfig, "IPAM plugin %s, %s: %w", c.ipam.Type, verb, err)
	}
	if res == nil {
		return nil, nil
	}
	out, err := current.NewResultFromResult(res)
	if err != nil {
		return nil, cni.Errorf(cni.ErrDecode, "result of the IPAM plugin %s: %w", c.ipam.Type, err)
	}
	return out, nil
}

func (c *call) delegateDel(ctx context.Context) error {
	_, err := c.delegate(ctx, "DEL")
	return err
}
