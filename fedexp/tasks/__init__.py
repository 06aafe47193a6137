"""Tasks: a model, a loss and metrics for a family of data sets."""

from fedexp.tasks.base import Measure as Measure
from fedexp.tasks.base import Metric as Metric
from fedexp.tasks.base import Task as Task
from fedexp.tasks.base import add_by_segment as add_by_segment
from fedexp.tasks.base import confusion_counts as confusion_counts
from fedexp.tasks.base import gradient as gradient
from fedexp.tasks.base import masked_sums as masked_sums
from fedexp.tasks.base import mean_loss as mean_loss
from fedexp.tasks.base import measures as measures
from fedexp.tasks.base import with_derived as with_derived
from fedexp.tasks.classification import classification as classification
from fedexp.tasks.flax_task import flax_task as flax_task
from fedexp.tasks.images import Augment as Augment
from fedexp.tasks.images import crop_and_flip as crop_and_flip
from fedexp.tasks.images import handwriting as handwriting
from fedexp.tasks.images import scale as scale
from fedexp.tasks.images import standardize as standardize
from fedexp.tasks.language import next_token as next_token
from fedexp.tasks.metrics import accuracy as accuracy
from fedexp.tasks.metrics import cross_entropy as cross_entropy
from fedexp.tasks.metrics import top_k_accuracy as top_k_accuracy
from fedexp.tasks.reconstruction import reconstruction as reconstruction
from fedexp.tasks.statistics import carrying_statistics as carrying_statistics
from fedexp.tasks.statistics import join_statistics as join_statistics
from fedexp.tasks.statistics import split_statistics as split_statistics
from fedexp.tasks.tags import tag_prediction as tag_prediction
