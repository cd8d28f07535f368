package doctor

import (
	"bytes"
	"testing"
)

// FuzzICMP: only a message that repeats the whole request is an answer to it.
func FuzzICMP(f *testing.F) {
	request := append([]byte{8, 0, 0x12, 0x34}, "0123456789abcdefghij"...)
	f.Add(append([]byte{0, 0, 0x1a, 0x34}, "0123456789abcdefghij"...), byte(0))
	f.Add(append([]byte{129, 0, 0, 0}, "0123456789abcdefghij"...), byte(129))
	f.Add([]byte{3, 3, 0, 0, 0, 0, 0, 0, 0x45}, byte(0)) // port unreachable
	f.Add([]byte{}, byte(0))
	f.Fuzz(func(t *testing.T, message []byte, reply byte) {
		want := len(message) == len(request) && message[0] == reply && message[1] == 0 &&
			bytes.Equal(message[4:], request[4:])
		if got := answers(message, request, reply); got != want {
			t.Errorf("%x: %t", message, got)
		}
		checksum(message)
	})
}

// TestChecksum: a message with its checksum in it sums up to 0 (RFC 1071 §1).
func TestChecksum(t *testing.T) {
	b := append([]byte{8, 0, 0, 0}, "0123456789abcdefghij"...)
	sum := checksum(b)
	b[2], b[3] = byte(sum>>8), byte(sum)
	if checksum(b) != 0 {
		t.Errorf("%x", b)
	}
}
