"""`fedexp sweep` from a source checkout: python -m launch.sweep."""

import sys

from fedexp.sweep import main

if __name__ == "__main__":
    sys.exit(main())
