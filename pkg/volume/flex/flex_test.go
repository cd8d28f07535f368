package flex

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/lariat-net/lariat/pkg/volume"
)

// TestMain lets this binary be a driver also: the calls of TestMain's driver come by argv, as kubelet makes them.
func TestMain(m *testing.M) {
	if os.Args[0] == "toy" {
		Main(Program{Name: "toy", About: "a driver of a test", Version: "1", LogFile: os.Getenv("TOY_LOG"),
			Driver: func(*slog.Logger) (volume.Driver, error) { return toy{}, nil }})
	}
	os.Exit(m.Run())
}

// toy says what it was called with, and misbehaves on request.
type toy struct{ volume.Unsupported }

func (toy) Init(context.Context) (volume.Capabilities, error) { return volume.Capabilities{}, nil }

func (toy) Create(_ context.Context, r volume.Request) (volume.Reply, error) {
	return volume.Reply{Options: map[string]string{"created": "true", "name": r.Name}, Message: "two\nlines"},
		volume.CheckName(r.Name)
}

func (toy) Mount(ctx context.Context, dir, device string, r volume.Request) error {
	switch r.Options["do"] {
	case "panic":
		panic("secret is " + r.Secrets["key"])
	case "talk":
		fmt.Println("a library's notice")
		fmt.Fprintln(os.Stderr, "a warning")
		return exec.Command("sh", "-c", "echo child; echo child >&2").Run()
	case "talk-through":
		cmd := exec.Command("sh", "-c", "echo child; echo child >&2")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return cmd.Run()
	case "tell":
		return fmt.Errorf("dir %s device %q name %s ro %v secret %s", dir, device, r.Name, r.ReadOnly, r.Secrets["key"])
	case "hang":
		<-ctx.Done()
		return fmt.Errorf("waited for a server: %w", context.Cause(ctx))
	case "hang-hard":
		select {}
	}
	return nil
}

// play calls the toy as a process, both streams in one, as kubelet does.
func play(t *testing.T, args ...string) (out string, code int, log string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	logFile := filepath.Join(t.TempDir(), "log", "toy.log")
	cmd.Args[0] = "toy"
	cmd.Env = append(os.Environ(), "TOY_LOG="+logFile, TimeoutVariable+"=1s")
	data, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	said, _ := os.ReadFile(logFile)
	return string(data), cmd.ProcessState.ExitCode(), string(said)
}

