"""The policy against brute force: budgets are kept, larger ones never used worse, and nearly as well as can be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.activations.memory.timeline import Span, Timeline
from foveate.activations.policy.choose import LEVELS, Choice, Granularity, SavedSite, within_bytes, within_error
from foveate.errors import BudgetError, DataError, SiteError


def site(number: int, elements: int, scale: float, errors: Sequence[float] | None = None, layer: str = "") -> SavedSite:
    given = [scale / (2**bits - 1) ** 2 for bits in LEVELS[:-1]] if errors is None else errors
    sizes = tuple(elements * bits // 8 + 4 * (elements // 256 + 1) * (bits < 32) for bits in LEVELS)
    return SavedSite(f"layer{number}:saved", layer or f"layer{number}", sizes, (*given, 0.0))


ERRORS = st.one_of(st.floats(1e-9, 10), st.just(0.0), st.just(math.nan), st.just(math.inf))


@st.composite
def sites(draw: st.DrawFn, most: int = 4) -> list[SavedSite]:
    found = []
    for number in range(draw(st.integers(1, most))):
        errors = draw(st.one_of(st.none(), st.lists(ERRORS, min_size=4, max_size=4)))
        scale = draw(st.floats(1e-6, 10))
        found.append(site(number, draw(st.integers(1, 5000)), scale, errors, f"layer{number // 2}"))
    return found


def at_once(*, other: int, given: Sequence[SavedSite]) -> Timeline:
    """One point at which everything is alive."""
    original = {one.name: one.bytes[-1] for one in given}
    return Timeline((other,), tuple(Span(name, 0, 1, 1.0, True) for name in original), original, original)


@st.composite
def timelines(draw: st.DrawFn, given: Sequence[SavedSite]) -> Timeline:
    other = tuple(draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=4)))
    spans = []
    for one in given:
        for share in draw(st.sampled_from([[], [1.0], [0.5, 0.5]])):
            start, middle, stop = sorted(draw(st.integers(0, len(other))) for _ in range(3))
            spans += [Span(one.name, start, middle, share, False), Span(one.name, middle, stop, share, True)]
    original = {one.name: one.bytes[-1] for one in given}
    return Timeline(other, tuple(spans), original, original)


def monotone(one: SavedSite) -> tuple[float, ...]:
    """The errors as the policy must read them: nowhere below a higher level's, infinite where there is none."""
    least, found = 0.0, []
    for error, size in reversed(list(zip(one.errors, one.bytes, strict=True))):
        error = error if size < one.bytes[-1] else 0.0
        least = max(least, error) if math.isfinite(error) else least
        found.append(math.inf if math.isnan(error) else max(error, least))
    return tuple(reversed(found))


def everything(given: Sequence[SavedSite]) -> list[tuple[dict[str, int], float]]:
    """All choices of sites' levels that may be made, with their squared errors."""
    options = []
    for one in given:
        usable = [(level, e) for level, e in zip(LEVELS, monotone(one), strict=True) if math.isfinite(e)]
        options.append([(one.name, level, e) for level, e in usable] if one.measured else [(one.name, 32, 0.0)])
    return [
        ({name: level for name, level, _ in picked}, math.fsum(e for _, _, e in picked))
        for picked in itertools.product(*options)
    ]


def size(given: Sequence[SavedSite], levels: dict[str, int] | Choice) -> int:
    levels = dict(levels.levels) if isinstance(levels, Choice) else levels
    return sum(min(one.bytes[LEVELS.index(levels[one.name])], one.bytes[-1]) for one in given)


def sizes_of(given: Sequence[SavedSite], levels: dict[str, int]) -> dict[str, int]:
    return {one.name: min(one.bytes[LEVELS.index(levels[one.name])], one.bytes[-1]) for one in given}


def error_of(given: Sequence[SavedSite], choice: Choice) -> float:
    errors = [monotone(one)[LEVELS.index(choice.levels[one.name])] for one in given if one.measured]
    return math.sqrt(math.fsum(errors))


@given(sites(), st.floats(0, 3))
def test_an_error_is_kept_and_used(given: list[SavedSite], error: float) -> None:
    choice = within_error(given, error)
    assert list(choice.levels) == [s.name for s in given if s.measured] + list(choice.unmeasured)
    assert choice.error == pytest.approx(error_of(given, choice), rel=1e-12)
    assert choice.error <= error * (1 + 1e-9)
    assert choice.bytes == size(given, choice) <= sum(one.bytes[-1] for one in given)
    best = min(size(given, levels) for levels, squared in everything(given) if squared <= error**2 * (1 + 1e-12))
    # at most one step of one unit above the best
    assert best <= choice.bytes <= best + max(one.bytes[-1] - min(one.bytes) for one in given)


