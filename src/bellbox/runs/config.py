"""A training run's configuration: what is written in the YAML file, what the flags are, what a run saves.

`TrainConfig` is what somebody asks for, `ResolvedConfig` what a run is. Both are frozen: `dataclasses.replace` makes
another one. One tree of dataclasses serves all three, so a key has one name everywhere: `optimizer.lr` in a message is
`lr` under `optimizer:` in the file and `--optimizer.lr` on the command line. The defaults are the recipe of
the BBQ paper (arXiv 2603.01599) where it does not depend on the size of the model; the batch and the budget
are sized for the `tiny` preset. The paper's own: `batch.tokens: 262144`, `data.context: 512`, and 95M to 300M
presets.

```yaml
folder: runs/small
model: {preset: tiny}
data: {source: classics, context: 256}
quantization: {method: bbq, bits: 2}
optimizer: {lr: 1.2e-3}
steps: 1000
```
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from bellbox.core.grid import levels_from_bits
from bellbox.core.planes import check_widths
from bellbox.data.mixture import check_weights
from bellbox.errors import BellboxError
from bellbox.runs.limits import Limits, refuse_beyond
from bellbox.utils.processor import MAX_THREADS

_FORBID: dict[str, Any] = {"extra": "forbid"}
DEFAULT_STEPS = 1000
MOST_STEPS = 10**12

Count = Annotated[int, Limits(ge=1)]
Interval = Annotated[int, Limits(ge=1, le=MOST_STEPS)]
Positive = Annotated[float, Limits(gt=0)]
NotNegative = Annotated[float, Limits(ge=0)]
Fraction = Annotated[float, Limits(ge=0, lt=1)]
Share = Annotated[float, Limits(gt=0, le=1)]
Rule = Literal["ours", "published"]


PAPER = "bbq_paper"
"""Method name of `Recipe.bbq_paper`; all others are quantizers' own."""
CEWT = "cewt"
"""Method name of `Recipe.cewt`: CEWT as published, its optimizer and initialisation included."""
CEWT_RATES = {"ours": 0.02, "published": 0.01}
"""Peak rate of the hyperball where a run of before `hyperball_rate` named none."""


def hyperball_rate(rule: str, steps: int) -> float:
    """Peak rate of the hyperball where a run names none, in units of the weight's norm.

    Ours falls with the cube root of the steps: a longer run has the time to settle, and at a rate that is too high its
    weights never do. 0.18 goes through what was best at 512, 2,048 and 6,512 steps (docs/studies-appendix.md, "The rate
    of the hyperball"); runs of less than 216 steps take what 216 do. The published one is that of 95M and 125M.
    """
    return 0.01 if rule == "published" else round(0.18 / max(steps, 216) ** (1 / 3), 5)


def rule_of(rule: Rule, method: str, recipe: object) -> Rule:
    """`CewtSection.rule` as it holds: the published one always with the method `cewt`.

    Args:
        rule: `optimizer.cewt.rule`.
        method: `quantization.method`.
        recipe: `quantization.recipe`, in whose presence the method says nothing.
    """
    return "published" if recipe is None and method == CEWT else rule


@dataclass(frozen=True)
class ModelSection:
    """Which network."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    preset: str = "tiny"
    """Name of a preset of `bellbox.models`: tiny, small, 95M, 125M, 200M, 300M, gpt-95M, ...; resnet-small, ..."""
    overrides: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Fields of the preset to change, by name. Vocabulary, classes, channels and image size follow the data."""
    pretrained: str | None = None
    """`from` in files and `--model.from`: begin with the weights of this folder, a Hugging Face model or a run, in
    place of random ones. Preset and overrides must describe the same network."""


