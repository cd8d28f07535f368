package cloud

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/aws/smithy-go"

	"github.com/lariat-net/lariat/pkg/volume"
)

// Is reports whether AWS answered with one of these error codes.
func Is(err error, codes ...string) bool {
	var api smithy.APIError
	return errors.As(err, &api) && slices.Contains(codes, api.ErrorCode())
}

// remedies maps codes that mean the same in every service to remedies.
var remedies = map[string]string{
	"UnauthorizedOperation": "the credentials may not do this: see the manual for the permissions that the " +
		"driver needs",
	"AccessDenied": "the credentials may not do this: see the manual for the permissions that the " +
		"driver needs",
	"AccessDeniedException": "the credentials may not do this: see the manual for the permissions that the " +
		"driver needs",
	"AuthFailure": "AWS does not accept the credentials: are they those of this account and region, " +
		"and is this host's clock right?",
	"InvalidClientTokenId":        "AWS does not know the access key",
	"UnrecognizedClientException": "AWS does not know the access key",
	"SignatureDoesNotMatch":       "the secret key does not fit the access key, or this host's clock is wrong",
	"RequestExpired":              "this host's clock is wrong",
	"ExpiredToken":                "the session's credentials have expired",
	"ExpiredTokenException":       "the session's credentials have expired",
	"RequestLimitExceeded":        "the account makes too many requests in this region: it passes",
	"ThrottlingException":         "the account makes too many requests in this region: it passes",
}

// Explain turns an error of the SDK into an error for a person. The text has the action's name in
// policies, AWS's code and words, and a remedy. Is still finds the code, and errors.Is a deadline.
func Explain(ctx context.Context, err error) error {
	var op *smithy.OperationError
	if err == nil || !errors.As(err, &op) {
		return err
	}
	action := strings.ToLower(op.ServiceID) + ":" + op.OperationName
	if op.ServiceID == "EFS" {
		action = "elasticfilesystem:" + op.OperationName
	}
	var api smithy.APIError
	switch {
	case errors.As(err, &api):
		text := api.ErrorMessage()
		// Only a caller with the permission to decode the rest can use it.
		text, _, _ = strings.Cut(text, " Encoded authorization failure message")
		out := fmt.Errorf("%s: %s: %s", action, api.ErrorCode(), text)
		if remedy := remedies[api.ErrorCode()]; remedy != "" {
			out = fmt.Errorf("%w (%s)", out, remedy)
		}
		return &explained{out, err}
	case ctx.Err() != nil:
		return fmt.Errorf("%s: AWS does not answer: %w", action, context.Cause(ctx))
	case strings.Contains(err.Error(), "credentials"):
		return &explained{fmt.Errorf("%s: no AWS credentials: neither the environment nor the shared files have any, "+
			"nor has the instance a profile (%w)", action, root(ctx, err)), err}
	}
	return &explained{fmt.Errorf("%s: %w", action, root(ctx, err)), err}
}

// explained shows one error and unwraps to another.
type explained struct{ shown, cause error }

func (e *explained) Error() string   { return e.shown.Error() }
func (e *explained) Unwrap() []error { return []error{e.cause} }

// Invalid turns an error into a volume.ErrInvalid if AWS refuses the content of the request. A
// retry would fail again. AWS's words name the fault.
func Invalid(err error) error {
	var api smithy.APIError
	if errors.As(err, &api) && (strings.HasPrefix(api.ErrorCode(), "InvalidParameter") ||
		api.ErrorCode() == "BadRequest" || api.ErrorCode() == "ValidationException") {
		return volume.Errorf(volume.ErrInvalid, "%w", err)
	}
	return err
}
