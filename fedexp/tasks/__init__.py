"""Tasks: a model, a loss and metrics for a family of data sets."""

from fedexp.tasks.base import Measure as Measure
from fedexp.tasks.base import Metric as Metric
from fedexp.tasks.base import Task as Task
from fedexp.tasks.base import confusion_counts as confusion_counts
from fedexp.tasks.base import masked_sums as masked_sums
from fedexp.tasks.base import mean_loss as mean_loss
from fedexp.tasks.base import measures as measures
from fedexp.tasks.base import segment_sums as segment_sums
from fedexp.tasks.classification import classification as classification
from fedexp.tasks.classification import handwriting as handwriting
from fedexp.tasks.classification import scale as scale
from fedexp.tasks.metrics import accuracy as accuracy
from fedexp.tasks.metrics import cross_entropy as cross_entropy
from fedexp.tasks.metrics import top_k as top_k
