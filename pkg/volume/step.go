package volume

// OnStep is called, if it is set, between the steps of the work with their names. Nothing but tests sets it, in processes of their own,
// to end them there: no input reaches it.
var OnStep func(name string)

// Step marks a point where the process may be killed: all that comes before has been done, nothing of what follows has.
func Step(name string) {
	if OnStep != nil {
		OnStep(name)
	}
}
