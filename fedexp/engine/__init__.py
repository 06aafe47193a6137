"""Where and how cohorts run: packed onto lanes, spread over devices, one compiled program a round."""

from fedexp.engine.engine import Engine as Engine
from fedexp.engine.preparing import PreparedRound as PreparedRound
from fedexp.engine.strategies import auto as auto
from fedexp.engine.strategies import debug as debug
from fedexp.engine.strategies import jit as jit
from fedexp.engine.strategies import mesh as mesh
from fedexp.engine.strategies import pmap as pmap
from fedexp.engine.strategy import Packing as Packing
from fedexp.engine.strategy import Strategy as Strategy
