"""compress_activations: what a user calls, checked and made into a store."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import nn

from foveate.activations.metric import Relative
from foveate.activations.policy import LEVELS, Granularity
from foveate.activations.settings import Settings
from foveate.activations.store import ActivationStore
from foveate.errors import BudgetError, LevelError
from foveate.kernels.dispatch import ensure_loaded
from foveate.sizes import parse_bytes

#: Bounds below it need more than 8 bits before anything is measured.
_SMALL_ERROR = 0.01


def compress_activations(
    model: nn.Module,
    *,
    error: float | None = None,
    bytes: int | str | None = None,
    levels: Mapping[str, int] | int | None = None,
    relative_to: Relative = Relative.EACH_PARAMETER,
    granularity: Granularity = Granularity.SITE,
    default: int | None = None,
    profile_every: int = 50,
    audit_every: int = 50,
    window: int = 8,
    probes: int = 1,
    group: int | None = None,
    smallest: int = 1024,
    recompute: bool = True,
    profile: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> ActivationStore:
    """Keep what autograd saves for backward in few bits, within a stated error of the gradient.

        with fv.compress_activations(model, error=0.1) as store:
            for batch in batches:
                model(batch).loss.backward()
                ...
        print(store.report())

    What can be kept without loss is (signs, masks, small integers, duplicates); what must not change is kept exactly;
    the rest is rounded stochastically to 2, 4, 8 or 16 bits. The first steps measure what each tensor's rounding does
    to the gradient (a few more backward passes each), later ones now and then; audits compare the gradient with the
    exact one of the same step, and what they find tightens or loosens the levels.

    What functions made by `torch.compile` keep for backward cannot be rounded: a warning after the first step, and the
    report, say how much that is.

    Args:
        model: whose parameters' gradients count, and whose modules give sites their names.
        error: the gradient's relative error that audits should stay under: the root of E||g' - g||^2 / ||g||^2, g a
            parameter tensor's exact gradient, meaned over all values of all tensors. What a target does to the final
            loss is for each training to see (docs/benchmarks.md).
        bytes: instead of an error: the peak of a step's tensor memory, parameters, gradients and temporaries included,
            as a number or as "12GiB"; the least error that fits is chosen. Holds once all is measured, for steps that
            measure nothing: probes take one more copy of the gradients. Audits, which hold the exact tensors, are not
            made.
        levels: instead of measuring: one level for all sites (32: exact), or shell patterns of site names, first match
            wins, exact without one. A pattern that names none of the first step's sites is an error.
        relative_to: what errors are relative to: `Relative.EACH_PARAMETER`'s own gradient, since that is what Adam
            divides by (of a gradient that is next to nothing, less than a hundredth of a typical one, that hundredth);
            or the `Relative.WHOLE_GRADIENT` of all parameters together, for plain SGD.
        granularity: what shares one level: each site, each layer, or the model.
        default: the level of a tensor before it has been measured: 8, or 16 where `error` is below 0.01, or 4 under a
            budget in bytes. Of functions nothing is known about it is 32.
        profile_every: steps between two profiled ones (the first few are all profiled).
        audit_every: steps between two audits, which hold the exact tensors of one step and run backward twice.
        window: profiled steps that running statistics cover.
        probes: families of sites probed in a profiled step, one more backward each.
        group: values that share a least value and a step, 32 bits together; chosen for each site from the statistics of
            its values if not given.
        smallest: tensors of fewer values are kept exactly.
        recompute: whether cheap functions of stored tensors (activations, products, norms) and attention are run again
            instead of being stored too.
        profile: a file that `store.save_profile` wrote of the same model: what it knows need not be learned.
        seed: of the private generator of stochastic rounding; torch's is never touched.

    Returns:
        The store, to be entered around whole steps, forward and backward; once or again and again.

    Raises:
        BudgetError: not exactly one of `error`, `bytes` and `levels` is given, or it is no positive number, or
            `relative_to` is not a `Relative`. Raised by
            backward where no levels keep the peak within `bytes`; the message says the least possible.
        LevelError: a level that saved tensors cannot have.
        SiteError: raised by the first step's backward where a pattern in `levels` names no site.
        CheckpointError: `profile` is not one, or was measured relative to something else.
    """
    if sum(given is not None for given in (error, bytes, levels)) != 1:
        raise BudgetError("give one of error=, bytes= and levels=")
    if error is not None and not (isinstance(error, (int, float)) and 0 < error < float("inf")):
        raise BudgetError(f"error (={error!r}) must be a number above 0")
    if not isinstance(relative_to, Relative):
        raise BudgetError(f"relative_to (={relative_to!r}) is not a Relative, such as foveate.Relative.WHOLE_GRADIENT")
    if default is None:
        default = 4 if bytes is not None else 16 if error is not None and error < _SMALL_ERROR else 8
    fixed = {"*": levels} if isinstance(levels, int) else levels
    for level in (default, *(fixed or {}).values()):
        if level not in LEVELS:
            raise LevelError(f"level (={level}) is not one of 2, 4, 8, 16, 32")
    peak = None if bytes is None else parse_bytes(bytes)
    if peak is not None and peak < 1:
        raise BudgetError(f"bytes (={peak}) must be at least 1")
    counts = {"profile_every": profile_every, "audit_every": audit_every, "window": window, "probes": probes}
    for name, count in counts.items():
        if count < 1:
            raise BudgetError(f"{name} (={count}) must be at least 1")
    if group is not None and (group % 32 or not 32 <= group <= 1024):
        raise BudgetError(f"group (={group}) must be a multiple of 32 from 32 to 1024")
    settings = Settings(
        error,
        peak,
        fixed,
        relative_to,
        granularity,
        default,
        profile_every,
        audit_every,
        window,
        probes,
        group,
        smallest,
        recompute,
        seed,
    )
    ensure_loaded()
    return ActivationStore(model, settings, profile)
