"""The training loop, to be read from top to bottom.

A run is a pure function of its configuration and its data: the batch and the learning rate follow from the
step alone, everything else is in the checkpoint. So a run that was killed at any moment and resumed ends with
the same bits as one that was not (same machine, same number of threads).

```python
from bellbox.training import TrainConfig, train

result = train(TrainConfig(folder="runs/tiny", steps=200))
print(result.validation["perplexity"])
```
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Container
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bellbox.calibrate import calibrate
from bellbox.convert import prepare, rotated_weights, unprepare
from bellbox.errors import BellboxError
from bellbox.nn import quantized_layers, using_bits, weights_quantized_once
from bellbox.optim import pull_to_codes
from bellbox.quantizers.learned import LearnedQuantizer
from bellbox.quantizers.running import running_scales_once
from bellbox.runs.average import Average
from bellbox.runs.binding import binding, refuse_changed
from bellbox.runs.build import (
    held_tensors,
    load_model_tensors,
    make_model,
    make_recipe,
    model_tensors,
)
from bellbox.runs.checkpoint import MODEL, Checkpoint, Checkpoints, State
from bellbox.runs.config import TrainConfig
from bellbox.runs.config_file import config_from_dict
from bellbox.runs.metrics import MetricsWriter
from bellbox.runs.open import CONFIG_FILE
from bellbox.runs.phases import Phase, in_words, phase_after, phase_at, phases_of
from bellbox.runs.resolve import resolve
from bellbox.runs.saver import Saver
from bellbox.runs.sharded_state import load_model_shards, optimizer_shards
from bellbox.training import random_state
from bellbox.training.arithmetic import with_arithmetic
from bellbox.training.check import check_trainable, refuse_unsharded
from bellbox.training.data_files import DATA_FILE, refuse_other_files
from bellbox.training.distill import Teacher, divergence
from bellbox.training.distributed import Parallel, speaks_for_all, start
from bellbox.training.finite import checked_forward, find_broken_layer
from bellbox.training.folder import choose_checkpoint, write_what_it_is
from bellbox.training.mec import EntropyTerm
from bellbox.training.modes import debug_mode, determinism
from bellbox.training.nested import widths_of_step
from bellbox.training.optim.groups import ModelOptimizer
from bellbox.training.pretrained import pretrained_weights
from bellbox.training.progress import Progress
from bellbox.training.schedule import projects, pull_share, rates
from bellbox.training.soften import soften, softness
from bellbox.training.stop import Stopped, StopSignals
from bellbox.training.tasks import make_task, open_data
from bellbox.training.text_source import with_prepared_text
from bellbox.training.validation import validate
from bellbox.utils.files import lock

MOST_SKIPPED = 10
"""Steps in a row that `nonfinite: skip` leaves out; the next one ends the run."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended, or how far it came."""

    folder: Path
    """The run folder."""
    step: int
    """Optimizer steps done."""
    total_steps: int
    """Optimizer steps asked for."""
    tokens: int
    """Training tokens (images of a vision task) seen."""
    validation: dict[str, Any] | None
    """The last evaluation record of the run, None where there is none yet."""
    best_loss: float | None
    """Lowest validation loss of the last phase in nats per token or image."""
    stopped_by: int | None = None
    """Number of the signal that stopped it early."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done and validated."""
        return self.stopped_by is None and self.step >= self.total_steps


