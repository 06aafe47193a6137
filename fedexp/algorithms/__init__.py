"""What a client and the server do, as the papers have it."""

from fedexp.algorithms import optimizers as optimizers
from fedexp.algorithms.base import Algorithm as Algorithm
from fedexp.algorithms.base import Clients as Clients
from fedexp.algorithms.base import ClientWork as ClientWork
from fedexp.algorithms.base import Cohort as Cohort
from fedexp.algorithms.base import ForEachClient as ForEachClient
from fedexp.algorithms.base import RoundOutput as RoundOutput
from fedexp.algorithms.fedavg import fedavg as fedavg
from fedexp.algorithms.scaffold import scaffold as scaffold