def test_close_to_the_best_on_average() -> None:
    total = best = 0
    for seed in range(60):
        given = [site(n, 200 + 977 * (seed * 7 + n * 13) % 5000, 10 ** (-((seed + 3 * n) % 5) / 2)) for n in range(5)]
        table = everything(given)
        for error in (0.05, 0.2):
            total += within_error(given, error).bytes
            best += min(size(given, levels) for levels, squared in table if squared <= error**2)
    assert best <= total <= 1.02 * best


@given(sites(), st.floats(0, 3), st.floats(0, 3), st.sampled_from(Granularity))
def test_a_larger_error_never_costs_more(given: list[SavedSite], a: float, b: float, granularity: Granularity) -> None:
    few, many = within_error(given, min(a, b), granularity), within_error(given, max(a, b), granularity)
    assert many.bytes <= few.bytes
    assert many == within_error(given, max(a, b), granularity)


@given(st.data())
def test_bytes_are_kept_and_never_used_worse(data: st.DataObject) -> None:
    given = data.draw(sites())
    timeline = data.draw(timelines(given))
    granularity = data.draw(st.sampled_from(Granularity))
    largest = timeline.peak({})
    found: list[float] = []
    for budget in sorted(data.draw(st.lists(st.integers(0, largest + 1), min_size=1, max_size=4))):
        try:
            choice = within_bytes(given, timeline, budget, granularity)
        except BudgetError:
            assert not found
            continue
        assert timeline.peak(sizes_of(given, dict(choice.levels))) <= budget
        assert choice.error == pytest.approx(error_of(given, choice), rel=1e-12)
        found.append(choice.error)
    assert found == sorted(found, reverse=True)
    assert within_bytes(given, timeline, largest).error == 0


@given(sites(), st.floats(0, 1))
def test_bytes_at_one_moment_are_used_nearly_as_well_as_can_be(given: list[SavedSite], share: float) -> None:
    timeline = at_once(other=100, given=given)
    table = everything(given)
    peaks = [timeline.peak(sizes_of(given, levels)) for levels, _ in table]
    budget = int(min(peaks) + share * (max(peaks) - min(peaks)))
    choice = within_bytes(given, timeline, budget)
    best = min(squared for (_, squared), peak in zip(table, peaks, strict=True) if peak <= budget)
    worst = max(max(e for e in monotone(one) if math.isfinite(e)) for one in given)
    assert best * (1 - 1e-9) <= choice.error**2 <= (best + worst) * (1 + 1e-9)
    with pytest.raises(BudgetError, match=rf"least possible is {min(peaks)} "):
        within_bytes(given, timeline, min(peaks) - 1)


def test_only_what_is_alive_at_the_peak_is_lowered() -> None:
    given = [site(n, 10_000, 0.1) for n in range(3)]
    spans = tuple(Span(one.name, at, at + 1, 1.0, True) for one, at in zip(given, (0, 0, 1), strict=True))
    original = {one.name: one.bytes[-1] for one in given}
    timeline = Timeline((0, 5_000), spans, original, original)
    choice = within_bytes(given, timeline, 45_000)
    assert choice.levels[given[2].name] == 32
    assert min(choice.levels[given[0].name], choice.levels[given[1].name]) < 32


def test_an_original_that_the_model_holds_anyway_is_not_worth_rounding() -> None:
    given = [site(0, 10_000, 0.1), site(1, 10_000, 0.2)]
    original = {one.name: one.bytes[-1] for one in given}
    spans = (Span(given[0].name, 0, 1, 1.0, False), Span(given[1].name, 0, 1, 1.0, True))
    choice = within_bytes(given, Timeline((50_000,), spans, original, original), 60_000)
    assert choice.levels == {given[0].name: 32, given[1].name: 4}


