package main

import "github.com/lariat-net/lariat/pkg/doctor"

// features asks the kernel what it can do.
func features() []doctor.Feature { return nil }
