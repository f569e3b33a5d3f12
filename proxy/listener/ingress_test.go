package listener

import (
	"fmt"
	"net"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestIngressOfADualStackSocket(t *testing.T) {
	ln, err := net.Listen("tcp", ":0") // as by whoever hands a socket over
	require.NoError(t, err)
	defer ln.Close()
	conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", ln.Addr().(*net.TCPAddr).Port))
	require.NoError(t, err)
	defer conn.Close()
	accepted, err := ln.Accept()
	require.NoError(t, err)
	defer accepted.Close()
	lo, err := net.InterfaceByName("lo")
	require.NoError(t, err)
	index, err := ingressOf(accepted)
	require.NoError(t, err)
	assert.Equal(t, lo.Index, index)

	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	_, err = ingressOf(here)
	assert.Error(t, err)
}
