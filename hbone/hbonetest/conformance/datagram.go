package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/raceway-mesh/raceway/hbone"
	"github.com/raceway-mesh/raceway/hbone/hbonetest"
)

// TestDatagrams tests the flows of what with makes. Datagrams may get lost, so that tests send
// what they wait for until it is there.
func TestDatagrams(t *testing.T, with Connect) {
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"RequestNamesTheTarget", with.testRequestNamesTheTarget},
		{"FlowIsEchoed", with.testFlowIsEchoed},
		{"LongestDatagramMayBeFragmented", with.testLongestDatagramMayBeFragmented},
		{"FirstDatagramsComeWithTheRequest", with.testFirstDatagramsComeWithTheRequest},
		{"RejectedFlowHasItsStatus", with.testRejectedFlowHasItsStatus},
		{"ClosedPortIsTold", with.testClosedPortIsTold},
		{"CloseIsACleanEnd", with.testCloseIsACleanEnd},
		{"LostConnectionIsAnError", with.testLostConnectionIsAnError},
		{"FlowThatNobodyTakesIsClosed", with.testFlowThatNobodyTakesIsClosed},
		{"OpeningEndsWithItsContext", with.testOpeningEndsWithItsContext},
		{"ManyFlowsKeepApart", with.testManyFlowsKeepApart},
	} {
		t.Run(test.name, test.run)
	}
}

const datagramTarget = "10.0.0.1:53"

// datagrams is a sink that keeps what comes.
type datagrams struct {
	got  chan []byte
	ends chan error
}

func newDatagrams() *datagrams {
	return &datagrams{got: make(chan []byte, 1024), ends: make(chan error, 4)}
}

func (d *datagrams) Datagram(p []byte) {
	select {
	case d.got <- bytes.Clone(p):
	default:
	}
}

func (d *datagrams) End(err error) { d.ends <- err }

// echoed sends back what comes on a flow.
type echoed struct {
	flow hbone.DatagramStream
	ends chan<- error
}

func (e *echoed) Datagram(p []byte) { _ = e.flow.Send(p, true) }

func (e *echoed) End(err error) {
	_ = e.flow.Close()
	if e.ends != nil {
		e.ends <- err
	}
}

// echoing serves flows with echoes, which tell ends, if it is set.
func echoing(ends chan<- error) hbone.Handler {
	return func(r *hbone.ServerRequest) {
		f, err := r.AcceptDatagrams(hbone.Response{Baggage: hbone.Baggage{Service: "dns"}})
		if err == nil {
			f.Deliver(&echoed{f, ends})
		}
	}
}

func (p *Pair) openDatagrams(t *testing.T, first ...[]byte) (hbone.DatagramStream, *datagrams) {
	t.Helper()
	f, _, err := p.Session.OpenDatagrams(t.Context(), &hbone.Request{Authority: datagramTarget}, first)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	d := newDatagrams()
	f.Deliver(d)
	return f, d
}

// exchange sends p until it comes back.
func exchange(t *testing.T, f hbone.DatagramStream, d *datagrams, p []byte) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		if err := f.Send(p, true); err != nil {
			t.Fatalf("send %d bytes: %v", len(p), err)
		}
		again := time.After(200 * time.Millisecond)
	waiting:
		for {
			select {
			case got := <-d.got:
				if bytes.Equal(got, p) {
					return
				}
			case <-again:
				break waiting
			case <-deadline:
				t.Fatalf("%d bytes do not come back; dropped: %+v", len(p), f.Drops())
			}
		}
	}
}

