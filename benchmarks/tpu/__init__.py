"""What a TPU's compiler expects of fedexp's programs: `python -m benchmarks.tpu --help`."""

from __future__ import annotations
