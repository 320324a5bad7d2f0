package demo

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLongTablesKeepTheirColumns(t *testing.T) {
	for _, test := range []struct{ name, text, want string }{
		{"what fits stays as it is", "NAME    NODE\nweb     n1   ", "NAME    NODE\nweb     n1   "},
		{"columns go below their row", "NODE   FROM     TO       SENT   IDENTITY\nn1     shop/a   shop/b      3   cluster.local/a/b/c\nn2     shop/a   shop/b   1000   -", `
NODE   FROM     TO       SENT
    IDENTITY
n1     shop/a   shop/b      3
    cluster.local/a/b/c
n2     shop/a   shop/b   1000
    -`},
		{"prose is wrapped in its column", "STEP     DETAIL\npolicy   nobody has allowed this connection, so it is denied\nroute    tunnel", `
STEP     DETAIL
policy   nobody has allowed this
         connection, so it is denied
route    tunnel`},
		{"what is around a table is left alone", "shop/a to shop/b: tunnel\n\nSTEP      RESULT\ncapture   captured\n\nNext: raceway check", `
shop/a to shop/b: tunnel

STEP      RESULT
capture   captured

Next: raceway check`},
		{"a metric breaks behind a comma", `some_total{one="1234567890",two="1234567890",three="1234567890"} 25`, `
some_total{one="1234567890",
    two="1234567890",three="1234567890"}
    25`},
		{"a line without a place to break is broken all the same", strings.Repeat("x", 50), "\n" + strings.Repeat("x", 40) + "\n    " + strings.Repeat("x", 10)},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := strings.Join(fold(test.text, 40), "\n")
			if want := strings.TrimPrefix(test.want, "\n"); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

func FuzzFoldKeepsEveryWord(f *testing.F) {
	f.Add("NAME   IDENTITY\nweb    spiffe://x", 30)
	f.Add("a b c", 60)
	f.Add("A   \n\n \n   B   C", 80)
	f.Fuzz(func(t *testing.T, text string, width int) {
		if width < minWidth || width > pageWidth || !utf8.ValidString(text) || strings.ContainsAny(text, "\r\t\v\f\u0085\u00a0") {
			return
		}
		letters := func(s string) string { return strings.Join(strings.Fields(s), "") }
		got := letters(strings.Join(fold(text, width), "\n"))
		for _, r := range letters(text) {
			if strings.Count(got, string(r)) != strings.Count(letters(text), string(r)) {
				t.Fatalf("%q became %q", text, fold(text, width))
			}
		}
	})
}

func TestNothingIsWiderThanThePage(t *testing.T) {
	var out strings.Builder
	p := newPage(&out, false, 0)
	words := strings.Repeat("some words to be wrapped ", 20)
	p.heading("1/7  A title")
	p.say("%s", words)
	p.good("%s", words)
	p.command("raceway why", "STEP   DETAIL\none    "+words)
	for line := range strings.Lines(out.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > pageWidth {
			t.Errorf("%d characters: %s", n, line)
		}
		if strings.TrimRight(line, " \n")+"\n" != line {
			t.Errorf("blanks at the end of %q", line)
		}
	}
	if strings.Contains(out.String(), "\n\n\n") || strings.Contains(out.String(), "\x1b") {
		t.Errorf("two blank lines, or colours for nobody:\n%q", out.String())
	}
}

func TestColourIsForMarksAndNotForText(t *testing.T) {
	var out strings.Builder
	newPage(&out, true, 80).good("fine")
	if want := styleGood + "  ✓ " + styleReset + "fine\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}

type brokenPipe struct{ writes int }

func (b *brokenPipe) Write([]byte) (int, error) {
	b.writes++
	return 0, errors.New("broken pipe")
}

func TestTheFirstErrorOfWritingEndsIt(t *testing.T) {
	out := new(brokenPipe)
	p := newPage(out, false, 0)
	p.say("one")
	p.say("two")
	if p.err == nil || out.writes != 1 {
		t.Errorf("%d writes, %v", out.writes, p.err)
	}
}
