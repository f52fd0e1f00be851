"""What weightfs.torch raises on purpose: each is a WeightfsError, and what safetensors raises in the same case as well.

    NoSuchTensorError      the file has no tensor of that name
    ClosedFileError        the file was closed before
    UnknownChoiceError     a framework or backend that there is none of
    NotInTorchError        torch has no dtype for the tensor, or no way to hold its byte order

A header that does not describe its file is `BadHeaderError`, a `FormatError`; a file that can't be opened is OSError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightfs.errors import FormatError, UsageError, WeightfsError

if TYPE_CHECKING:
    SafetensorError: Any = Exception
else:
    from safetensors import SafetensorError


class NoSuchTensorError(WeightfsError, SafetensorError):  # type: ignore[misc]
    """The file has no tensor of that name."""

    code = "no-tensor"


class ClosedFileError(WeightfsError, SafetensorError):  # type: ignore[misc]
    """The file was closed before it was asked for something."""

    code = "closed"


class UnknownChoiceError(UsageError, SafetensorError):  # type: ignore[misc]
    """A framework or backend that there is none of."""


class NotInTorchError(WeightfsError, SafetensorError):  # type: ignore[misc]
    """Torch can't hold the tensor: it has no such dtype, or the file is of the other byte order."""

    code = "not-in-torch"


class BadHeaderError(FormatError, SafetensorError):  # type: ignore[misc]
    """A header that does not describe its file."""
