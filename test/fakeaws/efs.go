package fakeaws

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// efsState is the state of EFS.
type efsState struct {
	fileSystems  []*fileSystem
	mountTargets []*mountTarget
	accessPoints []*accessPoint
	address      func(subnetID string) netip.Addr
}

type efsAction struct {
	name, pattern string
	do            func(*Cloud, *efsRequest) (any, *apiError)
}

// efsActions lists the actions of EFS's endpoint. The functions run with the lock held.
var efsActions = []efsAction{
	{"CreateFileSystem", "POST /2015-02-01/file-systems", (*Cloud).createFileSystem},
	{"DescribeFileSystems", "GET /2015-02-01/file-systems", (*Cloud).describeFileSystems},
	{"DeleteFileSystem", "DELETE /2015-02-01/file-systems/{id}", (*Cloud).deleteFileSystem},
	{"CreateMountTarget", "POST /2015-02-01/mount-targets", (*Cloud).createMountTarget},
	{"DescribeMountTargets", "GET /2015-02-01/mount-targets", (*Cloud).describeMountTargets},
	{"DeleteMountTarget", "DELETE /2015-02-01/mount-targets/{id}", (*Cloud).deleteMountTarget},
	{"DescribeMountTargetSecurityGroups", "GET /2015-02-01/mount-targets/{id}/security-groups",
		(*Cloud).describeMountTargetSecurityGroups},
	{"ModifyMountTargetSecurityGroups", "PUT /2015-02-01/mount-targets/{id}/security-groups",
		(*Cloud).modifyMountTargetSecurityGroups},
	{"CreateAccessPoint", "POST /2015-02-01/access-points", (*Cloud).createAccessPoint},
	{"DescribeAccessPoints", "GET /2015-02-01/access-points", (*Cloud).describeAccessPoints},
	{"DeleteAccessPoint", "DELETE /2015-02-01/access-points/{id}", (*Cloud).deleteAccessPoint},
	{"TagResource", "POST /2015-02-01/resource-tags/{id}", (*Cloud).tagResource},
	{"ListTagsForResource", "GET /2015-02-01/resource-tags/{id}", (*Cloud).listTagsForResource},
}

// efsRequest has the query in params, as EC2's requests have their form.
type efsRequest struct {
	params
	id   string // of the path
	body []byte
}

// serveEFS speaks REST with JSON.
func (c *Cloud) serveEFS(a efsAction) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return
		}
		req := &efsRequest{params{r.URL.Query(), map[string]bool{}}, bare(r.PathValue("id")), body}
		call := call{service: "elasticfilesystem", action: a.name, body: body, refuse: refuseEFS,
			work: func() (answer, *apiError) {
				out, e := a.do(c, req)
				if e == nil {
					e = req.unknown()
				}
				if e != nil {
					return answer{}, e
				}
				if out == nil {
					return answer{status: http.StatusNoContent}, nil
				}
				return inJSON(http.StatusOK, out), nil
			}}
		c.serve(w, r, call)
	}
}

// bare returns the id of an ARN or an id. EFS accepts both.
func bare(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

func inJSON(status int, v any) answer {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // a type of this package that has no form in JSON
	}
	return answer{status: status, contentType: "application/json", body: data}
}

func refuseEFS(e *apiError) answer {
	body := map[string]string{"ErrorCode": e.Code, "message": e.Message}
	for k, v := range e.More {
		body[k] = v
	}
	a := inJSON(e.status(), body)
	a.errorType = e.Code
	return a
}

// decode reads the body. Members that the emulator does not know are an error.
func (r *efsRequest) decode(to any) *apiError {
	d := json.NewDecoder(bytes.NewReader(r.body))
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil {
		return fail("BadRequest", "The emulator does not understand the request: %v", err)
	}
	return nil
}

// page returns the requested part of all, and the token for the next part. The default size is 100.
func page[T any](r *efsRequest, all []T, maxKey, tokenKey string) (part []T, next string, e *apiError) {
	size, from := 100, 0
	if r.has(maxKey) {
		size = r.number(maxKey)
	}
	if token := r.text(tokenKey); token != "" {
		var err error
		if from, err = strconv.Atoi(token); err != nil {
			return nil, "", fail("BadRequest", "%s %q is none of ours", tokenKey, token)
		}
	}
	if size < 1 {
		return nil, "", fail("BadRequest", "%s must be at least 1", maxKey)
	}
	part = all[min(from, len(all)):]
	if len(part) > size {
		return part[:size], strconv.Itoa(from + size), nil
	}
	return part, "", nil
}

// Tags is a list in JSON.
type Tags map[string]string

type tagJSON struct{ Key, Value string }

func (t Tags) list() []tagJSON {
	all := []tagJSON{}
	for _, tag := range tagsXML(t).Items {
		all = append(all, tagJSON(tag))
	}
	return all
}

// MarshalJSON encodes the tags as a list.
func (t Tags) MarshalJSON() ([]byte, error) { return json.Marshal(t.list()) }

// UnmarshalJSON decodes a list of tags.
func (t *Tags) UnmarshalJSON(data []byte) error {
	var all []tagJSON
	if err := json.Unmarshal(data, &all); err != nil {
		return err
	}
	*t = Tags{}
	for _, tag := range all {
		(*t)[tag.Key] = tag.Value
	}
	return nil
}

// tagged returns the tags of the object that a request's path names.
func (c *Cloud) tagged(r *efsRequest) (*Tags, *apiError) {
	if strings.HasPrefix(r.id, "fsap-") {
		p, e := c.accessPoint(r.id)
		if e != nil {
			return nil, e
		}
		return &p.Tags, nil
	}
	f, e := c.fileSystem(r.id)
	if e != nil {
		return nil, e
	}
	return &f.Tags, nil
}

func (c *Cloud) tagResource(r *efsRequest) (any, *apiError) {
	var in struct{ Tags Tags }
	if e := r.decode(&in); e != nil {
		return nil, e
	}
	tags, e := c.tagged(r)
	if e != nil {
		return nil, e
	}
	if *tags == nil {
		*tags = Tags{}
	}
	for k, v := range in.Tags {
		(*tags)[k] = v
	}
	return nil, nil
}

func (c *Cloud) listTagsForResource(r *efsRequest) (any, *apiError) {
	tags, e := c.tagged(r)
	if e != nil {
		return nil, e
	}
	part, next, e := page(r, tags.list(), "MaxResults", "NextToken")
	return struct {
		Tags      []tagJSON
		NextToken string `json:",omitempty"`
	}{part, next}, e
}

// find returns the object with an id unless it is deleted, visible or not.
func find[T any](all []T, id, notFound string, is func(T) (id string, life *progress)) (thing T, e *apiError) {
	i := slices.IndexFunc(all, func(t T) bool {
		have, life := is(t)
		return have == id && life.truth() != "deleted"
	})
	if i < 0 {
		return thing, fail(notFound, "'%s' does not exist.", id)
	}
	return all[i], nil
}

// remove begins an object's removal, unless the removal has begun.
func (c *Cloud) remove(life *progress) {
	if life.truth() != "deleting" {
		*life = c.begin("deleting", "deleted")
	}
}
