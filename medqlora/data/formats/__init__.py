"""The dataset formats, one module per dataset.

Importing this package imports every module in it, and each module registers its own format.
"""

import importlib
import pkgutil

# The modules come in the order of their names, so FORMATS has the same order everywhere.
# `fields` and `registry` are read too and register nothing.
for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
