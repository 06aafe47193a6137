# What fedexp uses of Gin, which has no annotations; what it returns depends on a decorator's argument.
from collections.abc import Callable
from typing import Any, TypeVar, overload

from gin import config as config

_T = TypeVar("_T")

REQUIRED: Any

@overload
def configurable(name_or_fn: str | None = None, /, **options: Any) -> Callable[[_T], _T]: ...
@overload
def configurable(name_or_fn: _T, /) -> _T: ...
def __getattr__(name: str) -> Any: ...
