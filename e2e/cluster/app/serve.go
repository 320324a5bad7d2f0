package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// Answer is what the HTTP server answers to any path.
type Answer struct {
	Pod  string `json:"pod"`
	Node string `json:"node"`
	Peer string `json:"peer"`
	Path string `json:"path"`
}

// drainTime is longer than endpoints take to lose a pod that ends.
const drainTime = 2 * time.Second

// serve ends some time after ctx: as a server should that is being taken out of a service.
func serve(ctx context.Context) error {
	pod, err := os.Hostname()
	if err != nil {
		return err
	}
	server := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			answer := Answer{Pod: pod, Node: os.Getenv("NODE"), Peer: r.RemoteAddr, Path: r.URL.RequestURI()}
			_ = json.NewEncoder(w).Encode(answer) // whoever asked has gone
		}),
	}
	echo, err := net.Listen("tcp", fmt.Sprintf(":%d", echoPort))
	if err != nil {
		return err
	}
	datagrams, err := net.ListenPacket("udp", fmt.Sprintf(":%d", echoPort))
	if err != nil {
		return err
	}
	wellness, err := net.Listen("tcp", fmt.Sprintf(":%d", grpcPort))
	if err != nil {
		return err
	}
	greeter, err := net.Listen("tcp", fmt.Sprintf(":%d", greetPort))
	if err != nil {
		return err
	}
	web, err := net.Listen("tcp", fmt.Sprintf(":%d", httpPort))
	if err != nil {
		return err
	}
	rpc := grpc.NewServer()
	healthpb.RegisterHealthServer(rpc, health.NewServer())
	fmt.Println("serving")
	var group errgroup.Group
	group.Go(func() error { return rpc.Serve(wellness) })
	group.Go(func() error { return serveEach(echo, func(conn net.Conn) { _, _ = io.Copy(conn, conn) }) }) // the client sees it
	group.Go(func() error { return echoDatagrams(datagrams) })
	group.Go(func() error { return serveEach(greeter, func(conn net.Conn) { _, _ = io.WriteString(conn, pod) }) })
	group.Go(func() error {
		if err := server.Serve(web); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	<-ctx.Done()
	time.Sleep(drainTime)
	rpc.Stop()
	return errors.Join(server.Close(), echo.Close(), datagrams.Close(), greeter.Close(), group.Wait())
}

// echoDatagrams ends with conn.
func echoDatagrams(conn net.PacketConn) error {
	b := make([]byte, 64<<10)
	for {
		n, from, err := conn.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err == nil {
			_, _ = conn.WriteTo(b[:n], from) // whoever asked has gone
		}
	}
}

// serveEach ends with l, and leaves connections to the end of the process.
func serveEach(l net.Listener, serve func(net.Conn)) error {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			serve(conn)
			_ = conn.Close()
		}()
	}
}
