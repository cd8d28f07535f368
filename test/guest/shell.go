package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// Shell is an interactive shell in a guest, on the terminal of this process.
func Shell(ctx context.Context, o Options) (int, error) {
	if fi, err := os.Stdin.Stat(); err != nil || fi.Mode()&os.ModeCharDevice == 0 {
		return 0, errors.Join(errors.New("a shell needs a terminal; use run for a command"), err)
	}
	fmt.Println("guest: the project's executables are in /lariat/bin; \"exit\" ends the guest")
	res, err := Run(ctx, o, Command{Args: []string{"/bin/bash", "-il"},
		Env: []string{"TERM=" + os.Getenv("TERM"), `PS1=guest \w \$ `}, Limit: 24 * time.Hour, interactive: true})
	return res.Code, err
}
