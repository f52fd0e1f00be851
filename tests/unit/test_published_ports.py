"""What `snapshot restore --publish` takes."""

from __future__ import annotations

import pytest

from checkpoint.instances import Published
from weightfs.cli.snapshotting import parse_published
from weightfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("18000:8000", Published(host="127.0.0.1", port=18000, inside=8000)),
        ("0.0.0.0:1:65535", Published(host="0.0.0.0", port=1, inside=65535)),
    ],
)
def test_ports(text: str, published: Published) -> None:
    assert parse_published(text) == published


@pytest.mark.parametrize("text", ["", "8000", "0:8000", "8000:65536", "a:b", "1:2:", ":1:2x", "1:-2", "\u0661:\u0662"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="publishes nothing"):
        parse_published(text)
