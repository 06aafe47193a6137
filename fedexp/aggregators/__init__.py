"""What happens to client updates on their way to the server, one idea a file."""

from fedexp.aggregators.bulyan import bulyan as bulyan
from fedexp.aggregators.centred_clipping import centred_clipping as centred_clipping
from fedexp.aggregators.chain import Aggregators as Aggregators
from fedexp.aggregators.chain import as_aggregator as as_aggregator
from fedexp.aggregators.chain import chain as chain
from fedexp.aggregators.clip import clip_by_norm as clip_by_norm
from fedexp.aggregators.drive import drive as drive
from fedexp.aggregators.ef21 import ef21 as ef21
from fedexp.aggregators.error_feedback import error_feedback as error_feedback
from fedexp.aggregators.gaussian_noise import gaussian_noise as gaussian_noise
from fedexp.aggregators.geometric_median import geometric_median as geometric_median
from fedexp.aggregators.half_precision import half_precision as half_precision
from fedexp.aggregators.krum import krum as krum
from fedexp.aggregators.mean import mean as mean
from fedexp.aggregators.median import coordinate_median as coordinate_median
from fedexp.aggregators.qsgd import qsgd as qsgd
from fedexp.aggregators.quantize import quantize as quantize
from fedexp.aggregators.random_k import random_k as random_k
from fedexp.aggregators.rotated_quantize import rotated_quantize as rotated_quantize
from fedexp.aggregators.signs import signs as signs
from fedexp.aggregators.terngrad import terngrad as terngrad
from fedexp.aggregators.top_k import top_k as top_k
from fedexp.aggregators.trimmed_mean import trimmed_mean as trimmed_mean