class Trainer:
    """One run. Building it makes the model; `run` opens the folder, goes on from its last checkpoint, and
    trains.

    Args:
        config: what to train.
        resume: `auto` goes on where the folder holds a checkpoint; None refuses such a folder.
        show: whether to print progress.

    Raises:
        BellboxError: a configuration that cannot be trained.
    """

    def __init__(self, config: TrainConfig, *, resume: Literal["auto"] | None = "auto", show: bool = True):
        config = config.check()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.world = start(config.distributed, config.device)
        show = show and self.world.first
        config, self._why_precision = self._decided(config, show)
        self.dataset = open_data(config)
        self.config = resolve(config, self.dataset)
        self.task = make_task(self.config, self.dataset, self.world)
        self.folder = Path(self.config.folder)
        self.device = self.world.device
        self.resume: Literal["auto"] | None = resume
        self.show = show
        self.teacher = Teacher(self.config, self.device) if self.config.distill.teacher else None
        random_state.seed_all(self.config.seed)
        self.phases = phases_of(self.config)
        check_trainable(self.config)
        if self.world.mode == "fsdp":
            refuse_unsharded(self.config)
        self.phase = self.phases[0]
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.config.checkpoint.keep)
        self.saver = self._make_saver()
        load = self._first_weights()
        self.model = make_model(self.config, self.phase.quantization, load).to(self.device)
        if load is None:  # else given weights bring along what they know of their data
            self.task.start(self.model)
        self.entropy: EntropyTerm | None = None
        self._build_around_model()
        teacher = self.teacher.checksum if self.teacher else ""
        self.state = State(0, 0, 0.0, data=self.task.checksum, teacher=teacher)
        self.saved_step = self._resumed_step = 0
        self._begun_for = self.config.total_steps
        self.signals = StopSignals(launched=self.world.mode != "none")
        self._heard: int | None = None
        self._skipped_in_a_row = 0
        self._timed_tokens, self._timed_seconds = 0, 0.0

    def _make_saver(self) -> Saver | None:
        """What writes sharded checkpoints; None where one process writes whole ones."""
        section = self.config.checkpoint
        sharded = section.kind == "sharded" or (section.kind == "auto" and self.world.size > 1)
        patience = self.config.distributed.timeout
        return Saver(self.checkpoints, section.background, patience) if sharded else None

    def _decided(self, config: TrainConfig, show: bool) -> tuple[TrainConfig, str]:
        """The configuration with what is chosen by machine and folder, and why its precision.

        One process chooses for all, and prepares text.
        """

        def decide() -> tuple[TrainConfig, str]:
            chosen, why = with_arithmetic(config)
            return with_prepared_text(chosen, show), why

        if self.world.size == 1:
            return decide()

        def as_json() -> list[Any]:
            chosen, why = decide()
            return [chosen.to_dict(), why]

        chosen, why = self.world.from_first(as_json)
        return config_from_dict(chosen), why

    def _first_weights(self) -> Callable[[nn.Module], None] | None:
        """Those of `model.from`; None where they are random, or a checkpoint has all of them already."""
        if self.config.model.pretrained is None:
            return None
        if self.world.from_first(lambda: self.checkpoints.last() is not None):
            return None
        return pretrained_weights(self.config)

    def _build_around_model(self, continued: Container[nn.Module] = ()) -> None:
        """The optimizer and the training forward, for the layers that the model has in this phase.

        Args:
            continued: quantizers whose scales are learned already.
        """
        if self.entropy is not None:
            self.entropy.remove()
        self.entropy = EntropyTerm(self.model, self.config.mec) if self.config.mec.weight else None
        optimizer = ModelOptimizer(self.model, self.config.optimizer)
        if optimizer.cewt is not None:
            # Scales and codebooks were set from the weights before their projection.
            for _, layer in quantized_layers(self.model):
                if layer.weight_quantizer is not None and layer.weight_quantizer not in continued:
                    layer.weight_quantizer.initialize(layer.weight_rows())
        # What is computed from whole weights was; now they may become parts.
        norms = optimizer.norms_by_name(self.model)
        self.parallel = Parallel(self.model, self.world, self.config.distributed)
        if self.parallel.sharded:
            optimizer = ModelOptimizer(self.model, self.config.optimizer, norms)
        self.optimizer = optimizer
        self.average = Average(
            self.model, self.config.averaging, self.config.optimizer.cewt, self.config.total_steps
        )
        for module in self.model.modules():
            if isinstance(module, LearnedQuantizer):
                module.share = self.task.share
        # Debug hooks would break a compiled graph anyway.
        compiled = self.config.compile and not self.config.debug
        self.forward = torch.compile(self.parallel.forward) if compiled else self.parallel.forward

    def _enter(self, phase: Phase) -> None:
        """Go over to another phase: weights and their moments stay; the quantizers are made anew, and go on with the
        scales of those before them where these mean the same."""
        states = {name: self.optimizer.state_of(each) for name, each in self.model.named_parameters()}
        if self.parallel.sharded:
            self.model = self._gathered()
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        rotated, former = rotated_weights(self.model), self._learned_quantizers()
        prepare(unprepare(self.model), make_recipe(phase.quantization))
        continued = {
            name: module
            for name, module in self._learned_quantizers().items()
            if name in former and module.continue_from(former[name])
        }
        # Moments are of no use in another domain than they were taken in.
        moved = rotated ^ rotated_weights(self.model)
        kept = {
            name: states[names[parameter]]
            for name, parameter in self.model.named_parameters()
            if parameter in names and parameter not in moved
        }
        for path, module in continued.items():
            full = (f"{path}.{name}" for name, _ in module.named_parameters())
            kept |= {name: states[name] for name in full if name in states}
        self.phase = phase
        if self.config.compile:
            # Else levels that differ from those of the phase before would be traced as variables.
            torch.compiler.reset()
        self._build_around_model(set(continued.values()))
        self.optimizer.carry_over(self.model.named_parameters(), kept)
        # Losses of different phases are losses of different models.
        self.state.phase, self.state.best_loss = phase.index, None

    def _learned_quantizers(self) -> dict[str, LearnedQuantizer]:
        modules = self.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, LearnedQuantizer)}

    def _gathered(self) -> nn.Module:
        """A model as this one, whole in each process, as each had it before it was sharded."""
        model = make_model(self.config, self.phase.quantization).to(self.device)
        load_model_tensors(model, model_tensors(self.model), "the run's model")
        return model

    def run(self) -> RunResult:
        """Train to the last step, or until a signal comes.

        Raises:
            BellboxError: the folder holds another run, or a loss or gradient is not finite, or another process is gone.
                The message of the latter two names the step, and the last checkpoint stays as it is.
            OSError: a checkpoint cannot be written.
        """
        try:
            return self._run()
        except RuntimeError as error:
            lost = self.world.lost(error)
            if lost is None:
                raise
            told = BellboxError(
                f"step {self.state.step + 1}: {lost}; {self._last_saved()}; start it again to go on"
            )
            told.speaks = speaks_for_all(str(told), lost=True)
            raise told from None

    def _run(self) -> RunResult:
        with ExitStack() as stack:
            stack.push(self._leave)
            self.world.from_first(lambda: self._take_folder(stack))
            self._open_folder()
            if self.metrics is not None:
                stack.callback(self.metrics.close)
            stack.enter_context(determinism(self.device))
            stack.enter_context(debug_mode(self.config.debug))
            stack.enter_context(self.signals)
            stack.enter_context(self.progress)
            self._announce()
            while True:
                improved = False
                if self._evaluation_is_due():
                    try:
                        improved = self._evaluate()
                    except Stopped:
                        # The checkpoint says that this step is still to be validated.
                        self._save()
                        break
                if self.saved_step < self.state.step and (improved or self._checkpoint_is_due()):
                    self._save()
                if self._done() or self._stopping:
                    break
                self._train_step()
            if self.saver is not None:
                self.saver.wait()
        return RunResult(
            folder=self.folder,
            step=self.state.step,
            total_steps=self.config.total_steps,
            tokens=self.state.tokens,
            validation=self.validation,
            best_loss=self.state.best_loss,
            stopped_by=self._stopping if self._unfinished() else None,
        )

    def _leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """Take down what joins the processes, unless one of them is gone: then nothing here may wait for it."""
        if kind is not None and not issubclass(kind, BellboxError | OSError):
            return
        if self.saver is not None and kind is not None:
            with suppress(OSError, BellboxError, RuntimeError):  # another error ends the run
                self.saver.wait()
        if kind is None:
            self.world.close()

    def _take_folder(self, stack: ExitStack) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock(self.folder))

    @property
    def _stopping(self) -> int | None:
        """The signal that ends the run: of several processes, one that all have heard of, at the same step."""
        return self.signals.received if self.world.size == 1 else self._heard

    def _open_folder(self) -> None:
        """Find where the run stands, and make the folder say what is about to happen in it."""
        checkpoint = self._find_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)
        self.metrics: MetricsWriter | None = None
        self.validation = self.world.from_first(self._write_what_it_is)
        self.progress = Progress(self.config.total_steps, self.state.step, self.show, self.task.unit)

    def _write_what_it_is(self) -> dict[str, Any] | None:
        """The files that say what the run is; gives its last validation."""
        told = self.config, self.dataset, self.task.tokenizer, self.device, self.state
        self.metrics = write_what_it_is(*told)
        return self.metrics.last_evaluation

    def _announce(self) -> None:
        config, step = self.config, self.state.step
        self.progress.note(
            f"{'going on' if step else 'training'} in {self.folder}: step {step} of {config.total_steps}, "
            f"{config.per_step:,} {self.task.unit} a step in {self.task.passes} passes, "
            f"precision {config.precision} on {self.device}{self._why_precision}"
            + (f", {self.world.size} processes ({self.world.mode})" if self.world.mode != "none" else "")
        )
        first = None if self._done() else self.task.batch_checksum(step)
        if first is not None:
            self.progress.note(f"data: the batch of step {step + 1} has the sha256 {first[:16]}")
        if self.teacher and self.teacher.unchecked:
            self.progress.note(f"distill.teacher: {self.teacher.unchecked}")
        if step and self._begun_for < config.total_steps:
            self.progress.note(
                f"steps: {self._begun_for} before, {config.total_steps} now; from here on the learning rate follows "
                "the longer schedule"
            )
        if len(self.phases) > 1:
            self.progress.note(f"phases: {in_words(self.phases)}")

    def _find_checkpoint(self) -> Checkpoint | None:
        """The one to go on from. The first process chooses; all read it."""
        if self.world.size == 1:
            checkpoint, self._begun_for = choose_checkpoint(self.config, self.checkpoints, self.resume)
            return checkpoint
        chosen: list[Checkpoint] = []

        def choose() -> tuple[int | None, int]:
            checkpoint, begun_for = choose_checkpoint(self.config, self.checkpoints, self.resume)
            chosen.extend(filter(None, [checkpoint]))
            return (chosen[0].step if chosen else None), begun_for

        step, self._begun_for = self.world.from_first(choose)
        if step is None:
            return None
        return chosen[0] if chosen else self.checkpoints.at(step, verified=True)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.world.from_first(lambda: refuse_other_files(self.dataset, self.folder / DATA_FILE))
        if checkpoint.state.data != self.state.data:
            raise BellboxError(f"{self.config.data.described} is not what '{self.folder}' was begun with")
        if checkpoint.state.teacher != self.state.teacher:
            raise BellboxError(
                f"distill.teacher '{self.config.distill.teacher}' is not what '{self.folder}' was begun with"
            )
        refuse_changed(checkpoint, self.config, self.folder / CONFIG_FILE)
        phase = phase_after(self.phases, checkpoint.step)
        if phase != self.phase:
            self._enter(phase)
        if checkpoint.layout is None:
            load_model_tensors(self.model, checkpoint.model_tensors(), str(checkpoint.path))
            tensors = checkpoint.optimizer_tensors()
        else:
            load_model_shards(self.model, checkpoint, MODEL)
            tensors = optimizer_shards(self.model, checkpoint)
        try:
            tensors = self.average.restore(tensors, checkpoint.step)
            self.optimizer.restore(self.model.named_parameters(), tensors)
        except (KeyError, ValueError) as error:
            raise BellboxError(
                f"{checkpoint.path}: the optimizer's state does not fit the model: {error}"
            ) from None
        try:
            random_state.restore(checkpoint.random_of(self.world.rank))
        except BellboxError as error:
            raise BellboxError(f"{checkpoint.path}/state.json: {error}") from None
        self.state, self.saved_step = checkpoint.state, checkpoint.step
        self._resumed_step = checkpoint.step

    def _done(self) -> bool:
        return self.state.step >= self.config.total_steps

    def _unfinished(self) -> bool:
        return not self._done() or self.state.evaluated_step < self.state.step

    def _evaluation_is_due(self) -> bool:
        step = self.state.step
        return step > self.state.evaluated_step and (self._done() or step % self.config.eval_every == 0)

    def _checkpoint_is_due(self) -> bool:
        stopping = self._done() or self._stopping is not None
        return stopping or self.state.step % self.config.checkpoint_every == 0

    def _train_step(self) -> None:
        config, state = self.config, self.state
        begun = time.monotonic()
        phase = phase_at(self.phases, state.step)
        if phase != self.phase:
            self.progress.note(f"step {state.step + 1:>6}  from here on: {phase.label}")
            self._enter(phase)
        lr, ball = rates(config, state.step)
        self.model.train()
        if config.phases.soft:
            soften(self.model, softness(config, state.step))
        if state.step == self.phase.start and (self.world.size > 1 or self.parallel.sharded):
            self._set_first_scales()
        self.optimizer.zero_grad()
        parts = [(x.to(self.device), y.to(self.device)) for x, y in self.task.micro_batches(state.step)]
        # Running statistics take in a batch before its loss is known.
        kept = [(b, b.clone()) for b in self.model.buffers()] if config.nonfinite == "skip" else []
        total = torch.zeros(6, device=self.device)
        try:
            widths = self._widths()
            with running_scales_once(self.model):
                for number, bits in enumerate(widths, 1):
                    with using_bits(self.model, bits):
                        total[:4] += self._backward(parts, len(widths), last=number == len(widths))
        except BellboxError as error:
            raise BellboxError(f"step {state.step + 1}: {error}; {self._last_saved()}") from None
        norm_value = self.parallel.clip_gradients(config.optimizer.clip or math.inf)
        objective, loss_value, apart, entropy = self._of_all(total)
        finite = math.isfinite(objective) and math.isfinite(norm_value)
        if not finite and (config.nonfinite == "stop" or self._skipped_in_a_row >= MOST_SKIPPED):
            raise self._broken_step(parts, objective, norm_value)
        project = projects(config.optimizer.cewt, state.step + 1, phase.end, config.total_steps)
        if finite:
            self._skipped_in_a_row = 0
            share = pull_share(config, state.step)
            if share > 0 and self.optimizer.cewt is not None:
                pull_to_codes(self.model, share)
            self.optimizer.step(lr, ball, project)
            self.optimizer.refit_codebooks(self.model, state.step + 1)
            self.parallel.agree_on_statistics()
            self.average.update(state.step)
        else:
            self._skip(kept, project)

        state.step += 1
        state.tokens += config.per_step
        elapsed = time.monotonic() - begun
        state.seconds += elapsed
        self._timed_tokens += config.per_step
        self._timed_seconds += elapsed
        self.progress.step(state.step, loss_value)
        if finite and (state.step % config.log_every == 0 or self._done()):
            self._record(
                {
                    "kind": "train",
                    "step": state.step,
                    "phase": state.phase,
                    "tokens": state.tokens,
                    "loss": loss_value,
                    **self.task.fields(loss_value),
                    "lr": lr,
                    "grad_norm": norm_value,
                    **({"skipped": state.skipped} if state.skipped else {}),
                    **({"divergence": apart} if self.teacher else {}),
                    **({"mec": entropy} if self.entropy else {}),
                    "tokens_per_s": self._timed_tokens / self._timed_seconds,
                    "seconds": state.seconds,
                }
            )
            self._timed_tokens, self._timed_seconds = 0, 0.0

    def _widths(self) -> tuple[int | None, ...]:
        """Those that the next step trains, see `training.nested`."""
        return widths_of_step(self.phase.quantization, self.config.seed, self.state.step)

    def _backward(self, parts: list[tuple[Tensor, Tensor]], widths: int, last: bool) -> Tensor:
        """Add the gradients of a step's micro-batches, at the width that is used; their mean `_losses` over `widths`.

        Args:
            parts: inputs and targets.
            widths: how many the step adds up.
            last: whether no other follows.
        """
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        held = weights_quantized_once(self.model, dtype) if len(parts) > 1 else nullcontext()
        total = torch.zeros(4, device=self.device)
        with held:
            for number, (inputs, targets) in enumerate(parts, 1):
                with self.parallel.accumulating(number < len(parts) or not last):
                    losses = self._losses(inputs, targets) / (len(parts) * widths)
                    losses[0].backward()
                total += losses.detach()
        return total

    @torch.no_grad()
    def _skip(self, kept: list[tuple[Tensor, Tensor]], project: bool) -> None:
        """Leave the step out: nothing of its batch stays but its number."""
        for buffer, was in kept:
            buffer.copy_(was)
        self.optimizer.zero_grad()
        if project and self.optimizer.cewt is not None:
            self.optimizer.cewt.project()
        self.state.skipped += 1
        self._skipped_in_a_row += 1
        self.progress.note(
            f"step {self.state.step + 1:>6}  left out, its loss or gradient is not finite; "
            f"{self.state.skipped} so far"
        )

    def _set_first_scales(self) -> None:
        """Scales of inputs from the batch that one process would have taken them from, equally in all of them."""
        autocast = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"
        )
        inputs = self.task.first_inputs(self.state.step).to(self.device)
        if any(isinstance(module, LearnedQuantizer) for module in self.model.modules()):
            with autocast, using_bits(self.model, self._widths()[0]):
                calibrate(self.model, [inputs])
        if self.entropy is not None:
            self.entropy.forget()

    def _of_all(self, total: Tensor) -> list[float]:
        """The means over all processes of `[objective, loss, divergence, entropy]`; and hear of signals and failures.

        Raises:
            OSError: a checkpoint could not be written; in all processes at the same step.
        """
        failed = self.saver is not None and self.saver.failed
        if self.world.size > 1:
            total[4], total[5] = self.signals.received or 0, float(failed)
            total = self.world.add_up(total)
            total[:4] /= self.world.size
            self._hear(int(total[4]) > 0)
            failed = int(total[5]) > 0
        if failed and self.saver is not None:
            self.saver.wait()
        return total[:4].tolist()

    def _hear(self, signalled: bool) -> None:
        """Of several processes: remember that one of them has got a signal."""
        if signalled and self._heard is None:
            self._heard = self.signals.received or signal.SIGTERM

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """What is minimised, the data's loss, the teacher's divergence and the entropy term (0 without): `[4]`."""
        watched = checked_forward(self.model) if self.config.debug else nullcontext()
        autocast = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"
        )
        # A phase's first batch sets the scales of the activations, a branch that no compiled graph should hold.
        forward = self.parallel.forward if self.state.step == self.phase.start else self.forward
        with watched, autocast:
            logits = forward(inputs)
            wanted = self.teacher.logits(inputs) if self.teacher else None
        objective = loss = self.task.loss(logits, targets)
        apart = entropy = torch.zeros_like(loss)
        if self.teacher is not None and wanted is not None:
            apart = divergence(logits, wanted, self.teacher.temperature)
            share = self.teacher.weight
            objective = (1 - share) * loss + share * apart
        if self.entropy is not None:
            entropy = self.entropy.value()
            objective = objective + self.config.mec.weight * entropy
        return torch.stack((objective, loss, apart, entropy))

    def _broken_step(self, parts: list[tuple[Tensor, Tensor]], loss: float, norm: float) -> BellboxError:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        if self.parallel.sharded:
            return BellboxError(
                f"step {self.state.step + 1}: {what}; {self._last_saved()}; try a lower optimizer.lr, or go on from "
                "there in one process or with distributed.mode ddp, which names the layer"
            )
        self.parallel.forward = self.forward = self.model
        found = ""
        for bits, (inputs, targets) in itertools.product(self._widths(), parts):
            with using_bits(self.model, bits):
                found = find_broken_layer(self.model, lambda x=inputs, y=targets: self._losses(x, y)[0])
            if not found.startswith("run again"):
                break
        # The batch of another process may be the one that broke.
        everywhere = self.world.from_each(found)
        found = next((each for each in everywhere if not each.startswith("run again")), found)
        return BellboxError(
            f"step {self.state.step + 1}: {what}: {found}; {self._last_saved()}; try a lower optimizer.lr"
        )

    def _last_saved(self) -> str:
        step = self.saved_step if self.saver is None else self.saver.durable or self._resumed_step
        saved = self.checkpoints.path(step)
        return f"the last checkpoint is {saved}" if step else "no checkpoint was saved yet"

    def _evaluate(self) -> bool:
        """Validate over the whole split, in fp32; True where it is the best so far."""
        if self._heard is not None:
            raise Stopped
        state, begun = self.state, time.monotonic()
        # Of several processes, none may leave alone.
        interruptible = self.signals.interruptible() if self.world.size == 1 else nullcontext()
        # Innermost: a signal that came while weights are settled or put back would leave a part of them so.
        with self.parallel.whole_weights(), self.average.judged() as model, interruptible:
            result, loss = validate(model, self.task, self.config.mec, self.world, self.device)
        state.seconds += time.monotonic() - begun
        improved = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        state.evaluated_step, state.loss = state.step, loss
        if improved:
            state.best_loss = loss
        self.validation = {
            "kind": "eval",
            "step": state.step,
            "phase": state.phase,
            "tokens": state.tokens,
            **result,
            "seconds": state.seconds,
        }
        self._record(self.validation)
        return improved

    def _record(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)
        self.progress.record(record)

    def _save(self) -> None:
        begun, state = time.monotonic(), self.state
        if state.evaluated_step != state.step:
            state.loss = None
        state.random = random_state.capture()
        parameters = self.model.named_parameters()
        if self.saver is None:
            moments, tensors = self.optimizer.tensors(parameters), model_tensors(self.model)
            self.world.from_first(lambda: self._write_checkpoint(tensors, moments))
        else:
            self.saver.save(
                state,
                held_tensors(self.model),
                {**self.optimizer.held(parameters), **self.average.tensors()},
                binding(self.config, self.task.tokenizer),
                before=None if self.metrics is None else self.metrics.sync,
            )
        self.saved_step = state.step
        state.seconds += time.monotonic() - begun

    def _write_checkpoint(self, tensors: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        assert self.metrics is not None
        self.metrics.sync()
        self.checkpoints.save(
            self.state,
            tensors,
            {**moments, **self.average.tensors()},
            binding(self.config, self.task.tokenizer),
        )


def train(config: TrainConfig, *, resume: Literal["auto"] | None = "auto", show: bool = True) -> RunResult:
    """Train a model as `config` says, going on from the folder's last checkpoint; see `Trainer`."""
    return Trainer(config, resume=resume, show=show).run()
