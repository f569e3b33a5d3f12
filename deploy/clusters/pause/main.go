// Command pause is what a pod's sandbox runs: it keeps the pod's namespaces while there is
// no container. The usual image of that name is in a registry, and none is needed here.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	<-end
}
