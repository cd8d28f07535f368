// Package fakeaws emulates the AWS services that the volume drivers use, in one process. These are
// EC2, EFS and the metadata service of instances (IMDSv2), each with the protocol of the real SDK.
//
// The emulator is strict rather than complete. Requests must be signed. An unknown parameter is an
// error and is not ignored. States change as slowly as real ones, namely by requests that show them
// (see Options.Lag). Limits, zones, idempotency tokens and error codes are AWS's. With Devices, an
// attached volume is a block device of this machine.
//
// A request goes from serve through its signature (sign.go) and the failures that a test ordered.
// Then it reaches the action's function in ec2_*.go or efs_*.go. One lock guards all state, so only
// one function runs at a time.
package fakeaws

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Options configures a Cloud. The zero value is a cloud without devices.
type Options struct {
	// Region is the cloud's only region. "" means eu-test-1.
	Region string
	// Lag is the number of answers that still show the previous state, at each step of a change. A
	// volume is unknown to that many Describe calls, then "creating" in as many, then "available".
	// 0 means 2. A negative value means 0.
	Lag int
	// Devices makes block devices of attached volumes. nil means that there are none.
	Devices Devices
	// Now is the clock for AWS's rules that count hours. nil means time.Now. Signatures always use
	// time.Now.
	Now func() time.Time
}

// Devices shows attached volumes to the kernel. The calls of one volume do not overlap.
type Devices interface {
	Attach(volumeID, instanceID, device string, bytes int64) error
	Detach(volumeID string) error
	// Resize is called for detached volumes, too.
	Resize(volumeID string, bytes int64) error
	// Delete discards the data. The volume must be detached.
	Delete(volumeID string) error
}

// Cloud is a running emulator.
type Cloud struct {
	t   testing.TB
	o   Options
	url string

	mu        sync.Mutex
	calls     map[string]int
	faults    map[string][]string // error codes for the next calls of an action
	lose      map[string]int
	instances []*instance
	subnets   []subnet
	groups    []group
	volumes   []*volume
	snapshots []snapshot
	efs       efsState
}

