"""`fedexp launch` from a source checkout: python -m launch.local."""

import sys

from fedexp.launch import launch as launch
from fedexp.launch import main

if __name__ == "__main__":
    sys.exit(main())
