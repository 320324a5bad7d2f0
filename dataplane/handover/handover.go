// Package handover is what the agent that serves a node and the one that is to serve it say
// to each other, over a unix socket that the first listens on:
//
//	successor                                 predecessor
//	  who I am ───────────────────────────────►
//	          ◄──────────────────────────────── who I am, or why not
//	  take ───────────────────────────────────►  lets go of all but its connections
//	          ◄──────────────────────────────── yours
//	  (replaces listeners, pod by pod)           goes on accepting
//	  done ───────────────────────────────────►  accepts no more
//
// The connection stays until one of the two ends. When it is the successor, the predecessor
// takes the node back; when it is the predecessor, there is nobody any more to give it back to.
package handover

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Agent is who one of the two is.
type Agent struct {
	Node    string `json:"node"`
	Version string `json:"version"`
	PID     int    `json:"pid"`   // as it sees itself; it may be in another PID namespace
	NetNS   uint64 `json:"netns"` // inode of the network namespace that its own sockets are in
}

// answerTimeout is for what the other end answers without having to do anything first.
const answerTimeout = 5 * time.Second

const (
	stepTake  = "take"
	stepGiven = "given"
	stepDone  = "done"
)

type message struct {
	Agent *Agent `json:"agent,omitempty"`
	Step  string `json:"step,omitempty"`
	Error string `json:"error,omitempty"`
}

// wire sends and receives messages.
type wire struct {
	*net.UnixConn
	decoder *json.Decoder
}

func newWire(conn *net.UnixConn) *wire { return &wire{conn, json.NewDecoder(conn)} }

func (w *wire) send(m message) error {
	if err := w.SetWriteDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(m)
}

// receive waits without end when bound is 0.
func (w *wire) receive(bound time.Duration) (message, error) {
	var deadline time.Time
	if bound > 0 {
		deadline = time.Now().Add(bound)
	}
	if err := w.SetReadDeadline(deadline); err != nil {
		return message{}, err
	}
	var m message
	if err := w.decoder.Decode(&m); err != nil {
		return message{}, err
	}
	if m.Error != "" {
		return message{}, errors.New(m.Error)
	}
	return m, nil
}

// checkPeer lets in root and the agent's own user, whatever the modes of the socket's file say.
func checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("read the peer's credentials: %w", err)
	}
	if cred.Uid != 0 && cred.Uid != uint32(os.Geteuid()) {
		return fmt.Errorf("user id %d may not take a node over", cred.Uid)
	}
	return nil
}
