package fakeaws

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Keys that sign requests: a user's keys, which Env has, and the keys of an instance's role, from
// its metadata. Tests search for their values to find leaks.
const (
	AccessKeyID     = "AKIAFAKEAWSUSERKEY01"
	SecretAccessKey = "fakeaws/user/secret/DoNotLeak/0123456789"

	RoleAccessKeyID     = "ASIAFAKEAWSROLEKEY02"
	RoleSecretAccessKey = "fakeaws/role/secret/DoNotLeak/9876543210"
	RoleSessionToken    = "fakeaws-session-token-DoNotLeak-IQoJb3JpZ2luX2VjE"
)

// maxSkew is the largest accepted error of a client's clock.
const maxSkew = 5 * time.Minute

// authenticate checks a request's signature, version 4:
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
func (c *Cloud) authenticate(r *http.Request, body []byte, service string) *apiError {
	code := map[string]string{"ec2": "AuthFailure", "elasticfilesystem": "UnrecognizedClientException"}[service]
	algorithm, rest, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	var credential, headers, signature string
	for part := range strings.SplitSeq(rest, ",") {
		switch k, v, _ := strings.Cut(strings.TrimSpace(part), "="); k {
		case "Credential":
			credential = v
		case "SignedHeaders":
			headers = v
		case "Signature":
			signature = v
		}
	}
	key, scope, _ := strings.Cut(credential, "/")
	secret, token := "", ""
	switch key {
	case AccessKeyID:
		secret = SecretAccessKey
	case RoleAccessKeyID:
		secret, token = RoleSecretAccessKey, RoleSessionToken
	}
	date := r.Header.Get("X-Amz-Date")
	at, err := time.Parse("20060102T150405Z", date)
	signed := strings.Split(headers, ";")
	switch {
	case algorithm != "AWS4-HMAC-SHA256" || err != nil:
		return fail(code, "The request has no signature of version 4")
	case secret == "" || r.Header.Get("X-Amz-Security-Token") != token:
		return fail(code, "AWS was not able to validate the provided access credentials")
	case scope != strings.Join([]string{date[:8], c.o.Region, service, "aws4_request"}, "/"):
		return fail(code, "Credential should be scoped to a valid region and service, not %s", scope)
	case time.Since(at).Abs() > maxSkew:
		return fail("RequestExpired", "Request has expired. Timestamp date is %s", at.Format(time.RFC3339))
	case !slices.Contains(signed, "host") || !slices.Contains(signed, "x-amz-date"):
		return fail(code, "'host' and 'x-amz-date' must be signed")
	}
	sign := []byte("AWS4" + secret)
	for part := range strings.SplitSeq(scope, "/") {
		sign = mac(sign, part)
	}
	text := strings.Join([]string{algorithm, date, scope, hash([]byte(canonical(r, signed, body)))}, "\n")
	if !hmac.Equal([]byte(hex.EncodeToString(mac(sign, text))), []byte(signature)) {
		return fail(code, "The request signature we calculated does not match the signature you provided")
	}
	return nil
}

// canonical returns a request in the form that is signed.
func canonical(r *http.Request, signed []string, body []byte) string {
	path := strings.ReplaceAll(url.PathEscape(r.URL.EscapedPath()), "%2F", "/")
	query := strings.ReplaceAll(r.URL.Query().Encode(), "+", "%20")
	var headers strings.Builder
	for _, name := range signed {
		value := r.Header.Get(name)
		switch name { // net/http keeps these two elsewhere
		case "host":
			value = r.Host
		case "content-length":
			value = fmt.Sprint(r.ContentLength)
		}
		fmt.Fprintf(&headers, "%s:%s\n", name, strings.Join(strings.Fields(value), " "))
	}
	return strings.Join([]string{r.Method, path, query, headers.String(), strings.Join(signed, ";"), hash(body)}, "\n")
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func mac(key []byte, text string) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(text))
	return m.Sum(nil)
}
