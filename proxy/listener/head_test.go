package listener

import (
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A head that is refused costs no more than its bytes, however small its fields are.
func TestHeadIsCountedBeforeItIsParsed(t *testing.T) {
	h := new(headReader)
	raw := "GET /x HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("a:\r\n", 1300) + "\r\n"
	got, err := io.ReadAll(readerFunc(func(p []byte) (int, error) { return h.read(strings.NewReader(raw), p) }))
	require.ErrorIs(t, err, errManyLines)
	assert.Empty(t, got)
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// A trailer costs as much as a head (RFC 9112, 7.1.2).
func TestTrailersAreBounded(t *testing.T) {
	for name, tc := range map[string]struct {
		fields int
		wanted bool
		err    error
	}{"some": {60, false, nil}, "many": {1300, false, errManyLines}, "many lines of a body that is wanted": {1300, true, nil}} {
		t.Run(name, func(t *testing.T) {
			in, h := strings.NewReader("0\r\n"+strings.Repeat("a:\r\n", tc.fields)+"\r\n"), new(headReader)
			_, err := io.ReadAll(readerFunc(func(p []byte) (int, error) { return h.readBody(in, p, tc.wanted) }))
			assert.ErrorIs(t, err, tc.err)
		})
	}
}

// However the bytes of heads arrive, each Read ends with a head at most, and nothing is
// added, lost or changed.
func TestHeadReader(t *testing.T) {
	const a, b, c = "GET /a HTTP/1.1\r\nX: y\r\n\r\n", "GET /b HTTP/1.1\nX: y\n\n", "\r\nGET /c HTTP/1.1\r\r\n\r\r\n"
	want := []string{a, b, "\r\n", c[2:], "half"}
	all := strings.Join(want, "")
	for size := 1; size <= len(all); size++ {
		for _, room := range []int{1, 3, 4096} {
			source, h := strings.NewReader(all), new(headReader)
			var got []string
			p, part := make([]byte, room), ""
			for {
				n, err := h.read(io.LimitReader(source, int64(size)), p)
				if part += string(p[:n]); strings.HasSuffix(part, "\n") && len(got) < len(want) && part == want[len(got)] {
					got, part = append(got, part), ""
					h.begin()
				}
				if err != nil {
					require.ErrorIs(t, err, io.EOF)
					break
				}
			}
			require.Equal(t, want, append(got, part), "%d bytes at once", size)
		}
	}
}
