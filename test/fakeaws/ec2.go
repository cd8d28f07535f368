package fakeaws

import (
	"encoding/xml"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// ec2Actions lists the actions of EC2's endpoint. The functions run with the lock held and return
// the content of <ActionResponse>.
var ec2Actions = map[string]func(*Cloud, *params) (any, *apiError){
	"CreateVolume":                 (*Cloud).createVolume,
	"DeleteVolume":                 (*Cloud).deleteVolume,
	"DescribeVolumes":              (*Cloud).describeVolumes,
	"AttachVolume":                 (*Cloud).attachVolume,
	"DetachVolume":                 (*Cloud).detachVolume,
	"ModifyVolume":                 (*Cloud).modifyVolume,
	"DescribeVolumesModifications": (*Cloud).describeVolumesModifications,
	"CreateTags":                   (*Cloud).createTags,
	"DeleteTags":                   (*Cloud).deleteTags,
	"DescribeSnapshots":            (*Cloud).describeSnapshots,
	"DescribeInstances":            (*Cloud).describeInstances,
	"DescribeInstanceTypes":        (*Cloud).describeInstanceTypes,
	"DescribeSubnets":              (*Cloud).describeSubnets,
	"DescribeSecurityGroups":       (*Cloud).describeSecurityGroups,
	"DescribeAvailabilityZones":    (*Cloud).describeAvailabilityZones,
}

// serveEC2 speaks the Query protocol: a form in, XML out.
func (c *Cloud) serveEC2(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p := &params{form: form, known: map[string]bool{"Action": true, "Version": true, "DryRun": true}}
	action := form.Get("Action")
	c.serve(w, r, call{service: "ec2", action: action, body: body, refuse: refuseEC2, work: func() (answer, *apiError) {
		do := ec2Actions[action]
		if do == nil {
			return answer{}, fail("InvalidAction", "The action %s is not valid for this web service.", action)
		}
		if form.Get("DryRun") == "true" {
			return answer{}, fail("DryRunOperation", "Request would have succeeded, but DryRun flag is set.")
		}
		out, e := do(c, p)
		if e == nil {
			e = p.unknown()
		}
		if e != nil {
			return answer{}, e
		}
		return inXML(http.StatusOK, action+"Response", out), nil
	}})
}

func inXML(status int, name string, v any) answer {
	var b strings.Builder
	b.WriteString(xml.Header)
	if err := xml.NewEncoder(&b).EncodeElement(v, xml.StartElement{Name: xml.Name{Local: name}}); err != nil {
		panic(err) // a type of this package that has no form in XML
	}
	return answer{status: status, contentType: "text/xml;charset=UTF-8", body: []byte(b.String())}
}

func refuseEC2(e *apiError) answer {
	return inXML(e.status(), "Response", struct {
		Code      string `xml:"Errors>Error>Code"`
		Message   string `xml:"Errors>Error>Message"`
		RequestID string
	}{e.Code, e.Message, newToken()})
}

// list is EC2's form of a list.
type list[T any] struct {
	Items []T `xml:"item"`
}

type done struct {
	Return bool `xml:"return"`
}

// params holds the parameters of a request. A parameter that no action reads is an error.
type params struct {
	form  url.Values
	known map[string]bool
}

func (p *params) unknown() *apiError {
	for key := range p.form {
		if !p.known[key] {
			return fail("UnknownParameter", "The emulator does not know the parameter %s=%q, or not this value of it.", key,
				p.form.Get(key))
		}
	}
	return nil
}

func (p *params) has(key string) bool { return p.form.Has(key) }

func (p *params) text(key string) string {
	p.known[key] = true
	return p.form.Get(key)
}

func (p *params) number(key string) int {
	n, err := strconv.Atoi(p.form.Get(key))
	p.known[key] = err == nil
	return n
}

func (p *params) yes(key string) bool {
	v, err := strconv.ParseBool(p.form.Get(key))
	p.known[key] = err == nil
	return v
}

// each yields the prefixes of the request's list entries: VolumeId.1, VolumeId.2.
func (p *params) each(name string, yield func(prefix string)) {
	for i := 1; ; i++ {
		prefix := name + "." + strconv.Itoa(i)
		if !slices.ContainsFunc(slices.Collect(maps.Keys(p.form)), func(key string) bool {
			return key == prefix ||
				strings.HasPrefix(key, prefix+".")
		}) {
			return
		}
		yield(prefix)
	}
}

func (p *params) texts(name string) (all []string) {
	p.each(name, func(key string) { all = append(all, p.text(key)) })
	return all
}

func (p *params) tags(name string) map[string]string {
	tags := map[string]string{}
	p.each(name, func(at string) { tags[p.text(at+".Key")] = p.text(at + ".Value") })
	return tags
}

// filter is a condition: one of the values, which may contain * and ?.
type filter struct {
	name   string
	values []string
}

func (p *params) filters() (all []filter) {
	p.each("Filter", func(at string) { all = append(all, filter{p.text(at + ".Name"), p.texts(at + ".Value")}) })
	return all
}

// fields holds the fields by which an object can be filtered.
type fields map[string][]string

// withTags adds the fields that all objects with tags have.
func (f fields) withTags(tags map[string]string) fields {
	f["tag-key"] = slices.Collect(maps.Keys(tags))
	for k, v := range tags {
		f["tag:"+k] = []string{v}
	}
	return f
}

func (f fields) match(filters []filter) (bool, *apiError) {
	for _, want := range filters {
		have, ok := f[want.name]
		if !ok && !strings.HasPrefix(want.name, "tag:") {
			return false, fail("InvalidParameterValue", "The filter '%s' is invalid", want.name)
		}
		if !slices.ContainsFunc(want.values,
			func(pattern string) bool { return slices.ContainsFunc(have, wildcard(pattern)) }) {
			return false, nil
		}
	}
	return true, nil
}

func wildcard(pattern string) func(string) bool {
	text := strings.NewReplacer(`\*`, ".*", `\?`, ".").Replace(regexp.QuoteMeta(pattern))
	return regexp.MustCompile("(?s)^" + text + "$").MatchString
}

// selection is the request of a Describe call: all objects, certain ids, matches of filters, or a
// page of them.
type selection struct {
	ids     []string
	filters []filter
	max     int
	from    int
}

// selection reads the parameters of a Describe call.
func (p *params) selection(idKey string) (s selection, e *apiError) {
	s = selection{ids: p.texts(idKey), filters: p.filters()}
	if p.has("MaxResults") {
		if s.max = p.number("MaxResults"); s.max < 5 {
			return s, fail("InvalidParameterValue", "Value ( %d ) for parameter maxResults is invalid. Expecting a value "+
				"greater than 5.", s.max)
		}
		if len(s.ids) > 0 {
			return s, fail("InvalidParameterCombination", "The parameter %s cannot be used with the parameter maxResults", idKey)
		}
	}
	if token := p.text("NextToken"); token != "" {
		from, err := strconv.Atoi(strings.TrimPrefix(token, "from-"))
		if err != nil {
			return s, fail("InvalidParameterValue", "Unable to parse pagination token")
		}
		s.from = from
	}
	return s, nil
}

// choose returns the objects of a selection. describe returns the fields of an object, or nil if it
// is not visible. notFound is the error code for an id without a visible object.
func choose[T any](s selection, notFound string, all []T, describe func(T) fields,
	idField string) (page []T, next string, e *apiError) {
	var found []string
	var chosen []T
	for _, thing := range all {
		f := describe(thing)
		if f == nil || len(s.ids) > 0 && !slices.Contains(s.ids, f[idField][0]) {
			continue
		}
		found = append(found, f[idField][0])
		ok, e := f.match(s.filters)
		if e != nil {
			return nil, "", e
		}
		if ok {
			chosen = append(chosen, thing)
		}
	}
	for _, id := range s.ids {
		if !slices.Contains(found, id) {
			return nil, "", fail(notFound, "The %s '%s' does not exist.", strings.ReplaceAll(idField, "-id", ""), id)
		}
	}
	chosen = chosen[min(s.from, len(chosen)):]
	if s.max > 0 && len(chosen) > s.max {
		return chosen[:s.max], "from-" + strconv.Itoa(s.from+s.max), nil
	}
	return chosen, "", nil
}

// listing describes the parameters and the output of one kind of objects.
type listing[T, X any] struct {
	parameter string // the parameter with ids
	field     string // the filters' name of the id
	notFound  string
	set       string // the element around all objects
	fields    func(T) fields
	inXML     func(T) X
}

// describe answers a Describe call.
func describe[T, X any](p *params, l listing[T, X], all []T) (any, *apiError) {
	s, e := p.selection(l.parameter)
	if e != nil {
		return nil, e
	}
	page, next, e := choose(s, l.notFound, all, l.fields, l.field)
	if e != nil {
		return nil, e
	}
	var out struct {
		Set struct {
			XMLName xml.Name
			Items   []X `xml:"item"`
		}
		NextToken string `xml:"nextToken,omitempty"`
	}
	out.Set.XMLName.Local, out.NextToken = l.set, next
	for _, thing := range page {
		out.Set.Items = append(out.Set.Items, l.inXML(thing))
	}
	return out, nil
}
