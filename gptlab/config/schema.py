"""The typed config: one tree of dataclasses that Hydra fills, `resolve` completes and a run's identity hashes.

Values live here only where every recipe agrees; recipes (conf/) hold the rest. Slots are annotated with their base class, so
Hydra refuses an option that belongs elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from gptlab.config.slots import (
    Attention,
    Block,
    Callback,
    Checkpointing,
    Corpus,
    FeedForward,
    Gate,
    Head,
    Init,
    Input,
    Kernel,
    Norm,
    Objective,
    Optimizer,
    Parametrisation,
    Position,
    Schedule,
    Strategy,
    Stream,
    Tokenizer,
    Tracker,
    Value,
)


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The architecture: sizes, and a component for each slot."""

    width: int = MISSING
    depth: int = MISSING
    heads: int = MISSING
    context_length: int = MISSING
    bias: bool = True
    dropout: float = 0.0
    dial: str = ""  # all: width and heads of 0, batch, budget, rate come from the depth (gptlab/config/dial.py); sizes: all but the rate
    pad_vocab_to: int = 1  # the embedding's rows are padded to a multiple of this; 1: as the tokeniser wishes (bpe: 64)
    norm: Norm = MISSING
    position: Position = MISSING
    attention: Attention = MISSING
    kernel: Kernel = MISSING
    ffn: FeedForward = MISSING
    block: Block = MISSING
    input: Input = MISSING
    stream: Stream = MISSING
    value: Value = MISSING
    gate: Gate = MISSING
    head: Head = MISSING
    init: Init = MISSING
    parametrisation: Parametrisation = MISSING


@dataclass(slots=True, kw_only=True)
class FilterConfig:
    """Which documents are left out of the training text. One of more than about a million characters is not looked at."""

    exact_duplicates: bool = False  # a document whose text, but for white space, was there before
    near_duplicates: float = 0.0  # the share of common 5-word shingles from which a later document goes; 0: off
    validation_overlap: bool = False  # documents that share a run of 13 words with a validation set
    benchmarks: dict[str, str] = field(default_factory=dict)  # name -> file: documents that share 13 words with it go


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """The text, its tokeniser, and what is held out."""

    corpus: Corpus = MISSING
    tokenizer: Tokenizer = MISSING
    validation_fraction: float = 0.1  # the last share of the characters; a stream holds out its first (data.corpus.held_out)
    validation: dict[str, str] = field(default_factory=dict)  # further validation sets: name -> text file
    validation_tokens: int = 0  # tokens measured of each set, in windows spread evenly; 0: all of it
    filter: FilterConfig = field(default_factory=FilterConfig)
    packing: str = "concatenate"  # documents to rows: concatenate (GPT-2's), best_fit (each row begins with a document); chats stay whole
    too_long: str = "cut"  # a chat that no row holds: cut (behind the last turn that fits), drop, refuse


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    """Where and in which number format the work is done."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"  # auto, fp32, bf16 (fp32 weights), bf16_pure (bf16 weights), fp16, fp8
    compile: bool = False
    deterministic: bool = False
    threads: int = 0  # CPU threads; 0: as torch finds them
    micro_batch: int | str = "auto"  # sequences a forward pass holds
    strategy: Strategy = MISSING
    checkpointing: Checkpointing = MISSING


@dataclass(slots=True, kw_only=True)
class TrainerConfig:
    """How long, in which batches, and how often it is written down."""

    budget: str = "2000steps"  # 2000steps, 50Mtokens, 3epochs, 10min, 1e17flops, 20x (tokens per parameter); +20%: beyond `start`; auto
    batch_tokens: int | str = "auto"  # tokens of one update
    gradient_clip: float = 1.0  # largest gradient norm; 0: off
    log_every: int = 10  # steps between lines of metrics.jsonl
    on_nonfinite: str = "stop"  # a loss or gradient that is not finite: stop, skip, or rollback (to the last checkpoint)
    max_passed: int = 10  # batches a run may pass over before it stops after all
    log_spikes: float = 6.0  # a loss this many standard deviations above the recent ones is told; 0: off
    skip_spikes: float = 0.0  # and one this many above is passed over; 0: off
    time_limit: str = ""  # of a session: 11h30min; then a checkpoint, and exit 75
    resume: str = "latest"  # from which of its checkpoints a run goes on: latest, a step, or its folder
    start: str = ""  # RUN@STEP: another run's checkpoint (a step, best or latest) that this one goes on from
    init_from: str = ""  # RUN[@STEP]: begin with another run's weights and tokeniser; the model is its, but for what the overrides change
    profile: str = ""  # steps of a session that torch.profiler records: 20, or 20-25; written to the run's folder profile/
    mirror: str = ""  # an fsspec address that finished checkpoints and metrics are copied to: a folder, s3://…, gs://…, hf://…


@dataclass(slots=True, kw_only=True)
class SeedsConfig:
    """One seed per source of chance; each defaults to `seed`."""

    init: int | None = None
    data: int | None = None
    dropout: int | None = None


@dataclass(slots=True, kw_only=True)
class Config:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    optimizer: Optimizer = MISSING
    schedule: Schedule = MISSING
    objective: Objective = MISSING
    tracker: Tracker = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: dict[str, Callback] = field(default_factory=dict)
    seed: int = 0
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    study: str = "default"  # the folder of runs that are compared
    name: str = ""  # what differs from the base; empty: from the command line
    arm: str = ""  # what the run is called among the arms of its study; empty: by what it differs in


# What cannot change a run's numbers (beyond rounding), and so is no part of its identity.
NOT_IDENTITY: tuple[str, ...] = (
    "model.dial",  # stands in what it has set
    "hardware.device",
    "hardware.strategy",
    "hardware.threads",
    "hardware.micro_batch",
    "hardware.checkpointing",
    "objective.chunk",
    "data.corpus",  # stands in the data's manifest hash, by content
    "data.tokenizer",
    "data.validation_fraction",
    "data.validation",
    "data.filter",
    "tracker",
    "trainer.log_every",
    "trainer.on_nonfinite",  # a run that diverged can go on with another choice; what was passed over is in passed.jsonl
    "trainer.max_passed",
    "trainer.log_spikes",
    "trainer.time_limit",
    "trainer.resume",
    "trainer.profile",
    "trainer.mirror",
    "study",
    "name",
    "arm",
    "seed",  # resolved into seeds
)
