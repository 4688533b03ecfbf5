"""Do something once another package's module has been imported: so that `import vptq` need not import it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(name: str, do: Callable[[ModuleType], None]) -> None:
    """Call `do` with the module of that name, now if it is loaded, else as soon as it is; once, however often this is called.

    A name is waited for by one only.
    """
    loaded = sys.modules.get(name)
    if loaded is not None:
        do(loaded)
    elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, do))


class _Waiting(importlib.abc.MetaPathFinder):
    """Lets the import of one module go its way, then does what is waited for."""

    def __init__(self, name: str, do: Callable[[ModuleType], None]) -> None:
        self.name, self.do = name, do

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        run = loader.exec_module

        def run_and_do(module: ModuleType) -> None:
            run(module)
            self.do(module)

        loader.exec_module = run_and_do  # type: ignore[method-assign]
        return spec
