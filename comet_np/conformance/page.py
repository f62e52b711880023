"""The report of `conform` as one HTML page, which needs nothing beside it."""

from collections import Counter
from collections.abc import Iterable
from html import escape
from itertools import groupby

from .. import __version__
from .conform import (
    SHOWN,
    STATUSES,
    Report,
    Result,
    by_model,
    catches,
    cell,
    groups,
    many,
    place,
    suspects,
)
from .vectors.files import LEVELS

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --text: #1d1f21; --dim: #62676c;
  --line: #dddcd6; --good: #1c7c4a; --good-tint: #e3f3ea; --bad: #b3261e; --bad-tint: #fbe7e4;
  --warn: #8a5a00; --warn-tint: #faf0d7; --idle-tint: #eeeeea; }
@media (prefers-color-scheme: dark) { :root { --page: #141618; --card: #1d2023; --text: #e7e7e3;
  --dim: #9aa0a6; --line: #34383c; --good: #6fd39c; --good-tint: #17332483; --bad: #ff8a80;
  --bad-tint: #45201d99; --warn: #f0c060; --warn-tint: #3d300f99; --idle-tint: #272b2e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .8rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
h3.group { margin: 1.6rem 0 .5rem; }
p { margin: .4rem 0; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .88em; }
code { overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--idle-tint); padding: .8rem; border-radius: 6px; }
.dim { color: var(--dim); }
.verdict { border-left: 6px solid var(--good); padding-left: 1rem; }
.verdict.bad { border-color: var(--bad); }
.counts { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; margin: 1.2rem 0 0;
  list-style: none; }
.counts li { border-radius: 99px; padding: .15rem .8rem; font-size: .9rem;
  background: var(--idle-tint); white-space: nowrap; }
.counts b { font-variant-numeric: tabular-nums; }
.passed { color: var(--good); } .failed, .unexpected-pass { color: var(--bad); }
.expected-failure { color: var(--warn); } .unsupported { color: var(--dim); }
.counts .passed { background: var(--good-tint); } .counts .expected-failure {
  background: var(--warn-tint); }
.counts .failed, .counts .unexpected-pass { background: var(--bad-tint); }
article, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem 1.1rem; margin: 0 0 .8rem; }
article { border-left: 4px solid var(--bad); }
article header { display: flex; flex-wrap: wrap; gap: .2rem .7rem; align-items: baseline; }
.level { font-size: .8rem; padding: .05rem .55rem; border-radius: 99px; color: var(--bad);
  background: var(--bad-tint); white-space: nowrap; }
.reason { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: center; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-size: .92rem; }
th { font-weight: 600; color: var(--dim); font-size: .82rem; }
th[scope=row] { text-align: left; color: var(--text); font-size: .92rem; }
tr:last-child > * { border-bottom: 0; }
td.good { background: var(--good-tint); color: var(--good); }
td.bad { background: var(--bad-tint); color: var(--bad); font-weight: 600; }
td.idle { color: var(--dim); }
.arrays td, .arrays th { text-align: right; padding: .2rem .6rem; }
.arrays td:first-child, .arrays th:first-child { text-align: left; }
details { margin: .5rem 0 0; }
summary { cursor: pointer; color: var(--dim); }
.card > details { margin: 0; }
dl { margin: .4rem 0 0; } dt { margin-top: .5rem; } dd { margin: 0 0 0 1rem; color: var(--dim); }
ul.names { margin: .4rem 0 0; padding-left: 1.2rem; }
@media (max-width: 34rem) { main { padding-top: 1.2rem; } article, .card { padding: .7rem .8rem; }
  th, td { padding: .35rem .3rem; font-size: .78rem; } th { font-size: .68rem; }
  th[scope=row] { font-size: .78rem; } td { white-space: normal; } }
"""


def page(report: Report) -> str:
    """Return the report as the text of an HTML page."""
    counts = Counter(result.status for result in report.results)
    bad = len(report.bad)
    title = (f"{bad} of {many(len(report.results), 'check')} differ{'s' * (bad == 1)}" if bad else
             "Conforms" if report.ok else "Nothing was compared")
    name = report.adapter or "the adapter"
    chips = "".join(f'<li class="{status}"><b>{counts[status]}</b> {_words(status)}</li>'
                    for status in STATUSES if counts[status])
    undecided = (f"<p class=dim>{many(report.undecided, 'row')} left out, whose masks hang on "
                 "rounding.</p>" if report.undecided else "")
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(f"{name}: {title.lower()}")}</title>
<style>{STYLE}</style>
<main>
<div class="verdict{' bad' * (not report.ok)}">
<h1>{title}</h1>
<p><code>{escape(name)}</code>, {many(report.cases, "case")} run, of {escape(report.source)}</p>
</div>
<ul class="counts">{chips}</ul>
{undecided}
{_failures(report)}
<h2>By model and level</h2>
{_table(report)}
<h2>All checks</h2>
{_folded(report, "expected-failure")}
{_folded(report, "unsupported")}
{_folded(report, "passed")}
<p class="dim">COMET-NP {escape(__version__)}. A level is passed if all arrays of it that were \
returned agree within the tolerance of the case; masks must be equal bit for bit.</p>
</main>
</html>
"""


