"""What happens to client updates on their way to the server."""

from fedexp.aggregators.base import Aggregator as Aggregator
from fedexp.aggregators.mean import mean as mean
