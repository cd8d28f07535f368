package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapTo sends etcd's log to ours. etcd tells a lot: what it calls info is debug here. A fatal or panic entry is
// first given to fatal, which may leave the program; etcd would exit or panic after it without naming a remedy.
//
// closing, when true, makes its errors debug too: an etcd that is told to stop calls that an error in several places.
func zapTo(log *slog.Logger, closing *atomic.Bool, fatal func(error)) *zap.Logger {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := &core{log: log, closing: closing, fatal: fatal}
	return zap.New(c, zap.WithFatalHook(c), zap.WithPanicHook(c))
}

type core struct {
	log     *slog.Logger
	closing *atomic.Bool
	fatal   func(error)
	fields  []zapcore.Field
}

var levels = map[zapcore.Level]slog.Level{
	zapcore.DebugLevel: slog.LevelDebug - 4,
	zapcore.InfoLevel:  slog.LevelDebug,
	zapcore.WarnLevel:  slog.LevelDebug, // slow disk, slow peer: our own metrics and health tell that better
}

func (c *core) level(l zapcore.Level) slog.Level {
	if c.closing != nil && c.closing.Load() && l == zapcore.ErrorLevel {
		return slog.LevelDebug
	}
	if s, ok := levels[l]; ok {
		return s
	}
	return slog.LevelError
}

func (c *core) Enabled(l zapcore.Level) bool {
	return c.log.Enabled(context.Background(), c.level(l)) || l > zapcore.ErrorLevel
}

func (c *core) With(f []zapcore.Field) zapcore.Core {
	return &core{log: c.log, closing: c.closing, fatal: c.fatal, fields: append(c.fields[:len(c.fields):len(c.fields)],
		f...)}
}

func (c *core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(c.fields[:len(c.fields):len(c.fields)], fields...) {
		f.AddTo(enc)
	}
	attrs := make([]slog.Attr, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	c.log.LogAttrs(context.Background(), c.level(e.Level), "etcd: "+e.Message, attrs...)
	return nil
}

func (c *core) Sync() error { return nil }

// OnWrite runs after a fatal or panic entry was written, instead of exit or panic.
func (c *core) OnWrite(ce *zapcore.CheckedEntry, fields []zapcore.Field) {
	err := errors.New(ce.Message)
	for _, f := range fields {
		if cause, ok := f.Interface.(error); ok && f.Type == zapcore.ErrorType {
			err = fmt.Errorf("%s: %w", ce.Message, cause)
		}
	}
	if c.fatal != nil {
		c.fatal(err)
	}
	panic(err)
}
