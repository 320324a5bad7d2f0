package interop

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// rawServer serves one connection of our client at a time with script.
func rawServer(t *testing.T, script ...func(r *raw)) (*hbone.Client, hbone.Key) {
	t.Helper()
	ca := hbonetest.NewCA(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := ca.ServerTLS(t, hbonetest.ServerID)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, f := range script {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r := newRaw(t, tls.Server(conn, cfg))
			preface := make([]byte, len(http2.ClientPreface))
			if _, err := io.ReadFull(r.conn, preface); err != nil || string(preface) != http2.ClientPreface {
				t.Errorf("preface %q, %v", preface, err)
				return
			}
			r.ok(r.WriteSettings())
			r.readSettings()
			f(r)
			_ = r.conn.Close()
		}
	}()
	client := newClient(t, ca)
	t.Cleanup(func() { _ = l.Close(); _ = client.Close(); <-done })
	return client, hbone.Key{Source: hbonetest.ClientID, Peer: hbonetest.ServerID, Remote: l.Addr().(*net.TCPAddr).AddrPort()}
}

// accept answers the next request 200 and echoes its first DATA frame.
func accept(r *raw) {
	f := r.next().(*http2.MetaHeadersFrame)
	r.headers(f.StreamID, false, ":status", "200")
	d, ok := r.next().(*http2.DataFrame)
	if !ok {
		r.t.Errorf("got %v, want DATA", d)
		return
	}
	r.ok(r.WriteData(d.StreamID, true, slices.Clone(d.Data())))
	_, _ = r.ReadFrame() // until the client goes on or hangs up
}

