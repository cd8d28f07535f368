// Package cloud is what drivers of AWS's volumes share: credentials and region as AWS's own tools find them,
// what the instance says of itself, and errors that say what to do.
//
// All of it is the SDK's: environment, shared configuration and credentials files, web identity, the
// instance's profile by IMDSv2; custom endpoints by AWS_ENDPOINT_URL and its like. Nothing of it comes by
// argv, and no credential is ever part of an error.
package cloud

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/smithy-go/logging"

	"github.com/lariat-net/lariat/pkg/volume"
)

// Environment are the variables that the SDK reads and that administrators most often set, with what they mean.
var Environment = [][2]string{
	{"AWS_REGION", "region of volumes that name none; without it the instance's own"},
	{"AWS_PROFILE", "profile in the shared configuration and credentials files"},
	{"AWS_ACCESS_KEY_ID", "with AWS_SECRET_ACCESS_KEY; better: the instance's profile, or " +
		"AWS_SHARED_CREDENTIALS_FILE, which root alone can read"},
	{"AWS_ENDPOINT_URL", "another endpoint, such as an emulator's or a VPC's"},
}

// Session is how to reach one region.
type Session struct {
	Config aws.Config // has a region

	imds *imds.Client
	mu   sync.Mutex
	self Instance // once it is known
}

// Retries are bounded by the caller's deadline; these make them patient with a throttled account and quick
// with a passing fault.
const (
	attempts   = 12
	maxBackoff = 5 * time.Second
)

// passing are codes of EC2 and EFS that their documentation says to try again, beside throttling
// and all answers with a status of 5xx, which the SDK knows. What passes only with the state of a
// volume is for drivers, which look at that state.
var passing = map[string]struct{}{
	"ConcurrentTagAccess": {}, "DependencyTimeout": {}, "InsufficientThroughputCapacity": {},
	"InsufficientVolumeCapacity": {}, "InternalServerError": {}, "RequestResourceCountExceeded": {}, "TooManyRequests": {},
}

// Open prepares a session in a region, or the configured one if region is "". The network is asked only for
// the region of an instance that nothing else tells.
func Open(ctx context.Context, region string) (*Session, error) {
	s := &Session{}
	var meta *imds.Client
	cfg, err := config.LoadDefaultConfig(ctx,
		config.WithRegion(region),
		config.WithLogger(logging.Nop{}), // what it would say belongs to nobody's log: requests have signatures
		config.WithRetryer(func() aws.Retryer {
			return retry.NewStandard(func(o *retry.StandardOptions) {
				o.MaxAttempts, o.MaxBackoff = attempts, maxBackoff
				o.Retryables = append(o.Retryables, retry.RetryableErrorCode{Codes: passing})
			})
		}),
		config.WithEC2RoleCredentialOptions(func(o *ec2rolecreds.Options) {
			if meta != nil {
				o.Client = meta
			}
		}))
	if err != nil {
		return nil, fmt.Errorf("AWS configuration: %w", err)
	}
	// Version 1 of the metadata service answers everybody in the instance who can make it send a GET.
	meta = imds.NewFromConfig(cfg, func(o *imds.Options) {
		o.EnableFallback = aws.FalseTernary
		o.Retryer = retry.NewStandard(func(o *retry.StandardOptions) { o.MaxAttempts = 3 })
	})
	s.Config, s.imds = cfg, meta
	if s.Config.Region == "" {
		self, err := s.Instance(ctx)
		if err != nil {
			return nil, fmt.Errorf("no region: neither the option region nor AWS_REGION nor the shared configuration names "+
				"one, and %w", err)
		}
		s.Config.Region = self.Region
	}
	return s, nil
}

// Instance is what an EC2 instance says of itself.
type Instance struct {
	ID             string
	Type           string
	Region         string
	Zone           string
	Subnet         string   // of its first interface
	VPC            string   // likewise
	SecurityGroups []string // ids, likewise
}

// metadataPatience is how long IMDS is waited for: it is on the same machine, or the hop limit keeps its answers away.
const metadataPatience = 3 * time.Second

// Instance asks IMDSv2, until it has answered once.
func (s *Session) Instance(ctx context.Context) (Instance, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.self.ID != "" {
		return s.self, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, metadataPatience, volume.Timeout(metadataPatience))
	defer cancel()
	self, err := s.ask(ctx)
	if err != nil {
		return Instance{}, fmt.Errorf("the instance's metadata service (IMDSv2) does not tell: %w; "+
			"is this an EC2 instance with its metadata enabled? From a container with a network of its own the hop limit "+
			"must be 2", root(ctx, err))
	}
	s.self = self
	return self, nil
}

func (s *Session) ask(ctx context.Context) (Instance, error) {
	doc, err := s.imds.GetInstanceIdentityDocument(ctx, nil)
	if err != nil {
		return Instance{}, err
	}
	i := Instance{ID: doc.InstanceID, Type: doc.InstanceType, Region: doc.Region, Zone: doc.AvailabilityZone}
	mac, err := s.get(ctx, "mac")
	if err != nil {
		return Instance{}, err
	}
	base := "network/interfaces/macs/" + mac + "/"
	if i.Subnet, err = s.get(ctx, base+"subnet-id"); err != nil {
		return Instance{}, err
	}
	if i.VPC, err = s.get(ctx, base+"vpc-id"); err != nil {
		return Instance{}, err
	}
	groups, err := s.get(ctx, base+"security-group-ids")
	i.SecurityGroups = strings.Fields(groups)
	slices.Sort(i.SecurityGroups)
	return i, err
}

func (s *Session) get(ctx context.Context, path string) (string, error) {
	r, err := s.imds.GetMetadata(ctx, &imds.GetMetadataInput{Path: path})
	if err != nil {
		return "", err
	}
	defer r.Content.Close()
	const most = 16 << 10
	data, err := io.ReadAll(io.LimitReader(r.Content, most))
	return strings.TrimSpace(string(data)), err
}

// root is what was waited for in vain, without the layers that the SDK wraps around.
func root(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}
