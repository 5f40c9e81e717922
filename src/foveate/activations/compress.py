"""compress_activations: the function that users call. It checks what it is given and makes a store."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import nn

from foveate.activations.measure.metric import Relative
from foveate.activations.policy.options import DEFAULT_OPTIONS, ActivationOptions, Settings
from foveate.activations.store import ActivationStore
from foveate.kernels.backends.table import ensure_loaded
from foveate.sizes import parse_bytes


def compress_activations(
    model: nn.Module,
    *,
    error: float | None = None,
    bytes: int | str | None = None,
    levels: Mapping[str, int] | int | None = None,
    relative_to: Relative = Relative.EACH_PARAMETER,
    profile: str | os.PathLike[str] | None = None,
    options: ActivationOptions = DEFAULT_OPTIONS,
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
        profile: a file that `store.save_profile` wrote of the same model: what it knows need not be learned.
        options: what need not be set from day to day: what shares a level, how often is measured, `seed` and the like;
            see `foveate.ActivationOptions`.

    Returns:
        The store, to be entered around whole steps, forward and backward; once or again and again.

    Raises:
        BudgetError: not exactly one of `error`, `bytes` and `levels` is given, or it is no positive number, or another
            argument is not of its class. Raised by backward where no levels keep the peak within `bytes`; the message
            says the least possible.
        LevelError: a level that saved tensors cannot have.
        SiteError: raised by the first step's backward where a pattern in `levels` names no site.
        CheckpointError: `profile` is not one, or was measured relative to something else.
    """
    settings = Settings(
        error=error,
        bytes=None if bytes is None else parse_bytes(bytes),
        levels={"*": levels} if isinstance(levels, int) else levels,
        relative_to=relative_to,
        options=options,
    )
    ensure_loaded()
    return ActivationStore(model, settings, profile)
