package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/graph"
	"github.com/lariat-net/lariat/pkg/ipsec"
	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/printable"
	"github.com/lariat-net/lariat/pkg/private"
)

func (a *app) ipsec() *cobra.Command {
	c := &cobra.Command{
		Use:   "ipsec",
		Short: "Tunnels of encrypted networks, and the secret behind them",
		Long: `Shows the tunnels of encrypted networks, and changes the secret that the hosts share. The secret
itself is never shown: ids stand for it, which tell nothing of it.`,
		Example: `  lariat ipsec status
  lariat ipsec secret --out /etc/lariat/ipsec.secret`,
		Args: cobra.NoArgs,
		RunE: help,
	}
	c.AddCommand(a.ipsecStatus(), a.ipsecSecret(), a.ipsecRotate(), a.ipsecReauth())
	return c
}

func (a *app) ipsecSecret() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "secret",
		Short: "Make a new secret",
		Long: `Makes a new secret: 32 random bytes in base64. Every host gets the same one, over a way that you
trust. It is not kept anywhere else.

--out writes it into a new file that its owner alone can read (mode 0600), whatever the umask is. A
file that is there stays as it is. Without --out the secret is printed, for a pipe. A file that
others can read is refused as output.`,
		Example: `  lariat ipsec secret --out new.secret
  lariat ipsec secret | ssh root@192.0.2.2 'umask 077; cat > /etc/lariat/ipsec.secret'`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			b := make([]byte, 32)
			_, _ = rand.Read(b) // never fails
			secret := base64.StdEncoding.EncodeToString(b) + "\n"
			if file != "" {
				if err := private.Write(file, []byte(secret)); err != nil {
					return fmt.Errorf("secret: %w", err)
				}
				return nil
			}
			if f, ok := a.stdout.(*os.File); ok {
				if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
					return fmt.Errorf("secret: others can read the file that the output goes to (mode %04o); use --out FILE",
						info.Mode().Perm())
				}
			}
			_, err := io.WriteString(a.stdout, secret)
			return err
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	c.Flags().StringVar(&file, "out", "", "write the secret into a new `FILE`, mode 0600, instead of printing it")
	_ = c.MarkFlagFilename("out")
	return c
}

