"""What happens to client updates on their way to the server, one idea a file."""

from fedexp.aggregators.bulyan import bulyan as bulyan
from fedexp.aggregators.centred_clipping import centred_clipping as centred_clipping
from fedexp.aggregators.chain import Aggregators as Aggregators
from fedexp.aggregators.chain import as_aggregator as as_aggregator
from fedexp.aggregators.chain import chain as chain
from fedexp.aggregators.clip import clip_by_norm as clip_by_norm
from fedexp.aggregators.gaussian_noise import gaussian_noise as gaussian_noise
from fedexp.aggregators.geometric_median import geometric_median as geometric_median
from fedexp.aggregators.krum import krum as krum
from fedexp.aggregators.mean import mean as mean
from fedexp.aggregators.median import coordinate_median as coordinate_median
from fedexp.aggregators.quantize import quantize as quantize
from fedexp.aggregators.top_k import top_k as top_k
from fedexp.aggregators.trimmed_mean import trimmed_mean as trimmed_mean
