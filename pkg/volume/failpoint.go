package volume

// OnFailpoint receives the name of each failpoint, if it is set. Only tests set OnFailpoint, in
// processes of their own, to end those processes there. No input reaches OnFailpoint.
var OnFailpoint func(name string)

// Failpoint marks a point where the process may be killed. All work before the point is done. No
// work after the point has begun.
func Failpoint(name string) {
	if OnFailpoint != nil {
		OnFailpoint(name)
	}
}
