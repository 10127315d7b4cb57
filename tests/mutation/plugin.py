"""A pytest plugin that has one module loaded from another file: `MUTANT_MODULE` names it, `MUTANT_FILE` the file.

It also holds the process to `MUTANT_MEMORY_BYTES` and, if that is set, `MUTANT_CPU_SECONDS`.
"""

import importlib.util
import os
import resource
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

LOADED_BEFORE: Final = 90
"""The status of a run in which the module had been loaded before its mutant could be."""


class Replacement(MetaPathFinder):
    """Finds the mutant where the module is asked for."""

    def __init__(self, module: str, file: str) -> None:
        self._module, self._file = module, file

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the mutant's place for the module, nothing for any other."""
        return importlib.util.spec_from_file_location(fullname, self._file) if fullname == self._module else None


# Here, not between fork and exec in the parent: that one has threads. The time ends a mutant's loop also where the
# parent was ended and can wait no longer.
for limit, variable in ((resource.RLIMIT_AS, "MUTANT_MEMORY_BYTES"), (resource.RLIMIT_CPU, "MUTANT_CPU_SECONDS")):
    if variable in os.environ:
        resource.setrlimit(limit, (int(os.environ[variable]), int(os.environ[variable])))

if "MUTANT_MODULE" in os.environ:
    if os.environ["MUTANT_MODULE"] in sys.modules:
        os._exit(LOADED_BEFORE)  # pytest would make a failure of any error here, and each mutant were noticed
    sys.meta_path.insert(0, Replacement(os.environ["MUTANT_MODULE"], os.environ["MUTANT_FILE"]))