// F155: each call prints one line of JSON, whatever happens, and --help explains each verb. F108: in both verb shapes.
func TestF155F108OneLineWhateverHappens(t *testing.T) {
	t.Parallel()
	j := func(pairs ...string) string {
		m := map[string]string{"name": "v"}
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = pairs[i+1]
		}
		data, _ := json.Marshal(m)
		return string(data)
	}
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"init", []string{"init"}, `{"status":"Success","capabilities":{"attach":false,"fsGroup":false,"selinuxRelabel":false,"supportsMetrics":false,"requiresFSResize":false}}`},
		{"Rancher's create, with options to keep", []string{"create", j()},
			`{"status":"Success","message":"two; lines","options":{"created":"true","name":"v"}}`},
		{"an unsafe name, F109", []string{"create", `{"name":"../x"}`},
			`{"status":"Failure","message":"volume name \"../x\": only letters, digits and, after the first, _ . - are allowed"}`},
		{"kubelet's mount", []string{"mount", "/d",
			`{"do":"tell","kubernetes.io/pvOrVolumeName":"pv1","kubernetes.io/readwrite":"ro"}`},
			`{"status":"Failure","message":"dir /d device \"\" name pv1 ro true secret "}`},
		{"mount of kubelet 1.5 and Rancher", []string{"mount", "/d", "/dev/x", j("do", "tell")},
			`{"status":"Failure","message":"dir /d device \"/dev/x\" name v ro false secret "}`},
		{"the same without a device", []string{"mount", "/d", "", j("do", "tell")},
			`{"status":"Failure","message":"dir /d device \"\" name v ro false secret "}`},
		{"a secret in an error's text, F160",
			[]string{"mount", "/d", j("do", "tell", "kubernetes.io/secret/key", "aHVudGVyMg==")},
			`{"status":"Failure","message":"dir /d device \"\" name v ro false secret ***"}`},
		{"a panic", []string{"mount", "/d", j("do", "panic", "kubernetes.io/secret/key", "aHVudGVyMg==")},
			`{"status":"Failure","message":"mount: a bug of the driver: secret is ***"}`},
		{"a library that talks", []string{"mount", "/d", j("do", "talk")}, `{"status":"Success"}`},
		{"a child that talks", []string{"mount", "/d", j("do", "talk-through")}, `{"status":"Success"}`},
		{"a driver at its deadline", []string{"mount", "/d", j("do", "hang")},
			`{"status":"Failure","message":"waited for a server: no end after 1s"}`},
		{"what the driver cannot do", []string{"attach", j(), "node"},
			`{"status":"Not supported","message":"attach: not supported"}`},
		{"attach of kubelet 1.5", []string{"attach", j()}, `{"status":"Not supported","message":"attach: not supported"}`},
		{"detach of kubelet 1.5", []string{"detach", "/dev/x"},
			`{"status":"Not supported","message":"detach: not supported"}`},
		{"a verb of another time", []string{"conjure", "x"},
			`{"status":"Not supported","message":"unknown verb \"conjure\""}`},
		{"no verb", nil, `{"status":"Failure","message":"no verb; see --help"}`},
		{"too few arguments", []string{"mount", "/d"},
			`{"status":"Failure","message":"mount takes DIR [DEVICE] JSON, and 1 arguments came"}`},
		{"no JSON", []string{"mount", "/d", "x"},
			`{"status":"Failure","message":"mount: the options are not an object of strings: invalid character 'x' looking for beginning of value"}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, code, log := play(t, tc.args...)
			if out != tc.want+"\n" {
				t.Errorf("got  %s\nwant %s", out, tc.want)
			}
			if want := !strings.Contains(tc.want, `"Success"`); (code != 0) != want || code > 1 {
				t.Errorf("exit status %d", code)
			}
			if strings.Contains(log, "hunter2") || strings.Contains(log, "aHVudGVyMg") {
				t.Errorf("the secret is in the log:\n%s", log)
			}
			if tc.name == "a library that talks" && (!strings.Contains(log, "a library's notice\na warning\n")) {
				t.Errorf("log: %s", log)
			}
		})
	}
	out, code, _ := play(t, "--help")
	for _, verb := range order {
		if !strings.Contains(out, "  toy "+verb+" ") {
			t.Errorf("--help does not explain %s:\n%s", verb, out)
		}
	}
	if code != 0 || len(order) != len(verbs) {
		t.Errorf("--help: exit status %d, %d of %d verbs", code, len(order), len(verbs))
	}
}

// A driver that does not even notice its deadline is cut off.
func TestF159DriverThatDoesNotEnd(t *testing.T) {
	t.Parallel()
	start := time.Now()
	out, code, _ := play(t, "mount", "/d", `{"name":"v","do":"hang-hard"}`)
	if want := `{"status":"Failure","message":"mount did not end after 6s; a bug of the driver"}` + "\n"; out != want ||
		code != 1 || time.Since(start) > 20*time.Second {
		t.Errorf("%d %s", code, out)
	}
}

// What comes as options, hostile or only odd.
func TestDecodeRequest(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"nothing", "", "empty"},
		{"a list", `["a"]`, "it begins with a list"},
		{"null", `null`, "it begins with null"},
		{"a number", `7`, "it begins with a number; write it in quotes"},
		{"a value that is a number", `{"size":5}`, `"size" is a number; write it in quotes`},
		{"a value that is a truth", `{"size":true}`, `"size" is true or false; write it in quotes`},
		{"a value that is null", `{"size":null}`, `"size" is null`},
		{"a nested object", `{"a":{"b":"c"}}`, `"a" is an object`},
		{"deep nesting", `{"a":` + strings.Repeat(`[`, 100000), `"a" is a list`},
		{"a key that comes twice", `{"a":"1","a":"2"}`, `"a" comes twice`},
		{"something behind", `{"a":"1"} x`, `followed by "x"`},
		{"a second document", `{}{}`, `followed by "{}"`},
		{"an end too early", `{"a":"1"`, "it ends too early"},
		{"an end within a text", `{"a":"1`, `"a": it ends too early`},
		{"ten megabytes", `{"a":"` + strings.Repeat("x", 10<<20) + `"}`, "10485768 octets, at most 1048576 are read"},
		{"octets that are no text", "{\"a\":\"\xff\"}", "not UTF-8"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := DecodeRequest(tc.text)
			if want := "the options are not an object of strings: " + tc.want; err == nil || err.Error() != want ||
				!errors.Is(err, volume.ErrInvalid) {
				t.Errorf("got  %v\nwant %s", err, want)
			}
		})
	}
	for _, text := range []string{`{"a":"b\u0000c"}`, `{"a":"b\nc"}`, `{"a\nb":"c"}`, `{"a":"` +
		strings.Repeat("x", 5000) + `"}`, `{"kubernetes.io/secret/k":"no base64!"}`, `{"kubernetes.io/readwrite":"rx"}`,
		`{"kubernetes.io/mounterArgs.FsGroup":"-1"}`, `{"kubernetes.io/fsGroup":"root"}`} {
		if _, err := DecodeRequest(text); !errors.Is(err, volume.ErrInvalid) {
			t.Errorf("%.60s: %v", text, err)
		}
	}
}

// What kubelet 1.37 really sends.
func TestF108KubeletsOptions(t *testing.T) {
	r, err := DecodeRequest(`{"kubernetes.io/fsType":"","kubernetes.io/mounterArgs.FsGroup":"1000","kubernetes.io/pod.name":"p","kubernetes.io/pod.namespace":"default","kubernetes.io/pod.uid":"u",
		"kubernetes.io/pvOrVolumeName":"pv1","kubernetes.io/readwrite":"ro","kubernetes.io/secret/password":"aHVudGVyMg==","kubernetes.io/serviceAccount.name":"default","kubernetes.io/tomorrow":"x","host":"10.0.0.1"}`)
	group := int64(1000)
	want := volume.Request{Name: "pv1", Options: map[string]string{"host": "10.0.0.1"}, ReadOnly: true, FSGroup: &group,
		Secrets: map[string]string{"password": "hunter2"},
		Pod:     volume.Pod{Namespace: "default", Name: "p", UID: "u", ServiceAccount: "default"}}
	if err != nil || !reflect.DeepEqual(r, want) {
		t.Errorf("%v\ngot  %+v\nwant %+v", err, r, want)
	}
	for _, shape := range []Shape{Rancher, Kubernetes} {
		if again, err := DecodeRequest(EncodeRequest(r, shape)); err != nil || !reflect.DeepEqual(again, want) {
			t.Errorf("there and back: %v %+v", err, again)
		}
	}
	// With a name of the user's, too.
	for _, shape := range []Shape{Rancher, Kubernetes} {
		r, err := DecodeRequest(`{"name":"web-data","kubernetes.io/pvOrVolumeName":"data"}`)
		if again, aerr := DecodeRequest(EncodeRequest(r, shape)); err != nil || aerr != nil || r.Name != "web-data" ||
			r.DetachAs != "data" || !reflect.DeepEqual(again, r) {
			t.Errorf("%v %v %+v %+v", err, aerr, r, again)
		}
	}
}

func TestIsAttachedTakesItsArgumentsInBothOrders(t *testing.T) {
	for _, args := range [][]string{{"isattached", `{"name":"v"}`, "n"}, {"isattached", "n", `{"name":"v"}`}} {
		if c, err := Parse(args); err != nil || c.Node != "n" || c.Request.Name != "v" {
			t.Errorf("%v: %+v %v", args, c, err)
		}
	}
}

// script writes an executable.
func script(t *testing.T, text string) Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "driver")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return Client{Path: path}
}

