"""The ops on generations: all levels and ranges of one model, published at once, and passes that pin one.

A model has a *book*, made by `generation_book`. `publish` gives it a new generation: the levels of up to 8 maps, the
range of every input, and for each class of rows the pair of maps that its rows read. A generation never changes.
`begin_pass` pins the newest one for this thread, until `end_pass`. Both say that they change the book, and products
take the book. So no compiler moves products to the other side of them, or drops one of them. Outside of any pass a
product reads the newest generation.

The reference here is the meaning of the compiled ops (csrc/planes/generations.h), and takes their place without a
compiler.

Shapes: T tiles and I inputs of a model, n maps, C classes of rows.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.kernels.library import LIBRARY, define

#: The most maps that are in use at once.
MAX_MAPS = 8


@dataclass(frozen=True, eq=False)
class Choice:
    """What the decisions between the maps of one pair take, for each weight of a model.

    Attributes:
        thresholds: float32 [W].
        strips: for each weight the numbers of its sampled strips.
        row_weights: for each weight float32 [strips, 16].
        counts: int64 [W, 2], rows that were decided and those that read the higher map; added to by every decision.
    """

    thresholds: Tensor
    strips: list[Tensor]
    row_weights: list[Tensor]
    counts: Tensor


@dataclass(frozen=True, eq=False)
class _Generation:
    number: int
    levels: list[Tensor]
    input_levels: Tensor
    ranges: Tensor
    pairs: Tensor
    choices: dict[tuple[int, int], Choice]


@dataclass(eq=False)
class _Book:
    tiles: tuple[int, ...]
    inputs: int
    newest: _Generation | None = None


@dataclass(frozen=True, eq=False)
class _Pass:
    generation: _Generation
    classes: Tensor | None  # of each row; None where all are of class `common`
    length: int
    common: int = 0


class _Open(threading.local):
    def __init__(self) -> None:
        self.passes: dict[int, _Pass] = {}
        self.classes: dict[int, Tensor] = {}


@dataclass(eq=False)
class _Tables:
    books: dict[int, _Book] = field(default_factory=dict)
    open: _Open = field(default_factory=_Open)


_TABLES = _Tables()
_BOOK_NUMBERS = itertools.count(1)


def generation_book(device: Tensor, tiles: Sequence[int], inputs: int) -> Tensor:
    """A tensor, int64 [1], that stands for the generations of a model, as long as it lives.

    Args:
        device: any tensor on the device of the model.
        tiles: how many each weight of the model has.
        inputs: how many the model has.
    """
    number = next(_BOOK_NUMBERS)
    _TABLES.books[number] = _Book(tuple(tiles), inputs)
    made = torch.tensor([number])
    weakref.finalize(made, _TABLES.books.pop, number)
    return made


def publish(
    book: Tensor, levels: Tensor, input_levels: Tensor, ranges: Tensor, pairs: Tensor, choices: Sequence[Tensor] = ()
) -> int:
    """Make a generation the newest of a book, whole.

    Args:
        book: of the model.
        levels: uint8 [n, T], of 1 to 8 maps.
        input_levels: uint8 [n, I].
        ranges: float32 [2 I], the least and greatest of each input; zeros where each row has a scale of its own.
        pairs: uint8 [C, 2], the maps (low, high) of the rows of each class. Class 0 is that of rows for which nothing
            was asked.
        choices: what decides between the maps of the D pairs whose two differ (`foveate.kernels.planes.choice`), none
            or six tensors: the pairs uint8 [D, 2]; thresholds float32 [D, W]; int64 [D, W + 1], where each weight's
            sampled strips begin in the next two; the strips int64 [n]; the weights of their rows float32 [n, 16]; and
            int64 [D, W, 2], to which the rows that were decided, and those that read the higher map, are added.

    Returns:
        The number of the generation, counted from 1.
    """
    into = _book(int(book))
    maps = len(levels)
    tiles = sum(into.tiles)
    if not 1 <= maps <= MAX_MAPS or levels.shape != (maps, tiles) or input_levels.shape != (maps, into.inputs):
        raise RuntimeError(f"levels have shape (={list(levels.shape)}), not [1..{MAX_MAPS}, {tiles}]")
    if bool((pairs >= maps).any()) or pairs.shape[1:] != (2,):
        raise RuntimeError(f"a class reads map (={int(pairs.max())}), and there are {maps}")
    found = _choices_in(choices, maps)
    for low, high in pairs.tolist():
        if low != high and (low, high) not in found:
            raise RuntimeError(f"a class reads one of maps {low} and {high}, and no choice says which")
    padded, padded_inputs = levels.new_zeros(MAX_MAPS, tiles), levels.new_full((MAX_MAPS, into.inputs), 8)
    padded[:maps], padded_inputs[:maps] = levels, input_levels
    number = 1 if into.newest is None else into.newest.number + 1
    into.newest = _Generation(
        number, list(padded.split(into.tiles, 1)), padded_inputs, ranges.clone().view(-1), pairs.clone(), found
    )
    return number


def _choices_in(parts: Sequence[Tensor], maps: int) -> dict[tuple[int, int], Choice]:
    if not parts:
        return {}
    pairs, thresholds, begins, strips, row_weights, counts = parts
    found = {}
    for (low, high), own, begin, seen in zip(pairs.tolist(), thresholds, begins.tolist(), counts, strict=True):
        if not (low < maps and high < maps and low != high):
            raise RuntimeError(f"a choice is between maps (={low}, {high}), which are not two of {maps}")
        spans = [slice(first, last) for first, last in itertools.pairwise(begin)]
        found[low, high] = Choice(own, [strips[s] for s in spans], [row_weights[s] for s in spans], seen)
    return found


def rows_of_passes(book: Tensor, classes: Tensor | None) -> None:
    """Say which class each row of this thread's next passes belongs to, uint8 [P]; None ends that."""
    if classes is None:
        _TABLES.open.classes.pop(int(book), None)
    else:
        _TABLES.open.classes[int(book)] = classes.clone()