@pytest.mark.parametrize("decide", ["error", "bytes"])
def test_one_level_a_layer_or_a_model(decide: str) -> None:
    given = [site(n, 1000 * (1 + n % 5), 10.0 ** -(n % 4), layer=f"layer{n // 3}") for n in range(12)]
    timeline = at_once(other=0, given=given)

    def choose(granularity: Granularity) -> Choice:
        if decide == "error":
            return within_error(given, 0.1, granularity)
        return within_bytes(given, timeline, sum(one.bytes[-1] for one in given) // 6, granularity)

    by_site, by_layer, by_model = (choose(granularity) for granularity in Granularity)
    for first in range(0, 12, 3):
        assert len({by_layer.levels[one.name] for one in given[first : first + 3]}) == 1
    assert len(set(by_layer.levels.values())) > 1
    assert len(set(by_model.levels.values())) == 1
    cost = (lambda c: c.bytes) if decide == "error" else (lambda c: c.error)
    assert cost(by_site) <= cost(by_layer) <= cost(by_model)


def test_what_was_not_measured_stays_at_its_default() -> None:
    nan = math.nan
    unknown = SavedSite("a:saved", "a", (10, 20, 40, 80, 160), (nan, nan, nan, nan, 0.0), default=8)
    half = SavedSite("b:saved", "b", (10, 20, 40, 80, 160), (nan, 1e-4, nan, 1e-9, 0.0), default=8)
    choice = within_error([unknown, half], 1.0, Granularity.MODEL)
    assert choice == Choice({"b:saved": 4, "a:saved": 8}, 1e-2, 60, ("a:saved",))
    assert within_error([unknown], 0.0) == Choice({"a:saved": 8}, 0.0, 40, ("a:saved",))
    timeline = at_once(other=0, given=[unknown])
    assert within_bytes([unknown], timeline, 40).levels == {"a:saved": 8}
    with pytest.raises(BudgetError, match=r"least possible is 40 .*; sites not measured: 1"):
        within_bytes([unknown], timeline, 39)


def test_a_level_that_saves_nothing_is_not_used() -> None:
    bfloat16 = SavedSite("a:saved", "a", (300, 600, 1100, 2000, 2000), (0.1, 0.01, 1e-4, 1e-9, 0.0))
    tiny = SavedSite("b:saved", "b", (36, 40, 48, 64, 16), (1e-3, 1e-4, 1e-5, 1e-9, 0.0))
    assert within_error([bfloat16, tiny], 1e-3).levels == {"a:saved": 32, "b:saved": 32}
    assert within_error([bfloat16, tiny], 0.2).levels == {"a:saved": 4, "b:saved": 32}
    assert within_error([bfloat16, tiny], 0.2, Granularity.MODEL).levels == {"a:saved": 4, "b:saved": 32}
    assert within_error([bfloat16, tiny], 0.2, Granularity.MODEL).bytes == 616


def test_a_level_measured_better_than_a_higher_one_is_not_trusted() -> None:
    noisy = SavedSite("a:saved", "a", (10, 20, 40, 80, 160), (1e-6, 4e-2, 1e-4, 1e-9, 0.0))
    assert within_error([noisy], 0.1).levels == {"a:saved": 8}
    assert within_error([noisy], 0.2) == Choice({"a:saved": 2}, 0.2, 10)


def test_a_level_that_cannot_be_used_is_not_used() -> None:
    overflows = SavedSite("a:saved", "a", (10, 20, 40, 80, 160), (math.inf, math.inf, 1e-4, math.inf, 0.0))
    assert within_error([overflows], 1e9).levels == {"a:saved": 8}
    never = SavedSite("a:saved", "a", (10, 20, 40, 80, 160), (math.inf,) * 4 + (0.0,))
    assert within_error([never], 1e9) == Choice({"a:saved": 32}, 0.0, 160)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": (1.0, 0.5, -0.1, 0.0, 0.0)}, r"an error at level 8 \(=-0.1\) that is negative"),
        ({"errors": (1.0, 0.5, 0.1, 0.0, 0.1)}, r"an error at level 32 \(=0.1\) that is not 0"),
        ({"errors": (1.0, 0.5, 0.1, 0.0, math.nan)}, "an error at level 32 .* is not 0"),
        ({"errors": (1.0, 0.5, 0.1, 0.0)}, "5 sizes and 4 errors"),
        ({"bytes": (1, 2, -4, 8, 16)}, r"a size at level 8 \(=-4\)"),
        ({"default": 3}, r"default of a:saved \(=3\) is not one of"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    fields = {"bytes": (10, 20, 40, 80, 160), "errors": (1.0, 0.5, 0.1, 0.0, 0.0), **change}
    wrong = SavedSite("a:saved", "a", **fields)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        within_error([wrong], 0.1)
    with pytest.raises(DataError, match=message):
        within_bytes([wrong], Timeline((), (), {}, {}), 10)


def test_budgets_and_names_that_make_no_sense_are_refused() -> None:
    one = site(0, 100, 1.0)
    for error in (-0.1, math.nan, math.inf):
        with pytest.raises(BudgetError, match="must be a number of at least 0"):
            within_error([one], error)
    with pytest.raises(SiteError, match="layer0:saved is given twice"):
        within_error([one, one], 0.1)


def test_nothing_to_choose() -> None:
    empty = Timeline((70,), (), {}, {})
    assert within_error([], 0.1) == Choice({}, 0.0, 0)
    assert within_bytes([], empty, 70) == Choice({}, 0.0, 0)
    with pytest.raises(BudgetError, match="least possible is 70"):
        within_bytes([], empty, 69)
    # a site that never met the timeline costs nothing there
    assert within_bytes([site(0, 100, 1.0)], empty, 70).levels == {"layer0:saved": 32}
    assert within_bytes([site(0, 100, 1.0)], Timeline((), (), {}, {}), 0).levels == {"layer0:saved": 32}
