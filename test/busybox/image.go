// Package busybox makes images of containers from a static busybox: what tests run in real runtimes, without
// any registry.
package busybox

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
)

// WriteImage writes an archive with one image that containerd, Docker and Podman can load: an OCI layout, and beside
// it the manifest of "docker save" for those that look for that.
//
// With no arguments to run it is the image of a sandbox: it waits for a signal.
func WriteImage(path, name, tag, busybox string, command []string) error {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return fmt.Errorf("image %s: %w", name, err)
	}
	layer, err := rootfs(program)
	if err != nil {
		return fmt.Errorf("image %s: %w", name, err)
	}
	type m = map[string]any
	config, err := json.Marshal(m{
		"architecture": runtime.GOARCH, "os": "linux", "created": "2026-01-01T00:00:00Z",
		"config":  m{"Env": []string{"PATH=/bin"}, "Cmd": command, "WorkingDir": "/"},
		"rootfs":  m{"type": "layers", "diff_ids": []string{digest(layer)}},
		"history": []m{{"created": "2026-01-01T00:00:00Z", "created_by": "lariat test/busybox"}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(m{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": m{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(config), "size": len(config)},
		"layers": []m{{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(layer), "size": len(layer)}},
	})
	if err != nil {
		return err
	}
	index, err := json.Marshal(m{
		"schemaVersion": 2,
		"manifests": []m{{
			"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(manifest), "size": len(manifest),
			"platform":    m{"architecture": runtime.GOARCH, "os": "linux"},
			"annotations": m{"io.containerd.image.name": name + ":" + tag, "org.opencontainers.image.ref.name": tag},
		}},
	})
	if err != nil {
		return err
	}
	docker, err := json.Marshal([]m{{"Config": blob(config), "RepoTags": []string{name + ":" + tag},
		"Layers": []string{blob(layer)}}})
	if err != nil {
		return err
	}
	return archive(path, []file{
		{name: "oci-layout", data: []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{name: "index.json", data: index},
		{name: "manifest.json", data: docker},
		{name: blob(config), data: config},
		{name: blob(layer), data: layer},
		{name: blob(manifest), data: manifest},
	})
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func blob(b []byte) string { return "blobs/sha256/" + digest(b)[len("sha256:"):] }

type file struct {
	name, link string
	dir        bool
	mode       int64
	data       []byte
}

// rootfs is the layer: busybox, the names under which it is called, and the few files that programs look for.
func rootfs(busybox []byte) ([]byte, error) {
	var files []file
	for _, d := range []string{"bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var"} {
		files = append(files, file{name: d, dir: true})
	}
	files = append(files,
		file{name: "etc/passwd", data: []byte("root:x:0:0:root:/root:/bin/sh\n")},
		file{name: "etc/group", data: []byte("root:x:0:\n")},
		file{name: "bin/busybox", data: busybox, mode: 0o755})
	for _, name := range []string{"sh", "sleep", "ping", "nc", "ip", "cat", "echo", "true", "tail", "httpd", "wget"} {
		files = append(files, file{name: "bin/" + name, link: "busybox"})
	}
	var buf bytes.Buffer
	err := pack(tar.NewWriter(&buf), files)
	return buf.Bytes(), err
}

func archive(path string, files []file) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := pack(tar.NewWriter(f), files); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func pack(t *tar.Writer, files []file) error {
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.data)), Typeflag: tar.TypeReg}
		switch {
		case f.dir:
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case f.link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		case h.Mode == 0:
			h.Mode = 0o644
		}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if _, err := t.Write(f.data); err != nil {
			return err
		}
	}
	return t.Close()
}
