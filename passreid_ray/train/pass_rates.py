"""What changes from step to step of PASS pre-training, as a function of the step."""

from dataclasses import dataclass
from fractions import Fraction

from passreid_ray.train.ema import TeacherConfig
from passreid_ray.train.optimizer import OptimizerConfig
from passreid_ray.train.schedules import cosine, linear_warmup

REFERENCE_BATCH_SIZE = 256


@dataclass(frozen=True)
class PassRates:
    """Values of one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    is_last_layer_frozen: bool


@dataclass(frozen=True)
class PassSchedule:
    """The schedules of a run of ``epochs`` of ``steps_per_epoch`` each; PASS (arXiv:2203.03931), section 4.1."""

    optimizer: OptimizerConfig
    teacher: TeacherConfig
    batch_size: int
    epochs: int
    steps_per_epoch: Fraction | int

    @property
    def steps(self) -> int:
        """Length of the run."""
        return int(self.epochs * self.steps_per_epoch)

    def at(self, step: int) -> PassRates:
        """The values of ``step``."""
        epoch = step // self.steps_per_epoch
        return PassRates(
            lr=cosine(
                step,
                start=self.optimizer.lr * self.batch_size / REFERENCE_BATCH_SIZE,
                end=self.optimizer.final_lr,
                steps=self.steps,
                warmup_steps=min(round(self.optimizer.warmup_epochs * self.steps_per_epoch), self.steps),
            ),
            weight_decay=cosine(
                step, start=self.optimizer.weight_decay, end=self.optimizer.final_weight_decay, steps=self.steps
            ),
            teacher_momentum=cosine(step, start=self.teacher.momentum, end=1.0, steps=self.steps),
            teacher_temp=linear_warmup(
                epoch, start=self.teacher.warmup_temp, end=self.teacher.temp, steps=self.teacher.warmup_temp_epochs
            ),
            is_last_layer_frozen=epoch < self.optimizer.frozen_last_layer_epochs,
        )
