"""The roof: loops over steps, with validation, checkpoints, progress and pictures."""

from mtml_fast.trainers.evaluation import Evaluation as Evaluation
from mtml_fast.trainers.evaluation import evaluate as evaluate
from mtml_fast.trainers.keras_style import History as History
from mtml_fast.trainers.keras_style import MultiTaskMetaLearningModel as MultiTaskMetaLearningModel
from mtml_fast.trainers.meta_learner import MetaLearnerTrainer as MetaLearnerTrainer
from mtml_fast.trainers.trainer import Trainer as Trainer
