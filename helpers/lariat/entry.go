package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/lariat-net/lariat/pkg/metadata"
)

func (a *app) entry() *cobra.Command {
	c := &cobra.Command{
		Use:   "entry",
		Short: "Remove entries of the store that cannot be used",
		Long: "An entry of the store that is damaged, or contradicts others, is left out by every host. lariat " +
			"status names it.",
		Example: `  lariat entry remove blocks/overlay/0.0.0.0/0`,
		Args:    cobra.NoArgs,
		RunE:    help,
	}
	c.AddCommand(a.entryRemove())
	return c
}

func (a *app) entryRemove() *cobra.Command {
	return &cobra.Command{
		Use:     "remove KEY",
		Aliases: []string{"rm"},
		Short:   "Remove an entry that cannot be used",
		Long: `Removes an entry from the store that lariat status names as left out. The key is as it stands there.
An entry with which nothing is wrong is refused; networks and hosts have their own commands.

An address table (addresses/...) holds which addresses are in use. Removing it makes all of them free. Stop
the containers that have an address in it first.`,
		Example: `  lariat entry remove blocks/overlay/0.0.0.0/0`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, cancel := a.bounded(c)
			defer cancel()
			if err := a.client().RemoveEntry(ctx, args[0]); err != nil {
				return err
			}
			p := metadata.Problem{Key: args[0]}
			return a.print(p, func(w *writer) { w.line("entry %s removed", p.Name()) })
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			var out []cobra.Completion
			if len(args) == 0 {
				list, _ := a.client().Problems(ctx)
				for _, p := range list {
					out = append(out, cobra.CompletionWithDesc(p.Name(), p.What))
				}
			}
			return out, cobra.ShellCompDirectiveNoFileComp
		},
	}
}
