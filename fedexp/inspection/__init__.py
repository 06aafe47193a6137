"""What a data set holds and what an experiment costs, for `python -m fedexp.inspect` to print."""

from fedexp.inspection.build import Built as Built
from fedexp.inspection.build import Module as Module
from fedexp.inspection.build import built as built
from fedexp.inspection.build import modules as modules
from fedexp.inspection.cost import Evaluating as Evaluating
from fedexp.inspection.cost import Expected as Expected
from fedexp.inspection.cost import Load as Load
from fedexp.inspection.cost import Memory as Memory
from fedexp.inspection.cost import Timing as Timing
from fedexp.inspection.cost import evaluating as evaluating
from fedexp.inspection.cost import expected as expected
from fedexp.inspection.cost import load as load
from fedexp.inspection.cost import memory as memory
from fedexp.inspection.cost import peak_bytes as peak_bytes
from fedexp.inspection.cost import rounds as rounds
from fedexp.inspection.cost import training as training
from fedexp.inspection.picture import draw as draw
from fedexp.inspection.picture import shown as shown
from fedexp.inspection.splits import Census as Census
from fedexp.inspection.splits import census as census
from fedexp.inspection.splits import heterogeneity as heterogeneity
from fedexp.inspection.splits import heterogeneity_by_chance as heterogeneity_by_chance
