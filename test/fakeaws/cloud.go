// Package fakeaws is the part of AWS that the volume drivers talk to, in one process: EC2, EFS and the
// metadata service of instances (IMDSv2), each as the real SDK speaks it.
//
// It is stricter than it is complete. Requests must be signed; a parameter that it does not know is an error,
// not ignored; states change as slowly as the real ones, namely by being looked at (see Options.Lag); limits,
// zones, idempotency tokens and error codes are those of AWS. With Devices a volume that is attached is a
// block device of this machine.
//
// A request goes from serve through its signature (sign.go) and the failures that a test ordered to the
// action's function, of ec2_*.go or efs_*.go, which runs alone: one lock guards all state.
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

// Options of a Cloud. The zero value is a cloud without devices.
type Options struct {
	// Region is the cloud's only one. "": eu-test-1.
	Region string
	// Lag is how many answers still show what was before, at each step of a change: a volume is unknown to that
	// many Describe calls, then "creating" in as many, then "available". 0: 2. Negative: 0.
	Lag int
	// Devices makes block devices of attached volumes. nil: there are none.
	Devices Devices
	// Now is the clock for what AWS says to the hour. nil: time.Now. Signatures are always judged by time.Now.
	Now func() time.Time
}

// Devices shows attached volumes to the kernel. The calls of one volume do not overlap.
type Devices interface {
	Attach(volumeID, instanceID, device string, bytes int64) error
	Detach(volumeID string) error
	// Resize is called for volumes that are not attached, too.
	Resize(volumeID string, bytes int64) error
	// Delete throws the data away. The volume is not attached.
	Delete(volumeID string) error
}

// Cloud is a running emulator.
type Cloud struct {
	t   testing.TB
	o   Options
	url string

	mu        sync.Mutex
	calls     map[string]int
	faults    map[string][]string // codes for the next calls of an action
	lose      map[string]int
	instances []*instance
	subnets   []subnet
	groups    []group
	volumes   []*volume
	snapshots []snapshot
	efs       efsState
}

// New starts a cloud on a port of the loopback interface. It ends with t.
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

// URL is where EC2 and EFS answer.
func (c *Cloud) URL() string { return c.url }

// Fail lets the next calls of an action fail with an error code of AWS, before anything is done.
func (c *Cloud) Fail(action, code string, times int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.faults[action] = append(c.faults[action], slices.Repeat([]string{code}, times)...)
}

// Lose lets the next calls of an action do their work, but cuts the connection in the place of an answer.
func (c *Cloud) Lose(action string, times int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lose[action] += times
}

// Calls says how often an action was called with a good signature; retries count.
func (c *Cloud) Calls(action string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls[action]
}

// apiError is an answer that says no.
type apiError struct {
	Code    string
	Message string
	More    map[string]string // members that an error of EFS has beside
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

func fail(code, format string, args ...any) *apiError {
	return &apiError{Code: code, Message: fmt.Sprintf(format, args...)}
}

// status of HTTP that goes with an error code.
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

// answer is what a client gets.
type answer struct {
	status      int
	contentType string
	errorType   string // EFS says the code in a header
	body        []byte
}

// call is one request, as its protocol sees it.
type call struct {
	service string // as the signature calls it
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

// newID makes an id as AWS has them, such as vol-0123456789abcdef0.
func newID(prefix string) string { return prefix + "-0" + newToken()[:16] }

// newToken is not to be guessed or repeated.
func newToken() string {
	b := make([]byte, 16)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// zones of the region. Which id a name stands for differs by account, so neither can be computed from the other.
func (c *Cloud) zones() map[string]string {
	return map[string]string{c.o.Region + "a": "eut1-az2", c.o.Region + "b": "eut1-az3", c.o.Region + "c": "eut1-az1"}
}

// partition of the region, and the domain of its names: China's regions have their own.
func (c *Cloud) partition() (name, domain string) {
	if strings.HasPrefix(c.o.Region, "cn-") {
		return "aws-cn", "amazonaws.com.cn"
	}
	return "aws", "amazonaws.com"
}

func (c *Cloud) zoneNames() []string { return slices.Sorted(maps.Keys(c.zones())) }

// progress is a state that moves on by being looked at: each step but the last shows in lag looks. The step
// "" is a change that does not show yet.
type progress struct {
	steps []string
	lag   int
	seen  int // looks at the present step
}

func (c *Cloud) begin(steps ...string) progress {
	p := progress{steps: steps, lag: c.o.Lag}
	p.settle()
	return p
}

// settle passes the steps that have been seen enough.
func (p *progress) settle() {
	for len(p.steps) > 1 && p.seen >= p.lag {
		p.steps, p.seen = p.steps[1:], 0
	}
}

// look is what an answer shows.
func (p *progress) look() string {
	p.settle()
	p.seen++
	return p.steps[0]
}

// truth is how it is, shown or not.
func (p *progress) truth() string {
	if p.steps[0] == "" {
		return p.steps[1]
	}
	return p.steps[0]
}
