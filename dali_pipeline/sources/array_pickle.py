"""Reads the pickles of torchvision's CIFAR folders as plain data (numbers, text, uint8 arrays); no code that they name runs."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt


class PickledDtype:
    """Stands in for numpy.dtype: keeps the type's name."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


class PickledArray:
    """Stands in for numpy.ndarray: keeps shape, type and bytes, so that no native code has to process what the file says."""

    state: object = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_uint8(self) -> npt.NDArray[np.uint8]:
        """The array, read-only; raises ValueError unless it is a two-dimensional one of uint8 in C order."""
        match self.state:
            case (_, (int(rows), int(columns)), PickledDtype(name="u1" | b"u1"), False, bytes() | str() as raw):
                data = raw if isinstance(raw, bytes) else raw.encode("latin1")
                if rows >= 0 and columns >= 0 and rows * columns == len(data):
                    return np.frombuffer(data, np.uint8).reshape(rows, columns)
        raise ValueError("not a two-dimensional uint8 array in C order")


class _Latin1:
    """Stands in for _codecs.encode. An instance and not a function, as a pickle could set a function's attributes."""

    def __call__(self, text: object, encoding: object) -> bytes:
        if isinstance(text, str) and encoding in ("latin1", b"latin1"):
            return text.encode("latin1")
        raise pickle.UnpicklingError(f"_codecs.encode to {encoding!r}")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("_codecs.encode has no state")


class _FromBuffer:
    """Stands in for numpy's _frombuffer, with which NumPy writes arrays for protocol 5. An instance, as _Latin1 is."""

    def __call__(self, buffer: object, dtype: object, shape: object, order: object) -> PickledArray:
        if not isinstance(buffer, (bytes, bytearray)):
            raise pickle.UnpicklingError(f"an array of a {type(buffer).__name__}")
        array = PickledArray()
        array.state = (None, shape, dtype, order != "C", bytes(buffer))
        return array

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("_frombuffer has no state")


class _ArrayUnpickler(pickle.Unpickler):
    """Accepts only the names that an array of numbers needs, and resolves them to the stand-ins. It imports nothing."""

    ADMITTED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): PickledArray,
        ("numpy.core.numeric", "_frombuffer"): _FromBuffer(),
        ("numpy._core.numeric", "_frombuffer"): _FromBuffer(),
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): PickledDtype,
        ("_codecs", "encode"): _Latin1(),  # how Python 3 writes bytes for the protocols of Python 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ADMITTED:
            return self.ADMITTED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array of numbers needs")


# fmt: off
_VALUES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
    "BYTEARRAY8", "EMPTY_TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
))
_MEMO = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_STRUCTURE = frozenset((
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "LIST", "EMPTY_LIST", "DICT", "EMPTY_DICT",
))
# fmt: on
MAX_STRUCTURE = 100  # opcodes of one kind that build containers or objects; CIFAR's own files have at most 4


def load_array_pickle(data: bytes) -> object:
    """The value in a pickle, arrays as PickledArray and the strings of Python 2 as bytes.

    Damaged data can raise any exception. The opcodes are checked first, because the C unpickler has two weaknesses that a
    hostile or damaged file could use: it allocates its memo up to any index that the file names, and it recurses into
    nested containers without a limit.
    """
    structure: Counter[str] = Counter()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _MEMO:
            if argument is None or int(argument) > len(data):
                raise pickle.UnpicklingError(f"memo index {argument}")
        elif opcode.name in _STRUCTURE:
            structure[opcode.name] += 1
            if structure[opcode.name] > MAX_STRUCTURE:
                raise pickle.UnpicklingError(f"more than {MAX_STRUCTURE} times {opcode.name}")
        elif opcode.name not in _VALUES:
            raise pickle.UnpicklingError(f"opcode {opcode.name}, which no array of numbers needs")
    return _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
