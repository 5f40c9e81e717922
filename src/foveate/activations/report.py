"""The report on one step of a store: bytes before and after, and the predicted error of the gradient.

A report is frozen, can be printed, and converts to plain JSON. It has a row for each site. Printed, the sites of a
family (the same function in all layers) share a line, since a model has hundreds of sites. `print(report)` needs no
other package. `rich.print(report)` and `rich.live` show the same as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from foveate.activations.measure.ledger import Ledger, family_of
from foveate.activations.measure.metric import Relative
from foveate.activations.measure.steps import Step
from foveate.activations.policy.choose import LEVELS
from foveate.sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_HEADS = ("site", "operation", "sites", "stored as", "before", "after", "ratio", "error", "share")
_LEFT = (0, 1, 3)  # columns of text
_EXPENDABLE = (2, 4, 8)  # columns of figures that a narrow table does without, in this order
_NAMES = 44  # characters that the columns of text need to be read
_FORMS: Mapping[str, str] = {"masked": "mask", "narrow": "integers", "empty": "shape"}


@dataclass(frozen=True)
class SavedRow:
    """One site in one step.

    Attributes:
        site: `layers.0.mlp:saved.silu.0.0`.
        operation: the torch function that saved it, `silu`.
        form: `grouped` where it is rounded, `recomputed` where it is computed again from other sites; else
            without loss: `masked`, `narrow`, `empty`, `exact`.
        bits: per value, scales not counted.
        bytes_before, bytes_after: of the tensors as autograd saved them, and as they are stored.
        error: the gradient's relative error that its rounding alone is predicted to make; 0 without loss, NaN where it
            was not measured yet.
    """

    site: str
    operation: str
    form: str
    bits: int
    bytes_before: int
    bytes_after: int
    error: float

    @property
    def layer(self) -> str:
        """The dotted path of the module that saved it."""
        return self.site.rpartition(":")[0]


@dataclass(frozen=True)
class SavedAudit:
    """One comparison with the exact gradient of the same step: relative errors, NaN where nothing was predicted."""

    step: int
    predicted: float
    audited: float


@dataclass(frozen=True)
class SavedReport:
    """What a store kept in its latest step.

    Attributes:
        step: its number, from 0.
        rows: the sites, in the order in which they were first kept.
        bytes_before: of all storages that plain training would hold for backward, parameters excluded.
        bytes_after: of what the store holds instead.
        bound: the error that was asked for; None where levels were given.
        audits: all so far.
        relative_to: what errors are relative to.
        bytes_compiled: of `bytes_after`, what compiled functions hold, which is kept as it is; see
            `compress_activations`.
    """

    step: int
    rows: tuple[SavedRow, ...]
    bytes_before: int
    bytes_after: int
    bound: float | None
    audits: tuple[SavedAudit, ...]
    relative_to: Relative = Relative.EACH_PARAMETER
    bytes_compiled: int = 0

    @property
    def ratio(self) -> float:
        """`bytes_before` over `bytes_after`; 1 where nothing was kept."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    @property
    def predicted(self) -> float:
        """The relative error of the gradient that all measured sites are predicted to make together."""
        return _together(self.rows)

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Rounded sites whose error was not measured yet, and is not in `predicted`."""
        return tuple(row.site for row in self.rows if math.isnan(row.error))

    @property
    def bound_held(self) -> float:
        """The share of audits that were within the bound; NaN without audits or bound."""
        if self.bound is None or not self.audits:
            return math.nan
        return sum(audit.audited <= self.bound for audit in self.audits) / len(self.audits)

    def share(self, rows: Iterable[SavedRow]) -> float:
        """The part of the predicted squared error that is due to some of the rows, 0..1."""
        whole = self.predicted
        return (_together(rows) / whole) ** 2 if whole else 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, NaN as null."""
        rows = [{**asdict(row), "error": _or_none(row.error), "share": self.share([row])} for row in self.rows]
        audits = [{**asdict(audit), "predicted": _or_none(audit.predicted)} for audit in self.audits]
        return {
            "step": self.step,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_compiled": self.bytes_compiled,
            "ratio": self.ratio,
            "bound": self.bound,
            "relative_to": self.relative_to.value,
            "predicted": self.predicted,
            "bound_held": _or_none(self.bound_held),
            "rows": rows,
            "audits": audits,
        }

    def __str__(self) -> str:
        lines = [_HEADS, *self._lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADS))]
        text = [
            "  ".join(
                c.ljust(w) if i in _LEFT else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join(line.rstrip() for line in (self._head(), "", *text, "", self._foot()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        lines = self._lines()
        shown = _columns(lines, options.max_width)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
        for i in shown:
            text = i in _LEFT  # folded where there is little room; figures never are
            table.add_column(_HEADS[i], justify="left" if text else "right", overflow="fold", no_wrap=not text)
        for line in lines:
            table.add_row(*(Text(line[i]) for i in shown))
        yield Text(self._head(), style="bold")
        yield table
        yield Text(self._foot())

    def _head(self) -> str:
        sizes = f"{format_bytes(self.bytes_before)} kept in {format_bytes(self.bytes_after)}, {self.ratio:.1f}x less"
        bound = "" if self.bound is None else f" (bound {self.bound:g})"
        count = len(self.unmeasured)
        unmeasured = f", {count} site{'s' * (count != 1)} not measured" if count else ""
        lossy = [row for row in self.rows if row.form == "grouped"]
        known = not lossy or len(self.unmeasured) < len(lossy)
        predicted = f"{self.predicted:.3g}" if known else "not measured"
        of = "each parameter's" if self.relative_to is Relative.EACH_PARAMETER else "the whole"
        if self.bytes_compiled:
            sizes += f" ({format_bytes(self.bytes_compiled)} of it by compiled functions, which cannot be made smaller)"
        return f"step {self.step}: {sizes}; predicted error of {of} gradient {predicted}{bound}{unmeasured}"

    def _foot(self) -> str:
        if not self.audits:
            return "no audit yet"
        last = self.audits[-1]
        count = f"{len(self.audits)} audit{'s' * (len(self.audits) != 1)}"
        if self.bound is not None:
            count += f", {self.bound_held:.0%} within the bound"
        return f"{count}; the last, of step {last.step}: predicted {last.predicted:.3g}, true {last.audited:.3g}"

    def _lines(self) -> list[tuple[str, ...]]:
        families: dict[str, list[SavedRow]] = {}
        for row in self.rows:
            families.setdefault(family_of(row.site), []).append(row)
        lines: list[tuple[str, ...]] = []
        for family, rows in families.items():
            before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
            measured = [row for row in rows if not math.isnan(row.error)]
            lossy = any(row.form == "grouped" for row in rows)
            lines.append(
                (
                    family.rpartition(":")[0],
                    rows[0].operation,
                    f"{len(rows)}",
                    _stored_as(rows),
                    format_bytes(before),
                    format_bytes(after),
                    f"{before / after:.1f}" if after else "–",
                    (f"{_together(measured):.2g}" if measured else "?") if lossy else "0",
                    (f"{self.share(measured):.1%}" if measured else "?") if lossy else "0",
                )
            )
        return lines


def report_of(
    step: Step | None, ledger: Ledger, audits: Sequence[tuple[int, float, float]], bound: float | None
) -> SavedReport:
    """The report on a step.

    Args:
        step: what it kept; None before the first.
        ledger: what is known of the sites' errors.
        audits: (step, predicted, audited) relative errors.
        bound: the error that was asked for, if one was.
    """
    rows = []
    for name, kept in (step.sites if step is not None else {}).items():
        lossy = kept.form == "grouped" and name in ledger.sites
        error = ledger.errors(ledger.sites[name])[LEVELS.index(kept.level)] if lossy else 0.0
        operation = name.rpartition(":saved.")[2].split(".")[0]
        rows.append(SavedRow(name, operation, kept.form, kept.level, kept.original, kept.held, math.sqrt(error)))
    return SavedReport(
        0 if step is None else step.number,
        tuple(rows),
        0 if step is None else step.original,
        0 if step is None else step.held,
        bound,
        tuple(SavedAudit(*audit) for audit in audits),
        ledger.relative_to,
        0 if step is None else step.held_compiled,
    )


def _columns(lines: Sequence[Sequence[str]], room: int) -> list[int]:
    """The columns that a table of so many characters shows: where names have too little room, some figures go."""
    widths = [max([len(head), *(len(line[i]) for line in lines)]) for i, head in enumerate(_HEADS)]
    names = min(_NAMES, sum(widths[i] for i in _LEFT))
    shown = list(range(len(_HEADS)))
    for column in _EXPENDABLE:
        if sum(widths[i] for i in shown if i not in _LEFT) + len(shown) + names > room:
            shown.remove(column)
    return shown


def _together(rows: Iterable[SavedRow]) -> float:
    return math.sqrt(math.fsum(row.error**2 for row in rows if not math.isnan(row.error)))


def _stored_as(rows: Sequence[SavedRow]) -> str:
    """`4 bits`, `3.5 bits`, `mask`, or several."""
    grouped = [row for row in rows if row.form == "grouped"]
    names = list(dict.fromkeys(_FORMS.get(row.form, row.form) for row in rows if row.form != "grouped"))
    if grouped:
        values = sum(row.bytes_before for row in grouped)
        mean = sum(row.bits * row.bytes_before for row in grouped) / max(values, 1)
        names.insert(0, f"{mean:.2g} bits")
    return ", ".join(names)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