func (with Connect) testRequestNamesTheTarget(t *testing.T) {
	for _, authority := range []string{"10.0.0.1:53", "[2001:db8::53]:53", "dns.demo.svc:53"} {
		got := make(chan *hbone.ServerRequest, 1)
		p := with(t, func(r *hbone.ServerRequest) {
			got <- r
			echoing(nil)(r)
		})
		want := hbone.Request{Authority: authority, Baggage: hbone.Baggage{Namespace: "demo"}, TraceParent: hbone.NewTraceParent()}
		f, response, err := p.Session.OpenDatagrams(t.Context(), &want, nil)
		if err != nil {
			t.Fatal(err)
		}
		r := <-got
		if r.Request != want || r.Protocol != hbone.UDP || r.Accept != nil {
			t.Errorf("server got %+v of %v, want %+v of UDP", r.Request, r.Protocol, want)
		}
		if target, _ := hbone.ParseAuthority(authority); r.Target != target.AddrPort() {
			t.Errorf("target = %v, want %v", r.Target, target.AddrPort())
		}
		if response.Baggage.Service != "dns" {
			t.Errorf("response = %+v", response)
		}
		_ = f.Close()
		hbonetest.WaitStreams(t, p.Session, 0)
	}
}

func (with Connect) testFlowIsEchoed(t *testing.T) {
	p := with(t, echoing(nil))
	f, d := p.openDatagrams(t)
	for _, n := range []int{0, 1, 512, 1100} {
		exchange(t, f, d, bytes.Repeat([]byte{byte(n)}, n))
	}
	if drops := f.Drops(); drops.Foreign != 0 {
		t.Errorf("drops = %+v", drops)
	}
}

func (with Connect) testLongestDatagramMayBeFragmented(t *testing.T) {
	p := with(t, echoing(nil))
	f, d := p.openDatagrams(t)
	for _, n := range []int{1472, 9000, 65507, hbone.MaxDatagram} {
		exchange(t, f, d, bytes.Repeat([]byte{byte(n)}, n))
	}
	if err := f.Send(make([]byte, hbone.MaxDatagram+1), true); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("more than the longest payload: %v, want EMSGSIZE", err)
	}
}

func (with Connect) testFirstDatagramsComeWithTheRequest(t *testing.T) {
	seen := make(chan []byte, 16)
	p := with(t, func(r *hbone.ServerRequest) {
		// What came is kept while the request is judged.
		time.Sleep(20 * time.Millisecond)
		f, err := r.AcceptDatagrams(hbone.Response{})
		if err != nil {
			return
		}
		d := newDatagrams()
		f.Deliver(d)
		for range 2 {
			select {
			case got := <-d.got:
				seen <- got
			case <-r.Context.Done():
				return
			}
		}
		_ = f.Send([]byte("seen"), true)
		<-r.Context.Done()
	})
	_, d := p.openDatagrams(t, []byte("query"), make([]byte, 5000))
	sizes := map[int]bool{}
	for range 2 {
		sizes[len(within(t, "first datagrams", seen))] = true
	}
	if !sizes[5] || !sizes[5000] {
		t.Errorf("the first datagrams have the sizes %v", sizes)
	}
	if got := within(t, "the answer", d.got); string(got) != "seen" {
		t.Errorf("answer = %q", got)
	}
}

func (with Connect) testRejectedFlowHasItsStatus(t *testing.T) {
	for _, status := range []int{400, 401, 503} {
		p := with(t, func(r *hbone.ServerRequest) {
			r.Reject(status)
			if _, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
				t.Error("AcceptDatagrams after Reject succeeded")
			}
		})
		_, _, err := p.Session.OpenDatagrams(t.Context(), &hbone.Request{Authority: datagramTarget}, [][]byte{{1}})
		var se *hbone.StatusError
		if !errors.As(err, &se) || se.Status != status {
			t.Errorf("OpenDatagrams = %v, want status %d", err, status)
		}
		hbonetest.WaitStreams(t, p.Session, 0)
	}
}

func (with Connect) testClosedPortIsTold(t *testing.T) {
	p := with(t, func(r *hbone.ServerRequest) {
		if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
			_ = f.Refuse()
			_ = f.Refuse()
			_ = f.Close()
		}
	})
	f, _, err := p.Session.OpenDatagrams(t.Context(), &hbone.Request{Authority: datagramTarget}, nil)
	if err == nil { // else it was told before the answer
		d := newDatagrams()
		f.Deliver(d)
		err = within(t, "the end", d.ends)
		_ = f.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("end = %v, want ECONNREFUSED", err)
	}
	hbonetest.WaitStreams(t, p.Session, 0)
}