func TestClientSendsExactlyAConnect(t *testing.T) {
	got, closed := make(chan string, 1), make(chan struct{})
	client, key := rawServer(t, func(r *raw) {
		for id, want := range map[http2.SettingID]uint32{
			http2.SettingEnablePush: 0, http2.SettingInitialWindowSize: 4 << 10,
			http2.SettingMaxFrameSize: 1 << 20, http2.SettingMaxHeaderListSize: 16 << 10,
		} {
			if v, ok := r.settings[id]; !ok || v != want {
				r.t.Errorf("%s = %d, want %d", id, v, want)
			}
		}
		f := r.next().(*http2.MetaHeadersFrame)
		var text strings.Builder
		for _, field := range f.Fields {
			fmt.Fprintf(&text, "%s: %s\n", field.Name, field.Value)
		}
		if f.StreamEnded() {
			text.WriteString("END_STREAM")
		}
		r.headers(f.StreamID, false, ":status", "200", "baggage", "service.name=db")
		got <- text.String()
		defer close(closed)
		f2 := r.next()
		if rst, ok := f2.(*http2.RSTStreamFrame); !ok || rst.ErrCode != http2.ErrCodeCancel {
			r.t.Errorf("got %v after Close, want RST_STREAM CANCEL", f2)
		}
	})
	const trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	tunnel, err := client.Open(t.Context(), key, &hbone.Request{
		Authority: application, TraceParent: trace,
		Baggage: hbone.Baggage{Namespace: "demo"}, Forwarded: hbone.Forwarded{For: key.Remote, Host: "db"},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(":method: CONNECT\n:authority: %s\nbaggage: k8s.namespace.name=demo\nforwarded: for=%q;host=db\ntraceparent: %s\n",
		application, key.Remote, trace)
	if text := <-got; text != want {
		t.Errorf("request is\n%s\nwant\n%s", text, want)
	}
	if tunnel.Response.Baggage.Service != "db" {
		t.Errorf("response is %+v", tunnel.Response)
	}
	_ = tunnel.Close()
	<-closed
}

func TestClientTriesAgainWhatWasNotProcessed(t *testing.T) {
	for name, first := range map[string]func(r *raw){
		"REFUSED_STREAM": func(r *raw) {
			r.ok(r.WriteRSTStream(r.next().Header().StreamID, http2.ErrCodeRefusedStream))
		},
		"GOAWAY below the stream": func(r *raw) {
			r.next()
			r.ok(r.WriteGoAway(0, http2.ErrCodeNo, []byte("bye")))
		},
		"connection lost": func(r *raw) {
			r.next()
			_ = r.conn.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			client, key := rawServer(t, first, accept)
			tunnel, err := client.Open(t.Context(), key, &hbone.Request{Authority: application})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tunnel.Write([]byte("hello")); err != nil {
				t.Error(err)
			}
			if all, err := io.ReadAll(tunnel); err != nil || string(all) != "hello" {
				t.Errorf("echo = %q, %v", all, err)
			}
			_ = tunnel.Close()
			if n := client.Stats().Retries; n != 1 {
				t.Errorf("%d retries", n)
			}
		})
	}
}

func TestClientJudgesAnswers(t *testing.T) {
	answer := func(f func(r *raw, id uint32)) func(*raw) {
		return func(r *raw) {
			f(r, r.next().Header().StreamID)
			_, _ = r.ReadFrame()
		}
	}
	status := func(n int) func(error) bool {
		return func(err error) bool {
			var se *hbone.StatusError
			return errors.As(err, &se) && se.Status == n
		}
	}
	reset := func(code http2.ErrCode, remote bool) func(error) bool {
		return func(err error) bool {
			var re *hbone.ResetError
			return errors.As(err, &re) && re.Code == uint32(code) && re.Remote == remote
		}
	}
	for name, test := range map[string]struct {
		answer func(r *raw, id uint32)
		want   func(error) bool
	}{
		"status without end": {func(r *raw, id uint32) { r.headers(id, false, ":status", "503") }, status(503)},
		"status, end, reset": {func(r *raw, id uint32) {
			r.headers(id, true, ":status", "401")
			_ = r.WriteRSTStream(id, http2.ErrCodeNo) // the test may be over
		}, status(401)},
		"another 2xx": {func(r *raw, id uint32) { r.headers(id, false, ":status", "204") }, status(204)},
		"reset":       {func(r *raw, id uint32) { r.ok(r.WriteRSTStream(id, http2.ErrCodeInternal)) }, reset(http2.ErrCodeInternal, true)},
		"no status":   {func(r *raw, id uint32) { r.headers(id, false, "a", "b") }, reset(http2.ErrCodeProtocol, false)},
		"no number":   {func(r *raw, id uint32) { r.headers(id, false, ":status", "abc") }, reset(http2.ErrCodeProtocol, false)},
		"data first":  {func(r *raw, id uint32) { r.ok(r.WriteData(id, false, []byte("x"))) }, reset(http2.ErrCodeProtocol, false)},
		"20 KiB of header": {func(r *raw, id uint32) {
			r.headers(id, false, ":status", "200", "a", strings.Repeat("y", 6<<10), "b", strings.Repeat("y", 6<<10), "c", strings.Repeat("y", 6<<10))
		}, reset(http2.ErrCodeProtocol, false)},
	} {
		t.Run(name, func(t *testing.T) {
			client, key := rawServer(t, answer(test.answer))
			if _, err := client.Open(t.Context(), key, &hbone.Request{Authority: application}); !test.want(err) {
				t.Errorf("Open = %v", err)
			}
		})
	}
}

func TestClientReadsHowAStreamEnds(t *testing.T) {
	for name, test := range map[string]struct {
		end   func(r *raw, id uint32)
		text  string
		clean bool
	}{
		"end": {func(r *raw, id uint32) { r.ok(r.WriteData(id, true, []byte("hi"))) }, "hi", true},
		"end, then NO_ERROR": {func(r *raw, id uint32) {
			r.ok(r.WriteData(id, true, []byte("hi")))
			_ = r.WriteRSTStream(id, http2.ErrCodeNo) // the test may be over
		}, "hi", true},
		"reset": {func(r *raw, id uint32) {
			r.ok(r.WriteData(id, false, []byte("hi")))
			r.ok(r.WriteRSTStream(id, http2.ErrCodeCancel))
		}, "hi", false},
		"reset with NO_ERROR": {func(r *raw, id uint32) {
			r.ok(r.WriteData(id, false, []byte("hi")))
			r.ok(r.WriteRSTStream(id, http2.ErrCodeNo))
		}, "hi", false},
		"trailers":                  {func(r *raw, id uint32) { r.ok(r.WriteData(id, false, []byte("hi"))); r.headers(id, true, "a", "b") }, "hi", false},
		"connection closed cleanly": {func(r *raw, id uint32) { r.ok(r.WriteData(id, false, []byte("hi"))); _ = r.conn.Close() }, "hi", false},
		"GOAWAY and closed": {func(r *raw, id uint32) {
			r.ok(r.WriteData(id, false, []byte("hi")))
			r.ok(r.WriteGoAway(id, http2.ErrCodeNo, nil))
			_ = r.conn.Close()
		}, "hi", false},
		"GOAWAY and then the end": {func(r *raw, id uint32) {
			r.ok(r.WriteGoAway(id, http2.ErrCodeNo, nil))
			r.ok(r.WriteData(id, true, []byte("hi")))
		}, "hi", true},
	} {
		t.Run(name, func(t *testing.T) {
			client, key := rawServer(t, func(r *raw) {
				id := r.next().Header().StreamID
				r.headers(id, false, ":status", "103")
				r.headers(id, false, ":status", "200")
				test.end(r, id)
				for {
					if _, err := r.ReadFrame(); err != nil {
						return
					}
				}
			})
			tunnel, err := client.Open(t.Context(), key, &hbone.Request{Authority: application})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = tunnel.Close() }()
			all, err := io.ReadAll(tunnel)
			if string(all) != test.text || (err == nil) != test.clean || errors.Is(err, io.EOF) {
				t.Errorf("read %q, %v", all, err)
			}
		})
	}
}

