"""Where a cohort runs: one engine, several ways to place it."""

from fedexp.strategies.base import Strategy as Strategy
from fedexp.strategies.compiled import auto as auto
from fedexp.strategies.compiled import jit as jit
from fedexp.strategies.compiled import mesh as mesh
from fedexp.strategies.compiled import pmap as pmap
from fedexp.strategies.debug import debug as debug
from fedexp.strategies.runner import PreparedRound as PreparedRound
from fedexp.strategies.runner import Runner as Runner
