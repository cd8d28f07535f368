package ebs

import (
	"encoding/binary"
	"testing"
)

// image is the beginning of a device with a superblock.
func image(write func(b []byte)) []byte {
	b := make([]byte, superblockSize)
	write(b)
	return b
}

// F106: what a file system says of its size, at the places that fs/ext4/ext4.h and fs/xfs/libxfs/xfs_format.h give.
func TestF106Superblock(t *testing.T) {
	le, be := binary.LittleEndian, binary.BigEndian
	ext := func(blocks, high, log, incompat uint32, state uint16) []byte {
		return image(func(b []byte) {
			le.PutUint16(b[1080:], 0xef53)
			le.PutUint32(b[1028:], blocks)
			le.PutUint32(b[1360:], high)
			le.PutUint32(b[1048:], log)
			le.PutUint32(b[1120:], incompat)
			le.PutUint16(b[1082:], state)
		})
	}
	xfs := func(blocks uint64, size uint32) []byte {
		return image(func(b []byte) {
			copy(b, "XFSB")
			be.PutUint32(b[4:], size)
			be.PutUint64(b[8:], blocks)
		})
	}
	for _, tc := range []struct {
		name, fs string
		data     []byte
		want     superblock
		wrong    bool
	}{
		{"ext4", "ext4", ext(262144, 0, 2, 0x2c2, 1), superblock{size: 1 << 30}, false},
		{"ext3 of small blocks, with errors", "ext3", ext(1024, 7, 0, 2, 3), superblock{size: 1 << 20, damaged: true}, false},
		{"beyond 32 bits", "ext4", ext(0, 1, 2, 0x80, 1), superblock{size: 1 << 44}, false},
		{"xfs", "xfs", xfs(262144, 4096), superblock{size: 1 << 30}, false},
		{"another one", "xfs", ext(262144, 0, 2, 0, 1), superblock{}, true},
		{"nothing", "ext4", image(func([]byte) {}), superblock{}, true},
		{"too short", "ext4", make([]byte, 100), superblock{}, true},
		{"a block size that cannot be", "ext4", ext(1, 0, 40, 0, 1), superblock{}, true},
	} {
		if got, err := parseSuperblock(tc.fs, tc.data); (err != nil) != tc.wrong || !tc.wrong && got != tc.want {
			t.Errorf("%s: %+v %v", tc.name, got, err)
		}
	}
}
