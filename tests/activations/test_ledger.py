"""The ledger: floors, multiples of errors, and the share of the bound that audits allow."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.activations.forms.rules import Rule, rule_of
from foveate.activations.measure.ledger import AuditHistory, Ledger, _student


def _ledger(rule: Rule) -> tuple[Ledger, tuple[float, ...]]:
    """A ledger with one measured site, and the site's errors."""
    ledger = Ledger(window=4, default=4)
    site = ledger.site("block:saved.some.0.0", rule)
    site.closed = False
    site.local.append(torch.tensor([1e-1, 1e-2, 1e-4, 1e-8], dtype=torch.float64))
    ledger.families["block:saved.some.0.0"] = family = ledger.new_family()
    family.transfer.append(0.5)
    return ledger, ledger.errors(site)


def test_errors_count_more_where_backward_is_curved_or_unsteady() -> None:
    plain = _ledger(Rule())[1]
    assert plain == pytest.approx((5e-2, 5e-3, 5e-5, 5e-9, 0.0))
    assert _ledger(Rule(curved=True))[1] == pytest.approx((4 * plain[0], *plain[1:]))
    attention = _ledger(rule_of("scaled_dot_product_attention"))[1]
    assert attention == pytest.approx([4 * error for error in plain])


def test_a_floor_is_raised_and_never_lowered() -> None:
    ledger, _ = _ledger(Rule(curved=True, floor=4, known=False))
    (site,) = ledger.sites.values()
    ledger.raise_floor([site.name, "of no site"], 8)
    assert site.rule == Rule(curved=True, floor=8, known=False)
    assert ledger.errors(site)[:2] == (math.inf, math.inf)
    assert ledger.errors(site)[2] < math.inf
    ledger.raise_floor([site.name], 4)
    assert site.rule.floor == 8


def test_the_quantile_is_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (4, 5, 8, 12, 20):
        assert _student(freedom) == pytest.approx(stats.t.ppf(0.99, freedom), rel=0.04)
    assert _student(1e9) == pytest.approx(stats.norm.ppf(0.99), abs=1e-3)


def test_99_of_100_audits_stay_within_the_bound() -> None:
    """Errors twice the predicted, spread by a third: as many audits as count, then one more, many times."""
    generator = torch.Generator().manual_seed(0)
    held, shares, rounds = 0, 0.0, 4000
    for _ in range(rounds):
        ratio = (torch.randn(17, generator=generator) / 3).exp() * 2
        history = AuditHistory()
        for audited in ratio[:-1].tolist():
            history.add(1.0, audited)
        used = history.factor * float(ratio[-1])
        held, shares = held + (used <= 1), shares + used
    assert held / rounds >= 0.988
    assert shares / rounds > 1 / 3
    # before the first audit, whose error may be several times the predicted one
    assert 1 / 5 < AuditHistory().factor < 1 / 4