def begin_pass(book: Tensor, length: int) -> None:
    """Pin the newest generation of a book for this thread.

    Args:
        book: of the model.
        length: tokens in each row that the outermost module was given, where those rows are rows of tokens; else 0.
    """
    number = int(book)
    newest = _newest(number)
    classes = _TABLES.open.classes.get(number)
    if classes is not None:
        classes = torch.where(classes < len(newest.pairs), classes, 0)
    common = 0
    if classes is not None and len(classes) and bool((classes == classes[0]).all()):
        common, classes = int(classes[0]), None
    _TABLES.open.passes[number] = _Pass(newest, classes, length, common)


def end_pass(book: Tensor) -> None:
    """End the pass over a book that is open in this thread, if any."""
    _TABLES.open.passes.pop(int(book), None)


def _book(number: int) -> _Book:
    if number not in _TABLES.books:
        raise RuntimeError(f"book (={number}) stands for no model of this process: its model is gone")
    return _TABLES.books[number]


def _newest(number: int) -> _Generation:
    newest = _book(number).newest
    if newest is None:
        raise RuntimeError("no levels were published yet")
    return newest


def _pass_of(book: Tensor) -> _Pass:
    """The pass over a book that is open in this thread; outside of any, one over the newest generation."""
    number = int(book)
    _book(number)
    return _TABLES.open.passes.get(number) or _Pass(_newest(number), None, 0)


def pass_levels(book: Tensor, weight: int, strips: int, groups: int) -> Tensor:
    """The active levels of a weight in a pass, uint8 [8, strips, groups], of which those of maps in use are set.

    Args:
        book: of the model.
        weight: the number of the weight in its model.
        strips, groups: of the weight.
    """
    return _pass_of(book).generation.levels[weight].reshape(MAX_MAPS, strips, groups)


def pass_input(book: Tensor, input: int) -> tuple[Tensor, Tensor]:
    """The levels of an input in a pass, uint8 [8], and its range, float32 [2]."""
    read = _pass_of(book).generation
    return read.input_levels[:, input].clone(), read.ranges[2 * input : 2 * input + 2].clone()


