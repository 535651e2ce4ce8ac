"""Properties that are computed once. Python 3.11's own take a lock for that, a microsecond each time one is first read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["lazy"]

if TYPE_CHECKING:
    from functools import cached_property as lazy
else:

    class lazy:
        """The value is kept in the instance's dictionary, where the next read finds it before this."""

        def __init__(self, compute: Any) -> None:
            self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

        def __get__(self, instance: Any, owner: type) -> Any:
            if instance is None:
                return self
            value = self.compute(instance)
            instance.__dict__[self.name] = value
            return value