func (a *app) ipsecReauth() *cobra.Command {
	return &cobra.Command{
		Use:   "reauth",
		Short: "Have established tunnels prove themselves with the secret of now",
		Long: `Tunnels that are established outlive a change of the secret or of certificates, which only prove
names when one is set up. This has this host's tunnels set up anew beside the old ones. A packet or
two may be lost on each.`,
		Example: `  lariat ipsec reauth`,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			_, err := a.askManager(ctx, http.MethodPost, "/v1/tunnels/reauth")
			return err
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}

func (a *app) ipsecStatus() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show this host's tunnels",
		Long: `Shows the IKE daemon, the ids of the secrets, and one line for each other host. A tunnel is set up
by the first packet; until then it is idle. Where there are several encrypted networks, each has a
line of its own below.

KEY is the id of the secret in use. The status is 1 when something keeps tunnels from working at all.`,
		Example: `  lariat ipsec status
  lariat ipsec status --output json | jq '.tunnels[] | select(.lastError)'`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			r, err := a.tunnels(ctx)
			if err != nil {
				return err
			}
			if err := a.print(r, func(w *writer) { a.writeTunnels(w, r) }); err != nil {
				return err
			}
			if r.Missing != "" || r.Problem != "" {
				return exitStatus(1)
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}

func writeTunnelProblems(w *writer, r *ipsec.Report) {
	for _, p := range []struct{ what, text string }{{"missing", r.Missing}, {"problem", r.Problem}} {
		if p.text != "" {
			w.line("%s  %s", w.paint(bad, fmt.Sprintf("%-8s", p.what)), printable.Joined(p.text))
			if r.Remedy != "" {
				w.line("          %s", w.paint(dim, "remedy: "+printable.Joined(r.Remedy)))
			}
		}
	}
}

func (a *app) writeTunnels(w *writer, r *ipsec.Report) {
	if len(r.Networks) == 0 {
		switch {
		case w.plain:
		case r.Problem != "":
			writeTunnelProblems(w, r)
		default:
			w.line("No network is encrypted. Make one: lariat network create NAME --subnet PREFIX --encapsulation ipsec")
		}
		return
	}
	if !w.plain {
		w.line("%s  %s", w.paint(bold, "NETWORKS"), strings.Join(r.Networks, " "))
		daemon := styled(bad, "no answer")
		if r.Daemon != "" {
			daemon = txt(r.Daemon)
			if r.Supervised {
				daemon.text += ", kept by the network manager"
			}
		}
		w.line("%s    %s", w.paint(bold, "DAEMON"), w.paint(daemon.style, daemon.text))
		switch {
		case r.Auth == ipsec.AuthPubkey:
			w.line("%s      certificates", w.paint(bold, "KEYS"))
		case len(r.Keys) > 0:
			w.line("%s      %s", w.paint(bold, "KEYS"), strings.Join(r.Keys, ", then "))
		}
		if len(r.Suites) > 0 {
			w.line("%s    %s", w.paint(bold, "SUITES"), strings.Join(r.Suites, " "))
		}
		writeTunnelProblems(w, r)
		if len(r.Tunnels) == 0 {
			if r.Missing == "" && r.Problem == "" {
				w.line("\nNo other host takes part yet.")
			}
			return
		}
		w.line("")
	}
	var rows [][]cell
	for _, t := range sortedTunnels(r) {
		var in, out uint64
		var suites []string
		for _, c := range t.Children {
			in, out = in+c.BytesIn, out+c.BytesOut
			if c.Suite != "" && !slices.Contains(suites, c.Suite) {
				suites = append(suites, c.Suite)
			}
		}
		key := ""
		if len(t.Keys) > 0 {
			key = t.Keys[0]
		}
		state := t.State
		if t.Encap {
			state += ", in UDP"
		}
		rows = append(rows, []cell{txt(t.Peer), txt(t.Remote.String()), styled(tunnelStyle(t.State), state), a.age(t.Since),
			txt(strings.Join(suites, ",")), txt(key),
			octets(in), octets(out), styled(bad, printable.Joined(t.LastError))})
		if len(t.Children) < 2 {
			continue
		}
		for _, c := range t.Children {
			rows = append(rows, []cell{txt(t.Peer + "/" + c.Network), txt(""), styled(tunnelStyle(c.State), c.State),
				a.age(c.Since), txt(c.Suite), txt(""), octets(c.BytesIn), octets(c.BytesOut), txt("")})
		}
	}
	w.columns([]string{"PEER", "REMOTE", "STATE", "AGE", "SUITE", "KEY", "IN", "OUT", "LAST ERROR"}, rows)
}

func sortedTunnels(r *ipsec.Report) []ipsec.Status {
	list := slices.Clone(r.Tunnels)
	slices.SortStableFunc(list, func(a, b ipsec.Status) int { return graph.CompareNames(a.Peer, b.Peer) })
	return list
}

func tunnelStyle(state string) style {
	switch state {
	case ipsec.StateEstablished:
		return good
	case ipsec.StateDown:
		return bad
	case ipsec.StateConnecting:
		return uneasy
	}
	return plain
}

// age is how long ago something was, as coarse as a person would say it.
func (a *app) age(since time.Time) cell {
	if since.IsZero() {
		return cell{right: true}
	}
	d := max(a.now().Sub(since), 0)
	c := cell{right: true, text: fmt.Sprintf("%ds", int(d.Seconds()))}
	switch {
	case d >= 48*time.Hour:
		c.text = fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
	case d >= time.Hour:
		c.text = fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	case d >= time.Minute:
		c.text = fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return c
}

// octets writes a size with its binary magnitude.
func octets(n uint64) cell {
	c := cell{right: true, text: fmt.Sprintf("%d B", n)}
	v := float64(n)
	for _, unit := range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		if v < 1024 {
			break
		}
		v /= 1024
		c.text = fmt.Sprintf("%.1f %s", v, unit)
	}
	return c
}

// rotation is what "lariat ipsec rotate" did, and how far all hosts are.
type rotation struct {
	File   string `json:"file"`
	Change string `json:"change"` // added, moved, finished, or none
	// ids in the file, the first one being used as soon as both ends of a tunnel have it
	Keys    []string `json:"keys"`
	Dropped []string `json:"dropped"`        // ids
	Have    []string `json:"have"`           // live hosts that have announced the first
	Lack    []string `json:"lack"`           // live hosts that have not
	Away    []string `json:"away,omitempty"` // hosts that are not live, and have not
	Unused  bool     `json:"unused,omitempty"`
}

func (a *app) ipsecRotate() *cobra.Command {
	var file string
	var wait time.Duration
	var finish, force bool
	c := &cobra.Command{
		Use:   "rotate [NEWFILE|-]",
		Short: "Exchange the secret that the hosts share",
		Long: `Puts the secret of NEWFILE, or of standard input (-), in front of those in this host's secret file,
and tells the network manager. Do so on every host, in any order. A host accepts every secret in its
file, and a pair of hosts changes over on its own, without a gap, as soon as both have the new one.
When all have it, --finish, on every host, drops the old ones.

Without NEWFILE nothing is changed; it shows which hosts have the first secret of the file. Doing it
twice does no harm. A secret is never an argument, and never printed.`,
		Example: `  lariat ipsec rotate new.secret
  lariat ipsec rotate --wait 5m
  lariat ipsec rotate --finish`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if finish && len(args) > 0 {
				return errors.New("rotate: --finish takes no new secret")
			}
			ctx, cancel := a.bounded(c)
			defer cancel()
			r := rotation{File: file, Change: "none", Keys: []string{}, Dropped: []string{}, Have: []string{}, Lack: []string{}}
			var err error
			switch {
			case finish:
				err = a.finishRotation(ctx, file, force, &r)
			case len(args) > 0:
				err = a.beginRotation(args[0], file, &r)
			default:
				var s ipsec.Secrets
				if s, err = ipsec.ReadSecrets(file); err == nil {
					r.Keys = s.IDs()
				}
			}
			if err != nil {
				return err
			}
			if _, err := a.askManager(ctx, http.MethodPost, "/v1/reload"); err != nil {
				return fmt.Errorf("%s; this host's network manager has not loaded it: %w", r.did(), err)
			}
			if err := a.progress(c.Context(), wait, &r); err != nil {
				a.say("lariat: %s, and the network manager has loaded it; which hosts have it is not known:", r.did())
				return err
			}
			if err := a.print(r, r.write); err != nil {
				return err
			}
			if wait > 0 && len(r.Lack) > 0 {
				return exitStatus(1)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&file, "secret-file", ipsec.DefaultSecretFile, "`FILE` that this host has its secrets in")
	f.DurationVar(&wait, "wait", 0, "wait at most so `long` until all live hosts have it; the status is 1 when "+
		"they do not")
	f.BoolVar(&finish, "finish", false, "drop all secrets but the first")
	f.BoolVar(&force, "force", false, "finish although a live host does not have the first secret, and is cut off by it")
	_ = c.MarkFlagFilename("secret-file")
	return c
}

// beginRotation puts a new secret in front.
func (a *app) beginRotation(from, file string, r *rotation) error {
	var text []byte
	var fresh ipsec.Secrets
	var err error
	if from == "-" {
		if text, err = io.ReadAll(io.LimitReader(a.stdin, 64<<10)); err == nil {
			fresh, err = ipsec.ParseSecrets(text)
		}
		from = "standard input"
		if err != nil {
			err = fmt.Errorf("%s: %w", from, err)
		}
	} else if fresh, err = ipsec.ReadSecrets(from); err == nil {
		text, err = os.ReadFile(from)
	}
	if err != nil {
		return fmt.Errorf("new secret: %w", err)
	}
	if n := len(fresh.IDs()); n != 1 {
		return fmt.Errorf("new secret: %s has %d secrets in it; want one", from, n)
	}
	change := func(have ipsec.Secrets, lines []string) []string {
		id := fresh.IDs()[0]
		switch slices.Index(have.IDs(), id) {
		case 0:
			return lines
		case -1:
			r.Change = "added"
		default:
			r.Change = "moved"
		}
		secret := secretLines(text)[0]
		lines = slices.DeleteFunc(lines, func(l string) bool { return isSecret(l) && strings.TrimSpace(l) == secret })
		return slices.Insert(lines, slices.IndexFunc(lines, isSecret), secret) // there is one: it would be the first already
	}
	r.Keys, err = rewriteSecrets(file, change)
	return err
}

// finishRotation drops all secrets but the first, when no live host needs another one.
func (a *app) finishRotation(ctx context.Context, file string, force bool, r *rotation) error {
	var lacking error
	change := func(have ipsec.Secrets, lines []string) []string {
		ids := have.IDs()
		if len(ids) == 1 {
			return lines
		}
		if !force {
			r.Keys = ids
			snap, err := a.client().View(ctx)
			if err != nil {
				lacking = err
				return lines
			}
			if r.look(snap); len(r.Lack) > 0 {
				lacking = remedied{fmt.Errorf("secret %s is not on every live host: %s; without the old one they would be cut off",
					ids[0], strings.Join(r.Lack, " ")),
					"there: lariat ipsec rotate NEWFILE. Or --force, when they do not matter"}
				return lines
			}
		}
		r.Change, r.Dropped = "finished", ids[1:]
		seen := false
		return slices.DeleteFunc(lines, func(l string) bool {
			drop := isSecret(l) && seen
			seen = seen || isSecret(l)
			return drop
		})
	}
	ids, err := rewriteSecrets(file, change)
	r.Keys = ids
	return errors.Join(lacking, err)
}

// progress finds out who has the first secret, and waits until all live hosts do.
func (a *app) progress(ctx context.Context, wait time.Duration, r *rotation) error {
	if wait <= 0 {
		ctx, cancel := context.WithTimeout(ctx, a.timeout)
		defer cancel()
		snap, err := a.client().View(ctx)
		if err != nil {
			return err
		}
		r.look(snap)
		return nil
	}
	within, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	all := errors.New("all have it")
	looked := false
	var failed error
	err := a.client().Watch(within, func(s *metadata.Snapshot) error {
		looked = true
		if r.look(s); len(r.Lack) == 0 {
			return all
		}
		return nil
	}, func(err error) { failed = err })
	switch {
	case errors.Is(err, all) || looked && ctx.Err() == nil:
		return nil
	case failed != nil && !looked:
		return failed
	}
	return err
}

// look sorts the hosts by whether they have announced the first secret.
func (r *rotation) look(s *metadata.Snapshot) {
	r.Have, r.Lack, r.Away = []string{}, []string{}, nil
	r.Unused = !encrypted(s)
	if r.Unused {
		return // hosts announce secrets of encrypted networks alone
	}
	for _, h := range s.Hosts {
		switch {
		case slices.Contains(h.IKEKeys, r.Keys[0]):
			r.Have = append(r.Have, h.Name)
		case h.Live:
			r.Lack = append(r.Lack, h.Name)
		default:
			r.Away = append(r.Away, h.Name)
		}
	}
	for _, list := range [][]string{r.Have, r.Lack, r.Away} {
		slices.SortFunc(list, graph.CompareNames)
	}
}

// did says what became of the file.
func (r *rotation) did() string {
	switch r.Change {
	case "added":
		return fmt.Sprintf("secret %s stands first in %s now, before %s", r.Keys[0], r.File, strings.Join(r.Keys[1:], ", "))
	case "moved":
		return fmt.Sprintf("secret %s was in %s already and stands first now, before %s", r.Keys[0], r.File,
			strings.Join(r.Keys[1:], ", "))
	case "finished":
		return fmt.Sprintf("secret %s is the only one in %s now; dropped: %s", r.Keys[0], r.File, strings.Join(r.Dropped,
			", "))
	}
	if len(r.Keys) == 1 {
		return fmt.Sprintf("secret %s is the only one in %s", r.Keys[0], r.File)
	}
	return fmt.Sprintf("secret %s stands first in %s, before %s", r.Keys[0], r.File, strings.Join(r.Keys[1:], ", "))
}

func (r *rotation) write(w *writer) {
	if w.plain {
		var rows [][]cell
		for _, x := range []struct {
			hosts []string
			what  string
		}{{r.Have, "yes"}, {r.Lack, "no"}, {r.Away, "away"}} {
			for _, h := range x.hosts {
				rows = append(rows, []cell{txt(h), txt(x.what)})
			}
		}
		w.columns([]string{"HOST", r.Keys[0]}, rows)
		return
	}
	w.line("%s", r.did())
	if r.Unused {
		w.line("no network is encrypted: nobody uses it yet")
		return
	}
	w.line("have it:   %s", orDash(r.Have))
	w.line("lack it:   %s", w.paint(map[bool]style{true: uneasy}[len(r.Lack) > 0], orDash(r.Lack)))
	if len(r.Away) > 0 {
		w.line("not live:  %s; give it to them before they come back, or they stay cut off", strings.Join(r.Away, " "))
	}
	switch {
	case len(r.Lack) > 0:
		w.line("next: on those that lack it: lariat ipsec rotate NEWFILE")
	case len(r.Keys) > 1:
		w.line("next: on every host: lariat ipsec rotate --finish")
	}
}

func orDash(list []string) string {
	if len(list) == 0 {
		return "-"
	}
	return strings.Join(list, " ")
}
