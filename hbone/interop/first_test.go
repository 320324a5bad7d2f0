package interop

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
	"github.com/raceway-mesh/raceway/hbone/nonblock"
)

// application is one end of a connection whose other end first bytes are read from.
func firstOf(t *testing.T, room int) (app *net.TCPConn, first *hbone.First) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dialed, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dialed.Close(); _ = accepted.Close() })
	raw, err := accepted.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	return dialed.(*net.TCPConn), hbone.NewFirst(beginning{raw}, make([]byte, room))
}

// beginning looks every millisecond.
type beginning struct{ raw syscall.RawConn }

func (b beginning) Recv(p []byte) (n int, err error) {
	closed := b.raw.Control(func(fd uintptr) { n, err = nonblock.Read(fd, p) })
	return n, errors.Join(closed, err)
}

func (b beginning) Notify(_ *hbone.Conn, ready chan<- struct{}) {
	go func() {
		for there := false; !there; time.Sleep(time.Millisecond) {
			if b.raw.Control(func(fd uintptr) { there = nonblock.Ready(fd, unix.POLLIN|unix.POLLRDHUP) }) != nil {
				return // it is closed
			}
		}
		select {
		case ready <- struct{}{}:
		default:
		}
	}()
}

func say(t *testing.T, app *net.TCPConn, text string, end bool) {
	t.Helper()
	if _, err := io.WriteString(app, text); err != nil {
		t.Fatal(err)
	}
	if end {
		if err := app.CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
}

// hear reads want from stream id, in DATA that no answer was given to yet, and its end if that
// is wanted.
func hear(r *raw, id uint32, want string, end bool) {
	var got []byte
	ended := false
	for len(got) < len(want) || end && !ended {
		f, err := r.ReadFrame()
		if err != nil {
			r.t.Errorf("after %q: %v", got, err)
			return
		}
		if d, ok := f.(*http2.DataFrame); ok && d.StreamID == id {
			got = append(got, d.Data()...)
			ended = d.StreamEnded()
		}
	}
	if string(got) != want || ended != end {
		r.t.Errorf("the server got %q, end %v; want %q, %v", got, ended, want, end)
	}
}

// Whatever refuses a stream, the bytes that went along go along again, the late ones too.
func TestFirstBytesTravelWithConnectAndAgain(t *testing.T) {
	const text = "GET / HTTP/1.1\r\n\r\n"
	refusals := map[string]func(r *raw, id uint32){
		"REFUSED_STREAM":          func(r *raw, id uint32) { r.ok(r.WriteRSTStream(id, http2.ErrCodeRefusedStream)) },
		"GOAWAY below the stream": func(r *raw, _ uint32) { r.ok(r.WriteGoAway(0, http2.ErrCodeNo, nil)) },
	}
	for name, refuse := range refusals {
		for _, end := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				app, first := firstOf(t, 4<<10)
				client, key := rawServer(t, func(r *raw) {
					id := r.next().Header().StreamID
					hear(r, id, text, end)
					refuse(r, id)
				}, func(r *raw) {
					id := r.next().Header().StreamID
					hear(r, id, text, end)
					r.headers(id, false, ":status", "200")
					r.ok(r.WriteData(id, true, []byte("done")))
					_, _ = r.ReadFrame()
				})
				say(t, app, text[:3], false)
				time.AfterFunc(20*time.Millisecond, func() { say(t, app, text[3:], end) })
				tunnel, err := client.OpenWith(t.Context(), key, &hbone.Request{Authority: application}, first)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = tunnel.Close() }()
				if all, err := io.ReadAll(tunnel); string(all) != "done" || err != nil {
					t.Errorf("read %q, %v", all, err)
				}
				if first.Len() != len(text) {
					t.Errorf("%d first bytes, want %d", first.Len(), len(text))
				}
			})
		}
	}
}

// A status is an answer of a peer that let no byte through: another may get them.
func TestFirstBytesGoToTheNextPeerAfterAStatus(t *testing.T) {
	app, first := firstOf(t, 4<<10)
	client, key := rawServer(t, func(r *raw) {
		id := r.next().Header().StreamID
		hear(r, id, "hello", false)
		r.headers(id, true, ":status", "503")
		second := r.next()
		for second.Header().Type != http2.FrameHeaders {
			second = r.next()
		}
		hear(r, second.Header().StreamID, "hello", false)
		r.headers(second.Header().StreamID, false, ":status", "200")
		_, _ = r.ReadFrame()
	})
	say(t, app, "hello", false)
	_, err := client.OpenWith(t.Context(), key, &hbone.Request{Authority: application}, first)
	var status *hbone.StatusError
	if !errors.As(err, &status) || errors.Is(err, hbone.ErrUncertain) {
		t.Fatalf("OpenWith = %v, want the status alone", err)
	}
	tunnel, err := client.OpenWith(t.Context(), key, &hbone.Request{Authority: application}, first)
	if err != nil {
		t.Fatal(err)
	}
	_ = tunnel.Close()
}

