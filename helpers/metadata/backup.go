package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"

	"github.com/lariat-net/lariat/pkg/metadata"
	"github.com/lariat-net/lariat/pkg/metadata/store"
	"github.com/lariat-net/lariat/pkg/private"
	"github.com/lariat-net/lariat/pkg/unixhttp"
)

// backup writes the running store's state into a file that appears only when it is whole.
func backup(args []string, stdout io.Writer) error {
	var c config
	f := pflag.NewFlagSet("lariat-metadata backup", pflag.ContinueOnError)
	socket := f.String("socket", metadata.DefaultSocket, "of the running lariat-metadata")
	f.StringVar(&c.DataDir, "data-dir", "", "of a lariat-metadata that is stopped, instead of asking a running one")
	timeout := f.Duration("timeout", 10*time.Minute, "for all of it")
	f.Usage = func() {
		fmt.Fprintf(stdout, "lariat-metadata backup [flags] FILE: copy the running store\n\n%s", f.FlagUsages())
	}
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() != 1 {
		return errors.New("backup: want one FILE")
	}
	file := f.Arg(0)
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	defer cancel()
	tmp, err := private.Create(file)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	defer tmp.Discard()
	if c.DataDir != "" {
		err = copyStopped(ctx, c.DataDir, tmp)
	} else {
		err = copyRunning(ctx, *socket, tmp)
	}
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	size, err := tmp.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("backup %s: %w", file, err)
	}
	if err := verify(tmp.File, size); err != nil {
		return fmt.Errorf("backup %s: %w", file, err)
	}
	if err := tmp.Replace(); err != nil {
		return fmt.Errorf("backup %s: %w", file, err)
	}
	fmt.Fprintf(stdout, "%s: %d octets\n", file, size)
	return nil
}

// copyRunning asks the service.
func copyRunning(ctx context.Context, socket string, w io.Writer) error {
	r, err := unixhttp.Do(ctx, socket, "GET", "/v1/backup", nil)
	if err != nil {
		return fmt.Errorf("%w; is lariat-metadata running? A stopped one's store is read with --data-dir", err)
	}
	defer r.Close()
	if r.Status != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(r, 4096))
		return fmt.Errorf("%d %s: %s", r.Status, http.StatusText(r.Status), text)
	}
	_, err = io.Copy(w, r)
	return err
}

// copyStopped opens the store, so that what is only in its log so far is in the copy too.
func copyStopped(ctx context.Context, dir string, w io.Writer) error {
	if _, err := os.Stat(filepath.Join(dir, "member")); err != nil {
		return fmt.Errorf("data folder %s: there is no store in it: %w", dir, err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	st, err := store.Open(ctx, store.Embedded{Dir: dir, Prefix: "/", NoListen: true})
	if err != nil {
		return err
	}
	return errors.Join(st.Backup(ctx, w), st.Close())
}

// verify checks the SHA-256 that etcd puts behind the pages of its snapshot.
func verify(f *os.File, size int64) error {
	if size <= sha256.Size || size%512 != sha256.Size {
		return fmt.Errorf("it is cut short (%d octets)", size)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.CopyN(h, f, size-sha256.Size); err != nil {
		return err
	}
	want := make([]byte, sha256.Size)
	if _, err := io.ReadFull(f, want); err != nil {
		return err
	}
	if string(want) != string(h.Sum(nil)) {
		return errors.New("its checksum is wrong")
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// revisionBump is added at a restore, so that revisions, which watchers and sequence numbers build on, never come back.
const revisionBump = 10_000_000

// restore makes a data folder from a backup.
func restore(args []string, stdout io.Writer) error {
	var c config
	f := pflag.NewFlagSet("lariat-metadata restore", pflag.ContinueOnError)
	host, _ := os.Hostname()
	f.StringVar(&c.HostName, "host-name", host, "this host's name in the cluster")
	c.storeFlags(f)
	f.Usage = func() {
		fmt.Fprintf(stdout, "lariat-metadata restore [flags] FILE: make an embedded store's folder from a backup\n\n%s",
			f.FlagUsages())
	}
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() != 1 {
		return errors.New("restore: want one FILE")
	}
	if err := c.normalize(); err != nil {
		return err
	}
	file := f.Arg(0)
	in, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	st, err := in.Stat()
	if err == nil {
		err = verify(in, st.Size())
	}
	in.Close()
	if err != nil {
		return fmt.Errorf("restore %s: %w; nothing was changed", file, err)
	}
	entries, err := os.ReadDir(c.DataDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("restore: %w", err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("restore: data folder %s is not empty; move it away first (stop lariat-metadata before that)",
			c.DataDir)
	}
	peer := c.AdvertisePeer
	if peer == "" {
		peer = c.ListenPeer
	}
	cluster := c.InitialCluster
	switch {
	case cluster == "" && peer == "":
		peer = "http://127.0.0.1:2380"
		cluster = c.Name + "=" + peer
	case cluster == "":
		cluster = c.Name + "=" + peer
	case peer == "":
		if peer = memberURL(cluster, c.Name); peer == "" {
			return fmt.Errorf("restore: --initial-cluster %s does not list this member, %s; its name comes from --name", cluster,
				c.Name)
		}
	}
	if err := os.MkdirAll(filepath.Dir(c.DataDir), 0o755); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	// Built beside, so that an interrupted restore leaves no half folder that a start would take for a store.
	tmp, err := os.MkdirTemp(filepath.Dir(c.DataDir), "."+filepath.Base(c.DataDir)+".")
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	defer os.RemoveAll(tmp) //nolint:errcheck // empty by then
	work := filepath.Join(tmp, "etcd")
	err = snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{SnapshotPath: file, Name: c.Name,
		OutputDataDir: work, PeerURLs: []string{peer},
		InitialCluster: cluster, InitialClusterToken: "lariat", RevisionBump: revisionBump, MarkCompacted: true})
	if err != nil {
		return fmt.Errorf("restore %s into %s: %w", file, c.DataDir, err)
	}
	if err := os.Remove(c.DataDir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("restore: %w", err)
	}
	if err := errors.Join(os.Chmod(work, 0o700), os.Rename(work, c.DataDir),
		syncDir(filepath.Dir(c.DataDir))); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	fmt.Fprintf(stdout, "%s: restored from %s as member %s\n", c.DataDir, file, c.Name)
	return nil
}