func (with Connect) testCloseIsACleanEnd(t *testing.T) {
	ends := make(chan error, 1)
	p := with(t, echoing(ends))
	f, d := p.openDatagrams(t)
	exchange(t, f, d, []byte("ping"))
	_ = f.Close()
	_ = f.Close()
	if err := within(t, "the server's end", ends); err != nil {
		t.Errorf("the server's end = %v, want nil", err)
	}
	if err := f.Send([]byte("x"), true); err == nil {
		t.Error("Send after Close succeeded")
	}
	hbonetest.WaitStreams(t, p.Session, 0)

	p = with(t, func(r *hbone.ServerRequest) {
		if f, err := r.AcceptDatagrams(hbone.Response{}); err == nil {
			_ = f.Close()
		}
	})
	_, d = p.openDatagrams(t)
	if err := within(t, "the client's end", d.ends); err != nil {
		t.Errorf("the client's end = %v, want nil", err)
	}
}

func (with Connect) testLostConnectionIsAnError(t *testing.T) {
	for name, lose := range map[string]func(*Pair){
		"closed": func(p *Pair) { _ = p.Session.Close() },
		"forced": func(p *Pair) { p.Force() },
	} {
		ends := make(chan error, 1)
		p := with(t, echoing(ends))
		f, d := p.openDatagrams(t)
		exchange(t, f, d, []byte("ping"))
		lose(p)
		if err := within(t, "the client's end", d.ends); err == nil {
			t.Errorf("%s: the client's end is clean", name)
		}
		if err := within(t, "the server's end", ends); err == nil {
			t.Errorf("%s: the server's end is clean", name)
		}
		if err := f.Send([]byte("x"), true); err == nil {
			t.Errorf("%s: Send on a lost connection succeeded", name)
		}
	}
}

func (with Connect) testFlowThatNobodyTakesIsClosed(t *testing.T) {
	for name, handler := range map[string]hbone.Handler{
		"unanswered": func(*hbone.ServerRequest) {},
		"accepted":   func(r *hbone.ServerRequest) { _, _ = r.AcceptDatagrams(hbone.Response{}) },
	} {
		p := with(t, handler)
		f, _, err := p.Session.OpenDatagrams(t.Context(), &hbone.Request{Authority: datagramTarget}, nil)
		if name == "unanswered" {
			if err == nil || errors.Is(err, hbone.ErrRefused) {
				t.Errorf("OpenDatagrams = %v, want an error that is no refusal", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		d := newDatagrams()
		f.Deliver(d)
		if err := within(t, "the end", d.ends); err != nil {
			t.Errorf("end = %v", err)
		}
		_ = f.Close()
	}
}

func (with Connect) testOpeningEndsWithItsContext(t *testing.T) {
	ended := make(chan struct{})
	p := with(t, func(r *hbone.ServerRequest) {
		<-r.Context.Done()
		close(ended)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := p.Session.OpenDatagrams(ctx, &hbone.Request{Authority: datagramTarget}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("OpenDatagrams = %v, want the deadline's error", err)
	}
	within(t, "the request's end", ended)
	hbonetest.WaitStreams(t, p.Session, 0)
}

func (with Connect) testManyFlowsKeepApart(t *testing.T) {
	const flows = 50
	p := with(t, echoing(nil))
	streams, sinks := make([]hbone.DatagramStream, flows), make([]*datagrams, flows)
	for i := range streams {
		streams[i], sinks[i] = p.openDatagrams(t)
	}
	for i, f := range streams {
		exchange(t, f, sinks[i], fmt.Appendf(nil, "flow %d", i))
	}
	for i, d := range sinks {
		for len(d.got) > 0 {
			if got := <-d.got; string(got) != fmt.Sprintf("flow %d", i) {
				t.Errorf("flow %d got %q", i, got)
			}
		}
	}
}
