"""Pictures, HTML pages and animations of attention, training curves and beam search."""

import os
import sys
from contextlib import suppress

if (_backend := os.environ.get("MPLBACKEND")) and "matplotlib" not in sys.modules:
    # A notebook's, which its commands inherit, may be of a package that is not installed for them.
    # Then matplotlib cannot be imported, though only `figures.show` needs a backend.
    del os.environ["MPLBACKEND"]
    with suppress(ImportError, ValueError):
        import matplotlib

        matplotlib.rcParams["backend"] = _backend
    os.environ["MPLBACKEND"] = _backend