// F107: a shell script of twenty lines is a driver.
func TestF107ShellScript(t *testing.T) {
	data, err := os.ReadFile("testdata/driver.sh")
	if err != nil {
		t.Fatal(err)
	}
	if lines := bytes.Count(data, []byte("\n")); lines > 20 {
		t.Errorf("the script has %d lines", lines)
	}
	c := script(t, string(data))
	base := t.TempDir()
	c.Env = []string{"PATH=" + os.Getenv("PATH"), "BASE=" + base}
	ctx := t.Context()
	r := volume.Request{Name: "v", Options: map[string]string{"say": "it's \"quoted\" $(id)"}}
	if caps, err := c.Init(ctx); err != nil || caps.Attach || !caps.FSGroup {
		t.Errorf("init: %+v %v", caps, err)
	}
	if told, err := c.Create(ctx, r); err != nil || told.Options["created"] != "true" {
		t.Errorf("create: %+v %v", told, err)
	}
	if _, err := c.Attach(ctx, r, "node"); !errors.Is(err, volume.ErrNotSupported) {
		t.Errorf("attach: %v", err)
	}
	dir := filepath.Join(base, "at")
	if err := c.Mount(ctx, dir, "", r); err != nil {
		t.Errorf("mount: %v", err)
	}
	if err := c.Mount(ctx, dir, "", r); err == nil || !strings.Contains(err.Error(), "at' is not free") {
		t.Errorf("second mount: %v", err)
	}
	if err := c.Unmount(ctx, dir); err != nil {
		t.Errorf("unmount: %v", err)
	}
	if _, err := c.Delete(ctx, r); err != nil {
		t.Errorf("delete: %v", err)
	}
	if left, _ := filepath.Glob(base + "/*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := c.Create(ctx, volume.Request{Name: "../x"}); !errors.Is(err, volume.ErrInvalid) {
		t.Errorf("an unsafe name: %v", err)
	}
	if _, err := c.Create(ctx, volume.Request{Name: "v", Secrets: map[string]string{"a": "b"}}); !errors.Is(err,
		volume.ErrInvalid) {
		t.Errorf("a secret: %v", err)
	}
}