// New starts a cloud on a port of the loopback interface. The cloud ends with t.
func New(t testing.TB, o Options) *Cloud {
	if o.Region == "" {
		o.Region = "eu-test-1"
	}
	switch {
	case o.Lag == 0:
		o.Lag = 2
	case o.Lag < 0:
		o.Lag = 0
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	c := &Cloud{t: t, o: o, calls: map[string]int{}, faults: map[string][]string{}, lose: map[string]int{}}
	for i, zone := range c.zoneNames() {
		c.subnets = append(c.subnets, subnet{fmt.Sprintf("subnet-0000000000000000%x", 10+i), defaultVPC, zone})
	}
	c.groups = []group{{defaultGroup, defaultVPC}}
	c.efs.address = func(string) netip.Addr { return netip.MustParseAddr("127.0.0.1") }
	mux := http.NewServeMux()
	mux.HandleFunc("POST /{$}", c.serveEC2)
	for _, a := range efsActions {
		mux.HandleFunc(a.pattern, c.serveEFS(a))
	}
	c.url = listen(t, mux)
	return c
}

// listen serves on a free port until the test ends.
func listen(t testing.TB, h http.Handler) (url string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal("fakeaws:", err)
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	go s.Serve(l) //nolint:errcheck // it ends by Close
	t.Cleanup(func() { _ = s.Close() })
	return "http://" + l.Addr().String()
}

// URL returns the address of EC2 and EFS.
func (c *Cloud) URL() string { return c.url }

// Fail makes the next calls of an action fail with an error code of AWS, before they do anything.
func (c *Cloud) Fail(action, code string, times int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.faults[action] = append(c.faults[action], slices.Repeat([]string{code}, times)...)
}

// Lose makes the next calls of an action do their work, but cut the connection instead of an
// answer.
func (c *Cloud) Lose(action string, times int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lose[action] += times
}

// Calls returns how often an action was called with a good signature. Retries count.
func (c *Cloud) Calls(action string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls[action]
}

// apiError is an answer with an error.
type apiError struct {
	Code    string
	Message string
	More    map[string]string // additional members of an error of EFS
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

func fail(code, format string, args ...any) *apiError {
	return &apiError{Code: code, Message: fmt.Sprintf(format, args...)}
}

// status returns the HTTP status of an error code.
func (e *apiError) status() int {
	switch e.Code {
	case "RequestLimitExceeded", "ServiceUnavailable", "Unavailable":
		return http.StatusServiceUnavailable
	case "InternalError", "InternalFailure", "InternalServerError":
		return http.StatusInternalServerError
	case "ThrottlingException", "TooManyRequests":
		return http.StatusTooManyRequests
	case "AuthFailure":
		return http.StatusUnauthorized
	case "UnauthorizedOperation", "AccessDeniedException", "UnrecognizedClientException":
		return http.StatusForbidden
	case "DryRunOperation":
		return http.StatusPreconditionFailed
	case "FileSystemNotFound", "MountTargetNotFound", "AccessPointNotFound":
		return http.StatusNotFound
	case "FileSystemAlreadyExists", "FileSystemInUse", "MountTargetConflict", "AccessPointAlreadyExists",
		"IncorrectFileSystemLifeCycleState",
		"IncorrectMountTargetState", "IpAddressInUse", "NoFreeAddressesInSubnet":
		return http.StatusConflict
	}
	return http.StatusBadRequest
}

// answer is the response to a client.
type answer struct {
	status      int
	contentType string
	errorType   string // EFS sends the code in a header
	body        []byte
}

// call is one request, parsed by its protocol.
type call struct {
	service string // the signature's name of the service
	action  string
	body    []byte
	work    func() (answer, *apiError) // runs with the lock held
	refuse  func(*apiError) answer
}

func (c *Cloud) serve(w http.ResponseWriter, r *http.Request, call call) {
	a, lost := c.decide(r, call)
	if lost {
		panic(http.ErrAbortHandler) // net/http cuts the connection, quietly
	}
	w.Header().Set("X-Amzn-Requestid", newToken())
	for name, value := range map[string]string{"Content-Type": a.contentType, "X-Amzn-Errortype": a.errorType} {
		if value != "" {
			w.Header().Set(name, value)
		}
	}
	w.WriteHeader(a.status)
	w.Write(a.body) //nolint:errcheck // the client went away
}

func (c *Cloud) decide(r *http.Request, call call) (a answer, lost bool) {
	if e := c.authenticate(r, call.body, call.service); e != nil {
		return call.refuse(e), false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls[call.action]++
	if codes := c.faults[call.action]; len(codes) > 0 {
		c.faults[call.action] = codes[1:]
		return call.refuse(fail(codes[0], "A test wants %s to fail.", call.action)), false
	}
	a, e := call.work()
	if e != nil {
		a = call.refuse(e)
	}
	if lost = c.lose[call.action] > 0; lost {
		c.lose[call.action]--
	}
	return a, lost
}

// newID returns an id in AWS's form, such as vol-0123456789abcdef0.
func newID(prefix string) string { return prefix + "-0" + newToken()[:16] }

// newToken returns a unique token that cannot be guessed.
func newToken() string {
	b := make([]byte, 16)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// zones returns the zones of the region. The id of a name differs by account, so neither can be
// computed from the other.
func (c *Cloud) zones() map[string]string {
	return map[string]string{c.o.Region + "a": "eut1-az2", c.o.Region + "b": "eut1-az3", c.o.Region + "c": "eut1-az1"}
}

// partition returns the partition of the region, and the domain of its names. China's regions have
// their own.
func (c *Cloud) partition() (name, domain string) {
	if strings.HasPrefix(c.o.Region, "cn-") {
		return "aws-cn", "amazonaws.com.cn"
	}
	return "aws", "amazonaws.com"
}

func (c *Cloud) zoneNames() []string { return slices.Sorted(maps.Keys(c.zones())) }

// progress is a state that advances by being looked at. Each step but the last shows in lag looks.
// The step "" is a change that is not visible yet.
type progress struct {
	steps []string
	lag   int
	seen  int // the number of looks at the present step
}

func (c *Cloud) begin(steps ...string) progress {
	p := progress{steps: steps, lag: c.o.Lag}
	p.settle()
	return p
}

// settle skips the steps that had enough looks.
func (p *progress) settle() {
	for len(p.steps) > 1 && p.seen >= p.lag {
		p.steps, p.seen = p.steps[1:], 0
	}
}

// look returns the state that an answer shows.
func (p *progress) look() string {
	p.settle()
	p.seen++
	return p.steps[0]
}

// truth returns the real state, visible or not.
func (p *progress) truth() string {
	if p.steps[0] == "" {
		return p.steps[1]
	}
	return p.steps[0]
}
