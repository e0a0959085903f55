"""The interface between the training loop and a task. A task has a file here; `state.py` calls its `open_task`.

The language task's data is in `data.py`, `cache.py`, `corpus.py` and `tokenizer.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ibnorm.base.errors import UserError

from ..settings import TrainConfig
from ..start import Start


@dataclass(frozen=True)
class StepShape:
    """How the sequences of a step are divided among processes and micro-batches."""

    per_device: int  # sequences of a micro-batch
    micro_batches: int  # of one process in one step
    processes: int = 1
    process: int = 0  # the index of this process

    @property
    def sequences(self) -> int:
        """Sequences of one step, over all processes."""
        return self.per_device * self.micro_batches * self.processes


@dataclass(frozen=True)
class Batch:
    """The part of a step's data that this process trains on."""

    parts: list[tuple[Tensor, Tensor]]  # inputs and targets of each micro-batch
    tokens: int  # targets that count, over all processes
    sha: str  # hash of the data: of all processes or of this one, see `Batches.shared_sha`
    bad: int = 0  # documents that this process has left out so far, because they cannot be read


class Batches:
    """The batches of a run, one a step. A thread makes the next batch, and hashes it, while a step computes."""

    shared_sha: bool  # whether `Batch.sha` is the hash of the data of all processes
    position: Any  # of the next batch

    def __init__(self, shape: StepShape) -> None:
        self.shape = shape
        self._maker = ThreadPoolExecutor(1)
        self._coming: Future[tuple[Batch, Any]] | None = None

    def make(self, position: Any) -> tuple[Batch, Any]:
        """The batch at `position`, and the position after it. Called in the thread."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The position of the next batch, as JSON can hold it."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on at a position that `state` gave. Only before the first batch."""
        raise NotImplementedError

    def coming(self) -> Future[tuple[Batch, Any]]:
        """The next batch, which is being made."""
        if self._coming is None:
            self._coming = self._maker.submit(self.make, self.position)
        return self._coming

    def next(self) -> Batch:
        """The next batch; UserError where there is none, as `trouble` says, and the position stays as it was."""
        batch, self.position = self.coming().result()
        self._coming = None
        self.coming()
        return batch

    def trouble(self, stop: Callable[[], bool] = lambda: False) -> UserError | None:
        """Why there will be no next batch; waits until that is known, or `stop()` says that no batch is needed."""
        return None

    def close(self) -> None:
        """End the threads."""
        self._maker.shutdown(cancel_futures=True)


class Task(ABC):
    """Data, model, loss and validation of a run. `make_model` comes first, then `read_data`, then everything else.

    What one process needs to go on is `batches.state()`, of one form on all processes: a run may go on with more
    processes, which begin with the state of process 0.
    """

    config: TrainConfig  # `make_model` sets the fields of the model that were left open
    processor: Any  # the tokenizer or image processor, which is saved beside every model
    batches: Batches

    @abstractmethod
    def make_model(self, start: Start) -> tuple[PreTrainedModel, Any]:
        """The model in float32, and its config of step 0: after a resume the model's norms have λ along its ramp."""

    @abstractmethod
    def hashes(self) -> dict[str, str | None]:
        """Hashes of all that decides batches and loss, by their keys in `layout.HASHES`; a stream has none."""

    @abstractmethod
    def read_data(self) -> None:
        """Make the batches; UserError where the data cannot be read, or there is none."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """The entries of `environment.json` about the data."""

    @abstractmethod
    def summary(self) -> str:
        """The training data and the steps on it, in a few words."""

    @abstractmethod
    def flops_per_token(self, skeleton: PreTrainedModel) -> float | None:
        """Floating point operations that training on one token takes, a teacher's included; None if they are unknown.

        `skeleton` is the model on the meta device.
        """

    @abstractmethod
    def blank_part(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the shape of a micro-batch, on the device."""

    @abstractmethod
    def loss(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The loss of a micro-batch, and the teacher's divergence in it (None without one): sums over its targets.

        `model` is in training mode; `part` has inputs and targets, on the model's device.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, asked_to_stop: Callable[[], bool]) -> float | None:
        """Mean loss over the validation data; None where a process was asked to stop before all of it was seen."""
