"""How many rows of input calibration needs: tokens of a language model or an encoder, positions of a convolution.

Two things are estimated from rows. The sums of squares that score levels are means over rows, and are good after a few
thousand. The covariance of a layer's inputs has as many directions as the layer has inputs, K. Codes are fitted to it,
and what they gain by chance in d directions on n rows is lost again on other rows: the loss there is 1 / (1 - d/n)^2 of
the loss here (`foveate.rounding.overfit_factor`). d is less than K, a third of it in the widest layers of language
models. So the widest layer decides, and all others see more rows than they need. docs/decisions.md has what a third of
the rows costs.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Rows of input for each input of the widest layer, and the fewest rows of all.
ROWS_PER_INPUT, LEAST_ROWS = 12, 16384


def rows_needed(widths: Iterable[int]) -> int:
    """The rows of input that calibrating a model needs.

    Args:
        widths: the number of inputs of each weight that is multiplied with inputs.

    Example:
        >>> rows_needed([576, 1536])
        18432
    """
    return max(LEAST_ROWS, ROWS_PER_INPUT * max(widths, default=0))
