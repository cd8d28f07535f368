// Package cloud holds code that the drivers of AWS's volumes share. It finds credentials and region
// as AWS's own tools do. It reads the instance's metadata. Its errors name a remedy.
//
// The SDK supplies the settings: environment, shared configuration and credentials files, web
// identity, and the instance's profile by IMDSv2. AWS_ENDPOINT_URL and similar variables set custom
// endpoints. No setting comes by argv, and no credential is ever part of an error.
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

// Environment lists the variables of the SDK that administrators most often set, with their
// meanings.
var Environment = [][2]string{
	{"AWS_REGION", "region of volumes that name none; without it the instance's own"},
	{"AWS_PROFILE", "profile in the shared configuration and credentials files"},
	{"AWS_ACCESS_KEY_ID", "with AWS_SECRET_ACCESS_KEY; better: the instance's profile, or " +
		"AWS_SHARED_CREDENTIALS_FILE, which root alone can read"},
	{"AWS_ENDPOINT_URL", "another endpoint, such as an emulator's or a VPC's"},
}

// Session gives access to one region.
type Session struct {
	Config aws.Config // has a region

	imds *imds.Client
	mu   sync.Mutex
	self Instance // set after the first answer
}

// The caller's deadline bounds retries. These limits make retries patient with a throttled account,
// and quick with a passing fault.
const (
	attempts   = 12
	maxBackoff = 5 * time.Second
)

// passing lists codes of EC2 and EFS that their documentation says to retry. The SDK itself knows
// throttling and all answers with a status of 5xx. Drivers handle errors that pass only with the
// state of a volume, because drivers examine that state.
var passing = map[string]struct{}{
	"ConcurrentTagAccess": {}, "DependencyTimeout": {}, "InsufficientThroughputCapacity": {},
	"InsufficientVolumeCapacity": {}, "InternalServerError": {}, "RequestResourceCountExceeded": {}, "TooManyRequests": {},
}

// Open returns a session in a region, or in the configured region if region is "". It uses the
// network only to ask for the instance's region if no setting names a region.
func Open(ctx context.Context, region string) (*Session, error) {
	s := &Session{}
	var meta *imds.Client
	cfg, err := config.LoadDefaultConfig(ctx,
		config.WithRegion(region),
		config.WithLogger(logging.Nop{}), // no SDK logs: requests have signatures
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
	// Version 1 of the metadata service answers every process that can make the instance send a
	// GET.
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

// Instance is an EC2 instance's description of itself.
type Instance struct {
	ID             string
	Type           string
	Region         string
	Zone           string
	Subnet         string   // of the first interface
	VPC            string   // of the first interface
	SecurityGroups []string // ids, of the first interface
}

// metadataPatience is the time limit for IMDS. IMDS is on the same machine, unless the hop limit
// stops its answers.
const metadataPatience = 3 * time.Second

// Instance asks IMDSv2 for the instance, and keeps the first answer.
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

// root returns the cause of a failed wait, without the SDK's wrappers.
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