def _words(status: str) -> str:
    return status.replace("-", " ")


def _failures(report: Report) -> str:
    """Return the failures, those of one model and level together, the first of them unfolded."""
    if not report.bad:
        return ""
    parts = ["<h2>What differs</h2>"]
    for (level, model), group in groups(report.bad).items():
        cards = list(map(_failure, group))
        caught = ", ".join(f"<code>{escape(flag)}</code>"
                           for flag in suspects(report, level, model))
        where = escape(place(level, model))
        parts += [f"<h3 class=group>{where}: {many(len(cards), 'case')}</h3>",
                  f"<p class=dim>These cases, and no others, catch: {caught}</p>" * bool(caught),
                  *cards[:SHOWN]]
        if rest := cards[SHOWN:]:
            parts.append(f"<details class=card><summary>{len(rest)} more of {where}"
                         f"</summary>{''.join(rest)}</details>")
    return "\n".join(parts)


def _failure(result: Result) -> str:
    caught = "".join(f"<dt><code>{escape(flag)}</code></dt><dd>{escape(sentence)}</dd>"
                     for flag, sentence in catches(result).items())
    equation = (f", eq. {escape(result.equation)}" if result.equation.startswith("(") else "")
    return "".join([
        f'<article id="{escape(result.case)}-{escape(result.level)}"><header>'
        f"<h3><code>{escape(result.case)}</code></h3>"
        f'<span class="level">{escape(result.level)}</span></header>',
        f"<p class=dim>{escape(result.title)}{equation}</p>",
        f'<p class="reason">{_emphasised(result)}</p>',
        _details("Arrays, in the order of computation", _arrays(result)),
        _details("This case catches", f"<dl>{caught}</dl>" if caught else ""),
        _details("Traceback", f"<pre>{escape(result.trace)}</pre>" if result.trace else ""),
        "</article>"])


def _emphasised(result: Result) -> str:
    """Return the reason, the name of the first array that differs in bold."""
    if result.array:
        rest = result.reason.removeprefix(result.array)
        return f"<b><code>{escape(result.array)}</code></b>{escape(rest)}"
    return escape(result.reason)


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>" if content else ""


def _arrays(result: Result) -> str:
    if not result.compared:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(one.name)}</code></td><td>{one.largest:.2g}</td>"
        f"<td>{one.allowed:.2g}</td>"
        f"<td class={'failed' if one.wrong else 'passed'}>{'differs' if one.wrong else 'agrees'}"
        "</td></tr>" for one in result.compared)
    return ("<div class=scroll><table class=arrays><tr><th>array</th><th>largest difference</th>"
            f"<th>allowed</th><th></th></tr>{rows}</table></div>")


def _table(report: Report) -> str:
    found = by_model(report.results)
    levels = [level for level in LEVELS if any(level in row for row in found.values())]
    head = "".join(f"<th scope=col>{level}</th>" for level in levels)
    body = "".join(f"<tr><th scope=row>{escape(model)}</th>"
                   + "".join(_cell(row.get(level)) for level in levels) + "</tr>"
                   for model, row in found.items())
    more = "; +n?: so many more are unsupported" * ("?</td>" in body)
    return (f'<div class="card scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'
            f"<p class=dim>Checks that agree, of those run{more}.</p>")


def _cell(counts: Counter[str] | None) -> str:
    if not counts:
        return "<td class=idle>·</td>"
    kind = ("bad" if counts["failed"] or counts["unexpected-pass"] else
            "good" if counts["passed"] else "idle")
    if set(counts) == {"unsupported"}:
        return "<td class=idle>unsup\u00adported</td>"
    return f"<td class={kind}>{cell(counts)}</td>"


def _folded(report: Report, status: str) -> str:
    """Return the results of one status, folded, a list a model."""
    found = [result for result in report.results if result.status == status]
    if not found:
        return ""
    inner = "".join(
        f"<p><b>{escape(model)}</b></p><ul class=names>{_lines(group)}</ul>"
        for model, group in groupby(sorted(found, key=lambda one: one.model),
                                    key=lambda one: one.model))
    return (f"<div class=card><details><summary><b class={status}>{len(found)}</b> "
            f"{_words(status)}</summary>{inner}</details></div>")


def _lines(results: Iterable[Result]) -> str:
    """Return a line for each case and reason, with the levels that share it."""
    levels: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        levels.setdefault((result.case, result.title, result.reason), []).append(result.level)
    return "".join(f"<li><code>{escape(case)}</code> {', '.join(of)} "
                   f"<span class=dim>{escape(reason or title)}</span></li>"
                   for (case, title, reason), of in levels.items())
