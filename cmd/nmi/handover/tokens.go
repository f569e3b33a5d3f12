package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Tokens go from process to process through a socket pair (SOCK_SEQPACKET), and so through
// memory alone. The new agent makes it, and sends one end with its request. The agent that
// runs writes the version and then packets, once it has released its duties, and closes.
// Each packet stands for itself: what does not arrive is fetched anew.
const (
	tokensVersion = "nmi tokens 1"
	// maxPacket bounds a packet: 64 KiB, with a token of at most some 10 KiB in it.
	maxPacket = 64 << 10
	// maxPackets and maxTransfer (bytes) bound what a new agent reads: twice as many
	// tokens as its cache holds, 2,000, and 16 KiB for each of those.
	maxPackets  = 4096
	maxTransfer = 32 << 20
	// tokensTimeout bounds the transfer, during which neither agent accepts. 250 tokens of
	// 2 KiB take some milliseconds.
	tokensTimeout = 2 * time.Second
)

// newTokenPipe returns the two ends of a socket pair, the second for another process.
func newTokenPipe() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair for tokens: %w", err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "tokens"), os.NewFile(uintptr(fds[1]), "tokens")
	conn, err := unixConn(near)
	if err != nil {
		_ = far.Close()
		return nil, nil, err
	}
	return conn, far, nil
}

// unixConn is the Unix socket that a file is; it closes the file.
func unixConn(file *os.File) (*net.UnixConn, error) {
	defer file.Close() //nolint:errcheck // FileConn has a duplicate
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	if c, ok := conn.(*net.UnixConn); ok {
		return c, nil
	}
	_ = conn.Close()
	return nil, errors.New("not a Unix socket")
}

// sendTokens writes what tokens sends to the file that came with a request, and closes it.
func sendTokens(ctx context.Context, file *os.File, tokens func(send func(packet []byte) error) error) error {
	conn, err := unixConn(file)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // all has been written
	if err := conn.SetDeadline(time.Now().Add(tokensTimeout)); err != nil {
		return err
	}
	defer expire(ctx, conn)()
	if _, err := conn.Write([]byte(tokensVersion)); err != nil {
		return err
	}
	return tokens(func(packet []byte) error {
		if len(packet) == 0 || len(packet) > maxPacket { // an empty one would read as the end
			return nil
		}
		_, err := conn.Write(packet)
		return err
	})
}

// receiveTokens calls restore with each packet until the sender closes, and returns how
// many there were. An agent that sends no tokens just closes.
func receiveTokens(ctx context.Context, conn *net.UnixConn, restore func(packet []byte) error) (n int, err error) {
	if err := conn.SetDeadline(time.Now().Add(tokensTimeout)); err != nil {
		return 0, err
	}
	defer expire(ctx, conn)()
	b := make([]byte, maxPacket)
	size, err := conn.Read(b)
	switch {
	case errors.Is(err, io.EOF):
		return 0, nil
	case err != nil:
		return 0, err
	case string(b[:size]) != tokensVersion:
		return 0, errors.New("they are in the format of another version")
	}
	for total := 0; n < maxPackets && total < maxTransfer; total += size {
		size, err = conn.Read(b)
		switch {
		case errors.Is(err, io.EOF):
			return n, nil
		case err != nil:
			return n, err
		}
		if err := restore(b[:size]); err != nil {
			return n, err
		}
		n++
	}
	return n, errors.New("more were sent than a cache holds")
}
