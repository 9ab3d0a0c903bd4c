"""`make bench-scale` on few entities: every figure that is promised, from the product's own verbs on a real Redis."""

import pytest

from benchmarks import scale


@pytest.mark.services
def test_every_figure_is_measured() -> None:
    found = scale.measure([200, 600], ray=False)
    for name in ("seconds", "peak_mib", "redis_mib", "verbs", "parts"):
        assert set(found[name]) == {"200", "600"}, name
    verbs = found["verbs"]["600"]
    assert set(verbs) == {"recent", "plan", "fill", "cut_over", "adapt_day", "publish_day"}
    assert all(verb["cpu_s"] > 0 for verb in verbs.values())
    # Two processes run a fill: what they held is added up.
    assert found["peak_mib"]["600"] == verbs["fill"]["peak_mib"] > 1.5 * verbs["cut_over"]["peak_mib"]
    assert found["parts"]["600"]["fill"]["gate"] < found["parts"]["600"]["fill"]["adapt_and_gate"]
    assert 0.0 < found["daily_share"] < 1.0
    assert found["exponent"] < 1.0, "what a process costs before its first entity rules at this size"
