package main

import (
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/metadata"
)

func (a *app) volume() *cobra.Command {
	c := &cobra.Command{
		Use:     "volume",
		Aliases: []string{"volumes"},
		Short:   "List volumes",
		Long: "Each host's lariat-storage lists its own. They are made and removed by the container runtime, such as " +
			"docker volume create.",
		Example: `  lariat volume list`,
		Args:    cobra.NoArgs,
		RunE:    help,
	}
	c.AddCommand(a.volumeList())
	return c
}

func writeVolumes(w *writer, list []metadata.Volume) {
	var rows [][]cell
	for _, v := range list {
		since := ""
		if !v.Created.IsZero() {
			since = v.Created.Local().Format(time.DateTime)
		}
		rows = append(rows, []cell{txt(v.Name), txt(v.Driver), txt(v.Scope), txt(v.Host), txt(v.State), num(v.Users),
			txt(since)})
	}
	w.columns([]string{"VOLUME", "DRIVER", "SCOPE", "HOST", "STATE", "USERS", "SINCE"}, rows)
}

func (a *app) volumeList() *cobra.Command {
	var driver, host string
	c := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List volumes, once for each host that has one",
		Example: `  lariat volume list
  lariat volume list --driver lariat-nfs --output table`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			list, err := a.client().Volumes(ctx, false)
			if err != nil {
				return err
			}
			if host != "" {
				view, err := a.client().View(ctx)
				if err != nil {
					return err
				}
				if _, err := findHost(view, host); err != nil {
					return err
				}
			}
			list = slices.DeleteFunc(list, func(v metadata.Volume) bool {
				return driver != "" && v.Driver != driver || host != "" && v.Host != host
			})
			return a.print(list, func(w *writer) { writeVolumes(w, list) })
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	c.Flags().StringVar(&driver, "driver", "", "only of driver `NAME`")
	c.Flags().StringVar(&host, "host", "", "only of host `NAME`")
	_ = c.RegisterFlagCompletionFunc("driver", cobra.NoFileCompletions)
	_ = c.RegisterFlagCompletionFunc("host", a.completeFlag(hostNames))
	return c
}
