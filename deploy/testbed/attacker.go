package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed/attack"
)

// Attack tries to reach the metadata service from a process inside the pod, which has
// the capability NET_RAW and no other. That process is this program once more: see
// EnterNode. Pod and Metadata need not be given.
func (p *Pod) Attack(ctx context.Context, cfg attack.Config) (results []attack.Result, err error) {
	cfg.Pod = p.Addr
	return runAttack(ctx, cfg, p.Start)
}

// Attack is Pod.Attack from a process in the container's cgroup. cfg.Pod is the address of its network.
func (c *Container) Attack(ctx context.Context, cfg attack.Config) ([]attack.Result, error) {
	return runAttack(ctx, cfg, c.Start)
}

func runAttack(ctx context.Context, cfg attack.Config, start func(*exec.Cmd) error) (results []attack.Result, err error) {
	cfg.Metadata = metadataAddrPort
	text, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	const nobody, slack = 65534, 20 * time.Second
	ctx, cancel := context.WithTimeout(ctx, cfg.Patience+slack)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), attack.Env+"="+string(text))
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: nobody, Gid: nobody},
		AmbientCaps: []uintptr{unix.CAP_NET_RAW},
	}
	if err := start(cmd); err != nil {
		return nil, fmt.Errorf("starting the attack: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, problems.String())
	}
	return results, json.Unmarshal(out.Bytes(), &results)
}