def pass_rows(book: Tensor, x: Tensor, trailing: int, owners: Tensor | None) -> Tensor:
    """The maps (low, high) of each row of x in a pass, uint8 [M, 2].

    A row of x belongs to a row that the pass was given: the one that `owners` names; else the one of its first
    dimension, where that has as many entries as the pass has rows, or where x has as many rows, or as many as there are
    tokens. Rows for which none of this holds read map 0, which is the best of those in use. Where all rows of the pass
    are of one class, all rows of x read as it does.

    Args:
        book: of the model.
        x: any tensor [..., (trailing dimensions)].
        trailing: how many dimensions at the end of x are not dimensions of rows.
        owners: int64 [M], for each row of x the row of the pass, or -1; None if that follows from the shape of x.
    """
    now = _pass_of(book)
    shape = x.shape[: x.dim() - trailing]
    count = shape.numel()
    pairs = now.generation.pairs
    if now.classes is None:
        return pairs[now.common].expand(count, 2).contiguous()
    rows = len(now.classes)
    if owners is None:
        by_first = len(shape) > 1 and shape[0] == rows
        if count not in (rows, rows * now.length) and not by_first:
            return pairs.new_zeros(count, 2)
        owners = torch.arange(count) // max(1, count // rows)
    own = pairs[now.classes[owners.view(-1).clamp_min(0)].long()]
    return torch.where(owners.view(-1, 1) < 0, 0, own)


def pass_owners(book: Tensor, count: int) -> Tensor:
    """The row of a pass that each of its `count` tokens belongs to, int64 [count], or -1 where that is not known; empty
    where nothing was asked for rows, or the same for all.
    """
    now = _pass_of(book)
    if now.classes is None:
        return torch.empty(0, dtype=torch.int64)
    rows = len(now.classes)
    if count not in (rows, rows * now.length):
        return torch.full((count,), -1)
    return torch.arange(count) // max(1, count // rows)


def choice_of(book: Tensor, low: int, high: int) -> Choice:
    """What decides between two maps in a pass; raises `RuntimeError` if nothing does."""
    found = _pass_of(book).generation.choices.get((low, high))
    if found is None:
        raise RuntimeError(f"a row reads one of maps {low} and {high}, and no choice says which")
    return found


def pass_generation(book: Tensor) -> int:
    """The number of the generation that a pass reads."""
    return _pass_of(book).generation.number


define("generation_book(Tensor device, int[] tiles, int inputs) -> Tensor", generation_book)
define(
    "publish(Tensor book, Tensor levels, Tensor input_levels, Tensor ranges, Tensor pairs, Tensor[] choices) -> int",
    publish,
)
define("rows_of_passes(Tensor book, Tensor? classes) -> ()", rows_of_passes)
define("pass_owners(Tensor book, int count) -> Tensor", pass_owners)
define("begin_pass(Tensor(a!) book, SymInt length) -> ()", begin_pass)
define("end_pass(Tensor(a!) book) -> ()", end_pass)
define("pass_levels(Tensor book, int weight, int strips, int groups) -> Tensor", pass_levels)
define("pass_input(Tensor book, int input) -> (Tensor, Tensor)", pass_input)
define("pass_rows(Tensor book, Tensor x, int trailing, Tensor? owners) -> Tensor", pass_rows)
define("pass_generation(Tensor book) -> int", pass_generation)


@torch.library.register_fake("foveate::begin_pass", lib=LIBRARY)
def _begin_fake(book: Tensor, length: int) -> None:
    return None


@torch.library.register_fake("foveate::end_pass", lib=LIBRARY)
def _end_fake(book: Tensor) -> None:
    return None


@torch.library.register_fake("foveate::pass_levels", lib=LIBRARY)
def _levels_fake(book: Tensor, weight: int, strips: int, groups: int) -> Tensor:
    return book.new_empty(MAX_MAPS, strips, groups, dtype=torch.uint8)


@torch.library.register_fake("foveate::pass_input", lib=LIBRARY)
def _input_fake(book: Tensor, input: int) -> tuple[Tensor, Tensor]:
    return book.new_empty(MAX_MAPS, dtype=torch.uint8), book.new_empty(2, dtype=torch.float32)


@torch.library.register_fake("foveate::pass_rows", lib=LIBRARY)
def _rows_fake(book: Tensor, x: Tensor, trailing: int, owners: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[: x.dim() - trailing].numel(), 2, dtype=torch.uint8)
