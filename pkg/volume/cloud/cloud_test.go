package cloud

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/smithy-go"

	"github.com/lariat-net/lariat/pkg/volume"
)

// alone unsets AWS's variables in the test's own environment.
func alone(t *testing.T) {
	t.Helper()
	for _, name := range []string{"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID",
		"AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_EC2_METADATA_DISABLED"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_CONFIG_FILE", "/nonexistent")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
}

// metadataService answers as IMDSv2 does, and not without a token.
func metadataService(t *testing.T, answers map[string]string) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" {
			w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
			_, _ = w.Write([]byte("token"))
			return
		}
		text, ok := answers[strings.TrimPrefix(r.URL.Path, "/latest/")]
		switch {
		case r.Header.Get("X-Aws-Ec2-Metadata-Token") != "token":
			w.WriteHeader(http.StatusUnauthorized)
		case !ok:
			w.WriteHeader(http.StatusNotFound)
		default:
			_, _ = w.Write([]byte(text))
		}
	}))
	t.Cleanup(s.Close)
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", s.URL)
}

var instance = map[string]string{
	"dynamic/instance-identity/document": `{"instanceId":"i-0123","instanceType":"t3.small","region":"cn-north-1","availabilityZone":"cn-north-1a"}`,
	"meta-data/mac":                      "02:00:00:00:00:01",
	"meta-data/network/interfaces/macs/02:00:00:00:00:01/subnet-id":          "subnet-1",
	"meta-data/network/interfaces/macs/02:00:00:00:00:01/vpc-id":             "vpc-1",
	"meta-data/network/interfaces/macs/02:00:00:00:00:01/security-group-ids": "sg-2\nsg-1",
}

// F106: the region is the request's, the environment's, or the instance's; regions are not hard-wired.
func TestF106Region(t *testing.T) {
	alone(t)
	metadataService(t, instance)
	for _, c := range []struct{ option, env, want string }{
		{"", "", "cn-north-1"},
		{"", "eu-central-1", "eu-central-1"},
		{"xx-new-9", "eu-central-1", "xx-new-9"},
	} {
		t.Setenv("AWS_REGION", c.env)
		s, err := Open(t.Context(), c.option)
		if err != nil || s.Config.Region != c.want {
			t.Errorf("%+v: %v %v", c, s, err)
		}
	}
	s, err := Open(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	i, err := s.Instance(t.Context())
	if want := []string{"sg-1", "sg-2"}; err != nil || i.ID != "i-0123" || i.Zone != "cn-north-1a" ||
		i.Subnet != "subnet-1" || i.VPC != "vpc-1" || !slices.Equal(i.SecurityGroups, want) {
		t.Errorf("%+v %v", i, err)
	}
}

// TestNoInstance tests that a machine outside EC2 gets an explaining error within seconds.
func TestNoInstance(t *testing.T) {
	alone(t)
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer silent.Close()
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", silent.URL)
	start := time.Now()
	_, err := Open(t.Context(), "")
	if err == nil || !strings.Contains(err.Error(), "AWS_REGION") || !strings.Contains(err.Error(), "hop limit") ||
		!errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if took := time.Since(start); took > metadataPatience+10*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestExplain(t *testing.T) {
	wrap := func(err error) error {
		return &smithy.OperationError{ServiceID: "EC2", OperationName: "AttachVolume", Err: err}
	}
	for _, c := range []struct {
		err  error
		want string
	}{
		{wrap(&smithy.GenericAPIError{Code: "VolumeInUse", Message: "vol-1 is already attached"}),
			"ec2:AttachVolume: VolumeInUse: vol-1 is already attached"},
		{wrap(&smithy.GenericAPIError{Code: "UnauthorizedOperation",
			Message: "You are not authorized. Encoded authorization failure message: abcdef"}),
			"ec2:AttachVolume: UnauthorizedOperation: You are not authorized. (the credentials may not do this: see the " +
				"manual for the permissions that the driver needs)"},
		{wrap(errors.New("connection refused")), "ec2:AttachVolume: connection refused"},
		{errors.New("of our own"), "of our own"},
	} {
		if got := Explain(t.Context(), c.err); got.Error() != c.want {
			t.Errorf("got  %v\nwant %v", got, c.want)
		}
	}
	err := Explain(t.Context(), wrap(&smithy.GenericAPIError{Code: "InvalidParameterValue", Message: "no"}))
	if !Is(err, "VolumeInUse", "InvalidParameterValue") || Is(err, "VolumeInUse") ||
		!errors.Is(Invalid(err), volume.ErrInvalid) || volume.IsFinal(Invalid(errors.New("x"))) {
		t.Error("the code is lost")
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 0, volume.Timeout(time.Second))
	defer cancel()
	if err := Explain(ctx, wrap(ctx.Err())); err.Error() != "ec2:AttachVolume: AWS does not answer: no end after 1s" ||
		!errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// TestPoll tests that the error of an ended Poll has the last observed state.
func TestPoll(t *testing.T) {
	p := Pauses{First: time.Millisecond, Most: time.Millisecond}
	asked := errors.New("a request was cut short")
	for _, when := range []int{2, 3} { // in the pause, in the middle of the look
		ctx, cancel := context.WithCancelCause(t.Context())
		n := 0
		err := p.Poll(ctx, func() (bool, string, error) {
			n++
			if n == 2 {
				cancel(volume.Timeout(time.Second))
			}
			if n == when && when == 2 {
				return false, "late", asked
			}
			return false, "creating", nil
		})
		if err == nil || err.Error() != "creating: no end after 1s" || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%d: %v", when, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Poll(ctx, func() (bool, string, error) { return false, "", asked }); !errors.Is(err, asked) {
		t.Error(err)
	}
}
