"""The network: `net.build(options, num_classes)`. Depends on torch alone, which is imported when a network is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from net.network import build

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from net.network import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