@dataclass(frozen=True)
class DataSection:
    """Which text, or which images."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    source: str = "classics"
    """A folder made by `bellbox data prepare`, or `classics`, the bundled public-domain books; or text that is prepared
    into the run's folder first: a file, a folder of them, hf:NAME[:CONFIG][:SPLIT]. Of a vision task: an
    .npz file, a folder of IDX files, a folder with train/CLASS/*, `fashion-mnist`, or hf:NAME."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Several prepared corpora in place of one source, each with its weight: `{data/books: 0.3, data/web: 0.7}`. Of
    the training sequences each gives its share, whatever its size; validation is on all of them."""
    valid: list[str] = field(default_factory=list)
    """Validation text beside a source that is prepared first; a hundredth of the source where none is given."""
    tokenizer: str | None = None
    """Tokenizer for a source that is prepared first: a folder or file of one. One is trained where null."""
    vocab_size: int | None = None
    """Entries of the tokenizer that is trained; 8,192 where null."""
    context: Count = 256
    """Tokens in a sequence."""
    seed: Annotated[int, Limits(ge=0, le=2**63 - 1)] = 0
    """Seed of the order in which sequences or images come, and of what augmentation draws."""

    @property
    def sources(self) -> list[str]:
        """All that is read."""
        return list(self.mixture) or [self.source]

    @property
    def name(self) -> str:
        """What is read, in words."""
        return " + ".join(f"{weight:g} {path}" for path, weight in self.mixture.items()) or self.source

    @property
    def described(self) -> str:
        """The key and its value, for messages."""
        return f"data.mixture '{self.name}'" if self.mixture else f"data.source '{self.source}'"


@dataclass(frozen=True)
class QuantizationSection:
    """How many levels weights and activations get, and where. What is null is the method's own choice."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    method: str = "bbq"
    """One of `bellbox.quantizers.METHODS` (bbq, quest, lsq, ...), `bbq_paper` for BBQ just as published (`bbq` is
    `Recipe.bbq`, `cewt` is `Recipe.cewt` with its optimizer), or `none` for full precision."""
    bits: int | None = 2
    """Bits of weights and activations: 1 to 8. Ignored where `levels` or `nested` is given."""
    levels: int | None = None
    """Number of levels in place of bits; 3 is ternary."""
    nested: list[int] = field(default_factory=list)
    """Several widths of one model in place of bits, the widest first: [4, 3, 2, 1] (docs/nested.md). Weights and
    inputs have the same one; `activation_bits` keeps inputs at one. With `method: bbq`."""
    nested_schedule: Literal["draw", "sum"] = "draw"
    """draw: each step trains one of the nested widths, all of them equally often. sum: each step trains all, by the
    mean of their losses, which takes as many forwards and backwards."""
    nested_draws: Count = 1
    """With draw: widths that each step trains, a divisor of their number."""
    activation_bits: int | None = None
    """Bits of activations, where they are not those of weights: bits 2 and activation_bits 4 is W2A4."""
    zero_point: float | None = None
    """Shift of the integer grid, a multiple of 1/2."""
    granularity: Literal["token", "ema", "tensor", "learned"] | None = None
    """How an activation's RMS is taken: per token (causal), running mean, or whole tensor (the paper's)."""
    weight_granularity: Literal["row", "tensor", "learned"] | None = None
    """Likewise for a weight."""
    block: int | None = None
    """Largest size of the Hadamard blocks along in_features; 1 for none."""
    options: dict[str, bool | float | str] = field(default_factory=dict)
    """Options of the method by name (docs/methods.md)."""
    weight_only: Literal["float", "int8"] | None = None
    """Quantize weights only; leave activations in `float`, or round them to 8 bits."""
    weights_rotated: bool | None = None
    """Whether weights are learned in the rotated domain; where null, with BBQ and with CEWT they are."""
    share: bool = True
    """Whether layers that read the same tensor (q, k, v; gate, up) share one activation quantizer."""
    integer_forward: bool | None = None
    """Whether linear layers multiply integers in training too (docs/training.md). Null: with BBQ on a CPU with the
    compiled kernels, where it is faster."""
    embedding_bits: Literal[4, 8, 32] | None = None
    """Round embeddings and output layer to so many bits while training, as they are then shipped; 32 leaves them alone.
    Null: `bellbox train` takes 8, but for full precision and what is as published; elsewhere 32."""
    embedding_group: Literal[32, 64] | None = None
    """Columns that share a scale with 4 bits; 64 where null (32 where 64 do not divide)."""
    head_bits: Literal[4, 8, 32] | None = None
    """Bits of the output layer where they are not those of the embeddings; 32 leaves it alone."""
    recipe: dict[str, Any] | None = None
    """A whole recipe with rules by layer name, in place of all the other keys of this section."""


@dataclass(frozen=True)
class PhasesSection:
    """Full precision first, then quantized, perhaps with fewer bits from time to time."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    quantized: Annotated[float, Limits(gt=0, le=1, says="in (0, 1], or optimal")] | Literal["optimal"] = 1.0
    """Fraction of the steps trained quantized, after the rest in full precision; 1: from the first step.
    `optimal`: by the law of arXiv 2509.22935, from tokens, parameters and bits (see `bellbox.runs.planner`)."""
    bits_before: list[Annotated[int, Limits(ge=1, le=8, says="bits from 1 to 8")]] | None = None
    """Bits of the quantized steps before those of `quantization`: [4, 3] with bits 2 trains 4, then 3, then 2. []: one
    width throughout. Null: language models of BBQ with at most 3 bits train one bit more for the first half of at least
    2048 steps (`bellbox.runs.open_phases`)."""
    shares: list[Annotated[float, Limits(gt=0, lt=1, says="numbers between 0 and 1")]] = field(
        default_factory=list
    )
    """Share of the quantized steps for each of these widths and the final one; equal where not given."""
    soft: Annotated[float, Limits(ge=0, le=1)] = 0.0
    """Share of the quantized steps, the first ones, in which weights of BBQ harden, from the box that is not cut to
    codes (bellbox.training.soften); 0 for none."""


@dataclass(frozen=True)
class PullSection:
    """Weights pulled towards the values of their codes, after CAGE (bellbox.optim.pull). With BBQ."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    weight: NotNegative = 0.0
    """CAGE's lambda at its peak: a step moves a weight by this times the rate (of the hyperball, where there is one) of
    the way; 0 for none."""
    last: Share = 0.2
    """Share of the steps, the last ones, over which it rises from 0 to its peak."""


@dataclass(frozen=True)
class CewtSection:
    """Constrained weights: of constant norm, made exactly Gaussian from time to time (`optim.cewt`)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    every: Annotated[int, Limits(ge=0)] | None = None
    """Steps between projections; 0: no constraint at all, 1: after each. Where null, 16 with BBQ, 1 with the rule
    `published`, else 0."""
    hyperball: bool = True
    """Whether an update is scaled to the weight's norm, in place of weight decay."""
    until: Share = 1.0
    """Share of the steps, the first ones, in which weights are projected; below 1 the run's last weights are not."""
    lr: Annotated[float, Limits(gt=0, lt=1)] | None = None
    """Peak learning rate of the hyperball, in units of the weight's norm; it follows `schedule`. `optimizer.lr` is
    then for all other parameters. Where null, 0.18 over the cube root of the steps (at most 0.03), and 0.01 with the
    rule `published`."""
    end_factor: Annotated[float, Limits(ge=0, le=1, says="in [0, 1]")] | None = None
    """Last rate of the hyperball, as a fraction of its peak; that of `schedule` where null."""
    warmup: Fraction | None = None
    """Fraction of the steps in which its rate rises; that of `schedule` where null."""
    pull: PullSection = field(default_factory=PullSection)
    """Towards the values of codes."""
    rule: Rule = "ours"
    """`published`, always with `method: cewt`: linear layers begin as LeCun's, N(0, 1/in_features); the output layer's
    weight is on the hyperball too, never projected; other weights are first projected by the first step."""


@dataclass(frozen=True)
class OptimizerSection:
    """The optimizer and the gradient clip."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    kind: Literal["adamw", "muon", "soap"] = "adamw"
    """AdamW; or Muon (torch.optim.Muon) or SOAP (of pytorch-optimizer, the extra `soap`) for the matrices inside the
    blocks, and AdamW for all else."""
    lr: Positive = 1.2e-3
    """Peak learning rate. The paper: 1.2e-3 at 95M and 125M, 6e-4 at 200M, 3e-4 at 300M."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled decay, of the weights of linear layers only."""
    decay_head: bool = True
    """Whether the layer that gives the logits decays too; the BBQ authors leave it out."""
    clip: NotNegative = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    momentum: Fraction = 0.95
    """Of Muon."""
    muon_dtype: Literal["bf16", "fp32"] = "bf16"
    """What Muon orthogonalises in. bf16 as published; fp32 takes longer, and does not make more of a last bit."""
    cewt: CewtSection = field(default_factory=CewtSection)
    """Constrained weights."""


@dataclass(frozen=True)
class DistillSection:
    """Learning from a teacher's distribution besides the text (bellbox.training.distill)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    teacher: str | None = None
    """A run or Hugging Face folder with the same tokenizer, usually in full precision; null for no teacher."""
    weight: Share = 0.5
    """Share of the teacher in the loss, in (0, 1]; the rest is the text's."""
    temperature: Positive = 1.0
    """Both distributions are softened by it."""


@dataclass(frozen=True)
class MecSection:
    """A term that makes a layer's features carry as much as they can: MEC-style, see bellbox.objectives.mec."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    weight: NotNegative = 0.0
    """What the term, from -1 to 0, is multiplied by and added to the loss; 0 for none."""
    layer: str | None = None
    """The layer by name; the output layer where null."""
    side: Literal["input", "output"] = "input"
    """What of it: of the output layer, its input is the pooled representation."""
    distortion: Positive = 64.0
    """Squared error a dimension that the code may make."""
    experts: Count = 1
    """Groups of channels that are coded by themselves, which takes less time."""
    form: Literal["exact", "taylor"] = "exact"
    """The determinant itself, or the first terms of a series."""
    order: Count = 4
    """Terms of the series."""


@dataclass(frozen=True)
class ScheduleSection:
    """One cycle of the learning rate, both legs a half cosine."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    warmup: Fraction = 0.1
    """Fraction of the steps spent rising."""
    start_factor: Share = 0.01
    """First learning rate, as a fraction of the peak."""
    end_factor: Annotated[float, Limits(ge=0, le=1, says="in [0, 1]")] = 0.1
    """Last learning rate, as a fraction of the peak."""


@dataclass(frozen=True)
class AverageSection:
    """Weights averaged over the last steps, validated and loaded in place of the trained ones."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    last: Annotated[float, Limits(ge=0, le=1, says="in [0, 1]")] = 0.0
    """Share of the steps, the last ones, whose weights are averaged; 0 for no average."""
    decay: Annotated[float, Limits(gt=0, lt=1, says="between 0 and 1")] | None = None
    """Of a running average over them; their plain mean where null."""

    def begins(self, steps: int) -> int:
        """The first of a run's steps whose weights count, from 0."""
        return steps - round(self.last * steps)


@dataclass(frozen=True)
class BatchSection:
    """How much text one optimizer step sees."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    tokens: Count = 8192
    """Tokens in one optimizer step. The paper: 262144."""
    micro_sequences: Count = 8
    """Sequences in one forward pass; the number of passes in a step follows from it."""


@dataclass(frozen=True)
class VisionSection:
    """Images and what is done to them, for `task: vision`; the sections batch and distill, and data.context, are for
    language only."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    image_size: Annotated[int, Limits(ge=1, le=4096)] | None = None
    """Height and width that images are scaled and cropped to, for sources that hold images of any size."""
    train_images: Count | None = None
    """Train on so many of the images; all where null."""
    valid_images: Count | None = None
    """Validate on so many; all where null."""
    batch: Annotated[int, Limits(ge=2)] = 128
    """Images in one optimizer step."""
    micro_batch: Count | None = None
    """Images in one forward pass; as many as in a step where null."""
    crop: Annotated[int, Limits(ge=0, le=256)] = 4
    """Pixels by which training images are moved at random, each way; 0 for none."""
    flip: bool = True
    """Mirror training images at random."""
    mixup: NotNegative = 0.0
    """Both numbers of mixup's Beta distribution; 0 for none."""
    cutmix: NotNegative = 0.0
    """Likewise of cutmix. Where both are on, each batch gets one of them."""
    label_smoothing: Fraction = 0.0
    """Share of the target that is spread over all classes."""
    ema: Fraction = 0.0
    """`average: {decay: this, last: 1}` in one word: decay of weights averaged from the first step on; 0 for none."""


@dataclass(frozen=True)
class DistributedSection:
    """Several processes that train one model, started by torchrun (docs/distributed.md). Decides no number of a run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    mode: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """ddp: each process holds the whole model. fsdp: weights, gradients and moments are sharded, block by block. auto:
    ddp where torchrun started the process, else none."""
    shard: Literal["all", "node"] | int = "all"
    """With fsdp: processes that share one copy of the weights. Fewer than all of them is hybrid sharding, and node is
    those of one machine."""
    reshard: bool = True
    """With fsdp: let go of a block's whole weights after its forward; false takes more memory, less communication."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """With fsdp: dtype in which gradients are added up between processes. Weights travel in fp32, which codes follow
    from; `precision` is what is computed in."""
    checkpoint_activations: bool = False
    """Keep only the inputs of blocks for the backward and run each block again there: less memory, a third more time.
    In any mode."""
    timeout: Annotated[float, Limits(ge=1, le=86400, says="from 1 to 86400 seconds")] = 600.0
    """Seconds that a process waits for the others: at the start, in each exchange, and for their disks."""


@dataclass(frozen=True)
class CheckpointSection:
    """How checkpoints are written (docs/reliability.md). It decides no number of a run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    kind: Literal["auto", "whole", "sharded"] = "auto"
    """whole: two files, by one process. sharded: each process writes a file of what it holds. auto: sharded where there
    are several processes."""
    background: bool = True
    """Of sharded ones: train on while they are written."""
    keep: Interval = 2
    """How many of the newest stay, besides the best."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, as its owner asks for it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _FORBID
    folder: str = "runs/train"
    """Where the run lives."""
    task: Literal["language", "vision"] = "language"
    """Predict the next token, or name what an image shows."""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    quantization: QuantizationSection = field(default_factory=QuantizationSection)
    phases: PhasesSection = field(default_factory=PhasesSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    average: AverageSection = field(default_factory=AverageSection)
    distill: DistillSection = field(default_factory=DistillSection)
    mec: MecSection = field(default_factory=MecSection)
    batch: BatchSection = field(default_factory=BatchSection)
    vision: VisionSection = field(default_factory=VisionSection)
    distributed: DistributedSection = field(default_factory=DistributedSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    steps: Count | None = None
    """Optimizer steps. Give this or `tokens`; with neither, 1000 steps."""
    tokens: Count | None = None
    """Budget in tokens (of a vision task, in images), rounded up to whole steps."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast dtype of the training forward; `auto` takes bf16 where the processor or GPU has units for it, else fp32,
    and a run goes on with what it began with. Master weights and evaluation are fp32 in both."""
    compile: bool = False
    """Pass the training forward through torch.compile."""
    seed: Annotated[int, Limits(ge=-(2**63), le=2**63 - 1)] = 0
    """Seed of the initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    threads: Annotated[int, Limits(ge=1, le=MAX_THREADS)] | None = None
    """CPU threads; PyTorch's choice where not given."""
    eval_every: Interval = 100
    """Steps between validations. The last step is always validated."""
    checkpoint_every: Interval = 100
    """Steps between checkpoints. The last step and every new best are always saved."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is NaN or infinite does: end the run with the layer that it comes from, or leave the
    step out and count it. Ten such steps in a row end the run all the same."""
    log_every: Interval = 10
    """Steps between training records."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    trackers: list[Literal["wandb", "mlflow", "aim"]] = field(default_factory=list)
    """Show the same numbers there too, each an extra of its own (docs/training.md). One that fails stops nothing."""
    debug: bool = False
    """Check every layer's output in every forward; slow, but names the layer at once."""
    methods_from: list[str] = field(default_factory=list)
    """Modules outside of Bellbox that the run's methods came from. Written down when a run begins; nothing is imported
    because a file names it."""

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step."""
        return self.batch.tokens // self.data.context

    @property
    def per_step(self) -> int:
        """Tokens in one optimizer step; images of a vision task."""
        return self.vision.batch if self.task == "vision" else self.batch.tokens

    @property
    def accumulation(self) -> int:
        """Forward passes in one optimizer step."""
        if self.task == "vision":
            return self.vision.batch // (self.vision.micro_batch or self.vision.batch)
        return self.sequences_per_step // self.batch.micro_sequences

    @property
    def averaging(self) -> AverageSection | None:
        """How weights are averaged, `vision.ema` of a vision task counted; None where they are not."""
        if self.task == "vision" and self.vision.ema:
            return AverageSection(last=1.0, decay=self.vision.ema)
        return self.average if self.average.last else None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.tokens is not None:
            return -(-self.tokens // self.per_step)
        return DEFAULT_STEPS if self.steps is None else self.steps

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, as YAML and JSON hold them."""
        values = _plain(dataclasses.asdict(self))
        values["model"]["from"] = values["model"].pop("pretrained")  # a word that no field of Python may have
        return values

    def check(self) -> TrainConfig:
        """Refuse values that cannot be trained with; returns self.

        Raises:
            BellboxError: naming the key, its value and the limit.
        """
        refuse_beyond(self)
        if self.task == "vision":
            _check_vision(self)
        else:
            _check_batch(self)
        _check_cewt(self)
        _check_average(self)
        _check_soft(self)
        _check_mixture(self)
        _check_known(self.quantization, self.methods_from)
        _check_method(self.quantization)
        _check_nested(self)
        if self.steps is not None and self.tokens is not None:
            raise BellboxError(
                f"steps is {self.steps} and tokens is {self.tokens}: give one of them, the other as null"
            )
        if not 1 <= self.total_steps <= MOST_STEPS:
            limit = "at least 1" if self.total_steps < 1 else f"at most {MOST_STEPS}"
            raise BellboxError(f"steps is {self.total_steps}, must be {limit}")
        taught = self.distill.teacher is not None
        for key, default in vars(DistillSection()).items():
            value = getattr(self.distill, key)
            if key != "teacher" and not taught and value != default:
                raise BellboxError(f"distill.{key} is {value}, must be left at {default} without a teacher")
        if not isinstance(self.distributed.shard, str) and self.distributed.shard < 1:
            raise BellboxError(
                f"distributed.shard is {self.distributed.shard}, must be all, node or at least 1"
            )
        if self.compile and self.mec.weight:
            raise BellboxError("compile is True, must be false with mec: a compiled graph hides its layers")
        return self


@dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """A configuration that nothing is left open in: checked, and with what follows from the data and the machine.

    `bellbox.runs.resolve` makes it, once; a run saves it as config.yaml, and all that trains or measures takes it.
    """

    steps: int = DEFAULT_STEPS
    tokens: None = None
    precision: Literal["bf16", "fp32"] = "fp32"


def _check_batch(config: TrainConfig) -> None:
    context, tokens, micro = config.data.context, config.batch.tokens, config.batch.micro_sequences
    if tokens % context:
        near = max(round(tokens / context), 1) * context
        raise BellboxError(
            f"batch.tokens is {tokens}, not a whole number of sequences of data.context {context}; "
            f"{near} would be"
        )
    if (tokens // context) % micro:
        raise BellboxError(
            f"batch.tokens {tokens} makes {tokens // context} sequences of {context}, which "
            f"batch.micro_sequences {micro} does not divide; choose one that does"
        )


def _check_cewt(config: TrainConfig) -> None:
    section, quantization = config.optimizer.cewt, config.quantization
    for key in ("end_factor", "warmup"):
        if getattr(section, key) is not None and not section.hyperball:
            raise BellboxError(
                f"optimizer.cewt.{key} is {getattr(section, key)}, but hyperball is False, so there is no rate of its "
                "own; leave one of them out"
            )
    if not section.pull.weight:
        return
    if quantization.recipe is not None or quantization.method not in ("bbq", PAPER) or quantization.nested:
        what = "a recipe" if quantization.recipe is not None else f"method {quantization.method}"
        raise BellboxError(
            f"optimizer.cewt.pull.weight is {section.pull.weight} with {'nested' if quantization.nested else what}: "
            "only a code of bbq, of one width, says what to pull a weight to; set it to 0"
        )
    if section.every == 0 or (section.every is None and quantization.method == PAPER):
        raise BellboxError(
            f"optimizer.cewt.pull.weight is {section.pull.weight}, but no weights are constrained; give "
            "optimizer.cewt.every (with until, where they are not to be projected), or set the weight to 0"
        )


def _check_average(config: TrainConfig) -> None:
    section = config.average
    if section.decay is not None and not section.last:
        raise BellboxError(
            f"average.decay is {section.decay}, but average.last is 0, so nothing is averaged; give average.last too"
        )
    if section.last and not round(section.last * config.total_steps):
        raise BellboxError(
            f"average.last is {section.last}: none of the {config.total_steps} steps; give it more of them"
        )
    if config.task == "vision" and config.vision.ema and section.last:
        raise BellboxError("average.last and vision.ema are both given; leave one of them out")


def _check_soft(config: TrainConfig) -> None:
    section = config.quantization
    if config.phases.soft and (section.recipe is not None or section.method not in ("bbq", PAPER)):
        what = "a recipe" if section.recipe is not None else f"method {section.method}"
        raise BellboxError(
            f"phases.soft is {config.phases.soft} with {what}: only bbq has a box to cut; set it to 0"
        )
    if config.phases.soft and config.compile:
        raise BellboxError(
            f"phases.soft is {config.phases.soft}, must be 0 with compile: a compiled graph has one softness"
        )


def _check_mixture(config: TrainConfig) -> None:
    section = config.data
    if not section.mixture:
        return
    if config.task == "vision":
        raise BellboxError("data.mixture is for language; leave it out of a vision task")
    if section.source != DataSection().source:
        raise BellboxError(
            f"data.source is '{section.source}' and data.mixture is given: leave one of them out"
        )
    check_weights(section.mixture)


def _check_vision(config: TrainConfig) -> None:
    section = config.vision
    micro = section.batch if section.micro_batch is None else section.micro_batch
    if config.distill.teacher is not None:
        raise BellboxError("distill.teacher is for language; leave it out of a vision task")
    if section.batch % micro:
        raise BellboxError(f"vision.micro_batch is {section.micro_batch}, must be a divisor of vision.batch")


def methods_named(section: QuantizationSection) -> set[str]:
    """The quantizers' own methods that a section asks for."""
    if section.recipe is None:
        return {"bbq" if section.method == PAPER else section.method} - {"none"}
    rules = section.recipe.get("rules", ())
    sides = (
        rule.get(side)
        for rule in (rules if isinstance(rules, list | tuple) else ())
        if isinstance(rule, dict)
        for side in ("weights", "activations")
    )
    return {
        side["method"] for side in sides if isinstance(side, dict) and isinstance(side.get("method"), str)
    }


def _check_known(section: QuantizationSection, modules: list[str]) -> None:
    """Name the modules that a run's method came from, where they were not imported."""
    from bellbox.quantizers.registry import is_known

    if not modules:
        return
    missing = sorted(method for method in methods_named(section) if not is_known(method))
    if missing:
        flags = " ".join(f"--import {name}" for name in modules)
        raise BellboxError(
            f"quantization: no method {missing[0]!r} is known here, it came from the module {', '.join(modules)}: "
            f"import it again ({flags})"
        )


def _check_method(section: QuantizationSection) -> None:
    from bellbox.quantizers import check_method

    if section.recipe is not None or section.method == "none":
        return
    if section.activation_bits is not None and section.weight_only is not None:
        raise BellboxError(
            f"quantization.activation_bits is {section.activation_bits}, but weight_only leaves activations no bits to "
            "choose; leave one of them out"
        )
    try:
        if section.activation_bits is not None:
            levels_from_bits(section.activation_bits)
        check_method("bbq" if section.method == PAPER else section.method, section.options)
    except BellboxError as error:
        raise BellboxError(f"quantization: {error}") from None


def _check_nested(config: TrainConfig) -> None:
    section = config.quantization
    if not section.nested:
        return
    try:
        check_widths(section.nested)
    except BellboxError as error:
        raise BellboxError(f"quantization.nested: {error}") from None
    if section.method != "bbq":
        raise BellboxError(
            f"quantization.nested is given with method {section.method}: only the codes of bbq nest; take method bbq, "
            "or leave nested out"
        )
    if len(section.nested) % section.nested_draws:
        raise BellboxError(
            f"quantization.nested_draws is {section.nested_draws}, must be a divisor of the {len(section.nested)} "
            "nested widths"
        )
    if section.nested_schedule == "sum" and section.nested_draws != 1:
        raise BellboxError(
            f"quantization.nested_draws is {section.nested_draws}, but nested_schedule sum trains all widths in each "
            "step; leave one of them out"
        )
    against = ("levels", section.levels), ("weight_only", section.weight_only), ("recipe", section.recipe)
    for key, value in against:
        if value is not None:
            raise BellboxError(
                f"quantization.nested and quantization.{key} are both given; nested says the widths of weights and "
                "inputs, so leave one of them out"
            )
    if config.compile:
        raise BellboxError(
            "compile is True, must be false with quantization.nested, whose graph has many widths"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
