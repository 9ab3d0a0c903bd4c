"""Gate results as one HTML page that needs nothing else: no style sheet or script from elsewhere (GX's own data docs do)."""

from collections.abc import Sequence

from limaml.events.expectations import GateResult

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td.code { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere }
.failed { color: #b00020; font-weight: 600 } .warning { color: #8a5a00; font-weight: 600 } .passed { color: #1b6b34 }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ note }}</p>
{% for result in results %}
<h2>{{ result.what }}: <span class="{{ 'passed' if result.success else 'failed' }}">
{{ 'passed' if result.success else 'failed' }}</span>, {{ result.rows }} rows</h2>
<table><tr><th>Expectation</th><th>Outcome</th><th>Rule</th><th>Rows</th><th>Examples</th></tr>
{% for f in result.findings if full or not f.success %}
{% set outcome = 'passed' if f.success else ('failed' if f.critical else 'warning') %}
<tr><td class="code">{{ f.expectation }}</td><td class="{{ outcome }}">{{ outcome }}</td><td class="code">{{ f.rule }}</td>
<td>{{ f.unexpected or '' }}</td><td class="code">{{ f.examples | join(', ') }}</td></tr>
{% endfor %}</table>
{% endfor %}
</body></html>
"""


def report_html(title: str, note: str, results: Sequence[GateResult], *, full: bool = True) -> str:
    """One page for one or more gates; with `full` every expectation is listed, without it only those that were not met."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    return template.render(title=title, note=note, results=results, full=full)
