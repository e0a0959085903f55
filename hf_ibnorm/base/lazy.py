"""Imports put off: names of a package on demand, and functions called once a module of another library is imported."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def on_demand(
    package: str, homes: Mapping[str, Sequence[str]], made: Mapping[str, Callable[[str], Any]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` (PEP 562) of a package that imports a module when one of its names is first used.

    `homes` is module → public names in it; `made` is prefix → function that makes what a name with that prefix stands
    for, from the rest of the name. The modules themselves are attributes of the package too.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in home:
            value = getattr(import_module(f"{package}.{home[name]}"), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}"):
            value = import_module(f"{package}.{name}")
        elif prefix := next((prefix for prefix in made or {} if name.startswith(prefix)), None):
            value = (made or {})[prefix](name.removeprefix(prefix))
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # Python asks `__getattr__` only once
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return __getattr__, __dir__


class _AfterImport(MetaPathFinder):
    """Finds modules by the other finders, and calls a function with each module of `then` after its execution."""

    def __init__(self, then: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self.then = then

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in self.then:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec: ModuleSpec | None = next(filter(None, others), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_call(module: ModuleType) -> None:
            execute(module)
            self.then[fullname](module)

        spec.loader.exec_module = execute_then_call  # type: ignore[method-assign]
        return spec


def after_import(package: str, then: Mapping[str, Callable[[ModuleType], None]], all_at_once: bool = True) -> None:
    """Call functions with modules of `package` as soon as these are imported, or now if they are already.

    `then` is module in the package → function, which may be called again with the same module. No other thread sees a
    module before its function has, except a module that was imported before this call. Where the package is imported
    already, so are its modules now, unless not `all_at_once`: then a thread that is importing one may see it before.
    """
    named = {f"{package}.{name}": function for name, function in then.items()}
    if package not in sys.modules or not all_at_once:
        sys.meta_path.insert(0, _AfterImport(named))
    if package in sys.modules:  # perhaps since a moment: another thread imported it before the finder was there
        for name, function in named.items():
            if all_at_once or name in sys.modules:
                function(import_module(name))  # waits for a thread that is just importing it
