package metadata

import (
	"slices"
	"strings"
)

// Labels that identify a container. They are public.
const (
	LabelStack         = "lariat.stack"
	LabelService       = "lariat.service"
	LabelRancherStack  = "io.rancher.stack.name"
	LabelRancherMember = "io.rancher.stack_service.name" // stack/service

	LabelPodNamespace   = "io.kubernetes.pod.namespace"
	LabelPodName        = "io.kubernetes.pod.name"
	LabelPodUID         = "io.kubernetes.pod.uid"
	LabelNomadJob       = "nomad.job"
	LabelNomadGroup     = "nomad.group"
	LabelNomadNamespace = "nomad.namespace"
	LabelNomadRegion    = "nomad.region"
	LabelNomadAlloc     = "nomad.alloc"
)

var publicLabels = []string{LabelStack, LabelService, LabelRancherStack, LabelRancherMember,
	LabelPodNamespace, LabelPodName, LabelPodUID, LabelNomadJob, LabelNomadGroup, LabelNomadNamespace,
	LabelNomadRegion, LabelNomadAlloc}

// PublicLabels returns the labels of all that are public: those that identify a container, and
// those that more names. A name that ends in an asterisk matches all labels with that prefix. Any
// other label may hold a secret: a pod's annotations often do.
func PublicLabels(all map[string]string, more []string) map[string]string {
	out := map[string]string{}
	for k, v := range all {
		if slices.Contains(publicLabels, k) || slices.ContainsFunc(more, func(name string) bool {
			prefix, open := strings.CutSuffix(name, "*")
			return k == name || open && strings.HasPrefix(k, prefix)
		}) {
			out[k] = v
		}
	}
	return out
}
