package allocator

// Queued returns how many requests wait for the write that is under way.
func (a *Allocator) Queued() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.queue)
}
