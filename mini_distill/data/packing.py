"""How documents fill training sequences: a plan made from their lengths and the settings alone."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Which pieces stand in which sequence.

    Attributes:
        document: `(pieces,)` the row each piece comes from.
        start: `(pieces,)` its first token within the row.
        length: `(pieces,)` its tokens.
        offset: `(sequences + 1,)` the pieces of sequence i are `offset[i]:offset[i + 1]`.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offset: np.ndarray


def cut(lengths: np.ndarray, seq_len: int, split: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows as pieces of at most `seq_len` tokens: all of a row when `split`, else its beginning.

    Returns:
        `(pieces,)` row, start and length. Pieces of one token are left out: there is nothing to predict in them.
    """
    pieces_of = -(-lengths // seq_len) if split else np.minimum(lengths, 1)
    document = np.repeat(np.arange(len(lengths)), pieces_of)
    first = np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
    start = (np.arange(len(document)) - first) * seq_len
    length = np.minimum(lengths[document] - start, seq_len)
    whole = length >= 2
    return document[whole], start[whole], length[whole]


def pack(document: np.ndarray, start: np.ndarray, length: np.ndarray, seq_len: int, packing: bool) -> Plan:
    """Put pieces into sequences: best fit, longest first, or one each.

    Best-fit decreasing packing wastes almost nothing and never cuts a piece (Ding et al. 2024, arXiv 2404.10830).
    """
    if not packing:
        return Plan(document, start, length, np.arange(len(document) + 1))
    order = np.argsort(-length, kind="stable")
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # free tokens -> sequences with that much room
    contents: list[list[int]] = []
    rooms: list[int] = []  # the amounts of room that some sequence has, kept sorted
    for piece in order.tolist():
        need = int(length[piece])
        at = bisect.bisect_left(rooms, need)
        room = rooms[at] if at < len(rooms) else None
        if room is None:
            contents.append([])
            sequence, room = len(contents) - 1, seq_len
        else:
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms.remove(room)
        contents[sequence].append(piece)
        left = room - need
        if left >= 2:
            if not with_room[left]:
                bisect.insort(rooms, left)
            with_room[left].append(sequence)
    sequences = sorted(contents, key=lambda pieces: min(pieces))  # in the order of the source
    index = np.array([piece for pieces in sequences for piece in sorted(pieces)], dtype=np.int64)
    offset = np.concatenate([[0], np.cumsum([len(pieces) for pieces in sequences])]).astype(np.int64)
    return Plan(document[index], start[index], length[index], offset)
