"""A pytest plugin that has one module loaded from another file: `MUTANT_MODULE` names it, `MUTANT_FILE` the file."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class Replacement(MetaPathFinder):
    """Finds the mutant where the module is asked for."""

    def __init__(self, module: str, file: str) -> None:
        self._module, self._file = module, file

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the mutant's place for the module, nothing for any other."""
        return importlib.util.spec_from_file_location(fullname, self._file) if fullname == self._module else None


if "MUTANT_MODULE" in os.environ:
    assert os.environ["MUTANT_MODULE"] not in sys.modules, "the module was loaded before its mutant"
    sys.meta_path.insert(0, Replacement(os.environ["MUTANT_MODULE"], os.environ["MUTANT_FILE"]))