func TestClientRespectsTheServersBounds(t *testing.T) {
	sent := make(chan int, 1)
	client, key := rawServer(t, func(r *raw) {
		r.ok(r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000}))
		id := r.next().Header().StreamID
		r.headers(id, false, ":status", "200")
		total := 0
		for total < 1000 {
			d := r.next().(*http2.DataFrame)
			total += len(d.Data())
		}
		_ = r.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if f, err := r.ReadFrame(); err == nil {
			r.t.Errorf("client sent %v beyond the window", f)
		}
		sent <- total
	})
	tunnel, err := client.Open(t.Context(), key, &hbone.Request{Authority: application})
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		_, _ = tunnel.Write(make([]byte, 5000)) // until Close
	}()
	if n := <-sent; n != 1000 {
		t.Errorf("client sent %d bytes into a window of 1000", n)
	}
	_ = tunnel.Close()
	<-wrote
}

func TestClientGivesWindowBackForWhatItAbandoned(t *testing.T) {
	checked := make(chan struct{})
	client, key := rawServer(t, func(r *raw) {
		defer close(checked)
		id := r.next().Header().StreamID
		r.headers(id, false, ":status", "200")
		r.wantReset(id, http2.ErrCodeCancel)
		for range 64 { // as if under way when the client closed: a quarter of its window
			r.ok(r.WriteData(id, false, make([]byte, 64<<10)))
		}
		f, err := r.ReadFrame()
		for err == nil && f.Header().Type != http2.FrameWindowUpdate {
			f, err = r.ReadFrame()
		}
		if err != nil || f.Header().StreamID != 0 {
			r.t.Errorf("got %v, %v, want the connection's window back", f, err)
		}
	})
	tunnel, err := client.Open(t.Context(), key, &hbone.Request{Authority: application})
	if err != nil {
		t.Fatal(err)
	}
	_ = tunnel.Close()
	<-checked
}