// What the peer may have handed on is not sent twice.
func TestFirstBytesAreNotSentTwiceWhenInDoubt(t *testing.T) {
	for name, end := range map[string]func(r *raw, id uint32){
		"connection lost": func(r *raw, _ uint32) { _ = r.conn.Close() },
		"reset":           func(r *raw, id uint32) { r.ok(r.WriteRSTStream(id, http2.ErrCodeCancel)) },
	} {
		t.Run(name, func(t *testing.T) {
			app, first := firstOf(t, 4<<10)
			client, key := rawServer(t, func(r *raw) {
				id := r.next().Header().StreamID
				hear(r, id, "hello", false)
				end(r, id)
			}, func(r *raw) { r.t.Error("the client came again") })
			say(t, app, "hello", false)
			_, err := client.OpenWith(t.Context(), key, &hbone.Request{Authority: application}, first)
			if !errors.Is(err, hbone.ErrUncertain) || errors.Is(err, hbone.ErrRefused) {
				t.Errorf("OpenWith = %v, want ErrUncertain", err)
			}
		})
	}
	t.Run("no answer in time", func(t *testing.T) {
		app, first := firstOf(t, 4<<10)
		client, key := rawServer(t, func(r *raw) {
			id := r.next().Header().StreamID
			hear(r, id, "hello", false)
			r.wantReset(id, http2.ErrCodeCancel)
		})
		say(t, app, "hello", false)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := client.OpenWith(ctx, key, &hbone.Request{Authority: application}, first)
		if !errors.Is(err, hbone.ErrUncertain) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("OpenWith = %v, want ErrUncertain", err)
		}
	})
}

// Without first bytes a lost connection is tried again as ever.
func TestSilentApplicationIsNotInDoubt(t *testing.T) {
	app, first := firstOf(t, 4<<10)
	client, key := rawServer(t, func(r *raw) { r.next(); _ = r.conn.Close() }, accept)
	tunnel, err := client.OpenWith(t.Context(), key, &hbone.Request{Authority: application}, first)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tunnel.Close() }()
	if first.Len() != 0 {
		t.Errorf("%d first bytes of an application that said nothing", first.Len())
	}
	// It can be read again, and without a deadline.
	say(t, app, "later", false)
	if _, err := tunnel.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
}

func TestApplicationThatResetsCancelsConnect(t *testing.T) {
	app, first := firstOf(t, 4<<10)
	client, key := rawServer(t, func(r *raw) {
		id := r.next().Header().StreamID
		if err := errors.Join(app.SetLinger(0), app.Close()); err != nil {
			r.t.Error(err)
		}
		r.wantReset(id, http2.ErrCodeCancel)
	})
	if _, err := client.OpenWith(t.Context(), key, &hbone.Request{Authority: application}, first); err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("OpenWith = %v, want the application's reset", err)
	}
}

// What does not fit the peer's window or the buffer waits, and is not lost.
func TestFirstBytesAreBounded(t *testing.T) {
	text := strings.Repeat("0123456789", 300)
	app, first := firstOf(t, 2000)
	client, key := rawServer(t, func(r *raw) {
		r.ok(r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000}))
		r.headers(r.next().Header().StreamID, false, ":status", "200") // of a stream that has no first bytes
		id := r.next().Header().StreamID
		for f := r.next(); id == 1 || f.Header().Type != http2.FrameData; f = r.next() {
			id = f.Header().StreamID
		}
		_ = r.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if f, err := r.ReadFrame(); err == nil {
			r.t.Errorf("client sent %v beyond the window", f)
		}
		_ = r.conn.SetReadDeadline(time.Time{})
		r.headers(id, false, ":status", "200")
		r.ok(r.WriteWindowUpdate(id, 1000))
		got := 1000
		for got < 2000 {
			d := r.next().(*http2.DataFrame)
			got += len(d.Data())
		}
		_, _ = r.ReadFrame()
	})
	warm, err := client.Open(t.Context(), key, &hbone.Request{Authority: application})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = warm.Close() }()
	time.Sleep(50 * time.Millisecond) // the SETTINGS are known
	say(t, app, text, true)
	tunnel, err := client.OpenWith(t.Context(), key, &hbone.Request{Authority: application}, first)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tunnel.Close() }()
	if first.Len() != 2000 {
		t.Errorf("read %d bytes, want as many as there is room for", first.Len())
	}
}

// withFirst exchanges bytes through a tunnel that an application began before it was open: half
// of them before, then all others.
func withFirst(t *testing.T, client *hbone.Client, key hbone.Key, authority string) {
	t.Helper()
	for _, end := range []bool{true, false} {
		app, first := firstOf(t, 4<<10)
		say(t, app, "first bytes, ", end)
		tunnel, err := client.OpenWith(t.Context(), key, &hbone.Request{Authority: authority}, first)
		if err != nil {
			t.Fatalf("end %v: %v", end, err)
		}
		want := []byte("first bytes, ")
		if end { // which went along, unless the answer was quicker: then it comes now, as a relay's does
			if err := tunnel.CloseWrite(); err != nil {
				t.Fatalf("end %v: %v", end, err)
			}
		} else {
			want = append(want, bytes.Repeat([]byte("and others "), 10_000)...)
			go func() {
				_, _ = tunnel.Write(want[first.Len():]) // what is missing is missed
				_ = tunnel.CloseWrite()
			}()
		}
		got, err := io.ReadAll(tunnel)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("end %v: echo of %d bytes, %v; want %d", end, len(got), err, len(want))
		}
		_ = tunnel.Close()
	}
}

func TestEnvoyAsServerTakesFirstBytes(t *testing.T) {
	ca := hbonetest.NewCA(t)
	key := startEnvoyServer(t, ca, application, ca.Issue(t, hbonetest.Leaf{IDs: []string{hbonetest.ServerID}}))
	client := newClient(t, ca)
	for range 20 {
		withFirst(t, client, key, application)
	}
}

func TestNodeAsServerTakesFirstBytes(t *testing.T) {
	ca := hbonetest.NewCA(t)
	key := startNodeServer(t, ca)
	client := newClient(t, ca)
	for range 20 {
		withFirst(t, client, key, application)
	}
}

func TestOurServerTakesFirstBytes(t *testing.T) {
	ca := hbonetest.NewCA(t)
	s := startServer(t, ca)
	client := newClient(t, ca)
	key := hbone.Key{Source: hbonetest.ClientID, Peer: hbonetest.ServerID, Remote: s.addr}
	for range 20 {
		withFirst(t, client, key, application)
	}
}