// F107: what is wrong with an answer is told in words.
func TestF107WrongAnswers(t *testing.T) {
	for _, tc := range []struct{ name, script, want string }{
		{"nothing", "exit 0", "mount: exit status 0, the answer is empty, where one JSON document is due"},
		{"nothing but a status", "exit 3", "mount: exit status 3, the answer is empty, where one JSON document is due"},
		{"words", "echo no such server; exit 1", "mount: exit status 1: no such server"},
		{"words aside", "echo 'bad\nnews' >&2; exit 1", "mount: exit status 1: bad; news"},
		{"not JSON", "echo oops", `mount: exit status 0, the answer is not JSON as it should be: invalid character 'o' looking for beginning of value: "oops\n"`},
		{"two documents", `echo '{"status":"Success"}{"status":"Success"}'`,
			`mount: exit status 0, the answer is more than one JSON document: "{\"status\":\"Success\"}{\"status\":\"Success\"}\n"`},
		{"another status", `echo '{"status":"success"}'`,
			`mount: exit status 0, the answer's status is "success", and not Success, Failure or Not supported`},
		{"a wrong type", `echo '{"status":"Success","attached":"true"}'`,
			`mount: exit status 0, the answer is not JSON as it should be: json: cannot unmarshal string into Go struct field Reply.attached of type bool: "{\"status\":\"Success\",\"attached\":\"true\"}\n"`},
		{"Success with a bad status", `echo '{"status":"Success"}'; exit 1`, "mount: says Success, with exit status 1"},
		{"Failure", `echo '{"status":"Failure","message":"disk on fire"}'; exit 1`, "disk on fire"},
		{"Failure without words", `echo 'mount: hm' >&2; echo '{"status":"Failure"}'; exit 1`,
			"mount failed and does not say why; it said: mount: hm"},
		{"keys in other case and unknown ones", `echo noise >&2; echo '{"Status":"Success","tomorrow":{}}'`, ""},
		{"Not supported", `echo '{"status":"Not supported"}'; exit 1`, "not supported"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := script(t, tc.script)
			got := ""
			if err := c.Mount(t.Context(), "/d", "", volume.Request{Name: "v"}); err != nil {
				got = strings.TrimPrefix(err.Error(), c.Path+" ")
			}
			if got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
	if err := (Client{Path: "/nonexistent"}).Unmount(t.Context(), "/d"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no executable: %v", err)
	}
}

// F159: a script that hangs is killed with all it started.
func TestF159ScriptThatHangs(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pid")
	c := script(t, "echo waiting for a server >&2; sleep 1000 & echo $! > "+pipe+"; wait")
	cause := volume.Timeout(300 * time.Millisecond)
	ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, cause)
	defer cancel()
	start := time.Now()
	err := c.Mount(ctx, "/d", "", volume.Request{Name: "v"})
	if err == nil || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "waiting for a server") ||
		time.Since(start) > 10*time.Second {
		t.Errorf("after %s: %v", time.Since(start), err)
	}
	pid, err := os.ReadFile(pipe)
	if err != nil {
		t.Skip("the script did not come so far")
	}
	gone := func() bool {
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
		return err != nil || strings.Contains(string(stat), ") Z ")
	}
	for end := time.After(5 * time.Second); !gone(); {
		select {
		case <-end:
			t.Fatal("what the script started lives on")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestTalkativeScript(t *testing.T) {
	c := script(t, "head -c 30000000 /dev/zero; exit 1")
	if err := c.Unmount(t.Context(), "/d"); err == nil || len(err.Error()) > maxMessage+200 {
		t.Errorf("%.200v", err)
	}
}

// FuzzCall: whatever the arguments are, Parse returns, and what it accepts is what it says.
func FuzzCall(f *testing.F) {
	f.Add("mount", "/d", `{"name":"v"}`, "")
	f.Add("mount", "/d", "/dev/x", `{"kubernetes.io/readwrite":"ro","kubernetes.io/secret/x":"eA=="}`)
	f.Add("expandfs", `{}`, "9", "1")
	f.Add("isattached", "n", `{}`, "")
	f.Fuzz(func(t *testing.T, verb, a, b, c string) {
		for n := range 4 {
			call, err := Parse([]string{verb, a, b, c}[:n+1])
			line := Reply{Status: Success}.encode()
			if err != nil {
				line = failed(err, call.Request.Secrets).encode()
			}
			if bytes.Count(line, []byte("\n")) != 1 || !json.Valid(line) {
				t.Errorf("not one line of JSON: %q", line)
			}
			if err == nil && volume.CheckOptions(call.Request.Options) != nil {
				t.Errorf("accepted options %v", call.Request.Options)
			}
		}
	})
}

func FuzzReply(f *testing.F) {
	f.Add([]byte(`{"status":"Success","capabilities":{"attach":false}}`))
	f.Fuzz(func(t *testing.T, out []byte) {
		r, err := ParseReply(out)
		if (err == nil) != (r.Status != "") {
			t.Errorf("%+v %v", r, err)
		}
	})
}

func TestLogOfOtherKind(t *testing.T) {
	p := Program{Name: "toy", Driver: func(*slog.Logger) (volume.Driver, error) {
		return nil,
			errors.New("no driver today")
	}}
	var out bytes.Buffer
	if code := p.answer(&out, slog.New(slog.NewTextHandler(io.Discard, nil)), []string{"init"}); code != 1 ||
		out.String() != `{"status":"Failure","message":"no driver today"}`+"\n" {
		t.Errorf("%d %s", code, out.String())
	}
}
