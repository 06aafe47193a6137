"""Where a cohort runs: one engine, several ways to place it."""

from fedexp.strategies.debug import debug as debug
from fedexp.strategies.jit import jit as jit
from fedexp.strategies.runner import PreparedRound as PreparedRound
from fedexp.strategies.runner import Runner as Runner
