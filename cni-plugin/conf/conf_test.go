package conf_test

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/raceway-mesh/raceway/cni-plugin/conf"
)

var (
	ours     = conf.Entry{StateDir: "/var/lib/raceway/cni", Socket: "/run/raceway/cni.sock", Namespace: "raceway-system"}
	oursText = `{"type":"raceway-cni","stateDir":"/var/lib/raceway/cni","socket":"/run/raceway/cni.sock","namespace":"raceway-system"}`
)

// flannel is laid out as its authors do, with fields that nobody here knows.
const flannel = `{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "x-vendor": {"plugins": [1, 2]},
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {"portMappings": true}
    }
  ],
  "disableCheck": true
}
`

func TestInsertChangesNothingElse(t *testing.T) {
	for name, test := range map[string]struct{ in, want string }{
		"laid out": {flannel, strings.Replace(flannel, "{\"portMappings\": true}\n    }", "{\"portMappings\": true}\n    },\n    "+oursText, 1)},
		"one line": {
			`{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"a"}]}`,
			`{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"a"},` + oursText + `]}`,
		},
		"several versions": {
			`{"cniVersions":["0.4.0","1.1.0"],"name":"n","plugins":[ {"type":"a"} ],"cniVersion":"1.0.0"}`,
			`{"cniVersions":["0.4.0","1.1.0"],"name":"n","plugins":[ {"type":"a"}, ` + oursText + ` ],"cniVersion":"1.0.0"}`,
		},
		"plugins twice: the last counts": {
			`{"plugins":[{"type":"x"}],"name":"n","plugins":[{"type":"a"}]}`,
			`{"plugins":[{"type":"x"}],"name":"n","plugins":[{"type":"a"},` + oursText + `]}`,
		},
		"there already": {
			`{"name":"n","plugins":[{"type":"a"}, ` + oursText + `,{"type":"late"}]}`,
			`{"name":"n","plugins":[{"type":"a"}, ` + oursText + `,{"type":"late"}]}`,
		},
		"another socket is replaced": {
			`{"name":"n","plugins":[{"type":"a"},{"type":"raceway-cni","socket":"/old"}]}`,
			`{"name":"n","plugins":[{"type":"a"},` + oursText + `]}`,
		},
		"twice": {
			`{"name":"n","plugins":[` + oursText + `,{"type":"a"},` + oursText + `]}`,
			`{"name":"n","plugins":[{"type":"a"},` + oursText + `]}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := conf.Insert([]byte(test.in), ours)
			if err != nil || string(got) != test.want {
				t.Fatalf("Insert = %s, %v; want %s", got, err, test.want)
			}
			if again, err := conf.Insert(got, ours); err != nil || !bytes.Equal(again, got) {
				t.Errorf("Insert again = %s, %v", again, err)
			}
			list, err := libcni.NetworkConfFromBytes(got)
			if err != nil || list.Name == "" {
				t.Errorf("libcni reads %v, %v", list, err)
			}
		})
	}
}

func TestRemoveIsTheInverse(t *testing.T) {
	for _, text := range []string{
		flannel,
		`{"name":"n","plugins":[{"type":"a"}]}`,
		"{\"name\":\"n\",\r\n\t\"plugins\":\t[\r\n\t{\"type\":\"a\"}\r\n]\t}\r\n\r\n",
		`{"name":"ünïcode \u0000 <&>","plugins":[{"type":"a"} , {"type":"b"}  ]}`,
	} {
		in, err := conf.Insert([]byte(text), ours)
		if err != nil {
			t.Fatal(err)
		}
		if out, found, err := conf.Remove(in); err != nil || !found || string(out) != text {
			t.Errorf("Remove = %q, %v, %v; want %q", out, found, err, text)
		}
	}
}

func TestRemoveTakesTheEntryFromAnywhere(t *testing.T) {
	const first = `{"plugins":[{"type":"raceway-cni"}, {"type":"a"}]}`
	for in, want := range map[string]string{
		first: `{"plugins":[{"type":"a"}]}`,
		`{"plugins":[{"type":"a"}, {"type":"raceway-cni"}, {"type":"b"}]}`: `{"plugins":[{"type":"a"}, {"type":"b"}]}`,
		`{"plugins":[ {"type":"raceway-cni"} ]}`:                           `{"plugins":[ ]}`,
		`{"plugins":[{"type":"a"}]}`:                                       `{"plugins":[{"type":"a"}]}`,
	} {
		got, found, err := conf.Remove([]byte(in))
		if err != nil || string(got) != want || found != strings.Contains(in, "raceway") {
			t.Errorf("Remove(%s) = %s, %v, %v; want %s", in, got, found, err, want)
		}
	}
}

func TestWhatIsNoListIsRefusedWithAReason(t *testing.T) {
	for in, says := range map[string]string{
		``:                          "not the JSON",
		`{`:                         "not the JSON",
		`{"plugins":[]} trailing`:   "not the JSON",
		`[]`:                        "not the JSON",
		`null`:                      "plugins",
		`{"name":"n"}`:              `no field "plugins"`,
		`{"plugins":null}`:          "not a list",
		`{"plugins":{}}`:            "not a list",
		`{"plugins":[1]}`:           "plugin 0 is not a JSON object",
		`{"plugins":[]}`:            "no plugin for Raceway's to follow",
		`{"plugins":[` + "" + `{}]`: "not the JSON",
		`{"plugins":[` + `{"type":"raceway-cni","socket":1}]}`: "read the entry",
	} {
		if got, err := conf.Insert([]byte(in), ours); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("Insert(%s) = %s, %v; want %q", in, got, err, says)
		}
	}
}

func TestWrapIsWhatTheRuntimeMakesOfIt(t *testing.T) {
	const single = "{\n\t\"cniVersion\": \"0.4.0\",\n\t\"name\": \"a <b>\",\n\t\"type\": \"bridge\",\n\t\"x\": {\"y\": [1.0, 2]}\n}\n"
	wrapped, err := conf.Wrap([]byte(single))
	if err != nil {
		t.Fatal(err)
	}
	got, err := libcni.NetworkConfFromBytes(wrapped)
	if err != nil {
		t.Fatal(err)
	}
	one, err := libcni.NetworkPluginConfFromBytes([]byte(single))
	if err != nil {
		t.Fatal(err)
	}
	want, err := libcni.ConfListFromConf(one) //nolint:staticcheck // deprecated, and what the runtimes call
	if err != nil {
		t.Fatal(err)
	}
	var a, b any
	if err := json.Unmarshal(got.Bytes, &a); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(want.Bytes, &b); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("wrapped %s, the runtime makes %s", got.Bytes, want.Bytes)
	}
	for in, says := range map[string]string{
		`{"plugins":[]}`: "must end in .conflist",
		`{"name":"n"}`:   "no type",
		`x`:              "not the JSON",
	} {
		if _, err := conf.Wrap([]byte(in)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("Wrap(%s) = %v, want %q", in, err, says)
		}
	}
}

func FuzzEdit(f *testing.F) {
	for _, seed := range []string{
		flannel, `{"plugins":[{"type":"a"}]}`, `{"plugins":[{"type":"raceway-cni"},{"type":"a"}],"plugins":[{"type":"b"}]}`,
		`{"plugins":[1]}`, `{"plugins":null}`, `{"PLUGINS":[{}]}`, `{"plugins":[{"type":"raceway-cni","type":"a"}]}`, "{\"plugins\":[{}\n,{}]}",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		before := bytes.Clone(text)
		bare, had, err := conf.Remove(text)
		if !bytes.Equal(text, before) {
			t.Fatal("Remove changed its input")
		}
		if err != nil {
			return
		}
		if !had && !bytes.Equal(bare, text) {
			t.Fatalf("Remove made %q of %q, which has no entry", bare, text)
		}
		in, err := conf.Insert(bare, ours)
		if err != nil {
			return // no plugins
		}
		if !bytes.Equal(text, before) {
			t.Fatal("Insert changed its input")
		}
		if found, err := conf.Find(in); err != nil || len(found) != 1 || found[0] != ours {
			t.Fatalf("Find in %q = %v, %v", in, found, err)
		}
		if out, found, err := conf.Remove(in); err != nil || !found || !bytes.Equal(out, bare) {
			t.Fatalf("Remove(Insert(%q)) = %q, %v, %v", bare, out, found, err)
		}
		rest := func(text []byte) (whole map[string]any) {
			if err := json.Unmarshal(text, &whole); err != nil {
				t.Fatal(err)
			}
			delete(whole, "plugins")
			return whole
		}
		if a, b := rest(text), rest(in); !reflect.DeepEqual(a, b) {
			t.Fatalf("the rest was %v and is %v", a, b)
		}
	})
}
