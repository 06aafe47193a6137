"""What a client and the server do, one paper a file."""

from fedexp.algorithms import optimizers as optimizers
from fedexp.algorithms.aggregation import aggregate as aggregate
from fedexp.algorithms.aggregation import init_client as init_client
from fedexp.algorithms.apfl import apfl as apfl
from fedexp.algorithms.ditto import ditto as ditto
from fedexp.algorithms.fedavg import averaging as averaging
from fedexp.algorithms.fedavg import fedavg as fedavg
from fedexp.algorithms.feddyn import feddyn as feddyn
from fedexp.algorithms.fednova import fednova as fednova
from fedexp.algorithms.fedper import fedper as fedper
from fedexp.algorithms.fedprox import fedprox as fedprox
from fedexp.algorithms.fine_tuning import fine_tuning as fine_tuning
from fedexp.algorithms.local import local_training as local_training
from fedexp.algorithms.mime import mime as mime
from fedexp.algorithms.q_fedavg import q_fedavg as q_fedavg
from fedexp.algorithms.scaffold import scaffold as scaffold
from fedexp.algorithms.trials import trial as trial
from fedexp.algorithms.trials import trials as trials
from fedexp.contracts import Algorithm as Algorithm
from fedexp.contracts import Clients as Clients
from fedexp.contracts import ClientWork as ClientWork
from fedexp.contracts import Cohort as Cohort
from fedexp.contracts import ForEachClient as ForEachClient
from fedexp.contracts import Pass as Pass
from fedexp.contracts import RoundOutput as RoundOutput
