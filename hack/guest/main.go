// Command guest makes the guest lab's image, and runs commands in it.
//
//	hack/guest prepare [-refresh]   makes the image if it is missing; with -refresh of the newest packages
//	hack/guest run COMMAND          runs a shell command in a guest, and exits with its status
//	hack/guest shell                a shell in a guest, on this terminal; "exit" ends both
//	hack/guest packages             what is in the image, with versions
//
// run and shell take -kernel RELEASE: the kernel of another release of Debian, such as trixie. make guest-image
// and make guest call this program. LARIAT_GUEST_KERNEL adds to the kernel's command line.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/lariat-net/lariat/test/guest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code, err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		code = 1
	}
	os.Exit(code)
}

func run(ctx context.Context, args []string) (int, error) {
	if len(args) == 0 {
		return 0, errors.New("usage: guest prepare|run|shell|packages")
	}
	set := flag.NewFlagSet(args[0], flag.ContinueOnError)
	refresh := set.Bool("refresh", false, "ask for newer packages")
	kernel := set.String("kernel", "", "boot the kernel of this `release` of Debian; the image has those of "+
		"test/guest/packages.list")
	if err := set.Parse(args[1:]); err != nil {
		return 0, err
	}
	options := guest.Options{Bin: true, Kernel: *kernel, KernelArgs: strings.Fields(os.Getenv("LARIAT_GUEST_KERNEL"))}
	image, err := guest.Prepare(ctx, os.Stdout, *refresh && args[0] == "prepare")
	if err != nil {
		return 0, err
	}
	switch args[0] {
	case "prepare":
		return 0, nil
	case "packages":
		text, err := image.Packages()
		fmt.Print(text)
		return 0, err
	case "run":
		res, err := guest.Run(ctx, options, guest.Command{Args: []string{"/bin/sh", "-c", strings.Join(set.Args(), " ")},
			Stdout: os.Stdout})
		fmt.Fprintf(os.Stderr, "guest: ready after %.1f s, done after %.1f s\n", res.Ready.Seconds(), res.Took.Seconds())
		return res.Code, err
	case "shell":
		return guest.Shell(ctx, options)
	}
	return 0, fmt.Errorf("unknown command %q", args[0])
}
