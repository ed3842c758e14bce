"""`resolve`: the only place where an `auto` becomes a value. A pure function of the config, the machine and the data."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace

from gptlab.config.dial import turned
from gptlab.config.errors import ConfigError
from gptlab.config.registry import component_of
from gptlab.config.schema import Config, HardwareConfig, ModelConfig, TrainerConfig
from gptlab.config.slots import Options

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_DURATION = re.compile(r"^\s*(?:([0-9]*\.?[0-9]+)\s*h)?\s*(?:([0-9]*\.?[0-9]+)\s*min)?\s*(?:([0-9]*\.?[0-9]+)\s*s)?\s*$")
_BUDGET = re.compile(r"^\s*(\+?)\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([kMBGT]?)\s*(steps?|tokens?|epochs?|min|flops|x|%)\s*$")
_STEPS = re.compile(r"^\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?$")
MOST_PROFILED = 100  # steps: each takes about a megabyte of the trace
ON_NONFINITE = ("stop", "skip", "rollback")
PRECISIONS = ("auto", "fp32", "bf16", "bf16_pure", "fp16", "fp8")
# Below this width a model's CPU step is dominated by overhead, and bf16's conversions cost what its products gain (measured:
# width 128 no faster, width 384 1.7 times).
BF16_WIDTH_ON_CPU = 256
DEFAULT_SEQUENCES = 12  # batch_tokens=auto
CPU_MICRO_TOKENS, GPU_MICRO_TOKENS = 16_384, 65_536  # tokens of one forward pass with micro_batch=auto


@dataclass(frozen=True)
class Machine:
    """What `resolve` needs to know of the machine."""

    devices: tuple[str, ...]  # types present, best first: ("cuda", "cpu")
    cpu_bf16: bool = False  # bf16 matrix instructions
    gpu_bf16: bool = False
    gpu_fp8: bool = False
    ranks: int = 1  # processes that share each batch


@dataclass(frozen=True)
class Budget:
    """How long a run trains: `amount` of `unit` (steps, tokens, epochs, min, flops or x).

    `beyond`: not in all, but from where the run begins (trainer.start); % is then of the steps before.
    """

    amount: float
    unit: str
    beyond: bool = False

    def steps(self, *, batch_tokens: int, epoch_tokens: int, parameters: int, flops_per_token: float, start: int = 0) -> int | None:
        """Whole steps of the run, rounded up; None where only the clock decides. `start`: the step it begins at."""
        if self.unit == "min":
            return None
        if self.beyond:
            more = replace(self, beyond=False).steps(
                batch_tokens=batch_tokens, epoch_tokens=epoch_tokens, parameters=parameters, flops_per_token=flops_per_token, start=start
            )
            return None if more is None else start + more
        if self.unit == "steps":
            return int(self.amount)
        if self.unit == "%":
            return max(1, math.ceil(self.amount / 100 * start - 1e-9))
        tokens = {
            "tokens": self.amount,
            "epochs": self.amount * epoch_tokens,
            "flops": self.amount / flops_per_token,
            "x": self.amount * parameters,
        }[self.unit]
        return max(1, math.ceil(tokens / batch_tokens - 1e-9))


def parse_budget(text: str) -> Budget:
    """`2000steps`, `50Mtokens`, `3epochs`, `10min`, `1e17flops` or `20x`; `+100steps` or `+20%` beyond a start. Raises ConfigError."""
    match = _BUDGET.match(str(text))
    if match is None:
        raise ConfigError(f"trainer.budget={text} needs an amount and a unit: 2000steps, 50Mtokens, 3epochs, 10min, 1e17flops or 20x")
    beyond, amount = bool(match[1]), float(match[2]) * _UNITS[match[3]]
    unit = match[4] if match[4] in ("min", "flops", "x", "%") else match[4].rstrip("s") + "s"
    if unit == "%" and not beyond:
        raise ConfigError(f"trainer.budget={text} is a share of nothing: +{text.strip()} trains so much beyond trainer.start")
    if not 0 < amount < math.inf or (unit == "steps" and amount != int(amount)):
        raise ConfigError(f"trainer.budget={text} must be a positive{' whole' if unit == 'steps' else ''} number of {unit}")
    return Budget(amount, unit, beyond)


def start_step(config: Config) -> int:
    """The step a run begins at: that of the checkpoint trainer.start names (settled: by identity and step), or 0."""
    step = config.trainer.start.rpartition("@")[2]
    return int(step) if step.isdigit() else 0


def parse_duration(text: str) -> float:
    """Seconds of `11h30min`, `90min`, `45s`; infinity for an empty text. Raises ConfigError."""
    if not text:
        return math.inf
    match = _DURATION.match(text)
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    found = 3600 * hours + 60 * minutes + seconds
    if not 0 < found < math.inf:
        raise ConfigError(f"trainer.time_limit={text} is no duration: 11h30min, 90min or 45s")
    return found


def parse_profile(text: str) -> range:
    """The steps of `20` or `20-25`, counted from 1; none for an empty text. Raises ConfigError."""
    if not text:
        return range(0)
    match = _STEPS.match(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"trainer.profile={text} names no step of a session; 20 is its 20th step, 20-25 the six from there")
    if last - first >= MOST_PROFILED:
        raise ConfigError(f"trainer.profile={text} is {last - first + 1} steps; {MOST_PROFILED} are the most whose trace can be opened")
    return range(first, last + 1)


def resolve(config: Config, machine: Machine) -> Config:
    """The complete, final config. Raises ConfigError for what this machine cannot do and for values out of range."""
    config = turned(config, machine.ranks)
    if config.trainer.budget == "auto":
        config = replace(config, trainer=replace(config.trainer, budget=TrainerConfig().budget))
    _check(config)
    hardware = _resolve_hardware(config.hardware, config.model, machine)
    context = config.model.context_length
    batch = config.trainer.batch_tokens
    if batch == "auto":
        batch = DEFAULT_SEQUENCES * context
    batch = _whole("trainer.batch_tokens", batch)
    if batch % context:
        raise ConfigError(
            f"trainer.batch_tokens={batch} is not a multiple of model.context_length={context}; "
            f"try {max(1, round(batch / context)) * context}"
        )
    rows, rest = divmod(batch // context, machine.ranks)
    if rest or not rows:
        raise ConfigError(
            f"trainer.batch_tokens={batch} makes {batch // context} sequences of {context} tokens, which {machine.ranks} ranks "
            f"cannot share evenly; try {max(1, round(batch / context / machine.ranks)) * machine.ranks * context}"
        )
    micro = hardware.micro_batch
    if micro == "auto":
        limit = CPU_MICRO_TOKENS if hardware.device == "cpu" else GPU_MICRO_TOKENS
        micro = _largest_divisor(rows, max(1, limit // context))
    micro = _whole("hardware.micro_batch", micro)
    if rows % micro:
        whose = "a batch" if machine.ranks == 1 else f"each of the {machine.ranks} ranks"
        raise ConfigError(f"hardware.micro_batch={micro} does not divide the {rows} sequences of {whose}")
    seeds = replace(
        config.seeds,
        **{n: config.seed for n in ("init", "data", "dropout") if getattr(config.seeds, n) is None},
    )
    # A tokeniser of any size may wish for a vocabulary that suits the device's tiles (bpe: a multiple of 64).
    wished = getattr(component_of(config.data.tokenizer).factory, "pad_vocab_to", 1)
    return replace(
        config,
        model=replace(config.model, pad_vocab_to=wished) if config.model.pad_vocab_to == 1 else config.model,
        hardware=replace(hardware, micro_batch=micro),
        trainer=replace(config.trainer, batch_tokens=batch),
        seeds=seeds,
    )


def _check(config: Config) -> None:
    trainer = config.trainer
    if parse_budget(trainer.budget).beyond and not trainer.start:
        raise ConfigError(f"trainer.budget={trainer.budget} counts from a checkpoint: name it with trainer.start=RUN@STEP")
    parse_duration(trainer.time_limit)
    parse_profile(trainer.profile)
    if trainer.on_nonfinite not in ON_NONFINITE:
        raise ConfigError(f"trainer.on_nonfinite={trainer.on_nonfinite} is not one of {', '.join(ON_NONFINITE)}")
    for key, least in (("max_passed", 0), ("log_spikes", 0), ("skip_spikes", 0)):
        if not getattr(trainer, key) >= least:
            raise ConfigError(f"trainer.{key}={getattr(trainer, key)} must be at least {least}")
    model = config.model
    for name in ("width", "heads", "context_length", "pad_vocab_to"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}={getattr(model, name)} must be at least 1")
    if model.depth < 0:
        raise ConfigError(f"model.depth={model.depth} must be at least 0")
    if not 0 <= model.dropout < 1:
        raise ConfigError(f"model.dropout={model.dropout} must be in [0, 1)")
    if not 0 < config.data.validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction={config.data.validation_fraction} must be between 0 and 1")
    if config.data.validation_tokens < 0:
        raise ConfigError(f"data.validation_tokens={config.data.validation_tokens} must be at least 0 (0: all)")
    if config.hardware.threads < 0:
        raise ConfigError(f"hardware.threads={config.hardware.threads} must be at least 0 (0: as torch finds them)")
    if config.trainer.log_every < 1:
        raise ConfigError(f"trainer.log_every={config.trainer.log_every} must be at least 1")
    if config.trainer.gradient_clip < 0:
        raise ConfigError(f"trainer.gradient_clip={config.trainer.gradient_clip} must be at least 0 (0: off)")
    for key, seed in [("seed", config.seed), *((f"seeds.{n}", getattr(config.seeds, n)) for n in ("init", "data", "dropout"))]:
        if seed is not None and not 0 <= seed < 1 << 63:
            raise ConfigError(f"{key}={seed} must be from 0 to 2^63 - 1")
    for key, value in (("study", config.study), ("name", config.name)):
        if value in (".", "..") or any(c in "/\\" or not c.isprintable() for c in value) or (key == "study" and not value):
            raise ConfigError(f"{key}={value!r} is the name of a folder: it cannot be empty, . or .., or hold a slash")


def _resolve_hardware(hardware: HardwareConfig, model: ModelConfig, machine: Machine) -> HardwareConfig:
    device = machine.devices[0] if hardware.device == "auto" else hardware.device
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"hardware.device={device} is not one of auto, cpu, cuda, cuda:N, mps")
    if kind not in machine.devices:
        raise ConfigError(f"hardware.device={device}: this machine has {', '.join(machine.devices)}")
    precision = hardware.precision
    if precision not in PRECISIONS:
        raise ConfigError(f"hardware.precision={precision} is not one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        if kind == "cpu":
            precision = "bf16" if machine.cpu_bf16 and model.width >= BF16_WIDTH_ON_CPU else "fp32"
        else:
            precision = "bf16" if kind == "cuda" and machine.gpu_bf16 else "fp32"
    if precision == "fp16" and component_of(hardware.strategy).name == "fsdp":
        raise ConfigError("hardware.precision=fp16 scales the loss by whole gradients; with hardware/strategy=fsdp use bf16 or fp32")
    if precision == "fp16" and kind == "cpu":
        raise ConfigError("hardware.precision=fp16 needs a GPU; on the CPU use bf16 or fp32")
    if precision == "fp8":
        _check_fp8(hardware, model, machine, kind)
    if component_of(hardware.checkpointing).name != "none":
        for slot, options in ((f.name, getattr(model, f.name)) for f in fields(model)):
            if isinstance(options, Options) and getattr(component_of(options).factory, "forbids_checkpointing", False):
                raise ConfigError(
                    f"hardware/checkpointing={component_of(hardware.checkpointing).name} runs a block twice, "
                    f"which model/{slot}={component_of(options).name} forbids; use hardware/checkpointing=none"
                )
    return replace(hardware, device=device, precision=precision)


def _check_fp8(hardware: HardwareConfig, model: ModelConfig, machine: Machine, kind: str) -> None:
    if kind != "cuda" or not machine.gpu_fp8:
        raise ConfigError("hardware.precision=fp8 needs a GPU with 8-bit products (compute capability 8.9: Ada, Hopper); use bf16")
    if component_of(hardware.strategy).name == "fsdp":
        raise ConfigError("hardware.precision=fp8 scales whole matrices, and hardware/strategy=fsdp gathers them in fp32; use ddp or bf16")
    for key in ("width", "context_length"):
        if getattr(model, key) % 16:
            raise ConfigError(f"model.{key}={getattr(model, key)} is no multiple of 16, which hardware.precision=fp8 needs")


def _whole(key: str, value: int | str) -> int:
    if isinstance(value, str) or value < 1:
        raise ConfigError(f"{key}={value} must be auto or a whole number of at least 1")
    return value


def _largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
