package volume

// OnFailpoint is called, if it is set, between the steps of the work with their names. Nothing but tests sets
// it, in processes of their own, to end them there: no input reaches it.
var OnFailpoint func(name string)

// Failpoint marks a point where the process may be killed: all that comes before has been done, nothing of
// what follows has.
func Failpoint(name string) {
	if OnFailpoint != nil {
		OnFailpoint(name)
	}
}
